"""Evaluation: how good a model of a Shapes world is.

    python -m lab.evaluate [CHECKPOINT] [--prompts 500] [--json FILE] [--samples DIR]

answers held-out examples of every task of the checkpoint's world, by kind, and measures the
autoencoder, which bounds all. Pictures are judged as GenEval does it: a detector reads the picture,
and what it found is compared with what was asked. The detector knows nothing of what was drawn, it
only looks at pixels. Reading order: detector, what is right, autoencoder, tasks and their judges,
tables and sheets, the command line.
"""

import argparse
import functools
import math
import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

import checkpoint
from checkpoint import Generation
from data import Segment, on_white, open_source, to_image, to_tensor
from lab import mixture, shapes
from lab.shapes import CANVAS, Example, Scene, Shapes, ShapesConfig, Thing
from sample import Answer, Pipeline, Request, generate, load
from vae import VQVAE

# --- The detector ---

PALETTE = np.array(list(shapes.COLOURS.values()), float) - shapes.BACKGROUND  # (colours, 3)
LENGTHS = np.linalg.norm(PALETTE, axis=1)
SPECK = 20  # pixels; the smallest object has 67
GRID, SPAN = 32, 1.1  # a patch: GRID x GRID samples of what lies within SPAN sqrt(area) of a centre
ALIKE = 0.75  # overlap below which a blob is none of the shapes; rendered ones have 0.87 and more


