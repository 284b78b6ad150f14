"""Training tokenizers of scales: what a step computes, codes that stay in use, what is saved and measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_engine import equal_after_a_stop, metrics

from lfq_tokenizer.any_tokenizer import load_tokenizer
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer
from stages.config import DataConfig, OptimizerConfig, RunConfig, TokenizerTraining, TrainingConfig, load_config
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.measure.reconstruction import round_trip
from stages.recipes.tokenizer.objective import ScaleObjective
from stages.recipes.tokenizer.recipe import TokenizerRecipe

SIDES = ((1, 1), (2, 2), (4, 4))
BITS = ScaleConfig("bits", 8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, sides=SIDES)
CODES = ScaleConfig("codes", 8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, codes=12, scales=3, sides=SIDES)


def pictures(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def objective(shape: ScaleConfig, **training: Any) -> ScaleObjective:
    torch.manual_seed(0)
    return ScaleObjective(ScaleTokenizer(shape), TokenizerTraining(model=shape, **training)).train()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    pack(FolderSource(folder, FolderOptions(size=16)), folder.parent / "shards", PackOptions())
    return str(folder.parent / "shards")


def config(out: Path, shards: str, shape: ScaleConfig, **training: Any) -> TrainingConfig:
    return TrainingConfig(
        recipe="tokenizer",
        run=RunConfig(
            out=str(out), steps=4, batch_size=4, ema=0.9, log_every=1, validate_every=4, sample_every=4, save_every=2, keep=9
        ),
        data=DataConfig(train=(shards,)),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-8, warmup_steps=2),
        tokenizer=TokenizerTraining(model=shape, **training),
    )


def test_a_step_without_dropout_decodes_what_the_tokenizer_encodes() -> None:
    own = objective(BITS).eval()
    _, scalars, made = own(pictures(), torch.Generator().manual_seed(0), 0)
    out, bits = round_trip(own.tokenizer, pictures())
    torch.testing.assert_close(made.clamp(-1, 1), out, rtol=0, atol=1e-5)
    assert bits.shape == (4, 8, 1 + 4 + 16, 1) and set(scalars) >= {"l1", "psnr", "entropy_per_sample", "commitment"}


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    own = objective(BITS, l1_weight=2.0, entropy_weight=0.3, commitment_weight=0.7).eval()
    loss, q, _ = own(pictures(), torch.Generator().manual_seed(0), 0)
    torch.testing.assert_close(
        loss.detach(), 2 * q["l1"] + 0.3 * (q["entropy_per_sample"] - q["entropy_of_mean"]) + 0.7 * q["commitment"]
    )


def test_dropout_leaves_out_scales_but_never_the_last_and_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    own = objective(BITS, scale_dropout=0.5)
    seen: list[tuple[Any, ...]] = []
    forward = own.tokenizer.quantize.forward
    monkeypatch.setattr(own.tokenizer.quantize, "forward", lambda z, sides: (seen.append(tuple(sides)), forward(z, sides))[1])
    for seed in range(30):
        own(pictures(), torch.Generator().manual_seed(seed), 0)
    assert {s[-1] for s in seen} == {(4, 4)} and 1 < len(set(seen)) <= 4
    counts = [sum(side in sides for sides in seen) for side in SIDES[:2]]
    assert all(5 < count < 25 for count in counts)
    own.eval()(pictures(), torch.Generator().manual_seed(0), 0)
    assert seen[-1] == SIDES


def test_an_idle_code_begins_anew_as_a_place_that_was_needed_and_the_others_stay() -> None:
    own = objective(CODES, idle_steps=3)
    codes = own.tokenizer.quantize
    with torch.no_grad():
        codes.embedding.weight[6:] = 1e3  # far from every latent
    before = codes.embedding.weight.detach().clone()
    own.eval()(pictures(), torch.Generator().manual_seed(0), 0)
    assert torch.equal(codes.embedding.weight, before)
    own.train()(pictures(), torch.Generator().manual_seed(0), 0)  # idle since before the first step
    now = codes.embedding.weight.detach()
    assert bool((now[6:].abs() < 100).all()) and int((now[:6] == before[:6]).all(dim=1).sum()) >= 1
    latents = own.tokenizer.latents(pictures()).detach()
    tokens = before_tokens(codes, before, latents)
    needed = codes_with(codes, before, lambda: codes.lacking(latents, tokens, SIDES))
    assert all(bool((needed - row).abs().sum(1).min() < 1e-4) for row in now[6:])
    assert int(own.idle_V.max()) <= 1


def test_codes_of_a_frozen_encoder_stay_what_they_are() -> None:
    own = objective(CODES, idle_steps=1, freeze_encoder=True)
    before = own.tokenizer.quantize.embedding.weight.detach().clone()
    for _ in range(4):
        own(pictures(), torch.Generator().manual_seed(0), 0)
    assert torch.equal(own.tokenizer.quantize.embedding.weight, before)


def codes_with(codes: Any, table: torch.Tensor, run: Any) -> Any:
    now = codes.embedding.weight.detach().clone()
    with torch.no_grad():
        codes.embedding.weight.copy_(table)
        found = run()
        codes.embedding.weight.copy_(now)
    return found


def before_tokens(codes: Any, table: torch.Tensor, latents: torch.Tensor) -> Any:
    return codes_with(codes, table, lambda: codes.encode(latents, SIDES))


def test_bits_of_codes_are_their_numbers() -> None:
    torch.manual_seed(0)
    tokenizer = ScaleTokenizer(CODES).eval()
    _, bits = round_trip(tokenizer, pictures())
    numbers = torch.cat([one.flatten(1) for one in tokenizer.encode(pictures())], dim=1)
    back = sum((bits[:, place, :, 0] > 0).long() << place for place in range(4))
    assert bits.shape == (4, 4, 21, 1) and torch.equal(back, numbers)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "more"), [(BITS, {"scale_dropout": 0.3}), (CODES, {"idle_steps": 1})])
def test_four_steps_equal_two_a_stop_and_two_and_are_saved(
    tmp_path: Path, shards: str, shape: ScaleConfig, more: dict[str, Any]
) -> None:
    undisturbed, settings = (config(tmp_path / name, shards, shape, **more) for name in ("whole", "parts"))
    whole = equal_after_a_stop(TokenizerRecipe, undisturbed, settings, batch=2)
    saved = load_tokenizer(whole / "model")
    assert saved.config == shape and isinstance(saved, ScaleTokenizer)
    (figures,) = [row for row in metrics(tmp_path / "whole") if "heldout/psnr" in row]
    assert figures["heldout/bits_per_picture"] == 21 * shape.bits
    assert (tmp_path / "whole" / "samples" / "grid_00000004.png").is_file()


def test_configs_say_multi_scale(tmp_path: Path) -> None:
    text = 'recipe = "tokenizer"\n[run]\nout = "x"\n[data]\ntrain = ["y"]\n[tokenizer.model]\nquantizer = "multi_scale"\n'
    path = tmp_path / "t.toml"
    path.write_text(text + "latents = 8\nsides = [1, 2, [4, 4]]\nch_mult = [1, 1]\n")
    assert load_config(path).tokenizer.model == ScaleConfig("bits", 8, ch_mult=(1, 1), sides=SIDES)
    path.write_text(text + "latents = 8\ncodes = 16\nsides = [1, 2, 4]\n")
    assert load_config(path).tokenizer.model.quantizer == "codes"
    for given, more, told in (
        ("latents = 8\n", [], "sides is empty"),
        ("latents = 8\nsides = [0]\n", [], "sides"),
        ("latents = 8\nlatent = 3\nsides = [1]\n", [], "did you mean tokenizer.model.latents"),
        ("latents = 8\nsides = [1]\ncodes = 9\n", ["tokenizer.scale_dropout=0.5"], "bits at every scale"),
        ("sides = [1]\n", [], "latents"),
    ):
        path.write_text(text + given)
        with pytest.raises(ValueError, match=told):
            load_config(path, more)
