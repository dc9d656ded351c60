"""The states of optimizers that FSDP and DeepSpeed spread over processes, put together from their files.

FSDP (torch.distributed.checkpoint): a folder with ``.metadata``, which says where in which file each part of
a tensor is, by name. accelerate and the Trainer name it ``optimizer_0``.

DeepSpeed, ZeRO stages 1 and 2: each process has a slice of one long vector of all parameters, and writes
which part of it belongs to which name. Stage 3: each parameter is cut into equal parts, one for each process,
which follow each other in the order of the names and shapes that the model's file lists. Universal
checkpoints (``ds_to_universal.py``): a folder for each name.

``.metadata`` is unpickled with the classes of torch's own description alone, and DeepSpeed's files with
``weights_only=True``, its own classes replaced by ones that do nothing.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError, short

Shapes = Mapping[str, tuple[int, ...]]

_KEY = "exp_avg_sq"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {
        "Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool", "strided",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip
_PATH_MODULES = ("pathlib", "pathlib._local")  # the latter in Python 3.13 alone
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
_OPTIMIZER = re.compile(r"(?:^|\.)state\.(.+)\.exp_avg_sq$")
_ZERO_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_DAMAGED = "the state is damaged; give another checkpoint"


def fsdp_folder(path: Path) -> Path | None:
    """The folder of FSDP's state in a checkpoint's folder, if there is one."""
    for folder in (path, *sorted(path.glob("optimizer*"))):
        if (folder / ".metadata").is_file():
            return folder
    return None


def deepspeed_folder(path: Path) -> Path | None:
    """The folder of DeepSpeed's state in a checkpoint's folder, if there is one."""
    latest = path / "latest"
    named = [path / latest.read_text().strip()] if latest.is_file() else []
    steps = sorted(path.glob("global_step*"), key=lambda each: int(re.sub(r"\D", "", each.name) or 0))
    for folder in (path, *named, *steps[::-1]):
        if (folder / "zero").is_dir() or any(folder.glob("*_optim_states.pt")):
            return folder
    return None


# ------------------------------------------------------------------------------------------------- FSDP


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _PATH_MODULES and name in _PATHS:
            return PurePath  # of this system, whichever wrote it
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_fsdp(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    """The second moments of these parameters in a folder of torch.distributed.checkpoint.

    Raises UserError if it is damaged, holds more than a description of tensors, or keeps parameters without
    their names.
    """
    path = folder / ".metadata"
    try:
        described = _Unpickler(io.BytesIO(path.read_bytes())).load()
        entries = dict(described.state_dict_metadata)
        places = {(at.fqn, tuple(at.offset or ())): info for at, info in described.storage_data.items()}
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{path}' is damaged, or holds more than the description of tensors ({short(error)}), which is "
            "not unpickled"
        ) from None
    except (
        OSError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        ImportError,
        KeyError,
        IndexError,
    ) as error:
        raise UserError(f"cannot read '{path}': {short(error)}") from None
    found = {match[1]: key for key in entries if (match := _OPTIMIZER.search(key))}
    if any("_flat_param" in name for name in found):
        raise UserError(
            f"'{folder}' keeps parameters joined and without their names (use_orig_params=False)",
            "gather the whole state with FSDP's FULL_STATE_DICT, which has names",
        )
    return {
        name: _assembled(folder, entries[found[name]], found[name], places, shape)
        for name, shape in shapes.items()
        if name in found
    }


def _assembled(
    folder: Path, entry: Any, key: str, places: Mapping[Any, Any], shape: tuple[int, ...]
) -> Tensor:
    """A tensor of its parts. places: where each part is stored, by the key and the offsets."""
    try:
        whole = torch.full(tuple(entry.size), torch.nan, dtype=torch.float32)
        if tuple(entry.size) != shape:
            return whole  # the caller says that the shape is another
        for chunk in entry.chunks:
            info = places[key, tuple(chunk.offsets)]
            part = _part(folder, info)
            at = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[at] = part.reshape(tuple(chunk.sizes)).float()
        return whole
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read '{key}' in '{folder}': {type(error).__name__} {short(error)}", _DAMAGED
        ) from None
    except pickle.UnpicklingError:
        raise UserError(f"'{key}' in '{folder}' is more than a tensor, which is not unpickled") from None


def _part(folder: Path, info: Any) -> Tensor:
    """The tensor that a file holds at a place."""
    if getattr(info, "transform_descriptors", None):
        raise ValueError("it is compressed")
    name = str(info.relative_path)
    if Path(name).name != name:
        raise ValueError(f"{short(name)} is not a file beside it")
    with (folder / name).open("rb") as file:
        file.seek(int(info.offset))
        data = file.read(int(info.length))
    value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise TypeError("it is not a tensor")
    return value


# -------------------------------------------------------------------------------------------- DeepSpeed


class _Inert:
    """What stands for any class of DeepSpeed: it keeps its values and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args


