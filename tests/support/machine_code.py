"""Budgets of the kernels, counted in their machine code.

    python tests/support/machine_code.py [--write] [NAME ...]

Prints, for the CUDA kernels of the built extension and for the main Triton kernels compiled for sm_90,
registers, spills, shared memory and the warps that a multiprocessor holds, and of each inner loop the
instructions by pipe an element, and what share of the memory's floor they would allow: clocks that memory
needs for the loop's bytes over the clocks of its busiest unit. That share is estimated from counts; it leaves
out waits, bank conflicts and caches.

`--write` keeps the figures in machine_code.json, to which tests/csrc/test_machine_code.py holds the
kernels, and writes the table in docs/reference/kernels.md: one command after each change of a kernel.
Elements of an iteration are the bytes of its loads of data over an element's; of a Triton kernel they must
also be those of whole tiles.

Run without TRITON_INTERPRET. Raises SystemExit where the extension or its tools are missing.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import triton
from aot import TOOLS, compiled, recorded, resources
from sass import CHIPS, Function, Mix, Way

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("machine_code.json")
PAGE = ROOT / "docs" / "reference" / "kernels.md"
BEGIN, END = "<!-- machine code: begin -->\n", "<!-- machine code: end -->\n"
ARCH = 90

Has = Callable[[sass.Opcodes], bool]


def has(pattern: str) -> Has:
    """Whether one of the opcodes is matched by a pattern."""
    return lambda opcodes: any(re.match(pattern, opcode) for opcode in opcodes)


def has_not(has_it: str, has_none: str) -> Has:
    """Whether opcodes match the first pattern, and none the second."""
    return lambda opcodes: has(has_it)(opcodes) and not has(has_none)(opcodes)


@dataclass(frozen=True)
class Inner:
    """A loop whose instructions are counted.

    name: of the row; kernel: its name with template arguments; way: which loop; element: bytes of one in
    memory; again: how often rows are read for all of a launch's queries, by blocks with some of them each;
    twice: 2 where each byte is loaded twice; optional: not every kernel has it
    """

    name: str
    kernel: str
    way: Way
    element: float
    again: int = 1
    twice: int = 1
    optional: bool = False


# ---- CUDA: which loops ----

_STREAMED = r"LDG.*\.NA\."  # load_streamed: of rows, each read once
_WIDE = r"LDG.*\.128"
_NARROW = r"LDG.*\.[SU]8"


def _planes(at_once: int) -> tuple[Has, float]:
    """The loop over ScanSign's 8 planes, of which it takes some at a time."""
    return has_not("IMMA", "LDG"), 8.0 / at_once


def _wide_loads(opcodes: sass.Opcodes) -> int:
    return sum(n for opcode, n in opcodes.items() if re.match(_WIDE, opcode))


def _not_of(wide_loads: int, half: bool) -> Has:
    """Blocks of flat_sketch that add rows of other dtypes: by their loads at a time, and how they unpack."""

    def avoid(opcodes: sass.Opcodes) -> bool:
        if has(r"LD\.|LDG.*U16")(opcodes):  # element by element
            return True
        loads = _wide_loads(opcodes)
        return loads > 0 and (loads != wide_loads or has("HADD2")(opcodes) != half)

    return avoid


