"""Training next-scale models: batches that depend on nothing else, exact resuming, self-correction, what is saved."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from picture_training import batch, check_resuming, draw_pictures, training_config
from test_engine import metrics

from bitdance import load_pipeline
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer
from stages.cli import train as train_command
from stages.data.pack import PackOptions
from stages.engine import checkpoint
from stages.engine.loop import train
from stages.recipes.next_scale.config import NextScaleTraining, NextScaleTrainingConfig
from stages.recipes.next_scale.feed import ScaleDraws
from stages.recipes.next_scale.recipe import NextScaleRecipe
from stages.recipes.tokenizer.coding import encode_input
from stages.recipes.tokenizer.input import TokenizerInput

pytestmark = pytest.mark.slow

MODEL = {"width": 32, "depth": 2, "heads": 2, "sides": [1, 2, 4], "drop_path": 0.2}
SCALES = {
    "bits": ScaleConfig("bits", 8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
    "patchify": ScaleConfig("bits", 4, ch=32, ch_mult=(1, 1), num_res_blocks=1, patchify=True),
    "codes": ScaleConfig("codes", 8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, codes=16, scales=3),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders named after their classes, with a caption each; a tokenizer of scales of each sort."""
    home = tmp_path_factory.mktemp("next_scale")
    draw_pictures(home)
    for name, shape in SCALES.items():
        torch.manual_seed(0)
        ScaleTokenizer(shape).save_pretrained(home / name)
    return home


def config(home: Path, out: str = "run", tokenizer: str = "bits", **changes: Any) -> NextScaleTrainingConfig:
    own = {"tokenizer": str(home / tokenizer), "model": MODEL}
    return training_config(
        NextScaleTrainingConfig, "next_scale", NextScaleTraining, home / out, home / "pictures", changes, **own
    )


def of_prompts(home: Path, **changes: Any) -> NextScaleTrainingConfig:
    model = MODEL | {"shared_ada": True, "rotary": True}
    return config(home, model=model, text_encoder=str(GOLDEN / "t2i_ckpt"), **changes)


@pytest.mark.parametrize("make", [config, of_prompts])
def test_a_batch_is_a_function_of_its_samples_alone(home: Path, make: Any) -> None:
    first, second = NextScaleRecipe(make(home)), NextScaleRecipe(make(home))
    far = batch(first, range(100, 104))
    batch(second, range(50, 54))
    again = batch(second, range(100, 104))
    assert torch.equal(far.pixels_B3HW, again.pixels_B3HW) and torch.equal(far.noise.kept_D2B, again.noise.kept_D2B)
    assert all(torch.equal(a, b) for a, b in zip(far.noise.flipped, again.noise.flipped, strict=True))
    with torch.no_grad():
        whole = first.module.rows(far)
        halves = [first.module.rows(batch(first, part)) for part in (range(100, 101), range(101, 104))]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-4, atol=1e-5)


def test_self_correction_turns_as_many_bits_as_it_says() -> None:
    shape = NextScaleTraining(size=16, model=MODEL | {"flips": 0.3}).shape(SCALES["bits"], 3)
    draws = ScaleDraws(shape)
    noise = draws.joined([draws.draw(True, torch.Generator().manual_seed(i)) for i in range(400)])
    assert [tuple(one.shape) for one in noise.flipped] == [(400, 8, 1, 1), (400, 8, 2, 2)]  # of the last scale none
    share = noise.flipped[1].float().mean(dim=(1, 2, 3))
    assert share.mean().item() == pytest.approx(0.15, abs=0.02) and share.max() > 0.25 and share.min() == 0
    assert noise.dropped_B.float().mean().item() == pytest.approx(0.1, abs=0.05)
    kept = noise.kept_D2B
    assert bool((kept[0] == 1).all()) and set(kept[1].unique().tolist()) == {0.0, 1.25}
    plain = draws.draw(False, torch.Generator())
    assert not plain.flipped and not plain.dropped_B.any() and bool((plain.kept_D2B == 1).all())
    without = ScaleDraws(dataclasses.replace(shape, flips=0.0)).draw(True, torch.Generator().manual_seed(0))
    assert not without.flipped


def test_self_correction_changes_inputs_and_later_targets_alone(home: Path) -> None:
    recipe = NextScaleRecipe(config(home))
    quantizer, sides = recipe.tokenizer.quantize, recipe.module.model.config.sides
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    turned = [torch.ones(2, 8, 1, 1, dtype=torch.bool), torch.zeros(2, 8, 2, 2, dtype=torch.bool)]
    (plain, inputs), (other, changed) = quantizer.teach(latents, sides), quantizer.teach(latents, sides, turned)
    assert torch.equal(plain[0], other[0]) and not torch.equal(plain[2], other[2])
    torch.testing.assert_close(inputs[0], -changed[0])


