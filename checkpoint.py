"""Checkpoint directories as plain configs and state dicts: detect, read, check strictly, write.

Three layouts are read, all into our names and our config:

    ours   config.json          {"model": OrthusConfig, "vae": VQVAEConfig, "generation": defaults}
           model.safetensors    the transformer with both heads, under the module's own names
           vae.safetensors      the autoencoder
           tokenizer.model      sentencepiece (tiny), or tokenizer.json (Chameleon's)
    Hub    config.json, model.safetensors, tokenizer.json: Chameleon, Anole or Orthus (the names of
           the tensors decide), or an autoencoder alone
    Meta   models/7b/{params.json, consolidated.pth}, tokenizer/{text_tokenizer.json, vqgan.ckpt}

Above 5 GB a safetensors file is a set of shards with an index, in ours as on the Hub. Everything a
user can get wrong about a checkpoint is found here, before anything is built, and nothing in one
can run code. Tensors are memory-mapped: reading costs memory only where a conversion moves numbers.

    python checkpoint.py SRC DST [--layout hub] [--vae DIR]     writes DST from any readable SRC

Reading order: files, the three layouts, what all of them are read through, writing, conversion.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

MODEL, VAE, CONFIG = "model.safetensors", "vae.safetensors", "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "text_tokenizer.json")
SHARD_BYTES = 5 * 10**9  # the largest safetensors file that is written
Tensors = dict[str, Tensor]

# --- Files ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; is the checkpoint half-written?") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is it half-written?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40}, not an object with named entries")
    return content


def read_safetensors(path: Path) -> Tensors:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a checkpoint directory needs it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of its shards where it has an index; memory-mapped."""
    index = path.with_name(path.name + ".index.json")
    if path.is_file() or not index.is_file():
        return read_safetensors(path)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ValueError(f"{index} has no weight_map from the names of tensors to those of files")
    names = sorted(set(files.values()))
    outside = [n for n in names if n != Path(n).name or n in ("", "..")]
    if outside:
        raise ValueError(f"{index} names files outside its directory: {', '.join(outside)}")
    missing = [n for n in names if not (path.parent / n).is_file()]
    if missing:
        raise ValueError(f"{path.parent} lacks shards that its index names: {', '.join(missing)}")
    shards = {n: read_safetensors(path.parent / n) for n in names}
    found = {(key, n) for n, shard in shards.items() for key in shard}
    problems = [f"{n} lacks {key}" for key, n in sorted(files.items() - found)]
    problems += [f"{n} holds {key}, which is not its" for key, n in sorted(found - files.items())]
    if problems:
        raise ValueError(f"{index} does not fit its shards: " + "; ".join(problems))
    return {key: shards[n][key] for key, n in files.items()}


