"""Checkpoint directories: opened once, checked strictly, written atomically; and what every command
line shares.

    config.json          {"model": OrthusConfig, "vae": VQVAEConfig, "generation": defaults,
                          "data": the data it was trained on}
    model.safetensors    the transformer with both heads, under the module's own names
    vae.safetensors      the autoencoder
    tokenizer.model      sentencepiece (nano, tiny), or tokenizer.json (Chameleon's)

released.py brings the Hub's and Meta's directories into the same form. Nothing in a checkpoint can
run code, and tensors are memory-mapped. Reading order: fields and their ranges, reading, filling a
module, writing, command lines.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


def interrupted(kind, error, trace) -> None:
    """What Ctrl-C says while PyTorch is imported, which takes seconds."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


hook, sys.excepthook = sys.excepthook, interrupted
import torch  # noqa: E402

sys.excepthook = hook
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

MODEL, VAE, CONFIG = "model.safetensors", "vae.safetensors", "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = 10**9  # bytes of tensors whose every number is looked at
Tensors = dict[str, Tensor]

# --- Fields and their ranges: one check for config.json, the Python API and the command lines ----


def within(default, low: float, high: float, help: str = ""):
    """A dataclass field that holds a number from low to high; its flag has this help."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def problem(value, hint, low: float | None = None, high: float | None = None) -> str:
    """What is wanted instead of a value, "" where it fits its annotation and range (without one: 1
    to 2**24, above zero for a float)."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return "" if value is None else problem(value, inner[0], low, high)
    if kind is typing.Literal:
        return "" if value in inner else "want " + " or ".join(map(repr, inner))
    if kind in (list, tuple, dict):
        is_tuple = kind is tuple  # which is never empty
        if not isinstance(value, (tuple, list) if is_tuple else kind) or (is_tuple and not value):
            return f"want a {kind.__name__}"
        items = value.values() if kind is dict else value
        of = ([i for i in inner if i is not Ellipsis] or [object])[-1]
        return next((p for v in items if (p := problem(v, of, low, high))), "")
    if kind not in (int, float):
        surrogate = kind is str and isinstance(value, str) and re.search("[\ud800-\udfff]", value)
        name = "text in UTF-8" if kind is str else kind.__name__
        return "" if isinstance(value, kind) and not surrogate else f"want {name}"
    low = (1 if kind is int else math.ulp(0.0)) if low is None else low
    high = 2**24 if high is None else high
    is_number = isinstance(value, int if kind is int else (int, float)) and type(value) is not bool
    name, form = ("a whole number", "") if kind is int else ("a number", ".9g")
    fits = is_number and low <= value <= high
    return "" if fits else f"want {name} from {low:{form}} to {high:{form}}"


def check_fields(config) -> None:
    """Raise ValueError with every field of a dataclass whose value is not of its type, or not
    within its range. Lists become tuples where these are wanted."""
    hints, problems = typing.get_type_hints(type(config)), []
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if wanted := problem(value, hint, f.metadata.get("low"), f.metadata.get("high")):
            problems.append(f"{f.name} is {value!r:.60}; {wanted}")
        elif typing.get_origin(hint) is tuple:
            object.__setattr__(config, f.name, tuple(value))
    if problems:
        raise ValueError("; ".join(problems))


def build(kind: type, fields: dict, source):
    """A config dataclass from what a file says; what does not fit raises ValueError."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    needed = [name for name, f in known.items()
              if f.default is f.default_factory is dataclasses.MISSING]  # fmt: skip
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"it is {fields!r:.60}; want an object with {', '.join(known)}")
        wrong = [f"it has {name!r:.40}" for name in fields if name not in known]
        wrong += [f"it lacks {name!r}" for name in needed if name not in fields]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}; want {', '.join(known)}")
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


# --- Reading -------------------------------------------------------------------------------------


def parse_json(text: str, source):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}); is it half-written?") from None


def read_text(path: Path) -> str:
    """Bytes that are not UTF-8 become surrogates, which no field takes."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or no file; give a whole one")
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def read_json(path: Path, kind: type = dict):
    content = parse_json(read_text(path), path)
    if not isinstance(content, kind):
        wanted = "an object with named entries" if kind is dict else "a list"
        raise ValueError(f"{path} holds {content!r:.40}; want {wanted}")
    return content


