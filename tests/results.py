"""Measured rows: keep them in tests/results, and make the tables of the README from them.

  python tests/results.py keep RUNS_FOLDER NAME    finished runs -> tests/results/NAME.jsonl
  python tests/results.py fill                     tables of README.md and tests/results/RESULTS.md
  python tests/results.py compare NAME A B         two labels, paired by their common seeds
  python tests/results.py words RUNS_FOLDER        finished runs, and what each learned from

A table of README.md stands between `<!-- results NAME: COLUMNS -->` and `<!-- end -->`; COLUMNS are
names in COLUMNS, or keys of the rows, with | between them. `NAME (pgdi small; netgraft)` shows only
the rows whose label begins so, in this order. Rows with "version": 1 are the first version's.
"""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "results"
sys.path.append(str(ROOT))
from common import NO_SETTING  # noqa: E402


# ------------------------------------------------------------------------------- reading, keeping

def kept(name, version=2):
    """The rows of tests/results/NAME.jsonl that one version of the scripts measured."""
    path = KEPT / f"{name}.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
    return [row for row in rows if row.get("version", 2) == version]


def finished(folder):
    """The rows of every result.json below a folder, without paths; smoke runs do not count."""
    rows = []
    for file in sorted(Path(folder).rglob("result.json")):
        content = json.loads(file.read_text())
        for row in content if isinstance(content, list) else []:  # a dict: the first version
            row["row"] = re.sub(r"__s\d+$", "", file.parent.name)
            trained_by_a_row = row["method"] == "train" and row["row"] == file.parent.name
            if row["typed"].get("smoke") or trained_by_a_row:
                continue
            row["typed"] = {k: v for k, v in row["typed"].items() if k not in NO_SETTING}
            row["dataset"] = Path(row["dataset"]).name
            for key in ("teacher", "student"):  # path/net.py:small -> net.py:small
                row[key] = Path(row[key] or "").name
            rows.append(row)
    return rows


def label(row):
    """Method, preset and typed settings: what tells apart the runs of one table."""
    words = [row["method"], row.get("preset") or ""]
    settings = row.get("typed") or {"shots": row.get("shots"), **row.get("flags", {})}
    words += [f"--{name} {value}" for name, value in sorted(settings.items()) if value is not None]
    return " ".join(filter(None, words))


def identity(row):
    return label(row), row["dataset"], row.get("teacher"), row["student"]


def keep(folder, name):
    """A row measured again, with the same flags and seed, takes the place of the old one."""
    new = {(identity(row), row["seed"]): row for row in finished(folder)}
    if not new:
        sys.exit(f"{folder} holds no finished run")
    old = {(identity(row), row["seed"]): row for row in kept(name)}
    rows = [*kept(name, version=1), *{**old, **new}.values()]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (KEPT / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(new)} rows, {len(new.keys() & old.keys())} of them in the place of old ones")


# ----------------------------------------------------------------------------------------- tables

def mean_and_deviation(rows, key, digits=2):
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def learned_from(row):
    real = row.get("real_images") or 0
    made = row.get("made_images", row.get("synthetic_images"))
    kind = "images without labels" if row["method"] == "netgraft" else "labelled images"
    words = f"{real:,} {kind}" if real else "no real image"
    return f"{words}, {made:,} made ones" if made else words


def networks(rows):
    if not rows[0].get("teacher_top1"):
        return rows[0]["student"]
    known = np.mean([row["teacher_top1"] for row in rows])
    return f"{rows[0]['teacher']} ({known:.2f}) → {rows[0]['student']}"


COLUMNS = {  # header -> a cell for the rows that differ in their seed only
    "method": lambda rows: f"`{label(rows[0])}`",
    "data": lambda rows: rows[0]["dataset"],
    "teacher → student": networks,
    "learned from": lambda rows: learned_from(rows[0]),
    "last": lambda rows: f"**{mean_and_deviation(rows, 'last')}**",
    "best on test": lambda rows: mean_and_deviation(rows, "best"),
    "Agree@1": lambda rows: mean_and_deviation(rows, "agree1"),
    "L_p": lambda rows: mean_and_deviation(rows, "L_p", 4),
    "minutes": lambda rows: f"{np.mean([row['seconds'] for row in rows]) / 60:.1f}",
    "PFLOP": lambda rows: f"{rows[0]['pflop']:.3g}" if "pflop" in rows[0] else "",
    "seeds": lambda rows: ", ".join(str(row["seed"]) for row in rows),
    "n": lambda rows: str(len(rows)),
}
ALL = [*COLUMNS][:-1] + ["device", "torch"]


