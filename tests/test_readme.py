"""What README.md tells a user to type in Python is run as it stands there."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import common
from tools import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
OWN, AWAY = BLOCKS


def run_python(words, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_network_and_loss(tmp_path):
    for name in ("common.py", "adadfkd.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "my_method.py").write_text(OWN)
    text = run_python(["my_method.py", "--smoke", "--student", "my_method.py:small"], tmp_path)
    assert "my_method.py:small is right on" in text


def take_away(tmp_path, lines):
    shutil.copy(ROOT / "common.py", tmp_path)
    net = common.build_model("wrn16_1", 10)
    torch.save(net.state_dict(), tmp_path / "student.pt")
    (tmp_path / "away.py").write_text("\n".join(lines))
    run_python(["away.py"], tmp_path)
    return net.eval()


def test_plain_torch_and_export(tmp_path):
    lines = [line for line in AWAY.splitlines() if "onnx" not in line]
    net = take_away(tmp_path, lines)
    exported = torch.export.load(tmp_path / "student.pt2").module()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(exported(x), net(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="pip install onnx onnxscript")
def test_onnx(tmp_path):
    import onnx
    lines = [line for line in AWAY.splitlines() if "torch.export" not in line]
    take_away(tmp_path, lines)
    onnx.checker.check_model(onnx.load(tmp_path / "student.onnx"))
