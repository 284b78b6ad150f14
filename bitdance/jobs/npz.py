"""All pictures of a run in one npz, as ADM's evaluator reads it: `arr_0` uint8 (N,H,W,3), and `arr_1` int64 (N,) the classes.

The pictures are shuffled: the evaluator's inception score is a mean over parts, and parts of one class each give another score.
"""

import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bitdance.jobs.job import Job
from bitdance.values import shown
from lfq_tokenizer.files import check_room, whole_file

NAME = "samples.npz"
SEED = 0  # of the order


def check_npz(jobs: Collection[Job], sizes: Collection[tuple[int, int, bool]], shard: tuple[int, int], folder: Path) -> None:
    """ValueError, before anything is made, where no npz can be: a shard of the pictures, pictures of several sizes, or no room on
    the disk beside what is there."""
    if shard[1] != 1:
        raise ValueError(f"--npz with --shard {shard[0]}/{shard[1]}: it holds all pictures; run once more without --shard")
    if len(found := sorted({(height, width) for height, width, _ in sizes})) > 1:
        raise ValueError(f"--npz: the pictures have sizes {shown(found)}; an npz holds pictures of one size")
    height, width = found[0]
    here = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    check_room(here / NAME, len(jobs) * (height * width * 3 + 8))


def write_npz(jobs: Collection[Job], folder: Path) -> Path:
    """Write `samples.npz`, whole or not at all, in the memory of one picture. ValueError names pictures that are not there: a set
    with gaps is no set."""
    files = [(job.file, -1 if job.label is None else job.label) for job in jobs]
    if gaps := [name for name, _ in files if not (folder / name).is_file()]:
        raise ValueError(f"--npz: {len(gaps)} of {len(files)} pictures are missing, {gaps[0]} first; run the command again")
    order = np.random.default_rng(SEED).permutation(len(files))
    with Image.open(folder / files[0][0]) as first:
        width, height = first.size
    target = folder / NAME
    with whole_file(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            _header(member, (len(files), height, width, 3), np.uint8)
            for place in order:
                with Image.open(folder / files[place][0]) as picture:
                    member.write(np.asarray(picture.convert("RGB")).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            labels = np.array([files[place][1] for place in order], dtype=np.int64)
            _header(member, labels.shape, np.int64)
            member.write(labels.tobytes())
    return target


def _header(member: object, shape: Sequence[int], dtype: type) -> None:
    said = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(member, said)  # type: ignore[arg-type]
