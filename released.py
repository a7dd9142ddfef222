"""Checkpoints of the releases: the Hub's and Meta's layouts into ours, and ours into the Hub's.

    Hub    config.json, model.safetensors (or shards), tokenizer.json: Chameleon, Anole or Orthus
           (the names of the tensors decide), or an autoencoder alone
    Meta   models/7b/{params.json, consolidated.pth}, tokenizer/{text_tokenizer.json, vqgan.ckpt}

    python released.py SRC DST [--layout hub] [--vae DIR]     writes DST from any readable SRC

Everything is read under our names and our config, with what the released code does as settings;
ids are found by the names of their tokens. Reading order: token ids, the Hub, Meta, writing.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import checkpoint  # first: it answers Ctrl-C while PyTorch is imported

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import CONFIG, MODEL, Checkpoint, Tensors, read_json, read_tensors
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

# --- Token ids -----------------------------------------------------------------------------------

SPECIAL = {  # field of OrthusConfig: names of the token
    "bos_id": ("<s>",), "pad_id": ("<pad>",), "eos_id": ("</s>",), "unk_id": ("<unk>",),
    "eoi_id": ("<eoss>",), "boi_id": ("<racm3:break>",), "sep_id": ("<reserved08706>",),
    "image_id": ("<image>", "<reserved08707>"),
}  # fmt: skip
FIXED = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "image_code_start": 4}
RELEASED = FIXED | {"eoi_id": 8196, "boi_id": 8197, "sep_id": 8710, "image_id": 8711}


def code_name(code: int) -> str:
    """Image code -> its token: the letters A to J stand for the digits, 17 is IMGIMGBHZ."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json."""
    content = read_json(path)
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        return content["model"]["vocab"] | added
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is not a tokenizer with a vocabulary") from None


def token_ids(vocabulary: dict[str, int], codes: int, source) -> dict[str, int]:
    """The id fields of OrthusConfig, by the names of the tokens; all that is wrong raises at once.

    Image codes follow each other in order. A vocabulary of 8192 of them has the release's ids.
    """
    if not isinstance(vocabulary, dict) or {type(i) for i in vocabulary.values()} - {int}:
        raise ValueError(f"{source} is {str(vocabulary)[:40]!r}; want whole numbers by token")
    ids = {f: next((vocabulary[n] for n in names if n in vocabulary), None)
           for f, names in SPECIAL.items()}  # fmt: skip
    problems = [f"{SPECIAL[f][0]} is missing" for f in SPECIAL if ids[f] is None]
    ids["image_code_start"] = vocabulary.get(code_name(0), 4)
    fixed = RELEASED if codes == 8192 else FIXED
    problems += [f"{SPECIAL.get(f, [code_name(0)])[0]} has id {ids[f]}, not {fixed[f]}"
                 for f in fixed if ids[f] not in (None, fixed[f])]  # fmt: skip
    names = [code_name(k) for k in range(codes)]
    wrong = [n for k, n in enumerate(names, ids["image_code_start"]) if vocabulary.get(n) != k]
    if wrong:
        problems.append(f"{len(wrong)} of {codes} image codes missing or out of order, the first "
                        f"is {wrong[0]} ({vocabulary.get(wrong[0], 'no id')})")
    if problems:
        raise ValueError(f"{source} does not have Chameleon's tokens: " + "; ".join(problems))
    return ids


# --- The Hub's layout ----------------------------------------------------------------------------

SAME_NAME = (  # in config.json and in OrthusConfig; what is left out is the 7B model's, our default
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "swin_norm",
)  # fmt: skip
HUB_TO_OURS = {"mlp_head.": "image_head.", "codebook_in.": "vision_embedding.codebook."}
VQ_NAMES = {  # field of VQVAEConfig: its names in vq_config
    "resolution": ("resolution",), "base_channels": ("base_channels", "ch"),
    "channel_multiplier": ("channel_multiplier", "ch_mult"), "num_res_blocks": ("num_res_blocks",),
    "latent_channels": ("latent_channels", "z_channels", "embed_dim"),
    "num_codes": ("num_embeddings", "n_embed"),
}  # fmt: skip
ONLY = {  # what the architecture here can do; other values raise
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "tie_word_embeddings": (False,), "rope_scaling": (),
}  # fmt: skip
VQ_ONLY = {
    "in_channels": (3,), "out_channels": (3,), "out_ch": (3,), "double_latent": (False,),
    "double_z": (False,), "attn_resolutions": ([],), "attn_type": ("vanilla",),
}  # fmt: skip
SHARED = ("num_codes", "latent_channels", "latents_per_image")  # by model and autoencoder
CODEBOOK, QUANTIZER = "vision_embedding.codebook.weight", "quantize.embedding.weight"


