"""Real commands without the seconds that a new process imports for.

A server that has imported torch and other libraries, but nothing of saev, forks each command. The fork has its own
arguments, environment, working folder, streams and signals. It ends without freeing its modules. What it cannot show: which modules
a command imports, what imports cost, and its memory. Tests of those start Python. The new Pythons that a command starts by
`multiprocessing` (to which arguments are pickled) are forks too.

pytest's own processes are forks as well (`conftest.pytest_xdist_setupnodes`), of a server that has also imported saev. They share
the server of commands.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import io
import json
import multiprocessing.util
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
import typing as tp

ROOT = pathlib.Path(__file__).parent.parent
PRELOADED = (
    "torch",
    "scipy.stats",
    "numba",
    "sklearn.linear_model",
    "wandb",
    "polars",
    "matplotlib.figure",
    "tyro",
    "timm",
)
READ_ON_IMPORT = ("PYTHON", "GOMP_", "MKL_", "OPENBLAS_", "TRITON_", "TORCH_", "HF_", "LD_", "HOME")
"""Variables (by their first letters) that the libraries read when they are imported. Each set of them has a server."""

SHARES = "SAEV_TESTS_SERVERS_OF"
"""Variable with the id of the process whose servers this one may use."""

NewPython = subprocess.Popen
"""Of this moment, before anybody replaces it by the class below."""
starting = threading.Lock()
"""Threads that need the same server wait for it."""


class Popen(subprocess.Popen):
    """`subprocess.Popen` of [sys.executable, ...]: a script, -m module or -c code, without options of Python but -u.

    Args:
        also: modules (of saev, or of tests) that are imported once for all commands that name them, such as one that
            a test starts and kills again and again.
        spawns: whether `multiprocessing` in it starts new Pythons, not forks.
    """

    def __init__(
        self,
        args: tp.Sequence[str | pathlib.Path],
        *,
        also: tuple[str, ...] = (),
        spawns: bool = False,
        **kwargs: tp.Any,
    ):
        self._also, self._spawns = also, spawns
        super().__init__(args, **kwargs)

    def _execute_child(  # as in the base class, by position
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest: tp.Any
    ) -> None:
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        args = [a for a in args if a != "-u"]
        assert args[0] == sys.executable and (args[1] in ("-m", "-c") or not args[1].startswith("-")), args
        assert preexec_fn is None and not pass_fds
        report, theirs = os.pipe()
        streams = [fd if end == -1 else end for fd, end in enumerate((p2cread, c2pwrite, errwrite))]
        request: dict[str, tp.Any] = {"args": [os.fspath(a) for a in args[1:]], "spawns": self._spawns}
        request["cwd"] = os.fspath(cwd or pathlib.Path.cwd())
        request["env"] = {k: os.fspath(v) for k, v in (os.environ if env is None else env).items()}
        with starting:
            connection = server(read_on_import(request["env"]), self._also)
        socket.send_fds(connection, [json.dumps(request).encode()], [*streams, theirs])
        os.close(theirs)
        for ours, end in ((p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite)):
            if ours != -1:  # a pipe
                os.close(end)
        self._report = os.fdopen(report)
        self.pid = int(self._report.readline())
        self._child_created = True
        self._closed_child_pipe_fds = True

    def _ended(self, timeout: float | None) -> bool:
        ready, _, _ = select.select([self._report], [], [], timeout)
        if ready:
            self.returncode = int(self._report.readline())
            self._report.close()
        return bool(ready)

    def _internal_poll(self, _deadstate: object = None, **kwargs: object) -> int | None:
        if self.returncode is None:
            self._ended(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None and not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode


def run(
    args: tp.Sequence[str | pathlib.Path],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **kwargs: tp.Any,
) -> subprocess.CompletedProcess:
    """`subprocess.run` with the `Popen` above."""
    if capture_output:
        kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **kwargs) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def read_on_import(env: tp.Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset((k, v) for k, v in env.items() if k.startswith(READ_ON_IMPORT) and k != "PYTHONPATH")


@functools.cache
def server(env: frozenset[tuple[str, str]], also: tuple[str, ...] = ()) -> socket.socket:
    """The connection to the server with these variables and modules. The first call starts it, unless there is one that
    pytest's processes share; it ends when nobody is connected any more.

    One with more modules is a fork of the one without.
    """
    if SHARES in os.environ and not also:
        shared = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            shared.connect(name(int(os.environ[SHARES]), env))
        except OSError:  # there is none
            shared.close()
        else:
            atexit.register(shared.close)
            return shared
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if also:
        report, other = os.pipe()
        socket.send_fds(server(env, ()), [json.dumps({"also": also}).encode()], [theirs.fileno(), other])
        theirs.close()
        os.close(other)
        os.read(report, 100)
        os.close(report)
        atexit.register(ours.close)
        return ours
    left_out = (*READ_ON_IMPORT, "OMP_NUM_THREADS")  # each fork sets its number of threads
    others = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(name(os.getpid(), env))
    listener.listen()
    pass_fds = [theirs.fileno(), listener.fileno()]
    command = [sys.executable, __file__, *map(str, pass_fds)]
    process = NewPython(command, env=others | dict(env), pass_fds=pass_fds, cwd=ROOT)
    theirs.close()
    listener.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def name(pid: int, env: frozenset[tuple[str, str]]) -> str:
    """Address (Linux's, without a file) of the server that a process has started with these variables."""
    return f"\0saev-tests-{pid}-{hashlib.sha256(repr(sorted(env)).encode()).hexdigest()}"


# ---- the server's process ----


def serve(
    connection: socket.socket, listener: socket.socket | None = None
) -> tuple[dict[str, tp.Any], list[int]]:
    """Forks a child for each request. Returns in a child: its request and streams."""
    open_ones, listeners = [connection], [listener] if listener else []
    reports: dict[int, int] = {}
    wake, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the forks
    while True:
        ready, _, _ = select.select([*open_ones, *listeners, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            for pid in list(reports):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with contextlib.suppress(BrokenPipeError), os.fdopen(reports.pop(pid), "w") as file:
                        print(os.waitstatus_to_exitcode(status), file=file)
        for connection in set(ready) & set(open_ones):
            message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 4)
            if not message:
                open_ones.remove(connection)
                connection.close()
                continue
            *streams, report = fds
            if not (pid := os.fork()):
                for ours in (*open_ones, *listeners):
                    ours.close()
                for fd in (wake, wakes, report, *reports.values()):
                    os.close(fd)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return json.loads(message), streams
            os.write(report, b"%d\n" % pid)
            reports[pid] = report
            for fd in streams:
                os.close(fd)
        open_ones += [listener.accept()[0] for listener in listeners if listener in ready]
        if not open_ones:
            os._exit(0)  # without the seconds that Python takes to clean up


def compile_once() -> None:
    """Processes that need kernels of the same module wait while one compiles them, and then read them from the disk."""
    from numba.core import compiler_lock, dispatcher

    compiled, held = dispatcher.Dispatcher.compile, set()

    def waiting(self: tp.Any, signature: object) -> object:
        fpath = self.py_func.__code__.co_filename
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                compiler_lock.global_compiler_lock
            )  # first: also held by a kernel that calls this one
            if fpath not in held and os.path.exists(fpath):  # noqa: PTH110
                fcntl.flock(stack.enter_context(open(fpath)), fcntl.LOCK_EX)  # noqa: PTH123
                held.add(fpath)
                stack.callback(held.remove, fpath)
            return compiled(self, signature)

    dispatcher.Dispatcher.compile = waiting


def become(request: dict[str, tp.Any], streams: list[int]) -> tuple[str, str]:
    """Makes this process what Python is before a program's first line. Returns the kind of program, and the program."""
    for i, fd in enumerate(streams):
        os.dup2(fd, i)
        if fd > 2:
            os.close(fd)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    for i, name in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(i, "w", closefd=False)
        how: dict[str, tp.Any] = {"line_buffering": i == 2 or os.isatty(i)}
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), errors="backslashreplace" if i == 2 else None, **how
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    args = request["args"]
    kind, program = args[:2] if args[0] in ("-m", "-c") else ("script", args[0])
    sys.argv = [*args[:1], *args[2:]] if kind in ("-m", "-c") else args
    if "OMP_NUM_THREADS" in os.environ:  # which libraries read when they are imported
        set_threads(int(os.environ["OMP_NUM_THREADS"]))
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    sys.path[0] = {"-m": request["cwd"], "-c": "", "script": os.path.dirname(os.path.abspath(program))}[kind]  # noqa: PTH100, PTH120
    return kind, program


