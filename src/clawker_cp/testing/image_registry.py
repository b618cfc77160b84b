"""
A registry of one image, on a machine of the test's own: what a daemon needs to pull by digest, and nothing else.

    async with image_registry(host, archive) as reference:   # 127.0.0.1:5000/one@sha256:...
        await host.run(["docker", "pull", reference], env=docker.environment())

Engines know the digest of an image only from a registry; an imported one has none. Plain HTTP, which they accept
from loopback.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from clawker_cp.testing.world import HostNamespace

PORT, NAME = 5000, "one"
START_S = 20.0
_TYPE = "application/vnd.docker."
_MANIFEST = f"{_TYPE}distribution.manifest.v2+json"


@asynccontextmanager
async def image_registry(host: HostNamespace, archive: bytes) -> AsyncIterator[str]:
    """
    Serve an image with this root file system (a tar archive) while the block runs; its reference, by digest.
    """
    with tempfile.TemporaryDirectory(dir=host.directory) as directory:
        digest = await asyncio.to_thread(_write, Path(directory), archive)
        process = await host.start(
            [sys.executable, "-m", __spec__.name, directory, digest], stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(START_S):
                await process.stdout.readline()
            yield f"127.0.0.1:{PORT}/{NAME}@{digest}"
        finally:
            process.kill()
            await process.wait()


def _write(directory: Path, archive: bytes) -> str:
    def keep(data: bytes, kind: str) -> dict[str, str | int]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        (directory / digest).write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    layer = keep(gzip.compress(archive, 1, mtime=0), f"{_TYPE}image.rootfs.diff.tar.gzip")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(archive).hexdigest()}"]},
    }
    about = keep(json.dumps(config).encode(), f"{_TYPE}container.image.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": about, "layers": [layer]}
    return str(keep(json.dumps(manifest).encode(), _MANIFEST)["digest"])


def _serve(directory: Path, manifest: str) -> None:
    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the library's name
            wanted = self.path.rpartition("/")[2]
            file = directory / wanted
            self.send_response(200 if file.is_file() or not wanted else 404)
            body = file.read_bytes() if file.is_file() else b"{}"
            self.send_header("Content-Type", _MANIFEST if wanted == manifest else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Content-Digest", wanted)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815  # the library's name

    server = ThreadingHTTPServer(("127.0.0.1", PORT), Files)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
