"""Run Python that a model wrote, contained by the kernel. Measured on Linux only, not on macOS.

    outcome = run_python("from sympy import *\\nx = symbols('x')\\nfactor(x**2 - 1)")
    outcome.stdout, outcome.error, outcome.isolation

    sandbox = Sandbox(workers=2)                   # many at once, for the episode runner
    ticket = sandbox.submit(["a = 2", "a + 1"])    # blocks of one response share their variables
    for ticket, outcome in sandbox.poll(): ...

Every run is a fresh copy of a process that has numpy and sympy loaded (child.py), behind the walls of
layers.py, and nothing of it is left when it ends. `isolation` names the layers this kernel granted. What a
program says of its own error is its own word, as an exit code would be.
"""

import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass

from slm import BadInput
from slm.sandbox.messages import pack, take

FULL = {"namespaces", "seccomp", "landlock"}
CODE_BYTES = 4 << 20
TRIES = 3  # deaths of the pool in a row before the programs it was at are given up
# All the environment a program sees: one thread for numerical libraries, one order of sets.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C", "TZ": "UTC", "PYTHONHASHSEED": "0",
               "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
               "MKL_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}


@dataclass
class Outcome:
    """What one run did. stdout: what it printed and its blocks' last bare expressions, cut in the middle when
    long. error: None, or one line a model can learn from; traceback: the program's own frames. seconds: wall
    clock. isolation: the level it ran at, by name."""
    stdout: str = ""
    error: str | None = None
    traceback: str = ""
    timed_out: bool = False
    seconds: float = 0.0
    isolation: str = ""


class Sandbox:
    """A pool that runs `workers` programs at a time. memory: bytes of address space for each.

    require="full" demands every layer: BadInput where the kernel refuses one. Nothing is started before the
    first use (with `require`, now). The processes end with close(), with this object, or with this process,
    however it ends. For one thread; run_python is for all. A pool that dies is replaced and what it was at is
    run again.
    """

    def __init__(self, workers: int = 2, memory: int = 1 << 30, require: str | None = None):
        if sys.platform == "win32":
            raise BadInput("the sandbox runs on Linux and macOS, not on Windows; WSL is Linux")
        if require not in (None, "full"):
            raise BadInput(f"require={require!r}: the sandbox can only be asked for 'full'")
        self.workers, self.memory, self.require = workers, memory, require
        self._layers: list[str] | None = None
        self._jobs: dict[int, bytes] = {}         # ticket -> its message, until its outcome is here
        self._done: dict[int, Outcome] = {}       # by ticket, until somebody takes it
        self._tickets = self._deaths = 0
        self._pool: _Pool | None = None
        if require:
            self._start()

    @property
    def isolation(self) -> str:
        """The level reached, by name: "full: namespaces+seccomp+landlock+limits" down to "limits only"."""
        if self._layers is None:
            self._start()
        name = "+".join([*self._layers, "limits"]) if self._layers else "limits only"
        return f"full: {name}" if FULL <= set(self._layers) else name

    @property
    def pending(self) -> int:
        """How many runs were submitted and not yet returned."""
        return len(self._jobs) + len(self._done)

    def submit(self, code: str | list[str], timeout: float = 5.0) -> int:
        """Queue a program, or the blocks of one; `timeout` in seconds of wall clock. Its ticket, at once."""
        if not 0 < timeout <= 86400:
            raise BadInput(f"timeout={timeout!r}: expected seconds, more than 0 and at most a day")
        blocks = [code] if isinstance(code, str) else list(code)
        ticket, self._tickets = self._tickets, self._tickets + 1
        message = pack({"ticket": ticket, "blocks": blocks, "timeout": timeout})
        if len(message) > CODE_BYTES:
            self._fail(ticket, f"SizeLimit: the program is longer than {CODE_BYTES >> 20} MB")
            return ticket
        self._jobs[ticket] = message
        self._pump(0, message)
        return ticket

    def poll(self, wait: float = 0.0) -> list[tuple[int, Outcome]]:
        """The runs that ended since the last poll, as (ticket, Outcome). Waits `wait` seconds for one."""
        if self._jobs:
            self._pump(0 if self._done else wait)
        done, self._done = self._done, {}
        return list(done.items())

    def run(self, code: str | list[str], timeout: float = 5.0) -> Outcome:
        """Submit one program and wait for it; the outcomes of other tickets stay for poll()."""
        ticket = self.submit(code, timeout)
        while ticket not in self._done:
            self._pump(1.0)
        return self._done.pop(ticket)

    def close(self) -> None:
        """End the pool's processes; what was pending is forgotten."""
        self._jobs.clear()
        self._done.clear()
        self._drop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- the pool behind it ----

    def _start(self) -> None:
        self._pool = _Pool(self.workers, self.memory)
        self._pool.socket.sendall(b"".join(self._jobs.values()))
        if self._layers is not None:
            return
        self._layers, refused = self._pool.layers, self._pool.refused
        if not refused:
            return
        why = "; ".join(f"{layer} ({said})" for layer, said in refused.items())
        if self.require:
            self._drop()
            raise BadInput(f"the sandbox was asked for its full level, and this system refuses {why}")
        print(f"sandbox: model code runs at the level '{self.isolation}'; this system refuses {why}",
              file=sys.stderr)

    def _drop(self) -> None:
        pool, self._pool = self._pool, None
        if pool:
            pool.end()

    def _pump(self, wait: float, job: bytes = b"") -> None:
        """Send the newest job to the pool and take in outcomes. A new pool gets all jobs: at first use, after
        a death, and in a fork of the process that made the old one. An exception here (Ctrl-C) may have torn
        a message: it ends the pool."""
        try:
            if self._pool is None or self._pool.owner != os.getpid():
                self._start()
            else:
                self._pool.socket.sendall(job)  # the supervisor always reads
            for message in self._pool.listen(wait):
                if "broken" in message:  # it ended itself, which is no program's fault
                    raise RuntimeError(f"the sandbox is broken: {message['broken']}")
                self._deaths = 0
                ticket = message.pop("ticket")
                if self._jobs.pop(ticket, None):
                    self._done[ticket] = Outcome(**message, isolation=self.isolation)
        except (EOFError, ConnectionError):
            self._drop()
            self._deaths += 1
            if self._deaths >= TRIES:
                self._give_up()
        except BaseException:
            self._drop()
            raise

    def _give_up(self) -> None:
        """The pool died TRIES times with no outcome in between: end the programs it was at, the oldest."""
        self._deaths = 0
        for ticket in list(self._jobs)[:self.workers]:
            del self._jobs[ticket]
            self._fail(ticket, f"Crash: the sandbox's own process died {TRIES} times while this program ran")

    def _fail(self, ticket: int, error: str) -> None:
        self._done[ticket] = Outcome(error=error, isolation=self.isolation)


