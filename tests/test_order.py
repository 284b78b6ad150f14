"""The endless row of samples: everything once an epoch, and the place alone decides."""

from itertools import pairwise

import pytest
import torch

from stages.data.order import EpochOrder


@pytest.mark.parametrize("length", [1, 7, 24])
def test_an_epoch_shows_everything_once(length):
    order = EpochOrder(length, 3)
    row = [order.at(place) for place in range(3 * length)]
    epochs = [row[start : start + length] for start in range(0, 3 * length, length)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(length))] * 3
    assert length == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_a_sample_depends_on_seed_and_place_only():
    used = EpochOrder(50, 5)
    backwards = {place: used.at(place) for place in reversed(range(240))}
    torch.manual_seed(1)
    assert all(EpochOrder(50, 5).at(place) == sample for place, sample in backwards.items())
    assert [EpochOrder(50, 6).at(place) for place in range(50)] != [backwards[place] for place in range(50)]


def test_impossible_orders_are_refused():
    for arguments in [(0, 0), (5, -1)]:
        with pytest.raises(ValueError, match="must be positive"):
            EpochOrder(*arguments)


def test_an_order_looks_drawn_by_chance_and_another_every_epoch():
    length = 3000
    order = EpochOrder(length, 1)
    first, second = ([order.at(epoch * length + place) for place in range(length)] for epoch in (0, 1))
    steps = [abs(a - b) / length for a, b in pairwise(first)]
    assert sum(steps) / len(steps) == pytest.approx(1 / 3, abs=0.02)  # of two places drawn evenly
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10  # one is expected
    early = sum(sample < length // 2 for sample in first[: length // 2])
    assert abs(early - length // 4) < 5 * (length / 16) ** 0.5


def test_a_place_of_a_huge_data_set_takes_no_list():
    order = EpochOrder(10**12, 1)
    assert all(0 <= order.at(place) < 10**12 for place in (0, 1, 10**12, 10**15))
