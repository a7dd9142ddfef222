"""A dataset's images encoded ahead, once: training then reads latents and encodes nothing.

    python -m lab.encode SPEC FOLDER --init DIR [--data-args JSON] [--count N]
    python train.py posttrain --data lab.encode:encoded --data-args '{"folder": "FOLDER"}' ..

It takes the autoencoder of the checkpoint --init; what is trained must have the same. 64 examples
are a file, so that what was encoded before an interruption is kept.
"""

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
from data import Segment
from vae import VQVAE

SIZE = 64  # examples a file


class Encoded(list):
    """Examples whose images are latents (L, C), memory-mapped."""

    def example(self, index: int) -> list[Segment]:
        return self[index % len(self)]


def encoded(folder: str) -> Encoded:
    """What `python -m lab.encode` wrote, as a dataset."""
    paths, examples = sorted(Path(folder).glob("*.pt")), Encoded()
    if not paths:
        raise ValueError(f"{folder} holds no encoded examples; python -m lab.encode writes them")
    for path in paths:
        texts, latents = torch.load(path, mmap=True, weights_only=True)
        images = iter(latents)
        for segments in texts:
            content = [(next(images) if text is None else text, out) for text, out in segments]
            examples.append([Segment(*pair) for pair in content])
    return examples


@torch.no_grad()
def encode_some(examples: list[list[Segment]], vae: VQVAE) -> tuple[list, torch.Tensor]:
    """-> [[(text, or None for an image, is output)]], and the images' latents (N, L, C)."""
    size = vae.config.resolution
    images = [data.to_tensor(s.content, size) for some in examples for s in some if s.is_image]
    device, parts = vae.post_quant_conv.weight.device, [torch.zeros(0, 1, 1)]
    for i in range(0, len(images), 4):  # few at once: one of 512 pixels takes 0.7 GB
        parts.append(vae.encode(torch.stack(images[i : i + 4]).to(device)).cpu())
    texts = []
    for segments in examples:
        texts.append([(None if s.is_image else s.content, s.output) for s in segments])
    return texts, torch.cat(parts[1:] or parts)


def run(args) -> None:
    folder, source = Path(args.folder), checkpoint.open_checkpoint(args.init)
    vae = VQVAE.from_pretrained(source, checkpoint.pick_device(args.device), torch.float32)
    data_args = checkpoint.parse_json(args.data_args, "--data-args")
    dataset, _ = data.open_dataset(args.spec, data_args, args.seed, args.count)
    count = args.count or (len(dataset) if hasattr(dataset, "__len__") else 0)
    if not count:
        raise ValueError(f"{args.spec} is endless; say with --count how many examples to encode")
    first = (
        data.says(dataset.example(0)) + str(sum(p.sum().item() for p in vae.parameters())).encode()
    )
    what = {"spec": args.spec, "args": data_args, "seed": args.seed}
    what |= {"fingerprint": hashlib.sha256(first).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "what.json"
    if known.is_file() and checkpoint.read_json(known) != what:
        raise ValueError(f"{folder} holds other data, or another autoencoder's; give another")
    checkpoint.write_json(known, what)
    for start in tqdm(range(0, count, SIZE), "encoding", unit="file"):
        path = folder / f"{start:08d}.pt"
        if not path.is_file():
            numbers = range(start, min(start + SIZE, count))
            some = [data.read_images(dataset.example(i), vae.config.resolution) for i in numbers]
            with checkpoint.whole_file(path) as file:
                torch.save(encode_some(some, vae), file)
    print(f"{folder}: {count} examples; --data lab.encode:encoded with its folder in --data-args")


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint.Parser(description=__doc__.split("\n")[0])
    number = checkpoint.number
    parser.add_argument("spec", metavar="SPEC", help="what to encode, as --data of train.py")
    parser.add_argument("folder", metavar="FOLDER", help="where latents go")
    parser.add_argument("--init", required=True, metavar="DIR", help="its autoencoder encodes")
    parser.add_argument("--data-args", default="{}", metavar="JSON")
    parser.add_argument("--count", type=number(int, 1, 10**9), help="examples (default: all)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(argv)
    checkpoint.command_line(lambda: run(args), f"interrupted; {args.folder} keeps what is whole")


if __name__ == "__main__":
    main()
