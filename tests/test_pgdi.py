"""Tests of pgdi.py. Golden tests (test_golden_*) read GOLDEN_DIR/pgdi.npz and take all sizes and cases from it."""
import dataclasses
import itertools
import json
import math
import re
import zlib
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import adadfkd
import akd_gan
import common
import kill
import pgdi
from tools import ROOT, close, host_syncs, load_golden, metrics

GOLDEN, CONFIG = load_golden("pgdi")
READ = (r"config", r"kldiv/(s|t|T|batchmean|sum|rows|grad_s)", r"adv/(s|t|mask|loss|grad_s)",
        r"bnhook/(x|running_mean|running_var|(plain|mmt)_(r|grad_last)|mmt_(mean|var))",
        r"feat/(x_seed|x_shape|\w+/(all_conv|bn_hooks)(_order)?)",
        r"mmd/\w+/(X|Y|(mmd|l2_min|l2_mean)(_grad_X)?|kernel_sums)",
        r"fg/(gen|targets|fs_feat|fs_labels|mmd|l2_min|l2_mean)", r"lg/(fs_)?(logits|labels)", r"lg/targets",
        r"lg/\w+/(total|kl|l2|grad)", r"sched/epochs", r"sched/\w+/(config|(cosine|linear|none)_(alpha|nreal))",
        r"sched/lr_[\w.]+", r"fewshot/(labels|seed|shots|indices|out_labels|pixel0)",
        r"sampler/\w+/(labels|batch_size|seed|len|pass1|pass2)",
        r"gen/\d+/(nz_ngf|z|keys|nparams|[AB]/(img_eval|img_train|running_var_after))",
        r"net/(x\d+_seed|batch|\w+/(keys|nparams|[AB]/(logits|feat|logits_train)))",
        r"aug/(x_seed|batch|offset_yx|flip|out)", r"pool/(x|u8)", r"eval/(logits|targets|top1_top5|loss)",
        r"best/(totals|winner)",
        r"synth(grad)?/(losses|generator_sum_abssum|generator_last|bn_mmt|best_channel_mean|losses_float32)",
        r"synth/(config|columns|fewshot_seed|z_seed0|target_seed0|feature_term_changes_generator)",
        r"kd/(config|x_seed0|fewshot_seed|np_seed|real_indices|loss_total|loss_synth_real|state_sum_abssum|state_keys)",
        r"kd/(fc_weight|bn1_running_(mean|var)|loss_(total|synth_real)_float32)")


def bn_statistics(teacher):
    return pgdi.BNStatistics(pgdi.bn_order(teacher, torch.zeros(2, 3, 32, 32)))


def arr(key):
    return GOLDEN[key]


