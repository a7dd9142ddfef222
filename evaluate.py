"""Evaluation: how good a model of the Shapes world is.

    python evaluate.py shapes       every task on held-out examples: text-to-image by GenEval's six
                                    categories, understanding by kind of question, differences,
                                    editing, in-context editing, stories, and the autoencoder that
                                    bounds all
    python evaluate.py speed        every fast path beside its slow reference, as ratios

Pictures are judged as GenEval does it: a detector reads the picture, and what it found is compared
with what was asked. The detector knows nothing of what was drawn, it only looks at pixels.
Reading order: detector, judges, autoencoder, the tasks, report, speed, command line.
"""

import argparse
import functools
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
from data import Example, Thing
from orthus import DiffusionHead, KVCache
from sample import Answer, Parser, Pipeline, Request, generate, load, number, pick_device, sheet
from vae import VQVAE

# --- The detector --------------------------------------------------------------------------------

PALETTE = np.array(list(data.COLOURS.values()), float) - data.BACKGROUND  # (colours, 3)
LENGTHS = np.linalg.norm(PALETTE, axis=1)
SPECK = 20  # pixels; the smallest object has 67
GRID, SPAN = 32, 1.1  # a patch: GRID x GRID samples of what lies within SPAN sqrt(area) of a centre
ALIKE = 0.75  # overlap below which a blob is none of the shapes; rendered ones have 0.87 and more


