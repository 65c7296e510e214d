"""The PTX parser: real kernels against a regex over their text, every operand form, broken inputs."""

from __future__ import annotations

import math
import re
import time
from collections import Counter

import pytest

from dsv4lab.emulator import ptx
from dsv4lab.emulator.ptx import (
    Group,
    Guard,
    Immediate,
    Label,
    Memory,
    Not,
    Pair,
    PtxError,
    Relocation,
    Sink,
    Special,
    Symbol,
    Targets,
    Vector,
)

HEADER = ".version 8.8\n.target sm_100a\n.address_size 64\n"
REAL = [
    ("sm_90a", "scale"),
    ("sm_100a", "scale"),
    ("sm_90a", "hopper_gemm"),
    ("sm_100a", "blackwell_gemm"),
]


@pytest.fixture(scope="module")
def texts(ptx_kernels):
    return {key: ptx_kernels.ptx_of(*key) for key in REAL}


def entry(body: str, declarations: str = "", parameters: str = "") -> ptx.Function:
    source = f"{HEADER}{declarations}\n.visible .entry k({parameters})\n{{\n{body}\n}}\n"
    return ptx.parse(source).function("k")


REGISTERS = ".reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<5>; "


def only(statement: str, declarations: str = "", parameters: str = "") -> ptx.Instruction:
    """The one instruction of a kernel that has nothing else."""
    (found,) = entry(REGISTERS + statement, declarations, parameters).instructions
    return found


# Real kernels ----------------------------------------------------------------------------------------------


def statements(text: str) -> list[str]:
    """Instructions of the kernel, found without the parser: what stands between semicolons."""
    text = re.sub(r"//[^\n]*", "", text)
    body = text[text.index("{", text.index(".reqntid")) :]
    body = re.sub(r"^\s*[$\w]+:(?!:)", "", body, flags=re.MULTILINE)
    body = re.sub(r"^\s*[{}]\s*$", "", body, flags=re.MULTILINE)
    found = [" ".join(part.split()).lstrip("{ ") for part in body.split(";")]
    return [part for part in found if part and part[0] not in ".}"]


@pytest.mark.parametrize("key", REAL, ids="-".join)
def test_real_kernel_has_every_instruction(texts, key):
    text = texts[key]
    function = ptx.parse(text).functions[-1]
    expected = statements(text)
    assert [i.text for i in function.instructions] == expected
    opcodes = [re.match(r"(?:@!?[%\w]+ )?([\w.:]+)", s)[1] for s in expected]
    assert Counter(i.opcode for i in function.instructions) == Counter(opcodes)
    assert [".".join((i.op, *i.modifiers)) for i in function.instructions] == opcodes
    assert [i.guard is not None for i in function.instructions] == [s[0] == "@" for s in expected]
    assert len(expected) > 50


@pytest.mark.parametrize("key", REAL, ids="-".join)
def test_real_kernel_lines_and_labels(texts, key):
    lines = texts[key].splitlines()
    function = ptx.parse(texts[key]).functions[-1]
    branches = 0
    for instruction in function.instructions:
        assert instruction.opcode in lines[instruction.line - 1]
        for operand in instruction.operands:
            if not isinstance(operand, Label):
                continue
            branches += 1
            # The label stands between the instruction in front of the target and the target itself.
            first = function.instructions[operand.target - 1].line if operand.target else 0
            between = lines[first : function.instructions[operand.target].line]
            assert any(line.strip().startswith(operand.name.split("@")[0] + ":") for line in between)
    assert branches == len(re.findall(r"\bbra(?:\.uni)?\s", texts[key])) > 3


