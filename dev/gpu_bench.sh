#!/usr/bin/env bash
# Speed of the 14B-64x shape on one large GPU (80 GB or more), with random weights:
#   bash dev/gpu_bench.sh OUT            PYTHON=.venv/bin/python to choose an interpreter
# Writes OUT/*.json and OUT/*.txt. The target: one picture of 1024×1024, 50 steps, bfloat16, on an H200 in at most 4.5 s.
# A part that fails (quantisation without its library, memory) says why and does not stop the others; then the exit code is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?give a folder for the results}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=0

part() { # NAME OPTION…
    echo "== $1: ${*:2}"
    "$PYTHON" -m bitdance bench --shape 14b-64x --dtype bfloat16 "${@:2}" -o "$OUT/$1.json" | tee "$OUT/$1.txt" || failed=1
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$OUT/gpu.txt"
part batch-1 --batch 1 --preset own balanced --repeats 3
part batch-16 --batch 16 --preset balanced --repeats 2
part int8 --batch 1 16 --preset balanced --quantize int8 --quantize-head int8 --repeats 2
part yardstick --batch 1 --preset own --yardstick --repeats 1 # two models, 65 GB
part eager --batch 1 --preset own --no-compile --repeats 1

"$PYTHON" - "$OUT/batch-1.json" <<'PY' || failed=1
import json, sys

found = json.load(open(sys.argv[1]))
run = next(run for run in found["runs"] if run["preset"] == "own")
name, seconds, steps = found["machine"]["name"], run["seconds"], run["sampling"]["steps"]
print(f"{name}: {seconds:.2f} s for a picture of {found['height']}×{found['width']}, {steps} steps, {run['dtype']}; on an H200 4.5 s are allowed")
sys.exit("H200" in name and seconds > 4.5)
PY
exit $failed
