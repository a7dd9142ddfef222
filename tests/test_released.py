"""released.py: every layout of released checkpoints, and what the released code computes on them.

Recordings of the released Orthus on a tiny random model come first (ORTHUS_GOLDEN may name the
folder of all of them: then the whole checkpoint is tried too). Then Chameleon against transformers,
autoencoders from elsewhere, Meta's layout against a conversion of our own, converting, and damage.
"""

import dataclasses
import functools
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
import released
import sample
from checkpoint import MODEL, open_checkpoint
from orthus import DiffusionHead, Orthus, OrthusConfig, VisionEmbedding, guide, rope, rotate
from vae import VQVAE, VQVAEConfig

VAE = dict(
    resolution=32, base_channels=32, channel_multiplier=(1, 1, 2, 1), num_res_blocks=1,
    latent_channels=16, num_codes=32,
)  # fmt: skip
SMALL = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_width=256,
             intermediate_size=128, num_hidden_layers=3, vocab_size=8800)  # fmt: skip


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
    block = head.res_blocks[0](head.input_proj(noisy), *head.modulations(y)[0])
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
    config = OrthusConfig(hidden_size=width, num_attention_heads=1, num_key_value_heads=1,
                          latent_channels=channels)  # fmt: skip
    words = torch.nn.Embedding(4 + 8192, width)
    embedding, latents = VisionEmbedding(config, words), golden["emb.latents"]
    embedding.codebook.weight.copy_(golden["emb.codebook"])
    words.weight[4:] = golden["emb.rows"]
    close(embedding(latents), golden["emb.out"], atol=2e-3)  # theirs is 1e-3 from the exact one
    close(embedding(latents), golden["emb.exact"], atol=2e-5)
    assert torch.equal(embedding.codes(latents), golden["emb.top1"])
    weights = embedding.logits(latents).softmax(-1)
    close(weights.amax(-1), golden["emb.top1_p"], atol=0, rtol=5e-3)
    close(1 / weights.square().sum(-1), golden["emb.effective"], atol=0, rtol=5e-3)


@pytest.fixture(scope="module")
def orthus_hub(golden, tmp_path_factory) -> Path:
    """The released layout: its config, tokenizer and names of tensors, in two shards; what the
    recordings leave out is random."""
    directory, said = tmp_path_factory.mktemp("orthus"), read_fixture("golden")[1]
    tokenizer = gzip.decompress(bytes(golden["tokenizer"].tolist()))
    (directory / "tokenizer.json").write_bytes(tokenizer)
    names = released.read_vocabulary(directory / "tokenizer.json")
    (directory / "config.json").write_text(json.dumps(said["config"] | {"vocabulary_map": names}))
    (directory / "preprocessor_config.json").write_text(json.dumps(said["processor"]))
    tensors = {k: golden.get(k, 0.05 * randn(*shape)) for k, shape in said["shapes"].items()}
    files = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: t for k, t in tensors.items() if files[k] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return directory


def test_an_orthus_directory_opens_with_the_releases_settings(orthus_hub, golden):
    opened = open_checkpoint(orthus_hub)
    model, defaults = OrthusConfig(**opened.section("model")), opened.section("generation")
    assert (model.vision_embedding, model.image_head) == ("softmax", "diffusion")
    assert (model.head_width, model.head_blocks, model.latents_per_image) == (256, 3, 16)
    assert (model.prediction, model.zero_terminal_snr) == ("velocity", True)
    assert (model.latent_scale, model.tau, model.bos_id) == (0.1, 1.0, 0)
    assert (defaults["steps"], defaults["cfg_scale"]) == (100, 5.0)
    assert defaults["unconditional"] == "Generate an image." and defaults["image_first"]
    assert defaults["interleaved"] == {"unconditional": "generate images", "cfg_scale": 3.0}
    assert defaults["max_tokens"] >= model.latents_per_image + 3 and defaults["hub_pixels"]
    tokenizer, prompt = data.Tokenizer.from_pretrained(opened), golden["prompt"].tolist()
    segments = [data.Segment(tokenizer.decode(prompt))]
    assert [*data.layout(segments, tokenizer, model).tokens, model.boi_id] == prompt


