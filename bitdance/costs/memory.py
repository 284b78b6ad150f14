"""Memory of a batch of pictures: how much it takes, how much is free, and what would make it fit. Bytes; GB means 10⁹ bytes.

What it takes is told from configs alone: weights, caches and activations, phase by phase. Weights and caches are exact. What
activations take was measured on CPUs (docs/generation/memory.md) and is taken for CUDA too.

B pictures, R rows of the backbone (with guidance 2B), P tokens per block, D hidden size, W width of the head.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel

from bitdance.coding import DECODE_BYTES
from bitdance.folder.config import ModelConfig
from bitdance.foreign import build_config
from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.networks.backbone import Backbone
from bitdance.networks.kernels import PACK_LIMIT
from bitdance.networks.precision import DTYPES
from bitdance.networks.projector import Projector
from bitdance.networks.quantize import large_linears, quantized_bytes
from lfq_tokenizer.decoder import Decoder
from lfq_tokenizer.strips import decoding_bytes

GB = 1_000_000_000
TEXT = 64  # tokens of a prompt in its template
CUDA_CONTEXT = 500_000_000  # what CUDA and its libraries take for themselves; assumed
CPU_LIBRARIES = 25_000_000  # oneDNN's kernels, buffers of torch; measured
CPU_QUANTISERS = {"int8": 15_000_000, "fp8": 15_000_000, "int4": 45_000_000}  # the libraries once in use; measured
HEAP = 0.5  # of the loop's memory stays with the C library's heap while pictures are decoded; measured


@dataclass(frozen=True)
class BatchSpec:
    """A batch of pictures, and how it is made. `device`: "cpu" or "cuda"."""

    height: int
    width: int
    batch: int = 1
    dtype: str = "bfloat16"
    device: str = "cuda"
    guided: bool = True
    quantize: str | None = None
    quantize_head: str | None = None
    offload: bool = False
    many: bool = False  # batch after batch: on CUDA one is decoded beside the loop of the next, unless there is offload


@dataclass(frozen=True)
class Needs:
    """Bytes by phase and part on the device, and, where the model lies in main memory, there."""

    phases: dict[str, dict[str, int]]
    main: int = 0

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes on the device in that phase."""
        return sum(self.phases[self.phase].values())


@dataclass(frozen=True)
class _Part:
    """Bytes of weights; of the plain linear layers among them; of a copy that a quantised matrix needs while it is used."""

    bytes: int
    linear: int = 0
    copy: int = 0


def needs(model: ModelConfig, spec: BatchSpec, program: int = 0) -> Needs:
    """What a batch takes. `program`: bytes that the process had taken before it loaded anything."""
    s, itemsize, on_cpu = spec, DTYPES[spec.dtype].itemsize, spec.device == "cpu"
    backbone, embedding, head, projector, decoder = _parts(model, s.quantize, s.quantize_head, itemsize)
    c, lm = model.head, model.backbone
    P, M, D, inner = c.parallel_num, model.blocks(s.height, s.width), c.ch_cond, lm["intermediate_size"]
    R, prefix = s.batch * (2 if s.guided else 1), TEXT + 2 + P
    token = 2 * lm["num_hidden_layers"] * model.key_heads * model.head_dim * itemsize

    def layer(length: int) -> int:
        return R * length * (4 * inner + 5 * D) * itemsize

    cache = R * (TEXT + 2 + M * P) * token
    sampling = R * P * 20 * c.ch_latent * itemsize * (1 if on_cpu else 2)  # CUDA graphs have a pool of their own
    weights = {"backbone": backbone.bytes, "projector": projector.bytes, "head": head.bytes}
    pictures = 3 * s.batch * s.height * s.width * (itemsize + 8)
    quantisers = sum({CPU_QUANTISERS[kind] for kind in (s.quantize, s.quantize_head) if kind})
    always = {"program": program + (CPU_LIBRARIES + quantisers if on_cpu else CUDA_CONTEXT)}
    if not s.offload:
        always |= {**weights, "embedding": embedding.bytes, "decoder": decoder.bytes}
    linear = backbone.linear + projector.linear + head.linear
    if on_cpu and linear <= PACK_LIMIT:
        always["packed copies"] = linear
    if copy := max(backbone.copy, head.copy):
        always["matrix in use"] = copy
    loop = {"cache": cache, "activations": max(layer(P), sampling)}
    prompt = {"cache": R * prefix * token if on_cpu else cache, "activations": layer(prefix) + R * prefix**2}
    pixels = {"activations": _decoding(model, s, itemsize), "pictures": pictures}
    if on_cpu:
        pixels["heap"] = int(HEAP * sum(loop.values()))
    elif s.many and not s.offload:
        pixels |= {"next batch": sum(loop.values())}
    if s.offload:
        kept = {name: weights[name] for name in ("projector", "head")}
        prompt, loop, pixels = {**weights, **prompt}, {**weights, **loop}, {**kept, "decoder": decoder.bytes, **pixels}
    main = sum(weights.values()) + embedding.bytes + decoder.bytes if s.offload else 0
    return Needs({name: {**always, **own} for name, own in (("prompt", prompt), ("loop", loop), ("decode", pixels))}, main)


