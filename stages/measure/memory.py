"""The plan's memory against real training steps:

    python -m stages.measure.memory [--device cpu|cuda] [--json]

Every case trains a model for two steps in a fresh process: on the CPU the resident memory at its peak less what the imports took,
on a GPU the most that tensors held. The plan should be within 15 % of both.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitdance.heads.diffusion.network import HeadConfig
from bitdance.sequence.batch import TrainingBatch
from bitdance.sequence.noise import ImageNoise
from lfq_tokenizer import TokenizerConfig
from stages.config import DataConfig, DeepSpeedConfig, GeneratorTraining, RunConfig, TrainingConfig
from stages.plan import memory
from stages.plan.shape import Shape, count
from stages.plan.workload import Workload

PROMISE = 0.15
STEPS = 2  # the second has moments and average


@dataclass(frozen=True)
class Case:
    """One way to train."""

    zero_stage: int = 0
    precision: str = "float32"
    checkpoint: bool = False
    ema: float = 0.999
    pictures: int = 4
    layers: int = 8
    hidden: int = 512

    def config(self) -> TrainingConfig:
        return TrainingConfig(
            "generator",
            RunConfig(out="-", batch_size=self.pictures, ema=self.ema, precision=self.precision),
            DataConfig(train=("-",), mix={"128": 1, "256": 1}, row_tokens=1536),
            deepspeed=DeepSpeedConfig(self.zero_stage),
            generator=GeneratorTraining(
                checkpoint_activations=self.checkpoint, attention="flex" if torch.cuda.is_available() else "dense"
            ),
        )

    def shape(self) -> Shape:
        backbone = {
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 128,
            "head_dim": 64,
            "tie_word_embeddings": False,
        }
        head = HeadConfig(32, self.hidden, self.hidden, depth_latent=6, depth_adanln=2, parallel_num=16)
        return Shape(backbone, 2000, 64, head, TokenizerConfig(32, (1, 1, 1, 1), 1, 32))


CASES = (
    Case(),
    Case(checkpoint=True),
    Case(precision="bfloat16"),
    Case(zero_stage=1),
    Case(zero_stage=2, precision="bfloat16-weights", checkpoint=True),
    Case(zero_stage=3, precision="bfloat16-weights", checkpoint=True),
)


def batch_of(case: Case, workload: Workload, shape: Shape, special: Any) -> TrainingBatch:
    """The fullest micro-step, with its draws."""
    batch = workload.batch(workload.fullest(case.pictures), special, shape.tokenizer.bits, 1)
    batch.noise = ImageNoise.draw(batch.image_bits_NC.shape[0], shape.head, 0.1, torch.Generator().manual_seed(0))
    return batch


def planned(case: Case, device: str) -> dict[str, float]:
    """Bytes, by part and together, of one process."""
    config, shape = case.config(), case.shape()
    workload = Workload.of(config, shape, 32)
    with torch.device("meta"):
        model = shape.model(config.generator, torch.float32)
    counts = count(model)
    parts = [part for name, part in counts.items() if name != "tokenizer"]
    trained, largest = sum(part.trained for part in parts), max(part.largest for part in parts)
    states = memory.states(trained, 0, largest, case.precision, case.ema > 0, config.deepspeed, 1)
    batch = batch_of(case, workload, shape, model.special)
    passes = memory.activations(shape, config.generator, case.precision, batch, dense=device == "cpu")
    # pictures come as bits, so the tokenizer stays where it was built
    tokenizer = 4 * counts["tokenizer"].all if device == "cpu" else 0
    found = {
        "states": states.kept,
        "tokenizer": tokenizer,
        "buckets": states.buckets,
        "activations": passes.most,
        "optimiser's step": states.step,
    }
    return found | {"together": states.kept + tokenizer + states.buckets + max(states.gathered + passes.most, states.step)}


def measured(case: Case, device: str) -> float:
    """Bytes at the peak of a fresh process that trains."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "stages.measure.memory", "--device", device, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{case} stopped: {done.stderr.strip()[-800:]}")
    return float(done.stdout.strip().splitlines()[-1])


def train(case: Case, device: str) -> float:
    """Real steps in this process; the bytes they took at the peak."""
    import deepspeed  # noqa: F401  the baseline holds its import

    from stages.engine import processes
    from stages.engine.learner import Learner
    from stages.recipes.generator.documents import GeneratorBatch
    from stages.recipes.generator.objective import GeneratorObjective

    processes.start()
    config, shape = case.config(), case.shape()
    workload = Workload.of(config, shape, 32)
    torch.manual_seed(0)
    before = _resident("VmRSS")
    model = shape.model(config.generator, torch.bfloat16 if case.precision == "bfloat16-weights" else torch.float32)
    batch = GeneratorBatch(batch_of(case, workload, shape, model.special), {})
    parts = {name: list(getattr(model, name).parameters()) for name in ("backbone", "projector", "head")}
    objective = GeneratorObjective(model, config.generator)
    learner = Learner(objective, parts, replace(config.optimizer, warmup_steps=0), config, case.ema)
    for step in range(STEPS):
        learner.begin(step)
        loss, *_ = learner.engine(batch.to(learner.device), torch.Generator(), step)
        learner.step(loss, measure=False)
        del loss, _
    return float(torch.cuda.max_memory_allocated()) if device == "cuda" else _resident("VmHWM") - before


def _resident(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def main(argv: Sequence[str] | None = None) -> int:
    """See the file's opening lines."""
    parser = argparse.ArgumentParser(prog="python -m stages.measure.memory", description="The plan's memory against real steps.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=int, nargs="+", choices=range(len(CASES)), help="cases, by their number")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args(argv)
    if a.case:
        print(train(Case(**json.loads(a.case)), a.device))
        return 0
    rows = []
    for number in a.only or range(len(CASES)):
        case = CASES[number]
        plan, real = planned(case, a.device), measured(case, a.device)
        rows.append({**asdict(case), "planned": plan, "measured": real, "ratio": plan["together"] / real})
        if not a.json:
            way = f"ZeRO {case.zero_stage}, {case.precision}{', checkpointing' if case.checkpoint else ''}"
            parts = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in plan.items() if value and name != "together")
            both = f"planned {plan['together'] / 2**20:7,.0f} MiB, measured {real / 2**20:7,.0f}"
            print(f"{way:44} {both}: {rows[-1]['ratio']:.3f} ({parts})", flush=True)
    kept = all(abs(row["ratio"] - 1) <= PROMISE for row in rows)
    print(json.dumps(rows) if a.json else f"promise: within {PROMISE:.0%}: {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
