"""Training: the road from nothing to Orthus, one stage a command.

    vae         the autoencoder, as a VQ-VAE                                  (Chameleon's)
    decoder     its decoder on continuous latents, the encoder frozen         (appendix A)
    chameleon   the discrete ancestor: argmin embedding, image tokens         (eq. 1, 2)
    base        stage 1: softmax embedding and diffusion head, images only    (eq. 3, 4)
    posttrain   stage 2: everything but the autoencoder, L_ar + lambda L_diff
    all         the whole road into one directory

A run directory is a checkpoint (see checkpoint.py) of the averaged weights, plus state.pt, from
which --resume goes on exactly, and log.jsonl. Data and noise depend on (seed, step) alone.
Reading order: TrainConfig and PRESETS, the stages, then train(), which runs any of them.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import inspect
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import checkpoint
import data
from orthus import DiffusionHead, Orthus, OrthusConfig
from sample import Parser, pick_device
from vae import VQVAE, VQVAEConfig


@dataclass
class TrainConfig:
    """What a stage runs with. The defaults here are shared; PRESETS overrides them per stage."""

    out: str = ""  # run directory
    init: str = ""  # checkpoint directory to start from
    preset: str = "tiny"  # tiny or 7b
    resume: bool = False  # go on from the run directory's state.pt
    seed: int = 0  # of weights, data and noise
    steps: int = 1000  # optimiser steps in all
    batch_size: int = 64  # examples a step
    lr: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup: float = 0.05  # share of the steps
    optimizer: str = "adamw"  # adamw, or muon for the transformer's matrices
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = 0.01  # on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    micro_batches: int = 1  # parts of a transformer's batch, by length: less memory and padding
    image_loss_weight: float = 10.0  # lambda
    input_noise: float = 0.0  # on output images as they are read back, in standard deviations
    guidance_dropout: float = 0.1  # share of prompts for images that lose their text, or all
    without: str = ""  # tasks that chameleon and posttrain leave out, by comma: story,in_context
    ema: float = 0.999  # decay of the weight average; 0 keeps the last weights
    device: str = "cpu"  # cpu or cuda
    dtype: str = "bfloat16"  # of the matrix products (autocast)
    threads: int = 0  # CPU threads; 0 = one per core
    workers: int = 1  # data processes
    compile: bool = False  # torch.compile the transformer and the diffusion head
    log_every: int = 50  # steps a line
    save_every: int = 500  # steps a checkpoint


BATCHES = dict(batch_size=96, micro_batches=3, optimizer="muon")
PRESETS = {
    "tiny": {
        "vae": dict(steps=10500, batch_size=32, lr=1.5e-3),
        "decoder": dict(steps=800, batch_size=32, lr=5e-4),
        "chameleon": dict(seed=1, steps=400, image_loss_weight=1.0) | BATCHES,
        "base": dict(seed=2, steps=300, lr=2e-3, batch_size=64, optimizer="muon"),
        "posttrain": dict(seed=3, steps=11700, image_loss_weight=5.0, input_noise=0.25) | BATCHES,
    },
    "7b": {  # the paper's settings
        "decoder": dict(steps=15000, batch_size=256, lr=1e-5),
        "base": dict(steps=15000, batch_size=32, lr=1e-4),
        "posttrain": dict(steps=35000, batch_size=16, lr=1e-5, image_loss_weight=100.0),
    },
}


@dataclass
class Stage:
    """What a stage gives to train()."""

    model: nn.Module  # trained where requires_grad
    batch: Callable[[int], list]  # step -> micro-batches; runs in the data processes
    losses: Callable[[object, torch.Generator], dict[str, Tensor]]  # of a micro-batch, adding up
    save: Callable[[dict[str, Tensor]], None]  # averaged weights -> the run directory
    after_step: Callable[[int, "Optimizers", dict], None] | None = None


# --- Stages: the autoencoder ---------------------------------------------------------------------

REVIVE_EVERY, REVIVE_UNTIL, QUANTISE_FROM = 200, 0.7, 100
COMMITMENT = 0.1
QUANTISED_SHARE = 0.125
DETAIL_WEIGHT = 0.5
LATENT_NOISE = 0.2
ISOTROPY = 0.01


def scene_batches(config: TrainConfig, digits: float) -> Callable[[int], list]:
    """step -> [(images, where their details are)]; a share of the large things carry digits."""
    return lambda step: [data.scene_images(config.seed, step, config.batch_size, digits)]


def reconstruction_loss(images: Tensor, target: Tensor, detail: Tensor) -> Tensor:
    """Squared and absolute error, (B, 3, H, W) each, and once more the squared error where detail
    (B, 1, H, W) is 1: digits are too few pixels to be learned otherwise. (Make-A-Scene, arXiv
    2203.13131, does the same for faces.)
    """
    error = images.float() - target
    small = (error.square() * detail).sum() / (3 * detail.sum()).clamp(min=1)
    return error.square().mean() + 0.1 * error.abs().mean() + DETAIL_WEIGHT * small


def add_latent_noise(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of LATENT_NOISE times the latents' standard deviation, on any shape.

    Without it the encoder may keep what matters (hue, digits) in directions of hardly any variance,
    where a diffusion model cannot hear it: measured, 3 of 64 directions held 76% of the variance.
    With it, what must survive is spread over all directions, and the decoder forgives small errors.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return latents + LATENT_NOISE * latents.detach().std() * noise


def anisotropy(latents: Tensor) -> Tensor:
    """How far the covariance of latents (B, L, C) is from a multiple of the identity."""
    z = latents.flatten(0, 1)
    z = z - z.mean(0)
    covariance = z.T @ z / z.square().mean() / len(z)
    return (covariance - torch.eye(z.shape[1], device=z.device)).square().sum() / z.shape[1]


def vae_stage(config: TrainConfig) -> Stage:
    """VQ-VAE: reconstruction + codebook + commitment, dead codes revived.

    Most of every batch skips the quantiser, so that the encoder keeps what the codes cannot hold:
    the continuous latents are what Orthus is after. With --init an autoencoder goes on: its latents
    stay what they were except where there is detail, for the models that were trained on them.
    """
    torch.manual_seed(config.seed)
    if config.init:
        vae = VQVAE.from_pretrained(config.init, config.device, torch.float32)
        before = copy.deepcopy(vae).requires_grad_(False).to(memory_format=torch.channels_last)
    else:
        vae = VQVAE(VQVAEConfig.preset(config.preset)).to(config.device)
    vae.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU
    quantise_from = 0 if config.init else QUANTISE_FROM  # a new codebook is set from data

    def losses(batch, generator):
        step = generator.initial_seed() % 2**32  # train() seeds it so
        images, detail = (part.to(config.device) for part in batch)
        images = images.to(memory_format=torch.channels_last)
        z = vae.encode(images).float()  # (B, L, C)
        if step < quantise_from:
            images_again = vae.decode(add_latent_noise(z, generator))
            loss = reconstruction_loss(images_again, images, detail)
            return {"loss": loss + ISOTROPY * anisotropy(z)}
        q = vae.lookup(vae.quantize(z))
        codebook, commitment = F.mse_loss(q, z.detach()), F.mse_loss(z, q.detach())
        n = math.ceil(len(images) * QUANTISED_SHARE)
        straight_through = z[:n] + (q - z)[:n].detach()
        images_again = vae.decode(torch.cat([straight_through, add_latent_noise(z[n:], generator)]))
        parts = {
            "quantised": reconstruction_loss(images_again[:n], images[:n], detail[:n]),
            "continuous": reconstruction_loss(images_again[n:], images[n:], detail[n:]),
            "commitment": commitment,
            "anisotropy": anisotropy(z),
        }
        share = n / len(images)
        total = share * parts["quantised"] + (1 - share) * parts["continuous"] + codebook
        total = total + COMMITMENT * commitment + ISOTROPY * parts["anisotropy"]
        if config.init:
            z_before = before.encode(images).float()
            plain = 1 - F.max_pool2d(detail, vae.config.downsampling).flatten(2).transpose(1, 2)
            moved = (z - z_before).square() * plain  # (B, L, C)
            parts["moved"] = moved.mean() / z_before.var()
            total = total + parts["moved"]
        return {"loss": total} | parts

    @torch.no_grad()
    def revive(step, optimizer, average):
        """Codes that 8192 fresh latents never use take the place of some of these latents."""
        first = step == quantise_from - 1
        due = step % REVIVE_EVERY == REVIVE_EVERY - 1 and step < REVIVE_UNTIL * config.steps
        if not (first or due):
            return
        images, _ = data.scene_images(config.seed, -step, 8192 // vae.config.latents_per_image)
        latents = vae.encode(images.to(config.device)).flatten(0, 1)  # (8192, C)
        codebook = vae.quantize.embedding.weight
        used = torch.bincount(vae.quantize(latents), minlength=len(codebook)) > 0
        dead = torch.ones_like(used) if first else ~used
        rng = torch.Generator().manual_seed(step)
        fresh = latents[torch.randperm(len(latents), generator=rng)[: int(dead.sum())]]
        codebook[dead] = fresh
        average["quantize.embedding.weight"][dead] = fresh
        for name, moment in optimizer.state(codebook).items():
            if name != "step":
                moment[dead] = 0
        tqdm.write(f"step {step + 1}: {int(dead.sum())} of {len(codebook)} codes set from data")

    def save(weights):
        config_json = {"vae": dataclasses.asdict(vae.config)}
        checkpoint.write(config.out, config_json, vae=weights)

    return Stage(vae, scene_batches(config, data.TRAINING_DIGITS), losses, save, revive)


def decoder_stage(config: TrainConfig) -> Stage:
    """Fine-tune the decoder on unquantised latents, the encoder frozen (appendix A)."""
    vae = VQVAE.from_pretrained(config.init, config.device, torch.float32)
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def losses(batch, generator):
        images, detail = (part.to(config.device) for part in batch)
        images = images.to(memory_format=torch.channels_last)
        latents = add_latent_noise(vae.encode(images).float(), generator)
        return {"loss": reconstruction_loss(vae.decode(latents), images, detail)}

    def save(weights):
        checkpoint.write(config.out, {"vae": dataclasses.asdict(vae.config)}, vae=weights)

    return Stage(vae, scene_batches(config, 0.5), losses, save)


# --- Stages: the transformer ---------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Part of a step's examples, and its share of them and of their text and image targets."""

    batch: data.Batch
    share: float
    text_share: float
    image_share: float


