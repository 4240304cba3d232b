"""Write the results of scripts/gpu_suite.sh as JSON and as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_gpu_report(record: Record, output: Path) -> None:
    """Write `output`.json and `output`.md."""
    output.with_name(output.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_name(output.name + ".md").write_text(_markdown(record))


def _markdown(record: Record) -> str:
    lines = ["# A run of the GPU suite" if record["gpu"] else "# A rehearsal of the GPU suite: there was no GPU", ""]
    lines += [f"`{record['command']}`, {record['seconds']} s", ""]
    lines += [f"- {name}: {value}" for name, value in record["machine"].items()]
    for name, section in record["sections"].items():
        lines += ["", f"## {name}, {section['seconds']} s", ""]
        if section["died"]:
            lines += [f"**The section {section['died']}.**", ""]
        if "probe" in section:
            lines += [f"- probe: {section['probe']}", ""]
        lines += _models(section["rows"]) if name == "models" and record["gpu"] else _tables(section["rows"])
        if section["not_run"]:
            lines += ["", "Not run:", "", *(f"- {what}" for what in section["not_run"])]
    return "\n".join(lines) + "\n"


def _tables(rows: list[Record]) -> list[str]:
    """Return one table per set of columns, in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    lines = []
    for columns, group in groups.items():
        lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in group]
    return lines


def _models(rows: list[Record]) -> list[str]:
    """Return one line per model and case, with the time relative to the first model of the case."""
    lines = ["Above 1 in the last column: the first model of the case is that many times as fast.", ""]
    lines += ["| case | model | ms, median | images/s | peak MiB | time / first |", "|---|---|---|---|---|---|"]
    cases: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        kind = row["model"].partition("_patch")[0].split("_")[1]
        cases.setdefault((row["mode"], row["dtype"], kind, row["batch"], row["size"]), []).append(row)
    for (mode, dtype, _, batch, size), group in cases.items():
        for row in group:
            cells = [
                f"{mode} {dtype} b{batch} {size}px",
                row["model"],
                f"{1e3 * row['seconds_median']:.2f}",
                f"{row['images_per_second']:.0f}",
                "" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:.0f}",
                f"{row['seconds_median'] / group[0]['seconds_median']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: Any) -> str:
    text = "<br>".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|")
