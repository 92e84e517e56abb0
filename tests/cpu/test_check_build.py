"""The build check must see each fault it exists for, in text as ptxas and cuobjdump print it."""

import pytest
from check_build import (
    ATTENTION_KERNEL,
    SassReport,
    cpu_problems,
    helper_name,
    kernel_problems,
    parse_compile_log,
    parse_sass,
)

SYMBOL = "_ZN9hopper_fa14forward_kernelINS_13ForwardTraitsEEEvv"
TILE = {"producer_registers": 24, "consumer_registers": 240}
LOG = f"""\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90a'
ptxas info    : Function properties for {SYMBOL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
SASS = f"""\
\t\tFunction : {SYMBOL}
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0380*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;  /* 0x000000f0000079c8 */
        /*0390*/              @!P1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ ; /* 0x01e00000 */
        /*8980*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;         /* 0x00000018000079c8 */
        /*8990*/             @UP0 UTMALDG.4D [UR8], [UR4] ;                  /* 0x00000008040075b4 */
"""


def problems_of(log: str = LOG, sass: str = SASS, tile: dict = TILE, dtype: str = "bf16") -> str:
    reports, warnings = parse_compile_log(log)
    code = parse_sass(sass.splitlines()).get(SYMBOL, SassReport())
    return "; ".join(warnings + kernel_problems(reports[SYMBOL], code, tile, dtype))


def without(opcode: str) -> str:
    return "\n".join(line for line in SASS.splitlines() if opcode not in line)


def test_sound_kernel_passes() -> None:
    assert problems_of() == ""
    report = parse_compile_log(LOG)[0][SYMBOL]
    assert (report.registers, report.stack) == (168, 0)


@pytest.mark.parametrize("opcode", ["LDL.LU", "STL.128"])
def test_local_memory_instruction(opcode: str) -> None:
    assert "1 LDL/STL" in problems_of(
        sass=SASS + f"        /*89a0*/                   {opcode} R4, [R1] ; /* 0x0 */\n"
    )


def test_spills_and_stack() -> None:
    spilled = LOG.replace(
        "0 bytes stack frame, 0 bytes spill stores", "16 bytes stack frame, 12 bytes spill stores"
    )
    assert "spills: 12 bytes stored" in problems_of(spilled)
    assert "16 bytes of stack" in problems_of(spilled)


@pytest.mark.parametrize(
    "warning",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async are serialized due to x",
        "ptxas info    : (C7512) Potential Performance Loss: insufficient registers",
        "ptxas info    : (C7513) Potential Performance Loss: a cause that only its number names",
        "ptxas info    : (C7517) wgmma.wait_group is injected in around line 12",
        "ptxas info    : (C7508) setmaxnreg ignored to maintain minimum register requirement.",
        "ptxas warning : (C7599) Potential Performance Loss: wgmma.mma_async are serialized due to x",
    ],
)
def test_fatal_warning(warning: str) -> None:
    assert warning in problems_of(LOG + warning + "\n")


def test_missing_instructions() -> None:
    assert problems_of(sass=without("HGMMA")) == "no HGMMA"
    assert problems_of(dtype="e4m3") == "no QGMMA"
    assert problems_of(sass=SASS.replace("HGMMA", "QGMMA"), dtype="e4m3") == ""
    assert problems_of(sass=SASS.replace("HGMMA", "QGMMA"), dtype="int8") == "no IGMMA"
    assert problems_of(sass=without("UTMALDG")) == "no UTMALDG"
    assert "setmaxnreg: [240] in SASS, [24, 240] in the tile table" in problems_of(sass=without("DEALLOC"))


def test_setmaxnreg_must_match_tile_table() -> None:
    assert "[32, 240] in the tile table" in problems_of(tile={**TILE, "producer_registers": 32})


def test_unspecialised_kernel_needs_no_setmaxnreg() -> None:
    assert problems_of(sass=without("USETMAXREG"), tile={**TILE, "producer_registers": 0}) == ""


def test_kernel_without_report() -> None:
    log = LOG.split("ptxas info    : Function")[0]
    assert "no ptxas report" in problems_of(log)


def test_names_of_the_kernels_beside() -> None:
    backward = "INS_14BackwardTraitsILNS_5DTypeE0ELi1EEEEEvNS_17BackwardArgumentsE"
    assert helper_name(f"_ZN9hopper_fa9finish_dq{backward}") == "finish_dq<0,1>"
    assert helper_name("_ZN9hopper_fa17quantize_v_kernelILNS_5DTypeE1ELi2EEEvv") == "quantize_v<1,2>"


def test_which_kernel_a_symbol_is() -> None:
    symbol = "_ZN9hopper_fa14forward_kernelINS_13ForwardTraitsILNS_5DTypeE2ELi14EEEEEvNT_9ArgumentsE"
    assert ATTENTION_KERNEL.search(symbol).groups() == ("forward", "2", "14")
    assert not ATTENTION_KERNEL.search(symbol.replace("14forward_kernel", "12prepare_rows"))


def test_cpu_budget(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"forward_64_default": LOG + "cpu seconds: 20.5\n", "quantize": LOG + "cpu seconds: 30.0\n"}
    assert cpu_problems(logs, None) == cpu_problems(logs, 51) == []
    assert "2 units took 50 CPU seconds to compile; most: quantize 30" in capsys.readouterr().out
    assert cpu_problems(logs, 50) == ["compiling took 50 CPU seconds, and the budget is 50"]
    assert cpu_problems(logs | {"backward": LOG}, 60) == ["backward: no CPU seconds in its compile log"]
