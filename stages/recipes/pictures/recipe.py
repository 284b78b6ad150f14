"""What the engine asks of a recipe (see `stages/recipe.py`), for one network over a frozen tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from bitdance.folder.picture_model import CLASSES, Layout, PictureModel
from bitdance.networks.text_encoder import TextEncoder
from bitdance.picture import grid, to_pil
from lfq_tokenizer.any_tokenizer import load_tokenizer
from stages.config import TrainingConfig
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine import processes
from stages.engine.checkpoint import model_folder
from stages.plan.flops import encoder_flops
from stages.recipe import Discriminator
from stages.recipes.chain import check_bits, next_card
from stages.recipes.frozen import Frozen
from stages.recipes.pictures import labels
from stages.recipes.pictures.captions import CaptionFeatures
from stages.recipes.pictures.config import PictureTraining
from stages.recipes.pictures.feed import PictureBatch, PictureFeed
from stages.recipes.pictures.flops import picture_flops
from stages.recipes.pictures.labels import Labels
from stages.recipes.tokenizer.coding import decode_pictures

HELDOUT, BATCH = 256, 32  # held-out samples
GRID = 8  # classes of a grid, where the config names none
PER_CLASS = 4  # pictures of each


class PictureObjective(nn.Module):
    """What trains is `model`. The tokenizer, and a text encoder, are frozen: no part of what trains, and not saved with the
    resume state. `rows` is the loss of a batch before the mean."""

    loss_name: ClassVar[str]

    def __init__(self, model: nn.Module, tokenizer: Any, text: TextEncoder | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.text, self.features = Frozen(tokenizer), Frozen(text), CaptionFeatures()

    def rows(self, batch: PictureBatch) -> Tensor:
        """The loss of each row, (R,…)."""
        raise NotImplementedError


class PictureRecipe:
    """See `recipe.Recipe`. ValueError where tokenizer, data, conditions, an earlier model and the config do not fit.

    A kind says its `layout`, its `section` of the config and what `training_alone` sets (fields of the network's config that do
    not decide whether weights fit); it makes the objective and the feed, and generates.
    """

    layout: ClassVar[Layout[Any]]
    training_alone: ClassVar[tuple[str, ...]]
    discriminator: Discriminator | None = None
    base = ""
    feed: PictureFeed
    module: nn.Module

    def __init__(self, config: TrainingConfig, training: PictureTraining, captions: bool = False) -> None:
        self.config, self.training = config, training
        self.tokenizer = load_tokenizer(model_folder(training.tokenizer)).float().eval().requires_grad_(False)
        self.data = ShardDataset(ShardIndex.open(config.data.train, config.data.keep))
        check_bits([shard.address for shard in self.data.index.shards], self.tokenizer)
        self.labels: Labels | None = None
        if not captions:
            self.labels = labels.from_file(training.classes) if training.classes else labels.from_samples(self.data)
            if training.class_count and training.class_count != len(self.labels):
                raise ValueError(
                    f"{training.SECTION}.class_count = {training.class_count}, but there are {len(self.labels)} classes; correct "
                    f"it, or name a {CLASSES} in {training.SECTION}.classes"
                )
        self.heldout = ShardDataset(ShardIndex.open(config.data.heldout)) if config.data.heldout else None
        self.before: dict[str, Any] = {}
        self.card: dict[str, Any] = {}  # what a recipe says beside the rest

    def grid(self) -> int:
        """Tokens along a side of the training pictures."""
        size, s = self.training.size, self.tokenizer.downsampling
        if size % s:
            raise ValueError(f"{self.training.SECTION}.size = {size}; a multiple of the tokenizer's downsampling {s} is allowed")
        return size // s

    def network(self, shape: Any) -> nn.Module:
        """A fresh network of this shape, or the one of `init`, which must have it and, if any, these classes; ready to train."""
        network: Any = self._network(shape)
        network.checkpoint_layers = self.training.checkpoint_activations
        if self.config.run.compile:
            network.compile()
        return network

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One part, which trains; a kind may tell several apart."""
        return {"network": list(_objective(self.module).model.parameters())}

    def _network(self, shape: Any) -> nn.Module:
        if not self.training.init:
            return self.layout.build(shape, torch.Generator().manual_seed(self.config.run.seed))
        before = self.layout.load(model_folder(self.training.init), torch.device("cpu"), torch.float32)
        source = f"{self.training.SECTION}.init = {self.training.init!r}"
        known, wanted = before.network.config.to_dict(), shape.to_dict()
        if other := [name for name in wanted if name not in self.training_alone and known.get(name) != wanted[name]]:
            listed = ", ".join(f"{name} = {known.get(name)} (here {wanted[name]})" for name in other)
            raise ValueError(f"{source} has {listed}; correct the config, or start without init")
        if self.labels is not None and before.names is not None and before.names.to_json() != self.labels.names.to_json():
            raise ValueError(
                f"{source} has other names or another order of classes than the data; name its {CLASSES} in "
                f"{self.training.SECTION}.classes"
            )
        self.before = before.extras
        network = self.layout.build(shape)
        network.load_state_dict(before.network.state_dict())
        return network

    def token_flops(self, shape: Any) -> float:
        """Operations of one token in training, with what pictures cost that are encoded on the way."""
        flops = picture_flops(lambda: self.layout.build(shape), self.loss_of)
        if not self._of_bits():
            flops += encoder_flops(self.tokenizer.config, self.training.size, self.training.size)
        return flops / (self.grid() ** 2)

    def loss_of(self, network: Any, B: int) -> Tensor:
        """The training loss of so many pictures of nothing, for counting."""
        raise NotImplementedError

    def _of_bits(self) -> bool:
        readable = (self.data.readable(self.data.shape, number) for number in range(len(self.data)))
        first = next(filter(None, readable), None)
        return bool(first and first.bits)

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """The loss of up to 256 held-out samples, under noise that never changes."""
        if self.heldout is None:
            return {}
        objective, device = _objective(module).eval(), next(module.parameters()).device
        stride = max(1, len(self.heldout) // HELDOUT)
        numbers = list(range(0, len(self.heldout), stride))[:HELDOUT]
        rows = [
            objective.rows(self.feed.plain(self.heldout, numbers[start : start + BATCH]).to(device)).flatten()
            for start in range(0, len(numbers), BATCH)
        ]
        return {objective.loss_name: float(torch.cat(rows).mean())}

    @torch.no_grad()
    def sample(self, module: nn.Module) -> Image.Image:
        """Some conditions with fixed seeds; its own generators, so that training is not disturbed."""
        conditions = self.sample_conditions()
        seeds = [torch.Generator().manual_seed(i) for i in range(len(conditions))]
        found_BChw = self.generate(_objective(module).eval(), conditions, seeds)
        return grid([to_pil(self.decode(found_Chw[None]))[0] for found_Chw in found_BChw])

    def sample_conditions(self) -> list[Any]:
        """What the pictures of a grid are made of: classes, several times each."""
        assert self.labels is not None
        names = self.labels.names
        wished = [names.number(label) for label in self.training.sample_classes] or list(range(min(GRID, len(names))))
        return [number for number in wished for _ in range(PER_CLASS)]

    def generate(self, objective: PictureObjective, conditions: Sequence[Any], generators: Sequence[torch.Generator]) -> Tensor:
        """Bits (B,C,h,w), or what else `decode` reads, with the settings that are saved with the model."""
        raise NotImplementedError

    def decode(self, bits_BChw: Tensor) -> Tensor:
        """What `generate` gave → pictures (B,3,H,W) in [-1,1]."""
        return decode_pictures(self.tokenizer, bits_BChw)

    def defaults(self) -> dict[str, Any]:
        """The settings of sampling that are saved with the model."""
        return {**self.before.get("defaults", {}), **self.training.defaults}

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None:
        """The model folder, with a card that says how it was trained."""
        run, objective = self.config.run, _objective(module)
        images = step * run.batch_size * run.accumulation * processes.world()
        card = {
            "recipe": self.config.recipe,
            **next_card(self.before, self.config.recipe, self.config, step, images),
            "training": {"size": self.training.size, "mirror": self.config.data.mirror},
            **self.card,
        }
        names = None if self.labels is None else self.labels.names
        extras = {"defaults": self.defaults(), "card": card}
        self.layout.save(PictureModel(objective.model, self.tokenizer, names, extras, objective.text.module), folder)


def _objective(module: nn.Module) -> PictureObjective:
    assert isinstance(module, PictureObjective)
    return module
