"""A worker that works when a test says so."""

from __future__ import annotations

from concurrent.futures import Executor, Future


class Later(Executor):
    def __init__(self):
        self.waiting = []

    def submit(self, work):
        self.waiting.append((work, future := Future()))
        return future

    def work(self):
        (work, future), self.waiting = self.waiting[0], self.waiting[1:]
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
