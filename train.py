"""Training: runs a stage of stages.py to its end, on any machine, and loses nothing.

    python train.py vae|decoder|chameleon|base|posttrain --out DIR [--init DIR] [--resume]
    python train.py all --preset nano --out DIR    the whole road, a run per stage, its evaluation
    python train.py STAGE --dry-run [--preset 7b]  what it trains and needs, before it is tried
    python train.py curves RUN ... --out FILE      loss curves of runs, as a picture
    torchrun --nproc-per-node N train.py ...       a stage of the transformer on N devices

A run is a folder: run.json (what it runs with), log.jsonl, samples.png, and saves step-00000500/
that appear when they are whole, the last two kept: checkpoints of the averaged weights, with a
state.pt from which --resume goes on exactly. Data and noise depend on (seed, step) alone.
Reading order: runs and their saves, validation, train(), the command line.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import checkpoint  # first: it answers Ctrl-C while PyTorch is imported

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from checkpoint import Checkpoint
from optim import (Muon, choose_machine, contents, for_all, join, keep_memory, learning_rate,
                   make_optimizer, rank_and_world, shard, shard_like, trained, update_average)
from orthus import DiffusionHead, OrthusConfig
from sample import Generation, Pipeline, Request, generate
from shapes import Schedule, ShapesConfig
from stages import (BASE_ALONE, PRESETS, READ_BY, STAGES, WORLDS, Encoded, Stage, TrainConfig,
                    asdict)
from vae import VQVAEConfig

# --- Runs and their saves ------------------------------------------------------------------------


def save(run: Path, stage: Stage, optimizer: Muon, average: dict, step: int, about: dict):
    """A new folder step-..., there when it is whole; the last two are kept."""
    tensors, state = contents(stage, optimizer, average, step)
    if rank_and_world()[0]:
        return
    part, whole = run / "saving", run / f"step-{step:08d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    checkpoint.write(part, stage.config | about, **tensors, tokenizer=stage.tokenizer)
    with checkpoint.whole_file(part / "state.pt") as file:
        torch.save(state, file)
    if whole.exists():
        shutil.rmtree(whole)
    os.replace(part, whole)
    for old in checkpoint.saves(run)[:-2]:
        shutil.rmtree(old)


def newest_save(run: Path) -> Path | None:
    return max(checkpoint.saves(run), default=None)


def read_state(saved: Path) -> dict:
    path = saved / "state.pt"
    if not path.is_file():
        raise ValueError(f"{saved} has no state.pt; it cannot be resumed")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is another")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever reading what is no archive of tensors may raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged, or no state of a run ({reason:.80}); remove {saved} "
                         "and resume from the save before it") from None


def restore(state: dict, saved: Path, stage: Stage, optimizer: Muon) -> tuple[dict, int]:
    """Put a stage back where it was saved -> the average, and the next step."""
    try:
        own = stage.model.state_dict()
        stage.model.load_state_dict({n: shard_like(t, own[n]) for n, t in state["weights"].items()})
        optimizer.load_state_dict(state["optimizer"])
        if stage.before:
            stage.before.load_state_dict(state["before"])
        average = {n: shard_like(state["average"][n], p) for n, p in trained(stage.model).items()}
        return average, state["step"]
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{saved / 'state.pt'} does not fit these settings ({reason:.80}); resume "
                         "with those that the run began with") from None


def keep_log(path: Path, step: int) -> None:
    """Drop what a run logged past the save it goes on from."""
    if path.is_file():
        text = checkpoint.read_text(path)
        with checkpoint.whole_file(path) as file:
            file.write(text[: text.rfind("\n") + 1].encode())  # a line may have been cut
        kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
        with checkpoint.whole_file(path) as file:
            file.write("".join(kept).encode())


def read_log(path: Path) -> list[dict]:
    lines = checkpoint.read_lines(path)
    if wrong := [w for w, line in lines if not isinstance(line, dict) or "step" not in line]:
        raise ValueError(f"{wrong[0]} is not what a run logs; give the log.jsonl of a run")
    return [line for _, line in lines]


# --- Validation ----------------------------------------------------------------------------------


class Validation:
    """A fixed batch of held-out examples, and fixed prompts with their seeds."""

    def __init__(self, stage: Stage, config: TrainConfig, held_out: data.Dataset):
        self.stage, self.config, self.held_out = stage, config, held_out
        self.batch = stage.batch(held_out, 0)
        some = [held_out.example(i) for i in range(200)]
        draws = [s for s in some if s[-1].is_image and len(s) > 1 and not s[0].is_image][:8]
        self.prompts = [[s for s in segments if not s.output] for segments in draws]

    @torch.no_grad()
    def losses(self, autocast) -> dict[str, float]:
        """Of the current weights; for a diffusion head also by quarter of the noise levels."""
        sums, stage, device = {}, self.stage, self.config.device
        ranges = {"": ()}  # name: further arguments of the stage's losses
        if isinstance(getattr(stage.model, "image_head", None), DiffusionHead):
            ranges |= {f"_t{low}": ((low, low + 250),) for low in range(0, 1000, 250)}
        for name, levels in ranges.items():
            generator = torch.Generator(device).manual_seed(0)
            for micro in self.batch:
                with autocast:
                    losses = stage.losses(to(micro, device), 10**9, generator, *levels)
                for key in [k for k in losses if k != "codes_mixed"] if not name else ["image"]:
                    key_of = f"held_out_{key}{name}"
                    sums[key_of] = sums.get(key_of, 0.0) + losses[key].item()
        return sums

    def pictures(self, average: dict[str, Tensor], path: Path, step: int, number: int,
                 autocast) -> None:
        """Row `number` of the sheet: the fixed prompts, drawn by the averaged weights."""
        raw = {n: p.detach().clone() for n, p in trained(self.stage.model).items()}
        tokenizer = data.Tokenizer(self.stage.tokenizer, self.stage.model.config)
        defaults = Generation(**self.stage.config["generation"])
        pipeline = Pipeline(self.stage.model, self.stage.vae, tokenizer, defaults)
        self.stage.model.load_state_dict(average, strict=False)
        requests = [Request(prompt, seed) for seed, prompt in enumerate(self.prompts)]
        with autocast:  # frozen weights may be bf16
            answers = generate(pipeline, requests, progress=False, min_images=1, max_images=1)
        self.stage.model.load_state_dict(raw, strict=False)
        cells = [(a.images[0], f"{step}: {p[0].content}", "black")
                 for a, p in zip(answers, self.prompts, strict=True)]  # fmt: skip
        page = np.asarray(data.sheet([cells], (96, 96)))
        if path.is_file():  # a resumed run may have drawn this row before
            page = np.concatenate([np.asarray(data.open_image(path))[: number * len(page)], page])
        with checkpoint.whole_file(path) as file:
            Image.fromarray(page).save(file, "PNG")


# --- The loop ------------------------------------------------------------------------------------


def to(batch, device):
    """A micro-batch, or a tuple of tensors, on a device."""
    if isinstance(batch, data.Batch):
        return batch.to(device)
    return tuple(part.to(device) for part in batch)


def noise_seed(seed: int, step: int, number: int) -> int:
    """Of one micro-batch's noise, in 32 bits: a generator on a CPU reads no more of its seed."""
    return random.Random(f"noise {seed} {step} {number}").getrandbits(32)


