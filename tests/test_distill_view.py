"""The teacher sees the student's noise, sub-patch by sub-patch, with what is true before it and nothing of what comes after."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_model import BITS, random_bits, tiny_model
from torch import Tensor

from bitdance.model import BitDanceModel
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.noise import ImageNoise
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids
from distill.growth import grow
from distill.teacher import Teacher
from distill.view import TeacherView, teacher_view
from stages.recipes.generator.documents import Example

REPEATS = 3
GRIDS = ((8, 8), (4, 8), (8, 12))
PROMPTS = ("a red cube on a table", "", "a blue ball")


def drawn(model: BitDanceModel, grids: Any = GRIDS, seed: int = 0) -> list[Example]:
    """Documents as training draws them for `model`, the second one without a prompt."""
    documents = []
    for k, (h, w) in enumerate(grids):
        generator = torch.Generator().manual_seed(seed + k)
        draws = ImageNoise.draw(h * w, model.head.config, 0.1, generator)
        text = conditional_ids(model.text_tokenizer, PROMPTS[k])
        image = ImagePiece(random_bits(h, w, seed + k), noise=draws)
        documents.append(Example(f"d{k}", [TextPiece(text, predict=True), image], None))
    return documents


@pytest.fixture(params=[(1, 2), (2, 4), (1, 4)], ids=lambda sides: f"{sides[0]}to{sides[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[BitDanceModel, BitDanceModel]:
    p, kp = request.param
    return tiny_model(P=p * p, diff_batch_mul=REPEATS), grow(tiny_model(P=p * p, seed=1, diff_batch_mul=REPEATS), kp)


def view_of(student: BitDanceModel, teacher: BitDanceModel, documents: list[Example], row: int = 0, text: Any = None) -> Any:
    packed = {"token_budget": row, "multiple_of": 1} if row else {}
    batch = build_batch([d.pieces for d in documents], student.patch_side, student.special, **packed)
    return teacher_view(documents, batch, teacher.block_size, student.special, packed, text), batch


def one_by_one(student: BitDanceModel, teacher: BitDanceModel, document: Example, text: Any = None) -> Tensor:
    """(S, tokens in the student's order, C): the same, put together on the grid for one document alone."""
    image = document.pieces[1]
    assert isinstance(image, ImagePiece) and image.noise is not None
    (_, h, w), P, T = image.bits_Chw.shape, student.block_size, teacher.block_size
    large, small = PatchPlan(h, w, student.patch_side), PatchPlan(h, w, teacher.patch_side)
    ids = document.pieces[0].ids if text is None else text  # type: ignore[union-attr]
    plain = build_batch([[TextPiece(ids), ImagePiece(image.bits_Chw, generated=True)]], teacher.patch_side, teacher.special)
    hidden_D = teacher.hidden(plain, flip_max=0.0)[0]
    row_N, col_N = small.coordinates()
    cond_ND = hidden_D[plain.predict_index_K] + sincos_2d(row_N, col_N, hidden_D.shape[-1])
    found = []
    for s in range(REPEATS):
        noise = large.unorder(image.noise.noise_SMPC[s].flatten(0, 1)[None])
        time = large.unorder(image.noise.time_SM[s].repeat_interleave(P)[None, :, None])
        t_M = small.order(time)[0, ::T, 0]
        e_MTC = small.order(noise)[0].unflatten(0, (-1, T))
        bits_MTC = small.order(image.bits_Chw[None])[0].unflatten(0, (-1, T))
        _, x_hat = teacher.head.predict_at(bits_MTC, cond_ND.unflatten(0, (-1, T)), t_M, e_MTC)
        found.append(large.order(small.unorder(x_hat.flatten(0, 1)[None]))[0])
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 260])
def test_predictions_are_those_of_the_teacher_on_each_picture_alone(pair: Any, row: int) -> None:
    teacher, student = pair
    documents = drawn(student)
    view, batch = view_of(student, teacher, documents, row)
    rows_RPC = Teacher(teacher).predict([view], batch, "dense")
    own_SNC = rows_RPC.unflatten(0, (REPEATS, -1)).flatten(1, 2)
    for k, document in enumerate(documents):
        torch.testing.assert_close(own_SNC[:, batch.image_N == k], one_by_one(student, teacher, document), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_guidance_goes_from_the_prediction_without_a_prompt_through_that_with_one(pair: Any) -> None:
    teacher, student = pair
    documents, nothing = drawn(student), unconditional_ids(student.text_tokenizer)
    views = [view_of(student, teacher, documents, 260, text) for text in (None, nothing)]
    batch = views[0][1]
    guided = Teacher(teacher, guidance=3.0).predict([view for view, _ in views], batch, "dense")
    own_SNC = guided.unflatten(0, (REPEATS, -1)).flatten(1, 2)
    for k, document in enumerate(documents):
        with_prompt, without = (one_by_one(student, teacher, document, text) for text in (None, nothing))
        wanted = without + 3.0 * (with_prompt - without)
        torch.testing.assert_close(own_SNC[:, batch.image_N == k], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_after_a_sub_patch_reaches_its_prediction() -> None:
    """Neither true bits nor noise of what follows in the teacher's raster."""
    teacher, student = tiny_model(P=4, diff_batch_mul=1), grow(tiny_model(P=4, diff_batch_mul=1), 4)
    documents = drawn(student, [(8, 8)])
    view, batch = view_of(student, teacher, documents)
    place = 20  # the token, in the teacher's order, from which on everything is changed
    before = Teacher(teacher).predict([view], batch, "dense").flatten(0, 1)[view.order_N]
    after = view.order_N[place:]
    changed = dataclasses.replace(batch, image_bits_NC=batch.image_bits_NC.clone())
    changed.image_bits_NC[after] *= -1
    assert changed.noise is not None
    noise = changed.noise.noise_SMPC.clone()
    noise.view(-1, BITS)[after] += 1
    changed.noise = dataclasses.replace(changed.noise, noise_SMPC=noise)
    now = Teacher(teacher).predict([view], changed, "dense").flatten(0, 1)[view.order_N]
    assert torch.equal(before[:place], now[:place])
    assert not torch.equal(before[place : place + 4], now[place : place + 4])


@torch.no_grad()
def test_the_teacher_sees_true_bits_where_the_student_sees_flipped_ones() -> None:
    teacher, student = tiny_model(P=4, diff_batch_mul=1), grow(tiny_model(P=4, diff_batch_mul=1), 4)
    documents = drawn(student, [(8, 8)])
    view, batch = view_of(student, teacher, documents)
    assert batch.noise is not None and bool(batch.noise.flipped_NC.any())
    seen = view.seen(batch)
    assert seen.noise is not None and not bool(seen.noise.flipped_NC.any())


@torch.no_grad()
def test_the_teacher_has_a_precision_of_its_own_whatever_the_students() -> None:
    teacher, student = tiny_model(P=4), grow(tiny_model(P=4), 4)
    documents = drawn(student)
    view, batch = view_of(student, teacher, documents)
    exact = Teacher(teacher).predict([view], batch, "dense")
    with torch.autocast("cpu", torch.bfloat16):
        inside = Teacher(teacher).predict([view], batch, "dense")
    assert torch.equal(exact, inside) and inside.dtype == torch.float32
    half = Teacher(tiny_model(P=4).to(torch.bfloat16)).predict([view], batch, "dense")
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().mean() < 0.02


@torch.no_grad()
def test_an_offloaded_teacher_predicts_the_same_and_keeps_no_weight_on_its_device() -> None:
    pytest.importorskip("accelerate", reason="offloading uses accelerate's hooks")
    teacher, student = tiny_model(P=4), grow(tiny_model(P=4), 4)
    view, batch = view_of(student, teacher, drawn(student))
    plain = Teacher(tiny_model(P=4)).predict([view], batch, "dense")
    offloaded = Teacher(teacher, device="cpu", offload=True)
    for _ in range(2):
        assert torch.equal(offloaded.predict([view], batch, "dense"), plain)
        assert all(parameter.is_meta for parameter in offloaded.model.head.parameters())


def test_a_view_travels_like_a_batch() -> None:
    teacher, student = tiny_model(P=4), grow(tiny_model(P=4), 4)
    view, _ = view_of(student, teacher, drawn(student))
    moved = view.to("cpu")
    assert isinstance(moved, TeacherView) and torch.equal(moved.order_N, view.order_N) and moved.T == view.T
