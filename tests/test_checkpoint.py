"""checkpoint.py: every layout of released checkpoints, and what the released code computes on them.

Recordings of the released Orthus on a tiny random model come first: its diffusion head and 100-step
DDIM from tests/fixtures, the rest from the folder that ORTHUS_GOLDEN names. Then Chameleon against
transformers, Meta's layout against a conversion of our own, the tokenizer, and broken checkpoints.
"""

import dataclasses
import functools
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, complaint, randn, randomise, read_fixture
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import data
import sample
import train
from orthus import DiffusionHead, Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

GOLDEN = Path(os.environ.get("ORTHUS_GOLDEN", "/nowhere"))
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="ORTHUS_GOLDEN names no folder of recordings"
)
VAE = dict(
    resolution=32, base_channels=32, channel_multiplier=(1, 1, 2, 1), num_res_blocks=1,
    latent_channels=16, num_codes=32,
)  # fmt: skip

# --- The released Orthus: recordings -------------------------------------------------------------


@pytest.fixture(scope="module")
def head() -> tuple[DiffusionHead, dict[str, Tensor]]:
    tensors, _ = read_fixture("golden_head")
    weights = {k.removeprefix("mlp_head."): t for k, t in tensors.items() if "mlp_head" in k}
    head = DiffusionHead(OrthusConfig(hidden_size=64, num_attention_heads=4, head_width=256,
                                      num_key_value_heads=4))  # fmt: skip
    head.load_state_dict(weights)
    return head, tensors


@torch.no_grad()
def test_the_diffusion_head_is_the_released_one(head):
    head, recorded = head
    noisy, t, hidden = recorded["x"], recorded["t"], recorded["c"]
    close(head(noisy, t, hidden), recorded["out"], atol=1e-4)
    close(head.time_embed(t), recorded["time_embed"], atol=1e-4)
    y = head.time_embed(t) + head.cond_embed(hidden)
    close(y, recorded["y"], atol=1e-4)
    block = head.res_blocks[0](head.input_proj(noisy), head.modulations(y)[0])
    close(block, recorded["block0_out"], atol=1e-4)


GUIDANCE = {"b1": (1.0,), "b2": (5.0, -4.0), "b3": (7.5, 1.5 - 7.5, 1 - 1.5)}


