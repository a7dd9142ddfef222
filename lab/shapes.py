"""The Shapes world: coloured shapes, drawn on the fly from a seed; every question about them has
one exact answer. One dataset among others: all that a trainer needs is Shapes.example.

Reading order: scenes (what there is and how it is drawn), ShapesConfig (how much of what), then
the tasks: Example (a conversation and its truth), questions, edits, story moves; Shapes, which
makes an example of every task; and last the data of the presets, as functions that a spec names:
`train.py posttrain --data lab.shapes:nano_tasks --data-args '{"max_objects": 2}'`.
"""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from PIL import Image, ImageDraw, ImageFont

from checkpoint import build, setting
from data import Segment

# --- Scenes ---

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = dict(red=(220, 40, 40), green=(40, 160, 60), blue=(45, 80, 220))
COLOURS |= dict(yellow=(240, 200, 30), purple=(150, 60, 190), orange=(245, 130, 30))
BACKGROUND = (250, 248, 242)
UNSEEN = {("purple", "star"), ("green", "triangle")}  # never in training, asked for in evaluation
REACH = {"circle": 1.0, "square": 1.15, "triangle": 1.2, "star": 1.25}  # circumradius / r
# Unit steps from the second object to the first, y pointing down.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CANVAS, GAP = 64, 3  # pixels: a picture's side, and what is between things, at least
OVERSAMPLE = 4  # pictures are drawn so many times as large
FONT = ImageFont.load_default(size=9.7 * OVERSAMPLE)  # whose digits are 7 canvas pixels high


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
    def unseen(self) -> bool:
        return (self.colour, self.shape) in UNSEEN

    @property
    def reach(self) -> float:
        return self.r * REACH[self.shape]


Scene = list[Thing]
Pair = tuple[str, str]  # colour, shape


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a polygonal thing, in pixels, y pointing down."""
    number = {"square": 4, "triangle": 3, "star": 10}[thing.shape]
    # The first corner points up; a square lies on its side.
    first = thing.angle + (-math.pi / 4 if thing.shape == "square" else -math.pi / 2)
    corners = []
    for i in range(number):
        r = 0.52 * thing.r if thing.shape == "star" and i % 2 else thing.reach
        angle = first + 2 * math.pi * i / number
        corners.append((thing.x + r * math.cos(angle), thing.y + r * math.sin(angle)))
    return corners


def render(things: Scene) -> Image.Image:
    """Draw a scene at four times its size and box-filter it down: 64 x 64 RGB, anti-aliased."""
    image = Image.new("RGB", (CANVAS * OVERSAMPLE, CANVAS * OVERSAMPLE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for t in things:
        if t.shape == "circle":
            box = t.x - t.r, t.y - t.r, t.x + t.r, t.y + t.r
            draw.ellipse([v * OVERSAMPLE for v in box], fill=t.rgb)
        else:
            draw.polygon([v * OVERSAMPLE for corner in outline(t) for v in corner], fill=t.rgb)
        if t.digit is not None:
            centre = t.x * OVERSAMPLE, t.y * OVERSAMPLE
            draw.text(centre, str(t.digit), "white", FONT, anchor="mm")
    return image.resize((CANVAS, CANVAS), Image.Resampling.BOX)


def digit_mask(things: Scene) -> Image.Image | None:
    """Where digits stand: 64 x 64 "L", 255 inside their boxes; None where there are none."""
    mask = Image.new("L", (CANVAS, CANVAS))
    for t in things:
        if t.digit is not None:
            ImageDraw.Draw(mask).rectangle([t.x - 3.5, t.y - 4, t.x + 3, t.y + 3.5], 255)
    return mask if mask.getbbox() else None


def fits(x: float, y: float, reach: float, others: Scene) -> bool:
    """Whether a thing is inside the canvas and GAP apart from the others."""
    low, high = reach + 1, CANVAS - 1 - reach
    apart = all(math.hypot(x - t.x, y - t.y) >= reach + t.reach + GAP for t in others)
    return low <= min(x, y) and max(x, y) <= high and apart


def shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-6, 6))) for c in COLOURS[colour])


def drop(colour: str, shape: str, things: Scene, rng: random.Random) -> Thing | None:
    """A thing with a size, place, angle and shade, GAP apart from the others; None: no room."""
    for _ in range(20):
        r = rng.uniform(6, 11)
        reach = r * REACH[shape]
        x = rng.uniform(reach + 1, CANVAS - 1 - reach)
        y = rng.uniform(reach + 1, CANVAS - 1 - reach)
        if fits(x, y, reach, things):
            return Thing(shape, colour, x, y, r, rng.uniform(-0.25, 0.25), shade(colour, rng))
    return None


def place(wanted: list[Pair], rng: random.Random, accept: Callable | None = None) -> Scene:
    """Drop each (colour, shape), again from the start until all have room and are accepted."""
    while True:
        things = []
        for colour, shape in wanted:
            thing = drop(colour, shape, things, rng)
            if thing is not None:
                things.append(thing)
        if len(things) == len(wanted) and (accept is None or accept(things)):
            return things


def relation(a: Thing, b: Thing) -> str | None:
    """How a lies to b, by the larger of the two offsets; None where they are too alike to say."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 1.25 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def write_digits(things: Scene, rng: random.Random, share: float) -> Scene:
    """Put a digit on a share of the things that are large enough to carry one."""
    chosen = lambda t: t.r >= 8 and rng.random() < share
    return [replace(t, digit=rng.randint(0, 9)) if chosen(t) else t for t in things]


