"""
What may be the name of an agent or of a project (contract 1.2), for everybody who is given one.
"""

from __future__ import annotations

import re

LONGEST = 255  # a project is called like its directory, and no file system has longer names
NAME = rf"[a-zA-Z0-9][a-zA-Z0-9_.-]{{0,{LONGEST - 1}}}"
_WHOLE = re.compile(NAME)


def is_name(text: str) -> bool:
    """
    Whether a text is a name and nothing else: a line break after it is no part of one.
    """
    return _WHOLE.fullmatch(text) is not None
