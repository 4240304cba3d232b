"""Windows over an image: they cover it, averages are averages, and memory does not grow with the height."""

from __future__ import annotations

import pytest
import torch

from vim.inference.sliding import slide


def run(windows):
    """Two classes: the first channel, and the mean of the window, which depends on where the window is."""
    return torch.stack([windows[:, 0], windows.mean(dim=(1, 2, 3))[:, None, None].expand_as(windows[:, 0])], dim=1)


def whole(image, window, stride):
    """The average over the windows, the plain way."""
    height, width = image.shape[-2:]
    sums, counts = torch.zeros(2, height, width), torch.zeros(height, width)
    tops = [min(top, height - window[0]) for top in range(0, max(1, height - window[0] + stride[0]), stride[0])]
    lefts = [min(left, width - window[1]) for left in range(0, max(1, width - window[1] + stride[1]), stride[1])]
    for top in sorted(set(tops)):
        for left in sorted(set(lefts)):
            part = slice(top, top + window[0]), slice(left, left + window[1])
            sums[:, part[0], part[1]] += run(image[None, :, part[0], part[1]])[0]
            counts[part[0], part[1]] += 1
    return sums / counts


@pytest.mark.parametrize("size", [(16, 12), (17, 12), (40, 31), (33, 100), (16, 13)])
@pytest.mark.parametrize("stride", [(8, 6), (16, 12), (5, 11), (1, 4)])
def test_overlaps_are_averaged_and_every_row_comes_once(size, stride):
    torch.manual_seed(0)
    image = torch.rand(3, *size)
    rows = list(slide(run, image, (16, 12), stride, batch=3))
    assert [top for top, _ in rows] == [sum(part.shape[1] for _, part in rows[:i]) for i in range(len(rows))]
    torch.testing.assert_close(torch.cat([part for _, part in rows], dim=1), whole(image, (16, 12), stride))


def test_an_image_smaller_than_a_window_is_padded_and_cropped():
    image = torch.rand(3, 5, 7)
    ((top, scores),) = slide(run, image, (16, 12), (8, 6), batch=1)
    assert top == 0
    assert scores.shape == (2, 5, 7)
    torch.testing.assert_close(scores[0], image[0])
    torch.testing.assert_close(scores[1], (image.sum() / (3 * 16 * 12)).expand(5, 7))


def test_an_image_of_4000_pixels_is_done_in_strips():
    largest = 0
    batches = []

    def counted(windows):
        batches.append(len(windows))
        return run(windows)

    for _, scores in slide(counted, torch.rand(3, 4000, 600), (64, 64), (42, 42), batch=4):
        largest = max(largest, scores.shape[1])
    assert largest <= 64
    assert max(batches) == 4
