"""Tests of gda_kd.py. Golden tests (test_golden_*) read GOLDEN_DIR; DATA_DIR points to real files."""
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import gda_kd
import kill
from gda_kd import Args
from tools import ROOT, close, load_golden, metrics, same_weights


# ------------------------------------------------------------------------------------------------------ golden numbers

GOLDEN, CONFIG = load_golden("gda_kd")
FS_LOSSES = {"kd": "kd", "dkd": "dkd", "aug_conf": "augconf", "adapt_conf": "adaptconf"}  # official name -> ours
READ = (r"config",
        r"gda\d+\.(student|teacher|labels|lam|fr|sink|total|grad_(fr|sink|total)|z_student|W|P|sink_self)",
        r"gda\d+\.(kd_T\d+|kd_none_T\d+_rowsum|grad_kd_T\d+|(grad_)?dkd_a[\d.]+_b[\d.]+_T\d+)",
        r"dist\.(student|teacher|labels|soft_labels)",
        r"dist\.(vanilla|kd|dkd|augconf|adaptconf)\.\w+\.(hard|soft)(\.e\d+)?(\.grad)?",
        r"aug\.\w+", r"adapt\.(student|teacher|alpha_t[\d.]+)", r"lr\d+\.(cfg|per_epoch)", r"opt\.groups",
        r"rrc\.(images|params|out|stats|h_hist)", r"evaltf\.(out_chw|norm2)", r"net\.x",
        r"net\.\w+\.([AB]\.(eval|train|feat|rm)|featshape|nparams|keys)", r"step\.cfg",
        r"step\.(kd|dkd|augconf|adaptconf)\.(losses|checks|fc_weight|logits_last)", r"fs\.labels",
        r"fs\.sampler\d+\.(cfg|idx)", r"fs\.split\.(shot|query)", r"fs\.nk_label", r"fs\.(q|proto)",
        r"fs\.logits(2d)?\.(dot|cos|sqr)", r"meta\.(shot|query|logits\.(cos|dot|sqr))",
        r"fsloss\d+\.(student|teacher|labels)",
        r"fsloss\d+\.\w+\.(kd|e\d+\.(dkd|dkd_baseline|aug|adapt|adapt\.grad))", r"fs\.aug\.alpha_t[\d.]+",
        r"fs\.(lr|opt)[01]", r"fs\.im84(_eval\d+|_crops|_crop\d+)?",
        r"fsnet\.\w+\.([AB]\.(eval|train)|x|nparams|keys)",
        r"fsstep\.cfg", r"fsstep\.(kd|dkd|aug_conf|adapt_conf)\.(losses|checks|linear)",
        r"metastep\.(cfg|losses|checks|logits_last)", r"ci\.(values|half_width)", r"cifarfs\.(train|val|test)")


