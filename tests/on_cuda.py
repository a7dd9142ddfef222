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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint
import data
import plan
import sample
import train
from data import Segment
from orthus import Orthus
from vae import VQVAE

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
        return 1000 * statistics.median(b - a for a, b in zip(late, late[1:], strict=False))


def draw(pipeline: sample.Pipeline, count: int, as_graph: bool, **options):
    """`count` pictures at once -> latents (B, L, C), milliseconds a latent."""
    sample.record = record if as_graph else lambda work: work
    options = sample.Options(**options)
    requests = [sample.Request([Segment("a red circle")], seed) for seed in range(count)]
    rows = [sample.Row(pipeline, r, options, lambda _: None) for r in requests]
    bar = Bar()
    sample.decode(pipeline, rows, options, bar)
    return torch.stack([row.answer.latents[0] for row in rows]), bar.milliseconds()


def log_of(stage: str, folder: Path, device: str) -> list[dict]:
    """Three steps of a stage on the shipped model, in fp32 -> the lines of its log."""
    flags = f"{stage} --init {ROOT / 'checkpoints/tiny'} --out {folder / device} --device {device}"
    flags += " --steps 3 --dtype float32 --log-every 1 --batch-size 8 --micro-batches 1"
    flags += " --tasks understanding=1 --validate-every 3 --pictures-every 1"
    train.run(train.parse(flags.split()))
    return [json.loads(line) for line in (folder / device / "log.jsonl").read_text().splitlines()]


def check() -> None:
    """The shipped model."""
    tiny = ROOT / "checkpoints" / "tiny"
    there, here = (sample.load(tiny, device, torch.float32) for device in ("cuda", "cpu"))
    (plain, slow), (graph, fast) = (draw(there, 4, as_graph) for as_graph in (False, True))
    assert torch.equal(plain, graph), "a recorded latent is another than one that is not"
    print(f"recorded latents are the same to the bit; {slow / fast:.1f} times as fast")
    request = sample.Request([Segment("a red circle left of a blue square")], 0)
    (a,), (b,) = (sample.generate(p, [request], progress=False) for p in (there, here))
    gap = (data.to_tensor(a.images[0], 64) - data.to_tensor(b.images[0], 64)).abs().max() * 127.5
    assert gap < 3.5, f"a picture in fp32 is {gap:.0f} grey levels from the CPU's"
    print(f"a picture in fp32 is {gap:.0f} grey levels from the CPU's")
    head, calls = there.model.image_head, []
    heads_own = head.sample

    def strict(*args, **options):
        calls.append("error" if 0 < len(calls) < there.model.config.latents_per_image - 1 else 0)
        torch.cuda.set_sync_debug_mode(calls[-1])  # from now on whatever waits raises
        return heads_own(*args, **options)

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
    pipeline = sample.Pipeline(model, vae, tokenizer, sample.Generation(100, 5.0, image_first=True))
    length, model.config.latents_per_image = model.config.latents_per_image, 25  # as all others
    first = None
    for compiled in (False, True):
        if compiled:
            sample.compile_steps(model)
        for count, as_graph in ((1, False), (1, True), (8, True)):
            torch.cuda.reset_peak_memory_stats()
            began = time.time()
            latents, ms = draw(pipeline, count, as_graph, max_tokens=length + 60)
            first = latents if first is None else first
            gap = (latents[0] - first[0]).abs().max() / first.std()
            print(f"{'compiled' * compiled:9}{'recorded' * as_graph:9}{count} pictures at once: "
                  f"{ms:7.2f} ms a latent, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB; "
                  f"{time.time() - began:.0f} s; off by {gap:.1e}", flush=True)  # fmt: skip


def measure_training(name: str, preset: str, parts: int) -> None:
    given = dict(preset=preset, steps=3, micro_batches=parts, log_every=1, pictures_every=0,
                 validate_every=100, tasks={"text_to_image": 1.0}, workers=4)  # fmt: skip
    config, worlds, _ = train.settings(name, Path(), given, False)
    train.Validation.losses = lambda *_: {}  # a step is asked for here, and no save
    train.save = lambda *_: None
    dataset, held_out, _ = train.open_data(config, worlds, None)
    start = random_checkpoint(name, preset, ["a red circle"])
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.train(name, config, dataset, held_out, Path(folder), start, {})
        line = json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])
    print(f"{name} in {parts} parts: peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, "
          f"{line['examples_per_second']:.2f} examples, "
          f"{line['tokens_per_second']:.0f} tokens a second", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["tiny", "7b"], default="tiny")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if args.size == "tiny":
        return check()
    for name, parts in (("posttrain", 16), ("posttrain", 4), ("base", 8)):
        measure_training(name, args.size, parts)
        gc.collect()  # layers that compute again refer to themselves
        torch.cuda.empty_cache()
    measure_sampling(args.size)


if __name__ == "__main__":
    main()
