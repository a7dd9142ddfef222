"""The paper's claims as experiments: every arm is a list of stages of training, at nano scale.

    python -m lab.experiments [--only NAME] [--seeds 3]

All arms go on from one start (the autoencoder and the Chameleon that `train.py all --preset nano`
makes), with equal data and steps, and answer the same held-out prompts. What is done is kept in
docs/results.json and skipped the next time; a run that was interrupted goes on. The verdicts are
written into docs/results.md from that file alone (`--only none` writes them again).
Reading order: arms, experiments, the runner, comparisons and verdicts, the page.
"""

import argparse
import gzip
import itertools
import json
import math
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import train
from data import Segment, collate, layout, row_of
from lab import evaluate
from lab.evaluate import TASKS, held_out, run_task
from lab.shapes import ShapesConfig, nano_crowds, nano_tasks
from sample import Pipeline, Request, generate, load
from vae import VQVAE

DOCS, RUNS = Path("docs"), Path("runs") / "experiments"

# --- Arms ---

Stage = tuple[str, dict]  # a name, and settings in place of the preset's
IMAGES, TEXT = "text_to_image", "understanding"
BOTH = [IMAGES, TEXT]


def data_args(*tasks: str) -> str:
    return json.dumps({"tasks": dict.fromkeys(tasks, 1)})


def base(**settings) -> Stage:
    return "base", settings


def posttrain(*tasks: str, **settings) -> Stage:
    """On other tasks than BRIEF has, where some are named."""
    return "posttrain", ({"data_args": data_args(*tasks)} if tasks else {}) | settings


# Of every arm's posttrain: it is short, since differences show far from the end of training.
BRIEF = {"steps": 500, "batch_size": 32, "pictures_every": 0, "data_args": data_args(*BOTH)}
START = [("vae", {}), ("decoder", {}), ("chameleon", {})]
# Half of the mixture's batch, so as many questions, or captions, as there are in it.
QUESTIONS, CAPTIONS = posttrain(TEXT, batch_size=16), posttrain(IMAGES, batch_size=16)
PURE = "vae", {"quantised_share": 1.0}
TUNED = 500  # steps of the decoder alone
EDITS = "editing", "difference"
NO_ZERO = {"zero_terminal_snr": False}
ARMS = {
    "orthus": [base(), posttrain()],
    "chameleon": [posttrain()],
    "stage 1 alone": [base()],
    "nothing": [],  # the start itself
    "understanding alone": [base(), QUESTIONS],
    "generation alone": [base(), CAPTIONS],
    "argmin": [base(vision_embedding="argmin"), QUESTIONS],
    "linear": [base(vision_embedding="linear"), QUESTIONS],
    "squared error": [base(image_head="mse"), posttrain()],
    "tau: 2 codes": [base(mixed_codes=2), posttrain()],
    "tau: 10 codes": [base(mixed_codes=10), posttrain()],
    "tau: 150 codes": [base(mixed_codes=150), posttrain()],
    "1 noising": [base(diffusion_batch_multiplier=1), posttrain()],
    "8 noisings": [base(diffusion_batch_multiplier=8), posttrain()],
    "epsilon": [base(prediction="epsilon", **NO_ZERO), posttrain()],
    "terminal noise": [base(**NO_ZERO), posttrain()],
    "no input noise": [base(), posttrain(input_noise=0.0)],
    "edits": [base(), posttrain("editing", steps=1000)],
    "edits and what changed": [base(), posttrain(*EDITS, steps=1000, batch_size=64)],
    "edits in context": [base(), posttrain("in_context", steps=1000)],
    "pure VQ-VAE": [PURE],
    "pure VQ-VAE, decoder tuned": [PURE, ("decoder", {"steps": TUNED})],
}
# These draw from the models of "orthus", with a guidance that is not the same for all latents.
GUIDED = "guidance rises", "guidance falls"
ARMS |= dict.fromkeys(GUIDED, ARMS["orthus"])


