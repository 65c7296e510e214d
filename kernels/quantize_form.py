"""What a quantizing kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One kernel of the family: where its values come from, how rows lie on threads, what becomes of them.

    Attributes:
        arch: such as "sm_90a".
        source: "plain"; "rmsnorm"; "mhc", a norm of mixed residual streams; "swiglu".
        element: of the input, "bf16", "f16" or "f32".
        team: threads of a row, each with `blocks` blocks of 16 at a time.
        teams: in a CTA.
        resident: the threads of a team hold all of their row; otherwise they read it once for every pass.
        scale: where the global scale comes from: "known"; "row", the row's amax; "cluster", the amax of all
            rows of the cluster that has a whole matrix; "partials", the largest of what another launch left.
        of: whose it is: "tensor", "token", "group", or "halves", gate and up rows of a group.
        output: "codes"; "scale", the global scale only; "partials", the amax of each CTA's rows.
        swizzled: layout of the block scales.
        cluster: CTAs that have a matrix together.
        streams: residual streams to be mixed.
        weight, mix: element types, as `element`.
        clamped: SwiGLU with a limit.
        wide: SwiGLU whose up may be beyond 2^64.
        tame: SwiGLU of bf16 clamped to at most 64, a number of bf16.
        interleaved: gate and up alternate in runs of 8.
        keeps: writes the bf16 values that it quantizes, too.
        matrices: there may be other than one of them.
    """

    arch: str
    source: str
    element: str
    team: int
    blocks: int
    teams: int
    resident: bool
    scale: str
    of: str
    output: str = "codes"
    swizzled: bool = False
    cluster: int = 1
    streams: int = 1
    weight: str = "f32"
    mix: str = "f32"
    clamped: bool = False
    wide: bool = True
    tame: bool = False
    interleaved: bool = False
    keeps: bool = False
    matrices: bool = False

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.team * self.teams

    @property
    def has_e2m1(self) -> bool:
        """Whether the architecture converts floats to E2M1."""
        return self.arch != "sm_90a"

    @property
    def loops(self) -> bool:
        """Whether a CTA goes over many rows, to one amax."""
        return self.output == "partials"

    @property
    def norm(self) -> bool:
        """Whether rows are normalized."""
        return self.source in ("rmsnorm", "mhc")

    @property
    def weight_first(self) -> bool:
        """Whether a norm's weight is read before the rows: few rows, whose weight is in no cache yet."""
        return self.norm and self.resident and self.blocks == 1

    @property
    def read_words(self) -> int:
        """Words that a thread keeps of each block as it is read."""
        if self.source == "mhc":
            return 16
        return words_of(self.element) * (2 if self.source == "swiglu" else 1)

    @property
    def block_words(self) -> int:
        """Words of each block as it is quantized."""
        return 16 if self.source == "plain" and self.element != "bf16" else 8


def words_of(element: str) -> int:
    """Words of 16 values."""
    return 16 if element == "f32" else 8
