"""Users' own files as a dataset: what `--data PATH` opens.

    mine.jsonl   a conversation a line, its images named from the file's own folder:
                 {"segments": [{"image": "a.png"}, {"text": "What is this?"},
                               {"text": "a rabbit", "output": true}]}
    pictures/    pictures, in folders within it too, each with its caption beside it (a.jpg and
                 a.txt, or a.caption), or in the Hub's metadata.jsonl or metadata.csv, whose rows
                 have file_name and text

Every row is looked at once, of images the header. What cannot be used is skipped, and one line says
how many examples there are, with a line for each reason. Other forms become JSONL by lab.formats.
Reading order: what was skipped, conversations, captioned pictures, what else a path may be.
"""

import codecs
import csv
import io
import json
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import checkpoint
import data
from data import Segment

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
TEXT = ("text", "caption", "prompt")  # how others name a caption: the first that a row has

# --- What was skipped ----------------------------------------------------------------------------


class Tally:
    """What was skipped of one source, by reason: what a message says up to its first colon. What
    follows there, as names, differs from row to row."""

    def __init__(self, name, strict: bool = False):
        self.name, self.strict, self.reasons = name, strict, {}

    def skip(self, place: str, error: Exception | str) -> None:
        """Note a row. strict: raise ValueError instead."""
        message = " ".join(str(error).split())[:300]
        if self.strict:
            raise ValueError(f"{self.name}, {place}: {message}")
        self.reasons.setdefault(message.split(":")[0], (message, []))[1].append(place)

    def say(self, examples: int, hint: str) -> None:
        """Print what there is. Where there are no examples, raise ValueError with the hint."""
        skipped = sum(len(places) for _, places in self.reasons.values())
        lines = [f"{self.name}: {examples} examples, {skipped} skipped"]
        for message, places in self.reasons.values():
            lines.append(f"  {len(places)} skipped ({', '.join(places[:3])}): {message}")
        if not examples:
            raise ValueError(f"{' '.join(lines[:2])}; {hint}")
        tqdm.write("\n".join(lines))


def check(segments: list[Segment]) -> None:
    """Raise ValueError, as a reason for Tally, where a conversation cannot be trained on."""
    if not any(s.output for s in segments) or segments[0].output:
        raise ValueError("it has no output, or no input before it")
    for s in segments:
        if checkpoint.wanted(str(s.content), (str,)):
            raise ValueError("a text or a name in it is not valid Unicode")
        if not s.is_image and not s.content.strip():
            raise ValueError("a text in it is empty")
        if s.is_image and not s.content.is_file():
            raise ValueError(f"an image is missing: {str(s.content)!r}")
        if s.is_image:
            try:
                data.open_image(s.content, header=True).close()
            except ValueError as error:
                raise ValueError(f"an image cannot be read: {error}") from None


# --- A JSONL of conversations --------------------------------------------------------------------


