"""The runtime functions that host code calls, without any host code."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest

from dsv4lab.emulator import EmulatorError, Module, UnsupportedRuntimeCall, shim
from dsv4lab.emulator.architectures import ARCHITECTURES

PTX = """
.version 9.1
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.shared .align 16 .b8 tile[96];
.shared .align 8 .b64 barrier;

.visible .entry plain(
)
{ ret; }
.visible .entry mixed(
	.param .u64 .ptr .global .align 16 mixed_param_0,
	.param .align 64 .b8 mixed_param_1[128],
	.param .f32 mixed_param_2,
	.param .b8 mixed_param_3
)
.reqntid 128, 1, 1
{
	.reg .b32 %r<2>;
	st.shared.b32 [tile+4], %r1; mbarrier.init.shared.b64 [barrier], 1; ld.shared.b32 %r1, [dynamic]; ret; }
"""


def get_device() -> tuple[int, int]:
    value = ctypes.c_int(7)
    return shim._ANSWERS["_cudaGetDevice"](ctypes.byref(value)), value.value


def attribute(number: int) -> tuple[int, int]:
    value = ctypes.c_int(-1)
    return shim._ANSWERS["_cudaDeviceGetAttribute"](ctypes.byref(value), number, 0), value.value


class Host:
    """Answers 2 n to device attribute n, and fails on a negative one."""

    def device_attribute(self, number: int) -> int:
        if number < 0:
            raise LookupError(number)
        return 2 * number


def test_answers_reach_the_host_code():
    assert shim.call(Host(), get_device) == (0, 0)
    assert shim.call(Host(), attribute, 21) == (0, 42)


def test_an_error_is_told_to_the_host_code_and_raised_afterwards():
    codes = []

    def host_code() -> None:
        codes.append(attribute(-1)[0])
        codes.append(attribute(1)[0])  # nothing is answered after an error
        raise RuntimeError("what the DSL makes of the code")

    with pytest.raises(LookupError) as raised:
        shim.call(Host(), host_code)
    assert codes == [999, 999]
    assert raised.value.args == (-1,) and raised.value.__context__ is None
    assert shim.call(Host(), attribute, 4) == (0, 8)


def test_an_error_of_the_host_code_itself_passes():
    with pytest.raises(ZeroDivisionError):
        shim.call(Host(), lambda: 1 // 0)


def test_calls_nest_and_belong_to_their_thread():
    inner = SimpleNamespace(device_attribute=lambda number: number + 1)
    seen = []

    def outer() -> tuple:
        thread = threading.Thread(target=lambda: seen.append(attribute(5)[0]))
        thread.start()
        thread.join()
        with pytest.raises(LookupError):
            shim.call(Host(), attribute, -1)
        return attribute(5), shim.call(inner, attribute, 5), attribute(5)

    assert shim.call(Host(), outer) == ((0, 10), (0, 6), (0, 10))
    assert seen == [999]  # host code of the emulator, called by nobody that it knows


def test_linking_answers_or_refuses_every_runtime_function():
    def declaration(name: str, blocks: list) -> SimpleNamespace:
        return SimpleNamespace(
            operation=SimpleNamespace(name="llvm.func"),
            attributes={"sym_name": SimpleNamespace(value=name)},
            regions=[SimpleNamespace(blocks=blocks)],
        )

    body = [declaration(name, []) for name in ("_cudaGetDevice", "_cudaMemcpyAsync", "printf")]
    module = SimpleNamespace(body=SimpleNamespace(operations=[*body, declaration("_cuda_own", [1])]))
    registered = {}
    engine = SimpleNamespace(raw_register_runtime=lambda n, p: registered.update({n: p.value}))
    shim.link(engine, module)
    assert set(registered) == {"_cudaGetDevice", "_cudaMemcpyAsync"} and engine.linked

    copy = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(registered["_cudaMemcpyAsync"])
    with pytest.raises(UnsupportedRuntimeCall, match="calls cudaMemcpyAsync, which is not emulated"):
        shim.call(Host(), copy, 1, 2, 3, 4)


def test_structures_have_the_sizes_of_cuda_headers():
    """cudaLaunchConfig_t: two dim3, a size, a stream, a pointer, a count; an attribute is 8 and 64 bytes."""
    assert ctypes.sizeof(shim.LaunchConfig) == 56
    assert shim.LaunchConfig.attributes.offset == 40
    assert ctypes.sizeof(shim.LaunchAttribute) == 72
    assert shim.LaunchAttribute.value.offset == 8


def test_parameters_and_shared_memory_are_read_from_the_ptx():
    module = Module("host", "sm_100a", PTX)
    assert module.parameter_sizes == {"plain": (), "mixed": (8, 128, 4, 1)}
    assert module.kernels == ("plain", "mixed")
    assert module.static_shared == {"plain": 0, "mixed": 96 + 8}
    assert module.digest != Module("host", "sm_100a", PTX + "//").digest


@pytest.mark.parametrize("text", ["", "None", "/tmp/kernel.sm_100a.ptx"])
def test_a_module_needs_its_ptx(text):
    with pytest.raises(EmulatorError, match="host was compiled without keeping its PTX"):
        Module("host", "sm_100a", text)


def test_parameters_of_an_unknown_kind_are_refused():
    with pytest.raises(EmulatorError, match="texref"):
        _ = Module("host", "sm_100a", PTX.replace(".param .f32", ".param .texref")).kernels


@pytest.mark.parametrize("name", ["sm_90a", "sm_100a", "sm_103a"])
def test_numbers_of_an_architecture_agree(name):
    attributes = ARCHITECTURES[name].attributes
    assert f"sm_{attributes[75]}{attributes[76]}a" == name
    assert attributes[97] == 232448 == attributes[81] - attributes[111]