def example_batches(config: TrainConfig, model: OrthusConfig, vae: VQVAEConfig, tokenizer, tasks):
    """step -> micro-batches of Shapes examples, sorted by length so that little is padding."""

    def make(step: int) -> list[MicroBatch]:
        world, rng = data.Shapes(config.seed, tasks), random.Random(f"{config.seed} {step}")
        sequences = []
        for i in range(config.batch_size):
            example = world.example(step * config.batch_size + i)
            segments = example.segments
            draws = any(s.output and not isinstance(s.content, str) for s in segments)
            if draws and example.task != "image" and rng.random() < config.guidance_dropout:
                segments = drop_prompt(segments, rng)
            sequences.append(data.layout(segments, tokenizer, model))
        sequences.sort(key=lambda s: len(s.tokens))
        size = math.ceil(len(sequences) / config.micro_batches)
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        parts = [data.collate(part, model, vae.resolution) for part in parts]
        images = [int((p.labels == model.image_id).sum()) for p in parts]
        texts = [int((p.labels != -100).sum()) - n for p, n in zip(parts, images, strict=True)]
        if "image" in tasks:
            texts = [0] * len(parts)  # stage 1 has no text loss
        rows = [len(p.tokens) for p in parts]
        shares = [[n / max(1, sum(ns)) for n in ns] for ns in (rows, texts, images)]
        return [MicroBatch(*part) for part in zip(parts, *shares, strict=True)]

    return make


