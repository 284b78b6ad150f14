"""Recipe 'class_patch': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.folder import CLASSES, ClassModel, load, save
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import choose
from bitdance.picture import grid, to_pil
from lfq_tokenizer import LFQTokenizer
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine import processes
from stages.engine.checkpoint import model_folder
from stages.recipe import Discriminator
from stages.recipes.chain import check_bits, next_card
from stages.recipes.class_patch import labels
from stages.recipes.class_patch.config import ClassTrainingConfig
from stages.recipes.class_patch.feed import ClassFeed
from stages.recipes.class_patch.flops import token_flops
from stages.recipes.class_patch.objective import ClassPatchObjective
from stages.recipes.tokenizer.coding import decode_pictures

HELDOUT, BATCH = 256, 32  # held-out samples
GRID = 8  # classes of a grid, where the config names none
PER_CLASS = 4  # pictures of each


class ClassPatchRecipe:
    """See `recipe.Recipe`. ValueError where tokenizer, data, classes, an earlier model and the config do not fit."""

    discriminator: Discriminator | None = None
    base = ""

    def __init__(self, config: ClassTrainingConfig) -> None:
        self.config, self.training = config, config.class_patch
        self.tokenizer = LFQTokenizer.from_pretrained(model_folder(self.training.tokenizer)).float().eval().requires_grad_(False)
        data = ShardDataset(ShardIndex.open(config.data.train, config.data.keep))
        check_bits([shard.address for shard in data.index.shards], self.tokenizer)
        self._labels = labels.from_file(self.training.classes) if self.training.classes else labels.from_samples(data)
        shape = self._shape()
        before = load(model_folder(self.training.init), torch.device("cpu"), torch.float32) if self.training.init else None
        self._before = {} if before is None else before.extras
        network = self._fresh(shape) if before is None else self._continued(before, shape)
        network.head.net.grad_checkpointing = network.checkpoint_layers = self.training.checkpoint_activations
        self.module: nn.Module = ClassPatchObjective(network, self.tokenizer)
        if config.run.compile:
            network.compile()
        self.feed = ClassFeed(config, data, self._labels, shape)
        self.heldout = ShardDataset(ShardIndex.open(config.data.heldout)) if config.data.heldout else None
        self.flops = token_flops(shape, self.tokenizer.config, pixels=not self._of_bits(data))

    def _shape(self) -> ClassPatchConfig:
        training, s = self.training, self.tokenizer.downsampling
        if training.size % s:
            raise ValueError(f"class_patch.size = {training.size}; a multiple of the tokenizer's downsampling {s} is allowed")
        if training.class_count and training.class_count != len(self._labels):
            raise ValueError(
                f"class_patch.class_count = {training.class_count}, but there are {len(self._labels)} classes; correct it, or "
                f"name a {CLASSES} in class_patch.classes"
            )
        return training.shape(self.tokenizer.config.bits, training.size // s, len(self._labels))

    def _fresh(self, shape: ClassPatchConfig) -> ClassPatchModel:
        return ClassPatchModel(shape, torch.Generator().manual_seed(self.config.run.seed))

    def _continued(self, before: ClassModel, shape: ClassPatchConfig) -> ClassPatchModel:
        """The network of `class_patch.init`, which must have this shape and these classes."""
        known, wanted = before.network.config.to_dict(), shape.to_dict()
        training_alone = (
            "class_dropout_prob",
            "perturb_rate",
            "diff_batch_mul",
            "P_mean",
            "P_std",
            "time_schedule",
            "time_shift",
        )
        if other := [name for name in wanted if name not in training_alone and known[name] != wanted[name]]:
            listed = ", ".join(f"{name} = {known[name]} (here {wanted[name]})" for name in other)
            raise ValueError(f"class_patch.init = {self.training.init!r} has {listed}; correct the config, or start without init")
        if before.names.to_json() != self._labels.names.to_json():
            raise ValueError(
                f"class_patch.init = {self.training.init!r} has other names or another order of classes than the data; name its "
                f"{CLASSES} in class_patch.classes"
            )
        network = ClassPatchModel(shape)
        network.load_state_dict(before.network.state_dict())
        return network

    @staticmethod
    def _of_bits(data: ShardDataset) -> bool:
        first = next(filter(None, (data.readable(data.shape, number) for number in range(len(data)))), None)
        return bool(first and first.bits)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Everything trains: the head, and the network that makes its conditions."""
        model = _objective(self.module).model
        head = list(model.head.parameters())
        known = {id(p) for p in head}
        return {"network": [p for p in model.parameters() if id(p) not in known], "head": head}

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
        return {"velocity": float(torch.cat(rows).mean())}

    @torch.no_grad()
    def sample(self, module: nn.Module) -> Image.Image:
        """Some classes with fixed seeds; its own generators, so that training is not disturbed."""
        names = self._labels.names
        wished = [names.number(label) for label in self.training.sample_classes] or list(range(min(GRID, len(names))))
        classes = [number for number in wished for _ in range(PER_CLASS)]
        seeds = [torch.Generator().manual_seed(i) for i in range(len(classes))]
        bits_BChw = generate_bits(_objective(module).model.eval(), classes, choose(self.defaults()), seeds)
        decode = partial(decode_pictures, self.tokenizer)
        return grid([to_pil(decode(bits_Chw[None]))[0] for bits_Chw in bits_BChw])

    def defaults(self) -> dict[str, Any]:
        """The settings of sampling that are saved with the model."""
        return {**self._before.get("defaults", {}), **self.training.defaults}

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None:
        run = self.config.run
        images = step * run.batch_size * run.accumulation * processes.world()
        stages = next_card(self._before, "class_patch", self.config, step, images)
        card = {
            "recipe": self.config.recipe,
            **stages,
            "training": {"size": self.training.size, "mirror": self.config.data.mirror},
        }
        save(
            ClassModel(_objective(module).model, self.tokenizer, self._labels.names, {"defaults": self.defaults(), "card": card}),
            folder,
        )


def _objective(module: nn.Module) -> ClassPatchObjective:
    assert isinstance(module, ClassPatchObjective)
    return module
