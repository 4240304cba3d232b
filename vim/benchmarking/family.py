"""Benchmark of other packages' models on `vim.compat`, beside their slow paths or models of their FLOPs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from vim import compat
from vim.benchmarking.measuring import interleave, probe_machine, summarise
from vim.benchmarking.report import make_record, write_record

# Convolutions and attention in four stages, as in MambaVision (CoAtNet, CAFormer), and convolutions alone (ConvNeXt).
PEERS = ("coatnet_0_224", "caformer_s18", "convnext_tiny")
_SIZE, _VOCABULARY, _WIDTH = 224, 50280, 768
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyRow:
    """One measurement; seconds are of one call, batch 1, float32. `note` says what the call does."""

    task: str
    model: str
    note: str
    rounds: int
    seconds_median: float
    seconds_min: float


def compare_families(
    layers: int, prompt: int, new_tokens: int, rounds: int, seconds: float, threads: int, output: str
) -> None:
    """Measure the models and print a table; `run_family_benchmark` describes the arguments."""
    if threads:
        torch.set_num_threads(threads)
    rows, missing, probes = [], {}, [probe_machine()]
    for task, make in (
        ("language model", lambda: _language_calls(layers, prompt, new_tokens)),
        ("image", _vision_calls),
    ):
        try:
            tasks = make()
        except ImportError as error:
            missing[task] = str(error)
            continue
        for name, (calls, notes) in tasks.items():
            with torch.inference_mode():
                times = interleave(calls, rounds, seconds)
            rows += [
                FamilyRow(task=name, model=model, note=notes[model], **summarise(taken))
                for model, taken in times.items()
            ]
            probes.append(probe_machine())
    record = make_record(rows, probes, missing)
    sys.stdout.write(write_record(record, _table(record["rows"]), output) + "\n")


def load_transformers(family: str, served: bool) -> ModuleType:
    """Load a model file of transformers under a name of its own; its imports find the stand-ins, or nothing.

    Args:
        family: Name of the file in `transformers.models`, "mamba" or "falcon_mamba".
        served: Have the imports of its fast path find the stand-ins of `vim.compat`.

    Raises:
        ImportError: transformers is not installed or has no such file.
    """
    found = importlib.util.find_spec(f"transformers.models.{family}.modeling_{family}")
    if found is None or found.origin is None:
        raise ImportError(f"transformers has no model {family!r}")
    name = f"{found.name}_{'served' if served else 'slow'}"
    spec = importlib.util.spec_from_file_location(name, found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with compat.as_mamba_ssm() if served else contextlib.nullcontext():
        spec.loader.exec_module(module)
    return module


def _language_calls(layers: int, prompt: int, new_tokens: int) -> dict[str, tuple[Calls, dict[str, str]]]:
    """Return the calls of a prefill and of a generation, with a note on each."""
    if importlib.util.find_spec("mamba_ssm") is not None:
        raise ImportError("mamba_ssm is there, so transformers would take its kernels on both sides")
    transformers = importlib.import_module("transformers")
    config = transformers.MambaConfig(vocab_size=_VOCABULARY, hidden_size=_WIDTH, num_hidden_layers=layers)
    tokens = torch.randint(0, _VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(0))
    models = {}
    for name, served in (("on vim.compat", True), ("slow path", False)):
        models[name] = load_transformers("mamba", served).MambaForCausalLM(config).eval()
    models["slow path"].load_state_dict(models["on vim.compat"].state_dict())

    def prefill(model: Any) -> Callable[[], Any]:
        return lambda: model(tokens, use_cache=True, logits_to_keep=1)

    def generate(model: Any) -> Callable[[], Any]:
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return lambda: model.generate(tokens[:, :16], **settings)

    first = {name: prefill(model) for name, model in models.items()}
    first["matrix products alone"] = lambda: _products(models["on vim.compat"], prompt)
    notes = dict.fromkeys(first, f"prefill of {prompt} tokens")
    notes["matrix products alone"] = "torch's, which both sides share"
    return {
        f"Mamba, {layers} layers of {_WIDTH}, prefill": (first, notes),
        f"Mamba, {layers} layers of {_WIDTH}, generation": (
            {name: generate(model) for name, model in models.items()},
            dict.fromkeys(models, f"{new_tokens} tokens after 16"),
        ),
    }


def _products(model: Any, prompt: int) -> None:
    """Run the matrix products of a prefill, and nothing else."""
    hidden = torch.randn(1, prompt, _WIDTH)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        inner = mixer.in_proj(hidden)[..., : mixer.intermediate_size]
        steps = mixer.x_proj(inner)[..., : mixer.time_step_rank]
        hidden = mixer.out_proj((mixer.dt_proj.weight @ steps.mT).mT)
    model.lm_head(hidden[:, -1:])


def _vision_calls() -> dict[str, tuple[Calls, dict[str, str]]]:
    """Return the calls of MambaVision-T and its peers for one image, with their FLOPs as notes."""
    with compat.as_mamba_ssm():
        package = importlib.import_module("mambavision.models.mamba_vision")
    models = {"MambaVision-T on vim.compat": package.mamba_vision_T().eval()}
    models.update({name: timm.create_model(name).eval() for name in PEERS})
    image = torch.randn(1, 3, _SIZE, _SIZE)

    def infer(model: Any) -> Callable[[], Any]:
        return lambda: model(image)

    calls = {name: infer(model) for name, model in models.items()}
    notes = {}
    for name, call in calls.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        notes[name] = f"{counter.get_total_flops() / 2e9:.1f} GMACs"
    return {f"image of {_SIZE} px": (calls, notes)}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| task | model | | ms, median (least) | time / first |", "|---|---|---|---|---|"]
    for row in rows:
        first = next(other for other in rows if other["task"] == row["task"])
        milliseconds = f"{1e3 * row['seconds_median']:.0f} ({1e3 * row['seconds_min']:.0f}, n={row['rounds']})"
        ratio = row["seconds_median"] / first["seconds_median"]
        lines.append(f"| {row['task']} | {row['model']} | {row['note']} | {milliseconds} | {ratio:.2f} |")
    return lines
