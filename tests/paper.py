"""Every published row as a command: those of PUBLISHED in the five scripts, and each student trained without a teacher.

  bash run_all.sh paper                              run them all, one process per GPU; SEEDS="0 1 2" by default
  bash run_all.sh paper netgraft --only cifar100     those of a method whose name holds a text
  bash run_all.sh paper --dry-run                    only list the commands; other flags go to every script
  python tests/paper.py table                        ours (runs/paper and tests/results/paper.jsonl) beside theirs
"""
import os
import queue
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = ("pgdi", "netgraft", "akd_gan", "adadfkd", "gda_kd")


class Row(NamedTuple):
    key: tuple  # method, preset, data set, teacher, student, shots ("" where there are none)
    run: str  # name of the run folder, without the seed; several students can share one
    script: str
    flags: list
    published: str  # number and how it was measured


def name(method: str, preset: str, dataset: str, teacher: str, student: str, shots: str) -> str:
    nets = "-".join(filter(None, (teacher, student)))
    return "__".join(filter(None, (method, preset.replace(" + ", "_").replace(" ", "_"), dataset, nets,
                                   shots and f"k{shots}")))


def gda_flags(name: str) -> list:
    """The name of a row of gda_kd.py as flags; the `auto` row is the published command."""
    words, flags = name.split(), []
    for word in words:
        flags += {"native": ["--recipe", "native"], "classifier": ["--task", "fewshot", "--stage", "classifier"],
                  "meta": ["--task", "fewshot", "--stage", "meta"], "auto": [], "+": [], "GDA": []}.get(
                      word, ["--distiller", word])
    return flags + ["--no_gda"] * ("GDA" not in words and name != "auto")


def rows() -> list[Row]:
    found, alone = [], {}
    for method in METHODS:
        module = __import__(method)
        published = dict(module.PUBLISHED)
        if method == "gda_kd":  # the authors give no numbers: GDA beside each row of others, and their own command
            with_gda = [("auto" if k[0] == "kd" else f"{k[0]} + GDA", *k[1:]) for k in published
                        if "vanilla" not in k[0]]
            published |= dict.fromkeys([("auto", "cifar100", "resnet56", "resnet20", None), *with_gda], ("", ""))
        for (preset, dataset, teacher, student, shots), (top1, protocol) in published.items():
            key, few = (method, preset, dataset, teacher, student, str(shots or "")), dataset == "mini"
            if preset == "official":  # its students share one generator, so they share the run
                student = ",".join(k[3] for k in published if k[:3] == (preset, dataset, teacher))
            flags = gda_flags(preset) if method == "gda_kd" else ["--preset", preset] * (preset != "auto")
            flags += ["--fs_data" if few else "--dataset", dataset, *["--teacher", teacher] * bool(teacher),
                      "--student", student, *["--fs_shots" if few else "--shots", str(shots)] * bool(shots)]
            found.append(Row(key, name(*key[:4], student, key[5]), f"{method}.py", flags,
                             f"{top1} ({protocol})" if top1 else ""))
            if not few and student != "netgraft_vgg16_student":  # that one has no form of its own to train
                alone.update(dict.fromkeys((dataset, s) for s in student.split(",")))
    for dataset, student in alone:
        key = ("train", "", dataset, "", student, "")
        found.append(Row(key, name(*key), "common.py train", ["--dataset", dataset, "--arch", student], ""))
    return found


def measured() -> dict[tuple, list]:
    import common
    kept = {}
    for row in common.result_rows(common.results_path("paper")) + common.result_rows(ROOT / "runs" / "paper"):
        key = (row["method"], row.get("preset") or "auto", Path(row["dataset"]).name,
               (row.get("teacher") or "").removesuffix("_a"), row["student"], str(row.get("shots") or ""))
        key = key[:1] + ("",) + key[2:] if row["method"] == "train" else key
        kept.setdefault(key, {})[row.get("seed")] = row
    return {key: list(seeds.values()) for key, seeds in kept.items()}


def table() -> str:
    lines, ours = ["| row | last | best on test | published |", "| --- | --- | --- | --- |"], measured()
    for row in rows():
        cells = []
        for column in ("last", "best"):
            values = [r[column] for r in ours.get(row.key, []) if r.get(column) is not None]
            spread = f" ± {np.std(values, ddof=1):.2f} ({len(values)} seeds)" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}" if values else "not run")
        lines.append("| " + " | ".join([name(*row.key), *cells, row.published]) + " |")
    return "\n".join(lines)


def main(words: list) -> None:
    if words == ["table"]:
        print(table())
        return
    if words[-1:] == ["--only"]:
        sys.exit("--only needs a text")
    dry, only = "--dry-run" in words, words[words.index("--only") + 1] if "--only" in words else ""
    rest = [w for i, w in enumerate(words) if w not in ("--dry-run", "--only") and words[i - 1:i] != ["--only"]]
    methods = []
    while rest and rest[0] in (*METHODS, "train"):
        methods.append(rest.pop(0))
    if rest and not rest[0].startswith("--"):
        sys.exit(f"no method {rest[0]}; choose of {', '.join(METHODS)}, train")
    wanted = {r.run: r for r in rows() if (not methods or r.key[0] in methods) and only in r.run}.values()
    seeds = os.environ.get("SEEDS", "0 1 2").split()
    if dry:
        for row in wanted:
            for seed in seeds:
                run = ["--out_dir", "runs/paper", "--run_name", f"{row.run}__s{seed}", "--seed", seed]
                print(shlex.join(["python", *row.script.split(), *run, *row.flags, *rest]))
        return
    import torch
    gpus: queue.Queue = queue.Queue()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(max(1, torch.cuda.device_count()))))
    for gpu in visible.split(","):
        gpus.put(gpu)

    def start(job: tuple) -> int:
        row, seed = job
        gpu = gpus.get()
        env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if torch.cuda.is_available() else {})}
        try:
            return subprocess.call(["bash", str(ROOT / "run_all.sh"), "row", "paper", row.run, seed, row.script,
                                    *row.flags, *rest], env=env)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        codes = list(pool.map(start, [(row, seed) for row in wanted for seed in seeds]))
    print(table())
    if any(codes):
        sys.exit(f"{sum(map(bool, codes))} of {len(codes)} rows did not finish; the same command goes on with them")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough (head) ends the list quietly
    main(sys.argv[1:])
