"""The training loop: a recipe goes in, checkpoints, metrics and sample grids come out.

One process needs no launcher; several are started by torchrun, deepspeed or SLURM with the same command. Everything random in
micro-step n is a function of (seed, n, process), so the step number alone restores data order and noise, and resuming is exact.
"""

import signal
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from lfq_tokenizer.json_file import write_json
from stages.config import TrainingConfig, as_dict
from stages.engine import checkpoint, partitions, processes, resume_state
from stages.engine.learner import Learner, precision_of, warn_of_slow_precision
from stages.engine.loader import micro_batches, step_generator
from stages.engine.progress import Progress
from stages.engine.run_folder import naming_full, owned
from stages.engine.step_metrics import StepMetrics
from stages.engine.tracker import Tracker
from stages.feed import MicroBatch
from stages.recipe import Recipe


class _Stop:
    """Remembers SIGTERM and SIGINT so that the loop can save before it ends. A launcher that is gone counts as SIGTERM."""

    def __init__(self) -> None:
        self.signal = 0
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self, device: torch.device) -> int:
        """The signal any process has seen."""
        if not self.signal and processes.orphaned():
            self.signal = signal.SIGTERM
        return int(processes.most_over_processes(torch.tensor([self.signal], device=device)))

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def train(recipe: Recipe, config: TrainingConfig, resume: str = "auto") -> int:
    """Run to `config.run.steps`. Returns 0, or 128 + signal after saving when one arrived. ValueError, on every process, while
    another run has the folder `config.run.out`, and when the disk is full; the last checkpoint stays."""
    folder = Path(config.run.out)
    processes.start()
    checkpoint.find(resume, folder)  # a wrong --resume leaves no folder behind
    with owned(folder):
        return _train(recipe, config, checkpoint.find(resume, folder))


def _train(recipe: Recipe, config: TrainingConfig, start_from: Path | None) -> int:
    run, folder = config.run, Path(config.run.out)
    start = checkpoint.verify(start_from) if start_from else 0
    warn_of_slow_precision(run)
    learner, discriminator = _learners(recipe, config)
    learners = {"learner": learner} | ({"discriminator": discriminator} if discriminator else {})
    state = resume_state.description(recipe, config)
    if start_from:
        resume_state.load(learners, state, start_from, run.accumulation)
    rank, world, device = processes.rank(), processes.world(), learner.device
    first = rank == 0
    with processes.together():
        tracker = Tracker(folder, first, run.wandb, as_dict(config), start)
        if first:
            write_json(as_dict(config), folder / "config.json")

    def write(step: int, target: Path) -> None:
        final = checkpoint.step_folder(folder, step)
        with processes.together(), naming_full(final):
            resume_state.save(learners, state, target)
        with learner.averaged() as module, processes.together(), naming_full(final):
            if first:
                recipe.save_model(module, target / "model", step)

    least = sum(resume_state.least_bytes(one) for one in learners.values())
    progress = Progress(config, start, first)
    parameters = [(partitions.size(p), p.requires_grad) for p in recipe.module.parameters()]
    sizes = sum(size for size, _ in parameters), sum(size for size, trains in parameters if trains)
    progress.opening(*sizes, str(device), precision_of(run), world)
    micros = micro_batches(recipe.feed, run, start, rank, world)
    metrics = StepMetrics(recipe, run, start, device)
    code, saved, stop = 0, start_from, _Stop()
    try:
        with tracker:
            for step in range(start, run.steps):
                done = step + 1
                log, validate, sample, save = (
                    done % every == 0 or done == run.steps
                    for every in (run.log_every, run.validate_every, run.sample_every, run.save_every)
                )
                rates = learner.begin(step)
                # The discriminator's state exists from its first step on, so it does not depend on when the run was saved.
                active = discriminator if recipe.discriminator and step >= recipe.discriminator.start else None
                if active:
                    active.begin(step)
                for number in range(step * run.accumulation, done * run.accumulation):
                    micro = metrics.take(micros)
                    # not the loader's generator: that would repeat its draws
                    generator = step_generator(run.seed, number, world + rank)
                    losses, scalars = _forward(learner, active, micro, step, generator)
                    _stop_unless_finite(losses, step, micro, folder)
                    if log:
                        metrics.note({"loss": losses["loss"], **scalars})
                    learner.step(losses["loss"], measure=log)
                    if active:
                        active.step(losses["discriminator's loss"], measure=log)
                progress.advance(done)
                if log:
                    norms = {"grad_norm": learner.norm, "discriminator/grad_norm": active.norm if active else None}
                    values = metrics.row(done) | rates | {name: norm for name, norm in norms.items() if norm is not None}
                    with processes.together():
                        tracker.scalars(done, values)
                    progress.row(done, values)
                if validate or sample:
                    with metrics.aside(), learner.averaged() as module:
                        found = recipe.validate(module) if validate else {}
                        with processes.together():
                            if found:
                                tracker.scalars(done, {f"heldout/{name}": value for name, value in found.items()})
                            if sample and first:
                                tracker.picture(done, "grid", recipe.sample(module))
                stopped = stop.agreed(device)
                code = 128 + stopped if stopped else 0
                if save or code:
                    with metrics.aside():
                        saved = checkpoint.save(folder, done, partial(write, done), run.keep, least)
                if code:
                    break
        if start < run.steps:
            progress.ending(saved, code and code - 128)
    finally:
        stop.restore()
        progress.close()
    return code


def _learners(recipe: Recipe, config: TrainingConfig) -> tuple[Learner, Learner | None]:
    if recipe.discriminator is None:
        return Learner(recipe.module, recipe.parts(), config.optimizer, config, config.run.ema), None
    if config.deepspeed.zero_stage == 3:
        raise ValueError(
            "deepspeed.zero_stage = 3 does not train a discriminator; use 0, 1 or 2, or switch tokenizer.adversary off"
        )
    module = recipe.discriminator.module
    parts = {"discriminator": list(module.parameters())}
    return (
        Learner(recipe.module, recipe.parts(), config.optimizer, config, config.run.ema),
        Learner(module, parts, recipe.discriminator.optimizer, config),
    )


def _forward(
    learner: Learner, discriminator: Learner | None, micro: MicroBatch, step: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and scalars of one micro-step. ValueError, with the samples' names, when the model refuses them."""
    try:
        batch = micro.batch.to(learner.device)
        loss, scalars, made = learner.engine(batch, generator, step)
        losses = {"loss": loss}
        if discriminator:
            losses["discriminator's loss"], more = discriminator.engine(batch, made)
            scalars |= more
    except ValueError as error:  # NaN where a bit should be, pictures of a wrong size
        raise ValueError(f"step {step}: {error} The batch was {', '.join(micro.samples)}.") from error
    return losses, scalars


def _stop_unless_finite(losses: dict[str, Tensor], step: int, micro: MicroBatch, folder: Path) -> None:
    """FloatingPointError on every process when a loss of any process is not finite; it names the batches that were met."""
    bad = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)}
    if not int(processes.most_over_processes(torch.tensor([len(bad)], device=losses["loss"].device))):
        return
    found = [f"{name} is {value} at step {step}; the batch was {', '.join(micro.samples)}" for name, value in bad.items()]
    gathered = enumerate(processes.all_gather(found))
    lines = [f"{line} (process {rank})" if processes.world() > 1 else line for rank, lines in gathered for line in lines]
    raise FloatingPointError(
        f"{'. '.join(lines)}. Resume from the newest checkpoint in {folder} with a lower optimizer.lr, or remove the samples."
    )
