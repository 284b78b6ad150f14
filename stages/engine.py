"""The training loop on DeepSpeed: a recipe goes in, checkpoints, metrics and sample grids come out.

One process needs no launcher; several are started by torchrun or deepspeed with the same command. Everything random in step n
is a function of (seed, n, process), so the step number alone restores data order and noise, and resuming is exact.
"""

import math
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from lfq_tokenizer.weights import read_safetensors, write_json, write_safetensors
from stages import checkpoint
from stages.config import OptimizerConfig, TrainingConfig, as_dict
from stages.data.shards import EpochOrder
from stages.ema import Average
from stages.recipe import Recipe
from stages.tracker import Tracker


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step `step` (from 0) in a run of `steps`: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.final_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The source of everything random in one step of one process."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)


class _Stop:
    """Remembers SIGTERM and SIGINT so that the loop can save before it ends."""

    def __init__(self) -> None:
        self.signal = 0
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self, device: torch.device) -> int:
        """The signal any process has seen."""
        if dist.get_world_size() == 1:
            return self.signal
        seen = torch.tensor([self.signal], device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return int(seen)

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class _Learner:
    """A module and its optimiser inside a DeepSpeed engine."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, config: TrainingConfig) -> None:
        import deepspeed

        self.module, self.optimizer, self.steps = module, optimizer, config.run.steps
        adam = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.run.batch_size,
            "gradient_accumulation_steps": config.run.accumulation,
            "gradient_clipping": optimizer.clip,
            "zero_optimization": {"stage": config.deepspeed.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if config.run.precision == "bfloat16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings)
        self.norm: float | None = None  # of the gradient before clipping, in the last step that was measured

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def begin(self, step: int) -> float:
        """Set the learning rate of `step` and leave eval mode, in which judging may have left the module."""
        rate = learning_rate(self.optimizer, step, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.train()
        return rate

    def descend(self, loss: torch.Tensor, measure: bool) -> None:
        """Backward and, at the end of an accumulation, the optimiser's step."""
        self.engine.backward(loss)
        zero = self.engine.zero_optimization()
        # ZeRO 0 in float32 does not report the norm, so it is computed here; other stages report it after the step.
        if measure and not zero:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(grads)) if grads else None
        self.engine.step()
        if measure and zero:
            self.norm = self.engine.get_global_grad_norm()

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """The client state; weights and optimiser are restored. ValueError when `folder` has none for these processes."""
        path, state = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ValueError(f"{folder} holds no resume state '{tag}' for this number of processes; start again with --resume no")
        return state


