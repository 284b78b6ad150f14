"""`bitdance completion` gives scripts that complete every command and option of this installation."""

import subprocess
from pathlib import Path

import pytest

from bitdance.cli import FROM_ENTRY_POINTS, OWN, main
from bitdance.cli.completion import SHELLS, whole_parser


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    shtab = pytest.importorskip("shtab")
    parser = whole_parser()
    return {shell: shtab.complete(parser, shell) for shell in SHELLS}


def completed(script: Path, line: str) -> set[str]:
    """What bash offers for the last word of a line."""
    code = """
        source "$1"
        COMP_WORDS=($2); [[ $2 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        spec=$(complete -p bitdance); function=${spec##*-F }; ${function%% *} bitdance "${COMP_WORDS[COMP_CWORD]}" bitdance
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", code, "bash", str(script), line], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_sub_commands_and_options(scripts: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "bitdance.bash"
    script.write_text(scripts["bash"], encoding="utf-8")
    assert {*OWN, *FROM_ENTRY_POINTS} <= completed(script, "bitdance ")
    assert completed(script, "bitdance gen") == {"generate"}
    assert completed(script, "bitdance generate --se") == {"--seed"}
    assert completed(script, "bitdance tokenizer en") == {"encode"}
    assert "folder" in completed(script, "bitdance data pack ")
    assert completed(script, "bitdance measure prompts --hel") >= {"--heldout"}
    assert completed(script, "bitdance generate --dtype ") >= {"float32", "bfloat16"}


def test_zsh_is_told_every_command(scripts: dict[str, str]) -> None:
    assert scripts["zsh"].startswith("#compdef bitdance")
    for name in (*OWN, *FROM_ENTRY_POINTS):
        assert f'"{name}:' in scripts["zsh"] or f"  {name})" in scripts["zsh"], name


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    assert "complete -o bashdefault -F _shtab_bitdance bitdance" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
