"""Checkpoints of the releases: the Hub's and Meta's layouts into ours, and ours into the Hub's.

    Hub    config.json, model.safetensors (or shards), tokenizer.json: Chameleon, Anole or Orthus
           (the names of the tensors decide), or an autoencoder alone
    Meta   models/7b/{params.json, consolidated.pth}, tokenizer/{text_tokenizer.json, vqgan.ckpt}

    python released.py SRC DST [--layout hub] [--vae DIR]     writes DST from any readable SRC

Everything is read under our names and our config, with what the released code does as settings;
ids are found by the names of their tokens. Reading order: token ids, the Hub, Meta, writing.
"""

import functools
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
from checkpoint import CONFIG, MODEL, Checkpoint, Tensors, read_json, read_tensors
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

# --- Token ids -----------------------------------------------------------------------------------

SPECIAL = {  # field of OrthusConfig: names of the token
    "bos_id": ("<s>",),
    "pad_id": ("<pad>",),
    "eos_id": ("</s>",),
    "unk_id": ("<unk>",),
    "eoi_id": ("<eoss>",),
    "boi_id": ("<racm3:break>",),
    "sep_id": ("<reserved08706>",),
    "image_id": ("<image>", "<reserved08707>"),
}
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
    problems = []
    ids = {f: next((vocabulary[n] for n in names if n in vocabulary), None)
           for f, names in SPECIAL.items()}  # fmt: skip
    ids["image_code_start"] = start = vocabulary.get(code_name(0))
    for field, fixed in (RELEASED if codes == 8192 else FIXED).items():
        if ids[field] is not None and ids[field] != fixed:
            name = SPECIAL.get(field, [code_name(0)])[0]
            problems.append(f"{name} has id {ids[field]}, not {fixed}")
    problems += [f"{SPECIAL[f][0]} is missing" for f in SPECIAL if ids[f] is None]
    wrong = [k for k in range(codes) if vocabulary.get(code_name(k)) != (start or 0) + k]
    if wrong:
        name = code_name(wrong[0])
        problems.append(f"{len(wrong)} of {codes} image codes missing or out of order, the first "
                        f"is {name} ({vocabulary.get(name, 'no id')})")
    if problems:
        raise ValueError(f"{source} does not have Chameleon's tokens: " + "; ".join(problems))
    return ids


# --- The Hub's layout ----------------------------------------------------------------------------

SAME_NAME = {  # in config.json and in OrthusConfig; config.json leaves out what is the 7B model's
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 4096, "swin_norm": False,
}  # fmt: skip
HUB_TO_OURS = {"mlp_head.": "image_head.", "codebook_in.": "vision_embedding.codebook."}
VQ_NAMES = {  # field of VQVAEConfig: what it is where left out, then its names in vq_config
    "resolution": (512, "resolution"),
    "base_channels": (128, "base_channels", "ch"),
    "channel_multiplier": ([1, 1, 2, 2, 4], "channel_multiplier", "ch_mult"),
    "num_res_blocks": (2, "num_res_blocks"),
    "latent_channels": (256, "latent_channels", "z_channels", "embed_dim"),
    "num_codes": (8192, "num_embeddings", "n_embed"),
}
ONLY = {  # what the architecture here can do; other values raise
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "tie_word_embeddings": (False,), "rope_scaling": (),
}  # fmt: skip
VQ_ONLY = {
    "in_channels": (3,), "out_channels": (3,), "out_ch": (3,), "double_latent": (False,),
    "double_z": (False,), "attn_resolutions": ([],), "attn_type": ("vanilla",),
}  # fmt: skip
CODEBOOK, QUANTIZER = "vision_embedding.codebook.weight", "quantize.embedding.weight"
DECODERS = (
    "give sample.py or released.py --vae DIR: leloykun/Anole-7b-v0.1-hf or the stand-alone "
    "leloykun/Anole-7b-v0.1-vqvae-hf (SJTU-Deng-Lab/Orthus-7B-* have it too)"
)


def check_only(config: dict, allowed: dict[str, tuple], source) -> None:
    problems = [f"{name} is {config[name]!r:.60}" for name, values in allowed.items()
                if config.get(name) is not None and config[name] not in values]  # fmt: skip
    if problems:
        raise ValueError(f"{source} asks for what is not implemented: " + "; ".join(problems))


