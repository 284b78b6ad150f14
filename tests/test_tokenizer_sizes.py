"""Every published size loads, builds and has the parameters it is said to have; a config follows from its tensors' shapes."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.entropy import check_groups
from stages.config import load_config

CONFIGS = Path(__file__).parent.parent / "configs" / "tokenizer"
PARAMETERS = {
    "d16c32": 460_294_179,  # as published
    "d32c128": 420_202_627,
    "d32c128-generative": 421_382_275,
    "d32c256": 422_332_675,
    "d32c256-generative": 424_691_971,
}
D16C32 = TokenizerConfig(ch=256, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=4, z_channels=32)
D32C128 = TokenizerConfig(ch=128, ch_mult=(1, 1, 2, 2, 4, 8), num_res_blocks=4, z_channels=128, gan_decoder=True)


def on_meta(config: TokenizerConfig) -> LFQTokenizer:
    with torch.device("meta"):
        return LFQTokenizer(config)


def parameters(tokenizer: LFQTokenizer) -> int:
    return sum(p.numel() for p in tokenizer.parameters())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_builds_and_opens_with_what_it_is(path: Path) -> None:
    config, head = load_config(path), path.read_text(encoding="utf-8").split("\n\n")[0]
    check_groups(config.tokenizer.model.z_channels, config.tokenizer.groups)
    assert config.data.crop % config.tokenizer.model.downsampling == 0
    assert parameters(on_meta(config.tokenizer.model)) > 0
    for word in ("Trains", "Hardware", "Command"):
        assert f"# {word} " in head, word
    assert f"configs/tokenizer/{path.name}" in head


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_size_builds(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    training, model = config.tokenizer, config.tokenizer.model
    tokenizer = on_meta(model)
    assert parameters(tokenizer) == PARAMETERS[name]
    downsampling, bits = (int(n) for n in re.findall(r"\d+", name))
    assert (model.downsampling, model.z_channels) == (downsampling, bits)
    assert model.z_channels // training.groups == 8  # bits a group, as in the published 32-bit tokenizer
    check_groups(model.z_channels, training.groups)
    side = config.data.crop
    latents = tokenizer.encoder(torch.empty(2, 3, side, side, device="meta"))
    assert latents.shape == (2, bits, side // downsampling, side // downsampling)
    noise = latents if model.gan_decoder else None
    assert tokenizer.decoder(latents, noise).shape == (2, 3, side, side)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_recipe_is_the_published_one(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    training, adversary = config.tokenizer, config.tokenizer.adversary
    assert (training.l1_weight, training.perceptual_weight, adversary.weight, adversary.lecam_weight) == (1.0, 1.0, 0.1, 0.05)
    assert (training.entropy_weight, training.commitment_weight, training.temperature) == (0.1, 0.25, 0.01)
    assert training.l2_weight == 0 and training.perceptual.endswith(".safetensors")
    assert config.optimizer.betas == adversary.betas == (0.5, 0.9)
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.weight_decay) == (1e-4, "constant", 0.0)
    assert config.optimizer.clip > 0 and config.run.ema > 0


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.endswith("-generative")])
def test_a_second_phase_starts_from_the_run_of_its_first_with_a_frozen_encoder(name: str) -> None:
    first, second = (load_config(CONFIGS / f"{n}.toml") for n in (name.removesuffix("-generative"), name))
    assert second.tokenizer.init == first.run.out and second.run.out != first.run.out
    assert second.tokenizer.freeze_encoder and second.tokenizer.model.gan_decoder
    assert not first.tokenizer.freeze_encoder and not first.tokenizer.model.gan_decoder
    plain, generative = ({k: v.shape for k, v in on_meta(c.tokenizer.model).state_dict().items()} for c in (first, second))
    assert [k for k in plain if plain[k] != generative[k]] == ["decoder.conv_in.weight"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_size_says_what_is_published_and_what_is_ours(name: str) -> None:
    head = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(f"# {word} " in head for word in ("Expected", "Published", "Ours"))
    assert f"{PARAMETERS[name]:,} parameters" in head


# A config from shapes


MANY = [
    TokenizerConfig(ch=ch, ch_mult=mult, num_res_blocks=blocks, z_channels=bits, gan_decoder=generative)
    for (ch, mult), blocks, bits, generative in itertools.product(
        [(32, (1,)), (32, (2, 1, 1, 1)), (64, (1, 3)), (32, (1, 1, 2, 2, 4, 8))], [1, 3], [1, 32], [False, True]
    )
]


@pytest.mark.parametrize("config", [D16C32, D32C128, *MANY], ids=str)
def test_a_config_follows_from_its_shapes(config: TokenizerConfig) -> None:
    shapes = {name: tuple(t.shape) for name, t in on_meta(config).state_dict().items()}
    assert TokenizerConfig.from_shapes(shapes) == config
