"""Sampling: one decode loop for every task, and its command line.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --image picture.png --prompt "How many circles are there?"
    python sample.py --image picture.png --prompt "Make the circle blue."
    python sample.py --image before.png --image after.png --image other.png
    python sample.py --image frame.png \\
        --prompt "A red circle meets a blue star. Continue this story."

The last token decides which head speaks: <boi> hands over to the diffusion head for L latents,
<eoi> is appended, text goes on, until <sep>, <eos> or the budget. Text-to-image, question
answering, editing and stories are prompts, not modes. Reading order: Request, Event and Answer,
guidance, decode (the loop), stream (batches), then the command line.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

import checkpoint
from checkpoint import Parser
from data import Batch, Segment, Tokenizer, collate, layout, on_white, to_image
from orthus import KVCache, Orthus, OrthusConfig
from vae import VQVAE


@dataclass
class Request:
    """A prompt (text and images in order) and the seed of its answer."""

    prompt: list[Segment]
    seed: int = 0

    @property
    def images(self) -> list[Segment]:
        return [s for s in self.prompt if not isinstance(s.content, str)]


@dataclass
class Event:
    """What just happened to the answer of request number `request`.

    text      content is the next piece of it
    drawing   an image begins
    image     content is the finished image
    note      content says what was forced or left out, and why
    end       the answer is complete
    """

    request: int
    kind: str
    content: str | Image.Image = ""


@dataclass
class Answer:
    """What the model wrote: text and images in order, and notes on what was forced or left out."""

    segments: list[Segment] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def add(self, event: Event) -> None:
        last = self.segments[-1].content if self.segments else None
        if event.kind == "text" and isinstance(last, str):
            self.segments[-1].content += event.content
        elif event.kind in ("text", "image"):
            self.segments.append(Segment(event.content, output=True))
        elif event.kind == "note":
            self.notes.append(event.content)
        self.complete = event.kind == "end"

    @property
    def text(self) -> str:
        return " ".join(s.content for s in self.segments if isinstance(s.content, str))

    @property
    def images(self) -> list[Image.Image]:
        return [s.content for s in self.segments if not isinstance(s.content, str)]


@dataclass
class Options:
    """How to answer; None takes the checkpoint's default."""

    steps: int | None = None  # of DDIM
    cfg_scale: float | None = None  # guidance towards the whole prompt; 1 is none
    cfg_image: float | None = None  # guidance towards the images of the prompt
    temperature: float = 0.0  # of text; 0 is greedy
    top_p: float = 1.0  # nucleus of sampled text
    max_tokens: int | None = None  # budget of an answer, the latents of its images included
    min_images: int = 0  # an answer that would end with fewer is given another <boi>
    max_images: int | None = None  # no <boi> past so many

    def __post_init__(self):
        if self.max_images is not None and self.max_images < self.min_images:
            raise ValueError(
                f"--max-images {self.max_images} is less than --min-images {self.min_images}; "
                "give as many or more"
            )


@dataclass
class Pipeline:
    """All that a checkpoint directory holds."""

    model: Orthus
    vae: VQVAE
    tokenizer: Tokenizer
    defaults: dict  # generation defaults from config.json


def load(
    directory: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    vae: str | Path | None = None,
) -> Pipeline:
    """Open a checkpoint in any layout, its autoencoder from `vae` where given.

    dtype of the transformer: fp32 on a CPU, bf16 elsewhere, unless given.
    """
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    autoencoder = VQVAE.from_pretrained(vae or directory, device, torch.float32).eval()
    tokenizer = Tokenizer.from_pretrained(directory)
    model = Orthus.from_pretrained(directory, device, dtype).eval()
    for name in ("latents_per_image", "latent_channels", "num_codes"):
        ours, theirs = getattr(model.config, name), getattr(autoencoder.config, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} in the model of {directory}, but {theirs} in the autoencoder "
                f"of {vae or directory}; give --vae with the one it was trained with"
            )
    defaults = checkpoint.read_config(directory).get("generation", {})
    if missing := {"steps", "cfg_scale", "unconditional", "max_tokens"} - set(defaults):
        raise ValueError(
            f"config.json of {directory} lacks {', '.join(sorted(missing))} under 'generation'; "
            "copy that section from checkpoints/tiny"
        )
    return Pipeline(model, autoencoder, tokenizer, defaults)


