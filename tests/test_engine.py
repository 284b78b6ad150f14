"""The training loop, on a recipe that fits a line: resuming is exact, validation disturbs nothing, a stop loses nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lfq_tokenizer.weights import read_safetensors, write_safetensors
from stages.config import DataConfig, DeepSpeedConfig, OptimizerConfig, RunConfig, TrainingConfig
from stages.data.order import EpochOrder
from stages.engine import checkpoint, learner, resume_state, step_metrics
from stages.engine.ema import AveragedAdamW
from stages.engine.learner import learning_rate
from stages.engine.loader import step_generator
from stages.engine.loop import train
from stages.engine.tracker import Tracker
from stages.feed import MicroBatch
from stages.recipe import Discriminator, Losses

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SAMPLES = 10  # three epochs in six steps of four


class Line(nn.Module):
    def __init__(self, noise: float = 0.3) -> None:
        super().__init__()
        self.noise = noise
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)
        self.idle = nn.Parameter(torch.ones(7))  # no gradient ever reaches it
        self.register_buffer("seen", torch.zeros(()))  # a state that is not trained
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))

    def forward(self, batch: Tensor, generator: torch.Generator, step: int) -> Losses:
        x_B3, y_B2 = batch.split([3, 2], dim=1)
        if self.training:
            self.seen += 1
        x_B3 = (x_B3 + self.noise * torch.randn(x_B3.shape, generator=generator)).to(self.first.weight.dtype)
        error_B2 = self.last(self.first(x_B3).tanh()).float() - y_B2
        return error_B2.square().mean(), {"absolute": error_B2.detach().abs().mean()}, None


class LineFeed:
    """`before[n]` is called ahead of micro-batch n of this object; what is random about a sample follows from its index."""

    def __init__(self, hash: str = "line", broken: frozenset[int] = frozenset()) -> None:
        self.length, self.hash, self.broken = SAMPLES, hash, broken
        self.order = EpochOrder(SAMPLES, 0)
        self.seen: list[list[int]] = []
        self.before: dict[int, Callable[[], Any]] = {}
        self.pause = 0.0

    def batch(self, indices: range, generator: torch.Generator) -> MicroBatch:
        self.before.get(len(self.seen), lambda: None)()
        time.sleep(self.pause)
        numbers = [self.order.at(index) for index in indices]
        self.seen.append(numbers)
        skipped = {"too small": 1} if self.order.at(0) in numbers else {}
        names = [f"sample-{i}" for i in numbers]
        return MicroBatch(self.rows(indices), names, skipped, tokens=3 * len(indices), positions=4 * len(indices))

    def rows(self, indices: range) -> Tensor:
        rows = []
        for index in indices:
            number = self.order.at(index)
            x_3 = torch.sin(torch.arange(3) * (number + 1.0)) + 0.3 * torch.randn(3, generator=step_generator(9, index, 0))
            y_2 = torch.stack([x_3.sum(), x_3[0] - 1 if number not in self.broken else torch.tensor(math.nan)])
            rows.append(torch.cat([x_3, y_2]))
        return torch.stack(rows)


class LineRecipe:
    discriminator: Discriminator | None = None
    flops, base = 100.0, ""

    def __init__(self, hash: str = "line", broken: frozenset[int] = frozenset()) -> None:
        self.module: nn.Module = Line()
        self.feed = LineFeed(hash, broken)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        assert isinstance(self.module, Line)
        return {"first": [*self.module.first.parameters(), self.module.idle], "last": list(self.module.last.parameters())}

    def validate(self, module: nn.Module) -> dict[str, float]:
        torch.rand(7)  # a recipe may use the global source of random numbers; training must not
        module.eval()
        loss, *_ = module(self.feed.rows(range(4)), torch.Generator(), 0)
        return {"weight": float(sum(p.detach().abs().sum() for p in module.parameters())), "loss": float(loss.detach())}

    def sample(self, module: nn.Module) -> Image.Image:
        torch.rand(3)
        module.eval()
        return Image.new("RGB", (4, 4))

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None:
        folder.mkdir()
        write_safetensors(module.state_dict(), folder / "line.safetensors")


def config(out: Path, zero_stage: int = 0, clip: float = 0.5, matrices: str = "adamw", **run: Any) -> TrainingConfig:
    settings = {"steps": 6, "batch_size": 4, "ema": 0.9, "log_every": 1, "save_every": 100} | run
    return TrainingConfig(
        recipe="tokenizer",  # not read by the engine
        run=RunConfig(out=str(out), **settings),
        data=DataConfig(train=("none",)),
        optimizer=OptimizerConfig(
            lr=0.1, eps=1e-8, weight_decay=0.01, warmup_steps=2, schedule="cosine", clip=clip, matrices=matrices
        ),
        deepspeed=DeepSpeedConfig(zero_stage),
    )


def everything(folder: Path) -> dict[str, Any]:
    """All tensors that a checkpoint holds: model, and the weights, moments, averages and counters of its resume state."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": t for name, t in read_safetensors(path).items()}
    return found


