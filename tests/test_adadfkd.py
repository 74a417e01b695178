"""Tests of adadfkd.py. Golden tests (test_golden_*) read GOLDEN_DIR/adadfkd.npz and take all sizes from it."""
import copy
import dataclasses
import json
import re
import zlib
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adadfkd
import common
import kill
from tools import ROOT, close, host_syncs, load_golden, metrics

GOLDEN, CONFIG = load_golden("adadfkd")
READ = (r"config", r"loss/([st]_logits|[st]_feat|kldiv_T[\d.]+_batchmean|kldiv_T3_none|kd_l[12]|jsdiv_T[\d.]+)",
        r"loss/(ent_T[\d.]+|balance|oh|act|adv_kl|adv_js_ada|adv_js_cu|adv_cmi|adv_cmi_mask|nce_tau[\d.]+)",
        r"loss/(grad_nce_s_feat|grad_kd_kl_T20_s|grad_adv_kl_[st]|proj_s_feat|proj_W|proj_b|nce_proj)",
        r"curr/(l|lambda|v_hard|v_soft|v_log|iters|lambda_cifar10|lambda_other)", r"sched/cfg(_fields)?",
        r"sched/\d+/(hard_factor|adv|lr|win)", r"sched/alpha_linear(_nocurr)?",
        r"moco/(queue0|t_feat|s_feat|T|hard_factors|length|(grad_t|queue)_\d|loss|ptr|pairs|pair_loss)",
        r"bn/(x|running_mean|running_var|r_feature|grad_x)", r"img/(x|tv|clip_cifar10|jitter_\d|jitter_params)",
        r"img/(mean|std|norm|denorm)_\w+", r"gen/\w+/(z|n_params|keys|rule[AB]_(eval|train|bn_\w+_after))",
        r"net/(x32|x64|num_classes|\w+/(n_params|n_bn|keys_crc|keys|rule[AB]_(logits|feat)|ruleB_train_logits))",
        r"step/(z|num_classes|queue0(_\d+)?|proj_W|proj_b|comp_(ent|adv_kl|adv_js|oh|act|bn|cnce|ent_T5))",
        r"step/\w+/(G_grad_(norm|main9w|main3w)|img0|G_after0?|G_buf_after0?|synth_loss|kd_loss|kd_diff|global_iter)",
        r"step/\w+/(queue|ptr|S_after|S_buf_after|S_fc_after)", r"base/\w+/(loss|G_grad_norm|G_after)",
        r"base/adi/(x0|targets|(no)?adv_(loss|images))",
        r"base/cmi/(z|targets|feat_dim|loss|images|head_keys|bank|G_after|head_after)",
        r"eval/([st]_logits|labels|acc1|acc5|agree|ce|jsd_nat|prob_loyalty_(sqrt|quartic))")


def arr(key):
    return GOLDEN[key]


