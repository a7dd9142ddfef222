"""train.py: stages on a small model, resume, and what each stage may change."""

import dataclasses
import json
import random
import shutil
import sys

import pytest
import torch

import checkpoint
import data
import orthus
import train
import vae
from orthus import Orthus
from vae import VQVAE

FAST = dict(steps=4, batch_size=6, workers=0, log_every=2, save_every=2, dtype="float32")
TRANSFORMER_STAGES = ("chameleon", "base", "posttrain")


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    small = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_width=32)
    monkeypatch.setitem(orthus.PRESETS, "tiny", orthus.PRESETS["tiny"] | small)
    monkeypatch.setitem(vae.PRESETS, "tiny", vae.PRESETS["tiny"] | dict(base_channels=8))


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """`train.py all`, two steps a stage -> the directory."""
    out = tmp_path_factory.mktemp("road") / "all"
    with pytest.MonkeyPatch.context() as patch:
        small = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_width=32)
        patch.setitem(orthus.PRESETS, "tiny", orthus.PRESETS["tiny"] | small)
        patch.setitem(vae.PRESETS, "tiny", vae.PRESETS["tiny"] | dict(base_channels=8))
        train.train_all(FAST | {"out": str(out), "steps": 2})
    return out


def config(name: str, out, init="", **changes) -> train.TrainConfig:
    return train.make_config(name, FAST | {"out": str(out), "init": str(init)} | changes)


def before(road, name: str):
    """The checkpoint that a stage starts from."""
    road_so_far = ["", *(road / stage for stage in train.STAGES)]
    return road_so_far[list(train.STAGES).index(name)]


def tensors(directory) -> dict[str, torch.Tensor]:
    state = torch.load(directory / "state.pt", weights_only=True)
    moments = {
        f"{n}.{i}.{key}": value
        for n, part in enumerate(state["optimizer"])
        for i, moments in part["state"].items()
        for key, value in moments.items()
    }
    return state["weights"] | {f"ema.{k}": v for k, v in state["average"].items()} | moments


# --- The road ---


def test_the_road_ends_in_a_checkpoint_that_samples(road):
    import sample

    pipeline = sample.load(road)
    assert {t.dtype for t in checkpoint.read_model(road)[1].values()} == {torch.bfloat16}
    answer = sample.generate(
        pipeline, [sample.Request([data.Segment("a star")])], steps=2, progress=False
    )
    assert len(answer[0].images) == 1


def test_every_stage_logs_its_losses_apart(road):
    for name in train.STAGES:
        lines = [json.loads(line) for line in (road / name / "log.jsonl").open()]
        assert [line["step"] for line in lines] == [2]
        wanted = {"text", "image"} if name in TRANSFORMER_STAGES else {"loss"}
        assert wanted <= set(lines[0])


def test_an_interrupted_road_goes_on_where_it_stopped(road, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *a: pytest.fail("every stage is finished"))
    train.train_all(FAST | {"out": str(road), "steps": 2})


@pytest.mark.parametrize("name", ["vae", "posttrain"])
def test_resume_is_bitwise(road, tmp_path, monkeypatch, name):
    monkeypatch.setattr(train, "QUANTISE_FROM", 1)
    monkeypatch.setattr(train, "REVIVE_EVERY", 3)
    init = before(road, name)
    train.train(name, config(name, tmp_path / "whole", init))

    class Stop(Exception):
        pass

    def save_and_stop(*args):
        save_state(*args)
        raise Stop

    save_state = train.save_state
    monkeypatch.setattr(train, "save_state", save_and_stop)
    with pytest.raises(Stop):
        train.train(name, config(name, tmp_path / "parts", init))
    monkeypatch.setattr(train, "save_state", save_state)
    train.train(name, train.make_config(name, {"out": str(tmp_path / "parts"), "resume": True}))
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


# --- What a stage trains ---

TRAINED = {
    "vae": lambda name: True,
    "decoder": lambda name: name.startswith(("decoder.", "post_quant_conv.")),
    "chameleon": lambda name: name != "vision_embedding.codebook.weight",
    "base": lambda name: name.startswith(("vision_embedding.", "diffusion_head.", "embed_tokens")),
    "posttrain": lambda name: True,
}


