"""The network of a class-conditional model and its training loss. The plan, the mask and the head are those of all BitDance.

B rows, N picture tokens, P tokens per block, M blocks, C bits per token, D hidden size, L sequence. The sequence is the class's
tokens, P - 1 learned queries and the picture; the last class token and the queries form block 0, which predicts the first
block. Source: BitDance paper (arXiv 2602.14041), ImageNet models; the published code, which names the parameters.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.heads.discrete import DiscreteHead
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.network import NORM_EPS, Layer, SwiGLU, initialise
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.kinds.class_patch.rotary import turns
from bitdance.networks.memory import Memory
from bitdance.sequence.mask import dense_mask


class ClassPatchModel(nn.Module):
    """Classes and the bits so far → the condition of the next block; `head` makes bits of it."""

    def __init__(self, config: ClassPatchConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.cls_embedding = nn.Embedding(c.num_classes + 1, c.dim * c.cls_token_num)
        if c.parallel_num > 1:
            self.query_token = nn.Parameter(torch.empty(1, c.parallel_num - 1, c.dim))
        self.proj_in = SwiGLU(c.latent_dim, int(1.5 * c.dim), c.dim, bias=True)
        self.emb_norm = nn.RMSNorm(c.dim, eps=NORM_EPS)
        self.layers = nn.ModuleList(Layer(c.dim, c.n_head) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.dim, eps=NORM_EPS)
        self.pos_for_diff = nn.Embedding(c.num_tokens, c.dim)
        self.head: BinaryDiffusionHead | DiscreteHead
        diffusion = c.head_kind == "diffusion"
        self.head = BinaryDiffusionHead(c.head) if diffusion else DiscreteHead(c.head_kind, c.latent_dim, c.dim)
        self.checkpoint_layers = False  # in training, keep a layer's input alone and compute the rest again in the backward pass
        self._turns_LG2: Tensor | None = None
        self.initialise(generator)

    @property
    def null_class(self) -> int:
        """The class that stands for none: one beyond the others."""
        return self.config.num_classes

    @property
    def prefix_length(self) -> int:
        """Positions before the picture: class tokens and queries."""
        return self.config.cls_token_num + self.config.parallel_num - 1

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights, as the published code starts training."""
        initialise(self, generator)
        if self.config.parallel_num > 1:
            self.query_token.normal_(std=0.02, generator=generator)
        self.head.initialise(generator)

    def checkpoint_head(self, wanted: bool) -> None:
        """In training, whether the diffusion head computes its blocks again in the backward pass instead of keeping them."""
        if isinstance(self.head, BinaryDiffusionHead):
            self.head.net.grad_checkpointing = wanted

    def new_memory(self) -> list[Memory]:
        """Room for the keys and values of one batch of pictures; the last block is predicted and never read."""
        return [Memory(self.prefix_length + self.config.num_tokens - self.config.parallel_num) for _ in self.layers]

    def prefix(self, class_B: Tensor, memory: list[Memory] | None = None) -> Tensor:
        """Class numbers (B,), the null class among them, → hidden states (B,P,D) that predict block 0 of the picture."""
        return self._run(self._prefix(class_B), 0, memory)[:, -self.config.parallel_num :]

    def extend(self, bits_BPC: Tensor, m: int, memory: list[Memory]) -> Tensor:
        """Bits (B,P,C) of block m → hidden states (B,P,D) that predict block m + 1. `memory` holds what came before."""
        x_BPD = self.proj_in(bits_BPC.to(self.proj_in.w1.weight.dtype))
        return self._run(x_BPD, self.prefix_length + m * self.config.parallel_num, memory)

    def conditions(self, bits_BNC: Tensor, class_B: Tensor) -> Tensor:
        """What the head gets for every token of given pictures (B,N,D), all blocks at once. Bits in the plan's order, of which
        the last block is not read; `bits_BNC` may lack it."""
        N, P = self.config.num_tokens, self.config.parallel_num
        inputs = self.proj_in(bits_BNC[:, : N - P].to(self.proj_in.w1.weight.dtype))
        hidden = self._run(torch.cat([self._prefix(class_B), inputs], dim=1), 0, None)[:, -N:]
        return hidden + self.pos_for_diff.weight

    def place(self, m: int) -> Tensor:
        """(P,D): what is added to the hidden states that predict block m."""
        P = self.config.parallel_num
        return self.pos_for_diff.weight[m * P : (m + 1) * P]

    def losses(self, bits_BChw: Tensor, class_B: Tensor, noise: ClassNoise) -> dict[str, Tensor]:
        """The training loss by the names of its terms; the sum of their means is what is trained.

        "bits": mean over bits of (v - v_hat)², (K,P), K = B·M·diff_batch_mul rows; of other heads the cross-entropy. Bits
        (B,C,h,w) in {-1,+1}; only what the model reads is flipped, the target is clean.
        """
        bits_BNC = self.config.plan.order(bits_BChw)
        seen_BNC = bits_BNC if noise.flipped_BNC is None else torch.where(noise.flipped_BNC, -bits_BNC, bits_BNC)
        if noise.dropped_B is not None:
            class_B = class_B.masked_fill(noise.dropped_B, self.null_class)
        cond_KPD = self.conditions(seen_BNC, class_B).reshape(-1, self.config.parallel_num, self.config.dim)
        target_KPC = bits_BNC.reshape(-1, self.config.parallel_num, self.config.latent_dim)
        if isinstance(self.head, DiscreteHead):
            return {"bits": self.head.loss_at(target_KPC, cond_KPD)}
        return {"bits": self.head.loss_at(target_KPC, cond_KPD, noise.time_K, noise.noise_KPC)}

    def block_mask(self, L: int) -> Tensor:
        """Bool (1,1,L,L): all class tokens but the last are causal, then every position sees its own block too, where attention
        is not causal everywhere."""
        causal, place_L = self.config.cls_token_num - 1, torch.arange(L, device=self.pos_for_diff.weight.device)
        if self.config.attention == "causal":
            return dense_mask(torch.zeros_like(place_L)[None], torch.full_like(place_L, -1)[None])
        block_L = torch.where(place_L < causal, -1, (place_L - causal).div(self.config.parallel_num, rounding_mode="floor"))
        return dense_mask(torch.zeros_like(place_L)[None], block_L[None])

    def _prefix(self, class_B: Tensor) -> Tensor:
        x_BLD = self.cls_embedding(class_B).unflatten(-1, (self.config.cls_token_num, -1))
        if self.config.parallel_num == 1:
            return x_BLD
        return torch.cat([x_BLD, self.query_token.expand(len(x_BLD), -1, -1)], dim=1)

    def _run(self, x_BLD: Tensor, start: int, memory: list[Memory] | None) -> Tensor:
        """Embeddings of the positions from `start` on → hidden states, normed. A block sees all that is in the memory."""
        L = x_BLD.shape[1]
        turns_LG2 = self._turns(x_BLD.device)[start : start + L]
        mask = self.block_mask(L) if start == 0 else None
        if start and self.config.attention == "causal":
            mask = torch.ones(L, start + L, dtype=torch.bool, device=x_BLD.device).tril(start)
        x_BLD = self.emb_norm(x_BLD)
        for i, layer in enumerate(self.layers):
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BLD = checkpoint(layer, x_BLD, turns_LG2, mask, use_reentrant=False)
            else:
                x_BLD = layer(x_BLD, turns_LG2, mask, None if memory is None else memory[i])
        return self.norm(x_BLD)

    def _turns(self, device: torch.device) -> Tensor:
        if self._turns_LG2 is None or self._turns_LG2.device != device:
            with torch.inference_mode(False):  # must also serve a later training step
                places = self.config.plan.coordinates()
                self._turns_LG2 = turns(*places, self.prefix_length, self.config.dim // self.config.n_head).to(device)
        return self._turns_LG2