@pytest.mark.parametrize("rows", GUIDANCE)
def test_100_ddim_steps_are_the_released_ones(head, rows):
    """No guidance, CFG 5, and editing's three contexts: text 7.5, image 1.5."""
    head, recorded = head
    z, noise = recorded[f"{rows}.z"], recorded[f"{rows}.noise"]
    latents = head.sample(z[None], GUIDANCE[rows], 100, noise)
    close(latents.expand(len(z), -1), recorded[f"{rows}.latents"], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", GUIDANCE)
def test_every_recorded_ddim_step_is_the_released_one(head, rows):
    head, recorded = head
    z, x = recorded[f"{rows}.z"], recorded[f"{rows}.noise"]
    weights, steps = torch.tensor(GUIDANCE[rows])[:, None], recorded["step_indices"].tolist()
    for i, (t, a, b) in enumerate(head.schedule.ddim(100)):
        output = head(x.expand(len(z), -1), torch.full((len(z),), t), z)
        velocity = (weights * output).sum(0, keepdim=True)
        x = a * x + b * velocity
        if i in steps:
            k = steps.index(i)
            close(velocity, recorded[f"{rows}.v_at_step"][k], atol=1e-4)
            close(x, recorded[f"{rows}.x_after_step"][k], atol=1e-4)


@pytest.fixture(scope="module")
def released() -> tuple[Orthus, dict[str, Tensor]]:
    return Orthus.from_pretrained(GOLDEN / "ckpt"), load_file(GOLDEN / "mixed.safetensors")


@needs_golden
@torch.no_grad()
@pytest.mark.parametrize("rows", ["one", "two", "batch"])
def test_mixed_sequences_give_the_released_hidden_states(released, rows):
    """Image and text, two images, a batch padded on the left whose last row has no image."""
    model, recorded = released
    tokens, latents = recorded[f"{rows}_input_ids"], recorded[f"{rows}_image_latents"]
    counts = (tokens == model.config.image_id).sum(1)
    latents = torch.cat([row[:n] for row, n in zip(latents, counts, strict=True)])
    shown = tokens != model.config.pad_id
    embedded, hidden = model.embed(tokens, latents), model(tokens, latents)
    close(embedded[shown], recorded[f"{rows}_inputs_embeds"][shown], atol=1e-3)
    close(hidden[shown], recorded[f"{rows}_hidden_last"][shown], atol=5e-3)
    exact = model.transformer(recorded[f"{rows}_inputs_embeds"], shown)  # from their embeddings
    close(exact[shown], recorded[f"{rows}_hidden_last"][shown], atol=1e-4)
    logits = model.lm_head(hidden)[..., ::16]
    close(logits[shown], recorded[f"{rows}_logits_s16"][shown], atol=5e-3)
    if (counts == 0).any():  # without an image nothing of the soft embedding's rounding is in it
        text = shown & (counts == 0)[:, None]
        close(hidden[text], recorded[f"{rows}_hidden_last"][text], atol=1e-4)


@needs_golden
@torch.no_grad()
def test_soft_embeddings_are_the_released_ones(released):
    model, recorded = released
    embedding, latents = model.vision_embedding, recorded["emb_latents"]
    close(embedding(latents), recorded["emb_out"], atol=2e-3)  # theirs is 1e-3 from the exact one
    close(embedding(latents), recorded["emb_out_f64"], atol=1e-5)
    assert torch.equal(embedding.codes(latents), recorded["emb_top1"])
    weights = embedding.logits(latents).softmax(-1)
    close(weights.amax(-1), recorded["emb_top1_p"], rtol=5e-3)
    close(1 / weights.square().sum(-1), recorded["emb_eff"], rtol=5e-3)


@needs_golden
def test_an_orthus_directory_opens_with_the_releases_settings():
    config = checkpoint.read_config(GOLDEN / "ckpt")
    model, generation = OrthusConfig(**config["model"]), config["generation"]
    assert (model.vision_embedding, model.image_head) == ("softmax", "diffusion")
    assert (model.head_width, model.head_blocks, model.latents_per_image) == (256, 3, 16)
    assert (model.prediction, model.zero_terminal_snr) == ("velocity", True)
    assert (model.latent_scale, model.tau, model.bos_id) == (0.1, 1.0, 0)
    assert (generation["steps"], generation["cfg_scale"]) == (100, 5.0)
    assert generation["unconditional"] == "Generate an image." and generation["image_first"]
    assert generation["interleaved"] == {"unconditional": "generate images", "cfg_scale": 3.0}
    assert generation["max_tokens"] >= model.latents_per_image + 3


@needs_golden
def test_an_orthus_directory_samples_and_survives_the_hubs_layout(tmp_path):
    pipeline = sample.load(GOLDEN / "ckpt")
    request = [sample.Request([data.Segment("a red fox")])]
    answer = sample.generate(pipeline, request, steps=2, max_tokens=20, progress=False)[0]
    assert answer.images[0].size == (16, 16)
    checkpoint.convert(GOLDEN / "ckpt", tmp_path / "ours")
    checkpoint.convert(tmp_path / "ours", tmp_path / "hub", "hub")
    wanted = checkpoint.read_tensors(GOLDEN / "ckpt" / checkpoint.MODEL)
    got = checkpoint.read_tensors(tmp_path / "hub" / checkpoint.MODEL)
    assert_same(got, wanted)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


# --- Chameleon in the Hub's layout, against transformers -----------------------------------------


def tokenizer_json(vocabulary: dict[str, int]) -> dict:
    """A byte-level BPE like Chameleon's: no merges, and text where the vocabulary has room."""
    special = [name for names in checkpoint.SPECIAL.values() for name in names]
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
    checkpoint.write_tensors(directory / checkpoint.MODEL, weights)
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
    assert not pipeline.defaults["image_first"]
    assert not sample.generate(pipeline, request, max_tokens=5, progress=False)[0].images
    pipeline.defaults["image_first"] = True
    drawn = sample.generate(pipeline, request, max_tokens=20, progress=False)[0]
    assert drawn.images[0].size == (32, 32)


def test_left_out_entries_of_config_json_are_the_7b_models(hub):
    edit(hub / "config.json", lambda c: [c.pop(k) for k in ("rms_norm_eps", "rope_theta")])
    legacy = dict(ch=128, ch_mult=[1, 1, 2, 2, 4], n_embed=32, z_channels=16, double_z=False,
                  attn_resolutions=[], out_ch=3)  # fmt: skip
    edit(hub / "config.json", lambda c: c.update(vq_config=legacy))
    config = checkpoint.read_config(hub)
    assert config["model"]["rms_norm_eps"] == 1e-5 and config["model"]["rope_theta"] == 1e4
    assert VQVAEConfig(**config["vae"]) == VQVAEConfig(latent_channels=16, num_codes=32)
    edit(hub / "config.json", lambda c: c.update(rope_parameters={"rope_theta": 5e5}))
    assert checkpoint.read_config(hub)["model"]["rope_theta"] == 5e5


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_base_training_turns_a_chameleon_directory_into_orthus(chameleon, tmp_path):
    out = tmp_path / "out"
    given = dict(out=str(out), init=str(chameleon), preset="7b", steps=1, batch_size=2, workers=0,
                 dtype="float32", lr=1e-12)  # fmt: skip
    train.train("base", train.make_config("base", given))
    before, after = Orthus.from_pretrained(chameleon), Orthus.from_pretrained(out)
    assert (after.config.vision_embedding, after.config.image_head) == ("softmax", "diffusion")
    assert (after.config.tau, after.config.latent_scale) == (1.0, 0.1)
    own = {k: t for k, t in after.state_dict().items() if "diffusion_head" not in k}
    for name, tensor in before.state_dict().items():
        close(own[name], tensor, atol=1e-6)  # but for one step at a vanishing rate
    assert own.keys() == before.state_dict().keys()
    assert after.diffusion_head.final_layer.linear.weight.abs().max() < 1e-6  # fresh: gives zero
    defaults = checkpoint.read_config(out)["generation"]
    assert defaults["cfg_scale"] == 5.0 and defaults["image_first"]
    answer = sample.generate(
        sample.load(out), [sample.Request([data.Segment("a fox")])], steps=2, max_tokens=20,
        progress=False,
    )  # fmt: skip
    assert len(answer[0].images) == 1


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


@pytest.mark.parametrize("kind", ["alone", "hub", "ours", "ckpt", "folder of ckpt"])
def test_the_autoencoder_may_come_from_anywhere(tmp_path, chameleon, kind):
    facebook = hub_chameleon(tmp_path / "facebook", decoder=False)
    vae, other = VQVAE.from_pretrained(chameleon), tmp_path / "other"
    if kind == "alone":
        other.mkdir()
        save_file(vae.state_dict(), other / checkpoint.MODEL)
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
    checkpoint.convert(facebook, tmp_path / "whole", vae=other)
    assert_same(sample.load(tmp_path / "whole").vae.state_dict(), vae.state_dict())


def test_an_autoencoder_that_does_not_fit_the_model_is_named(chameleon, tmp_path):
    config = VQVAEConfig(**VAE | dict(num_codes=16, resolution=64))
    vae = VQVAE(config)
    checkpoint.write(tmp_path, {"vae": dataclasses.asdict(config)}, vae=vae.state_dict())
    assert "--vae" in complaint(lambda: sample.load(chameleon, vae=tmp_path))


def test_an_autoencoder_alone_is_no_model(tmp_path):
    save_file(VQVAE(VQVAEConfig(**VAE)).state_dict(), tmp_path / checkpoint.MODEL)
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
    vocabulary = checkpoint.read_vocabulary(chameleon / "tokenizer.json")
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
    from orthus import rope, rotate

    cos, sin = rope(torch.arange(5)[None], width, 10000.0)
    q = rotate(layer.q_norm(layer.q_proj(x[None]).unflatten(-1, (-1, width))), cos, sin)
    k = rotate(layer.k_norm(layer.k_proj(x[None]).unflatten(-1, (-1, width))), cos, sin)
    close(q[0, :, 0] @ k[0, :, 0].T, wanted, atol=1e-4)


def test_meta_to_ours_to_the_hub_and_back_is_bitwise(meta, tmp_path, run):
    folder, _, _ = meta
    ours, hub, again = (tmp_path / name for name in ("ours", "hub", "again"))
    assert run(folder, ours)[0] == 0
    assert run(ours, hub, "--layout", "hub")[0] == 0
    assert run(hub, again)[0] == 0
    for read in (checkpoint.read_model, checkpoint.read_vae):
        fields, tensors = read(folder)
        for directory in (ours, hub, again):
            assert_same(read(directory)[1], tensors)
            kind = OrthusConfig if "vocab_size" in fields else VQVAEConfig
            assert kind(**read(directory)[0]) == kind(**fields)
    text = "a <image> and <racm3:break>"
    ids = {tuple(data.Tokenizer.from_pretrained(d).encode(text)) for d in (folder, ours, hub)}
    assert len(ids) == 1
    assert json.loads((hub / "tokenizer.json").read_text())["post_processor"]  # puts <s> in front
    names = checkpoint.read_vocabulary(hub / "tokenizer.json")
    assert names["<image>"] == 39 and "<reserved08707>" not in names


def test_a_bf16_checkpoint_stays_bf16(tmp_path, chameleon):
    model, vae = meta_model(4, torch.bfloat16)
    vocabulary = checkpoint.read_vocabulary(chameleon / "tokenizer.json")
    folder = write_meta(tmp_path / "meta", model, vae, vocabulary, 4)
    assert {p.dtype for p in Orthus.from_pretrained(folder).parameters()} == {torch.bfloat16}


# --- Writing -------------------------------------------------------------------------------------


@pytest.fixture
def run(run_main):
    return functools.partial(run_main, checkpoint)


def test_large_checkpoints_are_sharded_as_on_the_hub(chameleon, tmp_path, monkeypatch):
    model = Orthus.from_pretrained(chameleon)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    model.save_pretrained(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    count = len(names) - 2
    wanted = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 2 and names == ["config.json", *wanted, "model.safetensors.index.json"]
    assert all((tmp_path / name).stat().st_size < 120_000 for name in wanted)
    again = Orthus.from_pretrained(tmp_path)
    assert_same(again.state_dict(), model.state_dict())
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10**9)
    again.save_pretrained(tmp_path)  # over the shards that it is mapped from
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(Orthus.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_written_files_are_as_readable_as_the_umask_says(chameleon, tmp_path):
    Orthus.from_pretrained(chameleon).save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_the_hubs_layout_cannot_say_is_refused_all_at_once(chameleon, tmp_path):
    fields, model = checkpoint.read_model(chameleon)
    sizes, vae = checkpoint.read_vae(chameleon)
    config = {"model": fields | dict(image_head="diffusion", vision_embedding="softmax", tau=0.5,
                                     latent_scale=0.7), "vae": sizes | dict(groups=1)}  # fmt: skip
    tokenizer = chameleon / "tokenizer.json"
    message = complaint(lambda: checkpoint.write_hub(tmp_path, config, model, vae, tokenizer))
    assert all(word in message for word in ("groups", "tau", "latent_scale"))
    config["model"] = fields
    other = vae | {"quantize.embedding.weight": torch.zeros(32, 16)}
    message = complaint(lambda: checkpoint.write_hub(tmp_path, config, model, other, tokenizer))
    assert "codebook" in message
    config = {"model": fields, "vae": sizes}
    pieces = tmp_path / "tokenizer.model"
    message = complaint(lambda: checkpoint.write_hub(tmp_path, config, model, vae, pieces))
    assert "sentencepiece" in message


def test_a_checkpoint_of_another_layout_is_never_overwritten(hub, chameleon, run):
    model = Orthus.from_pretrained(hub)
    assert "Hub's layout" in complaint(lambda: model.save_pretrained(hub))
    code, _, said = run(chameleon, hub)
    assert code == 2 and "already" in said


BAD_CALLS = {
    "nothing": ([], "SRC"),
    "no such directory": (["/nowhere", "x"], "nowhere"),
    "unknown layout": (["a", "b", "--layout", "onnx"], "onnx"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_one_line_and_exit_code_2(run, case):
    args, wanted = BAD_CALLS[case]
    code, out, said = run(*args)
    assert code == 2 and out == "" and wanted in said and said.count("\n") == 1


# --- Tokenizer and pixels ------------------------------------------------------------------------


def test_text_never_becomes_special_tokens_or_image_codes(chameleon):
    tokenizer = data.Tokenizer.from_pretrained(chameleon)
    text = "a<image>b IMGIMGAZ c<racm3:break><reserved08706>"
    ids = tokenizer.encode(text)
    config = Orthus.from_pretrained(chameleon).config
    assert not {i for i in ids if i < config.image_id + 1}  # not even the unknown: all is spelled
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text * 3000)) == text * 3000
    special = [config.bos_id, config.boi_id, 4, 35, config.image_id, config.sep_id, config.pad_id]
    assert tokenizer.decode([*special, *ids, *special]) == text


@needs_golden
def test_the_released_tokenizer_spells_the_recorded_prompt():
    tokenizer = data.Tokenizer.from_pretrained(GOLDEN / "ckpt")
    recorded = load_file(GOLDEN / "ddim.safetensors")["b1.input_ids"][0].tolist()
    text = tokenizer.decode(recorded)
    config = OrthusConfig(**checkpoint.read_config(GOLDEN / "ckpt")["model"])
    laid_out = data.layout([data.Segment(text)], tokenizer, config).tokens
    assert [*laid_out, config.boi_id] == recorded


def test_pixels_are_exact_or_the_hubs():
    image = Image.new("RGB", (20, 10), (255, 128, 0))
    exact = data.to_tensor(image, 8)[:, 0, 0]
    close(exact, torch.tensor([1.0, 128 / 127.5 - 1, -1.0]), atol=1e-6)
    hub = data.to_tensor(image, 8, hub_pixels=True)[:, 0, 0]
    close(hub, torch.tensor([255 * 0.0078 - 1, 128 * 0.0078 - 1, -1.0]), atol=1e-6)


def test_hub_pixels_change_what_the_model_sees(chameleon, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (32, 32), "white").save(tmp_path / "a.png")
    seen, encode = [], VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda self, x: seen.append(x.max()) or encode(self, x))
    args = ["sample.py", "--checkpoint", str(chameleon), "--image", str(tmp_path / "a.png"),
            "--prompt", "What?", "--max-tokens", "3", "--output", str(tmp_path)]  # fmt: skip
    for extra in ([], ["--hub-pixels"]):
        monkeypatch.setattr(sys, "argv", args + extra)
        sample.main()
    close(torch.stack(seen), torch.tensor([1.0, 0.989]))


# --- Broken checkpoints --------------------------------------------------------------------------


def swap(*names: str):
    """Exchange two ids of a vocabulary."""

    def change(vocabulary: dict) -> None:
        vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]

    return change


