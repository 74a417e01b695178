"""Tests of netgraft.py. Golden tests (test_golden_*) read GOLDEN_DIR; DATA_DIR and TEACHER_DIR point to real files."""
import copy
import dataclasses
import functools
import json
import os
import pickle
import re
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import kill
import netgraft
from tools import ROOT, close, load_golden, metrics, same_weights

REAL, TEACHERS = os.environ.get("DATA_DIR"), os.environ.get("TEACHER_DIR")

# ------------------------------------------------------------------------------------------------------ golden numbers

GOLDEN, CONFIG = load_golden("netgraft")
SALT = str(GOLDEN["fill_salt"])
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


@functools.cache
def filled(key, shape):
    """The weights that belong to the name of a state dict entry."""
    w = np.random.RandomState(zlib.crc32((SALT + key).encode()) & 0xffffffff).standard_normal(shape) * 0.05
    w = np.asarray(w, np.float32)
    return torch.from_numpy(np.asarray(np.abs(w) + 0.5 if key.endswith("running_var") else w))


def fill(module):
    module.load_state_dict({k: torch.zeros_like(v) if k.endswith("num_batches_tracked") else filled(k, tuple(v.shape))
                            for k, v in module.state_dict().items()})
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
    return "cifar10" if classes <= 10 else "cifar100"


def fake_data(x, norm, classes=10):
    """A Data of given uint8 images (N, 3, S, S), without files."""
    names = [str(c) for c in range(classes)]
    return common.Data("fake", lambda split: (np.asarray(x), np.arange(len(x)) % classes, names), norm=norm)


@pytest.mark.parametrize("case", cases("sel", r"c\d+"))
def test_golden_selection(case):
    c = CONFIG["sel"][case]
    g = {k.split("/")[2]: GOLDEN[k] for k in GOLDEN if k.startswith(f"sel/{case}/")}
    x = np.zeros((len(g["labels"]), 3, 1, 1), np.uint8)
    data = common.Data("fake", lambda split: (x, g["labels"].astype(np.int64), list(map(str, range(c["classes"])))))

    def drawn(shots):
        args = netgraft.Args(shots=shots, fewshot_seed=c["seed"])
        images, per_class, facts = netgraft.few_shot_images(args, data)
        assert len(images) == shots * c["classes"] and per_class == shots
        return np.array(facts["shots"])

    for shots in c["shots"]:
        assert np.array_equal(drawn(shots), g[f"global_n{shots}"])
    members = [np.flatnonzero(g["labels"] == k) for k in range(c["classes"])]
    deepest = drawn(g["within_class"].shape[1]).reshape(c["classes"], -1)
    assert np.array_equal([np.searchsorted(m, part) for m, part in zip(members, deepest)], g["within_class"])


@pytest.mark.parametrize("case", cases("hp", r"c\d+"))
def test_golden_hparams(case):
    for i, shots in enumerate(GOLDEN["hp/shots"].tolist()):
        hp = netgraft.hparams(constants(int(case[1:])), shots)
        for key in [k.split("/")[2] for k in GOLDEN if k.startswith(f"hp/{case}/")]:
            want = GOLDEN[f"hp/{case}/{key}"]
            want = want if key.endswith("_epochs") else want[i]
            hp["steps_per_epoch"] = len(netgraft.epoch_parts(shots * int(case[1:]), hp["s1_batch"]))
            np.testing.assert_allclose(hp[key], want, rtol=1e-12)


@pytest.mark.parametrize("case", cases("loss", r"\w+"))
@pytest.mark.parametrize("kind", ("norm", "raw"))
def test_golden_loss(case, kind):
    s, t = (torch.from_numpy(GOLDEN[f"loss/{case}/{who}"]) for who in ("student", "teacher"))
    s.requires_grad_()
    loss = {"norm": netgraft.norm_mse, "raw": F.mse_loss}[kind](s, t)
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
    teacher.double(), scion.double()  # in float32 a rounding can turn a sign, which Adam makes a whole step of
    before = copy.deepcopy(teacher.state_dict())
    old = copy.deepcopy(scion.state_dict())
    hp = netgraft.hparams(constants(c["classes"]), c["shots"])
    for ours in ("s1_lr_block", "s1_lr_t2s", "s1_lr_s2t", "s2_lr"):
        np.testing.assert_allclose(hp[ours], c[ours], rtol=1e-12)
    i = int(phase[-1])
    span = (i, i + 1) if phase.startswith("s1") else (0, i)
    p = next(p for p in netgraft.make_phases(scion, hp) if (p.first, p.stop) == span)
    adam = CONFIG["adam"]
    assert [p.optimizer.defaults[k] for k in ("betas", "eps", "weight_decay")] == [
        tuple(adam["betas"]), adam["eps"], adam["weight_decay"]]
    net = grafted(blocks, start, scion, p.first, p.stop).train()
    loss_fn = netgraft.norm_mse if c["norm_loss"] else F.mse_loss
    for i, x in enumerate(torch.from_numpy(GOLDEN[f"step/{case}/x_u8"])):
        x = fake_data(x, c["normalise"], c["classes"]).normalize(x).contiguous().double()
        with torch.no_grad():
            h, t_logits = net.prefix(x), teacher(x)
        loss = netgraft.graft_step(nn.Sequential(net.scion, net.suffix), p.optimizer, h, t_logits, loss_fn)
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
        rows = netgraft.VIEWS * torch.arange(len(x)) + (top * (2 * c["padding"] + 1) + left) * 2 + flip
        close(netgraft.view_images(data, x, rows), g["out"], 1e-6)


