"""gda_kd.py: golden numbers, published rows, what a step does, whole runs of both tasks."""
import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import gda_kd
from gda_kd import Args
from tools import close, host_syncs, load_golden, metrics, result, same_weights, unread

GOLDEN, CONFIG = load_golden("gda_kd")
GONE = {
    r"(fs\.logits|fs\.logits2d|meta\.logits)\.(dot|sqr)": "only the published cosine is left",
    r"net\..+": "the same networks are read from common.npz",
}
READ = (
    r"config|(step|fsstep|metastep)\.cfg|opt\.groups|lr\d+\.(cfg|per_epoch)|aug\.\w+|rrc\.\w+",
    r"gda\d+\.(student|teacher|labels|lam|fr|sink|total|grad_(fr|sink|total)|sink_self)",
    r"gda\d+\.(z_student|W|P|(grad_)?kd_T\d+|kd_none_T\d+_rowsum|(grad_)?dkd_a.+_b.+_T\d+)",
    r"dist\..+|adapt\..+|evaltf\.(out_chw|norm2)|ci\.(values|half_width)|cifarfs\.\w+",
    r"fsnet\.\w+\.([AB]\.(eval|train)|x|nparams|keys)|fsloss\d+\..+",
    r"step\.\w+\.(losses|checks|fc_weight|logits_last)|fsstep\.\w+\.(losses|checks|linear)",
    r"metastep\.(losses|checks|logits_last)|fs\.(labels|nk_label|q|proto|(lr|opt)[01])",
    r"fs\.sampler\d+\.(cfg|idx)|fs\.split\.(shot|query)|fs\.logits(2d)?\.cos",
    r"meta\.(shot|query|logits\.cos)|fs\.aug\.alpha_t[\d.]+|fs\.im84(_eval\d+|_crops|_crop\d+)?",
)


def test_every_golden_array_is_read_or_has_gone_with_a_reason():
    assert unread(GOLDEN, *READ, *GONE) == []
    assert all(GONE.values())


def cases(pattern):
    """The groups of the pattern in the keys of the golden file."""
    found = {m.groups() for m in (re.fullmatch(pattern, key) for key in GOLDEN.files) if m}
    return sorted(groups[0] if len(groups) == 1 else groups for groups in found)


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def close_by_column(ours, reference, tolerances):
    """Rows of numbers; every column against its own maximum."""
    ours = np.array([[float(torch.as_tensor(v).detach()) for v in row] for row in ours])
    reference = np.atleast_2d(reference)
    for i, tolerance in enumerate(np.broadcast_to(tolerances, reference.shape[1])):
        close(ours[:, i], reference[:, i], tolerance)


def gradient(f, x):
    x = x.clone().requires_grad_()
    f(x).backward()
    return x.grad


# ------------------------------------------------------------------------- golden: the losses

def row_args(values, **more):
    """Args of an object of the golden config; the official temperature has another name."""
    names = {f.name for f in dataclasses.fields(Args)}
    values = {key.replace("kd_temperature", "T"): value for key, value in values.items()}
    return Args(**{**{key: v for key, v in values.items() if key in names}, **more})


@pytest.mark.parametrize("case", cases(r"(gda\d+)\.student"))
def test_golden_gda(case):
    s, t = golden(f"{case}.student"), golden(f"{case}.teacher")
    fr, sk = GOLDEN[f"{case}.lam"].tolist()
    args = Args(fisher_rao_lamda=fr, sinkhorn_lamda=sk)

    def total(s, t):
        return gda_kd.gda_loss(gda_kd.fisher_rao_loss(s, t), gda_kd.sinkhorn_loss(s, t), args)

    for key, f in (("fr", gda_kd.fisher_rao_loss), ("sink", gda_kd.sinkhorn_loss),
                   ("total", total)):
        close(f(s, t), GOLDEN[f"{case}.{key}"], 1e-5)
        close(gradient(lambda x: f(x, t), s), GOLDEN[f"{case}.grad_{key}"], 1e-4)
    close(gda_kd.sinkhorn_loss(t, t), GOLDEN[f"{case}.sink_self"], 1e-5)
    W = gda_kd.cost_matrix(s, t)
    ours = {"z_student": gda_kd.standardise(s), "W": W, "P": gda_kd.transport_plan(W)}
    for key in ours:
        if f"{case}.{key}" in GOLDEN:
            close(ours[key], GOLDEN[f"{case}.{key}"], 1e-5)


@pytest.mark.parametrize("case", cases(r"(gda\d+)\.student"))
def test_golden_kl_and_dkd(case):
    s, t, y = (golden(f"{case}.{key}") for key in ("student", "teacher", "labels"))

    for T in cases(rf"{case}\.kd_T(\d+)"):
        rows = gda_kd.kl_rows(s, t, float(T))
        close(rows.mean(), GOLDEN[f"{case}.kd_T{T}"], 3e-5)
        if f"{case}.kd_none_T{T}_rowsum" in GOLDEN:
            close(rows, GOLDEN[f"{case}.kd_none_T{T}_rowsum"], 3e-5)
        if f"{case}.grad_kd_T{T}" in GOLDEN:
            grad = gradient(lambda x: gda_kd.kl_rows(x, t, float(T)).mean(), s)
            close(grad, GOLDEN[f"{case}.grad_kd_T{T}"], 3e-5)
    for abT in cases(rf"{case}\.dkd_a([\d.]+)_b([\d.]+)_T(\d+)"):
        key, numbers = "dkd_a{}_b{}_T{}".format(*abT), [float(text) for text in abT]
        close(gda_kd.dkd_loss(s, t, y, *numbers), GOLDEN[f"{case}.{key}"], 1e-5)
        if f"{case}.grad_{key}" in GOLDEN:
            grad = gradient(lambda x: gda_kd.dkd_loss(x, t, y, *numbers), s)
            close(grad, GOLDEN[f"{case}.grad_{key}"], 1e-4)