def drop_prompt(segments: list[data.Segment], rng: random.Random) -> list[data.Segment]:
    """What guidance subtracts from (sample.contexts): one of the images to draw, after the prompt's
    images without its text, or after the unconditional sentence alone."""
    pictures = [s for s in segments if not isinstance(s.content, str)]
    given, drawn = ([s for s in pictures if s.output == output] for output in (False, True))
    if not given or rng.random() < 0.5:
        given = [data.Segment(UNCONDITIONAL)]
    return [*given, rng.choice(drawn)]


def choose_tasks(config: TrainConfig) -> dict[str, float]:
    """The tasks of the Shapes world and their shares, less those left out."""
    out = set(filter(None, config.without.split(",")))
    tasks = {name: share for name, share in data.TASKS.items() if name not in out}
    if not tasks or out - set(data.TASKS):
        raise ValueError(
            f"--without is {config.without!r}; want some of {','.join(data.TASKS)}, not all"
        )
    return tasks


def orthus_stage(config: TrainConfig, model: Orthus, tasks: dict[str, float]) -> Stage:
    """What chameleon, base and posttrain share: examples, the joint loss, checkpoints."""
    vae = VQVAE.from_pretrained(config.init, config.device, torch.float32).requires_grad_(False)
    tokenizer = data.Tokenizer.from_pretrained(config.out)
    model.config.image_loss_weight = config.image_loss_weight

    def losses(micro: MicroBatch, generator):
        batch = micro.batch.to(config.device)
        images = batch.images.to(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(images).float().flatten(0, 1)  # (N, C)
        loss = model.loss(batch.tokens, latents, batch.labels, generator, config.input_noise)
        text, image = loss.text * micro.text_share, loss.image * micro.image_share
        parts = {"loss": text + config.image_loss_weight * image, "text": text, "image": image}
        if model.config.vision_embedding == "softmax":  # how many codes a latent mixes (eq. 4)
            with torch.no_grad():
                mixed = model.vision_embedding.effective_codes(latents[:256]).median()
            parts["codes_mixed"] = mixed * micro.share
        return parts

    def save(weights):
        checkpoint.write(config.out, {"model": dataclasses.asdict(model.config)}, model=weights)

    if config.compile:
        model.transformer = torch.compile(model.transformer, dynamic=True)
        if model.config.image_head == "diffusion":
            head = model.diffusion_head
            head.forward = torch.compile(head.forward, dynamic=True)
    tqdm.write("tasks: " + ", ".join(f"{name} {share}" for name, share in tasks.items()))
    make = example_batches(config, model.config, vae.config, tokenizer, tasks)
    return Stage(model, make, losses, save)


def start_run(config: TrainConfig, model: OrthusConfig) -> None:
    """Give the run directory what does not change in it: autoencoder, tokenizer, defaults."""
    known = checkpoint.read_config(config.init)
    sizes, vae = checkpoint.read_vae(config.init)
    generation = known.get("generation") or GENERATION | {"words": []}
    if "words" in generation:  # a model of the Shapes world, which may have grown since
        generation = generation | {"words": data.shapes_words()}
    parts = {"model": dataclasses.asdict(model), "vae": sizes, "generation": generation}
    before = known.get("model", {}).get("image_head", model.image_head)
    if config.preset == "7b" and before != model.image_head:  # Chameleon becomes Orthus
        parts["generation"] = checkpoint.generation_defaults(parts["model"])
    if "model" in known:
        tokenizer = checkpoint.find_tokenizer(config.init)
    else:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        tokenizer = Path(config.out) / "tokenizer.model"
        pieces = model.vocab_size - model.image_id  # what the vocabulary has left, and the unknown
        tokenizer.write_bytes(data.train_tokenizer(data.shapes_texts(), pieces))
    checkpoint.write(config.out, parts, vae=vae, tokenizer=tokenizer)


def chameleon_stage(config: TrainConfig) -> Stage:
    """The discrete ancestor, from scratch: nearest codes in, image tokens out (eq. 1, 2)."""
    torch.manual_seed(config.seed)
    sizes = OrthusConfig.preset(config.preset, vision_embedding="argmin", image_head="tokens")
    fields, vae = checkpoint.read_vae(config.init)
    for name in ("num_codes", "latent_channels"):
        if fields[name] != getattr(sizes, name):
            raise ValueError(
                f"{name} is {fields[name]} in the autoencoder of {config.init}, but "
                f"{getattr(sizes, name)} in preset {config.preset}; give one of that preset"
            )
    start_run(config, sizes)
    model = Orthus(sizes)
    model.vision_embedding.codebook.weight.data.copy_(vae["quantize.embedding.weight"])
    model.vision_embedding.codebook.requires_grad_(False)
    return orthus_stage(config, model.to(config.device), choose_tasks(config))


@torch.no_grad()
def to_orthus(config: TrainConfig) -> Orthus:
    """Chameleon -> Orthus-base before training (stage 1): argmin becomes softmax over the same
    codebook and image-token rows, image tokens give way to a diffusion head that outputs zero.

    For tiny, latent_scale and tau are measured: unit variance for the head, and a median latent
    that mixes MIXED_CODES codes.
    """
    old = Orthus.from_pretrained(config.init, "cpu", torch.float32)
    if old.config.image_head != "tokens":
        raise ValueError(
            f"base makes an Orthus of a Chameleon; {config.init} is none: go on with posttrain"
        )
    vae = VQVAE.from_pretrained(config.init, "cpu", torch.float32)
    sizes = dataclasses.replace(old.config, vision_embedding="softmax", image_head="diffusion")
    if config.preset == "tiny":
        latents = vae.encode(data.scene_images(config.seed, -1, 256)[0]).flatten(0, 1)
        sizes.latent_scale = 1 / latents.std().item()
        low, high = 1e-4, 1e2
        for _ in range(40):  # bisection: the mixture widens with tau
            old.vision_embedding.tau = sizes.tau = math.sqrt(low * high)
            median = old.vision_embedding.effective_codes(latents).median()
            low, high = (low, sizes.tau) if median > MIXED_CODES else (sizes.tau, high)
        tqdm.write(f"latent_scale {sizes.latent_scale:.4g}, tau {sizes.tau:.4g}")
    with torch.device("meta"):  # the old tensors become the new model's: one copy in memory
        model = Orthus(sizes)
    model.diffusion_head = DiffusionHead(sizes)
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False, assign=True)
    assert not unexpected and all(name.startswith("diffusion_head.") for name in missing)
    torch.manual_seed(config.seed)
    model.init_weights("diffusion_head.")
    return model


