"""Registration of the operations with torch.library, and the choice of a backend for each call.

`register_op` turns one schema, one reference and one fake implementation into two operators of the
namespace `dsv4lab`: NAME, which returns new tensors, and NAME_out, which fills given ones and returns nothing
(an operator may not return its input). Both take a keyword `backend`. Kernels join through
`register_implementation`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dsv4lab.device import kernels_unavailable

LIBRARY = torch.library.Library("dsv4lab", "DEF")


@dataclass(frozen=True)
class Backend:
    """A way to run operations.

    Args:
        name: as callers ask for it.
        unavailable: of a device; says why it cannot run there, or returns None.
        module: imported when it is first to run; registers its implementations.
        asked_on_cpu: for CPU tensors, run only when it is named.
    """

    name: str
    unavailable: Callable[[torch.device], str | None]
    module: str | None = None
    asked_on_cpu: bool = False


@dataclass
class Implementation:
    """A backend's code for an operation: `function(*args)` returns tensors, `out(*args, *outs)` fills, and
    `refuses(*args)` says why it does not take these arguments, or returns None."""

    function: Callable
    out: Callable
    refuses: Callable[..., str | None] = lambda *args: None


@dataclass
class Op:
    """A registered operation; calling it, or `.out` to fill given tensors, goes through the dispatcher."""

    name: str
    fake: Callable
    returns: int
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._call = self._call_out = None

    def __call__(self, *args, backend: str | None = None):
        return self._call(*args, backend=backend)

    def out(self, *args, outs: tuple[Tensor, ...], backend: str | None = None) -> None:
        """Run the operation into `outs`, which may have more rows (dimension 0) than the result."""
        self._call_out(*args, *outs, backend=backend)


# Preference order: the first backend that can run an operation on a device is that device's default.
BACKENDS: dict[str, Backend] = {
    name: Backend(name, partial(kernels_unavailable, name), f"dsv4lab.kernels.{name}", asked_on_cpu=True)
    for name in ("blackwell", "hopper")
} | {"reference": Backend("reference", lambda device: None)}
_named: ContextVar[str | None] = ContextVar("dsv4lab_backend", default=None)
OPS: dict[str, Op] = {}


def register_backend(name: str, unavailable: Callable[[torch.device], str | None]) -> None:
    """Say when a backend can run; its operations are added by `register_implementation`."""
    BACKENDS[name] = Backend(name, unavailable)
    BACKENDS["reference"] = BACKENDS.pop("reference")  # stays the last choice


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operations that name no backend on this one, for the length of a `with` block.

    Raises:
        ValueError: nobody knows the backend; that it cannot run an operation is said when that is called.
    """
    _check_known(name)
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def unavailable_reason(
    name: str, device: torch.device | str, op: str, args: tuple | None = None
) -> str | None:
    """Why a backend cannot run an operation on a device, with these arguments if given; None when it can."""
    backend = BACKENDS[name]
    reason = backend.unavailable(torch.device(device))
    if reason is None and backend.module:
        importlib.import_module(backend.module)
    if reason is None and name not in OPS[op].implementations:
        reason = f"it has no implementation of {op}"
    if reason is None and args is not None:
        reason = OPS[op].implementations[name].refuses(*args)
    return reason


