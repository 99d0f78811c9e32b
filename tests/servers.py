"""A free port of this machine, and a server of an engine on one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Served:
    """``dynamo-jax serve`` with a model and one more variant; words: of the command; changes: of its environment."""

    def __init__(self, base, other, log, words, changes):
        self.url, self.log = f"http://127.0.0.1:{(port := free_port())}", log
        words = ["-m", "dynamo_jax", "serve", "--model", base, "--variant", other, "--port", port, *words]
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=os.environ | changes,
            )

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=5)
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def completed(self, body, seconds):
        """The status and the bytes that the server answers to a request for a completion."""
        given = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(given, timeout=seconds) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
