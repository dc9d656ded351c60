"""Loading of models from Hugging Face folders or names, with an adapter or a base model, and of GGUF files.

`load_model` reads model, tokenizer, adapter and base, and refuses weights that do not fit their config.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rapidin.distributed import World, world
from rapidin.errors import UserError, reason_of
from rapidin.gradients import fsdp
from rapidin.gradients.adapters import ADAPTER_CONFIG, SavedHead, check_own_adapter, load_adapter, other_base
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.path import WeightPath, base_path
from rapidin.gradients.tokenizers import gguf_file, load_tokenizer
from rapidin.gradients.weights import check_weights
from rapidin.settings import dtype_name
from rapidin.tasks.forward import inner_model
from rapidin.tasks.names import CAUSAL, loader_of, task_of_config, task_of_folder

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}


def load_model(
    name: str,
    *,
    adapter: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    shard_model: bool = False,
    task: str | None = None,
) -> LoadedModel:
    """Load a Hugging Face model folder or name, or a folder with one GGUF file, with its tokenizer.

    adapter: a PEFT adapter folder or name on it. base: the model that it was tuned from in full. tokenizer:
    folder or name of another tokenizer than the adapter's, if it has one, or the model's.
    device: default the GPU if there is one; "auto": layers are spread over all GPUs, and what does not fit
    over the CPU's memory and the disk. shard_model: every weight is sharded over the processes of the run.
    dtype: "float32", "bfloat16", "float16" or "auto"; default float32 on the CPU; on a GPU the checkpoint's
    own, but bfloat16 for one in float16, in whose range small gradients vanish. task: what the model is for
    (`rapidin.tasks.names`), by default what it was saved for, and a causal language model where that is not
    clear.

    Warns of what the user should know (`LoadedModel.notes`). Raises UserError if something is not found or
    does not fit.
    """
    adapter = _checked_adapter(name, adapter, base)
    here, mapped, number_format = world(), str(device) == "auto", dtype_name(dtype)
    if shard_model and (here.alone or mapped):
        what = "`shard_model` needs several processes, over which it spreads the model"
        raise UserError(what, "start them with torchrun, and without `device='auto'`")
    if mapped:
        fsdp.require_accelerate()
    device = here.device(None if mapped or device is None else str(device))
    on_cpu = _is_cpu(device)
    load_dtype: str = number_format or ("float32" if on_cpu else "auto")
    task = task or saved_task(name, adapter, trust_remote_code)
    head = None if adapter is None else SavedHead.of(adapter)
    model = _load_task(name, task, load_dtype, trust_remote_code, "model", mapped, head)
    if number_format is None and model.dtype == torch.float16:
        load_dtype = "bfloat16"
        model.to(torch.bfloat16)
    reads, reads_from, reads_other = load_tokenizer(
        name,
        adapter,
        tokenizer,
        config=getattr(model, "config", None),
        trust_remote_code=trust_remote_code,
    )
    if adapter is not None:
        model = load_adapter(model, adapter, task)
    try:
        if not (mapped or shard_model):
            model.to(device)
    except RuntimeError as error:
        raise UserError(f"cannot use the device '{device}': {reason_of(error)}") from None
    model.eval()
    loaded = LoadedModel.of(model, reads)
    loaded.notes.append(reads_other)
    loaded.source = {
        "model": _absolute(name),
        "adapter": None if adapter is None else _absolute(adapter),
        "base": None if base is None else _absolute(base),
        "tokenizer": _absolute(reads_from),
        "dtype": load_dtype,
    }
    if adapter is not None:
        loaded.notes.append(other_base(adapter, name))
    if base is not None:
        untuned = _load_task(base, task, load_dtype, trust_remote_code, "base model")
        loaded.path = base_path(model, untuned, name, base)
        loaded.notes.append(loaded.path.apart)
    if any(tuned.is_meta for _, _, tuned in loaded.path.ends):
        raise UserError("the tuned parameters do not fit into memory", "use `at=1`, or more GPUs")
    if shard_model:
        _shard(loaded, here, torch.device(device))
    loaded.notes = [note for note in loaded.notes if note]
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded


def _checked_adapter(name: str, adapter: str | None, base: str | None) -> str | None:
    """The adapter to load onto the model. Raises UserError if model, adapter and base do not go together."""
    if adapter is not None and base is not None:
        raise UserError("an adapter already names its base model", "give `adapter` or `base`, not both")
    if not os.path.isfile(os.path.join(name, ADAPTER_CONFIG)):
        return adapter
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(
            f"'{name}' is an adapter, not a model",
            "give the model that it was made for, and this folder with `adapter`",
        )
    # transformers puts the adapter in a model's own folder into the model.
    if adapter is not None and os.path.realpath(name) != os.path.realpath(adapter):
        raise UserError(
            f"the model's folder '{name}' already contains an adapter ({ADAPTER_CONFIG})",
            "leave out `adapter` to use that one, or remove it from the folder",
        )
    if base is not None:
        raise UserError(
            f"the model's folder '{name}' contains an adapter, so it has a base model already",
            "leave `base` out",
        )
    return None


def _is_cpu(device: str) -> bool:
    """Whether a device is the CPU. Raises UserError for one that is unknown or not there."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device '{device}'", "use cpu, cuda, cuda:N or auto") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(
            f"cannot use the device '{device}': rapidin has kernels for the CPU and for CUDA GPUs alone",
            "use `device='cpu'`",
        )
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            gpus = "no GPU that torch can use" if not count else f"{count} GPU{'s' * (count > 1)} only"
            raise UserError(f"cannot use the device '{device}': there is {gpus}", "use `device='cpu'`")
    return chosen.type == "cpu"


