"""Images with objects: augmentation of boxes and masks together, order, replacement, and scenes of digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from tests.coco_folder import annotation, plain_objects, write_split
from tests.tiny_runs import tiny_config
from vim.data.coco import CocoSource
from vim.data.digit_instances import DigitInstances
from vim.data.digit_scenes import DigitScenes
from vim.data.instance_images import InstanceImages
from vim.data.instance_loaders import build_instance_loaders, open_instances
from vim.data.instance_transforms import InstanceTransform
from vim.data.instances import Instances
from vim.data.order import Place

SHAPE = (40, 60)


def objects_of(*boxes, size=SHAPE, crowd=False):
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Instances(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(1, len(boxes) + 1),
        masks=masks,
        crowd=torch.full((len(boxes),), crowd),
        area=masks.flatten(1).sum(dim=1).float(),
    )


def picture_of(objects):
    """Return an image whose red channel marks the objects."""
    pixels = np.zeros((*objects.masks.shape[1:], 3), dtype=np.uint8)
    pixels[..., 0] = 255 * objects.masks.any(dim=0).numpy()
    return Image.fromarray(pixels)


def test_without_augmentation_nothing_changes():
    objects = objects_of((3, 4, 20, 30), (30, 10, 60, 40))
    image, target = InstanceTransform(SHAPE, jitter=(1.0, 1.0), hflip=0.0)(picture_of(objects), objects)
    assert torch.equal(image[0] > 0, objects.masks.any(dim=0))
    assert torch.equal(target["boxes"], objects.boxes)
    assert torch.equal(target["masks"], objects.masks)
    assert target["labels"].tolist() == [1, 2]


def test_a_flip_moves_image_boxes_and_masks_together():
    objects = objects_of((3, 4, 20, 30))
    image, target = InstanceTransform(SHAPE, jitter=(1.0, 1.0), hflip=1.0)(picture_of(objects), objects)
    assert target["boxes"].tolist() == [[40, 4, 57, 30]]
    assert torch.equal(image[0] > 0, target["masks"][0])


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (24, 64)])
def test_jitter_keeps_image_boxes_and_masks_together(shape, masks):
    torch.manual_seed(0)
    transform = InstanceTransform(shape, jitter=(0.1, 2.0), masks=masks, fill=[7, 8, 9])
    objects = objects_of((3, 4, 20, 30))
    seen = 0
    for _ in range(100):
        image, target = transform(picture_of(objects), objects)
        assert image.shape == (3, *shape)
        assert image.dtype == torch.uint8
        assert target["boxes"].dtype == torch.float32
        for index, (left, top, right, bottom) in enumerate(target["boxes"].tolist()):
            seen += 1
            assert 0 <= left < right <= shape[1]
            assert 0 <= top < bottom <= shape[0]
            inside = image[0] > 127
            found = masks_to_boxes(inside[None])[0]
            torch.testing.assert_close(found[:2], torch.tensor([left, top]), atol=1.5, rtol=0)
            torch.testing.assert_close(found[2:] + 1, torch.tensor([right, bottom]), atol=1.5, rtol=0)
            if masks:
                assert (target["masks"][index] == inside).float().mean() > 0.95
    assert seen > 50


def test_crops_without_the_object_have_an_empty_target():
    objects = objects_of((0, 0, 5, 5))
    torch.manual_seed(0)
    transform = InstanceTransform((32, 32), jitter=(4.0, 4.0))
    targets = [transform(picture_of(objects), objects)[1] for _ in range(20)]
    empty = [target for target in targets if not len(target["labels"])]
    assert empty
    assert empty[0]["boxes"].shape == (0, 4)
    assert empty[0]["masks"].shape == (0, 32, 32)


def test_small_images_are_padded_at_the_right_and_at_the_bottom():
    objects = objects_of((0, 0, 60, 40))
    image, target = InstanceTransform((80, 120), jitter=(0.5, 0.5), hflip=0.0, fill=[7, 8, 9])(
        picture_of(objects), objects
    )
    assert target["boxes"].tolist() == [[0, 0, 60, 40]]
    assert image[:, 79, 119].tolist() == [7, 8, 9]
    assert image[:, 0, 0].tolist() == [255, 0, 0]


def test_crowds_objects_without_masks_and_boxes_without_area_are_no_targets():
    objects = objects_of((3, 4, 20, 30), (30, 10, 30, 40))  # the second has no pixels
    keep = InstanceTransform(SHAPE, jitter=(1.0, 1.0), hflip=0.0)
    boxes_only = InstanceTransform(SHAPE, jitter=(1.0, 1.0), hflip=0.0, masks=False)
    for transform in (keep, boxes_only):
        assert transform(picture_of(objects), objects)[1]["labels"].tolist() == [1]
        crowd = objects_of((3, 4, 20, 30), crowd=True)
        target = transform(picture_of(crowd), crowd)[1]
        assert target["boxes"].shape == (0, 4)


def test_an_image_of_one_pixel():
    objects = objects_of((0, 0, 1, 1), size=(1, 1))
    torch.manual_seed(0)
    for _ in range(5):
        image, target = InstanceTransform((32, 32))(picture_of(objects), objects)
        assert image.shape == (3, 32, 32)
        assert len(target["boxes"]) == 1


def images_of(source, **changes):
    return InstanceImages(source, "RGB", augment=InstanceTransform((32, 32)), **changes)


def test_a_batch_is_a_function_of_the_places(tmp_path):
    source = CocoSource(write_split(tmp_path, "train2017", plain_objects(6), images=6), "train2017")
    places = [Place(2, 5, 1), Place(2, 7, 3)]
    first = images_of(source, seed=3).__getitems__(places)
    torch.rand(5)
    second = images_of(source, seed=3).__getitems__(places[::-1])
    assert first.images.shape == (2, 3, 32, 32)
    assert torch.equal(first.images, second.images.flip(0))
    for target, other in zip(first.targets, second.targets[::-1], strict=True):
        assert all(torch.equal(target[name], other[name]) for name in ("boxes", "labels", "masks"))
    assert not torch.equal(first.images, images_of(source, seed=4).__getitems__(places).images)


def test_unreadable_images_are_named_and_replaced_in_training_and_left_out_of_evaluation(tmp_path):
    root = write_split(tmp_path, "train2017", plain_objects(6), images=6)
    (root / "train2017" / "2.png").unlink()
    (root / "train2017" / "4.png").write_bytes(b"no image")
    source = CocoSource(root, "train2017")
    places = [Place(0, index, index) for index in range(6)]
    batch = images_of(source).__getitems__(places)
    assert len(batch.images) == len(batch.targets) == 6
    assert {item.name for item in batch.unreadable} == {source.name(2), source.name(4)}
    held_out = InstanceImages(source, "RGB").__getitems__(places)
    assert held_out.indices == [0, 1, 3, 5]
    assert len(held_out.images) == len(held_out.truth) == 4
    assert [item.name for item in held_out.unreadable] == [source.name(2), source.name(4)]


def test_a_folder_without_readable_images_is_an_error(tmp_path):
    root = write_split(tmp_path, "train2017", [])
    for path in (root / "train2017").iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match=r"10 images in a row"):
        images_of(CocoSource(root, "train2017")).__getitems__([Place(0, 0, 0)])


def test_grey_images(tmp_path):
    root = write_split(tmp_path, "train2017", [annotation(0, 3, (1, 1, 9, 9))], images=1)
    Image.fromarray(np.full((32, 48), 40000, dtype=np.uint16)).save(root / "train2017" / "0.png")
    source = CocoSource(root, "train2017")
    grey = InstanceImages(source, "L", bits=16).__getitems__([Place(0, 0, 0)])
    assert grey.images[0].shape == (1, 32, 48)
    assert int(grey.images[0][0, 20, 20]) == 40000 >> 8
    assert InstanceImages(source, "RGB").__getitems__([Place(0, 0, 0)]).images[0].shape == (3, 32, 48)


def test_scenes_of_digits_have_tight_boxes_and_labels_from_one():
    scenes = DigitScenes("val", 64, 20, 0)
    source = DigitInstances(scenes)
    for index in range(20):
        image, objects = source.read(index)
        assert image.size == (64, 64)
        assert (objects.labels - 1).tolist() == scenes[index].labels.tolist()
        for mask, (left, top, right, bottom) in zip(objects.masks, objects.boxes.int().tolist(), strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()


def coco_config(path, **changes):
    settings = {
        **{"task": "detection", "data__dataset": "coco", "data__path": str(path), "model__in_chans": 3},
        **{"data__train_split": "train2017", "data__val_split": "val2017"},
        **{"batch_size": 2, "micro_batch_size": 1, "model__img_size": 32},
    }
    return tiny_config(**settings | changes)


def test_splits_must_have_the_same_categories(tmp_path):
    write_split(tmp_path, "train2017", plain_objects(4))
    write_split(tmp_path, "val2017", [], categories=[{"id": 3, "name": "ant"}])
    with pytest.raises(ValueError, match=r"the same categories in both splits, got 3 in 'train2017' and 1 in"):
        build_instance_loaders(coco_config(tmp_path), torch.device("cpu"))


def test_other_data_sets_and_numbers_of_classes_are_refused(tmp_path):
    write_split(tmp_path, "train2017", plain_objects(4))
    write_split(tmp_path, "val2017", plain_objects(4))
    with pytest.raises(ValueError, match=r"model\.num_classes must be null or .* 3, got 5"):
        build_instance_loaders(coco_config(tmp_path, model__num_classes=5), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'coco' or 'digit_scenes' for task 'detection', got 'torch/coco'"):
        open_instances(coco_config(tmp_path, data__dataset="torch/coco"), "train")


def test_two_processes_share_the_batches_of_one(tmp_path):
    write_split(tmp_path, "train2017", plain_objects(8), images=8)
    write_split(tmp_path, "val2017", plain_objects(3), images=3)
    config = coco_config(tmp_path, batch_size=4)
    alone = build_instance_loaders(config, torch.device("cpu"))
    pair = [build_instance_loaders(config, torch.device("cpu"), rank, 2) for rank in range(2)]
    expected = [batch.images for batch in alone.train]
    found = [batch.images for batches in zip(*(loaders.train for loaders in pair), strict=True) for batch in batches]
    assert len(expected) == len(found) == 8
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert sorted(index for loaders in pair for batch in loaders.val for index in batch.indices) == [0, 1, 2]
