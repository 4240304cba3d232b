"""From the path of an image to its class: the first folder, where that is beyond doubt."""

from collections.abc import Collection, Sequence

from vim.data.listing import natural_key, printable


def label_by_folder(paths: Sequence[str], place: str, known: Collection[str] = ()) -> tuple[list[int], tuple[str, ...]]:
    """Label images by the first folder of their paths; folders further in do not count.

    A folder around all classes is not a class: as long as all images are in one folder that holds folders only, the
    folders in it are looked at instead.

    Args:
        paths: Paths below the folder of a split, with `/` between their parts.
        place: That folder or archive, for messages.
        known: Names that are classes, even of a folder that is alone.

    Returns:
        The label of each image, and the names of the classes in natural order.

    Raises:
        ValueError: An image is in no folder; the message names it.
    """
    folders = [path.split("/")[:-1] for path in paths]
    loose = [path for path, parts in zip(paths, folders, strict=True) if not parts]
    if loose:
        kept = "images lie in it directly" if len(loose) == len(paths) else "images lie beside its folders"
        raise ValueError(
            f"data.path must have a folder a class in {place}, and {len(loose):,} {kept}, such as "
            f"{printable(loose[0])}: their class cannot be told"
        )
    depth = 0
    while len({parts[depth] for parts in folders}) == 1:
        if folders[0][depth] in known or min(map(len, folders)) == depth + 1:
            break
        depth += 1
    names = tuple(sorted({parts[depth] for parts in folders}, key=natural_key))
    label = {name: index for index, name in enumerate(names)}
    return [label[parts[depth]] for parts in folders], names
