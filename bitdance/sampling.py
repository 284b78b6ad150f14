"""How the bits of a picture are sampled: solver, steps, guidance. One object from the command line to the AR loop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitdance.sampler import SAMPLERS

STEPS, GUIDANCE = 50, 7.5  # published defaults


@dataclass(frozen=True)
class Sampling:
    """`steps` solver steps per block; `guidance` <= 1 leaves the unconditional branch out.

    `guidance_interval` are the times between which guidance acts; outside it only the conditional branch is evaluated,
    which halves the head's work there. `last_steps`: steps of the last block; those between change linearly from
    `steps` (None: all the same). ValueError says what is allowed.
    """

    steps: int = STEPS
    guidance: float = GUIDANCE
    sampler: str = "euler_maruyama"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    last_steps: int | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r}; allowed are {', '.join(SAMPLERS)}")
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, int | float) or not math.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance!r}; it must be a finite number (published models: 7.5)")
        for name in ("steps", "last_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} = {value!r}; it must be a positive whole number (published models: 50 steps)")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval = {low}, {high}; two times with 0 ≤ low ≤ high ≤ 1 are allowed")

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch at all."""
        return self.guidance > 1

    def block_steps(self, M: int) -> list[int]:
        """Solver steps of each of the M blocks."""
        last = self.steps if self.last_steps is None else self.last_steps
        return [round(self.steps + (last - self.steps) * m / max(M - 1, 1)) for m in range(M)]

    def arguments(self) -> dict[str, Any]:
        """Those of `BitDancePipeline` for exactly this, whatever the model's defaults."""
        return {
            "preset": "published",
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "sampler": self.sampler,
            "guidance_interval": self.guidance_interval,
            "last_steps": self.last_steps or self.steps,
        }

    def changed(self, **values: Any) -> "Sampling":
        """The same but for the values that are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


# Judged on the bundled model against 50 steps of Euler–Maruyama, see docs/generation/solvers.md: 9 and 6 evaluations for 51.
PRESETS = {
    "published": Sampling(),
    "balanced": Sampling(8, sampler="dpmpp_2m_sde"),
    "fast": Sampling(5, sampler="dpmpp_2m_sde"),
}


def choose(defaults: Mapping[str, Any], preset: str | None = None, **said: Any) -> Sampling:
    """What holds: what was said (fields of `Sampling`, None: nothing said), else the preset, else the model's defaults.

    `defaults` of a model folder: `guidance_scale`, which fits its training and holds under every preset, and `preset` and
    `num_inference_steps`, which hold where no preset was named. ValueError for an unknown preset.
    """
    name = defaults.get("preset", "published") if preset is None else preset
    if name not in PRESETS:
        raise ValueError(f"preset = {name!r}; allowed are {', '.join(PRESETS)}")
    steps = defaults.get("num_inference_steps") if preset is None else None
    return PRESETS[name].changed(guidance=defaults.get("guidance_scale"), steps=steps).changed(**said)
