"""A small server that speaks as much of OpenAI's chat completions as the tests need, or lies."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Answers with `answer(question)`; or does what `behave(handler)` does, while there is one."""

    daemon_threads = True
    answer: Callable[[str], Any]
    behave: Callable[["Handler"], None] | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.headers_seen = lambda text: "yes", [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on some of what is sent; that is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.body, self.question = body, body.get("messages", [{"content": ""}])[-1]["content"]
        self.server.asked.append(body)
        self.server.headers_seen.append(self.headers)
        if self.server.behave is not None:
            self.server.behave(self)
        else:
            self.reply(self.server.answer(self.question))

    def reply(self, content: Any, **usage: Any) -> None:
        usage = usage or {"total_tokens": 7}
        self.send(json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}))

    def send(self, body: str | bytes, status: int = 200, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def endless(self, chunk: bytes, pause: float = 0.0) -> None:
        """A body that never ends, until the client hangs up."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            time.sleep(pause)


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
