"""experiments.py: arms run once, on the same examples; verdicts follow intervals."""

import dataclasses
import gzip
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import small_presets  # noqa: F401: a fixture of this module too

import checkpoint
import evaluate
import experiments
import stages
import train
from shapes import ShapesConfig

QUICK = "--steps 2 --batch-size 4 --workers 0 --pictures-every 0"


def record(images: str = "", text: str = "", **more) -> dict:
    answers = {"text to image, colours": images, "understanding, count": text,
               f"text to image, {evaluate.UNSEEN}": "1111"}  # fmt: skip
    return {"answers": answers, "sharpness": 1.0, "spread": 2.0, "minutes": 1.0} | more


def test_differences_are_paired_and_leave_the_unseen_out():
    ours, theirs = {"0": record("1101")}, {"0": record("1001")}
    mean, half, seeds = experiments.compare(ours, theirs, "text to image", ("", ""))
    assert mean == 25 and seeds == ["0"]
    assert half == pytest.approx(1.96 * np.std([0, 100, 0, 0]) / 2)
    theirs = {"0": record("10")}  # fewer were asked
    assert experiments.compare(ours, theirs, "text to image", ("", ""))[0] == 50


def test_what_is_readable_is_compared_in_points():
    ours, theirs = ({"0": {"autoencoder": {"continuous": {"readable": share}}}}
                    for share in (0.75, 0.5))  # fmt: skip
    parts = "continuous", "continuous"
    assert experiments.compare(ours, theirs, "readable", parts)[0] == 25


def test_guidance_varies_over_an_image_and_begins_anew():
    class Head:
        def sample(self, hidden, weights, *rest, **more):
            return [round(w, 3) for w in weights.tolist()]

    head, hidden = Head(), torch.zeros(1, 2, 8)
    experiments.vary_guidance(head, 4, rises=True)
    drawn = [head.sample(hidden, (3.0, -2.0), 10) for _ in range(8)]
    assert drawn[:4] == drawn[4:] == [[1.5, -0.5], [2.5, -1.5], [3.5, -2.5], [4.5, -3.5]]
    head = Head()
    experiments.vary_guidance(head, 4, rises=False)
    assert [head.sample(hidden, (3.0, -2.0)) for _ in range(4)] == drawn[3::-1]


def test_an_autoencoder_is_compared_by_its_parts():
    """Of the arm what is continuous, of the other what is quantised; readable in points of 100."""
    figures = lambda v: {"psnr": v, "readable": v / 100}
    ours, theirs = ({"autoencoder": {"continuous": figures(v + 3), "quantised": figures(v)}}
                    for v in (31, 21))  # fmt: skip
    by = lambda figure: experiments.differences(ours, theirs, figure, ("continuous", "quantised"))
    assert by("psnr") == [13] and by("readable") == pytest.approx([13])


def test_figures_of_an_arm(monkeypatch, tmp_path):
    """A right and a wrong answer a table; two kinds of picture, one of them with an edge."""
    rises, pictures = [], [np.zeros((4, 4, 3), np.uint8) for _ in range(16)]
    for picture in pictures[::2]:
        picture[2:] = 100
    config = SimpleNamespace(latents_per_image=64)
    model = SimpleNamespace(config=config, image_head=None)
    judged = [evaluate.Verdict("count", [], "", right) for right in (True, False)]
    fakes = {"load": lambda source: SimpleNamespace(model=model), "run_task": lambda *a: judged,
             "generate": lambda *a, **o: [SimpleNamespace(images=[Image.fromarray(p)])
                                          for p in pictures],
             "vary_guidance": lambda head, n, way: rises.append((n, way)),
             "log_likelihood": lambda *a: -1.0}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(experiments, name, fake)
    source = SimpleNamespace(config={"model": {}})
    monkeypatch.setattr(experiments.checkpoint, "open_checkpoint", lambda run: source)
    for name in ("guidance rises", "guidance falls"):
        found = experiments.measure(name, tmp_path, 0, 2)
    assert rises == [(64, True), (64, False)]
    assert found["answers"] == {"text to image, count": "10", "understanding, count": "10"}
    assert found["sharpness"] == 50 and found["spread"] == 25