def tensor(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def cases(pattern):
    return sorted({m[1] for key in GOLDEN.files if (m := re.fullmatch(pattern, key))})


def rms(a, b, tolerance=1e-2):
    """Largest error against the root mean square of the reference."""
    a, b = np.asarray(torch.as_tensor(a).detach(), np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.sqrt((b ** 2).mean())


def near(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(torch.as_tensor(a).detach()), b, rtol, atol)


def sums(net):
    return torch.stack([torch.stack([p.sum(), p.norm()]) for p in net.parameters()]).detach()


def running(net):
    return torch.cat([v.flatten() for k, v in net.state_dict().items() if "running" in k])


def official(name, key):
    """The key that the golden file fills and lists: other names in the torchvision-like ResNets."""
    if "tiny" in name or name in ("resnet8x4", "resnet32x4"):
        return re.sub(r"^linear\.", "fc.", key.replace(".shortcut.", ".downsample."))
    return key


def fill(net, rule, prefix="", name=""):
    state = {}
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        n = np.random.RandomState(zlib.crc32((prefix + official(name, key)).encode())).standard_normal(value.shape)
        if rule == "A":
            n = np.abs(0.05 * n) + 0.5 if key.endswith("running_var") else 0.05 * n
        elif key.endswith("running_var"):
            n = 2 + np.abs(0.05 * n)
        elif value.ndim >= 2:
            n = n * np.sqrt(2 / np.prod(value.shape[1:]))
        else:
            n = 1 + 0.05 * n if key.endswith("weight") else 0.05 * n
        state[key] = torch.from_numpy(np.asarray(n, np.float32))
    net.load_state_dict(state)
    return net


def own_data(norm="half", size=32, classes=10):
    x = np.zeros((classes, 3, size, size), np.uint8)
    return common.Data("own", lambda split: (x, np.arange(classes), [str(c) for c in range(classes)]), norm=norm)


def same(f):
    return f


# ------------------------------------------------------------------------------------------------------ golden numbers

def test_golden_every_key_is_read():
    assert not [k for k in GOLDEN.files if not any(re.fullmatch(p, k) for p in READ)]


def test_golden_kd_losses():
    s, t = tensor("loss/s_logits").requires_grad_(), tensor("loss/t_logits").requires_grad_()
    for T in cases(r"loss/kldiv_T([\d.]+)_batchmean"):
        near(adadfkd.kd_rows(s, t, "kl", float(T)).mean(), arr(f"loss/kldiv_T{T}_batchmean"))
    for T in cases(r"loss/kldiv_T([\d.]+)_none"):
        near(adadfkd.kd_rows(s, t, "kl", float(T)), arr(f"loss/kldiv_T{T}_none").sum(1))
    for kind in ("l1", "l2"):
        near(adadfkd.kd_rows(s, t, kind, 1.0).mean(), arr(f"loss/kd_{kind}"))
    for T in cases(r"loss/grad_kd_kl_T([\d.]+)_s"):
        grad = torch.autograd.grad(adadfkd.kd_rows(s, t, "kl", float(T)).mean(), s)[0]
        close(grad, arr(f"loss/grad_kd_kl_T{T}_s"), 1e-4)


def test_golden_generator_terms():
    s, t = tensor("loss/s_logits").requires_grad_(), tensor("loss/t_logits").requires_grad_()
    for T in cases(r"loss/ent_T([\d.]+)"):
        near(adadfkd.entropy(t, float(T)), arr(f"loss/ent_T{T}"))
    near(-adadfkd.entropy(t, 1.0), arr("loss/balance"))
    near(F.cross_entropy(t, t.argmax(1)), arr("loss/oh"))
    near(-tensor("loss/t_feat").abs().mean(), arr("loss/act"))
    for T in cases(r"loss/jsdiv_T([\d.]+)"):
        near(adadfkd.js_divergence(s, t, float(T)), arr(f"loss/jsdiv_T{T}"))
    for kind, key in (("kl", "adv_kl"), ("js", "adv_js_ada"), ("js_cu", "adv_js_cu"), ("agree", "adv_cmi")):
        near(adadfkd.adv_loss(s, t, kind), arr(f"loss/{key}"))
    rows = [adadfkd.adv_loss(s[i:i + 1], t[i:i + 1], "agree").item() for i in range(len(s))]
    assert np.array_equal(np.array(rows) != 0, arr("loss/adv_cmi_mask") > 0)
    for net, grad in zip("st", torch.autograd.grad(adadfkd.adv_loss(s, t, "kl"), (s, t))):
        close(grad, arr(f"loss/grad_adv_kl_{net}"), 1e-4)


def test_golden_feature_contrast():
    s, t = tensor("loss/s_feat").requires_grad_(), tensor("loss/t_feat")
    for tau in cases(r"loss/nce_tau([\d.]+)"):
        near(adadfkd.nce_rows(t, s, float(tau)).mean(), arr(f"loss/nce_tau{tau}"))
    close(torch.autograd.grad(adadfkd.nce_rows(t, s, 0.07).mean(), s)[0], arr("loss/grad_nce_s_feat"), 1e-4)
    w = tensor("loss/proj_W")
    project = adadfkd.Projection(w.shape[1], w.shape[0], "fixed", torch.Generator())
    project.load_state_dict({"weight": w, "bias": tensor("loss/proj_b")})
    near(adadfkd.nce_rows(t, project(tensor("loss/proj_s_feat")), 0.07).mean(), arr("loss/nce_proj"))


def test_golden_self_paced_weight():
    losses, lam = tensor("curr/l"), float(arr("curr/lambda"))
    for option in ("hard", "soft", "log"):
        near(adadfkd.self_paced(losses, lam, f"curr_{option}"), arr(f"curr/v_{option}"))
    for i, step in enumerate(arr("curr/iters").tolist()):
        for key in ("cifar10", "other"):
            rate = adadfkd.LAMBDA_RATE.get(key, adadfkd.OTHER_RATE)
            assert rate == CONFIG["curr"][f"alpha_{key}"]
            assert abs(adadfkd.lam_at(step, lam, rate) - arr(f"curr/lambda_{key}")[i]) <= 1e-12


@pytest.mark.parametrize("i", cases(r"sched/(\d+)/lr"))
def test_golden_schedules(i):
    values = dict(zip(arr("sched/cfg_fields").tolist(), arr("sched/cfg")[int(i)].tolist()))
    args = adadfkd.Args(**values | {k: int(values[k]) for k in ("epochs", "N_neg")}, lr=CONFIG["sched"]["lr"])
    epochs = range(len(arr(f"sched/{i}/lr")))
    hard = [adadfkd.hard_at(e, args) for e in epochs]
    recipe = adadfkd.lr_recipe(args)
    for key, ours in (("hard_factor", hard), ("adv", [adadfkd.adv_at(e, args) for e in epochs]),
                      ("lr", [common.lr_at(recipe, e) for e in epochs])):
        assert np.abs(np.array(ours) - arr(f"sched/{i}/{key}")).max() <= 1e-12, key
    assert [list(adadfkd.window_at(h, args)) for h in hard] == arr(f"sched/{i}/win").tolist()


@pytest.mark.parametrize("key, option", (("alpha_linear", "curr_log"), ("alpha_linear_nocurr", "none")))
def test_golden_growth_of_adv(key, option):
    args = adadfkd.Args(**CONFIG["sched"]["alpha"], curr_option=option)
    ours = [adadfkd.adv_at(e + 1, args) for e in range(args.epochs)]  # A(e) is in force from the next epoch on
    assert np.abs(np.array(ours) - arr(f"sched/{key}")).max() <= 1e-12


def moco_args():
    return adadfkd.Args(N_neg=arr("moco/queue0").shape[1], length=CONFIG["moco"]["length"])


def test_golden_ring_and_queue():
    c, args, keys0 = CONFIG["moco"], moco_args(), tensor("moco/queue0")
    queue = adadfkd.Queue(*keys0.shape, 2, torch.Generator())
    queue.keys.copy_(keys0)
    for i, (t, s) in enumerate(zip(tensor("moco/t_feat"), tensor("moco/s_feat"))):
        t.requires_grad_()
        window = adadfkd.window_at(c["hard_factors"][i], args)
        loss, keys, _ = adadfkd.ring_loss(t, s.requires_grad_(), queue.keys, window, c["T"])
        near(loss, arr("moco/loss")[i])
        loss.backward()
        assert s.grad is None  # the keys carry no gradient
        close(t.grad, arr(f"moco/grad_t_{i}"), 1e-4)
        queue.add(keys, torch.zeros(len(keys), 3, 2, 2))
        close(queue.keys, arr(f"moco/queue_{i}"), 1e-4)
        assert queue.ptr == arr("moco/ptr")[i]


def test_golden_ring_windows():
    c, args = CONFIG["moco"], moco_args()
    assert np.abs(np.array(c["pairs"]) - arr("moco/pairs")).max() < 1e-6
    for (h, length), want in zip(c["pairs"], arr("moco/pair_loss")):
        window = adadfkd.window_at(h, dataclasses.replace(args, length=length))
        near(adadfkd.ring_loss(tensor("moco/t_feat")[0], tensor("moco/s_feat")[0], tensor("moco/queue0"), window,
                               float(arr("moco/T")))[0], want)


def test_golden_bn_term():
    x = tensor("bn/x").requires_grad_()
    bn = nn.BatchNorm2d(x.shape[1]).eval()
    bn.running_mean.copy_(tensor("bn/running_mean"))
    bn.running_var.copy_(tensor("bn/running_var"))
    with adadfkd.tapped(adadfkd.bn_layers(bn), adadfkd.bn_distance) as taps:
        bn(x)
    loss = torch.stack(taps).sum()
    near(loss, arr("bn/r_feature"))
    close(torch.autograd.grad(loss, x)[0], arr("bn/grad_x"), 1e-4)
    assert not bn._forward_pre_hooks


def test_golden_images():
    x = tensor("img/x")
    near(adadfkd.total_variation(x), arr("img/tv"))
    for name in cases(r"img/norm_(\w+)"):
        data = own_data(name)
        close(data.mean, arr(f"img/mean_{name}"), 1e-6)
        close(data.std, arr(f"img/std_{name}"), 1e-6)
        near(data.normalize(x), arr(f"img/norm_{name}"))
        mean, std = (tensor(f"img/{k}_{name}").view(1, 3, 1, 1) for k in ("mean", "std"))
        inverse = 0.7 * tensor(f"img/norm_{name}") * std + mean  # the golden one is not clamped
        near(inverse, arr(f"img/denorm_{name}"))
        near(data.denormalize(0.7 * tensor(f"img/norm_{name}")), arr(f"img/denorm_{name}").clip(0, 1))
    near(adadfkd.clip(8 * x - 4, own_data("cifar10")), arr("img/clip_cifar10"))
    for i, (dy, dx, flip) in enumerate(arr("img/jitter_params").tolist()):
        assert np.array_equal(adadfkd.roll_flip(x, dy, dx, bool(flip)), arr(f"img/jitter_{i}"))


@pytest.mark.parametrize("name", CONFIG["gen"])
def test_golden_generator(name):
    c = CONFIG["gen"][name]
    net = adadfkd.Generator(c["nz"], c["ngf"], c["size"], c.get("depth", 2), cmi=c["kind"] == "cmi")
    assert [k for k in net.state_dict()] == arr(f"gen/{name}/keys").tolist()
    assert sum(p.numel() for p in net.parameters()) == int(arr(f"gen/{name}/n_params"))
    fill(net, c["rule"], f"{name}.")
    z = tensor(f"gen/{name}/z")
    with torch.no_grad():
        for mode in ("eval", "train"):
            near(net.train(mode == "train")(z)[:c["rows"]], arr(f"gen/{name}/rule{c['rule']}_{mode}"))
            if mode == "eval" and c["kind"] == "dcgan":
                near(adadfkd.folded(net)(z)[:c["rows"]], arr(f"gen/{name}/rule{c['rule']}_eval"))
    for kind in ("mean", "var"):
        after = torch.cat([v for k, v in net.state_dict().items() if k.endswith(f"running_{kind}")])
        near(after, arr(f"gen/{name}/rule{c['rule']}_bn_{kind}_after"))


@pytest.mark.parametrize("name", cases(r"net/(\w+)/n_params"))
def test_golden_network(name):
    tiny = name.startswith("tiny_")
    arch = f"{name.removeprefix('tiny_')}_tiny" if tiny else name
    x, classes = tensor("net/x64" if tiny else "net/x32"), CONFIG["net"]["tiny_classes" if tiny else "classes"]
    net = common.build_model(arch, classes, x.shape[-1])
    lines = [f"{official(name, k)} {tuple(v.shape)}" for k, v in net.state_dict().items()]
    assert zlib.crc32("\n".join(lines).encode()) == int(arr(f"net/{name}/keys_crc"))
    if f"net/{name}/keys" in GOLDEN:
        assert [line.split(" ")[0] for line in lines] == [k.split(" ")[0] for k in arr(f"net/{name}/keys").tolist()]
    assert sum(p.numel() for p in net.parameters()) == int(arr(f"net/{name}/n_params"))
    assert len(adadfkd.bn_layers(net)) == int(arr(f"net/{name}/n_bn"))
    with torch.no_grad():
        for rule in cases(rf"net/{name}/rule([AB])_logits"):
            fill(net, rule, name=name).eval()
            logits, feats = net(x, return_features=True)
            close(logits, arr(f"net/{name}/rule{rule}_logits"), 1e-4)
            close(feats[-1], arr(f"net/{name}/rule{rule}_feat"), 1e-4)
        if f"net/{name}/ruleB_train_logits" in GOLDEN:
            fill(net, "B", name=name).train()
            close(net(x), arr(f"net/{name}/ruleB_train_logits"), 1e-4)


STEP = CONFIG["step"]
PLAIN = next(c for c in STEP["cases"].values() if c["hard"] and not c.get("projection"))  # the one of the other tests


def step_parts(c, nz):
    """The filled networks of a step, its data, G's optimizer and the queue."""
    t, s = (fill(common.build_model(c[who], STEP["classes"]), "B", f"{who}.") for who in ("teacher", "student"))
    g = fill(adadfkd.Generator(nz, size=32, depth=STEP["depth"]), "B", "G.")
    adam = torch.optim.Adam(g.parameters(), STEP["lr_g"], tuple(STEP["betas_g"]))
    queue = adadfkd.Queue(t.eval()(torch.zeros(1, 3, 32, 32), return_features=True)[1][-1].shape[1], STEP["N_neg"], 32,
                          torch.Generator())
    queue.keys.copy_(tensor(f"step/{c.get('queue', 'queue0')}"))
    return t.requires_grad_(False), s, g, adam, queue, own_data(STEP["norm"], classes=STEP["classes"])


def step_args(c, **more):
    known = {f.name for f in dataclasses.fields(adadfkd.Args)}
    return adadfkd.Args(**{k: v for k, v in c.items() if k in known} | dict(
        tau=STEP["tau"], length=STEP["length"], N_neg=STEP["N_neg"]) | more)


@pytest.mark.parametrize("name", STEP["cases"])
def test_golden_steps(name):
    c = STEP["cases"][name]
    teacher, student, g, adam, queue, data = step_parts(c, STEP["nz"])
    args, z, used = step_args(c), tensor("step/z"), 0
    sgd = torch.optim.SGD(student.parameters(), STEP["lr"], STEP["momentum"], weight_decay=STEP["weight_decay"])
    maps = zip(tensor("step/proj_W"), tensor("step/proj_b")) if c.get("projection") else None
    project = (lambda f: F.linear(f, *next(maps))) if maps else same
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    counter, first, out = c["counter"], {}, {k: [] for k in ("synth_loss", "kd_loss", "kd_diff")}
    for kind, value in c["plan"]:
        if kind == "G":
            frozen = {k: v.clone() for k, v in student.state_dict().items()}
            x, terms = adadfkd.generator_step(g, adam, teacher, student, z[used], data, queue,
                                                 adadfkd.window_at(value, args), project, args.adv, args)
            used += 1
            assert all(torch.equal(v, frozen[k]) for k, v in student.state_dict().items())
            assert student.training and all(p.requires_grad and p.grad is None or out["kd_loss"]
                                            for p in student.parameters())
            out["synth_loss"].append(terms[0])
            first = first or {"norm": torch.stack([p.grad.norm() for p in g.parameters()]), "img": x[:1],
                              "main9w": g.main[9].weight.grad.clone(), "main3w": g.main[3].weight.grad.clone(),
                              "after": sums(g), "buf": running(g)}
            continue
        taught = adadfkd.fresh_batches(g, teacher, z[used:used + value], data, 1000, "none")
        used += value
        for x, t_logits, t_feat in taught:
            lam = adadfkd.lam_at(counter, args.lambda_0, c["alpha"])
            loss, difficulty, *_ = adadfkd.student_step(student, sgd, x, t_logits, t_feat, project, lam, args)
            out["kd_loss"].append(loss.detach())
            counter += 1
        out["kd_diff"].append(difficulty.detach())
    key = f"step/{name}/"
    near(out["synth_loss"][0], arr(key + "synth_loss")[0])
    near(torch.stack(out["synth_loss"]), arr(key + "synth_loss"), 2e-3)
    near(out["kd_loss"][0], arr(key + "kd_loss")[0], 2e-3)
    near(torch.stack(out["kd_loss"]), arr(key + "kd_loss"), 2e-3)
    near(torch.stack(out["kd_diff"]), arr(key + "kd_diff"), 2e-3)
    assert counter == int(arr(key + "global_iter"))
    rms(first["norm"], arr(key + "G_grad_norm"))
    rms(first["main9w"], arr(key + "G_grad_main9w"))
    rms(first["main3w"], arr(key + "G_grad_main3w"))
    near(first["img"], arr(key + "img0"))
    near(first["after"], arr(key + "G_after0"), 2e-3, 2e-1)
    near(sums(g), arr(key + "G_after"), 2e-3, 2e-1)
    near(sums(student), arr(key + "S_after"), 2e-3, 5e-2)
    rms(first["buf"], arr(key + "G_buf_after0"))
    rms(running(student), arr(key + "S_buf_after"))
    rms(list(student.parameters())[-2], arr(key + "S_fc_after"))
    if args.hard:
        rms(queue.keys, arr(key + "queue"))
        assert queue.ptr == int(arr(key + "ptr"))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_golden_single_terms():
    c = STEP["components"]
    for kind in ("kl", "js"):
        teacher, student, g, adam, queue, data = step_parts(PLAIN, STEP["nz"])
        args = step_args(PLAIN, T=c["T"], adv_type=kind, act=1.0)
        g_before = copy.deepcopy(g)
        _, terms = adadfkd.generator_step(g, adam, teacher, student, tensor("step/z")[0], data, queue,
                                          adadfkd.window_at(c["h"], args), same, 1.0, args)
        named = dict(zip(adadfkd.TERMS, terms))
        near(named["adv"], arr(f"step/comp_adv_{kind}"))
        for ours, key in (("ent", "ent"), ("oh", "oh"), ("act", "act"), ("bn", "bn"), ("rel", "cnce")):
            near(named[ours], arr(f"step/comp_{key}"))
        t_logits = teacher(data.normalize(g_before(tensor("step/z")[0])))
        near(adadfkd.entropy(t_logits, c["T_ent5"]), arr("step/comp_ent_T5"))


@pytest.mark.parametrize("name", [n for n in CONFIG["base"] if n not in ("adi", "cmi")])
def test_golden_baselines(name):
    c = CONFIG["base"][name]
    values = {"lmda_ent": 0.0} | {k: v for k, v in c.items() if k not in ("criterion", "steps") and v is not None}
    values |= {"loss": c["criterion"], "adv_type": "kd"} if c.get("criterion") else {}
    values |= {"adv_type": "js_cu"} if c.get("adv_type") == "js" else {}
    teacher, student, g, adam, queue, data = step_parts(PLAIN, c["nz"])
    args, losses = step_args(values, hard=0.0), []
    for z in tensor("step/z")[:c["steps"], :, :c["nz"]]:
        terms = adadfkd.generator_step(g, adam, teacher, student, z, data, queue, (0, 0), same, args.adv, args)[1]
        losses.append(terms[0])
    near(losses[0], arr(f"base/{name}/loss")[0])
    near(torch.stack(losses), arr(f"base/{name}/loss"), 2e-3)
    rms(torch.stack([p.grad.norm() for p in g.parameters()]), arr(f"base/{name}/G_grad_norm"))
    near(sums(g), arr(f"base/{name}/G_after"), 2e-3, 2e-1)


@pytest.mark.parametrize("kind", CONFIG["base"]["adi"]["adv"])
def test_golden_adi(kind):
    c = CONFIG["base"]["adi"]
    teacher, student, *_, data = step_parts(PLAIN, STEP["nz"])
    args = adadfkd.Args(g_steps=c["steps"], lr_g=c["lr"], bn=c["bn"], oh=c["oh"], tv=c["tv"], adv=c["adv"][kind],
                        adv_type=adadfkd.ADI["adv_type"])
    images, losses = adadfkd.adi_images(tensor("base/adi/x0"), tensor("base/adi/targets"), teacher, student, same, data,
                                        args)
    near(losses[0], arr(f"base/adi/{kind}_loss")[0])
    near(losses, arr(f"base/adi/{kind}_loss"), 2e-3)
    want = arr(f"base/adi/{kind}_images")
    assert np.abs(images[:len(want)].numpy() - want).mean() <= 1e-3


def test_golden_cmi():
    c = CONFIG["base"]["cmi"]
    teacher, student, *_, data = step_parts(PLAIN, STEP["nz"])
    args = adadfkd.Args(g_steps=c["iterations"], lr_g=c["lr"], adv_type="agree", bank_draw=c["n_neg"],
                        **{k: c[k] for k in ("adv", "bn", "oh", "cr", "cr_T")})
    head = adadfkd.Contrast(int(arr("base/cmi/feat_dim")), c["bank_size"], c["head_dim"])
    fill(head.head, "B", "cmi_head.head.")
    assert [n for n, _ in head.named_parameters()] == arr("base/cmi/head_keys").tolist()
    adam, losses = torch.optim.Adam(head.head.parameters(), c["lr_head"]), []
    for z, y in zip(tensor("base/cmi/z"), tensor("base/cmi/targets")):
        g = fill(adadfkd.Generator(c["nz"], cmi=True), "B", "G.")
        images, loss = adadfkd.cmi_images(g, z, y, teacher, student, lambda x: (data.normalize(x),) * 2, head, adam,
                                          adadfkd.feature_layers(teacher, PLAIN["teacher"]), torch.Generator(), args)
        losses.append(loss)
    near(losses[0][0], arr("base/cmi/loss")[0, 0])
    near(torch.stack(losses), arr("base/cmi/loss"), 2e-3)
    want, bank = arr("base/cmi/images"), arr("base/cmi/bank")
    rms(images[:len(want)], want)
    rms(head.bank[:len(bank), 0, :c["bank_columns_kept"]], bank)
    near(sums(g), arr("base/cmi/G_after"), 2e-3, 2e-1)
    near(sums(head.head), arr("base/cmi/head_after"), 2e-3, 2e-1)


def test_golden_evaluation():
    s, t, y = tensor("eval/s_logits"), tensor("eval/t_logits"), tensor("eval/labels")
    scores = common.accuracy(s, y) | common.agreement(s, t)
    for key, ours in (("acc1", "top1"), ("acc5", "top5"), ("ce", "loss"), ("agree", "agree1"),
                      ("prob_loyalty_quartic", "L_p"), ("prob_loyalty_sqrt", "L_p_sqrt")):
        close(scores[ours], arr(f"eval/{key}"), 1e-6)
    close(common.js_distance(s, t).square(), arr("eval/jsd_nat"), 1e-6)


# ---------------------------------------------------------------------------------------------------- own properties

def small_nets(teacher="wrn16_1", student="resnet8"):
    torch.manual_seed(0)
    t, s = (common.build_model(n, 10) for n in (teacher, student))
    t(torch.randn(32, 3, 32, 32))  # running statistics of its own
    g = fill(adadfkd.Generator(16, 8), "B")
    return t.eval().requires_grad_(False), s, g


def test_upsampling_conv_is_upsampling_then_conv():
    conv = adadfkd.UpConv(5, 4, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    close(conv(x), plain.detach(), 1e-12)
    seed = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), [x, *conv.parameters()]) for y in (conv(x), plain))):
        close(a, b, 1e-12)


