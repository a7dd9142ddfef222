"""What a stage of training needs, told before anything is loaded.

    python -m lab.plan posttrain --preset 7b [--init DIR] [any flag of train.py posttrain]

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
import sys
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
import train
from checkpoint import Checkpoint
from orthus import Orthus, OrthusConfig
from stages import GENERATION, STAGES, UNCONDITIONAL, Settings, examples, merged
from train import make_optimizer, trained, update_average
from vae import VQVAE, VQVAEConfig

aten = torch.ops.aten


def places(index: Tensor | None) -> list:
    """A mask as the indices of what it selects."""
    is_mask = index is not None and index.dtype == torch.bool
    return list(index.nonzero().unbind(1)) if is_mask else [index]


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
                args = args[0], [i for index in args[1] for i in places(index)]
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
    ancestor = dict(vision_embedding="argmin", image_head="tokens")
    model = OrthusConfig.preset(preset, **({} if name == "posttrain" else ancestor))
    vae = VQVAEConfig.preset(preset)
    with torch.device("meta"), checkpoint.Blank():
        parts = {"model": Orthus(model), "vae": VQVAE(vae)}
    dtype, tensors = torch.bfloat16 if preset == "7b" else torch.float32, {}
    for part, module in parts.items():
        tensors[part] = {n: t.to(dtype) for n, t in module.state_dict().items()}
    sections = {"model": dataclasses.asdict(model), "vae": dataclasses.asdict(vae)}
    sections["generation"] = dict(GENERATION)
    content = data.train_tokenizer([*texts, UNCONDITIONAL], 300)
    tokenizer = types.SimpleNamespace(read_bytes=lambda: content)  # it is in no file
    return Checkpoint(Path(f"preset {preset}"), sections, tensors.get, tokenizer)


def without_numbers(source: Checkpoint) -> Checkpoint:
    """The same for Rehearsal.build: names, shapes and dtypes alone."""
    shapes = {}
    for part in {"model", "vae"} & source.config.keys():
        shapes[part] = {n: (t.shape, t.dtype) for n, t in source.tensors(part).items()}

    def read(part: str) -> checkpoint.Tensors:
        return {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in shapes[part].items()}

    return Checkpoint(source.directory, source.config, read, source.tokenizer_path)


def figures(name: str, settings: Settings, dataset, start: Checkpoint | None) -> dict:
    """Bytes of memory by kind at the fullest moment of a step and of a save, numbers of parameters,
    and the tensor that one part of a batch brings. The step is the trainer's, on tensors without
    numbers and the longest part of the first batch."""
    parts, small = (
        getattr(settings, "micro_batches", 1),
        dataclasses.replace(settings, device="cpu"),
    )
    if name == "decoder":  # all its parts are alike
        size = math.ceil(settings.batch_size / parts)
        small = dataclasses.replace(small, batch_size=size, micro_batches=1)
    source = start.section("vae") if start else {}
    resolution = checkpoint.build(VQVAEConfig, source, "vae").resolution if start else 64
    first = examples(dataset, 0, small.batch_size, resolution)  # real pictures, before rehearsing
    start = start and without_numbers(start)
    with Rehearsal() as now:
        stage = now.build(lambda: STAGES[name](small, dataset, start, False))
        learns = list(trained(stage.model).values())
        optimizer = make_optimizer(stage.model, small)
        average = {n: p.detach().clone() for n, p in trained(stage.model).items()}
        batch = stage.batch(types.SimpleNamespace(example=first.__getitem__), 0)
        part = batch[0]
        if stage.vae:
            part = max(batch, key=lambda p: p.batch.tokens.numel())
        for p in learns:  # what a step before this one left, and the part before this one
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in learns:
            p.grad = torch.zeros_like(p) if parts > 1 else None
        now.peak = now.live
        with torch.autocast("cpu", enabled=settings.dtype == "bfloat16", dtype=torch.bfloat16):
            losses = stage.losses(part, 10**9, torch.Generator())
        losses["loss"].backward()
        gradients = total([p.grad for p in learns])
        nn.utils.clip_grad_norm_(stage.model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, stage.model, settings.ema, 0)
        others = [m.state_dict() for m in (stage.vae, stage.before) if m]
        kinds = {"weights": total(stage.model.state_dict(), *others), "gradients": gradients}
        kinds |= {"optimiser": total(optimizer.state_dict()), "average": total(average)}
        peak, now.peak = now.peak, now.live
        kinds["activations"] = peak - sum(kinds.values())
        weights = stage.model.state_dict()
        state = total(weights, average, optimizer.state_dict(), *others)
        save = state + total(merged(stage.model, weights | average), *others)
    every = sum(p.numel() for p in stage.model.parameters())
    learned = sum(p.numel() for p in learns)
    shape = list(part.batch.tokens.shape if stage.vae else part[0].shape)
    known = {"trained": learned, "frozen": every - learned, "save": save, "shape": shape}
    return known | {"memory": kinds, "peak": peak, "saving": now.peak}


def tell(name: str, settings: Settings, dataset, start: Checkpoint | None) -> None:
    """Print what a stage will train and need."""
    if settings.dtype == "auto":
        fast = train.has_fast_bf16(checkpoint.pick_device(settings.device))
        settings = dataclasses.replace(settings, dtype="bfloat16" if fast else "float32")
    if not start and name != "vae":
        some = [s for i in range(64) for s in dataset.example(i) if not s.is_image]
        start = blank(name, settings.preset, [s.content for s in some])
    found = figures(name, settings, dataset, start)
    rows = {"steps": f"{settings.steps:,}"}
    rows["examples"] = f"{settings.steps * settings.batch_size:,}"
    rows["parameters, trained"] = f"{found['trained']:,}"
    rows["parameters, frozen"] = f"{found['frozen']:,}"
    sizes = {f"memory, {kind}": size for kind, size in found["memory"].items()}
    sizes |= {"memory, at the peak": found["peak"], "memory, while saving": found["saving"]}
    sizes["disk, a save"] = found["save"]
    rows |= {row: f"{size / 1e9:,.3f} GB" for row, size in sizes.items()}
    parts = getattr(settings, "micro_batches", 1)
    print(
        f"{name} at {settings.preset}, {settings.dtype}, {parts} parts a batch, the longest "
        f"{found['shape']}; a run holds up to 3 saves"
    )
    width = max(map(len, rows.values()))
    print("\n".join(f"    {row:22}{value:>{width}}" for row, value in rows.items()))


def run(args) -> None:
    given = {k: v for k, v in vars(args).items() if v is not None}
    name, resume = given.pop("stage"), given.pop("resume")
    if name == "all":
        raise ValueError("a plan is of one stage; give vae, decoder, chameleon, base or posttrain")
    settings, init = train.settings_of(name, Path(given.pop("out")), given, resume)
    start = checkpoint.open_checkpoint(init) if init else None
    dataset = train.open_data(settings, start)[0]
    tell(name, settings, dataset, start)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = train.parse_args([*argv, "--out", "."])
    checkpoint.command_line(lambda: run(args))


if __name__ == "__main__":
    main()
