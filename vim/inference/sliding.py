"""Dense predictions for images of any size, by windows of the model's input size; memory is bounded by their rows."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def slide(
    run: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], stride: tuple[int, int], batch: int
) -> Iterator[tuple[int, Tensor]]:
    """Run a dense model over the windows of an image, and average where they overlap.

    Windows begin every `stride` pixels; the last ones end at the border. An image smaller than a window is padded with
    zeros, below and on the right.

    Args:
        run: Maps windows (windows, channels, height, width) to scores (windows, classes, height, width).
        image: (channels, height, width), normalised.
        window: Height and width of a window.
        stride: Step between windows, down and across; at most the window.
        batch: Windows in one call of `run`.

    Yields:
        Finished rows from top to bottom: the first row, and scores (classes, rows, width), float32. Scores of one row
        of windows are in memory at a time.
    """
    height, width = image.shape[-2:]
    padded = pad_to_window(image, window)
    tops, lefts = window_starts(padded, window, stride)
    across = torch.zeros(padded.shape[-1], device=image.device)
    for left in lefts:
        across[left : left + window[1]] += 1
    sums: Tensor | None = None  # of the rows from `tops[index]` on
    times = torch.zeros(window[0], device=image.device)
    for index, top in enumerate(tops):
        scores = _row_of_windows(run, padded[:, top : top + window[0]], lefts, window, batch)
        if sums is not None:  # rows of the windows above that these windows share
            shared = window[0] - (top - tops[index - 1])
            scores[:, :shared] += sums[:, window[0] - shared :]
            times = F.pad(times[window[0] - shared :], (0, window[0] - shared))
        sums, times = scores, times + 1
        done = (tops[index + 1] if index + 1 < len(tops) else top + window[0]) - top
        rows = min(done, height - top)
        yield top, sums[:, :rows, :width] / (times[:rows, None] * across[:width])


def _row_of_windows(
    run: Callable[[Tensor], Tensor], strip: Tensor, lefts: Sequence[int], window: tuple[int, int], batch: int
) -> Tensor:
    """Return the sums of the scores over a row of windows, (classes, height of a window, width), float32."""
    sums: Tensor | None = None
    for first in range(0, len(lefts), batch):
        part = lefts[first : first + batch]
        scores = run(torch.stack([strip[:, :, left : left + window[1]] for left in part])).float()
        if sums is None:
            sums = scores.new_zeros(scores.shape[1], window[0], strip.shape[-1])
        for left, values in zip(part, scores, strict=True):
            sums[:, :, left : left + window[1]] += values
    assert sums is not None
    return sums


def pad_to_window(image: Tensor, window: tuple[int, int]) -> Tensor:
    """Return an image (channels, height, width) with zeros below and on the right, so that a window fits into it."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))


def window_starts(padded: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Return the first rows and the first columns of the windows of a padded image."""
    height, width = padded.shape[-2:]
    return _starts(height, window[0], stride[0]), _starts(width, window[1], stride[1])


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of the windows along a side."""
    return sorted({min(start, length - window) for start in range(0, max(1, length - window + stride), stride)})