def cases(pattern):
    """What the groups of the pattern take, in the keys that the file holds."""
    found = [m.groups() for m in (re.fullmatch(pattern, k) for k in GOLDEN) if m]
    return sorted({g[0] if len(g) == 1 else g for g in found})


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def close_by_column(a, b, tolerances):
    """Every column against its own maximum."""
    a, b = np.asarray(torch.as_tensor(a).detach(), np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    for i, tolerance in enumerate(np.broadcast_to(tolerances, b.shape[-1])):
        assert np.abs(a[..., i] - b[..., i]).max() <= tolerance * max(np.abs(b[..., i]).max(), 1e-300), i


def gradient(f, x):
    x = x.clone().requires_grad_()
    f(x).backward()
    return x.grad


def filled(state, rule, prefix=""):
    """Weights made of the official key names: rule A of the project, rule B under which inputs matter."""
    out = {}
    for key, v in state.items():
        z = np.random.RandomState(zlib.crc32((prefix + key).encode())).standard_normal(v.shape)
        if not v.is_floating_point():
            out[key] = torch.zeros_like(v)
            continue
        if key.endswith("running_var"):
            z = np.abs(0.05 * z) + 0.5
        elif rule == "B" and v.ndim >= 2:
            z = z / np.sqrt(np.prod(v.shape[1:]))
        elif rule == "B" and key.endswith("weight"):
            z = 1 + 0.05 * z
        else:
            z = 0.05 * z
        out[key] = torch.from_numpy(np.asarray(z, np.float32))
    return out


def official(key):
    return re.sub(r"^linear\.", "fc.", key.replace(".shortcut.", ".downsample."))


def fill(net, rule, rename=official):
    """Filled under the official names, then loaded through the project's renames."""
    state = filled({rename(k): v for k, v in net.state_dict().items()}, rule)
    net.load_state_dict(common.unwrap(state, "golden") if rename is official else
                        {k: state[rename(k)] for k in net.state_dict()})
    return net


def golden_resnet(name, classes, rule):
    net = common.build_model(name, classes)
    if isinstance(net, common.ResNet) and len(net.state_dict()) and "layer4.0.conv1.weight" not in net.state_dict():
        return fill(net, rule)
    return fill(net, rule, lambda k: k)


@pytest.mark.parametrize("case", cases(r"(gda\d+)\.student"))
def test_golden_gda(case):
    s, t, (fr, sk) = golden(f"{case}.student"), golden(f"{case}.teacher"), GOLDEN[f"{case}.lam"].tolist()
    args = Args(fisher_rao_lamda=fr, sinkhorn_lamda=sk, kd_loss_weight=0.0)

    def total(s):
        return gda_kd.distill_terms(s[None], t[None], golden(f"{case}.labels"), 0, args)["kd"]

    for key, f in (("fr", gda_kd.fisher_rao_loss), ("sink", gda_kd.sinkhorn_loss), ("total", lambda s, t: total(s))):
        close(f(s, t), GOLDEN[f"{case}.{key}"], 1e-5)
        close(gradient(lambda x: f(x, t), s), GOLDEN[f"{case}.grad_{key}"], 1e-4)
    close(gda_kd.sinkhorn_loss(t, t), GOLDEN[f"{case}.sink_self"], 1e-5)
    assert CONFIG["gda"]["T_ot"] == 2 and (CONFIG["gda"]["epsilon"], CONFIG["gda"]["iterations"]) == (0.1, 20)
    W = gda_kd.cost_matrix(s, t)
    for key, ours in (("z_student", gda_kd.standardise(s)), ("W", W[0]), ("P", gda_kd.transport(W)[0][0])):
        if f"{case}.{key}" in GOLDEN:
            close(ours, GOLDEN[f"{case}.{key}"], 1e-5)


@pytest.mark.parametrize("case", cases(r"(gda\d+)\.student"))
def test_golden_kd_and_dkd(case):
    s, t, y = (golden(f"{case}.{k}") for k in ("student", "teacher", "labels"))
    for T in cases(rf"{case}\.kd_T(\d+)"):
        close(gda_kd.kl_rows(s, t, float(T)).mean(), GOLDEN[f"{case}.kd_T{T}"], 3e-5)
    for T in cases(rf"{case}\.kd_none_T(\d+)_rowsum"):
        close(gda_kd.kl_rows(s, t, float(T)), GOLDEN[f"{case}.kd_none_T{T}_rowsum"], 3e-5)
    for T in cases(rf"{case}\.grad_kd_T(\d+)"):
        close(gradient(lambda x: gda_kd.kl_rows(x, t, float(T)).mean(), s), GOLDEN[f"{case}.grad_kd_T{T}"], 3e-5)
    for abT in cases(rf"{case}\.dkd_a([\d.]+)_b([\d.]+)_T(\d+)"):
        key = "dkd_a{}_b{}_T{}".format(*abT)
        close(gda_kd.dkd_loss(s, t, y, *map(float, abT)), GOLDEN[f"{case}.{key}"], 1e-5)
        if f"{case}.grad_{key}" in GOLDEN:
            close(gradient(lambda x: gda_kd.dkd_loss(x, t, y, *map(float, abT)), s), GOLDEN[f"{case}.grad_{key}"],
                  1e-4)


def script_args(distiller, preset, own={}):
    """Args of a group of the golden config; own: values of a section that has some of its own."""
    c = {**CONFIG["dist"], **{k: v for k, v in own.items() if k in CONFIG["dist"] and k != "presets"}}
    values = {k.replace("kd_temperature", "T"): v for k, v in c["presets"][preset].items()}
    return Args(distiller=distiller, **values, **{k: c[k] for k in (
        "epochs", "superalignment_rate", "superalignment_threshold", "dkd_alpha", "dkd_beta", "dkd_temperature")})


@pytest.mark.parametrize("case", cases(r"dist\.(\w+)\.(\w+)\.(hard|soft)((?:\.e\d+)?)"))
def test_golden_distiller(case):
    distiller, preset, labels, epoch = case
    y, key = golden("dist.labels" if labels == "hard" else "dist.soft_labels"), f"dist.{'.'.join(case[:3])}{epoch}"
    args, t = script_args(distiller, preset), golden("dist.teacher")[None]

    def terms(s):
        return gda_kd.distill_terms(s[None], None if distiller == "vanilla" else t, y, int(epoch[2:] or 0), args)

    ours = terms(golden("dist.student"))
    close_by_column([ours[k] for k in ("gt", "kd", "align")], GOLDEN[key], 1e-5)
    if f"{key}.grad" in GOLDEN:
        grad = gradient(lambda s: sum(terms(s)[k] for k in ("gt", "kd", "align")), golden("dist.student"))
        close(grad, GOLDEN[f"{key}.grad"], 1e-4)


@pytest.mark.parametrize("name", CONFIG["aug"])
def test_golden_augconf_weight(name):
    c = CONFIG["aug"][name]
    ours = [c["threshold"] * gda_kd.ramp(e, c["epochs"], c["rate"]) for e in range(c["epochs"])]
    close(ours, GOLDEN[f"aug.{name}"], 1e-5)


@pytest.mark.parametrize("theta", cases(r"adapt\.alpha_t([\d.]+)"))
def test_golden_adaptconf_weight(theta):
    a = gda_kd.adaptconf_weight(golden("adapt.student"), golden("adapt.teacher"), float(theta))
    close(a, GOLDEN[f"adapt.alpha_t{theta}"], 1e-4)


@pytest.mark.parametrize("case", cases(r"(lr\d+)\.cfg"))
def test_golden_lr(case):
    epochs, warmup, lr, low, start = GOLDEN[f"{case}.cfg"].tolist()
    plan = gda_kd.schedule("v0", int(epochs), lr, low, int(warmup), start)
    np.testing.assert_allclose([common.lr_at(plan, e) for e in range(int(epochs))], GOLDEN[f"{case}.per_epoch"],
                               rtol=1e-9)


def test_golden_optimizer_groups():
    net, want = common.build_model(CONFIG["opt"]["arch"], CONFIG["opt"]["classes"]), GOLDEN["opt.groups"]
    optimizer = gda_kd.make_optimizer(net, want[0, 3], want[0, 4], want[:, 2].max(), v0=True)
    ours = [[len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"], g["lr"], g["momentum"],
             g["nesterov"]] for g in optimizer.param_groups]
    assert np.array_equal(np.array(ours, np.float64), want)


def test_golden_crops():
    x, out = (golden(f"rrc.{k}").permute(0, 3, 1, 2) for k in ("images", "out"))
    top, left, h, w, kind, flip = golden("rrc.params").T
    crops, size = torch.stack((top, left, h, w, kind, flip)), x.shape[-1]
    exact = gda_kd.Cropper(size, size, "cpu", dtype=torch.float64)
    assert torch.equal(exact(x, crops), out)
    exact.tables = None  # by the formula, as for large images
    assert torch.equal(exact(x, crops), out)
    fast = gda_kd.Cropper(size, size, "cpu")(x, crops)
    assert (fast.int() - out.int()).abs().max() <= 1


def test_golden_crop_statistics():
    c, images = CONFIG["rrc"], golden("rrc.images")
    assert c["scale"] == [0.08, 1.0] and c["ratio"] == [3 / 4, 4 / 3]
    size = images.shape[1]
    top, left, h, w, kind, flip = gda_kd.draw_crops(c["draws"], size, torch.Generator().manual_seed(0)).double()
    area, whole = h * w / size ** 2, ((h == size) & (w == size)).double()
    ours = torch.stack([h.mean(), w.mean(), area.mean(), area.std(), whole.mean(), (w / h).log().std(), top.mean(),
                        left.mean()])
    close_by_column(ours, GOLDEN["rrc.stats"], [0.02] * 4 + [0.4] + [0.02] * 3)
    histogram = np.bincount(h.long(), minlength=len(GOLDEN["rrc.h_hist"])) / c["draws"]
    assert np.abs(histogram - GOLDEN["rrc.h_hist"]).sum() < 0.05
    assert abs(kind.mean() - 0.5) < 0.02 and abs(flip.mean() - 0.5) < 0.02
    assert (top + h).max() <= size and (left + w).max() <= size and min(top.min(), left.min()) == 0


def test_golden_zoomed_view():
    c, x = CONFIG["evaltf"], golden("rrc.images").permute(0, 3, 1, 2)
    assert torch.equal(gda_kd.resized(x, c["resize"], c["crop"]), golden("evaltf.out_chw"))
    assert torch.equal(gda_kd.zoomed(x), golden("evaltf.out_chw"))
    data = common.Data("fake", lambda split: (x.numpy(), np.zeros(len(x), np.int64), ["a"]))
    data.mean, data.std = tuple(c["mean"]), tuple(c["std"])
    assert common.NORMS["cifar100_gda"] == (data.mean, data.std)
    first = golden("evaltf.out_chw")[:len(GOLDEN["evaltf.norm2"])]
    close(data.normalize(first), GOLDEN["evaltf.norm2"], 1e-6)


def state_lines(state, rename):
    return "\n".join(f"{rename(k)} {tuple(v.shape)}" for k, v in state.items())


@pytest.mark.parametrize("name", sorted({name for name, _ in cases(r"net\.(\w+)\.([AB])\.eval")}))
def test_golden_network(name):
    key, x, classes = f"net.{name}", golden("net.x"), CONFIG["net"]["classes"]
    for rule in sorted({r for n, r, _ in cases(r"net\.(\w+)\.([AB])\.(\w+)") if n == name}):
        net = golden_resnet(name, classes, rule).eval()
        with torch.no_grad():
            logits, feats = net(x, return_features=True)
            close(logits, GOLDEN[f"{key}.{rule}.eval"], 1e-4)
            if f"{key}.{rule}.feat" in GOLDEN:
                close_by_column([[f.mean(), f.std()] for f in feats], GOLDEN[f"{key}.{rule}.feat"], 1e-4)
            if f"{key}.{rule}.train" in GOLDEN:
                close(net.train()(x), GOLDEN[f"{key}.{rule}.train"], 1e-4)
            if f"{key}.{rule}.rm" in GOLDEN:
                rm = sum(b.double().sum() for n, b in net.named_buffers() if n.endswith("running_mean"))
                close(rm, GOLDEN[f"{key}.{rule}.rm"], 1e-4)
    shapes = [[*f.shape[1:], 0, 0][:3] for f in feats]
    assert shapes == GOLDEN[f"{key}.featshape"].tolist()
    assert sum(p.numel() for p in net.parameters()) == int(GOLDEN[f"{key}.nparams"])
    assert str(GOLDEN[f"{key}.keys"]) in (state_lines(net.state_dict(), official),
                                          state_lines(net.state_dict(), lambda k: k))


def sums(params, buffers):
    """Sum of p, |p|, p^2, running means and variances, in float64."""
    p = torch.cat([v.detach().double().flatten() for v in params])
    buffers = list(buffers)
    stats = [sum(b.double().sum() for n, b in buffers if n.endswith(k)) for k in ("running_mean", "running_var")]
    return [p.sum(), p.abs().sum(), (p * p).sum(), *stats]


@pytest.mark.parametrize("distiller", cases(r"step\.(\w+)\.losses"))
def test_golden_step(distiller):
    c, (seed, batch, lr, epoch) = CONFIG["step"], GOLDEN["step.cfg"].tolist()
    student = golden_resnet(c["student"], c["classes"], "B").train()
    teacher = golden_resnet(c["teacher"], c["classes"], "B").eval().requires_grad_(False)
    optimizer = gda_kd.make_optimizer(student, lr, c["momentum"], c["weight_decay"], v0=c["nesterov"])
    args, losses, checks = script_args(distiller, c["preset"], c), [], []
    for k in range(c["steps"]):
        rng = np.random.RandomState(int(seed) + k)
        x = torch.from_numpy(rng.standard_normal((int(batch), 3, 32, 32)).astype(np.float32))
        y = torch.from_numpy(rng.randint(0, c["classes"], int(batch)))
        s = gda_kd.grouped(student, x, 1, student)
        terms = gda_kd.distill_terms(s[None], teacher(x)[None], y, int(epoch), args)
        terms = [terms[k] for k in ("gt", "kd", "align")]
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
        losses.append([sum(terms).detach(), *(v.detach() for v in terms)])
        checks.append(sums(student.parameters(), student.named_buffers()))
    key = f"step.{distiller}"
    close_by_column(losses, GOLDEN[f"{key}.losses"], 1e-3)
    close_by_column(checks, GOLDEN[f"{key}.checks"], [1e-3, 3e-5, 3e-5, 1e-3, 1e-3])
    rows, columns = GOLDEN[f"{key}.fc_weight"].shape
    close(student.linear.weight[:rows, :columns], GOLDEN[f"{key}.fc_weight"], 2e-3)
    close(s, GOLDEN[f"{key}.logits_last"], 5e-3)


@pytest.mark.parametrize("case", cases(r"fs\.(sampler\d+)\.cfg"))
def test_golden_sampler(case):
    seed, n_batches, way, per_class, per_batch = GOLDEN[f"fs.{case}.cfg"].tolist()
    ours = gda_kd.draw_episodes(GOLDEN["fs.labels"], n_batches, way, per_class, per_batch,
                                np.random.RandomState(seed))
    assert np.array_equal(ours, GOLDEN[f"fs.{case}.idx"])


def test_golden_split_and_query_labels():
    c, shot, query = CONFIG["fs"]["split"], golden("fs.split.shot"), golden("fs.split.query")
    item = shot.shape[3:]
    n = c["episodes"] * c["way"] * (c["shot"] + c["query"])
    x = torch.arange(n * int(np.prod(item)), dtype=torch.float32).view(n, *item)
    ours = gda_kd.split_episodes(x, c["episodes"], c["way"], c["shot"])
    assert torch.equal(ours[0], shot) and torch.equal(ours[1], query)
    assert torch.equal(gda_kd.query_labels(c["episodes"], c["way"], c["query"]), golden("fs.nk_label"))


@pytest.mark.parametrize("metric", cases(r"fs\.logits\.(\w+)"))
def test_golden_nearest_logits(metric):
    q, proto, tau = golden("fs.q"), golden("fs.proto"), CONFIG["fs"]["tau"]
    shot = proto[..., None, :]  # the mean of one shot is the shot
    close(gda_kd.episode_logits(shot, q, metric, tau), GOLDEN[f"fs.logits.{metric}"], 1e-5)
    if f"fs.logits2d.{metric}" in GOLDEN:
        close(gda_kd.episode_logits(shot[0], q[0], metric, tau), GOLDEN[f"fs.logits2d.{metric}"], 1e-5)


@pytest.mark.parametrize("metric", cases(r"meta\.logits\.(\w+)"))
def test_golden_meta_logits(metric):
    shot, query = golden("meta.shot").flatten(3), golden("meta.query").flatten(2)
    close(gda_kd.episode_logits(shot, query, metric, CONFIG["meta"]["tau"]), GOLDEN[f"meta.logits.{metric}"], 1e-5)


def fs_args(distiller, values, **more):
    c = {**CONFIG["fsloss"], **values}
    return Args(task="fewshot", distiller=distiller, gt_loss_weight=1.0, T=c["T"],
                superalignment_threshold=c["threshold"], fisher_rao_lamda=c["fisher_rao_lamda"],
                sinkhorn_lamda=c["sinkhorn_lamda"], superalignment_rate=c["rate"],
                dkd_alpha=c["dkd_alpha"], dkd_beta=c["dkd_beta"], **more)


@pytest.mark.parametrize("case", cases(r"(fsloss\d+)\.(\w+)\.kd"))
def test_golden_distill_terms(case):
    name, preset = case
    c, key = CONFIG["fsloss"], ".".join(case)
    s, t, y = (golden(f"{name}.{k}") for k in ("student", "teacher", "labels"))

    def terms(s, distiller, epoch, **more):
        args = fs_args(distiller, c["presets"][preset], epochs=c["epochs"], **more)
        return gda_kd.distill_terms(s, t, y, epoch, args)

    close(terms(s, "kd", 1)["kd"], GOLDEN[f"{key}.kd"], 1e-4)
    for epoch in map(int, cases(rf"{key}\.e(\d+)\.dkd")):
        e = f"{key}.e{epoch}"
        close(terms(s, "dkd", epoch)["kd"], GOLDEN[f"{e}.dkd"], 1e-4)
        if f"{e}.dkd_baseline" in GOLDEN:
            close(terms(s, "dkd", epoch, gda=False)["kd"], GOLDEN[f"{e}.dkd_baseline"], 1e-4)
        for short, distiller in (("aug", "augconf"), ("adapt", "adaptconf")):
            if f"{e}.{short}" in GOLDEN:
                ours = terms(s, distiller, epoch)
                close_by_column([ours["kd"], ours["align"]], GOLDEN[f"{e}.{short}"], 1e-4)
        if f"{e}.adapt.grad" in GOLDEN:
            grad = gradient(lambda s: terms(s, "adaptconf", epoch)["kd"] + terms(s, "adaptconf", epoch)["align"], s)
            close(grad, GOLDEN[f"{e}.adapt.grad"], 1e-4)


@pytest.mark.parametrize("theta", cases(r"fs\.aug\.alpha_t([\d.]+)"))
def test_golden_fewshot_ramp(theta):
    c = CONFIG["fs"]["aug_alpha"]
    ours = [float(theta) * gda_kd.ramp(e, c["epochs"], c["rate"]) for e in range(1, c["epochs"] + 1)]
    close(ours, GOLDEN[f"fs.aug.alpha_t{theta}"], 1e-5)


@pytest.mark.parametrize("i, stage", [(i, s) for i, s in enumerate(("classifier", "meta")) if f"fs.lr{i}" in GOLDEN])
def test_golden_fewshot_schedule_and_optimizer(i, stage):
    c = CONFIG["fs"][f"lr{i}"]
    plan = gda_kd.schedule(stage, c["epochs"], c["lr"])
    assert [common.lr_at(plan, e) for e in range(c["epochs"])] == pytest.approx(GOLDEN[f"fs.lr{i}"], rel=1e-12)
    momentum, decay, nesterov, n_groups = GOLDEN[f"fs.opt{i}"]
    args = common.parse_args(Args, gda_kd.PRESETS, gda_kd.ALIASES, ["--task", "fewshot", "--stage", stage])
    optimizer = gda_kd.make_optimizer(torch.nn.BatchNorm2d(4), c["lr"], args.momentum, args.weight_decay, v0=False)
    ours = [[g["momentum"], g["weight_decay"], g["nesterov"]] for g in optimizer.param_groups]
    assert ours == [[momentum, decay, bool(nesterov)]] * int(n_groups)


def test_golden_large_images():
    x = golden("fs.im84").permute(2, 0, 1)[None]
    for key in cases(r"fs\.(im84_eval\d+)"):
        target = int(key[9:])
        assert torch.equal(gda_kd.resized(x, target, target)[0].permute(1, 2, 0), golden(f"fs.{key}"))
    for key in cases(r"fs\.(im84_crop\d+)"):
        cropper = gda_kd.Cropper(x.shape[-1], int(key[9:]), "cpu", dtype=torch.float64)
        crops = golden("fs.im84_crops").T
        crops = torch.cat((crops, torch.zeros_like(crops[:2])))  # bilinear, not flipped
        out = cropper(x.expand(crops.shape[1], -1, -1, -1), crops)
        assert torch.equal(out.permute(0, 2, 3, 1), golden(f"fs.{key}"))


@pytest.mark.parametrize("name", CONFIG["fsnet"]["names"])
def test_golden_fewshot_network(name):
    x, net = golden(f"fsnet.{name}.x"), common.build_model(name, 3)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("linear.")}
    assert state_lines(state, str) == str(GOLDEN[f"fsnet.{name}.keys"])
    assert sum(p.numel() for n, p in net.named_parameters() if n in state) == int(GOLDEN[f"fsnet.{name}.nparams"])
    for rule in sorted({r for n, r in cases(r"fsnet\.(\w+)\.([AB])\.eval") if n == name}):
        net.load_state_dict({**net.state_dict(), **filled(state, rule)})
        with torch.no_grad():
            close(net.eval()(x, return_features=True)[1][-1], GOLDEN[f"fsnet.{name}.{rule}.eval"], 1e-4)
            if f"fsnet.{name}.{rule}.train" in GOLDEN:
                close(net.train()(x, return_features=True)[1][-1], GOLDEN[f"fsnet.{name}.{rule}.train"], 1e-4)


