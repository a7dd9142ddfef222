"""Evaluation: how good a model of a Shapes world is.

    python evaluate.py shapes       every task of its world on held-out examples, by kind, and the
                                    autoencoder, which bounds all
    python evaluate.py speed        fast paths beside their slow references, see benchmarks.py
    python evaluate.py bench        public benchmarks, see benchmarks.py

Pictures are judged as GenEval does it: a detector reads the picture, and what it found is compared
with what was asked. The detector knows nothing of what was drawn, it only looks at pixels.
Reading order: detector, judges, autoencoder, the tasks, report, command line.
"""

import argparse
import functools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import checkpoint  # first: it answers Ctrl-C while PyTorch is imported

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import benchmarks
import shapes
from data import Segment, sheet, to_image, to_tensor
from sample import Answer, Options, Pipeline, Request, generate, load
from shapes import Example, Shapes, ShapesConfig, Thing
from vae import VQVAE

# --- The detector --------------------------------------------------------------------------------

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
    reached = seed & mask
    while (more := dilate(reached) & mask).sum() > reached.sum():
        reached = more
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
    return image.resize((shapes.CANVAS, shapes.CANVAS), Image.Resampling.BICUBIC)


def detect(image: Image.Image) -> list[Thing]:
    """Read a picture, brought to 64 x 64: shape, colour, x, y, r of every object in it.

    A pixel is a mixture of the background and a colour: the palette's direction nearest to its
    own says which colour, and how far it goes that way is the object's share of the pixel. White
    digits look like background and are filled. What is like none of the shapes is a "blob".
    """
    pixels = np.asarray(full_size(image), float) - shapes.BACKGROUND
    along = pixels @ (PALETTE / LENGTHS[:, None]).T  # (H, W, colours)
    colour = along.argmax(-1)
    coverage = (along.max(-1) / LENGTHS[colour]).clip(0, 1)
    border = np.pad(np.zeros((shapes.CANVAS - 2,) * 2, bool), 1, constant_values=True)
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


def reads(things: list[Thing], seen: list[Thing], within: float = 3.0) -> bool:
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


# --- The judges ----------------------------------------------------------------------------------


def judge(example: Example, seen: list[Thing]) -> bool:
    """Whether a picture with the things `seen` is what the example asks for.

    A caption's must hold its things and no others; colours count where the caption names them.
    After an edit every other thing must be what and where it was; an added one may stand anywhere.
    """
    if example.before:
        is_add = example.kind == "add"
        return bool(added(example, seen)) if is_add else reads(example.things, seen)
    colourless = example.kind in ("one object", "two objects")
    names = [sorted(t.shape if colourless else t.name for t in ts) for ts in (example.things, seen)]
    if names[0] != names[1]:
        return False
    return example.kind != "position" or stands_as_said(example.segments[0].content, seen)


def stands_as_said(caption: str, seen: list[Thing]) -> bool:
    """Whether "a red circle left of a blue square" is true of these two things.

    The offset that way may be a little smaller than the other one: on the diagonal both are true.
    """
    word = next(word for word in shapes.RELATIONS if f" {word} " in caption)
    first = caption.split(f" {word} ")[0].split(" ", 1)[1]
    a, b = sorted(seen, key=lambda t: t.name != first)
    (x, y), (dx, dy) = shapes.RELATIONS[word], (a.x - b.x, a.y - b.y)
    return x * dx + y * dy > 0.8 * abs(y * dx + x * dy)


def added(example: Example, seen: list[Thing]) -> list[Thing]:
    """The thing that an "add" edit added, if it is there and all others are where they were."""
    name, before = example.things[-1].name, example.before
    rests = ((thing, seen[:i] + seen[i + 1 :]) for i, thing in enumerate(seen))
    return [thing for thing, rest in rests if thing.name == name and reads(before, rest)][:1]


def kept(example: Example, image: Image.Image, seen: list[Thing]) -> float:
    """PSNR in decibels of everything outside the edited thing; of everything where an added one is
    not found."""
    gone = [t for t in example.before if t not in example.things]
    rows, columns = np.indices((shapes.CANVAS, shapes.CANVAS)) + 0.5
    outside = np.ones((shapes.CANVAS, shapes.CANVAS), bool)
    for t in added(example, seen) if example.kind == "add" else gone:
        outside &= np.hypot(columns - t.x, rows - t.y) > t.reach + 2
    truth = np.asarray(shapes.render(example.before), float)
    error = np.asarray(full_size(image), float) - truth
    return -10 * math.log10(max(1e-6, np.square(error[outside] / 255).mean()))


