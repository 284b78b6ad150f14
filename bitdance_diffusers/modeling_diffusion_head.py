"""The binary diffusion head as a component. R rows, B pictures, P tokens per block, C bits, D hidden size, S draws."""

import torch
from diffusers import ModelMixin  # noqa: F401 (by this name, in this module, diffusers knows how to load its classes)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.heads.diffusion.settings import Sampling
from bitdance_diffusers.component import Component

__all__ = ["BitDanceDiffusionHead"]


class _Head(BinaryDiffusionHead):
    """Embeds times where the condition is: its own weights may be elsewhere, brought layer by layer."""

    place = torch.device("cpu")

    def embed_time(self, t: float) -> Tensor:
        return self.net.time_embed(torch.full((1,), t, device=self.place))


class BitDanceDiffusionHead(Component):
    """Hidden states of a block → its bits. Its config is that of the published `vision_head_config.json`."""

    _supports_group_offloading = True

    @register_to_config
    def __init__(
        self,
        ch_target: int,
        ch_cond: int,
        ch_latent: int,
        depth_latent: int,
        depth_adanln: int,
        parallel_num: int,
        use_swiglu: bool = True,
        time_shift: float = 1.0,
        time_schedule: str = "logit_normal",
        P_mean: float = 0.0,
        P_std: float = 1.0,
        diff_batch_mul: int = 1,
        grad_checkpointing: bool = False,
        guidance_max: float = 0.0,
    ) -> None:
        super().__init__()
        head = _Head(HeadConfig.from_dict({k: v for k, v in self.config.items() if not k.startswith("_")}))
        self.hold(head)
        # without compiled graphs, which hold addresses of weights that offloading moves
        self._sample = BlockSampler(head, compile=False)

    def forward(self, cond_RPD: Tensor, noise_SBPC: Tensor, sampling: Sampling, steps: int) -> Tensor:
        """All solver steps of one block → predicted bits (B,P,C), float32; see `bitdance.heads.diffusion.block_sampler`."""
        self.inner.place = cond_RPD.device
        return self._sample(cond_RPD, noise_SBPC, sampling, steps)
