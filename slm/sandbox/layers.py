"""The kernel's side of the sandbox: namespaces, Landlock, seccomp and limits, by system call through ctypes.

Each layer is a function that confines the calling process for good, or raises OSError where it is refused.
`confine` puts them around one run. Linux on x86_64 and aarch64; macOS has limits and a sandbox of its own,
which this project has not measured.
Sources: user_namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), seccomp(2), system call tables.
"""

import contextlib
import ctypes
import functools
import os
import resource
import signal
import socket
import struct
import sys

MB = 1 << 20
SCRATCH_BYTES, SCRATCH_FILES, THREADS, FILES = 64 * MB, 4096, 64, 128
NOBODY = 65534
RUN = 2  # a run's number in its pid namespace; without one it is never that small

# ---- system calls ----------------------------------------------------------------------------------------

# What a program may call without conditions: name, number on x86_64, number on aarch64 (- where it has none).
ALLOWED = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -,
select 23 -, sched_yield 24 124, mremap 25 216, msync 26 227, madvise 28 233, dup 32 23, dup2 33 -,
pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172,
sendfile 40 71, recvfrom 45 207, shutdown 48 210, exit 60 93, wait4 61 260, uname 63 160, flock 73 32,
fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents 78 -, getcwd 79 17, chdir 80 49, fchdir 81 50,
rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -, symlink 88 -, readlink 89 -,
umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153,
getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -,
getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43,
fstatfs 138 44, sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125,
sched_get_priority_min 147 126, setrlimit 160 164, gettid 186 178, time 201 -, futex 202 98,
sched_getaffinity 204 123, epoll_create 213 -, getdents64 217 61, set_tid_address 218 96,
restart_syscall 219 128, fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, waitid 247 95,
openat 257 56, mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, linkat 265 37,
symlinkat 266 36, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, get_robust_list 274 100, epoll_pwait 281 22, eventfd 284 -, fallocate 285 47,
eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70,
getcpu 309 168, renameat2 316 276, getrandom 318 278, membarrier 324 283, copy_file_range 326 285,
statx 332 291, rseq 334 293, close_range 436 436, faccessat2 439 439
"""
# Allowed where every file in sight is the program's own.
MODES = "chmod 90 -, fchmod 91 52, fchmodat 268 53, utimensat 280 88"
# Allowed under the conditions that `seccomp_filter` states, or used by this file only.
OTHERS = """
ioctl 16 29, socketpair 53 199, sendto 44 206, clone 56 220, kill 62 129, fcntl 72 25, capset 126 91,
prctl 157 167, tgkill 234 131, prlimit64 302 261, clone3 435 435, pivot_root 155 41, mount 165 40,
umount2 166 39, unshare 272 97, setns 308 268, seccomp 317 277, mount_setattr 442 442,
landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446
"""
MACHINE = os.uname().machine
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(MACHINE)


def _numbers(table: str) -> dict[str, int]:
    rows = (row.split() for row in table.replace("\n", " ").split(","))
    column = 2 if MACHINE == "aarch64" else 1
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


NUMBER = _numbers(",".join((ALLOWED, MODES, OTHERS)))
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> int:
    """One Linux system call; OSError with its name."""
    if sys.platform != "linux" or AUDIT_ARCH is None:
        raise OSError(38, f"no {name} on {sys.platform} {MACHINE}")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(NUMBER[name]), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


# ---- layer: namespaces -----------------------------------------------------------------------------------

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
O_PATH = getattr(os, "O_PATH", 0)
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]


def library_paths() -> list[str]:
    """The folders the interpreter itself reads: standard library, installed packages, shared libraries."""
    installed = [p for p in sys.path if p.endswith(("-packages", "lib-dynload"))]
    loaded: set[str] = set()
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            loaded = {os.path.dirname(line.split()[-1]) for line in maps if ".so" in line}
    folders = sorted({os.path.dirname(os.__file__), *installed, *loaded, "/usr/share/zoneinfo"}, key=len)
    kept: list[str] = []
    for folder in folders:
        if os.path.isdir(folder) and not any((folder + "/").startswith(k + "/") for k in kept):
            kept.append(folder)
    return kept


def scratch_folder(paths: list[str]) -> str:
    """Where a run's private folder goes in its namespace: /tmp, unless that would hide one of `paths`."""
    return "/scratch" if any((p + "/").startswith("/tmp/") for p in paths) else "/tmp"


def enter_namespaces(paths: list[str]) -> bool:
    """Leave this process without network, host name and System V objects, its later children in a pid
    namespace, and with a root folder that holds `paths` and four devices, all read-only. Anyone but root
    becomes the owner of a new user namespace for that. True when this is still root outside one."""
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    try:
        if still_root := uid == 0:
            call("unshare", flags)
    except PermissionError:
        still_root = False
    if not still_root:
        call("unshare", flags | NEWUSER)
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
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
    os.makedirs("/tmp" + scratch_folder(paths), exist_ok=True)
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


