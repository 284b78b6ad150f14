#!/usr/bin/env bash
# The tokenizers that configs/evidence/{ablations,scaling}.toml read, each trained on 32,000 pictures of CIFAR-10:
#   bash configs/evidence/tokenizers.sh              or some of: 12 16 32 64 (bits a token) numbers scales
# Data as configs/cifar/README.md says. Ten minutes each on one core with bfloat16, twenty for the one of scales.
set -euo pipefail
BITDANCE=${BITDANCE:-.venv/bin/bitdance}
CONFIGS=${CONFIGS:-configs/cifar}
[ $# -gt 0 ] || set -- 12 16 32 64 numbers scales
for name in "$@"; do
    out=(--resume auto --set "run.out='runs/evidence/tokenizer-$name'" --set run.steps=1000)
    case $name in
    scales) "$BITDANCE" train "$CONFIGS/tokenizer-bits.toml" "${out[@]}" ;;
    numbers) "$BITDANCE" train "$CONFIGS/tokenizer.toml" "${out[@]}" --set tokenizer.model.quantizer='"none"' ;;
    *) "$BITDANCE" train "$CONFIGS/tokenizer.toml" "${out[@]}" --set tokenizer.model.z_channels="$name" \
        --set tokenizer.groups=$((name / 8)) ;;
    esac
done
