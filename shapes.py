"""The Shapes world: coloured shapes, drawn on the fly from a seed; every question about them has
one exact answer. One dataset among others: all that a trainer needs is Shapes.example.

Reading order: scenes (what there is and how it is drawn), ShapesConfig (how much of what), then
the tasks: Example (a conversation and its truth), questions, edits, story moves, and Shapes, which
makes an example of every task.
"""

import functools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from PIL import Image, ImageDraw, ImageFont

import checkpoint
from checkpoint import within
from data import Segment

# --- Scenes --------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 220),
           "yellow": (240, 200, 30), "purple": (150, 60, 190), "orange": (245, 130, 30)}
BACKGROUND = (250, 248, 242)
UNSEEN = {("purple", "star"), ("green", "triangle")}  # never in training, asked for in evaluation
REACH = {"circle": 1.0, "square": 1.15, "triangle": 1.2, "star": 1.25}  # circumradius / r
# unit steps from the second object to the first, y pointing down
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CANVAS, GAP, OVERSAMPLE = 64, 3, 4  # pixels of a picture's side, pixels between things, times
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


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a polygonal thing, in pixels, y pointing down."""
    outer, inner = [thing.reach], [0.52 * thing.r]
    radii = {"square": outer * 4, "triangle": outer * 3, "star": (outer + inner) * 5}[thing.shape]
    first = -math.pi / 4 if thing.shape == "square" else -math.pi / 2  # axis-aligned / one point up
    angles = [first + thing.angle + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    corners = zip(radii, angles, strict=True)
    return [(thing.x + r * math.cos(a), thing.y + r * math.sin(a)) for r, a in corners]


def render(things: Scene) -> Image.Image:
    """Draw a scene at four times its size and box-filter it down: 64 x 64 RGB, anti-aliased."""
    image = Image.new("RGB", (CANVAS * OVERSAMPLE,) * 2, BACKGROUND)
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
    digits, mask = [t for t in things if t.digit is not None], Image.new("L", (CANVAS, CANVAS))
    for t in digits:
        ImageDraw.Draw(mask).rectangle([t.x - 3.5, t.y - 4, t.x + 3, t.y + 3.5], 255)
    return mask if digits else None


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
        x, y = (rng.uniform(reach + 1, CANVAS - 1 - reach) for _ in range(2))
        if fits(x, y, reach, things):
            return Thing(shape, colour, x, y, r, rng.uniform(-0.25, 0.25), shade(colour, rng))
    return None


def place(wanted: list[tuple[str, str]], rng: random.Random,
          accept: Callable[[Scene], bool] | None = None) -> Scene:
    """Drop each (colour, shape), again from the start until all have room and are accepted."""
    while True:
        things = []
        for colour, shape in wanted:
            if thing := drop(colour, shape, things, rng):
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
    return [
        replace(t, digit=rng.randint(0, 9)) if t.r >= 8 and rng.random() < share else t
        for t in things
    ]


# --- The mix -------------------------------------------------------------------------------------

# What there is, and its share in the shipped model's last training. Task "image" is a picture
# alone, for the autoencoder and for stage 1; the captions are GenEval's six categories.
TASKS = {"image": 0.0, "text_to_image": 0.42, "understanding": 0.18, "editing": 0.10,
         "difference": 0.02, "in_context": 0.21, "story": 0.07}
CAPTIONS = {"one object": 0.07, "two objects": 0.34, "counting": 0.10, "colours": 0.06,
            "position": 0.09, "binding": 0.34}
QUESTIONS = {"count": 0.12, "colour": 0.09, "exists": 0.09, "relation": 0.11, "digit": 0.50,
             "describe": 0.09}
EDITS = {"recolour": 0.35, "remove": 0.35, "add": 0.3}


def weights(default: dict[str, float], of: str):
    help = f"weights of {of}, those left out 0 (default: {default})".replace("'", "")
    return field(default_factory=default.copy, metadata={"low": 0, "high": 1e6, "help": help})


@dataclass
class ShapesConfig:
    """What there is in a Shapes world, and how much of it."""

    tasks: dict[str, float] = weights(TASKS, "tasks")
    captions: dict[str, float] = weights(CAPTIONS, "kinds of caption")
    questions: dict[str, float] = weights(QUESTIONS, "kinds of question")
    edits: dict[str, float] = weights(EDITS, "kinds of edit")
    digits: float = within(0.9, 0, 1, "share of large things with a digit (default: 0.9)")
    max_objects: int = within(4, 2, 4, "things in a scene (default: 4)")
    min_objects: int = within(1, 1, 4, "things in a picture of no task (default: 1)")
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)

    def __post_init__(self):
        checkpoint.check_fields(self)
        known = {"tasks": TASKS, "captions": CAPTIONS, "questions": QUESTIONS, "edits": EDITS,
                 "shapes": SHAPES, "colours": COLOURS}
        problems = []
        for name, kinds in known.items():
            own, least = getattr(self, name), "two" if name in ("shapes", "colours") else "one"
            enough = any(own.values()) if least == "one" else len(own) == len(set(own)) >= 2
            if not (enough and set(own) <= set(kinds)):
                problems.append(f"{name} is {own}; want {least} or more of {', '.join(kinds)}")
        pairs = {(colour, shape) for colour in self.colours for shape in self.shapes} - UNSEEN
        # "Is there a red star?" needs one that is not there
        if not problems and len(pairs) <= max(2, self.max_objects):
            problems.append(f"shapes and colours make {len(pairs)} combinations for training; want "
                            f"more than max_objects, which is {self.max_objects}")
        asked = self.tasks.get("understanding") and self.questions.get("digit")
        if asked and self.digits < 0.01:  # a scene with a digit would never be found
            problems.append(f"digits is {self.digits}, yet questions ask for them; want 0.01 to 1")
        if problems:
            raise ValueError("; ".join(problems))

    def __hash__(self):  # by value: what is made from a config can be cached
        return hash(repr(self))

    def kinds(self, task: str) -> dict[str, float]:
        """The weights of a task's kinds; none where there is but one, named as the task."""
        own = {"text_to_image": self.captions, "understanding": self.questions}
        return {} if task in ("image", "story") else own.get(task, self.edits)


