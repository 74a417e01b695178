"""NetGraft: small blocks are grafted into the teacher one at a time, then joined, until they are the student.

Paper   Shen et al., "Progressive Network Grafting for Few-Shot Knowledge Distillation", AAAI 2021, arXiv 2012.04915
Data    K images per class (default 10); labels serve only to draw as many of each class, unlabelled images of your own
        do as well; the test split only for reporting.
Result  published, best test epoch, mean of 5 runs: CIFAR-10, 10 shots 92.89 of a teacher with 92.83 (rows: PUBLISHED)

Teacher and student are cut into blocks B_0..B_N and S_0..S_N (stem, stages, head). Leading blocks of one architecture
are shared and frozen, and so is a head of one shape. The rest of the student is the scion, in grafts
G_b = e_b . S_b . a_b; a_b and e_b are 1x1 convs with bias to and from the student's width, where it differs (VGG16).

Stage 1, for each graft b by itself (phases "block b/n")
  1. every epoch: shuffle the images, draw one of the 162 crops and flips for each
  2. t = B_N ... B_0 (x), and s the same with G_b in the place of its counterpart; one Adam step on G_b (rates lr_block
     for S_b, lr_t2s for a_b, lr_s2t for e_b) with (1), or (2) under --no-norm_loss
       L = sum_n sum_c (s_nc / |s_n| - t_nc / |t_n|)^2            sum over batch and classes                        (1)
       L = mean_nc (s_nc - t_nc)^2                                mean over batch and classes                       (2)
Stage 2, for L = 2..n (phases "net L-1/n-1")
  3. the same with the first L grafts joined and a new Adam at lr_net; at the end only shared blocks are the teacher's
Folding (VGG16)
  4. e and a of two neighbours follow each other: one affine map per pixel
       u -> P u + c,   P = A E,   c = A b_e + b_a                                                                   (3)
     It moves into the conv behind it (W: out, in, 3, 3), whose zero padding knows no c: the bias depends on the place
       W'[o, :] = sum_i W[o, i] P[i, :],   bias_map = conv(zero-padded constant image c, W) + b                     (4)
     and the last pair with the student's two Linears becomes one Linear.
Option --init teacher (not in the paper): VGG16 grafts begin with the channels u of each teacher layer that have the
largest mean square; the weights behind them take in what the others (v) are by least squares on the images
  0. v ~ R u + r,   W' = W_u + W_v R,   b' = b + sum_taps W_v r                                                     (5)
ResNet, WRN: each residual block copies one of the teacher's stage, chosen evenly from first to last

Symbols  B_i -> t_blocks[i], S_i -> s_blocks[i], G_b -> scion[b], s, t -> s_logits, t_logits, K -> shots
Schedule for K shots: hparams. Batch 64 K/10, rates of stage 1 times K/10, lr_net 1e-4, a fixed number of steps.

Deviations from the published code
  D1 the published number is the best test epoch of the last phase; the result here is the last, the best beside it
  D2 the official code never folds and saves the scion alone; student.pt is a complete network without the 1x1 convs
  D3 teacher outputs of all 162 views of an image, and of the test images before the scion, are computed once and kept
     (the same numbers bit for bit, some twenty times faster); --cache_gb 0 computes them in every step
  D4 the phases before the last are tested at their end only, not after every epoch
  D5 a lone last image joins the batch before it, for batch norm (no published schedule leaves one)

  python netgraft.py --smoke                 # no download, a minute
  python netgraft.py --dataset cifar10       # the published 10-shot run; --shots 1 ... 50 for the others
"""
import hashlib
import math
from collections import OrderedDict, namedtuple
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import (
    PADDING, Data, ResBlock, ResNet, Run, VGGBlocks, WideBlock, WideResNet, accuracy, agreement, autocast, batches,
    build_model, cli, count_params_macs, crop_flip, evaluate_file, fail, get_teacher, is_state_dict, load_data,
    load_teacher, per_call, published_row, read_checkpoint, read_images, read_json, safe_unpickle, shapes_of)


