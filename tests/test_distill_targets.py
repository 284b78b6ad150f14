"""Predictions written beforehand teach what the living teacher teaches, and nothing foreign is taken for them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_distill_view import drawn, view_of
from tiny_model import tiny_model

from bitdance.sequence.batch import ImagePiece
from distill.growth import grow
from distill.targets import MAGIC, Targets, cached_noise, joined, settings, with_cached_noise
from distill.teacher import Teacher
from distill.writing import check_same
from stages.recipes.generator.documents import Example

HEAD = grow(tiny_model(P=4, diff_batch_mul=3), 4).head.config


def some(shape: tuple[int, ...] = (3, 2, 16, 6)) -> Targets:
    return Targets(7, settings(HEAD, 1.0), torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_targets_come_back_as_they_were() -> None:
    again = Targets.from_bytes(some().to_bytes())
    assert (again.seed, again.settings) == (7, settings(HEAD, 1.0))
    assert torch.equal(again.x_hat_SMPC, some().x_hat_SMPC.half())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_is_no_number_is_not_written(value: float) -> None:
    targets = some()
    targets.x_hat_SMPC[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="float32"):
        targets.to_bytes()


def test_damaged_targets_are_refused_whatever_was_done_to_them() -> None:
    whole = some().to_bytes()
    opening = json.dumps({"seed": 1, "shape": [1 << 60, 1 << 60, 1, 1]}).encode()
    hostile = [
        b"",
        whole[:5],
        whole[:12],
        whole[:-1],
        whole[:-2],
        whole + b"\0\0",
        b"TARGETS2" + whole[8:],
        MAGIC + b"\xff\xff\xff\xff" + whole[12:],
        MAGIC + len(opening).to_bytes(4, "little") + opening,
        *(MAGIC + len(text).to_bytes(4, "little") + text for text in (b"[]", b"{}", b"1", b'{"seed": "x", "shape": [1,1,1,1]}')),
    ]
    for data in hostile:
        with pytest.raises(ValueError, match=r"\.targets member"):
            Targets.from_bytes(data)


def cached(document: Example, seed: int, teacher: Teacher, student: object) -> Example:
    """The document with what the teacher says of it at the times and noise of `seed`."""
    image = document.pieces[1]
    assert isinstance(image, ImagePiece) and image.noise is not None
    draws = cached_noise(HEAD, image.bits_Chw[0].numel(), seed, image.noise.flipped_NC)
    alone = dataclasses.replace(document, pieces=[document.pieces[0], dataclasses.replace(image, noise=draws)])
    view, batch = view_of(student, teacher.model, [alone])  # type: ignore[arg-type]
    rows = teacher.predict([view], batch, "dense").unflatten(0, (HEAD.diff_batch_mul, -1))
    return dataclasses.replace(document, targets=Targets(seed, settings(HEAD, 1.0), rows).to_bytes())


@pytest.mark.parametrize("row", [0, 260])
@torch.no_grad()
def test_cached_predictions_equal_live_ones_at_the_same_noise(row: int) -> None:
    student = grow(tiny_model(P=4, diff_batch_mul=3), 4)
    teacher = Teacher(tiny_model(P=4, seed=5, diff_batch_mul=3))
    documents = [cached(d, 100 + k, teacher, student) for k, d in enumerate(drawn(student))]
    pairs = [with_cached_noise(document, HEAD, 1.0) for document in documents]
    own = [document for document, _ in pairs]
    view, batch = view_of(student, teacher.model, own, row)
    live = teacher.predict([view], batch, "dense").unflatten(0, (3, -1))
    kept = joined([targets for _, targets in pairs], batch)
    assert kept.dtype == torch.float16
    torch.testing.assert_close(kept.float(), live, atol=2e-3, rtol=2e-3)
    for before, after in zip(documents, own, strict=True):
        old, new = before.pieces[1], after.pieces[1]
        assert isinstance(old, ImagePiece) and isinstance(new, ImagePiece) and old.noise is not None and new.noise is not None
        assert torch.equal(old.noise.flipped_NC, new.noise.flipped_NC), "flips are the student's own"
        assert not torch.equal(old.noise.noise_SMPC, new.noise.noise_SMPC)


def test_targets_of_other_noise_or_guidance_are_refused() -> None:
    student = grow(tiny_model(P=4, diff_batch_mul=3), 4)
    (document,) = drawn(student, [(8, 8)])
    with pytest.raises(ValueError, match=r"d0 has no targets.*--write-targets"):
        with_cached_noise(document, HEAD, 1.0)
    fitting = dataclasses.replace(document, targets=some((3, 4, 16, 6)).to_bytes())
    with_cached_noise(fitting, HEAD, 1.0)
    with pytest.raises(ValueError, match=r"guidance = 1.0, the config says 2.0"):
        with_cached_noise(fitting, HEAD, 2.0)
    with pytest.raises(ValueError, match=r"P_mean = 0.0, the config says -0.8"):
        with_cached_noise(fitting, dataclasses.replace(HEAD, P_mean=-0.8), 1.0)
    with pytest.raises(ValueError, match="another size"):
        with_cached_noise(dataclasses.replace(document, targets=some((3, 2, 16, 6)).to_bytes()), HEAD, 1.0)


def test_a_folder_that_other_arguments_wrote_is_no_part_of_the_work(tmp_path: Path) -> None:
    """Another teacher, other steps, another --per-folder or --count: samples would be missing or come twice."""

    class Source:
        def __init__(self, **said: object) -> None:
            self.said = {"name": "samples", "steps": 8, "guidance_interval": (0.0, 1.0), "sha256": "new", **said}

        def describe(self) -> dict[str, object]:
            return self.said

    report = {"source": {**Source().said, "sha256": "old"}, "samples": 9, "skipped": {"cannot be read": 1}}
    (tmp_path / "pack.json").write_text(json.dumps(report))
    check_same(tmp_path, Source(), 10)  # type: ignore[arg-type]
    for source, count, words in (
        (Source(steps=2), 10, "steps = 8, this command says 2"),
        (Source(teacher="other"), 10, "teacher = None, this command says 'other'"),
        (Source(), 100, "samples = 10, this command says 100; remove it, or choose another folder"),
    ):
        with pytest.raises(ValueError, match=words):
            check_same(tmp_path, source, count)  # type: ignore[arg-type]
    (tmp_path / "pack.json").write_text("[]")
    with pytest.raises(ValueError, match="no report of this command"):
        check_same(tmp_path, Source(), 10)  # type: ignore[arg-type]