def hub_vae_fields(hub: dict, source) -> dict:
    """vq_config (or the config of an autoencoder alone) -> fields of VQVAEConfig, checked."""
    vq = hub.get("vq_config", hub) or {}
    if not isinstance(vq, dict):
        raise ValueError(f"{source}: vq_config is {vq!r:.40}, not an object")
    check_only(vq, VQ_ONLY, source)
    fields = {}
    for field, (default, *names) in VQ_NAMES.items():
        given = [vq[name] for name in names if vq.get(name) is not None]
        fields[field] = given[0] if given else default
    width = fields["latent_channels"]
    if (vq.get("embed_dim") or width) != width:
        raise ValueError(f"{source}: embed_dim {vq['embed_dim']} is not latent_channels {width}")
    checkpoint.build(VQVAEConfig, fields, source)
    return fields


def hub_model_fields(hub: dict, model: Tensors, vae: dict, directory: Path) -> dict:
    """config.json -> fields of OrthusConfig; what it does not say is read off the tensors."""
    source = directory / CONFIG
    check_only(hub, ONLY, source)
    rope = hub.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{source}: rope_parameters {rope!r:.60} are not implemented; want "
                         "rope_type 'default'")
    hub = {"rope_theta": rope.get("rope_theta")} | hub
    given = {name: hub[name] for name in SAME_NAME if hub.get(name) is not None}
    fields = SAME_NAME | given | {name: vae[name] for name in ("num_codes", "latent_channels")}
    fields["latents_per_image"] = VQVAEConfig(**vae).latents_per_image
    head = [name for name in model if name.startswith("image_head.")]
    if head or CODEBOOK in model:
        blocks = {name.split(".")[2] for name in head if ".res_blocks." in name}
        width = len(model.get("image_head.input_proj.weight", range(1536)))
        fields |= {"vision_embedding": "softmax", "image_head": "diffusion"}
        fields |= {"head_width": width, "head_blocks": max(1, len(blocks))}
    else:
        fields |= {"vision_embedding": "argmin", "image_head": "tokens"}
    return fields | hub_token_ids(hub, fields["num_codes"], directory)


def hub_token_ids(hub: dict, codes: int, directory: Path) -> dict[str, int]:
    """Ids by name, from tokenizer.json and from config.json, which must agree.

    bos_token_id is not looked at: the released configs give the id of <pad>.
    """
    source, path, known = directory / CONFIG, directory / "tokenizer.json", []
    if hub.get("vocabulary_map") is not None:
        where = f"vocabulary_map of {source}"
        known.append((where, token_ids(hub["vocabulary_map"], codes, where)))
    if path.is_file():
        known.append((path, token_ids(read_vocabulary(path), codes, path)))
    if not known:
        raise ValueError(f"{directory} has no tokenizer.json, nor {source} a vocabulary_map")
    where, ids = known[0]
    given = {f: hub.get(f"{f[:-3]}_token_id", ids[f]) for f in ("boi_id", "eoi_id", "image_id")}
    for other_source, other in (known[-1], (source, given)):
        problems = [f"{f} {ids[f]}, not {other[f]}" for f in other if other[f] != ids[f]]
        if problems:
            raise ValueError(f"{where} differs from {other_source}: " + "; ".join(problems))
    return ids


def hub_tensors(directory: Path) -> tuple[Tensors, Tensors]:
    """-> state dicts of Orthus (empty beside an autoencoder alone, without codebook in a
    Chameleon) and of VQVAE."""
    model, vae = {}, {}
    tensors = read_tensors(directory / MODEL)
    alone = any(name.startswith(("encoder.", "quant_conv.")) for name in tensors)
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if alone or short.startswith("vqmodel."):
            vae[short.removeprefix("vqmodel.")] = tensor
            continue
        for theirs, ours in HUB_TO_OURS.items():
            if short.startswith(theirs):
                short = ours + short.removeprefix(theirs)
        model[short] = tensor
    return model, vae


