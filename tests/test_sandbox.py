"""What slm/sandbox promises. Every attack is also shown to succeed in a plain subprocess (slow tier)."""
# ruff: noqa: E501  (a program stands on its line)

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import venv
from pathlib import Path

import pytest
from sandbox_corpus import ATTACKS, BENIGN, SECRET, World, run_plain

from slm import BadInput
from slm.sandbox import Sandbox, run_python

CORPUS = Path(__file__).with_name("sandbox_corpus.py")
ROOT = str(Path(__file__).parents[1])
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="layers of Linux")


@pytest.fixture(scope="module")
def pool():
    with Sandbox(memory=1 << 29) as box:
        yield box


@pytest.fixture(scope="module")
def full(pool):
    if not pool.isolation.startswith("full"):
        pytest.skip(f"this kernel grants {pool.isolation}")
    return pool


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setenv("SLM_TEST_SECRET", SECRET)
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    world = World()
    yield world
    world.close()
    signal.signal(signal.SIGUSR1, ignored)


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """processes() -> the processes of the sandboxes that this test starts, of no other test and no other program.
    A number alone says little: a busy machine gives it to another process within seconds."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda: processes_of(tmp_path)


def processes_of(folder: Path) -> set[int]:
    """The sandbox's processes, of whichever caller, whose scratch folders go into `folder`."""
    rows = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True).stdout.split("\n")
    return {int(row.split()[0]) for row in rows if "sandbox/child.py" in row and str(folder) in row}


