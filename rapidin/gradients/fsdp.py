"""Models larger than one GPU: weights spread over the processes of a run, or over the GPUs of one process.

`spread` is PyTorch's FSDP2: each process keeps a part of every weight, and a block's weights come together
for as long as it computes. Only input gradients flow, so there are no gradients of weights to reduce, and no
optimizer. `map_devices` is accelerate's: whole layers on this or that device of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.distributed import World
from rapidin.errors import UserError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts whose weights come together at a time: those that the model must not be split within, or the
    items of its longest list of modules."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    if found:
        return found
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def spread(model: nn.Module, world: World, device: torch.device) -> None:
    """Spread the weights of a model on the CPU over the processes of `world`, in place, onto `device`.

    A block at a time is whole on the device. No weight asks for a gradient after this.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    assert world.group is not None  # made by all, before the mesh that stands on it
    mesh = init_device_mesh(device.type, (world.size,))
    model.requires_grad_(False)  # before: what is gathered takes this over
    # Weights are given back after the forward pass, the outermost too: a point of the path may come between.
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def own_part(whole: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that is spread as the parameter `like` is."""
    from torch.distributed.tensor import distribute_tensor

    found: Tensor = distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).to_local()
    return found


def is_spread(parameter: Tensor) -> bool:
    """Whether this process has only a part of it."""
    return hasattr(parameter, "to_local")


def needs_accelerate() -> None:
    """Raise UserError where accelerate is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise UserError("--device auto needs the package 'accelerate'", "pip install accelerate") from None


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """The module's own weights are in memory inside the block, also where a device map keeps them
    elsewhere."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    needs_accelerate()
    from accelerate.utils import align_module_device

    with align_module_device(module, execution_device=torch.device("cpu")):
        yield
