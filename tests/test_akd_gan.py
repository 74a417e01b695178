"""Tests of akd_gan.py. Sizes, seeds, cases and constants of the golden tests come from the file."""
import dataclasses
import json
import math
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import akd_gan
import common
from tools import cases, close, host_syncs, load_golden, metrics, unread

GOLDEN, CONFIG = load_golden("akd_gan")
SUBSETS, SUBSET_CONFIG = load_golden("common")
GONE = {
    r"div/\d+/.*": "a diversity loss that the published code never calls and no preset used",
    r"net/(?!gen)\w+/params|net/\w+/[AB]/.*": "test_common.py compares the same networks",
    r"eval/.*": "test_common.py compares the same scores",
}
ROUND = r"(z|l1|student_tot|gen_tot|student_chk|gen_chk|gen_grad_chk|probe_logits)"
READ = (
    r"config", r"kl/\d+/(s|t|T|loss|grad_s)", r"l1/\d+/(s|t|loss_[SG]|grad_S|gradG_[st])",
    r"subset/(split|batch|idx/\d+|n_eval)",
    r"gen/\w+/(z|eval_out|train_out|train_out_running_(mean|var)|train_chk)",
    r"up/(x|y_s7|y_off|sums)", r"net/x", r"net/\w+/keys", r"net/gen\w+/params",
    rf"step/\w+/{ROUND}", rf"dfad/{ROUND}", r"dfad/lr", r"cos/(lr0|epochs|lr)",
    r"reg/(x|t|s|bn_per_layer|bn|oh|balance|adv_T1|adv_T20|total)",
    r"reg/grad_(bn|oh|balance|adv_T1|total)_stat", r"reg/grad_total",
    r"img/(x|pix|grid|pix_denorm)")
ARCHS = {"student50": "resnet18", "student20": "resnet18_small", "resnet34_8x": "resnet34",
         "teacher224": "resnet34_imagenet"}


def parse(*words):
    return common.parse_args(akd_gan.Args, akd_gan.PRESETS, list(words))


def tensor(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def fill(key, shape, rule):
    """The file's weights are drawn from the name of each entry."""
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


def official_shapes(name):
    """[(key, shape)] of a network, under the names of the published code."""
    rows = [str(row).split(":") for row in GOLDEN[f"net/{name}/keys"]]
    return [(key, tuple(int(n) for n in shape.split("x") if n)) for key, shape in rows]


def shapes(net):
    return [(key, tuple(v.shape)) for key, v in net.state_dict().items()]


def our_key(key):
    return re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))


def golden_net(name, rule, dtype=torch.float32):
    net = common.build_model(ARCHS[name], CONFIG["net"]["classes"])
    state = {our_key(key): fill(key, shape, rule) for key, shape in official_shapes(name)}
    net.load_state_dict(state)
    return net.to(dtype)


def golden_generator(nz, rule, dtype=torch.float32):
    generator = akd_gan.Generator(nz, CONFIG["gen"]["ngf"], CONFIG["gen"]["image"])
    state = generator.state_dict()
    generator.load_state_dict({key: fill(key, v.shape, rule) for key, v in state.items()})
    return generator.to(dtype)


def golden_teacher(name, size, rule, dtype):
    teacher = golden_net(name, rule, dtype)
    if size != GOLDEN["net/x"].shape[-1]:
        teacher = akd_gan.Upsampled(teacher, size)
    return teacher.eval().requires_grad_(False)


def sums(state):
    """A row [sum, sum of abs, L2] for each floating entry, sorted by name."""
    values = [state[key].detach() for key in sorted(state) if state[key].is_floating_point()]
    return np.array([[v.sum(), v.abs().sum(), v.norm()] for v in map(torch.Tensor.double, values)])


def rows_close(ours, reference, tolerance):
    assert ours.shape == reference.shape
    for row, expected in zip(ours, reference):
        close(row, expected, tolerance)


def columns_close(ours, reference, tolerance):
    rows_close(np.asarray(ours).T, reference.T, tolerance)


def total(net):
    flat = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    return np.array([flat.sum(), flat.norm()])