def tensor(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def lines(key):
    return str(GOLDEN[key]).split("\n")


def rn(seed, shape):
    x = np.random.RandomState(int(seed)).standard_normal([int(n) for n in shape])
    return torch.from_numpy(x.astype(np.float32))


def cases(pattern):
    return sorted({m[1] for key in GOLDEN.files if (m := re.match(pattern, key))})


def fill(net, rule="B", salt=""):
    state = {}
    for key, value in net.state_dict().items():
        shape, g = value.shape, np.random.RandomState(zlib.crc32(((salt if rule == "B" else "") + key).encode()))
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        n = g.standard_normal(shape)
        if rule == "A":
            n = np.abs(0.05 * n) + 0.5 if key.endswith("running_var") else 0.05 * n
        elif key.endswith("running_var"):
            n = 0.5 + np.abs(n)
        elif len(shape) >= 2:
            n = n * np.sqrt(2 / np.prod(shape[1:]))
        else:
            n = 1 + 0.1 * n if key.endswith(".weight") else 0.1 * n
        state[key] = torch.from_numpy(np.asarray(n, np.float32))
    net.load_state_dict(state)
    return net


def keys_of(net):
    return [f"{k} {tuple(v.shape)}" for k, v in net.state_dict().items()]


def few(feat, labels, classes, logits=None):
    return pgdi.Shots(feat, torch.zeros(len(feat), 1) if logits is None else logits, labels, classes)


# ------------------------------------------------------------------------------------------------------ golden numbers

def test_golden_every_key_is_read():
    assert not [k for k in GOLDEN.files if not any(re.fullmatch(p, k) for p in READ)]


def test_golden_kl():
    s, t = tensor("kldiv/s").requires_grad_(), tensor("kldiv/t")
    for i, T in enumerate(arr("kldiv/T")):
        rows = pgdi.kl_rows(s, t, float(T))
        close(rows, arr("kldiv/rows")[i], 1e-5)
        close(rows.sum(), arr("kldiv/sum")[i], 1e-5)
        total, pool, real = pgdi.kd_loss(s, t, 0, 0.0, float(T))
        close(total, arr("kldiv/batchmean")[i], 1e-5)
        assert pool == total and real == 0
        close(torch.autograd.grad(total, s)[0], arr("kldiv/grad_s")[i], 1e-5)


def test_golden_adversarial_term():
    s, t = tensor("adv/s").requires_grad_(), tensor("adv/t").requires_grad_()
    loss = pgdi.adv_loss(s, t)
    close(loss, arr("adv/loss"), 1e-5)
    assert np.array_equal((s.argmax(1) == t.argmax(1)).float(), arr("adv/mask"))
    close(torch.autograd.grad(loss, s)[0], arr("adv/grad_s"), 1e-5)
    assert not pgdi.adv_loss(s.detach(), t).requires_grad and pgdi.adv_loss(s.detach(), t, "both").requires_grad


@pytest.mark.parametrize("kind", ("plain", "mmt"))
def test_golden_bn_term(kind):
    bn = nn.BatchNorm2d(arr("bnhook/x").shape[2]).eval()
    bn.running_mean.copy_(tensor("bnhook/running_mean"))
    bn.running_var.copy_(tensor("bnhook/running_var"))
    statistics, mmt = pgdi.BNStatistics([bn]), CONFIG["bnhook"]["momentum"] if kind == "mmt" else 0.0
    values = []
    for x in tensor("bnhook/x"):
        x.requires_grad_()
        with pgdi.tapped(bn, "none") as taps:
            bn(x)
        now = taps["bn"][0]
        loss = pgdi.bn_loss(statistics.blend(now, mmt), statistics.running, statistics.sizes)
        values.append(loss.item())
        statistics.update(now.detach(), mmt)
    close(values, arr(f"bnhook/{kind}_r"), 1e-5)
    close(torch.autograd.grad(loss, x)[0], arr(f"bnhook/{kind}_grad_last"), 1e-5)
    if mmt:
        close(statistics.average[0], arr("bnhook/mmt_mean"), 1e-5)
        close(statistics.average[1], arr("bnhook/mmt_var"), 1e-5)
    else:
        assert statistics.average is None


@pytest.mark.parametrize("case", cases(r"feat/(\w+/(?:all_conv|bn_hooks))$"))
def test_golden_features(case):
    name, source = case.split("/")
    c = CONFIG["feat"]
    net = fill(common.build_model(name, c["classes"], int(arr("feat/x_shape")[-1])), c["rule"], c["salt"]).eval()
    with torch.no_grad(), pgdi.tapped(net, source) as taps:
        net(rn(arr("feat/x_seed"), arr("feat/x_shape")))
    close(torch.cat(taps["feat"], 1), arr(f"feat/{case}"), 1e-4)
    kind = nn.Conv2d if source == "all_conv" else nn.BatchNorm2d
    ours = [n.replace("shortcut", "downsample") for n, m in net.named_modules() if isinstance(m, kind)]
    assert ours == [n.replace("shortcut", "downsample") for n in lines(f"feat/{case}_order")]


@pytest.mark.parametrize("kind", ("mmd", "l2_min", "l2_mean"))
@pytest.mark.parametrize("case", cases(r"mmd/(\w+)/X"))
def test_golden_class_distance(case, kind):
    x, y = tensor(f"mmd/{case}/X").requires_grad_(), tensor(f"mmd/{case}/Y")
    shots, targets = few(y, torch.zeros(len(y), dtype=torch.long), 1), torch.zeros(len(x), dtype=torch.long)
    loss = pgdi.feature_prior(x, targets, shots, kind)
    close(loss, arr(f"mmd/{case}/{kind}"), 1e-3 if case == "wide" else 1e-4)
    grad, ref = torch.autograd.grad(loss, x)[0], arr(f"mmd/{case}/{kind}_grad_X")
    close(grad, ref, 1e-3 if case == "wide" else 1e-4)
    if kind == "mmd":
        sums = pgdi.kernel_sums(x, targets, torch.ones(len(x), 1), shots)
        close(torch.stack([sums[0][0], shots.syy[0], sums[1][0]]), arr(f"mmd/{case}/kernel_sums"), 1e-4)


@pytest.mark.parametrize("kind", ("mmd", "l2_min", "l2_mean"))
def test_golden_feature_prior(kind):
    shots = few(tensor("fg/fs_feat"), tensor("fg/fs_labels"), CONFIG["fg"]["classes"])
    close(pgdi.feature_prior(tensor("fg/gen"), tensor("fg/targets"), shots, kind), arr(f"fg/{kind}"), 1e-5)


@pytest.mark.parametrize("kind", cases(r"lg/(\w+)/total"))
def test_golden_logits_prior(kind):
    c, logits = CONFIG["lg"], tensor("lg/logits").requires_grad_()
    real = tensor("lg/fs_logits")
    shots = few(torch.zeros(len(real), 1), tensor("lg/fs_labels"), c["classes"], real)
    total, kl, l2 = pgdi.logits_prior(logits, tensor("lg/targets"), shots, kind, c["T"], c["alpha"])
    for name, value in (("total", total), ("kl", kl), ("l2", l2)):
        close(value, arr(f"lg/{kind}/{name}"), 1e-5)
    close(torch.autograd.grad(total, logits)[0], arr(f"lg/{kind}/grad"), 1e-5)


@pytest.mark.parametrize("mode", ("cosine", "linear", "none"))
@pytest.mark.parametrize("case", CONFIG["sched"]["cases"])
def test_golden_curriculum(case, mode):
    c = CONFIG["sched"]["cases"][case]
    args = pgdi.Args(alpha_schedule=mode, real_fewshot_schedule=mode, **{k: v for k, v in c.items() if k != "num_real"})
    assert json.loads(str(arr(f"sched/{case}/config"))).items() <= c.items()
    alpha, n_real = zip(*(pgdi.mixture_at(int(e), args, c["num_real"]) for e in arr("sched/epochs")))
    assert np.abs(np.array(alpha) - arr(f"sched/{case}/{mode}_alpha")).max() <= 1e-12
    assert list(n_real) == arr(f"sched/{case}/{mode}_nreal").tolist()


@pytest.mark.parametrize("case", CONFIG["sched"]["lr"])
def test_golden_learning_rate(case):
    c = CONFIG["sched"]["lr"][case]
    recipe = pgdi.lr_recipe(pgdi.Args(lr=c["base"], lr_tmax=c["T_max"]))
    assert recipe["eta_min"] == c["eta_min"]
    ours = np.array([common.lr_at(recipe, max(0, e - c["warmup"])) for e in range(c["epochs"])])
    assert np.abs(ours - arr(f"sched/{case}")).max() <= 1e-9


def test_golden_few_shot():
    labels = arr("fewshot/labels")
    index = np.arange(len(labels))
    x = np.zeros((len(labels), 3, 4, 4), np.uint8)
    x[:, 0], x[:, 1] = (index % 256)[:, None, None], (index // 256)[:, None, None]
    classes = [str(c) for c in range(CONFIG["fewshot"]["classes"])]
    data = common.Data("own", lambda split: (x, labels, classes), norm=CONFIG["fewshot"]["norm"])
    shots, y, chosen = data.few_shot(int(arr("fewshot/shots")), "pgdi", int(arr("fewshot/seed")))
    assert np.array_equal(chosen, arr("fewshot/indices")) and np.array_equal(y, arr("fewshot/out_labels"))
    assert np.abs(data.normalize(shots)[:, :, 0, 0].numpy() - arr("fewshot/pixel0")).max() <= 1e-6


@pytest.mark.parametrize("case", cases(r"sampler/(\w+)/labels"))
def test_golden_balanced_sampler(case):
    labels, size = arr(f"sampler/{case}/labels"), int(arr(f"sampler/{case}/batch_size"))
    rng = np.random.RandomState(int(arr(f"sampler/{case}/seed")))
    first, second = arr(f"sampler/{case}/pass1"), arr(f"sampler/{case}/pass2")
    assert len(first) == int(arr(f"sampler/{case}/len"))
    both = pgdi.balanced_batches(labels, size, 2 * len(first), rng)
    assert np.array_equal(both, np.concatenate([first, second]))


@pytest.mark.parametrize("rule", ("A", "B"))
@pytest.mark.parametrize("size", CONFIG["gen"])
def test_golden_generator(size, rule):
    c = CONFIG["gen"][size]
    assert arr(f"gen/{size}/nz_ngf").tolist() == [c["nz"], c["ngf"]]
    net = fill(pgdi.Generator(c["nz"], c["ngf"], int(size)), rule, c["salt"])
    assert keys_of(net) == lines(f"gen/{size}/keys")
    assert sum(p.numel() for p in net.parameters()) == int(arr(f"gen/{size}/nparams"))
    with torch.no_grad():
        for mode in ("eval", "train"):
            x = net.train(mode == "train")(tensor(f"gen/{size}/z"))[:c["images_kept"], :, ::c["stride"], ::c["stride"]]
            close(x, arr(f"gen/{size}/{rule}/img_{mode}"), 1e-4)
    close(net.conv_blocks[3].running_var, arr(f"gen/{size}/{rule}/running_var_after"), 1e-4)


@pytest.mark.parametrize("case", CONFIG["net"])
def test_golden_network(case):
    c = CONFIG["net"][case]
    net = common.build_model(c["arch"], c["classes"], c["size"])
    assert keys_of(net) == lines(f"net/{case}/keys")
    assert sum(p.numel() for p in net.parameters()) == int(arr(f"net/{case}/nparams"))
    x = rn(arr(f"net/x{c['size']}_seed"), (int(arr("net/batch")), 3, c["size"], c["size"]))
    for rule in ("A", "B"):
        fill(net, rule).eval()
        with torch.no_grad():
            logits, feats = net(x, return_features=True)
            close(logits, arr(f"net/{case}/{rule}/logits"), 1e-4)
            close(feats[-1], arr(f"net/{case}/{rule}/feat"), 1e-4)
            if f"net/{case}/{rule}/logits_train" in GOLDEN:
                close(net.train()(x), arr(f"net/{case}/{rule}/logits_train"), 1e-4)


def own_data(norm, size=32, classes=10):
    x = np.zeros((classes, 3, size, size), np.uint8)
    return common.Data("own", lambda split: (x, np.arange(classes), [str(c) for c in range(classes)]), norm=norm)


def test_golden_augmentation():
    c, n = CONFIG["aug"], int(arr("aug/batch"))
    x = torch.from_numpy(np.random.RandomState(int(arr("aug/x_seed"))).rand(n, *arr("aug/out").shape[1:])).float()
    dy, dx = tensor("aug/offset_yx").T
    out = own_data(c["norm"]).normalize(common.crop_flip(x, dy, dx, tensor("aug/flip"), c["padding"]))
    assert np.abs(out[:len(arr("aug/out"))].numpy() - arr("aug/out")).max() <= 1e-6


def test_golden_pool():
    x = tensor("pool/x")
    pool = pgdi.Pool(len(x), x.shape[-1], torch.device("cpu"))
    pool.add(x)
    assert np.array_equal(pool.x, arr("pool/u8"))


def test_golden_evaluation():
    scores = common.accuracy(tensor("eval/logits"), tensor("eval/targets"))
    assert sum(CONFIG["eval"]["batches"]) == len(arr("eval/targets"))
    close([scores["top1"], scores["top5"]], arr("eval/top1_top5"), 1e-6)
    close(scores["loss"], arr("eval/loss"), 1e-6)


def test_golden_best_iterate():
    for totals, winner in zip(tensor("best/totals"), arr("best/winner")):
        best = lowest = None
        for i, total in enumerate(totals):
            best, lowest = pgdi.keep_best(best, lowest, torch.full((2, 3), float(i)), total)
        assert best.eq(int(winner)).all() and lowest == totals[int(winner)]


def synthesis(feature_grad, dtype=torch.float64, calls=None):
    """The golden whole-synthesis runs, by the functions of the script."""
    c = CONFIG["synth"]
    assert json.loads(str(arr("synth/config"))).items() <= c.items()
    args = pgdi.Args(**{k: c[k] for k in ("warmup", "lr_g", "lr_z", "adv", "bn", "oh", "bn_mmt", "guidance_loss_w",
                                          "logits_guidance_w", "guidance_loss_type", "logits_loss_type")},
                     g_steps=c["iterations"], teacher_feature_source=c["feature_source"], feature_grad=feature_grad)
    nets = {who: fill(common.build_model(c[who], c["num_classes"], c["size"]), "B", c["salts"][who]).to(dtype).eval()
            for who in ("teacher", "student")}
    teacher = nets["teacher"].requires_grad_(False)
    g = fill(pgdi.Generator(c["nz"], c["ngf"], c["size"]), "B", c["salts"]["generator"]).to(dtype)
    meta = torch.optim.Adam(g.parameters(), c["lr_g"] * c["iterations"], tuple(c["adam_betas"]))
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in common.NORMS[c["norm"]])
    x = rn(arr("synth/fewshot_seed"), (c["num_classes"] * c["shots"], 3, c["size"], c["size"])).to(dtype)
    y = torch.arange(c["num_classes"]).repeat_interleave(c["shots"])
    shots = pgdi.see_shots(teacher, x, y, c["num_classes"], c["feature_source"])
    statistics, out = pgdi.BNStatistics(pgdi.bn_order(teacher, x[:2])), {"losses": [], "sums": [], "best": []}
    before = {k: v.clone() for k, v in [*teacher.state_dict().items(), *nets["student"].state_dict().items()]}
    for j in range(calls or c["calls"]):
        z = rn(int(arr("synth/z_seed0")) + j, (c["batch"], c["nz"])).to(dtype)
        targets = np.random.RandomState(int(arr("synth/target_seed0")) + j).randint(0, c["num_classes"], c["batch"])
        best, terms = pgdi.synthesize(g, meta, teacher, nets["student"], z, torch.from_numpy(np.sort(targets)),
                                      lambda x: (x - mean) / std, statistics, shots, j + 1, args)
        out["losses"].append(terms)
        out["sums"].append(torch.stack([torch.stack([p.sum(), p.abs().sum()]) for p in g.parameters()]).detach())
        out["best"].append(best.mean((2, 3)))
    after = {k: v for k, v in [*teacher.state_dict().items(), *nets["student"].state_dict().items()]}
    assert all(torch.equal(before[k], after[k]) for k in before)  # neither network is touched
    assert all(p.requires_grad for p in nets["student"].parameters()) and nets["student"].training
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    return {k: torch.stack(v) for k, v in out.items()}, g, statistics


@pytest.mark.parametrize("group", ("synth", "synthgrad"))
def test_golden_synthesis(group):
    out, g, statistics = synthesis(int(group == "synthgrad"))
    order = [pgdi.TERMS.index(str(c)) for c in arr("synth/columns")]
    for column in range(len(order)):
        close(out["losses"][..., order[column]], arr(f"{group}/losses")[..., column], 1e-9)
    for column in (0, 1):
        close(out["sums"][..., column], arr(f"{group}/generator_sum_abssum")[..., column], 1e-9)
    close(out["best"], arr(f"{group}/best_channel_mean"), 1e-9)
    by_layer = torch.cat([v.flatten() for v in statistics.average.split(statistics.sizes, 1)])
    close(by_layer, arr(f"{group}/bn_mmt"), 1e-9)
    close(torch.cat([p.flatten() for p in g.parameters()]), arr(f"{group}/generator_last"), 1e-6)


@pytest.mark.parametrize("group", ("synth", "synthgrad"))
def test_golden_synthesis_float32(group):
    out, *_ = synthesis(int(group == "synthgrad"), torch.float32, calls=1)
    order = [pgdi.TERMS.index(str(c)) for c in arr("synth/columns")]
    for column in range(len(order)):
        close(out["losses"][..., order[column]], arr(f"{group}/losses_float32")[:1, ..., column], 0.05)


def test_golden_feature_term_without_gradient_moves_nothing():
    assert not bool(arr("synth/feature_term_changes_generator"))
    weights = [synthesis(0, calls=1)[1].state_dict()]
    original = pgdi.feature_prior
    try:
        pgdi.feature_prior = lambda *a: 1e6 * original(*a)
        weights.append(synthesis(0, calls=1)[1].state_dict())
    finally:
        pgdi.feature_prior = original
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_golden_kd_steps(dtype):
    c = CONFIG["kd"]
    assert json.loads(str(arr("kd/config"))).items() <= c.items()
    nets = {who: fill(common.build_model(c[who], c["num_classes"], 32), "B", c["salts"][who]).to(dtype)
            for who in ("teacher", "student")}
    teacher, student = nets["teacher"].eval().requires_grad_(False), nets["student"].train()
    args = pgdi.Args(T=c["T"], lr=c["lr"], alpha_initial=c["alpha_initial"], alpha_final_stage=c["alpha_final"],
                     mixed_distill_stop_epoch=c["stop_epoch"], real_fewshot_initial=c["real_initial"],
                     real_fewshot_final_stage=c["real_final"], alpha_schedule=c["alpha_schedule"],
                     real_fewshot_schedule=c["real_schedule"])
    x_real = rn(arr("kd/fewshot_seed"), (c["num_classes"] * c["shots"], 3, 32, 32)).to(dtype)
    labels = np.repeat(np.arange(c["num_classes"]), c["shots"])
    alpha, n_real = pgdi.mixture_at(c["epoch"], args, len(labels))
    assert n_real == c["real_batch"]
    rng = np.random.RandomState(int(arr("kd/np_seed")))
    real = pgdi.balanced_batches(labels, n_real, c["steps"], rng)
    assert np.array_equal(real, arr("kd/real_indices"))
    with torch.no_grad():
        t_real = teacher(x_real)
    optimizer = torch.optim.SGD(student.parameters(), c["lr"], c["momentum"], weight_decay=c["weight_decay"])
    losses = []
    for k, i in enumerate(torch.from_numpy(real)):
        x = rn(int(arr("kd/x_seed0")) + k, (c["batch"], 3, 32, 32)).to(dtype)
        losses.append(torch.stack(pgdi.kd_step(student, optimizer, torch.cat([x, x_real[i]]),
                                               torch.cat([teacher(x), t_real[i]]), n_real, alpha,
                                               args.T)).detach())
    losses = torch.stack(losses)
    if dtype == torch.float32:
        close(losses[:, 0], arr("kd/loss_total_float32"), 0.02)
        return close(losses[:, 1:], arr("kd/loss_synth_real_float32"), 0.02)
    close(losses[:, 0], arr("kd/loss_total"), 1e-10)
    for column in (0, 1):
        close(losses[:, 1 + column], arr("kd/loss_synth_real")[:, column], 1e-10)
    state = student.state_dict()
    assert list(state) == lines("kd/state_keys")
    sums = torch.stack([torch.stack([v.double().sum(), v.double().abs().sum()]) for v in state.values()])
    for column in (0, 1):
        close(sums[:, column], arr("kd/state_sum_abssum")[:, column], 1e-10)
    close(state["fc.weight"], arr("kd/fc_weight"), 1e-10)
    for name in ("running_mean", "running_var"):
        close(state[f"bn1.{name}"], arr(f"kd/bn1_{name}"), 1e-10)


# ---------------------------------------------------------------------------------------------------- own properties

def test_mmd_by_hand():
    """Against the definition, pair by pair, in numpy; classes of different sizes, one without shots."""
    rng = np.random.RandomState(3)
    x, y, f, lab = rng.randn(11, 5), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]), rng.randn(6, 5), [0, 0, 0, 1, 2, 2]

    def k(a, b):
        return sum(math.exp(-((a - b) ** 2).sum() / (2 * s * s)) for s in (0.1, 1, 5, 10))

    total = weight = 0.0
    for c in (0, 1, 2):
        g, r = x[y == c], f[np.array(lab) == c]
        m, n = len(g), len(r)
        sxx, syy = (sum(k(a, b) for a in v for b in v) for v in (g, r))
        sxy = sum(k(a, b) for a in g for b in r)
        if m == n and m > 1:
            value = (sxx - 4 * m) / (m * (m - 1)) + (syy - 4 * n) / (n * (n - 1)) - 2 * sxy / (m * n)
        else:
            value = sxx / m ** 2 + syy / n ** 2 - 2 * sxy / (m * n)
        total, weight = total + m * max(value, 0), weight + m
    shots = few(torch.from_numpy(f), torch.tensor(lab), 4)
    close(pgdi.feature_prior(torch.from_numpy(x), torch.from_numpy(y), shots), total / weight, 1e-12)
    other = pgdi.feature_prior(torch.from_numpy(x[y == 3]), torch.from_numpy(y[y == 3]), shots)
    assert other == 0  # no class with shots: nothing, and no division by zero


