"""Tests of akd_gan.py. Golden tests (test_golden_*) read GOLDEN_DIR/akd_gan.npz, all sizes and cases come from it."""
import copy
import dataclasses
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import akd_gan
import common
import kill
from tools import ROOT, close, host_syncs, load_golden, metrics

REAL, TEACHERS = os.environ.get("DATA_DIR"), os.environ.get("TEACHER_DIR")
GOLDEN, CONFIG = load_golden("akd_gan")
GAME = r"(z|l1|student_tot|gen_tot|student_chk|gen_chk|gen_grad_chk|probe_logits)"
READ = (r"config", r"kl/\d+/(s|t|T|loss|grad_s)", r"div/\d+/(x|loss|grad)",
        r"l1/\d+/(s|t|loss_S|grad_S|loss_G|gradG_s|gradG_t)", r"subset/(split|batch|idx/\d+|n_eval)",
        r"eval/(logits|labels|batch|loss|acc)",
        r"gen/\w+/(z|eval_out|train_out|train_out_running_mean|train_out_running_var|train_chk)",
        r"up/(x|y_s7|y_off|sums)", r"net/x", r"net/\w+/(keys|params)",
        r"net/\w+/[AB]/(eval_logits|train_logits|train_chk)", rf"step/\w+/{GAME}", rf"dfad/{GAME}", r"dfad/lr",
        r"cos/(lr0|epochs|lr)", r"reg/(x|t|s|bn_per_layer|bn|oh|balance|adv_T1|adv_T20|total)",
        r"reg/grad_(bn|oh|balance|adv_T1|total)_stat", r"reg/grad_total", r"img/(x|pix|grid|pix_denorm)")


def arr(key):
    return GOLDEN[key]


def tensor(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def cases(pattern):
    return sorted({m[1] for key in GOLDEN.files if (m := re.match(pattern, key))})


def fill(key, shape, rule):
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    z = np.random.RandomState(zlib.crc32(key.encode()) & 0xffffffff).standard_normal(shape)
    if key.endswith("running_var"):
        z = np.abs(0.05 * z) + (0.5 if rule == "A" else 1.0)
    elif rule == "B" and len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif rule == "B" and key.endswith("weight"):
        z = 1 + 0.05 * z
    else:
        z = 0.05 * z
    return torch.from_numpy(np.asarray(z, np.float32))


def ours(key):
    """The name in common.py of a key of the official network."""
    return re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))


def official_state(name):
    """[(key, shape)] of a network of the file."""
    rows = [str(row).split(":") for row in arr(f"net/{name}/keys")]
    return [(key, tuple(int(n) for n in shape.split("x") if n)) for key, shape in rows]


def net(name, rule, dtype=torch.float32):
    arch = {"student50": akd_gan.ALIASES["student"]["50"][1], "student20": akd_gan.ALIASES["student"]["20"][1]}
    made = common.build_model(arch.get(name, name), CONFIG["net"]["classes"])
    made.load_state_dict({ours(key): fill(key, shape, rule) for key, shape in official_state(name)})
    return made.to(dtype)


def generator(nz, rule, dtype=torch.float32):
    made = akd_gan.Generator(nz, CONFIG["gen"]["ngf"], CONFIG["gen"]["image"])
    made.load_state_dict({k: fill(k, v.shape, rule) for k, v in made.state_dict().items()})
    return made.to(dtype)


def teacher_of(name, size, dtype, rule="B"):
    made = net(name, rule, dtype)
    return (common.Upsampled(made, size) if size != arr("net/x").shape[-1] else made).eval().requires_grad_(False)


def checks(state):
    """One row [sum, sum of abs, L2] per floating entry, keys sorted."""
    rows = [state[k].detach().double() for k in sorted(state) if state[k].is_floating_point()]
    return np.array([[v.sum(), v.abs().sum(), v.norm()] for v in rows])


def rows_close(a, b, tolerance):
    assert a.shape == b.shape
    for i, (row, ref) in enumerate(zip(a, b)):
        assert np.abs(row - ref).max() <= tolerance * max(np.abs(ref).max(), 1e-300), i


def total(parameters):
    parts = [p.detach().double() for p in parameters]
    return torch.stack([sum(p.sum() for p in parts), sum(p.square().sum() for p in parts).sqrt()]).numpy()


# ------------------------------------------------------------------------------------------------------ golden numbers

def test_golden_every_key_is_read():
    assert not [k for k in GOLDEN.files if not any(re.fullmatch(p, k) for p in READ)]


@pytest.mark.parametrize("case", cases(r"kl/(\d+)/"))
def test_golden_kl(case):
    s, T = tensor(f"kl/{case}/s").requires_grad_(), float(arr(f"kl/{case}/T"))
    loss = akd_gan.kd_loss(s, tensor(f"kl/{case}/t"), T, CONFIG["kl"]["eps"])
    close(loss, arr(f"kl/{case}/loss"), 1e-5)
    close(torch.autograd.grad(loss, s)[0], arr(f"kl/{case}/grad_s"), 1e-5)


