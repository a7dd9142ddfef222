"""Sampling: one decode loop for every task, and its command line.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --image picture.png --prompt "How many circles are there?"

The last token decides which head speaks: <boi> hands over to the diffusion head for L latents,
<eoi> is appended, text goes on, until <sep>, <eos> or the budget. Text-to-image and
question answering are prompts, not modes. Reading order: Request and Answer, contexts (guidance),
decode (the loop), stream (batches), then the command line.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

import checkpoint
from checkpoint import Parser
from data import Segment, Tokenizer, collate, layout, to_image
from orthus import KVCache, Orthus
from vae import VQVAE


@dataclass
class Request:
    """A prompt (text and images in order) and the seed of its answer."""

    prompt: list[Segment]
    seed: int = 0


@dataclass
class Answer:
    """What the model wrote: text and images in order."""

    segments: list[Segment] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(s.content for s in self.segments if isinstance(s.content, str))

    @property
    def images(self) -> list[Image.Image]:
        return [s.content for s in self.segments if not isinstance(s.content, str)]


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


def contexts(prompt: list[Segment], defaults: dict, cfg_scale: float) -> list[list[Segment]]:
    """The prompts under which an image of the answer is predicted: the full one comes first."""
    if cfg_scale == 1:
        return [prompt]
    return [prompt, [Segment(defaults["unconditional"])]]


def guidance_weights(cfg_scale: float) -> tuple[float, ...]:
    """Weights of the contexts, adding up to 1: u + s (c - u) = s c + (1 - s) u."""
    return (1.0,) if cfg_scale == 1 else (cfg_scale, 1 - cfg_scale)


# --- The decode loop -----------------------------------------------------------------------------


@dataclass
class Decoding:
    """The state of one request in the loop."""

    request: Request
    rows: slice  # its rows of the batch, one per context, the full one first
    budget: int  # tokens it may still write
    text: torch.Generator  # for sampled text
    noise: Tensor | None = None  # (L, C) of the image being drawn
    latents: list[Tensor] = field(default_factory=list)  # of that image, (C,) each
    written: list[int | Tensor] = field(default_factory=list)  # tokens, and (L, C) per image
    forced: int | None = None  # the next token, where it is not the model's choice
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


@torch.inference_mode()
def decode(
    pipeline: Pipeline,
    requests: list[Request],
    steps: int,
    cfg_scale: float,
    temperature: float,
    top_p: float,
    max_tokens: int,
    bar: tqdm,
) -> list[Answer]:
    """Answer a batch of requests together: one slot of the cache per step for every row.

    A row with nothing to say is fed padding, which is invisible and takes no position. The contexts
    without the prompt see no text of the answer, and restart at each of its images.
    """
    model, config = pipeline.model, pipeline.model.config
    device, size = model.norm.weight.device, config.latents_per_image
    sequences, decodings = [], []
    for request in requests:
        rows = contexts(request.prompt, pipeline.defaults, cfg_scale)
        start = len(sequences)
        sequences += [layout(segments, pipeline.tokenizer, config) for segments in rows]
        budget = min(max_tokens, config.max_position_embeddings - len(sequences[start].tokens))
        rng = torch.Generator().manual_seed(request.seed)
        decoding = Decoding(request, slice(start, len(sequences)), budget, rng)
        has_image = any(not isinstance(s.content, str) for s in request.prompt)
        if pipeline.defaults.get("image_first") and not has_image:
            decoding.forced = config.boi_id
        decodings.append(decoding)
    weights = guidance_weights(cfg_scale)
    resolution, hub_pixels = pipeline.vae.config.resolution, pipeline.defaults.get("hub_pixels")
    batch = collate(sequences, config, resolution, True, bool(hub_pixels)).to(device)
    latents = pipeline.vae.encode(batch.images).flatten(0, 1)  # (N, C) of the prompts' images
    prompt_end = batch.tokens.shape[1]
    length = prompt_end + max(d.budget for d in decodings)
    cache = KVCache(config, len(sequences), length, device, model.norm.weight.dtype)
    hidden = model(batch.tokens, latents, cache)[:, -1]  # (rows, D)
    forbidden = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
    forbidden[config.image_code_start : config.image_code_start + config.num_codes] = True
    forbidden[[config.bos_id, config.pad_id, config.unk_id, config.eoi_id, config.image_id]] = True

    while True:
        tokens = torch.full((len(sequences), 1), config.pad_id, device=device)
        active = [d for d in decodings if not d.done]
        drawing = [d for d in active if d.drawing]
        latents = torch.zeros(0, config.latent_channels, device=device)
        if drawing:
            before = torch.stack([hidden[d.rows] for d in drawing])  # (B, G, D)
            noise = torch.stack([d.noise[len(d.latents)] for d in drawing]).to(device)
            drawn = model.sample_latents(before, weights, steps, noise)  # (B, C)
            latents = drawn.repeat_interleave(len(weights), 0)  # one per row that is fed it
            bar.update(len(drawing))
            for d, latent in zip(drawing, drawn, strict=True):
                d.latents.append(latent)
                tokens[d.rows] = config.image_id
                d.budget -= 1
                if len(d.latents) == size:
                    d.written.append(torch.stack(d.latents))
                    d.noise, d.latents, d.forced = None, [], config.eoi_id
        speaking = [d for d in active if d not in drawing]
        choosing = [d for d in speaking if d.forced is None]
        if choosing:
            logits = model.lm_head(hidden[[d.rows.start for d in choosing]])  # (B, V)
            logits = logits.float().masked_fill(forbidden, float("-inf"))
        for d in speaking:
            if d.forced is not None:
                token, d.forced = d.forced, None
            else:
                row = logits[choosing.index(d)]
                if d.budget < size + 3:  # <boi>, the latents, <eoi> and <sep> would not fit
                    row[config.boi_id] = float("-inf")
                token = pick_token(row, temperature, top_p, d.text)
            tokens[d.rows.start] = token
            d.budget -= 1
            if token == config.boi_id:
                tokens[d.rows] = token
                cache.visible[d.rows.start + 1 : d.rows.stop, prompt_end:] = False
                images = sum(torch.is_tensor(part) for part in d.written)
                rng = torch.Generator().manual_seed(d.request.seed + images)
                d.noise = torch.randn(size, config.latent_channels, generator=rng)
                bar.total += size
            elif token in (config.sep_id, config.eos_id):
                d.done = True
            elif token != config.eoi_id:
                d.written.append(token)
            d.done = d.done or d.budget <= 0
        if all(d.done for d in decodings):
            return [read_out(d, pipeline) for d in decodings]
        hidden = model(tokens, latents, cache)[:, -1]


def read_out(decoding: Decoding, pipeline: Pipeline) -> Answer:
    """Tokens and latents that were written -> text and images in order."""
    answer, text = Answer(), []
    for part in [*decoding.written, None]:
        if isinstance(part, int):
            text.append(part)
            continue
        if text:
            answer.segments.append(Segment(pipeline.tokenizer.decode(text), output=True))
            text = []
        if part is not None:
            pixels = pipeline.vae.decode(part[None].to(pipeline.vae.post_quant_conv.weight.dtype))
            answer.segments.append(Segment(to_image(pixels[0]), output=True))
    return answer


def stream(
    pipeline: Pipeline,
    requests: list[Request],
    steps: int | None = None,
    cfg_scale: float | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Iterator[Answer]:
    """Answer requests in order, `batch_size` at a time. None takes the checkpoint's default.

    Image j of a request is drawn from noise seeded with seed + j, whatever it is batched with.
    Raises ValueError, before anything is drawn, where a prompt leaves no room for an answer.
    """
    defaults = pipeline.defaults
    steps = defaults["steps"] if steps is None else steps
    cfg_scale = defaults["cfg_scale"] if cfg_scale is None else cfg_scale
    max_tokens = defaults["max_tokens"] if max_tokens is None else max_tokens
    for request in requests:
        check_budget(pipeline, request, max_tokens)

    def batches() -> Iterator[Answer]:
        with tqdm(total=0, desc="latents", disable=not progress, leave=False) as bar:
            for i in range(0, len(requests), batch_size):
                part = requests[i : i + batch_size]
                args = (steps, cfg_scale, temperature, top_p, max_tokens, bar)
                yield from decode(pipeline, part, *args)

    return batches()


def generate(pipeline: Pipeline, requests: list[Request], **options) -> list[Answer]:
    """All answers of stream(), which has the options."""
    return list(stream(pipeline, requests, **options))


def check_budget(pipeline: Pipeline, request: Request, max_tokens: int) -> None:
    """Raise ValueError where the answer cannot even hold one image, or one word."""
    config = pipeline.model.config
    prompt = len(layout(request.prompt, pipeline.tokenizer, config).tokens)
    has_image = any(not isinstance(s.content, str) for s in request.prompt)
    wants_image = pipeline.defaults.get("image_first") and not has_image
    least = config.latents_per_image + 3 if wants_image else 1
    room = min(max_tokens, config.max_position_embeddings - prompt)
    if room < least:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves room for {max(0, room)} (max tokens {max_tokens}, "
            f"context {config.max_position_embeddings}), the answer needs {least}; shorten the "
            "prompt or raise --max-tokens"
        )


# --- Command line --------------------------------------------------------------------------------


def open_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # photos may be stored turned
            if image.mode in ("I", "F"):
                raise ValueError(f"image {path} has mode {image.mode}; give 8 or 16 bits a channel")
            return image.copy()
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
        description="Draw pictures and answer questions about pictures.",
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
    add("--cfg-scale", type=number(float, 0, 100), help="classifier-free guidance; 1 is none "
        "(default: the checkpoint's)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="of text; 0 is greedy")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="nucleus of sampled text")
    add("--max-tokens", type=number(int, 1, 10**6), help="budget of an answer, an image's latents "
        "included (default: the checkpoint's)")
    add("--scale", type=number(int, 1, 64), help="enlarge PNGs for viewing; 1 writes the model's "
        "own pixels (default: the checkpoint's)")
    add("--batch-size", type=number(int, 1, 4096), default=16, help="requests at a time")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the transformer (default: float32 on a CPU, bfloat16 elsewhere)")
    args = parser.parse_args(argv)
    if bool(args.prompt or args.image) == bool(args.requests):
        parser.error("give --prompt (with or without --image), or --requests FILE")
    if args.requests and args.num_images > 1:
        parser.error("--num-images goes with --prompt; repeat the line in the --requests file")
    return args


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
        requests = [
            (text, Request(read_prompt(text, args.image), args.seed + i))
            for text in args.prompt or [""]
            for i in range(args.num_images)
        ]
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = load(args.checkpoint, device, dtype, args.vae)
    if args.hub_pixels:
        pipeline.defaults["hub_pixels"] = True
    warn_unknown_words([text for text, _ in requests], pipeline.defaults.get("words", []))
    answers = stream(
        pipeline, [request for _, request in requests], args.steps, args.cfg_scale,
        args.temperature, args.top_p, args.max_tokens, args.batch_size,
    )
    scale = args.scale or pipeline.defaults.get("scale", 1)
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        if args.requests:
            results = files.enter_context(open(output / "results.jsonl", "w", encoding="utf-8"))
        count = 0
        for (text, request), answer in zip(requests, answers, strict=True):
            names = [str(output / f"{count + i:04d}.png") for i in range(len(answer.images))]
            count += len(names)
            for name, image in zip(names, answer.images, strict=True):
                size = (image.width * scale, image.height * scale)
                image.resize(size, Image.Resampling.BICUBIC).save(name)
            if args.requests:
                line = {"prompt": text, "text": answer.text, "images": names, "seed": request.seed}
                results.write(json.dumps(line, ensure_ascii=False) + "\n")
                results.flush()
            else:
                said = [*names, answer.text, f"(seed {request.seed})"]
                tqdm.write(" ".join(filter(None, said)))
    if args.requests:
        print(f"{output / 'results.jsonl'}: {len(requests)} answers, {count} images")
    print(f"{time.time() - started:.1f} seconds")


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        tqdm.write(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
