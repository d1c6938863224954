"""The inside of the sandbox, started by slm/sandbox.py as a program of its own. Imports nothing from slm.

Three kinds of process come out of this file:

    supervisor   holds the queue, the clocks and the pipes, and alone decides what an outcome says about
                 time, kills and isolation. Started fresh, so nothing of the caller's memory is in it.
    zygote       has numpy and sympy loaded and forks a run when told to. It never sees code or results, so a
                 run, which is a copy of it, can't find another run's in its memory. With namespaces it is
                 the first process of a pid namespace: when it dies, the kernel ends every run.
    run          one program of the model, confined before it reads its code.

A layer that the kernel refuses is left out and named; every layer is tried in a throwaway child first.
Not covered: covert channels (timing, page cache), and holes in the kernel's own system calls that stay allowed.
With seccomp and Landlock alone, names and sizes of files outside can be seen (stat), their content can't.
"""

import ast
import atexit
import collections
import ctypes
import gc
import json
import linecache
import os
import platform
import resource
import secrets
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types

MB = 1 << 20
SCRATCH_BYTES, SCRATCH_FILES, THREADS, FILES = 64 * MB, 4096, 64, 128
PRINTED_BYTES = 64 * MB       # a program that prints more is stopped
REPORT_BYTES = 64 * 1024      # what a run may say about its error
CHANNEL = 200                 # the run's descriptor for its code and its error, out of the way of small numbers
NOBODY = 65534

# ---- system calls ----------------------------------------------------------------------------------------

# What a program may call without conditions: name, number on x86_64, number on aarch64 (- where there is none).
ALLOWED = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, msync 26 227, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102,
alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71, recvfrom 45 207, shutdown 48 210, exit 60 93,
wait4 61 260, uname 63 160, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents 78 -,
getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -,
symlink 88 -, readlink 89 -, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179,
times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -,
getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43, fstatfs 138 44,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
setrlimit 160 164, gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, epoll_create 213 -,
getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, waitid 247 95,
openat 257 56, mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, linkat 265 37, symlinkat 266 36,
readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99, get_robust_list 274 100,
epoll_pwait 281 22, eventfd 284 -, fallocate 285 47, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59,
preadv 295 69, pwritev 296 70, getcpu 309 168, renameat2 316 276, getrandom 318 278, membarrier 324 283,
copy_file_range 326 285, statx 332 291, rseq 334 293, close_range 436 436, faccessat2 439 439
"""
# Allowed under the conditions that `seccomp_filter` states, or used by this file only.
OTHERS = """
ioctl 16 29, socketpair 53 199, sendto 44 206, clone 56 220, kill 62 129, fcntl 72 25, capset 126 91, prctl 157 167,
tgkill 234 131, prlimit64 302 261, clone3 435 435, pivot_root 155 41, mount 165 40, umount2 166 39, unshare 272 97,
setns 308 268, seccomp 317 277, mount_setattr 442 442, landlock_create_ruleset 444 444, landlock_add_rule 445 445,
landlock_restrict_self 446 446
"""
MACHINE = platform.machine()
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(MACHINE)


def _numbers(table: str) -> dict[str, int]:
    rows = (row.split() for row in table.replace("\n", " ").split(","))
    column = 2 if MACHINE == "aarch64" else 1
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


NUMBER = _numbers(ALLOWED + "," + OTHERS)
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> int:
    """One Linux system call. Integers, bytes and ctypes pointers as arguments; OSError with the call's name."""
    if sys.platform != "linux" or AUDIT_ARCH is None:
        raise OSError(38, f"no {name} on {sys.platform} {MACHINE}")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(NUMBER[name]), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


# ---- layer: namespaces -----------------------------------------------------------------------------------

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
O_PATH = getattr(os, "O_PATH", 0)
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]


def library_paths() -> list[str]:
    """The folders the interpreter itself reads: standard library, installed packages, shared libraries."""
    standard = [os.path.dirname(os.__file__), os.path.dirname(json.__file__), os.path.dirname(ctypes.__file__)]
    installed = [p for p in sys.path if p.endswith(("-packages", "lib-dynload")) and os.path.isdir(p)]
    with open("/proc/self/maps") as maps:
        loaded = {os.path.dirname(line.split()[-1]) for line in maps if ".so" in line}
    folders = sorted({*standard, *installed, *loaded, "/usr/share/zoneinfo"}, key=len)
    kept: list[str] = []
    for folder in folders:
        if os.path.isdir(folder) and not any((folder + "/").startswith(k + "/") for k in kept):
            kept.append(folder)
    return kept


