"""Training: the road from nothing to Orthus, one stage a command.

    vae         the autoencoder, as a VQ-VAE                                  (Chameleon's)
    decoder     its decoder on continuous latents, the encoder frozen         (appendix A)
    chameleon   the discrete ancestor: argmin embedding, image tokens         (eq. 1, 2)
    base        stage 1: softmax embedding and diffusion head, images only    (eq. 3, 4)
    posttrain   stage 2: everything but the autoencoder, L_ar + lambda L_diff
    all         the whole road into one directory
    curves      loss curves of runs, as a picture

A run is a folder: run.json (what it runs with), log.jsonl, samples.png, and saves step-00000500/
that appear when they are whole, the last two kept: checkpoints of the averaged weights, with a
state.pt from which --resume goes on exactly. Data and noise depend on (seed, step) alone.
Reading order: TrainConfig and PRESETS, the stages, optimisers, runs and saves, then train().
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
from checkpoint import Checkpoint, within
from data import Segment
from orthus import HEADS, DiffusionHead, Orthus, OrthusConfig, randn
from sample import Generation, Pipeline, Request, generate, pick_device
from shapes import Shapes, ShapesConfig, shapes_texts
from vae import VQVAE, VQVAEConfig


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
NANO_BATCHES = dict(lr=2e-3, optimizer="muon", ema=0.995)
PRESETS = {
    "nano": {
        "vae": dict(steps=1000, batch_size=16, lr=4e-3, optimizer="muon", ema=0.995,
                    latent_noise=0.15, isotropy=0.02, commitment=0.02, edge_weight=4.0),
        "decoder": dict(steps=100, batch_size=16, lr=5e-4, latent_noise=0.15, edge_weight=4.0),
        "chameleon": dict(seed=1, steps=300, image_loss_weight=1.0) | NANO_BATCHES,
        "base": dict(seed=2, steps=150, mixed_codes=50.0) | NANO_BATCHES,
        "posttrain": dict(seed=3, steps=2000, image_loss_weight=2.0, input_noise=0.25)
        | NANO_BATCHES,
    },
    "tiny": {
        "vae": dict(steps=10500, batch_size=32, lr=1.5e-3),
        "decoder": dict(steps=800, batch_size=32, lr=5e-4),
        "chameleon": dict(seed=1, steps=400, image_loss_weight=1.0) | BATCHES,
        "base": dict(seed=2, steps=300, lr=2e-3, optimizer="muon"),
        "posttrain": dict(seed=3, steps=11700, image_loss_weight=5.0, input_noise=0.25) | BATCHES,
    },
    "7b": {  # the paper's settings
        "decoder": dict(steps=15000, batch_size=256, lr=1e-5),
        "base": dict(steps=15000, batch_size=32, lr=1e-4, tau=1.0),
        "posttrain": dict(steps=35000, batch_size=16, lr=1e-5, image_loss_weight=100.0),
    },
}
PICTURES = dict(tasks={"image": 1.0})
NANO = dict(max_objects=3, digits=0.0)
CROWDED = PICTURES | dict(min_objects=4, digits=0.0)  # more to learn from in a picture
NANO_TASKS = NANO | dict(
    tasks={"text_to_image": 0.5, "understanding": 0.5},
    captions={"one object": 0.4, "colours": 0.6},
    questions={"count": 0.4, "colour": 0.4, "describe": 0.2},
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
    before: nn.Module | None = None  # what a resumed run must find as it was at its first step
    after_step: Callable[[int, "Optimizers", dict], None] | None = None


# --- Stages: the autoencoder ---------------------------------------------------------------------


def picture_batches(config: TrainConfig, resolution: int):
    """dataset, step -> [(images (B, 3, H, W), where their details are (B, 1, H, W))]."""

    def make(dataset: data.Dataset, step: int) -> list[tuple[Tensor, Tensor]]:
        images, details = [], []
        for segment in examples(dataset, step, config.batch_size, first_picture):
            images.append(data.to_tensor(segment.content, resolution))
            detail = segment.detail or Image.new("L", (1, 1))
            details.append((data.to_tensor(detail, resolution)[:1] + 1) / 2)
        return [(torch.stack(images), torch.stack(details))]

    return make


def first_picture(segments: list[Segment]) -> Segment:
    return next(s for s in segments if s.is_image)


def examples(dataset: data.Dataset, step: int, size: int, of=lambda segments: segments) -> list:
    """The examples of one step; a dataset with a length begins again at its end, in another
    order."""
    indices = range(step * size, (step + 1) * size)
    if hasattr(dataset, "__len__"):
        length = len(dataset)
        indices = [order(length, i // length)[i % length] for i in indices]
    return [of(dataset.example(int(i))) for i in indices]


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
        vae.to(config.device)
    vae.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU
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
    def revive(step: int, optimizer: "Optimizers", average: dict[str, Tensor]) -> None:
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
        for name, moment in optimizer.state(codebook).items():
            if name != "step":
                moment[dead] = 0
        tqdm.write(f"step {step + 1}: {int(dead.sum())} of {len(codebook)} codes set from data")

    batch = picture_batches(config, vae.config.resolution)
    sections = {"vae": asdict(vae.config)}
    return Stage(vae, "vae", batch, losses, sections, before=before, after_step=revive)


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
        return {"loss": reconstruction_loss(again, images, detail, *weights)}

    batch = picture_batches(config, vae.config.resolution)
    return Stage(vae, "vae", batch, losses, {"vae": asdict(vae.config)})


# --- Stages: the transformer ---------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Part of a step's examples, and its shares of their text and image targets. images holds
    pictures (N, 3, H, W), or latents (N, L, C) that were encoded ahead."""

    tokens: Tensor
    labels: Tensor
    images: Tensor
    shares: tuple[float, float]