def own_scratch(drop_root: bool, scratch: str) -> None:
    """A mount namespace with an empty `scratch` in memory for this process alone; then no longer root, and in
    a user namespace of its own, so that its threads are counted apart from everyone else's."""
    uid, gid = (NOBODY, NOBODY) if drop_root else (os.geteuid(), os.getegid())
    call("unshare", NEWNS)
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700,uid={uid},gid={gid}"
    call("mount", b"scratch", scratch.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options.encode())
    if drop_root:
        leave_root()
    call("unshare", NEWUSER)


def leave_root(files_as: int = NOBODY) -> None:
    """Be nobody; `files_as` 0 keeps root's access to root's files, which is what its libraries may need."""
    os.setgroups([])
    os.setresgid(NOBODY, files_as, files_as)
    os.setresuid(NOBODY, files_as, files_as)


# ---- layer: Landlock -------------------------------------------------------------------------------------

# Bits of LANDLOCK_ACCESS_FS_*.
READ = 0b1100                              # READ_FILE, READ_DIR
WRITE = READ | 0b0111_0001_1011_0010       # and write, remove, make folders, files and links, move, truncate
FLAT = WRITE & ~0b0010_0000_1000_0000      # the same without folders


def landlock(paths: list[str], scratch: str, rights: int) -> None:
    """Only `paths` can be read and only `scratch` written from now on; no TCP, no abstract unix sockets and
    no signals to processes outside, as far as this kernel's version of Landlock knows them."""
    abi = call("landlock_create_ruleset", None, 0, 1)
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

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # errno 1 EPERM, 38 ENOSYS
IOCTLS = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # is it a terminal, its size, bytes waiting, flags
FCNTLS = [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030]        # duplicate, flags, locks; not owner, lease, size
STREAM_PAIR = [1 | close | wait for close in (0, 0o2000000) for wait in (0, 0o4000)]
CLONE_THREAD = 0x10000
ARGUMENT = range(16, 64, 8)  # where the low halves of a call's arguments stand


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _allow_if(checks: list[tuple[int, list[int]]]) -> bytes:
    """ALLOW when the word at each offset is one of its values, else REFUSE."""
    body = b""
    for offset, values in checks:
        body += _op(LOAD, offset)
        body += b"".join(_op(EQUAL, value, len(values) - i, 0) for i, value in enumerate(values))
        body += _op(RETURN, REFUSE)
    return body + _op(RETURN, ALLOW)