# ----------------------------------------------------------------------------- golden numbers

def test_golden_every_key_is_read_or_gone():
    assert not unread(GOLDEN, *READ, *GONE)


@pytest.mark.parametrize("case", cases(GOLDEN, r"kl/(\d+)/"))
def test_golden_kl(case):
    """The published function takes p + eps for p. That is our KL for logits of it, normalised."""
    s = tensor(f"kl/{case}/s").requires_grad_()
    T, eps = float(GOLDEN[f"kl/{case}/T"]), CONFIG["kl"]["eps"]
    p = F.softmax(tensor(f"kl/{case}/t") / T, 1)
    mass = 1 + eps * p.shape[1]
    kl = akd_gan.kl_distance(s, T * (p + eps).log(), T)
    loss = mass * (kl + T * T * math.log(mass))
    close(loss, GOLDEN[f"kl/{case}/loss"], 1e-5)
    close(torch.autograd.grad(loss, s)[0], GOLDEN[f"kl/{case}/grad_s"], 1e-5)


@pytest.mark.parametrize("case", cases(GOLDEN, r"l1/(\d+)/"))
def test_golden_l1(case):
    args = akd_gan.Args(loss="l1")
    s = tensor(f"l1/{case}/s").requires_grad_()
    t = tensor(f"l1/{case}/t").requires_grad_()
    loss = akd_gan.distance(s, t.detach(), args)
    close(loss, GOLDEN[f"l1/{case}/loss_S"], 1e-6)
    close(torch.autograd.grad(loss, s)[0], GOLDEN[f"l1/{case}/grad_S"], 1e-6)
    loss = -akd_gan.distance(s, t, args)
    close(loss, GOLDEN[f"l1/{case}/loss_G"], 1e-6)
    grad_s, grad_t = torch.autograd.grad(loss, (s, t))
    close(grad_s, GOLDEN[f"l1/{case}/gradG_s"], 1e-6)
    close(grad_t, GOLDEN[f"l1/{case}/gradG_t"], 1e-6)


@pytest.mark.parametrize("i", range(len(GOLDEN["subset/split"])))
def test_golden_subset(i):
    c, share = CONFIG["subset"], float(GOLDEN["subset/split"][i])
    index = akd_gan.test_subset(c["images"], share, c["seed"])
    assert np.array_equal(index, GOLDEN[f"subset/idx/{i}"])
    for j, batch_size in enumerate(GOLDEN["subset/batch"]):
        kept = akd_gan.whole_batches(index, int(batch_size))
        assert len(kept) == GOLDEN["subset/n_eval"][i, j]
        assert torch.equal(kept, index[:len(kept)])


@pytest.mark.parametrize("share", SUBSET_CONFIG["subset"]["fractions"])
def test_golden_subset_of_common(share):
    c, path = SUBSET_CONFIG["subset"], f"subset/akd/{share}"
    index = akd_gan.test_subset(c["images"], float(share), c["seed"]).numpy()
    assert np.array_equal(index[:64], SUBSETS[f"{path}/first64"])
    assert (len(index), index.sum()) == (SUBSETS[f"{path}/count"], SUBSETS[f"{path}/sum"])
    assert zlib.crc32(index.astype("<i8").tobytes()) == SUBSETS[f"{path}/crc32"]
    assert len(akd_gan.whole_batches(index, c["batch"])) == SUBSETS[f"{path}/evaluated"]


@pytest.mark.parametrize("case", CONFIG["gen"]["cases"])
def test_golden_generator(case):
    c, path = CONFIG["gen"]["cases"][case], f"gen/{case}"
    generator, z = golden_generator(c["nz"], c["rule"]), tensor(f"{path}/z")
    assert shapes(generator) == official_shapes(f"generator{c['nz']}")
    count = sum(p.numel() for p in generator.parameters())
    assert count == GOLDEN[f"net/generator{c['nz']}/params"]
    with torch.no_grad():
        close(generator.eval()(z), GOLDEN[f"{path}/eval_out"], 2e-5)
        close(generator.train()(z), GOLDEN[f"{path}/train_out"], 2e-5)
    norm = generator.conv_blocks2[5]
    close(norm.running_mean, GOLDEN[f"{path}/train_out_running_mean"], 1e-6)
    close(norm.running_var, GOLDEN[f"{path}/train_out_running_var"], 1e-6)
    rows_close(sums(generator.state_dict()), GOLDEN[f"{path}/train_chk"], 2e-5)


