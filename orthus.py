"""Orthus: one causal transformer over text tokens and continuous image latents, with two heads.

Follows arXiv 2412.00127; where the released weights differ: docs/results.md. Needs PyTorch alone.

    tokens, latents -> embeddings    VisionEmbedding: eq. 4, and eq. 1-2 as its tau -> 0 limit
    embeddings -> hidden             Orthus.transformer: a Llama-style decoder with QK-norm
    hidden -> next token             Orthus.lm_head: L_ar
    hidden -> next latent            DiffusionHead: eq. 3, its loss and its DDIM sampler

Chameleon is the same class with vision_embedding="argmin" and image_head="tokens".
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

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute


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
    vision_embedding: Literal["softmax", "argmin", "linear"] = "softmax"  # eq. 4, eq. 1-2, table 5
    tau: float = 1.0  # temperature of eq. 4
    image_head: str = "diffusion"  # a name in HEADS: eq. 3; "mse": appendix C; "tokens": Chameleon
    # image head
    head_width: int = 1536  # W
    head_blocks: int = 3
    latent_scale: float = 0.1  # what the head noises is latents * latent_scale
    prediction: Literal["velocity", "epsilon"] = "velocity"
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"  # LDM's "linear", DDPM's
    zero_terminal_snr: bool = True
    diffusion_batch_multiplier: int = 8  # times each latent is noised in one loss
    image_loss_weight: float = 100.0  # lambda, of the mean over channels
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
        ids = [value for name, value in vars(self).items() if name.endswith("_id")]
        codes, heads = self.image_codes, (self.num_attention_heads, self.num_key_value_heads)
        if self.hidden_size % (2 * heads[0]) or heads[0] % heads[1]:
            found = f"hidden_size {self.hidden_size}, query and key heads {heads}"
            raise ValueError(f"{found}; want an even width, and as many or several queries a key")
        if self.image_head not in HEADS:
            raise ValueError(f"image_head is {self.image_head!r}; want one of {', '.join(HEADS)}")
        if self.vision_embedding == "softmax" and self.tau == 0:
            raise ValueError("tau is 0.0; want more, or its limit: vision_embedding 'argmin'")
        if self.vision_embedding == "linear" and self.image_head == "tokens":
            raise ValueError("image_head 'tokens' needs a codebook; vision_embedding is 'linear'")
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError("prediction 'epsilon' is infinite with zero_terminal_snr")
        clash = len(set(ids)) < len(ids) or any(i in codes for i in ids)
        if clash or max(*ids, codes[-1]) >= self.vocab_size:
            found = f"vocab_size {self.vocab_size}, token ids {ids}, image codes {codes}"
            raise ValueError(f"{found}; want ids apart, and inside the vocabulary")

    @property
    def image_codes(self) -> range:
        """The tokens of codes 0 to K - 1."""
        return range(self.image_code_start, self.image_code_start + self.num_codes)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **changes) -> "OrthusConfig":
        """A named size, with changes."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))