def distiller_args(distiller, preset, batch, own={}):
    """The golden SK is of one group of `batch` rows as it is: D2's factor is taken back."""
    c = {**CONFIG["dist"], **{key: v for key, v in own.items() if key != "preset"}}
    args = row_args({**c, **c["presets"][preset]}, distiller=distiller)
    if distiller == "dkd":
        args.T = c["dkd_temperature"]
    args.sinkhorn_lamda *= batch / 128
    return args


def weighted(terms, args):
    return torch.stack([torch.as_tensor(v) for v in (
        args.gt_loss_weight * terms["ce"], terms.get("kd", 0.0), terms.get("align", 0.0))])


@pytest.mark.parametrize("case", cases(r"dist\.(\w+)\.(\w+)\.(hard|soft)((?:\.e\d+)?)"))
def test_golden_distiller(case):
    distiller, preset, labels, epoch = case
    key = f"dist.{distiller}.{preset}.{labels}{epoch}"
    y = golden("dist.labels" if labels == "hard" else "dist.soft_labels")
    t = None if distiller == "vanilla" else golden("dist.teacher")[None]
    args = distiller_args(distiller, preset, len(y))
    soft_dkd = distiller == "dkd" and labels == "soft"  # ours takes classes: the likeliest one
    target = y.argmax(1) if soft_dkd else y

    def terms(s):
        _, terms = gda_kd.classification_loss(s[None], t, target, int(epoch[2:] or 0), args)
        if soft_dkd:
            terms["ce"] = F.cross_entropy(s, y)
        return weighted(terms, args)

    close_by_column([terms(golden("dist.student"))], GOLDEN[key], 1e-5)
    if f"{key}.grad" in GOLDEN:
        grad = gradient(lambda s: terms(s).sum(), golden("dist.student"))
        close(grad, GOLDEN[f"{key}.grad"], 1e-4)


def test_golden_weights_of_own_opinion():
    for name, c in CONFIG["aug"].items():
        ours = [c["threshold"] * gda_kd.ramp(e, c["epochs"], c["rate"]) for e in range(c["epochs"])]
        close(ours, GOLDEN[f"aug.{name}"], 1e-5)
    for theta in cases(r"adapt\.alpha_t([\d.]+)"):
        s, t = golden("adapt.student"), golden("adapt.teacher")
        close(gda_kd.adaptconf_weight(s, t, float(theta)), GOLDEN[f"adapt.alpha_t{theta}"], 1e-4)
    for theta in cases(r"fs\.aug\.alpha_t([\d.]+)"):
        c = CONFIG["fs"]["aug_alpha"]
        args = Args(epochs=c["epochs"], superalignment_rate=c["rate"])
        ours = [float(theta) * gda_kd.fewshot_ramp(e, args) for e in range(c["epochs"])]
        close(ours, GOLDEN[f"fs.aug.alpha_t{theta}"], 1e-5)


def fewshot_args(distiller, values):
    c = {**CONFIG["fsloss"], **values}
    return row_args(c, distiller=distiller, superalignment_rate=CONFIG["fsloss"]["rate"],
                    superalignment_threshold=c["threshold"])


@pytest.mark.parametrize("case", cases(r"(fsloss\d+)\.(\w+)\.kd"))
def test_golden_fewshot_losses(case):
    name, preset = case
    values, key = CONFIG["fsloss"]["presets"][preset], ".".join(case)
    s, t, y = (golden(f"{name}.{k}") for k in ("student", "teacher", "labels"))

    def terms(s, distiller, epoch, gda=True):
        args = fewshot_args(distiller, values)
        args.gda = gda
        _, terms = gda_kd.fewshot_loss(s, t, y, epoch - 1, args)  # published: from 1
        return terms["kd"], terms["align"]

    close(terms(s, "kd", 1)[0], GOLDEN[f"{key}.kd"], 1e-4)
    for epoch in map(int, cases(rf"{key}\.e(\d+)\.dkd")):
        e = f"{key}.e{epoch}"
        close(terms(s, "dkd", epoch)[0], GOLDEN[f"{e}.dkd"], 1e-4)
        if f"{e}.dkd_baseline" in GOLDEN:
            close(terms(s, "dkd", epoch, gda=False)[0], GOLDEN[f"{e}.dkd_baseline"], 1e-4)
        for short in ("aug", "adapt"):
            if f"{e}.{short}" in GOLDEN:
                close_by_column([terms(s, f"{short}conf", epoch)], GOLDEN[f"{e}.{short}"], 1e-4)
        if f"{e}.adapt.grad" in GOLDEN:
            grad = gradient(lambda s: sum(terms(s, "adaptconf", epoch)), s)
            close(grad, GOLDEN[f"{e}.adapt.grad"], 1e-4)


# ---------------------------------------------------------- golden: schedules, images, episodes

def test_golden_rates_and_optimizers():
    for case in cases(r"(lr\d+)\.cfg"):
        epochs, warmup, lr, low, first = GOLDEN[f"{case}.cfg"].tolist()
        ours = [gda_kd.v0_lr(e, int(epochs), lr, low, int(warmup), first)
                for e in range(int(epochs))]
        close(np.array(ours), GOLDEN[f"{case}.per_epoch"], 1e-9)
    net = common.build_model(CONFIG["opt"]["arch"], CONFIG["opt"]["classes"])
    want = GOLDEN["opt.groups"]
    optimizer = gda_kd.v0_optimizer(net, want[0, 3], want[:, 2].max())
    ours = [[len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"], g["lr"],
             g["momentum"], g["nesterov"]] for g in optimizer.param_groups]
    assert np.array_equal(np.array(ours, np.float64), want)


