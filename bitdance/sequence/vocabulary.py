"""Which words a model was taught, and which words of a prompt it was not.

A model whose text side learned from its captions alone knows their words and no others. Its folder lists them: `words` in
`bitdance.json`. A model that began with a pretrained LLM has no such list, and nothing is said of it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bitdance.values import shown
from lfq_tokenizer.text import nearest

MOST = 20_000  # words of a list; captions with more are no small vocabulary, and get none
LONG = 5  # letters; shorter words are near too many others
ALIKE = 0.8  # of 1 for the same letters
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words_of(texts: Iterable[str]) -> list[str]:
    """The words of the texts in lower case, each once, in order of first appearance."""
    return list(dict.fromkeys(word for text in texts for word in _WORD.findall(text.casefold())))


def unknown_words(extras: Mapping[str, Any], prompts: Iterable[str]) -> list[str]:
    """The words of the prompts that the model of a `bitdance.json` was never taught; none where that lists no words."""
    known = extras.get("words")
    if not isinstance(known, list) or not known:
        return []
    taught = set(map(str, known))
    return [word for word in words_of(prompts) if word not in taught]


def with_guess(word: str, extras: Mapping[str, Any]) -> str:
    """An unknown word as a warning shows it. Beside a long one stands the word of the list that it may mean."""
    guess = nearest(word, extras["words"], ALIKE) if len(word) >= LONG else None
    return shown(word) + (f" ({guess}?)" if guess else "")


def with_words(extras: Mapping[str, Any], captions: Iterable[str]) -> dict[str, Any]:
    """The content of a `bitdance.json` after the model has also learned from `captions`. A list of words grows by theirs,
    and ends where nothing is known of them or they are too many. A model without a list gets none."""
    known = extras.get("words")
    found = words_of(captions)
    rest = {name: value for name, value in extras.items() if name != "words"}
    if not isinstance(known, list) or not known or not found:
        return rest
    words = sorted({*map(str, known), *found})
    return {**rest, "words": words} if len(words) <= MOST else rest