def told(stages: list[Stage]) -> str:
    """An arm as the page has it."""
    line = lambda name, own: " ".join([name, *(f"{key}={value}" for key, value in own.items())])
    return "; ".join(line(*stage) for stage in stages) or "-"


# --- Experiments ---


@dataclass(frozen=True)
class Experiment:
    """A claim: an arm is better than others, each compared by figures."""

    claim: str
    arm: str
    others: dict[str, list[str]]  # of each arm: by which figures
    where: str = ""  # in the paper
    paper: str = ""  # its figures
    parts: tuple[str, str] = ("", "")  # of an autoencoder: what of the arm, what of the others


RECONSTRUCTION = ["psnr", "readable"]
EXPERIMENTS = {
    "decoder": Experiment(
        "the tuned decoder on continuous latents beats the VQ decoder on codes",
        "pure VQ-VAE, decoder tuned",
        {"pure VQ-VAE": RECONSTRUCTION},
        "table 6",
        "23.7 to 26.1 dB",
        ("continuous", "quantised"),
    ),
    "continuous": Experiment(
        "and the VQ decoder on the same continuous latents",
        "pure VQ-VAE, decoder tuned",
        {"pure VQ-VAE": RECONSTRUCTION},
        "table 6",
        "",
        ("continuous", "continuous"),
    ),
    "chameleon": Experiment(
        "Orthus beats a Chameleon that was post-trained alike",
        "orthus",
        {"chameleon": BOTH},
        "tables 2, 3",
        "GenEval 0.43 to 0.58, POPE 77.8 to 79.6",
    ),
    "both tasks": Experiment(
        "both tasks trained together beat each alone",
        "orthus",
        {"understanding alone": [TEXT], "generation alone": [IMAGES]},
        "table 4",
        "one or two points",
    ),
    "embedding": Experiment(
        "softmax beats argmin and linear in understanding",
        "understanding alone",
        {"argmin": [TEXT], "linear": [TEXT]},
        "table 5",
        "78.7 > 77.6 > 70.4",
    ),
    "language": Experiment(
        "stage 1 keeps what the Chameleon can answer",
        "stage 1 alone",
        {"nothing": [TEXT, "log-likelihood"]},
        "section 4.2",
    ),
    "tau": Experiment(
        "a wider mixture (here 50 of 256 codes) lifts the bottleneck",
        "orthus",
        {"tau: 2 codes": BOTH, "tau: 10 codes": BOTH, "tau: 150 codes": BOTH},
        "section 4.2",
    ),
    "squared error": Experiment(
        "diffusion beats squared error, whose samples are blurred and alike",
        "orthus",
        {"squared error": [IMAGES, "sharpness", "spread"]},
        "appendix C",
        "pictures",
    ),
    "in context": Experiment(
        "edits from an example pair emerge where edits told in words alone are trained",
        "edits",
        {"generation alone": ["in_context"]},
        "figure 3",
        "pictures",
    ),
    "directly": Experiment(
        "and reach what training on example pairs reaches",
        "edits",
        {"edits in context": ["in_context"]},
    ),
    "what changed": Experiment(
        'and with "What changed?" among them',
        "edits and what changed",
        {"edits": ["in_context", "editing"]},
        "figure 3",
    ),
    "guidance": Experiment(
        "one guidance for all latents of an image beats a rising and a falling one",
        "orthus",
        {"guidance rises": [IMAGES], "guidance falls": [IMAGES]},
    ),
    "noisings": Experiment(
        "4 noisings of a latent a step beat 1 and 8",
        "orthus",
        {"1 noising": [IMAGES], "8 noisings": [IMAGES]},
    ),
    "prediction": Experiment(
        "velocity with zero terminal SNR beats epsilon, and velocity without it",
        "orthus",
        {"epsilon": [IMAGES], "terminal noise": [IMAGES]},
    ),
    "input noise": Experiment(
        "noise on output images as they are read back in training helps",
        "orthus",
        {"no input noise": [IMAGES]},
    ),
}

