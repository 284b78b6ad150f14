"""What `--dry-run` says of a refinement model: its network, and the loss that is counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdance.kinds.refine.config import RefineConfig, TextRefineConfig
from bitdance.kinds.refine.model import build_network, label_losses
from bitdance.kinds.refine.noise import RefineNoise
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig, check_makes_bits
from stages.recipes.pictures.plan import PictureSubject
from stages.recipes.refine.config import RefineTraining

TEXT_TOKENS = 24  # of a caption, for counting


class RefineSubject(PictureSubject):
    """See `pictures.plan.Subject`."""

    training: RefineTraining

    def shape(self, tokenizer: PictureTokenizerConfig, classes: Callable[[], int]) -> RefineConfig:
        check_makes_bits(tokenizer, f"refine.tokenizer = {self.training.tokenizer!r}")
        return self.training.shape(tokenizer.bits, self.grid(tokenizer), *self.classes_or_width(classes))

    def build(self, shape: RefineConfig) -> Any:
        network = build_network(shape)
        network.checkpoint_layers = self.training.checkpoint_activations
        return network

    def parts(self, network: Any) -> dict[str, Any]:
        return {"network": network}

    def loss_of(self, network: Any, B: int) -> Tensor:
        return loss_of(network, B)

    def about(self, shape: RefineConfig) -> str:
        (h, w), classes = shape.grids[0], shape.class_count  # type: ignore[attr-defined]
        of = "prompts" if classes is None else f"{classes:,} classes"
        return f"{of}, pictures of {h * w:,} tokens of {shape.bits} bits: {shape.label_count} labels of {shape.values} values"


def loss_of(network: Any, B: int) -> Tensor:
    """The training loss of so many pictures of nothing, for counting."""
    c = network.config
    bits_BChw = torch.ones(B, c.bits, *c.grids[0])
    condition: Any = torch.zeros(B, dtype=torch.long)
    if isinstance(c, TextRefineConfig):
        condition = network.prepare(torch.zeros(B, TEXT_TOKENS, c.text_width), [TEXT_TOKENS] * B)
    return label_losses(network, bits_BChw, condition, RefineNoise.draw(B, c, c.grids[0], True)).mean()
