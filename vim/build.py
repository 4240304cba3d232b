"""Build the native kernels before their first use: `python -m vim.build [--force] [--cuda [ARCHITECTURE ...]]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vim.ops.build import compilation, cuda_recipe


def main(arguments: list[str] | None = None) -> int:
    """Build the missing libraries and print their paths; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vim.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="build even if the library exists")
    parser.add_argument(
        "--cuda",
        nargs="*",
        metavar="ARCHITECTURE",
        help="also build the CUDA kernels, for these architectures (such as 8.0 9.0); default: the GPUs of this "
        "machine, or 8.0 and 9.0 without a GPU. Newer GPUs run the PTX of the last one",
    )
    options = parser.parse_args(arguments)
    try:
        architectures = [cuda_recipe.parse_architecture(text) for text in options.cuda or ()]
    except ValueError as error:
        parser.error(f"--cuda: {error}")
    try:
        print(_cpu(options.force))
        if options.cuda is not None:
            print(_cuda(architectures, options.force))
    except compilation.BuildError as error:
        print(f"vim.build: {error}", file=sys.stderr)
        return 1
    return 0


def _cpu(force: bool) -> Path:
    recipe = compilation.cpu_recipe()
    found = None if force else compilation.find_library(recipe)
    return found or compilation.build(recipe, _report, force)


def _cuda(wanted: list[cuda_recipe.Architecture], force: bool) -> Path:
    chosen = wanted or cuda_recipe.visible_architectures() or cuda_recipe.DEFAULT_ARCHITECTURES
    recipe = cuda_recipe.recipe(chosen)
    found = None if force else compilation.find_library(recipe)
    return found or compilation.build(recipe, _report, force)


def _report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