@pytest.mark.parametrize("case", cases(r"div/(\d+)/"))
def test_golden_diversity(case):
    x = tensor(f"div/{case}/x").requires_grad_()
    loss = akd_gan.diversity(x)
    assert abs(loss.item() - float(arr(f"div/{case}/loss"))) <= 1e-7
    close(torch.autograd.grad(loss, x)[0], arr(f"div/{case}/grad"), 1e-5)


@pytest.mark.parametrize("case", cases(r"l1/(\d+)/"))
def test_golden_l1(case):
    s, t = tensor(f"l1/{case}/s").requires_grad_(), tensor(f"l1/{case}/t").requires_grad_()
    loss = akd_gan.distance(s, t.detach(), "l1")
    close(loss, arr(f"l1/{case}/loss_S"), 1e-6)
    close(torch.autograd.grad(loss, s)[0], arr(f"l1/{case}/grad_S"), 1e-6)
    loss = -akd_gan.distance(s, t, "l1")
    close(loss, arr(f"l1/{case}/loss_G"), 1e-6)
    for ours_, name in zip(torch.autograd.grad(loss, (s, t)), ("gradG_s", "gradG_t")):
        close(ours_, arr(f"l1/{case}/{name}"), 1e-6)


@pytest.mark.parametrize("i", range(len(arr("subset/split"))))
def test_golden_subset(i):
    c, split = CONFIG["subset"], float(arr("subset/split")[i])
    index = common.subset_indices(c["images"], split, c["seed"])
    assert np.array_equal(index, arr(f"subset/idx/{i}"))
    for j, batch in enumerate(arr("subset/batch")):
        scored = akd_gan.subset_score(torch.zeros(len(index), 2), torch.zeros(len(index)).long(), int(batch), True)
        assert scored["n"] == arr("subset/n_eval")[i, j]
    if c["seed"] == 42:  # what the script draws
        y = torch.zeros(c["images"]).long()
        y[index[:len(index) // 2]] = 1
        args = akd_gan.Args(test_split=(split,), batch_size=len(index))
        row = akd_gan.subset_scores(F.one_hot(y, 2).float(), torch.ones_like(y), args, {})[f"{split:g}"]
        assert row["n"] == len(index) and row["last"] == pytest.approx(100 * (len(index) // 2) / len(index))


def test_golden_evaluation():
    scores = akd_gan.subset_score(tensor("eval/logits"), tensor("eval/labels"), int(arr("eval/batch")), True)
    assert scores["n"] < len(arr("eval/labels")) or len(arr("eval/labels")) % int(arr("eval/batch")) == 0
    close(scores["loss"], arr("eval/loss"), 1e-5)
    assert scores["top1"] == pytest.approx(100 * float(arr("eval/acc")), abs=1e-12)


@pytest.mark.parametrize("case", CONFIG["gen"]["cases"])
def test_golden_generator(case):
    c = CONFIG["gen"]["cases"][case]
    g, z = generator(c["nz"], c["rule"]), tensor(f"gen/{case}/z")
    with torch.no_grad():
        close(g.eval()(z), arr(f"gen/{case}/eval_out"), 2e-5)
        close(g.train()(z), arr(f"gen/{case}/train_out"), 2e-5)
    close(g.conv_blocks2[5].running_mean, arr(f"gen/{case}/train_out_running_mean"), 1e-6)
    close(g.conv_blocks2[5].running_var, arr(f"gen/{case}/train_out_running_var"), 1e-6)
    rows_close(checks(g.state_dict()), arr(f"gen/{case}/train_chk"), 2e-5)


@pytest.mark.parametrize("nz", cases(r"net/generator(\d+)/"))
def test_golden_generator_keys(nz):
    g = akd_gan.Generator(int(nz), CONFIG["gen"]["ngf"], CONFIG["gen"]["image"])
    assert [(k, tuple(v.shape)) for k, v in g.state_dict().items()] == official_state(f"generator{nz}")
    assert sum(p.numel() for p in g.parameters()) == int(arr(f"net/generator{nz}/params"))


def test_golden_upsampling():
    y = common.upsample(tensor("up/x"), CONFIG["up"]["size"])
    close(y[..., ::7, ::7], arr("up/y_s7"), 2e-6)
    close(y[..., 3::13, 5::11], arr("up/y_off"), 2e-6)
    close([y.double().sum(), y.double().abs().sum()], arr("up/sums"), 2e-6)


@pytest.mark.parametrize("name", CONFIG["net"]["input"])
def test_golden_network(name):
    x = common.upsample(tensor("net/x"), CONFIG["net"]["input"][name])
    for rule in cases(rf"net/{name}/([AB])/"):
        made = net(name, rule)
        assert [(k, tuple(v.shape)) for k, v in made.state_dict().items()] == [
            (ours(key), shape) for key, shape in official_state(name)]
        assert sum(p.numel() for p in made.parameters()) == int(arr(f"net/{name}/params"))
        with torch.no_grad():
            close(made.eval()(x), arr(f"net/{name}/{rule}/eval_logits"), 2e-5)
            if f"net/{name}/{rule}/train_logits" in GOLDEN:
                close(made.train()(x), arr(f"net/{name}/{rule}/train_logits"), 2e-5)
                rows_close(checks(made.state_dict()), arr(f"net/{name}/{rule}/train_chk"), 2e-5)


class Game:
    """Golden rounds by the functions of the script: step 1 with the rows of z but the last one, step 2 with that."""

    def __init__(self, config, dtype):
        c = self.c = config
        self.args = akd_gan.Args(kd_steps=c["student_steps"], batch_size=c["batch"], loss=c["loss"])
        self.teacher, self.dtype = teacher_of(c["teacher"], c["teacher_size"], dtype, c["rule"]), dtype
        self.generator = generator(c["nz"], c["rule"], dtype).train()
        self.adam = torch.optim.Adam(self.generator.parameters(), c["lr_G"], c["betas"])

    def play(self, name, group, steps=None):
        """-> student, losses, sums after each student step; steps: only the first ones, without step 2."""
        c, z = self.c, tensor(f"{group}/z").to(self.dtype)
        student, sums = net(name, c["rule"], self.dtype).train(), []
        sgd = torch.optim.SGD(student.parameters(), c["lr_S"], c["momentum"], weight_decay=c["weight_decay"])
        sgd.register_step_post_hook(lambda *a: sums.append(total(student.parameters())))
        args = dataclasses.replace(self.args, kd_steps=steps or len(z) - 1)
        rows = iter(z)
        losses, _, _ = akd_gan.student_steps(student, sgd, self.generator, self.teacher, lambda: next(rows), args,
                                             c["batch"])
        if steps is None:
            terms, _ = akd_gan.generator_step(student, self.generator, self.adam, self.teacher, next(rows), args)
            losses = torch.cat([losses, -terms["loss_adv"][None]])
        return student, losses, np.array(sums)

    def check(self, name, group):
        assert len(arr(f"{group}/z")) == self.c["student_steps"] + 1
        student, losses, sums = self.play(name, group)
        close(losses, arr(f"{group}/l1"), 1e-8)
        for column in (0, 1):
            close(sums[:, column], arr(f"{group}/student_tot")[:, column], 1e-8)
            close(total(self.generator.parameters())[column], arr(f"{group}/gen_tot")[column], 1e-8)
        grads = checks({k: p.grad for k, p in self.generator.named_parameters()})
        for column in range(3):
            close(grads[:, column], arr(f"{group}/gen_grad_chk")[:, column], 1e-8)
            close(checks(self.generator.state_dict())[:, column], arr(f"{group}/gen_chk")[:, column], 1e-8)
            close(checks(student.state_dict())[:, column], arr(f"{group}/student_chk")[:, column], 1e-8)
        with torch.no_grad():
            close(student.eval()(tensor("net/x").to(self.dtype)), arr(f"{group}/probe_logits"), 1e-8)


@pytest.mark.slow
def test_golden_official_epoch():
    game = Game(CONFIG["step"], torch.float64)
    for name in CONFIG["step"]["order"]:  # both against one generator and one Adam
        game.check(CONFIG["step"]["students"][name], f"step/{name}")


@pytest.mark.slow
def test_golden_dfad_epoch():
    Game(CONFIG["dfad"], torch.float64).check(CONFIG["dfad"]["student"], "dfad")


@pytest.mark.parametrize("group, n, tolerance", (("step", 3, 1e-4), ("dfad", 2, 1e-5)))
def test_golden_first_steps_in_float32(group, n, tolerance):
    c = CONFIG[group]
    name = c["student"] if group == "dfad" else c["students"][c["order"][0]]
    path = group if group == "dfad" else f"step/{c['order'][0]}"
    close(Game(c, torch.float32).play(name, path, n)[1], arr(f"{path}/l1")[:n], tolerance)


def test_golden_dfad_rates():
    c = CONFIG["dfad"]
    args = akd_gan.Args(epochs=c["lr"]["epochs"], scheduler="step", lr=c["lr_S"], lr_g=c["lr_G"])
    for a in (args, dataclasses.replace(args, milestones=tuple(c["lr"]["milestones"]))):
        if a is args and c["lr"]["milestones"] != [args.epochs // 5, 2 * args.epochs // 5]:
            continue  # not the default of the script
        rates = [akd_gan.lrs_at(c["lr"]["first_epoch"] + i - 1, a, c["lr"]["gamma"]) for i in range(a.epochs)]
        assert np.abs(np.array(rates) - arr("dfad/lr")).max() <= 1e-12


def test_golden_cosine_rates():
    args = akd_gan.Args(scheduler="cosine", lr=float(arr("cos/lr0")), epochs=int(arr("cos/epochs")))
    rates = np.array([akd_gan.lrs_at(e, args) for e in range(args.epochs)])
    assert np.abs(rates[:, 0] - arr("cos/lr")).max() <= 1e-9 and (rates[:, 1] == args.lr_g).all()


def regularised():
    """Both networks and the args of group reg."""
    c = CONFIG["reg"]
    w = c["weights"]
    args = akd_gan.Args(loss="kl", T=1.0, adv=w["adv_T1"], bn=w["bn"], oh=w["oh"], balance=w["balance"])
    x = tensor("reg/x").double().requires_grad_()
    return x, teacher_of(c["teacher"], x.shape[-1], torch.float64, c["rule"]), net(
        c["student"], c["rule"], torch.float64).eval().requires_grad_(False), args


def test_golden_regularised_generator():
    x, teacher, student, args = regularised()
    terms = akd_gan.generator_terms(x, teacher, student, args)
    close(terms["adv"], arr("reg/adv_T1"), 1e-8)
    for name in ("bn", "oh", "balance"):
        close(terms[name], arr(f"reg/{name}"), 1e-8)
    for name, key in (("adv", "adv_T1"), ("bn", "bn"), ("oh", "oh"), ("balance", "balance")):
        g = torch.autograd.grad(terms[name], x, retain_graph=True)[0]
        close([g.sum(), g.abs().sum(), g.norm()], arr(f"reg/grad_{key}_stat"), 1e-8)
    loss = sum(akd_gan.weighted(terms, args).values())
    close(loss, arr("reg/total"), 1e-8)
    g = torch.autograd.grad(loss, x)[0]
    close([g.sum(), g.abs().sum(), g.norm()], arr("reg/grad_total_stat"), 1e-8)
    close(g, arr("reg/grad_total"), 1e-6)
    with torch.no_grad(), akd_gan.bn_distances(teacher) as taps:
        t_logits, s_logits = teacher(x), student(x)
    close(torch.stack(taps), arr("reg/bn_per_layer"), 1e-8)
    close(t_logits, arr("reg/t"), 1e-8)
    close(s_logits, arr("reg/s"), 1e-8)
    close(-akd_gan.distance(s_logits, t_logits, "kl", 20.0), arr("reg/adv_T20"), 1e-8)


def test_golden_images(tmp_path):
    x, c = tensor("img/x"), CONFIG["img"]
    pix = akd_gan.pixels(x, 0.5, 0.5)
    assert np.array_equal(pix, arr("img/pix"))
    assert np.array_equal(akd_gan.pixels(x, c["mean"], c["std"]), arr("img/pix_denorm"))
    akd_gan.write_images(pix, tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), arr("img/grid"))
    for i in range(len(x)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"image_{i:03d}.png")), arr("img/pix")[i])


# ---------------------------------------------------------------------------------------------------- own properties

def test_losses_by_hand():
    s, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (np.exp(v.numpy() / 3) / np.exp(v.numpy() / 3).sum(1, keepdims=True) for v in (t, s))
    close(akd_gan.distance(s, t, "kl", 3.0), 9 * (p * np.log(p / q)).sum() / 5, 1e-12)
    close(akd_gan.distance(s, t, "l1"), (s - t).abs().sum() / 35, 1e-12)
    for loss in ("l1", "kl"):
        assert akd_gan.distance(t, t, loss).abs() < 1e-15
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    rows = x.flatten(1).numpy() / np.linalg.norm(x.flatten(1).numpy(), axis=1, keepdims=True)
    close(akd_gan.diversity(x), np.mean([rows[i] @ rows[j] for i in range(4) for j in range(4) if i != j]), 1e-12)
    mean = p.mean(0)
    close(akd_gan.balance_loss(t / 3), (mean * np.log(mean)).sum(), 1e-12)


def test_balance_is_finite_where_a_class_never_occurs():
    t = torch.tensor([[0.0, -1e4, 0.0]] * 4, requires_grad=True)
    loss = akd_gan.balance_loss(t)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(2)) and torch.isfinite(t.grad).all()


def toys(dtype=torch.float64, **changes):
    """A small game: teacher, student, SGD, generator, Adam, args, noise for three student steps and one of G."""
    torch.manual_seed(0)
    args = akd_gan.Args(**{**dict(kd_steps=3, batch_size=32, nz=20, ngf=8, lr=0.1), **changes})
    teacher = common.build_model("resnet8", 10).to(dtype).eval().requires_grad_(False)
    student, g = common.build_model("resnet8", 10).to(dtype), akd_gan.Generator(args.nz, args.ngf).to(dtype)
    with torch.no_grad():  # a teacher that knows classes, and batch norms with statistics
        teacher.train()(torch.randn(64, 3, 32, 32, dtype=dtype))
        teacher.eval()
        teacher.linear.weight.mul_(20)
    sgd = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    adam = torch.optim.Adam(g.parameters(), args.lr_g, args.gen_betas)
    return teacher, student, sgd, g, adam, args, torch.randn(args.kd_steps + 1, args.batch_size, args.nz, dtype=dtype)


def play(teacher, student, sgd, g, adam, args, noise, at_once=32, measure=False):
    rows = iter(noise)
    out = akd_gan.student_steps(student, sgd, g, teacher, lambda: next(rows), args, at_once)
    return *out, *akd_gan.generator_step(student, g, adam, teacher, next(rows), args, measure)


def plain_round(teacher, student, sgd, g, adam, noise):
    """The round as the equations say it: everything with graph, a teacher call per batch, all gradients."""
    losses = []
    teacher.requires_grad_(True)
    for z in noise[:-1]:
        x = g(z).detach()
        with torch.no_grad():
            t = teacher(x)
        loss = F.l1_loss(student(x), t)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
    x = g(noise[-1])
    loss = -F.l1_loss(student(x), teacher(x))
    adam.zero_grad()
    loss.backward()
    adam.step()
    return torch.stack([*losses, -loss.detach()])


@pytest.mark.parametrize("at_once", (32, 96, 50))
def test_fast_round_equals_the_plain_one(at_once):
    ours, plain = toys(), toys()
    for _ in range(2):
        losses, _, _, terms, _ = play(*ours, at_once=at_once)
        reference = plain_round(*plain[:5], plain[6])
        assert torch.equal(torch.cat([losses, -terms["loss_adv"][None]]), reference)
    for a, b in zip(ours[1:4:2], plain[1:4:2]):  # student and generator, batch-norm buffers too
        assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("frozen", (False, True))
def test_who_learns_in_which_step(frozen):
    teacher, student, sgd, g, adam, args, noise = toys(
        torch.float32, student_eval_in_g=frozen, bn=1.0, oh=1.0, balance=20.0, div=1.0, loss="kl")
    rows, nets = iter(noise), {"t": teacher, "s": student, "g": g}

    def snapshot():
        return {k: {n: v.clone() for n, v in net.state_dict().items()} for k, net in nets.items()}

    def changed(before):
        now = snapshot()
        return {k: {n for n in now[k] if not torch.equal(before[k][n], now[k][n])} for k in now}

    weights = {k: {n for n, _ in net.named_parameters()} for k, net in nets.items()}
    before = snapshot()
    akd_gan.student_steps(student, sgd, g, teacher, lambda: next(rows), args, 32)
    moved = changed(before)
    assert not moved["t"] and weights["s"] <= moved["s"] and not moved["g"] & weights["g"]
    assert g.conv_blocks2[5].num_batches_tracked == args.kd_steps  # batch statistics of every batch are noted
    before = snapshot()
    akd_gan.generator_step(student, g, adam, teacher, next(rows), args)
    moved = changed(before)
    assert not moved["t"] and weights["g"] <= moved["g"] and not moved["s"] & weights["s"]
    assert bool(moved["s"]) != frozen  # its batch norms see the adversarial batch, or nothing of it is touched
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_gradient_sizes_do_not_disturb_the_step():
    changes = dict(bn=2.0, oh=1.0, balance=20.0, div=1.0, loss="kl", student_eval_in_g=True)
    measured, not_measured = toys(**changes), toys(**changes)
    *_, terms, sizes = play(*measured, measure=True)
    assert play(*not_measured)[4] == {}
    assert all(torch.equal(a, b) for a, b in zip(measured[3].parameters(), not_measured[3].parameters()))
    names = ("adv", "div", "bn", "oh", "balance")
    assert terms.keys() == {f"loss_{n}" for n in names} and sizes.keys() == {f"grad_x_{n}" for n in names}
    assert all(v > 0 for v in sizes.values())
    double = toys(**{**changes, "bn": 4.0})
    again = play(*double, measure=True)[4]
    close(again["grad_x_bn"], 2 * sizes["grad_x_bn"], 1e-9)
    close(again["grad_x_oh"], sizes["grad_x_oh"], 1e-9)


def test_counts_agreement_and_entropy():
    teacher, _, _, g, adam, args, noise = toys()
    twin = copy.deepcopy(teacher).requires_grad_(True)
    losses, agree, counts, *_ = play(teacher, twin, torch.optim.SGD(twin.parameters(), 0.0), g, adam, args, noise)
    assert losses.shape == (3,) and losses.abs().max() == 0 and agree == 1 and counts.sum() == 96 and len(counts) == 10
    seen = {"counts": [torch.tensor([2, 0, 4]), torch.tensor([4, 0, 2])], "agree": [torch.tensor(0.5)] * 2}
    shown = akd_gan.summary(seen)
    assert shown["entropy"].item() == pytest.approx(math.log(2)) and shown["agree"] == 0.5
    assert akd_gan.summary({"counts": [torch.tensor([0, 7])]})["entropy"] == 0  # collapse


def test_no_host_sync_in_a_round():
    game = toys(torch.float32, bn=1.0, oh=1.0, balance=20.0, div=1.0, loss="kl")

    with host_syncs() as syncs:
        losses = play(*game, measure=True)[0]
        assert syncs == []
        losses.sum().item()
    assert syncs == ["_local_scalar_dense"]  # the counter does count


def test_rates_of_the_presets():
    official, dfad, strong = (parse("--preset", p) for p in ("official", "dfad", "strong"))
    assert {akd_gan.lrs_at(e, official) for e in range(100)} == {(0.01, 1e-3)}
    assert [akd_gan.lrs_at(e, dfad)[0] for e in (0, 98, 99, 198, 199)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    assert akd_gan.lrs_at(100, strong) == pytest.approx((0.05, 1e-3)) and akd_gan.lrs_at(199, strong)[0] > 0
    own = parse("--preset", "dfad", "--epochs", "10", "--milestones", "3,7")
    assert [round(akd_gan.lrs_at(e, own)[1], 9) for e in (1, 2, 5, 6)] == [1e-3, 1e-4, 1e-4, 1e-5]


@pytest.mark.parametrize("size", (32, 64))
def test_generator_makes_standardised_images(size):
    x = akd_gan.Generator(16, 8, size)(torch.randn(8, 16))
    assert x.shape == (8, 3, size, size)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.var((0, 2, 3)) - 1).abs().max() < 1e-2


def test_subset_keeps_or_drops_the_last_batch():
    logits, y = torch.eye(4).repeat(3, 1)[:10], torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 0])
    assert akd_gan.subset_score(logits, y, 4, True)["top1"] == 100.0
    assert akd_gan.subset_score(logits, y, 4, False) == {**akd_gan.subset_score(logits, y, 3, False), "n": 10}
    assert akd_gan.subset_score(logits, y, 4, False)["top1"] == 80.0
    args = akd_gan.Args(test_split=(0.5, 1.0), batch_size=2, drop_last=False)
    first = akd_gan.subset_scores(logits, y, args, {})
    assert first.keys() == {"0.5", "1"} and first["1"]["n"] == 10 and first["1"]["last"] == first["1"]["best"] == 80.0
    then = akd_gan.subset_scores(logits.flip(1), y, args, first)["1"]
    assert then["best"] == 80.0 and then["last"] < 80.0 and first["1"]["standard_error"] == pytest.approx(12.649, 1e-4)