def test_golden_upsampling():
    y = akd_gan.upsample(tensor("up/x"), CONFIG["up"]["size"])
    close(y[..., ::7, ::7], GOLDEN["up/y_s7"], 2e-6)
    close(y[..., 3::13, 5::11], GOLDEN["up/y_off"], 2e-6)
    close([y.double().sum(), y.double().abs().sum()], GOLDEN["up/sums"], 2e-6)


class Game:
    """Rounds of the file: step 1 with all rows of z but the last, step 2 with that one."""

    def __init__(self, c, dtype):
        self.c, self.dtype = c, dtype
        self.args = akd_gan.Args(loss=c["loss"], amp="none", batch_size=c["batch"])
        self.teacher = golden_teacher(c["teacher"], c["teacher_size"], c["rule"], dtype)
        self.generator = golden_generator(c["nz"], c["rule"], dtype).train()
        self.adam = torch.optim.Adam(self.generator.parameters(), c["lr_G"], c["betas"])

    def student_steps(self, name, z):
        """The student, the loss before each step, and its sums after each."""
        c = self.c
        student = golden_net(name, c["rule"], self.dtype).train()
        optimizer = torch.optim.SGD(
            student.parameters(), c["lr_S"], c["momentum"], weight_decay=c["weight_decay"])
        images, t_logits = akd_gan.make_batches(self.generator, self.teacher, z, self.args)
        losses, totals = [], []
        for x, t in zip(images, t_logits):
            loss, _ = akd_gan.student_step(student, optimizer, x, t, self.args)
            losses.append(loss)
            totals.append(total(student))
        return student, torch.stack(losses), np.array(totals)

    def check(self, name, path):
        z = tensor(f"{path}/z").to(self.dtype)
        assert len(z) == self.c["student_steps"] + 1
        student, losses, totals = self.student_steps(name, z[:-1])
        student.requires_grad_(False)
        terms = akd_gan.generator_step(
            self.generator, self.adam, student, self.teacher, z[-1], self.args)
        close(torch.cat([losses, -terms["loss_adv"][None]]), GOLDEN[f"{path}/l1"], 1e-8)
        columns_close(totals, GOLDEN[f"{path}/student_tot"], 1e-8)
        rows_close(total(self.generator)[:, None], GOLDEN[f"{path}/gen_tot"][:, None], 1e-8)
        gradients = {name: p.grad for name, p in self.generator.named_parameters()}
        columns_close(sums(gradients), GOLDEN[f"{path}/gen_grad_chk"], 1e-8)
        columns_close(sums(self.generator.state_dict()), GOLDEN[f"{path}/gen_chk"], 1e-8)
        columns_close(sums(student.state_dict()), GOLDEN[f"{path}/student_chk"], 1e-8)
        with torch.no_grad():
            probe = student.eval()(tensor("net/x").to(self.dtype))
        close(probe, GOLDEN[f"{path}/probe_logits"], 1e-8)


@pytest.mark.slow
def test_golden_official_epoch():
    game = Game(CONFIG["step"], torch.float64)
    for name in CONFIG["step"]["order"]:  # both against one generator and one Adam
        game.check(CONFIG["step"]["students"][name], f"step/{name}")


@pytest.mark.slow
def test_golden_dfad_epoch():
    Game(CONFIG["dfad"], torch.float64).check(CONFIG["dfad"]["student"], "dfad")


def test_golden_first_steps_in_float32():
    c, n = CONFIG["dfad"], 2
    _, losses, _ = Game(c, torch.float32).student_steps(c["student"], tensor("dfad/z")[:n])
    close(losses, GOLDEN["dfad/l1"][:n], 1e-5)


