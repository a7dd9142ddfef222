"""The trainer: what a run is, what it loses (nothing), and that it goes on to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, close, complaint, randn
from PIL import Image
from torch import nn

import checkpoint
import data
import orthus
import sample
import stages
import train
from data import Segment
from lab import muon, rings
from orthus import Orthus
from stages import PRESETS, STAGES
from vae import VQVAE

SMALL = ["--preset", "nano", "--dtype", "float32", "--workers", "0", "--batch-size", "4"]
SMALL += ["--steps", "2", "--log-every", "1", "--device", "cpu"]


def start_stage(name: str, out, *flags) -> None:
    pictures = [] if name in ("vae", "decoder") else ["--pictures-every", "0"]
    train.main([name, *SMALL, *pictures, "--out", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A run of two steps for each stage, each from the one before."""
    folder, init = tmp_path_factory.mktemp("road"), []
    for name in STAGES:
        more = ["--steps", 4, "--warmup", 0] if name == "base" else []  # the head begins closed
        start_stage(name, folder / name, *init, *more)
        init = ["--init", folder / name]
    return folder


def log_of(run) -> list[dict]:
    lines = train.read_log(run / "log.jsonl")
    clocks = ("examples_per_second", "tokens_per_second", "waiting")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def state_of(run) -> dict:
    return train.read_state(train.newest_save(run))


def same(a, b) -> bool:
    """Equal to the bit, tensors, numbers and all that holds them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- A run ---------------------------------------------------------------------------------------


def test_every_stage_makes_a_checkpoint_that_says_what_it_is_from(road):
    init = ""
    for name in STAGES:
        source = checkpoint.open_checkpoint(road / name)
        assert source.section("data") == {"spec": PRESETS["nano"][name]["data"], "args": {}}
        record = checkpoint.read_json(road / name / "run.json")
        assert record["stage"] == name and record["init"] == str(init)
        assert [line["step"] for line in log_of(road / name)][:2] == [1, 2]
        init = road / name
    pipeline = sample.load(road / "posttrain")
    answer = sample.generate(pipeline, [sample.Request([Segment("a red circle")])], progress=False)
    assert len(answer[0].images) == 1 and "circle" in pipeline.defaults.words


def test_only_what_a_stage_trains_has_changed(road):
    """The decoder's encoder, the base's backbone and words, and everybody's autoencoder."""
    vae, decoder = (VQVAE.from_pretrained(road / name).state_dict() for name in ("vae", "decoder"))
    moved = {n.split(".")[0] for n in vae if not torch.equal(vae[n], decoder[n])}
    assert moved == {"decoder", "post_quant_conv"}
    old = Orthus.from_pretrained(road / "chameleon").state_dict()
    new = Orthus.from_pretrained(road / "base").state_dict()
    moved = {n for n in old if not torch.equal(old[n], new[n])}
    assert moved == {"embed_tokens.weight", "vision_embedding.codebook.weight"}
    rows = (old["embed_tokens.weight"] != new["embed_tokens.weight"]).any(1).nonzero()[:, 0]
    assert len(rows) > 100 and set(rows.tolist()) <= set(range(4, 260))
    for name in ("chameleon", "base", "posttrain"):
        other = VQVAE.from_pretrained(road / name).state_dict()
        assert all(torch.equal(other[n], decoder[n]) for n in decoder)


