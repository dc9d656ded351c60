"""What the check before caching compares hooks with: sketches of the gradients that autograd itself forms."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import is_out_of_memory
from rapidin.gradients.batch import Batch
from rapidin.gradients.collector import GradientSketcher

_MOST_FAILURES = 32  # of autograd, after which it is not asked for more


class AutogradSketches:
    """The sketches of some parameters' gradients as autograd forms them, of a batch of one example.

    sketches: [1, targets, width], zeros where no gradient arrived; arrived: where one did; failed: parameters
    whose gradients autograd cannot form, or that do not fit into memory.
    """

    def __init__(self, sketcher: GradientSketcher, batch: Batch, numbers: Sequence[int]) -> None:
        self._sketcher, self._batch = sketcher, batch
        self._pass = sketcher.new_pass(sketcher.sketch_pass, batch)
        self.arrived: set[int] = set()
        self.failed: set[int] = set()
        self._take(list(numbers))

    @property
    def sketches(self) -> Tensor:
        sketches: Tensor = self._pass.sketches
        return sketches

    def _take(self, numbers: list[int]) -> None:
        """Sketch the gradients of these, in two halves if that fails."""
        try:
            self._backward(numbers)
        except RuntimeError as error:
            if is_out_of_memory(error) and self._pass.device.type == "cuda":
                torch.cuda.empty_cache()
            fits = False
        else:
            fits = True
        if fits:
            return
        self._pass.sketches[:, numbers] = 0.0
        self.arrived -= set(numbers)
        if len(numbers) == 1 or len(self.failed) > _MOST_FAILURES:
            self.failed.update(numbers)
            return
        middle = len(numbers) // 2
        self._take(numbers[:middle])
        self._take(numbers[middle:])

    def _backward(self, numbers: Collection[int]) -> None:
        """Each gradient is sketched and let go of as soon as it is formed."""

        def arrive(n: int, parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._pass.add_parameter_gradient(n, parameter.grad)
            self.arrived.add(n)
            parameter.grad = None

        handles = []
        try:
            with self._sketcher.requiring(numbers), torch.enable_grad():
                for n in numbers:
                    parameter = self._sketcher.parameter(n)
                    hook: Any = parameter.register_post_accumulate_grad_hook
                    handles.append(hook(partial(arrive, n)))
                losses = self._sketcher.losses(self._batch)
                if losses.requires_grad:
                    torch.autograd.backward(losses.sum())
        finally:
            for handle in handles:
                handle.remove()