def rewrite(path: Path, change) -> None:
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("where", ["tokenizer", "config", "both"])
@pytest.mark.parametrize(
    "names", [("IMGIMGAZ", "IMGIMGBHZ"), ("<s>", "<pad>"), ("<eoss>", "<racm3:break>")]
)
def test_another_order_of_ids_is_named(hub, where, names):
    if where != "config":
        (hub / "tokenizer.json").write_text(json.dumps(tokenizer_json(
            edited(checkpoint.read_vocabulary(hub / "tokenizer.json"), swap(*names))
        )))  # fmt: skip
    if where != "tokenizer":
        edit(hub / "config.json", lambda c: swap(*names)(c["vocabulary_map"]))
    if where == "both" and names[0] == "<eoss>":
        edit(hub / "config.json", lambda c: c.update(boi_token_id=37))  # as the Orthus release has
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert "tokenizer.json" in message or "config.json" in message
    assert any(said in message for said in (names[0], "eoi_id", "boi_id"))


def edited(content: dict, change) -> dict:
    change(content)
    return content


def test_the_released_vocabulary_has_the_released_ids():
    names = {n[0]: checkpoint.RELEASED[f] for f, n in checkpoint.SPECIAL.items()}
    names |= {checkpoint.code_name(k): 4 + k for k in range(8192)}
    assert names["IMGIMGIBJBZ"] == 4 + 8191
    assert checkpoint.token_ids(names, 8192, "x") == checkpoint.RELEASED
    swap("<reserved08706>", "<image>")(names)
    swap("IMGIMGIBJBZ", "IMGIMGIBJAZ")(names)
    message = complaint(lambda: checkpoint.token_ids(names, 8192, "x"))
    assert "<reserved08706> has id 8711, not 8710" in message and "2 of 8192" in message
    assert "<image> has id 8710, not 8711" in message and "IMGIMGIBJAZ" in message


