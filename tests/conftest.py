"""Lets tests import the files at the top and in lab/, and holds what several tests share."""

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are of the CPU; on_cuda.py is of a GPU
torch.set_num_threads(1)  # models are so small that a second thread would only wait
tqdm.set_lock(threading.RLock())  # its own is shared with forked children: killed, they keep it


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def close(got: Tensor, wanted: Tensor, atol: float = 1e-5, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got, wanted, atol=atol, rtol=rtol, check_dtype=False)


def grey_levels(a: Image.Image, b: Image.Image) -> int:
    """The largest difference between two pictures of one size."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded value that shows in the outputs: no norm stays the identity, no
    bias and no zero-initialised layer stays zero."""
    generator = seeded(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif p.ndim == 1 or "q_norm" in name or "k_norm" in name:
            value = 1 + 0.3 * noise
        elif "embed_tokens" in name or "codebook" in name or "quantize" in name:
            value = noise
        else:
            value = noise * p[0].numel() ** -0.5
        p.copy_(value)
    return module


class OwnHead(nn.Module):
    """An image head as a user may add one to HEADS: a latent is its noise, and what the guided
    hidden state adds."""

    def __init__(self, config, model):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.latent_channels)

    def loss(self, hidden, latents, generator=None):
        return nn.functional.mse_loss(self.out(hidden), latents)

    def sample(self, hidden, weights=(1.0,), steps=100, noise=None, generator=None):
        weights = torch.as_tensor(weights)
        return noise + (weights @ self.out(hidden)).detach()


def read_fixture(name: str) -> tuple[dict[str, Tensor], dict]:
    """-> tensors and config of a file that tests/make_fixtures.py recorded from a peer library."""
    with safe_open(ROOT / "tests" / "fixtures" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["config"])


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run a file's main() with arguments -> (exit code, stdout, stderr)."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, args)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def complaint(action) -> str:
    """The one-line message of the ValueError that action() must raise."""
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_json(path: Path, change) -> None:
    """Change what a JSON file holds, by a function of its content."""
    content = json.loads(path.read_text())
    change(content)
    path.unlink()  # it may be a link
    path.write_text(json.dumps(content))