# ------------------------------------------------------------------------------------------------------- whole runs

TINY = ["--smoke", "--save_every", "1", "--log_every", "1"]


def parse(*flags):
    return common.parse_args(akd_gan.Args, akd_gan.PRESETS, akd_gan.ALIASES, list(flags))


def run(folder, *flags):
    return akd_gan.main(parse("--data_dir", str(folder / "data"), "--out_dir", str(folder / "runs"), *flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("akd_gan")


def small(folder, *flags):
    """A run without a trained teacher: a random network that is only asked for its opinion."""
    teacher = folder / "t.pt"
    if not teacher.is_file():
        torch.manual_seed(0)
        torch.save({"state_dict": common.build_model("resnet8", 10).state_dict(), "norm": "cifar10"}, teacher)
    return run(folder, *TINY, "--teacher_ckpt", str(teacher), "--student", "resnet8", "--batch_size", "8", "--ngf", "8",
               *flags)


def test_whole_run_and_its_files(folder, capsys):
    row = run(folder, *TINY, "--run_name", "whole", "--test_split", "0.5,0.2")
    out = folder / "runs" / "whole"
    assert (row["real_images"], row["synthetic_images"], row["n_test"]) == (0, 2 * 3 * 32, 200)
    assert {p.name for p in out.iterdir()} >= {
        "config.json", "ckpt_last.pt", "generator.pt", "student.pt", "student_resnet8.pt", "student_resnet14.pt"}
    assert (out / "samples" / "ep001.png").is_file() and (out / "student.pt").read_bytes() == (
        out / "student_resnet8.pt").read_bytes()
    assert [s["student"] for s in row["students"]] == ["resnet8", "resnet14"] and row["student"] == "resnet8"
    keys = set().union(*metrics(out))
    for name in ("resnet8", "resnet14"):
        assert keys >= {f"lr/{name}", f"lr/g_{name}", *(f"{k}_{name}" for k in (
            "loss/kd", "loss/adv", "agree", "entropy", "grad_x_adv", "acc/test_top1", "acc/subset_0.5",
            "acc/subset_0.2"))}
        table = common.table(common.result_rows(out))
        assert name in table and len(common.result_rows(out)) == 2
    assert row["students"][1]["subset"]["0.2"]["n"] == 32 and "official" == row["preset"]
    for file, last in (("", 0), ("student_resnet14.pt", 1)):
        again = run(folder, "--evaluate", str(out / file))
        assert abs(again["last"] - row["students"][last]["last"]) < 1e-9 and "agree1" in again


def test_sampling(folder, tmp_path, capsys):
    small(folder, "--run_name", "samples", "--own_generator", "--student", "resnet8,wrn16_1", "--nz", "12")
    out = folder / "runs" / "samples"
    run(folder, "--sample", "10", "--evaluate", str(out))
    first = np.asarray(Image.open(out / "samples" / "grid.png"))
    assert first.shape == (4 * 34 + 2, 3 * 34 + 2, 3) and first.std() > 10
    assert len(list((out / "samples").glob("image_*.png"))) == 10
    run(folder, "--sample", "10", "--evaluate", str(out / "generator_resnet8.pt"))
    assert np.array_equal(first, np.asarray(Image.open(out / "samples" / "grid.png")))
    run(folder, "--sample", "10", "--evaluate", str(out / "generator_wrn16_1.pt"))
    assert not np.array_equal(first, np.asarray(Image.open(out / "samples" / "grid.png")))
    bare = tmp_path / "g.pt"
    bare.write_bytes((out / "generator_resnet8.pt").read_bytes())
    run(folder, "--sample", "10", "--evaluate", str(bare), "--norm", "cifar10")
    assert np.array_equal(first, np.asarray(Image.open(tmp_path / "samples" / "grid.png")))
    for path, word in ((bare, "--norm"), (out / "student.pt", "no generator")):
        with pytest.raises(SystemExit) as stop:
            run(folder, "--sample", "4", "--evaluate", str(path))
        assert stop.value.code == 2 and word in capsys.readouterr().err


def test_training_split_is_never_opened(folder, monkeypatch):
    original = common.read_shapes
    monkeypatch.setattr(common, "read_shapes",
                        lambda split: original(split) if split == "test" else pytest.fail("opened"))
    assert small(folder, "--preset", "strong", "--teacher", "resnet8", "--run_name", "free")["real_images"] == 0
    keys = set().union(*metrics(folder / "runs" / "free"))
    assert keys >= {f"grad_x_{k}_resnet8" for k in ("adv", "bn", "oh", "balance")}


def test_teacher_behind_an_upsampling(folder):
    row = small(folder, "--teacher_size", "40", "--run_name", "large")
    again = run(folder, "--evaluate", str(folder / "runs" / "large"))
    assert again["agree1"] == row["agree1"] and again["last"] == row["last"]
    native = run(folder, "--evaluate", str(folder / "runs" / "large"), "--teacher_size", "32")
    assert native["L_p"] != row["L_p"]  # another teacher


@pytest.mark.parametrize("flags", (["--loss", "kl", "--T", "4", "--div", "1", "--scheduler", "cosine"],
                                   ["--amp", "bf16", "--preset", "strong", "--epochs", "2", "--eval_every", "2"],
                                   ["--preset", "dfad", "--batch_size", "1", "--select", "best_test"],
                                   ["--adv", "0", "--bn", "1", "--gen_betas", "0.5,0.9", "--no-drop_last"]))
def test_variants_run(folder, flags):
    row = small(folder, "--teacher", "resnet8", "--run_name", f"v{zlib.crc32(str(flags).encode())}", *flags)
    assert math.isfinite(row["last"]) and row["synthetic_images"] > 0


def test_networks_of_your_own(folder):
    net = folder / "mine.py"
    net.write_text("import torch.nn as nn\n\n\ndef tiny(num_classes):\n    return nn.Sequential("
                   "nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
                   "nn.Linear(4, num_classes))\n")
    row = small(folder, "--student", f"resnet8,{net}:tiny", "--run_name", "own")
    again = run(folder, "--evaluate", str(folder / "runs" / "own" / "student_mine_tiny.pt"))
    assert again["last"] == row["students"][1]["last"]
    torch.manual_seed(1)
    torch.save(common.build_model(f"{net}:tiny", 10).state_dict(), folder / "own.pt")
    small(folder, "--teacher", f"{net}:tiny", "--teacher_ckpt", str(folder / "own.pt"), "--run_name", "own_teacher")


@pytest.mark.skipif(not (REAL and TEACHERS), reason="DATA_DIR and TEACHER_DIR are not set")
def test_real_teacher_and_two_students(tmp_path):
    row = akd_gan.main(parse(
        "--preset", "strong", "--dataset", "cifar10", "--data_dir", REAL, "--student", "wrn16_1,resnet8",
        "--teacher_ckpt", str(Path(TEACHERS, "resnet20-12fca82f.th")), "--limit_test", "1000", "--epochs", "1",
        "--epoch_itrs", "1", "--batch_size", "8", "--ngf", "8", "--out_dir", str(tmp_path), "--run_name", "real"))
    config = json.loads((tmp_path / "real" / "config.json").read_text())
    assert row["teacher"] == "resnet20_a" and row["teacher_top1"] > 88 and config["derived"]["norm"] == "imagenet"
    assert [s["student"] for s in row["students"]] == ["wrn16_1", "resnet8"] and row["n_test"] == 1000


@pytest.mark.slow
def test_same_seed_same_metrics_other_seed_other(folder):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        small(folder, "--run_name", name, "--seed", seed)
    a, b, c = (metrics(folder / "runs" / name) for name in "abc")
    assert a == b and a != c


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--own_generator", "--test_split", "0.5", "--scheduler", "step"]))
def test_resume_is_bit_equal(folder, flags, monkeypatch):
    more, tag = ["--student", "resnet8,wrn16_1", "--epochs", "3", *flags], f"{len(flags)}"
    small(folder, *more, "--run_name", f"full{tag}")
    with monkeypatch.context() as m:
        end = common.Run.end_epoch
        m.setattr(common.Run, "end_epoch", lambda self, e, *a: end(self, e, *a) and (
            setattr(self, "stopped", "the time limit") if e == 1 else True))
        with pytest.raises(SystemExit):
            small(folder, *more, "--run_name", f"cut{tag}")
    run(folder, "--resume", str(folder / "runs" / f"cut{tag}"))
    full, cut = (folder / "runs" / f"{name}{tag}" for name in ("full", "cut"))
    assert metrics(full) == metrics(cut)
    a, b = (torch.load(p / "ckpt_last.pt", weights_only=True)["objects"] for p in (full, cut))
    for name in a:
        if name.startswith(("student", "generator")):
            assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])
    results = [json.loads((p / "result.json").read_text()) for p in (full, cut)]
    assert results[0]["students"] == results[1]["students"]


