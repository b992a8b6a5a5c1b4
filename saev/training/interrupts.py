"""Signals that ask a training run to stop. They act between two steps, so that saved states are complete."""

import contextlib
import logging
import os
import signal
import threading
import time
import types
import typing as tp

logger = logging.getLogger("saev")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Ctrl-C; the end of a Slurm job, `kill`; submitit's warning before time-out or preemption."""

GRACE_S = 20.0
"""Seconds to wait for this process's signal after another process got one."""


class Interrupts(contextlib.AbstractContextManager):
    """Inside, a signal is noted in `asked` instead of acting at once. A second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.previous: dict[int, tp.Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        self.previous = {}

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        if self.asked == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signum
        logger.info("%s: saving after this step", signal.Signals(signum).name)

    def act(self) -> None:
        """Does what the noted signal would have done; returns if submitit's handler does.

        Without a noted signal, another process got one: waits for this process's own, then exits.
        """
        waited_s = 0.0
        while self.asked is None and waited_s < GRACE_S:
            time.sleep(0.1)
            waited_s += 0.1
        signum, self.asked = self.asked, None
        if signum is None:
            raise SystemExit(1)
        handler = self.previous[signum]
        if callable(handler):  # submitit's: queues the job again
            handler(signum, None)
        elif signum == signal.SIGTERM:
            raise SystemExit(128 + signum)
        else:
            signal.signal(signum, handler)
            os.kill(os.getpid(), signum)
