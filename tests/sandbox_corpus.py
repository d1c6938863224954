"""Programs for the sandbox: attacks, each of which prints BREACH (or leaves traces) when it gets out, and benign
programs with the output they must have. Used by test_sandbox.py and bench/sandbox.py.

`python sandbox_corpus.py` runs them all in a pool of its own and prints the counts as JSON.
"""
# ruff: noqa: E501  (a program stands on its line)

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

SECRET = "s3cret-" + "0123456789abcdef"

# ---- attacks: name -> program. A preamble gives them OUTSIDE, VICTIM, PORT, PARENT and `libc`. ------------

ATTACKS = {
    # files
    "read a file": "print('BREACH', open(OUTSIDE + '/secret').read())",
    "read a file by descriptor walk": """
        fd = os.open('/', os.O_RDONLY)
        for part in (OUTSIDE + '/secret').strip('/').split('/'):
            fd = os.open(part, os.O_RDONLY, dir_fd=fd)
        print('BREACH', os.read(fd, 100))""",
    "read /etc/passwd": "print('BREACH', open('/etc/passwd').read()[:20])",
    "read a file through a symlink": """
        os.symlink(OUTSIDE + '/secret', 'link'); print('BREACH', open('link').read())""",
    "read a file through a hard link": """
        os.link(OUTSIDE + '/secret', OUTSIDE + '/hard'); print('BREACH')""",
    "list a folder": "print('BREACH', os.listdir(OUTSIDE))",
    "map a file": "import mmap; print('BREACH', mmap.mmap(os.open(OUTSIDE + '/secret', 0), 0, prot=1)[:9])",
    "read the kernel log device": "print('BREACH', os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK))",
    "read the machine's identity": "print('BREACH', open('/proc/version').read())",
    "send a file": "os.sendfile(1, os.open(OUTSIDE + '/secret', 0), 0, 100); print('BREACH')",
    "make an unnamed file": "print('BREACH', os.open(OUTSIDE, os.O_TMPFILE | os.O_RDWR))",
    "write a file": "open(OUTSIDE + '/written', 'w').write('x'); print('BREACH')",
    "write to /tmp and come back": "open(SHARED, 'w').write('x'); print('BREACH') if VISIBLE else None",
    "overwrite a file": "open(OUTSIDE + '/secret', 'a').write('x'); print('BREACH')",
    "truncate a file": "os.truncate(OUTSIDE + '/spare', 0); print('BREACH')",
    "delete a file": "os.unlink(OUTSIDE + '/spare'); print('BREACH')",
    "rename a file": "os.rename(OUTSIDE + '/secret', OUTSIDE + '/secret'); print('BREACH')",
    "make a folder": "os.mkdir(OUTSIDE + '/made'); print('BREACH')",
    "change a mode": "os.chmod(OUTSIDE + '/secret', 0o666); print('BREACH')",
    "change a time": "os.utime(OUTSIDE + '/secret', (1, 1)); print('BREACH')",
    "change an owner": "os.chown(OUTSIDE + '/secret', os.getuid(), os.getgid()); print('BREACH')",
    "set an attribute": "os.setxattr(OUTSIDE + '/secret', 'user.x', b'1'); print('BREACH')",
    "make a named pipe": "os.mkfifo(OUTSIDE + '/pipe'); print('BREACH')",
    "write shared memory": "open('/dev/shm/slm-breach', 'w').write('x'); print('BREACH')",
    "change the interpreter": """
        import json.scanner as m
        with open(m.__file__, 'a'): print('BREACH')""",
    "leave a module for later": """
        import json
        name = os.path.dirname(json.__file__) + '/slm_breach.py'
        open(name, 'w').close(); os.unlink(name); print('BREACH')""",
    # the caller
    "read the environment": "print('BREACH' if SECRET_NAME in os.environ else '')",
    "read the parent's environment": "print('BREACH', open(f'/proc/{PARENT}/environ').read()[:1])",
    "read the parent's command": "print('BREACH', open(f'/proc/{PARENT}/cmdline').read()[:1])",
    "read the parent's memory": "print('BREACH', open(f'/proc/{PARENT}/mem', 'rb'))",
    "read my parents' environments": """
        pid = os.getppid()
        if pid: print('BREACH', open(f'/proc/{pid}/environ').read()[:1])""",
    "walk /proc for environments": """
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                if pid != str(os.getpid()) and open(f'/proc/{pid}/environ').read(1): print('BREACH', pid)
            except OSError: pass""",
    "use an inherited descriptor": """
        for fd in range(3, 256):
            try:
                if b's3cret' in os.pread(fd, 100, 0): print('BREACH', fd)
            except OSError: pass""",
    "find the secret in memory": """
        import gc
        if any(v in ('s3cret-0123456789abcdef', b's3cret-0123456789abcdef') for o in gc.get_objects()
               if type(o) in (dict, list) for v in (o if type(o) is list else list(o.values()))
               if type(v) in (str, bytes)): print('BREACH')""",
    "read the machine's name": "import platform; print('BREACH' if NODE in (platform.node(), os.uname().nodename) else '')",
    # processes
    "start a program": "import subprocess; print('BREACH', subprocess.run(['/bin/echo', 'hi'], capture_output=True))",
    "start a shell": "r = os.system('true'); print('BREACH') if r == 0 else None",
    "spawn": "import posix; posix.posix_spawn('/bin/true', ['true'], {}); print('BREACH')",
    "replace myself": "os.execv('/bin/echo', ['echo', 'BREACH'])",
    "fork": "import posix; posix.fork() or os._exit(0); print('BREACH')",
    "daemonise": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(30):
                    try: os.close(fd)
                    except OSError: pass
                open(OUTSIDE + '/daemon', 'w').close(); time.sleep(3); os._exit(0)
            os._exit(0)
        print('BREACH')""",
    "fork in numbers": """
        n = 0
        while n < 100:
            if os.fork() == 0: time.sleep(1); os._exit(0)
            n += 1
        print('BREACH')""",
    "multiprocessing": """
        import multiprocessing as m
        p = m.get_context('fork').Process(target=int); p.start(); print('BREACH')""",
    "signal a process": "os.kill(VICTIM, 0); print('BREACH')",
    "kill a process": "os.kill(VICTIM, 10); print('BREACH')",
    "kill the parent": "os.kill(PARENT, 0); print('BREACH')",
    "kill my parent": "pid = os.getppid(); os.kill(pid, 0); print('BREACH') if pid else None",
    "signal by pidfd": "fd = os.pidfd_open(VICTIM); import signal; signal.pidfd_send_signal(fd, 0); print('BREACH')",
    "queue a signal": "print('BREACH' if libc.sigqueue(VICTIM, 0, None) == 0 else '')",
    "signal by descriptor owner": """
        import fcntl
        r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, VICTIM); print('BREACH')""",
    "trace a process": "print('BREACH' if libc.ptrace(16, VICTIM, 0, 0) == 0 else '')",
    "read a process's memory": """
        import ctypes
        class IO(ctypes.Structure): _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]
        b = ctypes.create_string_buffer(8); mine = IO(ctypes.addressof(b), 8)
        start = int(open(f'/proc/{VICTIM}/maps').readline().split('-')[0], 16)
        print('BREACH' if libc.process_vm_readv(VICTIM, ctypes.byref(mine), 1, ctypes.byref(IO(start, 8)), 1, 0) > 0
              else '')""",
    "change another's limits": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CORE); print('BREACH')",
    "change another's priority": "os.setpriority(os.PRIO_PROCESS, VICTIM, 19); print('BREACH')",
    "pin another's processors": "os.sched_setaffinity(VICTIM, {0}); print('BREACH')",
    # network
    "connect by TCP": "import socket; socket.create_connection(('127.0.0.1', PORT), 2); print('BREACH')",
    "listen": "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print('BREACH')",
    "send by UDP": """
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)); print('BREACH')""",
    "connect by IPv6": "import socket; socket.socket(socket.AF_INET6).bind(('::', 0)); print('BREACH')",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); print('BREACH')",
    "connect to a unix socket": """
        import socket
        s = socket.socket(socket.AF_UNIX); s.connect(OUTSIDE + '/socket'); print('BREACH')""",
    "connect to an abstract unix socket": """
        import socket
        s = socket.socket(socket.AF_UNIX); s.connect('\\0slm-' + str(PORT)); print('BREACH')""",
    "reconnect a socket pair": """
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.connect(OUTSIDE + '/datagrams'); a.send(b'x'); print('BREACH')""",
    "send a descriptor away": """
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.sendto(b'x', OUTSIDE + '/datagrams'); print('BREACH')""",
    "make a unix socket": "import socket; socket.socket(socket.AF_UNIX).bind('s'); print('BREACH')",
    # the kernel
    "io_uring": "print('BREACH' if libc.syscall(425, 4, ctypes.create_string_buffer(256)) >= 0 else '')",
    "a file in memory": "print('BREACH', os.memfd_create('x'))",
    "userfaultfd": "print('BREACH' if libc.syscall(323, 1) >= 0 else '')",
    "a new namespace": "print('BREACH' if libc.unshare(0x10000000) == 0 else '')",
    "a key ring": "print('BREACH' if libc.syscall(250, 0, -3, 1) >= 0 else '')",
    "inotify": "print('BREACH' if libc.inotify_init() >= 0 else '')",
    "System V shared memory": "print('BREACH' if libc.shmget(0x51A, 4096, 0o1666) >= 0 else '')",
    "a message queue": "print('BREACH' if libc.msgget(0x51A, 0o1666) >= 0 else '')",
    "mount": "print('BREACH' if libc.unshare(0x10020000) == 0 or libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0 else '')",
    "change the personality": "print('BREACH' if libc.personality(0x0040000) >= 0 else '')",
    "file handles": """
        h = ctypes.create_string_buffer(136); h[0] = 128; m = ctypes.c_int()
        print('BREACH' if libc.name_to_handle_at(-100, b'/', h, ctypes.byref(m), 0) == 0 else '')""",
    "timers that signal": """
        t = ctypes.c_void_p(); print('BREACH' if libc.timer_create(0, 0, ctypes.byref(t)) == 0 else '')""",
    "calls of the 32-bit kernel": """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7); code.write(bytes.fromhex('b814000000cd80c3'))  # getpid by int 0x80
        pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        print('BREACH' if pid > 0 else '')""",
    # limits
    "take memory": "b = bytearray(1200 << 20); print('BREACH')",
    "take memory by numpy": "import numpy; b = numpy.empty(1 << 29); print('BREACH')",
    "take memory in pieces": "b = [bytearray(4 << 20) for _ in range(300)]; print('BREACH')",
    "map memory": "import mmap; mmap.mmap(-1, 4 << 30); print('BREACH')",
    "many threads": """
        import threading
        threading.stack_size(65536); e = threading.Event(); t = []
        try:
            for _ in range(600): t.append(threading.Thread(target=e.wait)); t[-1].start()
            print('BREACH')
        finally: e.set()""",
    "many open files": "f = [open('/dev/null') for _ in range(300)]; print('BREACH')",
    "a large file": """
        with open('big', 'wb') as f:
            for _ in range(100): f.write(bytes(1 << 20))
        os.unlink('big'); print('BREACH')""",
    "many files": """
        for n in range(20000): open(f'file{n}', 'w').close()
        print('BREACH')""",
    "raise a limit": """
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_CORE); resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
        print('BREACH')""",
}

# ---- benign: name -> (program or blocks, what it must print) ----------------------------------------------

BENIGN = {
    "print": ("print('hello', 2 + 2)", "hello 4\n"),
    "last expression": ("x = 20\nx * 2 + 2", "42\n"),
    "last expression is None": ("print(1)", "1\n"),
    "last string": ("'a' + \"b'\"", "\"ab'\"\n"),
    "semicolon silences": ("1 + 1;", ""),
    "only a comment": ("# nothing", ""),
    "empty": ("", ""),
    "recursion": ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nf(20)", "2432902008176640000\n"),
    "mutual recursion": ("def a(n): return n == 0 or b(n - 1)\ndef b(n): return n != 0 and a(n - 1)\na(10)", "True\n"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(20000)\ndef f(n): return n and 1 + f(n - 1)\nf(15000)", "15000\n"),
    "comprehension sees names": ("a = 3\nprint(sum(a * i for i in range(5)))\n[a + i for i in range(2)]", "30\n[3, 4]\n"),
    "nested functions": ("k = 2\ndef f(x):\n    def g(y): return k * y + x\n    return g(3)\nf(1)", "7\n"),
    "blocks share names": (["import math\na = 5", "def f(): return a + math.floor(1.5)", "f()"], "6\n"),
    "every block shows": (["1", "2"], "1\n2\n"),
    "class": ("class A:\n    n = 2\n    def m(self): return self.n ** 3\nA().m()", "8\n"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\nP(1)", "P(x=1, y=2)\n"),
    "enum and namedtuple": ("from enum import Enum\nfrom collections import namedtuple\nclass C(Enum):\n    R = 1\n"
                            "print(C.R, namedtuple('T', 'a b')(1, 2))", "C.R T(a=1, b=2)\n"),
    "generator": ("def g():\n    a, b = 0, 1\n    while True:\n        yield a\n        a, b = b, a + b\n"
                  "from itertools import islice\nlist(islice(g(), 10))", "[0, 1, 1, 2, 3, 5, 8, 13, 21, 34]\n"),
    "f-string": ("x = 3.14159\nprint(f'{x:.2f} {x!r:>8} {{}}')", "3.14  3.14159 {}\n"),
    "multi-line string": ('s = """a\n  b\n"""\nprint(s)', "a\n  b\n\n"),
    "unicode": ("π = 3\nprint('√2 ≈ 1.41 · 数学 · 🙂', π)", "√2 ≈ 1.41 · 数学 · 🙂 3\n"),
    "lone surrogate": ("print('\\ud800')", "\\ud800\n"),
    "input at end of file": ("try:\n    input('n? ')\nexcept EOFError:\n    print('EOF')", "n? EOF\n"),
    "stdin is empty": ("import sys\nsys.stdin.read()", "''\n"),
    "exceptions caught": ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    print(e)\nfinally:\n    print('end')",
                          "division by zero\nend\n"),
    "fractions": ("from fractions import Fraction as F\nF(1, 3) + F(1, 6)", "Fraction(1, 2)\n"),
    "decimal": ("from decimal import *\ngetcontext().prec = 30\nprint(Decimal(1) / 7)", "0.142857142857142857142857142857\n"),
    "itertools": ("from itertools import *\nlen(list(permutations(range(6), 3))), sum(1 for _ in combinations(range(10), 4))",
                  "(120, 210)\n"),
    "math": ("import math\nmath.comb(10, 3), math.gcd(12, 18), round(math.sqrt(2), 6)", "(120, 6, 1.414214)\n"),
    "cmath": ("import cmath\nabs(cmath.exp(1j * cmath.pi) + 1) < 1e-12", "True\n"),
    "statistics": ("import statistics as s\ns.mean([1, 2, 3, 4]), s.median([3, 1, 2])", "(2.5, 2)\n"),
    "datetime": ("from datetime import date, timedelta\nprint(date(2024, 2, 28) + timedelta(2), date(2024, 1, 1).strftime('%A'))",
                 "2024-03-01 Monday\n"),
    "calendar": ("import calendar\nprint(calendar.isleap(2000), *calendar.monthrange(2023, 2))", "True 2 28\n"),
    "random with a seed": ("import random\nrandom.seed(1)\nrandom.randint(1, 100), random.choice('abc')", "(18, 'c')\n"),
    "re": ("import re\nre.findall(r'\\d+', 'a1b22')", "['1', '22']\n"),
    "json": ("import json\njson.dumps({'a': [1, None]})", "'{\"a\": [1, null]}'\n"),
    "collections": ("from collections import *\nCounter('aab').most_common(1), deque([1, 2], 1)", "([('a', 2)], deque([2], maxlen=1))\n"),
    "heapq, bisect, functools": ("import heapq, bisect, functools\nheapq.nsmallest(2, [3, 1, 2]), bisect.bisect([1, 3], 2), "
                                 "functools.reduce(lambda a, b: a * b, range(1, 6))", "([1, 2], 1, 120)\n"),
    "lru_cache": ("from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n-1) + f(n-2)\nf(90)",
                  "2880067194370816120\n"),
    "threads": ("import threading\nr = []\nt = [threading.Thread(target=r.append, args=(i,)) for i in range(4)]\n"
                "[x.start() for x in t]; [x.join() for x in t]\nsorted(r)", "[0, 1, 2, 3]\n"),
    "thread pool": ("from concurrent.futures import ThreadPoolExecutor as T\nwith T(4) as p: print(list(p.map(abs, [-1, 2])))",
                    "[1, 2]\n"),
    "thread not joined": ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(.05), print('late'))).start()",
                          "late\n"),
    "thread pool of multiprocessing": ("from multiprocessing.pool import ThreadPool\nwith ThreadPool(2) as p: print(p.map(abs, [-1, 2]))", "[1, 2]\n"),
    "multiprocessing's queue": ("from multiprocessing import Queue, Lock\nq = Queue()\nq.put(1)\nwith Lock(): print(q.get())", "1\n"),
    "processes by threads": ("import multiprocessing as m\nfrom concurrent.futures import ProcessPoolExecutor as E\ndef f(x): return x * x\n"
                             "if __name__ == '__main__':\n    q = m.Queue()\n    p = m.Process(target=q.put, args=(5,))\n"
                             "    p.start(); p.join()\n    with m.Pool(2) as a, m.get_context('spawn').Pool() as b, E(2) as c:\n"
                             "        print(q.get(), a.map(f, [1, 2]), b.starmap(pow, [(2, 3)]), list(c.map(f, [4])))", "5 [1, 4] [8] [16]\n"),
    "asyncio": ("import asyncio\nasync def f(): await asyncio.sleep(.001); return 7\nasyncio.run(f())", "7\n"),
    "atexit": ("import atexit\natexit.register(print, 'bye')\nprint('hi')", "hi\nbye\n"),
    "exit": ("print(1)\nimport sys\nsys.exit()\nprint(2)", "1\n"),
    "alarm": ("import signal\nsignal.signal(signal.SIGALRM, lambda *a: print('ring'))\nsignal.setitimer(signal.ITIMER_REAL, .01)\n"
              "import time\ntime.sleep(.3)\nprint('on')", "ring\non\n"),
    "scratch file": ("with open('a.txt', 'w') as f: f.write('1 2')\nprint(open('a.txt').read().split())\n"
                     "import os; os.remove('a.txt'); os.listdir('.')", "['1', '2']\n[]\n"),
    "temporary file": ("import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x'); f.seek(0); print(f.read())", "x\n"),
    "copy a file": ("import shutil\nopen('a', 'w').write('1')\nshutil.copy('a', 'b')\nopen('b').read()", "'1'\n"),
    "StringIO and redirect": ("import io, contextlib\ns = io.StringIO()\nwith contextlib.redirect_stdout(s): print('in')\ns.getvalue()",
                              "'in\\n'\n"),
    "a notebook's commands": ("%matplotlib inline\n!pip install -q sympy\nimport math\nif True:\n    %time math.pi\n    print(math.sqrt(16))\n"
                              "pip install numpy\ns = '''\n%not one\n'''\nprint(s.strip(), 7\n% 4)", "4.0\n%not one 3\n"),
    "a byte order mark": ("\ufeffx = 5\nprint(x)", "5\n"),
    "without a line break": ("print(5, end='')", "5"),
    "write at the end": ("import sys\nsys.stdout.write('12')", "12"),
    "text of any script": ("print('é ∑ 🙂 中文')\nπ = 3\nprint(π)", "é ∑ 🙂 中文\n3\n"),
    "warnings": ("import sys, warnings\nwarnings.warn('careful')\nprint('no', file=sys.stderr)\nprint(1)", "1\n"),
    "an integer of 6,021 digits": ("import sys\nn = 10 ** 6020\nprint(len(str(n)), int('9' * 9999) % 7)", "6021 5\n"),
    "its own signal": ("import os, signal\nsignal.signal(signal.SIGUSR1, lambda *a: print('got'))\nos.kill(os.getpid(), signal.SIGUSR1)\n"
                       "os.kill(os.getpid(), 0)\nprint('on')", "got\non\n"),
    "large integer": ("n = 7 ** 6000\nlen(str(n))", "5071\n"),
    "primes": ("def p(n):\n    s = bytearray([1]) * n\n    s[:2] = b'\\0\\0'\n    for i in range(2, int(n ** .5) + 1):\n"
               "        if s[i]: s[i*i::i] = bytes(len(s[i*i::i]))\n    return sum(s)\np(200000)", "17984\n"),
    "main guard": ("def main(): print('main')\nif __name__ == '__main__': main()", "main\n"),
    "type hints and match": ("def f(x: int | str) -> str:\n    match x:\n        case int(): return 'i'\n        case _: return 's'\n"
                             "f(1) + f('')", "'is'\n"),
    "global statement": ("n = 0\ndef f():\n    global n\n    n += 1\nf(); f()\nn", "2\n"),
    "pickle a class": ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", "True\n"),
    "source of a function": ("import inspect\ndef f(): return 1\ninspect.getsource(f)", "'def f(): return 1\\n'\n"),
    "numpy": ("import numpy as np\nnp.linalg.det(np.array([[1., 2], [3, 4]])).round(6), np.arange(6).reshape(2, 3).sum(0)",
              "(np.float64(-2.0), array([3, 5, 7]))\n"),
    "numpy random": ("import numpy as np\nnp.random.seed(0)\nprint(np.random.randint(100), np.random.default_rng(1).integers(9))", "44 4\n"),
    "numpy matmul": ("import numpy as np\na = np.random.rand(300, 300)\nnp.allclose(a @ np.linalg.inv(a), np.eye(300), atol=1e-6)", "True\n"),
    "sympy solve": ("from sympy import *\nx = symbols('x')\nsolve(x**2 - 5*x + 6, x)", "[2, 3]\n"),
    "sympy print": ("import sympy as sp\nx = sp.Symbol('x')\nprint(sp.integrate(sp.sin(x)**2, (x, 0, sp.pi)), sp.factor(x**3 - 1))",
                    "pi/2 (x - 1)*(x**2 + x + 1)\n"),
    "sympy number theory": ("from sympy import *\nprime(100), totient(36), mod_inverse(3, 11), list(divisors(28))",
                            "(541, 12, 4, [1, 2, 4, 7, 14, 28])\n"),
    "sympy system": ("from sympy import *\na, b = symbols('a b')\nsolve([Eq(a + b, 10), Eq(a - b, 2)], [a, b])", "{a: 6, b: 4}\n"),
    "sympy simplify": ("from sympy import *\nsimplify(sqrt(8) + Rational(1, 2) * sqrt(2)), nsimplify('0.5')", "(5*sqrt(2)/2, 1/2)\n"),
}


# ---- the world the attacks want to reach -------------------------------------------------------------------

class World:
    """A secret file, a victim process, listeners. `preamble` tells a program where they are; `traces()` says
    what has happened to them."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="slm-world-")
        os.chmod(self.folder, 0o777)
        for name in ("secret", "spare"):
            with open(f"{self.folder}/{name}", "w") as file:
                file.write(SECRET)
            os.chmod(f"{self.folder}/{name}", 0o666)
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.listeners = [socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX),
                          socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)]
        self.listeners[0].bind(("127.0.0.1", 0))
        port = self.listeners[0].getsockname()[1]
        for at, address in zip(self.listeners[1:], (f"{self.folder}/socket", f"\0slm-{port}", f"{self.folder}/datagrams")):
            at.bind(address)
        for at in self.listeners[:3]:
            at.listen(50)
        for name in ("socket", "datagrams"):
            os.chmod(f"{self.folder}/{name}", 0o777)
        self.preamble = (
            "import ctypes, os, time\nlibc = ctypes.CDLL(None)\n"
            f"OUTSIDE, VICTIM, PORT, PARENT = {self.folder!r}, {self.victim.pid}, {port}, {os.getpid()}\n"
            f"SECRET_NAME, NODE = 'SLM_TEST_SECRET', {socket.gethostname()!r}\n"
            f"SHARED, VISIBLE = {self.folder!r} + '/shared', os.path.exists({self.folder!r})\n")

    def program(self, name: str) -> str:
        from textwrap import dedent
        return self.preamble + dedent(ATTACKS[name]).strip("\n")

    def traces(self) -> list[str]:
        found = []
        with contextlib.suppress(OSError), open(f"{self.folder}/secret") as file:
            if file.read() != SECRET:
                found.append("the secret file changed")
        found += sorted(set(os.listdir(self.folder)) ^ {"secret", "spare", "socket", "datagrams"})
        if self.victim.poll() is not None:
            found.append("the victim died")
        if os.path.exists("/dev/shm/slm-breach"):
            found.append("shared memory")
        return found

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for at in self.listeners:
            at.close()
        import shutil
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink("/dev/shm/slm-breach")


