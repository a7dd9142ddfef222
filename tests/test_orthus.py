"""orthus.py against reference.py, in its own order: embedding, schedule, heads, model, cache,
sizes, the disk. What peers and the release recorded of it: test_hub.py.

Every model here is tiny and random, no parameter left at an initial value that would hide a fault.
One row of text, image, text, image, text (ROW) serves most tests.
"""

import itertools
import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    OwnHead,
    close,
    complaint,
    edit_json,
    randn,
    randomise,
    read_fixture,
    seeded,
)
from safetensors import safe_open
from torch import Tensor

import checkpoint
import orthus
from orthus import DiffusionHead, KVCache, NoiseSchedule, Orthus, OrthusConfig, VisionEmbedding

BOS, PAD, START, CODES, EOI, BOI, SEP, IMAGE = 0, 1, 4, 16, 20, 21, 22, 23  # text from 24 on
PICTURE = [BOI, IMAGE, IMAGE, IMAGE, IMAGE, EOI]
ROW = [BOS, 30, 31, *PICTURE, 32, SEP, 33, *PICTURE, 34, SEP]  # an input and an output image
LABELS = [-100] * 11 + ROW[11:]
EMBEDDINGS, HEADS = ("softmax", "argmin", "linear"), ("diffusion", "mse", "tokens")
COMBINATIONS = [c for c in itertools.product(EMBEDDINGS, HEADS) if c != ("linear", "tokens")]
SCHEDULES = [  # all that are allowed
    dict(beta_schedule=betas, zero_terminal_snr=zero_snr, prediction=prediction)
    for betas in ("scaled_linear", "linear")
    for zero_snr, prediction in ((True, "velocity"), (False, "velocity"), (False, "epsilon"))
]
IDS = dict(eoi_id=EOI, boi_id=BOI, sep_id=SEP, image_id=IMAGE)
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SIZES |= dict(num_codes=CODES, latent_channels=8, latents_per_image=4, tau=4.0, head_width=24)
SIZES |= dict(head_blocks=2, latent_scale=0.5, diffusion_batch_multiplier=3)
SIZES |= dict(image_loss_weight=10.0, **IDS)


def small_config(**changes) -> OrthusConfig:
    return OrthusConfig(**(SIZES | changes))


def make_model(**changes) -> Orthus:
    return randomise(Orthus(small_config(**changes)))


def make_head(**changes) -> DiffusionHead:
    return randomise(DiffusionHead(small_config(**changes)))


@pytest.fixture
def model() -> Orthus:
    return make_model()


# --- Vision embedding ----------------------------------------------------------------------------


def parts(embedding: VisionEmbedding) -> tuple[Tensor, Tensor]:
    """The codebook, and the rows of the token table that stand for the codes."""
    return embedding.codebook.weight, embedding.embed_tokens.weight[START : START + CODES]


@pytest.mark.parametrize("tau", [0.5, 4.0, 100.0])
def test_soft_embedding_is_equation_4(tau):
    embedding, latents = make_model(tau=tau).vision_embedding, randn(20, 8)
    for latent, got in zip(latents, embedding(latents)):
        close(got, reference.soft_embedding(latent, *parts(embedding), tau))


def test_hard_embedding_is_equations_1_and_2_and_the_limit_of_4():
    hard = make_model(vision_embedding="argmin").vision_embedding
    latents = randn(100, 8)
    for latent, got in zip(latents, hard(latents)):
        close(got, reference.hard_embedding(latent, *parts(hard)), atol=0)
    close(make_model(tau=1e-6).vision_embedding(latents), hard(latents), atol=1e-6)
    codebook, rows = parts(hard)
    assert torch.equal(hard(codebook), rows)  # a latent at a code is the token of that code


