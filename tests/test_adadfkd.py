"""Tests of adadfkd.py: golden numbers, corrected terms, published rows, runs."""
import copy
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adadfkd
import common
from tools import cases, close, host_syncs, load_golden, metrics, result, same_weights, unread

GOLDEN, CONFIG = load_golden("adadfkd")
STEP, BASE = CONFIG["step"], CONFIG["base"]
READ = (
    r"config", r"loss/(?!kd_l2).+", r"curr/(l|lambda\w*|v_log|iters)", r"moco/.+", r"bn/.+",
    r"sched/(cfg|cfg_fields|\d+/(hard_factor|adv|lr|win)|alpha_linear|alpha_linear_nocurr)",
    r"img/(x|tv|jitter_\w+)", r"gen/\w+/(z|n_params|keys|rule[AB]_(eval|train|bn_\w+_after))",
    r"step/(z|num_classes|queue0(_\d+)?|proj_W|proj_b|comp_\w+)",
    r"step/\w+/(img0|[GS]_\w+|synth_loss|kd_(loss|diff)|global_iter|queue|ptr)",
    r"base/(adi/(x0|targets|(no)?adv_(loss|images))|\w+/(loss|G_grad_norm|G_after))",
    r"base/cmi/(z|targets|feat_dim|images|head_keys|bank|head_after)")
GONE = {
    r"loss/kd_l2": "--loss l2: no published row and no preset used it",
    r"curr/v_(hard|soft)": "--curr_option curr_hard, curr_soft: no published row used them",
    r"net/.+": "the same networks are read from common.npz",
    r"eval/.+": "the same scores are read from common.npz",
    r"img/(mean|std|norm|denorm|clip)_\w+": "the same normalisation is read from common.npz",
}


def array(key):
    return GOLDEN[key]