def _shard(loaded: LoadedModel, here: World, device: torch.device) -> None:
    """Shard a loaded model over the processes of the run; see `rapidin.gradients.fsdp`."""
    loaded.identity  # noqa: B018  (of the whole weights, while this process has them)
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    ends = [(names[id(parameter)], untuned) for parameter, untuned, _ in loaded.path.ends]
    fsdp.shard(inner_model(loaded.model), here, device)
    after = dict(loaded.model.named_parameters())
    loaded.path = WeightPath(
        [
            (
                after[name],
                None if untuned is None else fsdp.local_shard(untuned, after[name]),
                after[name].to_local().clone(),
            )
            for name, untuned in ends
        ],
        loaded.path.unknown,
    )
    loaded.sharded = True


# ------------------------------------------------------------------------------------------------ models


def saved_task(name: str, adapter: str | None = None, trust_remote_code: bool = False) -> str:
    """The task that a model was saved for, or that an adapter brings the head for; "causal" where that is not
    clear, or there is no such model."""
    head = None if adapter is None else SavedHead.of(adapter)
    if head is not None:
        return head.task
    if os.path.exists(name):
        return task_of_folder(name) or CAUSAL
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception:  # loading the model says what is wrong
        return CAUSAL
    return task_of_config(config)


def _load_task(
    name: str,
    task: str,
    dtype: str,
    trust_remote_code: bool,
    what: str,
    mapped: bool = False,
    head: SavedHead | None = None,
) -> Any:
    """head: of the adapter that the model is loaded for."""
    if dtype not in _DTYPES:
        raise UserError(f"unknown model dtype '{dtype}'", f"use one of {', '.join(_DTYPES)}")
    folder, gguf = gguf_file(name)
    extra: dict[str, Any] = dict(gguf)
    if extra:
        _require_gguf()
    if mapped:
        extra = extra | {"device_map": "auto"}
    _check_folder(name, what)
    if head is not None and loader_of(task) == loader_of(head.task):
        extra = extra | {"num_labels": head.outputs}
    else:
        head = None
    try:
        model, info = _loader(folder, task, trust_remote_code, extra).from_pretrained(
            folder,
            dtype=_DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **extra,
        )
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        where = "" if os.path.exists(name) else ", which is not a folder here and cannot be downloaded"
        raise UserError(f"cannot load the {what} '{name}'{where}: {reason_of(error)}") from error
    if gguf:
        _forget_quantizer(model)
    if head is not None:
        head.start(model, info)
    check_weights(model, info, name, what)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        check_own_adapter(model, name)
    return model


def _loader(name: str, task: str, trust_remote_code: bool, extra: Mapping[str, Any]) -> Any:
    """The class that loads a model for a task: one that reads images too is loaded as such, since the class
    for text alone would refuse it, or leave some of its weights out."""
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES,
    )

    usual = getattr(transformers, loader_of(task))
    if "gguf_file" in extra or loader_of(task) != loader_of(CAUSAL):
        return usual
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    with_images = saved_as == WITH_IMAGES.get(config.model_type)
    return AutoModelForImageTextToText if with_images else usual


def _check_folder(name: str, what: str) -> None:
    path = Path(name)
    if os.path.isdir(path) and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        raise UserError(f"'{name}' is not a {what}: it has no config.json and no GGUF file")
    if not os.path.exists(path) and (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    ):
        raise UserError(f"{what} not found: '{name}'")


def _forget_quantizer(model: Any) -> None:
    """Let transformers save and train a model from a GGUF file: its weights are plain numbers once read, but
    newer versions keep the file's quantizer, and refuse both."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        vars(model.config).pop("quantization_config", None)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("GGUF models need the package 'gguf'", "pip install 'rapidin[gguf]'") from None


# ---------------------------------------------------------------------------------------------- messages


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if os.path.exists(name) else name