def enter_namespaces(paths: list[str]) -> bool:
    """Leave this process without network, host name and System V objects, its later children in a pid namespace,
    and see a root that holds `paths` and four devices, all read-only. Anyone but root becomes the owner of a new
    user namespace for that; True when this is still root outside one."""
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    try:
        if still_root := uid == 0:
            call("unshare", flags)
    except PermissionError:
        still_root = False
    if not still_root:
        call("unshare", flags | NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    socket.sethostname("sandbox")
    _read_only_root(paths)
    return still_root


def _read_only_root(paths: list[str]) -> None:
    sources = [(p, os.open(p, O_PATH)) for p in [*paths, *DEVICES]]
    links = {p: os.readlink(p) for p in ("/lib", "/lib64") if os.path.islink(p)}
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"root", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path, fd in sources:
        target = "/tmp" + path
        if path in DEVICES:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        else:
            os.makedirs(target, exist_ok=True)
        call("mount", f"/proc/self/fd/{fd}".encode(), target.encode(), None, MS_BIND | MS_REC, None)
    os.makedirs("/tmp/tmp", exist_ok=True)
    for path, target in links.items():
        if not os.path.exists("/tmp" + path):
            os.symlink(target, "/tmp" + path)
    for _, fd in sources:
        os.close(fd)
    os.chdir("/tmp")
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)  # MNT_DETACH: the old root lies on top
    os.chdir("/")
    read_only = struct.pack("=QQQQ", 1 | MS_NOSUID, 0, 0, 0)
    call("mount_setattr", -100, b"/", 0x8000, read_only, len(read_only))  # AT_RECURSIVE


def own_scratch(drop_root: bool) -> None:
    """A mount namespace with an empty /tmp in memory for this process alone; then no longer root, and in a
    user namespace of its own, so that its threads are counted apart from everyone else's."""
    uid, gid = (NOBODY, NOBODY) if drop_root else (os.geteuid(), os.getegid())
    call("unshare", NEWNS)
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700,uid={uid},gid={gid}"
    call("mount", b"scratch", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options.encode())
    if drop_root:
        leave_root()
    call("unshare", NEWUSER)


def leave_root() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


# ---- layer: Landlock -------------------------------------------------------------------------------------

READ = 0b1100                              # READ_FILE, READ_DIR
WRITE = READ | 0b0111_0001_1011_0010       # and write, remove, make folders, files and links, move, truncate
FLAT = WRITE & ~0b0010_0000_1000_0000      # the same without folders


def landlock_abi() -> int:
    return call("landlock_create_ruleset", None, 0, 1)


def landlock(paths: list[str], scratch: str, rights: int) -> None:
    """Only `paths` can be read and only `scratch` written from now on; no TCP, no abstract unix sockets and no
    signals to processes outside, as far as this kernel's version of Landlock (1 to 7) knows them."""
    abi = landlock_abi()
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = call("landlock_create_ruleset", attributes, len(attributes), 0)
    rules = [(p, READ) for p in paths] + [(p, 0b0110) for p in DEVICES] + [(scratch, rights & files)]
    for path, allowed in rules:
        fd = os.open(path, O_PATH | os.O_CLOEXEC)
        call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


# ---- layer: seccomp --------------------------------------------------------------------------------------

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # errno 1 EPERM, 38 ENOSYS
CLONE_THREAD = 0x10000
IOCTLS = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]     # terminal? window size, bytes waiting, (non)block, cloexec
FCNTLS = [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030]           # duplicate, flags, locks; not owner, lease, pipe size
STREAM_PAIR = [1 | close | wait for close in (0, 0o2000000) for wait in (0, 0o4000)]


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _argument(i: int, half: int = 0) -> int:
    return 16 + 8 * i + 4 * half