class Stopped(Exception):
    """SIGTERM: the run was saved and ends well."""


def accumulate(stage: Stage, config: TrainConfig, batch: list, step: int, autocast) -> dict:
    """Add up the gradients of this process's micro-batches -> the sums of their losses."""
    rank, ranks = rank_and_world()
    sums, generator = {}, torch.Generator(config.device)
    for number in range(rank, math.ceil(len(batch) / ranks) * ranks, ranks):
        there = number < len(batch)  # else another counts for nothing: all must compute as often
        generator.manual_seed(noise_seed(config.seed, step, number))
        with autocast:
            part = to(batch[number if there else 0], config.device)
            losses = {k: there * v for k, v in stage.losses(part, step, generator).items()}
        (losses["loss"] if ranks == 1 else for_all(losses["loss"], stage.model)).backward()
        sums = {key: sums.get(key, 0) + value.detach() for key, value in losses.items()}
    return sums


def train(name: str, config: TrainConfig, dataset: data.Dataset, held_out: data.Dataset,
          run: Path, start: Checkpoint | None, about: dict, saved: Path | None = None) -> None:
    """Run one stage to its last step, in the folder `run`, or on from a save of it, which then is
    what it starts from.

    `about` goes into the config.json of every save ("data": what the dataset is).
    """
    device, dtype = choose_machine(config)
    config = dataclasses.replace(config, device=str(device), dtype=str(dtype).split(".")[1])
    rank, ranks = rank_and_world()
    state = read_state(saved) if saved else None
    torch.manual_seed(config.seed)
    stage = STAGES[name](config, dataset, start, saved is not None)
    if ranks > 1:
        shard(stage.model, device)
    model, optimizer = stage.model, make_optimizer(stage.model, config, dtype)
    average = {n: p.detach().clone() for n, p in trained(model).items()}
    average, first = restore(state, saved, stage, optimizer) if state else (average, 0)
    path = Path(os.devnull) if rank else run / "log.jsonl"
    keep_log(path, first)
    if stage.vae and (config.cache_latents or hasattr(dataset, "__len__")):
        number = config.cache_latents or len(dataset)
        encoder = sum(p.sum().item() for p in stage.vae.parameters())
        what = about | {"seed": config.seed, "sum of the autoencoder's weights": encoder}
        for turn in range(ranks):  # the first one encodes, the others find all encoded
            if turn == rank:
                dataset = Encoded(dataset, number, stage.vae, run / "encoded", what)
            if ranks > 1:
                dist.barrier()
    validation = Validation(stage, config, held_out)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    loader = iter(DataLoader(
        range(first, config.steps), batch_size=None, collate_fn=partial(stage.batch, dataset),
        num_workers=config.workers, prefetch_factor=8 if config.workers else None,
        multiprocessing_context="fork" if config.workers else None, worker_init_fn=leave_signals,
    ))
    log, stopping = Log(path, name, config), []
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    try:
        steps = range(first, config.steps)
        for step in tqdm(steps, name, config.steps, initial=first, disable=rank > 0):
            waited = time.time()
            batch = next(loader)
            waited = time.time() - waited
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            sums = accumulate(stage, config, batch, step, autocast)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, model, config.ema, step)
            if stage.after_step:
                stage.after_step(step, optimizer.state, average)
            sums["stopping"] = torch.tensor(bool(stopping))
            if ranks > 1:
                dist.all_reduce(values := torch.stack([v.float().cpu() for v in sums.values()]))
                norm, sums = norm.full_tensor(), dict(zip(sums, values, strict=True))
            stop = bool(sums.pop("stopping"))  # all at the same step
            log.add(sums | {"grad_norm": norm}, batch, waited)
            done = step + 1
            saves = done % config.save_every == 0 or done == config.steps or stop
            checks = done % config.validate_every == 0 or done == config.steps
            if says := saves or checks or done % config.log_every == 0:  # first: a NaN raises
                more = (lambda: validation.losses(autocast)) if checks else dict
                log.write(done, learning_rate(config, step), more)
            if saves:
                save(run, stage, optimizer, average, done, about)
            pictures = config.pictures_every * config.validate_every * (ranks == 1)
            draws = pictures and stage.vae and validation.prompts
            if draws and (done % pictures == 0 or done == config.steps):
                number = math.ceil(done / pictures) - 1
                try:
                    validation.pictures(average, run / "samples.png", done, number, autocast)
                except ValueError as error:  # as of an older sheet that is damaged
                    tqdm.write(f"warning: no row in samples.png ({error})")
            if stop and done < config.steps:
                raise Stopped
            if says:
                log.begin()  # so that its times are those of training alone
    except (KeyboardInterrupt, ValueError, OSError):
        saved = newest_save(run)
        where = f"goes on from {saved}" if saved else "begins anew, as nothing was saved yet"
        tqdm.write(f"--resume {where}", file=sys.stderr)
        raise
    finally:
        del loader  # ends its processes, which ignore signals, whatever went wrong
        signal.signal(signal.SIGTERM, before)


