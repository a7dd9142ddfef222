"""lab/benchmarks.py: each benchmark on five items in its published form, scored by hand; folders
that other scorers read; answers of the shipped model, interrupted and taken up again."""

import json
import random
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, complaint
from PIL import Image

import checkpoint
from lab import benchmarks, shapes
from lab.shapes import Thing

TINY = str(ROOT / "checkpoints" / "tiny")


def jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def figures(run_main, tmp_path, name, files, answers=None):
    """What the command line reports of these files and answers, without a model."""
    more = ()
    if answers:
        more = "--answers", jsonl(tmp_path / "given.jsonl", [{"answer": a} for a in answers])
    code, said, error = run_main(benchmarks, name, *files, "--out", tmp_path / "out", *more)
    assert code == 0, error
    rows = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert all(row in said for row in rows)
    return {name: [round(value, 4) for value in row.values()] for name, row in rows.items()}


# --- The scorers ---------------------------------------------------------------------------------


def pope_items(pairs):
    return [
        {"question_id": n, "image": f"COCO_val2014_{n:012}.jpg", "text": text, "label": label}
        for n, (text, label) in enumerate(pairs)
    ]


def test_pope(run_main, tmp_path):
    """Read as yes, no, yes, no, no: 1 true positive, 2 false negatives, 1 false positive, 1 true
    negative. Accuracy 2/5, precision 1/2, recall 1/3, F1 = 2 (1/6) / (5/6) = 0.4, yes 2/5."""
    labels = "yes", "yes", "no", "no", "yes"
    items = pope_items(("Is there a dog in the image?", label) for label in labels)
    answers = ["Yes, there is. No cat.", "There is no dog. Yes.", "no!", "No, sir", "I do not know"]
    path = jsonl(tmp_path / "coco_pope_random.json", items)
    got = figures(run_main, tmp_path, "pope", [path], answers)
    assert got == {"coco_pope_random": [0.4, 0.5, 0.3333, 0.4, 0.4]}


MME = {
    "OCR": ["a Yes Yes", "a No no."],
    "commonsense_reasoning": ["b Yes Well, yes", "b No No"],
    "numerical_calculation": ["c Yes YES!", "c No not so"],
    "text_translation": ["d Yes Yes", "d No Yes"],
    "code_reasoning": ["e Yes No", "e No I think no"],
}


def test_mme(run_main, tmp_path):
    """ "Well, yes" and "I think no" say neither within four letters, "not so" is a no. Of two
    questions an image 2, 1, 2, 1, 0 are right, both of them of the first and third; scores 200, 50,
    200, 50, 0. Cognition has its four categories, 300; Perception has one of ten, and no sum."""
    files = []
    for name, rows in MME.items():
        rows = [row.split(" ", 2) for row in rows]
        lines = [f"{i}.png\tIs it so? Please answer yes or no.\t{t}\t{r}\n" for i, t, r in rows]
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("".join(lines))
    assert figures(run_main, tmp_path, "mme", files) == {
        "OCR": [100, 100, 200],
        "commonsense_reasoning": [50, 0, 50],
        "numerical_calculation": [100, 100, 200],
        "text_translation": [50, 0, 50],
        "code_reasoning": [0, 0, 0],
        "Cognition": [300],
    }


VQA = [  # kind, the ten people's answers, the model's
    ("yes/no", {"yes": 8, "no": 2}, "No."),
    ("number", {"2": 10}, "two"),
    ("other", {"a dog": 3, "dog": 4, "cat": 3}, "The dog!"),
    ("other", {"dont walk": 2, "don't walk": 1, "stop": 7}, "dont walk"),
    ("number", {"100978": 1, "100,978": 1, "three": 8}, "100,978"),
]


def vqa_files(tmp_path):
    questions, annotations = [], []
    for n, (kind, people, _) in enumerate(VQA):
        answers = [text for text, count in people.items() for _ in range(count)]
        answers = [
            {"answer": a, "answer_confidence": "yes", "answer_id": i + 1}
            for i, a in enumerate(answers)
        ]
        own = {"image_id": 262148, "question_id": 262148000 + n}
        questions.append(own | {"question": f"What is it, {n}?"})
        annotations.append(
            own
            | {
                "question_type": "what is",
                "answer_type": kind,
                "multiple_choice_answer": "",
                "answers": answers,
            }
        )
    files = tmp_path / "questions.json", tmp_path / "annotations.json"
    files[0].write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    files[1].write_text(json.dumps({"data_subtype": "val2014", "annotations": annotations}))
    return files


