"""Reading the DLPack capsule in which a tensor travels to CuTe DSL, and telling it another device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from dsv4lab.emulator.extents import strided_nbytes

# DLDeviceType of dlpack.h.
_CPU, CUDA, _CUDA_HOST = 1, 2, 3
# DLDataTypeCode of dlpack.h, by name; the float8 and smaller kinds carry their width in `bits` as well.
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor),)


class _ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_KINDS = {b"dltensor": _Managed, b"dltensor_versioned": _ManagedVersioned}
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True)
class Span:
    """The memory that a capsule's tensor spans."""

    start: int
    nbytes: int
    description: str


def pretend_cuda(capsule: Any) -> Span:
    """Make a CPU tensor's capsule say that it lies on CUDA device 0, before anyone has consumed it.

    CuTe DSL gives a CPU tensor the generic address space, for which some kernels do not compile and others
    compile to something else than on a GPU.

    Returns:
        The memory of the tensor, from its first to its last element.

    Raises:
        ValueError: the tensor is on a device other than the CPU.
    """
    name = _name(capsule)
    if name not in _KINDS:
        raise TypeError(f"a fresh DLPack capsule is needed, got one named {name!r}")
    tensor = _KINDS[name].from_address(_pointer(capsule, name)).tensor
    if tensor.device_type not in (_CPU, _CUDA_HOST):
        raise ValueError(
            f"the emulator runs on CPU tensors, got one of DLPack device type {tensor.device_type}: "
            "move it with .cpu()"
        )
    tensor.device_type, tensor.device_id = CUDA, 0
    return _span(tensor)


def _span(tensor: _Tensor) -> Span:
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    if tensor.strides:
        strides = tuple(tensor.strides[: tensor.ndim]) if tensor.ndim else ()
    else:
        strides = _compact(shape)
    itembits = tensor.bits * tensor.lanes
    kind = f"{_CODES.get(tensor.code, f'code {tensor.code}, ')}{tensor.bits}"
    kind = kind if tensor.lanes == 1 else f"{kind}x{tensor.lanes}"
    start = (tensor.data or 0) + tensor.byte_offset
    return Span(start, strided_nbytes(shape, strides, itembits), f"{kind} {shape}")


def _compact(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
