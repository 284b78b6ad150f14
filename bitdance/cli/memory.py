"""How much memory there is. Bytes; GB means 10⁹ bytes."""

import os
from pathlib import Path

GB = 1_000_000_000


def free_bytes(device: str) -> int | None:
    """Free memory of a device, None where it cannot be told."""
    if not device.startswith("cuda"):
        return free_main_memory()
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0]


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