def base_stage(config: TrainConfig) -> Stage:
    """Stage 1: the backbone frozen, vision embedding and diffusion head trained on images only."""
    model = to_orthus(config).to(config.device).requires_grad_(False)
    start_run(config, model.config)
    model.vision_embedding.requires_grad_(True)
    model.diffusion_head.requires_grad_(True)
    model.embed_tokens.requires_grad_(True)
    is_code = torch.zeros(model.config.vocab_size, 1, device=config.device)
    first = model.config.image_code_start
    is_code[first : first + model.config.num_codes] = 1  # the w_j alone, no text row
    model.embed_tokens.weight.register_hook(lambda gradient: gradient * is_code)
    return orthus_stage(config, model, {"image": 1.0})


def posttrain_stage(config: TrainConfig) -> Stage:
    """Stage 2: everything but the autoencoder, on all tasks."""
    model = Orthus.from_pretrained(config.init, config.device, torch.float32)
    start_run(config, model.config)
    return orthus_stage(config, model, choose_tasks(config))


UNCONDITIONAL = "Generate an image."
MIXED_CODES = 200.0  # with 10 the transformer saw too little of a latent: colours, digits (README)
GENERATION = {  # defaults of sample.py, kept in the checkpoint's config.json
    "steps": 100,
    "cfg_scale": 3.0,
    "unconditional": UNCONDITIONAL,
    "image_first": True,  # an answer begins with an image where the prompt holds none
    "interleaved": {"cfg_scale": 2.0, "cfg_image": 2.0},  # where it holds one
    "max_tokens": 128,
    "scale": 4,
}
STAGES = {
    "vae": vae_stage,
    "decoder": decoder_stage,
    "chameleon": chameleon_stage,
    "base": base_stage,
    "posttrain": posttrain_stage,
}