# --- The runner ---


def train_arm(folder: Path, stages: list[Stage], init: str, threads: int, **more) -> str:
    """Run an arm's stages one after the other -> the last one's folder. Finished ones are skipped,
    an interrupted one goes on."""
    for name, own in stages:
        run, given = folder / name, {"preset": "nano", "dtype": "float32", "threads": threads}
        given |= (BRIEF if name == "posttrain" else {}) | own | more | {"init": init}
        resume = (run / "run.json").is_file()
        settings, _ = train.settings_of(name, run, given, resume)
        if train.step_of(train.newest_save(run)) < settings.steps:
            if not train.train_stage(name, str(run), given, resume):
                raise KeyboardInterrupt
        init = str(run)
    return init


class Varying(nn.Module):
    """An image head whose guidance grows from none to twice as much over the latents of an image,
    or shrinks."""

    def __init__(self, head: nn.Module, latents: int, rises: bool):
        super().__init__()
        numbers = range(latents) if rises else reversed(range(latents))
        self.head, self.factors = head, itertools.cycle([2 * (n + 0.5) / latents for n in numbers])

    def sample(self, hidden, weights=(1.0,), **more):
        """Nothing is (1, 0, ..); what the weights add to that is guidance."""
        factor, none = next(self.factors), torch.eye(1, len(weights))[0]
        varied = none + factor * (torch.as_tensor(weights) - none)
        return self.head.sample(hidden, tuple(varied.tolist()), **more)


@torch.no_grad()
def log_likelihood(pipeline: Pipeline, world: ShapesConfig, seed: int) -> float:
    """Of the true answers to 200 held-out questions, in nats a token."""
    model, examples = pipeline.model, held_out(world, TEXT, seed, 200)
    sequences = [layout(e.segments, pipeline.tokenizer, model.config) for e in examples]
    batch = collate(sequences, model.config, pipeline.vae.config.resolution)
    latents = pipeline.vae.encode(batch.images).flatten(0, 1)
    return -model.loss(batch.tokens, latents, batch.labels).text.item()


def figures(name: str) -> set[str]:
    """By what an arm is compared with others."""
    found = set()
    for e in EXPERIMENTS.values():
        for other, by in e.others.items():
            if name in (e.arm, other):
                found |= set(by)
    return found


def measure_autoencoder(source: checkpoint.Checkpoint, seed: int, count: int) -> dict:
    vae = VQVAE.from_pretrained(source, "cpu", torch.float32)
    rows = evaluate.autoencoder_report(vae, nano_crowds(), seed, count)
    for row in rows.values():
        del row["digits"]  # nano's world has none
    return {"autoencoder": rows}


def measure(name: str, run: str, seed: int, count: int) -> dict:
    """Figures of a trained arm: answers to the same held-out examples, "0110..." by table and row;
    how likely true answers are to it; of pictures of one prompt how sharp they are and how much
    they differ. Where a point or two is claimed (table 4), four times `count` examples of a table.
    """
    source, world = checkpoint.open_checkpoint(run), nano_tasks().config  # the same for every arm
    if "model" not in source.config:
        return measure_autoencoder(source, seed, count)
    pipeline, answers, both = load(source), {}, EXPERIMENTS["both tasks"]
    model = pipeline.model
    count *= 4 if name in (both.arm, *both.others) else 1
    if name in GUIDED:
        latents, rises = model.config.latents_per_image, name == "guidance rises"
        model.image_head = Varying(model.image_head, latents, rises)
    for task in TASKS:
        if task in BOTH or task in figures(name):
            examples = held_out(world, task, seed, count)
            for verdict in run_task(pipeline, task, examples, seed):
                key = f"{TASKS[task].title}, {verdict.row}"
                answers[key] = answers.get(key, "") + "01"[verdict.right]
    requests = [Request([Segment("a red circle")], seed) for seed in range(16)]
    drawn = [a.images[0] for a in generate(pipeline, requests, min_images=1, progress=False)]
    row_of(drawn[:8]).save(Path(run) / "alike.png")
    pixels = np.stack([np.asarray(image, float) for image in drawn])  # (16, H, W, 3)
    edges = np.abs(np.diff(pixels, axis=1)).max((1, 2, 3)).mean()
    record = {"answers": answers, "spread": float(pixels.std(0).mean()), "sharpness": float(edges)}
    record["log-likelihood"] = log_likelihood(pipeline, world, seed)
    if (Path(run) / "log.jsonl").is_file():
        record["codes mixed"] = train.read_log(Path(run) / "log.jsonl")[-1].get("codes_mixed")
    return record


