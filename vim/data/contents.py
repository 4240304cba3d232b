"""Records of the images in a split, made without reading them: to show, compare and save."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from vim.data.image_files import ImageFiles, ImageSource
from vim.data.listing import printable
from vim.data.sources import ImageSet, ImageSets

_MAX_NAMES = 3  # in a message
_SAMPLED = 5  # files of each class


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitContents:
    """The images of a split: their number, classes, labels and names."""

    count: int
    """Number of images."""
    class_names: Sequence[str]
    """Name of each class, in the order of the labels."""
    labels: Sequence[int] | None
    """Label of each image; `None` if the images must be read to know it."""
    keys: Sequence[str] | None
    """Name of each image, which does not change when the data moves; `None` if images have no names."""
    sizes: Mapping[str, int] | None = None
    """Bytes of the first few files of each class by name, to notice classes that changed places; `None` if unknown."""

    @classmethod
    def of(cls, dataset: ImageSet, class_names: Sequence[str]) -> "SplitContents":
        """Return the contents of a data set."""
        if isinstance(dataset, ImageFiles):
            labels, keys = dataset.source.labels(), dataset.source.keys()
            sizes = _first_sizes(dataset.source, labels, keys)
        else:
            labels, keys, sizes = dataset.labels.tolist(), None, None
        return cls(count=len(dataset), class_names=list(class_names), labels=labels, keys=keys, sizes=sizes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SplitContents":
        """Return the contents from the output of `to_dict`; earlier versions wrote no sizes."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data})

    def to_dict(self) -> dict[str, Any]:
        """Return the contents as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def class_counts(self) -> list[int] | None:
        """Return the number of images of each class, or `None` if the labels are unknown."""
        if self.labels is None:
            return None
        counts = Counter(self.labels)
        return [counts[label] for label in range(len(self.class_names))]

    def checksums(self) -> list[str]:
        """Return for each class the number of its images, with a checksum of their names and positions."""
        counts = self.class_counts()
        if counts is None or self.labels is None:
            return []
        sums = [0] * len(counts)
        for index, label in enumerate(self.labels):
            if 0 <= label < len(sums):
                key = f"{index} {self.keys[index] if self.keys is not None else ''}"
                sums[label] = zlib.crc32(key.encode("utf-8", "surrogateescape"), sums[label])
        return [f"{count} images (checksum {total:08x})" for count, total in zip(counts, sums, strict=True)]

    def named(self) -> Counter[str] | None:
        """Return the images counted by name and, where known, class; `None` if the images have no names."""
        if self.keys is None:
            return None
        if self.labels is None:
            return Counter(self.keys)
        names = self.class_names
        return Counter(
            f"{key} ({names[label] if 0 <= label < len(names) else label})"
            for key, label in zip(self.keys, self.labels, strict=True)
        )

    def changes_since(self, before: "SplitContents") -> Iterator[str]:
        """Yield the differences from an earlier record, in words."""
        old, new = before.named(), self.named()
        if old is not None and new is not None:
            for found, words in ((new - old, "new"), (old - new, "gone")):
                if found:
                    yield f"{found.total():,} {words} ({_some(sorted(found))})"
            sizes, sizes_before = self.sizes or {}, before.sizes or {}
            changed = [key for key in sizes if sizes[key] != sizes_before.get(key, sizes[key])]
            if changed:
                yield f"{len(changed):,} of {len(sizes):,} sampled files have another size ({_some(changed)})"
            return
        counts, others = self.class_counts(), before.class_counts()
        if counts is not None and others is not None:
            for name, count, other in zip(self.class_names, counts, others, strict=False):
                if count != other:
                    yield f"{count:,} of the class {name!r}, {other:,} before"
        elif self.count != before.count:
            yield f"{self.count:,}, {before.count:,} before"


def _first_sizes(
    source: ImageSource, labels: Sequence[int] | None, keys: Sequence[str] | None
) -> dict[str, int] | None:
    """Return the bytes of the first few files of each class by name: all files of a large set would take minutes."""
    if labels is None or keys is None:
        return None
    seen: Counter[int] = Counter()
    sizes = {}
    for index, label in enumerate(labels):
        if seen[label] < _SAMPLED and (size := source.size(index)) is not None:
            sizes[keys[index]] = size
        seen[label] += 1
    return sizes


def contents_of(sets: ImageSets) -> dict[str, SplitContents]:
    """Return the contents of both splits of a data set, by name of the split."""
    return {
        "training": SplitContents.of(sets.train, sets.class_names),
        "held-out": SplitContents.of(sets.val, sets.class_names),
    }


def passed_over(*datasets: ImageSet) -> Counter[str]:
    """Return the number of other files in the data sets, by kind."""
    return sum((data.source.passed_over for data in datasets if isinstance(data, ImageFiles)), Counter[str]())


def class_changes(before: Sequence[str], after: Sequence[str]) -> str | None:
    """Return in words how the classes changed since a model learned them, or `None` if they did not."""
    if tuple(before) == tuple(after):
        return None
    gone, new = [name for name in before if name not in after], [name for name in after if name not in before]
    if not gone and not new:
        first = next(index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        return f"class {first} was {before[first]!r} and is {after[first]!r}"
    parts = [(gone, "gone"), (new, "new")]
    verbs = [f"{_some(map(repr, names))} {'is' if len(names) == 1 else 'are'} {word}" for names, word in parts if names]
    return " and ".join(verbs)


def _some(names: Iterable[str]) -> str:
    """Return the first few names as text."""
    shown = [printable(name) for name in islice(names, _MAX_NAMES + 1)]
    return ", ".join([*shown[:_MAX_NAMES], *(["..."] if len(shown) > _MAX_NAMES else [])])
