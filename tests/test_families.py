"""Families of language models other than Qwen3: the same calls work, or the refusal says why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import BITS, random_bits, tiny_text_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from bitdance.generate import generate_bits
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.mask import dense_mask

pytestmark = pytest.mark.slow

D, V = 32, 50
TINY: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 512,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
TESTED: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "qwen2": {},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "smollm3": {},  # every fourth layer without positions; here both have them
    "olmo2": {},  # norms behind attention and MLP
    "phi3": {},  # queries, keys and values in one matrix
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},  # multiplies its inputs by √D
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "glm4": {"head_dim": 8},  # rotates half of each head
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **TINY | TESTED.get(family, {}) | changes)


def backbone(family: str, **changes: Any) -> Backbone:
    """Random weights, large enough for every token to matter."""
    made = Backbone.from_config(config(family, **changes), generator=seeded(0)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    return made


@pytest.fixture(params=TESTED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_causal_calls_are_the_family_s_own(family: str) -> None:
    ours = backbone(family)
    original = AutoModelForCausalLM.from_config(config(family), attn_implementation="eager").eval()
    original.load_state_dict(ours.lm.state_dict())
    ids = torch.randint(V, (2, 12), generator=seeded(1))
    expected = original(ids).logits
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(ours.logits(ours(ours.embed(ids))), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_the_block_causal_mask_is_obeyed_and_cached_blocks_give_the_same(family: str) -> None:
    ours = backbone(family)
    x_BLD = torch.randn(2, 12, D, generator=seeded(2))
    block_BL = torch.tensor([[-1] * 4 + [0] * 4 + [1] * 4] * 2)
    mask = dense_mask(torch.zeros_like(block_BL), block_BL)
    whole = ours(x_BLD, mask=mask)
    assert (ours(x_BLD) - whole).abs().max() > 1e-2
    later = x_BLD.clone()
    later[:, 8:] += 1
    assert torch.equal(ours(later, mask=mask)[:, :8], whole[:, :8])
    inside = x_BLD.clone()
    inside[:, 7] += 1
    assert (ours(inside, mask=mask)[:, 4] != whole[:, 4]).any(-1).all()

    cache = ours.new_cache()
    parts = [ours(x_BLD[:, a : a + 4], cache=cache, causal=a == 0) for a in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert (ours(x_BLD, position_BL=3 * torch.arange(12)[None]) - ours(x_BLD)).abs().max() > 1e-3


@torch.no_grad()
def test_a_grown_vocabulary_keeps_the_old_scores_and_survives_the_disk(family: str, tmp_path: Path) -> None:
    ours = backbone(family)
    ids = torch.randint(V, (1, 9), generator=seeded(3))
    before = ours.logits(ours(ours.embed(ids)))
    ours.grow_vocabulary(V + 7)
    grown = ours.logits(ours(ours.embed(ids)))
    torch.testing.assert_close(grown[..., :V], before, rtol=0, atol=1e-6 * float(before.abs().max()))
    ours.save_pretrained(tmp_path)
    new = torch.tensor([[1, V + 6, 3]])
    again = Backbone.from_pretrained(tmp_path).eval()
    assert again.vocabulary_size == V + 7
    assert torch.equal(again.logits(again(again.embed(new))), ours.logits(ours(ours.embed(new))))


def test_a_model_of_the_family_learns_and_generates(family: str) -> None:
    text_tokenizer = tiny_text_tokenizer()
    lm = Backbone.from_config(config(family, vocab_size=len(text_tokenizer)), generator=seeded(0))
    head = BinaryDiffusionHead(HeadConfig(BITS, D, 128, depth_latent=1, depth_adanln=1, parallel_num=4), seeded(0))
    torch.manual_seed(0)
    model = BitDanceModel(None, text_tokenizer, Projector(BITS, D), lm, head)
    document = [TextPiece([5, 6, 7], True), ImagePiece(random_bits(4, 4)), TextPiece([8, 9], True)]
    batch = build_batch([document], 2, model.special)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(8):
        losses = model(batch, seeded(0), flip_max=0.0, text_weight=1.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append(losses.total.item())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert seen[-1] < 0.9 * seen[0]
    bits_BChw = generate_bits(model.eval(), ["a red cube", "a ball"], 4, 4, Sampling(2, 2.0), [seeded(1), seeded(2)])
    assert bits_BChw.shape == (2, BITS, 4, 4) and bool((bits_BChw.abs() == 1).all())
    alone = generate_bits(model, ["a red cube"], 4, 4, Sampling(2, 2.0), [seeded(1)])
    assert torch.equal(alone[0], bits_BChw[0])


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "sliding_attention"),
        ("mamba", {}, "linear_attention"),
        ("mistral", {"sliding_window": 4096}, "attention ends after 4096 tokens"),
        ("cohere", {}, "logit_scale = 0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        ("gpt2", {}, "positions are not rotary"),
        ("bloom", {}, "attention by itself"),
        ("bart", {}, "an encoder with a decoder"),
    ],
)
def test_a_family_that_cannot_serve_is_refused_with_the_reason(family: str, changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        backbone(family, **changes)


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "doge"])
def test_layers_that_lose_the_mask_on_the_way_are_noticed_in_the_first_call(family: str) -> None:
    ours = backbone(family)
    with pytest.raises(ValueError, match="Attention did not get the mask as Backbone gives it"):
        ours(torch.zeros(1, 3, D))
