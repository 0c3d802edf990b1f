"""The worker as a child process that is restarted when it dies. Nothing here imports torch."""

from __future__ import annotations

import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress

from pairtune.errors import BadInput, RunFailed
from pairtune.serve.listen import KEY

log = logging.getLogger(__name__)

_STARTING_SECONDS = 300  # a model of some GB from a slow disk
_ENDING_SECONDS = 10


class WorkerProcess:
    """A worker on a free loopback port, as a context manager that stops it at exit.

    Args:
        arguments: arguments of `pairtune worker`, without host and port.
        meanwhile: called while the worker starts.
        moved: called with the worker's URL whenever it has one: it chooses a port at every start, and says which,
            so that no other process can take the port in between.

    Attributes:
        key: the key that requests must carry.
        url: its URL; empty before it has started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        meanwhile: Callable[[], None] = lambda: None,
        moved: Callable[[str], None] = lambda url: None,
    ) -> None:
        self._meanwhile, self._moved = meanwhile, moved
        self.key, self.url = secrets.token_urlsafe(32), ""
        self._command = [sys.executable, "-m", "pairtune", "worker", *arguments, "--port", "0", "--attached"]
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._lock = threading.Lock()  # guards stopping against restarting
        self._watch = threading.Thread(target=self._restart, name="pairtune-watch", daemon=True)

    def __enter__(self) -> WorkerProcess:
        self._process = self._start()
        try:
            self._meanwhile()
            self._wait()
        except BaseException:
            self._end()
            raise
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        with self._lock:
            self._end()
        self._watch.join()

    @property
    def pid(self) -> int:
        """The current process's id."""
        assert self._process is not None  # noqa: S101 - used inside the context only
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        # The worker exits when this pipe closes, so it never outlives this process, however that ends.
        return subprocess.Popen(  # noqa: S603 - our own command
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, KEY: self.key},
            start_new_session=True,  # Ctrl-C in a terminal goes to the site, which then stops the worker
        )

    def _wait(self) -> None:
        """Wait until the worker answers.

        Raises:
            BadInput: the worker refused to start and has printed why.
            RunFailed: the worker did not start in time.
        """
        assert self._process is not None  # noqa: S101
        self._read_address()
        until = time.monotonic() + _STARTING_SECONDS
        while time.monotonic() < until:
            if (code := self._process.poll()) is not None:
                raise (
                    BadInput("the worker did not start; see the line above")
                    if code == 2
                    else RunFailed(f"the worker exited with code {code} while starting")
                )
            with (
                suppress(urllib.error.URLError, OSError, ValueError),  # ValueError: no URL, since it has ended
                urllib.request.urlopen(f"{self.url}/health", timeout=5),  # noqa: S310 - our own worker
            ):
                return
            time.sleep(0.1)
        raise RunFailed(f"the worker did not start within {_STARTING_SECONDS} s")

    def _read_address(self) -> bool:
        """Wait for the process to say where it listens; False: it has ended without a word of it."""
        assert self._process is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        said, found = self._process.stdout, list[str]()

        def read() -> None:
            with said:
                for line in said:  # a library may print something before
                    if address := re.match(rb"(http://\S+)/v1 ", line):
                        found.append(address[1].decode())
                        return

        reader = threading.Thread(target=read, name="pairtune-address", daemon=True)
        reader.start()
        reader.join(_STARTING_SECONDS)
        if found:
            self.url = found[0]
            self._moved(self.url)
        return bool(found)

    def _restart(self) -> None:
        pause, listened = 1.0, True
        while not self._ending.is_set():
            assert self._process is not None  # noqa: S101
            code = self._process.wait()
            if self._ending.is_set():
                return
            log.warning("the worker exited with code %s and is restarted", code)
            # Longer and longer while it cannot even start; one that came up may be killed as often as it likes.
            pause = 1.0 if listened else min(2 * pause, 60)
            self._ending.wait(pause)
            with self._lock:
                if not self._ending.is_set():
                    self._process = self._start()
            if not self._ending.is_set():
                listened = self._read_address()

    def _end(self) -> None:
        if self._process is None:
            return
        if self._process.stdin:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
