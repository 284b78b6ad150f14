"""Pictures of the bundled model with prompt, seed and command under each, the failures included.

    python -m stages.measure.gallery docs/gallery.toml docs/gallery.md

Each picture is made by the very command that stands under it, so what a reader types gives what a reader sees.
"""

import argparse
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitdance.cli import Parser, main
from bitdance.jobs.job import slug
from bitdance.values import shown
from lfq_tokenizer.files import whole_folder, write_text
from lfq_tokenizer.text import decoded

COLUMNS = 3
HEAD = """# Gallery

What the bundled model draws, and what it fails at. The command under a picture makes that picture again; all of them were made by

    {command}
"""


def command_of(picture: Mapping[str, Any]) -> str:
    """The line that makes a picture of the file."""
    words = ["bitdance", "generate", quoted(picture["prompt"]), "--seed", str(picture.get("seed", 1))]
    return " ".join([*words, *([picture["more"]] if picture.get("more") else []), "-o", "out"])


def quoted(prompt: str) -> str:
    """The prompt as people quote it. ValueError for one that a shell would read otherwise inside double quotes."""
    if set(prompt) & set('"$`\\!\n'):
        raise ValueError(f"prompt {prompt!r}: a gallery's prompts hold no quotes, dollars, backticks, backslashes or line ends")
    return f'"{prompt}"'


def draw(picture: Mapping[str, Any], out: Path) -> None:
    """Run the command of a picture and keep its PNG as `out`. ChildProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(command_of(picture))[1:-1]
        if main([*words, folder, "--quiet"]):
            raise ChildProcessError(f"`{command_of(picture)}` failed")
        (made,) = Path(folder).glob("*.png")
        shutil.move(made, out)


def file_of(picture: Mapping[str, Any]) -> str:
    """The name of a picture's file."""
    more = re.sub(r"\W+", "-", picture.get("more", "")).rstrip("-")
    return f"{slug(picture['prompt'])}-{picture.get('seed', 1)}{more}.png"


def page(sections: Sequence[Mapping[str, Any]], folder: str, command: str) -> Iterator[str]:
    """The page in parts; pictures lie in `folder` beside it."""
    yield HEAD.format(command=command)
    for section in sections:
        cells = [cell(picture, folder) for picture in section["pictures"]]
        cells += [""] * (-len(cells) % COLUMNS)
        rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in [[" "] * COLUMNS, ["---"] * COLUMNS, *rows])
        yield f"## {section['title']}\n\n{section['text']}\n\n{table}\n"


def cell(picture: Mapping[str, Any], folder: str) -> str:
    """A picture, what was asked for, and the command."""
    asked = picture["prompt"] or "no prompt"
    lines = [f"![{asked}]({folder}/{file_of(picture)})", f"{asked}, seed {picture.get('seed', 1)}", f"`{command_of(picture)}`"]
    return "<br>".join([*lines, *([picture["remark"]] if picture.get("remark") else [])])


def read_sections(path: Path) -> list[dict[str, Any]]:
    """The sections of a gallery's file. ValueError names the file for what is none."""
    try:
        found = tomllib.loads(decoded(path.read_bytes(), str(path))).get("section")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    sections: list[Any] = found if isinstance(found, list) and found else [found]
    if wrong := [section for section in sections if not _is_section(section)]:
        raise ValueError(f"{path}: section {shown(wrong[0])}; a title, a text and pictures, each with a prompt, are needed")
    return sections


def _is_section(value: Any) -> bool:
    pictures = value.get("pictures") if isinstance(value, dict) and {"title", "text"} <= set(value) else None
    return isinstance(pictures, list) and all(isinstance(one, dict) and isinstance(one.get("prompt"), str) for one in pictures)


def run(argv: Sequence[str] | None = None) -> int:
    """Draw all pictures, write the page. What stood there before stays until all of them are drawn."""
    parser = Parser(prog="python -m stages.measure.gallery", description="A page of pictures with their commands.")
    parser.add_argument("gallery", type=Path, help="a TOML file: sections of prompts; see docs/gallery.toml")
    parser.add_argument("page", type=Path, help="the Markdown page; its pictures lie in a folder of the same name beside it")
    arguments: argparse.Namespace = parser.parse_args(argv)
    sections, folder = read_sections(arguments.gallery), arguments.page.with_suffix("")
    if arguments.page.suffix != ".md":
        raise ValueError(f"{arguments.page}: give the page that is to be written, a name that ends in .md")
    if others := sorted(path.name for path in folder.glob("*") if path.suffix != ".png"):
        raise ValueError(f"{folder} holds {others[0]}, which is no picture of a gallery; give another page")
    command = f"python -m stages.measure.gallery {arguments.gallery} {arguments.page}"
    text = "\n".join(page(sections, folder.name, command))
    with whole_folder(folder) as working:
        for picture in (picture for section in sections for picture in section["pictures"]):
            draw(picture, working / file_of(picture))
    write_text(text, arguments.page)
    return 0


if __name__ == "__main__":
    from stages.command import guarded

    sys.exit(guarded("python -m stages.measure.gallery", run, None))
