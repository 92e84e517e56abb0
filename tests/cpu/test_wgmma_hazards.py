"""The hazard check must see a write to a running product's registers, in text as nvdisasm prints it."""

import pytest
from wgmma_hazards import hazards, parse_life_ranges

REGISTERS = 40
# A product of A in R28 to R31, added to D in R24 to R27, and the wait for it.
PRODUCT = ("QGMMA.64x8x32.F32.E4M3.E4M3 R24, R28, gdesc[UR4], R24, gsb0", range(24, 28))
OTHER_PRODUCT = ("HGMMA.64x8x16.F32.BF16 R20, R32, gdesc[UR4], R20, gsb0", range(20, 24))
WAIT = ("WARPGROUP.DEPBAR.LE gsb0, 0x0", ())
WAIT_FOR_ALL_BUT_ONE = ("WARPGROUP.DEPBAR.LE gsb0, 0x1", ())
LOAD = ("LDS.64 R30, [R2]", (30, 31))
EXIT = ("EXIT", ())


def listing(*lines: tuple[str, tuple[int, ...]] | str) -> str:
    """What `nvdisasm -plr` prints of a kernel: (instruction, registers that it writes), or a label."""
    header = "".join(f" {register}" for register in range(REGISTERS))
    ends = [
        len(header[: header.index(f" {r} ") + 1 + len(str(r))]) if r < 39 else len(header) for r in range(40)
    ]
    text = [".text.kernel:" + " " * 67 + "// |", " " * 80 + "// |   #" + header + " |"]
    for number, line in enumerate(lines):
        if isinstance(line, str):
            text.append(f"{line}:" + " " * 60 + "// +....")
            continue
        marks = ["v" if column == ends[2] else " " for column in range(len(header) + 1)]
        for register in line[1]:
            marks[ends[register]] = "^" if register % 2 else "x"
        instruction = f"        /*{number * 16:04x}*/                   {line[0]} ;"
        text.append(f"{instruction:<80}// |  {len(line[1]):2}{''.join(marks)[1:]} |")
    return "\n".join(text)


def found(*lines: tuple[str, tuple[int, ...]] | str) -> list[str]:
    return hazards(parse_life_ranges(listing(*lines).splitlines())["kernel"])


def test_a_write_after_the_wait_passes() -> None:
    assert found(PRODUCT, WAIT, LOAD, EXIT) == []


def test_a_write_before_the_wait_fails() -> None:
    (line,) = found(PRODUCT, LOAD, WAIT, EXIT)
    assert line.startswith("0x10 LDS.64 R30, [R2]: writes R30, R31")


def test_the_wait_may_be_for_another_product() -> None:
    assert len(found(PRODUCT, OTHER_PRODUCT, WAIT, LOAD, EXIT)) == 0
    assert len(found(PRODUCT, OTHER_PRODUCT, WAIT_FOR_ALL_BUT_ONE, LOAD, EXIT)) == 0
    assert len(found(OTHER_PRODUCT, PRODUCT, WAIT_FOR_ALL_BUT_ONE, LOAD, EXIT)) == 1


def test_products_of_one_group_are_waited_for_together() -> None:
    first = (PRODUCT[0].replace(", gsb0", ""), PRODUCT[1])
    assert len(found(first, LOAD, OTHER_PRODUCT, WAIT, EXIT)) == 1
    assert found(first, OTHER_PRODUCT, WAIT, LOAD, EXIT) == []


@pytest.mark.parametrize("branch", ["@P0 BRA `(.L_x_1)", "BRA.U UP0, `(.L_x_1)"])
def test_a_write_of_the_next_round_of_a_loop(branch: str) -> None:
    assert len(found(".L_x_1", LOAD, PRODUCT, (branch, ()), WAIT, EXIT)) == 1
    assert found(".L_x_1", LOAD, PRODUCT, WAIT, (branch, ()), EXIT) == []


def test_a_branch_around_the_wait() -> None:
    assert len(found(PRODUCT, ("@!P0 BRA `(.L_x_1)", ()), WAIT, ".L_x_1", LOAD, EXIT)) == 1
    assert found(PRODUCT, ("BRA `(.L_x_1)", ()), LOAD, ".L_x_1", WAIT, EXIT) == []


def test_operands_in_shared_memory_are_no_registers() -> None:
    product = ("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", range(24, 28))
    assert found(product, LOAD, WAIT, EXIT) == []
