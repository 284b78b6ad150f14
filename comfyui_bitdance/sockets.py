"""The types of the pack, and the inputs and outputs that several nodes have."""

from typing import Any

from comfy_api.latest import io

from bitdance.values import RANGES

from . import settings
from .settings import OWN, PREVIEWS

MODEL, BITS = io.Custom("BITDANCE_MODEL"), io.Custom("BITDANCE_BITS")
LARGEST_SEED = 2**53 - 1  # larger whole numbers do not survive a browser; the API takes the library's
OWN_NUMBER = "as the model has it"


def model_taken() -> Any:
    """The input of a model."""
    return MODEL.Input("model", tooltip="A model of the node Load Model.")


def bits_given() -> Any:
    """The output of bits."""
    return BITS.Output("bits_out", display_name="bits", tooltip="Tokens of the pictures; Decode makes pictures of them.")


def settings_taken() -> list[Any]:
    """The inputs that Generate and Edit share."""
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=int(RANGES["steps"].high),
            tooltip=f"Steps of the solver per block, or of refinement per picture. 0: {OWN_NUMBER}. Scales take none.",
        ),
        io.Float.Input(
            "guidance",
            default=-1.0,
            min=-1.0,
            max=RANGES["guidance"].high,
            step=0.1,
            tooltip=f"How strongly the prompt or class is followed; 1 and below switch guidance off. -1: {OWN_NUMBER}.",
        ),
        io.Combo.Input(
            "preset",
            options=[OWN, *settings.presets()],
            default=OWN,
            tooltip="Settings at once; steps and guidance beside it win. Each kind of model takes its own, and says which.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=LARGEST_SEED,
            control_after_generate=True,
            tooltip="Of the first picture; the others count up from it. The same seed gives the same picture.",
        ),
        io.Int.Input("n", default=1, min=1, max=64, tooltip="How many pictures are made, all at once."),
        io.Int.Input(
            "previews",
            default=8,
            min=int(PREVIEWS.low),
            max=int(PREVIEWS.high),
            tooltip="How many previews are shown at most. Each costs a decode; 0: none.",
        ),
    ]


def prompt_taken(what: str) -> Any:
    """The input of a prompt or a class."""
    tooltip = f"{what}; of a class model the number or the name of a class."
    return io.String.Input("prompt", multiline=True, default="", dynamic_prompts=True, tooltip=tooltip)


def negative_taken() -> Any:
    """The input of what stands against the prompt."""
    tooltip = "What stands against the prompt (refinement and next-scale models of prompts)."
    return io.String.Input("negative", optional=True, multiline=True, default="", tooltip=tooltip)
