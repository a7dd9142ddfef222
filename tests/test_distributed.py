"""Two processes equal one: the losses of a run, and what is saved."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_train import SMALL, road, start_stage  # noqa: F401  (road is a fixture)

import train

SAME = ("loss", "text", "image", "grad_norm", "codes_mixed", "held_out_loss")


@pytest.fixture(scope="module")
def runs(road, tmp_path_factory):  # noqa: F811
    """Two steps in one process, and in two."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--init", str(road / "base"), "--micro-batches", "2", "--optimizer", "adamw"]
    flags += ["--validate-every", "1", "--save-every", "2"]
    start_stage("posttrain", folder / "one", *flags)
    code = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    code += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "lab.distributed"]
    code += ["posttrain", *SMALL, *flags, "--pictures-every", "0", "--out", str(folder / "two")]
    more = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, cwd=ROOT, env=more, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def logged(run) -> list[dict]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{key: line[key] for key in SAME} for line in lines]


def test_two_processes_see_the_losses_of_one(runs):
    for two, one in zip(logged(runs / "two"), logged(runs / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_save_of_two_goes_on_with_one(runs):
    states = [train.read_state(runs / name / "step-00000002") for name in ("one", "two")]
    for part in ("weights", "average"):
        for name, tensor in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], tensor, atol=1e-5, rtol=1e-4)
    train.main(["posttrain", "--out", str(runs / "two"), "--resume", "--steps", "4"])
    # the schedule of two steps was over, so that only the first steps can be compared
    assert [line["step"] for line in train.read_log(runs / "two" / "log.jsonl")] == [1, 2, 3, 4]
