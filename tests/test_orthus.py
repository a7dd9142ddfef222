"""orthus.py, claim by claim, in its own order: embedding, schedule, heads, model, checkpoints.

Every model here is tiny and random, no parameter left at an initial value that would hide a fault.
One row of text, image, text, image, text (ROW) serves most tests.
"""

import dataclasses
import itertools
import json
import math
import typing

import pytest
import torch
import torch.nn.functional as F
from conftest import close, complaint, randn, randomise, read_fixture, seeded
from torch import Tensor

import checkpoint
import orthus
from orthus import DiffusionHead, KVCache, NoiseSchedule, Orthus, OrthusConfig

BOS, PAD, START, CODES, EOI, BOI, SEP, IMAGE = 0, 1, 4, 16, 20, 21, 22, 23  # text from 24 on
PICTURE = [BOI, IMAGE, IMAGE, IMAGE, IMAGE, EOI]
ROW = [BOS, 30, 31, *PICTURE, 32, SEP, 33, *PICTURE, 34, SEP]  # an input and an output image
LABELS = [-100] * 11 + ROW[11:]
EMBEDDINGS, HEADS = ("softmax", "argmin", "linear"), ("diffusion", "mse", "tokens")
COMBINATIONS = [c for c in itertools.product(EMBEDDINGS, HEADS) if c != ("linear", "tokens")]
SCHEDULES = [  # all that are allowed
    (betas, zero_snr, prediction)
    for betas in ("scaled_linear", "linear")
    for zero_snr, prediction in ((True, "velocity"), (False, "velocity"), (False, "epsilon"))
]


def small_config(**changes) -> OrthusConfig:
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_codes=CODES,
        latent_channels=8,
        latents_per_image=4,
        tau=4.0,
        head_width=24,
        head_blocks=2,
        latent_scale=0.5,
        diffusion_batch_multiplier=3,
        image_loss_weight=10.0,
        eoi_id=EOI,
        boi_id=BOI,
        sep_id=SEP,
        image_id=IMAGE,
    )
    return OrthusConfig(**(sizes | changes))


def make_model(**changes) -> Orthus:
    return randomise(Orthus(small_config(**changes)))


def make_head(seed: int = 0, **changes) -> DiffusionHead:
    return randomise(DiffusionHead(small_config(**changes)), seed)


@pytest.fixture
def model() -> Orthus:
    return make_model()


# --- Vision embedding ----------------------------------------------------------------------------


def test_softmax_embedding_with_tiny_tau_equals_argmin():
    soft = make_model(tau=1e-6).vision_embedding
    hard = make_model(vision_embedding="argmin").vision_embedding
    latents = randn(100, 8)
    close(soft(latents), hard(latents), atol=1e-6)


def test_soft_embedding_equals_the_formula_of_equation_4(model):
    latents = randn(20, 8)
    codebook = model.vision_embedding.codebook.weight.double()
    w = model.embed_tokens.weight[START : START + CODES].double()
    for latent, got in zip(latents, model.vision_embedding(latents), strict=True):
        distances = torch.stack([(latent.double() - c).square().sum() for c in codebook])
        shares = torch.exp(-distances / 4.0)
        wanted = sum(share * row for share, row in zip(shares / shares.sum(), w, strict=True))
        close(got, wanted, atol=1e-5)


def test_a_latent_at_a_code_embeds_as_the_token_of_that_code():
    model = make_model(vision_embedding="argmin")
    rows = model.embed_tokens.weight[START : START + CODES]
    assert torch.equal(model.vision_embedding(model.vision_embedding.codebook.weight), rows)


def test_argmin_embedding_reads_latents_as_chameleon_reads_their_tokens():
    model = make_model(vision_embedding="argmin", image_head="tokens")
    tokens, latents = torch.tensor([ROW]), randn(8, 8)
    as_tokens = tokens.clone()
    as_tokens[tokens == IMAGE] = START + torch.cdist(
        latents, model.vision_embedding.codebook.weight
    ).argmin(-1)
    assert torch.equal(model(tokens, latents), model(as_tokens, randn(0, 8)))


def test_chameleons_image_loss_is_the_cross_entropy_of_its_tokens():
    model = make_model(vision_embedding="argmin", image_head="tokens")
    tokens, latents, labels = torch.tensor([ROW]), randn(8, 8), torch.tensor([LABELS])
    hidden = model(tokens, latents)[0]
    before = [i - 1 for i, label in enumerate(LABELS) if label == IMAGE]
    targets = START + model.vision_embedding.codes(latents[4:])
    wanted = F.cross_entropy(model.lm_head(hidden[before]), targets)
    close(model.loss(tokens, latents, labels).image, wanted)


def test_linear_embedding_is_a_projection_without_codebook():
    embedding = make_model(vision_embedding="linear").vision_embedding
    latents = randn(5, 8)
    wanted = latents @ embedding.projection.weight.T + embedding.projection.bias
    close(embedding(latents), wanted)
    assert not hasattr(embedding, "codebook")


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_latents_are_measured_in_fp32(autocast):
    embedding = make_model(
        num_codes=32, latent_channels=256, vocab_size=96,
        eoi_id=36, boi_id=37, sep_id=38, image_id=39,
    ).vision_embedding
    latents, codebook = randn(400, 256).bfloat16(), embedding.codebook.weight.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = embedding.codes(latents)
        assert embedding.logits(latents).dtype == torch.float32
    exact = (latents.double()[:, None] - codebook.double()).square().sum(-1).argmin(-1)
    assert torch.equal(codes, exact)
    rounded = codebook.bfloat16()
    in_bf16 = (2 * latents @ rounded.T - rounded.square().sum(-1)).argmax(-1)
    assert (in_bf16 != codes).any()  # or this test would show nothing


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_tau_that_is_not_positive_raises_and_names_argmin(tau):
    message = complaint(lambda: small_config(tau=tau))
    assert str(tau) in message and ("argmin" in message or tau < 0)


