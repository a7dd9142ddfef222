"""The paper's claims as experiments: every arm is a list of commands of train.py, at nano scale.

    python experiments.py [--only NAME] [--seeds 3]

All arms go on from one start (the autoencoder and the Chameleon that `train.py all --preset nano`
makes), with equal data and steps, and answer the same held-out prompts. What is done is kept in
experiments/results.json and skipped the next time; a run that was interrupted goes on. The verdicts
are written into RESULTS.md from that file alone (`--only none` writes them again).
Reading order: arms, experiments, the runner, comparisons and verdicts, the page.
"""

import argparse
import gzip
import itertools
import json
import math
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint  # first: it answers Ctrl-C while PyTorch is imported

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import train
from data import Segment, collate, layout, sheet
from evaluate import TASKS, held_out, run_task
from sample import Pipeline, Request, generate, load
from shapes import Shapes, ShapesConfig
from vae import VQVAE

HERE = Path(__file__).parent
RUNS, RESULTS = HERE / "runs" / "experiments", HERE / "experiments" / "results.json"

# --- Arms ----------------------------------------------------------------------------------------

# Stages with their flags, from the start on; FLAGS of a stage come before an arm's own.
FLAGS = {"posttrain": "--steps 500 --batch-size 32 --pictures-every 0 "
                      "--tasks text_to_image=1,understanding=1"}  # fmt: skip
TUNED = 500  # steps of the decoder alone
START = ["vae", "decoder", "chameleon"]
UNDERSTANDING = "--tasks understanding=1 --batch-size 16"  # half of the mixture: as many questions
ARMS = {  # or the name of an arm whose models are drawn from in another way
    "orthus": ["base", "posttrain"],
    "chameleon": ["posttrain"],
    "stage 1 alone": ["base"],
    "nothing": [],  # the start itself
    "understanding alone": ["base", f"posttrain {UNDERSTANDING}"],
    "generation alone": ["base", "posttrain --tasks text_to_image=1 --batch-size 16"],
    "argmin": ["base --vision-embedding argmin", f"posttrain {UNDERSTANDING}"],
    "linear": ["base --vision-embedding linear", f"posttrain {UNDERSTANDING}"],
    "squared error": ["base --image-head mse", "posttrain"],
    "tau: 2 codes": ["base --mixed-codes 2", "posttrain"],
    "tau: 10 codes": ["base --mixed-codes 10", "posttrain"],
    "tau: 150 codes": ["base --mixed-codes 150", "posttrain"],
    "1 noising": ["base --diffusion-batch-multiplier 1", "posttrain"],
    "8 noisings": ["base --diffusion-batch-multiplier 8", "posttrain"],
    "epsilon": ["base --prediction epsilon --no-zero-terminal-snr", "posttrain"],
    "terminal noise": ["base --no-zero-terminal-snr", "posttrain"],
    "no input noise": ["base", "posttrain --input-noise 0"],
    "edits": ["base", "posttrain --steps 1000 --tasks editing=1"],
    "edits and what changed": [
        "base", "posttrain --steps 1000 --tasks editing=1,difference=1 --batch-size 64"],
    "edits in context": ["base", "posttrain --steps 1000 --tasks in_context=1"],
    "guidance rises": "orthus",
    "guidance falls": "orthus",
    "pure VQ-VAE": ["vae --quantised-share 1"],
    "pure VQ-VAE, decoder tuned": ["vae --quantised-share 1", f"decoder --steps {TUNED}"],
}

# --- Experiments ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A claim: an arm is better than others, each compared by one figure."""

    where: str  # in the paper
    claim: str
    paper: str  # its figures
    arm: str
    others: tuple[tuple[str, str], ...]  # arm, figure
    parts: tuple[str, str] = ("", "")  # of an autoencoder: what of the arm, what of the others


