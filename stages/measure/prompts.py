"""How well a model follows its prompts, judged against every picture it was taught.

    bitdance measure prompts --model demo --train TAUGHT_SHARDS --heldout HELDOUT_SHARDS [--json] [--grid OUT.png]

*Picture right*: among all renderings (picture × background, taught and held out), the one nearest to the generated picture in
the latent space of the tokenizer's encoder (before the sign, Euclidean) shows the picture that the caption asks for. *Top 5*:
the right picture is among the five nearest pictures, each counted once. *Background right*: of the palette, the colour nearest
to the median of the generated picture's border is the one that the caption asks for. *PSNR*: mean, of the generated picture
against the very rendering that the caption asks for; what the tokenizer alone loses bounds it. Pictures are generated in the
size of the shards.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bitdance.cli import Parser, count
from bitdance.generator import load_pipeline
from bitdance.picture import grid, write_png
from stages.data.captions import nearest_color
from stages.data.shards import Sample, ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.recipes.tokenizer.feed import as_images

BATCH = 32
Picture = tuple[str, str]  # concept, style


@dataclass(frozen=True)
class Rendering:
    captions: list[str]
    picture: Picture
    background: str


def _rendering(sample: Sample) -> Rendering:
    about = sample.attributes
    if sample.picture is None or not all(isinstance(about.get(name), str) for name in ("concept", "style", "background")):
        needed = "a picture and the attributes concept, style and background, as `bitdance data pack icons` writes them"
        raise ValueError(f"sample {sample.key} lacks {needed}")
    return Rendering(sample.captions, (about["concept"], about["style"]), about["background"])


class Gallery:
    """Every rendering with its latent. Of its two datasets the first was taught."""

    def __init__(self, pipe: Any, datasets: Sequence[ShardDataset]) -> None:
        assert pipe.model.tokenizer is not None
        self.taught = 0  # renderings of the first dataset
        self.encoder = pipe.model.tokenizer.encoder
        self.renderings: list[Rendering] = []
        latents, pixels = [], []
        for number, data in enumerate(datasets):
            for start in range(0, len(data), BATCH):
                found = (data.readable(data.__getitem__, i) for i in range(start, min(start + BATCH, len(data))))
                samples = [sample for sample in found if sample is not None]
                self.renderings += map(_rendering, samples)
                self.taught += 0 if number else len(samples)
                if not samples:
                    continue
                pictures: list[Any] = [sample.picture for sample in samples]
                latents.append(self.latents(pictures))
                pixels.append(((as_images(pictures) + 1) * 127.5).round().to(torch.uint8))
        if not self.taught or len(self.renderings) == self.taught:
            raise ValueError("--train and --heldout need one sample each that can be read; see `bitdance data inspect`")
        self._latents_RF, self.pixels_R3HW = torch.cat(latents), torch.cat(pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the renderings."""
        height, width = self.pixels_R3HW.shape[2:]
        return height, width

    def psnr(self, picture: Image.Image, rendering: int) -> float:
        """In dB, against one rendering."""
        difference = (as_images([picture])[0] + 1) * 127.5 - self.pixels_R3HW[rendering]
        return float(10 * torch.log10(255**2 / difference.square().mean().clamp(min=1e-3)))

    @torch.no_grad()
    def latents(self, pictures: Sequence[Any]) -> Tensor:
        """RGB pictures → (B, C·h·w)."""
        return self.encoder(as_images(pictures)).flatten(1)

    def nearest(self, pictures: Sequence[Image.Image]) -> list[list[int]]:
        """For each picture all renderings, nearest first."""
        return torch.cdist(self.latents(pictures), self._latents_RF).argsort(dim=1).tolist()


def background_of(picture: Image.Image) -> str:
    """The palette colour nearest to the median colour of the picture's two-pixel border."""
    pixels = as_images([picture])[0]
    edges = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    border = torch.cat([edge.flatten(1) for edge in edges], dim=1)
    median = (border.median(dim=1).values + 1) * 127.5
    return nearest_color(median.tolist())


