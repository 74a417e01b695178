"""Bad input ends with exit code 2 and one sentence, and nothing of the user's has changed."""
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import toy
from test_common import call, command, interrupt, make_own, tinted
from tools import ROOT, metrics, result, run, same_weights

SHORT = ("--dataset", "own", "--teacher_ckpt", "t.pt", "--batch_size", "20", "--epochs", "2",
         "--save_every", "1")
LAST, CONFIG = "runs/r/ckpt_last.pt", "runs/r/config.json"


class Evil:
    """A pickle of it runs code where code is allowed to run."""

    def __reduce__(self):
        return exec, ("open('pwned', 'w').close()",)


def stop():
    raise KeyboardInterrupt


def toy_command(*words):
    return call(toy.main, toy.Args, toy.PRESETS, words)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """own/{train,test}.npz, t.pt (a resnet8 that knows them), runs/r (one of two epochs done)."""
    folder = tmp_path_factory.mktemp("source")
    make_own(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command("train", "resnet8", "--dataset", "own", "--epochs", "6", "--batch_size", "20",
                "--lr", "0.05", "--out_dir", "made")
        shutil.move("data/teachers/own_resnet8.pt", "t.pt")
        shutil.rmtree("data")
        shutil.rmtree("made")
        interrupt(patch, 6, stop)
        assert toy_command(*SHORT, "--run_name", "r") == 130
    return folder


@pytest.fixture
def place(source, tmp_path, monkeypatch):
    """A copy of it to work in, without a network."""
    def no_network(url, *args, **kwargs):
        raise OSError(f"no network for {url}")

    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    return tmp_path


# ------------------------------------------------- what makes the trouble: steps before a command

def text(path, content):
    def write():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content)
    return write


def raw(path, change):
    """The bytes of a file, changed."""
    return lambda: Path(path).write_bytes(change(Path(path).read_bytes()))


def half(content):
    return content[:len(content) // 2]


def without(path):
    return lambda: Path(path).unlink()


def saved(content, path="t.pt", **options):
    return lambda: torch.save(content, path, **options)


def state(classes=4, **new):
    """Weights of a resnet8 with some entries of the first layers replaced."""
    weights = common.build_model("resnet8", classes).state_dict()
    return {**weights, **{key.replace("__", "."): value for key, value in new.items()}}


def tampered(change, path=LAST):
    """A file of torch.save, its content changed by a function."""
    def write():
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return write


def config(**new):
    """Entries of the run's config.json."""
    def write():
        content = json.loads(Path(CONFIG).read_text())
        content.update({key: value for key, value in new.items() if key in content})
        content["args"].update({key: value for key, value in new.items() if key not in content})
        Path(CONFIG).write_text(json.dumps(content))
    return write


def other_pixels(split):
    def write():
        with np.load(f"own/{split}.npz") as file:
            content = dict(file)
        content["x"][0, 0, 0] ^= 1
        np.savez(f"own/{split}.npz", **content)
    return write


X, Y = tinted(40, 3)


def npz(split="test", path="", **arrays):
    arrays = {key: value for key, value in {"x": X, "y": Y, **arrays}.items() if value is not None}
    return lambda: np.savez(path or f"own/{split}.npz", **arrays)


def tree(**files):
    """pics/{train,test}/{a,b,c,d}/{0,1}.png; then these files with these bytes (None: removed)."""
    def write():
        for split in ("train", "test"):
            for name in "abcd":
                Path("pics", split, name).mkdir(parents=True)
                for i in (0, 1):
                    image = Image.fromarray(tinted(4)[0]["abcd".index(name)])
                    image.save(f"pics/{split}/{name}/{i}.png")
        for path, content in files.items():
            path = Path("pics", path.replace("__", "/").replace("_dot_", "."))
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
    return write


def net(body, top=""):
    return text("net.py", f"import torch.nn as nn\n{top}\ndef f(num_classes):\n    return {body}\n")


def link(path, to):
    def write():
        shutil.move(path, to)
        Path(path).symlink_to(Path(to).resolve())
    return write


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    QUANTISED = torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8)
SPARSE = torch.ones(16).to_sparse()
LINEAR = "nn.Sequential(nn.Flatten(), nn.Linear({}, {}))"
NEW = (*SHORT, "--run_name", "new")
OWN_NET = (*NEW, "--student", "net.py:f")
PICS = (*NEW, "--dataset", "pics")
RESUME = ("--resume", "runs/r")
EXTRA = """
class Net(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass
"""

