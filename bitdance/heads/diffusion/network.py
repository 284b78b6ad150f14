"""The binary diffusion head: hidden states of a block of P tokens → a prediction of its bits.

Letters: K rows (one row is one block), P tokens per block, C bits per token, D hidden size of the backbone, W head
width. Source: BitDance paper (arXiv 2602.14041), binary diffusion head; parameter names of the published
`vision_head.safetensors`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitdance.heads.attend import attend
from bitdance.heads.diffusion.flow import SCHEDULES, draw_time, interpolate, velocity_from_x
from bitdance.values import Range, shown
from lfq_tokenizer import limits
from lfq_tokenizer.text import listed

HEAD_DIM = 128
TIME_DIM = 256
NORM_EPS = 1e-6
Trunk = Callable[[Tensor, Tensor], Tensor]
_NOT_IN_JSON = ("head_dim", "squash")


@dataclass(frozen=True)
class HeadConfig:
    """The fields of the published `vision_head_config.json`, and two in which other published heads differ.

    `ch_target` bits per token, `ch_cond` hidden size of the backbone, `ch_latent` width, `depth_latent` blocks,
    `depth_adanln` modulations (shared by consecutive blocks), `parallel_num` tokens per block. `P_mean`, `P_std`,
    `time_schedule` and `time_shift` shape the training times; `time_shift` also bends the sampler's time grid.
    `diff_batch_mul` noise draws per block and training step.

    `head_dim` width of an attention head; 0: no attention, each token of a block is denoised by itself. `squash` whether
    predicted bits pass 2·sigmoid − 1. The JSON file knows neither; both have the published value there.

    `guidance_max`: the head takes the guidance scale as one more input, from 1 to this; 0, as published: it does not, and neither
    the JSON file nor the weights know of it.
    """

    ch_target: int
    ch_cond: int
    ch_latent: int
    depth_latent: int
    depth_adanln: int
    parallel_num: int
    use_swiglu: bool = True
    time_shift: float = 1.0
    time_schedule: str = "logit_normal"
    P_mean: float = 0.0
    P_std: float = 1.0
    diff_batch_mul: int = 1
    grad_checkpointing: bool = False
    head_dim: int = HEAD_DIM
    squash: bool = True
    guidance_max: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "ch_target",
            "ch_cond",
            "ch_latent",
            "depth_latent",
            "depth_adanln",
            "parallel_num",
            "diff_batch_mul",
        ):
            most = limits.LAYERS if name.startswith("depth") else limits.WIDTH
            object.__setattr__(self, name, Range(1, most).check(name, getattr(self, name)))
        for name in ("time_shift", "P_mean", "P_std"):
            allowed = Range(-1000 if name == "P_mean" else 0, 1000, whole=False, open_low=name != "P_mean")
            object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
        if self.guidance_max != 0:
            allowed = Range(1, 1000, whole=False, open_low=True)
            object.__setattr__(self, "guidance_max", allowed.check("guidance_max", self.guidance_max))
        object.__setattr__(self, "head_dim", Range(0, limits.WIDTH).check("head_dim", self.head_dim))
        for name in ("use_swiglu", "grad_checkpointing", "squash"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} = {shown(getattr(self, name))}; true or false is allowed")
        if self.head_dim and self.ch_latent % self.head_dim:
            raise ValueError(
                f"ch_latent = {self.ch_latent}; the width must be a multiple of {self.head_dim} (one attention head)"
            )
        if self.depth_latent % self.depth_adanln:
            raise ValueError(
                f"depth_latent = {self.depth_latent} is no multiple of depth_adanln = {self.depth_adanln}; "
                "each modulation serves the same number of blocks"
            )
        if not isinstance(self.time_schedule, str) or self.time_schedule not in SCHEDULES:
            raise ValueError(f"time_schedule = {shown(self.time_schedule)}; allowed are {', '.join(SCHEDULES)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HeadConfig":
        """Read the config from the JSON object of `vision_head_config.json`; an unknown or missing key is an error."""
        if not isinstance(data, Mapping):
            raise ValueError(f"the head config is a {type(data).__name__}; expected an object")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in _NOT_IN_JSON}
        if unknown := sorted(set(data) - set(fields)):
            names = listed([shown(name) for name in unknown], ", ")
            raise ValueError(f"unknown keys {names} in the head config; known are {sorted(fields)}")
        required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(data)):
            raise ValueError(f"the head config lacks {missing}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `vision_head_config.json`."""
        absent = _NOT_IN_JSON if self.guidance_max else (*_NOT_IN_JSON, "guidance_max")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in absent}