def judge(
    pipe: Any, gallery: Gallery, wanted: Sequence[int], captions: Sequence[str], seed: int, **settings: Any
) -> tuple[dict[str, float], list[Image.Image]]:
    """Generate `captions[i]`, which asks for rendering `wanted[i]`; shares of right answers and the pictures."""
    pictures: list[Image.Image] = []
    right, top5, background, exact, psnr = 0, 0, 0, 0, 0.0
    height, width = gallery.size
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        seeds = [seed + start + i for i in range(len(batch))]
        images = pipe(batch, height=height, width=width, seed=seeds, **settings).images
        assert isinstance(images, list)
        pictures += images
        for image, order, index in zip(images, gallery.nearest(images), wanted[start:], strict=False):
            target = gallery.renderings[index]
            ranked = list(dict.fromkeys(gallery.renderings[i].picture for i in order))
            right += ranked[0] == target.picture
            top5 += target.picture in ranked[:5]
            background += background_of(image) == target.background
            psnr += gallery.psnr(image, index)
            found = gallery.renderings[order[0]]
            exact += (found.picture, found.background) == (target.picture, target.background)
    n = len(captions)
    shares = {"picture": right / n, "picture_top5": top5 / n, "background": background / n, "rendering": exact / n}
    return {"prompts": n, **shares, "psnr": psnr / n}, pictures


def open_gallery(pipe: Any, train: Sequence[str], heldout: Sequence[str]) -> Gallery:
    """Of the renderings in two lists of shards, seen by the encoder of `pipe`."""
    return Gallery(pipe, [ShardDataset(ShardIndex.open(list(places))) for places in (train, heldout)])


def follow(pipe: Any, gallery: Gallery, count: int, seed: int, **settings: Any) -> tuple[dict[str, Any], list[Image.Image]]:
    """`count` taught captions (any wording) and up to `count` held-out pairs (canonical wording), drawn with `seed`."""
    generator, taught = torch.Generator().manual_seed(seed), gallery.taught
    seen_index = torch.randperm(taught, generator=generator)[:count].tolist()
    unseen_index = (torch.randperm(len(gallery.renderings) - taught, generator=generator)[:count] + taught).tolist()
    picks = torch.rand(len(seen_index), generator=generator).tolist()
    wordings = [gallery.renderings[i].captions for i in seen_index]
    seen_captions = [captions[int(pick * len(captions))] for captions, pick in zip(wordings, picks, strict=True)]
    unseen_captions = [gallery.renderings[i].captions[0] for i in unseen_index]
    seen, seen_pictures = judge(pipe, gallery, seen_index, seen_captions, seed, **settings)
    held, held_pictures = judge(pipe, gallery, unseen_index, unseen_captions, seed, **settings)
    figures = {
        "pictures": len({r.picture for r in gallery.renderings}),
        "renderings": len(gallery.renderings),
        "taught": seen,
        "heldout_pairs": held,
    }
    return figures, seen_pictures[:32] + held_pictures[:32]


def main(argv: list[str]) -> int:
    """`bitdance measure prompts …`."""
    prompts = Parser(prog="bitdance measure prompts", description="How well a model follows its prompts.")
    prompts.add_argument("--model", default="demo", help="model folder, or demo (default)")
    prompts.add_argument("--train", nargs="+", required=True, help="shards of pictures the model was taught")
    prompts.add_argument("--heldout", nargs="+", required=True, help="shards of picture × background pairs it never saw")
    prompts.add_argument("--count", type=count, default=200, help="prompts of each kind (default: 200)")
    prompts.add_argument("--seed", type=int, default=0, help="of the choice of prompts, and of the pictures (default: 0)")
    prompts.add_argument("--steps", type=int, help="solver steps per block; default: the model's own")
    prompts.add_argument("--guidance", type=float, help="strength of the prompt; default: the model's own")
    prompts.add_argument("--preset", help="default: the model's own")
    prompts.add_argument("--grid", type=Path, help="write 32 taught and 32 held-out pictures")
    prompts.add_argument("--json", action="store_true", help="one JSON object instead of text")
    a = prompts.parse_args(argv)
    pipe = load_pipeline(model_folder(a.model))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": a.steps, "guidance_scale": a.guidance, "preset": a.preset}
    figures, pictures = follow(pipe, open_gallery(pipe, a.train, a.heldout), a.count, a.seed, **settings)
    if a.json:
        print(json.dumps(figures))
    else:
        print(f"{figures['pictures']} pictures in {figures['renderings']} renderings")
        for name in ("taught", "heldout_pairs"):
            row = figures[name]
            shares = "  ".join(f"{k} {100 * v:.1f} %" for k, v in row.items() if k not in ("prompts", "psnr"))
            print(f"{name:14} {row['prompts']:4} prompts  {shares}  psnr {row['psnr']:.2f} dB")
    if a.grid:  # last: what was found is shown, also where the grid cannot be written
        write_png(grid(pictures, columns=8), a.grid)
    return 0