def assert_same(first: Path, second: Path) -> None:
    a, b = everything(first), everything(second)
    assert list(a) == list(b)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "average", "step"):
        assert any(f".safetensors/{kind}/" in name for name in a), kind
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def equal_after_a_stop(recipe_of: Callable[[Any], Any], whole: Any, parts: Any, batch: int) -> Path:
    """Train `whole` in one go, and `parts`, the same in another folder, stopped by SIGTERM at that batch and gone on with; their
    last checkpoints are equal. That of `whole`."""
    assert train(recipe_of(whole), whole) == 0
    recipe, calls = recipe_of(parts), []
    original = recipe.feed.batch

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    recipe.feed.batch = counted
    assert train(recipe, parts) == 143
    assert train(recipe_of(parts), parts) == 0
    last, other = (checkpoint.step_folder(Path(config.run.out), config.run.steps) for config in (whole, parts))
    assert_same(last, other)
    return last


def metrics(run: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


# schedule, average, tracker


def test_learning_rate_warms_up_then_stays() -> None:
    settings = OptimizerConfig(lr=0.8, warmup_steps=4, schedule="constant")
    assert [learning_rate(settings, step, 100) for step in (0, 1, 3, 4, 99)] == [0.2, 0.4, 0.8, 0.8, 0.8]
    assert learning_rate(OptimizerConfig(lr=0.8, warmup_steps=0), 0, 10) == 0.8


def test_learning_rate_falls_as_half_a_cosine_to_its_floor() -> None:
    settings = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="cosine", final_fraction=0.2)
    values = [learning_rate(settings, step, 10) for step in range(11)]
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[6] == pytest.approx(0.6)  # half way from 2 to 10
    assert values[10] == pytest.approx(0.2)
    assert values[2:] == sorted(values[2:], reverse=True)
    assert learning_rate(settings, 50, 10) == pytest.approx(0.2)


def test_every_step_and_process_has_its_own_random_numbers() -> None:
    draws = {
        float(torch.rand((), generator=step_generator(seed, step, rank)))
        for seed in (0, 1)
        for step in (0, 1, 2)
        for rank in (0, 1)
    }
    assert len(draws) == 12
    assert torch.equal(torch.rand(5, generator=step_generator(1, 2, 3)), torch.rand(5, generator=step_generator(1, 2, 3)))


def test_the_average_follows_its_formula_and_warms_up() -> None:
    weight, untouched = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    adam = AveragedAdamW([{"params": [weight, untouched]}], 0.5, lr=0.1, fused=True)
    plain = nn.Parameter(weight.detach().clone())
    reference = torch.optim.AdamW([plain], lr=0.1, fused=True)
    expected = weight.detach().clone()
    for step in range(1, 20):
        for optimizer, p in ((adam, weight), (reference, plain)):
            p.grad = torch.cos(torch.arange(6.0) * step)
            optimizer.step()
        assert torch.equal(weight, plain)  # the average changes nothing in training
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(adam.state[weight]["average"], expected, rtol=1e-5, atol=1e-6)
    assert untouched not in adam.state

    before = weight.detach().clone(), adam.state[weight]["average"].clone()
    adam.exchange()
    assert torch.equal(weight, before[1]) and torch.equal(adam.state[weight]["average"], before[0])
    adam.exchange()
    assert torch.equal(weight, before[0]) and torch.equal(adam.state[weight]["average"], before[1])


