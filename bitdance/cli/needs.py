"""How much memory a batch of pictures takes, told from configs alone: weights, caches and activations, phase by phase.

Weights and caches are exact. What activations take was measured on CPUs (docs/generation/memory.md) and is taken for CUDA too.

B pictures, R rows of the backbone (with guidance 2B), P tokens per block, D hidden size, W width of the head.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel

from bitdance.backbone import Backbone
from bitdance.bench.shapes import Shape
from bitdance.foreign import build_config
from bitdance.head import BinaryDiffusionHead
from bitdance.kernels import PACK_LIMIT
from bitdance.pipeline import DECODE_BYTES, DTYPES
from bitdance.projector import Projector
from bitdance.quantize import large_linears, quantized_bytes
from lfq_tokenizer.decoder import Decoder
from lfq_tokenizer.strips import decoding_bytes

TEXT = 64  # tokens of a prompt in its template
CUDA_CONTEXT = 500_000_000  # what CUDA and its libraries take for themselves; assumed
CPU_LIBRARIES = 25_000_000  # oneDNN's kernels, buffers of torch; measured
CPU_QUANTISERS = {"int8": 15_000_000, "fp8": 15_000_000, "int4": 45_000_000}  # the libraries once in use; measured
HEAP = 0.5  # of the loop's memory stays with the C library's heap while pictures are decoded; measured


@dataclass(frozen=True)
class Setting:
    """A batch, and how it is made. `device`: "cpu" or "cuda"."""

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


def needs(shape: Shape, setting: Setting, program: int = 0) -> Needs:
    """What a batch takes. `program`: bytes that the process had taken before it loaded anything."""
    s, itemsize, on_cpu = setting, DTYPES[setting.dtype].itemsize, setting.device == "cpu"
    llm, embedding, head, projector, decoder = _parts(shape, s.quantize, s.quantize_head, itemsize)
    c, config = shape.head, shape.backbone
    P, M, D, inner = c.parallel_num, shape.blocks(s.height, s.width), c.ch_cond, config["intermediate_size"]
    R, prefix = s.batch * (2 if s.guided else 1), TEXT + 2 + P
    token = 2 * config["num_hidden_layers"] * shape.key_heads * shape.head_dim * itemsize

    def layer(length: int) -> int:
        return R * length * (4 * inner + 5 * D) * itemsize

    cache = R * (TEXT + 2 + M * P) * token
    sampling = R * P * 20 * c.ch_latent * itemsize * (1 if on_cpu else 2)  # CUDA graphs have a pool of their own
    weights = {"LLM": llm.bytes, "projector": projector.bytes, "head": head.bytes}
    pictures = 3 * s.batch * s.height * s.width * (itemsize + 8)
    quantisers = sum({CPU_QUANTISERS[kind] for kind in (s.quantize, s.quantize_head) if kind})
    always = {"program": program + (CPU_LIBRARIES + quantisers if on_cpu else CUDA_CONTEXT)}
    if not s.offload:
        always |= {**weights, "embedding": embedding.bytes, "decoder": decoder.bytes}
    linear = llm.linear + projector.linear + head.linear
    if on_cpu and linear <= PACK_LIMIT:
        always["packed copies"] = linear
    if copy := max(llm.copy, head.copy):
        always["matrix in use"] = copy
    loop = {"cache": cache, "activations": max(layer(P), sampling)}
    prompt = {"cache": R * prefix * token if on_cpu else cache, "activations": layer(prefix) + R * prefix**2}
    pixels = {"activations": _decoding(shape, s, itemsize), "pictures": pictures}
    if on_cpu:
        pixels["heap"] = int(HEAP * sum(loop.values()))
    elif s.many and not s.offload:
        pixels |= {"next batch": sum(loop.values())}
    if s.offload:
        kept = {name: weights[name] for name in ("projector", "head")}
        prompt, loop, pixels = {**weights, **prompt}, {**weights, **loop}, {**kept, "decoder": decoder.bytes, **pixels}
    main = sum(weights.values()) + embedding.bytes + decoder.bytes if s.offload else 0
    return Needs({name: {**always, **own} for name, own in (("prompt", prompt), ("loop", loop), ("decode", pixels))}, main)


def _decoding(shape: Shape, s: Setting, itemsize: int) -> int:
    whole, strips = (decoding_bytes(shape.tokenizer, s.height, s.width, itemsize, strips) for strips in (False, True))
    return whole if whole <= DECODE_BYTES else strips


def own_bytes(peak: bool = False) -> int | None:
    """Bytes of main memory that this process has, or at most had. None where the system does not say (no /proc)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def _parts(shape: Shape, quantize: str | None, quantize_head: str | None, itemsize: int) -> tuple[_Part, ...]:
    """LLM without embedding, embedding, head, projector, decoder."""
    c = shape.head
    with torch.device("meta"):
        backbone = Backbone(AutoModel.from_config(build_config(shape.backbone)))
        head, projector = BinaryDiffusionHead(c), Projector(c.ch_target, c.ch_cond)
        decoder = Decoder(shape.tokenizer)
    table = backbone.lm.get_input_embeddings().weight.numel()
    llm = _part(backbone, quantize, itemsize, table)
    rest = (_part(head, quantize_head, itemsize), _part(projector, None, itemsize), _part(decoder, None, itemsize))
    return llm, _Part(table * itemsize), *rest


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
