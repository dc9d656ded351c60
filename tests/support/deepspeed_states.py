"""Makes tests/gradients/deepspeed: what DeepSpeed 0.19 writes of a small model, in two processes on a CPU.

    for stage in 1 2 3; do torchrun --nproc-per-node 2 tests/support/deepspeed_states.py $stage; done

Each folder stage-N gets the second moments as DeepSpeed itself gathers them, too, in `expected.safetensors`.
Files of the model's weights are left out of stages 1 and 2, which do not need them. DeepSpeed compiles a
communication module when it starts on a CPU; gloo does without.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).parent.parent / "gradients" / "deepspeed"


def small_model() -> nn.Module:
    """Two linear layers with odd sizes, whose vector of all numbers no number of processes divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 7))


def main(stage: int) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.comm.torch
    from deepspeed.utils import safe_get_full_optimizer_state
    from safetensors.torch import save_file

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    model = small_model()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    torch.manual_seed(1)
    for _ in range(2):
        engine.backward(engine(torch.randn(6, 3, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    folder = FOLDER / f"stage-{stage}"
    engine.save_checkpoint(str(folder), tag="global_step2")
    found = {n: safe_get_full_optimizer_state(p, "exp_avg_sq") for n, p in model.named_parameters()}
    if engine.global_rank == 0:
        whole = {name: value.detach().float().cpu().clone() for name, value in found.items()}
        save_file(whole, folder / "expected.safetensors")
        for path in folder.glob("*.py"):
            path.unlink()
        if stage < 3:
            (folder / "global_step2" / "mp_rank_00_model_states.pt").unlink()
    torch.distributed.barrier()


if __name__ == "__main__":
    shutil.rmtree(FOLDER / f"stage-{sys.argv[1]}", ignore_errors=True)
    main(int(sys.argv[1]))
