"""What only a CUDA device can show; not a default test.

python tests/on_cuda.py            the shipped model: checks that stop at what is wrong
python tests/on_cuda.py --size 7b  random weights of the released size: what training takes and
                                   how fast it is, milliseconds a latent (wants 80 GB)
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import data
import sample
import train
from data import Segment
from lab import plan
from orthus import Orthus
from vae import VQVAE

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
record = sample.record


class Bar:
    """Times every latent instead of showing how many there are."""

    total = 0

    def __init__(self):
        self.times = []

    def update(self, _) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def clear(self) -> None:
        pass

    def milliseconds(self) -> float:
        """A latent's, without the first two: one warms up, in the other the graph is recorded."""
        late = self.times[2:]
        return 1000 * statistics.median(b - a for a, b in zip(late, late[1:]))


def draw(pipeline: sample.Pipeline, count: int, as_graph: bool, **settings):
    """`count` pictures at once -> latents (B, L, C), milliseconds a latent."""
    sample.record = record if as_graph else lambda work: work
    requests = [sample.Request([Segment("a red circle")], seed) for seed in range(count)]
    rows = [sample.Row(pipeline, request, settings) for request in requests]
    bar = Bar()
    sample.decode(pipeline, rows, bar)
    return torch.stack([row.answer.latents[0] for row in rows]), bar.milliseconds()


def log_of(stage: str, folder: Path, device: str) -> list[dict]:
    """Three steps of a stage on the shipped model, in fp32 -> the lines of its log."""
    flags = f"{stage} --init {TINY} --out {folder / device} --device {device} --steps 3"
    flags += " --dtype float32 --log-every 1 --batch-size 8 --micro-batches 1"
    flags += " --validate-every 3 --pictures-every 1 --data lab.shapes:tiny_tasks --data-args"
    train.main([*flags.split(), '{"tasks": {"understanding": 1}}'])
    return [json.loads(line) for line in (folder / device / "log.jsonl").read_text().splitlines()]


def check() -> None:
    """The shipped model."""
    there, here = (sample.load(TINY, device, torch.float32) for device in ("cuda", "cpu"))
    (plain, slow), (graph, fast) = (draw(there, 4, as_graph) for as_graph in (False, True))
    assert torch.equal(plain, graph), "a recorded latent is another than one that is not"
    print(f"recorded latents are the same to the bit; {slow / fast:.1f} times as fast")
    request = sample.Request([Segment("a red circle left of a blue square")], 0)
    (a,), (b,) = (sample.generate(p, [request], progress=False) for p in (there, here))
    gap = (data.to_tensor(a.images[0], 64) - data.to_tensor(b.images[0], 64)).abs().max() * 127.5
    assert gap < 3.5, f"a picture in fp32 is {gap:.0f} grey levels from the CPU's"
    print(f"a picture in fp32 is {gap:.0f} grey levels from the CPU's")
    head, calls = there.model.image_head, []
    head_sample = head.sample

    def strict(*args, **options):
        calls.append("error" if 0 < len(calls) < there.model.config.latents_per_image - 1 else 0)
        torch.cuda.set_sync_debug_mode(calls[-1])  # from now on whatever waits raises
        return head_sample(*args, **options)

    head.sample, update = strict, Bar.update
    Bar.update = lambda bar, _: bar.times.append(time.perf_counter())
    draw(there, 2, False)
    del head.sample
    Bar.update = update
    assert calls.count("error") == there.model.config.latents_per_image - 2
    print("nothing inside an image waits for the device")
    with tempfile.TemporaryDirectory() as folder:
        logs = [log_of("posttrain", Path(folder), device) for device in ("cpu", "cuda")]
    for a, b in zip(*logs, strict=True):
        assert abs(a["text"] - b["text"]) < 2e-4, "training loses other than on the CPU"
    print("losses of training in fp32: " + ", ".join(f"{line['text']:.5f}" for line in logs[1]))


def random_checkpoint(name: str, preset: str, texts: list[str]) -> checkpoint.Checkpoint:
    """What stage `name` starts from, its numbers drawn on the device."""
    source, rng = plan.blank(name, preset, texts), torch.Generator("cuda").manual_seed(0)

    def value(name: str, like: torch.Tensor) -> torch.Tensor:
        if "norm" in name or "_ln" in name:
            return torch.full(like.shape, float("weight" in name), dtype=like.dtype, device="cuda")
        empty = torch.empty(like.shape, dtype=like.dtype, device="cuda")
        return empty.normal_(0, 0.02, generator=rng)

    read = lambda part: {n: value(n, like) for n, like in source.read(part).items()}
    return dataclasses.replace(source, read=read)


def measure_sampling(preset: str) -> None:
    start = random_checkpoint("posttrain", preset, ["a red circle"])
    model = Orthus.from_pretrained(start, "cuda").requires_grad_(False)
    vae = VQVAE.from_pretrained(start, "cuda", torch.float32).requires_grad_(False)
    tokenizer = data.Tokenizer(start.tokenizer.read_bytes(), model.config)
    defaults = checkpoint.Generation(steps=100, cfg_scale=5.0, image_first=True)
    pipeline = sample.Pipeline(model, vae, tokenizer, defaults)
    length, model.config.latents_per_image = model.config.latents_per_image, 25  # as all others
    first = None
    for compiled in (False, True):
        if compiled:
            model.step = torch.compile(model.step)
            model.image_head.denoise = torch.compile(model.image_head.denoise)
        for count, as_graph in ((1, False), (1, True), (8, True)):
            torch.cuda.reset_peak_memory_stats()
            began = time.time()
            latents, ms = draw(pipeline, count, as_graph, max_tokens=length + 60)
            first = latents if first is None else first
            gap = (latents[0] - first[0]).abs().max() / first.std()
            kind = f"{'compiled' * compiled:9}{'recorded' * as_graph:9}{count} pictures at once"
            memory = (
                f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB; {time.time() - began:.0f} s"
            )
            print(f"{kind}: {ms:7.2f} ms a latent, {memory}; off by {gap:.1e}", flush=True)


def measure_training(name: str, preset: str, parts: int) -> None:
    given = dict(preset=preset, steps=3, micro_batches=parts, log_every=1, pictures_every=0)
    given |= dict(validate_every=100, workers=4, data="lab.shapes:tiny_pictures")
    settings, _ = train.settings_of(name, Path(), given, False)
    train.Validation.losses = lambda *_: {}  # a step is asked for here, and no save
    train.Trainer.save = lambda *_: None
    pictures, held_out = data.open_dataset(settings.data)
    start = random_checkpoint(name, preset, ["a red circle"])
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = Path(folder)
        train.Trainer(name, settings, pictures, held_out, run, start, {}, None).run()
        line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    memory = f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    speed = f"{line['examples_per_second']:.2f} examples, {line['tokens_per_second']:.0f} tokens"
    print(f"{name} in {parts} parts: {memory}, {speed} a second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["tiny", "7b"], default="tiny")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if args.size == "tiny":
        return check()
    for name, parts in (("posttrain", 16), ("posttrain", 4), ("base", 8)):
        measure_training(name, args.size, parts)
        gc.collect()
        torch.cuda.empty_cache()
    measure_sampling(args.size)


if __name__ == "__main__":
    main()
