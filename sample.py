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
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import checkpoint  # first: it answers Ctrl-C while PyTorch is imported

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import within
from data import (Segment, Sequence, Tokenizer, captioned, collate, enlarge, layout, read_prompt,
                  read_requests, sheet, to_image, words_of)
from orthus import KVCache, Orthus, OrthusConfig
from vae import VQVAE

# --- Requests and answers ------------------------------------------------------------------------


@dataclass
class Request:
    """A prompt (text and images in order) and the seed of its answer."""

    prompt: list[Segment]
    seed: int = within(0, 0, 2**32 - 1)  # a generator on a CPU reads no more of it

    def __post_init__(self):
        checkpoint.check_fields(self)
        if not self.prompt or not all(isinstance(s, Segment) for s in self.prompt):
            raise ValueError(f"prompt is {self.prompt!r:.60}; want a list of Segments")

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
class Options:
    """How to answer; None takes the checkpoint's default."""

    steps: int | None = within(None, 1, 1000, "DDIM steps a latent")
    cfg_scale: float | None = within(None, 0, 100, "guidance to the whole prompt; 1 is none")
    cfg_image: float | None = within(None, 0, 100, "guidance to the prompt's images; 1 is none")
    temperature: float = within(0.0, 0, 100, "of text; 0 is greedy (default: 0)")
    top_p: float = within(1.0, 1e-6, 1, "nucleus of sampled text (default: 1)")
    max_tokens: int | None = within(None, 1, 10**6, "of an answer, an image's latents included")
    min_images: int = within(0, 0, 1000, "go on with an image where the answer would end")
    max_images: int | None = within(None, 0, 1000, "begin no image past so many")

    def __post_init__(self):
        checkpoint.check_fields(self)
        if self.max_images is not None and self.max_images < self.min_images:
            raise ValueError(f"--max-images {self.max_images} is less than --min-images "
                             f"{self.min_images}; give as many or more")


@dataclass
class Generation:
    """Defaults of a checkpoint, "generation" in its config.json."""

    steps: int = within(100, 1, 1000)
    cfg_scale: float = within(1.0, 0, 100)
    cfg_image: float | None = within(None, 0, 100)  # None: as cfg_scale
    unconditional: str = "Generate an image."  # the prompt that guidance steers away from
    image_first: bool = False  # an answer begins with an image where the prompt holds none
    # other values of cfg_scale, cfg_image, unconditional where text and images alternate
    interleaved: dict = field(default_factory=dict)
    max_tokens: int = within(128, 1, 10**6)
    scale: int = within(1, 1, 64)  # enlarges pictures that are written
    words: list[str] = field(default_factory=list)  # all that a small model knows
    hub_pixels: bool = False  # images are scaled as the Hub's processor does (data.to_tensor)

    def __post_init__(self):
        checkpoint.check_fields(self)
        if self.interleaved:  # its values have the same ranges
            values = asdict(self) | self.interleaved | {"interleaved": {}}
            checkpoint.build(Generation, values, "interleaved")


@dataclass
class Pipeline:
    """All that a checkpoint directory holds."""

    model: Orthus
    vae: VQVAE
    tokenizer: Tokenizer
    defaults: Generation


def load(directory: str | Path, device="cpu", dtype: torch.dtype | None = None,
         vae: str | Path | None = None, compile: bool = False) -> Pipeline:
    """Open a checkpoint in any layout, its autoencoder from `vae` where given. The transformer is
    in fp32 on a CPU, bf16 elsewhere, unless dtype says otherwise."""
    source = checkpoint.open_checkpoint(directory)
    other = source if vae is None else checkpoint.open_checkpoint(vae)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    autoencoder = VQVAE.from_pretrained(other, device, torch.float32).eval()
    model = Orthus.from_pretrained(source, device, dtype).eval()
    autoencoder.config.check_fits(model.config, f"that of {vae or directory}")
    defaults = checkpoint.build(Generation, source.section("generation"), source)
    if compile:
        compile_steps(model)
    return Pipeline(model, autoencoder, Tokenizer.from_pretrained(source), defaults)