@pytest.fixture
def small_learner(monkeypatch):
    """Learners with the small encoders of the golden file, filled under the official names."""
    def make(blocks, widths, classes, meta):
        monkeypatch.setitem(common.MODELS, "small", lambda num_classes: gda_kd.FewShotResNet(
            tuple(blocks), tuple(widths), num_classes))
        learner = gda_kd.Learner("small", classes, 32)
        names = {k: k.replace("encoder.linear.", "classifier.linear.") for k in learner.state_dict() if k != "temp"}
        if meta:  # filled without the prefix of the encoder
            names = {k: k.removeprefix("encoder.") for k in names if "linear" not in k}
        state = filled({v: learner.state_dict()[k] for k, v in names.items()}, "B")
        path = Path(os.environ["PYTEST_FILES"]) / "small.pth"
        torch.save({"model": "x", "model_args": {}, "model_sd": {f"encoder.{k}" if meta else k: v
                                                                 for k, v in state.items()}, "training": {}}, path)
        learner.load(path, selected=True)
        assert all(torch.equal(learner.state_dict()[k], state[v]) for k, v in names.items())
        return learner
    return make


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_FILES", str(tmp_path))


@pytest.mark.parametrize("loss", cases(r"fsstep\.(\w+)\.losses"))
def test_golden_fewshot_step(loss, small_learner):
    c, (seed, lr, T, theta) = CONFIG["fsstep"], GOLDEN["fsstep.cfg"].tolist()
    student = small_learner(c["student_blocks"], c["widths"], c["classes"], meta=False).train()
    teacher = small_learner(c["teacher_blocks"], c["widths"], c["classes"], meta=False).eval()
    args = fs_args(FS_LOSSES[loss], {"T": T, "threshold": theta, **c}, epochs=c["epochs"])
    optimizer, losses, checks = gda_kd.make_optimizer(student, lr, c["momentum"], c["weight_decay"], False), [], []
    for k in range(c["steps"]):
        rng = np.random.RandomState(int(seed) + k)
        x = torch.from_numpy(rng.standard_normal((c["batch"], 3, c["size"], c["size"])).astype(np.float32))
        y = torch.from_numpy(rng.randint(0, c["classes"], c["batch"]))
        with torch.no_grad():
            t = teacher.encoder(x)
        terms = gda_kd.distill_terms(gda_kd.grouped(student, x, 1, student.encoder), t, y, c["first_epoch"] + k, args)
        terms = [terms[k] for k in ("gt", "kd", "align")]
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
        losses.append([sum(terms).detach(), *(v.detach() for v in terms)])
        checks.append(sums(student.encoder.parameters(), student.named_buffers()))
    close_by_column(losses, GOLDEN[f"fsstep.{loss}.losses"], 1e-3)
    close_by_column(checks, GOLDEN[f"fsstep.{loss}.checks"], 1e-3)
    rows, columns = GOLDEN[f"fsstep.{loss}.linear"].shape
    close(student.encoder.linear.weight[:rows, :columns], GOLDEN[f"fsstep.{loss}.linear"], 1e-3)
    assert student.temp.item() == 10.0


