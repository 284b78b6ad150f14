"""Fields of OpenAI's images API → a checked request; finished pictures → its answers and events.

Own fields beside OpenAI's: seed, steps (num_inference_steps), guidance (guidance_scale), preset, negative_prompt, class_label,
sampler and the other settings of the model's kind, job (an id that the client chooses), previews (more of them than OpenAI's
partial_images allows). A field that is not known is an error: a
setting that is silently left out gives another picture than the one that was asked for.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdance.serve.errors import bad_request
from bitdance.serve.settings import Limits
from bitdance.values import Range, check_number, read_number, shown
from lfq_tokenizer.text import did_you_mean

FORMATS = ("png", "webp", "jpeg")
SAME = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
NUMBERS = ("seed", "steps", "guidance", "strength")
PREVIEWS = 64  # of a picture, as many as a large one has blocks
# of OpenAI's own models, with the values that change nothing here; None: any
IGNORED: dict[str, tuple[Any, ...] | None] = {
    "quality": ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "style": ("vivid", "natural"),
    "input_fidelity": ("low", "high"),
    "user": None,
    "safety_identifier": None,
}
PLAIN = ("prompt", "model", "n", "size", "output_format", "output_compression", "response_format", "stream", "partial_images")
OWN = ("class_label", "seed", "steps", "guidance", "preset", "negative_prompt", "job", "previews")
SETTINGS = ("sampler", "guidance_interval", "last_steps", "cfg_schedule", "tau", "schedule")
EDIT = ("strength", "source_prompt", "source_class")
TEXTS = ("prompt", "negative_prompt", "preset", "model", "job", "source_prompt")
_SIZE = re.compile(r"([0-9]{1,6})[x×]([0-9]{1,6})")
_JOB = re.compile(r"[A-Za-z0-9_-]{8,64}")
_FILE = re.compile(r"[1-9][0-9]{0,3}|0")


@dataclass(frozen=True)
class ImageRequest:
    """What a client asked for, each value checked as far as that needs no model. `size` is (height, width), None for the model's
    own. `said`: the settings beside steps and guidance. `previews`: the most for each picture. `job`: the client's own id."""

    prompt: str | None = None
    label: int | str | None = None
    size: tuple[int, int] | None = None
    n: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    preset: str | None = None
    negative: str | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)
    format: str = "png"
    quality: int = 100
    as_url: bool = False
    stream: bool = False
    previews: int = 0
    job: str | None = None


def read_request(fields: Mapping[str, Any], words: Sequence[str], limits: Limits, edit: bool = False) -> ImageRequest:
    """The request in the fields of a JSON object or a form. `words`: further settings that the model's kind has. ApiError 400 for
    a field that is not known, and for a value that is not allowed."""
    settings = dict.fromkeys((*SETTINGS, *words))
    known = [*PLAIN, *OWN, *SAME, *IGNORED, *settings, *(EDIT if edit else ())]
    said: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in known:
            hint = did_you_mean(name, known)
            own = [*PLAIN, *OWN, *settings, *(EDIT if edit else ())]
            raise bad_request(f"unknown field {shown(name)}; {hint}known: {', '.join(own)}", name[:100], "unknown_parameter")
        if value is None:
            continue
        name = SAME.get(name, name)
        if name in said:
            raise bad_request(f"{name} is given twice, under both of its names; keep one", name)
        said[name] = value
    for name, allowed in IGNORED.items():
        if (value := said.pop(name, None)) is not None and allowed is not None and value not in allowed:
            raise bad_request(f"{name} = {shown(value)}; {', '.join(map(str, allowed))} are allowed", name)
    try:
        return _checked(said, settings, limits)
    except ValueError as error:
        raise bad_request(error) from None


def _checked(said: dict[str, Any], settings: Mapping[str, Any], limits: Limits) -> ImageRequest:
    take = said.pop
    for name in TEXTS:
        if not isinstance(said.get(name, ""), str):
            raise ValueError(f"{name} = {shown(said[name])}; a string is allowed")
    if not isinstance(said.get("stream", False), bool):
        raise ValueError(f"stream = {shown(said['stream'])}; true or false is allowed")
    if not isinstance(said.get("class_label", 0), int | str) or isinstance(said.get("class_label"), bool):
        raise ValueError(f"class_label = {shown(said['class_label'])}; one class, a number or a name, is allowed")
    if (job := said.get("job")) is not None and not _JOB.fullmatch(job):
        raise ValueError(f"job = {shown(job)}; 8 to 64 letters, digits, - and _ are allowed")
    for name, allowed in (("output_format", FORMATS), ("response_format", ("b64_json", "url"))):
        if said.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} = {shown(said[name])}; {', '.join(allowed)} are allowed")
    numbers = {name: check_number(name, said.pop(name)) for name in NUMBERS if name in said}
    edit = {name: take(name) for name in EDIT if name in said}
    if "strength" in numbers:
        edit["strength"] = numbers.pop("strength")
    return ImageRequest(
        prompt=take("prompt", None),
        label=take("class_label", None),
        size=_size(take("size", "auto")),
        n=Range(1, limits.pictures).check("n", take("n", 1)),
        preset=take("preset", None),
        negative=take("negative_prompt", None),
        said={name: take(name) for name in settings if name in said},
        edit=edit,
        format=take("output_format", "png"),
        quality=Range(0, 100).check("output_compression", take("output_compression", 100)),
        as_url=take("response_format", "") == "url",
        stream=take("stream", False),
        previews=_previews(take("partial_images", None), take("previews", None)),
        job=take("job", None),
        **numbers,
    )


def _previews(partial_images: Any, previews: Any) -> int:
    """OpenAI's name with its range, or ours with a larger one."""
    if partial_images is not None and previews is not None:
        raise ValueError("partial_images and previews say the same; keep one")
    if previews is not None:
        return Range(0, PREVIEWS).check("previews", previews)
    return Range(0, 3).check("partial_images", 0 if partial_images is None else partial_images)


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) of "WxH"; None for "auto"."""
    if value == "auto":
        return None
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'size = {shown(value)}; "auto" or width and height in pixels, as "512x256", are allowed')
    return int(found[2]), int(found[1])


def from_form(fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The fields of a form, which are all texts, as the JSON that they mean: a number, true or false, else the text, which may be
    refused later in the words for it. `name[]`, which may stand there often, is how OpenAI's client writes a list. ApiError 400
    for another name that is given twice."""
    found: dict[str, Any] = {}
    for name, text in fields:
        plain = name.removesuffix("[]")
        if plain in found and (name == plain or not isinstance(found[plain], list)):
            raise bad_request(f"{shown(plain)} is given twice", plain[:100])
        value = _meaning(plain, text)
        found[plain] = value if name == plain else [*found.get(plain, []), value]
    return found


def _meaning(name: str, text: str) -> Any:
    if name in TEXTS:
        return text
    if name == "class_label":  # a class may be named 1.5
        return int(text) if _FILE.fullmatch(text) else text
    return text == "true" if text in ("true", "false") else read_number(text, whole=False)


def b64(picture: bytes) -> str:
    """The bytes of a picture file as JSON carries them."""
    return base64.b64encode(picture).decode("ascii")


def usage(text_tokens: int, image_tokens: int) -> dict[str, Any]:
    """What OpenAI counts: tokens that were read and made."""
    return {
        "input_tokens": text_tokens,
        "output_tokens": image_tokens,
        "total_tokens": text_tokens + image_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
    }


def size_text(height: int, width: int) -> str:
    """A size as OpenAI writes it: width first."""
    return f"{width}x{height}"