ORTHUS_GENERATION = {  # the release's settings for sample.py
    "steps": 100,
    "cfg_scale": 5.0,
    "unconditional": "Generate an image.",
    "image_first": True,  # an answer begins with an image where the prompt holds none
    "scale": 1,
    "interleaved": {"unconditional": "generate images", "cfg_scale": 3.0},
}
CHAMELEON_GENERATION = ORTHUS_GENERATION | {
    "cfg_scale": 1.0,
    "image_first": False,
    "interleaved": {"cfg_scale": 1.0},
}
TEXT_BUDGET = 128


def generation_defaults(model: dict, directory: Path) -> dict:
    """Defaults of sample.py for a released model, from its fields of OrthusConfig."""
    kind = CHAMELEON_GENERATION if model["image_head"] == "tokens" else ORTHUS_GENERATION
    kind = kind | {"max_tokens": model["latents_per_image"] + TEXT_BUDGET}  # an image, and words
    processor = directory / "preprocessor_config.json"
    rescale = read_json(processor).get("rescale_factor") if processor.is_file() else None
    return kind | {"hub_pixels": rescale == 0.0078}


def open_hub(directory: Path, hub: dict) -> Checkpoint:
    model, vae = hub_tensors(directory)
    config = {"vae": hub_vae_fields(hub, directory / CONFIG)}
    parts, tokenizer = {"model": model, "vae": vae}, directory / "tokenizer.json"
    if model:
        config["model"] = hub_model_fields(hub, model, config["vae"], directory)
        config["generation"] = generation_defaults(config["model"], directory)
        if config["model"]["image_head"] == "tokens" and QUANTIZER in vae:
            model[CODEBOOK] = vae[QUANTIZER]  # Chameleon reads images through the quantiser itself

    def read(part: str) -> Tensors:
        if part == "vae" and not any(name.startswith("decoder.") for name in vae):
            raise ValueError(f"{directory} has no image decoder (facebook/chameleon-* ship none): "
                             + DECODERS)
        return parts[part]

    return Checkpoint(directory, config, read, tokenizer if tokenizer.is_file() else None)


# --- Meta's layout -------------------------------------------------------------------------------

def read_pth(path: Path) -> dict:
    """The dictionary in a file of torch.save; nothing but tensors and plain containers is read."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        # what torch says advises to let the file run code
        raise ValueError(f"{path} is not a whole file of tensors alone") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


MEAN, HEADS, NORM = "mean", "heads", "norm"
META = {  # Meta's name: (ours, the dimension along which its shards join, or how else)
    "tok_embeddings.weight": ("embed_tokens.weight", 1),
    "norm.weight": ("norm.weight", MEAN),
    "output.weight": ("lm_head.weight", 0),
}
META_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", HEADS),
    "attention.wk.weight": ("self_attn.k_proj.weight", HEADS),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "attention.q_normalization.weight": ("self_attn.q_norm.weight", NORM),
    "attention.q_normalization.bias": ("self_attn.q_norm.bias", NORM),
    "attention.k_normalization.weight": ("self_attn.k_norm.weight", NORM),
    "attention.k_normalization.bias": ("self_attn.k_norm.bias", NORM),
    "attention_norm.weight": ("input_layernorm.weight", MEAN),
    "ffn_norm.weight": ("post_attention_layernorm.weight", MEAN),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
}
META_IGNORED = "rope.freqs"  # a table that follows from rope_theta


def meta_folder(directory: Path) -> Path | None:
    """The folder of params.json: the directory itself, or the one model under its models/."""
    if (directory / "params.json").is_file():
        return directory
    found = sorted(path.parent for path in directory.glob("models/*/params.json"))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ValueError(f"{directory} holds several models, give one of them: {names}")
    return found[0] if found else None


def meta_tokenizer_folder(directory: Path) -> Path:
    """Meta's tokenizer/ stands beside models/."""
    folder = meta_folder(directory).resolve()
    choices = [parent / "tokenizer" for parent in (folder.parent.parent, folder.parent, folder)]
    return next((c for c in choices if c.is_dir()), choices[0])