def seccomp_filter(pid: int) -> bytes:
    """The allow-list as a BPF program (kernel docs, seccomp_filter; struct seccomp_data: number, architecture,
    instruction pointer, six arguments of 64 bits). Everything unnamed is refused with EPERM: processes, exec,
    sockets, tracing, mounts, keys, io_uring, memory files, changes of owner, mode and time of files."""
    conditions = {
        "ioctl": [(_argument(1), IOCTLS)],
        "fcntl": [(_argument(1), FCNTLS)],
        "kill": [(_argument(0), [pid])],
        "tgkill": [(_argument(0), [pid])],
        "prlimit64": [(_argument(0), [0, pid])],
        "prctl": [(_argument(0), [15, 16])],                                   # a thread's name
        "socketpair": [(_argument(0), [1]), (_argument(1), STREAM_PAIR)],      # asyncio wakes itself with one
        "sendto": [(_argument(4), [0]), (_argument(4, 1), [0])],               # no address: that pair only
    }
    program = _op(LOAD, 4) + _op(EQUAL, AUDIT_ARCH, 1, 0) + _op(RETURN, KILL) + _op(LOAD, 0)
    if MACHINE == "x86_64":
        program += _op(0x35, 0x40000000, 0, 1) + _op(RETURN, REFUSE)  # the x32 numbers
    for name in _numbers(ALLOWED):
        program += _op(EQUAL, NUMBER[name], 0, 1) + _op(RETURN, ALLOW)
    for name, checks in conditions.items():
        body = b""
        for offset, values in checks:
            body += _op(LOAD, offset)
            body += b"".join(_op(EQUAL, v, len(values) - i, 0) for i, v in enumerate(values))
            body += _op(RETURN, REFUSE)
        body += _op(RETURN, ALLOW)
        program += _op(EQUAL, NUMBER[name], 0, len(body) // 8) + body
    threads = _op(LOAD, _argument(0)) + _op(ANY_BIT, CLONE_THREAD, 0, 1) + _op(RETURN, ALLOW) + _op(RETURN, REFUSE)
    program += _op(EQUAL, NUMBER["clone"], 0, len(threads) // 8) + threads
    program += _op(EQUAL, NUMBER["clone3"], 0, 1) + _op(RETURN, UNKNOWN)  # then libc uses clone
    return program + _op(RETURN, REFUSE)


def seccomp() -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    code = ctypes.create_string_buffer(program := seccomp_filter(os.getpid()))
    wanted = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p).value)
    call("seccomp", 1, 4, ctypes.byref(wanted))  # SET_MODE_FILTER, SPEC_ALLOW: no slower memory access


# ---- layer: limits ---------------------------------------------------------------------------------------

def limits(memory: int, threads: int | None) -> None:
    """`memory` bytes on top of what is mapped now (the margin above it is for the report of a MemoryError)."""
    def cap(what: str, soft: int, hard: int | None = None) -> None:
        if hasattr(resource, what):
            top = resource.getrlimit(getattr(resource, what))[1]
            values = [v if top == resource.RLIM_INFINITY else min(v, top) for v in (soft, hard or soft)]
            resource.setrlimit(getattr(resource, what), tuple(values))

    cap("RLIMIT_CORE", 0)
    cap("RLIMIT_FSIZE", SCRATCH_BYTES)
    cap("RLIMIT_NOFILE", FILES)
    cap("RLIMIT_STACK", 64 * MB)
    cap("RLIMIT_MEMLOCK", 0)
    cap("RLIMIT_MSGQUEUE", 0)
    if sys.platform == "linux":
        cap("RLIMIT_AS", memory, memory + 64 * MB)
    if threads:
        cap("RLIMIT_NPROC", threads)


def drop_privileges() -> None:
    """No capabilities, and none to be gained."""
    call("capset", struct.pack("=II", 0x20080522, 0), bytes(24))
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl: no_new_privs")


# ---- run: one program of the model -----------------------------------------------------------------------

def confine(plan: dict, scratch: str) -> None:
    """Put every layer of the plan around this process. Order matters: each one may forbid setting up the others."""
    layers = plan["layers"]
    os.setsid()
    os.umask(0o077)
    if "namespaces" in layers:
        own_scratch(plan["drop_root"])
    elif plan["drop_root"]:
        leave_root()
    os.chdir(scratch)
    limits(plan["memory"], THREADS if "namespaces" in layers else None if "seccomp" in layers else 512)
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: gone with the zygote
        drop_privileges()
    if "landlock" in layers:
        landlock(plan["paths"], scratch, WRITE if "namespaces" in layers else FLAT)
    if "seccomp" in layers:
        seccomp()
    if "seatbelt" in layers:
        seatbelt(plan["paths"], scratch)


