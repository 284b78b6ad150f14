"""A model that lists its words says which words of a prompt it was never taught, once, and draws all the same."""

import warnings
from pathlib import Path

import pytest

from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.folder.parts import DEMO, read_extras
from bitdance.sequence.vocabulary import MOST, unknown_words, with_words, words_of
from stages.data.captions import PALETTE, caption_templates

QUICK = ["--height", "64", "--width", "64", "--steps", "1"]


@pytest.fixture(scope="module")
def pipe() -> BitDancePipeline:
    return BitDancePipeline.from_pretrained("demo", device="cpu")


def draw(pipe: BitDancePipeline, *prompts: str) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = pipe(list(prompts), 64, 64, num_inference_steps=1, seed=1, output_type="bits")
    assert out.bits.shape == (len(prompts), 64, 8, 8)
    return [str(warning.message) for warning in said]


def test_words_are_cut_as_people_write_them() -> None:
    assert words_of(["A fox's den, 3D-style", "the FOX’s_den"]) == ["a", "fox's", "den", "3d", "style", "the", "fox’s"]
    assert unknown_words({"words": ["a", "fox"]}, ["A zorgle fox", "zorgle?"]) == ["zorgle"]


@pytest.mark.parametrize("extras", [{}, {"words": []}, {"words": "fox"}, {"words": None}])
def test_without_a_list_nothing_is_unknown(extras: dict[str, object]) -> None:
    assert unknown_words(extras, ["a zorgle"]) == []
    assert "words" not in with_words(extras, ["a zorgle"])


def test_what_a_model_learns_joins_its_list() -> None:
    assert with_words({"words": ["fox"], "card": {}}, ["a zorb"]) == {"words": ["a", "fox", "zorb"], "card": {}}
    assert with_words({"words": ["fox"]}, []) == {}  # it has learned nobody knows what
    assert with_words({"words": ["fox"]}, [f"w{i}" for i in range(MOST)]) == {}


def test_every_caption_of_the_bundled_model_is_known() -> None:
    extras, captions = read_extras(DEMO), []
    words = {"concept": "fox", "a_concept": "a fox", "style": "3D", "a_style": "a 3D", "tags": "animal"}
    for background in PALETTE:
        words |= {"background": background, "a_background": f"a {background}"}
        captions += [template.format(**words) for template in caption_templates("3d", background, keywords=True)]
    assert unknown_words(extras, [*extras["prompts"], *captions]) == [] and len(captions) > 100


def test_each_word_is_named_once(pipe: BitDancePipeline) -> None:
    (first,) = draw(pipe, "a purple zorgle", "a zorgle with a fox")
    assert "'zorgle'" in first and "'with'" in first and "purple" not in first and "`bitdance info demo --prompts`" in first
    assert draw(pipe, "a zorgle") == []
    assert len(draw(pipe, "a grumpf")) == 1


def test_a_misspelt_word_comes_with_the_one_it_may_mean(pipe: BitDancePipeline) -> None:
    (said,) = draw(pipe, "a pengin beside strawberries")
    assert "'pengin' (penguin?), 'beside', 'strawberries' (strawberry?)" in said


def test_known_words_and_models_without_a_list_are_silent(pipe: BitDancePipeline) -> None:
    assert draw(pipe, "a fox, 3D style, on a blue background", "Cactus on YELLOW", "") == []
    other = BitDancePipeline(pipe.model)
    words = pipe.model.extras.pop("words")
    try:
        assert draw(other, "a quux") == []
    finally:
        pipe.model.extras["words"] = words


def test_the_command_says_so_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", "a purple zorgle", "--seed", "1", "2", "-o", str(tmp_path / "out"), "--batch-size", "1", *QUICK]) == 0
    )
    said = capsys.readouterr()
    assert said.err.count("never taught 'zorgle'") == 1 and "bitdance: warning:" in said.err and "zorgle" not in said.out
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
