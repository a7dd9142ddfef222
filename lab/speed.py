"""How fast the fast paths are, each beside its slow reference.

    python -m lab.speed [CHECKPOINT] [--rounds 5] [--large]

Prints the fastest of so many runs of both, their ratio, and how far their results are apart. Two
rows compare with the least that could be: a picture, from the start of the process, with importing
PyTorch; a large latent (--large) with the bare products of its weights.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
from data import Segment, to_tensor
from orthus import DiffusionHead, KVCache, Orthus, OrthusConfig
from sample import Request, generate, load

WEIGHTS = 3.0, -2.0  # guidance of two contexts
LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "head_width": 1536}


def reread(model: Orthus, tokens: Tensor, latents: Tensor) -> Tensor:
    """Hidden states (L, D) of an image after tokens (1, T), all read again for each latent."""
    mark, hidden = torch.full_like(tokens[:, :1], model.config.image_id), []
    for n in range(1, len(latents) + 1):
        row = torch.cat([tokens, mark.expand(1, n)], 1)
        hidden.append(model(row, latents[:n])[0, -1])
    return torch.stack(hidden)


def read_once(model: Orthus, tokens: Tensor, latents: Tensor) -> Tensor:
    """The same with a cache, as sampling does it."""
    weight, length = model.norm.weight, tokens.shape[1] + len(latents)
    cache = KVCache(model.config, 1, length, weight.device, weight.dtype)
    model(tokens, latents[:0], cache)
    embedded = model.vision_embedding(latents).to(weight.dtype)  # (L, D)
    return torch.cat([model.step(x[None], cache) for x in embedded])


class Operators(TorchDispatchMode):
    """Counts dispatched operators that are not views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def one_latent(device="cpu", **sizes) -> tuple[Orthus, Callable, Callable]:
    """A model of 8 layers, and what a guided latent needs: 100 steps of its head, and its own step
    of the transformer."""
    model = Orthus(OrthusConfig.preset("tiny", num_hidden_layers=8, **sizes)).to(device)
    width, channels = model.config.hidden_size, model.config.latent_channels
    cache, x = KVCache(model.config, 2, 400, device), torch.randn(2, width, device=device)
    hidden, noise = torch.randn(1, 2, width, device=device), torch.randn(1, channels, device=device)
    draw = lambda: model.image_head.sample(hidden, WEIGHTS, 100, noise)
    return model, draw, lambda: model.step(x, cache)


def operators(run: Callable) -> int:
    run()  # once before, for what is made once
    with Operators() as counted:
        run()
    return counted.count


def products(model: Orthus, steps: int = 100) -> list[tuple[Tensor, Tensor]]:
    """Inputs and weights of the products that a latent under two contexts cannot do without: AdaLN
    and what goes into it once for all steps, the rest of the head in each, the layers once."""
    found = []
    for name, module in [*model.image_head.named_modules(), *model.layers.named_modules()]:
        if isinstance(module, nn.Linear):
            rows, times = 2, 1
            if "adaLN" in name or "time_embed" in name:
                rows = steps * (2 if "adaLN" in name else 1)
            elif name.startswith(("input_proj", "res_blocks", "final_layer")):
                rows, times = (1 if name == "input_proj" else 2), steps
            found += [(torch.randn(rows, module.in_features), module.weight)] * times
    return found


def race(rounds: int, *runs: Callable) -> list[float]:
    """Seconds of the fastest of so many runs of each, taken in turns."""
    times = [[timeit.timeit(run, number=1) for run in runs] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def show(name: str, a: float, b: float, ratio: float, more: str = "") -> None:
    print(f"{name:48}{a:9.4f}{b:9.4f}{ratio:8.2f}{more}")


def show_pair(rounds: int, name: str, slow: Callable, fast: Callable) -> None:
    a, b = race(rounds, lambda: slow().cpu(), lambda: fast().cpu())  # .cpu() waits for the device
    gap = (slow() - fast()).abs().max().item()
    show(name, a, b, a / b, f"{gap:12.1e}")


def show_start(rounds: int, directory: str) -> None:
    """Of a process that imports PyTorch, and of one that draws a picture."""
    with tempfile.TemporaryDirectory() as folder:
        drawing = ["sample.py", "--prompt", "a red circle", "--checkpoint", directory]
        runs = []
        for command in (["-c", "import torch"], [*drawing, "--output", folder]):
            command = [sys.executable, *command]
            runs.append(functools.partial(subprocess.run, command, check=True, capture_output=True))
        a, b = race(rounds, *runs)
    show("import torch, and process start to a picture", a, b, b / a)


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    pipeline = load(args.checkpoint, checkpoint.pick_device(args.device))
    model, config, head = pipeline.model, pipeline.model.config, pipeline.model.image_head
    if not isinstance(head, DiffusionHead):
        raise ValueError(f"{args.checkpoint} has no diffusion head to measure; give an Orthus")
    weight, rng = head.input_proj.weight, torch.Generator().manual_seed(0)
    length, channels = config.latents_per_image, config.latent_channels
    hidden = torch.randn(1, 2, config.hidden_size, generator=rng).to(weight)
    latents = torch.randn(length, channels, generator=rng).to(weight.device)
    tokens = torch.tensor([[config.bos_id, config.sep_id, config.boi_id]], device=weight.device)
    requests = [Request([Segment("a red circle")], seed) for seed in range(16)]

    def pictures(batch_size: int) -> Tensor:
        answers = generate(pipeline, requests, batch_size=batch_size, progress=False)
        size = pipeline.vae.config.resolution
        return torch.stack([to_tensor(answer.images[0], size) for answer in answers])

    drawn, read = (hidden, WEIGHTS, 100, latents[:1]), (model, tokens, latents)
    compare = functools.partial(show_pair, args.rounds)
    print(f"{'':48}{'slow s':>9}{'fast s':>9}{'ratio':>8}{'difference':>12}")
    name = "100 DDIM steps, modulations ahead of the loop"
    compare(name, lambda: head.sample_naive(*drawn), lambda: head.sample(*drawn))
    name = f"{length} latents with the cache"
    compare(name, lambda: reread(*read), lambda: read_once(*read))
    compare("16 pictures, 4 in a batch", lambda: pictures(1), lambda: pictures(4))
    compare("16 pictures, 16 in a batch", lambda: pictures(1), lambda: pictures(16))
    show_start(args.rounds, args.checkpoint)
    in_head, in_layers = map(operators, one_latent()[1:])
    print(f"{'operators of a latent: head, 8 layers':48}{in_head:9}{in_layers:9}")
    if args.large:
        model, draw, step = one_latent(**LARGE)
        bare = products(model)
        a, b = race(
            args.rounds, lambda: [F.linear(*pair) for pair in bare], lambda: (draw(), step())
        )
        show("bare products, and a latent of width 1536", a, b, b / a)


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(description=__doc__.split("\n")[0])
    add, whole = parser.add_argument, checkpoint.number(int, 1, 1000)
    add("checkpoint", nargs="?", default="checkpoints/tiny", help="default: checkpoints/tiny")
    add("--rounds", type=whole, default=5, metavar="N", help="runs of each (default: 5)")
    add("--large", action="store_true", help="a latent of width 1536 too, which takes seconds")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    args = parser.parse_args(argv)
    checkpoint.command_line(lambda: run(args))


if __name__ == "__main__":
    main()
