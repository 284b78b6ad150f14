"""What the processes of a run compute in a step, from the config alone: pictures by resolution, tokens, the fullest micro-step.

Pictures are taken to be square and prompts to be equally long; where the config has no mix they have the size of its samples.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from bitdance.sequence.batch import ImagePiece, TextPiece, TrainingBatch, build_batch
from bitdance.sequence.patches import patch_side
from bitdance.sequence.prompt import SpecialTokens
from stages.config import TrainingConfig
from stages.data.mixture import spread
from stages.plan.flops import Document
from stages.plan.shape import Shape

TEMPLATE = 8  # tokens around a prompt in the chat template of Qwen
UNCONDITIONAL = 3
KERNEL_ROWS = 128  # rows are rounded up to this for compiled attention on a GPU


@dataclass(frozen=True)
class Workload:
    """`documents` by resolution (side in pixels of a square), their `shares` of the pictures, and their row's `limit` of tokens.

    `prompt` is the number of tokens of a prompt, `template` of them around the caption. `pattern` is the order in which the mix
    deals out resolutions.
    """

    documents: dict[int, Document]
    shares: dict[int, float]
    prompt: int
    limit: int
    pattern: tuple[int, ...]
    template: int = TEMPLATE

    @classmethod
    def of(cls, config: TrainingConfig, shape: Shape, caption: int) -> "Workload":
        """`caption`: tokens of a caption. ValueError for a resolution that the patches do not divide."""
        downsampling, P = shape.tokenizer.downsampling, shape.head.parallel_num
        mix = {int(resolution): share for resolution, share in config.data.mix.items() if share > 0}
        mix = mix or {_default(config, downsampling): 1.0}
        total = sum(mix.values())
        shares = {resolution: share / total for resolution, share in sorted(mix.items())}
        prompt = TEMPLATE + min(caption, config.generator.max_text_tokens)
        dropped = config.generator.dropout
        text = (1 - dropped) * prompt + dropped * UNCONDITIONAL
        documents = {}
        for resolution in shares:
            unit = downsampling * patch_side(P)
            if resolution % unit:
                said = f" ({', '.join(shape.absent)} is not here)" if shape.absent else ""
                why = f"{downsampling} pixels a token, {P} tokens a block{said}"
                raise ValueError(f"data.mix names {resolution} pixels, no multiple of {unit}: {why}")
            side = resolution // downsampling
            documents[resolution] = Document(text, side, side, P)  # on average
        # streams in the order of `Mixture`, as if every source had every resolution
        weights = [source.weight for source in config.data.sources] or [1.0]
        streams = [(r, share * weight) for r, share in mix.items() for weight in weights]
        everything = sum(share for _, share in streams)
        pattern = tuple(streams[k][0] for k in spread([share / everything for _, share in streams]))
        return cls(documents, shares, prompt, config.data.row_tokens, pattern)

    @property
    def tokens(self) -> float:
        """Of an average picture with its prompt."""
        return sum(share * self.documents[resolution].length for resolution, share in self.shares.items())

    def in_blocks(self, P: int) -> "Workload":
        """The same pictures and prompts with P tokens per block."""
        return replace(self, documents={r: replace(document, P=P) for r, document in self.documents.items()})

    def fullest(self, batch_size: int) -> tuple[int, ...]:
        """Resolutions of the micro-step of `batch_size` samples in a row that has most tokens."""
        length = len(self.pattern)
        starts = range(0, length * batch_size // gcd(length, batch_size), batch_size)
        windows = ([self.pattern[(start + i) % length] for i in range(batch_size)] for start in starts)
        return tuple(sorted(max(windows, key=lambda window: sum(self.documents[r].length for r in window))))

    def batch(self, resolutions: tuple[int, ...], special: SpecialTokens, bits: int, multiple_of: int) -> TrainingBatch:
        """Pictures of these resolutions with full prompts, laid out as training does."""
        text = TextPiece([0] * self.prompt, predict=True)
        pieces: dict[int, Sequence[TextPiece | ImagePiece]] = {
            r: [text, ImagePiece(torch.ones(bits, d.h, d.w))] for r, d in self.documents.items()
        }
        P = next(iter(self.documents.values())).P
        packed = {"token_budget": self.limit, "multiple_of": multiple_of} if self.limit else {}
        return build_batch([pieces[r] for r in resolutions], patch_side(P), special, **packed)


def shown(resolutions: tuple[int, ...]) -> str:
    """ "3 × 256, 7 × 512"."""
    return ", ".join(f"{number} × {resolution}" for resolution, number in sorted(Counter(resolutions).items()))


def _default(config: TrainingConfig, downsampling: int) -> int:
    """Side of the pictures where no mix names one: that of the samples drawn in training, else 256."""
    size = config.generator.defaults
    height, width = size.get("height", 256), size.get("width", 256)
    unit = downsampling * patch_side(int(config.generator.head.get("parallel_num", 1)))
    return max(unit, round((height * width) ** 0.5 / unit) * unit)
