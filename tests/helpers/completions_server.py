"""A small completions endpoint over loopback that misbehaves as it is told to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Completions:
    """What a server answers, and what it was asked.

    `script` is a list of faults, each spent on one request, before it answers well: a status, a
    (status, headers) pair, or one of "cut", "chunk", "html", "slow", "drop", "list".
    """

    def __init__(self):
        self.script = []
        self.asked, self.headers, self.times = [], [], []
        self.most = None
        self.change = lambda choice, body: choice
        self.refuse = lambda body: None
        self.lock = threading.Lock()
        self.now, self.peak, self.hold_s = 0, 0, 0.0
        self.answer = self.completions

    def completions(self, body):
        """Tokens that tell which prompt, seed and index they were drawn for."""
        n = min(body["n"], self.most or body["n"])
        choices = [self.choice(body, i) for i in range(n)]
        # as they finish, which is not as they are numbered
        return {"model": body["model"] + "-0914", "choices": choices[::-1]}

    def choice(self, body, index):
        words = [f"{body['seed']}", "+", f"{index}"]
        return self.change(
            {
                "index": index,
                "text": " ".join(words),
                "logprobs": {
                    "tokens": words,
                    "token_logprobs": [-1.0, -0.5, -0.25 * (index + 1)],
                    "top_logprobs": None,
                },
                "finish_reason": "stop" if index % 2 == 0 else "length",
            },
            body,
        )


@contextmanager
def serving(server=None):
    """(its URL, what it was asked)."""
    server = server or Completions()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(body | {"route": self.path})
                server.headers.append(dict(self.headers))
                server.times.append(time.monotonic())
                fault = server.script.pop(0) if server.script else None
                server.now += 1
                server.peak = max(server.peak, server.now)
            time.sleep(server.hold_s)
            try:
                fault = fault or server.refuse(body)
                self.reply(body, fault)
            finally:
                with server.lock:
                    server.now -= 1

        def reply(self, body, fault):
            if isinstance(fault, (int, tuple)):
                status, more = fault if isinstance(fault, tuple) else (fault, {})
                told = more.pop("told", {"error": {"message": "as told", "code": "scripted"}})
                return self.send(json.dumps(told).encode(), status, more)
            if fault == "drop":
                return self.connection.close()
            if fault == "html":
                return self.send(b"<html>a proxy's page</html>")
            if fault == "list":
                return self.send(b"[]")
            data = json.dumps(server.answer(body)).encode()
            if fault == "cut":
                return self.send(data[: len(data) // 2], length=len(data))
            if fault == "chunk":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(data) + data[:10])
                return None
            if fault == "slow":
                # a byte at a time: no single read takes long
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for byte in data:
                    try:
                        self.wfile.write(bytes([byte]))
                    except OSError:
                        return None
                    time.sleep(0.02)
                return None
            return self.send(data)

        def send(self, data, status=200, more=None, length=None):
            self.send_response(status)
            for name, value in (more or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            self.wfile.write(data)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
