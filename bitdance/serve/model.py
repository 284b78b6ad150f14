"""The model that is served, and a request → the pictures to make, by the rules of `bitdance generate` and `edit`."""

import itertools
import math
import secrets
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from bitdance.folder.config import resolve
from bitdance.generator import module_of, settings_beside
from bitdance.jobs.job import Job, JobDefaults, Jobs, Request, checked_prompt, job_hash
from bitdance.jobs.runner import RunSpec
from bitdance.networks.precision import resolve_dtype, usable_device
from bitdance.picture_pipeline import OF_CLASSES, OF_PROMPTS
from bitdance.serve.errors import bad_request
from bitdance.serve.openai_images import ImageRequest, size_text
from bitdance.serve.settings import Limits
from bitdance.values import shown


@dataclass(frozen=True, eq=False)
class Plan:
    """The pictures of a request. `spec` holds their settings, as in a run of the command; `edit` the arguments of `pipe.edit`
    and `words` what such pictures say."""

    spec: RunSpec
    jobs: tuple[Job, ...]
    negative: str | None = None
    edit: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """Pictures of equal keys can share a batch; those of an edit only with each other."""
        job = self.jobs[0]
        return id(self) if self.edit else (job.height, job.width, repr(self.spec.settings), self.negative is None)

    def metadata(self, job: Job) -> dict[str, Any]:
        """What the PNG of a picture says: the same as the command's."""
        if self.edit:
            return {**job.words, "seed": job.seed, **self.words}
        found = self.spec.metadata(job)
        if self.negative is not None:
            against = {"negative_prompt": self.negative}
            found |= against
            found["job_hash"] = job_hash(job, self.spec.fingerprint, self.spec.dtype, self.spec.settings.words | against)
        return found