def check_only(config: dict, allowed: dict[str, tuple], source) -> None:
    problems = [f"{name} is {config[name]!r:.60}" for name, values in allowed.items()
                if config.get(name) is not None and config[name] not in values]  # fmt: skip
    if problems:
        raise ValueError(f"{source} asks for what is not implemented: " + "; ".join(problems))


def hub_vae_config(hub: dict, source) -> VQVAEConfig:
    """From vq_config, or from the config of an autoencoder alone."""
    vq = hub.get("vq_config", hub) or {}
    if not isinstance(vq, dict):
        raise ValueError(f"{source}: vq_config is {vq!r:.40}, not an object")
    check_only(vq, VQ_ONLY, source)
    fields = {field: vq[name] for field, names in VQ_NAMES.items() for name in reversed(names)
              if vq.get(name) is not None}  # today's name, the first, wins  # fmt: skip
    config = checkpoint.build(VQVAEConfig, fields, source)
    check_only(vq, {"embed_dim": (config.latent_channels,)}, source)
    return config


def hub_model_fields(hub: dict, model: Tensors, vae: VQVAEConfig, directory: Path) -> dict:
    """config.json -> fields of OrthusConfig; what it does not say is read off the tensors."""
    source = directory / CONFIG
    check_only(hub, ONLY, source)
    rope = hub.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{source}: rope_parameters is {rope!r:.60}; want rope_type 'default'")
    hub = {"rope_theta": rope.get("rope_theta")} | hub
    fields = {name: hub[name] for name in SAME_NAME if hub.get(name) is not None}
    fields |= {name: getattr(vae, name) for name in SHARED}
    head = [name for name in model if name.startswith("image_head.")]
    if head or CODEBOOK in model:
        blocks = {name.split(".")[2] for name in head if ".res_blocks." in name}
        width = len(model.get("image_head.input_proj.weight", range(1536)))
        fields |= {"vision_embedding": "softmax", "image_head": "diffusion"}
        fields |= {"head_width": width, "head_blocks": max(1, len(blocks))}
    else:
        fields |= {"vision_embedding": "argmin", "image_head": "tokens"}
    return fields | hub_token_ids(hub, vae.num_codes, directory)


def hub_token_ids(hub: dict, codes: int, directory: Path) -> dict[str, int]:
    """Ids by name, from tokenizer.json and from config.json, which must agree.

    bos_token_id is not looked at: the released configs give the id of <pad>.
    """
    source, path, known = directory / CONFIG, directory / "tokenizer.json", {}
    if hub.get("vocabulary_map") is not None:
        known[f"vocabulary_map of {source}"] = hub["vocabulary_map"]
    if path.is_file():
        known[path] = read_vocabulary(path)
    if not known:
        raise ValueError(f"{directory} has no tokenizer.json, nor {source} a vocabulary_map")
    (where, ids), *others = [(k, token_ids(names, codes, k)) for k, names in known.items()]
    given = {f: hub.get(f"{f[:-3]}_token_id", ids[f]) for f in ("boi_id", "eoi_id", "image_id")}
    for other_source, other in (*others, (source, given)):
        problems = [f"{f} {ids[f]}, not {other[f]}" for f in other if other[f] != ids[f]]
        if problems:
            raise ValueError(f"{where} differs from {other_source}: " + "; ".join(problems))
    return ids


