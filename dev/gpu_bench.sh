#!/usr/bin/env bash
# Speed of the 14B-64x shape on one large GPU (80 GB or more), with random weights:
#   bash dev/gpu_bench.sh OUT            PYTHON=.venv/bin/python to choose an interpreter, PART_SECONDS=230 the most for a part
# Writes OUT/NAME.json and OUT/NAME.txt for every part; `make gpu` holds them against the targets (dev/gpu.py).
# A part that fails (quantisation without its library, memory, time) says why and does not stop the others; the exit code is then 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?give a folder for the results}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=0

part() { # NAME OPTION…
    echo "== $1: ${*:2}"
    rm -f "$OUT/$1.json"
    # in the foreground: whoever ends this script's process group ends the part too
    timeout --foreground --kill-after 15 "${PART_SECONDS:-230}" "$PYTHON" -m bitdance bench --shape 14b-64x --dtype bfloat16 "${@:2}" \
        -o "$OUT/$1.json" > "$OUT/$1.txt" 2>&1 || { echo "== $1 failed"; failed=1; }
    cat "$OUT/$1.txt"
}

# quick and instant: two and one evaluations of a head that was taught so, with guidance folded in; random weights take the same time
part batch-1 --batch 1 --preset own balanced quick instant --repeats 3
part batch-16 --batch 2 4 16 --preset balanced quick --repeats 2 # where arithmetic takes over: bench --floor h200 says it
part int8 --batch 1 16 --preset balanced --quantize int8 --quantize-head int8 --repeats 2
part yardstick --batch 1 --preset own --yardstick --repeats 1 # two models, 65 GB
part eager --batch 1 --preset own --no-compile --repeats 1
exit $failed
