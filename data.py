"""Data: what a conversation of text and images is to the model.

Segments are laid out as one sequence of tokens and labels (layout), sequences are padded to a batch
(collate). The paper's layout, with the released model's turns:

    <bos> user's text and images <sep> model's text and images <sep> user ... <sep> model <sep>
    an image is <boi> <image> x L <eoi>: one placeholder per latent

A dataset is anything with `example(index) -> list[Segment]`: what is to be learned has output=True.
It may have a length; without one it is endless. shapes.Shapes is one, users' own files (Files) are
another. Reading order: Segment, layout, batches, then text, images in, images out, own files.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
from checkpoint import within
from orthus import OrthusConfig

# --- Conversations, the layout of one sequence, batches ------------------------------------------


@dataclass
class Segment:
    """A piece of a conversation: text or an image, which the model reads, or writes (output).

    An image may be the path of a file that was checked (open_image): it is read when a batch needs
    it. detail: where an image is white here ("L", of its size), it holds small things, as digits,
    that the autoencoder must not lose.
    """

    content: str | Path | Image.Image
    output: bool = False
    detail: Image.Image | None = None

    @property
    def is_image(self) -> bool:
        return not isinstance(self.content, str)


class Dataset(Protocol):
    def example(self, index: int) -> list[Segment]: ...


@dataclass
class Sequence:
    """tokens and labels (T,), unshifted as Orthus.loss wants them; images in reading order."""

    tokens: list[int]
    labels: list[int]
    images: list[Path | Image.Image]


def layout(segments: list[Segment], tokenizer: "Tokenizer", config: OrthusConfig) -> Sequence:
    """Lay segments out as <bos> input <sep> output <sep> input ..., the last turn closed too.

    Everything the model is to write has its own id as label, the rest -100: also the <sep> that
    ends its turn, and <boi>, placeholders and <eoi> of its images.
    """
    tokens, labels = [config.bos_id], [-100]

    def add(ids: list[int], output: bool) -> None:
        tokens.extend(ids)
        labels.extend(ids if output else [-100] * len(ids))

    for i, segment in enumerate(segments):
        if segment.is_image:
            placeholders = [config.image_id] * config.latents_per_image
            add([config.boi_id, *placeholders, config.eoi_id], segment.output)
        else:
            add(tokenizer.encode(segment.content), segment.output)
        if i + 1 == len(segments) or segments[i + 1].output != segment.output:
            add([config.sep_id], segment.output)
    return Sequence(tokens, labels, [s.content for s in segments if s.is_image])


@dataclass
class Batch:
    """tokens, labels (B, T); images (N, 3, H, W) in reading order over the batch, or latents
    (N, L, C) that were encoded ahead; shares: of a step's text and image targets, how much is here.
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor
    shares: tuple[float, float] = (1.0, 1.0)

    def to(self, device) -> "Batch":
        names = "tokens", "labels", "images"
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def collate(sequences: list[Sequence], config: OrthusConfig, resolution: int,
            pad_left: bool = False, hub_pixels: bool = False) -> Batch:
    """Pad sequences to the longest one: on the right for training, on the left for generation."""

    def pad(rows: list[list[int]], value: int) -> Tensor:
        side = "left" if pad_left else "right"
        return pad_sequence([torch.tensor(row) for row in rows], True, value, side)

    images = [image if isinstance(image, Tensor) else to_tensor(image, resolution, hub_pixels)
              for s in sequences for image in s.images]  # fmt: skip
    return Batch(
        pad([s.tokens for s in sequences], config.pad_id),
        pad([s.labels for s in sequences], -100),
        torch.stack(images) if images else torch.zeros(0, 3, resolution, resolution),
    )


# --- Text ----------------------------------------------------------------------------------------


