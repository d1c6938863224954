"""Run Python that a model wrote, contained by the kernel. Standard library only; Linux does it best.

    outcome = run_python("from sympy import *\\nfactor(x**2 - 1)")
    outcome.stdout, outcome.error, outcome.isolation

    sandbox = Sandbox(workers=2)                   # many at once, for the episode runner
    ticket = sandbox.submit(["a = 2", "a + 1"])    # blocks of one response share their variables
    for ticket, outcome in sandbox.poll(): ...

The work is done by slm/sandbox_child.py, started as a program of its own at first use. Every run is a fresh copy
of a process that has numpy and sympy loaded, in its own namespaces, under a seccomp allow-list, Landlock and
resource limits, and nothing of it is left when it ends. `isolation` names the layers that this kernel granted.
What a program says about its own error is its own word, as an exit code would be; what is said about its time,
its end and its isolation comes from outside it.
"""

import json
import math
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass

from slm import BadInput

FULL = ("namespaces", "seccomp", "landlock")
CODE_BYTES = 4 << 20
# All a pool process gets of the environment. One thread per run for numerical libraries; one order of sets.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2",
               **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR")}}
TRIES = 3  # deaths of the pool in a row before the programs it was at are given up


@dataclass
class Outcome:
    """What one run did. stdout: what it printed, cut in the middle when long, and its last bare expressions.
    error: None, or one line a model can learn from; traceback: the program's own frames. seconds: wall clock."""
    stdout: str = ""
    error: str | None = None
    traceback: str = ""
    timed_out: bool = False
    seconds: float = 0.0
    isolation: str = ""


class Sandbox:
    """A pool that runs `workers` programs at a time. memory: bytes for each; output: bytes of stdout kept.

    require="full" demands every layer and raises BadInput where the kernel refuses one. Nothing is started before
    the first use (with `require`, now). Processes end with close(), with the garbage collection of this object,
    or with this process, however it ends. Not for several threads at once; see run_python for that.
    """

    def __init__(self, workers: int = 2, memory: int = 1 << 30, output: int = 10_000, require: str | None = None):
        if sys.platform == "win32":
            raise BadInput("the sandbox runs on Linux and macOS, not on Windows: use WSL there")
        if require not in (None, "full"):
            raise BadInput(f"require={require!r}: the sandbox knows only 'full'")
        self.workers, self.memory, self.output, self.require = workers, memory, output, require
        self.layers: list[str] | None = None
        self._jobs: dict[int, bytes] = {}         # ticket -> its message, until its outcome is here
        self._done: list[tuple[int, Outcome]] = []
        self._tickets = self._deaths = 0
        self._pool: _Pool | None = None
        if require:
            self._start()

    @property
    def isolation(self) -> str:
        """The level reached, by name, such as "full: namespaces+seccomp+landlock+limits"."""
        if self.layers is None:
            self._start()
        name = "+".join([*self.layers, "limits"]) if self.layers else "limits only"
        return f"full: {name}" if set(FULL) <= set(self.layers) else name

    @property
    def pending(self) -> int:
        """How many runs were submitted and not yet returned by poll()."""
        return len(self._jobs) + len(self._done)

    def submit(self, code: str | list[str], timeout: float = 5.0) -> int:
        """Queue a program, or the blocks of one; `timeout` in seconds of wall clock. Returns its ticket at once."""
        if not (isinstance(timeout, (int, float)) and 0 < timeout <= 86400 and math.isfinite(timeout)):
            raise BadInput(f"timeout={timeout!r}: expected seconds, more than 0 and at most a day")
        blocks = [code] if isinstance(code, str) else list(code)
        ticket, self._tickets = self._tickets, self._tickets + 1
        data = json.dumps({"ticket": ticket, "blocks": blocks, "timeout": timeout}).encode()
        if len(data) > CODE_BYTES:
            self._done.append((ticket, Outcome(error=f"the program is longer than {CODE_BYTES >> 20} MB")))
            return ticket
        self._jobs[ticket] = struct.pack("=I", len(data)) + data
        if self._pool:
            self._pool.send(self._jobs[ticket])
        self._pump(0)
        return ticket

    def poll(self, wait: float = 0.0) -> list[tuple[int, Outcome]]:
        """The runs that ended since the last poll, as (ticket, Outcome). Waits at most `wait` seconds for one."""
        if self._jobs and not self._done:
            self._pump(wait)
        done, self._done = self._done, []
        return done

    def run(self, code: str | list[str], timeout: float = 5.0) -> Outcome:
        """Submit one program and wait for it; other tickets' outcomes stay for poll()."""
        ticket, others = self.submit(code, timeout), []
        while True:
            for item in self.poll(1.0):
                others.append(item)
            for i, (which, outcome) in enumerate(others):
                if which == ticket:
                    del others[i]
                    self._done = others + self._done
                    return outcome

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
        self._pool = _Pool(self.workers, self.memory, self.output)
        self._pool.send(b"".join(self._jobs.values()))
        if self.layers is not None:
            return
        self.layers, refused = self._pool.layers, self._pool.refused
        if not refused:
            return
        why = "; ".join(f"{layer} ({said})" for layer, said in refused.items())
        if self.require:
            self._drop()
            raise BadInput(f"the sandbox was asked for its full level, and this system refuses {why}")
        print(f"sandbox: model code runs at the level '{self.isolation}'; this system refuses {why}", file=sys.stderr)

    def _drop(self) -> None:
        pool, self._pool = self._pool, None
        if pool and pool.owner == os.getpid():
            pool.end()

    def _pump(self, wait: float) -> None:
        """Exchange what is ready with the pool. One that died is replaced and its jobs are run again. An exception
        in the middle (Ctrl-C) may have torn a message, so the pool is replaced then too, at the next call."""
        try:
            if self._pool is None or self._pool.owner != os.getpid():
                self._start()  # at first use, after a fault, or in a fork of the process that made the pool
            for message in self._pool.exchange(wait):
                self._deaths = 0
                if self._jobs.pop(message["ticket"], None) is not None:
                    self._done.append((message.pop("ticket"), Outcome(**message, isolation=self.isolation)))
        except (EOFError, ConnectionError):
            self._drop()
            self._deaths += 1
            if self._deaths >= TRIES:
                self._give_up()
        except BaseException:
            self._drop()
            raise

    def _give_up(self) -> None:
        """The pool died TRIES times with no outcome in between: the jobs it was at, the oldest, end here."""
        for ticket in list(self._jobs)[:self.workers]:
            del self._jobs[ticket]
            said = f"the sandbox's own process died {TRIES} times while this program ran"
            self._done.append((ticket, Outcome(error=said, isolation=self.isolation)))
        self._deaths = 0


