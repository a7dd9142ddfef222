"""Several sources of data in one: `--data a.jsonl=0.7,lab.shapes:tiny_tasks=0.3`.

So what a model knew is not forgotten while it learns something new. With shares the sources are
mixed, without they come one after the other. What is held out of each is mixed alike.
"""

import random
import re

import data
from data import Segment


class Mixture:
    """Datasets in shares. Which one example `index` is of, and which of its examples where it has a
    length, are drawn from the seed and the index."""

    def __init__(self, datasets: list, shares: list[float], seed: int):
        self.datasets, self.shares, self.seed = datasets, shares, seed

    def example(self, index: int) -> list[Segment]:
        rng = random.Random(f"mixture {self.seed} {index}")
        dataset = rng.choices(self.datasets, self.shares)[0]
        if hasattr(dataset, "__len__"):
            return dataset.example(rng.randrange(len(dataset)))
        return dataset.example(index)


class Joined:
    """Datasets with lengths, one after the other."""

    def __init__(self, datasets: list):
        self.datasets = datasets

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def example(self, index: int) -> list[Segment]:
        index %= len(self)
        for dataset in self.datasets:
            if index < len(dataset):
                return dataset.example(index)
            index -= len(dataset)


def parse(spec: str) -> tuple[list[str], list[float]]:
    """ "a=0.7,b=0.3" -> (["a", "b"], [0.7, 0.3]); without shares the second list is empty."""
    parts = [re.fullmatch(r"(.+?)(?:=([0-9.]+))?", part) for part in spec.split(",")]
    if not all(parts):
        raise ValueError(f"data {spec!r} has an empty source; give SOURCE=SHARE,SOURCE=SHARE")
    names = [part[1] for part in parts]
    shares = [float(part[2]) for part in parts if part[2] and part[2].count(".") < 2]
    if len(shares) not in (0, len(names)) or not all(share > 0 for share in shares):
        raise ValueError(f"data {spec!r}; give a share above 0 behind each source, or behind none")
    return names, shares


def open(spec: str, args: dict, seed: int, examples: int | None) -> tuple:
    """What data.open_dataset does for several sources -> (to train on, held out)."""
    names, shares = parse(spec)
    if not args.keys() <= set(names):
        raise ValueError(f"data args are of {', '.join(args)}; want them by {', '.join(names)}")
    train, held_out = [], []
    for i, name in enumerate(names):
        number = examples
        if examples and shares:
            number = round(examples * shares[i] / sum(shares))
        parts = data.open_source(name, args.get(name, {}), seed, number)
        train.append(parts[0])
        held_out.append(parts[1])
    if shares:
        return Mixture(train, shares, seed), Mixture(held_out, shares, seed)
    if not all(hasattr(dataset, "__len__") for dataset in train):
        raise ValueError(f"data {spec!r} has an endless source; give a share behind each, as =0.5")
    return Joined(train), Joined(held_out)
