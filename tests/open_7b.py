"""Opens a checkpoint of the released Orthus' size and prints what that costs; not a default test.

    python tests/open_7b.py [--dir DIR] [--layers 32] [--touch]

Writes a sparse bf16 checkpoint in the Hub's layout (14 GB in three shards, all numbers zero, so
that it takes no room on most disks), opens it, prints the peak resident size against what the
checkpoint holds, and deletes it. --touch reads every number after opening: then all is resident.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

FREE = 20 * 10**9  # bytes of disk, should the file system not know sparse files


def hub_shapes(layers: int) -> dict[str, list[int]]:
    """Names and shapes of Orthus-7B, as on the Hub."""
    with torch.device("meta"):
        model, vae = Orthus(OrthusConfig(num_hidden_layers=layers)), VQVAE(VQVAEConfig())
    shapes = {f"model.vqmodel.{name}": list(t.shape) for name, t in vae.state_dict().items()}
    for name, t in model.state_dict().items():
        for theirs, ours in checkpoint.HUB_TO_OURS.items():
            name = name.replace(ours, theirs)
        is_head = name.startswith(("mlp_head.", "lm_head."))
        shapes[name if is_head else f"model.{name}"] = list(t.shape)
    return shapes


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> int:
    """A safetensors file of bf16 zeros that the file system need not store -> bytes of tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def write_checkpoint(folder: Path, layers: int, shards: int = 3) -> int:
    shapes, files, held = hub_shapes(layers), {}, 0
    names = list(shapes)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        held += write_sparse(folder / file, {name: shapes[name] for name in part})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": held}, "weight_map": files}
    checkpoint.write_json(folder / "model.safetensors.index.json", index)
    ids = OrthusConfig()
    vocabulary = {names[0]: getattr(ids, field) for field, names in checkpoint.SPECIAL.items()}
    vocabulary |= {checkpoint.code_name(k): 4 + k for k in range(8192)}
    config = {"model_type": "chameleon", "num_hidden_layers": layers, "vocabulary_map": vocabulary}
    checkpoint.write_json(folder / "config.json", config)
    return held


def resident() -> float:
    """GB, the peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=None, help="where to write (default: the temp directory)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--touch", action="store_true", help="read every number after opening")
    args = parser.parse_args()
    free = shutil.disk_usage(args.dir or tempfile.gettempdir()).free
    if free < FREE:
        print(f"skipped: {free / 1e9:.0f} GB of disk are free, {FREE / 1e9:.0f} are wanted")
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        held = write_checkpoint(Path(folder), args.layers) / 1e9
        before, started = resident(), time.time()
        model, vae = Orthus.from_pretrained(folder), VQVAE.from_pretrained(folder)
        took = f"holds {held:.2f} GB, opened in {time.time() - started:.2f} s"
        print(f"{took}; peak resident {resident():.2f} GB, {before:.2f} GB of it before")
        if args.touch:
            for part in (model, vae):
                assert not any(bool(p.view(torch.int16).any()) for p in part.parameters())
            print(f"every number read in {time.time() - started:.2f} s; peak {resident():.2f} GB")
        assert resident() <= 1.1 * held + before, "opening cost more than the checkpoint holds"


if __name__ == "__main__":
    main()