def drop_prompt(segments: list[Segment], rng: random.Random) -> list[Segment]:
    """What guidance subtracts from (sample.contexts): one of the images to draw, after the prompt's
    images without its text, or after the unconditional sentence alone."""
    pictures = [s for s in segments if s.is_image]
    given, drawn = ([s for s in pictures if s.output == output] for output in (False, True))
    if not given or rng.random() < 0.5:
        given = [Segment(UNCONDITIONAL)]
    return [*given, rng.choice(drawn)]


def sequence_batches(config: TrainConfig, model: OrthusConfig, resolution: int,
                     tokenizer: data.Tokenizer, images_only: bool):
    """dataset, step -> micro-batches of examples, sorted by length so that little is padding."""

    def make(dataset: data.Dataset, step: int) -> list[MicroBatch]:
        rng, sequences = random.Random(f"{config.seed} {step}"), []
        for segments in examples(dataset, step, config.batch_size):
            draws = any(s.output and s.is_image for s in segments) and not images_only
            if draws and rng.random() < config.guidance_dropout:
                segments = drop_prompt(segments, rng)
            sequences.append(data.layout(segments, tokenizer, model))
        sequences.sort(key=lambda s: len(s.tokens))
        size = math.ceil(len(sequences) / config.micro_batches)
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        batches = [collate(part, model, resolution, dataset) for part in parts]
        counts = []
        for batch in batches:
            is_image = batch.labels == model.image_id
            if images_only:
                batch.labels[~is_image] = -100  # stage 1 has no text loss
            counts.append((int((~is_image & (batch.labels != -100)).sum()), int(is_image.sum())))
        totals = [max(1, sum(n)) for n in zip(*counts, strict=True)]
        return [MicroBatch(b.tokens, b.labels, b.images, (t / totals[0], i / totals[1]))
                for b, (t, i) in zip(batches, counts, strict=True)]  # fmt: skip

    return make


def collate(sequences: list[data.Sequence], model: OrthusConfig, resolution: int, dataset):
    """data.collate; where latents were encoded ahead, images holds them."""
    if not isinstance(dataset, Encoded):
        return data.collate(sequences, model, resolution)
    numbers = [number for s in sequences for number in s.images]
    batch = data.collate([dataclasses.replace(s, images=[]) for s in sequences], model, resolution)
    batch.images = torch.from_numpy(dataset.latents[numbers])
    return batch


def orthus_stage(config: TrainConfig, start: Checkpoint, model: Orthus, tokenizer: bytes,
                 generation: dict, images_only: bool = False) -> Stage:
    """What chameleon, base and posttrain share: examples, and the joint loss."""
    vae = VQVAE.from_pretrained(start, config.device, torch.float32).requires_grad_(False)
    own = model.config
    for name in ("image_loss_weight", "diffusion_batch_multiplier"):
        if getattr(config, name) is not None:
            setattr(own, name, getattr(config, name))
    model.image_head.multiplier = own.diffusion_batch_multiplier
    reserved = frozenset(v for k, v in vars(own).items() if k.endswith("_id"))
    codes = range(own.image_code_start, own.image_code_start + own.num_codes)
    words = data.Tokenizer(tokenizer, own.image_id + 1, own.unk_id, reserved | {*codes})

    def losses(micro: MicroBatch, step: int, generator, *levels) -> dict[str, Tensor]:
        latents = micro.images
        if latents.ndim == 4:
            with torch.no_grad():
                latents = vae.encode(latents.to(memory_format=torch.channels_last))
        latents = latents.float().flatten(0, 1)  # (N, C)
        is_output = micro.labels[micro.tokens == own.image_id] == own.image_id  # (N,)
        noise = config.input_noise * latents.std() * randn(latents.shape, latents, generator)
        read = latents + noise * is_output[:, None] if config.input_noise else latents
        more = latents, micro.shares, *levels
        loss = model.loss(micro.tokens, read, micro.labels, generator, *more)
        parts = {"loss": loss.total, "text": loss.text, "image": loss.image}
        if own.vision_embedding == "softmax":  # how many codes a latent mixes (eq. 4)
            with torch.no_grad():
                mixed = model.vision_embedding.effective_codes(latents[:256]).median()
            parts["codes_mixed"] = mixed * len(micro.tokens) / config.batch_size
        return parts

    if config.compile:
        model.transformer = torch.compile(model.transformer, dynamic=True)
        model.image_head.forward = torch.compile(model.image_head.forward, dynamic=True)
    batch = sequence_batches(config, own, vae.config.resolution, words, images_only)
    sections = {"model": asdict(own), "vae": asdict(vae.config), "generation": generation}
    return Stage(model, "model", batch, losses, sections, vae, tokenizer)


