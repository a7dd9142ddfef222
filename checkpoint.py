"""Checkpoint directories: opened once, checked at the door, filled strictly, written atomically.

    config.json          {"model": OrthusConfig, "vae": VQVAEConfig, "generation": Generation,
                          "data": the data it was trained on}
    model.safetensors    the transformer with both heads, under the module's own names
    vae.safetensors      the autoencoder
    tokenizer.model      sentencepiece (nano, tiny), or tokenizer.json (Chameleon's)

The Hub's layout (Chameleon, Anole, Orthus) is brought into the same form. Nothing in a checkpoint
can run code. In order: fields and their ranges, files, opening, the Hub, filling a module, writing,
and last what all command lines share.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    import fcntl
except ImportError:  # a system without file locks
    fcntl = None

MODEL, VAE, CONFIG = "model.safetensors", "vae.safetensors", "config.json"
TOKENIZERS = "tokenizer.json", "tokenizer.model"
Tensors = dict[str, Tensor]


# --- Fields and their ranges: one check, for files and for command lines -------------------------

# of fields of OrthusConfig and VQVAEConfig, where they are not what limits_of has for their type
RANGES: dict[str, tuple] = {
    **dict.fromkeys(("num_hidden_layers", "head_blocks", "num_res_blocks"), (int, 1, 1000)),
    **dict.fromkeys(("bos_id", "pad_id", "eos_id", "unk_id", "eoi_id"), (int, 0, 2**24)),
    **dict.fromkeys(("boi_id", "sep_id", "image_id", "image_code_start"), (int, 0, 2**24)),
    **dict.fromkeys(("tau", "image_loss_weight"), (float, 0, 1e9)),
    "max_position_embeddings": (int, 1, 2**20),
    "vision_embedding": ("softmax", "argmin", "linear"),
    "prediction": ("velocity", "epsilon"),
    "beta_schedule": ("scaled_linear", "linear"),
    "base_channels": (int, 1, 2**14),
    "channel_multiplier": (int, 1, 64),
}


def setting(default, help: str, *limits):
    """A dataclass field that may become a flag. limits: int or float and a range, or the choices;
    nothing: by the type of the default."""
    make = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**make, metadata={"help": help, "limits": limits})


def limits_of(f: dataclasses.Field) -> tuple:
    """(int, low, high), (float, low, high), (str,), (bool,), (dict,), or a tuple of choices."""
    kind = type(f.default[0] if isinstance(f.default, tuple) else f.default)
    known = {int: (int, 1, 2**24), float: (float, math.ulp(0.0), 2**24)}
    return f.metadata.get("limits") or RANGES.get(f.name) or known.get(kind, (kind,))


def wanted(value, limits: tuple) -> str:
    """What is wanted instead of a value, "" where it is within its limits."""
    kind, fits, name = limits[0], type(value) is limits[0], str(limits[0])
    if isinstance(kind, str):
        fits, name = value in limits, " or ".join(map(repr, limits))
    elif kind is str:
        fits, name = fits and not re.search("[\ud800-\udfff]", value), "text in UTF-8"
    elif kind in (int, float):
        low, high = limits[1:]
        fits = type(value) in (int, kind) and low <= value <= high
        name = f"a {'whole ' * (kind is int)}number from {low:.9g} to {high:.9g}"
    return "" if fits else f"want {name}"


def check(kind: type, fields: dict) -> None:
    """Raise ValueError with every field that the dataclass `kind` does not have, or whose value is
    not of its type or range."""
    known, problems = {f.name: f for f in dataclasses.fields(kind)}, []
    if not isinstance(fields, dict) or not fields.keys() <= known.keys():
        raise ValueError(f"it has {str(fields)!r:.60}; want fields of {', '.join(known)}")
    for name, value in fields.items():
        f, values = known[name], [value]
        if isinstance(f.default, tuple) or f.default_factory is list:
            is_list = isinstance(value, tuple | list) and (value or f.default_factory is list)
            values = value if is_list else [None]
        elif value is None and f.default is None:
            continue
        problem = max((wanted(v, limits_of(f)) for v in values), default="")
        if problem:
            problems.append(f"{name} is {value!r:.60}; {problem}")
    if problems:
        raise ValueError("; ".join(problems))


def build(kind: type, fields: dict, source):
    """The dataclass `kind` from what a file or a command line says, checked; lists become tuples
    where the default is one. What does not fit raises ValueError that begins with the source."""
    try:
        check(kind, fields)
        tuples = [f.name for f in dataclasses.fields(kind) if isinstance(f.default, tuple)]
        return kind(**fields | {n: tuple(fields[n]) for n in tuples if n in fields})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


@dataclass
class Generation:
    """Settings of sampling: a checkpoint's defaults ("generation" in its config.json), in whose
    place a command line or a call of generate() may put others."""

    steps: int = setting(100, "DDIM steps a latent", int, 1, 1000)
    cfg_scale: float = setting(1.0, "guidance towards the whole prompt; 1 is none", float, 0, 100)
    cfg_image: float | None = setting(None, "and towards the prompt's images", float, 0, 100)
    noise_scale: float = setting(1.0, "times the noise a latent begins as", float, 0, 10)
    temperature: float = setting(0.0, "of text; 0, the default, is greedy", float, 0, 100)
    top_p: float = setting(1.0, "nucleus of sampled text (default: 1)", float, 1e-6, 1)
    max_tokens: int = setting(128, "of an answer, an image's latents included", int, 1, 10**6)
    min_images: int = setting(0, "go on with an image where the answer would end", int, 0, 1000)
    max_images: int | None = setting(None, "begin no image past so many", int, 0, 1000)
    unconditional: str = setting("Generate an image.", "the prompt that guidance steers away from")
    image_first: bool = setting(False, "an answer begins with an image, without one in the prompt")
    interleaved: dict = setting(dict, "other values where text and images alternate", dict)
    scale: int = setting(1, "enlarges pictures that are written", int, 1, 64)
    words: list[str] = setting(list, "all that a small model knows", str)
    hub_pixels: bool = setting(False, "scale images as the Hub's processor does")

    def __post_init__(self):
        check(Generation, self.interleaved)
        if self.max_images is not None and self.max_images < self.min_images:
            raise ValueError(f"max_images is {self.max_images}, min_images {self.min_images}")


# --- Files ---------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """Raise ValueError where a file is missing, or a stand-in for one that was not downloaded."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or no file; give a whole one")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a git-lfs pointer; download the file itself")