def test_base_begins_as_the_chameleon_and_its_head_at_zero(road):
    settings = checkpoint.build(stages.BaseSettings, {"preset": "nano", "batch_size": 4}, "")
    train_set, _ = data.open_dataset("lab.shapes:nano_pictures")
    model = stages.to_orthus(settings, train_set, checkpoint.open_checkpoint(road / "chameleon"))
    old = Orthus.from_pretrained(road / "chameleon").state_dict()
    assert all(torch.equal(p, old[n]) for n, p in model.state_dict().items() if n in old)
    hidden, noisy = randn(3, 128), randn(3, 16)
    assert model.image_head(noisy, torch.tensor([1, 500, 999]), hidden).abs().max() == 0
    vae = VQVAE.from_pretrained(road / "chameleon")
    latents = vae.encode(stages.pictures(train_set, 10**9, 4, 32)[0]).flatten(0, 1)
    assert 150 < stages.effective_codes(model, latents).median() < 256  # mixed_codes is 200
    assert (latents * model.config.latent_scale).std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["vae", "posttrain"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(road, tmp_path, name):
    """To the bit: weights, moments, average and log; across new codes for the autoencoder."""
    init = {"vae": ["--quantise-from", 2], "posttrain": ["--init", road / "base"]}[name]
    more = ["--revive-every", 3] if name == "vae" else ["--micro-batches", 2]
    start_stage(name, tmp_path / "one", *init, *more, "--steps", 4, "--save-every", 2)
    start_stage(name, tmp_path / "two", *init, *more, "--steps", 4, "--save-every", 2)
    last = train.newest_save(tmp_path / "two")
    shutil.rmtree(last)  # as if it had been stopped after the first save
    train.main([name, "--out", str(tmp_path / "two"), "--resume"])
    assert same(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")
    for part in ("model", "vae"):
        tensors = [checkpoint.open_checkpoint(tmp_path / run).read for run in ("one", "two")]
        if part in checkpoint.open_checkpoint(tmp_path / "one").config:
            assert same(tensors[0](part), tensors[1](part))


def test_sigterm_saves_and_ends(road, tmp_path, monkeypatch, capsys):
    losses = stages.PosttrainStage.losses

    def stopped(self, part, step, generator):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, part, step, generator)

    monkeypatch.setattr(stages.PosttrainStage, "losses", stopped)
    init = ["--init", road / "base", "--steps", 5, "--validate-every", 100]
    start_stage("posttrain", tmp_path / "run", *init)
    assert [p.name for p in checkpoint.saves(tmp_path / "run")] == ["step-00000002"]
    assert "--resume" in capsys.readouterr().out
    monkeypatch.undo()
    train.main(["posttrain", "--out", str(tmp_path / "run"), "--resume"])
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(
    road, tmp_path, capsys, monkeypatch
):
    losses = stages.DecoderStage.losses

    def broken(self, part, step, generator):
        return {"loss": losses(self, part, step, generator)["loss"] * float("nan")}

    monkeypatch.setattr(stages.DecoderStage, "losses", broken)
    with pytest.raises(SystemExit) as stop:
        start_stage("decoder", tmp_path / "run", "--init", road / "vae", "--save-every", 1)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "lr" in said.splitlines()[-1]
    assert not checkpoint.saves(tmp_path / "run")


def test_the_last_two_saves_are_kept_and_none_is_there_by_halves(road, tmp_path):
    start_stage(
        "decoder", tmp_path / "run", "--init", road / "vae", "--steps", 4, "--save-every", 1
    )
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert names == ["step-00000003", "step-00000004"]


def test_what_was_logged_past_a_save_is_dropped_and_so_is_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train.keep_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text("[1, 2]\n")
    assert "log.jsonl" in complaint(lambda: train.keep_log(path, 2))


def test_a_damaged_state_is_named(road, tmp_path):
    saved = train.newest_save(road / "vae")
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    (tmp_path / "step-00000001").mkdir()
    content = bytearray((copy / "state.pt").read_bytes())
    flipped = content[:]
    flipped[len(content) // 2] ^= 1
    for damaged in (content[: len(content) // 2], flipped, b""):
        (copy / "state.pt").write_bytes(damaged)
        said = complaint(lambda: train.read_state(copy))
        assert str(copy) in said and "step-00000001" in said


def test_what_a_run_began_with_stays(road):
    """Its optimiser's moments, and what its model is, are those of the save."""
    for name, changes in (("posttrain", {"optimizer": "adamw"}), ("base", {"image_head": "mse"})):
        ask = lambda: train.settings_of(name, road / name, changes, True)
        assert min(changes) in complaint(ask)
    same, _ = train.settings_of(
        "base", road / "base", {"optimizer": stages.MUON["optimizer"]}, True
    )
    assert same.lr == PRESETS["nano"]["base"]["lr"]


REFUSED = {  # flags -> what the one line must name
    "no init": (["base"], "--init"),
    "not empty": (["vae", "--out", "ROAD/vae"], "--resume"),
    "no run": (["vae", "--resume"], "--resume"),
    "another stage's": (["decoder", "--resume", "--out", "ROAD/vae"], "decoder"),
    "finished": (["vae", "--resume", "--out", "ROAD/vae"], "--steps"),
    "no such data": (["vae", "--data", "nowhere"], "nowhere"),
    "data args": (["vae", "--data-args", "[3]"], "--data-args"),
    "optimizer": (["vae", "--optimizer", "lab.muon:mouse"], "mouse"),
    "head": (["base", "--init", "ROAD/chameleon", "--image-head", "fist"], "fist"),
    "base of an Orthus": (["base", "--init", "ROAD/base"], "posttrain"),
    "sizes": (["chameleon", "--preset", "tiny", "--init", "ROAD/vae"], "num_codes"),
    "parts": (["posttrain", "--init", "ROAD/base", "--micro-batches", "5"], "micro_batches"),
    "not for vae": (["vae", "--image-head", "mse"], "--image-head"),
    "not for base": (["base", "--guidance-dropout", "0"], "--guidance-dropout"),
    "no folder": (["vae", "--out", ""], "--out"),
    "no folder for all": (["all", "--out", ""], "--out"),
    "7b has no vae": (["vae", "--preset", "7b"], "7b"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(road, tmp_path, capsys, name):
    flags, named = REFUSED[name]
    flags = [flag.replace("ROAD", str(road)) for flag in flags]
    more = [] if "--resume" in flags or flags[0] == "all" else SMALL
    out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train.main([flags[0], *more, *flags[1:], *out])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and named in said[-1] and "Traceback" not in "".join(said)
    assert not checkpoint.saves(tmp_path / "run")


def test_two_trainings_never_share_a_folder(tmp_path):
    with checkpoint.lock(tmp_path):
        code = (
            "import checkpoint, sys, pathlib\nwith checkpoint.lock(pathlib.Path(sys.argv[1])): pass"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True)
        assert done.returncode == 1 and str(os.getpid()).encode() in done.stderr


# --- The road ------------------------------------------------------------------------------------


def test_the_road_goes_on_where_it_stopped_and_publishes_in_bf16(tmp_path, monkeypatch, capsys):
    few = {name: PRESETS["nano"][name] | {"steps": 1, "batch_size": 4} for name in STAGES}
    monkeypatch.setitem(PRESETS, "nano", few)
    flags = ["--preset", "nano", "--workers", "0", "--dtype", "float32", "--device", "cpu"]
    flags += ["--seed", "3", "--out", str(tmp_path / "road")]
    train_stage = train.train_stage
    monkeypatch.setattr(
        train, "train_stage", lambda name, *rest: name != "base" and train_stage(name, *rest)
    )
    train.main(["all", *flags])  # base "was stopped"
    assert not (tmp_path / "road" / "model.safetensors").exists()
    monkeypatch.setattr(train, "train_stage", train_stage)
    train.main(["all", *flags])
    source = checkpoint.open_checkpoint(tmp_path / "road")
    assert {t.dtype for t in source.tensors("model").values()} == {torch.bfloat16}
    assert source.section("data") == {"spec": "lab.shapes:nano_tasks", "args": {}}
    seeds = [
        checkpoint.read_json(tmp_path / "road" / n / "run.json")["settings"]["seed"] for n in STAGES
    ]
    assert seeds == [300, 301, 302, 303, 304]
    before = source.tensors("model")
    capsys.readouterr()
    train.main(["all", *flags[:-3], "4", *flags[-2:]])  # too late for another seed
    assert "too late" in "".join(capsys.readouterr())
    assert same(before, checkpoint.open_checkpoint(tmp_path / "road").tensors("model"))


def test_a_smaller_batch_takes_the_presets_parts_down_with_it(tmp_path):
    settings, _ = train.settings_of(
        "posttrain", tmp_path, {"preset": "tiny", "batch_size": 2}, False
    )
    assert (settings.batch_size, settings.micro_batches) == (2, 2)


def test_every_preset_is_within_its_ranges(tmp_path):
    for preset, by_stage in PRESETS.items():
        for name in by_stage:
            settings, _ = train.settings_of(name, tmp_path, {"preset": preset}, False)
            assert settings.preset == preset and settings.data.startswith("lab.shapes:")


# --- The optimiser and its average ---------------------------------------------------------------


def test_the_rate_warms_up_and_ends_at_zero():
    settings = stages.VAESettings(steps=100, warmup=0.1, lr=2.0)
    rates = [train.learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_the_average_follows_by_its_decay():
    model = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.zeros(1, 1)}
    model.weight.data.fill_(1.0)
    train.update_average(average, model, 0.9, step=0)
    assert average["weight"].item() == pytest.approx(0.9)  # the decay begins at 0.1
    train.update_average(average, model, 0.9, step=10**6)
    assert average["weight"].item() == pytest.approx(0.91)


def test_the_groups_are_a_partition_and_embeddings_do_not_decay(road):
    model = Orthus.from_pretrained(road / "base")
    model.layers[0].requires_grad_(False)
    groups = train.make_optimizer(model, stages.PosttrainSettings()).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in train.trained(model).values()}
    decaying = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decaying}
    assert "layers.1.self_attn.q_proj.weight" in names and "lm_head.weight" in names
    assert not [n for n in names if "embed_tokens" in n or "codebook" in n or "norm" in n]
    inner = {id(p) for g in groups if g.get("inner") for p in g["params"]}
    inner = {n for n, p in model.named_parameters() if id(p) in inner}
    assert "image_head.cond_embed.weight" in inner and "lm_head.weight" not in inner


def test_an_optimizer_may_be_ones_own(road, tmp_path, monkeypatch):
    mine, given = types.ModuleType("mine"), {}

    def make(groups, **options):
        given.update(options)
        return torch.optim.SGD(groups, lr=options["lr"])

    mine.make = make
    monkeypatch.setitem(sys.modules, "mine", mine)
    start_stage("decoder", tmp_path / "run", "--init", road / "vae", "--optimizer", "mine:make")
    assert (
        given.keys() == {"lr", "betas", "weight_decay"} and state_of(tmp_path / "run")["step"] == 2
    )


def test_noise_depends_on_seed_step_and_part_alone():
    seeds = {train.noise_seed(s, t, n) for s in range(5) for t in range(5) for n in range(5)}
    assert len(seeds) == 125 and max(seeds) < 2**32
    assert train.noise_seed(1, 2, 3) == train.noise_seed(1, 2, 3)


def test_muon_orthogonalises_inner_matrices_alone():
    x = muon.orthogonalise(randn(6, 10))
    assert (torch.linalg.svdvals(x) - 1).abs().max() < 0.4
    inner, other = nn.Parameter(randn(6, 10)), nn.Parameter(randn(6, 10))
    groups = [{"params": [other]}, {"params": [inner], "inner": True}]
    optimizer = muon.muon(groups, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    before = inner.detach().clone(), other.detach().clone()
    inner.grad = other.grad = randn(6, 10, seed=1)
    optimizer.step()
    step = (inner.detach() - before[0]).double()
    assert torch.linalg.svdvals(step).std() < 0.25 * torch.linalg.svdvals(step).mean()
    close((other.detach() - before[1]).abs(), torch.full((6, 10), 0.1), atol=1e-4)  # Adam's first


# --- Validation ----------------------------------------------------------------------------------


def test_validation_is_of_what_is_held_out_and_draws_a_row(road, tmp_path):
    out = tmp_path / "run"
    train.main(
        [
            "posttrain",
            *SMALL,
            "--out",
            str(out),
            "--init",
            str(road / "base"),
            "--validate-every",
            "1",
            "--pictures-every",
            "1",
        ]
    )
    first, second = log_of(out)
    levels = [first[f"held_out_image_t{low}"] for low in (0, 250, 500, 750)]
    assert all(v > 0 for v in levels) and first["held_out_loss"] != second["held_out_loss"]
    with Image.open(out / "samples.png") as sheet:
        prompts = checkpoint.read_json(out / "run.json")["prompts"]
        assert sheet.size == (32 * len(prompts), 32) and all(prompts)


# --- A head of one's own -------------------------------------------------------------------------


class Mean(nn.Module):
    """The smallest head: what is known of it is what `Head` in orthus.py says."""

    def __init__(self, config, model=None):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.latent_channels)

    def loss(self, hidden, latents, generator=None):
        return (self.out(hidden) - latents).square().mean()

    @torch.no_grad()
    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None):
        return orthus.guide(self.out(hidden), weights)


def test_a_head_in_a_file_of_ones_own_trains_and_draws(road, tmp_path, monkeypatch):
    monkeypatch.setitem(orthus.HEADS, "mean", Mean)
    start_stage("base", tmp_path / "base", "--init", road / "chameleon", "--image-head", "mean")
    start_stage("posttrain", tmp_path / "more", "--init", tmp_path / "base", "--validate-every", 1)
    pipeline = sample.load(tmp_path / "more")
    assert isinstance(pipeline.model.image_head, Mean)
    request = sample.Request([Segment("a red circle")])
    assert sample.generate(pipeline, [request], progress=False)[0].images


# --- Users' own data -----------------------------------------------------------------------------


def test_own_pictures_train_and_one_that_vanishes_does_not_end_the_run(road, tmp_path, capsys):
    rings.main([str(tmp_path / "rings")])
    flags = ["--init", road / "decoder", "--data", tmp_path / "rings", "--steps", 3]
    vanish = sorted((tmp_path / "rings").glob("*.png"))[:6]
    take = stages.read_example

    def vanishing(dataset, index, resolution):
        for path in vanish:
            path.unlink(missing_ok=True)
        return take(dataset, index, resolution)

    stages.read_example = vanishing
    try:
        start_stage("vae", tmp_path / "eye", *flags)
    finally:
        stages.read_example = take
    said = "".join(capsys.readouterr())
    assert "20 examples" in said and "another example takes its place" in said
    said = checkpoint.open_checkpoint(tmp_path / "eye").section("data")
    assert said == {"spec": str(tmp_path / "rings"), "args": {}}


def test_texts_alone_train_and_new_words_are_known(road, tmp_path, capsys):
    lines = [
        {"segments": [{"text": f"say {n}"}, {"text": "a rabbit", "output": True}]}
        for n in range(40)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    start_stage(
        "posttrain", tmp_path / "run", "--init", road / "base", "--data", tmp_path / "texts.jsonl"
    )
    source = checkpoint.open_checkpoint(tmp_path / "run")
    assert {"rabbit", "circle"} <= set(source.section("generation")["words"])
    assert log_of(tmp_path / "run")[-1]["image"] == 0
