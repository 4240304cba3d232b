"""What a split holds is compared by names and classes, without reading an image."""

from __future__ import annotations

import json
import re
import tarfile

import pytest

from tests.tiny_runs import tiny_config, write_image_folder
from vim.data.contents import SplitContents, class_changes, contents_of
from vim.data.sources import open_image_sets


def contents(keys=("a/0", "a/1", "b/0"), labels=(0, 0, 1), names=("a", "b")):
    keys = None if keys is None else list(keys)
    return SplitContents(count=len(labels), class_names=list(names), labels=list(labels), keys=keys)


def test_images_that_are_new_or_gone_are_named():
    before = contents()
    assert list(before.changes_since(contents())) == []
    after = contents(("a/0", "b/0", "b/1", "b/2", "b/3", "b/4"), (0, 1, 1, 1, 1, 1))
    assert list(after.changes_since(before)) == ["4 new (b/1 (b), b/2 (b), b/3 (b), ...)", "1 gone (a/1 (a))"]
    relabelled = contents(labels=(0, 1, 1))
    assert list(relabelled.changes_since(before)) == ["1 new (a/1 (b))", "1 gone (a/1 (a))"]


@pytest.mark.parametrize("kind", ["folders", "tar files"])
def test_classes_that_changed_places_are_noticed(tmp_path, kind):
    """All names and numbers are as before; the sizes of a few files of each class are not."""
    root = write_image_folder(tmp_path / "images", ["ant", "bee"], {"train": 7, "val": 7})

    def now():
        place = root
        if kind == "tar files":
            place = tmp_path / "tar"
            place.mkdir(exist_ok=True)
            for split in ("train", "val"):
                with tarfile.open(place / f"{split}.tar", "w") as archive:
                    archive.add(root / split, arcname=".")
        config = tiny_config(data__dataset="folder", data__path=str(place), model__in_chans=3)
        return contents_of(open_image_sets(config))["training"]

    before = now()
    assert len(before.sizes) == 10
    record = SplitContents.from_dict(json.loads(json.dumps(before.to_dict())))
    assert list(now().changes_since(record)) == []
    for old, new in (("ant", "away"), ("bee", "ant"), ("away", "bee")):
        (root / "train" / old).rename(root / "train" / new)
    (change,) = now().changes_since(record)
    assert re.match(r"(\d+) of 10 sampled files have another size \(.*ant/\d\.jpg, ", change)
    assert list(before.changes_since(record)) == []
    of_an_earlier_version = SplitContents.from_dict({k: v for k, v in record.to_dict().items() if k != "sizes"})
    assert list(now().changes_since(of_an_earlier_version)) == []


def test_images_without_names_are_counted():
    before = contents(None)
    assert list(contents(None, (1, 0, 0)).changes_since(before)) == []
    assert list(contents(None, (0, 1, 1)).changes_since(before)) == [
        "1 of the class 'a', 2 before",
        "2 of the class 'b', 1 before",
    ]
    unknown = SplitContents(count=3, class_names=["a"], labels=None, keys=None)
    assert list(unknown.changes_since(before)) == []
    assert list(unknown.changes_since(contents(None, (0,)))) == ["3, 1 before"]


def test_checksums_see_names_places_and_classes():
    sums = contents().checksums()
    assert len(sums) == 2
    assert sums[0].startswith("2 images (checksum ")
    for other in (contents(("a/0", "a/2", "b/0")), contents(("a/1", "a/0", "b/0")), contents(labels=(0, 1, 0))):
        assert other.checksums()[0] != sums[0]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (("a", "b", "c"), None),
        (("a", "c"), "'b' is gone"),
        (("a", "b", "c", "d"), "'d' is new"),
        (("a", "bee", "c"), "'b' is gone and 'bee' is new"),
        (("b", "a", "c"), "class 0 was 'a' and is 'b'"),
    ],
)
def test_classes_that_changed_are_named(after, words):
    assert class_changes(("a", "b", "c"), after) == words


def test_every_kind_of_data_set_says_what_it_holds(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 3, "val": 1})
    found = contents_of(open_image_sets(tiny_config(data__dataset="folder", data__path=str(tmp_path))))
    assert found["training"].class_counts() == [3, 3]
    assert found["held-out"].keys == ["ant/0.jpg", "bee/0.jpg"]
    synthetic = contents_of(open_image_sets(tiny_config()))["training"]
    assert (synthetic.count, synthetic.keys) == (48, None)
    assert sum(synthetic.class_counts()) == 48
    assert SplitContents.from_dict(synthetic.to_dict()) == synthetic