@pytest.mark.parametrize("make", [config, of_prompts])
def test_a_resumed_run_equals_an_unbroken_one(home: Path, make: Any) -> None:
    check_resuming(NextScaleRecipe, make, home)


@pytest.mark.parametrize("tokenizer", list(SCALES))
def test_what_is_saved_makes_pictures_of_its_classes(home: Path, tokenizer: str) -> None:
    out = f"saved-{tokenizer}"
    defaults = {"guidance_scale": 2.0, "top_p": 0.9}
    settings = config(home, out, tokenizer, steps=2, defaults=defaults, ema=0.5, reweighted=True, sample_every=2)
    train(NextScaleRecipe(settings), settings)
    said = set().union(*metrics(home / out))
    assert {"loss", "heldout/tokens", "tokens/scale_1", "tokens/scale_3", "images_per_s"} <= said
    pipe = load_pipeline(checkpoint.step_folder(home / out, 2) / "model", "cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.kind == "next_scale" and pipe.names.number("cow") == 2 and pipe.settings().guidance == 2.0
    found = pipe(class_label=["cow", "ant"], seed=[1, 2])
    assert found.classes == [2, 0] and found.images[0].size == (16, 16) and len(found.tokens) == 3
    again = config(home, f"{out}-2", tokenizer, steps=1, init=str(home / out))
    assert train(NextScaleRecipe(again), again) == 0


def test_a_model_of_prompts_is_saved_with_its_text_encoder(home: Path) -> None:
    settings = of_prompts(home, out="text", steps=2, sample_prompts=("a small ant",), sample_every=2)
    train(NextScaleRecipe(settings), settings)
    pipe = load_pipeline(checkpoint.step_folder(home / "text", 2) / "model", "cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.of_prompts and pipe("a small cow", seed=1).images[0].size == (16, 16)


def test_what_it_learns(home: Path) -> None:
    settings = config(home, "learns", steps=60, lr=1e-2, log_every=1, model=MODEL | {"drop_path": 0.0, "flips": 0.0})
    train(NextScaleRecipe(settings), settings)
    losses = [row["loss"] for row in metrics(home / "learns") if "loss" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_what_does_not_fit_is_refused_with_both_values(home: Path) -> None:
    for changes, words in (
        ({"model": MODEL | {"sides": [1, 2]}}, "end with 2×2 tokens of 4 pixels, next_scale.size = 16; end them with 4"),
        ({"model": MODEL | {"sides": [2, 4]}}, "the first scale is 1×1"),
        ({"model": MODEL | {"rounds": 2}}, "next_scale.model.rounds"),
        ({"model": {"width": 32, "depth": 2}}, "lacks heads, sides"),
        ({"model": MODEL | {"heads": 3}}, "width = 32 in heads = 3"),
    ):
        with pytest.raises(ValueError, match=words.replace("[", r"\[")):
            NextScaleRecipe(config(home, **changes))
    torch.manual_seed(0)
    plain = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8)).eval()
    plain.save_pretrained(home / "lfq")
    with pytest.raises(ValueError, match="makes 8 bits; give a tokenizer of scales"):
        NextScaleRecipe(config(home, tokenizer="lfq"))
    encode_input(plain, TokenizerInput([str(home / "pictures")]), home / "lfq-bits", PackOptions())
    recipe = NextScaleRecipe(config(home, heldout=()))
    recipe.feed.data = type(recipe.feed.data)(type(recipe.feed.data.index).open([str(home / "lfq-bits")]))
    with pytest.raises(ValueError, match="a next-scale model trains on shards of pictures"):
        batch(recipe, range(2))


def test_a_plan_without_data_or_tokenizer(home: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'recipe = "next_scale"\n[run]\nout = "x"\n[data]\ntrain = ["none/*.tar"]\n[next_scale]\ntokenizer = "none"\nsize = 256\n'
        'class_count = 1000\nvae = { quantizer = "codes", latents = 32, codes = 4096, ch = 160, ch_mult = [1, 1, 2, 2, 4] }\n'
        "[next_scale.model]\nwidth = 1024\ndepth = 16\nheads = 16\nsides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]\n"
    )
    assert train_command([str(path), "--dry-run", "--processes", "8"]) == 0
    out = capsys.readouterr().out
    assert "310,283,520" in out and "680 tokens in 10 scales" in out and "108,948,355" in out
