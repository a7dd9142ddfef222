"""What people have on disk into the JSONL that lab.files reads.

    python -m lab.formats KIND SOURCE OUT.jsonl [--images FOLDER] [--strict]

    llava            LLaVA's JSON or JSON lines: conversations of human and gpt, image or images
    instructpix2pix  folders with prompt.json, {seed}_0.jpg (before) and {seed}_1.jpg (after)
    storystream      StoryStream's JSON lines; in chunks of FRAMES, whose first frame is given
    tar              img2dataset's shards: a.jpg with a.txt or a.json
    parquet          images with captions, edits, or LLaVA's conversations (pip install pyarrow)

SOURCE may be a folder of shards. Images are named from its folder, or from --images, and in OUT
from OUT's; those within a tar or parquet are written into a folder beside OUT. What cannot be used
is skipped and counted by its reason; --strict stops at it. In order: images, a row's conversations,
a file's rows, the loop.
"""

import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import checkpoint
from lab import files

Conversation = list[dict]  # as in a line of the JSONL: {"text" or "image": .., "output": True}
DAMAGE = (OSError, EOFError, RecursionError, tarfile.TarError, zlib.error)  # of a file

# names that others give to what a row holds: the first that a row has is taken
TURNS, ROLE, SAID = ("conversations", "messages"), ("from", "role"), ("value", "content")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
INSTRUCTION = ("edit", "edit_prompt", "instruction", "edit_instruction")
BEFORE = ("original_image", "input_image", "source_image", "source_img")
AFTER = ("edited_image", "output_image", "target_image", "target_img")
IMAGE = ("image", "images", "img", "jpg", "png", "url")
FRAMES = 10  # of a chunk of a story


def pick(row: dict, names: tuple[str, ...]):
    """The first of these entries that a row has, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


class Images:
    """Images that rows name, in a folder, or hold: these are written into a folder beside `out`."""

    def __init__(self, folder: Path, out: Path):
        self.folder, self.out, self.count, self.written = folder, out.parent, 0, []
        self.beside = out.with_name(out.stem + "_images")

    def name(self, value) -> str:
        """An image, as its name, its bytes or the Hub's {"bytes": .., "path": ..} -> its name from
        the folder of `out`."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, bytes):
            if not isinstance(value, str) or value.startswith(("http://", "https://")):
                raise ValueError(f"an image is neither bytes nor the name of a file: {value!r:.80}")
            name = os.path.relpath((self.folder / value).resolve(), self.out.resolve())
            return Path(name).as_posix()
        ending = "png" if value.startswith(b"\x89PNG") else "jpg"
        path = self.beside / f"{self.count:08d}.{ending}"
        try:
            self.beside.mkdir(exist_ok=True)
            path.write_bytes(value)
        except OSError as error:  # no fault of the row
            raise RuntimeError(f"{path} cannot be written ({error.strerror})") from None
        self.count += 1
        self.written.append(path)
        return path.relative_to(self.out).as_posix()


# --- A row -> its conversations. What is wrong with it raises ValueError -------------------------


def turns_of(row: dict) -> list[tuple[str, str]]:
    """(role, text) of a row's turns, the system's in front."""
    turns, found = pick(row, TURNS), []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('it has no list "conversations"')
    for turn in turns:
        role, text = ROLES.get(str(pick(turn, ROLE))), pick(turn, SAID)
        if role is None or not isinstance(text, str):
            raise ValueError(f"a turn is no text of human, gpt or system: {turn!r:.80}")
        if text.strip() or role != "system":
            found.append((role, text))
    return sorted(found, key=lambda turn: turn[0] != "system")


def from_llava(row: dict, images: Images) -> list[Conversation]:
    """Images stand where <image> does; where a text says none, in front of the first human turn."""
    turns = turns_of(row)
    if row.get("video") or any("<video>" in text for _, text in turns):
        raise ValueError("it is of a video")
    given = pick(row, ("image", "images")) or []
    names = [images.name(value) for value in (given if isinstance(given, list) else [given])]
    count = sum(text.count("<image>") for _, text in turns)
    if names and count == 0:
        first = sum(role == "system" for role, _ in turns)
        turns.insert(first, ("human", "<image>" * len(names)))
    elif count != len(names):
        raise ValueError(f"its <image> and its images differ in number: {count}, {len(names)}")
    segments, left = [], iter(names)
    for role, text in turns:
        output = {"output": True} if role == "gpt" else {}
        for piece in re.split("(<image>)", text):
            if piece == "<image>":
                segments.append({"image": next(left)} | output)
            elif piece.strip() or piece == text:  # nothing beside an image is no empty text
                segments.append({"text": piece.strip()} | output)
    return [segments]


