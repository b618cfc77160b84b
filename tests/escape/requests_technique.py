"""
Requests by which code inside an agent may try to reach a path, a method or a host that no rule allows.

Run inside a sandbox whose rules are `GET,POST https://api.example.com/v1/`, `https://www.example.com` less
`https://www.example.com/admin`, and `wss://www.example.com/status/`; prints one JSON line per attempt with
the status codes it got. What reached an origin is for the outside world to say. HTTP/1 uses the standard
library only, HTTP/2 wants `h2`.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

Headers = Sequence[tuple[str, str]]
API, WWW = b"api.example.com", b"www.example.com"
LIMIT_S = 3.0
SMUGGLED = b"GET /admin HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
END = 5 + len(SMUGGLED)


def get(
    target: bytes = b"/v1/ok", host: bytes | None = API, more: bytes = b"", body: bytes = b"", method: bytes = b"GET"
) -> bytes:
    line = b"Host: " + host + b"\r\n" if host is not None else b""
    return method + b" " + target + b" HTTP/1.1\r\n" + line + more + b"\r\n" + body


def post(more: bytes, body: bytes) -> bytes:
    return get(more=more, body=body, method=b"POST")


UPGRADE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
)
SPELLINGS = [
    b"/admin", b"/v1-evil", b"/V1/ok", b"/v1/../admin", b"/v1/%2e%2e/admin", b"/v1/.%2e/admin", b"/v1/%252e%252e/admin",
    b"/v1/%25252e%25252e/admin", b"/v1/%2E%2E%2Fadmin", b"/v1//admin", b"//admin", b"/v1/..;/admin", b"/v1;/../admin",
    b"/v1/\\..\\admin", b"/v1/%5c..%5cadmin", b"/v1/%00", b"/v1/a%2fb", b"/v1/%0d%0aX:%20y", b"/v1/ok#/admin", b"*",
    b"/%76%31/ok", b"/v1/\xc0\xae\xc0\xae/admin", b"/v1/%c0%ae%c0%ae/admin", b"/v1/%u002e%u002e/admin", b"/v1/%",
    b"/v1/%zz", b"/./v1/ok", b"/v1/ok/.", b"/v1 /ok", b"/v1\t/x", b"?/v1/", b"v1/ok", b"https://api.example.com/admin",
]  # fmt: skip
HOSTS = [
    b"evil.example.org", b"api.example.com.", b"api.example.com:8443", b"api.example.com:0443", b"api.example.com:",
    b"api.example.com:443:443", b"x@api.example.com", b"api.example.com@evil.example.org", b"[::1]", b"198.51.100.10",
    b"api.example.com,evil.example.org", b"api.example.com evil.example.org", b"evil.example.org#api.example.com",
    b"api.example.com/evil", b"", b"xn--api-.example.com", b"api.example.com\x00", b"api.ex\xc3\xa4mple.com",
    b"api%2eexample.com", b"www.example.com",
]  # fmt: skip
CODINGS = [
    b"xchunked", b"chunked, identity", b"identity", b"\x0bchunked", b"chunked\r\nTransfer-Encoding: identity",
    b"gzip, chunked",
]  # fmt: skip
REFUSED = [(f"target {t!r}", get(t)) for t in SPELLINGS]
REFUSED += [(f"host {h!r}", get(host=h)) for h in HOSTS]
REFUSED += [(f"coding {c!r}", post(b"Transfer-Encoding: " + c + b"\r\n", b"0\r\n\r\n" + SMUGGLED)) for c in CODINGS]
REFUSED += [
    ("absolute form of another host", get(b"https://evil.example.org/v1/ok")),
    ("absolute form with user information", get(b"https://api.example.com@evil.example.org/v1/ok")),
    ("no host", get(host=None)),
    ("two hosts", get(more=b"Host: evil.example.org\r\n")),
    ("two hosts, the other first", get(host=b"evil.example.org", more=b"Host: api.example.com\r\n")),
    ("HTTP/1.0", b"GET /v1/ok HTTP/1.0\r\n\r\n"),
    ("HTTP/0.9", b"GET /v1/ok\r\n\r\n"),
    ("length and coding", post(b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % END, b"0\r\n\r\n" + SMUGGLED)),
    ("coding and length", post(b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", b"0\r\n\r\n" + SMUGGLED)),
    ("folded coding", post(b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 0\r\n", SMUGGLED)),
    ("coding with a space", post(b"Transfer-Encoding : chunked\r\nContent-Length: 0\r\n", SMUGGLED)),
    ("two lengths", post(b"Content-Length: 0\r\nContent-Length: %d\r\n" % len(SMUGGLED), SMUGGLED)),
    ("a list of lengths", post(b"Content-Length: 0, 0\r\n", SMUGGLED)),
    ("a length with a sign", post(b"Content-Length: +0\r\n", SMUGGLED)),
    ("a negative length", post(b"Content-Length: -1\r\n", SMUGGLED)),
    ("a chunk that ends with a line feed", post(b"Transfer-Encoding: chunked\r\n", b"0\n\r\n" + SMUGGLED)),
    ("a chunk size beyond 64 bits", post(b"Transfer-Encoding: chunked\r\n", b"10000000000000000\r\n" + SMUGGLED)),
    ("CONNECT", b"CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com\r\n\r\n"),
    ("another method", get(method=b"DELETE")),
    ("TRACE", get(method=b"TRACE")),
    ("WebSocket without a rule", get(more=UPGRADE)),
    ("a pseudo-header as a header", get(more=b":authority: evil.example.org\r\n")),
    ("host as a hop-by-hop header", get(more=b"Connection: close, host\r\n")),
    ("a NUL in a header", get(more=b"X: a\0b\r\n")),
    ("a space in a header's name", get(more=b"X Y: a\r\n")),
    ("100 KB of header", get(more=b"X: " + b"a" * 100_000 + b"\r\n")),
    ("500 headers", get(more=b"".join(b"X%d: a\r\n" % n for n in range(500)))),
    ("path by X-Original-URL", get(more=b"X-Original-URL: /admin\r\n")),
    ("path by X-Rewrite-URL", get(more=b"X-Rewrite-URL: /admin\r\n")),
    ("method by X-HTTP-Method-Override", post(b"X-HTTP-Method-Override: DELETE\r\nContent-Length: 0\r\n", b"")),
    ("method by X-HTTP-Method", post(b"X-HTTP-Method: DELETE\r\nContent-Length: 0\r\n", b"")),
    ("method by X-Method-Override", post(b"X-Method-Override: DELETE\r\nContent-Length: 0\r\n", b"")),
]  # fmt: skip
# An origin sees the allowed request that these are; what came with it is left out or judged by itself.
JUDGED_APART = [
    ("pipelined", get() + SMUGGLED),
    (
        "bare line feeds",
        b"GET /v1/ok HTTP/1.1\nHost: api.example.com\n\nGET /admin HTTP/1.1\nHost: api.example.com\n\n",
    ),
    ("a chunked body", post(b"Transfer-Encoding: CHUNKED\r\n", b"0\r\n\r\n" + SMUGGLED)),
    ("a carriage return in a header", get(more=b"X: a\rHost: evil.example.org\r\n") + SMUGGLED),
]
# What an origin answers that does not upgrade; the request behind it would be the next one on its connection.
NOT_UPGRADED = (200, 404, 426)
DENIED_BELOW_ALLOWED = [b"/admin", b"/%61dmin", b"/%2561dmin", b"/adm%69n/x", b"/./admin", b"//admin", b"/x/../admin"]
NAMES = ["evil.example.org", "api.example.com.", "www.example.com", "198.51.100.10", None]


def connect(name: str | None, alpn: str) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    if name != "api.example.com":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    raw = socket.create_connection(("api.example.com", 443), LIMIT_S)
    return context.wrap_socket(raw, server_hostname=name)


def one(data: bytes, name: str | None = "api.example.com") -> Sequence[str | bytes]:
    """Send bytes and return the status codes of everything that came back."""
    with connect(name, "http/1.1") as tls:
        tls.settimeout(LIMIT_S)
        tls.sendall(data)
        got = b""
        try:
            while got.count(b"HTTP/1.1 ") < (2 if SMUGGLED in data[1:] and b" 200 " in got[:20] else 1):
                more = tls.recv(65536)
                if not more:
                    break
                got += more
        except TimeoutError:
            return ["hang"]
        except OSError:
            pass
    return re.findall(rb"HTTP/1.1 (\d+)", got)


def by_http2(headers: Headers, body: bytes = b"") -> Sequence[str | bytes]:
    import h2.config
    import h2.connection
    import h2.events
    import h2.exceptions

    loose = h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=False
    )
    with connect("api.example.com", "h2") as tls:
        tls.settimeout(LIMIT_S)
        connection = h2.connection.H2Connection(loose)
        connection.initiate_connection()
        connection.send_headers(1, headers, end_stream=not body)
        if body:
            connection.send_data(1, body, end_stream=True)
        tls.sendall(connection.data_to_send())
        try:
            while True:
                data = tls.recv(65536)
                if not data:
                    return ["closed"]
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        return [dict(event.headers)[b":status"]]
                    if isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)):
                        return ["reset"]
                tls.sendall(connection.data_to_send())
        except TimeoutError:
            return ["hang"]
        except (OSError, h2.exceptions.ProtocolError):
            return ["closed"]


def pseudo(
    method: str = "GET", path: str = "/v1/ok", authority: str = "api.example.com", more: Headers = ()
) -> list[tuple[str, str]]:
    return [(":method", method), (":scheme", "https"), (":authority", authority), (":path", path), *more]


HTTP2 = [
    ("another path", pseudo(path="/admin")),
    ("an escaped path", pseudo(path="/v1/%2e%2e/admin")),
    ("an absolute path", pseudo(path="https://evil.example.org/v1/ok")),
    ("a path with a request in it", pseudo(path="/v1/ok HTTP/1.1\r\nHost: evil.example.org\r\n\r\nGET /admin")),
    ("a path with a space", pseudo(path="/v1/ok /admin")),
    ("another authority", pseudo(authority="evil.example.org")),
    ("an authority of the other rule", pseudo(authority="www.example.com", path="/")),
    ("an authority with user information", pseudo(authority="api.example.com@evil.example.org")),
    ("an authority with a dot", pseudo(authority="api.example.com.")),
    ("two paths", pseudo(more=[(":path", "/admin")])),
    ("two authorities", pseudo(more=[(":authority", "evil.example.org")])),
    ("a pseudo-header after headers", [*pseudo()[:3], ("x", "y"), (":path", "/admin")]),
    ("a coding", pseudo("POST", more=[("transfer-encoding", "chunked")])),
    ("a line break in a value", pseudo(more=[("x", "a\r\nhost: evil.example.org")])),
    ("a line break in a name", pseudo(more=[("x\r\nhost: evil.example.org\r\ny", "a")])),
    ("an upper-case name", pseudo(more=[("Host", "evil.example.org")])),
    ("a connection header", pseudo(more=[("connection", "upgrade"), ("upgrade", "websocket")])),
    ("CONNECT", [(":method", "CONNECT"), (":authority", "evil.example.org:443")]),
    ("extended CONNECT", pseudo("CONNECT", more=[(":protocol", "websocket")])),
    ("a method with a request in it", pseudo("GET /admin HTTP/1.1\r\nx:")),
    ("a path by a header", pseudo(more=[("x-original-url", "/admin")])),
]


def tell(kind: str, name: str, action: Callable[[], Iterable[str | bytes]]) -> None:
    started = time.monotonic()
    try:
        codes = [code.decode() if isinstance(code, bytes) else code for code in action()]
    except OSError as error:
        codes = [type(error).__name__]
    print(json.dumps({"kind": kind, "name": name, "codes": codes, "s": time.monotonic() - started}), flush=True)


def main() -> None:
    for name, data in REFUSED:
        tell("refused", name, partial(one, data))
    for server in NAMES:
        tell("refused", f"server name {server}", partial(one, get(), server))
    for name, data in JUDGED_APART:
        tell("apart", name, partial(one, data))
    for status in NOT_UPGRADED:
        data = get(b"/status/%d" % status, WWW, UPGRADE, SMUGGLED)
        tell("upgrade", str(status), partial(one, data, "www.example.com"))
    for target in DENIED_BELOW_ALLOWED:
        data = get(target, WWW)
        tell("refused", f"denied {target!r}", partial(one, data, "www.example.com"))
    for name, headers in HTTP2:
        tell("refused", f"HTTP/2: {name}", partial(by_http2, headers))
    beside = pseudo(more=[("host", "evil.example.org")])
    tell("apart", "HTTP/2: another host beside the authority", lambda: by_http2(beside))
    body = b"0\r\n\r\n" + SMUGGLED
    lengths = pseudo("POST", more=[("content-length", "4")])
    tell("refused", "HTTP/2: a length that is not the body's", lambda: by_http2(lengths, body))


if __name__ == "__main__":
    main()
