"""Where a run stands: weights, moments and averages, saved by the processes that hold them, for any number of others.

    resume/state.json                    what the run was: data, samples per step, processes, stage of ZeRO, precision
    resume/NAME_00000.safetensors, …     one file per process, or one in all where every process holds the same (ZeRO 0)

A file holds stretches of flattened tensors, KIND/PARAMETER; its header says where each begins and how long the whole parameter
is. KIND is `weight` (float32 where ZeRO keeps such), `exp_avg`, `exp_avg_sq`, `average`, `step`, `frozen` or `buffer`. Whoever
resumes reads the stretches that it updates, so the number of processes and the stage of ZeRO may change; with the same ones
everything is as it was, bit for bit. Nothing here can execute code.
"""

import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitdance.values import Range
from lfq_tokenizer.json_file import parse_json, read_json, write_json
from lfq_tokenizer.weights import check_shapes, write_safetensors
from stages.config import TrainingConfig
from stages.engine import partitions, processes
from stages.engine.learner import Learner, precision_of
from stages.engine.partitions import Fragment
from stages.recipe import Recipe

STATES = ("exp_avg", "exp_avg_sq", "average")


def description(recipe: Recipe, config: TrainingConfig) -> dict[str, Any]:
    """What a run is, for its checkpoints."""
    run, world = config.run, processes.world()
    return {
        **({"base": recipe.base} if recipe.base else {}),
        "data": recipe.feed.hash,
        "samples_per_step": run.batch_size * run.accumulation * world,
        "processes": world,
        "zero_stage": config.deepspeed.zero_stage,
        "precision": precision_of(run),
        "matrices": config.optimizer.matrices,
    }


def save(learners: dict[str, Learner], state: dict[str, Any], folder: Path) -> None:
    """Write the part of this process into the checkpoint `folder`. All processes must take part."""
    folder = folder / "resume"
    folder.mkdir(exist_ok=True)
    if processes.rank() == 0:
        write_json(state, folder / "state.json")
    for name, learner in learners.items():
        _save(learner, folder / f"{name}_{processes.rank():05d}.safetensors", with_frozen="base" not in state)


def least_bytes(learner: Learner) -> int:
    """What `save` writes at least, over all processes: weights, moments and average of what trains, in float32, and once more
    the weights in model/, in no less than bfloat16."""
    trained = sum(partitions.size(p) for p in learner.module.parameters() if p.requires_grad)
    return trained * (4 * (3 + bool(learner.adam.decay)) + 2)


def load(learners: dict[str, Learner], state: dict[str, Any], folder: Path, accumulation: int) -> None:
    """Restore what `save` wrote. ValueError when the samples would come in another order, or the model is another one."""
    if not (folder / "resume" / "state.json").is_file():
        raise ValueError(
            f"{folder} was saved by an earlier version, whose resume state is not read any more; start again with --resume no, "
            "from its model/ as generator.init or tokenizer.init"
        )
    saved = _read_state(folder / "resume" / "state.json")
    if saved["data"] != state["data"]:
        raise ValueError(
            f"{folder} was trained on other shards than data.train names now; restore them, or start again with --resume no"
        )
    if saved["samples_per_step"] != state["samples_per_step"]:
        per_micro_step = state["samples_per_step"] // accumulation
        fits, rest = divmod(saved["samples_per_step"], per_micro_step)
        way = f"set run.accumulation = {fits}" if not rest else f"choose run.batch_size to divide {saved['samples_per_step']}"
        raise ValueError(
            f"{folder} took {saved['samples_per_step']} samples per step, this run takes {state['samples_per_step']} "
            f"(batch_size × accumulation × processes); {way}, or start again with --resume no"
        )
    if (before := saved.get("matrices", "adamw")) != state["matrices"]:
        raise ValueError(
            f"{folder} was trained with optimizer.matrices = {before!r}, this run says {state['matrices']!r}; set it as it was, "
            "or start again with --resume no, from its model/ as generator.init or tokenizer.init"
        )
    if saved.get("base") != state.get("base"):
        raise ValueError(
            f"{folder} trains {_trained(saved)}, this run {_trained(state)}; restore generator.init and [generator.lora], or "
            "start again with --resume no"
        )
    for name, learner in learners.items():
        with ExitStack() as opened:
            _load(learner, _Saved(folder / "resume", name, opened), with_frozen="base" not in state)


def _read_state(path: Path) -> dict[str, Any]:
    """ValueError, naming the file, for JSON of another shape."""
    saved = read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("data"), str) or not isinstance(saved.get("base", ""), str):
        raise ValueError(f"{path} does not say what the run was (data, samples_per_step); resume from an older step")
    Range(1, 2**60).check("samples_per_step", saved.get("samples_per_step"), str(path))
    return saved


def _trained(state: dict[str, Any]) -> str:
    return f"an adapter to the model with fingerprint {state['base']}" if "base" in state else "a model's own weights"