def test_seeds_that_disagree_widen_the_interval():
    ours = {"0": record("1" * 100), "1": record("0" * 100), "2": record("1" * 100)}
    theirs = {"0": record("0" * 100), "1": record("1" * 100)}
    mean, half, seeds = experiments.compare(ours, theirs, "text to image", ("", ""))
    assert seeds == ["0", "1"] and mean == 0
    assert half == pytest.approx(12.71 * np.std([100, -100], ddof=1) / np.sqrt(2))
    ours, theirs = ({seed: record(bits) for seed in "01"} for bits in ("1100", "1010"))
    half = experiments.compare(ours, theirs, "text to image", ("", ""))[1]  # where they agree
    assert half == pytest.approx(1.96 * np.std([0, 100, -100, 0]) / np.sqrt(8))


def test_a_verdict_is_never_stronger_than_its_interval():
    assert experiments.verdict(3.0, 2.0, ["0", "1"]) == "holds"
    assert experiments.verdict(-3.0, 2.0, ["0", "1"]) == "does not hold"
    assert experiments.verdict(1.0, 2.0, ["0", "1"]) == "cannot be told: 2 could have been seen"
    mean, half, seeds = experiments.compare({"0": record()}, {"0": record(sharpness=9.0)},
                                            "sharpness", ("", ""))  # fmt: skip
    assert mean == -8 and "one seed" in experiments.verdict(mean, half, seeds)


def test_every_arm_is_a_list_of_commands_that_parse():
    own = [arm for arm in experiments.ARMS.values() if isinstance(arm, list)]
    assert all(arm in own or arm in experiments.ARMS for arm in experiments.ARMS.values())
    for arm in [experiments.START, *own]:
        for line in arm:
            name, _, fields = line.partition(" ")
            fields = [*experiments.FLAGS.get(name, "").split(), *fields.split()]
            train.parse([name, "--out", "x", *fields])
    for e in experiments.EXPERIMENTS.values():
        assert {e.arm, *(other for other, _ in e.others)} <= experiments.ARMS.keys()


def test_arms_run_once_and_the_page_is_written_from_what_was_kept(
    monkeypatch, tmp_path, run_main
):
    for name in train.STAGES:
        monkeypatch.setitem(experiments.FLAGS, name, QUICK)
    brief = dataclasses.replace(stages.GENERATION, steps=2, max_tokens=40)
    monkeypatch.setattr(stages, "GENERATION", brief)  # hardly trained, it answers without end
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "experiments" / "results.json")
    page = "above\n" + experiments.BEGIN + "OUTDATED" + experiments.END
    (tmp_path / "RESULTS.md").write_text(page)
    flags = "--only", "language", "--seeds", "1", "--count", "8"
    code, _, said = run_main(experiments, *flags)
    assert code in (0, None), said
    results = json.loads(experiments.RESULTS.read_text())
    assert set(results) == {"stage 1 alone", "nothing"}
    base = tmp_path / "runs" / "stage 1 alone" / "0" / "base"
    assert checkpoint.read_json(base / "run.json")["config"]["seed"] == 0  # the preset's is 2
    lengths = [{row: len(bits) for row, bits in results[name]["0"]["answers"].items()}
               for name in results]  # fmt: skip
    assert lengths[0] == lengths[1] and sum(lengths[0].values()) == 18
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("above") and "OUTDATED" not in text and "| section 4.2 |" in text
    pipeline = experiments.load(tmp_path / "runs" / "start" / "chameleon")
    torch.nn.init.zeros_(pipeline.model.lm_head.weight)  # every word is as likely
    uniform = -math.log(pipeline.model.config.vocab_size)
    world = ShapesConfig(**train.WORLDS["nano"]["posttrain"][0][1])
    assert experiments.log_likelihood(pipeline, world, 0) == pytest.approx(uniform)
    assert uniform - 1 < results["nothing"]["0"]["log-likelihood"] < 0
    monkeypatch.setattr(train, "run", None)  # nothing is trained again
    kept = (tmp_path / "experiments" / "logs.jsonl.gz").read_bytes()
    runs = {json.loads(line)["run"] for line in gzip.decompress(kept).splitlines()}
    assert "start/chameleon" in runs and "stage 1 alone/0/base" in runs
    shutil.rmtree(tmp_path / "runs")  # nor are logs lost with their runs
    assert run_main(experiments, *flags)[0] in (0, None)
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert (tmp_path / "experiments" / "logs.jsonl.gz").read_bytes() == kept
