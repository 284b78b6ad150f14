"""What the documentation at /docs says of the fields. What is allowed is decided elsewhere (`openai_images.py`, the model)."""

from typing import Any

from bitdance.serve.model import ServedModel
from bitdance.serve.openai_images import FORMATS, PREVIEWS

FIELDS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string", "description": "what the picture shows; of a class model leave it empty"},
    "model": {"type": "string", "description": "any name: one model is served"},
    "n": {"type": "integer", "minimum": 1, "maximum": 10, "default": 1},
    "size": {"type": "string", "default": "auto", "description": "width x height in pixels, as 512x256"},
    "output_format": {"type": "string", "enum": list(FORMATS), "default": "png"},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100, "description": "quality of webp and jpeg"},
    "response_format": {"type": "string", "enum": ["b64_json", "url"], "description": "url is a data URL"},
    "stream": {"type": "boolean", "default": False},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3, "default": 0},
    "previews": {"type": "integer", "minimum": 0, "maximum": PREVIEWS, "description": "in place of partial_images, and more"},
    "seed": {"type": "integer", "minimum": 0, "description": "of the first picture; the others count up"},
    "steps": {"type": "integer", "minimum": 1},
    "guidance": {"type": "number", "minimum": 0},
    "preset": {"type": "string"},
    "sampler": {"type": "string"},
    "job": {"type": "string", "description": "an id of your own: the job goes on when you leave, GET /v1/jobs/ID fetches it"},
}
LABEL = {"anyOf": [{"type": "integer"}, {"type": "string"}], "description": "number or name of a class"}


def _fields(model: ServedModel) -> dict[str, Any]:
    found = dict(FIELDS)
    if model.class_names is not None:
        found["class_label"] = LABEL
    if model.pipe.takes_negative:
        found["negative_prompt"] = {"type": "string"}
    if "sampler" in model.rules.unknown:
        del found["sampler"]
    return found


def _content(kind: str, fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": fields, "required": required}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def generation_schema(model: ServedModel) -> dict[str, Any]:
    """Of the JSON of a generation."""
    return _content("application/json", _fields(model), ["prompt"] if model.class_names is None else ["class_label"])


def edit_schema(model: ServedModel) -> dict[str, Any]:
    """Of the form of an edit."""
    file = {"type": "string", "format": "binary"}
    fields = {"image": file, "mask": {**file, "description": "PNG of the same size, transparent where it may change"}}
    return _content("multipart/form-data", fields | _fields(model), ["image"])
