"""One size list, known before any weight is loaded."""

import dataclasses

import pytest
from golden_cases import GOLDEN

from bitdance.folder.checkpoint import load_model
from bitdance.folder.sizes import (
    SizeRule,
    check_size,
    default_size,
    nearest_sizes,
    rule_of_folder,
    rule_of_model,
    supported_sizes,
)

PUBLISHED = SizeRule(downsampling=16, patch_side=8, sides=frozenset(range(1, 257)))  # the 14B 64-token model
TRAINED = dataclasses.replace(PUBLISHED, trained=((256, 128), (128, 128)), default=(128, 128))


def test_a_folder_and_its_loaded_model_have_the_same_rule():
    rule = rule_of_folder(GOLDEN / "t2i_ckpt")
    assert (rule.downsampling, rule.patch_side, rule.unit) == (8, 2, 16)
    assert rule.sides == frozenset(range(1, 513)) and not rule.trained
    assert rule_of_model(load_model(GOLDEN / "t2i_ckpt", "cpu")) == rule


def test_every_listed_size_is_supported_and_its_own_nearest():
    for rule in (PUBLISHED, TRAINED):
        sizes = supported_sizes(rule)
        assert len(sizes) == len(set(sizes))
        for height, width in sizes:
            check_size(rule, height, width)
            assert nearest_sizes(rule, height, width, 1) == [(height, width)]


def test_published_models_list_the_trained_areas_in_both_orientations():
    sizes = supported_sizes(PUBLISHED)
    assert {(256, 256), (512, 512), (1024, 1024)} <= set(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert default_size(PUBLISHED) == (1024, 1024)


@pytest.mark.parametrize("size", [(1000, 1024), (1024, 8), (64, 64), (4096, 4224)])
def test_an_unsupported_size_names_the_nearest_ones(size):
    with pytest.raises(ValueError, match="Nearest supported sizes") as caught:
        check_size(PUBLISHED, *size)
    for height, width in nearest_sizes(PUBLISHED, *size):
        assert f"{height}×{width}" in str(caught.value)
        check_size(PUBLISHED, height, width)
    assert "128" in str(caught.value)


def test_a_model_that_names_its_sizes_makes_only_those():
    assert supported_sizes(TRAINED) == [(128, 128), (256, 128)]
    with pytest.raises(ValueError, match="Nearest supported sizes: 256×128, 128×128"):
        check_size(TRAINED, 256, 256)
    assert default_size(TRAINED) == (128, 128)
    assert default_size(dataclasses.replace(TRAINED, default=(1024, 1024))) == (256, 128)


@pytest.mark.parametrize("side", [0, -128, 128.0, True, "128", None])
def test_sides_are_positive_whole_numbers(side):
    with pytest.raises(ValueError, match="a whole number from 1 to 65536 is allowed"):
        check_size(PUBLISHED, 128, side)


def test_few_res_tokens_leave_squares():
    rule = SizeRule(downsampling=8, patch_side=2, sides=frozenset(range(1, 9)))
    assert supported_sizes(rule) == [(16, 16), (32, 32), (48, 48), (64, 64)]
    assert default_size(rule) == (64, 64)