@pytest.mark.parametrize("name", train.STAGES)
def test_a_stage_changes_what_it_trains_and_nothing_else(road, tmp_path, name):
    settings = config(name, tmp_path / name, before(road, name))
    stage = train.STAGES[name](settings)
    trained = {n for n, p in stage.model.named_parameters() if p.requires_grad}
    everything = {n for n, _ in stage.model.named_parameters()}
    assert trained == {n for n in everything if TRAINED[name](n)}
    groups = train.make_optimizer(stage.model, settings).param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained)
    start = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
    train.train(name, settings)
    end = torch.load(tmp_path / name / "state.pt", weights_only=True)["weights"]
    changed = {n for n in everything if not torch.equal(start[n], end[n])}
    assert changed <= trained
    still = trained - changed  # the codebook has no gradient in the first, unquantised steps
    assert still <= ({"quantize.embedding.weight"} if name == "vae" else set())
    if name == "base":
        codes = slice(4, 4 + stage.model.config.num_codes)
        moved = (start["embed_tokens.weight"] != end["embed_tokens.weight"]).any(1)
        assert moved[codes].any() and not moved[: codes.start].any()
        assert not moved[codes.stop :].any()


def test_embeddings_and_vectors_have_no_weight_decay(road, tmp_path):
    settings = config("posttrain", tmp_path / "x", before(road, "posttrain"))
    model = train.STAGES["posttrain"](settings).model
    groups = train.make_optimizer(model, settings).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    layer = model.layers[0]
    plain = (model.embed_tokens, model.vision_embedding.codebook, layer.self_attn.q_norm)
    assert all(decay[id(module.weight)] == 0 for module in plain)
    assert decay[id(layer.mlp.up_proj.weight)] > 0 and decay[id(model.lm_head.weight)] > 0


# --- The conversion Chameleon -> Orthus ---


def test_base_starts_from_chameleon_and_a_head_that_outputs_zero(road, tmp_path):
    settings = config("base", tmp_path / "x", before(road, "base"))
    old, model = Orthus.from_pretrained(settings.init), train.to_orthus(settings)
    assert (old.config.vision_embedding, old.config.image_head) == ("argmin", "tokens")
    assert (model.config.vision_embedding, model.config.image_head) == ("softmax", "diffusion")
    new = model.state_dict()
    assert all(torch.equal(t, new[name]) for name, t in old.state_dict().items())
    autoencoder = VQVAE.from_pretrained(settings.init)
    codebook = autoencoder.quantize.embedding.weight
    assert torch.equal(new["vision_embedding.codebook.weight"], codebook)
    latents = autoencoder.encode(data.scene_images(5, 5, 32)[0]).flatten(0, 1)
    assert model.vision_embedding.effective_codes(latents).median().item() == pytest.approx(
        train.MIXED_CODES, rel=0.2
    )
    assert (latents * model.config.latent_scale).std().item() == pytest.approx(1, rel=0.1)
    t = torch.randint(1000, (8,))
    assert (model.diffusion_head(latents[:8], t, torch.randn(8, 64)) == 0).all()
    model.vision_embedding.tau = 1e-9
    assert torch.allclose(model.vision_embedding(latents), old.vision_embedding(latents))


def test_dead_codes_are_revived_in_the_average_too(road, tmp_path):
    settings = config("vae", tmp_path / "x", steps=1000)
    stage = train.STAGES["vae"](settings)
    codebook = stage.model.quantize.embedding.weight
    with torch.no_grad():
        codebook[7] = 1e3  # so far away that no latent is near it
    average = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
    optimizer = train.make_optimizer(stage.model, settings)
    stage.after_step(train.REVIVE_EVERY - 1, optimizer, average)
    assert codebook[7].abs().max() < 100
    assert torch.equal(codebook[7], average["quantize.embedding.weight"][7])


def test_an_autoencoder_that_goes_on_holds_its_latents_where_there_is_no_detail(road, tmp_path):
    stage = train.STAGES["vae"](config("vae", tmp_path / "x", road / "decoder"))
    ((images, detail),) = stage.batch(0)
    moved = lambda detail: stage.losses((images, detail), torch.Generator())["moved"].item()
    assert moved(detail) == 0 and 0 < detail.mean() < 0.1
    with torch.no_grad():
        stage.model.quant_conv.bias += 0.1
    assert moved(torch.zeros_like(detail)) > moved(detail) > 0
    assert moved(torch.ones_like(detail)) == 0


