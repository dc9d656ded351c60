"""Threads of torch that sleep while they wait."""

import os
import sys

from rapidin.errors import UserError

_POLICY = "OMP_WAIT_POLICY"  # read by the OpenMP runtime when torch loads it


def patient_threads() -> None:
    """Let torch's threads sleep while they wait for work, instead of spinning.

    Threads that spin take the time of the processor from whichever thread has work to do: where other
    processes were busy too, training steps of a small model took ten times as long
    (docs/measured/results.md). The command line calls this by itself. In Python call it before torch is
    imported, or set OMP_WAIT_POLICY=passive; a policy that is set already is kept.

    Raises UserError if torch has been imported without a policy, since it is too late then.
    """
    if _POLICY not in os.environ and "torch" in sys.modules:
        raise UserError(
            "torch is imported already, and its threads cannot be changed",
            f"call rapidin.patient_threads() before, or start Python with {_POLICY}=passive",
        )
    os.environ.setdefault(_POLICY, "passive")
