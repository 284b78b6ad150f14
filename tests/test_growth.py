"""A model of larger patches starts from one of smaller ones: a prefix laid out anew, and every other weight as it was."""

from pathlib import Path

import pytest
import torch
from tiny_model import tiny_backbone, tiny_model

from bitdance import BitDancePipeline
from bitdance.folder.checkpoint import load_model
from bitdance.model import BitDanceModel
from bitdance.sequence.prompt import SpecialTokens
from distill.growth import grow, prefix_weights

PAIRS = [(2, 4), (2, 6), (2, 8), (4, 8), (3, 6), (4, 12)]


def plane(side: int, at: torch.Tensor) -> torch.Tensor:
    """A linear function of row and column of a patch of `side`, at places `at`, the same at the same relative place."""
    row, col = at // side / (side - 1), at % side / (side - 1)
    return 3.0 * row - 5.0 * col + 1.0


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_new_places_are_between_the_old_ones(old: int, new: int) -> None:
    weights = prefix_weights(old, new)
    assert weights.shape == (new**2 - 1, old**2 - 1)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(new**2 - 1))
    found = weights @ plane(old, torch.arange(1, old**2))
    at = torch.arange(1, new**2)
    # beside the corner of <|res_w|>, which is no query, there is nothing on one side to interpolate with
    inside = (at // new * (old - 1) >= new - 1) | (at % new * (old - 1) >= new - 1)
    torch.testing.assert_close(found[inside], plane(new, at)[inside])


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_corners_stay_and_rows_and_columns_are_alike(old: int, new: int) -> None:
    weights = prefix_weights(old, new)
    for corner, before in ((new - 1, old - 1), (new * (new - 1), old * (old - 1)), (new**2 - 1, old**2 - 1)):
        assert weights[corner - 1].argmax() == before - 1 and weights[corner - 1].max() == 1
    whole = torch.zeros(new**2, old**2)
    whole[1:, 1:] = weights
    grid = whole.view(new, new, old, old)
    torch.testing.assert_close(grid, grid.permute(1, 0, 3, 2))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 4), (2, 6), (4, 8)])
def test_only_the_prefix_changes(old: int, new: int, tied: bool) -> None:
    def fresh() -> BitDanceModel:
        model = tiny_model(P=old**2)
        backbone = tiny_backbone(0, tie_word_embeddings=tied)
        return BitDanceModel(None, model.text_tokenizer, model.projector, backbone, model.head).eval()

    before, grown = fresh(), grow(fresh(), new)
    assert grown.patch_side == new and grown.block_size == new**2 and not grown.training
    assert len(before.text_tokenizer) == len(fresh().text_tokenizer), "the teacher's own tokenizer is left alone"
    known, words = before.text_tokenizer.get_vocab(), grown.text_tokenizer.get_vocab()
    assert known.items() <= words.items()
    old_state, new_state = before.state_dict(), grown.state_dict()
    assert old_state.keys() == new_state.keys()
    special = SpecialTokens.from_tokenizer(grown.text_tokenizer)
    queries = list(special.query_ids[: new**2 - 1])
    tables = [name for name in old_state if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(tables) == 2
    for name, tensor in old_state.items():
        if name not in tables:
            assert torch.equal(tensor, new_state[name]), name
            continue
        kept = [row for row in range(len(tensor)) if row not in queries]
        assert torch.equal(tensor[kept], new_state[name][kept])
        own = list(before.special.query_ids[: old**2 - 1])
        if old > 1:
            wanted = prefix_weights(old, new) @ tensor[own]
        else:
            wanted = tensor[list(before.special.res_ids)].mean(0).expand(new**2 - 1, -1)
        torch.testing.assert_close(new_state[name][queries], wanted)
    embedding, output = grown.backbone.lm.get_input_embeddings().weight, grown.backbone.lm.get_output_embeddings().weight
    assert (embedding is output) == tied


@pytest.mark.parametrize("new", [4, 6, 2, 1])
def test_a_patch_that_is_no_multiple_is_refused_with_those_that_are(new: int) -> None:
    with pytest.raises(ValueError, match=r"no multiple of the teacher's 4 \(16 tokens per step\).* 8 \(64 tokens per step\)"):
        grow(tiny_model(P=16), new)


def test_a_grown_model_is_saved_loaded_and_draws(tmp_path: Path) -> None:
    model = load_model("demo", device="cpu")
    grown = grow(model, 8, {"fingerprint": "0123"})
    assert grown.extras["sizes"] == [[64, 64]], "96 pixels are 12 tokens, no multiple of 8"
    assert "height" not in grown.extras["defaults"] and grown.extras["defaults"]["preset"] == "balanced"
    assert grown.extras["card"]["teacher"] == {"fingerprint": "0123"}
    settings = {"num_inference_steps": 2, "seed": 3, "output_type": "bits"}
    pipe = BitDancePipeline(grown)
    pipe.save_pretrained(tmp_path / "grown")
    again = BitDancePipeline.from_pretrained(tmp_path / "grown", device="cpu", dtype="float32")
    assert torch.equal(pipe("a fox", **settings).bits, again("a fox", **settings).bits)
    assert again.model.extras["card"]["teacher"] == {"fingerprint": "0123"}
    blocks = []
    again("a fox", **settings, callback_on_step_end=lambda pipe, m, t, more: blocks.append(m))
    assert blocks == [0], "one block where the teacher has four"
