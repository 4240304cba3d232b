"""Which files are images: by their endings, through links, without what programs hide; the rest is counted."""

from __future__ import annotations

import os

import pytest

from vim.config.schema import IMAGE_EXTENSIONS
from vim.data.class_folders import label_by_folder
from vim.data.listing import describe_passed_over, list_files, natural_key, printable


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_every_kind_of_image_in_use_is_found_and_other_files_are_counted(tmp_path):
    names = [f"a/{index}{ending}" for index, ending in enumerate(IMAGE_EXTENSIONS)]
    touch(tmp_path, *names, "a/99.JPG", "a/x.heic", "a/y.HEIC", "b/notes.txt", "README")
    listing = list_files(tmp_path, IMAGE_EXTENSIONS)
    assert listing.paths == [*names, "a/99.JPG"]
    assert listing.passed_over == {".heic": 2, ".txt": 1, "without an ending": 1}
    assert describe_passed_over(listing.passed_over) == "4 files passed over (2 .heic, 1 .txt, 1 without an ending)"
    only = list_files(tmp_path, [".heic"])
    assert only.paths == ["a/x.heic", "a/y.HEIC"]
    assert only.passed_over.total() == len(names) + 3


def test_what_programs_hide_is_neither_an_image_nor_counted(tmp_path):
    touch(tmp_path, "a/0.jpg", "a/._0.jpg", "a/.DS_Store", ".ipynb_checkpoints/1.jpg", "__MACOSX/a/._0.jpg")
    touch(tmp_path, "@eaDir/a/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir/index.db")
    listing = list_files(tmp_path, IMAGE_EXTENSIONS)
    assert (listing.paths, dict(listing.passed_over)) == (["a/0.jpg"], {})
    assert not any("@eaDir" in folder for folder in listing.folders)


def test_links_are_followed_and_circles_are_not(tmp_path):
    store = touch(tmp_path / "store", "0.jpg", "deep/1.jpg")
    root = touch(tmp_path / "root", "dog/0.jpg")
    os.symlink(store, root / "cat")
    os.symlink(root, root / "dog" / "again")
    os.symlink(tmp_path / "nowhere", root / "cow")
    os.symlink(store / "0.jpg", root / "dog" / "9.jpg")
    listing = list_files(root, IMAGE_EXTENSIONS)
    assert listing.paths == ["cat/0.jpg", "cat/deep/1.jpg", "dog/0.jpg", "dog/9.jpg"]
    assert listing.passed_over == {"broken link": 1}


def test_a_folder_that_cannot_be_read_is_an_error_and_no_smaller_data_set(tmp_path, monkeypatch):
    touch(tmp_path, "a/0.jpg", "b/1.jpg")
    scan = os.scandir

    def refuse(path):
        if path.endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path / "b")):
        list_files(tmp_path, IMAGE_EXTENSIONS)


def test_names_are_in_natural_order_and_case_decides_between_equals():
    names = ["a10", "B1", "a2", "Cat", "cat", "5²3", "²"]
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)
    assert sorted(["a10", "a2", "A1", "cat", "Cat"], key=natural_key) == ["A1", "a2", "a10", "Cat", "cat"]


def test_bytes_that_are_not_text_are_escaped():
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\udce9"
    assert printable("café 图") == "café 图"


@pytest.mark.parametrize(
    ("paths", "classes", "labels"),
    [
        (["cat/0", "dog/1"], ("cat", "dog"), [0, 1]),
        (["benign/p1/0", "benign/p2/0", "malignant/p1/0"], ("benign", "malignant"), [0, 0, 1]),
        (["church/outdoor/0", "market/outdoor/0", "market/indoor/0"], ("church", "market"), [0, 1, 1]),
        (["cat/0", "cat/extra/1", "dog/0"], ("cat", "dog"), [0, 0, 1]),
        (["set/images/cat/0", "set/images/dog/0"], ("cat", "dog"), [0, 1]),
        (["cat/0", "cat/1"], ("cat",), [0, 0]),
        (["cat/0", "cat/more/1"], ("cat",), [0, 0]),
        (["class10/0", "class9/0"], ("class9", "class10"), [1, 0]),
    ],
)
def test_the_class_is_the_first_folder_that_is_not_alone(paths, classes, labels):
    assert label_by_folder(paths, "train") == (labels, classes)


def test_a_folder_that_is_alone_is_a_class_if_it_is_known_as_one():
    paths = ["benign/p1/0", "benign/p2/0"]
    assert label_by_folder(paths, "val")[1] == ("p1", "p2")
    assert label_by_folder(paths, "val", ("benign", "malignant")) == ([0, 0], ("benign",))


def test_a_folder_that_may_or_may_not_be_a_class_is_refused(tmp_path):
    """With patients in folders of their own, and no readable image of the other class."""
    paths = ["benign/p1/0.jpg", "benign/p2/0.jpg"]
    folders = ["benign", "benign/p1", "benign/p2", "malignant"]
    with pytest.raises(
        ValueError, match=r"in train: all images are in folders of 'benign', and none is in 'malignant'"
    ):
        label_by_folder(paths, "train", folders=folders)
    with pytest.raises(ValueError, match=r"in folders of 'set/benign', and none is in 'set/malignant'"):
        label_by_folder([f"set/{path}" for path in paths], "train", folders=[f"set/{path}" for path in folders])
    assert label_by_folder(paths, "val", ("benign", "malignant"), folders) == ([0, 0], ("benign",))
    assert label_by_folder(paths, "train", folders=folders[:-1]) == ([0, 1], ("p1", "p2"))
    for folder in folders:
        (tmp_path / folder).mkdir()
    (tmp_path / "benign" / "up").symlink_to(tmp_path)
    (tmp_path / ".cache").mkdir()
    assert list_files(tmp_path, [".jpg"]).folders == {*folders}


def test_an_image_without_a_folder_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"one folder per class in val: 2 of 2 images are not in such a folder, .* such as 0.jpg"
    ):
        label_by_folder(["0.jpg", "1.jpg"], "val")
    with pytest.raises(ValueError, match=r"in val: 1 of 2 images are not in such a folder, .* such as 1.jpg"):
        label_by_folder(["cat/0.jpg", "1.jpg"], "val")