def generation_defaults(model: OrthusConfig, directory: Path) -> dict:
    """The release's settings for sample.py."""
    is_orthus, processor = model.image_head == "diffusion", directory / "preprocessor_config.json"
    rescale = read_json(processor).get("rescale_factor") if processor.is_file() else None
    return {
        "steps": 100,
        "cfg_scale": 5.0 if is_orthus else 1.0,
        "unconditional": "Generate an image.",
        "image_first": is_orthus,  # an answer begins with an image where the prompt holds none
        "interleaved": {"unconditional": "generate images", "cfg_scale": 3.0} if is_orthus else {},
        "max_tokens": model.latents_per_image + 128,  # an image, and words
        "scale": 1,
        "hub_pixels": rescale == 0.0078,
    }


def open_hub(directory: Path, hub: dict) -> Checkpoint:
    """Chameleon, Anole or Orthus, or an autoencoder alone: then there is no section "model"."""
    source, tokenizer = directory / CONFIG, directory / "tokenizer.json"
    tensors, model, vae = read_tensors(directory / MODEL), {}, {}
    alone = any(name.startswith(("encoder.", "quant_conv.")) for name in tensors)
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if alone or short.startswith("vqmodel."):
            vae[short.removeprefix("vqmodel.")] = tensor
        else:
            for theirs, ours in HUB_TO_OURS.items():
                short = short.replace(theirs, ours)
            model[short] = tensor
    sizes = hub_vae_config(hub, source)
    config = {"vae": vars(sizes)}
    if model:
        fields = hub_model_fields(hub, model, sizes, directory)
        ours = checkpoint.build(OrthusConfig, fields, source)
        config |= {"model": vars(ours), "generation": generation_defaults(ours, directory)}
        if ours.image_head == "tokens" and QUANTIZER in vae:
            model[CODEBOOK] = vae[QUANTIZER]  # Chameleon reads images through the quantiser itself

    def read(part: str) -> Tensors:
        if part == "vae" and not any(name.startswith("decoder.") for name in vae):
            raise ValueError(f"{directory} has no image decoder (facebook/chameleon-* ship none): "
                             "give sample.py or released.py --vae DIR: leloykun/Anole-7b-v0.1-hf "
                             "or the stand-alone leloykun/Anole-7b-v0.1-vqvae-hf "
                             "(SJTU-Deng-Lab/Orthus-7B-* have it too)")
        return {"model": model, "vae": vae}[part]

    return Checkpoint(directory, config, read, tokenizer if tokenizer.is_file() else None)


# --- Meta's layout -------------------------------------------------------------------------------

