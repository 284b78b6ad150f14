"""What the teacher predicts, written down beforehand: a `.targets` member beside the bits of a sample.

    magic `TARGETS1`, little-endian uint32 length, so many bytes of JSON, then x̂ as float16 (S, M, P, C)

The JSON says at which times and noise: the seed they are drawn from, the settings of the head that shape the noise, and the
guidance that is in x̂. A student with other settings would read targets that belong to other noise, so they are compared.

S noise draws per block, M blocks, P tokens per block, C bits per token.
"""

import dataclasses
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdance.heads.diffusion.network import HeadConfig
from bitdance.sequence.batch import ImagePiece, TextPiece, TrainingBatch
from bitdance.sequence.noise import ImageNoise
from lfq_tokenizer.json_file import parse_json
from stages.data.shards import Sample
from stages.recipes.generator.documents import Example

MAGIC = b"TARGETS1"
_LENGTH = struct.Struct("<I")
NOISE_SETTINGS = ("parallel_num", "ch_target", "diff_batch_mul", "time_schedule", "P_mean", "P_std", "time_shift")


class BrokenTargets(ValueError):
    """The predictions beside a sample cannot be read."""

    reason = "targets unreadable"


@dataclass(frozen=True)
class Targets:
    """The predictions x̂ of a teacher, (S,M,P,C), and what they were made with."""

    seed: int
    settings: dict[str, Any]  # see `settings`
    x_hat_SMPC: Tensor

    def to_bytes(self) -> bytes:
        """Of x̂ any number beyond float16's range is an error: predictions lie near [-1, 1]."""
        half = self.x_hat_SMPC.half()
        if not bool(torch.isfinite(half).all()):
            raise ValueError("the teacher predicts NaN or infinity; try distill.dtype = 'float32'")
        header = json.dumps({"seed": self.seed, "shape": list(half.shape), **self.settings}).encode()
        return MAGIC + _LENGTH.pack(len(header)) + header + half.contiguous().numpy().astype("<f2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Targets":
        """ValueError for anything that `to_bytes` does not write."""
        start = len(MAGIC) + _LENGTH.size
        if not data.startswith(MAGIC) or len(data) < start:
            raise ValueError(f"not a .targets member: it starts with {data[:8]!r} and holds {len(data)} bytes")
        end = start + _LENGTH.unpack_from(data, len(MAGIC))[0]
        try:
            header = parse_json(data[start:end], "its opening")
            seed, shape = header.pop("seed"), header.pop("shape")
            if type(seed) is not int or len(shape) != 4 or not all(type(side) is int and side > 0 for side in shape):
                raise ValueError("seed or shape is no number")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"the opening of a .targets member cannot be read ({error}); write the targets again") from error
        numbers = np.frombuffer(data, dtype="<f2", offset=min(end, len(data))) if (len(data) - end) % 2 == 0 else np.empty(0)
        if numbers.size != np.prod(shape, dtype=object):
            raise ValueError(f".targets member of shape {tuple(shape)} holds {len(data) - end} bytes; write the targets again")
        return cls(seed, header, torch.from_numpy(numbers.astype(np.float16).reshape(shape)))


def check_targets(sample: Sample) -> None:
    """BrokenTargets for a sample whose `.targets` member is broken; that it has none is another matter."""
    try:
        if sample.targets is not None:
            Targets.from_bytes(sample.targets)
    except ValueError as error:
        raise BrokenTargets(str(error)) from None


def settings(head: HeadConfig, guidance: float) -> dict[str, Any]:
    """What must be the same where targets are written and where they are used."""
    known = dataclasses.asdict(head)
    return {name: known[name] for name in NOISE_SETTINGS} | {"guidance": guidance}


def cached_noise(head: HeadConfig, tokens: int, seed: int, flipped_NC: Tensor) -> ImageNoise:
    """Times and noise of a seed; the flips, which the teacher does not see, are the student's own."""
    noise = ImageNoise.draw(tokens, head, 0.0, torch.Generator().manual_seed(seed))
    return dataclasses.replace(noise, flipped_NC=flipped_NC)


def with_cached_noise(example: Example, head: HeadConfig, guidance: float) -> tuple[Example, Tensor]:
    """The example with the times and noise at which its targets were predicted, and those (S,M,P,C) float16.

    ValueError naming the sample where it has none, or they were written for other settings.
    """
    if example.targets is None:
        raise ValueError(
            f"sample {example.name} has no targets and distill.cached is set; write them with `bitdance distill CONFIG "
            "--write-targets FOLDER` and name that folder in data.train, or set distill.cached = false"
        )
    targets = Targets.from_bytes(example.targets)
    wanted = settings(head, guidance)
    for name, value in wanted.items():
        if targets.settings.get(name) != value:
            raise ValueError(
                f"sample {example.name} has targets for {name} = {targets.settings.get(name)!r}, the config says {value!r}; "
                "write the targets again"
            )
    pieces: list[TextPiece | ImagePiece] = []
    for piece in example.pieces:
        if isinstance(piece, ImagePiece):
            tokens = piece.bits_Chw[0].numel()
            assert piece.noise is not None
            if targets.x_hat_SMPC[0].numel() != tokens * head.ch_target:
                raise ValueError(f"sample {example.name} has targets for another size; write the targets again")
            piece = dataclasses.replace(piece, noise=cached_noise(head, tokens, targets.seed, piece.noise.flipped_NC))
        pieces.append(piece)
    return dataclasses.replace(example, pieces=pieces), targets.x_hat_SMPC


def joined(targets: Sequence[Tensor], batch: TrainingBatch) -> Tensor:
    """(S, all blocks, P, C): of each example of the batch, in the order in which their pictures are laid out."""
    return torch.cat([targets[number] for number in torch.unique_consecutive(batch.image_N).tolist()], dim=1)
