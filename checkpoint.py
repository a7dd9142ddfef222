"""Checkpoint directories as plain configs and state dicts: read, check strictly, write.

Our layout is a directory of

    config.json          {"model": OrthusConfig, "vae": VQVAEConfig, "generation": defaults}
    model.safetensors    the transformer with both heads, under the module's own names
    vae.safetensors      the autoencoder
    tokenizer.model      sentencepiece (tiny), or tokenizer.json (Chameleon's)

Everything a user can get wrong about a checkpoint is found here, before anything is built.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL, VAE, CONFIG = "model.safetensors", "vae.safetensors", "config.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def read_config(directory: str | Path) -> dict:
    """config.json of a checkpoint directory: {"model": ..., "vae": ..., "generation": ...}."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"checkpoint {directory} is not a directory; give one with a {CONFIG}")
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"checkpoint {directory} has no {CONFIG}; is it half-written?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is it half-written?") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {config!r:.40}, not an object with the model's sections")
    return config


def read_section(directory: str | Path, name: str) -> dict:
    """One section of config.json: "model", "vae" or "generation"."""
    section = read_config(directory).get(name)
    if not isinstance(section, dict):
        path = Path(directory) / CONFIG
        raise ValueError(f"{path} has no section {name!r}; give a checkpoint that has one")
    return section


def build(kind: type, fields: dict, source) -> object:
    """A config dataclass from a section of config.json; a wrong field raises ValueError."""
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{Path(source) / CONFIG} does not fit {kind.__name__}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; a checkpoint directory needs it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def read_model(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """-> (fields of OrthusConfig, state dict of Orthus)."""
    return read_section(directory, "model"), read_tensors(Path(directory) / MODEL)


def read_vae(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """-> (fields of VQVAEConfig, state dict of VQVAE)."""
    return read_section(directory, "vae"), read_tensors(Path(directory) / VAE)


def assign(module: nn.Module, tensors: dict[str, Tensor], source, device="cpu", dtype=None) -> None:
    """Make `tensors` the parameters of `module`, which was built on the meta device.

    Strict: all missing, unexpected and misshapen names raise one ValueError. Tensors are assigned,
    not copied, and cast only where dtype is given.
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
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    module.load_state_dict(tensors, assign=True)


def write(
    directory: str | Path,
    config: dict,
    model: dict[str, Tensor] | None = None,
    vae: dict[str, Tensor] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint directory in our layout; parts left out of it stay as they are.

    Each file is written beside its place and then moved there, so that an interrupted write leaves
    the old file whole.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensors in ((MODEL, model), (VAE, vae)):
        if tensors is not None:
            tensors = {k: t.detach().contiguous() for k, t in tensors.items()}
            save_file(tensors, directory / f"{name}.part")
            os.replace(directory / f"{name}.part", directory / name)
    if tokenizer is not None and Path(tokenizer).parent.resolve() != directory.resolve():
        shutil.copy(tokenizer, directory / Path(tokenizer).name)
    if (directory / CONFIG).is_file():
        config = read_config(directory) | config
    part = directory / f"{CONFIG}.part"
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(part, directory / CONFIG)


def find_tokenizer(directory: str | Path) -> Path:
    """The tokenizer's file of a checkpoint directory."""
    for name in TOKENIZERS:
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise ValueError(f"checkpoint {directory} has no tokenizer ({' or '.join(TOKENIZERS)})")