def tensor(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def near(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(torch.as_tensor(a).detach()), b, rtol, atol)


def rms(a, b, tolerance=1e-2):
    """Largest error against the root mean square of the reference."""
    a = np.asarray(torch.as_tensor(a).detach(), np.float64)
    b = np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.sqrt((b ** 2).mean())


def sums(net):
    return torch.stack([torch.stack([p.sum(), p.norm()]) for p in net.parameters()]).detach()


def gradient_norms(net):
    return torch.stack([p.grad.norm() for p in net.parameters()])


def running(net):
    return torch.cat([v.flatten() for k, v in net.state_dict().items() if "running" in k])


def official(key, name):
    """The key that the golden file lists and fills: other names in CMI's generator."""
    if "cmi" in name:
        return key.replace("project.1.", "l1.0.").replace("main.", "conv_blocks.")
    return key


def fill(net, rule, prefix, name=""):
    """Weights from the names of the keys, by the file's rule A or B."""
    state = {}
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        seed = zlib.crc32((prefix + official(key, name)).encode())
        n = np.random.RandomState(seed).standard_normal(value.shape)
        if rule == "A":
            n = np.abs(0.05 * n) + 0.5 if key.endswith("running_var") else 0.05 * n
        elif key.endswith("running_var"):
            n = 2 + np.abs(0.05 * n)
        elif value.ndim >= 2:
            n = n * np.sqrt(2 / np.prod(value.shape[1:]))
        elif key.endswith("weight"):
            n = 1 + 0.05 * n
        else:
            n = 0.05 * n
        state[key] = torch.from_numpy(np.asarray(n, np.float32))
    net.load_state_dict(state)
    return net


def own_data():
    x = torch.zeros(STEP["classes"], 3, 32, 32, dtype=torch.uint8)
    y = torch.arange(STEP["classes"])
    return common.Data("own", lambda split: (x, y, [str(c) for c in y]), torch.device("cpu"),
                       STEP["norm"])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------- golden numbers

def test_golden_every_key_is_read():
    assert not unread(GOLDEN, *READ, *GONE)


def test_golden_losses():
    s = tensor("loss/s_logits").requires_grad_()
    t = tensor("loss/t_logits").requires_grad_()
    for T in cases(GOLDEN, r"loss/kldiv_T([\d.]+)_batchmean"):
        near(adadfkd.kd_rows(s, t, "kl", float(T)).mean(), array(f"loss/kldiv_T{T}_batchmean"))
    near(adadfkd.kl_rows(s, t, 3.0), array("loss/kldiv_T3_none").sum(1))
    near(adadfkd.kd_rows(s, t, "l1", 1.0).mean(), array("loss/kd_l1"))
    grad, = torch.autograd.grad(adadfkd.kd_rows(s, t, "kl", 20.0).mean(), s)
    close(grad, array("loss/grad_kd_kl_T20_s"), 1e-4)

    for T in cases(GOLDEN, r"loss/ent_T([\d.]+)"):
        near(adadfkd.entropy(t, float(T)), array(f"loss/ent_T{T}"))
    near(-adadfkd.entropy(t, 1.0), array("loss/balance"))
    near(F.cross_entropy(t, t.argmax(1)), array("loss/oh"))
    near(-tensor("loss/t_feat").abs().mean(), array("loss/act"))
    for T in cases(GOLDEN, r"loss/jsdiv_T([\d.]+)"):
        near(adadfkd.js_divergence(s, t, float(T)).clamp(0, 1), array(f"loss/jsdiv_T{T}"))
    for kind, key in (("kl", "adv_kl"), ("js", "adv_js_ada"), ("js_cu", "adv_js_cu")):
        near(adadfkd.adv_loss(s, t, kind), array(f"loss/{key}"))
    near(-adadfkd.masked_kl(s, t, 1.0), array("loss/adv_cmi"))
    rows = [adadfkd.masked_kl(s[i:i + 1], t[i:i + 1], 1.0).item() for i in range(len(s))]
    assert np.array_equal(np.array(rows) != 0, array("loss/adv_cmi_mask") > 0)
    for net, grad in zip("st", torch.autograd.grad(adadfkd.adv_loss(s, t, "kl"), (s, t))):
        close(grad, array(f"loss/grad_adv_kl_{net}"), 1e-4)


def golden_map(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear.requires_grad_(False)


def test_golden_feature_contrast(monkeypatch):
    s = tensor("loss/s_feat").requires_grad_()
    t = tensor("loss/t_feat")
    for tau in cases(GOLDEN, r"loss/nce_tau([\d.]+)"):
        near(adadfkd.nce_loss(t, s, float(tau)), array(f"loss/nce_tau{tau}"))
    grad, = torch.autograd.grad(adadfkd.nce_loss(t, s, 0.07), s)
    close(grad, array("loss/grad_nce_s_feat"), 1e-4)
    linear = golden_map(tensor("loss/proj_W"), tensor("loss/proj_b"))
    monkeypatch.setattr(adadfkd, "random_map", lambda *sizes: linear)
    s = adadfkd.match_width(tensor("loss/proj_s_feat"), t)
    near(adadfkd.nce_loss(t, s, 0.07), array("loss/nce_proj"))


def test_golden_self_paced_weight():
    lam = float(array("curr/lambda"))
    near(adadfkd.self_paced(tensor("curr/l"), lam), array("curr/v_log"))
    for i, step in enumerate(array("curr/iters").tolist()):
        for name in ("cifar10", "other"):
            ours = adadfkd.lam_at(step, lam, name)
            assert abs(ours - array(f"curr/lambda_{name}")[i]) <= 1e-12
            assert abs(ours - (lam + CONFIG["curr"][f"alpha_{name}"] * step)) <= 1e-12


@pytest.mark.parametrize("i", cases(GOLDEN, r"sched/(\d+)/lr"))
def test_golden_schedules(i):
    values = dict(zip(array("sched/cfg_fields").tolist(), array("sched/cfg")[int(i)].tolist()))
    args = adadfkd.Args(**values)
    args.epochs, args.N_neg = int(args.epochs), int(args.N_neg)
    epochs = range(len(array(f"sched/{i}/lr")))
    hard = [adadfkd.hard_at(epoch, args) for epoch in epochs]
    adv = [adadfkd.adv_at(epoch, args) for epoch in epochs]
    rate = [adadfkd.lr_at(epoch, CONFIG["sched"]["lr"], args.epochs) for epoch in epochs]
    for key, ours in (("hard_factor", hard), ("adv", adv), ("lr", rate)):
        assert np.abs(np.array(ours) - array(f"sched/{i}/{key}")).max() <= 1e-12, key
    assert [list(adadfkd.window_at(h, args)) for h in hard] == array(f"sched/{i}/win").tolist()


@pytest.mark.parametrize("key, option", (
    ("alpha_linear", "curr_log"), ("alpha_linear_nocurr", "none")))
def test_golden_growth_of_adv(key, option):
    args = adadfkd.Args(**CONFIG["sched"]["alpha"], curr_option=option)
    ours = [adadfkd.adv_at(epoch + 1, args) for epoch in range(args.epochs)]
    assert np.abs(np.array(ours) - array(f"sched/{key}")).max() <= 1e-12


def golden_queue(start):
    """start (D, N_neg) as our rows."""
    queue = adadfkd.new_queue(start.shape[1], start.shape[0], rng())
    queue.add(start.T)
    return queue


def test_golden_ring_and_queue():
    c = CONFIG["moco"]
    queue = golden_queue(tensor("moco/queue0"))
    n = len(queue.rows())
    args = adadfkd.Args(N_neg=n, length=c["length"])
    for i, (t, s) in enumerate(zip(tensor("moco/t_feat"), tensor("moco/s_feat"))):
        t.requires_grad_()
        s.requires_grad_()
        window = adadfkd.window_at(c["hard_factors"][i], args)
        loss, keys = adadfkd.ring_loss(t, s, queue.rows(), window, c["T"])
        near(loss, array("moco/loss")[i])
        loss.backward()
        assert s.grad is None  # the keys carry no gradient
        close(t.grad, array(f"moco/grad_t_{i}"), 1e-4)
        queue.add(keys)
        close(queue.rows().T, array(f"moco/queue_{i}"), 1e-4)
        assert queue.added % n == array("moco/ptr")[i]

    for (h, length), want in zip(c["pairs"], array("moco/pair_loss")):
        args.length = length
        loss, _ = adadfkd.ring_loss(tensor("moco/t_feat")[0], tensor("moco/s_feat")[0],
                                    tensor("moco/queue0").T, adadfkd.window_at(h, args), c["T"])
        near(loss, want)


def test_golden_bn_term():
    x = tensor("bn/x").requires_grad_()
    bn = nn.BatchNorm2d(x.shape[1]).eval()
    bn.running_mean.copy_(tensor("bn/running_mean"))
    bn.running_var.copy_(tensor("bn/running_var"))
    with adadfkd.watch(adadfkd.bn_layers(bn), adadfkd.bn_distance) as distances:
        bn(x)
    near(distances[0], array("bn/r_feature"))
    close(torch.autograd.grad(distances[0], x)[0], array("bn/grad_x"), 1e-4)
    assert not bn._forward_pre_hooks


def test_golden_images():
    near(adadfkd.total_variation(tensor("img/x")), array("img/tv"))
    for i, (dy, dx, flip) in enumerate(array("img/jitter_params").tolist()):
        ours = adadfkd.roll_flip(tensor("img/x"), dy, dx, bool(flip))
        assert np.array_equal(ours, array(f"img/jitter_{i}"))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if c["size"] > 32 else ())
    for name, c in CONFIG["gen"].items()])