TINY = dict(vocab_size=2304, hidden_size=256, intermediate_size=640, num_hidden_layers=6)
TINY |= dict(num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
TINY |= dict(num_codes=2048, latent_channels=32, latents_per_image=16, head_width=384)
TINY |= dict(diffusion_batch_multiplier=4, image_loss_weight=5.0)
TINY |= dict(eoi_id=2052, boi_id=2053, sep_id=2054, image_id=2055)
NANO = TINY | dict(vocab_size=392, hidden_size=128, intermediate_size=320, num_hidden_layers=4)
NANO |= dict(num_attention_heads=4, num_key_value_heads=4, num_codes=256, latent_channels=16)
NANO |= dict(head_width=256, eoi_id=260, boi_id=261, sep_id=262, image_id=263)
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
    equals one that never had it, and a slot that was not written yet is simply not visible."""

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
        """Take T more slots a row, visible or not (B, T) -> these, and all visible (B, length)."""
        slots = self.used[self.rows, None] + torch.arange(visible.shape[1], device=visible.device)
        self.visible[self.rows[:, None], slots] = visible
        self.used[self.rows] += visible.shape[1]
        return slots, self.visible[self.rows]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, H, T, width) into slots (B, T) -> all keys and values of these rows."""
        keys, values, rows = self.keys[layer], self.values[layer], self.rows[:, None]
        # rows and slots, both (B, T), are indexed together, and so come first: (B, T, H, width)
        keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
        return (keys, values) if self.is_whole else (keys[self.rows], values[self.rows])


class Attention(nn.Module):
    def __init__(self, config: OrthusConfig, layer: int):
        super().__init__()
        d, width = config.hidden_size, config.head_dim
        self.layer, self.heads = layer, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.q_proj = nn.Linear(d, self.heads * width, bias=False)
        self.o_proj = nn.Linear(self.heads * width, d, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * width, bias=False)
        self.q_norm = HeadNorm((self.heads, width))
        self.k_norm = HeadNorm((self.kv_heads, width))

    def forward(self, x, cos, sin, bias, slots, cache: KVCache | None) -> Tensor:
        """bias (B, 1, T, all slots): 0 where a position is seen, -inf where it is not."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # (B, T, H, width)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))  # (B, T, KV, width)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (B, H, T, width)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, slots, k, v)
        grouped = self.heads != self.kv_heads  # several queries to a key
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):  # SwiGLU
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

    def forward(self, x, cos, sin, bias, slots, cache) -> Tensor:
        if self.swin_norm:
            x = x + self.input_layernorm(self.self_attn(x, cos, sin, bias, slots, cache))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias, slots, cache)
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
        self.kind, self.tau = config.vision_embedding, config.tau
        codes = config.image_codes
        self.image_codes = slice(codes.start, codes.stop)  # rows of the table that are the w_j
        # past nn.Module's own way, which would register the model's table here a second time
        object.__setattr__(self, "embed_tokens", embed_tokens)
        if self.kind == "linear":
            self.projection = nn.Linear(config.latent_channels, config.hidden_size)
        else:
            self.codebook = nn.Embedding(config.num_codes, config.latent_channels)

    def closeness(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N, K): -|v - c_j|^2 but for |v|^2, which no argmax or softmax sees. In fp32,
        since distances in bf16 change the nearest code of many latents."""
        with torch.autocast(latents.device.type, enabled=False):
            codebook = self.codebook.weight.float()
            return 2 * latents.float() @ codebook.T - codebook.square().sum(-1)

    def codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) nearest codes (eq. 1)."""
        return self.closeness(latents).argmax(-1)

    def forward(self, latents: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.projection(latents.to(self.projection.weight.dtype))
        table = self.embed_tokens.weight[self.image_codes]  # (K, D)
        if self.kind == "argmin":
            return table[self.codes(latents)]
        weights = (self.closeness(latents) / self.tau).softmax(-1)  # (N, K)
        return weights.to(table.dtype) @ table


# --- Noise schedule ------------------------------------------------------------------------------


class NoiseSchedule:
    """1000 noise levels: x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise. scaled_linear is
    LDM's schedule, linear DDPM's; zero_terminal_snr rescales either so that alpha_bar_999 = 0
    (Lin et al. 2305.08891, algorithm 1)."""

    def __init__(self, beta_schedule: str, zero_terminal_snr: bool, prediction: str):
        if prediction == "epsilon" and zero_terminal_snr:
            raise ValueError("prediction 'epsilon' at t = 999 is infinite with zero_terminal_snr")
        self.prediction = prediction
        low, high, power = 1e-4, 0.02, 1
        if beta_schedule == "scaled_linear":
            low, high, power = 0.00085**0.5, 0.012**0.5, 2
        betas = torch.linspace(low, high, 1000, dtype=torch.float64, device="cpu") ** power
        root = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.alphas_cumprod = (root**2).float()  # (1000,)

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
        return [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]

    def ddim(self, steps: int) -> list[tuple[int, float, float]]:
        """Deterministic DDIM (Song et al. 2010.02502, eta 0) as (t, a, b): x <- a x + b output.
        Each step goes to the next timestep's noise level, the last one to alpha_bar = 1. It is
        linear, since the clean latent and the noise are linear in x and the output."""
        times, plan = self.timesteps(steps), []
        levels = [*self.alphas_cumprod.double()[times].tolist(), 1.0]
        for t, level, next_level in zip(times, levels, levels[1:]):
            s, n = math.sqrt(level), math.sqrt(1 - level)  # signal and noise now
            s_next, n_next = math.sqrt(next_level), math.sqrt(1 - next_level)
            if self.prediction == "velocity":  # clean = s x - n v, noise = n x + s v
                plan.append((t, s_next * s + n_next * n, n_next * s - s_next * n))
            else:  # clean = (x - n e) / s, noise = e
                plan.append((t, s_next / s, n_next - s_next * n / s))
        return plan


# --- Image heads: one interface ------------------------------------------------------------------
# Head(config, model), .loss(hidden (N, D), latents (N, C), generator=) -> scalar, and
# .sample(hidden (B, G, D), weights (G,), steps=, noise=, generator=) -> latents (B, C).
# A new head is a class like these and an entry of HEADS, which may be made in a file of its own.


def randn(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """fp32 normal noise on the device of `like`, drawn where the generator lives."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=device).to(like.device)


