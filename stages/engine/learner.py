"""A module that learns: its optimiser, precision and partitioning, inside a DeepSpeed engine."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.networks.precision import quick_dtype, slow_bfloat16
from stages.config import AUTO, OptimizerConfig, RunConfig, TrainingConfig
from stages.engine import muon, partitions, processes
from stages.engine.ema import AveragedAdamW


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step `step` (from 0) in a run of `steps`: a linear warm-up, then constant, cosine or linear."""
    warmup, first, floor = config.warmup_steps, config.warmup_from, config.final_fraction
    if step < warmup:
        return config.lr * (first + (1 - first) * step / warmup if first else (step + 1) / warmup)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":  # the last step is at the end of it
        left = 1 - (step - warmup) / max(1, steps - 1 - warmup)
        return config.lr * (floor + (1 - floor) * min(1.0, max(0.0, left / (1 - config.hold))))
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def weight_decay(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step `step` in a run of `steps`: from `weight_decay` to `weight_decay_end`, if there is one."""
    if not config.weight_decay_end:
        return config.weight_decay
    risen = 0.5 - 0.5 * math.cos(math.pi * step / max(1, steps - 1))
    return config.weight_decay + (config.weight_decay_end - config.weight_decay) * risen


def precision_of(run: RunConfig) -> str:
    """What `run.precision` means on this machine: "auto" is bfloat16 where it is quicker than float32."""
    return quick_dtype("cuda" if torch.cuda.is_available() else "cpu") if run.precision == AUTO else run.precision


def warn_of_slow_precision(run: RunConfig) -> None:
    """A warning, by process 0, where the precision that is asked for costs time on this machine and gains none."""
    if processes.rank() or torch.cuda.is_available() or not run.precision.startswith("bfloat16"):
        return
    if factor := slow_bfloat16("cpu"):
        warnings.warn(
            f"run.precision = {run.precision!r} takes about {factor:.0f} times as long as float32 on this processor, which lacks "
            'instructions for it; "auto" and "float32" are quicker',
            stacklevel=3,
        )


VECTORS = "vectors"  # in optimizer.no_decay: all parameters of fewer than two dimensions


class Learner:
    """`parts` are the parameters of `module` by the names that `optimizer.scale` may use. `decay` is that of the average, or 0.

    ValueError when a name is unknown, when nothing trains, or when precision or offload ask for what DeepSpeed cannot do.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[str, list[nn.Parameter]],
        optimizer: OptimizerConfig,
        config: TrainingConfig,
        decay: float = 0.0,
    ) -> None:
        import deepspeed

        if optimizer.matrices == "muon" and config.deepspeed.zero_stage:
            raise ValueError(
                f"optimizer.matrices = 'muon' needs whole matrices; deepspeed.zero_stage = {config.deepspeed.zero_stage} cuts "
                "them: set it to 0, or optimizer.matrices = 'adamw'"
            )
        self.module, self.optimizer, self.steps = module, optimizer, config.run.steps
        self.adam = AveragedAdamW(
            _groups(module, parts, optimizer),
            decay,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.adam, config=_settings(optimizer, config, trained))
        self.alone = processes.world() == 1 and not self.engine.zero_optimization()
        if self.alone:
            self.engine.enable_backward_allreduce = False  # it would copy every gradient to a bucket and back, for nobody
        if getattr(self.engine.optimizer, "swap_optimizer", False):
            raise ValueError("deepspeed.settings moves optimiser states to NVMe, which checkpoints here do not reach; use 'cpu'")
        for name, buffer in buffers.items():  # tables of positions and running means stay in float32
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._buffers[last] = buffer.to(self.device)
        self.norm: float | None = None  # of the gradient before clipping, in the last step that was measured

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def begin(self, step: int) -> dict[str, float]:
        """Set learning rates and weight decay of `step`, the rates returned by name, and leave the eval mode of a validation."""
        rate = learning_rate(self.optimizer, step, self.steps)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["scale"]
            if group["weight_decay"]:
                group["weight_decay"] = weight_decay(self.optimizer, step, self.steps)
        self.engine.train()
        return {"lr": rate, **{f"lr/{name}": rate * scale for name, scale in self.optimizer.scale.items()}}

    def step(self, loss: Tensor, measure: bool) -> None:
        """Backward and, at the end of an accumulation, the optimiser's step."""
        self.engine.backward(loss)
        if self.alone:
            for parameter in self.module.parameters():
                if parameter.requires_grad and parameter.grad is None:  # as the average over several processes gives it
                    parameter.grad = torch.zeros_like(parameter)
        zero = self.engine.zero_optimization()
        # ZeRO 0 does not report the norm, so it is computed here; other stages report it after the step.
        if measure and not zero:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(grads)) if grads else None
        self.engine.step()
        if measure and zero and (norm := self.engine.get_global_grad_norm()) is not None:
            self.norm = float(norm)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The plain module, whole and with averaged weights; afterwards all is as before, bit for bit.

        All processes must take part. Frozen parameters, which have no average, keep their values. Under ZeRO 3 every process
        holds the whole module inside.
        """
        if not self.adam.decay:
            with partitions.whole(self.engine) as module:
                yield module
            return
        with partitions.writing(self.engine):
            self.adam.exchange()
        try:
            with partitions.whole(self.engine) as module:
                yield module
        finally:
            with partitions.writing(self.engine):
                self.adam.exchange()


def _groups(module: nn.Module, parts: Mapping[str, list[nn.Parameter]], optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """One group of the optimiser per part that has something to train, and one each for what of it weight decay spares and what
    learns by Muon. A word of `optimizer.no_decay` that names no parameter is an error."""
    names = [name for name, _ in module.named_parameters()]
    if idle := [word for word in optimizer.no_decay if word != VECTORS and not any(word in name for name in names)]:
        raise ValueError(f"optimizer.no_decay names {idle}, which no parameter of this model has in its name; see its parts")
    if unknown := sorted(set(optimizer.scale) - set(parts)):
        raise ValueError(f"optimizer.scale names {unknown}; parts of this model are {', '.join(parts)}")
    spared = {
        id(p)
        for name, p in module.named_parameters()
        if any(word in name or (word == VECTORS and p.ndim < 2) for word in optimizer.no_decay)
    }
    by_muon = muon.matrices(module) if optimizer.matrices == "muon" else set()
    groups: list[dict[str, Any]] = []
    for name, parameters in parts.items():
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in parameters:
            if p.requires_grad:
                kinds.setdefault((id(p) in spared, id(p) in by_muon), []).append(p)
        for (no_decay, orthogonal), own in sorted(kinds.items(), key=lambda kind: kind[0]):
            more = ({"weight_decay": 0.0} if no_decay else {}) | ({"muon": True} if orthogonal else {})
            groups.append({"params": own, "scale": optimizer.scale.get(name, 1.0), **more})
    if not groups:
        raise ValueError(f"nothing trains: all parts ({', '.join(parts)}) are frozen")
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in module.parameters() if p.requires_grad), "parts must hold all that trains"
    return groups


def _settings(optimizer: OptimizerConfig, config: TrainingConfig, trained: int) -> dict[str, Any]:
    """DeepSpeed's JSON config for `trained` parameters."""
    d = config.deepspeed
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.run.batch_size,
        "gradient_accumulation_steps": config.run.accumulation,
        "gradient_clipping": optimizer.clip,
        # gradients travel in buckets of 5e8 numbers, which DeepSpeed allocates for the smallest model too
        "zero_optimization": {"stage": d.zero_stage, "reduce_bucket_size": min(500_000_000, trained)}
        | ({"offload_optimizer": host} if d.offload_optimizer else {})
        | ({"offload_param": host} if d.offload_parameters else {}),
        # torch's AdamW everywhere: DeepSpeed's own would be compiled at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    precision = precision_of(config.run)
    if precision == "bfloat16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if precision == "bfloat16-weights":
        if not d.zero_stage:
            raise ValueError(
                "run.precision = 'bfloat16-weights' needs deepspeed.zero_stage 1, 2 or 3, which keep float32 weights beside them"
            )
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return _merged(settings, d.settings)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in top.items() if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)}
    return {**base, **top, **both}
