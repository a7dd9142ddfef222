"""lab/speed.py: fast paths are no other than their slow references, and what they are made of."""

import torch
from conftest import ROOT
from PIL import Image

from data import Segment
from lab import speed
from sample import Answer


def test_fast_paths_change_nothing(run_main, monkeypatch):
    """What takes long, pictures and processes, is replaced."""
    black = Segment(Image.new("RGB", (64, 64)), True)
    blank = lambda _, requests, **settings: [Answer([black]) for _ in requests]
    monkeypatch.setattr(speed, "generate", blank)
    monkeypatch.setattr(speed.subprocess, "run", lambda command, **options: None)
    monkeypatch.setattr(speed, "LARGE", {})
    flags = ROOT / "checkpoints" / "tiny", "--rounds", 1, "--device", "cpu", "--large"
    code, out, _ = run_main(speed, *flags)
    rows = out.splitlines()
    assert code == 0 and len(rows) == 8
    assert all(float(row.split()[-1]) < 1e-3 for row in rows[1:5])


@torch.inference_mode()
def test_a_latent_takes_few_operators_and_reads_no_weight_more_than_it_must():
    model, draw, step = speed.one_latent()
    assert 1000 < speed.operators(draw) <= 3800 and 100 < speed.operators(step) <= 400
    rows, bare = {}, {}
    count = lambda module, x: rows.setdefault(module.weight, []).append(x[0].shape[:-1].numel())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    draw(), step()
    for x, weight in speed.products(model):
        bare.setdefault(weight, []).append(len(x))
    assert rows == bare
