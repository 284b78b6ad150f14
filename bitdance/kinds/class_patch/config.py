"""The shape of a class-conditional model, in the names of the published code, and the published sizes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from bitdance.folder.json_config import config_from
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.heads.discrete import KINDS
from bitdance.sequence.patches import PatchPlan, patch_side
from bitdance.values import Range, shown
from lfq_tokenizer import limits

MODES = ("patch", "standard")
HEADS = ("diffusion", *KINDS)
ATTENTIONS = ("block", "causal")
HEAD_WIDTH = 64  # of an attention head, in the network of published models and in all their diffusion heads
_WIDTHS = ("dim", "n_head", "diff_dim", "latent_dim", "cls_token_num", "num_classes", "parallel_num", "diff_batch_mul", "grid")
_DEPTHS = ("n_layer", "diff_layers", "diff_adanln_layers")


@dataclass(frozen=True)
class ClassPatchConfig:
    """A transformer of `n_layer` layers of width `dim` with `n_head` attention heads, and a diffusion head of `diff_layers`
    blocks of width `diff_dim`, whose modulations `diff_adanln_layers` are shared by consecutive blocks.

    `latent_dim` bits per token, `grid` tokens along a side of the (square) picture, `num_classes` classes, each of which
    is `cls_token_num` tokens. `parallel_num` tokens P are predicted per block: with `parallel_mode` "patch" a square patch,
    with "standard" P consecutive tokens of the raster order.
    `head_kind` "bits" or "values": a logit for each bit or value instead of diffusion (`heads/discrete.py`), for comparison;
    `attention` "causal": a token of a block does not see the later ones, for comparison too. `numbers`: a token is `latent_dim`
    numbers instead of bits, which are sampled as they are, without taking their signs. `guidance_max` as in `HeadConfig`.
    Training: `class_dropout_prob` share of pictures that get the null class, `perturb_rate` largest flip probability of
    a bit, `diff_batch_mul` noise draws per block; `P_mean`, `P_std`, `time_schedule`, `time_shift` as in `HeadConfig`.
    Source: BitDance paper (arXiv 2602.14041), ImageNet models; published class-conditional code for names and values.
    """

    dim: int
    n_layer: int
    n_head: int
    diff_dim: int
    diff_layers: int
    diff_adanln_layers: int
    latent_dim: int = 32
    num_classes: int = 1000
    cls_token_num: int = 64
    grid: int = 16
    parallel_num: int = 1
    parallel_mode: str = "patch"
    diff_batch_mul: int = 4
    class_dropout_prob: float = 0.1
    perturb_rate: float = 0.1
    P_mean: float = -0.8
    P_std: float = 0.8
    time_schedule: str = "logit_normal"
    time_shift: float = 1.0
    head_kind: str = "diffusion"
    attention: str = "block"
    numbers: bool = False
    guidance_max: float = 0.0

    def __post_init__(self) -> None:
        for names, allowed in (
            (_WIDTHS, Range(1, limits.WIDTH)),
            (_DEPTHS, Range(1, limits.LAYERS)),
            (("class_dropout_prob", "perturb_rate"), Range(0, 1, whole=False)),
        ):
            for name in names:
                object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
        if self.dim % self.n_head or self.dim // self.n_head % 4:
            raise ValueError(
                f"dim = {self.dim} in n_head = {self.n_head} heads; a head's width must be a whole multiple of 4 "
                "(pairs of channels that turn by column and by row)"
            )
        if not isinstance(self.parallel_mode, str) or self.parallel_mode not in MODES:
            raise ValueError(f"parallel_mode = {shown(self.parallel_mode)}; allowed are {', '.join(MODES)}")
        if not isinstance(self.attention, str) or self.attention not in ATTENTIONS:
            raise ValueError(f"attention = {shown(self.attention)}; allowed are {', '.join(ATTENTIONS)}")
        if not isinstance(self.head_kind, str) or self.head_kind not in HEADS:
            raise ValueError(f"head_kind = {shown(self.head_kind)}; allowed are {', '.join(HEADS)}")
        if self.head_kind != "diffusion" and self.diff_batch_mul != 1:
            raise ValueError(
                f"diff_batch_mul = {self.diff_batch_mul} with head_kind = {self.head_kind!r}, which draws no noise; set it to 1"
            )
        if not isinstance(self.numbers, bool):
            raise ValueError(f"numbers = {shown(self.numbers)}; true or false is allowed")
        if self.numbers and self.head_kind != "diffusion":
            raise ValueError(f"head_kind = {self.head_kind!r} for tokens of numbers; only diffusion makes numbers")
        if self.num_tokens % self.parallel_num:
            tokens = f"grid = {self.grid}: {self.num_tokens} tokens"
            raise ValueError(f"{tokens} are no multiple of parallel_num = {self.parallel_num}")
        _ = self.plan, self.head  # which check the rest

    @property
    def num_tokens(self) -> int:
        """N, tokens of a picture."""
        return self.grid**2

    @property
    def bits(self) -> int:
        """C, bits per token."""
        return self.latent_dim

    @property
    def token(self) -> str:
        """What a token is."""
        return f"{self.latent_dim} numbers" if self.numbers else f"{self.latent_dim} bits"

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The one (height, width) in tokens that it makes."""
        return ((self.grid, self.grid),)

    @property
    def class_count(self) -> int:
        """How many classes there are, without the one that stands for none."""
        return self.num_classes

    text_width = None  # it reads no text

    @property
    def known(self) -> tuple[str, int] | None:
        """Name and parameters of the published model that this is, None for another shape or other classes."""
        name = published_name(self)
        return (f"BitDance-{name}", COUNTS[name]) if name and self.num_classes == PUBLISHED_CLASSES else None

    @property
    def decides(self) -> dict[str, Any]:
        """What decides pictures and does not show in the shapes of the weights."""
        # of published models, which do not say them
        plain = {"head_kind": "diffusion", "attention": "block", "numbers": False, "guidance_max": 0.0}
        own = [name for name, value in plain.items() if getattr(self, name) != value]
        return {name: getattr(self, name) for name in ("n_head", "parallel_num", "parallel_mode", "time_shift", *own)}

    @property
    def num_blocks(self) -> int:
        """M, steps per picture."""
        return self.num_tokens // self.parallel_num

    @property
    def plan(self) -> PatchPlan:
        """The order in which tokens are predicted; consecutive `parallel_num` of them are a block."""
        return PatchPlan(self.grid, self.grid, patch_side(self.parallel_num) if self.parallel_mode == "patch" else 1)

    @property
    def head(self) -> HeadConfig:
        """The diffusion head: attention among the tokens of a block where it has several; what it predicts is not squashed."""
        return HeadConfig(
            self.latent_dim,
            self.dim,
            self.diff_dim,
            self.diff_layers,
            self.diff_adanln_layers,
            self.parallel_num,
            time_shift=self.time_shift,
            time_schedule=self.time_schedule,
            P_mean=self.P_mean,
            P_std=self.P_std,
            diff_batch_mul=self.diff_batch_mul,
            head_dim=HEAD_WIDTH if self.parallel_num > 1 else 0,
            squash=False,
            guidance_max=self.guidance_max,
        )

    @classmethod
    def from_dict(cls, data: Any) -> "ClassPatchConfig":
        """From a JSON object; an unknown or missing key is an error."""
        return config_from(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads."""
        return dataclasses.asdict(self)


_B = ClassPatchConfig(768, 24, 12, 768, 6, 2)
# The published models, each with the guidance that its published figures were made with.
PUBLISHED: dict[str, tuple[ClassPatchConfig, float]] = {
    "B-1x": (_B, 3.2),
    "B-4x": (dataclasses.replace(_B, parallel_num=4), 3.9),
    "B-16x": (dataclasses.replace(_B, parallel_num=16), 6.1),
    "L-1x": (ClassPatchConfig(1024, 32, 16, 1024, 8, 2, perturb_rate=0.05), 4.0),
    "H-1x": (ClassPatchConfig(1280, 40, 20, 1280, 12, 3, perturb_rate=0.05), 4.55),
}
PUBLISHED_CLASSES = 1000
# network and head, told from the published shapes; the README of the published code rounds them to 242M, 260M, 527M and 1.0B
COUNTS = {"B-1x": 242_373_152, "B-4x": 260_102_432, "B-16x": 260_111_648, "L-1x": 527_271_968, "H-1x": 1_007_960_352}
_SHAPE = ("dim", "n_layer", "n_head", "diff_dim", "diff_layers", "diff_adanln_layers", "latent_dim", "grid", "parallel_num")


def published_name(config: ClassPatchConfig) -> str | None:
    """The published model of this shape, None where there is none. The classes may be others."""
    shape = [getattr(config, name) for name in _SHAPE]
    return next((name for name, (known, _) in PUBLISHED.items() if [getattr(known, key) for key in _SHAPE] == shape), None)
