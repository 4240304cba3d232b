"""The frame of the command lines: `--help` at once, closed pipes, one scheme of exit codes."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python
from vim import __main__ as listing
from vim.runtime import command


def test_the_list_has_every_command(capsys):
    assert listing.main([]) == 0
    printed = capsys.readouterr().out
    modules = {path.stem for path in Path(listing.__file__).parent.glob("*.py") if "\nif __name__" in path.read_text()}
    assert set(listing.COMMANDS) == modules - {"__main__"} | {"explain"}
    for name in listing.COMMANDS:
        assert f"python -m vim.{name} " in printed


@pytest.mark.parametrize("module", ["vim", *(f"vim.{name}" for name in listing.COMMANDS)])
def test_help_does_not_wait_for_pytorch(module):
    """Processor time, which other programs do not change; importing PyTorch takes more than all of these together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import runpy, sys; sys.argv = ['-m', '--help']; sys.orig_argv = ['python', '-m', {module!r}, '--help']\n"
    code += "import vim\n"
    code += f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    code += "except SystemExit as end: code = end.code\n"
    code += 'sys.stderr.write(f\'{code} {sorted({"torch", "timm", "numpy"} & set(sys.modules))}\')\n'
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "0 []"
    assert done.stdout.startswith(f"usage: python -m {module} ")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "-m", "vim.train", "--x", "y"], True),
        (["python", "-u", "-mvim", "--x", "y"], True),
        (["python", "-um", "vim.explain", "--x", "y"], True),
        (["python", "-m", "other", "--x", "y"], False),
        (["python", "-m", "vimeo", "--x", "y"], False),
    ],
)
def test_a_command_line_is_recognised(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--x", "y"])
    monkeypatch.setattr(sys, "orig_argv", words)
    assert command.starts_command() == expected
    monkeypatch.setattr(sys, "argv", ["vim.train", "--x", "y"])
    assert not command.starts_command()


def test_the_names_of_the_package_are_there_in_a_command_too():
    code = "import sys; sys.argv = ['-m']; sys.orig_argv = ['python', '-m', 'vim']\n"
    code += "import vim; assert 'vim.ops' not in sys.modules\n"
    code += "print(all(hasattr(vim, name) for name in vim.__all__), hasattr(vim, 'x'))"
    assert run_python("-c", code).split() == ["True", "False"]


@pytest.mark.parametrize(("main", "code"), [(lambda: 0, 0), (lambda: 2, 2)])
def test_exit_codes_are_passed_on(main, code, monkeypatch):
    monkeypatch.setattr(command, "end_with_reader", lambda: None)
    with pytest.raises(SystemExit) as caught:
        command.run_command("vim.x", main, files_matter=False)
    assert caught.value.code == code


def test_ctrl_c_is_one_line_and_code_130(monkeypatch, capsys):
    monkeypatch.setattr(command, "end_with_reader", lambda: None)

    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        command.run_command("vim.x", main, files_matter=False)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "vim.x: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
@pytest.mark.parametrize(("files_matter", "code"), [(True, 0), (False, -signal.SIGPIPE)])
def test_a_reader_that_has_gone_is_no_error(files_matter, code):
    """A command that writes files goes on to its end; another one ends, and both silently."""
    program = "import sys; from vim.runtime.command import run_command\n"
    program += "def main():\n    print('x' * 100000, flush=True); print('y', flush=True)\n    return 0\n"
    program += f"run_command('vim.x', main, {files_matter})"
    package = "import sys, types; vim = sys.modules['vim'] = types.ModuleType('vim'); vim.__path__ = ['vim']\n"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-c", package + program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (code, "")


@pytest.mark.parametrize("name", listing.COMMANDS)
def test_every_command_runs_in_the_frame(name):
    file = ROOT / "vim" / (f"{name}.py" if name != "explain" else "explain/__main__.py")
    started = r"(main|partial\(main, \w+=\w+\))"
    assert re.search(rf'run_command\("vim.{name}", {started}, files_matter=(True|False)\)', file.read_text())
