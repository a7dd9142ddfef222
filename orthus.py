"""Orthus: one causal transformer over text tokens and continuous image latents, with two heads.

Follows arXiv 2412.00127, and the released weights where they differ (README, "Differences").

    tokens, latents -> embeddings    VisionEmbedding: eq. 4, and eq. 1-2 as its tau -> 0 limit
    embeddings -> hidden             Orthus.transformer: a Llama-style decoder with QK-norm
    hidden -> next token             Orthus.lm_head: L_ar
    hidden -> next latent            DiffusionHead: eq. 3, its loss and its DDIM sampler

Chameleon is the same class with vision_embedding="argmin" and image_head="tokens". Read in file
order: config, transformer parts, vision embedding, noise schedule, image heads, the model.

Letters: B batch, T sequence, S slots of a cache (or sampling steps), D width, H heads,
V vocabulary, K codes, C latent channels, W head width, N image latents in the batch, L latents per
image, G guidance contexts. A "latent" is a continuous autoencoder vector, a "token" is discrete,
"hidden" is the transformer's output after its final norm.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import checkpoint


@dataclass
class OrthusConfig:
    """Sizes, choices and token ids of a model; the defaults are the released 7B model's."""

    # transformer
    vocab_size: int = 65536  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    swin_norm: bool = False  # norm after each sub-layer instead of before (Chameleon-34B)
    # images
    num_codes: int = 8192  # K
    latent_channels: int = 256  # C
    latents_per_image: int = 1024  # L
    vision_embedding: str = "softmax"  # softmax (eq. 4), argmin (eq. 1-2), linear
    tau: float = 1.0  # temperature of eq. 4
    image_head: str = "diffusion"  # diffusion (eq. 3), mse (appendix C), tokens (Chameleon)
    # image head
    head_width: int = 1536  # W
    head_blocks: int = 3
    latent_scale: float = 0.1  # what the head noises is latents * latent_scale
    prediction: str = "velocity"  # velocity or epsilon
    beta_schedule: str = "scaled_linear"  # scaled_linear (LDM's "linear") or linear (DDPM's)
    zero_terminal_snr: bool = True
    diffusion_batch_multiplier: int = 8  # times each latent is noised in one loss
    image_loss_weight: float = 100.0  # lambda, of the loss averaged over channels
    # token ids; image code k is token image_code_start + k
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    image_code_start: int = 4
    eoi_id: int = 8196
    boi_id: int = 8197
    sep_id: int = 8710
    image_id: int = 8711

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                got = getattr(self, name)
                raise ValueError(f"{name} is {got!r}; known: {', '.join(map(repr, choices))}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.vision_embedding == "softmax" and not self.tau > 0:
            raise ValueError(
                f"tau is {self.tau}; softmax needs tau > 0. The limit tau -> 0 is "
                'vision_embedding="argmin"'
            )
        NoiseSchedule(self.beta_schedule, self.zero_terminal_snr, self.prediction)  # may raise
        if self.image_head == "tokens" and self.vision_embedding == "linear":
            raise ValueError("image_head 'tokens' needs a codebook; 'linear' embedding has none")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **changes) -> "OrthusConfig":
        """A named size, with changes."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))


CHOICES = {
    "vision_embedding": ("softmax", "argmin", "linear"),
    "image_head": ("diffusion", "mse", "tokens"),
    "prediction": ("velocity", "epsilon"),
    "beta_schedule": ("scaled_linear", "linear"),
}

PRESETS = {
    "7b": {},
    "tiny": dict(
        vocab_size=2304,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        num_codes=2048,
        latent_channels=32,
        latents_per_image=16,
        head_width=384,
        diffusion_batch_multiplier=4,
        image_loss_weight=10.0,
        eoi_id=2052,
        boi_id=2053,
        sep_id=2054,
        image_id=2055,
    ),
}


# --- Transformer parts ---------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class HeadNorm(nn.Module):
    """QK-norm: LayerNorm over the channels of each head, every head with its own affine map."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, heads, width)
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight + self.bias


