"""Bits → hidden: what turns an image token into an input of the backbone. C bits per token, D hidden size."""

from torch import Tensor, nn
from torch.nn.functional import gelu


class Projector(nn.Module):
    """`Linear(C, D) → GELU(tanh) → Linear(D, D)`, with the parameter names of the published `projector.safetensors`."""

    def __init__(self, bits: int, hidden: int) -> None:
        super().__init__()
        if bits < 1 or hidden < 1:
            raise ValueError(f"a projector needs at least 1 bit and 1 hidden channel, got bits={bits}, hidden={hidden}")
        self.fc1 = nn.Linear(bits, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    @property
    def bits(self) -> int:
        """C."""
        return self.fc1.in_features

    @property
    def hidden(self) -> int:
        """D."""
        return self.fc2.out_features

    def forward(self, bits_NC: Tensor) -> Tensor:
        """±1 bits (…,C) → (…,D), in the dtype of the weights."""
        return self.fc2(gelu(self.fc1(bits_NC.to(self.fc1.weight.dtype)), approximate="tanh"))