def test_effective_codes_run_from_one_to_all_of_them():
    latents = randn(50, 8)
    close(make_model(tau=1e-6).vision_embedding.effective_codes(latents), torch.ones(50), 1e-3)
    all_of_them = torch.full((50,), CODES)
    close(make_model(tau=1e6).vision_embedding.effective_codes(latents), all_of_them, 1e-3)


def test_gradients_reach_codebook_and_image_token_rows_through_the_soft_embedding(model):
    model.vision_embedding(randn(20, 8)).square().sum().backward()
    per_row = model.embed_tokens.weight.grad.abs().sum(-1)
    assert (per_row[START : START + CODES] > 0).all()
    assert per_row[:START].sum() == 0 and per_row[START + CODES :].sum() == 0
    assert (model.vision_embedding.codebook.weight.grad.abs().sum(-1) > 0).all()


# --- Noise schedule ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers() -> dict[str, Tensor]:
    return read_fixture("diffusion")[0]


def recorded_name(betas: str, zero_snr: bool) -> str:
    return f"{betas}.{'zero_snr' if zero_snr else 'plain'}"


@pytest.mark.parametrize("betas, zero_snr, prediction", SCHEDULES)
def test_noise_levels_equal_those_of_diffusers(diffusers, betas, zero_snr, prediction):
    schedule = NoiseSchedule(betas, zero_snr, prediction)
    close(schedule.alphas_cumprod, diffusers[f"{recorded_name(betas, zero_snr)}.alphas_cumprod"])


@pytest.mark.parametrize("betas, zero_snr, prediction", SCHEDULES)
def test_noising_and_target_equal_those_of_diffusers(diffusers, betas, zero_snr, prediction):
    schedule = NoiseSchedule(betas, zero_snr, prediction)
    inputs = diffusers["latents"], diffusers["noise"], diffusers["t"]
    name = recorded_name(betas, zero_snr)
    close(schedule.add_noise(*inputs), diffusers[f"{name}.noisy"])
    velocity, noise = diffusers[f"{name}.velocity"], diffusers["noise"]
    close(schedule.target(*inputs), noise if prediction == "epsilon" else velocity)


@pytest.mark.parametrize("steps", [7, 10])
@pytest.mark.parametrize("betas, zero_snr, prediction", SCHEDULES)
def test_ddim_trajectory_equals_that_of_diffusers(diffusers, betas, zero_snr, prediction, steps):
    theirs = "epsilon" if prediction == "epsilon" else "v_prediction"
    wanted = diffusers[f"{recorded_name(betas, zero_snr)}.{theirs}.{steps}"]
    x, path = diffusers["x"], [diffusers["x"]]
    for t, a, b in NoiseSchedule(betas, zero_snr, prediction).ddim(steps):
        x = a * x + b * torch.tanh(x @ diffusers["weight"] + t / 1000)
        path.append(x)
    close(torch.stack(path), wanted, rtol=2e-5 if prediction == "epsilon" else 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 16, 30, 48, 50, 100, 333, 1000])
def test_timesteps_equal_those_of_diffusers(diffusers, steps):
    ours = NoiseSchedule("scaled_linear", True, "velocity").timesteps(steps)
    apart = (torch.tensor(ours) - diffusers[f"timesteps.{steps}"]).abs().max()
    assert apart <= (1 if steps == 48 else 0)  # at 48 theirs misses its own formula by rounding


def test_100_timesteps_are_999_989_to_9():
    schedule = NoiseSchedule("scaled_linear", True, "velocity")
    assert schedule.timesteps(100) == list(range(999, 0, -10))
    assert "1001" in complaint(lambda: schedule.timesteps(1001))


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_zero_terminal_snr_leaves_no_signal_at_999_and_all_of_it_at_0(betas):
    zero, plain = (NoiseSchedule(betas, z, "velocity").alphas_cumprod for z in (True, False))
    assert zero[999] == 0
    assert zero[0] == plain[0]
    assert (zero.diff() < 0).all()


def test_epsilon_prediction_with_zero_terminal_snr_raises():
    message = complaint(lambda: small_config(prediction="epsilon", zero_terminal_snr=True))
    assert "epsilon" in message and "zero_terminal_snr" in message


MEAN, STD = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 2.0])  # of a channel each


def gaussian_denoiser(schedule: NoiseSchedule, x: Tensor, t: int) -> Tensor:
    """What a perfect head gives for latents from N(MEAN, STD^2): the expectation of its target."""
    alpha_bar = schedule.alphas_cumprod[t]
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    off = (x - signal * MEAN) / (signal**2 * STD**2 + sigma**2)
    clean, noise = MEAN + signal * STD**2 * off, sigma * off
    return noise if schedule.prediction == "epsilon" else signal * noise - sigma * clean


def gaussian_samples(schedule: NoiseSchedule, noise: Tensor, steps: int = 1000) -> Tensor:
    x = noise
    for t, a, b in schedule.ddim(steps):
        x = a * x + b * gaussian_denoiser(schedule, x, t)
    return x


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_ddim_with_a_perfect_denoiser_recovers_a_gaussian(betas):
    noise = randn(4000, 2)
    noise = (noise - noise.mean(0)) / noise.std(0)  # so that few samples are enough
    samples = gaussian_samples(NoiseSchedule(betas, True, "velocity"), noise)
    close(samples.mean(0), MEAN, atol=0.05)
    close(samples.std(0), STD, atol=0.05)


