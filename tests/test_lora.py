"""Low-rank training, what a dry run foretells, and every stage in 7B's layout, made narrow."""

import itertools
import math
import os
import re

import pytest
import torch
from conftest import close, complaint, randn, randomise
from test_train import FAST, SMALL, SMALL_VAE, World, lines, same, state

import checkpoint
import data
import lora
import orthus
import plan
import sample
import stages
import train
import vae
from data import Segment
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

NARROW = SMALL | dict(num_hidden_layers=1)
NARROW_VAE = dict(base_channels=4, num_res_blocks=1, groups=4)
MIDDLE = dict(hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=4, head_width=384)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_presets():
    """7b keeps its layout: 512 pixels, 1,024 latents of 256 channels, 65,536 words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(orthus.PRESETS, "nano", orthus.PRESETS["nano"] | SMALL)
        patch.setitem(vae.PRESETS, "nano", vae.PRESETS["nano"] | SMALL_VAE)
        patch.setitem(orthus.PRESETS, "tiny", orthus.PRESETS["tiny"] | dict(num_hidden_layers=2))
        patch.setitem(orthus.PRESETS, "7b", NARROW)
        patch.setitem(vae.PRESETS, "7b", NARROW_VAE)
        patch.setattr(os, "fsync", lambda file: None)
        yield


def write_start(folder, preset: str, dtype=torch.float32, **fields):
    """A checkpoint with random weights of a preset's size."""
    model = randomise(Orthus(OrthusConfig.preset(preset, **fields)))
    own = randomise(VQVAE(VQVAEConfig.preset(preset)), 1)
    sections = {"model": stages.asdict(model.config), "vae": stages.asdict(own.config),
                "generation": stages.asdict(stages.GENERATION)}  # fmt: skip
    texts = [*World().texts(), stages.UNCONDITIONAL]
    weights = {n: t.to(dtype) for n, t in model.state_dict().items()}
    words = data.train_tokenizer(texts, 100)
    checkpoint.write(folder, sections, weights, own.state_dict(), words)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"), "nano")


ANCESTOR = dict(vision_embedding="argmin", image_head="tokens")


@pytest.fixture(scope="module")
def narrow_start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("narrow"), "7b", torch.bfloat16, **ANCESTOR)


def make_config(name: str, preset: str = "nano", **changes) -> train.TrainConfig:
    changes = FAST | dict(preset=preset, micro_batches=1) | changes
    return train.TrainConfig(**(train.PRESETS[preset][name] | changes))


def make_stage(name, init, preset="nano", **changes) -> train.Stage:
    config = make_config(name, preset, device="cpu", **changes)
    return train.STAGES[name](config, World(), checkpoint.open_checkpoint(init), False)


def run_stage(name, out, init, preset="nano", saved=None, world=World, **changes):
    out.mkdir(exist_ok=True)
    checkpoint.write_json(out / "run.json", {})
    config = make_config(name, preset, **changes)
    train.train(name, config, world(), world(7), out, checkpoint.open_checkpoint(saved or init),
                {"data": {}}, saved)  # fmt: skip
    return out


def gradients(stage: train.Stage) -> dict:
    for micro in stage.batch(World(), 0):
        loss = stage.losses(micro, 0, torch.Generator().manual_seed(0))["loss"]
        loss.backward()
    return {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}


# --- Low rank ---


def low_rank_layers(model) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, lora.LowRank)]


def test_rank_0_wraps_nothing_and_trains_all(start):
    model = make_stage("posttrain", start, lora_rank=0).model
    assert not low_rank_layers(model) and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == Orthus.from_pretrained(start).state_dict().keys()


def test_the_targets_alone_are_wrapped_and_a_wrong_one_is_named(start):
    model = make_stage("posttrain", start, lora_rank=2, lora_targets=("q_proj", "up_proj")).model
    assert {n.rpartition(".")[2] for n in low_rank_layers(model)} == {"q_proj", "up_proj"}
    assert len(low_rank_layers(model)) == 2 * len(model.layers)
    assert len(low_rank_layers(make_stage("posttrain", start, lora_rank=2).model)) == 7 * 2
    wrong = lambda: make_stage("posttrain", start, lora_rank=2, lora_targets=("lm_head",))
    assert "'lm_head'" in complaint(wrong) and "q_proj" in complaint(wrong)


def make_pair(start, **changes):
    """A stage of rank 3, an input, and the function that it starts from."""
    stage = make_stage("posttrain", start, lora_rank=3, **changes)
    batch = stage.batch(World(), 0)[0]
    latents = stage.vae.encode(batch.images).flatten(0, 1).detach()
    return stage.model, (batch.tokens, latents), Orthus.from_pretrained(start)


