"""A `.pt` file of the class-conditional release → a tokenizer folder that everything here reads."""

import os
from pathlib import Path

from lfq_tokenizer.files import whole_folder
from lfq_tokenizer.pt_file import PtReport, read_pt
from lfq_tokenizer.text import printable
from lfq_tokenizer.tokenizer import LFQTokenizer
from stages.recipes.tokenizer.coding import check_finite


def convert_pt(file: Path, out: Path) -> tuple[LFQTokenizer, PtReport]:
    """Write `ae_config.json` and `ae.safetensors` into the new folder `out`, whole or not at all; tensors keep value and dtype.

    ValueError when `out` holds anything, and for files that `read_pt` refuses or that hold a NaN.
    """
    target = Path(os.path.abspath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one")
    tokenizer, report = read_pt(file)
    check_finite(tokenizer, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as working:
        tokenizer.save_pretrained(working)
    return tokenizer, report


def summary(tokenizer: LFQTokenizer, report: PtReport) -> str:
    """What was found in the file and what was left there, for a reader."""
    config = tokenizer.config
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in tokenizer.parameters()})
    found = f"{report.state_dict or 'the file itself'}, keys {report.prefix}encoder.* and {report.prefix}decoder.*"
    ignored = ", ".join(f"{printable(name)}.* ({count})" for name, count in report.ignored.items()) or "none"
    return "\n".join(
        [
            f"config      ch {config.ch}, ch_mult {list(config.ch_mult)}, {config.num_res_blocks} residual blocks, "
            f"{config.bits} bits per token, downsampling {config.downsampling}, "
            f"{'generative' if config.gan_decoder else 'plain'} decoder",
            f"parameters  {sum(p.numel() for p in tokenizer.parameters()):,} in {', '.join(dtypes)}",
            f"taken from  {found}",
            f"ignored     keys {ignored}; entries {printable(', '.join(report.unread)) or 'none'}",
        ]
    )
