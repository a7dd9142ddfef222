"""train.py: what a step is, value by value; that every stage learns; and that nothing is lost."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, complaint, randn
from PIL import Image
from test_released import hub_chameleon

import checkpoint
import data
import optim
import orthus
import released
import sample
import stages
import train
import vae
from data import Segment
from orthus import Orthus
from vae import VQVAE

FAST = dict(preset="nano", steps=2, batch_size=8, workers=0, log_every=1, save_every=10**6,
            validate_every=10**6, pictures_every=0, dtype="float32")  # fmt: skip
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, head_width=48)  # fmt: skip
SMALL_VAE = dict(base_channels=8, channel_multiplier=(1, 1, 2, 2))
TRANSFORMER_STAGES = ("chameleon", "base", "posttrain")


@pytest.fixture(autouse=True, scope="module")
def small_presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(orthus.PRESETS, "nano", orthus.PRESETS["nano"] | SMALL)
        patch.setitem(vae.PRESETS, "nano", vae.PRESETS["nano"] | SMALL_VAE)
        patch.setattr(os, "fsync", lambda file: None)  # hundreds of saves need not reach the disk
        yield


@functools.cache
def disc(place: int, colour: tuple[int, int, int]) -> Image.Image:
    y, x = np.mgrid[:32, :32] - 8 - place
    pixels = np.full((32, 32, 3), 240, np.uint8)
    pixels[x**2 + y**2 < 40] = colour
    return Image.fromarray(pixels)


class World:
    """Endless: pictures of a disc, its caption, a question about it, an edit of it."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def picture(self, index: int, grey: int = 0) -> Image.Image:
        return disc((index + self.seed) % 5 * 4, (20 * (index % 9) + grey, 60, 30 + grey))

    def example(self, index: int) -> list[Segment]:
        image, mask = self.picture(index), Image.new("L", (32, 32), 255)
        drawn = Segment(image, True, mask)
        return [
            [Segment("a dark disc"), drawn],
            [Segment(image), Segment("How many discs are there?"), Segment("one", True)],
            [Segment(image), Segment("Make it blue."), Segment(self.picture(index, 60), True)],
            [Segment("a pale disc"), drawn],
        ][index % 4]

    def texts(self) -> list[str]:
        return [s.content for i in range(4) for s in self.example(i) if not s.is_image]


class Few(World):
    """The same with a length."""

    def __len__(self):
        return 4


def make_config(name: str, **changes) -> train.TrainConfig:
    preset = train.PRESETS["nano"][name] | {"quantise_from": 0}
    return train.TrainConfig(**(preset | FAST | changes))


def run_stage(name, out, init=None, dataset=None, **changes):
    """Train one stage in a folder -> the folder."""
    out.mkdir(exist_ok=True)
    checkpoint.write_json(out / "run.json", {})
    start = checkpoint.open_checkpoint(init) if init else None
    config, dataset = make_config(name, **changes), dataset or World()
    train.train(name, config, dataset, World(7), out, start, {"data": {}})
    return out


def make_stage(name, init=None, dataset=None, **changes) -> train.Stage:
    start = checkpoint.open_checkpoint(init) if init else None
    config = make_config(name, device="cpu", **changes)
    return train.STAGES[name](config, dataset or World(), start, False)


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state(run) -> dict:
    return torch.load(train.newest_save(run) / "state.pt", weights_only=True)


