"""Random access to the members of tar files: headers are read once, then each file by its offset."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from vim.data.listing import is_hidden


class Member(NamedTuple):
    """A file inside a tar file."""

    archive: Path
    offset: int
    size: int
    name: str
    """Path in the archive, with `/` between the parts; a nested tar file counts as a folder."""

    def read(self, archive: IO[bytes], most: int | None = None) -> bytes:
        """Return the contents, or their first `most` bytes, from the open tar file."""
        archive.seek(self.offset)
        return archive.read(self.size if most is None else min(self.size, most))

    def open(self) -> io.BytesIO:
        """Return the contents as a file."""
        with open(self.archive, "rb") as archive:
            return io.BytesIO(self.read(archive))


def list_members(archive: Path, passed_over: Counter[str]) -> Iterator[Member]:
    """Yield the files of a tar file and of tar files inside it, except hidden ones.

    Args:
        archive: The tar file.
        passed_over: Counts members that are neither files nor folders.

    Raises:
        ValueError: The file is damaged, compressed or not a tar file.
    """
    try:
        with open(archive, "rb") as file:
            yield from _members(archive, file, 0, "", passed_over)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"data.path has a file that is damaged, compressed or not a tar file, {archive}: {error}"
        ) from error


def _members(archive: Path, file: IO[bytes], start: int, prefix: str, passed_over: Counter[str]) -> Iterator[Member]:
    """Yield the files of the tar file that begins at the offset `start`."""
    file.seek(start)
    places: dict[str, tuple[int, int]] = {}
    inner: list[tuple[int, str]] = []
    with tarfile.open(fileobj=file, mode="r:") as contents:
        for info in contents:
            if info.isreg():
                places[info.name] = (info.offset_data, info.size)
            place = places.get(info.linkname if info.islnk() else info.name)  # a hard link names an earlier member
            parts = [part for part in info.name.split("/") if part not in ("", ".")]
            if info.isdir() or any(map(is_hidden, parts)):
                continue
            if place is None:
                passed_over["link in an archive" if info.issym() else "special file"] += 1
                continue
            name = "/".join(parts)
            if name.lower().endswith(".tar"):
                inner.append((place[0], f"{prefix}{name[: -len('.tar')]}/"))
            else:
                yield Member(archive, *place, prefix + name)
    for offset, folder in inner:
        yield from _members(archive, file, offset, folder, passed_over)