# --- The loop ------------------------------------------------------------------------------------


class Steps(Dataset):
    """Makes batch number i in a data process."""

    def __init__(self, make: Callable[[int], object]):
        self.make = make

    def __getitem__(self, step):
        return self.make(step)


def batches(stage: Stage, config: TrainConfig, first: int) -> Iterator[object]:
    """Batches first, first + 1, .. of the run, made ahead of the step."""
    return iter(
        DataLoader(
            Steps(stage.batch),
            batch_size=None,
            sampler=range(first, config.steps),
            num_workers=config.workers,
            prefetch_factor=8 if config.workers else None,
            multiprocessing_context="fork" if config.workers else None,
        )
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


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

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of one parameter; empty before its first step."""
        return next((p.state[parameter] for p in self.parts if parameter in p.state), {})

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW over what requires a gradient; weight decay on the matrices of linear layers and
    convolutions, not on embeddings, norms and biases.

    With "muon", the matrices between embeddings and outputs are orthogonalised momentum's instead
    (kellerjordan.github.io/posts/muon), its step scaled to the size of AdamW's.
    """
    ends = ("lm_head", "diffusion_head.final_layer.linear")
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    inner = {id(m.weight) for n, m in linear if n not in ends and config.optimizer == "muon"}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices - inner]},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    options = dict(lr=config.lr, weight_decay=config.weight_decay)
    parts = [torch.optim.AdamW(groups, betas=config.betas, fused=True, **options)]
    if orthogonal := [p for p in trained if id(p) in inner]:
        parts.append(torch.optim.Muon(orthogonal, adjust_lr_fn="match_rms_adamw", **options))
    return Optimizers(parts)


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """average <- decay average + (1 - decay) weights; the decay warms up from 0.1."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = dict(model.named_parameters())
    names = [name for name in average if weights[name].requires_grad]
    torch._foreach_lerp_([average[n] for n in names], [weights[n] for n in names], 1 - decay)


def save_state(name, out: Path, model, optimizer, average: dict, step: int, config) -> None:
    state = {
        "stage": name,
        "step": step,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "config": dataclasses.asdict(config),
    }
    torch.save(state, out / "state.pt.part")
    os.replace(out / "state.pt.part", out / "state.pt")


def train(name: str, config: TrainConfig) -> None:
    """Run one stage to its last step, or on from its state.pt."""
    out = Path(config.out)
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    if config.resume and (first := read_state(out)["step"]) >= config.steps:
        raise ValueError(f"{out} is at step {first} of {config.steps}; raise --steps to go on")
    stage = STAGES[name](config)
    model = stage.model
    out.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(model, config)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = 0
    if config.resume:
        state = torch.load(out / "state.pt", map_location=config.device, weights_only=True)
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    kind = torch.device(config.device).type
    autocast = torch.autocast(kind, getattr(torch, config.dtype), config.dtype != "float32")
    sums, started = {}, time.time()
    bar = tqdm(range(first, config.steps), name, initial=first, total=config.steps)
    for step, batch in zip(bar, batches(stage, config, first), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        generator = torch.Generator().manual_seed(config.seed * 2**32 + step)
        parts = {}
        for micro in batch:
            with autocast:
                losses = stage.losses(micro, generator)
            losses["loss"].backward()
            parts = {key: parts.get(key, 0) + value.detach() for key, value in losses.items()}
        parts["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, config.ema, step)
        if stage.after_step:
            stage.after_step(step, optimizer, average)
        for key, value in parts.items():
            sums.setdefault(key, []).append(value)
        saves = (step + 1) % config.save_every == 0 or step + 1 == config.steps
        if saves or (step + 1) % config.log_every == 0:  # before saving: a NaN raises
            means = {key: torch.stack(v).mean().item() for key, v in sums.items()}
            means["seconds_per_step"] = (time.time() - started) / len(sums["loss"])
            write_log(out, name, step + 1, learning_rate(config, step), means)
            sums, started = {}, time.time()
        if saves:
            stage.save(average)
            save_state(name, out, model, optimizer, average, step + 1, config)


def write_log(out: Path, name: str, step: int, lr: float, means: dict[str, float]) -> None:
    """One line on the screen and in log.jsonl: the means over the interval."""
    if not math.isfinite(means["loss"] + means["grad_norm"]):
        raise ValueError(f"the loss is {means['loss']} by step {step}; lower --lr and --resume")
    tqdm.write(f"{name} {step} lr {lr:.3g} " + " ".join(f"{k} {v:.4g}" for k, v in means.items()))
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"stage": name, "step": step, "lr": lr} | means) + "\n")


def train_all(config: dict) -> None:
    """The whole road into one directory: a run directory per stage, then the result in bf16.

    Stages that are finished are skipped, an interrupted one goes on.
    """
    out, init = Path(config["out"]), config.get("init", "")
    for name in STAGES:
        run = out / name
        resume = (run / "state.pt").is_file()
        stage = make_config(name, config | {"out": str(run), "init": init, "resume": resume})
        if not resume or read_state(run)["step"] < stage.steps:
            train(name, stage)
        init = str(run)
    publish(init, out)


def publish(run: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights as a checkpoint in bf16, half the size."""
    _, model = checkpoint.read_model(run)
    _, vae = checkpoint.read_vae(run)
    model, vae = ({k: t.to(torch.bfloat16) for k, t in part.items()} for part in (model, vae))
    config, tokenizer = checkpoint.read_config(run), checkpoint.find_tokenizer(run)
    checkpoint.write(out, config, model, vae, tokenizer)
    print(f"{out} is complete: python sample.py --checkpoint {out} --prompt ...")


