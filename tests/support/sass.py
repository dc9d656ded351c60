"""What machine code says of a kernel: its loops, the path through them, instructions by pipe.

A loop's iteration is counted along one path from its head back to its head: of all paths the one that loads
most bytes (by a pattern of opcodes, as a rule all loads), so that no work is jumped over, and of those the
shortest, so that what is there for rare cases is. Loops within it count as often as the caller says, and once
where he says nothing. Counts are of one warp, so of one lane.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

INSTRUCTION_BYTES = 16  # from sm_70 on

# ---- pipes ----

# Which unit takes an opcode (without what follows its first dot). sm_80 to sm_100.
_OF_PIPE = {
    "fp32": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I FSWZADD",
    "imad": "IMAD IMUL XMAD",  # and moves that the compiler writes as multiplications
    "fp16": "HADD2 HMUL2 HFMA2",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "alu": "IADD3 IADD IADD32I LOP3 LOP SHF SHL SHR ISETP SEL LEA PRMT VIADD VIADDMNMX VIMNMX VIMNMX3"
    " VABSDIFF IMNMX IABS FMNMX FSETP FSEL FCHK FSET PLOP3 P2R R2P BMSK SGXT MOV CS2R IDP ISCADD HMNMX2"
    " HSETP2 HSET2 VOTE PSETP I2FP F2FP F2IP I2IP",
    "xu": "MUFU POPC FLO BREV I2F F2I F2F FRND",
    "tensor": "HMMA IMMA QMMA BMMA DMMA OMMA HGMMA IGMMA QGMMA UTCHMMA",
    "shared": "LDS STS LDSM STSM ATOMS SHFL REDUX",
    "global": "LDG STG LD ST LDGSTS ATOMG ATOM RED REDG LDL STL CCTL",
    "control": "BRA BRX BRXU JMP BSSY BSYNC BREAK BMOV BAR WARPSYNC EXIT CALL RET NOP YIELD DEPBAR LDGDEPBAR"
    " ENDCOLLECTIVE COLLECTIVE NANOSLEEP MEMBAR ERRBAR SYNCS WARPGROUP ARRIVES ELECT FENCE KILL BPT RPCMOV"
    " ACQBULK",
    "other": "S2R LDC B2R R2B LEPC GETLMEMBASE SETCTAID S2UR R2UR CCTLL QSPC MATCH MOVM PMTRIG",
}
PIPES = (*_OF_PIPE, "uniform")
_PIPE = {opcode: pipe for pipe, opcodes in _OF_PIPE.items() for opcode in opcodes.split()}


def pipe_of(opcode: str) -> str:
    """The unit that executes an opcode such as "LDG.E.128". KeyError for one that is not known."""
    base = opcode.split(".")[0]
    if (base not in _PIPE and base[0] == "U") or base == "VOTEU":
        return "uniform"
    return _PIPE[base]


def access_bytes(opcode: str) -> int:
    """Bytes that one lane loads or stores."""
    for width, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if width in opcode:
            return size
    return 4


@dataclass(frozen=True)
class Chip:
    """Rates of a multiprocessor, in lanes a clock, from NVIDIA's tables of arithmetic throughput for 9.0.

    memory: lanes whose shared-memory and L1 addresses are taken; memory_bytes: that they read or write a
    clock; macs: products of two 16-bit numbers that tensor cores add, a clock; mma_sync: the share of those
    that mma.sync is reported to get (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
    Architecture via Microbenchmarking", 2024: 0.63 of what wgmma gets); bandwidth: of its memory, bytes a
    second, for all multiprocessors, as in docs/reference/kernels.md; registers, shared_bytes, warps, blocks:
    that one holds at a time.
    """

    fp32: int = 128
    imad: int = 64
    alu: int = 64
    fp16: int = 128
    fp64: int = 64
    xu: int = 16
    memory: int = 32
    memory_bytes: int = 128
    macs: int = 2048
    mma_sync: float = 0.63
    schedulers: int = 4
    multiprocessors: int = 132
    clock: float = 1.8e9
    bandwidth: float = 4.3e12
    registers: int = 65536
    shared_bytes: int = 228 << 10
    reserved_bytes: int = 1 << 10  # of shared memory, of each block
    warps: int = 64
    blocks: int = 32

    @property
    def bytes_a_clock(self) -> float:
        """Of memory, for one multiprocessor."""
        return self.bandwidth / self.multiprocessors / self.clock

    def resident_warps(self, registers: int, warps: int, shared: int) -> int:
        """Warps at a time of blocks of so many registers a thread, warps, and bytes of shared memory."""
        of_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        of_shared = self.shared_bytes // (shared + self.reserved_bytes)
        return warps * min(of_registers, of_shared, self.warps // warps, self.blocks)


H200 = Chip()
CHIPS = {80: Chip(shared_bytes=164 << 10), 90: H200, 100: H200}


def tensor_clocks(opcode: str, chip: Chip) -> float:
    """Clocks of all tensor cores that one warp's product takes."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if shape:  # of four warps
        m, n, k = map(int, shape.groups())
        macs, share = m * n * k / 4, 1.0
    else:
        digits = re.search(r"\.(16|8)(8|16)(4|8|16|32|64|128|256)\b", opcode)
        if digits is None:
            raise ValueError(f"no shape in {opcode}")
        m, n, k = map(int, digits.groups())
        macs, share = m * n * k, chip.mma_sync
    base = opcode.split(".")[0]
    faster = 2.0 if base[0] in "IQ" else 0.5 if "TF32" in opcode else 1.0
    return macs / (chip.macs * faster * share)


# ---- code ----


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str
    conditional: bool


def bytes_of(opcodes: Counter[str], reads: str) -> float:
    return sum(n * access_bytes(opcode) for opcode, n in opcodes.items() if re.match(reads, opcode))


@dataclass(frozen=True)
class Mix:
    """Instructions of a loop's iteration, opcode -> how many."""

    opcodes: Counter[str] = field(default_factory=Counter)
    own: Counter[str] = field(default_factory=Counter)  # without those of loops within the loop

    def times(self, n: float) -> Mix:
        """As a part of a loop around it, so many times."""
        return Mix(Counter({opcode: count * n for opcode, count in self.opcodes.items()}))  # type: ignore[misc]

    def __add__(self, other: Mix) -> Mix:
        return Mix(self.opcodes + other.opcodes, self.own + other.own)

    @property
    def length(self) -> float:
        return sum(self.opcodes.values())

    def bytes_of(self, reads: str) -> float:
        """Bytes of one lane's accesses by opcodes that a pattern matches."""
        return bytes_of(self.opcodes, reads)

    def pipes(self) -> dict[str, float]:
        found: Counter[str] = Counter()
        for opcode, n in self.opcodes.items():
            found[pipe_of(opcode)] += n  # type: ignore[assignment]
        return dict(found)

    def clocks(self, chip: Chip) -> dict[str, float]:
        """Clocks of a multiprocessor that each unit needs for one warp's iteration."""
        pipes = self.pipes()
        need = {
            "issue": self.length / chip.schedulers,
            "fp32": (pipes.get("fp32", 0) + pipes.get("imad", 0)) * 32 / chip.fp32,
            "imad": pipes.get("imad", 0) * 32 / chip.imad,
            "alu": pipes.get("alu", 0) * 32 / chip.alu,
            "fp16": pipes.get("fp16", 0) * 32 / chip.fp16,
            "fp64": pipes.get("fp64", 0) * 32 / chip.fp64,
            "xu": pipes.get("xu", 0) * 32 / chip.xu,
            "memory": 0.0,
            "tensor": 0.0,
        }
        for opcode, n in self.opcodes.items():
            pipe = pipe_of(opcode)
            if pipe in ("shared", "global"):
                need["memory"] += n * max(32 / chip.memory, access_bytes(opcode) * 32 / chip.memory_bytes)
            elif pipe == "tensor":
                need["tensor"] += n * tensor_clocks(opcode, chip)
        return need


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]


