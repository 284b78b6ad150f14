"""Next-scale models as users meet them: published files, folders, the pipeline, seeds and batches, edits, commands."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from PIL import Image
from scale_cases import (
    INFINITY,
    SIDES,
    infinity_recorded,
    infinity_state,
    joined,
    var_case,
    var_network,
    var_state,
    var_tokenizer,
)

from bitdance import load_pipeline
from bitdance.cli import main
from bitdance.folder.picture_model import PictureModel
from bitdance.generator import kind_of
from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.generate import condition_of, generate_tokens, own_draws
from bitdance.kinds.next_scale.graphs import ScaleGraphs
from bitdance.kinds.next_scale.network import NextScaleNetwork
from bitdance.kinds.next_scale.pipeline import NextScalePipeline
from bitdance.kinds.next_scale.plain import generate_plain
from bitdance.kinds.next_scale.settings import choose
from bitdance.networks.kernels import without_onednn
from bitdance.networks.text_encoder import TextEncoder
from bitdance.picture import read_metadata
from lfq_tokenizer.json_file import write_json
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The recorded checkpoints as the published files are."""
    home = tmp_path_factory.mktemp("published")
    torch.save(var_state("vae"), home / "vae.pth")
    for name in ("var", "var_saln"):
        torch.save(var_state(name), home / f"{name}.pth")
    wrapped = {"epoch": 1, "args": argparse.Namespace(depth=2), "trainer": {"var_wo_ddp": var_state("var"), "var_opt": {}}}
    torch.save(wrapped, home / "ar-ckpt-last.pth")
    return home