def test_golden_meta_step(small_learner):
    c, (seed, shots, lr, T) = CONFIG["metastep"], GOLDEN["metastep.cfg"].tolist()
    student = small_learner(c["student_blocks"], c["widths"], 3, meta=True).train()
    teacher = small_learner(c["teacher_blocks"], c["widths"], 3, meta=True).eval()
    torch.nn.init.constant_(student.temp, c["tau"])
    torch.nn.init.constant_(teacher.temp, c["tau"])
    args = fs_args("kd", {"T": T, "threshold": 1.0, **c}, epochs=c["epochs"])
    optimizer, losses, checks = gda_kd.make_optimizer(student, lr, c["momentum"], c["weight_decay"], False), [], []
    y = gda_kd.query_labels(c["episodes"], c["way"], c["query"])
    for k in range(c["steps"]):
        shape = (c["episodes"] * c["way"] * (c["shot"] + c["query"]), 3, c["size"], c["size"])
        x = torch.from_numpy(np.random.RandomState(int(seed) + k).standard_normal(shape).astype(np.float32))

        def logits(learner):
            split = gda_kd.split_episodes(gda_kd.grouped(learner, x, 1, learner.features), c["episodes"], c["way"],
                                          c["shot"])
            return gda_kd.episode_logits(*split, "cos", learner.temp).flatten(0, 1)

        with torch.no_grad():
            t = logits(teacher)
        s = logits(student)
        terms = gda_kd.distill_terms(s, t, y, c["first_epoch"] + k, args)
        loss = terms["gt"] + terms["kd"] + terms["align"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([loss.detach(), terms["gt"].detach(), terms["kd"].detach(), student.temp.detach().clone()])
        params = [p for n, p in student.named_parameters() if "linear" not in n]
        checks.append(sums(params, student.named_buffers()))
    want = GOLDEN["metastep.losses"].copy()
    losses = np.array([[float(v) for v in row] for row in losses])
    losses[:, -1] -= c["tau"]
    want[:, -1] -= c["tau"]
    close_by_column(losses, want, [1e-3, 1e-3, 1e-3, 1e-2])
    close_by_column(checks, GOLDEN["metastep.checks"], 1e-3)
    close(s, GOLDEN["metastep.logits_last"], 1e-3)


def test_golden_interval():
    assert gda_kd.half_width(np.array([0.0, 1.0])) == pytest.approx(12.7062047362 / 2, rel=1e-9)  # one degree
    assert gda_kd.half_width(GOLDEN["ci.values"]) == pytest.approx(float(GOLDEN["ci.half_width"]), rel=1e-9)


def test_golden_cifarfs_split():
    train = sorted(set(range(100)) - {*gda_kd.CIFARFS_VAL, *gda_kd.CIFARFS_TEST})
    for name, ours in (("train", train), ("val", gda_kd.CIFARFS_VAL), ("test", gda_kd.CIFARFS_TEST)):
        assert list(ours) == GOLDEN[f"cifarfs.{name}"].tolist()


def test_golden_every_key_is_read():
    unread = [k for k in GOLDEN if not any(re.fullmatch(pattern, k) for pattern in READ)]
    assert not unread


# --------------------------------------------------------------------------------------------- properties of the losses

def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_cost(s, t, rounds=20):
    """Eqs. (1) to (4) as they are written, for one group, differentiated by autograd."""
    p, q = (((x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) / 2).softmax(1) for x in (s, t))
    W = (p[:, None] - q[None]).abs().sum(2)
    P = torch.exp(-W / 0.1)
    for _ in range(rounds):
        P = P / P.sum(1, keepdim=True)
        P = P / P.sum(0, keepdim=True)
    return (P * W).sum()


def test_transport_is_the_plain_one_and_batched_groups_are_the_mean():
    s, t = logits(3, 24, 10), logits(3, 24, 10, seed=1)
    want = sum(plain_cost(s[g], t[g]) for g in range(3)) / 3
    close(gda_kd.sinkhorn_loss(s, t), want, 1e-6)
    grad = gradient(lambda x: sum(plain_cost(x[g], t[g]) for g in range(3)) / 3, s)
    close(gradient(lambda x: gda_kd.sinkhorn_loss(x, t), s), grad, 1e-5)
    close(gda_kd.fisher_rao_loss(s, t), sum(gda_kd.fisher_rao_loss(s[g], t[g]) for g in range(3)) / 3, 1e-6)
    W = gda_kd.cost_matrix(s.double(), t.double()).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda W: gda_kd.TransportCost.apply(W, 0.1, 20), W, atol=1e-6)
    P = gda_kd.transport(W.detach())[0]
    close(P.sum(1), np.ones((3, 24)), 1e-12)  # columns were scaled last


def test_equal_logits_are_safe_and_equal_predictions_cost_nothing():
    s = logits(16, 10)
    for distiller in ("kd", "dkd", "augconf", "adaptconf"):
        for task in ("classify", "fewshot"):
            args = Args(distiller=distiller, task=task)
            grad = gradient(lambda x: sum(gda_kd.distill_terms(x, s, torch.arange(16) % 10, 1, args)[k]
                                          for k in ("gt", "kd", "align")), s)
            assert torch.isfinite(grad).all(), (distiller, task)
    assert gda_kd.kl_rows(s, s, 4.0).abs().max() < 1e-5 and gda_kd.fisher_rao_loss(s, s) < 1e-5
    assert abs(gda_kd.dkd_loss(s, s, torch.arange(16) % 10, 1.0, 8.0, 4.0)) < 1e-5
    constant = torch.ones(4, 10)
    grad = gradient(lambda x: gda_kd.fisher_rao_loss(x, s[:4]) + gda_kd.sinkhorn_loss(x, s[:4]), constant)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("distiller", ("kd", "dkd", "augconf", "adaptconf"))
def test_extreme_logits_stay_finite(distiller):
    s, t = 1e3 * logits(8, 10), 1e3 * logits(8, 10, seed=1)
    args = Args(distiller=distiller)
    terms = gda_kd.distill_terms(s, t, t.argmax(1), 0, args)
    assert all(torch.isfinite(v).all() for v in terms.values())
    assert torch.isfinite(gradient(lambda x: gda_kd.distill_terms(x, t, t.argmax(1), 0, args)["kd"], s)).all()


def test_switches_of_the_loss():
    s, t, y = logits(12, 10), logits(12, 10, seed=1), torch.arange(12) % 10

    def terms(target=y, **values):
        return gda_kd.distill_terms(s, t, target, 0, Args(**values))

    fr, sk = (float(terms()[k]) for k in ("fr", "sk"))
    assert "sk" not in terms(gda=False)
    close(terms()["kd"] - terms(gda=False)["kd"], 0.02 * fr + 0.1 * sk, 1e-5)
    close(terms(distiller="dkd")["kd"] - terms(distiller="dkd", gda=False)["kd"], 0.1 * sk, 1e-5)
    close(terms(distiller="dkd", dkd_fr=True)["kd"] - terms(distiller="dkd")["kd"], 0.02 * fr, 2e-4)
    twice = terms(distiller="augconf", kd_loss_weight=2.0)["kd"]
    close(twice, 2 * terms(distiller="augconf")["kd"], 1e-6)
    close(terms(kd_loss_weight=2.0)["kd"] - terms()["kd"], terms(gda=False)["kd"], 1e-5)  # D5: GDA is not doubled
    other = (y + 3) % 10
    for distiller in ("kd", "augconf", "adaptconf"):  # without labels they may be anything
        a, b = (terms(target, distiller=distiller, labels=False) for target in (y, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(terms(other, distiller="dkd", labels=False)["kd"],
                           terms(y, distiller="dkd", labels=False)["kd"])
    soft = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
    close(terms(labels=False)["gt"], 2 * soft, 1e-6)


def test_transport_stats():
    t = logits(20, 10)
    same, other = gda_kd.transport_stats(t, t), gda_kd.transport_stats(t, t.flip(0))
    assert same["ot_diagonal"] > 0.3 > other["ot_diagonal"]
    close(same["ot_cost"] * 20, gda_kd.sinkhorn_loss(t, t), 1e-6)
    close(same["ot_cost"], other["ot_cost"], 1e-4)  # the batch as a whole is the same


def test_schedules():
    native = gda_kd.schedule("native", 240, 0.05)
    assert [common.lr_at(native, e) for e in (0, 149, 150, 180, 210)] == pytest.approx([0.05, 0.05, 5e-3, 5e-4, 5e-5])
    assert common.lr_at(gda_kd.schedule("v0", 3, 0.2, 2e-3, 0, 1e-4), 0) == pytest.approx(0.2)  # no warm-up at all


# ------------------------------------------------------------------------------------------------------------- batches

def test_only_the_first_group_moves_running_statistics():
    net, x = common.build_model("resnet8", 4).train(), torch.randn(24, 3, 32, 32)
    alone = common.build_model("resnet8", 4).train()
    alone.load_state_dict(net.state_dict())
    with torch.no_grad():
        out = gda_kd.grouped(net, x, 3, net)
        want = [alone(part) for part in x.chunk(3)[:1]]
        assert torch.allclose(out[:8], want[0], atol=1e-6)
        stats = {k: v for k, v in net.state_dict().items() if "running" in k or "num_batches" in k}
        assert all(torch.equal(v, alone.state_dict()[k]) for k, v in stats.items())
        assert torch.allclose(out[8:16], alone(x[8:16]), atol=1e-6)  # its own batch statistics
        gda_kd.grouped(net, x, 3, net, first=False)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in stats.items())
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_crops_are_those_of_pillow():
    """Any size of image, and both ways to make the matrices (the golden file has images that shrink)."""
    from PIL import Image
    rng = np.random.RandomState(0)
    for size, target in ((32, 32), (20, 20), (40, 40)):
        x = torch.from_numpy(rng.randint(0, 256, (60, 3, size, size), np.uint8))
        crops = gda_kd.draw_crops(60, size, torch.Generator().manual_seed(1))
        ours = gda_kd.Cropper(size, target, "cpu", dtype=torch.float64)(x, crops)
        for image, out, (top, left, h, w, kind, flip) in zip(x, ours, crops.T.tolist()):
            image = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + w, top + h))
            image = image.resize((target, target), 3 if kind else 2)
            image = image.transpose(0) if flip else image
            assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(image))
        fast = gda_kd.Cropper(size, target, "cpu")(x, crops)
        assert (fast.int() - ours.int()).abs().max() <= 1
        assert (fast != ours).float().mean() < (1e-3 if size == 32 else 1e-2)


