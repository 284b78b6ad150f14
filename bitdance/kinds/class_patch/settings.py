"""How the bits of a class's picture are sampled: solver, steps, and guidance that may rise from block to block."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bitdance.heads.diffusion.settings import FEW_STEPS, Sampling, check_few_steps
from bitdance.heads.diffusion.settings import PRESETS as FEW
from bitdance.kinds.class_patch.config import PUBLISHED
from bitdance.values import shown

SCHEDULES = ("linear", "constant")
STEPS, GUIDANCE = 100, 4.6  # defaults of the published sampling script


@dataclass(frozen=True)
class ClassSettings:
    """`sampling` of one block. With the schedule "linear" block m of M has guidance 1 + (g - 1)·m/M, so the first has none;
    with "constant" all have g. Source: published class-conditional code."""

    sampling: Sampling = field(default_factory=lambda: Sampling(STEPS, GUIDANCE))
    cfg_schedule: str = "linear"

    def __post_init__(self) -> None:
        if not isinstance(self.cfg_schedule, str) or self.cfg_schedule not in SCHEDULES:
            raise ValueError(f"cfg_schedule = {shown(self.cfg_schedule)}; allowed are {', '.join(SCHEDULES)}")

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch at all."""
        return self.sampling.guided

    @property
    def steps(self) -> int:
        """Solver steps of a block."""
        return self.sampling.steps

    @property
    def guidance(self) -> float:
        """Guidance at the end of the schedule."""
        return self.sampling.guidance

    @property
    def words(self) -> dict[str, Any]:
        """What a picture says beside steps and guidance; nothing that is as published but the sampler's name."""
        return self.sampling.words | ({} if self.cfg_schedule == "linear" else {"cfg_schedule": self.cfg_schedule})

    def changed(self, **values: Any) -> "ClassSettings":
        """The same but for the fields of `sampling` that are not None."""
        return replace(self, sampling=self.sampling.changed(**values))

    def arguments(self) -> dict[str, Any]:
        """Those of `ClassPipeline` for exactly this, whatever the model's defaults."""
        return {name: value for name, value in self.sampling.arguments().items() if name != "preset"} | {
            "cfg_schedule": self.cfg_schedule
        }

    def blocks(self, M: int) -> list[tuple[Sampling, int]]:
        """The sampling of each of the M blocks, and its solver steps."""
        g = self.sampling.guidance
        rising = g > 1 and self.cfg_schedule == "linear"
        guidance = [1 + (g - 1) * m / M if rising else g for m in range(M)]
        of_block = self.sampling
        if of_block.guidance_range is not None:  # of the whole picture; blocks rise from 1 on
            of_block = replace(of_block, guidance_range=(1.0, of_block.guidance_range[1]))
        return [(replace(of_block, guidance=g_m), n) for g_m, n in zip(guidance, self.sampling.block_steps(M))]


PRESETS = {name: ClassSettings(Sampling(STEPS, guidance)) for name, (_, guidance) in PUBLISHED.items()}
PRESETS |= {name: ClassSettings(FEW[name].changed(guidance=1.0)) for name in FEW_STEPS}


def choose(defaults: Mapping[str, Any], preset: str | None = None, cfg_schedule: str | None = None, **said: Any) -> ClassSettings:
    """What was said (fields of `Sampling`, None: nothing said), else the preset, else the model's defaults, else the published
    procedure. ValueError for an unknown preset."""
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset = {shown(preset)}; allowed are {', '.join(PRESETS)}")
        own = PRESETS[preset]
        if preset in FEW_STEPS and defaults.get("guidance_range"):  # their guidance is the model's
            schedule = defaults.get("cfg_schedule", "linear")
            own = ClassSettings(own.sampling.changed(guidance=defaults.get("guidance_scale")), schedule)
    else:
        try:
            names = {"guidance": "guidance_scale", "steps": "num_inference_steps", "sampler": "sampler"}
            sampling = Sampling(STEPS, GUIDANCE).changed(**{field: defaults.get(name) for field, name in names.items()})
            own = ClassSettings(sampling, defaults.get("cfg_schedule", "linear"))
        except ValueError as error:
            raise ValueError(f'"defaults" of bitdance.json: {error}') from None
    sampling = own.sampling.changed(**said).changed(guidance_range=defaults.get("guidance_range"))
    chosen = ClassSettings(sampling, own.cfg_schedule if cfg_schedule is None else cfg_schedule)
    check_few_steps(chosen.sampling, defaults)
    return chosen