@pytest.mark.parametrize("key", REAL, ids="-".join)
def test_real_kernel_registers_and_parameters(texts, key):
    text = texts[key]
    module = ptx.parse(text)
    function = module.functions[-1]
    assert module.target == (key[0],) and module.address_size == 64
    assert f".version {module.version[0]}.{module.version[1]}\n" in text
    body = re.sub(r"\.reg[^;]*;", "", text[text.index(".reqntid") :])
    named = set(re.findall(r"%(?:p|r|rs|rd|f|fd|rq)\d+\b", body))
    assert {r.name for r in function.registers if r.name.startswith("%") and "SP" not in r.name} == named
    assert [r.index for r in function.registers] == list(range(len(function.registers)))
    kinds = {"p": "pred", "r": "b32", "rs": "b16", "rd": "b64"}
    for register in function.registers:
        numbered = re.fullmatch(r"%([a-z]+)\d+", register.name)
        assert numbered is None or kinds[numbered[1]] == register.type
    header = text[text.index(".entry") : text.index(".reqntid")]
    sizes = [int(n or 4) for n in re.findall(r"\.param [^\n,]*?(?:\[(\d+)\])?,?\n", header)]
    assert [p.size for p in function.parameters] == sizes
    end = 0
    for parameter in function.parameters:
        assert parameter.offset % parameter.align == 0 and 0 <= parameter.offset - end < parameter.align
        end = parameter.offset + parameter.size
    assert function.parameter_bytes == end
    assert function.directives["reqntid"] == (128, 1, 1)


def test_wait_loops_of_inline_asm_are_renamed_apart(texts):
    text = texts["sm_100a", "blackwell_gemm"]
    function = ptx.parse(text).functions[-1]
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.strip() == "{" and n > 30]
    assert len(lines) > 2
    names = {r.name for r in function.registers if r.name.startswith("P1")}
    assert names == {f"P1@{line}" for line in lines}
    for index, instruction in enumerate(function.instructions):
        if instruction.op == "bra" and instruction.operands[0].name.startswith("LAB_WAIT"):
            assert function.instructions[instruction.operands[0].target].opcode.startswith(
                "mbarrier.try_wait"
            )
            assert instruction.operands[0].target == index - 2


def test_selected_instructions_of_the_blackwell_gemm(texts):
    function = ptx.parse(texts["sm_100a", "blackwell_gemm"]).functions[-1]
    by_op = {}
    for instruction in function.instructions:
        by_op.setdefault(instruction.opcode, []).append(instruction)
    copy = next(found for opcode, found in by_op.items() if opcode.startswith("cp.async.bulk.tensor"))
    target, source, barrier, _ = copy[0].operands
    assert isinstance(target, Memory) and target.coordinates is None
    assert isinstance(source, Memory) and len(source.coordinates) == 2 + ("3d" in copy[0].modifiers)
    assert isinstance(barrier, Memory)
    mma = next(v for k, v in by_op.items() if k.startswith("tcgen05.mma"))
    assert len(mma) == 4  # 64 of K in steps of 16
    assert mma[0].operands[-1].type == "pred"
    load = next(v for k, v in by_op.items() if k.startswith("tcgen05.ld"))
    assert len(load[0].operands[0]) == 32
    assert ptx.parse(texts["sm_100a", "blackwell_gemm"]).globals[0].name == "__dynamic_shmem__0"


def test_a_call_of_vprintf(texts):
    module = ptx.parse(texts["sm_100a", "scale"])
    function = module.functions[-1]
    (call,) = [i for i in function.instructions if i.op == "call"]
    (line,) = [
        n for n, text in enumerate(texts["sm_100a", "scale"].splitlines(), 1) if "callseq 0, 0" in text
    ]
    results, name, arguments = call.operands
    assert name == Symbol("vprintf", "func")
    assert results == Group((Symbol(f"retval0@{line}", "param"),))
    assert arguments == Group((Symbol(f"param0@{line}", "param"), Symbol(f"param1@{line}", "param")))
    assert module.globals[0].initializer == b"small: %f\n\n\0"
    vprintf = module.functions[0]
    assert (vprintf.name, vprintf.defined, vprintf.linkage) == ("vprintf", False, "extern")
    assert [p.size for p in vprintf.parameters] == [8, 8] and vprintf.results[0].size == 4
    with pytest.raises(KeyError, match="vprintf"):
        module.function("vprintf")


