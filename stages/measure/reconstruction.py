"""How good a tokenizer is: PSNR, SSIM, LPIPS and Fréchet distance of its reconstructions, and whether every bit is used."""

import torch
from PIL import Image
from torch import Tensor

from lfq_tokenizer.any_tokenizer import PictureTokenizer
from lfq_tokenizer.scale_vae import ScaleTokenizer
from stages.measure.frechet import FrechetDistance, FrechetFeatures
from stages.recipes.tokenizer.perceptual import LPIPS, NETS

BATCH = 64
WINDOW = 11  # taps of SSIM's Gaussian; smaller pictures have no SSIM
TILE = 1024  # largest side that LPIPS sees at once
PIXELS = TILE * TILE  # pixels that SSIM and LPIPS see at once


class Reconstruction:
    """Collects pictures and their reconstructions, of any number of sizes; keeps sums only, never a picture.

    Pictures are compared after rounding to 8 bits per channel, as a user sees them. Figures are means over pictures. A picture
    with a side under 11 pixels has no SSIM, one under LPIPS' smallest side no LPIPS: the mean leaves it out, `notes()` says so.
    """

    def __init__(self, bits: int = 0, perceptual: LPIPS | None = None, features: FrechetFeatures | None = None) -> None:
        """`bits` per token; 0 measures a tokenizer without bits, and `add` then takes none."""
        self.bits, self.perceptual = bits, perceptual
        self.frechet = FrechetDistance(features) if features else None
        self.pictures = self.pixels = self.tokens = 0
        self.ones_C = torch.zeros(bits, dtype=torch.float64)
        self.sums = {"psnr": 0.0, "ssim": 0.0, "lpips": 0.0}
        self.counts = dict.fromkeys(self.sums, 0)

    @torch.no_grad()
    def add(self, images_B3HW: Tensor, out_B3HW: Tensor, bits_BChw: Tensor | None = None) -> None:
        """Pictures and reconstructions in [-1,1] (reconstructions may lie outside), bits in {-1,+1}.

        ValueError for shapes that do not fit, numbers that are not finite, bits other than -1 and +1; nothing is counted then.
        """
        self._check(images_B3HW, out_B3HW, bits_BChw)
        with torch.autocast(images_B3HW.device.type, enabled=False):
            levels, out = to_levels(images_B3HW), to_levels(out_B3HW)
            self._add("psnr", (out - levels).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).reciprocal().mul(255**2).log10() * 10)
            if min(levels.shape[2:]) >= WINDOW:
                self._add("ssim", ssim(levels, out))
            if self.perceptual is not None and min(levels.shape[2:]) >= NETS[self.perceptual.net].minimum:
                self._add("lpips", tiled_lpips(self.perceptual.to(levels.device), levels / 127.5 - 1, out / 127.5 - 1))
            if self.frechet is not None:
                self.frechet.add(levels, out)
        self.pictures += len(levels)
        self.pixels += levels[:, 0].numel()
        if bits_BChw is not None:
            self.ones_C += (bits_BChw > 0).sum(dim=(0, 2, 3)).cpu()
            self.tokens += bits_BChw[:, 0].numel()

    def result(self) -> dict[str, float]:
        """pictures; psnr in dB; ssim; lpips; rfid or lite0_frechet; bit_entropy (mean over bits, in bits), bit_entropy_min (the
        least used bit), dead_bits (entropy under 0.01), bits_per_picture, bits_per_pixel.

        A figure that nothing was measured for is absent. ValueError when no picture was added.
        """
        if not self.pictures:
            raise ValueError("no picture was measured; the source holds none")
        figures = {"pictures": float(self.pictures)}
        figures |= {name: self.sums[name] / count for name, count in self.counts.items() if count}
        if self.frechet is not None and self.pictures > 1:
            figures[self.frechet.features.name] = self.frechet.value()
        if self.bits:
            entropy_C = self.bit_entropies()
            figures["bit_entropy"] = float(entropy_C.mean())
            figures["bit_entropy_min"] = float(entropy_C.min())
            figures["dead_bits"] = float((entropy_C < 0.01).sum())
            figures["bits_per_picture"] = self.tokens * self.bits / self.pictures
            figures["bits_per_pixel"] = self.tokens * self.bits / self.pixels
        return figures

    def bit_entropies(self) -> Tensor:
        """Entropy of each bit's use over all tokens, in bits: (C,) float64 in [0,1], 1 where it is set half of the time."""
        if not self.tokens:
            raise ValueError("no bits were measured; add pictures with their bits first")
        share_C = (self.ones_C / self.tokens).clamp(1e-12, 1 - 1e-12)
        return -(share_C * share_C.log2() + (1 - share_C) * (1 - share_C).log2())

    def notes(self) -> list[str]:
        """What a reader of `result()` must be told: pictures left out, and estimates from too few pictures."""
        notes = []
        for name, least in (("ssim", WINDOW), ("lpips", NETS[self.perceptual.net].minimum if self.perceptual else 0)):
            if (missing := self.pictures - self.counts[name]) and least:
                notes.append(f"{name}: {missing} of {self.pictures} pictures left out, a side has under {least} pixels")
        if self.frechet is not None:
            features = self.frechet.features
            if self.pictures < 2:
                notes.append(f"{features.name}: left out, {self.pictures} picture is no distribution")
            elif self.pictures <= features.num_features:
                notes.append(
                    f"{features.name}: {self.pictures} pictures, no more than its {features.num_features} features: far too "
                    "high; compare it only with figures from the same pictures"
                )
        return notes

    def _add(self, name: str, values_B: Tensor) -> None:
        self.sums[name] += float(values_B.double().sum())
        self.counts[name] += len(values_B)

    def _check(self, images_B3HW: Tensor, out_B3HW: Tensor, bits_BChw: Tensor | None) -> None:
        shape = tuple(images_B3HW.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or tuple(out_B3HW.shape) != shape:
            raise ValueError(f"pictures have shape {shape}, reconstructions {tuple(out_B3HW.shape)}; expected (B, 3, H, W) twice")
        for name, tensor in (("picture", images_B3HW), ("reconstruction", out_B3HW)):
            if not tensor.isfinite().all():
                broken = [i for i, one in enumerate(tensor) if not one.isfinite().all()]
                raise ValueError(
                    f"{name} {broken[0]} of {shape[0]} holds numbers that are not finite ({len(broken)} of them do); "
                    "nothing can be measured, check the weights and the precision they run in"
                )
        if (bits_BChw is None) != (self.bits == 0):
            raise ValueError(f"this measures {self.bits} bits per token; got {'none' if bits_BChw is None else 'some'}")
        if bits_BChw is not None:
            if bits_BChw.ndim != 4 or tuple(bits_BChw.shape[:2]) != (shape[0], self.bits):
                raise ValueError(f"bits have shape {tuple(bits_BChw.shape)}, expected ({shape[0]}, {self.bits}, h, w)")
            if not (bits_BChw.abs() == 1).all():
                raise ValueError("bits hold values other than -1 and +1; take them from LFQTokenizer.encode")


def measure_tokenizer(
    tokenizer: PictureTokenizer, images_B3HW: Tensor, seed: int = 0, perceptual: LPIPS | None = None
) -> dict[str, float]:
    """Encode and decode images in [-1,1]; the figures of `Reconstruction.result`. `seed`: noise of a generative decoder."""
    generator = torch.Generator().manual_seed(seed)
    figures = Reconstruction(tokenizer.config.bits, perceptual)
    for images in images_B3HW.split(BATCH):
        out, bits = round_trip(tokenizer, images, generator)
        figures.add(images, out, bits if tokenizer.config.bits else None)
    return figures.result()


@torch.no_grad()
def round_trip(
    tokenizer: PictureTokenizer, images_B3HW: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Images in [-1,1] → reconstructions, and bits (B,C,h,w) in {-1,+1}: of a tokenizer of scales those of all L tokens of all
    scales (B,C,L,1), codes by their numbers. `generator`: noise of a generative decoder."""
    if not isinstance(tokenizer, ScaleTokenizer):
        bits_BChw = tokenizer.encode(images_B3HW)
        return tokenizer.decode(bits_BChw, generator), bits_BChw
    tokens = tokenizer.encode(images_B3HW)
    out_B3HW = tokenizer.decode(tokens)
    if tokenizer.config.quantizer == "bits":
        return out_B3HW, torch.cat([one.flatten(2) for one in tokens], dim=2)[..., None]
    numbers_BL = torch.cat([one.flatten(1) for one in tokens], dim=1)
    places_C = torch.arange(tokenizer.config.bits, device=numbers_BL.device)
    digits_BCL = (numbers_BL[:, None] >> places_C[:, None]) & 1
    return out_B3HW, 2.0 * digits_BCL[..., None] - 1


def to_levels(images: Tensor) -> Tensor:
    """[-1,1] → whole numbers 0…255 as float, by the published rule clamp(127.5·x + 128) truncated."""
    return (127.5 * images.float() + 128).clamp(0, 255).floor()


def ssim(levels_B3HW: Tensor, out_levels_B3HW: Tensor) -> Tensor:
    """Structural similarity per picture (B,), of levels 0…255: mean over R, G, B and positions, Gaussian of 11 taps, σ 1.5.

    Source: Wang et al. 2004, computed by torchmetrics (edges reflected).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    H, W = levels_B3HW.shape[2:]
    halo, rows = WINDOW // 2, max(1, PIXELS // W)
    values = []
    for ours, theirs in zip(*(x.split(max(1, PIXELS // (H * W))) for x in (levels_B3HW, out_levels_B3HW)), strict=True):
        total_B = torch.zeros(len(ours), dtype=torch.float64, device=ours.device)
        for start in range(0, H, rows):  # bands of rows, each with the rows around it that its windows reach
            low, high = max(0, start - halo), min(H, start + rows + halo)
            band = theirs[:, :, low:high], ours[:, :, low:high]
            _, map_B3HW = structural_similarity_index_measure(*band, data_range=255.0, reduction="none", return_full_image=True)
            total_B += map_B3HW[:, :, start - low : start - low + rows].double().sum(dim=(1, 2, 3))
        values.append(total_B / (3 * H * W))
    return torch.cat(values)


def tiled_lpips(perceptual: LPIPS, images_B3HW: Tensor, out_B3HW: Tensor) -> Tensor:
    """LPIPS per picture (B,). Memory is that of one tile: the VGG net needs 4 GB a layer for 4096×4096 pixels at once.

    # OURS: a picture with a side over 1024 pixels is cut into equal tiles of at most that, and the mean over them is taken,
    # weighted by area. Positions near a cut see no further than the cut: on a photo of 1536×1536 that was 1 % (vgg) to 2 % (alex)
    # less than the whole picture's distance.
    """
    H, W = images_B3HW.shape[2:]
    distance_B = images_B3HW.new_zeros(len(images_B3HW), dtype=torch.float32)
    for ours, theirs in zip(_tiles(images_B3HW), _tiles(out_B3HW), strict=True):
        at_once = max(1, PIXELS // ours[0, 0].numel())
        parts = [perceptual(a, b) for a, b in zip(ours.split(at_once), theirs.split(at_once), strict=True)]
        distance_B += torch.cat(parts) * (ours[0, 0].numel() / (H * W))
    return distance_B


def _tiles(images_B3HW: Tensor) -> list[Tensor]:
    rows, columns = (-(-side // TILE) for side in images_B3HW.shape[2:])
    return [tile for band in images_B3HW.tensor_split(rows, dim=2) for tile in band.tensor_split(columns, dim=3)]


@torch.no_grad()
def side_by_side(tokenizer: PictureTokenizer, images_B3HW: Tensor, columns: int = 8) -> Image.Image:
    """Rows of originals with their reconstructions underneath; pictures that fill no whole row are left out."""
    columns = min(columns, len(images_B3HW))
    out, _ = round_trip(tokenizer, images_B3HW, torch.Generator().manual_seed(0))
    rows = []
    for start in range(0, len(images_B3HW) - columns + 1, columns):
        for source in (images_B3HW, out):
            rows.append(torch.cat(list(source[start : start + columns]), dim=2))
    levels = to_levels(torch.cat(rows, dim=1)).byte().permute(1, 2, 0).cpu()
    return Image.fromarray(levels.contiguous().numpy())