def test_equal_samples_have_no_distance():
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    logits = torch.randn(6, 5, dtype=torch.float64)
    shots = few(x, y, 2, logits)
    assert pgdi.feature_prior(x, y, shots, "l2_min").item() == 0
    assert pgdi.logits_prior(logits, y, shots, "min_l2_logits")[0].item() == 0
    assert pgdi.kl_rows(logits, logits, 20.0).abs().max() < 1e-15
    assert pgdi.feature_prior(x, y, shots).item() == 0  # the unbiased estimate of equal sets is negative: clamped


def test_kd_loss_parts():
    s, t = torch.randn(9, 4), torch.randn(9, 4)
    total, pool, real = pgdi.kd_loss(s, t, 3, 0.25, 2.0)
    rows = pgdi.kl_rows(s, t, 2.0)
    close(pool, rows[:6].mean(), 1e-6)
    close(real, rows[6:].mean(), 1e-6)
    close(total, 0.25 * rows[6:].mean() + 0.75 * rows[:6].mean(), 1e-6)
    close(pgdi.kd_loss(s, t, 0, 0.25, 2.0)[0], 0.75 * rows.mean(), 1e-6)  # R = 0: the factor stays
    close(pgdi.kd_loss(s, t, 9, 1.0, 2.0)[0], rows.mean(), 1e-6)  # only real images


