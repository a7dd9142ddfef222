"""Specs of several sources: shares, order, what is held out, and what a function is given."""

import sys
import types

import pytest
from conftest import complaint

import data
from data import Segment


class Words:
    """Examples that say a name and their index; endless without a length."""

    def __init__(self, name: str, length: int | None = None):
        self.name, self.length = name, length
        if length:
            self.__class__ = Counted

    def example(self, index: int) -> list[Segment]:
        return [Segment(self.name), Segment(str(index), output=True)]


class Counted(Words):
    def __len__(self) -> int:
        return self.length


@pytest.fixture(autouse=True)
def module(monkeypatch):
    mine = types.ModuleType("mine")
    mine.given = []

    def endless(seed, examples=None, name="endless"):
        mine.given.append((name, seed, examples))
        return Words(f"{name} {seed}")

    mine.endless = endless
    mine.few = lambda name="few": Words(name, 40)
    mine.other = lambda: Words("other", 20)
    mine.plain = lambda: Words("plain")
    monkeypatch.setitem(sys.modules, "mine", mine)
    return mine


def said(dataset, count: int) -> list[str]:
    return [dataset.example(i)[0].content for i in range(count)]


def test_shares_are_met_and_the_draws_depend_on_seed_and_index_alone():
    spec = "mine:few=0.75,mine:endless=0.25"
    train, _ = data.open_dataset(spec, seed=5)
    drawn = said(train, 2000)
    assert 0.72 < drawn.count("few") / 2000 < 0.78
    assert said(data.open_dataset(spec, seed=5)[0], 50) == drawn[:50]
    assert said(data.open_dataset(spec, seed=6)[0], 50) != drawn[:50]


def test_a_function_takes_its_share_of_the_examples_and_its_own_args(module):
    spec = "mine:few=3,mine:endless=1"
    args = {"mine:endless": {"name": "named"}, "mine:few": {"name": "several"}}
    train, held_out = data.open_dataset(spec, args, seed=7, examples=400)
    assert module.given == [("named", 7, 100), ("named", 7 + 2**32, 100)]
    assert set(said(train, 100)) == {"several", "named 7"}
    assert set(said(held_out, 100)) == {"several", f"named {7 + 2**32}"}


def test_without_shares_one_follows_the_other():
    train, held_out = data.open_dataset("mine:few,mine:other")
    names = said(train, len(train))
    assert names == sorted(names) and len(train) + len(held_out) == 60
    assert train.example(len(train))[1].content == train.example(0)[1].content  # indices wrap


def test_what_is_held_out_is_never_trained_on():
    train, held_out = data.open_dataset("mine:few")
    numbers = [{d.example(i)[1].content for i in range(len(d))} for d in (train, held_out)]
    assert numbers[1] and not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 40
    train, held_out = data.open_dataset("mine:plain")
    assert (train.example(3)[1].content, held_out.example(3)[1].content) == ("3", "1000000003")


@pytest.mark.parametrize(
    "spec, args, named",
    [
        ("mine:few=0.5,mine:other", {}, "share"),
        ("mine:few=0,mine:other=1", {}, "share"),
        ("mine:few,mine:endless", {}, "endless"),
        ("mine:few,,mine:other", {}, "empty"),
        ("mine:few=1,mine:other=1", {"seeds": 3}, "seeds"),
        ("mine:few", {"colour": 3}, "colour"),
        ("mine:absent", {}, "absent"),
        ("absent:few", {}, "absent"),
        ("nothing", {}, "nothing"),
    ],
)
def test_a_wrong_spec_is_one_line(spec, args, named):
    assert named in complaint(lambda: data.open_dataset(spec, args))