def cuda_loops() -> Iterator[Inner]:
    rounds = (has(_WIDE), 4.0)  # of 8 rows, of the 32 that a warp plans at a time
    for squares, suffix in ((0, ""), (1, ", squares")):
        for dtype, wide_loads, half, size in (
            ("bf16", 4, False, 2),
            ("fp16", 4, True, 2),
            ("fp32", 8, False, 4),
        ):
            way = Way(_WIDE, trips=(rounds,), avoid=_not_of(wide_loads, half), least=64.0 * wide_loads)
            yield Inner(f"flat_sketch {dtype}{suffix}", f"flat_sketch_kernel<{squares}>", way, size)
    alone = has(r"LDG\.E(\.CONSTANT)?$|LDG.*U16")  # elements one by one
    # Of the kernel up to 512, whose table has words of four bytes too, which are loaded where rows are stored
    element_wise = has_not(r"LDG\.E(\.CONSTANT)?$|LDG.*U16", "STS")
    term = has(_WIDE)  # a preconditioner's, added once a tile

    def narrow_or_term(opcodes: sass.Opcodes) -> bool:
        return element_wise(opcodes) or term(opcodes)

    def rows_of(element: int) -> Has:
        """Loops that add elements of so many bytes, one multiply-add each; of two, bfloat16."""
        return lambda x: (
            x["FFMA"] * element == sass.bytes_of(x, _STREAMED) and (element == 4 or not has("HADD2")(x))
        )

    for dim in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        kernel = f"linear_sketch_kernel<{dim}, 0>" if dim <= 512 else f"fourier_sketch_kernel<{dim}>"
        avoid = element_wise if dim <= 512 else alone
        way = Way(_STREAMED, avoid=avoid, only=rows_of(2))
        yield Inner(f"linear_sketch bf16 {dim}, rows", kernel, way, 2)
        stages = {256: 8.0, 512: 4.0}.get(dim)  # of 4,096 features
        if stages is not None:
            way = Way(_STREAMED, trips=((has(_STREAMED), stages),), avoid=narrow_or_term, outer=True)
            yield Inner(f"linear_sketch bf16 {dim}, tile of 4,096 x 4,096", kernel, way, 2)
        kernel = f"linear_sketch_kernel<{dim}, 1>" if dim <= 512 else f"fourier_sketch_kernel<{dim}>"
        way = Way(_STREAMED, avoid=avoid, only=rows_of(4))
        yield Inner(f"linear_sketch fp32 {dim}, rows", kernel, way, 4)
    for dtype, kind, size in (
        ("fp16", "ScanHalf", 2.0), ("bf16", "ScanBFloat", 2.0), ("fp32", "ScanFloat", 4.0),
        ("int8", "ScanInt8", 1.0), ("int4", "ScanInt4", 0.5), ("sign", "ScanSign", 0.125),
    ):  # fmt: skip
        few = {"int4": 8, "sign": 8}.get(dtype, 4)
        name, trips = (f"{kind}<4>", (_planes(4),)) if dtype == "sign" else (kind, ())
        kernel = f"topk_scan_kernel<{name}, 1>"
        yield Inner(f"topk_scan {dtype}, {few} queries", kernel, Way(_STREAMED, trips=trips), size)
        again = 2 if dtype == "fp32" else 1
        tiles = {"fp32": 2, "int4": 2, "sign": 2}.get(dtype, 4)
        name, trips = (f"{kind}<2>", (_planes(2),)) if dtype == "sign" else (kind, ())
        kernel = f"topk_scan_kernel<{name}, {tiles}>"
        way = Way(_STREAMED, trips=trips)
        yield Inner(f"topk_scan {dtype}, 16 queries", kernel, way, size, again)
        # Rows that begin anywhere: two loads for 16 bytes, or a loop over the bytes of each word.
        way = Way(r"LDG\.E\.128\.CONSTANT", trips=trips, only=has("IMMA|HMMA"))
        name = f"topk_scan {dtype}, 16 queries, rows of any stride"
        yield Inner(name, kernel, way, size, again, twice=2, optional=True)
        if size <= 1:
            narrow = (*trips, (has_not(_NARROW, "IMMA"), 4.0))
            way = Way(_NARROW, rf"{_NARROW}|LDS", narrow, least=64)
            yield Inner(f"topk_scan {dtype}, 16 queries, byte by byte", kernel, way, size, again)


# ---- Triton: which launches and loops ----


@dataclass(frozen=True)
class Launched:
    """A launch of launches.py and its loop. tile: numbers of one iteration's tile, from the kernel's
    constants; way None: there is no loop, or none that is counted."""

    launch: str
    kernel: str
    way: Way | None = None
    element: float = 0.0
    tile: Callable[[dict[str, Any]], int] = lambda constants: 0