def test_argmin_embedding_reads_latents_as_chameleon_reads_their_tokens():
    model = make_model(vision_embedding="argmin", image_head="tokens")
    tokens, latents = torch.tensor([ROW]), randn(8, 8)
    nearest = torch.cdist(latents, model.vision_embedding.codebook.weight).argmin(-1)
    as_tokens = tokens.clone()
    as_tokens[tokens == IMAGE] = START + nearest
    assert torch.equal(model(tokens, latents), model(as_tokens, randn(0, 8)))


def test_linear_embedding_is_a_projection_without_codebook():
    embedding, latents = make_model(vision_embedding="linear").vision_embedding, randn(5, 8)
    close(embedding(latents), latents @ embedding.projection.weight.T + embedding.projection.bias)
    assert not hasattr(embedding, "codebook")


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_latents_are_measured_in_fp32(autocast):
    ids = dict(eoi_id=36, boi_id=37, sep_id=38, image_id=39)
    embedding = make_model(num_codes=32, latent_channels=256, vocab_size=96, **ids).vision_embedding
    latents, codebook = randn(400, 256).bfloat16(), embedding.codebook.weight.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = embedding.codes(latents)
        assert embedding.closeness(latents).dtype == torch.float32
    exact = (latents.double()[:, None] - codebook.double()).square().sum(-1).argmin(-1)
    assert torch.equal(codes, exact)
    rounded = codebook.bfloat16()
    in_bf16 = (2 * latents @ rounded.T - rounded.square().sum(-1)).argmax(-1)
    assert (in_bf16 != codes).any()  # or this test would show nothing


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


@pytest.mark.parametrize("choice", SCHEDULES)
def test_noise_is_that_of_the_reference_and_of_diffusers(diffusers, choice):
    schedule, levels = NoiseSchedule(**choice), reference.alphas_cumprod(small_config(**choice))
    betas, zero_snr, prediction = choice.values()
    name = f"{betas}.{'zero_snr' if zero_snr else 'plain'}"
    close(schedule.alphas_cumprod, torch.tensor(levels), atol=1e-7)
    close(schedule.alphas_cumprod, diffusers[f"{name}.alphas_cumprod"])
    assert (schedule.alphas_cumprod[999] == 0) == zero_snr and (
        schedule.alphas_cumprod.diff() < 0
    ).all()
    inputs = diffusers["latents"], diffusers["noise"], diffusers["t"]
    close(schedule.add_noise(*inputs), diffusers[f"{name}.noisy"])
    velocity, noise = diffusers[f"{name}.velocity"], diffusers["noise"]
    close(schedule.target(*inputs), noise if prediction == "epsilon" else velocity)
    theirs, rtol = ("epsilon", 2e-5) if prediction == "epsilon" else ("v_prediction", 0)
    for steps in (7, 10):
        path = [diffusers["x"]]
        for t, a, b in schedule.ddim(steps):
            path.append(a * path[-1] + b * torch.tanh(path[-1] @ diffusers["weight"] + t / 1000))
        close(torch.stack(path), diffusers[f"{name}.{theirs}.{steps}"], rtol=rtol)


def test_timesteps_equal_those_of_diffusers(diffusers):
    schedule = NoiseSchedule("scaled_linear", True, "velocity")
    for steps in (1, 2, 3, 5, 7, 10, 16, 30, 48, 50, 100, 333, 1000):
        apart = torch.tensor(schedule.timesteps(steps)) - diffusers[f"timesteps.{steps}"]
        assert apart.abs().max() <= (steps == 48)  # there theirs misses its own formula by rounding
    assert schedule.timesteps(100) == list(range(999, 0, -10))
    assert "1001" in complaint(lambda: schedule.timesteps(1001))


MEAN, STD = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 2.0])  # of a channel each


