"""Call every op in torch.ops.vim with arguments that no caller would pass: each call must return or raise.

Usage: scripts/fuzz_ops.py [--calls N] [--seed S] [--only CALL] [--sanitize] [--emulated]

The ops are found by their schemas, so new ops are included. First, successful calls are recorded from small models and
from the ops' Python functions. Each fuzzed call changes some arguments of a recorded one: sizes, strides, dtypes,
devices, `None`, freed memory, huge numbers. An op without a recorded call gets random arguments.

--sanitize builds the kernels for AddressSanitizer and UndefinedBehaviorSanitizer. --emulated includes the CUDA kernels,
emulated on the host. The calls run in a child process. If it dies, the failure is printed with the command that replays
it, and a new process continues with the next call.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
# Python is not built for sanitizers, so its leaks are ignored. GCC's fake stack does not align 64-byte vectors.
ASAN = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:max_allocation_size_mb=512"
FAMILIES = ("_reference", "_triton", "_emulated")
# Implementations in Python are slow, and cannot overrun memory.
SLOW = ("_reference", "_triton", "recurrence")
MOST_ELEMENTS = 2**18
SECONDS_A_CALL = 1
# So that huge allocations fail at once.
MEMORY = 4 * 2**30
MOST_FAILURES = 25
# The current call: its number and its op.
PROGRESS = struct.Struct("q80s")

INTEGERS = (-(2**63), -(2**31), -64, -1, 0, 1, 2, 7, 64, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 64, 2**63 - 1)
FLOATS = (0.0, -1.0, 1e-5, 0.5, 1.0, 1e30, 1e300, float("inf"), float("nan"))
SIZES = (0, 1, 2, 3, 5, 15, 16, 17, 33, 64, 65)
HUGE = (2**12, 2**31, 2**40, 2**62)
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64),
    *(torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Sizes and dtype of a recorded tensor."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


# ---- recorded calls ----------------------------------------------------------------------------------------------


def record() -> dict[str, list[tuple[Any, ...]]]:
    """Return the arguments of successful calls, by op, with a `Kind` in place of each tensor."""
    found: dict[str, list[tuple[Any, ...]]] = collections.defaultdict(list)
    call = torch._ops.OpOverload.__call__

    def listening(op: Any, /, *args: Any, **kwargs: Any) -> Any:
        result = call(op, *args, **kwargs)
        if op.namespace == "vim" and not kwargs:
            name, kinds = op._opname, _kinds(args)
            if len(found[name]) < 40 and kinds not in found[name]:
                found[name].append(kinds)
        return result

    with mock.patch.object(torch._ops.OpOverload, "__call__", listening):
        _work()
    return found


def _kinds(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Kind(tuple(value.shape), value.dtype)
    return tuple(map(_kinds, value)) if isinstance(value, (list, tuple)) else value


def _work() -> None:
    """Run small models, forward and backward, in all dtypes, and each op alone."""
    import vim

    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 3}
    for directions, dtype in (("v2", torch.float32), ("v2", torch.bfloat16), ("v1", torch.float32)):
        model = vim.VisionMamba(**small, directions=directions).to(dtype)
        images = torch.randn(2, 3, 16, 16, dtype=dtype)
        model(images).float().sum().backward()
        for layer in model.layers:  # a hook makes a block call its modules, and with them the ops of a mixer's parts
            layer.mixer.x_proj.register_forward_hook(lambda *_: None)
        model(images).float().sum().backward()
        with torch.no_grad():
            model.eval()(images)
    torch.ops.vim.product_.default(torch.randn(9, 7), torch.randn(7, 5), torch.randn(5), False, torch.empty(9, 5))
    tokens, B = torch.randn(7, 2, 24), torch.randn(7, 2, 1, 5)
    torch.ops.vim.recurrence.default(tokens, tokens.abs(), -torch.rand(24, 5), B, B, None, None)
    u = torch.randn(2, 24, 70)
    for shape in ((2, 5, 70), (2, 3, 5, 70), (24, 5)):
        B = torch.randn(shape, requires_grad=True)
        inputs = (u.clone().requires_grad_(), u.abs(), -torch.rand(24, 5), B, B, torch.randn(24), u, torch.randn(24))
        y, state = vim.ops.selective_scan(*inputs, delta_softplus=True, return_last_state=True)
        (y.sum() + state.sum()).backward()
        forms = {"initial_state": torch.randn(2, 24, 5), "seq_idx": (torch.arange(140) // 9).int().view(2, 70)}
        vim.ops.selective_scan(*inputs, delta_softplus=True, **forms).sum().backward()
        vim.ops.causal_conv1d(inputs[0], torch.randn(24, 4), seq_idx=forms["seq_idx"]).sum().backward()
    weight = torch.randn(24, 4, requires_grad=True)
    for bias in (None, torch.randn(24)):
        vim.ops.causal_conv1d(u, weight, bias).sum().backward()
    x = torch.randn(2, 7, 24, requires_grad=True)
    y, r = vim.ops.add_rms_norm(x, torch.randn(2, 7, 24), torch.randn(24))
    (y.sum() + r.sum()).backward()


# ---- fuzzed arguments --------------------------------------------------------------------------------------------


class Mutator:
    """Generator of the arguments of one call, reproducible from its seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        # Most calls get few odd arguments, since only such calls pass the first checks.
        self.rate = self.random.choice((0.0, 0.03, 0.1, 0.3, 0.8))
        self.renamed: dict[int, int] = {}

    def _odd(self) -> bool:
        return self.random.random() < self.rate

    def arguments(self, schema: Any, templates: list[tuple[Any, ...]]) -> list[Any]:
        """Return arguments for an op, based on a recorded call if there is one."""
        template = self.random.choice(templates) if templates else (None,) * len(schema.arguments)
        if self.random.random() < 0.5:  # replace one size by another, everywhere
            sizes = sorted({size for kind in _flatten(template) if isinstance(kind, Kind) for size in kind.sizes})
            for size in sizes:
                if self.random.random() < 0.3:
                    self.renamed[size] = self.random.choice(SIZES)
        return [self._value(str(a.real_type), t) for a, t in zip(schema.arguments, template, strict=True)]

    def _value(self, kind: str, template: Any) -> Any:
        if kind.startswith(("List[", "Sequence[")):
            return self._list_of(kind.partition("[")[2][:-1], template)
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").rstrip("]")
        if self._odd() and (optional or self.random.random() < 0.05):
            return None
        if kind == "Tensor":
            if template is None and optional and not self._odd():
                return None
            return self._tensor(template)
        if kind == "int":
            return (
                self.random.choice(INTEGERS)
                if template is None or self._odd()
                else self.renamed.get(template, template)
            )
        if kind == "float":
            return self.random.choice(FLOATS) if template is None or self._odd() else template
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "ScalarType":  # no other numbers: torch itself reads out of bounds for those that no dtype has
            return self.random.choice(DTYPES) if template is None or self._odd() else template
        return template

    def _list_of(self, kind: str, template: Any) -> list[Any]:
        items = [self._value(kind, item) for item in (template or (None,) * self.random.randrange(4))]
        if self._odd() and items:
            items = items[: self.random.randrange(len(items))] if self.random.random() < 0.5 else [*items, items[-1]]
        return items

    def _tensor(self, template: Kind | None) -> torch.Tensor:
        if template is None:
            template = Kind(tuple(self.random.choice(SIZES) for _ in range(self.random.randrange(5))), torch.float32)
        sizes, dtype = [self.renamed.get(size, size) for size in template.sizes], template.dtype
        if self._odd():
            sizes = self._other_sizes(sizes)
        while math.prod(sizes) > MOST_ELEMENTS:
            sizes[sizes.index(max(sizes))] = 2
        if self._odd():
            dtype = self.random.choice(DTYPES)
        tensor = self._strided(sizes, dtype)
        for change in (self._spoiled, self._elsewhere, self._freed, self._expanded):
            if self._odd() and self.random.random() < 0.3:
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    tensor = change(tensor)
        return tensor

    def _other_sizes(self, sizes: list[int]) -> list[int]:
        place = self.random.randrange(len(sizes) + 1)
        what = self.random.randrange(4)
        if what == 0:
            return [*sizes[:place], self.random.choice(SIZES), *sizes[place:]]
        if what == 1:
            return sizes[:place] + sizes[place + 1 :]
        if what == 2:
            self.random.shuffle(sizes)
            return sizes
        return [self.random.choice(SIZES) if i == place else size for i, size in enumerate(sizes)]

    def _strided(self, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of these sizes, dense or strided, sometimes with a storage offset."""
        way = self.random.randrange(6) if self.random.random() < 0.5 else 0
        if way == 1 and len(sizes) > 1:
            a, b = self.random.sample(range(len(sizes)), 2)
            swapped = list(sizes)
            swapped[a], swapped[b] = sizes[b], sizes[a]
            return self._dense(swapped, dtype).transpose(a, b)
        if way == 2 and sizes:
            axis = self.random.randrange(len(sizes))
            wide = [size + 3 if i == axis else size for i, size in enumerate(sizes)]
            return self._dense(wide, dtype).narrow(axis, self.random.randrange(4), sizes[axis])
        if way == 3 and sizes:
            axis = self.random.randrange(len(sizes))
            wide = [2 * size if i == axis else size for i, size in enumerate(sizes)]
            return self._dense(wide, dtype)[tuple(slice(None, None, 2 if i == axis else 1) for i in range(len(sizes)))]
        if way == 4 and sizes:
            axis = self.random.randrange(len(sizes))
            one = [1 if i == axis else size for i, size in enumerate(sizes)]
            return self._dense(one, dtype).expand(sizes)
        return self._dense(sizes, dtype)

    def _dense(self, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(sizes, generator=self.generator).to(dtype)

    def _spoiled(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.random.choice((float("nan"), float("inf"), 1e30, -1e30, 0.0))

    def _expanded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of huge sizes that needs little memory: expanded, or without elements."""
        huge = self.random.choice(HUGE)
        if not tensor.dim():
            return tensor.expand(huge)
        axis = self.random.randrange(tensor.dim())
        sizes = list(tensor.shape)
        if self.random.random() < 0.5 and len(sizes) > 1:
            sizes[axis], sizes[axis - 1] = huge, 0
            return torch.empty(sizes, dtype=tensor.dtype)
        sizes[axis] = huge
        return tensor.narrow(axis, 0, 1).expand(sizes)

    def _freed(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storage.resize_(self.random.choice((0, storage.nbytes() // 2, max(0, storage.nbytes() - 1))))
        return tensor

    def _elsewhere(self, tensor: torch.Tensor) -> torch.Tensor:
        way = self.random.randrange(4)
        if way == 0:
            return tensor.to("meta")
        if way == 1:
            return tensor.to_sparse()
        if way == 2:
            return tensor.to_mkldnn()
        return tensor.requires_grad_()


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


# ---- calls -------------------------------------------------------------------------------------------------------


class _TooSlow(Exception):
    """Signal for a call that an implementation in Python would take minutes for."""


_timed = False


def _give_up(number: int, frame: Any) -> None:
    if _timed:
        raise _TooSlow


def run_calls(options: argparse.Namespace, library: str, progress: Path) -> None:
    """Make the calls `options.first` to `options.calls`; `progress` holds the number of the current one."""
    _load(library, options.emulated)
    templates = record()
    names = {name.removeprefix("vim::").partition(".")[0] for name in _all_op_names() if name.startswith("vim::")}
    ops = [getattr(torch.ops.vim, name).default for name in sorted(names)]
    weights = [0.03 if op._opname.endswith(SLOW) else 1.0 for op in ops]
    counts: collections.Counter[str] = collections.Counter()
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _give_up)
    torch.set_num_threads(2)
    if not options.sanitize:
        _limit_memory()
    with open(progress, "r+b", buffering=0) as file:
        for number in range(options.first, options.calls):
            mutator = Mutator(f"{options.seed}:{number}")
            (op,) = mutator.random.choices(ops, weights)
            file.seek(0)
            file.write(PROGRESS.pack(number, op._opname.encode()))
            arguments = mutator.arguments(op._schema, templates.get(_base(op._opname), []))
            if options.only is not None:
                sys.stderr.write(f"{op._schema}\n{_describe(arguments)}\n")
            outcome = _outcome(lambda op=op, arguments=arguments: op(*arguments))
            if options.only is not None:
                sys.stderr.write(f"{outcome}\n")
            counts[f"{_base(op._opname)}: {'returned' if outcome == 'returned' else 'raised'}"] += 1
    untouched = sorted({_base(op._opname) for op in ops} - templates.keys())
    for line, count in sorted(counts.items()):
        sys.stdout.write(f"{count:7,} {line}\n")
    if untouched:
        sys.stdout.write(f"no call to start from: {', '.join(untouched)}\n")


def _outcome(call: Callable[[], Any]) -> str:
    global _timed
    _timed = True
    signal.alarm(SECONDS_A_CALL)
    try:
        try:
            call()
        finally:  # before anything else, or the alarm ends the process while an error is described
            _timed = False
            signal.alarm(0)
    except _TooSlow:
        return "took too long"
    except Exception as error:
        # Any exception of the library or of torch is fine here.
        return f"{type(error).__name__}: {error}"
    return "returned"


def _all_op_names() -> list[str]:
    return torch._C._dispatch_get_all_op_names()


def _base(name: str) -> str:
    return re.sub(f"({'|'.join(FAMILIES)})$", "", name)


def _describe(arguments: Any) -> str:
    if isinstance(arguments, list):
        return "[" + ", ".join(map(_describe, arguments)) + "]"
    if isinstance(arguments, torch.Tensor):
        stride = arguments.stride() if arguments.layout == torch.strided else arguments.layout
        return f"{arguments.dtype}{list(arguments.shape)}{stride}@{arguments.device}"
    return repr(arguments)


def _load(library: str, emulated_too: bool) -> None:
    import vim  # noqa: F401
    from vim.ops.backends import native

    if library:
        torch.ops.load_library(library)
        native.cpu.path = Path(library)
    reason = native.load()
    if reason is not None:
        raise SystemExit(f"there are no native kernels: {reason}")
    if emulated_too:
        from tests import emulated

        emulated.register()
        emulated.load()


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


# ---- processes ---------------------------------------------------------------------------------------------------


def build_sanitized() -> Path:
    """Build the CPU library for sanitizers, in a separate cache."""
    from vim.ops.build import compilation

    recipe = compilation.cpu_recipe()
    units = tuple(dataclasses.replace(unit, flags=(*unit.flags, *SANITIZERS, "-O1")) for unit in recipe.units)
    recipe = dataclasses.replace(recipe, units=units, link=(*recipe.link, *SANITIZERS))
    return compilation.build(recipe, lambda line: sys.stderr.write(f"{line}\n") and None)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment of the child processes."""
    if not options.sanitize:
        return dict(os.environ)
    from vim.ops.build.compilation import find_compiler

    compiler = find_compiler() or ["g++"]
    paths = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": ASAN,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "VIM_EMULATED_FLAGS": " ".join(SANITIZERS),
    }


def _what_counts(said: str) -> str:
    """Return the end of a process's output, from the report of a sanitizer on if there is one."""
    lines = said.splitlines()
    first = next(
        (i for i, line in enumerate(lines) if "ERROR: AddressSanitizer" in line or "runtime error:" in line), -25
    )
    return "\n".join(lines[first:][:25]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, metavar="N", help="how many calls (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides all of them (default: 0)")
    parser.add_argument("--only", type=int, metavar="CALL", help="make one call, and describe it")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--emulated", action="store_true", help="the CUDA kernels too, emulated on the host")
    for name, default in (("first", 0), ("library", ""), ("progress", "")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        options.first, options.calls = options.only, options.only + 1
    if options.progress:
        run_calls(options, options.library, Path(options.progress))
        return 0
    sys.stdout.write(f"seed {options.seed}, calls {options.first} to {options.calls - 1}\n")
    sys.stdout.flush()
    library = str(build_sanitized()) if options.sanitize else ""
    failures = 0
    with tempfile.NamedTemporaryFile() as progress:
        while options.first < options.calls and failures < MOST_FAILURES:
            command = [sys.executable, __file__, *sys.argv[1:], "--progress", progress.name, "--library", library]
            progress.write(PROGRESS.pack(-1, b""))
            progress.flush()
            command += ["--first", str(options.first)]
            # torch writes every exception of a kernel to stderr, so only the end matters.
            with tempfile.TemporaryFile() as said:
                stderr = None if options.only is not None else said
                code = subprocess.run(command, env=environment(options), stderr=stderr, check=False).returncode
                if code == 0:
                    break
                said.seek(max(0, said.seek(0, os.SEEK_END) - 30_000))
                sys.stdout.write(_what_counts(said.read().decode(errors="replace")))
            progress.seek(0)
            number, op = PROGRESS.unpack(progress.read(PROGRESS.size))
            progress.seek(0)
            if number < 0:
                sys.stdout.write(f"FAILED before the first call: exit code {code}\n")
                return 1
            failures += 1
            replay = " ".join(word for word in ("--sanitize", "--emulated") if getattr(options, word[2:]))
            sys.stdout.write(
                f"FAILED: call {number}, of {op.rstrip(bytes(1)).decode()}, ended its process ({code}); "
                f"replay: scripts/fuzz_ops.py --seed {options.seed} --only {number} {replay}\n"
            )
            sys.stdout.flush()
            options.first = number + 1
    sys.stdout.write(f"{failures} failures\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
