"""Tests of pgdi.py. Golden tests take all sizes, seeds and constants from GOLDEN_DIR/pgdi.npz."""
import json
import zlib
from fnmatch import translate
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import pgdi
from tools import cases, close, host_syncs, load_golden, metrics, same_weights, unread

GOLDEN, CONFIG = load_golden("pgdi")
GONE = {
    "feat/*/bn_hooks*": "features come from the convs, as in the published command",
    "mmd/*/l2_*": "only the published distance of features, MMD, is left",
    "fg/l2_*": "the same",
    "sched/*/linear_*": "only the published curriculum, a cosine, is left",
    "sched/*/none_*": "the same",
    "net/*": "test_common.py compares these networks",
    "aug/*": "test_common.py compares crops and flips",
    "eval/*": "test_common.py compares the scores",
    "synth*/losses_float32": "the losses in float64 are compared",
    "kd/*_float32": "the same",
}
READ = (
    "config", "kldiv/*", "adv/*", "bnhook/*", "feat/x_*", "feat/*/all_conv*", "mmd/*/[XY]",
    "mmd/*/mmd*", "mmd/*/kernel_sums", "fg/gen", "fg/targets", "fg/fs_*", "fg/mmd", "lg/*",
    "sched/epochs", "sched/*/config", "sched/*/cosine_*", "sched/lr_*", "fewshot/*", "sampler/*",
    "gen/*", "pool/*", "best/*", "synth/*[!2]", "synthgrad/*[!2]", "kd/*[!2]")
CPU = torch.device("cpu")


def group(prefix):
    """The arrays below a prefix: numbers as tensors, texts as lists of lines."""
    found = {}
    for key in GOLDEN.files:
        if key.startswith(prefix + "/"):
            value = GOLDEN[key]
            text = value.dtype.kind == "U"
            found[key[len(prefix) + 1:]] = (
                str(value).split("\n") if text else torch.from_numpy(np.array(value)))
    return found


def rn(seed, *shape):
    """The standard normal inputs that the golden file does not hold."""
    x = np.random.RandomState(int(seed)).standard_normal([int(n) for n in shape])
    return torch.from_numpy(x.astype(np.float32))


def fill(net, rule="B", salt=""):
    """Rules A and B of the golden file: each weight is drawn with a seed made of its name."""
    state = net.state_dict()
    for key, value in state.items():
        seed = zlib.crc32(((salt if rule == "B" else "") + key).encode())
        n = np.random.RandomState(seed).standard_normal(tuple(value.shape))
        variance, weight = key.endswith("running_var"), key.endswith(".weight")
        if key.endswith("num_batches_tracked"):
            n = np.zeros(())
        elif rule == "A":
            n = np.abs(0.05 * n) + 0.5 if variance else 0.05 * n
        elif variance:
            n = 0.5 + np.abs(n)
        elif value.ndim >= 2:
            n = n * np.sqrt(2 / np.prod(value.shape[1:]))
        else:
            n = weight + 0.1 * n
        state[key] = torch.from_numpy(np.asarray(n, np.float32))
    net.load_state_dict(state)
    return net


def filled_pair(c, size, dtype):
    """Frozen teacher and student of the golden runs."""
    nets = []
    for who in ("teacher", "student"):
        net = fill(common.build_model(c[who], c["num_classes"], size), "B", c["salts"][who])
        nets.append(net.to(dtype).eval().requires_grad_(who == "student"))
    return nets


def keys_of(net):
    return [f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items()]


def make_shots(feat, labels, classes, logits=None, T=2.0):
    logits = torch.zeros(len(feat), 1) if logits is None else logits
    return pgdi.Shots(feat, logits, labels, classes, T)


def own_data(norm="half", size=8):
    x = torch.zeros(3, 3, size, size, dtype=torch.uint8)
    return common.Data("own", lambda split: (x, torch.arange(3), ["a", "b", "c"]), CPU, norm)


# -------------------------------------------------------------------------------- golden numbers

def test_golden_every_key_is_read_or_gone():
    assert not unread(GOLDEN, *map(translate, (*READ, *GONE)))


