"""A small Hub-compatible server on the loopback interface, in memory: what pushing to and loading from the Hub need.

    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}

It speaks the part of the Hub's HTTP interface that `huggingface_hub` 2.4 and transformers 5.23 use for model
repositories: whoami, creating a repository, the metadata check of a README, preupload, Git LFS batch and upload,
commits in ndjson, repository and tree listings, and resolving files with their ETag and commit headers. A repository
is a list of commits on `main`, each a dict from path to content. Reading is open; writing needs the server's token.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".model")
USER = "tester"


class Refusal(Exception):
    """Any answer but 2xx. The client chooses its exception by `code` (X-Error-Code); `fields` join the answer."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields):
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def etag(path: str, content: bytes) -> str:
    """What the Hub knows a file's content by: SHA-256 in LFS, git's blob id otherwise."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_blob_id(content)


class Repository:
    def __init__(self):
        self.lock = threading.Lock()
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.private = False
        self.commit({})

    def commit(self, files: dict[str, bytes]) -> str:
        parent = self.commits[-1][0] if self.commits else ""
        listing = "".join(f"{path} {git_blob_id(content)}\n" for path, content in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {parent}\n{listing}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        for sha, files in self.commits:
            if sha == revision:
                return sha, files
        raise Refusal(404, f"Revision {revision} not found", "RevisionNotFound")


class HubServer:
    """Serves until the `with` block ends. `repositories` maps a repository id to its `Repository`."""

    token = "hf_" + "x" * 34

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        hub = self

        class Handler(RequestHandler):
            pass

        Handler.hub = hub
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refusal(404, f"Repository {repo_id} not found", "RepoNotFound")
        return self.repositories[repo_id]

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of a repository's latest commit."""
        return self.repository(repo_id).at("main")[1]


class RequestHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"  # the client keeps connections open

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer(self.get)

    do_HEAD = do_GET

    def do_POST(self):
        self.answer(self.post)

    def do_PUT(self):
        self.answer(self.put)

    def answer(self, method):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.path_parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        try:
            status, headers, content = 200, {}, method()
            if isinstance(content, tuple):
                headers, content = content
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)} | refusal.fields
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def require_token(self):
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise Refusal(401, "Invalid username or password.")

    def get(self):
        match self.path_parts:
            case ["api", "whoami-v2"]:
                self.require_token()
                return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
            case ["api", "models", owner, name, "tree", revision, *folder]:
                return self.tree(f"{owner}/{name}", revision, "/".join(folder))
            case ["api", "models", owner, name, *revision]:
                return self.model_info(f"{owner}/{name}", revision[1] if revision else "main")
            case [owner, name, "resolve", revision, *path]:
                return self.resolve(f"{owner}/{name}", revision, "/".join(path))
        raise Refusal(404, f"No such page: {self.path}")

    def post(self):
        self.require_token()
        match self.path_parts:
            case ["api", "repos", "create"]:
                return self.create_repository(json.loads(self.body))
            case ["api", "validate-yaml"]:
                return self.validate_metadata(json.loads(self.body)["content"])
            case ["api", "models", owner, name, "preupload", revision]:
                return self.preupload(f"{owner}/{name}", revision, json.loads(self.body)["files"])
            case ["api", "models", owner, name, "commit", revision]:
                return self.commit(f"{owner}/{name}", revision)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self.lfs_batch(f"{owner}/{name.removesuffix('.git')}", json.loads(self.body)["objects"])
        raise Refusal(404, f"No such page: {self.path}")

    def put(self):
        # The link that the LFS batch gave stands for a pre-signed one: it carries no token.
        match self.path_parts:
            case ["lfs", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise Refusal(400, "The content's SHA-256 is not its object id")
                self.hub.lfs_objects[oid] = self.body
                return b""
        raise Refusal(404, f"No such page: {self.path}")

    def create_repository(self, request):
        repo_id = f"{request['organization'] or USER}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", **url)
        self.hub.repositories[repo_id] = Repository()
        self.hub.repositories[repo_id].private = request.get("visibility") == "private"
        return url

    def validate_metadata(self, readme: str):
        try:
            metadata = yaml.safe_load(readme.split("---")[1]) if readme.startswith("---") else None
        except yaml.YAMLError as error:
            raise Refusal(400, str(error)) from error
        return {"warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}], "errors": []}

    def preupload(self, repo_id: str, revision: str, files):
        existing = self.hub.repository(repo_id).at(revision)[1]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": etag(file["path"], existing[file["path"]]) if file["path"] in existing else None,
                }
                for file in files
            ]
        }

    def lfs_batch(self, repo_id: str, objects):
        self.hub.repository(repo_id)
        answers = []
        for entry in objects:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}", "header": {}}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def commit(self, repo_id: str, revision: str):
        repository = self.hub.repository(repo_id)
        with repository.lock:
            files = dict(repository.at(revision)[1])
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                match operation["key"]:
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in self.hub.lfs_objects:
                            raise Refusal(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                        files[value["path"]] = self.hub.lfs_objects[value["oid"]]
                    case "deletedFile":
                        del files[value["path"]]
            sha = repository.commit(files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}"}

    def entry(self, path: str, content: bytes):
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob_id(content)}
        if is_lfs(path):
            sha256 = etag(path, content)
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
            entry["oid"] = git_blob_id(pointer.encode())
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
        return entry

    def tree(self, repo_id: str, revision: str, folder: str):
        files = self.hub.repository(repo_id).at(revision)[1]
        inside = {path: content for path, content in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not inside:
            raise Refusal(404, f"{folder} not found", "EntryNotFound")
        return [self.entry(path, content) for path, content in sorted(inside.items())]

    def model_info(self, repo_id: str, revision: str):
        sha, files = self.hub.repository(repo_id).at(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        info = {"_id": sha[:24], "id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "siblings": siblings}
        card = files.get("README.md", b"").decode()
        metadata = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        return info | {
            "tags": metadata.get("tags", []),
            "pipeline_tag": metadata.get("pipeline_tag"),
            "library_name": metadata.get("library_name"),
            "cardData": metadata,
        }

    def resolve(self, repo_id: str, revision: str, path: str):
        sha, files = self.hub.repository(repo_id).at(revision)
        if path not in files:
            raise Refusal(404, f"{path} not found", "EntryNotFound")
        headers = {"ETag": f'"{etag(path, files[path])}"', "X-Repo-Commit": sha}
        return headers | {"Content-Type": "application/octet-stream"}, files[path]
