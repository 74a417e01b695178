"""Tests of common.py, most of them through tests/toy.py, the smallest method.

Sizes, seeds and cases of the golden numbers come from the file in GOLDEN_DIR. TEACHER_DIR points
to the published checkpoints of akamaster, for the real images of that file.
"""
import argparse
import importlib
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import netgraft  # noqa: F401  its networks are in MODELS then
import toy
from tools import (
    ROOT, cases, close, load_golden, metrics, result, run, same_weights, start, unread)

TEACHERS = os.environ.get("TEACHER_DIR", "")
CPU = torch.device("cpu")

GONE = {  # golden numbers of what the second version of this collection does without
    r"lr/\w+": "lr_at: the formula, or torch's scheduler, stands where it is used",
    r"order/cifar10_train": "the map between two orders of CIFAR-10's training images",
    r"fewshot/netgraft/cifar10/sorted_index": "the shots in the other of these two orders",
}
READ_ELSEWHERE = {
    r"fewshot/netgraft/\w+/positions": "test_netgraft.py",
    r"fewshot/pgdi/\d+/(labels|seed_shots|indices)": "test_pgdi.py",
    r"subset/akd/[\d.]+/(first64|count|sum|crc32|evaluated)": "test_akd_gan.py",
}
READ = (
    r"config", r"fill/salt", r"x/\w+", r"net/index",
    r"net/.+/(meta|logits_std|logits|feat|logits_train|bnstat_train)",
    r"sgd/\w+/(y|hyp|loss|abs_sum|sq_sum)", r"norm/in", r"norm/\w+/(mean_std|out)",
    r"crop/\d+/(in|dy|dx|flip|out)", r"real/(ids|x|y)", r"real/\w+/logits",
    r"eval/\w+/(student|teacher|labels|acc1|acc5|agree1|loss|lp_official|lp_single_sqrt)",
    r"eval/\w+/js_distance")


# ----------------------------------------------------------------------------- golden numbers

GOLDEN, CONFIG = load_golden("common")
NETS = json.loads(bytes(GOLDEN["net/index"]))


def meta_of(case):
    return json.loads(bytes(GOLDEN[f"net/{case}/meta"]))


def long_for_large(case):
    """The small networks are tried in every round of tests, all of them in the long one."""
    return pytest.param(case, marks=pytest.mark.slow if meta_of(case)["macs"] > 5e7 else ())


