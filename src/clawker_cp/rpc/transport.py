"""
grpc, imported so that it refuses TLS 1.2 (contract 4.3). Everything in `rpc` takes it from here.

grpc offers no lowest TLS version. It does offer the cipher suites of TLS 1.2, in a variable that it reads once, when
it is imported: with one suite for RSA alone no TLS 1.2 handshake succeeds on our ECDSA leaf, while the suites of
TLS 1.3 are not affected. Variables are put back at once, so that no child and no agent inherits them.
"""

from __future__ import annotations

import os
import sys

SUITES_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
SUITES = "ECDHE-RSA-AES256-GCM-SHA384"
VERBOSITY_VARIABLE = "GRPC_VERBOSITY"
# Our children are started with fork and exec at once: grpc's handlers would only fill the log. So would a line on
# stderr for each handshake that fails, which every agent can have thousands of; nothing bounds what grpc writes.
VARIABLES = {SUITES_VARIABLE: SUITES, "GRPC_ENABLE_FORK_SUPPORT": "0", VERBOSITY_VARIABLE: "ERROR"}


def _load() -> bool:
    """Import grpc; False if somebody did so before and it may take TLS 1.2, which the auth interceptor then refuses."""
    if "grpc" in sys.modules:
        return False
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(VARIABLES)
    try:
        import grpc  # noqa: F401 - this is the point
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return True


TLS_1_3_ONLY = _load()

import grpc  # noqa: E402 - after the variable was set

__all__ = ["TLS_1_3_ONLY", "grpc"]
