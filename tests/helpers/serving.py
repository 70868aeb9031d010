"""`sharpen serve` in a process of its own, and the plainest client of it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from test_layers import ROOT

SECONDS = 100  # for a start on a busy machine; every wait ends as soon as it can


@dataclass
class Serving:
    process: subprocess.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path, body=None, *, method=None, raw=None, **headers):
        """Status, body and headers of one answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        content = raw if raw is not None else (None if body is None else json.dumps(body).encode())
        sent = {} if content is None else {"Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            way = method or ("GET" if content is None else "POST")
            connection.request(way, path, content, sent)
            answer = connection.getresponse()
            found = answer.read()
            if answer.headers.get_content_type() == "application/json":
                found = json.loads(found)
            return answer.status, found, answer.headers

    def post(self, path, body):
        status, found, _ = self.ask(path, body)
        assert status == 200, found
        return found

    def metrics(self):
        """Each sample of `/metrics` by its name and labels."""
        _, text, _ = self.ask("/metrics")
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(x) for name, _, x in (line.rpartition(" ") for line in lines)}

    def end(self, how=signal.SIGTERM):
        """Exit code and everything it told."""
        self.process.send_signal(how)
        told = self.process.communicate(timeout=SECONDS)[1]
        return self.process.returncode, told


def command(model, *flags):
    return [
        sys.executable,
        "-m",
        "sharpen",
        "serve",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--port",
        "0",
        *flags,
    ]


def environment(**variables):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    keep = {k: x for k, x in os.environ.items() if k != "SHARPEN_API_KEY"}
    return keep | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


@contextlib.contextmanager
def serving(model, *flags, **variables):
    process = subprocess.Popen(
        command(model, *flags),
        env=environment(**variables),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        line = process.stdout.readline()
        assert "serving" in line, process.communicate()[1]
        yield Serving(process, int(line.rpartition(":")[2]))
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
