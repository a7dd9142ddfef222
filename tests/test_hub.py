"""checkpoint.py on the Hub's layout, and what the released code computes on its weights.

Recordings of the released Orthus on a tiny random model come first (ORTHUS_GOLDEN may name the
folder of all of them: then the whole checkpoint is tried too). Then Chameleon against transformers,
and damage.
"""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import close, complaint, randn, randomise, read_fixture
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import data
import sample
from checkpoint import CONFIG, MODEL, open_checkpoint
from orthus import DiffusionHead, Orthus, OrthusConfig, VisionEmbedding, guide
from vae import VQVAE, VQVAEConfig

VAE_SIZES = dict(resolution=32, base_channels=32, channel_multiplier=(1, 1, 2, 1))
VAE_SIZES |= dict(num_res_blocks=1, latent_channels=16, num_codes=32)
SMALL = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_width=256)
SMALL |= dict(intermediate_size=128, num_hidden_layers=3, vocab_size=8800)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- The released Orthus: recordings -------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_fixture("golden")[0]


@pytest.fixture(scope="module")
def head(golden) -> DiffusionHead:
    """Its weights on the span of what the recorded calls see of them (make_fixtures.py)."""
    weights = {}
    for name, tensor in golden.items():
        if name.startswith("mlp_head."):
            layer = name.removeprefix("mlp_head.").removesuffix(".weight.left")
            right = golden.get("right.adaLN" if "adaLN" in layer else f"right.{layer}")
            is_cut = name.endswith(".left")
            weights[layer + ".weight" * is_cut] = tensor @ right if is_cut else tensor
    head = DiffusionHead(OrthusConfig(**SMALL))
    head.load_state_dict(weights)
    return head


@torch.no_grad()
def test_the_diffusion_head_is_the_released_one(head, golden):
    noisy, t, hidden = (golden[f"head.{name}"] for name in ("x", "t", "hidden"))
    y = head.time_embed(t) + head.cond_embed(hidden)
    close(head(noisy, t, hidden), golden["head.out"], atol=1e-4)
    close(head.time_embed(t), golden["head.time_embed"], atol=1e-4)
    close(y, golden["head.y"], atol=1e-4)
    block = head.res_blocks[0](head.input_proj(noisy), head.modulations(y)[0])
    close(block, golden["head.block0_out"], atol=1e-4)


GUIDANCE = {"b1": (1.0,), "b2": (5.0, -4.0), "b3": (7.5, 1.5 - 7.5, 1 - 1.5)}


