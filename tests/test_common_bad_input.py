"""Bad input: each case ends with exit code 2 and one sentence that names the fix; no file of the user's changes."""
import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import adadfkd
import akd_gan
import common
import gda_kd
import netgraft
import pgdi
import toy

X, Y = np.random.RandomState(0).randint(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 4
OWN = "--dataset own --device cpu --run_name new"
BASE = {"toy": f"{OWN} --teacher resnet8 --student resnet8 --teacher_ckpt t.pt --allow_weak_teacher --shots 2 "
               "--epochs 2 --batch_size 8 --save_every 1", "train": f"{OWN} --arch resnet8 --epochs 1",
        "resume": "--resume runs/r", "eval": "--device cpu", "data": "", "summarize": ""}
SCRIPTS = {m.__name__: m for m in (pgdi, netgraft, akd_gan, adadfkd, gda_kd)}
BASE.update({name: BASE["toy"] if name == "pgdi" else BASE["toy"].replace("--shots 2 ", "") for name in SCRIPTS})
BASE["pgdi"] += " --warmup 0"
BASE["adadfkd"] += " --ep_steps 1 --kd_steps 1 --ngf 4"
BASE["akd_gan"] += " --epoch_itrs 1 --kd_steps 1 --ngf 4"
BASE["netgraft"] = BASE["netgraft"].replace("--epochs 2 --batch_size 8", "--epochs_block 1 --epochs_net 1")


class Evil:
    def __reduce__(self):
        return exec, ("open('pwned', 'w').close()",)


def call(command, flags):
    method = SCRIPTS.get(command, toy)
    what = common.COMMANDS.get(command, (method.main, method.Args, method.PRESETS, method.ALIASES))
    common.cli(*what, argv=BASE[command].split() + flags.split())


def put(files):
    """A step that writes (text or bytes) or removes (None) files."""
    def write():
        for path, data in ((Path(name), data) for name, data in files.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if data is None else path.write_bytes(data.encode() if isinstance(data, str) else data)
    return write


def alter(name, change, to=None):
    return lambda: Path(to or name).write_bytes(change(Path(name).read_bytes()))


def half(raw):
    return raw[:len(raw) // 2]


def spoil(raw, at=5000):
    return raw[:at] + b"\xff" * 40 + raw[at + 40:]


def npz(split="test", x=X, y=Y, save=np.savez, **more):
    return lambda: save(f"own/{split}.npz", x=x, y=y, **more)


def picture(kind):
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(X[0]).save(buffer, kind)
    return buffer.getvalue()


def tree(files):
    """A step that makes pics/{train,test}/{a,b,c,d}/{0,1}.png with these changes."""
    names, png = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "abcd" for i in (0, 1)], picture("PNG")
    return lambda: [put({f"pics/{n}": data for n, data in d.items()})() for d in (dict.fromkeys(names, png), files)]


def ckpt(obj, to="t.pt"):
    return lambda: torch.save(obj, to)


def config(**new):
    """A step that changes entries of the run's config.json; lower-case names are those of its args."""
    def write():
        saved = json.loads(Path(CONFIG_FILE).read_text())
        for key, value in new.items():
            (saved if key in saved else saved["args"])[key] = value
        Path(CONFIG_FILE).write_text(json.dumps(saved))
    return write


def without(key):
    """A step that takes an entry out of the checkpoint of the run."""
    return lambda: torch.save({k: v for k, v in torch.load(LAST, weights_only=True).items() if k != key}, LAST)


def weights(drop="", classes=4, **new):
    """A step that makes t.pt, a resnet8, with a key dropped or others (__ for the dot) put in."""
    def write():
        state = common.build_model("resnet8", classes).state_dict()
        state.update({k.replace("__", "."): v for k, v in new.items()})
        torch.save({"state_dict": {k: v for k, v in state.items() if k != drop}}, "t.pt")
    return write


def net(result, before=""):
    return put({"net.py": f"import torch.nn as nn\n{before}\ndef f(num_classes): return {result}"})


LAST, CONFIG_FILE, SAVED = "runs/r/ckpt_last.pt", "runs/r/config.json", "own/test.npz"
B, C = ([f"{c}/{i}.png" for i in (0, 1)] for c in ("test/b", "train/c"))
PICS, TINY, OWN_NET = "--dataset pics", "--dataset tiny_imagenet", "--student net.py:f"
WNIDS, NOTES = "data/tiny-imagenet-200/wnids.txt", "data/tiny-imagenet-200/val/val_annotations.txt"
LINEAR, TUPLE = "nn.Sequential(nn.Flatten(), nn.Linear({}, {}))", "nn.Sequential(nn.Flatten(1, 2), nn.LSTM(32, 4))"
TAR, CIFAR = "data/cifar-10-python.tar.gz", [f"data/cifar-10-batches-py/{n}" for n in ("test_batch", "data_batch_1")]
SOURCES = ("http://own.example/a.tgz", *common.ARCHIVES["cifar100"][3], "Put cifar-100-python.tar.gz into data")
NOISE, EVILS, OLD, NEW = np.random.RandomState(1).bytes(100), np.array([Evil()] * 40, object), *(
    pickle.dumps(Evil(), protocol) for protocol in (2, 4))
BAD = {  # what is bad: (command, flags, what the one line must say, steps that make the trouble)
    "teacher missing": ("toy", "--teacher_ckpt no.pt", r"no\.pt: no .*checkpoint"),
    "teacher a folder": ("toy", "--teacher_ckpt own", r"own: .*checkpoint.*directory"),
    "teacher cut": ("toy", "", r"t\.pt: damaged.*again", alter("t.pt", half)),
    "norm of dots": ("toy", "--norm 1.2.3", r"--norm 1\.2\.3: .*six numbers"),
    "temperature 0": ("toy", "--T 0", r"--T 0\.0: must be more than 0"),
    "teacher_ckpt missing, eval": ("toy", "--evaluate t.pt --teacher_ckpt no.pt", r"no\.pt: no readable checkpoint"),
    "own net, tuple in training": ("train", "--arch net.py:f", r"net\.py:f fails.*mend it", put({
        "net.py": "import torch.nn as nn\nclass N(nn.Linear):\n    def forward(self, x):\n"
                  "        y = super().forward(x.flatten(1))\n        return (y, y) if self.training else y\n"
                  "def f(num_classes): return N(3072, num_classes)"})),
    "batch of one": ("train", "--arch net.py:f --batch_size 1", r"batch of one image.*another batch size", net(
        "nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes), nn.BatchNorm1d(num_classes))")),
    "metrics gone": ("resume", "", r"metrics\.jsonl is shorter.*right file", put({"runs/r/metrics.jsonl": None})),
    "config a list": ("resume", "", r"no readable config\.json", put({"runs/r/config.json": "[]"})),
    "rows of text": ("summarize", "--runs notes.txt", r"notes\.txt: not a \.jsonl", put({"notes.txt": "hello"})),
    "teacher empty": ("toy", "", r"t\.pt: damaged.*again", put({"t.pt": ""})),
    "teacher noise": ("toy", "", r"t\.pt: damaged or not a checkpoint(?!.*weights_only).*again", put({"t.pt": NOISE})),
    "teacher of 7 classes": ("toy", "", r"t\.pt: .*resnet8 with 7 classes, the data set has 4", weights(classes=7)),
    "teacher not a resnet20": ("toy", "--teacher resnet20", r"t\.pt: this is resnet8.*give --teacher resnet8"),
    "teacher lacks a key": ("toy", "", r"1 missing.*layer2\.0\.bn1\.weight.*damaged", weights("layer2.0.bn1.weight")),
    "teacher lacks its head": ("toy", "", r"1 missing.*linear\.weight.*damaged", weights("linear.weight")),
    "teacher has a key more": ("toy", "", r"1 unexpected.*more\.bias.*damaged", weights(more__bias=torch.ones(3))),
    "teacher's odd shape": ("toy", "", r"1 of another shape.*bn1\.bias.*damaged", weights(bn1__bias=torch.ones(3))),
    "teacher a list": ("toy", "", r"t\.pt: .*not a checkpoint(?!.*weights_only)", put({"t.pt": pickle.dumps([1])})),
    "teacher a text": ("toy", "", r"t\.pt: no weights found.*\bstr\b", ckpt("a text")),
    "teacher no weights": ("toy", "", r"t\.pt: no weights found.*epoch", ckpt({"epoch": 3})),
    "teacher evil (old)": ("toy", "", r"t\.pt: refused.*exec.*state_dict", put({"t.pt": OLD})),
    "teacher evil (new)": ("toy", "", r"t\.pt: (refused|.*not a checkpoint)(?!.*weights_only)", put({"t.pt": NEW})),
    "teacher evil inside": ("toy", "", r"t\.pt: refused.*exec.*state_dict", ckpt({"state_dict": {}, "x": Evil()})),
    "teacher an encoder": ("toy", "", r"few-shot encoder.*gda_kd\.py --task fewshot",
                           ckpt({"encoder.layer1.0.conv1.weight": torch.ones(64, 3, 3, 3)})),
    "teacher near chance": ("toy", "--no_allow_weak_teacher", r"t\.pt.* %.*--allow_weak_teacher"),
    "data empty": ("data", "--dataset src", r"src: no test split.*train\.npz", put({"src/readme": ""})),
    "no train.npz": ("toy", "", r"own.train\.npz.*needs train\.npz and test\.npz", put({"own/train.npz": None})),
    "no test.npz": ("toy", "", r"own.test\.npz.*needs train\.npz and test\.npz", put({SAVED: None})),
    "npz of floats": ("toy", "", r"own.*test.*x is float64.*uint8", npz(x=X / 255)),
    "npz grey": ("toy", "", r"own.*train.*x .*\(40, 32, 32\).*N x H x W x 3", npz("train", X[..., 0])),
    "npz labels too few": ("toy", "", r"own.*test.*y .*\(39,\).*40 .*integers", npz(y=Y[1:])),
    "npz labels floats": ("toy", "", r"own.*test.*y is float64.*integers", npz(y=Y / 1)),
    "npz labels below 0": ("toy", "", r"own.*test.*labels run from -1.*4 classes", npz(y=Y - 1, classes=list("abcd"))),
    "npz labels above 3": ("train", "", r"own.*train.*labels run from 0 to 4.*4 cl", npz("train", y=np.arange(40) % 5)),
    "npz of objects": ("toy", "", r"own.*test.*(?i:object).*integers", npz(x=EVILS)),
    "npz without y": ("toy", "", r"own.*test.*\by is not.*integers", lambda: np.savez(SAVED, x=X)),
    "npz cut": ("toy", "", r"own.*test.*not a zip.*integers", alter(SAVED, half)),
    "npz spoilt": ("toy", "", r"own.*test.*CRC.*integers", alter(SAVED, spoil)),
    "npz packed, spoilt": ("toy", "", r"own.*test.*decompress.*integers", npz(x=X // 64, save=np.savez_compressed),
                           alter(SAVED, lambda raw: spoil(raw, 100))),
    "npz an npy": ("toy", "", r"own.*test.*integers", lambda: np.save("x.npy", X), alter("x.npy", bytes, SAVED)),
    "npz lacks class 2": ("toy", "", r"own.*train.*no image of class 2.*every", npz("train", y=np.where(Y == 2, 1, Y))),
    "npz classes differ": ("toy", "", r"own.*train and test differ.*classes", npz(classes=list("abce")),
                           npz("train", classes=list("abcd"))),
    "tree, test/b empty": ("toy", PICS, r"pics.*test.*classes b\b.*every class", tree(dict.fromkeys(B))),
    "tree, train/c empty": ("toy", PICS, r"pics.*train.*classes c\b.*every class", tree(dict.fromkeys(C))),
    "tree, classes differ": ("toy", PICS, r"pics.*different class.*\(e\).*every", tree({"test/e/0.png": ""})),
    "tree, jpeg cut": ("toy", PICS, r"a.2\.jpg cannot be read.*remove", tree({"test/a/2.jpg": half(picture("JPEG"))})),
    "tree, png cut": ("toy", PICS, r"d.1\.png cannot be read.*remove", tree({"train/d/1.png": half(picture("PNG"))})),
    "tree, text as png": ("toy", PICS, r"d.0\.png cannot be read.*remove", tree({"test/d/0.png": "hello"})),
    "tree, texts as png": ("toy", PICS, r"\.png cannot be read.*remove", tree(dict.fromkeys(B + C, ""))),
    "archive half": ("toy", "--dataset cifar10", r"cifar-10-python\.tar\.gz.*remove", put({TAR: NOISE})),
    "cifar altered": ("toy", "--dataset cifar10", r"cifar-10-batches-py.*test.*remove", put(dict.fromkeys(CIFAR, OLD))),
    "tiny, no wnids": ("toy", TINY, r"wnids\.txt.*unpack", put({NOTES: "0.JPEG\tn1"})),
    "tiny, no notes": ("toy", TINY, r"val_annotations\.txt.*unpack", put({WNIDS: "n1\nn2"})),
    "tiny, notes cut": ("toy", TINY, r"(val_annotations\.txt|test split).*unpack", put({
        WNIDS: "a b c d", NOTES: "0.JPEG\ta\n1.J", "data/tiny-imagenet-200/val/images/0.JPEG": picture("JPEG")})),
    "no network": ("toy", f"--dataset cifar100 --data_url {SOURCES[0]}", ".*".join(map(re.escape, SOURCES))),
    "limit_train 3": ("train", "--limit_train 3", r"--limit_train 3.*4 classes"),
    "resume, no run": ("resume", "--resume runs/no", r"--resume runs.no: no run folder"),
    "resume, no run in run": ("resume", "--resume runs/r/no", r"--resume runs.r.no: no run folder"),
    "resume, no config": ("resume", "", r"runs.r: no run.*config\.json", put({CONFIG_FILE: None})),
    **{f"resume, {key} {value!r}": ("resume", "", r"runs.r: no run.*config\.json", config(**{key: value}))
       for key, value in (("args", []), ("args", None), ("given", None), ("derived", None))},
    "resume, epochs abc": ("resume", "", r"--epochs abc: expected int", config(epochs="abc")),
    "resume, seed -5": ("resume", "", r"--seed -5: must be 0", config(seed=-5)),
    "resume, amp fp16": ("resume", "", r"--amp fp16: expected none, bf16", config(amp="fp16")),
    "resume, other teacher": ("resume", "", r"t\.pt is not the teacher.*put that one back",
                              weights(bn1__bias=torch.ones(16))),
    "resume, no seconds": ("resume", "", r"ckpt_last\.pt is not the checkpoint of a run", without("seconds")),
    "eval, no run": ("eval", "--evaluate own", r"--evaluate own: no run folder"),
    "rows of numbers": ("summarize", "--runs n.jsonl", r"n\.jsonl: not a \.jsonl", put({"n.jsonl": "5\n"})),
    "one class": ("toy", "", r"own.*test.*one class only", npz(y=0 * Y)),
    "npz of empty images": ("toy", "", r"own.*test.*x is uint8 of shape", npz(x=X[:, :0])),
    "resume, cut config": ("resume", "", r"runs.r: no run.*config\.json", alter(CONFIG_FILE, half)),
    "resume, odd config": ("resume", "", r"runs.r: .*config\.json", put({CONFIG_FILE: '{"method": "toy"}'})),
    "resume, other method": ("resume", "", r"of other, not of toy", put({CONFIG_FILE: '{"method": "other"}'})),
    "resume, other lr": ("resume", "--lr 0.7", r"--lr 0\.7 differs.*0\.05.*only.*may change"),
    "resume, cut file": ("resume", "", r"ckpt_last\.pt: damaged.*again", alter(LAST, half)),
    "resume, other file": ("resume", "", r"ckpt_last\.pt", alter("t.pt", bytes, LAST)),
    "resume, evil file": ("resume", "", r"ckpt_last\.pt: refused.*exec", ckpt({"objects": Evil()}, LAST)),
    "own net missing": ("toy", OWN_NET, r"net\.py: no such file.*file\.py:callable"),
    "own net not in file": ("toy", f"{OWN_NET}f", r"net\.py has no callable .?ff.*mean f\?", net("None")),
    "own net, 5 outputs": ("toy", OWN_NET, r"net\.py:f.*\(2, 5\).*\(2, 4\)", net(LINEAR.format(3072, 5))),
    "own net, a tuple": ("train", "--arch net.py:f", r"net\.py:f.*tuple", net(TUPLE)),
    "own net, not a net": ("toy", OWN_NET, r"net\.py:f", net("None")),
    "own net, wrong size": ("toy", OWN_NET, r"net\.py:f.*3000", net(LINEAR.format(3000, 4))),
    "own net, no import": ("toy", OWN_NET, r"net\.py.*no_such_module", net("None", "import no_such_module")),
    "netgraft at 64": ("toy", "--student netgraft_vgg16", r"32x32.*another net", npz(x=X.repeat(2, 1).repeat(2, 2))),
    "eval of nothing": ("eval", "--evaluate no", r"\bno: no .*checkpoint"),
    "eval, 7 classes": ("eval", "--dataset own --evaluate t.pt", r"7 classes, the data set has 4", weights(classes=7)),
    "grid without .png": ("data", "--dataset own --grid grid", r"grid.*\.png"),
    **{flags: ("toy", flags, pattern) for flags, pattern in {
        "--epoch 3": r"--epoch \(did you mean --epochs", "--amp fp16": r"--amp.*fp16.*none, bf16",
        "--dataset cifar11": r"cifar11.*did you mean cifar10", "--dataset own_no": r"own_no.*train\.npz.*test/CLASS",
        "--teacher resnet19": r"--teacher resnet19.*mean resnet1", "--method no": r"--method no: not one of toy, hot",
        "--student resnet19": r"--student resnet19.*mean resnet1", "--device tpu": r"--device tpu.*\bcpu\b",
        "--preset hott": r"--preset hott.*mean hot\?.*known", "--norm nonsense": r"--norm nonsense.*cifar10.*six num",
        "--shots 11": r"--shots 11.*10 images.*ask for", "--shots 0": r"--shots 0: .*ask for",
        "--epochs -1": r"--epochs -1: must be 1 or more", "--epochs 0": r"--epochs 0: must be 1 or more",
        "--batch_size 0": r"--batch_size 0: must be 1 or more", "--lr nan": r"--lr nan: must be",
        "--lr -1": r"--lr -1\.0: must be 0 or more", "--lr": r"--lr needs a value",
        "--seed first": r"--seed.*first.*int", f"--seed {10 ** 20}": r"--seed",
        "--smoke maybe": r"--smoke.*maybe.*(?i:true)", "--limit_test 3": r"--limit_test 3.*4 classes",
        "--run_name r": r"runs.r exists.*--run_name.*--resume runs.r", "--out_dir t.pt": r"t\.pt.*check the path",
        "--evaluate runs/no/student.pt": r"no.student\.pt: no .*checkpoint"}.items()}}


@pytest.fixture(scope="module")
def bad_source(tmp_path_factory):
    """own/{train,test}.npz of four classes, t.pt (an untrained resnet8), runs/r (one of two epochs done)."""
    folder, handler = tmp_path_factory.mktemp("bad"), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as mp, contextlib.suppress(SystemExit):
        mp.chdir(folder)
        os.mkdir("own")
        npz("train")(), npz("test")(), weights()()
        call("toy", "--run_name r --time_limit 1e-9")
    signal.signal(signal.SIGINT, handler)
    shutil.rmtree(folder / "data")
    return folder


@pytest.fixture
def bad_place(bad_source, tmp_path, monkeypatch):
    """A copy of it to work in, without a network."""
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    shutil.copytree(bad_source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


def one_line(capfd, command, flags, code=2):
    """The one line on stderr of a command that ends with this code."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings(record=True) as told:
        call(command, flags)
    lines = capfd.readouterr().err.splitlines() + [str(w.message) for w in told if w.category is UserWarning]
    assert stop.value.code == code and len(lines) == 1 and lines[0].startswith("error: "), (stop.value.code, lines)
    return lines[0]


TRAIN_SPLIT = ("no train.npz", "npz grey", "npz lacks class 2", "npz classes differ", "tree, train/c empty",
               "tree, png cut")


def fits(script, name):
    """Whether a case of the toy method says something about this script too; data-free ones open no train split."""
    command, flags, *_ = BAD[name]
    known = {f.name for f in dataclasses.fields(SCRIPTS[script].Args)} - {"shots", "preset"}
    mistyped = {"epoch"} if "epochs" in known else set()
    return command == "toy" and set(re.findall(r"--(\w+)", flags)) <= known | mistyped and not (
        script == "netgraft" and "--batch_size 0" in flags or script in ("akd_gan", "adadfkd") and name in TRAIN_SPLIT)


@pytest.mark.parametrize("command, name", [(BAD[name][0], name) for name in BAD] + [
    (script, name) for script in SCRIPTS for name in BAD if fits(script, name)])
def test_bad_input(bad_place, capfd, command, name):
    _, flags, pattern, *steps = BAD[name]
    for step in steps:
        step()
    before = {f: f.read_bytes() for f in bad_place.rglob("*") if f.is_file()}
    line = one_line(capfd, command, flags)
    assert re.search(pattern, line), line
    assert all(f.read_bytes() == data for f, data in before.items()) and not Path("pwned").exists()


def test_missing_parts_of_the_machine(bad_place, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert re.search(r"--tensorboard.*pip install tensorboard", one_line(capfd, "toy", "--tensorboard"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert re.search(r"--device cuda: .*--device cpu", one_line(capfd, "toy", "--device cuda"))


def test_disk_full(bad_place, monkeypatch, capfd):
    run, whole, fsync = Path("runs/new"), [], os.fsync

    def full(fd):
        if (run / "ckpt_last.pt").is_file() and list(run.glob("ckpt_last.pt.*")):
            whole.append((run / "ckpt_last.pt").read_bytes())
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(common.os, "fsync", full)
    assert re.search(r"disk is full.*--resume", one_line(capfd, "toy", ""))
    assert [(run / "ckpt_last.pt").read_bytes()] == whole and not list(bad_place.rglob("*.part*"))
    assert common.read_checkpoint(run / "ckpt_last.pt")["epoch"] == 0
    monkeypatch.setattr(common.os, "fsync", fsync)
    call("resume", "--resume runs/new")
    assert json.loads((run / "result.json").read_text())["method"] == "toy"


def test_output_that_nobody_reads(tmp_path):
    """`script --help | head -1` ends without a word of its own."""
    command = f"{sys.executable} {Path(common.__file__).parent / 'pgdi.py'} --help | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and not done.stderr


def test_nan_loss(bad_place, monkeypatch, capfd):
    monkeypatch.setattr(toy, "kd_loss", lambda s, t, T: s.sum() * float("nan"))
    assert re.search(r"loss/kd is nan.*last checkpoint.*runs.new", one_line(capfd, "toy", "", code=1))
    assert common.read_checkpoint("runs/new/ckpt_last.pt")["epoch"] == 0 and not Path("runs/new/result.json").exists()