def dilate(mask: np.ndarray) -> np.ndarray:
    """(H, W) of booleans, and the four neighbours of every true pixel."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


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
    samples = Image.fromarray(coverage.astype(np.float32)).transform(
        (GRID, GRID),
        Image.Transform.AFFINE,
        (step, 0, x - half, 0, step, y - half),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(samples).ravel(), float(x), float(y), float(area)


@functools.cache
def templates() -> tuple[np.ndarray, list[str], list[float]]:
    """Every shape, turned and sized: patches (n, GRID * GRID), names, and area at r = 1."""
    patches, names, areas = [], [], []
    for shape in data.SHAPES:
        for angle in np.linspace(-0.25, 0.25, 1 if shape == "circle" else 9):
            for r in (6, 8, 11):  # small ones are blurred by their pixels
                drawn = data.render([Thing(shape, "", 32, 32, r, angle)]).convert("L")
                samples, _, _, area = patch(1 - np.asarray(drawn) / np.max(drawn))
                patches.append(samples)
                names.append(shape)
                areas.append(area / r**2)
    return np.stack(patches), names, areas


def detect(image: Image.Image | np.ndarray) -> list[Thing]:
    """Read a picture (64, 64, 3) of 8-bit RGB: shape, colour, x, y, r of every object in it.

    A pixel is a mixture of the background and a colour: the palette's direction nearest to its
    own says which colour, and how far it goes that way is the object's share of the pixel. White
    digits look like background and are filled. What is like none of the shapes is a "blob".
    """
    pixels = np.asarray(image, float) - data.BACKGROUND
    along = pixels @ (PALETTE / LENGTHS[:, None]).T  # (H, W, colours)
    colour = along.argmax(-1)
    coverage = (along.max(-1) / LENGTHS[colour]).clip(0, 1)
    border = np.pad(np.zeros((data.CANVAS - 2,) * 2, bool), 1, constant_values=True)
    todo = ~flood(border, coverage < 0.5)  # what the outside does not reach
    found = []
    while todo.any():
        first = np.zeros_like(todo)
        first.flat[todo.argmax()] = True
        blob = flood(first, todo)
        todo &= ~blob
        if blob.sum() >= SPECK:
            inside, around = ~dilate(~blob), dilate(blob)
            votes = np.bincount(colour[blob], coverage[blob], len(PALETTE))
            name = list(data.COLOURS)[votes.argmax()]
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
    """Whether a picture with the things `seen` is what the example's caption asks for.

    The picture must hold the caption's things and no others. Colours count where the caption
    names them.
    """
    colourless = example.kind in ("one object", "two objects")
    names = [sorted(t.shape if colourless else t.name for t in ts) for ts in (example.things, seen)]
    if names[0] != names[1]:
        return False
    return example.kind != "position" or stands_as_said(example.segments[0].content, seen)


def stands_as_said(caption: str, seen: list[Thing]) -> bool:
    """Whether "a red circle left of a blue square" is true of these two things.

    The offset that way may be a little smaller than the other one: on the diagonal both are true.
    """
    word = next(word for word in data.RELATIONS if f" {word} " in caption)
    first = caption.split(f" {word} ")[0].split(" ", 1)[1]
    a, b = sorted(seen, key=lambda t: t.name != first)
    (x, y), (dx, dy) = data.RELATIONS[word], (a.x - b.x, a.y - b.y)
    return x * dx + y * dy > 0.8 * abs(y * dx + x * dy)


def new_thing(example: Example, seen: list[Thing]) -> Thing | None:
    """The thing that an "add" edit added: it may stand anywhere, all others where they were."""
    for i, thing in enumerate(seen):
        rest = seen[:i] + seen[i + 1 :]
        if thing.name == example.things[-1].name and reads(example.before, rest):
            return thing
    return None


def judge_edit(example: Example, seen: list[Thing]) -> bool:
    """Whether exactly the asked edit happened: every other thing is what and where it was."""
    if example.kind == "add":
        return new_thing(example, seen) is not None
    return reads(example.things, seen)


def kept(example: Example, image: Image.Image, seen: list[Thing]) -> float:
    """PSNR in decibels of everything outside the edited thing; of everything where an added one is
    not found."""
    if example.kind == "add":
        edited = new_thing(example, seen)
        edited = [edited] if edited else []
    else:
        edited = [t for t in example.before if t not in example.things]
    rows, columns = np.indices((data.CANVAS, data.CANVAS)) + 0.5
    outside = np.ones((data.CANVAS, data.CANVAS), bool)
    for t in edited:
        outside &= np.hypot(columns - t.x, rows - t.y) > t.reach + 2
    error = np.asarray(image, float) - np.asarray(data.render(example.before), float)
    return -10 * math.log10(max(1e-6, np.square(error[outside] / 255).mean()))


def judge_frame(sentence: str, before: list[Thing], after: list[Thing]) -> bool:
    """Whether a story's frame shows what its sentence says, and nothing else changed."""
    if sorted(t.name for t in before) != sorted(t.name for t in after):
        return False
    match = re.fullmatch(r"The (\w+ \w+) moves (\w+)\.", sentence.strip())
    if not match or match[2] not in data.MOVES:
        return False
    dx, dy = (data.STRIDE * v for v in data.MOVES[match[2]])
    if match[1] not in [t.name for t in before]:
        return False
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
    (64, 64) shows the right one best."""
    pixels, right = np.asarray(image, float), []
    for i, thing in enumerate(things):
        if thing.digit is None:
            continue
        x, y = int(thing.x), int(thing.y)
        box = slice(y - 5, y + 5), slice(x - 5, x + 5)
        errors = []
        for digit in range(10):
            scene = [*things[:i], replace(thing, digit=digit), *things[i + 1 :]]
            drawn = np.asarray(data.render(scene), float)
            errors.append(np.square(drawn[box] - pixels[box]).sum())
        right.append(int(np.argmin(errors)) == thing.digit)
    return right


@torch.no_grad()
def autoencoder_report(vae: VQVAE, seed: int, scenes: int) -> dict[str, dict[str, float]]:
    """PSNR, SSIM, the share of scenes still readable and of digits still legible, after the codes
    and without them."""
    device = next(vae.parameters()).device
    rows = {kind: {name: [] for name in AUTOENCODER} for kind in ("quantised", "continuous")}
    for first in tqdm(range(0, scenes, 50), "autoencoder", unit="batch"):
        batch = range(first, min(first + 50, scenes))
        worlds = [data.random_scene(random.Random(f"evaluate scene {seed} {i}")) for i in batch]
        images = [data.to_tensor(data.render(things), data.CANVAS) for things in worlds]
        images = torch.stack(images).to(device)
        latents = vae.encode(images.to(next(vae.parameters()).dtype))
        for kind, z in ("quantised", vae.lookup(vae.quantize(latents))), ("continuous", latents):
            decoded = vae.decode(z).float().clamp(-1, 1)
            rows[kind]["psnr"] += psnr((decoded + 1) / 2, (images + 1) / 2).tolist()
            rows[kind]["ssim"] += ssim((decoded + 1) / 2, (images + 1) / 2).tolist()
            for things, tensor in zip(worlds, decoded, strict=True):
                picture = data.to_image(tensor)
                rows[kind]["readable"].append(reads(things, detect(picture)))
                rows[kind]["digits"] += legible(things, picture)
    return {
        kind: {name: float(np.mean(values or [math.nan])) for name, values in row.items()}
        for kind, row in rows.items()
    }


AUTOENCODER = ("psnr", "ssim", "readable", "digits")


# --- The tasks -----------------------------------------------------------------------------------

UNSEEN = "unseen combinations"  # a row of the table


@dataclass
class Verdict:
    """One answer: the picture drawn or asked about, what was made of it, right or not."""

    row: str  # of the table
    image: Image.Image
    label: str
    right: bool
    said: str = ""  # the answer to a question
    expected: str = ""
    kept: float | None = None  # PSNR of what an edit should not have touched


def caption_examples(seed: int, count: int) -> list[tuple[str, Example]]:
    """(row of the table, example): the six kinds in turn, then as many again of a sixth of them
    whose caption names a combination that training never shows."""
    kinds = list(data.GENEVAL)
    examples = []
    for i in range(count):
        rng, kind = random.Random(f"evaluate caption {seed} {i}"), kinds[i % len(kinds)]
        examples.append((kind, data.text_to_image(rng, kind)))
    for i in range(math.ceil(count / len(kinds))):
        rng, kind = random.Random(f"evaluate unseen {seed} {i}"), kinds[2 + i % 4]
        while not (example := data.text_to_image(rng, kind, allow_unseen=True)).unseen:
            pass
        examples.append((UNSEEN, example))
    return examples


def draw(pipeline: Pipeline, seed: int, count: int, **options) -> list[Verdict]:
    """Draw held-out captions and judge the pictures."""
    examples = caption_examples(seed, count)
    requests = [Request(e.segments[:1], seed + i) for i, (_, e) in enumerate(examples)]
    verdicts = []
    answers = generate(pipeline, requests, **options)
    for (row, example), answer in zip(examples, answers, strict=True):
        image = first_image(answer)
        seen = detect(image)
        right = bool(answer.images) and judge(example, seen)
        label = example.segments[0].content + saw(seen) * (not right)
        verdicts.append(Verdict(row, image, label, right))
    return verdicts


def first_image(answer: Answer) -> Image.Image:
    """Black where there is none."""
    return answer.images[0] if answer.images else Image.new("RGB", (data.CANVAS,) * 2)


def saw(seen: list[Thing]) -> str:
    return "\nsaw " + (", ".join(t.name for t in seen) or "nothing")


def side_by_side(images: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", ((data.CANVAS + 2) * len(images) - 2, data.CANVAS), "white")
    for i, image in enumerate(images):
        page.paste(image, (i * (data.CANVAS + 2), 0))
    return page


def ask(pipeline: Pipeline, seed: int, count: int, **options) -> list[Verdict]:
    """Ask questions about held-out scenes, their kinds in turn."""
    examples = []
    for i in range(count):
        kind = list(data.QUESTIONS)[i % len(data.QUESTIONS)]
        rng = random.Random(f"evaluate question {seed} {i}")
        examples.append(data.understanding(rng, kind=kind))
    return answer_exactly(pipeline, examples, seed, **options)


def compare(pipeline: Pipeline, seed: int, count: int, **options) -> list[Verdict]:
    """Ask what changed between two held-out scenes, the kinds of edit in turn."""
    examples = []
    for i in range(count):
        kind = list(data.EDITS)[i % len(data.EDITS)]
        examples.append(data.difference(random.Random(f"evaluate difference {seed} {i}"), kind))
    return answer_exactly(pipeline, examples, seed, **options)


def answer_exactly(
    pipeline: Pipeline, examples: list[Example], seed: int, **options
) -> list[Verdict]:
    """Verdicts on answers in words: right if they are the expected ones to the letter."""
    requests = [Request(e.segments[:-1], seed + i) for i, e in enumerate(examples)]
    verdicts = []
    answers = generate(pipeline, requests, **options)
    for example, answer in zip(examples, answers, strict=True):
        *images, question, expected = (s.content for s in example.segments)
        said = answer.text.strip()
        label = f"{question}\n" + (said if said == expected else f"not {expected}, but {said}")
        image = side_by_side(images)
        verdicts.append(Verdict(example.kind, image, label, said == expected, said, expected))
    return verdicts


def edit(pipeline: Pipeline, seed: int, count: int, in_context: bool, **options) -> list[Verdict]:
    """Edit held-out scenes, told in words or by an example pair; the kinds of edit in turn."""
    name, make = ("in context", data.in_context) if in_context else ("edit", data.editing)
    examples = []
    for i in range(count):
        kind = list(data.EDITS)[i % len(data.EDITS)]
        examples.append(make(random.Random(f"evaluate {name} {seed} {i}"), kind))
    requests = [Request(e.segments[:-1], seed + i) for i, e in enumerate(examples)]
    verdicts = []
    answers = generate(pipeline, requests, **options)
    for example, answer in zip(examples, answers, strict=True):
        image = first_image(answer)
        seen = detect(image)
        right = bool(answer.images) and judge_edit(example, seen)
        given = [s.content for s in example.segments[:-1]]
        label = "" if in_context else given.pop()
        label += saw(seen) * (not right)
        page = side_by_side([*given, image])
        psnr_elsewhere = kept(example, image, seen) if answer.images else None
        verdicts.append(Verdict(example.kind, page, label, right, kept=psnr_elsewhere))
    return verdicts


def tell(pipeline: Pipeline, seed: int, count: int, **options) -> list[Verdict]:
    """Continue held-out stories: for each frame, whether it is true of its sentence and whether
    the actors are still the same; a frame that is missing is neither, more are not looked at."""
    examples = [data.story(random.Random(f"evaluate story {seed} {i}")) for i in range(count)]
    requests = [Request(e.segments[:2], seed + i) for i, e in enumerate(examples)]
    verdicts = []
    answers = generate(pipeline, requests, **options)
    for example, answer in zip(examples, answers, strict=True):
        before, sentence, frames = example.before, "", []
        for segment in answer.segments:
            if isinstance(segment.content, str):
                sentence = segment.content
                continue
            frames.append((segment.content, sentence, before, detect(segment.content)))
            before, sentence = frames[-1][3], ""
        blank = Image.new("RGB", (data.CANVAS,) * 2), "", [], []
        actors = sorted(t.name for t in example.before)
        for frame in range(data.FRAMES - 1):
            image, sentence, before, seen = frames[frame] if frame < len(frames) else blank
            right = bool(before) and judge_frame(sentence, before, seen)
            same = sorted(t.name for t in seen) == actors
            label = sentence.strip() + saw(seen) * (not right)
            verdicts.append(Verdict("frame is as its sentence", image, label, right))
            verdicts.append(Verdict("actors stay the same", image, label, same))
    return verdicts


# --- Report --------------------------------------------------------------------------------------


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson's score interval)."""
    z = 1.96
    rate, width = right / max(1, total), z * z / max(1, total)
    centre = (rate + width / 2) / (1 + width)
    half = math.sqrt(z * z * rate * (1 - rate) / max(1, total) + width * width / 4) / (1 + width)
    return max(0.0, centre - half), min(1.0, centre + half)


