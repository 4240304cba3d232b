"""The frame of every command line: exit codes, Ctrl-C, and output that nobody reads to its end.

The exit codes are the same for all of them (docs/commands.md):

    0    done
    1    began, and failed or is incomplete: images that cannot be read, a full disk, a loss that is not finite
    2    did not begin: arguments or files that cannot be used, a package that is missing
    130  interrupted by Ctrl-C
"""

import re
import sys
from collections.abc import Callable
from typing import NoReturn

from vim.runtime.terminal import end_with_reader, outlive_reader

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def starts_command() -> bool:
    """Return True while Python looks for a module of this package that it was told to run (`python -m vim.train`)."""
    # Until `python OPTIONS -m NAME ARGUMENTS` has found the module, sys.argv is ["-m", *ARGUMENTS].
    if sys.argv[:1] != ["-m"]:
        return False
    name = sys.orig_argv[-len(sys.argv)]
    return re.match(r"(-\w*m)?vim(\.|$)", name) is not None


def run_command(program: str, main: Callable[[], int], files_matter: bool) -> NoReturn:
    """Run a command line and exit with its code.

    Args:
        program: Name of the module, such as `vim.predict`, for the message after Ctrl-C.
        main: The command; it returns an exit code.
        files_matter: True if the command writes files: it goes on when nobody reads its output any more (`| head`).
            False ends it silently, as other filters end.
    """
    if files_matter:
        outlive_reader()
    else:
        end_with_reader()
    try:
        code = main()
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        code = INTERRUPTED
    sys.exit(code)