# --- The mix ---

TASKS = "image", "text_to_image", "understanding", "editing", "difference", "in_context", "story"
CAPTIONS = "one object", "two objects", "counting", "colours", "position", "binding"  # GenEval's
QUESTIONS = "count", "colour", "exists", "relation", "digit", "describe"
EDITS = "recolour", "remove", "add"


def weights(names: tuple[str, ...], *default: float):
    """A field that says how often each of these comes; what it leaves out does not."""
    make = lambda: dict(zip(names, default, strict=True))
    return field(default_factory=make, metadata={"names": names, "limits": (dict,)})


@dataclass
class ShapesConfig:
    """What there is in a Shapes world, and how much of it: by default as in the shipped model's
    last training. Task "image" is a picture alone, for the autoencoder and for stage 1."""

    tasks: dict[str, float] = weights(TASKS, 0.0, 0.42, 0.18, 0.10, 0.02, 0.21, 0.07)
    captions: dict[str, float] = weights(CAPTIONS, 0.07, 0.34, 0.10, 0.06, 0.09, 0.34)
    questions: dict[str, float] = weights(QUESTIONS, 0.12, 0.09, 0.09, 0.11, 0.50, 0.09)
    edits: dict[str, float] = weights(EDITS, 0.35, 0.35, 0.3)
    digits: float = setting(0.9, "share of the large things that carry a digit", float, 0, 1)
    max_objects: int = setting(4, "things in a scene", int, 2, 4)
    min_objects: int = setting(1, "things in a picture of no task", int, 1, 4)
    shapes: tuple[str, ...] = setting(SHAPES, "of things", *SHAPES)
    colours: tuple[str, ...] = setting(tuple(COLOURS), "of things", *COLOURS)

    def __post_init__(self):
        """Raise ValueError where there is no such world, with all that is wrong."""
        problems = []
        for f in fields(self):
            names, value = f.metadata.get("names"), getattr(self, f.name)
            if names and not are_weights(value, names):
                problems.append(f"{f.name} is {value}; want weights of any of {', '.join(names)}")
        if min(len(set(self.shapes)), len(set(self.colours))) < 2:
            problems.append(f"shapes are {self.shapes}, colours {self.colours}; want two of each")
        if self.min_objects > self.max_objects:
            problems.append(f"min_objects is {self.min_objects}, max_objects {self.max_objects}")
        pairs = {(colour, shape) for colour in self.colours for shape in self.shapes} - UNSEEN
        if len(pairs) <= self.max_objects:  # "Is there a red star?" needs one that is not there
            found = f"shapes and colours make {len(pairs)} combinations for training"
            problems.append(f"{found}; want more than max_objects, which is {self.max_objects}")
        asked = self.tasks.get("understanding") and self.questions.get("digit")
        if asked and self.digits < 0.01:  # a scene with a digit would never be found
            problems.append(f"digits is {self.digits}, yet questions ask for them; want 0.01 to 1")
        if problems:
            raise ValueError("; ".join(problems))

    def kinds(self, task: str) -> dict[str, float]:
        """The weights of a task's kinds; none where there is but one, named as the task."""
        own = {"text_to_image": self.captions, "understanding": self.questions}
        return {} if task in ("image", "story") else own.get(task, self.edits)


