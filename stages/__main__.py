"""Training on one or many processes.

python -m stages CONFIG
torchrun --standalone --nproc-per-node 2 -m stages CONFIG [--set a.b=c …] [--resume auto|PATH|no] [--dry-run]
deepspeed --module stages CONFIG
"""

import sys

from bitdance.cli.memory import keep_freed_memory
from stages.cli import train

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(train(sys.argv[1:]))