class Encoded:
    """The first `number` examples of a dataset, their images encoded ahead: an image's content is
    its place in `latents` (images, L, C), memory-mapped from a folder. What an interrupted run had
    encoded is kept."""

    def __init__(self, dataset: data.Dataset, number: int, vae: VQVAE, folder: Path, what: dict):
        known = folder / "what.json"
        if known.is_file() and checkpoint.read_json(known) != what:
            shutil.rmtree(folder)  # of other data, or another autoencoder
        folder.mkdir(exist_ok=True)
        checkpoint.write_json(known, what)
        shape = (vae.config.latents_per_image, vae.config.latent_channels)
        device, size, bytes_each = vae.post_quant_conv.weight.device, 64, 4 * math.prod(shape)
        with open(folder / "examples.jsonl", "a+b") as text, open(folder / "latents", "a+b") as raw:
            text.seek(0)
            lines = [line for line in text.read().split(b"\n")[:-1]]
            images = sum(c is None for line in lines for c, _ in json.loads(line))
            text.truncate(sum(len(line) + 1 for line in lines))
            raw.truncate(images * bytes_each)
            bar = tqdm(range(len(lines), number, size), "encoding ahead", unit="batch")
            for first in bar:
                some = [dataset.example(i) for i in range(first, min(first + size, number))]
                pictures = [s.content for segments in some for s in segments if s.is_image]
                tensors = [data.to_tensor(p, vae.config.resolution) for p in pictures]
                with torch.no_grad():
                    for some_images in torch.stack(tensors).split(size) if tensors else ():
                        raw.write(vae.encode(some_images.to(device)).cpu().numpy().tobytes())
                raw.flush()  # first, so that no line is without its latents
                new = [json.dumps([[None if s.is_image else s.content, s.output] for s in segments])
                       for segments in some]  # fmt: skip
                lines += [line.encode() for line in new]
                text.write("".join(line + "\n" for line in new).encode())
                text.flush()
        self.segments, count = [], iter(range(10**12))
        for line in lines[:number]:
            pairs = ((next(count) if c is None else c, output) for c, output in json.loads(line))
            self.segments.append([Segment(*pair) for pair in pairs])
        self.latents = np.memmap(folder / "latents", np.float32, "r").reshape(-1, *shape)

    def __len__(self) -> int:
        return len(self.segments)

    def example(self, index: int) -> list[Segment]:
        return self.segments[index]


def chameleon_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """The discrete ancestor, from scratch: nearest codes in, image tokens out (eq. 1, 2)."""
    sizes = OrthusConfig.preset(config.preset, vision_embedding="argmin", image_head="tokens")
    fields, vae = start.section("vae"), start.tensors("vae")
    fields = fields | {"latents_per_image": VQVAEConfig(**fields).latents_per_image}
    for name in ("num_codes", "latent_channels", "latents_per_image"):
        if fields[name] != getattr(sizes, name):
            raise ValueError(f"{name} is {fields[name]} in the autoencoder of {start}, but "
                             f"{getattr(sizes, name)} in preset {config.preset}; give one of that")
    model = Orthus(sizes)
    model.vision_embedding.codebook.weight.data.copy_(vae["quantize.embedding.weight"])
    model.vision_embedding.codebook.requires_grad_(False)
    texts = [*dataset.texts(), UNCONDITIONAL]
    pieces = sizes.vocab_size - sizes.image_id  # what the vocabulary has left, and the unknown
    tokenizer = data.train_tokenizer(texts, pieces)
    words = sorted({word.strip(".,?!") for text in texts for word in text.split()})
    generation = asdict(dataclasses.replace(GENERATION, words=words))
    return orthus_stage(config, start, model.to(config.device), tokenizer, generation)


@torch.no_grad()
def to_orthus(config: TrainConfig, dataset, start: Checkpoint) -> Orthus:
    """Chameleon -> Orthus-base before training (stage 1): argmin becomes softmax over the same
    codebook and image-token rows, image tokens give way to a diffusion head that outputs zero; or
    what --vision-embedding and --image-head say in their place.

    But for 7b, latent_scale and tau are measured: unit variance for the head, and a median latent
    that mixes mixed_codes codes.
    """
    old = Orthus.from_pretrained(start, "cpu", torch.float32)
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


