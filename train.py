"""Training: runs a stage of stages.py to its end and loses nothing.

    python train.py vae|decoder|chameleon|base|posttrain --out DIR [--init DIR] [--resume]
    python train.py all --preset nano --out DIR    the whole road, a run per stage, published

A run is a folder: run.json (what it runs with), log.jsonl, samples.png, and saves step-00000500/
that appear when they are whole, the last two kept: checkpoints of the averaged weights, with a
state.pt from which --resume goes on. A resumed run equals one that was never interrupted to the
bit, with the same settings, data, machine and number of threads: data and noise depend on (seed,
step) alone, and weights, average, moments and log are those of the save.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
from checkpoint import Generation
from sample import Pipeline, Request, generate
from stages import PRESETS, STAGES, Part, Settings, merged

# --- The machine, the optimiser and its average ---------------------------------------------------


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 products natively; elsewhere they are many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    natively = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and natively


def choose_machine(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the products; one line says which and why."""
    device = checkpoint.pick_device(settings.device)
    if settings.threads:
        torch.set_num_threads(min(settings.threads, os.cpu_count()))  # more would only wait
    name, why = settings.dtype, "as asked"
    if name == "auto" and has_fast_bf16(device):
        name, why = "bfloat16", "bf16 is native here"
    elif name == "auto":
        name, why = "float32", "bf16 is not native here"
    unfused = (device.type, name) == ("cpu", "bfloat16")  # where attention's own backward is slow
    torch.backends.cuda.enable_flash_sdp(not unfused)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(unfused)
    tqdm.write(f"device {device}, {name} products ({why}), {torch.get_num_threads()} CPU threads")
    return device, getattr(torch, name)


