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
PROMPT_FILE_BYTES = _limit("PROMPT_FILE_BYTES", 2000 * MB)  # of a prompt file that cannot be read twice, which is copied
JOBS = _limit("JOBS", 10_000_000)  # pictures of one command
LAYERS = _limit("LAYERS", 1024)  # of any network that a config describes
WIDTH = _limit("WIDTH", 1 << 20)  # channels, heads, rows of any layer that a config describes
LEVELS = _limit("LEVELS", 16)  # of a picture tokenizer: 2¹⁵ pixels per token
PICTURE_BYTES = _limit("PICTURE_BYTES", 64 * 2**20)  # of one picture file or member of a shard, before it is read
PICTURE_PIXELS = _limit("PICTURE_PIXELS", 64 * MB)  # of one picture, told from its header before a pixel is decoded
PICTURE_PARTS = _limit("PICTURE_PARTS", 100_000)  # chunks or segments of one picture file
JPEG_SCANS = _limit("JPEG_SCANS", 100)  # passes of a progressive JPEG, each of which costs time; cameras write about ten
PROFILE_BYTES = _limit("PROFILE_BYTES", 4 * 2**20)  # of a colour profile, unpacked; a larger one is ignored
CAPTION_BYTES = _limit("CAPTION_BYTES", 2**20)  # of a .txt or .json that captions a picture
TABLE_ROW_BYTES = _limit("TABLE_ROW_BYTES", 10 * MB)  # of one row of a CSV or JSONL table of captions
TAR_HEADER_BYTES = _limit("TAR_HEADER_BYTES", 1 * MB)  # of a long name or an extended header in a shard
INDEX_LINE_BYTES = _limit("INDEX_LINE_BYTES", 64 * MB)  # of one line, which is one shard, of an index file
SHARD_NAMES = _limit("SHARD_NAMES", 1_000_000)  # that braces in a shard's name may stand for
PICKLE_BYTES = _limit("PICKLE_BYTES", 64 * MB)  # of the pickle that describes the tensors in a .pt or .pth file
PICKLE_STEPS = _limit("PICKLE_STEPS", 3_000_000)  # instructions of such a pickle; a state of a thousand tensors has 40,000
