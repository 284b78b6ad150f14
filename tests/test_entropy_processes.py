"""Two processes that hold half of the latents each compute the entropy, and the averaged gradient, of the union."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lfq_tokenizer.entropy import group_entropy
from lfq_tokenizer.weights import read_safetensors, write_safetensors
from stages.engine.processes import all_gather, from_first, mean_over_processes, most_over_processes

pytestmark = pytest.mark.slow

CASES = [(groups, pool) for groups in (1, 2, 8) for pool in (True, False)]


def latents() -> Tensor:
    """Two halves whose statistics differ, so that averaging the halves' own entropies would be wrong."""
    z = 0.004 * torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    z[:2] += 0.004
    return z


def figures(z_BChw: Tensor, groups: int, pool: bool) -> dict[str, Tensor]:
    """Both values, and the gradient of a loss of both to a weight that all processes share."""
    weight = torch.linspace(0.5, 1.5, 8).requires_grad_()
    per_sample, of_mean = group_entropy(z_BChw * weight[:, None, None], groups, pool_groups=pool)
    (gradient,) = torch.autograd.grad(per_sample - 0.7 * of_mean, weight)
    return {"per_sample": per_sample.detach(), "of_mean": of_mean.detach(), "gradient": gradient}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {}
    for groups, pool in CASES:
        part = figures(latents()[2 * rank : 2 * rank + 2], groups, pool)
        dist.all_reduce(part["gradient"])  # what data-parallel training does
        part["gradient"] /= 2
        found |= {f"{groups}/{pool}/{name}": value for name, value in part.items()}
    counted = torch.tensor([float(rank), 3.0], requires_grad=True)
    found["mean"] = mean_over_processes(counted)
    found["most"] = most_over_processes(counted)
    write_safetensors(found, Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [read_safetensors(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize(("groups", "pool"), CASES)
def test_two_processes_equal_one_on_the_union(by_rank, groups, pool):
    expected = figures(latents(), groups, pool)
    for found in by_rank:
        for name in ("per_sample", "of_mean"):
            torch.testing.assert_close(found[f"{groups}/{pool}/{name}"], expected[name], rtol=1e-6, atol=1e-6)
        scale = float(expected["gradient"].abs().max())
        torch.testing.assert_close(found[f"{groups}/{pool}/gradient"] / scale, expected["gradient"] / scale, rtol=0, atol=1e-6)


def test_the_halves_alone_would_give_something_else():
    whole = figures(latents(), 2, True)
    halves = [figures(part, 2, True) for part in latents().split(2)]
    assert abs(float(sum(h["of_mean"] for h in halves) / 2 - whole["of_mean"])) > 1e-2


def test_counts_are_averaged_over_processes(by_rank):
    for found in by_rank:
        assert found["mean"].tolist() == [0.5, 3.0] and found["most"].tolist() == [1.0, 3.0]


def test_one_process_hears_itself():
    tensor = torch.tensor([2.0])
    assert mean_over_processes(tensor) is tensor and most_over_processes(tensor) is tensor
    assert all_gather("a") == ["a"] and from_first("b") == "b"