def test_training_begins_at_the_function_of_the_checkpoint(start):
    model, given, plain = make_pair(start)
    assert torch.equal(model(*given), plain(*given))
    layer = model.layers[0].mlp.up_proj
    assert layer.A.weight.abs().mean() > 0.01 and not layer.B.weight.any()


def test_a_layer_is_the_papers_formula_and_merges_into_one_matrix():
    linear = torch.nn.Linear(5, 7, bias=False)
    layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": linear})])
    lora.add(layers, 2, 0.7, ("q_proj",))
    layer = randomise(layers)[0]["q_proj"]
    w, a, b, x = layer.weight, layer.A.weight, layer.B.weight, randn(4, 5)
    assert a.shape == (2, 5) and b.shape == (7, 2)
    wanted = torch.einsum("ni,oi->no", x, w) + 0.7 * torch.einsum("ni,ri,or->no", x, a, b)
    close(layer(x), wanted, 1e-5)
    merged = lora.merged(layers, layers.state_dict())
    assert list(merged) == ["0.q_proj.weight"]
    close(x @ merged["0.q_proj.weight"].T, wanted, 1e-5)


def test_merged_equals_unmerged(start):
    model, given, plain = make_pair(start, lora_scale=1.7)
    before = model(*given)
    for name in low_rank_layers(model):
        torch.nn.init.normal_(model.get_submodule(name).B.weight, 0, 0.1)
    weights = model.state_dict()
    merged = lora.merged(model, weights)
    assert merged.keys() == plain.state_dict().keys()
    assert model.state_dict().keys() == weights.keys() > merged.keys() - {"none"}
    plain.load_state_dict(merged)
    close(plain(*given), model(*given), 2e-4)
    assert (model(*given) - before).abs().max() > 0.1
    half = {n: t.bfloat16() if "layers" in n and n[-8:-7] not in "AB" else t
            for n, t in weights.items()}  # fmt: skip
    assert {t.dtype for n, t in lora.merged(model, half).items() if "proj" in n and
            "layers" in n} == {torch.bfloat16}  # fmt: skip


def test_of_the_layers_only_a_and_b_learn_and_around_them_everything(start):
    stage = make_stage("posttrain", start, lora_rank=2)
    with_gradient, every = gradients(stage), dict(stage.model.named_parameters())
    for name in every:
        is_factor = name.endswith((".A.weight", ".B.weight"))
        assert (name in with_gradient) == (is_factor or not name.startswith("layers.")), name
    assert {"embed_tokens.weight", "norm.weight", "lm_head.weight", "image_head.cond_embed.weight",
            "vision_embedding.codebook.weight"} <= with_gradient.keys()  # fmt: skip
    assert set(train.trained(stage.model)) == with_gradient.keys()


LORA = dict(lora_rank=2, steps=4, lr=1e-2, save_every=2)


def test_a_run_goes_on_to_the_bit_and_each_save_is_an_ordinary_checkpoint(start, tmp_path):
    whole = run_stage("posttrain", tmp_path / "whole", start, **LORA)
    parts = tmp_path / "parts"
    parts.mkdir()
    (whole / "step-00000002").rename(parts / "step-00000002")
    run_stage("posttrain", parts, start, saved=parts / "step-00000002", **LORA)
    assert same(state(whole), state(parts))
    saved, before = (checkpoint.open_checkpoint(d).tensors("model") for d in (whole, start))
    now = state(whole)
    assert saved.keys() == before.keys()
    frozen = "layers.0.mlp.up_proj.weight"
    assert torch.equal(now["weights"][frozen], before[frozen])
    a, b = (now["average"][f"layers.0.mlp.up_proj.{x}.weight"] for x in "AB")
    close(saved[frozen], before[frozen] + 2.0 * b @ a, 1e-6)
    assert (saved[frozen] - before[frozen]).abs().max() > 1e-4
    assert not any(frozen in n or "norm" in n for n in now["average"] if n != "norm.weight")
    pipeline = sample.load(whole)
    request = sample.Request([Segment("a dark disc")])
    (answer,) = sample.generate(pipeline, [request], progress=False, steps=2, min_images=1)
    assert len(answer.images) >= 1


def test_the_rank_is_of_posttrain_alone(run_main, tmp_path):
    code, _, said = run_main(train, "base", "--out", tmp_path / "x", "--init", tmp_path,
                             "--lora-rank", 2)  # fmt: skip
    assert code == 2 and "posttrain" in said and said.count("\n") == 1


