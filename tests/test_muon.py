"""Muon: what its steps are, which weights it is for, and that averages, checkpoints and several processes keep working."""

import pytest
import torch
from torch import nn

from stages.engine import muon, processes
from stages.engine.ema import AveragedAdamW


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_a_direction_has_the_singular_vectors_of_the_matrix_and_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = muon.orthogonal(matrix).float()
    inner = u.T @ found @ vh.T
    values = inner.diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inner - values.diag()).abs().max() < 0.1  # bfloat16


def test_a_step_is_as_large_as_one_of_adamw_and_a_copy_by_hand_is_equal() -> None:
    weight = nn.Parameter(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    before, momentum = weight.detach().clone(), torch.zeros(32, 64)
    optimizer = AveragedAdamW([{"params": [weight], "muon": True}], 0.5, lr=0.01, weight_decay=0.1)
    for number in range(3):
        grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
        weight.grad = grad.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * momentum
        moved = -0.01 * 0.2 * 64**0.5 * muon.orthogonal(ahead).float()
        before = before * (1 - 0.01 * 0.1) + moved
        torch.testing.assert_close(weight.detach(), before, atol=2e-4, rtol=0)
        assert 0.1 < float(moved.square().mean().sqrt()) / 0.01 < 0.3
    state = optimizer.state[weight]
    assert set(state) == {"step", "exp_avg", "average"} and float(state["step"]) == 3
    assert set(optimizer.prepare(weight, torch.tensor(3.0))) == set(state)


def test_it_is_for_matrices_inside_the_model() -> None:
    model = nn.ModuleDict(
        {"inner": nn.Linear(4, 5), "words": nn.Embedding(7, 4), "lm_head": nn.Linear(4, 7), "tied": nn.Linear(4, 7)}
    )
    model["tied"].weight = model["words"].weight
    assert muon.matrices(model) == {id(model["inner"].weight)}


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes its own directions, and gets those of the others."""
    momenta = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    alone = muon.directions(momenta)
    made: list[list[int]] = []
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(muon.dist, "broadcast", lambda tensor, source: sent.append((source, tensor.numel())))
    real = muon.orthogonal
    for rank in range(2):
        made.append([])
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(muon, "orthogonal", lambda m, rank=rank: made[rank].append(0) or real(m))
        found = muon.directions(momenta)
        assert all(torch.equal(found[i], alone[i]) for i in range(rank, 5, 2))
    assert [len(x) for x in made] == [3, 2] and sent == [(i % 2, 64) for i in range(5)] * 2
