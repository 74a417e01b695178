"""On a pretended GPU: every script runs to its end and no step waits. On a real one: numbers.

  pytest -m cuda tests/test_gpu.py      # the second half, where there is a GPU
"""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import adadfkd
import akd_gan
import common
import gda_kd
import netgraft
import pgdi
from tools import ROOT, metrics, result, run

PRETEND = ROOT / "tests" / "pretend_cuda.py"


def python(*words, cwd=ROOT, **env):
    """(exit code, stdout, stderr); skips where torch takes no pretended device."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "tests"), **env}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, text=True,
                          capture_output=True, timeout=300)
    if "NOT HERE" in done.stdout:
        pytest.skip(done.stdout)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Teachers with random weights: what is tested here does not need good ones."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "teachers").mkdir()
    torch.manual_seed(0)
    for arch in ("resnet8", "resnet14"):
        state = common.build_model(arch, 10).state_dict()
        torch.save(state, folder / "teachers" / f"shapes_{arch}_smoke.pt")
    return folder


# --------------------------------------------------------------------------------- a pretended GPU

CHECKS = """
import torch, pretend_cuda
if not pretend_cuda.install():
    print("NOT HERE: this torch takes no pretended device"); raise SystemExit
def refused(work):
    try: work()
    except (RuntimeError, TypeError): return True
x, y = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
cpu_rng, rng = torch.Generator().manual_seed(0), torch.Generator("cuda").manual_seed(0)
assert x.is_cuda and torch.device("cuda").type == "cuda" and not y.is_cuda
assert refused(lambda: x + y) and refused(lambda: y[x[0].long()]) and refused(x.numpy)
assert refused(lambda: torch.rand(2, generator=cpu_rng, device="cuda"))
assert refused(lambda: torch.rand(2, generator=rng))
assert refused(lambda: rng.set_state(cpu_rng.get_state())) and len(rng.get_state()) == 16
state = rng.get_state()
a = torch.rand(3, generator=rng, device="cuda").tolist()
rng.set_state(state)
assert a == torch.rand(3, generator=rng, device="cuda").tolist()
for n, work in enumerate((
        lambda: x + 1, lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(),
        lambda: torch.tensor([1.0], device="cuda"), lambda: float(x[0, 0]), lambda: x.tolist())):
    costs = pretend_cuda.start_counting()
    work()
    assert sum(costs.syncs.values()) == (n > 0), (n, costs.syncs)
conv = torch.nn.Conv2d(3, 8, 3).to("cuda")
costs = pretend_cuda.start_counting()
with torch.autocast("cuda", torch.bfloat16):
    out = conv(torch.ones(2, 3, 8, 8, device="cuda"))
out.float().sum().backward()
assert out.dtype == torch.bfloat16 and conv.weight.grad.is_cuda
assert costs.flops == 2 * (2 * 2 * 8 * 36 * 27) and costs.launches > 4, costs  # and of the weights
"""


def test_the_pretended_gpu_refuses_and_counts():
    code, out, err = python("-c", CHECKS)
    assert code == 0, err


def smoke(script, *flags, cwd, data_dir, **env):
    return python(PRETEND, script, "--smoke", "--device", "cuda", "--data_dir", data_dir,
                  "--run_name", "run", *flags, cwd=cwd, **env)


@pytest.mark.slow
@pytest.mark.parametrize("script, kind, flags", [
    ("pgdi.py", "bfloat16", []),
    ("adadfkd.py", "bfloat16", []),
    ("akd_gan.py", "bfloat16", ["--preset", "strong", "--student", "resnet8"]),
    ("gda_kd.py", "float32", []),
    ("gda_kd.py", "bfloat16", ["--preset", "fs_meta", "--teacher", "resnet12_thin",
                               "--student", "resnet12_thin"]),
    ("netgraft.py", "float32", ["--epochs_block", "2", "0", "--epochs_net", "0", "2"]),
])
def test_a_script_runs_on_it_and_no_step_waits(script, kind, flags, tmp_path, data_dir):
    code, out, err = smoke(script, *flags, cwd=tmp_path, data_dir=data_dir)
    assert code == 0, err[-2000:]
    assert f"cuda:0, {kind}" in out
    assert result(tmp_path / "runs" / "run")[0]["device"] == "Pretended GPU"
    steps = json.loads(out.splitlines()[-1])
    assert steps
    for name, step in steps.items():
        assert step["syncs"] == {}, name
        assert step["launches"] > 30


@pytest.mark.slow
def test_a_run_goes_on_on_another_kind_of_device(tmp_path, data_dir):
    code, out, err = smoke("pgdi.py", "--amp", "none", "--save_every", "1", cwd=tmp_path,
                           data_dir=data_dir, STOP_AFTER_EPOCH="1")
    assert code == 130 and "--resume runs/run" in err
    code, out, err = run("pgdi.py", "--resume", "runs/run", "--device", "cpu", cwd=tmp_path)
    assert code == 0, err
    assert len(re.findall("saved on cuda, going on on cpu: random numbers", out)) == 1
    assert [row["epoch"] for row in metrics(tmp_path / "runs/run")] == [0, 1, 1, 1]


LAUNCHES = """
import steps, pretend_cuda
if not pretend_cuda.install():
    print("NOT HERE: this torch takes no pretended device"); raise SystemExit
