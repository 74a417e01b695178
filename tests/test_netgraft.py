"""Tests of netgraft.py. The golden ones take sizes, seeds and cases from the file in GOLDEN_DIR."""
import copy
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import netgraft
from tools import ROOT, cases, close, host_syncs, load_golden, metrics, same_weights, unread

GOLDEN, CONFIG = load_golden("netgraft")
COMMON, COMMON_CONFIG = load_golden("common")
SALT = str(GOLDEN["fill_salt"])
PAIR = ("netgraft_vgg16", "netgraft_vgg16_student")
READ = (
    r"config|fill_salt|count/c\d+|hp/shots",
    r"sel/c\d+/(labels|within_class|global_n\d+)",
    r"hp/c\d+/(s[12]_batch|steps_per_epoch|s1_lr_(block|t2s|s2t)|s2_lr|s[12]_epochs)",
    r"loss/\w+/(student|teacher|(norm|raw)(_epoch_mean|_grad)?)",
    r"net/c\d+/(x|teacher|teacher_block[234]|graft_b[012]|graft_len[23]|plain_student)",
    r"fold/c\d+/(P_rows8|c|conv_weight_row0|conv_weight_sum_l2|bias_map|head_w|head_b)",
    r"fold/c\d+/(logits|naive_logits|teacher_head_w_sum_l2|teacher_head_b)",
    r"step/c\d+_n\d+(_raw)?/(x_u8|(s1_b[012]|s2_len[23])_(loss|names|stats))",
    r"aug/c\d+/(img_u8|top_left_flip|out|test_out)")
GONE = {r"eval/.*": "test_common.py compares the same scores"}
COMMON_READ = r"net/netgraft/.+|fewshot/netgraft/[^/]+/positions"  # the first in test_common.py
COMMON_GONE = {
    r"fewshot/netgraft/[^/]+/sorted_index": "no map for copies of CIFAR in another order",
}


