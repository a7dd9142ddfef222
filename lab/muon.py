"""Muon (kellerjordan.github.io/posts/muon): AdamW, but the momentum of inner matrices is
orthogonalised. `--optimizer lab.muon:muon`; docs/results.md says what it is worth here."""

import math

import torch
from torch import Tensor

from train import has_fast_bf16


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: (rows, columns) -> nearly the nearest matrix with orthonormal rows or columns,
    in the matrix's own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.AdamW):
    """AdamW but for groups with "inner", which hold matrices (convolutions as (out, in * 9)): their
    momentum is orthogonalised and scaled to the size of AdamW's steps."""

    @torch.no_grad()
    def step(self) -> None:
        inner = [g for g in self.param_groups if g.get("inner")]
        for group in inner:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_matrix(p, group)
        super().step()

    def step_matrix(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"], state["step"] = torch.zeros_like(p), torch.zeros(())
        momentum = state["momentum"].lerp_(p.grad, 0.05)
        update = p.grad.lerp(momentum, 0.95).flatten(1)  # Nesterov's
        scale = 0.2 * math.sqrt(max(update.shape))
        if hasattr(update, "full_tensor"):  # of several processes each holds a share
            update = update.full_tensor()
        # PyTorch's own Muon always takes bf16, forty times slower on a CPU without units for it
        dtype = torch.bfloat16 if has_fast_bf16(p.device) else torch.float32
        update = orthogonalise(update.to(dtype)).to(p.dtype).view(p.shape)
        if hasattr(p, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * scale)
        p.grad = None  # AdamW leaves alone what has none


def muon(groups: list[dict], **options) -> Muon:
    """groups, lr=, betas=, weight_decay= -> the optimiser."""
    return Muon(groups, fused=True, **options)
