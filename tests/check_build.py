"""Build check: is every compiled kernel what its source means it to be?

Reads ptxas's report of each unit (hopper_fa/build_log/*.log) and the SASS of the installed binary, prints one
line a kernel, and exits 1 on spills, local memory, any C75xx message (WGMMA serialised or waited for,
setmaxnreg ignored), a write to a register that a running WGMMA may read (wgmma_hazards.py), or where an
attention kernel lacks tensor-core (HGMMA, QGMMA, IGMMA), TMA load (UTMALDG) or register-reallocation
(USETMAXREG) instructions.

    python tests/check_build.py                   # the installed package
    python tests/check_build.py PACKAGE_DIR       # another folder that holds _C and build_log
    python tests/check_build.py --cpu-budget 700  # and fail where the units took more CPU seconds to compile
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import wgmma_hazards

ATTENTION_FAMILIES = ("forward", "backward")  # each has a tile table in _C, and kernels named FAMILY_kernel

# C7508: setmaxnreg ignored. C7510 to C7515: WGMMA serialised. C7517, C7519: a wait or a fence was missing.
# No flag of ptxas turns them into errors. The texts catch relatives without a number.
FATAL_WARNING = re.compile(r"\(C75\d\d\)|wgmma.*serializ|setmaxnreg.*ignored", re.IGNORECASE)
CPU_SECONDS = re.compile(r"^cpu seconds: ([\d.]+)$", re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
PROPERTIES_OF = re.compile(r"Function properties for (\w+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")

# Of a mangled kernel name: its family, the number of its DType and its row of the family's tile table.
ATTENTION_KERNEL = re.compile(r"(forward|backward)_kernelINS_\d+\w+TraitsILNS_5DTypeE(\d)ELi(\d+)EE")

SASS_FUNCTION = re.compile(r"^\s*Function : (\S+)")
SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(\S*)(.*?);")
COUNTED_OPCODES = {"HGMMA", "QGMMA", "IGMMA", "UTMALDG", "USETMAXREG", "LDL", "STL"}


@dataclass
class PtxasReport:
    """What ptxas said of one kernel; bytes a thread, registers a thread at launch."""

    registers: int = -1
    stack: int = -1
    spill_stores: int = -1
    spill_loads: int = -1


@dataclass
class SassReport:
    """What the SASS of one kernel holds: counts of COUNTED_OPCODES, and setmaxnreg's immediates."""

    opcodes: Counter = field(default_factory=Counter)
    setmaxnreg: set[int] = field(default_factory=set)


def parse_compile_log(text: str) -> tuple[dict[str, PtxasReport], list[str]]:
    """Reports by mangled kernel name, and the fatal warnings, of one translation unit."""
    reports: dict[str, PtxasReport] = {}
    warnings = []
    entry = properties_of = ""
    for line in text.splitlines():
        if FATAL_WARNING.search(line):
            warnings.append(line.strip())
        if m := ENTRY.search(line):
            entry = m[1]
            reports[entry] = PtxasReport()
        elif m := PROPERTIES_OF.search(line):
            properties_of = m[1]
        elif (m := STACK.search(line)) and properties_of in reports:
            report = reports[properties_of]
            report.stack, report.spill_stores, report.spill_loads = map(int, m.groups())
        elif (m := REGISTERS.search(line)) and entry:
            reports[entry].registers = int(m[1])
    return reports, warnings


def parse_sass(lines: Iterable[str]) -> dict[str, SassReport]:
    """Reports by mangled function name, from the lines of `cuobjdump -sass`."""
    functions: dict[str, SassReport] = {}
    current = SassReport()
    for line in lines:
        if m := SASS_FUNCTION.match(line):
            current = functions.setdefault(m[1], SassReport())
        elif (m := SASS_INSTRUCTION.match(line)) and m[1] in COUNTED_OPCODES:
            current.opcodes[m[1]] += 1
            if m[1] == "USETMAXREG":
                current.setmaxnreg.add(int(m[3].split()[-1], 0))
    return functions