@pytest.mark.slow
def test_killed_run_resumes_bit_equal(tmp_path):
    kill.prove(["akd_gan.py", *TINY, "--epochs", "4", "--batch_size", "8", "--data_dir", str(tmp_path / "data")],
               kills=1, cwd=tmp_path, seed=0)


def test_presets_and_published_rows():
    official, dfad, strong = (parse("--preset", p) for p in ("official", "dfad", "strong"))
    assert parse() == official or dataclasses.replace(parse(), preset="official") == official
    assert (official.teacher, official.student, official.kd_steps, official.lr, official.nz, official.loss) == (
        "resnet34_imagenet", "resnet18,resnet18_small", 15, 0.01, 100, "l1")
    assert (dfad.teacher, dfad.epochs, dfad.epoch_itrs, dfad.kd_steps, dfad.lr, dfad.nz, dfad.shared_generator) == (
        "resnet34", 500, 50, 5, 0.1, 256, False)
    assert (strong.loss, strong.T, strong.adv, strong.bn, strong.oh, strong.balance, strong.gen_betas) == (
        "kl", 1.0, 1.0, 1.0, 1.0, 20.0, (0.5, 0.999)) and strong.student_eval_in_g
    rounds = [a.epochs * a.epoch_itrs for a in (official, dfad, strong)]
    assert rounds == [10000, 25000, 8000] and rounds[2] * strong.kd_steps == 80000
    for preset, dataset, teacher, student, _ in akd_gan.PUBLISHED:
        a = parse("--preset", preset)
        assert (a.dataset, a.teacher) == (dataset, teacher) and student in a.student.split(",")
    for word, student in akd_gan.TWO.items():
        assert parse("--student", word).student == parse("--students", word).student == student
    assert parse("--students", "wrn16_1,resnet8").student == "wrn16_1,resnet8"
    assert not parse("--own_generator").shared_generator
    assert parse("--preset", "dfad", "--shared_generator").shared_generator


