"""A lock on the folder of a run, whose checkpoints a second run would overwrite."""

import errno
import json
import logging
import os
import socket
from pathlib import Path
from typing import IO
from weakref import WeakSet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: WeakSet["RunLock"] = WeakSet()


def _drop_in_child() -> None:
    """Close the files of locks in a forked process; the parent keeps the locks."""
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)


class FolderInUse(ValueError):
    """Another process writes into the folder of the run; the message says which."""


class RunLock:
    """A lock that the operating system releases when the process ends, even if it is killed.

    It is a lock of the open file (flock). A POSIX record lock would be lost when the process opens and closes the file
    once more, as a copy of the run's folder does. Processes that are forked would inherit the lock, so they close the
    file at once.

    On NFS, Linux makes a lock on the server of it, which other machines see, unless the file system is mounted with
    `nolock` or `local_lock`: then it holds on this machine alone. A disk without any locks is named in a warning.

    Args:
        path: The lock file, which exists while the lock is held. A file left by a killed process is reused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, unless this object holds it; create the folder if it is missing.

        Raises:
            FolderInUse: Another process holds it.
            OSError: The folder cannot be written.
        """
        if self._file is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            _logger.warning("this system has no file locks: start no second process in %s", self._path.parent)
            return
        while self._file is None:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115  # the lock lasts as long as it is open
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _TAKEN:
                    raise FolderInUse(self._describe_holder(file)) from error
                _logger.warning("%s is on a disk without file locks: %s", self._path.parent, error.strerror)
                file.close()
                return
            if self._is_current(file):
                self._file = file
                _held.add(self)
            else:
                file.close()
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid()}, self._file)
        self._file.flush()

    def release(self) -> None:
        """Release the lock, if this object holds it."""
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        _held.discard(self)

    def _is_current(self, file: IO[str]) -> bool:
        """Return True if the open file is still the lock file, and was not removed before it was locked."""
        try:
            current = os.stat(self._path)
        except FileNotFoundError:
            return False
        return (current.st_dev, current.st_ino) == (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino)

    def _describe_holder(self, file: IO[str]) -> str:
        with file:
            file.seek(0)
            text = file.read()
        try:
            holder = json.loads(text)
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # it has not written it yet
            who = "another process"
        return f"{self._path.parent} is in use by {who}: wait until it ends, or stop it"