def parse_object(row) -> dict:
    """What a line of JSON says, or a value as it is, where that is an object."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is no object with named entries: {row!r:.40}")
    return row


def segment_of(row, folder: Path) -> Segment:
    """{"text" or "image": .., "output": true} -> a segment, its image named from the folder."""
    if not isinstance(row, dict) or not row.keys() <= {"text", "image", "output"}:
        raise ValueError(f"a segment has other entries than text, image and output: {row!r:.80}")
    text, image, output = row.get("text"), row.get("image"), row.get("output")
    content = image if text is None else text
    if not isinstance(content, str) or (text is not None and image is not None):
        raise ValueError(f"a segment wants either text or the name of an image: {row!r:.80}")
    if output not in (None, True, False):
        raise ValueError(f"output is neither true nor false: {output!r:.40}")
    return Segment(folder / image if text is None else text, bool(output))


def conversation(line: bytes, folder: Path) -> list[Segment]:
    segments = parse_object(line).get("segments")
    if not isinstance(segments, list):
        raise ValueError('it has no list "segments"')
    return [segment_of(segment, folder) for segment in segments]


class Conversations:
    """The lines of a JSONL file that can be used. Only their places are held, eight bytes each."""

    def __init__(self, path: Path):
        self.path, self.places = path, array("q")
        tally, place = Tally(path), 0
        with path.open("rb") as file:
            rows = tqdm(file, f"checking {path}", unit=" rows", delay=2)
            for number, line in enumerate(rows, 1):
                try:
                    if line.strip():
                        check(conversation(line, path.parent))
                        self.places.append(place)
                except (ValueError, OSError, RecursionError) as error:
                    tally.skip(f"line {number}", error)
                place += len(line)
        tally.say(len(self), 'want a line {"segments": [..]} for each conversation')

    def __len__(self) -> int:
        return len(self.places)

    def example(self, index: int) -> list[Segment]:
        with self.path.open("rb") as file:
            file.seek(self.places[index])
            return conversation(file.readline(), self.path.parent)


# --- A folder of captioned pictures --------------------------------------------------------------


def decode(content: bytes) -> str:
    """UTF-8, or UTF-16 with its mark, as text; line ends become \\n."""
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its text is not UTF-8: {error}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def metadata_rows(path: Path, tally: Tally) -> Iterator[tuple[str, str, str | None]]:
    """(place, file_name, caption) of each row of one of METADATA that names a file."""
    try:
        text = decode(path.read_bytes())
        rows = [line.encode() for line in text.split("\n") if line.strip()]
        if path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""))
        for number, row in enumerate(rows, 1):
            place = f"{path.name} row {number}"
            try:
                row = parse_object(row)
                if not isinstance(row.get("file_name"), str):
                    raise ValueError("it has no file_name")
                captions = [row[name] for name in TEXT if isinstance(row.get(name), str)]
                yield place, row["file_name"], captions[0].strip() if captions else None
            except ValueError as error:
                tally.skip(place, error)
    except (ValueError, OSError, csv.Error) as error:
        tally.skip(path.name, f"it is no table: {error}")


class Captions:
    """The captioned pictures of a folder, as (name, caption); the picture is to be drawn."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.tally = folder, [], Tally(folder)
        named, beside, used = set(), {}, set()
        found = [p for p in folder.rglob("*") if p.is_file() or p.is_symlink()]
        files = sorted(p.relative_to(folder) for p in found)
        for path in files:
            if path.name in METADATA:
                for place, name, caption in metadata_rows(folder / path, self.tally):
                    named.add(path.parent / name)
                    self.add(place, path.parent / name, caption)
            elif path.suffix.lower() in CAPTIONS:
                beside[path.with_suffix("")] = path  # where there are both, .txt, the later one
        pictures = [path for path in files if path.suffix.lower() in PICTURES]
        for name in tqdm(pictures, f"checking {folder}", unit=" pictures", delay=2):
            used.add(name.with_suffix(""))
            if name not in named:
                self.add(repr(str(name)), name, beside.get(name.with_suffix("")))
        for stem in sorted(beside.keys() - used):
            self.tally.skip(repr(str(beside[stem])), "a text has no picture of its name")
        self.tally.say(len(self), "" if self.rows else hint_of(folder))

    def add(self, place: str, name: Path, caption: str | Path | None) -> None:
        """Take a picture with its caption, or with the file of that, where it can be used."""
        try:
            if caption is None:
                raise ValueError("it has no caption")
            if isinstance(caption, Path):
                caption = decode((self.folder / caption).read_bytes())
            check([Segment(caption), Segment(self.folder / name, output=True)])
            self.rows.append((str(name), caption))
        except (ValueError, OSError) as error:
            self.tally.skip(place, error)

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> list[Segment]:
        name, caption = self.rows[index]
        return [Segment(caption), Segment(self.folder / name, output=True)]


# --- What else a path may be ---------------------------------------------------------------------

FOLDERS = {"instructpix2pix": "prompt.json", "tar": "*.tar*", "parquet": "*.parquet"}
KEYS = {"segments": b'"segments"', "llava": b'"conversations"', "storystream": b'"captions"'}


def kind_of(path: Path) -> str | None:
    """The kind of lab.formats that a path looks like; "segments" is our own JSONL."""
    if path.is_dir():
        return next((kind for kind, name in FOLDERS.items() if any(path.rglob(name))), None)
    with path.open("rb") as file:
        head = file.read(2**16)
    if head.startswith(b"PAR1"):
        return "parquet"
    if tarfile.is_tarfile(path):
        return "tar"
    return next((kind for kind, key in KEYS.items() if key in head), None)


def hint_of(path: Path) -> str:
    """What to do with a path that cannot be trained on as it is."""
    kind, lists = kind_of(path), sorted(path.glob("*.json*"))
    if kind and kind != "segments":
        return f"python -m lab.formats {kind} {path} OUT.jsonl makes a JSONL of it"
    if path.name in METADATA:
        return f"give the folder that it lies in, {path.parent}"
    if lists:
        return f"give a file of it, as {lists[0]}"
    return "give a JSONL of conversations or a folder of captioned pictures"


def open(path: str) -> Conversations | Captions:
    """The dataset of a JSONL file or of a folder. Raises ValueError, in one line, where a path is
    none of these, or where nothing in it can be used."""
    place = Path(path)
    if place.is_dir():
        return Captions(place)
    checkpoint.check_file(place)
    if kind_of(place) == "segments":
        return Conversations(place)
    raise ValueError(f"data {path} is no JSONL of conversations; {hint_of(place)}")
