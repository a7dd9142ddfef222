"""The five stages of training, from nothing to Orthus: what each trains, on what, by which loss.

    vae         the autoencoder, as a VQ-VAE                                  (Chameleon's)
    decoder     its decoder on continuous latents, the encoder frozen         (appendix A)
    chameleon   the discrete ancestor: argmin embedding, image tokens         (eq. 1, 2)
    base        stage 1: softmax embedding and diffusion head, images only    (eq. 3, 4)
    posttrain   stage 2: everything but the autoencoder, L_ar + lambda L_diff

A stage is a function of its settings, a dataset and a checkpoint that builds a Stage: a model, a
function step -> batch and a function batch -> losses. It writes nothing; train.py runs it.
Reading order: TrainConfig, PRESETS and WORLDS (data), then the stages.
"""

import copy
import dataclasses
import functools
import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import checkpoint
import data
import lora
from checkpoint import Checkpoint, within
from data import FORMATS, Segment
from orthus import HEADS, Orthus, OrthusConfig, randn
from sample import Generation
from vae import VQVAE, VQVAEConfig


def asdict(config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists, as JSON has them


def note(default, help: str):
    """A field of TrainConfig that is no number; its flag has this help."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Everything that shapes a run. PRESETS overrides these defaults per size and stage, flags
    override both; the whole is written into the run's run.json."""

    preset: Literal["nano", "tiny", "7b"] = note("tiny", "sizes and settings (default: tiny)")
    seed: int = within(0, 0, 2**31, "of weights, data and noise")
    steps: int = within(1000, 1, 10**9, "optimiser steps in all")
    batch_size: int = within(64, 1, 2**20, "examples a step")
    micro_batches: int = within(1, 1, 2**20, "parts of a batch, by length: saves memory")
    lr: float = within(1e-3, 1e-12, 10, "peak; linear warm-up, then a cosine to zero")
    warmup: float = within(0.05, 0, 1, "share of the steps")
    optimizer: Literal["adamw", "muon"] = note("adamw", "muon: for inner matrices alone")
    betas: tuple[float, float] = within((0.9, 0.99), 0, 1, "of AdamW")
    weight_decay: float = within(0.01, 0, 10, "on matrices only")
    grad_clip: float = within(1.0, 1e-9, 1e9, "largest norm of the gradient")
    ema: float = within(0.999, 0, 1, "decay of the weight average, which is what is saved")
    # the autoencoder's stages
    quantise_from: int = within(100, 0, 10**9, "first step with a codebook, which is set from data")
    quantised_share: float = within(0.125, 0, 1, "of a batch goes through the codes")
    revive_every: int = within(200, 1, 10**9, "steps after which dead codes are set from data")
    revive_until: float = within(0.7, 0, 1, "share of the steps")
    commitment: float = within(0.1, 0, 1e3, "weight of the commitment loss")
    detail_weight: float = within(0.5, 0, 1e3, "weight of the error where small detail is")
    edge_weight: float = within(0.0, 0, 1e3, "weight of the error of neighbouring differences")
    latent_noise: float = within(0.2, 0, 10, "on decoded latents, in their standard deviations")
    isotropy: float = within(0.01, 0, 1e3, "weight of the latents' anisotropy")
    # the transformer's stages; nothing: what the checkpoint, or the preset, has
    image_loss_weight: float | None = within(None, 0, 1e9, "lambda")
    vision_embedding: Literal["softmax", "argmin", "linear"] | None = note(None, "of base: table 5")
    image_head: Literal["diffusion", "mse", "tokens"] | None = note(None, "of base (appendix C)")
    tau: float | None = within(None, 1e-9, 1e9, "temperature of eq. 4 (nothing: by --mixed-codes)")
    mixed_codes: float = within(200.0, 1, 1e6, "codes that a median latent is to mix, sets tau")
    prediction: Literal["velocity", "epsilon"] | None = note(None, "what the head predicts")
    zero_terminal_snr: bool | None = note(None, "of the noise schedule")
    diffusion_batch_multiplier: int | None = within(None, 1, 1024, "noisings of a latent a step")
    input_noise: float = within(0.0, 0, 10, "on output images as they are read back, in their "
        "standard deviations")
    guidance_dropout: float = within(0.1, 0, 1, "share of prompts for images that lose their text")
    cache_latents: int = within(0, 0, 10**9, "encode so many examples ahead and train from them; 0 "
        "encodes as it goes")
    lora_rank: int = within(0, 0, 2**14, "of posttrain: low-rank training of the transformer; 0 "
        "trains it in full, which at 7b needs a node of GPUs (--dry-run says how much)")
    lora_scale: float = within(2.0, 1e-9, 1e9, "of the low-rank product (elsewhere alpha / rank)")
    lora_targets: tuple[str, ...] = note(lora.TARGETS, "linear layers with a low-rank product "
        f"(default: {' '.join(lora.TARGETS)})")
    checkpoint_activations: bool = note(False, "keep only what enters each layer of the "
        "transformer and compute the rest again for gradients: less memory, a third more time")
    # users' own data, in place of the Shapes world
    data: str = note("", "your own files: PATH[,PATH...], each a file or folder of a --format")
    format: Literal[tuple(FORMATS)] | None = note(None, "of --data (nothing: what it is like)")
    images: str = note("", "the folder that images in --data are named from (nothing: its own)")
    strict: bool = note(False, "stop at the first row of --data that cannot be used")
    # the machine and the log
    device: str = note("auto", "auto, cpu, cuda, ...")
    dtype: Literal["auto", "bfloat16", "float32"] = note("auto", "of matrix products (autocast)")
    threads: int = within(0, 0, 1024, "CPU threads; 0 is one a core")
    workers: int = within(1, 0, 64, "data processes")
    compile: bool = note(False, "torch.compile the transformer and the head")
    log_every: int = within(50, 1, 10**9, "steps a line")
    save_every: int = within(500, 1, 10**9, "steps a save")
    validate_every: int = within(250, 1, 10**9, "steps a validation on held-out examples")
    pictures_every: int = within(2, 0, 10**9, "validations a row of pictures; 0 draws none")
    tensorboard: bool = note(False, "write the log for tensorboard too")

    def __post_init__(self):
        checkpoint.check_fields(self)
        if self.micro_batches > self.batch_size:
            raise ValueError(f"micro_batches is {self.micro_batches}; want at most batch_size, "
                             f"{self.batch_size}")


BATCHES = dict(batch_size=96, micro_batches=3, optimizer="muon")
NANO_BATCHES = dict(batch_size=32, lr=2e-3, optimizer="muon", ema=0.995)
ONE_GPU = dict(checkpoint_activations=True, dtype="bfloat16")
PRESETS = {
    "nano": {
        "vae": dict(steps=1000, batch_size=16, lr=4e-3, optimizer="muon", ema=0.995,
                    latent_noise=0.3, isotropy=0.02, commitment=0.02, edge_weight=4.0),
        "decoder": dict(steps=100, batch_size=16, lr=5e-4, latent_noise=0.3, edge_weight=4.0),
        "chameleon": NANO_BATCHES | dict(seed=1, steps=400, image_loss_weight=1.0),
        "base": NANO_BATCHES | dict(seed=2, steps=150, mixed_codes=50.0),
        "posttrain": NANO_BATCHES | dict(seed=3, steps=1400, batch_size=64, image_loss_weight=2.0,
                                         input_noise=0.25),
    },
    "tiny": {
        "vae": dict(steps=10500, batch_size=32, lr=1.5e-3),
        "decoder": dict(steps=800, batch_size=32, lr=5e-4),
        "chameleon": dict(seed=1, steps=400, image_loss_weight=1.0) | BATCHES,
        "base": dict(seed=2, steps=300, lr=2e-3, optimizer="muon"),
        "posttrain": dict(seed=3, steps=11700, image_loss_weight=5.0, input_noise=0.25) | BATCHES,
    },
    "7b": {  # the paper's settings, in parts of a batch that one GPU holds
        "decoder": dict(steps=15000, batch_size=256, micro_batches=128, lr=1e-5) | ONE_GPU,
        "base": dict(steps=15000, batch_size=32, micro_batches=32, lr=1e-4, tau=1.0,
                     image_loss_weight=1.0) | ONE_GPU,
        "posttrain": dict(steps=35000, batch_size=16, micro_batches=16, lr=1e-5, lora_rank=64,
                          lora_scale=16.0, image_loss_weight=100.0) | ONE_GPU,
    },
}
PICTURES = dict(tasks={"image": 1.0})
FEW = dict(shapes=["circle", "square", "triangle"], digits=0.0,
           colours=["red", "green", "blue", "yellow"])  # fmt: skip
NANO = FEW | dict(max_objects=3)
CROWDED = FEW | PICTURES | dict(min_objects=4)  # more to learn from in a picture
NANO_TASKS = NANO | dict(
    tasks={"text_to_image": 0.4, "understanding": 0.6},
    captions={"one object": 0.4, "colours": 0.6},
    questions={"count": 0.5, "colour": 0.3, "describe": 0.2},
)
WORLDS = {  # the data of each stage: [[from this share of the steps on, fields of ShapesConfig]]
    "nano": {
        "vae": [[0.0, CROWDED]],
        "decoder": [[0.0, CROWDED]],
        "chameleon": [[0.0, NANO_TASKS]],
        "base": [[0.0, NANO | PICTURES]],
        "posttrain": [[0.0, NANO_TASKS]],
    },
    "tiny": {
        "vae": [[0.0, PICTURES]],
        "decoder": [[0.0, PICTURES | {"digits": 0.5}]],
        "chameleon": [[0.0, {}]],
        "base": [[0.0, PICTURES]],
        "posttrain": [
            [0.0, dict(tasks=dict(text_to_image=0.34, understanding=0.28, editing=0.10,
                                  difference=0.06, in_context=0.17, story=0.05))],
            [0.65, {}],
            [0.82, dict(tasks=dict(text_to_image=0.6, understanding=0.12, editing=0.06,
                                   difference=0.02, in_context=0.15, story=0.05))],
        ],
    },
    "7b": {"decoder": [[0.0, PICTURES]], "base": [[0.0, PICTURES]], "posttrain": [[0.0, {}]]},
}  # fmt: skip
UNCONDITIONAL = "Generate an image."
GENERATION = Generation(  # defaults of sample.py for a model that is trained from nothing
    steps=10, cfg_scale=3.0, unconditional=UNCONDITIONAL, image_first=True, max_tokens=128,
    interleaved={"cfg_scale": 2.0, "cfg_image": 2.0}, scale=4,
)
BASE_ALONE = ("vision_embedding", "image_head", "tau", "prediction", "zero_terminal_snr")
READ_BY = {field: stages.split() for stages, fields in {  # fields that some stages alone read
    "vae": "quantise_from quantised_share revive_every revive_until commitment isotropy",
    "vae decoder": "detail_weight edge_weight latent_noise",
    "base": " ".join(BASE_ALONE) + " mixed_codes",
    "posttrain": "lora_rank lora_scale lora_targets",
    "chameleon posttrain": "guidance_dropout",
    "chameleon base posttrain": "image_loss_weight diffusion_batch_multiplier input_noise "
                                "cache_latents compile checkpoint_activations",
}.items() for field in fields.split()}  # fmt: skip


@dataclass
class Stage:
    """What a stage gives to train()."""

    model: nn.Module  # trained where requires_grad
    part: str  # of a checkpoint that it is: "vae" or "model"
    batch: Callable[[data.Dataset, int], list]  # step -> micro-batches, in the data processes
    losses: Callable[[object, int, torch.Generator], dict[str, Tensor]]  # of one; "loss" counts
    config: dict  # sections of the checkpoint's config.json
    vae: VQVAE | None = None  # an autoencoder that stays as it is
    tokenizer: bytes | None = None
    others: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # parts that go along
    before: nn.Module | None = None  # what a resumed run must find as it was at its first step
    after_step: Callable[[int, dict, dict], None] | None = None  # step, optimiser's state, average


# --- Stages: the autoencoder ---------------------------------------------------------------------


def picture_batches(config: TrainConfig, resolution: int, parts: int = 1):
    """dataset, step -> `parts` times (images (B, 3, H, W), where their details are (B, 1, H, W))"""

    def make(dataset: data.Dataset, step: int) -> list[tuple[Tensor, Tensor]]:
        images, details = [], []
        for segments in examples(dataset, step, config.batch_size):
            if not (pictures := [s for s in segments if s.is_image]):
                raise ValueError(f"an example of step {step} has no picture; the stages of the "
                                 "autoencoder want data with one in each")
            segment = pictures[0]
            images.append(data.to_tensor(segment.content, resolution))
            detail = segment.detail or Image.new("L", (1, 1))
            details.append((data.to_tensor(detail, resolution)[:1] + 1) / 2)
        size = math.ceil(len(images) / parts)
        return list(zip(*(torch.stack(t).split(size) for t in (images, details)), strict=True))

    return make


def examples(dataset: data.Dataset, step: int, size: int) -> list[list[Segment]]:
    """The examples of one step; a dataset with a length begins again at its end, in another
    order."""
    indices = range(step * size, (step + 1) * size)
    if hasattr(dataset, "__len__"):
        length = len(dataset)
        indices = [order(length, i // length)[i % length] for i in indices]
    return [dataset.example(int(i)) for i in indices]


@functools.lru_cache(maxsize=2)
def order(length: int, epoch: int) -> np.ndarray:
    """Which example comes when in an epoch: the first one takes them as they come."""
    return np.random.default_rng(epoch).permutation(length) if epoch else np.arange(length)


def reconstruction_loss(images: Tensor, target: Tensor, detail: Tensor, weight: float,
                        edge_weight: float) -> Tensor:
    """Squared and absolute error, (B, 3, H, W) each, and once more the squared error where detail
    (B, 1, H, W) is 1: digits are too few pixels to be learned otherwise. (Make-A-Scene, arXiv
    2203.13131, does the same for faces.) The error of the edges, differences of neighbouring
    pixels, is what tells shapes apart early: without it small nets draw blobs for a long time.
    """
    error = images.float() - target
    small = (error.square() * detail).sum() / (3 * detail.sum()).clamp(min=1)
    edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
    plain = error.square().mean() + 0.1 * error.abs().mean()
    return plain + weight * small + edge_weight * edges


def add_latent_noise(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Noise of `share` standard deviations of the latents, on any shape.

    Without it the encoder may keep what matters (hue, digits) in directions of hardly any variance,
    where a diffusion model cannot hear it: measured, 3 of 64 directions held 76% of the variance.
    With it, what must survive is spread over all directions, and the decoder forgives small errors.
    """
    noise = randn(latents.shape, latents, generator)
    return latents + share * latents.detach().std() * noise


def anisotropy(latents: Tensor) -> Tensor:
    """How far the covariance of latents (B, L, C) is from a multiple of the identity."""
    z = latents.flatten(0, 1)
    z = z - z.mean(0)
    covariance = z.T @ z / z.square().mean() / len(z)
    return (covariance - torch.eye(z.shape[1], device=z.device)).square().sum() / z.shape[1]


def vae_stage(config: TrainConfig, dataset, start: Checkpoint | None, resumed: bool) -> Stage:
    """VQ-VAE: reconstruction + codebook + commitment, dead codes revived.

    Most of every batch skips the quantiser, so that the encoder keeps what the codes cannot hold:
    the continuous latents are what Orthus is after. From a checkpoint an autoencoder goes on: its
    latents stay what they were but where there is detail, for the models that were trained on them.
    """
    if start:
        vae = VQVAE.from_pretrained(start, config.device, torch.float32)
        before = copy.deepcopy(vae).requires_grad_(False).to(memory_format=torch.channels_last)
    else:
        vae, before = VQVAE(VQVAEConfig.preset(config.preset)), None
        vae.init_weights()
    vae.to(config.device, memory_format=torch.channels_last)  # up to twice as fast on a CPU
    quantise_from = 0 if start else config.quantise_from
    weights = config.detail_weight, config.edge_weight

    def losses(batch, step: int, generator) -> dict[str, Tensor]:
        images, detail = batch
        z = vae.encode(images.to(memory_format=torch.channels_last)).float()  # (B, L, C)
        n = math.ceil(len(images) * config.quantised_share) if step >= quantise_from else 0
        q = vae.lookup(vae.quantize(z))
        through = z[:n] + (q - z)[:n].detach()  # the gradient goes straight through the codes
        noisy = add_latent_noise(z[n:], config.latent_noise, generator)
        again = vae.decode(torch.cat([through, noisy]))
        halves = (again[:n], images[:n], detail[:n]), (again[n:], images[n:], detail[n:])
        quantised, continuous = (reconstruction_loss(*h, *weights) if len(h[0]) else
                                 z.new_zeros(()) for h in halves)  # fmt: skip
        share, parts = n / len(images), {"anisotropy": anisotropy(z), "continuous": continuous}
        total = share * quantised + (1 - share) * continuous
        total = total + config.isotropy * parts["anisotropy"]
        if n:
            parts |= {"quantised": quantised, "commitment": F.mse_loss(z, q.detach())}
            total = total + F.mse_loss(q, z.detach()) + config.commitment * parts["commitment"]
        if before is not None:
            z_before = before.encode(images).float()
            plain = 1 - F.max_pool2d(detail, vae.config.downsampling).flatten(2).transpose(1, 2)
            parts["moved"] = ((z - z_before).square() * plain).mean() / z_before.var()
            total = total + parts["moved"]
        return {"loss": total} | parts

    @torch.no_grad()
    def revive(step: int, state: dict, average: dict[str, Tensor]) -> None:
        """Codes that 8192 fresh latents never use take the place of some of these latents."""
        is_first = step == quantise_from - 1
        late = step >= config.revive_until * config.steps
        if not is_first and (late or step % config.revive_every != config.revive_every - 1):
            return
        wanted = math.ceil(8192 / vae.config.latents_per_image / config.batch_size)
        numbers = range(10**9 + step * wanted, 10**9 + (step + 1) * wanted)  # never trained on
        images = torch.cat([batch(dataset, number)[0][0] for number in numbers])
        latents = vae.encode(images.to(config.device)).flatten(0, 1)  # (8192, C)
        codebook = vae.quantize.embedding.weight
        used = torch.bincount(vae.quantize(latents), minlength=len(codebook)) > 0
        dead = torch.ones_like(used) if is_first else ~used
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step))
        order = order.repeat(math.ceil(len(codebook) / len(order)))
        codebook[dead] = latents[order[: int(dead.sum())].to(latents.device)]
        average["quantize.embedding.weight"][dead] = codebook[dead]
        for name, moment in state.get(codebook, {}).items():
            if name != "step":
                moment[dead] = 0
        tqdm.write(f"step {step + 1}: {int(dead.sum())} of {len(codebook)} codes set from data")

    batch = picture_batches(config, vae.config.resolution)
    return autoencoder_stage(start, vae, batch, losses, before=before, after_step=revive)


def decoder_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """Fine-tune the decoder on unquantised latents, the encoder frozen (appendix A)."""
    vae = VQVAE.from_pretrained(start, config.device, torch.float32)
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def losses(batch, step: int, generator) -> dict[str, Tensor]:
        images, detail = batch
        latents = vae.encode(images.to(memory_format=torch.channels_last)).float()
        again = vae.decode(add_latent_noise(latents, config.latent_noise, generator))
        weights = config.detail_weight, config.edge_weight
        share = len(images) / config.batch_size
        return {"loss": share * reconstruction_loss(again, images, detail, *weights)}

    batch = picture_batches(config, vae.config.resolution, config.micro_batches)
    return autoencoder_stage(start, vae, batch, losses)


def autoencoder_stage(start: Checkpoint | None, vae: VQVAE, batch, losses, **more) -> Stage:
    """An autoencoder's stage; the model of the checkpoint that it is from goes along."""
    sections = {"vae": asdict(vae.config)}
    if start is None or "model" not in start.config:
        return Stage(vae, "vae", batch, losses, sections, **more)
    sections |= {name: start.section(name) for name in ("model", "generation")}
    others = {"model": start.tensors("model")}
    tokenizer = start.tokenizer.read_bytes()
    return Stage(vae, "vae", batch, losses, sections, None, tokenizer, others, **more)


# --- Stages: the transformer ---------------------------------------------------------------------


def drop_prompt(segments: list[Segment], unconditional: str, rng: random.Random) -> list[Segment]:
    """What guidance subtracts from (sample.contexts): one of the images to draw, after the prompt's
    images without its text, or after the unconditional sentence alone."""
    pictures = [s for s in segments if s.is_image]
    given, drawn = ([s for s in pictures if s.output == output] for output in (False, True))
    if not given or rng.random() < 0.5:
        given = [Segment(unconditional)]
    return [*given, rng.choice(drawn)]


def sequence_batches(config: TrainConfig, model: OrthusConfig, resolution: int,
                     tokenizer: data.Tokenizer, unconditional: str, images_only: bool):
    """dataset, step -> micro-batches of examples, sorted by length so that little is padding."""
    told = []

    def make(dataset: data.Dataset, step: int) -> list[data.Batch]:
        rng, sequences = random.Random(f"{config.seed} {step}"), []
        for segments in examples(dataset, step, config.batch_size):
            draws = any(s.output and s.is_image for s in segments) and not images_only
            if draws and rng.random() < config.guidance_dropout:
                segments = drop_prompt(segments, unconditional, rng)
            sequences.append(data.layout(segments, tokenizer, model))
        if images_only:  # stage 1 learns nothing from the others
            sequences = [s for s in sequences if model.image_id in s.labels]
        fitting = [s for s in sequences if len(s.tokens) <= model.max_position_embeddings]
        if len(fitting) < len(sequences) and not told:
            told.append(step)  # once in each data process
            tqdm.write(f"warning: {len(sequences) - len(fitting)} of {len(sequences)} examples of "
                       f"step {step} are longer than the context and left out, as others will be")
        if not (sequences := fitting):
            what = "draws no picture or " if images_only else ""
            raise ValueError(f"every example of step {step} {what}is longer than the context, "
                             f"{model.max_position_embeddings} tokens; give others")
        sequences.sort(key=lambda s: len(s.tokens))
        size = math.ceil(len(sequences) / config.micro_batches)
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        batches = [data.collate(part, model, resolution) for part in parts]
        counts = []
        for batch in batches:
            is_image = batch.labels == model.image_id
            if images_only:
                batch.labels[~is_image] = -100  # stage 1 has no text loss
            counts.append((int((~is_image & (batch.labels != -100)).sum()), int(is_image.sum())))
        totals = [max(1, sum(n)) for n in zip(*counts, strict=True)]
        for batch, (text, image) in zip(batches, counts, strict=True):
            batch.shares = text / totals[0], image / totals[1]
        return batches

    return make


def orthus_stage(config: TrainConfig, start: Checkpoint, model: Orthus, tokenizer: bytes,
                 generation: dict, images_only: bool = False) -> Stage:
    """What chameleon, base and posttrain share: examples, and the joint loss."""
    vae = VQVAE.from_pretrained(start, config.device, torch.float32).requires_grad_(False)
    own = model.config
    for name in ("image_loss_weight", "diffusion_batch_multiplier"):
        if getattr(config, name) is not None:
            setattr(own, name, getattr(config, name))
    model.image_head.multiplier = own.diffusion_batch_multiplier

    def losses(part: data.Batch, step: int, generator, levels=(0, 1000)) -> dict[str, Tensor]:
        latents = part.images
        if latents.ndim == 4:
            with torch.no_grad():
                latents = vae.encode(latents.to(memory_format=torch.channels_last))
        latents = latents.float().flatten(0, 1)  # (N, C)
        is_output = part.labels[part.tokens == own.image_id] == own.image_id  # (N,)
        noise, read = randn(latents.shape, latents, generator), latents
        if config.input_noise and len(latents):
            read = latents + config.input_noise * latents.std() * noise * is_output[:, None]
        loss = model.loss(part.tokens, read, part.labels, generator, latents, part.shares, levels)
        terms = {"loss": loss.total, "text": loss.text, "image": loss.image}
        if own.vision_embedding == "softmax":  # how many codes a latent mixes (eq. 4)
            with torch.no_grad():
                mixed = model.vision_embedding.effective_codes(latents[:256]).median()
            terms["codes_mixed"] = mixed.nan_to_num() * part.shares[1]  # NaN is that of no image
        return terms

    for layer in model.layers if config.checkpoint_activations else ():
        keep = dict(use_reentrant=False, preserve_rng_state=False)  # a layer draws no numbers
        layer.forward = functools.partial(recompute, layer.forward, **keep)
    if config.compile:
        model.transformer = torch.compile(model.transformer, dynamic=True)
        model.image_head.forward = torch.compile(model.image_head.forward, dynamic=True)
    words = data.Tokenizer(tokenizer, own)
    sentence = generation.get("unconditional", UNCONDITIONAL)
    batch = sequence_batches(config, own, vae.config.resolution, words, sentence, images_only)
    sections = {"model": asdict(own), "vae": asdict(vae.config), "generation": generation}
    return Stage(model, "model", batch, losses, sections, vae, tokenizer)


class Encoded(list):
    """The first `number` examples of a dataset, their images encoded ahead: what a segment holds
    are latents (L, C), memory-mapped. 64 examples a file of a folder; those of an interrupted run
    are kept."""

    example = list.__getitem__

    def __init__(self, dataset: data.Dataset, number: int, vae: VQVAE, folder: Path, what: dict):
        known, device = folder / "what.json", vae.post_quant_conv.weight.device
        if known.is_file() and checkpoint.read_json(known) != what:
            shutil.rmtree(folder)  # of other data, or another autoencoder
        folder.mkdir(exist_ok=True)
        checkpoint.write_json(known, what)
        size = 64
        for first in tqdm(range(0, number, size), "encoding ahead", unit="batch", delay=2):
            last = min(first + size, number)
            path = folder / f"{first:08d}-{last:08d}.pt"
            if not path.is_file():
                some = [dataset.example(i) for i in range(first, last)]
                pictures = [data.to_tensor(s.content, vae.config.resolution)
                            for segments in some for s in segments if s.is_image]  # fmt: skip
                with torch.no_grad():  # few at once: one of 512 pixels takes 0.7 GB
                    parts = [vae.encode(torch.stack(pictures[i : i + 4]).to(device)).cpu()
                             for i in range(0, len(pictures), 4)]  # fmt: skip
                texts = [[(None if s.is_image else s.content, s.output) for s in segments]
                         for segments in some]  # fmt: skip
                with checkpoint.whole_file(path) as file:
                    torch.save((texts, torch.cat(parts) if parts else torch.zeros(0)), file)
            texts, latents = torch.load(path, mmap=True)
            images = iter(latents)
            self += [[Segment(next(images) if text is None else text, output)
                      for text, output in segments] for segments in texts]  # fmt: skip


def chameleon_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """The discrete ancestor, from scratch: nearest codes in, image tokens out (eq. 1, 2)."""
    sizes = OrthusConfig.preset(config.preset, vision_embedding="argmin", image_head="tokens")
    VQVAEConfig(**start.section("vae")).check_fits(sizes, f"that of {start}")
    model, codebook = Orthus(sizes), start.tensors("vae")["quantize.embedding.weight"]
    model.vision_embedding.codebook.weight.data.copy_(codebook)
    model.vision_embedding.codebook.requires_grad_(False)
    texts = [*dataset.texts(), UNCONDITIONAL]
    pieces = sizes.vocab_size - sizes.image_id  # what the vocabulary has left, and the unknown
    tokenizer = data.train_tokenizer(texts, pieces)
    generation = asdict(dataclasses.replace(GENERATION, words=sorted(data.words_of(texts))))
    return orthus_stage(config, start, model.to(config.device), tokenizer, generation)


@torch.no_grad()
def to_orthus(config: TrainConfig, dataset, start: Checkpoint) -> Orthus:
    """Chameleon -> Orthus-base before training (stage 1): argmin becomes softmax over the same
    codebook and image-token rows, image tokens give way to a diffusion head that outputs zero; or
    what --vision-embedding and --image-head say in their place.

    But for 7b, latent_scale and tau are measured: unit variance for the head, and a median latent
    that mixes mixed_codes codes.
    """
    old = Orthus.from_pretrained(start)
    if old.config.image_head != "tokens":
        raise ValueError(f"base makes an Orthus of a Chameleon; {start} is none: use posttrain")
    given = {n: getattr(config, n) for n in BASE_ALONE if getattr(config, n) is not None}
    wanted = {"vision_embedding": "softmax", "image_head": "diffusion"} | given
    if config.preset != "7b":
        vae = VQVAE.from_pretrained(start, "cpu", torch.float32)
        images = picture_batches(config, vae.config.resolution)(dataset, 10**9)[0][0]
        latents = vae.encode(images).flatten(0, 1)
        wanted["latent_scale"] = 1 / latents.std().item()
        if config.tau is None:
            wanted["tau"] = tau_that_mixes(config.mixed_codes, old, latents)
        tqdm.write(f"latent_scale {wanted['latent_scale']:.4g}, tau {wanted.get('tau', 1):.4g}")
    sizes = dataclasses.replace(old.config, **wanted)
    with torch.device("meta"), checkpoint.Blank():  # the old tensors become the new model's
        model = Orthus(sizes)
    torch.manual_seed(config.seed)
    model.image_head = HEADS[sizes.image_head](sizes, model)
    model.image_head.init_weights()
    if sizes.vision_embedding == "linear":
        model.vision_embedding.projection = nn.Linear(sizes.latent_channels, sizes.hidden_size)
    model.load_state_dict(old.state_dict(), strict=False, assign=True)
    return model


def tau_that_mixes(codes: float, model: Orthus, latents: Tensor) -> float:
    """By bisection, since the mixture widens with tau."""
    low, high = 1e-4, 1e4
    for _ in range(40):
        model.vision_embedding.tau = tau = math.sqrt(low * high)
        median = model.vision_embedding.effective_codes(latents).median()
        low, high = (low, tau) if median > codes else (tau, high)
    return tau


def place(model: Orthus, config: TrainConfig) -> None:
    """On the device, and in fp32 all but frozen matrices, which stay as their checkpoint has them:
    bf16 is what autocast makes of them anyway, in half the memory."""
    frozen = {m.weight for m in model.modules() if isinstance(m, nn.Linear | lora.LowRank)
              and not m.weight.requires_grad and config.dtype != "float32"}  # fmt: skip
    for p in model.parameters():
        p.data = p.data.to(config.device, None if p in frozen else torch.float32)


def base_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """Stage 1: the backbone frozen, vision embedding and image head trained on images only."""
    model = Orthus.from_pretrained(start) if resumed else to_orthus(config, dataset, start)
    model.requires_grad_(False)
    model.vision_embedding.requires_grad_(True)
    model.image_head.requires_grad_(True)
    model.embed_tokens.requires_grad_(model.config.vision_embedding != "linear")
    place(model, config)
    # of the table the w_j alone are trained: text is looked up as it is
    model.embed_tokens.register_forward_hook(lambda *call: call[-1].detach())
    generation = start.section("generation")
    if config.preset == "7b":  # Chameleon becomes Orthus
        generation |= {"cfg_scale": 5.0, "image_first": True}
    tokenizer = start.tokenizer.read_bytes()
    return orthus_stage(config, start, model, tokenizer, generation, images_only=True)


def posttrain_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """Stage 2: everything but the autoencoder, on all tasks; the transformer's layers by lora.py
    where there is a rank."""
    model = Orthus.from_pretrained(start, config.device)
    if config.lora_rank:
        lora.add(model.layers, config.lora_rank, config.lora_scale, config.lora_targets)
    place(model, config)
    tokenizer, generation = start.tokenizer.read_bytes(), start.section("generation")
    if config.data and generation.get("words"):  # a small model that will know more of them
        generation["words"] = sorted({*generation["words"], *data.words_of(dataset.texts())})
    return orthus_stage(config, start, model, tokenizer, generation)


STAGES = {
    "vae": vae_stage,
    "decoder": decoder_stage,
    "chameleon": chameleon_stage,
    "base": base_stage,
    "posttrain": posttrain_stage,
}
