"""Draws are functions of their key, and leave no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vim.data.randomness import Draw, generator_for, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def draw_seeded(*key):
    with seeded(*key):
        return draw()


def test_what_is_drawn_inside_depends_on_the_key_alone():
    first = draw_seeded(Draw.AUGMENTATION, 0, 3, 7)
    draw()
    assert draw_seeded(Draw.AUGMENTATION, 0, 3, 7) == first
    others = [draw_seeded(Draw.AUGMENTATION, *key) for key in ((0, 3, 8), (0, 4, 7), (1, 3, 7), (2**32 - 1, 3, 7))]
    others.append(draw_seeded(Draw.ERASING, 0, 3, 7))
    assert len({number for numbers in [first, *others] for number in numbers}) == 18
    assert torch.equal(*(torch.rand(3, generator=generator_for(Draw.ORDER, 1, 2)) for _ in range(2)))


def test_what_is_drawn_outside_does_not_notice():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])

    def draw_and_fail():
        with seeded(Draw.MIXING, 1):
            raise ZeroDivisionError(draw())

    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert draw() == expected