IMAGES, TEXT, IN_CONTEXT = "text to image", "understanding", "in-context editing"  # of TASKS
EXPERIMENTS = {
    "decoder": Experiment(
        "table 6", "the tuned decoder on continuous latents beats the VQ decoder on codes",
        "23.7 to 26.1 dB", "pure VQ-VAE, decoder tuned", (("pure VQ-VAE", "psnr"),
        ("pure VQ-VAE", "readable")), ("continuous", "quantised")),
    "continuous": Experiment(
        "table 6", "and the VQ decoder on the same continuous latents",
        "", "pure VQ-VAE, decoder tuned", (("pure VQ-VAE", "psnr"), ("pure VQ-VAE", "readable")),
        ("continuous", "continuous")),
    "chameleon": Experiment(
        "tables 2, 3", "Orthus beats a Chameleon that was post-trained alike",
        "GenEval 0.43 to 0.58, POPE 77.8 to 79.6", "orthus",
        (("chameleon", IMAGES), ("chameleon", TEXT))),
    "both tasks": Experiment(
        "table 4", "both tasks trained together beat each alone", "one or two points",
        "orthus", (("understanding alone", TEXT), ("generation alone", IMAGES))),
    "embedding": Experiment(
        "table 5", "softmax beats argmin and linear in understanding", "78.7 > 77.6 > 70.4",
        "understanding alone", (("argmin", TEXT), ("linear", TEXT))),
    "language": Experiment(
        "section 4.2", "stage 1 keeps what the Chameleon can answer", "",
        "stage 1 alone", (("nothing", TEXT), ("nothing", "log-likelihood"))),
    "tau": Experiment(
        "section 4.2", "a wider mixture (here 50 of 256 codes) lifts the bottleneck", "",
        "orthus", tuple((f"tau: {n} codes", figure) for n in (2, 10, 150)
                        for figure in (IMAGES, TEXT))),
    "squared error": Experiment(
        "appendix C", "diffusion beats squared error, whose samples are blurred and alike",
        "pictures", "orthus", (("squared error", IMAGES), ("squared error", "sharpness"),
                               ("squared error", "spread"))),
    "in context": Experiment(
        "figure 3", "edits from an example pair emerge where edits told in words alone are trained",
        "pictures", "edits", (("generation alone", IN_CONTEXT),)),
    "directly": Experiment(
        "", "and reach what training on example pairs reaches", "", "edits",
        (("edits in context", IN_CONTEXT),)),
    "what changed": Experiment(
        "figure 3", "and with \"What changed?\" among them", "", "edits and what changed",
        (("edits", IN_CONTEXT), ("edits", "editing"))),
    "guidance": Experiment(
        "", "one guidance for all latents of an image beats a rising and a falling one", "",
        "orthus", (("guidance rises", IMAGES), ("guidance falls", IMAGES))),
    "noisings": Experiment(
        "", "4 noisings of a latent a step beat 1 and 8", "", "orthus",
        (("1 noising", IMAGES), ("8 noisings", IMAGES))),
    "prediction": Experiment(
        "", "velocity with zero terminal SNR beats epsilon, and velocity without it", "",
        "orthus", (("epsilon", IMAGES), ("terminal noise", IMAGES))),
    "input noise": Experiment(
        "", "noise on output images as they are read back in training helps", "", "orthus",
        (("no input noise", IMAGES),)),
}  # fmt: skip

# --- The runner ----------------------------------------------------------------------------------


def train_arm(folder: Path, stages: list[str], init: str, threads: int, more: str = "") -> str:
    """Run an arm's stages one after the other -> the last one's folder."""
    for line in stages:
        name, _, own = line.partition(" ")
        run = folder / name
        words = [name, "--preset", "nano", "--dtype", "float32", "--threads", str(threads)]
        words += [*shlex.split(FLAGS.get(name, "")), *shlex.split(own), *more.split()]
        words += ["--out", str(run)] + (["--init", init] if init else [])
        args = train.parse(words)
        saved = train.newest_save(run)
        steps = args.steps or train.PRESETS["nano"][name]["steps"]
        if saved is None or int(saved.name[5:]) < steps:
            args.resume = (run / "run.json").is_file()
            train.run(args)
        init = str(run)
    return init


