#!/usr/bin/env bash
# Tries a wheel as a newcomer meets it: an empty environment, an empty folder, the commands of README.
#   bash dev/try_wheel.sh PYTHON WHEEL
set -euo pipefail
wheel=$(realpath "$2")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$1" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${TORCH:-torch}"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
cd "$place"
PATH="$place/venv/bin:$PATH"
bitdance --version
bitdance doctor --json > doctor.json
bitdance generate "a fox, 3D style, on a blue background" --seed 1 2 -o out --grid
bitdance completion bash > completion.bash
test "$(ls out/*.png | wc -l)" = 3
python -c "from bitdance import load_pipeline; load_pipeline('demo')('a cactus on yellow', seed=1).images[0].save('cactus.png')"
test -s cactus.png
echo "the wheel works in an empty environment"
