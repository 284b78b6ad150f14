"""The generator's recipe on tiny shards: indices become batches that do not depend on the number of processes."""

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_files import picture_bytes, write_samples

from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.config import DataConfig, GeneratorTraining, RunConfig, TrainingConfig
from stages.data.pack import PackOptions, pack
from stages.data.sample import CaptionedPicture
from stages.engine.loader import MicroBatches, micro_batches, step_generator
from stages.recipes.generator import build_recipe
from stages.recipes.generator.objective import GeneratorObjective
from stages.recipes.generator.recipe import GeneratorRecipe
from stages.recipes.tokenizer.coding import encode_input
from stages.recipes.tokenizer.input import TokenizerInput

pytestmark = pytest.mark.slow

WORDS = ("red", "green", "blue", "grey")


class Noise:
    """Pictures of noise in several sizes."""

    def __init__(self, sizes: list[tuple[int, int]], seed: int = 0) -> None:
        self.sizes, self.expected = sizes, len(sizes)
        self.random = np.random.default_rng(seed)

    def __iter__(self) -> Any:
        for k, (height, width) in enumerate(self.sizes):
            pixels = self.random.integers(0, 255, (height, width, 3), dtype=np.uint8)
            captions = [f"a {WORDS[k % 4]} thing", f"{WORDS[k % 4]} noise number {k}"]
            yield CaptionedPicture(f"p{k:03d}", Image.fromarray(pixels), captions, {"quality": k % 10})

    def describe(self) -> dict[str, Any]:
        return {"name": "noise", "sizes": self.sizes}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of pictures and of their bits, and a random tokenizer of 4 × 4 pixels a token."""
    place = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8)).eval()
    tokenizer.save_pretrained(place / "tokenizer")
    sizes = [(16, 16)] * 6 + [(24, 24)] * 4 + [(32, 24)] * 2 + [(40, 40)] * 3
    pack(Noise(sizes), place / "pictures", PackOptions(5000, 0.01, False))
    pack(Noise([(16, 16)] * 6 + [(24, 24)] * 6, 1), place / "exact", PackOptions(5000, 0.01, False))
    encode_input(tokenizer, TokenizerInput([str(place / "exact")]), place / "bits", PackOptions(5000, 0.01, False))
    return place


def config(place: Path, data: str = "bits", **changes: Any) -> TrainingConfig:
    """`changes`: fields of DataConfig, RunConfig or GeneratorTraining."""

    def mine(cls: type) -> dict[str, Any]:
        return {f.name: changes.pop(f.name) for f in dataclasses.fields(cls) if f.name in changes}

    shards = {"train": (str(place / data),), "heldout": (str(place / data),), "mix": {"16": 2, "24": 1}, "row_tokens": 200}
    shards |= mine(DataConfig)
    vocabulary = {"text_vocabulary": 300, "resolution_tokens": 16}
    generator = {"tokenizer": str(place / "tokenizer"), "dropout": 0.3, **vocabulary, **mine(GeneratorTraining)}
    generator.setdefault(
        "backbone",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    )
    generator.setdefault("head", {"ch_latent": 128, "depth_latent": 1, "depth_adanln": 1, "parallel_num": 4})
    run = RunConfig(**{"out": str(place / "run"), "batch_size": 4, "steps": 3, "seed": 7, **mine(RunConfig)})
    assert not changes
    return TrainingConfig(recipe="generator", run=run, data=DataConfig(**shards), generator=GeneratorTraining(**generator))


def tensors(batch: Any) -> dict[str, torch.Tensor]:
    found = {f.name: getattr(batch.sequence, f.name) for f in dataclasses.fields(batch.sequence) if f.name != "noise"}
    found |= {f.name: getattr(batch.sequence.noise, f.name) for f in dataclasses.fields(batch.sequence.noise)}
    found = {name: part for name, part in found.items() if isinstance(part, torch.Tensor)}
    return found | {f"pixels {k}": part for k, part in batch.pixels.items()}


def same(a: Any, b: Any) -> bool:
    told = [(batch.sequence.side, batch.sequence.spans) for batch in (a, b)]
    a, b = tensors(a), tensors(b)
    return told[0] == told[1] and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss(recipe: GeneratorRecipe, indices: range) -> tuple[float, float, int, int]:
    """Sums of vision and text loss over the rows of the batch, and how many rows."""
    assert isinstance(recipe.module, GeneratorObjective)
    with torch.no_grad():
        found = recipe.module.losses(recipe.feed.batch(indices, step_generator(0, 0, 0)).batch)
    return float(found.vision_rows.sum()), float(found.text_rows.sum()), found.vision_rows.numel(), found.text_rows.numel()


def test_a_batch_is_a_function_of_its_indices_alone(place: Path) -> None:
    first, second = build_recipe(config(place)), build_recipe(config(place))
    far = first.feed.batch(range(100, 104), step_generator(0, 0, 0))
    for start in (40, 0, 100):
        again = second.feed.batch(range(start, start + 4), step_generator(9, 9, 9))
    assert same(far.batch, again.batch) and far.samples == again.samples
    assert not same(far.batch, first.feed.batch(range(104, 108), step_generator(0, 0, 0)).batch)


def test_two_processes_see_what_one_with_twice_the_batch_sees(place: Path) -> None:
    recipe = build_recipe(config(place))
    for start in (0, 8, 96):
        whole = loss(recipe, range(start, start + 8))
        halves = [loss(recipe, range(start + k, start + k + 4)) for k in (0, 4)]
        for part in range(4):
            assert sum(half[part] for half in halves) == pytest.approx(whole[part], rel=2e-6)


def test_the_next_batches_after_any_stop_are_the_same_with_0_1_and_4_loaders(place: Path) -> None:
    recipe = build_recipe(config(place))
    run = RunConfig(out="x", batch_size=2, accumulation=2, steps=24)
    straight = list(micro_batches(recipe.feed, run, 0))
    assert len(straight) == 48
    for workers in (0, 1, 4):
        resumed = list(micro_batches(recipe.feed, dataclasses.replace(run, workers=workers, prefetch=2), 20))
        assert len(resumed) == 8
        for old, new in zip(straight[40:], resumed, strict=True):
            assert same(old.batch, new.batch) and old.samples == new.samples


def test_loader_processes_get_no_weights(place: Path) -> None:
    """What travels to a loader process holds no tensor that a network has, and makes the same batches there."""
    recipe = build_recipe(config(place))
    weights = {p.data_ptr() for p in recipe.module.parameters()} | {p.data_ptr() for p in recipe.tokenizer.parameters()}
    met: list[torch.Tensor] = []

    class Spy(pickle.Pickler):
        def persistent_id(self, obj: Any) -> None:
            if isinstance(obj, torch.Tensor):
                met.append(obj)
            assert not isinstance(obj, torch.nn.Module), type(obj)

    file = io.BytesIO()
    Spy(file).dump(recipe.feed)
    assert not weights & {tensor.data_ptr() for tensor in met}
    sent = pickle.loads(file.getvalue())
    assert same(*(feed.batch(range(4), step_generator(0, 0, 0)).batch for feed in (recipe.feed, sent)))


def test_processes_take_different_samples_of_the_same_row(place: Path) -> None:
    recipe = build_recipe(config(place))
    run = RunConfig(out="x", batch_size=3, steps=4)
    pair = [MicroBatches(recipe.feed, run, rank, 2) for rank in (0, 1)]
    alone = MicroBatches(recipe.feed, dataclasses.replace(run, batch_size=6), 0, 1)
    for step in range(4):
        assert pair[0][step].samples + pair[1][step].samples == alone[step].samples


def test_pixels_are_encoded_on_the_way_to_the_same_loss_as_their_bits(place: Path) -> None:
    from_bits = build_recipe(config(place, "bits"))
    from_pixels = build_recipe(config(place, "exact", mix={"16": 2, "24": 1}))
    # a picture of 24 pixels can also be brought to 16, so compare documents, not the row
    index = next(s for s in range(50) if from_bits.mixture.at(s).resolution == 24)
    number = from_bits.mixture.at(index).number
    losses = []
    for recipe in (from_bits, from_pixels):
        recipe_place = dataclasses.replace(from_bits.mixture.at(index), number=number)
        generator = torch.Generator().manual_seed(1)
        drawn = recipe.documents.plain(recipe.sources[0].data, recipe_place, generator)
        batch = recipe.documents.batch([drawn])
        assert bool(batch.pixels) == (recipe is from_pixels)
        assert isinstance(recipe.module, GeneratorObjective)
        recipe.module.model.load_state_dict(from_bits.module.model.state_dict())
        with torch.no_grad():
            losses.append(float(recipe.module.losses(batch).vision))
    assert losses[0] == losses[1]


def test_pictures_come_in_the_sizes_of_the_mix(place: Path) -> None:
    recipe = build_recipe(config(place, "pictures", mix={"16": 1, "24": 1}))
    seen = set()
    for index in range(60):
        micro = recipe.feed.batch(range(index, index + 1), step_generator(0, 0, 0))
        seen.add(tuple(micro.batch.pixels[0].shape[1:]))
    assert {(16, 16), (24, 24)} <= seen
    assert all(height % 8 == width % 8 == 0 for height, width in seen)


def test_conditions_leave_samples_out_and_are_part_of_the_data(place: Path) -> None:
    all_of_it = build_recipe(config(place))
    good = build_recipe(config(place, keep=("quality >= 2",)))
    assert (all_of_it.feed.length, good.feed.length) == (12, 8) and all_of_it.feed.hash != good.feed.hash
    names = {name for index in range(40) for name in good.feed.batch(range(index, index + 1), step_generator(0, 0, 0)).samples}
    assert names == {f"p{k:03d}" for k in range(12) if k % 10 >= 2}


def test_dropped_captions_follow_their_probability_and_all_captions_are_used(place: Path) -> None:
    recipe = build_recipe(config(place))
    texts = set()
    dropped = 0
    for index in range(300):
        sequence = recipe.feed.batch(range(index, index + 1), step_generator(0, 0, 0)).batch.sequence
        dropped += not len(sequence.label_ids_T)
        texts.add(recipe.documents.text_tokenizer.decode(sequence.ids_BL[0, :20]))
    assert 0.2 < dropped / 300 < 0.4
    assert len(texts) > 14  # "a red thing", "red noise number 3", …


def test_validation_and_sampling_are_fixed_and_tell_the_resolutions_apart(place: Path) -> None:
    recipe = build_recipe(config(place))
    first = recipe.validate(recipe.module)
    assert first == recipe.validate(recipe.module)
    assert first.keys() == {"vision", "text", "bit_accuracy", "vision/16", "vision/24"}
    assert all(np.isfinite(value) for value in first.values())
    assert np.array_equal(np.asarray(recipe.sample(recipe.module)), np.asarray(recipe.sample(recipe.module)))


def test_the_step_reports_loss_by_noise_level_and_the_accuracy_of_bits(place: Path) -> None:
    recipe = build_recipe(config(place))
    batch = recipe.feed.batch(range(64), step_generator(0, 0, 0)).batch
    total, scalars, made = recipe.module(batch, step_generator(0, 0, 0), 0)
    assert made is None and {"vision", "text", "bit_accuracy", "bit_accuracy_least"} < scalars.keys()
    levels = {name: float(value) for name, value in scalars.items() if name.startswith("vision_at_t/")}
    assert len(levels) == 5
    assert float(total.detach()) == pytest.approx(float(scalars["vision"]) + 0.01 * float(scalars["text"]))
    known = [value for value in levels.values() if np.isfinite(value)]
    assert min(known) <= float(scalars["vision"]) <= max(known)
    # a fresh head predicts 0 for every bit, so its bits are all −1: right as often as the data has −1
    negative = float((batch.sequence.image_bits_NC[batch.sequence.generated_K] < 0).float().mean())
    assert float(scalars["bit_accuracy"]) == pytest.approx(negative, abs=1e-6)
    assert float(scalars["bit_accuracy_least"]) <= float(scalars["bit_accuracy"])


def test_frozen_parts_and_checkpointed_activations(place: Path) -> None:
    plain = build_recipe(config(place))
    thrifty = build_recipe(config(place, checkpoint_activations=True, freeze=("backbone",)))
    assert thrifty.parts()["backbone"] == [] and len(thrifty.parts()["head"]) == len(plain.parts()["head"])
    gradients = []
    for recipe in (plain, thrifty):
        recipe.module.train()
        loss, *_ = recipe.module(recipe.feed.batch(range(4), step_generator(0, 0, 0)).batch, step_generator(0, 0, 0), 0)
        loss.backward()
        gradients.append([p.grad for p in recipe.parts()["head"]])
    assert all(p.grad is None for p in thrifty.module.model.backbone.parameters())
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_bits_of_another_tokenizer_are_refused(place: Path, tmp_path: Path) -> None:
    tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)).eval()
    encode_input(tokenizer, TokenizerInput([str(place / "exact")]), tmp_path / "bits", PackOptions(5000, 0.01, False))
    with pytest.raises(ValueError, match="these bits come from another encoder"):
        build_recipe(config(place, train=(str(tmp_path / "bits"),)))
    (tmp_path / "bits" / "pack.json").unlink()  # shards of other tools say nothing of their encoder
    recipe = build_recipe(config(place, train=(str(tmp_path / "bits"),)))
    with pytest.raises(ValueError, match="holds 4 bits per token, the tokenizer makes 8"):
        recipe.feed.batch(range(2), step_generator(0, 0, 0))


def test_a_saved_model_knows_its_sizes(place: Path, tmp_path: Path) -> None:
    recipe = build_recipe(config(place))
    recipe.save_model(recipe.module, tmp_path / "model", 5)
    extras = json.loads((tmp_path / "model" / "bitdance.json").read_text())
    assert extras["sizes"] == [[16, 16], [24, 24]]
    assert (extras["defaults"]["height"], extras["defaults"]["width"]) == (24, 24)
    (stage,) = extras["card"]["stages"]
    assert (stage["steps"], stage["images"], stage["mix"]) == (5, 20, {"16": 2, "24": 1})


def test_a_model_of_scenes_lists_each_thing_that_stands_alone_once(place: Path, tmp_path: Path) -> None:
    shown = {"a fox": ["fox"], "a fox and an owl": ["fox", "owl"], "three foxes": ["fox"], "an owl": ["owl"]}
    samples = {
        f"s{i}": {
            "png": picture_bytes(Image.new("RGB", (16, 16))),
            "json": json.dumps({"captions": [text], "concepts": of}).encode(),
        }
        for i, (text, of) in enumerate(shown.items())
    }
    (tmp_path / "scenes").mkdir()
    write_samples(tmp_path / "scenes" / "a.tar", samples)
    recipe = build_recipe(config(place, train=(str(tmp_path / "scenes"),), heldout=(), mix={}))
    recipe.save_model(recipe.module, tmp_path / "model", 1)
    assert json.loads((tmp_path / "model" / "bitdance.json").read_text())["prompts"] == ["a fox", "an owl"]


def test_the_operations_of_a_token_agree_with_those_that_torch_counts(place: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    recipe = build_recipe(config(place, dropout=0.0, row_tokens=400))
    counted = tokens = 0
    for index in range(0, 24, 4):
        micro = recipe.feed.batch(range(index, index + 4), step_generator(0, 0, 0))
        counter = FlopCounterMode(display=False)
        with counter:
            recipe.module(micro.batch, step_generator(0, 0, 0), 0)[0].backward()
        counted, tokens = counted + counter.get_total_flops(), tokens + micro.tokens
    assert recipe.flops == pytest.approx(counted / tokens, rel=0.1)  # a few rows are padded; captions differ
