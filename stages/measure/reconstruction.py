"""How good a tokenizer is: PSNR per picture, and whether every bit is used."""

import torch
from PIL import Image
from torch import Tensor

from lfq_tokenizer import LFQTokenizer

BATCH = 64


@torch.no_grad()
def measure_tokenizer(tokenizer: LFQTokenizer, images_B3HW: Tensor, seed: int = 0) -> dict[str, float]:
    """images in [-1,1] → {"psnr": mean over pictures in dB, "bit_entropy": mean over bits of the entropy of a bit's use, in bits,
    "bit_entropy_min": the least used bit, "dead_bits": bits with entropy under 0.01}.

    Pictures are compared after rounding to 8 bits per channel, as a user sees them.
    """
    generator = torch.Generator().manual_seed(seed)
    errors, ones, count = [], torch.zeros(tokenizer.config.z_channels, dtype=torch.float64), 0
    for images in images_B3HW.split(BATCH):
        bits_BChw = tokenizer.encode(images)
        ones += (bits_BChw > 0).sum(dim=(0, 2, 3)).cpu()
        count += bits_BChw.shape[0] * bits_BChw.shape[2] * bits_BChw.shape[3]
        out = to_levels(tokenizer.decode(bits_BChw, generator))
        errors.append((out - to_levels(images)).square().mean(dim=(1, 2, 3)).cpu())
    psnr = 10 * torch.log10(255**2 / torch.cat(errors).clamp_min(1e-10))
    share = (ones / count).clamp(1e-12, 1 - 1e-12)
    entropy = -(share * share.log2() + (1 - share) * (1 - share).log2())
    return {
        "psnr": float(psnr.mean()),
        "bit_entropy": float(entropy.mean()),
        "bit_entropy_min": float(entropy.min()),
        "dead_bits": float((entropy < 0.01).sum()),
    }


def to_levels(images: Tensor) -> Tensor:
    """[-1,1] → whole numbers 0…255 as float, by the published rule clamp(127.5·x + 128) truncated."""
    return (127.5 * images.float() + 128).clamp(0, 255).floor()


@torch.no_grad()
def side_by_side(tokenizer: LFQTokenizer, images_B3HW: Tensor, columns: int = 8) -> Image.Image:
    """Rows of originals with their reconstructions underneath; pictures that fill no whole row are left out."""
    columns = min(columns, len(images_B3HW))
    out = tokenizer.decode(tokenizer.encode(images_B3HW), torch.Generator().manual_seed(0))
    rows = []
    for start in range(0, len(images_B3HW) - columns + 1, columns):
        for source in (images_B3HW, out):
            rows.append(torch.cat(list(source[start : start + columns]), dim=2))
    levels = to_levels(torch.cat(rows, dim=1)).byte().permute(1, 2, 0).cpu()
    return Image.fromarray(levels.contiguous().numpy())
