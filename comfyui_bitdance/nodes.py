"""The nodes. They hold no state: what goes from one to the next is a pipeline, bits or a picture."""

from importlib import import_module
from typing import Any

from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from bitdance.cli.options import DTYPE_NAMES, QUANTIZE, QUANTIZE_HEAD
from bitdance.coding import generators_for
from bitdance.generator import KINDS
from bitdance.values import RANGES

from . import models, settings
from .pictures import Bits, Watch, decoded, encoded, mask_picture
from .settings import LEFT, OWN, problem
from .sockets import BITS, MODEL, OWN_NUMBER, bits_given, model_taken, negative_taken, prompt_taken, settings_taken

CATEGORY = "BitDance"
NONE = "none"


class LoadModel(io.ComfyNode):
    """A model folder → MODEL."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node takes and gives."""
        return io.Schema(
            node_id="BitDanceLoadModel",
            display_name="BitDance Load Model",
            category=CATEGORY,
            description="Loads a model folder of any kind: of prompts or of classes.",
            inputs=[
                io.Combo.Input(
                    "model", options=list(models.models()), default="demo", tooltip="A folder in models/bitdance, or the demo."
                ),
                io.Combo.Input(
                    "dtype",
                    options=[OWN, *DTYPE_NAMES],
                    default=OWN,
                    tooltip="What the model computes in; its own is bfloat16 on CUDA, else float32. auto: what is quicker.",
                ),
                io.Combo.Input(
                    "quantize",
                    options=[NONE, *QUANTIZE],
                    default=NONE,
                    tooltip="Keeps the language model's matrices in 8 or 4 bits (models of prompts with a language model).",
                ),
                io.Combo.Input(
                    "quantize_head",
                    options=[NONE, *QUANTIZE_HEAD],
                    default=NONE,
                    tooltip="Keeps the head's matrices in 8 bits (models of prompts with a language model).",
                ),
                io.Combo.Input(
                    "lora", options=[NONE, *models.adapters()], default=NONE, tooltip="An adapter in models/bitdance, if any."
                ),
                io.Float.Input(
                    "lora_scale",
                    default=1.0,
                    min=RANGES["lora_scale"].low,
                    max=RANGES["lora_scale"].high,
                    step=0.05,
                    tooltip="How strongly the adapter acts; 1 is as trained.",
                ),
            ],
            outputs=[MODEL.Output("model_out", display_name="model", tooltip="The loaded model.")],
        )

    @classmethod
    def validate_inputs(cls, **said: Any) -> bool | str:
        """True, or what is wrong; the weights are not read."""
        return problem(lambda: models.check(*_loading(**said)))

    @classmethod
    def fingerprint_inputs(cls, model: str, lora: str = NONE, **_: Any) -> str:
        """What changes when a file of the folders does; a folder that is gone has none."""
        known = [(models.models(), model), (models.adapters(), lora)]
        return models.stamp(*(folders[name] for folders, name in known if name in folders))

    @classmethod
    def execute(cls, **said: Any) -> Any:
        """Load it."""
        return io.NodeOutput(models.load(*_loading(**said)))


def _loading(
    model: str, dtype: str = OWN, lora: str = NONE, lora_scale: float = 1.0, **matrices: str
) -> tuple[str, str | None, dict[str, Any]]:
    """What is said, as arguments of `models.check` and `models.load`. `matrices`: quantize and quantize_head."""
    given = {name: None if value in (OWN, NONE) else value for name, value in {"dtype": dtype, "lora": lora, **matrices}.items()}
    return model, given.pop("dtype"), models.options(given.pop("lora"), lora_scale, **given)


class Encode(io.ComfyNode):
    """IMAGE → BITS."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node takes and gives."""
        return io.Schema(
            node_id="BitDanceEncode",
            display_name="BitDance Encode",
            category=CATEGORY,
            description="Turns pictures into the bits that a model reads and writes.",
            inputs=[
                model_taken(),
                io.Image.Input("image", tooltip="Pictures of a size that the model's picture tokenizer takes; crop them first."),
            ],
            outputs=[bits_given()],
        )

    @classmethod
    def execute(cls, model: Any, image: Tensor) -> Any:
        """Encode them."""
        return io.NodeOutput(encoded(model, image))