def test_golden_kl():
    g = group("kldiv")
    s = g["s"].requires_grad_()
    for i, T in enumerate(g["T"].tolist()):
        rows = pgdi.kl_rows(s, g["t"], T)
        close(rows, g["rows"][i], 1e-5)
        close(rows.sum(), g["sum"][i], 1e-5)
        total, pool, real = pgdi.kd_loss(s, g["t"], 0, 0.0, T)
        close(total, g["batchmean"][i], 1e-5)
        assert pool == total and real == 0
        close(pgdi.kd_loss(s, g["t"], 0, 0.25, T)[0], 0.75 * total.detach(), 1e-6)  # it stays
        close(torch.autograd.grad(total, s)[0], g["grad_s"][i], 1e-5)


def test_golden_adversarial_term():
    g = group("adv")
    s, t = g["s"].requires_grad_(), g["t"].requires_grad_()
    assert torch.equal((s.argmax(1) == t.argmax(1)).to(g["mask"]), g["mask"])
    loss = pgdi.adv_loss(s, t)
    close(loss, g["loss"], 1e-5)
    close(torch.autograd.grad(loss, s)[0], g["grad_s"], 1e-5)
    assert not pgdi.adv_loss(s.detach(), t).requires_grad
    assert pgdi.adv_loss(s.detach(), t, teacher_grad=True).requires_grad


@pytest.mark.parametrize("kind", ("plain", "mmt"))
def test_golden_bn_term(kind):
    g = group("bnhook")
    bn = nn.BatchNorm2d(g["x"].shape[2]).eval()
    bn.running_mean.copy_(g["running_mean"])
    bn.running_var.copy_(g["running_var"])
    share = CONFIG["bnhook"]["momentum"] if kind == "mmt" else 0.0
    judges = pgdi.Judges(bn, None, pgdi.stored_statistics(bn, g["x"][0]))
    values = []
    for x in g["x"]:
        x.requires_grad_()
        _, now, _ = pgdi.observe(bn, x)
        blended = pgdi.blend(now, judges.average, share)
        loss = pgdi.bn_loss(blended, judges.running, judges.sizes)
        judges.average = pgdi.blend(now.detach(), judges.average, share)
        values.append(loss.item())
    close(values, g[f"{kind}_r"], 1e-5)
    close(torch.autograd.grad(loss, x)[0], g[f"{kind}_grad_last"], 1e-5)
    if kind == "mmt":
        close(judges.average, torch.stack([g["mmt_mean"], g["mmt_var"]]), 1e-5)