def test_golden_accuracy():
    if "eval/acc" in GOLDEN:
        logits, target = (torch.from_numpy(GOLDEN[f"eval/{k}"]) for k in ("logits", "target"))
        assert abs(common.accuracy(logits, target)["top1"] / 100 - float(GOLDEN["eval/acc"])) <= 1e-12


def test_golden_every_key_is_read():
    assert not [k for k in GOLDEN if not any(re.fullmatch(pattern, k) for pattern in READ)]


# ----------------------------------------------------------------------------------------------------------- the parts

def test_loss_sees_directions_only():
    s, t = torch.randn(5, 7), torch.randn(5, 7)
    assert netgraft.norm_mse(3 * s, t).item() == pytest.approx(netgraft.norm_mse(s, t).item(), rel=1e-5)
    assert netgraft.norm_mse(2 * t, t).item() == pytest.approx(0, abs=1e-10)
    want = sum(((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum() for a, b in zip(s.numpy(), t.numpy()))
    assert netgraft.norm_mse(s, t).item() == pytest.approx(want, rel=1e-5)  # a sum, not a mean


@pytest.mark.parametrize("classes, seed", ((4, 6), (10, 6), (11, 10), (100, 10)))
def test_shots_are_nested_and_leave_the_seed_alone(classes, seed):
    data = fake_data(np.zeros((20 * classes, 3, 1, 1), np.uint8), "half", classes)

    def drawn(shots, **flags):
        facts = netgraft.few_shot_images(netgraft.Args(shots=shots, **flags), data)[2]
        return np.array(facts["shots"]).reshape(classes, -1)

    assert np.array_equal(drawn(3), drawn(7)[:, :3]) and np.array_equal(drawn(3, seed=0), drawn(3, seed=5))
    assert np.array_equal(drawn(3), drawn(3, fewshot_seed=seed))  # as published
    assert not np.array_equal(drawn(3), drawn(3, fewshot_seed=0))


def test_schedule_of_the_defaults_and_of_other_images():
    hp = netgraft.hparams("cifar10", 10)
    assert (hp["s1_batch"], hp["s1_epochs"], hp["s2_lr"]) == (64, (100, 60, 60), 1e-4)
    assert netgraft.hparams("cifar10", 1)["s1_lr_block"] == pytest.approx((2.5e-5,) * 3)
    assert netgraft.hparams("cifar10", 1, scale=False) == hp
    assert netgraft.hparams("cifar100", 0.05)["s1_batch"] == 2  # five unlabelled images of 100 classes
    scion = nn.Sequential(*[nn.Sequential(nn.Sequential(nn.Linear(2, 2))) for _ in range(4)])
    spans = [(p.name, p.first, p.stop, p.begin, p.end) for p in netgraft.make_phases(scion, hp)]
    assert spans == [("block 1/4", 0, 1, 0, 100), ("block 2/4", 1, 2, 100, 160), ("block 3/4", 2, 3, 160, 220),
                     ("block 4/4", 3, 4, 220, 280), ("net 1/3", 0, 2, 280, 380), ("net 2/3", 0, 3, 380, 480),
                     ("net 3/3", 0, 4, 480, 580)]  # a list too short repeats its last entry


@pytest.mark.parametrize("n, want", ((100, [64, 36]), (65, [65]), (66, [64, 2]), (129, [64, 65]), (10, [10]), (1, [1])))
def test_a_lone_image_joins_the_batch_before(n, want):
    parts = netgraft.epoch_parts(n, 64, torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == want and sorted(torch.cat(parts).tolist()) == list(range(n))


def test_initialisation():
    torch.manual_seed(0)
    _, scion = netgraft.match(*(common.build_model(name, 10) for name in netgraft.PAIR), 32)
    for key, std in (("0.1", 0.0625), ("1.0", 0.0884), ("1.1.2", 0.0295), ("2.1.1.1", 0.01)):
        assert abs(scion.state_dict()[f"{key}.weight"].std().item() / std - 1) < 0.05, key
        assert not scion.state_dict()[f"{key}.bias"].any()
    _, bare = netgraft.match(*(common.build_model(name, 10) for name in netgraft.PAIR), 32, bias=False)
    assert set(scion.state_dict()) - set(bare.state_dict()) == {"0.1.bias", "1.0.bias", "1.2.bias", "2.0.bias"}


@pytest.mark.parametrize("names, start, grafts", (
    (netgraft.PAIR, 3, 3), (("resnet14", "resnet8"), 1, 3), (("resnet56_a", "resnet20"), 1, 3),
    (("resnet34", "resnet18"), 1, 4), (("wrn40_2", "wrn16_2"), 1, 3)))
def test_grafted_teacher(names, start, grafts):
    """Shared blocks take the teacher's weights; with every graft in place the grafted teacher is the student."""
    torch.manual_seed(0)
    teacher, student = (common.build_model(name, 5) for name in names)
    teacher.eval().requires_grad_(False)
    found, scion = netgraft.match(teacher, student, 32)
    assert (found, len(scion)) == (start, grafts)
    blocks, x = netgraft.cut(teacher), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(nn.Sequential(*blocks)(x), teacher(x))
        whole = netgraft.Graft(blocks[:start], scion, blocks[start + grafts:]).eval()
        if names != netgraft.PAIR:
            assert torch.equal(whole(x), student.eval()(x))
    for b in range(grafts):
        net = grafted(blocks, start, scion, b, b + 1).train()
        assert all(m.training == any(m is n for n in net.scion.modules()) for m in net.modules())
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        netgraft.norm_mse(net(x), teacher(x)).backward()
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        assert {k for k, p in net.named_parameters() if p.grad is not None} == {
            k for k, _ in net.named_parameters() if k.startswith("scion.")}


@pytest.mark.parametrize("teacher, student, words", (
    ("resnet8", "resnet8", "nothing is left"), ("resnet14", "wrn16_1", "one family"),
    ("resnet34", "resnet20", "as many blocks"), ("resnet50", "resnet18", "behind block 1 (the stem is 0)"),
    ("wrn40_2", "wrn16_1", "must be equal"), ("vgg16", "vgg8", "cannot be cut"),
    ("netgraft_vgg16", "netgraft_vgg16_folded", "must be equal"), ("resnet14", "netgraft_vgg16_student", "one family"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(True), nn.Conv2d(4, 4, 3), nn.Flatten()),
                   nn.Linear(3136, 5)), None, "overwrites its input")))
def test_pairs_that_do_not_fit(teacher, student, words, capsys):
    teacher = common.build_model(teacher, 5) if isinstance(teacher, str) else teacher
    student = common.build_model(student, 5) if student else copy.deepcopy(teacher)
    with pytest.raises(SystemExit) as stop:
        netgraft.match(teacher, student, 32)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1


def outputs(teacher, x, layout=torch.contiguous_format, cache_gb=1.0):
    data, blocks = fake_data(x, "cifar10"), netgraft.cut(teacher)
    data.image_size = 32
    return netgraft.Outputs(
        lambda rows: netgraft.view_images(data, torch.from_numpy(x), rows).contiguous(memory_format=layout),
        netgraft.VIEWS * len(x), netgraft.VIEWS, blocks, netgraft.cut_shapes(blocks, 32), cache_gb)


@pytest.mark.parametrize("name, cuts", (("netgraft_vgg16", (3, 4, 5, 6)), ("resnet14", (2, 3, 5)),
                                        ("wrn16_1", (2, 3, 5))))
def test_kept_outputs_are_those_of_a_step_bit_for_bit(name, cuts):
    torch.manual_seed(0)
    teacher = common.build_model(name, 10).eval().requires_grad_(False)
    layout = torch.contiguous_format if name.startswith("netgraft") else torch.channels_last
    teacher.to(memory_format=layout)
    x = np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32), np.uint8)
    direct, kept = (outputs(teacher, x, layout) for _ in range(2))
    kept.keep({1, *cuts})
    assert set(kept.kept) == set(cuts)  # a stem's output is not kept
    rows = torch.randperm(2 * netgraft.VIEWS)[:32]
    first, last = cuts[0], cuts[-1]
    for start in (1, *cuts):
        for a, b in zip(direct.at(rows, [start, last]), kept.at(rows, [start, last])):
            assert torch.equal(a, b) and a.stride() == b.stride() and not a.requires_grad
    assert torch.equal(kept.at(rows, [last])[0], teacher(kept.images(rows)))
    small = direct.at(rows[:3], [last])[0]
    close(small, kept.at(rows[:3], [last])[0], 1e-6)
    kept.keep({last})  # freed after their last use
    assert set(kept.kept) == {last}
    kept.keep({first, last})
    assert torch.equal(kept.at(rows, [first])[0], direct.at(rows, [first])[0])


