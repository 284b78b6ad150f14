"""What stands out from the ground of a picture, in pieces."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Mask = NDArray[np.bool_]  # (height, width)


def pieces(mask: Mask, gap: int) -> list[Mask]:
    """The parts of a mask, of which those that are at most `gap` pixels apart count as one; from the top."""
    near = max(1, round(gap / 2))
    grown = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * near + 1))) > 127
    number = np.zeros(mask.shape, np.int32)
    found = 0
    for y, x in zip(*np.nonzero(grown), strict=True):
        if number[y, x]:
            continue
        found += 1
        number[y, x] = found
        stack = [(int(y), int(x))]
        while stack:
            row, column = stack.pop()
            for j, i in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                inside = 0 <= j < mask.shape[0] and 0 <= i < mask.shape[1]
                if inside and grown[j, i] and not number[j, i]:
                    number[j, i] = found
                    stack.append((j, i))
    parts = [mask & (number == part) for part in range(1, found + 1)]
    return [part for part in parts if part.any()]


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what a mask holds, right and bottom exclusive."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