def read_deepspeed(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    """The second moments of these parameters in a folder of DeepSpeed.

    Raises UserError if it is damaged, holds other than tensors, plain values and DeepSpeed's own, or is of a
    training with tensor parallelism.
    """
    try:
        if (folder / "zero").is_dir():
            return _universal(folder / "zero", shapes)
        return _zero(folder, shapes)
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise UserError(
            f"cannot read DeepSpeed's state in '{folder}': {type(error).__name__} {short(error)}", _DAMAGED
        ) from None


def _load(path: Path) -> Any:
    """What torch saved, with classes of DeepSpeed replaced."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    other = [name for name in unsafe if not name.startswith("deepspeed.")]
    if other:
        raise UserError(
            f"'{path}' holds '{other[0]}', which is more than tensors and numbers, and is not unpickled",
            "convert it with DeepSpeed's ds_to_universal.py",
        )
    # A class each, since several may not share one.
    inert: Any = [(type("Inert", (_Inert,), {}), name) for name in unsafe]
    with torch.serialization.safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True)


def _universal(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    found = {}
    for name, shape in shapes.items():
        path = folder / name / f"{_KEY}.pt"
        if path.is_file():
            value = _load(path)
            tensor = value["param"] if isinstance(value, Mapping) else value
            found[name] = tensor.reshape(shape) if tensor.numel() == prod(shape) else tensor
    return found


def _zero(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    files = {}
    for path in folder.glob("*_optim_states.pt"):
        match = _ZERO_FILE.search(path.name)
        if match is None or int(match[2]):
            raise UserError(
                f"'{path}' is of no training with ZeRO alone",
                "convert the checkpoint with DeepSpeed's ds_to_universal.py",
            )
        files[int(match[1])] = path
    states = [_load(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    expected = states[0]["partition_count"]
    count = max(expected) if isinstance(expected, list) else int(expected)
    if sorted(files) != list(range(count)):
        raise UserError(f"'{folder}' has the states of {len(files)} of {count} processes", "copy all files")
    if "fp32_flat_groups" in states[0]:
        return _stage_3(folder, states, shapes)
    return _stages_1_2(folder, states, shapes)


def _stages_1_2(folder: Path, states: list[Any], shapes: Shapes) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for state in states:
        base, mappings = state["base_optimizer_state"], state.get("param_slice_mappings")
        if not isinstance(base, Mapping) or not mappings:
            raise UserError(
                f"'{folder}' does not say which parameters its slices are of",
                "convert the checkpoint with DeepSpeed's ds_to_universal.py",
            )
        for group, mapping in enumerate(mappings):
            flat = base["state"][group][_KEY]
            for name, address in mapping.items():
                start, size = int(address.start), int(address.numel)
                if name in shapes:
                    pieces.setdefault(name, []).append(flat[start : start + size])
    found = {name: torch.cat(parts) for name, parts in pieces.items()}
    return {name: value.reshape(shapes[name]) if value.numel() == prod(shapes[name]) else value
            for name, value in found.items()}  # fmt: skip


def _stage_3(folder: Path, states: list[Any], shapes: Shapes) -> dict[str, Tensor]:
    described = _load(next(iter(sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")))))
    saved = {name: tuple(shape) for group in described["param_shapes"] for name, shape in group.items()}
    flats = []
    for state in states:
        groups = state["optimizer_state_dict"]["state"]
        flats.append(torch.cat([groups[n][_KEY].flatten() for n in sorted(groups)]))
    found, at = {}, 0
    for name, shape in saved.items():
        size = -(-prod(shape) // len(states))
        if name in shapes:
            whole = torch.cat([flat[at : at + size] for flat in flats])[: prod(shape)]
            found[name] = whole.reshape(shape)
        at += size
    if any(len(flat) != at for flat in flats):
        raise ValueError(f"{at:,} numbers are expected of each process, and one has {len(flats[0]):,}")
    return found