class Tokenizer:
    """Text <-> token ids. Special tokens and image codes are never produced from text.

    The tiny model's is sentencepiece's: its pieces follow the special tokens and image codes. The
    released models' is a tokenizer.json, whose ids are the model's. Where a prompt spells out the
    name of a reserved one, the name is cut in two, so that the model reads it as ordinary text.
    """

    def __init__(self, model: bytes, config: OrthusConfig):
        self.is_json = model.lstrip()[:1] == b"{"
        if self.is_json:
            import tokenizers  # each library is imported where its files are read

            self.pieces = tokenizers.Tokenizer.from_str(model.decode())
        else:
            import sentencepiece

            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.first_id, self.unk_id = config.image_id + 1, config.unk_id  # piece 0 is unknown
        special = {value for name, value in vars(config).items() if name.endswith("_id")}
        self.reserved = (special | {*config.image_codes}) - {self.unk_id}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint in any layout."""
        source = checkpoint.open_checkpoint(directory)
        config = checkpoint.build(OrthusConfig, source.section("model"), source)
        path = source.tokenizer
        try:
            if not (content := path.read_bytes()):  # sentencepiece would take it
                raise ValueError("it is empty")
            own = cls(content, config)
            size = own.pieces.get_vocab_size() if own.is_json else len(own.pieces)
        except Exception as error:  # tokenizers raises nothing more special
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is not a whole tokenizer ({reason})") from None
        if (last := size if own.is_json else own.first_id + size - 1) > config.vocab_size:
            raise ValueError(f"{path} has {last} ids, the model's vocabulary {config.vocab_size}")
        return own

    def encode(self, text: str) -> list[int]:
        if not self.is_json:
            ids = self.pieces.encode(text)
            return [self.first_id + i - 1 if i else self.unk_id for i in ids]
        encoding = self.pieces.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for i, (start, end) in spans if i in self.reserved and end - start > 1]
        if not cuts:
            return encoding.ids
        ends = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [i for start, end in ends for i in self.encode(text[start:end])]

    def decode(self, ids: list[int]) -> str:
        if self.is_json:
            return self.pieces.decode([i for i in ids if i not in self.reserved])
        last = self.first_id + len(self.pieces) - 1
        return self.pieces.decode([i - self.first_id + 1 for i in ids if self.first_id <= i < last])


def words_of(texts: Iterable[str]) -> set[str]:
    said = (word for text in texts for word in text.replace("<image>", " ").split())
    return {word.strip(".,?!;:\"'") for word in said} - {""}


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model -> its file's bytes."""
    import sentencepiece

    model = io.BytesIO()
    options = dict(
        model_type="bpe", character_coverage=1.0, split_digits=True,
        normalization_rule_name="identity", unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
        hard_vocab_limit=False,  # a small world may not have as many pieces
        minloglevel=2,
    )  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **options
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be made of these texts, which "
                         f"have {len(set(''.join(texts)))} different letters ({error})") from None
    return model.getvalue()


# --- Images in -----------------------------------------------------------------------------------

MOST_PIXELS = 89_000_000  # of a file; Pillow warns above, and a phone's largest photo has fewer


def open_image(path: str | Path, header: bool = False) -> Image.Image:
    """An image file, turned as its Exif data say. Raises ValueError, in one line, with its name.

    header: its pixels are not read, which is fast, and an animation is refused.
    """
    try:
        if not Path(path).is_file():  # a pipe or a device would be waited for
            raise ValueError("it is not a file")
        # the size is checked here
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, too many")
            if image.mode in ("I", "F"):
                raise ValueError(f"its mode is {image.mode}, want 8 or 16 bits a channel")
            if header:  # a phone's photo may hold a second picture (MPO): that is no animation
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise ValueError("it is animated; give one of its frames")
                return image
            image.load()
            try:
                return ImageOps.exif_transpose(image)  # photos may be stored turned
            except (SyntaxError, ValueError, TypeError, KeyError):  # broken Exif data
                return image.copy()
    except Exception as error:  # Pillow's readers of damaged files raise many kinds
        named = f"image {str(path)!r} cannot be read ({error})"
        raise ValueError(f"{named}; give a PNG or JPEG") from None


