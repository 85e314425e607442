"""A local stand-in for the GraphQL service of W&B: it answers what a report asks, and keeps what it was sent."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

PAGES = {"endCursor": None, "hasNextPage": False}


class Service(ThreadingHTTPServer):
    """Listens on a free port of this machine; `runs` are the ids that it knows."""

    daemon_threads = True

    def __init__(self, runs: Collection[str], entity: str = "ada") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.entity = set(runs), entity
        self.asked: list[tuple[str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, name: str) -> list[dict[str, Any]]:
        """The variables of every question of a name."""
        return [variables for asked, variables in self.asked if asked == name]

    def answer(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The data of an answer."""
        if name == "upsertView":
            project = {"id": "p", "name": asked["projectName"], "entityName": asked["entityName"]}
            view = {"id": "VmlldzoxMjM=", "type": "runs", "updatedAt": "2026-01-01T00:00:00", "project": project}
            told = ("name", "displayName", "description", "spec")
            return {"upsertView": {"view": view | {key: asked[key] for key in told}, "inserted": True}}
        if name == "Run":
            return {"project": {"run": self._run(asked["name"]) if asked["name"] in self.runs else None}}
        if name == "GetProjects":
            return {"models": {"pageInfo": PAGES | {"__typename": "PageInfo"}, "edges": []}}
        if name == "CreateProject":
            return {"result": {"project": None, "model": None, "inserted": True}}
        if name == "ProjectInternalId":
            return {"project": {"id": "p", "internalId": "1"}}
        return {"viewer": {"id": "v", "entity": self.entity, "username": self.entity, "flags": "{}"}}

    def _run(self, name: str) -> dict[str, Any]:
        return {"id": name, "name": name, "projectId": "1", "state": "finished", "config": "{}", "summaryMetrics": "{}"}


class Handler(BaseHTTPRequestHandler):
    """Answers GraphQL questions."""

    server: Service
    timeout = 20

    def do_POST(self) -> None:
        if self.path != "/graphql":
            self.send_error(404)
            return
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        name = found[1] if found else ""
        self.server.asked.append((name, asked.get("variables") or {}))
        body = json.dumps({"data": self.server.answer(name, asked.get("variables") or {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def service(*runs: str) -> Iterator[Service]:
    """A service that knows some runs, while the block lasts."""
    server = Service(runs)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