def meta_shards(folder: Path) -> list[Tensors]:
    """The model-parallel shards, in order: all there, whole, and with the same names."""
    files = sorted(folder.glob("consolidated*.pth"))
    if not files:
        raise ValueError(f"{folder} has no consolidated.pth (or consolidated.00.pth and on)")
    shards = [read_pth(path) for path in files]
    key = "layers.0.attention.wo.weight"
    is_tensor = all(isinstance(t, Tensor) for shard in shards for t in shard.values())
    if not is_tensor or key not in shards[0] or shards[0][key].ndim != 2:
        raise ValueError(f"{files[0]} is not a dictionary of Chameleon's tensors: no {key}")
    rows, columns = shards[0][key].shape  # a shard holds a share of the columns
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(1, rows // max(1, columns)))]
    names = [path.name for path in files]
    if names != wanted and (names, len(wanted)) != (["consolidated.pth"], 1):
        missing = ", ".join(sorted(set(wanted) - set(names))) or "none"
        raise ValueError(
            f"{folder} holds {', '.join(names)} of a model in {len(wanted)} shards; missing: "
            + missing
        )
    for path, shard in zip(files, shards, strict=True):
        if apart := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{path} and {files[0]} do not hold the same names: {apart}")
    return shards


def open_meta(directory: Path) -> Checkpoint:
    """params.json and the shapes -> the config; tensors are converted when they are asked for."""
    folder, tokenizers = meta_folder(directory), meta_tokenizer_folder(directory)
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
        "num_codes": vae["num_codes"],
        "latent_channels": vae["latent_channels"],
        "latents_per_image": checkpoint.build(VQVAEConfig, vae, tokenizers).latents_per_image,
        "vision_embedding": "argmin",
        "image_head": "tokens",
    } | token_ids(read_vocabulary(path), vae["num_codes"], path)
    checkpoint.build(OrthusConfig, fields, source)
    config = {"model": fields, "vae": vae, "generation": generation_defaults(fields, directory)}

    @functools.cache
    def read(part: str) -> Tensors:
        if part == "vae":
            return vae_tensors
        return meta_model(shards, fields, directory) | {CODEBOOK: vae_tensors[QUANTIZER]}

    return Checkpoint(directory, config, read, path)


def split_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from RoPE's interleaved pairs to its two halves: 0 2 4 .., then 1 3 5 .."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def join_shards(parts: list[Tensor], how, heads: int) -> Tensor:
    """One tensor from its shards. heads: of all shards together, for what RoPE turns."""
    if how == NORM:  # one for all heads of a shard
        share = heads // len(parts)
        return torch.cat([split_halves(part, 1).repeat(share, 1) for part in parts])
    if len(parts) == 1:
        joined = parts[0]  # as it is mapped
    elif how == MEAN:
        joined = torch.stack([p.float() for p in parts]).mean(0).to(parts[0].dtype)
    else:
        joined = torch.cat(parts, 0 if how == HEADS else how)
    return split_halves(joined, heads) if how == HEADS else joined


def meta_model(shards: list[Tensors], fields: dict, directory: Path) -> Tensors:
    """The state dict of Orthus: shards joined, RoPE from interleaved pairs to halves."""
    tensors = {}
    for name in tqdm(shards[0], "converting", leave=False, disable=None):
        if name == META_IGNORED:
            continue
        layer = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
        ours, how = META_LAYER.get(layer[2], (None, 0)) if layer else META.get(name, (None, 0))
        if ours is None:  # unknown: kept, so that it is listed as unexpected
            tensors[name] = shards[0][name]
            continue
        is_key = layer is not None and ".k_" in ours
        heads = fields["num_key_value_heads" if is_key else "num_attention_heads"]
        try:
            joined = join_shards([shard[name] for shard in shards], how, heads)
        except RuntimeError as error:
            raise ValueError(f"{directory}: {name} cannot be joined ({error})") from None
        tensors[(layer[1] if layer else "") + ours] = joined
    return tensors