def read_pth(path: Path) -> dict:
    """The dictionary in a file of torch.save; nothing but tensors and plain containers is read."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        # what torch says advises to let the file run code
        raise ValueError(f"{path} is not a whole file of tensors alone") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


META = {  # Meta's module, without "layers.7.": (ours, how its shards join: along a dimension, ...)
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
    files = sorted(folder.glob("consolidated*.pth"))
    if not files:
        raise ValueError(f"{folder} has no consolidated.pth (or consolidated.00.pth and on)")
    shards, key = [read_pth(path) for path in files], "layers.0.attention.wo.weight"
    for path, shard in zip(files, shards, strict=True):
        is_tensor = all(isinstance(tensor, Tensor) for tensor in shard.values())
        if not is_tensor or key not in shard or shard[key].ndim != 2:
            raise ValueError(f"{path} is not a dictionary of Chameleon's tensors: no {key}")
        if apart := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{path} and {files[0]} do not hold the same names: {apart}")
    rows, columns = shards[0][key].shape  # a shard holds a share of the columns
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(1, rows // max(1, columns)))]
    names = [path.name for path in files]
    if names != wanted and (names, len(wanted)) != (["consolidated.pth"], 1):
        raise ValueError(f"{folder} holds {', '.join(names)}; the model's are {', '.join(wanted)}")
    return shards


def open_meta(directory: Path, folder: Path) -> Checkpoint:
    """params.json and the shapes -> the config; tensors are converted when they are asked for."""
    tokenizers = folder.resolve().parent.parent / "tokenizer"
    source, params = folder / "params.json", {}
    for name in ("params.json", "consolidate_params.json"):
        params |= read_json(folder / name) if (folder / name).is_file() else {}
    params = params.get("model", params)
    if not isinstance(params, dict) or not {"n_heads", "n_layers"} <= params.keys():
        raise ValueError(f"{source} does not say n_heads, n_layers")
    shards, path = meta_shards(folder), tokenizers / "text_tokenizer.json"
    vae, vae_tensors = read_vqgan(tokenizers)

    def rows(name: str) -> int:  # 1 where it is missing, which is said when the model is filled
        return len(shards[0].get(name, (0,)))

    fields = {
        "vocab_size": rows("tok_embeddings.weight"),
        "hidden_size": rows("layers.0.attention.wo.weight"),
        "intermediate_size": rows("layers.0.feed_forward.w1.weight") * len(shards),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps") or 1e-5,
        "rope_theta": params.get("rope_theta") or 10000.0,
        "swin_norm": bool(params.get("swin_norm")),
        "vision_embedding": "argmin",
        "image_head": "tokens",
    }
    fields |= {name: getattr(vae, name) for name in SHARED}
    fields |= token_ids(read_vocabulary(path), vae.num_codes, path)
    model = checkpoint.build(OrthusConfig, fields, source)

    def read(part: str) -> Tensors:
        if part == "vae":
            return vae_tensors
        return meta_model(shards, model, directory) | {CODEBOOK: vae_tensors[QUANTIZER]}

    config = {"model": vars(model), "vae": vars(vae)}
    config["generation"] = generation_defaults(model, directory)
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
    base, (codes, channels) = len(tensors[needed[0]]), tensors[QUANTIZER].shape
    widths, blocks = [], 0
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in tensors:
        widths.append(len(tensors[name]))
    while f"encoder.down.0.block.{blocks}.conv1.weight" in tensors:
        blocks += 1
    yaml = path.with_name("vqgan.yaml")
    text = yaml.read_text(encoding="utf-8", errors="replace") if yaml.is_file() else ""
    resolution = re.search(r"^\s*resolution:\s*(\d+)", text, re.MULTILINE)
    return checkpoint.build(VQVAEConfig, {
        "resolution": int(resolution[1]) if resolution else 512,
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": blocks,
        "latent_channels": channels,
        "num_codes": codes,
    }, path), tensors  # fmt: skip


def open_released(directory: Path, hub: dict) -> Checkpoint:
    """Open what is not in our layout; hub is its config.json, empty where it has none."""
    if hub and ("model_type" in hub or "architectures" in hub or "ch_mult" in hub):
        return open_hub(directory, hub)
    if hub:
        raise ValueError(f"{directory / CONFIG} has no section 'model' or 'vae'")
    if directory.is_file() or (directory / "vqgan.ckpt").is_file():
        sizes, tensors = read_vqgan(directory)
        return Checkpoint(directory, {"vae": vars(sizes)}, lambda part: tensors, None)
    if folder := meta_folder(directory):
        return open_meta(directory, folder)
    raise ValueError(f"checkpoint {directory} has no {CONFIG} (ours, the Hub's) and no params.json "
                     "(Meta's); is it half-written?")


# --- Writing the Hub's layout --------------------------------------------------------------------

HUB_IDS = ("bos", "pad", "eos", "boi", "eoi", "image")  # that config.json names
HUB_FIXED = (  # what the released code and transformers do whatever the config says: our defaults
    "bos_id", "pad_id", "eos_id", "image_code_start",
    "latent_scale", "tau", "prediction", "beta_schedule", "zero_terminal_snr",  # of Orthus
)  # fmt: skip


def check_fits_hub(model: dict, vae: dict, tensors: Tensors, vae_tensors: Tensors) -> None:
    """Raise ValueError with all that the Hub's layout cannot say."""
    kind, released = (model["vision_embedding"], model["image_head"]), vars(OrthusConfig())
    problems = []
    if kind not in (("argmin", "tokens"), ("softmax", "diffusion")):
        problems.append(f"{' + '.join(kind)} is neither Chameleon nor Orthus")
    if vae["groups"] != 32:
        problems.append(f"the autoencoder has {vae['groups']} groups per GroupNorm, theirs have 32")
    fixed = HUB_FIXED if kind[1] == "diffusion" else HUB_FIXED[:4]
    problems += [f"{name} is {model[name]!r}, theirs is always {released[name]!r}"
                 for name in fixed if model[name] != released[name]]  # fmt: skip
    ours, theirs = tensors.get(CODEBOOK), vae_tensors.get(QUANTIZER)
    if kind[0] == "argmin" and (ours is None or theirs is None or not torch.equal(ours, theirs)):
        problems.append("the codebook of the embedding is not the autoencoder's")
    if problems:
        raise ValueError("the Hub's layout cannot hold this model: " + "; ".join(problems))