def leave_signals(worker: int) -> None:
    """A signal to the whole group is for the training process; workers end when it does."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class Log:
    """Means over the steps since the last line, on the screen and in log.jsonl."""

    def __init__(self, path: Path, stage: str, config: TrainConfig):
        self.path, self.stage, self.config, self.writer = path, stage, config, None
        if config.tensorboard and path.name == "log.jsonl":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard wants: pip install tensorboard") from None
            self.writer = SummaryWriter(path.parent)
        self.begin()

    def begin(self) -> None:
        self.sums, self.steps, self.tokens, self.waited = {}, 0, 0, 0.0
        self.started = time.time()

    def add(self, values: dict[str, Tensor], batch: list, waited: float) -> None:
        for key, value in values.items():
            self.sums.setdefault(key, []).append(value)
        self.steps, self.waited = self.steps + 1, self.waited + waited
        self.tokens += sum(b.tokens.numel() for b in batch if isinstance(b, data.Batch))

    def write(self, step: int, lr: float, more: Callable[[], dict[str, float]]) -> None:
        means = {key: torch.stack(v).float().mean().item() for key, v in self.sums.items()}
        seconds = time.time() - self.started
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            raise ValueError(f"the loss is {means['loss']} by step {step}; begin again with a "
                             "lower --lr, or go on from a save with --resume")
        means |= more() | {
            "examples_per_second": self.steps * self.config.batch_size / seconds,
            "tokens_per_second": self.tokens / seconds, "waiting": self.waited / seconds,
        }  # fmt: skip
        said = " ".join(f"{key} {value:.4g}" for key, value in means.items())
        tqdm.write(f"{self.stage} {step} lr {lr:.3g} {said}")
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": self.stage, "step": step, "lr": lr} | means) + "\n")
        if self.writer:
            for key, value in means.items():
                self.writer.add_scalar(f"{self.stage}/{key}", value, step)
            self.writer.flush()


# --- Command line --------------------------------------------------------------------------------


def settings(name: str, run: Path, given: dict, resume: bool) -> tuple[TrainConfig, list, str]:
    """-> config, worlds and init of a run: flags over what a resumed run has, over the preset."""
    preset, fields = given.get("preset", "tiny"), {f.name for f in dataclasses.fields(TrainConfig)}
    before = {"init": "", "config": {"preset": preset}}
    if resume:
        before = checkpoint.read_json(run / "run.json")
        if before.get("stage") != name:
            raise ValueError(f"{run} is a run of stage {before.get('stage')!r}, not {name}")
    elif name not in PRESETS.get(preset, {}):
        known = ", ".join(p for p in PRESETS if name in PRESETS[p])
        raise ValueError(f"preset {preset!r} has no stage {name}; known: {known}")
    else:
        before["config"] |= PRESETS[preset][name]
        if parts := before["config"].get("micro_batches"):  # a smaller batch has fewer
            before["config"]["micro_batches"] = min(parts, given.get("batch_size", parts))
        before["world"] = WORLDS[preset][name]
    own = {key: value for key, value in given.items() if key in fields}
    if strange := [key for key in own if name not in READ_BY.get(key, STAGES)]:
        stages = " and ".join(READ_BY[strange[0]])
        raise ValueError(f"{strange[0]} is {own[strange[0]]}, a setting of stage {stages}; stage "
                         f"{name} does not read it")
    world = {key: value for key, value in given.items() if key not in (*fields, "init")}
    if world and own.get("data"):
        raise ValueError(f"{min(world)} is of the Shapes world; --data {own['data']} has its own")
    try:
        began = dict(before["config"]) if resume else own
        if changed := [k for k in BASE_ALONE if k in own and own[k] != began.get(k)]:
            raise ValueError(f"{changed[0]} is {own[changed[0]]} for a run that began with "
                             f"{began.get(changed[0])}; begin another with another --out")
        config = checkpoint.build(TrainConfig, before["config"] | own, f"stage {name}")
        worlds = [[float(share), asdict(checkpoint.build(ShapesConfig, w | world, "the world"))]
                  for share, w in before["world"] or [None]]  # fmt: skip
        init = before["init"] if newest_save(run) else given.get("init") or before["init"]
        return config, worlds, init
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run / 'run.json'} is not what a run writes ({error}); begin another "
                         "with another --out") from None


def check_size(start: Checkpoint, preset: str) -> None:
    """A checkpoint of one preset's size is not trained with another's settings."""
    part = ("model", "hidden_size", OrthusConfig), ("vae", "base_channels", VQVAEConfig)
    section, name, kind = part["model" not in start.config]
    value = start.section(section)[name]
    fitting = [p for p in PRESETS if getattr(kind.preset(p), name) == value]
    if fitting and preset not in fitting:
        raise ValueError(f"{start} has the size of preset {fitting[0]}, not {preset} ({name} is "
                         f"{value}); give --preset {fitting[0]}")


def open_data(config: TrainConfig, worlds: list, start: Checkpoint | None) -> tuple:
    """-> what to train on, what is held out, and what config.json says of it."""
    if not config.data:
        examples, seeds = config.steps * config.batch_size, (config.seed, config.seed + 2**32)
        return *(Schedule(worlds, examples, seed) for seed in seeds), worlds[-1][1]
    vae = start.section("vae") if start else asdict(VQVAEConfig.preset(config.preset))
    own = data.open_dataset(config.data.split(","), vae["resolution"], config.format,
                            config.images or None, config.strict)  # fmt: skip
    if start and "model" in start.config:
        tokenizer, unknown = data.Tokenizer.from_pretrained(start), start.section("model")["unk_id"]
        words = sorted(data.words_of(own[0].texts()))
        if strange := [word for word in words if unknown in tokenizer.encode(word)]:
            tqdm.write(f"warning: {len(strange)} of {len(words)} words have letters that the "
                       f"tokenizer of {start} does not know ({', '.join(strange[:5])}); only a "
                       "model trained from stage vae on has one made for them")  # fmt: skip
    return *own, {"files": config.data, "fingerprint": own[0].fingerprint()}


def dry_run(name: str, run: Path, given: dict, resume: bool) -> None:
    """Print what a stage would train and need."""
    import plan  # here: what it imports takes a second

    config, worlds, init = settings(name, run, given, resume)
    start = checkpoint.open_checkpoint(init) if init else None
    dataset = open_data(config, worlds, start)[0]
    if start:
        check_size(start, config.preset)
    plan.tell(name, config, dataset, start)


def start_run(name: str, out: str, given: dict, resume: bool) -> None:
    """Check what is cheap to check, write run.json, and train; one process a folder."""
    if not out:
        raise ValueError("--out is empty; give a directory for the run")
    run = Path(out)
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file; give a directory for the run")
    is_run = (run / "run.json").is_file()
    if resume and not is_run:
        raise ValueError(f"{run} holds no run to resume; leave out --resume")
    if not resume and run.is_dir() and (found := [p for p in run.iterdir() if p.name != ".lock"]):
        raise ValueError(f"{run} holds a run already; give --resume or another --out" if is_run else
                         f"{run} is not empty ({found[0].name}); give another --out")
    config, worlds, init = settings(name, run, given, resume)
    rank, ranks = rank_and_world()
    if ranks > 1 and (name in ("vae", "decoder") or config.compile):
        what = f"stage {name}{' with --compile' * config.compile}"
        raise ValueError(f"{what} trains in one process, not {ranks}; leave out torchrun")
    if config.micro_batches % ranks or ranks > 1 and config.batch_size % config.micro_batches:
        raise ValueError(f"micro_batches is {config.micro_batches}; want a multiple of the {ranks} "
                         f"processes that divides batch_size, {config.batch_size}")
    saved = newest_save(run)
    if saved and config.steps <= int(saved.name[5:]):
        raise ValueError(f"{run} is at step {int(saved.name[5:])} of {config.steps}; raise --steps")
    if name != "vae" and not (init or saved):
        raise ValueError(f"stage {name} starts from a checkpoint: give --init DIR")
    if config.cache_latents and any(world != worlds[0][1] for _, world in worlds):
        raise ValueError(f"cache_latents is {config.cache_latents}, which would hold the first of "
                         f"{len(worlds)} worlds alone; leave it out, or make them one by --tasks")
    start = checkpoint.open_checkpoint(saved or init) if init or name != "vae" else None
    if name != "vae" and config.preset != "7b":
        checkpoint.build(VQVAEConfig, start.section("vae"), start)
    if start:
        check_size(start, config.preset)
    checkpoint.pick_device(config.device)
    *datasets, about = open_data(config, worlds, start)
    if ranks > 1:
        dist.barrier()  # all have looked at the folder
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if rank else checkpoint.lock(run):
        record = {"stage": name, "init": init and str(Path(init).resolve()), "world": worlds,
                  "config": asdict(config), "torch": torch.__version__}  # fmt: skip
        old = checkpoint.read_json(run / "run.json") if resume else record
        if rank == 0:
            checkpoint.write_json(run / "run.json", record)
        try:
            train(name, config, *datasets, run, start, {"data": about}, saved)
        except Stopped:
            tqdm.write(f"stopped and saved; --resume goes on from {newest_save(run)}")
        except (ValueError, OSError):
            if rank == 0 and newest_save(run) == saved:  # what was refused stays as it was
                checkpoint.write_json(run / "run.json", old)
            raise


def train_all(out: str, given: dict) -> None:
    """The whole road into one directory: a run per stage, the result in bf16, its evaluation.

    Stages that are finished are skipped, an interrupted one goes on.
    """
    import evaluate  # it imports this file's neighbours, and only this needs it

    if not out:
        raise ValueError("--out is empty; give a directory for the runs")
    init, preset = "", given.get("preset", "tiny")
    if os.path.isdir(out) and os.listdir(out) and not (Path(out) / "vae" / "run.json").is_file():
        raise ValueError(f"{out} is not empty and holds no such road; give another --out")
    if preset == "7b":
        raise ValueError("preset 7b starts from released weights: run its stages one by one")
    for name in STAGES:
        run, started = Path(out) / name, time.time()
        resume = (run / "run.json").is_file()
        own = {k: v for k, v in given.items() if name in READ_BY.get(k, STAGES)}
        own |= {"init": init} if init else {}
        if "seed" in given:  # its own for each stage
            own["seed"] = given["seed"] * 100 + list(STAGES).index(name)
        config, _, _ = settings(name, run, own, resume)
        saved = newest_save(run)
        if saved is None or int(saved.name[5:]) < config.steps:
            start_run(name, str(run), own, resume)
            if int((newest_save(run) or Path("step-0")).name[5:]) < config.steps:
                return  # stopped
            tqdm.write(f"stage {name} took {(time.time() - started) / 60:.1f} minutes")
        elif late := [f"{k} {own[k]}" for k, v in
                      checkpoint.read_json(run / "run.json")["config"].items()
                      if k in own and v != asdict(config)[k]]:  # fmt: skip
            tqdm.write(f"warning: stage {name} was finished without {', '.join(late)}, which comes "
                       "too late; for another road give another --out", file=sys.stderr)
        init = str(run)
    publish(init, out)
    if not given.get("data"):  # its judge knows the Shapes world alone
        print(evaluate.report(out, Path(out)))


def publish(run: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights as a checkpoint in bf16, half the size."""
    source = checkpoint.open_checkpoint(run)
    model, vae = ({k: t.to(torch.bfloat16) for k, t in source.tensors(part).items()}
                  for part in ("model", "vae"))  # fmt: skip
    checkpoint.write(out, source.config, model, vae, source.tokenizer)
    print(f"{out} is complete: python sample.py --checkpoint {out} --prompt ...")


