"""States of optimizers in the files of accelerate, FSDP, DeepSpeed and bitsandbytes."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from deepspeed_states import FOLDER, small_model
from sharded_states import save_sharded
from tiny import tiny_llama
from torch import Tensor

from rapidin.errors import UserError
from rapidin.gradients.adam import live_second_moments, second_moments
from rapidin.gradients.parameters import find_targets


def assert_moments(path: Path, model: Any, expected: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    targets = find_targets(model, include=["*"])
    found = second_moments(path, model, targets)
    for target in targets:
        whole = expected[target.name].double().reshape(target.matrix)
        assert float(whole.max()) > 0
        torch.testing.assert_close(found[target.name][0], whole.mean(1), rtol=rtol, atol=0.0)
        torch.testing.assert_close(found[target.name][1], whole.mean(0), rtol=rtol, atol=0.0)


def refused(path: Path, pattern: str, model: Any = None) -> None:
    model = model or small_model()
    with pytest.raises(UserError, match=pattern) as error:
        second_moments(path, model, find_targets(model, include=["*"]))
    assert "\n" not in str(error.value)


class Code:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_the_state_that_accelerate_saves(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.randn(6, 3)).square().mean())
    optimizer.step()
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "optimizer.bin").exists()
    moments = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    assert_moments(tmp_path, small_model(), moments)


# ------------------------------------------------------------------------------------------------- FSDP


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    save_sharded(folder)
    return folder


@pytest.mark.full
def test_the_parts_of_a_state_that_fsdp_saves(sharded: Path) -> None:
    expected = torch.load(sharded / "expected.pt", weights_only=True)
    assert_moments(sharded, small_model(), expected)
    assert_moments(sharded / "optimizer_0", small_model(), expected)


@pytest.mark.full
def test_the_whole_state_that_fsdp_gathers_has_names(sharded: Path, tmp_path: Path) -> None:
    expected = torch.load(sharded / "expected.pt", weights_only=True)
    assert_moments(sharded / "whole", small_model(), expected)
    state = torch.load(sharded / "whole" / "optimizer.bin", weights_only=True)
    wrapped = {f"module._fsdp_wrapped_module.{name}": value for name, value in state["state"].items()}
    torch.save({**state, "state": wrapped}, tmp_path / "optimizer.bin")
    assert_moments(tmp_path, small_model(), expected)


@pytest.mark.full
def test_a_description_that_holds_code_is_refused_and_not_run(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded / "optimizer_0", tmp_path / "optimizer_0")
    ran = tmp_path / "ran"
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Code(ran)))
    refused(tmp_path, r"holds more than the description of tensors \(posix.mkdir\), which is not unpickled")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["pathlib\nPosixPath", "pathlib._local\nPosixPath", "pathlib\nWindowsPath"])
def test_a_description_that_another_python_or_system_wrote_is_read(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "optimizer_0"
    shutil.copytree(sharded / "optimizer_0", folder)
    with (folder / ".metadata").open("rb") as file:
        described = pickle.load(file)
    described.storage_meta.checkpoint_id = PurePosixPath("run/optimizer_0")
    data = pickle.dumps(described, protocol=2)  # which names classes as text
    ours = f"c{PurePosixPath.__module__}\nPurePosixPath\n".encode()
    assert ours in data
    (folder / ".metadata").write_bytes(data.replace(ours, f"c{name}\n".encode()))
    assert_moments(folder, small_model(), torch.load(sharded / "expected.pt", weights_only=True))


@pytest.mark.full
def test_a_part_that_holds_code_is_refused_and_not_run(sharded: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "optimizer_0", tmp_path / "ran"
    shutil.copytree(sharded / "optimizer_0", folder)
    with (folder / ".metadata").open("rb") as file:
        described = pickle.load(file)
    torch.save(Code(ran), folder / "code.distcp")
    for index, info in described.storage_data.items():
        if index.fqn.endswith("exp_avg_sq"):
            info.relative_path, info.offset = "code.distcp", 0
            info.length = (folder / "code.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    refused(tmp_path, "is more than a tensor, which is not unpickled")
    assert not ran.exists()


@pytest.mark.full
def test_damaged_parts_are_refused(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "optimizer_0"
    shutil.copytree(sharded / "optimizer_0", folder)
    (folder / "__1_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes()[:100])
    refused(tmp_path, "cannot read 'optimizer.state.*exp_avg_sq' in")
    (folder / "__1_0.distcp").unlink()
    refused(tmp_path, "cannot read 'optimizer.state.*exp_avg_sq' in")
    (folder / ".metadata").write_bytes(b"no such thing")
    refused(tmp_path, "cannot read|is damaged")


@pytest.mark.full
def test_parts_of_another_model_are_refused(sharded: Path) -> None:
    refused(sharded, "there is no second moment for 'model.embed_tokens.weight'", tiny_llama())
    other = small_model()
    other[0] = torch.nn.Linear(4, 5)
    refused(sharded, r"'exp_avg_sq' has shape \[5, 3\] where '0.weight' needs \[5, 4\]", other)


# -------------------------------------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_states_that_deepspeed_saves(stage: int) -> None:
    from safetensors.torch import load_file

    folder = FOLDER / f"stage-{stage}"
    expected = load_file(folder / "expected.safetensors")
    assert_moments(folder, small_model(), expected)
    assert_moments(folder / "global_step2", small_model(), expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_of_deepspeed_that_is_not_whole_is_refused(stage: int, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / f"stage-{stage}", tmp_path, dirs_exist_ok=True)
    step = tmp_path / "global_step2"
    (step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused(tmp_path, "has the states of 1 of 2 processes")
    first = step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    first.rename(step / "mp_rank_00_optim_states.pt")
    refused(tmp_path, "is of no training with ZeRO alone")


def test_a_state_of_deepspeed_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "global_step1"
    folder.mkdir()
    torch.save({"optimizer_state_dict": Code(ran)}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refused(tmp_path, "holds 'posix.mkdir', which is more than tensors and numbers, and is not unpickled")
    assert not ran.exists()


def test_a_universal_checkpoint_has_a_folder_for_each_name(tmp_path: Path) -> None:
    model = small_model()
    expected = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    for name, value in expected.items():
        (tmp_path / "zero" / name).mkdir(parents=True)
        torch.save({"param": value.flatten()}, tmp_path / "zero" / name / "exp_avg_sq.pt")
    assert_moments(tmp_path, model, expected)
    shutil.rmtree(tmp_path / "zero" / "0.bias")
    refused(tmp_path, "there is no second moment for '0.bias'")


# ---------------------------------------------------------------------------------------------- 8 bits


def quantized(value: Tensor, block: int | None) -> dict[str, Any]:
    """A second state in 8 bits: codes of a map, in blocks of this size, or in one."""
    levels = torch.linspace(0, 1, 256).square()
    flat = value.flatten()
    size = block or len(flat)
    largest = torch.stack([part.max() for part in flat.split(size)])
    scaled = flat / largest.repeat_interleave(size)[: len(flat)]
    codes = (scaled[:, None] - levels).abs().argmin(1).to(torch.uint8).view(value.shape)
    first = torch.zeros_like(codes)
    of_blocks = {"absmax1": largest, "absmax2": largest} if block else {"max1": largest, "max2": largest}
    return {"step": 1, "state1": first, "state2": codes, "qmap1": levels, "qmap2": levels, **of_blocks}


@pytest.mark.parametrize("block", [None, 64, 256, 2048])
@pytest.mark.parametrize("nested", [False, True])
def test_an_adam_of_8_bits_is_dequantized_by_the_map_in_its_file(
    tmp_path: Path, block: int | None, nested: bool
) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    expected, state = {}, {}
    for n, (name, p) in enumerate(model.named_parameters()):
        expected[name] = torch.rand(p.shape, generator=torch.Generator().manual_seed(n)) * 1e-4
        if p.numel() < 4096:  # bitsandbytes keeps small parameters in 32 bits
            state[n] = {"step": 1, "state1": torch.zeros(p.shape), "state2": expected[name]}
            continue
        values = quantized(expected[name], block)
        moved = {key: values.pop(key) for key in list(values) if key != "step"}
        state[n] = values | ({"__bnb_optimizer_quant_state__": moved} if nested else moved)
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, tmp_path / "optimizer.pt")
    assert_moments(tmp_path, model, expected, rtol=0.02)


def test_the_adam_of_bitsandbytes(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=128, intermediate_size=192)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    ids = torch.arange(40)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        expected[name] = state["state2"]
        if not state["state2"].is_floating_point():
            expected[name] = bitsandbytes.functional.dequantize_blockwise(
                state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
            )
    assert_moments(tmp_path, model, expected)
    targets = find_targets(model)
    parameters = [model.get_parameter(target.name) for target in targets]
    live = live_second_moments(optimizer, targets, parameters)
    saved = second_moments(tmp_path, model, targets)
    assert live is not None
    for target in targets:
        torch.testing.assert_close(live[target.name], saved[target.name])


def test_an_8_bit_state_of_unknown_blocks_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    state = {n: quantized(torch.rand(p.shape), 100) for n, p in enumerate(model.parameters())}
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, tmp_path / "optimizer.pt")
    refused(tmp_path, "has .* blocks, of no known size", model)
