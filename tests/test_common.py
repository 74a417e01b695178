"""Tests of common.py. Golden tests (test_golden_*) read GOLDEN_DIR; DATA_DIR and TEACHER_DIR point to real files."""
import argparse
import copy
import dataclasses
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import kill
import paper
import toy
from tools import ROOT, close, load_golden, metrics, same_weights

REAL, TEACHERS = os.environ.get("DATA_DIR"), os.environ.get("TEACHER_DIR")
needs_data = pytest.mark.skipif(not REAL, reason="DATA_DIR (folder with the unpacked CIFAR sets) is not set")
needs_teachers = pytest.mark.skipif(not TEACHERS, reason="TEACHER_DIR (folder with published checkpoints) is not set")


# ------------------------------------------------------------------------------------------------------ golden numbers

GOLDEN, CONFIG = load_golden("common")
NETS = json.loads(bytes(GOLDEN["net/index"]))
READ = (r"config", r"fill/salt", r"x/\w+", r"net/index",
        r"net/.+/(meta|logits_std|logits|feat|logits_train|bnstat_train)",
        r"sgd/[^/]+/(y|hyp|loss|abs_sum|sq_sum)", r"norm/in", r"norm/[^/]+/(mean_std|out)",
        r"crop/\d+/(in|dy|dx|flip|out)",
        r"eval/[^/]+/(student|teacher|labels|acc1|acc5|agree1|loss|lp_official|lp_single_sqrt|js_distance)",
        r"fewshot/netgraft/[^/]+/(positions|sorted_index)", r"fewshot/pgdi/\d+/(labels|seed_shots|indices)",
        r"subset/akd/[\d.]+/(first64|count|sum|crc32|evaluated)", r"lr/[^/]+", r"order/cifar10_train",
        r"real/(ids|x|y)", r"real/[^/]+/logits")  # real/*: read where TEACHER_DIR holds the files


def filled(state, rule):
    """Weights made of the official key names, so that none need to be stored: rule "std" or "live"."""
    out, salt = {}, bytes(GOLDEN["fill/salt"]).decode()
    for key, shape in state:
        z = np.random.RandomState(zlib.crc32((salt + key).encode())).standard_normal(shape)
        if shape == []:
            out[key] = torch.zeros((), dtype=torch.int64)
            continue
        if rule == "std":
            z = np.abs(0.05 * z) + 0.5 if key.endswith("running_var") else 0.05 * z
        elif key.endswith("running_var"):
            z = 0.6 + 0.5 * np.abs(z)
        elif key.endswith(("running_mean", "bias")):
            z = 0.1 * z
        else:
            z = z * np.sqrt(2 / np.prod(shape[1:])) if len(shape) >= 2 else 0.9 + 0.1 * z
        out[key] = torch.from_numpy(np.asarray(z, np.float32))
    return out


def golden_net(case, rule, tmp_path, wrap=lambda sd: {"state_dict": sd}):
    """The net of a golden case, through load_teacher, from a file with the official key names and no architecture."""
    meta = json.loads(bytes(GOLDEN[f"net/{case}/meta"]))
    torch.save(wrap(filled(meta["state"], rule)), tmp_path / "net.pth")
    net, info = common.load_teacher(tmp_path / "net.pth", num_classes=meta["classes"])
    return net, info, meta


@pytest.mark.parametrize("case", NETS)
def test_golden_network(case, tmp_path):
    net, info, meta = golden_net(case, "live", tmp_path, LAYOUTS["module"])
    zoo, name, classes = case.split("/")
    params, macs = common.count_params_macs(net, meta["input"])
    buffers = sum(b.numel() for b in net.buffers())
    assert (info["num_classes"], params, macs, buffers) == (meta["classes"], meta["params"], meta["macs"],
                                                            meta["buffers"])
    official = [[re.sub(r"^linear\.", "fc.", k.replace(".shortcut.", ".downsample.")), list(v.shape)]
                for k, v in net.state_dict().items()]
    ours = [[k, list(v.shape)] for k, v in net.state_dict().items()]
    assert meta["state"] in (official, ours)
    name = name.split("@")[0]
    asked = {"netgraft": "netgraft_" + name.replace("_teacher", ""), "torchvision": name + "_imagenet",
             "akamaster": name + "_a"}.get(zoo, name)
    assert common.canonical(asked) == info["arch"]
    assert [k for k in common.build_model(asked, int(classes)).state_dict()] == [k for k, _ in ours]
    x = torch.from_numpy(GOLDEN[f"x/{meta['input']}"])
    with torch.no_grad():
        logits, feats = net(x, return_features=True)
        assert torch.equal(net(x), logits)
    close(logits, GOLDEN[f"net/{case}/logits"], 1e-4)
    if f"net/{case}/feat" in GOLDEN:
        close(feats[-1][:, :32], GOLDEN[f"net/{case}/feat"], 1e-4)
    std, _, _ = golden_net(case, "std", tmp_path)
    with torch.no_grad():
        close(std(x), GOLDEN[f"net/{case}/logits_std"], 1e-4)
    if f"net/{case}/logits_train" in GOLDEN:
        net.train()
        with torch.no_grad():
            close(net(torch.from_numpy(GOLDEN["x/train32"])), GOLDEN[f"net/{case}/logits_train"], 1e-4)
        stats = sum(b.abs().sum().double() for k, b in net.named_buffers() if "running" in k)
        close(stats, GOLDEN[f"net/{case}/bnstat_train"], 1e-4)


