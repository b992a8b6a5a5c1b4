"""Run a stage in this process or as a Slurm job array, and end with an exit code that tells the truth.

A stage is named by a string ("saev.data.dump:main") and imported only where it runs, so that `--help`,
`--dry-run` and submission wait for no torch.
"""

import collections.abc
import contextlib
import dataclasses
import errno
import importlib
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import time
import typing as tp

import beartype

from saev import console, early, errors, fields

logger = logging.getLogger("saev")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """Where to run: in this process, or (with --slurm-acct) as Slurm jobs through submitit."""

    slurm_acct: str = ""
    """Slurm account. Empty: run in this process."""
    slurm_partition: str = ""
    """Slurm partition. Empty: the cluster's default."""
    n_hours: float = 24.0
    """Time limit of each job, in hours."""
    mem_gb: int = 0
    """Memory of each job, in GB. 0: the cluster's default."""
    n_cpus: int = 8
    """CPU cores of each job."""
    n_gpus: int = 1
    """GPUs of each job. 0 on a cluster without GPUs."""
    log_to: fields.Path = "logs"
    """Folder for job logs."""

    def __post_init__(self) -> None:
        fields.settle(
            self, n_hours="(0, 1e5]", mem_gb="[0, 1e6]", n_cpus="[1, 1e5]", n_gpus="[0, 1e4]"
        )


@beartype.beartype
def entry(main: collections.abc.Callable[[], object]) -> tp.NoReturn:
    """Runs a command's main function: a UserError becomes one line and exit code 2, Ctrl-C exit code 130.

    So does an error of the operating system (a folder that may not be written, a full disk).
    """
    early.install()
    _configure_logging()
    code = 0
    try:
        early.ctrl_c_raises()
        with _ended_by_signals(), _os_errors(), console.flushed():
            main()
    except errors.UserError as err:
        code = 2
        console.tell(f"error: {err}")
    except KeyboardInterrupt:
        code = 130
        console.tell(early.INTERRUPTED)
    finally:
        early.ctrl_c_ends()  # what is left is Python's own end
    sys.exit(code)


@contextlib.contextmanager
def _os_errors() -> collections.abc.Iterator[None]:
    """Turns an OSError about a file into a UserError."""
    try:
        yield
    except OSError as err:
        if err.filename is None and err.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        ):
            raise
        where = f"{err.filename}: " if err.filename is not None else ""
        raise errors.UserError(
            f"{where}{err.strerror}. Check the path, its permissions and the free space, then run the same command again."
        ) from err


def _configure_logging() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S"
    )
    logger.setLevel(logging.INFO)


