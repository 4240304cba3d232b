"""Average precision equal to COCO's own numbers, in one process and in several."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.coco_folder import HEIGHT, WIDTH, annotation, rectangle, run_lengths, write_split
from tests.processes import run_together
from vim.data.coco import CocoSource
from vim.data.instance_images import InstanceImages
from vim.data.order import EvalOrder
from vim.inference.detection_evaluation import PrecisionMeter, evaluate_detections
from vim.inference.evaluation import EvaluationStopped
from vim.runtime.distributed import Processes, join_processes

CPU = torch.device("cpu")


def truth_of_the_file():
    """Objects of three classes in six of eight images: crowds, gaps, small ones, polygons and run lengths."""
    random = np.random.default_rng(3)
    objects = []
    for number in range(6):
        for _ in range(int(random.integers(1, 5))):
            width, height = (int(side) for side in random.integers(3, 24, 2))
            left, top = int(random.integers(WIDTH - width)), int(random.integers(HEIGHT - height))
            box = (left, top, width, height)
            mask = [rectangle(*box)] if random.random() < 0.5 else run_lengths(*box)
            objects.append(annotation(10 * number, int(random.choice([3, 17, 90])), box, segmentation=mask))
    objects.append(annotation(0, 3, (0, 0, 40, 30), iscrowd=1, segmentation=run_lengths(0, 0, 40, 30)))
    return objects


def detections_for(source):
    """Return detections of each image: true boxes moved a little, some of a wrong class, some invented, some equal."""
    random = np.random.default_rng(4)
    found = []
    for index in range(len(source)):
        boxes, labels, scores = [], [], []
        for box, label in zip(source.read(index)[1].boxes.tolist(), source.read(index)[1].labels.tolist(), strict=True):
            if random.random() < 0.9:
                moved = np.array(box) + random.integers(-2, 3, 4)
                boxes.append(np.clip(moved, 0, [WIDTH, HEIGHT] * 2))
                labels.append(label if random.random() < 0.8 else 1 + label % 3)
                scores.append(round(random.random(), 1))
        if random.random() < 0.7:
            boxes.append(np.array([5, 5, 15, 12]))
            labels.append(int(random.integers(1, 4)))
            scores.append(0.5)
        boxes_tensor = torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)
        masks = torch.zeros(len(boxes), 1, HEIGHT, WIDTH)
        for mask, (left, top, right, bottom) in zip(masks, boxes_tensor.int().tolist(), strict=True):
            mask[0, top:bottom, left:right] = 0.9
        found.append(
            {
                "boxes": boxes_tensor,
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.tensor(scores, dtype=torch.float32),
                "masks": masks,
            }
        )
    return found


class Recall(nn.Module):
    """Returns prepared detections for the images it is called with, in the order of the calls."""

    def __init__(self, found):
        super().__init__()
        self.found = found
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return [self.found.pop(0) for _ in images]


def write_file(folder):
    return CocoSource(write_split(folder, "val2017", truth_of_the_file(), images=8), "val2017")


def cocos_own_numbers(folder, source, found, kind):
    """Return AP, AP50 and AP75 by COCOeval, from the annotation file and a file of results."""
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask

    categories = dict(enumerate(sorted((3, 17, 90)), start=1))
    results = []
    for image_id, own in zip(source.image_ids, found, strict=True):
        for box, label, score, pixels in zip(own["boxes"], own["labels"], own["scores"], own["masks"], strict=True):
            left, top, right, bottom = box.tolist()
            runs = mask.encode(np.asfortranarray((pixels[0] > 0.5).numpy().astype(np.uint8)))
            result = {"image_id": image_id, "category_id": categories[int(label)], "score": float(score)}
            if kind == "bbox":
                result["bbox"] = [left, top, right - left, bottom - top]
            else:
                result["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
            results.append(result)
    path = folder / f"results_{kind}.json"
    path.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations" / "instances_val2017.json"))
        evaluation = COCOeval_faster(truth, truth.loadRes(str(path)), iouType=kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value for value in evaluation.stats[:3]]


def batches_of(source, rank=0, size=1, batch_size=3):
    images = InstanceImages(source, "RGB")
    return [images.__getitems__(places) for places in EvalOrder(len(images), batch_size, rank=rank, world_size=size)]


def test_average_precision_is_coco_s_own_on_a_file(tmp_path):
    source = write_file(tmp_path)
    found = detections_for(source)
    result = evaluate_detections(Recall(list(found)), batches_of(source), CPU)
    assert result.count == 8
    for kind, coco_kind in (("box", "bbox"), ("mask", "segm")):
        own = cocos_own_numbers(tmp_path, source, found, coco_kind)
        assert 5 < own[0] < 95
        figures = [result.figures[f"{kind}_{figure}"] for figure in ("ap", "ap50", "ap75")]
        assert figures == pytest.approx(own, abs=1e-4)  # torchmetrics returns float32


def test_boxes_alone(tmp_path):
    source = write_file(tmp_path)
    found = detections_for(source)
    both = evaluate_detections(Recall(list(found)), batches_of(source), CPU).figures
    without = [{name: own[name] for name in ("boxes", "labels", "scores")} for own in found]
    boxes = evaluate_detections(Recall(without), batches_of(source), CPU, masks=False).figures
    for name, value in boxes.items():
        assert value == (both[name] if name.startswith("box") else None)


def evaluate_share(folder, stop_in=None):
    """Evaluate in the processes of this run; all detections of image n are of image n in the data set."""
    with join_processes() as processes:
        source = CocoSource(folder, "val2017")
        found = detections_for(source)[processes.rank :: processes.size]
        batches = batches_of(source, processes.rank, processes.size, batch_size=2)
        stop = processes.rank == stop_in
        try:
            result = evaluate_detections(Recall(found), batches, CPU, processes=processes, stop_asked=lambda: stop)
        except EvaluationStopped:
            return "stopped"
        return result.figures, result.count


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_return_the_figures_of_one(tmp_path, processes):
    write_file(tmp_path)
    expected = evaluate_share(tmp_path)
    assert run_together(processes, evaluate_share, tmp_path) == [expected] * processes


def test_all_processes_stop_when_one_is_asked_to(tmp_path):
    write_file(tmp_path)
    assert run_together(2, evaluate_share, tmp_path, 1) == ["stopped"] * 2


def test_images_without_objects_have_no_precision(tmp_path):
    source = CocoSource(write_split(tmp_path, "val2017", [], images=2), "val2017")
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)}
    found = [nothing | {"masks": torch.empty(0, 1, HEIGHT, WIDTH)} for _ in range(2)]
    with pytest.raises(ValueError, match="at least one held-out object"):
        evaluate_detections(Recall(found), batches_of(source), CPU)


def test_a_detector_that_finds_nothing_scores_zero(tmp_path):
    source = write_file(tmp_path)
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)}
    found = [nothing | {"masks": torch.empty(0, 1, HEIGHT, WIDTH)} for _ in range(8)]
    figures = evaluate_detections(Recall(found), batches_of(source), CPU).figures
    assert set(figures.values()) == {0.0}


def test_the_meter_of_a_process_without_images():
    with pytest.raises(ValueError, match="at least one held-out object"):
        PrecisionMeter(masks=True).figures(Processes())