def test_golden_dfad_rates():
    c = CONFIG["dfad"]
    lr = c["lr"]
    args = akd_gan.Args(
        epochs=lr["epochs"], scheduler="step", lr=c["lr_S"], lr_g=c["lr_G"],
        falls=tuple(m / lr["epochs"] for m in lr["milestones"]))
    first = lr["first_epoch"] - 1  # ours counts from 0
    ours = [akd_gan.rates(epoch, args) for epoch in range(first, first + args.epochs)]
    falls = np.log10(GOLDEN["dfad/lr"] / [args.lr, args.lr_g]) / math.log10(lr["gamma"])
    assert np.abs(np.array(ours) / [args.lr, args.lr_g] - 0.1 ** falls).max() <= 1e-9


def test_golden_cosine_rates():
    lr, epochs = float(GOLDEN["cos/lr0"]), int(GOLDEN["cos/epochs"])
    args = akd_gan.Args(scheduler="cosine", lr=lr, epochs=epochs)
    ours = np.array([akd_gan.rates(epoch, args) for epoch in range(epochs)])
    assert np.abs(ours[:, 0] - GOLDEN["cos/lr"]).max() <= 1e-9
    assert (ours[:, 1] == args.lr_g).all()


def test_golden_generator_loss():
    c = CONFIG["reg"]
    w = c["weights"]
    x = tensor("reg/x").double().requires_grad_()
    teacher = golden_teacher(c["teacher"], x.shape[-1], c["rule"], torch.float64)
    student = golden_net(c["student"], c["rule"], torch.float64).eval().requires_grad_(False)
    args = akd_gan.Args(loss="kl", T=1.0, adv=w["adv_T1"], bn=w["bn"], oh=w["oh"],
                        balance=w["balance"], amp="none")
    loss, terms = akd_gan.generator_loss(x, student, teacher, args)
    assert not any(m._forward_pre_hooks for m in teacher.modules())

    values = {"adv_T1": terms["loss_adv"], "bn": terms["loss_bn"], "oh": terms["loss_oh"],
              "balance": terms["loss_balance"], "total": loss}
    for name, value in values.items():
        close(value, GOLDEN[f"reg/{name}"], 1e-8)
        g = torch.autograd.grad(value, x, retain_graph=True)[0]
        close([g.sum(), g.abs().sum(), g.norm()], GOLDEN[f"reg/grad_{name}_stat"], 1e-8)
    close(g, GOLDEN["reg/grad_total"], 1e-6)

    with torch.no_grad(), akd_gan.watch_batch_norms(teacher) as parts:
        t, s = teacher(x), student(x)
    close(torch.stack(parts), GOLDEN["reg/bn_per_layer"], 1e-8)
    close(t, GOLDEN["reg/t"], 1e-8)
    close(s, GOLDEN["reg/s"], 1e-8)
    close(-akd_gan.kl_distance(s, t, 20.0), GOLDEN["reg/adv_T20"], 1e-8)