class Call:
    """One stage on one argument, as submitit pickles it. Preempted or out of time, it is queued again; stages resume.

    Args:
        n_tasks: processes that work on it together; more than one find each other by torchrun's variables.
        rank: this one's number, where Slurm does not say it.
        port: on which they meet, where Slurm does not decide it.
    """

    def __init__(self, target: str, arg: object, n_tasks: int = 1, rank: int = 0, port: int = 0):
        self.target = target
        self.arg = arg
        self.n_tasks = n_tasks
        self.rank = rank
        self.port = port

    def __call__(self) -> tuple[str, object]:
        """Returns ("ok", result) or ("error", message): a UserError crosses the process as text."""
        _configure_logging()
        try:
            with _os_errors():
                return "ok", self.run()
        except errors.UserError as err:
            print(f"error: {err}", file=sys.stderr)
            return "error", str(err)

    def run(self) -> object:
        if self.n_tasks > 1:
            os.environ.update(self._meeting())
        module_name, _, function_name = self.target.partition(":")
        with early.importing():
            module = importlib.import_module(module_name)
        return getattr(module, function_name)(self.arg)

    def _meeting(self) -> dict[str, str]:
        rank, host, port = self.rank, "127.0.0.1", self.port
        if not port:  # a Slurm job of several tasks
            import submitit

            job = submitit.JobEnvironment()
            rank, host = job.global_rank, job.hostnames[0]
            port = 20_000 + int(job.raw_job_id) % 20_000
        return {
            "WORLD_SIZE": str(self.n_tasks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }

    def checkpoint(self) -> object:
        """What submitit resubmits on a time-out or preemption."""
        import submitit.helpers

        return submitit.helpers.DelayedSubmission(self)


@beartype.beartype
def run(
    target: str,
    args: collections.abc.Sequence[object],
    slurm: SlurmConfig,
    name: str,
    n_processes: int = 1,
    n_tasks: int = 1,
    keeps_going: bool = False,
) -> list[tp.Any]:
    """Calls stage `target` ("module:function") on each argument and returns the results in order.

    Without a Slurm account the calls run one after another here, or each in a process of its own when
    `n_processes` is more than one; with an account they are a job array, and this process waits for it.
    With `n_tasks` more than one, so many processes work on each argument together (on one node), and the result
    is that of the first; started by torchrun, this process is one of them.
    With `keeps_going` an argument whose stage raised a UserError has that error as its result, and the others go on.

    Raises:
        UserError: what a stage raised, or no Slurm on this machine, or a job that died (with its log's path).
    """
    calls = [Call(target, arg, n_tasks) for arg in args]
    result = _or_error if keeps_going else _just
    if not slurm.slurm_acct and n_tasks > 1 and "WORLD_SIZE" not in os.environ:
        return [result(lambda arg=arg: _together(target, arg, n_tasks)) for arg in args]
    if not slurm.slurm_acct:
        calls = [Call(target, arg) for arg in args]
        return [result(call.run) for call in calls] if n_processes == 1 else _in_processes(calls)
    jobs = _submit(calls, slurm, name, n_tasks)
    ids = ", ".join(job.job_id for job in jobs)
    logger.info("submitted %d job(s): %s; logs in %s", len(jobs), ids, slurm.log_to)
    try:
        _wait(jobs)
    except KeyboardInterrupt:
        array_id = jobs[0].job_id.split("_")[0]
        print(
            f"\nstopped waiting; jobs go on: {ids}. Cancel them with: scancel {array_id}",
            file=sys.stderr,
        )
        sys.exit(130)
    return [result(lambda job=job: _result(job)) for job in jobs]


def _just(call: collections.abc.Callable[[], tp.Any]) -> tp.Any:
    return call()


def _or_error(call: collections.abc.Callable[[], tp.Any]) -> tp.Any:
    try:
        with _os_errors():
            return call()
    except errors.UserError as err:
        return err


def _together(target: str, arg: object, n_tasks: int) -> tp.Any:
    """Runs one call in several local processes; returns the first one's result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return _in_processes([Call(target, arg, n_tasks, rank, port) for rank in range(n_tasks)])[0]


def _in_processes(calls: list[Call]) -> list[tp.Any]:
    """Runs each call in a process of its own. The first to fail ends the others; so does a signal to this process: they
    are asked to stop (SIGTERM) and waited for, so that they can save.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in calls]
    processes = [
        context.Process(target=_process, args=(call, sender), daemon=True)
        for call, (_, sender) in zip(calls, pipes, strict=True)
    ]
    with _ended_by_signals():
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that a process that dies is seen as the end of its pipe
            values: dict[int, tp.Any] = {}
            receivers = {receiver: i for i, (receiver, _) in enumerate(pipes)}
            while waited := [r for r, i in receivers.items() if i not in values]:
                for receiver in multiprocessing.connection.wait(waited):
                    i = receivers[tp.cast(tp.Any, receiver)]
                    values[i] = _received(receiver, i, processes[i])
            return [values[i] for i in range(len(calls))]
        finally:
            started = [p for p in processes if p.pid is not None]
            for process in started:
                process.terminate()
            for process in started:
                process.join()