BAD = {  # what is bad: (words of the toy method, what the sentence says, steps that make it so)
    "a flag that is not there": ((*NEW, "--epoch", "3"), r"--epoch\b.*--help"),
    "a word for a number": ((*NEW, "--epochs", "many"), r"epochs.*many"),
    "no value": ((*NEW, "--lr"), r"--lr.*expected"),
    "a number below the least": ((*NEW, "--epochs", "0"), r"epochs.*1"),
    "below zero": ((*NEW, "--lr", "-1"), r"lr.*-1"),
    "nan": ((*NEW, "--lr", "nan"), r"lr.*nan"),
    "an absurd number": ((*NEW, "--epochs", "1" + "0" * 18), r"epochs.*1e9"),
    "no such choice": ((*NEW, "--amp", "fp16"), r"amp.*fp16.*bf16"),
    "no such preset": ((*NEW, "--preset", "hott"), r"hott.*hot"),
    "no such data set": ((*NEW, "--dataset", "cifar11"), r"cifar11.*cifar10"),
    "no such network": ((*NEW, "--student", "resnet19"), r"resnet19.*resnet20"),
    "no such device": ((*NEW, "--device", "tpu"), r"tpu.*cpu"),
    "no such norm": ((*NEW, "--norm", "nonsense"), r"nonsense.*cifar10"),
    "norm with dots": ((*NEW, "--norm", "1.2.3"), r"1\.2\.3.*six"),
    "norm with a deviation of zero": ((*NEW, "--norm", "0,0,0,1,1,0"), r"six"),
    "too few images": ((*NEW, "--limit_train", "3"), r"limit_train 3.*4 classes"),
    "a name that leads out": ((*SHORT, "--run_name", ".."), r"run_name.*plain"),
    "a name with a slash": ((*SHORT, "--run_name", "a/b"), r"run_name.*plain"),
    "a run of that name": ((*SHORT, "--run_name", "r"), r"runs/r exists"),
    "a folder of that name": (NEW, r"runs/new exists", text("runs/new/config.json", "{}")),
    "a file in place of a folder": ((*NEW, "--out_dir", "t.pt"), r"t\.pt.*check the path"),
    # the file of a teacher
    "no teacher": ((*NEW, "--teacher_ckpt", "no.pt"), r"no\.pt"),
    "a folder": ((*NEW, "--teacher_ckpt", "own"), r"own.*regular file"),
    "cut": (NEW, r"t\.pt cannot be read.*again", raw("t.pt", half)),
    "empty": (NEW, r"t\.pt cannot be read", raw("t.pt", lambda content: b"")),
    "noise": (NEW, r"t\.pt cannot be read", raw("t.pt", lambda content: bytes(range(256)) * 9)),
    "only text in it": (NEW, r"no weights", saved("a text")),
    "no weights in it": (NEW, r"no weights.*epoch", saved({"epoch": 3})),
    "of seven classes": (NEW, r"t\.pt.*4 classes", saved(state(7))),
    "another network": ((*NEW, "--teacher", "resnet20"), r"resnet8.*resnet20"),
    "a key too few": (NEW, r"t\.pt", tampered(
        lambda content: content["state_dict"].pop("layer2.0.bn1.weight"), "t.pt")),
    "a key too many": (NEW, r"t\.pt", saved(state(more__bias=torch.ones(3)))),
    "an odd shape": (NEW, r"t\.pt", saved(state(bn1__bias=torch.ones(3)))),
    "sparse": (NEW, r"bn1\.bias", saved(state(bn1__bias=SPARSE))),
    "quantised": (NEW, r"bn1\.bias", saved(state(bn1__bias=QUANTISED))),
    "without memory": (NEW, r"bn1\.bias", saved(state(bn1__bias=torch.ones(16, device="meta")))),
    "complex": (NEW, r"bn1\.bias", saved(state(bn1__bias=torch.ones(16) * 1j))),
    "all bool": (NEW, r"plain tensor", saved({k: v > 0 for k, v in state().items()})),
    "all int8": (NEW, r"plain tensor", saved({k: v.to(torch.int8) for k, v in state().items()})),
    "all int64": (NEW, r"t\.pt", saved({k: v.long() for k, v in state().items()})),
    "nested": (NEW, r"no weights", saved({"state_dict": {"net": state()}})),
    "norm is a matrix": (NEW, r"norm", tampered(
        lambda content: content.update(norm=torch.ones(2, 2)), "t.pt")),
    "code in an old file": (NEW, r"t\.pt cannot be read", saved(
        {"state_dict": state(), "x": Evil()}, _use_new_zipfile_serialization=False)),
    "code in a new file": (NEW, r"t\.pt cannot be read", saved({"state_dict": Evil()})),
    "code in a bare pickle": (NEW, r"t\.pt cannot be read", raw(
        "t.pt", lambda content: pickle.dumps(Evil(), 2))),
    # data
    "no images": ((*NEW, "--dataset", "src"), r"src.*train\.npz", text("src/readme", "")),
    "no train.npz": (NEW, r"train\.npz", without("own/train.npz")),
    "floats": (NEW, r"float64.*uint8", npz(x=X / 255)),
    "grey": (NEW, r"own.*test", npz(x=X[..., 0])),
    "no images in it": (NEW, r"test", npz(x=X[:0], y=Y[:0])),
    "labels too few": (NEW, r"40 images, .*39", npz(y=Y[1:])),
    "labels are floats": (NEW, r"integers", npz(y=Y / 1)),
    "labels below zero": (NEW, r"from 0", npz(y=Y - 1)),
    "a class without images": (NEW, r"train.*each", npz("train", y=np.where(Y == 2, 1, Y))),
    "one class": (NEW, r"class", npz(y=0 * Y)),
    "no labels": (NEW, r"own/test\.npz", npz(y=None)),
    "objects that run code": (NEW, r"own/test\.npz", npz(x=np.array([Evil()] * 40, object))),
    "classes in a square": (NEW, r"test", npz(classes=np.array([["a", "b"], ["c", "c"]] * 2))),
    "classes differ": (NEW, r"train and test differ", npz(classes=list("abcd"))),
    "npz cut": (NEW, r"own/test\.npz cannot be read", raw("own/test.npz", half)),
    "npz spoilt": (NEW, r"own/test\.npz cannot be read", raw(
        "own/test.npz", lambda content: content[:5000] + b"\xff" * 40 + content[5040:])),
    "npz is text": (NEW, r"own/test\.npz cannot be read", text("own/test.npz", "hello")),
    "an empty class": (PICS, r"test", tree(test__b__0_dot_png=None, test__b__1_dot_png=None)),
    "a picture cut": (PICS, r"1\.png cannot be read", tree(train__a__1_dot_png=b"\x89PNG\r\n")),
    "text as a picture": (PICS, r"0\.png cannot be read", tree(test__a__0_dot_png=b"hello")),
    "an archive cut": ((*NEW, "--dataset", "cifar10"), r"cifar-10-python\.tar\.gz", text(
        "data/cifar-10-python.tar.gz", "half of it")),
    "notes cut": ((*NEW, "--dataset", "tiny_imagenet"), r"val_annotations\.txt", text(
        "data/tiny-imagenet-200/val/val_annotations.txt", "0.JPEG\n")),
    # to go on with a run
    "no run": (("--resume", "runs/no"), r"runs/no.*no run folder"),
    "no config.json": (RESUME, r"no run folder", without(CONFIG)),
    "config.json cut": (RESUME, r"config\.json cannot be read", raw(CONFIG, half)),
    "config.json is a list": (RESUME, r"config\.json cannot be read", text(CONFIG, "[1]")),
    "of another program": (RESUME, r"config\.json", text(CONFIG, '{"method": "toy", "lr": 1}')),
    "of another method": (RESUME, r"pgdi.*toy", config(method="pgdi")),
    "settings missing": (RESUME, r"config\.json", config(args={})),
    "an unknown setting": (RESUME, r"config\.json.*colour", config(colour="red")),
    "a setting of another type": (RESUME, r"config\.json.*epochs", config(epochs="many")),
    "another setting": ((*RESUME, "--lr", "0.7"), r"lr 0\.7.*0\.05.*may change"),
    "no checkpoint": (RESUME, r"no checkpoint", without(LAST)),
    "checkpoint cut": (RESUME, r"ckpt_last\.pt cannot be read", raw(LAST, half)),
    "checkpoint of weights": (RESUME, r"ckpt_last\.pt cannot be read", saved(state(), LAST)),
    "an epoch of nan": (RESUME, r"ckpt_last\.pt cannot be read", tampered(
        lambda content: content.update(epoch=float("nan")))),
    "random states of text": (RESUME, r"ckpt_last\.pt cannot be read", tampered(
        lambda content: content.update(random_states="abc"))),
    "weights of another size": (RESUME, r"ckpt_last\.pt cannot be read", tampered(
        lambda content: content["objects"].update(student=state(7)))),
    "checkpoint with code": (RESUME, r"ckpt_last\.pt cannot be read", saved(Evil(), LAST)),
    "no metrics": (RESUME, r"runs/r", without("runs/r/metrics.jsonl")),
    "metrics too short": (RESUME, r"metrics\.jsonl is shorter", text("runs/r/metrics.jsonl", "")),
    "checkpoint is a link": (RESUME, r"link", link(LAST, "elsewhere.pt")),
    "metrics is a link": (RESUME, r"link", link("runs/r/metrics.jsonl", "elsewhere.jsonl")),
    "other images": (RESUME, r"images of own", other_pixels("test")),
    "other training images": (RESUME, r"images of own", other_pixels("train")),
    "another teacher": (RESUME, r"t\.pt is not the teacher", tampered(
        lambda content: content["state_dict"]["conv1.weight"].mul_(1.01), "t.pt")),
    # a network of one's own
    "no file": (OWN_NET, r"net\.py.*file\.py:callable"),
    "no such name in it": ((*NEW, "--student", "net.py:g"), r"net\.py:g", net("None")),
    "not a network": (OWN_NET, r"net\.py:f", net("None")),
    "wrong outputs": (OWN_NET, r"net\.py:f", net(LINEAR.format(3072, 5))),
    "wrong inputs": (OWN_NET, r"net\.py:f", net(LINEAR.format(3000, 4))),
    "no Linear in it": (OWN_NET, r"nn\.Linear", net("nn.Sequential(nn.Conv2d(3, 4, 32), "
                                                   "nn.Flatten())")),
    "an error in it": (OWN_NET, r"net\.py:f", net("None", "import no_such_module")),
    "a state that is no tensor": (OWN_NET, r"net\.py:f.*state_dict", net("Net(3072, 4)", EXTRA)),
}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_sentence(capfd, code):
    """The last command ended with code 2 and one line on stderr, which is returned."""
    err = capfd.readouterr().err
    assert code == 2, err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(place, capfd, kind):
    words, pattern, *steps = BAD[kind]
    for step in steps:
        step()
    before = files_of(place)
    capfd.readouterr()
    line = one_sentence(capfd, toy_command(*words))
    assert re.search(pattern, line), line
    after = files_of(place)
    assert {path: after.get(path) for path in before} == before
    assert not Path("pwned").exists()


