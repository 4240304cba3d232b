"""Which images are in which batch, on any number of processes."""

from __future__ import annotations

from collections import Counter

import pytest

from vim.data.order import EvalOrder, TrainOrder


def positions(order, epoch=0, first_batch=0):
    order.set_epoch(epoch, first_batch)
    return [[place.position for place in batch] for batch in order]


def images(order, epoch=0):
    order.set_epoch(epoch)
    return [place.image for batch in order for place in batch]


def test_a_step_is_dealt_out_to_its_micro_batches():
    assert positions(TrainOrder(13, 6, 2)) == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert positions(TrainOrder(13, 6, 2), first_batch=4) == [[7, 10], [8, 11]]


def test_an_epoch_shows_each_image_once_but_for_those_beyond_the_last_whole_step():
    order = TrainOrder(100, 32, 8)
    assert (order.steps, len(order)) == (3, 12)
    first, second = images(order, 0), images(order, 1)
    assert len(set(first)) == len(first) == 96
    assert first != second
    assert images(order, 0) == first
    assert images(TrainOrder(100, 32, 8, seed=1), 0) != first


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_what_one_accumulates(world_size):
    alone = positions(TrainOrder(200, 32, 4))
    shares = [TrainOrder(200, 32, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [batch for row in zip(*map(positions, shares), strict=True) for batch in row] == alone
    numbers = sorted(order.number(batch) for order in shares for batch in range(len(order)))
    assert numbers == list(range(len(alone)))


def test_copies_of_an_image_are_in_one_step_and_in_different_micro_batches():
    order = TrainOrder(96, 48, 12, repeats=3)
    order.set_epoch(0)
    batches = [[place.image for place in batch] for batch in order]
    counts = Counter(image for batch in batches for image in batch)
    assert sorted(counts.values()) == [3] * 32
    assert all(len(set(batch)) == 12 for batch in batches)
    for step in (batches[:4], batches[4:]):
        assert set(Counter(image for batch in step for image in batch).values()) == {3}


def test_the_length_of_an_epoch_is_cut_as_the_original_cuts_it():
    """1,281,167 images // 256 * 256 / 8 for each of 8 GPUs, in batches of 128."""
    assert TrainOrder(1_281_167, 1024, 128, repeats=3, rounding=256).steps == 1_281_024 // 8 // 128
    assert TrainOrder(1000, 8, 4, repeats=3, rounding=256).steps == 96
    assert TrainOrder(1000, 8, 4, repeats=3).steps == 125
    assert TrainOrder(200, 8, 4, repeats=3, rounding=256).steps == 25  # less than the rounding: all of them


def test_evaluation_shows_each_image_once_on_any_number_of_processes():
    for world_size in (1, 2, 5, 12):
        orders = [EvalOrder(11, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
        shown = [place.image for order in orders for batch in order for place in batch]
        assert sorted(shown) == list(range(11))
        assert all(len(order) == len(list(order)) for order in orders)


def test_a_step_that_cannot_be_shared_evenly_or_filled_is_refused():
    with pytest.raises(ValueError, match=r"multiple of micro_batch_size = 4 times the number of processes, 3, got 32"):
        TrainOrder(100, 32, 4, world_size=3)
    with pytest.raises(ValueError, match="batch_size must be <= the 20 training images that an epoch shows, got 32"):
        TrainOrder(20, 32, 4)
