"""What does the hub answer? A stand-in of its HTTP interface on the loopback device, as the clients' sources read it."""

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes | Path]
CHUNK = 1 << 20
LARGE = (".safetensors", ".parquet")


@dataclass
class Fault:
    """What goes wrong with an answer.

    Args:
        asked: pattern of "METHOD path", found anywhere in it, such as r"GET .*/model\.safetensors".
        times: how often; -1 for ever.
        status: answered in place of all else, with `headers` alone.
        headers: such as {"X-Error-Code": "GatedRepo"} or {"Retry-After": "0"}.
        cut: bytes of the body after which the connection breaks off; -1 for not even a first line of an answer.
        body: sent in place of the right bytes, under their published digest and size.
    """

    asked: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    body: bytes | None = None


class LoopbackHub:
    """Repositories of models and data sets behind `url`. Serves from construction on, in a thread that dies with the process.

    Adding a repository again adds a commit, which "main" names from then on; older commits stay. `requests` holds
    (method, path) of all that was asked, but for the client's own `/api/agent-harnesses`. `faults` holds what goes wrong: the
    first that fits a request befalls it.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.commits: dict[str, dict[str, Files]] = {}  # by "models/user/name": the files of each commit, the newest last
        self.gated: set[str] = set()
        self.large: set[str] = set()  # repositories whose large files lie elsewhere
        self.faults: list[Fault] = []
        self.tokens = {"hf_dummy"}  # of those who may write
        self.private: set[str] = set()
        self._serve(port=0)

    def _serve(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Connections are refused within the block."""
        port = self._server.server_port
        self._server.shutdown()
        self._server.server_close()
        try:
            yield
        finally:
            self._serve(port)

    def fault_of(self, request: str) -> Fault | None:
        """The fault that befalls a request, which counts as one of its times."""
        for fault in self.faults:
            if fault.times != 0 and re.search(fault.asked, request):
                fault.times -= fault.times > 0
                return fault
        return None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add_model(self, repo: str, files: Files, commit: str = "a" * 40, *, gated: bool = False, large: bool = False) -> None:
        """Publishes files, given by name as bytes or as the path of what to serve; a name may hold slashes.

        With `large`, weights and tables are answered as the real hub does: by sending on to another host, which names no commit.
        """
        self._add(f"models/{repo}", files, commit, gated, large)

    def add_dataset(self, repo: str, files: Files, commit: str = "b" * 40, *, gated: bool = False, large: bool = False) -> None:
        """Publishes the files of a data set."""
        self._add(f"datasets/{repo}", files, commit, gated, large)

    def _add(self, key: str, files: Files, commit: str, gated: bool, large: bool) -> None:
        assert len(commit) == 40
        kept = {name: old for name, old in self.commits.get(key, {}).items() if name != commit}
        self.commits[key] = {**kept, commit: dict(files)}
        (self.gated.add if gated else self.gated.discard)(key)
        (self.large.add if large else self.large.discard)(key)


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
        self.fault = self.hub.fault_of(f"{self.command} {path}") or Fault("")
        if self.fault.cut == -1:
            return
        if self.fault.status is not None:
            return self._head(self.fault.status, self.fault.headers)
        parts = path.strip("/").split("/")
        elsewhere = parts[0] == "elsewhere"
        parts = parts[1:] if elsewhere else parts
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
            name = "/".join(rest[2:])
            away = key in self.hub.large and name.endswith(LARGE) and not elsewhere
            return self._file(commits[commit], name, commit, away=away)
        if api and rest[:1] in ([], ["revision"]):
            return self._json(_info(key, commits[commit], commit), commit)
        if api and rest[:1] == ["tree"]:
            entries = _tree(commits[commit], "/".join([*rest[2:], ""]))
            return self._json(entries, commit) if entries else self._fail(404, "EntryNotFound", commit=commit)
        return self._fail(404, None)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append((self.command, self.path))
        self.fault = self.hub.fault_of(f"POST {path}") or Fault("")
        if self.fault.status is not None:
            return self._head(self.fault.status, self.fault.headers)
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.tokens:
            return self._fail(401, None, "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        key, _, what = path.removeprefix("/api/").rpartition("/main")[0].rpartition("/")
        assert not what or key in self.hub.commits, path
        if what == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer({"files": files})
        assert what == "commit"
        return self._commit(key, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        there = f"models/{name}" in self.hub.commits
        if not there:
            self.hub.add_model(name, {}, commit="0" * 40)
            if asked.get("visibility") == "private":
                self.hub.private.add(f"models/{name}")
        self._answer({"url": f"{self.hub.url}/{name}"}, status=409 if there else 200)

    def _commit(self, key: str, lines: list[dict[str, Any]]) -> None:
        """A new commit: the files of the last one, and those that are sent."""
        last = self.hub.commits[key][list(self.hub.commits[key])[-1]]
        sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        commit = hashlib.sha1(
            json.dumps([line["value"] for line in lines]).encode() + str(len(self.hub.commits[key])).encode()
        ).hexdigest()
        self.hub.add_model(key.removeprefix("models/"), {**last, **sent}, commit)
        self._answer({"commitOid": commit, "commitUrl": f"{self.hub.url}/{key.removeprefix('models/')}/commit/{commit}"})

    def _answer(self, value: object, *, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _file(self, files: Files, name: str, commit: str, *, away: bool) -> None:
        if name not in files:
            return self._fail(404, "EntryNotFound", f"{name} does not exist", commit=commit)
        published = files[name]
        if away:
            where = self.hub.url.replace(
                "127.0.0.1", "localhost"
            )  # another origin to the client, as that of the real hub's files
            size, sha256 = str(_size(published)), _digest(published, hashlib.sha256())
            linked = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": size}
            return self._head(302, {**linked, "Location": f"{where}/elsewhere{self.path}"})
        content = published if self.fault.body is None else self.fault.body
        size = _size(content)
        sha1 = _digest(published, hashlib.sha1(f"blob {_size(published)}\0".encode()))  # as git names a file
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end or size), size - 1)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{sha1}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(last - first + 1),
        }
        ranged = {"Content-Range": f"bytes {first}-{last}/{size}"} if "Range" in self.headers else {}
        self._head(206 if ranged else 200, {**headers, **ranged})
        left = last - first + 1 if self.command == "GET" else 0
        left = left if self.fault.cut is None else min(left, self.fault.cut)
        with _open(content) as file:
            file.seek(first)
            while left:
                chunk = file.read(min(CHUNK, left))
                self.wfile.write(chunk)
                left -= len(chunk)

    def _json(self, value: object, commit: str) -> None:
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "X-Repo-Commit": commit, "Content-Length": str(len(body))}
        self._head(200, headers)
        self.wfile.write(body if self.command == "GET" else b"")

    def _fail(self, status: int, code: str | None, message: str = "", *, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._head(status, {name: value for name, value in headers.items() if value})

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _open(content: bytes | Path) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(content: bytes | Path, started: Any) -> str:
    with _open(content) as file:
        return hashlib.file_digest(file, lambda: started).hexdigest()


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
            entries[name] = {"type": "file", "path": name, "size": _size(content), "oid": "0" * 40}
        elif name.startswith(prefix):
            entries[child] = {"type": "directory", "path": child, "size": 0, "oid": "0" * 40}
    return list(entries.values())
