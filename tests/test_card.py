"""The model card says what the folder says of itself, in the header that hubs read, and invents nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitdance.folder.card import UNKNOWN, card_text, facts_of
from bitdance.folder.conversion import convert
from bitdance.folder.parts import DEMO, read_extras
from bitdance.folder.source import StoredModel
from lfq_tokenizer.files import write_text

MODEL = Path(__file__).parent / "golden" / "t2i_ckpt"


def header(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_a_folder_that_says_nothing_gets_a_card_that_invents_nothing() -> None:
    text = card_text({}, facts_of(MODEL))
    assert header(text)["license"] == "unknown" and "base_model" not in header(text) and "language" not in header(text)
    for line in (f"Data: {UNKNOWN}.", f"Licence: {UNKNOWN}.", f"Stages: {UNKNOWN}.", "None are recorded in this folder."):
        assert line in text
    assert "| head | 572,680 |" in text and "8 bits per token of 8×8 pixels, 4 tokens (2×2) per step" in text


def test_the_card_of_the_bundled_model_tells_data_stages_sizes_and_figures() -> None:
    extras = json.loads((DEMO / "bitdance.json").read_text(encoding="utf-8"))
    text = card_text(extras, {**facts_of(DEMO), "format": "official"})
    assert header(text)["license"] == "apache-2.0" and header(text)["pipeline_tag"] == "text-to-image"
    assert header(text)["library_name"] == "bitdance" and header(text)["language"] == ["en"]
    assert extras["card"]["data"] in text and "| finetune | 500 | 8,000 | 64: 1, 96: 1 | 0.00015 | cosine |" in text
    assert "| all | 11,254,403 |" in text and "Sizes: 64×64, 96×96. Default: 96×96" in text
    figures = extras["card"]["figures"]
    assert figures and all(f"| {f['what']} | {f['value']} | `{f['command']}` |" in text for f in figures)
    assert extras["card"]["figures"] == json.loads(
        (Path(__file__).parent.parent / "configs" / "demo" / "card.json").read_text(encoding="utf-8")
    )["card"]["figures"]  # fmt: skip


def test_what_a_card_says_cannot_break_its_header() -> None:
    extras = {"card": {"license_id": "mit\nlibrary_name: other", "base_model": "Qwen/Qwen3-14B", "language": "en"}}
    found = header(card_text(extras, facts_of(MODEL)))
    assert found["license"] == "mit library_name: other" and found["library_name"] == "bitdance"
    assert (found["base_model"], found["language"]) == ("Qwen/Qwen3-14B", ["en"])


@pytest.mark.parametrize("format", ["official", "diffusers"])
def test_converting_writes_the_card_of_the_format(tmp_path: Path, format: str) -> None:
    convert(StoredModel.open("demo"), tmp_path / "out", format)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert header(text)["library_name"] == ("diffusers" if format == "diffusers" else "bitdance")
    assert ("DiffusionPipeline.from_pretrained" in text) == (format == "diffusers")
    assert str(tmp_path) not in text and "| finetune | 500 |" in text


def test_a_card_is_written_anew(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "bitdance.json").write_text(json.dumps({"card": {"name": "first"}}))
    write_text(card_text(read_extras(folder), {**facts_of(folder), "format": "official"}), folder / "README.md")
    (folder / "bitdance.json").write_text(json.dumps({"card": {"name": "second", "limits": ["knows nothing"]}}))
    write_text(card_text(read_extras(folder), {**facts_of(folder), "format": "official"}), folder / "README.md")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "# second" in text and "first" not in text and "- knows nothing" in text
    assert not list(folder.glob("*.tmp"))
