"""Training a class-conditional model: labels, batches that depend on nothing else, exact resuming, ZeRO, what is saved."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_training import NAMES, batch, check_resuming, draw_pictures, training_config
from PIL import Image
from test_engine import metrics

from bitdance import load_pipeline
from bitdance.kinds.class_patch.noise import ClassNoise
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.cli import export
from stages.config import DataConfig, load_config
from stages.data.crops import square_crop
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.engine import checkpoint
from stages.engine.loader import step_generator
from stages.engine.loop import train
from stages.recipes.class_patch.config import ClassPatchTraining, ClassTrainingConfig
from stages.recipes.class_patch.recipe import ClassPatchRecipe
from stages.recipes.tokenizer.coding import encode_input
from stages.recipes.tokenizer.input import TokenizerInput

pytestmark = pytest.mark.slow

MODEL = {
    "dim": 32,
    "n_layer": 2,
    "n_head": 2,
    "diff_dim": 64,
    "diff_layers": 2,
    "diff_adanln_layers": 1,
    "cls_token_num": 3,
    "parallel_num": 4,
    "diff_batch_mul": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders named after their classes, as shards of pictures and of bits, and a random tokenizer of 4 × 4 pixels a
    token."""
    home = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8)).eval()
    tokenizer.save_pretrained(home / "tokenizer")
    draw_pictures(home, 24, 20)
    pack(FolderSource(home / "photos", FolderOptions(fit="none", classes=True)), home / "whole", PackOptions())
    encode_input(tokenizer, TokenizerInput([str(home / "pictures")]), home / "bits", PackOptions(), mirror=True)
    return home


def config(home: Path, data: str = "bits", out: str = "run", **changes: Any) -> ClassTrainingConfig:
    own = {"tokenizer": str(home / "tokenizer"), "model": MODEL}
    return training_config(ClassTrainingConfig, "class_patch", ClassPatchTraining, home / out, home / data, changes, **own)


def tensors(batch: Any) -> dict[str, torch.Tensor]:
    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "noise"}
    found |= {f.name: getattr(batch.noise, f.name) for f in dataclasses.fields(batch.noise)}
    return {name: part for name, part in found.items() if part is not None}


def same(one: Any, other: Any) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("data", ["bits", "whole"])
def test_a_batch_is_a_function_of_its_samples_alone(home: Path, data: str) -> None:
    first, second = (ClassPatchRecipe(config(home, data, crop_share=0.7, mirror=data == "whole")) for _ in range(2))
    far = batch(first, range(100, 104))
    batch(second, range(50, 54))
    assert same(far, batch(second, range(100, 104)))
    assert not same(far, batch(second, range(101, 105)))


def test_the_loss_of_samples_does_not_depend_on_how_they_are_batched(home: Path) -> None:
    recipe = ClassPatchRecipe(config(home))
    with torch.no_grad():
        whole = recipe.module.rows(batch(recipe, range(0, 6))).sum()
        parts = sum(recipe.module.rows(batch(recipe, part)).sum() for part in (range(0, 2), range(2, 6)))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=0)


