#!/usr/bin/env bash
# Rebuilds the bundled model from the package registries: bash configs/demo/rebuild.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. About 2.5 hours on two CPU cores.
# Every step that is done is skipped; training goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
DATA=runs/demo/data
bitdance() { "$BIN/bitdance" "$@"; }
pack() { [ -f "$DATA/$1/pack.json" ] || bitdance data pack icons "$DATA/$1" "${@:2}"; }
encode() { [ -f "$DATA/$1-bits/pack.json" ] || bitdance tokenizer encode "$DATA/$1" "$DATA/$1-bits" --model runs/demo/tokenizer-whole; }
# Two processes of one thread each: as fast as one of two threads, and steadier beside other work.
stage() { OMP_NUM_THREADS=1 "$BIN/torchrun" --standalone --nproc-per-node 2 -m stages "configs/demo/$1.toml"; }

# All concepts in three styles on two backgrounds each; 5 % of the concepts are held out to judge the tokenizer.
TOKENIZER_DATA=(--size 64 --styles 3d,flat,noto --concepts all --renderings-per-picture 2 --hold-out-pictures 0.05)
pack tokenizer "${TOKENIZER_DATA[@]}" --split train
pack tokenizer-heldout "${TOKENIZER_DATA[@]}" --split heldout
# The one style that the bundled model draws, without the concepts held out above.
STYLE_DATA=(--size 64 --styles 3d --concepts all --renderings-per-picture 3 --hold-out-pictures 0.048)
pack tokenizer-3d "${STYLE_DATA[@]}" --split train
pack tokenizer-3d-heldout "${STYLE_DATA[@]}" --split heldout
# What the generator learns by heart, in two sizes; 15 % of the picture × background pairs are held out to judge it.
GENERATOR_DATA=(--styles 3d --concepts 300 --backgrounds all --hold-out-pairs 0.15)
for size in 64 96; do
    pack generator-$size --size $size "${GENERATOR_DATA[@]}" --split train
    pack generator-$size-heldout --size $size "${GENERATOR_DATA[@]}" --split heldout
done

bitdance train configs/demo/tokenizer.toml
bitdance train configs/demo/tokenizer-whole.toml
for name in generator-64 generator-64-heldout generator-96 generator-96-heldout; do encode $name; done
stage pretrain
stage continue
stage finetune
bitdance train configs/demo/tokenizer-decoder.toml
rm -rf runs/demo/model
bitdance export runs/demo/finetune runs/demo/model --dtype bfloat16 --decoder runs/demo/tokenizer-decoder --extras configs/demo/card.json
bitdance tokenizer eval "$DATA/tokenizer-3d-heldout" --model runs/demo/model
for size in 64 96; do
    bitdance measure prompts --model runs/demo/model --train "$DATA/generator-$size" --heldout "$DATA/generator-$size-heldout"
done
echo "the model is in runs/demo/model; bundle it with: cp runs/demo/model/* bitdance/pretrained/demo/"