@functools.cache
def seccomp_filter(pid: int) -> bytes:
    """The allow-list as a BPF program over struct seccomp_data (number, architecture, instruction pointer,
    six arguments of 64 bits). Everything unnamed is refused with EPERM: new processes, exec, sockets,
    tracing, mounts, keys, io_uring, memory files, changes of owner, mode and time of files (those two are
    allowed to a run that has namespaces)."""
    rules = {
        "ioctl": _allow_if([(ARGUMENT[1], IOCTLS)]),
        "fcntl": _allow_if([(ARGUMENT[1], FCNTLS)]),
        "kill": _allow_if([(ARGUMENT[0], [pid])]),
        "tgkill": _allow_if([(ARGUMENT[0], [pid])]),
        "prlimit64": _allow_if([(ARGUMENT[0], [0, pid])]),
        "prctl": _allow_if([(ARGUMENT[0], [15, 16])]),                             # thread names
        "socketpair": _allow_if([(ARGUMENT[0], [1]), (ARGUMENT[1], STREAM_PAIR)]),  # asyncio needs one
        "sendto": _allow_if([(ARGUMENT[4], [0]), (ARGUMENT[4] + 4, [0])]),           # without an address
        "clone": _op(LOAD, ARGUMENT[0]) + _op(ANY_BIT, CLONE_THREAD, 1, 0) + _op(RETURN, REFUSE)
        + _op(RETURN, ALLOW),
        "clone3": _op(RETURN, UNKNOWN),                                            # then libc tries clone
    }
    program = _op(LOAD, 4) + _op(EQUAL, AUDIT_ARCH, 1, 0) + _op(RETURN, KILL) + _op(LOAD, 0)
    if MACHINE == "x86_64":
        program += _op(AT_LEAST, 0x40000000, 0, 1) + _op(RETURN, REFUSE)  # the numbers of x32
    for name, rule in rules.items():
        program += _op(EQUAL, NUMBER[name], 0, len(rule) // 8) + rule
    numbers = set(_numbers(f"{ALLOWED},{MODES}" if pid == RUN else ALLOWED).values())
    for number in range(max(numbers) + 2):  # a comparison wherever allowed turns to refused or back
        if (number in numbers) != (number - 1 in numbers):
            program += _op(AT_LEAST, number, 1, 0) + _op(RETURN, REFUSE if number in numbers else ALLOW)
    return program + _op(RETURN, REFUSE)


def seccomp() -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    code = seccomp_filter(os.getpid())
    call("seccomp", 1, 4, ctypes.byref(Program(len(code) // 8, code)))  # SET_MODE_FILTER, SPEC_ALLOW


# ---- layer: limits ---------------------------------------------------------------------------------------

def limits(memory: int, threads: int, file: int) -> None:
    """memory: bytes of address space; the report of a MemoryError may use 64 MB more. file: bytes of one."""
    def cap(what: str, soft: int, hard: int | None = None) -> None:
        top = resource.getrlimit(getattr(resource, what))[1]
        values = [v if top == resource.RLIM_INFINITY else min(v, top) for v in (soft, hard or soft)]
        resource.setrlimit(getattr(resource, what), tuple(values))

    cap("RLIMIT_CORE", 0)
    cap("RLIMIT_FSIZE", file)
    cap("RLIMIT_NOFILE", FILES)
    cap("RLIMIT_NPROC", threads)
    cap("RLIMIT_STACK", 64 * MB)
    if sys.platform == "linux":
        cap("RLIMIT_AS", memory, memory + 64 * MB)
        cap("RLIMIT_MEMLOCK", 0)
        cap("RLIMIT_MSGQUEUE", 0)


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def drop_privileges() -> None:
    """No capabilities, and none to be gained."""
    call("capset", struct.pack("=II", 0x20080522, 0), bytes(24))
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


# ---- all of them -----------------------------------------------------------------------------------------

def seatbelt(paths: list[str], scratch: str) -> None:
    """macOS: its own sandbox. UNMEASURED: written after its documentation, never run by this project."""
    readable = " ".join(f'(subpath "{p}")' for p in [*paths, "/System", "/usr/lib", "/dev/urandom"])
    scratch = os.path.realpath(scratch)
    profile = ("(version 1)(deny default)(allow sysctl-read)(allow file-read-metadata)"
               f'(allow signal (target self))(allow file-read* {readable})'
               f'(allow file-read* file-write* (literal "/dev/null") (subpath "{scratch}"))')
    error = ctypes.c_char_p()
    if libc.sandbox_init(profile.encode(), ctypes.c_uint64(0), ctypes.byref(error)):
        raise OSError(1, f"sandbox_init: {error.value!r}")


def confine(plan: dict, scratch: str) -> None:
    """Put every layer of the plan around this process. Each forbids setting up others, hence the order."""
    layers = plan["layers"]
    os.setsid()
    os.umask(0o077)
    if "namespaces" in layers:
        own_scratch(plan["drop_root"], scratch)
    elif os.geteuid() == 0:
        leave_root(0)
    os.chdir(scratch)
    limits(plan["memory"], plan["threads"], SCRATCH_BYTES if "namespaces" in layers else SCRATCH_BYTES // 8)
    if sys.platform == "linux":
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: gone with the zygote
        prctl(4, 0)               # PR_SET_DUMPABLE: no core dump, whoever the kernel hands those to
        drop_privileges()
    if "landlock" in layers:
        landlock(plan["paths"], scratch, WRITE if "namespaces" in layers else FLAT)
    if "seccomp" in layers:
        seccomp()
    if "seatbelt" in layers:
        seatbelt(plan["paths"], scratch)


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
    scratch = scratch_folder(paths)
    if said := attempt(lambda: (own_scratch(drop_root, scratch), [os.stat(path) for path in paths])):
        raise OSError(said)


def find_layers(plan: dict) -> None:
    """Fill in plan["paths"], plan["layers"], plan["refused"] (layer -> why) and plan["threads"]."""
    paths = plan["paths"] = library_paths()
    tries = {"namespaces": lambda: _try_namespaces(paths),
             "seccomp": lambda: (drop_privileges(), seccomp()),
             "landlock": lambda: (drop_privileges(), landlock(paths, paths[0], WRITE))}
    if sys.platform == "darwin":
        tries = {"seatbelt": lambda: seatbelt(paths, paths[0])}
    plan["refused"] = {name: said for name, action in tries.items() if (said := attempt(action))}
    plan["layers"] = [name for name in tries if name not in plan["refused"]]
    # The kernel counts a user's threads per user namespace; where runs have none, all the user's count.
    plan["threads"] = THREADS if "namespaces" in plan["layers"] else 4 * THREADS + tasks_now()


def tasks_now() -> int:
    """How many threads the user that runs will have is running already."""
    uid, count = os.geteuid() or NOBODY, 0
    for pid in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else []):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count
