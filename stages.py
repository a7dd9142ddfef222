"""The five stages of training, from nothing to Orthus: what each trains, on what, by which loss.

    vae         the autoencoder, as a VQ-VAE                                  (Chameleon's)
    decoder     its decoder on continuous latents, the encoder frozen         (appendix A)
    chameleon   the discrete ancestor: argmin embedding, image tokens         (eq. 1, 2)
    base        stage 1: softmax embedding and diffusion head, images only    (eq. 3, 4)
    posttrain   stage 2: everything but the autoencoder, L_ar + lambda L_diff

A stage has `model`, `batch(dataset, step) -> parts`, `losses(part, step, generator)` and, where it
needs one, `after_step`. It writes nothing: train.py runs it. Data depend on (seed, step) alone, and
so does the noise, whose generator is handed in; initial weights are drawn from the seed.
In order: settings, presets, examples, the autoencoder's stages, the transformer's, low rank.
"""

import copy
import functools
import math
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
from checkpoint import Checkpoint, setting
from data import Batch, Segment
from orthus import HEADS, DiffusionHead, Orthus, OrthusConfig, randn
from vae import VQVAE, VQVAEConfig

LINEAR = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"

# --- Settings ------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What all stages read: PRESETS overrides these defaults, flags override both."""

    preset: str = setting("tiny", "sizes and settings (default: tiny)", "nano", "tiny", "7b")
    seed: int = setting(0, "of weights, data and noise", int, 0, 2**31)
    steps: int = setting(1000, "optimiser steps in all", int, 1, 10**9)
    batch_size: int = setting(64, "examples a step", int, 1, 2**20)
    micro_batches: int = setting(1, "parts of a batch: saves memory", int, 1, 2**20)
    lr: float = setting(1e-3, "peak; linear warm-up, then a cosine to zero", float, 1e-12, 10)
    warmup: float = setting(0.05, "share of the steps", float, 0, 1)
    optimizer: str = setting("adamw", "adamw, or module:function")
    betas: tuple[float, float] = setting((0.9, 0.99), "of AdamW", float, 0, 1)
    weight_decay: float = setting(0.01, "on matrices only", float, 0, 10)
    grad_clip: float = setting(1.0, "largest norm of the gradient", float, 1e-9, 1e9)
    ema: float = setting(0.999, "decay of the weight average, which is what is saved", float, 0, 1)
    data: str = setting("", "a file, a folder, module:function, or several with shares")
    data_args: str = setting("{}", "JSON: arguments of the function in --data")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("auto", "of matrix products (autocast)", "auto", "bfloat16", "float32")
    threads: int = setting(0, "CPU threads; 0 is one a core", int, 0, 1024)
    workers: int = setting(1, "data processes", int, 0, 64)
    log_every: int = setting(50, "steps a line", int, 1, 10**9)
    save_every: int = setting(500, "steps a save", int, 1, 10**9)
    validate_every: int = setting(250, "steps a validation on held-out examples", int, 1, 10**9)


@dataclass
class AutoencoderSettings(Settings):
    detail_weight: float = setting(0.5, "of the error where small detail is", float, 0, 1e3)
    edge_weight: float = setting(0.0, "of the error of neighbouring differences", float, 0, 1e3)
    latent_noise: float = setting(0.2, "on decoded latents, in deviations", float, 0, 10)


@dataclass
class VAESettings(AutoencoderSettings):
    quantise_from: int = setting(100, "first step with codes, set from data", int, 0, 10**9)
    quantised_share: float = setting(0.125, "of a batch goes through the codes", float, 0, 1)
    revive_every: int = setting(200, "steps after which dead codes are reset", int, 1, 10**9)
    revive_until: float = setting(0.7, "share of the steps", float, 0, 1)
    commitment: float = setting(0.1, "weight of the commitment loss", float, 0, 1e3)
    isotropy: float = setting(0.01, "weight of the latents' anisotropy", float, 0, 1e3)