def run_all(sandbox) -> dict:
    """Every attack and every benign program in `sandbox`: what got out, what went wrong, seconds of the benign."""
    world = World()
    try:
        names = {sandbox.submit(world.program(name), 10): name for name in ATTACKS}
        names |= {sandbox.submit(code, 10): name for name, (code, _) in BENIGN.items()}
        breaches, wrong, seconds = [], {}, []
        while sandbox.pending:
            for ticket, outcome in sandbox.poll(1):
                name = names[ticket]
                if name in ATTACKS:
                    if "BREACH" in outcome.stdout or SECRET in outcome.stdout + (outcome.error or ""):
                        breaches.append(name)
                else:
                    seconds.append(outcome.seconds)
                    if (outcome.stdout, outcome.error) != (BENIGN[name][1], None):
                        wrong[name] = [outcome.stdout, outcome.error]
        time.sleep(0.4)
        return {"isolation": sandbox.isolation, "attacks": len(ATTACKS), "breaches": breaches + world.traces(),
                "benign": len(BENIGN), "wrong": wrong, "median ms": round(1000 * sorted(seconds)[len(seconds) // 2], 1)}
    finally:
        world.close()


def run_plain(code: str, timeout: float = 120.0, **kwargs) -> subprocess.CompletedProcess:
    """A program in a plain subprocess, as many projects do it."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, **kwargs)


# ---- other levels ------------------------------------------------------------------------------------------

def become_ordinary() -> None:
    """Root only: turn this process into an ordinary user who can reach this interpreter, and who has no other
    process: without namespaces the kernel counts the threads of all sandboxes of one user together."""
    folder = sys.base_prefix
    closed = next((p for p in _above(folder) if os.stat(p).st_mode & 5 != 5), None)
    if closed:  # show the interpreter alone, in a private view of the closed folder
        layers.call("unshare", layers.NEWNS)
        source = os.open(folder, os.O_PATH)
        layers.call("mount", b"none", b"/", None, layers.MS_REC | layers.MS_PRIVATE, None)
        layers.call("mount", b"view", closed.encode(), b"tmpfs", 0, b"mode=755")
        os.makedirs(folder, exist_ok=True)
        layers.call("mount", f"/proc/self/fd/{source}".encode(), folder.encode(), None, layers.MS_BIND, None)
        os.close(source)
    layers.NOBODY -= 1 + os.getpid() % 1000
    layers.leave_root(layers.NOBODY)


def _above(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/" + "/".join(parts[:i]) for i in range(1, len(parts) + 1)]


def refuse(names: list[str]) -> None:
    """Have the kernel answer these system calls with EPERM, in this process and all it starts."""
    import ctypes
    program = layers._op(layers.LOAD, 0)
    for name in names:
        program += layers._op(layers.EQUAL, layers.NUMBER[name], 0, 1) + layers._op(layers.RETURN, layers.REFUSE)
    program += layers._op(layers.RETURN, layers.ALLOW)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    layers.prctl(38, 1)
    layers.call("seccomp", 1, 0, ctypes.byref(Program(len(program) // 8, program)))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [os.path.dirname(here), os.path.join(os.path.dirname(here), "slm", "sandbox")]
    import layers

    from slm.sandbox import Sandbox
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    if options.get("ordinary") and os.geteuid() == 0:
        become_ordinary()
    if options.get("refuse"):
        refuse(options["refuse"])
    os.environ["SLM_TEST_SECRET"] = SECRET
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with Sandbox(require=options.get("require")) as sandbox:
        print(json.dumps({"uid": os.getuid(), **run_all(sandbox)}))
