"""NetGraft: small blocks are grafted into the teacher one at a time, then joined, until they are the student.

Paper   Shen, Wang, Yin, Song, Luo, Song, "Progressive Network Grafting for Few-Shot Knowledge Distillation",
        AAAI 2021, arXiv 2012.04915
Data    K images per class of the teacher's training set (default 10). Labels serve only to draw the same number per
        class, and unlabelled images of your own do as well; the test split only for reporting.

Teacher and student are cut into blocks B_0..B_N and S_0..S_N (stem, stages, head). The leading blocks of one
architecture are shared and frozen, and so is a head of one shape. The rest of the student is the scion, in grafts
G_b = e_b . S_b . a_b, where a_b and e_b are 1x1 convs with bias to and from the student's width, only where the
widths differ (the VGG16 pair).

Stage 1, for each graft b by itself (phases "block b/n")
  1. every epoch: shuffle the images, draw one of the 162 crops and flips for each
  2. t = B_N ... B_0 (x), and s the same with G_b in the place of its counterpart; one Adam step on G_b, lr_block for
     S_b, lr_t2s for a_b, lr_s2t for e_b, with
       L = sum_n sum_c (s_nc / |s_n| - t_nc / |t_n|)^2            sum over batch and classes                        (1)
     or, with --no-norm_loss,
       L = mean_nc (s_nc - t_nc)^2                                mean over batch and classes                       (2)
Stage 2, for L = 2..n (phases "net i/n-1")
  3. the first L grafts, joined, in the place of their counterparts; a new Adam at lr_net on all of them; L by (1).
     After the last phase nothing of the teacher is left but the shared blocks.
Folding (VGG16 pair)
  4. between two grafts e and a follow each other: one affine map per pixel
       u -> P u + c,   P = A E,   c = A b_e + b_a                                                                   (3)
     It moves into the conv behind it (W: out, in, 3, 3), whose zero padding knows no c: the bias depends on the place
       W'[o, :] = sum_i W[o, i] P[i, :],   bias_map = conv(zero-padded constant image c, W) + b                     (4)
     and the last pair with the student's two Linears becomes one Linear.

Symbols  B_i -> t_blocks[i], S_i -> s_blocks[i], G_b -> scion[b], s, t -> s_logits, t_logits, K -> shots
Rates and epochs for K shots: hparams; batch 64 K/10 and the rates of stage 1 times K/10, lr_net 1e-4 whatever K.

Deviations
  D1 the published number is the best test epoch of the last phase; the result here is the last epoch, the best beside it
  D2 the official code never folds and saves the scion alone; student.pt is a complete network without the 1x1 convs
  D3 teacher outputs of all 162 views of an image are computed once and kept, and so are the test images at the first
     cut (the same numbers bit for bit, some twenty times faster); --cache_gb 0 computes them in every step
  D4 the four phases before the last are tested at their end only, not after every epoch
  D5 a lone last image joins the batch before it (batch norm in other pairs; no published schedule leaves one)
  kept as it is: the rates of stage 1 fall with K although the number of steps stays, lr_net does not

  python netgraft.py --smoke                 # a minute on a CPU, no download
  python netgraft.py --dataset cifar10       # the published 10-shot run; --shots 1 ... 50 for the others
"""
import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (
    PADDING, Data, ResNet, Run, VGGBlocks, WideResNet, accuracy, agreement, autocast, batches, build_model, cli,
    count_params_macs, crop_flip, evaluate_file, fail, get_teacher, is_state_dict, load_data, load_teacher,
    read_checkpoint, read_images, read_json, safe_unpickle, shapes_of)

