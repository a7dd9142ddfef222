"""lab/evaluate.py: the detector is right on what is drawn, judges wrong on anything else; figures,
the tasks with perfect and with broken models, the command line."""

import json
import math
import random
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter, ImageOps

import checkpoint
from data import Segment, to_image, to_tensor
from lab import evaluate, shapes, speed
from lab.evaluate import UNSEEN, detect, reads
from lab.evaluate import shows as judge
from lab.shapes import Example, Shapes, ShapesConfig, Thing, render
from orthus import Orthus, OrthusConfig
from sample import Answer
from vae import VQVAE, VQVAEConfig

KINDS = list(shapes.CAPTIONS)
WORLD = Shapes(0, ShapesConfig(digits=0.5))
OPEN = Shapes(0, ShapesConfig(digits=0.5), allow_unseen=True)
BLACK = Image.new("RGB", (64, 64))


def scenes(name, count, world=WORLD):
    return [world.random_scene(random.Random(f"{name} {i}")) for i in range(count)]


def examples(kind, count=40, world=WORLD):
    return [world.text_to_image(random.Random(f"test {kind} {i}"), kind) for i in range(count)]


# --- The detector --------------------------------------------------------------------------------


def test_detector_reads_99_percent_of_rendered_scenes():
    drawn = scenes("test", 200, OPEN)
    right = sum(reads(things, detect(render(things)), within=1.5) for things in drawn)
    assert any(t.digit is not None for things in drawn for t in things)
    assert any(t.unseen for things in drawn for t in things)
    assert right >= 198


def test_detector_reads_small_pictures():
    """A nano model is given scenes of 32 x 32 pixels and draws such ones: brought back to 64, they
    are read as well."""
    drawn = scenes("small", 100, OPEN)
    small = [to_image(to_tensor(render(things), 32)) for things in drawn]
    assert small[0].size == (32, 32)
    assert sum(reads(t, detect(image)) for t, image in zip(drawn, small, strict=True)) >= 97


def test_detector_reads_blurred_scenes():
    blur = ImageFilter.GaussianBlur(0.8)
    drawn = scenes("blur", 60)
    assert sum(reads(things, detect(render(things).filter(blur))) for things in drawn) >= 57


def test_detector_measures_size():
    for shape in shapes.SHAPES:
        thing = Thing(shape, "red", 30.3, 33.8, 9.5, 0.1, shapes.COLOURS["red"])
        (seen,) = detect(render([thing]))
        assert abs(seen.r - 9.5) < 0.5


def test_detector_sees_nothing_in_an_empty_picture_and_ignores_specks():
    empty = render([])
    assert detect(empty) == []
    empty.putpixel((10, 10), (220, 40, 40))
    assert detect(empty) == []


def test_what_is_like_no_shape_is_a_blob():
    two = [Thing("circle", "blue", x, 30, 8, rgb=shapes.COLOURS["blue"]) for x in (20, 35)]
    (seen,) = detect(render(two))
    assert seen.shape == "blob"


def test_scenes_are_not_read_from_pictures_of_others():
    drawn = scenes("test", 60)
    for things, others in zip(drawn, drawn[1:], strict=False):
        assert not reads(things, detect(render(others)))


# --- The judges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_judge_accepts_true_pictures(kind):
    for example in examples(kind, 20) + examples(kind, 15, world=OPEN):
        assert judge(example, detect(example.segments[1].content))


@pytest.mark.parametrize("kind", KINDS)
def test_judge_rejects_pictures_of_other_captions(kind):
    attribute = "shape" if kind in ("one object", "two objects") else "name"
    named = lambda things: sorted(getattr(t, attribute) for t in things)
    made = [e for k in KINDS for e in examples(k, 12)]
    rejected = 0
    for example in (e for e in made if e.kind == kind):
        for other in made:
            if named(other.things) != named(example.things):
                assert not judge(example, other.things)
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
    for example in examples("binding"):
        a, b = example.things
        swapped = [replace(a, colour=b.colour), replace(b, colour=a.colour)]
        assert judge(example, swapped) == (a.shape == b.shape)


def test_an_edit_that_also_moves_another_thing_is_wrong():
    rng = random.Random(0)
    while len((example := WORLD.editing(rng, "recolour")).things) < 3:
        pass
    assert judge(example, example.things)
    moved = [replace(example.things[0], x=example.things[0].x + 5), *example.things[1:]]
    assert not judge(example, moved)
    assert evaluate.kept(example, render(moved), moved) < 30


