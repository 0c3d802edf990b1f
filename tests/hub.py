"""A fake Hub on the loopback: enough of its API for the real client libraries to read one dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import Handler, listening


class _Handler(Handler):
    """Answers as the Hub does: `name` is the dataset's, `commits` are by revision, and `by_commit` has their files."""

    name: str
    commits: dict[str, str]
    by_commit: dict[str, dict[str, bytes]]

    def commit_of(self, revision: str) -> str | None:
        revision = next(iter(self.commits)) if revision == "main" else revision
        return self.commits.get(revision, revision if revision in self.by_commit else None)

    def handle_any(self) -> None:
        body = self.body().decode()
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/datasets/{self.name}/resolve/"):
            revision, _, file = path.removeprefix(f"/datasets/{self.name}/resolve/").partition("/")
            self.send_file(self.commit_of(revision), file)
        elif path == f"/api/datasets/{self.name}" or path.startswith(f"/api/datasets/{self.name}/"):
            kind, _, rest = path.removeprefix(f"/api/datasets/{self.name}").strip("/").partition("/")
            revision, _, folder = rest.partition("/")
            commit = self.commit_of(revision or "main")
            if commit is None:
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            elif kind == "tree":
                self.send_tree(self.by_commit[commit], folder)
            elif kind == "paths-info":
                files = self.by_commit[commit]
                wanted = parse_qs(body)["paths"] if "paths=" in body else json.loads(body)["paths"]
                self.answer_json([entry(files, path) for path in wanted if path in files])
            else:
                siblings = [{"rfilename": file} for file in self.by_commit[commit]]
                self.answer_json({"id": self.name, "sha": commit, "private": False, "tags": [], "siblings": siblings})
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def send_file(self, commit: str | None, file: str) -> None:
        if commit is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif file not in self.by_commit[commit]:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            content = self.by_commit[commit][file]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="none")

    def send_tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = [file for file in files if file.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            return
        depth = folder.count("/") + 1 if folder else 0
        children = {"/".join(file.split("/")[: depth + 1]) for file in inside}
        self.answer_json([entry(files, child) for child in sorted(children)])

    do_GET = do_HEAD = do_POST = handle_any


@contextmanager
def serve_dataset(name: str, revisions: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serve a dataset's files by revision (the first is `main`); yields the endpoint's URL."""
    commits = {revision: hashlib.sha1(revision.encode()).hexdigest() for revision in revisions}
    by_commit = {commits[revision]: files for revision, files in revisions.items()}
    with listening(_Handler, name=name, commits=commits, by_commit=by_commit) as address:
        yield address


def entry(files: dict[str, bytes], path: str) -> dict[str, object]:
    """A file or folder as the Hub's tree API lists it."""
    identity = hashlib.sha1(files.get(path, path.encode())).hexdigest()
    if path not in files:
        return {"type": "directory", "path": path, "oid": identity}
    return {"type": "file", "path": path, "size": len(files[path]), "oid": identity}