@pytest.mark.parametrize("case", CONFIG["sgd"]["cases"])
def test_golden_sgd(case, tmp_path):
    spec, config = CONFIG["sgd"]["cases"][case], CONFIG["sgd"]
    net, _, _ = golden_net(f"{spec['zoo']}/{spec['arch']}/{spec['classes']}", config["rule"], tmp_path)
    lr, momentum, decay, nesterov, smoothing = GOLDEN[f"sgd/{case}/hyp"].tolist()
    optimizer = torch.optim.SGD(net.train().parameters(), lr, momentum, weight_decay=decay, nesterov=bool(nesterov))
    x, y, losses = torch.from_numpy(GOLDEN[config["input"]]), torch.from_numpy(GOLDEN[f"sgd/{case}/y"]), []
    for _ in range(config["steps"]):
        loss = F.cross_entropy(net(x), y, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    close(losses, GOLDEN[f"sgd/{case}/loss"], 1e-3)
    close(sum(p.detach().double().abs().sum() for p in net.parameters()), GOLDEN[f"sgd/{case}/abs_sum"], 1e-6)
    close(sum((p.detach().double() ** 2).sum() for p in net.parameters()), GOLDEN[f"sgd/{case}/sq_sum"], 1e-6)


def fake_data(x=None, norm="half", classes=10, size=32, n=4):
    """A Data of given uint8 images (N, 3, S, S), without files."""
    x = np.zeros((n, 3, size, size), np.uint8) if x is None else np.asarray(x)
    data = common.Data("fake", lambda split: (x, np.arange(len(x)) % classes, [str(c) for c in range(classes)]))
    data.mean, data.std = common.norm_constants(norm)
    return data


@pytest.mark.parametrize("name", [k.split("/")[1] for k in GOLDEN if re.fullmatch(r"norm/\w+/out", k)])
def test_golden_norm(name):
    constants = GOLDEN[f"norm/{name}/mean_std"]
    assert np.abs(np.array(common.NORMS.get(name, constants)) - constants).max() < 1e-12
    data = fake_data(GOLDEN["norm/in"].transpose(0, 3, 1, 2),
                     name if name in common.NORMS else constants.ravel().tolist())
    n = CONFIG["norm"]["images"]
    close(data.normalize(data.test_x)[:n], GOLDEN[f"norm/{name}/out"], 2e-6)
    close(data.normalize(data.test_x.float() / 255)[:n], GOLDEN[f"norm/{name}/out"], 2e-6)


@pytest.mark.parametrize("size", [k.split("/")[1] for k in GOLDEN if re.fullmatch(r"crop/\d+/in", k)])
def test_golden_crop(size):
    x, out = (torch.from_numpy(GOLDEN[f"crop/{size}/{k}"]).permute(0, 3, 1, 2) for k in ("in", "out"))
    dy, dx, flip = (torch.from_numpy(GOLDEN[f"crop/{size}/{k}"]) for k in ("dy", "dx", "flip"))
    assert torch.equal(common.crop_flip(x, dy, dx, flip, CONFIG["crop"]["padding"]), out)
    if CONFIG["crop"]["padding"] == common.PADDING:
        data = fake_data(x.numpy())
        mirrored = torch.where(flip, 2 * common.PADDING - dx, dx)
        assert torch.equal(data._windows[flip.long(), torch.arange(len(x)), dy, mirrored].permute(0, 3, 1, 2), out)


@pytest.mark.parametrize("case", CONFIG["eval"])
def test_golden_eval(case):
    g = {k: GOLDEN[f"eval/{case}/{k}"] for k in ("student", "teacher", "labels", "acc1", "acc5", "agree1", "loss",
                                                 "lp_official",
                                                 "lp_single_sqrt", "js_distance")}
    s, t = torch.from_numpy(g["student"]), torch.from_numpy(g["teacher"])
    scores = {**common.accuracy(s, torch.from_numpy(g["labels"])), **common.agreement(s, t)}
    for key, ours, tolerance in (("acc1", "top1", 1e-9), ("acc5", "top5", 1e-9), ("agree1", "agree1", 1e-6),
                                 ("loss", "loss", 1e-5),
                                 ("lp_official", "L_p", 1e-5), ("lp_single_sqrt", "L_p_sqrt", 1e-5)):
        assert abs(scores[ours] - float(g[key])) <= tolerance * max(1, abs(float(g[key]))), key
    assert np.abs(common.js_distance(s, t).numpy() - g["js_distance"]).max() <= 1e-6


@pytest.mark.parametrize("name", CONFIG["fewshot"].get("netgraft", {}))
def test_golden_fewshot_netgraft(name):
    c = CONFIG["fewshot"]["netgraft"][name]
    labels = np.repeat(np.arange(c["classes"]), c["per_class"])
    starts = np.arange(c["classes"])[:, None] * c["per_class"]
    index = common.few_shot_indices(labels, c["shots"], "netgraft", c["seed"]).reshape(c["classes"], -1)
    assert np.array_equal(index - starts, GOLDEN[f"fewshot/netgraft/{name}/positions"])
    if f"fewshot/netgraft/{name}/sorted_index" in GOLDEN:
        index = common.few_shot_indices(labels, c["shots"], "netgraft", c["seed"], GOLDEN["order/cifar10_train"])
        assert np.array_equal(index.reshape(c["classes"], -1) - starts, GOLDEN[f"fewshot/netgraft/{name}/sorted_index"])


@pytest.mark.parametrize("classes", CONFIG["fewshot"].get("pgdi", {}))
def test_golden_fewshot_pgdi(classes):
    g = {k: GOLDEN[f"fewshot/pgdi/{classes}/{k}"] for k in ("labels", "seed_shots", "indices")}
    seed, shots = g["seed_shots"].tolist()
    assert np.array_equal(common.few_shot_indices(g["labels"], shots, "pgdi", seed), g["indices"])


@pytest.mark.parametrize("fraction", CONFIG["subset"]["fractions"])
def test_golden_subset(fraction):
    g = {k: GOLDEN[f"subset/akd/{fraction}/{k}"] for k in ("first64", "count", "sum", "crc32", "evaluated")}
    index = common.subset_indices(CONFIG["subset"]["images"], float(fraction), CONFIG["subset"]["seed"])
    assert np.array_equal(index[:64], g["first64"]) and len(index) == g["count"] and index.sum() == g["sum"]
    assert zlib.crc32(index.astype("<i8").tobytes()) == g["crc32"]
    kept = common.batches(len(index), CONFIG["subset"]["batch"], drop_last=True)
    assert sum(len(b) for b in kept) == g["evaluated"]


@pytest.mark.parametrize("name", CONFIG["lr"])
def test_golden_lr(name):
    recipe = CONFIG["lr"][name]
    ours = [common.lr_at(recipe, epoch) for epoch in range(recipe["epochs"])]
    np.testing.assert_allclose(ours, GOLDEN[f"lr/{name}"], rtol=1e-9)


@needs_teachers
@pytest.mark.parametrize("name", CONFIG["real"]["nets"])
def test_golden_real(name):
    path = Path(TEACHERS) / CONFIG["real"]["nets"][name]
    if not path.is_file():
        pytest.skip(f"{path.name} is not in TEACHER_DIR")
    net, info = common.load_teacher(path)
    data = fake_data(GOLDEN["real/x"].transpose(0, 3, 1, 2), info["norm"])
    assert info["norm"] == CONFIG["real"]["norm"] and info["num_classes"] == CONFIG["real"]["classes"]
    assert np.abs(common.predict(net, data).numpy() - GOLDEN[f"real/{name}/logits"]).max() <= 1e-3


def test_golden_every_key_is_read():
    unread = [k for k in GOLDEN if not any(re.fullmatch(pattern, k) for pattern in READ)]
    assert not unread


# ------------------------------------------------------------------------------------------------------------ networks

def test_features_and_sizes():
    for name, size, want in (("resnet20", 32, [(16, 32), (16, 32), (32, 16), (64, 8), 64]),
                             ("resnet8x4", 64, [(32, 64), (64, 64), (128, 32), (256, 16), 256]),
                             ("resnet34_imagenet", 64, [(64, 16), (64, 16), (128, 8), (256, 4), (512, 2), 512]),
                             ("wrn16_2", 64, [(16, 64), (32, 64), (64, 32), (128, 16), 128]),
                             ("vgg8", 64, [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4), 512]),
                             ("netgraft_vgg16_student", 32, [(64, 16), (128, 8), (256, 4), (256, 2), (256, 1), 256])):
        net = common.build_model(name, 7, size).eval()
        logits, feats = net(torch.rand(2, 3, size, size), return_features=True)
        assert logits.shape == (2, 7)
        assert [f.shape[1] if f.ndim == 2 else tuple(f.shape[1:3]) for f in feats] == want, name
        head = next(m for m in net.modules() if isinstance(m, nn.Linear))
        assert head.in_features == feats[-1].shape[1]
    wrn = common.build_model("wrn16_1", 10).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(wrn(x, return_features=True)[1][0], wrn.conv1(x))  # the raw stem output


def test_names_and_aliases():
    for spelling, name in (("WRN-40-2", "wrn40_2"), ("wrn_16_1", "wrn16_1"), ("ResNet34_8x", "resnet34"),
                           ("cifar_resnet50", "resnet50"),
                           ("vgg11_bn", "vgg11"), ("vgg16-half", "vgg16_half"),
                           ("VGG16-graft", "netgraft_vgg16_student"),
                           ("ResNet18_8x_Small", "resnet18_small")):
        assert common.canonical(spelling) == name and name in common.MODELS
    assert len(common.MODELS) == len(set(common.MODELS)) >= 35


