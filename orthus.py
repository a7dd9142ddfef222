"""Orthus: one causal transformer over text tokens and continuous image latents, with two heads.

Follows arXiv 2412.00127, and the released weights where they differ (RESULTS.md, "Differences").

    tokens, latents -> embeddings    VisionEmbedding: eq. 4, and eq. 1-2 as its tau -> 0 limit
    embeddings -> hidden             Orthus.transformer: a Llama-style decoder with QK-norm
    hidden -> next token             Orthus.lm_head: L_ar
    hidden -> next latent            DiffusionHead: eq. 3, its loss and its DDIM sampler

Chameleon is the same class with vision_embedding="argmin" and image_head="tokens". Read in file
order: config, transformer parts, vision embedding, noise schedule, image heads, the model.

Letters: B batch, T sequence, D width, H heads, V vocabulary, K codes, C latent channels, W width
of the image head, N image latents in the batch, L latents per image, G guidance contexts, S
sampling steps. A "latent" is a continuous autoencoder vector, a "token" is discrete, "hidden" is
the transformer's output after its final norm, a "slot" is a place in the cache.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import checkpoint
from checkpoint import within
from vae import closeness


@dataclass
class OrthusConfig:
    """Sizes, choices and token ids of a model; the defaults are the released 7B model's."""

    # transformer
    vocab_size: int = 65536  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008
    num_hidden_layers: int = within(32, 1, 1000)
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = within(4096, 1, 2**20)
    swin_norm: bool = False  # norm after each sub-layer instead of before (Chameleon-34B)
    # images
    num_codes: int = 8192  # K
    latent_channels: int = 256  # C
    latents_per_image: int = 1024  # L
    vision_embedding: Literal["softmax", "argmin", "linear"] = "softmax"  # eq. 4, eq. 1-2, table 5
    tau: float = within(1.0, 0.0, 1e9)  # temperature of eq. 4
    image_head: Literal["diffusion", "mse", "tokens"] = "diffusion"  # eq. 3, appendix C, Chameleon
    # image head
    head_width: int = 1536  # W
    head_blocks: int = within(3, 1, 1000)
    latent_scale: float = 0.1  # what the head noises is latents * latent_scale
    prediction: Literal["velocity", "epsilon"] = "velocity"
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"  # LDM's "linear", DDPM's
    zero_terminal_snr: bool = True
    diffusion_batch_multiplier: int = 8  # times each latent is noised in one loss
    image_loss_weight: float = within(100.0, 0.0, 1e9)  # lambda, of the mean over channels
    # token ids; image code k is token image_code_start + k
    bos_id: int = within(0, 0, 2**24)
    pad_id: int = within(1, 0, 2**24)
    eos_id: int = within(2, 0, 2**24)
    unk_id: int = within(3, 0, 2**24)
    image_code_start: int = within(4, 0, 2**24)
    eoi_id: int = within(8196, 0, 2**24)
    boi_id: int = within(8197, 0, 2**24)
    sep_id: int = within(8710, 0, 2**24)
    image_id: int = within(8711, 0, 2**24)

    def __post_init__(self):
        checkpoint.check_fields(self)
        heads, codes = (self.num_attention_heads, self.num_key_value_heads), self.image_codes
        ids = [value for name, value in vars(self).items() if name.endswith("_id")]
        if self.hidden_size % (2 * heads[0]) or heads[0] % heads[1]:
            raise ValueError(f"hidden_size {self.hidden_size}, query and key heads {heads}; want "
                             "heads of an even width, and as many or several queries to a key")
        if self.vision_embedding == "softmax" and self.tau == 0:
            raise ValueError("tau is 0.0; want more, or its limit: vision_embedding 'argmin'")
        if self.vision_embedding == "linear" and self.image_head == "tokens":
            raise ValueError("image_head 'tokens' needs a codebook; vision_embedding is 'linear'")
        if len(set(ids)) < len(ids) or any(i in codes for i in ids):
            raise ValueError(f"token ids {ids} are not distinct, or among the image codes {codes}")
        if max(*ids, codes[-1]) >= self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size}; token ids {ids}, image codes {codes}")
        NoiseSchedule(self.beta_schedule, self.zero_terminal_snr, self.prediction)  # may raise

    @property
    def image_codes(self) -> range:
        """The tokens of codes 0 to K - 1."""
        return range(self.image_code_start, self.image_code_start + self.num_codes)

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


