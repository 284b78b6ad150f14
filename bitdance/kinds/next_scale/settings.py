"""How the scales of a picture are sampled: guidance, temperature, the k likeliest, the likeliest share p.

Sources: public codes of VAR and Infinity for names and formulas.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bitdance.values import RANGES as NUMBERS
from bitdance.values import Range, check_number, shown

SCHEDULES = ("rising", "constant")


@dataclass(frozen=True)
class NextScaleSettings:
    """`guidance` as published: with the schedule "rising" (VAR) scale k of K has l_c + g·k/(K-1)·(l_c - l_u), so the first has
    none, and 0 switches it off; with "constant" (Infinity) all have l_u + g·(l_c - l_u), and 1 switches it off.

    `tau` divides the logits; `top_k` and `top_p` as in `heads.categorical.filtered`. `more_smooth` (codes alone) mixes codes by
    softened probabilities instead of drawing one: for pictures to look at. `guidance_by_scale` and `tau_by_scale` say a value for
    each scale instead. `insertion`: where guidance acts: 0 on the logits, -j on what block depth - j gives.
    """

    guidance: float = 1.5
    cfg_schedule: str = "rising"
    tau: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    more_smooth: bool = False
    guidance_by_scale: tuple[float, ...] = ()
    tau_by_scale: tuple[float, ...] = ()
    insertion: tuple[int, ...] = (0,)
    steps: int = 0  # scales of a picture, which follow from its size: to be told, not chosen

    def __post_init__(self) -> None:
        if not isinstance(self.cfg_schedule, str) or self.cfg_schedule not in SCHEDULES:
            raise ValueError(f"cfg_schedule = {shown(self.cfg_schedule)}; allowed are {', '.join(SCHEDULES)}")
        object.__setattr__(self, "guidance", check_number("guidance", self.guidance))
        object.__setattr__(self, "tau", check_number("tau", self.tau))
        object.__setattr__(self, "top_k", Range(0, 1 << 24).check("top_k", self.top_k))
        object.__setattr__(self, "top_p", Range(0, 1, whole=False).check("top_p", self.top_p))
        if not isinstance(self.more_smooth, bool):
            raise ValueError(f"more_smooth = {shown(self.more_smooth)}; true or false is allowed")
        for name, allowed in (("guidance_by_scale", NUMBERS["guidance"]), ("tau_by_scale", NUMBERS["tau"])):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ValueError(f"{name} = {shown(values)}; a list of numbers is allowed")
            object.__setattr__(self, name, tuple(allowed.check(name, value) for value in values))
        if not isinstance(self.insertion, list | tuple) or any(Range(-1024, 0).number(j) is None for j in self.insertion):
            raise ValueError(f"insertion = {shown(self.insertion)}; a list of 0 and negative numbers is allowed")
        object.__setattr__(self, "insertion", tuple(self.insertion))

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch at all."""
        if self.guidance_by_scale:
            return any(g != 1 for g in self.guidance_by_scale)
        return self.guidance != (0 if self.cfg_schedule == "rising" else 1)

    @property
    def words(self) -> dict[str, Any]:
        """What a picture says beside its guidance: all that is not as by default."""
        plain = NextScaleSettings()
        words = {name: getattr(self, name) for name in NAMES if getattr(self, name) != getattr(plain, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in words.items()}

    def arguments(self) -> dict[str, Any]:
        """Those of `NextScalePipeline` for exactly this, whatever the model's defaults."""
        return {"preset": "plain", "guidance_scale": self.guidance} | {name: getattr(self, name) for name in NAMES}

    def changed(self, **values: Any) -> "NextScaleSettings":
        """The same with other values, as far as they are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def check_scales(self, K: int) -> None:
        """ValueError where a value was said for each scale, and a picture has K scales and not so many."""
        for name in ("guidance_by_scale", "tau_by_scale"):
            if (values := getattr(self, name)) and len(values) != K:
                raise ValueError(f"{name} has {len(values)} values; this picture has {K} scales")

    def guidance_at(self, k: int, K: int) -> float:
        """g of l_u + g·(l_c - l_u) at scale k of K; 1 where there is none."""
        if self.guidance_by_scale:
            return self.guidance_by_scale[k]
        if self.cfg_schedule == "constant":
            return self.guidance
        return 1 + self.guidance * (k / (K - 1) if K > 1 else 0.0)

    def tau_at(self, k: int, K: int) -> float:
        """The temperature of scale k of K."""
        return self.tau_by_scale[k] if self.tau_by_scale else self.tau

    def mixed(self, with_condition: Tensor, without: Tensor, k: int, K: int) -> Tensor:
        """Both branches of scale k → what is sampled from, in the order of the published code."""
        g = self.guidance_at(k, K)
        if g == 1:
            return with_condition
        if self.cfg_schedule == "rising" and not self.guidance_by_scale:
            return g * with_condition - (g - 1) * without
        return g * with_condition + (1 - g) * without


def smoothing(k: int, K: int) -> tuple[float, float]:
    """(factor of the logits, temperature) of `more_smooth` at scale k of K. Source: published code of VAR."""
    progress = k / (K - 1) if K > 1 else 0.0
    return 1 + progress, max(0.27 * (1 - 0.95 * progress), 0.005)


# what can be said beside guidance, at every door
NAMES = ("cfg_schedule", "tau", "top_k", "top_p", "more_smooth", "guidance_by_scale", "tau_by_scale", "insertion")
# "own" are the model's own settings, "plain" no filter and no guidance; the others are those of published models
PRESETS: dict[str, NextScaleSettings | None] = {
    "own": None,
    "plain": NextScaleSettings(0.0),
    "VAR": NextScaleSettings(1.5, top_k=900, top_p=0.96),
    "VAR-demo": NextScaleSettings(4.0, top_k=900, top_p=0.95, more_smooth=True),
    "Infinity-2B": NextScaleSettings(3.0, "constant", 0.5, 900, 0.97),
    "Infinity-8B": NextScaleSettings(3.0, "constant", 1.0, 900, 0.97),
}


def choose(defaults: Mapping[str, Any], preset: str | None = None, **said: Any) -> NextScaleSettings:
    """What was said (fields of `NextScaleSettings`, None: nothing said), else the preset, else the model's defaults.
    ValueError for an unknown preset and for defaults that cannot be carried out."""
    name = "own" if preset is None else preset
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset = {shown(preset)}; allowed are {', '.join(PRESETS)}")
    own = PRESETS[name]
    if own is None:
        known = {"guidance_scale": "guidance", **{key: key for key in NAMES}}
        try:
            own = NextScaleSettings().changed(**{known[key]: value for key, value in defaults.items() if key in known})
        except ValueError as error:
            raise ValueError(f'"defaults" of bitdance.json: {error}') from None
    return own.changed(**said)