class TimeEmbedding(nn.Module):
    """t (K,) → (K, W): cos ‖ sin of 1000·t at 128 frequencies, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def frequencies(t_K: Tensor) -> Tensor:
        """(K, 256) float32 (float64 for float64 times): cos first, then sin, frequencies 10000^(-i/128)."""
        half = TIME_DIM // 2
        t_K = t_K if t_K.dtype == torch.float64 else t_K.float()
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=t_K.dtype, device=t_K.device) / half)
        angle = 1000 * t_K[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t_K: Tensor) -> Tensor:
        return self.mlp(self.frequencies(t_K).to(next(self.mlp.parameters()).dtype))


class GuidanceEmbedding(nn.Module):
    """A guidance scale g (K,) → (K, W): a smooth function of g from 1 to `top`, as the first terms of its cosine series; 0 at the
    start. # OURS: one tensor beside the published ones."""

    TERMS = 16

    def __init__(self, width: int, top: float) -> None:
        super().__init__()
        self.top = top
        self.weight = nn.Parameter(torch.zeros(width, self.TERMS))

    def forward(self, guidance_K: Tensor) -> Tensor:
        place_K = (guidance_K.float() - 1) / (self.top - 1)
        cosine_KT = torch.cos(math.pi * place_K[:, None] * torch.arange(self.TERMS, device=guidance_K.device))
        return F.linear(cosine_KT.to(self.weight.dtype), self.weight)