def read_pth(path: Path) -> dict:
    """The dictionary in a file of torch.save; nothing but tensors and plain containers is read."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a whole file of tensors alone ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


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
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a tokenizer with a vocabulary") from None


def token_ids(vocabulary: dict[str, int], codes: int, source) -> dict[str, int]:
    """The id fields of OrthusConfig, by the names of the tokens; all that is wrong raises at once.

    Image codes follow each other in order. A vocabulary of 8192 of them has the release's ids.
    """
    ids, problems = {}, []
    for field, names in SPECIAL.items():
        found = [vocabulary[name] for name in names if name in vocabulary]
        ids[field] = found[0] if found else None
    ids["image_code_start"] = start = vocabulary.get(code_name(0))
    for field, fixed in (RELEASED if codes == 8192 else FIXED).items():
        if ids[field] is not None and ids[field] != fixed:
            name = SPECIAL.get(field, [code_name(0)])[0]
            problems.append(f"{name} has id {ids[field]}, not {fixed}")
    problems += [f"{SPECIAL[f][0]} is missing" for f in SPECIAL if ids[f] is None]
    wrong = [
        k for k in range(codes) if start is None or vocabulary.get(code_name(k)) != start + k
    ]
    if wrong:
        where = vocabulary.get(code_name(wrong[0]), "no id")
        problems.append(
            f"{len(wrong)} of {codes} image codes missing or out of order, the first is "
            f"{code_name(wrong[0])} ({where})"
        )
    if problems:
        raise ValueError(f"{source} does not have Chameleon's tokens: " + "; ".join(problems))
    return ids


def check_same_ids(source, ids: dict[str, int], other: dict[str, int], other_source) -> None:
    """Raise ValueError where two sources name different ids for the same token."""
    problems = [f"{f} {ids[f]}, not {other[f]}" for f in other if other[f] != ids[f]]
    if problems:
        raise ValueError(f"{source} differs from {other_source}: " + "; ".join(problems))


# --- The Hub's layout ----------------------------------------------------------------------------

SAME_NAME = {  # in config.json and in OrthusConfig; config.json leaves out what is the 7B model's
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 4096, "swin_norm": False,
}  # fmt: skip
HUB_TO_OURS = {"mlp_head.": "diffusion_head.", "codebook_in.": "vision_embedding.codebook."}
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
    "give sample.py or checkpoint.py --vae DIR: leloykun/Anole-7b-v0.1-hf or the stand-alone "
    "leloykun/Anole-7b-v0.1-vqvae-hf (SJTU-Deng-Lab/Orthus-7B-* have it too)"
)


def check_sizes(fields: dict, source) -> None:
    """Raise ValueError where a size of the autoencoder is not a number above zero."""
    problems = []
    for name, value in fields.items():
        numbers = value if name == "channel_multiplier" else [value]
        is_list = isinstance(numbers, list) and numbers
        if not is_list or not all(isinstance(n, int) and n > 0 for n in numbers):
            problems.append(f"{name} is {value!r}")
    if problems:
        raise ValueError(f"{source} has sizes that are not numbers: " + "; ".join(problems))


def check_only(config: dict, allowed: dict[str, tuple], source) -> None:
    problems = [
        f"{name} is {config[name]!r}"
        for name, values in allowed.items()
        if config.get(name) is not None and config[name] not in values
    ]
    if problems:
        raise ValueError(f"{source} asks for what is not implemented: " + "; ".join(problems))


def hub_vae_fields(hub: dict, source) -> dict:
    """vq_config (or the config of an autoencoder alone) -> fields of VQVAEConfig."""
    vq = hub.get("vq_config", hub) or {}
    check_only(vq, VQ_ONLY, source)
    fields = {}
    for field, (default, *names) in VQ_NAMES.items():
        given = [vq[name] for name in names if vq.get(name) is not None]
        fields[field] = given[0] if given else default
    check_sizes(fields, source)
    width = fields["latent_channels"]
    if (vq.get("embed_dim") or width) != width:
        raise ValueError(f"{source}: embed_dim {vq['embed_dim']} is not latent_channels {width}")
    return fields


def hub_model_fields(hub: dict, model: Tensors, vae: dict, directory: Path) -> dict:
    """config.json -> fields of OrthusConfig; what it does not say is read off the tensors."""
    source = directory / CONFIG
    check_only(hub, ONLY, source)
    rope = hub.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{source}: rope_type {rope['rope_type']!r} is not implemented")
    hub = {"rope_theta": rope.get("rope_theta")} | hub
    given = {name: hub[name] for name in SAME_NAME if hub.get(name) is not None}
    fields = SAME_NAME | given | {name: vae[name] for name in ("num_codes", "latent_channels")}
    fields |= {"latents_per_image": latents_per_image(vae)}
    head = [name for name in model if name.startswith("diffusion_head.")]
    if head or CODEBOOK in model:
        blocks = {name.split(".")[2] for name in head if ".res_blocks." in name}
        width = len(model.get("diffusion_head.input_proj.weight", range(1536)))
        fields |= {"vision_embedding": "softmax", "image_head": "diffusion"}
        fields |= {"head_width": width, "head_blocks": len(blocks)}
    else:
        fields |= {"vision_embedding": "argmin", "image_head": "tokens"}
    return fields | hub_token_ids(hub, fields["num_codes"], directory)


def latents_per_image(vae: dict) -> int:
    return (vae["resolution"] // 2 ** (len(vae["channel_multiplier"]) - 1)) ** 2


def hub_token_ids(hub: dict, codes: int, directory: Path) -> dict[str, int]:
    """Ids by name, from tokenizer.json and from config.json, which must agree.

    bos_token_id is not looked at: the released configs give the id of <pad>.
    """
    source, path = directory / CONFIG, directory / "tokenizer.json"
    known = [
        (source, token_ids(hub["vocabulary_map"], codes, f"vocabulary_map of {source}"))
        for _ in range(isinstance(hub.get("vocabulary_map"), dict))
    ]
    if path.is_file():
        known.append((path, token_ids(read_vocabulary(path), codes, path)))
    if not known:
        raise ValueError(f"{directory} has no tokenizer.json, nor {source} a vocabulary_map")
    where, ids = known[0]
    given = {f: hub.get(f"{f[:-3]}_token_id") for f in ("boi_id", "eoi_id", "image_id")}
    given = {field: i for field, i in given.items() if i is not None}
    check_same_ids(where, ids, known[-1][1], known[-1][0])
    check_same_ids(where, ids, given, source)
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


# --- Meta's layout -------------------------------------------------------------------------------

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


def meta_model_fields(directory: Path) -> dict:
    """params.json and the shapes -> fields of OrthusConfig."""
    folder = meta_folder(directory)
    params = read_json(folder / "params.json")
    if (folder / "consolidate_params.json").is_file():
        params |= read_json(folder / "consolidate_params.json")
    params = params.get("model", params)
    missing = [name for name in ("n_heads", "n_layers") if not isinstance(params.get(name), int)]
    if missing:
        raise ValueError(f"{folder / 'params.json'} does not say {', '.join(missing)}")
    shards = meta_shards(folder)

    def rows(name: str) -> int:  # 0 where it is missing, which is said when the model is filled
        return len(shards[0].get(name, ()))

    vae, _ = read_vqgan(meta_tokenizer_folder(directory))
    path = find_tokenizer(directory)
    return {
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
        "latents_per_image": latents_per_image(vae),
        "vision_embedding": "argmin",
        "image_head": "tokens",
    } | token_ids(read_vocabulary(path), vae["num_codes"], path)


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


def meta_model(directory: Path, fields: dict) -> Tensors:
    """The state dict of Orthus: shards joined, RoPE from interleaved pairs to halves."""
    shards, tensors = meta_shards(meta_folder(directory)), {}
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
    tensors[CODEBOOK] = read_vqgan(meta_tokenizer_folder(directory))[1][QUANTIZER]
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
    text = yaml.read_text(encoding="utf-8") if yaml.is_file() else ""
    resolution = re.search(r"^\s*resolution:\s*(\d+)", text, re.MULTILINE)
    return {
        "resolution": int(resolution[1]) if resolution else 512,
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": blocks,
        "latent_channels": channels,
        "num_codes": codes,
    }, tensors


# --- Reading any layout --------------------------------------------------------------------------

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


def generation_defaults(model: dict) -> dict:
    """Defaults of sample.py for a released model, from its fields of OrthusConfig."""
    kind = CHAMELEON_GENERATION if model["image_head"] == "tokens" else ORTHUS_GENERATION
    return kind | {"max_tokens": model["latents_per_image"] + TEXT_BUDGET}  # an image, and words


def detect(directory: str | Path) -> str:
    """The layout of a checkpoint directory: "ours", "hub" or "meta"."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"checkpoint {directory} is not a directory; give one with a {CONFIG}")
    if (directory / CONFIG).is_file():
        config = read_json(directory / CONFIG)
        sections = any(isinstance(config.get(name), dict) for name in ("model", "vae"))
        is_hub = "model_type" in config or "architectures" in config
        return "hub" if is_hub and not sections else "ours"
    if meta_folder(directory):
        return "meta"
    raise ValueError(
        f"checkpoint {directory} has no {CONFIG} (ours, the Hub's) and no params.json (Meta's); "
        "is it half-written?"
    )


