#!/usr/bin/env bash
# Distils the bundled model from 16 to 64 tokens per step with every objective, and writes the figures of docs/distill/:
#   bash configs/demo/distill.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. About three hours on two CPU cores.
# Every step that is done is skipped; training goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
RUNS=runs/demo
export OMP_NUM_THREADS=1
bitdance() { "$BIN/bitdance" "$@"; }
student() { # CONFIG NAME [--set …]
    bitdance distill "configs/demo/$1.toml" --set run.out="$RUNS/$2" "${@:3}"
}
ALONE='distill.objectives.teacher=0.0'

for size in 64 128; do
    for split in train heldout; do
        name=$RUNS/data/generator-$size
        [ $split = train ] || name=$name-heldout
        [ -f $name/pack.json ] || bitdance data pack icons $name --size $size --styles 3d --concepts 300 --backgrounds all \
            --hold-out-pairs 0.15 --split $split
        [ -f $name-bits/pack.json ] || bitdance tokenizer encode $name $name-bits --model demo
    done
done
bitdance distill configs/demo/distill-folded.toml --write-samples $RUNS/data/distill-samples --count 6000 --per-folder 1000

# 64×64 pixels: 4 steps become 1. Two runs at a time, one core each.
student distill distill-data --set "$ALONE" &
student distill distill-data+teacher &
wait
student distill distill-data+teacher-600 --set run.steps=600 --set distill.fade_steps=600 &
student distill distill-teacher --set distill.objectives.data=0.0 --set distill.fade_steps=0 &
wait
student distill-folded distill-folded &
student distill-folded distill-samples --set "$ALONE" &
wait
bitdance train configs/demo/pretrain.toml --set run.out=$RUNS/distill-scratch --set run.steps=1200 --set generator.tokenizer=demo \
    --set generator.head.parallel_num=64 & # the same shape, data and steps without a teacher
bitdance train configs/demo/teacher-128.toml &
wait
# 128×128 pixels: 16 steps become 4.
student distill-128 distill-128-data --set "$ALONE" &
student distill-128 distill-128-data+teacher &
wait
student distill-128 distill-128-data+teacher-300 --set run.steps=300 --set distill.fade_steps=300

report() { # SIZE COUNT NAME=MODEL …
    local models=() model
    for model in "${@:3}"; do models+=(--model "$model"); done
    "$BIN/python" -m distill.report "${models[@]}" --train $RUNS/data/generator-$1 --heldout $RUNS/data/generator-$1-heldout \
        -o docs/distill/demo-$1 --count $2 --steps 20 5
}
D=$RUNS/distill
export OMP_NUM_THREADS=2
report 64 200 teacher=demo scratch=$D-scratch data=$D-data teacher-only=$D-teacher data+teacher=$D-data+teacher \
    data+teacher-600=$D-data+teacher-600 samples=$D-samples samples+teacher=$D-folded
report 128 100 teacher=$RUNS/teacher-128 data=$D-128-data data+teacher=$D-128-data+teacher \
    data+teacher-300=$D-128-data+teacher-300
"$BIN/python" -m distill.speed --model teacher=demo --model student=$D-data --model folded=$D-folded -o docs/distill/speed
"$BIN/python" -m distill.speed --size 128 --batch 1 4 --model teacher=$RUNS/teacher-128 --model student=$D-128-data \
    -o docs/distill/speed-128