def judge_frame(sentence: str, before: list[Thing], after: list[Thing]) -> bool:
    """Whether a story's frame shows what its sentence says, and nothing else changed."""
    match = re.fullmatch(rf"The (\w+ \w+) moves ({'|'.join(shapes.MOVES)})\.", sentence.strip())
    if not match or match[1] not in [t.name for t in before]:
        return False
    dx, dy = (shapes.STRIDE * v for v in shapes.MOVES[match[2]])
    moved = [replace(t, x=t.x + dx, y=t.y + dy) if t.name == match[1] else t for t in before]
    return reads(moved, after, within=4.0)


# --- The autoencoder -----------------------------------------------------------------------------


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


def legible(things: list[Thing], image: Image.Image) -> list[bool]:
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
    names = "psnr", "ssim", "readable", "digits"
    rows = {kind: {name: [] for name in names} for kind in ("quantised", "continuous")}
    for first in tqdm(range(0, scenes, 50), "autoencoder", unit="batch"):
        rngs = [random.Random(f"evaluate scene {seed} {first + i}") for i in range(50)]
        drawn = [world.random_scene(rng) for rng in rngs[: scenes - first]]
        images = [to_tensor(shapes.render(things), vae.config.resolution) for things in drawn]
        images = torch.stack(images).to(weight.device)
        latents = vae.encode(images.to(weight.dtype))
        for kind, z in ("quantised", vae.lookup(vae.quantize(latents))), ("continuous", latents):
            decoded, row = vae.decode(z).float().clamp(-1, 1), rows[kind]
            row["psnr"] += psnr((decoded + 1) / 2, (images + 1) / 2).tolist()
            row["ssim"] += ssim((decoded + 1) / 2, (images + 1) / 2).tolist()
            for things, picture in zip(drawn, map(to_image, decoded), strict=True):
                row["readable"].append(reads(things, detect(picture)))
                row["digits"] += legible(things, picture)
    return {kind: {name: float(np.mean(values or [math.nan])) for name, values in row.items()}
            for kind, row in rows.items()}


# --- The tasks -----------------------------------------------------------------------------------

UNSEEN = "unseen combinations"  # a row of the table
BLACK = Image.new("RGB", (shapes.CANVAS, shapes.CANVAS))  # in place of a picture that is missing


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


def held_out(config: ShapesConfig, task: str, seed: int, count: int, name: str) -> list[Example]:
    """Held-out examples of a task, its kinds in turn. After captions come as many again of a sixth
    of them that name a combination which training never shows."""
    kinds = [kind for kind, weight in config.kinds(task).items() if weight] or [task]
    make = getattr(Shapes(0, config), task)
    rngs = [random.Random(f"evaluate {name} {seed} {i}") for i in range(count)]
    examples = [make(rng, kinds[i % len(kinds)]) for i, rng in enumerate(rngs)]
    pairs = {(colour, shape) for colour in config.colours for shape in config.shapes}
    named = [kind for kind in list(shapes.CAPTIONS)[2:] if kind in kinds]  # they name colours
    if task == "text_to_image" and named and pairs & shapes.UNSEEN:
        make = Shapes(0, config, allow_unseen=True).text_to_image
        for i in range(math.ceil(count / 6)):
            rng = random.Random(f"evaluate unseen {seed} {i}")
            while not (example := make(rng, named[i % len(named)])).unseen:
                pass
            examples.append(example)
    return examples


def labelled(text: str, seen: list[Thing], right: bool) -> str:
    return text if right else f"{text}\nsaw " + (", ".join(t.name for t in seen) or "nothing")


def drawn(example: Example, answer: Answer) -> list[Verdict]:
    """A picture of a caption; an edited scene, told in words or by an example pair."""
    image = answer.images[0] if answer.images else BLACK
    seen = detect(image)
    right = bool(answer.images) and judge(example, seen)
    given = [s.content for s in example.segments[:-1]]
    text = given.pop() if isinstance(given[-1], str) else ""
    row, label = UNSEEN if example.unseen else example.kind, labelled(text, seen, right)
    elsewhere = kept(example, image, seen) if answer.images and example.before else None
    return [Verdict(row, [*given, image], label, right, kept=elsewhere)]


def said(example: Example, answer: Answer) -> list[Verdict]:
    """An answer in words: right if it is the expected one to the letter."""
    *images, question, expected = (s.content for s in example.segments)
    text = answer.text.strip()
    label = f"{question}\n" + (text if text == expected else f"not {expected}, but {text}")
    return [Verdict(example.kind, images, label, text == expected, text, expected)]