def group(prefix):
    """{last part of the key: array} of all keys below a prefix."""
    return {key.split("/")[-1]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{prefix}/")}


def parse(*argv):
    return common.parse_args(netgraft.Args, netgraft.PRESETS, [str(word) for word in argv])


def column(classes, shots=10):
    """The settings of the published row for so many classes."""
    return parse("--dataset", "cifar10" if classes <= 10 else "cifar100", "--shots", shots)


@cache
def filled(key, shape, salt=SALT):
    """The weights that belong to the name of a state dict entry."""
    seed = zlib.crc32((salt + key).encode()) & 0xffffffff
    w = np.random.RandomState(seed).standard_normal(shape) * 0.05
    w = np.abs(w.astype(np.float32)) + 0.5 if key.endswith("running_var") else w.astype(np.float32)
    return torch.from_numpy(np.asarray(w))


def official(key):
    """Our name of a scion's weight -> the published one: its parts are numbered."""
    b, part, rest = key.split(".", 2)
    first = b == "0"  # the first graft has no 1x1 conv before its block
    return f"{b}.{dict(t2s=0, block=1 - first, s2t=2 - first)[part]}.{rest}"


def fill(module, rename=str):
    state = {}
    for key, value in module.state_dict().items():
        counter = key.endswith("num_batches_tracked")
        state[key] = torch.zeros_like(value) if counter else filled(rename(key), tuple(value.shape))
    module.load_state_dict(state)
    return module


def golden_pair(classes):
    """(teacher, Pair), filled by the published key names."""
    teacher, student = (common.build_model(name, classes) for name in PAIR)
    fill(teacher.eval().requires_grad_(False))
    pair = netgraft.match(teacher, student, 32)
    fill(pair.scion, official)
    return teacher, pair


def fake_data(x, norm="cifar10", classes=10):
    """A Data of uint8 images (N, 3, S, S), without files."""
    y = torch.arange(len(x)) % classes
    names = [str(c) for c in range(classes)]
    read = lambda split: (torch.as_tensor(x), y, names)  # noqa: E731
    return common.Data("fake", read, torch.device("cpu"), norm)


# ------------------------------------------------------------------------------------- golden

def test_golden_every_key_is_read_or_gone():
    assert not unread(GOLDEN, *READ, *GONE)
    ours = [key for key in unread(COMMON, COMMON_READ, *COMMON_GONE) if "/netgraft/" in key]
    assert not ours


@pytest.mark.parametrize("case", cases(GOLDEN, r"sel/(c\d\w*)/"))
def test_golden_shots(case):
    config, g = CONFIG["sel"][case], group(f"sel/{case}")
    for shots in config["shots"]:
        index = netgraft.pick_shots(g["labels"], shots, config["seed"])
        assert np.array_equal(index, g[f"global_n{shots}"])
    deepest = g["within_class"].shape[1]
    index = netgraft.pick_shots(g["labels"], deepest, config["seed"]).reshape(-1, deepest)
    for c, places in enumerate(g["within_class"]):
        assert np.array_equal(np.flatnonzero(g["labels"] == c)[places], index[c])


@pytest.mark.parametrize("name", COMMON_CONFIG["fewshot"].get("netgraft", {}))
def test_golden_shots_in_file_order(name):
    c = COMMON_CONFIG["fewshot"]["netgraft"][name]
    labels = np.repeat(np.arange(c["classes"]), c["per_class"])
    index = netgraft.pick_shots(labels, c["shots"], c["seed"]).reshape(c["classes"], -1)
    starts = np.arange(c["classes"])[:, None] * c["per_class"]
    assert np.array_equal(index - starts, COMMON[f"fewshot/netgraft/{name}/positions"])


def small_scion(n=3):
    """Grafts as in VGG16: no 1x1 conv before the first one and behind the last one."""
    scion = nn.Sequential()
    for b in range(n):
        t2s, s2t = (nn.Conv2d(2, 2, 1) if inner else nn.Identity() for inner in (b > 0, b < n - 1))
        scion.append(netgraft.Graft(nn.Linear(2, 2), t2s, s2t))
    return scion


@pytest.mark.parametrize("case", cases(GOLDEN, r"hp/(c\d\w*)/"))
def test_golden_schedule(case):
    classes, g = int(case[1:]), group(f"hp/{case}")
    for i, shots in enumerate(GOLDEN["hp/shots"].tolist()):
        phases = netgraft.make_phases(small_scion(), column(classes, shots), shots)
        assert [p.end - p.begin for p in phases] == [*g["s1_epochs"], *g["s2_epochs"]]
        assert [p.batch_size for p in phases] == [g["s1_batch"][i]] * 3 + [g["s2_batch"][i]] * 2
        batches = netgraft.make_batches(classes * shots, phases[0].batch_size, torch.Generator())
        assert len(batches) == g["steps_per_epoch"][i]
        found = [[part["lr"] for part in phase.optimizer.param_groups] for phase in phases]
        block, t2s, s2t = zip(*found[:3])
        np.testing.assert_allclose(block, g["s1_lr_block"][i], rtol=1e-12)
        np.testing.assert_allclose(t2s[1:], g["s1_lr_t2s"][i], rtol=1e-12)
        np.testing.assert_allclose(s2t[:2], g["s1_lr_s2t"][i], rtol=1e-12)
        np.testing.assert_allclose(found[3:], g["s2_lr"][i], rtol=1e-12)


@pytest.mark.parametrize("case", cases(GOLDEN, r"loss/(\w+)/"))
@pytest.mark.parametrize("kind, loss_fn", (("norm", netgraft.norm_mse), ("raw", F.mse_loss)))
def test_golden_loss(case, kind, loss_fn):
    g = group(f"loss/{case}")
    s = torch.from_numpy(g["student"]).requires_grad_()
    loss = loss_fn(s, torch.from_numpy(g["teacher"]))
    np.testing.assert_allclose(loss.item(), g[kind], rtol=1e-5)
    np.testing.assert_allclose(loss.item() / len(s), g[f"{kind}_epoch_mean"], rtol=1e-5)
    if f"{kind}_grad" in g:
        grad = torch.autograd.grad(loss, s)[0]
        np.testing.assert_allclose(grad, g[f"{kind}_grad"], rtol=1e-4, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("case", cases(GOLDEN, r"net/(c\d\w*)/"))
def test_golden_networks(case):
    g = group(f"net/{case}")
    x = torch.from_numpy(g["x"])
    teacher, pair = golden_pair(int(case[1:]))
    close(teacher(x), g["teacher"], 1e-4)
    h = x
    for i, block in enumerate(netgraft.cut(teacher)):
        h = block(h)
        if f"teacher_block{i}" in g:
            close(h, g[f"teacher_block{i}"], 1e-4)
    assert torch.equal(h, teacher(x))
    for name in [name for name in g if name.startswith("graft")]:
        i = int(name[-1])
        first, stop = (i, i + 1) if name.startswith("graft_b") else (0, i)
        h = nn.Sequential(pair.prefix, *pair.t_blocks[:first])(x)
        close(pair.grafted(first, stop)(h), g[name], 1e-4)
    if "plain_student" in g:
        close(fill(netgraft.netgraft_vgg16_student(int(case[1:])))(x), g["plain_student"], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", cases(GOLDEN, r"fold/(c\d\w*)/"))
def test_golden_fold(case):
    g, x = group(f"fold/{case}"), torch.from_numpy(GOLDEN[f"net/{case}/x"])
    teacher, pair = golden_pair(int(case[1:]))
    P, c = netgraft.fold_affine(pair.scion[0].s2t, pair.scion[1].t2s)
    close(P[:8], g["P_rows8"], 1e-5)
    close(c, g["c"], 1e-5)
    net = netgraft.fold_student(pair)
    conv = net.features[4][0]
    close(conv.weight[0], g["conv_weight_row0"], 1e-4)
    weight = conv.weight.double()
    close(torch.stack([weight.sum(), weight.norm()]), g["conv_weight_sum_l2"], 1e-4)
    close(conv.bias_map, g["bias_map"], 1e-4)
    close(net.classifier.weight, g["head_w"], 1e-4)
    close(net.classifier.bias, g["head_b"], 1e-4)
    w, b = netgraft.fold_affine(*teacher.classifier)
    close(torch.stack([w.sum(), w.norm()]), g["teacher_head_w_sum_l2"], 1e-4)
    close(b, g["teacher_head_b"], 1e-4)

    close(net(x), g["logits"], 1e-4)
    old = pair.scion[1].block[0]
    naive = old.bias + old.weight.sum((2, 3)) @ c.float()  # right on a map without borders
    conv.bias_map.copy_(naive[:, None, None].expand_as(conv.bias_map))
    close(net(x), g["naive_logits"], 1e-4)
    with pytest.raises(AssertionError):
        close(net(x), g["logits"], 1e-4)


@pytest.mark.parametrize("case", cases(GOLDEN, r"count/(c\d+)"))
def test_golden_counts(case):
    classes = int(case[1:])
    teacher, pair = golden_pair(classes)
    nets = (teacher, pair.prefix, pair.scion, netgraft.netgraft_vgg16_student(classes))
    t, prefix, scion, plain = (sum(p.numel() for p in net.parameters()) for net in nets)
    assert [t, prefix, scion, prefix + scion, plain] == GOLDEN[f"count/{case}"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(GOLDEN, r"step/(c\d\w*)/"))
def test_golden_steps(case):
    """Every phase, its Adam and the step, from what the frozen blocks give."""
    c, g = CONFIG["step"][case], group(f"step/{case}")
    teacher, pair = golden_pair(c["classes"])
    teacher.double(), pair.scion.double()  # in float32 a rounding can turn the sign of an Adam step
    teacher_before = copy.deepcopy(teacher.state_dict())
    before = copy.deepcopy(pair.scion.state_dict())
    ours = {official(key): key for key in before}
    inputs = []  # of each step: what every cut gives, the logits last
    for x in torch.from_numpy(g["x_u8"]):
        h = pair.prefix(fake_data(x, c["normalise"]).normalize(x).contiguous().double())
        inputs.append([h := block(h) if i else h for i, block in enumerate([None, *pair.t_blocks])])
    loss_fn = netgraft.norm_mse if c["norm_loss"] else F.mse_loss
    adam = {**CONFIG["adam"], "betas": tuple(CONFIG["adam"]["betas"])}

    phases = netgraft.make_phases(pair.scion, column(c["classes"]), c["shots"])
    for name, phase in zip(("s1_b0", "s1_b1", "s1_b2", "s2_len2", "s2_len3"), phases):
        pair.scion.load_state_dict(before)
        assert {key: phase.optimizer.defaults[key] for key in adam} == adam
        net = pair.grafted(phase.first, phase.stop).eval()
        for i, h in enumerate(inputs):
            loss = netgraft.graft_step(net, phase.optimizer, h[phase.first], h[-1], loss_fn)
            wanted = g[f"{name}_loss"][i]
            np.testing.assert_allclose(loss.item(), wanted, rtol=5e-3 if i else 2e-4, err_msg=name)
        after = pair.scion.state_dict()
        start = f"{phase.first}." if name.startswith("s1") else ""
        learned = [ours[start + key] for key in g[f"{name}_names"].tolist()]
        assert set(learned) == {k for k in after if not torch.equal(after[k], before[k])}
        for key, (total, norm, change) in zip(learned, g[f"{name}_stats"]):
            found = [after[key].norm(), (after[key] - before[key]).norm()]
            np.testing.assert_allclose(found, [norm, change], rtol=2e-4, err_msg=f"{name} {key}")
            assert abs(after[key].sum() - total) <= 2e-4 * norm, (name, key)
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("case", cases(GOLDEN, r"aug/(c\d\w*)/"))
def test_golden_views(case):
    g, c = group(f"aug/{case}"), CONFIG["aug"][case]
    assert c["padding"] == common.PADDING
    x = torch.from_numpy(g["img_u8"].transpose(0, 3, 1, 2).copy())
    data = fake_data(x, c["normalise"])
    top, left, flip = torch.from_numpy(g["top_left_flip"]).long().T
    rows = netgraft.VIEWS * torch.arange(len(x)) + (top * netgraft.SIDE + left) * 2 + flip
    close(netgraft.view_images(data, x, rows), g["out"], 1e-6)
    close(netgraft.test_images(data, torch.tensor([0]))[0], g["test_out"], 1e-6)


# ---------------------------------------------------------------------------- published values

CIFAR10 = dict(
    epochs_block=(100, 60, 60), epochs_net=(100, 100), batch_size=64, fewshot_seed=6, lr_net=1e-4,
    lr_block=(2.5e-4, 2.5e-4, 2.5e-4), lr_t2s=(2.5e-3, 2.5e-3), lr_s2t=(2.5e-3, 2.5e-3))
CIFAR100 = dict(
    epochs_block=(1000, 200, 200), epochs_net=(150, 150), batch_size=64, fewshot_seed=10,
    lr_net=1e-4, lr_block=(2.5e-4, 1e-3, 1e-3), lr_t2s=(1e-3, 1e-3), lr_s2t=(1e-3, 1e-3))


@pytest.mark.parametrize("dataset, row", (("cifar10", CIFAR10), ("cifar100", CIFAR100)))
@pytest.mark.parametrize("preset, init", (("auto", "random"), ("recover", "teacher")))
def test_published_values(dataset, row, preset, init):
    args = parse("--dataset", dataset, "--preset", preset)
    row = dict(row, shots=10, norm_loss=True, init=init, eval_every=1, amp="none", teacher=PAIR[0])
    assert {name: getattr(args, name) for name in row} == row  # eval_every 1: `best` as published


# ----------------------------------------------------------------------------------- the parts

def test_a_phase_of_no_epochs_is_left_out_and_short_lists_repeat_their_last_entry():
    args = parse("--epochs_block", 3, 0, 2, "--epochs_net", 4, "--lr_block", 1e-2)
    phases = netgraft.make_phases(small_scion(4), args, 10)
    spans = [(p.first, p.stop, p.begin, p.end) for p in phases]
    assert spans == [
        (0, 1, 0, 3), (2, 3, 3, 5), (3, 4, 5, 7), (0, 2, 7, 11), (0, 3, 11, 15), (0, 4, 15, 19)]
    assert [p.optimizer.param_groups[0]["lr"] for p in phases[:3]] == [1e-2] * 3


@pytest.mark.parametrize("n, sizes", ((100, [64, 36]), (65, [65]), (129, [64, 65]), (1, [1])))
def test_a_lone_image_joins_the_batch_before(n, sizes):
    batches = netgraft.make_batches(n, 64, torch.Generator())
    assert [len(batch) for batch in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(n))


@pytest.mark.parametrize("names, start, grafts", (
    (PAIR, 3, 3), (("resnet14", "resnet8"), 1, 3), (("wrn40_2", "wrn16_2"), 1, 3)))
def test_grafts_learn_and_the_teacher_does_not(names, start, grafts):
    torch.manual_seed(0)
    teacher, student = (common.build_model(name, 5) for name in names)
    teacher.eval().requires_grad_(False)
    pair = netgraft.match(teacher, student, 32)
    assert (len(pair.prefix), len(pair.scion)) == (start, grafts)
    x = torch.rand(4, 3, 32, 32)
    if names != PAIR:  # with every graft in place, the grafted teacher is the student
        whole = nn.Sequential(pair.prefix, pair.grafted(0, grafts)).eval()
        close(whole(x).detach(), student.eval()(x).detach(), 1e-5)
    before = copy.deepcopy(teacher.state_dict())
    h = pair.prefix(x)
    for b in range(grafts):
        net = pair.grafted(b, b + 1).eval()
        pair.scion[b].train()
        netgraft.norm_mse(net(h), teacher(x)).backward()
        h = pair.t_blocks[b](h)
    assert all(p.grad is not None for p in pair.scion.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("teacher, student, words", (
    ("resnet8", "resnet8", "nothing is left"), ("resnet14", "wrn16_1", "one family"),
    ("resnet34", "resnet20", "equally many"), ("resnet50", "resnet18", "behind block 1"),
    ("vgg16", "vgg8", "cannot be cut"), (PAIR[0], "netgraft_vgg16_folded", "must be equal")))
def test_pairs_that_do_not_fit(teacher, student, words, capsys):
    teacher, student = common.build_model(teacher, 5), common.build_model(student, 5)
    with pytest.raises(SystemExit) as stop:
        netgraft.match(teacher, student, 32)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def outputs(teacher, student):
    """Outputs of all views of a random image."""
    pair = netgraft.match(teacher.eval().requires_grad_(False), student, 32)
    x = torch.randint(0, 256, (1, 3, 32, 32)).byte()
    images = lambda rows: netgraft.view_images(fake_data(x), x, rows)  # noqa: E731
    return netgraft.Outputs(images, netgraft.VIEWS, pair, netgraft.Args(cache_gb=1.0))


@pytest.mark.parametrize("names", (PAIR, ("resnet14", "resnet8")))
def test_kept_outputs_are_those_of_a_step_bit_for_bit(names):
    torch.manual_seed(0)
    views = outputs(*(common.build_model(name, 10) for name in names))
    rows = torch.randperm(len(views.rows))[:32]
    last = len(views.pair.t_blocks)
    direct = [views.at(rows, cut) for cut in range(last + 1)]
    views.keep([last, 0, 2])
    assert set(views.kept) == ({0, 2, last} if names == PAIR else {2, last})  # no stem
    for cut in range(last + 1):
        found = views.at(rows, cut)
        assert torch.equal(found, direct[cut]) and found.stride() == direct[cut].stride()
    views.keep([last, 2])  # what has had its last use is forgotten
    assert set(views.kept) == {2, last} and torch.equal(views.at(rows, 2), direct[2])


def test_a_step_does_not_wait_for_the_device():
    views = outputs(*(common.build_model(name, 10) for name in PAIR))
    phase = netgraft.make_phases(views.pair.scion, parse(), 10)[1]
    net = views.pair.grafted(1, 2)
    rng = torch.Generator().manual_seed(0)
    with host_syncs() as syncs:
        batch = netgraft.make_batches(4, 4, rng)[0]
        rows = batch * 0 + torch.randint(netgraft.VIEWS, batch.shape, generator=rng)
        h, t_logits = views.at(rows, 1), views.at(rows, 3)
        netgraft.graft_step(net, phase.optimizer, h, t_logits, netgraft.norm_mse)
    assert not syncs


# ------------------------------------------------------------------------- folding, --init teacher

@torch.no_grad()
@pytest.mark.parametrize("size", ((2, 2), (8, 8), (3, 5)))
def test_fold_is_exact_at_every_size(size):
    e, a = nn.Conv2d(4, 9, 1).double(), nn.Conv2d(9, 5, 1).double()
    conv = nn.Conv2d(5, 6, 3, padding=1).double()
    u = torch.rand(2, 4, *size).double()
    weight, bias_map = netgraft.fold_conv(conv, *netgraft.fold_affine(e, a), size)
    close(F.conv2d(u, weight, padding=1) + bias_map, conv(a(e(u))), 1e-12)


def test_residual_units_are_copied_evenly():
    for names, picks in ((("resnet56", "resnet20"), (0, 4, 8)), (("wrn40_2", "wrn16_2"), (0, 5))):
        pair = netgraft.match(*(common.build_model(name, 10) for name in names), 32)
        netgraft.init_from_teacher(pair, views=None)
        for graft, block in zip(pair.scion, pair.t_blocks):
            for unit, i in zip(graft.block, picks):
                source = block[i].state_dict()
                assert all(torch.equal(v, source[k]) for k, v in unit.state_dict().items())


# ---------------------------------------------------------------------------------- whole runs

@pytest.fixture
def run(tmp_path, monkeypatch):
    """main on a small data set of one's own in an empty folder: run(...) -> row of result.json."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.RandomState(0)
    Path("own").mkdir()
    for split, n in (("train", 80), ("test", 41)):
        x = rng.randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)
        np.savez(f"own/{split}.npz", x=x, y=np.arange(n) % 4)
    torch.manual_seed(0)
    for name in ("resnet14", PAIR[0]):
        torch.save(common.build_model(name, 4).state_dict(), f"{name}.pt")

    def go(name, *flags, teacher="resnet14"):
        words = f"--smoke --dataset own --device cpu --shots 1 --teacher_ckpt {teacher}.pt".split()
        words += "--epochs_block 2 1 2 --epochs_net 2 3 --save_every 1 --run_name".split()
        netgraft.main(parse(*words, name, *flags))
        return json.loads(Path(f"runs/{name}/result.json").read_text())[0]

    return go


def test_run(run, capsys):
    row, rows = run("a", "--seed", 3), metrics("runs/a")
    scores = [(r["epoch"], k) for r in rows for k in r if k.startswith("top1")]
    assert [e for e, k in scores if k == "top1_grafted"] == [1, 2, 4, 6]  # where a phase ends
    assert [e for e, k in scores if k == "top1"] == [7, 8, 9]  # D1: every epoch of the last one
    last_phase = [r["top1"] for r in rows if "top1" in r]
    assert (row["best"], row["last"], row["real_images"]) == (max(last_phase), last_phase[-1], 4)
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["args"]["epochs"] == 10 and len(config["shot_indices"]) == 4
    state = torch.load("runs/a/student.pt", weights_only=True)
    assert list(state) == list(common.build_model("resnet8", 4).state_dict())
    printed = capsys.readouterr().out
    assert "step 1 of 2: block 2 of 3 alone" in printed and "step 2 of 2: all blocks" in printed


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_equal(run, monkeypatch):
    """Stopped between two phases, and again in the middle of the last one."""
    run("a")
    plain = common.Run.end_epoch

    def end_epoch(self, epoch, top1=None):
        plain(self, epoch, top1)
        if epoch + 1 in (3, 8):
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_epoch", end_epoch)
        with pytest.raises(InterruptedError):
            run("b")
        with pytest.raises(InterruptedError):
            netgraft.main(parse("--resume", "runs/b"))
    netgraft.main(parse("--resume", "runs/b"))
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")


@pytest.mark.slow
def test_vgg_run_folds_and_is_scored_again(run, capsys):
    flags = ("--init", "teacher", "--epochs_block", 1, "--epochs_net", 1)
    row = run("a", "--student", PAIR[1], *flags, teacher=PAIR[0])
    assert row["fold_difference"] < 1e-4 and row["params"] == 5279306 - 257 * 6  # 4 classes
    assert f"--arch {row['arch']}" in capsys.readouterr().out
    for arch in ("", f"{ROOT}/{row['arch']}"):
        net, _, _ = common.load_model("runs/a/student.pt", arch, 4)
        data = common.load_data(parse("--dataset", "own"), torch.device("cpu"))
        assert common.evaluate(net, data) == row["last"]


def test_images_of_ones_own(run, capsys):
    from PIL import Image
    x = np.load("own/train.npz")["x"][:6]
    for i, image in enumerate(x):
        Path(f"pics/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"pics/{i % 2}/{i}.png")
    row = run("a", "--fewshot_dir", "pics")
    assert row["real_images"] == 6
    Path("pics/0/bad.png").write_bytes(b"no image")
    Path("empty").mkdir()
    for folder, words in (("pics", "bad.png"), ("empty", "2 or more")):
        with pytest.raises(SystemExit) as stop:
            run("b", "--fewshot_dir", folder)
        assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", (
    ("--epochs 5", "--epochs_block"), ("--lr_block", "give a number"),
    ("--epochs_block 0 --epochs_net 0", "nothing to train"),
    ("--shots 21", "has only 20"), ("--teacher resnet8", "you asked for resnet8")))
def test_mistakes_end_with_one_sentence_and_no_folder(run, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run("a", *flags.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    netgraft.main(parse("--smoke", "--data_dir", data_dir, "--run_name", "a"))
    assert 0 < json.loads(Path("runs/a/result.json").read_text())[0]["last"] <= 100
    assert Path("runs/a/samples/shots.png").stat().st_size > 500


def test_what_is_typed_wins():
    args = parse("--dataset", "cifar100", "--lr_block", 1e-2, "--epochs_net", 3, 4, "--nshot", 5)
    assert (args.lr_block, args.epochs_net, args.shots) == ((1e-2,), (3, 4), 5)
    assert args.lr_t2s == CIFAR100["lr_t2s"]


def test_loss_sees_directions_only():
    s, t = torch.randn(5, 7), torch.randn(5, 7)
    loss = netgraft.norm_mse(s, t)
    close(netgraft.norm_mse(3 * s, t), loss, 1e-5)
    close(loss, 2 * (1 - F.cosine_similarity(s, t)).sum(), 1e-5)
    assert netgraft.norm_mse(2 * t, t) < 1e-9


@torch.no_grad()
def test_folded_student_is_smaller_and_the_same():
    torch.manual_seed(0)
    teacher, student = (common.build_model(name, 10) for name in PAIR)
    pair = netgraft.match(teacher.eval(), student, 32)
    for p in pair.scion.parameters():
        nn.init.normal_(p, std=0.05)
    unfolded, x = nn.Sequential(pair.prefix, *pair.scion), torch.rand(16, 3, 32, 32)
    folded = netgraft.fold_student(pair)
    close(folded(x), unfolded(x), 1e-5)
    sizes = [common.count_params_macs(net, 32) for net in (teacher, unfolded, folded)]
    assert [(params, round(macs / 1e6, 2)) for params, macs in sizes] == [
        (14983498, 313.46), (5938506, 227.35), (5279306, 225.91)]


@pytest.mark.slow
@torch.no_grad()
def test_channels_that_never_fire_cost_nothing():
    """Half of the teacher's deep channels are dead: the narrow grafts do at once what it does."""
    torch.manual_seed(0)
    teacher, student = (common.build_model(name, 10) for name in PAIR)
    for conv in [m for m in teacher.features[3:].modules() if isinstance(m, nn.Conv2d)]:
        alive = torch.randperm(512) < 256
        conv.weight.mul_(alive[:, None, None, None])
        conv.bias.copy_(0.01 * alive)
    norm = teacher.classifier[1]
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        tensor.normal_()
    pair = netgraft.match(teacher.eval(), student, 32)
    h = torch.rand(300, 256, 4, 4)
    t_logits, x = nn.Sequential(*pair.t_blocks)(h), h
    for b in range(3):
        netgraft.init_vgg_graft(pair.scion[b], pair.t_blocks[b], x)
        close(pair.grafted(b, b + 1)(x), t_logits, 1e-3)
        x = pair.t_blocks[b](x)
    close(pair.grafted(0, 3)(h), t_logits, 1e-3)