def tally(verdicts: list[Verdict]) -> dict[str, dict]:
    """Rows of a table: right, total, rate, interval by row; "all" leaves UNSEEN out, and reading
    digits, which asks for detail rather than understanding, is left out of a row of its own."""
    rows = {}
    for v in verdicts:
        rows.setdefault(v.row, []).append(v.right)
    unseen = rows.pop(UNSEEN, None)
    everything = [right for row in rows.values() for right in row]
    if "digit" in rows:
        rows["all but digit"] = [v.right for v in verdicts if v.row != "digit"]
    rows["all"] = everything
    if unseen:
        rows[UNSEEN] = unseen
    return {name: rate(sum(row), len(row)) for name, row in rows.items()}


def rate(right: int, total: int) -> dict:
    return {
        "right": right,
        "total": total,
        "rate": right / max(1, total),
        "interval": wilson(right, total),
    }


def pope(verdicts: list[Verdict]) -> dict[str, dict]:
    """The measures of POPE (Li et al. 2305.10355) over the yes/no questions."""
    asked = [v for v in verdicts if v.expected in ("yes", "no")]
    yes = [v for v in asked if v.said == "yes"]
    true = [v for v in asked if v.expected == "yes"]
    found = sum(v.expected == "yes" for v in yes)
    return {
        "accuracy": rate(sum(v.right for v in asked), len(asked)),
        "precision": rate(found, len(yes)),
        "recall": rate(found, len(true)),
        "yes-rate": rate(len(yes), len(asked)),
    }


