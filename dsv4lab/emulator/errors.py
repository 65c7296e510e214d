"""What the emulator raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4lab.emulator.ptx import Instruction


class EmulatorError(RuntimeError):
    """Something that the emulator was asked for and refuses, or that a kernel must not do.

    An error of a running kernel says where in its message, and here:

    Attributes:
        kernel: name of the kernel.
        cta: %ctaid of the CTA.
        warp: index of the warp in its CTA.
        lane: lane, if it is one lane's error.
        line: number of the PTX line.
    """

    kernel: str | None = None
    cta: tuple[int, int, int] | None = None
    warp: int | None = None
    lane: int | None = None
    line: int | None = None
    # What the machine works the above out from.
    row: int | None = None
    instruction: Instruction | None = None


class UnsupportedRuntimeCall(EmulatorError, NotImplementedError):
    """The host code of a kernel called a function of the CUDA runtime that the emulator does not answer."""


class AddressError(EmulatorError):
    """An access outside of what a kernel may touch, or at an address that is not aligned for it."""


class DeadlockError(EmulatorError):
    """No warp can go on."""


class InstructionLimitError(EmulatorError):
    """A launch has executed more instructions than it is allowed to."""


class UninitialisedError(EmulatorError):
    """A read of memory that nobody wrote."""


class KernelTrap(EmulatorError):
    """A kernel stopped itself: a `trap`, or an assertion that failed."""


def at(error: EmulatorError, row: int, lane: int | None = None) -> EmulatorError:
    """Note the row of the batch, and the lane, that an error is about."""
    error.row, error.lane = row, lane
    return error


def at_instruction(error: EmulatorError, instruction: Instruction) -> EmulatorError:
    """Say in an error which PTX line it is about."""
    if error.instruction is None:
        error.instruction, error.line = instruction, instruction.line
        error.args = (f"{error} [PTX line {instruction.line}: {instruction.text.strip()}]",)
    return error


def in_kernel(
    error: EmulatorError, kernel: str, cta: tuple[int, int, int] | None, warp: int | None
) -> EmulatorError:
    """Say in an error which kernel, CTA, warp and lane it is about."""
    if error.kernel is None:
        error.kernel, error.cta, error.warp = kernel, cta, warp
        who = f"CTA {cta}" if cta is not None else ""
        who += f", warp {warp}" if warp is not None else ""
        who += f", lane {error.lane}" if error.lane is not None else ""
        error.args = (f"{kernel}{': ' + who if who else ''}: {error}",)
    return error
