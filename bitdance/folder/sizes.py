"""The one size list: which pictures a model makes. Known from the configs alone, before any weight is loaded."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdance.folder.parts import EXTRAS_FILE, HEAD_CONFIG, TOKENIZER_CONFIG, read_extras
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.sequence.patches import patch_side
from bitdance.values import check_number
from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.json_file import read_config

Size = tuple[int, int]  # (height, width) in pixels
DEFAULT_SIZE: Size = (1024, 1024)
# Areas of the published training (BitDance paper, arXiv 2602.14041, training table) and usual aspect ratios.
AREAS = (256, 512, 1024)
ASPECTS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0, 21 / 9, 3.0)
_RES = re.compile(r"<\|res_([1-9][0-9]{0,5})\|>")


@dataclass(frozen=True)
class SizeRule:
    """`downsampling` pixels per token side, `patch_side` tokens per block side, `sides` token counts that have a
    `<|res_i|>` token, `trained` the sizes a model was trained for (empty: every size the rule allows)."""

    downsampling: int
    patch_side: int
    sides: frozenset[int]
    trained: tuple[Size, ...] = ()
    default: Size = DEFAULT_SIZE

    @property
    def unit(self) -> int:
        """Both sides are multiples of this many pixels."""
        return self.downsampling * self.patch_side

    def allows(self, height: int, width: int) -> bool:
        """Whether the sequence of such a picture can be written: multiples of the unit with `res` tokens."""
        return all(side > 0 and side % self.unit == 0 and side // self.downsampling in self.sides for side in (height, width))


def rule_of_folder(folder: Path | str) -> SizeRule:
    """Read the rule from `ae_config.json`, `vision_head_config.json`, the tokenizer's added tokens and, if there,
    `bitdance.json`."""
    folder = Path(folder)
    tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
    head = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict)
    try:
        return _rule(tokenizer.downsampling, patch_side(head.parallel_num), _added_tokens(folder), read_extras(folder))
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def rule_of_model(model: Any) -> SizeRule:
    """The rule of a loaded `BitDanceModel`."""
    return _rule(model.tokenizer.downsampling, model.patch_side, model.text_tokenizer.get_added_vocab(), model.extras)


def supported_sizes(source: Any) -> list[Size]:
    """(height, width) in pixels, from small to large; `source` is a model, a folder or a `SizeRule`.

    The trained sizes where the model names them; otherwise the usual aspect ratios at the published areas. A model
    without such a list also makes every other size whose sides are multiples of `rule.unit` (see `check_size`).
    """
    rule = size_rule(source)
    if rule.trained:
        return sorted(rule.trained, key=_by_area)

    allowed = [size for area in AREAS for size in sizes_at(rule, area)]
    squares = [(pixels, pixels) for pixels in _usable(rule)]
    return sorted(set(allowed or squares), key=_by_area)


def sizes_at(rule: SizeRule, resolution: int) -> list[Size]:
    """(height, width) of about `resolution`² pixels, in the usual aspect ratios, as far as the rule allows; small to large."""

    def side(pixels: float) -> int:
        return rule.unit * max(1, round(pixels / rule.unit))

    sizes: set[Size] = set()
    for root in map(math.sqrt, ASPECTS):
        sizes |= {(side(resolution * root), side(resolution / root)), (side(resolution / root), side(resolution * root))}
    return sorted((size for size in sizes if rule.allows(*size)), key=_by_area)


def nearest_sizes(source: Any, height: int, width: int, count: int = 3) -> list[Size]:
    """The `count` supported sizes nearest to the wished one (by the ratios of the sides)."""
    rule = size_rule(source)
    candidates: Iterable[Size] = rule.trained
    if not rule.trained:
        rows, columns = (sorted(_usable(rule), key=lambda s: abs(math.log(s / wish)))[:3] for wish in (height, width))
        candidates = itertools.product(rows, columns)
    return sorted(candidates, key=lambda s: (abs(math.log(s[0] / height)) + abs(math.log(s[1] / width)), s))[:count]


def check_size(source: Any, height: int, width: int) -> None:
    """ValueError that names the nearest supported sizes, unless pictures of height × width pixels can be made."""
    rule = size_rule(source)
    for name, side in (("height", height), ("width", width)):
        check_number(name, side)
    if (height, width) in rule.trained or (not rule.trained and rule.allows(height, width)):
        return
    nearest = ", ".join(f"{h}×{w}" for h, w in nearest_sizes(rule, height, width)) or "none"
    reason = (
        "this model was trained for certain sizes only"
        if rule.trained
        else f"both sides must be multiples of {rule.unit} pixels, from {_usable(rule)[0]} to {_usable(rule)[-1]}"
    )
    raise ValueError(f"height {height} × width {width} is not supported: {reason}. Nearest supported sizes: {nearest}.")


def default_size(source: Any) -> Size:
    """The model's default, or the supported size nearest to it."""
    rule = size_rule(source)
    try:
        check_size(rule, *rule.default)
        return rule.default
    except ValueError:
        return nearest_sizes(rule, *rule.default, count=1)[0]


def size_rule(source: Any) -> SizeRule:
    """`source` as a rule: itself, of a folder (str or Path), or of a loaded model."""
    if isinstance(source, SizeRule):
        return source
    return rule_of_folder(source) if isinstance(source, (str, Path)) else rule_of_model(source)


def _rule(downsampling: int, patch_side: int, tokens: Iterable[str], extras: dict[str, Any]) -> SizeRule:
    sides = frozenset(int(match[1]) for token in tokens if (match := _RES.fullmatch(token)))
    if not any(side % patch_side == 0 for side in sides):
        raise ValueError(
            f"the text tokenizer has no <|res_i|> token for a multiple of {patch_side}; no picture size can be named. "
            "Is this a BitDance model?"
        )
    try:
        defaults = extras.get("defaults", {})
        trained = tuple((check_number("height", h), check_number("width", w)) for h, w in extras.get("sizes", []))
        height, width = (defaults.get(name, side) for name, side in zip(("height", "width"), DEFAULT_SIZE))
        default = check_number("height", height), check_number("width", width)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{EXTRAS_FILE}: "sizes" are pairs, "defaults" an object with height and width ({error})') from error
    rule = SizeRule(downsampling, patch_side, sides, trained, default)
    if wrong := [size for size in trained if not rule.allows(*size)]:
        raise ValueError(f"{EXTRAS_FILE} lists the sizes {wrong}; sides must be multiples of {rule.unit} with a res token")
    return rule


def _added_tokens(folder: Path) -> Iterable[str]:
    if (folder / "tokenizer.json").is_file():
        return read_config(folder / "tokenizer.json", lambda data: [token["content"] for token in data["added_tokens"]])
    return read_config(folder / "added_tokens.json", list)


def _by_area(size: Size) -> tuple[int, int]:
    return size[0] * size[1], size[0]


def _usable(rule: SizeRule) -> list[int]:
    """The sides in pixels that the rule allows."""
    return sorted(side * rule.downsampling for side in rule.sides if side % rule.patch_side == 0)
