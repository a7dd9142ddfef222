"""lab/experiments.py: arms run once, on the same examples; verdicts follow intervals."""

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

import checkpoint
import data
import orthus
import stages
import train
import vae
from lab import evaluate, experiments
from lab.experiments import compare, verdict
from lab.shapes import nano_tasks

CODES = "continuous", "quantised"


def record(images: str = "", text: str = "", **more) -> dict:
    answers = {"text to image, colours": images, "understanding, count": text}
    answers[f"text to image, {evaluate.UNSEEN}"] = "1111"
    return {"answers": answers, "sharpness": 1.0, "spread": 2.0, "minutes": 1.0} | more


def test_differences_are_paired_and_leave_the_unseen_out():
    ours, theirs = {"0": record("1101")}, {"0": record("1001")}
    mean, half, seeds = compare(ours, theirs, "text_to_image")
    assert mean == 25 and seeds == ["0"]
    assert half == pytest.approx(1.96 * np.std([0, 100, 0, 0]) / 2)
    theirs = {"0": record("10")}  # fewer were asked
    assert compare(ours, theirs, "text_to_image")[0] == 50


def test_an_autoencoder_is_compared_by_its_parts():
    """Of the arm what is continuous, of the other what is quantised; readable in points of 100."""
    figures = lambda v: {"psnr": v, "readable": v / 100}
    parts = lambda v: {"continuous": figures(v + 3), "quantised": figures(v)}
    ours, theirs = ({"autoencoder": parts(v)} for v in (31, 21))
    by = lambda figure: experiments.differences(ours, theirs, figure, CODES)
    assert by("psnr") == [13] and by("readable") == pytest.approx([13])


def test_seeds_that_disagree_widen_the_interval():
    ours = {"0": record("1" * 100), "1": record("0" * 100), "2": record("1" * 100)}
    theirs = {"0": record("0" * 100), "1": record("1" * 100)}
    mean, half, seeds = compare(ours, theirs, "text_to_image")
    assert seeds == ["0", "1"] and mean == 0
    assert half == pytest.approx(12.71 * np.std([100, -100], ddof=1) / np.sqrt(2))
    ours, theirs = ({seed: record(bits) for seed in "01"} for bits in ("1100", "1010"))
    half = compare(ours, theirs, "text_to_image")[1]  # where they agree
    assert half == pytest.approx(1.96 * np.std([0, 100, -100, 0]) / np.sqrt(8))


def test_a_verdict_is_never_stronger_than_its_interval():
    assert verdict(3.0, 2.0, ["0", "1"]) == "holds"
    assert verdict(-3.0, 2.0, ["0", "1"]) == "does not hold"
    assert verdict(1.0, 2.0, ["0", "1"]) == "cannot be told: 2 could have been seen"
    mean, half, seeds = compare({"0": record()}, {"0": record(sharpness=9.0)}, "sharpness")
    assert mean == -8 and "one seed" in verdict(mean, half, seeds)


def test_guidance_varies_over_an_image_and_begins_anew():
    head = torch.nn.Module()
    head.sample = lambda hidden, weights, steps: [round(w, 3) for w in weights]
    rising = experiments.Varying(head, 4, rises=True)
    drawn = [rising.sample(None, (3.0, -2.0), steps=10) for _ in range(8)]
    assert drawn[:4] == drawn[4:] == [[1.5, -0.5], [2.5, -1.5], [3.5, -2.5], [4.5, -3.5]]
    falling = experiments.Varying(head, 4, rises=False)
    assert [falling.sample(None, (3.0, -2.0), steps=10) for _ in range(4)] == drawn[3::-1]


