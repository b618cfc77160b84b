"""
The Docker engine's API as async verbs: the only module that knows the docker SDK.

The SDK blocks; it runs in one small pool of threads, each with a connection of its own, every call
with a limit. Answers are the engine's own JSON. Knows nothing of agents; `engines/docker` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, TypeVar

import docker
import requests
from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool

from clawker_cp.engines.docker_wire import Call, EventStream, Json, innermost, mapping, mappings, refusal
from clawker_cp.errors import CapacityExceeded, ClawkerError, DeadlineExceeded, InvalidInput, Unavailable, Unsupported

T = TypeVar("T")

DEFAULT_ENDPOINT = "unix:///var/run/docker.sock"
THREADS = 8
LIMIT_S = 10.0
TRANSFER_LIMIT_S = 60.0
ARCHIVE_BYTES = 16 << 20
LOG_LINES = 100
EVENT_KINDS = ("container", "network")
# Only to construct the SDK's client before the engine has said what it speaks.
_ANY_VERSION = "1.41"
_BASE = "http+docker://"
_REFERENCE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.:/@-]{0,511}")


def endpoint_from(environ: Mapping[str, str]) -> str:
    """
    Where the engine is: `DOCKER_HOST`, which has to be an absolute `unix://` path, or the default.
    """
    endpoint = environ.get("DOCKER_HOST") or DEFAULT_ENDPOINT
    try:
        socket_path(endpoint)
    except InvalidInput as error:
        raise InvalidInput(f"DOCKER_HOST: {error}", hint=error.hint) from error
    return endpoint


def socket_path(endpoint: str) -> str:
    """
    The path of a `unix://` endpoint; `InvalidInput` for any other.
    """
    path = endpoint.removeprefix("unix://")
    if path == endpoint or not PurePosixPath(path).is_absolute() or "\0" in path:
        raise InvalidInput(
            f"{endpoint!r} is not an absolute unix:// path", hint="write it as unix:///var/run/docker.sock"
        )
    return path


class _Connection(UnixHTTPConnection):  # type: ignore[misc]  # the SDK has no types
    """The SDK's connection, which tells the thread's present call about itself."""

    call: threading.local

    def connect(self) -> None:
        # The SDK's own leaves the socket open when nobody listens.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.unix_socket)
        except BaseException:
            sock.close()
            raise
        self.sock = sock
        self._tell()

    def request(self, *args: Any, **options: Any) -> Any:
        self._tell()
        return super().request(*args, **options)

    def _tell(self) -> None:
        call: Call | None = getattr(self.call, "present", None)
        if call is not None:
            call.begin(self)


class _Pool(UnixHTTPConnectionPool):  # type: ignore[misc]  # the SDK has no types
    call: threading.local

    def _new_conn(self) -> _Connection:
        made = _Connection(self.base_url, self.socket_path, self.timeout)
        made.call = self.call
        return made


class _Adapter(UnixHTTPAdapter):  # type: ignore[misc]  # the SDK has no types
    """The SDK's transport over our connections; one per thread, so one pool is enough."""

    def __init__(self, path: str, timeout_s: float | None, call: threading.local) -> None:
        super().__init__(f"http+unix://{path}", timeout_s)
        self._only = _Pool(_BASE, path, timeout_s, maxsize=1)
        self._only.call = call

    def get_connection(self, url: str, proxies: Any = None) -> _Pool:
        return self._only

    def close(self) -> None:
        super().close()
        self._only.close()


