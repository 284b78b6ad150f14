"""What an edit asks for: which labels of a picture stay, and how much of the others is kept to begin with.

C bits per token, G labels per token, V values of a label, h w token grid, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bitdance.kinds.refine.labels import labels_of
from bitdance.values import check_number, shown

WHOLE = 0.7  # strength where all may change
# A token must change where its labels lose more nats under the new condition than this part of what the clearest tenth of tokens
# loses, and more than the floor. Judged on the bundled style, where objects lose 0 to 20 and backgrounds 40 to 300: configs/demo.
PART, FLOOR = 0.15, 1.0
SHARES, DRAWS = (0.3, 0.5, 0.7), 4  # of noise under which the picture is looked at, and how often under each


class Pipeline(Protocol):
    """What is asked of the pipeline that edits."""

    model: Any

    def encode(self, images: Any) -> Tensor: ...

    def predictor(self, conditions: Sequence[Any], negative: Any = None) -> Any: ...


@dataclass(frozen=True)
class Edit:
    """`bits_Chw` of the picture; `fixed_hw` is True where they stay; `strength` as in `loop.Start`; `size` in pixels."""

    bits_Chw: Tensor
    fixed_hw: Tensor
    strength: float
    size: tuple[int, int]


def read_edit(
    pipe: Pipeline,
    image: Any,
    mask: Any,
    strength: float | None,
    condition: Any,
    source: Any,
    extend: Sequence[int] | None = None,
) -> Edit:
    """See `RefinePipeline.edit`. ValueError for a picture, mask or strength that does not fit."""
    bits_Chw = _bits(pipe, image)
    s = pipe.model.tokenizer.downsampling
    if extend is not None:
        if mask is not None:
            raise ValueError("mask and extend together; make the picture larger first, then change it")
        bits_Chw, mask = extended(bits_Chw, extend, s)
    h, w = bits_Chw.shape[1:]
    only = pipe.model.sizes[0]
    if pipe.model.names is not None and (h * s, w * s) != only:
        raise ValueError(f"the picture becomes {w * s}×{h * s} pixels; this model makes pictures of {only[1]}×{only[0]} only")
    whole = mask is None and source is None
    share = (WHOLE if whole else 1.0) if strength is None else check_number("strength", strength)
    if mask is not None:
        free_hw = token_mask(mask, (h, w), s)
    elif source is not None:
        free_hw = changed_tokens(pipe, bits_Chw, source, condition)
    else:
        free_hw = torch.ones(h, w, dtype=torch.bool)
    return Edit(bits_Chw, ~free_hw.to(bits_Chw.device), share, (h * s, w * s))


def extended(bits_Chw: Tensor, extend: Sequence[int], downsampling: int) -> tuple[Tensor, Tensor]:
    """The bits in a larger grid, and which tokens are new, bool (h,w). `extend`: top, right, bottom, left in pixels. ValueError
    for what is no multiple of the downsampling, and for nothing."""
    sides = [check_number("extend", side) for side in extend]
    if len(sides) != 4 or any(side % downsampling for side in sides) or not any(sides):
        raise ValueError(f"extend = {shown(tuple(extend))}; top, right, bottom, left in multiples of {downsampling} are allowed")
    top, right, bottom, left = (side // downsampling for side in sides)
    where = (left, right, top, bottom)
    old = torch.ones(bits_Chw.shape[1:], dtype=torch.bool, device=bits_Chw.device)
    return F.pad(bits_Chw, where, value=-1.0), ~F.pad(old, where)


def token_mask(mask: Any, grid: tuple[int, int], downsampling: int) -> Tensor:
    """A mask of pixels (a PIL picture, white where something is drawn anew, or a bool array (H,W)) or of tokens (a bool tensor
    (h,w)) → tokens that are drawn anew, bool (h,w). ValueError for another size, and for a mask of nothing."""
    h, w = grid
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) >= 128
    found = torch.as_tensor(mask) if isinstance(mask, np.ndarray | Tensor) else None
    shape = None if found is None else tuple(found.shape)
    if found is None or shape not in ((h, w), (h * downsampling, w * downsampling)):
        size = f"{w * downsampling}×{h * downsampling} pixels"
        raise ValueError(
            f"the mask is {shown(mask) if shape is None else shape}; give a picture of {size}, white where it may change"
        )
    free = found.bool()
    if shape != (h, w):
        free = free.unflatten(0, (h, downsampling)).unflatten(2, (w, downsampling)).any(3).any(1)
    if not bool(free.any()):
        raise ValueError("the mask is black everywhere, so nothing would change; white says what is drawn anew")
    return free


@torch.no_grad()
def changed_tokens(pipe: Pipeline, bits_Chw: Tensor, source: Any, target: Any) -> Tensor:
    """The tokens that do not fit the new condition, bool (h,w): where the network, shown the picture under noise, finds the
    picture's own labels less likely under `target` than under `source`.

    # OURS: the published models have no such call. What is compared is the mean over several shares of noise and draws, in nats
    per token.
    """
    config = pipe.model.network.config
    predictor = pipe.predictor([source, target])
    labels = labels_of(bits_Chw[None], config).to(predictor.device)
    generator = torch.Generator().manual_seed(0)
    lost = torch.zeros(bits_Chw.shape[1:], device=predictor.device)
    for share in SHARES:
        for _ in range(DRAWS):
            random = torch.randint(0, config.values, labels.shape, generator=generator).to(predictor.device)
            kept = (torch.rand(labels.shape, generator=generator) < share).to(predictor.device)
            seen = torch.where(kept, labels, random).expand(2, -1, -1, -1)
            time_B = torch.full((2,), share, device=predictor.device)
            logits, _ = predictor.logits([0, 1], seen, time_B, False)
            log_p = logits.float().log_softmax(dim=-1)
            chosen = log_p.gather(-1, labels.expand(2, -1, -1, -1)[..., None])[..., 0].sum(dim=1)  # (2,h,w) nats of a token
            lost += (chosen[0] - chosen[1]) / (len(SHARES) * DRAWS)
    free = lost > max(FLOOR, PART * float(lost.quantile(0.9)))
    return free if bool(free.any()) else lost >= lost.max()


def _bits(pipe: Pipeline, image: Any) -> Tensor:
    """Bits (C,h,w) of a picture or of what are bits already."""
    if isinstance(image, Image.Image):
        s = pipe.model.tokenizer.downsampling
        if image.width % s or image.height % s:
            near = "×".join(str(max(s, side // s * s)) for side in image.size)
            raise ValueError(
                f"the picture has {image.width}×{image.height} pixels; multiples of {s} are allowed: crop it to {near}"
            )
        return pipe.encode(image)[0]
    bits = image[0] if isinstance(image, Tensor) and image.ndim == 4 and len(image) == 1 else image
    wanted = pipe.model.network.config.bits
    if not isinstance(bits, Tensor) or bits.ndim != 3 or len(bits) != wanted:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"the picture is {shape}; give a PIL picture, or bits of shape ({wanted}, h, w) in -1 and +1")
    return bits.float()