def told(example: Example, answer: Answer) -> list[Verdict]:
    """A story's frames: whether each is true of its sentence, and whether the actors are still the
    same. A frame that is missing is neither; more are not looked at."""
    before, sentence, verdicts = example.before, "", []
    actors = sorted(t.name for t in before)
    for segment in [*answer.segments, *[Segment(BLACK)] * (shapes.FRAMES - 1)]:
        if not segment.is_image:
            sentence = segment.content
            continue
        seen = detect(segment.content)
        right, same = judge_frame(sentence, before, seen), sorted(t.name for t in seen) == actors
        images, label = [segment.content], labelled(sentence.strip(), seen, right)
        verdicts.append(Verdict("frame is as its sentence", images, label, right))
        verdicts.append(Verdict("actors stay the same", images, label, same))
        before, sentence = seen, ""
    return verdicts[: 2 * (shapes.FRAMES - 1)]


@dataclass(frozen=True)
class Task:
    """A table of the report: how its examples are made, and who judges the answers."""

    method: str  # of Shapes
    stream: str  # names the examples' random stream
    noise: str  # and that of the answers
    count: str  # in COUNTS
    verdicts: Callable[[Example, Answer], list[Verdict]]
    share: float = 1.0  # of that count


TASKS = {
    "text to image": Task("text_to_image", "caption", "captions", "prompts", drawn),
    "understanding": Task("understanding", "question", "questions", "questions", said),
    "differences": Task("difference", "difference", "differences", "questions", said, 0.3),
    "editing": Task("editing", "edit", "editing", "edits", drawn),
    "in-context editing": Task("in_context", "in context", "in_context", "in_context", drawn),
    "stories": Task("story", "story", "story", "stories", told),
}


def run_task(pipeline: Pipeline, examples: list[Example], task: Task, seed: int,
             **options) -> list[Verdict]:
    """Answer the examples' prompts, each with noise of its own, and judge the answers."""
    seeds = [random.Random(f"{task.noise} {seed} {i}") for i in range(len(examples))]
    noise = [s.getrandbits(62) % 2**32 for s in seeds]
    requests = [Request(e.prompt, s) for e, s in zip(examples, noise, strict=True)]
    if task.verdicts is said:  # guidance is for images
        options |= {"cfg_scale": 1, "cfg_image": 1}
    answers = generate(pipeline, requests, **options)
    return [v for pair in zip(examples, answers, strict=True) for v in task.verdicts(*pair)]


# --- Report --------------------------------------------------------------------------------------


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
    names = list(dict.fromkeys(v.row for v in verdicts if v.row != UNSEEN))
    rows = {name: [v.right for v in verdicts if v.row == name] for name in [*names, UNSEEN]}
    unseen = rows.pop(UNSEEN)
    if "digit" in rows:
        rows["all but digit"] = [v.right for v in verdicts if v.row not in ("digit", UNSEEN)]
    rows["all"] = [v.right for v in verdicts if v.row != UNSEEN]
    rows |= {UNSEEN: unseen} if unseen else {}
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
    return {name: rows for name, rows in results.items() if name in TASKS or name == "pope"}


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


def contact_sheet(verdicts: list[Verdict]) -> Image.Image:
    """The first pictures, enlarged, each with its label: green if right, red if wrong."""
    inks, each = {True: (20, 120, 50), False: (200, 30, 30)}, 12 // len(verdicts[0].images)
    rows = [verdicts[i : i + each] for i in range(0, min(len(verdicts), 8 * each), each)]
    cells = [[(image, "" if i else v.label, inks[v.right])
              for v in row for i, image in enumerate(v.images)] for row in rows]  # fmt: skip
    return sheet(cells, (3 * shapes.CANVAS, 3 * shapes.CANVAS))


COUNTS = {"prompts": 500, "questions": 500, "edits": 300, "in_context": 300, "stories": 100}


