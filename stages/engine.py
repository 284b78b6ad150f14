"""The training loop on DeepSpeed: a recipe goes in, checkpoints, metrics and sample grids come out.

One process needs no launcher; several are started by torchrun or deepspeed with the same command. Everything random in step n
is a function of (seed, n, process), so the step number alone restores data order and noise, and resuming is exact.
"""

import math
import os
import signal
import socket
import time
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


def _initialise(module: nn.Module, config: TrainingConfig) -> Any:
    """The DeepSpeed engine around `module`."""
    if "RANK" not in os.environ:  # one process without a launcher
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
    run, opt = config.run, config.optimizer
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=opt.lr,
        betas=opt.betas,
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        fused=True,
    )
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": opt.clip,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if run.precision == "bfloat16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine


def train(recipe: Recipe, config: TrainingConfig, resume: str = "auto") -> int:
    """Run to `config.run.steps`. Returns 0, or 128 + signal after saving when one arrived."""
    run, folder = config.run, Path(config.run.out)
    start_from = checkpoint.find(resume, folder)
    start = checkpoint.verify(start_from) if start_from else 0
    engine = _initialise(recipe.module, config)
    rank, world = dist.get_rank(), dist.get_world_size()
    average = Average(recipe.module, run.ema) if run.ema else None
    state = {"data": recipe.hash, "samples_per_step": run.batch_size * run.accumulation * world}
    if start_from:
        _load(engine, average, state, start_from)
    judged = average.module if average else recipe.module
    tracker = Tracker(folder, enabled=rank == 0)
    if rank == 0:
        write_json(as_dict(config), folder / "config.json")
    order = EpochOrder(recipe.length, run.seed, rank, world)
    stop = _Stop()
    bar = tqdm(total=run.steps, initial=start, disable=None if rank == 0 else True, unit="step")

    def write(target: Path) -> None:
        engine.save_checkpoint(str(target / "resume"), tag="state", client_state=state, save_latest=False)
        if rank == 0:
            if average:
                write_safetensors(dict(average.module.named_parameters()), target / "ema.safetensors")
            recipe.save_model(judged, target / "model")

    code, clock, waited, logged = 0, time.monotonic(), 0.0, start
    try:
        for step in range(start, run.steps):
            rate = learning_rate(config.optimizer, step, run.steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            generator = step_generator(run.seed, step, rank)
            engine.train()  # judging may have left it in eval mode
            for micro in range(run.accumulation):
                asked = time.monotonic()
                indices = order.batch(step * run.accumulation + micro, run.batch_size)
                batch = recipe.batch(indices, generator).to(engine.device)
                waited += time.monotonic() - asked
                loss, scalars = engine(batch, generator)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"loss is {loss.item()} at step {step}; the batch was {', '.join(recipe.describe(indices))}. "
                        f"Resume from the newest checkpoint in {folder} with a lower optimizer.lr, or remove the samples."
                    )
                engine.backward(loss)
                log = micro == run.accumulation - 1 and ((step + 1) % run.log_every == 0 or step + 1 == run.steps)
                norm = _gradient_norm(engine) if log and not engine.zero_optimization() else None
                engine.step()
                if log and engine.zero_optimization():
                    norm = engine.get_global_grad_norm()
            if average:
                average.update(recipe.module, step + 1)
            done = step + 1
            bar.update()
            if log:
                seconds = time.monotonic() - clock
                images = (done - logged) * run.batch_size * run.accumulation * world
                values = {"loss": float(loss.detach()), **{k: float(v) for k, v in scalars.items()}, "lr": rate}
                if norm is not None:
                    values["grad_norm"] = norm
                values |= {"images_per_s": images / seconds, "data_wait": waited / seconds, "skipped": recipe.skipped}
                tracker.scalars(done, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                clock, waited, logged = time.monotonic(), 0.0, done
            if rank == 0 and (done % run.validate_every == 0 or done == run.steps):
                tracker.scalars(done, {f"heldout/{k}": v for k, v in recipe.validate(judged).items()})
            if rank == 0 and (done % run.sample_every == 0 or done == run.steps):
                tracker.picture(done, "grid", recipe.sample(judged))
            stopped = stop.agreed(engine.device)
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


def _gradient_norm(engine: Any) -> float | None:
    """Before clipping. ZeRO 0 in float32 does not report it, so it is computed here; other stages report it after the step."""
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else None


def _load(engine: Any, average: Average | None, state: dict[str, Any], folder: Path) -> None:
    """Weights, optimiser and average of a checkpoint. ValueError when `state` says that the order of samples would change."""
    path, saved = engine.load_checkpoint(str(folder / "resume"), tag="state")
    if path is None:
        raise ValueError(f"{folder} holds no resume state for this number of processes; start again with --resume no")
    if saved.get("data") != state["data"]:
        raise ValueError(
            f"{folder} was trained on other shards than data.train names now; restore them, or start again with --resume no"
        )
    if saved.get("samples_per_step") != state["samples_per_step"]:
        raise ValueError(
            f"{folder} took {saved.get('samples_per_step')} samples per step, this run takes {state['samples_per_step']} "
            "(batch_size × accumulation × processes); keep the product, or start again with --resume no"
        )
    if average:
        averaged = read_safetensors(folder / "ema.safetensors")
        for name, parameter in average.module.named_parameters():
            parameter.copy_(averaged[name])