def _check_known(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; known are {', '.join(sorted(BACKENDS))}")


def _default(backend: Backend, device: torch.device, op: str, args: tuple | None) -> bool:
    if backend.asked_on_cpu and device.type == "cpu":
        return False
    return unavailable_reason(backend.name, device, op, args) is None


def resolve_backend(name: str | None, device: torch.device | str, op: str, args: tuple | None = None) -> str:
    """The backend that will run an operation: the named one, that of `use_backend`, or the device's default.

    Args:
        args: of the operation; None for whatever every backend takes.

    Raises:
        ValueError: the named backend is unknown or cannot run this operation here. A name never falls back.
    """
    name = name or _named.get()
    if name is None:
        return next(b.name for b in BACKENDS.values() if _default(b, torch.device(device), op, args))
    _check_known(name)
    if reason := unavailable_reason(name, device, op, args):
        raise ValueError(f"backend {name!r} cannot run {op} on {torch.device(device)}: {reason}")
    return name


def register_op(schema: str, reference: Callable, fake: Callable) -> Op:
    """Register an operation with its reference backend.

    Args:
        schema: "name(Tensor x, ...) -> (Tensor codes, Tensor scales)" or "... -> Tensor". Arguments go by
            position and have no defaults; several returns are named; at least one argument is a Tensor.
        reference: plain torch, takes the arguments and returns the tensors (never one of its inputs).
        fake: takes the arguments and allocates the results (`x.new_empty`), for fake and real tensors alike.

    Returns:
        The Op, also kept in OPS under its name.
    """
    name, arguments, returns = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", schema).groups()
    parts = returns.strip("()").split(", ")
    op = OPS[name] = Op(name, fake, len(parts))
    register_implementation(name, "reference", function=reference)
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(f"{name}({arguments}, *, str? backend=None) -> {returns}", tags=tags)
    outs = ", ".join(
        f"Tensor({chr(97 + i)}!) out_{part.split()[1] if ' ' in part else '0'}"
        for i, part in enumerate(parts)
    )
    LIBRARY.define(f"{name}_out({arguments}, {outs}, *, str? backend=None) -> ()", tags=tags)

    LIBRARY.impl(name, _runner(op, "function"), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_out", _runner(op, "out"), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsv4lab::{name}", lambda *a, backend=None: fake(*a), lib=LIBRARY)
    torch.library.register_fake(f"dsv4lab::{name}_out", lambda *a, backend=None: None, lib=LIBRARY)
    op._call = getattr(torch.ops.dsv4lab, name).default
    op._call_out = getattr(torch.ops.dsv4lab, f"{name}_out").default
    return op


def register_implementation(
    name: str,
    backend: str,
    function: Callable | None = None,
    out: Callable | None = None,
    refuses: Callable[..., str | None] | None = None,
) -> None:
    """Give an operation a backend's implementation; one of the two forms is enough, the other is derived.

    Args:
        name: an operation registered before.
        backend: a name of BACKENDS.
        function: function(*args) -> tensor or tuple of tensors.
        out: out(*args, *outs) -> None, natural for kernels; the functional form then allocates by the fake.
        refuses: refuses(*args) -> why it does not take these arguments, in words; None when it does. Another
            backend then runs them, unless this one was named.
    """
    if function is None and out is None:
        raise ValueError(f"the {backend} implementation of {name} needs function or out")
    op = OPS[name]

    def allocate_and_fill(*args):
        results = op.fake(*args)
        out(*args, *_as_tuple(results))
        return results

    def compute_and_copy(*args):
        inputs, outs = args[: -op.returns], args[-op.returns :]
        for target, result in zip(outs, _as_tuple(function(*inputs)), strict=True):
            first_rows(target, result.shape).copy_(result)

    code = (function or allocate_and_fill, out or compute_and_copy)
    op.implementations[backend] = Implementation(*code) if refuses is None else Implementation(*code, refuses)


def first_rows(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The part `out[:rows]` of a given output that has the shape of the result.

    Raises:
        ValueError: out has fewer rows than the result or differs elsewhere than in dimension 0.
    """
    shape = tuple(shape)
    if tuple(out.shape) == shape:
        return out
    if out.dim() != len(shape) or tuple(out.shape[1:]) != shape[1:] or out.shape[0] < shape[0]:
        raise ValueError(f"out must have shape {shape}, more rows allowed, got {tuple(out.shape)}")
    return out[: shape[0]]


def _as_tuple(results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _runner(op: Op, form: str) -> Callable:
    """What the dispatcher calls: choose the backend by the first tensor's device, then run it.

    Without gradients, whatever the inputs ask for: differentiating a reference step by step would treat
    rounding to codes as a constant, and give numbers that look like a gradient and are none.
    """

    @torch.no_grad()
    def run(*args, backend: str | None = None):
        device = next(a.device for a in args if isinstance(a, Tensor))
        given = args if form == "function" else args[: -op.returns]
        return getattr(op.implementations[resolve_backend(backend, device, op.name, given)], form)(*args)

    return run
