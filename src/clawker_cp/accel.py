"""
The one door to code that exists compiled and plain.

Everything else imports from here. The compiled twins are the default and their absence is an
error, so that a broken build is never just slow; `CLAWKER_CP_NO_EXTENSIONS=1` selects the plain ones.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("CLAWKER_CP_NO_EXTENSIONS") == "1":
    from clawker_cp._pure.dnswire import Query, build_reply, parse_query
    from clawker_cp._pure.names import NameMatcher

    IMPLEMENTATION = "pure"
else:
    try:
        from clawker_cp._fast.dnswire import Query, build_reply, parse_query
        from clawker_cp._fast.names import NameMatcher
    except ImportError as error:
        raise ImportError(
            "the compiled modules of clawker_cp are missing or broken: build them with `pip install -e .`, "
            "or set CLAWKER_CP_NO_EXTENSIONS=1 to run the slower plain ones"
        ) from error

    IMPLEMENTATION = "fast"

__all__ = ["IMPLEMENTATION", "NameMatcher", "Query", "build_reply", "parse_query"]