@pytest.mark.parametrize("depth, size", ((2, 32), (3, 64)))
def test_folded_generator_is_the_generator(depth, size):
    g = adadfkd.init_normal(adadfkd.Generator(16, 8, size, depth)).double()
    for _ in range(20):
        g(torch.randn(8, 16, dtype=torch.float64))
    before, z = {k: v.clone() for k, v in g.state_dict().items()}, torch.randn(4, 16, dtype=torch.float64)
    net = adadfkd.folded(g)
    close(net(z), g.eval()(z).detach(), 1e-12)
    assert not adadfkd.bn_layers(net) and all(torch.equal(v, before[k]) for k, v in g.state_dict().items())


def test_one_pass_for_many_batches_is_the_same():
    data, (teacher, _, g) = own_data(), small_nets()
    z = torch.randn(5, 32, 16)
    alone, joined = ([torch.cat(v) for v in zip(*adadfkd.fresh_batches(g, teacher, z, data, piece, "none"))]
                     for piece in (0, 96))
    assert len(alone[0]) == len(joined[0]) == 160
    for a, b in zip(alone, joined):
        close(a, b, 1e-5)
    with torch.no_grad():
        x = data.normalize(g.eval()(z.flatten(0, 1)))
        logits, feats = teacher(x, return_features=True)
    for a, b in zip(alone, (x, logits, feats[-1])):
        close(a, b, 1e-5)