def test_folded_network_adds_its_bias_by_position(tmp_path):
    net = common.build_model("netgraft_vgg16_folded", 10)
    params, macs = common.count_params_macs(net, 32)
    assert params == 5279306 and round(macs / 1e6, 2) == 225.91
    net.features[4][0].bias_map.normal_()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    loaded, info = common.load_teacher(tmp_path / "a.pt")
    x = torch.rand(2, 3, 32, 32)
    assert info["arch"] == "netgraft_vgg16_folded" and torch.equal(loaded(x), net.eval()(x))
    conv, h = net.features[4][0], torch.rand(1, 256, 2, 2)
    assert torch.allclose(conv(h), F.conv2d(h, conv.weight, padding=1) + conv.bias_map)
    plain = {k: v for k, v in net.state_dict().items() if "bias_map" not in k}
    # bias-free 1x1 convs fold into a plain conv
    torch.save({**plain, "features.4.0.bias": torch.zeros(256)}, tmp_path / "b.pt")
    assert common.load_teacher(tmp_path / "b.pt")[1]["arch"] == "netgraft_vgg16_folded"


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_channel_statistics_equal_var_mean(layout):
    h = (3 + 2 * torch.randn(6, 5, 4, 4, dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(common.ChannelStatistics.apply, (h,))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        h.data[:, 1] = 3.0  # a dead channel
        mu, var = common.ChannelStatistics.apply(h.to(dtype))
        var_ref, mu_ref = torch.var_mean(h.to(dtype).double(), (0, 2, 3), unbiased=False)
        close(mu, mu_ref.detach(), tolerance)
        close(var, var_ref.detach(), tolerance)


def test_initialisation():
    torch.manual_seed(0)
    net = common.build_model("resnet20", 10)
    w = net.layer3[2].conv2.weight
    assert abs(w.std().item() / math.sqrt(2 / (64 * 9)) - 1) < 0.03 and (net.bn1.weight == 1).all()
    assert net.linear.weight.abs().max() <= 1 / 8 and net.linear.bias.abs().max() > 0  # framework default
    akamaster = common.build_model("resnet20_a", 10)
    assert abs(akamaster.linear.weight.std().item() / math.sqrt(2 / 64) - 1) < 0.15
    assert abs(akamaster.layer1[0].conv1.weight.std().item() / math.sqrt(2 / (16 * 9)) - 1) < 0.1
    vgg = common.build_model("vgg8", 10)
    assert abs(vgg.classifier.weight.std().item() / 0.01 - 1) < 0.1 and not vgg.block0[0].bias.any()
    assert not vgg.classifier.bias.any()
    assert not common.build_model("wrn16_1", 10).fc.bias.any()
    torch.manual_seed(1)
    default = common.build_model("resnet18", 10, init="default")
    assert default.conv1.weight.abs().max() <= 1 / math.sqrt(27) + 1e-6  # uniform, not normal


def test_own_network(tmp_path):
    (tmp_path / "mynet.py").write_text(
        "import torch.nn as nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(8, num_classes))\n")
    spec = f"{tmp_path}/mynet.py:small"
    net = common.build_model(spec, 5).eval()
    logits, feats = net(torch.rand(2, 3, 32, 32), return_features=True)
    assert logits.shape == (2, 5) and [f.shape for f in feats] == [(2, 8)]
    assert torch.equal(F.linear(feats[0], net[-1].weight, net[-1].bias), logits)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert not torch.equal(twin(torch.rand(2, 3, 32, 32)), net(torch.rand(2, 3, 32, 32)))
    assert list(net.state_dict())[0] == "0.weight"  # no wrapper prefix
    torch.save({"state_dict": net.state_dict(), "arch": spec}, tmp_path / "own.pt")
    assert common.load_teacher(tmp_path / "own.pt", spec)[1]["arch"] == spec
    with pytest.raises(SystemExit):  # no code is run on the word of a file
        common.load_teacher(tmp_path / "own.pt")


OWN_NETS = """
import torch
import torch.nn as nn
from beside import WIDTH


class Net(nn.Module):
    def __init__(self, num_classes, first=True):
        super().__init__()
        self.head = nn.Linear(WIDTH, num_classes)  # registered before the one that comes before it
        self.gate, self.net, self.spare = nn.Linear(WIDTH, WIDTH), nn.Conv2d(3, WIDTH, 3), nn.Linear(2, 2)

    def forward(self, x):
        x = self.net(x).mean((2, 3))
        return self.head(x * self.gate(x))


class Pooled(Net):
    def forward(self, x, return_features=False):
        pooled = self.net(x).mean((2, 3))
        return (self.head(pooled), pooled) if return_features else self.head(pooled)


def compiled(num_classes):
    return torch.compile(Net(num_classes))
"""


@pytest.mark.parametrize("name", ("Net", "Pooled", "compiled"))
def test_features_of_own_networks(tmp_path, name):
    """What enters the head, whatever the order of registration or the network's own way to give features."""
    (tmp_path / "nets.py").write_text(OWN_NETS)
    (tmp_path / "beside.py").write_text("WIDTH = 6")
    spec = f"{tmp_path}/nets.py:{name}"
    net = common.build_model(spec, 5).eval()
    logits, feats = net(torch.rand(2, 3, 32, 32), return_features=True)
    assert len(feats) == 1 and torch.equal(net.head(feats[0]), logits)
    for prefix in ("", "module.", "module._orig_mod."):  # its own name `net` is no wrapper
        torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()}, tmp_path / "t.pt")
        assert torch.equal(common.load_teacher(tmp_path / "t.pt", spec, 5)[0].head.weight, net.head.weight)