def _decoding(model: ModelConfig, s: BatchSpec, itemsize: int) -> int:
    whole, strips = (decoding_bytes(model.tokenizer, s.height, s.width, itemsize, strips) for strips in (False, True))
    return whole if whole <= DECODE_BYTES else strips


def own_bytes(peak: bool = False) -> int | None:
    """Bytes of main memory that this process has, or at most had. None where the system does not say (no /proc)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def _parts(model: ModelConfig, quantize: str | None, quantize_head: str | None, itemsize: int) -> tuple[_Part, ...]:
    """The costs of backbone without embedding, embedding, head, projector, decoder."""
    c = model.head
    with torch.device("meta"):
        backbone = Backbone(AutoModel.from_config(build_config(model.backbone)))
        head, projector = BinaryDiffusionHead(c), Projector(c.ch_target, c.ch_cond)
        decoder = Decoder(model.tokenizer)
    table = backbone.lm.get_input_embeddings().weight.numel()
    layers = _part(backbone, quantize, itemsize, table)
    rest = (_part(head, quantize_head, itemsize), _part(projector, None, itemsize), _part(decoder, None, itemsize))
    return layers, _Part(table * itemsize), *rest


def _part(part: nn.Module, kind: str | None, itemsize: int, without: int = 0) -> _Part:
    numbers = sum(weight.numel() for weight in part.parameters()) - without
    linears = {id(m): m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear)}
    if kind is None:
        return _Part(numbers * itemsize, sum(linears.values()) * itemsize)
    shapes = [matrix.weight.shape for _, _, matrix in large_linears(part)]
    large = [rows * columns for rows, columns in shapes]
    plain = sum(linears.values()) - sum(large)
    held = (numbers - sum(large)) * itemsize + sum(quantized_bytes(rows, columns, kind) for rows, columns in shapes)
    return _Part(held, plain * itemsize, max(large) * (itemsize + (4 if kind == "fp8" else 0)))


def check_memory(model: ModelConfig, specs: Iterable[BatchSpec], device: str, name: str) -> None:
    """ValueError before gigabytes are read that cannot fit, naming the first remedy that would do. `specs`: the batches that will
    be made on `device`; `name`: what the user calls the model."""
    largest, found = max(((spec, needs(model, spec)) for spec in specs), key=lambda pair: pair[1].peak)
    free, main = free_bytes(device), free_main_memory()
    if _fits(found, free, main):
        return
    lacking, there, place = found.peak, free, f"on {device}"
    if free is None or found.peak <= free:
        lacking, there, place = found.main, main, "in main memory"
    advice = next((words for words, spec in remedies(largest) if _fits(needs(model, spec), free, main)), None)
    remedy = f"add {advice}" if advice else "no option makes it fit; use a machine with more (bitdance doctor shows what fits)"
    raise ValueError(f"{name} needs about {_size(lacking)}, {_size(there or 0)} free {place}: {remedy}")


def remedies(spec: BatchSpec) -> Iterator[tuple[str, BatchSpec]]:
    """Flags that make a batch smaller, one alone and then all of them up to there, as (flags, spec)."""
    single: list[tuple[str, dict[str, object]]] = []
    if spec.dtype == "float32":
        single.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    batch = spec.batch
    while batch > 1:
        batch //= 2
        single.append((f"--batch-size {batch}", {"batch": batch}))
    if spec.quantize is None:
        single.append(("--quantize int8", {"quantize": "int8"}))
    if spec.quantize != "int4":
        single.append(("--quantize int4", {"quantize": "int4"}))
    if spec.device == "cuda" and not spec.offload:
        single.append(("--offload", {"offload": True}))
    for words, change in single:
        yield words, replace(spec, **change)  # type: ignore[arg-type]
    flags: dict[str, str] = {}
    changes: dict[str, object] = {}
    for words, change in single:
        flag, _, value = words.partition(" ")
        flags[flag] = value
        changes |= change
        yield " ".join(f"{flag} {value}".strip() for flag, value in flags.items()), replace(spec, **changes)  # type: ignore[arg-type]


def _fits(found: Needs, device: int | None, main: int | None) -> bool:
    return (device is None or found.peak <= device) and (main is None or found.main <= main)


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"


def free_bytes(device: str) -> int | None:
    """Free memory of a device, None where it cannot be told."""
    if not device.startswith("cuda"):
        return free_main_memory()
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0]


def free_main_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a process can still take: the kernel's estimate, or less by a control group. None if unknown."""
    available = _meminfo(root / "proc/meminfo")
    if available is None:
        try:
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    group = _control_group(root / "sys/fs/cgroup")
    return available if group is None else max(0, min(available, group))


def _meminfo(path: Path) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _control_group(folder: Path) -> int | None:
    """What the group may still take: limit − usage + file cache that the kernel can give back (cgroup v2, then v1)."""
    for limit, usage, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            maximum = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            fields = dict(line.split() for line in (folder / statistics).read_text().splitlines())
            return maximum - used + int(fields.get(cache, 0))
        except (OSError, ValueError):  # absent, or "max": no limit
            continue
    return None
