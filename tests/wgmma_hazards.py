"""Does machine code write a register that a running WGMMA may still read?

A WGMMA is asynchronous: it may read A from registers until a WARPGROUP.DEPBAR has waited for its group. ptxas
up to 13.2 lets other instructions write these registers before (NVIDIA's release notes of 13.3 name the
repair), and says nothing. This check follows every path through a kernel, with the groups in flight.

    python tests/wgmma_hazards.py BINARY...   # an object file, a cubin or a module _C
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
SECTION = re.compile(r"^\.text\.(\w+):")
MOST_GROUPS = 8  # that are told apart
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass
class Instruction:
    """One line of a kernel; `writes` holds the numbers of the registers that it writes."""

    address: int
    predicate: str | None
    opcode: str
    operands: str
    writes: frozenset[int]

    def __str__(self) -> str:
        return f"{self.address:#x} {self.opcode} {self.operands}"


@dataclass
class Kernel:
    """Instructions in order, and the index that each label stands before."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class InFlight:
    """A registers of groups that nobody has waited for, oldest first, and of the group not committed yet."""

    groups: tuple[frozenset[int], ...] = ()
    uncommitted: frozenset[int] = frozenset()

    def read(self) -> frozenset[int]:
        return self.uncommitted.union(*self.groups)


def parse_life_ranges(lines: Iterable[str]) -> dict[str, Kernel]:
    """Kernels by mangled name, from the lines of `nvdisasm -plr` (register life ranges)."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel()
    columns: dict[int, int] = {}  # place in a line -> register
    for line in lines:
        if m := SECTION.match(line):
            kernel = kernels.setdefault(m[1], Kernel())
        elif m := LABEL.match(line):
            kernel.labels[m[1]] = len(kernel.instructions)
        elif "// |" in line and " # 0 1 2 3 " in line:
            start = line.index("// |") + len("// |")
            row = line[start : line.index("|", start)]
            places = list(re.finditer(r"\d+", row))
            columns = {start + place.end() - 1: int(place[0]) for place in places}
        elif m := LINE.match(line):
            marks = line.find("// |")
            writes = (columns[at] for at in columns if marks >= 0 and line[at : at + 1] in ("^", "x"))
            kernel.instructions.append(Instruction(int(m[1], 16), m[2], m[3], m[4], frozenset(writes)))
    return kernels


def hazards(kernel: Kernel) -> list[str]:
    """A line for each instruction that writes an A register of a WGMMA in flight."""
    found: dict[int, str] = {}
    seen: set[tuple[int, InFlight]] = set()
    work = [(0, InFlight())]
    while work:
        index, flight = work.pop()
        while index < len(kernel.instructions) and (index, flight) not in seen:
            seen.add((index, flight))
            instruction = kernel.instructions[index]
            if instruction.opcode.startswith(("HGMMA", "QGMMA", "IGMMA")):
                flight = _issued(flight, instruction)
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(instruction.operands.rsplit(",", 1)[1], 16)
                flight = InFlight(flight.groups[max(0, len(flight.groups) - left) :], flight.uncommitted)
            elif clash := instruction.writes & flight.read():
                registers = ", ".join(f"R{r}" for r in sorted(clash))
                found[index] = f"{instruction}: writes {registers}, which a WGMMA in flight may still read"
            index, *others = _next(kernel, index)
            work += [(other, flight) for other in others]
    return [found[index] for index in sorted(found)]


def _issued(flight: InFlight, instruction: Instruction) -> InFlight:
    a = re.search(r"\bR(\d+)$", instruction.operands.split(",")[1].strip())
    registers = range(int(a[1]), int(a[1]) + 4) if a else ()
    uncommitted = flight.uncommitted.union(registers)
    if "gsb0" in instruction.operands:
        groups = (*flight.groups, uncommitted)
        while len(groups) > MOST_GROUPS:  # a loop without a wait
            groups = (groups[0] | groups[1], *groups[2:])
        return InFlight(groups)
    return InFlight(flight.groups, uncommitted)


def _next(kernel: Kernel, index: int) -> Iterator[int]:
    """Where the warp may go from there; the end of the kernel is an index past it."""
    instruction = kernel.instructions[index]
    name = instruction.opcode.split(".")[0]
    target = TARGET.search(instruction.operands)
    if name in ("EXIT", "RET") and instruction.predicate is None:
        yield len(kernel.instructions)
    elif name == "BRA" and target and target[1] in kernel.labels:
        yield kernel.labels[target[1]]
        if instruction.predicate is not None or instruction.operands.strip() != target[0]:
            yield index + 1
    elif name == "BSYNC":  # where the BSSY of the same barrier says
        yield index + 1
        for other in kernel.instructions:
            if other.opcode.startswith("BSSY") and other.operands.split(",")[0] == instruction.operands:
                yield kernel.labels.get(TARGET.search(other.operands)[1], index + 1)
    else:
        yield index + 1


def disassemble(binary: Path, cuobjdump: Path) -> dict[str, Kernel]:
    """The kernels of a binary; `nvdisasm` lies beside `cuobjdump`."""
    kernels: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        if binary.suffix == ".cubin":
            cubins = [binary.resolve()]
        else:
            command = [str(cuobjdump), "-xelf", "all", str(binary.resolve())]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
            cubins = sorted(Path(folder).glob("*.cubin"))
        for cubin in cubins:
            command = [str(cuobjdump.with_name("nvdisasm")), "-plr", str(cubin)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kernels |= parse_life_ranges(done.stdout.splitlines())
    return kernels


def main() -> int:
    from check_build import find_cuobjdump

    status = 0
    for binary in map(Path, sys.argv[1:]):
        for name, kernel in disassemble(binary, find_cuobjdump()).items():
            found = hazards(kernel)
            print(f"{binary}: {name}: {len(kernel.instructions)} instructions, {len(found)} hazards")
            for line in found:
                print(f"    {line}")
            status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