def tensor(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def draws_of(meta):
    """Normal numbers for each entry of a network, drawn from its official name."""
    salt = bytes(GOLDEN["fill/salt"])
    return {key: np.random.RandomState(zlib.crc32(salt + key.encode())).standard_normal(shape)
            for key, shape in meta["state"]}


def filled(draws, rule):
    """Weights made of these numbers by rule std or live."""
    state = {}
    for key, z in draws.items():
        if np.ndim(z) == 0:
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        if rule == "std" and key.endswith("running_var"):
            z = np.abs(0.05 * z) + 0.5
        elif rule == "std":
            z = 0.05 * z
        elif key.endswith("running_var"):
            z = 0.6 + 0.5 * np.abs(z)
        elif key.endswith(("running_mean", "bias")):
            z = 0.1 * z
        elif z.ndim >= 2:
            z = z * np.sqrt(2 / np.prod(z.shape[1:]))
        else:
            z = 0.9 + 0.1 * z
        state[key] = torch.from_numpy(z.astype(np.float32))
    return state


def golden_net(meta, state, folder):
    """A golden network as a user meets it: a file with official names, no word of its kind."""
    torch.save({"state_dict": state}, folder / "net.pth")
    net, _, _ = common.load_model(folder / "net.pth", "", meta["classes"], meta["input"])
    return net


def test_golden_every_key_is_read_or_gone():
    assert not unread(GOLDEN, *READ, *READ_ELSEWHERE, *GONE)
    for pattern, file in READ_ELSEWHERE.items():
        group = re.match(r"\w+/\w+", pattern)[0]
        assert group in (ROOT / "tests" / file).read_text(), f"{file} no longer reads {group}"


@pytest.mark.parametrize("case", [long_for_large(case) for case in NETS])
def test_golden_network(case, tmp_path):
    meta = meta_of(case)
    draws = draws_of(meta)
    net = golden_net(meta, filled(draws, "live"), tmp_path)
    params, macs = common.count_params_macs(net, meta["input"])
    assert (params, macs) == (meta["params"], meta["macs"])
    assert sum(buffer.numel() for buffer in net.buffers()) == meta["buffers"]
    ours = [[key, list(value.shape)] for key, value in net.state_dict().items()]
    official = [[re.sub(r"^linear\.", "fc.", key.replace(".shortcut.", ".downsample.")), shape]
                for key, shape in ours]
    assert meta["state"] in (ours, official)  # hooks on batch norms see them in this order

    x = tensor(f"x/{meta['input']}")
    with torch.no_grad():
        logits, features = common.with_features(net, x)
        close(logits, GOLDEN[f"net/{case}/logits"], 1e-4)
        if f"net/{case}/feat" in GOLDEN:
            close(features[:, :32], GOLDEN[f"net/{case}/feat"], 1e-4)
        if f"net/{case}/logits_train" in GOLDEN:
            net.train()
            close(net(tensor("x/train32")), GOLDEN[f"net/{case}/logits_train"], 1e-4)
            running = [b for key, b in net.named_buffers() if "running" in key]
            total = sum(b.double().abs().sum() for b in running)
            close(total, GOLDEN[f"net/{case}/bnstat_train"], 1e-4)
        net.eval().load_state_dict(common.find_weights(filled(draws, "std")))
        close(net(x), GOLDEN[f"net/{case}/logits_std"], 1e-4)


@pytest.mark.parametrize("case", CONFIG["sgd"]["cases"])
def test_golden_sgd(case, tmp_path):
    spec = CONFIG["sgd"]["cases"][case]
    meta = meta_of(f"{spec['zoo']}/{spec['arch']}/{spec['classes']}")
    net = golden_net(meta, filled(draws_of(meta), CONFIG["sgd"]["rule"]), tmp_path).train()
    lr, momentum, decay, nesterov, smoothing = GOLDEN[f"sgd/{case}/hyp"].tolist()
    optimizer = torch.optim.SGD(
        net.parameters(), lr, momentum, weight_decay=decay, nesterov=bool(nesterov))
    x, y = tensor(CONFIG["sgd"]["input"]), tensor(f"sgd/{case}/y")
    losses = []
    for _ in range(CONFIG["sgd"]["steps"]):
        loss = F.cross_entropy(net(x), y, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    flat = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    close(losses, GOLDEN[f"sgd/{case}/loss"], 1e-3)
    close(flat.abs().sum(), GOLDEN[f"sgd/{case}/abs_sum"], 1e-6)
    close((flat ** 2).sum(), GOLDEN[f"sgd/{case}/sq_sum"], 1e-6)


def fake_data(x=None, norm="half", classes=10):
    """A Data of these uint8 images (N, 3, S, S), without files; labels 0, 1, 2 ..."""
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8) if x is None else torch.as_tensor(x)
    y = torch.arange(len(x)) % classes
    names = [f"class {c}" for c in range(classes)]
    return common.Data("fake", lambda split: (x, y, names), CPU, norm)


@pytest.mark.parametrize("name", cases(GOLDEN, r"norm/(\w+)/out"))
def test_golden_norm(name):
    constants = GOLDEN[f"norm/{name}/mean_std"].ravel()
    if name in common.NORMS:
        assert np.abs(np.array(common.NORMS[name]) - constants).max() < 1e-12
    x = tensor("norm/in").permute(0, 3, 1, 2)[:CONFIG["norm"]["images"]]
    six = ",".join(map(str, constants))
    for norm in (name, six) if name in common.NORMS else (six,):
        data = fake_data(x, norm)
        out = data.normalize(x)
        close(out, GOLDEN[f"norm/{name}/out"], 2e-6)
        close(data.normalize(x.float() / 255), GOLDEN[f"norm/{name}/out"], 2e-6)
        close(data.denormalize(out), x.numpy() / 255, 2e-6)


@pytest.mark.parametrize("size", cases(GOLDEN, r"crop/(\d+)/in"))
def test_golden_crop(size, monkeypatch):
    monkeypatch.setattr(common, "PADDING", CONFIG["crop"]["padding"])
    x, out = (tensor(f"crop/{size}/{key}").permute(0, 3, 1, 2) for key in ("in", "out"))
    dy, dx, flip = (tensor(f"crop/{size}/{key}") for key in ("dy", "dx", "flip"))
    assert torch.equal(common.crop_flip(x, dy, dx, flip), out)


@pytest.mark.parametrize("case", CONFIG["eval"])
def test_golden_scores(case):
    s, t, y = (tensor(f"eval/{case}/{key}") for key in ("student", "teacher", "labels"))
    scores = {**common.accuracy(s, y), **common.agreement(s, t)}
    for key, ours, tolerance in (
            ("acc1", "top1", 1e-9), ("acc5", "top5", 1e-9), ("agree1", "agree1", 1e-6),
            ("loss", "loss", 1e-5), ("lp_official", "L_p", 1e-5),
            ("lp_single_sqrt", "L_p_sqrt", 1e-5)):
        expected = float(GOLDEN[f"eval/{case}/{key}"])
        assert scores[ours] == pytest.approx(expected, tolerance, tolerance), key
    distance = common.js_distance(s, t).numpy()
    assert np.abs(distance - GOLDEN[f"eval/{case}/js_distance"]).max() <= 1e-6


@pytest.mark.skipif(not TEACHERS, reason="TEACHER_DIR is not set")
@pytest.mark.parametrize("name", CONFIG["real"]["nets"])
def test_golden_real_images(name):
    path = Path(TEACHERS, CONFIG["real"]["nets"][name])
    if not path.is_file():
        pytest.skip(f"{path.name} is not in TEACHER_DIR")
    classes = CONFIG["real"]["classes"]
    net, arch, facts = common.load_model(path, "", classes)
    norm = common.norm_of_file(facts, arch, classes)
    assert norm == CONFIG["real"]["norm"]
    logits = common.predict(net, fake_data(tensor("real/x").permute(0, 3, 1, 2), norm))
    assert np.abs(logits.numpy() - GOLDEN[f"real/{name}/logits"]).max() <= 1e-3
    right = (logits.argmax(1) == tensor("real/y")).sum()
    assert right >= 0.75 * len(GOLDEN["real/ids"])


# ------------------------------------------------------------------------------------ networks

def test_initialisation():
    torch.manual_seed(0)
    net = common.build_model("resnet20", 10)
    fan_out = 64 * 9
    assert abs(net.layer3[2].conv2.weight.std() / math.sqrt(2 / fan_out) - 1) < 0.03
    vgg = common.build_model("vgg8", 10)
    assert abs(vgg.classifier.weight.std() / 0.01 - 1) < 0.1 and not vgg.block0[0].bias.any()
    default = common.build_model("resnet18", 10, init="default")
    assert default.conv1.weight.abs().max() <= 1 / math.sqrt(3 * 9) + 1e-6  # uniform, not normal


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_channel_statistics(layout):
    """Those of var_mean, with its gradient; a constant channel and bfloat16 are no trouble."""
    torch.manual_seed(0)
    h = 3 + 2 * torch.randn(6, 5, 4, 4, dtype=torch.float64)
    h = h.to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(common.ChannelStatistics.apply, (h,))
    h.data[:, 1] = 3.0
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        x = h.detach().to(dtype)
        mean, var = common.ChannelStatistics.apply(x)
        assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        close(mean, expected_mean, tolerance)
        close(var, expected_var, tolerance)
    low = h.detach().bfloat16().requires_grad_()
    high = low.detach().double().requires_grad_()
    grads = [torch.autograd.grad(common.ChannelStatistics.apply(x).norm(), x)[0]
             for x in (low, high)]
    close(grads[0].double(), grads[1], 0.02)


OWN_NETS = """
import torch.nn as nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(WIDTH, num_classes)  # registered first, used last
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv2d(3, WIDTH, 3)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.head(x * self.gate(x))

class Wrapped(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.model = Net(num_classes)

    def forward(self, x):
        return self.model(x)

def foreign(num_classes):
    from torchvision.models import resnet18
    return resnet18(num_classes=num_classes)
"""


@pytest.mark.parametrize("name, head", (
    ("Net", "head"), ("Wrapped", "model.head"), ("foreign", "fc")))
def test_own_network(tmp_path, name, head):
    """Its own names stay, also those that elsewhere belong to a wrapper or to another zoo."""
    (tmp_path / "nets.py").write_text(OWN_NETS)
    (tmp_path / "beside.py").write_text("WIDTH = 6")
    spec = f"{tmp_path}/nets.py:{name}"
    torch.manual_seed(1)
    net = common.build_model(spec, 5)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    runpy.run_path(str(tmp_path / "nets.py"))[name](5)
    assert torch.equal(after, torch.get_rng_state())  # to try it out draws nothing

    x = torch.rand(2, 3, 32, 32)
    logits, features = common.with_features(net, x)
    head = net.get_submodule(head)
    assert torch.equal(head(features), logits) and not head._forward_pre_hooks
    net.eval()
    for prefix in ("", "module."):
        torch.save(prefixed(net.state_dict(), prefix), tmp_path / "own.pt")
        loaded, _, _ = common.load_model(tmp_path / "own.pt", spec, 5)
        assert torch.equal(loaded(x), net(x))


# ---------------------------------------------------------------------------------- checkpoints

def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def official(state):
    rename = {key: re.sub(r"^linear", "fc", key.replace(".shortcut.", ".downsample."))
              for key in state}
    return {rename[key]: value for key, value in state.items()}


LAYOUTS = {  # published wrappings -> what they say of the accuracy
    "bare": (lambda state: state, None),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3, "best_acc1": 91.5}, 91.5),
    "module": (lambda state: {"state_dict": prefixed(state, "module.")}, None),
    "mdistiller": (lambda state: {"model": prefixed(state, "module.student.")}, None),
    "fc, downsample": (lambda state: {"model": official(state), "accuracy": 0.915}, 91.5),
    "compiled": (lambda state: {"net": prefixed(state, "_orig_mod.")}, None),
    "timm": (lambda state: {
        "state_dict": state, "args": argparse.Namespace(model="x", lr=0.1), "arch": "wrong",
        "metric": np.float64(72.94)}, 72.94),
    "half": (lambda state: {
        key: v.half() if v.is_floating_point() else v for key, v in state.items()}, None),
    "akamaster": (lambda state: {
        "state_dict": {k: v for k, v in prefixed(state, "module.").items() if "batches" not in k},
        "best_prec1": torch.tensor(91.5)}, 91.5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(layout, tmp_path):
    wrap, accuracy = LAYOUTS[layout]
    net = common.build_model("resnet8", 11).eval()
    zipped = layout != "akamaster"
    torch.save(wrap(net.state_dict()), tmp_path / "t.pth", _use_new_zipfile_serialization=zipped)
    before = torch.get_rng_state()
    loaded, arch, facts = common.load_model(tmp_path / "t.pth", "", 11)
    assert torch.equal(before, torch.get_rng_state()) and arch == "resnet8"
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    x = torch.rand(2, 3, 32, 32)
    close(loaded(x), net(x).detach(), 5e-3 if layout == "half" else 1e-7)
    found = common.accuracy_of_file(facts)
    assert math.isnan(found) if accuracy is None else found == pytest.approx(accuracy)


@pytest.mark.parametrize("home", ("numpy.core.multiarray", "numpy._core.multiarray"))
def test_scalars_of_both_generations_of_numpy(home, tmp_path):
    scalar = np.float32(1).__reduce__()[0]

    class Pickler(pickle._Pickler):
        def save_global(self, value, name=None):
            if value is scalar:
                self.write(pickle.GLOBAL + f"{home}\nscalar\n".encode())
                self.memoize(value)
            else:
                super().save_global(value, name)

    def dump(value, file, protocol=2):
        Pickler(file, protocol).dump(value)

    module = types.SimpleNamespace(Pickler=Pickler, __name__="pickle", dump=dump)
    state = common.build_model("resnet8", 10).state_dict()
    torch.save({"state_dict": state, "best_acc1": np.float32(88.5)}, tmp_path / "t.pth",
               pickle_module=module, _use_new_zipfile_serialization=False)
    assert home.encode() in (tmp_path / "t.pth").read_bytes()
    _, facts = common.load_checkpoint(tmp_path / "t.pth")
    assert common.accuracy_of_file(facts) == 88.5


def test_which_normalisation_a_file_wants():
    assert common.norm_of_file({}, "resnet20_a", 10) == "imagenet"  # akamaster
    assert common.norm_of_file({"metric": 72.9}, "resnet20", 100) == "cifar100_gda"  # timm
    assert common.norm_of_file({"metric": 72.9, "norm": "cifar100"}, "resnet20", 100) == "cifar100"
    assert common.norm_of_file({}, "resnet20", 100) == "auto"


# ----------------------------------------------------------------------------- the command line

def call(main, cls, presets, words):
    """Exit code of a command, in this process; the handler of SIGTERM is put back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        common.cli(main, cls, presets, [str(word) for word in words])
        return 0
    except SystemExit as e:
        return e.code
    finally:
        signal.signal(signal.SIGTERM, handler)


def command(name, value, *words):
    """python common.py NAME VALUE --FLAG ..."""
    function, flags, first = common.COMMANDS[name]
    return call(function, flags, None, [f"--{first}", value, *words])


def parse(*words):
    return common.parse_args(toy.Args, toy.PRESETS, list(words))


def test_later_settings_win():
    pair = ("--dataset", "cifar100", "--teacher", "wrn40_2", "--student", "wrn16_1")
    assert (parse().T, parse().epochs) == (4.0, 20)  # the defaults
    assert parse("--preset", "hot").T == 8.0
    assert parse("--preset", "hot", "--T", "2").T == 2.0
    assert (parse(*pair).T, parse(*pair).epochs) == (20.0, 30)  # the row of the pair
    assert parse(*pair, "--epochs=7").epochs == 7
    assert (parse(*pair, "--smoke").epochs, parse(*pair, "--smoke").T) == (2, 20.0)
    assert (parse("--smoke").dataset, parse("--smoke", "--epochs", "1").epochs) == ("shapes", 1)
    assert parse("--preset", "smoke").smoke and not parse("--smoke", "--no-smoke").smoke
    assert parse("--epochs", "3", "--smoke").typed == {"epochs": 3, "smoke": True}


def test_other_spellings():
    assert parse("--batch-size", "8").batch_size == 8 and parse("--bs=8").batch_size == 8
    assert parse("--log_tag", "x", "--data-root", "d").run_name == "x"
    assert parse("--run-name=a-b__c").run_name == "a-b__c"

    @common.dataclass
    class Args(common.CommonArgs):
        counts: tuple[int, ...] = common.flag((3,), "several numbers")
        way: common.Literal["a", "b"] = common.flag("a", "one of two")

    args = common.parse_args(Args, argv=["--counts", "18", "25", "--way", "b"])
    assert (args.counts, args.way) == ((18, 25), "b")
    assert common.parse_args(Args, argv=["--counts"]).counts == ()


def test_file_of_the_teacher_chooses_the_row_of_the_pair(tmp_path):
    torch.save(common.build_model("wrn40_2", 100).state_dict(), tmp_path / "t.pth")
    file = ("--dataset", "cifar100", "--student", "wrn16_1", "--teacher_ckpt", f"{tmp_path}/t.pth")
    assert (parse(*file).teacher, parse(*file).T) == ("wrn40_2", 20.0)


@pytest.mark.parametrize("script", (
    "toy", "pgdi", "netgraft", "akd_gan", "adadfkd", "gda_kd", "train", "eval"))
def test_help_names_every_flag(script, capsys):
    if script in common.COMMANDS:
        main, cls, _ = common.COMMANDS[script]
        presets = {}
    else:
        module = importlib.import_module(script)
        main, cls, presets = module.main, module.Args, module.PRESETS
    assert call(main, cls, presets, ["--help"]) == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  --(\w+)[ ,]", text, re.M)
    assert {f.name for f in common.fields(cls)} <= set(shown)
    if presets:  # the flags of the method come first
        assert shown.index(next(iter(cls.__annotations__))) < shown.index("out_dir")
    for f in common.fields(cls):
        assert f.metadata["help"].split()[0] in text


# ----------------------------------------------------------------------------------------- runs

def tinted(n, seed=0):
    """Noise in four tints (n, 32, 32, 3), and which of the four it is."""
    rng = np.random.RandomState(seed)
    tints = np.array([[90, 0, 0], [0, 90, 0], [0, 0, 90], [60, 60, 60]])
    y = np.arange(n) % 4
    x = rng.randint(0, 160, (n, 32, 32, 3)) + tints[y][:, None, None]
    return np.clip(x, 0, 255).astype(np.uint8), y


def make_own(folder):
    """own/{train,test}.npz: four classes that are easily learned."""
    (folder / "own").mkdir(parents=True)
    for split, n, seed in (("train", 80, 0), ("test", 41, 1)):
        x, y = tinted(n, seed)
        names = ["red", "green", "blue", "white"]
        np.savez(folder / "own" / f"{split}.npz", x=x, y=y, classes=names)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the data set own, and a resnet8 that knows it."""
    folder = tmp_path_factory.mktemp("world")
    make_own(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command("train", "resnet8", "--dataset", "own", "--epochs", "6", "--batch_size", "20",
                "--lr", "0.05", "--run_name", "t")
    return folder


@pytest.fixture
def toy_run(world, tmp_path, monkeypatch):
    """toy_run("--epochs", 3) in a folder of its own, with the small data set and its teacher."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", "own")
    teacher = world / "data" / "teachers" / "own_resnet8.pt"
    short = ("--dataset", "own", "--teacher", "resnet8", "--teacher_ckpt", teacher,
             "--batch_size", 16, "--epochs", 3, "--log_every", 2, "--save_every", 1)

    def go(*words):
        words = words if "--resume" in words else short + words
        return call(toy.main, toy.Args, toy.PRESETS, words)

    return go


def interrupt(monkeypatch, at, act):
    """Something happens in the loss of this step of the toy method."""
    plain, calls = toy.kd_loss, []

    def kd_loss(*args):
        calls.append(1)
        if len(calls) == at:
            act()
        return plain(*args)

    monkeypatch.setattr(toy, "kd_loss", kd_loss)


def ctrl_c():
    raise KeyboardInterrupt


def test_run_folder(toy_run, capsys):
    assert toy_run("--run_name", "a", "--seed", 5) == 0
    folder = Path("runs/a")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "src", "metrics.jsonl", "samples", "ckpt_last.pt", "student.pt",
        "result.json"}
    assert (folder / "src" / "toy.py").read_text() == (ROOT / "tests" / "toy.py").read_text()
    assert (folder / "src" / "common.py").is_file()
    assert Image.open(folder / "samples" / "train.png").size[0] > 300

    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["seed"] == 5 and config["args"]["lr"] == toy.Args.lr
    assert config["args"]["teacher"] == "resnet8"  # as found in the file
    [row] = result(folder)
    assert row["method"] == "toy" and row["dataset"] == "own" and row["real_images"] == 80
    assert row["params"] == 77652 and row["pflop"] > 0
    for key in ("last", "best", "top5", "loss", "teacher_top1", "agree1", "L_p", "L_p_sqrt"):
        assert row[key] >= 0, key

    lines = metrics(folder)
    scores = [line["top1"] for line in lines if "top1" in line]
    assert len(scores) == 3 and (scores[-1], max(scores)) == (row["last"], row["best"])
    assert [line["step"] for line in lines if "loss" in line] == [0, 2, 4, 5, 7, 9, 10, 12, 14]
    state = torch.load(folder / "student.pt", weights_only=True)
    assert list(state) == list(common.build_model("resnet8", 4).state_dict())
    out = capsys.readouterr().out
    assert f"{row['last']:.2f} % of 41 test images" in out and "own_resnet8.pt" in out


def test_equal_seeds_give_equal_runs(toy_run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert toy_run("--run_name", name, "--seed", seed, "--epochs", 1) == 0
    assert metrics("runs/a") == metrics("runs/b") != metrics("runs/c")
    assert same_weights("runs/a", "runs/b") and not same_weights("runs/a", "runs/c")


BF16 = ("--amp", "bf16", "--limit_train", 32)


@pytest.mark.parametrize("flags, stops", (
    ((), (12, 2)), (("--save_every", 2), (12, 2)),
    pytest.param(BF16, (5, 2), marks=pytest.mark.slow)))
def test_stopped_and_resumed_is_bit_equal(toy_run, monkeypatch, capsys, flags, stops):
    """Stopped twice, by and by, in a folder with things of the user's and of killed writers."""
    assert toy_run("--run_name", "a", *flags) == 0
    words = ("--run_name", "b", *flags)
    for step in stops:
        with monkeypatch.context() as patch:
            interrupt(patch, step, ctrl_c)
            assert toy_run(*words) == 130
        assert capsys.readouterr().err.splitlines()[-1].endswith("--resume runs/b")
        words = ("--resume", "runs/b")
    for leftover in ("ckpt_last.pt.part77", "result.json.part8"):
        Path("runs/b", leftover).write_bytes(b"half of it")
    mine = ("thesis.part1.md", "thesis.partial", "thesis.part2", "notes.txt")
    for name in mine:
        Path("runs/b", name).write_text("mine")

    assert toy_run(*words, "--lr", 0.05, "--data_dir", "elsewhere") == 0
    assert metrics("runs/a") == metrics("runs/b") and same_weights("runs/a", "runs/b")
    for key in ("last", "best", "agree1", "L_p", "pflop"):
        assert result("runs/a")[0][key] == result("runs/b")[0][key]
    assert all(Path("runs/b", name).read_text() == "mine" for name in mine)
    assert not list(Path("runs/b").glob("*.part[78]*"))
    assert toy_run(*words) == 0 and "is finished" in capsys.readouterr().out


def test_ctrl_c_while_a_checkpoint_is_written_leaves_the_old_one(toy_run, monkeypatch):
    plain, calls = os.replace, []

    def replace(old, new):
        calls.append(Path(new).name)
        if calls.count("ckpt_last.pt") == 3:
            ctrl_c()
        return plain(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert toy_run("--run_name", "b") == 130
    assert torch.load("runs/b/ckpt_last.pt", weights_only=True)["epoch"] == 1
    assert not list(Path("runs/b").glob("*.part*"))
    assert toy_run("--resume", "runs/b") == 0


def test_every_state_is_restored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Pool:
        """What a method may keep: tensors, numbers, lists, None."""
        def __init__(self):
            self.state = {"images": torch.zeros(3), "n": 1, "rows": [1, (2.5, None)]}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    def parts():
        torch.manual_seed(0)
        net = nn.Linear(3, 3)
        return {"net": net, "adam": torch.optim.Adam(net.parameters()), "pool": Pool()}

    def draw(run, net, adam, pool):
        adam.zero_grad()
        net(torch.rand(2, 3)).sum().backward()
        adam.step()
        pool.state["images"] += torch.rand(3, generator=run.rng)
        return (random.random(), np.random.rand(), torch.rand(1).item(), net.weight.sum().item(),
                pool.state["images"].tolist(), pool.state["rows"])

    args = toy.Args(run_name="r", student="resnet8")
    args.typed = {}
    first, objects = common.Run(args), parts()
    assert first.begin(fake_data(), None, **objects) == 0
    draw(first, **objects)
    first.save(4)
    expected = draw(first, **objects)
    second, objects = common.Run(parse("--resume", "runs/r")), parts()
    random.seed(9)
    assert second.begin(fake_data(), None, **objects) == 4
    assert draw(second, **objects) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number, code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_signals(world, tmp_path, number, code):
    """A run that is told to stop ends at once, with one line and a whole checkpoint."""
    shutil.copytree(world / "own", tmp_path / "own")
    teacher = world / "data" / "teachers" / "own_resnet8.pt"
    process = start("tests/toy.py", "--dataset", "own", "--teacher_ckpt", teacher, "--epochs", 999,
                    "--save_every", 1, "--run_name", "r", cwd=tmp_path)
    log = tmp_path / "runs" / "r" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("top1") > 1):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.split("\n", 1)[1] == "stopped; go on with: python toy.py --resume runs/r\n"
    saved = torch.load(log.parent / "ckpt_last.pt", weights_only=True)
    assert saved["epoch"] >= 1


def test_value_that_is_not_finite_stops_the_run(toy_run, monkeypatch, capsys):
    monkeypatch.setattr(toy, "kd_loss", lambda s, t, T: s.sum() * math.nan)
    assert toy_run("--run_name", "a") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"^error: loss is nan at step 0 of epoch 1.*runs/a", line)
    assert not Path("runs/a/result.json").exists()
    assert not any("NaN" in line for line in Path("runs/a/metrics.jsonl").read_text().splitlines())


def test_weights_that_are_not_finite_are_no_result(toy_run, monkeypatch, capsys):
    """Also when the loss of the last step logged was still a number."""
    plain = toy.evaluate

    def evaluate(student, *args):
        with torch.no_grad():
            next(student.parameters()).fill_(math.nan)
        return plain(student, *args)

    monkeypatch.setattr(toy, "evaluate", evaluate)
    assert toy_run("--run_name", "a", "--epochs", 1) == 1
    assert "not finite" in capsys.readouterr().err and not Path("runs/a/result.json").exists()


def test_several_students(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = toy.Args(run_name="r", student="resnet8,resnet14", epochs=1)
    args.typed = {"epochs": 1}
    run = common.Run(args)
    students = {name: common.build_model(name, 10) for name in ("resnet8", "resnet14")}
    run.begin(fake_data(), None, **students)
    run.end_epoch(0, {"resnet8": 40.0, "resnet14": 50.0})
    run.finish(students)
    assert [(row["student"], row["best"]) for row in result("runs/r")] == [
        ("resnet8", 40.0), ("resnet14", 50.0)]
    for name, net in students.items():
        state = torch.load(f"runs/r/student_{name}.pt", weights_only=True)
        assert list(state) == list(net.state_dict())
    assert metrics("runs/r")[-1]["top1_resnet14"] == 50.0


def test_flops_are_counted_once_and_added(tmp_path):
    args = toy.Args(out_dir=str(tmp_path))
    run = common.Run(args)
    net = nn.Linear(100, 10)
    for n in (2, 2, 5):
        with run.flops(f"step of {n}"):
            net(torch.rand(n, 100)).sum().backward()
    assert run.total_flops == 2 * 100 * 10 * (2 + 2 + 5) * 2  # forward, and the weight's gradient


def test_summarize(tmp_path, capsys):
    base = dict(
        method="toy", preset="auto", dataset="own", teacher="resnet8", student="resnet8",
        best=70.0, agree1=60.0, L_p=0.5, seconds=60, pflop=2.0, real_images=20)
    for seed, last, typed in ((0, 60.0, {}), (1, 62.0, {"seed": 1}), (2, 64.0, {"run_name": "x"}),
                              (0, 10.0, {"T": 9.0})):
        common.write_json(tmp_path / f"{last}" / "result.json",
                          [{**base, "seed": seed, "last": last, "typed": typed}])
    command("summarize", tmp_path)
    head, _, hot, plain = sorted(capsys.readouterr().out.splitlines(), key=lambda s: "toy" in s)
    if "--T" in plain:
        hot, plain = plain, hot
    assert "62.00 ± 2.00" in plain and "| 0, 1, 2 |" in plain
    assert "toy auto --T 9.0" in hot and "| 10.00 |" in hot


# ------------------------------------------------------------------------------ teachers, scores

def teacher_of(*words):
    args = parse("--dataset", "own", *map(str, words))
    data = common.load_data(args, CPU)
    return common.get_teacher(args, data), args, data


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder with the data set own, and none of its teachers."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "own", "own")
    return world / "data" / "teachers" / "own_resnet8.pt"


def test_teacher_given_placed_or_trained(place, monkeypatch, capsys):
    teacher, args, data = teacher_of("--teacher_ckpt", place)
    assert (args.teacher, teacher.arch, data.norm) == ("resnet8", "resnet8", "half")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    x = data.normalize(data.test_x)
    close(teacher(x), teacher.logits.numpy(), 1e-5)
    assert teacher.top1 == common.accuracy(teacher.logits, data.test_y)["top1"] > 62.5
    assert f"{teacher.top1:.2f} % of 41 test images" in capsys.readouterr().out

    plain = common.train_teacher

    def in_seconds(args, *rest):
        args.epochs, args.batch_size, args.lr = 6, 20, 0.05
        return plain(args, *rest)

    monkeypatch.setattr(common, "train_teacher", in_seconds)
    torch.manual_seed(0)
    trained, _, _ = teacher_of("--teacher", "resnet8")
    first = torch.rand(1)
    assert "training it" in capsys.readouterr().out
    torch.manual_seed(0)
    again, _, _ = teacher_of("--teacher", "resnet8")
    assert "training it" not in capsys.readouterr().out
    assert torch.equal(first, torch.rand(1))  # found or trained, the run is the same
    assert torch.equal(trained.logits, again.logits)
    assert again.path == Path("data/teachers/own_resnet8.pt")
    shutil.copy(place, "data/teachers/own_resnet8.pth")
    for name, age in (("old.pt.part7", 7200), ("young.pt.part8", 0), ("old.part7", 7200)):
        Path("data/teachers", name).touch()
        os.utime(f"data/teachers/{name}", (time.time() - age,) * 2)
    placed, _, _ = teacher_of("--teacher", "resnet8")
    assert placed.path.name == "own_resnet8.pth" and torch.equal(placed.logits, teacher.logits)
    assert {path.name for path in Path("data/teachers").glob("*.part*")} == {
        "young.pt.part8", "old.part7"}  # another process may still write the young one


def test_teacher_that_knows_nothing_stops_the_run(place, capsys):
    torch.save(common.build_model("resnet8", 4).state_dict(), "new.pt")
    with pytest.raises(SystemExit) as stop:
        teacher_of("--teacher_ckpt", "new.pt")
    assert stop.value.code == 2 and re.search(r"--norm.*classes", capsys.readouterr().err)
    known = torch.load(place, weights_only=True)
    torch.save({**known, "acc1": known["acc1"] + 6}, "boasts.pt")
    with pytest.raises(SystemExit) as stop:
        teacher_of("--teacher_ckpt", "boasts.pt")
    assert stop.value.code == 2


def test_teacher_in_bfloat16_answers_the_same(place):
    teacher, _, data = teacher_of("--teacher_ckpt", place, "--amp", "bf16")
    with common.autocast(CPU, "bf16"):
        logits = teacher(data.normalize(data.test_x)).float()
    close(logits, teacher.logits.numpy(), 0.05)
    assert teacher.net.conv1.weight.dtype == torch.bfloat16
    assert teacher.net.bn1.weight.dtype == torch.float32


def test_normalisation_typed_stored_or_of_the_data(place):
    known = torch.load(place, weights_only=True)
    torch.save({**known, "norm": "0.4,0.4,0.4,0.3,0.3,0.3", "acc1": 0.0}, "stored.pt")
    for words, norm in ((("--norm", "imagenet"), "imagenet"), ((), "0.4,0.4,0.4,0.3,0.3,0.3")):
        _, _, data = teacher_of("--teacher_ckpt", "stored.pt", "--smoke", *words)
        assert data.norm == norm


@pytest.mark.slow
def test_two_processes_without_a_teacher_both_end_well(tmp_path):
    make_own(tmp_path)
    words = ("tests/toy.py", "--smoke", "--dataset", "own", "--epochs", 1)
    pair = [start(*words, "--run_name", name, cwd=tmp_path) for name in "ab"]
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0 and not err, err
    assert [path.name for path in (tmp_path / "data" / "teachers").iterdir()] == [
        "own_resnet8_smoke.pt"]
    assert same_weights(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"own", "runs", "data"}
    code, out, err = run("common.py", "eval", "runs/a", "--dataset", "own", cwd=tmp_path)
    last = result(tmp_path / "runs" / "a")[0]["last"]
    assert code == 0 and f"top1 {last:.2f} %" in out, err


def test_eval_prints_every_score(toy_run, world, capsys):
    assert toy_run("--run_name", "a") == 0
    [row] = result("runs/a")
    teacher = world / "data" / "teachers" / "own_resnet8.pt"
    capsys.readouterr()
    flags = ("--teacher_ckpt", teacher, "--dataset", "own")
    for path in ("runs/a", "runs/a/student.pt"):
        assert command("eval", path, *flags) == 0
        out = capsys.readouterr().out
        for text in (f"top1 {row['last']:.2f} %", f"top5 {row['top5']:.2f} %",
                     f"agree1 {row['agree1']:.2f} %", f"L_p {row['L_p']:.4f}",
                     f"L_p_sqrt {row['L_p_sqrt']:.4f}", f"top1 {row['teacher_top1']:.2f} %",
                     f"{row['params']:,} parameters", f"{row['macs'] / 1e6:.1f} M"):
            assert text in out, text


def test_eval_takes_facts_from_config_json_but_no_code_and_no_paths(toy_run, tmp_path, capsys):
    assert toy_run("--run_name", "a", "--norm", "imagenet", "--epochs", 1) == 0
    (tmp_path / "evil.py").write_text("open('pwned', 'w').close()\ndef net(num_classes): pass")
    config = json.loads(Path("runs/a/config.json").read_text())
    config["args"].update(
        student="evil.py:net", teacher="evil.py:net", arch="evil.py:net", data_dir="/elsewhere",
        teacher_ckpt="/elsewhere/t.pt", out_dir="/elsewhere", device="cuda:7")
    Path("runs/a/config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert command("eval", "runs/a", "--dataset", "own") == 0
    out = capsys.readouterr().out
    assert "normalised by imagenet" in out and f"top1 {result('runs/a')[0]['last']:.2f}" in out
    assert sorted(tmp_path.rglob("*")) == before and not Path("pwned").exists()
    config["norm"] = "evil.py"
    Path("runs/a/config.json").write_text(json.dumps(config))
    assert command("eval", "runs/a", "--dataset", "own") == 2


def test_equal_logits_agree_exactly():
    logits = torch.randn(50, 10) * 20
    assert common.agreement(logits, logits) == {"agree1": 100.0, "L_p": 1.0, "L_p_sqrt": 1.0}
    far = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    close(common.js_distance(far, far.flip(0)), [math.sqrt(math.log(2))] * 2, 1e-12)
    assert common.accuracy(torch.eye(3), torch.arange(3))["top5"] == 100  # of three classes


def test_predict_takes_any_number_of_images_and_puts_the_mode_back():
    net = common.build_model("resnet8", 4)
    for n in (1, 251):
        data = fake_data(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), classes=4)
        logits = common.predict(net.train(), data)
        assert net.training and not logits.requires_grad
        close(net.eval()(data.normalize(data.test_x)), logits.numpy(), 1e-5)
        assert logits.dtype == common.predict(net, data, amp="bf16").dtype == torch.float32
        assert not net.training
