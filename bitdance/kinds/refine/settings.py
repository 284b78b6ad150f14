"""How a picture is refined: steps, guidance, temperature, and how fast labels settle. One object from flag to loop.

A step i of N has progress s = (i+1)/N; `share` is how many labels are kept after it:

    linear    s                                                       published class models
    cosine    1 - cos(π/2·s)                                          an option of theirs
    ramp      cap·(1 - cos(π/2·s')), s' = min(1, (i+1)/(ramp_steps-1)), shifted by `share_shift`     published text models

With "ramp" the network is told the share that was really kept, otherwise the share that was aimed at; a picture is finished
after the step that saw at least `end_share` of its labels kept.
Source: GRN paper (arXiv 2604.13030); published sampling code for the numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bitdance.kinds.refine.noise import shifted
from bitdance.values import RANGES as NUMBERS
from bitdance.values import Range, check_interval, check_number, shown

SCHEDULES = ("linear", "cosine", "ramp")
_FACTOR = Range(0, 1000, whole=False, open_low=True)


@dataclass(frozen=True)
class AdaptiveSteps:
    """How many steps a picture needs, told after `warmup` steps from the mean entropy H of its labels (0: sure, 1: anything):
    round(slope·H + offset) more, so that there are at least `least` in all and no more than the settings' steps. With fewer steps
    the temperature falls too, to half at ten. Source: published class models (GRN-B: 5, 700, -620, 20)."""

    warmup: int = 5
    slope: float = 700.0
    offset: float = -620.0
    least: int = 20

    def __post_init__(self) -> None:
        real = Range(-1e6, 1e6, whole=False)
        for name, allowed in {"warmup": Range(1, 10_000), "slope": real, "offset": real, "least": Range(1, 10_000)}.items():
            object.__setattr__(self, name, allowed.check(f"adaptive {name}", getattr(self, name)))

    @classmethod
    def from_value(cls, value: Any) -> "AdaptiveSteps | None":
        """From a JSON object; None and False mean without. ValueError for anything else."""
        if value is None or value is False or isinstance(value, AdaptiveSteps):
            return value or None
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            raise ValueError(f"adaptive = {shown(value)}; an object with {', '.join(names)} is allowed")
        return cls(**value)

    def more_steps(self, entropy: float, steps: int) -> int:
        """Steps after the warm-up."""
        wanted = self.slope * entropy + self.offset
        return round(min(max(wanted, self.least - self.warmup), steps - self.warmup))


@dataclass(frozen=True)
class RefineSettings:
    """`steps` of the whole picture; `guidance` <= 1 leaves the unconditional branch out; `tau` divides the logits.

    Guidance acts while the share of kept labels lies in `guidance_interval`. With `guidance_power` p above 0 it rises with the
    share t as 1 + guidance·(1 - cos(π·t^p))/2 instead. `adaptive`: the number of steps follows from the picture.
    ValueError says what is allowed.
    """

    steps: int = 50
    guidance: float = 2.35
    tau: float = 1.31
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_power: float = 0.0
    schedule: str = "linear"
    adaptive: AdaptiveSteps | None = None
    ramp_steps: int | None = None
    share_cap: float = 0.999
    share_shift: float = 1.0
    end_share: float = 1 - 1e-6

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            raise ValueError(f"schedule = {shown(self.schedule)}; allowed are {', '.join(SCHEDULES)}")
        for name in ("steps", "guidance"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        object.__setattr__(self, "guidance_interval", check_interval(self.guidance_interval))
        object.__setattr__(self, "adaptive", AdaptiveSteps.from_value(self.adaptive))
        for name, allowed in RANGES.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, allowed.check(name, value))
        if self.adaptive and self.adaptive.warmup >= self.steps:
            raise ValueError(f"steps = {self.steps}; more than the adaptive warmup of {self.adaptive.warmup} are needed")

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch at all."""
        return self.guidance > 1 or self.guidance_power > 0

    @property
    def tells_kept_share(self) -> bool:
        """Whether the network is told the share of labels that was really kept."""
        return self.schedule == "ramp"

    @property
    def words(self) -> dict[str, Any]:
        """What a picture says beside steps and guidance: all that is not as by default."""
        plain = RefineSettings()
        words = {name: getattr(self, name) for name in NAMES if getattr(self, name) != getattr(plain, name)}
        words["tau"] = self.tau
        if self.adaptive:
            words["adaptive"] = vars(self.adaptive)
        if "guidance_interval" in words:
            words["guidance_interval"] = list(self.guidance_interval)
        return words

    def changed(self, **values: Any) -> "RefineSettings":
        """The same with other values, as far as they are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def arguments(self) -> dict[str, Any]:
        """Those of `RefinePipeline` for exactly this, whatever the model's defaults."""
        return {"preset": "fixed", "num_inference_steps": self.steps, "guidance_scale": self.guidance} | {
            name: getattr(self, name) for name in NAMES
        }

    def share(self, progress: float) -> float:
        """The share of labels that is kept at a progress from 0 to 1."""
        if self.schedule == "linear":
            return progress
        if self.schedule == "ramp":
            ramp = self.steps if self.ramp_steps is None else self.ramp_steps
            left = 1.0 - (1.0 if ramp < 2 else min(1.0, progress * self.steps / (ramp - 1)))
            progress = 1 - shifted(left, self.share_shift)
        cosine = 1 - math.cos(math.pi / 2 * progress)
        return self.share_cap * cosine if self.schedule == "ramp" else cosine

    def guidance_at(self, time_B: Tensor) -> Tensor:
        """Guidance of each picture (B,) at its share of kept labels; 1 where there is none."""
        if self.guidance_power > 0:
            return 1 + self.guidance * (1 - torch.cos(math.pi * time_B**self.guidance_power)) / 2
        low, high = self.guidance_interval
        inside = ((time_B < high) | (high == 1)) & ((time_B > low) | (low == 0))
        return torch.where(inside & self.guided, self.guidance, 1.0)