@torch.no_grad()
@pytest.mark.parametrize("rows, step", [("b2", 0), ("b3", 99)])
def test_a_guided_ddim_step_is_the_released_one(head, golden, rows, step):
    """The first of CFG 5, and the last of editing's three contexts: text 7.5, image 1.5."""
    x, t, hidden = (golden[f"{rows}.{name}"] for name in ("x", "t", "hidden"))
    velocity = guide(head(x, t, hidden)[None], GUIDANCE[rows])[0]
    close(velocity, golden[f"{rows}.velocity"].flatten(), atol=1e-4)
    time, a, b = head.schedule.ddim(100)[step]
    assert time == int(t[0])
    after = a * x[0] + b * velocity
    close(after, golden[f"{rows}.x_after"].flatten(), atol=1e-4)
    if step == 99:
        close(after / head.latent_scale, golden[f"{rows}.latents"][0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("rows", ["one", "two", "batch"])
def test_the_transformer_gives_the_released_hidden_states(golden, rows):
    """Image and text, two images, a batch padded on the left whose last row has no image."""
    model = Orthus(OrthusConfig(**SMALL, num_codes=8, latent_channels=8))
    weights = {k[6:]: t for k, t in golden.items() if k.startswith("model.")}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    shown = golden[f"{rows}.input_ids"] != 1
    hidden = model.transformer(golden[f"{rows}.inputs_embeds"], shown)
    close(hidden[shown], golden[f"{rows}.hidden_last"][shown], atol=1e-4)
    logits = hidden @ golden["lm_head"].T
    close(logits[shown], golden[f"{rows}.logits"][shown], atol=1e-4)


@torch.no_grad()
def test_soft_embeddings_are_the_released_ones(golden):
    width, channels = golden["emb.out"].shape[1], golden["emb.latents"].shape[1]
    sizes = dict(hidden_size=width, num_attention_heads=1, num_key_value_heads=1)
    words = torch.nn.Embedding(4 + 8192, width)
    embedding = VisionEmbedding(OrthusConfig(**sizes, latent_channels=channels), words)
    latents = golden["emb.latents"]
    embedding.codebook.weight.copy_(golden["emb.codebook"])
    words.weight[4:] = golden["emb.rows"]
    close(embedding(latents), golden["emb.out"], atol=2e-3)  # theirs is 1e-3 from the exact one
    close(embedding(latents), golden["emb.exact"], atol=2e-5)
    assert torch.equal(embedding.codes(latents), golden["emb.top1"])
    weights = embedding.closeness(latents).softmax(-1)
    close(weights.amax(-1), golden["emb.top1_p"], atol=0, rtol=5e-3)
    close(1 / weights.square().sum(-1), golden["emb.effective"], atol=0, rtol=5e-3)


def hub_orthus(directory: Path) -> Path:
    """Write the released layout: its config, tokenizer and names of tensors, in two shards; what
    the recordings leave out is random."""
    golden, said = read_fixture("golden")
    directory.mkdir(parents=True)
    tokenizer = gzip.decompress(bytes(golden["tokenizer"].tolist()))
    (directory / "tokenizer.json").write_bytes(tokenizer)
    names = checkpoint.read_vocabulary(directory / "tokenizer.json")
    (directory / CONFIG).write_text(json.dumps(said["config"] | {"vocabulary_map": names}))
    (directory / "preprocessor_config.json").write_text(json.dumps(said["processor"]))
    tensors = {k: golden.get(k, 0.05 * randn(*shape)) for k, shape in said["shapes"].items()}
    files = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: t for k, t in tensors.items() if files[k] == file}, directory / file)
    index = directory / f"{MODEL}.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return directory


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return hub_orthus(tmp_path_factory.mktemp("hub") / "orthus")


def test_an_orthus_directory_opens_with_the_releases_settings(released, golden):
    opened = open_checkpoint(released)
    model = checkpoint.build(OrthusConfig, opened.section("model"), opened)
    defaults = checkpoint.build(checkpoint.Generation, opened.section("generation"), opened)
    assert (model.vision_embedding, model.image_head) == ("softmax", "diffusion")
    assert (model.head_width, model.head_blocks, model.latents_per_image) == (256, 3, 16)
    assert (model.prediction, model.zero_terminal_snr) == ("velocity", True)
    assert (model.latent_scale, model.tau, model.bos_id) == (0.1, 1.0, 0)
    assert (defaults.steps, defaults.cfg_scale) == (100, 5.0)
    assert defaults.unconditional == "Generate an image." and defaults.image_first
    assert defaults.interleaved == {"unconditional": "generate images", "cfg_scale": 3.0}
    assert defaults.max_tokens >= model.latents_per_image + 3 and defaults.hub_pixels
    tokenizer, prompt = data.Tokenizer.from_pretrained(opened), golden["prompt"].tolist()
    segments = [data.Segment(tokenizer.decode(prompt))]
    assert [*data.layout(segments, tokenizer, model).tokens, model.boi_id] == prompt


def test_an_orthus_directory_draws(released):
    request = sample.Request([data.Segment("a red fox")])
    settings = dict(steps=2, max_tokens=20, progress=False)
    answer = sample.generate(sample.load(released), [request], **settings)[0]
    assert answer.images[0].size == (16, 16)


@torch.no_grad()
@pytest.mark.skipif("ORTHUS_GOLDEN" not in os.environ, reason="the same on the whole recordings")
def test_the_whole_recordings_are_met():
    folder = Path(os.environ["ORTHUS_GOLDEN"])
    model = Orthus.from_pretrained(folder / "ckpt")
    recorded = load_file(folder / "mixed.safetensors") | load_file(folder / "ddim.safetensors")
    for rows, weights in GUIDANCE.items():
        z, noise = recorded[f"{rows}.z"], recorded[f"{rows}.noise"]
        latents = model.image_head.sample(z[None], weights, 100, noise)
        close(latents.expand(len(z), -1), recorded[f"{rows}.latents"], atol=1e-4)
    for rows in ("one", "two", "batch"):
        tokens, latents = recorded[f"{rows}_input_ids"], recorded[f"{rows}_image_latents"]
        counts = (tokens == model.config.image_id).sum(1)
        latents = torch.cat([row[:n] for row, n in zip(latents, counts)])
        shown, embedded = tokens != 1, model.embed(tokens, latents)
        close(embedded[shown], recorded[f"{rows}_inputs_embeds"][shown], atol=1e-3)
        hidden = model(tokens, latents)
        close(hidden[shown], recorded[f"{rows}_hidden_last"][shown], atol=5e-3)
        logits = model.lm_head(hidden)[..., ::16]
        close(logits[shown], recorded[f"{rows}_logits_s16"][shown], atol=5e-3)
    close(model.vision_embedding(recorded["emb_latents"]), recorded["emb_out_f64"], atol=1e-5)