PAIR = ("netgraft_vgg16", "netgraft_vgg16_student")


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
    seed: int = 0  # seeds python, numpy, torch and the choice of shots
    deterministic: bool = False  # deterministic kernels, an error where there are none
    device: str = "auto"  # auto, cuda, cuda:N or cpu
    amp: Literal["none", "bf16"] = "none"  # bf16 autocast of the networks; losses stay in float32
    compile: bool = False  # torch.compile of the step
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
    epochs_block: tuple[int, ...] = ()  # stage 1: epochs of each graft (the last one repeats; 0 skips); none = published
    epochs_net: tuple[int, ...] = ()  # stage 2: epochs of 2, 3 ... joined grafts, likewise
    batch_size: int = 0  # images per step; 0 = published: 64 for 10 shots
    lr_block: tuple[float, ...] = ()  # stage 1: rate of each student block; none = published, as in the next two
    lr_t2s: tuple[float, ...] = ()  # stage 1: rate of the 1x1 conv before graft 2, 3 ...
    lr_s2t: tuple[float, ...] = ()  # stage 1: rate of the 1x1 conv behind graft 1, 2 ...
    lr_net: float = 1e-4  # stage 2: rate of everything
    scale_with_shots: bool = True  # published batch size and rates of stage 1 times shots / 10
    norm_loss: bool = True  # loss on normalised logits, eq. (1); off: eq. (2)
    adapt_bias: bool = True  # bias in the 1x1 convs
    fold: bool = True  # student.pt without 1x1 convs; off: prefix and scion as they were trained
    cache_gb: float = 4.0  # memory for the kept outputs of all views, and for those of the test images; 0 = none


PRESETS = {
    "auto": {"*": dict(eval_every=10, save_every=50)},  # D4: epochs of the last phase
    "smoke": {"*": dict(dataset="shapes", teacher="resnet14", student="resnet8", limit_train=300, limit_test=200,
                        shots=2, epochs_block=(2,), epochs_net=(2,), log_every=1, allow_weak_teacher=True)}}
ALIASES = {"nshot": "shots", "num_per_class": "shots"}
SHOTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50)
PUBLISHED = {("auto", dataset, *PAIR, shots): (top1, "best on test") for dataset, row in {
    "cifar10": (90.74, 92.60, 92.70, 92.77, 92.88, 92.84, 92.77, 92.83, 92.88, 92.89, 92.78, 92.76),
    "cifar100": (64.22, 66.51, 67.35, 67.69, 68.16, 68.38, 68.46, 68.78, 68.77, 68.86, 69.04, 69.06)}.items()
    for shots, top1 in zip(SHOTS, row)}


# ------------------------------------------------------------------------------------------------- rates and losses

SCHEDULES = {  # for 10 shots: stage 1 for each graft, stage 2 for 2 and 3 joined grafts
    "cifar10": dict(s1_epochs=(100, 60, 60), s2_epochs=(100, 100), seed=6, s1_lr_block=(2.5e-4, 2.5e-4, 2.5e-4),
                    s1_lr_t2s=(2.5e-3, 2.5e-3), s1_lr_s2t=(2.5e-3, 2.5e-3)),
    "cifar100": dict(s1_epochs=(1000, 200, 200), s2_epochs=(150, 150), seed=10, s1_lr_block=(2.5e-4, 1e-3, 1e-3),
                     s1_lr_t2s=(1e-3, 1e-3), s1_lr_s2t=(1e-3, 1e-3))}


def hparams(dataset: str, shots: float, scale: bool = True) -> dict[str, Any]:
    """The published values (any number of images per class); other data take the column with as many classes."""
    f = shots / 10 if scale else 1.0
    batch = int(64 * f)
    rates = {k: tuple(f * v for v in row) if "_lr_" in k else row for k, row in SCHEDULES[dataset].items()}
    return {**rates, "s1_batch": batch, "s2_batch": batch, "s2_lr": 1e-4}


def norm_mse(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Eq. (1): rows of length 1; sum over batch and classes."""
    return (F.normalize(s_logits, eps=1e-12) - F.normalize(t_logits, eps=1e-12)).square().sum()


def raw_mse(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Eq. (2): mean over batch and classes."""
    return F.mse_loss(s_logits, t_logits)


# ------------------------------------------------------------------------------------------------- blocks and grafts

class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))  # (B, C)