def test_frames_that_show_anything_else_are_wrong():
    """A recoloured, lost, added or other thing, the other actor's move, a step too short."""
    for i in range(20):
        example = WORLD.story(random.Random(f"frame {i}"))
        before = example.before
        sentence, after = shapes.story_moves(before)[0]
        assert evaluate.is_told(sentence, before, after)
        a, b = after
        (moved,) = [t for t in after if t not in before]
        back = [t for t in before if t not in after] + [t for t in after if t is not moved]
        wrong = [
            [a],
            [*after, a],
            [replace(a, colour="white"), b],
            [a, replace(b, shape="blob")],
            back,
            [replace(a, x=a.x + 6), b],
            [a, replace(b, y=b.y + 6)],
        ]
        assert not any(evaluate.is_told(sentence, before, seen) for seen in wrong)


@pytest.mark.parametrize("kind", list(shapes.EDITS))
def test_edits_that_show_anything_else_are_wrong(kind):
    for i in range(20):
        example = WORLD.editing(random.Random(f"mutated {kind} {i}"), kind)
        things = example.things
        assert judge(example, things)
        wrong = [
            example.before,
            things[1:],
            [*things, things[0]],
            [*things[:-1], replace(things[-1], shape="blob")],
            [*things[:-1], replace(things[-1], colour="white")],
        ]
        assert not any(judge(example, seen) for seen in wrong)


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
    x, y = images[:, :1, :11, :11]  # a single window, written out
    away = torch.arange(11) - 5.0
    w = torch.exp(-(away[:, None] ** 2 + away**2) / (2 * 1.5**2))
    mean = lambda v: ((w * v).sum() / w.sum()).item()
    (a, b), c = (mean(x), mean(y)), mean((x - mean(x)) * (y - mean(y)))
    spread = sum(mean((v - mean(v)) ** 2) for v in (x, y))
    wanted = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4) * (2 * c + 9e-4) / (spread + 9e-4)
    assert evaluate.ssim(x[None], y[None]).item() == pytest.approx(wanted, abs=1e-5)


def test_digits_are_legible_where_they_are_drawn_and_not_where_another_is():
    for things in scenes("digits", 20, Shapes(0, ShapesConfig(digits=1.0))):
        assert all(evaluate.legible(things, render(things)))
        other = [replace(t, digit=t.digit and 10 - t.digit) for t in things]
        expected = [t.digit in (0, 5) for t in things if t.digit is not None]
        assert evaluate.legible(things, render(other)) == expected


def test_wilson_interval():
    assert evaluate.wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert evaluate.wilson(0, 10) == pytest.approx((0, 0.278), abs=1e-3)
    assert evaluate.wilson(10, 10)[1] == pytest.approx(1)


def table(*rows):
    return evaluate.tally([evaluate.Verdict(row, [BLACK], "", right) for row, right in rows])


def test_rows_of_the_table_add_up_without_the_unseen():
    rows = table((UNSEEN, True), ("counting", True), ("counting", False), ("position", True))
    assert list(rows) == ["counting", "position", "all", UNSEEN]
    assert (rows["all"]["right"], rows["all"]["total"]) == (2, 3)
    assert rows[UNSEEN]["rate"] == 1 and rows["counting"]["rate"] == 0.5
    rows = table(("digit", False), ("count", True))
    assert rows["all"]["rate"] == 0.5 and rows["all but digit"]["rate"] == 1


def test_measures_of_pope():
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "no")] * 4 + [("no", "yes")] * 2
    verdicts = [evaluate.Verdict("exists", [BLACK], "", a == b, a, b) for a, b in pairs]
    verdicts.append(evaluate.Verdict("count", [BLACK], "", True, "two", "two"))
    rates = {name: row["rate"] for name, row in evaluate.pope(verdicts).items()}
    assert rates == {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "yes-rate": 0.4}


def test_several_seeds_are_a_mean_and_a_range():
    rows = [table(*[("counting", i < n) for i in range(10)]) for n in (3, 9)]
    runs = [{"seed": seed, "text to image": row} for seed, row in zip((1, 2), rows, strict=True)]
    title, line, _ = evaluate.over_seeds(runs).splitlines()
    assert "1, 2" in title and "counting" in line
    assert "60.0%" in line and "30.0% to 90.0%" in line


# --- The tasks -----------------------------------------------------------------------------------


TASKS = [task for task in shapes.TASKS if task != "image"]


