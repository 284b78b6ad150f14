"""Recipes whose pictures are of classes or, where the config names a text encoder, of captions."""

from typing import Any

import torch

from bitdance.networks.text_encoder import TextEncoder
from stages.config import TrainingConfig
from stages.engine.checkpoint import model_folder
from stages.recipes.pictures.captions import Captions
from stages.recipes.pictures.config import PromptTraining
from stages.recipes.pictures.feed import Conditions
from stages.recipes.pictures.recipe import PER_CLASS, PictureRecipe


class PromptRecipe(PictureRecipe):
    """See `PictureRecipe`. `text` is the frozen text encoder, None for classes."""

    training: PromptTraining

    def __init__(self, config: TrainingConfig, training: PromptTraining) -> None:
        super().__init__(config, training, captions=bool(training.text_encoder))
        self.text: TextEncoder | None = None
        if training.text_encoder:
            folder = model_folder(training.text_encoder)
            self.text = TextEncoder.from_pretrained(folder, torch.float32, training.prompt_prefix)

    @property
    def classes_or_width(self) -> tuple[int | None, int | None]:
        """How many classes there are, or how many features a token of a caption has."""
        return None if self.labels is None else len(self.labels), None if self.text is None else self.text.width

    def conditions(self, drop: float) -> Conditions:
        """What the feed says of a sample: its class, or one of its captions, of which a share `drop` is left out."""
        if self.text is not None:
            return Captions(self.text.reader, self.training.max_text_tokens, drop)
        assert self.labels is not None
        return self.labels

    def sample_conditions(self) -> list[Any]:
        """See `PictureRecipe`; of a model of prompts the ones that the config names."""
        if self.text is None:
            return super().sample_conditions()
        prompts = self.training.sample_prompts or ("",)
        return [prompt for prompt in prompts for _ in range(PER_CLASS)]