class Decode(io.ComfyNode):
    """BITS → IMAGE."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node takes and gives."""
        return io.Schema(
            node_id="BitDanceDecode",
            display_name="BitDance Decode",
            category=CATEGORY,
            description="Turns bits into pictures.",
            inputs=[model_taken(), BITS.Input("bits", tooltip="Bits of Generate, Edit or Encode.")],
            outputs=[io.Image.Output("image_out", display_name="image", tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, model: Any, bits: Bits) -> Any:
        """Decode them."""
        return io.NodeOutput(decoded(model, bits))


class Generate(io.ComfyNode):
    """A prompt or a class → BITS."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node takes and gives."""
        side = {"default": 0, "min": 0, "max": 8192, "step": 8}
        return io.Schema(
            node_id="BitDanceGenerate",
            display_name="BitDance Generate",
            category=CATEGORY,
            description="Makes pictures of a prompt or a class, block by block.",
            inputs=[
                model_taken(),
                prompt_taken("What the pictures show"),
                io.Int.Input("width", **side, tooltip=f"Pixels. 0: {OWN_NUMBER}. A model says which sizes it makes."),
                io.Int.Input("height", **side, tooltip=f"Pixels. 0: {OWN_NUMBER}. A model says which sizes it makes."),
                *settings_taken(),
                negative_taken(),
            ],
            outputs=[bits_given()],
        )

    @classmethod
    def validate_inputs(cls, **said: Any) -> bool | str:
        """True, or what no model takes; what this model does not take, it says before it starts."""
        return problem(lambda: settings.check(**said))

    @classmethod
    def execute(
        cls, model: Any, prompt: str, seed: int, n: int, previews: int, negative: str = LEFT["negative"], **how: Any
    ) -> Any:
        """Generate them. `how`: width, height, steps, guidance and preset."""
        settings.check(prompt=prompt, negative=negative, seed=seed, n=n, previews=previews, **how)
        generators, _ = generators_for(n, seed, None)
        out = model(
            **{name: [text] * n for name, text in settings.condition(model, prompt).items()},
            **settings.negative(type(model).__call__, negative),
            **settings.arguments(**how),
            generator=generators,
            output_type="bits",
            callback_on_step_end=Watch(previews),
        )
        return io.NodeOutput(Bits.of(out.tokens, generators))


class Edit(io.ComfyNode):
    """BITS, a MASK and a prompt or a class → BITS."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node takes and gives."""
        return io.Schema(
            node_id="BitDanceEdit",
            display_name="BitDance Edit",
            category=CATEGORY,
            description="Changes a picture, with a kind of model that can: refinement and next-scale models.",
            inputs=[
                model_taken(),
                BITS.Input("bits", tooltip="Bits of one picture, of Encode or Generate."),
                prompt_taken("What the picture shall show"),
                *settings_taken(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Of the picture's size; what is masked is drawn anew, the rest stays."
                ),
                io.String.Input(
                    "source",
                    optional=True,
                    default="",
                    tooltip="What the picture shows now: without a mask this finds what must change (refinement models).",
                ),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=float(LEFT["strength"]),
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=f"How far the new part may go, above 0 to 1 (refinement models). 0: {OWN_NUMBER}.",
                ),
                negative_taken(),
            ],
            outputs=[bits_given()],
        )

    @classmethod
    def validate_inputs(cls, **said: Any) -> bool | str:
        """True, or what no model takes."""
        return problem(lambda: settings.check(**said))

    @classmethod
    def execute(
        cls,
        model: Any,
        bits: Bits,
        prompt: str,
        seed: int,
        n: int,
        previews: int,
        mask: Tensor | None = None,
        source: str = "",
        strength: float = LEFT["strength"],
        **how: Any,
    ) -> Any:
        """Change it. `how`: steps, guidance, preset and negative. ValueError for a kind of model that cannot edit, or not so."""
        settings.check(prompt=prompt, source=source, seed=seed, n=n, previews=previews, strength=strength, **how)
        change = settings.arguments(mask=None if mask is None else mask_picture(mask), strength=strength)
        change |= settings.condition(model, source, "source_") if source else {}
        _check_edit(model, bits, change)
        generators, _ = generators_for(n, seed, None)
        out = model.edit(
            bits.tokens,
            **settings.condition(model, prompt),
            **change,
            **settings.arguments(**how),
            num_images=n,
            generator=generators,
            output_type="bits",
            callback_on_step_end=Watch(previews),
        )
        return io.NodeOutput(Bits.of(out.tokens, generators))


def _check_edit(model: Any, bits: Bits, change: dict[str, Any]) -> None:
    """ValueError where the kind of model does not take this."""
    takes = getattr(import_module(KINDS[model.kind]), "EDITS", ())
    if not takes:
        raise ValueError("this kind of model cannot edit; refinement and next-scale models can")
    for name in change:
        if name not in takes:
            raise ValueError(f"{name} is not for this kind of model; leave it out")
    if len(bits) != 1:
        raise ValueError(f"the bits are of {len(bits)} pictures; one is changed at a time")


class BitDanceExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def on_load(self) -> None:
        """Tell ComfyUI where models lie."""
        models.register()

    async def get_node_list(self) -> list[Any]:
        """The nodes."""
        return [LoadModel, Encode, Generate, Decode, Edit]
