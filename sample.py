"""Sampling: two loops for every task, and their command line.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --image picture.png --prompt "How many circles are there?"
    python sample.py --image picture.png --prompt "Make the circle blue."
    python sample.py --image before.png --image after.png --image other.png

The last token decides which head speaks: write_text goes on until every row has said <boi> or has
ended, draw_image takes the diffusion head for the L latents of the rows at <boi>, <eoi> is
appended, text goes on. Text-to-image, question answering, editing and stories are prompts, not
modes. Reading order: requests and answers, guidance, the two loops, the command line.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
from checkpoint import Generation
from data import Segment, Sequence, Tokenizer, check_fits, collate, layout, read_prompt
from data import to_image, words_of
from orthus import KVCache, Orthus, OrthusConfig
from vae import VQVAE

# --- Requests and answers ------------------------------------------------------------------------


@dataclass
class Request:
    """A prompt (text and images in order) and the seed, below 2**32, of its answer."""

    prompt: list[Segment]
    seed: int = 0
    text: str = ""  # the prompt as it was given, for results.jsonl

    @property
    def images(self) -> list[Segment]:
        return [s for s in self.prompt if s.is_image]


@dataclass
class Answer:
    """What the model wrote (so far): text and images in order, and what was forced or left out."""

    segments: list[Segment] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # (L, C) of each image
    notes: list[str] = field(default_factory=list)
    drawing: bool = False  # an image has begun
    complete: bool = False

    @property
    def text(self) -> str:
        return " ".join(s.content for s in self.segments if not s.is_image)

    @property
    def images(self) -> list[Image.Image]:
        return [s.content for s in self.segments if s.is_image]


@dataclass
class Pipeline:
    """All that a checkpoint directory holds."""

    model: Orthus
    vae: VQVAE
    tokenizer: Tokenizer
    defaults: Generation


def load(directory, device="cpu", dtype=None, vae=None, compile: bool = False) -> Pipeline:
    """Open a checkpoint, its autoencoder from `vae` where given. The transformer is in fp32 on a
    CPU, bf16 elsewhere, unless dtype says otherwise. Raises ValueError for what does not fit."""
    source = checkpoint.open_checkpoint(directory)
    other = source if vae is None else checkpoint.open_checkpoint(vae)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    autoencoder = VQVAE.from_pretrained(other, device, torch.float32).eval()
    model = Orthus.from_pretrained(source, device, dtype).eval()
    check_fits(model.config, autoencoder.config, f"that of {vae or directory}")
    defaults = checkpoint.build(Generation, source.section("generation"), source)
    if compile:
        model.step = torch.compile(model.step)
        if hasattr(model.image_head, "denoise"):
            model.image_head.denoise = torch.compile(model.image_head.denoise)
    return Pipeline(model, autoencoder, Tokenizer.from_pretrained(source), defaults)


# --- Guidance ------------------------------------------------------------------------------------


def is_interleaved(request: Request, given: dict) -> bool:
    """Whether text and images may alternate: then an answer does not begin with an image by rule,
    and the checkpoint's "interleaved" defaults hold."""
    return bool(request.images) or given.get("min_images", 0) > 1


def settings_of(request: Request, defaults: Generation, given: dict) -> Generation:
    """The checkpoint's settings, those that were given in their place. `cfg_scale` alone is both
    scales; `cfg_image` alone stands beside the checkpoint's scale."""
    values = asdict(defaults)
    if is_interleaved(request, given):
        values |= defaults.interleaved
    if "cfg_scale" in given:
        values["cfg_image"] = given["cfg_scale"]
    values |= given
    if values["cfg_image"] is None:
        values["cfg_image"] = values["cfg_scale"]
    return Generation(**values)


def contexts(request: Request, settings: Generation) -> list[tuple[list[Segment], float]]:
    """The prompts under which an image of the answer is predicted, the full one f first, each with
    its weight in the sum of the head's outputs; the weights add up to 1. The empty prompt e is an
    ordinary sentence, "Generate an image.", i are the prompt's images without its text:

        e + s (f - e)                            for text alone, or images alone
        e + s_image (i - e) + s_text (f - i)     for both
    """
    full, images, empty = request.prompt, request.images, [Segment(settings.unconditional)]
    s, s_image = settings.cfg_scale, settings.cfg_image
    if not images:
        found = [(full, s), (empty, 1 - s)]
    elif len(images) == len(full):
        found = [(full, s_image), (empty, 1 - s_image)]
    else:
        found = [(full, s), (images, s_image - s), (empty, 1 - s_image)]
    return found[:1] + [(prompt, weight) for prompt, weight in found[1:] if weight != 0]


