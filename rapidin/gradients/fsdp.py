"""Models larger than one GPU: weights sharded over the processes of a run, or layers on several devices.

`shard` is PyTorch's FSDP2: each process keeps a shard of every weight, and the weights of a block are
gathered while it computes. Only input gradients flow, so there are no weight gradients to reduce, and no
optimizer. With accelerate's device map, whole layers are on one device or another of a single process.
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
    """The modules whose weights are gathered at a time: those that the model must not be split within, or the
    items of its longest list of modules."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    unsplit = [module for module in model.modules() if type(module).__name__ in kinds]
    if unsplit:
        return unsplit
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Shard the weights of a model on the CPU over the processes of `world`, in place, onto `device`.

    One block at a time is whole on the device. No weight requires a gradient after this.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    assert world.group is not None  # made by all processes, before the mesh that is based on it
    mesh = init_device_mesh(device.type, (world.size,))
    model.requires_grad_(False)  # before sharding: gathered weights inherit this
    # Even the outermost weights are freed after the forward pass: the point of the path may change before
    # the next.
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def local_shard(whole: Tensor, like: Any) -> Tensor:
    """This process's shard of a tensor, which is sharded as the parameter `like` is."""
    from torch.distributed.tensor import distribute_tensor

    shard: Tensor = distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).to_local()
    return shard


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has only a shard of a parameter."""
    return hasattr(parameter, "to_local")


def require_accelerate() -> None:
    """Raises UserError if accelerate is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise UserError("`device='auto'` needs the package 'accelerate'", "pip install accelerate") from None


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Inside the block the module's own weights are in memory, even if a device map keeps them on disk."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    require_accelerate()
    from accelerate.utils import align_module_device

    with align_module_device(module, execution_device=torch.device("cpu")):
        yield