def test_vqav2(run_main, tmp_path):
    """Two of ten agree: 8 times 2/3 and twice 1/3, 0.6 (the example of VQA's issue 1). All people
    agree: nothing is normalised, "two" is not "2", 0. Seven dogs: 1. Three of ten: 7 times 1 and 3
    times 2/3, 0.9. Two of ten once the comma is gone: 0.6. In all 3.1 / 5 = 62%."""
    files = vqa_files(tmp_path)
    got = figures(run_main, tmp_path, "vqav2", files, [answer for _, _, answer in VQA])
    assert got == {"all": [62, 5], "yes/no": [60, 1], "number": [30, 2], "other": [95, 2]}
    assert benchmarks.vqa_accuracy("stop\nsign", ["stop sign"] * 10) == 1
    first = benchmarks.read_vqav2(files)[0]
    assert (first.image, first.text) == ("COCO_val2014_000000262148.jpg", "What is it, 0?")


@pytest.mark.parametrize(
    "text, normal",
    [
        ("None of the two", "0 of 2"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("5.", "5"),
        ("2.5", "2.5"),
        ("Hed've gone", "he'd've gone"),
        ("girl's 2:50", "girl's 2:50"),
        ("x-y (z)", "x y z"),
        ("x-y -z", "xy z"),
        ("1,000-x", "1000x"),
    ],
)
def test_vqa_normal(text, normal):
    assert benchmarks.vqa_normal(text) == normal


def test_gqa(run_main, tmp_path):
    """Of four balanced questions three are right: "Red." is made ready, "a dog" keeps its article.
    The fifth is not balanced: it is not asked."""
    rows = [
        ("query", "red", True),
        ("query", "dog", True),
        ("verify", "yes", True),
        ("choose", "left", True),
        ("logical", "no", False),
    ]
    items = {
        f"2002623{n}": {
            "isBalanced": balanced,
            "imageId": "n161313",
            "question": "What?",
            "answer": answer,
            "types": {"structural": kind, "semantic": "attr"},
        }
        for n, (kind, answer, balanced) in enumerate(rows)
    }
    path = tmp_path / "testdev_balanced_questions.json"
    path.write_text(json.dumps(items))
    got = figures(run_main, tmp_path, "gqa", [path], ["Red.", "a dog", "yes", "left"])
    assert got == {"all": [75, 4], "open": [50, 2], "binary": [100, 2]}
    assert benchmarks.read_gqa([path])[0].image == "n161313.jpg"


def test_mmmu(run_main, tmp_path):
    """Electronics: in brackets B, the last letter C, by its text B: all right. Art theory: "= 30"
    stands in no last line, 3600.001 to two decimals is 3,600, Fresco is fresco: two of three."""
    choices = {"A": "red", "B": "dark blue", "C": "green"}
    rows = [
        ("Electronics_28", "B", "A is wrong, the answer is (B)."),
        ("Electronics_29", "C", "C or A or C"),
        ("Electronics_30", "B", "I would say that it is Dark blue"),
        ("Art_Theory_1", "30", "x = 30\nSo it is 36 watts"),
        ("Art_Theory_2", "3,600", "Add them.\nSo the sum = 3600.001 kg."),
        ("Art_Theory_3", " Fresco", "It is a fresco."),
    ]
    items = []
    for name, truth, response in rows:
        items.append({"id": f"validation_{name}", "answer": truth, "response": response})
        if truth in choices:
            kind = {
                "question_type": "multiple-choice",
                "all_choices": [*choices],
                "index2ans": choices,
            }
        else:
            kind = {"question_type": "short-answer"}
        items[-1] |= kind
    path = tmp_path / "output.json"
    path.write_text(json.dumps(items))
    got = figures(run_main, tmp_path, "mmmu", [path])
    assert got == {"all": [0.8333, 6], "Electronics": [1, 3], "Art_Theory": [0.6667, 3]}


def test_mmmu_guesses_what_names_no_option():
    """By the scorer's own stream. "blue" is the text of an option, but of too few words."""
    options = dict(zip("ABCD", ("red", "blue", "green", "grey"), strict=True))
    seeded = random.Random(42)
    asked = [
        benchmarks.Question(subject, "", "", ([seeded.choice("ABCD")], options), "blue")
        for subject in ("Art", "Art", "Music", "Art", "Music")
    ]
    assert benchmarks.score_mmmu(asked)["all"] == {"accuracy": 1, "questions": 5}


def test_mmmus_single_letters_stand_alone():
    right = lambda response: benchmarks.mmmu_right(response, ["K"], {}, None)
    assert right("it is K.") and not right("it is dark")


# --- Pictures ------------------------------------------------------------------------------------


@pytest.fixture
def painter(monkeypatch):
    """Instead of a model: pictures as red as their seed; -> all requests."""
    asked = []

    def generate(pipeline, requests, batch_size, min_images, max_images, progress):
        assert len(requests) <= batch_size and min_images == max_images == 1
        asked.extend(requests)
        pictures = [Image.new("RGB", (8, 8), (request.seed, 0, 0)) for request in requests]
        return [SimpleNamespace(images=[picture]) for picture in pictures]

    monkeypatch.setattr(benchmarks, "load", lambda *_: None)
    monkeypatch.setattr(benchmarks, "generate", generate)
    return asked


def below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_geneval(run_main, tmp_path, painter):
    items = [
        {"tag": "counting", "include": [{"class": "bird", "count": n}], "prompt": f"{n} birds"}
        for n in range(1, 6)
    ]
    path, out = jsonl(tmp_path / "evaluation_metadata.jsonl", items), tmp_path / "out"
    command = "geneval", path, "--out", out, "--batch-size", 3
    assert run_main(benchmarks, *command)[0] == 0
    assert below(out) == sorted(
        name
        for n in range(5)
        for name in [f"0000{n}/metadata.jsonl", *(f"0000{n}/samples/000{j}.png" for j in range(4))]
    )
    assert json.loads((out / "00003" / "metadata.jsonl").read_text()) == items[3]
    assert [r.prompt[0].content for r in painter] == [i["prompt"] for i in items for _ in range(4)]
    assert len({r.seed for r in painter}) == 20
    image = Image.open(out / "00003" / "samples" / "0002.png")
    assert image.getpixel((0, 0)) == (painter[14].seed, 0, 0)
    (out / "00001" / "samples" / "0003.png").unlink()  # what an interrupted run lacks
    assert run_main(benchmarks, *command)[0] == 0
    assert painter[20:] == [painter[7]]
    code, _, said = run_main(benchmarks, *command, "--seed", 1)  # others would be left as they are
    assert code == 2 and "another --out" in said and len(painter) == 21
    assert run_main(benchmarks, *command, "--answers", path)[0] == 2


def test_hpsv2(run_main, tmp_path, painter):
    """Five prompts in two styles, and nothing else: its scorer takes all else for a style."""
    files, out = [tmp_path / "anime.json", tmp_path / "concept-art.json"], tmp_path / "out"
    files[0].write_text(json.dumps(["a cat", "a dog", "a fox"]))
    files[1].write_text(json.dumps(["a tower", "a ship"]))
    assert run_main(benchmarks, "hpsv2", *files, "--out", out)[0] == 0
    images = "anime/00000", "anime/00001", "anime/00002", "concept-art/00000", "concept-art/00001"
    assert below(out) == [f"{name}.jpg" for name in images]
    assert sorted(p.name for p in out.iterdir()) == ["anime", "concept-art"]
    assert [r.prompt[0].content for r in painter][3] == "a tower"
    assert Image.open(out / "anime" / "00002.jpg").format == "JPEG"


# --- The model -----------------------------------------------------------------------------------


@pytest.fixture
def star(tmp_path):
    """Two questions of POPE about a picture with a red star, and the command that asks them."""
    thing = Thing("star", "red", 32, 32, 10, 0.1, shapes.COLOURS["red"])
    shapes.render([thing]).save(tmp_path / "star.png")
    pairs = ("Is there a red star?", "yes"), ("Is there a blue circle?", "no")
    items = [item | {"image": "star.png"} for item in pope_items(pairs)]
    path = jsonl(tmp_path / "two.json", items)
    return [
        "pope",
        path,
        "--images",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--checkpoint",
        TINY,
    ]


@pytest.mark.parametrize("foreign", ['{"answer": "a"}\n{"mine": 1}', '[{"answer": "yes"}]'])
def test_answers_of_others_are_left_alone(run_main, tmp_path, star, foreign):
    path = tmp_path / "out" / "answers.jsonl"
    path.parent.mkdir()
    path.write_text(foreign)
    assert run_main(benchmarks, *star)[0] == 2 and path.read_text() == foreign


def test_tiny_answers_and_goes_on(run_main, tmp_path, star, monkeypatch):
    code, said, error = run_main(benchmarks, *star)
    assert code == 0 and "accuracy 1 " in said, error
    path = tmp_path / "out" / "answers.jsonl"
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["answer"] for line in lines] == ["yes", "no"]
    path.write_bytes(whole[:-9])  # in the middle of the second line
    asked = []
    generate = benchmarks.generate
    monkeypatch.setattr(
        benchmarks, "generate", lambda p, r, *a, **k: asked.extend(r) or generate(p, r, *a, **k)
    )
    assert run_main(benchmarks, *star)[0] == 0
    assert path.read_bytes() == whole and len(asked) == 1
    monkeypatch.setattr(benchmarks, "load", None)  # nothing is left to ask
    assert run_main(benchmarks, *star)[1] == said


