"""
The errors that cross package borders, by category.

A category says what a caller can do about a failure; the gRPC status follows from it
(`rpc/status.py`). New classes only where a caller reacts differently. Messages never hold
tokens, keys or certificates (I11).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

# What libraries that read a stranger's text raise for some of it, besides the error they document.
READERS_RAISE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError)


class ClawkerError(Exception):
    """
    Root of every error this package raises on purpose.

    `code` is stable and upper case, for programs; `message` is one sentence for people;
    `hint`, if there is one, says what to do next; `details` are facts for programs, never secrets.
    """

    code = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: Mapping[str, str] = details or {}
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message


class InvalidInput(ClawkerError, ValueError):
    """The caller sent something wrong; the message names the field and the fix."""

    code = "INVALID_INPUT"


class Unauthenticated(ClawkerError):
    """Nobody proved who is asking."""

    code = "UNAUTHENTICATED"


class Denied(ClawkerError):
    """The caller is known and may not."""

    code = "DENIED"


class NotFound(ClawkerError):
    """What the caller named does not exist."""

    code = "NOT_FOUND"


class Conflict(ClawkerError):
    """The request is fine, the present state does not fit it."""

    code = "CONFLICT"


class Unavailable(ClawkerError):
    """A peer or subsystem is down; the same request may succeed later."""

    code = "UNAVAILABLE"


class CapacityExceeded(ClawkerError):
    """A bound is reached; `limit` names it."""

    code = "CAPACITY"

    def __init__(self, message: str, *, limit: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit


class Unsupported(ClawkerError):
    """The kernel or the host lacks `feature`; `needs` is the lowest version or the package that has it."""

    code = "UNSUPPORTED"

    def __init__(self, message: str, *, feature: str, needs: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.feature = feature
        self.needs = needs


class DeadlineExceeded(ClawkerError, TimeoutError):
    """Our own time budget ran out."""

    code = "DEADLINE_EXCEEDED"


def descriptors_spent(error: BaseException) -> CapacityExceeded | None:
    """
    What to tell people of a system call that found no file descriptor left; None for any other error.
    """
    if not isinstance(error, OSError) or error.errno not in {errno.EMFILE, errno.ENFILE}:
        return None
    return CapacityExceeded(
        "the control plane has no file descriptor left",
        limit="file descriptors",
        hint="raise its limit on open files (ulimit -n, LimitNOFILE=), or stop agents",
    )


def unexpected(error: OSError) -> ClawkerError:
    """
    What nobody expected of a file or a socket, as one line, with the next step where there is one.
    """
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
    hint = "is the disk full or read-only?" if full else None
    return descriptors_spent(error) or Unavailable(f"{where}{error.strerror or error}", hint=hint)