def dilate(mask: np.ndarray) -> np.ndarray:
    """(H, W) of booleans, and the four neighbours of every true pixel."""
    wide = np.pad(mask, 1)
    return mask | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def flood(seed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The connected parts of mask (H, W) that seed (H, W) touches."""
    reached, more = np.zeros_like(mask), seed & mask
    while more.sum() > reached.sum():
        reached, more = more, dilate(more) & mask
    return reached


def patch(coverage: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """Coverage (H, W) of one object -> samples (GRID^2,) free of place and size; x, y, area."""
    area = coverage.sum()
    rows, columns = np.indices(coverage.shape) + 0.5
    x, y = (coverage * columns).sum() / area, (coverage * rows).sum() / area
    half = SPAN * math.sqrt(area)
    step = 2 * half / GRID
    affine = Image.Transform.AFFINE, (step, 0, x - half, 0, step, y - half)
    image = Image.fromarray(coverage.astype(np.float32))
    samples = image.transform((GRID, GRID), *affine, Image.Resampling.BILINEAR)
    return np.asarray(samples).ravel(), float(x), float(y), float(area)


@functools.cache
def templates() -> tuple[np.ndarray, tuple[str, ...], tuple[float, ...]]:
    """Every shape, turned and sized: patches (n, GRID * GRID), names, and area at r = 1."""
    drawn = []
    for shape in shapes.SHAPES:
        for angle in np.linspace(-0.25, 0.25, 1 if shape == "circle" else 9):
            for r in (6, 8, 11):  # small ones are blurred by their pixels
                grey = shapes.render([Thing(shape, "", 32, 32, r, angle)]).convert("L")
                samples, _, _, area = patch(1 - np.asarray(grey) / np.max(grey))
                drawn.append((samples, shape, area / r**2))
    patches, names, areas = zip(*drawn, strict=True)
    return np.stack(patches), names, areas


def full_size(image: Image.Image) -> Image.Image:
    """A picture of the Shapes world in its own size, whatever a model's is."""
    return image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def detect(image: Image.Image) -> Scene:
    """Read a picture, brought to 64 x 64: shape, colour, x, y, r of every object in it.

    A pixel is a mixture of the background and a colour: the palette's direction nearest to its
    own says which colour, and how far it goes that way is the object's share of the pixel. White
    digits look like background and are filled. What is like none of the shapes is a "blob".
    """
    pixels = np.asarray(full_size(image), float) - shapes.BACKGROUND
    along = pixels @ (PALETTE / LENGTHS[:, None]).T  # (H, W, colours)
    colour = along.argmax(-1)
    coverage = (along.max(-1) / LENGTHS[colour]).clip(0, 1)
    border = np.pad(np.zeros((CANVAS - 2,) * 2, bool), 1, constant_values=True)
    todo, found = ~flood(border, coverage < 0.5), []  # what the outside does not reach
    while todo.any():
        first = np.arange(todo.size).reshape(todo.shape) == todo.argmax()
        blob = flood(first, todo)
        todo &= ~blob
        if blob.sum() >= SPECK:
            inside, around = ~dilate(~blob), dilate(blob)
            votes = np.bincount(colour[blob], coverage[blob], len(PALETTE))
            name = list(shapes.COLOURS)[votes.argmax()]
            found.append(recognise(np.where(inside, 1, coverage * around), name))
    return found


def recognise(coverage: np.ndarray, colour: str) -> Thing:
    """Coverage (H, W) of one blob -> the shape whose template overlaps it most."""
    samples, x, y, area = patch(coverage)
    patches, names, areas = templates()
    overlap = np.minimum(patches, samples).sum(1) / np.maximum(patches, samples).sum(1)
    best = overlap.argmax()
    shape = names[best] if overlap[best] >= ALIKE else "blob"
    return Thing(shape, colour, x, y, math.sqrt(area / areas[best]))


def reads(things: Scene, seen: Scene, within: float = 3.0) -> bool:
    """Whether `seen` is the whole scene and nothing else, each thing within so many pixels."""
    if len(things) != len(seen):
        return False
    left = list(seen)
    for t in things:
        nearest = min(left, key=lambda s: math.hypot(s.x - t.x, s.y - t.y))
        if nearest.name != t.name or math.hypot(nearest.x - t.x, nearest.y - t.y) > within:
            return False
        left.remove(nearest)
    return True


# --- What is right ---


def shows(example: Example, seen: Scene) -> bool:
    """Whether a picture with the things `seen` is what the example asks for.

    A caption's must hold its things and no others; colours count where the caption names them.
    After an edit every other thing must be what and where it was; an added one may stand anywhere.
    """
    if example.before:
        is_add = example.kind == "add"
        return bool(added(example, seen)) if is_add else reads(example.things, seen)
    colourless = example.kind in ("one object", "two objects")
    names = lambda things: sorted(t.shape if colourless else t.name for t in things)
    if names(example.things) != names(seen):
        return False
    return example.kind != "position" or stands_as_said(example.segments[0].content, seen)


def stands_as_said(caption: str, seen: Scene) -> bool:
    """Whether "a red circle left of a blue square" is true of these two things.

    The offset that way may be a little smaller than the other one: on the diagonal both are true.
    """
    word = next(word for word in shapes.RELATIONS if f" {word} " in caption)
    first = caption.split(f" {word} ")[0].split(" ", 1)[1]
    a, b = sorted(seen, key=lambda t: t.name != first)
    (x, y), (dx, dy) = shapes.RELATIONS[word], (a.x - b.x, a.y - b.y)
    return x * dx + y * dy > 0.8 * abs(y * dx + x * dy)


def added(example: Example, seen: Scene) -> Scene:
    """The thing that an "add" edit added, if it is there and all others are where they were."""
    for i, thing in enumerate(seen):
        others = seen[:i] + seen[i + 1 :]
        if thing.name == example.things[-1].name and reads(example.before, others):
            return [thing]
    return []


def kept(example: Example, image: Image.Image, seen: Scene) -> float:
    """PSNR in decibels of everything outside the edited thing; of everything where an added one is
    not found."""
    edited = [t for t in example.before if t not in example.things]
    rows, columns = np.indices((CANVAS, CANVAS)) + 0.5
    outside = np.ones((CANVAS, CANVAS), bool)
    for t in added(example, seen) if example.kind == "add" else edited:
        outside &= np.hypot(columns - t.x, rows - t.y) > t.reach + 2
    truth = np.asarray(shapes.render(example.before), float)
    error = np.asarray(full_size(image), float) - truth
    return -10 * math.log10(max(1e-6, np.square(error[outside] / 255).mean()))


def is_told(sentence: str, before: Scene, after: Scene) -> bool:
    """Whether a story's frame shows what its sentence says, and nothing else changed."""
    match = re.fullmatch(rf"The (\w+ \w+) moves ({'|'.join(shapes.MOVES)})\.", sentence.strip())
    if not match or match[1] not in [t.name for t in before]:
        return False
    dx, dy = (shapes.STRIDE * v for v in shapes.MOVES[match[2]])
    moved = [replace(t, x=t.x + dx, y=t.y + dy) if t.name == match[1] else t for t in before]
    return reads(moved, after, within=4.0)


# --- The autoencoder ---


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], twice -> decibels (B,)."""
    return -10 * (images - truth).square().mean((1, 2, 3)).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], twice -> (B,): Wang et al. 2004, an 11 x 11 Gaussian of sigma 1.5.

    The mean over channels and over the places where the window fits.
    """
    steps = torch.arange(11, device=images.device) - 5.0
    window = torch.exp(-steps.square() / (2 * 1.5**2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2  # (1, 1, 11, 11)
    x, y = images.flatten(0, 1)[:, None], truth.flatten(0, 1)[:, None]  # (B * 3, 1, H, W)
    mx, my, mxx, myy, mxy = (F.conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    contrast = (2 * (mxy - mx * my) + c2) / (mxx - mx * mx + myy - my * my + c2)
    return (luminance * contrast).view(*images.shape[:2], -1).mean((1, 2))


def legible(things: Scene, image: Image.Image) -> list[bool]:
    """For each digit of a scene whether, of the ten that could stand there, a picture of the scene
    shows the right one best."""
    pixels, right = np.asarray(full_size(image), float), []
    for thing in (t for t in things if t.digit is not None):
        x, y = int(thing.x), int(thing.y)
        box = slice(y - 5, y + 5), slice(x - 5, x + 5)  # no other thing reaches into it
        drawn = (shapes.render([replace(thing, digit=digit)]) for digit in range(10))
        errors = [np.square(np.asarray(d, float)[box] - pixels[box]).sum() for d in drawn]
        right.append(int(np.argmin(errors)) == thing.digit)
    return right


@torch.no_grad()
def autoencoder_report(vae: VQVAE, world: Shapes, seed: int, scenes: int) -> dict:
    """PSNR, SSIM, the share of scenes still readable and of digits still legible, after the codes
    and without them."""
    weight = next(vae.parameters())
    rows = {"quantised": {}, "continuous": {}}
    for first in tqdm(range(0, scenes, 50), "autoencoder", unit="batch"):
        numbers = range(first, min(first + 50, scenes))
        rngs = [random.Random(f"evaluate scene {seed} {i}") for i in numbers]
        drawn = [world.random_scene(rng) for rng in rngs]
        images = [to_tensor(shapes.render(things), vae.config.resolution) for things in drawn]
        images = torch.stack(images).to(weight.device)
        continuous = vae.encode(images.to(weight.dtype))
        quantised = vae.lookup(vae.quantize(continuous))
        for row, latents in zip(rows.values(), (quantised, continuous), strict=True):
            decoded = vae.decode(latents).float().clamp(-1, 1)
            pictures = list(zip(drawn, map(to_image, decoded), strict=True))
            both = (decoded + 1) / 2, (images + 1) / 2
            add = lambda name, values: row.setdefault(name, []).extend(values)
            add("psnr", psnr(*both).tolist())
            add("ssim", ssim(*both).tolist())
            add("readable", [reads(things, detect(picture)) for things, picture in pictures])
            add("digits", [v for things, picture in pictures for v in legible(things, picture)])
    mean = lambda values: float(np.mean(values or [math.nan]))  # a world may have no digits
    return {kind: {name: mean(row[name]) for name in row} for kind, row in rows.items()}


# --- The tasks ---

UNSEEN = "unseen combinations"  # a row of the table
BLACK = Image.new("RGB", (CANVAS, CANVAS))  # in place of a picture that is missing


@dataclass
class Verdict:
    """One answer: the pictures given and drawn, what was made of them, right or not."""

    row: str  # of the table
    images: list[Image.Image]
    label: str
    right: bool
    said: str = ""  # the answer to a question
    expected: str = ""
    kept: float | None = None  # PSNR of what an edit should not have touched


def held_out(config: ShapesConfig, name: str, seed: int, count: int) -> list[Example]:
    """Held-out examples of a task, its kinds in turn. After captions come as many again of a sixth
    of them that name a combination which training never shows."""
    world, stream = Shapes(0, config), TASKS[name].examples
    kinds = [kind for kind, weight in config.kinds(name).items() if weight] or [name]
    examples = []
    for i in range(count):
        rng = random.Random(f"evaluate {stream} {seed} {i}")
        examples.append(world.make(name, kinds[i % len(kinds)], rng))
    pairs = {(colour, shape) for colour in config.colours for shape in config.shapes}
    named = [kind for kind in shapes.CAPTIONS[2:] if kind in kinds]  # they name colours
    if name == "text_to_image" and named and pairs & shapes.UNSEEN:
        world = Shapes(0, config, allow_unseen=True)
        for i in range(math.ceil(count / 6)):
            rng = random.Random(f"evaluate unseen {seed} {i}")
            example = world.make(name, named[i % len(named)], rng)
            while not example.unseen:
                example = world.make(name, named[i % len(named)], rng)
            examples.append(example)
    return examples


def labelled(text: str, seen: Scene, right: bool) -> str:
    return text if right else f"{text}\nsaw " + (", ".join(t.name for t in seen) or "nothing")


def judge_picture(example: Example, answer: Answer) -> list[Verdict]:
    """A picture of a caption; an edited scene, told in words or by an example pair."""
    image = answer.images[0] if answer.images else BLACK
    seen = detect(image)
    right = bool(answer.images) and shows(example, seen)
    given = [s.content for s in example.segments[:-1]]
    text = given.pop() if isinstance(given[-1], str) else ""
    row, label = UNSEEN if example.unseen else example.kind, labelled(text, seen, right)
    elsewhere = kept(example, image, seen) if answer.images and example.before else None
    return [Verdict(row, [*given, image], label, right, kept=elsewhere)]


def judge_answer(example: Example, answer: Answer) -> list[Verdict]:
    """An answer in words: right if it is the expected one to the letter."""
    *images, question, expected = (s.content for s in example.segments)
    text = answer.text.strip()
    label = f"{question}\n" + (text if text == expected else f"not {expected}, but {text}")
    return [Verdict(example.kind, images, label, text == expected, text, expected)]


def judge_story(example: Example, answer: Answer) -> list[Verdict]:
    """A story's frames: whether each is true of its sentence, and whether the actors are still the
    same. A frame that is missing is neither; more are not looked at."""
    before, sentence, verdicts = example.before, "", []
    actors = sorted(t.name for t in before)
    for segment in [*answer.segments, *[Segment(BLACK)] * (shapes.FRAMES - 1)]:
        if not segment.is_image:
            sentence = segment.content
            continue
        seen = detect(segment.content)
        right, same = is_told(sentence, before, seen), sorted(t.name for t in seen) == actors
        images, label = [segment.content], labelled(sentence.strip(), seen, right)
        verdicts.append(Verdict("frame is as its sentence", images, label, right))
        verdicts.append(Verdict("actors stay the same", images, label, same))
        before, sentence = seen, ""
    return verdicts[: 2 * (shapes.FRAMES - 1)]


@dataclass(frozen=True)
class Task:
    """A table of the report. The names of random streams stay, so that figures of equal seeds can
    be compared."""

    title: str
    flag: str  # says how many examples
    judge: Callable[[Example, Answer], list[Verdict]]
    examples: str  # random stream of the examples
    noise: str  # and of the answers
    share: float = 1.0  # of the flag's number


TASKS = {
    "text_to_image": Task("text to image", "prompts", judge_picture, "caption", "captions"),
    "understanding": Task("understanding", "questions", judge_answer, "question", "questions"),
    "difference": Task("differences", "questions", judge_answer, "difference", "differences", 0.3),
    "editing": Task("editing", "edits", judge_picture, "edit", "editing"),
    "in_context": Task(
        "in-context editing", "in_context", judge_picture, "in context", "in_context"
    ),
    "story": Task("stories", "stories", judge_story, "story", "story"),
}


def run_task(pipeline: Pipeline, name: str, examples: list[Example], seed: int, **settings):
    """Answer the examples' prompts, each with noise of its own -> what the judge says of each."""
    task, requests = TASKS[name], []
    for i, example in enumerate(examples):
        rng = random.Random(f"{task.noise} {seed} {i}")
        requests.append(Request(example.prompt, rng.getrandbits(62) % 2**32))
    if task.judge is judge_answer:  # guidance is for images
        settings |= {"cfg_scale": 1, "cfg_image": 1}
    answers = generate(pipeline, requests, **settings)
    pairs = zip(examples, answers, strict=True)
    return [verdict for example, answer in pairs for verdict in task.judge(example, answer)]


# --- Tables and sheets ---


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson's score interval)."""
    z, n = 1.96, max(1, total)
    rate, width = right / n, z * z / n
    centre = (rate + width / 2) / (1 + width)
    half = math.sqrt(z * z * rate * (1 - rate) / n + width * width / 4) / (1 + width)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(rights: list[bool]) -> dict:
    right, total, interval = sum(rights), len(rights), wilson(sum(rights), len(rights))
    return {"right": right, "total": total, "rate": right / max(1, total), "interval": interval}


def tally(verdicts: list[Verdict]) -> dict[str, dict]:
    """Rows of a table: right, total, rate, interval by row; "all" leaves UNSEEN out, and reading
    digits, which asks for detail rather than understanding, is left out of a row of its own."""
    rows = {}
    for v in verdicts:
        rows.setdefault(v.row, []).append(v.right)
    unseen, kinds = rows.pop(UNSEEN, []), list(rows)
    all_of = lambda names: [right for name in names for right in rows[name]]
    if "digit" in kinds:
        rows["all but digit"] = all_of(kind for kind in kinds if kind != "digit")
    rows["all"] = all_of(kinds)
    if unseen:
        rows[UNSEEN] = unseen
    return {name: rate(row) for name, row in rows.items()}


def pope(verdicts: list[Verdict]) -> dict[str, dict]:
    """The measures of POPE (Li et al. 2305.10355) over the yes/no questions."""
    asked = [v for v in verdicts if v.expected in ("yes", "no")]
    return {
        "accuracy": rate([v.right for v in asked]),
        "precision": rate([v.expected == "yes" for v in asked if v.said == "yes"]),
        "recall": rate([v.said == "yes" for v in asked if v.expected == "yes"]),
        "yes-rate": rate([v.said == "yes" for v in asked]),
    }


def tables(results: dict) -> dict[str, dict]:
    titles = [*(task.title for task in TASKS.values()), "pope"]
    return {title: rows for title, rows in results.items() if title in titles}


def show(results: dict) -> str:
    """The results as text."""
    lines = [f"{'autoencoder':24}{'PSNR dB':>8}{'SSIM':>8}{'readable':>10}{'digits':>10}"]
    for kind, row in results["autoencoder"].items():
        rates = f"{row['readable']:10.1%}{row['digits']:10.1%}"
        lines.append(f"  {kind:22}{row['psnr']:8.2f}{row['ssim']:8.3f}{rates}")
    for task, rows in tables(results).items():
        lines += ["", f"{task:24}{'right':>8}{'total':>8}{'rate':>10}   95% interval"]
        for name, row in rows.items():
            if name == "psnr elsewhere":
                lines.append(f"  {name:22}{row:23.2f} dB")
            else:
                counts = f"{row['right']:8}{row['total']:8}{row['rate']:10.1%}"
                low, high = row["interval"]
                lines.append(f"  {name:22}{counts}   {low:.1%} to {high:.1%}")
    return "\n".join(lines)


def over_seeds(runs: list[dict]) -> str:
    """The mean and range of every rate over several seeds."""
    title = "over seeds " + ", ".join(str(run["seed"]) for run in runs)
    lines = [f"{title:34}{'mean':>8}{'range':>20}"]
    for task, rows in tables(runs[0]).items():
        for name in (n for n, row in rows.items() if isinstance(row, dict)):
            rates = [run[task][name]["rate"] for run in runs]
            span = f"{min(rates):.1%} to {max(rates):.1%}"
            lines.append(f"  {task + ', ' + name:32}{sum(rates) / len(rates):8.1%}{span:>20}")
    return "\n".join(lines)


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


def contact_sheet(verdicts: list[Verdict]) -> Image.Image:
    """The first pictures, enlarged, each with its label: green if right, red if wrong."""
    each, rows = 12 // len(verdicts[0].images), []
    for first in range(0, min(len(verdicts), 8 * each), each):
        row = []
        for v in verdicts[first : first + each]:
            ink = (20, 120, 50) if v.right else (200, 30, 30)
            row.append((v.images[0], v.label, ink))
            row += [(image, "", ink) for image in v.images[1:]]
        rows.append(row)
    return sheet(rows, (3 * CANVAS, 3 * CANVAS))


# --- The whole, and its command line ---

COUNTS = {"prompts": 500, "questions": 500, "edits": 300, "in_context": 300, "stories": 100}
SETTINGS = "steps", "cfg_scale", "cfg_image", "noise_scale"


def world_of(source: checkpoint.Checkpoint) -> ShapesConfig:
    """The Shapes world that a checkpoint was trained on: its config's "data" is a spec and args, of
    several sources perhaps, or in older ones the world's fields. Raises ValueError without one."""
    said = source.section("data") if "data" in source.config else {}
    if "spec" not in said:
        return checkpoint.build(ShapesConfig, said, f"{source}, section 'data'")
    spec, args = said["spec"], said.get("args") or {}
    for name in mixture.parse(spec)[0]:
        if name.startswith("lab.shapes:"):
            own = args.get(name, {}) if re.search("[,=]", spec) else args
            return open_source(name, own, 0, None)[0].config
    raise ValueError(f"{source} was trained on {spec}; want a checkpoint of a Shapes world")


def evaluate(
    directory, seed=1000, counts=COUNTS, samples=None, device="cpu", scenes=500, **settings
):
    """Everything that is reported, as JSON has it: of the tasks and kinds that the checkpoint's
    world has, and of the autoencoder on so many held-out scenes."""
    source = checkpoint.open_checkpoint(directory)
    world = world_of(source)
    world = replace(world, digits=min(world.digits, 0.5))
    vae = VQVAE.from_pretrained(source, device, torch.float32)
    results = {"checkpoint": str(directory), "seed": seed} | settings
    results["autoencoder"] = autoencoder_report(vae, Shapes(0, world), seed, scenes)
    if any(counts.values()):
        pipeline = load(source, device)
        results["defaults"] = {k: v for k, v in vars(pipeline.defaults).items() if k != "words"}
    for name, task in TASKS.items():
        count = math.ceil(task.share * counts[task.flag])
        if not (count and world.tasks.get(name)):
            continue
        examples = held_out(world, name, seed, count)
        verdicts = run_task(pipeline, name, examples, seed, **settings)
        rows = results[task.title] = tally(verdicts)
        if "exists" in rows:
            results["pope"] = pope(verdicts)
        if name == "story":  # its rows are two views of the same frames
            del rows["all"]
        measured = [v.kept for v in verdicts if v.kept is not None]
        if measured:
            rows["psnr elsewhere"] = float(np.mean(measured))
        if samples:
            shown = verdicts[::2] if name == "story" else verdicts  # each frame once
            contact_sheet(shown).save(samples / (task.title.replace(" ", "_") + ".png"))
    return results


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description, raw = __doc__.split("Reading order")[0], argparse.RawDescriptionHelpFormatter
    parser = checkpoint.Parser(description=description, formatter_class=raw)
    add, number = parser.add_argument, checkpoint.number
    add("checkpoint", nargs="?", default="checkpoints/tiny", help="default: checkpoints/tiny")
    more = "of examples and sampling; several: a mean and a range (default: 1000)"
    add("--seed", type=number(int, 0, 2**31), action="append", metavar="N", help=more)
    more = {"prompts": "; a sixth more name what training never shows"}
    more["questions"] = "; 0.3 times as many ask what changed"
    for name, count in COUNTS.items():
        help = f"held-out examples, 0: none (default: {count}){more.get(name, '')}"
        whole = {"type": number(int, 0, 10**5), "metavar": "N", "default": count}
        add("--" + name.replace("_", "-"), help=help, **whole)
    whole = {"type": number(int, 1, 4096), "metavar": "N", "default": 64}
    add("--batch-size", help="requests answered at a time (default: 64)", **whole)
    checkpoint.add_flags(parser, Generation, SETTINGS)
    add("--json", type=Path, metavar="FILE", help="write the numbers here too")
    add("--samples", type=Path, metavar="DIR", help="sheets of pictures, right ones labelled green")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    whole = {"type": number(int, 0, 1024), "metavar": "N", "default": 0}
    add("--threads", help="CPU threads; 0 is one a core (default)", **whole)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json} is not a file in a folder that exists")
    if args.samples:
        args.samples.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    counts = {name: getattr(args, name) for name in COUNTS}
    device = checkpoint.pick_device(args.device)
    settings = {name: getattr(args, name) for name in ("batch_size", *SETTINGS)}
    settings = {name: value for name, value in settings.items() if value is not None}
    runs = []
    for seed in args.seed or [1000]:
        runs.append(evaluate(args.checkpoint, seed, counts, args.samples, device, **settings))
        print(show(runs[-1]))
    if len(runs) > 1:
        print("\n" + over_seeds(runs))
    if args.json:
        checkpoint.write_json(args.json, runs[0] if len(runs) == 1 else {"seeds": runs})


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoint.command_line(lambda: run(args), "interrupted; nothing was reported")


if __name__ == "__main__":
    main()
