"""Threads that wait without spinning: for commands by themselves, in Python on demand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

POLICY = "OMP_WAIT_POLICY"


def said_by(code: str, policy: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != POLICY}
    if policy is not None:
        environment[POLICY] = policy
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return (ran.stdout + ran.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("before", "policy"), [(None, "passive"), ("active", "active"), ("passive", "passive")]
)
def test_torch_is_loaded_with_the_policy(before: str | None, policy: str) -> None:
    asks = "import os, rapidin; rapidin.patient_threads(); import torch; print(os.environ['OMP_WAIT_POLICY'])"
    assert said_by(asks, before) == policy


def test_commands_set_it_by_themselves_and_before_torch() -> None:
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from rapidin.cli import main\n"
        "main(['info', 'none'])\n"
    )
    assert said_by(code) == "passive"


def test_it_is_said_when_it_is_too_late() -> None:
    code = "import torch, rapidin; rapidin.patient_threads()"
    assert said_by(code) == (
        "rapidin.errors.UserError: torch is imported already, and its threads cannot be changed; call "
        "rapidin.patient_threads() before, or start Python with OMP_WAIT_POLICY=passive"
    )
    assert said_by(code + "; print('kept')", "active") == "kept"