def read_config(directory: str | Path) -> dict:
    """{"model": ..., "vae": ..., "generation": ...} of a checkpoint directory in any layout."""
    layout, directory = detect(directory), Path(directory)
    if layout == "ours":
        return read_json(directory / CONFIG)
    if layout == "meta":
        model = meta_model_fields(directory)
        vae, _ = read_vqgan(meta_tokenizer_folder(directory))
    else:
        hub = read_json(directory / CONFIG)
        tensors, _ = hub_tensors(directory)
        vae = hub_vae_fields(hub, directory / CONFIG)
        if not tensors:
            return {"vae": vae}
        model = hub_model_fields(hub, tensors, vae, directory)
    return {"model": model, "vae": vae, "generation": generation_defaults(model)}


def read_section(directory: str | Path, name: str) -> dict:
    """One section of the config: "model", "vae" or "generation"."""
    section = read_config(directory).get(name)
    if not isinstance(section, dict):
        path = Path(directory) / CONFIG
        raise ValueError(f"{path} has no section {name!r}; give a checkpoint that has one")
    return section


def read_model(directory: str | Path) -> tuple[dict, Tensors]:
    """-> (fields of OrthusConfig, state dict of Orthus)."""
    directory = Path(directory)
    fields, layout = read_section(directory, "model"), detect(directory)
    if layout == "ours":
        return fields, read_tensors(directory / MODEL)
    if layout == "meta":
        return fields, meta_model(directory, fields)
    model, vae = hub_tensors(directory)
    if fields["image_head"] == "tokens" and QUANTIZER in vae:
        model[CODEBOOK] = vae[QUANTIZER]  # Chameleon reads images through the quantiser itself
    return fields, model