def rope(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions (B, T) -> cosines and sines (B, T, 1, width), split-half layout, fp32."""
    exponent = torch.arange(0, width, 2, device=positions.device) / width
    angles = positions[..., None, None].float() * theta**-exponent  # (B, T, 1, width / 2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


class KVCache:
    """Keys and values of a batch, allocated once for `length` slots and zero until written.

    All rows write the same slots, but each sees its own: `visible` (B, length) says which. A
    token's position is the number of visible tokens before it in its row, so a row with hidden
    slots (padding, text that a guidance context must not see) equals one that never had them.
    """

    def __init__(self, config: OrthusConfig, batch: int, length: int, device="cpu", dtype=None):
        heads, width = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch, heads, length, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.visible = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.length = 0  # slots written so far

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, width) after the written slots -> all keys and values so far."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: OrthusConfig, layer: int):
        super().__init__()
        d, width, self.layer = config.hidden_size, config.head_dim, layer
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, heads * width, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(heads * width, d, bias=False)
        self.q_norm = HeadNorm(heads, width)
        self.k_norm = HeadNorm(kv_heads, width)

    def forward(self, x, cos, sin, bias, cache: KVCache | None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, self.q_norm.weight.shape)  # (B, T, H, width)
        k = self.k_proj(x).unflatten(-1, self.k_norm.weight.shape)  # (B, T, KV, width)
        v = self.v_proj(x).unflatten(-1, self.k_norm.weight.shape).transpose(1, 2)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (B, H, T, width)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k.to(cache.keys.dtype), v.to(cache.values.dtype))
        return self.o_proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """(B, H, T, width), (B, KV, S, width) twice; bias (B, 1, T, S), -inf where nothing is seen."""
    q, k, bias = q.to(v.dtype), k.to(v.dtype), bias.to(v.dtype)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if q.device.type != "cpu" or k.shape[2] > 256:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # short sequences on a CPU: the fused kernel's backward is several times slower than this
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, S)
    return (scores + bias).softmax(-1) @ v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: OrthusConfig):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: OrthusConfig, layer: int):
        super().__init__()
        self.swin_norm = config.swin_norm
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, bias, cache: KVCache | None) -> Tensor:
        if self.swin_norm:
            x = x + self.input_layernorm(self.self_attn(x, cos, sin, bias, cache))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# --- Vision embedding ----------------------------------------------------------------------------


class VisionEmbedding(nn.Module):
    """Latents (N, C) -> embeddings (N, D): the entrance of images into the transformer.

    softmax (eq. 4): h = sum_j w_j softmax_j(-|v - c_j|^2 / tau), c_j the codebook, w_j the
    embeddings of the image tokens. argmin (eq. 1-2): h = w_j of the nearest c_j: Chameleon. linear:
    a projection, no codebook (table 5).
    """

    def __init__(self, config: OrthusConfig, embed_tokens: nn.Embedding):
        super().__init__()
        self.kind, self.tau, self.num_codes = config.vision_embedding, config.tau, config.num_codes
        self.start = config.image_code_start
        self.shared = (embed_tokens,)  # the w_j; in a tuple, so that it is not registered twice
        if self.kind == "linear":
            self.projection = nn.Linear(config.latent_channels, config.hidden_size)
        else:
            self.codebook = nn.Embedding(config.num_codes, config.latent_channels)

    def logits(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N, K): -|v - c_j|^2 up to the term |v|^2, which no softmax or argmax sees.

        In fp32 whatever comes in: bf16 distances change the nearest code of many latents.
        """
        with torch.autocast(latents.device.type, enabled=False):
            codebook = self.codebook.weight.float()
            return 2 * latents.float() @ codebook.T - codebook.square().sum(-1)

    def codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) nearest codes (eq. 1)."""
        return self.logits(latents).argmax(-1)

    def effective_codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) exp(entropy) of eq. 4's weights: how many codes a latent mixes."""
        log_weights = (self.logits(latents) / self.tau).log_softmax(-1)
        return torch.exp(-(log_weights.exp() * log_weights).sum(-1))

    def forward(self, latents: Tensor) -> Tensor:
        table = self.shared[0].weight
        if self.kind == "linear":
            return self.projection(latents.to(self.projection.weight.dtype))
        if self.kind == "argmin":
            return F.embedding(self.codes(latents) + self.start, table)
        weights = (self.logits(latents) / self.tau).softmax(-1)  # (N, K)
        return weights.to(table.dtype) @ table[self.start : self.start + self.num_codes]