def test_the_autoencoders_loss_is_the_sum_of_its_parts(road, tmp_path):
    stage = train.STAGES["vae"](config("vae", tmp_path / "x"))
    generator = torch.Generator().manual_seed(train.QUANTISE_FROM)  # train() seeds by the step
    parts = {k: v.item() for k, v in stage.losses(stage.batch(0)[0], generator).items()}
    share = 1 / 6  # of six images, the first is quantised
    wanted = share * parts["quantised"] + (1 - share) * parts["continuous"]
    wanted += (1 + train.COMMITMENT) * parts["commitment"] + train.ISOTROPY * parts["anisotropy"]
    assert parts["loss"] == pytest.approx(wanted, rel=1e-4)
    error, detail = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    error[..., 0, 0] = detail[..., 0, 0] = 1
    plain = train.reconstruction_loss(error, 0 * error, 0 * detail).item()
    weighted = train.reconstruction_loss(error, 0 * error, detail).item()
    assert weighted == pytest.approx(plain + train.DETAIL_WEIGHT)


def test_isotropic_latents_are_known_from_flat_ones():
    white = torch.randn(64, 16, 32, generator=torch.Generator().manual_seed(0))
    flat = white * (torch.arange(32) < 4)
    assert train.anisotropy(white) < 0.1
    assert train.anisotropy(5 * white + 3).item() == pytest.approx(train.anisotropy(white).item())
    assert train.anisotropy(flat).item() == pytest.approx(7, rel=0.1)  # (4 (8 - 1)^2 + 28) / 32


# --- Data, schedule, average ---


def test_batches_depend_on_seed_and_step_alone(road, tmp_path):
    settings = config("posttrain", tmp_path / "x", before(road, "posttrain"))
    stage = train.STAGES["posttrain"](settings)
    here = [b for b, _ in zip(train.batches(stage, settings, 0), range(3), strict=False)]
    worker = dataclasses.replace(settings, workers=1)
    there = [b for b, _ in zip(train.batches(stage, worker, 1), range(2), strict=False)]
    for a, b in zip(here[1:], there, strict=True):
        assert torch.equal(a[0].batch.tokens, b[0].batch.tokens)
        assert torch.equal(a[0].batch.images, b[0].batch.images)
    assert here[0][0].batch.tokens.tolist() != here[1][0].batch.tokens.tolist()


def test_micro_batches_add_up_to_the_whole(road, tmp_path):
    sums = []
    for parts in (1, 3):
        settings = config(
            "chameleon", tmp_path / str(parts), before(road, "chameleon"), micro_batches=parts
        )
        stage = train.STAGES["chameleon"](settings)
        micro = stage.batch(0)
        assert len(micro) == parts
        losses = [stage.losses(m, torch.Generator()) for m in micro]
        sums.append({key: sum(part[key].item() for part in losses) for key in losses[0]})
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_a_tenth_of_the_prompts_for_images_is_the_unconditional_one(road, tmp_path):
    settings = config(
        "posttrain", tmp_path / "x", before(road, "posttrain"), batch_size=600, micro_batches=1,
        without="understanding,editing,difference,in_context,story",
    )
    stage = train.STAGES["posttrain"](settings)
    (micro,) = stage.batch(0)
    tokenizer = data.Tokenizer.from_pretrained(settings.out)
    texts = [tokenizer.decode(row) for row in micro.batch.tokens.tolist()]
    assert 0.06 < sum(t == train.UNCONDITIONAL for t in texts) / len(texts) < 0.14


def test_a_dropped_prompt_leaves_images_without_text_or_the_unconditional_sentence():
    rng = random.Random(0)
    for make, given in ((data.editing, 1), (data.in_context, 3)):
        example = make(rng, "recolour")
        left = [train.drop_prompt(example.segments, rng) for _ in range(40)]
        assert all(segments[-1] is example.segments[-1] for segments in left)
        pictures = [s for s in example.segments if not isinstance(s.content, str)]
        contexts = [segments[:-1] for segments in left]
        assert all(c in ([data.Segment(train.UNCONDITIONAL)], pictures[:given]) for c in contexts)
        assert {len(c) for c in contexts} == {1, given} and pictures[:given] in contexts
    story = data.story(rng).segments
    frames = {id(train.drop_prompt(story, rng)[-1]) for _ in range(60)}
    assert frames == {id(s) for s in story if s.output and not isinstance(s.content, str)}