# --- Chameleon, against transformers -------------------------------------------------------------


def tokenizer_json(vocabulary: dict[str, int]) -> dict:
    """A byte-level BPE like Chameleon's: no merges, and text where the vocabulary has room."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    special = [n for names in checkpoint.SPECIAL.values() for n in names if n in vocabulary]
    level = dict(type="ByteLevel", use_regex=True, trim_offsets=True)
    return {
        "version": "1.0",
        "added_tokens": [dict(id=vocabulary[n], content=n, **flags) for n in special],
        "pre_tokenizer": level | {"add_prefix_space": False},
        "decoder": level | {"add_prefix_space": True},
        "model": dict(type="BPE", unk_token="<unk>", vocab=vocabulary, merges=[]),
    }


def hub_chameleon(directory: Path, name: str = "chameleon_7b", decoder: bool = True) -> Path:
    """Write what tests/make_fixtures.py recorded, with the recorded autoencoder, as the Hub has it;
    transformers has no decoder, so a random one is added."""
    tensors, config = read_fixture(name)
    autoencoder, _ = read_fixture("vqvae")
    whole = randomise(VQVAE(VQVAEConfig(**VAE_SIZES))).state_dict()
    weights = {k: t for k, t in tensors.items() if "." in k}
    for key, tensor in whole.items():
        if decoder or not key.startswith("decoder."):
            weights[f"model.vqmodel.{key}"] = autoencoder.get(key, tensor)
    directory.mkdir(parents=True)
    # one printable character each, a space as in the byte-level alphabet, where ids are free
    names, letters = config["vocabulary_map"], ["Ġ", *map(chr, range(33, 127))]
    free = [i for i in range(config["vocab_size"]) if i not in names.values()]
    config["vocabulary_map"] = names | dict(zip(letters, free))
    config["architectures"] = ["ChameleonForConditionalGeneration"]
    (directory / CONFIG).write_text(json.dumps(config))
    tokenizer = json.dumps(tokenizer_json(config["vocabulary_map"]))
    (directory / "tokenizer.json").write_text(tokenizer)
    checkpoint.write_tensors(directory / MODEL, weights)
    return directory


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory) -> Path:
    return hub_chameleon(tmp_path_factory.mktemp("hub") / "chameleon")


@pytest.fixture
def hub(chameleon, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(chameleon, tmp_path / "copy"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_30b"])
def test_a_chameleon_directory_computes_transformers_logits(tmp_path, name):
    model = Orthus.from_pretrained(hub_chameleon(tmp_path / "hub", name))
    recorded, _ = read_fixture(name)
    for prefix in ("", "padded_"):
        tokens = recorded[f"{prefix}tokens"]
        hidden = model(tokens, torch.zeros(0, 16))
        shown = tokens != model.config.pad_id
        close(hidden[shown], recorded[f"{prefix}hidden"][shown], atol=1e-4)
        close(model.lm_head(hidden)[shown], recorded[f"{prefix}logits"][shown], atol=1e-4)


@torch.no_grad()
def test_chameleons_autoencoder_and_codebook_come_along(chameleon):
    recorded, _ = read_fixture("vqvae")
    vae, model = VQVAE.from_pretrained(chameleon), Orthus.from_pretrained(chameleon)
    latents = vae.encode(recorded["images"])
    close(latents, recorded["latents"], atol=1e-4)
    assert torch.equal(vae.quantize(latents), recorded["codes"])
    codes = model.vision_embedding.codes(latents.flatten(0, 1))
    assert torch.equal(codes, recorded["codes"].flatten())
    assert (model.config.vision_embedding, model.config.image_head) == ("argmin", "tokens")
    ids = ("bos_id", "pad_id", "eos_id", "eoi_id", "boi_id", "sep_id", "image_id")
    assert [getattr(model.config, name) for name in ids] == [0, 1, 2, 36, 37, 38, 39]
    assert model.config.latents_per_image == 16


def test_chameleon_answers_in_text_unless_told_otherwise(chameleon):
    pipeline = sample.load(chameleon)
    request = [sample.Request([data.Segment("hello")])]
    assert not pipeline.defaults.image_first
    assert not sample.generate(pipeline, request, max_tokens=5, progress=False)[0].images
    pipeline.defaults.image_first = True
    drawn = sample.generate(pipeline, request, max_tokens=20, progress=False)[0]
    assert drawn.images[0].size == (32, 32)


def test_left_out_entries_of_config_json_are_the_7b_models(hub):
    legacy = dict(ch=128, ch_mult=[1, 1, 2, 2, 4], n_embed=32, z_channels=16)
    edit(hub / CONFIG, lambda c: [c.pop(k) for k in ("rms_norm_eps", "rope_theta")])
    edit(hub / CONFIG, lambda c: c.update(vq_config=legacy))
    opened = open_checkpoint(hub)
    model = checkpoint.build(OrthusConfig, opened.section("model"), hub)
    assert (model.rms_norm_eps, model.rope_theta, model.latents_per_image) == (1e-5, 1e4, 1024)
    vae = checkpoint.build(VQVAEConfig, opened.section("vae"), hub)
    assert vae == VQVAEConfig(latent_channels=16, num_codes=32)
    edit(hub / CONFIG, lambda c: c.update(rope_parameters={"rope_theta": 5e5}))
    assert open_checkpoint(hub).section("model")["rope_theta"] == 5e5


def test_text_never_becomes_special_tokens_or_image_codes(chameleon):
    tokenizer = data.Tokenizer.from_pretrained(chameleon)
    text = "a<image>b IMGIMGAZ c<racm3:break><reserved08706>"
    ids = tokenizer.encode(text)
    assert min(ids) > 39  # not even the unknown: all is spelled
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text * 300)) == text * 300
    special = [0, 37, 4, 35, 39, 38, 1]
    assert tokenizer.decode([*special, *ids, *special]) == text


def test_a_missing_decoder_names_vae_and_where_there_is_one(tmp_path):
    facebook = hub_chameleon(tmp_path / "facebook", decoder=False)
    message = complaint(lambda: sample.load(facebook))
    assert "--vae" in message and "leloykun/Anole-7b-v0.1-vqvae-hf" in message


# --- What was not downloaded ---------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 134\n"


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", "model-1.safetensors"])
def test_a_git_lfs_pointer_is_told_as_one(released, tmp_path, name):
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    (copy / name).write_text(POINTER)
    message = complaint(lambda: sample.load(copy))
    assert name in message and "git-lfs pointer" in message


def test_a_repository_id_comes_with_the_command_that_downloads_it():
    message = complaint(lambda: open_checkpoint("SJTU-Deng-Lab/Orthus-7B-base"))
    assert "hf download SJTU-Deng-Lab/Orthus-7B-base --local-dir Orthus-7B-base" in message


def test_shards_that_are_missing_are_named(released, tmp_path):
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    (copy / "model-0.safetensors").unlink()
    message = complaint(lambda: Orthus.from_pretrained(copy))
    assert "model-0.safetensors" in message and "model-1.safetensors" not in message
    assert len(message) < 300


# --- Damage --------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def swap(names: tuple[str, str], vocabulary: dict) -> None:
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]


IDS = [("IMGIMGAZ", "IMGIMGBHZ"), ("<s>", "<pad>"), ("<eoss>", "<racm3:break>")]


@pytest.mark.parametrize("where", ["tokenizer", "config", "both"])
@pytest.mark.parametrize("names", IDS)
def test_another_order_of_ids_is_refused(hub, where, names):
    if where != "config":
        vocabulary = checkpoint.read_vocabulary(hub / "tokenizer.json")
        swap(names, vocabulary)
        (hub / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    if where != "tokenizer":
        edit(hub / CONFIG, lambda c: swap(names, c["vocabulary_map"]))
    if where == "both" and names[0] == "<eoss>":
        edit(hub / CONFIG, lambda c: c.update(boi_token_id=37))  # as the Orthus release has
    message = complaint(lambda: open_checkpoint(hub))
    assert any(said in message for said in (names[0], "eoi_id", "boi_id"))


def test_the_released_vocabulary_has_the_released_ids():
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    names |= {"<reserved08706>": 8710, "<image>": 8711}
    names |= {checkpoint.code_name(k): 4 + k for k in range(8192)}
    assert names["IMGIMGIBJBZ"] == 4 + 8191
    ids = checkpoint.token_ids(names, 8192, "x")
    assert [ids[f"{name}_id"] for name in ("eoi", "boi", "sep", "image")] == [
        8196,
        8197,
        8710,
        8711,
    ]
    swap(("IMGIMGIBJBZ", "IMGIMGIBJAZ"), names)
    message = complaint(lambda: checkpoint.token_ids(names, 8192, "x"))
    assert "IMGIMGIBJAZ" in message and "2 of 8192" in message


CONFIG_DAMAGE = {  # what replaces an entry of config.json: what the message names
    "hidden_size": ("64", -1, 0, 1e300, True),
    "num_hidden_layers": ([], 1e300),
    "rms_norm_eps": ("x", -1, True),
    "vq_config": (3, {"attn_type": "linear"}),
    "rope_parameters": ([1], {"rope_type": "linear"}),
    "rope_scaling": ({"type": "linear", "factor": 2},),
    "hidden_act": ("gelu", ["silu"]),
    "boi_token_id": ("x",),
    "vocabulary_map": ({"<s>": "0"}, {"<s>": []}, ["<s>"]),
}
DAMAGED = [(name, value) for name, values in CONFIG_DAMAGE.items() for value in values]


@pytest.mark.parametrize("name, value", DAMAGED)
def test_a_damaged_config_of_the_hub_is_one_line(hub, name, value):
    edit(hub / CONFIG, lambda c: c.update({name: value}))
    assert str(hub) in complaint(lambda: Orthus.from_pretrained(hub))


@pytest.mark.parametrize("name, value", [("resolution", "32"), ("resolution", 0), ("ch_mult", [])])
@pytest.mark.parametrize("kind", [Orthus, VQVAE])
def test_damaged_sizes_of_the_autoencoder_are_one_line(hub, kind, name, value):
    edit(hub / CONFIG, lambda c: c["vq_config"].pop("channel_multiplier"))
    edit(hub / CONFIG, lambda c: c["vq_config"].update({name: value}))
    assert str(hub) in complaint(lambda: kind.from_pretrained(hub))


CONTENTS = [b"", b'{"model": {"vo', b"[" * 10**5, b"\xff{}", b"[]"]
CONTENTS += [
    b'{"model": {"vocab": {"<s>": "0"}}}',
    b'{"model": {"vocab": {}}, "added_tokens": [3]}',
]


@pytest.mark.parametrize("content", [*CONTENTS, None], ids=range(8))
@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", MODEL])
def test_a_file_that_is_none_is_named(hub, name, content):
    (hub / name).unlink()
    os.mkfifo(hub / name) if content is None else (hub / name).write_bytes(content)
    kind = data.Tokenizer if name == "tokenizer.json" else Orthus
    assert hub.name in complaint(lambda: kind.from_pretrained(hub))


def test_missing_tokens_are_all_named(hub):
    gone = ("<eoss>", "<reserved08706>", "<image>", "IMGIMGBCZ")
    edit(hub / CONFIG, lambda c: [c["vocabulary_map"].pop(name) for name in gone])
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert all(name in message for name in gone)
    (hub / "tokenizer.json").unlink()
    edit(hub / CONFIG, lambda c: c.pop("vocabulary_map"))
    assert "vocabulary_map" in complaint(lambda: Orthus.from_pretrained(hub))


@pytest.mark.parametrize("half", ["model.codebook_in.weight", "mlp_head.input_proj.bias"])
def test_half_an_orthus_is_not_taken_for_a_chameleon(hub, half):
    rewrite(hub / MODEL, lambda tensors: tensors.update({half: torch.zeros(32, 16)}))
    assert "missing image_head.cond_embed" in complaint(lambda: Orthus.from_pretrained(hub))
