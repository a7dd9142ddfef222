"""The specification: Orthus as arXiv 2412.00127 has it, the slow way, to be read beside the paper.

One row, one latent, one step at a time: no batch, no padding, no cache, nothing computed ahead. The
tests compare every fast path with what stands here. It imports PyTorch alone: `w` is a state dict,
`c` a config with the fields of OrthusConfig.
"""

import torch
from torch.nn.functional import silu

# --- What the transformer reads: eq. 1, 2 and 4 --------------------------------------------------


def distances(latent, codebook):
    """d(v, c_j): squared distances of a latent (C,) to the K codes, in double precision."""
    return (latent.double() - codebook.double()).square().sum(-1)


def hard_embedding(latent, codebook, table):
    """Eq. 1 and 2, Chameleon: h = w_j of the nearest code j, table (K, D) holding the w_j."""
    return table[distances(latent, codebook).argmin()]


def soft_embedding(latent, codebook, table, tau):
    """Eq. 4, Orthus: h = sum_j w_j softmax_j(-d(v, c_j) / tau); tau -> 0 is the one above."""
    shares = torch.softmax(-distances(latent, codebook) / tau, 0)
    return sum(share * row.double() for share, row in zip(shares, table))


# --- The transformer: Llama's decoder with QK-norm, on a whole row (T, D) ------------------------


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + eps).sqrt()


def rotate(x, position, theta):
    """RoPE: channels i and i + width / 2 of a head are turned by position * theta^(-2i / width)."""
    a, b = x.chunk(2)
    angles = position * theta ** (-torch.arange(len(a)) / len(a))
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


def attention(p, x, c):
    """Causal: position t sees 0 .. t. Several query heads may share a head of keys and values."""
    split = lambda name, heads: (x @ p[f"self_attn.{name}.weight"].T).unflatten(-1, (heads, -1))
    norm = lambda y, n: layer_norm(y, 1e-5) * p[f"self_attn.{n}.weight"] + p[f"self_attn.{n}.bias"]
    heads, groups = c.num_attention_heads, c.num_key_value_heads
    q, k = norm(split("q_proj", heads), "q_norm"), norm(split("k_proj", groups), "k_norm")
    v, mixed = split("v_proj", groups), torch.zeros_like(q)  # (T, groups, width), (T, heads, width)
    for h in range(heads):
        g = h * groups // heads
        keys = torch.stack([rotate(k[t, g], t, c.rope_theta) for t in range(len(x))])
        for t in range(len(x)):
            scores = keys[: t + 1] @ rotate(q[t, h], t, c.rope_theta) / q.shape[-1] ** 0.5
            mixed[t, h] = torch.softmax(scores, 0) @ v[: t + 1, g]
    return mixed.flatten(1) @ p["self_attn.o_proj.weight"].T


def mlp(p, x):  # SwiGLU
    inner = silu(x @ p["mlp.gate_proj.weight"].T) * (x @ p["mlp.up_proj.weight"].T)
    return inner @ p["mlp.down_proj.weight"].T


def transformer(w, x, c):
    """Embeddings (T, D) -> hidden states (T, D) after the final norm."""
    for i in range(c.num_hidden_layers):
        p = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in w.items()}
        norms = p["input_layernorm.weight"], p["post_attention_layernorm.weight"]
        if c.swin_norm:  # Chameleon-34B: a norm after each part instead of before it
            x = x + rms_norm(attention(p, x, c), norms[0], c.rms_norm_eps)
            x = x + rms_norm(mlp(p, x), norms[1], c.rms_norm_eps)
        else:
            x = x + attention(p, rms_norm(x, norms[0], c.rms_norm_eps), c)
            x = x + mlp(p, rms_norm(x, norms[1], c.rms_norm_eps))
    return rms_norm(x, w["norm.weight"], c.rms_norm_eps)


# --- Noise, the head that takes it away (eq. 3), the joint loss ----------------------------------