def test_golden_fewshot_rates_and_optimizers():
    for i, preset in enumerate(("fs_classifier", "fs_meta")):
        args, c = parse(f"--preset {preset}"), CONFIG["fs"][f"lr{i}"]
        rates = [args.lr] * args.epochs
        if preset == "fs_classifier":
            rates = [gda_kd.classifier_lr(e, args.epochs, args.lr) for e in range(args.epochs)]
        assert (args.epochs, args.lr) == (c["epochs"], c["lr"])
        close(np.array(rates), GOLDEN[f"fs.lr{i}"], 1e-12)
        group, = gda_kd.plain_optimizer(torch.nn.Linear(2, 2), 0.1, args.weight_decay).param_groups
        assert [group["momentum"], group["weight_decay"], group["nesterov"], 1] == list(
            GOLDEN[f"fs.opt{i}"])


def test_golden_crops():
    """Pillow's, inside: at the edges of a crop it looks at the crop alone, grid_sample does not."""
    x, out = (golden(f"rrc.{key}").permute(0, 3, 1, 2) for key in ("images", "out"))
    top, left, h, w, bicubic, flip = golden("rrc.params").float().T
    for k, (mode, mean, most) in enumerate((("bilinear", 0.5, 1.5), ("bicubic", 6.0, 40.0))):
        mine = bicubic == k
        crops = torch.stack((top, left, h, w))[:, mine]
        ours = 255 * gda_kd.crop_resize(x[mine], crops, flip[mine], x.shape[-1], mode)
        error = (ours - out[mine].float()).abs()[:, :, 4:-4, 4:-4]
        assert error.mean() < mean and error.max() < most, mode
    image = golden("fs.im84").permute(2, 0, 1)[None]
    for key in cases(r"fs\.(im84_crop\d+)"):
        crops, size = golden("fs.im84_crops").float(), int(key[9:])
        x = image.expand(len(crops), -1, -1, -1)
        ours = 255 * gda_kd.crop_resize(x, crops.T, torch.zeros(len(crops)), size, "bilinear")
        error = (ours - golden(f"fs.{key}").permute(0, 3, 1, 2)).abs()[:, :, 3:-3, 3:-3]
        assert error.mean() < 0.5 and error.max() < 2


def test_golden_crop_statistics():
    c, size = CONFIG["rrc"], GOLDEN["rrc.images"].shape[1]
    rng = torch.Generator().manual_seed(0)
    top, left, h, w = gda_kd.draw_crops(c["draws"], size, rng).double()
    area, whole = h * w / size ** 2, ((h == size) & (w == size)).double()
    ours = [h.mean(), w.mean(), area.mean(), area.std(), whole.mean(), (w / h).log().std(),
            top.mean(), left.mean()]
    close_by_column([ours], GOLDEN["rrc.stats"], [0.02] * 4 + [0.4] + [0.02] * 3)
    histogram = np.bincount(h.long(), minlength=len(GOLDEN["rrc.h_hist"])) / c["draws"]
    assert np.abs(histogram - GOLDEN["rrc.h_hist"]).sum() < 0.05
    assert (top + h).max() <= size and (left + w).max() <= size and min(top.min(), left.min()) == 0


def test_golden_views_of_test_images():
    """Pillow rounds after both directions, ours once: a level of 255 at most."""
    x = golden("rrc.images").permute(0, 3, 1, 2)
    want = golden("evaltf.out_chw")
    assert (gda_kd.zoomed(x).int() - want.int()).abs().max() <= 1
    c = CONFIG["evaltf"]
    assert common.NORMS["cifar100_gda"] == (*c["mean"], *c["std"])
    data = common.Data("fake", lambda split: (x, torch.zeros(len(x)), ["a"]), torch.device("cpu"),
                       "cifar100_gda")
    close(data.normalize(want[:len(GOLDEN["evaltf.norm2"])]), GOLDEN["evaltf.norm2"], 1e-6)
    image = golden("fs.im84").permute(2, 0, 1)[None]
    for key in cases(r"fs\.(im84_eval\d+)"):
        ours = gda_kd.resize_centre(image, int(key[9:]), int(key[9:]))[0].permute(1, 2, 0)
        assert (ours.int() - golden(f"fs.{key}").int()).abs().max() <= 1


def test_golden_episodes():
    for case in cases(r"fs\.(sampler\d+)\.cfg"):
        seed, steps, way, per_class, per_step = GOLDEN[f"fs.{case}.cfg"].tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gda_kd, "PER_STEP", per_step)
            rng = np.random.RandomState(seed)
            ours = gda_kd.draw_episodes(GOLDEN["fs.labels"], steps, way, per_class, rng)
        assert np.array_equal(ours, GOLDEN[f"fs.{case}.idx"])
    c, shot, query = CONFIG["fs"]["split"], golden("fs.split.shot"), golden("fs.split.query")
    count = c["episodes"] * c["way"] * (c["shot"] + c["query"])
    items = torch.arange(count * math.prod(shot.shape[3:]), dtype=torch.float32)
    items = items.view(count, *shot.shape[3:])
    ours = gda_kd.split_episodes(items, c["episodes"], c["way"], c["shot"])
    assert torch.equal(ours[0], shot) and torch.equal(ours[1], query)
    labels = gda_kd.query_labels(c["episodes"], c["way"], c["query"])
    assert torch.equal(labels, golden("fs.nk_label"))


