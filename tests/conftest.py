"""One thread (exact repeats, and the cores stay free for parallel work), paths, and the marker of long tests."""
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: longer than ten seconds; left out with -m 'not slow'")
