"""What the check before caching compares hooks with: sketches of the gradients that autograd itself forms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import is_out_of_memory
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.fsdp import is_sharded
from rapidin.tasks.task import AnyBatch

_MOST_GATHERED = 1 << 28  # elements of sharded parameters that are whole at a time
_MOST_FAILURES = 32  # of autograd, after which it is not asked for more


class AutogradSketches:
    """The sketches of some parameters' gradients as autograd forms them, of a batch of one example.

    sketches: [1, targets, width], zeros where no gradient arrived; failed: parameters
    whose gradients autograd cannot form, or that do not fit into memory.
    """

    def __init__(self, sketcher: GradientSketcher, batch: AnyBatch, numbers: Sequence[int]) -> None:
        self._sketcher, self._batch = sketcher, batch
        self._pass = sketcher.new_pass(sketcher.sketch_pass, batch)
        self.failed: set[int] = set()
        sharded = [n for n in numbers if is_sharded(sketcher.parameter(n))]
        for some in self._parts(sharded):
            self._backward_gathered(some)
        whole = sorted(set(numbers) - set(sharded))
        if whole:
            self._take(whole)

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
        if len(numbers) == 1 or len(self.failed) > _MOST_FAILURES:
            self.failed.update(numbers)
            return
        middle = len(numbers) // 2
        self._take(numbers[:middle])
        self._take(numbers[middle:])

    def _parts(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Some parameters at a time, of which this process holds all elements then."""
        part: list[int] = []
        for n in numbers:
            part.append(n)
            if sum(prod(self._sketcher.targets[m].shape) for m in part) >= _MOST_GATHERED:
                yield part
                part = []
        if part:
            yield part

    def _backward_gathered(self, numbers: Collection[int]) -> None:
        """Of parameters that are sharded: modules compute with copies of the gathered ones, which have a
        gradient in this process. A failure would leave the other processes alone, so nothing is tried
        again."""
        modules = dict(self._sketcher.model.named_modules())
        handles: list[Any] = []

        def copied(n: int, role: str, module: Any, arguments: Any) -> None:
            copy = nn.Parameter(getattr(module, role).detach().clone())
            hook: Any = copy.register_post_accumulate_grad_hook
            hook(partial(self._arrive, n))
            module._parameters[role] = copy

        try:
            with self._sketcher.requiring(()), torch.enable_grad():
                for n in numbers:
                    target = self._sketcher.targets[n]
                    for use in target.uses:
                        role = target.name.rpartition(".")[2]
                        begin: Any = modules[use.module].register_forward_pre_hook
                        handles.append(begin(partial(copied, n, role)))
                losses = self._sketcher.losses(self._batch)
                if losses.requires_grad:
                    torch.autograd.backward(losses.sum())
        finally:
            for handle in handles:
                handle.remove()

    def _arrive(self, n: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._pass.add_parameter_gradient(n, parameter.grad)
        parameter.grad = None

    def _backward(self, numbers: Collection[int]) -> None:
        """Each gradient is sketched and let go of as soon as it is formed."""
        handles = []
        try:
            with self._sketcher.requiring(numbers), torch.enable_grad():
                for n in numbers:
                    parameter = self._sketcher.parameter(n)
                    hook: Any = parameter.register_post_accumulate_grad_hook
                    handles.append(hook(partial(self._arrive, n)))
                losses = self._sketcher.losses(self._batch)
                if losses.requires_grad:
                    torch.autograd.backward(losses.sum())
        finally:
            for handle in handles:
                handle.remove()