def seatbelt(paths: list[str], scratch: str) -> None:
    """macOS: its own sandbox. Not measured by this project."""
    readable = " ".join(f'(subpath "{p}")' for p in [*paths, scratch, "/System", "/usr/lib"])
    profile = ("(version 1)(deny default)(allow sysctl-read)(allow file-read-metadata)(allow signal (target self))"
               f'(allow file-read* {readable} (literal "/dev/urandom") (literal "/dev/null"))'
               f'(allow file-write* (subpath "{os.path.realpath(scratch)}") (literal "/dev/null"))')
    error = ctypes.c_char_p()
    if libc.sandbox_init(profile.encode(), ctypes.c_uint64(0), ctypes.byref(error)):
        raise OSError(1, f"sandbox_init: {error.value!r}")


def run_blocks(blocks: list[str], names: list[str]) -> None:
    """Run the blocks like cells of one notebook: one namespace, the value of a last bare expression shown."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"], space = module, module.__dict__
    for source, name in zip(blocks, names):
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = ast.parse(source, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), space)
            if value is not None and not source.rstrip().endswith(";"):
                space["_"] = value
                sys.stdout.write(repr(value) + "\n")


def describe(error: BaseException, names: list[str]) -> dict | None:
    """What went wrong as {"error": one line, "traceback": text}, with no frame but the program's own."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return None
    whole = traceback.TracebackException.from_exception(error, compact=True)
    line = where = None
    for frame in whole.stack:
        if frame.filename in names:
            line, where = frame.lineno, frame.filename
    if isinstance(error, SyntaxError) and error.filename in names:
        line, where = error.lineno, error.filename
    todo = [whole]
    while todo:
        part = todo.pop()
        part.stack = traceback.StackSummary.from_list([f for f in part.stack if f.filename in names])
        todo += [p for p in (part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())) if p]
    said = " ".join(list(whole.format_exception_only())[-1].split())
    place = f"line {line}" if len(names) == 1 else f"{where[1:-1]}, line {line}" if where else None
    said = cut(said, 1000) + (f" ({place})" if line else "")
    return {"error": said, "traceback": cut("".join(whole.format()), 8000)}


def cut(text: str, limit: int) -> str:
    """At most about `limit` characters, the middle replaced by a note."""
    if len(text) <= limit:
        return text
    return f"{text[:limit // 2]}\n[... {len(text) - limit // 2 * 2} characters cut ...]\n{text[-(limit // 2):]}"


def receive(fd: int) -> dict:
    data = bytearray()
    while len(data) < 4 or len(data) < 4 + struct.unpack("=I", data[:4])[0]:
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            os._exit(0)  # the supervisor is gone, or this spare run is not needed
        data += chunk
    return json.loads(data[4:])


