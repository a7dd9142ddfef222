"""Training on several devices: FSDP2 as a subclass of train.Trainer, whose loop knows one process.

    torchrun --nproc-per-node N -m lab.distributed posttrain --init DIR --out DIR --micro-batches N

Each process holds its share of what is trained and takes its share of a batch's parts: N processes
see the losses of one. What is saved is whole, so a run of two goes on with one, and its saves are
ordinary checkpoints. Tried on CPU processes (gloo) alone.
"""

import contextlib
import datetime
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import checkpoint
import train


def join() -> None:
    """The processes that torchrun started. The first alone prints, locks and writes."""
    if not dist.is_torchelastic_launched():
        raise ValueError("start it with torchrun --nproc-per-node N -m lab.distributed STAGE ...")
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() > local:
        torch.cuda.set_device(local)
    dist.init_process_group(timeout=datetime.timedelta(days=1))
    dist.barrier()  # an error of one must not look like another's lost connection
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"
        checkpoint.lock = lambda directory: contextlib.nullcontext()
        checkpoint.write_json = lambda path, content: None


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, or of this process's shard of it where `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device, copy=True)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def gathered(value):
    """A state with its sharded tensors whole again, in the first process's ordinary memory. Not by
    torch.distributed.checkpoint: it reads its files with pickle, which runs what they say."""
    if isinstance(value, dict):
        return {k: gathered(v) for k, v in value.items()}
    if isinstance(value, list):
        return [gathered(v) for v in value]
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()  # all processes have to take part
        return None if dist.get_rank() else value.cpu()
    return value


class Sharded(train.Trainer):
    """One of several processes that train together."""

    def prepare(self) -> None:
        """A layer is whole only while it computes; the rest longer, as heads follow forward."""
        parts, ranks = self.settings.micro_batches, dist.get_world_size()
        if parts % ranks:
            raise ValueError(f"micro_batches is {parts}; want a multiple of the {ranks} processes")
        mesh = dist.init_device_mesh(self.device.type, (ranks,))
        for part in (*self.model.layers, self.model):
            fully_shard(part, mesh=mesh, reshard_after_forward=part is not self.model)
        dist.barrier()  # all have looked at the folder before the first one writes into it

    def restore(self, state: dict, saved: Path) -> None:
        weights, learns = self.model.state_dict(), list(self.average.values())
        state["weights"] = {n: shard_like(t, weights[n]) for n, t in state["weights"].items()}
        state["average"] = {n: shard_like(state["average"][n], p) for n, p in self.average.items()}
        groups = self.optimizer.param_groups
        learns = [p for group in groups for p in group["params"]]
        for i, moments in state["optimizer"]["state"].items():
            for name, moment in moments.items():
                if moment.ndim:  # Adam's count of steps is a scalar
                    moments[name] = shard_like(moment, learns[i])
        super().restore(state, saved)

    def accumulate(self, batch: list, step: int) -> dict[str, Tensor]:
        """This process's share of the parts. All must compute as often, or they would wait for each
        other: where the parts do not divide, one is computed again and counts for nothing."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        sums, generator = {}, torch.Generator(self.device)
        for number in range(rank, math.ceil(len(batch) / ranks) * ranks, ranks):
            there = number < len(batch)
            generator.manual_seed(train.noise_seed(self.settings.seed, step, number))
            with self.autocast:
                losses = self.stage.losses(batch[number if there else 0], step, generator)
            # FSDP averages gradients, where they are to add up, and wants all of them from all
            # processes, also where a part holds no image, or no text
            rest = (p for p in self.model.parameters() if p.requires_grad)
            none = 0 * sum(p.sum() for p in rest if not hasattr(p, "full_tensor"))
            (ranks * there * losses["loss"] + none).backward()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0) + there * value.detach()
        names = sorted(sums)
        values = torch.stack([sums[name].float().cpu() for name in names])
        dist.all_reduce(values)
        return dict(zip(names, values))

    def update(self, step: int) -> Tensor:
        return super().update(step).full_tensor()

    def stop(self) -> bool:
        """All stop at the same step."""
        stopping = torch.tensor(float(self.stopping))
        dist.all_reduce(stopping)
        return bool(stopping)

    def save(self, step: int) -> None:
        state = gathered(self.state(step))
        if dist.get_rank() == 0:
            self.write_save(step, state)
        dist.barrier()

    def run(self) -> bool:
        if dist.get_rank():
            self.log.path = Path(os.devnull)
        self.settings.pictures_every = 0  # the first process alone cannot compute
        return super().run()


def run(args) -> None:
    join()
    if args.stage in ("vae", "decoder", "all") or args.compile:
        raise ValueError(f"stage {args.stage} or --compile trains in one process: use train.py")
    train.run(args, Sharded)
    dist.barrier()  # without it the last one may find the others gone, and abort
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    train.keep_memory()
    args = train.parse_args(argv)
    checkpoint.command_line(lambda: run(args))


if __name__ == "__main__":
    main()
