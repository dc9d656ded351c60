"""What the emulator is for: it holds launches to an architecture's limits, sees races, and counts accesses.

Kernels with faults (support/emulator/faulty.cu) show that it does; then all of rapidin's kernels go
through it.
"""

import json
import re
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import counts
import pytest
import torch
from emulator.build import emulated
from inputs import DTYPES, normal

from rapidin import ops
from rapidin.ops import backends, cuda
from rapidin.ops.packed import Packed, packed_bytes

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that a block may have: CUDA C++ Programming Guide.
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
PACKED = ("sign", "int4", "int8")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run kernels on"),
]


@pytest.fixture(scope="module")
def watched():
    return emulated("watched")


@pytest.fixture
def watching(watched):
    """The product's CUDA kernels run watched: a launch with a race raises."""
    with cuda.using(watched):
        yield watched


# ---- limits ----


@pytest.mark.parametrize("number", SHARED)
def test_an_architecture_answers_for_itself(arch, emulated_cuda, number):
    arch(number)
    assert emulated_cuda.capability(0) == number
    assert emulated_cuda.shared_bytes(0) == SHARED[number]


def test_an_unknown_architecture_is_refused(arch):
    with pytest.raises(ValueError, match="known are 75, 80, 86, 89, 90 and 100, got 61"):
        arch(61)


@pytest.mark.parametrize(
    ("launch", "error"),
    [
        ((1, 65535, 65535, 1, 0), None),
        ((1, 1, 1, 1024, 0), None),
        ((2**31, 1, 1, 1, 0), "empty: invalid configuration argument"),
        ((1, 65536, 1, 1, 0), "empty: invalid configuration argument"),
        ((1, 1, 65536, 1, 0), "empty: invalid configuration argument"),
        ((1, 1, 1, 1025, 0), "empty: invalid configuration argument"),
        *(((1, 1, 1, 1, SHARED[number]), number) for number in SHARED),
    ],
)
def test_launches_beyond_a_limit_fail_as_cuda_does(watched, launch, error):
    watched.set_checked_only(True)
    try:
        if isinstance(error, int):
            watched.set_arch(error)
            watched.faulty_launch(*launch)
            launch, error = (*launch[:4], launch[4] + 1), "empty: invalid argument"
        if error is None:
            watched.faulty_launch(*launch)
        else:
            with pytest.raises(RuntimeError, match=error):
                watched.faulty_launch(*launch)
    finally:
        watched.set_checked_only(False)
        watched.set_arch(90)


def linear_cases():
    for dim, inputs, grads in product((32, 64, 100, 128, 256, 512, 1024, 2048), DTYPES, DTYPES):
        for shape in ((1, 1, 8, 8), (3, 300, 4096, 64), (70_000, 1, 8, 8)):
            batch, tokens, n_in, n_out = shape
            x = torch.empty(1, tokens, n_in, dtype=inputs).expand(batch, -1, -1)
            yield "linear_sketch", (x, torch.empty(1, tokens, n_out, dtype=grads).expand(batch, -1, -1), dim)


def flat_cases():
    tensors = [torch.empty(1, 300_000), torch.empty(1, 7, dtype=torch.float16)]
    for dim, batch, squares in product((1, 64, 128, 65536), (1, 300), (False, True)):
        yield "flat_sketch", ([x.expand(batch, -1) for x in tensors], dim), {"squares": squares}


def scan_cases():
    """Each format, few and many queries, short and long lists, rows of one unit and of more than a stage."""
    sizes = product((1, 700, 4096), (1, 4, 5, 17, 257), (1, 256, 257, 1500))
    for dtype, (width, queries, k) in product((*DTYPES, *PACKED), sizes):
        if isinstance(dtype, str):
            codes = torch.zeros(
                1, packed_bytes(width, dtype), dtype=torch.int8 if dtype == "int8" else torch.uint8
            )
            cache = Packed(codes.expand(3000, -1), dtype, width, None)
        else:
            cache = torch.zeros(1, width, dtype=dtype).expand(3000, -1)
        yield cache, torch.ones(1, width).expand(queries, -1), k


@contextmanager
def checked_only():
    """Launches are checked and not run."""
    cuda.extension().set_checked_only(True)
    try:
        yield
    finally:
        cuda.extension().set_checked_only(False)


@pytest.mark.parametrize("number", SHARED)
def test_no_default_launches_what_the_device_cannot_run(arch, number):
    """Whatever CUDA is the default for fits the architecture; before sm_80 it is for nothing."""
    arch(number)
    device, chosen = torch.device("cuda", 0), set()
    installed = backends.Installed(cuda=True, triton=True)

    def run(op, arguments, call):
        backend = backends.default(op, device, arguments, installed)
        chosen.add((op, backend))
        if backend == "cuda":
            call()

    with checked_only():
        for op, arguments in linear_cases():
            inputs, grads, dim = arguments
            run(op, arguments, lambda a=inputs, g=grads, d=dim: cuda.linear_sketch(a, g, d, seed=1))
        for op, (tensors, dim), more in flat_cases():
            run(op, (), lambda x=tensors, d=dim, m=more: cuda.flat_sketch(x, d, seed=1, **m))
        nothing = {"scales": None, "offsets": None, "valid": None, "base": None}
        for cache, queries, k in scan_cases():
            given = ([cache], queries, k)
            run("topk_scan_both_ends", (), lambda x=given: cuda.topk_scan_both_ends(*x, **nothing))
            run("topk_scan", (), lambda x=given: cuda.topk_scan(*x, largest=True, **nothing))
    assert ("linear_sketch", "triton") in chosen
    if number < 80:
        assert {backend for _, backend in chosen} == {"triton"}
    else:
        assert {(op, "cuda") for op in backends.CUDA_OPS} <= chosen


