"""What the emulator raises."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Something that the emulator was asked for and refuses."""


class MachineMissingError(EmulatorError, NotImplementedError):
    """A launch was caught and recorded, and nothing is there to execute it."""


class UnsupportedRuntimeCall(EmulatorError, NotImplementedError):
    """The host code of a kernel called a function of the CUDA runtime that the emulator does not answer."""


class AddressError(EmulatorError):
    """An address that belongs to no registered tensor."""