def test_the_traps_would_have_worked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "x.pt")
    torch.load("x.pt", weights_only=False)
    assert Path("pwned").exists()


@pytest.mark.parametrize("content", (
    "[1, 2]", '{"score": 5}', '[{"method": "toy"}]', "no json", '["a"]', '[{"typed": 3}]'))
def test_results_of_other_programs(place, capfd, content):
    text("runs/x/result.json", content)()
    line = one_sentence(capfd, command("summarize", "runs"))
    assert "result.json" in line and Path("runs/x/result.json").read_text() == content


@pytest.mark.parametrize("words, pattern, steps", (
    (("no",), r"no: no such file", []),
    (("t.pt", "--arch", "resnet20", "--dataset", "own"), r"resnet8", []),
    (("t.pt", "--dataset", "own"), r"4 classes", [saved(state(7))]),
    (("runs/r", "--dataset", "own"), r"student\.pt", []),
    (("runs/r", "--dataset", "own"), r"config\.json", [
        saved(state(), "runs/r/student.pt"), text(CONFIG, '{"model": "gpt"}')]),
    (("runs/r", "--dataset", "own"), r"norm", [
        saved(state(), "runs/r/student.pt"), config(norm=[1, "a", None])]),
))
def test_eval_of_what_cannot_be_scored(place, capfd, words, pattern, steps):
    for step in steps:
        step()
    before = files_of(place)
    line = one_sentence(capfd, command("eval", *words))
    assert re.search(pattern, line), line
    assert files_of(place) == before


