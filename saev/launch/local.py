"""Runs stages in separate processes on this machine."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import typing as tp

from saev import early
from saev.launch.entry import configure_logging, ended_by_signals
from saev.launch.stage import Outcome, Stage


def share(target: str, arg: object, n_tasks: int) -> Outcome:
    """Runs one stage in `n_tasks` processes together and returns the first one's outcome."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return in_processes([Stage(target, arg, n_tasks, rank, port) for rank in range(n_tasks)])[0]


def in_processes(stages: list[Stage]) -> list[Outcome]:
    """Runs each stage in its own process. If one fails, the others are ended and only its outcome is
    returned.

    A signal to this process ends them too: they get SIGTERM, and are waited for so that they can save.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in stages]
    processes = [
        context.Process(target=_child, args=(stage, sender), daemon=True)
        for stage, (_, sender) in zip(stages, pipes, strict=True)
    ]
    with ended_by_signals():
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that the pipe ends if the process dies
            outcomes: dict[int, Outcome] = {}
            receivers = {receiver: i for i, (receiver, _) in enumerate(pipes)}
            while waited := [r for r, i in receivers.items() if i not in outcomes]:
                for receiver in multiprocessing.connection.wait(waited):
                    i = receivers[tp.cast(tp.Any, receiver)]
                    outcomes[i] = _received(receiver, processes[i]).of(f"local job {i}")
                    if outcomes[i].failed:
                        return [outcomes[i]]
            return [outcomes[i] for i in range(len(stages))]
        finally:
            started = [p for p in processes if p.pid is not None]
            for process in started:
                process.terminate()
            for process in started:
                process.join()


def _received(receiver: tp.Any, process: tp.Any) -> Outcome:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Outcome(
            error=f"died (exit code {process.exitcode}). Run the same command again; it continues."
        )


def _child(stage: Stage, sender: tp.Any) -> None:
    """A local job. It leaves Ctrl-C to its parent, and ends if the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    early.end_at_once()
    parent = tp.cast(tp.Any, multiprocessing.parent_process())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    configure_logging()
    with ended_by_signals():
        sender.send(stage.outcome())


def _end_with(parent: tp.Any) -> None:
    parent.join()
    os._exit(1)