def alphas_cumprod(c):
    """alpha_bar_t, t = 0 .. 999. A clean latent's share of x_t is its root: "scaled_linear" is
    LDM's schedule, "linear" DDPM's; zero terminal SNR (2305.08891) leaves nothing of it at 999."""
    alpha_bar, signal = 1.0, []
    for part in torch.linspace(0, 1, 1000, dtype=torch.float64).tolist():
        beta = 1e-4 + (0.02 - 1e-4) * part
        if c.beta_schedule == "scaled_linear":
            beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * part) ** 2
        alpha_bar = alpha_bar * (1 - beta)
        signal.append(alpha_bar**0.5)
    if c.zero_terminal_snr:
        first, last = signal[0], signal[-1]
        signal = [(s - last) * first / (first - last) for s in signal]
    return [s**2 for s in signal]


def head_network(w, noisy, t, hidden):
    """Section 5.1: noisy latent (C,), its t, the hidden state (D,) before it -> output (C,). Time
    and condition enter the residual blocks of an MLP by shift, scale and gate (AdaLN)."""
    linear = lambda name, x: w[f"{name}.weight"] @ x + w[f"{name}.bias"]
    angles = t * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    time = linear("time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    y = silu(linear("time_embed.mlp.2", silu(time)) + linear("cond_embed", hidden))
    x = linear("input_proj", noisy)
    for block in sorted({name[:12] for name in w if name.startswith("res_blocks.")}):
        shift, scale, gate = linear(f"{block}.adaLN_modulation.1", y).chunk(3)
        h = layer_norm(x, 1e-6) * w[f"{block}.in_ln.weight"] + w[f"{block}.in_ln.bias"]
        h = silu(linear(f"{block}.mlp.0", h * (1 + scale) + shift))
        x = x + gate * linear(f"{block}.mlp.2", h)
    shift, scale = linear("final_layer.adaLN_modulation.1", y).chunk(2)
    return linear("final_layer.linear", layer_norm(x, 1e-6) * (1 + scale) + shift)


def diffusion_loss(w, c, hidden, latents, t, noise):
    """Eq. 3: noise each latent (C,), let the head predict the noise (the release: the velocity),
    square the error. The mean is over channels too: the release's lambda = 100 belongs to that."""
    levels, errors = alphas_cumprod(c), []
    for f, latent, time, eps in zip(hidden, latents, t, noise):
        signal, sigma = levels[time] ** 0.5, (1 - levels[time]) ** 0.5
        clean = c.latent_scale * latent
        target = eps if c.prediction == "epsilon" else signal * eps - sigma * clean
        errors.append(head_network(w, signal * clean + sigma * eps, time, f) - target)
    return torch.stack(errors).square().mean()


def joint_loss(logits, said, image_loss, weight):
    """L = L_ar + lambda L_diff: logits (n, V) where the tokens `said` (n,) were to come."""
    likelihoods = [row.softmax(0)[token] for row, token in zip(logits, said)]
    return -torch.stack(likelihoods).log().mean() + weight * image_loss


# --- Drawing: DDIM and guidance ------------------------------------------------------------------


def guidance(full, images, empty, scale, image_scale):
    """Outputs of the head for the whole prompt, its images alone (where it has none: the empty
    prompt again) and the empty one. From text alone: empty + scale (full - empty)."""
    return empty + image_scale * (images - empty) + scale * (full - images)


def draw_latent(w, c, hidden, combine, noise, steps):
    """DDIM (2010.02502, eta 0): say what x (C,) would be without noise and what its noise is, mix
    them at the next, lower level, the last time without noise. hidden (G, D) holds the last hidden
    state of each context; combine(G outputs of the head) is guidance."""
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    levels, x = alphas_cumprod(c), noise
    for k, t in enumerate(times):
        next_level = levels[times[k + 1]] if k + 1 < steps else 1.0
        signal, sigma = levels[t] ** 0.5, (1 - levels[t]) ** 0.5
        output = combine(*[head_network(w, x, t, f) for f in hidden])
        clean, eps = signal * x - sigma * output, sigma * x + signal * output
        if c.prediction == "epsilon":
            clean, eps = (x - sigma * output) / signal, output
        x = next_level**0.5 * clean + (1 - next_level) ** 0.5 * eps
    return x / c.latent_scale
