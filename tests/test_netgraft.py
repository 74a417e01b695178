"""Tests of netgraft.py. Golden tests (test_golden_*) read GOLDEN_DIR; DATA_DIR and TEACHER_DIR point to real files."""
import copy
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import netgraft

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------------ golden numbers

GOLDEN = np.load(Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden")) / "netgraft.npz")
CONFIG, SALT = json.loads(bytes(GOLDEN["config"])), str(GOLDEN["fill_salt"])
READ = (r"config", r"fill_salt", r"sel/c\d+/(labels|within_class|global_n\d+)", r"hp/shots",
        r"hp/c\d+/(s1_batch|s2_batch|steps_per_epoch|s1_lr_block|s1_lr_t2s|s1_lr_s2t|s2_lr|s1_epochs|s2_epochs)",
        r"loss/\w+/(student|teacher|norm|raw|norm_epoch_mean|raw_epoch_mean|norm_grad|raw_grad)",
        r"net/c\d+/(x|teacher|teacher_block[234]|graft_b[012]|graft_len[23]|plain_student)",
        r"fold/c\d+/(P_rows8|c|conv_weight_row0|conv_weight_sum_l2|bias_map|head_w|head_b|logits|naive_logits)",
        r"fold/c\d+/teacher_head_(w_sum_l2|b)", r"count/c\d+",
        r"step/c\d+_n\d+(_raw)?/(x_u8|(s1_b[012]|s2_len[23])_(loss|names|stats))",
        r"aug/c\d+/(img_u8|top_left_flip|out|test_out)", r"eval/(logits|target|acc)")


def cases(group, pattern):
    """The cases of a group of keys that the file holds."""
    return sorted({m[1] for k in GOLDEN if (m := re.fullmatch(rf"{group}/({pattern})/.+", k))})


def close(a, b, tolerance):
    a, b = np.asarray(torch.as_tensor(a).detach(), np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-300)


def fill(module):
    """Weights made of the names of a state dict."""
    state = {}
    for key, value in module.state_dict().items():
        rng = np.random.RandomState(zlib.crc32((SALT + key).encode()) & 0xffffffff)
        w = (rng.standard_normal(value.shape) * 0.05).astype(np.float32)
        state[key] = (torch.zeros_like(value) if key.endswith("num_batches_tracked") else
                      torch.from_numpy(np.asarray(np.abs(w) + 0.5 if key.endswith("running_var") else w, np.float32)))
    module.load_state_dict(state)
    return module


def golden_pair(classes):
    """(teacher, its blocks, number of shared ones, scion), filled by the official key names."""
    teacher, student = (common.build_model(name, classes) for name in netgraft.PAIR)
    fill(teacher.eval().requires_grad_(False))
    start, scion = netgraft.match(teacher, student, 32)
    return teacher, netgraft.cut(teacher), start, fill(scion)


def grafted(blocks, start, scion, first, stop):
    return netgraft.Graft(blocks[:start + first], scion[first:stop], blocks[start + stop:]).eval()


def constants(classes):
    return "cifar10" if classes == 10 else "cifar100"


def fake_data(x, norm, classes=10):
    """A Data of given uint8 images (N, 3, S, S), without files."""
    return common.Data("fake", lambda split: (np.asarray(x), np.arange(len(x)) % classes, list(map(str, range(classes)))),
                       norm=norm)


@pytest.mark.parametrize("case", cases("sel", r"c\d+"))
def test_golden_selection(case):
    c = CONFIG["sel"][case]
    assert c["seed"] == netgraft.SCHEDULES[constants(c["classes"])]["seed"]
    g = {k.split("/")[2]: GOLDEN[k] for k in GOLDEN if k.startswith(f"sel/{case}/")}
    for shots in c["shots"]:
        index = common.few_shot_indices(g["labels"], shots, "netgraft", c["seed"])
        assert np.array_equal(index, g[f"global_n{shots}"])
    deepest = common.few_shot_indices(g["labels"], g["within_class"].shape[1], "netgraft", c["seed"])
    members = [np.flatnonzero(g["labels"] == k) for k in range(c["classes"])]
    ranks = [np.searchsorted(m, part) for m, part in zip(members, deepest.reshape(c["classes"], -1))]
    assert np.array_equal(ranks, g["within_class"])


@pytest.mark.parametrize("case", cases("hp", r"c\d+"))
def test_golden_hparams(case):
    for i, shots in enumerate(GOLDEN["hp/shots"].tolist()):
        hp = netgraft.hparams(constants(int(case[1:])), shots)
        for key in [k.split("/")[2] for k in GOLDEN if k.startswith(f"hp/{case}/")]:
            want = GOLDEN[f"hp/{case}/{key}"]
            want = want if key.endswith("_epochs") else want[i]
            have = len(netgraft.epoch_parts(shots * int(case[1:]), hp["s1_batch"])) if key == "steps_per_epoch" else hp[key]
            np.testing.assert_allclose(have, want, rtol=1e-12)


@pytest.mark.parametrize("case", cases("loss", r"\w+"))
@pytest.mark.parametrize("kind", ("norm", "raw"))
def test_golden_loss(case, kind):
    s, t = (torch.from_numpy(GOLDEN[f"loss/{case}/{who}"]) for who in ("student", "teacher"))
    s.requires_grad_()
    loss = {"norm": netgraft.norm_mse, "raw": netgraft.raw_mse}[kind](s, t)
    np.testing.assert_allclose(loss.item(), GOLDEN[f"loss/{case}/{kind}"], rtol=1e-5)
    np.testing.assert_allclose(loss.item() / len(s), GOLDEN[f"loss/{case}/{kind}_epoch_mean"], rtol=1e-5)
    if f"loss/{case}/{kind}_grad" in GOLDEN:
        grad = torch.autograd.grad(loss, s)[0].numpy()
        np.testing.assert_allclose(grad, GOLDEN[f"loss/{case}/{kind}_grad"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", cases("net", r"c\d+"))
def test_golden_networks(case):
    g = {k.split("/")[2]: GOLDEN[k] for k in GOLDEN if k.startswith(f"net/{case}/")}
    x = torch.from_numpy(g["x"])
    teacher, blocks, start, scion = golden_pair(int(case[1:]))
    with torch.no_grad():
        close(teacher(x), g["teacher"], 1e-4)
        h = x
        for i, block in enumerate(blocks):
            h = block(h)
            if f"teacher_block{i}" in g:
                close(h, g[f"teacher_block{i}"], 1e-4)
        assert torch.equal(h, teacher(x))
        for key in [k for k in g if k.startswith("graft")]:
            kind, i = key[6], int(key[-1])
            first, stop = (i, i + 1) if kind == "b" else (0, i)
            close(grafted(blocks, start, scion, first, stop)(x), g[key], 1e-4)
        if "plain_student" in g:
            close(fill(common.build_model(netgraft.PAIR[1], int(case[1:])))(x), g["plain_student"], 1e-4)


@pytest.mark.parametrize("case", cases("fold", r"c\d+"))
def test_golden_fold(case):
    g = {k.split("/")[2]: torch.from_numpy(np.asarray(GOLDEN[k])) for k in GOLDEN if k.startswith(f"fold/{case}/")}
    teacher, blocks, start, scion = golden_pair(int(case[1:]))
    P, c = netgraft.fold_pair(scion[0][1], scion[1][0])
    close(P[:8], g["P_rows8"], 1e-5)
    close(c, g["c"], 1e-5)
    net = netgraft.fold_student(blocks[:start], scion)
    conv = net.features[4][0]
    close(conv.weight[0], g["conv_weight_row0"], 1e-4)
    close(torch.stack([conv.weight.double().sum(), conv.weight.double().norm()]), g["conv_weight_sum_l2"], 1e-4)
    close(conv.bias_map, g["bias_map"], 1e-4)
    close(net.classifier.weight, g["head_w"], 1e-4)
    close(net.classifier.bias, g["head_b"], 1e-4)
    w, b = netgraft.fold_pair(*teacher.classifier)
    close(torch.stack([w.sum(), w.norm()]), g["teacher_head_w_sum_l2"], 1e-4)
    close(b, g["teacher_head_b"], 1e-4)
    x = torch.from_numpy(GOLDEN[f"net/{case}/x"])
    with torch.no_grad():
        close(net(x), g["logits"], 1e-4)
        conv.bias_map.copy_((scion[1][1][0].bias + scion[1][1][0].weight.sum((2, 3)) @ c.float())[:, None, None])
        close(net(x), g["naive_logits"], 1e-4)  # the bias of a map without borders: near, and wrong
        with pytest.raises(AssertionError):
            close(net(x), g["logits"], 1e-4)


@pytest.mark.parametrize("case", [k.split("/")[1] for k in GOLDEN if k.startswith("count/")])
def test_golden_counts(case):
    classes = int(case[1:])
    teacher, blocks, start, scion = golden_pair(classes)
    prefix = nn.Sequential(*blocks[:start])
    plain = common.build_model(netgraft.PAIR[1], classes)
    counts = [sum(p.numel() for p in m.parameters()) for m in (teacher, prefix, scion, plain)]
    assert [*counts[:3], counts[1] + counts[2], counts[3]] == GOLDEN[f"count/{case}"].tolist()


@pytest.mark.parametrize("phase", ("s1_b0", "s1_b1", "s1_b2", "s2_len2", "s2_len3"))
@pytest.mark.parametrize("case", cases("step", r"c\d+_n\d+(?:_raw)?"))
def test_golden_steps(case, phase):
    """The phases, their Adam and the step of the script, from the features that it keeps."""
    c = CONFIG["step"][case]
    g = {k: GOLDEN[f"step/{case}/{phase}_{k}"] for k in ("loss", "names", "stats")}
    teacher, blocks, start, scion = golden_pair(c["classes"])
    before = copy.deepcopy(teacher.state_dict())
    old = copy.deepcopy(scion.state_dict())
    hp = netgraft.hparams(constants(c["classes"]), c["shots"])
    for ours in ("s1_lr_block", "s1_lr_t2s", "s1_lr_s2t", "s2_lr"):
        np.testing.assert_allclose(hp[ours], c[ours], rtol=1e-12)
    key = f"block{int(phase[-1]) + 1}" if phase.startswith("s1") else f"net{phase[-1]}"
    p = next(p for p in netgraft.make_phases(scion, hp) if p.key == key)
    adam = CONFIG["adam"]
    assert [p.optimizer.defaults[k] for k in ("betas", "eps", "weight_decay")] == [
        tuple(adam["betas"]), adam["eps"], adam["weight_decay"]]
    net = grafted(blocks, start, scion, p.first, p.stop).train()
    loss_fn = netgraft.norm_mse if c["norm_loss"] else netgraft.raw_mse
    for i, x in enumerate(torch.from_numpy(GOLDEN[f"step/{case}/x_u8"])):
        x = fake_data(x, c["normalise"], c["classes"]).normalize(x).contiguous()
        with torch.no_grad():
            h, t_logits = net.prefix(x), teacher(x)
        loss = netgraft.graft_step(net.after, p.optimizer, h, t_logits, loss_fn)
        np.testing.assert_allclose(loss.item(), g["loss"][i], rtol=5e-3 if i else 2e-4)
    scion_keys = {f"{p.first}.{k}" if phase.startswith("s1") else k: k for k in g["names"].tolist()}
    learns = {k for k, v in scion.named_parameters() if v.requires_grad and not torch.equal(v, old[k])}
    assert learns == set(scion_keys)
    for (key, _), (total, norm, change) in zip(scion_keys.items(), g["stats"]):
        w, w0 = scion.state_dict()[key].double(), old[key].double()
        np.testing.assert_allclose([w.norm(), (w - w0).norm()], [norm, change], rtol=2e-4, err_msg=key)
        assert abs(w.sum() - total) <= 2e-4 * norm, key
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("case", cases("aug", r"c\d+"))
def test_golden_views(case):
    g, c = {k: GOLDEN[f"aug/{case}/{k}"] for k in ("img_u8", "top_left_flip", "out", "test_out")}, CONFIG["aug"][case]
    x = torch.from_numpy(g["img_u8"].transpose(0, 3, 1, 2))
    data = fake_data(x, c["normalise"])
    top, left, flip = torch.from_numpy(g["top_left_flip"]).T
    close(data.normalize(common.crop_flip(x, top, left, flip == 1, c["padding"])), g["out"], 1e-6)
    close(data.normalize(x[:1])[0], g["test_out"], 1e-6)
    if c["padding"] == common.PADDING:
        views = netgraft.Views(data, x, [nn.Conv2d(3, 1, 1)], 0, 0)
        side = 2 * c["padding"] + 1
        close(views.images(netgraft.VIEWS * torch.arange(len(x)) + (top * side + left) * 2 + flip), g["out"], 1e-6)


def test_golden_accuracy():
    if "eval/acc" in GOLDEN:
        logits, target = (torch.from_numpy(GOLDEN[f"eval/{k}"]) for k in ("logits", "target"))
        assert abs(common.accuracy(logits, target)["top1"] / 100 - float(GOLDEN["eval/acc"])) <= 1e-12


def test_golden_every_key_is_read():
    assert not [k for k in GOLDEN if not any(re.fullmatch(pattern, k) for pattern in READ)]