@dataclass
class Args:
    # shared by all scripts, word for word
    data_dir: str = "./data"  # where data sets, their cache and teachers are kept
    data_url: str = ""  # own mirror of the archive, tried first
    limit_train: int = 0  # class-balanced part of the training images; 0 = all
    limit_test: int = 0  # class-balanced part of the test images; 0 = all
    teacher_ckpt: str = ""  # teacher file of any published layout; none = placed in data_dir/teachers, else trained now
    allow_weak_teacher: bool = False  # go on with a teacher near chance or far below its stored accuracy
    norm: str = "auto"  # name in NORMS or six numbers (means, stds); auto = the teacher's, else the data set's
    preset: str = "auto"  # published values of the pair, or a variant; none = the bare defaults
    smoke: bool = False  # the whole pipeline on a few shapes, under a minute on a CPU
    seed: int = 0  # seeds python, numpy, torch; pgdi: the choice of shots too
    deterministic: bool = False  # deterministic kernels, an error where there are none
    device: str = "auto"  # auto, cuda, cuda:N or cpu
    amp: Literal["none", "bf16"] = "none"  # bf16 autocast of the networks; losses stay in float32
    compile: bool = False  # torch.compile of the networks in the student's steps
    select: Literal["last", "best_test"] = "last"  # weights in student.pt; the result is the last epoch's
    eval_every: int = 1  # epochs between evaluations (the last one always)
    log_every: int = 100  # steps between log points
    save_every: int = 10  # epochs between checkpoints (and every 5 minutes)
    out_dir: str = "runs"  # parent of the run folder
    run_name: str = ""  # exact name of the run folder; derived if not given
    resume: str = ""  # run folder to go on with
    evaluate: str = ""  # run folder or checkpoint: print every metric and exit
    time_limit: float = 0.0  # seconds until a clean stop; 0 = none
    tensorboard: bool = False  # also write TensorBoard files
    # the method's own defaults
    dataset: str = "cifar10"  # cifar10, cifar100, tiny_imagenet, shapes, or a folder of your own
    teacher: str = "netgraft_vgg16"  # network: a name in MODELS, or file.py:callable
    student: str = "netgraft_vgg16_student"  # network: a name in MODELS, or file.py:callable
    shots: int = 10  # real images per class; their labels are not used
    fewshot_seed: int = -1  # seeds the choice of shots, whatever --seed; -1 = published: 6, above 10 classes 10
    fewshot_dir: str = ""  # folder of unlabelled images, at any depth, in the place of drawn shots
    fewshot_file: str = ""  # official pickle of few-shot images in the place of drawn shots
    build_dataset: bool = False  # only draw the shots, print their hash and stop
    epochs_block: tuple[int, ...] = ()  # stage 1: epochs of each graft, the last one repeats, 0 skips; none = published
    epochs_net: tuple[int, ...] = ()  # stage 2: epochs of 2, 3 ... joined grafts, likewise
    batch_size: int = 0  # images per step; 0 = published: 64 for 10 shots
    lr_block: tuple[float, ...] = ()  # stage 1: rate of each student block; none = published, as in the next two
    lr_t2s: tuple[float, ...] = ()  # stage 1: rate of the 1x1 conv before graft 2, 3 ...
    lr_s2t: tuple[float, ...] = ()  # stage 1: rate of the 1x1 conv behind graft 1, 2 ...
    lr_net: float = 1e-4  # stage 2: rate of everything
    scale_with_shots: bool = True  # published batch size and rates of stage 1 times shots / 10
    norm_loss: bool = True  # loss on normalised logits, eq. (1); off: eq. (2)
    adapt_bias: bool = True  # bias in the 1x1 convs
    init: Literal["random", "teacher"] = "random"  # grafts begin as published, or with the teacher's weights, eq. (5)
    fold: bool = True  # student.pt without 1x1 convs; off: prefix and scion as they were trained
    cache_gb: float = 4.0  # memory for the kept outputs of all views, and for those of the test images; 0 = none


PRESETS = {
    "auto": {"*": dict(eval_every=10, save_every=50)},  # epochs of the last phase
    "recover": {"*": dict(eval_every=10, save_every=50, init="teacher")},
    "demo": {"*": dict(dataset="shapes", teacher="resnet20", student="resnet8", epochs_block=(40, 70, 20), cache_gb=0.6,
                       epochs_net=(40, 120), batch_size=32, lr_block=(4e-3,), lr_net=2e-3, eval_every=40)},
    "smoke": {"*": dict(dataset="shapes", teacher="resnet14", student="resnet8", limit_train=300, limit_test=200,
                        shots=2, epochs_block=(2,), epochs_net=(2,), log_every=1, allow_weak_teacher=True)}}
