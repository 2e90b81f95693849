"""A stand-in for the Hugging Face hub on this machine: models, their files and revisions, and its refusals."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = hashlib.sha1(b"main").hexdigest()


@contextlib.contextmanager
def serve(models: dict[str, Path], gated: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serves folders as models by name, with the branch main and the tag v1; yields the address and the requests."""
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            requests.append(f"{self.command} {path}")
            words = path.strip("/").split("/")
            api = words[:2] == ["api", "models"]
            name, rest = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
            if name == gated:
                return self.refuse(403, "GatedRepo")
            if name not in models:
                return self.refuse(404, "RepoNotFound")
            revision = rest[1] if rest else "main"
            if revision not in ("main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = {p.name: p for p in models[name].iterdir()}
            if api and rest[:1] == ["tree"]:
                entries = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p)} for n, p in files.items()
                ]
                return self.answer(json.dumps(entries).encode())
            if api:
                siblings = [{"rfilename": n} for n in files]
                return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            if rest[0] != "resolve" or rest[2] not in files:
                return self.refuse(404, "EntryNotFound")
            path = files[rest[2]]
            self.answer(path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"'})

        do_HEAD = do_GET

        def answer(self, content: bytes, headers: dict[str, str] | None = None, code: int = 200) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def refuse(self, code: int, reason: str) -> None:
            self.answer(b"{}", {"X-Error-Code": reason, "X-Error-Message": reason}, code)

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