def test_outputs_are_kept_as_far_as_they_fit():
    teacher = common.build_model("netgraft_vgg16", 10).eval().requires_grad_(False)
    x = np.zeros((1, 3, 32, 32), np.uint8)
    sizes = {c: netgraft.VIEWS * 4 * n for c, n in ((3, 4096), (4, 2048), (5, 512), (6, 10))}
    for room, want in ((sum(sizes.values()), {3, 4, 5, 6}), (sum(sizes.values()) - 1, {3, 4, 6}),
                       (sizes[4] + sizes[5] + sizes[6], {4, 5, 6}), (sizes[6], {6}), (0, set())):
        views = outputs(teacher, x, cache_gb=room / 2 ** 30)
        views.keep({3, 4, 5, 6})
        assert set(views.kept) == want


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    teacher, blocks, start, scion = golden_pair(10)
    views = outputs(teacher, np.zeros((1, 3, 32, 32), np.uint8))
    p = netgraft.make_phases(scion, netgraft.hparams("cifar10", 10))[0]
    net = grafted(blocks, start, scion, 0, 1).train()

    def wait(*_, **__):
        raise AssertionError("a value was read back")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    h, t_logits = views.at(torch.arange(4), [3, 6])
    netgraft.graft_step(nn.Sequential(net.scion, net.suffix), p.optimizer, h, t_logits, netgraft.norm_mse)


