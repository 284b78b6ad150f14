"""docs/gallery.md is what its command writes, and every picture on it says the prompt and the seed that stand under it."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from bitdance.picture import read_metadata, read_picture
from stages.measure import gallery
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


GALLERY = '[[section]]\ntitle = "T"\ntext = "t"\npictures = [{prompt = "a fox"}, {prompt = "a dog"}]\n'


def test_a_page_that_fails_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are the old ones until all new ones are drawn, and no other folder is taken for a gallery's."""
    (tmp_path / "g.toml").write_text(GALLERY)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "old.png").write_text("old")
    drawn: list[Path] = []

    def fails(picture: object, out: Path) -> None:
        if drawn:
            raise ChildProcessError("the second fails")
        out.write_text("new")
        drawn.append(out)

    monkeypatch.setattr(gallery, "draw", fails)
    with pytest.raises(ChildProcessError):
        gallery.run([str(tmp_path / "g.toml"), str(tmp_path / "g.md")])
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["old.png"] and not (tmp_path / "g.md").exists()
    monkeypatch.setattr(gallery, "draw", lambda picture, out: out.write_text("new"))
    assert gallery.run([str(tmp_path / "g.toml"), str(tmp_path / "g.md")]) == 0
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["a-dog-1.png", "a-fox-1.png"]
    assert "a dog, seed 1" in (tmp_path / "g.md").read_text()
    (tmp_path / "g" / "notes.txt").write_text("mine")
    for name, words in (("g", "ends in .md"), ("g.toml", "ends in .md"), ("g.md", "g holds notes.txt")):
        with pytest.raises(ValueError, match=words):
            gallery.run([str(tmp_path / "g.toml"), str(tmp_path / name)])
    assert (tmp_path / "g" / "notes.txt").read_text() == "mine" and (tmp_path / "g.toml").read_text() == GALLERY


@pytest.mark.parametrize("text", ["", "section = 3", "[[section]]\ntitle = 'x'", "a = [", GALLERY.replace("prompt", "promt", 1)])
def test_a_file_that_is_no_gallery_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match="x.toml"):
        gallery.run([str(tmp_path / "x.toml"), str(tmp_path / "x.md")])