def on_white(image: Path | Image.Image) -> Image.Image:
    """PIL image of any mode, or its path -> RGB, transparency blended on white."""
    image = open_image(image) if isinstance(image, Path) else image
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_prompt(text: str, images: list[str]) -> list[Segment]:
    """Text and image paths -> segments: images stand where <image> does, else in front."""
    if not text.strip() and not images:
        raise ValueError("the prompt is empty; say what to draw, or give an image and a question")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the prompt {text!r:.60} is not valid text; give it in UTF-8")
    text = text if "<image>" in text else "<image>" * len(images) + text
    pieces, paths = re.split("(<image>)", text), iter(images)
    if (count := pieces.count("<image>")) != len(images):
        raise ValueError(f"{count} <image> in {text!r:.60}, but {len(images)} images given; give "
                         "as many")  # fmt: skip
    for path in images:
        open_image(path)
    return [Segment(Path(next(paths)) if piece == "<image>" else piece)
            for piece in pieces if piece.strip()]  # fmt: skip


@dataclass
class RequestLine:
    """A line of a --requests file: text, paths, and a seed where it has its own."""

    prompt: str
    images: list[str] = field(default_factory=list)
    seed: int | None = within(None, 0, 2**31)

    def __post_init__(self):
        checkpoint.check_fields(self)
        self.segments = read_prompt(self.prompt, self.images)


def read_requests(path: str) -> list[RequestLine]:
    lines = checkpoint.read_lines(Path(path))
    requests = [checkpoint.build(RequestLine, line, where) for where, line in lines]
    if not requests:
        raise ValueError(f"requests file {path} holds no request")
    return requests


def to_tensor(image: Path | Image.Image, size: int, hub_pixels: bool = False) -> Tensor:
    """PIL image of any size and mode, or its path -> (3, size, size) in [-1, 1].

    Transparency is blended on white, the short side resized to `size` (Lanczos), the centre kept:
    only what is kept is computed, however long the other side. hub_pixels does as the Hub's
    processor: 0.0078 x - 1, which makes white 0.989, and the long side rounded down.
    """
    image = on_white(image)
    whole, short = int if hub_pixels else round, min(image.size)
    for axis, side in enumerate(image.size if image.size != (size, size) else ()):
        scaled = max(size, whole(side * size / short))  # what this side would become
        begin = (scaled - size) // 2  # of what is kept of it
        box, resized = [0, 0, *image.size], list(image.size)
        box[axis], resized[axis] = begin * side / scaled, size
        box[axis + 2] = min(side, (begin + size) * side / scaled)
        image = image.resize(resized, Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, size, size) uint8
    return pixels.float() * 0.0078 - 1 if hub_pixels else pixels.float() / 127.5 - 1


# --- Images out ----------------------------------------------------------------------------------


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clamped -> PIL image."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


Cell = tuple[Path | Image.Image, str, object]  # an image, the text below it, the colour of that


