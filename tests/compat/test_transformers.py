"""Mamba and FalconMamba of transformers: the imports of their fast path find our functions."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from tests.helpers import TOLERANCES, assert_close
from vim.benchmarking.family import load_transformers

# What it costs: a module of transformers is loaded twice, with and without the stand-ins.
pytestmark = pytest.mark.slow
RTOL = TOLERANCES[torch.float32].gradient
transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')


@pytest.fixture(scope="module", params=["mamba", "falcon_mamba"])
def family(request):
    served, slow = load_transformers(request.param, True), load_transformers(request.param, False)
    yield {"mamba": "Mamba", "falcon_mamba": "FalconMamba"}[request.param], served, slow
    del sys.modules[served.__name__], sys.modules[slow.__name__]


def _models(family, **sizes):
    prefix, served, slow = family
    config = getattr(transformers, f"{prefix}Config")(vocab_size=200, **sizes)
    models = [getattr(module, f"{prefix}ForCausalLM")(config) for module in (served, slow)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 200, (2, count), generator=torch.Generator().manual_seed(0))


def test_generation_gives_the_tokens_of_the_slow_path(family):
    torch.manual_seed(0)
    served, slow = (model.eval() for model in _models(family, hidden_size=64, num_hidden_layers=3))
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    assert torch.equal(served.generate(_tokens(7), **settings), slow.generate(_tokens(7), **settings))


def test_training_gives_the_gradients_of_the_slow_path(family):
    torch.manual_seed(0)
    gradients = []
    for model in _models(family, hidden_size=32, num_hidden_layers=2):
        model.train()(_tokens(9), labels=_tokens(9), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[1].items():
        assert_close(gradients[0][name], wanted, RTOL, name)


def test_the_prefill_of_the_130m_shape_is_faster_by_what_the_products_leave(family):
    """Four of the 24 equal layers, in processor time: on a busy machine the clock measures other work.

    On one thread the products of matrices, the same on both sides, take three quarters of our time.
    """
    torch.manual_seed(0)
    models = _models(family, hidden_size=768, num_hidden_layers=4)
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(2):
            for model, times in zip(models, seconds, strict=True):
                start = time.process_time()
                model.eval()(_tokens(512)[:1], logits_to_keep=1)
                times.append(time.process_time() - start)
    assert min(seconds[1]) >= 2.5 * min(seconds[0]), seconds
