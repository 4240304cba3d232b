"""The options of `python -m vim.benchmark`, apart from what measures, so that `--help` does not wait for PyTorch."""

from __future__ import annotations

from typing import Literal

Mode = Literal["inference", "training"]


def run_benchmark(
    models: list[str] = ["vim_tiny_patch16_224", "deit_tiny_patch16_224"],  # noqa: B006
    sizes: list[int] = [224, 512],  # noqa: B006
    batches: list[int] = [1],  # noqa: B006
    dtypes: list[str] = ["float32"],  # noqa: B006
    modes: list[Mode] = ["inference"],  # noqa: B006
    device: str = "cpu",
    threads: int = 0,
    rounds: int = 20,
    seconds: float = 30.0,
    output: str = "",
) -> None:
    """Measure models at sizes, batches, dtypes and modes, and print a table.

    Args:
        models: timm names, each with a variant behind a colon if wanted: frozen, compiled, modules, reference, triton,
            mamba_ssm, math, graph. Every other model is compared with the first.
        sizes: Sides of square images, in pixels.
        batches: Images in a call.
        dtypes: float32, bfloat16 or float16. Inference converts the model; training uses autocast.
        modes: inference, or training (forward and backward, no optimizer).
        device: cpu or cuda.
        threads: Threads on the CPU; 0 leaves what PyTorch chose.
        rounds: Calls to each model in a case, after two that do not count.
        seconds: A case ends after this time, but not before three rounds.
        output: Path without a suffix: .json, .md and .png are written there. Empty: only print.
    """
    from vim.benchmarking.models import compare_models

    compare_models(models, sizes, batches, dtypes, modes, device, threads, rounds, seconds, output)


def run_ops_benchmark(rounds: int = 10, seconds: float = 8.0, threads: int = 0, output: str = "") -> None:
    """Measure the scan and the convolution beside what is installed of other implementations, and print a table.

    Args:
        rounds: Calls of each implementation at a shape, in turn, after one that does not count.
        seconds: A shape ends after this time, but not before two rounds.
        threads: Threads on the CPU; 0 leaves what PyTorch chose.
        output: Path without a suffix: .json and .md are written there. Empty: only print.
    """
    from vim.benchmarking.operations import compare_ops

    compare_ops(rounds, seconds, threads, output)


def run_family_benchmark(
    layers: int = 24,
    prompt: int = 512,
    new_tokens: int = 32,
    rounds: int = 7,
    seconds: float = 60.0,
    threads: int = 0,
    output: str = "",
) -> None:
    """Measure transformers' Mamba and MambaVision on the stand-ins of `vim.compat`, and print a table.

    Args:
        layers: Layers of the language model; 24 is the 130M shape.
        prompt: Tokens of the prefill.
        new_tokens: Tokens that one call generates, after 16.
        rounds: Calls of each model in a task, in turn, after one that does not count.
        seconds: A task ends after this time, but not before two rounds.
        threads: Threads on the CPU; 0 leaves what PyTorch chose.
        output: Path without a suffix: .json and .md are written there. Empty: only print.
    """
    from vim.benchmarking.family import compare_families

    compare_families(layers, prompt, new_tokens, rounds, seconds, threads, output)
