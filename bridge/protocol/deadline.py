"""Time with a type: every wait in this project takes a Deadline, never a bare float."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bridge.errors import DeadlineExceeded


@dataclass(frozen=True)
class Deadline:
    """A point on the monotonic clock of this process; it does not travel (send `remaining_s`)."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def check(self, what: str) -> None:
        """Raises DeadlineExceeded, naming `what`, when the time is over."""
        if self.expired:
            raise DeadlineExceeded(
                f"{what} outlasted its deadline",
                where=what,
                expected="an end before the deadline",
                got="none yet",
                remedy="raise timeout_s, or look for a hung peer",
            )