def show(results: dict) -> str:
    """The results as text."""
    lines = [f"{'autoencoder':24}{'PSNR dB':>8}{'SSIM':>8}{'readable':>10}{'digits':>10}"]
    for kind, row in results["autoencoder"].items():
        rates = f"{row['readable']:10.1%}{row['digits']:10.1%}"
        lines.append(f"  {kind:22}{row['psnr']:8.2f}{row['ssim']:8.3f}{rates}")
    for task in TASKS:
        if task in results:
            lines += ["", f"{task:24}{'right':>8}{'total':>8}{'rate':>10}   95% interval"]
        for name, row in results.get(task, {}).items():
            if name == "psnr elsewhere":
                lines.append(f"  {name:22}{row:23.2f} dB")
                continue
            low, high = row["interval"]
            counts = f"{row['right']:8}{row['total']:8}{row['rate']:10.1%}"
            lines.append(f"  {name:22}{counts}   {low:.1%} to {high:.1%}")
    return "\n".join(lines)


def contact_sheet(verdicts: list[Verdict], columns: int = 12, lines: int = 8) -> Image.Image:
    """The first pictures, enlarged, each with its label: green if right, red if wrong."""
    width, height = verdicts[0].image.size
    columns = columns * data.CANVAS // width
    shown = verdicts[: columns * lines]
    cells = [(v.image, v.label, (20, 120, 50) if v.right else (200, 30, 30)) for v in shown]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return sheet(rows, (3 * width, 3 * height))


