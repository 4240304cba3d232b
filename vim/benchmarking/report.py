"""A benchmark as JSON, as a Markdown table and as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vim.runtime.machine import describe_machine

Record = dict[str, Any]


def write_report(record: Record, output: str) -> str:
    """Write `output`.json, .md and .png (if `output` is not empty) and return the Markdown."""
    text = _markdown(record)
    if output:
        _draw(record, _write(record, text, output).with_suffix(".png"))
    return text


def make_record(rows: Sequence[Any], probes: Sequence[Any], not_measured: Mapping[str, str]) -> Record:
    """Return what `write_record` writes, with the command of this process; the rows are dataclasses."""
    return {
        "command": " ".join(["python -m vim.benchmark", *sys.argv[1:]]),
        "machine": describe_machine(),
        "probes": list(probes),
        "rows": [asdict(row) for row in rows],
        "not_measured": dict(not_measured),
    }


def write_record(record: Record, table: list[str], output: str) -> str:
    """Write `output`.json and .md (if `output` is not empty) and return the Markdown.

    Args:
        record: With "command", "machine", "probes" and "not_measured", the reasons by name.
        table: The lines of its table.
        output: Path without a suffix.
    """
    lines = [f"`{record['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in record["machine"].items()]
    lines += [f"- probe before and after each case: {probe}" for probe in record["probes"]]
    lines += ["", *table, "", *(f"- not measured: {name}: {why}" for name, why in record["not_measured"].items())]
    text = "\n".join(lines)
    if output:
        _write(record, text, output)
    return text


def _write(record: Record, text: str, output: str) -> Path:
    """Write the record and its text; return the path of the latter."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    path = path.with_name(path.name + ".md")
    path.write_text(text + "\n")
    return path


def _cases(rows: list[Record]) -> dict[tuple[str, str, int, int], list[Record]]:
    cases: dict[tuple[str, str, int, int], list[Record]] = {}
    for row in rows:
        cases.setdefault((row["mode"], row["dtype"], row["batch"], row["size"]), []).append(row)
    return cases


def _markdown(record: Record) -> str:
    lines = [f"`{record['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in record["machine"].items()]
    lines += [f"- probe before and after each case: {probe}" for probe in record["probes"]]
    lines += [f"- `{spec}`: {meaning}" for spec, meaning in record["variants"].items()]
    lines += [
        "",
        "The last column is the model's time over that of the first model of its case, medians: how many times",
    ]
    lines += ["faster the first model is. Memory is the peak beyond the loaded model.", ""]
    lines += [
        "| case | model | ms, median (quartiles) | images/s | peak MiB | time / first |",
        "|---|---|---|---|---|---|",
    ]
    for (mode, dtype, batch, size), rows in _cases(record["rows"]).items():
        for row in rows:
            low, high = (1e3 * t for t in row["seconds_quartiles"])
            ratio = row["seconds_median"] / rows[0]["seconds_median"]
            memory = "" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:.0f}"
            cells = [
                f"{mode} {dtype} b{batch} {size}px",
                row["model"],
                f"{1e3 * row['seconds_median']:.1f} ({low:.1f} to {high:.1f}, n={row['rounds']})",
                f"{row['images_per_second']:.1f}",
                memory,
                f"{ratio:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if record["failures"]:
        lines += ["", "Did not run:", "", *(f"- {failure}" for failure in record["failures"])]
    return "\n".join(lines)


def _draw(record: Record, path: Path) -> None:
    """Draw images per second and memory against resolution: two charts for each mode, dtype and batch."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, int], list[Record]] = {}
    for row in record["rows"]:
        groups.setdefault((row["mode"], row["dtype"], row["batch"]), []).append(row)
    figure = Figure(figsize=(11, 3.6 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (speed, memory), ((mode, dtype, batch), rows) in zip(axes, groups.items(), strict=True):
        for spec in dict.fromkeys(row["model"] for row in rows):
            own = sorted((row for row in rows if row["model"] == spec), key=lambda row: row["size"])
            sizes = [row["size"] for row in own]
            style = {"marker": "o", "linewidth": 2, "markersize": 5, "label": spec}
            speed.plot(sizes, [row["images_per_second"] for row in own], **style)
            known = [(row["size"], row["peak_mebibytes"]) for row in own if row["peak_mebibytes"] is not None]
            memory.plot([size for size, _ in known], [mebibytes for _, mebibytes in known], **style)
        for axis, what in ((speed, "images per second"), (memory, "peak memory beyond the model, MiB")):
            axis.set(title=f"{mode}, {dtype}, batch {batch}", xlabel="side of the image, pixels", ylabel=what)
            axis.set_xticks(sorted({row["size"] for row in rows}))
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        speed.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