# --- Guidance ------------------------------------------------------------------------------------


def is_interleaved(request: Request, options: Options) -> bool:
    """Whether text and images may alternate: then an answer does not begin with an image by rule,
    and the checkpoint's "interleaved" defaults hold."""
    return bool(request.images) or options.min_images > 1


def contexts(
    request: Request, defaults: dict, options: Options
) -> list[tuple[list[Segment], float]]:
    """The prompts under which an image of the answer is predicted, the full one first, each with
    its weight in the sum of the head's outputs; the weights add up to 1.

    Two contexts, full f and empty e (an ordinary sentence, "Generate an image."): e + s (f - e).
    Three, where the prompt holds images i and text:  e + s_image (i - e) + s_text (f - i).
    A context whose weight is 0 is left out.
    """
    if is_interleaved(request, options):
        defaults = defaults | defaults.get("interleaved", {})
    scale = defaults["cfg_scale"] if options.cfg_scale is None else options.cfg_scale
    scale_image = defaults.get("cfg_image", scale)
    if options.cfg_image is not None:
        scale_image = options.cfg_image
    elif options.cfg_scale is not None:
        has_text = len(request.images) < len(request.prompt)
        # a prompt that counts for less, images too
        scale_image = min(scale_image, scale) if has_text else scale
    empty = [Segment(defaults["unconditional"])]
    if not request.images:
        rows = [(request.prompt, scale), (empty, 1 - scale)]
    elif len(request.images) == len(request.prompt):  # no text: the full context is the images'
        rows = [(request.prompt, scale_image), (empty, 1 - scale_image)]
    else:
        rows = [(request.prompt, scale), (request.images, scale_image - scale)]
        rows.append((empty, 1 - scale_image))
    return rows[:1] + [(segments, weight) for segments, weight in rows[1:] if weight != 0]


# --- The decode loop -----------------------------------------------------------------------------


@dataclass(eq=False)
class Decoding:
    """The state of one request in the loop."""

    number: int
    request: Request
    rows: slice  # its rows of the batch, one per context, the full one first
    weights: tuple[float, ...]  # of its contexts
    budget: int  # tokens it may still write
    advice: str  # where these are too few
    rng: torch.Generator  # for sampled text
    forced: int | None = None  # the next token, where it is not the model's choice
    ids: list[int] = field(default_factory=list)  # of the text being written
    said: str = ""  # what of that text was given out
    noise: Tensor | None = None  # (L, C) of the image being drawn
    latents: list[Tensor] = field(default_factory=list)  # of that image, (C,) each
    images: int = 0  # begun
    notes: list[str] = field(default_factory=list)  # to be given out
    refused: bool = False  # an image was left out, and that was said
    done: bool = False

    @property
    def drawing(self) -> bool:
        return self.noise is not None