def same(a, b) -> bool:
    """Whether two saved states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def road(tmp_path_factory, small_presets):
    """Two steps of each stage, one after the other -> the folder before each stage."""
    root, inits, init = tmp_path_factory.mktemp("road"), {}, None
    for name in train.STAGES:
        inits[name], init = init, run_stage(name, root / name, init)
    return inits | {"end": init}


@pytest.fixture
def every_stage(monkeypatch):
    """Every stage that training makes, as it goes."""
    made = []
    for name, make in train.STAGES.items():
        keep = lambda *a, make=make: made.append(make(*a)) or made[-1]
        monkeypatch.setitem(train.STAGES, name, keep)
    return made


@pytest.fixture
def at_step(monkeypatch):
    """at_step(action): action(optimizer) is called before each step of the optimiser."""

    def set_action(action):
        step = train.Muon.step
        monkeypatch.setattr(train.Muon, "step", lambda self: (action(self), step(self)))

    return set_action


# --- Every stage learns ---

LEFT = {"vae": 0.6, "decoder": 0.8, "chameleon": 0.5, "base": 0.9, "posttrain": 0.6}


@pytest.mark.parametrize("name", train.STAGES)
def test_sixty_steps_on_one_batch_bring_the_loss_down(road, tmp_path, name):
    changes = dict(steps=60, batch_size=4, lr=3e-3, guidance_dropout=0.0, revive_every=10**6,
                   log_every=10)  # fmt: skip
    if name in ("vae", "decoder"):
        changes |= dict(lr=1e-2, optimizer="muon" if name == "vae" else "adamw")
    run = run_stage(name, tmp_path / "run", road[name], Few(), **changes)
    first, last = lines(run)[0]["loss"], lines(run)[-1]["loss"]
    assert last < LEFT[name] * first


# --- What a step is ---


def test_what_is_differentiated_is_the_papers_loss_with_the_runs_own_lambda(
    road, tmp_path, every_stage, at_step
):
    seen = {}

    def keep(optimizer):
        seen.update({n: p.grad.clone() for n, p in every_stage[0].model.named_parameters()})

    at_step(keep)
    options = dict(image_loss_weight=7.0, input_noise=0.0, steps=1, grad_clip=1e9, seed=3)
    run_stage("posttrain", tmp_path / "run", road["posttrain"], **options)
    model = Orthus.from_pretrained(road["posttrain"])
    batch = make_stage("posttrain", road["posttrain"], **options).batch(World(), 0)[0]
    with torch.no_grad():
        encoded = VQVAE.from_pretrained(road["posttrain"]).encode(batch.images).flatten(0, 1)
    hidden, labels = model(batch.tokens, encoded)[:, :-1], batch.labels[:, 1:]
    drawn = labels == model.config.image_id
    text = (labels != -100) & ~drawn
    wanted = batch.labels[batch.tokens == model.config.image_id] == model.config.image_id
    generator = torch.Generator().manual_seed(train.noise_seed(3, 0, 0))
    torch.randn(encoded.shape, generator=generator)  # of the input noise, here times zero
    image = model.image_head.loss(hidden[drawn], encoded[wanted], generator=generator)
    (F.cross_entropy(model.lm_head(hidden[text]), labels[text]) + 7.0 * image).backward()
    for name, p in model.named_parameters():
        close(seen[name], torch.zeros_like(p) if p.grad is None else p.grad, 1e-5, 1e-3)


def test_noise_depends_on_seed_step_and_micro_batch():
    numbers = itertools.product(range(3), range(3), range(3))
    drawn = {torch.randn(1, generator=torch.Generator().manual_seed(train.noise_seed(*n))).item()
             for n in numbers}  # fmt: skip
    assert len(drawn) == 27


def test_the_learning_rate_warms_up_and_follows_a_cosine(road, tmp_path, at_step):
    rates = []
    at_step(lambda optimizer: rates.append({g["lr"] for g in optimizer.param_groups}))
    run = run_stage("decoder", tmp_path / "run", road["decoder"], steps=8, lr=1e-3, warmup=0.25)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [len(r) for r in rates] == [1] * 8
    assert [r.pop() for r in rates] == pytest.approx([1e-3 * x for x in (0.5, 1.0, *cosine)])
    assert [d["lr"] for d in lines(run)] == pytest.approx([1e-3 * x for x in (0.5, 1, *cosine)])


def test_gradients_are_clipped_and_their_own_norm_is_logged(road, tmp_path, at_step):
    norms = []

    def keep(optimizer):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    at_step(keep)
    run = run_stage("posttrain", tmp_path / "run", road["posttrain"], grad_clip=1e-3)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)
    assert all(d["grad_norm"] > 1e-2 for d in lines(run))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_autocast_is_on_in_bf16_alone(road, tmp_path, monkeypatch, dtype):
    seen, loss = [], Orthus.loss
    look = lambda: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    monkeypatch.setattr(Orthus, "loss", lambda *a: seen.append(look()) or loss(*a))
    run_stage("posttrain", tmp_path / "run", road["posttrain"], dtype=dtype, steps=1)
    assert set(seen) == {torch.bfloat16 if dtype == "bfloat16" else False}
    assert state(tmp_path / "run")["weights"]["norm.weight"].dtype == torch.float32


def test_muon_is_pytorchs():
    torch.manual_seed(0)
    begin = torch.randn(24, 40)
    own, theirs = (torch.nn.Parameter(begin.clone()) for _ in range(2))
    options = dict(lr=0.02, weight_decay=0.1)
    ours = optim.Muon([{"params": [own], "orthogonal": True}], torch.bfloat16, **options)
    peer = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        own.grad = torch.randn(24, 40)
        theirs.grad = own.grad.clone()
        ours.step()
        peer.step()
    moved = (theirs - begin).norm()
    assert (own - theirs).norm() < 0.02 * moved
    exact = torch.nn.Parameter(begin.clone())
    exact.grad = theirs.grad
    group = {"params": [exact], "orthogonal": True}
    optim.Muon([group], torch.float32, lr=1.0, weight_decay=0.0).step()
    update = (begin - exact.detach()) / (0.2 * math.sqrt(40))
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("name", train.STAGES)
def test_muon_is_for_inner_matrices_alone(road, name):
    outer = ("embed_tokens", "codebook", "embedding", "lm_head", "final_layer.linear",
             "encoder.conv_in", "decoder.conv_out")  # fmt: skip
    for kind in ("muon", "adamw"):
        stage = make_stage(name, road[name], optimizer=kind)
        config = make_config(name, optimizer=kind)
        optimizer = train.make_optimizer(stage.model, config, torch.float32)
        learns = train.trained(stage.model)
        for p in learns.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        ours = {n for n, p in learns.items() if "momentum" in optimizer.state[p]}
        inner = {n for n, p in learns.items()
                 if p.ndim > 1 and "norm" not in n and not any(o in n for o in outer)}
        assert ours == (inner if kind == "muon" else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_orthogonalise_works_in_the_dtype_that_it_gets(shape, dtype):
    torch.manual_seed(1)
    update = optim.orthogonalise(torch.randn(shape).to(dtype))
    values = torch.linalg.svdvals(update.float())
    assert update.dtype == dtype and update.shape == shape
    assert 0.6 < values.min() and values.max() < 1.3


def test_what_is_saved_is_the_running_average(road, tmp_path, monkeypatch, every_stage):
    weights, step = [], train.Muon.step

    def keep(self):
        step(self)
        weights.append({n: p.detach().clone() for n, p in every_stage[0].model.named_parameters()})

    monkeypatch.setattr(train.Muon, "step", keep)
    run = run_stage("posttrain", tmp_path / "run", road["posttrain"], steps=6, ema=0.3, lr=1e-2)
    average = dict(Orthus.from_pretrained(road["posttrain"]).named_parameters())
    for i, now in enumerate(weights):
        decay = min(0.3, (1 + i) / (10 + i))
        average = {n: decay * average[n].detach() + (1 - decay) * now[n] for n in now}
    saved = checkpoint.open_checkpoint(run).tensors("model")
    assert saved.keys() == average.keys()
    raw = state(run)["weights"]
    for n in average:
        close(saved[n], average[n], 1e-6)
        assert torch.equal(raw[n], weights[-1][n])
    assert max((saved[n] - weights[-1][n]).abs().max() for n in average) > 1e-4


# --- Noise ---


def test_input_noise_is_on_what_is_read_of_output_images_alone(road):
    stage = make_stage("posttrain", road["posttrain"], input_noise=0.5)
    batch, seen = stage.batch(World(), 0)[0], {}
    clean = stage.vae.encode(batch.images).flatten(0, 1)

    def look(tokens, latents, labels, generator, targets, shares, levels):
        seen.update(read=latents, targets=targets)
        return Orthus.loss(stage.model, tokens, latents, labels, generator, targets, shares, levels)

    stage.model.loss = look
    stage.losses(batch, 0, torch.Generator().manual_seed(0))
    drawn = batch.labels[batch.tokens == stage.model.config.image_id] != -100
    noise = (seen["read"] - clean) / clean.std()
    assert 0.45 < noise[drawn].std() < 0.55 and drawn.any()
    assert noise[~drawn].abs().max() < 1e-4 and not drawn.all()
    close(seen["targets"], clean)


@pytest.mark.parametrize("name", ["vae", "decoder"])
def test_what_the_decoder_reads_is_noisy(road, monkeypatch, name):
    stage = make_stage(name, road[name], latent_noise=0.4, quantise_from=100)
    batch, seen = stage.batch(World(), 0)[0], []
    clean, decode = stage.model.encode(batch[0]), stage.model.decode
    monkeypatch.setattr(stage.model, "decode", lambda z: seen.append(z) or decode(z))
    stage.losses(batch, 0, torch.Generator().manual_seed(0))
    noise = (seen[0] - clean) / clean.std()
    assert 0.36 < noise.std() < 0.44


# --- The autoencoder's losses ---


def test_a_wrong_pixel_counts_as_pixel_as_detail_and_as_edges():
    """It stands at the left border: one neighbour beside it, two above and below."""
    target, detail = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    images = target.clone()
    images[..., 1, 0], detail[..., 1, :2] = 0.5, 1
    plain, small, edges = 0.25 / 16 + 0.1 * 0.5 / 16, 0.25 / 2, 0.25 * (1 / 12 + 2 / 12)
    loss = stages.reconstruction_loss(images, target, detail, 7.0, 11.0)
    assert loss.item() == pytest.approx(plain + 7 * small + 11 * edges)


def test_anisotropy_is_zero_of_a_cross_and_one_of_a_line():
    line = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]) + 5  # wherever they are
    assert stages.anisotropy(line).item() == pytest.approx(1, abs=1e-5)
    cross = torch.cat([line, line.flip(2)], 1)
    assert stages.anisotropy(cross).item() == pytest.approx(0, abs=1e-5)


def test_a_tuned_autoencoders_loss_is_the_one_written_out(road):
    """Two of eight pictures go through the codes from the first step on; latents where there is no
    detail stay what they were."""
    options = dict(quantised_share=0.25, quantise_from=100, latent_noise=0.0)
    stage, config = make_stage("vae", road["end"], **options), make_config("vae", **options)
    model, (images, detail) = stage.model, stage.batch(World(), 0)[0]
    with torch.no_grad():
        model.encoder.conv_in.weight.mul_(1.1)
    loss = stage.losses((images, detail), 0, torch.Generator())["loss"]
    z, z_before = model.encode(images), stage.before.encode(images)
    q, plain = model.lookup(model.quantize(z)), detail.amax((1, 2, 3)) == 0
    again = model.decode(torch.cat([z[:2] + (q - z)[:2].detach(), z[2:]]))
    weights = config.detail_weight, config.edge_weight
    errors = (stages.reconstruction_loss(again[half], images[half], detail[half], *weights)
              for half in (slice(2), slice(2, 8)))  # fmt: skip
    moved = ((z - z_before).square() * plain[:, None, None]).mean() / z_before.var()
    total = sum(x * e for x, e in zip((0.25, 0.75), errors, strict=True)) + moved
    total = total + F.mse_loss(q, z.detach()) + config.commitment * F.mse_loss(z, q.detach())
    total = total + config.isotropy * stages.anisotropy(z)
    learns = [p for p in model.parameters() if p.requires_grad]
    grads, wanted = (torch.autograd.grad(x, learns, allow_unused=True) for x in (loss, total))
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    for a, b in zip(grads, wanted, strict=True):
        close(a, b, 1e-4, 1e-3)


def test_the_decoders_stage_trains_what_decodes_alone(road):
    names = train.trained(make_stage("decoder", road["decoder"]).model)
    assert {n.split(".")[0] for n in names} == {"decoder", "post_quant_conv"}


# --- Codes ---


def test_codes_begin_at_their_step():
    stage = make_stage("vae", quantise_from=3)
    (batch,) = stage.batch(World(), 0)
    parts = [stage.losses(batch, step, torch.Generator()).keys() for step in (2, 3)]
    assert ["quantised" in names for names in parts] == [False, True]


def test_revived_codes_start_anew_in_moments_and_average():
    options = dict(steps=10, quantise_from=1, revive_every=4, revive_until=0.5, batch_size=16)
    world, asked = World(), []
    world.example = lambda i: asked.append(i) or World().example(i)
    stage = make_stage("vae", dataset=world, **options)
    optimizer = train.make_optimizer(stage.model, make_config("vae", **options), torch.float32)
    average = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
    book = stage.model.quantize.embedding.weight

    def set_moments() -> list:
        stage.losses(stage.batch(World(), 0)[0], 5, torch.Generator())["loss"].backward()
        optimizer.step()
        moments = [m for k, m in optimizer.state[book].items() if k != "step"]
        for moment in moments:
            moment.fill_(1)
        return moments

    set_moments()
    for step in range(10):
        moments, before = set_moments(), book.detach().clone()
        stage.after_step(step, optimizer.state, average)
        changed = (book != before).any(1)
        assert bool(changed.any()) == (step in (0, 3))  # all of them, then dead ones
        assert len(moments) == 2
        for moment in moments:
            assert (moment[changed] == 0).all() and (moment[~changed] == 1).all()
        assert torch.equal(average["quantize.embedding.weight"][changed], book[changed])
        assert step != 0 or changed.all()
        assert step != 3 or not changed.all()
    assert min(asked) >= 10**9  # pictures that training never shows


# --- Initial values ---


def test_initial_values_are_those_of_the_paper(road):
    torch.manual_seed(0)
    model = Orthus(orthus.OrthusConfig.preset("nano", hidden_size=128, num_hidden_layers=8))
    for layer in model.layers:
        for p in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert p.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
        assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    codes = make_stage("chameleon", road["chameleon"]).model.vision_embedding.codebook.weight
    before = checkpoint.open_checkpoint(road["chameleon"]).tensors("vae")
    assert torch.equal(codes, before["quantize.embedding.weight"])
    head = make_stage("base", road["base"]).model.image_head
    for linear in (head.cond_embed, head.input_proj, head.res_blocks[0].mlp[0]):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.9 * bound < linear.weight.abs().max() <= bound


# --- The log ---


def test_what_a_line_says_of_time_is_of_training_alone(road, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    for owner, name, seconds in ((train, "update_average", 1), (train, "save", 100),
                                 (train.Validation, "losses", 100)):  # fmt: skip
        own = getattr(owner, name)

        def slow(*args, own=own, seconds=seconds):
            now[0] += seconds
            return own(*args)

        monkeypatch.setattr(owner, name, slow)
    run = run_stage("posttrain", tmp_path / "run", road["posttrain"], steps=4, validate_every=2)
    assert [d["examples_per_second"] for d in lines(run)] == [FAST["batch_size"]] * len(lines(run))


def test_a_line_is_the_mean_over_its_steps(road, tmp_path):
    each, mean = (run_stage("posttrain", tmp_path / str(n), road["posttrain"], steps=4, log_every=n)
                  for n in (1, 4))  # fmt: skip
    assert len(lines(each)) == 4 and len(lines(mean)) == 1
    for key in ("loss", "text", "image", "grad_norm", "codes_mixed"):
        values = [d[key] for d in lines(each)]
        assert lines(mean)[0][key] == pytest.approx(sum(values) / 4, rel=1e-4)
    last = lines(mean)[0]
    assert 0 < last["waiting"] < 1
    assert last["tokens_per_second"] > 10 * last["examples_per_second"] > 0
    quarters = [last[f"held_out_image_t{low}"] for low in (0, 250, 500, 750)]
    assert len(set(quarters)) == 4
    weight = train.PRESETS["nano"]["posttrain"]["image_loss_weight"]
    whole = last["held_out_text"] + weight * last["held_out_image"]
    assert last["held_out_loss"] == pytest.approx(whole, rel=1e-4) and whole > 0


def test_held_out_losses_are_sums_over_micro_batches_late_in_a_run(road):
    stage, asked = make_stage("posttrain", road["posttrain"], micro_batches=2), []

    def losses(micro, step, generator, levels=None):
        asked.append((step, levels))
        return {"loss": torch.tensor(2.0), "image": torch.tensor(1.0)}

    stage.losses = losses
    config = make_config("posttrain", device="cpu")
    found = train.Validation(stage, config, World(7)).losses(contextlib.nullcontext())
    quarters = [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert asked == [(10**9, levels) for levels in (None, *quarters) for _ in range(2)]
    assert found == {"held_out_loss": 4, "held_out_image": 2} | {
        f"held_out_image_t{low}": 2 for low, _ in quarters}  # fmt: skip


def test_pictures_are_drawn_by_the_average_and_leave_the_weights(road, tmp_path, monkeypatch):
    stage, seen, heights = make_stage("posttrain", road["posttrain"]), [], []

    def draw(pipeline, requests, **options):
        seen.append(pipeline.model.norm.weight.clone())
        return [sample.Answer([Segment(disc(0, (9, 9, 9)), True)]) for _ in requests]

    monkeypatch.setattr(train, "generate", draw)
    validation = train.Validation(stage, make_config("posttrain", device="cpu"), World(7))
    weight = stage.model.norm.weight.clone()
    average = {n: p.detach() + 1 for n, p in train.trained(stage.model).items()}
    for number in (0, 1, 1, 0):  # a resumed run draws a row again, and drops those after it
        validation.pictures(average, tmp_path / "a.png", 5, number, contextlib.nullcontext())
        heights.append(Image.open(tmp_path / "a.png").height)
    assert torch.equal(seen[1], weight + 1) and torch.equal(stage.model.norm.weight, weight)
    assert [height / heights[0] for height in heights] == [1, 2, 2, 1]


def test_pictures_grow_by_a_row(road, tmp_path):
    heights = []
    for steps in (1, 2):
        run = run_stage("posttrain", tmp_path / str(steps), road["posttrain"], steps=steps,
                        validate_every=1, pictures_every=1)  # fmt: skip
        heights.append(Image.open(run / "samples.png").height)
    assert heights[1] == 2 * heights[0]


def test_where_nothing_is_to_be_drawn_there_is_no_row(road, tmp_path, monkeypatch):
    example = World.example
    monkeypatch.setattr(World, "example", lambda self, i: example(self, 4 * i + 1))  # questions
    run = run_stage("posttrain", tmp_path / "run", road["posttrain"], steps=1, validate_every=1,
                    pictures_every=1)  # fmt: skip
    assert not (run / "samples.png").exists()


# --- Batches ---


def test_two_micro_batches_are_one(road, tmp_path):
    runs = [run_stage("chameleon", tmp_path / str(n), road["chameleon"], micro_batches=n,
                      optimizer="adamw", weight_decay=0.0) for n in (1, 2)]  # fmt: skip
    one, two = map(lines, runs)
    for key in ("loss", "text", "image", "grad_norm"):
        assert [d[key] for d in one] == pytest.approx([d[key] for d in two], rel=1e-4)
    for n, p in state(runs[0])["average"].items():
        close(state(runs[1])["average"][n], p, 2e-4)


def test_micro_batches_hold_examples_of_like_length(road):
    stage = make_stage("posttrain", road["posttrain"], batch_size=16, micro_batches=4)
    parts = [(b.tokens != 1).sum(1) for b in stage.batch(World(), 0)]  # without padding
    assert len(parts) == 4 and parts[0].max() < parts[3].min()
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(parts))


def test_data_depend_on_seed_and_step_alone(road, tmp_path):
    runs = [run_stage("posttrain", tmp_path / str(n), road["posttrain"], workers=n) for n in (0, 2)]
    assert same(*map(state, runs))
    stage = make_stage("posttrain", road["posttrain"], guidance_dropout=0.5)
    a, b, other = (stage.batch(World(), step)[0] for step in (3, 3, 4))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)
    assert not torch.equal(a.images, other.images)
    assert not torch.equal(a.tokens, other.tokens)  # World's texts are the same: others are dropped
    stage = make_stage("posttrain", road["posttrain"], guidance_dropout=0.5, seed=8)
    assert not torch.equal(a.tokens, stage.batch(World(), 3)[0].tokens)


def test_each_epoch_takes_every_example_once_in_an_order_of_its_own():
    class Ten:
        __len__, example = lambda self: 10, lambda self, index: index

    seen = [i for step in range(10) for i in stages.examples(Ten(), step, 3)]
    epochs = seen[:10], seen[10:20], seen[20:]
    assert epochs[0] == list(range(10)) == sorted(epochs[1]) == sorted(epochs[2])
    assert len(set(map(tuple, epochs))) == 3


def test_worlds_begin_at_their_shares_of_the_steps_and_held_out_scenes_are_others():
    worlds = [[0.0, {"tasks": {"image": 1.0}}], [0.5, {"tasks": {"story": 1.0}}]]
    trained, held_out, about = train.open_data(make_config("vae", steps=8), worlds, None)
    assert [len(trained.example(i)) for i in range(64)] == [1] * 32 + [8] * 32
    assert all(trained.example(i) != held_out.example(i) for i in range(64))
    assert about == worlds[1][1]


def test_a_share_of_prompts_is_dropped_for_guidance(road):
    def dropped(share: float, name: str = "posttrain") -> tuple[float, float]:
        """Of what draws, and of edits, to which the half keep their image."""
        start = checkpoint.open_checkpoint(road[name])
        start.config["generation"]["unconditional"] = "Make a disc."
        stage = make_stage(name, start, guidance_dropout=share, batch_size=400)
        (batch,) = stage.batch(World(), 0)
        own = stage.model.config
        words = data.Tokenizer(stage.tokenizer, own)
        texts = [words.decode(row.tolist()) for row in batch.tokens]
        plain = sum("Make a disc." in text for text in texts)
        alone = sum(not text.strip() for text in texts)  # an edit without its instruction
        return (plain + alone) / 300, alone / 100  # a fourth of the examples draws nothing

    assert dropped(0.0) == dropped(1.0, "base") == (0, 0)  # stage 1 has no text to lose
    assert 0.2 < dropped(0.3)[0] < 0.4
    every, edits = dropped(1.0)
    assert every == 1 and 0.4 < edits < 0.6


def test_texts_alone_can_be_trained_on(road):
    world = World()
    world.example = lambda index: [Segment("How many discs are there?"), Segment("one", True)]
    stage = make_stage("posttrain", road["posttrain"])
    losses = stage.losses(stage.batch(world, 0)[0], 0, torch.Generator())
    assert losses["text"] > 0 and losses["image"] == losses["codes_mixed"] == 0


def test_mixed_codes_weigh_as_the_output_images_do(road):
    stage = make_stage("posttrain", road["posttrain"], micro_batches=2)
    for part in stage.batch(World(), 0):
        alone = dataclasses.replace(part, shares=(1.0, 1.0))
        own, whole = (stage.losses(p, 0, torch.Generator())["codes_mixed"] for p in (part, alone))
        assert own == pytest.approx(part.shares[1] * whole.item()) and whole > 1


# --- Every field of TrainConfig changes what a run does ---

# field: stage, its value, other fields of both runs
FIELDS = {
    "seed": ("vae", 5, {}), "steps": ("vae", 3, {}), "batch_size": ("vae", 4, {}),
    "micro_batches": ("posttrain", 2, {}), "lr": ("vae", 1e-4, {}),
    "warmup": ("vae", 1.0, {}), "optimizer": ("vae", "adamw", {}),
    "betas": ("decoder", (0.5, 0.9), dict(steps=3)), "weight_decay": ("vae", 1.0, {}),
    "grad_clip": ("vae", 1e-5, {}), "ema": ("decoder", 0.0, {}),
    "quantise_from": ("vae", 1, {}), "quantised_share": ("vae", 0.5, {}),
    "revive_every": ("vae", 1, dict(revive_until=1.0)),
    "revive_until": ("vae", 1.0, dict(revive_every=1, revive_until=0.0)),
    "commitment": ("vae", 10.0, {}), "detail_weight": ("vae", 5.0, {}),
    "latent_noise": ("decoder", 0.0, {}), "isotropy": ("vae", 1.0, {}),
    "edge_weight": ("vae", 1.0, {}),
    "image_loss_weight": ("posttrain", 50.0, {}), "vision_embedding": ("base", "linear", {}),
    "image_head": ("base", "mse", {}), "tau": ("base", 77.0, {}),
    "mixed_codes": ("base", 3.0, {}),
    "prediction": ("base", "epsilon", dict(zero_terminal_snr=False)),
    "zero_terminal_snr": ("base", False, {}), "diffusion_batch_multiplier": ("base", 1, {}),
    "input_noise": ("posttrain", 0.0, {}), "guidance_dropout": ("posttrain", 1.0, {}),
    "cache_latents": ("posttrain", 3, {}), "dtype": ("decoder", "bfloat16", {}),
    "lora_rank": ("posttrain", 2, {}), "lora_scale": ("posttrain", 9.0, dict(lora_rank=2)),
    "lora_targets": ("posttrain", ("q_proj",), dict(lora_rank=2)),
    "log_every": ("decoder", 2, {}), "save_every": ("decoder", 1, {}),
    "validate_every": ("decoder", 1, {}),
    "pictures_every": ("posttrain", 2, dict(validate_every=1)),
}  # fmt: skip
ELSEWHERE = {"preset", "device", "threads", "workers", "compile", "tensorboard",
             "checkpoint_activations", "data", "format", "images", "strict"}


def traces(run) -> tuple:
    """All that a run leaves but for its times."""
    timed = ("examples_per_second", "tokens_per_second", "waiting")
    log = [{k: v for k, v in d.items() if k not in timed} for d in lines(run)]
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*"))
    return files, log, state(run)


@pytest.fixture(scope="module")
def known_traces():
    return {}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_shows_in_what_a_run_leaves(road, tmp_path, known_traces, monkeypatch, name):
    stage, value, more = FIELDS[name]
    validates = name == "validate_every"
    key = stage, str(more), validates
    if not validates:  # half of the time
        monkeypatch.setattr(train.Validation, "losses", lambda *a: {})
    if key not in known_traces:
        known_traces[key] = traces(run_stage(stage, tmp_path / "plain", road[stage], **more))
    other = run_stage(stage, tmp_path / "other", road[stage], **(more | {name: value}))
    assert not same(known_traces[key], traces(other))


def test_no_field_is_forgotten():
    assert FIELDS.keys() | ELSEWHERE == {f.name for f in dataclasses.fields(train.TrainConfig)}


def test_equal_fields_leave_equal_traces(road, tmp_path):
    a, b = (traces(run_stage("vae", tmp_path / str(i))) for i in range(2))
    assert same(a, b)


def test_the_machine_is_as_asked(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(optim, "has_fast_bf16", lambda device, fast=fast: fast)
        monkeypatch.setattr("os.cpu_count", lambda fast=fast: 4 if fast else 2)
        config = make_config("vae", device="cpu", dtype="auto", threads=3)
        assert optim.choose_machine(config) == (torch.device("cpu"), dtype)
        assert torch.backends.cuda.flash_sdp_enabled() != fast  # PyTorch's own is slow in bf16
    assert threads == [3, 2]
    config = make_config("vae", device="no-such")
    assert "no-such" in complaint(lambda: optim.choose_machine(config))


# --- Base ---


def test_base_moves_the_way_in_and_the_head_alone(road, tmp_path):
    before = checkpoint.open_checkpoint(road["base"]).tensors("model")
    after = state(run_stage("base", tmp_path / "run", road["base"], steps=6))["weights"]
    config = orthus.OrthusConfig.preset("nano")
    codes = range(config.image_code_start, config.image_code_start + config.num_codes)
    for name in before:
        moved = (before[name] != after[name]).flatten(1).any(1) if before[name].ndim > 1 else None
        if name == "embed_tokens.weight":
            assert moved[codes.start : codes.stop].any()
            assert not moved[: codes.start].any() and not moved[codes.stop :].any()
        elif name != "vision_embedding.codebook.weight":
            assert torch.equal(before[name], after[name]), name


def test_base_makes_an_orthus_of_a_chameleon_alone(road):
    assert "is none: use posttrain" in complaint(lambda: make_stage("base", road["posttrain"]))


def test_a_stage_keeps_what_its_checkpoint_says_of_generation(road):
    before = checkpoint.open_checkpoint(road["base"]).section("generation")
    assert make_stage("base", road["base"]).config["generation"] == before
    world = World()
    world.texts = lambda: ["a zebra"]
    own, others = (make_stage("posttrain", road["posttrain"], world, data=data)
                   for data in ("own", ""))  # fmt: skip
    assert others.config["generation"] == before
    assert set(own.config["generation"]["words"]) == {*before["words"], "a", "zebra"}


def test_a_chameleon_reads_by_the_codebook_of_its_autoencoder(road):
    model = make_stage("chameleon", road["chameleon"]).model
    book = VQVAE.from_pretrained(road["chameleon"]).quantize.embedding.weight
    assert torch.equal(model.vision_embedding.codebook.weight, book)
    assert "vision_embedding.codebook.weight" not in train.trained(model)


def test_base_measures_scale_and_temperature_and_begins_at_zero(road):
    model = make_stage("base", road["base"], mixed_codes=50.0, batch_size=32).model
    images = torch.stack([data.to_tensor(World().picture(i), 32) for i in range(32)])
    with torch.no_grad():
        latents = VQVAE.from_pretrained(road["base"]).encode(images).flatten(0, 1)
        mixed = model.vision_embedding.effective_codes(latents).median().item()
        output = model.image_head(latents, torch.zeros(len(latents), dtype=torch.long),
                                  torch.randn(len(latents), 32))  # fmt: skip
    assert mixed == pytest.approx(50, rel=0.3)
    assert (latents * model.config.latent_scale).std().item() == pytest.approx(1, rel=0.1)
    assert not output.any()


@pytest.mark.parametrize("way", [dict(vision_embedding="linear"), dict(vision_embedding="argmin"),
                                 dict(image_head="mse"), dict(image_head="tokens")])  # fmt: skip
def test_every_ablation_trains_and_samples(road, tmp_path, way):
    run = run_stage("base", tmp_path / "run", road["base"], steps=1, **way)
    run = run_stage("posttrain", tmp_path / "next", run, steps=1)
    pipeline = sample.load(run)
    assert {k: getattr(pipeline.model.config, k) for k in way} == way
    request = sample.Request([Segment("a dark disc")])
    (answer,) = sample.generate(pipeline, [request], progress=False, steps=2, min_images=1)
    assert len(answer.images) >= 1


def test_a_released_chameleon_becomes_an_orthus(tmp_path, cli, monkeypatch):
    fields = released.hub_model_fields
    narrow = lambda *a: fields(*a) | {"head_width": 48}  # the release's head is not small
    monkeypatch.setattr(released, "hub_model_fields", narrow)
    hub = hub_chameleon(tmp_path / "hub")
    more = ["--preset", "7b", "--batch-size", 2, "--steps", 1, "--lr", 1e-12, "--save-every", 1]
    code, said = cli("base", *flags(tmp_path / "run", hub, *more)[1:])
    assert code == 0, said
    before, after = Orthus.from_pretrained(hub), Orthus.from_pretrained(tmp_path / "run")
    kinds = after.config.vision_embedding, after.config.image_head
    assert kinds == ("softmax", "diffusion")
    assert (after.config.tau, after.config.latent_scale) == (1.0, 0.1)  # the release's
    for name, p in before.named_parameters():
        close(after.get_parameter(name), p, 1e-6)  # but for one step at a vanishing rate
    pipeline = sample.load(tmp_path / "run")
    assert pipeline.defaults.cfg_scale == 5.0 and pipeline.defaults.image_first
    request = sample.Request([Segment("a fox")])
    (answer,) = sample.generate(pipeline, [request], progress=False, steps=2, max_tokens=20)
    assert len(answer.images) == 1


# --- Nothing is lost ---


@pytest.fixture
def cli(road, capsys, monkeypatch):
    """Run train.py's command line -> exit code and what it wrote on stderr."""

    def run(*args) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        code = 0
        try:
            train.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().err

    return run


