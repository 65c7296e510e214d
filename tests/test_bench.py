"""The benchmark: what is wrong is refused, not timed; what is counted and written down is so to the digit."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dsv4lab import ops
from dsv4lab.bench import checks, compiling, inputs, measure, rivals, rows
from dsv4lab.bench.cases import KINDS, Case, tensors
from dsv4lab.bench.checks import WrongResult
from dsv4lab.bench.measure import Measurement, Replay, interleaved, percentiles, wall_seconds
from dsv4lab.bench.shapes import PRESETS, all_cases, preset_cases, select
from dsv4lab.cli import main
from dsv4lab.quantize import quantize_nvfp4
from dsv4lab.roofline import RATES, floor_seconds

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {2: (5, 48), 3: (5, 48, 32), 5: (7, 48, 32, 6, 2)}
SMALL = [Case(name, SHAPES[len(kind.dims)]) for name, kind in KINDS.items()]
WHERE = {name: f"some {name}" for name in rows.PROVENANCE}


@pytest.fixture
def backend():
    """Make a backend that runs some operations by functions given, for one test."""

    def make(**functions):
        ops.register_backend("testing", lambda device: None)
        for op, function in functions.items():
            ops.register_implementation(op, "testing", function=function)
        return "testing"

    yield make
    ops.BACKENDS.pop("testing", None)
    for op in ops.OPS.values():
        op.implementations.pop("testing", None)


@pytest.fixture
def run(capsys):
    """Run `dsv4lab bench`; returns exit code, stdout, stderr."""

    def call(*arguments):
        code = main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def never_timed(monkeypatch):
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("timed"))


def halves(x, g, granularity, divisor, swizzled):
    """A quantizer that rounds codes as the original pipeline did, to half steps first: 2.6 becomes 2."""
    codes, scales, g = ops.OPS["quantize"](x, g, granularity, divisor, swizzled, backend="reference")
    decoded = x.float() / (scales.float() * g.reshape(-1, 1)).repeat_interleave(16, -1)
    steps = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7])  # of |x| in halves, ties down
    codes = steps[(decoded.abs().clamp_max(6) * 2).round().long()] + 8 * x.signbit()
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), scales, g


# ---- checks


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.kind)
def test_the_reference_passes_and_any_part_changed_does_not(case):
    given = case.make("cpu")
    case.check(given, case.run(given, "reference"), "reference")
    for part in range(len(tensors(case.run(given, "reference")))):
        result = case.run(given, "reference")
        row = inputs.spans(*given[:4])[0][1] if len(case.shape) > 2 else 0
        spoil(tensors(result)[part], row)
        with pytest.raises(WrongResult, match=r"wrong in \d+ of \d+ places"):
            case.check(given, result, "reference")


def spoil(t: torch.Tensor, row: int) -> None:
    """Change one number by about two units in the last place, or a byte of codes."""
    if t.dtype == torch.uint8:
        t[row, 0] ^= 0x44
    elif t.dtype == torch.float8_e4m3fn:
        t.view(torch.uint8)[row, 0] += 2
    elif t.dtype == torch.float32:
        t.view(-1)[row] *= 1.02
    else:
        column = t[row].abs().argmax()
        t[row, column] *= 1.02


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.kind)
def test_nan_and_another_shape_are_refused(case):
    given = case.make("cpu")
    result = case.run(given, "reference")
    last = tensors(result)[-1]
    last.view(torch.uint8).fill_(0xFF) if last.dim() else last.fill_(torch.nan)
    with pytest.raises(WrongResult):
        case.check(given, result, "reference")
    if isinstance(result, torch.Tensor):
        with pytest.raises(WrongResult, match=r"must be \(\d+, \d+\), got"):
            case.check(given, result[:-1], "reference")


def test_each_part_is_held_to_its_own_formula():
    """Changes that the other parts make up for, or hide by saturating."""
    x = torch.tensor([6.0, 4.0, 2.0, 0.0] * 4).repeat(2, 2).bfloat16()
    t, y = quantize_nvfp4(x, "token"), x.double()
    assert t.codes.tolist() == [[0x67, 0x04] * 8] * 2 and t.block_scales.float().eq(448).all()
    checks.quantized(t, y)
    half = torch.full_like(t.block_scales.float(), 224).to(t.block_scales.dtype)
    negative = t.codes.clone()
    negative[1, 0] ^= 0x80
    for wrong, message in (
        (t.with_(global_scale=t.global_scale * 2, block_scales=half), "global scale wrong in 2 of 2"),
        (t.with_(codes=torch.tensor([[0x77, 0x06] * 8] * 2, dtype=torch.uint8), block_scales=half),
         "block scales wrong in 4 of 4"),
        (t.with_(codes=negative), "signs wrong in 1 of 64"),
    ):  # fmt: skip
        with pytest.raises(WrongResult, match=message):
            checks.quantized(wrong, y)


def test_bits_that_the_contract_fixes_are_compared_with_the_reference(monkeypatch):
    case = Case("quantize_token", (4, 32))
    given = case.make("cpu")
    result = case.run(given, "reference")
    monkeypatch.setattr(checks, "quantized", lambda *_: None)
    case.check(given, result, "other")
    spoil(result.codes, 0)
    with pytest.raises(WrongResult, match=r"bits of torch\.uint8 wrong in 1 of 64 places"):
        case.check(given, result, "other")


def test_inputs_differ_by_seed_and_repeat():
    for case in SMALL:
        same, again, other = (tensors(case.make("cpu", seed)) for seed in (3, 3, 4))
        assert all(
            map(torch.equal, *([t.view(torch.uint8) if t.dim() else t for t in ts] for ts in (same, again)))
        )
        assert not torch.equal(same[0], other[0]), case.kind


# ---- a wrong implementation is not timed


def test_a_broken_backend_is_refused(backend, never_timed):
    (found,) = measure.bench([Case("quantize_token", (16, 64))], backend(quantize=halves))
    assert re.fullmatch(r"codes wrong in \d+ of 1024 places", found.refused)
    assert found.seconds is None and found.as_dict()["p50_us"] is None


@pytest.mark.parametrize("defect", [
    lambda d: d * 1.01,
    lambda d: torch.zeros_like(d),
    lambda d: d.roll(1, -1),
    lambda d: torch.where(torch.arange(d.shape[0])[:, None] % 128 == 1, torch.nan, d),  # one row of a group
])  # fmt: skip
def test_broken_gemms_are_refused(backend, never_timed, defect):
    name = backend(grouped_mm=lambda *args: defect(ops.OPS["grouped_mm"](*args, backend="reference")))
    kinds = ("linear", "linear_w4a16", "grouped_mm", "grouped_mm_w4a16")
    found = measure.bench([case for case in SMALL if case.kind in kinds], name)
    assert len(found) == 4 and all("output of group" in m.refused for m in found), found


def test_the_command_says_what_was_refused_and_keeps_the_rest(run, backend, tmp_path):
    right = lambda *args: ops.OPS["dequantize"](*args, backend="reference")  # noqa: E731
    name = backend(quantize=halves, dequantize=right)
    arguments = ("--backend", name, "--shapes", "8x32", "--repeats", 2)
    code, out, err = run(*arguments, "--json", "--csv", tmp_path / "rows.csv")
    results = {r["op"]: r for r in json.loads(out)["results"]}
    assert list(results) == ["quantize_tensor", "quantize_token", "dequantize"]  # what this backend has
    assert results["dequantize"]["p50_us"] > 0 and results["dequantize"]["refused"] is None
    assert (
        results["quantize_token"]["p50_us"] is None and "codes wrong" in results["quantize_token"]["refused"]
    )
    assert code == 2 and err.splitlines()[-1].startswith(
        "dsv4lab bench: 2 of 3 refused, the first quantize_tensor 8x32 on testing: codes wrong in"
    )
    with (tmp_path / "rows.csv").open() as stream:
        assert [(row["op"], row["backend"]) for row in csv.DictReader(stream)] == [("dequantize", "testing")]
    code, out, _ = run(*arguments)
    assert code == 2 and re.search(r"quantize_token +8x32 +testing +refused\n", out)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is read from Linux's table")
def test_cases_too_large_for_the_memory_are_refused(never_timed):
    (found,) = measure.bench([Case("grouped_mm", (1, 1 << 15, 1 << 15, 1 << 15, 1))])
    assert re.fullmatch(r"needs about 524288 GiB, \d+ GiB are free", found.refused)


# ---- time


def test_medians_on_a_clock_of_our_own(monkeypatch):
    now, order = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        def work():
            order.append(name)
            now[0] += next(seconds)

        return lambda: wall_seconds(work)

    slow_first = iter([99.0, 50.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    ours, others = interleaved([call("a", slow_first), call("b", iter([0.5] * 7))], 5)
    assert order == ["a", "b"] * 7
    assert ours == [5.0, 1.0, 4.0, 2.0, 3.0] and others == [0.5] * 5  # without the two that warm up
    assert percentiles(ours) == pytest.approx((1.8, 3.0, 4.2), rel=1e-12)
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)


class Graph:
    """A CUDA graph on the CPU: what is captured runs at once; a replay runs what it is given."""

    def __init__(self, replay=lambda: None):
        self.replays, self.replay = 0, replay


@pytest.fixture
def cuda(monkeypatch):
    """As much of torch.cuda as Replay needs, each replay taking 64 ms."""
    event = type("Event", (), {"record": lambda self: None, "synchronize": lambda self: None,
                               "elapsed_time": lambda self, end: 64.0})  # fmt: skip
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_graph_goes_round_the_sets(cuda, monkeypatch):
    seen = []
    replay = Replay([lambda i=i: seen.append(i) for i in range(5)])
    assert seen == [0, 0, *[0, 1, 2, 3, 4] * 7] and replay.count == 35
    assert replay.seconds() == pytest.approx(64e-3 / 35)
    monkeypatch.setattr(measure, "ENOUGH", 1e-12)  # every call takes longer
    assert Replay([lambda: None] * 5).count == 5


def test_a_replay_that_writes_nothing_is_refused(cuda):
    case = Case("linear", (4, 32, 16))
    sets = [case.make("cpu", seed) for seed in range(3)]
    replay = Replay([lambda s=s: case.run(s, "reference") for s in sets])
    case.check(sets[2], replay.results[2], "reference")
    with pytest.raises(WrongResult, match="wrong in 64 of 64 places"):
        case.check(sets[2], replay.poisoned(), "reference")
    replay.graph.replay = lambda: replay.results[2].copy_(case.run(sets[2], "reference"))
    case.check(sets[2], replay.poisoned(), "reference")


# ---- what is counted


@pytest.mark.parametrize("kind, shape, expected", [
    ("quantize_token", (2, 32), (128 + 32 + 4 + 8, 0)),
    ("quantize_tensor", (2, 32), (2 * 128 + 32 + 4 + 4, 0)),  # the largest value is needed first
    ("rmsnorm_quantize", (2, 32), (128 + 64 + 32 + 4 + 8 + 8, 0)),
    ("mhc_rmsnorm_quantize", (2, 32), (4 * 128 + 32 + 64 + 32 + 4 + 8 + 8, 0)),
    ("swiglu_quantize", (2, 32), (2 * 128 + 32 + 4 + 8, 0)),
    ("dequantize", (2, 32), (32 + 4 + 8 + 128, 0)),
    ("swizzle", (2, 32), (4 + 512, 0)),
    ("linear", (2, 32, 48), (32 + 4 + 8 + 48 * 18 + 4 + 2 * 96, 2 * 2 * 32 * 48)),
    ("linear_w4a16", (2, 32, 48), (128 + 48 * 18 + 4 + 2 * 96, 2 * 2 * 32 * 48)),
])  # fmt: skip
def test_bytes_and_flops(kind, shape, expected):
    case = Case(kind, shape)
    given = case.make("cpu")
    assert case.work(given, case.run(given, "reference")) == expected


def test_idle_groups_and_padding_are_not_counted():
    case = Case("grouped_mm_swiglu", (1, 32, 48, 8, 2))
    given = case.make("cpu")
    moved, flops = case.work(given, case.run(given, "reference"))
    rows = 2 * (16 + 2 + 4 + 48)  # codes, block scales, scale, 24 outputs
    assert flops == 2 * 2 * 32 * 48 and moved == rows + 2 * 48 * 18 + 1 + 2 * 4 * 8  # and 1 of g's 4 bytes


def rival(case: Case, name: str):
    given = case.make("cpu")
    return rivals.prepare(name, case, given, given, 172, "reference")()


def test_baselines_do_as_much_work():
    copied = Case("quantize_token", (2, 32))
    assert rivals.names_of(copied) == ["copy"] and rival(copied, "copy").nbytes * 2 == 172
    for shape, name, outputs in (
        ((3, 32, 48, 4, 4), "bf16 bmm", [(3, 48)] * 4),
        ((3, 32, 48, 1, 1), "bf16 linear", [(3, 48)]),
        ((3, 32, 48, 4, 2), "bf16 grouped_mm", None),
    ):
        case = Case("grouped_mm", shape)
        assert rivals.names_of(case, ["quack"]) == [name]
        found = [tuple(y.shape) for y in rival(case, name)]
        assert found == outputs if outputs else sum(rows for rows, _ in found) == 6


def test_a_fused_result_is_that_of_two_kernels():
    case = Case("grouped_mm_swiglu_quantize", (5, 64, 32, 3, 2))
    assert rivals.names_of(case) == ["bf16 grouped_mm", "unfused"]
    case.check(case.make("cpu"), rival(case, "unfused"), "reference")


def test_peers_are_asked_for_by_name(monkeypatch):
    linear = Case("linear_w4a16", (2, 32, 48))
    assert rivals.names_of(linear, ["quack"]) == ["bf16 linear", "quack"]
    assert rivals.names_of(Case("linear", (2, 32, 48)), ["quack"]) == ["bf16 linear"]
    monkeypatch.setitem(rivals.PEERS, "none", rivals.Peer("no-such-package", None))
    with pytest.raises(ValueError, match=r"no-such-package is not installed: pip install 'dsv4lab\[peers\]'"):
        rivals.check_peers(["none"])
    with pytest.raises(ValueError, match="peer 'triton' is unknown; known are quack, humming"):
        rivals.check_peers(["triton"])


def test_a_peer_that_is_far_off_is_not_timed():
    exact = torch.randn(8, 8)
    rivals.check("quack", exact.bfloat16(), exact)
    with pytest.raises(WrongResult, match=r"quack is off by 1\.0e"):
        rivals.check("quack", torch.zeros(8, 8), exact)


def test_nothing_is_compiled_beforehand_on_a_cpu():
    assert compiling.compile_first(SMALL, None, torch.device("cpu")) == 0


def test_the_floor_is_known_for_some_devices_alone():
    copy, rate = RATES["NVIDIA H200"].copy, RATES["NVIDIA H200"].bf16
    assert floor_seconds("NVIDIA H200", int(copy), 0) == pytest.approx(1)
    assert floor_seconds("NVIDIA H200", 1, int(2 * rate)) == pytest.approx(2)
    assert floor_seconds("NVIDIA H200", 1, int(2 * rate), fp4=True) == pytest.approx(2)  # it has no FP4
    assert floor_seconds("NVIDIA B200", 16 * 10**12, 1, fp4=True) == pytest.approx(2)
    assert floor_seconds("NVIDIA B200", 1, 18 * 10**15, fp4=True) == pytest.approx(2)
    assert floor_seconds("NVIDIA B200", 1, 18 * 10**15) == pytest.approx(8)
    assert floor_seconds("a CPU", int(copy), 0) is None


def test_a_product_of_fp4_is_held_against_the_rate_of_fp4():
    def floor(kind, shape):
        m = Measurement(Case(kind, shape), "blackwell", "NVIDIA B200", (1e-3,) * 3, {}, 1, 9 * 10**12)
        return m.as_dict()["share_of_floor"]

    assert floor("linear", (1, 16, 16)) == pytest.approx(1)
    assert floor("linear_w4a16", (1, 16, 16)) == pytest.approx(4)


@pytest.mark.parametrize("case", [case for case in SMALL if len(case.shape) > 2], ids=lambda case: case.kind)
def test_kernels_are_given_swizzled_scales(case):
    given = case.make("cpu")
    ready = case.ready(given, "blackwell")
    layouts = [x.scale_layout for x in ready if hasattr(x, "scale_layout")]
    assert layouts and set(layouts) == {"swizzled"} and case.ready(given, "reference") is given
    case.check(given, case.run(ready, "reference"), "reference")


def test_rates_follow_from_the_median():
    times = {"bf16 linear": (3e-6,) * 3, "quack": (1e-6, 4e-6, 5e-6), "humming": None}
    m = Measurement(Case("linear", (1, 16, 16)), "reference", "NVIDIA H200", (1e-6, 2e-6, 4e-6), times,
                    bytes=4_270_000, flops=8_000_000)  # fmt: skip
    d = m.as_dict()
    assert (d["p20_us"], d["p50_us"], d["p80_us"], d["baseline_us"]) == (1, 2, 4, 3)
    assert d["tb_per_s"] == pytest.approx(2.135) and d["tflops"] == pytest.approx(4)
    assert d["floor_us"] == 1 and d["share_of_floor"] == pytest.approx(0.5) and d["speedup"] == 1.5
    assert d["refused"] is None
    assert d["others"] == {"quack": {"p50_us": 4, "speedup": 2}, "humming": {"p50_us": None, "speedup": None}}
    assert [(row["backend"], row["p50_us"], row["share_of_floor"]) for row in m.rows()] == [
        ("reference", 2, pytest.approx(0.5)),
        ("quack", 4, pytest.approx(0.25)),
    ]
    unknown = dataclasses.replace(m, device="something").as_dict()
    assert unknown["floor_us"] is None and unknown["share_of_floor"] is None


# ---- shapes


def test_presets_take_the_sizes_of_the_models():
    def sizes(preset, kind):
        return [c.shape[1:] for c in preset_cases(PRESETS[preset](), 3) if c.kind == kind]

    assert sizes("flash", "linear") == [
        (4096, 1024), (1024, 32768), (4096, 512), (8192, 4096), (4096, 4096), (2048, 4096)
    ]  # fmt: skip
    assert sizes("pro", "linear_w4a16") == [
        (7168, 1536), (1536, 65536), (7168, 512), (16384, 7168), (7168, 6144), (3072, 7168)
    ]  # fmt: skip
    assert sizes("flash", "grouped_mm") == [(4096, 1024, 8, 8), (2048, 4096, 256, 6)]
    assert sizes("pro", "grouped_mm_swiglu") == [(7168, 6144, 384, 6)]
    assert sizes("pro", "quantize_tensor") == [(7168,)] and sizes("pro", "swiglu_quantize") == [(3072,)]


def test_one_name_stands_for_all_that_is_published():
    cases = select(None, ["deepseek-v4"], None, "cpu")
    assert len(set(cases)) == len(cases) == len(all_cases())
    for suffix in ("", "_w4a16"):
        assert Case(f"linear{suffix}", (4096, 16384, 7168)) in cases
        assert Case(f"grouped_mm{suffix}", (16, 4096, 1024, 16, 16)) in cases
        assert Case(f"grouped_mm_swiglu_quantize{suffix}", (256, 7168, 6144, 384, 6)) in cases
    assert Case("mhc_rmsnorm_quantize", (8192, 7168)) in cases
    assert {c.kind for c in select(["swizzle"], ["deepseek-v4"], None, "cpu")} == {"swizzle"}


def test_shapes_go_to_the_operations_that_they_fit():
    assert {c.kind for c in select(None, ["4x32"], None, "cpu")} == {
        n for n, k in KINDS.items() if len(k.dims) == 2
    }
    chosen = select(["linear", "swizzle"], ["4x32", "2x32x48", "2x32x48"], None, "cpu")
    assert chosen == [Case("swizzle", (4, 32)), Case("linear", (2, 32, 48))]
    assert {c.shape[0] for c in select(["linear"], ["nano:5"], None, "cpu")} == {5}
    assert {c.shape[0] for c in select(["linear"], ["nano"], None, "cpu")} == {1, 128}


@pytest.mark.parametrize("arguments, message", [
    (("--op", "gemm"), "op 'gemm' is unknown; known are quantize_tensor, "),
    (("--op", ","), "must be names with commas between them, got ','"),
    (("--shapes", "tiny"), "shape 'tiny' must be one of nano, flash, pro"),
    (("--shapes", "flash:0"), "shape 'flash:0' must be one of"),
    (("--shapes", "16x"), "shape '16x' must be one of"),
    (("--shapes", "0x16"), "0x16 of op quantize_tensor needs numbers from 1 on"),
    (("--shapes", "4x24"), "4x24 of op quantize_tensor needs K % 16 == 0"),
    (("--shapes", "4x32x24x2x3", "--op", "grouped_mm_swiglu"), "needs N % 16 == 0 and k <= G"),
    (("--shapes", "1x2x3x4"), "fits no op asked for: they need TxK or TxKxN or TxKxNxGxk"),
    (("--shapes", "4x32", "--op", "linear,swizzle"), "op linear needs a shape TxKxN, got 4x32"),
    (("--backend", "cuda"), "backend 'cuda' is unknown; known are blackwell, hopper, reference"),
    (("--backend", "blackwell"), "backend 'blackwell' cannot run quantize on cpu: "),
    (("--peers", "triton"), "peer 'triton' is unknown; known are quack, humming"),
    (("--device", "tpu9"), "--device tpu9: "),
    (("--device", "meta"), "--device meta: times can be taken on cpu and cuda alone"),
    (("--repeats", "0"), "whole number from 1 on, got '0'"),
    (("--csv", "/no/such/rows.csv"), "/no/such: no such folder"),
])  # fmt: skip
def test_bad_input_is_one_line(run, never_timed, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err


# ---- what is written


def measured(p50=2e-6, **changes) -> Measurement:
    m = Measurement(Case("linear", (1, 16, 32)), "reference", "x", (1e-6, p50, 3e-6),
                    {"bf16 linear": (4e-6,) * 3}, 400, 1024, 0)  # fmt: skip
    return dataclasses.replace(m, **changes)


def test_rows_carry_their_provenance_and_are_appended(tmp_path):
    file = tmp_path / "rows.csv"
    assert rows.append(file, [measured(), measured(refused="wrong", seconds=None)], WHERE) == 1
    first = file.read_bytes()
    assert first.decode().splitlines() == [
        "op,shape,backend,p20_us,p50_us,p80_us,tb_per_s,tflops,share_of_floor,baseline,baseline_us,bytes,flops,"
        "rotated_bytes,device,driver,torch,dsv4lab,cutlass_dsl,peer,commit,date",
        "linear,1x16x32,reference,1.0,2.0,3.0,0.0002,0.000512,,bf16 linear,4.0,400,1024,0,"
        "some device,some driver,some torch,some dsv4lab,some cutlass_dsl,some peer,some commit,some date",
    ]
    file.write_bytes(first.rstrip(b"\n"))  # as an editor may leave it
    file.chmod(0o640)
    rows.append(file, [measured(5e-6)], {**WHERE, "device": 'a "quoted", name'})
    assert file.read_bytes().startswith(first) and file.stat().st_mode & 0o777 == 0o640
    with file.open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [(row["p50_us"], row["device"]) for row in read] == [
        ("2.0", "some device"),
        ("5.0", 'a "quoted", name'),
    ]
    assert list(tmp_path.iterdir()) == [file]


def test_a_peer_has_rows_of_its_own(tmp_path):
    both = {"bf16 linear": (4e-6,) * 3, "quack": (1e-6, 5e-6, 6e-6), "unfused": (7e-6,) * 3}
    measured_beside = measured(rivals=both)
    assert rows.append(tmp_path / "rows.csv", [measured_beside], WHERE, {"quack": "quack-kernels 9"}) == 3
    with (tmp_path / "rows.csv").open(newline="") as stream:
        read = [(row["backend"], row["p50_us"], row["peer"]) for row in csv.DictReader(stream)]
    assert read == [
        ("reference", "2.0", "some peer"), ("quack", "5.0", "quack-kernels 9"),
        ("reference unfused", "7.0", "some peer"),
    ]  # fmt: skip


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    rows.append(file, [measured()], WHERE)
    before = file.read_bytes()
    written = []

    def fail(self, target):
        written.append((self.read_bytes(), target.read_bytes()))
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        rows.append(file, [measured()], WHERE)
    ((new, old),) = written  # all of the new file stood beside the untouched old one
    assert old == before and new.startswith(before) and len(new.splitlines()) == 3
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["op,shape\n", "a note\n", "\n", ",".join(reversed(rows.HEADER)) + "\n"])
def test_a_file_with_another_header_is_refused_before_anything_is_measured(run, never_timed, tmp_path, text):
    (tmp_path / "other.csv").write_text(text)
    code, out, err = run("--csv", tmp_path / "other.csv")
    assert code == 2 and out == "" and err.count("\n") == 1 and "its first line must be op,shape," in err
    assert (tmp_path / "other.csv").read_text() == text


def test_where_rows_come_from():
    where = rows.provenance(torch.device("cpu"))
    assert tuple(where) == rows.PROVENANCE and where["torch"] == torch.__version__
    assert where["driver"] == "" and where["device"].endswith(("thread", "threads"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", where["date"])
    assert rows.provenance(torch.device("cpu"), "abc")["commit"] == "abc"
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert head.stdout.startswith(where["commit"].removesuffix("-dirty")) and where["commit"]


@pytest.mark.skipif(shutil.which("git") is None, reason="makes a repository")
def test_a_copy_outside_a_checkout_names_no_commit(monkeypatch, tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)  # a repository around it is not its own
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "site" / "dsv4lab" / "bench" / "rows.py"))
    assert rows.provenance(torch.device("cpu"))["commit"] == ""


# ---- the command


def test_the_default_run_measures_every_operation(run):
    code, out, err = run("--repeats", 1, "--json")
    report = json.loads(out)
    assert code == 0 and {r["op"] for r in report["results"]} == set(KINDS) and report["repeats"] == 1
    assert set(report) == {*rows.PROVENANCE, "repeats", "peers", "results"}
    for r in report["results"]:
        assert set(r) == {
            "op", "shape", "backend", "p20_us", "p50_us", "p80_us", "bytes", "flops", "rotated_bytes",
            "tb_per_s", "tflops", "floor_us", "share_of_floor", "baseline", "baseline_us", "speedup",
            "others", "refused",
        }  # fmt: skip
        assert r["backend"] == "reference" and r["refused"] is None and r["floor_us"] is None
        assert 0 < r["p20_us"] <= r["p50_us"] <= r["p80_us"] and r["bytes"] > 0 and r["speedup"] > 0
        assert (r["tflops"] is None) == (r["flops"] == 0)
    assert all(line.startswith("measuring: ") for line in err.splitlines())


def test_the_table_and_the_file(run, tmp_path):
    code, out, err = run("--op", "swizzle,linear", "--shapes", "3x32,3x32x16", "--repeats", 2,
                         "--csv", tmp_path / "rows.csv", "--commit", "abc")  # fmt: skip
    assert code == 0 and err == f"{tmp_path / 'rows.csv'}: 2 rows added\n"
    assert re.search(r"^linear +3x32x16 +reference( +[\d.e+-]+){5} +bf16 linear +[\d.]+ +[\d.]+x$", out, re.M)
    assert torch.__version__ in out.splitlines()[0]
    assert (tmp_path / "rows.csv").read_text().count(",abc,") == 2


def test_progress_names_the_cases():
    seen = []
    measure.bench(SMALL[:2], repeats=1, progress=lambda *step: seen.append(step))
    assert seen == [(0, 2, "quantize_tensor 5x48"), (1, 2, "quantize_token 5x48")]


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and all(option in out for option in ("--backend", "--op", "--shapes", "--csv", "--json"))


@pytest.mark.gpu
def test_on_a_gpu_every_operation_is_captured_and_measured():
    found = measure.bench([*SMALL, Case("quantize_token", (4096, 4096))], device="cuda", repeats=3)
    assert [m.refused for m in found] == [""] * len(found)
    assert all(m.seconds[1] > 0 and all(m.rivals.values()) and m.rotated > 0 for m in found)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    assert found[-1].rotated > 2 * l2


@pytest.mark.gpu
def test_on_a_gpu_a_backend_that_computes_outside_the_graph_is_refused(backend):
    kept = {}

    def remembers(x, *args):
        key = x.data_ptr()
        if key not in kept:  # right when called first, and nothing to capture afterwards
            kept[key] = ops.OPS["quantize"](x, *args, backend="reference")
        return kept[key]

    name = backend(quantize=remembers)
    case = Case("quantize_token", (16384, 8192))  # one set exceeds the caches, and is run before the capture
    (found,) = measure.bench([case], name, "cuda", 2)
    assert "wrong in" in found.refused


def test_a_peer_that_fails_leaves_the_others_alone(monkeypatch):
    def fail(x, weight):
        raise AssertionError("this peer wants K % 4096 == 0")

    monkeypatch.setitem(rivals.PEERS, "quack", rivals.Peer("quack-kernels", fail))
    case = Case("linear_w4a16", (2, 32, 48))
    given = case.make("cpu")
    result = case.run(given, "reference")
    assert rivals.calls("quack", case, [(given, given)], result, 0, "reference") is None
    assert len(rivals.calls("bf16 linear", case, [(given, given)] * 2, result, 0, "reference")) == 2
