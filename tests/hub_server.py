"""A Hugging Face Hub on loopback for the real huggingface_hub client: models only, in memory.

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.env(home=tmp_path), check=True)
        assert "model.safetensors" in hub.files("user/name")

It refuses what huggingface.co refuses: no token, a bad card, a stale parent, an LFS file that was never uploaded.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import socketserver
import sys
import threading
import traceback
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.onnx", "*.pt", "*.pth", "*.npz", "*.zip", "*.gz", "*tfevents*")
LFS_SIZE = 10 * 2**20  # bytes; from here on even text goes to LFS


class Reply(Exception):
    """What goes back: returned where it is a success, raised where it is a refusal. `X_Error_Code=` is a header."""

    def __init__(self, body: bytes | dict | list = b"", status: int = 200, **headers: str):
        super().__init__(status, body)
        self.body, self.status, self.cut = body, status, None  # cut: after so many bytes of the body the line breaks
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refusal(status: int, message: str, code: str = "", **headers: str) -> Reply:
    """A reply of the Hub's error form; `code` is what the client turns into an exception class."""
    return Reply({"error": message}, status, X_Error_Message=message, X_Error_Code=code, **headers)


@dataclass
class Request:
    """A request as it arrived (`path` without its query, percent-encoded) and the status that answered it."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes
    status: int | None = None  # None: the connection was dropped

    @property
    def token(self) -> str:
        """The token that was sent, or ''."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass(frozen=True)
class Blob:
    """A file's content, with the names that git and LFS know it by."""

    data: bytes
    lfs: bool

    @cached_property
    def etag(self) -> str:
        """What the client compares: the sha256 of an LFS file, the git oid of any other."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.oid

    @cached_property
    def oid(self) -> str:
        """The git oid, of the pointer where the content is in LFS."""
        stored = self.pointer() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0%s" % (len(stored), stored)).hexdigest()

    def pointer(self) -> bytes:
        """What git keeps of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(self.data)}\n".encode()

    def info(self) -> dict:
        """The fields of a file in every listing."""
        fields = {"oid": self.oid, "blobId": self.oid, "size": len(self.data)}
        if not self.lfs:
            return fields
        lfs = {"oid": self.etag, "sha256": self.etag, "size": len(self.data), "pointerSize": len(self.pointer())}
        return fields | {"lfs": lfs}


@dataclass
class Repo:
    """A model repository with one branch, main."""

    private: bool
    commits: dict[str, tuple[str, dict[str, Blob]]] = field(default_factory=dict)  # oid: (title, files), oldest first

    def add(self, title: str, files: dict[str, Blob]) -> str:
        """Commit `files`, all of them; returns the oid."""
        tree = [(path, blob.oid) for path, blob in sorted(files.items())]
        oid = hashlib.sha1(repr((list(self.commits), title, tree)).encode()).hexdigest()
        self.commits[oid] = (title, files)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """The oid that `main`, or an oid, names, and the files there."""
        oid = list(self.commits)[-1] if revision == "main" else revision
        if oid not in self.commits:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid][1]