def test_golden_generator(name):
    c = CONFIG["gen"][name]
    widths = [c["ngf"] * 2 ** d for d in range(c.get("depth", 2), -1, -1)]
    if c["kind"] == "cmi":
        widths = [2 * c["ngf"], 2 * c["ngf"], c["ngf"]]
    net = fill(adadfkd.Generator(c["nz"], widths, c["size"]), c["rule"], f"{name}.", name)
    assert [official(key, name) for key in net.state_dict()] == array(f"gen/{name}/keys").tolist()
    assert sum(p.numel() for p in net.parameters()) == int(array(f"gen/{name}/n_params"))
    for mode in ("eval", "train"):
        with torch.no_grad():
            x = net.train(mode == "train")(tensor(f"gen/{name}/z"))
        near(x[:c["rows"]], array(f"gen/{name}/rule{c['rule']}_{mode}"))
    for kind in ("mean", "var"):
        after = [v for k, v in net.state_dict().items() if k.endswith(f"running_{kind}")]
        near(torch.cat(after), array(f"gen/{name}/rule{c['rule']}_bn_{kind}_after"))


BASIC = next(c for c in STEP["cases"].values() if c["hard"] and not c.get("projection"))


def scene_of(c, **values):
    """The filled networks of a case, and its settings."""
    names = set(adadfkd.Args.__dataclass_fields__)
    values = {**{k: v for k, v in c.items() if k in names}, **values}
    args = adadfkd.Args(**{**dict(tau=STEP["tau"], length=STEP["length"], N_neg=STEP["N_neg"],
                                  amp="none"), **values})
    teacher = fill(common.build_model(args.teacher, STEP["classes"]), "B", "teacher.")
    student = fill(common.build_model(args.student, STEP["classes"]), "B", "student.")
    teacher.eval().requires_grad_(False).arch = args.teacher
    student.eval().requires_grad_(False)
    return adadfkd.Scene(teacher, student, own_data(), rng(), args)


def step_generator(nz):
    widths = [64 * 2 ** d for d in range(STEP["depth"], -1, -1)]
    generator = fill(adadfkd.Generator(nz, widths, 32), "B", "G.")
    adam = torch.optim.Adam(generator.parameters(), STEP["lr_g"], tuple(STEP["betas_g"]))
    return generator, adam