def guide(outputs: Tensor, weights: tuple[float, ...] | Tensor) -> Tensor:
    """Outputs (B, G, X) for G guidance contexts -> their sum (B, X) with weights (G,)."""
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

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """linear(LN(x) (1 + scale) + shift), the norm without weights of its own."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """Predicts a latent by diffusion, given the hidden state before it (eq. 3, section 5.1). The
    scaled units in which it noises and draws, latents * latent_scale, never leave it."""

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
        self.plans: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}
        self.init_weights()

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

    def modulations(self, y: Tensor) -> list[Tensor]:
        """y = time + condition (.., W) -> what AdaLN makes of it, for each block and the end."""
        return [part.adaLN_modulation(y) for part in (*self.res_blocks, self.final_layer)]

    def denoise(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """Noisy latents (.., C) in scaled units -> the network's output (.., C), fp32."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block, modulation in zip(self.res_blocks, modulations):
            x = block(x, modulation)
        return self.final_layer(x, modulations[-1]).float()

    def forward(self, noisy: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """(N, C) in scaled units, (N,), (N, D) -> the predicted noise or velocity (N, C)."""
        return self.denoise(noisy, self.modulations(self.time_embed(t) + self.cond_embed(hidden)))

    def loss(self, hidden, latents, t=None, noise=None, generator=None) -> Tensor:
        """Eq. 3: hidden (N, D), latents (N, C) -> squared error, averaged over everything. Each
        latent is noised `multiplier` times at random t, unless t (N,) or noise (N, C) is given."""
        if t is None and noise is None:
            hidden, latents = hidden.repeat(self.multiplier, 1), latents.repeat(self.multiplier, 1)
        clean = latents.float() * self.latent_scale
        if noise is None:
            noise = randn(clean.shape, clean, generator)
        if t is None:
            device = clean.device if generator is None else generator.device
            t = torch.randint(1000, clean.shape[:1], generator=generator, device=device)
            t = t.to(clean.device)
        output = self(self.schedule.add_noise(clean, noise, t), t, hidden)
        return F.mse_loss(output, self.schedule.target(clean, noise, t))

    def plan(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """DDIM's t, a, b, each (S,), on the head's device, where they are kept: a CUDA graph can
        not record copies from the host."""
        device = self.input_proj.weight.device
        if (steps, device) not in self.plans:
            t, a, b = torch.tensor(self.schedule.ddim(steps), device=device).unbind(1)
            self.plans[steps, device] = t, a, b
        return self.plans[steps, device]

    @torch.no_grad()
    def sample_naive(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None) -> Tensor:
        """The same as `sample`, two to three times slower: read this first. hidden (B, G, D) for G
        guidance contexts, weights (G,), noise (B, C) -> latents (B, C) by DDIM."""
        (batch, contexts), channels = hidden.shape[:2], self.input_proj.in_features
        x = randn((batch, channels), hidden, generator) if noise is None else noise.float()
        for t, a, b in self.schedule.ddim(steps):
            noisy = x.repeat_interleave(contexts, 0)  # (B G, C)
            times = torch.full((batch * contexts,), t, device=x.device)
            output = self(noisy, times, hidden.flatten(0, 1)).unflatten(0, (batch, contexts))
            x = a * x + b * guide(output, weights)
        return x / self.latent_scale

    @torch.no_grad()
    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None) -> Tensor:
        """DDIM: hidden (B, G, D), weights (G,) that add up to 1, noise (B, C) -> latents (B, C).
        From step to step only x changes: the modulations of all steps, 70% of the head's weights,
        come from one product ahead of the loop."""
        shape = len(hidden), self.input_proj.in_features
        x = randn(shape, hidden, generator) if noise is None else noise.float()
        t, a, b = self.plan(steps)
        hidden = hidden.to(self.input_proj.weight.dtype)
        y = self.time_embed(t)[:, None, None] + self.cond_embed(hidden)  # (S, B, G, W)
        modulations = self.modulations(y)
        for k in range(steps):
            outputs = self.denoise(x[:, None], [m[k] for m in modulations])  # (B, G, C)
            x = a[k] * x + b[k] * guide(outputs, weights)
        return x / self.latent_scale


class RegressionHead(nn.Module):
    """Appendix C's ablation: predicts a latent by squared error, so it can only give the mean."""

    def __init__(self, config: OrthusConfig, model: "Orthus | None" = None):
        super().__init__()
        d, w, c = config.hidden_size, config.head_width, config.latent_channels
        self.latent_scale = config.latent_scale
        hidden_layers = [nn.Linear(d, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU()]
        self.mlp = nn.Sequential(*hidden_layers, nn.Linear(w, c))  # with PyTorch's own values

    def forward(self, hidden: Tensor) -> Tensor:
        """(.., D) -> latents (.., C) in scaled units."""
        return self.mlp(hidden.to(self.mlp[0].weight.dtype)).float()

    def loss(self, hidden: Tensor, latents: Tensor, generator=None) -> Tensor:
        """Hidden (N, D), latents (N, C) -> squared error in scaled units, without noise."""
        return F.mse_loss(self(hidden), latents.float() * self.latent_scale)

    @torch.no_grad()
    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None) -> Tensor:
        """The guided predictions: no steps, no noise."""
        return guide(self(hidden), weights) / self.latent_scale


class TokenHead(nn.Module):
    """Chameleon's way: the LM head says which of the K codes is next. It adds no weights."""

    def __init__(self, config: OrthusConfig, model: "Orthus"):
        super().__init__()
        # past nn.Module's own way, which would register the whole model inside its head
        object.__setattr__(self, "model", model)
        self.image_codes = model.vision_embedding.image_codes

    def loss(self, hidden: Tensor, latents: Tensor, generator=None) -> Tensor:
        """Cross-entropy of the nearest codes' tokens over the whole vocabulary."""
        tokens = self.model.vision_embedding.codes(latents) + self.image_codes.start
        return F.cross_entropy(self.model.lm_head(hidden).float(), tokens)

    @torch.no_grad()
    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None) -> Tensor:
        """A code drawn from the guided distribution over the K image tokens alone: the noise's
        first channel becomes the uniform number that picks it."""
        logits = F.linear(hidden, self.model.lm_head.weight[self.image_codes])  # (B, G, K)
        cumulative = guide(logits, weights).softmax(-1).cumsum(-1)  # (B, K)
        noise = randn((len(hidden), 1), hidden, generator) if noise is None else noise
        codes = torch.searchsorted(cumulative, torch.special.ndtr(noise[:, :1].float()))[:, 0]
        codes = codes.clamp(max=cumulative.shape[1] - 1)  # a sum may end a hair below 1
        return self.model.vision_embedding.codebook(codes).float()


