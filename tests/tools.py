"""What the tests of several files use: golden numbers, comparison, operations that make a GPU wait."""
import contextlib
import json
import os
from pathlib import Path
from typing import Iterator
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount")


def load_golden(name: str) -> tuple:
    """The file of GOLDEN_DIR, and its constants."""
    golden = np.load(Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden")) / f"{name}.npz")
    return golden, json.loads(bytes(golden["config"])) if "config" in golden else {}


def close(a, b, tolerance: float) -> None:
    """Largest error against the largest value of the reference."""
    a, b = np.asarray(torch.as_tensor(a).detach(), np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-300)


def metrics(folder) -> list:
    """The lines of metrics.jsonl without what differs between two runs of one seed."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time_s" and not k.startswith(("speed/", "mem/"))} for row in rows]


def same_weights(a, b) -> bool:
    a, b = (torch.load(Path(f) / "student.pt", weights_only=True) for f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class CountSyncs(TorchDispatchMode):
    """Notes the operations that make a GPU wait; a boolean mask as an index is one too."""

    def __init__(self):
        super().__init__()
        self.syncs, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masked = name.startswith("index") and isinstance(args[1], (list, tuple)) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        if not self.paused and (name in SYNCS or masked):
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_syncs() -> Iterator[list]:
    """Their names, but for those of optimizer.step: on a CPU, Adam reads its step counter."""
    counter = CountSyncs()

    def uncounted(step):
        def run(self, *args, **kwargs):
            counter.paused = True
            try:
                return step(self, *args, **kwargs)
            finally:
                counter.paused = False
        return run

    with contextlib.ExitStack() as stack:
        for optimizer in (torch.optim.Adam, torch.optim.SGD):
            stack.enter_context(mock.patch.object(optimizer, "step", uncounted(optimizer.step)))
        stack.enter_context(counter)
        yield counter.syncs
