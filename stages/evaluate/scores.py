"""The arithmetic of Fréchet distances, inception score, precision and recall, on features that are given.

N, M pictures, F features, C classes. Sources: Heusel et al. 2017 (arXiv 1706.08500), Salimans et al. 2016 (arXiv 1606.03498),
Kynkäänniemi et al. 2019 (arXiv 1904.06991); ADM's evaluator for parts of 5,000 and k = 3.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PART = 5000  # pictures of a part of the inception score
NEIGHBOUR = 3  # k of precision and recall
ROWS = 2048  # whose distances to all others are held at once


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F,F) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features_NF: Tensor) -> "Gaussian":
        """The unbiased covariance. ValueError for fewer than two pictures."""
        if len(features_NF) < 2:
            raise ValueError(f"{len(features_NF)} picture has no covariance; give at least 2")
        x = features_NF.double().cpu()
        centred = x - x.mean(dim=0)
        return cls(x.mean(dim=0).numpy(), (centred.T @ centred / (len(x) - 1)).numpy())


def frechet(one: Gaussian, other: Gaussian) -> float:
    """|μ − ν|² + tr(Σ + Ω − 2·(ΣΩ)^½), the root through symmetric matrices. ValueError for features of other numbers."""
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"{one.mean.shape[0]} features against {other.mean.shape[0]}; both must come from the same network")
    mean, sigma = (torch.from_numpy(one.mean - other.mean), torch.from_numpy(one.covariance))
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inner = root @ torch.from_numpy(other.covariance) @ root
    trace = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    total = mean.square().sum() + sigma.trace() + float(np.trace(other.covariance)) - 2 * trace
    return max(0.0, float(total))


def shuffled(rows: Tensor, seed: int | None) -> Tensor:
    """Rows in an order that the seed decides; None: as they are."""
    if seed is None:
        return rows
    return rows[torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))]


def inception_score(logits_NC: Tensor, part: int = PART, seed: int | None = 0) -> tuple[float, float]:
    """exp of the mean divergence of a picture's classes from those of its part; mean and deviation over parts of `part` pictures,
    the last perhaps smaller, after shuffling."""
    scores = []
    for logits in shuffled(logits_NC.double(), seed).split(part):
        p = logits.softmax(dim=1)
        divergence = (p * (logits.log_softmax(dim=1) - p.mean(dim=0, keepdim=True).log())).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(reference_NF: Tensor, samples_MF: Tensor, k: int = NEIGHBOUR) -> tuple[float, float]:
    """Precision: the share of samples that lie within the ball of a reference picture, which reaches to its k-th nearest; recall
    the same the other way. ValueError for sets of k pictures or fewer."""
    for name, features in (("reference pictures", reference_NF), ("samples", samples_MF)):
        if len(features) <= k:
            raise ValueError(f"{len(features)} {name}; precision and recall need more than k = {k}")
    reference_NF, samples_MF = reference_NF.float(), samples_MF.float()
    reach_N, reach_M = (_radii(features, k) for features in (reference_NF, samples_MF))
    return _inside(samples_MF, reference_NF, reach_N), _inside(reference_NF, samples_MF, reach_M)


def _squared(rows: Tensor, others: Tensor) -> Tensor:
    return (rows.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * rows @ others.T).clamp_min(0)


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance to the k-th nearest other one; the nearest of all is itself."""
    return torch.cat([_squared(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(ROWS)])


def _inside(rows: Tensor, centres: Tensor, reach: Tensor) -> float:
    found = [(_squared(part, centres) <= reach).any(dim=1) for part in rows.split(ROWS)]
    return float(torch.cat(found).double().mean())
