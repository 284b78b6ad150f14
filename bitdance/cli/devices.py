"""Where a command runs."""

from bitdance.cli import UsageError

DTYPES = ("float32", "bfloat16", "float16", "auto")  # "auto": bfloat16 where it is quicker than float32
DTYPE_HELP = "default: bfloat16 on cuda, else float32; auto: bfloat16 where the processor has instructions for it"
DEVICES = ("cpu", "cuda", "mps", "xpu")


def usable_device(name: str | None) -> str:
    """`name`, or without one CUDA where there is one, else the CPU. UsageError where torch cannot use it."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError(f"known kinds: {', '.join(DEVICES)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {name!r} cannot be used here ({reason}); leave --device out, or use cpu") from None
    return str(device)


def usable_dtype(name: str | None, device: str) -> str:
    """The dtype to compute in: `name`, with "auto" resolved, or without one bfloat16 on CUDA and float32 elsewhere. Warns where
    bfloat16 is slow."""
    from bitdance.precision import resolve_dtype

    return resolve_dtype(name or ("bfloat16" if device.startswith("cuda") else "float32"), device)
