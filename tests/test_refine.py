"""Refinement as users meet it: folders, the pipeline, seeds and batches, adaptive steps, edits, commands, conversion."""

import json

import numpy as np
import pytest
import torch
from grn_cases import FOLDER, grn_case, hbq_tokenizer, recorded, weights
from PIL import Image
from refine_model import class_model, saved, text_model

from bitdance import load_pipeline
from bitdance.cli import main
from bitdance.generator import kind_of, module_of
from bitdance.kinds.refine.edit import changed_tokens, token_mask
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.pipeline import RefinePipeline
from bitdance.kinds.refine.settings import AdaptiveSteps, RefineSettings, choose
from bitdance.picture import read_metadata
from lfq_tokenizer.json_file import write_json
from stages.data.captions import PALETTE


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return saved(class_model(), tmp_path_factory.mktemp("refine") / "classes")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return saved(text_model(), tmp_path_factory.mktemp("refine") / "prompts")


@pytest.fixture(scope="module")
def class_pipe(classes):
    pipe = load_pipeline(classes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def text_pipe(prompts):
    pipe = load_pipeline(prompts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_folder_says_its_kind_and_comes_back_equal(classes, prompts, tmp_path):
    for folder in (classes, prompts):
        assert kind_of(folder) == "refine"
        pipe = load_pipeline(folder)
        pipe.save_pretrained(tmp_path / folder.name)
        again = load_pipeline(tmp_path / folder.name)
        assert all(
            torch.equal(a, b)
            for a, b in zip(pipe.model.network.state_dict().values(), again.model.network.state_dict().values(), strict=True)
        )
        assert LAYOUT.fingerprint(folder) == LAYOUT.fingerprint(tmp_path / folder.name)


@pytest.mark.parametrize("attention", ["prefix", "joint"])
def test_pictures_of_prompts_do_not_depend_on_their_neighbours(attention, tmp_path):
    pipe = load_pipeline(saved(text_model(attention), tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    texts = ["a fox", "a much longer prompt about a blue mug on a table", "a fox"]
    together = pipe(texts, seed=[1, 2, 3], output_type="tokens").tokens
    for k, text in enumerate(texts):
        alone = pipe(text, seed=k + 1, output_type="tokens").tokens
        assert torch.equal(alone[0], together[k])
    assert not torch.equal(together[0], together[2])


def test_pictures_of_classes_do_not_depend_on_their_neighbours(class_pipe):
    out = class_pipe(class_label=["ant", 2], num_images_per_prompt=2, seed=7)
    assert out.tokens.shape == (4, 8, 4, 4) and out.classes == [0, 0, 2, 2] and out.seeds == [7, 8, 9, 10]
    assert set(out.tokens.unique().tolist()) == {-1.0, 1.0}
    alone = class_pipe(class_label="cow", seed=9, output_type="tokens")
    assert torch.equal(alone.tokens[0], out.tokens[2]) and alone.images is None and alone.steps == [6]


def test_other_sizes_of_a_model_of_prompts(text_pipe):
    s = text_pipe.model.tokenizer.downsampling
    assert text_pipe("a fox", height=6 * s, width=2 * s, output_type="tokens").tokens.shape == (1, 8, 6, 2)
    with pytest.raises(ValueError, match=f"height = {6 * s + 1}; a multiple of {s}"):
        text_pipe("a fox", height=6 * s + 1)


def test_the_negative_prompt_counts(text_pipe):
    plain, against, empty = (
        text_pipe("a fox", seed=1, output_type="tokens", guidance_scale=4.0, negative_prompt=text).tokens
        for text in (None, "a blue mug", "")
    )
    assert torch.equal(plain, empty) and not torch.equal(plain, against)


def test_adaptive_steps_give_each_picture_its_own_number(class_pipe):
    rule = {"warmup": 2, "slope": 200.0, "offset": -113.0, "least": 4}
    out = class_pipe(
        class_label=[0, 1, 2, 0], seed=3, num_inference_steps=20, adaptive=rule, preset="adaptive", output_type="tokens"
    )
    assert all(4 <= steps <= 20 for steps in out.steps) and len(set(out.steps)) > 1
    for k, number in enumerate([0, 1, 2, 0]):  # a picture that is finished leaves the batch, and the others do not notice
        alone = class_pipe(
            class_label=number, seed=3 + k, num_inference_steps=20, adaptive=rule, preset="adaptive", output_type="tokens"
        )
        assert torch.equal(alone.tokens[0], out.tokens[k]) and alone.steps == [out.steps[k]]


def test_adaptive_steps_of_a_model_of_prompts(text_pipe):
    rule = {"warmup": 2, "slope": 0.0, "offset": 3.0, "least": 3}
    out = text_pipe(["a fox", "a mug"], seed=1, num_inference_steps=20, adaptive=rule, preset="adaptive", output_type="tokens")
    assert out.steps == [5, 5]
    ramp = text_pipe(
        "a fox", seed=1, num_inference_steps=20, adaptive=rule, preset="adaptive", schedule="ramp", output_type="tokens"
    )
    assert ramp.steps == [5]


def test_the_rule_is_the_published_one():
    rule = AdaptiveSteps()
    assert [rule.more_steps(entropy, 50) for entropy in (0.0, 0.9, 0.93, 1.0)] == [15, 15, 31, 45]


def test_callback_progress_and_cancel(class_pipe):
    seen = []

    def watch(pipe, step, t, values):
        seen.append((step, t, values["tokens"].clone()))
        if step == 1:
            pipe.cancel(0)

    out = class_pipe(class_label=[0, 1], seed=5, callback_on_step_end=watch, output_type="tokens")
    plain = class_pipe(class_label=[0, 1], seed=5, output_type="tokens")
    assert [step for step, _, _ in seen] == list(range(6)) and seen[-1][1] == 1.0
    assert torch.equal(out.tokens[1], plain.tokens[1]) and torch.equal(out.tokens[0], seen[1][2][0])
    assert out.steps == [2, 6]


@pytest.mark.parametrize(
    "call, said",
    [
        ({"prompt": "a fox"}, "this model makes pictures of classes"),
        ({"class_label": "dog"}, "dog"),
        ({"class_label": 0, "height": 100}, "height = 100; this model makes pictures of"),
        ({"class_label": 0, "num_inference_steps": 0}, "num_inference_steps = 0; a whole number from 1 to 10000"),
        ({"class_label": 0, "tau": 0.0}, "tau = 0.0; a number above 0"),
        ({"class_label": 0, "schedule": "fast"}, "schedule = 'fast'; allowed are linear, cosine, ramp"),
        ({"class_label": 0, "preset": "fast"}, "preset = 'fast'; allowed are fixed, adaptive"),
        ({"class_label": 0, "adaptive": {"warm": 1}, "preset": "adaptive"}, "an object with warmup, slope, offset, least"),
        ({"class_label": 0, "adaptive": {"warmup": 9}, "preset": "adaptive"}, "more than the adaptive warmup of 9"),
        ({"class_label": 0, "negative_prompt": "a"}, "negative_prompt"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(class_pipe, call, said):
    with pytest.raises(ValueError, match="(?s).*" + said.replace("[", r"\[")):
        class_pipe(**call)


def test_unknown_arguments_are_named(class_pipe):
    with pytest.raises(TypeError, match="unknown arguments taus; settings are"):
        class_pipe(class_label=0, taus=1.0)


# Edits


def bits_for(pipe, seed=0):
    config = pipe.model.network.config
    return torch.randint(2, (1, config.bits, *config.grids[0]), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_bits_outside_the_mask_stay_equal(class_pipe, strength):
    bits = bits_for(class_pipe)
    free = torch.zeros(4, 4, dtype=torch.bool)
    free[:2, 1:] = True
    out = class_pipe.edit(bits, class_label=1, mask=free, strength=strength, num_images=3, seed=1, output_type="tokens")
    assert torch.equal(out.tokens[:, :, ~free], bits.expand(3, -1, -1, -1)[:, :, ~free])
    assert (out.tokens[:, :, free] != bits.expand(3, -1, -1, -1)[:, :, free]).any()
    assert out.steps == [6 if strength == 1.0 else 3] * 3
    assert torch.equal(
        out.tokens[1], class_pipe.edit(bits, class_label=1, mask=free, strength=strength, seed=2, output_type="tokens").tokens[0]
    )


def test_a_mask_of_pixels_frees_every_token_it_touches():
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[3, 5] = 255
    assert token_mask(Image.fromarray(pixels), (4, 4), 2).nonzero().tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="black everywhere"):
        token_mask(np.zeros((8, 8), dtype=bool), (4, 4), 2)
    with pytest.raises(ValueError, match="8×8 pixels"):
        token_mask(np.ones((6, 8), dtype=bool), (4, 4), 2)


def test_a_weak_edit_of_the_whole_keeps_more_of_the_picture(text_pipe):
    bits = bits_for(text_pipe)
    kept = [
        float(
            (
                text_pipe.edit(bits, "a mug", strength=strength, seed=list(range(8)), num_images=8, output_type="tokens").tokens
                == bits
            )
            .float()
            .mean()
        )
        for strength in (0.2, 1.0)
    ]
    assert kept[0] > kept[1]


def test_only_what_two_prompts_tell_apart_changes(text_pipe):
    bits = bits_for(text_pipe)
    free = changed_tokens(text_pipe, bits[0], "a fox", "a blue mug on a table")
    out = text_pipe.edit(bits, "a blue mug on a table", source_prompt="a fox", seed=1, output_type="tokens")
    assert free.sum() > 0 and torch.equal(out.tokens[0][:, ~free], bits[0][:, ~free])
    same = changed_tokens(text_pipe, bits[0], "a fox", "a fox")
    assert same.sum() >= 1  # no token differs: the one that differs most is named, so that something can change


def test_new_ground_around_a_picture(text_pipe):
    bits, s = bits_for(text_pipe), text_pipe.model.tokenizer.downsampling
    out = text_pipe.edit(bits, "a fox", extend=(0, 2 * s, s, 0), seed=1, output_type="tokens")
    assert out.tokens.shape == (1, 8, 5, 6) and torch.equal(out.tokens[0, :, :4, :4], bits[0])
    with pytest.raises(ValueError, match="multiples of"):
        text_pipe.edit(bits, "a fox", extend=(1, 0, 0, 0))


def test_a_picture_is_encoded_before_it_is_changed(class_pipe):
    picture = class_pipe(class_label=0, seed=1).images[0]
    free = torch.zeros(4, 4, dtype=torch.bool)
    free[0] = True
    out = class_pipe.edit(picture, class_label=1, mask=free, seed=1)
    assert torch.equal(out.tokens[:, :, 1:], class_pipe.encode(picture)[:, :, 1:])
    assert out.images[0].size == picture.size
    with pytest.raises(ValueError, match="the picture has 67×64 pixels; multiples of .*: crop it to 6"):
        class_pipe.edit(Image.new("RGB", (67, 64)), class_label=1)
    with pytest.raises(ValueError, match="this model makes pictures of"):
        class_pipe.edit(Image.new("RGB", (picture.width * 2, picture.height)), class_label=1)
    with pytest.raises(ValueError, match="strength = 0; a number above 0"):
        class_pipe.edit(picture, class_label=1, strength=0)


# Commands


def test_generate_and_make_again(classes, tmp_path, capsys):
    assert (
        main(
            [
                "generate",
                "--class",
                "ant",
                "2",
                "--model",
                str(classes),
                "-o",
                str(tmp_path / "out"),
                "--tau",
                "1.2",
                "--steps",
                "3",
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["class_name"] for line in lines] == ["ant", "cow"] and lines[0]["steps"] == 3
    first = next((tmp_path / "out").glob("0000-*.png"))
    assert read_metadata(first)["tau"] == 1.2
    assert main(["generate", "--from", str(first), "--model", str(classes), "-o", str(tmp_path / "again")]) == 0
    again = next((tmp_path / "again").glob("*.png"))
    assert again.read_bytes() == first.read_bytes()
    capsys.readouterr()


def test_generate_refuses_what_is_of_other_kinds(classes, prompts, tmp_path, capsys):
    for arguments, said in (
        (["a fox"], "this model makes pictures of classes"),
        (["--class", "0", "--sampler", "euler"], "--sampler is not for the kind of model"),
        (["--class", "0", "--tau", "0"], "tau"),
        (["--class", "0", "--schedule", "fast"], "schedule = 'fast'"),
    ):
        assert main(["generate", *arguments, "--model", str(classes), "-o", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err
    assert main(["generate", "--class", "0", "--model", str(prompts), "-o", str(tmp_path / "no")]) == 2
    assert "pictures of prompts" in capsys.readouterr().err
    assert main(["generate", "a fox", "--model", "demo", "--tau", "1", "-o", str(tmp_path / "no")]) == 2
    assert "--tau is not for the kind of model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_edit_from_the_command_line(prompts, tmp_path, capsys):
    assert main(["generate", "a fox", "--model", str(prompts), "-o", str(tmp_path / "out"), "-q"]) == 0
    picture = next((tmp_path / "out").glob("*.png"))
    pipe = load_pipeline(prompts)
    size = Image.open(picture).size
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[:, : size[0] // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    common = ["edit", str(picture), "a blue mug", "--model", str(prompts)]
    assert main([*common, "--mask", str(tmp_path / "mask.png"), "--seed", "4", "-o", str(tmp_path / "one.png")]) == 0
    expected = pipe.edit(Image.open(picture), "a blue mug", mask=Image.fromarray(mask), seed=4).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), np.asarray(expected))
    assert main([*common, "--seed", "1", "2", "-o", str(tmp_path / "two")]) == 0  # changed where the two prompts differ
    assert len(list((tmp_path / "two").glob("*.png"))) == 2
    told = pipe.edit(Image.open(picture), "a blue mug", source_prompt="a fox", seed=1).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "two" / f"{picture.stem}-1.png")), np.asarray(told))
    capsys.readouterr()
    for arguments, said in (
        ([*common, "-o", str(tmp_path / "x.png"), "--seed", "1", "2"], "give a folder"),
        ([*common, "-o", str(tmp_path / "x.png"), "--strength", "2"], "strength = 2"),
        (["edit", str(picture), "--model", str(prompts), "-o", str(tmp_path / "x.png")], "a prompt in quotes or --class"),
        (["edit", str(picture), "a", "--model", "demo", "-o", str(tmp_path / "x.png")], "cannot edit"),
        (["edit", str(tmp_path / "none.png"), "a", "--model", str(prompts), "-o", str(tmp_path / "x.png")], "does not exist"),
        (
            [
                "edit",
                str(tmp_path / "mask.png"),
                "a",
                "--model",
                str(prompts),
                "--extend",
                "0",
                "0",
                "0",
                "0",
                "-o",
                str(tmp_path / "x.png"),
            ],
            "extend",
        ),
        (
            ["generate", "--from", str(tmp_path / "one.png"), "--model", str(prompts), "-o", str(tmp_path / "y")],
            "is a changed picture",
        ),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("which", ["classes", "prompts"])
def test_info_sizes_verify_export_doctor_and_bench(which, request, tmp_path, capsys):
    folder = request.getfixturevalue(which)
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "refine" and facts["bits_per_token"] == 8 and facts["parts"]["generator"] > 0
    assert main(["sizes", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
    assert main(["export", str(folder), str(tmp_path / "half"), "--format", "official", "--dtype", "bfloat16"]) == 0
    assert main(["verify", str(tmp_path / "half")]) == 0
    assert next(load_pipeline(tmp_path / "half", dtype="bfloat16").model.network.parameters()).dtype == torch.bfloat16
    assert main(["doctor", "--model", str(folder), "--json"]) == 0
    capsys.readouterr()
    assert main(["bench", "--model", str(folder), "--batch", "2", "--repeats", "1", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["flops"] > 0 and set(run["seconds"]) == {"tokens", "decode", "png"}


def test_a_folder_that_does_not_fit_is_refused_by_file(classes, prompts, tmp_path):
    import shutil

    for folder, file, change, said in (
        (classes, "refine.json", {"bits": 16}, "tokens of 16 bits, but of 8 bits"),
        (classes, "refine.json", {"condition": "sound"}, "allowed are class, text"),
        (classes, "bitdance.json", {"defaults": {"tau": 0}}, "tau = 0"),
        (classes, "bitdance.json", {"defaults": {"preset": "x"}}, "preset = 'x'"),
        (prompts, "refine.json", {"text_width": 7}, r"expected \[48, 7\]"),
    ):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "m")
        write_json(json.loads((tmp_path / "m" / file).read_text()) | change, tmp_path / "m" / file)
        with pytest.raises(ValueError, match=f"(?s){file.split('.')[0]}.*{said}"):
            module_of(tmp_path / "m").load_pipeline(tmp_path / "m")


# Published files


@pytest.fixture(scope="module")
def grn(tmp_path_factory):
    """The recorded checkpoints wrapped as the published files are."""
    home = tmp_path_factory.mktemp("grn")
    import argparse

    for form in ("ind", "bit"):
        state = weights(f"c2i_{form}")
        wrapped = {"model": {k: v + 1 for k, v in state.items()}, "model_ema1": state, "args": argparse.Namespace(epochs=600)}
        torch.save(wrapped, home / f"GRN_{form}.pth")
        torch.save({"trainer": {"gpt_fsdp": weights(f"t2i_{form}")}}, home / f"T2I_{form}.pth")
    torch.save({"vae": {"x": torch.zeros(1)}, "ema": weights("tokenizer")}, home / "HBQ.ckpt")
    write_json({"rounds": 3, "in_context_start": 2}, home / "class.json")
    write_json({"rounds": 3, "grids": [[4, 6]], "attention": "prefix"}, home / "text.json")
    return home


@pytest.mark.parametrize("form", ["ind", "bit"])
def test_a_published_class_model_becomes_a_folder_that_makes_the_recorded_picture(grn, form, tmp_path, capsys):
    parts = ["--part", f"tokenizer={grn / 'HBQ.ckpt'}", "--part", f"config={grn / 'class.json'}"]
    assert main(["convert", str(grn / f"GRN_{form}.pth"), str(tmp_path / "m"), "--family", "grn", *parts]) == 0
    assert "model_ema1" in capsys.readouterr().out
    pipe = RefinePipeline.from_pretrained(tmp_path / "m")
    assert (
        pipe.model.network.config.labels == form
        and pipe.model.network.config.heads == recorded()["config"]["c2i_ind"]["num_heads"]
    )
    info, t = grn_case(f"c2i/sample_{form}")
    bits = hbq_tokenizer().encode(grn_case("tokenizer/encode")[1]["in.image"])
    torch.testing.assert_close(pipe.model.tokenizer.decode(bits), hbq_tokenizer().decode(bits))
    settings = {"num_inference_steps": info["steps"], "guidance_scale": info["cfg"], "tau": info["tau"]}
    interval = tuple(info["interval"])
    out = pipe(class_label=int(t["in.y"][0]), seed=info["seed"], guidance_interval=interval, output_type="np", **settings)
    assert out.images.shape == (1, 64, 64, 3) and out.tokens.shape == (1, 12, 4, 4)


def test_a_published_text_model_becomes_a_folder(grn, tmp_path, capsys):
    encoder = tmp_path / "encoder"
    import shutil

    from refine_model import TEXT_ENCODER

    shutil.copytree(TEXT_ENCODER, encoder)
    arguments = [
        "convert",
        str(grn / "T2I_bit.pth"),
        str(tmp_path / "m"),
        "--family",
        "grn",
        "--part",
        f"tokenizer={grn / 'HBQ.ckpt'}",
    ]
    arguments += ["--part", f"config={grn / 'text.json'}"]
    assert main(arguments) == 2
    assert "--part text_encoder=DIR" in capsys.readouterr().err
    code = main([*arguments, "--part", f"text_encoder={encoder}"])
    said = capsys.readouterr()
    assert code in (0, 2)
    if code:  # the recorded encoder is of another width than the recorded text model
        assert "features per token" in said.err and not (tmp_path / "m").exists()
    else:
        assert load_pipeline(tmp_path / "m")("a fox", num_inference_steps=2).tokens.shape == (1, 12, 4, 6)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("boom",)

    torch.save({"model_ema1": {"net.pos_embed": Evil()}}, tmp_path / "evil.pth")
    assert (
        main(["convert", str(tmp_path / "evil.pth"), str(tmp_path / "m"), "--family", "grn", "--part", f"tokenizer={FOLDER}"])
        == 2
    )
    found = capsys.readouterr()
    assert "could run code" in found.err and "boom" not in found.out


def test_settings_go_from_defaults_over_presets_to_what_is_said():
    defaults = {"num_inference_steps": 30, "tau": 1.2, "adaptive": {"warmup": 3, "slope": 1.0, "offset": 2.0, "least": 5}}
    assert choose(defaults) == RefineSettings(30, tau=1.2)
    assert choose(defaults, "adaptive").adaptive == AdaptiveSteps(3, 1.0, 2.0, 5)
    assert choose(defaults, "adaptive", steps=40).steps == 40
    assert choose({}, "GRN-B").guidance_interval == (0.44, 1.0)
    settings = choose(defaults, "adaptive", guidance_interval=(0.2, 0.9))
    assert choose({}, None, steps=settings.steps, guidance=settings.guidance, **settings.words) == settings


def test_edits_are_measured_against_what_was_taught(prompts, tmp_path, capsys):
    from stages.cli import measure
    from stages.data.pack import PackOptions, pack
    from stages.data.sample import CaptionedPicture

    class Drawings:
        """Two concepts on three backgrounds, plain colours with a square in the middle."""

        expected = 6

        def __init__(self, backgrounds):
            self.backgrounds = backgrounds

        def __iter__(self):
            for concept, middle in (("fox", (200, 100, 0)), ("mug", (0, 60, 200))):
                for background in self.backgrounds:
                    pixels = np.full((64, 64, 3), PALETTE[background], dtype=np.uint8)
                    pixels[16:48, 16:48] = middle
                    about = {"concept": concept, "style": "3d", "background": background}
                    caption = f"a {concept} on a {background} background"
                    yield CaptionedPicture(f"{concept}-{background}", Image.fromarray(pixels), [caption], about)

        def describe(self):
            return {"name": "drawings"}

    names = list(PALETTE)[:4]
    pack(Drawings(names[:3]), tmp_path / "taught", PackOptions())
    pack(Drawings(names[3:]), tmp_path / "heldout", PackOptions())
    shards = ["--train", str(tmp_path / "taught"), "--heldout", str(tmp_path / "heldout")]
    command = ["edits", "--model", str(prompts), *shards, "--count", "4", "--grid", str(tmp_path / "grid.png"), "--json"]
    assert measure(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 4 and 0 <= found["both"] <= min(found["background"], found["picture"]) <= 1
    assert found["bits_kept"] >= 1 - found["tokens_free"] - 1e-6 and (tmp_path / "grid.png").is_file()
    assert measure(["edits", "--model", "demo", *shards]) == 2
    assert "cannot edit" in capsys.readouterr().err
