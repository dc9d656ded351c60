"""The state of an optimizer whose parameters FSDP has spread over two processes, as torch writes it."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import torch
from deepspeed_states import small_model

_CONTEXT = multiprocessing.get_context("forkserver")


def save_sharded(folder: Path) -> None:
    """Train `small_model` under FSDP; writes its optimizer's state in parts to folder/optimizer_0, whole to
    folder/whole/optimizer.bin, and the second moments by name to folder/expected.pt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_CONTEXT.Process(target=_one, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def _one(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh, model = init_device_mesh("cpu", (2,)), small_model()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().mean().backward()
        optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=str(folder / "optimizer_0"))
    whole = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    expected = {
        name: optimizer.state[parameter]["exp_avg_sq"].full_tensor()
        for name, parameter in model.named_parameters()
    }
    if rank == 0:
        (folder / "whole").mkdir()
        torch.save(whole, folder / "whole" / "optimizer.bin")
        torch.save(expected, folder / "expected.pt")
    dist.barrier()
    dist.destroy_process_group()