def flags(run, init, *more) -> list:
    fast = FAST | dict(steps=6, save_every=2)
    pairs = [(f"--{k.replace('_', '-')}", v) for k, v in fast.items()]
    return ["decoder", "--out", run, "--init", init, *itertools.chain(*pairs), *more]


def resume(run, *more) -> list:
    return ["decoder", "--out", run, "--resume", *more]


def in_child(args, until) -> None:
    """Start training, slowed down, in a process of its own, and kill it when until() holds."""

    def body():
        update = train.update_average
        train.update_average = lambda *a: (time.sleep(0.05), update(*a))
        sys.argv = ["train.py", *map(str, args)]
        train.main()

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    limit = time.time() + 20
    while not until() and child.is_alive() and time.time() < limit:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_a_run_goes_on_from_kills_at_random_moments_to_the_bit(road, tmp_path, cli):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*flags(whole, road["decoder"]))[0] == 0
    in_child(flags(parts, road["decoder"]), (parts / "run.json").is_file)  # before the first save
    rng = random.Random(time.time_ns())
    for save in ("step-00000002", "step-00000004"):
        in_child(resume(parts), (parts / save).exists)
        if train.newest_save(parts).name != "step-00000006":
            moment = time.time() + rng.uniform(0, 0.3)
            in_child(resume(parts), lambda moment=moment: time.time() > moment)
    if train.newest_save(parts).name != "step-00000006":
        code, said = cli(*resume(parts))
        assert code == 0, said
    assert same(state(whole), state(parts))
    assert [d["step"] for d in lines(parts)] == [1, 2, 3, 4, 5, 6]
    assert [d["loss"] for d in lines(parts)] == [d["loss"] for d in lines(whole)]
    assert len(list(parts.glob("step-*"))) == 2


