"""One random number generator per picture, from what a caller says."""

import secrets
from typing import Any

import torch

from bitdance.values import check_number, shown


def generators_for(count: int, seed: Any, generator: Any) -> tuple[list[torch.Generator], list[int | None]]:
    """One generator for each of `count` pictures, and the seeds as far as they are known: one of the two is given, or neither.

    A single seed s serves n pictures as s, s + 1, …, s + n - 1; a single generator serves one picture directly and draws n seeds
    for more. ValueError for another count than `count`, both at once, and what is neither.
    """
    if seed is not None and generator is not None:
        raise ValueError("both seed and generator were given; give one of them")
    if isinstance(generator, torch.Generator) and count > 1:
        drawn = torch.randint(0, 2**63 - 1, (count,), generator=generator, device=generator.device)
        seed = drawn.tolist()
    elif generator is not None:
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"generator = {shown(generator)}; give a torch.Generator or a list of them")
        if len(generators) != count:
            raise ValueError(f"{len(generators)} generators for {count} pictures; give one per picture")
        if len(set(map(id, generators))) != count:
            raise ValueError("the same generator occurs twice in the list; every picture needs its own")
        return list(generators), [None] * count
    if seed is None:
        seed = [secrets.randbelow(2**32) for _ in range(count)]
    elif isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} pictures; give one per picture, or one seed for all")
    else:
        first = check_number("seed", seed)
        seed = [first + i for i in range(count)]
    seeds = [check_number("seed", value) for value in seed]
    return [torch.Generator().manual_seed(value) for value in seeds], list(seeds)
