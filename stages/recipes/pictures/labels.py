"""The classes of a training set: which number each label has, and what the model calls it.

A sample's label is its attribute "class": the name of its folder (`bitdance data pack classes`), or what a table says.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdance.sequence.classes import ClassEntry, ClassNames, imagenet_names
from bitdance.values import shown
from lfq_tokenizer.json_file import read_config, read_json
from lfq_tokenizer.text import listed
from stages.data.shards import Sample, ShardDataset

ATTRIBUTE = "class"
_WORDNET = re.compile(r"n[0-9]{8}")


class Labels:
    """Label → number, and the names that are saved with the model. They are the `feed.Conditions` of class models."""

    def __init__(self, names: ClassNames, numbers: dict[str, int] | None = None) -> None:
        self.names = names
        self._numbers = numbers or {}

    def __len__(self) -> int:
        return len(self.names)

    def number(self, attributes: dict[str, Any]) -> int:
        """The class of a sample. ValueError for one without a label, or with one that no class has."""
        label = label_of(attributes)
        return self._numbers[label] if label in self._numbers else self.names.number(label)

    def of(self, sample: Sample, source: torch.Generator | None) -> int:
        """The class of a sample."""
        return self.number(sample.attributes)

    def joined(self, conditions: Sequence[int]) -> Tensor:
        """The classes of a batch (B,)."""
        return torch.tensor(list(conditions))


def label_of(attributes: dict[str, Any]) -> str:
    """The label of a sample, as text. ValueError for a sample without one."""
    label = attributes.get(ATTRIBUTE)
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise ValueError(f'its attribute "{ATTRIBUTE}" is {shown(label)}; a class name or number is allowed')
    return str(label)


def from_file(path: str) -> Labels:
    """The classes of a `classes.json`. ValueError names the file."""
    found = read_json(Path(path))
    count = len(found) if isinstance(found, dict | list) else 0
    return Labels(read_config(Path(path), lambda value: ClassNames.from_json(value, count)))


def from_samples(data: ShardDataset) -> Labels:
    """The labels that the samples have, sorted; whole numbers stand for themselves. WordNet ids get the names of ImageNet, where
    the package that knows them is installed. ValueError where no sample has a label, and for numbers with a gap."""
    counts: Counter[str] = Counter()
    for number in range(len(data)):
        if known := data.readable(data.caption, number):
            counts[label_of(known[1])] += 1
    if all(label.isdecimal() for label in counts):
        numbers = sorted(map(int, counts))
        if gaps := [str(n) for n in range(numbers[-1]) if str(n) not in counts]:
            raise ValueError(
                f"the samples have classes 0 to {numbers[-1]} without {listed(gaps, ', ')}; every class needs a sample, or name "
                "a classes.json in the config"
            )
        return Labels(ClassNames.numbers(len(numbers)))
    found = sorted(counts)
    wordnet = [_WORDNET.fullmatch(label) is not None for label in found]
    names = imagenet_names() if all(wordnet) else None
    if names is None or [entry.wordnet_id for entry in names.entries] != found:
        names = ClassNames(tuple(ClassEntry((label,), label if is_id else None) for label, is_id in zip(found, wordnet)))
    return Labels(names, {label: number for number, label in enumerate(found)})