ALIASES = {"nshot": "shots", "num_per_class": "shots"}
PAIR = ("netgraft_vgg16", "netgraft_vgg16_student")
PUBLISHED = {("auto", dataset, *PAIR, shots): (top1, "best test epoch, mean of 5 runs") for dataset, row in {
    "cifar10": (90.74, 92.60, 92.70, 92.77, 92.88, 92.84, 92.77, 92.83, 92.88, 92.89, 92.78, 92.76),
    "cifar100": (64.22, 66.51, 67.35, 67.69, 68.16, 68.38, 68.46, 68.78, 68.77, 68.86, 69.04, 69.06)}.items()
    for shots, top1 in zip((*range(1, 11), 20, 50), row)}  # preset, data, teacher, student, shots -> top-1, protocol
SCHEDULES = {  # for 10 shots; stage 1 graft by graft, stage 2 for 2 and 3 joined grafts
    "cifar10": dict(s1_epochs=(100, 60, 60), s2_epochs=(100, 100), s1_lr_block=(2.5e-4, 2.5e-4, 2.5e-4),
                    s1_lr_t2s=(2.5e-3, 2.5e-3), s1_lr_s2t=(2.5e-3, 2.5e-3)),
    "cifar100": dict(s1_epochs=(1000, 200, 200), s2_epochs=(150, 150), s1_lr_block=(2.5e-4, 1e-3, 1e-3),
                     s1_lr_t2s=(1e-3, 1e-3), s1_lr_s2t=(1e-3, 1e-3))}


def hparams(dataset: str, shots: float, scale: bool = True) -> dict[str, Any]:
    """The published values for any number of images per class; `dataset` is the column: cifar10 up to 10 classes."""
    f = shots / 10 if scale else 1.0
    batch = max(2, int(64 * f))
    values = {k: tuple(f * v for v in row) if "_lr_" in k else row for k, row in SCHEDULES[dataset].items()}
    return {**values, "s1_batch": batch, "s2_batch": batch, "s2_lr": 1e-4}


def norm_mse(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Rows of length 1; sum over batch and classes, eq. (1)."""
    return (F.normalize(s_logits, eps=1e-12) - F.normalize(t_logits, eps=1e-12)).square().sum()


def cut(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network in forward order, made of its own modules: stem, stages, head."""
    if isinstance(net, VGGBlocks):
        return [*net.features, nn.Sequential(nn.Flatten(), net.classifier)]
    mean = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if isinstance(net, ResNet):
        pool = [nn.MaxPool2d(3, 2, 1)] if net.stem == "imagenet" else []
        stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *pool)
        return [stem, *(getattr(net, f"layer{i + 1}") for i in range(net.stages)), nn.Sequential(*mean, net.linear)]
    if isinstance(net, WideResNet):
        head = nn.Sequential(net.bn1, nn.ReLU(), *mean, net.fc)
        return [nn.Sequential(net.conv1), net.block1, net.block2, net.block3, head]
    if not isinstance(net, nn.Sequential):
        fail(f"{type(net).__name__} cannot be cut into blocks; this works for resnet and wrn networks, netgraft_vgg16, "
             "and a network of your own that is one nn.Sequential of its blocks")
    blocks: list[nn.Module] = []
    for module in net:  # what has no weights (activation, pool, flatten) belongs to the block before it
        bare = blocks and not list(module.parameters())
        blocks.append(nn.Sequential(*blocks.pop(), module) if bare else nn.Sequential(module))
    return blocks


def cut_shapes(blocks: list[nn.Module], size: int) -> list[tuple]:
    """Shapes (without batch) of the image and of what it is behind each block, which must not overwrite its input."""
    x, shapes = torch.zeros(2, 3, size, size, device=next(blocks[0].parameters()).device), []
    with torch.no_grad():
        for i, block in enumerate(blocks):
            shapes.append(tuple(x.shape[1:]))
            version, y = x._version, block.eval()(x)
            if x._version != version:
                fail(f"block {i} overwrites its input, which others need: its first activation must not be in-place")
            x = y
    return [*shapes, tuple(x.shape[1:])]