TINY = dict(
    vocab_size=2304, hidden_size=256, intermediate_size=640, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, num_codes=2048,
    latent_channels=32, latents_per_image=16, head_width=384, diffusion_batch_multiplier=4,
    image_loss_weight=5.0, eoi_id=2052, boi_id=2053, sep_id=2054, image_id=2055,
)
NANO = TINY | dict(
    vocab_size=392, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, num_codes=256, latent_channels=16,
    head_width=256, eoi_id=260, boi_id=261, sep_id=262, image_id=263,
)
PRESETS = {"7b": {}, "tiny": TINY, "nano": NANO}


# --- Transformer parts ---------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """In fp32, then cast, then times the weight: Llama's order."""
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class HeadNorm(nn.LayerNorm):
    """QK-norm: over the channels of each head alone, every head with its own affine map."""
    def forward(self, x: Tensor) -> Tensor:  # (B, T, heads, width)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


def rope(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions (B, T) -> cosines, and sines as `rotate` wants them, (B, T, 1, width), fp32."""
    exponent = torch.arange(0, width, 2, device=positions.device) / width
    angles = positions[..., None, None].float() * theta**-exponent  # (B, T, 1, width / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of a head's width."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


class KVCache:
    """Keys and values of a batch, allocated once for `length` slots a row and zero until written.

    Each row fills its own slots from the first one on, and `visible` (B, length) says which of them
    it sees: a token's position is the number of visible ones before it. So a row with padding
    equals one that never had it, and a slot that was not written yet is simply not visible.
    """
    def __init__(self, config: OrthusConfig, batch: int, length: int, device="cpu", dtype=None):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length)
        self.keys = torch.zeros(*shape, config.head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.visible = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.used = torch.zeros(batch, dtype=torch.long, device=device)  # slots written, by row
        self.rows = torch.arange(batch, device=device)
        self.is_whole = True

    def select(self, rows: list[int]) -> "KVCache":
        """The same cache for some of its rows alone, in that order: what is written is shared."""
        part = copy.copy(self)
        part.is_whole = rows == list(range(len(self.visible)))
        part.rows = torch.tensor(rows, device=self.rows.device)
        return part

    def extend(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Take T more slots a row, visible (B, T) or not -> which slots are theirs (B, T), and
        which of all slots are visible (B, length)."""
        slots = self.used[self.rows, None] + torch.arange(visible.shape[1], device=visible.device)
        self.visible[self.rows[:, None], slots] = visible
        self.used[self.rows] += visible.shape[1]
        return slots, self.visible[self.rows]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, H, T, width) into slots (B, T) -> all keys and values of these rows."""
        keys, values, rows = self.keys[layer], self.values[layer], self.rows[:, None]
        keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
        return (keys, values) if self.is_whole else (keys[self.rows], values[self.rows])


class Attention(nn.Module):
    def __init__(self, config: OrthusConfig, layer: int):
        super().__init__()
        d, width, self.layer = config.hidden_size, config.head_dim, layer
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(d, kv_heads * width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = HeadNorm((heads, width)), HeadNorm((kv_heads, width))

    def forward(self, x, cos, sin, bias, slots, cache: KVCache | None) -> Tensor:
        """bias (B, 1, T, all slots): 0 where a position is seen, -inf where it is not."""
        q = self.q_proj(x).unflatten(-1, self.q_norm.weight.shape)  # (B, T, H, width)
        k = self.k_proj(x).unflatten(-1, self.k_norm.weight.shape)  # (B, T, KV, width)
        v = self.v_proj(x).unflatten(-1, self.k_norm.weight.shape).transpose(1, 2)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (B, H, T, width)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, slots, k, v)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""
    def __init__(self, config: OrthusConfig):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(d, inner, bias=False) for _ in range(2))
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

    def forward(self, x: Tensor, *where) -> Tensor:
        if self.swin_norm:
            x = x + self.input_layernorm(self.self_attn(x, *where))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), *where)
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
        self.kind, self.tau, codes = config.vision_embedding, config.tau, config.image_codes
        self.image_codes = slice(codes.start, codes.stop)  # rows of the table that are the w_j
        self.shared = (embed_tokens,)  # in a tuple, so that it is not registered twice
        if self.kind == "linear":
            self.projection = nn.Linear(config.latent_channels, config.hidden_size)
        else:
            self.codebook = nn.Embedding(config.num_codes, config.latent_channels)

    def logits(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N, K): -|v - c_j|^2, but for a term that is the same for all codes."""
        return closeness(latents, self.codebook.weight)

    def codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) nearest codes (eq. 1)."""
        return self.logits(latents).argmax(-1)

    def effective_codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) exp(entropy) of eq. 4's weights: how many codes a latent mixes."""
        log_weights = (self.logits(latents) / self.tau).log_softmax(-1)
        return torch.exp(-(log_weights.exp() * log_weights).sum(-1))

    def forward(self, latents: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.projection(latents.to(self.projection.weight.dtype))
        table = self.shared[0].weight[self.image_codes]  # (K, D)
        if self.kind == "argmin":
            return F.embedding(self.codes(latents), table)
        return (self.logits(latents) / self.tau).softmax(-1).to(table.dtype) @ table


# --- Noise schedule ------------------------------------------------------------------------------


class NoiseSchedule:
    """1000 noise levels: x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise.

    scaled_linear is LDM's schedule, linear DDPM's; zero_terminal_snr rescales either so that
    alpha_bar_999 = 0 (Lin et al. 2305.08891, algorithm 1).
    """
    def __init__(self, beta_schedule: str, zero_terminal_snr: bool, prediction: str):
        if prediction == "epsilon" and zero_terminal_snr:
            raise ValueError("prediction 'epsilon' at t = 999 is infinite with zero_terminal_snr")
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


# --- Image heads: one interface ------------------------------------------------------------------
#
#     Head(config, model)    the model whose head it is; only TokenHead looks at it
#     .loss(hidden (N, D), latents (N, C), generator=, levels=) -> scalar
#     .prepare(steps)        what sampling needs once an image, not once a latent
#     .sample(hidden (B, G, D), weights (G,), steps=, noise=, generator=, prepared=) -> (B, C)
#     .init_weights()        its own initial values


def randn(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """fp32 normal noise on the device of `like`, drawn where the generator lives."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=device).to(like.device)


def guide(outputs: Tensor, weights: tuple[float, ...] | Tensor) -> Tensor:
    """Outputs (B, G, X) for G guidance contexts -> their sum (B, X) with weights (G,)."""
    if len(weights) != outputs.shape[1]:
        raise ValueError(f"{len(weights)} guidance weights for {outputs.shape[1]} contexts")
    weights = torch.as_tensor(weights, dtype=torch.float32, device=outputs.device)
    return weights @ outputs.float()


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

    def modulation(self, y: Tensor) -> tuple[Tensor, ...]:
        """y (.., W) -> scale, shift, gate, with LN's own affine map folded into the first two."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return self.in_ln.weight * (1 + scale), self.in_ln.bias * (1 + scale) + shift, gate

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=self.in_ln.eps)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, normed, scale)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, y: Tensor) -> tuple[Tensor, ...]:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return 1 + scale, shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(torch.addcmul(shift, normed, scale))


