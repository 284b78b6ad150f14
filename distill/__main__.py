"""Distillation on one or many processes.

python -m distill CONFIG
torchrun --standalone --nproc-per-node 2 -m distill CONFIG [--set a.b=c …] [--resume auto|PATH|no] [--dry-run]
deepspeed --module distill CONFIG
"""

import sys

from bitdance.cli.memory import keep_freed_memory
from distill.cli import main

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))
