"""Where a command runs."""

from bitdance.cli import UsageError

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