class DiffusionHead(nn.Module):
    """Predicts a latent by diffusion, given the hidden state before it (eq. 3, section 5.1)."""
    hoisted_rows = 4096  # of modulations held at once, 11 W numbers each: bounds the memory

    def __init__(self, config: OrthusConfig, model: "Orthus | None" = None):
        super().__init__()
        w, c = config.head_width, config.latent_channels
        self.latent_scale, self.multiplier = config.latent_scale, config.diffusion_batch_multiplier
        schedule = config.beta_schedule, config.zero_terminal_snr, config.prediction
        self.schedule = NoiseSchedule(*schedule)
        self.time_embed = TimeEmbedding(w)
        self.cond_embed = nn.Linear(config.hidden_size, w)
        self.input_proj = nn.Linear(c, w)
        self.res_blocks = nn.ModuleList(ResBlock(w) for _ in range(config.head_blocks))
        self.final_layer = FinalLayer(w, c)

    def init_weights(self) -> None:
        """Xavier uniform, biases zero, the time MLP N(0, 0.02); AdaLN and final linears zero, so
        that the output starts at zero."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
                nn.init.zeros_(p)
            elif "time_embed" in name:
                nn.init.normal_(p, 0, 0.02)
            elif "in_ln" in name:
                nn.init.ones_(p)
            else:
                nn.init.xavier_uniform_(p)

    def modulations(self, y: Tensor) -> list[tuple[Tensor, ...]]:
        """y = time + condition (.., W) -> AdaLN modulations of each block and the final layer."""
        return [part.modulation(y) for part in (*self.res_blocks, self.final_layer)]

    def denoise(self, x: Tensor, modulations: list[tuple[Tensor, ...]]) -> Tensor:
        """Noisy latents (.., C) in scaled units -> the network's output (.., C)."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for part, modulation in zip((*self.res_blocks, self.final_layer), modulations, strict=True):
            x = part(x, *modulation)
        return x.float()

    def forward(self, noisy: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """(N, C) in scaled units, (N,), (N, D) -> the predicted noise or velocity (N, C)."""
        return self.denoise(noisy, self.modulations(self.time_embed(t) + self.cond_embed(hidden)))

    def loss(self, hidden: Tensor, latents: Tensor, t: Tensor | None = None,
             noise: Tensor | None = None, generator: Generator | None = None,
             levels: tuple[int, int] = (0, 1000)) -> Tensor:
        """Eq. 3: hidden (N, D), latents (N, C) -> squared error, averaged over everything.

        Each latent is noised `diffusion_batch_multiplier` times, unless t (N,) or noise (N, C) is
        given. t is drawn uniformly from the range of `levels`.
        """
        if t is None and noise is None:
            hidden, latents = (x.repeat(self.multiplier, 1) for x in (hidden, latents))
        clean = latents.float() * self.latent_scale
        noise = randn(clean.shape, clean, generator) if noise is None else noise
        if t is None:
            device = generator.device if generator is not None else clean.device
            t = torch.randint(*levels, clean.shape[:1], generator=generator, device=device)
        t = t.to(clean.device)
        output = self(self.schedule.add_noise(clean, noise, t), t, hidden)
        return F.mse_loss(output, self.schedule.target(clean, noise, t))

    def prepare(self, steps: int) -> tuple[Tensor, Tensor]:
        """Time embeddings (S, W), and DDIM's two coefficients of each step (S, 2)."""
        plan = torch.tensor(self.schedule.ddim(steps), device=self.input_proj.weight.device)
        return self.time_embed(plan[:, 0]), plan[:, 1:]

    def step(self, x: Tensor, weights, coefficients: Tensor, modulations) -> Tensor:
        """One step of DDIM for x (B, C): x <- a x + b output, the output guided."""
        a, b = coefficients
        return torch.addcmul(a * x, b, guide(self.denoise(x[:, None], modulations), weights))

    @torch.no_grad()
    def sample(self, hidden: Tensor, weights: tuple[float, ...] | Tensor = (1.0,), steps: int = 100,
               noise: Tensor | None = None, generator: Generator | None = None,
               prepared: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """DDIM, the outputs for the G contexts of a latent summed with weights that add up to 1.

        From step to step only x changes: the modulations, 70% of the head's weights, are computed
        ahead of the loop, many steps in one product.
        """
        if noise is None:
            noise = randn((len(hidden), self.input_proj.in_features), hidden, generator)
        x = noise.float()
        times, coefficients = prepared or self.prepare(steps)
        condition = self.cond_embed(hidden.to(times.dtype))  # (B, G, W)
        ahead = max(1, self.hoisted_rows // hidden[..., 0].numel())  # steps in one product
        for time, pairs in zip(times.split(ahead), coefficients.split(ahead), strict=True):
            parts = self.modulations(time[:, None, None] + condition)  # each (ahead, B, G, W)
            parts = [[m.unbind() for m in part] for part in parts]
            for k, pair in enumerate(pairs.unbind()):
                x = self.step(x, weights, pair, [[m[k] for m in part] for part in parts])
        return x / self.latent_scale


class RegressionHead(nn.Module):
    """Appendix C's ablation: predicts a latent by squared error, so it can only give the mean."""
    def __init__(self, config: OrthusConfig, model: "Orthus | None" = None):
        super().__init__()
        d, w, c = config.hidden_size, config.head_width, config.latent_channels
        self.latent_scale = config.latent_scale
        layers = nn.Linear(d, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, c)
        self.mlp = nn.Sequential(*layers)

    def init_weights(self) -> None:
        """Xavier uniform, biases zero."""
        for p in self.parameters():
            nn.init.zeros_(p) if p.ndim == 1 else nn.init.xavier_uniform_(p)

    def forward(self, hidden: Tensor) -> Tensor:
        """(.., D) -> latents (.., C) in scaled units."""
        return self.mlp(hidden.to(self.mlp[0].weight.dtype)).float()

    def loss(self, hidden: Tensor, latents: Tensor, generator=None, levels=None) -> Tensor:
        """Hidden (N, D), latents (N, C) -> squared error in scaled units, without noise."""
        return F.mse_loss(self(hidden), latents.float() * self.latent_scale)

    def prepare(self, steps: int) -> None: ...

    @torch.no_grad()
    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None, prepared=None):
        """The guided predictions: no steps, no noise."""
        return guide(self(hidden), weights) / self.latent_scale


class TokenHead(nn.Module):
    """Chameleon's way: the LM head says which of the K codes is next. It has no own weights."""
    def __init__(self, config: OrthusConfig, model: "Orthus"):
        super().__init__()
        self.model = (model,)  # in a tuple, so that it is not registered here
        self.image_codes = model.vision_embedding.image_codes

    def init_weights(self) -> None: ...

    def prepare(self, steps: int) -> None: ...

    def loss(self, hidden: Tensor, latents: Tensor, generator=None, levels=None) -> Tensor:
        """Cross-entropy of the nearest codes' tokens over the whole vocabulary."""
        (model,) = self.model
        tokens = model.vision_embedding.codes(latents) + self.image_codes.start
        return F.cross_entropy(model.lm_head(hidden).float(), tokens)

    @torch.no_grad()
    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None, prepared=None):
        """A code drawn from the guided distribution over the K image tokens alone: the noise's
        first channel becomes the uniform number that picks it."""
        (model,) = self.model
        logits = F.linear(hidden, model.lm_head.weight[self.image_codes])  # (B, G, K)
        cumulative = guide(logits, weights).softmax(-1).cumsum(-1)  # (B, K)
        noise = randn((len(hidden), 1), hidden, generator) if noise is None else noise
        codes = torch.searchsorted(cumulative, torch.special.ndtr(noise[:, :1].float()))[:, 0]
        return model.vision_embedding.codebook(codes.clamp(max=cumulative.shape[1] - 1)).float()


HEADS = {"diffusion": DiffusionHead, "mse": RegressionHead, "tokens": TokenHead}


# --- The model -----------------------------------------------------------------------------------


@dataclass
class OrthusLoss:
    """total = text + lambda image: the paper's L. A part without targets is zero."""

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
        self.image_head = HEADS[config.image_head](config, self)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02) for matrices and embeddings, N(0, 0.02 / sqrt(2 layers)) for those that write
        into the residual stream; norms are the identity; the image head knows its own values."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" not in name:  # these are ones from their constructors
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * len(self.layers)) if residual else 0.02)
        self.image_head.init_weights()

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

        What is not visible is seen by no other position. With a cache, these T follow those in it.
        """
        if cache is None:
            slots, seen = torch.arange(x.shape[1], device=x.device).expand(len(x), -1), visible
        else:
            slots, seen = cache.extend(visible)
        positions = (seen.cumsum(1) - 1).clamp(min=0).gather(1, slots)  # (B, T)
        cos, sin = rope(positions, self.config.head_dim, self.config.rope_theta)
        every, here = torch.arange(seen.shape[1], device=x.device), slots[:, None, :, None]
        # a position always sees itself: a softmax over nothing would be NaN
        mask = (seen[:, None, None] & (every <= here)) | (every == here)  # (B, 1, T, slots)
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)
        for layer in self.layers:
            x = layer(x, cos, sin, bias, slots, cache)
        return self.norm(x)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """One more position for every row of a cache: embeddings (B, D) -> hidden (B, D)."""
        visible = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        return self.transformer(x[:, None], visible, cache)[:, 0]

    def forward(self, tokens: Tensor, latents: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T), latents (N, C) -> hidden (B, T, D) after the final norm.

        Latents stand at the positions where tokens == image_id, in reading order over the batch;
        positions where tokens == pad_id are invisible. A count mismatch raises ValueError.
        """
        return self.transformer(self.embed(tokens, latents), tokens != self.config.pad_id, cache)

    def loss(self, tokens: Tensor, latents: Tensor, labels: Tensor,
             generator: Generator | None = None, targets: Tensor | None = None,
             shares: tuple[float, float] = (1.0, 1.0),
             levels: tuple[int, int] = (0, 1000)) -> OrthusLoss:
        """L = L_ar + lambda L_diff, stage 2's objective.

        labels (B, T) are unshifted: -100 is ignored, image_id stands at the placeholders of output
        images, whose latents alone enter the image loss, any other id is a text target. targets
        (N, C) are the latents to predict where those that are read differ from them. shares: how
        much of a whole step's text and image targets is here, so that the totals of its parts add
        up to the step's L. levels: the range of noise levels of a diffusion head.
        """
        targets = latents if targets is None else targets
        hidden = self(tokens, latents)[:, :-1]  # (B, T-1, D): each predicts what comes next
        labels = labels[:, 1:]
        is_output = labels == self.config.image_id
        is_text = (labels != -100) & ~is_output
        text = image = hidden.new_zeros((), dtype=torch.float32)
        if is_text.any():
            logits = self.lm_head(hidden[is_text]).float()
            text = shares[0] * F.cross_entropy(logits, labels[is_text])
        if is_output.any():
            wanted = F.pad(is_output, (1, 0))[tokens == self.config.image_id]  # (N,)
            image = shares[1] * self.image_head.loss(
                hidden[is_output], targets[wanted], generator=generator, levels=levels
            )
        return OrthusLoss(text + self.config.image_loss_weight * image, text, image)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu", dtype=None) -> "Orthus":
        """Read the model of a checkpoint in any layout. dtype None keeps the stored one."""
        return checkpoint.load(cls, OrthusConfig, "model", directory, device, dtype)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config and weights into a checkpoint directory; its other parts are kept."""
        checkpoint.write(directory, {"model": asdict(self.config)}, model=self.state_dict())