def compile_steps(model: Orthus) -> None:
    """Put the transformer's step and the head's through torch.compile; where that is impossible
    (no C++ compiler), one line says so and they stay as they are."""
    device = model.norm.weight.device
    try:  # on something small
        torch.compile(lambda x: 2 * x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # compilers fail in many ways
        reason = str(error).strip().split("\n")[0]
        print(f"warning: nothing is compiled ({reason}); going on without", file=sys.stderr)
        return
    for part in (model, model.image_head):
        if hasattr(part, "step"):
            part.step = torch.compile(part.step)


# --- Guidance ------------------------------------------------------------------------------------


def is_interleaved(request: Request, options: Options) -> bool:
    """Whether text and images may alternate: then an answer does not begin with an image by rule,
    and the checkpoint's "interleaved" defaults hold."""
    return bool(request.images) or options.min_images > 1


def contexts(request: Request, defaults: Generation,
             options: Options) -> list[tuple[list[Segment], float]]:
    """The prompts under which an image of the answer is predicted, the full one first, each with
    its weight in the sum of the head's outputs; the weights add up to 1.

    Two contexts, full f and empty e (an ordinary sentence, "Generate an image."): e + s (f - e).
    Three, where the prompt holds images i and text:  e + s_image (i - e) + s_text (f - i).
    A context whose weight is 0 is left out.
    """
    here = asdict(defaults) | (defaults.interleaved if is_interleaved(request, options) else {})
    images, has_text = request.images, len(request.images) < len(request.prompt)
    scale = here["cfg_scale"] if options.cfg_scale is None else options.cfg_scale
    scale_image = options.cfg_image
    if scale_image is None:
        scale_image = scale if here["cfg_image"] is None else here["cfg_image"]
        if options.cfg_scale is not None:  # where the prompt counts for less, its images do too
            scale_image = min(scale_image, scale) if has_text else scale
    empty = [Segment(here["unconditional"])]
    if images and has_text:
        others = [(images, scale_image - scale), (empty, 1 - scale_image)]
    else:  # the full context is the text's, or the images'
        scale = scale_image if images else scale
        others = [(empty, 1 - scale)]
    return [(request.prompt, scale), *((prompt, weight) for prompt, weight in others if weight)]


# --- The two loops -------------------------------------------------------------------------------


class Row:
    """One request and the state of its answer."""

    def __init__(self, pipeline: Pipeline, request: Request, options: Options,
                 watch: Callable[[Answer], None] | None = None):
        """Raises ValueError where the images that must be, or one word, do not fit."""
        self.request, self.answer = request, Answer()
        self.watch = watch  # told when the answer has grown
        self.noise = torch.Generator().manual_seed(request.seed)  # image j: its j-th randn(L, C)
        self.rng = torch.Generator().manual_seed(request.seed)  # of sampled text
        self.ids: list[int] = []  # of the text being written
        self.refused = False  # an image was left out, and that was said
        self.slots: list[int] = []  # its rows of the cache, one for each context
        self.latents: Tensor | None = None  # (N, C) of the images in its prompt
        config, defaults = pipeline.model.config, pipeline.defaults
        prompts, self.weights = zip(*contexts(request, defaults, options), strict=True)
        # the prompts under which its images are predicted, the full one first
        self.contexts = [layout(prompt, pipeline.tokenizer, config) for prompt in prompts]
        first = defaults.image_first and not is_interleaved(request, options)
        first = first and options.max_images != 0
        self.forced = config.boi_id if first else None  # next token where the model has no choice

        # the budget: what is asked for, else the checkpoint's, and more where images are asked for
        size, prompt = config.latents_per_image + 2, len(self.contexts[0].tokens)
        most = max(options.min_images, options.max_images or 0)
        default = max(defaults.max_tokens, most * size + defaults.max_tokens // 2)
        wanted, context = options.max_tokens or default, config.max_position_embeddings
        self.budget = min(wanted, context - prompt)  # tokens it may still write
        self.limit = f"context {context}"  # what set the budget
        if self.budget == wanted:
            self.limit = f"max tokens {wanted}, raise --max-tokens"
        needed = max(options.min_images, int(first)) * size + 1
        if self.budget < needed:
            raise ValueError(f"a prompt of {prompt} tokens leaves room for {max(0, self.budget)} "
                             f"({self.limit}), the answer needs {needed}; shorten the prompt or "
                             "ask for fewer images")


def pick_token(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """One token from logits (V,): greedy at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    probabilities, order = probabilities.sort(descending=True)
    inside = probabilities.cumsum(0) - probabilities < top_p  # the most likely one always is
    return int(order[torch.multinomial(probabilities * inside, 1, generator=rng)])


def choose_token(row: Row, logits: Tensor, config: OrthusConfig, options: Options) -> int:
    """The next token of a row from its logits (V,): <boi> only where a whole image fits and one
    more is allowed, and instead of an end as long as images are missing."""
    size, images = config.latents_per_image + 2, len(row.answer.images)  # with <boi> and <eoi>
    note = f"image {images + 1} was "
    full = options.max_images is not None and images >= options.max_images
    if full or row.budget < size + 1:  # <sep> must fit too
        if not row.refused and int(logits.argmax()) == config.boi_id:
            why = f"it takes {size + 1} tokens, {row.budget} are left ({row.limit})"
            why = f"--max-images is {options.max_images}" if full else why
            row.answer.notes.append(f"{note}left out: {why}")
            row.refused = True
        logits[config.boi_id] = float("-inf")
    token = pick_token(logits, options.temperature, options.top_p, row.rng)
    missing, ends = options.min_images - images, token in (config.sep_id, config.eos_id)
    if missing <= 0 or token == config.boi_id or (not ends and row.budget > missing * size + 1):
        return token
    why = "the model would have stopped" if ends else f"{row.budget} tokens are left"
    row.answer.notes.append(f"{note}forced: {why}, --min-images is {options.min_images}")
    return config.boi_id


def write_text(pipeline: Pipeline, rows: list[Row], cache: KVCache, hidden: Tensor,
               options: Options) -> None:
    """One token a step for every row that writes, until each has said <boi> or has ended.

    hidden (cache rows, D) holds the last hidden state of each row and is brought up to date.
    """
    model, config = pipeline.model, pipeline.model.config
    codes = model.vision_embedding.image_codes
    never = [config.bos_id, config.pad_id, config.unk_id, config.eoi_id, config.image_id]
    while rows:
        if choosing := [row for row in rows if row.forced is None]:
            logits = model.lm_head(hidden[[row.slots[0] for row in choosing]]).float()  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite; its weights are broken, or "
                                 "try --dtype float32")
            logits[:, codes] = logits[:, never] = float("-inf")
            for row, own in zip(choosing, logits, strict=True):
                row.forced = choose_token(row, own, config, options)
        for row in rows:
            take_token(row, pipeline)
        rows = [row for row in rows if not (row.answer.complete or row.answer.drawing)]
        if rows:
            last, row_of = [row.forced for row in rows], [row.slots[0] for row in rows]
            x = model.embed_tokens(torch.tensor(last, device=hidden.device))
            hidden[row_of] = model.step(x, cache.select(row_of))
            for row in rows:
                row.forced = None


def take_token(row: Row, pipeline: Pipeline) -> None:
    """Charge a row for its next token; the last text of its answer becomes that of its tokens."""
    config, token, answer = pipeline.model.config, row.forced, row.answer
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


def draw_image(pipeline: Pipeline, rows: list[Row], cache: KVCache, steps: int, bar: tqdm) -> None:
    """The next image of rows at <boi> whose guidance is alike: L latents in lock-step.

    The contexts without the prompt begin anew at every image: they are prefilled here, and see no
    text of the answer. Nothing in the loop over latents waits for the device.
    """
    model, config = pipeline.model, pipeline.model.config
    size, shape = config.latents_per_image, (len(rows), len(rows[0].weights))
    device = cache.rows.device
    if shape[1] > 1:
        prefill(pipeline, [(row, g) for row in rows for g in range(1, shape[1])], cache)
    part = cache.select([slot for row in rows for slot in row.slots])
    boi = torch.full((len(part.rows),), config.boi_id, device=device)
    now = model.step(model.embed_tokens(boi), part)  # (B G, D)
    noise = [torch.randn(size, config.latent_channels, generator=row.noise) for row in rows]
    noise = torch.stack(noise).to(device)  # (B, L, C)
    latents, n = torch.zeros_like(noise), torch.zeros(1, dtype=torch.long, device=device)
    weights = torch.tensor(rows[0].weights, device=device)
    prepared = model.image_head.prepare(steps)

    def draw_latent() -> None:
        """Number n of every row, in place: what the head says, the transformer reads."""
        latent = model.image_head.sample(now.unflatten(0, shape), weights, steps,
                                         noise.index_select(1, n)[:, 0], prepared=prepared)
        latents.index_copy_(1, n, latent[:, None])
        x = model.vision_embedding(latent).to(now.dtype)  # (B, D)
        now.copy_(model.step(x.repeat_interleave(shape[1], 0), part))
        n.add_(1)

    bar.total += size * len(rows)
    for number in range(size):
        draw_latent()
        bar.update(len(rows))
        if number == 0 and device.type == "cuda":
            draw_latent = record(draw_latent)
    bar.clear()  # what is printed next has the line to itself
    if not latents.isfinite().all():
        raise ValueError("a latent is not finite; the weights are broken, or try --dtype float32")
    images = pipeline.vae.decode(latents.to(pipeline.vae.post_quant_conv.weight.dtype))
    for row, image, drawn in zip(rows, images, latents, strict=True):
        row.budget, row.forced, row.answer.drawing = row.budget - size, config.eoi_id, False
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
    model, slots = pipeline.model, [row.slots[g] for row, g in wanted]
    sequences = [row.contexts[g] for row, g in wanted]
    blank = [Sequence(s.tokens, s.labels, []) for s in sequences]  # their images are encoded
    tokens = collate(blank, model.config, 1, pad_left=True).tokens.to(cache.keys.device)
    latents = [row.latents for (row, _), s in zip(wanted, sequences, strict=True) if s.images]
    none = torch.zeros(0, model.config.latent_channels, device=tokens.device)
    cache.used[slots] = 0
    return model(tokens, torch.cat([none, *latents]), cache.select(slots))[:, -1]


@torch.inference_mode()
def decode(pipeline: Pipeline, rows: list[Row], options: Options, bar: tqdm) -> None:
    """Answer a batch of requests: text and images in turn, until all have ended."""
    model, config = pipeline.model, pipeline.model.config
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    prompts = [row.contexts[0] for row in rows]
    images = collate(prompts, config, pipeline.vae.config.resolution,
                     hub_pixels=pipeline.defaults.hub_pixels).images.to(device)  # fmt: skip
    if len(images):
        latents = pipeline.vae.encode(images).split([len(p.images) for p in prompts])
        for row, own in zip(rows, latents, strict=True):  # (images of its prompt, L, C)
            row.latents = own.flatten(0, 1)
    last = 0
    for row in rows:
        row.slots = list(range(last, last := last + len(row.contexts)))
    longest = max(len(s.tokens) for row in rows for s in row.contexts)
    cache = KVCache(config, last, longest + max(row.budget for row in rows), device, dtype)
    hidden = torch.zeros(last, config.hidden_size, device=device, dtype=dtype)
    hidden[[row.slots[0] for row in rows]] = prefill(pipeline, [(row, 0) for row in rows], cache)
    steps = options.steps or pipeline.defaults.steps
    while rows := [row for row in rows if not row.answer.complete]:
        write_text(pipeline, rows, cache, hidden, options)
        drawing = [row for row in rows if row.answer.drawing]
        for weights in {row.weights: None for row in drawing}:
            alike = [row for row in drawing if row.weights == weights]
            draw_image(pipeline, alike, cache, steps, bar)


def generate(pipeline: Pipeline, requests: list[Request], batch_size: int = 16,
             progress: bool = True, watch: Callable[[int, Answer], None] = lambda *_: None,
             **options) -> list[Answer]:
    """Answer requests, `batch_size` at a time; the other options are those of Options.

    watch is told the number of a request and its answer when that has grown. Raises ValueError
    where a prompt leaves no room for an answer, or the device's memory none for a batch.
    """
    options = Options(**options)
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; want a whole number of 1 or more")

    rows = []
    for number, request in enumerate(requests):
        try:
            rows.append(Row(pipeline, request, options, functools.partial(watch, number)))
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
    with tqdm(total=0, desc="latents", disable=not progress, leave=False, delay=0.01) as bar:
        for first in range(0, len(rows), batch_size):
            try:
                decode(pipeline, rows[first : first + batch_size], options, bar)
            except torch.OutOfMemoryError:  # most likely in the cache, ahead of the first token
                raise ValueError("the answers do not fit the device's memory; lower --batch-size, "
                                 "--max-tokens, or --dtype") from None
    return [row.answer for row in rows]


# --- Command line --------------------------------------------------------------------------------


def warn_unknown_words(texts: set[str], words: list[str]) -> None:
    """A small model knows few words: name those it never saw."""
    if words and (unknown := sorted(words_of(texts) - set(words))):
        names = ", ".join(map(repr, unknown))
        print(f"warning: the model never saw {names}; it knows: {' '.join(words)}", file=sys.stderr)


class Writer:
    """Puts answers on the screen and on disk in the order of the requests, each as it grows.

    Images are numbered in that order too, past those of the prompts.
    """

    def __init__(self, pipeline: Pipeline, requests: list[tuple[str, Request]], args, results):
        self.vae, self.requests, self.results = pipeline.vae, requests, results
        self.output, self.film = Path(args.output), args.film
        self.scale = args.scale or pipeline.defaults.scale
        self.inputs = {os.path.realpath(s.content) for _, r in requests for s in r.images}
        self.answers = [Answer() for _ in requests]
        self.names: list[list[str]] = [[] for _ in requests]  # of the images written
        self.turn = self.count = 0  # the answer that is being written, the next image's number
        self.letters = 0  # of that answer, on the screen

    def take(self, number: int, answer: Answer) -> None:
        self.answers[number] = answer
        while self.turn < len(self.answers) and self.write(self.answers[self.turn].complete):
            pass  # what has waited for this

    def write(self, over: bool) -> bool:
        """Write what is new of the answer whose turn it is; where it is over, the turn passes."""
        (prompt, request), answer = self.requests[self.turn], self.answers[self.turn]
        names, seed = self.names[self.turn], f" (seed {request.seed})"
        for image in range(len(names), len(answer.images)):
            names.append(self.save(answer, image))
        if not self.results and (answer.segments or answer.complete):
            paths = iter(names)
            lines = [next(paths) + seed if s.is_image else s.content for s in answer.segments]
            in_text = not (answer.drawing or (answer.segments and answer.segments[-1].is_image))
            said = "\n".join(lines) + (seed if over and in_text else "")
            said += "\n" * (over or not in_text)  # else the line may go on
            print(said[self.letters :], end="", flush=True)
            self.letters = len(said)
        if over:
            for note in answer.notes:
                print(f"note: request {self.turn}: {note}", file=sys.stderr)
            if self.results and answer.complete:
                line = dict(prompt=prompt, text=answer.text, images=names, seed=request.seed)
                self.results.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                self.results.flush()
            self.turn, self.letters = self.turn + 1, 0
        return over

    def save(self, answer: Answer, image: int) -> str:
        """Write an image under the next number that no image of a prompt has, and its film."""
        while self.inputs & {os.path.realpath(self.output / f"{self.count:04d}.{ending}")
                             for ending in ("png", "gif")}:  # fmt: skip
            self.count += 1
        path = self.output / f"{self.count:04d}.png"
        with checkpoint.whole_file(path) as file:
            enlarge(answer.images[image], self.scale).save(file, "PNG")
        if self.film:
            frames = [enlarge(f, self.scale) for f in film(self.vae, answer.latents[image])]
            with checkpoint.whole_file(path.with_suffix(".gif")) as file:
                frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                               duration=[150] * (len(frames) - 1) + [2000])  # fmt: skip
        self.count += 1
        return str(path)

    def finish(self) -> None:
        """Write what there is of answers that are not complete; then story.md and story.png of
        those that hold text and images, or several images."""
        while self.turn < len(self.answers):
            self.write(over=True)
        lines, rows = [], []
        together = zip(self.requests, self.answers, self.names, strict=True)
        for (_, request), answer, names in together:
            if answer.images and len(answer.segments) > 1:
                asked = ["`<image>`" if s.is_image else s.content for s in request.prompt]
                links = (f"![]({Path(name).name})" for name in names)
                said = [next(links) if s.is_image else s.content.strip() for s in answer.segments]
                lines += ["> " + " ".join(" ".join(asked).split()), *said]
                rows.append(captioned(request.prompt) + captioned(answer.segments))
        if rows:
            page, picture = self.output / "story.md", self.output / "story.png"
            while os.path.realpath(picture) in self.inputs:
                picture = picture.with_stem(picture.stem + "_")
            with checkpoint.whole_file(page) as file:
                file.write("\n\n".join([*lines, ""]).encode())
            side = self.scale * self.vae.config.resolution
            with checkpoint.whole_file(picture) as file:
                sheet(rows, (side, side)).save(file, "PNG")
            print(f"{page} {picture}")


@torch.inference_mode()
def film(vae: VQVAE, latents: Tensor) -> list[Image.Image]:
    """Latents (L, C) -> a picture for each number of them, those not drawn yet at their mean."""
    latents = latents.to(vae.post_quant_conv.weight.dtype)
    frames = latents.mean(0).expand(len(latents) + 1, len(latents), -1).clone()  # (L + 1, L, C)
    for drawn in range(1, len(frames)):
        frames[drawn, :drawn] = latents[:drawn]
    return [to_image(vae.decode(frame[None])[0]) for frame in frames]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description, raw = __doc__.split("The last token")[0], argparse.RawDescriptionHelpFormatter
    parser = checkpoint.Parser(description=description, formatter_class=raw)
    add, whole = parser.add_argument, checkpoint.number
    add("--prompt", action="append", default=[], help="what to draw or answer; repeatable")
    add("--image", action="append", default=[], metavar="FILE",
        help="an image of the prompt, in front of the text or where it says <image>; repeatable")
    add("--requests", metavar="FILE",
        help='answer a jsonl file of {"prompt", "images", "seed"}, write results.jsonl')
    add("--checkpoint", default=str(Path(__file__).parent / "checkpoints" / "tiny"), metavar="DIR",
        help="its config.json has the defaults of steps, guidance and tokens (default: tiny)")
    add("--vae", metavar="DIR", help="a checkpoint to take the autoencoder from, or vqgan.ckpt")
    add("--output", default="outputs", metavar="DIR", help="where PNGs go (default: outputs)")
    add("--num-images", type=whole(int, 1, 10**4), default=1, metavar="N",
        help="answers per prompt, each with the next seed (default: 1)")
    add("--seed", type=whole(int, 0, 2**31), default=0, metavar="N", help="default: 0")
    checkpoint.add_flags(parser, Options)
    add("--film", action="store_true", help="write 0000.gif beside 0000.png: one frame a latent")
    add("--scale", type=whole(int, 1, 64), metavar="N", help="enlarge PNGs (1: as the model drew)")
    add("--batch-size", type=whole(int, 1, 4096), default=16, metavar="N",
        help="requests at a time; give fewer where the memory holds fewer (default: 16)")
    add("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the transformer (default: float32 on a CPU, bfloat16 elsewhere)")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    args = parser.parse_args(argv)
    if bool(args.prompt or args.image) == bool(args.requests):
        parser.error("give --prompt (with or without --image), or --requests FILE")
    if args.requests and args.num_images > 1:
        parser.error("--num-images goes with --prompt; repeat the line in the --requests file")
    return args


def budget_line(pipeline: Pipeline, rows: list[Row], most: int | None) -> str:
    """What fits the least of the answers, in words."""
    size, tokens = pipeline.model.config.latents_per_image + 2, min(row.budget for row in rows)
    fit = (tokens - 1) // size
    images = fit if most is None else most if most <= fit else f"only {fit} of {most}"
    return f"budget: {images} images x {size} + text fits {tokens}"


def run(args: argparse.Namespace) -> None:
    started = time.time()
    device, output = checkpoint.pick_device(args.device), Path(args.output)
    if not args.output or (output.exists() and not output.is_dir()):
        raise ValueError(f"--output is {args.output!r}, not a directory; give one")
    results = output / "results.jsonl"
    if args.requests:
        if os.path.realpath(results) == os.path.realpath(args.requests):
            raise ValueError(f"the answers would overwrite {args.requests}; give another --output")
        requests = [(r.prompt, Request(r.segments, args.seed if r.seed is None else r.seed))
                    for r in read_requests(args.requests)]  # fmt: skip
    else:
        prompts = [(text, read_prompt(text, args.image)) for text in args.prompt or [""]]
        seeds = range(args.seed, args.seed + args.num_images)
        requests = [(text, Request(prompt, seed)) for text, prompt in prompts for seed in seeds]
    given = {name: value for name in vars(Options()) if (value := getattr(args, name)) is not None}
    options = Options(**given)  # may raise, before anything is loaded
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = load(args.checkpoint, device, dtype, args.vae, args.compile)
    rows = [Row(pipeline, request, options) for _, request in requests]
    warn_unknown_words({text for text, _ in requests}, pipeline.defaults.words)
    if args.min_images or args.max_images:
        print(budget_line(pipeline, rows, args.max_images))
    output.mkdir(parents=True, exist_ok=True)
    lines = checkpoint.whole_file(results, True) if args.requests else contextlib.nullcontext()
    with checkpoint.lock(output), lines as file:
        writer, (_, prompts) = Writer(pipeline, requests, args, file), zip(*requests, strict=True)
        try:
            generate(pipeline, prompts, args.batch_size, watch=writer.take, **given)
        finally:
            writer.finish()
    if args.requests:
        print(f"{results}: {len(requests)} answers, {sum(map(len, writer.names))} images")
    print(f"{time.time() - started:.1f} seconds")


def main() -> None:
    args = parse_args()
    interrupted = f"interrupted; what was finished is in {args.output}"
    checkpoint.command_line("sample.py", lambda: run(args), interrupted)


if __name__ == "__main__":
    main()