def run_arms(names: list[str], seeds: range, count: int, threads: int) -> None:
    """Train and measure what results.json does not hold yet."""
    todo, began = [(name, seed) for seed in seeds for name in names], time.time()
    todo = [(name, seed) for name, seed in todo if str(seed) not in read_results().get(name, {})]
    for number, (name, seed) in enumerate(todo, 1):
        started, stages = time.time(), ARMS[name]
        init = train_arm(RUNS / "start", START, "", threads)
        init = "" if PURE in stages else init
        folder = RUNS / ("orthus" if name in GUIDED else name) / str(seed)
        run = train_arm(folder, stages, init, threads, seed=seed)
        record = measure(name, run, seed, count) | {"stages": told(stages)}
        record["minutes"] = round((time.time() - started) / 60, 1)
        commit = ["git", "rev-parse", "--short", "HEAD"]
        record["commit"] = subprocess.run(commit, capture_output=True, text=True).stdout.strip()
        results = read_results()  # again: two runs of other arms may share the file
        results.setdefault(name, {})[str(seed)] = record
        checkpoint.write_json(DOCS / "results.json", results)
        left = (time.time() - began) / number * (len(todo) - number) / 60
        done = f"arm {number} of {len(todo)}: {name}, seed {seed}, {record['minutes']} minutes"
        tqdm.write(f"{done}; about {left:.0f} left")


def read_results() -> dict:
    path = DOCS / "results.json"
    return checkpoint.read_json(path) if path.is_file() else {}


# --- Comparisons ---


def answered(record: dict, figure: str) -> dict[str, np.ndarray]:
    """Of every held-out example of a table 0 or 100, by row; unseen combinations left out."""
    found, table = {}, f"{TASKS[figure].title}, "
    for row, bits in record["answers"].items():
        if row.startswith(table) and evaluate.UNSEEN not in row:
            found[row] = np.array([100.0 * (bit == "1") for bit in bits])
    return found


def differences(ours: dict, theirs: dict, figure: str, parts: tuple[str, str]) -> np.ndarray:
    """Between two arms of one seed, on every example that both answered; or of one number."""
    if figure in TASKS:
        a, b = answered(ours, figure), answered(theirs, figure)
        pairs = [(a[row], b[row]) for row in a.keys() & b.keys()]
        return np.concatenate([x[: len(y)] - y[: len(x)] for x, y in pairs])
    values = []
    for record, part in zip((ours, theirs), parts, strict=True):
        values.append(record["autoencoder"][part][figure] if part else record[figure])
    return np.array([values[0] - values[1]]) * (100 if figure == "readable" else 1)


STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # 97.5%, for 2, 3, .. seeds


def compare(ours: dict, theirs: dict, figure: str, parts: tuple[str, str] = ("", "")) -> tuple:
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


@dataclass
class Row:
    """A line of the table of verdicts."""

    experiment: Experiment
    other: str
    figure: str
    mean: float
    half: float
    seeds: list[str]

    @property
    def by(self) -> str:
        return TASKS[self.figure].title if self.figure in TASKS else self.figure