class _Pool:
    """The running child.py and the socket to it."""

    def __init__(self, workers: int, memory: int):
        self.owner, self.heard, self.poll = os.getpid(), bytearray(), select.poll()
        base = os.path.join(tempfile.gettempdir(), f"slm-sandbox-{secrets.token_hex(8)}")
        self.socket, theirs = socket.socketpair()
        self.poll.register(self.socket, select.POLLIN)
        plan = {"fd": theirs.fileno(), "workers": workers, "memory": memory, "base": base}
        child = os.path.join(os.path.dirname(os.path.abspath(__file__)), "child.py")
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-B", "-X", "utf8", child, json.dumps(plan)], env=ENVIRONMENT,
                cwd="/", pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=log)
            theirs.close()
            self.end = weakref.finalize(self, _end, self.socket, self.process, base, self.owner)
            try:
                hello = self.listen(60)[0]
            except (EOFError, ConnectionError, IndexError):
                log.seek(0)
                raise RuntimeError(f"the sandbox did not start:\n{log.read()}") from None
        self.layers, self.refused = hello["layers"], hello["refused"]

    def listen(self, wait: float) -> list[dict]:
        """The messages that have come, after up to `wait` seconds for the first. EOFError or ConnectionError
        when the pool is gone."""
        messages = []
        while not messages and self.poll.poll(wait * 1000):
            chunk = self.socket.recv(1 << 20)
            if not chunk:
                raise EOFError
            self.heard += chunk
            while (message := take(self.heard)) is not None:
                messages.append(message)
        return messages


def _end(connection: socket.socket, process: subprocess.Popen, base: str, owner: int) -> None:
    """Hang up: the supervisor leaves, and every run with it."""
    connection.close()
    if os.getpid() != owner:
        return
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(base, ignore_errors=True)


_shared: Sandbox | None = None
_lock = threading.Lock()


def run_python(code: str | list[str], timeout: float = 5.0) -> Outcome:
    """Run one program, or the blocks of one, in a pool that is started at the first call and then kept."""
    global _shared
    with _lock:
        _shared = _shared or Sandbox(workers=1)
        return _shared.run(code, timeout)
