"""`polymodal download` against a hub of our own: from a mirror and through a proxy, going on where the line broke."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/their-model"
LARGE = "large.safetensors"
"""A file of 24 MiB: the hub's client keeps what it got in pieces of 10."""


class Hub(ThreadingHTTPServer):
    """The two calls that a download makes: the list of files, and a file from a byte on. Hangs up once, half-way."""

    def __init__(self, files: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.broke = files, [], False
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path  # a proxy is asked with the whole address
        if path.startswith(f"/api/models/{NAME}/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in sorted(self.server.files.iterdir())
            ]
            return self.answer(json.dumps(files).encode())
        if path.startswith(f"/api/models/{NAME}"):
            files = [{"rfilename": p.name} for p in sorted(self.server.files.iterdir())]
            return self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode())
        file = self.server.files / path.rpartition("/")[2]
        if not path.startswith(f"/{NAME}/resolve/{COMMIT}/") or not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        if self.command == "GET":
            self.server.asked.append((file.name, start, urlsplit(self.path).netloc))
        big = self.command == "GET" and file.name == LARGE and not self.server.broke
        self.server.broke |= big
        self.answer(data, start, len(data) // 2 if big else None)

    def answer(self, data: bytes, start: int = 0, stop: int | None = None):
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])
        self.close_connection = stop is not None


@pytest.fixture
def hub(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "config.json").write_text("{}")
    (files / LARGE).write_bytes(random.Random(0).randbytes(24 << 20))
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_mirror_that_breaks_off_is_asked_for_the_rest(hub, tmp_path):
    """The mirror's name resolves nowhere: it is reached through the proxy only."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": "http://mirror.invalid", "HTTP_PROXY": hub.address}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "polymodal", "download", NAME, "--to", str(tmp_path / "to")],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (start for name, start, _ in hub.asked if name == LARGE)
    assert first == 0 and second >= 10_000_000  # what had come was kept
    assert {host for *_, host in hub.asked} == {"mirror.invalid"}
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "to")
    for file in hub.files.iterdir():
        assert (tmp_path / "to" / file.name).read_bytes() == file.read_bytes(), file.name