def read_vqgan(path: Path) -> tuple[dict, Tensors]:
    """Meta's vqgan.ckpt, or its folder -> (fields of VQVAEConfig, state dict of VQVAE).

    Sizes come from the shapes, the resolution from vqgan.yaml beside it.
    """
    path = path / "vqgan.ckpt" if path.is_dir() else path
    tensors = read_pth(path).get("state_dict")
    needed = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", QUANTIZER)
    if not isinstance(tensors, dict) or any(name not in tensors for name in needed):
        raise ValueError(f"{path} is not Chameleon's autoencoder: want {', '.join(needed)}")
    tensors = {k: t for k, t in tensors.items() if not k.startswith("loss.")}
    base = len(tensors[needed[0]])
    widths, blocks = [], 0
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in tensors:
        widths.append(len(tensors[name]))
    while f"encoder.down.0.block.{blocks}.conv1.weight" in tensors:
        blocks += 1
    codes, channels = tensors[QUANTIZER].shape
    yaml = path.with_name("vqgan.yaml")
    text = yaml.read_text(encoding="utf-8", errors="replace") if yaml.is_file() else ""
    resolution = re.search(r"^\s*resolution:\s*(\d+)", text, re.MULTILINE)
    return {
        "resolution": int(resolution[1]) if resolution else 512,
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": blocks,
        "latent_channels": channels,
        "num_codes": codes,
    }, tensors


def open_released(directory: Path, hub: dict) -> Checkpoint:
    """Open what is not in our layout; hub is its config.json, empty where it has none."""
    if hub and ("model_type" in hub or "architectures" in hub or "ch_mult" in hub):
        return open_hub(directory, hub)
    if hub:
        raise ValueError(f"{directory / CONFIG} has no section 'model' or 'vae'")
    if directory.is_file() or (directory / "vqgan.ckpt").is_file():
        fields, tensors = read_vqgan(directory)
        return Checkpoint(directory, {"vae": fields}, lambda part: tensors, None)
    if meta_folder(directory):
        return open_meta(directory)
    raise ValueError(f"checkpoint {directory} has no {CONFIG} (ours, the Hub's) and no params.json "
                     "(Meta's); is it half-written?")


# --- Writing the Hub's layout --------------------------------------------------------------------

HUB_FIXED = {  # what the released code and transformers do whatever the config says
    "latent_scale": 0.1, "tau": 1.0, "prediction": "velocity", "beta_schedule": "scaled_linear",
    "zero_terminal_snr": True, "bos_id": 0, "pad_id": 1, "eos_id": 2, "image_code_start": 4,
}  # fmt: skip
KINDS = {("argmin", "tokens"), ("softmax", "diffusion")}


def check_fits_hub(model: dict, vae: dict, tensors: Tensors, vae_tensors: Tensors) -> None:
    """Raise ValueError with all that the Hub's layout cannot say."""
    kind = model["vision_embedding"], model["image_head"]
    problems = [] if kind in KINDS else [f"{' + '.join(kind)} is neither Chameleon nor Orthus"]
    if vae.get("groups", 32) != 32:
        problems.append(f"the autoencoder has {vae['groups']} groups per GroupNorm, theirs have 32")
    problems += [
        f"{name} is {model[name]!r}, theirs is always {fixed!r}"
        for name, fixed in HUB_FIXED.items()
        if (kind[1] == "diffusion" or name.endswith(("_id", "_start")))
        and model.get(name, fixed) != fixed
    ]
    ours, theirs = tensors.get(CODEBOOK), vae_tensors.get(QUANTIZER)
    if kind[0] == "argmin" and (ours is None or theirs is None or not torch.equal(ours, theirs)):
        problems.append("the codebook of the embedding is not the autoencoder's")
    if problems:
        raise ValueError("the Hub's layout cannot hold this model: " + "; ".join(problems))


def hub_vocabulary(tokenizer: Path) -> tuple[dict[str, int], str]:
    """-> the vocabulary and the text of tokenizer.json as transformers wants it: the placeholder
    under the Hub's name, <s> in front of every text."""
    if tokenizer.suffix != ".json":
        raise ValueError(
            f"the Hub's layout wants a tokenizer.json; {tokenizer} is a sentencepiece model"
        )
    text, vocabulary = tokenizer.read_text(encoding="utf-8"), read_vocabulary(tokenizer)
    name, meta_name = SPECIAL["image_id"]
    if name not in vocabulary:
        text = text.replace(f'"{meta_name}"', f'"{name}"')
        vocabulary = {name if k == meta_name else k: i for k, i in vocabulary.items()}
    content = json.loads(text)
    if not content.get("post_processor"):
        bos, words = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"id": "A", "type_id": 0}
        pair = [bos, {"Sequence": words}, {"Sequence": {"id": "B", "type_id": 1}}]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": pair[:2],
            "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
        text = json.dumps(content, ensure_ascii=False)
    return vocabulary, text