class HubServer:
    """The server, on a free port of 127.0.0.1 inside its `with` block.

    Args:
        user: the account that every token (any `hf_...`) belongs to.
        lfs: False stores every file as a regular one, the only way to decline xet to huggingface_hub >= 2 when its
            HF_HUB_DISABLE_XET is not set; older ones ask, and are declined.
    """

    def __init__(self, user: str = "user", lfs: bool = True):
        """Nothing listens before `with`."""
        self.user, self.lfs, self.url = user, lfs, ""
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, Blob | None] = {}  # LFS, by sha256; None: granted, not yet uploaded
        self._faults: list[dict] = []
        self._lock = threading.Lock()

    def __enter__(self) -> HubServer:
        """Listen."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub, self.url = self, f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="hub-server")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close every socket, join every thread; what was stored stays readable."""
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def env(self, home: str | Path, token: str = "hf_test", **more: str) -> dict[str, str]:
        """The environment of a child process that uses this Hub, with a cache of its own in `home`; '' unsets."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {name: value for name, value in (kept | ours | quiet | more).items() if value}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, by path; .gitattributes is the Hub's own, as in real ones."""
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision)[1].items()}

    def fail_next(self, status: int | None = 500, path_contains: str = "", method: str = "", times: int = 1) -> None:
        """Answer the next `times` matching requests with `status`; None hangs up without an answer."""
        self._faults.append({"status": status, "path": path_contains, "method": method, "times": times})

    def cut_next(self, after: int, path_contains: str, times: int = 1) -> None:
        """Hang up in the middle of the answers to the next `times` GETs of such a path, `after` bytes of the body."""
        self._faults.append({"after": after, "path": path_contains, "method": "GET", "times": times})

    def answer(self, request: Request) -> Reply | None:
        """The reply to `request`, which is recorded; None to hang up."""
        with self._lock:
            self.requests.append(request)
            try:
                reply = self._route(request)
            except Reply as refused:
                reply = refused
            except Exception:  # a bug here must not look like a broken line, which clients retry
                reply = Reply({"error": traceback.format_exc()}, 500)
            request.status = reply and reply.status
            return reply

    def _route(self, request: Request) -> Reply | None:
        cut = None
        for fault in self._faults:
            matches = fault["path"] in unquote(request.path) and fault["method"] in ("", request.method)
            if fault["times"] and matches:
                fault["times"] -= 1
                if "after" in fault:
                    cut = fault["after"]
                    break
                return refusal(fault["status"], "A failure that was asked for") if fault["status"] else None
        if request.token and not request.token.startswith("hf_"):
            raise refusal(401, "Invalid credentials in Authorization header")
        for methods, pattern, needs_token, handle in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in methods:
                if needs_token and not request.token:
                    raise refusal(401, "Invalid username or password.")
                reply = handle(self, request, *(unquote(group or "") for group in found.groups()))
                reply.cut = cut
                return reply
        raise refusal(404, f"No such page: {request.method} {request.path}")

    def repo(self, request: Request, repo_id: str) -> Repo:
        """A repository that the sender may see; to others a private one is not there."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not request.token):
            raise refusal(404 if request.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def at(self, request: Request, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]]:
        """The commit's oid and its files, by path."""
        return self.repo(request, repo_id).at(revision or "main")