def test_figures_of_an_arm(monkeypatch, tmp_path):
    """A right and a wrong answer a table; two kinds of picture, one of them with an edge."""
    pictures = [np.zeros((4, 4, 3), np.uint8) for _ in range(16)]
    for picture in pictures[::2]:
        picture[2:] = 100
    drawn = [SimpleNamespace(images=[Image.fromarray(picture)]) for picture in pictures]
    judged = [evaluate.Verdict("count", [], "", right) for right in (True, False)]
    config, head = SimpleNamespace(latents_per_image=4), torch.nn.Module()
    model = SimpleNamespace(config=config, image_head=head)
    fakes = {"load": lambda source: SimpleNamespace(model=model)}
    fakes |= {"run_task": lambda *_: judged, "generate": lambda *_, **more: drawn}
    fakes["log_likelihood"] = lambda *_: -1.0
    for name, fake in fakes.items():
        monkeypatch.setattr(experiments, name, fake)
    source = SimpleNamespace(config={"model": {}})
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda run: source)
    found = experiments.measure("guidance falls", tmp_path, 0, 2)
    assert model.image_head.head is head and next(model.image_head.factors) == 1.75
    assert found["answers"] == {"text to image, count": "10", "understanding, count": "10"}
    assert found["sharpness"] == 50 and found["spread"] == 25


def test_every_arm_is_a_list_of_stages_with_settings_that_they_have():
    for arm in [experiments.START, *experiments.ARMS.values()]:
        for name, own in arm:
            own = experiments.BRIEF | own if name == "posttrain" else own
            checkpoint.check(stages.STAGES[name].Settings, own)
            nano_tasks(**json.loads(own.get("data_args", "{}")))
    for e in experiments.EXPERIMENTS.values():
        assert {e.arm, *e.others} <= experiments.ARMS.keys()


def test_arms_run_once_and_the_page_is_written_from_what_was_kept(monkeypatch, tmp_path, run_main):
    quick = {"steps": 2, "batch_size": 4, "workers": 0, "pictures_every": 0}
    for name, preset in stages.PRESETS["nano"].items():
        known = {f.name for f in dataclasses.fields(stages.STAGES[name].Settings)}
        own = {key: value for key, value in quick.items() if key in known}
        monkeypatch.setitem(stages.PRESETS["nano"], name, preset | own)
    small = dict(num_hidden_layers=1, hidden_size=64, head_width=32, intermediate_size=64)
    monkeypatch.setitem(orthus.PRESETS, "nano", orthus.NANO | small)
    monkeypatch.setitem(vae.PRESETS, "nano", vae.NANO | dict(base_channels=8))
    texts_of = data.texts_of
    monkeypatch.setattr(data, "texts_of", lambda dataset, most=0: texts_of(dataset, 300))
    brief = {"steps": 2, "max_tokens": 40}  # hardly trained, it answers without end
    monkeypatch.setattr(stages, "GENERATION", stages.GENERATION | brief)
    monkeypatch.setattr(experiments, "DOCS", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    page = tmp_path / "results.md"
    page.write_text("above\n" + experiments.BEGIN + "OUTDATED" + experiments.END)
    flags = "--only", "language", "--seeds", "1", "--count", "8"
    code, _, said = run_main(experiments, *flags)
    assert code == 0, said
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"stage 1 alone", "nothing"}
    base = checkpoint.read_json(tmp_path / "runs" / "stage 1 alone" / "0" / "base" / "run.json")
    assert base["settings"]["seed"] == 0  # the preset's is 2
    answers = [results[name]["0"]["answers"] for name in results]
    lengths = [{row: len(bits) for row, bits in rows.items()} for rows in answers]
    assert lengths[0] == lengths[1] and sum(lengths[0].values()) == 18
    text = page.read_text()
    assert text.startswith("above") and "OUTDATED" not in text and "| section 4.2 |" in text
    pipeline = experiments.load(tmp_path / "runs" / "start" / "chameleon")
    torch.nn.init.zeros_(pipeline.model.lm_head.weight)  # every word is as likely
    uniform = -math.log(pipeline.model.config.vocab_size)
    likelihood = experiments.log_likelihood(pipeline, nano_tasks().config, 0)
    assert likelihood == pytest.approx(uniform)
    assert uniform - 1 < results["nothing"]["0"]["log-likelihood"] < 0
    monkeypatch.setattr(train, "train_stage", None)  # nothing is trained again
    kept = (tmp_path / "logs.jsonl.gz").read_bytes()
    runs = {json.loads(line)["run"] for line in gzip.decompress(kept).splitlines()}
    assert "start/chameleon" in runs and "stage 1 alone/0/base" in runs
    shutil.rmtree(tmp_path / "runs")  # nor are logs lost with their runs
    assert run_main(experiments, *flags)[0] == 0
    assert page.read_text() == text and (tmp_path / "logs.jsonl.gz").read_bytes() == kept
