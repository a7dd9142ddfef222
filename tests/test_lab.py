"""The small tools of the lab: a stage's plan, latents encoded ahead, curves."""

import pytest
import torch
from conftest import close, complaint
from test_train import SMALL, log_of, road, start_stage  # noqa: F401  (road is a fixture)

import checkpoint
import data
import stages
from lab import encode, plan, plots
from orthus import Orthus, OrthusConfig
from vae import VQVAE


# --- The plan of a stage -------------------------------------------------------------------------


def figures(name: str, **more) -> dict:
    settings = checkpoint.build(stages.STAGES[name].Settings, more | {"preset": "nano"}, name)
    dataset, _ = data.open_dataset("lab.shapes:nano_tasks")
    return plan.figures(name, settings, dataset, plan.blank(name, "nano", ["a red circle"] * 9))


def test_a_plan_counts_parameters_and_what_they_need():
    found = figures("posttrain", batch_size=4, dtype="float32")
    with torch.device("meta"):
        count = sum(p.numel() for p in Orthus(OrthusConfig.preset("nano")).parameters())
    assert (found["trained"], found["frozen"]) == (count, 0)
    memory = found["memory"]
    assert memory["gradients"] == memory["average"] == 4 * count
    assert memory["optimiser"] == pytest.approx(8 * count, rel=0.01)
    assert found["peak"] == sum(memory.values())
    low = figures("posttrain", batch_size=4, dtype="bfloat16", lora_rank=2)
    assert low["trained"] < 0.7 * count and low["memory"]["optimiser"] < memory["optimiser"]


def test_more_parts_and_activations_computed_again_need_less():
    peaks = []
    for more in ({}, {"micro_batches": 4}, {"micro_batches": 4, "checkpoint_activations": True}):
        found = figures("posttrain", batch_size=8, dtype="float32", **more)
        peaks.append(found["memory"]["activations"])
    assert peaks[0] > 1.5 * peaks[1] > 1.5 * peaks[2]


def test_a_plan_is_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan.main(["base", "--preset", "nano", "--batch-size", "2", "--dtype", "float32"])
    assert "parameters, trained" in capsys.readouterr().out and not list(tmp_path.iterdir())


# --- Latents ahead -------------------------------------------------------------------------------


def test_latents_ahead_are_those_that_training_would_encode(road, tmp_path, capsys):  # noqa: F811
    out = str(tmp_path / "ahead")
    flags = ["--init", str(road / "base"), "--count", "70", "--device", "cpu"]
    encode.main(["lab.shapes:nano_tasks", out, *flags])
    dataset, (plain, _) = encode.encoded(out), data.open_dataset("lab.shapes:nano_tasks")
    vae = VQVAE.from_pretrained(road / "base")
    assert len(dataset) == 70
    for index in (0, 69):
        ahead, direct = dataset.example(index), plain.example(index)
        assert [s.output for s in ahead] == [s.output for s in direct]
        for a, b in zip(ahead, direct):
            if b.is_image:
                latents = vae.encode(data.to_tensor(b.content, 32)[None])[0]
                close(a.content, latents.detach(), atol=1e-4)
            else:
                assert a.content == b.content
    args = f'{{"folder": "{out}"}}'
    more = ["--data", "lab.encode:encoded", "--data-args", args, "--steps", "1"]
    start_stage("posttrain", tmp_path / "run", "--init", road / "base", *more)
    assert log_of(tmp_path / "run")[-1]["image"] > 0


def test_a_folder_of_other_latents_is_not_gone_on_with(road, tmp_path, capsys):  # noqa: F811
    out, flags = str(tmp_path / "ahead"), ["--count", "2", "--device", "cpu"]
    encode.main(["lab.shapes:nano_tasks", out, "--init", str(road / "base"), *flags])
    with pytest.raises(SystemExit):
        encode.main(["lab.shapes:nano_tasks", out, "--init", str(road / "vae"), *flags])
    assert out in capsys.readouterr().err
    assert "encoded" in complaint(lambda: encode.encoded(str(tmp_path)))


# --- Curves --------------------------------------------------------------------------------------


def test_curves_are_of_every_run_in_a_folder(road, tmp_path, capsys):  # noqa: F811
    logs = plots.find_logs([str(road)])
    assert [name.rpartition("/")[2] for name in logs] == sorted(stages.STAGES)
    steps, values = plots.points(logs[str(road / "base")], "image")
    assert steps == [1, 2, 3, 4] and all(value > 0 for value in values)
    assert plots.points(logs[str(road / "base")], "text") == ([], [])  # it has none
    assert "log.jsonl" in complaint(lambda: plots.find_logs([str(tmp_path)]))
    pytest.importorskip("matplotlib")
    plots.main([str(road), "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").stat().st_size > 5000