def test_queue_wraps_around():
    queue, keys = adadfkd.Queue(3, 7, 2, torch.Generator().manual_seed(0)), torch.eye(3).repeat(2, 1)[:5]
    close(queue.keys.norm(dim=0), np.ones(7), 1e-6)
    first = queue.keys.clone()
    queue.add(keys, torch.full((5, 3, 2, 2), 0.2))
    assert torch.equal(queue.keys[:, :5], keys.T) and torch.equal(queue.keys[:, 5:], first[:, 5:]) and queue.ptr == 5
    queue.add(-keys, torch.ones(5, 3, 2, 2))
    assert torch.equal(queue.keys[:, [5, 6, 0, 1, 2]], -keys.T) and torch.equal(queue.keys[:, 3:5], keys.T[:, 3:])
    assert queue.ptr == 3 and queue.images[:, 0, 0, 0].tolist() == [255, 255, 255, 51, 51, 255, 255]


def test_ring_by_hand():
    t, s, q = torch.randn(4, 3), torch.randn(4, 3), F.normalize(torch.randn(3, 10), dim=0)
    loss, keys, mean = adadfkd.ring_loss(t, s, q, (2, 6), 0.5)
    a, k, rows, inside = t / t.norm(dim=1, keepdim=True), s / s.norm(dim=1, keepdim=True), [], []
    for i in range(4):
        ring = sorted((a[i] @ q).tolist())[2:6]
        logits = np.array([(a[i] @ k[i]).item(), *ring]) / 0.5
        rows.append(np.log(np.exp(logits).sum()) - logits[0])
        inside += ring
    close(loss, np.mean(rows), 1e-5)
    close(mean, np.mean(inside), 1e-5)
    close(keys, k, 1e-6)


