"""What the compiler made of a kernel: its machine instructions, registers and stack.

A cubin is an ELF file. Its `.nv.info` section holds what the assembler found out about each kernel, as
attributes of a byte of format, a byte of number and a value; the instructions are disassembled by NVIDIA's
nvdisasm, which comes as the Python package nvidia-cuda-nvdisasm and needs no GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "nvidia-cuda-nvdisasm"
WIDTH = 16  # bytes of an instruction
# Opcodes that read or write local memory, where registers spill to.
LOCAL = ("LDL", "STL")
# Formats and numbers of attributes in .nv.info, of those read here.
_SIZED, _FRAME_BYTES, _REGISTERS = 4, 0x11, 0x2F
_SYMBOLS = 2  # type of an ELF section


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: in bytes from the kernel's begin.
        guard: the predicate, such as "@!P0", or nothing.
        opcode: with its modifiers, such as "UTMALDG.2D".
        operands: without spaces; a branch's target is an address.
    """

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    def matches(self, pattern: str) -> bool:
        """Whether it has the opcode and all the modifiers of a pattern, such as "F2FP.E2M1"."""
        name, *modifiers = pattern.split(".")
        return name == self.name and set(modifiers) <= set(self.opcode.split("."))

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for what is no branch."""
        last = self.operands.rpartition(",")[2]
        return int(last, 16) if self.name in ("BRA", "BRX") and last.startswith("0x") else None

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.guard:>6} {self.opcode} {self.operands}".rstrip()


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        registers: of each thread when it starts; `setmaxnreg` may move some between warps.
        frame_bytes: stack of each thread in local memory.
    """

    kernel: str
    registers: int
    frame_bytes: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    def count(self, *patterns: str) -> int:
        """How many instructions match one of these patterns."""
        return sum(any(map(i.matches, patterns)) for i in self.instructions)

    @property
    def names(self) -> Counter[str]:
        """How often each opcode without modifiers occurs."""
        return Counter(i.name for i in self.instructions)

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return self.count(*LOCAL)

    def loops(self) -> list[tuple[Instruction, ...]]:
        """What lies between the target of each backward branch and the branch, the shortest first.

        Code that the compiler moved out of a loop's middle, such as what repeats a failed wait, is not in it.
        """
        found = [
            tuple(self.instructions[i.target // WIDTH : i.address // WIDTH + 1])
            for i in self.instructions
            if i.target is not None and i.target < i.address
        ]
        return sorted(found, key=len)

    def loop_with(self, name: str) -> tuple[Instruction, ...]:
        """The shortest loop with an opcode; empty if none has it."""
        return next((loop for loop in self.loops() if any(i.name == name for i in loop)), ())


def read(cubin: bytes) -> dict[str, Code]:
    """The kernels of a cubin by name.

    Raises:
        FileNotFoundError: nvdisasm is not installed.
    """
    found = attributes(cubin)
    return {
        name: Code(name, found[name][_REGISTERS], found[name].get(_FRAME_BYTES, 0), instructions)
        for name, instructions in disassemble(cubin).items()
    }


@cache
def nvdisasm() -> Path:
    """The disassembler of the installed package, or else of a CUDA toolkit on the path.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
        for file in package.files or ():
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return Path(str(package.locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        pass
    if on_path := shutil.which("nvdisasm"):
        return Path(on_path)
    raise FileNotFoundError(f"nvdisasm is not installed: pip install {PACKAGE}")


def disassemble(cubin: bytes) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of each kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([nvdisasm(), "-json", file.name], capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"nvdisasm refused a cubin: {' '.join(run.stderr.split())}")
    _, functions = json.loads(run.stdout)
    return {f["function-name"]: tuple(_instructions(f["sass-instructions"])) for f in functions}


def _instructions(listed: list[dict]) -> Iterator[Instruction]:
    for i, entry in enumerate(listed):
        yield Instruction(
            i * WIDTH, entry.get("predicate", ""), entry["opcode"], entry.get("operands", "").replace(" ", "")
        )


def attributes(cubin: bytes) -> dict[str, dict[int, int]]:
    """What `.nv.info` says of each function: value by number of the attributes that have one a function."""
    sections = _sections(cubin)
    symbols = next(s for s in sections.values() if s.type == _SYMBOLS)
    names = {
        index: _text(symbols.strings, struct.unpack_from("<I", symbols.content, 24 * index)[0])
        for index in range(len(symbols.content) // 24)
    }
    found: dict[str, dict[int, int]] = {}
    content, at = sections[".nv.info"].content, 0
    while at < len(content):
        form, number, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form != _SIZED:  # the value is in the place of the size
            continue
        if number in (_FRAME_BYTES, _REGISTERS):
            symbol, value = struct.unpack_from("<II", content, at)
            found.setdefault(names[symbol], {})[number] = value
        at += size
    return found


@dataclass(frozen=True)
class _Section:
    type: int
    content: bytes
    strings: bytes


def _sections(elf: bytes) -> dict[str, _Section]:
    """The sections of a 64-bit ELF file, each with the string table that it refers to."""
    (offset,), (width, count, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQI", elf, offset + width * i) for i in range(count)]

    def content(header: tuple[int, ...]) -> bytes:
        return elf[header[4] : header[4] + header[5]]

    found = {}
    for header in headers:
        strings = content(headers[header[6]]) if header[6] < count else b""
        found[_text(content(headers[names]), header[0])] = _Section(header[1], content(header), strings)
    return found


def _text(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode()
