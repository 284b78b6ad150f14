"""README and guides: every link leads somewhere, every command and option that they name is there, and README stays short."""

import argparse
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bitdance.cli.completion import whole_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.md"), *ROOT.glob("comfyui_bitdance/**/*.md")]
)
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which also says what was
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}|\t).*\n?)+", re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FOLDERS = "configs|examples|dev|tests|bitdance|stages|distill|lfq_tokenizer"
FILE = re.compile(rf"(?<![\w/.$-])(?:{FOLDERS})/[\w./-]+\.(?:py|toml|sh|txt|ipynb)\b")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(INLINE.sub("", FENCED.sub("", text))):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        other = (page.parent / place).resolve() if place else page
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in anchors(other)):
            yield target


def code(text: str) -> Iterator[str]:
    """The lines of code of a page, without comments; what stands in backticks too."""
    blocks = [*FENCED.findall(text), *INDENTED.findall(FENCED.sub("", text))]
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield re.split(r"\s#|(?<=\S)\s{3,}(?=\S)", line.strip())[0] if line.strip() else ""
    yield from INLINE.findall(FENCED.sub("", text))


@cache
def parser() -> argparse.ArgumentParser:
    return whole_parser()


def under(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def wrong_words(command: str) -> Iterator[str]:
    """The commands and options of a line `bitdance …` that do not exist."""
    words = command.split()[1:]
    found = [parser()]
    while words and under(found[0]) and re.fullmatch(r"[\w|]+", words[0]):
        names = words.pop(0).split("|")
        if unknown := [name for name in names if name not in under(found[0])]:
            yield from unknown
            return
        found = [under(found[0])[name] for name in names]
    options = {option for one in found for option in one._option_string_actions}
    if found[0].prog == "bitdance evaluate run":
        options |= set(under(parser())["generate"]._option_string_actions)  # to which it hands them on
    for word in words:
        for flag in re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", word.partition("=")[0]):
            if options and flag not in options:
                yield flag


def commands(text: str) -> Iterator[str]:
    for line in code(text):
        for part in re.split(r"&&|&|;|·|\$\(|(?<=\s)\|(?=\s)|,\s", line):
            if re.match(r"(?:OMP_NUM_THREADS=\d+ )?bitdance(?: |$)", part.strip()):
                yield part.strip().partition("bitdance")[1] + part.strip().partition("bitdance")[2]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_every_command_and_option_is_there(page: Path) -> None:
    said = list(commands(page.read_text(encoding="utf-8")))
    assert [(line, wrong) for line in said if (wrong := list(wrong_words(line)))] == []


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_commands_can_be_pasted(page: Path) -> None:
    """What stands beside a command is a comment to the shell."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    program = r"^ {4}(?:bitdance|python|torchrun|bash|make|pip|deepspeed|sbatch) .*?\S {3,}(?!#)\S.*"
    assert re.findall(program, text, re.MULTILINE) == []


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_every_file_and_module_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [path for path in FILE.findall(text) if not (ROOT / path).exists()] == []
    modules = re.findall(r"-m ((?:stages|distill|bitdance)[\w.]*)", text)
    assert [name for name in modules if importlib.util.find_spec(name.rstrip(".")) is None] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = [line.split()[1] for line in code(text) if re.match(r"make [a-z-]+", line)]
    assert [target for target in said if target not in targets] == []


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every argument of a parser and of all commands under it, with the command's name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in {id(one): one for one in action.choices.values()}.values():
                yield from options(inner)
        else:
            yield parser.prog, action


def test_help_says_what_every_option_does() -> None:
    said = list(options(parser()))
    assert len(said) > 200
    assert [(prog, action.dest) for prog, action in said if not action.help] == []


def test_readme_is_short_and_begins_with_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 900
    title, sentence, picture = [part for part in text.split("\n\n") if part.strip()][:3]
    assert title.startswith("# ") and sentence.count("\n") <= 1 and picture.startswith("![") and "docs/demo.png" in picture


def test_the_site_shows_every_guide() -> None:
    said = set(re.findall(r": ([\w/.]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert [path for path in said if not (ROOT / path).is_file()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    linked = re.search(r"^PAGES := (.*)$", makefile, re.MULTILINE)
    assert linked is not None
    for path in said:
        links = [
            link for link in LINK.findall(INLINE.sub("", FENCED.sub("", (ROOT / path).read_text("utf-8")))) if ":" not in link
        ]
        tops = {((ROOT / path).parent / link.partition("#")[0]).resolve().relative_to(ROOT).parts[:1] for link in links}
        assert {top for (top,) in tops if not top.endswith(".md")} <= set(linked[1].split()), path
    guides = {page for page in ROOT.glob("docs/**/*.md") if not page.with_suffix(".json").is_file()}  # not what commands write
    assert set(map(named, guides)) - said == set()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("bitdance generate a --seed 1", []),
        ("bitdance generate a --sead 1", ["--sead"]),
        ("bitdance paint a", ["paint"]),
        ("bitdance tokenizer encode|paint", ["paint"]),
        ("bitdance data pack folder A B --size 64", []),
        ("bitdance data pack folder A B --steps 64", ["--steps"]),
        ("bitdance evaluate run geneval F --steps 5", []),
        ("bitdance measure prompts --set a=b", ["--set"]),
    ],
)
def test_a_wrong_word_is_seen(line: str, wrong: list[str]) -> None:
    assert list(wrong_words(line)) == wrong


def test_a_broken_link_is_seen() -> None:
    text = "[a](docs/tour.md) [b](docs/none.md) [c](docs/tour.md#pictures) [d](docs/tour.md#none) `[e](f)` [g](https://h)"
    assert list(broken_links(ROOT / "README.md", text)) == ["docs/none.md", "docs/tour.md#none"]
    assert list(commands("x\n\n    bitdance info demo   # more\n\n`bitdance sizes` and\n")) == [
        "bitdance info demo",
        "bitdance sizes",
    ]
