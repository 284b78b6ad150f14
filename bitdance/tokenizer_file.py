"""What the tokenizer.json of a stranger may ask of the library `tokenizers`: no text that grows without end, no pattern or
vocabulary that takes for ever to match."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdance.values import shown

GROWTH = 80  # how many times longer a text may become by normalisation; NFKC alone makes one letter 18
PIECE = 1000  # characters of an entry of the vocabulary; the longest published ones are runs of 128 spaces
ADDED = 1 << 16  # tokens beside the vocabulary, which the library takes in one by one
WORD = 200  # letters that WordPiece tries to cut in every way
PATTERN = 10_000  # characters of one pattern
REPEATS = 3  # open-ended repetitions in one branch of a pattern; published ones have two
# how many letters one letter becomes at most; a chain of them multiplies
_NORMALIZERS = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Nmt": 1, "Lowercase": 2, "Strip": 1, "StripAccents": 1},
    **{"BertNormalizer": 3, "ByteLevel": 4},
}
_OPEN_REPEAT = re.compile(r"[*+]|\{[0-9]*,\}")


def check_tokenizer(content: Any, source: Path | str) -> None:
    """ValueError, which names `source`, for the JSON value of a tokenizer.json that would blow a prompt up or hang on one."""
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}; expected a JSON object")
    if (growth := _growth(content.get("normalizer"), source)) > GROWTH:
        raise ValueError(f"{source}: its normalizer makes a text up to {growth:.0f} times longer; {GROWTH} times is allowed")
    for pattern in _patterns([content.get("normalizer"), content.get("pre_tokenizer")]):
        if wrong := _endless(pattern):
            raise ValueError(f"{source}: the pattern {shown(pattern)} {wrong}, which can take for ever to match")
    added = content.get("added_tokens")
    if isinstance(added, list) and len(added) > ADDED:
        raise ValueError(f"{source}: {len(added):,} added tokens; at most {ADDED:,} are allowed")
    model = content.get("model")
    if not isinstance(model, dict):
        return  # `tokenizers` says what it misses
    longest = max((len(piece) for piece in _pieces(model.get("vocab"))), default=0)
    if longest > PIECE:
        raise ValueError(f"{source}: an entry of its vocabulary has {longest:,} characters; at most {PIECE:,} are allowed")
    word = model.get("max_input_chars_per_word")
    if isinstance(word, int) and word > WORD:
        raise ValueError(f"{source}: max_input_chars_per_word = {shown(word)}; at most {WORD} is allowed")


def _growth(step: Any, source: Path | str) -> float:
    """How many times longer a normaliser can make a text of one letter or more."""
    if step is None:
        return 1
    kind = step.get("type") if isinstance(step, dict) else step
    if kind == "Sequence":
        product = 1.0
        parts = step.get("normalizers")
        for part in parts if isinstance(parts, list) else [parts]:
            product = min(product * _growth(part, source), 1e9)
        return product
    if kind == "Replace":
        pattern, content = step.get("pattern"), str(step.get("content", ""))
        text = pattern.get("String") if isinstance(pattern, dict) else None
        # what can match between two letters puts its content there and leaves the letters
        return max(1.0, len(content) / len(text)) if isinstance(text, str) and text else 1.0 + len(content)
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend", ""))) / 100
    if kind == "Precompiled":
        return _precompiled(step.get("precompiled_charsmap"), source)
    if not isinstance(kind, str) or kind not in _NORMALIZERS:
        known = ", ".join(("Sequence", "Replace", "Prepend", "Precompiled", *_NORMALIZERS))
        raise ValueError(f"{source}: normalizer {shown(kind)} is not known; known are {known}")
    return _NORMALIZERS[kind]


def _precompiled(charsmap: Any, source: Path | str) -> float:
    """The longest replacement of a sentencepiece map: bytes of a trie, after their count, then texts that end with NUL."""
    try:
        data = base64.b64decode(charsmap or "")
    except (ValueError, TypeError):
        raise ValueError(f"{source}: precompiled_charsmap is no base64 text; download it again") from None
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return float(max(1, *(len(text.decode("utf-8", "replace")) for text in texts)))


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _patterns(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key == "Regex" and isinstance(part, str):
                yield part
            else:
                yield from _patterns(part)


def _endless(pattern: str) -> str:
    """Why a pattern may need more steps than a text is long to the third; "" where it does not."""
    if len(pattern) > PATTERN:
        return f"has {len(pattern):,} characters"
    depth = brackets = repeats = position = 0
    before = ""
    while position < len(pattern):
        letter = pattern[position]
        if letter == "\\":
            position, before = position + 2, "\\"
            continue
        if letter == "[":
            brackets += 1
        elif letter == "]":
            brackets = max(0, brackets - 1)
        elif not brackets:
            depth += (letter == "(") - (letter == ")")
            if letter == "|" and depth <= 0:
                repeats = 0
            if before == ")" and letter in "*+{":
                return "repeats a group"
            repeats += bool(_OPEN_REPEAT.match(pattern, position))
            if repeats > REPEATS:
                return f"has more than {REPEATS} repetitions in a row"
        before, position = letter, position + 1
    return ""


def _pieces(vocab: Any) -> Iterator[str]:
    """The texts of a vocabulary: keys of an object, or first members of pairs."""
    for entry in vocab if isinstance(vocab, dict | list) else ():
        piece = entry[0] if isinstance(entry, list) and entry else entry
        if isinstance(piece, str):
            yield piece