def test_every_flag_is_read_and_every_equation_marked():
    source = (ROOT / "akd_gan.py").read_text()
    for f in dataclasses.fields(akd_gan.Args):
        both = source + (ROOT / "common.py").read_text()
        assert re.search(rf"\b(args|a|self\.args)\.{f.name}\b|\"{f.name}\"", both), f.name
    numbers = set(re.findall(r"\((\d)\)$", akd_gan.__doc__, re.M))
    assert len(numbers) == 9 and all(f"eq. ({n})" in source.lower() for n in numbers)
    for command in re.findall(r"python akd_gan\.py ([^#\n]+?) *#", akd_gan.__doc__):
        parse(*command.split())


@pytest.mark.parametrize("flags, word", (
    (["--student", "resnet8,resnet8"], "--student"), (["--kd_steps", "0"], "--kd_steps"), (["--T", "0"], "--T"),
    (["--epoch_itrs", "0"], "--epoch_itrs"), (["--gen_betas", "0.5"], "--gen_betas"),
    (["--gen_betas", "0.5,1"], "--gen_betas"), (["--div", "1", "--batch_size", "1"], "--batch_size"),
    (["--adv", "0"], "--adv"), (["--teacher_size", "16"], "--teacher_size"), (["--test_split", "0.1,1.5"], "1.5"),
    (["--test_split", "0.01"], "--test_split"), (["--sample", "4"], "--evaluate"), (["--loss", "l2"], "--loss")))
def test_bad_values_end_with_one_line(folder, flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        small(folder, "--run_name", f"bad{zlib.crc32(str(flags).encode())}", *flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and word in message and message.count("\n") == 1


def test_teacher_without_batch_norm_is_named(folder, capsys):
    net = folder / "plain.py"
    net.write_text("import torch.nn as nn\n\n\ndef net(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), "
                   "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n")
    torch.save(common.build_model(f"{net}:net", 10).state_dict(), folder / "plain.pt")
    with pytest.raises(SystemExit) as stop:
        small(folder, "--teacher", f"{net}:net", "--teacher_ckpt", str(folder / "plain.pt"), "--bn", "1")
    assert stop.value.code == 2 and "--bn 0" in capsys.readouterr().err