def test_schedules_by_hand():
    args = adadfkd.Args(epochs=7, begin_fraction=0.3, end_fraction=0.85, length=0.6, adv=1.0, grad_adv=0.5, N_neg=10)
    hard = [adadfkd.hard_at(e, args) for e in range(7)]  # begin 2, over int(7 * 0.55) = 3 epochs
    close(np.array(hard), [0, 0, 0, 0.4 / 3, 0.8 / 3, 0.4, 0.4], 1e-12)
    assert [adadfkd.adv_at(e, args) for e in range(7)] == [1, 1, 1, 1, 1.5, 2, 2.5]
    args.curr_option = "none"
    assert [adadfkd.adv_at(e, args) for e in range(7)] == [1, 1, 1, 1, 1, 1, 2.5]
    one = adadfkd.Args(epochs=1, length=0.5)
    assert adadfkd.hard_at(0, one) == 0 and adadfkd.adv_at(0, one) == one.adv
    assert [adadfkd.lam_at(i, 2.0, 0.1) for i in (0, 1)] == [2.0, 2.1]


@pytest.mark.parametrize("option", ("curr_hard", "curr_soft", "curr_log", "none"))
@pytest.mark.parametrize("level", ("batch", "sample"))
def test_student_loss_by_hand(option, level):
    args = adadfkd.Args(loss="l2", s_nce=0.3, tau=0.5, curr_option=option, curr_level=level)
    s, t, fs, ft = (torch.randn(6, n, dtype=torch.float64) for n in (4, 4, 5, 5))
    fs.requires_grad_()
    lam = 2.0
    loss, difficulty, v, nce = adadfkd.student_loss(s, t, fs, ft, lam, args)
    a, b = ft / ft.norm(dim=1, keepdim=True), (fs / fs.norm(dim=1, keepdim=True)).detach()
    sim = (a @ b.T / 0.5).numpy()
    nces = np.log(np.exp(sim).sum(1)) - np.diag(sim)
    rows = ((s - t) ** 2).mean(1).numpy() + 0.3 * nces  # D4: also without a curriculum
    rows = rows.mean(keepdims=True) if level == "batch" else rows
    weight = {"none": np.ones_like(rows), "curr_hard": 1.0 * (rows < lam),
              "curr_soft": (rows < lam) * (1 - rows / lam),
              "curr_log": (1 + np.exp(-lam)) / (1 + np.exp(rows - lam))}[option]
    close(loss, (weight * rows).mean(), 1e-10)
    close(v, weight.mean(), 1e-10)
    close(nce, nces.mean(), 1e-10)
    close(difficulty, (weight * rows).sum() / weight.sum() if weight.sum() else rows.mean(), 1e-10)
    if loss > 0:
        assert torch.autograd.grad(loss, fs)[0].abs().sum() > 0


def test_equal_networks_have_no_loss():
    t, f = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    for kind in ("kl", "l1", "l2"):
        assert adadfkd.kd_rows(t, t, kind, 4.0).abs().max() < 1e-14
    assert abs(adadfkd.js_divergence(t, t).item()) < 1e-14 and adadfkd.adv_loss(t, t, "js").item() == 1
    assert adadfkd.entropy(torch.zeros(3, 5), 1.0).item() == pytest.approx(np.log(5))
    assert torch.isfinite(adadfkd.entropy(1e4 * torch.eye(4, requires_grad=True), 1.0))
    assert adadfkd.nce_rows(f, f, 1e-3).max() < 1e-10