def test_golden_episode_logits():
    q, prototypes, tau = golden("fs.q"), golden("fs.proto"), CONFIG["fs"]["tau"]
    shot = prototypes[..., None, :]  # the mean of one shot is the shot
    close(gda_kd.episode_logits(shot, q, tau), GOLDEN["fs.logits.cos"], 1e-5)
    if "fs.logits2d.cos" in GOLDEN:
        close(gda_kd.episode_logits(shot[0], q[0], tau), GOLDEN["fs.logits2d.cos"], 1e-5)
    shot, query = golden("meta.shot").flatten(3), golden("meta.query").flatten(2)
    close(gda_kd.episode_logits(shot, query, CONFIG["meta"]["tau"]), GOLDEN["meta.logits.cos"],
          1e-5)


def test_golden_interval_and_split():
    assert gda_kd.student_t(1) == pytest.approx(12.7062047361747, rel=1e-9)
    half = gda_kd.half_width(GOLDEN["ci.values"])
    assert half == pytest.approx(float(GOLDEN["ci.half_width"]), rel=1e-9)
    base = sorted(set(range(100)) - {*gda_kd.CIFARFS_VAL, *gda_kd.CIFARFS_TEST})
    for name, ours in (("train", base), ("val", gda_kd.CIFARFS_VAL),
                       ("test", gda_kd.CIFARFS_TEST)):
        assert list(ours) == GOLDEN[f"cifarfs.{name}"].tolist()


# ---------------------------------------------------------------- golden: networks, whole steps

def filled(state, rule, prefix=""):
    """Weights made of the key names: rule A of the project, rule B under which inputs matter."""
    out = {}
    for key, value in state.items():
        rng = np.random.RandomState(zlib.crc32((prefix + key).encode()))
        z = 0.05 * rng.standard_normal(value.shape)
        if not value.is_floating_point():
            z = np.zeros(value.shape)
        elif key.endswith("running_var"):
            z = np.abs(z) + 0.5
        elif rule == "B" and value.ndim >= 2:
            z = z / 0.05 / np.sqrt(np.prod(value.shape[1:]))
        elif rule == "B" and key.endswith("weight"):
            z = 1 + z
        out[key] = torch.from_numpy(np.asarray(z)).to(value.dtype)
    return out


def golden_net(name, classes):
    """Filled under its official keys and read as a published file is."""
    short = name.replace("wrn_", "wrn").replace("cifar_resnet50", "resnet50")
    net = common.build_model(short, classes)
    state = net.state_dict()
    if "layer4.0.conv1.weight" in state:
        net.load_state_dict(filled(state, "B"))
        return net
    state = {re.sub(r"^linear\.", "fc.", key.replace(".shortcut.", ".downsample.")): value
             for key, value in state.items()}
    net.load_state_dict(common.find_weights(filled(state, "B")))
    return net


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIG["fsnet"]["names"])
def test_golden_fewshot_network(name):
    x, net = golden(f"fsnet.{name}.x"), common.build_model(name, 3)
    state = {key: v for key, v in net.state_dict().items() if not key.startswith("linear.")}
    keys = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert keys == str(GOLDEN[f"fsnet.{name}.keys"])
    params = sum(p.numel() for key, p in net.named_parameters() if key in state)
    assert params == int(GOLDEN[f"fsnet.{name}.nparams"])
    for rule in cases(rf"fsnet\.{name}\.([AB])\.eval"):
        net.load_state_dict({**net.state_dict(), **filled(state, rule)})
        for mode in cases(rf"fsnet\.{name}\.{rule}\.(eval|train)"):
            with torch.no_grad():
                _, features = common.with_features(net.train(mode == "train"), x)
            close(features, GOLDEN[f"fsnet.{name}.{rule}.{mode}"], 1e-4)


def sums(params, buffers):
    """Sums of p, |p|, p^2, running means and running variances, in float64."""
    p = torch.cat([value.detach().double().flatten() for value in params])
    buffers = dict(buffers)
    statistics = [sum(b.double().sum() for key, b in buffers.items() if key.endswith(end))
                  for end in ("running_mean", "running_var")]
    return [p.sum(), p.abs().sum(), (p * p).sum(), *statistics]


