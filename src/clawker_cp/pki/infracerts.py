"""
Client certificates for infrastructure services, from the intermediate that the CLI provisions.

The collector trusts that intermediate alone, so an agent's leaf never opens the telemetry lane.
"""

from __future__ import annotations

import datetime as dt
import re

from clawker_cp.errors import InvalidInput
from clawker_cp.pki.certificates import Identity, is_due, mint
from clawker_cp.pki.profiles import infra_client
from clawker_cp.pki.tree import INFRA_CA, AuthTree

_SERVICE = re.compile(r"[a-z][a-z0-9-]{0,40}")


class InfraCertificates:
    """
    Mints `<svc>-otel-client` leaves and keeps the last of each service until it is due. One caller at a time.
    """

    def __init__(self, tree: AuthTree) -> None:
        self._tree = tree
        self._minted: dict[str, Identity] = {}

    def leaf(self, service: str, now: dt.datetime) -> Identity:
        """
        The leaf of a service with its intermediate; minted anew with less than 30 days left.

        Raises `InvalidInput` for a service name that cannot be a DNS label, `ClawkerError`
        (`PKI_INCONSISTENT`) when the intermediate is not usable.
        """
        if not _SERVICE.fullmatch(service):
            raise InvalidInput(f"service: {service!r} is not a lower-case label")
        known = self._minted.get(service)
        profile = infra_client(service)
        if known is None or is_due(known.certificate, profile, now):
            known = self._minted[service] = mint(profile, self._tree.identity(INFRA_CA), now)
        return known
