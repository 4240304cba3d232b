"""Folders for compiled code, which nobody but this user and root can change.

Loading a library runs its code. A user who can write to any folder on its path can replace it. So every folder is
checked, from the root of the file system down.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

# Links on one path; Linux follows as many.
_MOST_LINKS = 40


class NotPrivate(OSError):
    """Error for a folder that another user could change; the message names it."""


def private_folder(path: Path, create: bool = False) -> Path:
    """Return the folder's real path, if nobody but this user and root can change what is in it.

    Args:
        path: An absolute path.
        create: Create missing folders, for this user only.

    Raises:
        NotPrivate: Another user could change what is in the folder.
        OSError: The folder does not exist, or cannot be read or created.
    """
    if not path.is_absolute():
        raise FileNotFoundError(f"{path} begins with a home folder that does not exist")
    if not hasattr(os, "geteuid"):
        if create:
            path.mkdir(parents=True, exist_ok=True)
        return path
    here, links, below_shared = Path(path.anchor), 0, False
    _check(here, below_shared)
    pending = [*reversed(path.parts[1:])]
    while pending:
        name = pending.pop()
        if name == "..":
            here = here.parent
            continue
        shared = _is_shared(here)
        below_shared = below_shared or shared
        entry = here / name
        if create and not os.path.lexists(entry):
            with contextlib.suppress(FileExistsError):
                entry.mkdir(mode=0o700)
        _check(entry, below_shared)
        if entry.is_symlink():
            links += 1
            if shared or links > _MOST_LINKS:
                raise NotPrivate(f"{entry} is a link")
            target = Path(os.readlink(entry))
            here = Path(target.anchor) if target.is_absolute() else here
            pending += [part for part in reversed(target.parts) if part != target.anchor]
        else:
            here = entry
    if _is_shared(here):
        raise NotPrivate(f"{here} can be written by other users")
    return here


def check_private_file(path: Path) -> None:
    """Raise unless a file in a private folder is a regular file that nobody but this user and root can change.

    Raises:
        NotPrivate: It is a link, belongs to another user or can be written by others.
        OSError: There is no such file.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise NotPrivate(f"{path} is not a regular file")
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid not in _owners(below_shared=False):
        raise NotPrivate(f"{path} belongs to another user")
    if _is_writable_by_others(status):
        raise NotPrivate(f"{path} can be written by other users")


def _check(entry: Path, below_shared: bool) -> None:
    """Raise for a folder or a link that another user could change, unless a sticky bit protects its entries."""
    status = entry.lstat()
    if status.st_uid not in _owners(below_shared):
        raise NotPrivate(f"{entry} belongs to another user")
    if stat.S_ISLNK(status.st_mode):
        return
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{entry} is not a folder")
    if _is_writable_by_others(status) and not status.st_mode & stat.S_ISVTX:
        raise NotPrivate(f"{entry} can be written by other users")


def _is_shared(folder: Path) -> bool:
    return _is_writable_by_others(folder.lstat())


def _is_writable_by_others(status: os.stat_result) -> bool:
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return bool(by_group or status.st_mode & stat.S_IWOTH)


def _is_own_group(group: int) -> bool:
    """Return True if this user is alone in a group: many systems give each user one that may write to new folders."""
    import grp
    import pwd

    try:
        user, record = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return record.gr_gid == user.pw_gid and record.gr_name == user.pw_name and set(record.gr_mem) <= {user.pw_name}


def _owners(below_shared: bool) -> set[int]:
    """Return the ids of the users that a folder may belong to."""
    owners = {0, os.geteuid()}
    # In a container without privileges root's folders seem to belong to nobody. So do other users' folders, which
    # matters below folders that all users can write to.
    if not below_shared and not _knows_root():
        owners.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return owners


def _knows_root() -> bool:
    """Return True if the machine's root is a user here, not outside of a container's user namespace."""
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:
        return True
    return any(line.split()[:2] == ["0", "0"] for line in lines)
