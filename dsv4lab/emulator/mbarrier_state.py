"""The state of one mbarrier, its 8 bytes in shared memory, and the state tokens that arrivals return."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4lab.emulator.ptx import Instruction

MAX_COUNT = 2**20 - 1  # of arrivals, expected or pending, and of transaction bytes either way
_COUNT_BITS, _PHASE_BITS, _TAG_BITS, _TX_BITS = 20, 24, 19, 22
_VALID = 1 << 63


class MBarrier:
    """One mbarrier.

    Attributes:
        expected: arrivals of each phase.
        pending: arrivals that the current phase still needs.
        tx: transaction bytes that the current phase still needs; negative when more came than was expected.
        some_came: some have come in the current phase.
        phase: number of the current phase, from 0.
        latest: model time of the latest arrival in the current phase.
        completed_at: model time at which the phase before it was complete.
        warps: those whose first use was found to come after the initialisation.
        expecting: warp and instruction that were the last to announce transaction bytes.
        stored: its 8 bytes in shared memory, as last written.
    """

    __slots__ = (
        "completed_at",
        "expected",
        "expecting",
        "latest",
        "pending",
        "phase",
        "some_came",
        "stored",
        "tx",
        "warps",
    )

    def __init__(self, count: int) -> None:
        self.expected = self.pending = count
        self.tx = self.phase = self.latest = self.completed_at = 0
        self.some_came = False
        self.warps: set[int] = set()
        self.expecting: tuple[int | None, Instruction | None] = None, None
        self.stored = self.encoded()

    @property
    def busy(self) -> bool:
        """In the middle of a phase."""
        return self.pending != self.expected or self.tx != 0

    def settle(self) -> bool:
        """Go on to the next phase if nothing is missing, and say whether; brings `stored` up to date."""
        done = not (self.pending or self.tx)
        if done:
            self.phase += 1
            self.pending, self.some_came = self.expected, False
            self.completed_at, self.latest = self.latest, 0
        self.stored = self.encoded()
        return done

    def encoded(self) -> bytes:
        """The 8 bytes in shared memory: valid bit, parity, tx-count, expected and pending count."""
        word = self.phase & 1
        word = word << _TX_BITS | self.tx & (1 << _TX_BITS) - 1
        word = word << _COUNT_BITS | self.expected
        word = word << _COUNT_BITS | self.pending
        return (_VALID | word).to_bytes(8, "little")

    def token(self, tag: int) -> int:
        """The state token, 64 bits: valid bit, `tag` to tell barriers apart, phase, pending count."""
        tag &= (1 << _TAG_BITS) - 1
        phase = self.phase & (1 << _PHASE_BITS) - 1
        return _VALID | (tag << _PHASE_BITS | phase) << _COUNT_BITS | self.pending

    def age(self, token: int, tag: int) -> int | None:
        """How many phases ago a token was given; None if it is another barrier's, or no token at all."""
        if (token ^ self.token(tag)) >> (_COUNT_BITS + _PHASE_BITS):
            return None
        return self.phase - (token >> _COUNT_BITS) & (1 << _PHASE_BITS) - 1


def pending_count(token: int) -> int:
    """Arrivals that were pending before the arrival that gave this state token."""
    return token & MAX_COUNT
