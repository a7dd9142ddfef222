"""Data: tokenizers, images in and out, the layout of one interleaved sequence, batches, Shapes.

Reading order: Segment and layout (how a conversation of text and images becomes tokens, latents
and labels), Batch, then the Shapes world, a small world of coloured shapes that is drawn on the
fly from a seed and has an exact answer to every question that is asked about it.

Sequence layout (the paper's, with the released model's turns):

    <bos> user's text and images <sep> model's text and images <sep> user ... <sep> model <sep>
    an image is <boi> <image> x L <eoi>: one placeholder per latent
"""

import functools
import io
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import checkpoint
from orthus import OrthusConfig

# --- Images --------------------------------------------------------------------------------------


def on_white(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB, transparency blended on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = image.point(lambda v: v / 257).convert("L")
    return image.convert("RGB")


def to_tensor(image: Image.Image, size: int, hub_pixels: bool = False) -> Tensor:
    """PIL image of any size and mode -> (3, size, size) in [-1, 1].

    Transparency is blended on white, the short side resized to `size` (Lanczos), the centre kept.
    hub_pixels does as the Hub's processor: 0.0078 x - 1, which makes white 0.989, and the long side
    rounded down.
    """
    image = on_white(image)
    width, height = image.size
    if (width, height) != (size, size):
        whole = int if hub_pixels else round
        scaled = [whole(side * size / min(width, height)) for side in (width, height)]
        width, height = (max(size, side) for side in scaled)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, size, size) uint8
    return pixels.float() * 0.0078 - 1 if hub_pixels else pixels.float() / 127.5 - 1


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clamped -> PIL image."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


# --- Text ----------------------------------------------------------------------------------------


class Tokenizer:
    """Text <-> token ids. Special tokens and image codes are never produced from text.

    The tiny model's is sentencepiece's: its pieces follow the special tokens and image codes. The
    released models' is a tokenizer.json, whose ids are the model's: `reserved` are those that text
    must not become and that are skipped in text. Where a prompt spells out the name of one, the
    name is cut in two, so that the model reads it as ordinary text.
    """

    def __init__(self, model: bytes, first_id: int, unk_id: int = 3, reserved=frozenset()):
        self.model = model
        self.is_json = model.lstrip()[:1] == b"{"
        if self.is_json:
            self.pieces = tokenizers.Tokenizer.from_str(model.decode())
        else:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.first_id, self.unk_id = first_id, unk_id  # piece 0 is sentencepiece's own unknown
        self.reserved = frozenset(reserved) - {unk_id}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint directory; its ids must be those of the model's config."""
        fields = checkpoint.read_section(directory, "model")
        config = checkpoint.build(OrthusConfig, fields, directory)
        path = checkpoint.find_tokenizer(directory)
        reserved = set(range(config.image_code_start, config.image_code_start + config.num_codes))
        if path.suffix == ".json":
            vocabulary = checkpoint.read_vocabulary(path)
            ids = checkpoint.token_ids(vocabulary, config.num_codes, path)
            own = {name: getattr(config, name) for name in ids}
            checkpoint.check_same_ids(path, ids, own, "the model's config")
            if max(vocabulary.values()) >= config.vocab_size:
                raise ValueError(
                    f"{path} has ids up to {max(vocabulary.values())}, the model's vocabulary "
                    f"only {config.vocab_size}"
                )
            reserved |= {i for name, i in ids.items() if name != "image_code_start"}
        try:
            return cls(path.read_bytes(), config.image_id + 1, config.unk_id, reserved)
        except Exception as error:  # tokenizers raises nothing more special
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is not a whole tokenizer ({reason})") from None

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
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


# --- The layout of one sequence, and batches -----------------------------------------------------


@dataclass
class Segment:
    """A piece of a conversation: text or an image, which the model reads, or writes (output)."""

    content: str | Image.Image
    output: bool = False


@dataclass
class Sequence:
    """tokens and labels (T,), unshifted as Orthus.loss wants them; images in reading order."""

    tokens: list[int]
    labels: list[int]
    images: list[Image.Image]


