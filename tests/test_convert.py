"""lab/convert.py: Meta's layout against a conversion of our own, autoencoders from elsewhere, the
Hub's layout written, and conversions that fail."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import close, complaint, randn, randomise
from safetensors.torch import save_file
from test_hub import VAE_SIZES, assert_same, hub_chameleon, hub_orthus, rewrite, tokenizer_json
from torch import Tensor

import checkpoint
import data
import sample
from checkpoint import CONFIG, MODEL, open_checkpoint
from lab import convert
from orthus import Orthus, OrthusConfig, rope, rotate
from vae import VQVAE, VQVAEConfig


@pytest.fixture
def run(run_main):
    return functools.partial(run_main, convert)


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory) -> Path:
    return hub_chameleon(tmp_path_factory.mktemp("hub") / "chameleon")


def as_ours(directory) -> tuple[Orthus, VQVAE]:
    return Orthus.from_pretrained(directory), VQVAE.from_pretrained(directory)


# --- Meta's layout, written apart from the reader ------------------------------------------------


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves to pairs, one row at a time."""
    out, width = torch.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = rows[head * width + i]
            out[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return out


PLAIN = {"attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj"}
PLAIN |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
PLAIN |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"}
PLAIN |= {"feed_forward.w3": "mlp.up_proj"}


def meta_names(model: Orthus) -> dict[str, Tensor]:
    """All tensors of a whole model under Meta's names; q/k norms [heads, width]."""
    weights, config, meta = model.state_dict(), model.config, {}
    ends = {"tok_embeddings": "embed_tokens", "norm": "norm", "output": "lm_head"}
    for theirs, ours in ends.items():
        meta[f"{theirs}.weight"] = weights[f"{ours}.weight"]
    for i in range(config.num_hidden_layers):
        here = f"layers.{i}."
        for theirs, ours in PLAIN.items():
            meta[f"{here}{theirs}.weight"] = weights[f"{here}{ours}.weight"]
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for letter, count in heads.items():
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


def write_vqgan(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = weights | {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 3}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text("model:\n  params:\n    ddconfig:\n      resolution: 32\n")
    return folder / "vqgan.ckpt"


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
    params = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, norm_eps=1e-5, rope_theta=10000.0)
    params["swin_norm"] = config.swin_norm
    (folder / "params.json").write_text(json.dumps({"model": params}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    write_vqgan(top / "tokenizer", vae.state_dict())
    vocabulary = {"<reserved08707>" if k == "<image>" else k: i for k, i in vocabulary.items()}
    (top / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    return folder


SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=8, num_key_value_heads=4, num_codes=32, latent_channels=16)
SIZES |= dict(latents_per_image=16, vision_embedding="argmin", image_head="tokens")
SIZES |= dict(eoi_id=36, boi_id=37, sep_id=38, image_id=39)


def whole_model(shards: int, dtype: torch.dtype = torch.float32) -> tuple[Orthus, VQVAE]:
    """A random whole model whose q/k norms are the same for all heads of a shard."""
    model = randomise(Orthus(OrthusConfig(**SIZES, swin_norm=shards > 1)))
    vae = randomise(VQVAE(VQVAEConfig(**VAE_SIZES)))
    state = model.state_dict()
    for name, tensor in state.items():
        if "q_norm" in name or "k_norm" in name:
            share = len(tensor) // shards
            tensor.copy_(tensor[::share].repeat_interleave(share, 0))
    state["vision_embedding.codebook.weight"].copy_(vae.quantize.embedding.weight)
    return model.to(dtype), vae.to(dtype)


@pytest.fixture(params=[1, 4], ids=["one shard", "four shards"])
def meta(request, tmp_path, chameleon):
    model, vae = whole_model(request.param)
    vocabulary = checkpoint.read_vocabulary(chameleon / "tokenizer.json")
    return write_meta(tmp_path / "meta", model, vae, vocabulary, request.param), model, vae


@pytest.mark.parametrize("given", ["models/x", "the directory above"])
def test_metas_layout_becomes_the_model_it_was_made_from(meta, tmp_path, run, given):
    folder, model, vae = meta
    directory = folder if given == "models/x" else folder.parent.parent
    assert run(directory, tmp_path / "ours")[0] == 0
    again, autoencoder = as_ours(tmp_path / "ours")
    assert again.config == model.config and autoencoder.config == vae.config
    for name, wanted in model.state_dict().items():
        close(again.state_dict()[name], wanted, atol=1e-6)
    assert_same(autoencoder.state_dict(), vae.state_dict())


def test_metas_folder_elsewhere_comes_with_the_command_that_converts_it(meta):
    folder, _, _ = meta
    tokenizers = folder.parent.parent / "tokenizer"
    for path in (folder, folder.parent.parent, tokenizers, tokenizers / "vqgan.ckpt"):
        message = complaint(lambda path=path: open_checkpoint(path))
        assert f"python -m lab.convert {path}" in message


@torch.no_grad()
def test_metas_attention_is_kept_by_the_conversion(meta):
    """Scores of a head from Meta's own rows and RoPE on pairs, as complex numbers."""
    folder, _, _ = meta
    model = Orthus.from_pretrained(convert.open_any(folder))
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
    ours, theirs, again = (tmp_path / name for name in ("ours", "hub", "again"))
    assert run(folder, ours)[0] == 0
    assert run(ours, theirs, "--layout", "hub")[0] == 0
    assert run(theirs, f"{again}/")[0] == 0  # as a shell completes it
    opened = convert.open_any(folder)
    parts = as_ours(opened)
    for directory in (ours, theirs, again):
        assert [part.config for part in as_ours(directory)] == [part.config for part in parts]
        for name in ("model", "vae"):
            assert_same(open_checkpoint(directory).tensors(name), opened.tensors(name))
    text = "a <image> and <racm3:break>"
    ids = {tuple(data.Tokenizer.from_pretrained(d).encode(text)) for d in (opened, ours, theirs)}
    assert len(ids) == 1
    assert json.loads((theirs / "tokenizer.json").read_text())["post_processor"]  # <s> in front
    pixels = json.loads((theirs / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == pixels["image_std"] == [1.0] * 3 and pixels["resample"] == 1
    names = checkpoint.read_vocabulary(theirs / "tokenizer.json")
    assert names["<image>"] == 39 and "<reserved08707>" not in names


def test_a_bf16_checkpoint_stays_bf16(tmp_path, chameleon, run):
    vocabulary = checkpoint.read_vocabulary(chameleon / "tokenizer.json")
    folder = write_meta(tmp_path / "meta", *whole_model(4, torch.bfloat16), vocabulary, 4)
    assert run(folder, tmp_path / "ours")[0] == 0
    for part in as_ours(tmp_path / "ours"):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


# --- Autoencoders from elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["alone", "hub", "ours", "ckpt", "folder of ckpt"])
def test_a_decoder_from_anywhere_is_put_beside_a_model(tmp_path, chameleon, kind):
    facebook = hub_chameleon(tmp_path / "facebook", decoder=False)
    vae, other = VQVAE.from_pretrained(chameleon), tmp_path / "other"
    if kind == "alone":
        other.mkdir()
        save_file(vae.state_dict(), other / MODEL)
        hub_config = json.loads((chameleon / CONFIG).read_text())["vq_config"]
        (other / CONFIG).write_text(json.dumps(hub_config | {"model_type": "chameleon_vqgan"}))
    elif kind == "ours":
        checkpoint.write(other, {"vae": vars(vae.config)}, vae=vae.state_dict())
    elif kind == "hub":
        other = chameleon
    else:
        path = write_vqgan(other, vae.state_dict())
        other = path if kind == "ckpt" else other
    convert.convert(facebook, tmp_path / "whole", vae=other)
    whole = sample.load(tmp_path / "whole").vae
    assert whole.config == vae.config
    assert_same(whole.state_dict(), vae.state_dict())


def test_an_autoencoder_alone_is_converted_for_vae(tmp_path, chameleon, run):
    facebook = hub_chameleon(tmp_path / "facebook", decoder=False)
    path = write_vqgan(tmp_path, VQVAE.from_pretrained(chameleon).state_dict())
    assert run(path, tmp_path / "eye")[0] == 0
    assert sample.load(facebook, vae=tmp_path / "eye").vae.config == VQVAEConfig(**VAE_SIZES)
    assert run(path, tmp_path / "x", "--layout", "hub")[0] == 2
    path.with_name("vqgan.yaml").unlink()
    assert convert.read_vqgan(path)[0].resolution == 512  # the release's


def test_an_autoencoder_that_does_not_fit_the_model_is_refused(chameleon, tmp_path):
    config = VQVAEConfig(**VAE_SIZES | dict(num_codes=16, resolution=64))
    other = tmp_path / "other"
    checkpoint.write(other, {"vae": vars(config)}, vae=VQVAE(config).state_dict())
    message = complaint(lambda: convert.convert(chameleon, tmp_path / "whole", vae=other))
    assert "num_codes" in message and not (tmp_path / "whole").exists()


# --- The Hub's layout, and conversions that fail -------------------------------------------------


def test_an_orthus_survives_ours_and_the_hubs_layout(tmp_path, run):
    released = hub_orthus(tmp_path / "released")
    assert run(released, tmp_path / "ours")[0] == 0
    assert run(tmp_path / "ours", tmp_path / "hub", "--layout", "hub")[0] == 0
    wanted = checkpoint.read_tensors(released / MODEL)
    assert_same(checkpoint.read_tensors(tmp_path / "hub" / MODEL), wanted)


def test_what_the_hubs_layout_cannot_say_is_refused_all_at_once(chameleon, tmp_path):
    model, autoencoder = as_ours(chameleon)
    fields, sizes = vars(model.config), vars(autoencoder.config)
    tensors, vae = model.state_dict(), autoencoder.state_dict()
    soft = dict(image_head="diffusion", vision_embedding="softmax", tau=0.5, latent_scale=0.7)
    blank = vae | {"quantize.embedding.weight": torch.zeros(32, 16)}
    mixed = fields | dict(vision_embedding="softmax")
    tokenizer, pieces = chameleon / "tokenizer.json", tmp_path / "tokenizer.model"
    for model, sizes, vae, path, wanted in (
        (fields | soft, sizes | dict(groups=1), vae, tokenizer, ("groups", "tau", "latent_scale")),
        (mixed, sizes, vae, tokenizer, ("softmax + tokens",)),
        (fields, sizes, blank, tokenizer, ("codebook",)),
        (fields, sizes, vae, pieces, ("tokenizer.model",)),
    ):
        parts = {"model": model, "vae": sizes}, tensors, vae, path
        message = complaint(lambda parts=parts: convert.write_hub(tmp_path / "hub", *parts))
        assert all(word in message for word in wanted)


def test_a_source_that_lacks_a_tensor_is_not_converted(chameleon, tmp_path, run):
    hub = Path(shutil.copytree(chameleon, tmp_path / "copy"))
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


@pytest.mark.parametrize(
    "args", [[], ["/nowhere", "x"], ["a", "b", "--layout", "onnx"], ["{0}"] * 2]
)
def test_a_bad_call_is_one_line_and_exit_code_2(run, chameleon, args):
    code, out, said = run(*(arg.format(chameleon) for arg in args))
    assert code == 2 and out == "" and said.count("\n") == 1


# --- Damage of Meta's files ----------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled by anything that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


HEADS = {"n_heads": 8, "n_layers": 2}
PARAMS = [None, {"dim": 64}, HEADS | {"n_heads": "8"}, HEADS | {"n_layers": 10**9}]
PARAMS += [HEADS | {"norm_eps": "x"}, HEADS | {"n_kv_heads": [4]}]
DAMAGE = ["code", "truncated", "no dictionary", "other tensors", "missing shard", "apart"]
DAMAGE += ["tokenizer", "vqgan"]


def damage_meta(folder: Path, case: str | int) -> str:
    """Break one thing of Meta's layout -> the name of the file that the error must say."""
    shards, tokenizers = sorted(folder.glob("*.pth")), folder.parent.parent / "tokenizer"
    wo = "layers.0.attention.wo.weight"
    contents = {"code": {wo: Evil(folder / "ran")}, "no dictionary": torch.zeros(3)}
    contents |= {"other tensors": {"a": torch.zeros(3)}, "apart": {wo: torch.zeros(64, 16)}}
    if case in contents:
        torch.save(contents[case], shards[0])
    elif case == "truncated":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-2000])
        return shards[-1].name
    elif case == "missing shard":
        shards[-1].unlink()
    elif isinstance(case, int):
        (folder / "params.json").write_text(json.dumps({"model": PARAMS[case]}))
        return "params.json"
    elif case == "tokenizer":
        (tokenizers / "text_tokenizer.json").unlink()
        return "text_tokenizer.json"
    elif case == "vqgan":
        torch.save({"state_dict": {}}, tokenizers / "vqgan.ckpt")
        return "vqgan.ckpt"
    return "consolidated"


@pytest.mark.parametrize("case", [*DAMAGE, *range(len(PARAMS))])
def test_broken_meta_checkpoints_are_named(meta, case):
    folder, _, _ = meta
    said = damage_meta(folder, case)
    assert said in complaint(lambda: Orthus.from_pretrained(convert.open_any(folder)))
    assert not (folder / "ran").exists()


def test_unknown_and_missing_names_of_meta_are_listed(meta):
    folder, _, _ = meta
    for path in folder.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        del shard["norm.weight"], shard["layers.1.attention.wq.weight"]
        torch.save(shard | {"layers.0.wings.weight": torch.zeros(2)}, path)
    message = complaint(lambda: Orthus.from_pretrained(convert.open_any(folder)))
    assert "missing layers.1.self_attn.q_proj.weight" in message
    assert "unexpected layers.0.wings.weight" in message


def test_several_models_of_meta_must_be_told_apart(meta):
    folder, _, _ = meta
    shutil.copytree(folder, folder.parent / "y")
    assert "several" in complaint(lambda: convert.open_any(folder.parent.parent))
