"""The Shapes judge: right on what is drawn, wrong on anything else; PSNR and SSIM; the report."""

import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

import checkpoint
import data
import evaluate
from data import Segment, Thing
from evaluate import detect, judge, reads
from sample import Answer
from vae import VQVAE, VQVAEConfig

KINDS = list(data.GENEVAL)


def examples(kind, count=40, **options):
    return [
        data.text_to_image(random.Random(f"test {kind} {i}"), kind, **options) for i in range(count)
    ]


def wanted(example):
    """What two captions must share to ask for the same things."""
    if example.kind in ("one object", "two objects"):
        return sorted(t.shape for t in example.things)
    return sorted(t.name for t in example.things)


# --- The detector --------------------------------------------------------------------------------


def test_detector_reads_99_percent_of_rendered_scenes():
    scenes = [data.random_scene(random.Random(f"test {i}"), allow_unseen=True) for i in range(500)]
    right = sum(reads(things, detect(data.render(things)), within=1.5) for things in scenes)
    assert any(t.digit is not None for things in scenes for t in things)
    assert any((t.colour, t.shape) in data.UNSEEN for things in scenes for t in things)
    assert right >= 495


def test_detector_reads_blurred_scenes():
    scenes = [data.random_scene(random.Random(f"blur {i}")) for i in range(100)]
    blur = ImageFilter.GaussianBlur(0.8)
    assert sum(reads(s, detect(data.render(s).filter(blur))) for s in scenes) >= 95


def test_detector_measures_size():
    for shape in data.SHAPES:
        thing = Thing(shape, "red", 30.3, 33.8, 9.5, 0.1, data.COLOURS["red"])
        (seen,) = detect(data.render([thing]))
        assert abs(seen.r - 9.5) < 0.5


def test_detector_sees_nothing_in_an_empty_picture_and_ignores_specks():
    empty = data.render([])
    assert detect(empty) == []
    empty.putpixel((10, 10), (220, 40, 40))
    assert detect(empty) == []


def test_what_is_like_no_shape_is_a_blob():
    two = [Thing("circle", "blue", x, 30, 8, rgb=data.COLOURS["blue"]) for x in (20, 35)]
    (seen,) = detect(data.render(two))
    assert seen.shape == "blob"


def test_scenes_are_not_read_from_pictures_of_others():
    scenes = [data.random_scene(random.Random(f"test {i}")) for i in range(100)]
    for things, others in zip(scenes, scenes[1:], strict=False):
        assert not reads(things, detect(data.render(others)))


# --- The judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_judge_accepts_true_pictures(kind):
    for example in examples(kind) + examples(kind, allow_unseen=True):
        assert judge(example, detect(example.segments[1].content))


@pytest.mark.parametrize("kind", KINDS)
def test_judge_rejects_pictures_of_other_captions(kind):
    made = [(e, detect(e.segments[1].content)) for k in KINDS for e in examples(k, 12)]
    mine = [e for e, _ in made if e.kind == kind]
    rejected = 0
    for example in mine:
        shapes_only = kind in ("one object", "two objects")
        for other, seen in made:
            same = sorted(t.shape if shapes_only else t.name for t in other.things)
            if same != wanted(example):
                assert not judge(example, seen)
                rejected += 1
    assert rejected > 500


def test_judge_rejects_mirrored_positions():
    for example in examples("position"):
        picture = example.segments[1].content
        sideways = "left" in example.segments[0].content or "right" in example.segments[0].content
        mirrored = ImageOps.mirror(picture) if sideways else ImageOps.flip(picture)
        assert not judge(example, detect(mirrored))


def test_judge_counts_what_is_too_many_or_missing():
    for example in examples("counting"):
        assert not judge(example, example.things[1:])
        assert not judge(example, example.things + example.things[:1])
    (one,) = examples("one object", 1)
    assert judge(one, [replace(one.things[0], colour="green")])
    assert not judge(one, [])


def test_swapped_colours_are_no_binding():
    (example,) = examples("binding", 1)
    a, b = example.things
    if a.shape == b.shape:
        pytest.skip("the same shape twice")
    swapped = [replace(a, colour=b.colour), replace(b, colour=a.colour)]
    assert not judge(example, swapped)


# --- Figures -------------------------------------------------------------------------------------


