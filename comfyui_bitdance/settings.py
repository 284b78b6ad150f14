"""What a user says of a run, and how it reaches a pipeline. A widget always holds a value: some mean "as the model has it"."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from bitdance.generator import DEFAULT, KINDS
from bitdance.sequence.prompt import check_prompt
from bitdance.values import RANGES, Range, shown

OWN = "model's own"
# these leave a value to the model
LEFT: dict[str, Any] = {"width": 0, "height": 0, "steps": 0, "guidance": -1, "strength": 0, "negative": ""}
PREVIEWS = Range(0, 64)
TEXTS, NUMBERS = ("prompt", "source", "negative"), {**RANGES, "previews": PREVIEWS}
# arguments of a pipeline, where the names differ
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}


def presets() -> list[str]:
    """The presets of every kind of model; which of them a model takes it says itself."""
    homes = ["bitdance.heads.diffusion.settings", *(f"{home}.settings" for name, home in KINDS.items() if name != DEFAULT)]
    return list(dict.fromkeys(preset for home in homes for preset in import_module(home).PRESETS))


def said(**values: Any) -> dict[str, Any]:
    """The values that are given: without those that are left to the model, and those that come from another node (None)."""
    return {name: value for name, value in values.items() if value is not None and value != LEFT.get(name) and value != OWN}


def check(**values: Any) -> None:
    """ValueError, as at every door of the library, for what no model takes. A value that comes from another node is None while
    inputs are validated, and is checked when it is there."""
    for name, value in said(**values).items():
        if name in TEXTS:
            check_prompt(value)
        elif name in NUMBERS:
            NUMBERS[name].check(name, value)
        elif name == "preset" and value not in presets():
            raise ValueError(f"preset = {shown(value)}; allowed are {', '.join(presets())}")


def arguments(**values: Any) -> dict[str, Any]:
    """What is said as arguments of a pipeline."""
    return {ARGUMENTS.get(name, name): value for name, value in said(**values).items()}


def negative(call: Callable[..., Any], text: str) -> dict[str, str]:
    """What stands against the prompt as an argument of `call`. ValueError where its kind of model knows no such thing."""
    found = arguments(negative=text)
    if found and not set(found) & set(inspect.signature(call).parameters):
        raise ValueError("negative is not for this kind of model; leave it out")
    return found


def condition(pipe: Any, prompt: str, prefix: str = "") -> dict[str, str]:
    """The argument that says what to show: a prompt, or a class's number or name where the model has classes."""
    if pipe.names is None:
        return {f"{prefix}prompt": prompt}
    return {f"{prefix}class" if prefix else "class_label": prompt.strip()}


def problem(check: Callable[[], object]) -> bool | str:
    """True, or what a check finds wrong, as ComfyUI wants to be told."""
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return True
