"""What a test leaves behind in other people's libraries is put back; what needs a GPU is skipped where there is none."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

LINEAR = torch.nn.functional.linear  # before any test or fixture runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files of few and slow tests first: the last file of a process is then a short one
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, tests[item.path], item.path))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def linear_of_torch() -> Iterator[None]:
    """DeepSpeed puts a function of its own in the place of `F.linear` under ZeRO 3, for the whole process; quantised weights
    know torch's alone."""
    torch.nn.functional.linear = LINEAR
    yield
    torch.nn.functional.linear = LINEAR


def environment() -> Iterator[None]:
    """The engine describes its one process in the environment, as a launcher would; others must not see it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update((name, value) for name, value in before.items() if os.environ.get(name) != value)


environment_of_a_test = pytest.fixture(environment, autouse=True)
environment_of_a_module = pytest.fixture(environment, autouse=True, scope="module")