def base_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """Stage 1: the backbone frozen, vision embedding and image head trained on images only."""
    model = Orthus.from_pretrained(start) if resumed else to_orthus(config, dataset, start)
    model.to(config.device).requires_grad_(False)
    model.vision_embedding.requires_grad_(True)
    model.image_head.requires_grad_(True)
    if model.config.vision_embedding != "linear":
        model.embed_tokens.requires_grad_(True)
        is_code = torch.zeros(model.config.vocab_size, 1, device=config.device)
        first = model.config.image_code_start
        is_code[first : first + model.config.num_codes] = 1  # the w_j alone, no text row
        model.embed_tokens.weight.register_hook(lambda gradient: gradient * is_code)
    generation = start.section("generation")
    if config.preset == "7b":  # Chameleon becomes Orthus
        generation |= {"cfg_scale": 5.0, "image_first": True}
    tokenizer = start.tokenizer.read_bytes()
    return orthus_stage(config, start, model, tokenizer, generation, images_only=True)


def posttrain_stage(config: TrainConfig, dataset, start: Checkpoint, resumed: bool) -> Stage:
    """Stage 2: everything but the autoencoder, on all tasks."""
    model = Orthus.from_pretrained(start, config.device, torch.float32)
    tokenizer, generation = start.tokenizer.read_bytes(), start.section("generation")
    return orthus_stage(config, start, model, tokenizer, generation)


STAGES = {
    "vae": vae_stage,
    "decoder": decoder_stage,
    "chameleon": chameleon_stage,
    "base": base_stage,
    "posttrain": posttrain_stage,
}


# --- Optimisers, schedule, average ---------------------------------------------------------------


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The Newton-Schulz iteration of Muon (kellerjordan.github.io/posts/muon): (rows, columns) ->
    nearly the nearest matrix with orthonormal rows or columns, in the matrix's own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices (convolutions as (out, in * 9)) are orthogonalised, scaled to the
    size of AdamW's steps. dtype: of the products; PyTorch's own always takes bf16, which a CPU
    without bf16 units computes forty times slower."""

    def __init__(self, parameters, lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95).flatten(1)  # Nesterov's
                scale = 0.2 * math.sqrt(max(update.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = orthogonalise(update.to(self.dtype)).to(p.dtype).view_as(p)
                p.add_(update, alpha=-group["lr"] * scale)


class Optimizers:
    """Several optimizers as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()
            part.zero_grad()

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of one parameter; empty before its first step."""
        return next((p.state[parameter] for p in self.parts if parameter in p.state), {})

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def make_optimizer(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> Optimizers:
    """AdamW over what requires a gradient; weight decay on the matrices of linear layers and
    convolutions, not on embeddings, norms and biases. With "muon", the matrices between embeddings
    and outputs are Muon's."""
    ends = ("lm_head", "image_head.final_layer.linear", "encoder.conv_in", "decoder.conv_out")
    matrices = {id(m.weight): n not in ends for n, m in model.named_modules()
                if isinstance(m, (nn.Linear, nn.Conv2d))}  # fmt: skip
    inner = {i for i, is_inner in matrices.items() if is_inner and config.optimizer == "muon"}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices.keys() - inner]},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    options = dict(lr=config.lr, weight_decay=config.weight_decay)
    parts = [torch.optim.AdamW(groups, betas=config.betas, fused=True, **options)]
    if orthogonal := [p for p in trained if id(p) in inner]:
        parts.append(Muon(orthogonal, dtype=dtype, **options))
    return Optimizers(parts)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """average <- decay average + (1 - decay) weights; the decay warms up from 0.1."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch._foreach_lerp_([average[n] for n in weights], list(weights.values()), 1 - decay)


# --- Runs and their saves ------------------------------------------------------------------------


def save(run: Path, stage: Stage, optimizer: Optimizers, average: dict, step: int, about: dict):
    """A new folder step-..., there when it is whole; the last two are kept."""
    part, whole = run / "saving", run / f"step-{step:08d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    tensors = {"model": None, "vae": stage.vae.state_dict() if stage.vae else None}
    checkpoint.write(part, stage.config | about, **(tensors | {stage.part: average}),
                     tokenizer=stage.tokenizer)  # fmt: skip
    state = {"step": step, "weights": stage.model.state_dict(), "average": average,
             "optimizer": optimizer.state_dict()}  # fmt: skip
    if stage.before:
        state["before"] = stage.before.state_dict()
    with checkpoint.whole_file(part / "state.pt") as file:
        torch.save(state, file)
    with checkpoint.whole_file(part / "state.sha256") as file:
        file.write(digest(part / "state.pt").encode())
    if whole.exists():
        shutil.rmtree(whole)
    os.replace(part, whole)
    for old in sorted(run.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_save(run: Path) -> Path | None:
    return max(run.glob("step-*"), default=None)


def read_state(saved: Path, device) -> dict:
    path = saved / "state.pt"
    if not path.is_file() or not (saved / "state.sha256").is_file():
        raise ValueError(f"{saved} has no state.pt with its state.sha256; it cannot be resumed")
    if digest(path) != (saved / "state.sha256").read_text():
        raise ValueError(f"{path} is damaged (its checksum is another); remove {saved} and resume "
                         "from the save before it")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # whatever unpickling what is no archive of tensors may raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is no state of a run ({reason:.80}); remove {saved}") from None


def restore(state: dict, saved: Path, stage: Stage, optimizer: Optimizers) -> tuple[dict, int]:
    """Put a stage back where it was saved -> the average, and the next step."""
    try:
        stage.model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if stage.before:
            stage.before.load_state_dict(state["before"])
        average = {n: state["average"][n].clone() for n, _ in stage.model.named_parameters()}
        return average, state["step"]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{saved / 'state.pt'} does not fit this run ({reason:.80}); remove "
                         f"{saved} to go on from the save before it") from None


def keep_log(path: Path, step: int) -> None:
    """Drop what a run logged past the save it goes on from."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with checkpoint.whole_file(path) as file:
            file.write("".join(kept).encode())