@pytest.mark.parametrize("method", paper.METHODS)
def test_bad_networks_end_before_a_teacher_is_trained(world, tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", tmp_path / "own")
    Path("plain.py").write_text("import torch.nn as nn\n\n\ndef net(num_classes):\n"
                                "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))\n")
    monkeypatch.setattr(common, "train_missing", lambda *_: pytest.fail("a teacher would be trained"))
    module = __import__(method)
    without_bn = {"akd_gan": ["--preset", "strong"], "pgdi": [], "adadfkd": []}
    for flags in (["--student", "no.py:net"], ["--student", "netgraft_vgg16_student", "--dataset", "large"],
                  *([["--teacher", "plain.py:net", *without_bn[method]]] if method in without_bn else []),
                  *([["--student", "wrn16_1"], ["--epochs_block", "0", "--epochs_net", "0"], ["--batch_size", "1"]]
                    if method == "netgraft" else [])):
        if "large" in flags:
            x = np.zeros((40, 64, 64, 3), np.uint8)
            Path("large").mkdir()
            [np.savez(f"large/{s}.npz", x=x, y=np.arange(40) % 4) for s in ("train", "test")]
        argv = ["--dataset", "own", "--teacher", "resnet20", "--student", "resnet8", *flags]
        with pytest.raises(SystemExit) as stop:
            module.main(common.parse_args(module.Args, module.PRESETS, module.ALIASES, argv))
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1, flags


def test_own_teacher_with_an_input_size_of_its_own(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", tmp_path / "own")
    Path("large.py").write_text("from torch.nn import Flatten, Linear, MaxPool2d, Sequential\n\n\n"
                                "def net(num_classes):\n"
                                "    return Sequential(MaxPool2d(8), Flatten(), Linear(192, num_classes))\n")
    args = common.parse_args(toy.Args, argv=["--dataset", "own", "--teacher", "large.py:net", "--allow_weak_teacher"])
    net, info = common.get_teacher(args, common.load_data("own"), input_size=64)
    assert info["arch"] == "large.py:net" and net(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    row = common.evaluate_file(common.parse_args(common.EvalArgs, argv=[
        "--evaluate", info["path"], "--arch", "large.py:net", "--input_size", "64", "--dataset", "own"]))
    assert row["last"] == pytest.approx(info["top1"])


# ------------------------------------------------------------------------------------------------------------ teachers

LAYOUTS = {
    "bare": lambda sd: sd, "state_dict": lambda sd: {"state_dict": sd, "epoch": 3, "best_acc1": 91.5},
    "module": lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}},
    "module.student": lambda sd: {"model": {f"module.student.{k}": v for k, v in sd.items()}},
    "student beside teacher": lambda sd: {"model": {**{f"student.{k}": v for k, v in sd.items()},
                                                    **{f"teacher.{k}": v * 0 for k, v in sd.items()}}},
    "compiled": lambda sd: {"net": {f"_orig_mod.{k}": v for k, v in sd.items()}},
    "model_state_dict": lambda sd: {"model_state_dict": sd, "accuracy": 0.915},
    "ema only": lambda sd: {"state_dict_ema": sd},
    "timm": lambda sd: {"state_dict": sd, "args": argparse.Namespace(model="x", lr=0.1), "metric": np.float64(72.94),
                        "arch": "wrong"},
    "half": lambda sd: {k: v.half() if v.is_floating_point() else v for k, v in sd.items()},
    "old": lambda sd: {"state_dict": {k: v for k, v in sd.items() if "num_batches" not in k},
                       "best_prec1": torch.tensor([91.5])}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ("resnet8", "wrn16_1", "vgg8"))
def test_layouts(arch, layout, tmp_path):
    torch.manual_seed(0)
    net = common.build_model(arch, 11).eval()
    torch.save(LAYOUTS[layout](net.state_dict()), tmp_path / "t.pth", _use_new_zipfile_serialization=layout != "old")
    state = torch.get_rng_state()
    loaded, info = common.load_teacher(tmp_path / "t.pth")
    assert torch.equal(state, torch.get_rng_state())  # loading moves no random stream
    assert (info["arch"], info["num_classes"]) == (arch, 11) and not loaded.training
    x = torch.rand(2, 3, 32, 32)
    close(loaded(x), net(x).detach(), 5e-3 if layout == "half" else 1e-7)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert info["acc1"] == pytest.approx({"state_dict": 91.5, "model_state_dict": 91.5, "timm": 72.94,
                                          "old": 91.5}.get(layout), abs=1e-4)


@pytest.mark.parametrize("home", ("numpy.core.multiarray", "numpy._core.multiarray"))
def test_numpy_scalars_of_both_generations(home, tmp_path):
    module = common.NUMPY_CORE.multiarray

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is module.scalar:
                self.write(pickle.GLOBAL + f"{home}\nscalar\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    fake = type("pickle_module", (), {"Pickler": Pickler, "__name__": "pickle", "dump": staticmethod(
        lambda obj, f, protocol=2: Pickler(f, protocol).dump(obj))})
    net = common.build_model("resnet8", 10)
    torch.save({"state_dict": net.state_dict(), "best_acc1": np.float32(88.5)}, tmp_path / "t.pth", pickle_module=fake,
               _use_new_zipfile_serialization=False)
    assert home.encode() in (tmp_path / "t.pth").read_bytes()
    assert common.load_teacher(tmp_path / "t.pth")[1]["acc1"] == 88.5


def test_norm_of_a_layout(tmp_path):
    def norm(arch, classes, **meta):
        torch.save({"state_dict": common.build_model(arch, classes).state_dict(), **meta}, tmp_path / "t.pth")
        return common.load_teacher(tmp_path / "t.pth")[1]["norm"]

    assert norm("resnet20_a", 10) == "imagenet" and norm("resnet20", 10) is None
    assert norm("resnet20", 100, metric=72.9) == "cifar100_gda" and norm("resnet20", 100) is None
    assert norm("resnet20", 100, norm="cifar100", metric=1.0) == "cifar100"


def test_resnet_with_either_shortcut_answers_to_its_name(tmp_path):
    torch.save(common.build_model("resnet20_a", 10).state_dict(), tmp_path / "t.th")
    assert common.load_teacher(tmp_path / "t.th", "resnet20")[1]["arch"] == "resnet20_a"


def test_lr_warm_up():
    recipe = {"kind": "cosine", "lr": 0.2, "T_max": 240, "eta_min": 2e-3, "warmup": 10, "warmup_lr": 1e-4}
    assert common.lr_at(recipe, 0) == 1e-4 and common.lr_at(recipe, 5) == pytest.approx(1e-4 + 0.5 * (0.2 - 1e-4))
    assert common.lr_at(recipe, 10) == pytest.approx(2e-3 + 0.5 * 0.198 * (1 + math.cos(math.pi * 10 / 240)))
    fast = {"kind": "fast", "lr": 0.4, "epochs": 10}
    assert [common.lr_at(fast, e) for e in (0, 1, 2, 6, 10)] == pytest.approx([0.08, 0.24, 0.4, 0.2, 0])


def test_upsample():
    x = torch.rand(2, 3, 32, 32)
    assert common.upsample(x, 32) is x and common.upsample(x, 224).shape[-1] == 224
    assert torch.equal(common.upsample(x, 63)[:, :, ::2, ::2], x)  # corners aligned


@needs_data
@needs_teachers
@pytest.mark.slow
@pytest.mark.parametrize("file, top1, arch", (("resnet20-12fca82f.th", 91.73, "resnet20_a"),
                                              ("resnet56-4bfd9763.th", 93.39, "resnet56_a")))
def test_real_teacher_scores_as_published(file, top1, arch, tmp_path):
    args = common.parse_args(common.EvalArgs, argv=["--evaluate", f"{TEACHERS}/{file}", "--data_dir", REAL])
    row = common.evaluate_file(args)
    assert row["student"] == arch and abs(row["last"] - top1) <= 0.02


# -------------------------------------------------------------------------------------------------- evaluation, seeds

def test_equal_logits_agree_exactly():
    logits = torch.randn(50, 10) * 20
    assert common.agreement(logits, logits) == {"agree1": 100.0, "L_p": 1.0, "L_p_sqrt": 1.0}
    opposite = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert common.js_distance(opposite, opposite.flip(0)).tolist() == pytest.approx([math.sqrt(math.log(2))] * 2)


def test_predict_restores_the_mode_and_takes_any_size():
    net = common.build_model("resnet8", 4).train()
    for n in (1, 7, 251):
        data = fake_data(np.random.RandomState(0).randint(0, 256, (n, 3, 32, 32), np.uint8), classes=4)
        logits = common.predict(net, data)
        assert net.training and logits.shape == (n, 4) and not logits.is_inference()
        net.eval()
        assert torch.allclose(logits, net(data.normalize(data.test_x)), atol=1e-5)
        net.train()


def test_constants_made_in_inference_mode_serve_a_gradient():
    data, x = fake_data(norm="cifar10"), torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.inference_mode():
        data.normalize(torch.rand(2, 3, 32, 32))
    data.normalize(x).sum().backward()
    assert torch.allclose(x.grad[0, :, 0, 0], 1 / torch.tensor(data.std))


def test_few_classes_have_a_top5():
    assert common.accuracy(torch.eye(3), torch.arange(3)) ["top5"] == 100


def test_rng_kept():
    import random
    common.seed_everything(3)
    want = (random.random(), np.random.rand(), torch.rand(1))
    common.seed_everything(3)
    with common.rng_kept():
        random.random(), np.random.rand(5), torch.rand(5)
    assert (random.random(), np.random.rand(), torch.rand(1)) == want


