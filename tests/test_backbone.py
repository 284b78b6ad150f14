"""The backbone is the language model it wraps; its masks, cache, files and vocabulary."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_model import HIDDEN, QWEN3, tiny_backbone
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3ForCausalLM

from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector

CHECKPOINT = GOLDEN / "t2i_ckpt"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


@torch.no_grad()
def test_causal_wrapper_is_qwen3_for_causal_lm() -> None:
    backbone = Backbone.from_pretrained(CHECKPOINT, dtype=torch.float32)
    original = Qwen3ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    ids = torch.randint(885, (2, 21), generator=torch.Generator().manual_seed(0))
    expected = original(ids).logits
    hidden = backbone(backbone.embed(ids))
    torch.testing.assert_close(backbone.logits(hidden), expected, rtol=0, atol=1e-5)
    causal = torch.ones(21, 21, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(backbone(backbone.embed(ids), mask=causal), hidden, rtol=0, atol=1e-5)
    assert (backbone(backbone.embed(ids), causal=False) - hidden).abs().max() > 0.1


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
@torch.no_grad()
def test_other_families_carry_the_same_calls(config: type) -> None:
    backbone = Backbone.from_config(config(**SMALL, num_key_value_heads=2), generator=torch.Generator().manual_seed(0)).eval()
    for parameter in backbone.parameters():
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(2))
    block = torch.tensor([-1] * 4 + [0] * 4 + [1] * 4)
    mask = (torch.arange(12)[:, None] >= torch.arange(12)) | ((block[:, None] == block) & (block >= 0))
    whole = backbone(x, mask=mask.expand(2, 1, 12, 12))
    cache = backbone.new_cache()
    parts = [backbone(x[:, a : a + 4], cache=cache, causal=a == 0) for a in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    assert (backbone(x) - whole).abs().max() > 1e-2


@torch.no_grad()
def test_causal_steps_with_a_cache_equal_one_call() -> None:
    backbone = tiny_backbone()
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    cache = backbone.new_cache()
    parts = [backbone(part, cache=cache) for part in x.split([3, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), backbone(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_positions_are_honoured() -> None:
    backbone = tiny_backbone()
    x = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    plain = backbone(x)
    torch.testing.assert_close(backbone(x, position_BL=torch.arange(5)[None] + 7), plain, rtol=0, atol=1e-5)  # relative
    assert (backbone(x, position_BL=torch.arange(5)[None] * 3) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_rotary_frequencies_stay_exact_in_half_precision() -> None:
    """Casting weights, from here or from a module above, must not round the frequencies that turn into angles."""
    exact = tiny_backbone().lm.base_model.rotary_emb.inv_freq
    cast = torch.nn.Sequential(tiny_backbone()).to(torch.bfloat16)[0]
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast.lm.base_model.rotary_emb.inv_freq, exact) and exact.dtype == torch.float32
    x = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    far = torch.arange(6)[None] * 80
    rounded = tiny_backbone()
    for parameter in rounded.parameters():
        parameter.copy_(parameter.bfloat16().float())
    torch.testing.assert_close(cast(x.bfloat16(), far).float(), rounded(x, far), rtol=0, atol=0.06)


def test_no_mask_is_made_for_a_block_that_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding SDPA gets no mask, so the kernel groups the query heads itself."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append((kwargs["attn_mask"], kwargs["is_causal"], kwargs.get("enable_gqa", False)))
        return real(*args, **kwargs)

    backbone = tiny_backbone()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        cache = backbone.new_cache()
        backbone(torch.zeros(1, 3, HIDDEN), cache=cache)
        backbone(torch.zeros(1, 4, HIDDEN), cache=cache, causal=False)
    assert seen == [(None, True, True)] * 2 + [(None, False, True)] * 2


def test_rotary_base_is_read_and_written_where_every_version_looks(tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(CHECKPOINT)
    assert backbone.lm.config.rope_parameters["rope_theta"] == 1e6
    assert backbone.dtype == torch.bfloat16
    backbone.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == 1e6 and saved["rope_scaling"] is None
    assert str(tmp_path) not in json.dumps(saved) and str(CHECKPOINT) not in json.dumps(saved)
    again = Backbone.from_pretrained(tmp_path)
    assert again.lm.config.rope_parameters == backbone.lm.config.rope_parameters
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # without this package's attention
    assert plain.config._attn_implementation == "sdpa"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(CHECKPOINT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        Backbone.from_pretrained(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Backbone.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 4, 5000, -100])
def test_truncated_weights_are_named(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Backbone.from_pretrained(folder)


def test_weights_that_do_not_fit_are_listed(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    state["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(8)
    state["model.strange.weight"] = torch.zeros(2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        Backbone.from_pretrained(folder)
    message = str(caught.value)
    assert "missing model.norm.weight" in message and "unexpected model.strange.weight" in message
    assert "q_norm.weight has shape [8], expected [16]" in message


def test_only_the_first_ten_offenders_are_listed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}))
    with pytest.raises(ValueError, match="and 12 more") as caught:
        Backbone.from_pretrained(folder)
    assert str(caught.value).count("missing ") == 10


def sharded(folder: Path) -> dict:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {name: f"model-0000{1 + (k > 9)}-of-00002.safetensors" for k, name in enumerate(names)}
    for shard in set(weight_map.values()):
        held = {name: state[name] for name in names if weight_map[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    return {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}


def test_shards_are_read_and_checked(folder: Path) -> None:
    index = sharded(folder)
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    assert torch.equal(Backbone.from_pretrained(folder).lm.lm_head.weight, Backbone.from_pretrained(CHECKPOINT).lm.lm_head.weight)
    for shard, message in [
        ("../x.safetensors", "same folder"),
        ("x.bin", "same folder"),
        ("model-00002-of-00002.safetensors", "lm_head.weight in model-00002"),
    ]:
        file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"lm_head.weight": shard}}))
        with pytest.raises(ValueError, match=message):
            Backbone.from_pretrained(folder)
    file.write_text(json.dumps(index))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        Backbone.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_family"}, "no_such_family"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_a_config_that_cannot_serve_is_refused(folder: Path, changes: dict, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        Backbone.from_pretrained(folder)
    with pytest.raises(ValueError, match="model_type"):
        Backbone.from_config({"hidden_size": 8})


@pytest.mark.parametrize("tied", [False, True])
def test_growing_the_vocabulary(tied: bool, tmp_path: Path) -> None:
    def grown(seed: int) -> Backbone:
        backbone = tiny_backbone(vocab_size=50, tie_word_embeddings=tied)
        state = torch.get_rng_state()
        backbone.grow_vocabulary(57, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return backbone

    old, new = tiny_backbone(vocab_size=50, tie_word_embeddings=tied), grown(0)
    assert new.vocabulary_size == new.lm.config.vocab_size == 57
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old.lm, part)().weight, getattr(new.lm, part)().weight
        assert torch.equal(after[:50], before)
        assert (after[50:] - before.mean(0)).abs().max() < 0.5 * before.std()
        assert len(set(after[50:, 0].tolist())) == 7
        assert torch.equal(getattr(grown(0).lm, part)().weight, after)
        assert not torch.equal(getattr(grown(1).lm, part)().weight, after)
        assert after.requires_grad
    assert (new.lm.get_input_embeddings().weight is new.lm.get_output_embeddings().weight) is tied
    ids = torch.tensor([[1, 56]])
    assert new.logits(new(new.embed(ids))).shape == (1, 2, 57)
    new.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path)
    assert torch.equal(again.logits(again(again.embed(ids))), new.logits(new(new.embed(ids))))
    with pytest.raises(ValueError, match="57 tokens and can only grow, not shrink to 56"):
        new.grow_vocabulary(56)
    new.grow_vocabulary(57)


def test_random_weights_come_from_the_generator() -> None:
    state = torch.get_rng_state()
    one, two, other = (tiny_backbone(seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm.lm_head.weight, other.lm.lm_head.weight)
    assert Backbone.from_config(QWEN3 | {"vocab_size": 40}, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        projector = Projector(32, 5120)
        qwen3_14b = Backbone.from_config(
            {
                "model_type": "qwen3",
                "hidden_size": 5120,
                "intermediate_size": 17408,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
            }
        )
    assert sum(p.numel() for p in projector.parameters()) == 26_388_480
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "fc1.weight": (5120, 32),
        "fc1.bias": (5120,),
        "fc2.weight": (5120, 5120),
        "fc2.bias": (5120,),
    }
    assert sum(p.numel() for p in qwen3_14b.parameters()) == 14_768_307_200