def gaussian_samples(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """1000 steps of DDIM with the perfect head for latents from N(MEAN, STD^2): its output is the
    expectation of its target."""
    for t, a, b in schedule.ddim(1000):
        signal, sigma = (part[0, 0] for part in schedule.signal_and_noise(torch.tensor([t])))
        off = (x - signal * MEAN) / (signal**2 * STD**2 + sigma**2)
        clean, noise = MEAN + signal * STD**2 * off, sigma * off
        output = noise if schedule.prediction == "epsilon" else signal * noise - sigma * clean
        x = a * x + b * output
    return x


@pytest.mark.parametrize("choice", SCHEDULES)
def test_ddim_moves_each_noise_along_the_exact_map(choice):
    schedule, noise = NoiseSchedule(**choice), randn(200, 2)
    last = schedule.alphas_cumprod[999]  # not quite pure noise, unless zero_snr
    wanted = MEAN + STD * (noise - last.sqrt() * MEAN) / (last * STD**2 + 1 - last).sqrt()
    close(gaussian_samples(schedule, noise), wanted, atol=0.02)


# --- Diffusion head: network and loss ------------------------------------------------------------

T = torch.tensor([0, 9, 500, 998, 999])


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, latents, t and noise of five latents."""
    return randn(5, 32), randn(5, 8, seed=1), T, randn(5, 8, seed=2)


def test_head_is_the_network_of_section_5_1():
    head, noisy, hidden = make_head(), randn(5, 8), randn(5, 32, seed=1)
    rows = zip(noisy, T.tolist(), hidden)
    wanted = [reference.head_network(head.state_dict(), *row) for row in rows]
    close(head(noisy, T, hidden), torch.stack(wanted), atol=1e-4)


@pytest.mark.parametrize("choice", SCHEDULES)
def test_loss_is_equation_3(choice):
    head, config = make_head(**choice), small_config(**choice)
    wanted = reference.diffusion_loss(head.state_dict(), config, *example())
    close(head.loss(*example()), wanted, atol=0, rtol=1e-4)


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
    assert all((clean == latent).all(-1).sum() == 3 for latent in latents * 0.5)
    assert len(noised["noise"].unique(dim=0)) == 15 and len(noised["t"].unique()) > 5
    loss = lambda seed: make_head().loss(randn(5, 32), latents, generator=seeded(seed))
    assert loss(3) == loss(3) != loss(4)
    make_head().loss(randn(5, 32), latents, T)  # once, where a level is given
    assert torch.equal(noised["latents"], latents * 0.5)
    make_head().loss(randn(5, 32), latents, noise=randn(5, 8))
    assert torch.equal(noised["latents"], latents * 0.5)


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


def test_a_fresh_head_has_the_released_initial_values():
    head = Orthus(small_config(head_width=96)).image_head
    hidden, latents, t, noise = example()
    assert (head(latents, t, hidden) == 0).all()
    target = head.schedule.target(0.5 * latents, noise, t)
    close(head.loss(hidden, latents, t, noise), target.square().mean())
    assert 0.018 < head.time_embed.mlp[0].weight.std() < 0.022
    largest = head.cond_embed.weight.abs().max()  # Xavier: uniform up to sqrt(6 / (in + out))
    assert 0.95 < largest / (6 / (32 + 96)) ** 0.5 <= 1
    assert head.cond_embed.bias.eq(0).all() and head.res_blocks[0].in_ln.weight.eq(1).all()


def test_a_fresh_model_has_small_values_and_smaller_ones_where_the_residual_stream_is_written():
    model = Orthus(small_config(vocab_size=512, intermediate_size=128))
    std = lambda p: p.std().item() / 0.02
    assert 0.9 < std(model.embed_tokens.weight) < 1.1 and 0.9 < std(model.lm_head.weight) < 1.1
    for layer in model.layers:
        assert 0.9 < std(layer.self_attn.q_proj.weight) < 1.1
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert 0.45 < std(part.weight) < 0.55  # 1 / sqrt(2 layers)
        assert layer.input_layernorm.weight.eq(1).all() and layer.self_attn.q_norm.bias.eq(0).all()
    assert 0.8 < std(model.vision_embedding.codebook.weight) < 1.2  # of 128 numbers


# --- Diffusion head: sampling and guidance -------------------------------------------------------

COMBINE = {  # weights of the contexts -> the formula they stand for, of the contexts' outputs
    (1.0,): lambda full: full,
    (5.0, -4.0): lambda f, e: reference.guidance(f, e, e, 5.0, 1.0),
    (3.0, -1.5, -0.5): lambda f, i, e: reference.guidance(f, i, e, 3.0, 1.5),
}


@pytest.mark.parametrize("weights", COMBINE)
@pytest.mark.parametrize("choice", SCHEDULES)
def test_sampling_is_ddim_under_guidance(choice, weights):
    head, config, combine = make_head(**choice), small_config(**choice), COMBINE[weights]
    hidden, noise, w = randn(3, len(weights), 32), randn(3, 8, seed=1), head.state_dict()
    draw = lambda h, eps: reference.draw_latent(w, config, h, combine, eps, steps=7)
    wanted = torch.stack([draw(h, eps) for h, eps in zip(hidden, noise)])
    rtol = 1e-3 if choice["prediction"] == "epsilon" else 2e-4  # it divides by what signal is left
    close(head.sample(hidden, weights, 7, noise), wanted, atol=2e-4, rtol=rtol)
    close(head.sample_naive(hidden, weights, 7, noise), wanted, atol=2e-4, rtol=rtol)


def test_fast_sampling_equals_the_naive_loop_with_any_number_of_steps():
    head, hidden, noise = make_head(), randn(3, 2, 32), randn(3, 8, seed=1)
    for steps in (1, 4, 100, 4):  # what is computed ahead is of these steps
        naive = head.sample_naive(hidden, (2.0, -1.0), steps, noise)
        close(head.sample(hidden, (2.0, -1.0), steps, noise), naive, atol=1e-4, rtol=1e-4)


def test_sampling_draws_its_noise_from_the_generator_and_writes_nothing_into_it():
    head, hidden, noise = make_head(), randn(3, 1, 32), randn(3, 8, seed=7)
    for sample in (head.sample, head.sample_naive):
        drawn = sample(hidden, steps=5, generator=seeded(7))
        assert torch.equal(drawn, sample(hidden, steps=5, generator=seeded(7)))
        assert torch.equal(drawn, sample(hidden, steps=5, noise=noise))
        assert not torch.allclose(drawn, sample(hidden, steps=5, generator=seeded(8)))
    assert torch.equal(noise, randn(3, 8, seed=7))


# --- The three image heads, and one of the user's own --------------------------------------------


@pytest.mark.parametrize("image_head", HEADS)
def test_every_image_head_samples_finite_latents_that_follow_their_noise(image_head):
    head, hidden = make_model(image_head=image_head).image_head, randn(64, 2, 32)
    draw = lambda seed: head.sample(hidden, (2.0, -1.0), 5, randn(64, 8, seed=seed))
    one, again, other = draw(1), draw(1), draw(2)
    assert one.shape == (64, 8) and one.dtype == torch.float32 and one.isfinite().all()
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (image_head == "mse")  # which can only give the mean


@pytest.mark.parametrize("image_head", HEADS)
def test_latents_of_a_batch_are_sampled_independently(image_head):
    head, hidden, noise = make_model(image_head=image_head).image_head, randn(6, 2, 32), randn(6, 8)
    together = head.sample(hidden, (3.0, -2.0), 10, noise)
    for i in range(6):
        alone = head.sample(hidden[i : i + 1], (3.0, -2.0), 10, noise[i : i + 1])
        close(together[i : i + 1], alone, atol=1e-4)
    with pytest.raises((ValueError, RuntimeError)):
        head.sample(hidden, (1.0,), 5, noise)  # a weight for each context


def test_regression_head_gives_back_what_its_loss_asks_for():
    head, hidden = make_model(image_head="mse").image_head, randn(5, 32)
    latents = head.sample(hidden[:, None], (1.0,), 1, randn(5, 8))
    assert head.loss(hidden, latents) < 1e-10
    close(head.loss(hidden, latents + 2), torch.tensor(1.0))  # (2 * latent_scale)^2


def test_token_head_draws_codes_as_often_as_their_guided_probability():
    model, hidden = make_model(image_head="tokens"), randn(1, 2, 32)
    logits = model.lm_head(hidden)[0, :, START : START + CODES]
    for contexts, weights in ((1, (1.0,)), (2, (3.0, -2.0))):
        wanted = (torch.tensor(weights) @ logits[:contexts]).softmax(-1)
        many = hidden[:, :contexts].expand(20_000, -1, -1)
        latents = model.image_head.sample(many, weights, 1, randn(20_000, 8))
        codes = model.vision_embedding.codes(latents)
        assert torch.equal(model.vision_embedding.codebook(codes), latents)
        close(torch.bincount(codes, minlength=CODES) / 20_000, wanted, atol=0.02)


def test_a_head_of_ones_own_is_a_class_and_an_entry_of_heads(monkeypatch, tmp_path):
    monkeypatch.setitem(orthus.HEADS, "own", OwnHead)
    model = make_model(image_head="own")
    loss = model.loss(*batch_of_two())
    assert "image_head.out.weight" in finite_gradients(model, loss.total)
    model.save_pretrained(tmp_path)
    assert isinstance(Orthus.from_pretrained(tmp_path).image_head, OwnHead)
    monkeypatch.undo()
    message = complaint(lambda: small_config(image_head="own"))
    assert "'own'" in message and "diffusion" in message


# --- Orthus.loss ---------------------------------------------------------------------------------


def batch_of_two() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, latents, labels: ROW, and a shorter row whose only image is an input."""
    short = [BOS, *PICTURE, 40, SEP, 41, 42, SEP]
    padding = len(ROW) - len(short)
    tokens = torch.tensor([ROW, short + [PAD] * padding])
    labels = torch.tensor([LABELS, [-100] * 9 + short[9:] + [-100] * padding])
    return tokens, randn(12, 8), labels


def finite_gradients(model: Orthus, total: Tensor) -> set[str]:
    """Names of the parameters that total reaches, their gradients checked to be finite."""
    model.zero_grad()
    total.backward()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in reached.values())
    return {name for name, grad in reached.items() if grad.abs().sum() > 0}