def memory_problems(ptxas: PtxasReport, sass: SassReport) -> list[str]:
    """Spills and local memory, which no kernel may have."""
    problems = []
    if ptxas.registers < 0 or ptxas.stack < 0:
        problems.append("no ptxas report")
    if ptxas.spill_stores > 0 or ptxas.spill_loads > 0:
        problems.append(f"spills: {ptxas.spill_stores} bytes stored, {ptxas.spill_loads} loaded")
    if ptxas.stack > 0:
        problems.append(f"local memory: {ptxas.stack} bytes of stack")
    if accesses := sass.opcodes["LDL"] + sass.opcodes["STL"]:
        problems.append(f"local memory: {accesses} LDL/STL")
    return problems


def kernel_problems(ptxas: PtxasReport, sass: SassReport, tile: dict, dtype: str) -> list[str]:
    """What is wrong with an attention kernel; `tile` is its row of _C's tables, `dtype` that of Q."""
    problems = memory_problems(ptxas, sass)
    wanted_products = {"e4m3": ["QGMMA"], "int8": ["IGMMA", "QGMMA"]}.get(dtype, ["HGMMA"])
    problems += [f"no {opcode}" for opcode in wanted_products if not sass.opcodes[opcode]]
    if not sass.opcodes["UTMALDG"]:
        problems.append("no UTMALDG")
    roles = ("producer_registers", "consumer_registers", "dq_registers")
    # Without warp specialisation there is no loading warpgroup, and nothing to reallocate.
    wanted = {tile[role] for role in roles if tile.get(role)} if tile["producer_registers"] else set()
    if not wanted <= sass.setmaxnreg:
        problems.append(f"setmaxnreg: {sorted(sass.setmaxnreg)} in SASS, {sorted(wanted)} in the tile table")
    return problems


def search_locations(package: str) -> list[Path]:
    """Folders an installed package is spread over; empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    return [Path(p) for p in (spec and spec.submodule_search_locations) or []]


def find_binary(package_dir: Path | None) -> Path:
    """The compiled module _C in a folder; None: in the installed package."""
    folders = search_locations("hopper_fa") if package_dir is None else [package_dir]
    for folder in folders:
        for binary in folder.glob("_C.*.so"):
            return binary
    where = ", ".join(map(str, folders)) or "the installed packages"
    raise FileNotFoundError(
        f"no compiled module _C in {where}: run `pip install '.[test]'`, or name its folder."
    )


def find_cuobjdump() -> Path:
    """cuobjdump (with nvdisasm beside it) of PyPI's packages, else of a toolkit on the machine."""
    candidates = [hit for p in search_locations("nvidia") for hit in sorted(p.glob("cu1*/bin/cuobjdump"))]
    candidates += [Path(hit) for hit in [shutil.which("cuobjdump")] if hit]
    candidates += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        "cuobjdump was not found: run `pip install '.[test]'`, or set CUDA_HOME to a CUDA toolkit."
    )