def pick_token(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """One token from logits (V,): greedy at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    probabilities, order = probabilities.sort(descending=True)
    inside = probabilities.cumsum(0) - probabilities < top_p  # the most likely one always is
    return int(order[torch.multinomial(probabilities * inside, 1, generator=rng)])


def choose(d: Decoding, logits: Tensor, config: OrthusConfig, options: Options) -> int:
    """The next token of a request from its logits (V,): <boi> only where a whole image fits and
    one more is allowed, and instead of an end as long as images are missing."""
    size = config.latents_per_image + 2  # with <boi> and <eoi>
    full = options.max_images is not None and d.images >= options.max_images
    if full or d.budget < size + 1:  # <sep> must fit too
        if not d.refused and int(logits.argmax()) == config.boi_id:
            d.refused = True
            why = f"it takes {size + 1} tokens, {d.budget} are left; {d.advice}"
            why = f"--max-images is {options.max_images}" if full else why
            d.notes.append(f"image {d.images + 1} was left out: {why}")
        logits = logits.clone()
        logits[config.boi_id] = float("-inf")
    token = pick_token(logits, options.temperature, options.top_p, d.rng)
    missing = options.min_images - d.images
    if missing <= 0 or token == config.boi_id:
        return token
    if token in (config.sep_id, config.eos_id):
        why = "the model would have stopped"
    elif d.budget - 1 < missing * size + 1:
        why = f"{d.budget} tokens are left"
    else:
        return token
    d.notes.append(f"image {d.images + 1} was forced: {why}, --min-images is {options.min_images}")
    return config.boi_id


@torch.inference_mode()
def decode(
    pipeline: Pipeline, requests: list[Request], options: Options, bar: tqdm
) -> Iterator[Event]:
    """Answer a batch of requests together: one slot of the cache per step for every row.

    A row with nothing to say is fed padding, which is invisible and takes no position. The contexts
    without the prompt see no text of the answer, and restart at each of its images.
    """
    model, config = pipeline.model, pipeline.model.config
    device, size = model.norm.weight.device, config.latents_per_image
    decodings, prompts = begin(pipeline, requests, options)
    latents = pipeline.vae.encode(prompts.images).flatten(0, 1)  # (N, C)
    rows, prompt_end = prompts.tokens.shape
    length = prompt_end + max(d.budget for d in decodings)
    cache = KVCache(config, rows, length, device, model.norm.weight.dtype)
    hidden = model(prompts.tokens, latents, cache)[:, -1]  # (rows, D)
    forbidden = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
    forbidden[config.image_code_start : config.image_code_start + config.num_codes] = True
    forbidden[[config.bos_id, config.pad_id, config.unk_id, config.eoi_id, config.image_id]] = True

    while active := [d for d in decodings if not d.done]:
        tokens = torch.full((rows, 1), config.pad_id, device=device)
        latents = torch.zeros(0, config.latent_channels, device=device)
        speaking = [d for d in active if not d.drawing]
        if drawing := [d for d in active if d.drawing]:
            draw_latents(model, hidden, drawing, options.steps or pipeline.defaults["steps"])
            bar.update(len(drawing))
            for d in drawing:
                tokens[d.rows] = config.image_id
            # each is fed to all rows of its request
            latents = torch.cat([d.latents[-1].expand(len(d.weights), -1) for d in drawing])
        if choosing := [d for d in speaking if d.forced is None]:
            logits = model.lm_head(hidden[[d.rows.start for d in choosing]])  # (B, V)
            logits = logits.float().masked_fill(forbidden, float("-inf"))
            for d, row in zip(choosing, logits, strict=True):
                d.forced = choose(d, row, config, options)
        for d in speaking:
            token, d.forced = d.forced, None
            tokens[d.rows.start] = token
            if token == config.boi_id:
                tokens[d.rows] = token
                cache.visible[d.rows.start + 1 : d.rows.stop, prompt_end:] = False
                rng = torch.Generator().manual_seed(d.request.seed + d.images)
                d.noise = torch.randn(size, config.latent_channels, generator=rng)
                d.images += 1
                bar.total += size
            elif token in (config.sep_id, config.eos_id):
                d.done = True
            elif token != config.eoi_id:
                d.ids.append(token)
        for d in active:
            d.budget -= 1
            yield from events(d, pipeline)
        if not all(d.done for d in decodings):
            hidden = model(tokens, latents, cache)[:, -1]


def begin(
    pipeline: Pipeline, requests: list[Request], options: Options
) -> tuple[list[Decoding], Batch]:
    """The state of each request before its first token, and the contexts of all, padded left."""
    config, sequences, decodings = pipeline.model.config, [], []
    for number, request in enumerate(requests):
        rows, weights = zip(*contexts(request, pipeline.defaults, options), strict=True)
        where = slice(len(sequences), len(sequences) + len(rows))
        sequences += [layout(segments, pipeline.tokenizer, config) for segments in rows]
        budget = room(pipeline, request, options)
        full = len(sequences[where.start].tokens) + budget == config.max_position_embeddings
        advice = "the context holds no more" if full else "raise --max-tokens"
        rng = torch.Generator().manual_seed(request.seed)
        forced = config.boi_id if begins_with_image(pipeline, request, options) else None
        decodings.append(Decoding(number, request, where, weights, budget, advice, rng, forced))
    hub_pixels = bool(pipeline.defaults.get("hub_pixels"))
    batch = collate(sequences, config, pipeline.vae.config.resolution, True, hub_pixels)
    return decodings, batch.to(pipeline.model.norm.weight.device)


def draw_latents(model: Orthus, hidden: Tensor, drawing: list[Decoding], steps: int) -> None:
    """Append the next latent to each image being drawn, those with equal guidance together."""
    for weights in {d.weights: None for d in drawing}:
        group = [d for d in drawing if d.weights == weights]
        before = torch.stack([hidden[d.rows] for d in group])  # (B, G, D)
        noise = torch.stack([d.noise[len(d.latents)] for d in group]).to(hidden.device)
        drawn = model.sample_latents(before, weights, steps, noise)  # (B, C)
        for d, latent in zip(group, drawn, strict=True):
            d.latents.append(latent)


def events(d: Decoding, pipeline: Pipeline) -> Iterator[Event]:
    """What the last step of the loop brought for one request, its budget already charged."""
    if d.budget <= 0 and not d.done:
        d.done = True
        d.notes.append(f"the answer was cut: its tokens are used up; {d.advice}")
    text = pipeline.tokenizer.decode(d.ids)
    over = d.done or d.drawing
    if len(text) > len(d.said) and (over or not text.endswith("\ufffd")):  # half a character waits
        yield Event(d.number, "text", text[len(d.said) :])
        d.said = text
    for note in d.notes:
        yield Event(d.number, "note", note)
    d.notes = []
    if d.drawing and not d.latents:
        d.ids, d.said = [], ""
        yield Event(d.number, "drawing")
    if len(d.latents) == pipeline.model.config.latents_per_image:
        latents = torch.stack(d.latents)[None].to(pipeline.vae.post_quant_conv.weight.dtype)
        d.noise, d.latents, d.forced = None, [], pipeline.model.config.eoi_id
        yield Event(d.number, "image", to_image(pipeline.vae.decode(latents)[0]))
    if d.done:
        yield Event(d.number, "end")


def begins_with_image(pipeline: Pipeline, request: Request, options: Options) -> bool:
    """Whether the checkpoint's default makes the answer begin with <boi>."""
    wanted = pipeline.defaults.get("image_first") and options.max_images != 0
    return bool(wanted) and not is_interleaved(request, options)


def room(pipeline: Pipeline, request: Request, options: Options) -> int:
    """Tokens that the answer to a request may have."""
    config, tokens = pipeline.model.config, options.max_tokens
    if tokens is None:  # the checkpoint's default, and more where more images are asked for
        images = max(options.min_images, options.max_images or 0)
        default = pipeline.defaults["max_tokens"]
        tokens = max(default, images * (config.latents_per_image + 2) + default // 2)
    prompt = len(layout(request.prompt, pipeline.tokenizer, config).tokens)
    return min(tokens, config.max_position_embeddings - prompt)


def check_budget(pipeline: Pipeline, request: Request, options: Options) -> str:
    """-> what fits, in words. Raises ValueError where the images that must be, or one word, do
    not."""
    size = pipeline.model.config.latents_per_image + 2
    tokens = room(pipeline, request, options)
    images = max(options.min_images, int(begins_with_image(pipeline, request, options)))
    if tokens < images * size + 1:
        context = pipeline.model.config.max_position_embeddings
        prompt = len(layout(request.prompt, pipeline.tokenizer, pipeline.model.config).tokens)
        limit = f"context {context}"
        if prompt + tokens < context:
            limit = f"max tokens {options.max_tokens}, raise --max-tokens"
        raise ValueError(
            f"a prompt of {prompt} tokens leaves room for {max(0, tokens)} ({limit}), the answer "
            f"needs {images * size + 1}; shorten the prompt or ask for fewer images"
        )
    fit = (tokens - 1) // size
    if options.max_images is not None and options.max_images > fit:
        return f"only {fit} of {options.max_images} images x {size} fit {tokens} tokens"
    images = fit if options.max_images is None else options.max_images
    return f"{images} images x {size} + text fits {tokens}"


def stream(
    pipeline: Pipeline,
    requests: list[Request],
    batch_size: int = 16,
    progress: bool = True,
    **options,
) -> Iterator[Event]:
    """Answer requests, `batch_size` at a time, and say what happens as it happens.

    A batch that does not fit the device's memory is split. The options are those of Options. Image
    j of a request is drawn from noise seeded with seed + j, whatever it is batched with. Raises
    ValueError, before anything is drawn, where a prompt leaves no room for an answer.
    """
    options = Options(**options)
    for number, request in enumerate(requests):
        try:
            check_budget(pipeline, request, options)
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None

    def batches() -> Iterator[Event]:
        show = dict(disable=not progress, leave=False, delay=0.01)  # not before the first latent
        with tqdm(total=0, desc="latents", **show) as bar:
            size, first = batch_size, 0
            while first < len(requests):
                part, begun = requests[first : first + size], False
                try:
                    for event in decode(pipeline, part, options, bar):
                        begun = True
                        # the caller may print; the text of a single answer would be wiped out too
                        if len(part) > 1 or event.kind == "image":
                            bar.clear()
                        yield dataclasses.replace(event, request=first + event.request)
                    first += len(part)
                except torch.OutOfMemoryError:  # the cache is allocated ahead of the first event
                    if begun or len(part) == 1:
                        what, flag = "an answer", "--max-tokens"
                        if len(part) > 1:
                            what, flag = "a batch of answers", "--batch-size"
                        raise ValueError(
                            f"{what} does not fit the memory of the device; lower {flag}, or try "
                            "--dtype bfloat16"
                        ) from None
                    size = len(part) // 2

    return batches()


def generate(pipeline: Pipeline, requests: list[Request], **options) -> list[Answer]:
    """All answers; the options are those of stream and Options."""
    answers = [Answer() for _ in requests]
    for event in stream(pipeline, requests, **options):
        answers[event.request].add(event)
    return answers


# --- Command line --------------------------------------------------------------------------------


def open_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            with contextlib.suppress(SyntaxError):  # Exif data that are broken
                image = ImageOps.exif_transpose(image)  # photos may be stored turned
            if image.mode in ("I", "F"):
                raise ValueError(f"image {path} has mode {image.mode}; give 8 or 16 bits a channel")
            copy = image.copy()
            copy.filename = path  # an answer must not overwrite it
            return copy
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"image {path} cannot be read ({error}); give a PNG or JPEG") from None


def read_prompt(text: str, images: list[str]) -> list[Segment]:
    """Text and image paths -> segments: images stand where <image> does, else in front."""
    text.encode("utf-8")  # half a surrogate pair raises a ValueError
    if not text.strip() and not images:
        raise ValueError("the prompt is empty; say what to draw, or give an image and a question")
    pictures = [open_image(path) for path in images]
    pieces = text.split("<image>")
    if len(pieces) == 1:
        pieces = [""] * len(pictures) + pieces
    if len(pieces) - 1 != len(pictures):
        raise ValueError(
            f"{len(pieces) - 1} <image> in {text!r}, but {len(pictures)} images given; give as many"
        )
    segments = []
    for i, piece in enumerate(pieces):
        if piece.strip():
            segments.append(Segment(piece))
        if i < len(pictures):
            segments.append(Segment(pictures[i]))
    return segments


def read_requests(path: str, seed: int) -> list[tuple[str, Request]]:
    """A jsonl file of {"prompt", "images": [paths], "seed"} -> (prompt text, Request)."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"requests file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"requests file {path} is not UTF-8 ({error.reason})") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, images, own = entry["prompt"], entry.get("images"), entry.get("seed")
            images, own = [] if images is None else images, seed if own is None else own
            check_request(entry, images, own)
            request = Request(read_prompt(text, images), own)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} line {number}: {describe(error)}") from None
        requests.append((text, request))
    if not requests:
        raise ValueError(f"requests file {path} holds no request")
    return requests


def check_request(entry: dict, images: list, seed: int) -> None:
    if unknown := set(entry) - {"prompt", "images", "seed"}:
        raise ValueError(f"unknown {sorted(unknown)}; want prompt, images and seed alone")
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"images is {images!r}; want a list of paths")
    if type(seed) is not int or not 0 <= seed <= 2**31:
        raise ValueError(f"seed is {seed!r}; want a whole number from 0 to {2**31}")


def describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error})"
    if isinstance(error, (KeyError, TypeError, AttributeError)):
        return 'want {"prompt": text, "images": [paths], "seed": number}, images and seed optional'
    return str(error)


def warn_unknown_words(texts: list[str], words: list[str]) -> None:
    """A small model knows few words: name those it never saw."""
    said = {word.strip(".,?!;:\"'") for t in texts for word in t.replace("<image>", " ").split()}
    unknown = sorted(said - set(words) - {""})
    if words and unknown:
        print(
            f"warning: the model never saw {', '.join(map(repr, unknown))}; it knows: "
            + " ".join(words),
            file=sys.stderr,
        )


def number(kind: type, low: float, high: float):
    """An argparse type: a number within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} to {high}")
        return value

    return parse


