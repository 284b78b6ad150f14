"""A frozen network that runs forward beside the one that trains, on the same documents: its operations and its memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.model import BitDanceModel
from bitdance.sequence.batch import TrainingBatch
from stages.config import GeneratorTraining
from stages.plan import memory
from stages.plan.flops import Document, document_flops
from stages.plan.shape import Count, Shape, count

PLACES = ("gpu", "visits", "host")


@dataclass(frozen=True)
class Companion:
    """It predicts `shape.head.parallel_num` tokens per block, with `shape.head.diff_batch_mul` noise draws, in the first `steps`
    of the run, while the activations of the one that trains are kept.

    `place`: its weights, in `dtype`, lie on every GPU ("gpu"), in the machine's memory, from where each layer visits the GPU
    ("visits"), or it computes where they lie, in the machine's memory ("host").
    """

    name: str
    shape: Shape
    passes: int  # over every document
    steps: int
    dtype: torch.dtype
    place: str = "gpu"
    remedy: str = ""  # what a user changes so that it visits

    def __post_init__(self) -> None:
        assert self.place in PLACES

    @property
    def line(self) -> str:
        """Its name among the parts of a GPU's memory."""
        return f"{self.name} (frozen)"

    @property
    def assumed(self) -> list[str]:
        """What the plan's hours leave out."""
        return {
            "gpu": [],
            "visits": [f"moving the weights of the {self.name} to the GPU for every pass takes no time"],
            "host": [f"the {self.name} is as quick on the CPU as it would be on a GPU"],
        }[self.place]

    def flops(self, documents: Sequence[Document]) -> list[float]:
        """Of all passes over each document, whatever its block size. It predicts no text."""
        own = [document_flops(self._model, replace(d, P=self._model.block_size)) for d in documents]
        return [self.passes * (flops.useful - flops.logits) for flops in own]

    def peak(self, batch: TrainingBatch, dense: bool) -> float:
        """Bytes that one pass takes on a GPU beside the weights; `batch` is laid out for its block size."""
        return 0.0 if self.place == "host" else memory.forward_peak(self.shape, batch, self.dtype, dense)

    @property
    def gpu(self) -> float:
        """Bytes on a GPU."""
        return {"gpu": self._whole, "visits": self._visiting, "host": 0.0}[self.place]

    @property
    def host(self) -> float:
        """Bytes of a process in the machine's memory."""
        return 0.0 if self.place == "gpu" else self._whole

    @property
    def saving(self) -> float:
        """Bytes of a GPU that `remedy` frees."""
        return self._whole - self._visiting if self.place == "gpu" else 0.0

    @property
    def parameters(self) -> int:
        """Without the picture tokenizer, which is that of the one that trains."""
        return sum(part.all for name, part in self._counts.items() if name != "tokenizer")

    @cached_property
    def _model(self) -> BitDanceModel:
        with FakeTensorMode():
            return self.shape.model(GeneratorTraining(), torch.float32).requires_grad_(False)

    @cached_property
    def _counts(self) -> dict[str, Count]:
        return count(self._model)

    @property
    def _whole(self) -> float:
        return float(self.dtype.itemsize * self.parameters)

    @property
    def _visiting(self) -> float:
        """The embedding and one layer."""
        layer = self._counts["backbone: layers"].all / int(self.shape.backbone["num_hidden_layers"])
        return self.dtype.itemsize * (self._counts["backbone: embedding"].all + layer)
