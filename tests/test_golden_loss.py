"""A change that should not alter numbers leaves the loss as it was: 100 steps of the debug generator against recorded values.

Recorded with torch 2.13.0 on an x86-64 CPU with AVX-512; with AVX2, and without either, the last of them is off by 6e-5. After a
change that is meant to alter numbers, `python tests/test_golden_loss.py` prints them anew.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.cli import train
from stages.data.bits import pack_bits
from stages.data.pack import PackOptions, pack
from stages.data.sample import CaptionedPicture

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS = (1, 2, 5, 10, 20, 40, 60, 80, 100)
VISION = {1: 3.03018, 2: 2.67925, 5: 2.14185, 10: 1.54172, 20: 0.98829, 40: 0.454479, 60: 0.610335, 80: 0.307678, 100: 0.221255}
TEXT = {1: 5.57978, 2: 5.41469, 5: 4.95742, 10: 4.64478, 20: 4.07922, 40: 3.11733, 60: 2.77793, 80: 2.51971, 100: 2.3224}


class Bits:
    """Two patterns of bits, with captions that tell them apart."""

    expected = 12

    def __iter__(self):
        for k in range(self.expected):
            bits_Chw = torch.ones(8, 8, 8)
            bits_Chw[: 1 + k % 7, :: 1 + k % 3] = -1
            captions = [f"pattern {k % 7} in {'red' if k % 3 else 'blue'}"]
            blank = Image.new("RGB", (16, 16))
            yield CaptionedPicture(f"p{k:02d}", blank, captions, encoded=pack_bits(bits_Chw), ending="bits")

    def describe(self):
        return {"name": "patterns"}


def losses(place: Path) -> dict[int, tuple[float, float]]:
    """Step → (vision, text) of a run of 100 steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8))
    tokenizer.save_pretrained(place / "tokenizer")
    pack(Bits(), place / "bits", PackOptions(5000, 0.01, False))
    changes = [f"run.out={place / 'run'}", f"data.train={json.dumps([str(place / 'bits')])}", f"run.steps={max(STEPS)}"]
    changes += [f"generator.tokenizer={place / 'tokenizer'}", "data.row_tokens=200", "data.mix={16 = 1}"]
    changes += ["run.validate_every=1000", "run.sample_every=1000", "run.save_every=1000", "run.precision=float32"]
    config = str(ROOT / "configs" / "debug" / "generator.toml")
    assert train([config, *(part for change in changes for part in ("--set", change))]) == 0
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["vision"], row["text"]) for row in rows if "vision" in row and row["step"] in STEPS}


def test_the_loss_of_100_steps_is_the_recorded_one(tmp_path: Path) -> None:
    found = losses(tmp_path)
    assert tuple(found) == STEPS
    for step, (vision, text) in found.items():
        assert vision == pytest.approx(VISION[step], rel=3e-4), step
        assert text == pytest.approx(TEXT[step], rel=3e-4), step
    assert found[100][0] < 0.5 * found[1][0]  # and it learns


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recorded = losses(Path(folder))
    for name, part in (("VISION", 0), ("TEXT", 1)):
        print(f"{name} = {{{', '.join(f'{step}: {values[part]}' for step, values in recorded.items())}}}")
