"""The processes of the sandbox, started by pool.py as a program of its own:

    supervisor   holds the queue, the clocks and the pipes, and alone decides what an outcome says about time,
                 kills and exits. Started fresh, so nothing of the caller's memory is in it.
    zygote       has numpy and sympy loaded and forks a run when told to. It never sees code or results, so a
                 run, which is a copy of it, can't find another run's in its memory. With namespaces it is the
                 first process of a pid namespace: when it dies, the kernel ends every run.
    run          one program of the model, confined before it is given its code. With namespaces it is the
                 second process of its own; the first only sleeps, because no signal from inside ends a first.

The supervisor keeps spare runs waiting, so a program never waits for a fork. Not covered: what two runs can
tell each other through timing, and holes in the system calls that stay allowed. With seccomp and Landlock
alone, the machine's name and names and sizes of files outside can be seen (stat), no file's content can, and
no file's mode or time can be changed, a program's own included (so shutil.copy fails there).
"""

import ast
import atexit
import collections
import concurrent.futures
import contextlib
import gc
import json
import linecache
import multiprocessing.dummy
import os
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import layers as layer
from messages import pack, take

sys.path.pop(0)

CHANNEL = 200                     # a run's descriptor for its code and its error
PRINTED_BYTES = 64 * layer.MB     # a program that prints more is stopped
OUT_BYTES, ERR_BYTES = 10_000, 4000  # what is kept of that
REPORT_BYTES = 128 * 1024         # what a run may say about its error
COMMAND = re.compile(r"^([ \t]*)(?:[!%]|pip3? install\b).*")  # a notebook's, not Python

# Run once by the zygote: sympy imports and caches much of what programs need at first use.
WARM_UP = """
from sympy import *
x, y, n = symbols("x y n")
solve(x**2 - 3*x + 1, x), solve([x + 2*y - 3, x - y], [x, y]), solve(Eq(x**3, 5), x), solve(x + 1 > 3, x)
factor(x**4 - 1), expand((x + y)**4), integrate(x*sin(x), (x, 0, pi)), diff(x*exp(x)), limit(sin(x)/x, x, 0)
simplify(sin(x)**2 + cos(x)**2), series(exp(x), x, 0, 3), summation(n**2, (n, 1, x)), sqrt(8) + Rational(1, 3)
Matrix([[1, 2], [3, 5]]).inv().det(), N(pi, 20), nsimplify(0.25), factorint(360), sympify("1/2 + x")
gcd(12, 18), latex(sqrt(x)/2), binomial(9, 4)
list(primerange(50)), solveset(x**2 - 2, x), Sum(1/n**2, (n, 1, oo)).doit()
"""


# ---- run: one program of the model -----------------------------------------------------------------------

