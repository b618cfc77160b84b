"""
`clawker.control.v1.ControlService`, whole: its parts by subject, one class for the generated server.
"""

from __future__ import annotations

import inspect
from typing import Any


class ControlServicer:
    """
    Offers the RPCs of its parts as its own. A method that two parts have is a programming error.
    """

    def __init__(self, *parts: Any) -> None:
        for part in parts:
            for name, method in inspect.getmembers(part, callable):
                if not name[0].isupper():
                    continue
                if hasattr(self, name):
                    raise TypeError(f"two parts offer {name}")
                setattr(self, name, method)
