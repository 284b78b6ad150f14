"""The full tokenizer recipe: discriminator, perceptual term, two optimisers, the second phase."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import equal_after_a_stop, everything, metrics
from torch import Tensor, nn

from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.growth import grow_generative
from stages.config import (
    AdversaryTraining,
    DataConfig,
    DeepSpeedConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerTraining,
    TrainingConfig,
)
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.engine import checkpoint
from stages.engine.loop import train
from stages.recipes.tokenizer.adversary import Adversary, PatchDiscriminator
from stages.recipes.tokenizer.objective import objective_of
from stages.recipes.tokenizer.perceptual import weight_shapes
from stages.recipes.tokenizer.recipe import TokenizerRecipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8)
SMALL_CRITIC = {"ch": 32, "layers": 1, "lr": 1e-3}


def pictures(count: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(pictures(10)):
        levels = ((picture + 1) * 127.5).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(levels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\n")
    out = folder.with_name(f"{folder.name}-shards")
    pack(FolderSource(folder, FolderOptions(size=16)), out, PackOptions())
    return str(out)


def config(out: Path, shards: str, adversary: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **tokenizer: Any):
    settings = {"steps": 6, "batch_size": 4, "ema": 0.9, "log_every": 1, "validate_every": 6, "sample_every": 6, "save_every": 99}
    training = TokenizerTraining(
        model=tokenizer.pop("model", TINY), groups=2, adversary=AdversaryTraining(**(adversary or {})), **tokenizer
    )
    return TrainingConfig(
        recipe="tokenizer",
        run=RunConfig(out=str(out), **(settings | (run or {}))),
        data=DataConfig(train=(shards,)),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-8, warmup_steps=2),
        tokenizer=training,
    )


# the losses


def test_the_discriminator_loss_is_hinge_and_lecam() -> None:
    adversary = Adversary(AdversaryTraining(ch=32, layers=1, lecam_weight=0.3))
    with torch.no_grad():
        adversary.average_real.fill_(0.2)
        adversary.average_fake.fill_(-0.1)
    real, fake = pictures(2), pictures(2, seed=1)
    loss, scalars = adversary.eval()(real, fake)
    r, f = adversary.discriminator(real), adversary.discriminator(fake)
    hinge = 0.5 * (torch.clamp(1 - r, min=0).mean() + torch.clamp(1 + f, min=0).mean())
    lecam = torch.clamp(r + 0.1, min=0).pow(2).mean() + torch.clamp(0.2 - f, min=0).pow(2).mean()
    torch.testing.assert_close(loss, hinge + 0.3 * lecam)
    torch.testing.assert_close(scalars["lecam"], lecam.detach())
    assert float(lecam.detach()) > 0


def test_the_running_means_follow_the_logits_in_training_only() -> None:
    adversary = Adversary(AdversaryTraining(ch=32, layers=1, lecam_decay=0.75))
    real, fake = pictures(2), pictures(2, seed=1)
    adversary.eval()(real, fake)
    assert float(adversary.average_real) == 0
    _, scalars = adversary.train()(real, fake)
    torch.testing.assert_close(adversary.average_real, 0.25 * scalars["logit_real"])
    torch.testing.assert_close(adversary.average_fake, 0.25 * scalars["logit_fake"])
    assert {"average_real", "average_fake"} < adversary.state_dict().keys()  # hence in every checkpoint


def test_deceiving_moves_the_pictures_and_not_the_discriminator() -> None:
    adversary = Adversary(AdversaryTraining(ch=32, layers=1))
    fake = pictures(2).requires_grad_()
    adversary.deceive(fake).backward()
    assert fake.grad is not None and float(fake.grad.abs().max()) > 0
    assert all(p.grad is None and p.requires_grad for p in adversary.parameters())
    loss, _ = adversary(pictures(2), fake)
    fake.grad = None
    loss.backward()
    assert fake.grad is None and all(p.grad is not None for p in adversary.parameters())


def test_a_discriminator_can_learn_to_tell_blurred_from_sharp() -> None:
    torch.manual_seed(0)
    adversary = Adversary(AdversaryTraining(ch=32, layers=1))
    optimizer = torch.optim.Adam(adversary.parameters(), 2e-3, betas=(0.5, 0.9))
    losses = []
    for step in range(30):
        real = pictures(8, seed=step)
        loss, scalars = adversary(real, nn.functional.avg_pool2d(real, 3, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(scalars["discriminator"]))
    assert losses[0] == pytest.approx(1.0, abs=0.1) and losses[-1] < 0.5


def test_patches_are_counted_and_small_pictures_refused() -> None:
    critic = PatchDiscriminator(32, 3)
    assert critic(torch.zeros(1, 3, 64, 48)).shape == (1, 1, 6, 4)
    assert critic(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 24"):
        critic(torch.zeros(1, 3, 23, 64))


def test_the_objective_is_the_weighted_sum_of_its_terms() -> None:
    torch.manual_seed(0)
    training = TokenizerTraining(
        model=TINY, groups=2, l1_weight=2.0, l2_weight=3.0, entropy_weight=0.5, commitment_weight=0.7,
        adversary=AdversaryTraining(weight=0.4, start=5, **SMALL_CRITIC),
    )  # fmt: skip
    adversary = Adversary(training.adversary)
    objective = objective_of(LFQTokenizer(TINY), training, adversary=adversary)
    images = pictures(2)
    early, scalars, made = objective(images, torch.Generator(), 4)
    q = scalars
    expected = 2 * q["l1"] + 3 * (made - images).square().mean()
    expected = expected + 0.5 * (q["entropy_per_sample"] - q["entropy_of_mean"]) + 0.7 * q["commitment"]
    torch.testing.assert_close(early.detach(), expected)
    assert "adversarial" not in scalars and not made.requires_grad
    late, scalars, _ = objective(images, torch.Generator(), 5)
    torch.testing.assert_close(scalars["adversarial"], adversary.deceive(made).detach())
    torch.testing.assert_close(late.detach(), expected + 0.4 * scalars["adversarial"])


def test_held_networks_are_not_the_objective_s_own() -> None:
    training = TokenizerTraining(model=TINY, groups=2, adversary=AdversaryTraining(weight=0.1, **SMALL_CRITIC))
    objective = objective_of(LFQTokenizer(TINY), training, adversary=Adversary(training.adversary))
    assert not [name for name, _ in objective.named_parameters() if not name.startswith("tokenizer.")]
    assert copy.deepcopy(objective).adversary.module is objective.adversary.module


# the engine with two optimisers


@pytest.mark.parametrize(("start", "zero_stage"), [(2, 0), (4, 0), (2, 2)])
def test_six_steps_with_an_adversary_equal_three_a_stop_and_three(
    tmp_path: Path, shards: str, start: int, zero_stage: int
) -> None:
    critic = {"weight": 0.1, "start": start, **SMALL_CRITIC}
    undisturbed, settings = (
        dataclasses.replace(config(tmp_path / name, shards, critic), deepspeed=DeepSpeedConfig(zero_stage))
        for name in ("whole", "parts")
    )
    whole = equal_after_a_stop(TokenizerRecipe, undisturbed, settings, batch=3)
    state = everything(whole)
    for name in ("exp_avg", "average_real", "discriminator.layers"):
        assert any("discriminator" in key and name in key for key in state), name
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert ["logit_real" in row for row in rows] == [step >= start for step in range(6)]
    assert [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait", "memory")} for row in rows] == [
        {k: v for k, v in row.items() if k not in ("images_per_s", "data_wait", "memory")}
        for row in metrics(tmp_path / "parts")
        if "loss" in row
    ]


def test_an_adversary_that_breaks_stops_the_run_and_names_the_batch(tmp_path: Path, shards: str) -> None:
    settings = config(tmp_path, shards, {"weight": 0.1, "start": 2, **SMALL_CRITIC})
    recipe = TokenizerRecipe(settings)
    assert recipe.discriminator is not None
    with torch.no_grad():
        next(recipe.discriminator.module.parameters()).fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"discriminator's loss is nan at step 2; the batch was \S+-\S+") as caught:
        train(recipe, settings)
    assert str(tmp_path) in str(caught.value)


def test_a_nan_in_the_latents_never_becomes_a_bit(tmp_path: Path, shards: str) -> None:
    settings = config(tmp_path, shards)
    recipe = TokenizerRecipe(settings)
    with torch.no_grad():
        recipe.module.tokenizer.encoder.conv_out.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"step 0: .* NaN.* The batch was \S+-\S+, "):
        train(recipe, settings)
    assert checkpoint.complete(tmp_path) == []


def main(arguments: list[str]) -> None:
    out, shards, batch_size = arguments
    critic = {"weight": 0.1, "start": 1, **SMALL_CRITIC}
    settings = config(Path(out), shards, critic, {"batch_size": int(batch_size), "steps": 2})
    sys.exit(train(TokenizerRecipe(settings), settings))


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, shards: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")}
    clean |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    code = tmp_path / "run.py"
    code.write_text("import sys, test_tokenizer_recipe\ntest_tokenizer_recipe.main(sys.argv[1:])\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, size, how in (("one", "4", []), ("two", "2", launcher)):
        command = [sys.executable, *how, str(code), str(tmp_path / name), shards, size]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([r for r in metrics(tmp_path / n) if "loss" in r] for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        # Process 0 logs the loss of its own half of the batch; the entropy and the gradients are of the union.
        for name in ("entropy_of_mean", "grad_norm", *(["discriminator/grad_norm"] if a["step"] == 2 else [])):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    first, second = (everything(checkpoint.step_folder(tmp_path / n, 2)) for n in ("one", "two"))
    names = [n for n in first if "average/" in n or "discriminator.layers" in n or "average_" in n]
    assert len(names) > 10
    far = torch.cat([(first[n] - second[n]).abs().flatten() > 1e-5 for n in names])
    # Where a gradient is zero but for rounding, Adam's first step takes the sign of the rounding.
    assert float(far.float().mean()) < 1e-3


# the perceptual term and mixed precision


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right shapes; the values are random."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in weight_shapes("vgg").items():
        fan = math.prod(shape[1:]) or 1
        weights[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / fan)
        if name.startswith("heads"):
            weights[name] = weights[name].abs()
    path = tmp_path_factory.mktemp("perceptual") / "vgg.safetensors"
    save_file(weights, str(path), metadata={"net": "vgg"})
    return path


def test_the_perceptual_term_is_added_and_judged(tmp_path: Path, shards: str, perceptual: Path) -> None:
    with_it, without = (
        config(tmp_path / name, shards, run={"steps": 1}, perceptual=file, perceptual_weight=0.5)
        for name, file in (("with", str(perceptual)), ("without", ""))
    )
    for settings in (with_it, without):
        train(TokenizerRecipe(settings), settings)
    first, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert first[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.5 * first[0]["perceptual"], rel=1e-5)
    assert first[0]["perceptual"] > 0 and first[1]["heldout/lpips"] > 0
    assert "perceptual" not in plain[0] and "heldout/lpips" not in plain[1]
    saved = everything(checkpoint.step_folder(tmp_path / "with", 1))
    assert not [name for name in saved if "features" in name or "heads" in name]  # 59 MB that are no part of the model


def test_missing_perceptual_weights_are_said_at_the_start(tmp_path: Path, shards: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors are missing; make one with .*tokenizer lpips"):
        TokenizerRecipe(config(tmp_path, shards, perceptual=str(tmp_path / "absent.safetensors")))


def test_the_whole_recipe_runs_in_mixed_precision(tmp_path: Path, shards: str, perceptual: Path) -> None:
    run = {"steps": 3, "accumulation": 2, "precision": "bfloat16"}
    settings = config(tmp_path, shards, {"weight": 0.1, "start": 1, **SMALL_CRITIC}, run, perceptual=str(perceptual))
    recipe = TokenizerRecipe(settings)
    train(recipe, settings)
    row = [row for row in metrics(tmp_path) if "loss" in row][-1]
    assert {"l1", "perceptual", "adversarial", "discriminator", "lecam", "entropy_of_mean", "commitment"} < row.keys()
    assert all(p.dtype == torch.float32 for p in recipe.module.parameters())


# the second phase


def test_a_grown_decoder_gives_what_the_plain_one_gave() -> None:
    torch.manual_seed(0)
    plain = LFQTokenizer(TINY).eval()
    grown = grow_generative(plain)
    bits = plain.encode(pictures(2))
    for seed in (0, 1):
        assert torch.equal(grown.decode(bits, torch.Generator().manual_seed(seed)), plain.decode(bits))
    assert grown.config.gan_decoder and not plain.config.gan_decoder
    with pytest.raises(ValueError, match="already"):
        grow_generative(grown)


def test_the_second_phase_keeps_the_bits_in_larger_tokens_and_learns_to_use_the_noise(tmp_path: Path, shards: str) -> None:
    first = config(tmp_path / "first", shards, run={"steps": 3, "ema": 0.0})
    train(TokenizerRecipe(first), first)
    model = TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, gan_decoder=True, patch=2)
    second = config(
        tmp_path / "second", shards, {"weight": 0.1, **SMALL_CRITIC}, {"ema": 0.0},
        model=model, init=str(tmp_path / "first"), freeze_encoder=True,
    )  # fmt: skip
    recipe = TokenizerRecipe(second)
    new_inputs = recipe.module.tokenizer.decoder.conv_in.weight[:, 8:]
    assert float(new_inputs.detach().abs().max()) == 0
    train(recipe, second)
    assert float(recipe.module.tokenizer.decoder.conv_in.weight[:, 8:].detach().abs().max()) > 0
    before = LFQTokenizer.from_pretrained(checkpoint.model_folder(tmp_path / "first"))
    after = LFQTokenizer.from_pretrained(checkpoint.model_folder(tmp_path / "second"))
    images = pictures(2, seed=5)
    assert torch.equal(torch.nn.functional.pixel_unshuffle(before.encode(images), 2), after.encode(images))
    for name, tensor in before.encoder.state_dict().items():
        assert torch.equal(tensor, after.encoder.state_dict()[name])
    bits = after.encode(images)
    one, other = (after.decode(bits, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(one, other)