def comparisons(results: dict) -> list[Row]:
    """Of what was run."""

    def runs(arm: str, figure: str) -> dict:
        found = results.get(arm, {})
        return {s: run for s, run in found.items() if figure not in TASKS or answered(run, figure)}

    rows = []
    for e in EXPERIMENTS.values():
        for other, by in e.others.items():
            for figure in by:
                ours, theirs = runs(e.arm, figure), runs(other, figure)
                if ours.keys() & theirs.keys():
                    rows.append(Row(e, other, figure, *compare(ours, theirs, figure, e.parts)))
    return rows


# --- The page ---

ABOUT = f"""Written by `python -m lab.experiments`. Arms go on from one start (the first three
stages of `train.py all --preset nano`) with `{told([("posttrain", BRIEF)])}`
and the settings below: far from the end of training, where differences show. Every arm answers the
same held-out prompts, four times as many for table 4. Differences are in points of 100 (psnr in
decibels, sharpness and spread in grey levels, log-likelihood of the true answers in nats a token),
with 95% intervals: the larger of one over the paired examples and Student's over the seeds, since
the scatter of training is most of it. The tuned decoder had {TUNED} steps more than the one it is
compared with, as in the paper. Stage 1 freezes all that text passes through, so only answers about
images can change in it. Nano's world has no digits.

![Differences](differences.png)"""
BEGIN, END = "<!-- experiments.py writes from here -->", "<!-- to here -->"


def table(*columns: str) -> list[str]:
    return ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def page(results: dict) -> str:
    """The table of verdicts, then every arm's figures."""
    lines = [BEGIN, "", "## The paper's claims, at the size of nano", "", ABOUT]
    columns = "in the paper", "claim", "its figures", "compared with", "by", "difference", "verdict"
    lines += table(*columns)
    for row in comparisons(results):
        e, said = row.experiment, verdict(row.mean, row.half, row.seeds)
        difference = f"{row.mean:+.2f} +- {row.half:.2f} ({len(row.seeds)} seeds)"
        cells = e.where or "-", e.claim, e.paper or "-", row.other, row.by, difference, said
        lines.append(f"| {' | '.join(cells)} |")
    columns = "captions right", "questions", "edits", "edits in context", "codes mixed"
    lines += table("arm", "stages after the start", *columns, "sharpness", "spread", "minutes")
    for name in (name for name in ARMS if name in results):
        lines += arm_line(name, results[name])
    lines += table("autoencoder", "pictures", "PSNR, dB", "SSIM", "readable")
    for name in (name for name in ARMS if name in results):
        reports = [run["autoencoder"] for run in results[name].values() if "autoencoder" in run]
        for kind in reports[0] if reports else ():
            mean = lambda figure: np.mean([report[kind][figure] for report in reports])
            cells = f"{mean('psnr'):.1f} | {mean('ssim'):.3f} | {mean('readable'):.1%}"
            lines.append(f"| {name} | {kind} | {cells} |")
    for name in ("orthus", "squared error"):
        drawn = name.replace(" ", "_") + ".png"
        if (DOCS / drawn).is_file():
            lines += ["", f'Eight times "a red circle", {name}:', "", f"![{name}]({drawn})"]
    return "\n".join([*lines, "", END])


def arm_line(name: str, runs: dict) -> list[str]:
    runs = {seed: run for seed, run in sorted(runs.items()) if "answers" in run}
    if not runs:
        return []
    cells = [rates(runs, figure) for figure in (IMAGES, TEXT, "editing", "in_context")]
    for key in ("codes mixed", "sharpness", "spread", "minutes"):
        values = [f"{run[key]:.1f}" for run in runs.values() if run.get(key) is not None]
        cells.append(" ".join(values) or "-")
    stages = "the models of orthus" if name in GUIDED else f"`{told(ARMS[name])}`"
    return [f"| {name} | {stages} | {' | '.join(cells)} |"]


