"""A training config is read as written: one parent, dotted changes, and no key or value that is silently wrong."""

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Annotated

import pytest

from bitdance.heads.diffusion.network import HeadConfig
from distill.config import DistillConfig
from distill.config import load_config as load_distill_config
from distill.few_steps_config import load_config as load_few_config
from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.entropy import check_groups
from lfq_tokenizer.scale_vae import ScaleConfig
from stages.config import TrainingConfig, as_dict, load_config
from stages.recipes.class_patch.config import ClassTrainingConfig
from stages.recipes.next_scale.config import NextScaleTrainingConfig
from stages.recipes.refine.config import RefineTrainingConfig
from stages.schema import DECLARED

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.toml") if path.parent.name != "evidence"
)  # studies: test_evidence.py
SMALLEST = 'recipe = "tokenizer"\nrun.out = "r"\ndata.train = ["a.tar"]\n'


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "c.toml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def refused(path: Path, *overrides: str) -> str:
    """The message; it names the file."""
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    assert str(path) in str(caught.value) or any(str(o) in str(caught.value) for o in overrides)
    return str(caught.value)


def test_there_are_configs() -> None:
    assert {"debug/tokenizer.toml", "debug/generator.toml"} <= {p.relative_to(ROOT / "configs").as_posix() for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_every_config_that_ships_fits_the_code_that_reads_it(path: Path) -> None:
    distils = path.stem.startswith("distill")
    few = path.stem.startswith("few_steps")
    config = load_few_config(path) if few else load_distill_config(path) if distils else load_config(path)
    distils = distils or few
    if config.recipe == "tokenizer":
        if isinstance(config.tokenizer.model, TokenizerConfig):
            check_groups(config.tokenizer.model.z_channels, config.tokenizer.groups)
    elif isinstance(config, ClassTrainingConfig):
        assert (
            config.class_patch.shape(
                TokenizerConfig(z_channels=16), config.class_patch.size // 4, config.class_patch.class_count
            ).num_classes
            >= 10
        )
    elif isinstance(config, RefineTrainingConfig):
        width = 256 if config.refine.text_encoder else None
        shape = config.refine.shape(64, 8, None if width else config.refine.class_count, width)
        assert shape.class_count is None or shape.class_count >= 10
    elif isinstance(config, NextScaleTrainingConfig):
        section = config.next_scale
        vae = ScaleConfig.from_published({"scales": dict(section.vae)})
        width = section.text_width or (256 if section.text_encoder else None)
        shape = section.shape(vae, None if width else section.class_count, width)
        own = path.parent.name in ("cifar", "demo") or "256" in path.stem
        assert shape.known is not None or own, "the published model that the header names"
    elif config.generator.head or not config.generator.init:  # else the head is that of the model that goes on
        hidden = int(config.generator.backbone.get("hidden_size", 1))
        HeadConfig.from_dict({"ch_target": 1, "ch_cond": hidden, **config.generator.head})
    json.dumps(as_dict(config))
    name = f"configs/{path.relative_to(ROOT / 'configs').as_posix()}"
    # alone, or under a launcher
    commands = (f"bitdance distill {name}", f"-m distill {name}") if distils else (f"bitdance train {name}", f"-m stages {name}")
    assert any(command in path.read_text(encoding="utf-8") for command in commands)


def test_values_reach_their_fields_with_their_types(write) -> None:
    config = load_config(
        write(
            SMALLEST
            + "[optimizer]\nlr = 1e-5\nclip = 2\nbetas = [0, 0.5]\n"
            + "[tokenizer]\ngroups = 8\n[tokenizer.model]\nch = 64\nch_mult = [1, 2]\n"
            + "[generator]\nsample_prompts = ['a', 'b']\n[generator.head]\nch_latent = 128\n"
        )
    )
    assert config.optimizer.lr == 1e-5 and config.optimizer.betas == (0.0, 0.5)
    assert config.optimizer.clip == 2.0 and isinstance(config.optimizer.clip, float)
    assert config.tokenizer.model == TokenizerConfig(ch=64, ch_mult=(1, 2))
    assert config.generator.sample_prompts == ("a", "b") and config.generator.head == {"ch_latent": 128}
    assert config.data.train == ("a.tar",)
    assert config.run.steps == TrainingConfig.__dataclass_fields__["run"].default_factory().steps


def test_a_config_cannot_be_changed_by_accident(write) -> None:
    config = load_config(write(SMALLEST))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3  # type: ignore[misc]


def test_a_child_overrides_its_parent_key_by_key(write) -> None:
    write(SMALLEST + "run.steps = 5\nrun.batch_size = 7\n[generator.head]\nch_latent = 128\nparallel_num = 4\n", "base.toml")
    config = load_config(write('extends = "base.toml"\n[run]\nsteps = 6\n[generator.head]\nparallel_num = 16\n'))
    assert (config.run.steps, config.run.batch_size, config.run.out) == (6, 7, "r")
    assert config.generator.head == {"ch_latent": 128, "parallel_num": 16}


def test_the_parent_is_looked_for_beside_the_child(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    write(SMALLEST, "sub/base.toml")
    monkeypatch.chdir("/")
    assert load_config(write('extends = "base.toml"', "sub/child.toml")).run.out == "r"


def test_two_levels_are_refused(write) -> None:
    write(SMALLEST, "a.toml")
    write('extends = "a.toml"', "b.toml")
    with pytest.raises(ValueError, match="b.toml extends another config; only one level"):
        load_config(write('extends = "b.toml"', "c.toml"))
    with pytest.raises(ValueError, match="only one level"):
        load_config(write('extends = "self.toml"', "self.toml"))


def test_a_missing_file_or_parent_is_named(write, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.toml"):
        load_config(tmp_path / "nothing.toml")
    with pytest.raises(FileNotFoundError, match="nothing.toml"):
        load_config(write('extends = "nothing.toml"'))
    assert "extends = 3" in refused(write("extends = 3"))


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.steps=12", lambda c: c.run.steps, 12),
        ("optimizer.lr=3e-4", lambda c: c.optimizer.lr, 3e-4),
        ("run.out=runs/a b", lambda c: c.run.out, "runs/a b"),
        ("run.out='7'", lambda c: c.run.out, "7"),
        ("run.compile=true", lambda c: c.run.compile, True),
        ('data.train=["x/*.tar", "y.tar"]', lambda c: c.data.train, ("x/*.tar", "y.tar")),
        ("generator.head.ch_latent=256", lambda c: c.generator.head, {"ch_latent": 256}),
        ("tokenizer.model.ch=64", lambda c: c.tokenizer.model.ch, 64),
        ("generator.text_extra=a=b", lambda c: c.generator.text_extra, "a=b"),
    ],
)
def test_set_changes_one_value(write, override, read, value) -> None:
    path = write(SMALLEST)
    found = read(load_config(path, [override]))
    assert found == value and type(found) is type(value)


def test_the_last_set_wins_and_beats_the_file_and_its_parent(write) -> None:
    write(SMALLEST + "run.steps = 1", "base.toml")
    path = write('extends = "base.toml"\nrun.steps = 2')
    assert load_config(path, ["run.steps=3", "run.steps=4"]).run.steps == 4


@pytest.mark.parametrize("override", ["run.steps", "=3", ""])
def test_a_set_without_key_or_value_is_refused(write, override) -> None:
    assert "section.key=value" in refused(write(SMALLEST), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.step=3", "unknown key run.step; did you mean run.steps?"),
        ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
        ("tokenizer.model.chmult=[1]", "unknown key tokenizer.model.chmult; did you mean tokenizer.model.ch_mult?"),
        ("data.xyzzy=1", "unknown key data.xyzzy; known are train, sources, heldout"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(write, override, message) -> None:
    assert message in refused(write(SMALLEST), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=1.5", "run.steps = 1.5; a whole number from 1 to 1000000000 is allowed"),
        ("run.steps=true", "run.steps = True; a whole number from 1 to 1000000000 is allowed"),
        ("run.steps='9'", "run.steps = '9'; a whole number from 1 to 1000000000 is allowed"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast'; a number from 0 to 100 is allowed"),
        ("optimizer.lr=true", "optimizer.lr = True; a number from 0 to 100 is allowed"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]; expected a list of 2 values"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "expected a list of 2 values"),
        ("optimizer.betas=[0.9, 'a']", "optimizer.betas[1] = 'a'; a number from 0, below 1 is allowed"),
        ("run.out=3", "run.out = 3; expected str"),
        ("run.compile=1", "run.compile = 1; expected bool"),
        ("data.train=shards", "data.train = 'shards'; expected a list"),
        ("data.train={a = 1}", "expected a list"),
        ("data.train=[1]", "data.train[0] = 1; expected str"),
        ("run=3", "run = 3; expected RunConfig"),
        ("generator.head=3", "generator.head = 3"),
        ("tokenizer.model.ch_mult=[1.5]", "tokenizer.model.ch_mult[0] = 1.5; a whole number from 1 to 1024 is allowed"),
    ],
)
def test_a_value_of_a_wrong_type_is_an_error_that_says_the_right_one(write, override, message) -> None:
    assert message in refused(write(SMALLEST), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe=tokeniser", "allowed are 'tokenizer' and 'generator'"),
        ("run.out=''", "run.out is empty"),
        ("data.train=[]", "data.train is empty"),
        ("run.precision=float16", "allowed are 'auto', 'float32', 'bfloat16', 'bfloat16-weights'"),
        ("run.workers=-1", "run.workers = -1; a whole number from 0 to 1024 is allowed"),
        ("run.prefetch=0", "run.prefetch = 0; a whole number from 1 to 4096 is allowed"),
        ("data.sources=[{places=['a.tar']}]", "data.train and data.sources are both given"),
        ("data.sources=[{places=['a.tar'], weight=0}]", "data.sources[0].weight = 0; a number above 0, up to 1000000 is allowed"),
        ("data.sources=[{place=['a.tar']}]", "unknown key data.sources[0].place; did you mean data.sources[0].places?"),
        ("generator.freeze=['heads']", "generator.freeze[0] = 'heads'; allowed are 'backbone', 'projector', 'head'"),
        ("generator.attention=sparse", "allowed are 'auto', 'dense', 'flex'"),
        ("generator.kernels=fast", "allowed are 'auto', 'none'"),
        ("deepspeed.offload_optimizer=true", "needs deepspeed.zero_stage 1, 2 or 3"),
        ("deepspeed.offload_parameters=true", "needs deepspeed.zero_stage 3"),
        ("run.steps=0", "run.steps = 0; a whole number from 1 to 1000000000 is allowed"),
        ("run.keep=0", "run.keep = 0; a whole number from 1 to 1000000000 is allowed"),
        ("run.ema=1.0", "run.ema = 1.0; a number from 0, below 1 is allowed"),
        ("optimizer.schedule=steep", "optimizer.schedule = 'steep'; allowed are 'constant', 'cosine', 'linear'"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage = 4; a whole number from 0 to 3 is allowed"),
        ("tokenizer.model.ch=20", "multiple of 32"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_says_what_is_allowed(write, override, message) -> None:
    assert message in refused(write(SMALLEST), override)


GENERATOR = 'recipe = "generator"\nrun.out = "r"\ndata.train = ["a.tar"]\n'
HUGE = "1" + "0" * 400
# Every place where a number, a key or a kind was once taken without a word: fields, tables within tables, lists.
SILENT = [
    ("generator.backbone.num_hidden_layer=7", "did you mean generator.backbone.num_hidden_layers?"),
    ("generator.head.ch_laten=128", "did you mean generator.head.ch_latent?"),
    ("generator.defaults.guidance=3", "did you mean generator.defaults.guidance_scale?"),
    ("deepspeed.settings={gradient_cliping=0.1}", "did you mean deepspeed.settings.gradient_clipping?"),
    ("deepspeed.settings={zero_optimization={stagee=1}}", "did you mean deepspeed.settings.zero_optimization.stage?"),
    ("deepspeed.settings={bf16={enable=true}}", "did you mean deepspeed.settings.bf16.enabled?"),
    ("deepspeed.settings={aio={block_size=nan}}", "deepspeed.settings.aio.block_size = nan; a finite number"),
    ("generator.backbone={rope_parameters={rope_theta=inf}}", "rope_parameters.rope_theta = inf; a finite number"),
    ("generator.backbone.hidden_size=true", "generator.backbone.hidden_size = True; a whole number from 1 to"),
    ("generator.backbone.tie_word_embeddings=1", "generator.backbone.tie_word_embeddings = 1; expected bool"),
    ("generator.head.time_shift=-1", "generator.head.time_shift = -1; a number above 0"),
    ("generator.defaults.height=-8", "generator.defaults.height = -8; a whole number from 1 to 65536 is allowed"),
    ("data.mix={16=nan}", "data.mix.16 = nan; a number from 0"),
    ("data.mix={16=-1}", "data.mix.16 = -1; a number from 0"),
    ("data.mix={16=0}", "all shares are 0"),
    ("data.mix={wide=1}", "data.mix: key = 'wide'; a whole number from 1 to 65536 is allowed"),
    ("data.enlarge=nan", "data.enlarge = nan; a number from 1 to 1000 is allowed"),
    ("data.enlarge=-1", "data.enlarge = -1; a number from 1 to 1000 is allowed"),
    ("optimizer.clip=nan", "optimizer.clip = nan; a number from 0 to 1000000 is allowed"),
    ("optimizer.clip=-1", "optimizer.clip = -1; a number from 0 to 1000000 is allowed"),
    ("optimizer.scale={head=-0.1}", "optimizer.scale.head = -0.1; a number from 0"),
    ("optimizer.warmup_steps=-5", "optimizer.warmup_steps = -5; a whole number from 0 to 1000000000 is allowed"),
    ("optimizer.betas=[0.9, nan]", "optimizer.betas[1] = nan; a number from 0, below 1 is allowed"),
    (f"optimizer.lr={HUGE}", "; a number from 0 to 100 is allowed"),
    (f"run.steps={HUGE}", "; a whole number from 1 to 1000000000 is allowed"),
    ("run.seed=-1", "run.seed = -1; a whole number from 0"),
    ("run.batch_size=100000", "run.batch_size = 100000; a whole number from 1 to 4096 is allowed"),
    ("generator.dropout=2", "generator.dropout = 2; a number from 0 to 1 is allowed"),
    ("generator.dropout=nan", "generator.dropout = nan; a number from 0 to 1 is allowed"),
    ("generator.lora={rank=0}", "generator.lora.rank = 0; a whole number from 1 to"),
    ("generator.lora={rank=1, alpha=inf}", "generator.lora.alpha = inf; a number above 0"),
    ("run.steps=3\nfoo=4", "run.steps = '3\\nfoo=4'; a whole number"),
    ("data.sources=[{places=[]}]", "places is empty"),
]


@pytest.mark.parametrize(("override", "message"), SILENT)
def test_no_key_and_no_value_is_taken_without_a_word(write, override, message) -> None:
    path = write(GENERATOR.replace('data.train = ["a.tar"]', "") if "sources" in override else GENERATOR)
    assert message in refused(path, override)


def test_every_number_of_a_config_has_its_range() -> None:
    """So that a field that is added later does not go unchecked."""
    unchecked = []

    def look(cls: type, where: str) -> None:
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            for part in (hint, *typing.get_args(hint)):
                if part in (int, float) and typing.get_origin(hint) is not Annotated and name not in DECLARED.get(cls, {}):
                    unchecked.append(f"{where}{name}")
                if isinstance(part, type) and dataclasses.is_dataclass(part):
                    look(part, f"{where}{name}.")

    look(DistillConfig, "")
    assert unchecked == []


def test_a_family_has_its_own_fields_of_the_backbone(write) -> None:
    path = write(GENERATOR + "[generator.backbone]\nmodel_type = 'llama'\nmlp_bias = true\n")
    assert load_config(path).generator.backbone["mlp_bias"] is True
    assert "unknown key generator.backbone.mlp_bias" in refused(path, "generator.backbone.model_type=qwen3")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = 1" + "0" * 5000, "a = '\xff'", "\x00"])
def test_a_hostile_config_is_named(write, text) -> None:
    path = write(text)
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in refused(path)


def test_a_pipe_is_no_config(tmp_path) -> None:
    os.mkfifo(tmp_path / "c.toml")
    assert "no regular file" in refused(tmp_path / "c.toml")


def test_broken_toml_is_named(write) -> None:
    assert "not valid TOML" in refused(write("run = ["))