def layout(segments: list[Segment], tokenizer: Tokenizer, config: OrthusConfig) -> Sequence:
    """Lay segments out as <bos> input <sep> output <sep> input ..., the last turn closed too.

    Everything the model is to write has its own id as label, the rest -100: also the <sep> that
    ends its turn, and <boi>, placeholders and <eoi> of its images.
    """
    tokens, labels = [config.bos_id], [-100]

    def add(ids: list[int], output: bool) -> None:
        tokens.extend(ids)
        labels.extend(ids if output else [-100] * len(ids))

    for i, segment in enumerate(segments):
        if isinstance(segment.content, str):
            add(tokenizer.encode(segment.content), segment.output)
        else:
            placeholders = [config.image_id] * config.latents_per_image
            add([config.boi_id, *placeholders, config.eoi_id], segment.output)
        if i + 1 == len(segments) or segments[i + 1].output != segment.output:
            add([config.sep_id], segment.output)
    images = [s.content for s in segments if not isinstance(s.content, str)]
    return Sequence(tokens, labels, images)


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


# --- The Shapes world: scenes --------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "orange": (245, 130, 30),
}
BACKGROUND = (250, 248, 242)
UNSEEN = {("purple", "star"), ("green", "triangle")}  # never in training, asked for in evaluation
REACH = {"circle": 1.0, "square": 1.15, "triangle": 1.2, "star": 1.25}  # circumradius / r
COUNTS = ("zero", "one", "two", "three", "four")
RELATIONS = {  # name: (unit step from the second object to the first), y pointing down
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
CANVAS, GAP, OVERSAMPLE = 64, 3, 4


@dataclass(frozen=True)
class Thing:
    """One object of a scene; x, y, r in pixels, angle in radians."""

    shape: str
    colour: str
    x: float = 0.0
    y: float = 0.0
    r: float = 8.0
    angle: float = 0.0
    rgb: tuple[int, ...] = (0, 0, 0)
    digit: int | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def reach(self) -> float:
        return self.r * REACH[self.shape]


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a polygonal thing, in pixels, y pointing down."""
    if thing.shape == "star":
        radii = [1.25 * thing.r, 0.52 * thing.r] * 5
    else:
        radii = [thing.reach] * {"square": 4, "triangle": 3}[thing.shape]
    first = -math.pi / 4 if thing.shape == "square" else -math.pi / 2  # axis-aligned / one point up
    angles = [first + thing.angle + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [
        (thing.x + radius * math.cos(a), thing.y + radius * math.sin(a))
        for radius, a in zip(radii, angles, strict=True)
    ]


def render(things: list[Thing]) -> Image.Image:
    """Draw a scene at four times its size and box-filter it down: 64 x 64 RGB, anti-aliased."""
    k = OVERSAMPLE
    image = Image.new("RGB", (CANVAS * k, CANVAS * k), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for t in things:
        if t.shape == "circle":
            box = [(t.x - t.r) * k, (t.y - t.r) * k, (t.x + t.r) * k, (t.y + t.r) * k]
            draw.ellipse(box, fill=t.rgb)
        else:
            draw.polygon([(x * k, y * k) for x, y in outline(t)], fill=t.rgb)
        if t.digit is not None:
            draw.text((t.x * k, t.y * k), str(t.digit), "white", digit_font(), anchor="mm")
    return image.resize((CANVAS, CANVAS), Image.Resampling.BOX)


@functools.cache
def digit_font() -> ImageFont.FreeTypeFont:
    """Pillow's default font at the size whose digits are 7 canvas pixels high."""
    return ImageFont.load_default(size=9.7 * OVERSAMPLE)


def drop(colour: str, shape: str, things: list[Thing], rng: random.Random) -> Thing | None:
    """A thing with a size, place, angle and shade, GAP apart from the others; None: no room."""
    for _ in range(20):
        r = rng.uniform(6, 11)
        reach = r * REACH[shape]
        x, y = (rng.uniform(reach + 1, CANVAS - 1 - reach) for _ in range(2))
        if fits(thing := Thing(shape, colour, x, y, r), things):
            return replace(thing, angle=rng.uniform(-0.25, 0.25), rgb=shade(colour, rng))
    return None


def fits(thing: Thing, others: list[Thing]) -> bool:
    """Whether a thing is inside the canvas and GAP apart from the others."""
    low, high = thing.reach + 1, CANVAS - 1 - thing.reach
    return all(low <= v <= high for v in (thing.x, thing.y)) and all(
        math.hypot(thing.x - t.x, thing.y - t.y) >= thing.reach + t.reach + GAP for t in others
    )


def shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-6, 6))) for c in COLOURS[colour])


