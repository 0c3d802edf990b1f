"""A fake Hub on the loopback: enough of its API for the real client libraries to read one dataset."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def serve_dataset(name: str, revisions: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serve a dataset's files by revision (the first is `main`); yields the endpoint's URL."""
    commits = {revision: hashlib.sha1(revision.encode()).hexdigest() for revision in revisions}
    main = next(iter(revisions))
    by_commit = {commits[revision]: files for revision, files in revisions.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def commit_of(self, revision: str) -> str | None:
            revision = main if revision == "main" else revision
            return commits.get(revision, revision if revision in by_commit else None)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/datasets/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")
                self.send_file(self.commit_of(revision), file)
            elif path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/"):
                kind, _, rest = path.removeprefix(f"/api/datasets/{name}").strip("/").partition("/")
                revision, _, folder = rest.partition("/")
                commit = self.commit_of(revision or "main")
                if commit is None:
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                elif kind == "tree":
                    self.send_tree(by_commit[commit], folder)
                elif kind == "paths-info":
                    wanted = parse_qs(body)["paths"] if "paths=" in body else json.loads(body)["paths"]
                    self.answer_json([entry(by_commit[commit], path) for path in wanted if path in by_commit[commit]])
                else:
                    siblings = [{"rfilename": file} for file in by_commit[commit]]
                    self.answer_json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        def send_file(self, commit: str | None, file: str) -> None:
            if commit is None:
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif file not in by_commit[commit]:
                self.answer(404, X_Error_Code="EntryNotFound")
            else:
                content = by_commit[commit][file]
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(files: dict[str, bytes], path: str) -> dict[str, object]:
    """A file or folder as the Hub's tree API lists it."""
    identity = hashlib.sha1(files.get(path, path.encode())).hexdigest()
    if path not in files:
        return {"type": "directory", "path": path, "oid": identity}
    return {"type": "file", "path": path, "size": len(files[path]), "oid": identity}