# --- Noise schedule ------------------------------------------------------------------------------


class NoiseSchedule:
    """1000 noise levels: x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise.

    scaled_linear is LDM's schedule, linear DDPM's; zero_terminal_snr rescales either so that
    alpha_bar_999 = 0 (Lin et al. 2305.08891, algorithm 1).
    """

    def __init__(self, beta_schedule: str, zero_terminal_snr: bool, prediction: str):
        if prediction == "epsilon" and zero_terminal_snr:
            raise ValueError(
                "prediction 'epsilon' with zero_terminal_snr divides by zero at t = 999; use "
                "prediction 'velocity' or zero_terminal_snr False"
            )
        self.prediction = prediction
        if beta_schedule == "scaled_linear":
            betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        else:
            betas = np.linspace(1e-4, 0.02, 1000)
        root = np.sqrt(np.cumprod(1 - betas))
        if zero_terminal_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.alphas_cumprod = torch.from_numpy(root**2).float()  # (1000,)

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (N,) -> sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (N, 1)."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t][:, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(N, C), (N, C), (N,) -> x_t (N, C)."""
        signal, sigma = self.signal_and_noise(t)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the head is to predict at x_t: the noise (eq. 3), or the velocity."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self.signal_and_noise(t)
        return signal * noise - sigma * latents

    def timesteps(self, steps: int) -> list[int]:
        """Trailing spacing: steps = 100 gives 999, 989, .., 9."""
        if not 1 <= steps <= 1000:
            raise ValueError(f"{steps} sampling steps; the schedule has 1 to 1000")
        return (np.round(1000 - np.arange(steps) * 1000 / steps) - 1).astype(int).tolist()

    def ddim(self, steps: int) -> list[tuple[int, float, float]]:
        """Deterministic DDIM (Song et al. 2010.02502, eta 0) as (t, a, b): x <- a x + b output.

        Each step takes x_t to the next timestep's noise level, the last one to alpha_bar = 1.
        Writing the predicted clean latent and noise in terms of x_t and the head's output makes
        every step linear in both.
        """
        t = self.timesteps(steps)
        levels = np.append(self.alphas_cumprod.double().numpy()[t], 1.0)
        signal, sigma = np.sqrt(levels), np.sqrt(1 - levels)
        s, n, s_next, n_next = signal[:-1], sigma[:-1], signal[1:], sigma[1:]
        if self.prediction == "velocity":  # clean = s x - n v, noise = n x + s v
            a, b = s_next * s + n_next * n, n_next * s - s_next * n
        else:  # clean = (x - n e) / s
            a, b = s_next / s, n_next - s_next * n / s
        return list(zip(t, a.tolist(), b.tolist(), strict=True))


# --- Image heads ---------------------------------------------------------------------------------


