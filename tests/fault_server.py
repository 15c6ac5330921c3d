"""An OpenAI-compatible server of a few lines that misbehaves on demand."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Behaviour = Callable[["Asked"], "Answer"]


@dataclass(frozen=True)
class Asked:
    """A request: its body, and how often exactly this one came before."""

    body: dict[str, Any]
    headers: dict[str, str]
    before: int
    path: str = ""

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.body["messages"])


@dataclass(frozen=True)
class Answer:
    """A response; `hang` seconds are waited first, `cut` sends half of the body."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: bool = False


def reply(text: str, **choice: Any) -> Answer:
    """A completion."""
    return Answer(
        body=json.dumps(
            {
                "choices": [
                    {"message": {"role": "assistant", "content": text}, **choice},
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
        )
    )


class Server:
    """Counts what it was asked and what it was paid for: whole replies that were sent."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.remembered: set[str] | None = None  # calls, by a gateway that bills none twice
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer._respond(self)

            def do_GET(self) -> None:
                outer._respond(self)

        class Http(ThreadingHTTPServer):
            request_queue_size = 128

        self._http = Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # a client that was killed is no news
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _respond(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        body = json.loads(raw) if raw else {}
        key = json.dumps(
            next((body[k] for k in ("messages", "prompt", "input_ids") if k in body), 0)
        )
        with self._lock:
            asked = Asked(body, dict(handler.headers.items()), self.asked[key], handler.path)
            if body:
                self.asked[key] += 1
                self.bodies.append(body)
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            answer = self.behave(asked)
            time.sleep(answer.hang)
            with self._lock:  # a real server bills what it has generated, heard or not
                billed = bool(body) and answer.status == 200 and not answer.hang > 1
                billed = billed and not answer.cut
                if billed and self.remembered is not None:
                    call = asked.headers["idempotency-key"]
                    billed = call not in self.remembered
                    self.remembered.add(call)
                self.paid[key] += billed
            content = answer.body.encode()
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.send_header("content-type", "application/json")
            handler.send_header("content-length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2] if answer.cut else content)
            if answer.cut:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has gone
        finally:
            with self._lock:
                self.under_way -= 1


def shown_answers(prompt: str) -> list[str]:
    """The answers that a judge's prompt shows, as it shows them."""
    upstream = re.findall(
        r"\[The Start of Assistant[^\]]*\]\n(.*?)\n\[The End of Assistant", prompt, re.DOTALL
    )
    own = re.findall(r"<<<(?:\w+ )?answer[^>]*>>>\n(.*?)\n<<<end", prompt, re.DOTALL)
    return upstream or own


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Server]]:
    """Starts servers and stops them."""
    servers: list[Server] = []

    def start(behave: Behaviour) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