def _start_processes() -> None:
    """One process needs no launcher; several were started by torchrun or deepspeed."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile its shared-memory operator at the first start: 40 s, and an error without a C++ compiler. Only its
    # inference path calls it. Naming the operators that may be used also saves the probing of compilers at every start.
    deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _stop_unless_finite(losses: dict[str, torch.Tensor], step: int, samples: Callable[[], list[str]], folder: Path) -> None:
    """FloatingPointError on every process when a loss of any process is not finite; it names the batches that were met."""
    bad = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)}
    found = [f"{name} is {value} at step {step}; the batch was {', '.join(samples())}" for name, value in bad.items()]
    if dist.get_world_size() > 1:
        flag = torch.tensor([len(found)], device=next(iter(losses.values())).device)
        dist.all_reduce(flag)
        if not int(flag):
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        found = [f"{line} (process {rank})" for rank, lines in enumerate(everyone) for line in lines]
    if found:
        raise FloatingPointError(
            f"{'. '.join(found)}. Resume from the newest checkpoint in {folder} with a lower optimizer.lr, or remove the samples."
        )


def train(recipe: Recipe, config: TrainingConfig, resume: str = "auto") -> int:
    """Run to `config.run.steps`. Returns 0, or 128 + signal after saving when one arrived."""
    run, folder = config.run, Path(config.run.out)
    start_from = checkpoint.find(resume, folder)
    start = checkpoint.verify(start_from) if start_from else 0
    _start_processes()
    learner = _Learner(recipe.module, config.optimizer, config)
    opponent = _Learner(recipe.opponent.module, recipe.opponent.optimizer, config) if recipe.opponent else None
    rank, world, device = dist.get_rank(), dist.get_world_size(), learner.device
    average = Average(recipe.module, run.ema) if run.ema else None
    state = {"data": recipe.hash, "samples_per_step": run.batch_size * run.accumulation * world}
    if start_from:
        _load(learner, opponent, average, state, start_from)
    judged = average.module if average else recipe.module
    tracker = Tracker(folder, enabled=rank == 0)
    if rank == 0:
        write_json(as_dict(config), folder / "config.json")
    order = EpochOrder(recipe.length, run.seed, rank, world)
    stop = _Stop()
    bar = tqdm(total=run.steps, initial=start, disable=None if rank == 0 else True, unit="step")

    def write(target: Path) -> None:
        learner.save(target / "resume", "state", state)
        if opponent:
            opponent.save(target / "resume", "opponent", {})
        if rank == 0:
            if average:
                write_safetensors(dict(average.module.named_parameters()), target / "ema.safetensors")
            recipe.save_model(judged, target / "model")

    code, clock, waited, logged = 0, time.monotonic(), 0.0, start
    try:
        for step in range(start, run.steps):
            rate = learner.begin(step)
            # The opponent's state exists from its first step on, so it does not depend on when the run was saved.
            playing = opponent if recipe.opponent and step >= recipe.opponent.start else None
            if playing:
                playing.begin(step)
            generator = step_generator(run.seed, step, rank)
            for micro in range(run.accumulation):
                asked = time.monotonic()
                indices = order.batch(step * run.accumulation + micro, run.batch_size)
                batch = recipe.batch(indices, generator).to(device)
                waited += time.monotonic() - asked
                log = micro == run.accumulation - 1 and ((step + 1) % run.log_every == 0 or step + 1 == run.steps)
                samples = partial(recipe.describe, indices)
                try:
                    loss, scalars, made = learner.engine(batch, generator, step)
                    losses = {"loss": loss}
                    if playing:
                        losses["opponent's loss"], more = playing.engine(batch, made)
                        scalars |= more
                except ValueError as error:  # NaN where a bit should be, pictures of a wrong size
                    raise ValueError(f"step {step}: {error} The batch was {', '.join(samples())}.") from error
                _stop_unless_finite(losses, step, samples, folder)
                learner.descend(loss, measure=log)
                if playing:
                    playing.descend(losses["opponent's loss"], measure=log)
            if average:
                average.update(recipe.module, step + 1)
            done = step + 1
            bar.update()
            if log:
                seconds = time.monotonic() - clock
                images = (done - logged) * run.batch_size * run.accumulation * world
                values = {"loss": float(loss.detach()), **{k: float(v) for k, v in scalars.items()}, "lr": rate}
                norms = {"grad_norm": learner, "opponent/grad_norm": playing}
                values |= {name: who.norm for name, who in norms.items() if who and who.norm is not None}
                values |= {"images_per_s": images / seconds, "data_wait": waited / seconds, "skipped": recipe.skipped}
                tracker.scalars(done, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                clock, waited, logged = time.monotonic(), 0.0, done
            if rank == 0 and (done % run.validate_every == 0 or done == run.steps):
                tracker.scalars(done, {f"heldout/{k}": v for k, v in recipe.validate(judged).items()})
            if rank == 0 and (done % run.sample_every == 0 or done == run.steps):
                tracker.picture(done, "grid", recipe.sample(judged))
            stopped = stop.agreed(device)
            code = 128 + stopped if stopped else 0
            if done % run.save_every == 0 or done == run.steps or code:
                checkpoint.save(folder, done, write, run.keep)
            if code:
                break
    finally:
        stop.restore()
        bar.close()
        tracker.finish()
    return code


def _load(
    learner: _Learner, opponent: _Learner | None, average: Average | None, state: dict[str, Any], folder: Path
) -> None:
    """Weights, optimisers and average of a checkpoint. ValueError when `state` says that the order of samples would change."""
    saved = learner.load(folder / "resume", "state")
    if saved.get("data") != state["data"]:
        raise ValueError(
            f"{folder} was trained on other shards than data.train names now; restore them, or start again with --resume no"
        )
    if saved.get("samples_per_step") != state["samples_per_step"]:
        raise ValueError(
            f"{folder} took {saved.get('samples_per_step')} samples per step, this run takes {state['samples_per_step']} "
            "(batch_size × accumulation × processes); keep the product, or start again with --resume no"
        )
    if opponent:
        opponent.load(folder / "resume", "opponent")
    if average:
        averaged = read_safetensors(folder / "ema.safetensors")
        for name, parameter in average.module.named_parameters():
            parameter.copy_(averaged[name])