def move(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def walk(c, net, optimizer, step, params):
    """(losses, checks): step(k) -> (loss, what stands beside it), then the net moves."""
    losses, checks = [], []
    for k in range(c["steps"]):
        loss, row = step(k)
        move(optimizer, loss)
        losses.append([loss, *row()])
        checks.append(sums(params, net.named_buffers()))
    return losses, checks


def drawn_images(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("distiller", cases(r"step\.(\w+)\.losses"))
def test_golden_step(distiller):
    c, (seed, batch, lr, epoch) = CONFIG["step"], GOLDEN["step.cfg"].tolist()
    student = golden_net(c["student"], c["classes"]).train()
    teacher = golden_net(c["teacher"], c["classes"]).eval().requires_grad_(False)
    args = distiller_args(distiller, c["preset"], batch, c)
    optimizer = gda_kd.v0_optimizer(student, lr, c["weight_decay"])

    def step(k):
        nonlocal s
        rng = np.random.RandomState(int(seed) + k)
        x = drawn_images(rng, int(batch), 3, 32, 32)
        y = torch.from_numpy(rng.randint(0, c["classes"], int(batch)))
        s = student(x)
        loss, terms = gda_kd.classification_loss(s[None], teacher(x)[None], y, int(epoch), args)
        return loss, lambda: weighted(terms, args)

    s = None
    losses, checks = walk(c, student, optimizer, step, [*student.parameters()])
    key = f"step.{distiller}"
    close_by_column(losses, GOLDEN[f"{key}.losses"], 1e-3)
    close_by_column(checks, GOLDEN[f"{key}.checks"], [1e-3, 3e-5, 3e-5, 1e-3, 1e-3])
    rows, columns = GOLDEN[f"{key}.fc_weight"].shape
    close(student.linear.weight[:rows, :columns], GOLDEN[f"{key}.fc_weight"], 2e-3)
    close(s, GOLDEN[f"{key}.logits_last"], 5e-3)


@pytest.fixture
def small_learner(monkeypatch, tmp_path):
    """Learners of the golden steps, read from a file as the published project writes it."""
    def make(blocks, widths, classes, meta):
        monkeypatch.setitem(common.MODELS, "small", lambda num_classes: gda_kd.FewShotResNet(
            blocks, widths, num_classes))
        learner = gda_kd.Learner("small", classes, 32)
        state = learner.encoder.state_dict()
        if meta:
            state = {k: v for k, v in state.items() if not k.startswith("linear.")}
            state = {f"encoder.{k}": v for k, v in filled(state, "B").items()}
        else:
            state = {f"encoder.{k}": v for k, v in state.items()}
            state = filled({k.replace("encoder.linear.", "classifier.linear."): v
                            for k, v in state.items()}, "B")
        torch.save({"model": "x", "model_args": {}, "model_sd": state, "training": {"epoch": 3}},
                   tmp_path / "small.pth")
        gda_kd.load_learner(learner, tmp_path / "small.pth")
        return learner
    return make


@pytest.mark.parametrize("loss_name", cases(r"fsstep\.(\w+)\.losses"))
def test_golden_classifier_step(loss_name, small_learner):
    c, (seed, lr, T, theta) = CONFIG["fsstep"], GOLDEN["fsstep.cfg"].tolist()
    student = small_learner(c["student_blocks"], c["widths"], c["classes"], meta=False).train()
    teacher = small_learner(c["teacher_blocks"], c["widths"], c["classes"], meta=False).eval()
    args = fewshot_args(loss_name.replace("_", ""), {**c, "T": T, "threshold": theta})
    optimizer = gda_kd.plain_optimizer(student, lr, c["weight_decay"])

    def step(k):
        rng = np.random.RandomState(int(seed) + k)
        x = drawn_images(rng, c["batch"], 3, c["size"], c["size"])
        y = torch.from_numpy(rng.randint(0, c["classes"], c["batch"]))
        epoch = c["first_epoch"] + k - 1
        t = teacher.encoder(x).detach()
        loss, terms = gda_kd.fewshot_loss(student.encoder(x), t, y, epoch, args)
        return loss, lambda: [terms["ce"], terms["kd"], terms["align"]]

    losses, checks = walk(c, student, optimizer, step, [*student.encoder.parameters()])
    key = f"fsstep.{loss_name}"
    close_by_column(losses, GOLDEN[f"{key}.losses"], 1e-3)
    close_by_column(checks, GOLDEN[f"{key}.checks"], 1e-3)
    rows, columns = GOLDEN[f"{key}.linear"].shape
    close(student.encoder.linear.weight[:rows, :columns], GOLDEN[f"{key}.linear"], 1e-3)


def test_golden_meta_step(small_learner):
    c, (seed, shots, lr, T) = CONFIG["metastep"], GOLDEN["metastep.cfg"].tolist()
    student = small_learner(c["student_blocks"], c["widths"], 3, meta=True).train()
    teacher = small_learner(c["teacher_blocks"], c["widths"], 3, meta=True).eval()
    args = fewshot_args("kd", {**c, "T": T, "threshold": 1.0})
    optimizer = gda_kd.plain_optimizer(student, lr, c["weight_decay"])
    y = gda_kd.query_labels(c["episodes"], c["way"], c["query"])
    images = c["episodes"] * c["way"] * (c["shot"] + c["query"])

    def logits(learner, x, tau):
        split = gda_kd.split_episodes(learner(x), c["episodes"], c["way"], int(shots))
        return gda_kd.episode_logits(*split, tau).flatten(0, 1)

    def step(k):
        nonlocal s
        rng = np.random.RandomState(int(seed) + k)
        x = drawn_images(rng, images, 3, c["size"], c["size"])
        s, t = logits(student, x, student.temp), logits(teacher, x, c["tau"]).detach()
        loss, terms = gda_kd.fewshot_loss(s, t, y, c["first_epoch"] + k - 1, args)
        return loss, lambda: [terms["ce"], terms["kd"], student.temp.item() - c["tau"]]

    s = None
    params = [p for name, p in student.named_parameters() if "linear" not in name]
    losses, checks = walk(c, student, optimizer, step, params)
    want = GOLDEN["metastep.losses"].copy()
    want[:, -1] -= c["tau"]
    close_by_column(losses, want, [1e-3, 1e-3, 1e-3, 1e-2])
    close_by_column(checks, GOLDEN["metastep.checks"], 1e-3)
    close(s, GOLDEN["metastep.logits_last"], 1e-3)


# ---------------------------------------------------------- what was corrected, by other formulas

def parse(line):
    return common.parse_args(Args, gda_kd.PRESETS, line.split())


ROWS = (  # typed from the published configurations: command line, names and values
    ("", """dataset cifar100 teacher resnet56 student resnet20 distiller kd gda True recipe v0
        gt_loss_weight 2.0 kd_loss_weight 1.0 T 4.0 fisher_rao_lamda 0.02 sinkhorn_lamda 0.1
        epochs 240 batch_size 128 virtual_gpus 6 lr 0.2 weight_decay 0.0005 norm cifar100_gda
        amp none task classify"""),
    ("--preset adaptconf --teacher resnet20 --student resnet56", """distiller adaptconf gda False
        recipe v0 batch_size 64 virtual_gpus 8 gt_loss_weight 1.0 kd_loss_weight 0.5 T 1.0
        superalignment_rate 0.3 superalignment_threshold 0.5 norm cifar100_gda epochs 240
        lr 0.2"""),
    ("--preset native_kd --teacher wrn40_2 --student wrn16_2", """distiller kd gda False
        recipe native gt_loss_weight 0.1 kd_loss_weight 0.9 T 4.0 batch_size 64 virtual_gpus 1
        lr 0.05 weight_decay 0.0005 epochs 240 norm auto"""),
    ("--preset native_dkd", """distiller dkd gda False recipe native gt_loss_weight 1.0
        kd_loss_weight 1.0 T 4.0 dkd_alpha 1.0 dkd_beta 2.0 dkd_warmup 20 batch_size 64
        virtual_gpus 1 lr 0.05"""),
    ("--preset native_dkd --teacher resnet32x4 --student resnet8x4", "dkd_beta 8.0"),
    ("--preset native_dkd --teacher vgg13 --student vgg8", "dkd_beta 6.0"),
    ("--preset native_dkd --teacher wrn40_2 --student wrn16_2 --gda",
        "dkd_beta 6.0 gda True fisher_rao_lamda 0.02 sinkhorn_lamda 0.1"),
    ("--preset native_zscore --teacher resnet32x4 --student resnet8x4",
        "distiller kd zscore True gda False gt_loss_weight 0.1 kd_loss_weight 9.0 T 2.0"),
    ("--preset fs_classifier --teacher resnet12_bottle", """task fs_classifier dataset mini
        student resnet36_bottle distiller kd T 1.0 kd_loss_weight 1.0 fisher_rao_lamda 0.1
        sinkhorn_lamda 0.0008 epochs 100 lr 0.1 batch_size 32 virtual_gpus 4
        weight_decay 0.0005"""),
    ("--preset fs_meta", """task fs_meta dataset mini teacher resnet12_bottle
        student resnet36_bottle T 1.0 fisher_rao_lamda 0.1 sinkhorn_lamda 0.1 epochs 20
        episodes 800 lr 0.001 virtual_gpus 2 way 5 query 15 fs_shots (1,5)
        classifier_epochs 100 amp auto"""),
    ("--preset fs_adaptconf", """distiller adaptconf gda False superalignment_threshold 8.0
        superalignment_rate 0.25"""),
    # how the published code spells its flags
    ("--model resnet8 --kd-temperature 3 --sinkhorn_lambda 0.3 --fisher-rao-lamda 0.4",
        "student resnet8 T 3.0 sinkhorn_lamda 0.3 fisher_rao_lamda 0.4"),
    ("--preset fs_test --res_type resnet12_bottle --shot 5 --student_ckpt x.pt",
        "task fs_test student resnet12_bottle fs_shots (5,)"),
)


@pytest.mark.parametrize("line, values", ROWS)
def test_published_rows(line, values):
    args, words = parse(line), values.split()
    for name, value in zip(words[::2], words[1::2]):
        assert str(getattr(args, name)).replace(" ", "") == value, name
    assert {args.teacher, args.student} <= common.MODELS.keys()


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dkd_rises_with_its_warmup_and_zscore_standardises_both_sides():
    s, t, y = logits(12, 10), logits(12, 10, seed=1), torch.arange(12) % 10

    def taught(line, epoch=0):
        _, terms = gda_kd.classification_loss(s[None], t[None], y, epoch, parse(line))
        return terms["kd"]

    full = gda_kd.dkd_loss(s, t, y, 1.0, 2.0, 4.0)
    for epoch, share in ((0, 0.05), (9, 0.5), (19, 1.0), (200, 1.0)):  # epoch 1, 10, 20 and later
        close(taught("--preset native_dkd", epoch), share * full, 1e-6)

    p, q = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (s, t))
    kl = F.kl_div((p / 2).log_softmax(1), (q / 2).softmax(1), reduction="batchmean")
    close(taught("--preset native_zscore"), 9 * 4 * kl, 1e-5)


def test_weight_of_transport_does_not_depend_on_the_groups_size():
    """D2: twice each image makes the same distribution, and the same loss; groups are averaged."""
    s, t, y = logits(1, 32, 10), logits(1, 32, 10, seed=1), torch.arange(32) % 10
    args = parse("")
    one, terms = gda_kd.classification_loss(s, t, y, 0, args)
    two, _ = gda_kd.classification_loss(s.repeat(1, 2, 1), t.repeat(1, 2, 1), y.repeat(2), 0, args)
    close(two, one, 1e-4)
    off, _ = gda_kd.classification_loss(s, t, y, 0, parse("--no_gda"))
    close(one - off, 0.02 * terms["fr"] + 0.1 * terms["sk"], 1e-4)
    s, t = logits(3, 24, 10), logits(3, 24, 10, seed=1)
    alone = [gda_kd.sinkhorn_loss(s[g], t[g]) for g in range(3)]
    close(gda_kd.sinkhorn_loss(s, t), sum(alone) / 3, 1e-6)


@pytest.mark.parametrize("s, t", (
    (logits(16, 10), logits(16, 10)), (torch.ones(16, 10), logits(16, 10)),
    (1e3 * logits(16, 10), 1e3 * logits(16, 10, seed=1))))
def test_equal_constant_and_huge_logits_have_finite_gradients(s, t):
    y = torch.arange(16) % 10
    for distiller in gda_kd.DISTILLERS:
        args = Args(distiller=distiller)
        for f in (lambda x: gda_kd.classification_loss(x[None], t[None], y, 1, args)[0],
                  lambda x: gda_kd.fewshot_loss(x, t, y, 1, args)[0]):
            assert torch.isfinite(gradient(f, s)).all(), distiller


def test_groups_in_one_pass_are_as_many_networks():
    """Each group's own batch statistics; running statistics: the mean over such networks."""
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = common.build_model("resnet8", 4)
    state = {key: value.clone() for key, value in together.state_dict().items()}
    gda_kd.split_batch_norms(together, 3)
    out, alone = together(x), []
    for g, part in enumerate(x.chunk(3)):
        net = common.build_model("resnet8", 4)
        net.load_state_dict(state)
        close(out[8 * g:8 * g + 8], net(part).detach(), 1e-5)
        alone.append(net.state_dict())
    for key, value in together.state_dict().items():
        if "running" in key:
            close(value, sum(s[key] for s in alone) / 3, 1e-5)
    together.eval()
    net.load_state_dict(together.state_dict())
    close(together(x), net.eval()(x).detach(), 1e-6)


def test_native_rates():
    rates = [gda_kd.native_lr(e, 240, 0.05) for e in (0, 149, 150, 180, 210, 239)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-4, 5e-5, 5e-5])
    assert gda_kd.v0_lr(0, 3, 0.2) == pytest.approx(0.2)  # too short for a warm-up


