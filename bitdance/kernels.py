"""Fused kernels for the language model: used where they are installed and can run, never required.

Liger (package `liger-kernel`, written for 0.8) computes an RMSNorm, and the product inside a SwiGLU, in one Triton kernel each,
with the numbers of transformers' modules up to rounding. Its rotary kernel is left out: transformers calls rotation through a
global function of the family's file, so taking it would change every other model of the process, also one on the CPU.

The package flash-attn has no place here. Its kernels know causal and sliding masks, not the block-causal one, so training goes
through flex_attention. What is left without a mask, decoding and the head's attention over the P tokens of a block, runs on SDPA,
whose flash backend is the same algorithm inside torch.
"""

from typing import Any

import torch
from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # their norms and SwiGLU are one code in transformers


def use_fused_kernels(lm: nn.Module, device: torch.device | str | None = None) -> list[str]:
    """Replace modules of this instance by Liger's, and return the kernels now in use: "RMSNorm", "SwiGLU", or none.

    Nothing happens without Liger, off CUDA, or for a family whose modules differ. `device` is where `lm` will run, by default
    where its weights are; afterwards it runs there only. Weights, their names and files stay as they are.
    """
    target = next(lm.parameters()).device if device is None else torch.device(device)
    if target.type != "cuda" or not torch.cuda.is_available() or lm.config.model_type not in FAMILIES:
        return []
    try:
        from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    except ImportError:
        return []
    return _replace(lm, LigerRMSNorm, LigerSwiGLUMLP)


def _replace(lm: nn.Module, rms_norm: Any, swiglu: Any) -> list[str]:
    used = set()
    for parent in list(lm.modules()):
        for name, old in parent.named_children():
            kind = type(old).__name__
            with torch.device("meta"):  # the weights are the old module's
                if kind.endswith("RMSNorm"):
                    # in_place would write over a gradient that the residual still needs
                    new = rms_norm(old.weight.shape[0], eps=old.variance_epsilon, in_place=False)
                    new.weight = old.weight
                    used.add("RMSNorm")
                elif kind.endswith("MLP") and _plain_swiglu(old):
                    new = swiglu(old.config)
                    for linear in ("gate_proj", "up_proj", "down_proj"):
                        setattr(new, linear, getattr(old, linear))
                    used.add("SwiGLU")
                else:
                    continue
            setattr(parent, name, new.train(old.training))
    return sorted(used)


def _plain_swiglu(mlp: nn.Module) -> bool:
    return hasattr(mlp, "gate_proj") and mlp.config.hidden_act in ("silu", "swish")