def are_weights(value: dict, names: tuple[str, ...]) -> bool:
    """Whether it gives a weight to some of the names, and to one of them more than 0."""
    right = [w for w in value.values() if isinstance(w, int | float) and 0 <= w <= 1e6]
    return set(value) <= set(names) and len(right) == len(value) and any(right)


def weighted_choice(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


# --- Examples and their truth ---

COUNTS = "zero", "one", "two", "three", "four"
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y pointing down
STRIDE = 12  # pixels of one move
FRAMES = 4  # of a story, the first one given


@dataclass
class Example:
    """A conversation and the truth by which an answer to it is judged."""

    task: str
    kind: str
    segments: list[Segment]
    things: Scene  # what the answer shows, or is about
    unseen: bool = False  # about a combination that training never shows
    before: Scene = field(default_factory=list)  # what the prompt's last image shows

    @property
    def prompt(self) -> list[Segment]:
        """What comes before the model's first word or picture."""
        return self.segments[: [s.output for s in self.segments].index(True)]


def picture(things: Scene, output: bool = False) -> Segment:
    return Segment(render(things), output, digit_mask(things))


Answered = tuple[str, str] | None  # question and answer; None where a scene has no answer


def ask_count(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    counts = Counter(t.shape for t in things)
    n = rng.choice(sorted({counts[s] for s in config.shapes}))  # every count is as likely
    shape = rng.choice([s for s in config.shapes if counts[s] == n])
    return f"How many {shape}s are there?", COUNTS[n]


def singles(things: Scene) -> Scene:
    """The things that are the only ones of their shape."""
    return [t for t in things if sum(u.shape == t.shape for u in things) == 1]


def ask_colour(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    single = singles(things)
    if not single:
        return None
    thing = rng.choice(single)
    return f"What colour is the {thing.shape}?", thing.colour


def ask_exists(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    """Yes and no as often; half of the no's are one attribute off a thing that is there."""
    present = sorted({(t.colour, t.shape) for t in things})
    colour, shape = rng.choice(present)
    answer = "yes" if rng.random() < 0.5 else "no"
    if answer == "no":
        colour, shape = absent(rng, present, config)
    return f"Is there {with_article(f'{colour} {shape}')}?", answer


def absent(rng: random.Random, present: list[Pair], config: ShapesConfig) -> Pair:
    """A (colour, shape) that is not there, and not UNSEEN: training does not even name it."""
    near = rng.random() < 0.5
    while True:
        if not near:
            pair = rng.choice(config.colours), rng.choice(config.shapes)
        elif rng.random() < 0.5:
            pair = rng.choice(config.colours), rng.choice(present)[1]
        else:
            pair = rng.choice(present)[0], rng.choice(config.shapes)
        if pair in UNSEEN:
            rng.choice(present)  # not used: without this draw equal seeds made other scenes
        elif pair not in present:
            return pair


def ask_relation(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
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


def ask_digit(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    single = [t for t in singles(things) if t.digit is not None]
    if not single:
        return None
    thing = rng.choice(single)
    return f"Which digit is on the {thing.shape}?", str(thing.digit)


def ask_describe(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    """All things from left to right."""
    names = [with_article(t.name) for t in sorted(things, key=lambda t: t.x)]
    all_but_last = ", ".join(names[:-1])
    return "Describe the image.", f"{all_but_last} and {names[-1]}" if all_but_last else names[-1]


ASKS = ask_count, ask_colour, ask_exists, ask_relation, ask_digit, ask_describe
ASK = dict(zip(QUESTIONS, ASKS, strict=True))


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

    def apply(self, things: Scene, rng: random.Random, max_objects: int = 4) -> Scene | None:
        """The scene after the edit, all else as it was; None where the edit makes no sense."""
        if self.kind == "add":
            there = any((t.colour, t.shape) == (self.colour, self.shape) for t in things)
            if there or len(things) >= max_objects:
                return None
            new = drop(self.colour, self.shape, things, rng)
            return None if new is None else [*things, new]
        single = [t for t in things if t.shape == self.shape]
        if len(single) != 1 or single[0].colour == self.colour:
            return None
        if self.kind == "remove":
            return [t for t in things if t is not single[0]] or None
        new = replace(single[0], colour=self.colour, rgb=shade(self.colour, rng))
        return [new if t is single[0] else t for t in things]


def story_moves(scene: Scene) -> list[tuple[str, Scene]]:
    """What may happen next: the sentence, and the scene with one thing moved by STRIDE."""
    moves = []
    for i, actor in enumerate(scene):
        others = scene[:i] + scene[i + 1 :]
        for way, (dx, dy) in MOVES.items():
            new = replace(actor, x=actor.x + STRIDE * dx, y=actor.y + STRIDE * dy)
            if fits(new.x, new.y, new.reach, others):
                moves.append((f"The {actor.name} moves {way}.", [*scene[:i], new, *scene[i + 1 :]]))
    return moves


# --- The dataset ---


class Shapes:
    """The Shapes world as an endless dataset: example(i) depends on seed, i and config alone.
    allow_unseen lets in the combinations that training never shows."""

    def __init__(self, seed: int, config: ShapesConfig | None = None, allow_unseen: bool = False):
        self.seed, self.config, self.allow_unseen = seed, config or ShapesConfig(), allow_unseen

    def example(self, index: int) -> list[Segment]:
        return self.scene(index).segments

    def scene(self, index: int) -> Example:
        """The example and its truth."""
        rng = random.Random(f"shapes {self.seed} {index}")
        task = weighted_choice(rng, self.config.tasks)
        kinds = self.config.kinds(task)
        kind = weighted_choice(rng, kinds) if kinds else task
        turns = rng.randint(1, 4) if task == "understanding" else 1
        return self.make(task, kind, rng, turns)

    def make(self, task: str, kind: str, rng: random.Random, turns: int = 1) -> Example:
        """An example of a task from a random stream; turns: questions about one scene."""
        if task == "understanding":
            return self.understanding(rng, kind, turns)
        makers = dict(image=self.image, text_to_image=self.text_to_image, story=self.story)
        makers |= dict(editing=self.editing, difference=self.difference, in_context=self.in_context)
        return makers[task](rng, kind)

    def pick(self, rng: random.Random, among: list[str] | None = None) -> Pair:
        """A random (colour, shape), the shape among these; UNSEEN ones only where allowed."""
        while True:
            pair = rng.choice(self.config.colours), rng.choice(among or self.config.shapes)
            if self.allow_unseen or pair not in UNSEEN:
                return pair

    def things(self, rng: random.Random, least: int = 1) -> Scene:
        """So many things, up to max_objects, of any kind."""
        number = rng.randint(least, self.config.max_objects)
        return place([self.pick(rng) for _ in range(number)], rng)

    def random_scene(self, rng: random.Random) -> Scene:
        """A scene of no task, a share of the large things with digits."""
        return write_digits(self.things(rng, self.config.min_objects), rng, self.config.digits)

    def image(self, rng: random.Random, kind: str = "image") -> Example:
        things = self.random_scene(rng)
        return Example("image", kind, [picture(things, output=True)], things)

    def text_to_image(self, rng: random.Random, kind: str) -> Example:
        """A caption of one of GenEval's six kinds and a scene it is true of."""
        first, second = self.pick(rng), self.pick(rng)
        while kind == "two objects" and first[1] == second[1]:  # they differ in shape
            second = self.pick(rng)
        while kind in ("position", "binding") and first[0] == second[0]:  # and these in colour
            second = self.pick(rng)
        named = kind not in ("one object", "two objects")  # the others name colours
        one, two = (" ".join(pair) if named else pair[1] for pair in (first, second))
        wanted, accept = [first, second], None
        if kind in ("one object", "colours"):
            caption, wanted = with_article(one), [first]
        elif kind == "counting":
            number = rng.randint(2, self.config.max_objects)
            caption, wanted = f"{COUNTS[number]} {one}s", [first] * number
        elif kind == "position":
            word = rng.choice(list(RELATIONS))
            caption = f"{with_article(one)} {word} {with_article(two)}"
            accept = lambda things: relation(*things) == word
        else:
            caption = f"{with_article(one)} and {with_article(two)}"
        things = place(wanted, rng, accept)
        rng.shuffle(things)
        unseen = named and any(t.unseen for t in things)
        segments = [Segment(caption), picture(things, output=True)]
        return Example("text_to_image", kind, segments, things, unseen)

    def understanding(self, rng: random.Random, kind: str, turns: int = 1) -> Example:
        """A scene and different questions about it, the first of a given kind; fewer than `turns`
        where the scene has no more."""
        config, first = self.config, None
        while first is None:  # until a scene has an answer for the wanted kind
            few = min(rng.choice((1, 2, 2, 3, 4)), len(config.shapes))  # for counts above one
            among = rng.sample(config.shapes, few)
            number = min(rng.choice((1, 2, 2, 3, 3, 4)), config.max_objects)
            things = place([self.pick(rng, among) for _ in range(number)], rng)
            things = write_digits(things, rng, config.digits)
            first = ASK[kind](rng, things, config)
        asked = [first]
        for _ in range(100):
            if len(asked) == turns:
                break
            pair = ASK[weighted_choice(rng, config.questions)](rng, things, config)
            if pair is not None and pair not in asked:  # asked again, it could be copied
                asked.append(pair)
        segments = [picture(things)]
        for question, answer in asked:
            segments += [Segment(question), Segment(answer, output=True)]
        return Example("understanding", kind, segments, things, any(t.unseen for t in things))

    def edit(self, rng: random.Random, things: Scene, kind: str) -> tuple[Edit, Scene] | None:
        """An edit that makes sense in a scene, and the scene after it; None if none was found."""
        for _ in range(8):
            colour, shape = self.pick(rng)
            edit = Edit(kind, shape, "" if kind == "remove" else colour)
            after = edit.apply(things, rng, self.config.max_objects)
            if after is not None:
                return edit, after
        return None

    def editing(self, rng: random.Random, kind: str) -> Example:
        """A scene and an instruction; to draw: the scene with this one change."""
        found = None
        while found is None:
            things = self.things(rng)
            found = self.edit(rng, things, kind)
        edit, after = found
        segments = [picture(things), Segment(edit.instruction), picture(after, output=True)]
        unseen = (edit.colour, edit.shape) in UNSEEN
        return Example("editing", kind, segments, after, unseen, things)

    def difference(self, rng: random.Random, kind: str) -> Example:
        """An edit told backwards: the scene before and after it, and what was done."""
        edit = self.editing(rng, kind)
        before, told, after = edit.segments
        segments = [before, replace(after, output=False), Segment("What changed?")]
        return replace(edit, task="difference", segments=[*segments, replace(told, output=True)])

    def in_context(self, rng: random.Random, kind: str) -> Example:
        """A scene, the same after an edit, another scene; to draw: the same edit of the other one.
        A thing that was changed or removed is known by its shape: nothing else in the other scene
        has the colour that it had."""
        while True:
            things, other = self.things(rng), self.things(rng)
            found = self.edit(rng, things, kind)
            if found is None:
                continue
            edit, after = found
            answer = edit.apply(other, rng, self.config.max_objects)
            if answer is None:
                continue
            old = {t.colour for t in things if t.shape == edit.shape}
            if kind != "add" and any(t.colour in old and t.shape != edit.shape for t in other):
                continue
            unseen = (edit.colour, edit.shape) in UNSEEN
            segments = [picture(things), picture(after), picture(other)]
            segments.append(picture(answer, output=True))
            return Example("in_context", kind, segments, answer, unseen, other)

    def story(self, rng: random.Random, kind: str = "story") -> Example:
        """Two actors meet; in each further sentence and frame one of them moves by STRIDE."""
        first, second = self.pick(rng), self.pick(rng)
        while second == first:
            second = self.pick(rng)
        start = place([first, second], rng, lambda things: bool(story_moves(things)))
        one, two = (with_article(t.name) for t in start)
        opening = f"{one.capitalize()} meets {two}. Continue this story."
        segments, scene = [picture(start), Segment(opening)], start
        for _ in range(1, FRAMES):
            sentence, scene = rng.choice(story_moves(scene))
            segments += [Segment(sentence, output=True), picture(scene, output=True)]
        return Example("story", kind, segments, scene, any(t.unseen for t in start), start)


# --- The data of the presets ---

PICTURES = {"tasks": {"image": 1.0}}
FEW = {"shapes": SHAPES[:3], "colours": tuple(COLOURS)[:4], "digits": 0.0}
NANO = FEW | {"max_objects": 3}
NANO_TASKS = {
    "tasks": {"text_to_image": 0.4, "understanding": 0.6},
    "captions": {"one object": 0.4, "colours": 0.6},
    "questions": {"count": 0.5, "colour": 0.3, "describe": 0.2},
}
MIXES = {  # weights of TASKS, from which share of a training on
    0.0: (0, 0.34, 0.28, 0.10, 0.06, 0.17, 0.05),
    0.65: (0, 0.42, 0.18, 0.10, 0.02, 0.21, 0.07),
    0.82: (0, 0.60, 0.12, 0.06, 0.02, 0.15, 0.05),
}


def world(seed: int, given: dict) -> Shapes:
    """The world of a config's fields; ValueError where there is no such field or world."""
    return Shapes(seed, build(ShapesConfig, given, "the Shapes world"))


class Schedule:
    """Worlds one after the other, each from an index on: a mix of tasks that changes."""

    def __init__(self, begins: list[int], worlds: list[Shapes]):
        self.begins, self.worlds, self.config = begins, worlds, worlds[-1].config

    def example(self, index: int) -> list[Segment]:
        number = sum(begin <= index for begin in self.begins) - 1
        return self.worlds[number].example(index)


def nano_pictures(seed: int = 0, **given) -> Shapes:
    """Pictures alone, for stage 1."""
    return world(seed, NANO | PICTURES | given)


def nano_crowds(seed: int = 0, **given) -> Shapes:
    """Pictures of four things: more to learn from in each, for an autoencoder."""
    return world(seed, FEW | PICTURES | {"min_objects": 4} | given)


def nano_tasks(seed: int = 0, **given) -> Shapes:
    """Captions and questions."""
    return world(seed, NANO | NANO_TASKS | given)


def tiny_pictures(seed: int = 0, **given) -> Shapes:
    """Pictures alone."""
    return world(seed, PICTURES | given)


def tiny_tasks(seed: int = 0, examples: int | None = None, **given) -> Shapes | Schedule:
    """Every task. Over so many examples: at first more questions, at the end more captions."""
    if examples is None:
        return world(seed, given)
    worlds = []
    for weights in MIXES.values():
        tasks = {"tasks": dict(zip(TASKS, weights, strict=True))}
        worlds.append(world(seed, tasks | given))
    return Schedule([round(share * examples) for share in MIXES], worlds)
