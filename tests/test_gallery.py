"""docs/gallery.md is what its command writes, and every picture on it says the prompt and the seed that stand under it."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from bitdance.picture import read_metadata, read_picture
from stages.measure.gallery import command_of, draw, file_of, page, quoted

ROOT = Path(__file__).parent.parent
SECTIONS = tomllib.loads((ROOT / "docs/gallery.toml").read_text(encoding="utf-8"))["section"]
PICTURES = [picture for section in SECTIONS for picture in section["pictures"]]


def test_the_page_is_what_its_command_writes() -> None:
    text = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    command = "python -m stages.measure.gallery docs/gallery.toml docs/gallery.md"
    assert text == "\n".join(page(SECTIONS, "gallery", command))
    shown = re.findall(r"\]\(gallery/([^)]+)\)", text)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs/gallery").iterdir()) and len(shown) == len(PICTURES)


@pytest.mark.parametrize("picture", PICTURES, ids=file_of)
def test_a_picture_was_made_from_what_stands_under_it(picture: dict[str, str]) -> None:
    said = read_metadata(ROOT / "docs/gallery" / file_of(picture))
    assert (said["prompt"], said["seed"], said["model"]) == (picture["prompt"], picture.get("seed", 1), "demo")


@pytest.mark.slow
def test_the_command_makes_the_picture_again(tmp_path: Path) -> None:
    draw(PICTURES[0], tmp_path / "again.png")
    pictures = [tmp_path / "again.png", ROOT / "docs/gallery" / file_of(PICTURES[0])]
    one, other = (np.asarray(read_picture(path)[0], dtype=float) for path in pictures)
    assert np.abs(one - other).mean() < 2  # another processor rounds otherwise


def test_prompts_that_a_shell_would_read_otherwise_are_refused() -> None:
    assert command_of({"prompt": "a fox", "more": "--steps 2"}) == 'bitdance generate "a fox" --seed 1 --steps 2 -o out'
    with pytest.raises(ValueError, match="no quotes"):
        quoted('a "fox"')
