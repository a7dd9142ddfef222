"""A checkpoint of the release, or of ours, into our layout or the Hub's.

    python -m lab.convert SOURCE TARGET [--layout hub] [--vae DIR]

SOURCE is in our layout, in the Hub's (checkpoint.py reads both), or as Meta gives it away:
models/7b/{params.json, consolidated.pth}, models/30b with four shards, and beside models
tokenizer/{text_tokenizer.json, vqgan.ckpt}. --vae takes the autoencoder from elsewhere, as from
Meta's vqgan.ckpt, and so puts a decoder beside a model that has none; an autoencoder alone is
converted as well. Reading order: Meta's transformer, Meta's autoencoder, writing the Hub's layout,
the conversion.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
from checkpoint import CODEBOOK, CONFIG, MODEL, QUANTIZER, Checkpoint, Tensors, read_json
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

# --- Meta's transformer --------------------------------------------------------------------------

META = {  # Meta's module, without "layers.7.": (ours, how its shards join: along a dimension, ..)
    "tok_embeddings": ("embed_tokens", 1),
    "norm": ("norm", "mean"),
    "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", "heads"),
    "attention.wk": ("self_attn.k_proj", "heads"),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "attention.q_normalization": ("self_attn.q_norm", "norm"),
    "attention.k_normalization": ("self_attn.k_norm", "norm"),
    "attention_norm": ("input_layernorm", "mean"),
    "ffn_norm": ("post_attention_layernorm", "mean"),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
}


def read_pth(path: Path) -> dict:
    """The dictionary in a file of torch.save; nothing but tensors and plain containers is read."""
    checkpoint.check_file(path)
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        # what torch says advises to let the file run code
        raise ValueError(f"{path} is not a whole file of tensors alone") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def meta_folder(directory: Path) -> Path | None:
    """The folder of params.json: the directory itself, or the one model under its models/."""
    if (directory / "params.json").is_file():
        return directory
    found = sorted(path.parent for path in directory.glob("models/*/params.json"))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ValueError(f"{directory} holds several models, give one of them: {names}")
    return found[0] if found else None


def meta_shards(folder: Path) -> list[Tensors]:
    """The model-parallel shards, in order: all there, whole, and with the same names."""
    files, key = sorted(folder.glob("consolidated*.pth")), "layers.0.attention.wo.weight"
    if not files:
        raise ValueError(f"{folder} has no consolidated.pth (or consolidated.00.pth and on)")
    shards = [read_pth(path) for path in files]
    for path, shard in zip(files, shards):
        is_tensor = all(isinstance(tensor, Tensor) for tensor in shard.values())
        if not is_tensor or key not in shard or shard[key].ndim != 2:
            raise ValueError(f"{path} is not a dictionary of Chameleon's tensors: no {key}")
        apart = sorted(shard.keys() ^ shards[0].keys())
        if apart:
            raise ValueError(f"{path} and {files[0]} do not hold the same names: {apart}")
    rows, columns = shards[0][key].shape  # a shard holds a share of the columns
    count = max(1, rows // max(1, columns))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(count)]
    names = [path.name for path in files]
    if names != wanted and (names, count) != (["consolidated.pth"], 1):
        raise ValueError(f"{folder} holds {', '.join(names)}; the model's are {', '.join(wanted)}")
    return shards


def meta_fields(source: Path, shards: list[Tensors], vae: VQVAEConfig) -> dict:
    """Fields of OrthusConfig from params.json, `source`, and from the shapes of tensors."""
    params = {}
    for path in (source, source.with_name("consolidate_params.json")):
        params |= read_json(path) if path.is_file() else {}
    params = params.get("model", params)
    if not isinstance(params, dict) or not {"n_heads", "n_layers"} <= params.keys():
        raise ValueError(f"{source} does not say n_heads, n_layers")

    def rows(name: str) -> int:  # 1 where it is missing, which is said when the model is filled
        return len(shards[0].get(name, (0,)))

    return dict(
        vocab_size=rows("tok_embeddings.weight"),
        hidden_size=rows("layers.0.attention.wo.weight"),
        intermediate_size=rows("layers.0.feed_forward.w1.weight") * len(shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rms_norm_eps=params.get("norm_eps") or 1e-5,
        rope_theta=params.get("rope_theta") or 10000.0,
        swin_norm=bool(params.get("swin_norm")),
        num_codes=vae.num_codes,
        latent_channels=vae.latent_channels,
        latents_per_image=vae.latents_per_image,
        vision_embedding="argmin",
        image_head="tokens",
    )


def open_meta(directory: Path, folder: Path) -> Checkpoint:
    """Meta's model in `folder`, with its tokenizer and autoencoder from the folder beside models/;
    its tensors are converted when they are asked for."""
    tokenizers = folder.resolve().parent.parent / "tokenizer"
    shards, path = meta_shards(folder), tokenizers / "text_tokenizer.json"
    vae, vae_tensors = read_vqgan(tokenizers)
    fields = meta_fields(folder / "params.json", shards, vae)
    fields |= checkpoint.token_ids(checkpoint.read_vocabulary(path), vae.num_codes, path)
    model = checkpoint.build(OrthusConfig, fields, folder / "params.json")

    def read(part: str) -> Tensors:
        if part == "vae":
            return vae_tensors
        return meta_model(shards, model, directory) | {CODEBOOK: vae_tensors[QUANTIZER]}

    generation = checkpoint.generation_defaults("tokens", model.latents_per_image, directory)
    config = {"model": vars(model), "vae": vars(vae), "generation": generation}
    return Checkpoint(directory, config, read, path)


def split_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from RoPE's interleaved pairs to its two halves: 0 2 4 .., then 1 3 5 .."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def join_shards(parts: list[Tensor], how, heads: int) -> Tensor:
    """One tensor from its shards. heads: of all shards together, for what RoPE turns."""
    if how == "norm":  # one for all heads of a shard
        share = heads // len(parts)
        return torch.cat([split_halves(part, 1).repeat(share, 1) for part in parts])
    if len(parts) == 1:
        joined = parts[0]  # as it is mapped
    elif how == "mean":
        joined = torch.stack([p.float() for p in parts]).mean(0).to(parts[0].dtype)
    else:
        joined = torch.cat(parts, 0 if how == "heads" else how)
    return split_halves(joined, heads) if how == "heads" else joined


def meta_model(shards: list[Tensors], config: OrthusConfig, directory: Path) -> Tensors:
    """The state dict of Orthus: shards joined, RoPE from interleaved pairs to halves."""
    tensors = {}
    for name in tqdm(shards[0], "converting", leave=False, disable=None):
        layer = re.match(r"(layers\.\d+\.)?", name)[0]
        module, _, kind = name.removeprefix(layer).rpartition(".")
        if module in META:
            ours, how = META[module]
            heads = config.num_key_value_heads if ".k_" in ours else config.num_attention_heads
            try:
                joined = join_shards([shard[name] for shard in shards], how, heads)
            except RuntimeError as error:
                raise ValueError(f"{directory}: {name} cannot be joined ({error})") from None
            tensors[f"{layer}{ours}.{kind}"] = joined
        elif name != "rope.freqs":  # which follows from rope_theta; others: listed as unexpected
            tensors[name] = shards[0][name]
    return tensors


# --- Meta's autoencoder --------------------------------------------------------------------------


def read_vqgan(path: Path) -> tuple[VQVAEConfig, Tensors]:
    """Meta's vqgan.ckpt, or its folder -> sizes and state dict of VQVAE.

    Sizes come from the shapes, the resolution from vqgan.yaml beside it.
    """
    path = path / "vqgan.ckpt" if path.is_dir() else path
    tensors = read_pth(path).get("state_dict")
    needed = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", QUANTIZER)
    if not isinstance(tensors, dict) or any(name not in tensors for name in needed):
        raise ValueError(f"{path} is not Chameleon's autoencoder: want {', '.join(needed)}")
    tensors = {k: t for k, t in tensors.items() if not k.startswith("loss.")}
    base, widths, blocks = len(tensors[needed[0]]), [], 0
    while f"encoder.down.{len(widths)}.block.0.conv1.weight" in tensors:
        widths.append(len(tensors[f"encoder.down.{len(widths)}.block.0.conv1.weight"]))
    while f"encoder.down.0.block.{blocks}.conv1.weight" in tensors:
        blocks += 1
    yaml = path.with_name("vqgan.yaml")
    text = yaml.read_text(encoding="utf-8", errors="replace") if yaml.is_file() else ""
    resolution = re.search(r"^\s*resolution:\s*(\d+)", text, re.MULTILINE)
    fields = dict(resolution=int(resolution[1]) if resolution else 512, base_channels=base)
    fields |= dict(channel_multiplier=[width // base for width in widths], num_res_blocks=blocks)
    fields["num_codes"], fields["latent_channels"] = tensors[QUANTIZER].shape
    return checkpoint.build(VQVAEConfig, fields, path), tensors


def open_any(source: str) -> Checkpoint:
    """Open a checkpoint, or an autoencoder alone, in any of the three layouts."""
    directory = Path(source)
    if not (directory / CONFIG).is_file():
        if directory.is_file() or (directory / "vqgan.ckpt").is_file():
            sizes, tensors = read_vqgan(directory)
            return Checkpoint(directory, {"vae": vars(sizes)}, lambda part: tensors, None)
        folder = meta_folder(directory)
        if folder:
            return open_meta(directory, folder)
    return checkpoint.open_checkpoint(source)


# --- Writing the Hub's layout --------------------------------------------------------------------

HUB_IDS = ("bos", "pad", "eos", "boi", "eoi", "image")  # that config.json names
# what the released code and transformers do whatever the config says: our defaults
HUB_FIXED = ["bos_id", "pad_id", "eos_id", "image_code_start"]
ORTHUS_FIXED = ["latent_scale", "tau", "prediction", "beta_schedule", "zero_terminal_snr"]


def check_fits_hub(model: dict, vae: dict, tensors: Tensors, vae_tensors: Tensors) -> None:
    """Raise ValueError with all that the Hub's layout cannot say."""
    kind, problems, released = (model["vision_embedding"], model["image_head"]), [], OrthusConfig()
    if kind not in (("argmin", "tokens"), ("softmax", "diffusion")):
        problems.append(f"{' + '.join(kind)} is neither Chameleon nor Orthus")
    if vae["groups"] != 32:
        problems.append(f"the autoencoder has {vae['groups']} groups per GroupNorm, theirs have 32")
    for name in HUB_FIXED + (ORTHUS_FIXED if kind[1] == "diffusion" else []):
        theirs = getattr(released, name)
        if model[name] != theirs:
            problems.append(f"{name} is {model[name]!r}, theirs is always {theirs!r}")
    if kind[0] == "argmin" and not torch.equal(tensors[CODEBOOK], vae_tensors[QUANTIZER]):
        problems.append("the codebook of the embedding is not the autoencoder's")
    if problems:
        raise ValueError("the Hub's layout cannot hold this model: " + "; ".join(problems))