def test_joined_noise_is_that_of_the_pictures(home: Path) -> None:
    shape = ClassPatchRecipe(config(home)).module.model.config
    apart = [ClassNoise.draw(1, shape, True, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    joined = ClassNoise.joined(apart, shape)
    M = shape.num_blocks
    for repeat in range(shape.diff_batch_mul):
        for picture, one in enumerate(apart):
            rows = slice((2 * repeat + picture) * M, (2 * repeat + picture + 1) * M)
            assert torch.equal(joined.time_K[rows], one.time_K[repeat * M : (repeat + 1) * M])
            assert torch.equal(joined.noise_KPC[rows], one.noise_KPC[repeat * M : (repeat + 1) * M])
    assert joined.flipped_BNC is not None and joined.flipped_BNC.shape == (2, 16, 8)


def test_pictures_are_encoded_on_the_way_to_the_bits_of_the_shards(home: Path) -> None:
    """Random crops come later; the middle square of the packed pictures is the picture itself."""
    pixels, bits = (ClassPatchRecipe(config(home, data)) for data in ("pictures", "bits"))
    tokenizer = pixels.tokenizer
    found = {s.key: s.bits_Chw for s in (bits.feed.data[i] for i in range(len(bits.feed.data)))}
    micro = pixels.feed.batch(range(0, 4), step_generator(0, 0, 0))
    for key, bits_Chw in zip(micro.samples, micro.batch.encoded(tokenizer), strict=True):
        assert torch.equal(bits_Chw, found[key].float())
        assert f"{key}-mirrored" in found


def test_classes_are_the_folders_in_their_order(home: Path) -> None:
    recipe = ClassPatchRecipe(config(home, "pictures"))
    assert [entry.names for entry in recipe.labels.names.entries] == [(name,) for name in NAMES]
    micro = recipe.feed.batch(range(0, 12), step_generator(0, 0, 0))
    assert {NAMES[label] for label in micro.batch.condition.tolist()} == set(NAMES)
    for name, label in zip(micro.samples, micro.batch.condition.tolist(), strict=True):
        assert name.startswith(NAMES[label])


def test_the_null_class_takes_the_place_of_a_tenth_of_the_classes(home: Path) -> None:
    recipe = ClassPatchRecipe(config(home))
    dropped = torch.cat([batch(recipe, range(start, start + 50)).noise.dropped_B for start in range(0, 2000, 50)])
    assert 0.07 < float(dropped.float().mean()) < 0.13
    assert recipe.feed.plain(recipe.feed.data, [0, 1]).noise.dropped_B is None


def test_loader_processes_get_no_weights(home: Path) -> None:
    feed = ClassPatchRecipe(config(home)).feed
    assert not [name for name, value in vars(feed).items() if isinstance(value, torch.nn.Module)]


def test_a_resumed_run_equals_an_unbroken_one(home: Path) -> None:
    check_resuming(ClassPatchRecipe, config, home, data="whole", crop_share=0.8, mirror=True)


def test_what_is_saved_makes_pictures_of_its_classes(home: Path) -> None:
    settings = config(home, "bits", "saved", steps=2, defaults={"guidance_scale": 2.5, "num_inference_steps": 3}, ema=0.5)
    train(ClassPatchRecipe(settings), settings)
    assert {"loss", "heldout/velocity", "images_per_s", "tokens_per_s"} <= set().union(*metrics(home / "saved"))
    pipe = load_pipeline(checkpoint.step_folder(home / "saved", 2) / "model", "cpu")
    assert pipe.kind == "class_patch" and pipe.names.number("cow") == 2
    out = pipe(["cow", "ant"], seed=[1, 2])
    assert out.classes == [2, 0] and out.images[0].size == (16, 16)
    assert pipe.model.extras["card"]["stages"][-1]["steps"] == 2
    going_on = config(home, "bits", "later", steps=1, init=str(home / "saved"))
    recipe = ClassPatchRecipe(going_on)
    for name, tensor in pipe.model.network.state_dict().items():
        assert torch.equal(recipe.module.model.state_dict()[name], tensor), name


def test_a_run_is_exported_in_another_dtype_with_further_facts(home: Path, tmp_path: Path) -> None:
    settings = config(home, "bits", "exported", steps=1)
    train(ClassPatchRecipe(settings), settings)
    facts = tmp_path / "facts.json"
    facts.write_text('{"card": {"by": "me"}}')
    run, out = str(home / "exported"), str(tmp_path / "out")
    assert export([run, out, "--dtype", "bfloat16", "--extras", str(facts)]) == 0
    pipe = load_pipeline(out, "cpu", torch.bfloat16)
    assert pipe.model.extras["card"]["by"] == "me" and pipe.model.extras["card"]["recipe"] == "class_patch"
    whole = load_pipeline(checkpoint.model_folder(run), "cpu")
    for name, tensor in whole.model.network.state_dict().items():
        assert torch.equal(pipe.model.network.state_dict()[name], tensor.bfloat16()), name
    assert export([run, out]) == 2  # nothing is overwritten
    assert export([run, str(tmp_path / "other"), "--format", "diffusers"]) == 2 and not (tmp_path / "other").exists()
    (checkpoint.step_folder(home / "exported", 1) / "model" / "classes.json").write_text("{}")  # damaged
    assert export([run, str(tmp_path / "other")]) == 2 and not (tmp_path / "other").exists()


def test_zero_2_in_one_process_learns_the_same(home: Path) -> None:
    for stage in (0, 2):
        settings = config(home, "bits", f"zero{stage}", zero_stage=stage, ema=0.0)
        train(ClassPatchRecipe(settings), settings)
    plain, parted = ([row["loss"] for row in metrics(home / f"zero{stage}") if "loss" in row] for stage in (0, 2))
    assert plain == pytest.approx(parted, rel=1e-5)


def test_decay_spares_vectors_and_what_is_named(home: Path) -> None:
    """With a learning rate of (nearly) nothing but decay, spared weights stay where they are."""
    settings = config(home, "bits", "decay", lr=1e-3, weight_decay=100.0, no_decay=("vectors", "cls_embedding"), steps=1, ema=0.0)
    recipe = ClassPatchRecipe(settings)
    before = {name: p.detach().clone() for name, p in recipe.module.named_parameters()}
    train(recipe, settings)
    ratio = {name: float((p.detach() / before[name]).median()) for name, p in recipe.module.named_parameters()}
    assert ratio["model.layers.0.attention.wqkv.weight"] == pytest.approx(0.9, abs=0.05)
    assert ratio["model.cls_embedding.weight"] == pytest.approx(1.0, abs=0.05)
    assert ratio["model.norm.weight"] == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="no_decay names \\['nothing'\\]"):
        settings = config(home, "bits", "named", no_decay=("nothing",), steps=1)
        train(ClassPatchRecipe(settings), settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 18}, "class_patch.size = 18; a multiple of the tokenizer's downsampling 4"),
        ({"class_count": 4}, "class_count = 4, but there are 3 classes"),
        ({"size": 32}, "the model reads (8, 8, 8); encode pictures of 32×32 pixels"),
        ({"model": {**MODEL, "parallel_num": 9}}, "class_patch.model: grid = 4"),
        ({"model": {"dim": 32}}, "class_patch.model lacks n_layer"),
    ],
)
def test_what_does_not_fit_is_refused(home: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^") as error:
        batch(ClassPatchRecipe(config(home, **changes)), range(2))
    assert words in str(error.value)


def test_a_label_without_a_class_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.json"
    names.write_text('["ant", "bee"]')
    with pytest.raises(ValueError, match=r"sample cow_.*: unknown class 'cow'"):
        batch(ClassPatchRecipe(config(home, classes=str(names))), range(12))
    names.write_text('{"0": "cow", "1": "ant", "3": "bee"}')
    with pytest.raises(ValueError, match="classes 2 are missing"):
        ClassPatchRecipe(config(home, classes=str(names)))
    names.write_text('["cow", "ant", "bee"]')
    recipe = ClassPatchRecipe(config(home, classes=str(names)))
    micro = recipe.feed.batch(range(12), step_generator(0, 0, 0))
    assert all(
        name.startswith(("cow", "ant", "bee")[label]) for name, label in zip(micro.samples, micro.batch.condition.tolist())
    )


def test_numbers_as_labels_must_have_no_gap(home: Path, tmp_path: Path) -> None:
    table = home / "photos" / "labels.jsonl"
    for numbers, fine in (((0, 1, 2), True), ((0, 1, 3), False)):
        lines = [f'{{"file": "{NAMES[n % 3]}/{n}.png", "class": {numbers[n % 3]}}}' for n in range(12)]
        table.write_text("\n".join(lines))
        shards = tmp_path / f"shards{fine}"
        pack(FolderSource(home / "photos", FolderOptions(size=16, classes=True, table="labels.jsonl")), shards, PackOptions())
        settings = dataclasses.replace(config(home, "pictures"), data=DataConfig(train=(str(shards),)))
        if fine:
            assert len(ClassPatchRecipe(settings).labels) == 3
        else:
            with pytest.raises(ValueError, match="classes 0 to 3 without 2"):
                ClassPatchRecipe(settings)
    table.unlink()


def test_a_picture_without_a_folder_has_no_class(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "alone.png")
    (skipped,) = FolderSource(tmp_path, FolderOptions(size=16, classes=True))
    assert skipped.reason == "no class"


def test_crops_become_rarer_and_end(home: Path) -> None:
    feed = ClassPatchRecipe(config(home, "whole", crop_share=0.5, crop_decay=(2, 4))).feed
    share = [
        sum(feed._crops(epoch, torch.Generator().manual_seed(seed)) for seed in range(400)) / 400 for epoch in (0, 2.9, 3.5, 4, 9)
    ]
    assert share[0] == 1 and share[1] == 1 and 0.4 < share[2] < 0.6 and share[3:] == [0, 0]
    with pytest.raises(ValueError, match=r"crop_decay = \[4, 2\]; two epochs"):
        ClassPatchTraining(crop_decay=(4, 2))


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (33, 32), (16, 200)])
def test_a_crop_is_a_square_of_the_size(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    middle = square_crop(picture, 16)
    assert middle.size == (16, 16)
    found = {square_crop(picture, 16, 0.5, torch.Generator().manual_seed(seed)).tobytes() for seed in range(20)}
    assert len(found) > 10
    if size == (64, 64):
        halved = np.asarray(picture, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(middle) - halved).max() <= 2  # rounded twice


def test_the_config_of_another_recipe_is_not_read_as_this_one(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    text = 'recipe = "class_patch"\n[run]\nout = "x"\n[data]\ntrain = ["a"]\n[class_patch]\ntokenizer = "t"\n'
    path.write_text(text + '[class_patch.model]\ndim = "wide"\n')
    with pytest.raises(ValueError, match="class_patch.model.dim = 'wide'"):
        load_config(path)
    path.write_text(text + "[class_patch.model]\ndepth = 2\n")
    with pytest.raises(ValueError, match="unknown key class_patch.model.depth"):
        load_config(path)
    path.write_text(text.replace("tokenizer =", "tokeniser ="))
    with pytest.raises(ValueError, match=r"unknown key class_patch.tokeniser; did you mean class_patch.tokenizer\?"):
        load_config(path)
    path.write_text(text.replace("[data]\n", "[data]\nmix = {256 = 1}\n"))
    with pytest.raises(ValueError, match="data.mix: recipe 'class_patch' reads data.train alone"):
        load_config(path)