def disassemble(binary: Path, cuobjdump: Path) -> dict[str, SassReport]:
    """SASS reports of every function in a binary."""
    command = [str(cuobjdump), "-sass", str(binary)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return parse_sass(done.stdout.splitlines())


def load_compiled_module(binary: Path) -> ModuleType:
    """hopper_fa._C without the package around it: the check needs no torch."""
    spec = importlib.util.spec_from_file_location("hopper_fa._C", binary)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COLUMNS = "{:<32} {:>4} {:>10} {:>7} {:>5} {:>7} {:>6} {:>5}"


def helper_name(symbol: str) -> str:
    """Name of a kernel beside the attention kernels, with the numbers among its template arguments."""
    name = re.sub(r"^_ZN9hopper_fa\d+|_kernelI.*$|INS_.*$", "", symbol)
    return f"{name}<{','.join(re.findall(r'L(?:NS_5DTypeE|S1_|i|b)([0-9]+)E', symbol))}>"


def check(binary: Path, cpu_budget: float | None = None) -> list[str]:
    """Prints the table of kernels of a _C with build_log/ beside it; returns every problem found.

    Args:
        cpu_budget: CPU seconds that compiling all units may have taken.
    """
    compiled = load_compiled_module(binary)
    dtype_names = {str(code): name for name, code in compiled.DTYPES.items()}
    rows = {family: getattr(compiled, f"{family}_tiles")() for family in ATTENTION_FAMILIES}
    tiles = {
        (family, dtype, str(tile["tile"])): tile
        for family in ATTENTION_FAMILIES
        for tile in rows[family]
        for dtype in tile["dtypes"]
    }
    units = {f"{key[0]}_{tile['head_dim']}_{tile['variant']}" for key, tile in tiles.items()}
    units |= {"quantize"} if compiled.quantize_dtypes() else set()
    logs = {path.stem: path.read_text() for path in (binary.parent / "build_log").glob("*.log")}
    cuobjdump = find_cuobjdump()
    sass = disassemble(binary, cuobjdump)

    problems = [] if tiles else ["the binary holds no kernel"]
    problems += [f"{name}: in the binary, but without a compile log" for name in units - logs.keys()]
    problems += [
        f"{name}: compile log of a unit not in the binary" for name in logs.keys() - units - {"accumulator"}
    ]
    print(f"{binary}: CUDA {compiled.cuda_version}, CUTLASS {compiled.cutlass_version}")
    print(COLUMNS.format("kernel", "regs", "setmaxnreg", "smem", "GMMA", "UTMALDG", "spills", "stack"))
    for unit, log in sorted(logs.items()):
        reports, warnings = parse_compile_log(log)
        problems += [f"{unit}: {warning}" for warning in warnings]
        for symbol, ptxas in reports.items():
            code = sass.get(symbol, SassReport())
            spills = ptxas.spill_stores + ptxas.spill_loads
            attention = ATTENTION_KERNEL.search(symbol)
            key = attention and (attention[1], dtype_names[attention[2]], attention[3])
            if tile := tiles.pop(key, None):
                label = f"{key[0]}_{key[1]}_{tile['head_dim']}_{tile['variant']}"
                found = kernel_problems(ptxas, code, tile, key[1])
                setmaxnreg = "/".join(map(str, sorted(code.setmaxnreg))) or "-"
                products = sum(code.opcodes[opcode] for opcode in ("HGMMA", "QGMMA", "IGMMA"))
                details = (setmaxnreg, tile["shared_memory"], products, code.opcodes["UTMALDG"])
            else:
                label, details = helper_name(symbol), ("-",) * 4
                found = memory_problems(ptxas, code)
            problems += [f"{unit}: {label}: {problem}" for problem in found]
            print(COLUMNS.format(label, ptxas.registers, *details, spills, ptxas.stack))
    problems += [f"no compile log names the {key[0]} kernel of {tile}" for key, tile in tiles.items()]
    for symbol, kernel in wgmma_hazards.disassemble(binary, cuobjdump).items():
        problems += [f"{helper_name(symbol)}: {hazard}" for hazard in wgmma_hazards.hazards(kernel)]
    return problems + cpu_problems(logs, cpu_budget)


def cpu_problems(logs: dict[str, str], budget: float | None) -> list[str]:
    """Prints the CPU seconds of the units; says where one has none, or their sum is above the budget."""
    seconds = {unit: sum(map(float, CPU_SECONDS.findall(log))) for unit, log in logs.items()}
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:3]
    total = sum(seconds.values())
    print(
        f"{len(seconds)} units took {total:.0f} CPU seconds to compile; most: "
        + ", ".join(f"{unit} {seconds[unit]:.0f}" for unit in slowest)
    )
    if budget is None:
        return []
    problems = [f"{unit}: no CPU seconds in its compile log" for unit in seconds if not seconds[unit]]
    if total > budget:
        problems.append(f"compiling took {total:.0f} CPU seconds, and the budget is {budget:.0f}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "package_dir",
        nargs="?",
        type=Path,
        help="folder of _C and build_log; default: the installed hopper_fa",
    )
    parser.add_argument("--cpu-budget", type=float, help="most CPU seconds that compiling may have taken")
    options = parser.parse_args()
    try:
        problems = check(find_binary(options.package_dir), options.cpu_budget)
    except FileNotFoundError as error:
        sys.exit(f"build check: {error}")
    for problem in problems:
        print(f"FAIL {problem}", file=sys.stderr)
    print("build check: " + (f"{len(problems)} problems" if problems else "every kernel is in order"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