def test_missing_tokens_are_all_named(hub):
    gone = ("<eoss>", "<reserved08706>", "<image>", "IMGIMGBCZ")
    for name in gone:
        edit(hub / "config.json", lambda c, name=name: c["vocabulary_map"].pop(name))
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert all(name in message for name in gone)


def test_neither_tokenizer_nor_vocabulary_is_named(hub):
    (hub / "tokenizer.json").unlink()
    edit(hub / "config.json", lambda c: c.pop("vocabulary_map"))
    assert "vocabulary_map" in complaint(lambda: Orthus.from_pretrained(hub))


def test_a_tokenizer_that_differs_from_our_config_is_named(chameleon, tmp_path):
    checkpoint.convert(chameleon, tmp_path / "ours")
    edit(tmp_path / "ours" / "config.json", lambda c: c["model"].update(sep_id=40))
    message = complaint(lambda: data.Tokenizer.from_pretrained(tmp_path / "ours"))
    assert "sep_id 38, not 40" in message


def test_a_tokenizer_cut_off_is_named(hub):
    path = hub / "tokenizer.json"
    edit(path, lambda c: c["model"].update(merges=[["no", "such"]]))
    assert "tokenizer.json" in complaint(lambda: data.Tokenizer.from_pretrained(hub))
    path.write_text(path.read_text()[:-9])
    assert "tokenizer.json" in complaint(lambda: data.Tokenizer.from_pretrained(hub))