# ------------------------------------------------------------------------------------------------------------- folding

@pytest.mark.parametrize("size", ((2, 2), (8, 8), (3, 5)))
def test_fold_is_exact_at_every_size_and_the_plain_bias_is_not(size):
    torch.manual_seed(0)
    e, a, conv = nn.Conv2d(4, 9, 1).double(), nn.Conv2d(9, 5, 1).double(), nn.Conv2d(5, 6, 3, padding=1).double()
    u = torch.rand(2, 4, *size).double()
    P, c = netgraft.fold_pair(e, a)
    close(torch.einsum("ij,bjhw->bihw", P, u) + c[:, None, None], a(e(u)).detach(), 1e-12)
    weight, bias_map = netgraft.fold_conv(conv, P, c, size)
    want = conv(a(e(u))).detach()
    close(F.conv2d(u, weight, padding=1) + bias_map, want, 1e-12)
    places = {tuple(v) for v in bias_map.flatten(1).T.round(decimals=9).tolist()}
    assert len(places) == min(3, size[0]) * min(3, size[1])  # corners, edges, the middle
    naive = conv.bias + conv.weight.sum((2, 3)) @ c
    with pytest.raises(AssertionError):
        close(F.conv2d(u, weight, naive, padding=1), want, 1e-4)


@pytest.mark.parametrize("bias", (True, False))
def test_folded_student(bias, tmp_path):
    torch.manual_seed(0)
    teacher, student = (common.build_model(name, 7) for name in netgraft.PAIR)
    start, scion = netgraft.match(teacher, student, 32, bias)
    for p in scion.parameters():
        torch.nn.init.normal_(p, std=0.05)
    prefix, x = netgraft.cut(teacher)[:start], torch.rand(16, 3, 32, 32)
    folded, net = netgraft.fold_student(prefix, scion), netgraft.Graft(prefix, scion, ()).eval()
    close(folded(x), net(x).detach(), 1e-5)
    assert torch.equal(folded(x).argmax(1), net(x).argmax(1))
    torch.save(folded.state_dict(), tmp_path / "student.pt")
    loaded, info = common.load_teacher(tmp_path / "student.pt")
    assert info["arch"] == "netgraft_vgg16_folded" and torch.equal(loaded(x), folded(x))
    assert ("features.4.0.bias_map" in folded.state_dict()) == bias


def test_sizes_of_the_three_networks():
    teacher, blocks, start, scion = golden_pair(10)
    nets = (teacher, netgraft.Graft(blocks[:start], scion, ()), netgraft.fold_student(blocks[:start], scion))
    counts = [common.count_params_macs(net, 32) for net in nets]
    assert [(params, round(macs / 1e6, 2)) for params, macs in counts] == [
        (14983498, 313.46), (5938506, 227.35), (5279306, 225.91)]


# ------------------------------------------------------------------------------------------------------ --init teacher

def test_channels_that_never_fire_cost_nothing():
    """With half of the teacher's deep channels dead, the narrow grafts do from the start what the teacher does."""
    torch.manual_seed(0)
    teacher, student = (common.build_model(name, 10) for name in netgraft.PAIR)
    for block in teacher.features[3:]:
        for conv in [m for m in block if isinstance(m, nn.Conv2d)]:
            dead = torch.randperm(512)[:256]
            conv.weight.data[dead], conv.bias.data[dead] = 0, 0
            conv.bias.data += 0.01 * (conv.weight.data.flatten(1).any(1))
    norm = teacher.classifier[1]
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    teacher.eval().requires_grad_(False)
    start, scion = netgraft.match(teacher, student, 32)
    blocks, h = netgraft.cut(teacher), torch.rand(300, 256, 4, 4)
    with torch.no_grad():
        t_logits, x = nn.Sequential(*blocks[start:])(h), h
        for b in range(3):
            netgraft.init_from_teacher(scion[b], blocks[start + b], x)
            close(netgraft.Graft(blocks[start:start + b], scion[b:b + 1], blocks[start + b + 1:])(h), t_logits, 1e-3)
            x = blocks[start + b](x)
        close(netgraft.Graft((), scion, ())(h), t_logits, 1e-3)