def test_an_orthus_directory_samples_and_survives_the_hubs_layout(orthus_hub, tmp_path):
    answer = sample.generate(sample.load(orthus_hub), [sample.Request([data.Segment("a red fox")])],
                             steps=2, max_tokens=20, progress=False)[0]  # fmt: skip
    assert answer.images[0].size == (16, 16)
    released.convert(orthus_hub, tmp_path / "ours")
    released.convert(tmp_path / "ours", tmp_path / "hub", "hub")
    wanted = checkpoint.read_tensors(orthus_hub / MODEL)
    assert_same(checkpoint.read_tensors(tmp_path / "hub" / MODEL), wanted)


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
        latents = torch.cat([row[:n] for row, n in zip(latents, counts, strict=True)])
        shown, embedded = tokens != 1, model.embed(tokens, latents)
        close(embedded[shown], recorded[f"{rows}_inputs_embeds"][shown], atol=1e-3)
        hidden = model(tokens, latents)
        close(hidden[shown], recorded[f"{rows}_hidden_last"][shown], atol=5e-3)
        logits = model.lm_head(hidden)[..., ::16]
        close(logits[shown], recorded[f"{rows}_logits_s16"][shown], atol=5e-3)
    close(model.vision_embedding(recorded["emb_latents"]), recorded["emb_out_f64"], atol=1e-5)


# --- Chameleon in the Hub's layout, against transformers -----------------------------------------


def tokenizer_json(vocabulary: dict[str, int]) -> dict:
    """A byte-level BPE like Chameleon's: no merges, and text where the vocabulary has room."""
    special = [name for names in released.SPECIAL.values() for name in names]
    return {
        "version": "1.0",
        "added_tokens": [
            dict(id=vocabulary[name], content=name, single_word=False, lstrip=False, rstrip=False,
                 normalized=False, special=True)
            for name in special if name in vocabulary
        ],  # fmt: skip
        "pre_tokenizer": dict(
            type="ByteLevel", add_prefix_space=False, use_regex=True, trim_offsets=True
        ),
        "decoder": dict(type="ByteLevel", add_prefix_space=True, use_regex=True, trim_offsets=True),
        "model": dict(type="BPE", unk_token="<unk>", vocab=vocabulary, merges=[]),
    }


def full_vocabulary(names: dict[str, int], size: int) -> dict[str, int]:
    """Special names, then one printable character each; a space is the byte-level alphabet's."""
    letters = ["Ġ", *map(chr, range(33, 127))]
    free = [i for i in range(size) if i not in names.values()]
    return names | dict(zip(letters, free, strict=False))


