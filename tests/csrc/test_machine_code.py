"""Kernels keep to the instructions, registers and memory that tests/support/machine_code.json allows them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
BUDGETS = SUPPORT / "machine_code.json"


@pytest.fixture(scope="module")
def kept():
    return json.loads(BUDGETS.read_text())


@pytest.fixture(scope="module")
def machine_code():
    """tests/support/machine_code.py, which wants Triton."""
    pytest.importorskip("triton")
    import machine_code

    return machine_code


def run(part):
    """What the script finds, in a process of its own: here Triton may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import json, machine_code as m; print(json.dumps(vars(m.{part}())))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(machine_code, kept, part, tool):
    found = machine_code.Found(**run(part))
    if found.tools[tool] != kept["tools"][tool]:
        pytest.skip(f"budgets are of {tool} {kept['tools'][tool]}, this is {found.tools[tool]}")
    assert found.kernels
    assert found.loops
    assert machine_code.rises(kept, found) == []


def test_cuda_kernels_keep_to_their_budgets(machine_code, kept):
    try:
        import rapidin.ops._cuda  # noqa: F401
    except ImportError:
        pytest.skip("built without nvcc")
    check(machine_code, kept, "cuda", "nvcc")


def test_triton_kernels_keep_to_their_budgets(machine_code, kept):
    check(machine_code, kept, "triton_kernels", "triton")


def test_a_rise_is_told_and_a_fall_is_not(machine_code, kept):
    name, loop = next(iter(kept["loops"].items()))
    kernel, row = next(iter(kept["kernels"].items()))

    def rises(kernels, loops):
        changed = {"kernels": {**kept["kernels"], **kernels}, "loops": {**kept["loops"], **loops}}
        return machine_code.rises(kept, machine_code.Found(**changed, tools={}))

    assert rises({}, {}) == []
    more = {**loop, "instructions": round(loop["instructions"] * 1.05, 3)}
    assert [x for x in rises({}, {name: more}) if "instructions" in x]
    pipes = {**loop["pipes"], "alu": loop["pipes"]["alu"] + 0.1 * loop["instructions"]}
    assert [x for x in rises({}, {name: {**loop, "pipes": pipes}}) if "alu" in x]
    assert rises({}, {name: {**loop, "instructions": 0.9 * loop["instructions"]}}) == []
    registers = {arch: n + 1 for arch, n in row["registers"].items()}
    assert rises({kernel: {**row, "registers": registers}}, {})
    assert rises({kernel: {**row, "spills": 1}}, {})
    assert rises({"cuda new_kernel": row}, {})
    assert (
        "no longer found" in machine_code.rises(kept, machine_code.Found({kernel: row}, {name: loop}, {}))[0]
    )


def test_the_page_has_the_table_of_the_budgets(machine_code, kept):
    """`python tests/support/machine_code.py --write` makes both."""
    page = machine_code.PAGE.read_text()
    assert machine_code.page_with(page, kept) == page


# ---- how it is counted ----


def function(machine_code, *lines):
    """A kernel of "[@P] OPCODE operands" lines, 16 bytes each."""
    sass = machine_code.sass
    made = []
    for line in lines:
        words = line.split()
        conditional = words[0].startswith("@")
        opcode, *operands = words[conditional:]
        made.append(sass.Instruction(opcode, " ".join(operands), conditional))
    return sass.Function("kernel", made)


def test_paths_load_what_they_can_and_are_no_longer_than_that(machine_code):
    """A loop with a fast and a slow load, a rare branch, and a loop within it."""
    sass = machine_code.sass
    kernel = function(
        machine_code,
        "S2R R0",
        "@P0 BRA 0x60",  # head of the outer loop, at 0x10: to the slow load
        "LDG.E.128 R4",
        "IADD3 R1",
        "BRA 0x80",
        "NOP",
        "LDG.E R4",  # 0x60
        "BRA 0x80",
        "@P1 BRA 0xb0",  # 0x80: past the rare branch
        "MUFU.RCP R2",
        "MUFU.RCP R2",
        "FFMA R3",  # 0xb0, head of the inner loop
        "@P2 BRA 0xb0",
        "@P3 BRA 0x10",
        "EXIT",
        "BRA 0xf0",
    )
    assert [len(loop.blocks) for loop in kernel.loops] == [1, 7]  # the trap at the end is never reached
    mix = kernel.hot(sass.Way(r"LDG.*128", trips=((lambda x: "FFMA" in x, 8.0),)))
    assert mix.opcodes == Counter({"FFMA": 8, "BRA": 12, "LDG.E.128": 1, "IADD3": 1})
    assert mix.bytes_of("LDG") == 16
    slow = kernel.hot(sass.Way(r"LDG\.E$", loads="nothing", avoid=lambda x: "LDG.E.128" in x))
    assert slow.opcodes["LDG.E"] == 1
    assert kernel.hot(sass.Way("STG")) is None


def test_pipes_and_clocks(machine_code):
    sass = machine_code.sass
    opcodes = {"FFMA": 8, "IMAD.MOV.U32": 4, "LOP3.LUT": 6, "LDS.128": 1, "HMMA.16816.F32.BF16": 2, "ULEA": 1}
    mix = sass.Mix(Counter(opcodes))
    assert mix.pipes() == {"fp32": 8, "imad": 4, "alu": 6, "shared": 1, "tensor": 2, "uniform": 1}
    clocks = mix.clocks(sass.H200)
    assert clocks["issue"] == 22 / 4
    assert (clocks["fp32"], clocks["imad"], clocks["alu"], clocks["memory"]) == (3.0, 2.0, 3.0, 4.0)
    assert clocks["tensor"] == pytest.approx(2 / 0.63)
    with pytest.raises(KeyError):
        sass.pipe_of("QUUX.E")


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "resident"),
    [
        (64, 8, 8192, 32),
        (126, 16, 106496, 16),
        (255, 8, 0, 8),
        (32, 4, 0, 64),
        (129, 8, 0, 8),
        (32, 1, 0, 32),
    ],
)
def test_warps_that_a_multiprocessor_holds(machine_code, registers, warps, shared, resident):
    """By registers (in steps of 8), shared memory (1 KB of each block's the system's), and blocks."""
    assert machine_code.sass.H200.resident_warps(registers, warps, shared) == resident


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN7rapidin18flat_sketch_kernelILb0EEEvNS_10FlatLaunchE", "flat_sketch_kernel<0>"),
        ("_ZN7rapidin20linear_sketch_kernelILi512ELb1EEEvNS_10LinearArgsE", "linear_sketch_kernel<512, 1>"),
        (
            "_ZN7rapidin45_GLOBAL__N__a332ccfc_12_topk_scan_cu_2da8d7d816topk_scan_kernelINS0_8ScanSignELi1EEEvNS_"
            "10DeviceScanEi",
            "topk_scan_kernel<ScanSign, 1>",
        ),
        ("_ZN7rapidin19flat_squares_kernelEPKlPKfllllPf", "flat_squares_kernel"),
    ],
)
def test_names(machine_code, mangled, name):
    assert machine_code.demangled(mangled) == name
