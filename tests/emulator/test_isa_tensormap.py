"""Descriptors that kernels change: tensormap.replace, cp_fenceproxy, and the fence that must follow."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.emulator import AddressError, EmulatorError, UnsupportedInstruction, device
from dsv4lab.emulator.happens_before import ProxyError
from dsv4lab.emulator.tensormap import TensorMap, TensorMapError, decode

# %rd1 is a workspace with a descriptor at its start and numbers from byte 256 on, %rd2 the result.
START = """
 mov.u32 %r5, smem; setp.ne.s32 %p10, %r1, 0; add.s64 %rd4, %rd1, 256;
 @%p10 bra INITIALISED; mbarrier.init.shared::cta.b64 [%r5], 1; fence.mbarrier_init.release.cluster;
INITIALISED: bar.sync 0;
"""
# Load 64 bytes to smem + 128 and store the first 4 words to the result.
LOAD = """
 @%p10 bra LOADED{i}; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 64; add.u32 %r6, %r5, 128;
 cp.async.bulk.tensor.1d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r6], [{map}, {{0}}], [%r5];
LOADED{i}: mbarrier.try_wait.parity.shared::cta.b64 %p11, [%r5], {i}; @!%p11 bra LOADED{i};
 ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r5+128]; st.global.v4.b32 [%rd2], {{%r30, %r31, %r32, %r33}};
"""
FENCE = (
    " fence.proxy.tensormap::generic.release.gpu; fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;\n"
)
REPLACE = " @!%p10 tensormap.replace.tile.{field}.{space}b1024.{type} {operands};\n"
# The descriptor, copied to smem + 512 by one warp, 4 bytes a lane, of which only 64 count.
TO_SHARED = """
 setp.lt.u32 %p5, %r1, 16; add.s64 %rd10, %rd1, %rd3; @%p5 ld.global.b32 %r20, [%rd10];
 mul.lo.u32 %r21, %r1, 4; add.u32 %r22, %r5, %r21; @%p5 st.shared.b32 [%r22+512], %r20; bar.sync 0;
"""
BACK = (
    " add.u32 %r23, %r5, 512; bar.sync 0; tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic"
    ".release.gpu.sync.aligned [%rd1], [%r23], 128;\n"
)


@pytest.fixture
def run(ptx_kernel):
    """run(body): the result's first 4 words; `run.map` is what the descriptor in the workspace became."""

    def run_(body, checks="all", seed=0, element="u32", **fields):
        gpu = device("sm_100a", checks=checks, seed=seed)
        x = gpu.empty((1024,), torch.int32)
        x[64:] = torch.arange(960, dtype=torch.int32)
        run_.address = x.data_ptr()
        fields = {"shape": (512,), "strides": (), "box": (16,)} | fields
        map_ = TensorMap(x.data_ptr() + 256, element, **fields)
        x.view(torch.uint8)[:128] = torch.frombuffer(bytearray(map_.encode()), dtype=torch.uint8)
        y = gpu.empty((4,), torch.int32)
        text = ptx_kernel(START + body).replace(".align 16 .b8 smem", ".align 1024 .b8 smem")
        try:
            gpu.run_ptx(text, x, y, shared_bytes=1024)
        finally:
            run_.map = bytes(x.view(torch.uint8)[:128].numpy())
        return y.tolist()

    return run_


def replace(field, value, *index, space="global.", type_="b32", address="%rd1"):
    operands = ", ".join([f"[{address}]", *map(str, index), str(value)])
    return REPLACE.format(field=field, space=space, type=type_, operands=operands)


# Fields ----------------------------------------------------------------------------------------------------

FIELDS = [
    ("global_address", (), "%rd4", {"address": 256}), ("rank", (), 0, {"rank": 1}),
    ("box_dim", (0,), 32, {"box": (32, 4)}), ("box_dim", (1,), 2, {"box": (16, 2)}),
    ("global_dim", (1,), 77, {"shape": (64, 77)}), ("global_stride", (0,), "%rd9", {"strides": (4096,)}),
    ("element_stride", (1,), 3, {"element_strides": (1, 3)}), ("elemtype", (), 6, {"element": "f16"}),
    ("swizzle_mode", (), 2, {"swizzle": "64B"}), ("fill_mode", (), 1, {"fill": "nan"}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "index", "value", "expected"), FIELDS)
