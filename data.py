"""Data: what a conversation of text and images is to the model.

Segments are laid out as one sequence of tokens and labels (layout), sequences are padded to a batch
(collate). The paper's layout, with the released model's turns:

    <bos> user's text and images <sep> model's text and images <sep> user ... <sep> model <sep>
    an image is <boi> <image> x L <eoi>: one placeholder per latent

A dataset is anything with `example(index) -> list[Segment]`, endless or with a length.
"""

import functools
import hashlib
import importlib
import inspect
import io
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
from orthus import OrthusConfig

# --- Conversations, the layout of one sequence, batches ------------------------------------------


@dataclass
class Segment:
    """A piece of a conversation: text or an image, which the model reads, or writes (output). An
    image is a PIL image, the path of one, read when a batch needs it, or its latents (L, C).
    detail: an "L" image, white where small things stand that the autoencoder must not lose."""

    content: str | Path | Image.Image | Tensor
    output: bool = False
    detail: Image.Image | None = None

    @property
    def is_image(self) -> bool:
        return not isinstance(self.content, str)


@dataclass
class Sequence:
    """tokens and labels (T,), unshifted as Orthus.loss wants them; images in reading order."""

    tokens: list[int]
    labels: list[int]
    images: list[Path | Image.Image | Tensor]


def layout(segments: list[Segment], tokenizer: "Tokenizer", config: OrthusConfig) -> Sequence:
    """Lay segments out as <bos> input <sep> output <sep> input ..., the last turn closed too. What
    the model is to write has its own id as label, the rest -100: also the <sep> that ends its turn,
    and <boi>, placeholders and <eoi> of its images."""
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
    """tokens, labels (B, T); images (N, 3, H, W), or (N, L, C) latents, in reading order."""

    tokens: Tensor
    labels: Tensor
    images: Tensor

    def to(self, device) -> "Batch":
        return Batch(self.tokens.to(device), self.labels.to(device), self.images.to(device))


def collate(sequences, config: OrthusConfig, resolution: int, pad_left=False, hub_pixels=False):
    """Sequences -> a Batch, padded to the longest: on the right to train, on the left to sample."""
    side, images = "left" if pad_left else "right", []
    for image in (image for s in sequences for image in s.images):
        is_latents = isinstance(image, Tensor)
        images.append(image if is_latents else to_tensor(image, resolution, hub_pixels))
    tokens = [torch.tensor(s.tokens) for s in sequences]
    labels = [torch.tensor(s.labels) for s in sequences]
    tokens = pad_sequence(tokens, True, config.pad_id, side)
    labels = pad_sequence(labels, True, -100, side)
    none = torch.zeros(0, 3, resolution, resolution)
    return Batch(tokens, labels, torch.stack(images) if images else none)


def check_fits(model: OrthusConfig, vae, source) -> None:
    """Raise ValueError where a model was made for another autoencoder (VQVAEConfig)."""
    for name in ("num_codes", "latent_channels", "latents_per_image"):
        if getattr(model, name) != getattr(vae, name):
            found = f"{name} is {getattr(model, name)} in the model, but {getattr(vae, name)}"
            raise ValueError(f"{found} in the autoencoder, {source}; give another (--vae)")


# --- Text ----------------------------------------------------------------------------------------