def read_vae(directory: str | Path) -> tuple[dict, Tensors]:
    """-> (fields of VQVAEConfig, state dict of VQVAE). Meta's vqgan.ckpt may be named itself."""
    directory = Path(directory)
    if directory.is_file() or (directory / "vqgan.ckpt").is_file():
        return read_vqgan(directory)
    layout = detect(directory)
    if layout == "meta":
        return read_vqgan(meta_tokenizer_folder(directory))
    fields = read_section(directory, "vae")
    if layout == "ours":
        return fields, read_tensors(directory / VAE)
    tensors = hub_tensors(directory)[1]
    if not any(name.startswith("decoder.") for name in tensors):
        raise ValueError(
            f"{directory} has no image decoder (facebook/chameleon-* ship none): " + DECODERS
        )
    return fields, tensors


def find_tokenizer(directory: str | Path) -> Path:
    """The tokenizer's file of a checkpoint directory."""
    directory = Path(directory)
    folder = meta_tokenizer_folder(directory) if detect(directory) == "meta" else directory
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"checkpoint {directory} has no tokenizer ({' or '.join(TOKENIZERS)})")


def build(kind: type, fields: dict, source) -> object:
    """A config dataclass from a section of config.json; a wrong field raises ValueError."""
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{Path(source) / CONFIG} does not fit {kind.__name__}: {error}") from None


def assign(module: nn.Module, tensors: Tensors, source, device="cpu", dtype=None) -> None:
    """Make `tensors` the parameters of `module`, which was built on the meta device.

    Strict: all missing, unexpected and misshapen names raise one ValueError, norms that are not
    finite another. Tensors are assigned, not copied, and cast only where dtype is given.
    """
    wanted = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = [f"missing {name} {list(wanted[name])}" for name in wanted if name not in got]
    problems += [f"unexpected {name} {list(got[name])}" for name in got if name not in wanted]
    problems += [
        f"{name} has shape {list(got[name])}, the config asks for {list(wanted[name])}"
        for name in wanted
        if name in got and wanted[name] != got[name]
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))
    norms = [name for name in tensors if "norm" in name or "in_ln" in name]  # small: read at once
    if broken := [name for name in norms if not tensors[name].isfinite().all()]:
        raise ValueError(f"{source} holds numbers that are not finite in: " + ", ".join(broken))
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    module.load_state_dict(tensors, assign=True)


