"""Twenty captioned pictures, the smallest data of one's own: `python -m lab.rings FOLDER`"""

from pathlib import Path

from PIL import Image, ImageDraw

import checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{folder} is there already; give the name of a new folder")
    folder.mkdir(parents=True)
    for i in range(20):
        colour, r = ("red", "green", "blue", "orange", "purple")[i % 5], 14 + i // 5
        picture = Image.new("RGB", (64, 64), (250, 248, 242))
        circle = 32 - r, 32 - r, 32 + r, 32 + r
        ImageDraw.Draw(picture).ellipse(circle, outline=colour, width=7)
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{'an' if colour == 'orange' else 'a'} {colour} ring")


if __name__ == "__main__":
    main()