RANGES = {
    "tau": NUMBERS["tau"],
    "guidance_power": Range(0, 100, whole=False),
    "ramp_steps": Range(2, 10_000),
    "share_cap": Range(0, 1, whole=False, open_low=True),
    "share_shift": _FACTOR,
    "end_share": Range(0, 1, whole=False, open_low=True),
}
# what can be said beside steps and guidance, at every door
NAMES = ("guidance_interval", "schedule", "adaptive", *RANGES)


_T2I = RefineSettings(50, 3.0, 1.1, schedule="ramp")
# "fixed" and "adaptive" are the model's own settings without and with its rule; the others are those of published models
PRESETS: dict[str, RefineSettings | None] = {
    "fixed": None,
    "adaptive": None,
    "GRN-B": RefineSettings(50, 2.35, 1.31, (0.44, 1.0)),
    "GRN-B-adaptive": RefineSettings(50, 2.35, 1.31, (0.44, 1.0), adaptive=AdaptiveSteps()),
    "GRN-L": RefineSettings(50, 2.0, 1.3, (0.42, 1.0)),
    "GRN-T2I": _T2I,
    "GRN-T2I-joint": replace(_T2I, share_cap=0.95, end_share=0.98),
}


def choose(defaults: Mapping[str, Any], preset: str | None = None, **said: Any) -> RefineSettings:
    """What was said (fields of `RefineSettings`, None: nothing said), else the preset, else the model's defaults. ValueError
    for an unknown preset and for defaults that cannot be carried out."""
    name = defaults.get("preset", "fixed") if preset is None else preset
    source = '"defaults" of bitdance.json: '
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"{source if preset is None else ''}preset = {shown(name)}; allowed are {', '.join(PRESETS)}")
    own = PRESETS[name]
    if own is None:
        known = {"num_inference_steps": "steps", "guidance_scale": "guidance", **{key: key for key in NAMES}}
        try:
            own = RefineSettings().changed(**{known[key]: value for key, value in defaults.items() if key in known})
            if name == "fixed":
                own = replace(own, adaptive=None)
            elif own.adaptive is None:
                own = replace(own, adaptive=AdaptiveSteps())
        except ValueError as error:
            raise ValueError(f"{source}{error}") from None
    return own.changed(**said)
