"""What the compiler made of the kernels: the right instructions, no local memory; and the kept table."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from dsv4lab.kernels import sass, table
from dsv4lab.kernels import uses as all_uses
from dsv4lab.kernels.nvfp4_tile_gemm import nvfp4_tile_gemm

from dsv4lab.cli import main
from dsv4lab.emulator import device

ROOT = Path(__file__).resolve().parents[2]
KEPT = table.from_csv(ROOT / "data" / "kernels.csv")
ARCHITECTURES = ("sm_100a", "sm_103a", "sm_90a")
BLACKWELL = ARCHITECTURES[:2]
PRODUCTS = ("grouped_gemm_sm100a", "decode_gemm_sm100a")
HOPPER_PRODUCTS = {"grouped_gemm_sm90a": "hgmma", "decode_gemm_sm90a": "hmma"}
REGISTERS, SHARED_BYTES = 65536, 232448  # of an SM; of a CTA


def code_of(function, *arguments, arch: str = "sm_100a", **options) -> sass.Code:
    """What the one kernel that a function launches was compiled to."""
    with device(arch, executor=lambda launch: None) as gpu:
        function(*arguments, **options)
        (launch,) = gpu.launches
    return sass.read(launch.module.cubin)[launch.kernel]


@pytest.fixture(scope="module")
def tile_gemm():
    q = all_uses.nvfp4(128, 1024)
    return code_of(nvfp4_tile_gemm, q, q, stages=3)


# ---- reading SASS


def test_the_instructions_of_a_block_scaled_gemm(tile_gemm):
    """A step of K = 256 has 4 MMAs of K = 64, 4 x 2 copies of scales, and a load for each of 4 operands."""
    count = tile_gemm.count
    assert (count("UTCOMMA"), count("UTCCP"), count("UTMALDG"), count("LDTM")) == (4, 8, 4, 1)
    assert count("UTMALDG.2D") == count("UTMALDG.3D") == 2 and count("UTMALDG.4D") == 0
    assert tile_gemm.spills == tile_gemm.frame_bytes == 0 and 32 <= tile_gemm.registers <= 128
    assert tile_gemm.names["UTCOMMA"] == 4 and tile_gemm.kernel == "nvfp4_tile_gemm_0"
    assert [i.address for i in tile_gemm.instructions[:3]] == [0, 16, 32]


def test_loops_lie_between_a_branch_back_and_its_target(tile_gemm):
    loops = tile_gemm.loops()
    assert all(loop[-1].target == loop[0].address for loop in loops)
    assert [len(loop) for loop in loops] == sorted(len(loop) for loop in loops)
    main_loop, loads = tile_gemm.loop_with("UTCOMMA"), tile_gemm.loop_with("UTMALDG")
    assert sum(i.name == "UTCOMMA" for i in main_loop) == 4 and sum(i.name == "UTMALDG" for i in loads) == 4
    assert not any(i.name == "UTMALDG" for i in main_loop) and tile_gemm.loop_with("HMMA") == ()


def test_patterns_name_an_opcode_and_some_of_its_modifiers():
    ins = sass.Instruction(32, "@!P0", "F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C", "R1,R2,R3,RZ")
    assert ins.matches("F2FP") and ins.matches("F2FP.E2M1") and ins.matches("F2FP.F32.E2M1")
    assert not ins.matches("F2F") and not ins.matches("F2FP.E4M3") and ins.target is None
    assert str(ins) == "0x0020   @!P0 F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C R1,R2,R3,RZ"
    assert sass.Instruction(0, "", "BRA.U", "UP1,0xbf0").target == 0xBF0
    assert sass.Instruction(0, "", "BRX", "R2,-0x10").target is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_local_memory_is_seen(arch):
    path = Path(__file__).with_name("local_memory.py")
    spec = importlib.util.spec_from_file_location("local_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from cutlass.cute.runtime import from_dlpack

    with device(arch) as gpu:
        x = gpu.from_torch(torch.arange(64.0))
        module.pick(from_dlpack(x), 7)
        assert x[0] == 1  # 1 * 7 % 64 == 7
    code = sass.read(gpu.launches[0].module.cubin)["local_memory_0"]
    assert code.spills > 0 and 256 <= code.frame_bytes < 512


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="nvdisasm refused a cubin"):
        sass.disassemble(b"\x7fELF, but not quite")


def test_without_the_disassembler_a_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sass, "PACKAGE", "no-such-package")
    monkeypatch.setenv("PATH", str(tmp_path))
    sass.nvdisasm.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="pip install no-such-package"):
            sass.nvdisasm()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvdisasm").write_text("#!/bin/sh\n")
        (tmp_path / "bin" / "nvdisasm").chmod(0o755)
        assert sass.nvdisasm() == tmp_path / "bin" / "nvdisasm"
    finally:
        sass.nvdisasm.cache_clear()


# ---- the kept table


def test_the_table_has_every_kernel_for_both_architectures():
    assert len({row.key for row in KEPT}) == len(KEPT)
    named = {arch: {(r.kernel, r.configuration) for r in KEPT if r.arch == arch} for arch in ARCHITECTURES}
    assert named["sm_100a"] == named["sm_103a"]
    others = {"quantize_rows", "amax", "dequantize", "swizzle"}
    assert {kernel for kernel, _ in named["sm_100a"]} == {*PRODUCTS, *others}
    assert {kernel for kernel, _ in named["sm_90a"]} == {*HOPPER_PRODUCTS, *others}


def wrong(row: table.Row) -> list[str]:
    """What a kernel must not have, or must have and has not."""
    cute = row.arch in BLACKWELL
    quantizes = "output=nvfp4" in row.configuration or (
        row.kernel == "quantize_rows" and "output=" not in row.configuration
    )
    rules = {
        "no local memory": row.spills == row.stack_bytes == 0 or row.kernel in HOPPER_PRODUCTS,
        "no local memory in the main loop": row.loop_spills == 0,
        "registers of an SM": row.registers * row.threads <= REGISTERS,
        "shared memory of a CTA": row.shared_bytes <= SHARED_BYTES,
        "E2M1 conversions": (row.to_e2m1 > 0) == (quantizes and cute),
    }
    if mma := HOPPER_PRODUCTS.get(row.kernel):
        rules |= {
            "the architecture with wgmma": row.arch == "sm_90a",
            "MMAs and TMA": min(getattr(row, mma), row.utmaldg) > 0,
        }
    if row.kernel in PRODUCTS:
        rules |= {
            "an architecture with FP4": cute,
            "a stage's MMAs, of K = 64 each": row.utcomma % 4 == 0,
            "MMAs, scale copies, TMA, sums": min(row.utcomma, row.utccp, row.utmaldg, row.ldtm) > 0,
        }
    if row.kernel in (*PRODUCTS, *HOPPER_PRODUCTS):
        pipelined = row.stages is not None and row.stages >= 2
        rules["a pipeline"] = pipelined and row.main_loop is not None
    return [rule for rule, holds in rules.items() if not holds]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_kernel_has_what_it_is_for_and_no_spills(arch):
    found = {" ".join(row.key): wrong(row) for row in KEPT if row.arch == arch}
    assert found and {row: rules for row, rules in found.items() if rules} == {}


def test_rules_can_be_broken():
    row = next(row for row in KEPT if row.kernel == "grouped_gemm_sm100a")
    assert wrong(row) == []
    for changes, rule in (
        ({"spills": 1}, "no local memory"), ({"loop_spills": 1}, "no local memory in the main loop"),
        ({"stack_bytes": 8}, "no local memory"),
        ({"registers": 400}, "registers of an SM"), ({"shared_bytes": 233000}, "shared memory of a CTA"),
        ({"utcomma": 6}, "a stage's MMAs, of K = 64 each"), ({"stages": 1}, "a pipeline"),
        ({"utccp": 0}, "MMAs, scale copies, TMA, sums"), ({"arch": "sm_90a"}, "an architecture with FP4"),
        ({"to_e2m1": 1 - (row.to_e2m1 > 0)}, "E2M1 conversions"),
    ):  # fmt: skip
        assert wrong(dataclasses.replace(row, **changes)) == [rule], rule
    for kernel, mma in HOPPER_PRODUCTS.items():
        row = next(row for row in KEPT if row.kernel == kernel)
        assert wrong(row) == []
        assert wrong(dataclasses.replace(row, **{mma: 0})) == ["MMAs and TMA"]
        assert wrong(dataclasses.replace(row, main_loop=None)) == ["a pipeline"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request):
    """Rows made now, for some of the operations."""
    wanted = {
        "sm_100a": ("linear 16x1", "linear 4096x4096x512", "rmsnorm_quantize 16x", "dequantize 16x"),
        "sm_103a": ("swiglu of shared expert 16x", "swizzle 16x"),
        "sm_90a": ("linear 16x1", "swiglu_quantize 16x"),
    }[request.param]
    sizes = (("flash", 16), ("flash", 4096))

    def some():
        return (use for use in all_uses.uses(sizes) if any(f"flash {name}" in use.name for name in wanted))

    return table.make_rows(request.param, some)


def without_use(row: table.Row) -> table.Row:
    """The first operation of some need not be the first of all."""
    return dataclasses.replace(row, use="")


def test_the_table_is_up_to_date(made):
    """If not: dsv4lab kernels --arch sm_100a,sm_103a,sm_90a --csv data/kernels.csv"""
    kept = {row.key: without_use(row) for row in KEPT}
    assert len(made) >= 3
    assert [without_use(row) for row in made] == [kept.get(row.key) for row in made]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_of_the_table_is_up_to_date(arch):
    assert table.make_rows(arch, all_uses.uses) == [row for row in KEPT if row.arch == arch]


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [KEPT[0], dataclasses.replace(KEPT[-1], stages=None, configuration='a "b", c')]
    (tmp_path / "t.csv").write_text(table.as_csv(rows))
    assert table.from_csv(tmp_path / "t.csv") == rows


# ---- the command


@pytest.fixture
def few(monkeypatch):
    """Only one operation."""
    one = [use for use in all_uses.uses((("nano", 1),)) if "nano swizzle" in use.name]
    monkeypatch.setattr(all_uses, "uses", lambda sizes=(): iter(one))


def test_the_command_prints_writes_and_gives_rows(few, tmp_path, capsys):
    assert main(["kernels", "--csv", str(tmp_path / "t.csv")]) == 0
    title, header, _, line = capsys.readouterr().out.splitlines()
    (row,) = table.from_csv(tmp_path / "t.csv")
    assert title == f"sm_100a: 1 kernels, nvidia-cutlass-dsl {row.cutlass_dsl}"
    assert header.split()[:3] == ["kernel", "regs", "shared"]
    zeros = "0 0 0 0"
    assert (
        line.split()
        == f"swizzle {row.configuration} {row.registers} 0 0 0 {row.instructions} {zeros}".split()
    )
    assert main(["kernels", "--json", "--arch", "sm_103a,sm_90a"]) == 0
    printed = json.loads(capsys.readouterr().out)["rows"]
    assert [r["arch"] for r in printed] == ["sm_103a", "sm_90a"]
    assert set(printed[0]) == set(table.FIELDS) and printed[0]["kernel"] == "swizzle"


@pytest.mark.parametrize("arguments, message", [
    (("--arch", "sm_100a,sm_80"), "must be of sm_100a, sm_103a, sm_90a, got 'sm_80'"),
    (("--sizes", "flash"), "must be such as flash:16, with nano, flash or pro, got 'flash'"),
    (("--sizes", "huge:1"), "got 'huge:1'"),
    (("--sizes", "nano:0"), "got 'nano:0'"),
    (("--csv", "/no/such/t.csv"), "/no/such: no such folder"),
    (("--cost", "--shapes", "4x32"), "--shapes names no product"),
    (("--cost", "--shapes", "nano:0"), "shape 'nano:0' must be one of"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["kernels", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_uses_are_named_by_what_they_take():
    names = [use.name for use in all_uses.uses((("flash", 16), ("nano", 1)))]
    assert "flash linear 16x4096x1024" in names and "flash wo_a 16x4096x1024x8" in names
    assert "flash experts 16x2048x4096x256" in names and "nano mhc_rmsnorm_quantize 1x256" in names
    few = list(all_uses.uses((("nano", 1),)))
    assert {use.weight_only for use in few if "linear" in use.name} == {True, False} and len(few) < len(names)