@pytest.mark.parametrize("name", STEP["cases"])
def test_golden_steps(name, monkeypatch):
    c = STEP["cases"][name]
    scene = scene_of(c)
    args, student = scene.args, scene.student
    generator, adam = step_generator(STEP["nz"])
    sgd = torch.optim.SGD(student.parameters(), STEP["lr"], STEP["momentum"],
                          weight_decay=STEP["weight_decay"])
    queue = golden_queue(tensor(f"step/{c.get('queue', 'queue0')}"))
    maps = zip(tensor("step/proj_W"), tensor("step/proj_b"))
    monkeypatch.setattr(adadfkd, "random_map", lambda *sizes: golden_map(*next(maps)))
    before = copy.deepcopy(scene.teacher.state_dict())
    z = tensor("step/z")
    counter = c["counter"]
    golden = {key.split("/")[2]: GOLDEN[key] for key in GOLDEN.files
              if key.startswith(f"step/{name}/")}
    synth_loss, kd_loss, kd_diff = [], [], []
    for kind, value in c["plan"]:
        if kind == "G":
            student.eval().requires_grad_(False)
            window = adadfkd.window_at(value, args)
            images, terms = adadfkd.make_images(
                generator.train(), adam, z[:1], queue, window, args.adv, scene)
            z = z[1:]
            synth_loss.append(terms["g_total"])
            if len(synth_loss) == 1:
                near(synth_loss[0], golden["synth_loss"][0])
                near(images[:1], golden["img0"])
                rms(gradient_norms(generator), golden["G_grad_norm"])
                rms(generator.main[9].weight.grad, golden["G_grad_main9w"])
                rms(generator.main[3].weight.grad, golden["G_grad_main3w"])
                near(sums(generator), golden["G_after0"], 2e-3, 2e-1)
                rms(running(generator), golden["G_buf_after0"])
            continue
        student.train().requires_grad_(True)
        for batch in adadfkd.fresh_batches(generator.eval(), z[:value], scene):
            lam = args.lambda_0 + c["alpha"] * counter
            terms = adadfkd.student_step(student, sgd, batch, lam, scene)
            kd_loss.append(terms["loss"])
            counter += 1
        z = z[value:]
        kd_diff.append(terms["difficulty"])
    if args.curr_level == "sample":  # correction 4 moves the fourth digit
        near(kd_loss[0], golden["kd_loss"][0], 0, 1e-6 if args.loss == "l1" else 1e-5)
    for key, ours in (("synth_loss", synth_loss), ("kd_loss", kd_loss), ("kd_diff", kd_diff)):
        near(torch.stack(ours), golden[key], 2e-3)
    assert counter == int(golden["global_iter"])
    near(sums(generator), golden["G_after"], 2e-3, 2e-1)
    near(sums(student), golden["S_after"], 2e-3, 5e-2)
    rms(running(student), golden["S_buf_after"])
    rms(list(student.parameters())[-2], golden["S_fc_after"])
    if args.hard:
        rms(queue.rows().T, golden["queue"])
        assert queue.added % STEP["N_neg"] == int(golden["ptr"])
    assert all(torch.equal(v, before[k]) for k, v in scene.teacher.state_dict().items())


@pytest.mark.parametrize("kind", ("kl", "js"))
def test_golden_single_terms(kind):
    c = STEP["components"]
    scene = scene_of(BASIC, T=c["T"], adv_type=kind, act=1.0)
    generator, adam = step_generator(STEP["nz"])
    queue = golden_queue(tensor("step/queue0"))
    z = tensor("step/z")[:1]
    window = adadfkd.window_at(c["h"], scene.args)
    images, terms = adadfkd.make_images(generator, adam, z, queue, window, 1.0, scene)
    near(terms["g_adv"], array(f"step/comp_adv_{kind}"))
    for name in ("ent", "oh", "act", "bn"):
        near(terms[f"g_{name}"], array(f"step/comp_{name}"))
    near(terms["g_rel"], array("step/comp_cnce"))
    t_logits = scene.teacher(scene.data.normalize(images))
    near(adadfkd.entropy(t_logits, c["T_ent5"]), array("step/comp_ent_T5"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BASE if name not in ("adi", "cmi")])
def test_golden_baselines(name):
    c = BASE[name]
    values = dict(hard=0.0, lmda_ent=c.get("lmda_ent", 0.0), balance=c.get("balance", 0.0))
    if c.get("criterion"):
        values.update(loss=c["criterion"], adv_type="kd")
    if c.get("adv_type") == "js":
        values.update(adv_type="js_cu")
    scene = scene_of({**BASIC, **c, "T": c.get("T") or 1.0, "adv_type": c.get("adv_type", "kl")},
                     **values)
    generator, adam = step_generator(c["nz"])
    losses = []
    for z in tensor("step/z")[:c["steps"], :, :c["nz"]]:
        _, terms = adadfkd.make_images(generator, adam, z[None], None, (0, 0), c["adv"], scene)
        losses.append(terms["g_total"])
    near(losses[0], array(f"base/{name}/loss")[0])
    near(torch.stack(losses), array(f"base/{name}/loss"), 2e-3)
    rms(gradient_norms(generator), array(f"base/{name}/G_grad_norm"))
    near(sums(generator), array(f"base/{name}/G_after"), 2e-3, 2e-1)


@pytest.mark.parametrize("kind", BASE["adi"]["adv"])
def test_golden_adi(kind, monkeypatch):
    c = BASE["adi"]
    scene = scene_of(BASIC, g_steps=c["steps"], lr_g=c["lr"], bn=c["bn"], oh=c["oh"], tv=c["tv"],
                     adv=c["adv"][kind])
    monkeypatch.setattr(adadfkd, "random_roll", lambda x: x)
    images, made = adadfkd.make_images_adi(tensor("base/adi/x0"), tensor("base/adi/targets"), scene)
    near(made["g_first"], array(f"base/adi/{kind}_loss")[0])
    near(made["g_last"], array(f"base/adi/{kind}_loss")[-1], 2e-3)
    want = array(f"base/adi/{kind}_images")
    assert np.abs(images[:len(want)].numpy() - want).mean() <= 1e-3


