"""Which files below a folder are images, by their names; the rest is counted, so that nobody misses it silently."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Listing:
    """The images below a folder, in natural order, and what is not one of them."""

    paths: list[str] = field(default_factory=list)
    """Paths relative to the folder, with `/` between their parts."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many other files there are of each kind: an ending, or words."""


def list_files(folder: Path, extensions: Sequence[str]) -> Listing:
    """Find the images below a folder, through links, with hidden files and folders left out.

    Args:
        folder: The folder.
        extensions: Endings of images, in either case.

    Raises:
        OSError: A folder cannot be read.
    """
    listing = Listing()
    _walk(str(folder), "", frozenset(), endings_of(extensions), listing)
    listing.paths.sort(key=natural_key)
    return listing


def _walk(
    folder: str, prefix: str, above: frozenset[tuple[int, int]], endings: tuple[str, ...], listing: Listing
) -> None:
    status = os.stat(folder)
    place = (status.st_dev, status.st_ino)
    if place in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                _walk(entry.path, f"{prefix}{entry.name}/", above | {place}, endings, listing)
            elif not entry.is_file():
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                listing.passed_over["link to nothing" if dangling else "no regular file"] += 1
            elif entry.name.lower().endswith(endings):
                listing.paths.append(prefix + entry.name)
            else:
                listing.passed_over[ending_of(entry.name)] += 1


def endings_of(extensions: Sequence[str]) -> tuple[str, ...]:
    """Return the endings in lower case, for `str.endswith`."""
    return tuple(extension.lower() for extension in extensions)


def ending_of(name: str) -> str:
    """Return the ending of a file's name, in lower case, or words where it has none."""
    return os.path.splitext(name)[1].lower() or "without an ending"


def is_hidden(name: str) -> bool:
    """Return True for the name of a file or folder that programs keep for themselves.

    Such are `.ipynb_checkpoints`, `.DS_Store`, and the `._0.jpg` that macOS puts beside `0.jpg`.
    """
    return name.startswith(".")


def natural_key(name: str) -> Any:
    """Return a key to sort names by, in which `a2` comes before `a10`, and case decides between equals."""
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def printable(name: str) -> str:
    """Return a name with the bytes escaped that are not text, as in the names of files from old archives."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def describe_passed_over(passed_over: Counter[str]) -> str:
    """Return what was passed over in words, such as `12 files passed over (9 .heic, 3 .txt)`; empty if nothing was."""
    total = passed_over.total()
    if not total:
        return ""
    kinds = [f"{count:,} {printable(kind)}" for kind, count in passed_over.most_common(5)]
    more = ["..."] if len(passed_over) > 5 else []
    return f"{total:,} file{'' if total == 1 else 's'} passed over ({', '.join(kinds + more)})"