@pytest.mark.parametrize("betas, zero_snr, prediction", SCHEDULES)
def test_ddim_moves_each_noise_along_the_exact_map(betas, zero_snr, prediction):
    schedule, noise = NoiseSchedule(betas, zero_snr, prediction), randn(200, 2)
    last = schedule.alphas_cumprod[999]  # not quite pure noise, unless zero_snr
    wanted = MEAN + STD * (noise - last.sqrt() * MEAN) / (last * STD**2 + 1 - last).sqrt()
    close(gaussian_samples(schedule, noise), wanted, atol=0.02)


# --- Diffusion head: the network -----------------------------------------------------------------


def head_by_its_weights(w: dict[str, Tensor], noisy: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
    """The head of section 5.1 under the released names, written out from its state dict."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-6).sqrt()

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    time = torch.cat([angles.cos(), angles.sin()], -1)
    time = linear("time_embed.mlp.2", silu(linear("time_embed.mlp.0", time)))
    y = silu(time + linear("cond_embed", hidden))
    x = linear("input_proj", noisy)
    for block in ("res_blocks.0", "res_blocks.1"):
        shift, scale, gate = linear(f"{block}.adaLN_modulation.1", y).chunk(3, -1)
        h = norm(x) * w[f"{block}.in_ln.weight"] + w[f"{block}.in_ln.bias"]
        h = linear(f"{block}.mlp.0", h * (1 + scale) + shift)
        x = x + gate * linear(f"{block}.mlp.2", silu(h))
    shift, scale = linear("final_layer.adaLN_modulation.1", y).chunk(2, -1)
    return linear("final_layer.linear", norm(x) * (1 + scale) + shift)


def test_head_is_the_network_of_section_5_1():
    head, t = make_head(), torch.tensor([0, 1, 9, 500, 999])
    noisy, hidden = randn(5, 8), randn(5, 32, seed=1)
    wanted = head_by_its_weights(head.state_dict(), noisy, t, hidden)
    close(head(noisy, t, hidden), wanted, atol=1e-4)


# --- Diffusion head: loss ------------------------------------------------------------------------


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, latents, t and noise of five latents."""
    t = torch.tensor([0, 9, 500, 998, 999])
    return randn(5, 32, seed=seed), randn(5, 8, seed=seed + 1), t, randn(5, 8, seed=seed + 2)


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_loss_equals_equation_3_written_out(prediction):
    head = make_head(prediction=prediction, zero_terminal_snr=False)
    total = 0.0
    for hidden, latent, t, noise in zip(*example(), strict=True):
        alpha_bar = head.schedule.alphas_cumprod[t].item()
        signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        clean = 0.5 * latent  # latent_scale
        output = head((signal * clean + sigma * noise)[None], t[None], hidden[None])[0]
        target = noise if prediction == "epsilon" else signal * noise - sigma * clean
        total += (output - target).square().sum().item()
    close(head.loss(*example()), torch.tensor(total / (5 * 8)), rtol=1e-5)


@pytest.fixture
def noised(monkeypatch) -> dict[str, Tensor]:
    """Records what NoiseSchedule.add_noise was given last."""
    seen, original = {}, NoiseSchedule.add_noise

    def spy(self, latents, noise, t):
        seen.update(latents=latents, noise=noise, t=t)
        return original(self, latents, noise, t)

    monkeypatch.setattr(NoiseSchedule, "add_noise", spy)
    return seen


def test_loss_noises_each_latent_as_often_as_the_multiplier_says(noised):
    latents = randn(5, 8)
    make_head(diffusion_batch_multiplier=3).loss(randn(5, 32), latents, generator=seeded(0))
    clean = noised["latents"]
    assert clean.shape == (15, 8)
    for latent in latents * 0.5:
        assert (clean == latent).all(-1).sum() == 3
    assert len(noised["noise"].unique(dim=0)) == 15
    assert len(noised["t"].unique()) > 5
    make_head().loss(randn(5, 32), latents, example()[2])  # once, where a level is given
    assert torch.equal(noised["latents"], latents * 0.5)
    make_head().loss(randn(5, 32), latents, noise=randn(5, 8))
    assert torch.equal(noised["latents"], latents * 0.5)


def test_loss_keeps_each_latent_with_its_hidden_state():
    head, order = make_head(), torch.tensor([2, 0, 4, 3, 1])
    hidden, latents, t, noise = example()
    loss = head.loss(hidden, latents, t, noise)
    close(head.loss(hidden[order], latents[order], t[order], noise[order]), loss)
    assert (head.loss(hidden[order], latents, t, noise) - loss).abs() > 1e-3


def test_repeated_latents_stay_with_their_hidden_states(noised):
    head, hidden, latents = make_head(), randn(5, 32), randn(5, 8)
    loss, clean, noise, t = head.loss(hidden, latents), *noised.values()
    owner = torch.cdist(clean, 0.5 * latents).argmin(-1)
    output = head(head.schedule.add_noise(clean, noise, t), t, hidden[owner])
    close(loss, F.mse_loss(output, head.schedule.target(clean, noise, t)), rtol=1e-5)


def test_training_timesteps_are_uniform_over_0_to_999(noised):
    make_head().loss(torch.zeros(20_000, 32), torch.zeros(20_000, 8), generator=seeded(0))
    t = noised["t"]
    assert (t.min(), t.max()) == (0, 999)
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert counts.sub(6000).abs().max() < 400  # 60,000 draws, 5 standard deviations


def test_loss_repeats_with_its_generator():
    head, hidden, latents = make_head(), randn(5, 32), randn(5, 8)
    first, again, other = (head.loss(hidden, latents, generator=seeded(s)) for s in (3, 3, 4))
    assert first == again != other


def test_loss_noises_latents_in_scaled_units():
    small, unit = make_head(latent_scale=0.1), make_head(latent_scale=1.0)
    hidden, latents, t, noise = example()
    close(small.loss(hidden, latents, t, noise), unit.loss(hidden, 0.1 * latents, t, noise))


def test_head_starts_at_zero_so_its_first_loss_is_the_targets_power():
    head = Orthus(small_config()).image_head
    hidden, latents, t, noise = example()
    assert (head(latents, t, hidden) == 0).all()
    target = head.schedule.target(0.5 * latents, noise, t)
    close(head.loss(hidden, latents, t, noise), target.square().mean())
    assert 0.018 < head.time_embed.mlp[0].weight.std() < 0.022
    assert Orthus(small_config(image_head="mse")).image_head(hidden).std() > 0.1


# --- Diffusion head: sampling --------------------------------------------------------------------


@torch.no_grad()
def naive_ddim(head: DiffusionHead, hidden, weights, steps: int, noise: Tensor) -> Tensor:
    """DDIM as written in papers: the whole head in each step, then a clean latent and a noise."""
    timesteps = head.schedule.timesteps(steps)
    levels = [head.schedule.alphas_cumprod[t].item() for t in timesteps] + [1.0]
    x = noise.double()
    for t, level, next_level in zip(timesteps, levels, levels[1:], strict=False):
        signal, sigma = math.sqrt(level), math.sqrt(1 - level)
        times = torch.full((len(x),), t)
        output = sum(w * head(x.float(), times, hidden[:, g]) for g, w in enumerate(weights))
        if head.schedule.prediction == "velocity":
            clean, epsilon = signal * x - sigma * output, sigma * x + signal * output
        else:
            clean, epsilon = (x - sigma * output) / signal, output
        x = math.sqrt(next_level) * clean + math.sqrt(1 - next_level) * epsilon
    return (x / head.latent_scale).float()


CONTEXTS = [(1.0,), (5.0, -4.0), (3.0, -1.5, -0.5)]  # none, guidance, editing: text and image


@pytest.mark.parametrize("rows_at_once", [1, 20, 4096])
@pytest.mark.parametrize("weights", CONTEXTS)
def test_hoisted_modulations_equal_the_naive_loop(monkeypatch, weights, rows_at_once):
    monkeypatch.setattr(DiffusionHead, "hoisted_rows", rows_at_once)
    head, hidden, noise = make_head(), randn(3, len(weights), 32), randn(3, 8, seed=1)
    wanted = naive_ddim(head, hidden, weights, 10, noise)
    close(head.sample(hidden, weights, 10, noise), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("betas, zero_snr, prediction", SCHEDULES)
def test_sampling_equals_the_naive_loop_for_every_schedule(betas, zero_snr, prediction):
    head = make_head(beta_schedule=betas, zero_terminal_snr=zero_snr, prediction=prediction)
    hidden, noise = randn(3, 1, 32), randn(3, 8, seed=1)
    wanted = naive_ddim(head, hidden, (1.0,), 7, noise)
    close(head.sample(hidden, (1.0,), 7, noise), wanted, atol=1e-4, rtol=1e-4)


def test_sampling_draws_its_noise_from_the_generator():
    head, hidden = make_head(), randn(3, 1, 32)
    drawn = head.sample(hidden, steps=5, generator=seeded(7))
    assert torch.equal(drawn, head.sample(hidden, steps=5, generator=seeded(7)))
    assert torch.equal(drawn, head.sample(hidden, steps=5, noise=randn(3, 8, seed=7)))
    assert not torch.allclose(drawn, head.sample(hidden, steps=5, generator=seeded(8)))


def test_sampling_writes_nothing_into_its_noise():
    noise = randn(3, 8)
    make_head().sample(randn(3, 1, 32), steps=5, noise=noise)
    assert torch.equal(noise, randn(3, 8))


def test_sampling_undoes_the_latent_scale():
    hidden, noise = randn(3, 1, 32), randn(3, 8)
    small, unit = (make_head(latent_scale=s).sample(hidden, noise=noise) for s in (0.1, 1.0))
    close(small, unit / 0.1, rtol=1e-6)


# --- Guidance ------------------------------------------------------------------------------------


def test_guidance_weights_1_and_0_equal_no_guidance():
    head, hidden, noise = make_head(), randn(3, 2, 32), randn(3, 8)
    alone = head.sample(hidden[:, :1], (1.0,), 10, noise)
    close(head.sample(hidden, (1.0, 0.0), 10, noise), alone, atol=1e-5)


def test_guidance_between_equal_contexts_changes_nothing():
    head, hidden, noise = make_head(), randn(3, 1, 32), randn(3, 8)
    twice = hidden.expand(-1, 2, -1)
    alone = head.sample(hidden, (1.0,), 10, noise)
    close(head.sample(twice, (5.0, -4.0), 10, noise), alone, atol=1e-4)


def test_the_unconditional_context_matters():
    head, noise = make_head(), randn(3, 8)
    full, empty, other = (randn(3, 32, seed=s) for s in (1, 2, 3))
    one = head.sample(torch.stack([full, empty], 1), (5.0, -4.0), 10, noise)
    two = head.sample(torch.stack([full, other], 1), (5.0, -4.0), 10, noise)
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("image_head", HEADS)
def test_a_wrong_number_of_guidance_weights_raises_with_both_numbers(image_head):
    model, hidden = make_model(image_head=image_head), randn(3, 2, 32)
    message = complaint(lambda: model.image_head.sample(hidden, (1.0,), 5, randn(3, 8)))
    assert "1" in message and "2" in message


# --- The three image heads -----------------------------------------------------------------------


@pytest.mark.parametrize("image_head", HEADS)
def test_every_image_head_samples_finite_latents_that_follow_their_noise(image_head):
    model, hidden = make_model(image_head=image_head), randn(64, 2, 32)
    one, again, other = (
        model.image_head.sample(hidden, (2.0, -1.0), 5, randn(64, 8, seed=s)) for s in (1, 1, 2)
    )
    assert one.shape == (64, 8) and one.dtype == torch.float32 and one.isfinite().all()
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (image_head == "mse")  # which can only give the mean


@pytest.mark.parametrize("image_head", HEADS)
def test_latents_of_a_batch_are_sampled_independently(image_head):
    model, hidden, noise = make_model(image_head=image_head), randn(6, 2, 32), randn(6, 8)
    together = model.image_head.sample(hidden, (3.0, -2.0), 10, noise)
    for i in range(6):
        alone = model.image_head.sample(hidden[i : i + 1], (3.0, -2.0), 10, noise[i : i + 1])
        close(together[i : i + 1], alone, atol=1e-4)


def test_regression_head_gives_back_what_its_loss_asks_for():
    model, hidden = make_model(image_head="mse"), randn(5, 32)
    latents = model.image_head.sample(hidden[:, None], (1.0,), 1, randn(5, 8))
    assert model.image_head.loss(hidden, latents) < 1e-10
    close(model.image_head.loss(hidden, latents + 2), torch.tensor(1.0))  # (2 * latent_scale)^2


def test_token_head_draws_codes_as_often_as_their_probability():
    model, hidden = make_model(image_head="tokens"), randn(1, 32)
    wanted = model.lm_head(hidden)[0, START : START + CODES].softmax(-1)
    many = hidden[:, None].expand(20_000, 1, 32)
    latents = model.image_head.sample(many, (1.0,), 1, randn(20_000, 8))
    codes = model.vision_embedding.codes(latents)
    assert torch.equal(model.vision_embedding.codebook(codes), latents)
    close(torch.bincount(codes, minlength=CODES) / 20_000, wanted, atol=0.02)
    both = randn(1, 2, 32)  # guided are the logits
    logits = 3 * model.lm_head(both[:, 0]) - 2 * model.lm_head(both[:, 1])
    wanted = logits[0, START : START + CODES].softmax(-1)
    latents = model.image_head.sample(both.expand(20_000, 2, 32), (3.0, -2.0), 1, randn(20_000, 8))
    codes = model.vision_embedding.codes(latents)
    close(torch.bincount(codes, minlength=CODES) / 20_000, wanted, atol=0.02)


# --- Orthus.loss ---------------------------------------------------------------------------------


def batch_of_two() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, latents, labels: ROW, and a shorter row whose only image is an input."""
    short = [BOS, *PICTURE, 40, SEP, 41, 42, SEP]
    padding = len(ROW) - len(short)
    labels = [-100] * 9 + short[9:]
    return (
        torch.tensor([ROW, short + [PAD] * padding]),
        randn(12, 8),
        torch.tensor([LABELS, labels + [-100] * padding]),
    )


def test_loss_equals_one_written_out_by_hand(model):
    tokens, latents, labels = batch_of_two()
    hidden, logs, before, targets, placeholder = model(tokens, latents), [], [], [], 0
    for b, i in itertools.product(range(2), range(len(ROW))):
        label = labels[b, i].item()
        if label == IMAGE:
            before.append(hidden[b, i - 1])
            targets.append(latents[placeholder])
        elif label != -100:
            logs.append(-model.lm_head(hidden[b, i - 1]).log_softmax(-1)[label])
        placeholder += int(tokens[b, i] == IMAGE)
    assert len(targets) == 4 and len(logs) == 8
    image = model.image_head.loss(
        torch.stack(before), torch.stack(targets), generator=seeded(1)
    )
    loss = model.loss(tokens, latents, labels, seeded(1))
    close(loss.text, torch.stack(logs).mean())
    close(loss.image, image)
    close(loss.total, torch.stack(logs).mean() + 10 * image, rtol=1e-6)  # lambda


@pytest.mark.parametrize("image_head", HEADS)
def test_only_latents_of_output_images_are_targets(image_head):
    model = make_model(image_head=image_head)
    tokens = torch.tensor([[BOS, *PICTURE, *PICTURE]])  # the output before the input: what is
    labels = tokens.clone()  # read later cannot reach the loss but as a target
    labels[:, 7:] = -100
    latents, other = randn(8, 8), randn(8, 8, seed=1)
    loss = model.loss(tokens, latents, labels, seeded(1)).image
    input_changed = torch.cat([latents[:4], other[4:]])
    output_changed = torch.cat([other[:4], latents[4:]])
    close(model.loss(tokens, input_changed, labels, seeded(1)).image, loss, atol=1e-6)
    assert (model.loss(tokens, output_changed, labels, seeded(1)).image - loss).abs() > 1e-3


@pytest.mark.parametrize("embedding, image_head", COMBINATIONS)
def test_every_embedding_and_head_gives_two_finite_losses(embedding, image_head):
    model = make_model(vision_embedding=embedding, image_head=image_head)
    loss = model.loss(*batch_of_two(), seeded(0))
    loss.total.backward()
    assert loss.text > 0 and loss.image > 0 and loss.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def finite_gradients(model: Orthus, total: Tensor) -> set[str]:
    """Names of the parameters that total reaches, their gradients checked to be finite."""
    model.zero_grad()
    total.backward()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in reached.values())
    return {name for name, grad in reached.items() if grad.abs().sum() > 0}


def test_targets_are_predicted_where_other_latents_are_read(model):
    tokens, latents, labels = batch_of_two()
    read = latents + 0.5 * randn(12, 8, seed=5)
    hidden = model(tokens, read)
    before = F.pad(labels == IMAGE, (0, 1))[:, 1:]
    wanted = model.image_head.loss(hidden[before], latents[4:8], generator=seeded(1))
    got = model.loss(tokens, read, labels, seeded(1), targets=latents)
    close(got.image, wanted, rtol=1e-6)
    assert (model.loss(tokens, read, labels, seeded(1)).image - wanted).abs() > 1e-3


def test_shares_weigh_the_parts_of_a_step(model):
    whole, part = (model.loss(*batch_of_two(), seeded(1), shares=s) for s in ((1, 1), (0.5, 0.25)))
    close(part.text, 0.5 * whole.text)
    close(part.image, 0.25 * whole.image)
    close(part.total, part.text + 10 * part.image, rtol=1e-6)


def test_text_alone_gives_no_image_loss(model):
    tokens = torch.tensor([[BOS, 30, SEP, 31, 32, SEP], [BOS, 30, 31, SEP, 33, PAD]])
    labels = torch.where(tokens > SEP, tokens, -100)
    loss = model.loss(tokens, torch.zeros(0, 8), labels)
    assert loss.image == 0 and loss.total == loss.text > 0
    reached = finite_gradients(model, loss.total)
    assert "lm_head.weight" in reached and not any("image_head" in name for name in reached)


def test_images_alone_give_no_text_loss(model):
    tokens = torch.tensor([[BOS, *PICTURE], [BOS, *PICTURE]])
    labels = torch.where(tokens == IMAGE, IMAGE, -100)
    loss = model.loss(tokens, randn(8, 8), labels, seeded(0))
    assert loss.text == 0 and loss.image > 0 and loss.total == 10 * loss.image
    reached = finite_gradients(model, loss.total)
    assert "image_head.input_proj.weight" in reached and "lm_head.weight" not in reached
    assert "vision_embedding.codebook.weight" in reached


@pytest.mark.parametrize("count", [0, 7, 9])
def test_a_wrong_number_of_latents_raises_with_both_numbers(model, count):
    message = complaint(lambda: model(torch.tensor([ROW]), randn(count, 8)))
    assert "8" in message and str(count) in message


@pytest.mark.parametrize("image_head", HEADS)
def test_nothing_depends_on_train_or_eval(image_head):
    model = make_model(image_head=image_head)
    inputs = batch_of_two()
    assert model.train().loss(*inputs, seeded(0)) == model.eval().loss(*inputs, seeded(0))
    hidden, noise = randn(3, 1, 32), randn(3, 8)
    one, two = (m().image_head.sample(hidden, (1.0,), 5, noise) for m in (model.train, model.eval))
    assert torch.equal(one, two)


def test_inputs_are_never_written(model):
    inputs = batch_of_two()
    model.loss(*inputs, seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(inputs, batch_of_two(), strict=True))


@pytest.mark.parametrize("image_head", HEADS)
def test_losses_under_bf16_autocast_are_those_of_fp32(image_head):
    model = make_model(image_head=image_head)
    exact = model.loss(*batch_of_two(), seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(*batch_of_two(), seeded(0))
    assert rough.total.dtype == torch.float32
    close(rough.total, exact.total, rtol=0.1)
    finite_gradients(model, rough.total)


@pytest.mark.parametrize("image_head", HEADS)
def test_a_bf16_model_learns_and_samples(image_head):
    model = make_model(image_head=image_head).bfloat16()
    loss = model.loss(*batch_of_two(), seeded(0))
    fp32 = make_model(image_head=image_head).loss(*batch_of_two(), seeded(0))
    assert loss.total.dtype == torch.float32
    close(loss.total, fp32.total, rtol=0.1)
    hidden = model(*batch_of_two()[:2])[:, :1]
    assert hidden.dtype == torch.bfloat16
    assert model.image_head.sample(hidden, (1.0,), 5, randn(2, 8)).isfinite().all()


# --- The transformer against transformers --------------------------------------------------------


def chameleon(name: str) -> tuple[Orthus, dict[str, Tensor]]:
    """A tiny Chameleon with recorded weights, and the record. Its codebook is not used."""
    recorded, hub = read_fixture(name)
    ids, same = hub["vocabulary_map"], {f.name for f in dataclasses.fields(OrthusConfig)} & set(hub)
    config = OrthusConfig(
        **{field: hub[field] for field in same},
        num_codes=hub["vq_config"]["num_embeddings"],
        latent_channels=hub["vq_config"]["latent_channels"],
        vision_embedding="argmin",
        image_head="tokens",
        eoi_id=ids["<eoss>"],
        boi_id=ids["<racm3:break>"],
        sep_id=ids["<reserved08706>"],
        image_id=ids["<image>"],
    )
    weights = {k.removeprefix("model."): t for k, t in recorded.items() if "." in k}
    codebook = randn(config.num_codes, config.latent_channels)
    model = Orthus(config)
    model.load_state_dict(weights | {"vision_embedding.codebook.weight": codebook})
    return model, recorded


NO_LATENTS = torch.zeros(0, 16)


@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_30b"])
def test_hidden_states_and_logits_equal_those_of_transformers(name):
    model, recorded = chameleon(name)
    hidden = model(recorded["tokens"], NO_LATENTS)
    close(hidden, recorded["hidden"], atol=1e-4)
    close(model.lm_head(hidden), recorded["logits"], atol=1e-4)


@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_30b"])
def test_left_padded_batches_equal_those_of_transformers(name):
    model, recorded = chameleon(name)
    tokens = recorded["padded_tokens"]
    hidden, real = model(tokens, NO_LATENTS), tokens != PAD
    close(hidden[real], recorded["padded_hidden"][real], atol=1e-4)
    close(model.lm_head(hidden)[real], recorded["padded_logits"][real], atol=1e-4)


@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_30b"])
def test_cached_decoding_equals_transformers(name):
    model, recorded = chameleon(name)
    hidden = cached(model, recorded["tokens"], NO_LATENTS, cuts=range(4, 16))
    close(model.lm_head(hidden), recorded["logits"], atol=1e-4)


# --- The future, pads and neighbours -------------------------------------------------------------

STYLES = [dict(), dict(swin_norm=True)]


@pytest.mark.parametrize("style", STYLES)
def test_the_future_never_leaks(style):
    model, latents, length = make_model(**style), randn(8, 8), len(ROW)
    tokens = torch.tensor([ROW] * length)  # row i has another token or latent at position i
    changed = latents.repeat(length, 1, 1)
    for i, token in enumerate(ROW):
        if token == IMAGE:
            changed[i, ROW[:i].count(IMAGE)] = randn(8, seed=9)
        else:
            tokens[i, i] = 50
    hidden = model(tokens, changed.flatten(0, 1))
    before = model(torch.tensor([ROW]), latents)[0]
    for i in range(length):
        close(hidden[i, :i], before[:i], atol=1e-6)
        assert (hidden[i, i:] - before[i:]).abs().amax(-1).min() > 1e-4  # and all the rest knows


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("left, right", [(5, 0), (0, 5), (2, 3)])
def test_padding_changes_nothing_on_either_side(style, left, right):
    model, latents = make_model(**style), randn(8, 8)
    alone = model(torch.tensor([ROW]), latents)
    padded = model(torch.tensor([[PAD] * left + ROW + [PAD] * right]), latents)
    close(padded[:, left : left + len(ROW)], alone, atol=1e-5)


def test_loss_is_the_same_padded_left_or_right(model):
    row, labels, latents = torch.tensor([ROW]), torch.tensor([LABELS]), randn(8, 8)
    alone = model.loss(row, latents, labels, seeded(0)).total
    for sides in ((4, 0), (0, 4)):
        padded = F.pad(row, sides, value=PAD), latents, F.pad(labels, sides, value=-100)
        close(model.loss(*padded, seeded(0)).total, alone, rtol=1e-5)


def test_rows_of_a_batch_do_not_influence_each_other(model):
    tokens, latents, _ = batch_of_two()
    hidden = model(tokens, latents)
    other = tokens.clone()
    other[1, 7:] = 55
    close(model(other, torch.cat([latents[:8], randn(4, 8, seed=1)]))[0], hidden[0], atol=1e-6)
    close(hidden[0], model(tokens[:1], latents[:8])[0], atol=1e-5)
    close(hidden[1], model(tokens[1:], latents[8:])[0], atol=1e-5)


@pytest.mark.parametrize("pads", [10, 300])
def test_a_row_of_pads_is_never_nan_and_harms_no_neighbour(model, pads):
    row = torch.tensor([[PAD] * pads + ROW])
    tokens = torch.cat([row, torch.full_like(row, PAD)])
    hidden = model(tokens, randn(8, 8))
    assert hidden.isfinite().all()
    close(hidden[0, pads:], model(torch.tensor([ROW]), randn(8, 8))[0], atol=1e-5)
    finite_gradients(model, hidden[0, pads:].square().sum())


def test_latents_fill_placeholders_in_reading_order_over_the_batch(model):
    tokens, latents, _ = batch_of_two()
    embedded = model.embed(tokens, latents)
    vision = model.vision_embedding(latents)
    assert torch.equal(embedded[0, 4:8], vision[:4])
    assert torch.equal(embedded[0, 13:17], vision[4:8])
    assert torch.equal(embedded[1, 2:6], vision[8:])
    assert torch.equal(embedded[0, :4], model.embed_tokens.weight[ROW[:4]])


# --- Cache ---------------------------------------------------------------------------------------


def cached(model: Orthus, tokens: Tensor, latents: Tensor, cuts, cache=None) -> Tensor:
    """Hidden states (B, T, D), computed in pieces that end at `cuts` and at T."""
    if cache is None:
        cache = KVCache(model.config, len(tokens), tokens.shape[1] + 3)  # with slots to spare
    is_image = tokens == model.config.image_id
    order = is_image.flatten().cumsum(0).view_as(tokens) - 1  # which latent stands where
    pieces = []
    for start, end in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        here = latents[order[:, start:end][is_image[:, start:end]]]
        pieces.append(model(tokens[:, start:end], here, cache))
    return torch.cat(pieces, 1)


ONE_BY_ONE = range(3, len(ROW))  # after a prefill of three
IN_PIECES = [5, 6, 14, 16]  # some within images


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cuts", [ONE_BY_ONE, IN_PIECES])
def test_cached_decoding_equals_full_recomputation(style, cuts):
    model, latents = make_model(**style), randn(12, 8)
    short = [BOS, 40, SEP, *PICTURE, 41, 42, 43]
    tokens = torch.tensor([ROW, [PAD] * (len(ROW) - len(short)) + short])
    close(cached(model, tokens, latents, cuts), model(tokens, latents), atol=1e-5)


def test_a_cache_longer_than_needed_changes_nothing(model):
    tokens, latents = torch.tensor([ROW]), randn(8, 8)
    exact, long = (
        cached(model, tokens, latents, ONE_BY_ONE, KVCache(model.config, 1, length))
        for length in (len(ROW), 100)
    )
    close(exact, long, atol=1e-6)


def test_a_bf16_cache_serves_a_bf16_model(model):
    model, tokens, latents = model.bfloat16(), torch.tensor([ROW]), randn(8, 8)
    cache = KVCache(model.config, 1, len(ROW), dtype=torch.bfloat16)
    hidden = cached(model, tokens, latents, ONE_BY_ONE, cache)
    assert hidden.dtype == torch.bfloat16
    close(hidden, model(tokens, latents), atol=0.1)


def test_a_row_fed_with_pads_equals_one_that_never_had_them(model):
    gaps = ROW[:9] + [PAD] * 3 + ROW[9:14] + [PAD] + ROW[14:]
    hidden = cached(model, torch.tensor([gaps]), randn(8, 8), range(9, len(gaps)))
    kept = [i for i, token in enumerate(gaps) if token != PAD]
    close(hidden[:, kept], model(torch.tensor([ROW]), randn(8, 8)), atol=1e-5)


def test_slots_hidden_after_the_fact_equal_tokens_that_never_were(model):
    start, extra, rest = [BOS, 30], [40, 41, 42, SEP], PICTURE + [43]
    tokens, latents = torch.tensor([start + extra] * 2), randn(8, 8)
    cache = KVCache(model.config, 2, 20)
    cached(model, tokens, latents[:0], [], cache)
    cache.visible[1, 2:6] = False  # hidden from the second row alone
    hidden = cached(model, torch.tensor([rest] * 2), latents, range(1, 7), cache)
    full = model(torch.tensor([start + extra + rest]), latents[:4])
    without = model(torch.tensor([start + rest]), latents[4:])
    close(hidden[0], full[0, 6:], atol=1e-5)
    close(hidden[1], without[0, 2:], atol=1e-5)


# --- Sizes and configurations --------------------------------------------------------------------


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    """Millions of parameters of the 7B model, by part."""
    with torch.device("meta"):
        model = Orthus(OrthusConfig.preset("7b"))
    parts = dict(
        total=model,
        head=model.image_head,
        codebook=model.vision_embedding,
        embed_tokens=model.embed_tokens,
    )
    count = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in parts.items()}
    named = model.image_head.named_parameters()
    return count | {"adaln": sum(p.numel() for n, p in named if "adaLN" in n) / 1e6}


def test_7b_has_the_released_parameter_counts(counts):
    assert round(counts["total"] / 1e3, 2) == 7.07
    assert round((counts["total"] - counts["head"] - counts["codebook"]) / 1e3, 2) == 7.01


def test_7b_parts_have_the_released_parameter_counts(counts):
    assert {name: round(counts[name], 1) for name in ("head", "adaln", "codebook")} == {
        "head": 50.0,
        "adaln": 26.0,
        "codebook": 2.1,
    }
    assert round(counts["embed_tokens"], 1) == 268.4


def test_stage_1_trains_320_million_parameters_of_7b(counts):
    assert round(counts["embed_tokens"] + counts["codebook"] + counts["head"], 1) == 320.5


@pytest.mark.parametrize("name", orthus.PRESETS)
def test_token_ids_of_every_preset_are_laid_out_like_chameleons(name):
    c = OrthusConfig.preset(name)
    assert [c.bos_id, c.pad_id, c.eos_id, c.unk_id, c.image_code_start] == [0, 1, 2, 3, 4]
    assert c.image_code_start + c.num_codes == c.eoi_id == c.boi_id - 1
    assert c.boi_id < c.sep_id == c.image_id - 1 and c.image_id < c.vocab_size


@pytest.mark.parametrize(
    "field", ["vision_embedding", "image_head", "prediction", "beta_schedule"]
)
def test_an_unknown_choice_raises_with_the_known_ones(field):
    message = complaint(lambda: small_config(**{field: "magic"}))
    choices = typing.get_args(typing.get_type_hints(OrthusConfig)[field])
    assert "'magic'" in message and all(c in message for c in choices)


def test_sizes_that_do_not_fit_raise_with_the_values():
    assert "33" in complaint(lambda: small_config(hidden_size=33))
    assert "3" in complaint(lambda: small_config(num_key_value_heads=3))
    assert "'huge'" in complaint(lambda: OrthusConfig.preset("huge"))
    assert "linear" in complaint(
        lambda: small_config(image_head="tokens", vision_embedding="linear")
    )


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory, change) -> None:
    path = directory / checkpoint.CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("embedding, image_head", COMBINATIONS)
def test_a_model_survives_the_disk_bit_for_bit(tmp_path, embedding, image_head):
    model = make_model(vision_embedding=embedding, image_head=image_head)
    model.save_pretrained(tmp_path)
    again = Orthus.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, wanted in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], wanted), name
    loss = model.loss(*batch_of_two(), seeded(0))
    assert again.loss(*batch_of_two(), seeded(0)) == loss


def test_a_dtype_may_be_asked_for_and_is_kept_on_disk(saved, tmp_path):
    half = Orthus.from_pretrained(saved, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = Orthus.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_saving_keeps_the_other_parts_of_a_directory(model, saved):
    edit_config(saved, lambda c: c.update(generation={"steps": 7}))
    (saved / "tokenizer.model").write_bytes(b"pieces")
    model.save_pretrained(saved)
    assert checkpoint.open_checkpoint(saved).config["generation"] == {"steps": 7}
    assert (saved / "tokenizer.model").read_bytes() == b"pieces"
