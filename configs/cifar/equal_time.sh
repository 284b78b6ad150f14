#!/usr/bin/env bash
# 1, 4 and 16 tokens per step at equal training time:  bash configs/cifar/equal_time.sh
# The steps share out four minutes by the speed of each, measured on two cores with bfloat16: 105, 78 and 75 pictures/s.
set -euo pipefail
BITDANCE=${BITDANCE:-.venv/bin/bitdance}
CONFIGS=${CONFIGS:-configs/cifar}
for run in 1x:394 4x:292 16x:281; do
    "$BITDANCE" train "$CONFIGS/class_${run%%:*}.toml" --set run.out="runs/cifar/equal_${run%%:*}" --set run.steps="${run##*:}" \
        --set optimizer.warmup_steps=100
done
