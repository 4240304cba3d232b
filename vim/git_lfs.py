"""Files that Git LFS has not fetched: a repository holds a pointer of three lines in place of each."""

import os

_BEGINNING = b"version https://git-lfs.github.com/spec/"
POINTER = "it is a Git LFS pointer and not the file itself: run git lfs pull"


def is_pointer(beginning: bytes) -> bool:
    """Return True if a file that begins so is a pointer."""
    return beginning.startswith(_BEGINNING)


def is_pointer_file(path: str | os.PathLike[str]) -> bool:
    """Return True if there is a file at a path, and it is a pointer."""
    try:
        with open(path, "rb") as file:
            return is_pointer(file.read(len(_BEGINNING)))
    except OSError:
        return False