def read_lines(path: Path) -> list[tuple[str, object]]:
    """A jsonl file -> where each value stands, for complaints, and the value."""
    lines = [(f"{path} line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1)]
    return [(where, parse_json(line, where)) for where, line in lines if line.strip()]


def read_file(path: Path) -> Tensors:
    """All tensors of a safetensors file; memory-mapped."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; a checkpoint directory needs it")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def read_tensors(path: Path) -> Tensors:
    """The same of a file, or of its shards where it has an index."""
    index = path.with_name(path.name + ".index.json")
    if path.is_file() or not index.is_file():
        return read_file(path)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to those of files")
    names = set(files.values())
    if outside := [n for n in names if n != Path(n).name or n in ("", "..")]:
        raise ValueError(f"{index} names files outside its directory: {', '.join(outside)}")
    shards = {name: read_file(path.with_name(name)) for name in sorted(names)}
    found = {(key, name) for name, shard in shards.items() for key in shard}
    if wrong := sorted(found ^ files.items()):
        named = ", ".join(f"{key} in {name}" for key, name in wrong)
        raise ValueError(f"{index} and its shards differ: {named}")
    return {key: shards[name][key] for key, name in files.items()}


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
            raise ValueError(f"{self} has no section {name!r} in its {CONFIG}; give a checkpoint "
                             "that has one")
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
    """Open a directory of any layout. A training run stands for its newest save."""
    if isinstance(directory, Checkpoint):
        return directory
    directory = Path(directory)
    if not directory.exists():
        raise ValueError(f"checkpoint {directory} does not exist; give a directory that holds one")
    if (directory / "run.json").is_file() and not (directory / CONFIG).is_file():
        if not (found := saves(directory)):
            raise ValueError(f"the run {directory} has saved nothing yet; let it go on")
        directory = found[-1]
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if not any(isinstance(config.get(name), dict) for name in ("model", "vae")):
        import released  # here, since it imports this file, and only others' layouts need it

        return released.open_released(directory, config)
    tokenizers = [directory / name for name in TOKENIZERS if (directory / name).is_file()]
    read = lambda name: read_tensors(directory / f"{name}.safetensors")
    return Checkpoint(directory, config, read, next(iter(tokenizers), None))


# --- Filling a module ----------------------------------------------------------------------------


class Blank(TorchFunctionMode):
    """Leaves out initial values, which on the meta device would cost a second and nothing gain."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load(kind: type, sizes: type, name: str, directory, device="cpu", dtype=None) -> nn.Module:
    """A part of a checkpoint as kind(sizes(..)): its section of the config, then its tensors."""
    source = open_checkpoint(directory)
    config, tensors = build(sizes, source.section(name), source), source.tensors(name)
    with torch.device("meta"), Blank():
        module = kind(config)
    assign(module, tensors, source, device, dtype)
    return module


def is_finite(t: Tensor) -> bool:
    """A finite sum says that all numbers are, 25 times as fast as looking at each."""
    return bool(t.sum(dtype=torch.float32).isfinite() or t.isfinite().all())


def assign(module: nn.Module, tensors: Tensors, source, device="cpu", dtype=None) -> None:
    """Make `tensors` the parameters of `module`, which was built on the meta device.

    Strict: missing, unexpected and misshapen names, types that are not floating point and numbers
    that are not finite raise one ValueError with all of them. Of more than SMALL bytes only norms
    are read for that. Tensors are assigned, not copied, and cast only where dtype is given.
    """
    wanted = {name: list(p.shape) for name, p in module.state_dict().items()}
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in tensors]
    is_small = sum(t.nbytes for t in tensors.values()) < SMALL
    for name, t in tensors.items():
        shape, is_norm = list(t.shape), "norm" in name or "in_ln" in name
        if name not in wanted:
            problems.append(f"unexpected {name} {shape}")
        elif shape != wanted[name]:
            problems.append(f"{name} has shape {shape}, the config asks for {wanted[name]}")
        elif t.dtype not in FLOATS:
            problems.append(f"{name} holds {t.dtype}, not floating-point numbers")
        elif (is_small or is_norm) and not is_finite(t):
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        raise ValueError(f"{source}: its {len(tensors)} tensors do not fit "
                         f"{type(module).__name__}: {'; '.join(problems)}")
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    module.load_state_dict(tensors, assign=True)


# --- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path, keep: bool = False) -> Iterator:
    """A binary file that appears at `path` when it is whole: until then it is `path`.part.

    Links at either place are replaced, not followed. keep: an interrupted file stays there. Raises
    OSError with the file's name, also where the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        if getattr(error, "filename", None) not in (None, str(part)):
            raise
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
        mode = os.fstat(file.fileno()).st_mode  # as the umask says
        save_file(whole, file.name, metadata={"format": "pt"})  # a new file, for its owner alone
        with open(file.name, "rb") as written:
            os.fchmod(written.fileno(), mode)
            os.fsync(written.fileno())


def write(directory: str | Path, config: dict, model: Tensors | None = None,
          vae: Tensors | None = None, tokenizer: Path | bytes | None = None) -> None:
    """Write a checkpoint directory; sections and files that are left out stay as they are."""
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
    path = directory / ".lock"
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
        os.register_at_fork(after_in_child=file.close)  # a worker must not outlive us as its owner
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is in use by another process (pid {file.read(20)}); "
                             "wait for it, or give another directory") from None
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


def number(kind: type, low: float | None = None, high: float | None = None):
    """An argparse type: a number from low to high."""

    def parse(text: str):
        value = kind(text)
        if wanted := problem(value, kind, low, high):
            raise argparse.ArgumentTypeError(f"it is {text}; {wanted}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # what argparse calls the text
    return parse


def weights(text: str) -> dict[str, float]:
    """An argparse type: "a=0.5,b=2" -> {"a": 0.5, "b": 2.0}; a bare name weighs 1."""
    try:
        pairs = [item.partition("=") for item in text.split(",")]
        return {name: float(value or 1) for name, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like a=0.5,b=2") from None


def add_flags(parser: argparse.ArgumentParser, kind: type, names=None) -> None:
    """A flag for each field of a dataclass, or for `names`: its type, range and help. A flag that
    is not given is None."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if names is not None and f.name not in names:
            continue
        hint = hints[f.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = typing.get_args(hint)[0]  # or None
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        more = {"metavar": f.name.rpartition("_")[2].upper()}
        if hint is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif origin is typing.Literal:
            more = {"choices": inner}
        elif origin is dict:
            more |= {"type": weights}
        elif hint in (int, float):
            more |= {"type": number(hint, f.metadata.get("low"), f.metadata.get("high"))}
        elif origin is tuple:
            more = {"type": inner[0], "nargs": "+" if ... in inner else len(inner), "metavar": "X"}
        help = f.metadata.get("help", "")
        parser.add_argument("--" + f.name.replace("_", "-"), help=help, **more)


def pick_device(name: str) -> torch.device:
    """ "auto" is an accelerator where PyTorch finds one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # raises on what is not there, or holds no numbers
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where graphs are recorded
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"device {name!r} is not to be had here; try --device cpu") from None


def command_line(prog: str, action: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run a command; whatever its user can get wrong becomes one line and exit code 2."""
    try:
        action()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RecursionError, torch.OutOfMemoryError) as error:
        print(f"{prog}: error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
