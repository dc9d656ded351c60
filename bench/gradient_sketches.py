"""Other methods of sketching a whole gradient, in torch, for any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Shuffles:
    """RapidIn's method (Lin et al., ACL 2024, section 3.2): the padded gradient is a matrix whose rows and
    columns are permuted in turn, `shuffles` times each; then come random signs and sums of neighbours."""

    def __init__(self, elements: int, dim: int, shuffles: int = 20, device: str = "cpu") -> None:
        self.dim = dim
        self.padded = -(-elements // dim) * dim
        # As square as possible: columns are gathered fastest where a row fits the cache.
        self.rows = max(2**i for i in range(math.isqrt(self.padded).bit_length()) if self.padded % 2**i == 0)
        columns = self.padded // self.rows
        sizes = [(self.rows, columns)[n % 2] for n in range(2 * shuffles)]
        self.permutations = [torch.randperm(size, device=device) for size in sizes]
        self.signs = torch.randint(0, 2, (self.padded,), dtype=torch.int8, device=device) * 2 - 1

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        x = torch.cat([t.flatten() for t in tensors])
        x = F.pad(x, (0, self.padded - len(x)))
        for n, permutation in enumerate(self.permutations):
            x = x.view(self.rows, -1).index_select(n % 2, permutation)
        return (x.flatten() * self.signs).view(self.dim, -1).sum(1, dtype=torch.float32)


class CountSketch:
    """Adds each element with a random sign to a random bin, in torch."""

    def __init__(self, elements: int, dim: int, device: str = "cpu") -> None:
        self.dim = dim
        self.bins = torch.randint(0, dim, (elements,), dtype=torch.int32, device=device)
        self.signs = torch.randint(0, 2, (elements,), dtype=torch.int8, device=device) * 2 - 1

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        x = torch.cat([t.flatten() for t in tensors])
        return torch.zeros(self.dim, device=x.device).index_add_(0, self.bins, x.float() * self.signs)
