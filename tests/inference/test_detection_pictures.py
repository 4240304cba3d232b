"""Pictures of objects: boxes and masks where they are, and images of any size and number of channels."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.data.test_instances import objects_of
from vim.inference.detection_pictures import Example, confident, draw_examples, draw_objects

NAMES = ("ant", "bee")


def found_in(objects, scores=(0.9, 0.3)):
    return {
        "boxes": objects.boxes,
        "labels": objects.labels,
        "scores": torch.tensor(scores[: len(objects)]),
        "masks": objects.masks[:, None].float(),
    }


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_objects_are_drawn_over_the_image(channels):
    image = torch.full((channels, 40, 60), 10, dtype=torch.uint8)
    objects = objects_of((5, 5, 25, 25), (15, 15, 40, 35))
    picture = draw_objects(image, {"boxes": objects.boxes, "labels": objects.labels, "masks": objects.masks}, NAMES)
    assert picture.shape == (3, 40, 60)
    assert (image == 10).all()
    changed = (picture != 10).any(dim=0)
    assert changed[20, 20]  # where both are, too
    assert not changed[38, 3]
    alone = draw_objects(image, {"boxes": objects.boxes[:1], "labels": objects.labels[:1]}, NAMES)
    assert torch.equal(alone[:, 5, 5:20], picture[:, 5, 5:20])


def test_confident_detections_alone_are_kept():
    objects = objects_of((5, 5, 25, 25), (15, 15, 40, 35))
    kept = confident(found_in(objects))
    assert kept["labels"].tolist() == [1]
    assert kept["masks"].shape == (1, 40, 60)
    assert confident(found_in(objects), 0.95)["boxes"].shape == (0, 4)


def test_a_table_of_images_of_different_sizes_with_and_without_objects(tmp_path):
    examples = []
    for size, boxes in (((40, 60), [(5, 5, 25, 25)]), ((50, 30), []), ((30, 30), [(3, 4, 3, 9)])):
        objects = objects_of(*boxes, size=size)
        examples.append(Example.of(torch.zeros(3, *size, dtype=torch.uint8), objects, found_in(objects)))
    draw_examples(examples, NAMES, tmp_path / "table.png")
    assert Image.open(tmp_path / "table.png").width == 3 * (512 + 4) + 4