# ---- races ----

FAULTS = {
    "shift": ("faulty.cu", "shared memory"),
    "stage": ("faulty.cu", "shared memory"),
    "turn": ("faulty.cu", "shared memory"),
    "total": ("faulty.cu", "global memory"),
    "last_block": ("faulty.cu", "global memory"),
}


def run_faulty(watched, name, whole):
    x, out = normal(256), torch.zeros(64)
    if name == "last_block":
        parts, tickets = torch.zeros(3), torch.zeros(1, dtype=torch.int32)
        watched.faulty_last_block(x.data_ptr(), parts.data_ptr(), tickets.data_ptr(), out.data_ptr(), whole)
    else:
        getattr(watched, f"faulty_{name}")(x.data_ptr(), out.data_ptr(), whole)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_what_has_its_barriers_is_clean(watched, name, order):
    watched.set_order(order)
    try:
        run_faulty(watched, name, True)
    finally:
        watched.set_order(0)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_what_lacks_one_races(watched, name, order):
    """Without a barrier, a barrier before a stage is filled again, a __syncwarp, atomics, a fence."""
    watched.set_order(order)
    try:
        with pytest.raises(RuntimeError, match=f"races in kernel {name}:") as raised:
            run_faulty(watched, name, False)
    finally:
        watched.set_order(0)
    where, what = FAULTS[name]
    assert len(re.findall(rf"{where}:\d+", str(raised.value))) >= 2
    assert what in str(raised.value)


def all_kernels():
    """A few small calls that launch every kernel there is, each way that its blocks or warps may meet."""
    for dim, dtype in product((32, 64, 512, 1024, 2048), (torch.bfloat16, torch.float32)):
        inputs, grads = normal(2, 37, 300, dtype=dtype), normal(2, 37, 70, dtype=dtype)
        if cuda.supports("linear_sketch", inputs, grads, dim):
            yield lambda a=inputs, g=grads, d=dim: ops.linear_sketch(a, g, d, seed=1, backend="cuda")
    for dim, dtype in product((16, 128, 384), DTYPES):
        tensors = [normal(2, n, dtype=dtype) for n in (5, 0, 40_000, 300)]
        yield lambda x=tensors, d=dim: ops.flat_sketch(
            x, d, seed=1, batched=True, squares=True, backend="cuda"
        )
    for dtype, queries in product((*DTYPES, *PACKED), (1, 9)):
        x = normal(700, 150)
        cache = ops.pack(x, dtype) if isinstance(dtype, str) else x.to(dtype)
        q = normal(queries, 150, seed=1)
        yield lambda c=cache, q=q: ops.topk_scan_both_ends(c, q, 20, backend="cuda")
    rising = torch.stack([torch.arange(2100).float()] * 2, 1)  # lists that fill
    yield lambda: ops.topk_scan_both_ends(rising, torch.eye(2), 300, backend="cuda")
    parts = [ops.pack(normal(300, 130), "int4"), normal(300, 40)]
    more = {"scales": normal(300, 2), "offsets": [0, 100, 170], "base": normal(3, 300)}
    yield lambda: ops.topk_scan_both_ends(parts, normal(3, 170), 9, backend="cuda", **more)
    words = torch.empty(600, dtype=torch.int32)
    yield lambda: cuda.extension().hash_words(1, 2, 3, 600, words.data_ptr(), (0, 0))


def test_no_kernel_races(watching):
    """And no kernel is left out: what csrc/cuda launches has been launched here."""
    watching.launched()
    for call in all_kernels():
        call()
    ran = set(watching.launched())
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    assert ran == set(re.findall(r'\blaunch\(\s*"(\w+)"', sources))


# ---- counts ----


def test_turns_of_the_banks_are_counted(watched):
    """A column of 32 rows of 32 floats lies in one bank; with a float between the rows in all of them."""
    x, out = normal(32 * 64), torch.zeros(32)
    for gap, turns in ((0, 32), (1, 1)):
        found = counts.counted(lambda g=gap: watched.faulty_column(x.data_ptr(), out.data_ptr(), g))
        reads = [
            line
            for (_, kind, which), line in found["column"].lines.items()
            if (kind, which) == ("read", "shared")
        ]
        assert [(line.requests, line.turns, line.least) for line in reads] == [(1, turns, 1)]


def test_sectors_are_counted(watched):
    """16 bytes a lane: side by side 16 sectors, a sector apart 32."""
    x, out = normal(32 * 64), torch.zeros(32)
    for step, sectors in ((4, 16), (8, 32)):
        found = counts.counted(lambda s=step: watched.faulty_wide(x.data_ptr(), out.data_ptr(), s))
        reads = [line for (_, kind, _), line in found["wide"].lines.items() if kind == "read"]
        assert [(line.requests, line.bytes, line.turns, line.least) for line in reads] == [
            (1, 512, sectors, 16)
        ]
        assert found["wide"].read == 32 * sectors


HELD = [
    "linear_sketch bfloat16 512, 1024 x 1024",
    "flat_sketch bfloat16 1024",
    *(
        f"topk_scan {dtype}, {queries} queries"
        for dtype in ("float16", "sign", "int8")
        for queries in (1, 16)
    ),
]


@pytest.mark.parametrize("name", HELD)
def test_kernels_ask_for_no_more_than_they_did(name):
    """counts.json holds what was counted; 2 % more fails. `python tests/support/counts.py --write` after a
    change that is meant."""
    run = next(run for each, _, run in counts.runs() if each == name)
    limits, found = json.loads(counts.LIMITS.read_text())[name], counts.totals(counts.counted(run))
    assert found.keys() == limits.keys()
    for kernel, numbers in found.items():
        for what, number in numbers.items():
            assert number <= 1.02 * limits[kernel][what], f"{kernel}: {what}"