def table(rows, columns):
    """Rows that differ in their seed only are one line. A row without a method is as it is."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault(identity(row) if "seed" in row else i, []).append(row)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for group in groups.values():
        cells = []
        for column in columns:
            plain = column not in COLUMNS or "seed" not in group[0]
            cells.append(str(group[0].get(column) or "") if plain else COLUMNS[column](group))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(match):
    name, chosen, columns = match["name"], match["chosen"], match["columns"].split("|")
    rows, note = kept(name), ""
    if not rows:
        rows, note = kept(name, version=1), "\n\nMeasured with the first version of the scripts."
    if not rows:
        sys.exit(f"README.md: there is no tests/results/{name}.jsonl")
    if chosen:
        starts = [f"{start.strip()} " for start in chosen.split(";")]
        rows = [row for start in starts for row in rows if f"{label(row)} ".startswith(start)]
    return f"{match['head']}\n{table(rows, [c.strip() for c in columns])}{note}\n<!-- end -->"


BLOCK = re.compile(r"(?P<head><!-- results (?P<name>\w+)(?: \((?P<chosen>[^)]+)\))?: "
                   r"(?P<columns>.+?) -->)\n.*?<!-- end -->", re.S)


def fill():
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(block, readme.read_text()))
    parts = ["# Every kept row", "", "Made by `python tests/results.py fill`: mean ± standard "
             "deviation over seeds. The result is the accuracy of the **last** epoch."]
    names = sorted(path.stem for path in KEPT.glob("*.jsonl"))
    for name in names:
        if kept(name):
            parts += ["", f"## {name}", "", table(kept(name), ALL)]
    parts += ["", "# First version", "", "Measured with the first version of the scripts: presets "
              "had other names, losses were corrected since, some minutes include other work."]
    for name in names:
        if rows := kept(name, version=1):
            columns = ALL if "seed" in rows[0] else [key for key in rows[0] if key != "version"]
            parts += ["", f"## {name}, first version", "", table(rows, columns)]
    (KEPT / "RESULTS.md").write_text("\n".join(parts) + "\n")


def words(folder):
    """For a person who has just run the demo."""
    print(f"{'run':<16} {'right on test images':<22} what its student learned from")
    for row in sorted(finished(folder), key=lambda row: -row["last"]):
        taught = f", with a {row['teacher']} as teacher" if row.get("teacher_top1") else ""
        print(f"{row['row']:<16} {row['last']:>8.1f} % {'':<11} {learned_from(row)}{taught}")


def compare(name, a, b):
    """Mean difference of `last`, b - a, and its standard error, over the seeds that both have."""
    scores = {}
    for row in kept(name) or kept(name, version=1):
        found = scores.setdefault(label(row), {}).setdefault((row["dataset"], row["student"]), {})
        found[row["seed"]] = row["last"]
    for wanted in (a, b):
        if wanted not in scores:
            sys.exit(f"{wanted}: no such label; there are\n  " + "\n  ".join(scores))
    for pair in sorted(scores[a].keys() & scores[b].keys()):
        first, second = scores[a][pair], scores[b][pair]
        differences = [second[seed] - first[seed] for seed in first.keys() & second.keys()]
        n = len(differences)
        error = np.std(differences, ddof=1) / math.sqrt(n) if n > 1 else math.nan
        print(f"{' '.join(pair)}: {b} minus {a} is {np.mean(differences):+.2f}, paired standard "
              f"error {error:.2f}, n = {n}")


if __name__ == "__main__":
    commands = {"keep": (keep, 2), "fill": (fill, 0), "compare": (compare, 3), "words": (words, 1)}
    function, count = commands.get(sys.argv[1] if sys.argv[1:] else "", (None, -1))
    if len(sys.argv) - 2 != count:
        sys.exit(__doc__.strip())
    function(*sys.argv[2:])