# --- Writing -------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def split_shards(tensors: Tensors) -> list[Tensors]:
    """Tensors in order, in parts of at most SHARD_BYTES (or of one tensor that is larger)."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def write_tensors(path: Path, tensors: Tensors) -> None:
    """One safetensors file, or shards and their index; what an earlier write left is removed.

    Each file is written beside its place and moved there when all are whole, so that tensors may be
    saved over the file that they are mapped from, and an interrupted write leaves the old files.
    """
    shards, stem, folder = split_shards(tensors), path.stem, path.parent
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}{path.suffix}" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [path.name]
    with tqdm(total=len(tensors), desc=f"writing {path.name}", leave=False, disable=None) as bar:
        for name, shard in zip(names, shards, strict=True):
            whole = {k: t.detach().contiguous() for k, t in shard.items()}
            part = folder / f"{name}.part"
            part.touch()
            mode = part.stat().st_mode  # what the umask gives; safetensors gives the owner alone
            save_file(whole, part, metadata={"format": "pt"})
            part.chmod(mode)
            bar.update(len(shard))
    for name in names:
        os.replace(folder / f"{name}.part", folder / name)
    index = folder / f"{path.name}.index.json"
    if len(names) > 1:
        files = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        size = sum(t.nbytes for t in tensors.values())
        write_json(index, {"metadata": {"total_size": size}, "weight_map": files})
    else:
        index.unlink(missing_ok=True)
    for old in [path, *folder.glob(f"{stem}-?????-of-?????{path.suffix}")]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def write(
    directory: str | Path,
    config: dict,
    model: Tensors | None = None,
    vae: Tensors | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint directory in our layout; parts left out of it stay as they are."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / CONFIG).is_file():
        if detect(directory) != "ours":
            raise ValueError(f"{directory} is a checkpoint in the Hub's layout; give another place")
        config = read_config(directory) | config
    for name, tensors in ((MODEL, model), (VAE, vae)):
        if tensors is not None:
            write_tensors(directory / name, tensors)
    if tokenizer is not None and Path(tokenizer).parent.resolve() != directory.resolve():
        for old in TOKENIZERS:
            (directory / old).unlink(missing_ok=True)
        name = Path(tokenizer).name.replace("text_tokenizer", "tokenizer")
        shutil.copyfile(tokenizer, directory / name)
    write_json(directory / CONFIG, config)


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


def write_hub(
    directory: str | Path, config: dict, model: Tensors, vae: Tensors, tokenizer: Path
) -> None:
    """Write a Chameleon or an Orthus in the Hub's layout, which transformers and the released code
    read; config has all fields of "model" and "vae"."""
    fields, sizes, directory = config["model"], config["vae"], Path(directory)
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
    write_tensors(directory / MODEL, tensors)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, content in hub_extras(fields, sizes).items():
        write_json(directory / name, content)
    dtype = model["embed_tokens.weight"].dtype
    write_json(directory / CONFIG, hub_config(fields, sizes, vocabulary, dtype))


# --- Conversion ----------------------------------------------------------------------------------


def convert(source: str, target: str, layout: str = "ours", vae: str | None = None) -> None:
    """Write `target` from a checkpoint in any layout, the autoencoder from `vae` where given."""
    if any((Path(target) / name).exists() for name in (CONFIG, "params.json", MODEL)):
        raise ValueError(f"{target} holds a checkpoint already; give another place")
    config = read_config(source)
    fields, model = read_model(source)
    sizes, vae_tensors = read_vae(vae or source)
    tokenizer = find_tokenizer(source)
    config |= {"model": fields, "vae": sizes}
    (write_hub if layout == "hub" else write)(target, config, model, vae_tensors, tokenizer)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def main() -> None:
    parser = Parser(description="Convert a checkpoint: ours, the Hub's or Meta's, into another.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory in any layout")
    parser.add_argument("target", metavar="DST", help="the directory to write")
    parser.add_argument("--layout", choices=("ours", "hub"), default="ours", help="default: ours")
    parser.add_argument("--vae", metavar="DIR", help="take the autoencoder from this checkpoint")
    args = parser.parse_args()
    try:
        convert(args.source, args.target, args.layout, args.vae)
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.target} is complete: python sample.py --checkpoint {args.target} --prompt ...")


if __name__ == "__main__":
    main()
