"""Loss curves of one or several runs in one picture: `python -m lab.plots RUN .. --out FILE.png`"""

from pathlib import Path

import checkpoint
from train import read_log

KEYS = "loss", "text", "image"


def find_logs(runs: list[str]) -> dict[str, list[dict]]:
    """Folders of runs, or of roads of them -> what each logged, by its name."""
    logs = {}
    for run in runs:
        folders = [Path(run), *sorted(p for p in Path(run).glob("*") if p.is_dir())]
        found = [p for p in folders if (p / "log.jsonl").is_file()]
        if not found:
            raise ValueError(f"no log.jsonl in {run}; give folders of runs")
        for folder in found:
            logs[str(folder)] = read_log(folder / "log.jsonl")
    return logs


def points(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key; a part that a stage has not is zero, and left out."""
    some = [line for line in lines if line.get(key)]
    return [line["step"] for line in some], [line[key] for line in some]


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("curves are drawn with matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplots(1, len(KEYS), figsize=(5 * len(KEYS), 4), layout="constrained")
    for number, (name, lines) in enumerate(logs.items()):
        for axis, key in zip(axes, KEYS):
            axis.plot(*points(lines, key), "-", color=f"C{number}", label=name)
            axis.plot(*points(lines, f"held_out_{key}"), ":", color=f"C{number}")
            axis.set(title=key, xlabel="step", yscale="log")
    axes[0].legend(fontsize="small")
    with checkpoint.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a folder of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png to write")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out is {args.out}; give the picture a name that ends in .png")

    def run() -> None:
        logs = find_logs(args.runs)
        draw(logs, args.out)
        print(f"{args.out}: {len(logs)} runs (dotted: held-out examples)")

    checkpoint.command_line(run)


if __name__ == "__main__":
    main()
