"""Pictures as cameras, phones and browsers write them: upright, in sRGB, one frame; bounded whatever stands beside them."""

import io
import pickle
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from small_files import picture_bytes

from stages.data.picture import ANIMATED, BrokenPicture, decode_picture, upright_size

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FORMS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def quarters(width: int = 48, height: int = 32) -> Image.Image:
    """Every quarter of one colour, so that each way of turning shows, also after lossy coding."""
    picture = Image.new("RGB", (width, height))
    for number, colour in enumerate(((200, 20, 20), (20, 200, 20), (20, 20, 200), (220, 220, 30))):
        box = (number % 2 * width // 2, number // 2 * height // 2)
        picture.paste(colour, (*box, box[0] + width // 2, box[1] + height // 2))
    return picture


def close(one: Image.Image, other: Image.Image, most: float = 12) -> bool:
    a, b = np.asarray(one).astype(int), np.asarray(other).astype(int)
    return a.shape == b.shape and float(np.abs(a - b).mean()) < most


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """(tag, type, count, four bytes) → EXIF data; nothing says that they must make sense."""
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, len(entries)) + body + bytes(4)


def upright(number: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack(order + "HH", number, 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_turned_and_the_header_tells_the_same_size(form: str, orientation: int) -> None:
    stored = quarters() if orientation == 1 else quarters().transpose(TURNED[orientation])
    tag = Image.Exif()
    tag[0x0112] = orientation
    data = picture_bytes(stored, form, exif=tag, **({"quality": 95} if form != "TIFF" else {}))
    picture = decode_picture(data)
    assert close(picture, quarters()) and upright_size(data) == picture.size


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "odd",
    [
        (0x011A, 2, 4, b"ab\0\0"),  # a resolution as text
        (0x0131, 3, 1, b"\5\0\0\0"),  # a software that is a number
        (0x8769, 4, 1, b"\xff\xff\xff\xff"),  # a directory beyond the end
        (0x0110, 5, 2**31, b"\0\0\0\0"),
        (0x0132, 99, 1, b"\0\0\0\0"),
    ],
)
def test_a_tag_of_an_odd_type_does_not_matter(form: str, odd: tuple[int, int, int, bytes]) -> None:
    for order in "<>":
        block = exif(odd, upright(6, order), order=order)
        data = picture_bytes(quarters().transpose(Image.Transpose.ROTATE_90), form, exif=block, quality=95)
        assert close(decode_picture(data), quarters()) and upright_size(data) == (48, 32)


def test_random_exif_never_costs_a_picture() -> None:
    draw = np.random.default_rng(3)
    for _ in range(300):
        block = b"Exif\0\0" + [b"II*\0", b"MM\0*"][draw.integers(2)] + b"\x08\0\0\0" + draw.bytes(int(draw.integers(4, 80)))
        data = picture_bytes(quarters(), ("JPEG", "PNG", "WEBP")[draw.integers(3)], exif=block)
        assert decode_picture(data).size == upright_size(data)


# ---- colours


def profile_of(red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float]) -> bytes:
    """An RGB profile of these primaries, white D50, gamma 1: unlike sRGB in every respect."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def tag(kind: bytes, body: bytes) -> bytes:
        return kind + bytes(4) + body

    primaries = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (red, green, blue)]).T
    white = np.array([0.9642, 1.0, 0.8249])
    columns = (primaries * np.linalg.solve(primaries, white)).T
    tags = {name: tag(b"XYZ ", b"".join(map(number, column))) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns)}
    tags |= {b"wtpt": tag(b"XYZ ", b"".join(map(number, white)))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tag(b"curv", struct.pack(">I", 0)))
    tags |= {b"desc": tag(b"desc", struct.pack(">I", 5) + b"wide\0" + bytes(78)), b"cprt": tag(b"text", b"none\0")}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", place + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + b"".join(map(number, white)) + bytes(48)
    return head[:128] + struct.pack(">I", len(tags)) + table + body


WIDE = profile_of((0.708, 0.292), (0.17, 0.797), (0.131, 0.046))


@pytest.mark.parametrize("form", FORMS)
def test_colours_with_a_profile_become_srgb(form: str) -> None:
    plain = Image.new("RGB", (16, 16), (90, 60, 40))
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(WIDE)), ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(plain, source, target)
    assert not close(expected, plain, 30)  # so that the test can fail
    data = picture_bytes(plain, form, icc_profile=WIDE, **({"lossless": True} if form == "WEBP" else {}))
    assert close(decode_picture(data), expected, 6)


@pytest.mark.parametrize("profile", [b"no profile", WIDE[:200], WIDE[:16] + b"CMYK" + WIDE[20:], bytes(5000)])
@pytest.mark.parametrize("form", FORMS)
def test_a_broken_or_unfitting_profile_is_ignored(form: str, profile: bytes) -> None:
    assert close(decode_picture(picture_bytes(quarters(), form, icc_profile=profile)), quarters())


def test_transparency_and_a_profile_go_together() -> None:
    drawing = Image.new("RGBA", (8, 8), (90, 60, 40, 0))
    drawing.paste((90, 60, 40, 255), (0, 0, 4, 8))
    picture = decode_picture(picture_bytes(drawing, "PNG", icc_profile=WIDE))
    assert picture.getpixel((6, 4)) == (255, 255, 255) and picture.getpixel((1, 4))[0] > 130


def test_cmyk_with_and_without_adobes_mark() -> None:
    adobe = picture_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    place = adobe.index(b"\xff\xee")
    plain = adobe[:place] + adobe[place + 2 + int.from_bytes(adobe[place + 2 : place + 4], "big") :]
    red, same_numbers = decode_picture(adobe).getpixel((8, 8)), decode_picture(plain).getpixel((8, 8))
    assert red[0] > 230 and max(red[1:]) < 25
    assert max(same_numbers) < 25  # C 255, M 0, Y 0, K 255: without the mark, numbers are what they say


def test_sixteen_bits_with_a_transparent_grey() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    data = picture_bytes(grey, "PNG")
    mark = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 257 * 100)
    data = data[:33] + mark + struct.pack(">I", zlib.crc32(mark[4:])) + data[33:]
    assert [decode_picture(data).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 255]
    assert decode_picture(picture_bytes(grey, "TIFF")).getpixel((1, 0)) == (100, 100, 100)


def test_sixteen_bits_of_three_colours_with_a_transparent_one() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 256 * y, 3) for y in range(3))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 3, 16, 2, 0, 0, 0)), (b"tRNS", struct.pack(">HHH", 65535, 256, 3))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    picture = decode_picture(b"\x89PNG\r\n\x1a\n" + data)
    assert [picture.getpixel((0, y)) for y in range(3)] == [(255, 0, 0), (255, 255, 255), (255, 2, 0)]


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PNG"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_pictures_of_few_colours(form: str, mode: str) -> None:
    data = picture_bytes(quarters().convert(mode), form)
    expected = quarters().convert(mode).convert("RGB")
    assert close(decode_picture(data), expected) and upright_size(data) == (48, 32)


# ---- several frames


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_several_frames_the_first_counts_and_is_counted(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = picture_bytes(frames[0], form, save_all=True, append_images=frames[1:])
    notes: Counter[str] = Counter()
    assert close(decode_picture(data, notes=notes), frames[0]) and notes == {ANIMATED: 1} and upright_size(data) == (16, 16)
    decode_picture(picture_bytes(frames[0], form), notes=notes)
    assert notes == {ANIMATED: 1}


def test_the_second_picture_in_a_jpeg_of_a_phone_is_left_alone() -> None:
    data = picture_bytes(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], quality=95)
    assert b"MPF\0" in data and close(decode_picture(data), quarters()) and upright_size(data) == (48, 32)


# ---- what stands beside the picture is bounded


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    data = picture_bytes(quarters(), "PNG")
    more = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:33] + more + data[33:]


def test_packed_text_and_profiles_of_gigabytes_are_not_unpacked() -> None:
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    for chunk in ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        assert close(decode_picture(png_with(*[chunk] * 20)), quarters(), 1)


def claiming(count: int, size: int, order: str = "<") -> bytes:
    """EXIF whose every tag claims the same bytes."""
    entries = [(1000 + n, 7, size, struct.pack(order + "I", 0)) for n in range(count)]
    return exif(*entries, upright(1), order=order) + bytes(size)


def test_exif_that_claims_its_bytes_many_times_costs_no_memory() -> None:
    """In a process of its own: 60,000 tags of 2 MB each would be 120 GB."""
    block = claiming(60_000, 2_000_000)
    size = 60_000
    jpeg = picture_bytes(quarters(), "JPEG", quality=95)
    parts = [block[n : n + size] for n in range(0, len(block), size)]
    parts = [parts[0], *(b"Exif\0\0" + part for part in parts[1:])]
    jpeg = jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts) + jpeg[2:]
    tiff = picture_bytes(quarters(), "TIFF")
    start = struct.unpack_from("<I", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, start)[0]
    extra = b"".join(struct.pack("<HHII", 1000 + n, 7, len(tiff), 0) for n in range(60_000))
    directory = struct.pack("<H", count + 60_000) + tiff[start + 2 : start + 2 + 12 * count] + extra + bytes(4)
    tiff = tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + directory
    pictures = [jpeg, png_with((b"eXIf", block[6:])), picture_bytes(quarters(), "WEBP", exif=block), tiff]
    code = (
        "import sys, pickle\n"
        "from stages.data.picture import decode_picture, upright_size, BrokenPicture\n"
        "import PIL.ImageCms, PIL.AvifImagePlugin\n"
        "for data in pickle.load(sys.stdin.buffer):\n"
        "    for read in (decode_picture, upright_size):\n"
        "        try: read(data)\n"
        "        except BrokenPicture as error: print(error.reason)\n"
        # not ru_maxrss, which begins with the size of the process that started this one
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=pickle.dumps(pictures), capture_output=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60)),
    )  # fmt: skip
    *reasons, memory = child.stdout.decode().split()
    assert reasons == ["damaged", "damaged"] and int(memory) < 1000  # of the TIFF file alone; MB


def test_a_jpeg_of_scans_without_end_is_refused() -> None:
    data = picture_bytes(quarters(), "JPEG", progressive=True)
    assert close(decode_picture(data), quarters())
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BrokenPicture, match="scans"):
        decode_picture(data[:-2] + scan * 200 + data[-2:])


def test_a_tiff_of_one_endless_tile_is_refused_before_it_is_decoded() -> None:
    data = bytearray(picture_bytes(quarters(), "TIFF", dpi=(72, 72)))
    start = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, start)[0]):
        place = start + 2 + 12 * number
        if struct.unpack_from("<H", data, place)[0] in (282, 283):  # two tags that do not matter
            struct.pack_into("<HHII", data, place, 322 + (struct.unpack_from("<H", data, place)[0] == 283), 4, 1, 2**24)
    with pytest.raises(BrokenPicture, match="too large: a tile"):
        decode_picture(bytes(data))


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_damaged_bytes_of_these_formats_raise_nothing_else(form: str) -> None:
    draw = np.random.default_rng(1)
    whole = np.frombuffer(picture_bytes(quarters(), form), dtype=np.uint8)
    for turn in range(60):
        data = whole.copy()
        data[draw.integers(0, len(data) if turn % 2 else min(200, len(data)), 4)] = draw.integers(0, 256, 4)
        for read in (decode_picture, upright_size):
            try:
                read(data.tobytes()[: len(data) if turn % 3 else int(draw.integers(1, len(data)))])
            except BrokenPicture as error:
                assert error.reason