def place(
    wanted: list[tuple[str, str]],
    rng: random.Random,
    accept: Callable[[list[Thing]], bool] = lambda things: True,
) -> list[Thing]:
    """Drop each (colour, shape), again from the start until all have room and are accepted."""
    while True:
        things = []
        for colour, shape in wanted:
            if thing := drop(colour, shape, things, rng):
                things.append(thing)
        if len(things) == len(wanted) and accept(things):
            return things


def relation(a: Thing, b: Thing) -> str | None:
    """How a lies to b, by the larger of the two offsets; None where they are too alike to say."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 1.25 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def pick(rng: random.Random, allow_unseen: bool, colours=tuple(COLOURS), shapes=SHAPES):
    """A random (colour, shape); the UNSEEN combinations only where allowed."""
    while True:
        pair = rng.choice(colours), rng.choice(shapes)
        if allow_unseen or pair not in UNSEEN:
            return pair


def write_digits(things: list[Thing], rng: random.Random, share: float = 0.5) -> list[Thing]:
    """Put a digit on a share of the things that are large enough to carry one."""
    return [
        replace(t, digit=rng.randint(0, 9)) if t.r >= 8 and rng.random() < share else t
        for t in things
    ]


def random_scene(
    rng: random.Random, allow_unseen: bool = False, digits: float = 0.5
) -> list[Thing]:
    """One to four things of any kind, a share of the large ones with digits."""
    wanted = [pick(rng, allow_unseen) for _ in range(rng.randint(1, 4))]
    return write_digits(place(wanted, rng), rng, digits)


def detail(things: list[Thing]) -> Tensor:
    """Where digits stand -> (1, 64, 64), 1 inside their boxes and 0 elsewhere."""
    image = Image.new("L", (CANVAS, CANVAS))
    for t in things:
        if t.digit is not None:
            ImageDraw.Draw(image).rectangle([t.x - 3.5, t.y - 4, t.x + 3, t.y + 3.5], 255)
    return torch.from_numpy(np.array(image))[None].float() / 255


def scene_images(seed: int, step: int, batch: int, digits: float = 0.5) -> tuple[Tensor, Tensor]:
    """A batch of random scenes for the autoencoder; same seed, same batch.

    -> images (batch, 3, 64, 64) and where their details are (batch, 1, 64, 64).
    """
    rng = random.Random(f"scenes {seed} {step}")
    scenes = [random_scene(rng, digits=digits) for _ in range(batch)]
    images = [to_tensor(render(things), CANVAS) for things in scenes]
    return torch.stack(images), torch.stack([detail(things) for things in scenes])


# --- The Shapes world: tasks ---------------------------------------------------------------------

GENEVAL = {  # GenEval's six categories and their share of the text-to-image examples
    "one object": 0.07,
    "two objects": 0.34,
    "counting": 0.10,
    "colours": 0.06,
    "position": 0.09,
    "binding": 0.34,
}
QUESTIONS = {  # kinds of question and their share
    "count": 0.12,
    "colour": 0.09,
    "exists": 0.09,
    "relation": 0.11,
    "digit": 0.50,
    "describe": 0.09,
}
TRAINING_DIGITS = 0.9  # share of large things with a digit where reading it is to be learned
EDITS = {"recolour": 0.35, "remove": 0.35, "add": 0.3}  # kinds of edit and their share
TASKS = {  # share of the post-training examples
    "text_to_image": 0.42,
    "understanding": 0.18,
    "editing": 0.10,
    "difference": 0.02,
    "in_context": 0.21,
    "story": 0.07,
}


@dataclass
class Example:
    """One example: its segments, and the truth by which an answer to it is judged."""

    task: str
    kind: str
    segments: list[Segment]
    things: list[Thing]
    unseen: bool = False  # about a combination that training never shows
    before: list[Thing] = field(default_factory=list)  # what the prompt's last image shows


def choose(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def text_to_image(rng: random.Random, kind: str, allow_unseen: bool = False) -> Example:
    """A caption of one of GenEval's six kinds and a scene it is true of."""
    (c1, s1), (c2, s2) = pick(rng, allow_unseen), pick(rng, allow_unseen)
    accept, unseen = lambda things: True, False
    if kind == "one object":
        caption, wanted = with_article(s1), [(c1, s1)]
    elif kind == "two objects":
        while s2 == s1:
            c2, s2 = pick(rng, allow_unseen)
        caption, wanted = f"{with_article(s1)} and {with_article(s2)}", [(c1, s1), (c2, s2)]
    elif kind == "counting":
        n = rng.randint(2, 4)
        caption, wanted = f"{COUNTS[n]} {c1} {s1}s", [(c1, s1)] * n
    elif kind == "colours":
        caption, wanted = with_article(f"{c1} {s1}"), [(c1, s1)]
    else:
        while c2 == c1:
            c2, s2 = pick(rng, allow_unseen)
        wanted = [(c1, s1), (c2, s2)]
        first, second = with_article(f"{c1} {s1}"), with_article(f"{c2} {s2}")
        if kind == "binding":
            caption = f"{first} and {second}"
        else:
            word = rng.choice(list(RELATIONS))
            caption, accept = f"{first} {word} {second}", lambda t: relation(*t) == word
    if kind in ("counting", "colours", "position", "binding"):
        unseen = any(pair in UNSEEN for pair in wanted)
    things = place(wanted, rng, accept)
    rng.shuffle(things)
    segments = [Segment(caption), Segment(render(things), output=True)]
    return Example("text_to_image", kind, segments, things, unseen)