# --------------------------------------------------------------------------------------- runs

@pytest.fixture
def script(tmp_path, monkeypatch, data_dir):
    """script("--epochs", "3") in a folder of its own; the exit code, or 0."""
    monkeypatch.chdir(tmp_path)

    def go(*words):
        words = [*words, "--data_dir", str(data_dir), "--device", "cpu"]
        try:
            gda_kd.main(common.parse_args(Args, gda_kd.PRESETS, words))
        except SystemExit as e:
            return e.code
        return 0
    return go


RUNS = {
    "v0": ["--smoke"],
    "native": ["--smoke", "--recipe", "native", "--virtual_gpus", "1", "--distiller", "dkd"],
    "classifier": ["--preset", "fs_classifier", "--smoke", "--distiller", "augconf"],
    "meta": ["--preset", "fs_meta", "--smoke"],
}


@pytest.mark.parametrize("name", (
    "meta", *(pytest.param(name, marks=pytest.mark.slow) for name in ("native", "classifier"))))
def test_a_stopped_run_resumes_bit_equal(name, script, monkeypatch):
    flags = [*RUNS[name], "--save_every", "1", "--eval_every", "2"]
    script(*flags, "--run_name", "a")
    end_epoch = common.Run.end_epoch

    def stop_after_the_first(self, epoch, top1=None):
        end_epoch(self, epoch, top1)
        if epoch == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_epoch", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            script(*flags, "--run_name", "b")
    script("--resume", "runs/b")
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    if name == "native":  # 300 images: the last, smaller batch of 64 too
        assert len([row for row in metrics("runs/a") if "loss" in row]) == 2 * 5


