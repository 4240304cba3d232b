"""Folders that another user could change. Where root runs the tests, two users try."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vim.ops.build.private_folders import NotPrivate, private_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no owners and modes of this kind")

ATTACKER, VICTIM = 23456, 23457


def test_what_is_missing_is_made_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "a" / "b", create=True)
    finally:
        os.umask(before)
    assert made == tmp_path / "a" / "b"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (made.parent, made)] == [0o700, 0o700]
    with pytest.raises(FileNotFoundError):
        private_folder(tmp_path / "c")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
@pytest.mark.parametrize("name", ["a", "a/b", "a/b/c"])
def test_a_folder_that_others_can_write(name, mode, tmp_path):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / name).chmod(mode)
    if mode & stat.S_ISVTX and name != "a/b/c":
        # As in /tmp: each user keeps their own.
        assert private_folder(tmp_path / "a/b/c") == tmp_path / "a/b/c"
        return
    with pytest.raises(NotPrivate, match=f"{tmp_path / name} can be written by other users"):
        private_folder(tmp_path / "a/b/c")


def test_a_folder_that_a_group_can_write(tmp_path, monkeypatch):
    """Nobody else is in a user's own group, to which many systems let new folders belong, to be written."""
    tmp_path.chmod(0o770)
    user = SimpleNamespace(pw_gid=tmp_path.stat().st_gid, pw_name="ada")
    group = SimpleNamespace(gr_gid=user.pw_gid, gr_name="ada", gr_mem=["ada"])
    monkeypatch.setattr("pwd.getpwuid", lambda number: user)
    monkeypatch.setattr("grp.getgrgid", lambda number: group)
    assert private_folder(tmp_path) == tmp_path
    group.gr_mem.append("eve")
    with pytest.raises(NotPrivate, match="can be written by other users"):
        private_folder(tmp_path)


def test_links_of_this_user_are_followed_where_nobody_else_writes(tmp_path):
    (tmp_path / "disk" / "cache").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".cache").symlink_to("../disk/cache")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert private_folder(tmp_path / "link" / ".cache") == tmp_path / "disk" / "cache"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(NotPrivate, match="round is a link"):
        private_folder(tmp_path / "round")


def test_a_link_in_a_folder_that_all_share(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "link").symlink_to(tmp_path / "own")
    assert private_folder(tmp_path / "tmp" / "link") == tmp_path / "own"
    (tmp_path / "tmp").chmod(0o1777)
    with pytest.raises(NotPrivate, match="link is a link"):
        private_folder(tmp_path / "tmp" / "link")


def test_where_the_way_ends(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        private_folder(tmp_path / "file" / "cache", create=True)
    with pytest.raises(FileNotFoundError, match="home folder"):
        private_folder(Path("~nobody-of-that-name/cache"))


def test_in_a_container_root_may_be_nobody(tmp_path, monkeypatch):
    """Not so below a folder that all share: there nobody may be anybody."""
    lstat, read_text = Path.lstat, Path.read_text
    nobody = int(Path("/proc/sys/kernel/overflowuid").read_text())

    def lstat_of(path: Path) -> os.stat_result:
        status = [*lstat(path)]
        status[stat.ST_UID] = nobody if path != tmp_path and tmp_path.is_relative_to(path) else os.geteuid()
        return os.stat_result(status)

    monkeypatch.setattr(Path, "lstat", lstat_of)
    with pytest.raises(NotPrivate, match="/ belongs to another user"):
        private_folder(tmp_path)
    users = "0 1000 1\n"  # the machine's root is none of them
    monkeypatch.setattr(Path, "read_text", lambda p: users if p.name == "uid_map" else read_text(p))
    if any(lstat(p).st_mode & stat.S_IWOTH for p in tmp_path.parents):
        with pytest.raises(NotPrivate, match="belongs to another user"):
            private_folder(tmp_path)
    else:
        assert private_folder(tmp_path) == tmp_path


@pytest.fixture
def shared():
    """A folder like /tmp, that every user reaches."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_user(user: int, function: Callable[[], None]) -> None:
    """Run a function in a process of another user; an error there fails the test here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            function()
        except BaseException as error:
            said = repr(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as file:
        said = file.read()
    assert not said, said


def refuses(folder: Path, why: str, create: bool = True) -> Callable[[], None]:
    def check() -> None:
        with pytest.raises(NotPrivate, match=why):
            private_folder(folder, create)

    return check


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="two users need root, who can be both")
def test_two_users(shared):
    cache = shared / f"vimamba-{VICTIM}"

    def prepare() -> None:
        (cache / "key").mkdir(parents=True)

    as_user(ATTACKER, prepare)
    as_user(VICTIM, refuses(cache, "belongs to another user"))
    as_user(VICTIM, refuses(cache / "key", "belongs to another user"))
    shutil.rmtree(cache)

    own = shared / "own"
    as_user(VICTIM, lambda: own.mkdir(mode=0o755))
    as_user(ATTACKER, lambda: cache.symlink_to(own))
    as_user(VICTIM, refuses(cache, "belongs to another user"))
    cache.unlink()

    as_user(VICTIM, lambda: private_folder(cache / "key", create=True) and None)
    as_user(VICTIM, lambda: private_folder(cache / "key") and None)

    def intrude() -> None:
        for action in (cache.rmdir, (cache / "key" / "lib.so").touch, lambda: cache.rename(shared / "away")):
            with pytest.raises(PermissionError):
                action()

    as_user(ATTACKER, intrude)
    # What an attacker was let into is refused as soon as it is seen.
    as_user(VICTIM, lambda: cache.chmod(0o777))
    as_user(VICTIM, refuses(cache / "key", "can be written by other users"))
