"""From a checked order to a pipeline, after a look at the memory: nothing is read that cannot fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bitdance.cli.generate import Order
from bitdance.cli.memory import GB, free_bytes, free_main_memory

if TYPE_CHECKING:
    from bitdance.bench.shapes import Shape
    from bitdance.cli.needs import Needs, Setting
    from bitdance.pipeline import BitDancePipeline


def load(order: Order) -> Any:
    """The pipeline of an order, of whatever kind its model is; it shows no bar of its own, there is one over pictures."""
    pipe = order.rules.load(order)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_text(order: Order) -> "BitDancePipeline":
    """The pipeline of an order for a text model. ValueError when pictures do not fit into the memory, with what would help."""
    import torch

    from bitdance.checkpoint import load_model
    from bitdance.pipeline import BitDancePipeline

    check_memory(order)
    model = load_model(
        order.folder,
        "cpu" if order.offload else order.device,
        getattr(torch, order.dtype),
        generation_only=True,
        **order.loading,
    )
    pipe = BitDancePipeline(model, order.compile)
    if order.offload:
        pipe.enable_model_cpu_offload(order.device)
    return pipe


def check_memory(order: Order) -> None:
    """ValueError before gigabytes are read that cannot fit, naming the first remedy that would do."""
    from bitdance.bench.shapes import Shape

    shape = Shape.of_folder(order.folder)
    settings = {_setting(order, *size) for size in order.sizes}
    largest, found = max(((s, _needs(shape, s)) for s in settings), key=lambda pair: pair[1].peak)
    device, main = free_bytes(order.device), free_main_memory()
    if _fits(found, device, main):
        return
    lacking, free, place = found.peak, device, f"on {order.device}"
    if device is None or found.peak <= device:
        lacking, free, place = found.main, main, "in main memory"
    advice = next((words for words, setting in remedies(largest) if _fits(_needs(shape, setting), device, main)), None)
    remedy = f"add {advice}" if advice else "no option makes it fit; use a machine with more (bitdance doctor shows what fits)"
    raise ValueError(f"{order.model} needs about {_size(lacking)}, {_size(free or 0)} free {place}: {remedy}")


def remedies(setting: "Setting") -> Iterator[tuple[str, "Setting"]]:
    """Flags that make a setting smaller, one alone and then all of them up to there, as (flags, setting)."""
    single: list[tuple[str, dict[str, object]]] = []
    if setting.dtype == "float32":
        single.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    batch = setting.batch
    while batch > 1:
        batch //= 2
        single.append((f"--batch-size {batch}", {"batch": batch}))
    if setting.quantize is None:
        single.append(("--quantize int8", {"quantize": "int8"}))
    if setting.quantize != "int4":
        single.append(("--quantize int4", {"quantize": "int4"}))
    if setting.device == "cuda" and not setting.offload:
        single.append(("--offload", {"offload": True}))
    for words, change in single:
        yield words, replace(setting, **change)  # type: ignore[arg-type]
    flags: dict[str, str] = {}
    changes: dict[str, object] = {}
    for words, change in single:
        flag, _, value = words.partition(" ")
        flags[flag] = value
        changes |= change
        yield " ".join(f"{flag} {value}".strip() for flag, value in flags.items()), replace(setting, **changes)  # type: ignore[arg-type]


def _setting(order: Order, height: int, width: int, guided: bool) -> "Setting":
    from bitdance.cli.needs import Setting

    batch = min(order.batch_size, len(order.jobs))
    kind = "cuda" if order.device.startswith("cuda") else "cpu"
    options = (order.quantize, order.quantize_head, order.offload)
    return Setting(height, width, batch, order.dtype, kind, guided, *options, many=len(order.jobs) > batch)


def _needs(shape: "Shape", setting: "Setting") -> "Needs":
    from bitdance.cli.needs import needs

    return needs(shape, setting)


def _fits(found: "Needs", device: int | None, main: int | None) -> bool:
    return (device is None or found.peak <= device) and (main is None or found.main <= main)


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
