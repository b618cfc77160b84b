"""
A gate that a started process waits at until whoever started it has written down that it exists.

Between a fork and the record of it lies a moment in which a kill of the parent would leave a process
that nobody finds again. The child reads a line from a pipe whose only writer is the parent.
"""

from __future__ import annotations

import os

from clawker_cp.errors import Unavailable

# For a shell whose $gate is the descriptor. Without a line (the only writer died) nothing is started.
AWAIT = 'read -r _ < "/proc/self/fd/$gate" || exit 125'
WAIT = f'gate=$1; shift; {AWAIT}; exec "$@"'  # $1 is the descriptor, the rest the command


class Gate:
    """
    What a launched command waits at: it starts when the gate is opened, and never if that has not come to pass when
    the context is left or this process ends, however it ends. `entry` is for the child to inherit.
    """

    def __init__(self) -> None:
        self.entry = self._opener = -1

    def __enter__(self) -> Gate:
        try:
            self.entry, self._opener = os.pipe()
        except OSError as error:
            raise Unavailable(f"cannot start a process: {error.strerror}") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self.entry)
        os.close(self._opener)

    def open(self) -> None:
        """
        Let the command start; one that is gone already is fine.
        """
        os.write(self._opener, b"\n")
