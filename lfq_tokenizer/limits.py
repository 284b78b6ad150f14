"""How large an input may be before it is refused. One place for all rooms; SECURITY.md lists the same figures.

To raise a limit for one process, set the environment variable BITDANCE_LIMIT_NAME, for instance
BITDANCE_LIMIT_JSON_BYTES=1000000000.
"""

import os

MB = 10**6


def _limit(name: str, value: int) -> int:
    """The limit of this name: the environment's where it says a whole number, else `value`."""
    text = os.environ.get(f"BITDANCE_LIMIT_{name}", "")
    if not text:
        return value
    if not text.isdecimal() or int(text[:20]) < 1:
        raise ValueError(f"BITDANCE_LIMIT_{name} = {text[:40]!r}; a positive whole number is allowed")
    return int(text[:20])


JSON_BYTES = _limit("JSON_BYTES", 64 * MB)  # of a JSON file: a weight index of the largest models has 5 MB
CONFIG_BYTES = _limit("CONFIG_BYTES", 4 * MB)  # of a training config
PROMPT_LINE_BYTES = _limit("PROMPT_LINE_BYTES", 1 * MB)  # of one line of a prompt file, before anything reads it
PROMPT_CHARACTERS = _limit("PROMPT_CHARACTERS", 250_000)  # of one prompt; what is beyond 1,024 tokens is cut
PROMPT_FILE_BYTES = _limit("PROMPT_FILE_BYTES", 2000 * MB)
JOBS = _limit("JOBS", 10_000_000)  # pictures of one command
LAYERS = _limit("LAYERS", 1024)  # of any network that a config describes
WIDTH = _limit("WIDTH", 1 << 20)  # channels, heads, rows of any layer that a config describes
LEVELS = _limit("LEVELS", 16)  # of a picture tokenizer: 2¹⁵ pixels per token
