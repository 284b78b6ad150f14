"""The training loss: what it depends on, what it does not, and the parts that must fit each other."""

import dataclasses

import pytest
import torch
from tiny_model import BITS, HIDDEN, random_bits, tiny_backbone, tiny_model, tiny_text_tokenizer

from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.projector import Projector
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.perturbation import perturb_bits
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import build_text_tokenizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both(model: BitDanceModel):
    return build_batch(
        [
            [TextPiece([5, 6, 7], True), ImagePiece(random_bits(4, 6, 1)), TextPiece([8, 9], True)],
            [TextPiece([10]), ImagePiece(random_bits(4, 4, 2))],
            [ImagePiece(random_bits(2, 4, 3), generated=False), TextPiece([11, 12], True)],
        ],
        model.patch_side,
        model.special,
    )


def test_losses_are_the_means_of_their_rows() -> None:
    model = tiny_model()
    losses = model(both(model), seeded(), text_weight=0.25)
    assert losses.vision_rows.shape == (10, 4) and losses.text_rows.shape == (2 + 1 + 2 + 2,)
    torch.testing.assert_close(losses.vision, losses.vision_rows.mean())
    torch.testing.assert_close(losses.text, losses.text_rows.mean())
    torch.testing.assert_close(losses.total, losses.vision + 0.25 * losses.text)
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.total = losses.text  # type: ignore[misc]


def test_every_part_gets_a_gradient() -> None:
    model = tiny_model()
    model(both(model), seeded()).total.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


