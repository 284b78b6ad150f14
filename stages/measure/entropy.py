"""What the group-wise entropy loss costs:

    python -m stages.measure.entropy [--json]

Two tables. The loss alone, forward and backward, with groups of 8 bits and with 8 groups, beside its definition with all 2^d
codes (`plain_entropy`, while they fit); and the loss as a share of a whole training step of a tokenizer (encoder, decoder, L1).
Time is CPU time of this process, summed over threads, so that other work on the machine changes little; wall time stands beside.
Peak memory is that of the tensors a forward and backward pass allocates, read from the profiler.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfq_tokenizer import LFQTokenizer, LookupFreeQuantizer, TokenizerConfig
from lfq_tokenizer.entropy import LOG_EPSILON, check_groups, group_entropy

BITS = (16, 32, 64, 128, 256)
BITS_PER_GROUP = 8
PROMISE = 0.05  # of a training step


@dataclass(frozen=True)
class Cost:
    """Medians of one forward and backward pass in ms, and the memory its tensors take at their peak in MB."""

    cpu_ms: float
    wall_ms: float
    peak_mb: float


def plain_entropy(z_BChw: Tensor, groups: int = 1, temperature: float = 0.01) -> tuple[Tensor, Tensor]:
    """The definition, all 2^(C/groups) codes of every sample in memory: the yardstick of `group_entropy(z, groups, temperature)`.

    Source: BitDance paper (arXiv 2602.14041), tokenizer section.
    """
    k = z_BChw.shape[1] // groups
    codes_kQ = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=k))).to(z_BChw).T
    log_KQ = torch.log_softmax(2 * z_BChw.movedim(1, -1).reshape(-1, k) @ codes_kQ / temperature, dim=-1)
    probability_KQ = log_KQ.exp()
    mean_Q = probability_KQ.mean(dim=0)
    return -(probability_KQ * log_KQ).sum(dim=-1).mean(), -(mean_Q * torch.log(mean_Q + LOG_EPSILON)).sum()


def cost(work: Callable[[], Any], repeats: int) -> Cost:
    """Of calling `work`; one call before the measured ones is not counted."""
    work()
    cpu, wall = [], []
    for _ in range(repeats):
        start_cpu, start_wall = time.process_time(), time.perf_counter()
        work()
        cpu.append(1e3 * (time.process_time() - start_cpu))
        wall.append(1e3 * (time.perf_counter() - start_wall))
    return Cost(statistics.median(cpu), statistics.median(wall), peak_megabytes(work))


def peak_megabytes(work: Callable[[], Any]) -> float:
    """Most memory that tensors allocated within `work` hold at one time, on the CPU, in MB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0)) / 1e6


def latents(batch: int, bits: int, h: int, w: int) -> Tensor:
    """Between undecided and certain at a temperature of 0.01; they ask for a gradient."""
    return (0.02 * torch.randn(batch, bits, h, w, generator=torch.Generator().manual_seed(0))).requires_grad_()


def loss_cost(loss: Callable[[Tensor], tuple[Tensor, Tensor]], z_BChw: Tensor, repeats: int) -> Cost:
    """Of (per sample − of mean), forward and backward to the latents."""

    def work() -> None:
        per_sample, of_mean = loss(z_BChw)
        torch.autograd.grad(per_sample - of_mean, z_BChw)

    return cost(work, repeats)