def figures(name: str) -> set[str]:
    """By what an arm is compared with others."""
    return {figure for e in EXPERIMENTS.values() for other, figure in e.others
            if name in (e.arm, other)}  # fmt: skip


@torch.no_grad()
def log_likelihood(pipeline: Pipeline, world: ShapesConfig, seed: int) -> float:
    """Of the true answers to 200 held-out questions, in nats a token."""
    model, task = pipeline.model, TASKS[TEXT]
    examples = held_out(world, task.method, seed, 200, task.stream)
    sequences = [layout(e.segments, pipeline.tokenizer, model.config) for e in examples]
    batch = collate(sequences, model.config, pipeline.vae.config.resolution)
    latents = pipeline.vae.encode(batch.images).flatten(0, 1)
    return -model.loss(batch.tokens, latents, batch.labels).text.item()


def vary_guidance(head, latents: int, rises: bool) -> None:
    """Guidance that grows from none to twice as much over the latents of an image, or shrinks."""
    draw, numbers = head.sample, itertools.cycle(range(latents))

    def sample(hidden, weights, *rest, **more):
        number = next(numbers)
        factor = 2 * ((number if rises else latents - 1 - number) + 0.5) / latents
        none = torch.eye(1, len(weights), device=hidden.device)[0]
        return draw(hidden, none + factor * (torch.as_tensor(weights) - none), *rest, **more)

    head.sample = sample


def measure(name: str, run: str, seed: int, count: int) -> dict:
    """Figures of a trained arm: answers to the same held-out examples, "0110..." by table and row;
    how likely true answers are to it; of pictures of one prompt how sharp they are and how much
    they differ. Where a point or two is claimed (table 4), four times `count` examples of a table.
    """
    source = checkpoint.open_checkpoint(run)
    stage = "posttrain" if "model" in source.config else "vae"
    world = ShapesConfig(**train.WORLDS["nano"][stage][0][1])  # the same for every arm
    if stage == "vae":
        vae = VQVAE.from_pretrained(source, "cpu", torch.float32)
        report = evaluate.autoencoder_report(vae, Shapes(0, world), seed, count)
        return {"autoencoder": {kind: {name: row[name] for name in ("psnr", "ssim", "readable")}
                                for kind, row in report.items()}}  # fmt: skip
    pipeline, answers = load(source), {}
    model, both = pipeline.model, EXPERIMENTS["both tasks"]
    count *= 4 if name in (both.arm, *(other for other, _ in both.others)) else 1
    if isinstance(ARMS[name], str):
        vary_guidance(model.image_head, model.config.latents_per_image, name == "guidance rises")
    for title in (title for title in TASKS if title in {IMAGES, TEXT} | figures(name)):
        task = TASKS[title]
        examples = held_out(world, task.method, seed, count, task.stream)
        for verdict in run_task(pipeline, examples, task, seed):
            key = f"{title}, {verdict.row}"
            answers[key] = answers.get(key, "") + "01"[verdict.right]
    requests = [Request([Segment("a red circle")], seed) for seed in range(16)]
    drawn = [a.images[0] for a in generate(pipeline, requests, min_images=1, progress=False)]
    sheet([[(image, "", "black") for image in drawn[:8]]], (64, 64)).save(Path(run) / "alike.png")
    pixels = np.stack([np.asarray(image, float) for image in drawn])  # (16, H, W, 3)
    edges = np.abs(np.diff(pixels, axis=1)).max((1, 2, 3)).mean()
    record = {"answers": answers, "spread": float(pixels.std(0).mean()), "sharpness": float(edges),
              "log-likelihood": log_likelihood(pipeline, world, seed)}  # fmt: skip
    if (log := Path(run) / "log.jsonl").is_file():
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        record["codes mixed"] = last.get("codes_mixed")
    return record