@dataclass
class TransformerSettings(Settings):
    """Where nothing is given: what the checkpoint, or the preset, has."""

    image_loss_weight: float | None = setting(None, "lambda", float, 0, 1e9)
    diffusion_batch_multiplier: int | None = setting(None, "noisings a latent", int, 1, 1024)
    input_noise: float = setting(0.0, "on output images as they are read back", float, 0, 10)
    compile: bool = setting(False, "torch.compile the transformer and the head")
    checkpoint_activations: bool = setting(False, "less memory, a third more time")
    pictures_every: int = setting(2, "validations a row of pictures; 0: none", int, 0, 10**9)


@dataclass
class BaseSettings(TransformerSettings):
    vision_embedding: str | None = setting(None, "table 5", "softmax", "argmin", "linear")
    image_head: str | None = setting(None, "a name in orthus.HEADS", str)
    tau: float | None = setting(None, "of eq. 4 (default: by --mixed-codes)", float, 1e-9, 1e9)
    mixed_codes: float = setting(200.0, "that a median latent mixes: sets tau", float, 1, 1e6)
    prediction: str | None = setting(None, "of the head", "velocity", "epsilon")
    zero_terminal_snr: bool | None = setting(None, "of the noise schedule", bool)


@dataclass
class ChameleonSettings(TransformerSettings):
    guidance_dropout: float = setting(0.1, "share of prompts that lose their text", float, 0, 1)


@dataclass
class PosttrainSettings(ChameleonSettings):
    lora_rank: int = setting(0, "of low-rank training; 0: in full", int, 0, 2**14)
    lora_scale: float = setting(2.0, "of the product (elsewhere alpha / rank)", float, 1e-9, 1e9)
    lora_targets: tuple[str, ...] = setting(LINEAR, f"linear layers ({' '.join(LINEAR)})")


UNCONDITIONAL = "Generate an image."
MUON, PICTURES = dict(optimizer="lab.muon:muon"), dict(data="lab.shapes:tiny_pictures")
NANO_VAE = dict(batch_size=16, latent_noise=0.3, edge_weight=4.0, data="lab.shapes:nano_crowds")
NANO_CODES = MUON | dict(ema=0.995, isotropy=0.02, commitment=0.02)
NANO = MUON | dict(batch_size=32, lr=2e-3, ema=0.995, data="lab.shapes:nano_tasks")
NANO_POSTTRAIN = dict(batch_size=64, input_noise=0.25, image_loss_weight=2.0)
TINY_VAE = PICTURES | dict(batch_size=32, dtype="float32")
TINY = MUON | dict(batch_size=96, micro_batches=3, dtype="float32", data="lab.shapes:tiny_tasks")
TINY_BASE = TINY | PICTURES | dict(batch_size=64, micro_batches=1)
BIG = dict(dtype="bfloat16", data="lab.shapes:tiny_tasks")
ONE_GPU = BIG | dict(checkpoint_activations=True)
PRESETS = {  # 7b: the paper's settings, in parts of a batch that one GPU holds
    "nano": {
        "vae": NANO_VAE | NANO_CODES | dict(steps=1000, lr=4e-3),
        "decoder": NANO_VAE | dict(steps=100, lr=5e-4),
        "chameleon": NANO | dict(seed=1, steps=400, image_loss_weight=1.0),
        "base": NANO | dict(seed=2, steps=150, mixed_codes=50.0, data="lab.shapes:nano_pictures"),
        "posttrain": NANO | dict(seed=3, steps=1400) | NANO_POSTTRAIN,
    },
    "tiny": {
        "vae": TINY_VAE | dict(steps=10500, lr=1.5e-3),
        "decoder": TINY_VAE | dict(steps=800, lr=5e-4, data_args='{"digits": 0.5}'),
        "chameleon": TINY | dict(seed=1, steps=400, image_loss_weight=1.0),
        "base": TINY_BASE | dict(seed=2, steps=300, lr=2e-3),
        "posttrain": TINY | dict(seed=3, steps=11700, image_loss_weight=5.0, input_noise=0.25),
    },
    "7b": {
        "decoder": BIG | PICTURES | dict(steps=15000, batch_size=256, micro_batches=128, lr=1e-5),
        "base": ONE_GPU | PICTURES | dict(steps=15000, batch_size=32, micro_batches=32, lr=1e-4),
        "posttrain": ONE_GPU | dict(steps=35000, batch_size=16, micro_batches=16, lr=1e-5),
    },
}
PRESETS["7b"]["base"] |= dict(tau=1.0, image_loss_weight=1.0)
PRESETS["7b"]["posttrain"] |= dict(lora_rank=64, lora_scale=16.0, image_loss_weight=100.0)
GENERATION = dict(steps=10, cfg_scale=3.0, image_first=True, scale=4, unconditional=UNCONDITIONAL)
GENERATION |= dict(interleaved={"cfg_scale": 2.0, "cfg_image": 2.0})  # of what begins from nothing


