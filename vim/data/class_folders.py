"""Labels from paths: the class of an image is the first folder of its path."""

from collections.abc import Collection, Sequence

from vim.data.listing import natural_key, printable


def label_by_folder(
    paths: Sequence[str], place: str, known: Collection[str] = (), folders: Collection[str] = ()
) -> tuple[list[int], tuple[str, ...]]:
    """Label images by the first folder of their paths; deeper folders do not count.

    A single folder around all others is not a class, so it is skipped as long as it holds nothing but folders. With a
    folder without images beside it, it could be a class or not, and is refused.

    Args:
        paths: Paths below the folder of a split, with `/` between their parts.
        place: That folder or archive, for messages.
        known: Names of classes that are never skipped.
        folders: Paths of all folders there, also of those without images.

    Returns:
        The label of each image, and the names of the classes in natural order.

    Raises:
        ValueError: An image is not in a folder, or it is unclear which folders are the classes; the message names it.
    """
    parents = [path.split("/")[:-1] for path in paths]
    loose = [path for path, parts in zip(paths, parents, strict=True) if not parts]
    if loose:
        raise ValueError(
            f"data.path must have one folder per class in {place}: {len(loose):,} of {len(paths):,} images are not in "
            f"such a folder, so their class is unknown, such as {printable(loose[0])}"
        )
    depth = 0
    while len({parts[depth] for parts in parents}) == 1:
        if parents[0][depth] in known or min(map(len, parents)) == depth + 1:
            break
        depth += 1
        _check_alone(parents[0][:depth], folders, place)
    names = tuple(sorted({parts[depth] for parts in parents}, key=natural_key))
    label = {name: index for index, name in enumerate(names)}
    return [label[parts[depth]] for parts in parents], names


def _check_alone(folder: Sequence[str], folders: Collection[str], place: str) -> None:
    """Raise unless a folder, in parts, is the only one in its parent folder."""
    siblings = {path for path in folders if path.split("/")[:-1] == folder[:-1]} - {"/".join(folder)}
    if siblings:
        name, other = (printable(path) for path in ("/".join(folder), min(siblings, key=natural_key)))
        raise ValueError(
            f"data.path must have one folder per class in {place}: all images are in folders of {name!r}, and none is "
            f"in {other!r} beside it, so it is unclear whether {name!r} is a class: remove {other!r} or add its images"
        )