def test_a_thousand_lines_in_well_under_200_ms(texts):
    text = texts["sm_100a", "blackwell_gemm"]
    start = text.index(".visible .entry")
    name = ptx.parse(text).functions[-1].name
    copies = [text[start:].replace(name, f"k{i}") for i in range(4)]
    source = text[:start] + "\n".join(copies)
    assert len(source.splitlines()) > 1000
    took = []
    for _ in range(3):
        begin = time.process_time()
        module = ptx.parse(source)
        took.append(time.process_time() - begin)
    assert len(module.functions) == 4
    assert min(took) < 0.2, took


# Operands --------------------------------------------------------------------------------------------------


def operands(statement: str, **kwargs):
    return only(statement, **kwargs).operands


def test_registers_and_the_parts_of_an_opcode():
    found = only("add.s32 %r2, %r1, %r2;")
    assert (found.op, found.modifiers, found.opcode) == ("add", ("s32",), "add.s32")
    assert [(r.name, r.type, r.index) for r in found.operands] == [
        ("%r2", "b32", 0), ("%r1", "b32", 1), ("%r2", "b32", 0)
    ]  # fmt: skip
    assert found.text == "add.s32 %r2, %r1, %r2" and found.guard is None
    long = only("fence.proxy.async.shared::cta;")
    assert (long.op, long.modifiers) == ("fence", ("proxy", "async", "shared::cta"))


def test_a_range_ends_before_its_count():
    assert only("mov.b32 %r8, 1;").operands[0].name == "%r8"
    for name in ("%r9", "%r08", "%r", "%rx1"):
        with pytest.raises(PtxError, match=f"{name} is not declared"):
            only(f"mov.b32 {name}, 1;")


@pytest.mark.parametrize(
    ("text", "bits", "type_", "value"),
    [
        ("7", 7, "int", 7),
        ("-7", -7, "int", -7),
        ("0x1F", 31, "int", 31),
        ("0x1FU", 31, "int", 31),
        ("017", 15, "int", 15),
        ("0b101", 5, "int", 5),
        ("4611756662049538048", 4611756662049538048, "int", 4611756662049538048),
        ("0f3FC00000", 0x3FC00000, "f32", 1.5),
        ("0F7F800000", 0x7F800000, "f32", math.inf),
        ("-0f3FC00000", 0xBFC00000, "f32", -1.5),
        ("0d3FF8000000000000", 0x3FF8000000000000, "f64", 1.5),
        ("-0d3FF8000000000000", 0xBFF8000000000000, "f64", -1.5),
        ("1.5", 0x3FF8000000000000, "f64", 1.5),
        ("-25e-1", 0xC004000000000000, "f64", -2.5),
        ("WARP_SZ", 32, "int", 32),
    ],
)
def test_immediates(text, bits, type_, value):
    found = operands(f"mov.b64 %rd1, {text};")[1]
    assert found == Immediate(bits, type_)
    assert found.value == value


@pytest.mark.parametrize(
    "name", ["%tid.x", "%ctaid.z", "%laneid", "%cluster_ctarank", "%clock64", "%lanemask_lt"]
)
def test_special_registers(name):
    assert operands(f"mov.u32 %r1, {name};")[1] == Special(name)


def test_guards():
    function = entry(REGISTERS + "@%p1 ret; @!%p2 trap; ret;")
    guards = [i.guard for i in function.instructions]
    p1, p2 = function.registers
    assert guards == [Guard(p1, False), Guard(p2, True), None]
    with pytest.raises(PtxError, match="expected a predicate register"):
        only("@%r1 ret;")


