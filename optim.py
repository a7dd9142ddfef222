"""What train.py trains with: the machine, the processes on it, the optimisers.

    choose_machine      device and dtype of the products
    join, shard, ..     torchrun's processes: FSDP2, whose state is saved whole
    Muon                AdamW, but for inner matrices, whose momentum is orthogonalised
    update_average      the weight average
    contents            what of all this is saved
"""

import contextlib
import ctypes
import datetime
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import lora
from stages import Stage, TrainConfig

# --- The machine ---------------------------------------------------------------------------------


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 products natively; elsewhere they are many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    natively = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and natively


def dtype_name(config: TrainConfig, device: torch.device) -> str:
    known = {True: "bfloat16", False: "float32"}
    return config.dtype if config.dtype != "auto" else known[has_fast_bf16(device)]


def choose_machine(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the products; one line says which and why."""
    device = checkpoint.pick_device(config.device)
    if config.threads:
        torch.set_num_threads(min(config.threads, os.cpu_count()))  # more would only wait
    native, name = has_fast_bf16(device), dtype_name(config, device)
    unfused = (device.type, name) == ("cpu", "bfloat16")  # where attention's own backward is slow
    torch.backends.cuda.enable_flash_sdp(not unfused)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(unfused)
    why = f"bf16 is {'' if native else 'not '}native here" if config.dtype == "auto" else "as asked"
    tqdm.write(f"device {device}, {name} products ({why}), optimizer {config.optimizer}, "
               f"{torch.get_num_threads()} CPU threads")
    return device, getattr(torch, name)


def keep_memory() -> None:
    """Tell glibc to keep freed memory: page faults cost up to half of a CPU training step."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim, top pad
            libc.mallopt(option, value)


# --- Processes: each holds its share of what is trained and takes its share of the micro-batches -


def join() -> None:
    """The processes that torchrun started, if it did. The first alone prints and writes."""
    if dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        if torch.cuda.device_count() > int(os.environ["LOCAL_RANK"]):  # fewer: only CPUs can do it
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(days=1))  # one may encode for hours
        dist.barrier()  # an error of one must not look like another's lost connection
        if rank_and_world()[0]:
            sys.stdout = open(os.devnull, "w")


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(model: nn.Module, device: torch.device) -> None:
    """FSDP: a layer is whole only while it computes; the rest longer, as heads follow forward."""
    from torch.distributed.fsdp import fully_shard  # here: it takes a second to import

    mesh = dist.init_device_mesh(device.type, (rank_and_world()[1],))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not model)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, or of this process's shard of it where `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

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
        return None if rank_and_world()[0] else value.cpu()
    return value


def for_all(loss: Tensor, model: nn.Module) -> Tensor:
    """FSDP averages gradients, where they are to add up, and wants all of them from all processes,
    also where a micro-batch holds no image, or no text."""
    rest = (p for p in model.parameters() if p.requires_grad and not hasattr(p, "full_tensor"))
    return rank_and_world()[1] * loss + 0 * sum(p.sum() for p in rest)


# --- Optimisers, schedule, average ---------------------------------------------------------------


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The Newton-Schulz iteration of Muon (kellerjordan.github.io/posts/muon): (rows, columns) ->
    nearly the nearest matrix with orthonormal rows or columns, in the matrix's own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """AdamW, but groups with "orthogonal" hold matrices (convolutions as (out, in * 9)) whose
    momentum is orthogonalised and scaled to the size of AdamW's steps. dtype: of these products;
    PyTorch's own Muon always takes bf16, forty times slower on a CPU without units for it."""

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options):
        super().__init__(groups, fused=True, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in (g for g in self.param_groups if g.get("orthogonal")):
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["step"] = torch.zeros(())  # AdamW wants to find one
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95).flatten(1)  # Nesterov's
                scale = 0.2 * math.sqrt(max(update.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = update.full_tensor() if hasattr(p, "full_tensor") else update
                update = orthogonalise(update.to(self.dtype)).to(p.dtype).view_as(p)
                p.add_(shard_like(update, p), alpha=-group["lr"] * scale)
                p.grad = None  # AdamW leaves alone what has none
        super().step()

    def load_state_dict(self, state: dict) -> None:
        trained = [p for group in self.param_groups for p in group["params"]]
        for i, moments in state["state"].items():  # Adam's count of steps is a scalar
            moments |= {k: shard_like(m, trained[i]) for k, m in moments.items() if m.ndim}
        super().load_state_dict(state)


def make_optimizer(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> Muon:
    """AdamW over what requires a gradient; weight decay on the matrices of linear layers and
    convolutions, not on embeddings, norms and biases. With "muon", the matrices between embeddings
    and outputs are orthogonal."""
    ends = ("lm_head", "image_head.final_layer.linear", "encoder.conv_in", "decoder.conv_out")
    matrices = {id(m.weight): n not in ends for n, m in model.named_modules()
                if isinstance(m, (nn.Linear, nn.Conv2d))}  # fmt: skip
    inner = {i for i, is_inner in matrices.items() if is_inner and config.optimizer == "muon"}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices.keys() - inner]},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in inner], "orthogonal": True},
    ]
    return Muon(groups, dtype, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What has an average: what is frozen would only be there twice."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """average <- decay average + (1 - decay) weights; the decay warms up from 0.1."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = trained(model)
    torch._foreach_lerp_([average[n] for n in weights], list(weights.values()), 1 - decay)


# --- What is saved -------------------------------------------------------------------------------


def contents(stage: Stage, optimizer: Muon, average: dict, step: int) -> tuple[dict, dict]:
    """-> tensors of the checkpoint by part, and the state to go on from; in the first process. What
    is frozen is saved as it is; low-rank products are merged in the one, kept apart in the other.
    """
    state = gathered({"step": step, "weights": stage.model.state_dict(), "average": average,
                      "optimizer": optimizer.state_dict()})  # fmt: skip
    if rank_and_world()[0]:
        return {}, {}
    tensors = {"model": None, "vae": stage.vae.state_dict() if stage.vae else None} | stage.others
    tensors[stage.part] = lora.merged(stage.model, state["weights"] | state["average"])
    if stage.before:
        state["before"] = stage.before.state_dict()
    return tensors, state