def test_psnr_of_known_errors():
    truth = torch.full((2, 3, 16, 16), 0.5)
    images = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert evaluate.psnr(images, truth).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_ssim_of_equal_and_of_flat_pictures():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert evaluate.ssim(images, images).tolist() == pytest.approx([1, 1], abs=1e-5)
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    flat = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)  # luminance alone
    assert evaluate.ssim(a, b).item() == pytest.approx(flat, abs=1e-3)
    assert evaluate.ssim(images, 1 - images).max() < 0


def test_digits_are_legible_where_they_are_drawn_and_not_where_another_is():
    rng = random.Random(0)
    for _ in range(20):
        things = data.random_scene(rng, digits=1.0)
        assert all(evaluate.legible(things, data.render(things)))
        other = [replace(t, digit=t.digit and 10 - t.digit) for t in things]
        expected = [t.digit in (0, 5) for t in things if t.digit is not None]
        assert evaluate.legible(things, data.render(other)) == expected


def test_wilson_interval():
    assert evaluate.wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert evaluate.wilson(0, 10) == pytest.approx((0, 0.278), abs=1e-3)
    assert evaluate.wilson(10, 10)[1] == pytest.approx(1)


def test_rows_of_the_table_add_up_without_the_unseen():
    rows = [("counting", True), ("counting", False), ("position", True)] + [(evaluate.UNSEEN, True)]
    picture = Image.new("RGB", (64, 64))
    table = evaluate.tally([evaluate.Verdict(row, picture, "", right) for row, right in rows])
    assert (table["all"]["right"], table["all"]["total"]) == (2, 3)
    assert table[evaluate.UNSEEN]["rate"] == 1
    assert table["counting"]["rate"] == 0.5


# --- The tasks and the command line --------------------------------------------------------------


def perfect(pipeline, requests, **options):
    """A model that knows the answers: it draws the held-out example's own picture."""
    examples = [e for _, e in evaluate.caption_examples(7, 12)]
    truth = {e.segments[0].content: e.segments[1] for e in examples}
    return [Answer([truth[r.prompt[0].content]]) for r in requests]


def test_a_perfect_painter_gets_everything_right(monkeypatch):
    monkeypatch.setattr(evaluate, "generate", perfect)
    verdicts = evaluate.draw(None, 7, 12)
    assert [v.row for v in verdicts[:12]] == KINDS * 2
    assert [v.row for v in verdicts[12:]] == [evaluate.UNSEEN] * 2
    assert all(v.right for v in verdicts)


def test_no_picture_is_wrong_and_answers_are_compared_exactly(monkeypatch):
    monkeypatch.setattr(evaluate, "generate", lambda p, rs, **o: [Answer() for _ in rs])
    assert not any(v.right for v in evaluate.draw(None, 7, 6))
    said = lambda p, rs, **o: [Answer([Segment("yes", True)]) for _ in rs]  # noqa: E731
    monkeypatch.setattr(evaluate, "generate", said)
    verdicts = evaluate.ask(None, 7, 60)
    assert {v.row for v in verdicts} == set(data.QUESTIONS)
    assert all(v.row == "exists" for v in verdicts if v.right)
    assert 0 < sum(v.right for v in verdicts) < 10
    sheet = evaluate.contact_sheet(verdicts)
    assert sheet.width > 12 * 3 * 64


def truthful(pipeline, requests, **options):
    """Answers every edit and story with its own truth, found again by its seed."""
    return [Answer(TRUTH[r.seed]) for r in requests]


TRUTH = {}


def remember(name: str, make, seed: int, count: int) -> list[data.Example]:
    examples = []
    for i in range(count):
        kind = () if make is data.story else (list(data.EDITS)[i % len(data.EDITS)],)
        examples.append(make(random.Random(f"evaluate {name} {seed} {i}"), *kind))
        TRUTH[seed + i] = [s for s in examples[-1].segments if s.output]
    return examples