def set_threads(n_threads: int) -> None:
    import threadpoolctl
    import torch

    threadpoolctl.threadpool_limits(n_threads)
    torch.set_num_threads(n_threads)


def fork_python(path: bytes, args: list[bytes | str], keep: list[int]) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`, which starts `python ... -c CODE ...`. Returns the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    atexit._clear()
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *keep}:  # noqa: PTH208
        with contextlib.suppress(OSError):
            os.close(fd)
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):  # an exec, too, keeps only those that are ignored
            signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [os.fsdecode(arg) for arg in args]
    at = words.index("-c")
    sys.argv = words[at : at + 1] + words[at + 2 :]
    run_and_end("-c", words[at + 1])


def run_and_end(kind: str, program: str) -> tp.NoReturn:
    """Runs a program and ends as Python does, but without freeing modules, which takes a second."""
    code: object = 1
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        elif kind == "script":
            runpy.run_path(program, run_name="__main__")
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(main))
        code = 0
    except SystemExit as err:
        code = err.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    for end in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):  # Python's own helpers close them
            end()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as saev.early sets it
    gc.disable()
    for module in PRELOADED:
        importlib.import_module(module)
    compile_once()
    gc.freeze()  # else each fork goes through all objects of the imports
    request, fds = serve(*[socket.socket(fileno=int(fd)) for fd in sys.argv[1:]])
    if "also" in request:
        for module in request["also"]:
            with contextlib.suppress(Exception):  # whoever needs it says what is wrong
                importlib.import_module(module)
        gc.freeze()
        request, fds = serve(socket.socket(fileno=fds[0]))
    gc.enable()
    kind, program = become(request, fds)
    if not request["spawns"]:
        multiprocessing.util.spawnv_passfds = fork_python
    run_and_end(kind, program)
