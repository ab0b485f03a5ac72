"""A hub on loopback that serves the real client: listing, download, revisions, creation, upload, and every refusal.

The client reads its environment at import, so it runs in a process of its own:

    with HubServer() as server:
        commit = server.put("lab/sae", {"config.json": b"{}", "sae.pt": weights})
        run_client(server, tmp_path / "home", 'answer = str(list_files(parse_address("hf://lab/sae")).files)')
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
LARGE = (".pt", ".pth", ".safetensors", ".png", ".parquet")
"""Files that the hub stores by their sha256 (LFS); of all others it knows git's sha1."""

PRELUDE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from actcache import PipelineError
from actcache.hub import *
def refusal(call, *args, **options):
    try:
        return ["returned", repr(call(*args, **options))]
    except PipelineError as error:
        return [type(error).__name__, str(error)]
"""


def run_client(server: "HubServer | None", home: Path, code: str, *words: str, **variables: str) -> Any:
    """Run code that sets `answer`, in a process with the real client and this HF_HOME, and return the answer."""
    script = f"{PRELUDE}\n{code}\nprint(json.dumps(answer))"
    environment = hub_environment(server, home) | variables
    command = [sys.executable, "-W", "error", "-c", script, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if "stderr" not in variables else done.stderr


def hub_environment(server: "HubServer | None", home: Path) -> dict[str, str]:
    """The environment of a process that knows this hub only, or none at all."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {
        "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def blob_id(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class HubServer:
    """The state of the hub. Names of repositories are OWNER/REPO, with `datasets/` before it for one of data.

    Attributes:
        repos: name -> branch, tag or commit -> path -> content.
        closed: name -> (status, X-Error-Code, message), for a repository that refuses everything.
        requests: `METHOD path` of every request, in order.
        tokens: the authorization of each request, None where there was none.
        special: (pattern of `METHOD path`, function of the handler), tried before anything else.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.closed: dict[str, tuple[int, str, str]] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.special: list[tuple[str, Callable[[Handler], None]]] = []
        self.large: dict[str, bytes] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of these files and return it; files of the branch that are not named stay."""
        revisions = self.repos.setdefault(name, {})
        files = {**revisions.get(branch, {}), **files}
        content = f"{name} {len(revisions)} {[(path, blob_id(data)) for path, data in sorted(files.items())]}"
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        revisions[commit] = revisions[branch] = files
        return commit

    def commit_of(self, name: str, revision: str) -> str:
        files = self.repos[name][revision]
        return next(each for each in self.repos[name] if len(each) == 40 and self.repos[name][each] is files)


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).lstrip("/")
        request = f"{self.command} /{path}"
        self.hub.requests.append(request)
        self.hub.tokens.append(self.headers.get("authorization"))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, act in self.hub.special:
            if re.search(pattern, request):
                act(self)
                return
        for route, handle in ROUTES:
            if found := re.fullmatch(route, request):
                handle(self, **found.groupdict())
                return
        self.refuse(404, "", f"no route for {request}")

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def tell(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(b"{}", status, X_Error_Code=code, X_Error_Message=message)

    def page(self) -> None:
        """The login page of a network, instead of what was asked for."""
        self.send(b"<!DOCTYPE html><title>Log in</title>", Content_Type="text/html")

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files at a revision; None if that was refused."""
        if name in self.hub.closed:
            self.refuse(*self.hub.closed[name])
        elif name not in self.hub.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in self.hub.repos[name]:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return self.hub.repos[name][revision]
        return None

    # --- reading

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        name = repo if kind == "models" else f"{kind}/{repo}"
        if self.files(name, revision or "main") is not None:
            self.tell({"id": repo, "sha": self.hub.commit_of(name, revision or "main"), "siblings": [], "tags": []})

    def tree(self, kind: str, repo: str, revision: str) -> None:
        files = self.files(repo if kind == "models" else f"{kind}/{repo}", revision)
        if files is not None:
            self.tell([describe(path, data) for path, data in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        files = self.files(name, revision)
        if files is None:
            return
        commit = self.hub.commit_of(name, revision)
        if path not in files:
            self.send(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data, size = files[path], len(files[path])
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers: Any = {"ETag": f'"{etag(path, data)}"', "X_Repo_Commit": commit, "X_Linked_Size": str(size)}
        if start:
            first = int(start[1])
            self.send(data[first:], 206, **headers, Content_Range=f"bytes {first}-{size - 1}/{size}")
        else:
            self.send(data, **headers)

    # --- writing

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = f"{wanted['organization']}/" if wanted.get("organization") else "me/"
        name = f"{'datasets/' if wanted.get('type') == 'dataset' else ''}{owner}{wanted['name']}"
        if name in self.hub.repos:
            self.tell({"url": f"{self.hub.url}/{name}"}, 409)
        else:
            self.hub.put(name, {".gitattributes": b"*.pt filter=lfs\n"})
            self.tell({"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        wrong = b"license: [" in self.body
        self.tell({"errors": [{"message": "license is not text"}] * wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        files = self.files(repo if kind == "models" else f"{kind}/{repo}", revision)
        if files is None:
            return
        asked = json.loads(self.body)["files"]
        self.tell({"files": [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False,
             **({"oid": etag(one["path"], files[one["path"]])} if one["path"] in files else {})}
            for one in asked
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        self.tell({"transfer": "basic", "objects": [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}} for one in objects
        ]})  # fmt: skip

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "", "The content is not that of its hash")
        else:
            self.hub.large[oid] = self.body
            self.send(b"")

    def commit(self, kind: str, repo: str, revision: str) -> None:
        name = repo if kind == "models" else f"{kind}/{repo}"
        if self.files(name, revision) is None:
            return
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
        commit = self.hub.put(name, files, revision)
        self.tell({"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "success": True})


def etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else blob_id(data)


def describe(path: str, data: bytes) -> dict[str, object]:
    """An entry of a listing."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {**entry, "lfs": large} if path.endswith(LARGE) else entry


NAME = r"(?P<name>(datasets/)?[^/]+/[^/]+)"
API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", Handler.resolve),
    (rf"GET {API}/tree/(?P<revision>.+)", Handler.tree),
    (rf"GET {API}(/revision/(?P<revision>.+))?", Handler.info),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST {API}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST {API}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large/(?P<oid>[0-9a-f]{64})", Handler.store),
]
