"""Tiny Mixtrals whose experts are linear layers."""

from __future__ import annotations

from typing import Any

import torch
from causal_types import tiny_causal


class LinearExperts(torch.nn.Module):
    """Experts of linear layers, each called with the tokens that are routed to it.

    kind: "gathered" tokens of each expert, or all tokens "sorted" by expert, as two kinds of code have it.
    """

    def __init__(self, kind: str, hidden: int = 32, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.kind, self.top_k = kind, top_k
        self.router = torch.nn.Linear(hidden, experts, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "up": torch.nn.Linear(hidden, 24),
                    "gate": torch.nn.Linear(hidden, 24, bias=False),
                    "down": torch.nn.Linear(24, hidden, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = torch.softmax(self.router(flat), -1).topk(self.top_k, -1)
        mixed = self._gathered if self.kind == "gathered" else self._sorted
        return mixed(flat, weights, chosen).view(x.shape)

    def _expert(self, number: int, x: torch.Tensor) -> torch.Tensor:
        expert: Any = self.experts[number]
        output: torch.Tensor = expert["down"](torch.nn.functional.silu(expert["gate"](x)) * expert["up"](x))
        return output

    def _gathered(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(flat)
        for number in range(len(self.experts)):
            token, place = torch.where(chosen == number)
            seen = flat[None, token].reshape(-1, flat.shape[1])
            total.index_add_(0, token, self._expert(number, seen) * weights[token, place, None])
        return total

    def _sorted(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        order = chosen.view(-1).argsort(stable=True)
        seen, first, outputs = flat[order // self.top_k], 0, []
        for number, count in enumerate(torch.bincount(chosen.view(-1), minlength=len(self.experts)).tolist()):
            if count:
                outputs.append(self._expert(number, seen[first : first + count]))
            first += count
        back = torch.empty_like(seen)
        back[order] = torch.cat(outputs)
        return (back.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def with_linear_experts(kind: str) -> Any:
    """A tiny Mixtral whose experts are linear layers."""
    model = tiny_causal("mixtral")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = LinearExperts(kind)
    return model