def test_metrics_are_json_whatever_the_value(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars(3, {"loss": 1 / 3, "bad": math.nan, "worse": math.inf})
    tracker.picture(3, "grid", Image.new("RGB", (2, 2)))
    tracker.finish()
    assert metrics(tmp_path) == [{"step": 3, "loss": 0.333333, "bad": None, "worse": None}]
    assert (tmp_path / "samples" / "grid_00000003.png").is_file()


def test_wandb_gets_what_the_other_files_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="run.wandb = 'colours', but wandb is missing: pip install wandb"):
        Tracker(tmp_path, wandb="colours")
    calls: list[Any] = []
    session = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    package = SimpleNamespace(init=lambda **settings: calls.append(settings) or session, Image=lambda path: Path(path).name)
    monkeypatch.setitem(sys.modules, "wandb", package)
    tracker = Tracker(tmp_path, wandb="colours", config={"steps": 3})
    tracker.scalars(3, {"loss": 0.5})
    tracker.picture(3, "grid", Image.new("RGB", (2, 2)))
    tracker.finish()
    assert calls[0]["project"] == "colours" and calls[0]["config"] == {"steps": 3}
    assert calls[1:] == [(3, {"loss": 0.5}), (3, {"grid": "grid_00000003.png"}), "finish"]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", enabled=False)
    tracker.scalars(1, {"loss": 1.0})
    tracker.picture(1, "grid", Image.new("RGB", (2, 2)))
    tracker.finish()
    assert not (tmp_path / "run").exists()


# resuming


