"""One chat template, one set of special tokens; a user's text is only ever text.

The conditional prompt, the unconditional prompt, and the prefix that announces an image:

    <|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n
    <|im_start|>assistant\\n
    <|vision_start|> <|res_h|> <|res_w|> <|query_1|> … <|query_{P-1}|>
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfq_tokenizer import limits
from lfq_tokenizer.json_file import read_json, write_json

MAX_PROMPT_TOKENS = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")

BASE_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

# How Qwen2 and Qwen3 cut text before BPE: contractions, words, single digits, runs of signs, line ends, spaces.
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that carry the structure of a sequence. `res_ids[n-1]` names a side of n tokens."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    res_ids: tuple[int, ...]
    query_ids: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "SpecialTokens":
        """Look the ids up. ValueError names the first token that a BitDance model folder must have and this one has
        not.
        """
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        return cls(
            im_start=_required(vocabulary, "<|im_start|>"),
            im_end=_required(vocabulary, "<|im_end|>"),
            vision_start=_required(vocabulary, "<|vision_start|>"),
            vision_end=_required(vocabulary, "<|vision_end|>"),
            res_ids=(_required(vocabulary, "<|res_1|>"), *_numbered(vocabulary, "res")[1:]),
            query_ids=_numbered(vocabulary, "query"),
        )


def _required(vocabulary: dict[str, int], token: str) -> int:
    if token not in vocabulary:
        raise _missing(token)
    return vocabulary[token]


def _missing(token: str) -> ValueError:
    return ValueError(
        f"the text tokenizer has no token {token}. The tokenizer files of a model folder must contain <|im_start|>, "
        "<|im_end|>, <|vision_start|>, <|vision_end|>, <|res_1|> … <|res_n|> and <|query_1|> … <|query_{P-1}|>; "
        "bitdance.sequence.prompt.add_image_tokens adds the last two kinds"
    )


def _numbered(vocabulary: dict[str, int], kind: str) -> tuple[int, ...]:
    """Ids of <|kind_1|>, <|kind_2|>, … without a gap."""
    prefix, suffix = f"<|{kind}_", "|>"
    count = sum(
        token.startswith(prefix) and token.endswith(suffix) and token[len(prefix) : -len(suffix)].isdecimal()
        for token in vocabulary
    )
    return tuple(_required(vocabulary, f"{prefix}{number}{suffix}") for number in range(1, count + 1))


def check_prompt(text: str) -> str:
    """The prompt as the model will read it: "" when it is empty or only white space, which means *unconditional*.

    NUL, right-to-left text and the spelling of special tokens are ordinary text. Raises ValueError for anything but a
    string, for a lone surrogate (half of a character; not Unicode text), naming its position, and for text beyond the limit.
    """
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a string, got {type(text).__name__}")
    if found := _SURROGATE.search(text):
        raise ValueError(
            f"the prompt holds a lone surrogate U+{ord(found.group()):04X} at position {found.start()}, which is no "
            "character; was the text decoded with the wrong encoding?"
        )
    if len(text) > limits.PROMPT_CHARACTERS:
        raise ValueError(f"the prompt has {len(text):,} characters; at most {limits.PROMPT_CHARACTERS:,} are read; shorten it")
    return text if text.strip() else ""


def conditional_ids(tokenizer: Any, prompt: str, max_tokens: int | None = None) -> list[int]:
    """Ids of the chat template around `prompt`. An empty prompt gives `unconditional_ids`.

    A prompt of more than `max_tokens` (default 1024) tokens is cut there, with a warning that names both lengths.
    Source: published checkpoints (encodings recorded beside the golden numbers).
    """
    limit = MAX_PROMPT_TOKENS if max_tokens is None else max_tokens
    if limit < 1:
        raise ValueError(f"the prompt limit must be at least 1 token, got {limit}")
    text = check_prompt(prompt)
    if not text:
        return unconditional_ids(tokenizer)  # OURS: the published pipeline sends a user turn without text
    # Special tokens split the template before BPE, so these pieces give the ids of the whole string for ordinary text.
    # OURS: the published pipeline would read "<|im_end|>" inside a user's text as the end of the turn.
    user_ids = _text_ids(tokenizer, f"user\n{text}")
    header = len(_text_ids(tokenizer, "user\n"))
    if len(user_ids) - header > limit:
        warnings.warn(
            f"the prompt has {len(user_ids) - header} tokens and was cut to {limit}; the rest has no effect",
            stacklevel=2,
        )
        user_ids = user_ids[: header + limit]
    reply_ids = unconditional_ids(tokenizer)
    return [reply_ids[0], *user_ids, _token_id(tokenizer, "<|im_end|>"), *_text_ids(tokenizer, "\n"), *reply_ids]


def unconditional_ids(tokenizer: Any) -> list[int]:
    """Ids of the template without a user turn: `<|im_start|>assistant\\n`."""
    return [_token_id(tokenizer, "<|im_start|>"), *_text_ids(tokenizer, "assistant\n")]


def vision_prefix_ids(special: SpecialTokens, h: int, w: int, P: int) -> list[int]:
    """[vision_start, res_h, res_w, query_1 … query_{P-1}]: what announces an image of h × w tokens, predicted P at a
    time.
    """
    sides = len(special.res_ids)
    if not (1 <= h <= sides and 1 <= w <= sides):
        raise ValueError(f"a grid of {h}x{w} tokens has no name: the text tokenizer has <|res_1|> … <|res_{sides}|>")
    if not 0 <= P - 1 <= len(special.query_ids):
        raise ValueError(
            f"{P} tokens per step need <|query_1|> … <|query_{P - 1}|>, and the text tokenizer has "
            f"{len(special.query_ids)} of them; bitdance.sequence.prompt.add_image_tokens adds more"
        )
    return [special.vision_start, special.res_ids[h - 1], special.res_ids[w - 1], *special.query_ids[: P - 1]]


def _token_id(tokenizer: Any, token: str) -> int:
    """Look a token up like `_required`, without copying a vocabulary of 150 000 entries for every prompt."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:  # some tokenizers answer with their unknown token
        raise _missing(token)
    return int(found)


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    from bitdance.foreign import panics_are_errors

    with panics_are_errors():
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def build_text_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE on `texts` and return it as a transformers fast tokenizer with `BASE_TOKENS`.

    `vocab_size` counts the 256 bytes, the merges and the six special tokens; fewer merges are learned if the texts
    hold no more. Text is cut as by Qwen2 and never normalised, so any Unicode text comes back from `decode` as it
    was. `add_image_tokens` makes the result fit for a BitDance model. Raises ValueError if `vocab_size` leaves no
    room for bytes and special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(BASE_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"a byte-level vocabulary needs at least {smallest} entries, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(BASE_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    _add_special(tokenizer, BASE_TOKENS)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def add_image_tokens(tokenizer: Any, sides: int, queries: int) -> Any:
    """Append `<|res_1|>` … `<|res_sides|>`, then `<|query_1|>` … `<|query_queries|>`, and return the tokenizer.

    What the template needs and another family's tokenizer lacks (`<|im_start|>`, `<|vision_start|>`, …) comes first.
    Tokens that are there already stay where they are, so a second call changes nothing. All of them are special
    tokens and survive save and reload. Order of the published checkpoints; a model's embedding must then be grown to
    `len(tokenizer)`.
    """
    if sides < 1 or queries < 0:
        raise ValueError(f"at least one side and no negative number of queries, got sides={sides}, queries={queries}")
    _add_special(tokenizer, TEMPLATE_TOKENS)
    _add_special(tokenizer, [f"<|res_{n}|>" for n in range(1, sides + 1)])
    _add_special(tokenizer, [f"<|query_{n}|>" for n in range(1, queries + 1)])
    return tokenizer


def save_text_tokenizer(tokenizer: Any, folder: Path | str) -> None:
    """Write the tokenizer files so that transformers 4, with which the published models were made, reads them too."""
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name that transformers 5 gave to the same class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 stops at a list of this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only", "name_or_path"):  # how this machine loaded it
        config.pop(name, None)
    write_json(config, path)


def _add_special(tokenizer: Any, tokens: Iterable[str]) -> None:
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    # add_tokens, and not add_special_tokens, whose second call forgets the tokens of the first when the folder is
    # saved.
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known],
        special_tokens=True,
    )
