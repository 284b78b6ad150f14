"""Tiles of photographs: the promised size and number, the same every time, and never of a photograph that is held out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.pack import PackOptions, pack
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.shards import ShardDataset, ShardIndex
from stages.data.tiles import TileOptions, TileSource


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Ten of 96×64 pixels; red tells which one it is, green and blue the place."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    y, x = np.mgrid[0:64, 0:96]
    for i in range(10):
        Image.fromarray(np.stack([np.full_like(x, 20 * i), 2 * x, 3 * y], axis=2).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def tiles(folder: Path, **options: object) -> list[CaptionedPicture]:
    found = list(TileSource(folder, TileOptions(**{"size": 16, "tiles": 8, **options})))  # type: ignore[arg-type]
    assert all(isinstance(item, CaptionedPicture) for item in found)
    return found  # type: ignore[return-value]


def test_every_photograph_gives_its_tiles(photographs: Path) -> None:
    found = tiles(photographs)
    assert Counter(tile.attributes["file"] for tile in found) == {f"{i}.png": 8 for i in range(10)}
    assert len({tile.key for tile in found}) == 80 and {tile.picture.size for tile in found} == {(16, 16)}
    for tile in found:  # the red of its own photograph
        red = np.asarray(tile.picture)[..., 0]
        assert abs(red.astype(int) - 20 * int(tile.captions[0])).max() <= 1


def test_tiles_are_taken_at_several_scales_within_the_limit(photographs: Path) -> None:
    def spans(**options: object) -> list[int]:
        """Columns of the photograph that a tile covers: green rises by 2 a column."""
        return [int(np.ptp(np.asarray(t.picture)[..., 1].astype(int))) // 2 + 1 for t in tiles(photographs, tiles=20, **options)]

    assert set(spans(shrink=1.0)) == {16}
    assert min(spans()) <= 20 and 48 <= max(spans()) <= 64  # 64: the shorter side


def test_splits_share_no_photograph_and_repeat(photographs: Path) -> None:
    train, heldout = (tiles(photographs, hold_out=0.3, split=split) for split in ("train", "heldout"))
    names = [{tile.attributes["file"] for tile in part} for part in (train, heldout)]
    assert len(names[0]) == 7 and len(names[1]) == 3 and not names[0] & names[1]
    again = tiles(photographs, hold_out=0.3, split="heldout")
    assert [tile.picture.tobytes() for tile in again] == [tile.picture.tobytes() for tile in heldout]
    assert [tile.picture.tobytes() for tile in tiles(photographs, seed=1)] != [t.picture.tobytes() for t in tiles(photographs)]


def test_what_cannot_be_used_is_skipped_by_reason_and_the_rest_packs(photographs: Path, tmp_path: Path) -> None:
    (photographs / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    Image.new("RGB", (15, 200)).save(photographs / "thin.png")
    skipped = [item for item in TileSource(photographs, TileOptions(size=16, tiles=2)) if isinstance(item, Skipped)]
    assert {item.name for item in skipped} == {"broken.jpg", "thin.png"}
    report = pack(TileSource(photographs, TileOptions(size=16, tiles=2)), tmp_path / "out", PackOptions())
    assert report["samples"] == 20 and sum(report["skipped"].values()) == 2
    assert ShardDataset(ShardIndex.open([str(tmp_path / "out")]))[0].picture.size == (16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 4}, "8 to 4096"), ({"tiles": 0}, "at least 1"), ({"hold_out": 0.6}, "0 to 0.5"), ({"split": "test"}, "train or")],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileOptions(**options)  # type: ignore[arg-type]


def test_an_empty_folder_and_an_empty_split_are_said(tmp_path: Path, photographs: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        TileSource(tmp_path / "absent")
    with pytest.raises(ValueError, match="heldout split is empty"):
        TileSource(photographs, TileOptions(split="heldout"))