def run_arms(names: list[str], seeds: range, count: int, threads: int) -> None:
    """Train and measure what results.json does not hold yet."""
    RESULTS.parent.mkdir(exist_ok=True)
    todo, began = [(name, seed) for seed in seeds for name in names], time.time()
    todo = [(name, seed) for name, seed in todo if str(seed) not in read_results().get(name, {})]
    for number, (name, seed) in enumerate(todo, 1):
        started = time.time()
        start = train_arm(RUNS / "start", START, "", threads)
        folder = ARMS[name] if isinstance(ARMS[name], str) else name
        init = "" if ARMS[folder] and ARMS[folder][0].startswith("vae") else start
        run = train_arm(RUNS / folder / str(seed), ARMS[folder], init, threads, f"--seed {seed}")
        record = measure(name, run, seed, count) | {
            "commands": ARMS[folder],
            "minutes": round((time.time() - started) / 60, 1),
            "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE,
                                     capture_output=True, text=True).stdout.strip(),
        }  # fmt: skip
        results = read_results()  # again: two runs of other arms may share the file
        results.setdefault(name, {})[str(seed)] = record
        checkpoint.write_json(RESULTS, results)
        left = (time.time() - began) / number * (len(todo) - number) / 60
        tqdm.write(f"arm {number} of {len(todo)}: {name}, seed {seed}, "
                   f"{record['minutes']} minutes; about {left:.0f} left")  # fmt: skip


def read_results() -> dict:
    return checkpoint.read_json(RESULTS) if RESULTS.is_file() else {}


# --- Comparisons ---------------------------------------------------------------------------------


def answered(record: dict, figure: str) -> dict[str, np.ndarray]:
    """Of every held-out example of a table 0 or 100, by row; unseen combinations left out."""
    return {row: np.array([100.0 * (bit == "1") for bit in bits])
            for row, bits in record["answers"].items()
            if row.startswith(f"{figure}, ") and evaluate.UNSEEN not in row}  # fmt: skip


def differences(ours: dict, theirs: dict, figure: str, parts: tuple[str, str]) -> np.ndarray:
    """Between two arms of one seed, on every example that both answered; or of one number."""
    if figure in TASKS:
        a, b = answered(ours, figure), answered(theirs, figure)
        pairs = [(a[row], b[row]) for row in a.keys() & b.keys()]
        return np.concatenate([x[: len(y)] - y[: len(x)] for x, y in pairs])
    values = [record["autoencoder"][part][figure] if part else record[figure]
              for record, part in zip((ours, theirs), parts, strict=True)]  # fmt: skip
    return np.array([values[0] - values[1]]) * (100 if figure == "readable" else 1)


STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # 97.5%, for 2, 3, .. seeds


def compare(ours: dict, theirs: dict, figure: str, parts: tuple[str, str]) -> tuple:
    """Mean difference over the seeds that both arms have, its 95% half-width, and the seeds.

    Arms share their examples, so the differences are paired. The interval is the larger of two: a
    normal one over the examples, and Student's over the seeds, since few seeds tell little of how
    far training itself scatters.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [differences(ours[s], theirs[s], figure, parts) for s in seeds]
    means, number = np.array([pair.mean() for pair in pairs]), len(pairs)
    half = 1.96 * math.sqrt(sum(pair.var() / len(pair) for pair in pairs)) / number
    if number > 1:
        quantile = STUDENT[min(number, len(STUDENT) + 1) - 2]
        half = max(half, quantile * means.std(ddof=1) / math.sqrt(number))
    return means.mean(), half, seeds


def verdict(mean: float, half: float, seeds: list[str]) -> str:
    if len(seeds) == 1:
        return "not told: one seed"
    if abs(mean) > half:
        return "holds" if mean > 0 else "does not hold"
    return f"cannot be told: {half:.2g} could have been seen"


# --- The page ------------------------------------------------------------------------------------

ABOUT = f"""Written by `python experiments.py`. Arms go on from one start (the first three stages of
`train.py all --preset nano`) with `posttrain {FLAGS["posttrain"]}`
and the flags below: far from the end of training, where differences show. Every arm answers the
same held-out prompts, four times as many for table 4. Differences are in points of 100 (psnr in
decibels, sharpness and spread in grey levels, log-likelihood of the true answers in nats a token),
with 95% intervals: the larger of one over the paired examples and Student's over the seeds, since
the scatter of training is most of it. The tuned decoder had {TUNED} steps more than the one it is
compared with, as in the paper. Stage 1 freezes all that text passes through, so only answers about
images can change in it. Nano's world has no digits.