def parse_json(text: str | bytes, source):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}); is it half-written?") from None


def read_text(path: Path) -> str:
    """Bytes that are not UTF-8 become surrogates, which no field takes."""
    check_file(path)
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def read_json(path: Path) -> dict:
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40}; want an object with named entries")
    return content


def read_lines(path: Path) -> list[tuple[str, object]]:
    """A jsonl file -> where each value stands, for complaints, and the value."""
    lines = [(f"{path} line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1)]
    return [(where, parse_json(line, where)) for where, line in lines if line.strip()]


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of its shards where it has an index; memory-mapped."""
    index, files, tensors = path.with_name(path.name + ".index.json"), [path], {}
    if index.is_file() and not path.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any(
            not n or Path(str(n)).name != n for n in shards.values()
        ):
            raise ValueError(f"{index} has no weight_map from tensors to files beside it")
        files = [path.with_name(name) for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path.parent} lacks {', '.join(missing)}; download what is missing")
    for file in files:
        check_file(file)
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error})") from None
    return tensors


# --- Opening -------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A directory, opened once: the sections of its config, and its tensors when asked for."""

    directory: Path
    config: dict
    read: Callable[[str], Tensors]  # of "model" or "vae"
    tokenizer_path: Path | None

    def __str__(self) -> str:
        return str(self.directory)

    def section(self, name: str) -> dict:
        """Of the config: "model", "vae", "generation" or "data"."""
        if not isinstance(self.config.get(name), dict):
            raise ValueError(f"{self} has no section {name!r} in its {CONFIG}; give one that has")
        return self.config[name]

    def tensors(self, name: str) -> Tensors:
        """The state dict of the "model" or of the "vae"."""
        self.section(name)
        return self.read(name)

    @property
    def tokenizer(self) -> Path:
        if self.tokenizer_path is None:
            raise ValueError(f"checkpoint {self} has no tokenizer ({' or '.join(TOKENIZERS)})")
        return self.tokenizer_path


def saves(run: Path) -> list[Path]:
    """A training run's own saves, oldest first: a copy under another name is its user's."""
    return sorted(p for p in run.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def open_checkpoint(directory: "str | Path | Checkpoint") -> Checkpoint:
    """Open a directory in our layout or the Hub's. A training run stands for its newest save."""
    if isinstance(directory, Checkpoint):
        return directory
    name, directory = str(directory), Path(directory)
    if not directory.exists():
        download = f"hf download {name} --local-dir {directory.name}"
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        hint = f"if it is on the Hub: {download}" if is_id else "give a directory that holds one"
        raise ValueError(f"checkpoint {name} does not exist; {hint}")
    if (directory / "run.json").is_file() and not (directory / CONFIG).is_file():
        found = saves(directory)
        if not found:
            raise ValueError(f"the run {directory} has saved nothing yet; let it go on")
        directory = found[-1]
    if not (directory / CONFIG).is_file():
        meta = "params.json", "models/*/params.json", "vqgan.ckpt", "tokenizer/vqgan.ckpt"
        if directory.suffix == ".ckpt" or any(any(directory.glob(name)) for name in meta):
            command = f"python -m lab.convert {directory} NEW"
            raise ValueError(f"{directory} is in Meta's layout; make a checkpoint of it: {command}")
        raise ValueError(f"checkpoint {directory} has no {CONFIG}; is it half-written?")
    config = read_json(directory / CONFIG)
    if not any(isinstance(config.get(name), dict) for name in ("model", "vae")):
        return open_hub(directory, config)
    tokenizers = [directory / name for name in TOKENIZERS if (directory / name).is_file()]
    read = lambda name: read_tensors(directory / f"{name}.safetensors")
    return Checkpoint(directory, config, read, tokenizers[0] if tokenizers else None)


# --- The Hub's layout, with what the released code does as settings ------------------------------

SPECIAL = dict(bos_id=["<s>"], pad_id=["<pad>"], eos_id=["</s>"], unk_id=["<unk>"])  # token names
SPECIAL |= dict(image_code_start=["IMGIMGAZ"], eoi_id=["<eoss>"], boi_id=["<racm3:break>"])
SPECIAL |= dict(sep_id=["<reserved08706>"], image_id=["<image>", "<reserved08707>"])
FIXED = dict(bos_id=0, pad_id=1, eos_id=2, unk_id=3, image_code_start=4)  # in every size
SAME_NAME = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta"]
SAME_NAME += ["num_attention_heads", "num_key_value_heads", "rms_norm_eps", "swin_norm"]
SAME_NAME += ["max_position_embeddings"]  # what config.json leaves out is 7B's, our default
HUB_TO_OURS = {"mlp_head.": "image_head.", "codebook_in.": "vision_embedding.codebook."}
VQ_NAMES = dict(resolution=["resolution"], num_res_blocks=["num_res_blocks"])  # today's name first
VQ_NAMES |= dict(base_channels=["base_channels", "ch"], num_codes=["num_embeddings", "n_embed"])
VQ_NAMES |= dict(channel_multiplier=["channel_multiplier", "ch_mult"])
VQ_NAMES |= dict(latent_channels=["latent_channels", "z_channels", "embed_dim"])
CODEBOOK, QUANTIZER = "vision_embedding.codebook.weight", "quantize.embedding.weight"


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
    Image codes follow each other in order."""
    if not isinstance(vocabulary, dict) or any(type(i) is not int for i in vocabulary.values()):
        raise ValueError(f"{source} is {str(vocabulary)[:40]!r}; want whole numbers by token")
    ids, problems = {}, []
    for f, names in SPECIAL.items():
        ids[f] = next((vocabulary[name] for name in names if name in vocabulary), None)
        if ids[f] is None or ids[f] != FIXED.get(f, ids[f]):
            problems.append(f"{names[0]} has id {ids[f]}, not {FIXED.get(f, 'one')}")
    wrong = [n for k, n in enumerate(map(code_name, range(codes)), 4) if vocabulary.get(n) != k]
    if wrong:
        problems.append(f"{len(wrong)} of {codes} image codes amiss, the first is {wrong[0]}")
    if problems:
        raise ValueError(f"{source} does not have Chameleon's tokens: {'; '.join(problems)}")
    return ids


def hub_vae_fields(hub: dict, source) -> dict:
    """Fields of VQVAEConfig from vq_config, or from the config of an autoencoder alone."""
    vq = hub.get("vq_config") or hub
    if not isinstance(vq, dict) or vq.get("attn_type", "vanilla") != "vanilla":
        raise ValueError(f"{source}: vq_config is {str(vq):.60}; want attn_type 'vanilla'")
    found = {f: [vq[n] for n in names if vq.get(n) is not None] for f, names in VQ_NAMES.items()}
    fields = {f: values[0] for f, values in found.items() if values}
    for name, kind in (("resolution", int), ("channel_multiplier", list)):
        if type(fields.get(name, kind())) is not kind:  # the number of latents follows from them
            raise ValueError(f"{source}: {name} is {fields[name]!r}; want a {kind.__name__}")
    return fields


def hub_model_fields(hub: dict, model: Tensors, vae: dict, codes: Tensor | None, source) -> dict:
    """config.json -> fields of OrthusConfig; what it does not say is read off the tensors."""
    rope = hub.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or hub.get("rope_scaling") or hub.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{source} asks for other positions than plain RoPE, or no SiLU")
    hub = {"rope_theta": rope.get("rope_theta")} | hub
    fields = {name: hub[name] for name in SAME_NAME if hub.get(name) is not None}
    if codes is not None:
        fields["num_codes"], fields["latent_channels"] = codes.shape
    levels = len(vae.get("channel_multiplier", "12345"))  # five, and 512 pixels, in the release
    fields["latents_per_image"] = (vae.get("resolution", 512) // 2 ** (levels - 1)) ** 2
    head = [name for name in model if name.startswith("image_head.")]
    if head or CODEBOOK in model:
        blocks = {name.split(".")[2] for name in head if ".res_blocks." in name}
        width = len(model.get("image_head.input_proj.weight", range(1536)))
        kinds = {"vision_embedding": "softmax", "image_head": "diffusion"}
        return fields | kinds | {"head_width": width, "head_blocks": max(1, len(blocks))}
    return fields | {"vision_embedding": "argmin", "image_head": "tokens"}


def hub_token_ids(hub: dict, codes: int, directory: Path) -> dict[str, int]:
    """Ids by name, from tokenizer.json and from config.json, which must agree. bos_token_id is not
    looked at: the released configs give the id of <pad>."""
    source, path = directory / CONFIG, directory / "tokenizer.json"
    known = [hub["vocabulary_map"]] if hub.get("vocabulary_map") is not None else []
    known += [read_vocabulary(path)] if path.is_file() else []
    found = [token_ids(vocabulary, codes, directory) for vocabulary in known]
    if not found:
        raise ValueError(f"{directory} has no tokenizer.json, nor {source} a vocabulary_map")
    names = "boi_id", "eoi_id", "image_id"
    theirs = found[0] | {f: hub.get(f"{f[:-3]}_token_id", found[0][f]) for f in names}
    if theirs != found[-1]:
        raise ValueError(f"{source} and {path} give other ids: {theirs}, {found[-1]}")
    return theirs


def generation_defaults(image_head: str, latents_per_image: int, directory: Path) -> dict:
    """The release's settings for sample.py."""
    processor = directory / "preprocessor_config.json"
    hub_pixels = processor.is_file() and read_json(processor).get("rescale_factor") == 0.0078
    defaults = dict(steps=100, max_tokens=latents_per_image + 128, hub_pixels=hub_pixels)
    if image_head == "diffusion":
        interleaved = dict(unconditional="generate images", cfg_scale=3.0)
        defaults |= dict(cfg_scale=5.0, image_first=True, interleaved=interleaved)
    return defaults


def open_hub(directory: Path, hub: dict) -> Checkpoint:
    """Chameleon, Anole or Orthus, or an autoencoder alone: then there is no section "model"."""
    source, tokenizer = directory / CONFIG, directory / "tokenizer.json"
    if not hub.keys() & {"model_type", "architectures", "ch_mult"}:
        raise ValueError(f"{source} has no section 'model' or 'vae'; give a checkpoint's")
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
    sizes = hub_vae_fields(hub, source)
    config = {"vae": sizes}
    if model:
        codes = model.get(CODEBOOK, vae.get(QUANTIZER))
        fields = hub_model_fields(hub, model, sizes, codes, source)
        fields |= hub_token_ids(hub, fields.get("num_codes", 8192), directory)
        head, length = fields["image_head"], fields["latents_per_image"]
        config |= {"model": fields, "generation": generation_defaults(head, length, directory)}
        if head == "tokens" and QUANTIZER in vae:
            model[CODEBOOK] = vae[QUANTIZER]  # Chameleon reads images through the quantiser itself

    def read(part: str) -> Tensors:
        if part == "vae" and not any(name.startswith("decoder.") for name in vae):
            found = f"{directory} has no image decoder (facebook/chameleon-* ship none)"
            raise ValueError(f"{found}; give --vae DIR, as of leloykun/Anole-7b-v0.1-vqvae-hf")
        return model if part == "model" else vae

    return Checkpoint(directory, config, read, tokenizer if tokenizer.is_file() else None)


# --- Filling a module ----------------------------------------------------------------------------


class Blank(TorchFunctionMode):
    """Leaves out initial values, which on the meta device would cost a second and nothing gain."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_init = getattr(function, "__module__", "") == "torch.nn.init"
        return None if is_init else function(*args, **(kwargs or {}))


def load(kind: type, sizes: type, name: str, directory, device="cpu", dtype=None) -> nn.Module:
    """A part of a checkpoint as kind(sizes(..)): its section of the config, then its tensors."""
    source = open_checkpoint(directory)
    config, tensors = build(sizes, source.section(name), source), source.tensors(name)
    with torch.device("meta"), Blank():
        module = kind(config)
    assign(module, tensors, source, device, dtype)
    return module


def assign(module: nn.Module, tensors: Tensors, source, device="cpu", dtype=None) -> None:
    """Make `tensors` the parameters of `module`, which was built on the meta device: assigned, not
    copied, and cast only where dtype is given. Missing, unexpected and misshapen names, types that
    are not floating point and numbers that are not finite (of more than a gigabyte only norms are
    looked at) raise one ValueError with all of them."""
    shapes = {name: list(p.shape) for name, p in module.state_dict().items()}
    problems = [f"missing {name} {shapes[name]}" for name in shapes if name not in tensors]
    is_small = sum(t.nbytes for t in tensors.values()) < 10**9
    for name, t in tensors.items():
        shape, is_norm = list(t.shape), "norm" in name or "in_ln" in name
        if name not in shapes:
            problems.append(f"unexpected {name} {shape}")
        elif shape != shapes[name]:
            problems.append(f"{name} has shape {shape}, the config asks for {shapes[name]}")
        elif not t.is_floating_point() or t.itemsize == 1:
            problems.append(f"{name} holds {t.dtype}, not floating-point numbers")
        elif (is_small or is_norm) and not t.isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        found = f"{source}: its {len(tensors)} tensors do not fit {type(module).__name__}"
        raise ValueError(f"{found}: {'; '.join(problems)}")
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    module.load_state_dict(tensors, assign=True)


# --- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path, keep: bool = False) -> Iterator:
    """A binary file that appears at `path` when it is whole: until then it is `path`.part, which
    keep leaves there when it is interrupted. Raises OSError with the file's name."""
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)  # a link is replaced, not followed
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        if getattr(error, "filename", None) not in (None, str(part)):
            raise  # it is of another file
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise OSError(f"{path} cannot be written ({reason})") from None
    finally:
        if not keep:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file; it may be the one that the tensors are mapped from."""
    with whole_file(path) as file:
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        mode = os.stat(file.name).st_mode  # as the umask says; theirs is for its owner alone
        save_file(whole, file.name, metadata={"format": "pt"})
        os.chmod(file.name, mode)


def write(directory, config: dict, model=None, vae=None, tokenizer=None) -> None:
    """Write a checkpoint directory: sections of its config, state dicts, the tokenizer's path or
    bytes; sections and files that are left out stay as they are."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / CONFIG).is_file():
        config = read_json(directory / CONFIG) | config
    for name, tensors in ((MODEL, model), (VAE, vae)):
        if tensors is not None:
            write_tensors(directory / name, tensors)
    if tokenizer is not None:
        content = tokenizer if isinstance(tokenizer, bytes) else tokenizer.read_bytes()
        name = TOKENIZERS[0 if content.lstrip()[:1] == b"{" else 1]
        with whole_file(directory / name) as file:
            file.write(content)
    write_json(directory / CONFIG, config)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """One process at a time in a directory; the system frees it when the process dies."""
    if fcntl is None:
        yield
        return
    name = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(name, "r+") as file:
        os.register_at_fork(after_in_child=file.close)  # a worker must not outlive us as its owner
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is in use by process {file.read(20)}; wait") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # for a worker that has not yet closed its copy too


# --- Command lines -------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def number(*limits):
    """An argparse type: number(int, 1, 9) is a whole number from 1 to 9."""

    def parse(text: str):
        value = limits[0](text)
        if wanted(value, limits):
            raise argparse.ArgumentTypeError(f"it is {text}; {wanted(value, limits)}")
        return value

    return parse


def add_flags(parser: argparse.ArgumentParser, kind: type, names=None) -> None:
    """A flag for each field of a dataclass, or for `names`: its range and help. A flag that is not
    given is None."""
    for f in dataclasses.fields(kind):
        limits, more = limits_of(f), {"metavar": f.name.rpartition("_")[2].upper()}
        if limits[0] is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif isinstance(limits[0], str):
            more = {"choices": limits}
        elif limits[0] in (int, float):
            more["type"] = number(*limits)
        if isinstance(f.default, tuple):
            more |= {"nargs": 2 if limits[0] is float else "+", "metavar": "X"}
        if names is None or f.name in names:
            flag = "--" + f.name.replace("_", "-")
            parser.add_argument(flag, help=f.metadata.get("help"), **more)


def pick_device(name: str) -> torch.device:
    """ "auto" is an accelerator where PyTorch finds one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # raises on what is not there, or holds no numbers
    except Exception:  # of many kinds, by the backend
        raise ValueError(f"device {name!r} is not to be had here; try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are recorded
    return device


def command_line(action: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run a command; what its user can get wrong becomes one line and exit code 2."""
    try:
        action()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RecursionError, torch.OutOfMemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
