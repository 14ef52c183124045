"""Asks many machines at once, over ssh, each question within a bound."""

import json
import os
import selectors
import time
from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

from launch.job import Login
from launch.process import Connection
from launch.stop import StopRequests

_Key = TypeVar("_Key", bound=Hashable)


class Interrupted(Exception):
    """Somebody asks the launcher to stop."""


class _Line:
    def __init__(self, connection: Connection):
        self.connection = connection
        self.to_send = b""
        self.received = b""


class Contacts(Generic[_Key]):
    """Connections to agents that answer a line of JSON to whatever they are sent.

    A context manager, which ends them.

    Args:
        requests: to stop.
        timeout_s: for the answers to one question: who was silent at one costs no time of the next.

    Attributes:
        complaints: machine that has failed -> what ssh says; empty: it did not answer in time.
    """

    def __init__(self, requests: StopRequests, timeout_s: float):
        self.complaints: dict[_Key, str] = {}
        self._requests = requests
        self._timeout_s = timeout_s
        self._lines: dict[_Key, _Line] = {}

    def __enter__(self) -> "Contacts[_Key]":
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines.values():
            line.connection.close()

    def ask(self, messages: Mapping[_Key, bytes], logins: Mapping[_Key, Login]) -> dict[_Key, Any]:
        """Sends each its message and returns the answers of all that answer in time.

        Args:
            messages: one for each machine, by whatever names it.
            logins: how to reach those of them that are not connected yet.

        Raises:
            Interrupted: there is a request to stop.
        """
        answers: dict[_Key, Any] = {}
        for key, message in messages.items():
            if key not in self._lines:
                try:
                    self._lines[key] = _Line(Connection(logins[key]))
                except OSError as error:
                    self.complaints[key] = f"{logins[key].ssh[0]}: {error.strerror}"
                    continue
            self._lines[key].to_send = message
        waiting = {key for key in messages if key not in self.complaints}
        deadline = time.monotonic() + self._timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                selector.register(self._requests, selectors.EVENT_READ)
                for key in waiting:
                    line = self._lines[key]
                    selector.register(line.connection.stdout, selectors.EVENT_READ, key)
                    if line.to_send:
                        selector.register(line.connection.stdin, selectors.EVENT_WRITE, key)
                for ready, _ in selector.select(left):
                    if ready.data is None:
                        raise Interrupted
                    if ready.events & selectors.EVENT_WRITE:
                        _send(self._lines[ready.data])
                    elif self._receive(ready.data, answers):
                        waiting.discard(ready.data)
        for key in waiting:
            self.complaints[key] = self._lines[key].connection.complaint()
        return answers

    def _receive(self, key: _Key, answers: dict[_Key, Any]) -> bool:
        """Returns whether it is known what has become of it."""
        line = self._lines[key]
        try:
            data = os.read(line.connection.stdout, 1 << 16)
        except BlockingIOError:
            return False
        line.received += data
        if not data:
            self.complaints[key] = line.connection.complaint() or "ssh ended without a word"
            return True
        while key not in answers and b"\n" in line.received:
            text, _, line.received = line.received.partition(b"\n")
            try:
                answer = json.loads(text)
            except ValueError:
                continue  # what a login prints there
            if isinstance(answer, dict):
                answers[key] = answer
        return key in answers


def _send(line: _Line) -> None:
    try:
        line.to_send = line.to_send[os.write(line.connection.stdin, line.to_send) :]
    except BlockingIOError:
        return
    except OSError:  # it ends, which the next read finds out
        line.to_send = b""