# ------------------------------------------------------------------------------------------ runs and the command line

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small own data set of coloured noise (4 classes) and a resnet8 teacher that knows it."""
    torch.set_num_threads(1)
    path, rng = tmp_path_factory.mktemp("world"), np.random.RandomState(0)
    (path / "own").mkdir()
    tint = np.array([[90, 0, 0], [0, 90, 0], [0, 0, 90], [60, 60, 60]])
    for split, n in (("train", 80), ("test", 41)):
        y = np.arange(n) % 4
        x = np.clip(rng.randint(0, 160, (n, 32, 32, 3)) + tint[y][:, None, None], 0, 255).astype(np.uint8)
        np.savez(path / "own" / f"{split}.npz", x=x, y=y, classes=["red", "green", "blue", "white"])
    run_python(path, "common.py", "train", "--dataset", "own", "--arch", "resnet8", "--epochs", "6", "--batch_size",
               "20",
               "--lr", "0.05", "--run_name", "t")
    shutil.copy(next((path / "data" / "teachers").glob("own_resnet8-*.pt")), path / "teacher.pt")
    return path


def run_python(cwd, script, *argv, check=True, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], cwd=cwd, env=env, capture_output=True,
                          text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def toy_run(world, tmp_path, monkeypatch):
    """main of the toy method in a folder of its own: toy_run("--epochs", "3") -> (result or exit code, run folder)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", tmp_path / "own")
    base = ["--dataset", "own", "--teacher_ckpt", str(world / "teacher.pt"), "--student", "resnet8", "--batch_size",
            "16",
            "--epochs", "4", "--log_every", "1", "--save_every", "1"]

    def go(*argv, base=base):
        args = common.parse_args(toy.Args, toy.PRESETS, toy.ALIASES, [*base, *argv])
        try:
            return toy.main(args)
        except SystemExit as e:
            return e.code
    return go


def test_runs_begun_in_the_same_second_have_folders_of_their_own(toy_run, monkeypatch):
    monkeypatch.setattr(common.Run, "derived_name", lambda self: "same")
    for _ in range(3):
        assert toy_run("--epochs", "1")["last"] >= 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["same", "same-2", "same-3"]


def test_a_run_that_never_began_does_not_block_its_name(toy_run):
    assert toy_run("--run_name", "r", "--shots", "99") == 2 and Path("runs/r/config.json").is_file()
    Path("runs/r/config.json").rename("runs/r/config.json.part1")  # killed while it was written
    assert toy_run("--run_name", "r", "--epochs", "1")["method"] == "toy"
    assert toy_run("--run_name", "r", "--epochs", "1") == 2  # what has learned is not touched


def test_a_folder_in_use_is_left_alone(toy_run, capsys):
    Path("runs/r").mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; f = open('runs/r/lock', 'w'); "
                               "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert toy_run("--run_name", "r") == 2 and "in use by another process" in capsys.readouterr().err
    holder.communicate()
    assert toy_run("--run_name", "r", "--epochs", "1")["method"] == "toy" and not Path("runs/r/lock").exists()


def test_run_folder(toy_run):
    result = toy_run("--run_name", "a", "--seed", "5")
    folder = Path("runs/a")
    assert {f.name for f in folder.iterdir()} == {"config.json", "src", "metrics.jsonl", "samples", "ckpt_last.pt",
                                                  "student.pt",
                                                   "result.json"}
    config, stored = json.loads((folder / "config.json").read_text()), json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert set(stored) >= {"method", "preset", "dataset", "teacher", "student", "shots", "seed", "teacher_top1", "last",
                           "best",
                           "best_epoch", "top5", "agree1", "L_p", "L_p_sqrt", "n_test", "real_images",
                           "synthetic_images",
                           "seconds", "peak_mb", "device", "torch", "git", "paper"}
    assert stored["method"] == "toy" and stored["n_test"] == 41 and stored["real_images"] == 20 and stored["seed"] == 5
    assert config["args"]["epochs"] == 4 and len(config["derived"]["teacher"]["sha256"]) == 64
    assert len(config["derived"]["shots"]) == 20
    assert (folder / "src" / "toy.py").read_text() == (ROOT / "tests" / "toy.py").read_text()
    assert (folder / "src" / "common.py").exists()
    assert (folder / "samples" / "shots.png").stat().st_size > 1000
    rows = metrics(folder)
    assert [r["epoch"] for r in rows if "acc/test_top1" in r] == [0, 1, 2, 3] and "loss/kd" in rows[0]
    assert rows[-1]["acc/test_top1"] == stored["last"]
    state = torch.load(folder / "student.pt", weights_only=True)
    assert list(state) == list(common.build_model("resnet8", 4).state_dict())
    assert not list(Path("runs").rglob("*.part*"))