@pytest.fixture
def sharded(hub, monkeypatch) -> Path:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 300_000)
    checkpoint.write_tensors(hub / checkpoint.MODEL, load_file(hub / checkpoint.MODEL))
    assert len(list(hub.glob("model-*"))) > 3
    return hub


def test_missing_shards_are_all_named(sharded):
    gone = sorted(sharded.glob("model-*"))[1:3]
    for path in gone:
        path.unlink()
    message = complaint(lambda: Orthus.from_pretrained(sharded))
    assert all(path.name in message for path in gone)


@pytest.mark.parametrize("left", [0, 7, 0.5, -1])
def test_a_truncated_shard_is_named(sharded, left):
    path = sorted(sharded.glob("model-*"))[2]
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    assert path.name in complaint(lambda: Orthus.from_pretrained(sharded))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "sub/x.safetensors"])
def test_an_index_that_leaves_the_directory_is_refused(sharded, name):
    index = sharded / "model.safetensors.index.json"
    first, second = list(json.loads(index.read_text())["weight_map"])[:2]
    change = {first: name, second: "../" + name}
    edit(index, lambda c: c["weight_map"].update(change))
    message = complaint(lambda: Orthus.from_pretrained(sharded))
    assert "outside" in message and name in message and "../" + name in message


def test_an_index_that_does_not_fit_its_shards_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    edit(index, lambda c: c["weight_map"].pop("model.norm.weight"))
    shard = next(sharded.glob("model-*")).name
    edit(index, lambda c: c["weight_map"].update(surprise=shard))
    message = complaint(lambda: Orthus.from_pretrained(sharded))
    assert "model.norm.weight" in message and f"{shard} lacks surprise" in message
    index.write_text('{"weight_map": 3}')
    assert "weight_map" in complaint(lambda: Orthus.from_pretrained(sharded))