def be_a_run(plan: dict, scratch: str, channel: int, out: int, err: int) -> None:
    """Confine this process, wait for code, run it, say what went wrong. Never returns."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd, number in ((channel, CHANNEL), (null, 0), (out, 1), (err, 2)):
        os.dup2(fd, number)
    os.closerange(3, CHANNEL)
    os.closerange(CHANNEL + 1, 65536)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    tempfile.tempdir = None
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    confine(plan, scratch)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    gc.enable()
    job = receive(CHANNEL)
    seconds = int(job["timeout"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    names = ["<code>"] if len(job["blocks"]) == 1 else [f"<block {i + 1}>" for i in range(len(job["blocks"]))]
    out, problem = sys.stdout, None
    try:
        run_blocks(job["blocks"], names)
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException as error:
        problem = error
    sys.settrace(None)
    sys.setprofile(None)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    report = None
    if problem is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        sys.setrecursionlimit(100_000)
        report = describe(problem, names)
    try:
        for stream in {id(s): s for s in (sys.stdout, out)}.values():
            stream.flush()
    except (OSError, ValueError, AttributeError):
        pass
    os.write(CHANNEL, job["token"].encode() + json.dumps(report).encode())
    os._exit(0)


# ---- zygote: forks runs ----------------------------------------------------------------------------------

def be_the_zygote(plan: dict, commands: socket.socket, proc: int | None) -> None:
    """Load the libraries, then obey: b"fork" is answered with a pid, a scratch folder and the run's three
    descriptors; "kill pid" with nothing; "reap pid" with its exit status and processor seconds. Never returns."""
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a run leaves behind comes here
    home = None
    if "namespaces" in plan["layers"]:
        home = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        os.close(proc)
    warm_up()
    commands.send(b"ready")
    scratch = {}
    while request := commands.recv(64):
        verb, _, pid = request.partition(b" ")
        if verb == b"fork":
            fork_run(plan, commands, home, scratch)
        elif verb == b"kill":
            kill(int(pid))
        else:
            commands.send(json.dumps(reap(int(pid), scratch.pop(int(pid)))).encode())
    os._exit(0)


def warm_up() -> None:
    """What model code imports, loaded once; and freed of the garbage collector, whose marks would unshare pages."""
    import contextlib
    for name in ("numpy", "sympy", "fractions", "decimal", "statistics", "datetime", "itertools", "functools", "math",
                 "cmath", "random", "re", "collections", "dataclasses", "typing", "string", "heapq", "bisect", "copy"):
        with contextlib.suppress(ImportError):
            __import__(name)
    sys.path[:] = ["", *[p for p in sys.path if p.endswith((".zip", "-packages", "lib-dynload")) or
                         p == os.path.dirname(os.__file__)]]
    gc.collect()
    gc.disable()
    gc.freeze()


def fork_run(plan: dict, commands: socket.socket, home: int | None, scratches: dict) -> None:
    ours, theirs = socket.socketpair()
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    scratch = "/tmp"
    if home is None:
        scratch = tempfile.mkdtemp(dir=plan["base"])
        if plan["drop_root"]:
            os.chown(scratch, NOBODY, NOBODY)
    else:
        call("setns", home, NEWPID)  # a process may leave its pid namespace for a new child once; go back first
        call("unshare", NEWPID)
    pid = os.fork()
    if pid == 0:
        try:
            be_a_run(plan, scratch, theirs.fileno(), out_end, err_end)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(70)
    scratches[pid] = scratch
    socket.send_fds(commands, [json.dumps([pid, scratch]).encode()], [ours.fileno(), out, err])
    for fd in (out, err, out_end, err_end):
        os.close(fd)
    ours.close()
    theirs.close()


def kill(pid: int) -> None:
    for end in (os.killpg, os.kill):
        try:
            end(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def reap(pid: int, scratch: str) -> list:
    """End a run for good: [exit code or minus the signal, processor seconds]."""
    kill(pid)
    _, status, used = os.wait4(pid, 0)
    if scratch != "/tmp":
        shutil.rmtree(scratch, ignore_errors=True)
    return [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]


# ---- supervisor: queue, clocks, outcomes -----------------------------------------------------------------

class Printed:
    """The first and the last bytes of a stream of any length."""

    def __init__(self, limit: int):
        self.half, self.total, self.head, self.tail = limit // 2, 0, b"", b""

    def add(self, chunk: bytes) -> None:
        self.total += len(chunk)
        room = self.half - len(self.head)
        self.head += chunk[:room]
        self.tail = (self.tail + chunk[room:])[-self.half:] if room < len(chunk) else self.tail

    def text(self) -> str:
        missing = self.total - len(self.head) - len(self.tail)
        if not missing:
            return (self.head + self.tail).decode("utf-8", "replace")
        head, tail = (part.decode("utf-8", "replace").strip("\ufffd") for part in (self.head, self.tail))
        return f"{head}\n[... {missing:,} bytes cut ...]\n{tail}"


class Run:
    """One forked process: spare until it gets a job."""

    def __init__(self, pid: int, scratch: str, fds: list[int], output: int):
        self.pid, self.scratch, self.fds = pid, scratch, fds
        self.job, self.started, self.deadline, self.why = None, 0.0, float("inf"), None
        self.out, self.err, self.said = Printed(output), Printed(4000), b""
        for fd in fds:
            os.set_blocking(fd, False)


class Supervisor:
    """Serves one caller over `caller` (messages of JSON, each after its length) until the caller hangs up."""

    def __init__(self, caller: socket.socket, zygote: socket.socket, plan: dict):
        self.caller, self.zygote, self.plan = caller, zygote, plan
        self.heard, self.to_say = bytearray(), bytearray()
        self.queue: collections.deque[dict] = collections.deque()
        self.spare: collections.deque[Run] = collections.deque()
        self.runs: dict[int, Run] = {}      # descriptor -> run
        self.busy: set[Run] = set()
        self.poll = select.poll()
        self.poll.register(caller, select.POLLIN)

    def serve(self) -> None:
        while True:
            self.refill()
            self.poll.modify(self.caller, select.POLLIN | (select.POLLOUT if self.to_say else 0))
            for fd, event in self.poll.poll(self.patience()):
                if fd == self.caller.fileno():
                    if event & select.POLLOUT:
                        del self.to_say[:self.caller.send(self.to_say)]
                    if event & ~select.POLLOUT and not self.listen():
                        return
                elif fd in self.runs:
                    self.hear(self.runs[fd], fd)
            self.check_clocks()

    def listen(self) -> bool:
        """Take the caller's jobs. False when it has hung up."""
        chunk = self.caller.recv(1 << 18)
        self.heard += chunk
        while len(self.heard) >= 4:
            end = 4 + struct.unpack("=I", self.heard[:4])[0]
            if len(self.heard) < end:
                break
            self.queue.append(json.loads(self.heard[4:end]))
            del self.heard[:end]
        self.dispatch()
        return bool(chunk)

    def say(self, message: dict) -> None:
        data = json.dumps(message).encode()
        self.to_say += struct.pack("=I", len(data)) + data

    def refill(self) -> None:
        """Keep a spare run per worker, so that a job never waits for a fork."""
        while len(self.spare) < self.plan["workers"]:
            self.zygote.send(b"fork")
            data, fds, _, _ = socket.recv_fds(self.zygote, 4096, 3)
            if not data:
                sys.exit("zygote gone")
            run = Run(*json.loads(data), fds, self.plan["output"])
            self.spare.append(run)
            self.dispatch()

    def dispatch(self) -> None:
        while self.queue and self.spare and len(self.busy) < self.plan["workers"]:
            run, run.job = self.spare.popleft(), self.queue.popleft()
            run.job["token"] = secrets.token_hex(16)
            data = json.dumps({k: run.job[k] for k in ("blocks", "timeout", "token")}).encode()
            run.started = time.monotonic()
            run.deadline = run.started + run.job["timeout"]
            self.busy.add(run)
            for fd in run.fds:
                self.runs[fd] = run
                self.poll.register(fd, select.POLLIN)
            os.set_blocking(run.fds[0], True)
            try:
                _write(run.fds[0], struct.pack("=I", len(data)) + data)
            except OSError:
                pass  # it died before it read its code: the end of its channel says so
            os.set_blocking(run.fds[0], False)

    def hear(self, run: Run, fd: int) -> None:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if fd == run.fds[0]:
            run.said = (run.said + chunk)[-REPORT_BYTES:]
            if not chunk:
                self.finish(run)
            return
        (run.out if fd == run.fds[1] else run.err).add(chunk)
        if not chunk:
            self.poll.unregister(fd)
        elif run.out.total > PRINTED_BYTES and not run.why:
            self.stop(run, f"OutputLimit: stopped after printing {PRINTED_BYTES // MB} MB")

    def stop(self, run: Run, why: str) -> None:
        run.why, run.deadline = why, time.monotonic() + 2
        self.zygote.send(b"kill %d" % run.pid)

    def patience(self) -> float | None:
        """Milliseconds until something must be looked at."""
        soonest = min((run.deadline for run in self.busy), default=float("inf"))
        if self.busy and "namespaces" not in self.plan["layers"]:
            soonest = min(soonest, time.monotonic() + 0.05)
        return None if soonest == float("inf") else max(0.0, soonest - time.monotonic()) * 1000 + 1

    def check_clocks(self) -> None:
        now = time.monotonic()
        for run in list(self.busy):
            if now >= run.deadline and run.why:
                self.finish(run)  # killed, and still holding its channel
            elif now >= run.deadline:
                self.stop(run, f"Timeout: stopped after {run.job['timeout']:g} seconds")
            elif "namespaces" not in self.plan["layers"] and not run.why and _size(run.scratch) > SCRATCH_BYTES:
                self.stop(run, f"DiskLimit: stopped after writing {SCRATCH_BYTES // MB} MB")

    def finish(self, run: Run) -> None:
        """Reap a run and tell the caller its outcome."""
        self.zygote.send(b"reap %d" % run.pid)
        reply = self.zygote.recv(4096)
        if not reply:
            sys.exit("zygote gone")
        code, cpu = json.loads(reply)
        seconds = time.monotonic() - run.started
        for fd in run.fds:
            self.drain(run, fd)
            try:
                self.poll.unregister(fd)
            except KeyError:
                pass
            del self.runs[fd]
            os.close(fd)
        self.busy.discard(run)
        self.say({"ticket": run.job["ticket"], "stdout": run.out.text(), "seconds": seconds,
                  **self.verdict(run, code, cpu)})
        self.dispatch()

    def drain(self, run: Run, fd: int) -> None:
        try:
            while chunk := os.read(fd, 1 << 16):
                if fd == run.fds[0]:
                    run.said = (run.said + chunk)[-REPORT_BYTES:]
                else:
                    (run.out if fd == run.fds[1] else run.err).add(chunk)
        except OSError:
            pass

    def verdict(self, run: Run, code: int, cpu: float) -> dict:
        """error, traceback and timed_out. What the kernel says of the process goes before what the process says."""
        used_up = cpu >= int(run.job["timeout"]) + 0.9 and code == -signal.SIGKILL
        if run.why or used_up:
            why = run.why or f"Timeout: stopped after {cpu:.1f} seconds of processor time"
            return {"error": why, "traceback": "", "timed_out": why.startswith("Timeout")}
        detail, _, body = run.said.partition(run.job["token"].encode())
        try:
            report = json.loads(body) if code == 0 else {}
        except ValueError:
            report = {}
        if report is None:
            return {"error": None, "traceback": "", "timed_out": False}
        if isinstance(report, dict) and all(isinstance(report.get(k), str) for k in ("error", "traceback")):
            return {"error": report["error"], "traceback": report["traceback"], "timed_out": False}
        if code < 0:
            error = f"Crash: the program was ended by {signal.Signals(-code).name}"
        else:
            error = f"Exit: the program ended itself with exit code {code} before its end"
        return {"error": error, "traceback": run.err.text(), "timed_out": False}


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data):]


