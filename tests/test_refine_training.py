"""Training refinement models: batches that depend on nothing else, exact resuming, what is saved, captions and HBQ labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from picture_training import batch, check_resuming, draw_pictures, training_config
from test_engine import metrics

from bitdance import load_pipeline
from bitdance.kinds.refine.noise import RefineNoise
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.cli import train as train_command
from stages.config import load_config
from stages.data.pack import PackOptions
from stages.engine import checkpoint
from stages.engine.loop import train
from stages.recipes.refine.config import RefineTraining, RefineTrainingConfig
from stages.recipes.refine.recipe import RefineRecipe
from stages.recipes.tokenizer.coding import encode_input
from stages.recipes.tokenizer.input import TokenizerInput

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CLASS = {"width": 32, "depth": 2, "heads": 2, "bottleneck": 16, "in_context_len": 2, "in_context_start": 1}
TEXT = {"width": 48, "depth": 2, "heads": 2, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders named after their classes, with a caption each; shards of their bits by two tokenizers of 4 × 4 pixels
    a token: one bit per latent, and two."""
    home = tmp_path_factory.mktemp("refine")
    draw_pictures(home)
    for name, said in (("lfq", {"z_channels": 8}), ("hbq", {"z_channels": 4, "quantizer": "hbq", "rounds": 2})):
        torch.manual_seed(0)
        tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, **said)).eval()
        tokenizer.save_pretrained(home / name)
        encode_input(tokenizer, TokenizerInput([str(home / "pictures")]), home / f"{name}-bits", PackOptions())
    return home


def config(home: Path, out: str = "run", quantizer: str = "lfq", **changes: Any) -> RefineTrainingConfig:
    own = {"tokenizer": str(home / quantizer), "model": CLASS}
    return training_config(RefineTrainingConfig, "refine", RefineTraining, home / out, home / f"{quantizer}-bits", changes, **own)


def of_prompts(home: Path, **changes: Any) -> RefineTrainingConfig:
    return config(home, model=TEXT, text_encoder=str(GOLDEN / "t2i_ckpt"), **changes)


@pytest.mark.parametrize("make", [config, of_prompts])
def test_a_batch_is_a_function_of_its_samples_alone(home: Path, make: Any) -> None:
    first, second = RefineRecipe(make(home)), RefineRecipe(make(home))
    far = batch(first, range(100, 104))
    batch(second, range(50, 54))
    again = batch(second, range(100, 104))
    assert torch.equal(far.bits_BChw, again.bits_BChw) and torch.equal(far.noise.random_BGhw, again.noise.random_BGhw)
    assert torch.equal(far.noise.time_B, again.noise.time_B)
    ids = [getattr(one.condition, "ids", None) or one.condition.tolist() for one in (far, again)]
    assert ids[0] == ids[1]
    with torch.no_grad():
        whole = first.module.rows(far)
        halves = [first.module.rows(batch(first, part)) for part in (range(100, 101), range(101, 104))]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-5, atol=1e-6)


def test_loader_processes_get_no_weights(home: Path) -> None:
    import pickle

    size = len(pickle.dumps(RefineRecipe(of_prompts(home)).feed))
    assert size < 200_000  # the text tokenizer is in it, its language model is not


def test_corrupted_labels_keep_the_share_that_the_time_says() -> None:
    shape = RefineTraining(model=CLASS).shape(8, 32, 3)
    noise = RefineNoise.draw(64, shape, (32, 32), True, torch.Generator().manual_seed(0))
    kept = noise.kept_BGhw.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(kept, noise.time_B, atol=0.03, rtol=0)
    assert 0.02 < noise.dropped_B.float().mean() < 0.25
    labels = torch.zeros_like(noise.random_BGhw)
    changed = (noise.corrupted(labels) != labels).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(changed, (1 - noise.time_B) / 2, atol=0.03, rtol=0)  # half of the random bits are right


@pytest.mark.parametrize("make", [config, of_prompts])
def test_a_resumed_run_equals_an_unbroken_one(home: Path, make: Any) -> None:
    check_resuming(RefineRecipe, make, home)