def test_wrong_shapes_and_names_are_all_listed(hub):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.surprise.weight"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(128, 63)

    rewrite(hub / checkpoint.MODEL, change)
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert "missing layers.0.mlp.up_proj.weight" in message
    assert "unexpected layers.1.surprise.weight" in message and "[128, 63]" in message


@pytest.mark.parametrize("half", ["model.codebook_in.weight", "mlp_head.input_proj.bias"])
def test_half_an_orthus_is_not_taken_for_a_chameleon(hub, half):
    rewrite(hub / checkpoint.MODEL, lambda tensors: tensors.update({half: torch.zeros(32, 16)}))
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert "missing diffusion_head.cond_embed.weight" in message


@pytest.mark.parametrize(
    "change",
    [dict(hidden_size="64"), dict(vq_config=dict(resolution="32")),
     dict(vq_config=dict(channel_multiplier=[])), dict(vq_config=dict(ch_mult=4))],
)  # fmt: skip
def test_sizes_that_are_not_numbers_are_named(hub, change):
    edit(hub / "config.json", lambda c: c.update(change))
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert "config.json" in message


def test_norms_that_are_not_finite_are_all_listed(hub):
    names = ("layers.1.input_layernorm.weight", "layers.0.self_attn.q_norm.bias", "norm.weight")

    def change(tensors):
        for name, bad in zip(names, (torch.nan, torch.inf, -torch.inf), strict=True):
            tensors[f"model.{name}"].view(-1)[3] = bad
        tensors["model.vqmodel.encoder.norm_out.bias"][0] = torch.nan

    rewrite(hub / checkpoint.MODEL, change)
    message = complaint(lambda: Orthus.from_pretrained(hub))
    assert all(name in message for name in names)
    assert "encoder.norm_out.bias" in complaint(lambda: VQVAE.from_pretrained(hub))


