"""Low-rank training of the transformer (LoRA, Hu et al. 2106.09685): what fits one GPU at 7B.

    y = x W^T + scale (x A^T) B^T        W (out, in) stays, A (rank, in) and B (out, rank) learn

A starts random and B at zero, so that training begins at the function that W is. Only layers of the
transformer are treated so: what stands around them (embeddings, vision embedding, final norm,
lm_head, image head) learns in full, since images and their special tokens come in and go out there.
What is saved for others is `merged`: W + scale B A in W's place, an ordinary model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """In place of a linear layer without bias; its weight keeps its name."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        (rows, columns), device = linear.weight.shape, linear.weight.device
        self.weight, self.scale = linear.weight, scale
        self.A = nn.Linear(columns, rank, bias=False, device=device)  # PyTorch's initial values
        self.B = nn.Linear(rank, rows, bias=False, device=device)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * self.B(self.A(x))


def add(layers: nn.ModuleList, rank: int, scale: float, targets: tuple[str, ...]) -> None:
    """Freeze the transformer's layers and give their linear layers of these names an A and a B.

    Raises ValueError where a name is that of none.
    """
    layers.requires_grad_(False)
    found = [(parent, name) for parent in layers.modules() for name, child in
             parent.named_children() if isinstance(child, nn.Linear)]  # fmt: skip
    known = list(dict.fromkeys(name for _, name in found))
    if unknown := [name for name in targets if name not in known]:
        raise ValueError(f"lora_targets has {unknown[0]!r:.40}, no linear layer of the "
                         f"transformer; want some of {', '.join(known)}")
    for parent, name in found:
        if name in targets:
            setattr(parent, name, LowRank(getattr(parent, name), rank, scale))


@torch.no_grad()
def merged(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `model`, each A and B folded into its weight, which keeps its
    dtype. Nothing changes where the model has none."""
    tensors = dict(tensors)
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            a, b = (tensors.pop(f"{name}.{factor}.weight") for factor in "AB")
            w = tensors[f"{name}.weight"]
            whole = (w + layer.scale * b @ a).to(w.dtype)
            tensors[f"{name}.weight"] = whole.cpu()  # a GPU has no room for all of them twice
    return tensors