@pytest.mark.parametrize("in_context", [False, True])
def test_a_perfect_editor_gets_everything_right(in_context, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", truthful)
    make = data.in_context if in_context else data.editing
    examples = remember("in context" if in_context else "edit", make, 7, 30)
    verdicts = evaluate.edit(None, 7, 30, in_context)
    assert all(v.right for v in verdicts) and all(v.kept == 60 for v in verdicts)
    for i, example in enumerate(examples):  # an editor that does nothing
        TRUTH[7 + i] = [Segment(data.render(example.before), True)]
    verdicts = evaluate.edit(None, 7, 30, in_context)
    assert not any(v.right for v in verdicts) and all(v.kept == 60 for v in verdicts)


def test_differences_are_right_to_the_letter(monkeypatch):
    monkeypatch.setattr(evaluate, "generate", truthful)
    remember("difference", data.difference, 7, 30)
    table = evaluate.tally(evaluate.compare(None, 7, 30))
    assert set(table) == {*data.EDITS, "all"} and table["all"]["rate"] == 1
    TRUTH[9] = [Segment("Remove the red circle.", True)]
    assert evaluate.tally(evaluate.compare(None, 7, 30))["all"]["right"] == 29


def test_an_edit_that_also_moves_another_thing_is_wrong():
    rng = random.Random(0)
    while len((example := data.editing(rng, "recolour")).things) < 3:
        pass
    assert evaluate.judge_edit(example, example.things)
    moved = [replace(example.things[0], x=example.things[0].x + 5), *example.things[1:]]
    assert not evaluate.judge_edit(example, moved)
    picture = data.render(moved)
    assert evaluate.kept(example, picture, moved) < 30


def test_a_perfect_narrator_gets_every_frame_right(monkeypatch):
    monkeypatch.setattr(evaluate, "generate", truthful)
    examples = remember("story", data.story, 7, 20)
    table = evaluate.tally(evaluate.tell(None, 7, 20))
    assert table["frame is as its sentence"]["rate"] == 1 == table["actors stay the same"]["rate"]
    for i in range(20):  # sentences of another story: actors stay the same, frames are not as said
        sentence = examples[i - 1].segments[2]
        TRUTH[7 + i] = [sentence if isinstance(s.content, str) else s for s in TRUTH[7 + i]]
    table = evaluate.tally(evaluate.tell(None, 7, 20))
    assert table["frame is as its sentence"]["rate"] < 0.3
    assert table["actors stay the same"]["rate"] == 1
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for i, example in enumerate(examples):  # the right actor, the wrong way
        told = [s for s in example.segments if s.output]
        for j in (0, 2, 4):
            *words, way = told[j].content.rstrip(".").split()
            told[j] = Segment(" ".join([*words, turned[way]]) + ".", True)
        TRUTH[7 + i] = told
    assert not any(v.right for v in evaluate.tell(None, 7, 20) if v.row.startswith("frame"))
    monkeypatch.setattr(evaluate, "generate", lambda p, rs, **o: [Answer() for _ in rs])
    table = evaluate.tally(evaluate.tell(None, 7, 4))
    assert all((row["right"], row["total"]) == (0, 12) for row in list(table.values())[:2])


def test_measures_of_pope():
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "no")] * 4 + [("no", "yes")] * 2
    picture = Image.new("RGB", (64, 64))
    verdicts = [evaluate.Verdict("exists", picture, "", a == b, a, b) for a, b in pairs]
    verdicts.append(evaluate.Verdict("count", picture, "", True, "two", "two"))
    rates = {name: row["rate"] for name, row in evaluate.pope(verdicts).items()}
    assert rates == {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "yes-rate": 0.4}


def test_unseen_captions_name_unseen_combinations():
    names = [f"{colour} {shape}" for colour, shape in data.UNSEEN]
    for row, example in evaluate.caption_examples(3, 60):
        named = any(name in example.segments[0].content for name in names)
        assert named == (row == evaluate.UNSEEN)


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint that holds a tiny autoencoder alone."""
    torch.manual_seed(0)
    config = VQVAEConfig.preset("tiny")
    folder = tmp_path / "vae"
    vae = VQVAE(config)
    checkpoint.write(folder, {"vae": asdict(config)}, vae=vae.state_dict())
    return folder


def test_autoencoder_alone_from_the_command_line(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "SCENES", 4)
    file = tmp_path / "numbers.json"
    arguments = ["--checkpoint", str(untrained)]
    for flag in ("--prompts", "--questions", "--edits", "--in-context", "--stories"):
        arguments += [flag, "0"]
    evaluate.main(["shapes", *arguments, "--json", str(file)])
    assert "quantised" in capsys.readouterr().out
    row = json.loads(file.read_text())["autoencoder"]["continuous"]
    assert row["readable"] == 0 and math.isfinite(row["psnr"]) and -1 <= row["ssim"] <= 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["shapes", "--checkpoint", "nowhere"], "nowhere"),
        (["shapes", "--prompts", "-1"], "--prompts"),
        (["shapes", "--steps", "0"], "--steps"),
        (["shapes", "--device", "toaster"], "toaster"),
        (["shapes", "--json", "no/such/folder/file.json"], "no/such/folder"),
        (["triangles"], "triangles"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(arguments)
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert says in message and message.count("\n") == 1