def wait_for(condition):
    """Until it holds: a busy machine may take long, and only what never comes is a fault."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def parents(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


# ---- what holds ------------------------------------------------------------------------------------------

# Plain subprocesses can't do these on every machine (no root, no such device, a hardened kernel).
MAY_FAIL_PLAIN = {"read the kernel log device", "read the parent's memory", "write shared memory", "a new namespace",
                  "walk /proc for environments", "change another's priority", "take memory", "change the interpreter",
                  "trace a process", "read a process's memory", "leave a module for later", "io_uring", "mount",
                  "userfaultfd", "raise a limit", "set an attribute", "take memory in pieces", "many threads",
                  "fork in numbers", "connect by IPv6", "file handles", "calls of the 32-bit kernel", "take memory by numpy"}
WOULD_TAKE_SECONDS = {"take memory", "take memory in pieces"}


@LINUX
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails_here(name, full, world):
    outcome = full.run(world.program(name), 10)
    assert "BREACH" not in outcome.stdout and SECRET not in f"{outcome.stdout}{outcome.error}{outcome.traceback}"
    assert world.traces() == []


@LINUX
@pytest.mark.slow  # these do run, with all rights of the tests: not beside other work
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in WOULD_TAKE_SECONDS])
def test_the_same_attack_succeeds_in_a_plain_subprocess(name, world):
    fd = os.open(f"{world.folder}/secret", os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        plain = run_plain(world.program(name), 60, close_fds=False, cwd=world.folder)
        breached = "BREACH" in plain.stdout or bool(world.traces())
        assert breached or name in MAY_FAIL_PLAIN, plain.stderr[-500:]
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", BENIGN)
def test_benign_program_works(name, pool):
    code, expected = BENIGN[name]
    outcome = pool.run(code, 20)
    assert (outcome.stdout, outcome.error, outcome.timed_out) == (expected, None, False)


def at_level(**options) -> dict:
    done = subprocess.run([sys.executable, str(CORPUS), json.dumps(options)], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


@LINUX
@pytest.mark.parametrize("ordinary, refused, level", [
    (True, [], "full: namespaces+seccomp+landlock+limits"),
    (True, ["unshare"], "seccomp+landlock+limits"),
    pytest.param(False, ["unshare"], "seccomp+landlock+limits", marks=pytest.mark.slow),
    pytest.param(False, ["landlock_create_ruleset"], "namespaces+seccomp+limits", marks=pytest.mark.slow)])
def test_holds_for_an_ordinary_user_and_where_a_layer_is_refused(full, ordinary, refused, level):
    result = at_level(ordinary=ordinary, refuse=refused)
    if "namespaces" not in level:
        assert "PermissionError" in result["wrong"].pop("copy a file")[1], "modes: refused for all files or none"
        result["breaches"].remove("read the machine's name")
    assert (result["uid"] == 0) == (os.getuid() == 0 and not ordinary)
    assert result["isolation"] == level
    assert (result["breaches"], result["wrong"]) == ([], {})
    assert bool(refused) == ("this system refuses" in result["stderr"]), "a lower level is said loudly"


@LINUX
def test_limits_alone_are_named_and_full_can_be_demanded():
    lowest = textwrap.dedent("""
        import sys; sys.path[:0] = [sys.argv[1] + "/tests", sys.argv[1] + "/slm/sandbox", sys.argv[1]]
        import layers, sandbox_corpus
        sandbox_corpus.layers = layers
        sandbox_corpus.refuse(["unshare", "seccomp", "landlock_create_ruleset"])
        from slm.sandbox import Sandbox
        print(Sandbox().run("while 1: pass", 0.3))
        Sandbox(require="full")""")
    done = run_plain(lowest.replace("sys.argv[1]", repr(ROOT)), 60)
    assert "isolation='limits only'" in done.stdout and "timed_out=True" in done.stdout
    assert "limits only" in done.stderr
    assert re.search(r"BadInput: the sandbox was asked for its full level, and this system refuses namespaces",
                     done.stderr.strip().split("\n")[-1])


def test_windows_is_refused_with_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BadInput, match=r"^the sandbox runs on Linux and macOS, not on Windows"):
        Sandbox()


def test_bad_settings_are_named():
    for action in (lambda: Sandbox(require="most"), lambda: Sandbox().submit("1", 0),
                   lambda: Sandbox().submit("1", float("nan"))):
        with pytest.raises(BadInput):
            action()


ENDLESS = {
    "loop": "while True: pass",
    "one long C call": "10 ** 10 ** 8",
    "swallows everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignores signals": "import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n"
                       "    except (OSError, ValueError): pass\nsignal.pthread_sigmask(0, signal.valid_signals())\n"
                       "while True: signal.pause()",
    "sleeps": "import time\ntime.sleep(100)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "busy threads": "import threading\nfor _ in range(8): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
    "regular expression": "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
    "closes its output": "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
    "hangs in atexit": "import atexit, time\natexit.register(time.sleep, 100)",
    "hangs in its error": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "prints": "while True: print('x' * 1000)",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_nothing_outlives_its_time(name, pool):
    start = time.monotonic()
    outcome = pool.run(ENDLESS[name], 0.5)
    assert time.monotonic() - start < 60
    assert outcome.timed_out or outcome.error.startswith("OutputLimit")
    with pytest.raises(subprocess.TimeoutExpired):
        run_plain(ENDLESS[name], 0.6)


@pytest.mark.parametrize("name", ["SIGTSTP", "SIGTTIN", "SIGTTOU"])
def test_a_program_that_stops_itself_as_at_a_terminal_did_not_end(name, pool):
    """Without a terminal the kernel drops these three signals, and the program would go on as if nothing was."""
    outcome = pool.run(f"import os, signal\nos.kill(os.getpid(), signal.{name})\nprint(1)", 0.3)
    assert outcome.timed_out and not outcome.stdout


def test_processor_time_is_bounded_besides_the_clock(pool):
    # 8 threads in C code that releases the interpreter's lock: 5 seconds of clock, at most 2 of processor each run
    code = ("import hashlib, threading\nb = bytes(1 << 24)\n"
            "for _ in range(8): threading.Thread(target=lambda: [hashlib.sha256(b) for _ in range(10**6)]).start()")
    before = time.monotonic()
    outcome = pool.run(code, 1.0)
    assert outcome.timed_out and time.monotonic() - before < 60


def test_output_before_the_timeout_is_kept(pool):
    outcome = pool.run("print('so far')\nwhile True: pass", 1.5)
    assert outcome.stdout == "so far\n" and outcome.error == "Timeout: stopped after 1.5 seconds"


@LINUX
def test_nothing_persists_into_the_next_run(full):
    spoil = """
        import os, sys, builtins, math, sympy, random, tempfile
        open('left.txt', 'w').write('x')
        builtins.print = None; math.pi = 3; sympy.pi = 3; os.environ['LEFT'] = '1'; sys.path.append('/left')
        sys.modules['left'] = math; sympy.Symbol.left = 1; os.sched_getaffinity(0); random.seed(1)"""
    assert full.run(textwrap.dedent(spoil)).error is None
    look = """
        import os, sys, math, sympy
        print(os.listdir('.'), math.pi > 3.1, sympy.pi == 3, 'LEFT' in os.environ, '/left' in sys.path,
              'left' in sys.modules, hasattr(sympy.Symbol, 'left'))"""
    assert full.run(textwrap.dedent(look)).stdout == "[] True False False False False False\n"


def test_random_numbers_differ_between_runs(pool):
    code = "import random, numpy, uuid\nprint(random.random(), numpy.random.rand(), uuid.uuid4())"
    values = [pool.run(code).stdout.split() for _ in range(3)]
    assert len({v for row in values for v in row}) == 9


@LINUX
def test_one_run_never_finds_another_ones_code_or_output(full):
    marker = "needle" + "stack"
    tickets = [full.submit(f"x = '{marker}' * 1\nprint(x)") for _ in range(6)]
    hunt = """
        import ctypes, gc
        mark = 'needle' + str('stack')
        print(sum(mark in repr(o)[:10**5] for o in gc.get_objects() if type(o) in (dict, list, tuple, str, bytearray)
                  and o is not globals() and len(o) < 50))"""
    tickets.append(full.submit(textwrap.dedent(hunt), 30))
    outcomes = {}
    while full.pending:
        outcomes |= dict(full.poll(1))
    assert [outcomes[t].stdout for t in tickets[:6]] == [marker + "\n"] * 6
    assert outcomes[tickets[6]].stdout == "0\n"


@LINUX
def test_the_pool_processes_hold_no_secret_of_the_caller(full, monkeypatch, processes):
    if os.getuid():
        pytest.skip("reads the memory of other processes")
    monkeypatch.setenv("SLM_TEST_SECRET", SECRET)
    with Sandbox() as fresh:
        fresh.run("print('needle' + str('stack'))")
        fresh.submit("import time; time.sleep(300)", 300)
        wait_for(lambda: len(processes()) >= 8)  # supervisor, zygote, the run and two spares, each with a first process
        for pid in processes():
            assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
            found = {needle: scan(pid, needle) for needle in (SECRET.encode(), b"needlestack")}
            # the supervisor passes outcomes on; the process that runs are copied from never sees one
            assert not found[SECRET.encode()]
            assert not found[b"needlestack"] or parents(pid) == os.getpid()
    assert scan(os.getpid(), SECRET.encode())


def scan(pid: int, needle: bytes) -> bool:
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, mode = line.split()[:2]
            if mode.startswith("rw"):
                start, end = (int(x, 16) for x in span.split("-"))
                memory.seek(start)
                try:
                    if needle in memory.read(end - start):
                        return True
                except OSError:
                    pass
    return False


FORGERIES = {
    "prints a report": "print('{\"error\": null, \"traceback\": \"\"}')",
    "writes to every descriptor": """
        import os
        for fd in range(3, 256):
            for text in (b'null', b'{"error": null}', b'{"error": null, "traceback": "", "timed_out": false}\\n'):
                try: os.write(fd, text)
                except OSError: pass""",
    "patches the reporter's modules": """
        import json, traceback, os, linecache, sys
        json.dumps = lambda *a, **k: 'null'
        json.JSONEncoder.default = json.JSONEncoder.encode = lambda *a: 'null'
        traceback.walk_tb = lambda *a: iter(())""",
    "traces the reporter": """
        import sys, threading
        def trace(frame, event, arg): raise KeyError
        sys.setprofile(trace)""",
    "alarms in the reporter": """
        import signal
        def ring(*a): raise KeyError
        signal.signal(signal.SIGALRM, ring); signal.setitimer(signal.ITIMER_REAL, .0005, .0005)""",
    "replaces the streams": "import sys, io\nsys.stdout = sys.stderr = sys.__stdout__ = io.StringIO()",
    "leaves by atexit": "import atexit, os\natexit.register(os._exit, 0)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_an_error_cant_be_made_to_look_like_success(name, pool):
    code = textwrap.dedent(FORGERIES[name]).strip() + "\nraise ValueError('the truth')"
    outcome = pool.run(code)
    assert outcome.error and not outcome.timed_out
    # where the result is the last line of the output, the first of these is believed
    if name == "prints a report":
        assert json.loads(run_plain(FORGERIES[name]).stdout)["error"] is None


def test_a_forged_report_cant_undo_a_kill_or_a_timeout(pool):
    forge = """
        import gc, os, sys
        frame, token = sys._getframe(), None
        while frame:
            token = token or frame.f_locals.get('job', {}).get('token')
            frame = frame.f_back
        if token:
            os.write(200, token.encode() + b'null')
        """
    outcome = pool.run(textwrap.dedent(forge) + "while True: pass", 0.5)
    assert outcome.timed_out and outcome.error.startswith("Timeout")
    outcome = pool.run(textwrap.dedent(forge).replace("b'null'", "b'[' * 60000") + "os._exit(0)")
    assert outcome.error == "Crash: the program left with exit code 0 before its end"
    outcome = pool.run(textwrap.dedent(forge) + "import ctypes\nctypes.string_at(0)")
    assert outcome.error == "Crash: the program died of SIGSEGV"


CRASHES = {
    "os._exit": ("import os\nos._exit(0)", "Crash: the program left with exit code 0 before its end"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "Crash: the program died of SIGSEGV"),
    "deep C recursion": ("import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n): return getattr(s, n)\n"
                         "A().x", None),
    "deep recursion": ("def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded (line 1)"),
    "closes everything": ("import os\nos.closerange(0, 1000)\nraise ValueError", None),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 25))", "MemoryError (line 2)"),
    "memory, small pieces": ("x = []\nwhile True: x.append([x] * 100000)", "MemoryError (line 2)"),
    "kills itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "Crash: the program died of SIGKILL"),
    "ends itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", "Crash: the program died of SIGTERM"),
    "raises a signal": ("import signal\nsignal.raise_signal(signal.SIGUSR1)", "Crash: the program died of SIGUSR1"),
    "ends its thread": ("import signal, threading\nsignal.pthread_kill(threading.get_ident(), signal.SIGTERM)", "Crash: the program died of SIGTERM"),
    "its alarm": ("import signal, time\nsignal.setitimer(signal.ITIMER_REAL, .01)\ntime.sleep(9)", "Crash: the program died of SIGALRM"),
    "os.abort": ("import os\nos.abort()", "Crash: the program died of SIGABRT"),
    "kills its group": ("import os, signal\nos.kill(0, signal.SIGKILL)",
                        "PermissionError: [Errno 1] Operation not permitted: no other process and no network here (line 2)"),
    "another process": ("import subprocess\nsubprocess.run('ls')",
                        "PermissionError: [Errno 1] Operation not permitted: no other process and no network here (line 2)"),
    "the network": ("import socket\nsocket.socket()",
                    "PermissionError: [Errno 1] Operation not permitted: no other process and no network here (line 2)"),
    "smart quotes": ("print(“a”)", "SyntaxError: invalid character '“' (U+201C) (line 1)"),
    "a Unicode minus": ("x = 5 − 3", "SyntaxError: invalid character '−' (U+2212) (line 1)"),
    "input": ("n = int(input('n: '))", "EOFError: EOF when reading a line (line 1)"),
    "exit with words": ("import sys\nsys.exit('no solution')", "SystemExit: no solution (line 2)"),
    "await": ("async def f(): pass\nawait f()", "SyntaxError: 'await' outside function (line 2)"),
    "no such library": ("from IPython.display import display", "ModuleNotFoundError: No module named 'IPython' (line 1)"),
    "a library after pip": ("!pip install scipi\nimport scipi", "ModuleNotFoundError: No module named 'scipi' (line 2)"),
    "an error beside a command": ("%matplotlib inline\nx = = 1", "SyntaxError: invalid syntax (line 2)"),
    "odd exit": ("raise SystemExit(3)", "SystemExit: 3 (line 1)"),
    "not an Exception": ("raise KeyboardInterrupt('x')", "KeyboardInterrupt: x (line 1)"),
    "a broken error": ("class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E", "E: <exception str() failed> (line 3)"),
    "a broken repr": ("class A:\n    def __repr__(self): return 1\nA()", "TypeError: __repr__ returned non-string (type int) (line 3)"),
    "null byte": ("x = 1\0", None),
    "surrogate in the code": ("x = '\ud800'", None),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_an_outcome(name, pool):
    code, error = CRASHES[name]
    outcome = pool.run(code, 20)
    assert outcome.error == error if error else outcome.error
    assert pool.run("1 + 1").stdout == "2\n"


# ---- what a program is told ------------------------------------------------------------------------------

def test_errors_have_the_line_of_the_models_code(pool):
    outcome = pool.run("def f(x):\n    return 1 / x\n\nprint('before')\nf(0)")
    assert outcome.stdout == "before\n"
    assert outcome.error == "ZeroDivisionError: division by zero (line 2)"
    assert outcome.traceback == ("Traceback (most recent call last):\n  File \"<code>\", line 5, in <module>\n    f(0)\n"
                                 "  File \"<code>\", line 2, in f\n    return 1 / x\n"
                                 "ZeroDivisionError: division by zero\n")


def test_errors_in_libraries_show_only_the_models_frames(pool):
    outcome = pool.run("import sympy\n\nsympy.sympify('1 +')")
    assert outcome.error.startswith("SympifyError") or "SyntaxError" in outcome.error
    assert outcome.error.endswith("(line 3)")
    assert set(re.findall(r'File "(.*?)"', outcome.traceback)) <= {"<code>", "<string>"}
    assert "sandbox" not in outcome.traceback and "site-packages" not in outcome.traceback


def test_chained_and_grouped_errors_show_only_the_models_frames(pool):
    code = ("import json\ntry:\n    json.loads('x')\nexcept ValueError as e:\n    raise KeyError('no') from e")
    outcome = pool.run(code)
    assert outcome.error == "KeyError: 'no' (line 5)" and "JSONDecodeError" in outcome.traceback
    assert set(re.findall(r'File "(.*?)"', outcome.traceback)) == {"<code>"}
    outcome = pool.run("raise ExceptionGroup('g', [ValueError(1), TypeError(2)])")
    assert "ValueError: 1" in outcome.traceback and outcome.error.startswith("ExceptionGroup: g")


def test_the_block_of_an_error_is_named_and_later_blocks_are_left_out(pool):
    outcome = pool.run(["x = 1", "x\ny", "print('never')"])
    assert outcome.stdout == "" and outcome.error == "NameError: name 'y' is not defined (block 2, line 2)"


def test_syntax_errors_have_their_line(pool):
    outcome = pool.run(["print('first runs')", "a = 1\nb = = 2"])
    assert outcome.stdout == "first runs\n" and outcome.error == "SyntaxError: invalid syntax (block 2, line 2)"
    assert "b = = 2" in outcome.traceback


def test_long_output_is_cut_in_the_middle_with_a_note(pool):
    outcome = pool.run("print('start' + 'x' * 10**6 + 'end')")
    assert len(outcome.stdout) < 10_100 and outcome.error is None
    assert outcome.stdout.startswith("startxx") and outcome.stdout.endswith("xxend\n")
    assert "\n[... 990,009 bytes cut ...]\n" in outcome.stdout
    outcome = pool.run("print('é' * 10**5)")
    assert "\ufffd" not in outcome.stdout and "bytes cut" in outcome.stdout


def test_output_is_bounded_on_the_way(pool):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = pool.run("s = 'x' * 10**6\nfor _ in range(300): print(s)", 60)
    assert outcome.error == "OutputLimit: stopped after writing 64 MB" and len(outcome.stdout) < 10_100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    assert len(run_plain("print('x' * 10**8)").stdout) > 10**8 - 1


def test_long_errors_are_cut(pool):
    outcome = pool.run("raise ValueError('x' * 10**6)")
    assert len(outcome.error) < 1200 and len(outcome.traceback) < 9000 and "characters cut" in outcome.error
    assert pool.run("raise ValueError('🙂' * 10**5)").error.startswith("ValueError: 🙂🙂")


def test_numerical_libraries_use_one_thread(pool):
    code = "import numpy, time\na = numpy.ones((900, 900))\nw, p = time.monotonic(), time.process_time()\n" \
           "for _ in range(5): a @ a\nprint((time.process_time() - p) / (time.monotonic() - w) < 1.2)"
    assert pool.run(code, 60).stdout == "True\n"


def test_a_plot_is_drawn_into_a_file_and_shown_nowhere(full):
    code = ("import os\nimport matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([1, 2], [3, 4], label='$x^2$')\n"
            "ax.legend()\nplt.savefig('a.png')\nplt.show()\nprint(os.path.getsize('a.png') > 999)")
    outcome = full.run(code, 60)
    assert (outcome.stdout, outcome.error) == ("True\n", None)


# ---- the pool --------------------------------------------------------------------------------------------

def test_nothing_starts_before_the_first_use(processes):
    box = Sandbox()
    assert not processes()
    box.run("1")
    assert len(processes()) >= 2
    box.close()
    wait_for(lambda: not processes())
    heavy = run_plain("import sys, slm.sandbox\nprint({'numpy', 'sympy', 'torch'} & set(sys.modules))", cwd=ROOT)
    assert heavy.stdout == "set()\n"


def test_run_python_in_several_threads():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as threads:
        assert [o.stdout for o in threads.map(lambda i: run_python(f"{i} + 1"), range(8))] == [f"{i + 1}\n" for i in range(8)]


def test_200_submissions_at_once(pool):
    tickets = {pool.submit(f"print({i})"): i for i in range(200)}
    assert pool.pending == 200
    outcomes = {}
    while pool.pending:
        outcomes |= dict(pool.poll(1))
    assert {t: o.stdout for t, o in outcomes.items()} == {t: f"{i}\n" for t, i in tickets.items()}


def test_workers_run_side_by_side(pool):
    for _ in range(2):
        pool.submit("import time\nprint(time.monotonic())\ntime.sleep(1)\nprint(time.monotonic())", 60)
    times = []
    while pool.pending:
        times += [tuple(map(float, outcome.stdout.split())) for _, outcome in pool.poll(1)]
    (start, end), (other_start, other_end) = times
    assert start < other_end and other_start < end


def test_large_programs_go_through(pool):
    assert pool.run(f"s = '{'x' * 3_000_000}'\nlen(s)", 60).stdout == "3000000\n"
    assert pool.run("#" * (5 << 20)).error.startswith("SizeLimit")


def test_a_folder_is_measured_though_files_vanish_from_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(f"{ROOT}/slm/sandbox")
    import child
    for i in range(10):
        (tmp_path / f"{i}").write_bytes(bytes(1 << 20))
    entries = sorted(os.scandir(tmp_path), key=lambda entry: entry.name)
    (tmp_path / "0").unlink()
    monkeypatch.setattr(child.os, "scandir", lambda folder: entries)
    assert child.folder_size(str(tmp_path)) >= 9 << 20


@LINUX
def test_a_killed_run_is_an_outcome_and_a_killed_pool_is_replaced(full, processes):
    with Sandbox() as box:
        box.run("1")
        for victim in ("run", "zygote", "supervisor"):
            tickets = [box.submit(f"import time; time.sleep(0.5); print({i})", 60) for i in range(4)]
            supervisor = box._pool.process.pid
            zygote, = (p for p in processes() if parents(p) == supervisor)
            run = next(p for p in sorted(processes()) if parents(p) == zygote)  # spare or not
            os.kill({"run": run, "zygote": zygote, "supervisor": supervisor}[victim], signal.SIGKILL)
            outcomes = {}
            while box.pending:
                outcomes |= dict(box.poll(1))
            assert sorted(outcomes) == tickets
            good = [outcomes[t].stdout == f"{i}\n" for i, t in enumerate(tickets)]
            assert sum(good) >= (3 if victim == "run" else 4), outcomes
    wait_for(lambda: not processes())


def test_ctrl_c_in_the_middle_loses_nothing():
    with Sandbox() as box:
        tickets = [box.submit(f"import time; time.sleep(0.2); print({i})", 60) for i in range(5)]
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        outcomes = {}
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            while box.pending:
                outcomes |= dict(box.poll(1))
        while box.pending:
            outcomes |= dict(box.poll(1))
    assert [outcomes[t].stdout for t in tickets] == [f"{i}\n" for i in range(5)]


@LINUX
@pytest.mark.parametrize("end", [pytest.param("exit", marks=pytest.mark.slow), "SIGINT", "SIGKILL"])
def test_nothing_is_left_however_the_caller_ends(end, tmp_path):
    script = ("import sys\nfrom slm.sandbox import Sandbox\nbox = Sandbox()\nbox.run('1')\n"
              "for _ in range(3): box.submit('import time; time.sleep(600)', 600)\n"
              "print('ready', flush=True)\nsys.stdin.readline()")
    caller = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                              stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True)
    assert caller.stdout.readline() == b"ready\n" and len(processes_of(tmp_path)) >= 3
    if end != "exit":
        os.killpg(caller.pid, getattr(signal, end))  # the whole foreground group, as a terminal does
    caller.communicate()  # where it still runs, this ends its readline
    wait_for(lambda: not processes_of(tmp_path))
    assert os.listdir(tmp_path) == []


@LINUX
@pytest.mark.parametrize("refused", [[], ["unshare"]])
def test_nothing_is_left_when_the_caller_dies_as_it_starts(refused, tmp_path):
    script = (f"import sys; sys.path[:0] = {[ROOT, ROOT + '/tests', ROOT + '/slm/sandbox']!r}\n"
              "import layers, sandbox_corpus as corpus\ncorpus.layers = layers\n"
              f"corpus.refuse({refused!r})\nimport slm.sandbox\nprint(flush=True)\nslm.sandbox.Sandbox().run('1')")
    for delay in 0.02, 0.15, 0.5:
        caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                  env={**os.environ, "TMPDIR": str(tmp_path)})
        caller.stdout.readline()
        time.sleep(delay)
        caller.kill()
        caller.communicate()
    wait_for(lambda: not processes_of(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_fork_of_the_caller_gets_a_pool_of_its_own(pool):
    pool.run("1")
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writer, pool.run("6 * 7").stdout.encode())
        pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 10) == b"42\n" and pool.run("2").stdout == "2\n"
    os.close(reader), os.close(writer)


def test_a_checkout_under_tmp_runs_as_any_other():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        script = ("import json, os\nfrom slm.sandbox import run_python\n"
                  "outcome = run_python('import os; open(\"x\", \"w\"); os.getcwd()')\n"
                  "print(json.dumps([outcome.stdout, outcome.error, outcome.isolation]))")
        ran = subprocess.run([f"{folder}/bin/python", "-c", script], cwd=ROOT, capture_output=True, text=True)
    said, error, isolation = json.loads(ran.stdout)
    assert error is None, error
    if isolation.startswith("full"):
        assert said == "'/scratch'\n"


def test_a_pool_that_cant_start_runs_is_our_bug_and_says_why(tmp_path):
    shutil.copytree(Path(ROOT) / "slm" / "sandbox", tmp_path / "slm" / "sandbox")
    shutil.copy(Path(ROOT) / "slm" / "__init__.py", tmp_path / "slm")
    with open(tmp_path / "slm" / "sandbox" / "layers.py", "a") as file:
        file.write("\ndef confine(plan, scratch):\n    raise OSError('no such layer today')\n")
    ran = subprocess.run([sys.executable, "-c", "from slm.sandbox import run_python; run_python('1')"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert "the sandbox is broken: runs die before they start" in ran.stderr
    assert "OSError: no such layer today" in ran.stderr and ran.returncode == 1


# ---- the filter ------------------------------------------------------------------------------------------

def layers_for(machine: str):
    """layers.py as it would be loaded on `machine`."""
    spec = importlib.util.spec_from_file_location(f"layers_{machine}", f"{ROOT}/slm/sandbox/layers.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "uname", lambda: types.SimpleNamespace(machine=machine))
        spec.loader.exec_module(module)
    return module


def decide(program: bytes, number: int, arch: int, args: list[int]) -> int:
    """A BPF interpreter for the instructions the filter uses, written after the kernel's documentation."""
    import struct
    data = struct.pack("=IIQ6Q", number, arch, 0, *[a % 2**64 for a in args])
    pc, acc = 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, 8 * pc)
        pc += 1
        if code == 0x06:
            return value
        if code == 0x20:
            acc = struct.unpack_from("=I", data, value)[0]
        else:
            true = {0x15: acc == value, 0x35: acc >= value, 0x45: bool(acc & value)}[code]
            pc += yes if true else no


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine):
    layers = layers_for(machine)
    program, allowed = layers.seccomp_filter(7), set(layers._numbers(layers.ALLOWED).values())
    first, files = layers.seccomp_filter(layers.RUN), set(layers._numbers(layers.MODES).values())
    asked = {"ioctl", "fcntl", "kill", "tgkill", "prlimit64", "prctl", "socketpair", "sendto", "clone", "clone3"}
    for number in set(range(1000)) - {layers.NUMBER[name] for name in asked}:
        verdict = decide(program, number, layers.AUDIT_ARCH, [0] * 6)
        assert verdict == (layers.ALLOW if number in allowed else layers.REFUSE), number
        verdict = decide(first, number, layers.AUDIT_ARCH, [0] * 6)
        assert verdict == (layers.ALLOW if number in allowed | files else layers.REFUSE), number
    assert decide(program, 0, layers.AUDIT_ARCH ^ 1, [0] * 6) == layers.KILL
    if machine == "x86_64":
        assert decide(program, 0x40000000, layers.AUDIT_ARCH, [0] * 6) == layers.REFUSE
    yes, no = layers.ALLOW, layers.REFUSE
    for name, args, verdict in [
            ("clone", [0x3D0F00], yes), ("clone", [17], no), ("clone", [0x4111], no), ("clone3", [0, 88], layers.UNKNOWN),
            ("kill", [7, 9], yes), ("kill", [0, 9], no), ("kill", [-1, 9], no), ("kill", [2, 9], no), ("tgkill", [5, 5], no),
            ("fcntl", [3, 8], no), ("fcntl", [3, 1030], yes), ("ioctl", [0, 0x5412], no), ("ioctl", [0, 0x5401], yes),
            ("socketpair", [1, 0o2000001], yes), ("socketpair", [1, 2], no), ("socketpair", [16, 1], no),
            ("sendto", [3, 4096, 1, 0, 0], yes), ("sendto", [3, 4096, 1, 0, 4096], no), ("sendto", [3, 0, 1, 0, 1 << 32], no),
            ("prctl", [15], yes), ("prctl", [1, 0], no), ("prlimit64", [0], yes), ("prlimit64", [77], no)]:
        assert decide(program, layers.NUMBER[name], layers.AUDIT_ARCH, args + [0] * (6 - len(args))) == verdict, (name, args)


