"""The teacher sees the same images in its own normalisation and size, and the loss is the formula of the papers."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.tasks.test_classification_loss import Fixed
from tests.tiny_runs import change, tiny_config
from vim.tasks.classification_loss import ClassificationLoss
from vim.tasks.distillation import Teacher
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

CPU = torch.device("cpu")
NAMES = tuple(str(label) for label in range(10))


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run with another image size and normalisation than the students here."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny_config(model__img_size=24, data__mean=(0.5,), data__std=(0.25,), ema_decay=None)
    trainer = Trainer(config, RunFolder(folder), Console(quiet=True))
    trainer.fit()
    return folder, trainer.model.eval()


def test_the_teacher_sees_the_images_in_its_own_size_and_normalisation(teacher_run):
    folder, model = teacher_run
    pixels = torch.rand(3, 1, 1, 1).expand(3, 1, 24, 24)  # one colour each: the same in any size
    config = tiny_config(distill__teacher=str(folder), data__mean=(0.3,), data__std=(0.4,))
    answer = Teacher(config, NAMES, CPU).answer((pixels[:, :, :16, :16] - 0.3) / 0.4)
    with torch.no_grad():
        expected = model((pixels - 0.5) / 0.25)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)
    assert not answer.requires_grad


def test_a_teacher_of_other_classes_is_refused_even_if_they_are_as_many(teacher_run):
    config = tiny_config(distill__teacher=str(teacher_run[0]))
    with pytest.raises(ValueError, match=r"the classes of the run in the same order, .* class 0 was '0' and is '9'"):
        Teacher(config, NAMES[::-1], CPU)
    with pytest.raises(ValueError, match=r"to the run '9' is gone and 'ten' is new"):
        Teacher(config, (*NAMES[:-1], "ten"), CPU)


@pytest.mark.parametrize(("mode", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_the_loss_is_that_of_the_labels_and_of_the_teacher_in_their_shares(teacher_run, mode, temperature):
    torch.manual_seed(0)
    folder, _ = teacher_run
    config = tiny_config(distill__teacher=str(folder), loss__label_smoothing=0.0)
    config = change(config, distill__mode=mode, distill__weight=0.3, distill__temperature=temperature)
    loss_of = ClassificationLoss(config, NAMES, CPU)
    images, labels, student = torch.randn(4, 1, 16, 16), torch.tensor([1, 5, 9, 0]), Fixed(torch.randn(4, 10))
    answer, logits = Teacher(config, NAMES, CPU).answer(images), student.logits
    if mode == "hard":
        of_teacher = nn.functional.cross_entropy(logits, answer.argmax(1))
    else:
        p, q = (answer / temperature).softmax(1), (logits / temperature).softmax(1)
        of_teacher = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    loss, _ = loss_of(student, images, labels)
    expected = 0.7 * nn.functional.cross_entropy(logits, labels) + 0.3 * of_teacher
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert student.logits.grad.abs().sum() > 0


def test_a_student_of_a_whole_weight_follows_its_teacher(teacher_run, tmp_path):
    folder, _ = teacher_run
    config = tiny_config(epochs=3, distill__teacher=str(folder), distill__weight=1.0, optim__lr=5e-3)
    trainer = Trainer(config, RunFolder(tmp_path), Console(quiet=True))
    trainer.fit()
    losses = [row["train_loss"] for row in trainer.position.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_teacher_of_other_classes_or_channels_is_refused(teacher_run, tmp_path):
    folder, _ = teacher_run
    config = tiny_config(distill__teacher=str(folder))
    with pytest.raises(ValueError, match=r"distill.teacher must have as many classes as the run, 3, got .* with 10"):
        Teacher(config, NAMES[:3], CPU)
    with pytest.raises(ValueError, match=r"distill.teacher must have as many channels as the run, 3, got .* with 1"):
        Teacher(change(config, model__in_chans=3), NAMES, CPU)
    with pytest.raises(ValueError, match="there is no run folder, checkpoint or timm model 'nobody'"):
        Teacher(change(config, distill__teacher="nobody"), NAMES, CPU)


def test_a_teacher_leaves_the_random_numbers_of_the_run_as_they_are(teacher_run):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Teacher(tiny_config(distill__teacher=str(teacher_run[0])), NAMES, CPU)
    assert torch.equal(torch.rand(3), expected)