def test_cached_encodings_give_the_accuracy_of_encoding_every_episode():
    torch.manual_seed(0)
    learner, way, shots, query, n = gda_kd.Learner("resnet8", 3, 32).train(), 5, 2, 3, 40
    data = common.Data("fake", lambda split: (np.random.RandomState(0).randint(0, 256, (120, 3, 32, 32), np.uint8),
                                              np.arange(120) % 6, list("abcdef")))
    args = Args(way=way, query=query)
    ours, half = gda_kd.episode_accuracy(gda_kd.encode(learner, data, data.test_x), data.test_y, shots, n, args)
    assert learner.training and 0 < half < 10
    accs, learner = [], learner.eval()
    for index in gda_kd.draw_episodes(data.test_y.numpy(), n // 4, way, shots + query, 4, np.random.RandomState(0)):
        with torch.no_grad():
            feats = learner.features(data.normalize(data.test_x[torch.from_numpy(index)]))
        out = gda_kd.episode_logits(*gda_kd.split_episodes(feats, 4, way, shots), "cos", 10.0)
        hits = out.argmax(-1).flatten() == gda_kd.query_labels(4, way, query)
        accs.append(100 * hits.double().mean().item())
    assert ours == pytest.approx(np.mean(accs), abs=1e-9) and half == pytest.approx(gda_kd.half_width(np.array(accs)))


# ------------------------------------------------------------------------------------------------------ runs in process

def picture_set(folder, classes, train, test, size=32, seed=0):
    """Coloured noise that a small network can tell apart, as train.npz and test.npz."""
    rng = np.random.RandomState(seed)
    tint = rng.randint(0, 110, (classes, 3))
    folder.mkdir(parents=True)
    for split, n in (("train", train), ("test", test)):
        y = np.arange(n * classes) % classes
        x = np.clip(rng.randint(0, 140, (len(y), size, size, 3)) + tint[y][:, None, None], 0, 255).astype(np.uint8)
        np.savez(folder / f"{split}.npz", x=x, y=y)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A set of four classes and a resnet8 teacher that knows it."""
    path = tmp_path_factory.mktemp("world")
    picture_set(path / "own", 4, 24, 10)
    with pytest.MonkeyPatch.context() as mp:
        mp.chdir(path)
        flags = "--dataset own --arch resnet8 --epochs 8 --batch_size 16 --lr 0.05 --device cpu".split()
        shutil.copy(common.train_teacher(common.parse_args(common.TrainArgs, argv=flags)), path / "teacher.pt")
    return path


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """run("--epochs", "3") -> the result or the exit code; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", tmp_path / "own")
    shutil.copy(world / "teacher.pt", tmp_path / "t.pt")
    base = ["--dataset", "own", "--teacher_ckpt", "t.pt", "--student", "resnet8", "--batch_size", "16",
            "--virtual_gpus", "2", "--epochs", "3", "--log_every", "1", "--save_every", "1", "--device", "cpu",
            "--warmup_epochs", "1", "--lr", "0.05"]
    handler = signal.getsignal(signal.SIGINT)

    def go(*argv, base=base):
        try:
            return gda_kd.main(common.parse_args(Args, gda_kd.PRESETS, gda_kd.ALIASES, [*base, *argv]))
        except SystemExit as e:
            return e.code
    yield go
    signal.signal(signal.SIGINT, handler)


FEWSHOT = ("--task fewshot --smoke --save_every 1 --device cpu --teacher resnet8 --student resnet8 --limit_train 200 "
           "--limit_test 100").split()


def test_run_folder_and_evaluate(run):
    row = run("--run_name", "a")
    rows, config = metrics("runs/a"), json.loads(Path("runs/a/config.json").read_text())
    want = {"loss/total", "loss/gt", "loss/kd", "loss/align", "loss/fr", "loss/sk", "ot_diagonal", "ot_cost", "lr"}
    assert want <= rows[0].keys() and 0 < rows[0]["ot_diagonal"] < 1
    assert [r["acc/test_top1"] for r in rows if "acc/test_top1" in r][-1] == row["last"]
    assert config["derived"]["groups"] == 2 and config["derived"]["sinkhorn_lamda"] == pytest.approx(0.1 * 128 / 16)
    assert row["preset"] == "auto" and row["teacher"] == "resnet8" and row["real_images"] == 96 and row["n_test"] == 40
    assert {"teacher_top1", "teacher_top1_native", "native_top1", "agree1", "L_p"} <= row.keys()
    again = run("--evaluate", "runs/a", base=[])
    assert [again[k] for k in ("last", "agree1", "L_p", "native_top1")] == [row[k] for k in (
        "last", "agree1", "L_p", "native_top1")]


@pytest.mark.parametrize("flags", (["--recipe", "native", "--distiller", "dkd"], ["--distiller", "vanilla"],
                                   ["--distiller", "adaptconf", "--no_labels"], ["--distiller", "augconf", "--no_gda"]))
def test_same_seed_and_resume_are_bit_equal(run, flags):
    base = ["--dataset", "own", "--teacher_ckpt", "t.pt", "--student", "resnet8", "--batch_size", "16", "--epochs", "3",
            "--save_every", "1", "--log_every", "2", "--device", "cpu", "--eval_every", "2", *flags]
    row = run("--run_name", "a", base=base)
    assert run("--run_name", "b", "--time_limit", "1e-9", base=base) == 0
    for _ in range(2):
        run("--resume", "runs/b", "--time_limit", "1e-9", base=[])
    if not Path("runs/b/result.json").is_file():
        run("--resume", "runs/b", "--time_limit", "0", base=[])
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    if "vanilla" in flags:  # no teacher is asked for
        Path("t.pt").unlink()
        assert row["teacher"] == "" and run("--run_name", "d", base=[f for f in base if f not in ("--teacher_ckpt",
                                                                                                   "t.pt")])["last"]
    else:
        run("--run_name", "c", "--seed", "1", base=base)
        assert metrics("runs/a") != metrics("runs/c")


def test_the_teacher_is_not_touched(run, monkeypatch):
    kept, plain = [], common.get_teacher

    def get(*args, **more):
        teacher, info = plain(*args, **more)
        kept.append((teacher, {k: v.clone() for k, v in teacher.state_dict().items()}))
        return teacher, info

    monkeypatch.setattr(gda_kd, "get_teacher", get)
    run()
    (teacher, before), = kept
    assert not teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_native_recipe_is_common_augmentation_and_evaluation(run):
    row = run("--recipe", "native", "--virtual_gpus", "1", "--run_name", "a")
    assert row["native_top1"] == row["last"] and row["teacher_top1"] == row["teacher_top1_native"]
    assert run("--evaluate", "runs/a", base=[])["last"] == row["last"] and row["preset"] == "native kd + GDA"


def test_own_network_learns_in_both_tasks(run, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch.nn as nn\n\n\ndef small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(8, num_classes))\n")
    row = run("--student", "net.py:small", "--run_name", "a")
    assert row["student"] == "net.py:small" and run("--evaluate", "runs/a", base=[])["last"] == row["last"]
    row = run("--student", "net.py:small", "--teacher", "net.py:small", "--run_name", "b", base=FEWSHOT)
    assert row["fs"]["1"][0] == row["last"] == run("--evaluate", "runs/b", base=[])["last"]


def test_no_wait_for_the_device_inside_a_step(run, monkeypatch):
    """Every read-back in gda_kd.py is marked."""
    source, seen = (ROOT / "gda_kd.py").read_text().splitlines(), []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        def watched(self, *args, plain=getattr(torch.Tensor, name), **more):
            frame = sys._getframe(1)
            if frame.f_code.co_filename.endswith("gda_kd.py"):
                seen.append((frame.f_code.co_name, source[frame.f_lineno - 1]))
            return plain(self, *args, **more)
        monkeypatch.setattr(torch.Tensor, name, watched)
    run("--run_name", "a")
    assert not [line for where, line in seen if "# sync" not in line and where in ("classify", "grouped",
                                                                                   "distill_terms", "__call__")]


def test_bf16_is_close_to_float32(run):
    run("--run_name", "a")
    run("--run_name", "b", "--amp", "bf16")
    a, b = (metrics(f"runs/{name}")[0]["loss/total"] for name in "ab")
    assert abs(a - b) < 0.05 * abs(a)


def test_few_images_make_fewer_groups(run, capsys):
    run("--batch_size", "80", "--virtual_gpus", "6", "--run_name", "a")
    derived = json.loads(Path("runs/a/config.json").read_text())["derived"]
    assert (derived["groups"], derived["group_size"]) == (1, 80)
    assert derived["sinkhorn_lamda"] == pytest.approx(0.16)
    run("--batch_size", "500", "--virtual_gpus", "6", "--run_name", "b")
    assert json.loads(Path("runs/b/config.json").read_text())["derived"]["group_size"] == 96
    assert capsys.readouterr().out.count("warning: 1 groups of") == 2


@pytest.mark.slow
def test_processes_give_the_gradients_of_groups(run, tmp_path):
    """Two gloo processes with two groups each against four groups in one process, three steps."""
    flags = ["--dataset", "own", "--teacher_ckpt", "t.pt", "--student", "resnet8", "--batch_size", "8", "--epochs", "1",
             "--virtual_gpus", "4", "--warmup_epochs", "0", "--lr", "0.05", "--device", "cpu", "--log_every", "1"]
    run("--run_name", "one", base=flags)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                           "29617", str(ROOT / "gda_kd.py"), *flags, "--run_name", "two"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([r for r in metrics("runs/two") if "loss/total" in r]) == 3
    a, b = (torch.load(f"runs/{name}/student.pt", weights_only=True) for name in ("one", "two"))
    assert all((a[k].float() - b[k].float()).abs().max() <= 1e-6 * max(1, a[k].float().abs().max()) for k in a)
    one, two = (json.loads(Path(f"runs/{name}/result.json").read_text()) for name in ("one", "two"))
    assert one["last"] == two["last"] and one["agree1"] == two["agree1"]


# ------------------------------------------------------------------------------------------------------ few-shot runs

def stored(name):
    return json.loads(Path(f"runs/{name}/result.json").read_text())


def test_fewshot_stages_follow_each_other(run, capsys):
    """All from one command: plain classifiers, classifier stage, meta stage, test."""
    row = run("--run_name", "a", "--fs_shots", "1,2", base=FEWSHOT)
    out, folder = capsys.readouterr().out, Path("runs/a")
    assert {"classifier.pt", "meta.pt", "student.pt", "result.json"} <= {f.name for f in folder.iterdir()}
    plain, = Path("data/teachers").glob("*.pt")  # teacher and student are the same backbone here
    assert out.count("is not at hand: training one") == 1 and re.fullmatch(
        r"shapes_resnet8-classifier-[0-9a-f]{8}\.pt", plain.name)
    assert set(row["fs_all"]) == {"classifier, last", "classifier, selected", "meta, selected", "meta, last"}
    assert row["fs"] == row["fs_all"]["meta, last"] and row["last"] == row["fs"]["1"][0]
    assert set(row["fs"]) == {"1", "2"}
    assert row["best"] is None and row["shots"] == 1 and row["dataset"] == "shapes" and row["teacher_top1"] > 0
    rows = metrics(folder)
    logged = {"loss/total", "loss/gt", "loss/kd", "loss/fr", "loss/sk", "ot_diagonal", "ot_cost", "tau", "lr"}
    assert logged <= rows[0].keys()
    assert [k for r in rows for k in r if k.endswith("_top1")] == ["heldout_top1", "val_top1"]
    assert rows[0]["tau"] == 10 != rows[-2]["tau"] and [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    plans = json.loads((folder / "config.json").read_text())["derived"]["stages"]
    assert [(plans[s]["lr"], plans[s]["sinkhorn_lamda"], plans[s]["virtual_gpus"]) for s in ("classifier", "meta")] == [
        (0.1, 8e-4, 4), (0.001, 0.1, 2)]
    again = run("--evaluate", "runs/a", base=[])
    assert again["fs"] == row["fs"]
    test = run("--stage", "test", "--student_ckpt", "runs/a/meta.pt", "--run_name", "t", "--fs_shots", "1,2",
               base=FEWSHOT)
    assert test["fs"] == row["fs"] and "is not at hand" not in capsys.readouterr().out


def test_meta_stage_starts_from_the_plain_classifier_or_the_file_given(run):
    """A meta epoch without learning keeps the weights it starts from."""
    flags = ["--stage", "meta", "--lr", "0", "--epochs", "1"]
    run("--run_name", "a", *flags, base=FEWSHOT)
    plain, = Path("data/teachers").glob("*classifier*.pt")

    def weights(path, kind="state_dict"):
        state = torch.load(path, weights_only=True)
        return {k: v for k, v in state.get(kind, state).items() if v.ndim > 1}

    start, end = weights(plain, "selected"), weights("runs/a/student.pt")
    assert all(torch.equal(v, end[k]) for k, v in start.items())
    torch.save({k: v * 0.5 for k, v in torch.load(plain, weights_only=True)["state_dict"].items()}, "half.pt")
    run("--run_name", "b", *flags, "--student_ckpt", "half.pt", base=FEWSHOT)
    given, end = weights("half.pt"), weights("runs/b/student.pt")
    assert all(torch.equal(v, end[k]) for k, v in given.items())
    run("--run_name", "c", "--distiller", "vanilla", "--lr", "0", "--meta_epochs", "1", base=FEWSHOT)  # of its own run
    assert stored("c")["fs_all"]["meta, last"] is not None


def test_meta_teacher_and_its_tau(run, monkeypatch):
    seen = []
    plain = gda_kd.fewshot_teacher

    def watched(*args):
        teacher, info = plain(*args)
        seen.append((teacher.temp.item(), Path(info["path"]).name))
        return teacher, info

    monkeypatch.setattr(gda_kd, "fewshot_teacher", watched)
    run("--run_name", "a", "--stage", "meta", "--teacher_meta_model", base=FEWSHOT)
    run("--run_name", "b", "--stage", "meta", "--teacher_meta_model", "--teacher_temp", base=FEWSHOT)
    assert [name.split("-")[1] for _, name in seen] == ["meta"] * 2
    kept = torch.load(f"data/teachers/{seen[0][1]}", weights_only=True)["selected"]["temp"].item()
    assert seen[0][0] == 10 and seen[1][0] == kept != 10


@pytest.mark.slow
@pytest.mark.parametrize("flags", (["--distiller", "adaptconf", "--epochs", "2", "--meta_epochs", "2"],
                                   ["--distiller", "vanilla", "--eval_every", "2"],
                                   ["--stage", "meta", "--distiller", "dkd", "--epochs", "3", "--metric", "sqr"]))
def test_fewshot_same_seed_and_resume_are_bit_equal(run, flags):
    run("--run_name", "a", *flags, base=FEWSHOT)
    assert run("--run_name", "b", "--time_limit", "1e-9", *flags, base=FEWSHOT) == 0
    while not Path("runs/b/result.json").is_file():
        run("--resume", "runs/b", "--time_limit", "1e-9", base=[])
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    a, b = stored("a"), stored("b")
    assert a["fs_all"] == b["fs_all"] and a["teacher_top1"] == b["teacher_top1"]
    run("--run_name", "c", "--seed", "1", *flags, base=FEWSHOT)
    assert metrics("runs/a") != metrics("runs/c")


def test_selection_keeps_the_best_epoch_of_the_held_out_data(run, monkeypatch):
    scores, seen = iter([10.0, 60.0, 20.0] * 2), []
    plain = gda_kd.evaluate

    def scored(net, data):
        if not net.training and not any(p.requires_grad for p in net.parameters()):
            return plain(net, data)  # the teacher
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"top1": next(scores)}

    monkeypatch.setattr(gda_kd, "evaluate", scored)
    run("--run_name", "a", "--stage", "classifier", "--distiller", "vanilla", "--epochs", "3", base=FEWSHOT)
    kept = torch.load("runs/a/classifier.pt", weights_only=True)
    assert all(torch.equal(kept["selected"][f"encoder.{k}"], v) for k, v in seen[1].items())
    assert all(torch.equal(kept["state_dict"][f"encoder.{k}"], v) for k, v in seen[2].items())
    student = torch.load("runs/a/student.pt", weights_only=True)
    assert torch.equal(student["encoder.linear.bias"], seen[1]["linear.bias"])


def test_official_files_are_read(tmp_path):
    """{model, model_sd}: a classifier (encoder.*, classifier.linear.*), a meta file (encoder.*, temp)."""
    learner, other = gda_kd.Learner("resnet12_thin", 7, 32), gda_kd.Learner("resnet12_thin", 7, 32)
    state = learner.state_dict()
    classifier = {k.replace("encoder.linear", "classifier.linear"): v for k, v in state.items() if k != "temp"}
    meta = {**{k: v for k, v in state.items() if "linear" not in k}, "temp": torch.tensor(12.5)}
    for name, sd in (("classifier", classifier), ("meta", meta),
                     ("meta", {f"module.{k}": v for k, v in meta.items()})):
        torch.save({"model": name, "model_args": {"encoder": "x"}, "model_sd": sd, "training": {"epoch": 3}},
                   tmp_path / "f.pth")
        other.load(tmp_path / "f.pth", selected=True)
        assert other.temp.item() == (12.5 if name == "meta" else 10)
        assert torch.equal(other.encoder.layer4[0].conv3.weight, learner.encoder.layer4[0].conv3.weight)
        if name == "classifier":
            assert torch.equal(other.encoder.linear.weight, learner.encoder.linear.weight)


def test_cifarfs_and_its_split(run):
    picture_set(Path("data/cifar100"), 100, 20, 6)
    args = common.parse_args(Args, gda_kd.PRESETS, {}, ["--task", "fewshot", "--fs_data", "cifarfs", "--query", "5"])
    data = gda_kd.fewshot_data(args, "cpu")
    assert (len(data.train_x), len(data.test_x), data.num_classes, data.size) == (64 * 20, 64 * 6, 64, 32)
    assert len(data.val[0]) == 16 * 26 and len(data.new[0]) == 20 * 26 and data.norm == "cifar100"
    full = common.load_data("cifar100")
    base = [c for c in range(100) if c not in gda_kd.CIFARFS_VAL + gda_kd.CIFARFS_TEST]
    for x, y, classes, source in ((data.train_x, data.train_y, base, "train"), (*data.new, gda_kd.CIFARFS_TEST, None),
                                  (*data.val, gda_kd.CIFARFS_VAL, None)):
        assert sorted(set(y.tolist())) == list(range(len(classes)))
        for i in (0, len(y) // 2, len(y) - 1):  # the picture belongs to that class of CIFAR-100
            where = [(full.train_x == x[i]).all((1, 2, 3)), (full.test_x == x[i]).all((1, 2, 3))]
            found = torch.cat([full.train_y[where[0]], full.test_y[where[1]]]).tolist()
            assert found == [classes[y[i]]]


def test_mini_imagenet_pickles(run):
    """84-pixel pickles (also of python 2 strings) through all stages, on a thin network."""
    rng, folder = np.random.RandomState(0), Path("data/mini_imagenet")
    folder.mkdir(parents=True)
    pickles = {}
    for i, (name, classes, n) in enumerate((("train_phase_train", 6, 10), ("train_phase_test", 6, 4), ("val", 5, 8),
                                            ("test", 5, 8))):
        pickles[name] = {"data": rng.randint(0, 256, (classes * n, 84, 84, 3), np.uint8),
                         "labels": [10 * i + k // n for k in range(classes * n)], "catname2label": {"a": 1}}
        with open(folder / f"miniImageNet_category_split_{name}.pickle", "wb") as f:
            pickle.dump(pickles[name], f, protocol=2)
    args = common.parse_args(Args, gda_kd.PRESETS, {}, ["--task", "fewshot", "--query", "3"])
    assert (args.fs_data, args.dataset, args.teacher, args.student) == ("mini", "mini", "resnet18_bottle",
                                                                       "resnet36_bottle")
    data = gda_kd.fewshot_data(args, "cpu")
    assert data.train_x.shape == (60, 3, 84, 84) and data.test_x.shape == (24, 3, 80, 80) and data.norm == "imagenet"
    assert data.new[0].shape == (40, 3, 80, 80) and sorted(set(data.new[1].tolist())) == list(range(5))
    want = torch.from_numpy(pickles["val"]["data"]).permute(0, 3, 1, 2)
    assert torch.equal(data.val[0], gda_kd.resized(want, 80, 80))
    row = run(*"--task fewshot --run_name a --distiller vanilla --student resnet12_thin --epochs 1 --meta_epochs 1 "
              "--batch_size 30 --episodes 8 --query 3 --fs_shots 1,5 --device cpu".split(), base=[])
    assert row["dataset"] == "mini" and row["n_test"] == 80 and set(row["fs"]) == {"1", "5"}


@pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR (folder with the unpacked CIFAR sets) is not set")
def test_real_cifarfs():
    args = common.parse_args(Args, gda_kd.PRESETS, {}, ["--task", "fewshot", "--fs_data", "cifarfs", "--data_dir",
                                                        os.environ["DATA_DIR"]])
    data = gda_kd.fewshot_data(args, "cpu")
    assert torch.bincount(data.train_y).tolist() == [500] * 64 and torch.bincount(data.test_y).tolist() == [100] * 64
    assert torch.bincount(data.val[1]).tolist() == [600] * 16 and torch.bincount(data.new[1]).tolist() == [600] * 20


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DATA_DIR") or not os.environ.get("TEACHER_DIR"),
                    reason="DATA_DIR and TEACHER_DIR (published checkpoints) are not set")
def test_real_teacher_under_both_views(tmp_path):
    """Specs: 91.73 natively and 85.46 zoomed; the better one is checked, so the run goes on."""
    path, data = Path(os.environ["TEACHER_DIR"]) / "resnet20-12fca82f.th", common.load_data("cifar10",
                                                                                            os.environ["DATA_DIR"])
    net, info = common.load_teacher(path)
    data.set_norm(info["norm"])
    for x, want in ((data.test_x, 91.73), (gda_kd.zoomed(data.test_x), 85.46)):
        assert abs(common.accuracy(common.predict(net, data, x), data.test_y)["top1"] - want) <= 0.1


# ---------------------------------------------------------------------------------------------------- the command line

def parse(line):
    return common.parse_args(Args, gda_kd.PRESETS, gda_kd.ALIASES, line.split())


def test_no_flags_are_the_published_command():
    args = parse("")
    want = dict(dataset="cifar100", teacher="resnet56", student="resnet20", distiller="kd", gt_loss_weight=2.0,
                kd_loss_weight=1.0, T=4.0, fisher_rao_lamda=0.02, sinkhorn_lamda=0.1, epochs=240, batch_size=128,
                lr=0.2, min_lr=2e-3, warmup_epochs=10, warmup_lr=1e-4, weight_decay=5e-4, momentum=0.9,
                virtual_gpus=6, recipe="v0", norm="cifar100_gda", gda=True, labels=True)
    assert {k: getattr(args, k) for k in want} == want
    official = parse("--config configs/cifar/cifar_v0.yaml --dataset torch/cifar100 --model resnet20 --teacher resnet56"
                     " --distiller kd --gt-loss-weight 2 --kd-loss-weight 1 --kd-temperature 4 --fisher-rao-lamda 0.02"
                     " --sinkhorn-lamda 0.1 --output out --experiment name --log-interval 200 --eval-interval 1")
    same = {k: v for k, v in vars(official).items() if k not in ("given", "out_dir", "run_name", "log_every")}
    assert same == {k: getattr(args, k) for k in same} and (official.out_dir, official.run_name) == ("out", "name")
    assert parse("--sinkhorn_lambda 0.3 --fisher_rao_lambda 0.4").sinkhorn_lamda == 0.3
    assert parse("--no_gda --no_labels").gda is parse("--no-gda --no-labels").labels is False
    assert parse("--epochs 20").warmup_epochs == 5 and parse("--epochs 3").warmup_epochs == 0
    assert parse("--epochs 20 --warmup_epochs 7").warmup_epochs == 7


def test_recipes_and_pairs():
    native = parse("--recipe native")
    assert (native.batch_size, native.lr, native.virtual_gpus, native.norm, native.gt_loss_weight) == (
        64, 0.05, 1, "auto", 2.0)
    assert parse("--recipe native --lr 0.1").lr == 0.1
    assert parse("--dataset shapes").norm == "auto"
    for teacher, student in gda_kd.PAIRS:
        assert teacher in common.MODELS and student in common.MODELS and (student, teacher) in gda_kd.PAIRS
        assert ("cifar100", teacher, student) in gda_kd.PRESETS["auto"]
    assert parse("--smoke").dataset == "shapes" and parse("--smoke --task fewshot").student == "resnet12_thin"
    assert parse("--preset demo").recipe == "native"


PUBLISHED_FEWSHOT = (  # the project's ten few-shot commands, as ours
    ("--stage classifier --distiller vanilla --res_type resnet36_bottle", dict(student="resnet36_bottle")),
    ("--stage classifier --res_type resnet36 --teacher_res_type resnet12", dict(teacher="resnet12_bottle")),
    ("--stage classifier --res_type resnet36 --teacher_res_type resnet18", dict(teacher="resnet18_bottle")),
    ("--stage meta --distiller vanilla --res_type resnet36", dict(lr=0.001, epochs=20)),
    ("--stage meta --res_type resnet36 --teacher_res_type resnet12", dict(sinkhorn_lamda=0.1)),
    ("--stage meta --res_type resnet36 --teacher_res_type resnet18", dict(virtual_gpus=2)),
    ("--stage meta --res_type resnet36 --teacher_res_type resnet12 --teacher_meta_model", dict(epochs=20)),
    ("--stage meta --res_type resnet36 --teacher_res_type resnet18 --teacher_meta_model", dict(teacher_temp=False)),
    ("--stage test --res_type resnet36 --student_ckpt meta.pt --shot 1", dict(fs_shots=(1,))),
    ("--stage test --res_type resnet36 --student_ckpt meta.pt --shot 5", dict(fs_shots=(5,))))


@pytest.mark.parametrize("line, more", PUBLISHED_FEWSHOT)
def test_published_fewshot_commands(line, more):
    args = parse(f"--task fewshot {line}")
    want = {**dict(student="resnet36_bottle", fs_data="mini", T=1.0, fisher_rao_lamda=0.1, gt_loss_weight=1.0, way=5,
                   query=15, episodes=800, momentum=0.9, weight_decay=5e-4), **more}
    assert {k: getattr(args, k) for k in want} == want
    if args.stage == "classifier":
        assert (args.epochs, args.lr, args.batch_size, args.virtual_gpus) == (100, 0.1, 128, 4)


def test_fewshot_presets():
    for stage, distiller, preset, want in (
            ("classifier", "kd", "readme", (1.0, 0.25, 8e-4)), ("classifier", "adaptconf", "readme", (1.0, 8.0, 8e-4)),
            ("classifier", "dkd", "readme", (1.0, 0.25, 8e-4)), ("meta", "augconf", "readme", (1.0, 0.25, 0.1)),
            ("classifier", "kd", "config", (1.0, 8.0, 8e-4)), ("classifier", "augconf", "config", (10.0, 8.0, 8e-4)),
            ("meta", "kd", "config", (10.0, 0.25, 8e-4))):
        args = parse(f"--task fewshot --stage {stage} --distiller {distiller} --fs_preset {preset}")
        assert (args.T, args.superalignment_threshold, args.sinkhorn_lamda) == want, (stage, distiller, preset)
    args = parse("--task fewshot --stage meta --temperature 3 --threshold 0.5 --loss_weight 2 --name x")
    assert (args.T, args.superalignment_threshold, args.kd_loss_weight, args.run_name) == (3.0, 0.5, 2.0, "x")
    assert parse("--task fewshot --stage meta").teacher == "resnet12_bottle"


def test_rows_have_names_and_published_numbers():
    def names(line, shots=None):
        return gda_kd.row_names(parse(line), shots)

    assert names("") == {"preset": "auto", "teacher": "resnet56", "shots": None, "paper": None}
    assert names("--recipe native --no_gda")["paper"]["top1"] == 70.66
    row = names("--recipe native --no_gda --distiller dkd --teacher wrn40_2 --student wrn16_2")
    assert (row["preset"], row["paper"]["top1"]) == ("native dkd", 76.23)
    assert names("--teacher resnet20 --student resnet56 --no_gda")["paper"]["top1"] == 73.81
    assert names("--teacher resnet20 --student resnet56")["paper"] is None  # no number of GDA is known
    row = names("--task fewshot --stage meta --distiller vanilla --student resnet12_bottle", 1)
    assert row["paper"]["top1"] == 63.17 and row["teacher"] == ""
    assert len({names(f"--distiller {d} {g}")["preset"] for d in ("kd", "dkd", "augconf", "adaptconf")
                for g in ("", "--no_gda", "--no_labels")}) == 12
    for (_, dataset, teacher, student, _), (top1, protocol) in gda_kd.PUBLISHED.items():
        assert dataset in ("cifar100", "mini") and {teacher, student} <= {*common.MODELS, ""}
        assert 50 < top1 < 90 and protocol


BAD = {
    "vanilla without labels": ("--distiller vanilla --no_labels", r"--distiller vanilla --no_labels.*another"),
    "few-shot backbone": ("--student resnet12_thin", r"--student resnet12_thin is a backbone of --task fewshot"),
    "few-shot teacher": ("--teacher resnet12_bottle", r"--teacher resnet12_bottle is a backbone of --task fewshot"),
    "no such metric": ("--metric cosine", r"--metric cosine.*cos, dot, sqr"),
    "no such res_type": ("--task fewshot --res_type resnet50", r"--res_type resnet50.*resnet12"),
    "fewshot of cifar10": ("--task fewshot --smoke --dataset cifar10", r"--fs_data, not from --dataset"),
    "best on test": ("--task fewshot --smoke --select best_test", r"both selections"),
    "test of nothing": ("--task fewshot --smoke --stage test", r"--student_ckpt"),
    "meta teacher of a classifier": ("--task fewshot --smoke --teacher_meta_model", r"--stage meta"),
    "mini is not there": ("--task fewshot", r"miniImageNet_category_split_test.*is missing.*--fs_data cifarfs|"
                          r"miniImageNet_category_split_train_phase_test\.pickle is missing.*--fs_data cifarfs"),
    "way too large": ("--task fewshot --smoke --way 6", r"--way 6.*there are 5 .*classes"),
    "query too large": ("--task fewshot --smoke --query 30", r"--query 30.*images or more"),
    "no shots": ("--task fewshot --smoke --fs_shots 0", r"fs_shots.* 1 or more"),
    "too few episodes": ("--task fewshot --smoke --episodes 4", r"needs --episodes of 8"),
    "no meta epochs": ("--task fewshot --smoke --meta_epochs 0", r"meta_epochs 0: must be 1"),
    "file of another net": ("--task fewshot --smoke --stage test --student_ckpt t.pt",
                            r"t\.pt: does not fit the few-shot network.*--student"),
    "file of nothing": ("--task fewshot --smoke --stage test --student_ckpt no.pt", r"no\.pt: no .*checkpoint"),
    "evaluate nothing": ("--task fewshot --smoke --evaluate no.pt", r"no\.pt: no .*checkpoint")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, run, capfd):
    line, pattern = BAD[name]
    capfd.readouterr()
    code = run(*line.split(), "--device", "cpu", base=[])
    lines = capfd.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and re.search(pattern, lines[0]), (code, lines)


def test_more_bad_input(run, capfd, monkeypatch):
    Path("data/mini_imagenet").mkdir(parents=True)
    with open("data/mini_imagenet/miniImageNet_category_split_train_phase_test.pickle", "wb") as f:
        pickle.dump([1, 2], f)
    assert run("--task", "fewshot", base=[]) == 2 and "no data and labels" in capfd.readouterr().err
    torch.save({"state_dict": gda_kd.Learner("resnet12_thin", 5, 32).state_dict()}, "weak.pt")
    strict = [f for f in FEWSHOT if f != "--smoke"]
    small = ["--fs_data", "shapes", "--teacher", "resnet12_thin", "--teacher_ckpt", "weak.pt", "--query", "4",
             "--fs_shots", "1"]
    assert run(*small, base=strict) == 2 and "--allow_weak_teacher" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run("--virtual_gpus", "6") == 2 and "4 processes cannot share --virtual_gpus 6" in capfd.readouterr().err
    assert run(base=FEWSHOT) == 2 and "runs in one process" in capfd.readouterr().err


def test_large_theta_is_warned_of(run, capsys):
    run("--distiller", "augconf", "--threshold", "8", "--stage", "classifier", base=FEWSHOT)
    assert "theta 8 > 1" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the file

SOURCE = (ROOT / "gda_kd.py").read_text()


def test_equations_are_numbered_in_docstring_and_code():
    doc, code = gda_kd.__doc__, SOURCE[len(gda_kd.__doc__):]
    numbered = {int(n) for n in re.findall(r"\((\d+)\)$", doc, re.M)}
    used = {int(n) for found in re.findall(r"# .*?eqs?\. ([^:\n]+)", code) for n in re.findall(r"\((\d+)\)", found)}
    assert numbered == set(range(1, max(numbered) + 1)) == used
    tags = set(re.findall(r"^  (D\d+)", doc, re.M))
    assert tags == {f"D{n}" for n in range(1, len(tags) + 1)} and {
        t for t in tags if not re.search(rf"# .*\b{t}\b", code)} <= {"D1"}  # D1 is common.py's way


def test_the_head_is_the_shared_one_and_every_flag_is_used():
    def head(text):
        return text[text.index("    # shared by all scripts"):text.index("    # the method's own defaults")]

    assert head(SOURCE) == head((ROOT / "tests" / "toy.py").read_text())
    everything = SOURCE + (ROOT / "common.py").read_text()
    for field in dataclasses.fields(Args):
        assert re.search(rf'(args|a|plan|wanted)\.{field.name}\b|"{field.name}"', everything), field.name


@pytest.mark.slow
@pytest.mark.parametrize("flags", (["--epochs", "6"], ["--task", "fewshot", "--epochs", "3", "--meta_epochs", "3"]))
def test_killed_run_resumes_bit_equal(tmp_path, flags):
    kill.prove(["gda_kd.py", "--smoke", "--save_every", "1", *flags], kills=1, cwd=tmp_path, seed=0)
