"""One process at a time writes into a run's folder; whatever ends it gives the folder back."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time

import pytest
from rich.console import Console

from tests.helpers import assert_refused
from tests.processes import run_together, start
from tests.tiny_runs import TINY_OPTIONS, tiny_config
from vim import train
from vim.checkpoints.io import load_checkpoint
from vim.runtime.distributed import join_processes
from vim.training import run_lock
from vim.training.run_folder import RunFolder
from vim.training.run_lock import FolderInUse, RunLock
from vim.training.trainer import Trainer

SYNTHETIC = ["--data.dataset", "synthetic", "--data.synthetic_images", "64", *TINY_OPTIONS]


def hold(path):
    lock = RunLock(path)
    lock.acquire()
    (path.parent / "held").touch()
    time.sleep(60)


@contextlib.contextmanager
def holding(folder):
    """Have another process hold the lock on a run's folder."""
    process = start(hold, folder / ".lock")
    try:
        while not (folder / "held").exists():
            time.sleep(0.01)
        (folder / "held").unlink()
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture
def holder(tmp_path):
    (tmp_path / "run").mkdir()
    with holding(tmp_path / "run") as process:
        yield process


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path, holder):
    lock = RunLock(tmp_path / "run" / ".lock")
    words = f"{tmp_path / 'run'} is in use by process {holder.pid} on {re.escape(socket.gethostname())}: wait until it"
    for _ in range(2):
        with pytest.raises(FolderInUse, match=words):
            lock.acquire()
    holder.kill()
    holder.join()
    assert (tmp_path / "run" / ".lock").exists()  # a killed process cannot remove it
    lock.acquire()
    lock.acquire()
    assert f'"process": {os.getpid()}' in (tmp_path / "run" / ".lock").read_text()
    lock.release()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def refuses(path):
    """Return True if another process is refused the lock."""
    return run_together(1, is_refused, path)[0]


def is_refused(path):
    try:
        RunLock(path).acquire()
    except FolderInUse:
        return True
    return False


def test_a_copy_of_the_folder_leaves_the_lock_in_place(tmp_path):
    """A POSIX record lock goes when the process closes any of its files of that name."""
    path = tmp_path / "run" / ".lock"
    lock = RunLock(path)
    lock.acquire()
    shutil.copytree(path.parent, tmp_path / "copy")
    assert refuses(path)
    assert not refuses(tmp_path / "copy" / ".lock")
    lock.release()
    assert not refuses(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    path = tmp_path / ".lock"
    lock = RunLock(path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert refuses(path), "the child leaves the lock to its parent"
        lock.release()
        assert not refuses(path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, taken = tmp_path / ".lock", []
    flock = run_lock.fcntl.flock

    def remove_first(file, flags):
        if not taken:
            path.unlink()
        taken.append(file)
        return flock(file, flags)

    monkeypatch.setattr(run_lock.fcntl, "flock", remove_first)
    lock = RunLock(path)
    lock.acquire()
    assert len(taken) == 2
    assert path.exists()
    lock.release()


def test_a_disk_without_locks_is_said_and_no_obstacle(tmp_path, monkeypatch, caplog):
    def refuse(file, flags):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    RunLock(tmp_path / ".lock").acquire()
    assert "is on a disk without file locks: No locks available" in caplog.text


def test_a_run_is_not_resumed_while_it_runs(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*SYNTHETIC, "--output", str(folder)]) == 0
    assert not (folder / ".lock").exists()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with holding(folder) as process:
        words = f"is in use by process {process.pid} on {socket.gethostname()}"
        assert_refused(train, ["--resume", str(folder)], words, capsys)
        (folder / "last.pth").rename(folder / "away")
        assert train.main(["--resume", str(folder)]) == 2  # it would begin anew
        (folder / "away").rename(folder / "last.pth")
        assert {path: path.read_bytes() for path in before} == before
    assert train.main(["--resume", str(folder)]) == 0
    assert load_checkpoint(folder / "last.pth")["position"]["epoch"] == 1


def refused_by_the_lock(folder):
    with join_processes() as processes:
        trainer = Trainer(tiny_config(), RunFolder(folder), Console(quiet=True), processes)
        with pytest.raises(FolderInUse) as raised:
            trainer.fit()
        return str(raised.value)


def test_all_processes_leave_a_folder_in_use(tmp_path, holder):
    first, second = run_together(2, refused_by_the_lock, tmp_path / "run")
    assert first == second
    assert f"is in use by process {holder.pid}" in first


def test_two_runs_that_chose_the_same_new_folder_do_not_mix(tmp_path):
    """As two that start in the same second do."""
    first, second = (Trainer(tiny_config(), RunFolder(tmp_path / "run"), Console(quiet=True)) for _ in range(2))
    first.fit()
    saved = (tmp_path / "run" / "last.pth").read_bytes()
    with pytest.raises(FolderInUse, match=r"another run has written into .* since this one was started"):
        second.fit()
    assert (tmp_path / "run" / "last.pth").read_bytes() == saved
    assert not (tmp_path / "run" / ".lock").exists()