def test_golden_cmi(monkeypatch):
    c = BASE["cmi"]
    scene = scene_of(BASIC, g_steps=c["iterations"], lr_g=c["lr"], nz=c["nz"], ngf=64, adv=c["adv"],
                     bn=c["bn"], oh=c["oh"], cr=c["cr"])
    for name, key in (("BANK_SIZE", "bank_size"), ("BANK_DRAW", "n_neg"), ("CR_T", "cr_T")):
        monkeypatch.setattr(adadfkd, name, c[key])
    monkeypatch.setattr(adadfkd, "local_view", lambda x, data, rng: data.normalize(x))
    monkeypatch.setattr(scene.data, "augment", lambda x, rng: scene.data.normalize(x))
    made = []

    def filled(net):
        made.append(fill(net, "B", "G.", "cmi"))
        return net

    monkeypatch.setattr(adadfkd, "init_normal", filled)
    contrast = adadfkd.make_contrast(scene.args, scene.data, scene.teacher)
    head = contrast.head
    assert head[0].in_features == int(array("base/cmi/feat_dim"))
    fill(head, "B", "cmi_head.head.")
    assert [f"head.{n}" for n, _ in head.named_parameters()] == array("base/cmi/head_keys").tolist()
    for z, y, want in zip(tensor("base/cmi/z"), tensor("base/cmi/targets"), array("base/cmi/loss")):
        images, loss = adadfkd.make_images_cmi(z, y, contrast, scene)
        near(loss["g_first"], want[0], 2e-3)
        near(loss["g_last"], want[-1], 2e-3)
    rms(images[:len(array("base/cmi/images"))], array("base/cmi/images"))
    bank = contrast.bank.rows()[:len(array("base/cmi/bank")), 0, :c["bank_columns_kept"]]
    rms(bank, array("base/cmi/bank"))
    near(sums(made[-1]), array("base/cmi/G_after"), 2e-3, 2e-1)
    near(sums(head), array("base/cmi/head_after"), 2e-3, 2e-1)


# ------------------------------------------------------------------------------ corrected terms