class _Pool:
    """The running sandbox_child.py and the socket to it."""

    def __init__(self, workers: int, memory: int, output: int):
        self.owner, self.heard, self.to_say = os.getpid(), bytearray(), bytearray()
        base = tempfile.mkdtemp(prefix="slm-sandbox-")
        os.chmod(base, 0o711)
        self.socket, theirs = socket.socketpair()
        plan = {"fd": theirs.fileno(), "workers": workers, "memory": memory, "output": output, "base": base}
        child = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-X", "utf8", child, json.dumps(plan)], env=ENVIRONMENT, cwd="/",
            pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        theirs.close()
        self.end = weakref.finalize(self, _end, self.socket, self.process, base, self.owner)
        hello = []
        while not hello:
            hello = self.exchange(60)
        self.layers, self.refused = hello[0]["layers"], hello[0]["refused"]

    def send(self, data: bytes) -> None:
        self.to_say += data

    def exchange(self, wait: float) -> list[dict]:
        """Send what is to be said and read what has come, waiting at most `wait` seconds for something to read.
        EOFError or ConnectionError when the pool is gone."""
        deadline, messages = time.monotonic() + wait, []
        while True:
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([self.socket], [self.socket] if self.to_say else [], [], left)
            if writable:
                del self.to_say[:self.socket.send(self.to_say, socket.MSG_DONTWAIT)]
            if readable:
                chunk = self.socket.recv(1 << 20)
                if not chunk:
                    raise EOFError
                self.heard += chunk
            while len(self.heard) >= 4 and len(self.heard) >= (end := 4 + struct.unpack("=I", self.heard[:4])[0]):
                messages.append(json.loads(self.heard[4:end]))
                del self.heard[:end]
            if messages or (left == 0.0 and not readable and not writable):
                return messages


def _end(connection: socket.socket, process: subprocess.Popen, base: str, owner: int) -> None:
    """Hang up: the supervisor leaves, and the kernel ends the zygote and every run with it."""
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
