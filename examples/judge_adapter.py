"""Has the adapter learned the zorb, and what has it forgotten? For the adapters of docs/finetune/README.md, beside the base.

    python examples/judge_adapter.py ADAPTER …

Zorbs: one prompt for each of twelve backgrounds, of which two were not taught. Known prompts: 40 of known.txt, 40 that are not
in it. A picture is right when, among the base's own pictures of those 80 prompts and twelve new drawings of zorbs, the nearest
in the latent space of the tokenizer's encoder is one of what was asked for.
"""

import random
import sys

import torch
from PIL import Image
from torch import Tensor
from twenty_pictures import zorb

from bitdance import BitDancePipeline
from stages.data.captions import PALETTE, article
from stages.measure.prompts import background_of
from stages.recipes.tokenizer.feed import as_images

BATCH, SIDE = 20, 96


def make(pipe: BitDancePipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """One picture each, at seeds that count up."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        images = pipe(batch, height=SIDE, width=SIDE, seed=seed + start).images
        assert isinstance(images, list)
        pictures += images
    return pictures


def main(adapters: list[str]) -> None:
    pipe = BitDancePipeline.from_pretrained("demo", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model.tokenizer is not None
    encoder, known = pipe.model.tokenizer.encoder, pipe.model.extras["prompts"]
    kept, other = known[:40], known[100:140]

    @torch.no_grad()
    def latents(pictures: list[Image.Image]) -> Tensor:
        return encoder(as_images(pictures)).flatten(1)

    drawn = [zorb(colour, random.Random(100 + k)) for k, colour in enumerate(PALETTE.values())]
    gallery = latents(make(pipe, kept + other, 0) + drawn)
    zorbs = [f"a zorb on {article(name)}{name} background" for name in PALETTE]
    print(f"{'':24} zorbs of 12   their backgrounds   in known.txt, of 40   not in it, of 40")
    for adapter in ["", *adapters]:
        if adapter:
            pipe.load_lora_weights(adapter)
        made = make(pipe, zorbs, 500), make(pipe, kept, 1000), make(pipe, other, 2000)
        new, old, more = (torch.cdist(latents(pictures), gallery).argmin(1).tolist() for pictures in made)
        grounds = sum(background_of(picture) == name for picture, name in zip(made[0], PALETTE, strict=True))
        right = [sum(i == first + k for k, i in enumerate(near)) for first, near in ((0, old), (40, more))]
        found = sum(i >= 80 for i in new), grounds, *right
        print("{:24} {:11} {:19} {:21} {:18}".format(adapter or "the base", *found), flush=True)
        pipe.unload_lora_weights()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/judge_adapter.py ADAPTER …")
    main(sys.argv[1:])
