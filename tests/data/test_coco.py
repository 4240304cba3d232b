"""COCO's format: categories, boxes, three kinds of masks, what is missing, and what is damaged."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests.coco_folder import CATEGORIES, HEIGHT, WIDTH, annotation, rectangle, run_lengths, write_split
from vim.data.coco import CocoSource
from vim.data.decoding import BAD_IMAGE


def open_one(tmp_path, *annotations, **changes):
    return CocoSource(write_split(tmp_path / "coco", "val2017", annotations, images=1, **changes), "val2017")


def box_mask(left, top, width, height):
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_categories_are_numbered_by_their_ids_whatever_the_gaps(tmp_path):
    source = open_one(tmp_path, *(annotation(0, item["id"], (1, 1, 8, 8)) for item in CATEGORIES))
    assert source.class_names == ("ant", "bee", "cat")
    assert source.read(0)[1].labels.tolist() == [3, 1, 2]


def test_boxes_areas_and_crowds(tmp_path):
    source = open_one(
        tmp_path, annotation(0, 3, (1.5, 2, 8, 9), area=60.5), annotation(0, 3, (4, 4, 10, 10), iscrowd=1)
    )
    image, objects = source.read(0)
    assert image.size == (WIDTH, HEIGHT)
    torch.testing.assert_close(objects.boxes, torch.tensor([[1.5, 2, 9.5, 11], [4, 4, 14, 14]]))
    assert objects.area.tolist() == [60.5, 100]
    assert objects.crowd.tolist() == [False, True]
    assert source.notes == ["1 crowds"]


@pytest.mark.parametrize("kind", ["polygon", "polygons", "numbers", "text"])
def test_masks_in_all_forms(tmp_path, kind):
    from faster_coco_eval.core import mask

    numbers = run_lengths(3, 4, 10, 6)
    segmentation = {
        "polygon": [rectangle(3, 4, 10, 6)],
        "polygons": [rectangle(3, 4, 5, 6), rectangle(8, 4, 5, 6), [1, 2, 3, 4]],  # the last has two corners only
        "numbers": numbers,
        "text": {"size": [HEIGHT, WIDTH], "counts": mask.segmToRle(numbers, WIDTH, HEIGHT)["counts"].decode()},
    }[kind]
    source = open_one(tmp_path, annotation(0, 3, (3, 4, 10, 6), segmentation=segmentation))
    assert torch.equal(source.read(0)[1].masks[0], box_mask(3, 4, 10, 6))


def test_an_object_of_one_pixel(tmp_path):
    objects = open_one(tmp_path, annotation(0, 3, (5, 6, 1, 1))).read(0)[1]
    assert torch.equal(objects.masks[0], box_mask(5, 6, 1, 1))


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 2, 3, 4]], None, {"size": [HEIGHT, WIDTH], "counts": []}])
def test_objects_without_a_mask_are_counted_and_have_an_empty_one(tmp_path, segmentation):
    source = open_one(tmp_path, annotation(0, 3, (3, 4, 10, 6), segmentation=segmentation))
    assert source.notes == ["1 objects without a mask"]
    assert not source.read(0)[1].masks.any()


def test_boxes_without_area_and_images_without_objects_are_counted(tmp_path):
    root = write_split(tmp_path / "coco", "val2017", [annotation(0, 3, (3, 4, 0, 6)), annotation(10, 3, (3, 4, 5, -1))])
    source = CocoSource(root, "val2017")
    assert len(source) == 4
    assert sorted(source.notes) == ["2 boxes without area", "2 images without objects"]
    image, objects = source.read(3)
    assert image.size == (WIDTH, HEIGHT)
    assert objects.masks.shape == (0, HEIGHT, WIDTH)
    assert objects.boxes.shape == (0, 4)


def test_images_without_any_annotation_in_the_file(tmp_path):
    source = open_one(tmp_path)
    assert len(source.read(0)[1]) == 0


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (run_lengths(1, 1, 4, 4, size=(9, 9)), r"of the image's size \(32, 48\), got \(9, 9\)"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 3, 1]}, "decoded 9 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "zz9"}, "Invalid RLE"),
    ],
)
def test_damaged_run_lengths_make_an_image_unreadable(tmp_path, segmentation, words):
    source = open_one(tmp_path, annotation(0, 3, (3, 4, 10, 6), segmentation=segmentation))
    with pytest.raises(ValueError, match=words):
        source.read(0)


def test_an_image_of_another_size_than_its_annotation_is_unreadable(tmp_path):
    source = open_one(tmp_path, annotation(0, 3, (3, 4, 10, 6)))
    Image.new("RGB", (HEIGHT, WIDTH)).save(source.name(0))
    with pytest.raises(ValueError, match=r"the image is 48 x 32 pixels, and its annotation says 32 x 48"):
        source.read(0)


def test_a_missing_image_is_unreadable(tmp_path):
    root = write_split(tmp_path / "coco", "val2017", [])
    (root / "val2017" / "2.png").unlink()
    source = CocoSource(root, "val2017")
    assert source.keys() == ["0.png", "1.png", "2.png", "3.png"]
    with pytest.raises(BAD_IMAGE, match=r"2\.png"):
        source.read(2)


def rewrite(root, change):
    path = root / "annotations" / "instances_val2017.json"
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), "lacks 'categories'"),
        (lambda c: c.pop("images"), "lacks 'images'"),
        (lambda c: c.update(images=[], annotations=[]), "must have images and categories, got 0 and 3"),
        (lambda c: c["images"][0].pop("file_name"), "lacks 'file_name'"),
        (lambda c: c["images"][0].update(id=10), "two images have the same id"),
        (lambda c: c["annotations"][0].pop("bbox"), "lacks 'bbox'"),
        (lambda c: c["annotations"][0].update(image_id=7), "annotation 1 is of image 7"),
        (lambda c: c["annotations"][0].update(category_id=4), "annotation 1 is of category 4"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1 must have a box of four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=["a", 2, 3, 4]), "not in COCO's format"),
    ],
)
def test_annotations_that_contradict_themselves_are_refused(tmp_path, change, words):
    root = write_split(tmp_path / "coco", "val2017", [annotation(0, 3, (1, 1, 5, 5))])
    rewrite(root, change)
    with pytest.raises(ValueError, match=words) as caught:
        CocoSource(root, "val2017")
    assert "instances_val2017.json" in str(caught.value)


def test_files_and_folders_that_are_missing_or_no_json_are_named(tmp_path):
    root = write_split(tmp_path / "coco", "val2017", [])
    with pytest.raises(ValueError, match=r"must have a folder 'train2017' of images"):
        CocoSource(root, "train2017")
    path = root / "annotations" / "instances_val2017.json"
    for text, words in (("{", "is not JSON"), ("[1]", "must hold an object, got a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            CocoSource(root, "val2017")
    path.unlink()
    with pytest.raises(ValueError, match=r"a folder in COCO's layout: .*cannot be read: No such file"):
        CocoSource(root, "val2017")