# --- Speed ---------------------------------------------------------------------------------------


def naive_sample(head: DiffusionHead, hidden: Tensor, weights, steps: int, noise: Tensor) -> Tensor:
    """DiffusionHead.sample without its shortcut: the whole head in every step."""
    batch, contexts, _ = hidden.shape
    x = noise
    for t, a, b in head.schedule.ddim(steps):
        rows = x.repeat_interleave(contexts, 0)  # (B G, C)
        output = head(rows, torch.full((len(rows),), t, device=x.device), hidden.flatten(0, 1))
        scales = torch.tensor(weights, device=x.device)[:, None]
        output = output.unflatten(0, (batch, contexts)) * scales
        x = a * x + b * output.sum(1)
    return x / head.latent_scale


def latents_recomputed(pipeline: Pipeline, tokens: Tensor, latents: Tensor) -> Tensor:
    """Hidden states (L, D) of an image fed latent by latent, everything run again for each."""
    mark = torch.full_like(tokens[:, :1], pipeline.model.config.image_id)
    steps = []
    for n in range(1, len(latents) + 1):
        row = torch.cat([tokens, mark.expand(1, n)], 1)
        steps.append(pipeline.model(row, latents[:n])[0, -1])
    return torch.stack(steps)


def latents_cached(pipeline: Pipeline, tokens: Tensor, latents: Tensor) -> Tensor:
    """The same with a cache: each latent is run once."""
    model = pipeline.model
    length, weight = tokens.shape[1] + len(latents), model.norm.weight
    cache = KVCache(model.config, 1, length, weight.device, weight.dtype)
    model(tokens, latents[:0], cache)
    mark = torch.full_like(tokens[:, :1], model.config.image_id)
    return torch.stack([model(mark, latent[None], cache)[0, -1] for latent in latents])


