"""What does the hub answer? A stand-in of its HTTP interface on the loopback device, as the clients' sources read it."""

import hashlib
import io
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes | Path]
CHUNK = 1 << 20


class LoopbackHub:
    """Repositories of models and data sets behind `url`. Serves from construction on, in a thread that dies with the process.

    Adding a repository again adds a commit, which "main" names from then on; older commits stay. `requests` holds
    (method, path) of all that was asked, but for the client's own `/api/agent-harnesses`.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.commits: dict[str, dict[str, Files]] = {}  # by "models/user/name": the files of each commit, the newest last
        self.gated: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add_model(self, repo: str, files: Files, commit: str = "a" * 40, *, gated: bool = False) -> None:
        """Publishes files, given by name as bytes or as the path of what to serve; a name may hold slashes."""
        self._add(f"models/{repo}", files, commit, gated)

    def add_dataset(self, repo: str, files: Files, commit: str = "b" * 40, *, gated: bool = False) -> None:
        """Publishes the files of a data set."""
        self._add(f"datasets/{repo}", files, commit, gated)

    def _add(self, key: str, files: Files, commit: str, gated: bool) -> None:
        assert len(commit) == 40
        kept = {name: old for name, old in self.commits.get(key, {}).items() if name != commit}
        self.commits[key] = {**kept, commit: dict(files)}
        (self.gated.add if gated else self.gated.discard)(key)


class _Handler(BaseHTTPRequestHandler):  # HTTP/1.0: a connection for each request, so that no kept one blocks another
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":
            return self._fail(404, None)
        self.hub.requests.append((self.command, self.path))
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = parts.pop(0) if parts and parts[0] in ("models", "datasets") else "models"
        key, rest = "/".join([kind, *parts[:2]]), parts[2:]
        if key not in self.hub.commits:
            return self._fail(404, "RepoNotFound")
        if key in self.hub.gated:
            return self._fail(403, "GatedRepo", "You must ask for access to it.")
        commits = self.hub.commits[key]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not api and rest[:1] == ["resolve"]:
            return self._file(commits[commit], "/".join(rest[2:]), commit)
        if api and rest[:1] in ([], ["revision"]):
            return self._json(_info(key, commits[commit], commit), commit)
        if api and rest[:1] == ["tree"]:
            entries = _tree(commits[commit], "/".join([*rest[2:], ""]))
            return self._json(entries, commit) if entries else self._fail(404, "EntryNotFound", commit=commit)
        return self._fail(404, None)

    def _file(self, files: Files, name: str, commit: str) -> None:
        if name not in files:
            return self._fail(404, "EntryNotFound", f"{name} does not exist", commit=commit)
        with _open(files[name]) as file:
            etag, size = hashlib.file_digest(file, "sha256").hexdigest(), file.seek(0, 2)
            start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or size), size - 1)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last - first + 1))
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            file.seek(first)
            left = last - first + 1 if self.command == "GET" else 0
            while left:
                chunk = file.read(min(CHUNK, left))
                self.wfile.write(chunk)
                left -= len(chunk)

    def _json(self, value: object, commit: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def _fail(self, status: int, code: str | None, message: str = "", *, commit: str | None = None) -> None:
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("X-Error-Message", message), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _open(content: bytes | Path) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _info(key: str, files: Files, commit: str) -> dict[str, Any]:
    siblings = [{"rfilename": name} for name in files]
    common = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    return {"id": key.split("/", 1)[1], "sha": commit, "siblings": siblings, **common}


def _tree(files: Files, prefix: str) -> list[dict[str, Any]]:
    """The files and folders right below a prefix; none if there is no such folder."""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        child = prefix + name.removeprefix(prefix).split("/")[0]
        if name.startswith(prefix) and child == name:
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            entries[name] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
        elif name.startswith(prefix):
            entries[child] = {"type": "directory", "path": child, "size": 0, "oid": "0" * 40}
    return list(entries.values())