step = steps.steps_of("gda_kd", "", pretend_cuda.CUDA, "none")[0]
pretend_cuda.hollow = True
step.work()
costs = pretend_cuda.start_counting()
step.work()
print(costs.launches, sum(costs.syncs.values()))
"""


@pytest.mark.slow
def test_a_step_of_gda_sends_all_groups_through_the_network_in_one_pass():
    code, out, err = python("-c", LAUNCHES)
    assert code == 0, err
    launches, syncs = map(int, out.split())
    assert launches < 1900  # six passes of the student, one for each group: 2,032
    assert syncs == 0


# -------------------------------------------------------------------------------------- a real GPU

@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["auto", "none"])
@pytest.mark.parametrize("script", ["pgdi.py", "adadfkd.py", "akd_gan.py", "gda_kd.py",
                                    "netgraft.py"])
def test_a_script_runs_on_a_gpu(script, amp, tmp_path, data_dir):
    flags = ["--smoke", "--device", "cuda", "--amp", amp, "--data_dir", data_dir]
    code, out, err = run(script, *flags, cwd=tmp_path)
    assert code == 0, err
    assert "on shapes" in out and "cuda:0" in out


@pytest.mark.cuda
def test_channel_statistics_of_bfloat16():
    rng = torch.Generator("cuda").manual_seed(0)
    h = 3 + 2 * torch.randn(64, 32, 16, 16, generator=rng, device="cuda")
    h = h.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    exact = h.detach().double().requires_grad_()
    weights = torch.randn(2, 32, generator=rng, device="cuda")

    found = common.ChannelStatistics.apply(h)
    var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    (found * weights).sum().backward()
    (torch.stack([mean, var]) * weights).sum().backward()
    assert found.dtype == torch.float32
    assert (found - torch.stack([mean, var])).abs().max() < 1e-4
    assert (h.grad - exact.grad).abs().max() < 0.02 * exact.grad.abs().max()


def two_networks(device):
    torch.manual_seed(0)
    nets = [common.build_model(arch, 10).eval().to(device) for arch in ("resnet14", "resnet8")]
    return nets[0].requires_grad_(False), nets[1]


def fake_images(device, n=32):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 32, 32, generator=rng)
    labels = torch.arange(n) % 10
    names = [str(c) for c in range(10)]
    data = common.Data("shapes", lambda split: (common.quantize(x), labels, names), device, "half")
    return x.to(device), labels.to(device), data


def pgdi_losses(device):
    teacher, student = two_networks(device)
    x, y, data = fake_images(device)
    args = replace(pgdi.Args(), amp="none")
    v = data.normalize(x)
    shots, _ = pgdi.see_shots(teacher, v[:20], y[:20], 10)
    judges = pgdi.Judges(teacher, shots, pgdi.stored_statistics(teacher, v))
    judges.student = student
    terms, _ = pgdi.image_terms(v, y, judges, args)
    s_logits, t_logits = student(v), teacher(v)
    return [*terms.values(), *pgdi.kd_loss(s_logits, t_logits, 8, 0.5, 20.0)]


def adadfkd_losses(device):
    teacher, student = two_networks(device)
    x, _, data = fake_images(device)
    args = replace(adadfkd.Args(), amp="none")
    scene = adadfkd.Scene(teacher, student, data, None, args)
    queue = adadfkd.Recent(256, (64,), device)
    keys = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    queue.add(torch.nn.functional.normalize(keys).to(device))
    weights = dict(ent=-20.0, balance=1.0, oh=1.0, act=1.0, bn=1.0, adv=1.0, rel=0.1)
    terms, _ = adadfkd.generator_terms(x, queue, (20, 200), weights, scene)
    return list(terms.values())


def akd_gan_losses(device):
    teacher, student = two_networks(device)
    _, _, data = fake_images(device)
    args = replace(akd_gan.Args(), amp="none", loss="kl", bn=1.0, oh=1.0, balance=1.0)
    loss, terms = akd_gan.generator_loss(data.normalize(data.test_x), student, teacher, args)
    return [loss, *terms.values()]


def gda_kd_losses(device):
    teacher, student = two_networks(device)
    _, y, data = fake_images(device)
    x = data.normalize(data.test_x)
    s_logits, t_logits = [net(x).unflatten(0, (2, -1)) for net in (student, teacher)]
    losses = []
    for distiller in gda_kd.DISTILLERS:
        args = replace(gda_kd.Args(), distiller=distiller)
        losses.append(gda_kd.classification_loss(s_logits, t_logits, y, 3, args)[0])
    return losses


def netgraft_losses(device):
    teacher, student = two_networks(device)
    _, _, data = fake_images(device)
    x = data.normalize(data.test_x)
    pair = netgraft.match(teacher, student, 32)
    s_logits = pair.grafted(0, 1).eval()(pair.prefix(x))
    return [netgraft.norm_mse(s_logits, teacher(x))]


@pytest.mark.cuda
@pytest.mark.parametrize("losses", [pgdi_losses, adadfkd_losses, akd_gan_losses, gda_kd_losses,
                                    netgraft_losses])
def test_a_gpu_computes_the_losses_of_a_cpu(losses):
    torch.backends.cudnn.allow_tf32 = False
    a = torch.stack([loss.detach() for loss in losses("cpu")])
    b = torch.stack([loss.detach() for loss in losses("cuda")]).cpu()
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), (a, b)
