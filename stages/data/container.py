"""Picture files without what stands around the picture: comments, EXIF, previews. Nothing is decoded here.

Of all that is written beside the pixels only three things matter, and they are read here, with bounds: the orientation, the
colour profile, and whether there are further frames. The rest does not reach Pillow: a text chunk of gigabytes, an EXIF
directory that claims its bytes ten thousand times over and tags of an odd type cost neither memory nor the picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lfq_tokenizer import limits

ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_PROFILE = 34675
# what says how the pixels of a TIFF are stored; in the order of their numbers, in which a directory holds them
_TIFF_TAGS = {*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339}
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)  # a JPEG in strips has scans without end
_TILE_SIDES = (322, 323)
_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


class BrokenPicture(ValueError):
    """An unusable picture. `reason` is a short code to count: empty, format, too large, truncated, damaged."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Bare:
    """A picture file that holds the picture alone, and what was told beside it: EXIF's `orientation` (1 to 8), an ICC `profile`
    (b"": none), whether there are `more` frames or pages than one, and whether CMYK is `inverted`, as Adobe writes it."""

    data: bytes
    orientation: int = 1
    profile: bytes = b""
    more: bool = False
    inverted: bool = True


def bare(data: bytes) -> Bare:
    """The picture in a JPEG, PNG or TIFF file; files of other formats as they are. BrokenPicture for parts beyond all limits."""
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data)
    if data.startswith(_PNG):
        return _bare_png(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _bare_tiff(data)
    return Bare(data)


def orientation_in(exif: bytes) -> int:
    """The orientation that EXIF data tells, 1 to 8; 1 where it tells none. No other tag is looked at."""
    for tag, kind, count, place in _directory(exif.removeprefix(b"Exif\0\0"))[0]:
        if tag == ORIENTATION and kind in (1, _SHORT, _LONG) and count:
            value = _number(exif.removeprefix(b"Exif\0\0"), kind, place)
            return value if 1 <= value <= 8 else 1
    return 1


Tag = tuple[int, int, int, int]  # number, type, count of values, where its entry starts


def _directory(data: bytes) -> tuple[list[Tag], int]:
    """The entries of the first directory of TIFF data, and where the next directory's place is written (0: it is cut off)."""
    order = _order(data)
    if len(data) < 8:
        return [], 0
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return [], 0
    (count,) = struct.unpack_from(order + "H", data, start)
    places = range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12)
    end = start + 2 + 12 * count
    tags = [(*struct.unpack_from(order + "HHI", data, place), place) for place in places]
    return tags, end if end + 4 <= len(data) else 0


def _order(data: bytes) -> str:
    return ">" if data[:1] == b"M" else "<"


def _number(data: bytes, kind: int, entry: int) -> int:
    """The whole number that stands in an entry itself."""
    return int(struct.unpack_from(_order(data) + {1: "B", _SHORT: "H", _LONG: "I"}[kind], data, entry + 8)[0])


# JPEG


def _bare_jpeg(data: bytes) -> Bare:
    kept, place, orientation, adobe = [data[:2]], 2, 0, False
    profile: dict[int, bytes] = {}
    for start, marker, end in _segments(data):
        body = data[start + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = orientation or orientation_in(body)
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            profile[body[12]] = body[14:]
        adobe = adobe or (marker == 0xEE and body.startswith(b"Adobe"))
        if not (0xE1 <= marker <= 0xEF and marker != 0xEE) and marker != 0xFE:
            kept.append(data[start:end])
        place = end
    rest = data[place:]
    if rest.count(b"\xff\xda") > limits.JPEG_SCANS:
        raise BrokenPicture("damaged", f"more than {limits.JPEG_SCANS} scans in a JPEG file")
    icc = b"".join(profile[number] for number in sorted(profile))
    return Bare(b"".join(kept) + rest, orientation or 1, icc if len(icc) <= limits.PROFILE_BYTES else b"", inverted=adobe)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, marker, end) of each whole segment before the pixels."""
    place = 2
    for _ in range(limits.PICTURE_PARTS):
        marker = _MARKER.search(data, place)  # Pillow, too, passes over what stands between segments
        if marker is None or marker[1] == b"\xda" or len(data) < marker.end() + 2:
            return
        place = marker.end() - 2
        if marker[1][0] in (0x00, 0x01) or 0xD0 <= marker[1][0] <= 0xD9:  # without a length
            place += 2
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if end > len(data) or end < place + 4:
            return
        yield place, marker[1][0], end
        place = end
    raise BrokenPicture("damaged", f"more than {limits.PICTURE_PARTS} segments in a JPEG file")


# PNG


def _bare_png(data: bytes) -> Bare:
    kept, orientation, profile, frames, pixels = [_PNG], 1, b"", False, False
    place = len(_PNG)
    for _ in range(limits.PICTURE_PARTS):
        if len(data) < place + 8:
            break
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body, end = data[place + 8 : place + 8 + length], place + 12 + length
        if kind == b"eXIf" and not pixels:  # behind the pixels it has no place, and who reads a header would not find it
            orientation = orientation_in(body)
        elif kind == b"iCCP" and not pixels:
            profile = _png_profile(body)
        frames, pixels = frames or kind == b"acTL", pixels or kind == b"IDAT"
        if kind in _PNG_KEPT:
            kept.append(data[place:end])
        place = end
        if kind == b"IEND" or end > len(data):
            break
    else:
        raise BrokenPicture("damaged", f"more than {limits.PICTURE_PARTS} chunks in a PNG file")
    return Bare(b"".join(kept), orientation, profile, frames)


def _png_profile(body: bytes) -> bytes:
    """The unpacked profile; b"" for a broken one and one beyond the limit."""
    _, found, packed = body.partition(b"\0")
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], limits.PROFILE_BYTES) if found else b""
    except zlib.error:
        return b""
    return profile if unpacker.eof else b""


# TIFF


def _bare_tiff(data: bytes) -> Bare:
    tags, next_place = _directory(data)
    if not tags or not next_place:
        raise BrokenPicture("truncated", "the directory of a TIFF file lies beyond its end")
    # each tag may point anywhere, also all of them at the same bytes
    if sum(_TYPE_BYTES.get(kind, 0) * count for _, kind, count, _ in tags) > len(data) + 2**16:
        raise BrokenPicture("damaged", "the tags of a TIFF file claim more bytes than it has")
    order, orientation, profile, tile = _order(data), 1, b"", 1
    for tag, kind, count, place in tags:
        if tag == ORIENTATION and kind == _SHORT:
            orientation = _number(data, kind, place)
        elif tag == _TIFF_PROFILE and _TYPE_BYTES.get(kind) == 1 and 4 < count <= limits.PROFILE_BYTES:
            (start,) = struct.unpack_from(order + "I", data, place + 8)
            profile = data[start : start + count]
        elif tag in _TILE_SIDES and kind in (_SHORT, _LONG):
            tile *= _number(data, kind, place)
        elif tag == 259 and (kind != _SHORT or _number(data, kind, place) not in _TIFF_COMPRESSIONS):
            raise BrokenPicture("format", "a TIFF file of a rare compression")
    if tile > limits.PICTURE_PIXELS:
        raise BrokenPicture("too large", f"a tile of {tile} pixels in a TIFF file")
    kept = [data[place : place + 12] for tag, _, _, place in tags if tag in _TIFF_TAGS]
    (start,) = struct.unpack_from(order + "I", data, 4)
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    more = data[next_place : next_place + 4] != bytes(4)
    alone = data[:start] + directory + data[start + len(directory) :]
    return Bare(alone, orientation if 1 <= orientation <= 8 else 1, profile, more)
