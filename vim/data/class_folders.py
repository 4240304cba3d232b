"""Labels from paths: the class of an image is the first folder of its path."""

from collections.abc import Collection, Sequence

from vim.data.listing import natural_key, printable


def label_by_folder(paths: Sequence[str], place: str, known: Collection[str] = ()) -> tuple[list[int], tuple[str, ...]]:
    """Label images by the first folder of their paths; deeper folders do not count.

    A single folder around all others is not a class, so it is skipped as long as it holds nothing but folders.

    Args:
        paths: Paths below the folder of a split, with `/` between their parts.
        place: That folder or archive, for messages.
        known: Names of classes that are never skipped.

    Returns:
        The label of each image, and the names of the classes in natural order.

    Raises:
        ValueError: An image is not in a folder; the message names it.
    """
    folders = [path.split("/")[:-1] for path in paths]
    loose = [path for path, parts in zip(paths, folders, strict=True) if not parts]
    if loose:
        raise ValueError(
            f"data.path must have one folder per class in {place}: {len(loose):,} of {len(paths):,} images are not in "
            f"such a folder, so their class is unknown, such as {printable(loose[0])}"
        )
    depth = 0
    while len({parts[depth] for parts in folders}) == 1:
        if folders[0][depth] in known or min(map(len, folders)) == depth + 1:
            break
        depth += 1
    names = tuple(sorted({parts[depth] for parts in folders}, key=natural_key))
    label = {name: index for index, name in enumerate(names)}
    return [label[parts[depth]] for parts in folders], names