@pytest.mark.parametrize("machine", HEADERS)
def test_system_call_numbers_are_the_kernels(machine):
    if not os.path.exists(HEADERS[machine]):
        pytest.skip("no kernel headers here")
    text = Path(HEADERS[machine]).read_text()
    kernel = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    kernel["newfstatat"] = kernel.get("newfstatat", kernel.get("fstatat"))
    for name, number in layers_for(machine).NUMBER.items():
        assert kernel[name] == number, name


# ---- long ------------------------------------------------------------------------------------------------

def rss(box: Sandbox) -> dict[int, int]:
    """Kilobytes of memory of the pool's two lasting processes."""
    supervisor = box._pool.process.pid
    zygote = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text())
    return {p: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{p}/status").read_text())[1]) for p in (supervisor, zygote)}


@pytest.mark.slow
def test_memory_stays_flat_over_10_000_runs(full):
    with Sandbox() as box:
        def many(n):
            for _ in range(n // 100):
                for i in range(100):
                    box.submit(f"x = list(range({i}))\nprint(sum(x))")
                while box.pending:
                    assert all(o.error is None for _, o in box.poll(1))
        many(1000)
        before, mine = rss(box), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        many(9000)
        after = rss(box)
        print(before, after)
        assert all(after[p] - before[p] < 2000 for p in before)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mine < 4000


@pytest.mark.slow
def test_1_000_timeouts_in_a_row(full):
    with Sandbox(workers=4) as box:
        box.run("1")
        tickets = {box.submit("while True: pass", 0.1) for _ in range(1000)}
        while box.pending:
            for ticket, outcome in box.poll(1):
                assert outcome.timed_out
                tickets.discard(ticket)
        assert not tickets and box.run("1 + 1").stdout == "2\n"
    assert "Z" not in subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "stat="], capture_output=True, text=True).stdout