def measure_loss(all_bits: Sequence[int], batch: int, h: int, w: int, repeats: int) -> list[dict[str, Any]]:
    """A row per number of bits and of groups: `Cost`, or why the grouping is refused and what its codes would take."""
    rows: list[dict[str, Any]] = []
    for bits in all_bits:
        z = latents(batch, bits, h, w)
        for groups in sorted({1, 8, max(1, bits // BITS_PER_GROUP)}):
            row: dict[str, Any] = {"bits": bits, "groups": groups}
            try:
                check_groups(bits, groups)
            except ValueError as error:
                table_mb = float(batch * h * w * groups) * 2.0 ** (bits / groups) * 4 / 1e6
                rows.append({**row, "refused": str(error), "one_table_of_codes_mb": table_mb})
                continue
            if groups == 1:
                rows.append({**row, "form": "definition", **dataclasses.asdict(loss_cost(plain_entropy, z, repeats))})
            found = loss_cost(lambda z, groups=groups: group_entropy(z, groups), z, repeats)  # type: ignore[misc]
            rows.append({**row, "form": "group_entropy", **dataclasses.asdict(found)})
    return rows


def measure_share(config: TokenizerConfig, groups: int, batch: int, side: int, repeats: int) -> dict[str, Any]:
    """The entropy loss against a training step (forward and backward; no optimiser) of `config` on `side` × `side` pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = LFQTokenizer(config)
    parameters = list(tokenizer.parameters())
    quantizer = LookupFreeQuantizer(config.z_channels, groups)
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    h = side // config.downsampling
    noise = torch.randn(batch, config.z_channels, h, h, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        bits, losses = quantizer(tokenizer.encoder(images))
        out = tokenizer.decoder(bits, noise if config.gan_decoder else None)
        loss = (out - images).abs().mean() + 0.1 * losses.entropy + 0.25 * losses.commitment
        torch.autograd.grad(loss, parameters)

    whole = cost(step, repeats)
    z = latents(batch, config.z_channels, h, h)
    part = loss_cost(lambda z: group_entropy(z, groups), z, 4 * repeats)
    return {
        "bits": config.z_channels,
        "groups": groups,
        "step": dataclasses.asdict(whole),
        "entropy": dataclasses.asdict(part),
        "share_cpu": part.cpu_ms / whole.cpu_ms,
        "share_memory": part.peak_mb / whole.peak_mb,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """See the file's opening lines."""
    parser = argparse.ArgumentParser(prog="python -m stages.measure.entropy", description="What the entropy loss costs.")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), help="for the loss alone")
    parser.add_argument("--step-bits", type=int, nargs="+", default=[64, 256], help="for the share, in groups of 8 bits")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--ch", type=int, default=64)
    parser.add_argument("--ch-mult", type=int, nargs="+", default=[1, 1, 2, 2])
    parser.add_argument("--res-blocks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args(argv)
    configs = [TokenizerConfig(a.ch, tuple(a.ch_mult), a.res_blocks, bits) for bits in a.step_bits]
    if a.side % configs[0].downsampling or min(a.side, a.batch, a.repeats) < 1:
        parser.error(f"--side {a.side} must be a multiple of {configs[0].downsampling}, --batch and --repeats at least 1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would chat on standard error
    h = a.side // configs[0].downsampling
    alone = measure_loss(a.bits, a.batch, h, h, a.repeats)
    shares = [measure_share(c, max(1, c.z_channels // BITS_PER_GROUP), a.batch, a.side, a.repeats) for c in configs]
    kept = all(s["share_cpu"] < PROMISE for s in shares)
    if a.json:
        print(json.dumps({"threads": torch.get_num_threads(), "samples": a.batch * h * h, "loss": alone, "share": shares}))
        return 0
    print(f"{a.batch * h * h} samples, {torch.get_num_threads()} threads; forward and backward\n")
    print("bits groups form            CPU ms   wall ms   peak MB")
    for r in alone:
        place = f"{r['bits']:4} {r['groups']:6}"
        if "refused" in r:
            print(f"{place} refused; one table of its codes would take {r['one_table_of_codes_mb']:.3g} MB")
        else:
            print(f"{place} {r['form']:14} {r['cpu_ms']:7.2f}   {r['wall_ms']:7.2f}   {r['peak_mb']:7.2f}")
    print(f"\ntraining step of {a.batch} pictures of {a.side}×{a.side}, ch {a.ch}, ch_mult {a.ch_mult}")
    print("bits groups step CPU ms (wall)   entropy CPU ms (wall)   share of time   of memory")
    for s in shares:
        step, part = s["step"], s["entropy"]
        print(
            f"{s['bits']:4} {s['groups']:6} {step['cpu_ms']:11.1f} ({step['wall_ms']:.1f}) {part['cpu_ms']:15.2f} "
            f"({part['wall_ms']:.2f}) {100 * s['share_cpu']:17.2f} % {100 * s['share_memory']:8.2f} %"
        )
    print(f"promise: under {100 * PROMISE:.0f} % of a step: {'kept' if kept else 'BROKEN'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
