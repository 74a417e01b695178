"""Proves that a run survives SIGKILL: killed at random moments and resumed, it ends bit-equal.

  python tests/kill.py                      # every command of LONG, ten kills each
  python tests/kill.py --kills 3 pgdi.py --smoke --epochs 14 --save_every 1 --log_every 1

The first run is left alone. The second one is stopped once by SIGTERM, as a cluster does it, then
killed again and again, each time resumed (or begun anew, where it had no checkpoint yet).
"""
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools import metrics, result, same_weights, start

LONG = (
    "tests/toy.py --smoke --epochs 12 --save_every 1 --log_every 1",
    "tests/toy.py --smoke --epochs 12 --save_every 1 --log_every 1 --amp bf16",
    "common.py train --dataset shapes --arch resnet8 --limit_train 2000 --epochs 12 --save_every 1 "
    "--log_every 5",
    "pgdi.py --smoke --epochs 14 --kd_steps 8 --save_every 1 --log_every 1",
    "netgraft.py --preset demo --save_every 10",
    "akd_gan.py --smoke --epochs 24 --epoch_itrs 4 --save_every 1 --log_every 1",
    "adadfkd.py --smoke --epochs 30 --ep_steps 16 --kd_steps 4 --save_every 1 --log_every 1",
    "gda_kd.py --preset demo --save_every 1",
    "gda_kd.py --preset fs_meta --smoke --epochs 8 --save_every 1")
DIFFERENT = ("seconds", "peak_mb", "typed")  # of two equal runs, in result.json


def begin(command, cwd):
    return start(*command, cwd=cwd, stderr=subprocess.STDOUT)


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def left_alone(command, folder, cwd):
    """Runs to the end; (seconds to the first line of metrics, seconds from line to line)."""
    began = time.time()
    process = begin(command, cwd)
    while process.poll() is None and not lines(folder):
        time.sleep(0.005)
    ready = time.time() - began
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return ready, (time.time() - began - ready) / lines(folder)


def stopped_at(process, folder, moment, number):
    """Whether a signal met the run at its moment: a line of metrics, and some seconds later."""
    line, seconds = moment
    while process.poll() is None and lines(folder) < line:
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    text, _ = process.communicate()
    met = process.returncode in (-number, 143)
    assert met or process.returncode == 0, text
    return met


def killed(command, folder, moments, cwd):
    """Runs to the end with a signal at each moment; how many of them it met."""
    resume = command[:2] if command[0] == "common.py" else command[:1]
    moments = list(moments)
    met = 0
    while not (folder / "result.json").is_file():
        if (folder / "ckpt_last.pt").is_file():
            process = begin([*resume, "--resume", folder], cwd)
        else:
            if folder.exists():
                folder.rename(folder.with_name(f"aside{time.time()}"))
            process = begin([*command, "--run_name", folder.name], cwd)
        if not moments:
            text, _ = process.communicate()
            assert process.returncode == 0, text
            continue
        number = signal.SIGKILL if met else signal.SIGTERM
        met += stopped_at(process, folder, moments.pop(0), number)
        print(f"{number.name} {met} at line {lines(folder)}", flush=True)
    return met


def same_scores(a, b):
    rows = [[{key: value for key, value in row.items() if key not in DIFFERENT}
             for row in result(folder)] for folder in (a, b)]
    return rows[0] == rows[1]


def prove(command, kills, cwd, seed):
    whole, folder = cwd / "runs" / "whole", cwd / "runs" / "killed"
    rng = random.Random(seed)
    ready, gap = left_alone([*command, "--run_name", "whole"], whole, cwd)
    n = lines(whole)
    for share in (0.9, 0.6, 0.3):  # a run that is faster now may end before the last kill: again
        at = sorted(int(rng.uniform(0, share * n)) for _ in range(kills))
        moments = [(line, rng.uniform(0, gap if line else ready)) for line in at]
        met = killed(command, folder, moments, cwd)
        if met == kills:
            break
        folder.rename(folder.with_name(f"ended{share}"))
    assert met == kills, f"only {met} kills; give the run more to do"
    files = [path.name for path in whole.glob("student*.pt")]
    assert files and all(same_weights(whole, folder, file) for file in files), "weights differ"
    assert metrics(whole) == metrics(folder), "metrics differ"
    assert same_scores(whole, folder), "scores differ"
    print(f"bit-equal after {met} signals: {', '.join(files)} and {n} lines of metrics", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    kills = 10
    if words[:1] == ["--kills"]:
        kills, words = int(words[1]), words[2:]
    if words and not words[0].endswith(".py"):
        sys.exit(__doc__)
    for command in [words] if words else [line.split() for line in LONG]:
        with tempfile.TemporaryDirectory() as folder:
            print(*command, flush=True)
            prove(command, kills, Path(folder), seed=0)
