"""List the image files below a folder by their names, and count the other files by kind."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Listing:
    """The images below a folder in natural order, the number of other files, and the folders."""

    paths: list[str] = field(default_factory=list)
    """Paths relative to the folder, with `/` between their parts."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of other files by kind: an ending, or a description."""
    folders: set[str] = field(default_factory=set)
    """Paths of all folders, also of those without images."""


def list_files(folder: Path, extensions: Sequence[str]) -> Listing:
    """List the images below a folder; follow links, and ignore hidden files and folders.

    Args:
        folder: The folder.
        extensions: Endings of images, in either case.

    Raises:
        OSError: A folder cannot be read.
    """
    listing = Listing()
    _list_into(listing, str(folder), "", frozenset(), endings_of(extensions))
    listing.paths.sort(key=natural_key)
    return listing


def _list_into(
    listing: Listing, folder: str, prefix: str, parents: frozenset[tuple[int, int]], endings: tuple[str, ...]
) -> None:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a link to one of its parents
        return
    if prefix:
        listing.folders.add(prefix.removesuffix("/"))
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                _list_into(listing, entry.path, f"{prefix}{entry.name}/", parents | {identity}, endings)
            elif not entry.is_file():
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                listing.passed_over["broken link" if dangling else "special file"] += 1
            elif entry.name.lower().endswith(endings):
                listing.paths.append(prefix + entry.name)
            else:
                listing.passed_over[ending_of(entry.name)] += 1


def endings_of(extensions: Sequence[str]) -> tuple[str, ...]:
    """Return the endings in lower case, for `str.endswith`."""
    return tuple(extension.lower() for extension in extensions)


def ending_of(name: str) -> str:
    """Return the ending of a file's name, in lower case, or a description if it has none."""
    return os.path.splitext(name)[1].lower() or "without an ending"


def is_hidden(name: str) -> bool:
    """Return True for names of hidden files and folders, and of those that a system adds to each folder.

    They are `.DS_Store`, the `._0.jpg` that macOS adds to `0.jpg`, and Synology's folder of thumbnails, `@eaDir`.
    """
    return name.startswith(".") or name == "@eaDir"


def natural_key(name: str) -> Any:
    """Return a sort key that orders `a2` before `a10`; case breaks ties."""
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def printable(name: str) -> str:
    """Return a name with bytes that are not UTF-8 escaped; names of files from old archives have them."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def describe_passed_over(passed_over: Counter[str]) -> str:
    """Return the counts in words, such as `12 files passed over (9 .heic, 3 .txt)`, or an empty string for none."""
    total = passed_over.total()
    if not total:
        return ""
    kinds = [f"{count:,} {printable(kind)}" for kind, count in passed_over.most_common(5)]
    more = ["..."] if len(passed_over) > 5 else []
    return f"{total:,} file{'' if total == 1 else 's'} passed over ({', '.join(kinds + more)})"


def with_output_names(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield each path with a name for its output: its own without the ending, numbered from the second equal one on."""
    seen: Counter[str] = Counter()
    for path in paths:
        seen[path.stem] += 1
        yield path, path.stem if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}"