# --- Activations computed again ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_same_when_activations_are_computed_again(start, dtype):
    kept = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        plain, again = (make_stage("posttrain", start, checkpoint_activations=on)
                        for on in (False, True))  # fmt: skip
        for stage in (plain, again):
            seen = {}
            keep = lambda t, seen=seen: seen.update({t.untyped_storage()._cdata: t}) or t
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                stage.found = gradients(stage)
            kept.append(sum(t.untyped_storage().nbytes() for t in seen.values()))
    assert plain.found.keys() == again.found.keys()
    assert all(torch.equal(plain.found[n], again.found[n]) for n in plain.found)
    assert kept[1] < 0.8 * kept[0]


# --- Frozen weights ---


def test_frozen_matrices_stay_as_they_are_stored_and_have_no_average(narrow_start):
    before = checkpoint.open_checkpoint(narrow_start).tensors("model")
    for dtype, frozen in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        stage = make_stage("base", narrow_start, "7b", dtype=dtype)
        for n, p in stage.model.named_parameters():
            is_matrix = n.endswith("_proj.weight") and "layers" in n or n == "lm_head.weight"
            assert p.dtype == (frozen if is_matrix else torch.float32), n
        names = train.trained(stage.model).keys()
        assert not any(n.startswith(("layers", "norm", "lm_head")) for n in names)
        assert torch.equal(stage.model.lm_head.weight.bfloat16(), before["lm_head.weight"])


# --- 7B's layout, narrow ---


class Pictures(World):
    """Captions and pictures alone."""

    def example(self, index: int) -> list[Segment]:
        return super().example(4 * index)


def test_every_stage_runs_in_7bs_layout(narrow_start, tmp_path, monkeypatch):
    config, own = OrthusConfig.preset("7b"), VQVAEConfig.preset("7b")
    assert (config.latents_per_image, config.latent_channels, config.vocab_size,
            own.resolution) == (1024, 256, 65536, 512)  # fmt: skip
    monkeypatch.setattr(train.Validation, "losses", lambda *a: {})  # half of the time
    options = dict(batch_size=1, world=Pictures, diffusion_batch_multiplier=1)
    init = narrow_start
    for name in ("decoder", "base", "posttrain"):
        run = run_stage(name, tmp_path / name, init, "7b", **options)
        assert len(lines(run)) == 2 and all(math.isfinite(d["loss"]) for d in lines(run))
        init = run
    after = checkpoint.open_checkpoint(init)
    model = after.section("model")
    assert (model["vision_embedding"], model["image_head"], model["tau"]) == ("softmax",
                                                                              "diffusion", 1.0)
    assert model["image_loss_weight"] == 100.0
    assert any(".A." in n for n in state(tmp_path / "posttrain")["weights"])
    assert after.tensors("model").keys() == Orthus(OrthusConfig(**model)).state_dict().keys()


def test_parts_of_a_batch_add_up_to_the_batch_for_the_decoder_too(start):
    found = []
    for parts in (1, 4):
        stage = make_stage("decoder", start, micro_batches=parts, latent_noise=0.0)
        assert len(stage.batch(World(), 0)) == parts
        found.append(gradients(stage))
    for n in found[0]:
        close(found[1][n], found[0][n], 1e-3 * found[0][n].abs().max().item() + 1e-7)


# --- What a dry run foretells ---


