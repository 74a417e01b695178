"""Proves that a run survives SIGKILL: killed at random moments and resumed each time, it ends bit-equal to an untouched run.

  python tests/kill.py --kills 10 common.py train --dataset shapes --arch resnet8 --epochs 4 --save_every 1
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def start(command: list, cwd: Path, **more) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def metrics(folder: Path) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time_s" and not k.startswith(("speed/", "mem/"))} for row in rows]


def prove(command: list, kills: int, cwd: Path, seed: int) -> None:
    """command without --run_name; the first run is left alone, the second is killed `kills` times."""
    rng, begin = random.Random(seed), time.time()
    whole = start([*command, "--run_name", "whole"], cwd)
    text = whole.communicate()[0]
    assert whole.returncode == 0, text
    seconds, folder = time.time() - begin, cwd / "runs" / "killed"
    plan = [*command, "--run_name", "killed"]
    script = command[:2] if command[0] == "common.py" else command[:1]
    for k in range(kills):
        run = start(plan, cwd)
        wait = rng.uniform(0.2, 1) * seconds / (1 + kills / 4) + 1
        try:
            text = run.communicate(timeout=wait)[0]
            assert run.returncode == 0, text
            print(f"kill {k + 1}: the run was already finished")
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
        made = (folder / "config.json").is_file()
        print(f"kill {k + 1} after {wait:.1f} s: {'resuming' if made else 'nothing to resume yet'}", flush=True)
        if made:
            plan = [*script, "--resume", str(folder)]
        else:
            assert not folder.exists() or not (folder / "ckpt_last.pt").exists()
            plan = [*command, "--run_name", f"killed{k}"]
            folder = cwd / "runs" / f"killed{k}"
    if not (folder / "result.json").is_file():
        run = start(plan, cwd)
        text = run.communicate()[0]
        assert run.returncode == 0, text
    a, b = (torch.load(f / "student.pt", weights_only=True) for f in (cwd / "runs" / "whole", folder))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys(), "weights differ"
    assert metrics(cwd / "runs" / "whole") == metrics(folder), "metrics differ"
    print(f"bit-equal after {kills} kills: {len(a)} tensors, {len(metrics(folder))} lines of metrics")


if __name__ == "__main__":
    words = sys.argv[1:]
    n, words = (int(words[1]), words[2:]) if words[:1] == ["--kills"] else (10, words)
    if not words:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        prove(words, n, Path(folder), seed=0)