def ask_count(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    counts = Counter(t.shape for t in things)
    n = rng.choice(sorted({counts[s] for s in SHAPES}))  # every count that occurs is as likely
    shape = rng.choice([s for s in SHAPES if counts[s] == n])
    return f"How many {shape}s are there?", COUNTS[n]


def ask_colour(rng: random.Random, things: list[Thing]) -> tuple[str, str] | None:
    single = [t for t in things if sum(u.shape == t.shape for u in things) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return f"What colour is the {thing.shape}?", thing.colour


def ask_exists(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """Yes and no as often; half of the no's are one attribute off a thing that is there."""
    present = {(t.colour, t.shape) for t in things}
    colour, shape = rng.choice(sorted(present))
    if rng.random() < 0.5:
        return f"Is there {with_article(f'{colour} {shape}')}?", "yes"
    near = rng.random() < 0.5
    while (colour, shape) in present:
        if not near:
            colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        elif rng.random() < 0.5:
            colour, shape = rng.choice(list(COLOURS)), rng.choice(sorted(present))[1]
        else:
            colour, shape = rng.choice(sorted(present))[0], rng.choice(SHAPES)
        if (colour, shape) in UNSEEN:  # not even named in training: draw again
            colour, shape = rng.choice(sorted(present))
    return f"Is there {with_article(f'{colour} {shape}')}?", "no"


def ask_relation(rng: random.Random, things: list[Thing]) -> tuple[str, str] | None:
    """Only where one thing alone stands so, and nothing so askew that it is a matter of taste."""
    options = []
    names = Counter(t.name for t in things)
    for b in (t for t in things if names[t.name] == 1):
        relations = [(relation(a, b), a) for a in things if a is not b]
        for word in RELATIONS:
            found = [a for r, a in relations if r == word]
            if len(found) == 1 and all(r is not None for r, _ in relations):
                options.append((f"What is {word} the {b.name}?", with_article(found[0].name)))
    return rng.choice(options) if options else None


def ask_digit(rng: random.Random, things: list[Thing]) -> tuple[str, str] | None:
    single = [t for t in things if sum(u.shape == t.shape for u in things) == 1]
    single = [t for t in single if t.digit is not None]
    if not single:
        return None
    thing = rng.choice(single)
    return f"Which digit is on the {thing.shape}?", str(thing.digit)


def ask_describe(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """All things from left to right."""
    names = [with_article(t.name) for t in sorted(things, key=lambda t: t.x)]
    return "Describe the image.", " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


ASK = {
    "count": ask_count,
    "colour": ask_colour,
    "exists": ask_exists,
    "relation": ask_relation,
    "digit": ask_digit,
    "describe": ask_describe,
}


def understanding(
    rng: random.Random, kind: str, turns: int = 1, allow_unseen: bool = False, digits: float = 0.5
) -> Example:
    """A scene and questions about it, the first of a given kind, in as many turns; a share of the
    large things with digits."""
    while True:
        shapes = rng.sample(SHAPES, rng.choice((1, 2, 2, 3, 4)))  # few shapes: counts above one
        wanted = [
            pick(rng, allow_unseen, shapes=shapes) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))
        ]
        things = write_digits(place(wanted, rng), rng, digits)
        asked: list[tuple[str, str]] = []
        while len(asked) < turns:
            pair = ASK[choose(rng, QUESTIONS) if asked else kind](rng, things)
            if pair is None and not asked:
                break  # this scene has no answer for the wanted kind: draw another
            if pair is not None and pair not in asked:  # again, it could be copied
                asked.append(pair)
        else:
            segments = [Segment(render(things))]
            for question, answer in asked:
                segments += [Segment(question), Segment(answer, output=True)]
            unseen = any((t.colour, t.shape) in UNSEEN for t in things)
            return Example("understanding", kind, segments, things, unseen)


@dataclass(frozen=True)
class Edit:
    """One change of a scene, told by the shape alone: what it is done to must be the only one."""

    kind: str  # recolour, remove or add
    shape: str
    colour: str = ""  # new, or of the new thing

    @property
    def instruction(self) -> str:
        if self.kind == "recolour":
            return f"Make the {self.shape} {self.colour}."
        if self.kind == "remove":
            return f"Remove the {self.shape}."
        return f"Add {with_article(f'{self.colour} {self.shape}')}."

    def apply(self, things: list[Thing], rng: random.Random) -> list[Thing] | None:
        """The scene after the edit, all else as it was; None where the edit makes no sense."""
        if self.kind == "add":
            there = any((t.colour, t.shape) == (self.colour, self.shape) for t in things)
            new = None if there or len(things) > 3 else drop(self.colour, self.shape, things, rng)
            return [*things, new] if new else None
        single = [t for t in things if t.shape == self.shape]
        if len(single) != 1 or single[0].colour == self.colour:
            return None
        if self.kind == "remove":
            return [t for t in things if t is not single[0]] or None
        new = replace(single[0], colour=self.colour, rgb=shade(self.colour, rng))
        return [new if t is single[0] else t for t in things]


def random_edit(
    rng: random.Random, things: list[Thing], kind: str, allow_unseen: bool
) -> tuple[Edit, list[Thing]] | None:
    """An edit that makes sense in this scene, and the scene after it; None where none was found."""
    for _ in range(8):
        colour, shape = pick(rng, allow_unseen)
        edit = Edit(kind, shape, "" if kind == "remove" else colour)
        if after := edit.apply(things, rng):
            return edit, after
    return None


def editing(rng: random.Random, kind: str, allow_unseen: bool = False) -> Example:
    """A scene and an instruction; to draw: the scene with this one change."""
    while True:
        things = place([pick(rng, allow_unseen) for _ in range(rng.randint(1, 4))], rng)
        if found := random_edit(rng, things, kind, allow_unseen):
            edit, after = found
            unseen = (edit.colour, edit.shape) in UNSEEN
            segments = [Segment(render(things)), Segment(edit.instruction)]
            segments.append(Segment(render(after), output=True))
            return Example("editing", kind, segments, after, unseen, things)


def difference(rng: random.Random, kind: str, allow_unseen: bool = False) -> Example:
    """An edit told backwards: the scene before and after it, and what was done."""
    edit = editing(rng, kind, allow_unseen)
    before, instruction, after = edit.segments
    segments = [before, replace(after, output=False), Segment("What changed?")]
    segments.append(replace(instruction, output=True))
    return replace(edit, task="difference", segments=segments)


def in_context(rng: random.Random, kind: str, allow_unseen: bool = False) -> Example:
    """A scene, the same after an edit, another scene; to draw: the same edit of the other one.

    A thing that was changed or removed is known by its shape: nothing else in the other scene has
    the colour that it had.
    """
    while True:
        things = place([pick(rng, allow_unseen) for _ in range(rng.randint(1, 4))], rng)
        other = place([pick(rng, allow_unseen) for _ in range(rng.randint(1, 4))], rng)
        found = random_edit(rng, things, kind, allow_unseen)
        if not found or not (answer := found[0].apply(other, rng)):
            continue
        edit, after = found
        old = {t.colour for t in things if t.shape == edit.shape}
        if kind != "add" and any(t.colour in old and t.shape != edit.shape for t in other):
            continue
        unseen = (edit.colour, edit.shape) in UNSEEN
        segments = [Segment(render(scene)) for scene in (things, after, other)]
        segments.append(Segment(render(answer), output=True))
        return Example("in_context", kind, segments, answer, unseen, other)


MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y pointing down
STRIDE = 12  # pixels of one move
FRAMES = 4  # of a story, the first one given


def story_moves(scene: list[Thing]) -> list[tuple[str, list[Thing]]]:
    """What may happen next: the sentence, and the scene with one thing moved by STRIDE."""
    moves = []
    for i, actor in enumerate(scene):
        others = scene[:i] + scene[i + 1 :]
        for way, (dx, dy) in MOVES.items():
            moved = replace(actor, x=actor.x + STRIDE * dx, y=actor.y + STRIDE * dy)
            if fits(moved, others):
                sentence = f"The {actor.name} moves {way}."
                moves.append((sentence, [*scene[:i], moved, *scene[i + 1 :]]))
    return moves


def story(rng: random.Random, allow_unseen: bool = False) -> Example:
    """Two actors meet; in each further sentence and frame one of them moves by STRIDE."""
    first, second = pick(rng, allow_unseen), pick(rng, allow_unseen)
    while second == first:
        second = pick(rng, allow_unseen)
    scene = start = place([first, second], rng, lambda things: bool(story_moves(things)))
    names = [with_article(t.name) for t in scene]
    opening = f"{names[0].capitalize()} meets {names[1]}. Continue this story."
    segments = [Segment(render(scene)), Segment(opening)]
    for _ in range(1, FRAMES):
        sentence, scene = rng.choice(story_moves(scene))
        segments += [Segment(sentence, output=True), Segment(render(scene), output=True)]
    unseen = any(pair in UNSEEN for pair in (first, second))
    return Example("story", "story", segments, scene, unseen, start)


class Shapes:
    """The Shapes world as a data set: example(i) depends on (seed, i) alone."""

    def __init__(self, seed: int, tasks: dict[str, float] = TASKS, allow_unseen: bool = False):
        self.seed, self.tasks, self.allow_unseen = seed, tasks, allow_unseen

    def example(self, index: int) -> Example:
        rng = random.Random(f"shapes {self.seed} {index}")
        task = choose(rng, self.tasks)
        if task == "image":  # nothing but an image: stage 1
            things = random_scene(rng, self.allow_unseen)
            return Example(task, task, [Segment(render(things), output=True)], things)
        if task == "text_to_image":
            return text_to_image(rng, choose(rng, GENEVAL), self.allow_unseen)
        if task == "understanding":
            kind, turns = choose(rng, QUESTIONS), rng.randint(1, 4)
            return understanding(rng, kind, turns, self.allow_unseen, TRAINING_DIGITS)
        if task == "editing":
            return editing(rng, choose(rng, EDITS), self.allow_unseen)
        if task == "difference":
            return difference(rng, choose(rng, EDITS), self.allow_unseen)
        if task == "in_context":
            return in_context(rng, choose(rng, EDITS), self.allow_unseen)
        return story(rng, self.allow_unseen)


@functools.cache
def shapes_texts() -> list[str]:
    """What the Shapes world may say, for the tokenizer."""
    texts = [
        segment.content
        for i in range(4000)
        for segment in Shapes(0, allow_unseen=True).example(i).segments
        if isinstance(segment.content, str)
    ]
    return texts + ["Generate an image.", *"0123456789"]


def shapes_words() -> list[str]:
    """Every word of the Shapes world, for the warning about words that a model never saw."""
    words = {w.strip(".,?!") for text in shapes_texts() for w in text.split()}
    return sorted(words - set("0123456789"), key=lambda w: (w.lower(), w)) + list("0123456789")