UNSUPPORTED = {
    "hidden_act": dict(hidden_act="gelu"),
    "attention_bias": dict(attention_bias=True),
    "tie_word_embeddings": dict(tie_word_embeddings=True),
    "rope_scaling": dict(rope_scaling={"type": "linear", "factor": 2}),
    "rope_type": dict(rope_parameters={"rope_type": "linear"}),
    "double_z": dict(vq_config=dict(double_z=True)),
    "attn_resolutions": dict(vq_config=dict(attn_resolutions=[16])),
    "embed_dim": dict(vq_config=dict(embed_dim=8, z_channels=16)),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_config_that_asks_for_more_is_refused(hub, name):
    edit(hub / "config.json", lambda c: c.update(UNSUPPORTED[name]))
    assert name in complaint(lambda: Orthus.from_pretrained(hub))


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
    elif case == "params":
        (folder / "params.json").write_text('{"model": {"dim": 64}}')
        return "n_heads, n_layers"
    elif case == "tokenizer":
        (folder.parent.parent / "tokenizer" / "text_tokenizer.json").unlink()
        return "tokenizer"
    elif case == "vqgan":
        torch.save({"state_dict": {}}, folder.parent.parent / "tokenizer" / "vqgan.ckpt")
        return "vqgan.ckpt"
    return shards[0].name


META_DAMAGE = ("code", "truncated", "not a dictionary", "other tensors", "missing shard", "names",
               "params", "tokenizer", "vqgan")  # fmt: skip


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