# --- Command line --------------------------------------------------------------------------------


def keep_memory() -> None:
    """Tell glibc to keep freed memory: page faults cost up to half of a CPU training step."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim, top pad
            libc.mallopt(option, value)


def read_state(run: Path) -> dict:
    try:
        return torch.load(run / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{run} has no state.pt to resume from; leave out --resume") from None
    except Exception as error:
        raise ValueError(f"{run / 'state.pt'} cannot be read ({error})") from None


def make_config(name: str, given: dict) -> TrainConfig:
    """Flags, over what a resumed run was started with, over the stage's preset."""
    preset = given.get("preset", "tiny")
    if preset not in PRESETS or name not in PRESETS[preset]:
        known = ", ".join(p for p in PRESETS if name in PRESETS[p])
        raise ValueError(f"no preset {preset!r} for stage {name}; known: {known}")
    before = PRESETS[preset][name]
    if given.get("resume"):
        state = read_state(Path(given["out"]))
        before = state["config"]
        if state["stage"] != name:
            raise ValueError(
                f"{given['out']} is a run of stage {state['stage']}, not {name}; give another --out"
            )
    config = TrainConfig(**(before | given))
    if config.resume and config.optimizer != before["optimizer"]:
        raise ValueError(f"the run has optimizer {before['optimizer']}; leave out --optimizer")
    above_zero = "steps batch_size micro_batches lr grad_clip log_every save_every".split()
    for field in above_zero:
        if getattr(config, field) <= 0:
            raise ValueError(f"--{field.replace('_', '-')} is {getattr(config, field)}; want > 0")
    if not config.resume and (Path(config.out) / "state.pt").exists():
        raise ValueError(f"{config.out} holds a run already; give --resume or another --out")
    kept = "*.safetensors*" if name in ("vae", "decoder") else f"{checkpoint.MODEL}*"
    if not config.resume and (found := sorted(Path(config.out).glob(kept))):
        raise ValueError(f"{found[0]} would be overwritten; give another --out")
    if name != "vae" and not config.init:
        raise ValueError(f"stage {name} starts from a checkpoint: give --init DIR")
    pick_device(config.device)
    if config.workers < 0 or config.threads < 0 or not 0 <= config.seed < 2**31:
        raise ValueError("want --workers and --threads of 0 or more, --seed from 0 to 2147483647")
    if name == "vae" and config.batch_size < 2:
        raise ValueError("stage vae quantises a part of a batch; want --batch-size of 2 or more")
    choose_tasks(config)
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer is {config.optimizer!r}; want adamw or muon")
    if config.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype is {config.dtype!r}; want bfloat16 or float32")
    return config


def parse(argv: list[str] | None = None) -> tuple[str, dict]:
    """-> (stage, the flags given). Flags are the fields of TrainConfig, helped by its comments."""
    notes = dict(re.findall(r"(\w+): .*#  ?(.*)", inspect.getsource(TrainConfig)))
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "all"])
    for f in dataclasses.fields(TrainConfig):
        flag = "--" + f.name.replace("_", "-")
        note = f"{notes[f.name]} (default: {f.default!r}, or the preset's)"
        if f.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=None, help=notes[f.name])
        elif f.name == "betas":
            parser.add_argument(flag, type=float, nargs=2, help=note)
        else:
            parser.add_argument(flag, type=f.type, required=f.name == "out", help=note)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    return given.pop("stage"), given


def main() -> None:
    keep_memory()
    name, given = parse()
    try:
        if name == "all":
            train_all(given)
        else:
            train(name, make_config(name, given))
    except KeyboardInterrupt:
        tqdm.write("interrupted; --resume goes on from the last save", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        tqdm.write(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