def test_same_generator_same_loss_and_global_state_untouched() -> None:
    model = tiny_model()
    batch, state = both(model), torch.get_rng_state()
    first, again, other = (model(batch, seeded(s)).total for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_draw_order_is_flips_then_time_then_noise() -> None:
    model = tiny_model()
    batch, used, twin = both(model), seeded(), seeded()
    losses = model(batch, used, flip_max=0.3)
    clean = batch.image_bits_NC[batch.generated_K]
    r1, r2 = (torch.rand(clean.shape, generator=twin) for _ in range(2))
    flipped = batch.image_bits_NC.clone()
    flipped[batch.generated_K] = torch.where(r1 < 0.3 * r2, -clean, clean)
    hidden = model.hidden(dataclasses.replace(batch, image_bits_NC=flipped)).flatten(0, 1)
    place = [sincos_2d(*PatchPlan(h, w, 2).coordinates(), HIDDEN) for h, w in ((4, 6), (4, 4))]
    cond = hidden[batch.predict_index_K] + torch.cat(place)
    rows = model.head.loss(clean.reshape(-1, 4, BITS), cond.reshape(-1, 4, HIDDEN), twin)
    torch.testing.assert_close(losses.vision_rows, rows, rtol=0, atol=1e-6)
    assert torch.equal(torch.rand(3, generator=used), torch.rand(3, generator=twin))


def test_only_inputs_of_generated_images_are_flipped() -> None:
    model = tiny_model()
    batch = both(model)
    clean, flipped = model.inputs(batch), model.inputs(batch, seeded(), flip_max=1.0)
    changed = (clean != flipped).any(-1).flatten()
    assert changed[batch.image_index_N[batch.generated_K]].float().mean() > 0.9
    changed[batch.image_index_N[batch.generated_K]] = False
    assert not changed.any()


@pytest.mark.parametrize("p_max", [0.1, 0.4, 1.0])
def test_half_of_p_max_is_flipped(p_max: float) -> None:
    bits = torch.ones(1000, 200)
    rate = (perturb_bits(bits, p_max, seeded()) < 0).double().mean()
    assert abs(rate - p_max / 2) < 5 * (p_max / 2 * (1 - p_max / 2) / bits.numel()) ** 0.5
    assert torch.equal(bits, torch.ones(1000, 200))
    assert torch.equal(perturb_bits(bits, 0.0, seeded()), bits)


@pytest.mark.parametrize("p_max", [-0.1, 1.1, float("nan")])
def test_a_flip_probability_outside_its_range_is_an_error(p_max: float) -> None:
    with pytest.raises(ValueError, match="flip probability"):
        perturb_bits(torch.ones(2), p_max)
    with pytest.raises(ValueError, match="int64"):
        perturb_bits(torch.ones(2, dtype=torch.long), 0.1)


def test_a_batch_without_text_targets_or_without_images_is_no_crash() -> None:
    model = tiny_model()
    cases = {
        "vision": [[TextPiece([5, 6]), ImagePiece(random_bits(2, 4))]],
        "text": [[TextPiece([5, 6], True)]],
        "input image": [[ImagePiece(random_bits(2, 4), generated=False), TextPiece([5, 6], True)]],
        "neither": [[TextPiece([5, 6])]],
    }
    for name, documents in cases.items():
        model.zero_grad()
        losses = model(build_batch(documents, 2, model.special), seeded())
        assert (losses.vision > 0) == (name == "vision"), name
        assert (losses.text > 0) == (name in ("text", "input image")), name
        assert losses.vision_rows.shape == ((2, 4) if name == "vision" else (0, 4)), name
        losses.total.backward()
        assert torch.isfinite(losses.total)


def test_padded_packed_and_alone_give_the_same_losses() -> None:
    """Rows of the loss belong to documents, however these share rows; here the head's draws are those of the whole
    batch.
    """
    model = tiny_model()
    documents = [[TextPiece([5, 6, k], True), ImagePiece(random_bits(4, 4, k))] for k in range(5)]
    padded = model(build_batch(documents, 2, model.special, pad_to=40), seeded())
    packed = model(build_batch(documents, 2, model.special, token_budget=64), seeded())
    torch.testing.assert_close(packed.vision_rows, padded.vision_rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.text_rows, padded.text_rows, rtol=1e-4, atol=1e-5)


def test_the_loss_sees_prompt_bits_and_places() -> None:
    model = tiny_model()
    batch = both(model)
    loss = model(batch, seeded()).vision
    for field, other in [
        ("ids_BL", (batch.ids_BL + 1).clamp(max=200)),
        ("image_bits_NC", -batch.image_bits_NC),
        ("image_row_N", batch.image_col_N),
        ("predict_index_K", batch.predict_index_K - 1),
    ]:
        assert not torch.equal(model(dataclasses.replace(batch, **{field: other}), seeded()).vision, loss), field


def test_several_noise_draws_per_block() -> None:
    model = tiny_model(diff_batch_mul=3)
    losses = model(both(model), seeded())
    assert losses.vision_rows.shape == (30, 4)
    assert len(set(losses.vision_rows[::10, 0].tolist())) == 3


def test_half_precision_parts_keep_the_losses_in_float32() -> None:
    model = tiny_model()
    exact = model(both(model), seeded())
    losses = model.to(torch.bfloat16)(both(model), seeded())
    assert losses.vision_rows.dtype == losses.text_rows.dtype == losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, exact.total, rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_and_dense_give_the_same_losses() -> None:
    model = tiny_model()
    with torch.no_grad():
        dense, flex = (model(both(model), seeded(), attention=attention).total for attention in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'dense' or 'flex'"):
        model(both(model), seeded(), attention="eager")  # type: ignore[arg-type]


def test_a_few_steps_of_training_lower_the_loss() -> None:
    model = tiny_model().train()
    model.head.initialise(seeded())
    batch = both(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        losses = model(batch, seeded(), flip_max=0.0, text_weight=1.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append((losses.vision.item(), losses.text.item()))
    assert seen[-1][0] < 0.2 * seen[0][0] and seen[-1][1] < 0.5 * seen[0][1]


def head(bits: int = BITS, hidden: int = HIDDEN, P: int = 4) -> BinaryDiffusionHead:
    return BinaryDiffusionHead(HeadConfig(bits, hidden, 128, depth_latent=1, depth_adanln=1, parallel_num=P))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"projector": Projector(5, HIDDEN)}, "bits per token of projector and head differ: 5 and 6"),
        ({"projector": Projector(BITS, 16)}, "hidden size of projector and backbone differ: 16 and 32"),
        ({"head": head(hidden=16)}, "hidden size of head and backbone differ: 16 and 32"),
        ({"head": head(P=64)}, "needs 63 query tokens; the text tokenizer has 15"),
        ({"backbone": tiny_backbone(vocab_size=100)}, "embedding of 100; call backbone.grow_vocabulary"),
        ({"text_tokenizer": build_text_tokenizer(["a"], 262)}, "res_1"),
    ],
)
def test_parts_that_do_not_fit_are_named(parts: dict, message: str) -> None:
    good = {
        "tokenizer": None,
        "text_tokenizer": tiny_text_tokenizer(),
        "projector": Projector(BITS, HIDDEN),
        "backbone": tiny_backbone(),
        "head": head(),
    }
    model = BitDanceModel(**good)
    assert (model.block_size, model.patch_side) == (4, 2)
    with pytest.raises(ValueError, match=message):
        BitDanceModel(**good | parts)