def evaluate_shapes(directory: str | Path, seed: int = 1000, counts: dict[str, int] = COUNTS,
                    samples: Path | None = None, device="cpu", scenes: int = 500, **options):
    """Everything that `evaluate.py shapes` reports, as JSON has it: of the tasks and kinds that the
    checkpoint's world has. scenes: held-out ones for the autoencoder."""
    source = checkpoint.open_checkpoint(directory)
    fields = source.config.get("data", {})
    config = checkpoint.build(ShapesConfig, fields, f"{source}, section 'data'")
    config = replace(config, digits=min(config.digits, 0.5))
    vae = VQVAE.from_pretrained(source, device, torch.float32)
    results = {"checkpoint": str(directory), "seed": seed} | options
    results["autoencoder"] = autoencoder_report(vae, Shapes(0, config), seed, scenes)
    if any(counts.values()):
        pipeline = load(source, device)
        results["defaults"] = {k: v for k, v in vars(pipeline.defaults).items() if k != "words"}
    for title, task in TASKS.items():
        count = math.ceil(task.share * counts[task.count])
        if not (count and config.tasks.get(task.method)):
            continue
        examples = held_out(config, task.method, seed, count, task.stream)
        verdicts = run_task(pipeline, examples, task, seed, **options)
        results[title] = tally(verdicts)
        if any(v.row == "exists" for v in verdicts):
            results["pope"] = pope(verdicts)
        if title == "stories":  # its rows are two views of the same frames
            del results[title]["all"]
        if measured := [v.kept for v in verdicts if v.kept is not None]:
            results[title]["psnr elsewhere"] = float(np.mean(measured))
        if samples:
            shown = verdicts[::2] if title == "stories" else verdicts  # each frame once
            contact_sheet(shown).save(samples / (title.replace(" ", "_") + ".png"))
    return results


def report(directory: str | Path, folder: Path, count: int = 300) -> str:
    """The table of a model just trained; evaluation.json and sheets of pictures into a folder."""
    counts = dict.fromkeys(COUNTS, count)
    results = evaluate_shapes(directory, counts=counts, samples=folder, scenes=200)
    checkpoint.write_json(folder / "evaluation.json", results)
    return show(results)


# --- Command line --------------------------------------------------------------------------------


def run_shapes(args: argparse.Namespace) -> None:
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json} is not a file in a folder that exists")
    if args.samples:
        args.samples.mkdir(parents=True, exist_ok=True)
    counts = {name: getattr(args, name) for name in COUNTS}
    device = checkpoint.pick_device(args.device)
    names = "batch_size", "steps", "cfg_scale", "cfg_image"
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    runs = []
    for seed in args.seed or [1000]:
        runs.append(evaluate_shapes(args.checkpoint, seed, counts, args.samples, device, **options))
        print(show(runs[-1]))
    if len(runs) > 1:
        print("\n" + over_seeds(runs))
    if args.json:
        checkpoint.write_json(args.json, runs[0] if len(runs) == 1 else {"seeds": runs})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw, number = argparse.RawDescriptionHelpFormatter, checkpoint.number
    parser = checkpoint.Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=checkpoint.Parser)
    quality = commands.add_parser("shapes", help="quality of a model of a Shapes world",
        description="Beside the captions of --prompts come a sixth as many of combinations that "
        "training never shows, beside --questions 0.3 times as many about two pictures.")
    clock = commands.add_parser("speed", help="fast paths beside their slow references, as ratios")
    tiny = str(Path(__file__).parent / "checkpoints" / "tiny")
    for command in (quality, clock, benchmarks.add_parser(commands)):
        command.add_argument("--checkpoint", default=tiny, metavar="DIR", help="default: tiny")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, ...; default: auto")
    clock.add_argument("--rounds", type=number(int, 1, 1000), default=5, metavar="N",
        help="runs of each, taken in turns; the fastest counts (default: 5)")
    add = quality.add_argument
    add("--seed", type=number(int, 0, 2**31), action="append", metavar="N", help="of the held-out "
        "examples and of sampling; repeat it for a mean and a range (default: 1000)")
    for name, count in COUNTS.items():
        add("--" + name.replace("_", "-"), type=number(int, 0, 10**5), default=count, metavar="N",
            help=f"held-out examples to answer; 0 leaves them out (default: {count})")
    add("--batch-size", type=number(int, 1, 4096), default=64, metavar="N",
        help="requests answered at a time (default: 64)")
    checkpoint.add_flags(quality, Options, ("steps", "cfg_scale", "cfg_image"))
    add("--json", type=Path, metavar="FILE", help="write the numbers here too")
    add("--samples", type=Path, metavar="DIR", help="save sheets of pictures, labelled with what "
        "was asked, green if right, red if wrong")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    actions = {"shapes": run_shapes, "speed": benchmarks.speed, "bench": benchmarks.run}
    run = functools.partial(actions[args.command], args)
    checkpoint.command_line("evaluate.py", run, "interrupted; nothing was reported")


if __name__ == "__main__":
    main()
