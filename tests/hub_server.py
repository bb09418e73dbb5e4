"""A hub on the loopback interface: enough of its HTTP API for transformers and datasets to load
from it.

with HubServer() as hub: hub.add("FacebookAI/roberta-base", COMMIT, {"config.json": b"…", …})
serve_dataset(hub, "nyu-mll/glue", COMMIT, {"cola": {"train": {"sentence": […], "label": […], …}}})
subprocess.run(…, env={**os.environ, **hub.environment(tmp_path)})

huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported, so the client is another process.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_REPO = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_INFO = re.compile(rf"{_API}(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
_PATHS = re.compile(rf"{_API}/paths-info/(?P<revision>[^/]+)")
_FILE = re.compile(rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """One commit of a model or data set; a file in `cut` arrives shorter than HEAD said."""

    commit: str
    files: Mapping[str, bytes]
    gated: bool = False
    cut: frozenset[str] = frozenset()


@dataclass
class HubServer:
    """Serves what was added to it on http://127.0.0.1:<port> until the `with` block ends."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusals: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    """The next answers, each once: the request that it is for (a part of `GET /path`), its status and headers."""

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """What a client needs to talk to this hub alone, with an empty cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(
        self,
        repo: str,
        commit: str,
        files: Mapping[str, bytes],
        kind: str = "models",
        gated: bool = False,
        cut: Sequence[str] = (),
    ) -> None:
        self.repositories[kind, repo] = Repository(commit, dict(files), gated, frozenset(cut))


def serve_dataset(
    hub: HubServer,
    repo: str,
    commit: str,
    subsets: Mapping[str, Mapping[str, Mapping[str, list]]],
) -> None:
    """Add a data set as the hub holds GLUE: <subset>/<split>-00000-of-00001.parquet and a README
    that lists them.

    `subsets` maps subset -> split -> column -> values; labels are plain ints.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    files: dict[str, bytes] = {}
    configs = ["configs:"]
    for subset, splits in subsets.items():
        configs += [f"- config_name: {subset}", "  data_files:"]
        for split, columns in splits.items():
            buffer = io.BytesIO()
            parquet.write_table(pa.table(dict(columns)), buffer)
            path = f"{subset}/{split}-00000-of-00001.parquet"
            files[path] = buffer.getvalue()
            configs += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    files["README.md"] = "\n".join(["---", *configs, "---", "# Made for a test", ""]).encode()
    hub.add(repo, commit, files, kind="datasets")


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server_hub.requests.append(f"{self.command} {path}")
        if path == "/":
            return self._send(200, b"a hub")
        for refusal in self.server_hub.refusals:
            if refusal[0] in f"{self.command} {path}":
                self.server_hub.refusals.remove(refusal)
                return self._send(refusal[1], b"busy", refusal[2])
        for pattern, handle in (
            (_PATHS, self._paths),
            (_TREE, self._tree),
            (_INFO, self._info),
            (_FILE, self._file),
        ):
            if match := pattern.fullmatch(path):
                kind = (match["kind"] or "models").rstrip("/")
                repository = self.server_hub.repositories.get((kind, match["id"]))
                if repository is None:
                    return self._error(404, "RepoNotFound", "Repository not found")
                if (match["revision"] or "main") not in (repository.commit, "main"):
                    return self._error(404, "RevisionNotFound", "Invalid rev id")
                return handle(match, repository, body)
        return self._error(404, "RepoNotFound", "No such route")

    def _info(self, match: re.Match, repository: Repository, body: bytes) -> None:
        self._json(
            {
                "id": match["id"],
                "sha": repository.commit,
                "private": False,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": name} for name in sorted(repository.files)],
            },
            repository,
        )

    def _tree(self, match: re.Match, repository: Repository, body: bytes) -> None:
        inside = f"{match['path'].strip('/')}/" if match["path"] else ""
        recursive = "recursive=true" in self.path.lower()
        entries = [
            entry
            for entry in _entries(repository)
            if entry["path"].startswith(inside) and (recursive or "/" not in entry["path"][len(inside) :])
        ]
        if not entries:
            return self._error(404, "EntryNotFound", "No such folder", repository)
        self._json(entries, repository)

    def _paths(self, match: re.Match, repository: Repository, body: bytes) -> None:
        wanted = parse_qs(body.decode()).get("paths", [])
        self._json([e for e in _entries(repository) if e["path"] in wanted], repository)

    def _file(self, match: re.Match, repository: Repository, body: bytes) -> None:
        if repository.gated:
            return self._error(401, "GatedRepo", "Access to this model is restricted.")
        content = repository.files.get(match["path"])
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", repository)
        headers = {
            "ETag": f'"{_blob_id(content)}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        status, total = 200, len(content)
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first = int(found[1]) if found[1] else total - int(found[2])
            last = int(found[2]) if found[1] and found[2] else total - 1
            if first >= total:
                return self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            content = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{total}"
            status = 206
        if match["path"] in repository.cut and self.command == "GET":
            content = content[: len(content) // 2]
        self._send(status, content, headers)

    def _json(self, value: object, repository: Repository) -> None:
        headers = {"Content-Type": "application/json", "X-Repo-Commit": repository.commit}
        self._send(200, json.dumps(value).encode(), headers)

    def _error(self, status: int, code: str, message: str, repository: Repository | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        if repository is not None:
            headers["X-Repo-Commit"] = repository.commit
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entries(repository: Repository) -> list[dict]:
    folders = {
        "/".join(name.split("/")[:depth]) for name in repository.files for depth in range(1, name.count("/") + 1)
    }
    entries = [
        {
            "type": "directory",
            "path": name,
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": 0,
        }
        for name in sorted(folders)
    ]
    entries += [
        {"type": "file", "path": name, "oid": _blob_id(content), "size": len(content)}
        for name, content in sorted(repository.files.items())
    ]
    return entries