@pytest.mark.parametrize("names, picks", ((("resnet56_a", "resnet20_a"), (0, 4, 8)), (("wrn40_2", "wrn16_2"), (0, 5))))
def test_residual_blocks_are_copied_evenly(names, picks):
    teacher, student = (common.build_model(name, 10) for name in names)
    _, scion = netgraft.match(teacher, student, 32)
    for graft, block in zip(scion, netgraft.cut(teacher)[1:]):
        netgraft.init_from_teacher(graft, block, torch.zeros(1, 1, 1, 1))
        mine, theirs = ([m for m in net.modules() if isinstance(m, (common.ResBlock, common.WideBlock))]
                        for net in (graft, block))
        for unit, i in zip(mine, picks):
            assert all(torch.equal(v, theirs[i].state_dict()[k]) for k, v in unit.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small own data set (4 classes of tinted noise), a resnet14 that knows it and a raw VGG16."""
    path, rng = tmp_path_factory.mktemp("world"), np.random.RandomState(0)
    (path / "own").mkdir()
    tint = np.array([[90, 0, 0], [0, 90, 0], [0, 0, 90], [60, 60, 60]])
    for split, n in (("train", 80), ("test", 41)):
        y = np.arange(n) % 4
        x = np.clip(rng.randint(0, 160, (n, 32, 32, 3)) + tint[y][:, None, None], 0, 255).astype(np.uint8)
        np.savez(path / "own" / f"{split}.npz", x=x, y=y)
    args = common.parse_args(common.TrainArgs, argv=shlex.split(
        f"--dataset {path}/own --arch resnet14 --epochs 6 --batch_size 20 --lr 0.05 --data_dir {path}/data --out_dir "
        f"{path}/runs --device cpu"))
    shutil.copy(common.train_teacher(args), path / "resnet.pt")
    torch.manual_seed(0)
    torch.save(common.build_model("netgraft_vgg16", 4).state_dict(), path / "vgg.pt")
    return path


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """main in a folder of its own: run("--shots", "3") -> result or exit code."""
    monkeypatch.chdir(tmp_path)
    common_flags = ["--dataset", str(world / "own"), "--device", "cpu", "--allow_weak_teacher"]
    pairs = {"resnet": ["--teacher_ckpt", str(world / "resnet.pt"), "--student", "resnet8"],
             "vgg": ["--teacher_ckpt", str(world / "vgg.pt")]}
    short = "--shots 4 --epochs_block 2,1,2 --epochs_net 2,3 --eval_every 1 --log_every 1".split()

    def go(*argv, pair="resnet"):
        fresh = [*common_flags, *pairs[pair], *short] if pair else []
        try:
            return netgraft.main(common.parse_args(netgraft.Args, netgraft.PRESETS, netgraft.ALIASES, [*fresh, *argv]))
        except SystemExit as e:
            return e.code
    return go


def tops(folder):
    """{phase: accuracy at its end} of a run."""
    return {k[4:]: v for row in metrics(folder) for k, v in row.items() if k[:4] == "acc/" and k != "acc/test_top1"}


def test_run(run):
    result, rows = run("--run_name", "a", "--seed", "3"), metrics("runs/a")
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["derived"]["phases"] == {"block 1/3": [0, 2], "block 2/3": [2, 3], "block 3/3": [3, 5],
                                           "net 1/2": [5, 7], "net 2/2": [7, 10]}
    assert len(config["derived"]["shots"]) == 16 and len(config["derived"]["shots_sha256"]) == 64
    # D4: each phase at its end, the joined grafts where stage 2 begins, the student in every epoch of the last phase
    assert [(r["epoch"], k) for r in rows for k in r if k.startswith("acc/")] == [
        (1, "acc/block 1/3"), (2, "acc/block 2/3"), (4, "acc/block 3/3"), (5, "acc/join 1/2"), (5, "acc/join 2/2"),
        (6, "acc/net 1/2"), (7, "acc/test_top1"), (8, "acc/test_top1"), (9, "acc/net 2/2"), (9, "acc/test_top1")]
    assert [(r["step"], r["phase"]) for r in rows if "loss/kd" in r] == [
        (i, 1 + (i > 1) + (i > 2) + (i > 4) + (i > 6)) for i in range(10)]
    assert tops("runs/a")["net 2/2"] == result["last"] and set(tops("runs/a")) == {
        "block 1/3", "block 2/3", "block 3/3", "join 1/2", "join 2/2", "net 1/2", "net 2/2"}
    assert (result["shots"], result["real_images"], result["n_test"], result["seed"]) == (4, 16, 41, 3)
    assert result["paper"] is None and result["fold_difference"] == 0
    assert result["sizes"]["student.pt"] == result["sizes"]["as trained"] and result["best_epoch"] in (7, 8, 9)
    state = torch.load("runs/a/student.pt", weights_only=True)
    assert list(state) == list(common.build_model("resnet8", 4).state_dict())
    assert run("--evaluate", "runs/a", pair="")["last"] == result["last"]
    assert Path("runs/a/samples/shots.png").stat().st_size > 500


def test_same_seed_same_run_other_seed_other(run):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run("--run_name", name, "--seed", seed)
    assert metrics("runs/a") == metrics("runs/b") != metrics("runs/c")
    assert same_weights("runs/a", "runs/b") and not same_weights("runs/a", "runs/c")
    assert len({json.loads(Path(f"runs/{n}/config.json").read_text())["derived"]["shots_sha256"] for n in "abc"}) == 1


@pytest.mark.parametrize("init", ("random", "teacher"))
def test_resume_after_every_epoch_of_every_phase(run, init):
    run("--run_name", "a", "--init", init)
    assert run("--run_name", "b", "--init", init, "--time_limit", "1e-9") == 0
    for _ in range(9):
        assert run("--resume", "runs/b", "--time_limit", "1e-9", pair="") == 0
        assert not Path("runs/b/result.json").exists()
    assert isinstance(run("--resume", "runs/b", "--time_limit", "0", pair=""), dict)
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    a, b = (json.loads(Path(f"runs/{n}/result.json").read_text()) for n in "ab")
    assert all(a[k] == b[k] for k in ("last", "best", "best_epoch", "agree1", "L_p"))


@pytest.mark.slow
def test_kept_views_do_not_change_a_run(run):
    """32 images are one batch of 32; 164 epochs, so that keeping pays."""
    flags = "--shots 8 --epochs_block 60,2,2 --epochs_net 60,40 --eval_every 40 --log_every 20".split()
    for name, room in (("a", "4"), ("b", "0"), ("c", "0.19")):  # the last one: room for the logits and two cuts
        run("--run_name", name, "--cache_gb", room, *flags)
    assert metrics("runs/a") == metrics("runs/b") == metrics("runs/c")
    assert same_weights("runs/a", "runs/b") and same_weights("runs/a", "runs/c")


def test_best_on_test_is_the_state_of_that_epoch(run, monkeypatch):
    plain, scores = netgraft.accuracy, iter([10.0] * 6 + [40.0, 60.0, 50.0] + [10.0] * 20)
    monkeypatch.setattr(netgraft, "accuracy", lambda *a: {**plain(*a), "top1": next(scores)})
    result = run("--run_name", "a", "--select", "best_test", "--epochs_net", "2,3")
    assert (result["last"], result["best"], result["best_epoch"]) == (50.0, 60.0, 8)
    monkeypatch.setattr(netgraft, "accuracy", plain)
    run("--run_name", "b", "--epochs_net", "2,2")  # the rate is constant: two epochs are the first two of three
    run("--run_name", "c", "--epochs_net", "2,3")
    assert same_weights("runs/a", "runs/b") and not same_weights("runs/a", "runs/c")


def test_stages_can_be_left_out(run):
    only_blocks = run("--run_name", "a", "--epochs_net", "0")
    assert set(tops("runs/a")) == {"block 1/3", "block 2/3", "block 3/3"}
    assert only_blocks["last"] == only_blocks["sizes"]["student.pt"][2]  # of the joined student, not of its last graft
    run("--run_name", "b", "--epochs_block", "0")
    assert set(tops("runs/b")) == {"join 1/2", "join 2/2", "net 1/2", "net 2/2"}


def test_nothing_to_train(run, capsys):
    for name, flags in (("a", ["--epochs_block", "0", "--epochs_net", "0"]), ("b", ["--batch_size", "1"])):
        assert run("--run_name", name, *flags) == 2 and "nothing to train" in capsys.readouterr().err


def test_flags_change_what_they_name(run):
    run("--run_name", "base")
    for name, flags in (("lr", "--lr_net 1e-2"), ("block", "--lr_block 1e-2"), ("loss", "--no-norm_loss"),
                        ("scale", "--no-scale_with_shots"), ("draw", "--fewshot_seed 1"), ("batch", "--batch_size 5"),
                        ("amp", "--amp bf16"), ("init", "--init teacher")):
        assert isinstance(run("--run_name", name, *flags.split()), dict), name
        assert not same_weights("runs/base", f"runs/{name}"), name


@pytest.fixture(scope="module")
def vgg_runs(world, tmp_path_factory):
    """The VGG pair, folded and not, one epoch a phase."""
    path = tmp_path_factory.mktemp("vgg")
    flags = (f"--dataset {world}/own --teacher_ckpt {world}/vgg.pt --device cpu --allow_weak_teacher --shots 4 "
             f"--epochs_block 1 --epochs_net 1 --out_dir {path}")
    return path, {name: netgraft.main(common.parse_args(
        netgraft.Args, netgraft.PRESETS, netgraft.ALIASES, shlex.split(f"{flags} --run_name {name} {more}")))
        for name, more in (("folded", ""), ("raw", "--no-fold"), ("bare", "--no-adapt_bias"))}


def test_vgg_run_folds(vgg_runs):
    path, results = vgg_runs
    for name, result in results.items():
        assert result["fold_difference"] < 1e-4 and result["last"] == result["sizes"]["student.pt"][2]
    sizes, head = results["folded"]["sizes"], 513 * 6  # 4 classes, not 10
    assert [sizes[k][0] for k in sizes] == [14983498 - head, 5938506 - head, 5279306 - 257 * 6]
    assert results["raw"]["sizes"]["student.pt"] == results["raw"]["sizes"]["as trained"]
    assert results["raw"]["last"] == results["folded"]["last"]
    keys = set(torch.load(path / "raw" / "student.pt", weights_only=True))
    assert {"prefix.0.0.weight", "scion.0.1.weight", "scion.2.1.1.1.bias"} <= keys
    assert "features.4.0.bias" in torch.load(path / "bare" / "student.pt", weights_only=True)


def test_every_student_file_is_read(vgg_runs, run, world, tmp_path, capsys):
    path, results = vgg_runs
    for name in results:
        assert run("--evaluate", str(path / name), pair="")["last"] == results[name]["last"]
    assert common.load_teacher(path / "folded" / "student.pt")[1]["arch"] == "netgraft_vgg16_folded"
    with pytest.raises(SystemExit):
        common.load_teacher(path / "raw" / "student.pt")
    assert "netgraft.py" in capsys.readouterr().err
    raw = torch.load(path / "raw" / "student.pt", weights_only=True)
    torch.save({k[6:]: v for k, v in raw.items() if k.startswith("scion.")}, "official.pth")  # as published: no prefix
    flags = ["--evaluate", "official.pth", "--dataset", str(world / "own"), "--allow_weak_teacher", "--nshot", "4"]
    assert run(*flags, pair="") == 2 and "--teacher_ckpt" in capsys.readouterr().err
    row = run(*flags, "--teacher_ckpt", str(world / "vgg.pt"), pair="")
    assert row["last"] == results["raw"]["last"] and row["params"] == results["raw"]["sizes"]["as trained"][0]
    torch.save({k[6:]: v for k, v in raw.items() if k.startswith("scion.") and k != "scion.1.0.bias"}, "official.pth")
    assert run(*flags, "--teacher_ckpt", str(world / "vgg.pt"), pair="") == 2 and "damaged" in capsys.readouterr().err


def test_images_of_ones_own(run, world, tmp_path, capsys):
    from PIL import Image
    run("--run_name", "drawn")
    facts = json.loads(Path("runs/drawn/config.json").read_text())["derived"]
    with np.load(world / "own" / "train.npz") as f:
        x = f["x"][facts["shots"]]
    Path("shots.pkl").write_bytes(pickle.dumps(x.transpose(0, 3, 1, 2), protocol=2))
    for i, image in enumerate(x):
        Path(f"pics/{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"pics/{i % 3}/{i:03d}.png")
    result = run("--run_name", "pickle", "--fewshot_file", "shots.pkl", "--shots", "1")
    assert result["shots"] == 4 and metrics("runs/pickle") == metrics("runs/drawn")
    result = run("--run_name", "folder", "--fewshot_dir", "pics")
    assert result["real_images"] == 16 and result["shots"] == 4 and result["paper"] is None
    assert run("--build_dataset", "True") == {} and facts["shots_sha256"] in capsys.readouterr().out
    assert sorted(p.name for p in Path("runs").iterdir()) == ["drawn", "folder", "pickle"]
    Path("pics/0/bad.png").write_bytes(b"no image")
    Path("empty").mkdir()
    Path("flat.pkl").write_bytes(pickle.dumps(np.zeros((4, 3072), np.uint8)))
    for name, flags, words in (("a", "--fewshot_dir pics", "bad.png"), ("b", "--fewshot_dir empty", "2 or more"),
                               ("c", "--fewshot_file flat.pkl", "(4, 3072)"), ("d", "--shots 21", "--shots 21"),
                               ("e", "--fewshot_dir pics --fewshot_file shots.pkl", "one of them")):
        assert run("--run_name", name, *flags.split()) == 2 and words in capsys.readouterr().err, flags
    with pytest.raises(FileNotFoundError):  # cli makes one line of it
        run("--run_name", "f", "--fewshot_file", "none.pkl")


def test_own_networks(run, capsys):
    Path("nets.py").write_text(
        "import torch.nn as nn\n\n\ndef net(width, depth, num_classes):\n"
        "    stage = [nn.Conv2d(8, width, 3, 2, 1)] + [nn.Conv2d(width, width, 3, 1, 1) for _ in range(depth)]\n"
        "    head = [nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(True), nn.Sequential(*stage),\n"
        "                         nn.BatchNorm2d(width), *head)\n"
        "\n\ndef large(num_classes):\n    return net(16, 3, num_classes)\n"
        "\n\ndef small(num_classes):\n    return net(16, 1, num_classes)\n"
        "\n\ndef thin(num_classes):\n    return net(12, 1, num_classes)\n")
    torch.save(common.build_model("nets.py:large", 4).state_dict(), "large.pt")
    teacher = ["--teacher", "nets.py:large", "--teacher_ckpt", "large.pt", "--student"]
    result = run(*teacher, "nets.py:small", "--run_name", "a")
    assert {"block 1/2", "net 1/1"} <= tops("runs/a").keys() and result["student"] == "nets.py:small"
    assert run("--evaluate", "runs/a", pair="")["last"] == result["last"]
    for name, flags, words in (("b", ["nets.py:thin"], "must be equal"),
                               ("c", ["nets.py:small", "--init", "teacher"], "--init teacher")):
        assert run(*teacher, *flags, "--run_name", name) == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_killed_run_with_kept_views_resumes_bit_equal(world, tmp_path):
    shutil.copytree(world / "own", tmp_path / "own")
    kill.prove(["netgraft.py", "--dataset", "own", "--teacher_ckpt", str(world / "resnet.pt"), "--student", "resnet8",
                "--allow_weak_teacher", "--shots", "8", "--epochs_block", "60,20,20", "--epochs_net", "40,40",
                "--save_every", "7", "--log_every", "5", "--device", "cpu"], kills=2, cwd=tmp_path, seed=0)


# -------------------------------------------------------------------------------------------------------- command line

def parse(*argv):
    return common.parse_args(netgraft.Args, netgraft.PRESETS, netgraft.ALIASES, list(argv))


def test_defaults_and_published_rows():
    args = parse()
    assert (args.dataset, args.teacher, args.student, args.shots) == ("cifar10", *netgraft.PAIR, 10)
    assert args.eval_every == 10 and parse("--preset", "none").eval_every == 1
    assert len(netgraft.PUBLISHED) == 24
    assert netgraft.PUBLISHED[("auto", "cifar10", *netgraft.PAIR, 10)] == (92.89, "best test epoch, mean of 5 runs")
    assert netgraft.PUBLISHED[("auto", "cifar100", *netgraft.PAIR, 50)] == (69.06, "best test epoch, mean of 5 runs")


@pytest.mark.parametrize("line, want", (
    ("--dataset CIFAR10", {}), ("--dataset CIFAR100", {"dataset": "cifar100"}),
    ("--dataset CIFAR10 --build_dataset True", {"build_dataset": True}), ("--build_dataset False", {}),
    ("--dataset CIFAR100 --nshot 5", {"dataset": "cifar100", "shots": 5}), ("--num_per_class 3", {"shots": 3}),
    ("--epochs_block 5 6 7 --epochs_net 8,9", {"epochs_block": (5, 6, 7), "epochs_net": (8, 9)})))
def test_official_flags(line, want):
    assert vars(parse(*line.split())) | {"given": ()} == vars(parse()) | want | {"given": ()}


def test_shared_head_is_that_of_the_other_scripts():
    heads = [re.search(r"    # shared by all scripts.*?(?=    # the method's own defaults)", path.read_text(), re.S)[0]
             for path in (ROOT / "netgraft.py", ROOT / "tests" / "toy.py")]
    assert heads[0] == heads[1]


def test_equations_and_deviations_are_numbered_and_marked():
    text = (ROOT / "netgraft.py").read_text()
    head, body = text[:text.index("import hashlib")], text[text.index("import hashlib"):]
    assert set(re.findall(r"eq\. \((\d)\)", body)) == set(re.findall(r"\((\d)\)$", head, re.M)) == set("12345")
    assert set(re.findall(r"^  (D\d) ", head, re.M)) <= set(re.findall(r"\bD\d\b", body)) | {"D1"}
    assert len(text.splitlines()) <= 550


def test_every_flag_is_read():
    source = (ROOT / "netgraft.py").read_text() + (ROOT / "common.py").read_text()
    for f in dataclasses.fields(netgraft.Args):
        assert re.search(rf'(args|a)\.{f.name}\b|"{f.name}"', source), f.name


@pytest.mark.skipif(not (REAL and TEACHERS), reason="DATA_DIR and TEACHER_DIR (real files) are not set")
@pytest.mark.slow
def test_real_teacher_folds_exactly(tmp_path, monkeypatch):
    """Real images, the real VGG16 and one epoch a phase from the teacher's own channels: far above chance at once."""
    if not (Path(TEACHERS) / "vgg16_blocks_cifar10.pt").is_file():
        pytest.skip("vgg16_blocks_cifar10.pt is not in TEACHER_DIR")
    monkeypatch.chdir(tmp_path)
    result = netgraft.main(parse(*shlex.split(
        f"--data_dir {REAL} --teacher_ckpt {TEACHERS}/vgg16_blocks_cifar10.pt --limit_test 500 --init teacher "
        "--epochs_block 1 --epochs_net 1 --device cpu")))
    assert result["fold_difference"] < 1e-4 and result["last"] > 60 and result["teacher_top1"] > 85
