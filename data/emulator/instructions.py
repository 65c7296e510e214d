"""Single PTX instructions on random bits: what they give in the emulator, and on a GPU through its driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dsv4lab.emulator import device
from dsv4lab.emulator.lane_types import bit_width

THREADS, CTAS = 256, 32
COUNT = THREADS * CTAS


@dataclass(frozen=True)
class Trial:
    """One instruction.

    Args:
        text: with {d} for its result and {a}, {b}, {c}, {e} for its operands.
        result: type of the result, "pred" for a predicate.
        operands: their types.
        kind: "bits" where the PTX ISA defines every bit, "approx" where it gives an error bound.
    """

    text: str
    result: str
    operands: tuple[str, ...]
    kind: str = "bits"


def trials() -> list[Trial]:
    """Everything that sm_90 shares with sm_100 and whose result depends on its operands alone."""
    return [*_integer(), *_bits(), *_floating(), *_conversions(), *_predicates(), *_approximate()]


def _three(ops: str, types: str, names: str = "{d}, {a}, {b}", count: int = 2) -> Iterator[Trial]:
    for op in ops.split():
        for type_ in types.split():
            yield Trial(f"{op}.{type_} {names}", type_, (type_,) * count)


def _integer() -> Iterator[Trial]:
    every = "u16 s16 u32 s32 u64 s64"
    yield from _three("add sub mul.lo mul.hi min max", every)
    yield from _three("mad.lo sad", every, "{d}, {a}, {b}, {c}", 3)
    yield from _three("mad.hi", "u32 s32 u64 s64", "{d}, {a}, {b}, {c}", 3)
    yield from _three("div rem", "u32 s32 u64 s64 u16 s16", "{d}, {a}, {b}")
    for narrow, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
        yield Trial(f"mul.wide.{narrow} {{d}}, {{a}}, {{b}}", wide, (narrow, narrow))
        yield Trial(f"mad.wide.{narrow} {{d}}, {{a}}, {{b}}, {{c}}", wide, (narrow, narrow, wide))
    yield from _three("add.sat sub.sat", "s32")
    yield from _three("neg abs", "s16 s32 s64", "{d}, {a}", 1)
    yield from _three("mul24.lo mul24.hi", "u32 s32")
    yield from _three("mad24.lo", "u32 s32", "{d}, {a}, {b}, {c}", 3)
    for a in ("u32", "s32"):
        for b in ("u32", "s32"):
            yield Trial(f"dp4a.{a}.{b} {{d}}, {{a}}, {{b}}, {{c}}", "s32", (a, b, "s32"))
            yield Trial(f"dp2a.lo.{a}.{b} {{d}}, {{a}}, {{b}}, {{c}}", "s32", (a, b, "s32"))
            yield Trial(f"dp2a.hi.{a}.{b} {{d}}, {{a}}, {{b}}, {{c}}", "s32", (a, b, "s32"))
    for op in ("add", "min", "max"):
        for type_ in ("u16x2", "s16x2"):
            yield Trial(f"{op}.{type_} {{d}}, {{a}}, {{b}}", "b32", ("b32", "b32"))


def _bits() -> Iterator[Trial]:
    yield from _three("and or xor", "b16 b32 b64")
    yield from _three("not cnot", "b16 b32 b64", "{d}, {a}", 1)
    for type_ in ("b16", "b32", "b64"):
        yield Trial(f"shl.{type_} {{d}}, {{a}}, {{b}}", type_, (type_, "amount"))
    for type_ in ("u16", "s16", "u32", "s32", "u64", "s64"):
        yield Trial(f"shr.{type_} {{d}}, {{a}}, {{b}}", type_, (type_, "amount"))
    for way in ("l", "r"):
        for mode in ("clamp", "wrap"):
            yield Trial(f"shf.{way}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}", "b32", ("b32", "b32", "amount"))
    for mode in ("", "f4e.", "b4e.", "rc8.", "ecl.", "ecr.", "rc16."):
        yield Trial(f"prmt.b32.{mode}".rstrip(".") + " {d}, {a}, {b}, {c}", "b32", ("b32", "b32", "b32"))
    for table in (0x00, 0x1A, 0x96, 0xE8, 0xEA, 0xFE):
        yield Trial(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table:#x}", "b32", ("b32",) * 3)
    for type_ in ("u32", "s32", "u64", "s64"):
        yield Trial(f"bfe.{type_} {{d}}, {{a}}, {{b}}, {{c}}", type_, (type_, "amount", "amount"))
        yield Trial(f"bfind.{type_} {{d}}, {{a}}", "u32", (type_,))
        yield Trial(f"bfind.shiftamt.{type_} {{d}}, {{a}}", "u32", (type_,))
    for type_ in ("b32", "b64"):
        yield Trial(
            f"bfi.{type_} {{d}}, {{a}}, {{b}}, {{c}}, {{e}}", type_, (type_, type_, "amount", "amount")
        )
        yield Trial(f"popc.{type_} {{d}}, {{a}}", "u32", (type_,))
        yield Trial(f"clz.{type_} {{d}}, {{a}}", "u32", (type_,))
        yield Trial(f"brev.{type_} {{d}}, {{a}}", type_, (type_,))
    yield Trial("fns.b32 {d}, {a}, {b}, {c}", "b32", ("b32", "lane", "offset"))
    for mode in ("clamp", "wrap"):
        yield Trial(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}}", "b32", ("amount", "amount"))
        yield Trial(f"szext.{mode}.s32 {{d}}, {{a}}, {{b}}", "s32", ("s32", "amount"))
        yield Trial(f"szext.{mode}.u32 {{d}}, {{a}}, {{b}}", "u32", ("u32", "amount"))


_ROUNDINGS = ("rn", "rz", "rm", "rp")


def _floating() -> Iterator[Trial]:
    for r in _ROUNDINGS:
        for form in (f"{r}.f32", f"{r}.ftz.f32", f"{r}.sat.f32", f"{r}.f64"):
            type_ = form[-3:]
            for op in ("add", "sub", "mul"):
                yield Trial(f"{op}.{form} {{d}}, {{a}}, {{b}}", type_, (type_, type_))
            yield Trial(f"fma.{form} {{d}}, {{a}}, {{b}}, {{c}}", type_, (type_,) * 3)
        for type_ in ("f32", "f64"):
            yield Trial(f"div.{r}.{type_} {{d}}, {{a}}, {{b}}", type_, (type_, type_))
            yield Trial(f"sqrt.{r}.{type_} {{d}}, {{a}}", type_, (type_,))
            yield Trial(f"rcp.{r}.{type_} {{d}}, {{a}}", type_, (type_,))
    for op in ("min", "max"):
        for form in ("f32", "ftz.f32", "NaN.f32", "xorsign.abs.f32", "NaN.xorsign.abs.f32", "f64"):
            type_ = form[-3:]
            yield Trial(f"{op}.{form} {{d}}, {{a}}, {{b}}", type_, (type_, type_))
        for form in ("f16", "f16x2", "bf16", "bf16x2", "NaN.f16", "NaN.f16x2", "NaN.bf16", "NaN.bf16x2"):
            type_ = form.split(".")[-1]
            yield Trial(f"{op}.{form} {{d}}, {{a}}, {{b}}", type_, (type_, type_))
    for op in ("neg", "abs"):
        for form in ("f32", "ftz.f32", "f64", "f16", "f16x2", "bf16", "bf16x2"):
            type_ = form.split(".")[-1]
            yield Trial(f"{op}.{form} {{d}}, {{a}}", type_, (type_,))
    yield from _three("copysign", "f32 f64")
    for type_ in ("f16", "f16x2"):
        for form in (f"rn.{type_}", f"rn.ftz.{type_}", f"rn.sat.{type_}"):
            for op in ("add", "sub", "mul"):
                yield Trial(f"{op}.{form} {{d}}, {{a}}, {{b}}", type_, (type_, type_))
            yield Trial(f"fma.{form} {{d}}, {{a}}, {{b}}, {{c}}", type_, (type_,) * 3)
        yield Trial(f"fma.rn.relu.{type_} {{d}}, {{a}}, {{b}}, {{c}}", type_, (type_,) * 3)
    for type_ in ("bf16", "bf16x2"):
        for op in ("add", "sub", "mul"):
            yield Trial(f"{op}.rn.{type_} {{d}}, {{a}}, {{b}}", type_, (type_, type_))
        yield Trial(f"fma.rn.{type_} {{d}}, {{a}}, {{b}}, {{c}}", type_, (type_,) * 3)
        yield Trial(f"fma.rn.relu.{type_} {{d}}, {{a}}, {{b}}, {{c}}", type_, (type_,) * 3)


def _holds(target: str, source: str) -> bool:
    """Whether an integer type has every value of another: PTX then takes no .sat."""
    signed, unsigned = target.startswith("s"), source.startswith("u")
    return bit_width(target) > bit_width(source) and (signed or unsigned)


def _conversions() -> Iterator[Trial]:
    integers = ("u16", "s16", "u32", "s32", "u64", "s64")
    for source in integers:
        for target in integers:
            if source != target:
                yield Trial(f"cvt.{target}.{source} {{d}}, {{a}}", target, (source,))
                if not _holds(target, source):
                    yield Trial(f"cvt.sat.{target}.{source} {{d}}, {{a}}", target, (source,))
        for target in ("u8", "s8"):
            if "16" in source:
                yield Trial(f"cvt.sat.{target}.{source} {{d}}, {{a}}", source, (source,))
        for target in ("f16", "f32", "f64"):
            for r in _ROUNDINGS:
                yield Trial(f"cvt.{r}.{target}.{source} {{d}}, {{a}}", target, (source,))
        yield Trial(f"cvt.rn.bf16.{source} {{d}}, {{a}}", "bf16", (source,))
    for source in ("f16", "f32", "f64"):
        for target in integers:
            for r in ("rni", "rzi", "rmi", "rpi"):
                yield Trial(f"cvt.{r}.{target}.{source} {{d}}, {{a}}", target, (source,))
        for r in ("rni", "rzi", "rmi", "rpi"):
            yield Trial(f"cvt.{r}.{source}.{source} {{d}}, {{a}}", source, (source,))
    yield Trial("cvt.rzi.ftz.s32.f32 {d}, {a}", "s32", ("f32",))
    for wide, small in (("f32", "f16"), ("f64", "f32"), ("f64", "f16")):
        yield Trial(f"cvt.{wide}.{small} {{d}}, {{a}}", wide, (small,))
        for r in _ROUNDINGS:
            yield Trial(f"cvt.{r}.{small}.{wide} {{d}}, {{a}}", small, (wide,))
    yield Trial("cvt.f32.bf16 {d}, {a}", "f32", ("bf16",))
    for r in ("rn", "rz"):
        for relu in ("", ".relu"):
            yield Trial(f"cvt.{r}{relu}.bf16.f32 {{d}}, {{a}}", "bf16", ("f32",))
            yield Trial(f"cvt.{r}{relu}.f16.f32 {{d}}, {{a}}", "f16", ("f32",))
            for type_ in ("bf16x2", "f16x2"):
                yield Trial(f"cvt.{r}{relu}.{type_}.f32 {{d}}, {{a}}, {{b}}", type_, ("f32", "f32"))
    yield Trial("cvt.rna.tf32.f32 {d}, {a}", "b32", ("f32",))
    for r in ("rn", "rz"):
        for relu in ("", ".relu"):
            yield Trial(f"cvt.{r}{relu}.tf32.f32 {{d}}, {{a}}", "b32", ("f32",))
    for type_ in ("e4m3x2", "e5m2x2"):
        for relu in ("", ".relu"):
            yield Trial(f"cvt.rn.satfinite{relu}.{type_}.f32 {{d}}, {{a}}, {{b}}", "b16", ("f32", "f32"))
            yield Trial(f"cvt.rn.satfinite{relu}.{type_}.f16x2 {{d}}, {{a}}", "b16", ("f16x2",))
            yield Trial(f"cvt.rn{relu}.f16x2.{type_} {{d}}, {{a}}", "f16x2", ("b16",))
    for target in ("u16", "s16"):
        yield Trial(f"cvt.pack.sat.{target}.s32 {{d}}, {{a}}, {{b}}", "b32", ("s32", "s32"))
    for target in ("u8", "s8"):
        yield Trial(f"cvt.pack.sat.{target}.s32.b32 {{d}}, {{a}}, {{b}}, {{c}}", "b32", ("s32", "s32", "b32"))


_ORDERED = "eq ne lt le gt ge"


def _predicates() -> Iterator[Trial]:
    for type_, comparisons in (
        *((t, _ORDERED) for t in ("s16", "s32", "s64")),
        *((t, "eq ne lo ls hi hs lt le gt ge") for t in ("u16", "u32", "u64")),
        *((t, _ORDERED + " equ neu ltu leu gtu geu num nan") for t in ("f32", "f64", "f16", "bf16")),
    ):
        for comparison in comparisons.split():
            yield Trial(f"setp.{comparison}.{type_} {{d}}, {{a}}, {{b}}", "pred", (type_, type_))
    for comparison in ("lt", "neu", "nan"):
        yield Trial(f"setp.{comparison}.ftz.f32 {{d}}, {{a}}, {{b}}", "pred", ("f32", "f32"))
        yield Trial(f"set.{comparison}.u32.f32 {{d}}, {{a}}, {{b}}", "u32", ("f32", "f32"))
        yield Trial(f"set.{comparison}.f32.f32 {{d}}, {{a}}, {{b}}", "f32", ("f32", "f32"))
    for what in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
        yield Trial(f"testp.{what}.f32 {{d}}, {{a}}", "pred", ("f32",))
        yield Trial(f"testp.{what}.f64 {{d}}, {{a}}", "pred", ("f64",))
    yield Trial("slct.b32.s32 {d}, {a}, {b}, {c}", "b32", ("b32", "b32", "s32"))
    yield Trial("slct.b32.f32 {d}, {a}, {b}, {c}", "b32", ("b32", "b32", "f32"))


def _approximate() -> Iterator[Trial]:
    for op in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos"):
        for ftz in ("", ".ftz"):
            yield Trial(f"{op}.approx{ftz}.f32 {{d}}, {{a}}", "f32", ("f32",), "approx")
    yield Trial("tanh.approx.f32 {d}, {a}", "f32", ("f32",), "approx")
    yield Trial("div.approx.f32 {d}, {a}, {b}", "f32", ("f32", "f32"), "approx")
    yield Trial("div.full.f32 {d}, {a}, {b}", "f32", ("f32", "f32"), "approx")


_SIGNED = {16: torch.int16, 32: torch.int32, 64: torch.int64}
# Small numbers rather than any bits.
_SMALL = {"amount": 70, "lane": 32, "offset": 8}


def width(type_: str) -> int:
    """Bits of an operand in its register and in memory."""
    return 32 if type_ in _SMALL or type_ == "pred" else bit_width(type_)


def inputs(trial: Trial, seed: int) -> list[np.ndarray]:
    """Operands for every thread, as unsigned integers of their width."""
    generator = np.random.default_rng(seed)
    return [_operand(type_, generator) for type_ in trial.operands]


def _operand(type_: str, generator: np.random.Generator) -> np.ndarray:
    bits = width(type_)
    dtype = np.dtype(f"u{bits // 8}")
    if type_ in _SMALL:
        return generator.integers(0, _SMALL[type_], COUNT).astype(dtype)
    values = generator.integers(0, 1 << bits, COUNT, dtype=np.uint64, endpoint=False) if bits < 64 else (
        generator.integers(0, 1 << 64, COUNT, dtype=np.uint64)
    )  # fmt: skip
    # A third are small integers and their negatives, or floats near 1, where ties and carries are common.
    third = COUNT // 3
    small = generator.integers(-20, 21, third)
    if type_.startswith(("f", "bf")):
        values[:third] = _moderate(type_, generator, third)
        return values.astype(dtype)
    values[:third] = small.astype(np.int64).view(np.uint64) & np.uint64((1 << bits) - 1)
    return values.astype(dtype)


def _moderate(type_: str, generator: np.random.Generator, count: int) -> np.ndarray:
    """Floats of ordinary size with few significant bits, as bits."""
    numbers = generator.integers(-64, 65, count) * 2.0 ** generator.integers(-8, 9, count)
    if type_ == "f64":
        return numbers.view(np.uint64)
    single = numbers.astype(np.float32)
    if type_ == "f32":
        return single.view(np.uint32).astype(np.uint64)
    half = (
        single.astype(np.float16).view(np.uint16)
        if type_.startswith("f16")
        else (single.view(np.uint32) >> 16).astype(np.uint16)
    ).astype(np.uint64)
    return half | half[::-1] << np.uint64(16) if type_.endswith("x2") else half


def module(all_trials: list[Trial], target: str) -> str:
    """PTX with one kernel for each trial: k0, k1, ..."""
    kernels = [_kernel(i, trial) for i, trial in enumerate(all_trials)]
    return "\n".join([".version 8.6", f".target {target}", ".address_size 64", *kernels])


def _kernel(number: int, trial: Trial) -> str:
    names = dict(zip("abce", range(4), strict=True))
    parameters = [".param .u64 out", *(f".param .u64 in{i}" for i in range(len(trial.operands)))]
    lines = [
        " mov.u32 %t1, %ctaid.x; mov.u32 %t2, %ntid.x; mov.u32 %t3, %tid.x; mad.lo.u32 %t4, %t1, %t2, %t3;"
    ]
    declared = []
    for i, type_ in enumerate(trial.operands):
        bits = width(type_)
        declared.append(f" .reg .b{bits} %x{i};")
        lines.append(
            f" ld.param.u64 %a{i}, [in{i}]; mad.wide.u32 %a{i}, %t4, {bits // 8}, %a{i};\n"
            f" ld.global.b{bits} %x{i}, [%a{i}];"
        )
    result = width(trial.result)
    predicate = trial.result == "pred"
    declared.append(f" .reg .{'pred' if predicate else f'b{result}'} %d;")
    operands = {letter: f"%x{i}" for letter, i in names.items()}
    lines.append(f" {trial.text.format(d='%d', **operands)};")
    stored = "%d"
    if predicate:
        lines.append(" selp.b32 %t5, 1, 0, %d;")
        stored = "%t5"
    lines.append(
        f" ld.param.u64 %o, [out]; mad.wide.u32 %o, %t4, {result // 8}, %o;\n"
        f" st.global.b{result} [%o], {stored}; ret;"
    )
    return "\n".join(
        [
            f".visible .entry k{number}({', '.join(parameters)})",
            "{",
            " .reg .b32 %t<8>; .reg .b64 %a<5>; .reg .b64 %o;",
            *declared,
            *lines,
            "}",
        ]
    )


def emulate(all_trials: list[Trial], arch: str, seed: int) -> list[np.ndarray]:
    """What each trial gives for every thread, in the emulator."""
    gpu = device(arch, checks="none", trace=False)
    results = []
    for i, trial in enumerate(all_trials):
        operands = [
            gpu.from_torch(torch.from_numpy(x.view(f"i{x.itemsize}"))) for x in inputs(trial, seed + i)
        ]
        out = gpu.empty(COUNT, _SIGNED[width(trial.result)])
        text = module([trial], arch)
        gpu.run_ptx(text, out, *operands, grid=(CTAS, 1, 1), block=(THREADS, 1, 1))
        results.append(out.numpy().copy())
        for tensor in (out, *operands):
            gpu.release(tensor)
    return results


def execute(all_trials: list[Trial], arch: str, seed: int) -> list[np.ndarray]:
    """The same on the GPU, which torch has set up; the driver compiles the PTX, one trial at a time."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device="cuda")
    results = []
    for i, trial in enumerate(all_trials):
        loaded, function = ctypes.c_void_p(), ctypes.c_void_p()
        text = module([trial], arch).encode()
        _check(driver.cuModuleLoadData(ctypes.byref(loaded), text), f"compiling {trial.text}")
        _check(driver.cuModuleGetFunction(ctypes.byref(function), loaded, b"k0"), "cuModuleGetFunction")
        operands = [torch.from_numpy(x.view(f"i{x.itemsize}")).cuda() for x in inputs(trial, seed + i)]
        out = torch.zeros(COUNT, dtype=_SIGNED[width(trial.result)], device="cuda")
        values = [ctypes.c_uint64(t.data_ptr()) for t in (out, *operands)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        torch.cuda.synchronize()
        status = driver.cuLaunchKernel(function, CTAS, 1, 1, THREADS, 1, 1, 0, None, pointers, None)
        _check(status, "cuLaunchKernel")
        torch.cuda.synchronize()
        results.append(out.cpu().numpy())
        driver.cuModuleUnload(loaded)
    return results


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} failed with {status}")
