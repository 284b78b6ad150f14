"""How much memory there is, and how much the published models need. Bytes; GB means 10⁹ bytes."""

import os
from dataclasses import dataclass
from pathlib import Path

GB = 1_000_000_000


@dataclass(frozen=True)
class Setting:
    """A published model at one picture size: what has to be resident to make one picture with guidance.

    Parameter counts are those of the published files (head, projector and tokenizer exactly, the 14B backbone without
    its `lm_head`, which generation never uses). `tokens` is the length of the sequence; each of the two guidance
    branches keeps `cache_bytes` per token at two bytes a number.
    """

    name: str
    parameters: int
    cache_bytes: int
    tokens: int
    itemsize: int

    @property
    def bytes(self) -> int:
        """Weights + key-value cache of two branches + 10 % for activations (a rule of thumb, not measured)."""
        cache = 2 * self.tokens * self.cache_bytes * self.itemsize // 2
        return int(1.1 * (self.parameters * self.itemsize + cache))


_BACKBONE_14B = 14_768_000_000 - 778_000_000
_HEAD_64X, _PROJECTOR_14B, _TOKENIZER_D16C32 = 1_758_464_032, 26_388_480, 460_294_179
_ALL_14B = _BACKBONE_14B + _HEAD_64X + _PROJECTOR_14B + _TOKENIZER_D16C32
_CACHE_14B = 163_840  # bytes per token in bfloat16: 40 layers × 2 × 8 heads × 128 × 2
_TEXT = 304  # a prompt and the prefix, so that 1024×1024 comes to 4,400 tokens

# From the largest to the smallest.
PUBLISHED = (
    Setting("14B-64x, 1024×1024, float32", _ALL_14B, _CACHE_14B, _TEXT + 64 * 64, 4),
    Setting("14B-64x, 1024×1024, bfloat16", _ALL_14B, _CACHE_14B, _TEXT + 64 * 64, 2),
    Setting("14B-64x, 512×512, bfloat16", _ALL_14B, _CACHE_14B, _TEXT + 32 * 32, 2),
)


def largest_that_fits(free: int) -> Setting | None:
    """The first of `PUBLISHED` that needs no more than `free` bytes."""
    return next((setting for setting in PUBLISHED if setting.bytes <= free), None)


def free_main_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a process can still take: the kernel's estimate, or less by a control group. None if unknown."""
    available = _meminfo(root / "proc/meminfo")
    if available is None:
        try:
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    group = _control_group(root / "sys/fs/cgroup")
    return available if group is None else max(0, min(available, group))


def _meminfo(path: Path) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _control_group(folder: Path) -> int | None:
    """What the group may still take: limit − usage + file cache that the kernel can give back (cgroup v2, then v1)."""
    for limit, usage, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            maximum = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            fields = dict(line.split() for line in (folder / statistics).read_text().splitlines())
            return maximum - used + int(fields.get(cache, 0))
        except (OSError, ValueError):  # absent, or "max": no limit
            continue
    return None
