"""
A gRPC listener: mTLS, limits, and the interceptors in the order of contract 5, around the services it is given.

Decides nothing about calls; `rpc.auth` and the servicers do. Nothing is bound before `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clawker_cp.errors import ClawkerError, Unavailable
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.interceptors.ready import ReadyGate
from clawker_cp.rpc.interceptors.recovery import Observe, Recovery
from clawker_cp.rpc.limits import ADMIN_LIMITS, ListenerLimits, listener_options
from clawker_cp.rpc.tls import TlsMaterial, server_credentials
from clawker_cp.rpc.transport import grpc

STOP_GRACE_S = 5.0
# `add_<Service>Servicer_to_server` of generated code, with its servicer.
Register = Callable[[Any], None]


def interceptor_chain(
    auth: AuthInterceptor,
    *,
    is_ready: Callable[[], bool] | None = None,
    identity: Sequence[grpc.aio.ServerInterceptor] = (),
    log: Any = None,
    observe: Observe | None = None,
) -> list[grpc.aio.ServerInterceptor]:
    """
    Recovery -> ready gate (with `is_ready`) -> auth -> identity. The first failure answers.
    """
    gate = [] if is_ready is None else [ReadyGate(is_ready)]
    return [Recovery(log=log, observe=observe), *gate, *auth.interceptors(), *identity]


def served_methods(services: Iterable[Register]) -> frozenset[str]:
    """
    The full names of the methods that services register.
    """
    recorder = _Recorder()
    for register in services:
        register(recorder)
    return frozenset(recorder.methods)


class _Recorder:
    """What generated code registers with, to see what it would serve."""

    def __init__(self) -> None:
        self.methods: set[str] = set()

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same methods come again by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self.methods |= {f"/{service}/{method}" for method in handlers}


class RpcServer:
    """
    One listener on one or more addresses (`host:port`, port 0 = any free one). Starts once and stops once.

    `material` is asked at every handshake, so renewed certificates need no new listener.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        material: Callable[[], TlsMaterial],
        auth: AuthInterceptor,
        services: Sequence[Register],
        *,
        is_ready: Callable[[], bool] | None = None,
        identity: Sequence[grpc.aio.ServerInterceptor] = (),
        limits: ListenerLimits = ADMIN_LIMITS,
        log: Any = None,
        observe: Observe | None = None,
    ) -> None:
        self.name = name
        self._addresses = addresses
        self._material = material
        self._auth = auth
        self._services = services
        self._interceptors = interceptor_chain(auth, is_ready=is_ready, identity=identity, log=log, observe=observe)
        self._limits = limits
        self._server: Any = None
        self.ports: tuple[int, ...] = ()

    async def start(self) -> tuple[int, ...]:
        """
        Bind and serve; returns the ports, in the order of the addresses.

        Raises `ClawkerError` if a served method has no scope (I10), `Unavailable` if an address cannot be bound;
        then nothing is bound.
        """
        missing = self._auth.unmapped(served_methods(self._services))
        if missing:
            raise ClawkerError(f"{self.name}: no scope for {', '.join(missing)}", code="UNMAPPED_METHOD")
        # One each: a listener takes the certificate its credentials were made with, which they give once.
        credentials = [server_credentials(self._material) for _ in self._addresses]
        server = grpc.aio.server(
            interceptors=self._interceptors,
            options=listener_options(self._limits),
            maximum_concurrent_rpcs=self._limits.calls,
        )
        for register in self._services:
            register(server)
        try:
            self.ports = tuple(self._bind(server, *one) for one in zip(self._addresses, credentials, strict=True))
            await server.start()
        except BaseException:
            await server.stop(None)
            raise
        self._server = server
        return self.ports

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """
        Take no new calls, give those in flight `grace_s`, cancel the rest; then end what auth still asks.
        """
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
        await self._auth.aclose()

    async def wait_stopped(self) -> None:
        """
        Return when the listener is gone, whoever ended it.
        """
        if self._server is not None:
            await self._server.wait_for_termination()

    def _bind(self, server: Any, address: str, credentials: grpc.ServerCredentials) -> int:
        try:
            port: int = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise Unavailable(
                f"{self.name}: {address} cannot be bound", hint="is another control plane running?"
            ) from error
        return port