# --- Examples ------------------------------------------------------------------------------------


@functools.cache
def warn(message: str) -> None:  # once in each process
    tqdm.write(f"warning: {message}")


@functools.lru_cache(maxsize=2)
def order(length: int, epoch: int) -> np.ndarray:
    """Which example comes when in an epoch: the first one takes them as they come."""
    return np.random.default_rng(epoch).permutation(length) if epoch else np.arange(length)


def read_example(dataset, index: int, resolution: int) -> list[Segment]:
    """An example with its images read. Where one can no longer be read, the next stands in."""
    for number in range(index, index + 1000):
        segments = dataset.example(number)
        try:
            return data.read_images(segments, resolution)
        except (ValueError, OSError, MemoryError) as error:
            warn(f"{error}; another example takes its place")
    raise ValueError("no image of the data can be read any more; is their disk still there?")


def examples(dataset, step: int, size: int, resolution: int) -> list[list[Segment]]:
    """Those of one step; a dataset with a length begins again at its end, in another order."""
    indices = range(step * size, (step + 1) * size)
    if hasattr(dataset, "__len__"):
        length = len(dataset)
        indices = [order(length, i // length)[i % length] for i in indices]
    return [read_example(dataset, int(i), resolution) for i in indices]


def pictures(dataset, step: int, size: int, resolution: int) -> tuple[Tensor, Tensor]:
    """The first picture of each of a step's examples (B, 3, H, W), its detail (B, 1, H, W)."""
    images, details = [], []
    for segments in examples(dataset, step, size, resolution):
        found = [s for s in segments if s.is_image]
        if not found:
            raise ValueError(f"an example of step {step} has no picture; the stage wants one")
        images.append(data.to_tensor(found[0].content, resolution))
        detail = found[0].detail or Image.new("L", (1, 1))
        details.append((data.to_tensor(detail, resolution)[:1] + 1) / 2)
    return torch.stack(images), torch.stack(details)


# --- The autoencoder's stages --------------------------------------------------------------------


def reconstruction_loss(images: Tensor, target: Tensor, detail: Tensor, settings) -> Tensor:
    """Squared and absolute error, (B, 3, H, W) each, and once more the squared error where detail
    (B, 1, H, W) is 1: digits are too few pixels to be learned otherwise (as faces in Make-A-Scene).
    Differences of neighbouring pixels tell shapes apart early: without them small nets draw blobs
    for a long time."""
    error = images.float() - target
    small = (error.square() * detail).sum() / (3 * detail.sum()).clamp(min=1)
    edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
    plain = error.square().mean() + 0.1 * error.abs().mean()
    return plain + settings.detail_weight * small + settings.edge_weight * edges


def add_latent_noise(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Noise of `share` standard deviations. Without it the encoder may keep what matters (hue,
    digits) in directions of hardly any variance, where a diffusion model cannot hear it: 3 of 64
    held 76% of the variance. With it the decoder forgives small errors, too."""
    noise = randn(latents.shape, latents, generator)
    return latents + share * latents.detach().std() * noise


def anisotropy(latents: Tensor) -> Tensor:
    """How far the covariance of latents (B, L, C) is from a multiple of the identity."""
    z = latents.flatten(0, 1)
    z = z - z.mean(0)
    covariance = z.T @ z / z.square().mean() / len(z)
    return (covariance - torch.eye(z.shape[1], device=z.device)).square().sum() / z.shape[1]


class DecoderStage:
    """Fine-tune the decoder on unquantised latents, the encoder frozen (appendix A)."""

    Settings, part, after_step = AutoencoderSettings, "vae", None
    vae, before, tokenizer = None, None, None

    def __init__(self, settings, dataset, start: Checkpoint | None, resumed: bool):
        self.settings, self.others = settings, {}
        self.build(start)
        self.model.to(settings.device, memory_format=torch.channels_last)  # faster on a CPU
        self.config = {"vae": asdict(self.model.config)}
        if start and "model" in start.config:  # the model that the autoencoder is of goes along
            self.config |= {name: start.section(name) for name in ("model", "generation")}
            self.tokenizer = start.tokenizer.read_bytes()
            self.others = {"model": start.tensors("model")}

    def build(self, start: Checkpoint) -> None:
        self.model = VQVAE.from_pretrained(start, self.settings.device, torch.float32)
        self.model.requires_grad_(False)
        self.model.decoder.requires_grad_(True)
        self.model.post_quant_conv.requires_grad_(True)

    def batch(self, dataset, step: int) -> list[tuple[Tensor, Tensor]]:
        """The parts of a step: pictures, and where their details are."""
        size = self.settings.batch_size
        both = pictures(dataset, step, size, self.model.config.resolution)
        size = math.ceil(size / self.settings.micro_batches)
        return list(zip(*(x.split(size) for x in both)))

    def losses(self, part, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images, detail = (x.to(self.settings.device) for x in part)
        latents = self.model.encode(images.to(memory_format=torch.channels_last)).float()
        noisy = add_latent_noise(latents, self.settings.latent_noise, generator)
        loss = reconstruction_loss(self.model.decode(noisy), images, detail, self.settings)
        return {"loss": loss * len(images) / self.settings.batch_size}


class VAEStage(DecoderStage):
    """VQ-VAE: reconstruction + codebook + commitment, dead codes revived.

    Most of a batch skips the quantiser, so that the encoder keeps what the codes cannot hold: the
    continuous latents are what Orthus is after. From a checkpoint it goes on: its latents stay what
    they were but where there is detail, for the models that were trained on them."""

    Settings = VAESettings

    def build(self, start: Checkpoint | None) -> None:
        self.quantise_from = 0 if start else self.settings.quantise_from
        if start:
            self.model = VQVAE.from_pretrained(start, self.settings.device, torch.float32)
            self.before = copy.deepcopy(self.model).requires_grad_(False)
            self.before.to(memory_format=torch.channels_last)
        else:
            self.model = VQVAE(VQVAEConfig.preset(self.settings.preset))
            self.model.init_weights()

    def losses(self, part, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings, vae = self.settings, self.model
        images, detail = (x.to(settings.device) for x in part)
        z = vae.encode(images.to(memory_format=torch.channels_last)).float()  # (B, L, C)
        share = settings.quantised_share if step >= self.quantise_from else 0
        n = math.ceil(len(images) * share)  # how many go through the codes
        q = vae.lookup(vae.quantize(z))
        through = z[:n] + (q - z)[:n].detach()  # the gradient goes straight through the codes
        noisy = add_latent_noise(z[n:], settings.latent_noise, generator)
        again, terms = vae.decode(torch.cat([through, noisy])), {"anisotropy": anisotropy(z)}
        loss = settings.isotropy * terms["anisotropy"]
        if n < len(z):
            error = reconstruction_loss(again[n:], images[n:], detail[n:], settings)
            terms["continuous"], loss = error, loss + (1 - n / len(z)) * error
        if n:
            error = reconstruction_loss(again[:n], images[:n], detail[:n], settings)
            terms |= {"quantised": error, "commitment": F.mse_loss(z, q.detach())}
            loss = loss + n / len(z) * error + F.mse_loss(q, z.detach())
            loss = loss + settings.commitment * terms["commitment"]
        if self.before is not None:
            z_before, f = self.before.encode(images).float(), vae.config.downsampling
            plain = 1 - F.max_pool2d(detail, f).flatten(2).transpose(1, 2)  # (B, L, 1)
            terms["moved"] = ((z - z_before).square() * plain).mean() / z_before.var()
            loss = loss + terms["moved"]
        share, terms = len(images) / settings.batch_size, {"loss": loss} | terms
        return {name: share * term for name, term in terms.items()}

    @torch.no_grad()
    def after_step(self, step: int, dataset, state: dict, average: dict[str, Tensor]) -> None:
        """Codes that 8192 fresh latents never use take the place of some of these latents."""
        settings, vae = self.settings, self.model
        is_first = step == self.quantise_from - 1
        late = step >= settings.revive_until * settings.steps
        due = step % settings.revive_every == settings.revive_every - 1
        if not is_first and (late or not due):
            return
        size, resolution = settings.batch_size, vae.config.resolution
        wanted = math.ceil(8192 / vae.config.latents_per_image / size)
        numbers = range(10**9 + step * wanted, 10**9 + (step + 1) * wanted)  # never trained on
        images = torch.cat([pictures(dataset, n, size, resolution)[0] for n in numbers])
        latents = vae.encode(images.to(settings.device)).flatten(0, 1)  # (8192, C)
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


# --- The transformer's stages --------------------------------------------------------------------


@dataclass
class Part:
    """Some of a step's examples, and their shares of its text and image targets: the losses of all
    parts, each times its share, add up to that of the whole batch."""

    batch: Batch
    text: float
    image: float


def drop_prompt(segments: list[Segment], unconditional: str, rng: random.Random) -> list[Segment]:
    """What guidance subtracts from (sample.contexts): one of the images to draw, after the prompt's
    images without its text, or after the unconditional sentence alone."""
    given = [s for s in segments if s.is_image and not s.output]
    drawn = [s for s in segments if s.is_image and s.output]
    if not given or rng.random() < 0.5:
        given = [Segment(unconditional)]
    return [*given, rng.choice(drawn)]


class TransformerStage:
    """What chameleon, base and posttrain share: examples in parts by length, and the joint loss."""

    part, after_step, before, images_only = "model", None, None, False

    def build(self, start: Checkpoint, model: Orthus, tokenizer: bytes, generation: dict) -> None:
        settings, self.model, self.tokenizer = self.settings, model, tokenizer
        vae = VQVAE.from_pretrained(start, settings.device, torch.float32).requires_grad_(False)
        data.check_fits(model.config, vae.config, f"that of {start}")
        place(model, settings)
        for name in ("image_loss_weight", "diffusion_batch_multiplier"):
            if getattr(settings, name) is not None:
                setattr(model.config, name, getattr(settings, name))
        if isinstance(model.image_head, DiffusionHead):
            model.image_head.multiplier = model.config.diffusion_batch_multiplier
        model.checkpoint_activations = settings.checkpoint_activations
        if settings.compile:
            model.transformer = torch.compile(model.transformer, dynamic=True)
            model.image_head.forward = torch.compile(model.image_head.forward, dynamic=True)
        self.vae, self.words = vae, data.Tokenizer(tokenizer, model.config)
        self.config = {"model": asdict(model.config), "vae": asdict(vae.config)}
        self.config["generation"], self.others = generation, {}

    def choose(self, dataset, step: int) -> list[data.Sequence]:
        """The sequences of a step, some without their prompts, the shortest first."""
        settings, config = self.settings, self.model.config
        rng, sequences = random.Random(f"{settings.seed} {step}"), []
        sentence = self.config["generation"].get("unconditional", UNCONDITIONAL)
        resolution = self.vae.config.resolution
        for segments in examples(dataset, step, settings.batch_size, resolution):
            draws = any(s.output and s.is_image for s in segments) and not self.images_only
            if draws and rng.random() < settings.guidance_dropout:
                segments = drop_prompt(segments, sentence, rng)
            sequences.append(data.layout(segments, self.words, config))
        if self.images_only:  # stage 1 learns nothing from the others
            sequences = [s for s in sequences if config.image_id in s.labels]
        longest = config.max_position_embeddings
        fitting = [s for s in sequences if len(s.tokens) <= longest]
        if not fitting:
            what = f"draws no picture, or is longer than the context, {longest} tokens"
            raise ValueError(f"each example of step {step} {what}; give others")
        if len(fitting) < len(sequences):
            warn("examples that are longer than the context are left out")
        return sorted(fitting, key=lambda s: len(s.tokens))

    def batch(self, dataset, step: int) -> list[Part]:
        """The parts of a step: examples of like length, so that little is padding."""
        config, sequences = self.model.config, self.choose(dataset, step)
        size, parts = math.ceil(len(sequences) / self.settings.micro_batches), []
        for i in range(0, len(sequences), size):
            some = sequences[i : i + size]
            batch = data.collate(some, config, self.vae.config.resolution)
            is_image = batch.labels == config.image_id
            if self.images_only:
                batch.labels[~is_image] = -100  # stage 1 has no text loss
            text = int((~is_image & (batch.labels != -100)).sum())
            parts.append(Part(batch, text, int(is_image.sum())))
        texts, images = sum(part.text for part in parts), sum(part.image for part in parts)
        for part in parts:
            part.text, part.image = part.text / max(1, texts), part.image / max(1, images)
        return parts

    def latents(self, batch: Batch) -> Tensor:
        """The images of a batch -> latents (N, C), fp32."""
        latents = batch.images
        if latents.ndim == 4:  # else they were encoded ahead
            with torch.no_grad():
                latents = self.vae.encode(latents.to(memory_format=torch.channels_last))
        return latents.float().flatten(0, 1)

    def losses(self, part: Part, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        model, config = self.model, self.model.config
        batch = part.batch.to(self.settings.device)
        latents = self.latents(batch)
        is_output = batch.labels[batch.tokens == config.image_id] == config.image_id  # (N,)
        # images that are drawn are read back with noise: sampling reads its own imperfect latents
        noise, read = randn(latents.shape, latents, generator), latents
        if self.settings.input_noise and len(latents):
            deviation = self.settings.input_noise * latents.std()
            read = latents + deviation * noise * is_output[:, None]
        loss = model.loss(batch.tokens, read, batch.labels, generator, targets=latents)
        text, image = part.text * loss.text, part.image * loss.image
        terms = {"loss": text + config.image_loss_weight * image, "text": text, "image": image}
        if config.vision_embedding == "softmax":
            with torch.no_grad():
                mixed = effective_codes(model, latents[:256]).median()
            terms["codes_mixed"] = mixed.nan_to_num() * part.image  # NaN is that of no image
        return terms

    def image_loss_by_level(self, part: Part, generator) -> dict[str, Tensor]:
        """The diffusion loss of clean latents by quarter of the noise levels: where it learns."""
        model, batch = self.model, part.batch.to(self.settings.device)
        is_output = batch.labels == model.config.image_id
        if not isinstance(model.image_head, DiffusionHead) or not is_output.any():
            return {}
        latents, terms, where = self.latents(batch), {}, generator.device
        hidden = model(batch.tokens, latents)[:, :-1][is_output[:, 1:]]
        targets = latents[is_output[batch.tokens == model.config.image_id]]
        for low in range(0, 1000, 250):
            t = low + (250 * torch.rand(len(targets), generator=generator, device=where)).long()
            loss = model.image_head.loss(hidden, targets, t=t, generator=generator)
            terms[f"image_t{low}"] = part.image * loss
        return terms


def effective_codes(model: Orthus, latents: Tensor) -> Tensor:
    """(N, C) -> (N,) exp(entropy) of eq. 4's weights: how many codes a latent mixes."""
    embedding = model.vision_embedding
    log_weights = (embedding.closeness(latents) / embedding.tau).log_softmax(-1)
    return torch.exp(-(log_weights.exp() * log_weights).sum(-1))


class ChameleonStage(TransformerStage):
    """The discrete ancestor, from scratch: nearest codes in, image tokens out (eq. 1, 2)."""

    Settings = ChameleonSettings

    def __init__(self, settings, dataset, start: Checkpoint, resumed: bool):
        self.settings, kinds = settings, dict(vision_embedding="argmin", image_head="tokens")
        model = Orthus(OrthusConfig.preset(settings.preset, **kinds))
        if resumed:
            tokenizer, generation = start.tokenizer.read_bytes(), start.section("generation")
        else:
            texts = [*data.texts_of(dataset), UNCONDITIONAL]
            size = model.config.vocab_size - model.config.image_id  # what is left, and unknown
            tokenizer = data.train_tokenizer(texts, size)
            generation = GENERATION | {"words": sorted(data.words_of(texts))}
        self.build(start, model, tokenizer, generation)
        codebook = model.vision_embedding.codebook.requires_grad_(False)
        codebook.weight.copy_(self.vae.quantize.embedding.weight)


@torch.no_grad()
def to_orthus(settings: BaseSettings, dataset, start: Checkpoint) -> Orthus:
    """Chameleon -> Orthus-base before training (stage 1): argmin becomes softmax over the same
    codebook and image-token rows, image tokens give way to a diffusion head that outputs zero; or
    what --vision-embedding and --image-head say in their place. This is where tau comes from: but
    for 7b it is measured, so that a median latent mixes mixed_codes codes, and so is latent_scale.
    """
    old = Orthus.from_pretrained(start)
    if old.config.image_head != "tokens":
        raise ValueError(f"base makes an Orthus of a Chameleon; {start} is none: use posttrain")
    names = "vision_embedding", "image_head", "tau", "prediction", "zero_terminal_snr"
    given = {n: getattr(settings, n) for n in names if getattr(settings, n) is not None}
    wanted = {"vision_embedding": "softmax", "image_head": "diffusion"} | given
    if settings.preset != "7b":
        vae = VQVAE.from_pretrained(start, "cpu", torch.float32)
        images = pictures(dataset, 10**9, settings.batch_size, vae.config.resolution)[0]
        latents = vae.encode(images).flatten(0, 1)
        wanted["latent_scale"] = 1 / latents.std().item()
        if settings.tau is None:
            wanted["tau"] = tau_that_mixes(settings.mixed_codes, old, latents)
        tqdm.write(f"latent_scale {wanted['latent_scale']:.4g}, tau {wanted.get('tau', 1):.4g}")
    sizes = replace(old.config, **wanted)
    with torch.device("meta"), checkpoint.Blank():  # the old tensors become the new model's
        model = Orthus(sizes)
    torch.manual_seed(settings.seed)
    model.image_head = HEADS[sizes.image_head](sizes, model)
    if sizes.vision_embedding == "linear":
        model.vision_embedding.projection = nn.Linear(sizes.latent_channels, sizes.hidden_size)
    model.load_state_dict(old.state_dict(), strict=False, assign=True)
    return model


def tau_that_mixes(codes: float, model: Orthus, latents: Tensor) -> float:
    """By bisection, since the mixture widens with tau."""
    low, high = 1e-4, 1e4
    for _ in range(40):
        model.vision_embedding.tau = tau = math.sqrt(low * high)
        is_wide = effective_codes(model, latents).median() > codes
        low, high = (low, tau) if is_wide else (tau, high)
    return tau


def place(model: Orthus, settings: TransformerSettings) -> None:
    """On the device, and in fp32 all but frozen matrices, which stay as their checkpoint has them:
    bf16 is what autocast makes of them anyway, in half the memory."""
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear | LowRank)]
    frozen = {w for w in linear if not w.requires_grad and settings.dtype != "float32"}
    for p in model.parameters():
        p.data = p.data.to(settings.device, None if p in frozen else torch.float32)


class BaseStage(TransformerStage):
    """Stage 1: the backbone frozen, vision embedding and image head trained on images only."""

    Settings, images_only = BaseSettings, True

    def __init__(self, settings, dataset, start: Checkpoint, resumed: bool):
        self.settings = settings
        model = Orthus.from_pretrained(start) if resumed else to_orthus(settings, dataset, start)
        model.requires_grad_(False)
        model.vision_embedding.requires_grad_(True)
        model.image_head.requires_grad_(True)
        # The table is one parameter, and only its image rows, the w_j, are to learn: what looks
        # words up in it is cut off from the gradient, so the other rows' gradients are zero.
        model.embed_tokens.requires_grad_(model.config.vision_embedding != "linear")
        model.embed_tokens.register_forward_hook(lambda module, args, out: out.detach())
        generation = start.section("generation")
        if settings.preset == "7b":  # Chameleon becomes Orthus
            generation |= {"cfg_scale": 5.0, "image_first": True}
        self.build(start, model, start.tokenizer.read_bytes(), generation)


class PosttrainStage(TransformerStage):
    """Stage 2: everything but the autoencoder, on all tasks; the transformer's layers by low rank
    where there is one."""

    Settings = PosttrainSettings

    def __init__(self, settings, dataset, start: Checkpoint, resumed: bool):
        self.settings, model = settings, Orthus.from_pretrained(start, settings.device)
        if settings.lora_rank:
            add_low_rank(model.layers, settings)
        generation = start.section("generation")
        self.build(start, model, start.tokenizer.read_bytes(), generation)
        if generation.get("words"):  # a small model that may know more of them now
            words = data.words_of(data.texts_of(dataset, 1000))
            generation["words"] = sorted({*generation["words"], *words})
            strange = [w for w in words if self.words.unk_id in self.words.encode(w)]
            if strange:
                found = f"letters of {len(strange)} words, as {', '.join(strange[:5])}"
                warn(f"the tokenizer does not know {found}; training from stage vae on makes one")


STAGES = {"vae": VAEStage, "decoder": DecoderStage, "chameleon": ChameleonStage}
STAGES |= {"base": BaseStage, "posttrain": PosttrainStage}


# --- Low rank (LoRA, Hu et al. 2106.09685): what fits one GPU at 7B ------------------------------


class LowRank(nn.Module):
    """y = x W^T + scale (x A^T) B^T for a linear layer, whose weight keeps its name: W stays, is
    (out, in); A (rank, in) and B (out, rank) learn. B starts at zero: training begins at W."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        (rows, columns), device = linear.weight.shape, linear.weight.device
        self.weight, self.scale = linear.weight, scale
        self.A = nn.Linear(columns, rank, bias=False, device=device)
        self.B = nn.Linear(rank, rows, bias=False, device=device)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * self.B(self.A(x))


def add_low_rank(layers: nn.ModuleList, settings: PosttrainSettings) -> None:
    """Freeze the transformer's layers and give their linear layers an A and a B. What stands around
    them learns in full, since images and their special tokens come in and go out there."""
    layers.requires_grad_(False)
    unknown = set(settings.lora_targets) - set(LINEAR)
    if unknown:
        raise ValueError(f"lora_targets has {min(unknown)!r}; want some of {', '.join(LINEAR)}")
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if name in settings.lora_targets:
                setattr(parent, name, LowRank(child, settings.lora_rank, settings.lora_scale))


@torch.no_grad()
def merged(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `model`, each A and B folded into its weight, which keeps its
    dtype: an ordinary model. Nothing changes where the model has none."""
    tensors = dict(tensors)
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            a, b = tensors.pop(f"{name}.A.weight"), tensors.pop(f"{name}.B.weight")
            w = tensors[f"{name}.weight"]
            whole = (w + layer.scale * b @ a).to(w.dtype)
            tensors[f"{name}.weight"] = whole.cpu()  # a GPU has no room for all of them twice
    return tensors
