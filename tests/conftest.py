"""What a test leaves behind in other people's libraries is put back."""

from collections.abc import Iterator

import pytest
import torch

LINEAR = torch.nn.functional.linear  # before any test or fixture runs


@pytest.fixture(autouse=True)
def linear_of_torch() -> Iterator[None]:
    """DeepSpeed puts a function of its own in the place of `F.linear` under ZeRO 3, for the whole process; quantised weights
    know torch's alone."""
    torch.nn.functional.linear = LINEAR
    yield
    torch.nn.functional.linear = LINEAR
