"""Picture files and tar files with given members, for the tests that read them."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image


def picture_bytes(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes | tarfile.TarInfo]], mode: str = "w") -> bytes:
    """A tar file of these members in this order; a TarInfo stands for itself, without data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def write_samples(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A shard of key → ending → data."""
    return write_tar(path, ((f"{key}.{end}", data) for key, members in samples.items() for end, data in members.items()))
