"""How the bits of a picture are sampled: solver, steps, guidance. One object from the command line to the AR loop."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitdance.heads.diffusion.sampler import SAMPLERS
from bitdance.values import RANGES, check_interval, check_number, shown

STEPS, GUIDANCE = 50, 7.5  # published defaults


@dataclass(frozen=True)
class Sampling:
    """`steps` solver steps per block; `guidance` <= 1 leaves the unconditional branch out.

    `guidance_interval` are the times between which guidance acts; outside it only the conditional branch is evaluated,
    which halves the head's work there. `last_steps`: steps of the last block; those between change linearly from
    `steps` (None: all the same). `guidance_range`: the head takes `guidance`, which must be in this range, as an input, so there
    is no unconditional branch. ValueError says what is allowed.
    """

    steps: int = STEPS
    guidance: float = GUIDANCE
    sampler: str = "euler_maruyama"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    last_steps: int | None = None
    guidance_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, str) or self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {shown(self.sampler)}; allowed are {', '.join(SAMPLERS)}")
        for name in ("steps", "guidance", "last_steps"):
            if name != "last_steps" or self.last_steps is not None:
                object.__setattr__(self, name, check_number(name, getattr(self, name)))
        object.__setattr__(self, "guidance_interval", check_interval(self.guidance_interval))
        if self.guidance_range is not None:
            low, high = guidance_range(self.guidance_range)
            object.__setattr__(self, "guidance_range", (low, high))
            if not low <= self.guidance <= high:
                raise ValueError(f"guidance = {self.guidance:g}; this model was taught guidance from {low:g} to {high:g}")

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch at all."""
        return self.guidance > 1 and self.guidance_range is None

    @property
    def between_branches(self) -> float:
        """The guidance of the velocities; 1 where the head takes it as an input."""
        return self.guidance if self.guidance_range is None else 1.0

    def block_steps(self, M: int) -> list[int]:
        """Solver steps of each of the M blocks."""
        last = self.steps if self.last_steps is None else self.last_steps
        return [round(self.steps + (last - self.steps) * m / max(M - 1, 1)) for m in range(M)]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `BitDancePipeline` for exactly this, whatever the model's defaults."""
        return {
            "preset": "published",
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "sampler": self.sampler,
            "guidance_interval": self.guidance_interval,
            "last_steps": self.last_steps or self.steps,
        }

    @property
    def words(self) -> dict[str, Any]:
        """What a picture says beside steps and guidance; nothing that is as published but the sampler's name."""
        words: dict[str, Any] = {"sampler": self.sampler}
        if self.guidance_interval != (0.0, 1.0):
            words["guidance_interval"] = list(self.guidance_interval)
        if self.last_steps is not None:
            words["last_steps"] = self.last_steps
        return words

    def changed(self, **values: Any) -> "Sampling":
        """These settings with other values, as far as they are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


# Judged on the bundled model against 50 steps of Euler–Maruyama, see docs/generation/solvers.md: 9 and 6 evaluations for 51.
PRESETS = {
    "published": Sampling(),
    "balanced": Sampling(8, sampler="dpmpp_2m_sde"),
    "fast": Sampling(5, sampler="dpmpp_2m_sde"),
    "quick": Sampling(2, sampler="direct"),  # these two for models that were distilled to few evaluations
    "instant": Sampling(1, sampler="direct"),
}
FEW_STEPS = [name for name, sampling in PRESETS.items() if sampling.sampler == "direct"]


def choose(defaults: Mapping[str, Any], preset: str | None = None, **overrides: Any) -> Sampling:
    """The settings that hold: overrides (fields of `Sampling`, None where there is none), else the preset, else the model's
    defaults.

    `defaults` of a model folder: `guidance_scale`, which fits its training and holds under every preset, `guidance_range`, where
    the head takes that as an input, and `preset` and `num_inference_steps`, which hold where no preset was named. ValueError for
    an unknown preset.
    """
    name = defaults.get("preset", "published") if preset is None else preset
    if not isinstance(name, str) or name not in PRESETS:
        source = '"defaults" of bitdance.json: ' if preset is None else ""
        raise ValueError(f"{source}preset = {shown(name)}; allowed are {', '.join(PRESETS)}")
    steps = defaults.get("num_inference_steps") if preset is None else None
    try:
        own = PRESETS[name].changed(guidance=defaults.get("guidance_scale"), steps=steps)
    except ValueError as error:
        raise ValueError(f'"defaults" of bitdance.json: {error}') from None
    chosen = own.changed(**overrides).changed(guidance_range=defaults.get("guidance_range"))
    check_few_steps(chosen, defaults)
    return chosen


def guidance_range(value: Any) -> tuple[float, float]:
    """Two guidance scales 1 ≤ low < high. ValueError for anything else."""
    numbers = [RANGES["guidance"].number(number) for number in value] if isinstance(value, (list, tuple)) else []
    if len(numbers) != 2 or None in numbers or not 1 <= numbers[0] < numbers[1]:  # type: ignore[operator]
        raise ValueError(f"guidance_range = {shown(value)}; two guidance scales 1 ≤ low < high are allowed, for instance 1 and 5")
    return float(numbers[0]), float(numbers[1])  # type: ignore[arg-type]


def check_few_steps(sampling: Sampling, defaults: Mapping[str, Any]) -> None:
    """ValueError where a head that was distilled to few evaluations meets another solver, or another head this one. The sampler
    among the model's defaults says which it is."""
    taught = defaults.get("sampler") == "direct"
    if sampling.sampler == "direct" and not taught:
        raise ValueError(
            f"sampler = 'direct' (presets {', '.join(FEW_STEPS)}) needs a model that was distilled to few evaluations; this "
            'one was not: take "fast", or distil it (docs/distill)'
        )
    if taught and sampling.sampler != "direct":
        raise ValueError(
            f"sampler = {sampling.sampler!r} with a model that was distilled to few evaluations; it takes 'direct' "
            f"alone: presets {', '.join(FEW_STEPS)}, or 1 to 4 steps"
        )
