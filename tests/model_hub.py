"""A fake Hub on the loopback that stores models: what the real client needs to create a repository, upload to it in one
commit, and read it again. Faults can be planted before any response.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loopback import Handler, listening

TOKEN = "hf_planted0123456789"  # noqa: S105 - no key, but something to look for

Files = dict[str, bytes]
# Gives a status (and headers) instead of the answer to a method and path, "drop" to break off, or None.
Fault = Callable[[str, str], tuple[int, dict[str, str]] | str | None]


@dataclass
class ModelHub:
    """The fake Hub's state: repositories with their branches, uploaded large objects, and the requests."""

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    uploaded: int = 0
    history: dict[str, Files] = field(default_factory=dict)  # what was there, by commit
    fault: Fault = lambda method, path: None
    address: str = ""

    def commit_of(self, files: Files) -> str:
        """The commit that these files are of."""
        commit = sha(json.dumps(sorted((name, sha(content)) for name, content in files.items())).encode())
        self.history[commit] = dict(files)
        return commit


def online(hub: ModelHub, home: Path) -> dict[str, str]:
    """Environment variables that point the Hub's client to the fake Hub, with its cache in `home`."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }


class _Handler(Handler):
    """Answers as the Hub does."""

    hub: ModelHub

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        planted = self.hub.fault(self.command, path)
        if planted == "drop":
            self.rfile.read(min(1024, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self.body()
        if planted:
            code, headers = planted  # type: ignore[misc]
            self.answer(code, b'{"error": "planted"}', **headers)
        else:
            self.route(path, body)

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif path.startswith("/upload/"):
            name = path.removeprefix("/upload/")
            if hashlib.sha256(body).hexdigest() != name:  # the client has gone in the middle of it
                self.answer(400)
                return
            self.hub.objects[name] = body
            self.hub.uploaded += 1
            self.answer(200)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif path.startswith("/api/models/"):
            self.model(path.removeprefix("/api/models/"), body)
        elif "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            branch, _, file = rest.partition("/")
            self.send_file(name, branch, file)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def create(self, asked: dict[str, object]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else str(asked["name"])
        address = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            self.answer_json(address, 409)
            return
        self.hub.repositories[name], self.hub.private[name] = {"main": {}}, asked.get("visibility") == "private"
        self.answer_json(address)

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = []
        for each in asked["objects"]:
            known = each["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.address}/upload/{each['oid']}"}}
            objects.append({**each, **({} if known else {"actions": upload})})
        self.answer_json({"transfer": "basic", "objects": objects})

    def model(self, rest: str, body: bytes) -> None:
        user, name, *more = rest.split("/")
        repository = f"{user}/{name}"
        branches = self.hub.repositories.get(repository)
        kind, branch = (*more, "", "main")[:2] if more else ("", "main")
        if branches is None:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif kind == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            self.answer_json({})
        elif kind == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".json")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})
        elif kind == "commit":
            self.commit(repository, branch, body)
        elif kind == "tree":
            files = branches.get(branch) or self.hub.history.get(branch, {})
            self.answer_json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": sha(content)}
                    for path, content in files.items()
                ]
            )
        else:
            files = branches.get(branch) if branch in branches else self.hub.history.get(branch)
            if files is None:
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                return
            self.answer_json(
                {
                    "id": repository,
                    "sha": self.hub.commit_of(files),
                    "private": self.hub.private[repository],
                    "tags": [],
                    "siblings": [{"rfilename": file} for file in files],
                }
            )

    def commit(self, repository: str, branch: str, body: bytes) -> None:
        new: Files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.repositories[repository].setdefault(branch, {}).update(new)
        self.hub.commits.append(f"{repository}@{branch}: {len(new)} files")
        self.answer_json(
            {
                "success": True,
                "commitOid": sha(body),
                "commitUrl": f"{self.hub.address}/{repository}/commit/{sha(body)}",
                "hookOutput": "",
                "pullRequestUrl": None,
            }
        )

    def send_file(self, name: str, branch: str, file: str) -> None:
        files = self.hub.repositories.get(name, {}).get(branch) or self.hub.history.get(branch, {})
        if file not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        headers = {"ETag": f'"{sha(files[file])}"', "X-Repo-Commit": self.hub.commit_of(files), "Accept-Ranges": "none"}
        self.answer(200, files[file], **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


@contextmanager
def serve_models() -> Iterator[ModelHub]:
    """A running fake Hub."""
    hub = ModelHub()
    with listening(_Handler, hub=hub) as hub.address:
        yield hub


def sha(content: bytes) -> str:
    """A commit's or file's hash."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