def whoami(hub: HubServer, request: Request) -> Reply:
    """Who the token belongs to."""
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return Reply({"type": "user", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": token})


def create(hub: HubServer, request: Request) -> Reply:
    """Make a repository; 409 if it is there."""
    asked = json.loads(request.body)
    if asked.get("type", "model") != "model":
        raise refusal(400, "This Hub has models only")
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    named = {"name": repo_id, "url": f"{hub.url}/{repo_id}"}
    if repo_id in hub.repos:
        raise Reply(named | {"error": "You already created this model repo"}, 409)
    hub.repos[repo_id] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
    attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
    hub.repos[repo_id].add("initial commit", {".gitattributes": Blob(attributes.encode(), lfs=False)})
    return Reply(named)


def model_info(hub: HubServer, request: Request, repo_id: str, revision: str = "") -> Reply:
    """What the model page says; `pipeline(id)` reads its task there."""
    oid, files = hub.at(request, repo_id, revision)
    _, card = read_card(files["README.md"].data.decode()) if "README.md" in files else ([], {})
    info = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": oid, "gated": False}
    info |= {"private": hub.repos[repo_id].private, "disabled": False, "downloads": 0, "likes": 0, "cardData": card}
    library = card.get("library_name", "transformers" if "config.json" in files else None)
    info |= {"library_name": library, "pipeline_tag": card.get("pipeline_tag"), "tags": card.get("tags", [])}
    blobs = "blobs" in request.query
    siblings = [{"rfilename": path} | (blob.info() if blobs else {}) for path, blob in sorted(files.items())]
    return Reply(info | {"siblings": siblings})


def entries(files: dict[str, Blob]) -> list[dict]:
    """Every folder and file, as listings have them."""
    folders = sorted({str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."})
    listed = [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders]
    return listed + [{"type": "file", "path": path} | blob.info() for path, blob in sorted(files.items())]


def tree(hub: HubServer, request: Request, repo_id: str, revision: str, folder: str) -> Reply:
    """A folder's entries, or all below it where `recursive`; in one page."""
    oid, files = hub.at(request, repo_id, revision)
    start = f"{folder}/" if folder else ""
    deep = request.query.get("recursive", [""])[0].lower() == "true"
    inside = [entry for entry in entries(files) if entry["path"].startswith(start)]
    if folder and not inside:
        raise refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound", X_Repo_Commit=oid)
    return Reply([entry for entry in inside if deep or "/" not in entry["path"][len(start) :]])


def paths_info(hub: HubServer, request: Request, repo_id: str, revision: str) -> Reply:
    """The entries asked for, of those that exist."""
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return Reply([entry for entry in entries(hub.at(request, repo_id, revision)[1]) if entry["path"] in wanted])


def resolve(hub: HubServer, request: Request, repo_id: str, revision: str, path: str) -> Reply:
    """A file's content, or the range of it that was asked for."""
    oid, files = hub.at(request, repo_id, revision)
    if path not in files:
        raise refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=oid)
    data, size = files[path].data, len(files[path].data)
    headers = {"ETag": f'"{files[path].etag}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
    if files[path].lfs:
        headers |= {"X_Linked_Size": str(size), "X_Linked_ETag": headers["ETag"]}
    asked = re.fullmatch(r"bytes=(?=.*\d)(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Reply(data, **headers)
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
    if first >= stop:
        raise Reply(b"", 416, Content_Range=f"bytes */{size}")
    return Reply(data[first:stop], 206, Content_Range=f"bytes {first}-{stop - 1}/{size}", **headers)


def preupload(hub: HubServer, request: Request, repo_id: str, revision: str) -> Reply:
    """Which files go to LFS (by name, size, or a NUL byte near the start), and what is there under each name."""
    _, files = hub.at(request, repo_id, revision)
    answers = []
    for file in json.loads(request.body)["files"]:
        large = file["size"] >= LFS_SIZE or b"\0" in base64.b64decode(file["sample"])
        named = any(fnmatch(PurePosixPath(file["path"]).name, pattern) for pattern in LFS_PATTERNS)
        mode = "lfs" if hub.lfs and (large or named) else "regular"
        known = {"oid": files[file["path"]].etag} if file["path"] in files else {}
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | known)
    return Reply({"files": answers})


def lfs_batch(hub: HubServer, request: Request, repo_id: str) -> Reply:
    """Where to PUT each object that is not here yet; the transfer is never xet."""
    hub.repo(request, repo_id)
    objects = json.loads(request.body)["objects"]
    for wanted in objects:
        if hub.objects.setdefault(wanted["oid"], None) is None:
            verify = {"href": f"{hub.url}/{repo_id}.git/info/lfs/objects/verify"}
            wanted["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}, "verify": verify}
    return Reply({"transfer": "basic", "objects": objects})


def lfs_put(hub: HubServer, request: Request, oid: str) -> Reply:
    """Store an object; the address itself is the permission, as with a signed one."""
    if oid not in hub.objects:
        raise refusal(403, "This upload was not granted")
    blob = Blob(request.body, lfs=True)
    if blob.etag != oid:
        raise refusal(400, "The content does not have this sha256")
    hub.objects[oid] = blob
    return Reply()


def lfs_verify(hub: HubServer, request: Request, repo_id: str) -> Reply:
    """Whether an object arrived whole."""
    asked = json.loads(request.body)
    blob = hub.objects.get(asked["oid"])
    if blob is None or len(blob.data) != asked["size"]:
        raise refusal(404, "No such object, or not of this size")
    return Reply({})


def no_xet(hub: HubServer, request: Request, repo_id: str) -> Reply:
    """Say what to do rather than leave hf_xet with a bare 404."""
    raise refusal(403, "No xet here: set HF_HUB_DISABLE_XET=1 in the client, or use HubServer(lfs=False)")


def commit(hub: HubServer, request: Request, repo_id: str, revision: str) -> Reply:
    """Apply the operations, one a line after a header; all or none."""
    head, files = hub.at(request, repo_id, revision)
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    if header["value"].get("parentCommit", head) != head:
        raise refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(files)
    for operation in operations:
        apply(hub, files, operation["key"], operation["value"])
    if "README.md" in files:
        validate(read_card(files["README.md"].data.decode())[0])
    oid = hub.repos[repo_id].add(header["value"]["summary"], files)
    return Reply({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"})


def apply(hub: HubServer, files: dict[str, Blob], key: str, value: dict) -> None:
    """Apply one operation of a commit to `files`, in place."""
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        files[path] = hub.objects.get(value["oid"])
        if files[path] is None:
            raise refusal(400, f"The LFS object of {path} was not uploaded")
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/" if key == "deletedFolder" else None
        gone = [name for name in files if name == path or (folder and name.startswith(folder))]
        if not gone:
            raise refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise refusal(400, f"Unknown operation: {key}")


def read_card(text: str) -> tuple[dict, dict]:
    """The verdict on a README.md (`errors`, `warnings`), and its metadata."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---", text, re.DOTALL)
    if not found:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
    try:
        card = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        return {"errors": [{"message": f"YAML parsing failed: {error}"}], "warnings": []}, {}
    if not isinstance(card, dict):
        return {"errors": [{"message": '"metadata" must be of type object'}], "warnings": []}, {}
    return {"errors": [{"message": message} for message in card_errors(card)], "warnings": []}, card


def card_errors(card: dict) -> list[str]:
    """What the Hub refuses in metadata: wrong types, ids that are paths, a model-index that lacks required keys."""
    single = ("pipeline_tag", "library_name")
    errors = [f'"{name}" must be a string' for name in single if not is_text(card.get(name, ""))]
    for name in ("license", "language", "tags", "metrics", "base_model", "datasets"):
        values = card[name] if isinstance(card.get(name), list) else [card.get(name, "x")]
        errors += [f'"{name}" must be a string or a list of strings' for value in values if not is_text(value)]
        if name in ("base_model", "datasets"):
            bad = [value for value in values if is_text(value) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value)]
            errors += [f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co.' for value in bad]
    for i, model in enumerate(card.get("model-index") or []):
        for j, result in enumerate(model.get("results") or []):
            needed = [("task", ["type"], result.get("task")), ("dataset", ["name", "type"], result.get("dataset"))]
            metrics = enumerate(result.get("metrics") or [])
            needed += [(f"metrics[{k}]", ["type", "value"], metric) for k, metric in metrics]
            absent = [f"{part}.{key}" for part, keys, have in needed for key in keys if key not in (have or {})]
            errors += [f'"model-index[{i}].results[{j}].{name}" is required' for name in absent]
        errors += [f'"model-index[{i}].{key}" is required' for key in ("name", "results") if key not in model]
    return errors


def is_text(value: object) -> bool:
    """Whether `value` is a string; YAML makes `no` a bool and `1.0` a float."""
    return isinstance(value, str)


def validate(verdict: dict) -> dict:
    """`verdict`, unless it has errors."""
    if verdict["errors"]:
        raise Reply(verdict | {"error": "Invalid metadata in README.md"}, 400)
    return verdict


def validate_yaml(hub: HubServer, request: Request) -> Reply:
    """Judge a card before its upload starts."""
    return Reply(validate(read_card(json.loads(request.body)["content"])[0]))


REPO = r"([^/]+(?:/[^/]+)?)"
ROUTES = (  # methods, path (percent-encoded), whether a token is needed, handler of (hub, request, *groups)
    (("GET",), r"/api/whoami-v2", True, whoami),
    (("POST",), r"/api/repos/create", True, create),
    (("POST",), r"/api/validate-yaml", False, validate_yaml),
    (("GET", "HEAD"), rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", False, tree),
    (("POST",), rf"/api/models/{REPO}/paths-info/([^/]+)", False, paths_info),
    (("POST",), rf"/api/models/{REPO}/preupload/([^/]+)", True, preupload),
    (("POST",), rf"/api/models/{REPO}/commit/([^/]+)", True, commit),
    (("GET",), rf"/api/models/{REPO}/xet-(?:read|write)-token/[^/]+", False, no_xet),
    (("GET", "HEAD"), rf"/api/models/{REPO}/revision/([^/]+)", False, model_info),
    (("GET", "HEAD"), rf"/api/models/{REPO}", False, model_info),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", True, lfs_batch),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/verify", True, lfs_verify),
    (("PUT",), r"/lfs/([0-9a-f]{64})", False, lfs_put),
    (("GET", "HEAD"), rf"/{REPO}/resolve/([^/]+)/(.+)", False, resolve),
)


class _Server(ThreadingHTTPServer):
    """One whose connections can be ended from outside: clients keep theirs open, and closing waits for the threads."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, *args: object):
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would look the host up in DNS

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for request in self._open.copy():
            with contextlib.suppress(OSError):  # its thread may have just closed it
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: socket.socket, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no error
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """HTTP in and out; the answers are HubServer's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: a delayed ACK between them costs 40 ms

    def _exchange(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(url.query, keep_blank_values=True)
        reply = self.server.hub.answer(Request(self.command, url.path, query, headers, self._body(headers)))
        if reply is None:
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/octet-stream" if body is reply.body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in reply.headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: reply.cut])
            self.close_connection |= reply.cut is not None

    do_GET = do_HEAD = do_POST = do_PUT = _exchange

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args: object) -> None:
        """Nothing: the test has `hub.requests`."""
