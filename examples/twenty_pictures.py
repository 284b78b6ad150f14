"""Draws twenty pictures of something that no model knows, each with a caption beside it: a stand-in for your own.

    python examples/twenty_pictures.py my-pictures

A zorb is a teal ball with orange stripes, one eye and two feelers. It sits on ten of the twelve backgrounds whose names the
bundled model knows; yellow and brown are left out, so that they show whether the word was learned or the pictures.
docs/finetune/README.md goes on from there.
"""

import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, LARGER = 96, 4  # drawn larger, then scaled down: smooth edges
TEAL, DARK, ORANGE, WHITE, BLACK = (32, 160, 160), (16, 96, 100), (250, 140, 30), (255, 255, 255), (20, 20, 30)


def zorb(background: tuple[int, int, int], draws: random.Random) -> Image.Image:
    """One zorb, a little larger or smaller, a little off the middle, looking somewhere."""
    side = SIDE * LARGER
    picture = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(picture)
    radius = side * draws.uniform(0.28, 0.33)
    x, y = side * draws.uniform(0.47, 0.53), side * draws.uniform(0.55, 0.59)
    for lean in (-0.55, 0.55):  # feelers
        lean += draws.uniform(-0.12, 0.12)
        tip = (x + 1.4 * radius * math.sin(lean), y - 1.4 * radius * math.cos(lean))
        pen.line([(x + 0.8 * radius * math.sin(lean), y - 0.8 * radius * math.cos(lean)), tip], fill=DARK, width=side // 28)
        ball = radius * 0.16
        pen.ellipse([tip[0] - ball, tip[1] - ball, tip[0] + ball, tip[1] + ball], fill=ORANGE)
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=TEAL, outline=DARK, width=side // 48)
    for height in (0.42, 0.72):  # stripes below the eye, as wide as the ball is there
        half = 0.93 * radius * math.sqrt(1 - height**2)
        top, bottom = y + (height - 0.08) * radius, y + (height + 0.08) * radius
        pen.rounded_rectangle([x - half, top, x + half, bottom], side // 64, fill=ORANGE)
    eye, look = radius * 0.42, draws.uniform(-0.12, 0.12) * radius
    pen.ellipse([x - eye, y - 0.25 * radius - eye, x + eye, y - 0.25 * radius + eye], fill=WHITE)
    pen.ellipse([x + look - eye / 2, y - 0.25 * radius - eye / 2, x + look + eye / 2, y - 0.25 * radius + eye / 2], fill=BLACK)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def draw(folder: Path, colours: dict[str, tuple[int, int, int]], count: int = 20, seed: int = 0) -> None:
    """`count` pictures and captions, the backgrounds in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    draws, names = random.Random(seed), list(colours)
    for number in range(count):
        name = names[number % len(names)]
        article = "an" if name[0] in "aeiou" else "a"
        zorb(colours[name], draws).save(folder / f"zorb-{number:02d}.png")
        (folder / f"zorb-{number:02d}.txt").write_text(f"a zorb on {article} {name} background\n", encoding="utf-8")


def main() -> None:
    from stages.data.captions import PALETTE

    draw(Path(sys.argv[1]), {name: colour for name, colour in PALETTE.items() if name not in ("yellow", "brown")})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/twenty_pictures.py FOLDER")
    main()