class DockerClient:
    """
    The engine at one endpoint. Construction does nothing; `aclose` ends threads and connections.

    Every verb is limited by `limit_s` (or its own `limit_s`), the wait for a free thread included.
    Cancelling frees the caller at once and shuts the request's socket, so its thread is free as well;
    whether the engine has done it then is not known. Raises `NotFound`, `Conflict`, `InvalidInput`
    with the engine's words, `Unsupported` for an engine that is too old, and `Unavailable` for an
    engine that is down, too slow, or goes away in the middle.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, *, threads: int = THREADS, limit_s: float = LIMIT_S) -> None:
        self.endpoint = endpoint
        self.socket = socket_path(endpoint)
        self._limit_s = limit_s
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="docker")
        self._calls: set[Call] = set()
        self._made: dict[int, Any] = {}
        self._version = ""
        self._failures = 0
        self._answered = 0
        self._closed = False

    # -- the engine ----------------------------------------------------------------------------

    async def ping(self) -> None:
        """Return when the engine answers."""
        await self._do("ping", lambda sdk: sdk.ping())

    async def info(self) -> Json:
        return await self._do("info", lambda sdk: mapping(sdk.info()))

    async def version(self) -> Json:
        return await self._do("version", lambda sdk: mapping(sdk.version(api_version=False)))

    # -- containers ----------------------------------------------------------------------------

    async def list_containers(
        self, *, labels: Mapping[str, str] | None = None, every: bool = False, **filters: Any
    ) -> list[Json]:
        """
        Short descriptions of the containers that carry all `labels`; stopped ones only with `every`.
        """
        wanted = {**filters, **({"label": [f"{key}={value}" for key, value in labels.items()]} if labels else {})}
        return await self._do("list", lambda sdk: mappings(sdk.containers(all=every, filters=wanted)))

    async def inspect(self, reference: str) -> Json:
        return await self._on(reference, "inspect", lambda sdk, it: mapping(sdk.inspect_container(it)))

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        """
        Create a container from the engine's own JSON and return its id. `Conflict` for a name in use.
        """
        made = await self._on(
            name,
            "create",
            lambda sdk, it: mapping(sdk.create_container_from_config(dict(config), it)),
            limit_s=TRANSFER_LIMIT_S,
        )
        return str(made["Id"])

    async def start(self, reference: str) -> None:
        """Start a container; one that runs is fine."""
        await self._on(reference, "start", lambda sdk, it: sdk.start(it), limit_s=TRANSFER_LIMIT_S)

    async def stop(self, reference: str, *, grace_s: int = 10) -> None:
        """SIGTERM, and SIGKILL after `grace_s`; one that is stopped is fine."""
        limit = self._limit_s + grace_s
        await self._on(reference, "stop", lambda sdk, it: sdk.stop(it, timeout=grace_s), limit_s=limit)

    async def kill(self, reference: str, signal: str | int = "KILL") -> None:
        """Signal the first process. `Conflict` when the container does not run."""
        await self._on(reference, "kill", lambda sdk, it: sdk.kill(it, signal))

    async def pause(self, reference: str) -> None:
        """Freeze every process. `Conflict` when it is paused already or does not run."""
        await self._on(reference, "pause", lambda sdk, it: sdk.pause(it))

    async def unpause(self, reference: str) -> None:
        await self._on(reference, "unpause", lambda sdk, it: sdk.unpause(it))

    async def wait(self, reference: str, *, limit_s: float) -> int:
        """
        The exit code, once the container has ended; holds a thread meanwhile. `DeadlineExceeded` after `limit_s`.
        """
        try:
            done = await self._on(
                reference, "wait", lambda sdk, it: mapping(sdk.wait(it, timeout=limit_s + 1)), limit_s=limit_s
            )
        except _TooSlow as error:
            raise DeadlineExceeded(f"container {reference} did not end within {limit_s:.3g} s") from error
        return int(done["StatusCode"])

    async def rename(self, reference: str, name: str) -> None:
        await self._on(reference, "rename", lambda sdk, it: sdk.rename(it, name))

    async def remove(self, reference: str, *, force: bool = False, volumes: bool = True) -> None:
        """
        Remove a container, with its nameless volumes. `Conflict` for a running one without `force`.
        """
        await self._on(
            reference,
            "remove",
            lambda sdk, it: sdk.remove_container(it, force=force, v=volumes),
            limit_s=TRANSFER_LIMIT_S,
        )

    async def logs(self, reference: str, *, lines: int = LOG_LINES) -> bytes:
        """The last lines that a container wrote."""
        return await self._on(reference, "logs", lambda sdk, it: bytes(sdk.logs(it, tail=lines)))

    async def put_archive(self, reference: str, path: str, archive: bytes) -> None:
        """Unpack a tar archive at `path`, in the writable layer; works before the first start too."""
        await self._on(
            reference, "put_archive", lambda sdk, it: sdk.put_archive(it, path, archive), limit_s=TRANSFER_LIMIT_S
        )

    async def get_archive(self, reference: str, path: str, *, most: int = ARCHIVE_BYTES) -> bytes:
        """A tar archive of `path`; `CapacityExceeded` beyond `most` bytes."""

        def fetch(sdk: Any, it: str) -> bytes:
            parts, size = [], 0
            stream, _stat = sdk.get_archive(it, path)
            with contextlib.closing(stream):
                for part in stream:
                    size += len(part)
                    if size > most:
                        raise CapacityExceeded(f"{path} of {reference} is larger than {most} bytes", limit="archive")
                    parts.append(part)
            return b"".join(parts)

        return await self._on(reference, "get_archive", fetch, limit_s=TRANSFER_LIMIT_S)

    async def image_inspect(self, image: str) -> Json:
        return await self._on(image, "image", lambda sdk, it: mapping(sdk.inspect_image(it)))

    async def volume_inspect(self, name: str) -> Json:
        return await self._on(name, "volume", lambda sdk, it: mapping(sdk.inspect_volume(it)))

    # -- networks ------------------------------------------------------------------------------

    async def list_networks(self, name: str = "") -> list[Json]:
        """Every network, or those with exactly this name; the engine allows several."""
        found = await self._do("networks", lambda sdk: mappings(sdk.networks(names=[name] if name else None)))
        return [network for network in found if not name or network.get("Name") == name]

    async def inspect_network(self, reference: str) -> Json:
        return await self._on(reference, "network", lambda sdk, it: mapping(sdk.inspect_network(it)))

    async def create_network(
        self,
        name: str,
        *,
        ipam: list[dict[str, str]],
        labels: Mapping[str, str],
        options: Mapping[str, str] | None = None,
    ) -> str:
        """
        Create a bridge network from IPAM entries of the engine's own form; returns its id.
        """
        made = await self._on(
            name,
            "create_network",
            lambda sdk, it: mapping(
                sdk.create_network(
                    it,
                    driver="bridge",
                    options=dict(options or {}),
                    ipam={"Driver": "default", "Config": ipam},
                    check_duplicate=True,
                    labels=dict(labels),
                )
            ),
        )
        return str(made["Id"])

    async def connect(self, network: str, container: str, *, address: str = "") -> None:
        """Join a container to a network, at an address of its subnet or one that the engine chooses."""
        await self._on(
            container,
            "connect",
            lambda sdk, it: sdk.connect_container_to_network(it, network, ipv4_address=address or None),
        )

    async def disconnect(self, network: str, container: str, *, force: bool = False) -> None:
        await self._on(
            container, "disconnect", lambda sdk, it: sdk.disconnect_container_from_network(it, network, force=force)
        )

    async def remove_network(self, reference: str) -> None:
        """Remove a network. `Conflict` while a container is on it."""
        await self._on(reference, "remove_network", lambda sdk, it: sdk.remove_network(it))

    # -- life ----------------------------------------------------------------------------------

    def events(self, since: str = "", kinds: tuple[str, ...] = EVENT_KINDS) -> EventStream:
        """
        Follow what happens from `since` (`<sec>.<9 digits>`, "" = now), for `async with` and `async for`.
        """
        return EventStream(lambda call: self._follow(call, since, kinds), self._limit_s)

    def statistics(self) -> dict[str, int]:
        """Calls answered and failed so far, and under way now."""
        return {"answered": self._answered, "failed": self._failures, "under_way": len(self._calls)}

    async def aclose(self) -> None:
        """
        End every call under way with `Unavailable`, then the threads. A second time is fine.
        """
        self._closed = True
        for call in list(self._calls):
            call.abort()
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
        for sdk in self._made.values():
            sdk.close()
        self._made.clear()

    async def _on(
        self, reference: str, what: str, action: Callable[[Any, str], T], *, limit_s: float | None = None
    ) -> T:
        if not _REFERENCE.fullmatch(reference) or ".." in reference:
            raise InvalidInput(f"{reference[:80]!r} is not a name or an id")
        return await self._do(f"{what} {reference[:64]}", lambda sdk: action(sdk, reference), limit_s=limit_s)

    async def _do(self, what: str, action: Callable[[Any], T], *, limit_s: float | None = None) -> T:
        if self._closed:
            raise Unavailable("the Docker client is closed")
        limit = self._limit_s if limit_s is None else limit_s
        call = Call()
        self._calls.add(call)
        timeout = asyncio.timeout(limit)
        try:
            async with timeout:
                result = await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._work, call, what, action, limit
                )
        except asyncio.CancelledError:
            if self._closed and not _being_cancelled():
                raise Unavailable("the Docker client was closed") from None
            raise
        except TimeoutError as error:
            self._failures += 1
            if not timeout.expired():
                raise
            raise _too_slow(self.endpoint, what, limit) from error
        except ClawkerError:
            self._failures += 1
            raise
        finally:
            call.abort()
            self._calls.discard(call)
        self._answered += 1
        return result

    def _work(self, call: Call, what: str, action: Callable[[Any], T], limit_s: float) -> T:
        """In a thread of the pool: the SDK's call, with its errors turned into ours."""
        self._local.present = call
        try:
            with _translated(self.endpoint, what, limit_s):
                return self._attempt(action, limit_s)
        finally:
            self._local.present = None
            call.end()

    def _follow(self, call: Call, since: str, kinds: tuple[str, ...]) -> Generator[bytes, None, None]:
        """In the stream's own thread: the engine's chunks, once it has answered."""
        self._local.present = call
        with _translated(self.endpoint, "events", self._limit_s):
            sdk = self._sdk(self._limit_s)
            try:
                # Not sdk.events: its iterator takes a refusal for the end of the stream.
                response = sdk.get(
                    f"{sdk.base_url}/v{sdk.api_version}/events",
                    params={"since": since or None, "filters": json.dumps({"type": list(kinds)})},
                    stream=True,
                    timeout=None,
                )
                _raise_for_status(response)
            except BaseException:
                self._version = ""
                sdk.close()
                raise

        def read() -> Generator[bytes, None, None]:
            with (
                contextlib.closing(sdk),
                contextlib.closing(response),
                _translated(self.endpoint, "events", self._limit_s),
            ):
                yield from response.iter_content(None)

        return read()

    def _attempt(self, action: Callable[[Any], T], limit_s: float) -> T:
        sdk = self._of_thread()
        sdk.timeout = limit_s
        try:
            return action(sdk)
        except docker.errors.APIError as error:
            # An engine replaced by an older one; the request was refused as a whole.
            if error.status_code != 400 or "client version" not in str(error.explanation):
                raise
            self._version = ""
            self._forget(sdk)
            sdk = self._of_thread()
            sdk.timeout = limit_s
            return action(sdk)

    def _of_thread(self) -> Any:
        number = threading.get_ident()
        sdk = self._made.get(number)
        if sdk is not None and self._version and sdk.api_version != self._version:
            self._forget(sdk)
            sdk = None
        if sdk is None:
            sdk = self._made[number] = self._sdk(self._limit_s)
        return sdk

    def _forget(self, sdk: Any) -> None:
        self._made.pop(threading.get_ident(), None)
        sdk.close()

    def _sdk(self, timeout_s: float) -> Any:
        """A client of the SDK that speaks what the engine speaks; the first one asks."""
        if not self._version:
            with contextlib.closing(self._plain(_ANY_VERSION, timeout_s)) as asking:
                self._version = str(asking.version(api_version=False)["ApiVersion"])
        return self._plain(self._version, timeout_s)

    def _plain(self, version: str, timeout_s: float) -> Any:
        sdk = docker.APIClient(base_url=self.endpoint, version=version, timeout=timeout_s)
        sdk.trust_env = False
        sdk.mount(_BASE, _Adapter(self.socket, timeout_s, self._local))
        return sdk