def test_vectors_sinks_and_pairs():
    vector, _ = operands("ld.global.v4.b32 {%r1, _, %r2, %r3}, [%rd1];")
    assert [getattr(e, "name", "_") for e in vector] == ["%r1", "_", "%r2", "%r3"] and len(vector) == 4
    unpacked = operands("mov.b64 {%r1, _}, %rd1;")
    assert unpacked[0].elements[1] == Sink()
    nested = operands("tensor.op {{%r1, %r2}, {%r3, 4}};")[0]
    assert nested.elements[1].elements[1] == Immediate(4)
    (pair, mask) = operands("elect.sync %r1|%p1, -1;")
    assert isinstance(pair, Pair) and (pair.first.name, pair.second.name) == ("%r1", "%p1")
    assert mask == Immediate(-1)
    (sunk, _) = operands("elect.sync _|%p1, -1;")
    assert sunk.first == Sink()
    result, _, _, negated = operands("setp.eq.and.s32 %p1, %r1, 0, !%p1;")
    assert negated == Not(result)


@pytest.mark.parametrize(
    ("text", "offset"), [("[%rd1]", 0), ("[%rd1+16]", 16), ("[%rd1+-16]", -16), ("[%rd1 - 0x10]", -16)]
)
def test_memory_at_a_register(text, offset):
    memory = operands(f"ld.global.b32 %r1, {text};")[1]
    assert (memory.base.name, memory.offset, memory.coordinates) == ("%rd1", offset, None)


def test_memory_at_names_and_numbers():
    parameters = ".param .u32 n, .param .align 8 .b8 t[12]"
    assert operands("ld.param.b32 %r1, [t+8];", parameters=parameters)[1] == Memory(Symbol("t", "param"), 8)
    shared = ".extern .shared .align 1024 .b8 s[];"
    assert operands("ld.shared.b32 %r1, [s];", declarations=shared)[1] == Memory(Symbol("s", "shared"))
    assert operands("mov.b32 %r1, s+4;", declarations=shared)[1] == Symbol("s", "shared", 4)
    assert operands("ld.shared.b32 %r1, [1024];")[1] == Memory(Immediate(1024))


def test_tensor_coordinates():
    tensor, barrier = operands(
        "cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%rd1, {%r1, 0, %r2}], [%r3+8];"
    )
    assert tensor.base.name == "%rd1" and tensor.coordinates.elements[1] == Immediate(0)
    assert isinstance(tensor.coordinates, Vector) and len(tensor.coordinates) == 3
    assert (barrier.base.name, barrier.offset) == ("%r3", 8)


def test_branches_know_their_targets_in_either_direction():
    function = entry(REGISTERS + "A: bra B; add.s32 %r1, %r1, 1; B: @%p1 bra A; C: ret; END:")
    targets = [i.operands[0] for i in function.instructions if i.op == "bra"]
    assert targets == [Label("B", 2), Label("A", 0)]
    assert function.labels == {"A": 0, "B": 2, "C": 3, "END": 4}


def test_branch_tables():
    function = entry(REGISTERS + "T: .branchtargets L0, L1, L0; @%p1 brx.idx %r1, T; L0: ret; L1: trap;")
    assert function.instructions[0].operands[1] == Targets("T", (1, 2, 1))


def test_calls_through_a_prototype():
    found = only(
        "P: .callprototype (.param .b32 _) _ (.param .b64 _); { .param .b64 a; .param .b32 r;"
        " call (r), %rd1, (a), P; }"
    )
    assert found.operands[3] == Symbol("P", "prototype")
    assert found.operands[0] == Group((Symbol("r@7", "param"),))


