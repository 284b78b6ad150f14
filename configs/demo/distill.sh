#!/usr/bin/env bash
# Distils the bundled model from 16 to 64 tokens per step with every objective and writes docs/distill/: bash configs/demo/distill.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. About 80 minutes on two CPU cores.
# Every step that is done is skipped; training goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
DATA=runs/demo/data
export OMP_NUM_THREADS=1
bitdance() { "$BIN/bitdance" "$@"; }
# Two runs at a time, one core each.
student() {
    local name=$1
    shift
    bitdance distill configs/demo/distill.toml --set run.out="runs/demo/distill-$name" "$@"
}

for split in train heldout; do
    name=generator-64$([ $split = heldout ] && echo -heldout || true)
    [ -f $DATA/$name/pack.json ] || bitdance data pack icons $DATA/$name --size 64 --styles 3d --concepts 300 --backgrounds all \
        --hold-out-pairs 0.15 --split $split
    [ -f $DATA/$name-bits/pack.json ] || bitdance tokenizer encode $DATA/$name $DATA/$name-bits --model demo
done
bitdance distill configs/demo/distill-folded.toml --write-samples $DATA/distill-samples --count 6000 --per-folder 1000

student data --set 'distill.objectives={data=1.0}' &
student data+teacher &
wait
student data+teacher-600 --set run.steps=600 --set distill.fade_steps=600 &
student teacher --set 'distill.objectives={data=0.0,teacher=1.0}' --set distill.fade_steps=0 &
wait
bitdance distill configs/demo/distill-folded.toml &
bitdance distill configs/demo/distill-folded.toml --set run.out=runs/demo/distill-samples \
    --set 'distill.objectives={data=0.0,samples=1.0}' &
wait
bitdance train configs/demo/pretrain.toml --set run.out=runs/demo/distill-scratch --set run.steps=1200 \
    --set generator.tokenizer=demo --set generator.head.parallel_num=64 --set run.workers=1

OMP_NUM_THREADS=2 "$BIN/python" -m distill.report --train $DATA/generator-64 --heldout $DATA/generator-64-heldout -o docs/distill \
    --model teacher=demo --model scratch=runs/demo/distill-scratch --model data=runs/demo/distill-data \
    --model teacher-only=runs/demo/distill-teacher --model data+teacher=runs/demo/distill-data+teacher \
    --model data+teacher-600=runs/demo/distill-data+teacher-600 --model samples=runs/demo/distill-samples \
    --model samples+teacher=runs/demo/distill-folded --steps 20 10 5