def test_smoke(script):
    assert script(*RUNS["v0"], "--run_name", "a") == 0
    first, row = metrics("runs/a")[0], result("runs/a")[0]
    assert {"loss", "ce", "kd", "align", "fr", "sk", "lr"} <= first.keys()
    close(np.array(first["loss"]), 2 * first["ce"] + first["kd"], 1e-6)
    assert row["real_images"] == 300 and {"native_top1", "agree1", "teacher_top1"} <= row.keys()
    config = json.loads(Path("runs/a/config.json").read_text())
    assert (config["groups"], config["images_of_a_group"]) == (2, 64)
    net, arch, _ = common.load_model("runs/a/student.pt", "", 10)
    assert arch == "resnet8"


def test_fewshot_smoke(script, capsys):
    assert script(*RUNS["meta"], "--fs_shots", "1", "2", "--run_name", "a") == 0
    rows, row = metrics("runs/a"), result("runs/a")[0]
    assert {"loss", "ce", "kd", "fr", "sk", "tau"} <= rows[0].keys() and "val_top1" in rows[-1]
    assert row["last"] == row["few_shot"]["1"][0] and set(row["few_shot"]) == {"1", "2"}
    assert row["few_shot"]["2"][1] > 0 and row["teacher_top1"] > 0
    capsys.readouterr()
    assert script("--preset", "fs_test", "--smoke", "--student_ckpt", "runs/a/student.pt") == 0
    assert f"1-shot {row['last']:.2f} +-" in capsys.readouterr().out


def test_no_wait_for_the_device_inside_a_step():
    """A v0 step and a meta step as the loops take them."""
    data = common.load_data(parse("--dataset shapes"), torch.device("cpu"))
    student = common.build_model("resnet8", 10).train()
    gda_kd.split_batch_norms(student, 2)
    optimizer = gda_kd.v0_optimizer(student, 0.1, 5e-4)
    rng = torch.Generator().manual_seed(0)
    images, y, t = data.test_x[:16], data.test_y[:16], logits(2, 8, 10)
    drawn = torch.arange(4 * 2 * 2)
    with host_syncs() as syncs:
        for distiller in gda_kd.DISTILLERS:
            x = gda_kd.random_crops(images, 32, rng, gda_kd.V0_MODES)
            s = student(data.normalize(x)).unflatten(0, (2, -1))
            loss, _ = gda_kd.classification_loss(s, t, y, 0, Args(distiller=distiller))
            move(optimizer, loss)
            split = gda_kd.split_episodes(student(data.normalize(images[drawn])), 4, 2, 1)
            s = gda_kd.episode_logits(*split, 10.0).flatten(0, 1)
            args = Args(distiller=distiller)
            loss, _ = gda_kd.fewshot_loss(s, s.detach() + 1, y[:8] % 2, 0, args)
            move(optimizer, loss)
    assert syncs == []


# ------------------------------------------------------------------------- data, files, mistakes

