"""Build the native CPU kernels ahead of their first use: `python -m vim.build [--force]`."""

from __future__ import annotations

import argparse
import sys

from vim.ops import _native_build


def main(arguments: list[str] | None = None) -> int:
    """Build the library where there is none yet, and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m vim.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="build even where there is a library already")
    options = parser.parse_args(arguments)
    try:
        path = None if options.force else _native_build.find_library()
        if path is None:
            path = _native_build.build(lambda line: print(line, flush=True), force=options.force)
    except _native_build.BuildError as error:
        print(f"vim.build: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
