"""What every pipeline shares, whatever predicts the bits: a generator per picture; pictures → tokens, and back in the wished
form.

B pictures, H W pixels, C bits per token, h w token grid.
"""

import secrets
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.networks.offload import Phase
from bitdance.picture import to_pil, to_unit
from bitdance.values import check_number, shown
from lfq_tokenizer.any_tokenizer import BitTokenizer, decoding_bytes

# OURS: a picture that would take more is decoded in strips, which takes a fifth longer and two fifths of the memory.
DECODE_BYTES = 1 << 30
FORMS = ("pil", "np", "pt")
Images: TypeAlias = list[Image.Image] | np.ndarray | Tensor


def check_form(output_type: Any, allowed: Sequence[str], callback: Any = None) -> None:
    """ValueError for a form of the output that there is not, and for a callback that is no function."""
    if not isinstance(output_type, str) or output_type not in allowed:
        raise ValueError(f"output_type = {shown(output_type)}; allowed are {', '.join(allowed)}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end = {shown(callback)}; it must be a function")


class PictureCoding:
    """The half of a pipeline that knows the picture tokenizer. A pipeline says where it computes (`device`)."""

    _tokenizer: BitTokenizer

    @property
    def device(self) -> torch.device:
        """Where the tokenizer computes."""
        return next(self._tokenizer.decoder.parameters()).device

    def _enter(self, phase: Phase) -> None:
        """A pipeline that moves its parts brings those of the phase to the device."""

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Pictures → bits (B,C,h,w) in {-1,+1}, float32, of the sizes that they have.

        `images`: one picture of PIL or a list of equally large ones, or an array (B,H,W,3) or a tensor (B,3,H,W) in [0,1], as
        `images` of an output come. ValueError for others, for unequal sizes, for sides that are no multiples of the
        downsampling, and for a model that was loaded without its encoder.
        """
        if getattr(self._tokenizer, "encoder", None) is None:
            raise ValueError("the model was loaded without its picture encoder; load it with generation_only=False")
        self._enter("decode")  # the phase of the picture tokenizer
        unit_B3HW = as_unit(images).to(self.device, next(self._tokenizer.encoder.parameters()).dtype)
        return self._tokenizer.encode(2 * unit_B3HW - 1).float()

    def decode(self, tokens: Tensor, generators: Sequence[torch.Generator] | None = None, output_type: str = "pil") -> Images:
        """Bits (B,C,h,w) → pictures, as `images` of an output: "pil", "np" or "pt". A generative decoder draws from the picture's
        own generator, fresh ones by default. ValueError when the decoder gives NaN or infinity, as float16 may."""
        check_form(output_type, FORMS)
        if not isinstance(tokens, Tensor) or tokens.ndim != 4:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens are {shape}; give bits of shape (batch, {self._tokenizer.config.bits}, h, w)")
        own = generators_for(len(tokens), None, None)[0] if generators is None else generators
        return self._formed(self.decode_tensor(tokens, own), output_type)

    @torch.no_grad()
    def decode_tensor(self, bits_BChw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Bits (B,C,h,w) → decoder output (B,3,H,W), about [-1,1], float32; one picture at a time, which bounds the
        memory and keeps pictures independent, and a large one strip by strip. A generative decoder draws from the picture's
        own generator, after all other draws. ValueError when the decoder gives NaN or infinity, as float16 may.
        """
        images_B3HW = self.decode_unchecked(bits_BChw, generators)
        if bool((~torch.isfinite(images_B3HW)).any()):
            raise ValueError(self.not_finite())
        return images_B3HW

    def not_finite(self) -> str:
        """What to say of a picture that is no picture."""
        dtype = next(self._tokenizer.decoder.parameters()).dtype
        other = "" if dtype == torch.float32 else "use float32 or bfloat16, or "
        name = str(dtype).removeprefix("torch.")
        return f"the decoder gives NaN or infinity in {name}; {other}check the weights (bitdance verify)"

    @torch.no_grad()
    def decode_unchecked(self, bits_BChw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """As `decode_tensor`, without a look at the result, which would wait for the device."""
        self._enter("decode")
        tokenizer = self._tokenizer
        bits_BChw = bits_BChw.to(self.device, next(tokenizer.decoder.parameters()).dtype)
        height, width = (side * tokenizer.downsampling for side in bits_BChw.shape[2:])
        whole = decoding_bytes(tokenizer.config, height, width, bits_BChw.itemsize, strips=False)
        strips = True if whole > DECODE_BYTES else None
        pictures = [self._decode_one(bits[None], g, strips) for bits, g in zip(bits_BChw, generators, strict=True)]
        return torch.cat(pictures).float()

    def _decode_one(self, bits_1Chw: Tensor, generator: torch.Generator, strips: bool | None) -> Tensor:
        return self._tokenizer.decode(bits_1Chw, generator, strips)

    def _formed(self, images_B3HW: Tensor, output_type: str) -> Images:
        """Decoder output as `output_type` says."""
        if output_type == "pil":
            return to_pil(images_B3HW)
        unit_B3HW = to_unit(images_B3HW)
        return unit_B3HW if output_type == "pt" else unit_B3HW.permute(0, 2, 3, 1).cpu().numpy()


def as_unit(images: Any) -> Tensor:
    """Pictures of any form that an output has → (B,3,H,W) float32 in [0,1]."""
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3:
        return images.float()
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[3] == 3:
        unit = torch.from_numpy(images).float() / (255 if images.dtype == np.uint8 else 1)
        return unit.permute(0, 3, 1, 2)
    pictures = [images] if isinstance(images, Image.Image) else images
    if not isinstance(pictures, (list, tuple)) or not pictures or not all(isinstance(p, Image.Image) for p in pictures):
        raise ValueError(
            f"images are a {type(images).__name__}; give a PIL picture, a list of them, an array (B,H,W,3) or a tensor (B,3,H,W)"
        )
    if len(sizes := {picture.size for picture in pictures}) > 1:
        raise ValueError(f"the pictures of a batch have sizes {sorted(sizes)}; encode each size by itself")
    return as_unit(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))


def generators_for(count: int, seed: Any, generator: Any) -> tuple[list[torch.Generator], list[int | None]]:
    """One generator for each of `count` pictures, and the seeds as far as they are known: one of the two is given, or neither.

    A single seed s serves n pictures as s, s + 1, …, s + n - 1; a single generator serves one picture directly and draws n seeds
    for more. ValueError for another count than `count`, both at once, and what is neither.
    """
    if seed is not None and generator is not None:
        raise ValueError("both seed and generator were given; give one of them")
    if isinstance(generator, torch.Generator) and count > 1:
        drawn = torch.randint(0, 2**63 - 1, (count,), generator=generator, device=generator.device)
        seed = drawn.tolist()
    elif generator is not None:
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"generator = {shown(generator)}; give a torch.Generator or a list of them")
        if len(generators) != count:
            raise ValueError(f"{len(generators)} generators for {count} pictures; give one per picture")
        if len(set(map(id, generators))) != count:
            raise ValueError("the same generator occurs twice in the list; every picture needs its own")
        return list(generators), [None] * count
    if seed is None:
        seed = [secrets.randbelow(2**32) for _ in range(count)]
    elif isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} pictures; give one per picture, or one seed for all")
    else:
        first = check_number("seed", seed)
        seed = [first + i for i in range(count)]
    seeds = [check_number("seed", value) for value in seed]
    return [torch.Generator().manual_seed(value) for value in seeds], list(seeds)