@pytest.mark.parametrize("quantizer, labels, G", [("lfq", "bit", 8), ("hbq", "bit", 8), ("hbq", "ind", 4)])
def test_what_is_saved_makes_pictures_of_its_classes(
    home: Path,
    quantizer: str,
    labels: str,
    G: int,
) -> None:
    model = CLASS | {"labels": labels, "rounds": 2 if quantizer == "hbq" else 1}
    out = f"saved-{quantizer}-{labels}"
    settings = config(home, out, quantizer, steps=2, model=model, defaults={"num_inference_steps": 3}, ema=0.5)
    train(RefineRecipe(settings), settings)
    assert {"loss", "heldout/labels", "images_per_s", "tokens_per_s"} <= set().union(*metrics(home / out))
    pipe = load_pipeline(checkpoint.step_folder(home / out, 2) / "model", "cpu")
    assert pipe.kind == "refine" and pipe.names.number("cow") == 2 and pipe.model.network.config.label_count == G
    found = pipe(class_label=["cow", "ant"], seed=[1, 2])
    assert found.classes == [2, 0] and found.images[0].size == (16, 16) and found.steps == [3, 3]
    going_on = RefineRecipe(config(home, "later", quantizer, model=model, steps=1, init=str(home / out)))
    for name, tensor in pipe.model.network.state_dict().items():
        assert torch.equal(going_on.module.model.state_dict()[name], tensor), name


def test_what_is_saved_makes_pictures_of_prompts(home: Path) -> None:
    settings = of_prompts(home, out="text", steps=2, sample_prompts=("a small ant",), sample_every=2)
    train(RefineRecipe(settings), settings)
    pipe = load_pipeline(checkpoint.step_folder(home / "text", 2) / "model", "cpu")
    assert pipe("a small cow", seed=1, num_inference_steps=2).images[0].size == (16, 16)
    assert list((home / "text" / "samples").glob("*.png"))


def test_the_loss_falls(home: Path) -> None:
    settings = config(home, "falls", steps=60, batch_size=12, lr=3e-3, log_every=1)
    train(RefineRecipe(settings), settings)
    losses = [row["loss"] for row in metrics(home / "falls") if "loss" in row]
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 18}, "refine.size = 18; a multiple of the tokenizer's downsampling 4"),
        ({"class_count": 4}, "class_count = 4, but there are 3 classes"),
        ({"size": 32}, "the model reads (8, 8, 8); encode pictures of 32×32 pixels"),
        ({"model": {**CLASS, "rounds": 3}}, "refine.model: bits = 8 are no multiple of rounds = 3"),
        ({"model": {"width": 32}}, "refine.model lacks depth"),
        ({"model": {**CLASS, "attention": "joint"}}, "attention are not of a class-conditional network"),
    ],
)
def test_what_does_not_fit_is_refused(home: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^") as error:
        batch(RefineRecipe(config(home, **changes)), range(2))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*refine*.toml")) + sorted((ROOT / "configs/imagenet").glob("grn_*.toml"))
)
def test_the_configs_are_whole_and_can_be_planned(path: Path, capsys: Any) -> None:
    settings = load_config(path)
    assert settings.recipe == "refine"
    assert train_command([str(path), "--dry-run", "--processes", "8"]) == 0
    assert "refine: parameters" in capsys.readouterr().out


def test_a_tokenizer_with_two_bits_per_latent_trains(home: Path, tmp_path: Path) -> None:
    (tmp_path / "hbq.toml").write_text(f"""
recipe = "tokenizer"
[run]
out = "{tmp_path / "run"}"
steps = 3
batch_size = 4
[data]
train = ["{home / "pictures"}"]
heldout = ["{home / "pictures"}"]
[tokenizer]
commitment_weight = 0.0
[tokenizer.model]
ch = 32
ch_mult = [1, 1]
num_res_blocks = 1
z_channels = 4
quantizer = "hbq"
rounds = 3
""")
    assert train_command([str(tmp_path / "hbq.toml")]) == 0
    rows = set().union(*metrics(tmp_path / "run"))
    assert "commitment" in rows and "entropy_of_mean" not in rows
    made = LFQTokenizer.from_pretrained(checkpoint.step_folder(tmp_path / "run", 3) / "model")
    assert made.config.bits == 12
    bits = made.encode(torch.zeros(1, 3, 8, 8))
    assert bits.shape == (1, 12, 4, 4) and made.decode(bits).shape == (1, 3, 8, 8)


def test_captions_beyond_those_that_are_remembered_are_encoded_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RefineRecipe(of_prompts(home))
    some, others = batch(recipe, range(0, 4)), batch(recipe, range(4, 8))
    with torch.no_grad():
        expected = [recipe.module.rows(one) for one in (some, others, some)]
        monkeypatch.setattr("stages.recipes.pictures.captions.REMEMBERED", 5)
        for one, rows in zip((some, others, some), expected, strict=True):
            assert torch.equal(recipe.module.rows(one), rows)