def triton_loops() -> Iterator[Launched]:
    def scan(constants: dict[str, Any]) -> int:
        planes = constants["PLANES"]
        return int(constants["R"] * constants["D"] * (planes or 1))

    unpiped = r"LDG.*\.EF"  # rows, which are not read again
    half = Way(r"LDG.*U16")
    gathered = lambda c: 16 * c["K"]  # noqa: E731
    yield Launched("flat_sketch bfloat16", "flat_sketch", half, 2, lambda c: c["ROWS"] * c["WIDTH"])
    yield Launched("linear_sketch bf16 512", "linear_sketch", half, 2, gathered)
    yield Launched("matrix_sketch 576", "fold", half, 2, lambda c: c["ITEMS"] * c["BINS"])
    yield Launched("topk_scan fp16 1 queries", "topk_scan", Way(unpiped, avoid=has("DADD")), 2, scan)
    yield Launched("topk_scan fp16 16 queries", "topk_scan", Way(r"LDGSTS.*128"), 2, scan)
    yield Launched("topk_scan int8 32 queries", "topk_scan", Way(r"LDGSTS.*128"), 1, scan)
    yield Launched(
        "topk_scan sign 32 queries", "topk_scan", Way(r"LDG.*EF|LDGSTS.*64", avoid=has("DADD")), 0.125, scan
    )
    odd = Way(unpiped, avoid=has("DADD"))
    yield Launched("topk_scan sign 16 queries, unaligned", "topk_scan", odd, 0.125, scan)
    yield Launched("pack sign 13443", "pack", Way(r"LDG"), 4, lambda c: c["ROWS"] * c["P"] * c["BYTES"])
    yield Launched("rotate 512 cut", "rotate", Way(r"LDG"), 4, lambda c: c["ROWS"] * c["WIDTH"])
    for launch in (
        "topk_scan fp32 16 queries", "topk_scan bf16 16 queries", "topk_scan int4 32 queries",
        "rotate 8192 cut", "unpack sign 13443", "unit_blocks 512", "unit_blocks 8192", "low_rank 64",
    ):  # fmt: skip
        name = launch.split()[0]
        yield Launched(launch, {"unit_blocks": "unit", "low_rank": "add_low_rank"}.get(name, name))
    for launch in ("fp32 512", "bf16 1024", "bf16 2048", "bf16 4096", "bf16 8192"):
        yield Launched(f"linear_sketch {launch}", "fourier_sketch")


# ---- CUDA: names, threads, shared memory ----


def demangled(name: str) -> str:
    """_ZN7rapidin16topk_scan_kernelINS0_8ScanSignELi1EEEv.. -> topk_scan_kernel<ScanSign, 1>: the last name,
    and its template arguments alike."""
    at = len("_Z")

    def name_here() -> str:
        """A name, of N .. E the last one, with what it is a template of."""
        nonlocal at
        nested = name[at] == "N"
        at += nested
        last = ""
        while (piece := re.match(r"St|S\w?_|K|(\d+)", name[at:])) is not None:
            at += piece.end()
            if piece[1]:
                last, at = name[at : at + int(piece[1])], at + int(piece[1])
            if name[at : at + 1] == "I":
                at += 1
                arguments = []
                while name[at] != "E":
                    arguments.append(argument_here())
                at += 1
                last += f"<{', '.join(arguments)}>"
            if not nested:
                break
        at += nested
        return last

    def argument_here() -> str:
        nonlocal at
        if (number := re.match(r"L[a-z](n?\d+)E", name[at:])) is not None:
            at += number.end()
            return number[1].replace("n", "-")
        if name[at] in "NS" or name[at].isdigit():
            return name_here()
        at += 1
        return name[at - 1]  # a builtin type

    return name_here() if name.startswith("_Z") else name


def block_threads(cubin: bytes) -> dict[str, int]:
    """{kernel: threads of a block, as its launch bounds have them}, from an ELF file's .nv.info sections."""
    (shoff,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, shoff + n * size) for n in range(count)]
    strings = headers[names_at][4]
    found = {}
    for name_at, _, _, _, offset, length in headers:
        begin = strings + name_at
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + length:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # value: bytes of what follows
                if attribute == 5:  # the most threads along each axis
                    x, y, z = struct.unpack_from("<III", cubin, at)
                    found[name.removeprefix(".nv.info.")] = x * y * z
                at += value
    return found


