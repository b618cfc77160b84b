"""
What each certificate has to look like (contract 4.1). Values only.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

ORGANISATION = "clawker"
YEAR = dt.timedelta(days=365)
BACKDATE = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Profile:
    """
    One kind of certificate. `path_length` None = a leaf; `uris` are given when it is minted.
    """

    common_name: str
    life: dt.timedelta
    path_length: int | None = None
    server: bool = False
    client: bool = False
    dns: tuple[str, ...] = ()
    ips: tuple[str, ...] = ()
    key_encipherment: bool = False
    renew_before: dt.timedelta = dt.timedelta(days=30)
    key_mode: int = 0o600

    @property
    def is_authority(self) -> bool:
        return self.path_length is not None


CLI_CA = Profile("clawker CLI CA", 5 * YEAR, path_length=1)
SERVER = Profile(
    "clawker-controlplane", YEAR, server=True, dns=("localhost", "clawker-controlplane"), ips=("127.0.0.1",),
    key_encipherment=True,
)  # fmt: skip
CLI_CLIENT = Profile("clawker-cli", YEAR, client=True)
CP_CLIENT = Profile("clawker-controlplane", YEAR, client=True)
OTEL_SERVER = Profile(
    "clawker-otel-collector", YEAR, server=True, dns=("host.docker.internal", "localhost", "otel-collector"),
    ips=("127.0.0.1",), key_encipherment=True, key_mode=0o644,
)  # fmt: skip
INFRA_CA = Profile("clawker infra intermediate CA", 5 * YEAR, path_length=0)
AGENTS_CA = Profile("clawker agents intermediate CA", YEAR, path_length=0, renew_before=dt.timedelta(days=60))
AGENT = Profile(
    "clawker-clawkerd", dt.timedelta(hours=24), server=True, client=True, key_encipherment=True,
    renew_before=dt.timedelta(hours=12), key_mode=0o400,
)  # fmt: skip


def infra_client(service: str) -> Profile:
    """
    The client leaf of an infrastructure service, `<svc>-otel-client`, DNS name = CN.
    """
    name = f"{service}-otel-client"
    return Profile(name, YEAR, client=True, dns=(name,), key_mode=0o644)