def from_story(row: dict, images: Images) -> list[Conversation]:
    """Chunks of a story: of each, the first frame and its text are given."""
    frames, texts, stories = row.get("images"), row.get("captions"), []
    is_story = isinstance(frames, list) and isinstance(texts, list)
    if not is_story or not len(frames) == len(texts) > 1:
        raise ValueError("it wants as many images as captions, two at least")
    frames = [images.name(frame) for frame in frames]
    for begin in range(0, len(frames) - 1, FRAMES):  # a single frame at the end tells nothing
        story = [{"image": frames[begin]}, {"text": texts[begin]}]
        for frame, text in [*zip(frames, texts)][begin + 1 : begin + FRAMES]:
            story += [{"text": text, "output": True}, {"image": frame, "output": True}]
        stories.append(story)
    return stories


def from_edit(row: dict, images: Images) -> list[Conversation]:
    """A picture, the instruction, the edited picture; "prompt" is the file that says it."""
    before, after, says = pick(row, BEFORE), pick(row, AFTER), row
    if before is None or after is None:
        raise ValueError("a picture of the pair is missing")
    if "prompt" in row:
        if not row["prompt"].is_file():
            raise ValueError("it has no prompt.json")
        says = files.parse_object(row["prompt"].read_bytes())
        texts = [value for value in says.values() if isinstance(value, str)]
        if len(texts) == 1:
            says["edit"] = texts[0]
    edit = pick(says, INSTRUCTION)
    if not isinstance(edit, str):
        raise ValueError(f"no entry of it is plainly the instruction: {', '.join(says)}")
    before, after = images.name(before), images.name(after)
    return [[{"image": before}, {"text": edit.strip()}, {"image": after, "output": True}]]


def from_caption(row: dict, images: Images) -> list[Conversation]:
    """An image with its caption, or with each of several."""
    text, image = pick(row, files.TEXT), pick(row, IMAGE)
    texts = text if isinstance(text, list) else [text]
    if image is None or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"it has no {'image' if image is None else 'caption'}: {', '.join(row)}")
    name = images.name(image)
    return [[{"text": text.strip()}, {"image": name, "output": True}] for text in texts]


def from_sample(row: dict, images: Images) -> list[Conversation]:
    """A sample of a tar: its members by their endings."""
    found = {ending: file.read() for ending, file in row.items()}
    text = pick(found, files.CAPTIONS)
    if text is not None:
        text = files.decode(text)
    elif ".json" in found:
        text = pick(files.parse_object(found[".json"]), files.TEXT)
    return from_caption({"image": pick(found, files.PICTURES), "text": text}, images)


def from_table(row: dict, images: Images) -> list[Conversation]:
    if row.keys() & TURNS:
        return from_llava(row, images)
    return (from_edit if row.keys() & AFTER else from_caption)(row, images)


# --- A file or folder -> (place, row) of each row ------------------------------------------------


def json_rows(source: Path, images: Images, tally: files.Tally) -> Iterator[tuple]:
    """The entries of a JSON list, or a file's lines."""
    with source.open("rb") as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        rows = checkpoint.parse_json(file.read(), source) if is_list else file
        for number, row in enumerate(rows, 1):
            if is_list or row.strip():
                yield f"{'entry' if is_list else 'line'} {number}", row