HEADS = {"diffusion": DiffusionHead, "mse": RegressionHead, "tokens": TokenHead}


# --- The model -----------------------------------------------------------------------------------


@dataclass
class OrthusLoss:
    """total = text + lambda image: the paper's L. A part without targets is zero."""

    total: Tensor
    text: Tensor
    image: Tensor


class Orthus(nn.Module):
    """Tokens and latents in one row, one causal transformer, two heads."""

    checkpoint_activations = False  # True: layers compute again for gradients instead of keeping

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
        """N(0, 0.02); N(0, 0.02 / sqrt(2 layers)) for what writes into the residual stream."""
        for name, p in self.named_parameters():
            if name.startswith("image_head") or "norm" in name:
                continue  # these have their values already
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * len(self.layers)))
            else:
                nn.init.normal_(p, 0, 0.02)

    def embed(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """tokens (B, T), latents (N, C) in reading order over the batch -> (B, T, D)."""
        hidden = self.embed_tokens(tokens)
        is_image = tokens == self.config.image_id
        count = int(is_image.sum())
        if count != len(latents):
            raise ValueError(f"{count} image positions in tokens, but {len(latents)} latents")
        if len(latents) == 0:
            return hidden
        vision = self.vision_embedding(latents).to(hidden.dtype)
        return hidden.masked_scatter(is_image[..., None], vision)

    def transformer(self, x: Tensor, visible: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, T, D), visible (B, T) -> hidden (B, T, D) after the final norm. What is
        not visible no other position sees. With a cache, these T follow those in it."""
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
            if self.checkpoint_activations:
                x = recompute(layer, x, cos, sin, bias, slots, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, bias, slots, cache)
        return self.norm(x)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """One more position for every row of a cache: embeddings (B, D) -> hidden (B, D)."""
        visible = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        return self.transformer(x[:, None], visible, cache)[:, 0]

    def forward(self, tokens: Tensor, latents: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T), latents (N, C) -> hidden (B, T, D) after the final norm. Latents stand
        where tokens == image_id, in reading order over the batch (another count raises
        ValueError); where tokens == pad_id nothing is seen."""
        return self.transformer(self.embed(tokens, latents), tokens != self.config.pad_id, cache)

    def loss(self, tokens, latents, labels, generator=None, targets=None) -> OrthusLoss:
        """L = L_ar + lambda L_diff, stage 2's objective.
        labels (B, T) are unshifted: -100 is ignored, image_id stands at the placeholders of output
        images, whose latents alone enter the image loss, any other id is a text target. targets
        (N, C) are the latents to predict where those that are read differ from them.
        """
        targets = latents if targets is None else targets
        hidden = self(tokens, latents)[:, :-1]  # (B, T-1, D): each predicts what comes next
        wanted = labels[:, 1:]
        is_output = wanted == self.config.image_id
        is_text = (wanted != -100) & ~is_output
        text = image = hidden.new_zeros((), dtype=torch.float32)
        if is_text.any():
            text = F.cross_entropy(self.lm_head(hidden[is_text]).float(), wanted[is_text])
        if is_output.any():
            drawn = labels[tokens == self.config.image_id] == self.config.image_id  # (N,)
            image = self.image_head.loss(hidden[is_output], targets[drawn], generator=generator)
        return OrthusLoss(text + self.config.image_loss_weight * image, text, image)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu", dtype=None) -> "Orthus":
        """Read the model of a checkpoint in any layout. dtype None keeps the stored one."""
        import checkpoint  # in here, so that reading the method needs PyTorch alone

        return checkpoint.load(cls, OrthusConfig, "model", directory, device, dtype)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config and weights into a checkpoint directory; its other parts are kept."""
        import checkpoint

        checkpoint.write(directory, {"model": asdict(self.config)}, model=self.state_dict())
