"""No GPU unless asked for, one thread (exact repeats, and the cores stay free), paths, markers.

  pytest -m cuda tests                  # only what needs a GPU
  TEST_CUDA=1 pytest tests              # everything, with the GPU in sight
"""
import os
import signal
import sys
from pathlib import Path

import pytest

sys.dont_write_bytecode = True  # nor do the processes that tests start
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for them too
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, for all of them
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


def wants_cuda(config):
    return config.option.markexpr == "cuda" or os.environ.get("TEST_CUDA") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; left out by -m 'not slow'")
    config.addinivalue_line("markers", "cuda: needs a GPU; skipped unless asked for by -m cuda")
    if not wants_cuda(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if wants_cuda(config):
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m cuda"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """For --data_dir: what one test trains as a teacher, the next one finds."""
    return tmp_path_factory.mktemp("data")