def edit_rows(source: Path, images: Images, tally: files.Tally) -> Iterator[tuple]:
    """A pair for each seed of each folder; where it has none, one without pictures."""
    is_one = lambda p: p.name == "prompt.json" or p.suffix.lower() in files.PICTURES
    for folder in sorted({p.parent for p in source.rglob("*") if is_one(p)}):
        name, pairs = folder.relative_to(source), {}
        for path in sorted((images.folder / name).glob("*_[01].*")):
            if path.suffix.lower() in files.PICTURES:
                key = BEFORE[0] if path.stem.endswith("0") else AFTER[0]
                pairs.setdefault(path.stem[:-2], {})[key] = str(name / path.name)
        for seed, pair in (pairs or {"": {}}).items():
            yield repr(str(name / seed)), pair | {"prompt": folder / "prompt.json"}


def tar_rows(source: Path, images: Images, tally: files.Tally) -> Iterator[tuple]:
    """Members of one name but for the ending are a sample, wherever in the tar they stand."""
    kinds = (*files.PICTURES, *files.CAPTIONS, ".json")
    for path in sorted(source.rglob("*.tar*")) or [source]:
        samples = {}
        try:
            tar = tarfile.open(path)
            for member in tar:
                stem, ending = os.path.splitext(member.name)
                if member.isfile() and ending.lower() in kinds:
                    samples.setdefault(stem, {})[ending.lower()] = member
        except DAMAGE as error:  # what stands before it is used
            tally.skip(path.name, f"a shard is not whole: {error}")
        for stem, sample in samples.items():
            yield f"{path.name} {stem}", {e: tar.extractfile(m) for e, m in sample.items()}


def parquet_rows(source: Path, images: Images, tally: files.Tally) -> Iterator[tuple]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet is read by pyarrow; pip install pyarrow") from None
    for path in sorted(source.rglob("*.parquet")) or [source]:
        number = 0
        try:
            for batch in parquet.ParquetFile(path).iter_batches(16):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
        except (ValueError, OSError, RuntimeError) as error:  # as pyarrow's are
            tally.skip(path.name, f"a file is not whole: {error}")


KINDS = {"llava": (json_rows, from_llava), "storystream": (json_rows, from_story)}
KINDS |= {"instructpix2pix": (edit_rows, from_edit), "tar": (tar_rows, from_sample)}
KINDS |= {"parquet": (parquet_rows, from_table)}

# --- The loop over rows --------------------------------------------------------------------------


def lines_of(kind: str, source: Path, images: Images, tally: files.Tally) -> Iterator[bytes]:
    """The lines of the rows that can be used; of the others tally is told."""
    read, make = KINDS[kind]
    for place, row in tqdm(read(source, images, tally), str(source), unit=" rows", delay=2):
        images.written.clear()
        try:
            conversations = make(files.parse_object(row), images)
            lines = [json.dumps({"segments": segments}).encode() for segments in conversations]
            for line in lines:
                files.check(files.conversation(line, images.out))
        except (ValueError, *DAMAGE) as error:
            for path in images.written:
                path.unlink()
            tally.skip(place, error)
        else:
            yield from lines


def convert(kind: str, source: str, out: str, images: str | None = None, strict=False) -> None:
    """Write the JSONL `out` of what `source` holds in the form `kind`; it appears when it is whole.
    Raises ValueError where nothing can be used, or, strict, at the first row that cannot."""
    place, target = Path(source), Path(out)
    folder = Path(images) if images else place if place.is_dir() else place.parent
    store, tally, count = Images(folder, target), files.Tally(source, strict), 0
    if not place.is_dir():
        checkpoint.check_file(place)
    if not folder.is_dir():
        raise ValueError(f"images {images!r} is no folder; give the one that images are named from")
    if os.path.lexists(target) or os.path.lexists(store.beside):
        raise ValueError(f"{target} or {store.beside} is there already; give another OUT")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with checkpoint.whole_file(target) as file:
            for line in lines_of(kind, place, store, tally):
                file.write(line + b"\n")
                count += 1
            is_kind = files.kind_of(place) == kind
            tally.say(count, "see --help" if is_kind else files.hint_of(place))
    except BaseException:
        shutil.rmtree(store.beside, ignore_errors=True)
        raise


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(description="What people have on disk into the JSONL of lab.files.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", metavar="SOURCE", help="a file, or a folder")
    parser.add_argument("out", metavar="OUT.jsonl", help="the file to write")
    parser.add_argument("--images", metavar="FOLDER", help="that images are named from")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    checkpoint.command_line(lambda: convert(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