def hub_tokenizer(tokenizer: Path) -> dict:
    """A tokenizer.json as transformers wants it: the placeholder under the Hub's name, <s> in front
    of every text."""
    if tokenizer.suffix != ".json":
        raise ValueError(f"the Hub's layout wants a tokenizer.json; {tokenizer} is sentencepiece's")
    content, (name, meta_name) = read_json(tokenizer), SPECIAL["image_id"]
    if name not in read_vocabulary(tokenizer):
        content = json.loads(json.dumps(content).replace(f'"{meta_name}"', f'"{name}"'))
    if not content.get("post_processor"):
        bos, words = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"id": "A", "type_id": 0}
        pair = [bos, {"Sequence": words}, {"Sequence": {"id": "B", "type_id": 1}}]
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": pair[:2], "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }  # fmt: skip
    return content


def hub_config(model: dict, vae: dict, vocabulary: dict[str, int], dtype: torch.dtype) -> dict:
    """config.json as the Hub's Chameleon and Orthus have it, today's and legacy names of sizes."""
    vq = {name: vae[field] for field, names in VQ_NAMES.items() for name in names}
    vq |= {"double_latent": False, "in_channels": 3, "attn_type": "vanilla", "dropout": 0.0}
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{name: model[name] for name in SAME_NAME},
        **{name: values[0] for name, values in ONLY.items() if values},
        **{f"{name}_token_id": model[f"{name}_id"] for name in HUB_IDS},
        "vq_config": vq,
        "vocabulary_map": vocabulary,
    }


def hub_extras(latents: int, side: int) -> dict[str, dict]:
    """The small files beside config.json that transformers' processor asks for."""
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "pad_token": "<pad>", "sep_token": "<reserved08706>",
        },
        "processor_config.json": {
            "processor_class": "ChameleonProcessor", "image_seq_length": latents,
            "image_token": "<image>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "ChameleonImageProcessor", "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side}, "resample": 1,  # Lanczos
            "rescale_factor": 0.0078, "image_mean": [1.0] * 3, "image_std": [1.0] * 3,
        },
    }  # fmt: skip


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
    vocabulary = read_vocabulary(directory / "tokenizer.json")
    ids = token_ids(vocabulary, fields["num_codes"], tokenizer)
    if wrong := [name for name in ids if ids[name] != fields[name]]:
        raise ValueError(f"{tokenizer} has other ids than the model: {', '.join(wrong)}")
    tensors = {f"model.vqmodel.{name}": tensor for name, tensor in vae.items()}
    for name, tensor in model.items():
        for theirs, ours in HUB_TO_OURS.items():
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
    opened = checkpoint.open_checkpoint(source)
    other = checkpoint.open_checkpoint(vae) if vae else opened
    model, autoencoder = Orthus.from_pretrained(opened), VQVAE.from_pretrained(other)
    config = opened.config | {"model": vars(model.config), "vae": vars(autoencoder.config)}
    contents = config, model.state_dict(), autoencoder.state_dict(), opened.tokenizer
    part = Path(target).with_name(Path(target).name + ".part")
    part.mkdir(parents=True)
    try:
        (write_hub if layout == "hub" else checkpoint.write)(part, *contents)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{target} is complete: python sample.py --checkpoint {target} --prompt ...")


def main() -> None:
    parser = checkpoint.Parser(description="Convert a checkpoint: ours, the Hub's or Meta's.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory in any layout")
    parser.add_argument("target", metavar="DST", help="the directory to write")
    parser.add_argument("--layout", choices=("ours", "hub"), default="ours", help="default: ours")
    parser.add_argument("--vae", metavar="DIR", help="take the autoencoder from this checkpoint")
    args = parser.parse_args()
    action = lambda: convert(args.source, args.target, args.layout, args.vae)
    checkpoint.command_line("released.py", action, f"interrupted; {args.target} is not there")


if __name__ == "__main__":
    main()