def test_cifarfs_holds_the_classes_of_its_split(tmp_path):
    """Images whose grey is their class: in each part they are where the split says."""
    folder = tmp_path / "cifar100"
    folder.mkdir()
    for split, each in (("train", 3), ("test", 2)):
        y = np.repeat(np.arange(100), each)
        x = np.broadcast_to(y[:, None, None, None], (len(y), 32, 32, 3)).astype(np.uint8)
        np.savez(folder / f"{split}.npz", x=x, y=y)
    args = parse(f"--preset fs_meta --dataset cifarfs --data_dir {tmp_path} --query 1 --shot 1")
    data, val, new = gda_kd.load_fewshot(args, torch.device("cpu"))
    base = [c for c in range(100) if c not in gda_kd.CIFARFS_VAL + gda_kd.CIFARFS_TEST]
    for (x, y), classes, each in ((data.train, base, 3), (val, gda_kd.CIFARFS_VAL, 5),
                                  ((data.test_x, data.test_y), base, 2),
                                  (new, gda_kd.CIFARFS_TEST, 5)):
        assert len(x) == each * len(classes)
        assert torch.equal(torch.tensor(classes)[y], x[:, 0, 0, 0].long())


def test_mini_imagenet_is_read_and_its_pickles_run_no_code(capfd, tmp_path):
    folder = tmp_path / "mini_imagenet"
    folder.mkdir()
    firsts = dict(train_phase_train=0, train_phase_test=0, val=64, test=80)  # labels begin there
    x = np.random.RandomState(0).randint(0, 256, (25, 84, 84, 3), np.uint8)
    for name, first in firsts.items():
        labels = [first + i // 5 for i in range(25)]
        with open(folder / f"miniImageNet_category_split_{name}.pickle", "wb") as f:
            pickle.dump({"data": x, "labels": labels}, f, protocol=2)  # as Python 2 wrote them
    args = parse(f"--preset fs_meta --data_dir {tmp_path} --query 3 --shot 1")
    data, _, new = gda_kd.load_fewshot(args, torch.device("cpu"))
    assert data.train_x.shape == (25, 3, 84, 84) and data.test_x.shape == (25, 3, 80, 80)
    assert (data.image_size, data.num_classes, data.norm) == (80, 5, "imagenet")
    want = gda_kd.resize_centre(torch.from_numpy(x).permute(0, 3, 1, 2), 80, 80)
    assert torch.equal(new[0], want) and new[1].tolist() == [i // 5 for i in range(25)]

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    file = folder / "miniImageNet_category_split_test.pickle"
    file.write_bytes(pickle.dumps({"data": Evil(), "labels": [0]}))
    with pytest.raises(SystemExit):
        gda_kd.load_fewshot(args, torch.device("cpu"))
    assert "asks for posix.system" in capfd.readouterr().err and not (tmp_path / "ran").exists()


BAD = {
    "devices": ("--gpu 0,1", "--virtual_gpus"),
    "zscore of another loss": ("--zscore --distiller dkd", "--distiller kd"),
    "few-shot of another set": ("--preset fs_meta --dataset cifar10", "mini, cifarfs or shapes"),
    "no pickles": ("--preset fs_meta", "--dataset cifarfs"),
    "way too large": ("--preset fs_meta --smoke --way 6", "--way 6"),
    "file of another net": ("--preset fs_test --smoke --student_ckpt bad.pt", "does not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_with_a_sentence(name, script, capfd):
    torch.save(gda_kd.Learner("resnet12_thin", 5, 32).state_dict(), "bad.pt")
    line, words = BAD[name]
    assert script(*line.split()) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and "\n" not in err and not Path("runs").exists()


def test_too_many_processes(monkeypatch, capfd):
    for name, value in dict(WORLD_SIZE="4", RANK="0", LOCAL_RANK="0", MASTER_ADDR="x").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        gda_kd.start_processes(Args())
    assert "--virtual_gpus 6" in capfd.readouterr().err


@pytest.mark.slow
def test_processes_compute_what_groups_compute(script, data_dir):
    """A step of four groups in one process, and in two processes of torchrun."""
    flags = [*RUNS["v0"], "--virtual_gpus", "4", "--batch_size", "16", "--limit_train", "70",
             "--epochs", "1"]
    script(*flags, "--run_name", "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         "--master_port", "29617", gda_kd.__file__, *flags, "--run_name", "two", "--device", "cpu",
         "--data_dir", str(data_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(f"runs/{name}/student.pt", weights_only=True) for name in ("one", "two"))
    assert all((two[key] - one[key]).abs().max() < 1e-5 for key in one)
    assert len(metrics("runs/one")) == len(metrics("runs/two"))


def test_a_plan_carries_all_mass_and_groups_are_averaged():
    s, t = logits(3, 24, 10), logits(3, 24, 10, seed=1)
    P = gda_kd.transport_plan(gda_kd.cost_matrix(s, t))
    close(P.sum(1), np.ones((3, 24)), 1e-6)  # columns were scaled last
    alone = [gda_kd.sinkhorn_loss(s[g], t[g]) for g in range(3)]
    close(gda_kd.sinkhorn_loss(s, t), sum(alone) / 3, 1e-6)


def test_the_last_smaller_batch_counts_in_native_only(script):
    """300 images: five batches of 64 (native), two of 2 x 64 (v0)."""
    for name, steps in (("native", 5), ("v0", 2)):
        script(*RUNS[name], "--epochs", "1", "--run_name", name)
        assert len([row for row in metrics(f"runs/{name}") if "loss" in row]) == steps


def test_meta_starts_from_the_plain_classifier_and_leaves_the_teacher_alone(script, data_dir):
    script(*RUNS["meta"], "--lr", "0", "--run_name", "a")
    path, = Path(data_dir, "teachers").glob("shapes_resnet8_classifier_1_epochs_of_300.pt")
    before = torch.load(path, weights_only=True)
    after = torch.load("runs/a/student.pt", weights_only=True)
    assert all(torch.equal(before[key], after[key]) for key in before if "running" not in key)


def test_a_stray_rank_is_ignored(monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    assert gda_kd.start_processes(Args()) == (0, 1)
