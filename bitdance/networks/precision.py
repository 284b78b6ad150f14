"""Where a model computes, and in which dtype.

A processor without instructions for bfloat16 computes it 5 to 20 times slower than float32."""

import time
import warnings
from functools import cache

import torch
from torch import nn

AUTO = "auto"
DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # what torch calls the instructions on x86 and on ARM


def usable_device(name: str | None) -> str:
    """The device `name`, or without one CUDA where there is one, else the CPU. ValueError where torch cannot use it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError(f"known kinds: {', '.join(DEVICES)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device {name!r} cannot be used here ({reason}); leave --device out, or use cpu") from None
    return str(device)


def quick_dtype(device: torch.device | str) -> str:
    """ "bfloat16" where `device` has instructions for it, which makes it quicker than float32, else "float32"."""
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type not in ("cpu", "mps") or _cpu_has_bfloat16() else "float32"


def resolve_dtype(name: str | None, device: torch.device | str) -> str:
    """What `name` means on `device`: "auto" is the quick one, None bfloat16 on CUDA and float32 elsewhere, the rest themselves.
    Warns where bfloat16 is slow."""
    if name is None:
        name = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    if name == AUTO:
        return quick_dtype(device)
    if name == "bfloat16" and (factor := slow_bfloat16(device)):
        warnings.warn(
            f"bfloat16 takes about {factor:.0f} times as long as float32 on this processor, which has no instructions for it; "
            "use float32, or auto",
            stacklevel=2,
        )
    return name


def wanted_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | None:
    """What a caller means by a dtype, its name or "auto"; None stays None. Warns where bfloat16 is slow. ValueError else."""
    if isinstance(dtype, str) and dtype in (*DTYPES, AUTO):
        dtype = resolve_dtype(dtype, device)
    elif dtype == torch.bfloat16:
        resolve_dtype("bfloat16", device)  # warns where it is slow
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def slow_bfloat16(device: torch.device | str) -> float | None:
    """How many times as long as float32 a matrix product in bfloat16 takes on a CPU without the instructions; None elsewhere."""
    return None if torch.device(device).type != "cpu" or _cpu_has_bfloat16() else _measured()


def _cpu_has_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.8 has none, and knows these two alone
        found = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}
    else:
        found = torch.cpu.get_capabilities()
    if found.get("architecture", "x86_64") == "x86_64" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False  # by the processor itself, or by ATEN_CPU_CAPABILITY
    return any(found.get(name) for name in _INSTRUCTIONS)


@cache
def _measured() -> float:
    """Measure, once and in about 0.1 s of one thread: the quickest of several products each, which other work disturbs least."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[torch.dtype, float] = {}
    try:
        with torch.inference_mode():
            for dtype in (torch.float32, torch.bfloat16):
                layer, x_RI = nn.Linear(512, 512, bias=False, dtype=dtype), torch.ones(256, 512, dtype=dtype)
                layer(x_RI)  # makes the kernel
                times[dtype] = min(_seconds(layer, x_RI) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    return max(1.0, times[torch.bfloat16] / times[torch.float32])


def _seconds(layer: nn.Module, x_RI: torch.Tensor) -> float:
    start = time.process_time()
    layer(x_RI)
    return time.process_time() - start