@pytest.fixture(scope="module")
def var_folder(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("var") / "model"
    assert (
        main(["convert", str(published / "var.pth"), str(out), "--family", "var", "--part", f"tokenizer={published / 'vae.pth'}"])
        == 0
    )
    return out


@pytest.fixture(scope="module")
def var_pipe(var_folder):
    pipe = load_pipeline(var_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("text", [False, True])
def test_fresh_weights_begin_as_published(text):
    sides = ((1, 1), (2, 2), (4, 4))
    condition = {"condition": "text", "text_width": 256} if text else {"condition": "class", "num_classes": 10}
    own = {"width": 256, "depth": 4, "heads": 4, "inner": 512, "latents": 8, "values": 2, "sides": sides, "gate": 1e-2}
    config = NextScaleConfig(tokens="bits", shared_ada=text, rotary=text, **condition, **own)
    network, again = (NextScaleNetwork(config, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    std, rest, block = (3 * 256) ** -0.5, 1e-3 if text else 0.5, network.blocks[1]
    spread = {
        block.attn.mat_qkv.weight: std,
        block.attn.proj.weight: std / 8**0.5,
        block.ffn.fc2.weight: std / 8**0.5,
        network.head.weight: std / 50,
        network.head_nm.ada_lin[1].weight: std * rest,
    }
    if text:
        spread |= {block.ada_gss[0, 0, :2]: 1e-2 / 16, block.ada_gss[0, 0, 2:]: 1e-3 / 16, network.shared_ada_lin[1].weight: std}
    else:
        rows = block.ada_lin[1].weight.unflatten(0, (6, -1))
        spread |= {rows[:2]: std * 1e-2, rows[2:]: std * 0.5, network.pos_1LC: std}
    for weight, expected in spread.items():
        assert weight.detach().std().item() == pytest.approx(expected, rel=0.1)
    assert not any(bool(p.any()) for name, p in network.named_parameters() if name.endswith("bias") and "norm" not in name)
    one = network.of_text([torch.ones(5, 256)]) if text else network.of_classes(torch.tensor([3]))
    logits = network.run(network.start(one), one, sides, 0)
    assert float(logits.detach().abs().max()) < 0.2, "nothing is sure at first"


def shaken(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Bits, rotary positions and the features of a recorded language model."""
    encoder = TextEncoder.from_pretrained(GOLDEN / "t2i_ckpt", torch.float32)
    torch.manual_seed(0)
    tokenizer = ScaleTokenizer(ScaleConfig("bits", 6, 32, (1, 1, 1), 1)).eval()
    config = NextScaleConfig(
        condition="text",
        tokens="bits",
        width=32,
        depth=2,
        heads=2,
        inner=64,
        latents=6,
        values=2,
        sides=(1, 2, 4, 6),
        text_width=encoder.width,
        text_tokens=64,
        levels=15,
        shared_ada=True,
        rotary=True,
    )
    # the pool needs 128 features for each of its heads
    assert encoder.width // 128 >= 1 or encoder.width >= 1
    network = shaken(NextScaleNetwork(config))
    defaults = {"guidance_scale": 3.0, "cfg_schedule": "constant"}
    folder = tmp_path_factory.mktemp("text") / "model"
    LAYOUT.save(PictureModel(network, tokenizer, None, {"defaults": defaults}, encoder), folder)
    return folder


@pytest.fixture(scope="module")
def text_pipe(text_folder):
    pipe = load_pipeline(text_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["var.pth", "var_saln.pth", "ar-ckpt-last.pth"])
def test_a_published_class_model_makes_the_recorded_picture(published, name, tmp_path):
    parts = ["--part", f"tokenizer={published / 'vae.pth'}"]
    assert main(["convert", str(published / name), str(tmp_path / "m"), "--family", "var", *parts]) == 0
    pipe = NextScalePipeline.from_pretrained(tmp_path / "m")
    assert kind_of(tmp_path / "m") == "next_scale" and list(pipe.model.network.config.sides) == SIDES
    if "saln" in name:
        return
    info, t = var_case("sample/var_cfg4_1img")
    out = pipe(
        class_label=info["label_int"],
        seed=info["g_seed"],
        guidance_scale=float(info["cfg"]),
        top_k=info["top_k"],
        top_p=info["top_p"],
        output_type="pt",
    )
    assert torch.equal(joined(out.tokens), t["out.idx"])
    torch.testing.assert_close(out.images[:, :, ::4, ::4], t["out.image_sub4"], rtol=0, atol=1e-4)


def test_a_published_text_model_is_converted_with_its_own_parts(tmp_path, capsys):
    said = infinity_recorded()["config"]
    arguments = ["convert", str(INFINITY / said["gpt_a"]["file"]), str(tmp_path / "m"), "--family", "infinity"]
    write_json({"sides": [1, 2, 4, 6, 8]}, tmp_path / "config.json")
    arguments += ["--part", f"config={tmp_path / 'config.json'}"]
    assert main([*arguments, "--part", f"tokenizer={INFINITY / said['vae_b']['file']}"]) == 2
    found = capsys.readouterr().err
    assert "bits at every scale" in found
    assert main([*arguments, "--part", f"tokenizer={INFINITY / said['vae_a']['file']}"]) == 2
    assert "--part text_encoder=DIR" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_the_shards_of_a_published_text_model_are_read(tmp_path):
    from bitdance.kinds.next_scale.published import _content, config_of, renamed

    folder = INFINITY / infinity_recorded()["config"]["gpt_b"]["folder"]
    name, state = _content(folder)
    assert name == "its shards" and state.keys() == infinity_state("gpt_b").keys()
    config = config_of(state, renamed(state), {"sides": [1, 2, 4]}, True, folder)
    assert config.tokens == "bits" and config.latents == 20 and config.rotary and config.shared_ada


def test_a_folder_comes_back_equal(var_folder, text_folder, tmp_path):
    for folder in (var_folder, text_folder):
        pipe = load_pipeline(folder)
        pipe.save_pretrained(tmp_path / folder.parent.name)
        assert LAYOUT.fingerprint(folder) == LAYOUT.fingerprint(tmp_path / folder.parent.name)


def test_pictures_do_not_depend_on_their_neighbours(var_pipe, text_pipe):
    together = var_pipe(class_label=[3, 7], num_images_per_prompt=2, seed=5, output_type="tokens", top_k=20)
    alone = var_pipe(class_label=7, seed=7, output_type="tokens", top_k=20)
    assert torch.equal(joined(alone.tokens)[0], joined(together.tokens)[2]) and together.classes == [3, 3, 7, 7]
    texts = ["a fox", "a much longer prompt about a blue mug"]
    together = text_pipe(texts, seed=[1, 2], output_type="tokens")
    for k, text in enumerate(texts):
        alone = text_pipe(text, seed=k + 1, output_type="tokens")
        assert torch.equal(joined(alone.tokens)[0], joined(together.tokens)[k])


def test_other_ratios_follow_the_published_schedules(text_pipe):
    s = text_pipe.model.tokenizer.downsampling
    out = text_pipe("a fox", height=10 * s, width=8 * s, seed=1)
    assert [tuple(one.shape[-2:]) for one in out.tokens] == [(1, 1), (2, 2), (3, 3), (5, 4), (10, 8)]
    assert out.images[0].size == (8 * s, 10 * s)
    with pytest.raises(ValueError, match="last scale of no schedule; nearest are"):
        text_pipe("a fox", height=7 * s, width=8 * s)


def test_tokens_go_back_and_forth(var_pipe):
    out = var_pipe(class_label=1, seed=3, output_type="pt")
    torch.testing.assert_close(var_pipe.decode(out.tokens, output_type="pt"), out.images, rtol=0, atol=1e-5)
    tokens = var_pipe.encode(out.images)
    assert [tuple(one.shape) for one in tokens] == [(1, side, side) for side in (1, 2, 3, 4, 5)]


def test_callback_previews_and_cancel(var_pipe):
    seen = []

    def watch(pipe, scale, t, values):
        seen.append((scale, t, len(values["tokens"])))
        if scale == 1:
            pipe.cancel(0)

    out = var_pipe(class_label=[0, 1], seed=5, callback_on_step_end=watch, output_type="tokens")
    plain = var_pipe(class_label=[0, 1], seed=5, output_type="tokens")
    assert [one[0] for one in seen] == list(range(5)) and [one[2] for one in seen] == [1, 2, 3, 4, 5] and seen[-1][1] == 1.0
    assert torch.equal(joined(out.tokens)[1], joined(plain.tokens)[1])
    assert out.tokens[-1][0].sum() == 0 and torch.equal(out.tokens[1][0], plain.tokens[1][0])


def test_an_edit_keeps_the_tokens_outside_the_mask(var_pipe):
    picture = var_pipe(class_label=2, seed=1).images[0]
    mask = np.zeros((80, 80), dtype=np.uint8)
    mask[:40, 20:] = 255
    out = var_pipe.edit(picture, class_label=4, mask=Image.fromarray(mask), seed=1, num_images=2)
    own = var_pipe.encode(picture)
    assert torch.equal(out.tokens[0], own[0].expand(2, -1, -1))
    stays = torch.ones(5, 5, dtype=torch.bool)
    stays[:3, 1:] = False
    assert torch.equal(out.tokens[-1][:, stays], own[-1].expand(2, -1, -1)[:, stays])
    assert (out.tokens[-1][:, ~stays] != own[-1].expand(2, -1, -1)[:, ~stays]).any()
    with pytest.raises(ValueError, match="needs a mask"):
        var_pipe.edit(picture, class_label=4)
    with pytest.raises(ValueError, match="black everywhere"):
        var_pipe.edit(picture, class_label=4, mask=torch.zeros(5, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "call, said",
    [
        ({"prompt": "a fox"}, "this model makes pictures of classes"),
        ({"class_label": 0, "height": 100}, "height = 100; this model makes pictures of 80×80"),
        ({"class_label": 0, "top_p": 2}, "top_p = 2; a number from 0 to 1"),
        ({"class_label": 0, "preset": "fast"}, "preset = 'fast'; allowed are own, plain"),
        ({"class_label": 0, "tau_by_scale": [1.0]}, "tau_by_scale has 1 values; this picture has 5 scales"),
        ({"class_label": 0, "num_inference_steps": 5}, "the scales follow from the size"),
        ({"class_label": 0, "cfg_schedule": "up"}, "cfg_schedule = 'up'; allowed are rising, constant"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(var_pipe, call, said):
    with pytest.raises(ValueError, match="(?s).*" + said):
        var_pipe(**call)


def test_generate_and_make_again(var_folder, tmp_path, capsys):
    command = [
        "generate",
        "--class",
        "3",
        "5",
        "--model",
        str(var_folder),
        "-o",
        str(tmp_path / "out"),
        "--cfg-schedule",
        "constant",
    ]
    assert main(command) == 0
    first = next((tmp_path / "out").glob("0000-*.png"))
    assert read_metadata(first)["cfg_schedule"] == "constant"
    assert main(["generate", "--from", str(first), "--model", str(var_folder), "-o", str(tmp_path / "again")]) == 0
    assert next((tmp_path / "again").glob("*.png")).read_bytes() == first.read_bytes()
    capsys.readouterr()
    assert main([*command[:-2], "--steps", "4"]) == 2
    assert "--steps is not for the kind of model" in capsys.readouterr().err
    (tmp_path / "jobs.jsonl").write_text('{"class": 3, "steps": 4}\n')
    assert (
        main(["generate", "--prompts", str(tmp_path / "jobs.jsonl"), "--model", str(var_folder), "-o", str(tmp_path / "no")]) == 2
    )
    assert "the scales follow from the size" in capsys.readouterr().err


def test_edit_from_the_command_line(var_folder, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    mask = np.zeros((80, 80), dtype=np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ["edit", str(tmp_path / "in.png"), "--class", "2", "--model", str(var_folder), "-o", str(tmp_path / "out.png")]
    assert main([*command, "--mask", str(tmp_path / "mask.png")]) == 0
    assert Image.open(tmp_path / "out.png").size == (80, 80)
    capsys.readouterr()
    assert main(command) == 2
    assert "needs a mask" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["var_folder", "text_folder"])
def test_info_sizes_verify_export_doctor_and_bench(which, request, tmp_path, capsys):
    folder = request.getfixturevalue(which)
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "next_scale" and facts["parts"]["generator"] > 0 and facts["bits_per_token"] == 6
    assert main(["sizes", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
    assert main(["export", str(folder), str(tmp_path / "half"), "--format", "official", "--dtype", "bfloat16"]) == 0
    assert next(load_pipeline(tmp_path / "half", dtype="bfloat16").model.network.parameters()).dtype == torch.bfloat16
    assert main(["doctor", "--model", str(folder), "--json"]) == 0
    capsys.readouterr()
    assert main(["bench", "--model", str(folder), "--batch", "2", "--repeats", "1", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["flops"] > 0 and set(run["seconds"]) == {"tokens", "decode", "png"}
    assert main(["bench", "--model", str(folder), "--batch", "1", "--repeats", "1", "--yardstick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]["yardstick"]
    assert found["times_faster"] == pytest.approx(found["seconds"] / found["ours"])


@pytest.mark.parametrize("which", ["var_pipe", "text_pipe"])
@pytest.mark.parametrize("guidance", [3.0, None])
def test_the_plain_procedure_makes_the_same_tokens(which, guidance, request):
    pipe = request.getfixturevalue(which)
    network, quantizer = pipe.model.network, pipe.model.tokenizer.quantize
    off = 0 if pipe.names is not None else 1
    settings = choose(pipe.model.defaults, "plain", guidance=off if guidance is None else guidance).changed(top_k=0, top_p=0.0)
    height, width = pipe.model.sizes[0]
    conditions, sides = [1, 2] if pipe.names is not None else ["a red apple", "a dog"], pipe.sides(height, width)

    def draws():
        return own_draws([torch.Generator().manual_seed(seed) for seed in (5, 6)])

    condition = condition_of(network, pipe.model.text, conditions, settings.guided)
    ours = generate_tokens(network, quantizer, condition, sides, settings, draws(), 2).scales
    with without_onednn(network):
        plain = generate_plain(network, quantizer, condition, sides, settings, draws(), 2)
    same = [(a == b).float().mean() for a, b in zip(ours, plain, strict=True)]
    assert len(same) == len(sides) and float(torch.stack(same).mean()) > 0.999


class _Replayed:
    """Stands for CUDA's recorder: a replay computes the same again, from what then lies at the same addresses, without the loop's
    Python."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, compute):
        self.recorded += 1
        filled = compute()

        def replay():
            self.replayed += 1
            filled.copy_(compute())

        return replay, filled


@pytest.mark.parametrize("which", ["var_pipe", "text_pipe"])
def test_recorded_scales_give_what_the_network_gives(which, request):
    pipe = request.getfixturevalue(which)
    recorder = _Replayed()
    pipe_graphs = ScaleGraphs(pipe.model.network, recorder)
    network, quantizer, sides = pipe.model.network, pipe.model.tokenizer.quantize, pipe.sides(*pipe.model.sizes[0])
    settings = choose(pipe.model.defaults, None)

    def run(what, seed, graphs, **more):
        condition = condition_of(network, pipe.model.text, what, settings.guided)
        draws = own_draws([torch.Generator().manual_seed(seed + i) for i in range(len(what))])
        return generate_tokens(network, quantizer, condition, sides, settings, draws, len(what), graphs=graphs, **more).total

    def same(found, expected):  # prompts are padded, so their sums are rounded otherwise
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    asked = [[1, 2], [2, 0], [0, 1]] if pipe.names is not None else [["a dog", "a cat"], ["a cow", "a cat"], ["a cat", "a dog"]]
    for number, what in enumerate(asked):
        same(run(what, number, pipe_graphs), run(what, number, None))
        assert recorder.recorded == (0 if number == 0 else len(sides))  # the first run warms up, the second records
    assert recorder.replayed == 2 * len(sides)

    cancelled: set[int] = set()

    def stop(done, of, tokens):
        if done == 2:
            cancelled.add(0)

    left = run(asked[0], 7, pipe_graphs, on_block=stop, cancelled=cancelled)
    same(left[1], run(asked[0], 7, None)[1])
    same(run(asked[0], 9, pipe_graphs), run(asked[0], 9, None))  # the graphs were left as they were

    inside = []

    def another(done, of, tokens):
        if done == 1:
            before = recorder.replayed
            inside.append(run(asked[1], 4, pipe_graphs))
            assert recorder.replayed == before  # they belong to the run that is not yet done

    outer = run(asked[2], 3, pipe_graphs, on_block=another)
    same(outer, run(asked[2], 3, None))
    same(inside[0], run(asked[1], 4, None))


def test_a_folder_that_does_not_fit_is_refused_by_file(var_folder, tmp_path):
    for change, said in (
        ({"values": 32}, "tokens of one of 32 codes .* but of one of 64 codes"),
        ({"sides": [1, 2, 3]}, "pos_1LC has shape"),
        ({"sides": [2, 3]}, "the first scale is 1×1"),
        ({"condition": "sound"}, "allowed are class, text"),
    ):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(var_folder, tmp_path / "m")
        config = json.loads((Path(tmp_path) / "m" / "next_scale.json").read_text())
        write_json(config | change, tmp_path / "m" / "next_scale.json")
        with pytest.raises(ValueError, match=f"(?s).*{said}"):
            load_pipeline(tmp_path / "m")


def test_another_tokenizer_is_refused(published, tmp_path, capsys):
    file = INFINITY / infinity_recorded()["config"]["vae_a"]["file"]
    arguments = ["convert", str(published / "var.pth"), str(tmp_path / "m"), "--family", "var", "--part", f"tokenizer={file}"]
    assert main(arguments) == 2
    assert "makes tokens of 8 bits at every scale, the model reads one of 64 codes" in capsys.readouterr().err


def test_the_recorded_network_is_what_the_pipeline_holds(var_pipe):
    for key, tensor in var_network("var").state_dict().items():
        assert torch.equal(var_pipe.model.network.state_dict()[key], tensor), key
    for key, tensor in var_tokenizer().state_dict().items():
        assert torch.equal(var_pipe.model.tokenizer.state_dict()[key], tensor), key


def test_published_tokenizers_are_converted_and_measured_on_pictures(published, tmp_path, capsys):
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    assert main(["tokenizer", "convert", str(published / "vae.pth"), str(tmp_path / "vae")]) == 0
    assert "one of 64 codes" in capsys.readouterr().out
    back = ScaleTokenizer.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in var_tokenizer().state_dict().items())
    pictures = [str(tmp_path / f"{number}.png") for number in range(3)]
    command = ["tokenizer", "eval", str(tmp_path), "--model", str(tmp_path / "vae"), "--json"]
    assert main(command) == 2
    assert "does not say its scales" in capsys.readouterr().err
    assert main([*command, "--sides", "1", "2", "3", "4", "5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pictures"] == len(pictures) and figures["bits_per_picture"] == 6 * (1 + 4 + 9 + 16 + 25)
    assert main([*command, "--sides", "1", "2", "--size", "80"]) == 2
    assert "32×32 pixels" in capsys.readouterr().err
    vae = INFINITY / infinity_recorded()["config"]["vae_a"]["file"]
    assert main(["tokenizer", "convert", str(vae), str(tmp_path / "bits"), "--patchify"]) == 0
    assert ScaleTokenizer.from_pretrained(tmp_path / "bits").config.patchify
    assert main(["tokenizer", "convert", str(published / "vae.pth"), str(tmp_path / "no"), "--patchify"]) == 2
    assert "--patchify is for bits at every scale" in capsys.readouterr().err