def targets(model: Orthus) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Of batch_of_two, one position at a time: logits where text was to come, that text, and for
    each latent of the output image the hidden state before it, and the latent."""
    tokens, latents, labels = batch_of_two()
    hidden, logits, said, before, wanted, seen = model(tokens, latents), [], [], [], [], 0
    for b, i in itertools.product(range(2), range(len(ROW))):
        label = labels[b, i].item()
        if label == IMAGE:
            before.append(hidden[b, i - 1])
            wanted.append(latents[seen])
        elif label != -100:
            logits.append(model.lm_head(hidden[b, i - 1]))
            said.append(label)
        seen += int(tokens[b, i] == IMAGE)
    assert len(wanted) == 4 and len(said) == 8
    return torch.stack(logits), said, torch.stack(before), torch.stack(wanted)


@pytest.mark.parametrize("image_head", HEADS)
def test_loss_is_that_of_text_and_lambda_times_that_of_the_output_images(image_head):
    model = make_model(image_head=image_head)
    logits, said, before, wanted = targets(model)
    image = model.image_head.loss(before, wanted, generator=seeded(1))
    loss = model.loss(*batch_of_two(), seeded(1))
    close(loss.text, reference.joint_loss(logits, said, 0.0, 10.0))
    close(loss.image, image)
    close(loss.total, reference.joint_loss(logits, said, image, 10.0), atol=0, rtol=1e-5)
    if image_head == "tokens":  # Chameleon's: the cross-entropy of the tokens of the codes
        codes = START + model.vision_embedding.codes(wanted)
        close(image, F.cross_entropy(model.lm_head(before), codes))


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
def test_every_embedding_and_head_learns_and_survives_the_disk(tmp_path, embedding, image_head):
    model = make_model(vision_embedding=embedding, image_head=image_head)
    loss = model.loss(*batch_of_two(), seeded(0))
    assert loss.text > 0 and loss.image > 0 and finite_gradients(model, loss.total)
    model.save_pretrained(tmp_path)
    again = Orthus.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, wanted in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], wanted), name
    assert again.loss(*batch_of_two(), seeded(0)) == loss


def test_targets_are_predicted_where_other_latents_are_read(model):
    tokens, latents, labels = batch_of_two()
    read = latents + 0.5 * randn(12, 8, seed=5)
    before = F.pad(labels == IMAGE, (0, 1))[:, 1:]
    wanted = model.image_head.loss(model(tokens, read)[before], latents[4:8], generator=seeded(1))
    got = model.loss(tokens, read, labels, seeded(1), targets=latents)
    close(got.image, wanted, rtol=1e-6)
    assert (model.loss(tokens, read, labels, seeded(1)).image - wanted).abs() > 1e-3


def test_text_alone_gives_no_image_loss_and_images_alone_no_text_loss(model):
    tokens = torch.tensor([[BOS, 30, SEP, 31, 32, SEP], [BOS, 30, 31, SEP, 33, PAD]])
    loss = model.loss(tokens, torch.zeros(0, 8), torch.where(tokens > SEP, tokens, -100))
    assert loss.image == 0 and loss.total == loss.text > 0
    reached = finite_gradients(model, loss.total)
    assert "lm_head.weight" in reached and not any("image_head" in name for name in reached)
    tokens = torch.tensor([[BOS, *PICTURE], [BOS, *PICTURE]])
    loss = model.loss(tokens, randn(8, 8), torch.where(tokens == IMAGE, IMAGE, -100), seeded(0))
    assert loss.text == 0 and loss.image > 0 and loss.total == 10 * loss.image
    reached = finite_gradients(model, loss.total)
    assert "image_head.input_proj.weight" in reached and "lm_head.weight" not in reached
    assert "vision_embedding.codebook.weight" in reached


@pytest.mark.parametrize("count", [0, 7, 9])
def test_a_wrong_number_of_latents_raises_with_both_numbers(model, count):
    message = complaint(lambda: model(torch.tensor([ROW]), randn(count, 8)))
    assert "8" in message and str(count) in message


@pytest.mark.parametrize("image_head", HEADS)
def test_nothing_depends_on_train_or_eval_and_inputs_are_never_written(image_head):
    model, inputs = make_model(image_head=image_head), batch_of_two()
    assert model.train().loss(*inputs, seeded(0)) == model.eval().loss(*inputs, seeded(0))
    hidden, noise = randn(3, 1, 32), randn(3, 8)
    one, two = (m().image_head.sample(hidden, (1.0,), 5, noise) for m in (model.train, model.eval))
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(inputs, batch_of_two()))


@pytest.mark.parametrize("image_head", HEADS)
def test_bf16_learns_and_samples_nearly_as_fp32(image_head):
    model = make_model(image_head=image_head)
    exact = model.loss(*batch_of_two(), seeded(0)).total
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(*batch_of_two(), seeded(0)).total
    model = model.bfloat16()
    half = model.loss(*batch_of_two(), seeded(0)).total
    for loss in (rough, half):
        assert loss.dtype == torch.float32
        close(loss, exact, atol=0, rtol=0.1)
    finite_gradients(model, half)
    hidden = model(*batch_of_two()[:2])[:, :1]
    assert hidden.dtype == torch.bfloat16
    assert model.image_head.sample(hidden, (1.0,), 5, randn(2, 8)).isfinite().all()


def test_layers_that_compute_again_give_the_same_gradients(model):
    gradients = []
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        model.loss(*batch_of_two(), seeded(0)).total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    ran = []
    model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    model.loss(*batch_of_two(), seeded(0)).total.backward()
    assert len(ran) == 2  # once forth, once more on the way back


# --- The transformer: the reference's, the future, pads and neighbours ---------------------------

STYLES = [dict(), dict(swin_norm=True), dict(num_key_value_heads=4)]


@pytest.mark.parametrize("style", STYLES)
def test_the_transformer_is_that_of_the_reference(style):
    model, tokens, latents = make_model(**style), torch.tensor([ROW]), randn(8, 8)
    wanted = reference.transformer(
        model.state_dict(), model.embed(tokens, latents)[0], model.config
    )
    close(model(tokens, latents)[0], wanted, atol=2e-5)


@pytest.mark.parametrize("style", STYLES[:2])
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


@pytest.mark.parametrize("style", STYLES[:2])
@pytest.mark.parametrize("left, right", [(5, 0), (0, 5), (2, 3)])
def test_padding_changes_nothing_on_either_side(style, left, right):
    model, latents = make_model(**style), randn(8, 8)
    row, labels = torch.tensor([ROW]), torch.tensor([LABELS])
    alone = model(row, latents)
    padded = F.pad(row, (left, right), value=PAD)
    close(model(padded, latents)[:, left : left + len(ROW)], alone, atol=1e-5)
    loss = model.loss(row, latents, labels, seeded(0)).total
    labels = F.pad(labels, (left, right), value=-100)
    close(model.loss(padded, latents, labels, seeded(0)).total, loss, rtol=1e-5)


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
    hidden = model(torch.cat([row, torch.full_like(row, PAD)]), randn(8, 8))
    assert hidden.isfinite().all()
    close(hidden[0, pads:], model(torch.tensor([ROW]), randn(8, 8))[0], atol=1e-5)
    finite_gradients(model, hidden[0, pads:].square().sum())


def test_latents_fill_placeholders_in_reading_order_over_the_batch(model):
    tokens, latents, _ = batch_of_two()
    embedded, vision = model.embed(tokens, latents), model.vision_embedding(latents)
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
    wanted = model(tokens, latents)
    close(cached(model, tokens, latents, cuts), wanted, atol=1e-5)
    longer = KVCache(model.config, 2, 100)  # than needed
    close(cached(model, tokens, latents, cuts, longer), wanted, atol=1e-5)


def test_a_row_fed_with_pads_equals_one_that_never_had_them(model):
    gaps = ROW[:9] + [PAD] * 3 + ROW[9:14] + [PAD] + ROW[14:]
    hidden = cached(model, torch.tensor([gaps]), randn(8, 8), range(9, len(gaps)))
    kept = [i for i, token in enumerate(gaps) if token != PAD]
    close(hidden[:, kept], model(torch.tensor([ROW]), randn(8, 8)), atol=1e-5)


def test_some_rows_of_a_cache_go_on_alone_in_any_order(model):
    tokens, none = torch.tensor([[BOS, 30], [BOS, 31], [BOS, 32]]), randn(0, 8)
    cache = KVCache(model.config, 3, 8)
    model(tokens, none, cache)
    model(torch.tensor([[40], [41]]), none, cache.select([2, 0]))
    hidden = model(torch.tensor([[50], [51], [52]]), none, cache.select([0, 1, 2]))[:, 0]
    for row, whole in enumerate(([BOS, 30, 41, 50], [BOS, 31, 51], [BOS, 32, 40, 52])):
        close(hidden[row], model(torch.tensor([whole]), none)[0, -1], atol=1e-5)


# --- Sizes, names and configurations -------------------------------------------------------------


def test_7b_has_the_released_parameter_counts():
    with torch.device("meta"):
        model = Orthus(OrthusConfig.preset("7b"))
    count = lambda module, part="": (
        sum(p.numel() for name, p in module.named_parameters() if part in name) / 1e6
    )
    head, codebook, words = model.image_head, model.vision_embedding, model.embed_tokens
    assert round(count(model) / 1e3, 2) == 7.07
    assert round((count(model) - count(head) - count(codebook)) / 1e3, 2) == 7.01
    sizes = [count(head), count(head, "adaLN"), count(codebook), count(words)]
    assert [round(size, 1) for size in sizes] == [50.0, 26.0, 2.1, 268.4]
    assert round(count(words) + count(codebook) + count(head), 1) == 320.5  # stage 1 trains these


def test_the_shipped_tensors_have_the_names_and_shapes_of_the_model():
    with safe_open(ROOT / "checkpoints" / "tiny" / checkpoint.MODEL, "pt") as file:
        shipped = {name: file.get_slice(name).get_shape() for name in file.keys()}
    with torch.device("meta"):
        model = Orthus(OrthusConfig.preset("tiny"))
    assert shipped == {name: list(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", orthus.PRESETS)
def test_token_ids_of_every_preset_are_laid_out_like_chameleons(name):
    c = OrthusConfig.preset(name)
    assert [c.bos_id, c.pad_id, c.eos_id, c.unk_id, c.image_code_start] == [0, 1, 2, 3, 4]
    assert c.image_code_start + c.num_codes == c.eoi_id == c.boi_id - 1
    assert c.boi_id < c.sep_id == c.image_id - 1 and c.image_id < c.vocab_size


BAD = [  # fields that do not go together, what the line must name
    (dict(hidden_size=33), "33"),
    (dict(num_key_value_heads=3), "3"),
    (dict(image_head="nose"), "nose"),
    (dict(tau=0.0), "tau"),
    (dict(vision_embedding="linear", image_head="tokens"), "linear"),
    (dict(prediction="epsilon"), "epsilon"),
    (dict(sep_id=IMAGE), "23"),
    (dict(sep_id=START), "4"),
    (dict(image_id=64), "64"),
    (dict(num_codes=61), "64"),
]


@pytest.mark.parametrize("fields, wanted", BAD)
def test_fields_that_do_not_go_together_raise_with_their_values(fields, wanted):
    assert wanted in complaint(lambda: small_config(**fields))


# --- The disk, and what importing costs ----------------------------------------------------------


def test_saving_keeps_the_other_parts_of_a_directory_and_the_dtype(model, tmp_path):
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / checkpoint.CONFIG, lambda c: c.update(generation={"steps": 7}))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    half = Orthus.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert checkpoint.open_checkpoint(tmp_path).config["generation"] == {"steps": 7}
    assert (tmp_path / "tokenizer.model").read_bytes() == b"pieces"
    again = Orthus.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_importing_the_method_needs_torch_alone_and_no_import_goes_round_or_up():
    """The method in a process of its own; of all files at the top, what any line of them imports,
    which lab/ is not, nor, by however many files in between, the file itself."""
    code = (
        "import sys, torch; old = {*sys.modules}; import orthus, vae; print(*{*sys.modules} - old)"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {name.partition(".")[0] for name in out.split()}
    assert named - set(sys.stdlib_module_names) <= {"orthus", "vae", "torch"}
    arrows = {}
    for path in ROOT.glob("*.py"):
        words = [line.split() for line in path.read_text().splitlines()]
        words = [w for w in words if w[:1] in (["import"], ["from"])]
        arrows[path.stem] = {w[1].partition(".")[0].rstrip(",") for w in words}
    for method in ("orthus", "vae"):  # its from_pretrained alone looks up
        arrows[method].discard("checkpoint")
    floors, left = [], set(arrows)
    while left:
        floor = {name for name in left if not arrows[name] & left}
        assert floor, f"{left} import each other"
        floors.append(floor)
        left -= floor
    assert len(floors) <= 5 and floors[0] >= {"orthus", "vae", "checkpoint"}
    assert not any("lab" in found for found in arrows.values())
