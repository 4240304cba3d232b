"""Explanations of segmentations and detections: where a class or a box comes from, and clear words for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import nn

import vim
from tests.coco_folder import plain_objects, write_split
from tests.tasks.test_detection import SMALL_HEADS, config_for
from tests.tiny_runs import TINY_MODEL, TINY_SEGMENTER, tiny_config, write_pairs
from vim.config.detection import DetectionConfig
from vim.explain import __main__ as command
from vim.explain import box_activation, dense_explainer, hidden_attention, segment_activation
from vim.explain.cells import Cells
from vim.explain.class_activation import METHODS
from vim.explain.dense_explainer import DENSE_EXPLANATIONS, DenseExplainer
from vim.inference.mask_predictor import MaskPredictor
from vim.inference.object_finder import ObjectFinder
from vim.inference.trained_model import load_trained_model
from vim.models.detection import build_detector
from vim.models.segmentation import Segmenter
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

CPU = torch.device("cpu")
CLASSES = ("red", "green", "blue")


class ByColour(nn.Module):
    """A backbone whose map is the mean colour of each 8 x 8 pixels, twice, as two blocks would give it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.resize = nn.ModuleList(nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        cells = F.avg_pool2d(x, 8)
        return [resize(cells * factor) for resize, factor in zip(self.resize, (1, 2), strict=True)]


class SumOfMaps(nn.Module):
    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return maps[0] + maps[1]


def small_segmenter(**arguments) -> Segmenter:
    torch.manual_seed(0)
    backbone = vim.VisionMamba(img_size=32, num_classes=0, **TINY_MODEL | {"cls_position": "none", **arguments})
    return Segmenter(backbone, 3, channels=8, aux_channels=None).eval()


def colour_segmenter() -> Segmenter:
    """A model whose logits are red, green and blue."""
    model = small_segmenter()
    model.backbone, model.head = ByColour(model.backbone.model), SumOfMaps()
    return model


def colours(height: int = 48, width: int = 40) -> torch.Tensor:
    """Return a blue image with a red square above and a green one below, (3, height, width), uint8."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[2] = 200
    image[:, 8:24, 0:16] = torch.tensor([250, 0, 0], dtype=torch.uint8)[:, None, None]
    image[:, 32:48, 24:40] = torch.tensor([0, 250, 0], dtype=torch.uint8)[:, None, None]
    return image


def predictor_of(model: Segmenter, stride: int | None = 8, **changes) -> MaskPredictor:
    settings = {**TINY_SEGMENTER, "data__mean": (0.0,), "data__std": (1.0,), "segmentation__stride": stride, **changes}
    return MaskPredictor(model, tiny_config(**settings), CPU)


def explain_colours(model, classes, stride=8, **changes):
    predictor = predictor_of(model, stride, **changes)
    labels = predictor.labels(colours())
    _, windows, starts = predictor.windows(colours())
    return labels, predictor, segment_activation(model, windows, starts, labels, classes)


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "elementwise"])
def test_the_activation_of_a_class_is_where_the_class_is(method):
    labels, _, activation = explain_colours(colour_segmenter(), [0, 1, 2])
    for c, values in enumerate(activation.maps(method)):
        for other in range(3):
            mean = float(values[labels == other].mean())
            assert mean > 0.7 if other == c else mean < 0.3, f"class {c} at pixels of class {other}"


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_the_score_of_a_class_is_the_sum_of_its_logits_however_windows_overlap(stride):
    """The model is linear and its map does not depend on the window, so gradient times map is the score itself."""
    labels, predictor, activation = explain_colours(colour_segmenter(), [2, 0], stride)
    logits = torch.cat([rows for _, rows in next(predictor.scores([colours()]))], dim=1)
    for c, gradient in zip([2, 0], activation.gradients, strict=True):
        expected = logits[c][labels == c].sum()
        torch.testing.assert_close((gradient * activation.activations).sum(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("short_side", [None, 80])
def test_gradients_are_of_the_maps_that_the_levels_read(short_side):
    """A step along the gradient of a window's maps changes the score as the gradient says."""
    model = small_segmenter(depth=2).double()
    predictor = predictor_of(model, segmentation__short_side=short_side)
    view, windows, _ = predictor.windows(colours())
    assert view.shape[-2:] == ((48, 40) if short_side is None else (96, 80))
    assert len(windows) > 1
    window = windows[0].double()
    with torch.no_grad():
        labels = model(window[None])[0].argmax(0)
    c = int(labels[0, 0])
    activation = segment_activation(model, [window], [(0, 0)], labels, [c])
    step = 1e-6
    hooks, seen = [], []

    def move(_, inputs):
        if not any(inputs[0] is known for known in seen):
            seen.append(inputs[0])
        first = 16 * next(i for i, known in enumerate(seen) if known is inputs[0])
        return (inputs[0] + step * activation.gradients[0, first : first + 16],)

    def score():
        with torch.no_grad():
            return model(window[None])[0, c][labels == c].sum()

    before = score()
    hooks = [level.register_forward_pre_hook(move) for level in model.backbone.resize]
    after = score()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close((after - before) / step, (activation.gradients**2).sum(), rtol=1e-2, atol=0)


def test_maps_of_windows_are_put_together():
    whole = torch.arange(48.0).reshape(6, 8)
    starts = [(top, left) for top in (0, 8, 16) for left in (0, 24, 32)]
    cells = Cells((32, 32), starts)
    for top, left in starts:
        cells.add((top, left), whole[top // 8 : top // 8 + 4, left // 8 : left // 8 + 4])
    assert cells.size == (48, 64)
    assert torch.equal(cells.mean(), whole)
    assert cells.windows_at_pixels()[0, 0] == 1
    assert cells.windows_at_pixels()[20, 40] == 6
    odd = Cells((30, 30), [(0, 0), (7, 25)])  # windows of 4 x 4 cells that begin between cells
    odd.add((0, 0), torch.ones(4, 4))
    odd.add((7, 25), torch.ones(4, 4))
    assert odd.mean().shape == (5, 7)
    assert odd.mean().unique().tolist() == [0, 1]


def small_detector(heads: str = "mask_rcnn"):
    """A detector with two proposals in opposite corners, which are its boxes: no box is shifted."""
    torch.manual_seed(0)
    backbone = vim.VisionMamba(img_size=96, num_classes=0, **TINY_MODEL | {"cls_position": "none"})
    settings = DetectionConfig(**SMALL_HEADS | {"heads": heads, "scales": (1.0, 0.5)})
    model = build_detector(backbone, 2, settings, (96, 96), (0.5,) * 3, (0.25,) * 3).eval()
    proposals = torch.tensor([[0.0, 0.0, 16.0, 16.0], [56.0, 72.0, 72.0, 88.0]])
    model.rpn = Proposals(proposals)
    stages = model.roi_heads.stages if heads == "cascade" else [model.roi_heads]
    for stage in stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    return model


class Proposals(nn.Module):
    def __init__(self, boxes: torch.Tensor) -> None:
        super().__init__()
        self.boxes = boxes

    def forward(self, images, features, targets=None):
        return [self.boxes], {}


@pytest.mark.parametrize("heads", ["mask_rcnn", "cascade"])
@pytest.mark.parametrize("method", ["hirescam", "elementwise"])
def test_the_activation_of_a_box_is_where_the_box_is(heads, method):
    image = torch.rand(3, 96, 80, generator=torch.Generator().manual_seed(0))
    found, activation = box_activation(small_detector(heads), image, number=4, score=0.0)
    assert activation.shape == (96, 80)
    maps = activation.maps(method)
    assert len(maps) == len(found["boxes"]) == 4
    for box, values in zip(found["boxes"].tolist(), maps, strict=True):
        upper, lower = values[:40, :40].max(), values[40:, 40:].max()
        inside, outside = (upper, lower) if box[0] < 40 else (lower, upper)
        assert inside == 1
        assert outside == 0


def test_boxes_of_one_class():
    model, image = small_detector(), torch.rand(3, 96, 96)
    found, activation = box_activation(model, image, label=2, score=0.0)
    assert found["labels"].tolist() == [2, 2]
    assert found["scores"][0] >= found["scores"][1]
    assert len(activation.gradients) == 2
    assert activation.gradients.any()


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    _, _, activation = explain_colours(small_segmenter(), [0], segmentation__short_side=None)
    maps = activation.maps(method)
    assert maps.shape == (1, 48, 40)
    assert maps.isfinite().all()
    assert 0 <= maps.min() <= maps.max() <= 1


@pytest.mark.parametrize("kind", ["segmenter", "detector"])
def test_the_model_is_left_as_it_was(kind):
    model = small_segmenter() if kind == "segmenter" else small_detector()
    model.train()
    model.backbone.model.layers[0].eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    if kind == "segmenter":
        segment_activation(model, [torch.zeros(3, 32, 32)], [(0, 0)], torch.ones(32, 32).long(), [1])
    else:
        box_activation(model, torch.zeros(3, 40, 40), score=0.0)
    assert model.training
    assert not model.backbone.model.layers[0].training
    assert all(p.requires_grad for p in model.parameters())
    assert [p is first for p in model.parameters() if p.grad is not None] == [True]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input():
    model, window, labels = small_segmenter(), torch.zeros(3, 32, 32), torch.ones(32, 32).long()
    for changes, message in (
        ({"classes": [3]}, "target must be from 0 to 2, got 3"),
        ({"classes": [1, 2]}, "classes must be predicted in the image, got 2"),
        ({"classes": []}, "classes must be predicted in the image, got none"),
        ({"windows": []}, "windows must be at least one with a start each, got 0 and 1 starts"),
        ({"windows": [torch.zeros(1, 32, 32)]}, r"images must be \(batch, 3, height, width\)"),
    ):
        arguments = {"windows": [window], "starts": [(0, 0)], "labels": labels, "classes": [1]} | changes
        with pytest.raises(ValueError, match=message):
            segment_activation(model, **arguments)
    with pytest.raises(TypeError, match="segmentation model of vim, got Linear"):
        segment_activation(nn.Linear(1, 1), [window], [(0, 0)], labels, [1])
    with pytest.raises(TypeError, match="detector of vim, got Linear"):
        box_activation(nn.Linear(1, 1), window)
    with pytest.raises(ValueError, match=r"must have an object of class 1 with a score of at least 1\.5"):
        box_activation(small_detector(), window, label=1, score=1.5)
    with pytest.raises(ValueError, match="number must be an integer >= 1, got 0"):
        box_activation(small_detector(), window, number=0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        box_activation(small_detector(), window)


@pytest.fixture(scope="module")
def segmentation_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("segmentation")
    pairs = write_pairs(root / "pairs", {"train": 16, "val": 2})
    config = tiny_config(
        **TINY_SEGMENTER,
        data__dataset="pairs",
        data__path=str(pairs),
        segmentation__classes=CLASSES,
        optim__lr=1e-2,
        epochs=15,
        loss__label_smoothing=0.0,
    )
    Trainer(config, RunFolder(root / "run"), Console(quiet=True)).fit()
    return root / "run", pairs / "images" / "val"


@pytest.fixture(scope="module")
def detection_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("detection")
    write_split(root, "train2017", plain_objects(4), images=4)
    write_split(root, "val2017", plain_objects(2, seed=1), images=2)
    Trainer(config_for(root, ema_decay=None), RunFolder(root / "run"), Console(quiet=True)).fit()
    return root / "run", root / "val2017"


@pytest.fixture
def any_score(monkeypatch):
    """Explain boxes of any score: a run of a second is sure of nothing."""
    monkeypatch.setattr(dense_explainer, "_LEAST_SCORE", 0.0)


def explain(run, images, output, *options):
    return command.main([str(run), str(images), "--output", str(output), "--device", "cpu", *options])


def test_a_segmentation_run_is_explained_class_by_class(segmentation_run, tmp_path, capsys, monkeypatch):
    run, images = segmentation_run
    drawn = []
    monkeypatch.setattr(dense_explainer, "draw_panels", lambda rows, path: drawn.append((rows, path)))
    assert explain(run, images / "0.png", tmp_path / "out", "--method", "attention", "gradcam", "hirescam") == 0
    (((first, *rows), path),) = drawn
    assert path == tmp_path / "out" / "0.png.png"
    assert [panel.title for panel in first] == ["image", "prediction", "attention of all patches"]
    shares = [float(panel.title.split("(")[1].split()[0]) for panel in rows[0]]
    assert len(shares) > 1
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    for method, row in zip(("gradcam", "hirescam"), rows, strict=True):
        for panel in row:
            assert panel.title.startswith(f"{method}: ")
            assert panel.values.shape == panel.outline.shape == panel.picture.shape[1:] == (36, 40)
            assert 100 * panel.outline.float().mean() == pytest.approx(
                float(panel.title.split("(")[1].split()[0]), abs=0.1
            )
    assert capsys.readouterr().out.startswith(f"{images / '0.png'}: {rows[0][0].title.split()[1]} ")


def test_a_detection_run_is_explained_box_by_box(detection_run, tmp_path, any_score, monkeypatch):
    run, images = detection_run
    drawn = []
    monkeypatch.setattr(dense_explainer, "draw_panels", lambda rows, path: drawn.append(rows))
    assert explain(run, images, tmp_path / "out", "--topk", "3", "--method", "gradcam", "eigencam") == 0
    assert len(drawn) == 2
    for first, row in drawn:
        assert [panel.title for panel in first] == ["image", "prediction", "eigencam"]
        scores = [float(panel.title.split("(")[1].split()[0]) for panel in row]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert all(panel.outline.shape == (32, 48) and panel.outline.any() for panel in row)
        assert row[0].values.shape == (21, 32), "at the size in which the model sees the image"


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_every_method_draws(task, segmentation_run, detection_run, any_score, tmp_path):
    run, images = segmentation_run if task == "segmentation" else detection_run
    trained, drawn = load_trained_model(str(run)), set()
    for method in DENSE_EXPLANATIONS:
        path = tmp_path / f"{method}.png"
        DenseExplainer(trained, CPU, [method]).draw(Image.open(images / "0.png"), path)
        with Image.open(path) as picture:
            assert picture.size[0] > 500
        drawn.add(path.read_bytes())
    assert len(drawn) == len(DENSE_EXPLANATIONS)


def test_attention_is_what_all_patches_take(segmentation_run, tmp_path, monkeypatch):
    run, _ = segmentation_run
    drawn = []
    monkeypatch.setattr(dense_explainer, "draw_panels", lambda rows, path: drawn.append(rows))
    trained = load_trained_model(str(run))
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    DenseExplainer(trained, CPU, ["attention"]).draw(Image.fromarray(image), tmp_path / "a.png")
    _, (window,), _ = predictor_of(trained.model, data__mean=(0.4,), data__std=(0.2,)).windows(
        torch.from_numpy(image).permute(2, 0, 1)
    )
    matrix = hidden_attention(trained.model.backbone.model, window[None], absolute=True).matrices[-1, 0]
    expected = F.interpolate(matrix.mean(0).reshape(1, 1, 4, 4), (32, 32), mode="bilinear")[0, 0]
    torch.testing.assert_close(drawn[0][0][2].values, expected)


def test_one_class_alone(segmentation_run, detection_run, tmp_path, any_score, capsys):
    run, images = segmentation_run
    trained = load_trained_model(str(run))
    for target in ("red", "0"):
        ((name, _),) = DenseExplainer(trained, CPU, ["gradcam"], target).draw(
            Image.open(images / "0.png"), tmp_path / "a.png"
        )
        assert name == "red"
    run, images = detection_run
    trained = load_trained_model(str(run))
    name = trained.class_names[
        int(ObjectFinder(trained, CPU).find(Image.open(images / "0.png"), 0.0)["labels"][-1]) - 1
    ]
    found = DenseExplainer(trained, CPU, ["gradcam"], name, 2).draw(Image.open(images / "0.png"), tmp_path / "b.png")
    assert {name for name, _ in found} == {name}


def test_an_image_without_the_class_or_a_box_is_skipped_by_name(segmentation_run, detection_run, tmp_path, capsys):
    run, images = segmentation_run
    Image.new("RGB", (40, 36), (60, 200, 90)).save(tmp_path / "ground.png")
    assert explain(run, tmp_path / "ground.png", tmp_path / "out", "--target", "blue") == 1
    captured = capsys.readouterr()
    assert f"{tmp_path / 'ground.png'} is skipped: no pixel of it is predicted as 'blue'" in captured.err
    assert "1 of 1 images were skipped" in captured.err
    run, images = detection_run
    assert explain(run, images / "0.png", tmp_path / "out", "--target", "bee") == 1
    assert "is skipped: no object of class 'bee' in it has a score of at least 0.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "saliency"], "method must be one of ['attention', 'rollout', 'gradcam', "),
        (["--method", "saliency"], "for task '{task}', got 'saliency'"),
        (["--target", "cow"], "target must be a class name or a number from 0 to 2, got 'cow': "),
        (["--topk", "0"], "topk must be >= 1, got 0"),
    ],
)
def test_bad_options(task, options, message, segmentation_run, detection_run, tmp_path, capsys):
    run, images = segmentation_run if task == "segmentation" else detection_run
    assert explain(run, images, tmp_path / "out", *options) == 2
    assert message.format(task=task) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
