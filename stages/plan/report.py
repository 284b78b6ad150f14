"""The plan as text for people."""

from collections.abc import Iterator

import torch

from lfq_tokenizer.text import time_text
from stages.plan.fit import GIB, RESERVE, Column
from stages.plan.plan import Plan

WIDTH = 14


def text(plan: Plan, here: bool = False) -> str:
    """`here`: the plan is for this machine's processor, not for GPUs."""
    parts = [_parameters(plan), _work(plan), _processes(plan, here), _advice(plan, here), _assumed(plan, here)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _parameters(plan: Plan) -> Iterator[str]:
    yield f"{plan.stage}: parameters{'':14}{'all':>18}{'trained':>18}"
    for name, part in plan.parameters.items():
        yield f"  {name:34}{part.all:>16,}{part.trained or 'frozen':>18{',' if part.trained else ''}}"
    totals = [sum(getattr(part, kind) for part in plan.parameters.values()) for kind in ("all", "trained")]
    yield f"  {'together':34}{totals[0]:>16,}{totals[1]:>18,}"


def _work(plan: Plan) -> Iterator[str]:
    yield f"pictures of {'share':>9}{'image tokens':>16}{'blocks':>9}{'tokens':>10}{'FLOPs':>11}"
    for p in plan.pictures:
        size = f"{p.resolution}²"
        yield f"  {size:9}{p.share:>10.1%}{p.image_tokens:>16,}{p.blocks:>9,}{p.tokens:>10,.0f}{p.flops.useful:>11.3g}"
    yield (
        f"a step: {plan.samples:,} pictures, {plan.tokens_per_step:,.0f} tokens, {plan.flops_per_step:.3g} FLOPs"
        + (f" and {plan.recomputed_per_step:.3g} of recomputation" if plan.recomputed_per_step else "")
    )
    shares = ", ".join(f"{name} {value / plan.flops_per_step:.1%}" for name, value in plan.flops.items() if value)
    yield f"  of which {shares}"
    if c := plan.companion:
        passes = "one forward pass" if c["passes"] == 1 else f"{c['passes']} forward passes"
        yield f"  {c['name']}: frozen, {c['block_size']} tokens a block, {passes} in each of the first {c['steps']:,} steps"
    yield (
        f"the run: {plan.steps:,} steps, {plan.steps * plan.samples / 1e6:,.4g} M pictures, "
        f"{plan.steps * plan.tokens_per_step / 1e9:,.4g} G tokens, {plan.flops_of_run:.3g} FLOPs"
    )
    if "samples" in plan.data:
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in plan.data["left_out"].items()) or "nothing"
        yield f"the data: {plan.data['samples']:,} samples, left out: {left_out}; {plan.data['hash'][:16]}"


def _processes(plan: Plan, here: bool) -> Iterator[str]:
    def row(name: str, values: list[str]) -> str:
        return f"{name:36}" + "".join(f"{value:>{WIDTH}}" for value in values)

    columns = plan.columns
    unit, size = ("GiB", GIB) if max(c.training for c in columns) > GIB else ("MiB", 2**20)

    def bytes_of(name: str, values: list[float]) -> str:
        return row(name, [f"{value / size:,.1f}" if value else "–" for value in values])

    yield row("processes on this processor" if here else "GPUs", [str(c.processes) for c in columns])
    yield row("batch size × accumulation", [f"{c.batch_size} × {c.accumulation}" for c in columns])
    yield row("rows × positions at most", [f"{c.rows[0]} × {c.rows[1]:,}" for c in columns])
    yield row(f"time at an MFU of {plan.machine.mfu:.0%}", [time_text(3600 * c.hours) for c in columns])
    yield f"{unit} of {'main memory' if here else 'a GPU'}, {plan.precision}:"
    for name in columns[0].memory:
        if any(c.memory[name] for c in columns):
            yield bytes_of(f"  {name}", [c.memory[name] for c in columns])
    yield bytes_of("peak of training", [c.training for c in columns])
    yield bytes_of("peak of validation and saving", [c.validation for c in columns])
    if any(c.host for c in columns):
        yield bytes_of("the machine's memory, a process", [c.host for c in columns])
    verdict = f"fits {plan.machine.memory:.3g} GiB less {RESERVE:.0%}"
    yield row(verdict, ["yes" if c.fits else "NO" for c in columns])


def _advice(plan: Plan, here: bool) -> Iterator[str]:
    for c in plan.columns:
        where = "this processor" if here else f"{c.processes} GPU{'' if c.processes == 1 else 's'}"
        yield f"{where}: {_said(c)}"


def _said(c: Column) -> str:
    return "; ".join([*(["fits"] if c.fits else []), *c.advice, f"fullest micro-step {c.fullest}"])


def _assumed(plan: Plan, here: bool) -> Iterator[str]:
    yield "assumed: " + "; ".join(plan.assumed)
    if here:
        measured = f"{1000 * plan.machine.tflops:,.3g} GFLOP/s, measured now with {torch.get_num_threads()} threads"
        yield f"peak of this processor {measured}; for GPUs add --processes, --gpu-memory or --peak-tflops"
        return
    yield f"peak of a GPU {plan.machine.tflops:g} TFLOP/s; a fused attention kernel; fused kernels of Liger would need less"
