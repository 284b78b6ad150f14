"""What a step of the generator computes: batch → (loss, scalars).

    loss = velocity loss of the head + text_weight · cross-entropy of the prompt's text

Source: BitDance paper (arXiv 2602.14041), training section.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from bitdance.model import Attention, BitDanceModel, TrainingLosses
from lfq_tokenizer import LFQTokenizer
from stages.config import GeneratorTraining
from stages.engine.processes import mean_over_processes
from stages.recipe import Losses
from stages.recipes.frozen import Frozen
from stages.recipes.generator.documents import GeneratorBatch

TIME_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # noise levels by which the loss is shown; t = 1 is data


class GeneratorObjective(nn.Module):
    """The tokenizer is frozen: it is no part of what trains and is not saved with the resume state."""

    def __init__(self, model: BitDanceModel, training: GeneratorTraining) -> None:
        super().__init__()
        self.model = BitDanceModel(None, model.text_tokenizer, model.projector, model.backbone, model.head)
        self.tokenizer = Frozen(model.tokenizer)
        self._training = training

    def whole(self) -> BitDanceModel:
        """These weights as a whole model, in eval mode; its parts are shared."""
        m = self.model
        assert isinstance(self.tokenizer.module, LFQTokenizer)
        return BitDanceModel(self.tokenizer.module, m.text_tokenizer, m.projector, m.backbone, m.head).eval()

    def losses(self, batch: GeneratorBatch) -> TrainingLosses:
        """Of this process alone. Pictures that come as pixels are encoded first, on the device of the batch."""
        sequence = batch.sequence
        if batch.pixels:
            assert isinstance(self.tokenizer.module, LFQTokenizer)
            sequence = batch.encoded(self.tokenizer.module.to(sequence.ids_BL.device), self.model.patch_side)
        return self.model(sequence, text_weight=self._training.text_weight, attention=self._attention(sequence.ids_BL))

    def vision(self, losses: TrainingLosses, batch: GeneratorBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head learns from: a mean over the rows of this process, and what else there is to log."""
        return losses.vision, {}

    def seed_dropout(self, generator: torch.Generator) -> None:
        """An adapter's dropout is drawn from torch's global source: let it belong to the step."""
        if self._training.lora and self._training.lora.dropout:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))

    def forward(self, batch: GeneratorBatch, generator: torch.Generator, step: int) -> Losses:
        self.seed_dropout(generator)
        losses = self.losses(batch)
        learned, more = self.vision(losses, batch, step)
        # Means over all processes: a process that happens to hold more blocks or more text counts for more. The counts are
        # made on the device and stay there, so that no step waits for it.
        counts = (losses.vision_rows.numel(), losses.text_rows.numel())
        own = torch.stack([torch.full((), n, dtype=torch.float64, device=losses.total.device) for n in counts])
        share = (own / mean_over_processes(own).clamp(min=1e-9)).to(losses.total.dtype)
        vision, text = (losses.vision * share[0]).detach(), losses.text * share[1]
        levels = by_noise_level("vision", losses.vision_rows, losses.time_rows)
        scalars = {"vision": vision, "text": text.detach(), **accuracy(losses), **levels, **more}
        return learned * share[0] + self._training.text_weight * text, scalars, None

    def _attention(self, ids_BL: Tensor) -> Attention:
        if self._training.attention == "flex" or (self._training.attention == "auto" and ids_BL.is_cuda):
            return "flex"
        return "dense"


def accuracy(losses: TrainingLosses) -> dict[str, Tensor]:
    """Share of right signs in the one-step prediction: of all bits, and of the bit that is right least often."""
    right_C = losses.right_rows.flatten(0, -2).float().mean(0)
    return {"bit_accuracy": right_C.mean(), "bit_accuracy_least": right_C.amin()}


def by_noise_level(name: str, loss_RP: Tensor, time_R: Tensor) -> dict[str, Tensor]:
    """A loss of rows by their time; NaN where a batch has no row of a level."""
    rows_R, found = loss_RP.detach().mean(-1), {}
    for low, high in pairwise(TIME_EDGES):
        inside_R = (low <= time_R) & (time_R < high)
        found[f"{name}_at_t/{low}-{high}"] = torch.where(inside_R, rows_R, 0.0).sum() / inside_R.sum()
    return found