def curves(runs: list[str], out: str) -> None:
    """Loss curves of one or several runs in one PNG."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("curves draws with matplotlib: pip install matplotlib") from None
    if Path(out).suffix.lower() != ".png":
        raise ValueError(f"--out is {out!r}; give the picture a name that ends in .png")
    logs = {}
    for run in runs:
        found = [Path(run), *sorted(p for p in Path(run).glob("*") if p.is_dir())]
        own = {str(p): p / "log.jsonl" for p in found if (p / "log.jsonl").is_file()}
        if not own:
            raise ValueError(f"no log.jsonl in {run}; give folders of runs")
        logs |= own
    keys = ("loss", "text", "image")
    figure, axes = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 4), layout="constrained")
    for number, (name, path) in enumerate(logs.items()):
        lines = read_log(path)
        for axis, key in zip(axes, keys, strict=True):
            for prefix, style in (("", "-"), ("held_out_", ":")):
                points = [(d["step"], d[prefix + key]) for d in lines if d.get(prefix + key)]
                if points:  # a part that a stage has not is zero
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}",
                              label=None if prefix else name)  # fmt: skip
            axis.set(title=key, xlabel="step", yscale="log")
    axes[0].legend(fontsize="small")
    with checkpoint.whole_file(Path(out)) as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"{out}: {len(logs)} runs (dotted: held-out examples)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags are the fields of TrainConfig and of the world."""
    parser = checkpoint.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "all", "curves"])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="of curves: folders of runs")
    parser.add_argument("--out", metavar="DIR", help="the run's folder; of curves, the picture's "
                        "file")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what a stage trains, its "
                        "memory and disk space; nothing is loaded or written")  # fmt: skip
    parser.add_argument("--init", metavar="DIR", help="the checkpoint or run to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the newest save")
    checkpoint.add_flags(parser, TrainConfig)
    checkpoint.add_flags(parser, ShapesConfig, ("tasks", "captions", "questions", "edits", "digits",
                                                "max_objects"))  # fmt: skip
    args = parser.parse_args(argv)
    if args.dry_run and args.stage not in STAGES:
        parser.error(f"--dry-run is of one stage, not of {args.stage}")
    if args.out is None and (args.resume or not args.dry_run):
        parser.error("--out is missing; give a directory for the run")
    if bool(args.runs) != (args.stage == "curves"):
        parser.error("curves takes folders of runs, and no stage does")
    return args


def run(args: argparse.Namespace) -> None:
    given = {k: v for k, v in vars(args).items() if v is not None}
    stage, runs, resume, dry = (given.pop(k) for k in ("stage", "runs", "resume", "dry_run"))
    out = given.pop("out", "")
    join()
    if dry:
        dry_run(stage, Path(out), given, resume)
    elif stage == "curves":
        curves(runs, out)
    elif stage == "all":
        train_all(out, given)
    else:
        start_run(stage, out, given, resume)
    if dist.is_initialized():
        dist.barrier()  # without it the last one may find the others gone, and abort
        dist.destroy_process_group()


def main() -> None:
    keep_memory()
    args = parse()
    checkpoint.command_line("train.py", lambda: run(args))


if __name__ == "__main__":
    main()