def randn(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """fp32 normal noise on the device of `like`, drawn where the generator lives."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=device).to(like.device)


class TimeEmbedding(nn.Module):
    """Timesteps (N,) -> (N, W): 256 sinusoidal features, cosines first, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """x + gate * mlp(LN(x) (1 + scale) + shift), modulated by AdaLN (section 5.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def guidance(weights: tuple[float, ...], hidden: Tensor) -> Tensor:
    """One weight for each context of hidden (B, G, D) -> (G, 1)."""
    if len(weights) != hidden.shape[1]:
        raise ValueError(
            f"got {len(weights)} guidance weights for {hidden.shape[1]} contexts; give one for each"
        )
    return torch.as_tensor(weights, dtype=torch.float32, device=hidden.device)[:, None]


class DiffusionHead(nn.Module):
    """Predicts a latent by diffusion, conditioned on the hidden state before it (eq. 3, 5.1).

    Latents are scaled by latent_scale here and nowhere else.
    """

    def __init__(self, config: OrthusConfig):
        super().__init__()
        w, c = config.head_width, config.latent_channels
        self.latent_scale, self.multiplier = config.latent_scale, config.diffusion_batch_multiplier
        self.schedule = NoiseSchedule(
            config.beta_schedule, config.zero_terminal_snr, config.prediction
        )
        self.time_embed = TimeEmbedding(w)
        self.cond_embed = nn.Linear(config.hidden_size, w)
        self.input_proj = nn.Linear(c, w)
        self.res_blocks = nn.ModuleList(ResBlock(w) for _ in range(config.head_blocks))
        self.final_layer = FinalLayer(w, c)

    def modulations(self, y: Tensor) -> list[Tensor]:
        """y = time + condition (.., W) -> AdaLN modulations of each block and the final layer."""
        return [part.adaLN_modulation(y) for part in (*self.res_blocks, self.final_layer)]

    def denoise(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """Noisy latents (.., C) in scaled units -> the network's output (.., C)."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block, modulation in zip(self.res_blocks, modulations, strict=False):
            x = block(x, modulation)
        return self.final_layer(x, modulations[-1]).float()

    def forward(self, noisy: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """(N, C) in scaled units, (N,), (N, D) -> the predicted noise or velocity (N, C)."""
        return self.denoise(noisy, self.modulations(self.time_embed(t) + self.cond_embed(hidden)))

    def loss(
        self,
        hidden: Tensor,
        latents: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Eq. 3: hidden (N, D), latents (N, C) -> squared error, averaged over everything.

        Each latent is noised `diffusion_batch_multiplier` times, unless t (N,) or noise (N, C) is
        given. t is uniform over 0..999.
        """
        if t is None and noise is None:
            hidden = hidden.repeat(self.multiplier, 1)
            latents = latents.repeat(self.multiplier, 1)
        clean = latents.float() * self.latent_scale
        if noise is None:
            noise = randn(clean.shape, clean, generator)
        if t is None:
            device = generator.device if generator is not None else clean.device
            t = torch.randint(1000, clean.shape[:1], generator=generator, device=device)
        t = t.to(clean.device)
        output = self(self.schedule.add_noise(clean, noise, t), t, hidden)
        return F.mse_loss(output, self.schedule.target(clean, noise, t))

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        weights: tuple[float, ...] = (1.0,),
        steps: int = 100,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """DDIM: hidden (B, G, D) -> latents (B, C).

        The outputs for the G guidance contexts of a latent are summed with `weights` (G,), which
        add up to 1. From step to step only x changes: the modulations, 70% of the head's weights,
        are computed ahead of the loop, many steps in one product.
        """
        batch, contexts, _ = hidden.shape
        if noise is None:
            noise = randn((batch, self.input_proj.in_features), hidden, generator)
        x = noise.float()
        weights = guidance(weights, hidden)  # (G, 1)
        path = self.schedule.ddim(steps)
        time = self.time_embed(torch.tensor([t for t, _, _ in path], device=hidden.device))
        condition = self.cond_embed(hidden.to(time.dtype))  # (B, G, W)
        ahead = max(1, HOISTED_ROWS // max(1, batch * contexts))  # steps per product
        for first in range(0, steps, ahead):
            y = time[first : first + ahead, None, None] + condition  # (ahead, B, G, W)
            modulations = [m.unbind(0) for m in self.modulations(y)]
            for (_, a, b), *now in zip(path[first : first + ahead], *modulations, strict=True):
                output = self.denoise(x[:, None], now)  # (B, G, C)
                x = a * x + b * (weights * output).sum(1)
        return x / self.latent_scale


HOISTED_ROWS = 4096  # rows of modulations held at once, 11 W numbers each: bounds the memory


class RegressionHead(nn.Module):
    """Appendix C's ablation: predicts a latent by squared error, so it can only give the mean."""

    def __init__(self, config: OrthusConfig):
        super().__init__()
        d, w, c = config.hidden_size, config.head_width, config.latent_channels
        self.latent_scale = config.latent_scale
        self.mlp = nn.Sequential(
            nn.Linear(d, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, c)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(.., D) -> latents (.., C) in scaled units."""
        return self.mlp(hidden.to(self.mlp[0].weight.dtype)).float()


# --- The model -----------------------------------------------------------------------------------


@dataclass
class OrthusLoss:
    """total = text + lambda image; a part without targets is zero."""

    total: Tensor
    text: Tensor
    image: Tensor


class Orthus(nn.Module):
    def __init__(self, config: OrthusConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embedding = VisionEmbedding(config, self.embed_tokens)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.image_head == "diffusion":
            self.diffusion_head = DiffusionHead(config)
        elif config.image_head == "mse":
            self.regression_head = RegressionHead(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, part: str = "") -> None:
        """Every initial value in one place; `part` limits it to names that begin so.

        transformer matrices, embeddings, LM head    N(0, 0.02); those that write into the residual
                                                     stream N(0, 0.02 / sqrt(2 layers))
        image head's matrices                        Xavier uniform, biases zero
        its time MLP                                 N(0, 0.02)
        its AdaLN and final linears                  zero: the head's output starts at zero
        """
        for name, p in self.named_parameters():
            if not name.startswith(part) or "norm" in name or "in_ln" in name:
                continue  # norms: ones and zeros from their constructors
            if name.endswith("bias") or "adaLN" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)
            elif "time_embed" in name or "_head" not in name.replace("lm_head", ""):
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * len(self.layers)) if residual else 0.02)
            else:
                nn.init.xavier_uniform_(p)

    def embed(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """tokens (B, T), latents (N, C) in reading order over the batch -> (B, T, D)."""
        hidden = self.embed_tokens(tokens)
        is_image = tokens == self.config.image_id
        if (count := int(is_image.sum())) != len(latents):
            raise ValueError(f"{count} image positions in tokens, but {len(latents)} latents")
        if count == 0:
            return hidden
        vision = self.vision_embedding(latents).to(hidden.dtype)
        return hidden.masked_scatter(is_image[..., None], vision)

    def transformer(self, x: Tensor, visible: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, T, D), visible (B, T) -> hidden (B, T, D) after the final norm.

        Positions that are not visible are seen by no other and take no position. With a cache, the
        T positions follow those already in it.
        """
        past, new = (cache.length if cache else 0), x.shape[1]
        if cache is not None:
            cache.visible[:, past : past + new] = visible
            visible = cache.visible[:, : past + new]
        position = (visible.cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
        cos, sin = rope(position, self.config.head_dim, self.config.rope_theta)
        slots = torch.arange(past + new, device=x.device)
        here = slots[past:, None]  # (T, 1)
        # a position always sees itself: a softmax over nothing would be NaN
        mask = (visible[:, None] & (slots <= here) | (slots == here))[:, None]  # (B, 1, T, S)
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -math.inf)
        for layer in self.layers:
            x = layer(x, cos, sin, bias, cache)
        if cache is not None:
            cache.length += new
        return self.norm(x)

    def forward(self, tokens: Tensor, latents: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T), latents (N, C) -> hidden (B, T, D) after the final norm.

        Latents stand at the positions where tokens == image_id, in reading order over the batch;
        positions where tokens == pad_id are invisible. A count mismatch raises ValueError.
        """
        return self.transformer(self.embed(tokens, latents), tokens != self.config.pad_id, cache)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """hidden (.., D) -> logits of the K image codes alone (.., K)."""
        start = self.config.image_code_start
        return F.linear(hidden, self.lm_head.weight[start : start + self.config.num_codes]).float()

    def image_loss(self, hidden: Tensor, latents: Tensor, generator: Generator | None) -> Tensor:
        """hidden (N, D) before each latent (N, C) -> L_diff, or an ablation's loss in its place."""
        if self.config.image_head == "diffusion":
            return self.diffusion_head.loss(hidden, latents, generator=generator)
        if self.config.image_head == "mse":
            target = latents.float() * self.regression_head.latent_scale
            return F.mse_loss(self.regression_head(hidden), target)
        start = self.config.image_code_start
        codes = self.vision_embedding.codes(latents)
        return F.cross_entropy(self.lm_head(hidden).float(), codes + start)

    def loss(
        self,
        tokens: Tensor,
        latents: Tensor,
        labels: Tensor,
        generator: Generator | None = None,
        input_noise: float = 0.0,
    ) -> OrthusLoss:
        """L = L_ar + lambda L_diff, stage 2's objective.

        labels (B, T) are unshifted: -100 is ignored, image_id stands at the placeholders of output
        images, whose latents alone enter the image loss, any other id is a text target.
        input_noise, in standard deviations of the latents, is added to output images where they are
        read back, not where they are predicted: when it samples, the model reads its own drawing,
        which is never exact.
        """
        labels, is_image = labels[:, 1:], (tokens == self.config.image_id)
        is_output = labels == self.config.image_id
        wanted = F.pad(is_output, (1, 0))[is_image]  # (N,): which latents are targets
        read = latents
        if input_noise > 0:
            noise = input_noise * latents.std() * randn(latents.shape, latents, generator)
            read = latents + noise * wanted[:, None]
        hidden = self(tokens, read)[:, :-1]  # (B, T-1, D): each predicts what comes next
        is_text = (labels != -100) & ~is_output
        text = image = hidden.new_zeros((), dtype=torch.float32)
        if is_text.any():
            text = F.cross_entropy(self.lm_head(hidden[is_text]).float(), labels[is_text])
        if is_output.any():
            image = self.image_loss(hidden[is_output], latents[wanted], generator)
        return OrthusLoss(text + self.config.image_loss_weight * image, text, image)

    @torch.no_grad()
    def sample_latents(
        self, hidden: Tensor, weights: tuple[float, ...], steps: int, noise: Tensor
    ) -> Tensor:
        """Next latents (B, C) from hidden (B, G, D), guided as in DiffusionHead.sample.

        All randomness comes from noise (B, C): the regression head needs none, the token head
        turns its first channel into the uniform number that picks a code.
        """
        if self.config.image_head == "diffusion":
            return self.diffusion_head.sample(hidden, weights, steps, noise)
        weights = guidance(weights, hidden)  # (G, 1)
        if self.config.image_head == "mse":
            output = (weights * self.regression_head(hidden)).sum(1)
            return output / self.regression_head.latent_scale
        probabilities = (weights * self.image_logits(hidden)).sum(1).softmax(-1)  # (B, K)
        uniform = torch.special.ndtr(noise[:, :1].float())
        codes = torch.searchsorted(probabilities.cumsum(-1), uniform)[:, 0]
        codes = codes.clamp(max=self.config.num_codes - 1)
        return self.vision_embedding.codebook(codes).float()

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu", dtype=None) -> "Orthus":
        """Read the model of a checkpoint in any layout. dtype None keeps the stored one."""
        config, tensors = checkpoint.read_model(directory)
        with torch.device("meta"):
            model = cls(checkpoint.build(OrthusConfig, config, directory))
        checkpoint.assign(model, tensors, directory, device, dtype)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config and weights into a checkpoint directory; its other parts are kept."""
        checkpoint.write(
            directory, {"model": dataclasses.asdict(self.config)}, model=self.state_dict()
        )