class ServedModel:
    """A model folder, loaded once for each device."""

    def __init__(self, name: str, folder: Path, pipes: Sequence[Any], dtype: str) -> None:
        """`name` as the user gave it; `pipes` are pipelines of the folder, all of one `dtype`."""
        self.name = "demo" if name == "demo" else folder.resolve().name
        self.pipes, self._kind = list(pipes), module_of(folder)
        self.pipe = self.pipes[0]
        self.rules, self._folder = self._kind.rules(folder), folder
        self.edits: tuple[str, ...] = getattr(self._kind, "EDITS", ())
        self.words: tuple[str, ...] = getattr(self.rules, "words", ())
        self._spec = RunSpec(
            jobs=(),
            rules=self.rules,
            settings=self.rules.sampling({}, None, False),
            model=name,
            folder=folder,
            fingerprint=self.rules.fingerprint(),
            device=str(self.pipe.device),
            dtype=dtype,
            batch_size=1,
            shard=(0, 1),
            output=Path(),
            grid=False,
            compile=None,
            sizes=frozenset(),
        )
        self._sizes = self._kind.sizes(folder)

    @classmethod
    def load(cls, model: str = "demo", devices: Sequence[str | None] = (None,), dtype: str | None = None) -> "ServedModel":
        """The folder `model` ("demo" is the bundled one) on each of `devices` (None: CUDA where there is one, else CPU).
        FileNotFoundError or ValueError as of `load_pipeline`."""
        folder = resolve(model)
        found = [usable_device(device) for device in devices]
        name = resolve_dtype(dtype, found[0])
        pipes = [module_of(folder).load_pipeline(folder, device, name) for device in found]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
        return cls(model, folder, pipes, name)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of their numbers; None for a model of prompts."""
        names = self.pipe.names
        return None if names is None else [names.name(number) for number in range(len(names))]

    def describe(self) -> dict[str, Any]:
        """What `/v1/models` says beside OpenAI's fields. `settings`: those beside steps and guidance that a request may
        have, each with the value of a picture that does not say it."""
        settings, presets = self._spec.settings, []
        for preset in self.rules.presets:
            with suppress(ValueError):  # one that needs another kind of training
                self.rules.sampling({}, preset, False)
                presets.append(preset)
        return {
            "kind": self.pipe.kind,
            "sizes": [size_text(*size) for size in self._sizes["sizes"]],
            "only_these_sizes": self._sizes["only_these"],
            "size_multiple_of": self._sizes["multiple_of"],
            "classes": None if self.class_names is None else len(self.class_names),
            "presets": presets,
            "can_edit": bool(self.edits),
            "edit_fields": [name for name in self.edits if name in ("mask", "strength", "source_prompt", "source_class")],
            "takes_negative_prompt": self.pipe.takes_negative,
            "defaults": {
                "size": size_text(*self.rules.default_size),
                **({} if "steps" in self.rules.unknown else {"steps": settings.steps}),
                "guidance": settings.guidance,
                **settings.words,
            },
            "settings": settings_beside(self.rules),
            "dtype": self._spec.dtype,
            "fingerprint": self._spec.fingerprint,
        }

    def plan(self, request: ImageRequest, limits: Limits) -> Plan:
        """The pictures of a request. ApiError 400 in the words that the command has for the same value."""
        self._check_size(request.size or self.rules.default_size, limits)
        try:
            label = self._condition(request.prompt, request.label)
            self._check_names(request.said)
            settings = self.rules.sampling(dict(request.said), request.preset, False)
            jobs = self._jobs(request, label, settings)
            settings = settings.changed(steps=jobs[0].steps, guidance=jobs[0].guidance)
        except (ValueError, TypeError) as error:
            raise bad_request(error) from None
        return Plan(replace(self._spec, settings=settings), jobs, self._negative(request))

    def plan_edit(
        self, request: ImageRequest, picture: Image.Image, shows: Mapping[str, Any], mask: Image.Image | None, limits: Limits
    ) -> Plan:
        """The variants of a picture; `shows`: what it says itself, {} where it says nothing. `mask`: white is drawn anew. Without
        one, and without a source, a picture that says its prompt is changed where the two prompts differ, as by the command."""
        size = (picture.height, picture.width)
        if request.size not in (None, size):
            raise bad_request(f'size: the picture has {size_text(*size)}; leave it out, or "auto"', "size")
        self._check_size(size, limits, "image")
        try:
            label = self._condition(request.prompt, request.label)
            self._check_names(request.said)
            if wrong := [name for name in request.edit if name not in self.edits]:
                raise ValueError(f"{wrong[0]} is not for a model of this kind; leave it out")
            numbers = {"num_inference_steps": request.steps, "guidance_scale": request.guidance}
            said = {**request.said, **{name: value for name, value in numbers.items() if value is not None}}
            self.rules.check_size(*size, self.rules.sampling(dict(request.said), request.preset, False))
            settings = self._kind.edit_settings(self.pipe, request.preset, said)
            seed = secrets.randbelow(2**32) if request.seed is None else request.seed
            more = dict(request.edit)
            if label is None and mask is None and not set(more) - {"strength"} and "source_prompt" in self.edits:
                more |= {"source_prompt": shows["prompt"]} if isinstance(shows.get("prompt"), str) else {}
            what = {"prompt": checked_prompt(request.prompt, "prompt")} if label is None else {"class_label": label}
        except (ValueError, TypeError) as error:
            raise bad_request(error) from None
        if (negative := self._negative(request)) is not None:
            more["negative_prompt"] = negative
        name = "" if label is None else self.pipe.names.name(label)
        numbers = {"steps": settings.get("steps", 0), "guidance": settings["guidance"]}
        jobs = [
            Job(k, "", what.get("prompt", ""), seed + k, *size, **numbers, label=label, name=name)  # type: ignore[arg-type]
            for k in range(request.n)
        ]
        words = {**settings, "model": self.name, "edit": "image"}
        edit = {"image": picture, **what, **({} if mask is None else {"mask": mask}), **more, "preset": request.preset, **said}
        return Plan(self._spec, tuple(jobs), edit=edit, words=words)

    def image_tokens(self, job: Job) -> int:
        """Tokens of the finest grid of a picture."""
        s = self.pipe.model.tokenizer.downsampling
        return (job.height // s) * (job.width // s)

    def _condition(self, prompt: str | None, label: int | str | None) -> int | None:
        """The number of the class; None for a model of prompts. ValueError for the one that the model does not take. An empty
        prompt beside a class is none: OpenAI's clients must send one."""
        if (names := self.pipe.names) is not None:
            if prompt or label is None:
                raise ValueError(OF_CLASSES)
            return int(names.number(label))
        if label is not None:
            raise ValueError(OF_PROMPTS)
        if prompt is None:
            raise bad_request("prompt is missing; give a string", "prompt", "missing_required_parameter")
        return None

    def _jobs(self, request: ImageRequest, label: int | None, settings: Any) -> tuple[Job, ...]:
        height, width = request.size or self.rules.default_size
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        asked = Request(
            "" if label is not None else checked_prompt(request.prompt, "prompt"),
            "request",
            guidance=request.guidance,
            steps=request.steps,
            label=label,
        )
        defaults = JobDefaults(height, width, settings.steps, float(settings.guidance), (seed,), request.n)
        return tuple(Jobs([asked], defaults, partial(self.rules.check_size, settings=settings), resolve=self.rules.requests))

    def _check_names(self, said: Mapping[str, Any]) -> None:
        for name in said:
            if name in self.rules.unknown:
                raise ValueError(f"{name} = {shown(said[name])}; it is not for a model of this kind, leave it out")

    def _negative(self, request: ImageRequest) -> str | None:
        if request.negative is None:
            return None
        if not self.pipe.takes_negative:
            raise bad_request(
                f"negative_prompt = {shown(request.negative)}; a model of this kind takes none, leave it out", "negative_prompt"
            )
        return checked_prompt(request.negative, "negative_prompt")

    def _check_size(self, size: tuple[int, int], limits: Limits, param: str = "size") -> None:
        """ApiError 400 with the nearest sizes, as the field `size` has them."""
        height, width = size
        try:
            self.rules.check_size(height, width)
        except ValueError as error:
            why = str(error).partition(" Nearest ")[0].rstrip(".")  # which has the height first
            near = ", ".join(size_text(*one) for one in self._nearest(height, width))
            raise bad_request(f"{why}; nearest as size, width first: {near}", param, "unsupported_size") from None
        if height * width > limits.pixels:
            raise bad_request(f"{size_text(*size)} has {height * width:,} pixels; up to {limits.pixels:,} are made here", param)

    def _nearest(self, height: int, width: int) -> list[tuple[int, int]]:
        """Up to three sizes that the model makes, (height, width), the nearest by the ratios of the sides first."""
        known, unit = self._sizes, self._sizes["multiple_of"]
        found = [tuple(size) for size in known["sizes"]]
        if not known["only_these"]:
            sides = [sorted({_multiple(side, unit, known, up) for up in (0, 1, 2)}) for side in (height, width)]
            found = [*found, *itertools.product(*sides)]

        def distance(size: tuple[int, int]) -> float:
            return abs(math.log(size[0] / max(height, 1))) + abs(math.log(size[1] / max(width, 1)))

        return sorted(set(found), key=distance)[:3]


def _multiple(side: int, unit: int, known: Mapping[str, Any], up: int) -> int:
    """A multiple of `unit` about `side`, within what the model makes."""
    return int(min(max((side // unit + up) * unit, known["smallest_side"]), known["largest_side"]))
