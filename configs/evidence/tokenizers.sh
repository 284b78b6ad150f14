#!/usr/bin/env bash
# The tokenizers that configs/evidence/ablations.toml compares, each trained on 32,000 pictures of CIFAR-10:
#   bash configs/evidence/tokenizers.sh
# Data as configs/cifar/README.md says. About ten minutes each on one core with bfloat16.
set -euo pipefail
BITDANCE=${BITDANCE:-.venv/bin/bitdance}
CONFIGS=${CONFIGS:-configs/cifar}
for bits in 12 16 32 64; do
    groups=$((bits / 8 > 1 ? bits / 8 : 1))
    "$BITDANCE" train "$CONFIGS/tokenizer.toml" --resume auto --set run.out="runs/evidence/tokenizer-$bits" --set run.steps=1000 \
        --set tokenizer.model.z_channels="$bits" --set tokenizer.groups="$groups"
done
"$BITDANCE" train "$CONFIGS/tokenizer.toml" --resume auto --set run.out=runs/evidence/tokenizer-numbers --set run.steps=1000 \
    --set tokenizer.model.quantizer='"none"'