def dynamic_shared(kernel: str, extension: Any) -> int | None:
    """Bytes of shared memory that a launch asks for, None where the extension does not say. Of a scan: of
    rows of 4,096 numbers, with up to 256 hits of both ends."""
    if sketch := re.fullmatch(r"(linear|fourier)_sketch_kernel<(\d+)(?:, (\d+))?>", kernel):
        dim, split = int(sketch[2]), sketch[3] == "1"
        dtype = 0 if split else 2
        return int(extension.linear_sketch_tile(dim, dtype, dtype)[-1])
    if flat := re.fullmatch(r"flat_sketch_kernel<([01])>", kernel):
        return 8192 + 2048 * int(flat[1])  # flat_shared_bytes
    if scan := re.fullmatch(r"topk_scan_kernel<Scan(\w+)(?:<\d>)?, (\d+)>", kernel):
        number, size = _SCANNED[scan[1]]
        tiles, units = int(scan[2]), int(4096 * size) // 64
        return int(extension.topk_scan_shared_bytes(number, False, tiles, units, 8, 1024, 3))
    return None


# Numbers of the formats, and bytes of a row's number.
_SCANNED = {
    "Float": (0, 4.0), "Half": (1, 2.0), "BFloat": (2, 2.0),
    "Int8": (3, 1.0), "Int4": (4, 0.5), "Sign": (5, 0.125),
}  # fmt: skip


# ---- what is kept ----


def _loop(mix: Mix, way: Way, element: float, again: int = 1, twice: int = 1) -> dict[str, Any]:
    """A loop's figures an element."""
    chip = CHIPS[ARCH]
    read = mix.bytes_of(way.reads) / twice
    elements = read / element
    clocks = {unit: n * again for unit, n in mix.clocks(chip).items()}
    busiest = max(clocks, key=lambda unit: clocks[unit])
    return {
        "elements": elements,
        "instructions": round(mix.length * again / elements, 3),
        "pipes": {pipe: round(n * again / elements, 3) for pipe, n in sorted(mix.pipes().items())},
        "busiest": busiest,
        "of_floor": round(read * 32 / chip.bytes_a_clock / clocks[busiest], 2),
    }


@dataclass
class Found:
    """kernels: {name: resources}, loops: {name: figures an element}, tools: which versions."""

    kernels: dict[str, dict[str, Any]]
    loops: dict[str, dict[str, Any]]
    tools: dict[str, str]


