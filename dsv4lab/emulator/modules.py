"""What was compiled: the PTX of one host function and the kernels in it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from dsv4lab.emulator import ptx
from dsv4lab.emulator.errors import EmulatorError


@dataclass(frozen=True)
class Module:
    """The device code of one compiled host function.

    Args:
        name: the host function's mangled name.
        arch: what it was compiled for, such as "sm_100a".
        ptx: the whole text.
        cubin: the same assembled, an ELF image, which is not executed here but may be disassembled; empty
            for a text that no compiler made.
    """

    name: str
    arch: str
    ptx: str = field(repr=False)
    cubin: bytes = field(default=b"", repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if ".version" not in self.ptx or ".target" not in self.ptx:
            raise EmulatorError(
                f"{self.name} was compiled without keeping its PTX, which is all that can be executed here: "
                "compile it inside `with device(...)`, from source"
            )
        object.__setattr__(self, "digest", hashlib.sha256(self.ptx.encode()).hexdigest()[:16])

    @cached_property
    def parsed(self) -> ptx.Module:
        """The PTX, parsed."""
        return ptx.parse(self.ptx)

    @cached_property
    def parameter_sizes(self) -> dict[str, tuple[int, ...]]:
        """Bytes of each parameter by kernel."""
        return {f.name: tuple(p.size for p in f.parameters) for f in self._entries}

    @cached_property
    def static_shared(self) -> dict[str, int]:
        """Bytes of statically declared shared memory by kernel: of the variables that its body names."""
        return {f.name: sum(v.size for v in self._shared(f)) for f in self._entries}

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(self.parameter_sizes)

    @property
    def _entries(self) -> list[ptx.Function]:
        return [f for f in self.parsed.functions if f.kind == "entry" and f.defined]

    def _shared(self, function: ptx.Function) -> list[ptx.Variable]:
        names = function.symbols()
        variables = (*self.parsed.globals, *function.variables)
        return [v for v in variables if v.space == "shared" and v.linkage != "extern" and v.name in names]