def _save(learner: Learner, path: Path, with_frozen: bool) -> None:
    zero = learner.engine.zero_optimization_stage()
    first = processes.rank() == 0
    parameters = dict(learner.module.named_parameters())
    tensors: dict[str, Tensor] = {}
    places: dict[str, tuple[int, int]] = {}  # where a stretch begins, and the numbers of the whole parameter

    def keep(kind: str, fragment: Fragment, tensor: Tensor) -> None:
        key = f"{kind}/{fragment.name}"
        tensors[key] = fragment.read(tensor)
        places[key] = (fragment.start, partitions.size(parameters[fragment.name]))

    for fragment in partitions.trained(learner.engine) if zero or first else []:
        keep("weight", fragment, fragment.flat)
        state = learner.adam.state.get(fragment.flat, {})
        for kind in STATES:
            if kind in state:
                keep(kind, fragment, state[kind])
        if "step" in state:
            tensors[f"step/{fragment.name}"] = state["step"]
    for fragment in partitions.frozen(learner.engine) if with_frozen and (zero == 3 or first) else []:
        keep("frozen", fragment, fragment.flat)
    if first:
        tensors |= {f"buffer/{name}": tensor for name, tensor in _buffers(learner).items()}
    if tensors:
        # copies, since stretches of one vector may not share its memory
        tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        write_safetensors(tensors, path, {"places": json.dumps(places)})


def _load(learner: Learner, saved: "_Saved", with_frozen: bool) -> None:
    parameters = [(name, p) for name, p in learner.module.named_parameters() if p.requires_grad or with_frozen]
    expected = {f"{'weight' if p.requires_grad else 'frozen'}/{name}": (partitions.size(p),) for name, p in parameters}
    expected |= {f"buffer/{name}": tuple(tensor.shape) for name, tensor in _buffers(learner).items()}
    check_shapes(expected, saved.shapes("weight", "frozen", "buffer"), saved.folder)
    for name, buffer in _buffers(learner).items():
        buffer.copy_(saved.plain(f"buffer/{name}"))
    with partitions.writing(learner.engine):
        by_flat: dict[Tensor, list[Fragment]] = defaultdict(list)
        for fragment in partitions.trained(learner.engine):
            by_flat[fragment.flat].append(fragment)
            fragment.write(fragment.flat, saved.stretch("weight", fragment))
        for flat, fragments in by_flat.items():
            stepped = [fragment for fragment in fragments if f"step/{fragment.name}" in saved]
            if stepped:
                step = max(saved.plain(f"step/{fragment.name}") for fragment in stepped)
                state = learner.adam.prepare(flat, step)
                for fragment in stepped:
                    for kind in STATES:
                        # an average that was not kept so far begins with the weights
                        if kind in state and f"{kind}/{fragment.name}" in saved:
                            fragment.write(state[kind], saved.stretch(kind, fragment))
        for fragment in partitions.frozen(learner.engine) if with_frozen else []:
            fragment.write(fragment.flat.detach(), saved.stretch("frozen", fragment))


def _buffers(learner: Learner) -> dict[str, Tensor]:
    """Those that belong to the module's state."""
    names = learner.module.state_dict().keys()
    return {name: buffer for name, buffer in learner.module.named_buffers() if name in names}


@dataclass(frozen=True)
class _Stretch:
    file: Any
    start: int
    stop: int


def read_places(metadata: dict[str, str] | None, path: Path) -> dict[str, tuple[int, int]]:
    """Where each stretch of a file of `resume/` begins, and how many numbers its parameter has. ValueError names the file."""
    found = parse_json((metadata or {}).get("places", ""), f"{path} (places)")
    if not isinstance(found, dict) or not all(_is_place(place) for place in found.values()):
        raise ValueError(f"{path} does not say where its numbers belong; resume from an older step")
    return {name: (start, size) for name, (start, size) in found.items()}


def _is_place(place: Any) -> bool:
    return isinstance(place, list) and len(place) == 2 and all(type(number) is int and 0 <= number < 2**60 for number in place)


class _Saved:
    """The files of a learner, opened; tensors are read when they are asked for."""

    def __init__(self, folder: Path, name: str, opened: ExitStack) -> None:
        self.folder = folder
        self._stretches: dict[str, list[_Stretch]] = defaultdict(list)
        self._plain: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        for path in sorted(folder.glob(f"{name}_*.safetensors")):
            try:
                file = opened.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file ({error}); resume from an older step") from None
            places = read_places(file.metadata(), path)
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key in places:
                    shape = file.get_slice(key).get_shape()
                    if len(shape) != 1:
                        raise ValueError(f"{path}: {key} is no row of numbers but {shape}; resume from an older step")
                    start, self._sizes[key] = places[key]
                    self._stretches[key].append(_Stretch(file, start, start + shape[0]))
                else:
                    self._plain[key] = file

    def __contains__(self, key: str) -> bool:
        return key in self._stretches or key in self._plain

    def shapes(self, *kinds: str) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {key: (size,) for key, size in self._sizes.items()}
        found |= {key: tuple(file.get_slice(key).get_shape()) for key, file in self._plain.items()}
        return {key: shape for key, shape in found.items() if key.partition("/")[0] in kinds}

    def plain(self, key: str) -> Tensor:
        return self._plain[key].get_tensor(key)

    def stretch(self, kind: str, fragment: Fragment) -> Tensor:
        """The fragment's numbers, put together from the files that hold some of them. ValueError when some are missing."""
        key, wanted, parts = f"{kind}/{fragment.name}", fragment.start, []
        end = fragment.start + fragment.count
        for held in sorted(self._stretches[key], key=lambda held: held.start):
            if held.start <= wanted < min(held.stop, end):
                stop = min(held.stop, end)
                parts.append(held.file.get_slice(key)[wanted - held.start : stop - held.start])
                wanted = stop
        if wanted < end:
            raise ValueError(f"{self.folder} lacks a process's part of {key}; resume from an older step, or with --resume no")
        return torch.cat(parts)
