"""Muon: AdamW, but for the matrices between embeddings and outputs, whose momentum is
orthogonalised (kellerjordan.github.io/posts/muon). `--optimizer lab.muon:muon`.

PyTorch's own takes matrices alone, and bf16 always, which a CPU without units for it computes forty
times slower than fp32.
"""

import math

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """A Newton-Schulz iteration: (rows, columns) -> nearly the nearest matrix with orthonormal rows
    or columns, in the matrix's own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """Groups with "inner" hold matrices, convolutions as (out, in * 9). Their updates are scaled to
    the size of AdamW's; a matrix that is shared out among processes is made whole for it."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group.get("inner") and p.grad is not None:
                    self.update(p, group["lr"], group["weight_decay"])
                    p.grad = None  # AdamW leaves alone what has none
        super().step()

    def update(self, p: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
            state["step"] = torch.zeros(())  # AdamW wants to find one
        momentum = state["momentum"].lerp_(p.grad, 0.05)
        update = p.grad.lerp(momentum, 0.95)  # Nesterov's
        is_shared = hasattr(update, "full_tensor")
        whole = update.full_tensor() if is_shared else update
        matrix = whole.flatten(1)
        dtype = torch.bfloat16 if p.device.type == "cuda" else p.dtype
        whole = orthogonalise(matrix.to(dtype)).to(p.dtype).view_as(whole)
        if is_shared:
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(1 - lr * weight_decay)
        p.add_(whole, alpha=-lr * 0.2 * math.sqrt(max(matrix.shape)))


def muon(groups: list[dict], lr: float, betas: tuple[float, float], weight_decay: float) -> Muon:
    """What train.py calls."""
    return Muon(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
