"""A published file → a tokenizer folder that everything here reads: a `.pt` of the class-conditional release, a `.ckpt` of GRN, a
`.pth` of VAR or Infinity."""

import os
from pathlib import Path

from lfq_tokenizer.any_tokenizer import PictureTokenizer
from lfq_tokenizer.files import whole_folder
from lfq_tokenizer.hbq_file import ROUNDS, is_hbq, read_hbq
from lfq_tokenizer.hbq_vae import HBQConfig, HBQTokenizer
from lfq_tokenizer.pt_file import PtReport, read_content, read_pt
from lfq_tokenizer.scale_file import is_scales, read_scales
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer
from lfq_tokenizer.text import printable
from lfq_tokenizer.weights import read_safetensors
from stages.recipes.tokenizer.coding import check_finite


def convert_file(file: Path, out: Path, rounds: int | None = None, patchify: bool = False) -> tuple[PictureTokenizer, PtReport]:
    """Write `ae_config.json` and `ae.safetensors` into the new folder `out`, whole or not at all; tensors keep value and dtype.
    `rounds` of an HBQ tokenizer, whose file does not say them; `patchify`: a token of bits at every scale is 2 × 2 positions,
    which a file does not say either.

    ValueError when `out` holds anything, and for files that `read_pt` refuses or that hold a NaN.
    """
    target = Path(os.path.abspath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one")
    tokenizer: PictureTokenizer
    report = PtReport("", "", {}, ())
    content = read_safetensors(file) if file.suffix == ".safetensors" else read_content(file)
    if is_scales(content):
        tokenizer = read_scales(file)
        tokenizer = tokenizer.patchified() if patchify and tokenizer.config.quantizer == "bits" else tokenizer
    elif file.suffix == ".safetensors" or is_hbq(content):
        tokenizer = read_hbq(file, rounds or ROUNDS)
    else:
        tokenizer, report = read_pt(file)
    if rounds is not None and not isinstance(tokenizer, HBQTokenizer):
        raise ValueError(f"{file} is a tokenizer of {tokenizer.config.token}; --rounds is for HBQ tokenizers")
    if patchify and not (isinstance(tokenizer, ScaleTokenizer) and tokenizer.config.patchify):
        raise ValueError(f"{file} is a tokenizer of {tokenizer.config.token}; --patchify is for bits at every scale")
    check_finite(tokenizer, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as working:
        tokenizer.save_pretrained(working)
    return tokenizer, report


def summary(tokenizer: PictureTokenizer, report: PtReport) -> str:
    """What was found in the file and what was left there, for a reader."""
    config = tokenizer.config
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in tokenizer.parameters()})
    if isinstance(config, HBQConfig):
        sizes = f"{config.latents} latents of {config.rounds} bits, widths {config.dim} and {config.dec_dim}"
        count = f"{sum(p.numel() for p in tokenizer.parameters()):,} in {', '.join(dtypes)}, of what acts on pictures"
        return f"config      HBQ, {sizes}, {config.bits} bits per token, downsampling {config.downsampling}\nparameters  {count}"
    if isinstance(config, ScaleConfig):
        count = f"{sum(p.numel() for p in tokenizer.parameters()):,} in {', '.join(dtypes)}"
        return f"config      {config.token}, downsampling {config.downsampling}\nparameters  {count}"
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
