"""Random access to the members of tar files: headers are read once, then each file by its offset."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from vim.data.listing import Listing, is_hidden


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


def list_members(archive: Path, listing: Listing) -> Iterator[Member]:
    """Yield the files of a tar file and of tar files inside it, except hidden ones.

    Args:
        archive: The tar file.
        listing: Counts members that are neither files nor folders, and takes the paths of folders.

    Raises:
        ValueError: The file is damaged, compressed or not a tar file.
    """
    try:
        with open(archive, "rb") as file:
            yield from _members(archive, file, 0, "", listing)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"data.path has a file that is damaged, compressed or not a tar file, {archive}: {error}"
        ) from error


def _members(archive: Path, file: IO[bytes], start: int, prefix: str, listing: Listing) -> Iterator[Member]:
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
            if any(map(is_hidden, parts)):
                continue
            names = parts if info.isdir() else parts[:-1]
            listing.folders.update(prefix + "/".join(names[:count]) for count in range(1, len(names) + 1))
            if info.isdir():
                continue
            if place is None:
                listing.passed_over["link in an archive" if info.issym() else "special file"] += 1
                continue
            name = "/".join(parts)
            if name.lower().endswith(".tar"):
                listing.folders.add(prefix + name[: -len(".tar")])
                inner.append((place[0], f"{prefix}{name[: -len('.tar')]}/"))
            else:
                yield Member(archive, *place, prefix + name)
        _check_end(file, contents.offset)
    for offset, folder in inner:
        yield from _members(archive, file, offset, folder, listing)


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise unless a tar file ends at an offset, with empty blocks or the file: tarfile stops at a damaged header."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.TarError(f"damaged or truncated at byte {offset:,}")
