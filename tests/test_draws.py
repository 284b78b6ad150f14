"""The random numbers of an image belong to the image: its loss is the same alone, in a batch, packed or padded."""

import pytest
import torch
from tiny_model import BITS, random_bits, tiny_model

from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.noise import ImageNoise
from bitdance.sequence.prompt import conditional_ids

MODEL = tiny_model(diff_batch_mul=2)
SIZES = [(4, 4), (2, 6), (8, 4), (2, 2), (4, 4), (6, 6)]
CAPTIONS = ["a red cube", "a blue ball on a table", "cube", "a ball", "a red table", "a cube on a cube"]


def drawn(k: int, flip_max: float = 0.4) -> ImageNoise:
    h, w = SIZES[k]
    return ImageNoise.draw(h * w, MODEL.head.config, flip_max, torch.Generator().manual_seed(k))


def documents(members: list[int]) -> list[list[TextPiece | ImagePiece]]:
    return [
        [
            TextPiece(conditional_ids(MODEL.text_tokenizer, CAPTIONS[k]), predict=True),
            ImagePiece(random_bits(*SIZES[k], seed=k), noise=drawn(k)),
        ]
        for k in members
    ]


def losses(members: list[int], **layout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the vision and of the text loss."""
    with torch.no_grad():
        found = MODEL(build_batch(documents(members), 2, MODEL.special, **layout))
    return found.vision_rows.sum(), found.text_rows.sum()


def test_the_same_generator_gives_the_same_draws_in_their_shapes() -> None:
    one, again = drawn(2), drawn(2)
    assert one.flipped_NC.shape == (32, BITS) and one.flipped_NC.dtype == torch.bool
    assert one.time_SM.shape == (2, 8) and one.noise_SMPC.shape == (2, 8, 4, BITS)
    for name in ("flipped_NC", "time_SM", "noise_SMPC"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name)[..., :3, :], getattr(drawn(0), name)[..., :3, :]) or name == "flipped_NC"


def test_flips_follow_their_probability() -> None:
    draws = ImageNoise.draw(40_000, MODEL.head.config, 0.4, torch.Generator().manual_seed(0))
    assert float(draws.flipped_NC.float().mean()) == pytest.approx(0.2, abs=0.005)
    assert not ImageNoise.draw(400, MODEL.head.config, 0.0, torch.Generator().manual_seed(0)).flipped_NC.any()


@pytest.mark.parametrize("layout", [{}, {"token_budget": 160}, {"token_budget": 160, "multiple_of": 8}])
def test_a_loss_does_not_depend_on_the_neighbours(layout: dict[str, int]) -> None:
    alone = [losses([k]) for k in range(6)]
    together = losses([3, 0, 5, 1, 4, 2], **layout)
    for part in range(2):
        assert float(together[part]) == pytest.approx(float(sum(loss[part] for loss in alone)), rel=1e-5)


def test_draws_decide_the_loss_and_the_flips_the_input() -> None:
    batch = build_batch(documents([0, 1]), 2, MODEL.special)
    other = build_batch(documents([0, 1]), 2, MODEL.special)
    assert other.noise is not None
    other.noise.noise_SMPC[:] = torch.randn(other.noise.noise_SMPC.shape, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        assert float(MODEL(batch).total) == float(MODEL(batch, torch.Generator().manual_seed(3)).total)
        assert float(MODEL(batch).total) != float(MODEL(other).total)
        clean = MODEL.inputs(build_batch([[d[0], ImagePiece(d[1].bits_Chw)] for d in documents([0, 1])], 2, MODEL.special))
        flipped = MODEL.inputs(batch)
    moved = (clean != flipped).any(-1).flatten()
    assert batch.noise is not None
    expected = torch.zeros_like(moved)
    expected[batch.image_index_N] = batch.noise.flipped_NC.any(-1)
    assert torch.equal(moved, expected) and bool(moved.any())


def test_draws_for_some_images_only_are_refused() -> None:
    mixed = [*documents([0]), [ImagePiece(random_bits(4, 4))]]
    with pytest.raises(ValueError, match="1 of 2 generated images bring their draws"):
        build_batch(mixed, 2, MODEL.special)


def test_every_image_token_knows_its_image_whatever_row_it_stands_in() -> None:
    batch = build_batch(documents([2, 0, 5, 1]), 2, MODEL.special, token_budget=100, multiple_of=1)
    for k, member in enumerate([2, 0, 5, 1]):
        h, w = SIZES[member]
        mine = batch.image_N == k
        assert int(mine.sum()) == h * w
        grid = torch.zeros(BITS, h, w)
        grid[:, batch.image_row_N[mine], batch.image_col_N[mine]] = batch.image_bits_NC[mine].T
        assert torch.equal(grid, random_bits(h, w, seed=member))
