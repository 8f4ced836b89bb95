"""What can go wrong in the world, as exceptions with fields. A miss is none of them: it is a value
(`kvd.Miss`)."""

from __future__ import annotations


class KvdError(Exception):
    """What happened, to what, and what to do about it."""

    def __init__(self, code: str, field: str, message: str, fix: str) -> None:
        super().__init__(code, field, message, fix)
        self.code = code
        """Which kind of error, in lower case: "invalid", "unavailable", "limit", "timed_out"..."""
        self.field = field
        """The field, argument or setting, or empty."""
        self.message = message
        """What happened, with the value."""
        self.fix = fix
        """What to do about it."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}; {self.fix}" if self.field else f"{self.message}; {self.fix}"


class InvalidError(KvdError, ValueError):
    """A value that can never be right."""


class UnavailableError(KvdError, ConnectionError):
    """The node is away, restarting, or too busy to answer."""


class LimitError(KvdError):
    """A stated limit was reached; the message names it."""


class TimedOutError(KvdError, TimeoutError):
    """The caller's patience is over; what was asked for is still under way."""


_CLASSES: dict[str, type[KvdError]] = {
    "invalid": InvalidError,
    "unsupported_version": InvalidError,
    "chain_order": InvalidError,
    "unavailable": UnavailableError,
    "unknown_session": UnavailableError,
    "limit": LimitError,
    "timed_out": TimedOutError,
}


def of(code: str, field: str, message: str, fix: str) -> KvdError:
    """The exception for an error's code."""
    return _CLASSES.get(code, KvdError)(code, field, message, fix)