# --- Validation ----------------------------------------------------------------------------------


class Validation:
    """A fixed batch of held-out examples, and fixed prompts with their seeds."""

    def __init__(self, stage: Stage, config: TrainConfig, held_out: data.Dataset):
        self.stage, self.config, self.held_out = stage, config, held_out
        self.batch = stage.batch(held_out, 0)
        some = [held_out.example(i) for i in range(200)]
        draws = [s for s in some if s[-1].is_image and len(s) > 1 and not s[0].is_image][:8]
        self.prompts = [[s for s in segments if not s.output] for segments in draws]

    @torch.no_grad()
    def losses(self, autocast) -> dict[str, float]:
        """Of the current weights; for a diffusion head also by quarter of the noise levels."""
        sums, stage, device = {}, self.stage, self.config.device
        ranges = {"": ()}  # name: further arguments of the stage's losses
        if isinstance(getattr(stage.model, "image_head", None), DiffusionHead):
            ranges |= {f"_t{low}": ((low, low + 250),) for low in range(0, 1000, 250)}
        for name, levels in ranges.items():
            generator = torch.Generator(device).manual_seed(0)
            for micro in self.batch:
                with autocast:
                    losses = stage.losses(to(micro, device), 10**9, generator, *levels)
                for key in losses.keys() - {"codes_mixed"} if not name else ["image"]:
                    key_of = f"held_out_{key}{name}"
                    sums[key_of] = sums.get(key_of, 0.0) + losses[key].item()
        return sums

    def pictures(self, average: dict[str, Tensor], path: Path, step: int, number: int) -> None:
        """Row `number` of the sheet: the fixed prompts, drawn by the averaged weights."""
        raw = {n: p.detach().clone() for n, p in self.stage.model.named_parameters()}
        own, words = self.stage.model.config, self.stage.tokenizer
        tokenizer = data.Tokenizer(words, own.image_id + 1, own.unk_id)
        defaults = Generation(**self.stage.config["generation"])
        pipeline = Pipeline(self.stage.model, self.stage.vae, tokenizer, defaults)
        self.stage.model.load_state_dict(average, strict=False)
        requests = [Request(prompt, seed) for seed, prompt in enumerate(self.prompts)]
        answers = generate(pipeline, requests, progress=False, min_images=1, max_images=1)
        self.stage.model.load_state_dict(raw, strict=False)
        cells = [(a.images[0], f"{step}: {p[0].content}", "black")
                 for a, p in zip(answers, self.prompts, strict=True)]  # fmt: skip
        rows = [data.sheet([cells], (96, 96))]
        if path.is_file() and number:  # a resumed run may have drawn this row before
            above = data.open_image(path)
            rows.insert(0, above.crop((0, 0, above.width, number * rows[0].height)))
        page = Image.new("RGB", (rows[-1].width, sum(row.height for row in rows)), "white")
        for i, row in enumerate(rows):
            page.paste(row, (0, sum(r.height for r in rows[:i])))
        with checkpoint.whole_file(path) as file:
            page.save(file, "PNG")


# --- The loop ------------------------------------------------------------------------------------


