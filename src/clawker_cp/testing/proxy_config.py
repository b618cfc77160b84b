"""
Generated proxy configuration for tests that only read it: no Envoy, no certificates.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import orjson

from clawker_cp.firewall.compile import Compiled
from clawker_cp.firewall.envoy.options import EnvoyOptions
from clawker_cp.firewall.envoy.resources import Resources, build_resources
from clawker_cp.firewall.inspection import Leaf

OPTIONS = EnvoyOptions(Path("/run/x"), "10.231.80.1", Path("/etc/ssl/certs/ca-certificates.crt"))
LEAVES: defaultdict[str, Leaf] = defaultdict(lambda: Leaf("CERT", "KEY", "mark", "/c.pem", "/k.pem"))


def resources_of(compiled: Compiled, previous: Resources | None = None) -> Resources:
    """Build all files of a plan with stand-in certificates."""
    return build_resources(compiled.plan, LEAVES, OPTIONS, previous)


def read(resources: Resources, file: str) -> list[dict[str, Any]]:
    """Return the resources of one file as Envoy would read them."""
    document = orjson.loads(resources.files[file].document(7))
    assert document["version_info"] == "7"
    found: list[dict[str, Any]] = document["resources"]
    return found
