"""Ctrl-C, SIGTERM, a closed terminal, the notice before a preemption: the step in flight is finished and saved, then
the run ends.

Nothing here imports JAX before a loop runs: the command line uses it too.
"""

import contextlib
import functools
import itertools
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Steps of this process over all its loops: every process counts alike, and a notice between two loops is not missed.
_counted = itertools.count(1)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end. `signal` is its number; 128 more is the exit code (130 of Ctrl-C)."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


def interrupt(number: int, _frame: object = None) -> None:
    """Signal handler for work that has nothing to save: raises `Interrupted`."""
    _hung_up(number)
    raise Interrupted(number)


def _hung_up(number: int) -> None:
    """Nothing more is said to a terminal that was closed: writing there is an error."""
    for stream in (1, 2) if number == signal.SIGHUP else ():
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@functools.cache
def insist() -> None:
    """An interruption that came where nothing can be raised, as in the clean-up of an object, comes again."""
    show = sys.unraisablehook

    def again(told: Any) -> None:
        if not isinstance(told.exc_value, KeyboardInterrupt):
            show(told)
            return
        number = getattr(told.exc_value, "signal", signal.SIGINT)
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()  # not while this still runs

    sys.unraisablehook = again


def endings() -> list[signal.Signals]:
    """SIGTERM and SIGHUP, but for one that is ignored: nohup lets a run outlive its terminal so."""
    return [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]


class Interruption:
    """Context in which a first signal waits for the loop to save, and ends it at once where `unsaved` is False. A
    second Ctrl-C ends the process without saving. Outside of the main thread Python allows no handlers. Of several
    processes all end at the same step: a signal goes to JAX's preemption service (SIGTERM is its notice).
    """

    def __init__(self):
        self.unsaved, self._number, self._before = False, 0, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            several = (signal.SIGTERM,) if _several() else ()
            numbers = [number for number in (signal.SIGINT, *endings()) if number not in several]
            self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self._number and not _several():  # it came after the last step
            raise Interrupted(self._number)

    def asked(self) -> int:
        """The signal that asked to end, or 0. To be called once after each step, by all processes."""
        if not _several():
            return self._number
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(next(_counted)):
            return 0
        return self._number or signal.SIGTERM

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises `Interrupted`, for work that takes long and can be done again."""
        if self._number and not _several():
            raise Interrupted(self._number)
        unsaved, self.unsaved = self.unsaved, False
        try:
            yield
        finally:
            self.unsaved = unsaved

    def _receive(self, number: int, _frame: object) -> None:
        _hung_up(number)
        if self._number:  # a repeated one changes nothing: the state is being saved
            return
        self._number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if _several():
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.unsaved:
            raise Interrupted(number)
        from trace_jax.io.progress import say

        say("stopping: the step in flight is finished and saved (Ctrl-C again ends at once, without saving)")


def _several() -> bool:
    import jax

    return jax.process_count() > 1
