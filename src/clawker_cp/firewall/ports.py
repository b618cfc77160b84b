"""
Port specifications of rules (contract 7.2): empty, one number, or an inclusive range.

Pure text handling; which ports a protocol uses by default is here too, since both belong to
the same column of a rule.
"""

from __future__ import annotations

from functools import lru_cache

MAX_PORT = 65535

HTTP_FAMILY = frozenset({"https", "http", "ws", "wss"})
TLS_PROTOCOLS = frozenset({"https", "wss"})
OPAQUE = frozenset({"tcp", "ssh", "udp"})
PROTOCOLS = HTTP_FAMILY | OPAQUE

# What an empty port is written as (contract 7.4); tcp and udp stay empty and mean 443.
WRITTEN_DEFAULT = {"https": "443", "wss": "443", "http": "80", "ws": "80", "ssh": "22"}
EFFECTIVE_DEFAULT = 443

NOT_A_NUMBER = "is not a number"
OUT_OF_RANGE = f"is outside 1..{MAX_PORT}"
REVERSED = "is a range whose first port is above its last"
MALFORMED = "is not a port or a range like 9000-9100"


class PortError(ValueError):
    """The text is no port specification; the message completes `port "<text>" ...`."""


def _number(text: str) -> int:
    text = text.strip()
    if not text:
        raise PortError(MALFORMED)
    if not (text.isascii() and text.isdigit()):
        raise PortError(NOT_A_NUMBER)
    # Five significant digits at most: a longer one is out of range, and never converted.
    significant = text.lstrip("0")
    if not significant or len(significant) > 5 or int(significant) > MAX_PORT:
        raise PortError(OUT_OF_RANGE)
    return int(significant)


@lru_cache(maxsize=4096)
def parse_ports(text: str) -> tuple[int, int] | None:
    """
    Read a port specification.

    Returns the inclusive range, None for an empty one. Raises `PortError` with one of the
    four problems of contract 7.2: not a number, out of range, reversed, malformed.
    """
    text = text.strip()
    if not text:
        return None
    if "-" not in text:
        port = _number(text)
        return port, port
    first, _, last = text.partition("-")
    low, high = _number(first), _number(last)
    if low > high:
        raise PortError(REVERSED)
    return low, high


def effective_ports(proto: str, text: str) -> tuple[int, int]:
    """Return the inclusive range that a rule of `proto` with port `text` speaks for."""
    found = parse_ports(text)
    if found is not None:
        return found
    port = int(WRITTEN_DEFAULT.get(proto, str(EFFECTIVE_DEFAULT)))
    return port, port
