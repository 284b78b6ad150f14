"""Tokens of numbers instead of bits: what bits are compared with. Tokenizer, class model, and who refuses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from class_model import golden_config
from test_class_training import config, home  # noqa: F401 (a fixture)

from bitdance import load_pipeline
from bitdance.heads.diffusion.settings import Sampling
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.kinds.class_patch.settings import ClassSettings
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.any_tokenizer import check_makes_bits, config_of, load_tokenizer
from stages.engine import checkpoint
from stages.engine.loop import train
from stages.measure.reconstruction import measure_tokenizer
from stages.recipes.class_patch.recipe import ClassPatchRecipe
from stages.recipes.tokenizer import coding
from stages.recipes.tokenizer.objective import quantizer_of

NUMBERS = TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, quantizer="none")


def test_a_tokenizer_of_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = LFQTokenizer(NUMBERS).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        numbers = tokenizer.encode(images)
        torch.testing.assert_close(numbers, tokenizer.encoder(images).tanh(), rtol=0, atol=0)
    assert (NUMBERS.bits, NUMBERS.width, NUMBERS.token) == (0, 8, "8 numbers")
    assert config_of(NUMBERS.to_published()) == NUMBERS
    tokenizer.save_pretrained(tmp_path / "numbers")
    with torch.no_grad():
        torch.testing.assert_close(
            load_tokenizer(tmp_path / "numbers").decode(numbers), tokenizer.decode(numbers), rtol=0, atol=0
        )
        assert "bit_entropy" not in measure_tokenizer(tokenizer, images)
    with pytest.raises(ValueError, match="8 numbers; this needs bits"):
        coding.load_tokenizer(tmp_path / "numbers")
    with pytest.raises(ValueError, match="refine.tokenizer makes tokens of 8 numbers"):
        check_makes_bits(NUMBERS, "refine.tokenizer")
    with pytest.raises(ValueError, match="rounds = 2"):
        replace(NUMBERS, rounds=2)


def test_its_quantiser_passes_the_gradient_of_tanh() -> None:
    from stages.config import TokenizerTraining

    z = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    numbers, losses = quantizer_of(NUMBERS, TokenizerTraining())(z)
    (grad,) = torch.autograd.grad(numbers.sum(), z)
    torch.testing.assert_close(grad, 1 - numbers.detach() ** 2)
    assert not losses.entropy and not losses.commitment


def test_a_class_model_samples_numbers_as_they_are() -> None:
    shape = replace(golden_config(1), numbers=True, perturb_rate=0.0, class_dropout_prob=0.0, diff_batch_mul=4)
    torch.manual_seed(0)
    model = ClassPatchModel(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    wanted = torch.rand(2, shape.latent_dim, shape.grid, shape.grid) * 1.8 - 0.9  # two pictures, by heart
    classes = torch.tensor([0, 1])
    for _ in range(250):
        optimizer.zero_grad()
        model.losses(wanted, classes, ClassNoise.draw(2, shape, True))["bits"].mean().backward()
        optimizer.step()
    settings, seeds = ClassSettings(Sampling(10, 1.0, "euler")), [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    made = generate_bits(model.eval(), [0, 1], settings, seeds)
    assert 0 < float((made - wanted).abs().mean()) < 0.3 and float((made.abs() == 1).float().mean()) == 0
    with pytest.raises(ValueError, match="only diffusion makes numbers"):
        replace(shape, head_kind="bits", diff_batch_mul=1)
    assert shape.token == f"{shape.latent_dim} numbers" and shape.decides["numbers"] is True


@pytest.mark.slow
def test_training_and_pictures(home: Path, tmp_path: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    LFQTokenizer(NUMBERS).eval().save_pretrained(tmp_path / "numbers")
    settings = config(home, "pictures", str(tmp_path / "run"), tokenizer=str(tmp_path / "numbers"), steps=2)
    train(ClassPatchRecipe(settings), settings)
    made = load_pipeline(checkpoint.model_folder(tmp_path / "run"), "cpu")(
        "bee", num_inference_steps=2, seed=1, output_type="tokens"
    )
    assert made.bits is not None and float((made.bits.abs() == 1).float().mean()) < 0.1