def _size(folder: str) -> int:
    try:
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder))
    except OSError:
        return 0


# ---- start -----------------------------------------------------------------------------------------------

def attempt(action) -> str | None:
    """Try `action` in a throwaway child. None when it worked, else what the kernel said."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            os.write(sender, str(error).encode() or b"refused")
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(pid, 0)
    return said or (f"ended with status {status}" if status else None)


def _try_namespaces(paths: list[str]) -> None:
    drop_root = enter_namespaces(paths)
    said = attempt(lambda: own_scratch(drop_root))
    if said:
        raise OSError(said)


def find_layers(paths: list[str], plan: dict) -> None:
    """Fill in plan["layers"], plan["refused"] (layer -> why) and plan["drop_root"]."""
    tries = {"namespaces": lambda: _try_namespaces(paths),
             "seccomp": lambda: (drop_privileges(), seccomp()),
             "landlock": lambda: (drop_privileges(), landlock(paths, plan["base"], WRITE))}
    if sys.platform == "darwin":
        tries = {"seatbelt": lambda: seatbelt(paths, plan["base"])}
    plan["refused"] = {name: said for name, action in tries.items() if (said := attempt(action))}
    plan["layers"] = [name for name in tries if name not in plan["refused"]]
    open_to_all = all(os.stat(os.path.join("/", *p.split("/")[:i + 1])).st_mode & 5 == 5
                      for p in [*paths, plan["base"]] for i in range(1, p.count("/") + 1))
    plan["drop_root"] = os.geteuid() == 0 and open_to_all


def main() -> None:
    plan = json.loads(sys.argv[1])
    caller = socket.socket(fileno=plan["fd"])
    os.set_blocking(plan["fd"], True)
    plan["paths"] = paths = library_paths()
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")  # when memory runs out, this goes before the training does
    except OSError:
        pass
    find_layers(paths, plan)
    supervisor, zygote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    proc = None
    if "namespaces" in plan["layers"]:
        proc = os.open("/proc", O_PATH)
        plan["drop_root"] = enter_namespaces(paths)
    server = Supervisor(caller, supervisor, plan)
    server.say({"layers": plan["layers"], "refused": plan["refused"]})
    caller.sendall(server.to_say)
    server.to_say.clear()
    if os.fork() == 0:
        caller.close()
        supervisor.close()
        be_the_zygote(plan, zygote, proc)
    zygote.close()
    if proc is not None:
        os.close(proc)
    if supervisor.recv(16) == b"ready":
        server.serve()


if __name__ == "__main__":
    main()