def test_reset_draws_what_it_says():
    g = pgdi.Generator(ngf=8)
    before = {k: v.clone() for k, v in g.state_dict().items()}
    pgdi.reset(g, False, False)
    assert all(torch.equal(before[k], v) for k, v in g.state_dict().items())
    pgdi.reset(g, True, False)
    changed = {k for k, v in g.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {"l1.0.weight", "l1.0.bias", "conv_blocks.0.weight"}  # its bias was 0 and is 0
    assert abs(g.l1[0].weight.std().item() - 0.02) < 1e-3 and g.conv_blocks[0].weight.abs().max() < 0.2
    pgdi.reset(g, True, True)
    assert all(0.8 < m.weight.min() and m.weight.max() < 1.2 for m in g.modules() if isinstance(m, nn.BatchNorm2d))


def test_when_resets_fall():
    a = pgdi.Args()
    assert [e for e in range(1, 801) if pgdi.resets_at(e, a) != (False, False)] == [200, 400, 600, 800]
    fast = parse("--preset", "fast")
    assert [e for e in range(1, 801) if pgdi.resets_at(e, fast) != (False, False)] == [fast.warmup + 120]
    assert pgdi.resets_at(fast.warmup + 120, fast) == (True, False)
    assert pgdi.resets_at(3, pgdi.Args(reset_l0=0, reset_bn=3)) == (False, True)


def test_pool_batches_cover_the_pool_once_per_pass():
    data, pool = own_data("half", 8), pgdi.Pool(20, 8, torch.device("cpu"))
    for first, last in ((1, 14), (14, 19)):
        pool.add((torch.arange(first, last)[:, None, None, None].expand(last - first, 3, 8, 8) + 0.5) / 255)
    gen = torch.Generator().manual_seed(0)
    seen = pgdi.taught_batches(pool, 5, lambda x: x.flatten(1).amax(1, keepdim=True),
                               lambda x: data.random_view(x, gen), gen, "none")
    sizes, marks = [], []
    for x, t in itertools.islice(seen, 8):
        assert torch.equal(x.flatten(1).amax(1, keepdim=True), t)  # each batch with its own logits
        sizes.append(len(x))
        marks += (data.denormalize(x).flatten(1).amax(1) * 255).round().long().tolist()
    assert sizes == [5, 5, 5, 3] * 2
    assert sorted(marks[:18]) == sorted(marks[18:]) == list(range(1, 19)) and marks[:18] != marks[18:]


def test_sampler_without_real_images():
    assert pgdi.balanced_batches(np.array([0, 1]), 0, 5, np.random.RandomState(0)).shape == (5, 0)


def test_kept_image_is_the_one_of_the_lowest_loss(monkeypatch):
    """synthesize returns the iterate whose total is lowest, although it is not the last."""
    seen, totals = [], iter((3.0, 1.0, 2.0))
    data = own_data("half")
    args = pgdi.Args(g_steps=3, adv=0.0, oh=0.0, bn=1.0, guidance_loss_w=0.0, logits_guidance_w=0.0)
    teacher = common.build_model("resnet8", 10).eval().requires_grad_(False)
    monkeypatch.setattr(pgdi, "bn_loss", lambda now, *a: now.sum() * 0 + next(totals))
    g = pgdi.Generator(ngf=8)
    view = (lambda x: (seen.append(x.detach().clone()), data.normalize(x))[1])
    best, terms = pgdi.synthesize(g, torch.optim.Adam(g.parameters()), teacher, common.build_model("resnet8", 10),
                                  torch.randn(4, 256), torch.arange(4), view, bn_statistics(teacher), None, 1, args)
    assert torch.equal(best, seen[1]) and terms[:, 0].tolist() == [3.0, 1.0, 2.0]


def test_no_host_sync_in_a_step():
    data, dev = own_data("half"), torch.device("cpu")
    gen = torch.Generator().manual_seed(0)
    teacher = common.build_model("wrn16_1", 10).eval().requires_grad_(False)
    student, g = common.build_model("resnet8", 10), pgdi.Generator(ngf=8)
    v, y = torch.randn(20, 3, 32, 32), torch.arange(10).repeat_interleave(2)
    shots, pool = pgdi.see_shots(teacher, v, y, 10, "all_conv"), pgdi.Pool(16, 32, dev)
    meta, statistics = torch.optim.Adam(g.parameters()), bn_statistics(teacher)
    view = partial(data.random_view, generator=gen)
    sgd = torch.optim.SGD(student.parameters(), 0.1, 0.9)

    with host_syncs() as syncs:
        for ep in (1, 2):
            images, _ = pgdi.synthesize(g, meta, teacher, student, torch.randn(16, 256), torch.arange(16) % 10,
                                        view, statistics, shots, ep,
                                        pgdi.Args(g_steps=2, warmup=1, feature_grad=1))
        assert syncs == []  # synthesis
        pool.add(images)
        taught, index = pgdi.taught_batches(pool, 8, teacher, view, gen, "none"), torch.arange(4)
        for _ in range(3):
            x, t = next(taught)
            t_shots = shots.logits[0, :1].expand(4, -1)
            pgdi.kd_step(student, sgd, torch.cat([x, v[index]]), torch.cat([t, t_shots]), 4, 0.5, 20.0)
        assert syncs == []  # distillation
        images.sum().item()
    assert syncs == ["_local_scalar_dense"]  # the counter does count


# ------------------------------------------------------------------------------------------------------- whole runs

TINY = ["--smoke", "--save_every", "1", "--log_every", "1"]


def parse(*flags):
    return common.parse_args(pgdi.Args, pgdi.PRESETS, pgdi.ALIASES, list(flags))


def run(folder, *flags):
    return pgdi.main(parse("--data_dir", str(folder / "data"), "--out_dir", str(folder / "runs"), *flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pgdi")


def test_whole_run_and_its_files(folder):
    row = run(folder, *TINY, "--run_name", "whole")
    out = folder / "runs" / "whole"
    assert row["synthetic_images"] == 64 and row["real_images"] == 50 and row["n_test"] == 200
    assert {p.name for p in out.iterdir()} >= {"config.json", "ckpt_last.pt", "student.pt", "result.json"}
    assert (out / "samples" / "ep002.png").is_file()
    assert {"loss/total", "loss/bn", "loss/kd", "alpha", "n_real"} <= set().union(*metrics(out))
    again = run(folder, "--evaluate", str(out), "--export_pool")
    with np.load(out / "pool.npz") as f:
        assert f["x"].shape == (64, 32, 32, 3) and f["x"].dtype == np.uint8 and again["synthetic_images"] == 64
    assert abs(run(folder, "--evaluate", str(out))["last"] - row["last"]) < 1e-9


@pytest.mark.slow
def test_same_seed_same_metrics_other_seed_other(folder):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        run(folder, *TINY, "--run_name", name, "--seed", seed)
    a, b, c = (metrics(folder / "runs" / name) for name in "abc")
    assert a == b and a != c


@pytest.mark.slow
def test_killed_run_resumes_bit_equal(tmp_path):
    kill.prove(["pgdi.py", *TINY, "--epochs", "6", "--data_dir", str(tmp_path / "data")], kills=1, cwd=tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--feature_grad", "1", "--reset_l0", "2", "--reset_bn", "2"]))
def test_resume_is_bit_equal(folder, flags, monkeypatch):
    more, tag = [*TINY, "--epochs", "3", *flags], f"{len(flags)}"
    run(folder, *more, "--run_name", f"full{tag}")
    with monkeypatch.context() as m:
        end = common.Run.end_epoch
        m.setattr(common.Run, "end_epoch", lambda self, e, *a: end(self, e, *a) and (
            setattr(self, "stopped", "the time limit") if e == 1 else True))
        with pytest.raises(SystemExit):
            run(folder, *more, "--run_name", f"cut{tag}")
    run(folder, "--resume", str(folder / "runs" / f"cut{tag}"))
    full, cut = (folder / "runs" / f"{name}{tag}" for name in ("full", "cut"))
    assert metrics(full) == metrics(cut)
    a, b = (torch.load(p / "ckpt_last.pt", weights_only=True)["objects"] for p in (full, cut))
    for name in ("student", "generator"):
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])
    assert torch.equal(a["pool"]["x"], b["pool"]["x"])
    assert torch.equal(a["statistics"]["average"], b["statistics"]["average"])


SMALL = ["--dataset", "shapes", "--teacher", "resnet8", "--student", "resnet8", "--limit_train", "300", "--limit_test",
         "200", "--allow_weak_teacher", "--epochs", "2", "--ep_steps", "3", "--kd_steps", "3", "--batch_size", "16",
         "--log_every", "1"]
SYNTH = ["--warmup", "1", "--synthesis_batch_size", "16", "--g_steps", "2", "--ngf", "8"]


def small_teacher(folder):
    teacher = folder / "t.pt"
    if not teacher.is_file():
        torch.manual_seed(0)
        torch.save({"state_dict": common.build_model("resnet8", 10).state_dict()}, teacher)
    return ["--teacher_ckpt", str(teacher)]


def test_fast_never_opens_the_training_split(folder, monkeypatch):
    original = common.read_shapes
    monkeypatch.setattr(common, "read_shapes",
                        lambda split: original(split) if split == "test" else pytest.fail("opened"))
    row = run(folder, "--preset", "fast", *SMALL, *SYNTH, *small_teacher(folder), "--run_name", "fast")
    config = json.loads((folder / "runs" / "fast" / "config.json").read_text())["args"]
    assert row["real_images"] == 0 and row["synthetic_images"] == 32
    assert config["adv_grad"] == "both" and config["shots"] == 0 and config["bn"] == 10.0
    assert {m["alpha"] for m in metrics(folder / "runs" / "fast") if "alpha" in m} == {0.0}


def test_fewshot_kd_makes_no_images(folder):
    row = run(folder, "--preset", "fewshot_kd", *SMALL, *small_teacher(folder), "--shots", "3", "--run_name", "kd")
    assert row["real_images"] == 30 and row["synthetic_images"] == 0
    rows = [m for m in metrics(folder / "runs" / "kd") if "n_real" in m]
    assert {m["n_real"] for m in rows} == {30} and {m["alpha"] for m in rows} == {1.0}
    assert all(m["loss/pool"] == 0 and m["loss/kd"] == m["loss/real"] for m in rows)


@pytest.mark.parametrize("flags", (["--real_fewshot_final_stage", "0", "--real_fewshot_initial", "0"],  # R = 0
                                   ["--guidance_loss_type", "l2_min", "--teacher_feature_source", "bn_hooks"],
                                   ["--logits_loss_type", "kl_softmax", "--guidance_loss_w", "0"],
                                   ["--ep_steps", "6", "--bn_mmt", "0", "--alpha_schedule", "linear"],
                                   ["--amp", "bf16", "--batch_size", "7", "--synthesis_batch_size", "5"]))
def test_variants_run(folder, flags):
    name = f"v{zlib.crc32(str(flags).encode())}"
    row = run(folder, *SMALL, *SYNTH, *small_teacher(folder), "--run_name", name, *flags)
    assert math.isfinite(row["last"]) and row["synthetic_images"] in (10, 32, 64)


def test_published_command():
    a = parse("--method", "PGDI", "--dataset", "cifar100", "--data_root", "./data", "--teacher", "wrn40_2", "--student",
              "wrn16_1", "--epochs", "200", "--fewshot_n_per_class", "5", "--synthesis_batch_size", "512", "--save_dir",
              "out", "--gpu", "0", "--log_tag", "x", "--wd", "1e-4")
    assert (a.shots, a.epochs, a.synthesis_batch_size, a.out_dir, a.device) == (5, 200, 512, "out", "cuda:0")
    assert (a.warmup, a.lr, a.T, a.bn, a.guidance_loss_w, a.bn_mmt, a.seed) == (20, 0.2, 20.0, 5.0, 100.0, 0.9, 0)
    with pytest.raises(SystemExit):
        parse("--method", "fast_meta")


def test_presets_and_published_rows():
    for preset in ("auto", "script", "long", "fast", "fewshot_kd", "described"):
        assert pgdi.SCRIPT.keys() <= pgdi.PRESETS[preset].keys() and len(pgdi.SCRIPT) == 11
    for (preset, dataset, teacher, student, shots) in pgdi.PUBLISHED:
        a = parse("--preset", preset, "--dataset", dataset, "--teacher", teacher, "--student", student)
        assert a.epochs == (220 if preset == "fast" else 200) and (shots == 0) == (preset == "fast")
        common.build_model(student, 10, 32)
    long = parse("--preset", "long", "--teacher", "resnet34", "--student", "resnet18", "--dataset", "cifar10")
    assert (long.epochs, long.mixed_distill_stop_epoch, long.lr_tmax) == (1200, 300, 200)
    assert parse("--preset", "long").epochs == 800
    other = parse("--preset", "long", "--dataset", "cifar10", "--teacher", "resnet20")  # a pair without a row
    assert (other.epochs, other.mixed_distill_stop_epoch) == (800, 300)
    fast = parse("--preset", "fast", "--dataset", "cifar10", "--teacher", "vgg11", "--student", "resnet18")
    assert (fast.adv, fast.oh, fast.g_steps, fast.lr_z, fast.lr_g) == (1.0, 0.5, 10, 0.01, 2e-3)
    fast = parse("--preset", "fast", "--dataset", "cifar10", "--teacher", "resnet34", "--student", "wrn16_1")
    assert (fast.adv, fast.oh) == (1.33, 0.5)  # by the teacher, whatever the student
    assert len(pgdi.PUBLISHED) == 32
    assert pgdi.PUBLISHED["auto", "cifar100", "wrn40_2", "wrn16_1", 10] == (53.97, "best test epoch, one run")


def test_every_flag_is_read():
    source = (ROOT / "pgdi.py").read_text() + (ROOT / "common.py").read_text()
    for f in dataclasses.fields(pgdi.Args):
        assert re.search(rf"\b(args|a|self\.args)\.{f.name}\b|\"{f.name}\"", source), f.name


@pytest.mark.parametrize("flags, word", (
    (["--shots", "0"], "--preset fast"), (["--warmup", "5"], "--warmup"), (["--kd_steps", "9"], "ep_steps"),
    (["--g_steps", "0", "--real_fewshot_final_stage", "0"], "real_fewshot"),
    (["--shots", "999"], "--shots"), (["--teacher", "netgraft_vgg16"], "--teacher ")))
def test_bad_values_end_with_one_line(folder, flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, *SMALL, *SYNTH, *small_teacher(folder), "--run_name", f"bad{word}", *flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and word in message and message.count("\n") == 1


def test_teacher_without_batch_norm_is_named(folder, capsys):
    (folder / "plain.py").write_text(
        "import torch.nn as nn\n\n\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(8, num_classes))\n")
    spec = f"{folder / 'plain.py'}:net"
    torch.save(common.build_model(spec, 10).state_dict(), folder / "plain.pt")
    flags = [*SMALL, *SYNTH, "--teacher", spec, "--teacher_ckpt", str(folder / "plain.pt")]
    with pytest.raises(SystemExit):
        run(folder, *flags, "--run_name", "plain")
    assert "--bn 0" in capsys.readouterr().err
    assert run(folder, *flags, "--bn", "0", "--run_name", "plain0")["synthetic_images"] == 32


class Skew(nn.Module):
    """Registers its batch norms in another order than it runs them, and one that it never runs."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.late, self.unused, self.early = nn.BatchNorm2d(8), nn.BatchNorm2d(5), nn.BatchNorm2d(3)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.late(self.conv(self.early(x))).mean((2, 3)))


def test_statistics_are_compared_with_those_of_their_own_layer():
    """Of a teacher that has seen one batch only, eq. (2) is 0 on that batch, in all files."""
    teacher, x = Skew(), 2 + 3 * torch.randn(64, 3, 8, 8)
    for m in (teacher.early, teacher.late):
        m.momentum = 1.0
    teacher(x)
    for m in (teacher.early, teacher.late):
        m.running_var *= 1 - 1 / (64 * (64 if m is teacher.early else 36))  # biased
    teacher.eval()
    statistics = pgdi.BNStatistics(pgdi.bn_order(teacher, x[:2]))
    with pgdi.tapped(teacher, "none") as taps:
        teacher(x)
    assert pgdi.bn_loss(torch.cat(taps["bn"], 1), statistics.running, statistics.sizes) < 1e-3
    with adadfkd.tapped(adadfkd.bn_layers(teacher), adadfkd.bn_distance) as taps:
        teacher(x)
    assert len(taps) == 2 and sum(taps) < 1e-3
    with akd_gan.bn_distances(teacher) as taps:
        teacher(x)
    assert len(taps) == 2 and sum(taps) < 1e-3