@pytest.mark.parametrize("name", cases(GOLDEN, r"feat/(\w+)/all_conv$"))
def test_golden_features(name):
    c, g = CONFIG["feat"], group("feat")
    x = rn(g["x_seed"], *g["x_shape"]).requires_grad_()
    net = fill(common.build_model(name, c["classes"], x.shape[-1]), c["rule"], c["salt"]).eval()
    _, _, feat = pgdi.observe(net.requires_grad_(False), x)
    close(feat, g[f"{name}/all_conv"], 1e-4)
    assert not feat.requires_grad and pgdi.observe(net, x, feature_grad=True)[2].requires_grad
    convs = [key for key, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    assert convs == [key.replace("downsample", "shortcut") for key in g[f"{name}/all_conv_order"]]


@pytest.mark.parametrize("case", cases(GOLDEN, r"mmd/(\w+)/X"))
def test_golden_class_distance(case, monkeypatch):
    monkeypatch.setattr(pgdi, "SIGMAS", tuple(CONFIG["mmd"]["sigmas"]))
    g = group(f"mmd/{case}")
    x, tolerance = g["X"].requires_grad_(), 1e-3 if case == "wide" else 1e-4
    targets = torch.zeros(len(x), dtype=torch.long)
    shots = make_shots(g["Y"], torch.zeros(len(g["Y"]), dtype=torch.long), 1)
    loss = pgdi.feature_prior(x, targets, shots)
    close(loss, g["mmd"], tolerance)
    close(torch.autograd.grad(loss, x)[0], g["mmd_grad_X"], tolerance)
    made, cross = pgdi.kernel_sums(x, torch.ones(len(x), 1), targets, shots)
    close(torch.cat([made, shots.kernel_sum, cross]), g["kernel_sums"], 1e-4)


def test_golden_feature_prior():
    g = group("fg")
    shots = make_shots(g["fs_feat"], g["fs_labels"], CONFIG["fg"]["classes"])
    close(pgdi.feature_prior(g["gen"], g["targets"], shots), g["mmd"], 1e-5)


@pytest.mark.parametrize("kind", cases(GOLDEN, r"lg/(\w+)/total"))
def test_golden_logits_prior(kind):
    c, g = CONFIG["lg"], group("lg")
    t, y, real = g["logits"].requires_grad_(), g["targets"], g["fs_logits"]
    shots = make_shots(torch.zeros(len(real), 1), g["fs_labels"], c["classes"], real, c["T"])
    kl, l2 = pgdi.label_prior(t, y, shots), pgdi.nearest_prior(t, y, shots)
    totals = {"kl_softmax": kl, "min_l2_logits": l2,
              "hybrid_kl_min_l2": pgdi.logits_prior(t, y, shots, c["alpha"])}
    close(totals[kind], g[f"{kind}/total"], 1e-5)
    for name, part in (("kl", kl), ("l2", l2)):
        if g[f"{kind}/{name}"] != 0:  # else the kind does not have it
            close(part, g[f"{kind}/{name}"], 1e-5)
    close(torch.autograd.grad(totals[kind], t)[0], g[f"{kind}/grad"], 1e-5)


@pytest.mark.parametrize("case", CONFIG["sched"]["cases"])
def test_golden_curriculum(case):
    c, g = dict(CONFIG["sched"]["cases"][case]), group("sched")
    assert json.loads(g[f"{case}/config"][0]).items() <= c.items()
    n_shots = c.pop("num_real")
    mixtures = [pgdi.mixture_at(int(epoch), pgdi.Args(**c), n_shots) for epoch in g["epochs"]]
    alpha, n_real = zip(*mixtures)
    assert np.abs(np.array(alpha) - g[f"{case}/cosine_alpha"].numpy()).max() <= 1e-12
    assert list(n_real) == g[f"{case}/cosine_nreal"].tolist()


@pytest.mark.parametrize("case", CONFIG["sched"]["lr"])
def test_golden_learning_rate(case):
    c = CONFIG["sched"]["lr"][case]
    args = pgdi.Args(lr=c["base"], lr_tmax=c["T_max"], warmup=c["warmup"])
    ours = np.array([pgdi.lr_at(epoch, args) for epoch in range(c["epochs"])])
    assert np.abs(ours - GOLDEN[f"sched/{case}"]).max() <= 1e-9


def test_golden_shots():
    g = group("fewshot")
    index = torch.tensor(pgdi.pick_shots(g["labels"].numpy(), int(g["shots"]), int(g["seed"])))
    assert torch.equal(index, g["indices"]) and torch.equal(g["labels"][index], g["out_labels"])
    x = torch.zeros(len(index), 3, 8, 8, dtype=torch.uint8)
    x[:, 0], x[:, 1] = (index % 256)[:, None, None], (index // 256)[:, None, None]
    pixel = own_data(CONFIG["fewshot"]["norm"]).normalize(x)[:, :, 0, 0]
    assert (pixel - g["pixel0"]).abs().max() <= 1e-6

    golden, _ = load_golden("common")
    for case in cases(golden, r"fewshot/pgdi/(\d+)/indices"):
        path = f"fewshot/pgdi/{case}"
        seed, n = golden[f"{path}/seed_shots"].tolist()
        ours = pgdi.pick_shots(golden[f"{path}/labels"], n, seed)
        assert np.array_equal(ours, golden[f"{path}/indices"])


@pytest.mark.parametrize("case", cases(GOLDEN, r"sampler/(\w+)/labels"))
def test_golden_balanced_sampler(case):
    g = group(f"sampler/{case}")
    two_passes = torch.cat([g["pass1"], g["pass2"]])
    assert len(two_passes) == 2 * int(g["len"])
    draw = np.random.RandomState(int(g["seed"]))
    ours = pgdi.balanced_batches(g["labels"].numpy(), int(g["batch_size"]), len(two_passes), draw)
    assert np.array_equal(ours, two_passes)


@pytest.mark.parametrize("size", CONFIG["gen"])
def test_golden_generator(size):
    c, g = CONFIG["gen"][size], group(f"gen/{size}")
    assert g["nz_ngf"].tolist() == [c["nz"], c["ngf"]]
    net = pgdi.Generator(c["nz"], c["ngf"], int(size))
    assert keys_of(net) == g["keys"]
    assert sum(p.numel() for p in net.parameters()) == int(g["nparams"])
    for rule in ("A", "B"):
        fill(net, rule, c["salt"])
        for mode in ("eval", "train"):
            with torch.no_grad():
                x = net.train(mode == "train")(g["z"])[:c["images_kept"]]
            close(x[:, :, ::c["stride"], ::c["stride"]], g[f"{rule}/img_{mode}"], 1e-4)
        close(net.conv_blocks[3].running_var, g[f"{rule}/running_var_after"], 1e-4)


def test_golden_pool():
    x = group("pool")
    pool = pgdi.Pool(2 * len(x["x"]), x["x"].shape[-1], CPU)
    pool.add(common.quantize(x["x"]))
    assert torch.equal(pool.state_dict()["images"], x["u8"])


def test_golden_best_iterate():
    for totals, winner in zip(*group("best").values()):
        best = lowest = None
        for i, total in enumerate(totals):
            best, lowest = pgdi.keep_best(best, lowest, torch.full((2, 3), float(i)), total)
        assert best.eq(int(winner)).all() and lowest == totals[int(winner)]


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ("synth", "synthgrad"))
def test_golden_synthesis(prefix, dtype=torch.float64):
    """Whole calls of the golden file: losses, generator, statistics and images."""
    c, g, inputs = CONFIG["synth"], group(prefix), group("synth")
    assert json.loads(inputs["config"][0]).items() <= c.items()
    assert not inputs["feature_term_changes_generator"]
    flags = {name: c[name] for name in (
        "warmup", "lr_g", "lr_z", "adv", "bn", "oh", "bn_mmt", "guidance_loss_w",
        "logits_guidance_w")}
    args = pgdi.Args(**flags, g_steps=c["iterations"], amp="none",
                     feature_grad=prefix == "synthgrad")
    teacher, student = filled_pair(c, c["size"], dtype)
    generator = pgdi.Generator(c["nz"], c["ngf"], c["size"])
    fill(generator, "B", c["salts"]["generator"]).to(dtype)
    meta = torch.optim.Adam(
        generator.parameters(), c["lr_g"] * c["iterations"], tuple(c["adam_betas"]))
    mean, std = torch.tensor(common.NORMS[c["norm"]], dtype=dtype).view(2, 1, 3, 1, 1)
    labels = torch.arange(c["num_classes"]).repeat_interleave(c["shots"])
    v_real = rn(inputs["fewshot_seed"], len(labels), 3, c["size"], c["size"]).to(dtype)
    shots, _ = pgdi.see_shots(teacher, v_real, labels, c["num_classes"])
    judges = pgdi.Judges(teacher, shots, pgdi.stored_statistics(teacher, v_real))

    tolerance = 1e-9
    for j in range(c["calls"]):
        z = rn(inputs["z_seed0"] + j, c["batch"], c["nz"]).to(dtype)
        draw = np.random.RandomState(int(inputs["target_seed0"]) + j)
        y = torch.from_numpy(np.sort(draw.randint(0, c["num_classes"], c["batch"])))
        judges.student = student if j + 1 >= c["warmup"] else None
        best, history = pgdi.invert(generator, z, y, lambda x: (x - mean) / std, judges, args)
        meta.step()
        for column, name in enumerate(inputs["columns"]):
            if name in ("total", "bn", "oh", "adv", "feat", "logits"):
                ours = [float(terms.get(name, 0)) for terms in history]
                close(ours, g["losses"][j, :, column], tolerance)
        close(best.mean((2, 3)), g["best_channel_mean"][j], tolerance)
        sums = [(p.sum().item(), p.abs().sum().item()) for p in generator.parameters()]
        close(np.array(sums), g["generator_sum_abssum"][j], tolerance)
    by_layer = [layer.flatten() for layer in judges.average.split(judges.sizes, 1)]
    close(torch.cat(by_layer), g["bn_mmt"], tolerance)
    close(torch.cat([p.flatten() for p in generator.parameters()]), g["generator_last"], 1e-6)


def test_golden_kd_steps(dtype=torch.float64):
    c, g = CONFIG["kd"], group("kd")
    assert json.loads(g["config"][0]).items() <= c.items()
    teacher, student = filled_pair(c, 32, dtype)
    args = pgdi.Args(
        T=c["T"], amp="none", alpha_initial=c["alpha_initial"], alpha_final_stage=c["alpha_final"],
        real_fewshot_initial=c["real_initial"], real_fewshot_final_stage=c["real_final"],
        mixed_distill_stop_epoch=c["stop_epoch"])
    labels = torch.arange(c["num_classes"]).repeat_interleave(c["shots"])
    v_real = rn(g["fewshot_seed"], len(labels), 3, 32, 32).to(dtype)
    _, t_real = pgdi.see_shots(teacher, v_real, labels, c["num_classes"])
    alpha, n_real = pgdi.mixture_at(c["epoch"], args, len(labels))
    draw = np.random.RandomState(int(g["np_seed"]))
    real = pgdi.balanced_batches(labels.numpy(), n_real, c["steps"], draw)
    assert n_real == c["real_batch"] and np.array_equal(real, g["real_indices"])

    student.train()
    sgd = torch.optim.SGD(
        student.parameters(), c["lr"], c["momentum"], weight_decay=c["weight_decay"])
    losses = []
    for k, index in enumerate(torch.from_numpy(real)):
        x = rn(g["x_seed0"] + k, c["batch"], 3, 32, 32).to(dtype)
        t_logits = torch.cat([teacher(x), t_real[index]])
        x = torch.cat([x, v_real[index]])
        losses += [torch.stack(pgdi.kd_step(student, sgd, x, t_logits, n_real, alpha, args))]
    losses, state = torch.stack(losses), student.state_dict()
    close(losses[:, 0], g["loss_total"], 1e-10)
    close(losses[:, 1:], g["loss_synth_real"], 1e-10)
    assert list(state) == g["state_keys"]
    sums = [(v.double().sum().item(), v.double().abs().sum().item()) for v in state.values()]
    close(np.array(sums), g["state_sum_abssum"], 1e-10)
    for key in ("fc.weight", "bn1.running_mean", "bn1.running_var"):
        close(state[key], g[key.replace(".", "_")], 1e-10)


# ------------------------------------------------------------------------------------ properties

def test_priors_of_classes_without_shots_and_of_equal_sets():
    x, logits = torch.randn(6, 4), torch.randn(6, 5)
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    shots = make_shots(x, y, 3, logits)
    assert pgdi.feature_prior(x, y, shots) == 0  # the unbiased estimate is negative here
    assert pgdi.nearest_prior(logits, y, shots) == 0 < pgdi.label_prior(logits, y, shots)
    unknown = torch.full((6,), 2)
    assert pgdi.feature_prior(x, unknown, shots) == pgdi.logits_prior(logits, unknown, shots) == 0


class Skew(nn.Module):
    """Registers its batch norms in another order than it runs them, and one that it never runs."""

    def __init__(self):
        super().__init__()
        self.late, self.unused, self.early = map(nn.BatchNorm2d, (8, 5, 3))
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.late(self.conv(self.early(x))).mean((2, 3))


def test_statistics_are_compared_with_those_of_their_own_layer():
    """A teacher that has seen one batch only finds nothing to mend in that batch."""
    teacher, x = Skew(), 2 + 3 * torch.randn(64, 3, 8, 8)
    teacher.early.momentum = teacher.late.momentum = 1.0
    teacher(x)
    for m, pixels in ((teacher.early, 64), (teacher.late, 36)):
        m.running_var *= 1 - 1 / (64 * pixels)  # biased
    teacher.eval()
    judges = pgdi.Judges(teacher, None, pgdi.stored_statistics(teacher, x[:2]))
    _, now, _ = pgdi.observe(teacher, x)
    assert pgdi.bn_loss(now, judges.running, judges.sizes) < 1e-3
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_resets():
    def redrawn(epoch, args):
        generator = pgdi.Generator(ngf=4)
        before = {key: value.clone() for key, value in generator.state_dict().items()}
        pgdi.reset(generator, args, epoch - 1)
        return {key for key, value in generator.state_dict().items()
                if not torch.equal(before[key], value)}

    first = {"l1.0.weight", "l1.0.bias", "conv_blocks.0.weight"}
    norms = {"conv_blocks.0.weight", "conv_blocks.3.weight", "conv_blocks.7.weight"}
    auto, fast = parse(), parse("--preset", "fast")
    assert redrawn(200, auto) == redrawn(400, auto) == first | norms
    assert redrawn(199, auto) == redrawn(140, auto) == redrawn(200, fast) == set()
    assert redrawn(140, fast) == first
    assert redrawn(200, parse("--reset_l0", "0")) == norms


def test_each_pass_over_the_pool_gives_every_image_once():
    data, pool, rng = own_data(), pgdi.Pool(20, 8, CPU), torch.Generator().manual_seed(0)
    for marks in (torch.arange(1, 14), torch.arange(14, 19)):
        pool.add(marks[:, None, None, None].expand(-1, 3, 8, 8).byte())

    def mark(x):
        return (data.denormalize(x).flatten(1).amax(1) * 255).round()

    batches = pgdi.pool_batches(pool, 5, lambda x: data.augment(x, rng), mark, rng)
    found = [next(batches) for _ in range(8)]
    assert [len(x) for x, _ in found] == [5, 5, 5, 3] * 2
    assert all(torch.equal(mark(x), t_logits) for x, t_logits in found)  # each with its own
    marks = torch.cat([t_logits for _, t_logits in found]).int().tolist()
    assert sorted(marks[:18]) == sorted(marks[18:]) == list(range(1, 19))
    assert marks[:18] != marks[18:]


def test_no_host_sync_in_a_step():
    data, rng = own_data(size=32), torch.Generator().manual_seed(0)
    teacher = common.build_model("wrn16_1", 10).eval().requires_grad_(False)
    student, generator = common.build_model("resnet8", 10), pgdi.Generator(ngf=8)
    v, y = torch.randn(20, 3, 32, 32), torch.arange(20) // 2
    shots, t_real = pgdi.see_shots(teacher, v, y, 10)
    judges = pgdi.Judges(teacher, shots, pgdi.stored_statistics(teacher, v))
    judges.student = student
    pool, sgd = pgdi.Pool(20, 32, CPU), torch.optim.SGD(student.parameters(), 0.1)
    args = pgdi.Args(g_steps=2, feature_grad=True, amp="none")
    z, index = torch.randn(20, 256), y[:4]

    def augment(x):
        return data.augment(x, rng)

    with host_syncs() as syncs:
        images, _ = pgdi.invert(generator, z, y, augment, judges, args)
        pool.add(common.quantize(images))
        assert syncs == []  # synthesis
        x, t_logits = next(pgdi.pool_batches(pool, 8, augment, lambda x: teacher(x).detach(), rng))
        x, t_logits = torch.cat([x, v[index]]), torch.cat([t_logits, t_real[index]])
        pgdi.kd_step(student, sgd, x, t_logits, 4, 0.5, args)
        assert syncs == []  # distillation
        images.sum().item()
    assert syncs == ["_local_scalar_dense"]  # the counter does count


# ----------------------------------------------------------------------------- flags and presets

PAIRS = (("resnet34", "resnet18"), ("vgg11", "resnet18"), ("wrn40_2", "wrn16_1"),
         ("wrn40_2", "wrn40_1"), ("wrn40_2", "wrn16_2"))
SCRIPT = dict(  # the one published script, whose values serve every pair
    shots=5, epochs=200, warmup=20, kd_steps=400, batch_size=256, synthesis_batch_size=512, lr=0.2,
    momentum=0.9, weight_decay=1e-4, lr_tmax=200, T=20.0, g_steps=10, lr_g=5e-3, lr_z=0.015, ngf=64,
    adv=1.33, bn=5.0, oh=0.001, bn_mmt=0.9, reset_l0=200, reset_bn=200, reset_once=0,
    adv_teacher_grad=False, feature_grad=False, guidance_loss_w=100.0, logits_guidance_w=1.0,
    real_fewshot_initial=256, real_fewshot_final_stage=8, alpha_initial=0.9, alpha_final_stage=0.2,
    mixed_distill_stop_epoch=100, augment_real=False)
FAST = SCRIPT | dict(
    shots=0, epochs=220, synthesis_batch_size=256, bn=10.0, lr_g=2e-3, lr_z=0.01, reset_once=140,
    adv_teacher_grad=True, reset_l0=0, reset_bn=0, guidance_loss_w=0.0, logits_guidance_w=0.0,
    real_fewshot_initial=0, real_fewshot_final_stage=0, alpha_initial=0.0, alpha_final_stage=0.0)
FAST_ADV_OH = {"resnet34": (1.33, 0.5), "vgg11": (1.0, 0.5), "wrn40_2": (1.1, 0.4)}
ONLY_REAL = dict(g_steps=0, warmup=0, alpha_initial=1.0, alpha_final_stage=1.0,
                 real_fewshot_final_stage=256, augment_real=True)


def parse(*flags):
    return common.parse_args(pgdi.Args, pgdi.PRESETS, list(flags))


def has(args, expected):
    return {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("dataset", ("cifar10", "cifar100"))
@pytest.mark.parametrize("teacher, student", PAIRS)
def test_published_rows(dataset, teacher, student):
    pair = ("--dataset", dataset, "--teacher", teacher, "--student", student)
    assert has(parse(*pair), SCRIPT)
    assert has(parse("--preset", "described", *pair), SCRIPT | dict(feature_grad=True))
    assert has(parse("--preset", "fewshot_kd", *pair), SCRIPT | ONLY_REAL)
    adv, oh = FAST_ADV_OH[teacher]
    assert has(parse("--preset", "fast", *pair), FAST | dict(adv=adv, oh=oh))
    epochs = 1200 if teacher == "resnet34" else 800
    long = SCRIPT | dict(epochs=epochs, mixed_distill_stop_epoch=300)
    assert has(parse("--preset", "long", *pair), long)


def test_published_command():
    args = parse(
        *"--method PGDI --dataset cifar100 --teacher wrn40_2 --student wrn16_1 --epochs 200"
        " --fewshot_n_per_class 5 --synthesis_batch_size 512 --wd 1e-4".split())
    assert has(args, SCRIPT)


@pytest.mark.parametrize("flags, word", (
    (["--shots", "0"], "--preset fast"), (["--warmup", "200"], "--epochs"),
    (["--g_steps", "0", "--real_fewshot_final_stage", "0"], "--preset fewshot_kd")))
def test_what_cannot_work_is_said_before_anything_is_read(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        pgdi.main(parse(*flags, "--data_dir", "/nowhere"))
    assert stop.value.code == 2 and word in capsys.readouterr().err


# ------------------------------------------------------------------------------------ whole runs

def run(data_dir, name, *flags):
    """A smoke run in the working directory; -> its folder and its result."""
    pgdi.main(parse("--smoke", "--log_every", "1", "--data_dir", str(data_dir), "--run_name", name,
                    *flags))
    return Path("runs", name), json.loads(Path("runs", name, "result.json").read_text())[0]


def test_whole_run(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, result = run(data_dir, "whole")
    assert (result["real_images"], result["made_images"]) == (50, 64)
    assert (folder / "samples" / "epoch002.png").is_file()
    assert len(json.loads((folder / "config.json").read_text())["shots"]) == 50
    assert set().union(*metrics(folder)) >= {
        "total", "bn", "oh", "adv", "feat", "logits", "loss", "loss_pool", "loss_real", "alpha"}


def test_fast_never_opens_the_training_split(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = common.read_shapes
    opened = []

    def read(split):
        opened.append(split)
        return original(split)

    args = parse("--smoke", "--data_dir", str(data_dir))
    common.get_teacher(args, common.load_data(args, CPU))  # trained, if no other test did it
    monkeypatch.setattr(common, "read_shapes", read)
    folder, result = run(data_dir, "fast", "--preset", "fast")
    assert opened == ["test"] and (result["real_images"], result["made_images"]) == (0, 64)
    rows = [row for row in metrics(folder) if "loss" in row]
    assert all(row["loss"] == row["loss_pool"] and row["n_real"] == 0 for row in rows)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name, init", (
    ("resnet18", "default"), ("resnet50", "default"), ("resnet20", "kaiming")))
def test_first_weights_of_the_student(name, init, monkeypatch, data_dir, tmp_path):
    """Torch's own for ResNet-18, 34 and 50, and for nothing else."""
    monkeypatch.chdir(tmp_path)

    def build(name, num_classes, image_size, init):
        raise Stop(init)

    monkeypatch.setattr(pgdi, "build_model", build)
    with pytest.raises(Stop, match=init):
        pgdi.main(parse("--smoke", "--data_dir", str(data_dir), "--student", name))


@pytest.mark.slow
def test_resume_is_bit_equal(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--epochs", "3", "--save_every", "1", "--reset_l0", "2", "--reset_bn", "2")
    full, _ = run(data_dir, "full", *flags)
    end_epoch = common.Run.end_epoch

    def stop_after_two(self, epoch, top1=None):
        end_epoch(self, epoch, top1)
        if epoch == 1:
            raise Stop

    monkeypatch.setattr(common.Run, "end_epoch", stop_after_two)
    with pytest.raises(Stop):
        run(data_dir, "cut", *flags)
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    pgdi.main(parse("--resume", "runs/cut"))
    assert metrics(full) == metrics("runs/cut") and same_weights(full, "runs/cut")
    a, b = (torch.load(Path(f, "ckpt_last.pt"))["objects"] for f in (full, "runs/cut"))
    assert torch.equal(a["pool"]["images"], b["pool"]["images"])
    assert torch.equal(a["judges"]["average"], b["judges"]["average"])
    assert all(torch.equal(a["generator"][key], b["generator"][key]) for key in a["generator"])


def test_the_kept_images_are_those_of_the_lowest_loss(monkeypatch):
    values, seen = iter((3.0, 1.0, 2.0)), []
    monkeypatch.setattr(pgdi, "bn_loss", lambda now, *_: now.sum() * 0 + next(values))
    args = pgdi.Args(g_steps=3, oh=0, bn=1, guidance_loss_w=0, logits_guidance_w=0, amp="none")
    teacher = common.build_model("resnet8", 10).eval().requires_grad_(False)
    judges = pgdi.Judges(teacher, None, pgdi.stored_statistics(teacher, torch.zeros(2, 3, 32, 32)))

    def augment(x):
        seen.append(x.detach().clone())
        return x

    z, targets = torch.randn(4, 256), torch.arange(4)
    best, _ = pgdi.invert(pgdi.Generator(ngf=8), z, targets, augment, judges, args)
    assert torch.equal(best, seen[1])


def test_real_images_alone(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--preset", "fewshot_kd", "--g_steps", "0", "--warmup", "0", "--shots", "3")
    folder, result = run(data_dir, "real", *flags)
    assert (result["real_images"], result["made_images"]) == (30, 0)
    rows = [row for row in metrics(folder) if "loss" in row]
    assert len(rows) == 8 and all(row["loss"] == row["loss_real"] for row in rows)