def test_tasks_can_be_left_out(road, tmp_path):
    settings = config("posttrain", tmp_path / "x", road / "base", without="in_context,story")
    assert set(train.choose_tasks(settings)) == set(data.TASKS) - {"in_context", "story"}
    with pytest.raises(ValueError, match="'poetry'.*in_context"):
        config("posttrain", tmp_path / "y", road / "base", without="poetry")


def test_muon_trains_the_inner_matrices_and_adamw_the_rest(road, tmp_path):
    settings = config("posttrain", tmp_path / "x", road / "base", optimizer="muon")
    model = train.STAGES["posttrain"](settings).model
    adamw, muon = train.make_optimizer(model, settings).parts
    names = {id(p): n for n, p in model.named_parameters()}
    inner = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    rest = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert inner | rest == set(names.values()) and not inner & rest
    ends = ("embed_tokens", "codebook", "lm_head", "final_layer.linear", "norm", "bias", "in_ln")
    assert all(any(end in name for end in ends) for name in rest)
    assert not any(any(end in name for end in ends) for name in inner)


def test_learning_rate_warms_up_and_decays_to_zero():
    settings = train.TrainConfig(steps=100, lr=1.0, warmup=0.1)
    rates = [train.learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001


def test_average_follows_the_weights():
    model = torch.nn.Linear(2, 2)
    average = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    train.update_average(average, model, 0.9, 10**6)
    assert torch.allclose(average["weight"], 0.1 * model.weight)


# --- Bad input ---

BAD = {
    "no checkpoint to start from": (["posttrain"], "--init"),
    "missing checkpoint": (["posttrain", "--init", "/nowhere"], "nowhere"),
    "nothing to resume": (["vae", "--resume"], "state.pt"),
    "no steps": (["vae", "--steps", "0"], "--steps"),
    "unknown stage": (["pretrain"], "pretrain"),
    "unknown preset": (["vae", "--preset", "70b"], "70b"),
    "absent device": (["vae", "--device", "cuda:99"], "cuda:99"),
    "no threads": (["vae", "--threads", "-1"], "--threads"),
    "unknown dtype": (["vae", "--dtype", "int8"], "int8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    args, wanted = BAD[case]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        train.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and wanted in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_resumes_its_own_stage_alone(road):
    with pytest.raises(ValueError, match="stage decoder, not posttrain"):
        train.make_config("posttrain", {"out": str(road / "decoder"), "resume": True})


def test_weights_that_are_not_numbers_are_never_saved(road, tmp_path):
    settings = config("vae", tmp_path / "x", lr=1e30, log_every=50, steps=12, save_every=6)
    with pytest.raises(ValueError, match="lower --lr"):
        train.train("vae", settings)
    assert not (tmp_path / "x" / "state.pt").exists()


def test_a_run_is_never_overwritten_by_accident(road, tmp_path):
    with pytest.raises(ValueError, match="--resume or another --out"):
        config("vae", road / "vae")
    for name in ("vae", "posttrain"):  # a published checkpoint has no state.pt
        with pytest.raises(ValueError, match="would be overwritten; give another --out"):
            config(name, road, road / "base")
    train.start_run(config("posttrain", tmp_path, road / "base"), orthus.OrthusConfig())
    config("posttrain", tmp_path, road / "base")  # as if stopped before its first save


def test_a_run_knows_todays_words(road, tmp_path):
    shutil.copytree(road / "base", tmp_path / "old")
    known = checkpoint.read_config(road)["generation"]
    checkpoint.write(tmp_path / "old", {"generation": known | {"words": ["a", "red"], "steps": 7}})
    settings = config("posttrain", tmp_path / "new", tmp_path / "old")
    train.start_run(settings, orthus.OrthusConfig())
    now = checkpoint.read_config(tmp_path / "new")["generation"]
    assert now == known | {"words": data.shapes_words(), "steps": 7}


def test_base_starts_from_a_chameleon_alone(road, tmp_path):
    with pytest.raises(ValueError, match="go on with posttrain"):
        train.train("base", config("base", tmp_path / "x", road / "posttrain"))


def test_a_codebook_of_another_size_is_refused(road, tmp_path, monkeypatch):
    monkeypatch.setitem(orthus.PRESETS, "tiny", orthus.PRESETS["tiny"] | dict(latent_channels=16))
    with pytest.raises(ValueError, match="latent_channels is 32"):
        train.train("chameleon", config("chameleon", tmp_path / "x", road / "decoder"))
    assert not (tmp_path / "x").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py", "vae", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