# --- The two loops -------------------------------------------------------------------------------


class Row:
    """One request and the state of its answer; in the cache, a row for each of its contexts."""

    def __init__(self, pipeline: Pipeline, request: Request, given: dict, watch=None):
        """Raises ValueError where the images that must be, or one word, do not fit."""
        config, defaults = pipeline.model.config, pipeline.defaults
        self.request, self.answer = request, Answer()
        self.watch = watch or (lambda answer: None)  # told when the answer has grown
        self.settings = settings = settings_of(request, defaults, given)
        found = contexts(request, settings)
        self.contexts = [layout(prompt, pipeline.tokenizer, config) for prompt, _ in found]
        self.weights = tuple(weight for _, weight in found)
        # all randomness of an answer: image j takes the j-th randn(L, C), sampled text the other
        self.noise = torch.Generator().manual_seed(request.seed)
        self.rng = torch.Generator().manual_seed(request.seed)
        self.ids: list[int] = []  # of the text being written
        self.left_out = False  # an image was left out, and that was said
        self.cache_rows: list[int] = []  # one for each context
        self.latents: Tensor | None = None  # (N, C) of the images in its prompt
        first = settings.image_first and not is_interleaved(request, given)
        first = first and settings.max_images != 0
        self.next_token = config.boi_id if first else None  # None: the model chooses

        # the budget: what is asked for, else the checkpoint's, and more where images are asked for
        size, prompt = config.latents_per_image + 2, len(self.contexts[0].tokens)
        most = max(settings.min_images, settings.max_images or 0)
        enough = max(defaults.max_tokens, most * size + defaults.max_tokens // 2)
        wanted, room = given.get("max_tokens", enough), config.max_position_embeddings - prompt
        self.budget = min(wanted, room)  # tokens it may still write
        self.limit = f"max tokens {wanted}, raise --max-tokens"  # what set the budget
        if room < wanted:
            self.limit = f"context {config.max_position_embeddings}"
        needed = max(settings.min_images, int(first)) * size + 1
        if self.budget < needed:
            left = f"a prompt of {prompt} tokens leaves {max(0, self.budget)} ({self.limit})"
            raise ValueError(f"{left}, the answer needs {needed}; shorten it, or draw fewer images")


def pick_token(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """One token from logits (V,): greedy at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    probabilities, order = probabilities.sort(descending=True)
    inside = probabilities.cumsum(0) - probabilities < top_p  # the most likely one always is
    return int(order[torch.multinomial(probabilities * inside, 1, generator=rng)])


def choose_token(row: Row, logits: Tensor, config: OrthusConfig) -> int:
    """The next token of a row from its logits (V,): <boi> only where a whole image fits and one
    more is allowed, and instead of an end as long as images are missing."""
    settings, size, images = row.settings, config.latents_per_image + 2, len(row.answer.images)
    full = settings.max_images is not None and images >= settings.max_images
    if full or row.budget < size + 1:  # <sep> must fit too
        if int(logits.argmax()) == config.boi_id and not row.left_out:
            room = f"it takes {size + 1} tokens, {row.budget} are left ({row.limit})"
            why = f"--max-images is {settings.max_images}" if full else room
            row.answer.notes.append(f"image {images + 1} was left out: {why}")
            row.left_out = True
        logits[config.boi_id] = float("-inf")
    token = pick_token(logits, settings.temperature, settings.top_p, row.rng)
    missing, ends = settings.min_images - images, token in (config.sep_id, config.eos_id)
    if missing > 0 and token != config.boi_id and (ends or row.budget <= missing * size + 1):
        why = "the model would have stopped" if ends else f"{row.budget} tokens are left"
        row.answer.notes.append(f"image {images + 1} was forced: {why}, --min-images asks for it")
        return config.boi_id
    return token


def take_token(row: Row, pipeline: Pipeline) -> None:
    """Charge a row for its next token; the last text of its answer becomes that of its tokens."""
    config, token, answer = pipeline.model.config, row.next_token, row.answer
    row.budget -= 1
    ended = token in (config.sep_id, config.eos_id)
    answer.complete, answer.drawing = ended or row.budget <= 0, token == config.boi_id
    if not ended and token not in (config.boi_id, config.eoi_id):
        row.ids.append(token)
    text, over = pipeline.tokenizer.decode(row.ids), answer.complete or answer.drawing
    if text and (over or not text.endswith("\ufffd")):  # half a character
        if not answer.segments or answer.segments[-1].is_image:
            answer.segments.append(Segment("", output=True))
        answer.segments[-1].content = text
    if over:
        row.ids = []
    if answer.complete and not ended:
        answer.notes.append(f"the answer was cut: its tokens are used up ({row.limit})")
    row.watch(answer)


def write_text(pipeline: Pipeline, rows: list[Row], cache: KVCache, hidden: Tensor) -> None:
    """One token a step for every row that writes, until each has said <boi> or has ended. hidden
    (cache rows, D) holds the last hidden state of each row and is brought up to date."""
    model, config = pipeline.model, pipeline.model.config
    never = [config.bos_id, config.pad_id, config.unk_id, config.eoi_id, config.image_id]
    while rows:
        choosing = [row for row in rows if row.next_token is None]
        if choosing:
            logits = model.lm_head(hidden[[row.cache_rows[0] for row in choosing]]).float()
            if not logits.isfinite().all():
                raise ValueError("logits are not finite; the weights are broken, or try fp32")
            logits[:, never] = float("-inf")  # (B, V)
            logits[:, model.vision_embedding.image_codes] = float("-inf")
            for row, row_logits in zip(choosing, logits):
                row.next_token = choose_token(row, row_logits, config)
        for row in rows:
            take_token(row, pipeline)
        rows = [row for row in rows if not (row.answer.complete or row.answer.drawing)]
        if rows:
            tokens = torch.tensor([row.next_token for row in rows], device=hidden.device)
            cache_rows = [row.cache_rows[0] for row in rows]
            hidden[cache_rows] = model.step(model.embed_tokens(tokens), cache.select(cache_rows))
            for row in rows:
                row.next_token = None


def draw_image(pipeline: Pipeline, rows: list[Row], cache: KVCache, bar: tqdm) -> None:
    """The next image of rows at <boi> whose guidance is alike: L latents in lock-step. The contexts
    without the prompt begin anew at every image: they are prefilled here, and see no text of the
    answer. Every context then reads <boi>, whose hidden state predicts the first latent. Nothing
    in the loop over latents waits for the device."""
    model, config, settings = pipeline.model, pipeline.model.config, rows[0].settings
    shape, device = (len(rows), len(rows[0].weights)), cache.rows.device  # (B, G)
    others = [(row, g) for row in rows for g in range(1, shape[1])]
    if others:
        prefill(pipeline, others, cache)
    part = cache.select([n for row in rows for n in row.cache_rows])
    boi = torch.full((len(part.rows),), config.boi_id, device=device)
    hidden = model.step(model.embed_tokens(boi), part)  # (B G, D)
    size = config.latents_per_image, config.latent_channels
    noise = torch.stack([torch.randn(size, generator=row.noise) for row in rows])  # (B, L, C)
    noise = (noise * settings.noise_scale).to(device)
    latents, n = torch.zeros_like(noise), torch.zeros(1, dtype=torch.long, device=device)
    weights = torch.tensor(rows[0].weights, device=device)

    def draw_latent() -> None:
        """Number n of every row, in place: what the head says, the transformer reads."""
        here = noise.index_select(1, n)[:, 0]  # (B, C)
        states = hidden.unflatten(0, shape)  # (B, G, D)
        latent = model.image_head.sample(states, weights, steps=settings.steps, noise=here)
        latents.index_copy_(1, n, latent[:, None])
        x = model.vision_embedding(latent).to(hidden.dtype)  # (B, D)
        hidden.copy_(model.step(x.repeat_interleave(shape[1], 0), part))
        n.add_(1)

    draw_next, bar.total = draw_latent, bar.total + size[0] * len(rows)
    for number in range(size[0]):
        draw_next()
        bar.update(len(rows))
        if number == 0 and device.type == "cuda":
            draw_next = record(draw_latent)
    bar.clear()  # what is printed next has the line to itself
    if not latents.isfinite().all():
        raise ValueError("latents are not finite; the weights are broken, or try fp32")
    images = pipeline.vae.decode(latents.to(pipeline.vae.post_quant_conv.weight.dtype))
    for row, image, drawn in zip(rows, images, latents):
        row.budget, row.next_token = row.budget - size[0], config.eoi_id
        row.answer.drawing = False
        row.answer.segments.append(Segment(to_image(image), output=True))
        row.answer.latents.append(drawn)
        row.watch(row.answer)


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Work on CUDA as one graph of its kernels: a latent has thousands, each over before Python
    has started the next. What `work` reads and writes must keep its place in memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return lambda: (graph.replay(), torch.cuda.synchronize())  # else the bar would run ahead


def prefill(pipeline: Pipeline, wanted: list[tuple[Row, int]], cache: KVCache) -> Tensor:
    """Read contexts, (row, number of its context) -> the last hidden state of each (B, D)."""
    model, device = pipeline.model, cache.keys.device
    cache_rows = [row.cache_rows[g] for row, g in wanted]
    sequences = [row.contexts[g] for row, g in wanted]
    blank = [Sequence(s.tokens, s.labels, []) for s in sequences]  # their images are encoded
    tokens = collate(blank, model.config, 1, pad_left=True).tokens.to(device)
    latents = [torch.zeros(0, model.config.latent_channels, device=device)]
    latents += [row.latents for row, g in wanted if row.contexts[g].images]
    cache.used[cache_rows] = 0
    return model(tokens, torch.cat(latents), cache.select(cache_rows))[:, -1]


@torch.inference_mode()
def decode(pipeline: Pipeline, rows: list[Row], bar: tqdm) -> None:
    """Answer a batch of requests: text and images in turn, until all have ended."""
    model, config = pipeline.model, pipeline.model.config
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    prompts, resolution = [row.contexts[0] for row in rows], pipeline.vae.config.resolution
    batch = collate(prompts, config, resolution, hub_pixels=pipeline.defaults.hub_pixels)
    if len(batch.images):
        latents = pipeline.vae.encode(batch.images.to(device))  # (images of all prompts, L, C)
        for row, its in zip(rows, latents.split([len(p.images) for p in prompts])):
            row.latents = its.flatten(0, 1)
    count = 0
    for row in rows:
        row.cache_rows = list(range(count, count + len(row.contexts)))
        count += len(row.contexts)
    longest = max(len(s.tokens) for row in rows for s in row.contexts)
    cache = KVCache(config, count, longest + max(row.budget for row in rows), device, dtype)
    hidden = torch.zeros(count, config.hidden_size, device=device, dtype=dtype)
    first = [row.cache_rows[0] for row in rows]
    hidden[first] = prefill(pipeline, [(row, 0) for row in rows], cache)
    while rows:
        write_text(pipeline, rows, cache, hidden)
        rows = [row for row in rows if not row.answer.complete]
        kind = lambda row: (row.weights, row.settings.steps, row.settings.noise_scale)
        for alike in dict.fromkeys(map(kind, rows)):
            draw_image(pipeline, [row for row in rows if kind(row) == alike], cache, bar)


def generate(pipeline, requests, batch_size=16, progress=True, watch=None, **settings):
    """Requests -> their Answers, `batch_size` at a time; settings are fields of Generation, in
    place of the checkpoint's. watch(number, answer) is called when an answer has grown. Raises
    ValueError where a setting is out of its range, or there is no room for an answer."""
    checkpoint.check(Generation, settings)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; want 1 or more")
    rows = []
    for number, request in enumerate(requests):
        try:
            rows.append(Row(pipeline, request, settings, watch and partial(watch, number)))
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
    with tqdm(total=0, desc="latents", disable=not progress, leave=False, delay=0.01) as bar:
        for first in range(0, len(rows), batch_size):
            try:
                decode(pipeline, rows[first : first + batch_size], bar)
            except torch.OutOfMemoryError:  # most likely in the cache, ahead of the first token
                raise ValueError("out of memory; lower --batch-size or --max-tokens") from None
    return [row.answer for row in rows]


# --- Command line --------------------------------------------------------------------------------


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


@torch.inference_mode()
def film(vae: VQVAE, latents: Tensor) -> list[Image.Image]:
    """Latents (L, C) -> a picture for each number of them, those not drawn yet at their mean."""
    latents = latents.to(vae.post_quant_conv.weight.dtype)
    frames = latents.mean(0).expand(len(latents) + 1, len(latents), -1).clone()  # (L + 1, L, C)
    for drawn in range(1, len(frames)):
        frames[drawn, :drawn] = latents[:drawn]
    return [to_image(vae.decode(frame[None])[0]) for frame in frames]


class Writer:
    """Puts answers on the screen and on disk in the order of the requests, each as it grows."""

    def __init__(self, pipeline: Pipeline, requests: list[Request], args, results):
        self.vae, self.requests, self.results = pipeline.vae, requests, results
        self.output, self.film = Path(args.output), args.film
        self.scale = args.scale or pipeline.defaults.scale
        self.inputs = {os.path.realpath(s.content) for r in requests for s in r.images}
        self.answers = [Answer() for _ in requests]
        self.names: list[list[str]] = [[] for _ in requests]  # of the images written
        self.turn = self.count = self.letters = 0  # answer, next image, letters on the screen

    def take(self, number: int, answer: Answer) -> None:
        """Write what is new of the answer whose turn it is; when it is over, the turn passes."""
        self.answers[number] = answer
        while self.turn < len(self.answers) and self.write(self.answers[self.turn]):
            self.turn, self.letters = self.turn + 1, 0

    def write(self, answer: Answer, interrupted: bool = False) -> bool:
        """Images to disk, text to the screen, or a complete answer's line to results.jsonl ->
        whether the answer is over."""
        request, names, over = self.requests[self.turn], self.names[self.turn], answer.complete
        for image in range(len(names), len(answer.images)):
            names.append(self.save(answer.images[image], answer.latents[image]))
        paths, text = iter(names), ""
        for s in answer.segments:
            open_end = not (s.is_image or over or answer.drawing) and s is answer.segments[-1]
            text += f"{next(paths)} (seed {request.seed})" if s.is_image else s.content
            text += "" if open_end else "\n"  # the line may go on
        if not self.results:
            print(text[self.letters :] + "\n" * (interrupted and text > ""), end="", flush=True)
            self.letters = len(text)
        elif over:
            line = dict(prompt=request.text, text=answer.text, images=names, seed=request.seed)
            self.results.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self.results.flush()
        for note in answer.notes if over or interrupted else []:
            print(f"note: request {self.turn}: {note}", file=sys.stderr)
        return over

    def save(self, image: Image.Image, latents: Tensor) -> str:
        """Write an image under the next number that no image of a prompt has, and its film."""
        path = self.output / f"{self.count:04d}.png"
        self.count += 1
        if self.inputs & {os.path.realpath(path), os.path.realpath(path.with_suffix(".gif"))}:
            return self.save(image, latents)
        with checkpoint.whole_file(path) as file:
            enlarge(image, self.scale).save(file, "PNG")
        if self.film:
            first, *rest = [enlarge(frame, self.scale) for frame in film(self.vae, latents)]
            times = [150] * len(rest) + [2000]  # milliseconds
            with checkpoint.whole_file(path.with_suffix(".gif")) as file:
                first.save(file, "GIF", save_all=True, append_images=rest, loop=0, duration=times)
        return str(path)

    def finish(self) -> None:
        """Write what there is of an answer that was interrupted; then story.md of the answers that
        hold text and images, or several images."""
        for self.turn in range(self.turn, len(self.answers)):
            self.write(self.answers[self.turn], interrupted=True)
            self.letters = 0
        lines = []
        for request, answer, names in zip(self.requests, self.answers, self.names):
            if answer.images and len(answer.segments) > 1:
                asked = ["`<image>`" if s.is_image else s.content for s in request.prompt]
                lines.append("> " + " ".join(" ".join(asked).split()))
                links = iter(f"![]({Path(name).name})" for name in names)
                lines += [next(links) if s.is_image else s.content for s in answer.segments]
        if lines:
            with checkpoint.whole_file(self.output / "story.md") as file:
                file.write("\n\n".join([*lines, ""]).encode())
            print(self.output / "story.md")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description, raw = __doc__.split("The last token")[0], argparse.RawDescriptionHelpFormatter
    parser = checkpoint.Parser(description=description, formatter_class=raw)

    number, tiny = checkpoint.number, str(Path(__file__).parent / "checkpoints" / "tiny")
    add, several = parser.add_argument, dict(action="append", default=[])
    whole = dict(type=number(int, 1, 10**4), metavar="N")
    add("--prompt", help="what to draw or answer; repeatable", **several)
    add("--image", help="a file of the prompt, in front or where it says <image>", **several)
    add("--requests", help='a jsonl file of {"prompt", "images", "seed"}, for results.jsonl')
    add("--checkpoint", default=tiny, help="its config.json has the defaults (default: tiny)")
    add("--vae", help="a checkpoint to take the autoencoder from")
    add("--output", default="outputs", help="where PNGs go (default: outputs)")
    add("--num-images", default=1, help="answers a prompt, each with the next seed", **whole)
    add("--seed", default=0, type=number(int, 0, 2**31), metavar="N", help="default: 0")
    names = ["steps", "cfg_scale", "cfg_image", "noise_scale", "temperature", "top_p"]
    names += ["max_tokens", "min_images", "max_images", "scale"]
    checkpoint.add_flags(parser, Generation, names)
    add("--film", action="store_true", help="0000.gif beside 0000.png: a frame a latent")
    add("--batch-size", default=16, help="requests at a time (default: 16)", **whole)
    add("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda:1, ...")
    kinds = "float32", "bfloat16", "float16"
    add("--dtype", choices=kinds, help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    args = parser.parse_args(argv)
    if bool(args.prompt or args.image) == bool(args.requests):
        parser.error("give --prompt (with or without --image), or --requests FILE")
    if args.requests and args.num_images > 1:
        parser.error("--num-images goes with --prompt; repeat the line in the --requests file")
    values = {name: getattr(args, name) for name in names if name != "scale"}
    args.given = {name: value for name, value in values.items() if value is not None}
    return args


def read_requests(args: argparse.Namespace) -> list[Request]:
    """From the flags, or from the lines of a file. Raises ValueError with the line."""
    if not args.requests:
        prompts = [read_prompt(text, args.image) for text in args.prompt or [""]]
        seeds = range(args.seed, args.seed + args.num_images)
        return [Request(prompt, seed) for prompt in prompts for seed in seeds]
    requests = []
    for where, line in checkpoint.read_lines(Path(args.requests)):
        line = {"images": [], "seed": args.seed} | line if isinstance(line, dict) else {}
        kinds = {name: type(value) for name, value in line.items()}
        fits = kinds == {"prompt": str, "images": list, "seed": int}
        if (
            not fits
            or not 0 <= line["seed"] < 2**32
            or any(type(i) is not str for i in line["images"])
        ):
            raise ValueError(f'{where}: want {{"prompt": text, "images": [paths], "seed": 0}}')
        try:
            prompt = read_prompt(line["prompt"], line["images"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        requests.append(Request(prompt, line["seed"], line["prompt"]))
    if not requests:
        raise ValueError(f"requests file {args.requests} holds no request")
    return requests


def run(args: argparse.Namespace) -> None:
    started = time.time()
    device, output = checkpoint.pick_device(args.device), Path(args.output)
    if not args.output or (output.exists() and not output.is_dir()):
        raise ValueError(f"--output is {args.output!r}, not a directory; give one")
    results = output / "results.jsonl"
    if args.requests and os.path.realpath(results) == os.path.realpath(args.requests):
        raise ValueError(f"the answers would overwrite {args.requests}; give another --output")
    Generation(**args.given)  # may raise, before anything is loaded
    requests = read_requests(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = load(args.checkpoint, device, dtype, args.vae, args.compile)
    for request in requests:
        Row(pipeline, request, args.given)  # may raise, before anything is written
    words = words_of(s.content for request in requests for s in request.prompt if not s.is_image)
    unknown, known = sorted(words - set(pipeline.defaults.words)), pipeline.defaults.words
    if known and unknown:  # a small model knows few
        found = f"the model never saw {', '.join(map(repr, unknown))}"
        print(f"warning: {found}; it knows: {' '.join(known)}", file=sys.stderr)
    output.mkdir(parents=True, exist_ok=True)
    lines = checkpoint.whole_file(results, True) if args.requests else contextlib.nullcontext()
    with checkpoint.lock(output), lines as file:
        writer = Writer(pipeline, requests, args, file)
        try:
            generate(pipeline, requests, args.batch_size, watch=writer.take, **args.given)
        finally:
            writer.finish()
    if args.requests:
        print(f"{results}: {len(requests)} answers, {sum(map(len, writer.names))} images")
    print(f"{time.time() - started:.1f} seconds")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    interrupted = f"interrupted; what was finished is in {args.output}"
    checkpoint.command_line(lambda: run(args), interrupted)


if __name__ == "__main__":
    main()