def sheet(rows: list[list[Cell]], size: tuple[int, int]) -> Image.Image:
    """Rows of images, each brought to one size (width, height), with its text below."""
    font, gap, (width, height) = ImageFont.load_default(size=12), 8, size

    def wrap(text: str) -> str:
        parts = [textwrap.fill(line, max(8, width // 6)) for line in text.split("\n")]
        return "\n".join("\n".join(parts).split("\n")[:5])

    below = 2 * gap + 15 * max(wrap(text).count("\n") for row in rows for _, text, _ in row)
    right, down = width + gap, height + below + gap
    page = Image.new("RGB", (max(map(len, rows)) * right + gap, len(rows) * down + gap), "white")
    pen = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, (image, text, ink) in enumerate(row):
            left, top = gap + x * right, gap + y * down
            fitted = ImageOps.contain(on_white(image), size, Image.Resampling.BICUBIC)
            page.paste(fitted, (left, top))
            pen.multiline_text((left, top + height + 2), wrap(text), ink, font, spacing=2)
    return page


def captioned(segments: list[Segment]) -> list[Cell]:
    """Cells of a sheet: images, each with the text before it; text after the last goes to it."""
    cells, text = [], []
    for segment in segments:
        if segment.is_image:
            cells.append((segment.content, " ".join(text), "black"))
            text = []
        else:
            text.append(segment.content.strip())
    if text and cells:
        cells[-1] = cells[-1][0], " ".join([cells[-1][1], *text]).strip(), "black"
    return cells


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


# --- Users' own files ----------------------------------------------------------------------------


class Files:
    """A dataset of conversations in files. Each is the folder of its images and the JSON of its
    segments, [[text or image, is it an image, is it output]]: small, and what its hash is of."""

    def __init__(self, rows: list[tuple[Path, str]], resolution: int):
        self.rows, self.resolution, self.broken = rows, resolution, set()

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> list[Segment]:
        """Example `index`, counted round and round, its images brought to the resolution: a batch
        of photos as they are may fill the memory. Where an image can no longer be read, the example
        after it stands in, and one line says so."""
        for number in range(index, index + len(self)):
            folder, text = self.rows[number % len(self)]
            try:
                return [Segment(to_image(to_tensor(folder / content, self.resolution))
                                if is_image else content, output)
                        for content, is_image, output in json.loads(text)]  # fmt: skip
            except (ValueError, OSError, MemoryError) as error:
                if number % len(self) not in self.broken:  # once in each data process
                    self.broken.add(number % len(self))
                    tqdm.write(f"warning: {error}; another example takes its place")
        raise ValueError("no image of the data can be read any more; is their disk still there?")

    def texts(self) -> list[str]:
        return [c for _, text in self.rows for c, is_image, _ in json.loads(text) if not is_image]

    def fingerprint(self) -> str:
        """Of what they say, and of their images' names, sizes and times."""
        whole = hashlib.sha256()
        for folder, text in self.rows:
            images = [folder / c for c, is_image, _ in json.loads(text) if is_image]
            looks = [(i.stat().st_size, i.stat().st_mtime_ns) for i in images if i.is_file()]
            whole.update(f"{folder} {text} {looks}".encode())
        return whole.hexdigest()


def open_dataset(paths: list[str], resolution: int, format: str | None = None,
                 images: str | None = None, strict: bool = False,
                 share: float = 0.05) -> tuple[Files, Files]:
    """Files in any of FORMATS -> the examples to train on, and the `share` that is held out.

    jsonl            a conversation a line, its images named from the file's own folder:
                     {"segments": [{"image": "a.png"}, {"text": "What is this?"},
                                   {"text": "a rabbit", "output": true}]}
    captions         a folder of pictures, and of folders of them, each with its caption in a
                     .txt of the same name
    llava            LLaVA-1.5's JSON: human asks, gpt answers, <image> is where the image stands
    instructpix2pix  a folder of folders, each with prompt.json and its {seed}_0.jpg, {seed}_1.jpg
    storystream      StoryStream's jsonl: stories in chunks of FRAMES; the first frame is given

    The format is what a path looks like, or `format`. images: the folder that images are named
    from. Every row is looked at, of images the header. What cannot be used is skipped, and told in
    one line for each reason; strict: the first raises. Held out is by hash of what an example says,
    so it stays on its side when others come, and so does its copy; one at least is on each side (a
    single one is on both). Raises ValueError where a path is nothing of this.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"format {format!r} is unknown; give one of {', '.join(FORMATS)}")
    if images is not None and not os.path.isdir(images):
        raise ValueError(f"images {images!r} is no folder; give the one that images are named from")
    rows = []
    for name in paths:
        if not os.path.isdir(name) and not os.path.isfile(name):  # a pipe would be waited for
            raise ValueError(f"data {name!r} is no file and no folder; give a path that is one")
        path = Path(name)
        kind = format or recognise(path)
        if path.is_dir() != (kind in FOLDERS):
            wanted = "folder" if kind in FOLDERS else "file"
            raise ValueError(f"data {name!r} is no {wanted}; format {kind} wants one")
        folder = Path(images) if images else path if kind in FOLDERS else path.parent
        rows += [(folder, text) for text in check_rows(path, kind, folder, strict)]
    numbers = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for _, text in rows]
    limit = min(max(share * 2**64, min(numbers) + 1), max(numbers))
    train, held_out = ([row for row, n in zip(rows, numbers, strict=True) if (n < limit) == side]
                       for side in (False, True))  # fmt: skip
    tqdm.write(f"{len(train)} examples to train on, {len(held_out or train)} held out")
    return Files(train, resolution), Files(held_out or train, resolution)


def recognise(path: Path) -> str:
    """Which of FORMATS a file or folder is in. Raises ValueError where it is in none."""
    if path.is_dir():
        return "instructpix2pix" if any(path.glob("*/prompt.json")) else "captions"
    with open(path, "rb") as file:
        if file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return "llava"
    for _, line in read_rows(path, "jsonl", path.parent):
        with contextlib.suppress(ValueError):  # the first line may be a damaged one
            row = checkpoint.parse_json(line, path)
            if isinstance(row, dict) and ("segments" in row or "captions" in row):
                return "jsonl" if "segments" in row else "storystream"
    raise ValueError(f"data {str(path)!r} is in no format that is known; if it is in one of "
                     f"{', '.join(FORMATS)}, name it")  # fmt: skip


def check_rows(path: Path, kind: str, folder: Path, strict: bool) -> list[str]:
    """The examples of one path that can be used, as Files holds them; says what was skipped."""
    examples, skipped = [], {}
    rows = read_rows(path, kind, folder)
    for place, row in tqdm(rows, f"checking {path}", unit=" rows", delay=2):
        try:
            conversations = FORMATS[kind](row)
            for segments in conversations:
                check_segments(segments, folder)
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
            if strict:
                raise ValueError(f"data {str(path)!r}, {place}: {message}") from None
            # messages that differ in names and numbers alone are one reason
            reason = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "*", message)
            skipped.setdefault(reason, []).append((place, message))
        else:
            examples += [json.dumps([(str(s.content), s.is_image, s.output) for s in segments])
                         for segments in conversations]  # fmt: skip
    lines = [f"{len(some)} skipped ({', '.join(p for p, _ in some[:3])}): {some[0][1]:.300}"
             for some in skipped.values()]  # fmt: skip
    if not examples:
        nothing = f"data {str(path)!r} holds no example of format {kind}; give what does"
        raise ValueError(": ".join([nothing, *lines[:1]]))
    number = sum(map(len, skipped.values()))
    lines.insert(0, f"{str(path)!r} ({kind}): {len(examples)} examples, {number} skipped")
    tqdm.write("\n  ".join(lines))
    return examples


def check_segments(segments: list[Segment], folder: Path) -> None:
    if not any(s.output for s in segments) or segments[0].output:
        raise ValueError("it has no output, or no input before it; want both")
    for segment in segments:
        if segment.is_image:
            open_image(folder / segment.content, header=True)
        elif not segment.content.strip():
            raise ValueError("a text in it is empty; leave it out, or write it")


# --- Their formats: one row -> conversations; what is wrong with a row raises ValueError ----------

FRAMES = 10  # of a chunk of a story
FOLDERS = ("captions", "instructpix2pix")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_rows(path: Path, kind: str, folder: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of a file or folder: lines as they are, so that a damaged one is one row."""
    if kind == "captions":
        inside = lambda root: (p.relative_to(root) for p in root.rglob("*"))
        names = {p for p in inside(folder) if p.suffix.lower() in PICTURES}
        captions = {p.with_suffix("") for p in inside(path) if p.suffix == ".txt"}
        alone = captions - {p.with_suffix("") for p in names}
        for name in sorted(names | {p.with_name(p.name + ".png") for p in alone}):
            yield repr(str(name)), (str(name), path / name.with_suffix(".txt"))
    elif kind == "instructpix2pix":
        for inner in sorted(p for p in path.iterdir() if p.is_dir()):
            yield repr(inner.name), (folder / inner.name, inner / "prompt.json")
    elif kind == "llava":
        rows = checkpoint.read_json(path, list)
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
    else:
        with open(path, "rb") as file:
            yield from ((f"line {n}", line) for n, line in enumerate(file, 1) if line.strip())


def read_file(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path.name!r} is missing, or no file")
    return path.read_bytes()


def fields(row, **hints) -> list:
    """The values of a row's fields. Others are ignored."""
    row = checkpoint.parse_json(row, "it") if isinstance(row, bytes) else row
    if not isinstance(row, dict):
        raise ValueError(f"it has a {type(row).__name__} for an object with {', '.join(hints)}")
    for name, hint in hints.items():
        if wanted := checkpoint.problem(row.get(name), hint, None, None):
            raise ValueError(f"its {name!r} is {row.get(name)!r:.40}; {wanted}")
    return [row.get(name) for name in hints]


def from_jsonl(line: bytes) -> list[list[Segment]]:
    conversation, (segments,) = [], fields(line, segments=list)
    for segment in segments:
        text, image, output = fields(segment, text=str | None, image=str | None, output=bool | None)
        if (text is None) == (image is None) or segment.keys() - {"text", "image", "output"}:
            raise ValueError(f"a segment has {', '.join(segment)!r:.60}; want text or image, and "
                             "output where it is to be learned")  # fmt: skip
        conversation.append(Segment(text if image is None else Path(image), bool(output)))
    return [conversation]


def from_captions(row: tuple[str, Path]) -> list[list[Segment]]:
    name, path = row
    caption = read_file(path).decode("utf-8-sig").strip()
    return [[Segment(caption), Segment(Path(name), output=True)]]


def from_llava(row) -> list[list[Segment]]:
    name, turns = fields(row, image=str | None, conversations=list)
    turns = [fields(t, **{"from": Literal["human", "gpt"], "value": str}) for t in turns]
    count, given = sum(text.count("<image>") for _, text in turns), int(name is not None)
    if count != given:
        raise ValueError(f"it has {count} <image>, but {given} images; want as many")
    segments = []
    for who, text in turns:
        for piece in re.split("(<image>)", text):
            if piece == "<image>":
                segments.append(Segment(Path(name), who == "gpt"))
            elif piece.strip() or piece == text:  # nothing beside an image is no empty text
                segments.append(Segment(piece.strip(), who == "gpt"))
    return [segments]


def from_edits(row: tuple[Path, Path]) -> list[list[Segment]]:
    folder, path = row
    (edit,) = fields(read_file(path), edit=str)
    names = sorted(p.name for p in folder.glob("*_0.jpg"))
    if not names:
        raise ValueError("it has no picture {seed}_0.jpg")
    pairs = [(Path(folder.name, name), Path(folder.name, name[:-5] + "1.jpg")) for name in names]
    return [[Segment(old), Segment(edit), Segment(new, output=True)] for old, new in pairs]


def from_stories(line: bytes) -> list[list[Segment]]:
    """Chunks of a story: of each, the first frame and its text are given."""
    images, captions = fields(line, images=list[str], captions=list[str])
    if len(images) != len(captions) or len(images) < 2:
        raise ValueError(f"it has {len(images)} images and {len(captions)} captions; want as many, "
                         "at least two")  # fmt: skip
    stories = []
    for begin in range(0, len(images) - 1, FRAMES):  # a single frame at the end tells nothing
        story = [Segment(Path(images[begin])), Segment(captions[begin])]
        for i in range(begin + 1, min(begin + FRAMES, len(images))):
            story += [Segment(captions[i], output=True), Segment(Path(images[i]), output=True)]
        stories.append(story)
    return stories


FORMATS = {"jsonl": from_jsonl, "captions": from_captions, "llava": from_llava,
           "instructpix2pix": from_edits, "storystream": from_stories}  # fmt: skip
