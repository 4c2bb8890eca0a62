"""A model hub on this machine's loopback: as much of the real one's interface as downloading a snapshot takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serves folders as repositories, each with one commit on ``main``. Gives its address, and the files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?", path):
                self._send_listing(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)", path):
                self._send_json(self._tree(match[1]))
            elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
                self._send_file(match[1], match[3], body)
            else:
                self._send(404, b"{}", {})

        def _send_listing(self, repo: str, revision: str) -> None:
            if repo not in repositories:
                self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b'{"error": "Revision not found"}', {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": entry["path"]} for entry in self._tree(repo)]
                self._send_json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False})

        def _tree(self, repo: str) -> list[dict[str, object]]:
            root = repositories[repo]
            files = sorted(path for path in root.rglob("*") if path.is_file())
            return [{"type": "file", "path": str(f.relative_to(root)), "size": f.stat().st_size, "oid": etag(f)} for f in files]

        def _send_file(self, repo: str, name: str, body: bool) -> None:
            if repo in gated:
                self._send(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
                return
            file = repositories[repo] / name
            if not file.is_file():
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if body:
                fetched.append(f"{repo}/{name}")
            self._send(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}, body)

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(file: Path) -> str:
    """A large file's is its sha256, as on the real hub."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(content).hexdigest()
