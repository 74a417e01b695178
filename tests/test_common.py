"""Tests of common.py. Golden tests (test_golden_*) read GOLDEN_DIR; real files are used where DATA_DIR / TEACHER_DIR point."""
import argparse
import copy
import hashlib
import io
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
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402
import toy  # noqa: E402

REAL, TEACHERS = os.environ.get("DATA_DIR"), os.environ.get("TEACHER_DIR")
needs_data = pytest.mark.skipif(not REAL, reason="DATA_DIR (folder with the unpacked CIFAR sets) is not set")
needs_teachers = pytest.mark.skipif(not TEACHERS, reason="TEACHER_DIR (folder with published checkpoints) is not set")


# ------------------------------------------------------------------------------------------------------ golden numbers

GOLDEN = np.load(Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden")) / "common.npz")
CONFIG = json.loads(bytes(GOLDEN["config"]))
NETS = json.loads(bytes(GOLDEN["net/index"]))
READ = (r"config", r"fill/salt", r"x/\w+", r"net/index", r"net/.+/(meta|logits_std|logits|feat|logits_train|bnstat_train)",
        r"sgd/\w+/(y|hyp|loss|abs_sum|sq_sum)", r"norm/in", r"norm/\w+/(mean_std|out)", r"crop/\d+/(in|dy|dx|flip|out)",
        r"eval/\w+/(student|teacher|labels|acc1|acc5|agree1|loss|lp_official|lp_single_sqrt|js_distance)",
        r"fewshot/netgraft/\w+/(positions|sorted_index)", r"fewshot/pgdi/\d+/(labels|seed_shots|indices)",
        r"subset/akd/[\d.]+/(first64|count|sum|crc32|evaluated)", r"lr/\w+", r"order/cifar10_train",
        r"real/(ids|x|y)", r"real/\w+/logits")  # real/*: read where TEACHER_DIR holds the files


def close(a, b, tolerance):
    a, b = np.asarray(torch.as_tensor(a).detach(), np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-300)


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
    net, info, meta = golden_net(case, "live", tmp_path, wrap=lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}})
    zoo, name, classes = case.split("/")
    params, macs = common.count_params_macs(net, meta["input"])
    buffers = sum(b.numel() for b in net.buffers())
    assert (info["num_classes"], params, macs, buffers) == (meta["classes"], meta["params"], meta["macs"], meta["buffers"])
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
    np.testing.assert_allclose(losses, GOLDEN[f"sgd/{case}/loss"], rtol=1e-3)
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
    assert np.abs(np.array(common.NORMS[name]) - GOLDEN[f"norm/{name}/mean_std"]).max() < 1e-12
    data = fake_data(GOLDEN["norm/in"].transpose(0, 3, 1, 2), name)
    n = CONFIG["norm"]["images"]
    close(data.normalize(data.test_x)[:n], GOLDEN[f"norm/{name}/out"], 2e-6)
    close(data.normalize(data.test_x.float() / 255)[:n], GOLDEN[f"norm/{name}/out"], 2e-6)


@pytest.mark.parametrize("size", [k.split("/")[1] for k in GOLDEN if re.fullmatch(r"crop/\d+/in", k)])
def test_golden_crop(size):
    x, out = (torch.from_numpy(GOLDEN[f"crop/{size}/{k}"]).permute(0, 3, 1, 2) for k in ("in", "out"))
    dy, dx, flip = (torch.from_numpy(GOLDEN[f"crop/{size}/{k}"]) for k in ("dy", "dx", "flip"))
    assert torch.equal(common.crop_flip(x, dy, dx, flip, CONFIG["crop"]["padding"]), out)
    if CONFIG["crop"]["padding"] == common.PADDING:
        windows = fake_data(x.numpy())._windows[torch.arange(len(x)), :, dy, dx]
        assert torch.equal(torch.where(flip[:, None, None, None], windows.flip(-1), windows), out)


@pytest.mark.parametrize("case", CONFIG["eval"])
def test_golden_eval(case):
    g = {k: GOLDEN[f"eval/{case}/{k}"] for k in ("student", "teacher", "labels", "acc1", "acc5", "agree1", "loss", "lp_official",
                                                 "lp_single_sqrt", "js_distance")}
    s, t = torch.from_numpy(g["student"]), torch.from_numpy(g["teacher"])
    scores = {**common.accuracy(s, torch.from_numpy(g["labels"])), **common.agreement(s, t)}
    for key, ours, tolerance in (("acc1", "top1", 1e-9), ("acc5", "top5", 1e-9), ("agree1", "agree1", 1e-6), ("loss", "loss", 1e-5),
                                 ("lp_official", "L_p", 1e-5), ("lp_single_sqrt", "L_p_sqrt", 1e-5)):
        assert abs(scores[ours] - float(g[key])) <= tolerance * max(1, abs(float(g[key]))), key
    assert np.abs(common.js_distance(s, t).numpy() - g["js_distance"]).max() <= 1e-6


@pytest.mark.parametrize("name", CONFIG["fewshot"].get("netgraft", {}))
def test_golden_fewshot_netgraft(name):
    c = CONFIG["fewshot"]["netgraft"][name]
    labels, starts = np.repeat(np.arange(c["classes"]), c["per_class"]), np.arange(c["classes"])[:, None] * c["per_class"]
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
