"""A `.pt` file of the class-conditional release, or a `.ckpt` of GRN → a tokenizer folder that everything here reads."""

import os
from pathlib import Path

from lfq_tokenizer.any_tokenizer import BitTokenizer
from lfq_tokenizer.files import whole_folder
from lfq_tokenizer.hbq_file import ROUNDS, is_hbq, read_hbq
from lfq_tokenizer.hbq_vae import HBQConfig
from lfq_tokenizer.pt_file import PtReport, read_content, read_pt
from lfq_tokenizer.text import printable
from stages.recipes.tokenizer.coding import check_finite


def convert_file(file: Path, out: Path, rounds: int | None = None) -> tuple[BitTokenizer, PtReport]:
    """Write `ae_config.json` and `ae.safetensors` into the new folder `out`, whole or not at all; tensors keep value and dtype.
    `rounds` of an HBQ tokenizer, whose file does not say them.

    ValueError when `out` holds anything, and for files that `read_pt` refuses or that hold a NaN.
    """
    target = Path(os.path.abspath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one")
    tokenizer: BitTokenizer
    if file.suffix == ".safetensors" or is_hbq(read_content(file)):
        tokenizer, report = read_hbq(file, rounds or ROUNDS), PtReport("", "", {}, ())
    else:
        tokenizer, report = read_pt(file)
        if rounds is not None:
            raise ValueError(f"{file} is a tokenizer with one bit per latent; --rounds is for HBQ tokenizers")
    check_finite(tokenizer, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as working:
        tokenizer.save_pretrained(working)
    return tokenizer, report


def summary(tokenizer: BitTokenizer, report: PtReport) -> str:
    """What was found in the file and what was left there, for a reader."""
    config = tokenizer.config
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in tokenizer.parameters()})
    if isinstance(config, HBQConfig):
        sizes = f"{config.latents} latents of {config.rounds} bits, widths {config.dim} and {config.dec_dim}"
        count = f"{sum(p.numel() for p in tokenizer.parameters()):,} in {', '.join(dtypes)}, of what acts on pictures"
        return f"config      HBQ, {sizes}, {config.bits} bits per token, downsampling {config.downsampling}\nparameters  {count}"
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
