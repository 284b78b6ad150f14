"""How every command of training runs: what a user can mend is one line and exit code 2."""

import os
import sys
from collections.abc import Callable, Sequence

from bitdance.cli import report

EXTRAS = {  # what brings the packages that an installation may lack
    "train": ("deepspeed", "webdataset", "tensorboard", "torchmetrics", "accelerate", "peft"),
    "remote": ("fsspec", "aiohttp", "braceexpand"),
    "icons": ("resvg_py",),
    "compare": ("vector_quantize_pytorch", "matplotlib"),
    "quantize": ("torchao", "bitsandbytes"),
    "diffusers": ("diffusers",),
}


def guarded(prog: str, body: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Run `body`; what a user did wrong, or this machine lacks, becomes one line and exit code 2.

    A reader of the output that has gone (`| head`) is no mistake: what was done counts.
    """
    try:
        code = body(list(sys.argv[1:] if argv is None else argv))
        _flush()
        return code
    except BrokenPipeError:
        # without this the interpreter would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        report("SIGINT", "stopped", prog)
        return 130
    except Exception as error:
        reason = _mistake(error)
        if reason is None:
            raise
    report(reason, prog=prog)
    return 2


def _flush() -> None:
    """Write out what was printed, so that a full disk or a reader that has gone shows here. It may be closed from the start."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"standard output cannot be written: {error.strerror}") from None


def _mistake(error: Exception) -> str | None:
    """What a user can mend, in one line that cannot steer a terminal; None for our own mistakes."""
    from safetensors import SafetensorError

    if isinstance(error, ImportError):
        ours = (error.name or "").partition(".")[0] in ("stages", "distill", "bitdance", "lfq_tokenizer")
        reason = None if ours else _missing(error)
    elif isinstance(error, MemoryError):
        reason = f"not enough memory{f' ({error})' if str(error) else ''}; give it smaller inputs or fewer at once"
    elif isinstance(error, RecursionError):
        reason = "an input is nested too deeply"
    elif isinstance(error, ValueError | OSError | FloatingPointError | SafetensorError):
        reason = "; ".join((str(error), *getattr(error, "__notes__", ())))
    else:
        reason = None
    return reason


def _missing(error: ImportError) -> str:
    """What to install; an error that says so itself is taken at its word."""
    if "pip install" in str(error) or error.name is None:
        return str(error)
    package = error.name.partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), "train")
    return f"this needs the package {package}, which is not installed; pip install 'bitdance[{extra}]'"