def weighted_choice(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


# --- Examples and their truth --------------------------------------------------------------------

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
    thing = rng.choice(single) if (single := singles(things)) else None
    return thing and (f"What colour is the {thing.shape}?", thing.colour)


def ask_exists(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    """Yes and no as often; half of the no's are one attribute off a thing that is there."""
    present = {(t.colour, t.shape) for t in things}
    colour, shape = rng.choice(sorted(present))
    if rng.random() < 0.5:
        return f"Is there {with_article(f'{colour} {shape}')}?", "yes"
    near = rng.random() < 0.5
    while (colour, shape) in present:
        if not near:
            colour, shape = rng.choice(config.colours), rng.choice(config.shapes)
        elif rng.random() < 0.5:
            colour, shape = rng.choice(config.colours), rng.choice(sorted(present))[1]
        else:
            colour, shape = rng.choice(sorted(present))[0], rng.choice(config.shapes)
        if (colour, shape) in UNSEEN:  # not even named in training: draw again
            colour, shape = rng.choice(sorted(present))
    return f"Is there {with_article(f'{colour} {shape}')}?", "no"


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
    thing = rng.choice(single) if single else None
    return thing and (f"Which digit is on the {thing.shape}?", str(thing.digit))


def ask_describe(rng: random.Random, things: Scene, config: ShapesConfig) -> Answered:
    """All things from left to right."""
    names = [with_article(t.name) for t in sorted(things, key=lambda t: t.x)]
    return "Describe the image.", " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


ASK = {"count": ask_count, "colour": ask_colour, "exists": ask_exists, "relation": ask_relation,
       "digit": ask_digit, "describe": ask_describe}


@dataclass(frozen=True)
class Edit:
    """One change of a scene, told by the shape alone: what it is done to must be the only one."""

    kind: str  # recolour, remove or add
    shape: str
    colour: str = ""  # new, or of the new thing

    @property
    def instruction(self) -> str:
        name = with_article(f"{self.colour} {self.shape}")
        return {"recolour": f"Make the {self.shape} {self.colour}.",
                "remove": f"Remove the {self.shape}.", "add": f"Add {name}."}[self.kind]

    def apply(self, things: Scene, rng: random.Random, max_objects: int = 4) -> Scene | None:
        """The scene after the edit, all else as it was; None where the edit makes no sense."""
        if self.kind == "add":
            there = any((t.colour, t.shape) == (self.colour, self.shape) for t in things)
            if there or len(things) >= max_objects:
                return None
            new = drop(self.colour, self.shape, things, rng)
            return [*things, new] if new else None
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


# --- The dataset ---------------------------------------------------------------------------------


class Shapes:
    """The Shapes world as an endless dataset: example(i) depends on seed, i and config alone.

    allow_unseen lets in the combinations that training never shows. Each task is a method, which
    makes one example of a kind from a random stream.
    """

    def __init__(self, seed: int, config: ShapesConfig | None = None, allow_unseen: bool = False):
        self.seed, self.config, self.allow_unseen = seed, config or ShapesConfig(), allow_unseen

    def example(self, index: int) -> list[Segment]:
        return self.scene(index).segments

    def scene(self, index: int) -> Example:
        rng = random.Random(f"shapes {self.seed} {index}")
        task = weighted_choice(rng, self.config.tasks)
        kinds = self.config.kinds(task)
        kind = weighted_choice(rng, kinds) if kinds else task
        more = {"turns": rng.randint(1, 4)} if task == "understanding" else {}
        return getattr(self, task)(rng, kind, **more)

    def pick(self, rng: random.Random, shapes: list[str] | None = None) -> tuple[str, str]:
        """A random (colour, shape); the UNSEEN combinations only where allowed."""
        while True:
            pair = rng.choice(self.config.colours), rng.choice(shapes or self.config.shapes)
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
        named = kind not in ("one object", "two objects")  # these captions name no colour
        wanted, accept = [self.pick(rng), self.pick(rng)], None
        differ = {"two objects": 1, "position": 0, "binding": 0}.get(kind)  # in shape, in colour
        while differ is not None and wanted[0][differ] == wanted[1][differ]:
            wanted[1] = self.pick(rng)
        one, two = (" ".join(pair) if named else pair[1] for pair in wanted)
        if kind == "counting":
            n = rng.randint(2, self.config.max_objects)
            caption, wanted = f"{COUNTS[n]} {one}s", wanted[:1] * n
        elif kind in ("one object", "colours"):
            caption, wanted = with_article(one), wanted[:1]
        else:
            word = rng.choice(list(RELATIONS)) if kind == "position" else "and"
            caption = f"{with_article(one)} {word} {with_article(two)}"
            accept = (lambda t: relation(*t) == word) if kind == "position" else None
        things = place(wanted, rng, accept)
        rng.shuffle(things)
        unseen = named and any(t.unseen for t in things)
        segments = [Segment(caption), picture(things, output=True)]
        return Example("text_to_image", kind, segments, things, unseen)

    def understanding(self, rng: random.Random, kind: str, turns: int = 1) -> Example:
        """A scene and different questions about it, the first of a given kind; fewer than `turns`
        where the scene has no more."""
        config = self.config
        while True:
            few = min(rng.choice((1, 2, 2, 3, 4)), len(config.shapes))  # for counts above one
            shapes = rng.sample(config.shapes, few)
            number = min(rng.choice((1, 2, 2, 3, 3, 4)), config.max_objects)
            things = place([self.pick(rng, shapes) for _ in range(number)], rng)
            things = write_digits(things, rng, config.digits)
            if first := ASK[kind](rng, things, config):
                break  # the scene has an answer for the wanted kind
        asked = [first]
        for _ in range(100):
            if len(asked) == turns:
                break
            pair = ASK[weighted_choice(rng, config.questions)](rng, things, config)
            if pair not in (None, *asked):  # asked again, it could be copied
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
            if after := edit.apply(things, rng, self.config.max_objects):
                return edit, after
        return None

    def editing(self, rng: random.Random, kind: str) -> Example:
        """A scene and an instruction; to draw: the scene with this one change."""
        while not (found := self.edit(rng, things := self.things(rng), kind)):
            pass
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
        has the colour that it had.
        """
        while True:
            things, other = self.things(rng), self.things(rng)
            found = self.edit(rng, things, kind)
            if not found or not (answer := found[0].apply(other, rng, self.config.max_objects)):
                continue
            edit, after = found
            old = {t.colour for t in things if t.shape == edit.shape}
            if kind != "add" and any(t.colour in old and t.shape != edit.shape for t in other):
                continue
            unseen = (edit.colour, edit.shape) in UNSEEN
            segments = [*map(picture, (things, after, other)), picture(answer, output=True)]
            return Example("in_context", kind, segments, answer, unseen, other)

    def story(self, rng: random.Random, kind: str = "story") -> Example:
        """Two actors meet; in each further sentence and frame one of them moves by STRIDE."""
        first, second = self.pick(rng), self.pick(rng)
        while second == first:
            second = self.pick(rng)
        scene = start = place([first, second], rng, lambda things: bool(story_moves(things)))
        unseen = any(t.unseen for t in scene)
        names = [with_article(t.name) for t in scene]
        opening = f"{names[0].capitalize()} meets {names[1]}. Continue this story."
        segments = [picture(scene), Segment(opening)]
        for _ in range(1, FRAMES):
            sentence, scene = rng.choice(story_moves(scene))
            segments += [Segment(sentence, output=True), picture(scene, output=True)]
        return Example("story", kind, segments, scene, unseen, start)


@functools.cache
def shapes_texts(config: ShapesConfig) -> list[str]:
    """What a Shapes world may say, the unseen combinations too: what a tokenizer learns from."""
    world = Shapes(0, config, allow_unseen=True)
    said = (segment.content for i in range(4000) for segment in world.example(i))
    return [*(text for text in said if isinstance(text, str)), "Generate an image.", *"0123456789"]


class Schedule:
    """Worlds one after the other: [[share of so many examples it begins at, its fields], ...]."""

    def __init__(self, worlds: list, examples: int, seed: int):
        self.begins = [round(share * examples) for share, _ in worlds]
        self.worlds = [Shapes(seed, ShapesConfig(**fields)) for _, fields in worlds]

    def example(self, index: int) -> list[Segment]:
        number = sum(begin <= index for begin in self.begins) - 1
        return self.worlds[number].example(index)

    def texts(self) -> list[str]:
        return [text for world in self.worlds for text in shapes_texts(world.config)]
