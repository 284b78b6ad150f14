"""A tokenizer comes out of the published `.pt` layouts exactly, and nothing that such a file says is ever run."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN, case

import stages.cli
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.pt_file import read_pt
from lfq_tokenizer.weights import read_safetensors

pytestmark = pytest.mark.slow

TINY = TokenizerConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8)


def weights(config: TokenizerConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = LFQTokenizer(config).state_dict()
    return {name: torch.randn(t.shape, generator=generator).to(dtype) for name, t in state.items()}


def generator_file(path: Path, vae: dict[str, torch.Tensor], **changes: Any) -> Path:
    """The layout of a class-conditional generator: `vae` is in `ema`, other numbers are in `model`."""
    body = read_safetensors(GOLDEN / "imagenet" / "bitdance_1x.safetensors")
    content = {
        "model": {**body, **{f"vae.{name}": t + 1 for name, t in vae.items()}},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
        "epochs": 800,
        "args": argparse.Namespace(lr=1e-4, model="BitDance-B", ema=True, sizes=[256]),
        "ema": {**body, **{f"vae.{name}": t for name, t in vae.items()}},
        **changes,
    }
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def test_a_generator_file_gives_the_tokenizer_whose_numbers_were_recorded(tmp_path: Path) -> None:
    vae = read_safetensors(GOLDEN / "t2i_ckpt" / "ae.safetensors")
    tokenizer, report = read_pt(generator_file(tmp_path / "bitdance.pt", vae))
    assert tokenizer.config == TokenizerConfig.from_published(read_json(GOLDEN / "t2i_ckpt" / "ae_config.json"))
    assert (report.state_dict, report.prefix) == ("ema", "vae.")
    assert report.unread == ("model", "optimizer", "epochs", "args")
    assert report.ignored["head"] == 26 and report.ignored["layers"] == 12 and "vae" not in report.ignored
    _, recorded = case("ae/encode")
    with torch.no_grad():
        assert torch.equal(tokenizer.float().encode(recorded["in.image"]), recorded["out.bits"].float())


def test_without_averaged_weights_the_model_is_taken(tmp_path: Path) -> None:
    tokenizer, report = read_pt(generator_file(tmp_path / "x.pt", weights(), ema=None))
    assert report.state_dict == "model"
    assert torch.equal(tokenizer.encoder.conv_in.weight, weights()["encoder.conv_in.weight"] + 1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_tokenizer_file_may_hold_losses_beside_it(tmp_path: Path, zipped: bool, prefix: str) -> None:
    state = {f"{prefix}{name}": torch.nn.Parameter(t) for name, t in weights().items()}
    state |= {"loss.discriminator.main.0.weight": torch.ones(3), "loss.logvar": torch.zeros(()), "quantize.mask": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    tokenizer, report = read_pt(tmp_path / "t.pt")
    assert report.ignored == {"loss": 2, "quantize": 1} and report.unread == ("epoch",)
    assert all(torch.equal(t, weights()[name]) for name, t in tokenizer.state_dict().items())


def test_a_bare_state_dict_is_read_too(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "t.pt")
    assert read_pt(tmp_path / "t.pt")[1].state_dict == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("generative", [False, True])
def test_converting_keeps_every_value_and_dtype(tmp_path: Path, capsys: Any, dtype: torch.dtype, generative: bool) -> None:
    config = TokenizerConfig(ch=32, ch_mult=(1, 2, 1), num_res_blocks=2, z_channels=8, gan_decoder=generative)
    state = weights(config, dtype=dtype)
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].to(memory_format=torch.channels_last)
    state["decoder.norm_out.bias"] = state["decoder.norm_out.bias"].float()  # a file may mix dtypes
    torch.save({"state_dict": {**state, "loss.x": torch.ones(1)}}, tmp_path / "t.pt")
    assert stages.cli.tokenizer(["convert", str(tmp_path / "t.pt"), str(tmp_path / "new" / "model")]) == 0
    printed = capsys.readouterr().out
    assert f"{sum(t.numel() for t in state.values()):,} in" in printed and "loss.* (1)" in printed
    assert ("generative decoder" if generative else "plain decoder") in printed
    back = read_safetensors(tmp_path / "new" / "model" / "ae.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in state.items())
    assert LFQTokenizer.from_pretrained(tmp_path / "new" / "model").config == config


# Hostile and broken files


class Hostile:
    """Creates a file when it is un-pickled the ordinary way."""

    def __init__(self, marker: Path, how: Any = os.system) -> None:
        self.marker, self.how = marker, how

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        code = f"open({str(self.marker)!r}, 'w')"
        return self.how, (f'echo x > "{self.marker}"' if self.how is os.system else code,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", [os.system, eval, exec])
@pytest.mark.parametrize("place", ["args", "namespace", "tensor", "optimizer"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path, zipped: bool, how: Any, place: str) -> None:
    marker = tmp_path / "it-ran"
    hostile = Hostile(marker, how)
    ema = {f"vae.{name}": t for name, t in weights().items()}
    content: dict[str, Any] = {"ema": ema, "args": argparse.Namespace(lr=1.0), "optimizer": {}}
    if place == "namespace":
        content["args"] = argparse.Namespace(lr=hostile)
    elif place == "tensor":
        ema["vae.encoder.extra"] = hostile
    else:
        content[place] = hostile
    torch.save(content, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"t.pt asks for .*{how.__name__}, which could run code; refused") as error:
        read_pt(tmp_path / "t.pt")
    assert "weights_only" not in str(error.value)  # torch's own message tells how to switch the protection off
    assert not marker.exists()
    assert stages.cli.tokenizer(["convert", str(tmp_path / "t.pt"), str(tmp_path / "out")]) == 2
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_the_hostile_file_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


def test_a_plain_pickle_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_bytes(pickle.dumps({"state_dict": Hostile(tmp_path / "it-ran")}, protocol=2))
    with pytest.raises(ValueError, match="refused|no readable"):
        read_pt(tmp_path / "t.pt")
    assert not (tmp_path / "it-ran").exists()


def test_a_class_that_is_not_data_is_named(tmp_path: Path) -> None:
    generator_file(tmp_path / "x.pt", weights(), args={"out": Path("runs")})
    with pytest.raises(ValueError, match=r"asks for pathlib\.\w*Path, which could run code"):
        read_pt(tmp_path / "x.pt")


def test_reading_leaves_torchs_list_of_safe_classes_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    assert argparse.Namespace not in before
    read_pt(generator_file(tmp_path / "x.pt", weights()))
    with pytest.raises(FileNotFoundError):
        read_pt(tmp_path / "none.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_what_another_package_has_declared_safe_is_refused_all_the_same(tmp_path: Path) -> None:
    torch.save({"ema": {}, "args": Hostile(tmp_path / "it-ran", eval)}, tmp_path / "t.pt")
    with torch.serialization.safe_globals([(eval, "builtins.eval"), (eval, "__builtin__.eval")]):
        with pytest.raises(ValueError, match="could run code; refused"):
            read_pt(tmp_path / "t.pt")
    assert not (tmp_path / "it-ran").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    whole = generator_file(tmp_path / "whole.pt", weights()).read_bytes()
    cases = [b"", b"\x80", b"hello world\n" * 99, whole[: len(whole) // 2], whole[:40], bytes(1000), json.dumps({}).encode()]
    cases.append((GOLDEN / "t2i_ckpt" / "ae.safetensors").read_bytes())
    for content in cases:
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.pt .*no readable \.pt file.*nothing in it was run"):
            read_pt(tmp_path / "broken.pt")


def test_a_flipped_byte_ends_in_our_error_or_in_a_tokenizer(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(TokenizerConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=1))}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    start = whole.index(b"data.pkl")
    for i in range(150):
        place = start + 31 * i
        (tmp_path / "f.pt").write_bytes(whole[:place] + bytes([whole[place] ^ (1 + i % 255)]) + whole[place + 1 :])
        try:
            read_pt(tmp_path / "f.pt")
        except ValueError as error:
            assert "f.pt" in str(error)


# Strictness


def altered(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {**weights(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (altered(encoder__norm_out__bias=None), "missing encoder.norm_out.bias"),
        (altered(decoder__extra=torch.ones(2)), r"unexpected decoder.extra \[2\]"),
        (altered(decoder__conv_out__bias=torch.ones(4)), r"decoder.conv_out.bias has shape \[4\], expected \[3\]"),
        (altered(encoder__conv_in__weight=None), "no tensor encoder.conv_in.weight"),
        (altered(encoder__conv_in__weight=torch.ones(32)), "expected four dimensions"),
        (altered(encoder__down__1__block__0__conv1__weight=torch.ones(40, 32, 3, 3)), "not whole multiples"),
        (altered(encoder__down__0__block__0__conv1__weight=None), "no tensor encoder.down.0"),
        (altered(decoder__conv_in__weight=torch.ones(64, 9, 3, 3)), "reads 9 channels; expected 8, or 16 with noise"),
        (altered(decoder__conv_out__bias=torch.ones(3, dtype=torch.int64)), "torch.int64 .*; expected a plain tensor"),
        (altered(decoder__conv_out__bias=torch.ones(3).to_sparse()), "torch.sparse_coo; expected a plain tensor"),
        (altered(decoder__conv_out__bias=[1.0]), "is a list; expected a plain tensor"),
        (altered(vae__encoder__conv_in__weight=torch.ones(1)), "as encoder.* and another as vae.encoder"),
        ({"encode.conv_in.weight": torch.ones(1)}, "holds no tokenizer: .* among encode"),
        ({}, "holds no tokenizer: .* among no keys"),
    ],
)
def test_what_is_not_exactly_one_tokenizer_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    torch.save({"state_dict": state}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=message):
        read_pt(tmp_path / "t.pt")


def test_a_generator_without_its_tokenizer_half_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Give a tokenizer's .pt, or a generator's with its vae"):
        read_pt(generator_file(tmp_path / "x.pt", {}))
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list; expected a dictionary"):
        read_pt(tmp_path / "list.pt")


def test_converting_overwrites_nothing_and_takes_no_nan(tmp_path: Path, capsys: Any) -> None:
    torch.save(weights(), tmp_path / "t.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    assert stages.cli.tokenizer(["convert", str(tmp_path / "t.pt"), str(tmp_path / "full")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    state = weights()
    state["decoder.conv_in.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert stages.cli.tokenizer(["convert", str(tmp_path / "nan.pt"), str(tmp_path / "out")]) == 2
    assert "nan.pt: decoder.conv_in.bias hold NaN" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "nan.pt", "t.pt"]