@contextlib.contextmanager
def _ended_by_signals() -> collections.abc.Iterator[None]:
    """Inside, SIGTERM and SIGUSR2 raise SystemExit instead of ending this process at once: it ends its children and removes
    its temporary files.
    """

    def end(signum: int, frame: object) -> tp.NoReturn:
        raise SystemExit(128 + signum)

    is_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGUSR2) if is_main else ()
    previous = {signum: signal.signal(signum, end) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _received(receiver: tp.Any, i: int, process: tp.Any) -> tp.Any:
    try:
        kind, value = receiver.recv()
    except EOFError as err:
        process.join()
        raise errors.UserError(
            f"local job {i} died (exit code {process.exitcode}). Run the same command again; it continues."
        ) from err
    if kind == "error":
        raise errors.UserError(f"local job {i}: {value}")
    return value


def _process(call: Call, sender: tp.Any) -> None:
    """A local job. Ctrl-C is its parent's business; when the parent is gone, it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = tp.cast(tp.Any, multiprocessing.parent_process())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _configure_logging()
    try:
        with _ended_by_signals(), _os_errors():
            sender.send(("ok", call.run()))
    except errors.UserError as err:
        sender.send(("error", str(err)))


def _end_with(parent: tp.Any) -> None:
    parent.join()
    os._exit(1)


def _submit(calls: list[Call], slurm: SlurmConfig, name: str, n_tasks: int = 1) -> list[tp.Any]:
    if shutil.which("sbatch") is None:
        raise errors.UserError(
            f"--slurm-acct {slurm.slurm_acct}: no sbatch on this machine. Run on the cluster's login node, or leave --slurm-acct out."
        )
    import submitit

    pathlib.Path(slurm.log_to).mkdir(parents=True, exist_ok=True)
    # Each time-out is one more turn of a long run, not a failure.
    executor = submitit.SlurmExecutor(
        folder=str(pathlib.Path(slurm.log_to).resolve()), max_num_timeout=1000
    )
    executor.update_parameters(**_slurm_parameters(slurm, name, n_tasks))
    try:
        # submitit prints sbatch's complaint too; ours is one line
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(call) for call in calls]
    except submitit.core.utils.FailedJobError as err:
        complaint = str(err).strip().splitlines()[-1].removeprefix("sbatch: error: ")
        raise errors.UserError(
            f"sbatch refused the job: {complaint}. Check --slurm-acct, --slurm-partition, --n-gpus, --n-cpus, --mem-gb and --n-hours."
        ) from err


def _slurm_parameters(slurm: SlurmConfig, name: str, n_tasks: int = 1) -> dict[str, object]:
    optional = {
        "partition": slurm.slurm_partition,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else "",
        "gpus_per_node": slurm.n_gpus,
    }
    return {
        "job_name": name,
        "account": slurm.slurm_acct,
        "time": max(1, round(slurm.n_hours * 60)),
        "cpus_per_task": slurm.n_cpus,
        "ntasks_per_node": n_tasks,
        "stderr_to_stdout": True,
        **{k: v for k, v in optional.items() if v},
    }


def _wait(jobs: list[tp.Any]) -> None:
    """Returns when each job has ended. A result file is seen within seconds; Slurm itself is asked at growing intervals."""
    delay_s, n_done = 0.5, -1
    while (n_now := sum(job.done() for job in jobs)) < len(jobs):
        if n_now != n_done:
            logger.info("%d of %d job(s) done", n_now, len(jobs))
        n_done = n_now
        time.sleep(delay_s)
        delay_s = min(10.0, 1.1 * delay_s)


def _result(job: tp.Any) -> tp.Any:
    import submitit

    try:
        kind, value = job.results()[0]  # of several tasks that work together, the first
    except submitit.core.utils.FailedJobError as err:
        raise errors.UserError(
            f"job {job.job_id} failed: {_exception_line(str(err)).rstrip('.')}. Its log: {job.paths.stdout}"
        ) from err
    except submitit.core.utils.UncompletedJobError as err:  # killed, cancelled, out of memory
        raise errors.UserError(
            f"job {job.job_id} left no result; Slurm's word for it: {job.state}. Its log: {job.paths.stdout}"
        ) from err
    if kind == "error":
        raise errors.UserError(f"job {job.job_id}: {value}")
    return value


def _exception_line(message: str) -> str:
    """The exception's type and first line, from submitit's message around a traceback: what follows the last frame."""
    _, _, after = message.rpartition('\n  File "')
    lines = [line for line in after.splitlines()[1:] if line and line[0] not in " -"]
    return next(iter(lines), "it raised an exception")
