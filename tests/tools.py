"""What several test files use: golden numbers, comparison, commands, what makes a GPU wait."""
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))


# ----------------------------------------------------------------------------- golden numbers

def load_golden(name):
    """(arrays, constants) of a golden file: sizes, seeds and cases are taken from it."""
    golden = np.load(GOLDEN_DIR / f"{name}.npz")
    config = json.loads(bytes(golden["config"])) if "config" in golden else {}
    return golden, config


def unread(golden, *patterns):
    """Keys of the file that no pattern matches as a whole."""
    return [k for k in golden.files if not any(re.fullmatch(p, k) for p in patterns)]


def cases(golden, pattern):
    """What the one group of the pattern finds in the keys of the file."""
    found = [re.match(pattern, key) for key in golden.files]
    return sorted({match[1] for match in found if match})


def close(a, b, tolerance):
    """The largest error, as a share of the largest value of the reference b."""
    a = np.asarray(torch.as_tensor(a).detach().cpu(), np.float64)
    b = np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    error = np.abs(a - b).max()
    bound = tolerance * max(np.abs(b).max(), 1e-300)
    assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


# ---------------------------------------------------------------------------------------- runs

def start(*command, **more):
    """A process of one of our scripts: start("pgdi.py", "--smoke", cwd=folder)."""
    words = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **more.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    return subprocess.Popen(words, env=env, **options)


def run(*command, **more):
    """(exit code, stdout, stderr) of one of our scripts."""
    process = start(*command, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def metrics(folder):
    """The lines of metrics.jsonl without the seconds, which differ between two equal runs."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time_s"} for row in rows]


def result(folder):
    """The rows of result.json, one for each student."""
    return json.loads(Path(folder, "result.json").read_text())


def same_weights(a, b, file="student.pt"):
    a = torch.load(Path(a, file), weights_only=True)
    b = torch.load(Path(b, file), weights_only=True)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------- what a GPU waits for

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique",
         "bincount")


class CountSyncs(TorchDispatchMode):
    """Notes the operations that make a GPU wait; a boolean mask as an index is one too."""

    def __init__(self):
        super().__init__()
        self.syncs = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masked = False
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            tensors = [i for i in args[1] if isinstance(i, torch.Tensor)]
            masked = any(i.dtype == torch.bool for i in tensors)
        if not self.paused and (name in SYNCS or masked):
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_syncs():
    """Their names, but for those of optimizer.step: on a CPU, Adam reads its step counter."""
    counter = CountSyncs()

    def uncounted(step):
        def run_step(self, *args, **kwargs):
            counter.paused = True
            try:
                return step(self, *args, **kwargs)
            finally:
                counter.paused = False
        return run_step

    adam = mock.patch.object(torch.optim.Adam, "step", uncounted(torch.optim.Adam.step))
    sgd = mock.patch.object(torch.optim.SGD, "step", uncounted(torch.optim.SGD.step))
    with adam, sgd, counter:
        yield counter.syncs