def hub_config(model: dict, vae: dict, vocabulary: dict[str, int], dtype: torch.dtype) -> dict:
    """config.json as the Hub's Chameleon and Orthus have it, today's and legacy names of sizes."""
    vq = {name: vae[field] for field, (_, *names) in VQ_NAMES.items() for name in names}
    vq |= {"double_latent": False, "in_channels": 3, "attn_type": "vanilla", "dropout": 0.0}
    config = {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    config |= {name: model.get(name, default) for name, default in SAME_NAME.items()}
    config |= {name: values[0] for name, values in ONLY.items() if values}
    names = {"boi_token_id": "<racm3:break>", "eoi_token_id": "<eoss>", "image_token_id": "<image>"}
    config |= {field: vocabulary[name] for field, name in names.items()}
    config |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return config | {"vq_config": vq, "vocabulary_map": vocabulary}


def hub_extras(model: dict, vae: dict) -> dict[str, dict]:
    """The small files beside config.json that transformers' processor asks for."""
    side = {"height": vae["resolution"], "width": vae["resolution"]}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return {
        "tokenizer_config.json": names
        | {"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "<reserved08706>"},
        "processor_config.json": {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": model["latents_per_image"],
            "image_token": "<image>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "ChameleonImageProcessor",
            "size": {"shortest_edge": vae["resolution"]},
            "crop_size": side,
            "resample": 1,  # Lanczos
            "rescale_factor": 0.0078,
            "image_mean": [1.0] * 3,
            "image_std": [1.0] * 3,
        },
    }


def write_hub(directory: Path, config: dict, model: Tensors, vae: Tensors, tokenizer: Path) -> None:
    """Write a Chameleon or an Orthus in the Hub's layout, which transformers and the released code
    read; config has all fields of "model" and "vae"."""
    fields, sizes = config["model"], config["vae"]
    check_fits_hub(fields, sizes, model, vae)
    vocabulary, text = hub_vocabulary(tokenizer)
    token_ids(vocabulary, fields["num_codes"], tokenizer)
    tensors = {}
    for name, tensor in model.items():
        for theirs, ours in HUB_TO_OURS.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        is_head = name.startswith(("lm_head.", "mlp_head."))
        tensors[name if is_head else f"model.{name}"] = tensor
    if fields["image_head"] == "tokens":
        del tensors["model.codebook_in.weight"]  # it is the quantiser's
    tensors |= {f"model.vqmodel.{name}": tensor for name, tensor in vae.items()}
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(directory / MODEL, tensors)
    with checkpoint.whole_file(directory / "tokenizer.json") as file:
        file.write(text.encode())
    for name, content in hub_extras(fields, sizes).items():
        checkpoint.write_json(directory / name, content)
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
    config["vae"] = config["vae"] | {
        "channel_multiplier": list(autoencoder.config.channel_multiplier)
    }
    contents = config, model.state_dict(), autoencoder.state_dict(), opened.tokenizer
    part = Path(f"{target}.part")
    part.mkdir(parents=True)
    try:
        (write_hub if layout == "hub" else checkpoint.write)(part, *contents)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{target} is complete: python sample.py --checkpoint {target} --prompt ...")


def main() -> None:
    parser = checkpoint.Parser(
        description="Convert a checkpoint: ours, the Hub's or Meta's, into another."
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory in any layout")
    parser.add_argument("target", metavar="DST", help="the directory to write")
    parser.add_argument("--layout", choices=("ours", "hub"), default="ours", help="default: ours")
    parser.add_argument("--vae", metavar="DIR", help="take the autoencoder from this checkpoint")
    args = parser.parse_args()
    action = lambda: convert(args.source, args.target, args.layout, args.vae)
    checkpoint.command_line("released.py", action, f"interrupted; {args.target} is not there")


if __name__ == "__main__":
    main()
