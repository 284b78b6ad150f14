"""How many files of ours a picture passes through, from the words of a command to its PNG."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# What a picture is computed with, and how a model folder becomes a model. `settings.py` is neither: it stands for what was asked.
LOOP = ("bitdance/model.py", "bitdance/generate.py", "bitdance/loop.py")
MATHEMATICS = ("bitdance/sequence/", "bitdance/networks/", "bitdance/heads/", *LOOP)
FOLDER = ("bitdance/folder/", "bitdance/foreign.py", "bitdance/tokenizer_file.py")
LIBRARY = ("lfq_tokenizer/",)
ASKED_FOR = "bitdance/heads/diffusion/settings.py"

TRACE = """
import json, sys, threading
from pathlib import Path
root, out = Path(sys.argv[1]), sys.argv[2]
entered, seen = set(), set()

def importing(frame):
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False

def profile(frame, event, _):
    code = frame.f_code
    if event == "call" and code not in seen and not importing(frame):
        seen.add(code)
        path = Path(code.co_filename)
        if path.is_relative_to(root):
            entered.add(path.relative_to(root).as_posix())

from bitdance.cli import main
threading.setprofile(profile)
sys.setprofile(profile)
code = main(["generate", "a", "--model", "demo", "-o", out, "--device", "cpu", "--quiet"])
sys.setprofile(None)
print(json.dumps([code, sorted(entered)]))
"""


@pytest.fixture(scope="module")
def entered(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of ours of which a function is called while one picture is made; what only runs on import does not count."""
    command = [sys.executable, "-c", TRACE, str(ROOT), str(tmp_path_factory.mktemp("way") / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    code, files = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    return [file for file in files if file.startswith(("bitdance/", "lfq_tokenizer/"))]


def test_the_command_has_a_short_way_of_its_own(entered: list[str]) -> None:
    """Arguments → spec → jobs → pipeline → file: every file of bitdance that is entered, but for the network's mathematics
    (sequence, networks, heads, model, the loop), the reading of the model folder, and the library lfq_tokenizer."""
    elsewhere = (*MATHEMATICS, *FOLDER, *LIBRARY)
    own = [file for file in entered if file == ASKED_FOR or not file.startswith(elsewhere)]
    print(len(own), own)
    assert len(own) <= 15, own


def test_the_whole_way_does_not_grow(entered: list[str]) -> None:
    """With mathematics, folder and library."""
    print(len(entered), entered)
    assert len(entered) <= 57, entered  # words that a model was never taught are named by a file of their own