def be_a_run(plan: dict, scratch: str, channel: int, out: int, err: int) -> None:
    """Confine this process, wait for code, run it, say what went wrong. Never returns."""
    for fd, number in (channel, CHANNEL), (os.open("/dev/null", os.O_RDWR), 0), (out, 1), (err, 2):
        os.dup2(fd, number)
    os.closerange(3, CHANNEL)
    os.closerange(CHANNEL + 1, 1 << 16)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv[:] = sys.orig_argv[:] = [""]
    os.environ.update(HOME=scratch, TMPDIR=scratch, MPLCONFIGDIR=scratch)
    tempfile.tempdir = None
    layer.confine(plan, scratch)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    gc.enable()
    for name in signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU:  # else without effect: there is no terminal
        signal.signal(name, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    sys.set_int_max_str_digits(0)  # answers of any size; the clock bounds the quadratic conversion
    os.write(CHANNEL, b".")  # ready
    heard = bytearray()
    while (job := take(heard)) is None:
        chunk = os.read(CHANNEL, 1 << 16)
        if not chunk:
            os._exit(0)  # the supervisor hung up
        heard += chunk
    seconds = int(job["timeout"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    run_blocks(job["blocks"], job["token"].encode(), sys.stdout)


def run_blocks(blocks: list[str], token: bytes, out, write=os.write, leave=os._exit) -> None:
    """Run the blocks like cells of one notebook, say on the channel how it went, and leave. `write` and
    `leave` are taken before the program can replace them: success goes through nothing that it can."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    names = ["<code>"] if len(blocks) == 1 else [f"<block {i + 1}>" for i in range(len(blocks))]
    report = b"null"
    try:
        for source, name in zip(blocks, names):
            run_cell(source, name, module.__dict__)
        threading._shutdown()  # as at the end of any program: threads are waited for, atexit is honoured
        atexit._run_exitfuncs()
    except BaseException as error:
        report = b'{"error": "the program failed, and then the report of its error", "traceback": ""}'
        with contextlib.suppress(BaseException):
            report = describe(error, names)
    for stream in {id(s): s for s in (sys.stdout, out)}.values():
        with contextlib.suppress(Exception):
            stream.flush()
    write(CHANNEL, token + report)
    leave(0)


def run_cell(source: str, name: str, space: dict) -> None:
    """Run one block in the namespace `space` and show the value of a last bare expression; not the count that
    a last `write` returns, which would read as an answer."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    tree, shown = parse(source, name), []
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        last = tree.body[-1].value
        if not (isinstance(last, ast.Call) and getattr(last.func, "attr", "").startswith("write")):
            shown = [tree.body.pop()]
    exec(compile(tree, name, "exec", dont_inherit=True), space)
    exec(compile(ast.Interactive(shown), name, "single", dont_inherit=True), space)


def parse(source: str, name: str) -> ast.Module:
    """The syntax tree. A notebook's commands (%matplotlib inline, !pip install sympy) are passed over: there
    is nothing here to plot on or to install from."""
    lines = source.removeprefix("\ufeff").split("\n")
    while True:
        try:
            return ast.parse("\n".join(lines), name)
        except SyntaxError as error:
            at = (error.lineno or 1) - 1
            if not COMMAND.match("".join(lines[at:at + 1])):
                raise
            lines[at] = COMMAND.sub(r"\1pass", lines[at])


def describe(error: BaseException, names: list[str], quote=json.encoder.encode_basestring_ascii) -> bytes:
    """What went wrong as JSON, {"error": one line, "traceback": text}, with the program's own frames only."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return b"null"
    sys.settrace(None)  # the program may have left behind what would run in here
    sys.setprofile(None)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    sys.setrecursionlimit(10_000)
    whole = traceback.TracebackException.from_exception(error, limit=0, compact=True)
    todo = [(whole, error)]
    for part, exception in todo:
        own = [at for at in traceback.walk_tb(exception.__traceback__) if at[0].f_code.co_filename in names]
        part.stack = traceback.StackSummary.extract(own if len(own) <= 40 else own[:20] + own[-20:])
        chain = [(part.__cause__, exception.__cause__), (part.__context__, exception.__context__),
                 *zip(getattr(part, "exceptions", None) or (), getattr(exception, "exceptions", ()))]
        todo += [(p, e) for p, e in chain if p is not None]
    said = " ".join(list(whole.format_exception_only())[-1].split())
    if isinstance(error, PermissionError) and not error.filename:
        said += ": no other process and no network here"
    line, name = (whole.stack[-1].lineno, whole.stack[-1].filename) if whole.stack else (None, None)
    if isinstance(error, SyntaxError) and error.filename in names:
        line, name = error.lineno, error.filename
    place = f" ({'' if name == '<code>' else name[1:-1] + ', '}line {line})" if line else ""
    said, trace = cut(said, 1000) + place, cut("".join(whole.format()), 8000)
    return f'{{"error": {quote(said)}, "traceback": {quote(trace)}}}'.encode()


def cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters cut ...]\n{text[-half:]}"


# ---- zygote: forks runs ----------------------------------------------------------------------------------

def be_the_zygote(plan: dict, commands: socket.socket, proc: int | None) -> None:
    """Load the libraries and say so with an empty message. Then obey, a line each: "fork" (answered with pid,
    scratch folder and three descriptors), "kill PID", "reap PID" (answered with exit code and processor
    seconds). Never returns."""
    layer.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: gone with the supervisor
    layer.prctl(36, 1)              # PR_SET_CHILD_SUBREAPER: what a run leaves behind without a pid namespace
    home = None
    if proc is not None:
        home = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        os.close(proc)
    warm_up()
    commands.sendall(pack({}))
    beside: dict[int, str | int] = {}  # run -> its folder, or the first process of its namespace
    for request in commands.makefile("rb"):
        verb, *pid = request.split()
        if verb == b"fork":
            fork_run(plan, commands, home, beside)
        elif verb == b"kill":
            kill(int(pid[0]))
        else:
            code, cpu = reap(int(pid[0]), beside)
            commands.sendall(pack({"reaped": int(pid[0]), "code": code, "cpu": cpu}))
    for pid in list(beside):
        reap(pid, beside)
    os._exit(0)


def warm_up() -> None:
    """Load what model code imports. A run has no other process, so multiprocessing works with threads. Then
    keep the garbage collector off all this: its marks would unshare pages."""
    for name in "numpy.random", "sympy", "statistics", "datetime", "cmath", "dataclasses", "typing", "copy":
        with contextlib.suppress(ImportError):
            __import__(name)
    with contextlib.suppress(ImportError):
        exec(WARM_UP, {})
    for name in *multiprocessing.dummy.__all__, "Value", "Array":
        with_threads = getattr(multiprocessing.dummy, name)
        setattr(multiprocessing, name, with_threads)
        setattr(multiprocessing.context.BaseContext, name, staticmethod(with_threads))
    concurrent.futures.ProcessPoolExecutor = concurrent.futures.ThreadPoolExecutor
    libraries = (".zip", "-packages", "lib-dynload", os.path.dirname(os.__file__))
    sys.path[:] = ["", *[p for p in sys.path if p.endswith(libraries)]]
    layer.seccomp_filter(layer.RUN)
    gc.collect()
    gc.disable()
    gc.freeze()


def fork_run(plan: dict, commands: socket.socket, home: int | None, beside: dict[int, str | int]) -> None:
    if home is None:
        scratch = first = tempfile.mkdtemp(dir=plan["base"])
    else:  # the next child starts a pid namespace; the kernel allows that once, so go back home first
        layer.call("setns", home, layer.NEWPID)
        layer.call("unshare", layer.NEWPID)
        scratch = layer.scratch_folder(plan["paths"])
        if (first := os.fork()) == 0:
            signal.sigwait([])  # never comes
            os._exit(70)
    ours, theirs = socket.socketpair()
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            be_a_run(plan, scratch, theirs.fileno(), out_end, err_end)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(70)
    beside[pid] = first
    socket.send_fds(commands, [pack({"pid": pid, "scratch": scratch})], [ours.fileno(), out, err])
    for fd in out, out_end, err, err_end:
        os.close(fd)
    ours.close()
    theirs.close()


def kill(pid: int) -> None:
    for end in os.killpg, os.kill:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def reap(pid: int, beside: dict[int, str | int]) -> tuple[int, float]:
    """End a run for good. Its exit code or minus the signal that ended it, and its processor seconds."""
    kill(pid)
    _, status, used = os.wait4(pid, 0)
    first = beside.pop(pid)
    if isinstance(first, int):  # the rest of the namespace and its folder in memory end with it
        kill(first)
        os.waitpid(first, 0)
    else:
        shutil.rmtree(first, ignore_errors=True)
        sweep(beside)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def sweep(known: dict[int, str | int]) -> None:
    """Without a pid namespace: end processes that left their run, which the kernel has handed to this one."""
    if sys.platform != "linux":
        return
    me, orphans = os.getpid(), {-1}
    while orphans:
        with open(f"/proc/{me}/task/{me}/children") as file:
            orphans = {int(pid) for pid in file.read().split()} - known.keys()
        for pid in orphans:
            kill(pid)
            os.waitpid(pid, 0)


# ---- supervisor: queue, clocks, outcomes -----------------------------------------------------------------

class Printed:
    """The first and the last bytes of a stream of any length."""

    def __init__(self, limit: int):
        self.half, self.total, self.head, self.tail = limit // 2, 0, b"", b""

    def add(self, chunk: bytes) -> None:
        self.total += len(chunk)
        room = self.half - len(self.head)
        self.head, rest = self.head + chunk[:room], chunk[room:]
        self.tail = (self.tail + rest)[-self.half:] if rest else self.tail

    def text(self) -> str:
        missing = self.total - len(self.head) - len(self.tail)
        if not missing:
            return (self.head + self.tail).decode("utf-8", "replace")
        head, tail = (part.decode("utf-8", "replace").strip("\ufffd") for part in (self.head, self.tail))
        return f"{head}\n[... {missing:,} bytes cut ...]\n{tail}"


class Run:
    """One forked process: spare until it gets a job, over when its channel has closed."""

    def __init__(self, pid: int, scratch: str, fds: list[int]):
        self.pid, self.scratch, self.fds = pid, scratch, fds
        self.ready, self.job, self.token = False, None, b""
        self.started = self.ended = 0.0
        self.deadline, self.why = float("inf"), None
        self.out, self.err, self.said, self.bytes = Printed(OUT_BYTES), Printed(ERR_BYTES), b"", 0


class Supervisor:
    """Serves one caller until the caller hangs up."""

    def __init__(self, caller: socket.socket, zygote: socket.socket, plan: dict):
        self.caller, self.zygote, self.plan = caller, zygote, plan
        self.heard, self.answer, self.to_say = bytearray(), bytearray(), bytearray()
        self.queue: collections.deque[dict] = collections.deque()
        self.runs: dict[int, Run] = {}      # by pid
        self.by_fd: dict[int, Run] = {}
        self.forking = True                 # until the zygote or its newest run says that it is ready
        self.stillborn = 0                  # runs that died before that, in a row
        self.poll = select.poll()
        self.poll.register(caller, select.POLLIN)
        self.poll.register(zygote, select.POLLIN)

    def spare(self) -> list[Run]:
        return [run for run in self.runs.values() if run.ready and not run.job and not run.ended]

    def busy(self) -> list[Run]:
        return [run for run in self.runs.values() if run.job]

    def serve(self) -> None:
        caller = self.caller.fileno()
        while True:
            if len(self.spare()) < max(2, self.plan["workers"]) and not self.forking:
                self.zygote.sendall(b"fork\n")
                self.forking = True
            self.poll.modify(caller, select.POLLIN | (select.POLLOUT if self.to_say else 0))
            for fd, event in self.poll.poll(self.patience()):
                if fd in self.by_fd:
                    self.hear(self.by_fd[fd], fd)
                elif fd == self.zygote.fileno():
                    self.hear_zygote()
                elif fd == caller and event & select.POLLOUT:
                    with contextlib.suppress(BlockingIOError):
                        del self.to_say[:self.caller.send(self.to_say)]
                elif fd == caller and not self.hear_caller():
                    return
            self.check_clocks()
            self.dispatch()

    def hear_caller(self) -> bool:
        """Take jobs in. False when the caller has hung up."""
        chunk = self.caller.recv(1 << 18)
        self.heard += chunk
        while (job := take(self.heard)) is not None:
            self.queue.append(job)
        return bool(chunk)

    def hear_zygote(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.zygote, 1 << 16, 3)
        if not data:
            raise EOFError("the zygote died")
        self.answer += data
        while (message := take(self.answer)) is not None:
            if "reaped" in message:
                self.finish(self.runs.pop(message["reaped"]), message["code"], message["cpu"])
                continue
            self.forking = bool(message)
            if message:
                run = Run(message["pid"], message["scratch"], fds)
                self.runs[run.pid] = run
                for fd in fds:
                    os.set_blocking(fd, False)
                    self.by_fd[fd] = run
                    self.poll.register(fd, select.POLLIN)

    def dispatch(self) -> None:
        """Hand waiting jobs to spare runs."""
        for run in self.spare()[:self.plan["workers"] - len(self.busy())]:
            if not self.queue:
                return
            job = self.queue.popleft()
            token = secrets.token_hex(16)
            data = pack({"blocks": job["blocks"], "timeout": job["timeout"], "token": token})
            os.set_blocking(run.fds[0], True)  # it reads at once, or is dead
            try:
                while data:
                    data = data[os.write(run.fds[0], data):]
            except OSError:
                self.queue.appendleft(job)
                continue
            os.set_blocking(run.fds[0], False)
            run.job, run.token, run.started = job, token.encode(), time.monotonic()
            run.deadline = run.started + job["timeout"]

    def hear(self, run: Run, fd: int) -> bool:
        """Take in what a run has written. False when there is no more, for now or for good."""
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if chunk == b"." and fd == run.fds[0] and not run.ready:
            run.ready, self.forking, self.stillborn = True, False, 0
            return True
        run.bytes += len(chunk)
        if fd == run.fds[0]:
            run.said = (run.said + chunk)[-REPORT_BYTES:]
        else:
            (run.out if fd == run.fds[1] else run.err).add(chunk)
        if not chunk:
            self.poll.unregister(fd)
            del self.by_fd[fd]
            if fd == run.fds[0]:
                self.end(run)
        elif run.bytes > PRINTED_BYTES and not run.why:
            self.stop(run, f"OutputLimit: stopped after writing {PRINTED_BYTES // layer.MB} MB")
        return bool(chunk)

    def stop(self, run: Run, why: str) -> None:
        run.why, run.deadline = why, time.monotonic() + 1
        if not run.ended:  # else it is being reaped, and its number may be another's soon
            self.zygote.sendall(b"kill %d\n" % run.pid)

    def end(self, run: Run) -> None:
        """Have it reaped; `finish` follows."""
        if not run.ended:
            run.ended = time.monotonic()
            if not run.ready:
                self.forking, self.stillborn = False, self.stillborn + 1
            self.zygote.sendall(b"reap %d\n" % run.pid)

    def patience(self) -> float | None:
        """Milliseconds until a clock must be looked at."""
        busy = self.busy()
        soonest = min((run.deadline for run in busy if not run.ended), default=float("inf"))
        if busy and "namespaces" not in self.plan["layers"]:
            soonest = min(soonest, time.monotonic() + 0.05)
        return None if soonest == float("inf") else max(0.0, soonest - time.monotonic()) * 1000 + 1

    def check_clocks(self) -> None:
        now, on_disk = time.monotonic(), "namespaces" not in self.plan["layers"]
        for run in self.busy():
            if now >= run.deadline and run.why:
                self.end(run)  # killed, but something still holds its channel
            elif now >= run.deadline:
                self.stop(run, f"Timeout: stopped after {run.job['timeout']:g} seconds")
            elif on_disk and not run.why and folder_size(run.scratch) > layer.SCRATCH_BYTES:
                self.stop(run, f"DiskLimit: stopped after writing {layer.SCRATCH_BYTES // layer.MB} MB or "
                               f"{layer.SCRATCH_FILES} files")

    def finish(self, run: Run, code: int, cpu: float) -> None:
        """A run is reaped: tell the caller its outcome."""
        for fd in run.fds:
            while fd in self.by_fd and self.hear(run, fd):
                pass
            if self.by_fd.pop(fd, None):
                self.poll.unregister(fd)
            os.close(fd)
        if self.stillborn > 9:
            raise RuntimeError(f"runs die before they start:\n{run.err.text()}")
        if run.job:
            self.to_say += pack({"ticket": run.job["ticket"], "stdout": run.out.text(),
                                 "seconds": run.ended - run.started, **what_happened(run, code, cpu)})


def what_happened(run: Run, code: int, cpu: float) -> dict:
    """The fields error, traceback and timed_out of an Outcome, where they are not at their defaults. What the
    kernel says of a process goes before what the process says."""
    if code == -signal.SIGKILL and not run.why and cpu >= int(run.job["timeout"]) + 0.9:
        run.why = f"Timeout: stopped after {cpu:.1f} seconds of processor time"
    if run.why:
        return {"error": run.why, "timed_out": run.why.startswith("Timeout")}
    _, token, body = run.said.partition(run.token)
    report = {}
    if code == 0 and token:
        with contextlib.suppress(ValueError, RecursionError):
            report = json.loads(body)
    if report is None:
        return {}
    names = ("error", "traceback")
    if isinstance(report, dict) and all(isinstance(report.get(name), str) for name in names):
        return {name: report[name].encode("utf-8", "replace").decode() for name in names}
    how = f"left with exit code {code} before its end"
    if code < 0:
        how = "died of " + {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
    return {"error": f"Crash: the program {how}", "traceback": run.err.text()}


def folder_size(folder: str) -> int:
    """Bytes on disk, and for every name so many that SCRATCH_FILES of them reach SCRATCH_BYTES."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            total += layer.SCRATCH_BYTES // layer.SCRATCH_FILES
            with contextlib.suppress(OSError):  # gone by now, perhaps to hide the others
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


# ---- start -----------------------------------------------------------------------------------------------

def main() -> None:
    plan = json.loads(sys.argv[1])
    caller = socket.socket(fileno=plan["fd"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # when memory runs out, this goes before the training does
    layer.find_layers(plan)
    supervisor, zygote = socket.socketpair()
    proc = None
    if "namespaces" in plan["layers"]:
        proc = os.open("/proc", os.O_PATH)
        plan["drop_root"] = layer.enter_namespaces(plan["paths"])
    else:
        os.mkdir(plan["base"], 0o700)
    server = Supervisor(caller, supervisor, plan)
    server.to_say += pack({"layers": plan["layers"], "refused": plan["refused"]})
    pid = os.fork()
    if pid == 0:
        caller.close()
        supervisor.close()
        be_the_zygote(plan, zygote, proc)
    zygote.close()
    if proc is not None:
        os.close(proc)
    caller.setblocking(False)
    try:
        server.serve()
    except RuntimeError as error:
        caller.setblocking(True)
        caller.sendall(server.to_say + pack({"broken": str(error)}))
    finally:
        supervisor.close()
        os.waitpid(pid, 0)
        if proc is None:
            shutil.rmtree(plan["base"], ignore_errors=True)


if __name__ == "__main__":
    main()
