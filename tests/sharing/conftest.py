"""A hub on this machine: enough of its API for the real client to make, fill and read models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Repo:
    """One model repository: whether it is private, and its files by commit."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def commit_name(self, number: int) -> str:
        """By content: caches outlive a test, and take a commit for what it was."""
        files = {name: _oid(content) for name, content in self.commits[number].items()}
        return hashlib.sha1(json.dumps([number, files]).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Knows one user, ``tester``, whose token is ``may-write``; ``may-read`` may only read."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home, token="may-write"):
        """What a process needs to use this hub and no other, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # another protocol for large files, of other servers
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "30",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    """One request; ``self.server`` is the hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (names of http.server's)

    def _route(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for method, pattern, answer in ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                answer(self, body, **found.groupdict())
                return
        self._fail(404, "EntryNotFound", f"no route {self.command} {path}")

    def _chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _send(self, content=b"", status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status, code, message):
        self._send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, owner):
        if self._token() not in ("may-write", "may-read"):
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif self._token() != "may-write" or owner != "tester":
            self._fail(403, "", "You don't have the rights")
        else:
            return True
        return False

    def _repo(self, name):
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._token() not in ("may-write", "may-read")):
            self._fail(404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _number(self, repo, revision):
        """The commit of a revision: the main branch, or a commit's own name."""
        names = {repo.commit_name(number): number for number in range(len(repo.commits))}
        number = names.get(revision, len(repo.commits) - 1 if revision in (None, "main") else None)
        if number is None:
            self._fail(404, "RevisionNotFound", "Invalid rev id")
        return number

    def create(self, body):
        asked = json.loads(body)
        owner, name = asked["organization"], f"{asked['organization']}/{asked['name']}"
        if not self._may_write(owner):
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        made = name not in self.server.repos
        if made:
            self.server.repos[name] = Repo(private)
        self._send({"url": f"{self.server.url}/{name}"}, 200 if made else 409)

    def info(self, _, name, revision=None):
        if (repo := self._repo(name)) is None:
            return
        if (number := self._number(repo, revision)) is not None:
            siblings = [{"rfilename": file} for file in repo.commits[number]]
            self._send(
                {
                    "id": name,
                    "modelId": name,
                    "private": repo.private,
                    "sha": repo.commit_name(number),
                    "tags": [],
                    "siblings": siblings,
                }
            )

    def tree(self, _, name, revision):
        if (repo := self._repo(name)) is None:
            return
        if (number := self._number(repo, revision)) is not None:
            files = repo.commits[number].items()
            self._send([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)}
                        for p, c in files])  # fmt: skip

    def resolve(self, _, name, revision, file):
        if (repo := self._repo(name)) is None:
            return
        if (number := self._number(repo, revision)) is None:
            return
        content = repo.commits[number].get(file)
        if content is None:
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        self._send(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=repo.commit_name(number))

    def yaml(self, body):
        self._send({"errors": [], "warnings": [], "asked": len(body)})

    def preupload(self, body, name, revision):
        if self._repo(name) is None or not self._may_write(name.partition("/")[0]):
            return
        assert revision == "main"
        files = [file["path"] for file in json.loads(body)["files"]]
        mode = {True: "lfs", False: "regular"}
        answers = [
            {"path": path, "uploadMode": mode[path.endswith(".safetensors")], "shouldIgnore": False}
            for path in files
        ]
        self._send({"files": answers})

    def lfs_batch(self, body, name):
        assert name in self.server.repos
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self._send({"transfer": "basic", "objects": objects})

    def large(self, body, oid):
        self.server.large[oid] = body
        self._send()

    def commit(self, body, name, revision):
        repo = self._repo(name)
        if repo is None or not self._may_write(name.partition("/")[0]):
            return
        assert revision == "main"
        files = dict(repo.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        repo.commits.append(files)
        oid = repo.commit_name(len(repo.commits) - 1)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._send({"commitUrl": url, "commitOid": oid, "success": True})


def _oid(content):
    return hashlib.sha256(content).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.yaml),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]+)", Handler.large),
    ("GET HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
)


REVISION = "6cee5e81ee83917806bbde320786a8fb61efebee"


@pytest.fixture(scope="session")
def hub_server():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(hub_server):
    """The server, with nothing on it."""
    hub_server.repos.clear()
    hub_server.large.clear()
    hub_server.asked.clear()
    return hub_server


@pytest.fixture
def log_in(hub, monkeypatch):
    """Let this process's client use the hub, with a token and a cache."""
    from huggingface_hub import constants

    def log_in(home, token="may-write", **changes):
        for name, value in hub.environment(home, token).items():
            monkeypatch.setenv(name, value)
        settings = {  # the client reads the environment once, when it is imported
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        } | changes
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)

    return log_in


@dataclass(frozen=True)
class Machine:
    """A base in a cache of the hub, and a model that was converted from it."""

    root: Path
    base: Path
    model: Path

    @property
    def home(self) -> Path:
        return self.root / "home"


@pytest.fixture(scope="session")
def machine(make_tiny_model, tmp_path_factory):
    from nexus_cli.config.convert import ConvertConfig
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import convert

    root = tmp_path_factory.mktemp("machine")
    base = root / "home" / "hub" / "models--acme--tiny" / "snapshots" / REVISION
    make_tiny_model(base)
    (base / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    config = ConvertConfig(model=str(base), init_strategy="random", output=root / "model")
    convert.run(config, Workspace(root / "w"))
    return Machine(root, base, root / "model")


@pytest.fixture
def adapter(machine, tmp_path):
    """An adapter whose gates are open, as training leaves them."""
    import torch

    from nexus_cli.core.model.gpt_oss.adapter import write_adapter
    from nexus_cli.core.model.gpt_oss.export import nexus_tensors

    opened = {
        name: torch.full_like(value, 4.0)
        for name, value in nexus_tensors(machine.model).items()
        if name.endswith("output_gate")
    }
    write_adapter(tmp_path / "adapter", machine.model, opened)
    return tmp_path / "adapter"


@pytest.fixture
def convert(tmp_path):
    """The stage, in a workspace of the test's."""
    from nexus_cli.config.convert import ConvertConfig
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import convert as stage

    def run(model, *, dry_run=False, **settings):
        config = ConvertConfig(model=str(model), **settings)
        stage.run(config, Workspace(tmp_path / "workspace"), dry_run=dry_run)

    return run


@pytest.fixture
def pushed(hub, log_in, machine, adapter, convert):
    """The repository ``tester/small`` of the adapter, pushed from its machine."""
    log_in(machine.home)
    convert(adapter, adapter=True, push_to_hub="tester/small")
    return hub.repos["tester/small"]