def _cubins(extension: Path, arch: int, folder: Path) -> list[bytes]:
    subprocess.run(
        [TOOLS / "cuobjdump", "-xelf", f"sm_{arch}.cubin", extension],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return [path.read_bytes() for path in sorted(folder.glob(f"*.sm_{arch}.cubin"))]


def extension_resources(path: Path) -> Iterator[tuple[int, str, int, int]]:
    """(architecture, kernel, registers, bytes of stack) of each kernel in an extension."""
    shown = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
    )
    arch, name = 0, ""
    for line in shown.stdout.splitlines():
        if found := re.match(r"\s*arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r"\s*Function (\S+):", line):
            name = demangled(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            yield arch, name, int(found[1]), int(found[2])


def cuda() -> Found:
    """The kernels of the built extension. Raises ImportError where there is none."""
    from rapidin.ops import _cuda

    path = Path(_cuda.__file__)
    kernels: dict[str, dict[str, Any]] = {}
    for arch, name, registers, stack in extension_resources(path):
        row = kernels.setdefault(f"cuda {name}", {"registers": {}, "stack": {}})
        row["registers"][str(arch)] = registers
        row["stack"][str(arch)] = stack
    functions: dict[str, Function] = {}
    version = "unknown"
    threads: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cubin in _cubins(path, ARCH, Path(folder)):
            functions |= {demangled(f.name): f for f in sass.functions(cubin, TOOLS)}
            version = sass.compiler_version(cubin)
            threads |= {demangled(name): n for name, n in block_threads(cubin).items()}
    for name, function in functions.items():
        row = kernels[f"cuda {name}"]
        shared = dynamic_shared(name, _cuda)
        row |= {"spills": function.local_accesses(), "shared": shared}
        if name in threads:
            warps = threads[name] // 32
            registers = row["registers"][str(ARCH)]
            row |= {"warps": warps, "resident": CHIPS[ARCH].resident_warps(registers, warps, shared or 0)}
    loops = {}
    for inner in cuda_loops():
        if (counted := functions.get(inner.kernel)) is not None:
            mix = counted.hot(inner.way)
            if mix is None:
                if not inner.optional:
                    raise SystemExit(f"no loop of {inner.kernel} reads by {inner.way.reads}: mend cuda_loops")
                continue
            loops[f"cuda {inner.name}"] = _loop(mix, inner.way, inner.element, inner.again, inner.twice)
        else:
            raise SystemExit(f"the extension has no kernel {inner.kernel}: mend cuda_loops")
    return Found(kernels, loops, {"nvcc": version})


def triton_kernels() -> Found:
    """The main Triton kernels, compiled for sm_90; csrc/test_aot.py has limits for other architectures."""
    from launches import launches

    wanted = {(x.launch, x.kernel): x for x in triton_loops()}
    kernels, loops, missing = {}, {}, set(wanted)
    for name, run, _ in launches():
        if not any(name == launch for launch, _ in wanted):
            continue
        for launch in recorded(run, ARCH):
            inner = wanted.get((name, launch.kernel.removesuffix("_kernel")))
            if inner is None:
                continue
            missing.discard((inner.launch, inner.kernel))
            made = compiled(launch, ARCH)
            (function,) = sass.functions(made.asm["cubin"], TOOLS)
            usage = resources(made.asm["cubin"])
            warps, shared = made.metadata.num_warps, made.metadata.shared
            kernels[f"triton {name}"] = {
                "registers": {str(ARCH): usage["registers"]},
                "stack": {str(ARCH): usage["stack"]},
                "spills": function.local_accesses(),
                "shared": shared,
                "warps": warps,
                "resident": CHIPS[ARCH].resident_warps(usage["registers"], warps, shared),
            }
            if inner.way is None:
                continue
            mix = function.hot(inner.way)
            if mix is None:
                raise SystemExit(f"no loop of {name} reads by {inner.way.reads}: mend triton_loops")
            figures = _loop(mix, inner.way, inner.element)
            tile = inner.tile(launch.constants) / (32 * warps)
            if figures["elements"] % tile:
                lane = f"{figures['elements']} elements of a lane"
                raise SystemExit(f"{name}: an iteration reads {lane}, a tile has {tile}")
            loops[f"triton {name}"] = figures
    if missing:
        raise SystemExit(f"no launch has the kernel of {sorted(missing)}: mend triton_loops")
    return Found(kernels, loops, {"triton": ".".join(triton.__version__.split(".")[:2])})


def found() -> Found:
    one, other = cuda(), triton_kernels()
    return Found(one.kernels | other.kernels, one.loops | other.loops, one.tools | other.tools)


# ---- limits ----

TOLERANCE = 0.02  # of a figure an element; registers, spills, stack and shared memory may not rise at all


def rises(kept: dict[str, Any], now: Found) -> list[str]:
    """What is more than is kept, in words; what is less is none of them."""
    said = []
    for name, row in now.kernels.items():
        before = kept["kernels"].get(name)
        if before is None:
            said.append(f"{name}: not among the budgets")
            continue
        for field in ("registers", "stack"):
            for arch, n in row[field].items():
                if n > before[field].get(arch, n):
                    said.append(f"{name}, sm_{arch}: {n} {field}, kept are {before[field][arch]}")
        for field in ("spills", "shared"):
            if (row.get(field) or 0) > (before.get(field) or 0):
                said.append(f"{name}: {row[field]} {field}, kept are {before.get(field)}")
        if row.get("resident", 0) < before.get("resident", 0):
            said.append(f"{name}: {row.get('resident')} warps at a time, kept are {before['resident']}")
    for name, loop in now.loops.items():
        before = kept["loops"].get(name)
        if before is None:
            said.append(f"{name}: not among the budgets")
            continue
        pairs = [("instructions", loop["instructions"], before["instructions"])]
        pairs += [(pipe, n, before["pipes"].get(pipe, 0.0)) for pipe, n in loop["pipes"].items()]
        # A pipe's few instructions may move to another; all together may not rise.
        slack = 0.02 * before["instructions"]
        said += [
            f"{name}: {n} {what} an element, kept are {was}"
            for what, n, was in pairs
            if n > was * (1 + TOLERANCE) + (slack if what != "instructions" else 0)
        ]
    prefixes = {name.split()[0] for name in now.kernels}
    for kind, rows in (("kernels", now.kernels), ("loops", now.loops)):
        said += [
            f"{name}: among the budgets, and no longer found"
            for name in kept[kind]
            if name.split()[0] in prefixes and name not in rows
        ]
    return said


# ---- the page ----


def table(kept: dict[str, Any]) -> str:
    """The part of docs/reference/kernels.md."""
    tools = " and ".join(f"{name} {version}" for name, version in sorted(kept["tools"].items()))
    lines = [
        f"Counted in the machine code for sm_90 of {tools}, written by `python tests/support/machine_code.py",
        "--write` and held to it by `tests/csrc/test_machine_code.py`. Instructions are a lane's, an",
        "element of the data read, for all of a launch's blocks; `fma` are those of float32 and of",
        "integer products, `alu` other integer and logical ones, `memory` loads and stores. *of",
        "floor*: the clocks that memory needs for a loop's bytes over those of its busiest unit,",
        "estimated from these counts and the chip's rates, without waits, bank conflicts and misses",
        "of caches. Below 1 a loop cannot reach the floor of memory; above, it is not the",
        "instructions that keep it from there.",
        "",
        "| inner loop | instructions | fma | alu | memory | tensor | busiest unit | of floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, loop in kept["loops"].items():
        pipes = loop["pipes"]
        fma, memory = (
            sum(pipes.get(p, 0.0) for p in which) for which in (("fp32", "imad"), ("shared", "global"))
        )
        figures = [loop["instructions"], fma, pipes.get("alu", 0.0), memory, pipes.get("tensor", 0.0)]
        cells = [f"{x:.2f}" for x in figures]
        lines.append(f"| {name} | {' | '.join(cells)} | {loop['busiest']} | {loop['of_floor']:.2f} |")
    lines += [
        "",
        "Registers a thread, bytes of stack (spills), shared memory a block (?: not told), warps a",
        "block, and warps of 64 that a multiprocessor holds:",
        "",
        "| kernel | registers, sm_80 / 90 / 100 | stack | shared memory | warps a block | warps of 64 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in kept["kernels"].items():
        registers, stack = (
            " / ".join(str(row[field].get(str(arch), "-")) for arch in CHIPS)
            for field in ("registers", "stack")
        )
        if len(set(row["stack"].values())) == 1:
            stack = str(next(iter(row["stack"].values())))
        shared = "?" if row.get("shared") is None else f"{row['shared']:,}"
        warps, resident = row.get("warps", "?"), row.get("resident", "?")
        shown = name.replace("_kernel", "")
        lines.append(f"| `{shown}` | {registers} | {stack} | {shared} | {warps} | {resident} |")
    return "\n".join(lines) + "\n"


def page_with(text: str, kept: dict[str, Any]) -> str:
    """The page with the table between its marks. ValueError where these are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/reference/kernels.md must have {BEGIN.strip()} and {END.strip()} once each")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(kept) + END + rest.split(END)[1]


def main() -> None:
    write = "--write" in sys.argv[1:]
    names = [x for x in sys.argv[1:] if x != "--write"]
    try:
        now = found()
    except ImportError as error:
        raise SystemExit(f"rapidin's CUDA extension is not built: {error}") from error
    for kind, rows in (("kernel", now.kernels), ("loop", now.loops)):
        for name, row in rows.items():
            if not names or any(part in name for part in names):
                print(json.dumps({kind: name, **row}))
    if not write:
        return
    kept = {"tools": now.tools, "kernels": now.kernels, "loops": now.loops}
    BUDGETS.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(page_with(PAGE.read_text(), kept))


if __name__ == "__main__":
    main()
