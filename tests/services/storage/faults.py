"""An S3 server that fails on demand: a proxy before moto's."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Forwards requests to another server, except for those that must fail.

    Attributes:
        faults: of the next requests: an HTTP status, ``reset``, ``slow`` (no answer until the server ends), or
            ``cut`` (half of the body, then a reset).
        requests: made so far.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = port
        self.faults: deque[int | str] = deque()
        self.requests = 0
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self._body()
        self.server.requests += 1
        fault = self.server.faults.popleft() if self.server.faults else None
        if fault == "slow":
            self.server.ended.wait(60)
        if fault in ("slow", "reset"):
            return self._reset()
        if isinstance(fault, int):
            text = b"<Error><Code>Fault</Code><Message>secret-of-the-server</Message></Error>"
            return self._answer(fault, {}, b"" if self.command == "HEAD" else text, len(text))
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        length = int(answer.headers.get("Content-Length") or len(data))
        self._answer(answer.status, dict(answer.headers), data[: length // 2] if fault == "cut" else data, length)
        connection.close()
        return self._reset() if fault == "cut" else None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Transfer-Encoding"]  # it is passed on in one piece
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815
