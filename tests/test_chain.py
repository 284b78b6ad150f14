"""A stage goes on from the one before it only where everything that must stay has stayed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import BITS, HIDDEN, QWEN3, tiny_model

from bitdance.model import BitDanceModel
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.config import DataConfig, GeneratorTraining, OptimizerConfig, RunConfig, TrainingConfig
from stages.recipes.chain import check_bits, check_chain, encoder_hash, next_card, tokenizer_hash


def tokenizer(seed: int = 0, bits: int = BITS) -> LFQTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LFQTokenizer(TokenizerConfig(32, (1, 1), 1, bits))


@pytest.fixture
def model() -> BitDanceModel:
    model = tiny_model(P=4)
    model.tokenizer = tokenizer()
    return model


FITTING = GeneratorTraining(
    init="runs/first",
    tokenizer="runs/tokenizer",
    backbone={"hidden_size": HIDDEN, "num_hidden_layers": 2, "rope_theta": 10000.0, "vocab_size": 100},
    head={"ch_latent": 128, "depth_latent": 1, "depth_adanln": 1, "parallel_num": 4},
)


def refused(model: BitDanceModel, training: GeneratorTraining, other: LFQTokenizer | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        check_chain(model, training, other)
    return str(caught.value)


def test_what_fits_goes_on_with_its_own_times(model: BitDanceModel) -> None:
    training = replace(FITTING, head={**FITTING.head, "P_mean": -0.8, "diff_batch_mul": 3})
    head = check_chain(model, training, tokenizer())
    assert (head.P_mean, head.diff_batch_mul) == (-0.8, 3)
    assert head.to_dict() | {"P_mean": 0.0, "diff_batch_mul": 1} == model.head.config.to_dict()
    assert check_chain(model, GeneratorTraining(init="runs/first")) == model.head.config


def test_another_patch_is_refused_with_the_way_to_grow(model: BitDanceModel) -> None:
    message = refused(model, replace(FITTING, head={"parallel_num": 16}))
    assert "runs/first" in message and "4 tokens per step" in message and "16" in message and "bitdance distill" in message


@pytest.mark.parametrize(("name", "value"), [("ch_latent", 256), ("depth_latent", 2), ("use_swiglu", False), ("ch_target", 32)])
def test_another_head_is_refused(model: BitDanceModel, name: str, value: object) -> None:
    message = refused(model, replace(FITTING, head={**FITTING.head, name: value}))
    assert f"{name} = {getattr(model.head.config, name)!r}" in message and repr(value) in message
    assert "correct the config" in message


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 3), ("rope_theta", 1e6), ("head_dim", 16)])
def test_another_backbone_is_refused(model: BitDanceModel, name: str, value: object) -> None:
    message = refused(model, replace(FITTING, backbone={name: value}))
    assert f"{name} = {QWEN3[name]!r}" in message and repr(value) in message


def test_a_vocabulary_may_have_grown(model: BitDanceModel) -> None:
    check_chain(model, replace(FITTING, backbone={"vocab_size": 7}))


def test_other_bits_are_refused(model: BitDanceModel) -> None:
    message = refused(model, FITTING, tokenizer(bits=8))
    assert f"{BITS} bits" in message and "makes 8" in message and "generator.tokenizer" in message


def test_another_encoder_is_refused_and_another_decoder_is_not(model: BitDanceModel) -> None:
    other = tokenizer(seed=1)
    message = refused(model, FITTING, other)
    assert encoder_hash(tokenizer())[:12] in message and encoder_hash(other)[:12] in message
    decoder = tokenizer()
    decoder.decoder.load_state_dict(other.decoder.state_dict())
    check_chain(model, FITTING, decoder)
    assert tokenizer_hash(decoder) != tokenizer_hash(tokenizer()) and encoder_hash(decoder) == encoder_hash(tokenizer())


def pack(folder: Path, encoder: dict[str, str] | None) -> str:
    folder.mkdir()
    (folder / "pack.json").write_text(json.dumps({"source": {"name": "encoded"} | ({"encoder": encoder} if encoder else {})}))
    return str(folder / "a-000000.tar")


def test_bits_of_another_encoder_are_refused(tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(seed=1)
    good = pack(tmp_path / "good", {"sha256": encoder_hash(own), "dtype": "torch.float32"})
    half = pack(tmp_path / "half", {"sha256": encoder_hash(own, torch.bfloat16), "dtype": "torch.bfloat16"})
    pictures, url = pack(tmp_path / "pictures", None), "https://example.org/shards/a.tar"
    check_bits([good, half, pictures, url, str(tmp_path / "none" / "a.tar")], own)
    with pytest.raises(ValueError, match="encode the pictures again") as caught:
        check_bits([good], other)
    message = str(caught.value)
    assert str(tmp_path / "good" / "pack.json") in message
    assert encoder_hash(own)[:12] in message and encoder_hash(other)[:12] in message
    assert next(own.parameters()).dtype == torch.float32


def test_the_hash_in_pack_json_is_that_of_the_chain() -> None:
    from stages.recipes.tokenizer.coding import EncodedInput
    from stages.recipes.tokenizer.input import TokenizerInput

    class Nothing(TokenizerInput):
        def __init__(self) -> None: ...

        def __len__(self) -> int:
            return 0

    own = tokenizer()
    assert EncodedInput(own, Nothing()).describe()["encoder"] == {"sha256": encoder_hash(own), "dtype": "torch.float32"}


def test_the_card_grows_by_a_stage_and_names_no_place() -> None:
    config = TrainingConfig(
        "generator",
        RunConfig(out="runs/secret"),
        DataConfig(train=("shards/secret",), mix={"256": 1.0}),
        OptimizerConfig(lr=1e-4),
        generator=FITTING,
    )
    first = next_card({}, "pretrain", config, 10, 400)
    second = next_card({"card": first}, "continue", replace(config, data=replace(config.data, mix={"512": 1.0})), 5, 100)
    assert [stage["name"] for stage in second["stages"]] == ["pretrain", "continue"]
    assert second["stages"][0] == first["stages"][0]
    last = second["stages"][1]
    assert (last["steps"], last["images"], last["mix"], last["lr"]) == (5, 100, {"512": 1.0}, 1e-4)
    assert not {"secret", "runs"} & set(json.dumps(second).replace("/", " ").split())
    assert len(first["stages"]) == 1
