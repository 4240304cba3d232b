"""Count the instructions in the main loops of a disassembled CUDA kernel, per channel-step."""

from __future__ import annotations

import argparse
import re
from collections import Counter

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_FUNCTION = re.compile(r"Function : (\S+)")


def functions(sass: str) -> dict[str, list[tuple[int, str, str]]]:
    """Return address, opcode and operands of each instruction, by mangled name of the function."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    current: list[tuple[int, str, str]] = []
    for line in sass.splitlines():
        if name := _FUNCTION.search(line):
            current = found.setdefault(name[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append((int(match[1], 16), match[2], match[3]))
    return found


def main_loops(instructions: list[tuple[int, str, str]], exponentials: int) -> list[Counter[str]]:
    """Return the counts of innermost loops with enough special functions; "all" counts every instruction."""
    index = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for i, (address, opcode, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            loops.append((index[int(target[1], 16)], i))
    counted = []
    for first, last in loops:
        body = Counter(opcode for _, opcode, _ in instructions[first : last + 1])
        body["MUFU"] = sum(n for opcode, n in body.items() if opcode.startswith("MUFU"))
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        if body["MUFU"] >= exponentials and not inner:
            body["all"] = last + 1 - first
            body["local"] = sum(n for opcode, n in body.items() if opcode.startswith(("LDL", "STL")))
            body["LDS.128"] = sum(n for opcode, n in body.items() if opcode.startswith("LDS") and ".128" in opcode)
            counted.append(body)
    return counted


def main() -> None:
    """Print one line per function: its instructions of each kind per channel-step, over all main loops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sass", type=argparse.FileType())
    parser.add_argument("function", help="part of the mangled name")
    parser.add_argument("--steps", type=int, required=True, help="channel-steps of one pass through a main loop")
    arguments = parser.parse_args()
    for name, instructions in functions(arguments.sass.read()).items():
        if arguments.function not in name:
            continue
        loops = main_loops(instructions, 16 * arguments.steps)
        steps = arguments.steps * len(loops)
        keys = ("all", "MUFU", "LDS.128", "local")
        counts = " ".join(f"{key}={sum(loop[key] for loop in loops) / max(1, steps):.2f}" for key in keys)
        print(f"{name} loops={len(loops)} {counts}")


if __name__ == "__main__":
    main()