def keep_memory() -> None:
    """Tell glibc to keep freed memory: page faults cost up to half of a CPU training step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim, top pad
            libc.mallopt(option, value)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, and has an average: what is frozen would only be there twice."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, or what "module:function" makes, over what learns. Weight decay is on the matrices of
    linear layers and convolutions, not on embeddings, norms and biases; those between embeddings
    and outputs are a group with "inner", for optimisers that treat them apart."""
    ends = ("lm_head", "image_head.final_layer.linear", "encoder.conv_in", "decoder.conv_out")
    groups = [{"params": []}, {"params": [], "weight_decay": 0.0}, {"params": [], "inner": True}]
    modules = dict(model.named_modules())
    for name, p in trained(model).items():
        layer, _, kind = name.rpartition(".")
        if not isinstance(modules[layer], nn.Linear | nn.Conv2d) or kind != "weight":
            groups[1]["params"].append(p)
        else:
            groups[0 if layer in ends else 2]["params"].append(p)
    options = dict(lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    module, _, function = settings.optimizer.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        found = f"optimizer is {settings.optimizer!r} ({error})"
        raise ValueError(f"{found}; want adamw, or module:function") from None
    return make(groups, **options)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up over `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    progress = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """average <- decay average + (1 - decay) weights; the decay warms up from 0.1."""
    decay, weights = min(decay, (1 + step) / (10 + step)), trained(model)
    torch._foreach_lerp_([average[n] for n in weights], list(weights.values()), 1 - decay)


def noise_seed(seed: int, step: int, number: int) -> int:
    """Of one part's noise, in 32 bits: a generator on a CPU reads no more of its seed."""
    return random.Random(f"noise {seed} {step} {number}").getrandbits(32)


# --- Saves and logs ------------------------------------------------------------------------------


def newest_save(run: Path) -> Path | None:
    return max(checkpoint.saves(Path(run)), default=None)


def step_of(saved: Path | None) -> int:
    return int(saved.name.removeprefix("step-")) if saved else 0


def read_state(saved: Path) -> dict:
    path, before = saved / "state.pt", [p for p in checkpoint.saves(saved.parent) if p != saved]
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # PyTorch does not look at checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is another")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading what is no archive of tensors may raise anything
        found = f"{path} is damaged, or no state of a run ({str(error).splitlines()[0]:.80})"
        after = f"resume from {before[-1].name}" if before else "begin anew"
        raise ValueError(f"{found}; remove {saved} and {after}") from None


def read_log(path: Path) -> list[dict]:
    lines = checkpoint.read_lines(path)
    wrong = [where for where, line in lines if not isinstance(line, dict) or "step" not in line]
    if wrong:
        raise ValueError(f"{wrong[0]} is not what a run logs; give the log.jsonl of a run")
    return [line for _, line in lines]


def keep_log(path: Path, step: int) -> None:
    """Drop what a run logged past the save it goes on from, and a line that was cut."""
    if path.is_file():
        text = checkpoint.read_text(path)
        with checkpoint.whole_file(path) as file:
            file.write(text[: text.rfind("\n") + 1].encode())
        kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
        with checkpoint.whole_file(path) as file:
            file.write("".join(kept).encode())


class Log:
    """Means over the steps since the last line, on the screen and in log.jsonl."""

    def __init__(self, path: Path, stage: str, settings: Settings):
        self.path, self.stage, self.settings = path, stage, settings
        self.begin()

    def begin(self) -> None:
        self.losses, self.tokens, self.waited, self.started = [], 0, 0.0, time.time()

    def add(self, losses: dict[str, Tensor], batch: list, waited: float) -> None:
        self.losses.append(losses)
        self.waited += waited
        self.tokens += sum(p.batch.tokens.numel() for p in batch if isinstance(p, Part))

    def write(self, step: int, lr: float, held_out: dict[str, float]) -> None:
        """Raises ValueError where the loss is not finite, so that nothing of it is saved."""
        seconds, means = time.time() - self.started, {}
        for key in {key: None for losses in self.losses for key in losses}:
            values = [losses[key].float() for losses in self.losses if key in losses]
            means[key] = torch.stack(values).mean().item()
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            found = f"the loss is {means['loss']} by step {step}"
            raise ValueError(f"{found}; begin again with a lower --lr, or --resume from a save")
        examples = len(self.losses) * self.settings.batch_size
        means |= held_out | {"examples_per_second": examples / seconds}
        means |= {"tokens_per_second": self.tokens / seconds, "waiting": self.waited / seconds}
        said = " ".join(f"{key} {value:.4g}" for key, value in means.items())
        tqdm.write(f"{self.stage} {step} lr {lr:.3g} {said}")
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": self.stage, "step": step, "lr": lr} | means) + "\n")


# --- The loop ------------------------------------------------------------------------------------


def leave_signals(worker: int) -> None:
    """A signal to the whole group is for the training process; workers end when it does."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class Trainer:
    """Runs one stage to its last step, in the folder `run`, or on from one of its saves, which then
    is what it starts from. `about` goes into the config.json of every save ("data")."""

    def __init__(self, name, settings, dataset, held_out, run, start, about, saved=None):
        self.device, self.dtype = choose_machine(settings)
        names = dict(device=str(self.device), dtype=str(self.dtype).removeprefix("torch."))
        self.settings = settings = dataclasses.replace(settings, **names)
        self.dataset, self.held_out, self.run_folder, self.about = dataset, held_out, run, about
        state = read_state(saved) if saved else None
        torch.manual_seed(settings.seed)
        self.stage = STAGES[name](settings, dataset, start, saved is not None)
        self.model = self.stage.model
        self.prepare()
        self.optimizer = make_optimizer(self.model, settings)
        self.average = {n: p.detach().clone() for n, p in trained(self.model).items()}
        self.first, self.stopping = 0, False
        if state:
            self.restore(state, saved)
        self.log = Log(run / "log.jsonl", name, settings)
        is_half = self.dtype != torch.float32
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=is_half)

    def prepare(self) -> None:
        """What a subclass does to the model before it has an optimiser."""

    def restore(self, state: dict, saved: Path) -> None:
        """Put everything back as it was saved."""
        try:
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.stage.before:
                self.stage.before.load_state_dict(state["before"])
            self.average = {n: state["average"][n].to(p.device) for n, p in self.average.items()}
            self.first = state["step"]
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            found = f"{saved / 'state.pt'} does not fit ({str(error).splitlines()[0]:.80})"
            raise ValueError(f"{found}; resume with the settings it began with") from None

    def batch(self, step: int) -> list:
        """The parts of a step's batch; called in the data processes."""
        return self.stage.batch(self.dataset, step)

    def accumulate(self, batch: list, step: int) -> dict[str, Tensor]:
        """Add up the gradients of a batch's parts -> the sums of their losses."""
        sums, generator = {}, torch.Generator(self.device)
        for number, part in enumerate(batch):
            generator.manual_seed(noise_seed(self.settings.seed, step, number))
            with self.autocast:
                losses = self.stage.losses(part, step, generator)
            losses["loss"].backward()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0) + value.detach()
        return sums

    def update(self, step: int) -> Tensor:
        """One step of the optimiser -> the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_average(self.average, self.model, self.settings.ema, step)
        if self.stage.after_step:
            self.stage.after_step(step, self.dataset, self.optimizer.state, self.average)
        return norm

    def state(self, step: int) -> dict:
        """What a resumed run needs."""
        state = {"step": step, "weights": self.model.state_dict(), "average": self.average}
        state["optimizer"] = self.optimizer.state_dict()
        if self.stage.before:
            state["before"] = self.stage.before.state_dict()
        return state

    def save(self, step: int) -> None:
        """A new folder step-..., there when it is whole; the last two are kept."""
        self.write_save(step, self.state(step))

    def write_save(self, step: int, state: dict) -> None:
        part, whole = self.run_folder / "saving", self.run_folder / f"step-{step:08d}"
        tensors = {"vae": self.stage.vae.state_dict() if self.stage.vae else None}
        tensors |= self.stage.others
        tensors[self.stage.part] = merged(self.model, state["weights"] | state["average"])
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        config = self.stage.config | self.about
        checkpoint.write(part, config, **tensors, tokenizer=self.stage.tokenizer)
        with checkpoint.whole_file(part / "state.pt") as file:
            torch.save(state, file)
        if whole.exists():
            shutil.rmtree(whole)
        os.replace(part, whole)
        for old in checkpoint.saves(self.run_folder)[:-2]:
            shutil.rmtree(old)

    def stop(self) -> bool:
        """Whether SIGTERM has come."""
        return self.stopping

    def load_batches(self):
        """The batches of all steps from the first on, made in data processes."""
        workers = self.settings.workers if hasattr(os, "fork") else 0
        more = dict(prefetch_factor=8, multiprocessing_context="fork") if workers else {}
        more |= dict(num_workers=workers, worker_init_fn=leave_signals)
        steps = range(self.first, self.settings.steps)
        return iter(DataLoader(steps, batch_size=None, collate_fn=self.batch, **more))

    def run(self) -> bool:
        """The loop -> whether it came to its last step, or was stopped by SIGTERM."""
        settings, validation = self.settings, Validation(self)
        keep_log(self.log.path, self.first)
        loader = self.load_batches()
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        try:
            steps = range(self.first, settings.steps)
            for step in tqdm(steps, self.log.stage, settings.steps, initial=self.first):
                waiting = time.time()
                batch = next(loader)
                waited = time.time() - waiting
                losses = self.accumulate(batch, step)
                losses["grad_norm"] = self.update(step)
                self.log.add(losses, batch, waited)

                done, stop = step + 1, self.stop()
                last = done == settings.steps
                saves = done % settings.save_every == 0 or last or stop
                checks = done % settings.validate_every == 0 or last
                if saves or checks or done % settings.log_every == 0:  # first: a NaN raises
                    held_out = validation.losses() if checks else {}
                    self.log.write(done, learning_rate(settings, step), held_out)
                    if saves:
                        self.save(done)
                    if checks:
                        validation.pictures(done)
                    self.log.begin()  # so that its times are those of training alone
                if stop:
                    return last
            return True
        finally:
            del loader  # ends its processes, which ignore signals, whatever went wrong
            signal.signal(signal.SIGTERM, before)


def prompts_of(held_out) -> list[list]:
    """Eight of its first 200 examples that draw by words, without what they draw."""
    number = min(200, len(held_out)) if hasattr(held_out, "__len__") else 200
    found = [held_out.example(i) for i in range(number)]
    draws = [s for s in found if len(s) > 1 and not s[0].is_image and s[-1].is_image]
    return [[s for s in segments if not s.output] for segments in draws[:8]]


class Validation:
    """A fixed batch of held-out examples, and fixed prompts with their seeds."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.stage = trainer, trainer.stage
        self.batch = self.stage.batch(trainer.held_out, 0)
        self.prompts = prompts_of(trainer.held_out) if self.stage.vae else []

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Of the current weights; for a diffusion head also by quarter of the noise levels."""
        sums, generator = {}, torch.Generator(self.trainer.device).manual_seed(0)
        for part in self.batch:
            with self.trainer.autocast:
                found = self.stage.losses(part, 10**9, generator)
                if isinstance(part, Part):
                    found |= self.stage.image_loss_by_level(part, generator)
            for key in found.keys() - {"codes_mixed"}:
                sums[f"held_out_{key}"] = sums.get(f"held_out_{key}", 0.0) + found[key].item()
        return dict(sorted(sums.items()))

    def pictures(self, step: int) -> None:
        """samples.png: the fixed prompts, drawn by the averaged weights, side by side."""
        settings = self.trainer.settings
        every = getattr(settings, "pictures_every", 0) * settings.validate_every
        if not (every and self.prompts and (step % every == 0 or step == settings.steps)):
            return
        model, config = self.trainer.model, self.stage.config
        raw = {n: p.detach().clone() for n, p in trained(model).items()}
        model.load_state_dict(self.trainer.average, strict=False)
        defaults = Generation(**config["generation"])
        pipeline = Pipeline(model, self.stage.vae, self.stage.words, defaults)
        requests = [Request(prompt, seed) for seed, prompt in enumerate(self.prompts)]
        with self.trainer.autocast:  # frozen weights may be bf16
            answers = generate(pipeline, requests, progress=False, min_images=1, max_images=1)
        model.load_state_dict(raw, strict=False)
        row = data.row_of([answer.images[0] for answer in answers])
        with checkpoint.whole_file(self.trainer.run_folder / "samples.png") as file:
            row.save(file, "PNG")


# --- Command line --------------------------------------------------------------------------------


FIXED = ["preset", "optimizer", "vision_embedding", "image_head", "tau", "prediction"]
FIXED += ["zero_terminal_snr", "lora_rank", "lora_scale", "lora_targets"]  # of a run, once it began


def settings_of(name: str, run: Path, given: dict, resume: bool) -> tuple[Settings, str]:
    """-> settings and init of a run: flags over what a resumed run has, over the preset."""
    kind, preset, init = STAGES[name].Settings, given.get("preset", "tiny"), given.get("init") or ""
    given = {key: value for key, value in given.items() if key != "init"}
    if "data" in given:
        given = {"data_args": "{}"} | given  # the preset's are of its own data
    if resume:
        record = checkpoint.read_json(run / "run.json")
        if record.get("stage") != name:
            raise ValueError(f"{run} is no run of stage {name}; give the one that it is")
        began = checkpoint.build(kind, record.get("settings"), run / "run.json")
        init = init if init and not newest_save(run) else str(record.get("init") or "")
        before = dataclasses.asdict(began)
    elif name in PRESETS[preset]:
        before = {"preset": preset} | PRESETS[preset][name]
        parts = before.get("micro_batches", 1)  # a smaller batch has fewer
        before["micro_batches"] = min(parts, given.get("batch_size", parts))
    else:
        raise ValueError(f"preset {preset} has no stage {name}; give another --preset")
    settings = checkpoint.build(kind, before | given, f"stage {name}")
    changed = [f for f in FIXED if resume and before.get(f) != getattr(settings, f, None)]
    if changed:
        was = f"{changed[0]} is {getattr(settings, changed[0])}, and was {before[changed[0]]}"
        raise ValueError(f"{was} when {run} began; give another --out for another run")
    if settings.micro_batches > settings.batch_size:
        raise ValueError(f"micro_batches is {settings.micro_batches}; want at most batch_size")
    return settings, init


def open_data(settings: Settings, start) -> tuple:
    """-> what to train on, what is held out, and what config.json says of it."""
    args = checkpoint.parse_json(settings.data_args, "--data-args")
    if not isinstance(args, dict):
        raise ValueError(f"--data-args is {settings.data_args!r:.60}; want a JSON object")
    count = settings.steps * settings.batch_size
    train, held_out = data.open_dataset(settings.data, args, settings.seed, count)
    return train, held_out, {"data": {"spec": settings.data, "args": args}}


def train_stage(name: str, out: str, given: dict, resume: bool, trainer=Trainer) -> bool:
    """Check what is cheap to check, write run.json, and train; one process a folder -> whether the
    run came to its end."""
    run = Path(out)
    is_run = (run / "run.json").is_file()
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out is {out!r}, a file; give a directory for the run")
    if resume and not is_run:
        raise ValueError(f"{run} holds no run to resume; leave out --resume")
    if not resume and run.is_dir() and any(p.name != ".lock" for p in run.iterdir()):
        raise ValueError(f"{run} is not empty; give --resume, or another --out")
    settings, init = settings_of(name, run, given, resume)
    saved = newest_save(run)
    if saved and settings.steps <= step_of(saved):
        raise ValueError(f"{run} is at step {step_of(saved)} of {settings.steps}; raise --steps")
    if name != "vae" and not (init or saved):
        raise ValueError(f"stage {name} starts from a checkpoint: give --init DIR")
    start = checkpoint.open_checkpoint(saved or init) if init or name != "vae" else None
    checkpoint.pick_device(settings.device)
    train, held_out, about = open_data(settings, start)
    run.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(run):
        old = checkpoint.read_json(run / "run.json") if resume else None
        ready = trainer(name, settings, train, held_out, run, start, about, saved)
        record = {"stage": name, "init": init and str(Path(init).resolve())}
        record |= {"settings": dataclasses.asdict(settings), "torch": torch.__version__}
        prompts = prompts_of(held_out) if ready.stage.vae else []  # of samples.png
        record["prompts"] = [" ".join(s.content for s in p if not s.is_image) for p in prompts]
        checkpoint.write_json(run / "run.json", record)
        try:
            finished = ready.run()
        except (KeyboardInterrupt, ValueError, OSError) as error:
            where = newest_save(run)
            if old and where == saved and not isinstance(error, KeyboardInterrupt):
                checkpoint.write_json(run / "run.json", old)  # what was refused stays as it was
            hint = f"goes on from {where}" if where else "begins anew, as nothing was saved yet"
            tqdm.write(f"--resume {hint}", file=sys.stderr)
            raise
    if not finished:
        tqdm.write(f"stopped and saved; --resume goes on from {newest_save(run)}")
    return finished


def train_all(out: str, given: dict) -> None:
    """The whole road into one directory: a run per stage, the result in bf16. Stages that are
    finished are skipped, an interrupted one goes on."""
    init, preset = "", given.get("preset", "tiny")
    if preset == "7b":
        raise ValueError("preset 7b starts from released weights: run its stages one by one")
    if os.path.isdir(out) and os.listdir(out) and not (Path(out) / "vae" / "run.json").is_file():
        raise ValueError(f"{out} is not empty and holds no such road; give another --out")
    for number, name in enumerate(STAGES):
        run, began, ours = Path(out) / name, time.time(), dict(given)
        resume = (run / "run.json").is_file()
        if init:
            ours["init"] = init
        if "seed" in given:  # each stage has its own
            ours["seed"] = given["seed"] * 100 + number
        settings, _ = settings_of(name, run, ours, resume)
        if step_of(newest_save(run)) < settings.steps:
            if not train_stage(name, str(run), ours, resume):
                return
            tqdm.write(f"stage {name} took {(time.time() - began) / 60:.1f} minutes")
        else:
            known = checkpoint.read_json(run / "run.json")["settings"]
            late = [f"{k} {ours[k]}" for k in ours if k in known and known[k] != ours[k]]
            if late:
                late = f"{name} was finished without {', '.join(late)}, which comes too late"
                tqdm.write(f"warning: stage {late}; for another road give another --out")
        init = str(run)
    publish(init, out)


def publish(run: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights as a checkpoint in bf16, half the size."""
    source = checkpoint.open_checkpoint(run)
    halves = {}
    for part in ("model", "vae"):
        halves[part] = {k: t.to(torch.bfloat16) for k, t in source.tensors(part).items()}
    checkpoint.write(out, source.config, **halves, tokenizer=source.tokenizer)
    print(f"{out} is complete: python sample.py --checkpoint {out} --prompt ...")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = checkpoint.Parser(description=__doc__, formatter_class=raw)
    stages = parser.add_subparsers(dest="stage", required=True, parser_class=checkpoint.Parser)
    for name, stage in STAGES.items():
        about = stage.__doc__.split("\n\n")[0]
        one = stages.add_parser(name, description=about, help=" ".join(about.split()))
        one.add_argument("--out", required=True, metavar="DIR", help="the run's folder")
        one.add_argument("--init", metavar="DIR", help="the checkpoint or run to start from")
        one.add_argument("--resume", action="store_true", help="go on from the newest save")
        checkpoint.add_flags(one, stage.Settings)
    road = stages.add_parser("all", help="the whole road: a run per stage, the result published")
    road.add_argument("--out", required=True, metavar="DIR", help="the runs, and the result")
    names = ("preset", "seed", "data", "data_args", "dtype", "device", "threads", "workers")
    checkpoint.add_flags(road, Settings, names)
    return parser.parse_args(argv)


def run(args: argparse.Namespace, trainer=Trainer) -> None:
    given = {k: v for k, v in vars(args).items() if v is not None}
    stage, out, resume = given.pop("stage"), given.pop("out"), given.pop("resume", False)
    if not out:
        raise ValueError("--out is empty; give a directory")
    if stage == "all":
        train_all(out, given)
    else:
        train_stage(stage, out, given, resume, trainer)


def main(argv: list[str] | None = None) -> None:
    keep_memory()
    args = parse_args(argv)
    checkpoint.command_line(lambda: run(args))


if __name__ == "__main__":
    main()