def pick_device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; try cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; try cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available here; try --device cpu")
    return name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__.split("The last token")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python sample.py --prompt "two green squares" --num-images 4 --seed 7',
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="what to draw or answer; repeatable")
    add("--image", action="append", default=[], metavar="FILE",
        help="an image of the prompt, in front of the text or where it says <image>; repeatable")
    add("--requests", metavar="FILE",
        help='answer a jsonl file of {"prompt", "images", "seed"}, write results.jsonl')
    add("--checkpoint", default=str(Path(__file__).parent / "checkpoints" / "tiny"), metavar="DIR")
    add("--vae", metavar="DIR", help="take the autoencoder from this checkpoint (any layout) or "
        "vqgan.ckpt, for those that ship no decoder")
    add("--hub-pixels", action="store_true", help="scale input images by 0.0078 as the Hub's "
        "processor does, not by exactly 1/127.5")
    add("--output", default="outputs", metavar="DIR", help="where PNGs go (default: outputs)")
    add("--num-images", type=number(int, 1, 10**4), default=1, help="answers per prompt, each with "
        "the next seed (default: 1)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="default: 0")
    add("--steps", type=number(int, 1, 1000), help="DDIM steps (default: the checkpoint's)")
    add("--cfg-scale", type=number(float, 0, 100), help="classifier-free guidance towards the "
        "whole prompt; 1 is none (default: the checkpoint's)")
    add("--cfg-image", type=number(float, 0, 100), help="guidance towards the images of the prompt "
        "where the answer is an image too; 1 is none (default: the checkpoint's)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="of text; 0 is greedy")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="nucleus of sampled text")
    add("--max-tokens", type=number(int, 1, 10**6), help="budget of an answer, an image's latents "
        "included (default: the checkpoint's)")
    add("--min-images", type=number(int, 0, 1000), default=0, metavar="N",
        help="go on with an image where the answer would end with fewer (default: 0)")
    add("--max-images", type=number(int, 0, 1000), metavar="N",
        help="begin no image past so many (default: as many as the budget holds)")
    add("--save-every-image", action="store_true", help="write each image the moment it is "
        "finished, one prompt at a time (a single prompt always does)")
    add("--scale", type=number(int, 1, 64), help="enlarge PNGs for viewing; 1 writes the model's "
        "own pixels (default: the checkpoint's)")
    add("--batch-size", type=number(int, 1, 4096), default=16, help="requests at a time; "
        "fewer where the memory of a GPU does not hold so many (default: 16)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the transformer (default: float32 on a CPU, bfloat16 elsewhere)")
    args = parser.parse_args(argv)
    if bool(args.prompt or args.image) == bool(args.requests):
        parser.error("give --prompt (with or without --image), or --requests FILE")
    if args.requests and args.num_images > 1:
        parser.error("--num-images goes with --prompt; repeat the line in the --requests file")
    return args


class Writer:
    """Puts answers on the screen and on disk, in the order of the requests.

    Images of the first answer that is not complete are written at once; of those after it, what is
    finished waits for its turn: images are numbered in prompt order, past those of the prompts. A
    `live` answer is shown as it grows, others when they are complete (the progress bar would write
    over half a line).
    """

    def __init__(
        self, requests: list[tuple[str, Request]], output: Path, scale: int, live: bool, results
    ):
        self.requests, self.output, self.scale, self.results = requests, output, scale, results
        self.live, self.line, self.notes = live, "", []
        given = [s.content for _, request in requests for s in request.images]
        self.inputs = {Path(image.filename).resolve() for image in given}
        self.answers = [Answer() for _ in requests]
        self.names: list[list[str]] = [[] for _ in requests]  # of the images written
        self.turn = 0  # the request whose answer is being written
        self.waiting: list[list[Event]] = [[] for _ in requests]
        self.count = 0  # the next image's number

    def take(self, event: Event) -> None:
        self.waiting[event.request].append(event)
        while self.turn < len(self.requests) and self.waiting[self.turn]:
            waiting = self.waiting[self.turn]
            self.write(waiting[0])
            waiting.pop(0)  # only now: Ctrl-C may come in between

    def write(self, event: Event) -> None:
        number = event.request
        answer, names = self.answers[number], self.names[number]
        after_image = bool(answer.images) and answer.segments[-1].content is answer.images[-1]
        if event.kind == "image":
            names.append(self.save(event.content))
            self.say(names[-1])
        elif event.kind == "text":
            self.say(" " * after_image + event.content)
        elif event.kind == "drawing" and answer.segments:
            self.say("\n")
        elif event.kind == "note":
            self.notes.append(f"note: request {number}: {event.content}")
        answer.add(event)
        if event.kind == "end":
            self.end(number)

    def save(self, image: Image.Image) -> str:
        """Write an image under the next number that no image of a prompt has; a file is whole or
        not there."""
        while (path := self.output / f"{self.count:04d}.png").resolve() in self.inputs:
            self.count += 1
        enlarge(image, self.scale).save(path.with_suffix(".part"), "PNG")
        path.with_suffix(".part").replace(path)
        self.count += 1
        return str(path)

    def say(self, text: str) -> None:
        self.line += text
        if not self.results and (self.live or text.endswith("\n")):
            print(self.line, end="", flush=True)
            self.line = ""
        if text.endswith("\n"):
            for note in self.notes:
                print(note, file=sys.stderr)
            self.notes = []

    def end(self, number: int) -> None:
        text, request = self.requests[number]
        answer, names = self.answers[number], self.names[number]
        self.say(f" (seed {request.seed})\n")
        if self.results and answer.complete:
            line = {"prompt": text, "text": answer.text, "images": names, "seed": request.seed}
            self.results.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.results.flush()
        self.turn = number + 1

    def interrupt(self) -> None:
        """Write what is finished of the answers that are not."""
        for number in range(self.turn, len(self.requests)):
            for event in self.waiting[number]:
                self.write(event)
            if self.turn <= number and self.answers[number].segments:
                self.end(number)

    def write_story(self) -> None:
        """story.md and story.png, where an answer holds text and images, or several images."""
        told = [i for i, a in enumerate(self.answers) if a.images and len(a.segments) > 1]
        if not told:
            return
        lines, rows = [], []
        for i in told:
            text, request = self.requests[i]
            names = (f"![]({Path(name).name})" for name in self.names[i])
            in_front = [] if "<image>" in text else ["<image>"] * len(request.images)
            said = " ".join([*in_front, *text.split()])
            lines += ["> " + said.replace("<image>", "`<image>`"), ""]
            for segment in self.answers[i].segments:
                is_text = isinstance(segment.content, str)
                lines += [segment.content.strip() if is_text else next(names), ""]
            rows.append(captioned(request.prompt) + captioned(self.answers[i].segments))
        size = enlarge(self.answers[told[0]].images[0], self.scale).size
        page, picture = self.output / "story.md", self.output / "story.png"
        while picture.resolve() in self.inputs:
            picture = picture.with_stem(picture.stem + "_")
        page.write_text("\n".join(lines), encoding="utf-8")
        sheet(rows, size).save(picture)
        print(f"{page} {picture}")


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


Cell = tuple[Image.Image, str, object]  # an image, the text below it and the colour of that


def captioned(segments: list[Segment]) -> list[Cell]:
    """Images, each with the text before it; text after the last one goes to the last one too."""
    cells, text = [], []
    for segment in segments:
        if isinstance(segment.content, str):
            text.append(segment.content.strip())
        else:
            cells.append((segment.content, " ".join(text), "black"))
            text = []
    if text and cells:
        image, caption, ink = cells[-1]
        cells[-1] = image, " ".join([caption, *text]).strip(), ink
    return cells


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


def run(args: argparse.Namespace) -> None:
    started = time.time()
    device, output = pick_device(args.device), Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a directory")
    if args.requests and (output / "results.jsonl").resolve() == Path(args.requests).resolve():
        raise ValueError(f"the answers would overwrite {args.requests}; give another --output")
    if args.requests:
        requests = read_requests(args.requests, args.seed)
    else:
        prompts = [(text, read_prompt(text, args.image)) for text in args.prompt or [""]]
        seeds = range(args.seed, args.seed + args.num_images)
        requests = [(text, Request(prompt, seed)) for text, prompt in prompts for seed in seeds]
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = load(args.checkpoint, device, dtype, args.vae)
    if args.hub_pixels:
        pipeline.defaults["hub_pixels"] = True
    warn_unknown_words([text for text, _ in requests], pipeline.defaults.get("words", []))
    names = [f.name for f in dataclasses.fields(Options)]
    options = {name: getattr(args, name) for name in names}
    live = len(requests) == 1 or args.save_every_image or args.batch_size == 1
    batch_size = 1 if args.save_every_image else args.batch_size
    happening = stream(pipeline, [request for _, request in requests], batch_size, **options)
    least = min(requests, key=lambda r: room(pipeline, r[1], Options(**options)))[1]
    print("budget: " + check_budget(pipeline, least, Options(**options)))
    scale = args.scale or pipeline.defaults.get("scale", 1)
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        results = None
        if args.requests:
            results = files.enter_context(open(output / "results.jsonl", "w", encoding="utf-8"))
        writer = Writer(requests, output, scale, live, results)
        try:
            for event in happening:
                writer.take(event)
        except (KeyboardInterrupt, ValueError):
            writer.interrupt()
            writer.write_story()
            raise
    writer.write_story()
    if args.requests:
        images = sum(map(len, writer.names))
        print(f"{output / 'results.jsonl'}: {len(requests)} answers, {images} images")
    print(f"{time.time() - started:.1f} seconds")


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"interrupted; what was finished is in {args.output}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        tqdm.write(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