LOADS = r"LD|LDG|LDS|LDGSTS"
Opcodes = Counter[str]


@dataclass(frozen=True)
class Way:
    """Which of a kernel's loops and paths is meant.

    reads: opcodes that read what the kernel is there to read, each number of it once
    loads: opcodes whose bytes are most along the path
    trips: (whether it is this loop, by the opcodes of its iteration; how often it goes round)
    avoid: blocks that the path does not take
    least: the smallest loop in which, loops within it included, a lane reads so many bytes; None: of the
        innermost loops that read the one that reads most, of equal ones the shortest
    only: loops whose iteration is such
    outer: the loop around that one
    """

    reads: str
    loads: str = LOADS
    trips: tuple[tuple[Callable[[Opcodes], bool], float], ...] = ()
    avoid: Callable[[Opcodes], bool] | None = None
    least: float | None = None
    only: Callable[[Opcodes], bool] | None = None
    outer: bool = False


class Function:
    """A kernel's code: instructions, blocks, loops."""

    def __init__(self, name: str, instructions: list[Instruction]) -> None:
        self.name, self.instructions = name, instructions
        self._iterations: dict[tuple[Loop, Way], Mix | None] = {}

    def local_accesses(self) -> int:
        """Instructions that read or write spilled registers, or local arrays."""
        return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in self.instructions)

    @cached_property
    def _cut(self) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """-> blocks as (first, past last) instruction, and each block's successors."""
        count = len(self.instructions)
        targets: dict[int, list[int]] = {}  # of instructions that end a block, -1 for leaving the kernel
        for n, instruction in enumerate(self.instructions):
            base = instruction.opcode.split(".")[0]
            after = [n + 1] if n + 1 < count else []
            if base in ("BRA", "JMP"):
                target = int(instruction.operands.split(",")[-1], 16) // INSTRUCTION_BYTES
                if ".DIV" in instruction.opcode:  # where a warp has diverged before a shuffle: never, here
                    targets[n] = after
                else:
                    targets[n] = [target, *(after if instruction.conditional else [])]
            elif base in ("EXIT", "RET", "BRX", "KILL"):
                targets[n] = after if instruction.conditional else []
        begins = {0} | {t for ends in targets.values() for t in ends}
        begins |= {n + 1 for n in targets if n + 1 < count}
        starts = sorted(begins)
        number = {start: n for n, start in enumerate(starts)}
        blocks = list(zip(starts, [*starts[1:], count], strict=True))
        successors = []
        for _, end in blocks:
            ends = targets.get(end - 1, [end] if end < count else [])
            successors.append([number[t] for t in ends])
        return blocks, successors

    def path_of(self, block: int) -> Mix:
        first, past = self._cut[0][block]
        opcodes = Counter(i.opcode for i in self.instructions[first:past])
        return Mix(opcodes, opcodes)

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, one for each head, the smallest first."""
        _, successors = self._cut
        order: list[int] = []
        seen = set()
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(successors[0]))]
        seen.add(0)
        while stack:
            block, rest = stack[-1]
            for after in rest:
                if after not in seen:
                    seen.add(after)
                    stack.append((after, iter(successors[after])))
                    break
            else:
                order.append(block)
                stack.pop()
        order.reverse()
        place = {block: n for n, block in enumerate(order)}
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for after in successors[block]:
                before[after].append(block)
        dominator = {order[0]: order[0]}

        def common(a: int, b: int) -> int:
            while a != b:
                while place[a] > place[b]:
                    a = dominator[a]
                while place[b] > place[a]:
                    b = dominator[b]
            return a

        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                known = [b for b in before[block] if b in dominator]
                new = known[0]
                for other in known[1:]:
                    new = common(new, other)
                if dominator.get(block) != new:
                    dominator[block], changed = new, True

        def dominates(a: int, b: int) -> bool:
            while place[b] > place[a]:
                b = dominator[b]
            return a == b

        bodies: dict[int, set[int]] = {}
        for block in order:
            for head in successors[block]:
                if place[head] <= place[block] and dominates(head, block):
                    body = bodies.setdefault(head, {head})
                    waiting = [block]
                    while waiting:
                        b = waiting.pop()
                        if b not in body:
                            body.add(b)
                            waiting += before[b]
        found = [Loop(head, frozenset(body)) for head, body in bodies.items()]
        return sorted(found, key=lambda loop: (len(loop.blocks), loop.head))

    def _within(self, loop: Loop) -> list[Loop]:
        """The loops directly within one."""
        inner = [x for x in self.loops if x.head != loop.head and x.blocks < loop.blocks]
        return [x for x in inner if not any(x.blocks < y.blocks for y in inner)]

    def iteration(self, loop: Loop, way: Way) -> Mix | None:
        """The path of an iteration; None where none leads from the loop's head to its head."""
        if (loop, way) not in self._iterations:
            self._iterations[loop, way] = self._iteration(loop, way)
        return self._iterations[loop, way]

    def _iteration(self, loop: Loop, way: Way) -> Mix | None:
        _, successors = self._cut
        children = self._within(loop)
        node = {block: block for block in loop.blocks}
        cost: dict[int, Mix | None] = {}
        for n, child in enumerate(children):
            for block in child.blocks:
                node[block] = -1 - n
            inner = self.iteration(child, way)
            times = next((t for is_it, t in way.trips if inner is not None and is_it(inner.opcodes)), 1.0)
            cost[-1 - n] = None if inner is None else inner.times(times)
        for block in loop.blocks:
            if node[block] == block:
                path = self.path_of(block)
                cost[block] = None if way.avoid is not None and way.avoid(path.opcodes) else path
        after: dict[int, set[int]] = {}
        ends = set()
        for block in loop.blocks:
            for target in successors[block]:
                if target == loop.head:
                    ends.add(node[block])
                elif target in node and node[target] != node[block]:
                    after.setdefault(node[block], set()).add(node[target])
        best: dict[int, tuple[tuple[float, float], Mix] | None] = {}
        on_stack: set[int] = set()

        def to_end(at: int) -> tuple[tuple[float, float], Mix] | None:
            if at in best:
                return best[at]
            own = cost[at]
            if own is None or at in on_stack:  # on the stack: a cycle that is no natural loop
                return None
            on_stack.add(at)
            rests = [Mix()] if at in ends else []
            rests += [rest[1] for target in after.get(at, ()) if (rest := to_end(target)) is not None]
            on_stack.remove(at)
            totals = [own + rest for rest in rests]
            rated = [((total.bytes_of(way.loads), -total.length), total) for total in totals]
            best[at] = max(rated, key=lambda x: x[0]) if rated else None
            return best[at]

        chosen = to_end(node[loop.head])
        return None if chosen is None else chosen[1]

    def hot(self, way: Way) -> Mix | None:
        """The iteration that is meant, None where there is no such loop."""
        known = [(loop, path) for loop in self.loops if (path := self.iteration(loop, way)) is not None]
        if way.least is not None:
            chosen = next((x for x in known if x[1].bytes_of(way.reads) >= way.least), None)
        else:
            reading = [x for x in known if bytes_of(x[1].own, way.reads) > 0]
            reading = [x for x in reading if way.only is None or way.only(x[1].opcodes)]
            innermost = [x for x in reading if not any(y.blocks < x[0].blocks for y, _ in reading)]
            chosen = max(innermost, key=lambda x: (bytes_of(x[1].own, way.reads), -x[1].length), default=None)
        if chosen is not None and way.outer:
            within = chosen[0].blocks
            chosen = next((x for x in known if within < x[0].blocks), None)
        return None if chosen is None else chosen[1]


def functions(cubin: bytes, tools: Path) -> list[Function]:
    """The kernels of a cubin, by nvdisasm of the folder `tools`; not what these call, as for divisions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "nvdisasm", "-json", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for function in json.loads(shown)[1]:
        if function["function-name"].startswith("$"):
            continue
        instructions = [
            Instruction(
                i["opcode"],
                i.get("operands", ""),
                "predicate" in i or ("," in i.get("operands", "") and i["opcode"].startswith("BRA")),
            )
            for i in function["sass-instructions"]
        ]
        found.append(Function(function["function-name"], instructions))
    return found


def compiler_version(cubin: bytes) -> str:
    """The release of the CUDA compiler that made a cubin, such as "13.0"."""
    release = re.search(rb"release (\d+\.\d+)", cubin)
    return "unknown" if release is None else release[1].decode()
