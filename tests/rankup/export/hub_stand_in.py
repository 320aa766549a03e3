"""A hub on this machine: the part of its HTTP API that the real client calls to make, fill, tag and read a repository.

Repositories are lists of commits, a commit is path -> bytes. Files of more than `LARGE_BYTES` go through large file
storage, those of more than `PART_BYTES` in parts, as on a real hub; content that is there already is not asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_good"
LARGE_BYTES = 1024
PART_BYTES = 8192

Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, str, Files]] = field(default_factory=list)
    """(id, message, files)"""
    refs: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> id of a commit."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tag -> its message."""

    def commit(self, branch: str, message: str, files: Files) -> str:
        number = _sha1(f"{len(self.commits)}{message}".encode())
        self.commits.append((number, message, files))
        self.refs[branch] = number
        return number

    def files(self, revision: str) -> Files | None:
        number = self.refs.get(revision, revision)
        return next((files for known, _, files in self.commits if known == number), None)


@dataclass
class Hub:
    """What the server holds, and what it should do wrong."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    received_bytes: int = 0
    """Of large files."""
    ignored: frozenset[str] = frozenset()
    """Paths that the repository's .gitignore names."""
    spoil: Callable[[bytes], bytes] = staticmethod(lambda data: data)  # noqa: RUF009
    """What becomes of a small file."""
    fail: dict[str, int] = field(default_factory=dict)
    """Regular expression of a request -> status that it is answered with."""

    def names(self, revision: str, repo: str = "someone/toy") -> set[str]:
        return set(self.repositories[repo].files(revision) or {})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    git = _sha1(f"blob {len(data)}\0".encode() + data)
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git}
    if len(data) > LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entry["oid"] = _sha1(path.encode())
    return entry


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # Head and body in one packet: else each answer waits for an acknowledgement.
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        for pattern, status in self.hub.fail.items():
            if re.fullmatch(pattern, request):
                self._answer(status, {"error": "as it was told"})
                return
        stored = re.match(r"(PUT|POST) /storage/", request)
        if not stored and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
            return
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, request):
                answer(self, body, *found.groups())
                return
        self._answer(404, {"error": f"nothing at {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    # -- repositories --------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'someone'}/{asked['name']}"
        told = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", **told})
            return
        private = asked.get("private", False) or asked.get("visibility") == "private"
        repository = self.hub.repositories[name] = Repository(private=private)
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(200, told)

    def refs(self, _: bytes, name: str) -> None:
        if repository := self._repository(name):
            rows = {True: [], False: []}  # type: dict[bool, list[dict[str, str]]]
            for ref, commit in repository.refs.items():
                rows[ref in repository.tags].append({"name": ref, "ref": ref, "targetCommit": commit})
            self._answer(200, {"branches": rows[False], "converts": [], "tags": rows[True]})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        if repository := self._repository(name):
            there = branch in repository.refs
            repository.refs.setdefault(branch, repository.refs["main"])
            self._answer(409 if there else 200, {"error": "exists"} if there else {})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        if repository := self._repository(name):
            asked = json.loads(body)
            if asked["tag"] in repository.refs:
                self._answer(409, {"error": "Tag reference exists already"})
                return
            repository.refs[asked["tag"]] = repository.refs.get(revision, revision)
            repository.tags[asked["tag"]] = asked.get("message", "")
            self._answer(200, {})

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if repository := self._repository(name):
            number = repository.refs.get(revision or "main", revision or "")
            files = repository.files(number) or {}
            rows = [{"rfilename": path} for path in files]
            self._answer(200, {"id": name, "sha": number, "private": repository.private, "siblings": rows})

    # -- files ---------------------------------------------------------------------------------------------------------

    def tree(self, _: bytes, name: str, revision: str) -> None:
        if repository := self._repository(name):
            files = repository.files(revision) or {}
            self._answer(200, [_entry(path, data) for path, data in sorted(files.items())])

    def paths_info(self, body: bytes, name: str, revision: str) -> None:
        if repository := self._repository(name):
            files = repository.files(revision) or {}
            wanted = parse_qs(body.decode())["paths"]
            self._answer(200, [_entry(path, files[path]) for path in wanted if path in files])

    def validate(self, _: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if repository := self._repository(name):
            files = repository.files(revision) or {}
            rows = []
            for file in json.loads(body)["files"]:
                path = file["path"]
                there = _entry(path, files[path]) if path in files else {}
                mode = "lfs" if file["size"] > LARGE_BYTES else "regular"
                oid = there.get("lfs", there).get("oid")
                ignored = path in self.hub.ignored
                rows.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
            self._answer(200, {"files": rows})

    def batch(self, body: bytes, _name: str) -> None:
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            row: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                href = f"{self.hub.url}/storage/{oid}"
                upload: dict[str, Any] = {"href": href}
                if size > PART_BYTES:
                    count = -(-size // PART_BYTES)
                    urls = {str(number): f"{href}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(PART_BYTES), **urls}}
                row["actions"] = {"upload": upload}
            objects.append(row)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        self.hub.received_bytes += len(body)
        self.hub.large[oid] = body
        self._answer(200, {})

    def store_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.received_bytes += len(body)
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        self._answer(200, {}, {"ETag": f'"{number}"'})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self.hub.large[oid] = b"".join(parts[part["partNumber"]] for part in json.loads(body)["parts"])
        self._answer(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if repository := self._repository(name):
            files, summary = dict(repository.files(revision) or {}), ""
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                match item["key"]:
                    case "header":
                        summary = f"{value['summary']}\n\n{value['description']}"
                    case "file":
                        files[value["path"]] = self.hub.spoil(base64.b64decode(value["content"]))
                    case "lfsFile":
                        files[value["path"]] = self.hub.large[value["oid"]]
                    case "deletedFile":
                        del files[value["path"]]
            number = repository.commit(revision, summary, files)
            self._answer(200, {"success": True, "commitUrl": f"{self.hub.url}/x/{number}", "commitOid": number})

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        if repository := self._repository(name):
            number = repository.refs.get(revision, revision)
            data = (repository.files(number) or {})[path]
            etag = hashlib.sha256(data).hexdigest()
            self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": number})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}/refs", _Handler.refs),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/tag/(.+)", _Handler.tag),
    (rf"GET /api/models/{_NAME}/tree/(.+)", _Handler.tree),
    (rf"POST /api/models/{_NAME}/paths-info/(.+)", _Handler.paths_info),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/(\w+)", _Handler.store),
    (r"PUT /storage/(\w+)/(\d+)", _Handler.store_part),
    (r"POST /storage/(\w+)/complete", _Handler.complete),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on loopback for the time of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
