"""Power laws of held-out loss: against parameters, pictures seen and operations, for the sizes of a group."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.measure.evidence.study import loss_of

Points = list[tuple[float, float]]  # (x, loss)
AXES = {"parameters": "parameters", "pictures": "pictures seen", "operations": "operations, the best size at each"}


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """y = a·x^b by least squares of the logarithms → (a, b, standard error of b). ValueError for fewer than three points."""
    if len(x) < 3:
        raise ValueError(f"{len(x)} points; a power law and its error need at least 3")
    (b, log_a), covariance = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled")
    residual = np.log(y) - (b * np.log(x) + log_a)
    error = float(np.sqrt(covariance[0, 0] * (residual @ residual) / max(1, len(x) - 2)))
    return float(np.exp(log_a)), float(b), error


def points(results: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """For each of `AXES` what is fitted, of the results of one group: the last losses of all sizes; the losses of the largest on
    its way; and of all sizes' ways the losses that no cheaper point has reached."""
    sizes = sorted(results, key=lambda result: result["parameters"])
    largest, found = sizes[-1], {"parameters": [(float(r["parameters"]), loss_of(r["heldout"])) for r in sizes]}
    found["pictures"] = [(float(point["pictures"]), point["loss"]) for point in largest["curve"]]
    reached: Points = []
    for operations, loss in sorted(
        (point["pictures"] * result["operations"] / result["pictures"], point["loss"])
        for result in sizes
        for point in result["curve"]
    ):
        if not reached or loss < reached[-1][1]:
            reached.append((operations, loss))
    return {**found, "operations": reached}


def groups(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Results by group, those of at least three sizes."""
    names = dict.fromkeys(result["group"] for result in results if result["group"])
    sorted_out = {name: [result for result in results if result["group"] == name] for name in names}
    return {name: found for name, found in sorted_out.items() if len({result["parameters"] for result in found}) >= 3}


def laws(results: Sequence[Mapping[str, Any]]) -> str:
    """The fits of all groups as Markdown, "" where there are none."""
    lines = ["| group | held-out loss against | law | points |", "|---|---|---|---:|"]
    for group, found in groups(results).items():
        for axis, pairs in points(found).items():
            if len(pairs) >= 3:
                a, b, error = power_law(*zip(*pairs, strict=True))
                lines.append(f"| {group} | {AXES[axis]} | {a:.3g}·x^({b:.3f} ± {error:.3f}) | {len(pairs)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