def match(teacher: nn.Module, student: nn.Module, size: int, bias: bool = True) -> tuple[int, nn.Sequential]:
    """(number of shared leading blocks, scion); in shared blocks the student gets the teacher's weights."""
    t_blocks, s_blocks = cut(teacher), cut(student)
    hint = "; pairs that work: resnet56 -> resnet20, wrn40_2 -> wrn16_2, netgraft_vgg16 -> netgraft_vgg16_student"
    family = [c for c in (VGGBlocks, ResNet, WideResNet, nn.Sequential) if isinstance(teacher, c)][0]
    if not isinstance(student, family) or len(t_blocks) != len(s_blocks):
        fail(f"teacher ({len(t_blocks)} blocks) and student ({len(s_blocks)}) must be of one family and have as many "
             f"blocks{hint}")
    t_shapes, s_shapes = cut_shapes(t_blocks, size), cut_shapes(s_blocks, size)
    for i, (t, s) in enumerate(zip(t_shapes, s_shapes)):
        if t != s and not (family is VGGBlocks and t[0] > s[0] and isinstance(student.classifier, nn.Sequential)):
            fail(f"behind block {i - 1} (the stem is 0) the teacher has {t}, the student {s}; they must be equal{hint}")
    shared = [str(t) == str(s) and shapes_of(t.state_dict()) == shapes_of(s.state_dict())
              for t, s in zip(t_blocks, s_blocks)]
    start, stop = [*shared, False].index(False), len(shared) - shared[-1]
    if start >= stop:
        fail(f"teacher and student are the same network, nothing is left to graft{hint}")
    for i in (*range(start), *range(stop, len(shared))):
        s_blocks[i].requires_grad_(False).load_state_dict(t_blocks[i].state_dict())
    scion = nn.Sequential()
    for i in range(start, stop):
        t2s, s2t = ([nn.Conv2d(a[0], b[0], 1, bias=bias)] if a != b else [] for a, b in (
            (t_shapes[i], s_shapes[i]), (s_shapes[i + 1], t_shapes[i + 1])))
        for conv in t2s + s2t:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if bias:
                nn.init.zeros_(conv.bias)
        scion.append(nn.Sequential(*t2s, s_blocks[i], *s2t))  # keys as in the official file: 0.0.0.weight ...
    return start, scion


class Graft(nn.Sequential):
    """The grafted teacher: some of its blocks, a scion in the place of others, the rest of it."""

    def __init__(self, prefix: Iterable[nn.Module], scion: Iterable[nn.Module], suffix: Iterable[nn.Module]):
        parts = {"prefix": prefix, "scion": scion, "suffix": suffix}
        super().__init__(OrderedDict((name, nn.Sequential(*part)) for name, part in parts.items()))

    def train(self, mode: bool = True) -> "Graft":
        super().train(False)  # the teacher's batch norm never leaves eval mode
        self.scion.train(mode)
        return self


VIEWS = 2 * (2 * PADDING + 1) ** 2  # crops and flips of an image: 162
Phase = namedtuple("Phase", "name first stop begin end optimizer")  # grafts first..stop learn, epochs begin..end


