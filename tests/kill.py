"""Proves that a run survives SIGKILL: killed at random moments and resumed, it ends bit-equal to an untouched run.

  python tests/kill.py --kills 10 common.py train --dataset shapes --arch resnet8 --epochs 4 --save_every 1
  python tests/kill.py --kills 10           # the commands of LONG, one after the other: every script
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools import ROOT, metrics, same_weights


LONG = ("common.py train --dataset shapes --arch resnet8 --limit_train 2000 --epochs 12 --save_every 1 --log_every 5",
        "pgdi.py --smoke --epochs 14 --ep_steps 8 --kd_steps 8 --save_every 1 --log_every 1",
        "netgraft.py --preset demo --save_every 10",
        "akd_gan.py --smoke --epochs 24 --epoch_itrs 4 --save_every 1 --log_every 1",
        "adadfkd.py --smoke --epochs 30 --ep_steps 16 --kd_steps 4 --save_every 1 --log_every 1",
        "gda_kd.py --preset demo --save_every 1",
        "gda_kd.py --smoke --task fewshot --epochs 8 --meta_epochs 4 --save_every 1")


def start(command: list, cwd: Path, **more) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def killed(command: list, folder: Path, moments: list) -> int:
    """Runs to the end, with a SIGKILL at each moment (lines of metrics, seconds later); says how many of them it met."""
    plan, resume, done = command, command[:2] if command[0] == "common.py" else command[:1], 0
    while not (folder / "result.json").is_file():
        run, moment = start(plan, folder.parent.parent), moments[done] if done < len(moments) else None
        while moment and run.poll() is None and lines(folder) < moment[0]:
            time.sleep(0.005)
        try:
            text = run.communicate(timeout=moment and moment[1])[0]
            assert run.returncode == 0, text
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            done += 1
            print(f"kill {done} at line {lines(folder)}", flush=True)
        if (folder / "config.json").is_file():
            plan = [*resume, "--resume", str(folder)]
        elif folder.exists():  # killed while the folder was made: a fresh run never enters it
            folder.rename(folder.with_name(f"aside{done}"))
    return done


def prove(command: list, kills: int, cwd: Path, seed: int) -> None:
    """command without --run_name; the first run is left alone, the second is killed `kills` times."""
    rng, whole, folder = random.Random(seed), cwd / "runs" / "whole", cwd / "runs" / "killed"
    text = start([*command, "--run_name", "warm", "--time_limit", "0.001"], cwd).communicate()[0]  # makes the teacher
    assert "go on with --resume" in text, text
    begin, run = time.time(), start([*command, "--run_name", "whole"], cwd)
    while run.poll() is None and not lines(whole):
        time.sleep(0.005)
    ready = time.time() - begin
    text = run.communicate()[0]
    assert run.returncode == 0, text
    n, gap = lines(whole), (time.time() - begin - ready) / lines(whole)
    for share in (0.9, 0.6, 0.3):  # a run that is now much faster than the first may end before the last kill: once more
        at = sorted(rng.uniform(0, share * n) for _ in range(kills))
        moments = [(int(line), rng.uniform(0, gap if line >= 1 else ready)) for line in at]
        done = killed([*command, "--run_name", "killed"], folder, moments)
        if done == kills:
            break
        folder.rename(folder.with_name(f"ended{share}"))
    assert done == kills, f"only {done} kills; give the run more to do"
    assert same_weights(whole, folder), "weights differ"
    assert metrics(whole) == metrics(folder), "metrics differ"
    print(f"bit-equal after {done} kills: the weights and {len(metrics(folder))} lines of metrics")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] not in ([], ["--kills"]) and not words[0].endswith(".py"):
        sys.exit(__doc__)
    n, words = (int(words[1]), words[2:]) if words[:1] == ["--kills"] else (10, words)
    for command in [words] if words else map(str.split, LONG):
        with tempfile.TemporaryDirectory() as folder:
            print(*command, flush=True)
            prove(command, n, Path(folder), seed=0)