@pytest.mark.parametrize("mode", ("fresh", "fixed"))
def test_projection(mode):
    rng = torch.Generator().manual_seed(0)
    project, f = adadfkd.Projection(3, 5, mode, rng), torch.randn(4, 3)
    first, second = project(f), project(f)
    assert first.shape == (4, 5) and torch.equal(first, second) == (mode == "fixed")
    assert project.weight.abs().max() <= 3 ** -0.5 and project.weight.shape == (5, 3)
    other = adadfkd.Projection(3, 5, mode, torch.Generator().manual_seed(1))
    other.load_state_dict(project.state_dict())
    if mode == "fixed":
        assert torch.equal(other(f), first)
    assert adadfkd.Projection(3, 3, mode, rng)(f) is f


def test_pool_keeps_the_last_images():
    pool = adadfkd.Pool(5, 2, torch.device("cpu"))
    pool.add(torch.full((3, 3, 2, 2), 0.1))
    assert len(pool.x) == 3
    pool.add(torch.full((4, 3, 2, 2), 1.0))
    assert pool.x[:, 0, 0, 0].tolist() == [255, 255, 25, 255, 255]
    other = adadfkd.Pool(5, 2, torch.device("cpu"))
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.x, pool.x) and other.made == 7


def test_views_of_images():
    data, x = own_data(), torch.rand(64, 3, 32, 32)
    for view in (partial(adadfkd.local_view, data=data), data.random_view):
        v = data.denormalize(view(x, generator=torch.Generator().manual_seed(0)))
        assert v.shape == x.shape and v.min() >= 0 and v.max() <= 1 and not torch.equal(v, x)
    ramp = torch.linspace(0, 1, 32).expand(200, 3, 32, 32)  # a part of a ramp is a ramp of less height
    v = data.denormalize(adadfkd.local_view(ramp, data, torch.Generator().manual_seed(0)))[:, 0, 16]
    span = (v[:, -1] - v[:, 0]).abs()
    assert 0.4 < span.min() < 0.6 and span.max() > 0.85 and 0.2 < (v[:, -1] < v[:, 0]).float().mean() < 0.8


def test_adi_moves_pixels_against_the_student_too():
    """The gradient of the adversarial term reaches the pixels through both networks; the last iterate is kept."""
    data, (teacher, student, _) = own_data(), small_nets()
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    args = adadfkd.Args(g_steps=1, lr_g=0.1, bn=0.0, oh=0.0, tv=0.0, adv=1.0, adv_type="js_cu")
    v = x.clone().requires_grad_()
    s, t = student.eval()(v), teacher(v)
    moves = []
    for s_logits, t_logits in ((s, t), (s.detach(), t), (s, t.detach())):
        moves.append(torch.autograd.grad(adadfkd.adv_loss(s_logits, t_logits, "js_cu"), v, retain_graph=True)[0])
    close(moves[0], (moves[1] + moves[2]).detach(), 1e-3)
    assert min(m.abs().sum() for m in moves) > 0
    images, losses = adadfkd.adi_images(x, y, teacher, student, same, data, args)
    grad, moved = moves[0], adadfkd.adv_loss(s, t, "js_cu").item()
    want = data.denormalize(adadfkd.clip(x - 0.1 * grad / (grad.abs() + 1e-8), data))  # Adam's first step
    assert (images - want).abs().mean() < 1e-3 and losses[0] == pytest.approx(moved, rel=1e-3)


def test_cmi_keeps_the_best_images(monkeypatch):
    data, (teacher, student, _) = own_data(), small_nets()
    seen, totals = [], iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(adadfkd, "contrast_loss", lambda *a: torch.tensor(next(totals)))
    args = adadfkd.Args(g_steps=3, bn=1e-9, oh=0.0, adv=0.0, cr=1.0)
    contrast = adadfkd.Contrast(sum(m.num_features for m in adadfkd.bn_layers(teacher)), 8)
    adam = torch.optim.Adam(contrast.head.parameters())
    images, losses = adadfkd.cmi_images(
        adadfkd.Generator(16, 8, cmi=True), torch.randn(4, 16), torch.arange(4), teacher, student,
        lambda x: (seen.append(x.detach()), (data.normalize(x),) * 2)[1], contrast, adam, adadfkd.bn_layers(teacher),
        torch.Generator(), args)
    assert torch.equal(images, seen[1]) and losses.round(decimals=4).tolist() == [3, 1, 2] and contrast.made == 4
    assert contrast.bank[:4].abs().sum() > 0 and contrast.bank[4:].abs().sum() == 0
    kept = contrast.draw(3, torch.Generator())
    assert len(kept) == 3 and len(contrast.draw(9, torch.Generator())) == 4


def test_contrast_counts_new_and_kept_rows_apart(monkeypatch):
    contrast, (a, b) = adadfkd.Contrast(4, 8), torch.randn(2, 3, 4)
    kept = torch.randn(5, 2, 4)
    rows, columns = (F.normalize(contrast.head(torch.cat([new, kept[:, i]]))) for i, new in enumerate((a, b)))
    each = F.cross_entropy(rows @ columns.T / 0.1, torch.arange(8), reduction="none")
    close(adadfkd.contrast_loss(a, b, kept, contrast, 0.1), (each[:3].mean() + each[3:].mean()).detach(), 1e-5)
    alone = adadfkd.contrast_loss(a, b, kept[:0], contrast, 0.1)
    close(alone, F.cross_entropy(rows[:3] @ columns[:3].T / 0.1, torch.arange(3)).detach(), 1e-5)


def test_features_of_cmi():
    stages = adadfkd.feature_layers(common.build_model("resnet34", 10), "resnet34")
    assert [type(m) for m in stages] == [nn.Sequential] * 4
    teacher = common.build_model("wrn16_1", 10)
    assert adadfkd.feature_layers(teacher, "wrn16_1") == adadfkd.bn_layers(teacher)


def test_no_host_sync_in_a_step():
    data, (teacher, student, g), rng = own_data(), small_nets(), torch.Generator().manual_seed(0)
    queue, project = adadfkd.Queue(64, 40, 32, rng), adadfkd.Projection(64, 64, "fresh", rng)
    args = adadfkd.Args(s_nce=0.1, adv=1.0, N_neg=40)
    adam, sgd = torch.optim.Adam(g.parameters()), torch.optim.SGD(student.parameters(), 0.1)
    pool = adadfkd.Pool(32, 32, torch.device("cpu"))

    with host_syncs() as syncs:
        for _ in range(2):
            x, *_ = adadfkd.generator_step(g, adam, teacher, student, torch.randn(16, 16), data, queue, (4, 20),
                                           project, 1.0, args)
        pool.add(x)
        for batch in (*adadfkd.fresh_batches(g, teacher, torch.randn(2, 8, 16), data, 0, "none"),
                      *adadfkd.pool_batches(pool, teacher, 2, data, rng, args)):
            adadfkd.student_step(student, sgd, *batch, project, 2.0, args)
        assert syncs == []
        x.sum().item()
    assert syncs == ["_local_scalar_dense"]  # the counter does count


