"""Build the native kernels before their first use: `python -m vim.build [--force] [--cuda [ARCHITECTURE ...]]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vim.ops.build.compilation import Recipe
    from vim.ops.build.cuda_recipe import Architecture


def main(arguments: list[str] | None = None) -> int:
    """Build the missing libraries and print their paths; return 0, or 1 if a library cannot be built."""
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

    from vim.ops.build import compilation, cuda_recipe

    try:
        architectures = [cuda_recipe.parse_architecture(text) for text in options.cuda or ()]
    except ValueError as error:
        parser.error(f"--cuda: {error}")
    try:
        print(_find_or_build(compilation.cpu_recipe(), options.force))
        if options.cuda is not None:
            print(_find_or_build(_cuda_recipe(architectures), options.force))
    except compilation.BuildError as error:
        print(f"vim.build: {error}", file=sys.stderr)
        return 1
    return 0


def _cuda_recipe(wanted: list[Architecture]) -> Recipe:
    from vim.ops.build import cuda_recipe

    return cuda_recipe.recipe(wanted or cuda_recipe.visible_architectures() or cuda_recipe.DEFAULT_ARCHITECTURES)


def _find_or_build(recipe: Recipe, force: bool) -> Path:
    from vim.ops.build import compilation

    found = None if force else compilation.find_library(recipe)
    return found or compilation.build(recipe, _report, force)


def _report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.build", main, files_matter=True)