def test_tiny_draws(run_main, tmp_path):
    path, out = tmp_path / "photo.json", tmp_path / "out"
    path.write_text('["a red circle"]')
    (run := tmp_path / "run").mkdir()  # which stands for its newest save
    (run / "run.json").write_text("{}")
    (run / "step-00000001").symlink_to(ROOT / "checkpoints" / "tiny")
    command = "hpsv2", path, "--out", out, "--device", "cpu", "--checkpoint", run
    assert run_main(benchmarks, *command)[0] == 0
    assert Image.open(out / "photo" / "00000.jpg").size == (64, 64)
    made = checkpoint.read_json(tmp_path / "out.json")
    assert made["checkpoint"] == str(run / "step-00000001")


def test_answers_of_another_run_are_not_taken(run_main, tmp_path, star):
    jsonl_line = {"image": "star.png", "question": "Is there a red star?", "answer": "yes"}
    (tmp_path / "out").mkdir()
    jsonl(tmp_path / "out" / "answers.jsonl", [jsonl_line | {"checkpoint": "another"}])
    code, _, error = run_main(benchmarks, *star)
    assert code == 2 and "give another --out" in error and error.count("\n") == 1


def test_images_are_looked_for_first(run_main, tmp_path, star, monkeypatch):
    monkeypatch.setattr(benchmarks, "load", None)
    (tmp_path / "star.png").rename(tmp_path / "moved.png")
    code, _, error = run_main(benchmarks, *star)
    assert code == 2 and "star.png is not in" in error and error.count("\n") == 1
    (tmp_path / "images").mkdir()  # MME's category/images
    (tmp_path / "moved.png").rename(tmp_path / "images" / "star.png")
    assert benchmarks.find_image(tmp_path, "star.png") == tmp_path / "images" / "star.png"


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("pope", '{"image": "a.jpg", "text": "Is it?"}\n', "line 1 is .* whose 'label' is a str"),
        ("pope", '{"image": "a.jpg", ', "line 1 is not valid JSON"),
        ("pope", "\ufeff[1]\n", "line 1 is .* whose 'image' is a str"),
        ("pope", '{"image": 1, "text": "Is it?", "label": "no"}', "line 1 is .* 'image' is a str"),
        ("mme", "a.jpg\tIs it?\n", "want image, question, Yes or No"),
        ("mme", "a.jpg\tIs it?\tYes\n", "two rows an image"),
        ("mme", "a.jpg\tIs it?\tYes\na.jpg\tIs it?\tMaybe\n", "'Maybe'.*want image, question, Yes"),
        ("mme", "a.jpg\tIs it?\tYes\nb.jpg\tIs it?\tNo\n", "two rows an image"),
        ("vqav2", "{}", "1 files; give two, questions and annotations"),
        ("gqa", "[]", "want an object"),
        ("gqa", '{"1": {"isBalanced": true}}', "question 1 is .* 'imageId' is a str"),
        ("mmmu", '[{"id": "a_b_1", "question_type": "open"}]', "'response' is a str"),
        (
            "mmmu",
            '[{"id": "a_b_1", "question_type": "open", "response": "", "answer": 3}]',
            "no text",
        ),
        (
            "mmmu",
            '[{"id": "a_b_1", "question_type": "multiple-choice", "response": "", "answer": "A", '
            '"index2ans": {}}]',
            "no option",
        ),
    ],
)
def test_bad_files(tmp_path, name, text, wanted):
    path = tmp_path / "file.json"
    path.write_text(text)
    said = complaint(lambda: benchmarks.SCORED[name][0]([path]))
    assert re.search(wanted, said), said


def test_bad_prompts_and_answers(run_main, tmp_path):
    (tmp_path / "other.json").write_text('["a cat"]')
    assert "a style" in complaint(lambda: benchmarks.hpsv2_layout([tmp_path / "other.json"]))
    path = jsonl(tmp_path / "metadata.jsonl", [{"tag": "colors"}])
    assert "'prompt'" in complaint(lambda: benchmarks.geneval_layout([path]))
    code, _, error = run_main(benchmarks, "pope", tmp_path / "missing", "--out", tmp_path)
    assert code == 2 and f"{tmp_path / 'missing'}" in error and error.count("\n") == 1
    questions = benchmarks.read_pope([jsonl(tmp_path / "p.json", pope_items([("Is it?", "no")]))])
    path = jsonl(tmp_path / "answers.jsonl", [{"answer": "no"}] * 2)
    assert "2 answers to 1" in complaint(lambda: benchmarks.take_answers(questions, path))