@pytest.fixture
def answers(monkeypatch):
    """Let a function of the held-out example answer in the model's place: run(task, answer)."""

    def run(method, answer, count=30, config=WORLD.config):
        made = evaluate.held_out(config, method, 7, count)
        replies = iter(made)
        reply = lambda _, requests, **options: [Answer(answer(next(replies))) for _ in requests]
        monkeypatch.setattr(evaluate, "generate", reply)
        return evaluate.run_task(None, method, made, 7)

    return run


def truth(example: Example) -> list[Segment]:
    return [s for s in example.segments if s.output]


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_is_right_and_silence_is_wrong(task, answers):
    verdicts = answers(task, truth)
    kinds = list(ShapesConfig().kinds(task)) or ["frame is as its sentence", "actors stay the same"]
    assert {v.row for v in verdicts} - {UNSEEN} == set(kinds)
    assert all(v.right for v in verdicts)
    assert all(v.kept == 60 for v in verdicts if v.kept is not None)
    assert len([v for v in verdicts if v.row == UNSEEN]) == (5 if task == "text_to_image" else 0)
    sheet = evaluate.contact_sheet(verdicts)
    assert sheet.width > 10 * 3 * 64 or task == "in_context"
    assert sheet.width <= 12 * 200 + 8
    verdicts = answers(task, lambda example: [], count=12)
    assert verdicts and not any(v.right for v in verdicts)
    assert all(v.kept is None for v in verdicts)


@pytest.mark.parametrize("task", ["editing", "in_context"])
def test_doing_nothing_is_no_edit(task, answers):
    verdicts = answers(task, lambda example: [Segment(render(example.before), True)])
    assert not any(v.right for v in verdicts) and all(v.kept == 60 for v in verdicts)


@pytest.mark.parametrize("task", ["understanding", "difference"])
def test_answers_in_words_are_right_to_the_letter(task, answers):
    say = lambda change: lambda e: [Segment(change(e.segments[-1].content), True)]
    assert all(v.right for v in answers(task, say(lambda text: f" {text} ")))
    assert not any(v.right for v in answers(task, say(lambda text: text + " yes")))
    assert not any(v.right for v in answers(task, say(str.swapcase)) if v.row != "digit")


