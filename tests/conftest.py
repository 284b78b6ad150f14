"""What a test leaves behind in other people's libraries is put back."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def linear_of_torch() -> Iterator[None]:
    """DeepSpeed puts a function of its own in the place of `F.linear` under ZeRO 3, for the whole process; quantised weights
    know torch's alone."""
    plain = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = plain
