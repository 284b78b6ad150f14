"""`.bits` members: a picture's ±1 tokens, eight bits a byte.

Layout: magic `BITS1`, three little-endian uint16 (C, h, w), then `np.packbits` of the bits in (C, h, w) order, where 1
stands for +1. The bits that fill up the last byte are zero.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

MAGIC = b"BITS1"
_HEADER = struct.Struct("<5sHHH")
HEADER_BYTES = _HEADER.size


def pack_bits(bits_Chw: torch.Tensor) -> bytes:
    """±1 values of any dtype, shape (C, h, w), each side 1 to 65535 → bytes. ValueError for another shape or value."""
    if bits_Chw.ndim != 3 or not all(1 <= side <= 0xFFFF for side in bits_Chw.shape):
        raise ValueError(f"bits of shape {tuple(bits_Chw.shape)}: expected (C, h, w), each 1 to 65535")
    values = bits_Chw.detach().cpu()
    positive = values == 1
    if not bool((positive | (values == -1)).all()):
        raise ValueError("bits must be -1 or +1; binarize them first")
    return _HEADER.pack(MAGIC, *bits_Chw.shape) + np.packbits(positive.numpy().reshape(-1)).tobytes()


def bits_shape(data: bytes) -> tuple[int, int, int]:
    """(C, h, w) of a `.bits` member from its first `HEADER_BYTES`. ValueError for a wrong magic or an empty shape."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise ValueError(f"not a .bits member: it starts with {data[:5]!r} and holds {len(data)} bytes")
    _, channels, height, width = _HEADER.unpack_from(data)
    if channels * height * width == 0:
        raise ValueError(f".bits member of shape ({channels}, {height}, {width}) is empty")
    return channels, height, width


def unpack_bits(data: bytes) -> torch.Tensor:
    """The inverse of `pack_bits`: int8 ±1, shape (C, h, w). ValueError for a wrong magic, length or filling."""
    channels, height, width = bits_shape(data)
    count = channels * height * width
    body = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size)
    if body.size != -(-count // 8):
        raise ValueError(
            f".bits member of shape ({channels}, {height}, {width}) needs {-(-count // 8)} bytes "
            f"after the header, found {body.size}"
        )
    flat = np.unpackbits(body)
    if flat[count:].any():
        raise ValueError(".bits member has bits set behind its end")
    signs = flat[:count].astype(np.int8) * 2 - 1
    return torch.from_numpy(signs.reshape(channels, height, width))
