"""Which sample stands at an index: shares hold, nothing comes twice in an epoch, and the index number is all there is to know."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from bitdance.folder.sizes import SizeRule
from stages.data.buckets import Buckets
from stages.data.metadata import Shape
from stages.data.mixture import Mixture, Source, spread

RULE = SizeRule(downsampling=8, patch_side=4, sides=frozenset(range(1, 33)))
BUCKETS = Buckets(RULE, (64, 96, 128))


class Shapes:
    """As much of a ShardDataset as a mixture asks for."""

    def __init__(self, *shapes: Any, hash: str = "data") -> None:
        self.shapes = shapes
        self.index = SimpleNamespace(hash=hash)

    def __len__(self) -> int:
        return len(self.shapes)

    def shape(self, number: int) -> Shape:
        if self.shapes[number] is None:
            raise ValueError("damaged")
        height, width, *bits = self.shapes[number]
        return Shape(height, width, bool(bits))


def source(*shapes: Any, weight: float = 1.0, hash: str = "data") -> Source:
    return Source(Shapes(*shapes, hash=hash), weight)  # type: ignore[arg-type]


SQUARES = [(64, 64)] * 5 + [(96, 96)] * 3 + [(128, 128)] * 4


@pytest.mark.parametrize("shares", [[1.0], [0.2, 0.7, 0.1], [0.5, 0.5], [1 / 3, 2 / 3], [0.123, 0.877], [0.001, 0.999]])
def test_a_pattern_keeps_the_shares_and_spreads_them(shares: list[float]) -> None:
    pattern = spread(shares)
    counts = Counter(pattern)
    assert len(pattern) <= 1000
    for k, share in enumerate(shares):
        assert counts[k] / len(pattern) == pytest.approx(share, abs=5e-4)
        seen = 0
        for place, member in enumerate(pattern, 1):
            seen += member == k
            assert abs(seen - share * place) < len(shares)  # at no point far from its share


def test_two_seven_one_takes_ten_indices() -> None:
    assert sorted(spread([0.2, 0.7, 0.1])) == [0] * 2 + [1] * 7 + [2]


def test_resolutions_get_their_shares_and_only_samples_that_fit() -> None:
    mixture = Mixture([source(*SQUARES)], 1, {64: 2, 96: 7, 128: 1}, BUCKETS)
    references = [mixture.at(index) for index in range(1000)]
    assert Counter(place.resolution for place in references) == {64: 200, 96: 700, 128: 100}
    # shrinking is allowed, enlarging is not
    assert {p.number for p in references if p.resolution == 64} == set(range(12))
    assert {p.number for p in references if p.resolution == 96} == set(range(5, 12))
    assert {p.number for p in references if p.resolution == 128} == set(range(8, 12))
    assert len(mixture) == 12 + 7 + 4


def test_a_picture_may_be_enlarged_when_the_config_says_so() -> None:
    mixture = Mixture([source((64, 64))], 1, {96: 1}, BUCKETS, enlarge=1.5)
    assert mixture.at(0).resolution == 96


def test_ready_made_bits_belong_to_the_resolution_of_their_size_alone() -> None:
    bits = [(8, 8, True), (12, 12, True), (8, 12, True), (10, 8, True)]  # in tokens; the last one cannot be cut into patches
    mixture = Mixture([source(*bits)], 1, {64: 1, 96: 1}, BUCKETS)
    found: dict[int, set[int]] = {}
    for index in range(20):
        reference = mixture.at(index)
        found.setdefault(reference.resolution, set()).add(reference.number)
    assert found == {64: {0, 2}, 96: {1}}
    assert mixture.unused == {"bits of another size": 1}


def test_each_stream_runs_through_its_samples_once_an_epoch() -> None:
    mixture = Mixture([source(*SQUARES)], 3, {64: 1, 128: 1}, BUCKETS)
    of_128 = [r.number for index in range(40) if (r := mixture.at(index)).resolution == 128]
    for epoch in range(5):
        assert sorted(of_128[4 * epoch : 4 * epoch + 4]) == [8, 9, 10, 11]
    of_64 = [r.number for index in range(48) if (r := mixture.at(index)).resolution == 64]
    assert sorted(of_64[:12]) == list(range(12)) and of_64[:12] != of_64[12:24]


def test_sources_get_their_weights_within_every_resolution_that_they_have() -> None:
    sources = [source((128, 128), (128, 128), weight=3.0), source(*[(64, 64)] * 9)]
    mixture = Mixture(sources, 1, {64: 1, 128: 1}, BUCKETS)
    assert mixture.shares == pytest.approx({(0, 64): 0.375, (1, 64): 0.125, (0, 128): 0.5})
    counts = Counter((p.source, p.resolution) for p in map(mixture.at, range(800)))
    assert counts == {(0, 64): 300, (1, 64): 100, (0, 128): 400}


def test_without_a_mix_every_sample_comes_in_its_own_size() -> None:
    sources = [source((50, 70), (10, 10)), source((9, 9), weight=3.0, hash="other")]
    mixture = Mixture(sources, 1)
    references = [mixture.at(index) for index in range(8)]
    assert Counter((p.source, p.number, p.resolution) for p in references) == {(0, 0, 0): 1, (0, 1, 0): 1, (1, 0, 0): 6}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_row_without_overlap_whatever_their_number(world: int) -> None:
    mixture = Mixture([source(*SQUARES)], 5, {64: 2, 128: 1}, BUCKETS)
    alone = [mixture.at(index) for index in range(36)]
    size = 12 // world
    dealt = [
        mixture.at(index)
        for step in range(3)
        for rank in range(world)
        for index in range((step * world + rank) * size, (step * world + rank + 1) * size)
    ]
    assert dealt == alone


def test_an_index_far_away_costs_nothing_and_is_the_same_in_a_new_object() -> None:
    def mixture(seed: int) -> Mixture:
        return Mixture([source(*SQUARES)], seed, {64: 2, 96: 7, 128: 1}, BUCKETS)

    far = 10**9 + 7
    assert mixture(1).at(far) == mixture(1).at(far)
    assert [mixture(1).at(far + i) for i in range(20)] != [mixture(2).at(far + i) for i in range(20)]


def test_the_hash_tells_other_data_weights_and_mixes_apart() -> None:
    def hash_of(*, data: str = "data", weight: float = 1.0, mix: dict[int, float] | None = None) -> str:
        sources = [source(*SQUARES, hash=data), source(*SQUARES, weight=weight)]
        return Mixture(sources, 1, mix or {64: 1, 96: 1}, BUCKETS).hash

    hashes = [hash_of(), hash_of(data="x"), hash_of(weight=2.0), hash_of(mix={64: 1}), hash_of(mix={64: 1, 96: 2})]
    assert len(set(hashes)) == 5 and hash_of() == hashes[0]


def test_a_resolution_without_samples_is_refused_with_the_counts() -> None:
    with pytest.raises(ValueError, match=r"data.mix gives 128 pixels a share.*\{64: 2, 128: 0\}.*data.enlarge"):
        Mixture([source((64, 64), (64, 100), None)], 1, {64: 1, 128: 1}, BUCKETS)


def test_samples_that_are_not_used_are_counted_by_reason() -> None:
    mixture = Mixture([source((64, 64), (20, 20), None)], 1, {64: 1}, BUCKETS)
    assert mixture.unused == {"picture too small": 1, "size cannot be read": 1}


def test_held_out_samples_need_not_have_every_resolution() -> None:
    mixture = Mixture([source((64, 64), (64, 100))], 1, {64: 1, 128: 1}, BUCKETS, optional=True)
    assert mixture.shares == {(0, 64): 1.0}
    with pytest.raises(ValueError, match="no sample has that size"):
        Mixture([source((20, 20))], 1, {64: 1, 128: 1}, BUCKETS, optional=True)


def test_a_resolution_with_share_0_is_known_and_not_used() -> None:
    """So a later stage can leave out what an earlier one had."""
    mixture = Mixture([source(*SQUARES)], 1, {64: 0, 96: 1, 128: 1}, BUCKETS)
    assert Counter(mixture.at(index).resolution for index in range(100)) == {96: 50, 128: 50}
