"""lab/experiments.py: arms run once, on the same examples; verdicts follow intervals."""

import json

import numpy as np
import pytest
import torch

import checkpoint
import train
from lab import evaluate, experiments


def record(images: str = "", text: str = "", **more) -> dict:
    answers = {"text to image, colours": images, "understanding, count": text}
    answers[f"text to image, {evaluate.UNSEEN}"] = "1111"
    return {"answers": answers, "sharpness": 1.0, "spread": 2.0, "minutes": 1.0} | more


def test_differences_are_paired_and_leave_the_unseen_out():
    ours, theirs = {"0": record("1101")}, {"0": record("1001")}
    mean, half, seeds = experiments.compare(ours, theirs, "text_to_image")
    assert mean == 25 and seeds == ["0"]
    assert half == pytest.approx(1.96 * np.std([0, 100, 0, 0]) / 2)
    theirs = {"0": record("10")}  # fewer were asked
    assert experiments.compare(ours, theirs, "text_to_image")[0] == 50


def test_an_autoencoder_is_compared_by_its_parts_in_points():
    runs = []
    for share in (0.75, 0.5):
        runs.append({"0": {"autoencoder": {"continuous": {"readable": share}}}})
    assert experiments.compare(*runs, "readable", ("continuous", "continuous"))[0] == 25


def test_seeds_that_disagree_widen_the_interval():
    ours = {seed: record(bits * 50) for seed, bits in zip("012", ("1", "0", "1"), strict=True)}
    theirs = {seed: record("0" * 50) for seed in "012"}
    mean, half, _ = experiments.compare(ours, theirs, "text_to_image")
    scatter = np.std([100, 0, 100], ddof=1) / np.sqrt(3)
    assert mean == pytest.approx(200 / 3) and half == pytest.approx(4.30 * scatter)


@pytest.mark.parametrize(
    "mean, half, seeds, said",
    [
        (3, 1, 3, "holds"),
        (-3, 1, 3, "does not hold"),
        (1, 3, 3, "cannot be told"),
        (9, 1, 1, "one"),
    ],
)
def test_a_verdict_is_never_stronger_than_its_interval(mean, half, seeds, said):
    assert said in experiments.verdict(mean, half, list("012"[:seeds]))


def test_guidance_varies_over_an_image_and_begins_anew():
    class Head(torch.nn.Module):
        def sample(self, hidden, weights, **more):
            return [round(w, 3) for w in weights]

    hidden, drawn = torch.zeros(1, 2, 8), {}
    for rises in (True, False):
        head = experiments.Varying(Head(), 4, rises)
        drawn[rises] = [head.sample(hidden, (3.0, -2.0), steps=10) for _ in range(8)]
    assert drawn[True][:4] == [[1.5, -0.5], [2.5, -1.5], [3.5, -2.5], [4.5, -3.5]]
    assert drawn[True][4:] == drawn[True][:4] and drawn[False][:4] == drawn[True][3::-1]


def test_every_arm_is_of_settings_that_its_stages_have(tmp_path):
    for arm in experiments.ARMS.values():
        for name, own in arm:
            brief = experiments.BRIEF if name == "posttrain" else {}
            train.settings_of(name, tmp_path, {"preset": "nano"} | brief | own, False)
    for e in experiments.EXPERIMENTS.values():
        assert {e.arm, *e.others} <= experiments.ARMS.keys()


def test_an_arm_runs_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran, few = [], {"steps": 1, "batch_size": 4, "workers": 0, "validate_every": 100}
    train_stage = train.train_stage
    monkeypatch.setattr(train, "train_stage", lambda *a: ran.append(a[0]) or train_stage(*a))
    arm = [("vae", few), ("decoder", few)]
    last = experiments.train_arm(tmp_path, arm, "", 1)
    assert ran == ["vae", "decoder"] and checkpoint.open_checkpoint(last).section("vae")
    assert experiments.train_arm(tmp_path, arm, "", 1) == last and len(ran) == 2


def test_the_page_is_what_the_kept_results_say(tmp_path, monkeypatch):
    """It is committed as `--only none` writes it, and keeps what stands around it."""
    page = experiments.DOCS / "results.md"
    results = json.loads((experiments.DOCS / "results.json").read_text())
    assert experiments.page(results).strip() in page.read_text()
    monkeypatch.setattr(experiments, "DOCS", tmp_path)
    begin, end = experiments.BEGIN, experiments.END
    (tmp_path / "results.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    experiments.write_page(results)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "table 6" in text
