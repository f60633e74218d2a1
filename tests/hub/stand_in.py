"""A stand-in for the Hub on this machine: the endpoints that `create_repo`, `create_branch` and `upload_folder` speak to."""

import base64
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
LARGE = (".safetensors", ".png")  # the rest is small text, which travels inside the commit


class StandIn:
    """A Hub with one user, "me", in memory.

    Attributes:
        url: its address.
        repos: {repo: {branch: {path: content}}}.
        private: the repos that are.
        objects: {SHA-256: content} of large files that have arrived, committed or not.
        uploads: how often each large file was sent.
        room_for: how many more large files are taken before the line is cut; None for all.
        on_upload: called before a large file is read, for a test that wants to be there.
    """

    def __init__(self):
        self.repos, self.private, self.objects, self.uploads = {}, set(), {}, Counter()
        self.room_for, self.on_upload = None, lambda: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request. The user may write to repos of "me" alone."""

    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """No line a request."""

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message, code=""):
        self.answer({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def parts(self):
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def knows_token(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.body()
        self.refuse(401, "Invalid username or password.")
        return False

    def may_write(self, owner, body=b""):
        if owner == "me":
            return True
        self.refuse(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        return False

    def do_GET(self):
        match self.parts():
            case ["api", "models", owner, name, *rest]:
                branches = self.hub.repos.get(f"{owner}/{name}")
                if branches is None:
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                branch = rest[1] if rest else "main"
                if branch not in branches:
                    return self.refuse(404, f"Invalid rev id: {branch}", "RevisionNotFound")
                files = branches[branch]
                if rest and rest[0] == "tree":
                    return self.answer(
                        [
                            {
                                "type": "file",
                                "path": path,
                                "size": len(content),
                                "oid": hashlib.sha1(content).hexdigest(),
                            }
                            for path, content in files.items()
                        ]
                    )
                siblings = [{"rfilename": path} for path in files]
                return self.answer({"id": f"{owner}/{name}", "modelId": name, "sha": "0" * 40, "siblings": siblings})
        self.refuse(404, f"The stand-in does not speak GET {self.path}")

    def do_POST(self):
        if not self.knows_token():
            return None
        body, parts = self.body(), self.parts()
        match parts:
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "branch", branch]:
                branches = self.hub.repos[f"{owner}/{name}"]
                if branch in branches:
                    return self.refuse(409, "Reference already exists")
                branches[branch] = dict(branches["main"])
                return self.answer({})
            case ["api", "models", _, _, "preupload", _]:
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
                return self.answer(
                    {
                        "files": [
                            {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()
                        ]
                    }
                )
            case [_, _, "info", "lfs", "objects", "batch"]:
                return self.answer({"transfer": "basic", "objects": [*map(self.ticket, json.loads(body)["objects"])]})
            case ["api", "models", owner, name, "commit", branch]:
                return self.commit(f"{owner}/{name}", branch, [json.loads(line) for line in body.splitlines()])
        return self.refuse(404, f"The stand-in does not speak POST {self.path}")

    def do_PUT(self):
        hub, name = self.hub, self.parts()[-1]
        hub.on_upload()
        content = self.body()
        if hub.room_for == 0:
            return self.refuse(410, "The line was cut")
        if hashlib.sha256(content).hexdigest() != name:
            return self.refuse(400, "The content is not what was announced")
        hub.room_for = None if hub.room_for is None else hub.room_for - 1
        hub.uploads[name] += 1
        hub.objects[name] = content
        return self.answer({})

    def create(self, asked):
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.may_write(repo.split("/")[0]):
            return None
        url = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repos:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        self.hub.repos[repo] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(repo)
        return self.answer(url)

    def ticket(self, wanted):
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.objects:
            return known
        return known | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}", "header": {}}}}

    def commit(self, repo, branch, lines):
        files = dict(self.hub.repos[repo][branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo][branch] = files
        url = f"{self.hub.url}/{repo}/commit/{'1' * 40}"
        return self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})