def hub_tokenizer(tokenizer: Path) -> dict:
    """A tokenizer.json as transformers wants it: the placeholder under the Hub's name, <s> in front
    of every text."""
    if tokenizer.suffix != ".json":
        raise ValueError(f"the Hub's layout wants a tokenizer.json; {tokenizer} is sentencepiece's")
    content, (name, meta_name) = read_json(tokenizer), checkpoint.SPECIAL["image_id"]
    if name not in checkpoint.read_vocabulary(tokenizer):
        content = json.loads(json.dumps(content).replace(f'"{meta_name}"', f'"{name}"'))
    if not content.get("post_processor"):
        bos, first = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"id": "A", "type_id": 0}
        pair = [bos, {"Sequence": first}, {"Sequence": {"id": "B", "type_id": 1}}]
        processor = dict(type="TemplateProcessing", single=pair[:2], pair=pair)
        processor["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
        content["post_processor"] = processor
    return content


def hub_config(model: dict, vae: dict, vocabulary: dict[str, int], dtype: torch.dtype) -> dict:
    """config.json as the Hub's Chameleon and Orthus have it, today's and legacy names of sizes."""
    names = checkpoint.VQ_NAMES.items()
    vq = {name: vae[field] for field, theirs in names for name in theirs}
    vq |= dict(double_latent=False, in_channels=3, attn_type="vanilla", dropout=0.0)
    config = dict(architectures=["ChameleonForConditionalGeneration"], model_type="chameleon")
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config |= {name: model[name] for name in checkpoint.SAME_NAME}
    config |= dict(hidden_act="silu", attention_bias=False, mlp_bias=False)
    config |= {f"{name}_token_id": model[f"{name}_id"] for name in HUB_IDS}
    return config | dict(tie_word_embeddings=False, vq_config=vq, vocabulary_map=vocabulary)


def hub_extras(latents: int, side: int) -> dict[str, dict]:
    """The small files beside config.json that transformers' processor asks for."""
    tokens = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    tokens |= dict(tokenizer_class="PreTrainedTokenizerFast", sep_token="<reserved08706>")
    processor = dict(processor_class="ChameleonProcessor", image_seq_length=latents)
    pixels = dict(image_processor_type="ChameleonImageProcessor", size={"shortest_edge": side})
    pixels |= dict(crop_size={"height": side, "width": side}, resample=1)  # Lanczos
    pixels |= dict(rescale_factor=0.0078, image_mean=[1.0] * 3, image_std=[1.0] * 3)
    return {
        "tokenizer_config.json": tokens,
        "processor_config.json": processor | {"image_token": "<image>"},
        "preprocessor_config.json": pixels,
    }


def write_hub(directory: Path, config: dict, model: Tensors, vae: Tensors, tokenizer: Path) -> None:
    """Write a Chameleon or an Orthus in the Hub's layout, which transformers and the released code
    read; config has all fields of "model" and "vae"."""
    fields, sizes = config["model"], config["vae"]
    check_fits_hub(fields, sizes, model, vae)
    files = hub_extras(fields["latents_per_image"], sizes["resolution"])
    files["tokenizer.json"] = hub_tokenizer(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        checkpoint.write_json(directory / name, content)
    vocabulary = checkpoint.read_vocabulary(directory / "tokenizer.json")
    ids = checkpoint.token_ids(vocabulary, fields["num_codes"], tokenizer)
    wrong = [name for name in ids if ids[name] != fields[name]]
    if wrong:
        raise ValueError(f"{tokenizer} has other ids than the model: {', '.join(wrong)}")
    tensors = {f"model.vqmodel.{name}": tensor for name, tensor in vae.items()}
    for name, tensor in model.items():
        for theirs, ours in checkpoint.HUB_TO_OURS.items():
            name = name.replace(ours, theirs)
        is_head = name.startswith(("lm_head.", "mlp_head."))
        tensors[name if is_head else f"model.{name}"] = tensor
    if fields["image_head"] == "tokens":
        del tensors["model.codebook_in.weight"]  # it is the quantiser's
    checkpoint.write_tensors(directory / MODEL, tensors)
    dtype = model["embed_tokens.weight"].dtype
    checkpoint.write_json(directory / CONFIG, hub_config(fields, sizes, vocabulary, dtype))


# --- Conversion ----------------------------------------------------------------------------------


def convert(source: str, target: str, layout: str = "ours", vae: str | None = None) -> None:
    """Write `target` from a checkpoint in any layout, the autoencoder from `vae` where given.

    Both are filled into their modules first, which finds whatever is missing before anything is
    written; the target appears when it is whole.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already; give another place")
    opened = open_any(source)
    other = open_any(vae) if vae else opened
    autoencoder = VQVAE.from_pretrained(other)
    config = opened.config | {"vae": vars(autoencoder.config)}
    contents = [config, None, autoencoder.state_dict(), None]
    if "model" in config or layout == "hub":  # else it is an autoencoder alone
        model = Orthus.from_pretrained(opened)
        data.check_fits(model.config, autoencoder.config, other)
        config["model"] = vars(model.config)
        contents = [config, model.state_dict(), autoencoder.state_dict(), opened.tokenizer]
    part = Path(target).with_name(Path(target).name + ".part")
    part.mkdir(parents=True)
    try:
        (write_hub if layout == "hub" else checkpoint.write)(part, *contents)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    use = "--checkpoint" if "model" in config else "--vae"
    print(f"{target} is complete: python sample.py {use} {target} --prompt ..")


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(description="Convert a checkpoint: ours, the Hub's or Meta's.")
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint in any layout")
    parser.add_argument("target", metavar="TARGET", help="the directory to write")
    parser.add_argument("--layout", choices=("ours", "hub"), default="ours", help="default: ours")
    parser.add_argument("--vae", metavar="DIR", help="take the autoencoder from this checkpoint")
    args = parser.parse_args(argv)
    stopped = f"interrupted; {args.target} is not there"
    checkpoint.command_line(lambda: convert(**vars(args)), stopped)


if __name__ == "__main__":
    main()
