"""One run works in a directory at a time. The file `.lock` there says which; a crash lets go of it."""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trace_jax.config import ConfigError
from trace_jax.io.files import as_path, is_remote, read_json, remove, sweep, write_json
from trace_jax.io.progress import say
from trace_jax.parallel.processes import all_processes, broadcast_from_process_0, is_main

LOCK = ".lock"
_BEAT = 10.0  # seconds between two signs of life of whoever holds a lock in an object store
_SETTLED = 3.0  # seconds in which of several that take a lock at once the last one shows


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a directory, which is made if it isn't there; of several processes process 0 does. What writers
    that were killed left half-written there goes.

    On a disk the system holds it, and lets go of it when the process ends, however that ends. In an object store it is
    an object that changes every ten seconds; where it has not changed for three times as long, its holder is gone.

    Raises:
      ConfigError: another process holds it; the message says which.
    """
    lock, held = as_path(directory) / LOCK, contextlib.ExitStack()
    holder = read_json(lock) if is_remote(lock) and is_main() else None
    if broadcast_from_process_0(holder is not None):
        say(f"{lock}: waiting {3 * _BEAT:.0f} s for a sign of life of whoever holds it")
        time.sleep(3 * _BEAT)  # all do: in a computation one waits for another for so long at most
    with held:
        problem = ""
        if is_main():
            try:
                held.enter_context(_in_store(lock, holder) if is_remote(lock) else _on_disk(lock))
            except ConfigError as error:
                problem = str(error)
        if not all_processes(not problem):
            raise ConfigError(problem or f"{directory}: another run works there, says process 0.")
        yield


def _me() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


def _refusal(lock: Path, holder: object) -> ConfigError:
    told = holder if isinstance(holder, dict) else {}
    who = f"process {told.get('pid', 'unknown')} on {told.get('host', 'an unknown host')}"
    since = f" since {told['since']}" if "since" in told else ""
    return ConfigError(
        f"{lock.parent}: {who} works there{since}. Wait for it, or stop it; one run at a time can use a directory."
    )


@contextlib.contextmanager
def _on_disk(lock: Path) -> Iterator[None]:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as file:
            alone = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = None
                with contextlib.suppress(ValueError):
                    holder = json.loads(file.read())
                raise _refusal(lock, holder) from None
            except OSError as error:  # a file system without locks
                alone = False
                say(f"{lock}: can't be locked ({error.strerror}); see to it that no other run works there")
            try:
                same = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                same = False
            if not same:
                continue  # whoever held it has just removed it
            file.truncate(0)
            json.dump(_me(), file)
            file.flush()
            if alone:  # or another may be writing what would be swept up
                sweep(lock.parent)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def _in_store(lock: Path, before: object) -> Iterator[None]:
    """`before`: who held it long enough ago to have given another sign of life, or None."""
    if (holder := read_json(lock)) not in (None, before):
        raise _refusal(lock, holder)
    mine, ended = {**_me(), "token": secrets.token_hex(8)}, threading.Event()
    write_json(lock, mine)
    time.sleep(_SETTLED)
    if (holder := read_json(lock)) != mine:
        raise _refusal(lock, holder)

    def beat() -> None:
        beats = 0
        while not ended.wait(_BEAT):
            holder = read_json(lock) or {}
            if holder.get("token") != mine["token"]:
                say(f"{lock}: process {holder.get('pid')} on {holder.get('host')} has taken it; this run stops")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            write_json(lock, {**mine, "beats": (beats := beats + 1)})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (read_json(lock) or {}).get("token") == mine["token"]:
            remove(lock)