@pytest.mark.parametrize(
    ("accumulation", "zero_stage", "matrices"),
    [(1, 0, "adamw"), (2, 0, "adamw"), (2, 1, "adamw"), (1, 2, "adamw"), (2, 0, "muon")],
)
def test_six_steps_equal_three_a_stop_and_three(tmp_path: Path, accumulation: int, zero_stage: int, matrices: str) -> None:
    settings: dict[str, Any] = {"accumulation": accumulation, "zero_stage": zero_stage, "matrices": matrices}
    whole = LineRecipe()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert train(whole, config(tmp_path / "whole", **settings)) == 0

    first, second = LineRecipe(), LineRecipe()
    first.feed.before[3 * accumulation - 1] = stop  # with accumulation: between the halves of step 3
    assert train(first, config(tmp_path / "parts", **settings)) == 143
    assert [p.name for p in checkpoint.complete(tmp_path / "parts")] == ["step_00000003"]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert train(second, config(tmp_path / "parts", **settings)) == 0

    assert whole.feed.seen == first.feed.seen + second.feed.seen and len(first.feed.seen) == 3 * accumulation
    assert_same(checkpoint.step_folder(tmp_path / "whole", 6), checkpoint.step_folder(tmp_path / "parts", 6))
    keys = ("step", "loss", "absolute", "lr", "grad_norm", "heldout/weight", "heldout/loss")
    rows = [[{k: row[k] for k in keys if k in row} for row in metrics(tmp_path / n)] for n in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert train(second, config(tmp_path / "parts", **settings)) == 0  # nothing left to do
    assert len(second.feed.seen) == 3 * accumulation


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_training_changes_the_weights_and_the_average_lags_behind(tmp_path: Path, zero_stage: int) -> None:
    recipe, start = LineRecipe(), dict(Line().named_parameters())
    train(recipe, config(tmp_path, zero_stage))
    state = everything(checkpoint.step_folder(tmp_path, 6))
    held = "resume/learner_00000.safetensors"
    for name, initial in start.items():
        weight, given = state[f"{held}/weight/{name}"].view_as(initial), state[f"model/line.safetensors/{name}"]
        average = state[f"{held}/average/{name}"].view_as(initial)
        assert not torch.equal(weight, initial) and not torch.equal(average, weight)
        assert torch.equal(given, average)  # the average is what is given away


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_without_averaging_the_weights_are_given_away(tmp_path: Path, zero_stage: int) -> None:
    train(LineRecipe(), config(tmp_path, zero_stage, ema=0.0, steps=2))
    state = everything(checkpoint.step_folder(tmp_path, 2))
    assert not any("average" in name for name in state)
    given = {name: tensor for name, tensor in state.items() if name.startswith("model/") and not name.endswith("seen")}
    assert len(given) == 4
    for name, tensor in given.items():
        weight = state[name.replace("model/line.safetensors", "resume/learner_00000.safetensors/weight")]
        assert torch.equal(tensor, weight.view_as(tensor))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_validation_and_saving_do_not_disturb_training(tmp_path: Path, zero_stage: int) -> None:
    for name, every in (("often", 1), ("seldom", 6)):
        train(LineRecipe(), config(tmp_path / name, zero_stage, validate_every=every, sample_every=every, save_every=every))
    assert_same(*(checkpoint.step_folder(tmp_path / n, 6) for n in ("often", "seldom")))
    assert len(list((tmp_path / "often" / "samples").iterdir())) == 6
    assert len(list((tmp_path / "seldom" / "samples").iterdir())) == 1


def test_resume_says_where_to_start(tmp_path: Path) -> None:
    train(LineRecipe(), config(tmp_path / "a", steps=4, save_every=2))
    with pytest.raises(FileNotFoundError, match="step_00000003"):
        train(LineRecipe(), config(tmp_path / "a"), resume=str(tmp_path / "a" / "step_00000003"))
    recipe = LineRecipe()
    train(recipe, config(tmp_path / "b", steps=4), resume=str(tmp_path / "a" / "step_00000002"))
    assert len(recipe.feed.seen) == 2
    recipe = LineRecipe()
    train(recipe, config(tmp_path / "a", steps=1), resume="no")
    assert len(recipe.feed.seen) == 1
    assert checkpoint.find("auto", tmp_path / "a") == tmp_path / "a" / "step_00000001"


def test_other_data_or_another_batch_are_refused_on_resume(tmp_path: Path) -> None:
    train(LineRecipe(), config(tmp_path, steps=1))
    recipe = LineRecipe(hash="other")
    with pytest.raises(ValueError, match="other shards than data.train names now"):
        train(recipe, config(tmp_path))
    with pytest.raises(ValueError, match="took 4 samples per step, this run takes 8 .* choose run.batch_size to divide 4"):
        train(recipe := LineRecipe(), config(tmp_path, batch_size=8))
    with pytest.raises(ValueError, match="took 4 samples per step, this run takes 2 .* set run.accumulation = 2"):
        train(recipe := LineRecipe(), config(tmp_path, batch_size=2))
    with pytest.raises(ValueError, match="trained with optimizer.matrices = 'adamw', this run says 'muon'"):
        train(recipe := LineRecipe(), config(tmp_path, matrices="muon"))
    assert recipe.feed.seen == []
    with pytest.raises(ValueError, match="needs whole matrices; deepspeed.zero_stage = 2 cuts them"):
        train(LineRecipe(), config(tmp_path / "cut", 2, matrices="muon"))


def test_a_damaged_checkpoint_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    train(LineRecipe(), config(tmp_path, steps=1))
    (tmp_path / "step_00000001" / "resume" / "state.json").write_bytes(b"")
    with pytest.raises(ValueError, match="state.json has 0 bytes"):
        train(LineRecipe(), config(tmp_path))


# what a run reports


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_row_of_metrics_tells_of_its_own_step(tmp_path: Path, zero_stage: int) -> None:
    judged = LineRecipe()
    train(judged, config(tmp_path, zero_stage, steps=3, validate_every=2, log_every=2))
    rows = metrics(tmp_path)
    assert [(row["step"], "loss" in row) for row in rows] == [(2, True), (2, False), (3, True), (3, False)]
    assert rows[1].keys() == {"step", "heldout/weight", "heldout/loss"}

    module, recipe = Line(), LineRecipe()
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    settings = config(tmp_path).optimizer
    for step in range(3):
        batch = recipe.feed.rows(range(4 * step, 4 * step + 4))
        loss, scalars, _ = module(batch, step_generator(0, step, 1), step)
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, 3)
        optimizer.step()
        if step:
            row = rows[0 if step == 1 else 2]
            assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert row["absolute"] == pytest.approx(scalars["absolute"].item(), rel=1e-5)
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert row["lr"] == pytest.approx(learning_rate(settings, step, 3), rel=1e-5)
            assert row["epoch"] == pytest.approx(4 * (step + 1) / SAMPLES)
            assert row["packing"] == 0.75 and row["tokens_per_s"] == pytest.approx(3 * row["images_per_s"], rel=1e-4)
            met = sum(judged.feed.order.at(0) in seen for seen in judged.feed.seen[: step + 1])
            assert row["skipped"] == row["skipped/too small"] == met > 0
            assert 0 < row["mfu"] < 1 and 0 <= row["data_wait"] < 1 and 0.01 < row["memory"] < 1000
    assert json.loads((tmp_path / "config.json").read_text())["run"]["steps"] == 3


