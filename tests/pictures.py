"""The pictures of the README, from finished runs and kept results.

  python tests/pictures.py images RUN_FOLDER ...   # real images beside those of each run's samples/
  python tests/pictures.py cost laptop             # accuracy against cost (pip install matplotlib)

Both write into tests/results.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))
CELL, GAP, NAME = 64, 2, 150  # a picture, the line between two, the column of names


def cells(path, columns, first_column):
    """Some pictures of a grid of save_grid, from a column on; with words below them or without."""
    sheet = Image.open(path).convert("RGB")
    height = CELL + GAP
    if (sheet.height - GAP) % height:
        height = CELL + 14
    pictures = []
    for top in range(GAP, sheet.height - CELL + 1, height):
        for left in range(GAP + first_column * (CELL + GAP), sheet.width - CELL + 1, CELL + GAP):
            picture = sheet.crop((left, top, left + CELL, top + CELL))
            if picture.getbbox():  # not all black, which is a free place
                pictures.append(picture)
    spread = np.linspace(0, len(pictures) - 1, columns).astype(int)
    return [pictures[i] for i in spread]


def real_images(dataset, data_dir, columns):
    import common
    args = argparse.Namespace(dataset=dataset, data_dir=data_dir, norm="auto")
    x = common.load_data(args, torch.device("cpu")).test_x[:columns]
    arrays = x.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a).resize((CELL, CELL), Image.Resampling.NEAREST) for a in arrays]


def images(words):
    """A row of real test images, then one for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data_dir", default="./data")
    parser.add_argument("--columns", type=int, default=12)
    args = parser.parse_args(words)
    rows = []
    for run in args.runs:
        config = json.loads((run / "config.json").read_text())
        newest = max((run / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime)
        name = f"{config['method']} {config['args']['preset']}"
        shots = config["args"]["shots"] if config["method"] == "pgdi" else 0  # stand on the left
        rows.append((name, cells(newest, args.columns, min(5, shots))))
    dataset = config["args"]["dataset"]
    rows.insert(0, (f"{dataset}, real", real_images(dataset, args.data_dir, args.columns)))
    step = CELL + GAP
    sheet = Image.new("RGB", (NAME + args.columns * step, len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(rows):
        pen.text((4, r * step + CELL // 2 - 6), name, fill="black")
        for c, picture in enumerate(pictures):
            sheet.paste(picture, (NAME + c * step, r * step))
    sheet.save(RESULTS / "images.png")


def cost(words):
    """Points with error bars over seeds; the horizontal axis is the work of a run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    groups = {}
    for line in (RESULTS / f"{words[0]}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("pflop"):
            groups.setdefault((row["method"], row["preset"], row["student"]), []).append(row)
    figure, axes = plt.subplots(figsize=(8, 5))
    for (method, preset, student), rows in sorted(groups.items()):
        last = [row["last"] for row in rows]
        deviation = np.std(last, ddof=1) if len(last) > 1 else 0.0
        pflop = np.mean([row["pflop"] for row in rows])
        label = f"{method} {preset}, {student} (n = {len(last)})"
        axes.errorbar(pflop, np.mean(last), deviation, marker="o", capsize=3, label=label)
    axes.axhline(10, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="PFLOP of a run", ylabel="test accuracy, last epoch (%)", xscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(RESULTS / f"cost_{words[0]}.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    commands = {"images": images, "cost": cost}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](sys.argv[2:])
