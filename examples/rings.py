"""Twenty captioned pictures of rings: the smallest data of one's own. `python rings.py FOLDER`"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
    sys.exit("give the name of one new folder: python examples/rings.py rings")
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
for i in range(20):
    colour, r = ("red", "green", "blue", "orange", "purple")[i % 5], 14 + i // 5
    picture = Image.new("RGB", (64, 64), (250, 248, 242))
    ImageDraw.Draw(picture).ellipse((32 - r, 32 - r, 32 + r, 32 + r), outline=colour, width=7)
    picture.save(folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(f"{'an' if colour == 'orange' else 'a'} {colour} ring")