def test_blocks_have_names_of_their_own():
    body = """.reg .b32 x; .reg .pred p;
    mov.b32 x, 1;
    {
        .reg .b32 x; .local .align 8 .b8 m[8];
        L: mov.b32 x, 2;
        setp.eq.b32 p, x, 2;
        { .reg .b32 x; mov.b32 x, m; bra L; }
    }
    { .reg .b32 x; L: mov.b32 x, 3; bra L; }
    mov.b32 x, 4;"""
    function = entry(body)
    written = [i.operands[0].name for i in function.instructions if i.op == "mov"]
    assert written == ["x", "x@9", "x@13", "x@15", "x"]
    branches = [i.operands[0] for i in function.instructions if i.op == "bra"]
    assert branches == [Label("L@9", 1), Label("L@15", 5)]
    assert function.labels == {"L@9": 1, "L@15": 5}
    assert function.instructions[2].operands[0].name == "p"
    assert function.variables[0].name == "m@9" and function.instructions[3].operands[1].name == "m@9"
    two = entry("{ .reg .b32 x; mov.b32 x, 1; } { .reg .b32 x; mov.b32 x, 2; }")
    assert [i.operands[0].name for i in two.instructions] == ["x@7", "x@7.2"]


# Declarations ----------------------------------------------------------------------------------------------


def test_parameters_are_laid_out_by_their_alignment():
    parameters = (
        ".param .u8 a, .param .align 64 .b8 d[128], .param .u64 .ptr .global .align 16 p, .param .b16 h"
    )
    function = entry("ret;", parameters=parameters)
    assert [(p.name, p.size, p.align, p.offset) for p in function.parameters] == [
        ("a", 1, 1, 0), ("d", 128, 64, 64), ("p", 8, 8, 192), ("h", 2, 2, 200)
    ]  # fmt: skip
    assert function.parameter_bytes == 202


def test_variables_and_their_initial_values():
    module = ptx.parse(
        HEADER
        + """.global .align 4 .b8 a[6] = {1, -2, 0x7f};
        .const .f32 f[2] = {0f3F800000, 2.5};
        .visible .global .u16 m[2][3] = {{1, 2}, {3}};
        .global .u64 p[2] = {a+4, generic(a)};
        .weak .global .b32 x = 5, y;
        .shared .align 16 .b8 s[32];
        .global .b16 open[] = {7, 8};"""
    )
    found = {v.name: v for v in module.globals}
    assert found["a"].initializer == bytes([1, 254, 127, 0, 0, 0]) and found["a"].align == 4
    assert found["f"].initializer == bytes.fromhex("0000803f00002040") and found["f"].space == "const"
    assert found["m"].initializer == bytes.fromhex("010002000000030000000000")
    assert found["m"].shape == (2, 3) and found["m"].linkage == "visible"
    assert found["p"].relocations == (Relocation(0, 8, "a", 4, False), Relocation(8, 8, "a", 0, True))
    assert found["x"].initializer == bytes([5, 0, 0, 0]) and found["y"].initializer is None
    assert (found["s"].size, found["s"].align, found["s"].initializer) == (32, 16, None)
    assert found["open"].shape == (2,) and found["open"].size == 4


def test_directives_of_a_function():
    source = HEADER + (
        ".entry k() .reqntid 64 .minnctapersm 2 .maxnreg 96 .explicitcluster .reqnctapercluster 2, 1\n"
        '.pragma "x"; { .pragma "nounroll"; ret; }\n.func (.reg .b32 r) f(.reg .b32 a) { mov.b32 r, a; ret; }'
    )
    module = ptx.parse(source)
    assert module.functions[0].directives == {
        "reqntid": (64, 1, 1),
        "minnctapersm": (2,),
        "maxnreg": (96,),
        "explicitcluster": (),
        "reqnctapercluster": (2, 1, 1),
        "pragma": ("x",),
    }
    assert module.functions[1].kind == "func"
    assert [o.name for o in module.functions[1].instructions[0].operands] == ["r", "a"]


def test_comments_and_debug_directives_are_skipped():
    source = (
        "// first\n/* two\nlines */\n"
        + HEADER
        + '.file 1 "/a//b.py"\n.entry k()\n{\n\t.loc 1 3 4, inlined_at 1 2\n'
        "\tret; // done; not\n/* ret; */\n}\n\t.section\t.debug_abbrev\n\t{\n.b8 1\nL: .b32 x\n{}\n\t}\n"
    )
    (found,) = ptx.parse(source).function("k").instructions
    assert (found.text, found.line) == ("ret", 11)


