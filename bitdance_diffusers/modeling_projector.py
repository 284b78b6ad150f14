"""The projector as a component. C bits per token, D hidden size."""

from diffusers import ModelMixin  # noqa: F401 (by this name, in this module, diffusers knows how to load its classes)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from bitdance.networks.projector import Projector
from bitdance_diffusers.component import Component

__all__ = ["BitDanceProjector"]


class BitDanceProjector(Component):
    """Bits (…,C) → hidden (…,D)."""

    _supports_group_offloading = True

    @register_to_config
    def __init__(self, in_dim: int, out_dim: int, hidden_act: str = "gelu_pytorch_tanh") -> None:
        super().__init__()
        if hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_act = {hidden_act!r}; a projector has gelu_pytorch_tanh")
        self.hold(Projector(in_dim, out_dim))

    @property
    def bits(self) -> int:
        """C."""
        return self.inner.bits

    @property
    def hidden(self) -> int:
        """D."""
        return self.inner.hidden

    def forward(self, bits_NC: Tensor) -> Tensor:
        return self.inner(bits_NC)
