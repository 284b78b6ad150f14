#!/usr/bin/env bash
# Trains a refinement model on the bundled model's bits and captions, and measures it:  bash configs/demo/refine.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. Every step that is done is skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
DATA=runs/demo/data
bitdance() { "$BIN/bitdance" "$@"; }
for split in train heldout; do
    name=$DATA/generator-64
    [ $split = train ] || name=$name-heldout
    [ -f $name/pack.json ] || bitdance data pack icons $name --size 64 --styles 3d --concepts 300 --backgrounds all \
        --hold-out-pairs 0.15 --split $split
    [ -f $name-bits/pack.json ] || bitdance tokenizer encode $name $name-bits --model demo
done
bitdance train configs/demo/refine.toml
bitdance measure prompts --model runs/demo/refine --train $DATA/generator-64 --heldout $DATA/generator-64-heldout
bitdance measure edits --model runs/demo/refine --train $DATA/generator-64 --heldout $DATA/generator-64-heldout --grid out/edits.png
