"""Which devices the extension can run on: those of the architectures that it was compiled for."""

from __future__ import annotations

import torch

from rapidin.ops.cuda.extension import extension


def excludes(device: torch.device) -> str | None:
    """Why the extension cannot run on a device, as a predicate ("was built for ..."); None where it can."""
    index = device.index or 0 if device.type == "cuda" else 0
    try:
        capability = extension().capability(index)
    except RuntimeError as error:  # for instance, a driver too old for the linked runtime
        return f"cannot use device '{device}': {error}"
    codes = extension().architectures
    if any(runs(code, capability) for code in codes.split()):
        return None
    return f"was built for {codes.replace(' ', ', ')}, and device '{device}' is sm_{capability}"


def runs(code: str, capability: int) -> bool:
    """Whether nvcc's output (sm_80, sm_90a: machine code; compute_90: PTX) runs on a device of a compute
    capability (10 major + minor). Machine code runs within its major version, PTX on this and all later
    capabilities; code with the suffix "a" on this one alone, with "f" within the major version."""
    kind, number = code.split("_")
    built = int(number.rstrip("af"))
    if number.endswith("a"):
        return capability == built
    within = kind == "sm" or number.endswith("f")
    return capability >= built and (not within or capability // 10 == built // 10)