@pytest.mark.parametrize("space", ["global.", "", "shared::cta."])
def test_every_field(run, field, index, value, expected, space):
    """In global memory, through a generic address, and in shared memory with the way back."""
    wide = "b64" if field in ("global_address", "global_stride") else "b32"
    address = "%r23" if space == "shared::cta." else "%rd1"
    body = " mov.b64 %rd9, 4096; add.u32 %r23, %r5, 512;\n"
    around = (TO_SHARED, BACK) if space == "shared::cta." else ("", "")
    body += around[0] + replace(field, value, *index, space=space, type_=wide, address=address) + around[1]
    shape = {"shape": (64, 16), "strides": (256,), "box": (16, 4), "element": "f32"}
    run(body, **shape)
    found = decode(run.map)
    for name, wanted in expected.items():
        wanted = wanted + run.address if name == "address" else wanted
        assert getattr(found, name) == wanted
    changed = {"rank": ("shape", "box", "strides", "element_strides"), "elemtype": ("large",)}.get(field, ())
    for name in ("shape", "box", "strides", "element_strides", "element", "swizzle", "fill"):
        if name not in expected and name not in changed:
            asked = {"element_strides": (1, 1), "swizzle": "none", "fill": "zero"} | shape
            assert getattr(found, name) == asked[name]


def test_a_generic_address_in_shared_memory(run):
    body = TO_SHARED + " add.u32 %r23, %r5, 512; cvt.u64.u32 %rd8, %r23; cvta.shared.u64 %rd8, %rd8;\n"
    run(body + replace("global_dim", 100, 0, space="", address="%rd8") + BACK)
    assert decode(run.map).shape == (100,)


# The fence -------------------------------------------------------------------------------------------------

MOVE = " add.s64 %rd5, %rd4, 400;\n" + replace("global_address", "%rd5", type_="b64")


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_descriptor_is_used_after_the_fence(run, seed):
    """The load begins 100 numbers further on."""
    body = MOVE + " bar.sync 0;" + FENCE + LOAD.format(i=0, map="%rd1")
    assert run(body, seed=seed) == [100, 101, 102, 103]


def test_without_the_fence(run):
    body = MOVE + " bar.sync 0;" + LOAD.format(i=0, map="%rd1")
    with pytest.raises(ProxyError, match=r"fence\.proxy\.tensormap::generic\.acquire is missing"):
        run(body)
    with pytest.raises(ProxyError):
        run(FENCE + body)
    assert run(body, checks="none") == [100, 101, 102, 103]


def test_a_fence_of_another_descriptor(run):
    body = MOVE + " bar.sync 0;" + FENCE.replace("[%rd1]", "[%rd2]") + LOAD.format(i=0, map="%rd1")
    with pytest.raises(ProxyError, match="was changed since this CTA last fenced it"):
        run(body)


def test_cp_fenceproxy_needs_the_acquire_too(run):
    change = TO_SHARED + " add.u32 %r23, %r5, 512; add.s64 %rd5, %rd4, 400;\n"
    change += replace("global_address", "%rd5", space="shared::cta.", type_="b64", address="%r23") + BACK
    load = LOAD.format(i=0, map="%rd1")
    assert run(change + FENCE + load) == [100, 101, 102, 103]
    with pytest.raises(ProxyError, match="was changed"):
        run(change + load)


def test_a_plain_store_to_a_descriptor_in_use(run):
    """The second load would use the descriptor that the first brought into the cache."""
    store = " add.s64 %rd5, %rd4, 400; @!%p10 st.global.b64 [%rd1], %rd5; bar.sync 0;\n"
    first, second = (LOAD.format(i=i, map="%rd1") for i in (0, 1))
    assert run(first + store + FENCE + second) == [100, 101, 102, 103]
    with pytest.raises(ProxyError, match="was changed"):
        run(first + store + second)


# What is refused -------------------------------------------------------------------------------------------


def test_a_descriptor_made_unsound(run):
    body = replace("box_dim", 3, 0) + FENCE + LOAD.format(i=0, map="%rd1")
    with pytest.raises(TensorMapError, match="must span a multiple of 16 bytes, got 12"):
        run(body)


@pytest.mark.parametrize(
    ("instruction", "error", "message"),
    [(replace("box_dim", 16, 0, address="%rd1+32"), AddressError, "operand addr: .* is not a multiple of 64"),
     (replace("box_dim", 16, 0, address="%rd1+4096"), AddressError, "belong to no registered tensor"),
     (replace("box_dim", 16, 7), TensorMapError, "box_dim has no dimension 7"),
     (replace("swizzle_mode", 9), TensorMapError, "swizzle_mode has no value 9"),
     (replace("colour", 9), UnsupportedInstruction, "is not emulated"),
     (replace("rank", 9, 1), UnsupportedInstruction, "is not emulated"),
     (BACK.replace("128;", "64;"), UnsupportedInstruction, "must be 128"),
     (BACK.replace("[%rd1]", "[%rd3]"), EmulatorError, "must give the same addresses")],
)  # fmt: skip
def test_refused(run, instruction, error, message):
    with pytest.raises(error, match=message):
        run(TO_SHARED + instruction)