def cut(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network in forward order (they are its own modules): stem, stages, head."""
    if isinstance(net, VGGBlocks):
        return [*net.features, nn.Sequential(nn.Flatten(), net.classifier)]
    if isinstance(net, ResNet):
        pool = [nn.MaxPool2d(3, 2, 1)] if net.stem == "imagenet" else []
        stages = [getattr(net, f"layer{i + 1}") for i in range(net.stages)]
        return [nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *pool), *stages, nn.Sequential(Mean(), net.linear)]
    if isinstance(net, WideResNet):
        head = nn.Sequential(net.bn1, nn.ReLU(), Mean(), net.fc)
        return [nn.Sequential(net.conv1), net.block1, net.block2, net.block3, head]
    if isinstance(net, Graft):
        return [*net.prefix, *net.scion, *net.suffix]
    if not isinstance(net, nn.Sequential):
        fail(f"{type(net).__name__} cannot be cut into blocks; this works for resnet and wrn networks, netgraft_vgg16, "
             "and a network of your own that is one nn.Sequential of its blocks")
    blocks: list[nn.Module] = []
    for module in net:  # what has no weights (activation, pool, flatten) belongs to the block before it
        bare = blocks and not any(True for _ in module.parameters())
        blocks.append(nn.Sequential(*blocks.pop(), module) if bare else nn.Sequential(module))
    return blocks


def same(a: nn.Module, b: nn.Module) -> bool:
    return str(a) == str(b) and shapes_of(a.state_dict()) == shapes_of(b.state_dict())


def cut_shapes(blocks: list[nn.Module], size: int) -> list[tuple]:
    """Shape of one image, and of what it becomes behind each block; a block must not overwrite its input."""
    x, shapes = torch.zeros(2, 3, size, size, device=next(blocks[0].parameters()).device), []
    with torch.no_grad():
        for i, block in enumerate(blocks):
            shapes.append(tuple(x.shape[1:]))
            before, y = x._version, block.eval()(x)
            if x._version != before:
                fail(f"block {i} overwrites its input, which others need: its first activation must not be in-place")
            x = y
    return [*shapes, tuple(x.shape[1:])]


def match(teacher: nn.Module, student: nn.Module, size: int, bias: bool = True) -> tuple[int, nn.Sequential]:
    """(number of shared leading blocks, scion); the student takes over the teacher's weights in shared blocks."""
    t_blocks, s_blocks = cut(teacher), cut(student)
    works = "; pairs that work: resnet56 -> resnet20, wrn40_2 -> wrn16_2, netgraft_vgg16 -> netgraft_vgg16_student"
    family = [next(c for c in (VGGBlocks, ResNet, WideResNet, nn.Sequential) if isinstance(n, c))
              for n in (teacher, student)]
    if family[0] != family[1] or len(t_blocks) != len(s_blocks):
        fail(f"teacher ({family[0].__name__}, {len(t_blocks)} blocks) and student ({family[1].__name__}, "
             f"{len(s_blocks)} blocks) must be of one family and have as many blocks{works}")
    t_shapes, s_shapes = cut_shapes(t_blocks, size), cut_shapes(s_blocks, size)
    for i, (t, s) in enumerate(zip(t_shapes, s_shapes)):
        if t != s and not (family[0] is VGGBlocks and t[1:] == s[1:]):
            fail(f"behind block {i - 1} (0 is the stem) the teacher has {t}, the student {s}; they must be equal{works}")
    shared = [same(t, s) for t, s in zip(t_blocks, s_blocks)]
    start, stop = (shared + [False]).index(False), len(shared) - shared[-1]
    if start >= stop:
        fail(f"teacher and student are the same network, nothing is left to graft{works}")
    for i in (*range(start), *range(stop, len(shared))):
        s_blocks[i].load_state_dict(t_blocks[i].state_dict())
        s_blocks[i].requires_grad_(False)
    scion = nn.Sequential()
    for i in range(start, stop):
        t2s, s2t = ([nn.Conv2d(c_in[0], c_out[0], 1, bias=bias)] if c_in != c_out else [] for c_in, c_out in
                    ((t_shapes[i], s_shapes[i]), (s_shapes[i + 1], t_shapes[i + 1])))
        for conv in t2s + s2t:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if bias:
                nn.init.zeros_(conv.bias)
        scion.append(nn.Sequential(*t2s, s_blocks[i], *s2t))  # keys as in the official file: 0.0.0.weight ...
    return start, scion


class Graft(nn.Module):
    """Teacher blocks, a scion (some of the grafts), teacher blocks: the grafted teacher, only the scion learns."""

    def __init__(self, prefix: Iterable[nn.Module], scion: Iterable[nn.Module], suffix: Iterable[nn.Module]):
        super().__init__()
        self.prefix, self.scion, self.suffix = (nn.Sequential(*part) for part in (prefix, scion, suffix))

    def train(self, mode: bool = True) -> "Graft":
        super().train(False)  # the teacher's batch norm never leaves eval mode
        self.scion.train(mode)
        return self

    def after(self, h: Tensor) -> Tensor:
        return self.suffix(self.scion(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.prefix(x))


# ----------------------------------------------------------------------------------------------------- views (D3)

VIEWS = 2 * (2 * PADDING + 1) ** 2  # crops and flips of an image: 162


class Views:
    """Outputs of the frozen teacher blocks on every view of every image, and on the test images.

    Cut i lies before block i: cut 0 holds the images, the last one the logits. View v of image i is row VIEWS * i + v.
    kept[i] holds all rows of cut i; at() computes what is not kept from the deepest kept cut before it.
    """

    def __init__(self, data: Data, x: Tensor, blocks: list[nn.Module], start: int, cache_gb: float,
                 layout: torch.memory_format = torch.contiguous_format):
        self.data, self.x, self.blocks, self.layout, self.room = data, x, blocks, layout, cache_gb * 2 ** 30
        self.start, self.kept, self.test = start, {}, None
        self.shapes = cut_shapes(blocks, data.image_size)
        macs = [0] + [count_params_macs(nn.Sequential(*blocks[:i + 1]).eval(), data.image_size)[1]
                      for i in range(len(blocks))]
        self.worth = [20 * m > macs[-1] for m in macs]  # a stem is sooner computed than kept

    def images(self, rows: Tensor) -> Tensor:
        """Cut 0: cropped on black padding, flipped, normalised."""
        side, view = 2 * PADDING + 1, rows % VIEWS
        x = crop_flip(self.x[rows // VIEWS], view // (2 * side), view // 2 % side, view % 2 == 1)
        return self.data.normalize(x).contiguous(memory_format=self.layout)

    @torch.no_grad()
    def at(self, rows: Tensor, cuts: list[int]) -> list[Tensor]:
        """These rows at each of the cuts (ascending), in one walk."""
        out, h, place = [], None, 0
        for c in cuts:
            near = max((k for k in self.kept if k <= c), default=0)
            if h is None or near > place:
                h, place = self.kept[near][rows] if near in self.kept else self.images(rows), near
            for block in self.blocks[place:c]:
                h = block(h)
            out, place = [*out, h], c
        return out

    def keep(self, wanted: set[int]) -> None:
        """Keep these cuts as far as there is room (the logits first, then from the front) and free the others."""
        chosen, room, n = [], self.room, len(self.x) * VIEWS
        for c in sorted(wanted, key=lambda c: (c != len(self.blocks), c)):
            size = 4 * n * math.prod(self.shapes[c])
            if self.worth[c] and size <= room:
                chosen, room = [*chosen, c], room - size
        self.kept = {c: h for c, h in self.kept.items() if c in chosen}
        new = {c: torch.empty(n, *self.shapes[c], device=self.x.device) for c in sorted(set(chosen) - set(self.kept))}
        new = {c: h.to(memory_format=self.layout) if h.ndim == 4 else h for c, h in new.items()}
        for i in range(len(self.x) if new else 0):
            rows = torch.arange(VIEWS * i, VIEWS * (i + 1), device=self.x.device)
            for kept, h in zip(new.values(), self.at(rows, list(new))):
                kept[rows] = h
        self.kept.update(new)

    def test_parts(self) -> Iterator[Tensor]:
        """The test images at the first cut, part by part."""
        for x in self.data.test_x.split(250 if self.x.device.type == "cpu" else 2000):
            h = self.data.normalize(x).contiguous(memory_format=self.layout)
            for block in self.blocks[:self.start]:
                h = block(h)
            yield h

    @torch.inference_mode()
    def predict(self, net: nn.Module) -> Tensor:
        """Test logits (N, C) in float32 of a network that begins at the first cut."""
        size = 4 * len(self.data.test_x) * math.prod(self.shapes[self.start])
        if self.test is None and self.worth[self.start] and size <= self.room:
            self.test = list(self.test_parts())
        net.eval()
        return torch.cat([net(h).float() for h in self.test or self.test_parts()])

    def top1(self, net: nn.Module) -> float:
        return accuracy(self.predict(net), self.data.test_y)["top1"]


# ------------------------------------------------------------------------------------------------------------ phases

@dataclass
class Phase:
    """Epochs begin..end of the run, in which the grafts first..stop learn."""
    name: str
    key: str
    first: int
    stop: int
    begin: int
    end: int
    optimizer: torch.optim.Adam


def make_phases(scion: nn.Sequential, hp: dict[str, Any]) -> list[Phase]:
    """Stage 1: each graft by itself; stage 2: the first 2, 3 ... of them. A list too short repeats its last entry."""
    def nth(key: str, i: int) -> Any:
        return hp[key][min(i, len(hp[key]) - 1)]

    n, phases, begin = len(scion), [], 0
    for first, stop in [(b, b + 1) for b in range(n)] + [(0, size) for size in range(2, n + 1)]:
        alone = stop - first == 1
        groups = [{"params": list(scion[first:stop].parameters()), "lr": hp["s2_lr"]}]
        if alone:
            rates = [nth("s1_lr_block", first) if not isinstance(part, nn.Conv2d) else
                     nth("s1_lr_t2s", first - 1) if part is scion[first][0] else nth("s1_lr_s2t", first)
                     for part in scion[first]]
            groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(scion[first], rates)]
        epochs = nth("s1_epochs", first) if alone else nth("s2_epochs", stop - 2)
        name, key = (f"block {stop}/{n}", f"block{stop}") if alone else (f"net {stop - 1}/{n - 1}", f"net{stop}")
        phases.append(Phase(name, key, first, stop, begin, begin + epochs, torch.optim.Adam(groups, fused=True)))
        begin += epochs
    return phases


def epoch_parts(n: int, batch_size: int, generator: Optional[torch.Generator] = None) -> list[Tensor]:
    parts = batches(n, batch_size, generator)
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts  # D5


def graft_step(forward: Callable, optimizer: torch.optim.Optimizer, h: Tensor, t_logits: Tensor, loss_fn: Callable,
               amp: str = "none") -> Tensor:
    """One update from the inputs h of the scion; forward runs from there to the logits."""
    with autocast(h.device, amp):
        s_logits = forward(h)
    loss = loss_fn(s_logits.float(), t_logits)  # eq. (1), or eq. (2) with --no-norm_loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


# ----------------------------------------------------------------------------------------------------------- folding

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


# ------------------------------------------------------------------------------------------------------------- files

def few_shot_images(args: Args, data: Data) -> tuple[Tensor, float, Optional[list[int]]]:
    """uint8 images on the device, how many per class, and their data set indices where they were drawn."""
    if args.fewshot_dir and args.fewshot_file:
        fail("--fewshot_dir and --fewshot_file both bring the images; give one of them")
    if not (args.fewshot_dir or args.fewshot_file):
        seed = args.fewshot_seed if args.fewshot_seed >= 0 else SCHEDULES[column(data)]["seed"]
        x, _, index = data.few_shot(args.shots, "netgraft", seed)
        return x, args.shots, index.tolist()
    if args.fewshot_file:
        x = np.asarray(safe_unpickle(args.fewshot_file))
    else:
        from torchvision.datasets.folder import IMG_EXTENSIONS
        paths = sorted(p for p in Path(args.fewshot_dir).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        try:
            x = read_images(paths, data.image_size).transpose(0, 3, 1, 2) if paths else np.zeros(0)
        except ValueError as e:
            fail(str(e))
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != data.test_x.shape[1:] or len(x) < 2:
        fail(f"{args.fewshot_dir or args.fewshot_file}: holds {x.dtype} of shape {x.shape}; needed are 2 images or more, "
             f"uint8 of shape {('N', *data.test_x.shape[1:])}")
    return torch.from_numpy(np.ascontiguousarray(x)).to(data.device), len(x) / data.num_classes, None


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()


def column(data: Data) -> str:
    return "cifar10" if data.num_classes <= 10 else "cifar100"


def read_student(teacher_ckpt: str, path: Any, arch: Optional[str], num_classes: int) -> tuple[nn.Module, dict]:
    """load_teacher, and the files with an unfolded VGG scion: ours of --no-fold, the official one (no prefix)."""
    state = read_checkpoint(path)
    official = is_state_dict(state) and "0.1.weight" in state
    if not is_state_dict(state) or not (official or "scion.0.1.weight" in state):
        return load_teacher(path, arch, num_classes)
    state = {f"scion.{k}" if official else k: v.float() for k, v in state.items()}
    teacher, student = (build_model(name, num_classes) for name in PAIR)
    if official:
        if not teacher_ckpt:
            fail(f"{path}: an official scion file, which lacks the blocks it shares with its teacher; "
                 "give that with --teacher_ckpt")
        teacher, _ = load_teacher(teacher_ckpt, PAIR[0], num_classes)
    start, scion = match(teacher, student, 32, "scion.0.1.bias" in state)
    net = Graft(cut(teacher)[:start], scion, ())
    found = {k: v.shape for k, v in state.items()}
    if found != {k: v.shape for k, v in net.state_dict().items() if not official or k.startswith("scion.")}:
        fail(f"{path}: does not fit {PAIR[1]} with 1x1 convs and {num_classes} classes; the file is damaged")
    net.load_state_dict(state, strict=not official)
    config = read_json(Path(path).parent / "config.json")
    return net.eval(), {"arch": f"{PAIR[1]}, unfolded", "norm": config.get("derived", {}).get("norm")}


# -------------------------------------------------------------------------------------------------------------- main

def main(args: Args) -> dict:
    if args.evaluate:
        return evaluate_file(args, partial(read_student, args.teacher_ckpt))
    if args.build_dataset:
        data = load_data(args.dataset, args.data_dir, data_url=args.data_url)
        x_real, shots, _ = few_shot_images(args, data)
        print(f"{len(x_real)} images of {args.dataset}, {shots:g} per class, sha256 {digest(x_real)}")
        return {}
    run = Run(args)
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    teacher, info = get_teacher(args, data)
    student = build_model(args.student, data.num_classes, data.image_size)
    x_real, shots, drawn = few_shot_images(args, data)
    # maps of 4x4 and 2x2, as in the deep blocks of VGG: plain NCHW takes half the time on a CPU
    layout = torch.contiguous_format if isinstance(teacher, VGGBlocks) else torch.channels_last
    teacher.to(memory_format=layout)
    start, scion = match(teacher, student.to(run.device), data.image_size, args.adapt_bias)
    scion.to(run.device, memory_format=layout)
    t_blocks, stop = cut(teacher), start + len(scion)

    hp = hparams(column(data), shots, args.scale_with_shots)
    hp.update({key: value for key, value in (
        ("s1_epochs", args.epochs_block), ("s2_epochs", args.epochs_net), ("s1_lr_block", args.lr_block),
        ("s1_lr_t2s", args.lr_t2s), ("s1_lr_s2t", args.lr_s2t), ("s2_lr", args.lr_net),
        ("s1_batch", args.batch_size)) if value})
    phases = [phase for phase in make_phases(scion, hp) if phase.end > phase.begin]
    if not phases:
        fail("no epochs: give --epochs_block, --epochs_net or both")
    batch_size, steps = hp["s1_batch"], len(epoch_parts(len(x_real), hp["s1_batch"]))
    graft = {p.key: Graft(t_blocks[start:start + p.first], scion[p.first:p.stop], t_blocks[start + p.stop:])
             for p in phases}
    whole = Graft((), scion, t_blocks[stop:])
    loss_fn = norm_mse if args.norm_loss else raw_mse
    eval_every = 1 if args.select == "best_test" and "eval_every" not in args.given else args.eval_every
    views = Views(data, x_real, t_blocks, start, args.cache_gb, layout)
    run.note(teacher=info, norm=data.norm, shots=drawn, shots_sha256=digest(x_real), hparams=hp,
             phases={p.name: [p.begin, p.end] for p in phases})
    run.grid("shots", x_real, rows=data.num_classes if drawn else math.isqrt(len(x_real)))
    start_epoch = run.restore(scion=scion, **{f"adam_{p.key}": p.optimizer for p in phases})

    for k, phase in enumerate(phases):
        if start_epoch >= phase.end:
            continue
        net, last, begin = graft[phase.key], phase is phases[-1], max(start_epoch, phase.begin)
        # D3: to compute each view once costs as much as VIEWS epochs without the cache
        cuts = {start + p.first for p in phases[k:]} | {len(t_blocks)} if phases[-1].end > VIEWS else set()
        views.keep(cuts)
        if begin == phase.begin and phase.stop - phase.first == 2:  # joined, not yet trained together
            run.log(begin * steps, begin, phase=k + 1,
                    **{f"acc_join{p.stop}": views.top1(graft[p.key]) for p in phases[k:]})
        forward = torch.compile(net.after) if args.compile else net.after
        for epoch in run.bar(range(begin, phase.end), phase.name):
            net.train()
            # step 1: the order of the images, and a view of each
            for step, part in enumerate(epoch_parts(len(x_real), batch_size, run.generator), epoch * steps):
                view = torch.randint(VIEWS, part.shape, generator=run.generator, device=run.device)
                h, t_logits = views.at(VIEWS * part + view, [start + phase.first, len(t_blocks)])
                # step 2 or 3
                loss = graft_step(forward, phase.optimizer, h, t_logits, loss_fn, args.amp)
                if step % args.log_every == 0:
                    run.log(step, epoch, phase=k + 1, loss_kd=loss / (len(part) if args.norm_loss else 1),
                            lr=phase.optimizer.param_groups[0]["lr"])
            done, total = epoch + 1 - phase.begin, phase.end - phase.begin
            top1 = views.top1(whole) if last and (done % eval_every == 0 or done == total) else None
            where = f"{phase.name}, epoch {done}/{total}"
            if done == total:  # D4
                alone = views.top1(net)
                run.log(step, epoch, phase=k + 1, **{f"acc_{phase.key}": alone})
                where += f": {alone:.2f} %"
            if not run.end_epoch(epoch, scion, top1, where if top1 is not None or done in (1, total) else None):
                run.finish({})

    if run.best_state:
        scion.load_state_dict(run.best_state[""])
    unfolded = Graft(t_blocks[:start], scion, t_blocks[stop:])
    student = unfolded if isinstance(student, VGGBlocks) else student
    if args.fold and student is unfolded:
        student = fold_student(unfolded.prefix, scion)  # D2
    s_logits, trained = views.predict(nn.Sequential(*cut(student)[start:])), views.predict(whole)
    sizes = {name: (*count_params_macs(model, data.image_size), accuracy(logits, data.test_y)["top1"])
             for name, model, logits in (("teacher", teacher, data.t_logits), ("as trained", unfolded, trained),
                                         ("student.pt", student, s_logits))}
    difference = ((s_logits - trained).abs().max() / trained.abs().max()).item()
    for name, (params, macs, top1) in sizes.items():
        print(f"{name:<10}  {params:>10,} parameters  {macs / 1e6:8.2f} M MACs  {top1:6.2f} %")
    print(f"largest difference of a test logit, student.pt to as trained: {difference:.1e} of the largest logit")
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    tops = {key[4:]: value for line in lines for key, value in json.loads(line).items()
            if key.startswith("acc/") and key != "acc/test_top1"}
    paper = PUBLISHED.get((args.preset, args.dataset, args.teacher, args.student, shots))
    return run.finish({
        "shots": shots, "teacher_top1": info["top1"], **accuracy(s_logits, data.test_y),
        **agreement(s_logits, data.t_logits), "n_test": len(data.test_y), "real_images": len(x_real), "phases": tops,
        "sizes": sizes, "fold_difference": difference, "paper": paper and dict(zip(("top1", "protocol"), paper))},
        student)


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