def rates(runs: dict, figure: str) -> str:
    """The mean over seeds and each seed's rate."""
    rows = [list(answered(run, figure).values()) for run in runs.values()]
    each = [np.concatenate(some).mean() for some in rows if some]
    return f"**{np.mean(each):.1f}%** ({' '.join(f'{r:.1f}' for r in each)})" if each else "-"


def write_page(results: dict) -> None:
    path = DOCS / "results.md"
    before, _, rest = checkpoint.read_text(path).partition(BEGIN)
    with checkpoint.whole_file(path) as file:
        file.write((before + page(results) + rest.partition(END)[2]).encode())


def archive() -> None:
    """What is worth keeping of the runs: their logs in one file, and the pictures of appendix C.
    What was kept of runs that are no longer there stays."""
    kept, logs = DOCS / "logs.jsonl.gz", {}
    if kept.is_file():
        for line in gzip.open(kept, "rt", encoding="utf-8"):
            logs.setdefault(json.loads(line)["run"], []).append(line)
    for path in RUNS.rglob("log.jsonl"):
        run, lines = str(path.parent.relative_to(RUNS)), checkpoint.read_text(path).splitlines()
        logs[run] = [json.dumps({"run": run} | json.loads(line)) + "\n" for line in lines]
    text = "".join(line for run in sorted(logs) for line in logs[run])
    with checkpoint.whole_file(kept) as file:
        file.write(gzip.compress(text.encode(), mtime=0))
    for name in ("orthus", "squared error"):
        drawn = RUNS / name / "0" / "posttrain" / "alike.png"
        if drawn.is_file():
            shutil.copy(drawn, DOCS / f"{name.replace(' ', '_')}.png")


def draw(results: dict) -> None:
    """Every difference with its interval, as docs/differences.png, where matplotlib is."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no picture of the differences: pip install matplotlib")
        return

    rows = [row for row in comparisons(results) if row.figure in TASKS][::-1]
    figure, axis = pyplot.subplots(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    for y, row in enumerate(rows):
        axis.errorbar(row.mean, y, xerr=row.half, fmt="o", color="tab:blue", capsize=3)
    axis.axvline(0, color="grey", linewidth=0.8)
    labels = [f"{row.experiment.arm} - {row.other}, {row.by}" for row in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_xlabel("difference in points, 95% interval")
    figure.savefig(DOCS / "differences.png", dpi=80)


def run(args: argparse.Namespace) -> None:
    chosen = [e for name, e in EXPERIMENTS.items() if not args.only or name in args.only]
    names = list(dict.fromkeys(name for e in chosen for name in (e.arm, *e.others)))
    run_arms(names, range(args.seeds), args.count, args.threads)
    results = read_results()
    archive()
    write_page(results)
    draw(results)
    print(page(results))


def main(argv: list[str] | None = None) -> None:
    train.keep_memory()
    raw, number = argparse.RawDescriptionHelpFormatter, checkpoint.number
    parser = checkpoint.Parser(description=__doc__, formatter_class=raw)
    add, names = parser.add_argument, [*EXPERIMENTS, "none"]
    add("--only", choices=names, action="append", help="the arms of this alone; repeatable")
    whole = {"metavar": "N", "type": number(int, 1, 100), "default": 3}
    add("--seeds", help="seeds an arm (default: 3)", **whole)
    whole = {"metavar": "N", "type": number(int, 8, 10**5), "default": 500}
    add("--count", help="captions and questions an arm and seed (default: 500)", **whole)
    whole = {"metavar": "N", "type": number(int, 0, 1024), "default": 0}
    add("--threads", help="CPU threads; 0 is one a core (default)", **whole)
    args = parser.parse_args(argv)
    interrupted = "interrupted; what is done is in docs/results.json"
    checkpoint.command_line(lambda: run(args), interrupted)


if __name__ == "__main__":
    main()
