"""The files in which training programs keep an optimizer's state, read as tensors by parameter.

- ``optimizer.pt`` of a Hugging Face Trainer's checkpoint, ``optimizer.bin`` of accelerate, or any torch
  optimizer's ``state_dict()``: parameters are numbered, group after group. If they have names instead, as in
  the whole state that FSDP gathers, these are used. 8-bit states of bitsandbytes are dequantized.
- a safetensors file with a tensor for each parameter under its name (or its name and ``.exp_avg_sq``), or two
  with ``.exp_avg_sq_row`` and ``.exp_avg_sq_col``.
- the folders that FSDP and DeepSpeed write (`rapidin.gradients.optimizer_shards`).

Only tensors, numbers and names are read: whatever else a file would run as it is unpickled is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError, short
from rapidin.gradients.optimizer_shards import deepspeed_folder, fsdp_folder, read_deepspeed, read_fsdp

State = Mapping[str, Tensor]  # the tensors that an optimizer keeps for one parameter, of KEYS
KEYS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
NAMED = "or give a safetensors file with a second moment under each parameter's name"
_FILES = ("optimizer.pt", "optimizer.bin")
_QUANTIZED = "__bnb_optimizer_quant_state__"  # where newer versions of bitsandbytes keep their tensors
# What wrappers put into the names of parameters.
_WRAPPERS = re.compile(r"^module\.|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class NumberedState:
    """The state of each parameter by its number, and the numbers of each group."""

    groups: list[list[int]]
    states: dict[int, State]


def state_file(path: Path) -> Path:
    """The file or folder with the state: `path`, or what of it a checkpoint's folder holds. Raises UserError
    if there is none."""
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        found = fsdp_folder(path) or deepspeed_folder(path)
        if found is not None:
            return found
    elif path.is_file():
        return path
    raise UserError(
        f"no optimizer's state at '{path / _FILES[0] if path.is_dir() else path}'",
        "give a file, or a checkpoint folder with optimizer.pt, optimizer.bin, or the state of FSDP or "
        "DeepSpeed",
    )


def read_state(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, State] | NumberedState:
    """The state in what `state_file` returned. shapes: of the parameters that are wanted, by name; those that
    a file with names lacks are left out.

    Raises UserError if it cannot be read or holds more than tensors and numbers.
    """
    if path.is_dir():
        sharded = read_fsdp(path, shapes) if (path / ".metadata").exists() else read_deepspeed(path, shapes)
        return {name: {"exp_avg_sq": value} for name, value in sharded.items()}
    if path.suffix == ".safetensors":
        return _read_safetensors(path, shapes)
    value = _load(path)
    try:
        groups = [list(group["params"]) for group in value["param_groups"]]
        states = {n: second_moment(dict(state)) for n, state in value["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"'{path}' is not an optimizer's state: it has no 'state' and 'param_groups'"
        ) from None
    if not any(states.values()):
        raise UserError(
            f"the optimizer in '{path}' has no second moment that rapidin can read",
            "supported optimizers are Adam, AdamW and Adafactor, and Adam of 8 bits",
        )
    if all(isinstance(n, str) for n in states):
        return {_WRAPPERS.sub("", n): state for n, state in states.items()}
    try:
        return NumberedState(
            [[int(n) for n in group] for group in groups], {int(n): s for n, s in states.items()}
        )
    except (TypeError, ValueError):
        raise UserError(f"'{path}' has parameters with numbers and with names", NAMED) from None


def second_moment(values: Mapping[str, Any]) -> State:
    """The tensors of KEYS in what an optimizer keeps for a parameter, dequantized."""
    values = {**values, **(values.get(_QUANTIZED) or {})}
    if isinstance(values.get("state1"), Tensor) and isinstance(values.get("state2"), Tensor):
        return {"exp_avg_sq": _dequantized(values)}
    return {key: v for key in KEYS if isinstance(v := values.get(key), Tensor)}


def _dequantized(values: Mapping[str, Any]) -> Tensor:
    """The second state of an optimizer of bitsandbytes: float32 of small parameters, else codes of 8 bits,
    each of which stands for a number of a map, times the largest value of its block, or of all."""
    codes: Tensor = values["state2"]
    if codes.is_floating_point():
        return codes
    numbers: Tensor = values["qmap2"].float()[codes.flatten().long()]
    largest = values.get("absmax2")
    if largest is None:
        one: Tensor = values["max2"].float()
        return (numbers * one).view(codes.shape)
    block = _block_size(len(numbers), len(largest))
    blocks: Tensor = largest.float().repeat_interleave(block)[: len(numbers)]
    return (numbers * blocks).view(codes.shape)


def _block_size(numbers: int, blocks: int) -> int:
    """The size of a block, a power of two, of which `numbers` make so many."""
    sizes = [1 << n for n in range(6, 17)]
    fits = [size for size in sizes if -(-numbers // size) == blocks]
    if not fits:
        raise UserError(f"an 8-bit state of {numbers:,} numbers has {blocks:,} blocks, of no known size")
    return 256 if 256 in fits else fits[0]


def _read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, State]:
    from safetensors import SafetensorError, safe_open

    states: dict[str, State] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for wanted in shapes:
                tensors = {key: f"{wanted}.{key}" for key in KEYS if f"{wanted}.{key}" in names}
                if wanted in names:
                    tensors["exp_avg_sq"] = wanted
                states[wanted] = {key: file.get_tensor(name) for key, name in tensors.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read '{path}': {short(error)}") from None
    return states


def _load(path: Path) -> Any:
    """What torch saved, tensors and plain values only."""
    refused = UserError(
        f"'{path}' is damaged, or holds more than tensors and numbers, which is not unpickled",
        "give the optimizer.pt of a Trainer's checkpoint, " + NAMED,
    )
    try:
        try:
            # Mapped, since the state of a large model is larger than the model.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # saved in the format before zip files, which cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise refused from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read '{path}': {short(error)}") from None