def test_same_seed_same_metrics_other_seed_other(toy_run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        toy_run("--run_name", name, "--seed", str(seed))
    assert metrics("runs/a") == metrics("runs/b") != metrics("runs/c")
    assert same_weights("runs/a", "runs/b") and not same_weights("runs/a", "runs/c")


def test_time_limit_and_resume_are_bit_equal(toy_run):
    toy_run("--run_name", "a")
    assert toy_run("--run_name", "b", "--time_limit", "1e-9") == 0
    assert not Path("runs/b/result.json").exists()
    for _ in range(2):
        assert toy_run("--resume", "runs/b", "--time_limit", "1e-9", base=[]) == 0  # one epoch each time
    assert isinstance(toy_run("--resume", "runs/b/ckpt_last.pt", "--time_limit", "0", base=[]), dict)
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    a, b = (json.loads(Path(f"runs/{n}/result.json").read_text()) for n in "ab")
    assert all(a[k] == b[k] for k in ("last", "best", "best_epoch", "agree1", "L_p"))


def test_metrics_after_the_checkpoint_are_cut(toy_run):
    toy_run("--run_name", "a")
    toy_run("--run_name", "b", "--time_limit", "1e-9")
    shutil.copy("runs/b/ckpt_last.pt", "early.pt")
    toy_run("--resume", "runs/b", "--time_limit", "0", base=[])
    Path("runs/b/result.json").unlink()
    Path("runs/b/ckpt_last.pt.part7").write_bytes(b"half a checkpoint")
    shutil.move("early.pt", "runs/b/ckpt_last.pt")  # as if killed in epoch 4 with the last save after epoch 1
    toy_run("--resume", "runs/b", "--time_limit", "0", base=[])
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    assert not list(Path("runs/b").glob("*.part*"))


def test_ctrl_c_stops_at_the_end_of_the_epoch(toy_run, monkeypatch):
    toy_run("--run_name", "a")
    plain, calls = toy.kd_loss, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(toy, "kd_loss", interrupting)
    before = signal.getsignal(signal.SIGINT)
    assert toy_run("--run_name", "b") == 130 and signal.getsignal(signal.SIGINT) is before
    # two steps an epoch: the second one was finished
    assert len(calls) == 4 and not Path("runs/b/result.json").exists()
    assert isinstance(toy_run("--resume", "runs/b", base=[]), dict)
    assert metrics("runs/a") == metrics("runs/b")


def test_ctrl_c_behind_the_last_epoch_loses_nothing(toy_run, monkeypatch):
    toy_run("--run_name", "a")
    with monkeypatch.context() as m:
        m.setattr(toy, "agreement", lambda *_: os.kill(os.getpid(), signal.SIGINT) or {})
        assert toy_run("--run_name", "b", "--save_every", "100") == 130
    assert common.read_checkpoint("runs/b/ckpt_last.pt")["epoch"] == 4
    assert isinstance(toy_run("--resume", "runs/b", base=[]), dict)
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")


def test_finished_run_says_so(toy_run, capsys):
    toy_run("--run_name", "a")
    assert toy_run("--resume", "runs/a", base=[]) == 0 and "finished" in capsys.readouterr().out


def test_resume_before_the_first_checkpoint(toy_run):
    toy_run("--run_name", "a")
    toy_run("--run_name", "b")
    for name in ("result.json", "student.pt", "ckpt_last.pt"):
        Path("runs/b", name).unlink()
    toy_run("--resume", "runs/b", base=[])
    assert metrics("runs/a") == metrics("runs/b")


def test_select_best_test_keeps_those_weights(toy_run, monkeypatch):
    scores, seen = [10.0, 60.0, 20.0, 30.0], []

    def scored(student, data):
        seen.append({k: v.clone() for k, v in student.state_dict().items()})
        return {"top1": scores[len(seen) - 1]}

    monkeypatch.setattr(toy, "evaluate", scored)
    for name, select in (("a", "best_test"), ("b", "last")):
        seen.clear()
        if select == "best_test":  # also across a resume
            assert toy_run("--run_name", name, "--select", select, "--time_limit", "1e-9") == 0
            result = toy_run("--resume", f"runs/{name}", "--time_limit", "0", base=[])
        else:
            result = toy_run("--run_name", name)
        assert (result["last"], result["best"], result["best_epoch"]) == (30.0, 60.0, 1)
        kept = torch.load(f"runs/{name}/student.pt", weights_only=True)
        chosen = [all(torch.equal(kept[k], state[k]) for k in kept) for state in seen]
        assert chosen == [epoch == {"best_test": 1, "last": 3}[select] for epoch in range(4)]


def test_several_students(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = common.Run(toy.Args(device="cpu", run_name="r", student="resnet8,resnet14", epochs=1))
    nets = {"resnet8": common.build_model("resnet8", 4), "resnet14": common.build_model("resnet14", 4)}
    run.restore(**{f"student_{k}": v for k, v in nets.items()})
    run.end_epoch(0, nets, {"resnet8": 40.0, "resnet14": 50.0})
    run.finish({"students": [{"student": k, **run.scores[k]} for k in nets]})
    assert json.loads(Path("runs/r/result.json").read_text())["last"] == 40.0
    assert list(torch.load("runs/r/student.pt", weights_only=True)) == list(nets["resnet8"].state_dict())
    assert Path("runs/r/student_resnet14.pt").exists()
    assert [r["last"] for r in common.result_rows(Path("runs"))] == [40.0, 50.0]
    assert {"acc/test_top1_resnet8", "acc/test_top1_resnet14"} <= set(metrics("runs/r")[-1])


def test_evaluate_reproduces_the_run(toy_run, world):
    result = toy_run("--run_name", "a")
    row = toy_run("--evaluate", "runs/a", base=[])
    assert (row["last"], row["agree1"], row["L_p"]) == (result["last"], result["agree1"], result["L_p"])
    args = common.parse_args(common.EvalArgs, argv=["--evaluate", "runs/a"])
    assert common.evaluate_file(args)["last"] == result["last"]
    args = common.parse_args(common.EvalArgs, argv=["--evaluate", str(world / "teacher.pt"), "--dataset", "own"])
    assert common.evaluate_file(args)["last"] == json.loads((world / "runs/t/result.json").read_text())["last"]


def test_nan_in_a_checkpoint_stops_the_run_and_keeps_the_old_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, net = common.Run(toy.Args(device="cpu", run_name="r", save_every=1)), common.build_model("resnet8", 4)
    run.restore(student=net)
    with torch.no_grad():
        net.linear.bias[0] = math.nan
    with pytest.raises(SystemExit) as stop:
        run.end_epoch(0, net, 25.0)
    assert stop.value.code == 1 and "student.linear.bias" in capsys.readouterr().err
    ckpt = torch.load("runs/r/ckpt_last.pt", weights_only=True)
    assert ckpt["epoch"] == 0 and not ckpt["objects"]["student"]["linear.bias"].isnan().any()


def test_all_kinds_of_state_are_restored(tmp_path, monkeypatch):
    import random
    monkeypatch.chdir(tmp_path)

    def parts():
        torch.manual_seed(0)
        net = nn.Linear(3, 3)
        return dict(student=net, optimizer=torch.optim.Adam(net.parameters()), python=random.Random(1),
                    numpy=np.random.RandomState(2), torch=torch.Generator().manual_seed(3))

    def draw(o):
        o["optimizer"].zero_grad()
        o["student"](torch.rand(2, 3)).sum().backward()
        o["optimizer"].step()
        return (o["python"].random(), o["numpy"].randn(), torch.rand(1, generator=o["torch"]).item(), random.random(),
                np.random.randn(), o["student"].weight.sum().item())

    run, a = common.Run(toy.Args(device="cpu", run_name="r")), parts()
    run.restore(**a)
    draw(a)
    run.save(1)
    want = draw(a)
    args = common.parse_args(toy.Args, toy.PRESETS, toy.ALIASES, ["--resume", "runs/r"])
    b, again = parts(), common.Run(args)
    assert again.restore(**b) == 1 and draw(b) == want


def test_teacher_is_made_cached_and_found_again(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", tmp_path / "own")
    plain = common.train_recipe
    monkeypatch.setattr(common, "train_recipe", lambda args: {**plain(args), "epochs": 2, "batch_size": 16})
    args = common.parse_args(toy.Args, toy.PRESETS, toy.ALIASES,
                             ["--dataset", "own", "--teacher", "resnet8", "--allow_weak_teacher"])

    def teacher():
        common.seed_everything(0)
        net, info = common.get_teacher(args, common.load_data("own", "./data"))
        return info, torch.rand(1).item(), net

    info, first, net = teacher()
    assert "training one" in capsys.readouterr().out and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    again, second, _ = teacher()
    assert "training" not in capsys.readouterr().out and info == again
    assert first == second  # a teacher made on the spot leaves the random streams as a cached one does
    assert re.fullmatch(r"own_resnet8-[0-9a-f]{8}\.pt", Path(info["path"]).name)
    Path("data/teachers/own_resnet8.pth").write_bytes((world / "teacher.pt").read_bytes())
    assert teacher()[0]["path"].endswith("own_resnet8.pth")  # a placed file comes before the cache
    args.teacher_ckpt = str(world / "teacher.pt")
    assert teacher()[0]["path"] == str(world / "teacher.pt")
    assert info["norm"] == "half"


@pytest.mark.parametrize("flags", (["--recipe", "multistep", "--milestones", "1", "--weight_decay", "1e-4"],
                                   ["--amp", "bf16"],
                                   ["--input_size", "40", "--norm", "imagenet"], ["--deterministic"]))
def test_teacher_options(world, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", tmp_path / "own")
    base = ["--dataset", "own", "--arch", "resnet8", "--epochs", "2", "--batch_size", "20", "--run_name", "r",
            "--log_every", "1"]
    path = common.train_teacher(common.parse_args(common.TrainArgs, argv=[*base, *flags]))
    torch.use_deterministic_algorithms(False)
    row = json.loads(Path("runs/r/result.json").read_text())
    lrs = [m["lr"] for m in metrics("runs/r") if "lr" in m]
    assert lrs == pytest.approx([0.1] * 4 + [0.01] * 4 if "multistep" in flags else
                                [common.lr_at({"kind": "fast", "lr": 2 / 128, "epochs": 2}, k / 4) for k in range(8)])
    again = common.evaluate_file(common.parse_args(common.EvalArgs, argv=["--evaluate", "runs/r"]))
    assert again["last"] == row["last"]
    assert torch.load(path, weights_only=True)["acc1"] == row["last"]


def test_wrong_normalisation_is_named(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    data = common.load_data("own")
    net, _ = common.load_teacher("teacher.pt")
    data.set_norm((5, 5, 5, 0.1, 0.1, 0.1))
    low = common.evaluate(net, data)["top1"]
    assert "--norm" in common.likely_cause(net, data) and data.norm == (5, 5, 5, 0.1, 0.1, 0.1)


def test_norm_flag_teacher_preset_data(world, monkeypatch):
    monkeypatch.chdir(world)
    base = ["--dataset", "own", "--teacher_ckpt", "teacher.pt"]

    def norm(*argv, presets=None, stored=None):
        if stored is not None:
            torch.save({**torch.load("teacher.pt", weights_only=True), "norm": stored}, "with_norm.pt")
        args = common.parse_args(toy.Args, presets or toy.PRESETS, toy.ALIASES,
                                 [*base[:2], "--teacher_ckpt", "with_norm.pt", *argv])
        args.allow_weak_teacher = True
        data = common.load_data("own")
        common.get_teacher(args, data)
        return data.norm

    preset = {"auto": {"*": {"norm": "cifar100"}}}
    assert norm("--norm", "imagenet", stored="cifar10") == "imagenet"
    assert norm(stored="cifar10", presets=preset) == "cifar10"
    assert norm(stored="", presets=preset) == "cifar100"
    assert norm(stored="") == "half"


def test_parse_args_layers_and_spellings():
    def parse(*argv):
        return common.parse_args(toy.Args, toy.PRESETS, toy.ALIASES, list(argv))
    assert parse().T == 4.0 and parse("--preset", "hot").T == 8.0 and parse("--preset", "hot", "--T", "2").T == 2.0
    pair = ["--dataset", "CIFAR100", "--teacher", "wrn_40_2", "--student", "WRN-16-1"]
    args = parse(*pair)
    assert (args.teacher, args.student, args.dataset) == ("wrn40_2", "wrn16_1", "cifar100")
    assert (args.T, args.epochs) == (20.0, 30)
    assert parse(*pair, "--preset", "none").epochs == 20 and parse(*pair, "--epochs=7").epochs == 7
    assert parse("--smoke").dataset == "shapes" and parse("--smoke", "--epochs", "1").epochs == 1
    assert parse("--preset", "smoke").smoke
    assert parse("--batch-size", "8").batch_size == 8 and parse("--nshot", "3").shots == 3 and parse("--cold").T == 1.0
    assert parse("--no-smoke").smoke is False and parse("--smoke", "False").smoke is False
    assert parse("--smoke=True").smoke is True
    assert parse("--gpu", "1").device == "cuda:1" and parse("--method", "hot").preset == "hot"
    assert parse("--method", "toy").preset == "auto"
    assert parse("--data_root", "d", "--log_tag", "x", "--fewshot_n_per_class", "2").run_name == "x"
    args = common.parse_args(common.TrainArgs, argv=["--milestones", "3,4", "5", "--lr", "1e-2"])
    assert args.milestones == (3, 4, 5) and args.lr == 0.01 and args.given == ("lr", "milestones")


def test_teacher_file_decides_the_preset_row(tmp_path):
    torch.save(common.build_model("wrn40_2", 100).state_dict(), tmp_path / "t.pth")
    args = common.parse_args(toy.Args, toy.PRESETS, toy.ALIASES,
                             ["--dataset", "cifar100", "--student", "wrn16_1", "--teacher_ckpt",
                              str(tmp_path / "t.pth")])
    assert (args.teacher, args.T) == ("wrn40_2", 20.0)


def test_help_is_complete(capsys):
    for main, cls in [(toy.main, toy.Args), *common.COMMANDS.values()]:
        with pytest.raises(SystemExit) as stop:
            common.cli(main, cls, argv=["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for line in [x for x in text.splitlines() if x.startswith("  --")]:
            assert len(line.split(maxsplit=2)) == 3, f"no help text: {line}"


def test_every_flag_is_used_somewhere():
    source = (ROOT / "common.py").read_text() + (ROOT / "tests" / "toy.py").read_text()
    for cls in [toy.Args, *[c for _, c in common.COMMANDS.values()]]:
        for name in (f.name for f in dataclasses.fields(cls)):
            assert re.search(rf'(args|a)\.{name}\b|"{name}"', source), name


def test_summarize_means_over_seeds(tmp_path, monkeypatch):
    base = dict(method="toy", preset="auto", dataset="own", teacher="resnet8", student="resnet8", shots=5,
                teacher_top1=90.0, best=70.0,
                agree1=60.0, L_p=0.5, seconds=10, real_images=20, synthetic_images=0,
                paper={"top1": 71.5, "protocol": "best on test"})
    for seed, last in ((0, 60.0), (1, 62.0), (2, 64.0)):
        (tmp_path / "runs" / f"r{seed}").mkdir(parents=True)
        common.write_json(tmp_path / "runs" / f"r{seed}" / "result.json", {**base, "seed": seed, "last": last})
    text = common.summarize(tmp_path / "runs")
    assert "62.00 ± 2.00" in text and "71.5 (best on test)" in text and "0, 1, 2" in text and text.count("\n") == 2
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    rows = common.result_rows(tmp_path / "runs")
    for _ in range(2):
        path = common.keep(rows, "demo")  # kept twice: no row doubles
    assert len(path.read_text().splitlines()) == 3 and common.table(common.result_rows(path)) == text
    filled = common.fill_tables("a\n<!-- results demo -->\nold\n<!-- end -->\n<!-- results none -->\n<!-- end -->")
    assert text in filled and "Not measured yet." in filled and "old" not in filled
    for row, flags in zip(rows, ({"T": 8.0, "lr": 0.1}, {"lr": 0.1}, {"lr": 0.1})):
        row["flags"] = flags
    lines = common.table(rows).splitlines()  # beside a published number all flags are named
    assert len(lines) == 4 and "toy `--T 8 --lr 0.1`" in lines[2] and "toy `--lr 0.1`" in lines[3]
    smoke = common.table([rows[1], {**rows[2], "flags": {"lr": 0.1, "smoke": True}}])
    assert "smoke" not in common.NO_SETTING and smoke.count("\n") == 3  # never averaged with a real run
    for row in rows:
        row["paper"] = None
    lines = common.table([*rows, {**rows[2], "last": 70.0}]).splitlines()  # else those that differ; the newer of a seed
    assert len(lines) == 4 and "toy `--T 8`" in lines[2] and "66.00 ± 5.66" in lines[3] and "`" not in lines[3]


def test_bf16_is_close_to_float32(toy_run):
    a, b = toy_run("--run_name", "a"), toy_run("--run_name", "b", "--amp", "bf16")
    loss = [[r["loss/kd"] for r in metrics(f"runs/{n}") if "loss/kd" in r][0] for n in "ab"]
    assert isinstance(a, dict) and isinstance(b, dict) and abs(loss[0] - loss[1]) < 0.05 * abs(loss[0])


# ----------------------------------------------------------------------------------------------------- whole programs

@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [("tests/toy.py", []), ("gda_kd.py", ["--task", "fewshot"]), *(
    (f"{method}.py", []) for method in paper.METHODS)])
def test_two_copied_files_are_a_project(tmp_path, script, flags):
    """A script and common.py in an empty folder: the smoke run needs nothing else and leaves only runs and data."""
    for file in (script, "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    name = Path(script).stem
    done = run_python(tmp_path, tmp_path / Path(script).name, "--smoke", *flags)
    folder = next((tmp_path / "runs").glob(f"{name}__*"))
    assert f"| {name}" in done.stdout and (folder / "result.json").is_file() and (folder / "student.pt").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "data", f"{name}.py", "common.py"}


def test_importing_is_quiet_and_quick():
    code = "import time, torch; t = time.time(); import common; print(time.time() - t)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.split()
    assert len(out) == 1 and float(out[0]) < 2  # 0.3 s when the machine is free: tests/bench.py start measures it


@pytest.mark.slow
def test_killed_training_resumes_bit_equal(world, tmp_path):
    """SIGKILL at two moments of a teacher training; tests/kill.py does it ten times for any script."""
    shutil.copytree(world / "own", tmp_path / "own")
    kill.prove(["common.py", "train", "--dataset", "own", "--arch", "resnet8", "--epochs", "12", "--batch_size", "10",
                "--save_every", "1",
                "--log_every", "2"], kills=2, cwd=tmp_path, seed=0)


# ----------------------------------------------------------------------------------------------------- the repository

def test_no_paths_or_devices_are_hard_coded():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "README.md", ROOT / "run_all.sh"]:
        text = path.read_text()
        assert not re.search(r"/(home|root|Users|mnt)/", text.replace(r"/(home|root|Users|mnt)/", "")), path
        assert not re.search(r"\.cuda\(\)", text.replace(r"\.cuda\(\)", "")), path


def test_method_files_share_their_head_and_nothing_else():
    """The flags that mean the same everywhere are the same text; no method file imports another."""
    def head(path):
        return re.search(r"# shared by all scripts, word for word\n(.*?)\n    # the method", path.read_text(), re.S)[1]

    methods = [p for p in ROOT.glob("*.py") if p.name != "common.py"]
    other = rf"^\s*(from|import) ({'|'.join(p.stem for p in methods)})\b"
    for path in methods:
        assert head(path) == head(ROOT / "tests" / "toy.py"), path
        assert not re.search(other, path.read_text(), re.M), path
    assert not re.search(other, (ROOT / "common.py").read_text(), re.M)


def test_paper_lists_every_published_row(tmp_path, monkeypatch, capsys):
    """Its commands ask for what PUBLISHED says, and the runs they make are found again."""
    rows, modules = paper.rows(), {name: __import__(name) for name in paper.METHODS}
    published = {(name, k[0], k[1]) for name, module in modules.items() for k in module.PUBLISHED}
    assert published <= {row.key[:3] for row in rows} and len({row.key for row in rows}) == len(rows)
    assert sum(bool(row.published) for row in rows) == sum(len(module.PUBLISHED) for module in modules.values())
    for method, preset, dataset, teacher, student, shots in (row.key for row in rows):
        row = next(r for r in rows if r.key == (method, preset, dataset, teacher, student, shots))
        if method == "train":
            common.given_flags(common.TrainArgs, {}, row.flags)
            continue
        module = modules[method]
        args = common.parse_args(module.Args, module.PRESETS, module.ALIASES, row.flags)
        name = module.row_names(args)["preset"] if method == "gda_kd" else args.preset
        assert (name, args.dataset) == (preset, dataset) and student in args.student.split(","), row
        assert args.teacher == teacher or not teacher
        assert str(getattr(args, "shots", "") or "") == shots or dataset == "mini" and args.fs_shots == (int(shots),)
    monkeypatch.setenv("SEEDS", "0 4")
    paper.main(["netgraft", "--only", "cifar100", "--dry-run", "--amp", "bf16"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24 and all(line.startswith("python netgraft.py ") and "--amp bf16" in line for line in lines)
    key = next(row.key for row in rows if row.published)
    result = dict(zip(("method", "preset", "dataset", "teacher", "student"), key), shots=int(key[5]), last=1.5, best=2)
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    for seed in (0, 1):
        (tmp_path / "runs" / "paper" / str(seed)).mkdir(parents=True)
        common.write_json(tmp_path / "runs" / "paper" / str(seed) / "result.json", {**result, "seed": seed})
    assert "| 1.50 ± 0.00 (2 seeds) | 2.00 ± 0.00 (2 seeds) |" in paper.table() and "not run" in paper.table()


def test_readme_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert common.fill_tables(text) == text, "run: bash run_all.sh table"


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def test_readme_commands_parse():
    for line in readme_commands():
        words = shlex.split(line)
        if words[:3] == ["torchrun", "--nproc_per_node", "6"]:
            words[:3] = ["python"]
        if words[:2] == ["python", "common.py"]:
            cls, flags = common.COMMANDS[words[2]][1], words[3:]
            if flags and not flags[0].startswith("-"):
                flags.insert(0, f"--{dataclasses.fields(cls)[0].name}")
            common.given_flags(cls, {}, flags)
        elif words[0] == "python":
            module = __import__(Path(words[1]).stem)
            common.given_flags(module.Args, module.ALIASES, words[2:])
        elif line != "pip install -r requirements.txt":
            assert words[:2] == ["bash", "run_all.sh"], line
            assert f"\n  {words[2]})" in (ROOT / "run_all.sh").read_text(), line


def test_rows_of_demo_and_laptop_parse():
    """Each line of run_all.sh names a run of its own and flags that its script knows; what stands behind reaches it."""
    text = (ROOT / "run_all.sh").read_text()
    text = text[:text.index('command="${1:-}"')] + """
environment() { :; }; python() { :; }; row() { printf '%s\\t' "$@"; echo; }
demo --data_dir there; laptop --data_dir there"""
    done = subprocess.run(["bash", "-c", text, ROOT / "run_all.sh"], capture_output=True, text=True, check=True)
    rows = [line.split("\t")[:-1] for line in done.stdout.splitlines()]
    assert len(rows) > 30 and len({tuple(row[:3]) for row in rows}) == len(rows)
    for _, _, seed, script, *flags in rows:
        module = __import__(script.split(".py")[0])
        cls = module.TrainArgs if script == "common.py train" else module.Args
        given = common.given_flags(cls, getattr(module, "ALIASES", {}), flags)
        assert seed == "0" and given["data_dir"] == "there"


@pytest.mark.slow
def test_readme_own_data_and_own_network(tmp_path):
    """The README's commands for own images and an own network, as they stand there, made short."""
    from PIL import Image
    rng = np.random.RandomState(0)
    for split, n in (("train", 8), ("test", 4)):
        for c in ("cat", "dog"):
            (tmp_path / "my_images" / split / c).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.randint(0, 256, (40, 50, 3), np.uint8))
                image.save(tmp_path / "my_images" / split / c / f"{i}.png")
    (tmp_path / "my_net.py").write_text(
        "import torch.nn as nn\n\n\ndef small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(8, num_classes))\n")
    lines = [line for line in readme_commands() if "my_images" in line or "my_net" in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)[1:]
        if words[1] == "data":
            run_python(tmp_path, *words)
            continue
        more = {"--epochs": "1", "--limit_train": "100" if "shapes" in line else "0"}
        words = [w for i, w in enumerate(words) if w not in more and words[i - 1] not in more]
        run_python(tmp_path, *words, *[w for pair in more.items() for w in pair])
    results = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/result.json")]
    assert sorted((r["student"], r["n_test"]) for r in results) == [("my_net.py:small", 1000), ("resnet20", 8)]
