"""Data: what a conversation of text and images is to the model.

Segments are laid out as one sequence of tokens and labels (layout), sequences are padded to a batch
(collate). The paper's layout, with the released model's turns:

    <bos> user's text and images <sep> model's text and images <sep> user ... <sep> model <sep>
    an image is <boi> <image> x L <eoi>: one placeholder per latent

A dataset is anything with `example(index) -> list[Segment]`: what is to be learned has output=True.
It may have a length; without one it is endless. shapes.Shapes is one.
Reading order: Segment, layout, batches, then text, images in, images out.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

import checkpoint
from orthus import OrthusConfig

# --- Conversations, the layout of one sequence, batches ------------------------------------------


@dataclass
class Segment:
    """A piece of a conversation: text or an image, which the model reads, or writes (output).

    An image may be the path of a file that was checked (check_image): it is read when a batch needs
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
    """tokens, labels (B, T); images (number of images, 3, H, W) in reading order over the batch."""

    tokens: Tensor
    labels: Tensor
    images: Tensor

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, f).to(device) for f in ("tokens", "labels", "images")))


def collate(
    sequences: list[Sequence],
    config: OrthusConfig,
    resolution: int,
    pad_left: bool = False,
    hub_pixels: bool = False,
) -> Batch:
    """Pad sequences to the longest one: on the right for training, on the left for generation."""

    def pad(ids: list[int], value: int) -> list[int]:
        padding = [value] * (longest - len(ids))
        return padding + ids if pad_left else ids + padding

    longest = max(len(s.tokens) for s in sequences)
    images = [to_tensor(image, resolution, hub_pixels) for s in sequences for image in s.images]
    return Batch(
        torch.tensor([pad(s.tokens, config.pad_id) for s in sequences]),
        torch.tensor([pad(s.labels, -100) for s in sequences]),
        torch.stack(images) if images else torch.zeros(0, 3, resolution, resolution),
    )


# --- Text ----------------------------------------------------------------------------------------


class Tokenizer:
    """Text <-> token ids. Special tokens and image codes are never produced from text.

    The tiny model's is sentencepiece's: its pieces follow the special tokens and image codes. The
    released models' is a tokenizer.json, whose ids are the model's: `reserved` are those that text
    must not become and that are skipped in text. Where a prompt spells out the name of one, the
    name is cut in two, so that the model reads it as ordinary text.
    """

    def __init__(self, model: bytes, first_id: int, unk_id: int = 3, reserved=frozenset()):
        self.is_json = model.lstrip()[:1] == b"{"
        if self.is_json:
            import tokenizers  # each library is imported where its files are read

            self.pieces = tokenizers.Tokenizer.from_str(model.decode())
        else:
            import sentencepiece

            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.first_id, self.unk_id = first_id, unk_id  # piece 0 is sentencepiece's own unknown
        self.reserved = frozenset(reserved) - {unk_id}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint in any layout."""
        source = checkpoint.open_checkpoint(directory)
        config = checkpoint.build(OrthusConfig, source.section("model"), source)
        path, ids = source.tokenizer, {v for k, v in vars(config).items() if k.endswith("_id")}
        codes = range(config.image_code_start, config.image_code_start + config.num_codes)
        try:
            if not (content := path.read_bytes()):  # sentencepiece would take it
                raise ValueError("it is empty")
            own = cls(content, config.image_id + 1, config.unk_id, ids | {*codes})
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


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model -> its file's bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,  # a small world may not have as many pieces
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


# --- Images in -----------------------------------------------------------------------------------

MOST_PIXELS = 89_000_000  # of a file; Pillow warns above, and a phone's largest photo has fewer


def open_image(path: str | Path) -> Image.Image:
    """An image file, turned as its Exif data say. Raises ValueError, in one line, with its name."""
    try:
        if not Path(path).is_file():  # a pipe or a device would be waited for
            raise ValueError("it is not a file; give a PNG or JPEG")
        # the size is checked here
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, too many")
            if image.mode in ("I", "F"):
                raise ValueError(f"its mode is {image.mode}, want 8 or 16 bits a channel")
            image.load()
            try:
                return ImageOps.exif_transpose(image)  # photos may be stored turned
            except (SyntaxError, ValueError, TypeError, KeyError):  # broken Exif data
                return image.copy()
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read ({error}); give a PNG or JPEG") from None
    except (OSError, ValueError, MemoryError) as error:
        raise ValueError(f"image {path} cannot be read ({error})") from None


def check_image(path: str | Path) -> Path:
    """Raise ValueError unless a file is an image that can be read; nothing of it is kept."""
    open_image(path)
    return Path(path)


def on_white(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB, transparency blended on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = image.point(lambda v: v / 257).convert("L")
    return image.convert("RGB")


def read_prompt(text: str, images: list[str]) -> list[Segment]:
    """Text and image paths -> segments: images stand where <image> does, else in front."""
    if not text.strip() and not images:
        raise ValueError("the prompt is empty; say what to draw, or give an image and a question")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the prompt {text!r:.60} is not valid text; give it in UTF-8")
    pictures = [Segment(check_image(path)) for path in images]
    pieces = text.split("<image>")
    if len(pieces) == 1:
        pieces = [""] * len(pictures) + pieces
    if len(pieces) - 1 != len(pictures):
        raise ValueError(f"{len(pieces) - 1} <image> in {text!r:.60}, but {len(pictures)} images "
                         "given; give as many")
    mixed = [s for piece, p in zip(pieces, [*pictures, None], strict=True)
             for s in (Segment(piece), p)]  # fmt: skip
    return [s for s in mixed if s is not None and (s.is_image or s.content.strip())]


def to_tensor(image: Path | Image.Image, size: int, hub_pixels: bool = False) -> Tensor:
    """PIL image of any size and mode, or its path -> (3, size, size) in [-1, 1].

    Transparency is blended on white, the short side resized to `size` (Lanczos), the centre kept:
    only what is kept is computed, however long the other side. hub_pixels does as the Hub's
    processor: 0.0078 x - 1, which makes white 0.989, and the long side rounded down.
    """
    image = on_white(open_image(image) if isinstance(image, Path) else image)
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


Cell = tuple[Image.Image, str, object]  # an image, the text below it and the colour of that


def sheet(rows: list[list[Cell]], size: tuple[int, int]) -> Image.Image:
    """Rows of images, each brought to one size (width, height), with its text below."""
    import textwrap

    from PIL import ImageDraw, ImageFont

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
            image = segment.content
            image = open_image(image) if isinstance(image, Path) else image
            cells.append((image, " ".join(text), "black"))
            text = []
        else:
            text.append(segment.content.strip())
    if text and cells:
        cells[-1] = cells[-1][0], " ".join([cells[-1][1], *text]).strip(), "black"
    return cells


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