def test_a_loss_that_is_no_number_stops_and_names_the_batch(tmp_path: Path) -> None:
    first = LineRecipe()
    train(first, config(tmp_path / "good", steps=3))
    in_the_third, before = first.feed.seen[2][0], first.feed.seen[0] + first.feed.seen[1]
    assert in_the_third not in before, "choose another seed"
    recipe = LineRecipe(broken=frozenset({in_the_third}))
    with pytest.raises(FloatingPointError) as caught:
        train(recipe, config(tmp_path / "bad", save_every=2))
    message = str(caught.value)
    assert "loss is nan at step 2" in message and f"sample-{in_the_third}" in message and str(tmp_path / "bad") in message
    assert [checkpoint.verify(f) for f in checkpoint.complete(tmp_path / "bad")] == [2]  # what was good is still there


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "does not say what the run was"),
        ("5", "does not say what the run was"),
        ('{"data": 5, "samples_per_step": 4}', "does not say what the run was"),
        ('{"data": "line", "samples_per_step": 4, "base": []}', "does not say what the run was"),
        ('{"data": "line"}', "samples_per_step = None; a whole number from 1"),
        ('{"data": "line", "samples_per_step": 0}', "samples_per_step = 0; a whole number from 1"),
        ('{"data": "line", "samples_per_step": true}', "samples_per_step = True; a whole number from 1"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
def test_a_resume_state_of_another_shape_is_named(tmp_path: Path, text: str, message: str) -> None:
    def write(folder: Path) -> None:
        (folder / "resume").mkdir()
        (folder / "resume" / "state.json").write_text(text)

    checkpoint.save(tmp_path, 1, write, keep=1)
    with pytest.raises(ValueError, match=message) as caught:
        train(LineRecipe(), config(tmp_path))
    assert "state.json" in str(caught.value)


@pytest.mark.parametrize(
    "places", [None, "", "[]", "{", '{"weight/first.weight": 5}', '{"weight/first.weight": [0, -1]}', '{"weight/idle": [0]}']
)
def test_files_of_a_resume_state_say_where_their_numbers_belong(tmp_path: Path, places: str | None) -> None:
    metadata = {} if places is None else {"places": places}
    with pytest.raises(ValueError, match="learner_00000"):
        resume_state.read_places(metadata or None, tmp_path / "learner_00000.safetensors")


# precision, and the share of the peak


def test_auto_is_bfloat16_where_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for quick in ("bfloat16", "float32"):
        monkeypatch.setattr(learner, "quick_dtype", lambda device, quick=quick: quick)
        assert learner.precision_of(RunConfig(precision="auto")) == quick
        assert learner.precision_of(RunConfig(precision="float32")) == "float32"
        settings = learner._settings(OptimizerConfig(), config(Path("x"), precision="auto"), 10)
        assert ("torch_autocast" in settings) == (quick == "bfloat16")


def test_a_slow_precision_is_warned_of_with_its_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "slow_bfloat16", lambda device: 7.4)
    with pytest.warns(UserWarning, match="'bfloat16' takes about 7 times as long as float32 on this processor"):
        learner.warn_of_slow_precision(RunConfig(precision="bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.warn_of_slow_precision(RunConfig(precision="auto"))
        monkeypatch.setattr(learner, "slow_bfloat16", lambda device: None)
        learner.warn_of_slow_precision(RunConfig(precision="bfloat16"))


def test_no_run_reaches_more_than_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if that was measured while the machine had other work; and measuring takes no random number of the run."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert step_metrics.peak_flops(torch.device("cpu"), "float32") > 1e8 and torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(step_metrics, "peak_flops", lambda device, precision: 1.0)
    train(LineRecipe(), config(tmp_path, steps=3))
    shares = [row["mfu"] for row in metrics(tmp_path) if "mfu" in row]
    assert len(shares) == 3 and max(shares) <= 1


# a real signal to a real process


def main(out: str) -> int:
    recipe = LineRecipe()
    recipe.feed.pause = 0.05
    return train(recipe, config(Path(out), steps=100_000, keep=1))


def test_sigterm_saves_within_a_step_and_nothing_is_ever_compiled(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),  # no operator compiled earlier is found,
        "CXX": "no-such-compiler",  # and none can be compiled
    }
    run = tmp_path / "run"
    code = f"import sys, test_engine; sys.exit(test_engine.main({str(run)!r}))"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        rows = run / "metrics.jsonl"
        while not (rows.is_file() and rows.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, (tmp_path / "output").read_text()
        process.send_signal(signal.SIGTERM)
        reached = metrics(run)[-1]["step"]
        assert process.wait(60) == 143, (tmp_path / "output").read_text()
    finally:
        process.kill()
        process.wait()
    (folder,) = checkpoint.complete(run)
    assert checkpoint.verify(folder) <= reached + 2  # the step it was in, and one that ended between signal and reading
    assert checkpoint.verify(folder) == metrics(run)[-1]["step"]
    assert not list((tmp_path).glob("extensions/*"))