def test_an_autoencoder_goes_on_from_the_command_line(road, tmp_path, cli):
    assert cli("vae", *flags(tmp_path / "run", road["decoder"])[1:])[0] == 0
    assert "moved" in lines(tmp_path / "run")[0]  # from what it was


def interrupt_at(monkeypatch, number: int, action) -> None:
    update, calls = train.update_average, itertools.count()

    def wrapped(*args):
        update(*args)
        if next(calls) == number:
            action()

    monkeypatch.setattr(train, "update_average", wrapped)


def press_ctrl_c():
    raise KeyboardInterrupt


def test_sigterm_saves_and_ends_well(road, tmp_path, cli, monkeypatch):
    interrupt_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli(*flags(tmp_path / "run", road["decoder"]))[0] == 0
    assert train.newest_save(tmp_path / "run").name == "step-00000003"


def test_ctrl_c_before_the_first_save_tells_the_truth(road, tmp_path, cli, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, press_ctrl_c)
        code, said = cli(*flags(run, road["decoder"]))
    assert code == 130 and "begins anew" in said
    assert [d["step"] for d in lines(run)] == [1]  # which the next run must not log twice
    assert cli(*resume(run))[0] == 0
    assert [d["step"] for d in lines(run)] == [1, 2, 3, 4, 5, 6]


