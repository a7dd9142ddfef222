"""The vision autoencoder: Chameleon's VQ-VAE, whose quantisation Orthus drops.

Follows Orthus (arXiv 2412.00127), eq. 1 and appendix A: the encoder's continuous latents are
what the transformer reads and writes. The same class serves both uses:

    quantised    images -> encode -> quantize -> codes -> lookup -> decode      (Chameleon, eq. 1)
    continuous   images -> encode -> latents -----------------------> decode      (Orthus, eq. 4)

Letters: B batch, H W image height and width, h w = H/f W/f, L = h w latents per image, C latent
channels, K codes. Module names are those of the released checkpoints. Read bottom to top: VQVAE,
then Encoder and Decoder, then their blocks.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VQVAEConfig:
    """Sizes of the autoencoder; the defaults are Chameleon's (512 px, f = 16)."""

    resolution: int = 512
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # per level; the decoder has one more
    latent_channels: int = 256  # C
    num_codes: int = 8192  # K
    groups: int = 32  # of every GroupNorm

    def __post_init__(self):
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {self.downsampling}, which "
                f"the {len(self.channel_multiplier)} levels of channel_multiplier ask for"
            )
        for m in self.channel_multiplier:
            if self.base_channels * m % self.groups:
                raise ValueError(
                    f"{self.base_channels * m} channels cannot be split into {self.groups} groups"
                )

    @property
    def downsampling(self) -> int:
        """f: image pixels per latent, along each side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def latents_per_image(self) -> int:
        """L: latents of one image."""
        return (self.resolution // self.downsampling) ** 2

    @classmethod
    def preset(cls, name: str) -> "VQVAEConfig":
        if name not in PRESETS:
            raise ValueError(f"unknown autoencoder preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


TINY = dict(resolution=64, base_channels=32, channel_multiplier=(1, 1, 2, 3, 3), num_res_blocks=1)
TINY |= dict(latent_channels=32, num_codes=2048)
TINY |= dict(groups=1)  # twice as fast in training on a CPU as 8 or 32
NANO = TINY | dict(resolution=32, base_channels=16, channel_multiplier=(1, 2, 4, 4))
NANO |= dict(latent_channels=16, num_codes=256)
PRESETS = {"7b": {}, "tiny": TINY, "nano": NANO}


# --- Blocks --------------------------------------------------------------------------------------


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = group_norm(c, groups)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h).flatten(2).transpose(1, 2)  # (B, h w, C)
        k = self.k(h).flatten(2).transpose(1, 2)
        v = self.v(h).flatten(2).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one pixel right and below, none left and above


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResnetBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution; Encoder and Decoder add the resampling layer."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(c_in, c_out, groups)])
        for _ in range(blocks - 1):
            self.block.append(ResnetBlock(c_out, c_out, groups))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


# --- Encoder and decoder -------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        c = config.base_channels
        for i, width in enumerate(widths):
            level = Level(c, width, config.num_res_blocks, config.groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            c = width
        self.mid = Middle(c, config.groups)
        self.norm_out = group_norm(c, config.groups)
        self.conv_out = nn.Conv2d(c, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, 3, H, W) -> (B, base, H, W)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (B, C, h, w)


class Decoder(nn.Module):
    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        c = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c, 3, padding=1)
        self.mid = Middle(c, config.groups)
        levels = []
        for width in reversed(widths):
            level = Level(c, width, config.num_res_blocks + 1, config.groups)
            if len(levels) < len(widths) - 1:
                level.upsample = Upsample(width)
            levels.append(level)
            c = width
        # level 0 is the full resolution in the checkpoints' names, and the last to run
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(c, config.groups)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))  # (B, C, h, w) -> (B, widest, h, w)
        for level in reversed(self.up):
            z = level(z)
            if hasattr(level, "upsample"):
                z = level.upsample(z)
        return self.conv_out(F.silu(self.norm_out(z)))  # (B, 3, H, W)


class Quantizer(nn.Module):
    """The codebook, and the argmin of eq. 1 that Orthus drops."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_codes, config.latent_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """(..., C) -> (...) index of the nearest code: |z - c_j|^2 but for |z|^2, in fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            codes = self.embedding.weight.float()
            return (2 * latents.float() @ codes.T - codes.square().sum(-1)).argmax(-1)


# --- The autoencoder -----------------------------------------------------------------------------


class VQVAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, L, C), row-major over the (h, w) grid.

    `quantize(latents) -> codes` is the Quantizer: a module, because checkpoints keep the codebook
    under quantize.embedding.weight.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """For training from nothing: orthogonal convolutions, and residual branches that begin
        closed. With PyTorch's own values a small autoencoder learned shapes much later."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or ".conv2." in name or "proj_out" in name:
                nn.init.zeros_(p)
            elif p.ndim == 4:
                nn.init.orthogonal_(p)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> continuous latents (B, L, C): the quantiser is skipped."""
        z = self.quant_conv(self.encoder(images))  # (B, C, h, w)
        return z.flatten(2).transpose(1, 2)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (...) -> the latents (..., C) that stand for them."""
        return self.quantize.embedding(codes)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, L, C), continuous or looked up -> images (B, 3, H, W), not clamped."""
        side = math.isqrt(latents.shape[1])
        if side * side != latents.shape[1]:
            raise ValueError(f"got {latents.shape[1]} latents per image; a square grid is needed")
        z = latents.transpose(1, 2).unflatten(2, (side, side))  # (B, C, h, w)
        return self.decoder(self.post_quant_conv(z))

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu", dtype=None) -> "VQVAE":
        """Read the autoencoder of a checkpoint in any layout. dtype None keeps the stored one."""
        import checkpoint  # in here, so that reading the method needs PyTorch alone

        return checkpoint.load(cls, VQVAEConfig, "vae", directory, device, dtype)