def asdict(config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists, as JSON has them


def to(batch, device):
    """A micro-batch, or a tuple of tensors, on a device."""
    if isinstance(batch, MicroBatch):
        parts = (getattr(batch, name).to(device) for name in ("tokens", "labels", "images"))
        return MicroBatch(*parts, batch.shares)
    return tuple(part.to(device) for part in batch)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 products natively; elsewhere they are many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    natively = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and natively


def choose_machine(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the products; one line says which and why."""
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    native = has_fast_bf16(device)
    name = config.dtype if config.dtype != "auto" else "bfloat16" if native else "float32"
    why = f"bf16 is {'' if native else 'not '}native here" if config.dtype == "auto" else "as asked"
    tqdm.write(f"device {device}, {name} products ({why}), optimizer {config.optimizer}, "
               f"{torch.get_num_threads()} CPU threads")
    return device, getattr(torch, name)


class Stopped(Exception):
    """SIGTERM: the run was saved and ends well."""


def train(name: str, config: TrainConfig, dataset: data.Dataset, held_out: data.Dataset,
          run: Path, start: Checkpoint | None, about: dict, saved: Path | None = None) -> None:
    """Run one stage to its last step, in the folder `run`, or on from a save of it, which then is
    what it starts from.

    `about` goes into the config.json of every save ("data": what the dataset is).
    """
    device, dtype = choose_machine(config)
    config = dataclasses.replace(config, device=str(device))
    state = read_state(saved, device) if saved else None
    torch.manual_seed(config.seed)
    stage = STAGES[name](config, dataset, start, saved is not None)
    model, optimizer = stage.model, make_optimizer(stage.model, config, dtype)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = 0
    if state:
        average, first = restore(state, saved, stage, optimizer)
    keep_log(run / "log.jsonl", first)
    if stage.vae and (config.cache_latents or hasattr(dataset, "__len__")):
        number = config.cache_latents or len(dataset)
        encoder = sum(p.sum().item() for p in stage.vae.parameters())
        what = about | {"seed": config.seed, "sum of the autoencoder's weights": encoder}
        dataset = Encoded(dataset, number, stage.vae, run / "encoded", what)
    validation = Validation(stage, config, held_out)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    loader = iter(DataLoader(
        Steps(stage.batch, dataset), batch_size=None, sampler=range(first, config.steps),
        num_workers=config.workers, prefetch_factor=8 if config.workers else None,
        multiprocessing_context="fork" if config.workers else None, worker_init_fn=leave_signals,
    ))
    log, stopping = Log(run, name, config), []
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    generator = torch.Generator(device)
    try:
        for step in tqdm(range(first, config.steps), name, initial=first, total=config.steps):
            waited = time.time()
            batch = next(loader)
            waited = time.time() - waited
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            generator.manual_seed(config.seed * 2**32 + step)
            sums = {}
            for micro in batch:
                with autocast:
                    losses = stage.losses(to(micro, device), step, generator)
                losses["loss"].backward()
                sums = {key: sums.get(key, 0) + value.detach() for key, value in losses.items()}
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            update_average(average, model, config.ema, step)
            if stage.after_step:
                stage.after_step(step, optimizer, average)
            log.add(sums | {"grad_norm": norm}, batch, waited)
            done = step + 1
            saves = done % config.save_every == 0 or done == config.steps or bool(stopping)
            checks = done % config.validate_every == 0 or done == config.steps
            if saves or checks or done % config.log_every == 0:  # before saving: a NaN raises
                log.write(done, learning_rate(config, step),
                          validation.losses(autocast) if checks else {})  # fmt: skip
            pictures = config.pictures_every * config.validate_every
            if pictures and stage.vae and done % pictures == 0 and validation.prompts:
                number = done // pictures - 1
                validation.pictures(average, run / "samples.png", done, number)
            if saves:
                save(run, stage, optimizer, average, done, about)
            if stopping and done < config.steps:
                raise Stopped
    except (KeyboardInterrupt, ValueError, OSError):
        saved = newest_save(run)
        where = f"goes on from {saved}" if saved else "begins anew, as nothing was saved yet"
        tqdm.write(f"--resume {where}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_signals(worker: int) -> None:
    """A signal to the whole group is for the training process; workers end when it does."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class Steps:
    """Makes batch number i in a data process."""

    def __init__(self, make: Callable[[data.Dataset, int], list], dataset: data.Dataset):
        self.make, self.dataset = make, dataset

    def __getitem__(self, step: int) -> list:
        return self.make(self.dataset, step)


class Log:
    """Means over the steps since the last line, on the screen and in log.jsonl."""

    def __init__(self, run: Path, stage: str, config: TrainConfig):
        self.run, self.stage, self.config, self.writer = run, stage, config, None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard wants: pip install tensorboard") from None
            self.writer = SummaryWriter(run)
        self.begin()

    def begin(self) -> None:
        self.sums, self.steps, self.tokens, self.waited = {}, 0, 0, 0.0
        self.started = time.time()

    def add(self, values: dict[str, Tensor], batch: list, waited: float) -> None:
        for key, value in values.items():
            self.sums.setdefault(key, []).append(value)
        self.steps, self.waited = self.steps + 1, self.waited + waited
        self.tokens += sum(b.tokens.numel() for b in batch if isinstance(b, MicroBatch))

    def write(self, step: int, lr: float, more: dict[str, float]) -> None:
        means = {key: torch.stack(v).float().mean().item() for key, v in self.sums.items()} | more
        seconds = time.time() - self.started
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            raise ValueError(f"the loss is {means['loss']} by step {step}; begin again with a "
                             "lower --lr, or go on from a save with --resume")
        means |= {"examples_per_second": self.steps * self.config.batch_size / seconds,
                  "tokens_per_second": self.tokens / seconds, "waiting": self.waited / seconds}
        said = " ".join(f"{key} {value:.4g}" for key, value in means.items())
        tqdm.write(f"{self.stage} {step} lr {lr:.3g} {said}")
        with open(self.run / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": self.stage, "step": step, "lr": lr} | means) + "\n")
        if self.writer:
            for key, value in means.items():
                self.writer.add_scalar(f"{self.stage}/{key}", value, step)
            self.writer.flush()
        self.begin()


# --- Command line --------------------------------------------------------------------------------


def keep_memory() -> None:
    """Tell glibc to keep freed memory: page faults cost up to half of a CPU training step."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim, top pad
            libc.mallopt(option, value)


class Schedule:
    """Shapes worlds one after the other: worlds [[share of the steps, fields of ShapesConfig]]."""

    def __init__(self, worlds: list, config: TrainConfig, seed: int):
        self.begins = [round(share * config.steps) * config.batch_size for share, _ in worlds]
        self.worlds = [Shapes(seed, ShapesConfig(**fields)) for _, fields in worlds]

    def example(self, index: int) -> list[Segment]:
        number = sum(begin <= index for begin in self.begins) - 1
        return self.worlds[number].example(index)

    def texts(self) -> list[str]:
        return [text for world in self.worlds for text in shapes_texts(world.config)]


BASE_ALONE = ("vision_embedding", "image_head", "tau", "prediction", "zero_terminal_snr")


def settings(name: str, run: Path, given: dict, resume: bool) -> tuple[TrainConfig, list, str]:
    """-> config, worlds and init of a run: flags over what a resumed run has, over the preset."""
    preset, fields = given.get("preset", "tiny"), {f.name for f in dataclasses.fields(TrainConfig)}
    before = {"init": "", "config": {"preset": preset}}
    if resume:
        before = checkpoint.read_json(run / "run.json")
        if before.get("stage") != name or not before.get("world"):
            raise ValueError(f"{run} is a run of stage {before.get('stage')!r}, not {name}")
    elif name not in PRESETS.get(preset, {}):
        known = ", ".join(p for p in PRESETS if name in PRESETS[p])
        raise ValueError(f"preset {preset!r} has no stage {name}; known: {known}")
    else:
        before["config"] |= PRESETS[preset][name]
        before["world"] = WORLDS[preset][name]
    own = {key: value for key, value in given.items() if key in fields}
    if name != "base" and (wrong := [key for key in BASE_ALONE if key in own]):
        raise ValueError(f"{wrong[0]} is set in stage base, where a Chameleon becomes an Orthus; "
                         f"stage {name} keeps what the checkpoint has")
    world = {key: value for key, value in given.items() if key not in (*fields, "init")}
    try:
        config = checkpoint.build(TrainConfig, before["config"] | own, f"stage {name}")
        worlds = [[float(share), asdict(checkpoint.build(ShapesConfig, w | world, "the world"))]
                  for share, w in before["world"]]  # fmt: skip
        return config, worlds, given.get("init") or before["init"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run / 'run.json'} is not what a run writes ({error}); begin another "
                         "with another --out") from None


def check_size(start: Checkpoint, preset: str) -> None:
    """A checkpoint of one preset's size is not trained with another's settings."""
    part = ("model", "hidden_size", OrthusConfig), ("vae", "base_channels", VQVAEConfig)
    section, name, kind = part["model" not in start.config]
    value = start.section(section)[name]
    fitting = [p for p in PRESETS if getattr(kind.preset(p), name) == value]
    if fitting and preset not in fitting:
        raise ValueError(f"{start} has the size of preset {fitting[0]}, not {preset} ({name} is "
                         f"{value}); give --preset {fitting[0]}")


def start_run(name: str, out: str, given: dict, resume: bool) -> None:
    """Check what is cheap to check, write run.json, and train; one process a folder."""
    if not out:
        raise ValueError("--out is empty; give a directory for the run")
    run = Path(out)
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file; give a directory for the run")
    is_run = (run / "run.json").is_file()
    if resume and not is_run:
        raise ValueError(f"{run} holds no run to resume; leave out --resume")
    if not resume and run.is_dir() and (found := [p for p in run.iterdir() if p.name != ".lock"]):
        raise ValueError(f"{run} holds a run already; give --resume or another --out" if is_run else
                         f"{run} is not empty ({found[0].name}); give another --out")
    config, worlds, init = settings(name, run, given, resume)
    saved = newest_save(run)
    if saved and config.steps <= int(saved.name[5:]):
        raise ValueError(f"{run} is at step {int(saved.name[5:])} of {config.steps}; raise --steps")
    if name != "vae" and not (init or saved):
        raise ValueError(f"stage {name} starts from a checkpoint: give --init DIR")
    begun_from_nothing = name == "vae" and not init
    start = None if begun_from_nothing else checkpoint.open_checkpoint(saved or init)
    if start and name != "vae" and config.preset != "7b":
        checkpoint.build(VQVAEConfig, start.section("vae"), start)
    if start:
        check_size(start, config.preset)
    pick_device(config.device)
    run.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(run):
        record = {"stage": name, "init": init and str(Path(init).resolve()), "world": worlds,
                  "config": asdict(config), "torch": torch.__version__}  # fmt: skip
        checkpoint.write_json(run / "run.json", record)
        seeds = config.seed, config.seed + 2**32
        dataset, held_out = (Schedule(worlds, config, seed) for seed in seeds)
        try:
            train(name, config, dataset, held_out, run, start, {"data": worlds[-1][1]}, saved)
        except Stopped:
            tqdm.write(f"stopped and saved; --resume goes on from {newest_save(run)}")


def train_all(out: str, given: dict) -> None:
    """The whole road into one directory: a run per stage, the result in bf16, its evaluation.

    Stages that are finished are skipped, an interrupted one goes on.
    """
    import evaluate  # it imports this file's neighbours, and only this needs it

    if not out:
        raise ValueError("--out is empty; give a directory for the runs")
    init, preset = "", given.get("preset", "tiny")
    if preset == "7b":
        raise ValueError("preset 7b starts from released weights: run its stages one by one")
    for name in STAGES:
        run, started = Path(out) / name, time.time()
        resume = (run / "run.json").is_file()
        own = {k: v for k, v in given.items() if name == "base" or k not in BASE_ALONE}
        own |= {"init": init} if init else {}
        if "seed" in given:  # its own for each stage
            own["seed"] = given["seed"] * 100 + list(STAGES).index(name)
        config, _, _ = settings(name, run, own, resume)
        saved = newest_save(run)
        if saved is None or int(saved.name[5:]) < config.steps:
            start_run(name, str(run), own, resume)
            if int((newest_save(run) or Path("step-0")).name[5:]) < config.steps:
                return  # stopped
            minutes = (time.time() - started) / 60
            tqdm.write(f"stage {name}: {config.steps} steps, {minutes:.1f} minutes")
        init = str(run)
    publish(init, out)
    print(evaluate.report(out, Path(out)))


def publish(run: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights as a checkpoint in bf16, half the size."""
    source = checkpoint.open_checkpoint(run)
    model, vae = ({k: t.to(torch.bfloat16) for k, t in source.tensors(part).items()}
                  for part in ("model", "vae"))  # fmt: skip
    checkpoint.write(out, source.config, model, vae, source.tokenizer)
    print(f"{out} is complete: python sample.py --checkpoint {out} --prompt ...")


def curves(runs: list[str], out: str) -> None:
    """Loss curves of one or several runs in one PNG."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("curves draws with matplotlib: pip install matplotlib") from None
    logs = {}
    for run in runs:
        found = [Path(run), *sorted(p for p in Path(run).glob("*") if p.is_dir())]
        logs |= {str(p): p / "log.jsonl" for p in found if (p / "log.jsonl").is_file()}
    if not logs:
        raise ValueError(f"no log.jsonl in {', '.join(runs)}; give folders of runs")
    keys = ("loss", "text", "image")
    figure, axes = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 4), layout="constrained")
    for name, path in logs.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for axis, key in zip(axes, keys, strict=True):
            for prefix, style in (("", "-"), ("held_out_", ":")):
                points = [(d["step"], d[prefix + key]) for d in lines if prefix + key in d]
                if points:
                    axis.plot(*zip(*points, strict=True), style, label=None if prefix else name)
            axis.set(title=key, xlabel="step", yscale="log")
    axes[0].legend(fontsize="small")
    with checkpoint.whole_file(Path(out)) as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"{out}: {len(logs)} runs (dotted: held-out examples)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags are the fields of TrainConfig and of the world."""
    parser = checkpoint.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "all", "curves"])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="of curves: folders of runs")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's folder; of curves, "
                        "the picture's file")  # fmt: skip
    parser.add_argument("--init", metavar="DIR", help="the checkpoint or run to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the newest save")
    checkpoint.add_flags(parser, TrainConfig)
    checkpoint.add_flags(parser, ShapesConfig, ("tasks", "captions", "questions", "edits", "digits",
                                                "max_objects"))  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.runs) != (args.stage == "curves"):
        parser.error("curves takes folders of runs, and no stage does")
    return args


def run(args: argparse.Namespace) -> None:
    given = {k: v for k, v in vars(args).items() if v is not None}
    stage, runs, out, resume = (given.pop(k) for k in ("stage", "runs", "out", "resume"))
    if stage == "curves":
        curves(runs, out)
    elif stage == "all":
        train_all(out, given)
    else:
        start_run(stage, out, given, resume)


def main() -> None:
    keep_memory()
    args = parse()
    checkpoint.command_line("train.py", lambda: run(args))


if __name__ == "__main__":
    main()