def test_links_are_not_written_through(place):
    """Also those with the names of our own files."""
    Path("mine.txt").write_text("mine")
    for name in ("lock", "config.json.part1", "ckpt_last.pt.part1", "student.pt"):
        Path("runs/r", name).symlink_to(Path("mine.txt").resolve())
    assert toy_command(*RESUME) == 0
    assert Path("mine.txt").read_text() == "mine"
    assert torch.load("runs/r/student.pt", weights_only=True)


def test_full_disk_leaves_the_old_checkpoint(place, monkeypatch, capfd):
    before = Path(LAST).read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in one_sentence(capfd, toy_command(*RESUME))
    assert Path(LAST).read_bytes() == before and not list(Path("runs/r").glob("*.part*"))
    assert toy_command(*RESUME) == 0


# ------------------------------------------------------------------------ in a process of its own

PIPES = """
import contextlib, runpy, sys
root, *commands = sys.argv[1:]
for command in commands:
    sys.argv = (root + command).split()
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_pipes_are_refused(place):
    """Whatever read one would wait for ever."""
    tree()()
    shutil.copytree("own", "piped")
    shutil.copytree("runs/r", "runs/s")
    pipes = ("pipe.pt", "piped/train.npz", "pics/test/a/0.png", "runs/s/config.json")
    for pipe in pipes:
        Path(pipe).unlink(missing_ok=True)
        os.mkfifo(pipe)
    commands = (
        "tests/toy.py --dataset own --teacher_ckpt pipe.pt", "common.py data piped",
        "tests/toy.py --dataset pics --teacher_ckpt t.pt", "tests/toy.py --resume runs/s")
    process = subprocess.Popen([sys.executable, "-c", PIPES, f"{ROOT}/", *commands],
                               stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    told = err.splitlines()
    assert len(told) == len(pipes) and all(line.startswith("error: ") for line in told), err
    for pipe, line in zip(pipes, told):
        assert pipe.removesuffix("/config.json") in line


@pytest.mark.slow
def test_closed_stderr_and_stray_ranks(place):
    """2>&-, and what a cluster's scheduler leaves in the environment."""
    words = (*SHORT, "--device", "cpu", "--run_name")
    line = f"{sys.executable} {ROOT / 'tests' / 'toy.py'} {' '.join(words)} a 2>&-"
    assert subprocess.run(line, shell=True, stdout=subprocess.DEVNULL).returncode == 0
    for name, rank in (("b", "1"), ("c", "abc")):
        env = {"RANK": rank, "WORLD_SIZE": "2"}
        code, _, err = run("tests/toy.py", *words, name, cwd=place, env=env)
        assert code == 0 and not err, err
        assert same_weights("runs/a", f"runs/{name}")
        assert metrics("runs/a") == metrics(f"runs/{name}") and result(f"runs/{name}")


@pytest.mark.slow
def test_whole_command_lines(place):
    """What the cases above do in one process, as a user types it."""
    for words in (("common.py", "evil"), ("tests/toy.py", "--epoch", "3")):
        code, out, err = run(*words, cwd=place)
        assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err) and not out
    line = f"{sys.executable} {ROOT / 'tests' / 'toy.py'} --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and not done.stderr
