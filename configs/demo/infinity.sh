#!/usr/bin/env bash
# Trains a next-scale model of bits on drawn concepts of 32×32 pixels, and measures it:  bash configs/demo/infinity.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. Every step that is done is skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
DATA=runs/demo/data
bitdance() { "$BIN/bitdance" "$@"; }
for split in train heldout; do
    name=$DATA/generator-32
    [ $split = train ] || name=$name-heldout
    [ -f $name/pack.json ] || bitdance data pack icons $name --size 32 --styles 3d --concepts 300 --backgrounds all \
        --hold-out-pairs 0.15 --split $split
done
bitdance train configs/demo/tokenizer-bits.toml --resume auto
bitdance train configs/demo/infinity.toml --resume auto
bitdance measure prompts --model runs/demo/infinity --train $DATA/generator-32 --heldout $DATA/generator-32-heldout
bitdance measure edits --model runs/demo/infinity --train $DATA/generator-32 --heldout $DATA/generator-32-heldout --grid out/edits.png