def measured(name: str, config: train.TrainConfig, init) -> dict:
    """A real step, its tensors summed, and what PyTorch's allocator was asked for in it."""
    begin = checkpoint.open_checkpoint(init) if init else None
    stage = train.STAGES[name](config, World(), begin, False)
    optimizer = train.make_optimizer(stage.model, config, getattr(torch, config.dtype))
    learns = train.trained(stage.model)
    average = {n: p.detach().clone() for n, p in learns.items()}
    batch = stage.batch(World(), 0)
    micro = max(batch, key=lambda b: b.tokens.numel() if stage.vae else 0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")

    def backward():
        with autocast:
            loss = stage.losses(micro, 10**9, torch.Generator().manual_seed(0))["loss"]
        loss.backward()

    backward()
    optimizer.step()
    optimizer.zero_grad()
    if config.micro_batches > 1:  # those of the part before
        for p in learns.values():
            p.grad = torch.zeros_like(p)
    kinds = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kinds], profile_memory=True) as profiler:
        backward()
        grads = sum(p.grad.nbytes for p in learns.values() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    with torch.profiler.profile(activities=[kinds], profile_memory=True) as saving:
        kept = train.contents(stage, optimizer, average, 0)  # noqa: F841

    def highest(profiler) -> int:
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        return max(itertools.accumulate((e.nbytes() for e in events), initial=0))

    size = lambda tensors: sum(t.nbytes for t in tensors)
    models = [m for m in (stage.model, stage.vae) if m]
    moments = [m for p in learns.values() for m in optimizer.state[p].values()]
    return {"weights": sum(size(m.parameters()) for m in models), "gradients": grads,
            "optimiser": size(moments), "average": size(average.values()),
            "step": highest(profiler), "saving": highest(saving)}  # fmt: skip


CASES = {
    "vae nano": dict(optimizer="adamw"), "chameleon nano": dict(optimizer="adamw"),
    "posttrain tiny": dict(batch_size=2),
    "posttrain middle": dict(lora_rank=8, micro_batches=2, dtype="bfloat16", batch_size=4),
    "base middle": dict(checkpoint_activations=True, micro_batches=2, dtype="bfloat16",
                        batch_size=4),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_foretells_a_real_step(tmp_path, monkeypatch, case):
    name, size = case.split()
    preset = "tiny" if size == "tiny" else "nano"
    if size == "middle":
        monkeypatch.setitem(orthus.PRESETS, "nano", orthus.PRESETS["nano"] | MIDDLE)
    kind = {} if name == "posttrain" else ANCESTOR
    init = write_start(tmp_path / "start", preset, **kind) if name != "vae" else None
    config = make_config(name, preset, device="cpu", **CASES[case])
    begin = checkpoint.open_checkpoint(init) if init else None
    found, real = plan.figures(name, config, World(), begin), measured(name, config, init)
    for key in ("weights", "gradients", "optimiser", "average"):
        assert found["memory"][key] == pytest.approx(real[key], rel=0.1), key
    assert sum(found["memory"].values()) == found["peak"]
    held = sum(found["memory"][key] for key in ("weights", "optimiser", "average"))
    held += found["memory"]["gradients"] * (config.micro_batches > 1)
    assert found["peak"] - held == pytest.approx(real["step"], rel=0.1)
    held = sum(found["memory"][key] for key in ("weights", "optimiser", "average"))
    assert found["saving"] - held == pytest.approx(real["saving"], rel=0.1, abs=2e5)  # its batch


@pytest.mark.parametrize("rank", [0, 2])
def test_a_dry_run_foretells_a_save_and_the_latents_ahead(start, tmp_path, rank):
    options = dict(lora_rank=rank, cache_latents=16)
    run = run_stage("posttrain", tmp_path / "run", start, **options)
    saved = train.newest_save(run)
    written = sum(p.stat().st_size for p in saved.iterdir() if p.suffix in (".safetensors", ".pt"))
    config = make_config("posttrain", device="cpu", **options)
    found = plan.figures("posttrain", config, World(), checkpoint.open_checkpoint(start))
    assert found["save"] == pytest.approx(written, rel=0.1)
    (path,) = (run / "encoded").glob("*.pt")
    assert found["cache"] == pytest.approx(torch.load(path)[1].numel() * 4, rel=0.1)
    model = make_stage("posttrain", start, **options).model
    every = sum(p.numel() for p in model.parameters())
    assert found["trained"] == sum(p.numel() for p in train.trained(model).values())
    assert found["trained"] + found["frozen"] == every


@pytest.mark.parametrize("name", ["decoder", "base", "posttrain"])
def test_a_dry_run_writes_one_table_and_nothing_else(run_main, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(train, "start_run", lambda *a: begun.append(a))
    code, said, _ = run_main(train, name, "--dry-run", "--preset", "7b", "--batch-size", 2)
    assert code == 0 and not begun and not list(tmp_path.iterdir())
    title, *rows = said.splitlines()
    assert title.startswith(f"{name} at 7b") and len(rows) == 13
    assert len({len(row.removesuffix(" GB")) for row in rows if "GB" in row}) == 1
    steps = train.PRESETS["7b"][name]["steps"]
    values = dict(re.match(r"    (\S.*?)  +(\S+)", row).groups() for row in rows)
    assert values["steps"] == f"{steps:,}" and values["examples"] == f"{2 * steps:,}"


def test_a_dry_run_is_of_a_stage_and_everything_else_wants_a_folder(run_main, tmp_path):
    assert run_main(train, "all", "--dry-run")[0] == 2
    code, _, said = run_main(train, "base")
    assert code == 2 and "--out" in said


def test_a_dry_run_takes_the_sizes_of_init(run_main, tmp_path):
    own = write_start(tmp_path / "own", "nano", head_blocks=2)
    code, said, _ = run_main(train, "posttrain", "--dry-run", "--preset", "nano", "--init", own)
    model = Orthus.from_pretrained(own)
    assert code == 0 and f"{sum(p.numel() for p in model.parameters()):,}" in said