![Differences](experiments/differences.png)"""
BEGIN, END = "<!-- experiments.py writes from here -->", "<!-- to here -->"


def comparisons(results: dict) -> list[tuple]:
    """(experiment, other arm, figure, mean, half, seeds) of what was run."""
    def runs(arm: str, figure: str) -> dict:
        return {seed: run for seed, run in results.get(arm, {}).items()
                if figure not in TASKS or answered(run, figure)}  # fmt: skip

    asked = [(e, other, figure) for e in EXPERIMENTS.values() for other, figure in e.others]
    pairs = [(e, other, figure, runs(e.arm, figure), runs(other, figure))
             for e, other, figure in asked]  # fmt: skip
    return [(e, other, figure, *compare(ours, theirs, figure, e.parts))
            for e, other, figure, ours, theirs in pairs if ours.keys() & theirs.keys()]


def page(results: dict) -> str:
    """The table of verdicts, then every arm's figures."""
    lines = [BEGIN, "", "## The paper's claims, at the size of nano", "", ABOUT, "",
             "| in the paper | claim | its figures | compared with | by | difference | verdict |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for e, other, figure, mean, half, seeds in comparisons(results):
        difference = f"{mean:+.2f} +- {half:.2f} ({len(seeds)} seeds)"
        lines.append(f"| {e.where or '-'} | {e.claim} | {e.paper or '-'} | {other} | {figure} | "
                     f"{difference} | {verdict(mean, half, seeds)} |")  # fmt: skip
    lines += ["", "| arm | stages after the start | captions right | questions | edits | "
              "edits in context | codes mixed | sharpness | spread | minutes |", "|---" * 10 + "|"]
    for name in (n for n in ARMS if n in results):
        runs = {seed: run for seed, run in sorted(results[name].items()) if "answers" in run}
        if not runs:
            continue
        cells = [rates(runs, figure) for figure in (IMAGES, TEXT, "editing", IN_CONTEXT)]
        for key in ("codes mixed", "sharpness", "spread", "minutes"):
            told = [f"{run[key]:.1f}" for run in runs.values() if run.get(key) is not None]
            cells.append(" ".join(told) or "-")
        own = ARMS[name]
        commands = f"the models of {own}" if isinstance(own, str) else f"`{'; '.join(own) or '-'}`"
        lines.append(f"| {name} | {commands} | {' | '.join(cells)} |")
    lines += ["", "| autoencoder | pictures | PSNR, dB | SSIM | readable |", "|---" * 5 + "|"]
    for name in (n for n in ARMS if n in results):
        reports = [run["autoencoder"] for run in results[name].values() if "autoencoder" in run]
        for kind in reports[0] if reports else ():
            psnr, ssim, readable = (np.mean([report[kind][figure] for report in reports])
                                    for figure in ("psnr", "ssim", "readable"))  # fmt: skip
            lines.append(f"| {name} | {kind} | {psnr:.1f} | {ssim:.3f} | {readable:.1%} |")
    for name in ("orthus", "squared error"):
        if (drawn := RESULTS.with_name(f"{name.replace(' ', '_')}.png")).is_file():
            lines += ["", f"Eight times \"a red circle\", {name}:", "",
                      f"![{name}](experiments/{drawn.name})"]  # fmt: skip
    return "\n".join([*lines, "", END])


def rates(runs: dict, figure: str) -> str:
    """The mean over seeds and each seed's rate."""
    rows = [list(answered(run, figure).values()) for run in runs.values()]
    each = [np.concatenate(some).mean() for some in rows if some]
    return f"**{np.mean(each):.1f}%** ({' '.join(f'{r:.1f}' for r in each)})" if each else "-"


def write_page(results: dict) -> None:
    path = HERE / "RESULTS.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    with checkpoint.whole_file(path) as file:
        file.write((before + page(results) + rest.partition(END)[2]).encode())


def archive() -> None:
    """What is worth keeping of the runs: their logs in one file, and the pictures of appendix C.
    What was kept of runs that are no longer there stays."""
    kept, logs = RESULTS.with_name("logs.jsonl.gz"), {}
    if kept.is_file():
        for line in gzip.open(kept, "rt", encoding="utf-8"):
            logs.setdefault(json.loads(line)["run"], []).append(line)
    for path in RUNS.rglob("log.jsonl"):
        run, lines = str(path.parent.relative_to(RUNS)), path.read_text(encoding="utf-8")
        logs[run] = [json.dumps({"run": run} | json.loads(x)) + "\n" for x in lines.splitlines()]
    with checkpoint.whole_file(kept) as file:
        file.write(gzip.compress("".join(sum(map(logs.get, sorted(logs)), [])).encode(), mtime=0))
    for name in ("orthus", "squared error"):
        if (drawn := RUNS / name / "0" / "posttrain" / "alike.png").is_file():
            shutil.copy(drawn, RESULTS.with_name(f"{name.replace(' ', '_')}.png"))


def draw(results: dict) -> None:
    """Every difference with its interval, as experiments/differences.png, where matplotlib is."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no picture of the differences: pip install matplotlib")
        return

    rows = [row for row in comparisons(results) if row[2] in TASKS][::-1]
    figure, axis = pyplot.subplots(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    for y, (_, _, _, mean, half, _) in enumerate(rows):
        axis.errorbar(mean, y, xerr=half, fmt="o", color="tab:blue", capsize=3)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{e.arm} - {other}, {by}" for e, other, by, *_ in rows])
    axis.set_xlabel("difference in points, 95% interval")
    figure.savefig(RESULTS.with_name("differences.png"), dpi=80)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw, number = argparse.RawDescriptionHelpFormatter, checkpoint.number
    parser = checkpoint.Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=[*EXPERIMENTS, "none"], action="append",
                        help="run the arms of this experiment alone; repeatable")  # fmt: skip
    parser.add_argument("--seeds", type=number(int, 1, 100), default=3, metavar="N",
                        help="seeds an arm (default: 3)")  # fmt: skip
    parser.add_argument("--count", type=number(int, 8, 10**5), default=500, metavar="N",
                        help="captions and questions an arm and seed (default: 500)")  # fmt: skip
    parser.add_argument("--threads", type=number(int, 0, 1024), default=0, metavar="N",
                        help="CPU threads; 0 is one a core (default)")  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    chosen = [e for name, e in EXPERIMENTS.items() if not args.only or name in args.only]
    names = list(dict.fromkeys(n for e in chosen for n in (e.arm, *(o for o, _ in e.others))))
    run_arms(names, range(args.seeds), args.count, args.threads)
    results = read_results()
    archive()
    write_page(results)
    draw(results)
    print(page(results))


def main() -> None:
    train.keep_memory()
    args = parse()
    interrupted = "interrupted; what is done is in experiments/results.json"
    checkpoint.command_line("experiments.py", lambda: run(args), interrupted)


if __name__ == "__main__":
    main()