# ------------------------------------------------------------------------------------------------------- whole runs

TINY = ["--smoke", "--save_every", "1", "--log_every", "1"]


def parse(*flags):
    return common.parse_args(adadfkd.Args, adadfkd.PRESETS, adadfkd.ALIASES, list(flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adadfkd")
    torch.manual_seed(0)
    torch.save({"state_dict": common.build_model("resnet8", 10).state_dict()}, folder / "t.pt")
    return folder


def run(folder, *flags):
    teacher = [] if "--resume" in flags or "--evaluate" in flags else ["--teacher_ckpt", str(folder / "t.pt")]
    return adadfkd.main(parse("--data_dir", str(folder / "data"), "--out_dir", str(folder / "runs"), *teacher, *flags))


def test_whole_run_and_its_files(folder, monkeypatch):
    """The training split is never opened."""
    original = common.read_shapes
    monkeypatch.setattr(common, "read_shapes",
                        lambda split: original(split) if split == "test" else pytest.fail("opened"))
    row = run(folder, *TINY, "--run_name", "whole")
    out = folder / "runs" / "whole"
    assert row["synthetic_images"] == 2 * 2 * (16 + 4 * 16) and row["real_images"] == 0 and row["n_test"] == 200
    assert {p.name for p in out.iterdir()} >= {"config.json", "ckpt_last.pt", "student.pt", "result.json"}
    assert {p.name for p in (out / "samples").iterdir()} == {"ep001.png", "ep002.png", "ring001.png", "ring002.png"}
    objects = torch.load(out / "ckpt_last.pt", weights_only=True)["objects"]
    sgd, adam = (objects[k]["param_groups"] for k in ("optimizer", "adam"))
    assert len(sgd) == 1 and (sgd[0]["weight_decay"], sgd[0]["momentum"], sgd[0]["nesterov"]) == (1e-4, 0.9, False)
    assert (adam[0]["betas"], adam[0]["lr"], adam[0]["weight_decay"]) == ((0.9, 0.99), 2e-3, 0)
    rows = metrics(out)
    assert {"loss/total", "loss/bn", "loss/rel", "loss/kd", "difficulty", "v", "h", "adv", "lam", "L_p", "L_p_sqrt",
            "agree1", "loss/ring_similarity"} <= set().union(*rows)
    made = [sum(v for k, v in r.items() if k.startswith("made/")) for r in rows if "made/0" in r]
    assert made == [128, 128]
    again = run(folder, "--evaluate", str(out))
    assert abs(again["last"] - row["last"]) < 1e-9 and again["L_p"] == pytest.approx(row["L_p"])


def test_training_files_deleted(folder, tmp_path):
    """A data set that never had its training split: no images, no cache."""
    rng = np.random.RandomState(0)
    (tmp_path / "cifar10").mkdir()
    np.savez(tmp_path / "cifar10" / "test.npz", x=rng.randint(0, 256, (40, 32, 32, 3), np.uint8), y=np.arange(40) % 10)
    for preset in ("smoke", "cmi"):
        row = run(folder, *TINY, "--preset", preset, "--dataset", "cifar10", "--data_dir", str(tmp_path), "--run_name",
                  f"no_data_{preset}", "--epochs", "1")
        assert row["real_images"] == 0 and row["n_test"] == 40
    assert not [p for p in tmp_path.rglob("*") if "train" in p.name]


@pytest.mark.parametrize("preset, extra", (
    ("cudfkd", []), ("cudfkd_memory", []), ("dafl", []), ("zskt", []), ("dfad", []), ("dfq", []),
    ("adi", ["--g_steps", "2"]), ("cmi", ["--g_steps", "2", "--bank_size", "40", "--bank_draw", "20"])))
def test_baselines_run(folder, preset, extra):
    row = run(folder, *TINY, "--preset", preset, *extra, "--epochs", "1", "--run_name", preset)
    config = json.loads((folder / "runs" / preset / "config.json").read_text())["args"]
    assert np.isfinite(row["last"]) and row["preset"] == preset and config["hard"] == 0 and config["s_nce"] == 0
    made = 2 * 16 + (0 if preset in ("cudfkd_memory", "adi", "cmi") else 2 * 4 * 16)
    assert row["synthetic_images"] == made
    assert not list((folder / "runs" / preset / "samples").glob("ring*"))


@pytest.mark.parametrize("flags", (
    ["--student", "wrn16_2", "--proj", "fixed"], ["--student", "wrn16_2", "--amp", "bf16", "--s_nce", "0"],
    ["--curr_option", "curr_soft", "--curr_level", "batch", "--lambda_0", "3", "--loss", "l1", "--adv", "0.5",
     "--adv_type", "js", "--grad_adv", "0.1"],
    ["--g_steps", "2", "--length", "1", "--synthesis_batch_size", "24", "--batch_size", "7", "--lmda_ent", "-5"]))
def test_variants_run(folder, flags):
    row = run(folder, *TINY, *flags, "--epochs", "1", "--run_name", f"v{zlib.crc32(str(flags).encode())}")
    assert np.isfinite(row["last"])


def test_own_networks(folder, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch.nn as nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(8, num_classes))\n")
    row = run(folder, *TINY, "--student", f"{tmp_path / 'net.py'}:small", "--epochs", "1", "--run_name", "own")
    assert np.isfinite(row["last"])


def test_same_seed_same_metrics_other_seed_other(folder):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        run(folder, *TINY, "--epochs", "1", "--run_name", name, "--seed", seed)
    a, b, c = (metrics(folder / "runs" / name) for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("flags", (["--student", "wrn16_2", "--proj", "fixed", "--curr_option", "curr_log"],
                                   ["--preset", "cudfkd_memory", "--pool_size", "40"],
                                   ["--preset", "adi"], ["--preset", "cmi"]))
def test_resume_is_bit_equal(folder, flags, monkeypatch):
    more, tag = [*TINY, "--epochs", "3", "--ep_steps", "4", *flags], zlib.crc32(str(flags).encode())
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
    for name in {"student", "generator", "queue", "project", "frozen", "contrast", "pool"} & a.keys():
        x, y = ({**state.pop("_extra_state", {}), **state} for state in (a[name], b[name]))
        assert x.keys() == y.keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(y[k])) for k, v in x.items())


@pytest.mark.slow
def test_killed_run_resumes_bit_equal(tmp_path):
    kill.prove(["adadfkd.py", *TINY, "--epochs", "6", "--data_dir", str(tmp_path / "data")], kills=1, cwd=tmp_path,
               seed=0)


def test_frozen_student_is_named(folder, capsys):
    """With a threshold far below the loss, v stays under 1e-3 and a message says so once."""
    flags = ["--preset", "none", "--dataset", "shapes", "--teacher", "resnet8", "--student", "resnet8", "--limit_test",
             "200", "--allow_weak_teacher", "--epochs", "1", "--ep_steps", "220", "--kd_steps", "220", "--batch_size",
             "2", "--ngf", "4", "--N_neg", "16", "--nz", "8", "--curr_option", "curr_hard", "--lambda_0", "0", "--lr",
             "0", "--log_every", "50"]
    run(folder, *flags, "--run_name", "frozen")
    assert capsys.readouterr().out.count("the student is frozen") == 1
    assert [m["frozen_steps"] for m in metrics(folder / "runs" / "frozen") if "v" in m] == [1, 51, 101, 151, 201, 220]


SCRIPT = ("--method adadfkd --dataset cifar10 --batch_size 768 --teacher resnet34 --student resnet18 "
          "--lr 0.1 --epochs 300 --kd_steps 10 --ep_steps 400 --g_steps 1 --lr_g 1e-3 --adv 1 --T 20 --bn 1 --oh 1 "
          "--act 0 --loss kl "
          "--adv_type kl --curr_option curr_log --lambda_0 2.2 --grad_adv 0 --begin_fraction .25 --end_fraction .75 "
          "--lmda_ent -20 --hard 0.1 --length .9 --tau 0.07 --s_nce .1 --N_neg 4096 --neg 1 --mode ring --no_feature "
          "--depth 2 --gpu 0 --seed 3407 --workers 4 --save_dir out --log_tag x --log_fidelity --nt2_mode none")


def test_published_command():
    a = parse(*SCRIPT.split())
    assert (a.lmda_ent, a.N_neg, a.device, a.out_dir, a.seed) == (-20.0, 4096, "cuda:0", "out", 3407)
    assert (a.curr_level, a.preset, a.synthesis) == ("batch", "script", "generator")
    a = parse(*SCRIPT.split(), "--student", "wrn40_1", "--dataset", "cifar10")  # a pair without a row: as upstream
    assert (a.balance, a.adv_type, a.ngf, a.curr_level) == (0.0, "kl", 64, "batch")
    assert parse("--method", "dafl", "--dataset", "cifar10").preset == "dafl"
    for flags in (["--cond"], ["--fp16"], ["--method", "other"], ["--nt2_mode", "noisy"], ["--bn", "-1"]):
        with pytest.raises(SystemExit):
            parse(*flags)


def test_presets_and_published_rows():
    assert len(adadfkd.PUBLISHED) == 63 and len(adadfkd.CELLS) == 9
    for preset, dataset, teacher, student, _ in adadfkd.PUBLISHED:
        a = parse("--preset", preset, "--dataset", dataset, "--teacher", teacher, "--student", student)
        assert a.epochs >= 250 and a.lr == 0.1 and a.ngf == 64 and a.batch_size >= 256
    for dataset, teacher, student in (*adadfkd.CELLS, adadfkd.TINY):
        a = parse("--dataset", dataset, "--teacher", teacher, "--student", student)
        assert (a.adv_type, a.balance, a.lmda_ent, a.oh, a.bn, a.act, a.tau) == ("kl", 0, -20, 1, 1, 0, 0.07)
    a = parse()
    assert (a.dataset, a.teacher, a.student, a.epochs) == ("cifar100", "wrn40_2", "wrn16_2", 500)
    assert (a.T, a.loss, a.grad_adv, a.lambda_0, a.length, a.s_nce, a.N_neg, a.kd_steps, a.curr_level,
            a.curr_option) == (2.0, "kl", 0.095, 1.2, 0.8, 0.15, 16384, 5, "batch", "curr_log")
    args = parse("--preset", "auto")
    assert adadfkd.adv_at(499, args) == pytest.approx(28.5)  # (400 - 100) * 0.095
    small = parse("--student", "wrn16_1")
    small_values = (small.curr_option, small.adv, small.adv_type, small.balance, small.lr, small.T, small.N_neg)
    assert small_values == ("none", 1, "kd", 20, 0.03, 20, 1024)
    cu = parse("--preset", "cudfkd", "--dataset", "cifar10")
    assert cu.memory and (cu.curr_option, cu.hard, cu.s_nce, cu.batch_size, cu.adv) == ("curr_log", 0, 0, 1024, 1)
    for name, want in (("dafl", (512, 1e-3, 0, 20, 1, 5, "kl", 1)), ("zskt", (256, 0, 0, 0, 0, 5, "kl", 1)),
                       ("dfad", (256, 0, 0, 0, 0, 5, "l1", 1)), ("dfq", (256, 0, 1, 20, 1, 10, "kl", 1))):
        b = parse("--preset", name)
        assert (b.nz, b.act, b.bn, b.balance, b.oh, b.kd_steps, b.loss, b.T) == want
        assert (b.init_g, b.lmda_ent, b.hard) == ("default", 0, 0)
    assert parse("--preset", "adi").g_steps == 1000 and parse("--preset", "cmi").synthesis_batch_size == 512
    tiny = parse("--dataset", "tiny_imagenet", "--teacher", "resnet50_tiny", "--student", "resnet18_tiny")
    assert (tiny.batch_size, tiny.synthesis_batch_size, tiny.hard, tiny.s_nce) == (64, 128, 0.05, 0.02)


def test_every_flag_is_read():
    source = (ROOT / "adadfkd.py").read_text()
    for f in dataclasses.fields(adadfkd.Args):
        assert re.search(rf"\b(args|a|self\.args)\.{f.name}\b|\"{f.name}\"",
                         source + (ROOT / "common.py").read_text()), f.name


def test_equations_have_a_line():
    doc, code = adadfkd.__doc__, (ROOT / "adadfkd.py").read_text().split('"""', 2)[2]
    for n in range(1, 16):
        assert f"({n})" in doc and re.search(rf"[Ee]qs?\. (\(\d+\)(,| and) )?\({n}\)", code), n
    for tag in set(re.findall(r"\bD\d+\b", code)):
        assert f"  {tag} " in doc


@pytest.mark.parametrize("flags, word", (
    (["--synthesis_batch_size", "65"], "--N_neg"), (["--kd_steps", "9"], "ep_steps"), (["--length", "0"], "length"),
    (["--begin_fraction", "0.9"], "begin_fraction"), (["--depth", "5"], "--depth"), (["--g_steps", "0"], "g_steps"),
    (["--T", "0"], "--T"), (["--curr_option", "curr_soft", "--lambda_0", "0"], "--lambda_0"),
    (["--curr_option", "soft"], "curr_soft")))
def test_bad_values_end_with_one_line(folder, flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, *TINY, *flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and word in message and message.count("\n") == 1


def test_teacher_without_batch_norm_is_named(capsys):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    for flags, word in ((["--preset", "none"], "--bn 0"), (["--preset", "cmi", "--bn", "0"], "choose another")):
        with pytest.raises(SystemExit):
            adadfkd.check_teacher(parse(*flags), net)
        assert word in capsys.readouterr().err
    adadfkd.check_teacher(parse("--preset", "none", "--bn", "0"), net)