@torch.inference_mode()
def speed(args: argparse.Namespace) -> None:
    """Print each fast path's ratio to its slow reference, taken in turns, and their difference."""
    device = pick_device(args.device)
    pipeline = load(args.checkpoint, device)
    if pipeline.model.config.image_head != "diffusion":
        raise ValueError(f"{args.checkpoint} has no diffusion head to measure; give an Orthus")
    head = pipeline.model.diffusion_head
    model, config = pipeline.model, pipeline.model.config
    size = config.latents_per_image, config.latent_channels
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, config.hidden_size, generator=rng)
    hidden = hidden.to(device, model.norm.weight.dtype)
    noise = torch.randn(1, size[1], generator=rng).to(device)
    latents = torch.randn(size, generator=rng).to(device)
    tokens = torch.tensor([[config.bos_id, config.sep_id, config.boi_id]], device=device)
    requests = [Request([data.Segment("a red circle")], seed) for seed in range(8)]

    def pictures(batch_size: int) -> Tensor:
        answers = generate(pipeline, requests, batch_size=batch_size, progress=False)
        return torch.stack([data.to_tensor(a.images[0], data.CANVAS) for a in answers])

    rows = {
        "100 DDIM steps, modulations ahead of the loop": (
            lambda: naive_sample(head, hidden, (3.0, -2.0), 100, noise),
            lambda: head.sample(hidden, (3.0, -2.0), 100, noise),
        ),
        f"{size[0]} latents with the cache": (
            lambda: latents_recomputed(pipeline, tokens, latents),
            lambda: latents_cached(pipeline, tokens, latents),
        ),
        "8 pictures in a batch": (lambda: pictures(1), lambda: pictures(8)),
    }
    print(f"{'':48}{'slow s':>9}{'fast s':>9}{'ratio':>8}{'difference':>12}")
    for name, (slow, fast) in rows.items():
        times = {slow: [], fast: []}
        for _ in range(args.rounds):
            for run in (slow, fast):
                started = time.perf_counter()
                run().sum().item()  # waits for a GPU
                times[run].append(time.perf_counter() - started)
        a, b = min(times[slow]), min(times[fast])
        gap = (slow() - fast()).abs().max().item()
        print(f"{name:48}{a:9.4f}{b:9.4f}{a / b:8.2f}{gap:12.1e}")


# --- Command line --------------------------------------------------------------------------------

SCENES = 500  # held-out scenes for the autoencoder
TASKS = (
    "text to image",
    "understanding",
    "pope",
    "differences",
    "editing",
    "in-context editing",
    "stories",
)