class _TooSlow(Unavailable):
    """The engine took longer than the call may."""


def _too_slow(endpoint: str, what: str, limit_s: float) -> _TooSlow:
    return _TooSlow(f"the Docker engine at {endpoint} did not answer within {limit_s:.3g} s ({what})")


def _raise_for_status(response: Any) -> None:
    try:
        response.raise_for_status()
    except requests.exceptions.HTTPError as error:
        docker.errors.create_api_error_from_http_exception(error)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextlib.contextmanager
def _translated(endpoint: str, what: str, limit_s: float) -> Iterator[None]:
    """Turn what the SDK and what is below it raise into our categories."""
    try:
        yield
    except ClawkerError:
        raise
    except docker.errors.APIError as error:
        raise refusal(error.status_code or 0, str(error.explanation or error), what) from error
    except docker.errors.InvalidVersion as error:
        raise Unsupported(str(error), feature="docker", needs="Docker 20.10") from error
    except docker.errors.NullResource as error:
        raise InvalidInput(f"{what}: {error}") from error
    except requests.exceptions.Timeout as error:
        raise _too_slow(endpoint, what, limit_s) from error
    except (requests.exceptions.RequestException, docker.errors.DockerException, OSError, LookupError) as error:
        raise Unavailable(
            f"the Docker engine at {endpoint} does not answer ({what}): {innermost(error)}",
            hint="is dockerd running, and DOCKER_HOST the path of its socket?",
        ) from error
