"""What the tests of training models of classes and of captions share: pictures, a config, a batch, a run that was stopped."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from test_engine import assert_same

from stages.config import DataConfig, DeepSpeedConfig, OptimizerConfig, RunConfig
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.engine import checkpoint
from stages.engine.loader import step_generator
from stages.engine.loop import train

NAMES = ("ant", "bee", "cow")


def draw_pictures(home: Path, width: int = 16, height: int = 16) -> None:
    """Noise in folders of `photos` that are named after their classes, with captions, and shards `pictures` of it in 16 × 16."""
    random = np.random.default_rng(0)
    for number in range(12):
        name = NAMES[number % 3]
        folder = home / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a small {name}\nthe {name} number {number}")
    pack(FolderSource(home / "photos", FolderOptions(size=16, classes=True)), home / "pictures", PackOptions())


def training_config(kind: type, recipe: str, training: type, out: Path, shards: Path, changes: dict[str, Any], **own: Any) -> Any:
    """A config of this kind, four steps of four pictures; its section `recipe` is a `training` with the fields `own`. `changes`:
    fields of it or of the other sections."""

    def mine(section: type) -> dict[str, Any]:
        return {f.name: changes.pop(f.name) for f in dataclasses.fields(section) if f.name in changes}

    section = {"size": 16, **own, **mine(training)}
    run = {"out": str(out), "batch_size": 4, "steps": 4, "seed": 7, "sample_every": 100, **mine(RunConfig)}
    optimizer = {"lr": 1e-3, "eps": 1e-8, "warmup_steps": 0, **mine(OptimizerConfig)}
    data = {"train": (str(shards),), "heldout": (str(shards),), **mine(DataConfig)}
    stage = DeepSpeedConfig(**mine(DeepSpeedConfig))
    assert not changes
    sections = (RunConfig(**run), DataConfig(**data), OptimizerConfig(**optimizer), stage)
    return kind(recipe, *sections, **{recipe: training(**section)})


def batch(recipe: Any, samples: range) -> Any:
    return recipe.feed.batch(samples, step_generator(0, 0, 0)).batch


def check_resuming(recipe: type, config: Callable[..., Any], home: Path, **changes: Any) -> None:
    """A run that was stopped and goes on leaves the same weights and moments as one that was not."""
    for name, stops in (("whole", [4]), ("broken", [2, 4])):
        for steps in stops:
            chosen = config(home, out=f"{config.__name__}-{name}", steps=steps, accumulation=2, ema=0.9, **changes)
            assert train(recipe(chosen), chosen) == 0
    one, other = (checkpoint.step_folder(home / f"{config.__name__}-{name}", 4) for name in ("whole", "broken"))
    assert_same(one, other)
