"""The processes of a run: starting, and ending without an abort."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import atexit, os, sys
import torch.distributed as dist
# exit handlers run in the reverse order: this one after that of processes.start
found = []
def note():
    found.append("in a group" if dist.is_initialized() else "alone")
    open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(repr(found))
atexit.register(note)
from stages.engine import processes
processes.start()
found.append(processes.all_gather(processes.rank()))
"""


def test_every_process_leaves_its_group_before_python_ends(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    code = tmp_path / "gather.py"
    code.write_text(CODE)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(code), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[[0, 1], 'alone']"] * 2