class Attention(nn.Module):
    """Full attention over the P tokens of each row."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)

    def forward(self, x_KPW: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.wqkv(x_KPW).chunk(3, dim=-1))
        return self.wo(attend(q, k, v))


class Block(nn.Module):
    """Modulated attention, then a modulated SwiGLU (or a plain SiLU MLP, as some published heads have)."""

    MODULATIONS = 6

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, use_swiglu = config.ch_latent, config.use_swiglu
        inner = int(1.5 * width)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, config.head_dim)
        self.use_swiglu = use_swiglu
        if use_swiglu:
            self.w1 = nn.Linear(width, 2 * inner)
            self.w2 = nn.Linear(inner, width)
        else:
            self.mlp = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))

    def forward(self, x_KPW: Tensor, modulation: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        x_KPW = x_KPW + gate1 * self.attn(self.norm1(x_KPW) * (1 + scale1) + shift1)
        return x_KPW + gate2 * self._feed_forward(self.norm2(x_KPW) * (1 + scale2) + shift2)

    def _feed_forward(self, x_KPW: Tensor) -> Tensor:
        if not self.use_swiglu:
            return self.mlp(x_KPW)
        gate, value = self.w1(x_KPW).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


class LoneBlock(nn.Module):
    """A modulated SwiGLU: no token sees another."""

    MODULATIONS = 3

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, inner = config.ch_latent, int(1.5 * config.ch_latent)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.w1 = nn.Linear(width, 2 * inner)
        self.w2 = nn.Linear(inner, width)

    def forward(self, x_KPW: Tensor, modulation: Tensor) -> Tensor:
        scale, shift, gate = modulation.chunk(3, dim=-1)
        inner_gate, value = self.w1(self.norm(x_KPW) * (1 + scale) + shift).chunk(2, dim=-1)
        return x_KPW + gate * self.w2(F.silu(inner_gate) * value)


class FinalLayer(nn.Module):
    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.ada_ln_modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, bits)

    def forward(self, x_KPW: Tensor, y_KPW: Tensor) -> Tensor:
        scale, shift = self.ada_ln_modulation(y_KPW).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x_KPW, x_KPW.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift)


class HeadNet(nn.Module):
    """The network itself, without loss; `net.` of the published names."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, kind = config.ch_latent, Block if config.head_dim else LoneBlock
        self.squash = config.squash
        self.blocks_per_modulation = config.depth_latent // config.depth_adanln
        self.grad_checkpointing = config.grad_checkpointing
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(config.ch_cond, width)
        if config.guidance_max:
            self.guidance_embed = GuidanceEmbedding(width, config.guidance_max)
        self.input_proj = nn.Linear(config.ch_target, width)
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(width, kind.MODULATIONS * width) for _ in range(config.depth_adanln))
        self.res_blocks = nn.ModuleList(kind(config) for _ in range(config.depth_latent))
        self.final_layer = FinalLayer(width, config.ch_target)

    def forward(self, x_KPC: Tensor, time_KW: Tensor, embedded_KPW: Tensor, trunk: Trunk | None = None) -> Tensor:
        """Noisy bits, embedded times and embedded condition → predicted bits. One time may serve all rows; conditions may
        have a multiple of x's rows. `trunk` is a compiled rendition of `self.trunk`."""
        x = self.input_proj(x_KPC.to(embedded_KPW.dtype))
        if x.shape[0] != embedded_KPW.shape[0]:  # guidance: both branches share x
            x = x.repeat(embedded_KPW.shape[0] // x.shape[0], 1, 1)
        return (trunk or self.trunk)(x, F.silu(time_KW[:, None] + embedded_KPW))

    def trunk(self, x: Tensor, y: Tensor) -> Tensor:
        """Blocks and output: x and their modulation's input y (K,P,W) → predicted bits (K,P,C), float32."""
        for i, block in enumerate(self.res_blocks):
            if i % self.blocks_per_modulation == 0:
                modulation = self.ada_ln_blocks[i // self.blocks_per_modulation](y)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, use_reentrant=False)
            else:
                x = block(x, modulation)
        # OURS: with half-precision weights the squash is still computed in float32; in float32 nothing changes.
        out = self.final_layer(x, y)
        out = out if out.dtype == torch.float64 else out.float()
        return 2 * torch.sigmoid(out) - 1 if self.squash else out


def draw_noise(
    config: HeadConfig, K: int, generator: torch.Generator | None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """What the loss of K blocks needs: times (rows,), then noise (rows, P, C); rows = K · diff_batch_mul.

    Drawn on the generator's device, or without one on `device`.
    """
    c, rows = config, K * config.diff_batch_mul
    t_K = draw_time(rows, c.time_schedule, c.P_mean, c.P_std, c.time_shift, generator)
    device = generator.device if generator is not None else device
    return t_K, torch.randn(rows, c.parallel_num, c.ch_target, generator=generator, device=device)


class BinaryDiffusionHead(nn.Module):
    """x-prediction diffusion over the bits of a block, conditioned per token on the backbone's hidden states."""

    def __init__(self, config: HeadConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.net = HeadNet(config)
        self.initialise(generator)

    def forward(self, x_KPC: Tensor, t_K: Tensor, cond_KPD: Tensor) -> Tensor:
        """Noisy bits (K,P,C) at times t (K,) or (1,), condition (K,P,D) → predicted bits (K,P,C) in (-1, 1),
        float32."""
        return self.net(x_KPC, self.net.time_embed(t_K), self.prepare(cond_KPD))

    def prepare(self, cond_KPD: Tensor) -> Tensor:
        """The embedded condition (K,P,W). It does not depend on the time: one call serves all steps of a sampler."""
        return self.net.cond_embed(cond_KPD.to(self.net.cond_embed.weight.dtype))

    def embed_guidance(self, guidance_K: Tensor) -> Tensor:
        """The scale (K,) or (1,), of a head that takes it, as what is added to the embedded condition: (K,1,W)."""
        return self.net.guidance_embed(guidance_K)[:, None]

    def take_guidance(self, top: float) -> None:
        """Let the head take the guidance scale, from 1 to `top`, as one more input, which changes nothing until it is trained."""
        weight = self.net.cond_embed.weight
        self.config = dataclasses.replace(self.config, guidance_max=top)
        self.net.guidance_embed = GuidanceEmbedding(len(weight), top).to(weight)

    def embed_time(self, t: float) -> Tensor:
        """One time for all rows (1,W). It depends on nothing else: one call serves all blocks of all pictures."""
        return self.net.time_embed(torch.full((1,), t, device=self.net.cond_embed.weight.device))

    def denoise(self, x_KPC: Tensor, time_1W: Tensor, embedded_KPW: Tensor, trunk: Trunk | None = None) -> Tensor:
        """One sampler step's prediction at one common time. `embedded` may have a multiple of x's rows (guidance)."""
        return self.net(x_KPC, time_1W, embedded_KPW, trunk)

    def loss(self, x_KPC: Tensor, cond_KPD: Tensor, generator: torch.Generator | None) -> Tensor:
        """Velocity loss (rows, P), unreduced, mean over the C bits; rows = K · diff_batch_mul, all K once per repeat.

        Draws one time per row, then noise (rows, P, C), from `generator`.
        """
        t_K, noise_KPC = draw_noise(self.config, x_KPC.shape[0], generator, x_KPC.device)
        return self.loss_at(x_KPC, cond_KPD, t_K.to(x_KPC.device), noise_KPC.to(x_KPC.device))

    def loss_at(self, x_KPC: Tensor, cond_KPD: Tensor, t_K: Tensor, noise_KPC: Tensor) -> Tensor:
        """Mean over bits of (v - v_hat)² (K,P) for given times (K,) and noise (K,P,C), in the noise's dtype.

        `x_KPC` and `cond_KPD` may have fewer rows, of which K is a multiple: they are then repeated as a whole.
        """
        return self.predict_at(x_KPC, cond_KPD, t_K, noise_KPC)[0]

    def predict_at(self, x_KPC: Tensor, cond_KPD: Tensor, t_K: Tensor, noise_KPC: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of `loss_at` (K,P) and the predicted bits (K,P,C) in (-1, 1) from which it follows."""
        repeats = noise_KPC.shape[0] // x_KPC.shape[0]
        x_KPC, t_K11 = x_KPC.to(noise_KPC.dtype).repeat(repeats, 1, 1), t_K[:, None, None]
        x_t = interpolate(x_KPC, noise_KPC, t_K11)
        embedded_KPW = self.prepare(cond_KPD).repeat(noise_KPC.shape[0] // cond_KPD.shape[0], 1, 1)
        x_hat = self.net(x_t, self.net.time_embed(t_K), embedded_KPW)
        error = velocity_from_x(x_KPC, x_t, t_K11) - velocity_from_x(x_hat, x_t, t_K11)
        return error.square().mean(dim=-1), x_hat

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: Xavier-uniform matrices, zero biases, a small time MLP, zero adaLN and output projections.

        `generator` must live on the weights' device; without one torch's default generator is used.
        """
        net = self.net
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
                if module in net.time_embed.mlp:
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
        for layer in (*net.ada_ln_blocks, net.final_layer.ada_ln_modulation, net.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
