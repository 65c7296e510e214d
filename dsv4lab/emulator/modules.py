"""What was compiled: the PTX of one host function and the kernels in it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from dsv4lab.emulator.errors import EmulatorError

_NAME = re.compile(r"[\w$%]+")
_ENTRY = re.compile(r"\.entry\s+([\w$%]+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([bsuf])(\d+)\b[^,\[]*(?:\[(\d+)\])?")
# An `.extern .shared` array is the dynamic part and does not begin its line with `.shared`.
_SHARED = re.compile(r"^\s*\.shared\s+.*?\.[bsuf](\d+)\s+([\w$%]+)(?:\[(\d+)\])?\s*;", re.MULTILINE)


@dataclass(frozen=True)
class Module:
    """The device code of one compiled host function.

    Args:
        name: the host function's mangled name.
        arch: what it was compiled for, such as "sm_100a".
        ptx: the whole text.
    """

    name: str
    arch: str
    ptx: str = field(repr=False)
    digest: str = field(init=False)
    parameter_sizes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    static_shared: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if ".version" not in self.ptx or ".target" not in self.ptx:
            raise EmulatorError(
                f"{self.name} was compiled without keeping its PTX, which is all that can be executed here: "
                "compile it inside `with device(...)`, from source"
            )
        object.__setattr__(self, "digest", hashlib.sha256(self.ptx.encode()).hexdigest()[:16])
        object.__setattr__(self, "parameter_sizes", parameter_sizes(self.ptx))
        object.__setattr__(self, "static_shared", static_shared_bytes(self.ptx))

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(self.parameter_sizes)


def parameter_sizes(ptx: str) -> dict[str, tuple[int, ...]]:
    """Bytes of each parameter by kernel, from the `.param` declarations of its `.entry`."""
    sizes = {}
    for kernel, declarations in _ENTRY.findall(ptx):
        found = _PARAMETER.findall(declarations)
        if len(found) != declarations.count(".param"):
            raise EmulatorError(f"the parameters of {kernel} are declared in a way not known: {declarations}")
        sizes[kernel] = tuple(int(bits) // 8 * int(count or 1) for _, bits, count in found)
    return sizes


def static_shared_bytes(ptx: str) -> dict[str, int]:
    """Bytes of statically declared shared memory by kernel: of the variables that its body names."""
    variables = {name: int(bits) // 8 * int(count or 1) for bits, name, count in _SHARED.findall(ptx)}
    starts = list(_ENTRY.finditer(ptx))
    ends = [entry.start() for entry in starts[1:]] + [len(ptx)]
    names = {
        entry[1]: set(_NAME.findall(ptx, entry.end(), end)) for entry, end in zip(starts, ends, strict=True)
    }
    return {
        kernel: sum(variables[name] for name in used & variables.keys()) for kernel, used in names.items()
    }
