"""Training on one or many processes.

python -m stages CONFIG
torchrun --standalone --nproc-per-node 2 -m stages CONFIG [--set a.b=c …] [--resume auto|PATH|no] [--dry-run]
deepspeed --module stages CONFIG
"""

import sys

from stages.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