def hub_chameleon(directory: Path, name: str = "chameleon_7b", decoder: bool = True) -> Path:
    """Write what tests/make_fixtures.py recorded, with the recorded autoencoder, as the Hub has it;
    transformers has no decoder, so a random one is added."""
    tensors, config = read_fixture(name)
    autoencoder, _ = read_fixture("vqvae")
    whole = randomise(VQVAE(VQVAEConfig(**VAE))).state_dict() | autoencoder
    whole = {k: whole[k] for k in VQVAE(VQVAEConfig(**VAE)).state_dict()}
    weights = {k: t for k, t in tensors.items() if "." in k}
    for key, tensor in whole.items():
        if decoder or not key.startswith("decoder."):
            weights[f"model.vqmodel.{key}"] = tensor
    directory.mkdir(parents=True)
    config["vocabulary_map"] = full_vocabulary(config["vocabulary_map"], config["vocab_size"])
    tokenizer = tokenizer_json(config["vocabulary_map"])
    config["architectures"] = ["ChameleonForConditionalGeneration"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
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
    assert torch.equal(model.vision_embedding.codes(latents.flatten(0, 1)),
                       recorded["codes"].flatten())  # fmt: skip
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
    edit(hub / "config.json", lambda c: [c.pop(k) for k in ("rms_norm_eps", "rope_theta")])
    legacy = dict(ch=128, ch_mult=[1, 1, 2, 2, 4], n_embed=32, z_channels=16, double_z=False,
                  attn_resolutions=[], out_ch=3)  # fmt: skip
    edit(hub / "config.json", lambda c: c.update(vq_config=legacy))
    config = open_checkpoint(hub).config
    assert config["model"]["rms_norm_eps"] == 1e-5 and config["model"]["rope_theta"] == 1e4
    assert VQVAEConfig(**config["vae"]) == VQVAEConfig(latent_channels=16, num_codes=32)
    edit(hub / "config.json", lambda c: c.update(rope_parameters={"rope_theta": 5e5}))
    assert open_checkpoint(hub).config["model"]["rope_theta"] == 5e5


# --- Autoencoders from elsewhere -----------------------------------------------------------------


def test_a_missing_decoder_names_vae_and_where_there_is_one(tmp_path):
    facebook = hub_chameleon(tmp_path / "facebook", decoder=False)
    message = complaint(lambda: sample.load(facebook))
    for said in ("--vae", "leloykun/Anole-7b-v0.1-hf", "leloykun/Anole-7b-v0.1-vqvae-hf", "SJTU"):
        assert said in message


def write_vqgan(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = weights | {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 3}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text("model:\n  params:\n    ddconfig:\n      resolution: 32\n")
    return folder / "vqgan.ckpt"


def test_metas_autoencoder_without_its_yaml_is_the_releases_of_512_pixels(tmp_path, chameleon):
    path = write_vqgan(tmp_path, VQVAE.from_pretrained(chameleon).state_dict())
    path.with_name("vqgan.yaml").unlink()
    assert released.read_vqgan(path)[0].resolution == 512


@pytest.mark.parametrize("kind", ["alone", "hub", "ours", "ckpt", "folder of ckpt"])
def test_the_autoencoder_may_come_from_anywhere(tmp_path, chameleon, kind):
    facebook = hub_chameleon(tmp_path / "facebook", decoder=False)
    vae, other = VQVAE.from_pretrained(chameleon), tmp_path / "other"
    if kind == "alone":
        other.mkdir()
        save_file(vae.state_dict(), other / MODEL)
        hub = json.loads((chameleon / "config.json").read_text())["vq_config"]
        (other / "config.json").write_text(json.dumps(hub | {"model_type": "chameleon_vqgan"}))
    elif kind == "ours":
        checkpoint.write(other, {"vae": dataclasses.asdict(vae.config)}, vae=vae.state_dict())
    elif kind == "hub":
        other = chameleon
    else:
        write_vqgan(other, vae.state_dict())
        other = other / "vqgan.ckpt" if kind == "ckpt" else other
    loaded = sample.load(facebook, vae=other).vae
    assert loaded.config == vae.config
    assert_same(loaded.state_dict(), vae.state_dict())
    released.convert(facebook, tmp_path / "whole", vae=other)
    assert_same(sample.load(tmp_path / "whole").vae.state_dict(), vae.state_dict())


def test_an_autoencoder_that_does_not_fit_the_model_is_named(chameleon, tmp_path):
    config = VQVAEConfig(**VAE | dict(num_codes=16, resolution=64))
    vae = VQVAE(config)
    checkpoint.write(tmp_path, {"vae": dataclasses.asdict(config)}, vae=vae.state_dict())
    assert "--vae" in complaint(lambda: sample.load(chameleon, vae=tmp_path))


def test_an_autoencoder_alone_is_no_model(tmp_path):
    save_file(VQVAE(VQVAEConfig(**VAE)).state_dict(), tmp_path / MODEL)
    (tmp_path / "config.json").write_text('{"model_type": "chameleon_vqgan"}')
    assert "no section 'model'" in complaint(lambda: Orthus.from_pretrained(tmp_path))


# --- Meta's layout -------------------------------------------------------------------------------


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves to pairs, one row at a time: written apart from the reader."""
    out, width = torch.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = rows[head * width + i]
            out[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return out


def meta_names(model: Orthus) -> dict[str, Tensor]:
    """All tensors of a whole model under Meta's names; q/k norms [heads, width]."""
    weights, config = model.state_dict(), model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    meta = {
        "tok_embeddings.weight": weights["embed_tokens.weight"],
        "norm.weight": weights["norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    plain = {
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        here = f"layers.{i}."
        for theirs, ours in plain.items():
            meta[f"{here}{theirs}.weight"] = weights[f"{here}{ours}.weight"]
        for letter, count in (("q", heads), ("k", kv)):
            rows = weights[f"{here}self_attn.{letter}_proj.weight"]
            meta[f"{here}attention.w{letter}.weight"] = interleave(rows, count)
            for kind in ("weight", "bias"):
                norm = weights[f"{here}self_attn.{letter}_norm.{kind}"]
                rows = torch.stack([interleave(row, 1) for row in norm])
                meta[f"{here}attention.{letter}_normalization.{kind}"] = rows
    return meta


def cut(name: str, tensor: Tensor, shard: int, shards: int) -> Tensor:
    """The part of a whole tensor that a model-parallel shard holds."""
    if "_normalization" in name:  # one row for all heads of the shard
        return tensor[shard * len(tensor) // shards].clone()
    if name.endswith("norm.weight"):  # copies that have drifted apart, about their mean
        return tensor + (shard - (shards - 1) / 2) / 64
    along_columns = any(part in name for part in ("wo", "w2", "tok_embeddings"))
    return tensor.chunk(shards, 1 if along_columns else 0)[shard].clone()


def write_meta(top: Path, model: Orthus, vae: VQVAE, vocabulary: dict, shards: int) -> Path:
    """Meta's download: models/x and tokenizer/ -> models/x."""
    folder, config = top / "models" / "x", model.config
    folder.mkdir(parents=True)
    whole = meta_names(model)
    for i in range(shards):
        part = {name: cut(name, t, i, shards) for name, t in whole.items()}
        part["rope.freqs"] = torch.zeros(4)
        name = "consolidated.pth" if shards == 1 else f"consolidated.{i:02d}.pth"
        torch.save(part, folder / name)
    params = dict(dim=config.hidden_size, n_layers=config.num_hidden_layers,
                  n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
                  norm_eps=1e-5, rope_theta=10000.0, swin_norm=config.swin_norm)  # fmt: skip
    (folder / "params.json").write_text(json.dumps({"model": params}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    write_vqgan(top / "tokenizer", vae.state_dict())
    vocabulary = {"<reserved08707>" if k == "<image>" else k: i for k, i in vocabulary.items()}
    (top / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    return folder


META_MODEL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, num_codes=32, latent_channels=16,
    latents_per_image=16, vision_embedding="argmin", image_head="tokens",
    eoi_id=36, boi_id=37, sep_id=38, image_id=39,
)  # fmt: skip


def meta_model(shards: int, dtype: torch.dtype = torch.float32) -> tuple[Orthus, VQVAE]:
    """A random whole model whose q/k norms are the same for all heads of a shard."""
    model = randomise(Orthus(OrthusConfig(**META_MODEL, swin_norm=shards > 1)))
    vae = randomise(VQVAE(VQVAEConfig(**VAE)))
    state = model.state_dict()
    for name, tensor in state.items():
        if "q_norm" in name or "k_norm" in name:
            share = len(tensor) // shards
            tensor.copy_(tensor[::share].repeat_interleave(share, 0))
    state["vision_embedding.codebook.weight"].copy_(vae.quantize.embedding.weight)
    return model.to(dtype), vae.to(dtype)


@pytest.fixture(params=[1, 4], ids=["one shard", "four shards"])
def meta(request, tmp_path, chameleon):
    model, vae = meta_model(request.param)
    vocabulary = released.read_vocabulary(chameleon / "tokenizer.json")
    return write_meta(tmp_path / "meta", model, vae, vocabulary, request.param), model, vae


@pytest.mark.parametrize("given", ["models/x", "the directory above"])
def test_metas_layout_opens_as_the_model_it_was_made_from(meta, given):
    folder, model, vae = meta
    directory = folder if given == "models/x" else folder.parent.parent
    again = Orthus.from_pretrained(directory)
    assert again.config == model.config
    for name, wanted in model.state_dict().items():
        close(again.state_dict()[name], wanted, atol=1e-6)
    assert_same(VQVAE.from_pretrained(directory).state_dict(), vae.state_dict())


@torch.no_grad()
def test_metas_attention_is_kept_by_the_conversion(meta):
    """Scores of a head from Meta's own rows and RoPE on pairs, as complex numbers."""
    folder, _, _ = meta
    model = Orthus.from_pretrained(folder)
    shard = torch.load(sorted(folder.glob("*.pth"))[0], weights_only=True)
    x, layer, width = randn(5, 64), model.layers[0].self_attn, 8
    frequencies = 10000.0 ** -(torch.arange(0, width, 2) / width)
    turns = torch.polar(torch.ones(5, 4), torch.arange(5.0)[:, None] * frequencies)

    def turned(letter: str) -> Tensor:  # (5, 4) complex: the first head
        rows = shard[f"layers.0.attention.w{letter}.weight"][:width]
        norm = [shard[f"layers.0.attention.{letter}_normalization.{k}"] for k in ("weight", "bias")]
        norm = [n[0] if n.ndim == 2 else n for n in norm]
        vectors = torch.nn.functional.layer_norm(x @ rows.T, (width,), *norm)
        return torch.view_as_complex(vectors.unflatten(-1, (-1, 2)).contiguous()) * turns

    wanted = (turned("q") @ turned("k").conj().T).real
    cos, sin = rope(torch.arange(5)[None], width, 10000.0)
    q = rotate(layer.q_norm(layer.q_proj(x[None]).unflatten(-1, (-1, width))), cos, sin)
    k = rotate(layer.k_norm(layer.k_proj(x[None]).unflatten(-1, (-1, width))), cos, sin)
    close(q[0, :, 0] @ k[0, :, 0].T, wanted, atol=1e-4)


def test_meta_to_ours_to_the_hub_and_back_is_bitwise(meta, tmp_path, run):
    folder, _, _ = meta
    ours, hub, again = (tmp_path / name for name in ("ours", "hub", "again"))
    assert run(folder, ours)[0] == 0
    assert run(ours, hub, "--layout", "hub")[0] == 0
    assert run(hub, f"{again}/")[0] == 0  # as a shell completes it
    opened = open_checkpoint(folder)
    for directory in (ours, hub, again):
        for name, kind in (("model", OrthusConfig), ("vae", VQVAEConfig)):
            other = open_checkpoint(directory)
            assert_same(other.tensors(name), opened.tensors(name))
            assert kind(**other.section(name)) == kind(**opened.section(name))
    text = "a <image> and <racm3:break>"
    ids = {tuple(data.Tokenizer.from_pretrained(d).encode(text)) for d in (folder, ours, hub)}
    assert len(ids) == 1
    assert json.loads((hub / "tokenizer.json").read_text())["post_processor"]  # puts <s> in front
    pixels = json.loads((hub / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == pixels["image_std"] == [1.0] * 3 and pixels["resample"] == 1
    names = released.read_vocabulary(hub / "tokenizer.json")
    assert names["<image>"] == 39 and "<reserved08707>" not in names


def test_a_bf16_checkpoint_stays_bf16(tmp_path, chameleon):
    model, vae = meta_model(4, torch.bfloat16)
    vocabulary = released.read_vocabulary(chameleon / "tokenizer.json")
    folder = write_meta(tmp_path / "meta", model, vae, vocabulary, 4)
    assert {p.dtype for p in Orthus.from_pretrained(folder).parameters()} == {torch.bfloat16}


# --- Conversion ----------------------------------------------------------------------------------


@pytest.fixture
def run(run_main):
    return functools.partial(run_main, released)


def test_what_the_hubs_layout_cannot_say_is_refused_all_at_once(chameleon, tmp_path):
    opened = open_checkpoint(chameleon)
    fields, sizes = opened.section("model"), opened.section("vae")
    model, vae, tokenizer = opened.tensors("model"), opened.tensors("vae"), opened.tokenizer
    other = {"model": fields | dict(image_head="diffusion", vision_embedding="softmax", tau=0.5,
                                    latent_scale=0.7), "vae": sizes | dict(groups=1)}  # fmt: skip
    blank = vae | {"quantize.embedding.weight": torch.zeros(32, 16)}
    mixed = {"model": fields | dict(vision_embedding="softmax"), "vae": sizes}
    pieces = tmp_path / "tokenizer.model"
    for parts, wanted in (
        ((other, model, vae, tokenizer), ("groups", "tau", "latent_scale")),
        ((mixed, model, vae, tokenizer), ("softmax + tokens",)),
        ((opened.config, model, blank, tokenizer), ("codebook",)),
        ((opened.config, model, vae, pieces), ("tokenizer.model",)),
    ):
        message = complaint(lambda parts=parts: released.write_hub(tmp_path / "hub", *parts))
        assert all(word in message for word in wanted)


def test_a_source_that_lacks_a_tensor_is_not_converted(hub, tmp_path, run):
    rewrite(hub / MODEL, lambda tensors: tensors.pop("model.vqmodel.decoder.conv_in.bias"))
    code, out, said = run(hub, tmp_path / "x")
    assert code == 2 and out == "" and said.count("\n") == 1 and "decoder.conv_in.bias" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError(28, "full"), 2)])
@pytest.mark.parametrize("layout", ["ours", "hub"])
def test_an_interrupted_conversion_leaves_nothing(
    chameleon, tmp_path, run, monkeypatch, error, code, layout
):
    def stop(path, content):
        raise error

    monkeypatch.setattr(checkpoint, "write_json", stop)  # when the tensors are written already
    got, out, said = run(chameleon, tmp_path / "x", "--layout", layout)
    assert (got, out, said.count("\n")) == (code, "", 1)
    assert not list(tmp_path.iterdir())


BAD_CALLS = {
    "nothing": ([], "SRC"),
    "no such directory": (["/nowhere", "x"], "nowhere"),
    "unknown layout": (["a", "b", "--layout", "onnx"], "onnx"),
    "a target that is there": (["{hub}", "{hub}"], "copy"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_one_line_and_exit_code_2(run, hub, case):
    args, wanted = BAD_CALLS[case]
    code, out, said = run(*(arg.format(hub=hub) for arg in args))
    assert code == 2 and out == "" and wanted in said and said.count("\n") == 1


def test_text_never_becomes_special_tokens_or_image_codes(chameleon):
    tokenizer = data.Tokenizer.from_pretrained(chameleon)
    text = "a<image>b IMGIMGAZ c<racm3:break><reserved08706>"
    ids = tokenizer.encode(text)
    config = OrthusConfig(**open_checkpoint(chameleon).section("model"))
    assert not {i for i in ids if i < config.image_id + 1}  # not even the unknown: all is spelled
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text * 3000)) == text * 3000
    special = [config.bos_id, config.boi_id, 4, 35, config.image_id, config.sep_id, config.pad_id]
    assert tokenizer.decode([*special, *ids, *special]) == text


# --- Damage --------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def swap(names: tuple[str, str], vocabulary: dict) -> None:
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]


@pytest.mark.parametrize("where", ["tokenizer", "config", "both"])
@pytest.mark.parametrize(
    "names", [("IMGIMGAZ", "IMGIMGBHZ"), ("<s>", "<pad>"), ("<eoss>", "<racm3:break>")]
)
def test_another_order_of_ids_is_named(hub, where, names):
    if where != "config":
        vocabulary = released.read_vocabulary(hub / "tokenizer.json")
        swap(names, vocabulary)
        (hub / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    if where != "tokenizer":
        edit(hub / "config.json", lambda c: swap(names, c["vocabulary_map"]))
    if where == "both" and names[0] == "<eoss>":
        edit(hub / "config.json", lambda c: c.update(boi_token_id=37))  # as the Orthus release has
    message = complaint(lambda: open_checkpoint(hub))
    assert "tokenizer.json" in message or "config.json" in message
    assert any(said in message for said in (names[0], "eoi_id", "boi_id"))


def test_the_released_vocabulary_has_the_released_ids():
    names = {n[0]: released.RELEASED[f] for f, n in released.SPECIAL.items()}
    names |= {released.code_name(k): 4 + k for k in range(8192)}
    assert names["IMGIMGIBJBZ"] == 4 + 8191
    assert released.token_ids(names, 8192, "x") == released.RELEASED
    swap(("<reserved08706>", "<image>"), names)
    swap(("IMGIMGIBJBZ", "IMGIMGIBJAZ"), names)
    message = complaint(lambda: released.token_ids(names, 8192, "x"))
    for said in ("<reserved08706> has id 8711", "<image> has id 8710", "IMGIMGIBJAZ", "2 of 8192"):
        assert said in message


CONFIG_DAMAGE = {  # change of the Hub's config.json, what the message names besides the file
    **{f"{value!r:.12} as {name}": ({name: value}, name)
       for name in ("hidden_size", "num_hidden_layers", "rms_norm_eps")
       for value in ("64", [], -1, 0, 1e300, True)},
    "no vq_config": ({"vq_config": 3}, "vq_config"),
    "text as resolution": ({"vq_config": {"resolution": "32"}}, "resolution"),
    "no levels": ({"vq_config": {"channel_multiplier": []}}, "channel_multiplier"),
    "a number as levels": ({"vq_config": {"ch_mult": 4}}, "channel_multiplier"),
    "text as embed_dim": ({"vq_config": {"embed_dim": "x"}}, "latent_channels"),
    "rope_parameters": ({"rope_parameters": [1]}, "rope_parameters"),
    "vocabulary_map of text": ({"vocabulary_map": {"<s>": "0"}}, "vocabulary_map"),
    "vocabulary_map of lists": ({"vocabulary_map": {"<s>": []}}, "vocabulary_map"),
    "vocabulary_map a list": ({"vocabulary_map": ["<s>"]}, "vocabulary_map"),
    "boi_token_id": ({"boi_token_id": "x"}, "boi_id"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act"),
    "hidden_act a list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "attention_bias": ({"attention_bias": True}, "attention_bias"),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    "rope_type": ({"rope_parameters": {"rope_type": "linear"}}, "rope_type"),
    "double_z": ({"vq_config": {"double_z": True}}, "double_z"),
    "attn_resolutions": ({"vq_config": {"attn_resolutions": [16]}}, "attn_resolutions"),
    "embed_dim": ({"vq_config": {"embed_dim": 8, "z_channels": 16}}, "embed_dim"),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_a_damaged_config_of_the_hub_is_named(hub, case):
    change, wanted = CONFIG_DAMAGE[case]
    edit(hub / "config.json", lambda c: c.update(change))
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert wanted in message and str(hub) in message


CONTENTS = {"empty": b"", "cut": b'{"model": {"vo', "deep": b"[" * 10**5, "no UTF-8": b"\xff{}",
            "list": b"[]", "null model": b'{"model": null}',
            "text id": b'{"model": {"vocab": {"<s>": "0"}}}',
            "tokens": b'{"model": {"vocab": {}}, "added_tokens": [3]}'}  # fmt: skip


@pytest.mark.parametrize("content", [*CONTENTS, "pipe"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", MODEL])
def test_a_file_that_is_none_is_named(hub, name, content):
    (hub / name).unlink()
    os.mkfifo(hub / name) if content == "pipe" else (hub / name).write_bytes(CONTENTS[content])
    opens = Orthus.from_pretrained  # a pipe for a tokenizer is as if there were none
    opens = data.Tokenizer.from_pretrained if name == "tokenizer.json" else opens
    assert hub.name in complaint(lambda: opens(hub))


def test_missing_tokens_are_all_named(hub):
    gone = ("<eoss>", "<reserved08706>", "<image>", "IMGIMGBCZ")
    edit(hub / "config.json", lambda c: [c["vocabulary_map"].pop(name) for name in gone])
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert all(name in message for name in gone)
    (hub / "tokenizer.json").unlink()
    edit(hub / "config.json", lambda c: c.pop("vocabulary_map"))
    assert "vocabulary_map" in complaint(lambda: Orthus.from_pretrained(hub))


@pytest.mark.parametrize("half", ["model.codebook_in.weight", "mlp_head.input_proj.bias"])
def test_half_an_orthus_is_not_taken_for_a_chameleon(hub, half):
    rewrite(hub / MODEL, lambda tensors: tensors.update({half: torch.zeros(32, 16)}))
    assert "missing image_head.cond_embed" in complaint(lambda: Orthus.from_pretrained(hub))


class Evil:
    """Makes a file when it is unpickled by anything that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def damage_meta(folder: Path, case: str) -> str:
    """Break one thing of Meta's layout -> what the error must say."""
    shards = sorted(folder.glob("*.pth"))
    if case == "code":
        torch.save({"layers.0.attention.wo.weight": Evil(folder / "ran")}, shards[0])
    elif case == "truncated":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-2000])
        return shards[-1].name
    elif case == "not a dictionary":
        torch.save(torch.zeros(3), shards[0])
    elif case == "other tensors":
        torch.save({"a": torch.zeros(3)}, shards[0])
    elif case == "missing shard":
        shards[-1].unlink()
        return "consolidated"
    elif case == "names":
        torch.save({"layers.0.attention.wo.weight": torch.zeros(64, 16)}, shards[0])
        return "consolidated"
    elif case in PARAMS:
        (folder / "params.json").write_text(json.dumps({"model": PARAMS[case]}))
        return "params.json"
    elif case == "tokenizer":
        (folder.parent.parent / "tokenizer" / "text_tokenizer.json").unlink()
        return "tokenizer"
    elif case == "vqgan":
        torch.save({"state_dict": {}}, folder.parent.parent / "tokenizer" / "vqgan.ckpt")
        return "vqgan.ckpt"
    return shards[0].name


HEADS = {"n_heads": 8, "n_layers": 2}
PARAMS = {
    "text": HEADS | {"n_heads": "8"}, "null": None, "list": [], "huge": HEADS | {"n_layers": 10**9},
    "negative": HEADS | {"n_heads": -8}, "text as eps": HEADS | {"norm_eps": "x"},
    "list of groups": HEADS | {"n_kv_heads": [4]}, "no heads": {"dim": 64},
}  # fmt: skip
META_DAMAGE = (*PARAMS, "code", "truncated", "not a dictionary", "other tensors", "missing shard",
               "names", "tokenizer", "vqgan")  # fmt: skip


@pytest.mark.parametrize("case", META_DAMAGE)
def test_broken_meta_checkpoints_are_named(meta, case):
    folder, _, _ = meta
    said = damage_meta(folder, case)
    assert said in complaint(lambda: Orthus.from_pretrained(folder))
    assert not (folder / "ran").exists()


def test_unknown_and_missing_names_of_meta_are_listed(meta):
    folder, _, _ = meta
    for path in folder.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        del shard["norm.weight"], shard["layers.1.attention.wq.weight"]
        torch.save(shard | {"layers.0.wings.weight": torch.zeros(2)}, path)
    message = complaint(lambda: Orthus.from_pretrained(folder))
    assert "missing layers.1.self_attn.q_proj.weight" in message
    assert "unexpected layers.0.wings.weight" in message


def test_several_models_of_meta_must_be_told_apart(meta):
    folder, _, _ = meta
    shutil.copytree(folder, folder.parent / "y")
    assert "several" in complaint(lambda: Orthus.from_pretrained(folder.parent.parent))
