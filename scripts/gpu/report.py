"""The report of a run, from its record: `python -m scripts.gpu.report FILE.jsonl` writes FILE.md and FILE.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scripts.gpu.record import Row, lines


def write_report(record: Path) -> None:
    """Write what a record holds so far as JSON and as Markdown, beside it."""
    run = assemble(lines(record))
    record.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    record.with_suffix(".md").write_text(_markdown(run))


def assemble(found: list[Row]) -> dict[str, Any]:
    """Return the lines of a record by section."""
    run: dict[str, Any] = {"command": "", "gpu": False, "cut_off": "", "sections": {}}
    for line in found:
        name = line.get("section")
        if name is None:
            run.update({key: value for key, value in line.items() if key in run})
            continue
        section = run["sections"].setdefault(
            name, {"facts": {}, "rows": [], "not_run": [], "failed": [], "unfinished": [], "seconds": None, "died": ""}
        )
        section["facts"].update(line.get("facts", {}))
        section["rows"] += [line["row"]] if "row" in line else []
        section["not_run"] += [line["not_run"]] if "not_run" in line else []
        section["failed"] += [line["failed"]] if "failed" in line else []
        section["unfinished"] += [line["begun"]] if "begun" in line else []
        if "ended" in line:
            section["unfinished"].remove(line["ended"])
        section.update({key: line[key] for key in ("seconds", "died") if key in line})
    return run


def is_right(run: dict[str, Any]) -> bool:
    """Return True if everything that ran is right. A skip, or a step that was not run, is not wrong."""
    sections = run["sections"].values()
    wrong = any(section["died"] or section["failed"] or section["unfinished"] for section in sections)
    return not wrong and all(row.get("ok", True) for section in sections for row in section["rows"])


def _markdown(run: dict[str, Any]) -> str:
    rows = [row for section in run["sections"].values() for row in section["rows"]]
    if any("pretended_seconds" in row for row in rows):
        title = "# A rehearsal of the GPU suite's times: nothing was measured"
    else:
        title = "# A run of the GPU suite" if run["gpu"] else "# A rehearsal of the GPU suite: there was no GPU"
    out = [title, "", f"`{run['command']}`", ""]
    if run["cut_off"]:
        out += [f"**Cut off by {run['cut_off']}.**", ""]
    for name, section in run["sections"].items():
        seconds = "not finished" if section["seconds"] is None else f"{section['seconds']} s"
        out += ["", f"## {name}, {seconds}", ""]
        if section["died"]:
            out += [f"**The section {section['died']}.**", ""]
        out += [f"- {key}: {_cell(value)}" for key, value in section["facts"].items()]
        models = [row for row in section["rows"] if "seconds_median" in row and run["gpu"]]
        out += _models(models) if models else []
        out += _tables([row for row in section["rows"] if row not in models])
        failed = section["failed"] + [f"{what}: begun, not ended" for what in section["unfinished"]]
        if failed:
            out += ["", "**Failed:**", "", *(f"- {what}" for what in failed)]
        if section["not_run"]:
            out += ["", "Not run:", "", *(f"- {what}" for what in section["not_run"])]
    return "\n".join(out) + "\n"


def _tables(rows: list[Row]) -> list[str]:
    """Return one table per set of columns, in the order of their first rows; a text is a block of its own."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    out = []
    for columns, group in groups.items():
        if columns == ("paste",):
            out += ["", "```", *(row["paste"] for row in group), "```"]
            continue
        out += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        out += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in group]
    return out


def _models(rows: list[Row]) -> list[str]:
    """Return one line per model and case, with the time relative to the first model of the case."""
    out = ["", "Above 1 in the last column: the first model of the case is that many times as fast.", ""]
    out += ["| case | model | ms, median | images/s | peak MiB | time / first |", "|---|---|---|---|---|---|"]
    cases: dict[tuple[Any, ...], list[Row]] = {}
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
            out.append(f"| {' | '.join(cells)} |")
    return out


def _cell(value: Any) -> str:
    text = "<br>".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