def test_a_nan_stops_the_run_and_its_advice_works(road, tmp_path, cli, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        error = stages.reconstruction_loss
        calls = itertools.count()
        patch.setattr(stages, "reconstruction_loss",
                      lambda *a: error(*a) * (math.nan if next(calls) == 3 else 1))  # fmt: skip
        code, said = cli(*flags(run, road["decoder"]))
    assert code == 2 and "lower --lr" in said and "step-00000002" in said
    assert cli(*resume(run))[0] == 0
    assert all(math.isfinite(d["loss"]) for d in lines(run)) and len(lines(run)) == 6


def test_a_full_disk_keeps_the_save_before(road, tmp_path, cli, monkeypatch):
    errors = OSError(28, "No space left on device"), RuntimeError("write failed")
    for n, error in enumerate(errors):
        run, write, calls = tmp_path / str(n), torch.save, itertools.count()

        def fails(*args, write=write, calls=calls, error=error):
            if next(calls) == 1:
                raise error
            write(*args)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fails)
            code, said = cli(*flags(run, road["decoder"]))
        assert code == 2 and "cannot be written" in said
        assert [p.name for p in run.glob("step-*")] == ["step-00000002"]
        assert cli(*resume(run))[0] == 0


@pytest.fixture
def stopped(road, tmp_path, cli, monkeypatch):
    """A run with one save, of step 2."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, press_ctrl_c)
        cli(*flags(tmp_path / "stopped", road["decoder"]))
    return tmp_path / "stopped"


def test_every_process_computes_as_often(monkeypatch):
    """Three parts of a batch, after some of its examples were too long, for two processes."""
    weight, seen = torch.ones((), requires_grad=True), []
    losses = lambda part, *_: seen.append(part[0].item()) or {"loss": weight * part[0]}
    stage = types.SimpleNamespace(model=torch.nn.Linear(1, 1), losses=losses)
    batch = [(torch.tensor(x),) for x in (1.0, 2.0, 4.0)]
    config = make_config("decoder", device="cpu")
    for rank, total in ((0, 5), (1, 2)):
        for module in (train, optim):
            monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, 2))
        sums = train.accumulate(stage, config, batch, 0, contextlib.nullcontext())
        assert sums["loss"] == total
    assert seen == [1, 4, 2, 1] and weight.grad == 2 * (5 + 2)


def test_a_refused_resume_changes_nothing(cli, stopped):
    before = (stopped / "run.json").read_bytes()
    code, said = cli(*resume(stopped), "--optimizer", "muon")
    assert code == 2 and "resume with those that the run began with" in said
    assert (stopped / "run.json").read_bytes() == before
    assert cli(*resume(stopped))[0] == 0


def test_what_a_base_run_began_with_stays(tmp_path):
    about = {"stage": "base", "world": [[0, {}]], "config": {"preset": "nano"}, "init": ""}
    checkpoint.write_json(tmp_path / "run.json", about)
    again = lambda: train.settings("base", tmp_path, {"image_head": "mse"}, True)
    assert "image_head is mse" in complaint(again)


def test_a_copy_of_a_save_is_its_users(road, tmp_path):
    run = tmp_path / "run"
    (run / "step-00000001-best").mkdir(parents=True)
    run_stage("decoder", run, road["decoder"], steps=4, save_every=1)
    names = ["step-00000001-best", "step-00000003", "step-00000004"]
    assert sorted(p.name for p in run.glob("step-*")) == names
    assert train.newest_save(run).name == names[-1]


def test_a_sheet_that_cannot_go_on_ends_no_run(road, tmp_path):
    (tmp_path / "samples.png").write_text("no picture")
    run = run_stage("posttrain", tmp_path, road["posttrain"], steps=1, validate_every=1,
                    pictures_every=1)  # fmt: skip
    assert train.newest_save(run) and (run / "samples.png").read_text() == "no picture"


def test_data_that_a_stage_learns_nothing_from_are_said(road):
    ask = World()
    ask.example = lambda i: World().example(4 * i + 1)  # a question about a picture
    base = make_stage("base", road["base"])
    assert "draws no picture" in complaint(lambda: base.batch(ask, 0))
    assert sum(len(part.tokens) for part in base.batch(World(), 0)) == 6  # of 8, two are questions
    ask.example = lambda i: [Segment("a"), Segment("b", True)]
    for name in ("vae", "decoder"):
        batch = make_stage(name, road[name]).batch
        assert "no picture" in complaint(lambda batch=batch: batch(ask, 0))
    assert "letters" in complaint(lambda: data.train_tokenizer(["abcdefghijkl"], 5))


def test_resume_needs_nothing_of_where_a_run_began(road, tmp_path, cli, stopped):
    about = json.loads((stopped / "run.json").read_text())
    checkpoint.write_json(stopped / "run.json", about | {"init": str(tmp_path / "gone")})
    assert cli(*resume(stopped))[0] == 0


def test_a_damaged_save_is_named(cli, stopped):
    path = stopped / "step-00000002" / "state.pt"
    content = path.read_bytes()
    weight = next(iter(torch.load(path)["weights"].values()))
    middle = content.index(bytes(weight.untyped_storage())) + weight.nbytes // 2

    def refused(word: str) -> None:
        code, said = cli(*resume(stopped))
        error = said.splitlines()[-1]
        assert code == 2 and word in error and "Traceback" not in said

    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    refused("checksum")
    for wrong in ([1], {"step": 2}, {"step": 2, "weights": {}, "average": {}, "optimizer": []}):
        torch.save(wrong, path)
        refused("state.pt")
    for content in (b"no archive", b""):
        path.write_bytes(content)
        refused("state.pt")
    path.unlink()
    refused("cannot be resumed")


def test_one_training_a_folder(cli, stopped):
    with checkpoint.lock(stopped):
        code, said = cli(*resume(stopped))
    assert code == 2 and "in use" in said


def test_a_folder_that_holds_anything_else_is_refused_at_once(road, tmp_path, cli, stopped):
    assert "holds a run already" in cli(*flags(stopped, road["decoder"]))[1]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    code, said = cli(*flags(tmp_path / "foreign", road["decoder"]))
    assert code == 2 and "config.json" in said
    for broken in ("{", "[]", '{"stage": "decoder"}', '{"stage": "decoder", "world": 3}',
                   '{"stage": "decoder", "world": [], "config": {"lr": "x"}, "init": ""}',
                   '{"stage": "decoder", "world": [], "config": {"preset": "nano"}, "init": ""}',
                   '{"stage": "decoder", "world": [1], "config": {}, "init": ""}'):
        (stopped / "run.json").write_text(broken)
        code, said = cli(*resume(stopped))
        assert code == 2 and len(said.splitlines()) == 1, broken
    assert cli(*resume(tmp_path / "nothing"))[0] == 2


BAD = {
    "--ema nan": "nan", "--warmup -1": "-1", "--input-noise nan": "nan", "--lr inf": "inf",
    "--guidance-dropout 2": "2", "--image-loss-weight -5": "-5", "--threads 1000000000": "10000",
    "--steps 0": "0", "--tasks flying=1": "flying", "--tasks image=x": "image=x",
    "--dtype int8": "int8", "--betas 0.9 2": "2", "--micro-batches 9": "9", "--seed -1": "-1",
    "--max-objects 9": "9", "--digits nan": "nan", "--preset huge": "huge",
}  # fmt: skip


@pytest.mark.parametrize("name", train.STAGES)
def test_settings_that_a_stage_does_not_read_are_refused(name):
    ask = lambda field: complaint(lambda: train.settings(name, None, {field: "x"}, False))
    for field, readers in train.READ_BY.items():
        assert ("does not read it" in ask(field)) == (name not in readers), field
    others = dict(vae="tau input_noise", decoder="isotropy compile", chameleon="latent_noise tau",
                  base="guidance_dropout lora_rank", posttrain="mixed_codes edge_weight")
    assert all("does not read it" in ask(field) for field in others[name].split())


@pytest.mark.parametrize("bad", BAD)
def test_bad_values_are_named_in_one_line(road, tmp_path, cli, bad):
    code, said = cli(*flags(tmp_path / "run", road["decoder"], *bad.split()))
    assert code == 2 and len(said.splitlines()) == 1 and BAD[bad] in said
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_be_are_named(road, tmp_path, cli, monkeypatch):
    monkeypatch.setitem(orthus.PRESETS, "tiny", orthus.PRESETS["nano"] | dict(hidden_size=96))
    cases = {
        "--out is empty": flags("", road["decoder"]),
        "nowhere": flags(tmp_path / "run", tmp_path / "nowhere"),
        "--init": ["decoder", "--out", tmp_path / "run"],
        "is a file": flags(__file__, road["decoder"]),
        "preset nano": flags(tmp_path / "run", road["decoder"], "--preset", "7b"),
        "3 worlds": ["posttrain", "--out", tmp_path / "run", "--init", road["posttrain"],
                     "--cache-latents", "8"],
    }
    for word, args in cases.items():
        code, said = cli(*args)
        assert code == 2 and word in said and len(said.splitlines()) == 1
        assert not (tmp_path / "run").exists()


# --- Encoding ahead ---


def test_latents_encoded_ahead_give_the_same_losses(road, tmp_path):
    options = dict(guidance_dropout=0.0, steps=3)
    plain, ahead = (run_stage("posttrain", tmp_path / str(n), road["posttrain"], cache_latents=n,
                              **options) for n in (0, 24))  # fmt: skip
    few = run_stage("posttrain", tmp_path / "few", road["posttrain"], Few(), **options)
    assert not (plain / "encoded").exists() and (few / "encoded").exists()
    losses, losses_ahead = ([d["loss"] for d in lines(run)] for run in (plain, ahead))
    assert losses == pytest.approx(losses_ahead, rel=1e-3)


def test_encoding_ahead_goes_on_where_it_was_interrupted(road, tmp_path):
    autoencoder = VQVAE.from_pretrained(road["posttrain"])
    whole = train.Encoded(World(), 150, autoencoder, tmp_path / "whole", {})

    class Breaks(World):
        def example(self, index):
            if index == 100:
                raise KeyboardInterrupt
            return super().example(index)

    with pytest.raises(KeyboardInterrupt):
        train.Encoded(Breaks(), 150, autoencoder, tmp_path / "parts", {})
    asked, world = [], World()
    example, world.example = world.example, lambda i: asked.append(i) or example(i)
    parts = train.Encoded(world, 150, autoencoder, tmp_path / "parts", {})
    assert min(asked) == 64 and len(parts) == 150
    pairs = [p for i in range(150) for p in zip(whole.example(i), parts.example(i), strict=True)]
    assert all(torch.equal(a.content, b.content) if a.is_image else a == b for a, b in pairs)


def test_latents_of_other_data_are_encoded_anew(road, tmp_path):
    autoencoder = VQVAE.from_pretrained(road["posttrain"])
    old, new, again = (train.Encoded(World(seed), 1, autoencoder, tmp_path, {"seed": seed})[0][1]
                       for seed in (0, 1, 1))  # fmt: skip
    assert torch.equal(new.content, again.content) and not torch.equal(new.content, old.content)


# --- Other commands ---


def test_curves_are_drawn_or_the_missing_package_is_named(road, tmp_path, cli, monkeypatch):
    pytest.importorskip("matplotlib")
    args = ["curves", road["posttrain"], road["end"], "--out", tmp_path / "curves.png"]
    assert cli(*args)[0] == 0
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert "no log.jsonl" in cli("curves", tmp_path, "--out", tmp_path / "x.png")[1]
    log = road["end"] / "log.jsonl"
    assert cli("curves", road["end"], "--out", log)[0] == 2 and lines(road["end"])
    for text in ("[1, 2]", "{}", "no"):
        (tmp_path / "log.jsonl").write_text(text)
        code, said = cli("curves", tmp_path, "--out", tmp_path / "x.png")
        assert code == 2 and "log.jsonl line 1" in said
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = cli(*args)
    assert code == 2 and said.count("\n") == 1 and "pip install matplotlib" in said


def test_tensorboard_is_asked_for(road, tmp_path, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, said = cli(*flags(tmp_path / "run", road["decoder"], "--tensorboard"))
    assert code == 2 and "pip install tensorboard" in said


def test_the_whole_road_goes_on_where_it_stopped(tmp_path, cli, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "report", lambda *a: "a table")
    out, begun, begin = tmp_path / "all", [], train.start_run

    def follow(name, *args):
        begun.append(name)
        if begun == ["vae", "decoder"]:
            raise KeyboardInterrupt
        begin(name, *args)

    monkeypatch.setattr(train, "start_run", follow)
    own = "--isotropy", 0.5, "--input-noise", 0.1  # of the first, and of the last three
    args = ["all", "--out", out, "--seed", 4, *own, *itertools.chain(*[
        (f"--{k.replace('_', '-')}", v) for k, v in FAST.items()])]  # fmt: skip
    assert cli(*args)[0] == 130
    assert cli(*args)[0] == 0
    assert begun == ["vae", "decoder", "decoder", "chameleon", "base", "posttrain"]
    tensors = checkpoint.open_checkpoint(out).tensors("model").values()
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    sample.load(out)
    code, said = cli(*args, "--lr", 0.5)
    assert code == 0 and len(begun) == 6 and "base was finished without lr 0.5" in said
    assert "warning" not in cli(*args)[1]
    configs = [json.loads((out / n / "run.json").read_text())["config"] for n in train.STAGES]
    assert [config["seed"] for config in configs] == [400, 401, 402, 403, 404]
    assert [config["input_noise"] for config in configs] == [0, 0, 0.1, 0.1, 0.1]
    (tmp_path / "config.json").write_text("{}")
    assert "not empty" in cli("all", "--out", tmp_path)[1]


def test_flags_of_the_world_reach_the_data(road, tmp_path, cli):
    more = ["--tasks", "editing", "--edits", "add", "--max-objects", 3, "--digits", 0.25,
            "--captions", "two objects=1", "--questions", "count"]  # fmt: skip
    code, said = cli(*flags(tmp_path / "run", road["decoder"], "--steps", 1, *more))
    assert code == 0, said
    world = checkpoint.open_checkpoint(tmp_path / "run").section("data")
    assert world["tasks"] == {"editing": 1.0} and world["edits"] == {"add": 1.0}
    assert world["max_objects"] == 3 and world["digits"] == 0.25
    assert world["captions"] == {"two objects": 1.0} and world["questions"] == {"count": 1.0}


def test_the_last_step_draws_its_row_of_pictures(road, tmp_path):
    options = dict(validate_every=5, pictures_every=1)
    run = run_stage("posttrain", tmp_path / "run", road["posttrain"], **options)
    assert (run / "samples.png").is_file()


def test_a_model_goes_along_where_its_autoencoder_is_trained(road, tmp_path):
    for name in ("vae", "decoder"):
        run = run_stage(name, tmp_path / name, road["end"])
        old, new = (checkpoint.open_checkpoint(place) for place in (road["end"], run))
        assert same(old.tensors("model"), new.tensors("model"))
        assert not same(old.tensors("vae"), new.tensors("vae"))
        sample.load(run)


def test_a_tuned_autoencoder_goes_on_to_the_bit(road, tmp_path):
    """Also what its latents are held to: what it was at its first step."""
    options, (whole, parts) = dict(steps=4, save_every=2), (tmp_path / n for n in ("a", "b"))
    run_stage("vae", whole, road["end"], **options)
    parts.mkdir()
    saved = (whole / "step-00000002").rename(parts / "step-00000002")
    start, config = checkpoint.open_checkpoint(saved), make_config("vae", **options)
    train.train("vae", config, World(), World(7), parts, start, {"data": {}}, saved)
    assert same(state(whole), state(parts))


# --- Users' own data ---


@pytest.fixture
def folder(tmp_path):
    """Eight captioned discs."""
    (tmp_path / "discs").mkdir()
    for i in range(8):
        disc(i % 5 * 4, (30 * i, 60, 30)).save(tmp_path / f"discs/{i}.png")
        (tmp_path / f"discs/{i}.txt").write_text(f"a pale disc {i}")
    return tmp_path / "discs"


def own(stage: str, run, init, folder, *more) -> list:
    start = [] if init is None else ["--init", init]
    return [stage, *flags(run, init, *more)[1:3], *start, *flags(run, init, *more)[5:],
            "--data", folder]  # fmt: skip


def test_own_data_take_every_stage_and_are_known_to_a_resumed_run(cli, road, folder, tmp_path):
    init = None
    for name in train.STAGES:
        run = tmp_path / name
        assert cli(*own(name, run, init, folder, "--steps", 1))[0] == 0
        init = run
    dry = ("posttrain", "--dry-run", "--preset", "nano", "--init", run, "--data", folder)
    assert cli(*dry)[0] == 0
    config = checkpoint.open_checkpoint(run).config
    assert config["data"]["files"] == str(folder) and "pale" in config["generation"]["words"]
    assert cli("posttrain", "--out", run, "--resume", "--steps", 2)[0] == 0
    assert lines(run)[-1]["step"] == 2
    assert json.loads((run / "run.json").read_text())["config"]["data"] == str(folder)
    (folder / "3.txt").write_text("another disc")  # what was encoded ahead is no longer it
    (old,) = (run / "encoded").glob("what.json")
    before = old.read_text()
    assert cli("posttrain", "--out", run, "--resume", "--steps", 3)[0] == 0
    assert old.read_text() != before


def test_own_data_are_what_is_learned_from(cli, road, folder, tmp_path):
    sides = train.open_data(make_config("vae", data=str(folder)), [], None)[:2]
    assert [len(side) for side in sides] == [7, 1]
    losses = []
    for run in (tmp_path / "a", tmp_path / "b"):
        assert cli(*own("decoder", run, road["decoder"], folder, "--steps", 1))[0] == 0
        losses.append(lines(run)[0]["loss"])
        for picture in folder.glob("*.png"):
            Image.new("RGB", (32, 32)).save(picture)
    assert losses[0] != losses[1]


def test_own_data_that_do_not_fit_are_said(cli, road, folder, tmp_path, capsys):
    init = road["posttrain"]
    assert "tasks" in cli(*own("posttrain", tmp_path / "a", init, folder, "--tasks", "story=1"))[1]
    assert cli(*own("posttrain", tmp_path / "a", init, tmp_path / "none"))[0] == 2
    assert not (tmp_path / "a").exists()  # all that is cheap is checked first
    (folder / "8.png").write_bytes(b"no picture")
    (folder / "8.txt").write_text("broken")
    code, said = cli(*own("posttrain", tmp_path / "a", init, folder, "--strict"))
    assert code == 2 and "8" in said
    (folder / "1.txt").write_text("a pale \u00e9\u00e8 disc " * 200)  # and longer than the context
    assert cli(*own("posttrain", tmp_path / "b", init, folder))[0] == 0
    for text in folder.glob("*.txt"):
        text.write_text("disc " * 600)
    code, said = cli(*own("posttrain", tmp_path / "c", init, folder))
    assert code == 2 and "longer than the context" in said