class Tokenizer:
    """Text <-> token ids. The tiny model's is sentencepiece's, whose pieces follow special tokens
    and image codes. The released models' is a tokenizer.json, whose ids are the model's: where a
    text spells out the name of a reserved one, the name is cut in two and read as ordinary text."""

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

    def __len__(self) -> int:
        """One more than the largest id."""
        return (
            self.pieces.get_vocab_size() if self.is_json else self.first_id + len(self.pieces) - 1
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint in any layout."""
        source = checkpoint.open_checkpoint(directory)
        config = checkpoint.build(OrthusConfig, source.section("model"), source)
        path = source.tokenizer
        checkpoint.check_file(path)
        try:
            found = cls(path.read_bytes() or b"empty", config)  # which sentencepiece would take
        except Exception as error:  # tokenizers raises nothing more special
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is not a whole tokenizer ({reason})") from None
        if len(found) > config.vocab_size:
            raise ValueError(f"{path} has {len(found)} ids, the vocabulary {config.vocab_size}")
        return found

    def encode(self, text: str) -> list[int]:
        if not self.is_json:
            ids = self.pieces.encode(text)
            return [self.first_id + i - 1 if i else self.unk_id for i in ids]
        encoding = self.pieces.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets)
        cuts = [start + 1 for i, (start, end) in found if i in self.reserved and end - start > 1]
        if not cuts:
            return encoding.ids
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        return [i for piece in pieces for i in self.encode(piece)]

    def decode(self, ids: list[int]) -> str:
        if self.is_json:
            return self.pieces.decode([i for i in ids if i not in self.reserved])
        ids = [i - self.first_id + 1 for i in ids if self.first_id <= i < len(self)]
        return self.pieces.decode(ids)


def words_of(texts: Iterable[str]) -> set[str]:
    said = [word for text in texts for word in text.replace("<image>", " ").split()]
    return {word.strip(".,?!;:\"'") for word in said} - {""}


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model -> its file's bytes."""
    import sentencepiece

    model = io.BytesIO()
    options = dict(model_type="bpe", character_coverage=1.0, split_digits=True)
    options |= dict(normalization_rule_name="identity", unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1)
    options |= dict(hard_vocab_limit=False, minloglevel=2)  # a small world has fewer pieces
    options |= dict(sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size)
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        letters = len(set("".join(texts)))
        raise ValueError(f"no {vocab_size} pieces from {letters} letters ({error})") from None
    return model.getvalue()


# --- Images --------------------------------------------------------------------------------------


def open_image(path: str | Path, header: bool = False) -> Image.Image:
    """An image file, turned as its Exif data say; header: its pixels are not read, which is fast.
    Raises ValueError, with its name, for what Pillow cannot read or finds too large."""
    try:
        if not Path(path).is_file():  # a pipe or a device would be waited for
            raise ValueError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            if image.mode in ("I", "F"):
                raise ValueError(f"its mode is {image.mode}, want 8 or 16 bits a channel")
            return image if header else ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's readers of damaged files raise many kinds
        raise ValueError(f"image {str(path)!r} cannot be read ({error})") from None


def on_white(image: Path | Image.Image) -> Image.Image:
    """PIL image of any mode, or its path -> RGB, transparency blended on white."""
    image = open_image(image) if isinstance(image, Path) else image
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_tensor(image: Path | Image.Image, size: int, hub_pixels: bool = False) -> Tensor:
    """PIL image of any size and mode, or its path -> (3, size, size) in [-1, 1]: the short side
    resized (Lanczos), the centre kept. hub_pixels does as the Hub's processor: 0.0078 x - 1, which
    makes white 0.989, and the long side rounded down."""
    image = on_white(image)
    if image.size != (size, size):
        short, whole = min(image.size), int if hub_pixels else round
        width, height = (max(size, whole(side * size / short)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        # what is cut away is not computed either, however long the other side is
        x, y = image.width / width, image.height / height
        box = left * x, top * y, (left + size) * x, (top + size) * y
        image = image.resize((size, size), Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # (3, size, size)
    return pixels * 0.0078 - 1 if hub_pixels else pixels / 127.5 - 1


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clamped -> PIL image."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def row_of(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row


def read_prompt(text: str, images: list[str]) -> list[Segment]:
    """Text and image paths -> segments: images stand where <image> does, else in front."""
    if not text.strip() and not images:
        raise ValueError("the prompt is empty; say what to draw, or give an image and a question")
    problem = checkpoint.wanted(text, (str,))
    if problem:
        raise ValueError(f"the prompt is {text!r:.60}; {problem}")
    pieces = re.split("(<image>)", text if "<image>" in text else "<image>" * len(images) + text)
    count, paths = pieces.count("<image>"), iter(images)
    if count != len(images):
        raise ValueError(f"{count} <image> in {text!r:.60}, {len(images)} images; give as many")
    for path in images:
        open_image(path).load()
    pieces = [piece for piece in pieces if piece.strip()]
    return [Segment(Path(next(paths)) if piece == "<image>" else piece) for piece in pieces]


# --- Datasets: what a spec names -----------------------------------------------------------------


def read_images(segments: list[Segment], resolution: int) -> list[Segment]:
    """The same with images read from their paths and brought to the resolution. Raises ValueError
    where one cannot be read."""
    read = lambda path: to_image(to_tensor(path, resolution))
    is_path = lambda s: isinstance(s.content, Path)
    return [replace(s, content=read(s.content)) if is_path(s) else s for s in segments]


def says(segments: list[Segment]) -> bytes:
    """What an example says, for a hash: texts, paths, pixels or latents."""
    parts = []
    for s in segments:
        if isinstance(s.content, str | Path):  # of a path the name: a folder may be moved
            content = getattr(s.content, "name", s.content).encode()
        else:
            content = np.ascontiguousarray(s.content).tobytes()
        parts += [content, b"output" if s.output else b"input"]
    return b"\0".join(parts)


@functools.lru_cache(maxsize=1)
def texts_of(dataset, most: int = 4000) -> list[str]:
    """The texts of its first examples: what a tokenizer and the known words are made from."""
    number = min(most, len(dataset)) if hasattr(dataset, "__len__") else most
    examples = [dataset.example(i) for i in range(number)]
    return [s.content for segments in examples for s in segments if not s.is_image]


class Part:
    """Some of a dataset's examples, by their indices, which wrap."""

    def __init__(self, dataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, index: int) -> list[Segment]:
        return self.dataset.example(self.indices[index % len(self.indices)])


def split(dataset) -> tuple[Part, Part]:
    """-> what to train on, and the twentieth, one at least, that is held out, by a hash of what an
    example says: it stays on its side when others come. A single example is on both."""
    indices = tqdm(range(len(dataset)), "reading the data", delay=2)
    hashes = [hashlib.sha256(says(dataset.example(i))).digest() for i in indices]
    limit = max((2**256 // 20).to_bytes(32), min(hashes))
    held_out = [i for i, found in enumerate(hashes) if found <= limit]
    train = [i for i, found in enumerate(hashes) if found > limit]
    return Part(dataset, train or held_out), Part(dataset, held_out)


def open_source(spec: str, args: dict, seed: int, examples: int | None) -> tuple:
    """One source of a spec -> (to train on, held out)."""
    if spec and Path(spec).exists():
        spec, args = "lab.files:open", {"path": spec} | args
    module, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"data {spec!r} is no file, no folder, and no module:function; give one")
    given = {"examples": examples, "seed": seed}
    try:
        function = getattr(importlib.import_module(module), name)
        takes = inspect.signature(function).parameters
        dataset = function(**{k: v for k, v in given.items() if k in takes} | args)
        if hasattr(dataset, "__len__"):
            return split(dataset)
        if "seed" not in takes:
            later = SimpleNamespace(example=lambda i: dataset.example(10**9 + i))
            return dataset, later  # where no training comes
        given["seed"] = seed + 2**32
        return dataset, function(**{k: v for k, v in given.items() if k in takes} | args)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"data {spec!r} with {args} cannot be opened ({error})") from None


def open_dataset(spec: str, args: dict | None = None, seed=0, examples: int | None = None):
    """What a spec names -> (to train on, held out), each with example(index) -> list[Segment].

    A spec is a path (short for lab.files:open), module:function, or several of these, split at
    commas: with =SHARE behind each they are mixed, else one follows the other. args go to the
    function, or as {spec: args} to several. A function that takes `seed` gets it (seed + 2**32 for
    what is held out), and `examples`, how many training will take. With a length, a twentieth is
    held out; an endless dataset without a seed, from 10**9 on. What is no spec raises ValueError.
    """
    if (spec and Path(spec).exists()) or not re.search("[,=]", spec):
        return open_source(spec, args or {}, seed, examples)
    several = importlib.import_module("lab.mixture")  # which opens each source by open_source
    return several.open(spec, args or {}, seed, examples)
