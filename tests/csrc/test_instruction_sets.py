"""The NEON units of csrc/cpu, on an emulated AArch64 machine: compared with the portable kernels there, and
where results are exact with those of this machine."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = "tests/support/instruction_sets/compare.cpp"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (CROSS, EMULATOR) if shutil.which(name) is None]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{' and '.join(MISSING)} not found (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
]


@pytest.fixture(scope="module")
def builder():
    """csrc/build_extensions.py, which knows the units and their flags."""
    spec = importlib.util.spec_from_file_location("units_of_machines", ROOT / "csrc/build_extensions.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def compiled(builder, compiler, machine, folder):
    """The program compare.cpp with the kernels of a machine."""
    macros, sources = builder.cpu_sources(machine)
    objects = []
    for source, flags in {**sources, DRIVER: []}.items():
        objects.append(str(folder / f"{Path(source).stem}.o"))
        command = [compiler, *builder.CXX_FLAGS, *macros, *flags, "-c", source, "-o", objects[-1]]
        subprocess.run(command, cwd=ROOT, check=True)
    program = folder / "compare"
    subprocess.run([compiler, "-static", "-pthread", *objects, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def program(builder, tmp_path_factory):
    return compiled(builder, CROSS, "aarch64", tmp_path_factory.mktemp("aarch64"))


def compare(*command):
    """The sets that were compared, and the exact results' hashes by case."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, *lines = done.stdout.splitlines()
    return first.split()[1:], dict(line.split()[1:] for line in lines)


@pytest.fixture(scope="module")
def with_i8mm(program):
    return compare(EMULATOR, "-cpu", "max", program)


def test_the_neon_units_agree_with_the_portable_kernels(with_i8mm):
    sets, exact = with_i8mm
    assert sets == ["base", "neon", "neon_i8mm"]
    assert len(exact) > 200


def test_a_machine_without_byte_products_gets_plain_neon(program, with_i8mm):
    sets, exact = compare(EMULATOR, "-cpu", "cortex-a57", program, 2)
    assert sets == ["base", "neon"]
    assert exact == with_i8mm[1]


def test_exact_results_are_those_of_this_machine(builder, with_i8mm, tmp_path):
    _, exact = compare(compiled(builder, builder.cxx()[0], builder.MACHINE, tmp_path))
    assert exact == with_i8mm[1]


def test_units_share_no_symbols(program):
    """A weak symbol of a unit could be the one that the portable code is linked with."""
    units = sorted(program.parent.glob("isa_*.o"))
    assert len(units) == 3
    for unit in units:
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", unit], check=True, capture_output=True, text=True
        )
        shared = [line for line in listed.stdout.splitlines() if line.split()[1] in "WVuT"]
        assert shared == [], unit.name