def view_images(data: Data, x: Tensor, rows: Tensor) -> Tensor:
    """Row VIEWS * i + v is view v of image i: cropped on black padding, flipped, normalised."""
    side, view = 2 * PADDING + 1, rows % VIEWS
    return data.normalize(crop_flip(x[rows // VIEWS], view // (2 * side), view // 2 % side, view % 2 == 1))


class Outputs:
    """Outputs of the frozen teacher blocks for n images, images(rows) (D3).

    Cut i lies before block i: cut 0 holds the images, the last one the logits. kept[i]: all rows of cut i; what is not
    kept is computed from the deepest kept cut before it. Parts of one size, never small, have the bits of a step.
    """

    def __init__(self, images: Callable, n: int, part: int, blocks: list[nn.Module], shapes: list, cache_gb: float):
        self.images, self.blocks, self.shapes, self.room, self.kept = images, blocks, shapes, cache_gb * 2 ** 30, {}
        self.parts = torch.arange(n, device=next(blocks[0].parameters()).device).split(part)

    @torch.no_grad()
    def at(self, rows: Tensor, cuts: list[int]) -> list[Tensor]:
        """These rows at each of the cuts (ascending), in one walk."""
        out, h, place = [], None, 0
        for c in cuts:
            near = max((k for k in self.kept if k <= c), default=0)
            if h is None or near > place:
                h, place = self.kept[near][rows] if near else self.images(rows), near
            for block in self.blocks[place:c]:
                h = block(h)
            out, place = [*out, h], c
        return out

    def keep(self, wanted: set[int]) -> None:
        """Keep these cuts as far as there is room (the logits first, then from the front) and free the others."""
        n, room, chosen = sum(map(len, self.parts)), self.room, []
        for c in sorted(wanted - {0, 1}, key=lambda c: (c != len(self.blocks), c)):  # a stem is sooner made than kept
            if 4 * n * math.prod(self.shapes[c]) <= room:
                chosen, room = [*chosen, c], room - 4 * n * math.prod(self.shapes[c])
        self.kept = {c: h for c, h in self.kept.items() if c in chosen}
        new = dict.fromkeys(sorted(set(chosen) - set(self.kept)))
        for rows in self.parts if new else ():
            for c, h in zip(new, self.at(rows, list(new))):
                if new[c] is None:
                    new[c] = torch.empty_like(h[:1].expand(n, *h.shape[1:]))  # in its memory format
                new[c][rows] = h
        self.kept.update(new)

    @torch.inference_mode()
    def predict(self, net: nn.Module, place: int) -> Tensor:
        """Logits (N, C) in float32 of a network that begins at a cut."""
        net.eval()
        return torch.cat([net(self.at(rows, [place])[0]).float() for rows in self.parts])


def make_phases(scion: nn.Sequential, hp: dict[str, Any]) -> list[Phase]:
    """Stage 1: each graft by itself; stage 2: the first 2, 3 ... of them. A list too short repeats its last entry."""
    def nth(key: str, i: int) -> Any:
        return hp[key][min(i, len(hp[key]) - 1)]

    n, phases, end = len(scion), [], 0
    for first, stop in [(b, b + 1) for b in range(n)] + [(0, size) for size in range(2, n + 1)]:
        groups = [{"params": list(scion[first:stop].parameters()), "lr": hp["s2_lr"]}]
        name, epochs = f"net {stop - 1}/{n - 1}", nth("s2_epochs", stop - 2)
        if stop == first + 1:
            name, epochs, graft = f"block {stop}/{n}", nth("s1_epochs", first), scion[first]
            groups = [{"params": list(part.parameters()), "lr": (
                nth("s1_lr_block", first) if not isinstance(part, nn.Conv2d) else
                nth("s1_lr_t2s", first - 1) if part is graft[0] else nth("s1_lr_s2t", first))} for part in graft]
        phases.append(Phase(name, first, stop, end, end + epochs, torch.optim.Adam(groups, fused=True)))
        end += epochs
    return [phase for phase in phases if phase.end > phase.begin]


def epoch_parts(n: int, batch_size: int, generator: Optional[torch.Generator] = None) -> list[Tensor]:
    parts = batches(n, batch_size, generator)
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts  # D5


def graft_step(forward: Callable, optimizer: torch.optim.Optimizer, h: Tensor, t_logits: Tensor, loss_fn: Callable,
               amp: str = "none") -> Tensor:
    """One update; forward runs from the input h of the scion to the logits."""
    with autocast(h.device, amp):
        s_logits = forward(h)
    loss = loss_fn(s_logits.to(t_logits.dtype), t_logits)  # eq. (1) or eq. (2)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def fold_pair(*layers: nn.Module) -> tuple[Tensor, Tensor]:
    """(P, c) in float64 of 1x1 convs, Linears and batch norms (in eval mode) that follow each other."""
    P, c = None, None
    for m in layers:
        if isinstance(m, nn.BatchNorm1d):
            scale = m.weight.double() / (m.running_var.double() + m.eps).sqrt()
            A, b = scale.diag(), m.bias.double() - scale * m.running_mean.double()
        else:
            A = m.weight.double().flatten(1)
            b = A.new_zeros(len(A)) if m.bias is None else m.bias.double()
        P, c = (A, b) if P is None else (A @ P, A @ c + b)  # eq. (3)
    return P, c


def fold_conv(conv: nn.Conv2d, P: Tensor, c: Tensor, size: tuple) -> tuple[Tensor, Tensor]:
    """Weight and bias_map (C, H, W) of a zero-padded 3x3 conv that takes u for P u + c, eq. (4)."""
    weight = torch.einsum("oikl,ij->ojkl", conv.weight.double(), P)  # eq. (4)
    constant = c.view(1, -1, 1, 1).expand(1, -1, *size)
    return weight, F.conv2d(constant, conv.weight.double(), conv.bias.double(), padding=1)[0]  # eq. (4)


@torch.no_grad()
def fold_student(prefix: Iterable[nn.Module], scion: nn.Sequential) -> nn.Module:
    """The VGG student as one netgraft_vgg16_folded without 1x1 convs; a plain conv where they have no bias."""
    (s3, e0), (a0, s4, e1), (a1, (_, (hidden, out))) = scion
    head, bias = fold_pair(e1, a1, hidden, out)
    net = build_model("netgraft_vgg16_folded", len(bias))
    state = {f"features.{i}.{k}": v for i, block in enumerate((*prefix, s3, s4)) for k, v in block.state_dict().items()}
    weight, bias_map = fold_conv(s4[0], *fold_pair(e0, a0), net.features[4][0].bias_map.shape[1:])
    state.update({"features.4.0.weight": weight, "classifier.weight": head, "classifier.bias": bias})
    if e0.bias is None:  # c = 0: the conv keeps its own bias
        net.features[4][0] = nn.Conv2d(*weight.shape[1::-1], 3, padding=1)
    else:
        state["features.4.0.bias_map"] = bias_map
        del state["features.4.0.bias"]
    net.load_state_dict(state)
    return net.to(weight.device).eval()


@torch.no_grad()
def init_from_teacher(graft: nn.Sequential, block: nn.Module, x: Tensor) -> None:
    """Weights of a graft from its counterpart; x: some thousand rows of what the teacher sends into that."""
    mine, theirs = ([m for m in net.modules() if isinstance(m, (ResBlock, WideBlock))] for net in (graft, block))
    for i, unit in enumerate(mine):
        source = theirs[round(i * (len(theirs) - 1) / max(1, len(mine) - 1))].state_dict()
        unit.load_state_dict({k: source[k] if k in source and source[k].shape == v.shape else v
                              for k, v in unit.state_dict().items()})
    learners = [m for m in graft.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not mine]
    before, behind = ([nn.Identity()] * isinstance(end, nn.Conv2d) for end in (graft[0], graft[-1]))  # for 1x1 convs
    kept = torch.arange(x.shape[1], device=x.device)
    for m in [*before, *(m for m in block.modules() if not list(m.children())), *behind] if learners else ():
        u, x = x, m(x)
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.Identity)):
            s, eye = learners.pop(0), torch.eye(u.shape[1], dtype=torch.float64, device=x.device)
            W, b = (eye, 0 * eye[0]) if isinstance(m, nn.Identity) else (m.weight.double(), m.bias.double())
            if len(kept) < len(eye):
                v = u.movedim(1, -1).flatten(0, -2).double()  # (pixels of all images, C), the kept ones too: R_u = 1
                k = torch.cat((v[:, kept], v.new_ones(len(v), 1)), 1)
                gram = k.T @ k
                gram.diagonal().add_(1e-5 * gram.diagonal().mean())  # some channels are always 0
                R = torch.linalg.solve(gram, k.T @ v).T  # the last column is r
                b = b + torch.einsum("oi...,i->o...", W, R[:, -1]).reshape(len(W), -1).sum(1)  # eq. (5)
                W = torch.einsum("oi...,ij->oj...", W, R[:, :-1])  # eq. (5)
            kept = x.relu().square().transpose(0, 1).flatten(1).mean(1).topk(len(s.weight)).indices.sort().values
            s.weight.copy_(W[kept].view_as(s.weight))
            if s.bias is not None:
                s.bias.copy_(b[kept])
        elif isinstance(m, nn.BatchNorm1d):  # goes into the Linear before it: the student's head has none
            scale, shift = fold_pair(m)
            s.weight.copy_(scale @ s.weight.double())
            s.bias.copy_(scale @ s.bias.double() + shift)


def few_shot_images(args: Args, data: Data) -> tuple[Tensor, float, dict[str, Any]]:
    """uint8 images on the device, how many per class, and what config.json says of them."""
    source, drawn = args.fewshot_file or args.fewshot_dir, None
    if args.fewshot_dir and args.fewshot_file:
        fail("--fewshot_dir and --fewshot_file both bring the images; give one of them")
    if args.fewshot_file:
        x = np.asarray(safe_unpickle(source))
    elif source:
        paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not paths:
            fail(f"{source} holds no images; give 2 or more")
        try:
            x = read_images(paths, data.image_size).transpose(0, 3, 1, 2)
        except ValueError as e:
            fail(str(e))
    else:
        seed = args.fewshot_seed if args.fewshot_seed >= 0 else 6 if data.num_classes <= 10 else 10
        x, _, drawn = data.few_shot(args.shots, "netgraft", seed)
        x, drawn = x.cpu().numpy(), drawn.tolist()
    if x.dtype != np.uint8 or x.shape[1:] != data.test_x.shape[1:] or len(x) < 2:
        fail(f"{source} holds {x.dtype} of shape {x.shape}, not 2 or more uint8 images {tuple(data.test_x.shape[1:])}")
    x = torch.from_numpy(np.ascontiguousarray(x))
    shots, facts = len(x) / data.num_classes, {"shots": drawn, "shots_sha256": hashlib.sha256(x.numpy()).hexdigest()}
    return x.to(data.device), int(shots) if shots.is_integer() else shots, facts


def read_student(teacher_ckpt: str, path: Any, arch: Optional[str], num_classes: int, size: int) -> tuple:
    """load_teacher, and files with an unfolded VGG scion: ours of --no-fold, the official one (without the prefix)."""
    state = read_checkpoint(path)
    if arch or not is_state_dict(state) or not {"0.1.weight", "scion.0.1.weight"} & state.keys():
        return load_teacher(path, arch, num_classes, size)
    teacher, student = (build_model(name, num_classes) for name in PAIR)
    if "0.1.weight" in state:
        if not teacher_ckpt:
            fail(f"{path} lacks the blocks that this student shares with its teacher; give that with --teacher_ckpt")
        teacher, _ = load_teacher(teacher_ckpt, PAIR[0], num_classes)
        state = {f"scion.{k}": v for k, v in state.items()}
    start, scion = match(teacher, student, 32, "scion.0.1.bias" in state)
    net = Graft(cut(teacher)[:start], scion, ())
    state = {**{k: v for k, v in net.state_dict().items() if k.startswith("prefix")}, **state}
    if shapes_of(state) != shapes_of(net.state_dict()):
        fail(f"{path} does not fit {PAIR[1]} with 1x1 convs and {num_classes} classes; the file is damaged")
    net.load_state_dict(state)
    derived = read_json(Path(path).parent / "config.json").get("derived", {})
    return net.eval(), {"arch": f"{PAIR[1]} with 1x1 convs", "norm": derived.get("norm")}


def check_teacher(args: Args, hp: dict[str, Any], student: nn.Module, size: int, teacher: nn.Module) -> None:
    start, scion = match(teacher, student, size, args.adapt_bias)
    if args.init == "teacher" and (isinstance(teacher, nn.Sequential) or not start):
        fail("--init teacher knows netgraft_vgg16, and resnet and wrn pairs of one stem")
    if not make_phases(scion, hp) or hp["s1_batch"] < 2:
        fail("nothing to train: --epochs_block or --epochs_net must be above 0, --batch_size above 1")


def main(args: Args) -> dict:
    if args.evaluate:
        return evaluate_file(args, partial(read_student, args.teacher_ckpt))
    if args.build_dataset:
        x_real, shots, facts = few_shot_images(args, load_data(args.dataset, args.data_dir, data_url=args.data_url))
        print(f"{len(x_real)} images of {args.dataset}, {shots:g} per class, sha256 {facts['shots_sha256']}")
        return {}
    run = Run(args)
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    x_real, shots, facts = few_shot_images(args, data)
    student = build_model(args.student, data.num_classes, data.image_size)
    hp = hparams("cifar10" if data.num_classes <= 10 else "cifar100", shots, args.scale_with_shots)
    flags = {"s1_epochs": args.epochs_block, "s2_epochs": args.epochs_net, "s1_lr_block": args.lr_block, "s1_lr_t2s":
             args.lr_t2s, "s1_lr_s2t": args.lr_s2t, "s1_batch": args.batch_size, "s2_batch": args.batch_size}
    hp.update({key: value for key, value in flags.items() if value}, s2_lr=args.lr_net)
    teacher, info = get_teacher(args, data, check=partial(check_teacher, args, hp, deepcopy(student), data.image_size))
    # on maps of 4x4 and 2x2, as in VGG's deep blocks, plain NCHW takes half the time on a CPU
    layout = torch.contiguous_format if isinstance(teacher, VGGBlocks) else torch.channels_last
    start, scion = match(teacher.to(memory_format=layout), student.to(run.device), data.image_size, args.adapt_bias)
    scion.to(run.device, memory_format=layout)
    t_blocks, stop = cut(teacher), start + len(scion)
    phases = make_phases(scion, hp)
    graft = {p.name: Graft(t_blocks[start:start + p.first], scion[p.first:p.stop], t_blocks[start + p.stop:])
             for p in phases}
    whole, shapes = Graft((), scion, t_blocks[stop:]), cut_shapes(t_blocks, data.image_size)
    views = Outputs(lambda rows: view_images(data, x_real, rows).contiguous(memory_format=layout),
                    VIEWS * len(x_real), VIEWS, t_blocks, shapes, args.cache_gb)
    tests = Outputs(lambda rows: data.normalize(data.test_x[rows]).contiguous(memory_format=layout),
                    len(data.test_x), per_call(run.device, data.image_size), t_blocks, shapes, args.cache_gb)
    tests.keep({start})

    def top1(net: nn.Module) -> float:
        return accuracy(tests.predict(net, start), data.test_y)["top1"]

    if args.init == "teacher" and not (run.dir / "ckpt_last.pt").is_file():  # step 0
        rows = torch.arange(0, VIEWS * len(x_real), max(1, VIEWS * len(x_real) // 1500), device=run.device)
        for b, x in enumerate(views.at(rows, list(range(start, stop)))):
            init_from_teacher(scion[b], t_blocks[start + b], x)
    eval_every = 1 if args.select == "best_test" and "eval_every" not in args.given else args.eval_every
    loss_fn = norm_mse if args.norm_loss else F.mse_loss  # eq. (1), eq. (2)
    run.note(teacher=info, norm=data.norm, hparams=hp, phases={p.name: [p.begin, p.end] for p in phases}, **facts)
    run.grid("shots", x_real, rows=data.num_classes if facts["shots"] else math.isqrt(len(x_real)))
    steps = len(epoch_parts(len(x_real), hp["s1_batch"]))
    begin = run.restore(scion=scion, **{f"adam {p.name}": p.optimizer for p in phases})
    # steps 1-3: one graft by itself, or the first ones joined
    for number, phase in enumerate(phases, 1):
        if begin >= phase.end:
            continue
        net, later = graft[phase.name], phases[number - 1:]
        if phases[-1].end > VIEWS:  # D3: to compute every view once costs as much as VIEWS epochs that keep nothing
            views.keep({start + p.first for p in later} | {len(t_blocks)})
        if begin == phase.begin and phase.name.startswith("net 1/"):  # joined, but not yet trained together
            run.log(begin * steps, begin, phase=number,
                    **{f"acc_{p.name.replace('net', 'join')}": top1(graft[p.name]) for p in later})
        forward = nn.Sequential(net.scion, net.suffix)
        forward = torch.compile(forward) if args.compile else forward
        for epoch in run.bar(range(begin, phase.end), phase.name):
            net.train()
            for step, part in enumerate(epoch_parts(len(x_real), hp["s1_batch"], run.generator), epoch * steps):
                view = torch.randint(VIEWS, part.shape, generator=run.generator, device=run.device)
                h, t_logits = views.at(VIEWS * part + view, [start + phase.first, len(t_blocks)])
                loss = graft_step(forward, phase.optimizer, h, t_logits, loss_fn, args.amp)
                if step % args.log_every == 0:
                    run.log(step, epoch, phase=number, loss_kd=loss / (len(part) if args.norm_loss else 1),
                            lr=phase.optimizer.param_groups[0]["lr"])
            done, total = epoch + 1 - phase.begin, phase.end - phase.begin
            due = phase is phases[-1] and (done % eval_every == 0 or done == total)
            score, where = top1(whole) if due else None, f"{phase.name}, epoch {done}/{total}"
            if done == total:  # D4
                alone = top1(net)
                run.log(step, epoch, phase=number, **{f"acc_{phase.name}": alone})
                where += f": {alone:.2f} %"
            if not run.end_epoch(epoch, scion, score, where if due or done in (1, total) else None):
                return run.finish({})
        begin = phase.end
    # step 4: the 1x1 convs go into their neighbours
    unfolded, trained = Graft(t_blocks[:start], scion, t_blocks[stop:]), tests.predict(whole, start)
    row = {**accuracy(trained, data.test_y), **agreement(trained, data.t_logits)}  # of the last epoch
    if run.best_state:
        scion.load_state_dict(run.best_state[""])
        trained = tests.predict(whole, start)
    if len(scion[0]) > 1:  # there are 1x1 convs
        student = fold_student(unfolded.prefix, scion) if args.fold else unfolded  # D2
    s_logits = trained if student is unfolded else tests.predict(nn.Sequential(*cut(student)[start:]), start)
    sizes = {name: (*count_params_macs(model, data.image_size), accuracy(logits, data.test_y)["top1"])
             for name, model, logits in (("teacher", teacher, data.t_logits), ("as trained", unfolded, trained),
                                         ("student.pt", student, s_logits))}
    difference = ((s_logits - trained).abs().max() / trained.abs().max()).item()
    for name, (params, macs, score) in sizes.items():
        print(f"{name:<10}  {params:>10,} parameters  {macs / 1e6:8.2f} M MACs  {score:6.2f} %")
    print(f"largest difference of a test logit, student.pt to as trained: {difference:.1e} of the largest logit")
    key = (args.preset, args.dataset, args.teacher, args.student, shots if facts["shots"] else None)
    return run.finish({
        "shots": shots, "teacher_top1": info["top1"], **row, "n_test": len(data.test_y), "real_images": len(x_real),
        "sizes": sizes, "fold_difference": difference, "paper": published_row(PUBLISHED, *key)}, student)


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