def test_frames_are_judged_by_their_sentences(answers):
    def rates(change):
        rows = evaluate.tally(answers("story", change, count=8))
        return rows["frame is as its sentence"]["rate"], rows["actors stay the same"]["rate"]

    def told(change):
        return lambda e: [s if s.is_image else replace(s, content=change(s)) for s in truth(e)]

    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    way = lambda s: s.content.rstrip(".").split()[-1]
    assert rates(told(lambda s: s.content.replace(way(s), turned[way(s)]))) == (0, 1)
    assert rates(told(lambda s: "Hello.")) == (0, 1)
    assert rates(lambda e: [s for s in truth(e) if s.is_image]) == (0, 1)
    assert rates(lambda e: truth(e)[:2]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert rates(lambda e: truth(e) * 2) == (1, 1)  # more frames are not looked at
    still = lambda e: [s for s in truth(e) for s in ([e.segments[0]] if s.is_image else [s])]
    assert rates(still) == (0, 1)


def test_unseen_captions_name_unseen_combinations():
    names = [f"{colour} {shape}" for colour, shape in shapes.UNSEEN]
    made = evaluate.held_out(ShapesConfig(), "text_to_image", 3, 60)
    for i, example in enumerate(made):
        named = any(name in example.segments[0].content for name in names)
        (verdict,) = evaluate.judge_picture(example, Answer([]))
        assert named == example.unseen == (verdict.row == UNSEEN) == (i >= 60)
    assert len(made) == 70
    other = evaluate.held_out(ShapesConfig(), "text_to_image", 4, 60)
    assert [e.things for e in made[60:]] != [e.things for e in other[60:]]


def test_held_out_examples_of_a_seed_stay_what_they_are():
    """Recorded: what the reported figures were measured on."""
    names = "text_to_image", "understanding", "story"
    made = [evaluate.held_out(WORLD.config, name, 1000, 2)[1] for name in names]
    said = [next(s.content for s in e.segments if not s.is_image) for e in made]
    assert said == [
        "a star and a triangle",
        "What colour is the square?",
        "A blue circle meets a green square. Continue this story.",
    ]


def test_a_small_world_is_evaluated_on_what_it_has(answers):
    few = ShapesConfig(
        tasks={"text_to_image": 1.0, "understanding": 1.0},
        captions={"one object": 1.0, "colours": 1.0},
        questions={"colour": 1.0, "count": 1.0},
        shapes=("circle", "square", "star"),
        colours=("red", "green", "blue"),
        digits=0.0,
    )
    drawn = answers("text_to_image", truth, config=few)
    assert {v.row for v in drawn} == {"one object", "colours"}  # nothing of it is unseen
    assert {v.row for v in answers("understanding", truth, config=few)} == {"colour", "count"}
    with_unseen = replace(few, shapes=("circle", "square", "triangle"))
    drawn = answers("text_to_image", truth, config=with_unseen)
    assert {v.label for v in drawn if v.row == UNSEEN} == {"a green triangle"}


def test_requests_share_no_noise(monkeypatch):
    """Neighbouring requests, tasks and seeds: PyTorch's generator looks at 32 bits of a seed."""
    seeds = []

    def record(_, requests, **options):
        seeds.extend(r.seed % 2**32 for r in requests)
        return [Answer([])] * len(requests)

    monkeypatch.setattr(evaluate, "generate", record)
    prompts = examples("colours", 1) * 300
    for seed in (1000, 1001):
        for name, task in evaluate.TASKS.items():
            unjudged = replace(task, judge=lambda example, answer: [])
            monkeypatch.setitem(evaluate.TASKS, name, unjudged)
            evaluate.run_task(None, name, prompts, seed)
    assert len(set(seeds)) == len(seeds) == 3600


# --- The whole, and the command line -------------------------------------------------------------


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint that holds a tiny autoencoder alone."""
    torch.manual_seed(0)
    config = VQVAEConfig.preset("tiny")
    checkpoint.write(tmp_path, {"vae": asdict(config)}, vae=VQVAE(config).state_dict())
    return tmp_path


NOTHING = dict.fromkeys(evaluate.COUNTS, 0)


def test_an_autoencoder_is_measured_with_codes_and_without_on_scenes_that_differ(monkeypatch):
    """Of a perfect one, whose only code is black."""
    seen, scene = [], WORLD.random_scene
    monkeypatch.setattr(WORLD, "random_scene", lambda rng: seen.append(scene(rng)) or seen[-1])
    perfect = SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]),
        config=VQVAEConfig.preset("tiny"),
        encode=lambda images: images,
        decode=lambda z: z,
        quantize=lambda z: z,
        lookup=lambda codes: torch.full_like(codes, -1),
    )
    report = evaluate.autoencoder_report(perfect, WORLD, 5, 52)
    assert len(seen) == len({repr(things) for things in seen}) == 52
    names = "ssim", "readable", "digits"
    assert [report["continuous"][name] for name in names] == pytest.approx([1, 1, 1], abs=1e-4)
    assert report["quantised"]["readable"] == 0 and report["quantised"]["psnr"] < 5
    other = evaluate.autoencoder_report(perfect, WORLD, 6, 2)
    assert seen[52:] != seen[:2] and other != report


def test_autoencoder_alone_from_the_command_line(untrained, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", partial(evaluate.evaluate, scenes=4))
    file = tmp_path / "numbers.json"
    flags = [f"--{name.replace('_', '-')}=0" for name in NOTHING]
    arguments = [untrained, "--json", file, "--seed", 1, "--seed", 2]
    code, out, _ = run_main(evaluate, *arguments, *flags)
    runs = json.loads(file.read_text())["seeds"]
    row = runs[1]["autoencoder"]["continuous"]
    assert code == 0 and "quantised" in out and "over seeds 1, 2" in out
    assert [run["seed"] for run in runs] == [1, 2]
    assert row["readable"] == 0 and math.isfinite(row["psnr"]) and -1 <= row["ssim"] <= 1


def test_an_autoencoder_that_gives_back_what_it_gets_is_perfect():
    same = lambda x: x
    perfect = SimpleNamespace(
        config=VQVAEConfig.preset("tiny"),
        parameters=lambda: iter([torch.zeros(1)]),
        encode=same,
        quantize=same,
        lookup=torch.zeros_like,
        decode=same,
    )
    rows = evaluate.autoencoder_report(perfect, Shapes(0), 0, 6)
    assert rows["continuous"] == dict(psnr=math.inf, ssim=pytest.approx(1), readable=1, digits=1)
    assert rows["quantised"]["psnr"] < 20 and rows["quantised"]["readable"] == 0


def test_the_shipped_model_from_a_function_call(tmp_path):
    """What a trainer calls: a few examples of two tasks, a table and sheets of pictures."""
    counts, tiny = NOTHING | {"prompts": 6, "questions": 6}, ROOT / "checkpoints" / "tiny"
    results = evaluate.evaluate(tiny, 5, counts, tmp_path, scenes=4, steps=3)
    assert results["text to image"]["all"]["total"] == 6 and "stories" not in results
    assert results["understanding"]["all"]["right"] >= 4 and results["steps"] == 3
    assert results["pope"]["accuracy"]["total"] == 1
    assert results["differences"]["all"]["total"] == 2  # 0.3 of the questions
    assert results["autoencoder"]["continuous"]["readable"] == 1
    assert "text to image" in evaluate.show(results) and json.dumps(results)
    sheets = {"text_to_image.png", "understanding.png", "differences.png"}
    assert {path.name for path in tmp_path.iterdir()} == sheets


def test_a_report_has_the_tasks_of_the_checkpoint_s_world(untrained, tmp_path, monkeypatch):
    """What train.py prints of an untrained model: what the section "data" of its config names."""
    whole = evaluate.evaluate
    few = lambda *args, **options: whole(*args, **options | {"scenes": 4})
    monkeypatch.setattr(evaluate, "evaluate", few)
    config = OrthusConfig.preset(
        "tiny",
        num_hidden_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        head_width=64,
    )
    model = Orthus(config)
    model.init_weights()
    data = {"tasks": {"text_to_image": 1.0, "editing": 1.0}, "captions": {"colours": 1.0}}
    sections = {"model": asdict(config), "data": data, "generation": {"steps": 1, "max_tokens": 40}}
    tokenizer = ROOT / "checkpoints" / "tiny" / "tokenizer.model"
    checkpoint.write(untrained, sections, model=model.state_dict(), tokenizer=tokenizer)
    folder = tmp_path / "sheets"
    folder.mkdir()
    counts = dict.fromkeys(evaluate.COUNTS, 2)
    results = evaluate.evaluate(untrained, counts=counts, samples=folder)
    titles = [task.title for task in evaluate.TASKS.values()]
    assert [name for name in results if name in titles] == ["text to image", "editing"]
    assert list(results["text to image"]) == ["colours", "all", UNSEEN]
    assert results["editing"]["all"]["total"] == 2
    assert "colours" in evaluate.show(results) and {p.suffix for p in folder.iterdir()} == {".png"}


def test_speed_prints_ratios_and_fast_paths_change_nothing(run_main, monkeypatch):
    """What takes long, pictures and processes, is replaced."""
    blank = lambda _, requests, **options: [Answer([Segment(BLACK, True)]) for _ in requests]
    monkeypatch.setattr(speed, "generate", blank)
    monkeypatch.setattr(speed.subprocess, "run", lambda command, **options: None)
    code, out, _ = run_main(speed, "--rounds", 1, "--device", "cpu")
    rows = out.splitlines()
    assert code == 0 and len(rows) == 7
    assert all(float(row.split()[-1]) < 1e-3 for row in rows[1:5])


@pytest.mark.parametrize(
    "field, spec", [("spec", "lab.shapes:nano_tasks"), ("mix", "a=1,lab.shapes:nano_tasks=1")]
)
def test_the_world_is_found_in_a_spec(untrained, field, spec):
    config = json.loads((untrained / "config.json").read_text())
    args = {"digits": 0.25} if field == "spec" else {"lab.shapes:nano_tasks": {"digits": 0.25}}
    config["data"] = {"spec": spec, "args": args}
    (untrained / "config.json").write_text(json.dumps(config))
    world = evaluate.world_of(checkpoint.open_checkpoint(untrained))
    assert (world.digits, world.max_objects) == (0.25, 3)


@torch.inference_mode()
def test_a_latent_takes_few_operators():
    head, backbone = speed.operators()
    assert 1000 < head <= 4000 and 100 < backbone <= 400


def test_a_world_is_the_one_that_the_checkpoint_was_trained_on(untrained):
    config = json.loads((untrained / "config.json").read_text())
    config["data"] = asdict(ShapesConfig()) | {"colours": ["red", "mauve"]}
    (untrained / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mauve"):
        evaluate.evaluate(untrained, counts=NOTHING)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere"], "nowhere"),
        (["--prompts", "-1"], "--prompts"),
        (["--seed", "one"], "one"),
        (["--steps", "0"], "--steps"),
        (["--cfg-scale", "nan"], "nan"),
        (["--device", "toaster"], "toaster"),
        (["--json", "no/such/folder/file.json"], "no/such/folder"),
        (["--batch-size", "0"], "--batch-size"),
        (["--json", "."], "--json ."),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, says, run_main):
    code, _, message = run_main(evaluate, *arguments)
    assert code == 2 and says in message and message.count("\n") == 1