def evaluate_shapes(args: argparse.Namespace) -> dict:
    """Everything that `evaluate.py shapes` reports, as JSON has it."""
    device = pick_device(args.device)
    names = ("steps", "cfg_scale", "cfg_image", "batch_size")
    options = {name: getattr(args, name) for name in names}
    results, sheets = {"checkpoint": args.checkpoint, "seed": args.seed} | options, {}
    if any((args.prompts, args.questions, args.edits, args.in_context, args.stories)):
        pipeline = load(args.checkpoint, device)
        vae = pipeline.vae
        results["defaults"] = {k: v for k, v in pipeline.defaults.items() if k != "words"}
    else:
        vae = VQVAE.from_pretrained(args.checkpoint, device, torch.float32)
    if vae.config.resolution != data.CANVAS:
        raise ValueError(
            f"{args.checkpoint} makes pictures of {vae.config.resolution} pixels; the Shapes world "
            f"has {data.CANVAS}: give a checkpoint that was trained on it"
        )
    results["autoencoder"] = autoencoder_report(vae, args.seed, SCENES)
    if args.prompts:
        sheets["text to image"] = draw(pipeline, args.seed, args.prompts, **options)
    if args.questions:  # guidance is for images: one row a question is enough
        one_row = options | dict(cfg_scale=1, cfg_image=1)
        sheets["understanding"] = ask(pipeline, args.seed, args.questions, **one_row)
        if any(v.row == "exists" for v in sheets["understanding"]):
            results["pope"] = pope(sheets["understanding"])
        pairs = math.ceil(0.3 * args.questions)
        sheets["differences"] = compare(pipeline, args.seed, pairs, **one_row)
    if args.edits:
        sheets["editing"] = edit(pipeline, args.seed, args.edits, False, **options)
    if args.in_context:
        sheets["in-context editing"] = edit(pipeline, args.seed, args.in_context, True, **options)
    if args.stories:
        sheets["stories"] = tell(pipeline, args.seed, args.stories, **options)
    for task, verdicts in sheets.items():
        results[task] = tally(verdicts)
        if task == "stories":  # its rows are two views of the same frames
            del results[task]["all"]
        if measured := [v.kept for v in verdicts if v.kept is not None]:
            results[task]["psnr elsewhere"] = float(np.mean(measured))
        if args.samples:
            name = task.replace(" ", "_") + ".png"
            shown = verdicts[::2] if task == "stories" else verdicts  # each frame once
            contact_sheet(shown).save(args.samples / name)
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    shapes = commands.add_parser(
        "shapes",
        help="quality of a model of the Shapes world",
        description="Quality of a model of the Shapes world, on held-out captions and scenes.",
        epilog="example: python evaluate.py shapes --samples sheets --json shapes.json",
    )
    count = number(int, 0, 100_000)
    add = shapes.add_argument
    tiny = str(Path(__file__).parent / "checkpoints" / "tiny")
    add("--checkpoint", default=tiny, metavar="DIR", help="default: checkpoints/tiny")
    add("--seed", type=number(int, 0, 2**31), default=1000, metavar="N",
        help="of the held-out examples, and of sampling (default: 1000)")
    add("--prompts", type=count, default=500, metavar="N",
        help="captions to draw, the six kinds in turn; 0 leaves drawing out (default: 500)")
    add("--questions", type=count, default=500, metavar="N",
        help="questions to ask, their kinds in turn, and 0.3 times as many about the difference "
        "between two pictures (default: 500)")
    add("--edits", type=count, default=300, metavar="N",
        help="edits told in words, their kinds in turn (default: 300)")
    add("--in-context", type=count, default=300, metavar="N",
        help="edits told by an example pair (default: 300)")
    add("--stories", type=count, default=100, metavar="N",
        help="stories to continue, three frames each (default: 100). With 0 of everything, the "
        "checkpoint needs an autoencoder alone")
    add("--json", type=Path, metavar="FILE", help="write the numbers here too")
    add("--samples", type=Path, metavar="DIR", help="save sheets of pictures, labelled with what "
        "was asked, green if right, red if wrong")
    add("--steps", type=number(int, 1, 1000), metavar="N",
        help="DDIM steps (default: the checkpoint's)")
    add("--cfg-scale", type=number(float, 0, 100), metavar="S",
        help="guidance; 1 is none (default: the checkpoint's)")
    add("--cfg-image", type=number(float, 0, 100), metavar="S",
        help="guidance towards a prompt's images (default: the checkpoint's)")
    add("--batch-size", type=number(int, 1, 4096), default=64, metavar="N",
        help="requests answered at a time (default: 64)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    clock = commands.add_parser("speed", help="fast paths beside their slow references, as ratios")
    clock.add_argument("--checkpoint", default=tiny, metavar="DIR")
    clock.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    clock.add_argument("--rounds", type=number(int, 1, 1000), default=5, metavar="N",
        help="runs of each, taken in turns; the fastest counts (default: 5)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        if args.command == "speed":
            return speed(args)
        if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
            raise ValueError(f"--json {args.json} is not a file in a folder that exists")
        if args.samples:
            args.samples.mkdir(parents=True, exist_ok=True)
        results = evaluate_shapes(args)
        print(show(results))
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        tqdm.write("interrupted; nothing was reported", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        tqdm.write(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
