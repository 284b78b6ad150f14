"""What a process keeps of the memory that it lets go."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 1 << 29  # bytes


def keep_freed_memory() -> None:
    """Have glibc keep freed pieces up to `LARGEST` for the next allocation, and up to four times as much at the end of its heap.

    Without it a large piece goes back to the system when it is let go. To get it anew, page by page and zeroed, can take
    longer than a CPU's arithmetic in between: features of 64 pictures at 224×224 took 5.0 s, and 1.6 s with it (dev/LOG.md). The
    memory of a process grows by about a third. Nothing happens under another allocator or system, or where variables MALLOC_…
    say otherwise.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST)
    mallopt(M_TRIM_THRESHOLD, 4 * LARGEST - 1)
