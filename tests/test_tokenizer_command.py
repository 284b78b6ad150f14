"""`bitdance tokenizer` takes folders and shards of any sizes, gives back exactly what it took, and says what it left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_files import picture_bytes, write_samples

import stages.cli
import stages.recipes.tokenizer.any_size
from bitdance.picture import to_pil
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.weights import read_safetensors, write_safetensors
from stages.data.bits import pack_bits
from stages.data.sample import Skipped
from stages.data.shards import Sample, ShardDataset, ShardIndex
from stages.measure.reconstruction import Reconstruction
from stages.recipes.tokenizer.any_size import by_size
from stages.recipes.tokenizer.coding import decode_pictures
from stages.recipes.tokenizer.feed import as_images
from stages.recipes.tokenizer.input import TokenizerInput
from stages.recipes.tokenizer.perceptual import weight_shapes

pytestmark = pytest.mark.slow

S, BITS = 4, 8
SIZES = {"whole": (16, 12), "wide": (23, 9), "twin": (21, 10), "thin": (1, 30), "flat": (40, 1), "square": (13, 13)}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain and a generative tokenizer with random weights, 4 pixels a token."""
    folder = tmp_path_factory.mktemp("models")
    for name, generative in (("plain", False), ("generative", True)):
        config = TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=BITS, gan_decoder=generative)
        tokenizer, generator = LFQTokenizer(config), torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("plain", "generative")}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = stages.cli.tokenizer([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six sizes in two folders, one with captions, and three files that are of no use."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(size, seed).save(folder / ("inner" if seed % 2 else ".") / f"{name}.png")
    (folder / "whole.txt").write_text("a whole one\n\nof noise\n")
    (folder / "broken.jpg").write_bytes(b"no picture")
    picture((4, 4)).save(folder / "dot.png")
    (tmp_path / "secret.png").write_bytes((folder / "whole.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def samples(folder: Path) -> dict[str, Sample]:
    data = ShardDataset(ShardIndex.open(folder))
    return {Path(sample.attributes["file"]).stem: sample for sample in (data[i] for i in range(len(data)))}


def padded(array: np.ndarray) -> np.ndarray:
    return np.pad(array, ((0, -array.shape[0] % S), (0, -array.shape[1] % S), (0, 0)), mode="edge")


# encode


@pytest.mark.parametrize("batch", [1, 16])
def test_a_folder_of_any_sizes_becomes_shards_of_bits(run: Run, models: Any, pictures: Path, tmp_path: Path, batch: int) -> None:
    code, out, _ = run("encode", pictures, tmp_path / "bits", "--model", models["plain"], "--batch-size", batch)
    assert code == 0 and "6 samples" in out
    assert all(text in out for text in ("1 format", "1 outside the folder", "1 smaller than two tokens"))
    assert json.loads((tmp_path / "bits" / "pack.json").read_text())["skipped"] == {
        "format": 1, "outside the folder": 1, "smaller than two tokens": 1,
    }  # fmt: skip
    found = samples(tmp_path / "bits")
    assert found.keys() == SIZES.keys()
    tokenizer = LFQTokenizer.from_pretrained(models["plain"])
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        sample, array = found[name], padded(np.asarray(picture((width, height), seed)))
        with torch.no_grad():
            bits = tokenizer.encode(as_images([Image.fromarray(array)]))[0]
        assert sample.picture is None and sample.bits_Chw is not None
        assert torch.equal(sample.bits_Chw, bits.to(torch.int8))
        whole = width % S == 0 and height % S == 0
        assert sample.attributes.get("picture_size") == (None if whole else [width, height])
        assert sample.captions == (["a whole one", "of noise"] if name == "whole" else [""])


def test_shards_keep_captions_keys_and_attributes(run: Run, models: Any, tmp_path: Path) -> None:
    entries = {
        "a-1": (picture((16, 16)), {"captions": ["one"], "attributes": {"style": "x", "picture_size": [3, 3]}}),
        "a-2": (picture((18, 16)), {"captions": ["two"], "attributes": {"style": "y"}}),
        "deep/dir.x/a-3": (picture((16, 16)), {"captions": ["three"], "attributes": {}}),
    }
    write_samples(
        tmp_path / "in.tar", {k: {"png": picture_bytes(p), "json": json.dumps(c).encode()} for k, (p, c) in entries.items()}
    )
    assert run("encode", tmp_path / "in.tar", tmp_path / "bits", "--model", models["plain"])[0] == 0
    data = ShardDataset(ShardIndex.open(tmp_path / "bits"))
    one, two, three = (data[i] for i in range(3))
    assert (one.key, one.captions, one.attributes) == ("a-1", ["one"], {"style": "x", "picture_size": [16, 16]})
    assert (two.key, two.captions, two.attributes) == ("a-2", ["two"], {"style": "y", "picture_size": [18, 16]})
    assert three.key.startswith("deep_dir_x_a-3") and three.captions == ["three"]


def test_inputs_mix_and_keep_apart_what_has_one_name(run: Run, models: Any, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    picture((8, 8), 9).save(other / "whole.png")
    write_samples(tmp_path / "in.tar", {"t": {"png": picture_bytes(picture((8, 8))), "txt": b"t"}})
    inputs = [pictures / "whole.png", other, tmp_path / "in.tar", str(pictures / "*" / "*.png")]
    assert run("encode", *inputs, tmp_path / "bits", "--model", models["plain"])[0] == 0
    data = ShardDataset(ShardIndex.open(tmp_path / "bits"))
    keys = [data.key(i) for i in range(len(data))]
    assert len(set(keys)) == 6
    assert [key.rpartition("-")[0].rpartition("_")[2] for key in keys[1:]] == ["whole", "whole", "square", "thin", "wide"]
    assert keys[0] == "t"  # shards come first, then files as they were named


def test_the_same_pictures_give_the_same_bytes_that_name_the_encoder(
    run: Run, models: Any, pictures: Path, tmp_path: Path
) -> None:
    for out in ("a/bits", "b/bits"):
        assert run("encode", pictures, tmp_path / out, "--model", models["plain"])[0] == 0
    assert (tmp_path / "a/bits/pack.json").read_text() == (tmp_path / "b/bits/pack.json").read_text()
    source = json.loads((tmp_path / "a/bits/pack.json").read_text())["source"]
    assert len(source["encoder"]["sha256"]) == 64 and source["encoder"]["dtype"] == "torch.float32"


def test_too_many_useless_pictures_stop_it_and_leave_nothing(run: Run, models: Any, pictures: Path, tmp_path: Path) -> None:
    for i in range(12):
        (pictures / f"bad{i}.png").write_bytes(b"no")
    code, _, error = run("encode", pictures, tmp_path / "bits", "--model", models["plain"])
    assert code == 2 and "more than 10 of 21 pictures are unusable" in error and not (tmp_path / "bits").exists()
    assert run("encode", pictures, tmp_path / "bits", "--model", models["plain"], "--max-bad", "0.9")[0] == 0


# decode


@pytest.fixture
def encoded(run: Run, models: Any, pictures: Path, tmp_path: Path) -> Path:
    assert run("encode", pictures, tmp_path / "bits", "--model", models["plain"])[0] == 0
    return tmp_path / "bits"


@pytest.mark.parametrize("kind", ["plain", "generative"])
def test_decoding_gives_every_picture_its_true_size_whatever_the_batch(
    run: Run, models: Any, encoded: Path, tmp_path: Path, kind: str
) -> None:
    for batch in (1, 16):
        code, out, _ = run("decode", encoded, tmp_path / f"out{batch}", "--model", models[kind], "--batch-size", batch)
        assert code == 0 and "6 pictures" in out
    tokenizer = LFQTokenizer.from_pretrained(models[kind])
    for name, sample in samples(encoded).items():
        assert sample.bits_Chw is not None
        alone = to_pil(decode_pictures(tokenizer, sample.bits_Chw[None]))[0].crop((0, 0, *SIZES[name]))
        for batch in (1, 16):
            with Image.open(tmp_path / f"out{batch}" / f"{sample.key}.png") as found:
                assert found.size == SIZES[name] and np.array_equal(np.asarray(found), np.asarray(alone))


def test_a_generative_decoder_draws_for_each_picture_from_the_seed(run: Run, models: Any, encoded: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("decode", encoded, tmp_path / name, "--model", models["generative"], "--seed", seed)[0] == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    a, b, c = ([(tmp_path / x / name).read_bytes() for name in names] for x in "abc")
    assert a == b and not any(x == y for x, y in zip(a, c, strict=True))


def test_a_picture_that_exists_is_replaced(run: Run, models: Any, encoded: Path, tmp_path: Path) -> None:
    key = samples(encoded)["whole"].key
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{key}.png").write_text("old")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run("decode", encoded, tmp_path / "out", "--model", models["plain"])[0] == 0
    with Image.open(tmp_path / "out" / f"{key}.png") as found:
        assert found.size == SIZES["whole"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def bits(h: int, w: int, channels: int = BITS) -> bytes:
    return pack_bits(torch.randint(0, 2, (channels, h, w), generator=torch.Generator().manual_seed(h)) * 2 - 1)


def described(**attributes: Any) -> bytes:
    return json.dumps({"captions": ["x"], "attributes": attributes}).encode()


def test_a_foreign_shard_writes_inside_the_folder_only(run: Run, models: Any, tmp_path: Path) -> None:
    hostile = ["../../escaped", "/absolute", "a/b.c/d", "..", "plain", "a/b.c/d"]  # the fourth is no name at all
    entries = [(key, {"bits": bits(2, 2 + i), "txt": b"x"}) for i, key in enumerate(hostile)]
    for number, part in enumerate((entries[:5], entries[5:])):
        write_samples(tmp_path / f"{number}.tar", dict(part))
    code, out, error = run("decode", tmp_path / "*.tar", tmp_path / "deep" / "out", "--model", models["plain"])
    assert code == 1 and "4 pictures" in out and "1 duplicate key" in out and "left out of the shards: 2 member" in error
    assert {p.parent for p in tmp_path.rglob("*.png")} == {tmp_path / "deep" / "out"}
    assert len(list(tmp_path.rglob("*.png"))) == 4 and not (tmp_path / "escaped.png").exists()


def test_a_grid_too_small_to_decode_is_counted(run: Run, models: Any, tmp_path: Path) -> None:
    write_samples(tmp_path / "x.tar", {"one": {"bits": bits(1, 1), "txt": b"x"}, "two": {"bits": bits(1, 2), "txt": b"x"}})
    code, out, _ = run("decode", tmp_path / "x.tar", tmp_path / "out", "--model", models["plain"])
    assert code == 1 and "1 pictures" in out and "1 fewer than two tokens" in out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two.png"]


@pytest.mark.parametrize("size", [[8, 9], [4, 8], [0, 8], [8], "8x8", [8.0, 8.0], [True, 8], None])
def test_a_size_that_does_not_fit_the_grid_is_an_error(run: Run, models: Any, tmp_path: Path, size: Any) -> None:
    write_samples(tmp_path / "x.tar", {"one": {"bits": bits(2, 2), "json": described(picture_size=size)}})
    code, _, error = run("decode", tmp_path / "x.tar", tmp_path / "out", "--model", models["plain"])
    assert code == 2 and "sample one: picture_size" in error


# eval


def test_the_figures_are_those_of_each_picture_alone_without_its_padding(run: Run, models: Any, pictures: Path) -> None:
    code, out, error = run("eval", pictures, "--model", models["plain"], "--json")
    figures = json.loads(out)
    assert code == 0 and figures["skipped"] == {"format": 1, "outside the folder": 1, "smaller than two tokens": 1}
    assert "1 format" in error and any("ssim" in note for note in figures["notes"]) and "note: ssim" in error
    tokenizer, expected = LFQTokenizer.from_pretrained(models["plain"]), Reconstruction(BITS)
    for seed, (width, height) in enumerate(SIZES.values()):
        array = padded(np.asarray(picture((width, height), seed)))
        images = as_images([Image.fromarray(array)])
        with torch.no_grad():
            found = tokenizer.encode(images)
            expected.add(images[:, :, :height, :width], tokenizer.decode(found)[:, :, :height, :width], found)
    for name, value in expected.result().items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name
    tokens = sum(-(-w // S) * -(-h // S) for w, h in SIZES.values())
    assert figures["pictures"] == 6 and figures["bits_per_picture"] == pytest.approx(tokens * BITS / 6)
    assert figures["bits_per_pixel"] == pytest.approx(tokens * BITS / sum(w * h for w, h in SIZES.values()))
    assert figures["pictures_per_second"] > 0


@pytest.mark.parametrize("kind", ["plain", "generative"])
def test_the_figures_do_not_depend_on_the_batch(run: Run, models: Any, pictures: Path, kind: str) -> None:
    one, many = (json.loads(run("eval", pictures, "--model", models[kind], "--json", "--batch-size", n)[1]) for n in (1, 16))
    for name in one.keys() - {"pictures_per_second", "skipped", "notes"}:
        assert one[name] == pytest.approx(many[name], rel=1e-4), name  # a level may round the other way


def test_eval_prints_lines_and_measures_middle_squares(run: Run, models: Any, pictures: Path) -> None:
    code, out, _ = run("eval", pictures, "--model", models["plain"], "--size", 16)
    lines = dict(line.split() for line in out.splitlines())
    assert code == 0 and float(lines["bits_per_picture"]) == 16 * BITS and float(lines["bits_per_pixel"]) == 16 * BITS / 256
    for size in (4, 15, -8):
        code, _, error = run("eval", pictures, "--model", models["plain"], "--size", size)
        assert code == 2 and "give a multiple of 4 from 8 on" in error


def test_lpips_is_measured_where_its_weights_are_given(run: Run, models: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.02 * torch.randn(shape, generator=generator).abs() for name, shape in weight_shapes("alex").items()}
    save_file(weights, str(tmp_path / "alex.safetensors"), metadata={"net": "alex"})
    (tmp_path / "p").mkdir()
    picture((33, 40)).save(tmp_path / "p" / "a.png")
    arguments = ("eval", tmp_path / "p", "--model", models["plain"], "--json")
    assert json.loads(run(*arguments, "--lpips", tmp_path / "alex.safetensors")[1])["lpips"] > 0
    assert "lpips" not in json.loads(run(*arguments)[1])
    for option in ("--lpips", "--frechet-features"):
        code, _, error = run(*arguments, option, tmp_path / "none.pth")
        assert code == 2 and "none.pth are missing" in error


def test_the_picture_shows_originals_over_reconstructions(run: Run, models: Any, pictures: Path, tmp_path: Path) -> None:
    assert run("eval", pictures, "--model", models["plain"], "--picture", tmp_path / "s.png")[0] == 0
    width, height = (max(size[i] for size in SIZES.values()) for i in (0, 1))
    shown = Image.open(tmp_path / "s.png")
    assert shown.size == (6 * width, 2 * height)
    first = sorted(p.relative_to(pictures) for p in pictures.rglob("*.png") if p.stem in SIZES)[0].stem  # inner/…
    cell = shown.crop((0, 0, *SIZES[first]))
    assert np.array_equal(np.asarray(cell), np.asarray(picture(SIZES[first], list(SIZES).index(first))))
    tokenizer = LFQTokenizer.from_pretrained(models["plain"])
    array = padded(np.asarray(cell))
    with torch.no_grad():
        out = to_pil(tokenizer.decode(tokenizer.encode(as_images([Image.fromarray(array)]))))[0].crop((0, 0, *cell.size))
    below = shown.crop((0, height, cell.width, height + cell.height))
    assert np.abs(np.asarray(below).astype(int) - np.asarray(out).astype(int)).max() <= 1
    assert run("eval", pictures, "--model", models["plain"], "--picture", tmp_path / "s.txt")[0] == 2
    assert run("eval", pictures, "--model", models["plain"], "--picture", tmp_path / "no" / "s.png")[0] == 2


# What holds for all of them


def test_batches_have_one_size_keep_the_order_and_hold_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.recipes.tokenizer.any_size, "WINDOW_PIXELS", 10 * 16)
    drawn: list[int] = []
    ran: list[list[int]] = []

    def items() -> Any:
        for i in range(50):
            drawn.append(i)
            yield Skipped(str(i), "why") if i % 7 == 0 else Sample(str(i), None, None, [], {"grid": (1, 1 + i % 3)})

    def work(batch: list[Sample]) -> list[int]:
        assert len({sample.attributes["grid"] for sample in batch}) == 1
        ran.append([int(sample.key) for sample in batch])
        return [int(sample.key) * 10 for sample in batch]

    seen: list[int] = []
    for item in by_size(items(), lambda sample: sample.attributes["grid"], work, 3, 16):
        assert len(drawn) - len(seen) <= 12  # ten tokens, and what takes no room
        name = item.name if isinstance(item, Skipped) else item[0].key
        if not isinstance(item, Skipped):
            assert item[1] == int(name) * 10
        seen.append(int(name))
    assert seen == list(range(50))
    assert max(len(batch) for batch in ran) == 3 and sorted(i for batch in ran for i in batch) == [i for i in seen if i % 7]


def test_large_pictures_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.recipes.tokenizer.any_size, "BATCH_PIXELS", 100)
    sizes: list[int] = []

    def work(batch: list[Sample]) -> list[int]:
        sizes.append(len(batch))
        return [0] * len(batch)

    list(by_size([Sample(str(i), None, None, [], {}) for i in range(4)], lambda sample: (2, 2), work, 16, 16))
    assert sizes == [1, 1, 1, 1]


def test_a_folder_without_pictures_and_a_place_that_is_none_are_named(run: Run, models: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command, *out in (("encode", tmp_path / "o"), ("eval",), ("decode", tmp_path / "o")):
        code, _, error = run(command, tmp_path / "empty", *out, "--model", models["plain"])
        assert code == 2 and "empty holds no PNG, JPEG or WebP file and no shard" in error
    code, _, error = run("encode", tmp_path / "nowhere", tmp_path / "o", "--model", models["plain"])
    assert code == 2 and "nowhere" in error
    code, _, error = run("encode", "pipe:cat x", tmp_path / "o", "--model", models["plain"])
    assert code == 2 and "no such URL and no command" in error
    assert not (tmp_path / "o").exists()


def test_bits_are_not_encoded_and_pictures_are_not_decoded(
    run: Run, models: Any, encoded: Path, pictures: Path, tmp_path: Path
) -> None:
    code, _, error = run("encode", encoded, tmp_path / "o", "--model", models["plain"])
    assert code == 2 and "no usable picture among 6 (6 holds bits already" in error and not (tmp_path / "o").exists()
    code, _, error = run("eval", encoded, "--model", models["plain"])
    assert code == 2 and "no usable picture (6 holds bits already)" in error
    code, _, error = run("decode", pictures / "whole.png", tmp_path / "o", "--model", models["plain"])
    assert code == 2 and "holds a picture and no bits; encode it first" in error


def test_the_wrong_model_is_refused(run: Run, models: Any, encoded: Path, pictures: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "no-such-model", pictures):
        code, _, error = run("encode", pictures, tmp_path / "o", "--model", place)
        assert code == 2 and place.name in error
    other = TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=BITS + 1)
    LFQTokenizer(other).save_pretrained(tmp_path / "nine")
    code, _, error = run("decode", encoded, tmp_path / "o", "--model", tmp_path / "nine")
    assert code == 2 and "has 8 bits per token, the model 9" in error


def test_weights_that_are_no_numbers_are_named(run: Run, models: Any, encoded: Path, pictures: Path, tmp_path: Path) -> None:
    state = read_safetensors(models["plain"] / "ae.safetensors")
    state["encoder.conv_in.weight"][0, 0, 0, 0] = float("nan")
    (tmp_path / "nan").mkdir()
    (tmp_path / "nan" / "ae_config.json").write_bytes((models["plain"] / "ae_config.json").read_bytes())
    write_safetensors(state, tmp_path / "nan" / "ae.safetensors")
    for command in (("encode", pictures, tmp_path / "o"), ("decode", encoded, tmp_path / "o"), ("eval", pictures)):
        code, out, error = run(*command, "--model", tmp_path / "nan")
        assert code == 2 and "encoder.conv_in.weight hold NaN" in error and out == ""
    assert not (tmp_path / "o").exists()


def test_a_decoder_that_overflows_draws_no_black_picture(models: Any) -> None:
    tokenizer = LFQTokenizer.from_pretrained(models["plain"])
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(ValueError, match="the decoder gives NaN or infinity"):
        decode_pictures(tokenizer, torch.ones(1, BITS, 2, 2))


def test_half_precision_and_odd_options(run: Run, models: Any, pictures: Path, tmp_path: Path) -> None:
    # none only one token wide: torch's bfloat16 convolution of stride 2 then reads memory that nobody wrote, now and then
    (tmp_path / "wide").mkdir()
    for k in range(3):
        Image.effect_noise((20, 24), 60).convert("RGB").save(tmp_path / "wide" / f"{k}.png")
    code, out, _ = run("eval", tmp_path / "wide", "--model", models["plain"], "--dtype", "bfloat16", "--json")
    assert code == 0 and json.loads(out)["pictures"] == 3
    for option, value, message in (
        ("--device", "abacus", "--device abacus cannot be used here"),
        ("--device", "meta", "--device meta cannot be used here"),
        ("--batch-size", "0", "--batch-size 0: give at least 1"),
    ):
        code, _, error = run("encode", pictures, tmp_path / "o", "--model", models["plain"], option, value)
        assert code == 2 and message in error
    assert not (tmp_path / "o").exists()


def test_lpips_weights_that_are_missing_are_named(run: Run, tmp_path: Path) -> None:
    for heads in ((), ("--heads", tmp_path / "lin.pth")):
        code, _, error = run("lpips", tmp_path / "none.tar.gz", tmp_path / "o.safetensors", *heads)
        assert code == 2 and "none.tar.gz is missing" in error
    assert list(tmp_path.iterdir()) == []


def test_a_caption_file_that_is_no_text_costs_its_picture_only(pictures: Path) -> None:
    (pictures / "inner" / "wide.txt").write_bytes(b"\xff\xfe\xff")
    (pictures / "inner" / "thin.txt").write_text(" \n")
    found = list(TokenizerInput([pictures]).samples(lambda sample: ""))
    assert [item.reason for item in found if isinstance(item, Skipped) and "wide" in item.name] == ["captions are not UTF-8"]
    assert [item.captions for item in found if isinstance(item, Sample) and "thin" in item.attributes["file"]] == [[""]]
