"""Build the native kernels before their first use: `python -m vim.build [--force] [--cuda [ARCHITECTURE ...]]`.

`--into FOLDER` also copies them for machines that find them there, with VIM_PREBUILT=FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vim.ops.build.compilation import Recipe


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
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="copy the libraries here; with VIM_PREBUILT=FOLDER a machine with other compilers or another PyTorch "
        "uses them instead of building",
    )
    options = parser.parse_args(arguments)

    from vim.ops.build import compilation, cuda_recipe

    try:
        architectures = [cuda_recipe.parse_architecture(text) for text in options.cuda or ()]
    except ValueError as error:
        parser.error(f"--cuda: {error}")
    try:
        print(_library(compilation.cpu_recipe(), options))
        if options.cuda is not None:
            chosen = architectures or cuda_recipe.visible_architectures() or cuda_recipe.DEFAULT_ARCHITECTURES
            print(_library(cuda_recipe.recipe(chosen), options))
    except compilation.BuildError as error:
        print(f"vim.build: {error}", file=sys.stderr)
        return 1
    return 0


def _library(recipe: Recipe, options: argparse.Namespace) -> Path:
    from vim.ops.build import compilation

    found = None if options.force else compilation.find_library(recipe)
    library = found or compilation.build(recipe, _report, options.force)
    return library if options.into is None else compilation.keep_prebuilt(library, recipe, options.into)


def _report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.build", main, files_matter=True)
