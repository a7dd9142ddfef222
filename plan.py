"""What a stage of training needs, told before anything is loaded: `train.py STAGE --dry-run`.

A Rehearsal runs the trainer's own code on tensors without numbers (PyTorch's fake tensors, which
are meta tensors that tell a device) and counts the bytes of those that are alive. So no formula
repeats what the model does, and what changes there changes here. Tokens and masks stay real: how
many positions are text or image decides the shapes of all that follows.
"""

import contextlib
import dataclasses
import gc
import io
import math
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import data
from checkpoint import Checkpoint
from optim import contents, dtype_name, make_optimizer, trained, update_average
from orthus import Orthus, OrthusConfig
from stages import GENERATION, STAGES, UNCONDITIONAL, TrainConfig, asdict, examples
from vae import VQVAE, VQVAEConfig

aten = torch.ops.aten


class Rehearsal(TorchDispatchMode):
    """While it is on, `live` and `peak` are the bytes of all tensors, each storage counted once."""

    def __init__(self):
        super().__init__()
        self.fake, self.live, self.peak = FakeTensorMode(allow_non_fake_inputs=True), 0, 0
        self.storages = {}  # by address: a reference that tells when a storage is freed

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        if any(isinstance(x, FakeTensor) for x in given):
            if operation is aten._local_scalar_dense.default:  # a number is asked for: any will do
                return True if args[0].dtype == torch.bool else 1
            if operation is aten.index.Tensor:  # by a real mask: its shape depends on the mask
                args = args[0], [i for index in args[1] for i in (
                    [index] if index is None or index.dtype != torch.bool
                    else index.nonzero().unbind(1))]  # fmt: skip
            if operation is aten.masked_scatter_backward.default:
                operation, args = aten.new_empty.default, (args[0], args[2])
        out = operation(*args, **kwargs)
        if type(out) is Tensor and out.is_floating_point() and all(out is not x for x in given):
            out = self.fake.from_tensor(out)  # real numbers are made nowhere
        for tensor in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            self.storages[address] = weakref.ref(storage, lambda _: self.free(address, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, address: int, size: int) -> None:
        del self.storages[address]
        self.live -= size

    def build(self, make: Callable):
        """make() with fake tensors: nothing is moved, and nothing said of values."""
        stay = mock.patch.object(nn.Module, "_apply", lambda module, *_: module)
        with self.fake, stay, contextlib.redirect_stdout(io.StringIO()):
            made = make()
        gc.collect()  # what it was made from
        return made


def total(*trees) -> int:
    """Bytes of all tensors in dicts and lists, each storage counted once."""
    storages = [x.untyped_storage() for x in tree_leaves(trees) if isinstance(x, Tensor)]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def blank(name: str, preset: str, texts: list[str]) -> Checkpoint:
    """A checkpoint without numbers of a preset's sizes, as stage `name` starts from. 7B's is bf16,
    as it was released; a small tokenizer stands for its own."""
    ancestor = {} if name == "posttrain" else {"vision_embedding": "argmin", "image_head": "tokens"}
    model, vae = OrthusConfig.preset(preset, **ancestor), VQVAEConfig.preset(preset)
    with torch.device("meta"), checkpoint.Blank():
        parts = {"model": Orthus(model), "vae": VQVAE(vae)}
    dtype = torch.bfloat16 if preset == "7b" else torch.float32
    tensors = {part: {n: t.to(dtype) for n, t in module.state_dict().items()}
               for part, module in parts.items()}  # fmt: skip
    sections = {"model": asdict(model), "vae": asdict(vae), "generation": asdict(GENERATION)}
    content = data.train_tokenizer([*texts, UNCONDITIONAL], 300)
    tokenizer = types.SimpleNamespace(read_bytes=lambda: content)  # it is in no file
    return Checkpoint(Path(f"preset {preset}"), sections, tensors.get, tokenizer)


def without_numbers(source: Checkpoint) -> Checkpoint:
    """The same for Rehearsal.build: names, shapes and dtypes alone."""
    parts = [part for part in ("model", "vae") if part in source.config]
    shapes = {part: {n: (t.shape, t.dtype) for n, t in source.tensors(part).items()}
              for part in parts}  # fmt: skip

    def read(part: str) -> checkpoint.Tensors:
        return {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in shapes[part].items()}

    return Checkpoint(source.directory, source.config, read, source.tokenizer_path)


def figures(name: str, config: TrainConfig, dataset: data.Dataset, start: Checkpoint | None):
    """Bytes of memory by kind at the fullest moment of a step, of a save and of the latents that
    are encoded ahead; numbers of parameters; and the tensor that one part of a batch brings. The
    step is train()'s, on tensors without numbers and the longest part of the first batch."""
    parts, small = config.micro_batches, dataclasses.replace(config, device="cpu")
    if name == "decoder":  # all its parts are alike
        size = math.ceil(config.batch_size / parts)
        small = dataclasses.replace(small, batch_size=size, micro_batches=1)
    start = start and without_numbers(start)
    first = examples(dataset, 0, small.batch_size)  # real pictures, so before the rehearsal
    with Rehearsal() as now:
        stage = now.build(lambda: STAGES[name](small, dataset, start, False))
        learns = list(trained(stage.model).values())
        optimizer = make_optimizer(stage.model, small, getattr(torch, config.dtype))
        average = {n: p.detach().clone() for n, p in trained(stage.model).items()}
        batch = stage.batch(types.SimpleNamespace(example=first.__getitem__), 0)
        part = max(batch, key=lambda p: p.tokens.numel() if stage.vae else 0)
        for p in learns:  # what a step before this one left, and the part before this one
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in learns:
            p.grad = torch.zeros_like(p) if parts > 1 else None
        now.peak = now.live
        with torch.autocast("cpu", enabled=config.dtype == "bfloat16", dtype=torch.bfloat16):
            losses = stage.losses(part, 10**9, torch.Generator())
        losses["loss"].backward()
        gradients = total([p.grad for p in learns])
        nn.utils.clip_grad_norm_(stage.model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, stage.model, config.ema, 0)
        others = [m.state_dict() for m in (stage.vae, stage.before) if m]
        kinds = {"weights": total(stage.model.state_dict(), *others), "gradients": gradients,
                 "optimiser": total(optimizer.state_dict()), "average": total(average)}
        peak, now.peak = now.peak, now.live
        kinds["activations"] = peak - sum(kinds.values())
        save = sum(map(total, contents(stage, optimizer, average, 0)))
    every = [p.numel() for p in stage.model.parameters()]
    known = {"trained": sum(p.numel() for p in learns), "save": save, "cache": 0,
             "shape": list(part.tokens.shape if stage.vae else part[0].shape)}  # fmt: skip
    if stage.vae and (ahead := config.cache_latents or getattr(dataset, "__len__", int)()):
        own = stage.vae.config
        images = sum(len(p.images) for p in batch) / config.batch_size
        known["cache"] = round(ahead * images * own.latents_per_image * own.latent_channels * 4)
    return known | {"frozen": sum(every) - known["trained"], "memory": kinds, "peak": peak,
                    "saving": now.peak}  # fmt: skip


def tell(name: str, config: TrainConfig, dataset: data.Dataset, start: Checkpoint | None) -> None:
    """Print what a stage will train and need."""
    device = checkpoint.pick_device(config.device)
    config = dataclasses.replace(config, dtype=dtype_name(config, device))
    if not start and name != "vae":
        some = [s for i in range(64) for s in dataset.example(i) if not s.is_image]
        start = blank(name, config.preset, [s.content for s in some])
    found = figures(name, config, dataset, start)
    gigabytes = {kind: f"{size / 1e9:,.3f}" for kind, size in found["memory"].items()}
    rows = {
        "steps": f"{config.steps:,}", "examples": f"{config.steps * config.batch_size:,}",
        "parameters, trained": f"{found['trained']:,}",
        "parameters, frozen": f"{found['frozen']:,}",
        **{f"memory, {kind}": f"{size} GB" for kind, size in gigabytes.items()},
        "memory, at the peak": f"{found['peak'] / 1e9:,.3f} GB",
        "memory, while saving": f"{found['saving'] / 1e9:,.3f} GB",  # a GPU's or ordinary
        "disk, a save": f"{found['save'] / 1e9:,.3f} GB",
        "disk, latents ahead": f"{found['cache'] / 1e9:,.3f} GB",
    }  # fmt: skip
    print(f"{name} at {config.preset}, {config.dtype}, {config.micro_batches} parts a batch, the "
          f"longest {found['shape']}; a run holds up to 3 saves")
    width = max(map(len, rows.values()))
    print("\n".join(f"    {row:22}{value:>{width}}" for row, value in rows.items()))