def test_golden_images(tmp_path):
    x, c = tensor("img/x"), CONFIG["img"]
    mean, std = (torch.tensor(c[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    akd_gan.write_images((x + 1) / 2, tmp_path / "half")
    akd_gan.write_images(x * std + mean, tmp_path / "cifar")
    assert np.array_equal(Image.open(tmp_path / "half/grid.png"), GOLDEN["img/grid"])
    for folder, key in (("half", "img/pix"), ("cifar", "img/pix_denorm")):
        for i, expected in enumerate(GOLDEN[key]):
            image = Image.open(tmp_path / folder / f"image_{i:03d}.png")
            assert np.array_equal(image, expected)


# ------------------------------------------------------------------------- properties

def test_balance_is_finite_where_a_class_never_occurs():
    t = torch.tensor([[0.0, -1e4, 0.0]] * 4, requires_grad=True)
    loss = akd_gan.balance_loss(t)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(2))
    assert torch.isfinite(t.grad).all()


def test_no_host_sync_in_a_round():
    args = akd_gan.Args(amp="none", batch_size=4, loss="kl", bn=1.0, oh=1.0, balance=20.0)
    teacher = common.build_model("resnet8", 10).eval().requires_grad_(False)
    student = common.build_model("resnet8", 10)
    generator = akd_gan.Generator(12, 8)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    adam = torch.optim.Adam(generator.parameters())
    noise = [torch.randn(4, 12) for _ in range(3)]
    with host_syncs() as syncs:
        images, t_logits = akd_gan.make_batches(generator, teacher, noise[:2], args)
        for x, t in zip(images, t_logits):
            loss, _ = akd_gan.student_step(student, optimizer, x, t, args)
        akd_gan.generator_step(generator, adam, student, teacher, noise[2], args)
        assert syncs == []
        loss.item()
    assert syncs == ["_local_scalar_dense"]  # the counter does count


# ----------------------------------------------------------------- published rows, typed by hand

DFAD = dict(
    teacher="resnet34", student="resnet18", epochs=500, epoch_itrs=50, batch_size=256, kd_steps=5,
    lr=0.1, momentum=0.9, weight_decay=5e-4, loss="l1", scheduler="step", falls=(0.2, 0.4), nz=256,
    ngf=64, lr_g=1e-3, gen_beta1=0.9, shared_generator=False, student_eval_in_g=False, adv=1.0,
    bn=0.0, oh=0.0, balance=0.0, T=1.0, dataset="cifar100")
ROWS = {
    "dfad": DFAD,
    "official": DFAD | dict(
        teacher="resnet34_imagenet", student="resnet18,resnet18_small", epochs=100, epoch_itrs=100,
        kd_steps=15, lr=0.01, scheduler="none", nz=100, shared_generator=True),
    "strong": DFAD | dict(
        epochs=200, epoch_itrs=40, kd_steps=10, loss="kl", gen_beta1=0.5, scheduler="cosine",
        student_eval_in_g=True, bn=1.0, oh=1.0, balance=20.0),
}
ROWS["auto"] = ROWS["official"]


@pytest.mark.parametrize("preset", ROWS)
def test_rows_have_their_values(preset):
    args = dataclasses.asdict(parse("--preset", preset))
    assert {name: args[name] for name in ROWS[preset]} == ROWS[preset]


# ------------------------------------------------------------------------------------ whole runs

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test in a folder of its own, with an untrained teacher in t.pt."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name, *words):
    """A run of seconds, by default with a teacher that knows nothing."""
    if "--data_dir" not in words:
        torch.save(common.build_model("resnet8", 10).state_dict(), "t.pt")
        words = ("--teacher_ckpt", "t.pt", *words)
    akd_gan.main(parse("--smoke", "--device", "cpu", "--ngf", "8", "--batch_size", "8",
                       "--run_name", name, *words))


def test_smoke_run_and_its_pictures(data_dir, folder):
    run("whole", "--data_dir", str(data_dir), "--test_split", "0.5")
    rows = json.loads((folder / "runs/whole/result.json").read_text())
    assert [row["student"] for row in rows] == ["resnet8", "resnet14"]
    assert [row["made_images"] for row in rows] == [2 * 3 * 8] * 2
    logged = set().union(*metrics("runs/whole"))
    for name in ("resnet8", "resnet14"):
        assert logged >= {f"loss_{name}", f"loss_adv_{name}", f"agree_{name}", f"top1_{name}@0.5"}
        assert f"{name}@0.5" in rows[0]["best_of_test_split"]
        assert (folder / f"runs/whole/student_{name}.pt").is_file()
        assert (folder / f"runs/whole/samples/epoch001_{name}.png").is_file()

    akd_gan.main(parse("--sample", "runs/whole/generator_resnet8.pt", "--sample_images", "10"))
    grid = np.asarray(Image.open("runs/whole/samples/grid.png"))
    assert grid.shape == (4 * 34 + 2, 3 * 34 + 2, 3) and grid.std() > 10
    assert len(list((folder / "runs/whole/samples").glob("image_*.png"))) == 10


def test_who_stands_still_in_which_step(monkeypatch):
    """Preset strong, at the two steps that main takes. The training split stays closed."""
    monkeypatch.setattr(common.Data, "train", property(lambda data: pytest.fail("it was read")))
    seen, generators = [], set()
    steps = {"S": akd_gan.student_step, "G": akd_gan.generator_step}

    def student_step(student, optimizer, x, t_logits, args):
        assert student.training and all(p.requires_grad for p in student.parameters())
        assert not x.requires_grad and not t_logits.requires_grad
        seen.append("S")
        return steps["S"](student, optimizer, x, t_logits, args)

    def generator_step(generator, adam, student, teacher, z, args):
        assert generator.training and not teacher.training
        assert not any(p.requires_grad for p in (*student.parameters(), *teacher.parameters()))
        seen.append("G")
        generators.add(generator)
        before = {key: v.clone() for key, v in student.state_dict().items()}
        terms = steps["G"](generator, adam, student, teacher, z, args)
        assert all(torch.equal(before[key], v) for key, v in student.state_dict().items())
        return terms

    monkeypatch.setattr(akd_gan, "student_step", student_step)
    monkeypatch.setattr(akd_gan, "generator_step", generator_step)
    run("strong", "--preset", "strong")
    assert seen == ["S", "S", "G"] * 4
    assert len(generators) == 2  # one for each student


@pytest.mark.slow
def test_resume_is_bit_equal(monkeypatch):
    words = ("--epochs", "2", "--eval_every", "2", "--save_every", "1", "--scheduler", "step")
    torch.manual_seed(0)  # of the teacher
    run("whole", *words)

    class Cut(Exception):
        pass

    end_epoch = common.Run.end_epoch

    def cut(self, epoch, top1=None):
        end_epoch(self, epoch, top1)
        raise Cut

    torch.manual_seed(0)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common.Run, "end_epoch", cut)
        run("cut", *words)
    akd_gan.main(parse("--resume", "runs/cut"))
    assert metrics("runs/whole") == metrics("runs/cut")
    whole, again = (torch.load(f"runs/{name}/ckpt_last.pt", weights_only=True)["objects"]
                    for name in ("whole", "cut"))
    for name in ("student_resnet8", "student_resnet14", "generator_resnet8"):
        assert all(torch.equal(v, again[name][key]) for key, v in whole[name].items())


@pytest.mark.parametrize("words, size", (
    (("--teacher", "resnet34_imagenet"), 224), (("--teacher", "resnet8"), 32),
    (("--teacher", "resnet8", "--teacher_size", "64"), 64)))
def test_which_images_the_teacher_sees(monkeypatch, words, size):
    def get_teacher(args, data, wrap):
        x = wrap(torch.nn.Identity())(torch.zeros(1, 3, 32, 32))
        raise RuntimeError(f"{x.shape[-1]} pixels")

    monkeypatch.setattr(akd_gan, "get_teacher", get_teacher)
    with pytest.raises(RuntimeError, match=f"^{size} pixels"):
        run("size", *words)


@pytest.mark.parametrize("words, named", (
    (("--student", "resnet8,resnet8"), "--student"),
    (("--test_split", "0.001"), "--test_split"), (("--sample", "t.pt"), "t.pt"),
    (("--teacher", "plain.py:net", "--teacher_ckpt", "p.pt", "--bn", "1"), "--bn 0")))
def test_a_wrong_value_is_one_sentence(folder, words, named, capsys):
    (folder / "plain.py").write_text(
        "import torch.nn as nn\n\ndef net(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 4, "
        "3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n")
    torch.save(common.build_model("plain.py:net", 10).state_dict(), "p.pt")
    with pytest.raises(SystemExit) as stop:
        run("bad", *words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count("\n") == 1
    assert not (folder / "runs").exists()


def test_rates_that_no_golden_array_holds():
    official = parse("--preset", "official")
    assert {akd_gan.rates(epoch, official) for epoch in range(100)} == {(0.01, 1e-3)}
    small = parse("--preset", "small_dfad")  # falls at the 18th and the 25th epoch
    lrs_g = [akd_gan.rates(epoch, small)[1] for epoch in (16, 17, 23, 24)]
    assert lrs_g == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])