# Broken inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message", "line"),
    [
        ("mov.b32 %r1, 1", "no ';' ends this instruction", 8),
        ("mov.b32 %r1 1;", "expected ',', got '1'", 8),
        ("mov.b32 %r1, ;", "expected an operand, got ';'", 8),
        ("mov.b32 %q1, 1;", "%q1 is not declared", 8),
        ("mov.b32 %r1, %tid.w;", "%tid.w is not declared", 8),
        ("bra NOWHERE;", "NOWHERE is not declared", 8),
        ("{ L: ret; } bra L;", "L is not declared", 8),
        ("L: ret;\nL: ret;", "label L stands twice", 9),
        (".reg .b32 %r<4>;", "register %r is declared twice", 8),
        (".local .b8 m[4];\n.local .b8 m[4];", "m is declared twice", 9),
        (".reg .b33 x;", "expected a type, got '.b33'", 8),
        (".local .pred m;", "a predicate cannot lie in memory", 8),
        (".local .align 3 .b8 m;", "an alignment is a power of two, got 3", 8),
        (".frobnicate 3;", "expected a directive of a function's body, got '.frobnicate'", 8),
        ("ld.global.b32 %r1, [%rd1;", r"expected ']', got ';'", 8),
        ("ld.global.b32 %r1, [%tid.x];", "expected an address, got '%tid.x'", 8),
        ("mov.b64 {%r1, %r2, %rd1;", "expected ',', got ';'", 8),
        ("add.s32 %r1, %r1, 12abc;", "no PTX token starts with '1'", 8),
        ("mov.b32 %r1, 0f3F80;", "no PTX token starts with '0'", 8),
        ("mov.b32 %r1, #;", "no PTX token starts with '#'", 8),
        ("setp.eq.and.s32 %p1, %r1, 0, !%r2;", "expected a predicate register, got '%r2'", 8),
        ("elect.sync %r1|3, -1;", "expected a register, got '3'", 8),
        ("T: .branchtargets X;", "expected a label, got 'X'", 8),
        ("{ ret;", "expected an instruction, got 'the end of the text'", 9),
        (", ret;", "expected an instruction, got ','", 8),
    ],
)
def test_what_cannot_be_read_is_one_error_with_its_line(body, message, line):
    with pytest.raises(PtxError, match=message) as caught:
        entry(REGISTERS + "\n" + body)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"line {line}: ")
    assert caught.value.text.strip() in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "expected '.version', got 'the end of the text'"),
        (".version 8\n", "expected a version such as 8.8, got '8'"),
        (".version 8.8\n.target sm_100a\n.address_size 32\n", "only 64-bit addresses"),
        (HEADER + ".frob x;", "expected a declaration, got '.frob'"),
        (HEADER + ".entry k() .frob 1 { ret; }", "expected a directive of a function, got '.frob'"),
        (HEADER + ".entry k() .reqntid 1, 2, 3, 4 { ret; }", "takes at most 3 values"),
        (HEADER + ".entry k(.param .b32 a .param .b32 b) { ret; }", "expected ',', got '.param'"),
        (HEADER + ".global .b8 a[1] = {1, 2};", "more initial values than the 1 elements"),
        (HEADER + ".global .b32 a = 0f3F800000;", "a float cannot initialise b32"),
        (HEADER + ".section .debug {", "expected '}'"),
    ],
)
def test_broken_modules(source, message):
    with pytest.raises(PtxError, match=re.escape(message)):
        ptx.parse(source)


def test_an_error_of_the_parser_is_a_value_error_and_one_of_the_emulator():
    from dsv4lab.emulator import EmulatorError

    with pytest.raises(EmulatorError) as caught:
        ptx.parse("x")
    assert isinstance(caught.value, ValueError)