def test_mask_of_the_adversarial_term():
    """Correction 1: the row sums count where both name one class; the mean is over all rows."""
    torch.manual_seed(0)
    s = torch.randn(32, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(32, 5, dtype=torch.float64)
    p, q = (np.exp(x.detach().numpy() / 3) for x in (s, t))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    same = p.argmax(1) == q.argmax(1)
    loss = adadfkd.adv_loss(s, t, "masked")
    close(loss, -9 * (q * np.log(q / p)).sum(1)[same].sum() / 32, 1e-12)
    assert 0 < same.sum() < 32
    grad, = torch.autograd.grad(loss, s)
    assert np.array_equal(grad.abs().sum(1) > 0, same)


def test_minus_j_is_not_clamped():
    """Correction 5: with 100 classes J is below 0 for near equal networks; -J keeps its gradient."""
    torch.manual_seed(0)
    s = torch.randn(8, 100, requires_grad=True)
    t = s.detach() + 0.1 * torch.randn(8, 100)
    p, q = (torch.softmax(x / 3, 1).detach().double().numpy() for x in (s, t))
    m = np.clip((p + q) / 2, 0.01, 0.99)
    p, q = np.clip(p, 0.01, 0.99), np.clip(q, 0.01, 0.99)
    j = (m * np.log(m / p) + m * np.log(m / q)).sum() / 2 / len(p)
    near(adadfkd.adv_loss(s, t, "js_cu"), -j, 1e-4, 1e-9)
    shifted = adadfkd.adv_loss(s, 3 * t, "js_cu")
    assert torch.autograd.grad(shifted, s)[0].abs().sum() > 0
    assert adadfkd.adv_loss(s, s, "js") == 1


@pytest.mark.parametrize("level", ("batch", "sample"))
def test_feature_term_stays_without_weights(level):
    """D3; each row of l has the batch mean of L_nce (correction 4: see the golden steps)."""
    scene = scene_of(BASIC, loss="l1", s_nce=0.3, curr_option="none", curr_level=level)
    student = scene.student.train().requires_grad_(True)
    sgd = torch.optim.SGD(student.parameters(), 0.0)
    batch = torch.randn(6, 3, 32, 32), torch.randn(6, STEP["classes"]), torch.randn(6, 64)
    terms = adadfkd.student_step(student, sgd, batch, 2.0, scene)
    assert terms["v"] == 1
    near(terms["loss"], terms["kd"] + 0.3 * terms["nce"])


@pytest.mark.parametrize("name, kaiming", (("resnet18", False), ("wrn16_1", True)))
def test_initial_weights(name, kaiming):
    """Correction 6: uniform up to 1/sqrt(fan_in) as torch has it, or Kaiming by fan_out."""
    torch.manual_seed(0)
    for m in adadfkd.build_student(adadfkd.Args(student=name), own_data()).modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000:
            fan_in, fan_out = m.weight[0].numel(), m.weight[:, 0].numel()
            want = math.sqrt(2 / fan_out) if kaiming else 1 / math.sqrt(3 * fan_in)
            assert m.weight.std().item() == pytest.approx(want, rel=0.05)


# the table of adadfkd.md, section 3, and corrections 2 and 7
ROWS = """
dataset  teacher  student batch_size epochs T loss adv grad_adv begin_fraction \
end_fraction lambda_0 length s_nce N_neg curr_level
cifar10  resnet34 resnet18  768 250 20 kl 1    0 .2  .75 2.3  .85 .2   6144  batch
cifar10  vgg11    resnet18 1024 300 20 kl 1    0 .25 .75 2.3 1.   .2   6144  sample
cifar10  wrn40_2  wrn40_1  1024 250 20 kl 1    0 .25 .75 1.3 1.   .2   6144  sample
cifar10  wrn40_2  wrn16_2  1024 300 20 kl 1    0 0   .75 1.5  .9  .05 49152  sample
cifar10  wrn40_2  wrn16_1  1024 300 20 kl 1    0 0   .75 1.5  .9  .05  8192  sample
cifar100 resnet34 resnet18  768 700 5  l1 0    0 .2  .8  1.2  .65 .1  24576  batch
cifar100 vgg11    resnet18 1024 400 5  l1 1    0 .2  .8  1.0  .8  .1  12288  batch
cifar100 wrn40_2  wrn40_1  1024 500 2  kl 0 .09  .2  .8  1.2  .71 .1  16384  batch
cifar100 wrn40_2  wrn16_2  1024 500 2  kl 0 .095 .2  .8  1.2  .8  .15 16384  batch
tiny_imagenet resnet50_tiny resnet18_tiny 64 500 5 l1 1 0 .2 .75 1.3 .81 .02 16384 batch
"""
CUDFKD_ROWS = """
dataset  teacher  student batch_size epochs T loss adv grad_adv begin_fraction \
end_fraction lambda_0 memory
cifar10  resnet34 resnet18  512 250 20 l1 0 .5  .25 .75 2.0 False
cifar10  vgg11    resnet18  512 250 20 l1 0 .5  .25 .75 2.0 False
cifar10  wrn40_2  wrn40_1  1024 250 20 kl 1 0   .25 .75 2.0 True
cifar10  wrn40_2  wrn16_2  1024 250 20 kl 1 0   .25 .75 2.0 True
cifar10  wrn40_2  wrn16_1  1024 250 20 kl 1 0   .25 .75 2.0 True
cifar100 resnet34 resnet18  768 300 5  l1 1 0   .2  .8  1.0 True
cifar100 vgg11    resnet18  768 300 5  l1 1 0   .2  .8  1.0 True
cifar100 wrn40_2  wrn40_1  1024 300 2  kl 0 .15 .2  .75 1.0 False
cifar100 wrn40_2  wrn16_2  1024 300 2  kl 0 .15 .2  .75 1.0 False
tiny_imagenet resnet50_tiny resnet18_tiny 128 400 5 l1 1 .1 .2 .75 1.5 False
"""


def parse(*flags):
    return common.parse_args(adadfkd.Args, adadfkd.PRESETS, list(flags))


def has(args, **values):
    assert {name: getattr(args, name) for name in values} == values


def row_of(table, number, preset):
    """What the command line gives for the pair of a line, compared with the line."""
    names, *lines = [line.split() for line in table.strip().splitlines()]
    words = dict(zip(names, lines[number]))
    args = parse("--preset", preset, "--dataset", words["dataset"], "--teacher", words["teacher"],
                 "--student", words["student"])
    for name, word in words.items():
        ours = getattr(args, name)
        if isinstance(ours, (bool, str)):
            assert str(ours) == word, name
        else:
            assert ours == float(word), name
    return args


@pytest.mark.parametrize("number", range(10))
def test_published_rows(number):
    tiny = number == 9
    shared = dict(
        kd_steps=10, ep_steps=400, adv_type="masked", curr_option="curr_log", tau=0.07,
        lmda_ent=-20, oh=1, act=0, bn=1, balance=0, lr=0.1, lr_g=1e-3, betas_g=(0.9, 0.99), ngf=64,
        nz=0, g_steps=1, init_g="normal", synthesis="generator")
    args = row_of(ROWS, number, "auto")
    has(args, **shared, hard=0.05 if tiny else 0.1, memory=False,
        synthesis_batch_size=128 if tiny else 0)
    args = row_of(CUDFKD_ROWS, number, "cudfkd")
    has(args, **shared, hard=0, s_nce=0, curr_level="batch", synthesis_batch_size=0)


OWN_TERMS = {  # appendix A
    "dafl": dict(nz=512, oh=1, act=1e-3, bn=0, adv=0, balance=20, init_g="default"),
    "zskt": dict(nz=256, oh=0, act=0, bn=0, adv=1, adv_type="kd", balance=0, init_g="default"),
    "dfq": dict(nz=256, oh=1, act=0, bn=1, adv=1, adv_type="kd", balance=20, init_g="default"),
    "adi": dict(synthesis="adi", oh=1, bn=10, adv=1, tv=1e-3, lr_g=0.1),
    "cmi": dict(synthesis="cmi", nz=256, oh=1, bn=1, adv=0.5, cr=0.8, lr_g=1e-3)}
STEPS = {"dafl": 5, "zskt": 5, "dfq": 10, "adi": 400, "cmi": 400}


@pytest.mark.parametrize("name", OWN_TERMS)
def test_baselines_take_the_protocol_of_their_table(name):
    """Correction 3."""
    off = dict(hard=0, s_nce=0, lmda_ent=0, curr_option="none", grad_adv=0, memory=False)
    for line in ROWS.strip().splitlines()[1:-1]:
        dataset, teacher, student, *_ = line.split()
        args = parse("--preset", name, "--dataset", dataset, "--teacher", teacher,
                     "--student", student)
        lr = 0.05 if (name, teacher) == ("dfq", "resnet34") else 0.1
        has(args, batch_size=256, epochs=200, lr=lr, betas_g=(0.5, 0.999), loss="kl",
            T=20 if name in ("adi", "cmi") else 1, kd_steps=STEPS[name], ep_steps=400)
        has(args, **OWN_TERMS[name], **off)


def test_a_pair_without_a_row_is_run_by_small(capsys):
    args = parse("--dataset", "cifar10", "--student", "wrn16_1", "--T", "4", "--teacher", "vgg8")
    adadfkd.choose_small(args)
    has(args, preset="small", T=4, epochs=30, batch_size=64, adv=1, adv_type="kd", balance=20)
    assert "preset small" in capsys.readouterr().out
    args = parse()
    adadfkd.choose_small(args)
    has(args, preset="auto", epochs=500)
    assert adadfkd.adv_at(499, args) == pytest.approx(28.5)  # (400 - 100) * 0.095


# ----------------------------------------------------------------------------------- properties

def test_no_host_sync_in_a_step():
    scene = scene_of(BASIC, kd_steps=2, batch_size=8, g_steps=1, nz=16, ngf=8)
    generator, adam = step_generator(16)
    sgd = torch.optim.SGD(scene.student.parameters(), 0.1)
    queue = golden_queue(tensor("step/queue0"))
    pool = adadfkd.Recent(32, (3, 32, 32), "cpu", torch.uint8)
    contrast = adadfkd.make_contrast(scene.args, scene.data, scene.teacher)
    z = torch.randn(2, 8, 16)
    with host_syncs() as syncs:
        images, _ = adadfkd.make_images(generator, adam, z, queue, (4, 20), 1.0, scene)
        adadfkd.make_images_cmi(z[0], torch.zeros(8).long(), contrast, scene)
        adadfkd.make_images_adi(images, torch.zeros(16).long(), scene)
        pool.add(common.quantize(images))
        scene.student.train().requires_grad_(True)
        for batch in adadfkd.fresh_batches(generator, z, scene):
            adadfkd.student_step(scene.student, sgd, batch, 2.0, scene)
        for batch in adadfkd.pool_batches(pool, scene):
            adadfkd.student_step(scene.student, sgd, batch, 2.0, scene)
    assert syncs == []


# ------------------------------------------------------------------------------------------ runs

@pytest.fixture
def smoke(data_dir, tmp_path, monkeypatch):
    """A run of --smoke in an empty folder, with a small network of one's own as the student."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch.nn import *\n"
        "def small(num_classes):\n"
        "    return Sequential(Conv2d(3, 8, 3, 4), BatchNorm2d(8), ReLU(), AdaptiveAvgPool2d(1),\n"
        "                      Flatten(), Linear(8, num_classes))\n")

    def run(*flags):
        adadfkd.main(parse("--smoke", "--data_dir", str(data_dir), "--student", "net.py:small",
                           "--save_every", "1", "--log_every", "1", *flags))
    return run


def test_whole_run(smoke, monkeypatch):
    """All terms logged, the optimizers as published, no training image read."""
    smoke("--epochs", "1", "--run_name", "teacher")  # trains one if none is there
    monkeypatch.setattr(common.Data, "train", property(lambda self: pytest.fail("opened")))
    smoke("--run_name", "whole", "--adv", "0.5")
    row, = result("runs/whole")
    assert row["made_images"] == 2 * 2 * (2 * 16 + 4 * 16) and row["real_images"] == 0
    names = set().union(*metrics("runs/whole"))
    assert {"loss", "kd", "nce", "difficulty", "v", "lam", "h", "adv", "lr", "g_total", "g_ent",
            "g_oh", "g_bn", "g_adv", "g_rel"} <= names
    saved = torch.load("runs/whole/ckpt_last.pt", weights_only=True)["objects"]
    sgd, = saved["optimizer"]["param_groups"]
    assert (sgd["weight_decay"], sgd["momentum"], sgd["nesterov"]) == (1e-4, 0.9, False)
    assert saved["adam"]["param_groups"][0]["betas"] == (0.9, 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("preset, made", (
    ("cudfkd", 2 * 32), ("zskt", 2 * (32 + 64)), ("dfq", 2 * (32 + 64)), ("adi", 2 * 16)))
def test_baselines_run(preset, made, smoke):
    smoke("--preset", preset, "--epochs", "1", "--run_name", "a")
    row, = result("runs/a")
    assert row["preset"] == preset and row["made_images"] == made


@pytest.mark.parametrize("preset", ("demo", pytest.param("cmi", marks=pytest.mark.slow)))
def test_resume_is_bit_equal(preset, smoke, data_dir, monkeypatch):
    monkeypatch.setattr(adadfkd, "POOL_SIZE", 40)
    flags = ("--preset", preset, "--epochs", "3", "--eval_every", "3")
    smoke(*flags, "--run_name", "whole")
    end_epoch = common.Run.end_epoch

    def stop(run, epoch, top1=None):
        end_epoch(run, epoch, top1)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(common.Run, "end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            smoke(*flags, "--run_name", "cut")
    adadfkd.main(parse("--resume", "runs/cut", "--data_dir", str(data_dir)))
    assert metrics("runs/whole") == metrics("runs/cut") and same_weights("runs/whole", "runs/cut")


@pytest.mark.parametrize("flags, word", (
    (["--synthesis_batch_size", "65"], "--N_neg"), (["--kd_steps", "9"], "--ep_steps"),
    (["--length", "0"], "--length"), (["--begin_fraction", "0.9"], "--begin_fraction"),
    (["--lmda_ent", "0", "--oh", "0", "--bn", "0", "--hard", "0"], "nothing to learn")))
def test_wrong_values_are_named(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        adadfkd.main(parse("--smoke", *flags))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and word in message and message.count("\n") == 1


@pytest.mark.parametrize("option", ("curr_log", "none"))
@pytest.mark.parametrize("level", ("batch", "sample"))
def test_student_loss_by_hand(option, level):
    """Correction 4: each row of l has the batch mean of L_nce; D3: without v too."""
    scene = scene_of(BASIC, loss="l1", s_nce=0.3, tau=0.5, curr_option=option, curr_level=level)
    student = scene.student.train().requires_grad_(True)
    torch.manual_seed(0)
    x = torch.randn(6, 3, 32, 32)
    t_logits = 3 * torch.randn(6, STEP["classes"])
    with torch.no_grad():
        s_logits, s_feat = common.with_features(copy.deepcopy(student), x)
    t_feat = torch.randn_like(s_feat)
    sgd = torch.optim.SGD(student.parameters(), 0.0)
    terms = adadfkd.student_step(student, sgd, (x, t_logits, t_feat), 2.0, scene)
    a = t_feat.double() / t_feat.double().norm(dim=1, keepdim=True)
    b = s_feat.double() / s_feat.double().norm(dim=1, keepdim=True)
    logits = (a @ b.T / 0.5).numpy()
    nce = (np.log(np.exp(logits).sum(1)) - np.diag(logits)).mean()
    rows = (s_logits - t_logits).abs().double().mean(1).numpy() + 0.3 * nce
    if level == "batch":
        rows = rows.mean(keepdims=True)
    v = np.ones_like(rows)
    if option == "curr_log":
        v = (1 + np.exp(-2.0)) / (1 + np.exp(rows - 2.0))
    near(terms["loss"], (v * rows).mean(), 1e-5)
    near(terms["nce"], nce, 1e-5)
    near(terms["v"], v.mean(), 1e-5)
    near(terms["difficulty"], (v * rows).sum() / v.sum(), 1e-5)


def test_local_view_is_a_bilinear_crop():
    """Against torch's grid_sample, from the same draws."""
    data = own_data()
    x = torch.rand(16, 3, 32, 32, generator=rng())
    ours = adadfkd.local_view(x, data, rng(1))
    u = torch.rand(5, 16, generator=rng(1))
    area = 0.25 + 0.75 * u[0]
    aspect = (4 / 3) ** (2 * u[1] - 1)
    height = (area / aspect).sqrt().clamp(max=1)
    width = (area * aspect).sqrt().clamp(max=1)
    theta = torch.zeros(16, 2, 3)
    theta[:, 0, 0] = torch.where(u[4] < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * u[3] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * u[2] - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    close(ours, data.normalize(F.grid_sample(x, grid, padding_mode="border", align_corners=False)), 1e-5)


def test_cmi_keeps_the_best_images(monkeypatch):
    scene = scene_of(BASIC, g_steps=3, bn=0.0, oh=0.0, adv=0.0, cr=1.0, nz=16, ngf=8)
    totals = iter((3.0, 1.0, 2.0))
    seen = []

    def view(x, data, rng):
        seen.append(x.detach())
        return data.normalize(x)

    monkeypatch.setattr(adadfkd, "local_view", view)
    monkeypatch.setattr(adadfkd, "contrast_loss", lambda *more: torch.tensor(next(totals)))
    contrast = adadfkd.make_contrast(scene.args, scene.data, scene.teacher)
    images, made = adadfkd.make_images_cmi(torch.randn(4, 16), torch.zeros(4).long(), contrast, scene)
    assert torch.equal(images, seen[1]) and (made["g_first"], made["g_last"]) == (3, 2)
    assert contrast.bank.rows().shape[:2] == (4, 2)


def test_student_that_stands_still_is_named(smoke, capsys):
    smoke("--epochs", "1", "--s_nce", "100", "--run_name", "frozen")
    assert "the student stands still" in capsys.readouterr().out
