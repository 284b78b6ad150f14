"""Pictures as ComfyUI has them ⇄ bits; how a run is watched.

B pictures, H W pixels, C bits per token, h w token grid. IMAGE is (B,H,W,3) in [0,1], MASK (B,H,W) with 1 where something is
drawn anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

PREVIEW_SIDE = 512  # pixels of a preview's longer side


@dataclass(frozen=True)
class Bits:
    """Tokens of B pictures as their pipeline has them, bits (B,C,h,w) or a list with those of every scale, and where each
    picture's random numbers stand: a generative decoder goes on from there, so decoding twice gives the same picture."""

    tokens: Any
    states: tuple[Tensor, ...]

    @classmethod
    def of(cls, tokens: Any, generators: Sequence[torch.Generator]) -> "Bits":
        """The tokens, with the state that these generators have now."""
        return cls(tokens, tuple(generator.get_state() for generator in generators))

    def __len__(self) -> int:
        return len(self.states)

    def generators(self) -> list[torch.Generator]:
        """A generator of each picture, in its state."""
        found = [torch.Generator() for _ in self.states]
        for generator, state in zip(found, self.states, strict=True):
            generator.set_state(state)
        return found


def encoded(pipe: Any, image_BHWC: Tensor) -> Bits:
    """IMAGE → bits; a fourth channel is left out. ValueError for a size that the picture tokenizer does not take."""
    tokens = pipe.encode(image_BHWC[..., :3].movedim(-1, 1))
    return Bits.of(tokens, [torch.Generator().manual_seed(i) for i in range(len(image_BHWC))])


def decoded(pipe: Any, bits: Bits) -> Tensor:
    """Bits → IMAGE. ValueError for bits of another model, and for a picture that is no finite numbers."""
    unit_B3HW: Tensor = pipe.decode(bits.tokens, bits.generators(), "pt")
    return unit_B3HW.movedim(1, -1).float().cpu().contiguous()


def mask_picture(mask_BHW: Tensor) -> Image.Image:
    """MASK → a picture, white where something is drawn anew. ValueError for a batch of several."""
    mask = mask_BHW if mask_BHW.ndim == 3 else mask_BHW[None]
    if len(mask) != 1:
        raise ValueError(f"the batch holds {len(mask)} masks; give one")
    return Image.fromarray((mask[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


class Watch:
    """A run as ComfyUI shows it; called after every step (a block, a scale or a refinement). It moves the progress bar, sends a
    preview of the first picture, evenly spread and at most `previews` times, and ends the run where the user asked for that."""

    def __init__(self, previews: int) -> None:
        self._left, self._previews = previews, previews
        self._bar: Any = None

    def __call__(self, pipe: Any, step: int, share: float, values: dict[str, Any]) -> None:
        """`share`: how much of the run is done, in (0, 1]; `values` hold the tokens so far."""
        import comfy.model_management
        import comfy.utils

        comfy.model_management.throw_exception_if_processing_interrupted()
        done = step + 1
        total = max(done, round(done / share))
        self._bar = self._bar or comfy.utils.ProgressBar(total)
        several = min(self._previews, total)
        due = self._left > 0 and done * several // total > step * several // total
        self._left -= due
        self._bar.update_absolute(done, total, ("JPEG", preview(pipe, values["tokens"]), PREVIEW_SIDE) if due else None)


def preview(pipe: Any, tokens: Any) -> Image.Image:
    """What the first picture's unfinished tokens decode to; its own random numbers are not touched."""
    first = [scale[:1] for scale in tokens] if isinstance(tokens, list) else tokens[:1]
    picture: Image.Image = pipe.decode(first, [torch.Generator().manual_seed(0)], "pil")[0]
    return picture
