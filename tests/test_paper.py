"""The published rows (paper.py), and the tables of what was measured (results.py)."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import paper
import results
from test_repository import parse
from tools import ROOT


# ----------------------------------------------------------------------------- the published rows

PUBLISHED = """
pgdi__k5__cifar100__wrn40_2-wrn16_1                          53.65  best test epoch of one run
pgdi__fast__cifar10__wrn40_2-wrn16_1                         89.29  best test epoch of one run
netgraft__k10__cifar10__netgraft_vgg16-netgraft_vgg16_student  92.89  mean of 5 runs
netgraft__k50__cifar100__netgraft_vgg16-netgraft_vgg16_student  69.06  mean of 5 runs
adadfkd__cifar100__wrn40_2-wrn16_2                           67.54  largest of 42 runs
adadfkd__dafl__cifar10__wrn40_2-wrn16_1                      65.71  AdaDFKD's prints 72.15
adadfkd__cmi__cifar100__wrn40_2-wrn16_2                      68.75  CMI's table
gda_kd__native_dkd__cifar100__resnet32x4-resnet8x4           76.32  mdistiller
gda_kd__adaptconf__cifar100__resnet20-resnet56               74.17  8 groups of 64
"""


def test_published_rows():
    """Typed from the papers' tables; each number says how it was measured, GDA's rows have none."""
    rows = {row.name: row for row in paper.ROWS}
    assert len(rows) == len(paper.ROWS)
    for line in PUBLISHED.strip().splitlines():
        name, number, protocol = line.split(maxsplit=2)
        assert rows[name].published == number and protocol in rows[name].protocol
    for row in paper.ROWS:
        assert bool(row.published) == bool(row.protocol)
        assert not (row.published and "--gda" in row.flags)


def test_lines_of_the_list(monkeypatch, capsys):
    """One complete command a line, whose flags the script takes."""
    monkeypatch.setenv("SEEDS", "0 1")
    paper.main(["--dry-run", "--data_dir", "my data"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 * len(paper.ROWS)
    assert len({tuple(words[4:6]) for words in lines}) == len(lines)
    for words in lines[::2]:
        assert words[:4] == ["bash", "run_all.sh", "row", "paper"]
        args = parse([*words[6].split(), *words[7:]])
        assert args.data_dir == "my data" and args.dataset in words[4]
    paper.main(["pgdi", "akd_gan", "--only", "cifar10__", "--dry-run"])
    names = [line.split()[4] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == 2 * 15 and all(name.startswith("pgdi__") for name in names)


def test_places(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0, MIG-12/3")
    assert paper.places() == ["0", "0", "MIG-12/3"]
    monkeypatch.setenv("PER_GPU", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert paper.places() == ["1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert paper.places() == ["", ""]


def test_spread(tmp_path):
    """Never two runs in one place; what fails is told; the other runs go on."""
    code = "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES']); raise SystemExit({})"
    jobs = [[sys.executable, "-c", code.format(int(i == 1)), "", f"job{i}", "0"] for i in range(4)]
    assert paper.spread(jobs, ["7", "MIG-a"], tmp_path) == [jobs[1]]
    used = [(tmp_path / f"job{i}__s0.log").read_text() for i in range(4)]
    assert used[:2] == ["on 7\n", "on MIG-a\n"] and set(used) == set(used[:2])


def test_ctrl_c_ends_all_runs(tmp_path):
    code = f"""
import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'tests')!r}); import paper
wait = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
paper.spread([[sys.executable, "-c", wait, "", str(i), "0"] for i in range(3)], ["", ""],
             Path({str(tmp_path)!r}))"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / "0__s0.log", tmp_path / "1__s0.log"]
    for log in logs:
        while not (log.is_file() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "goes on" in process.communicate(timeout=30)[1] and process.returncode == 1
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)
    assert not (tmp_path / "2__s0.log").exists()


# ------------------------------------------------------------------------------------ the results

def finished_run(folder, seed, last, **typed):
    folder.mkdir(parents=True)
    row = {"method": "pgdi", "preset": "small", "dataset": "/home/me/photos", "teacher": "resnet20",
           "student": "my/net.py:small", "seed": seed, "last": last, "best": last, "agree1": 1.5,
           "typed": {"data_dir": "/home/me", "seed": seed, **typed}, "teacher_top1": 91.73,
           "real_images": 100, "made_images": 7680, "seconds": 60.0, "pflop": 0.25}
    (folder / "result.json").write_text(json.dumps([row]))


def test_results_are_kept_filled_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    first = {"version": 1, "method": "akd_gan", "preset": "strong", "dataset": "cifar10",
             "teacher": "resnet20", "student": "resnet8", "seed": 0, "last": 47.62, "best": 47.62,
             "flags": {"T": 20.0}, "synthetic_images": 9, "seconds": 1.0, "teacher_top1": 91.73}
    (tmp_path / "mine.jsonl").write_text(json.dumps(first) + "\n")
    for seed, last in enumerate((70.0, 71.0, 75.0)):
        finished_run(tmp_path / f"runs/a__s{seed}", seed, last)
        finished_run(tmp_path / f"runs/b__s{seed}", seed, last + seed, oh=0.5)
    results.keep(tmp_path / "runs", "mine")
    finished_run(tmp_path / "again" / "a__s2", 2, 72.0)
    results.keep(tmp_path / "again", "mine")
    finished_run(tmp_path / "again" / "c__s0", 0, 12.0, smoke=True)
    assert len(results.finished(tmp_path / "again")) == 1  # a smoke run measures nothing
    rows = results.kept("mine")
    assert [row["last"] for row in rows] == [70, 71, 72, 70, 72, 77] and rows[0]["row"] == "a"
    assert "/home" not in (tmp_path / "mine.jsonl").read_text()
    assert results.kept("mine", version=1) == [first]

    readme = tmp_path / "README.md"
    head = "before\n<!-- results mine (pgdi small): teacher → student|learned from|last|n -->\n"
    readme.write_text(f"{head}old\n<!-- end -->\nafter\n")
    results.fill()
    line = "| resnet20 (91.73) → net.py:small | 100 labelled images, 7,680 made ones |"
    assert f"{line} **71.00 ± 1.00** | 3 |" in readme.read_text()
    assert readme.read_text().startswith(head) and readme.read_text().endswith("end -->\nafter\n")
    report = (tmp_path / "RESULTS.md").read_text()
    now, _, history = report.partition("# First version")
    assert "--oh 0.5" in now and "47.62" not in now and "akd_gan strong --T 20.0" in history

    results.compare("mine", "pgdi small", "pgdi small --oh 0.5")
    assert "is +2.00, paired standard error 1.53, n = 3" in capsys.readouterr().out
