"""NetGraft: learn from a few unlabelled images by grafting student blocks into the teacher.

Why it works. A hundred images cannot train a network, but they can train a piece of one if the rest
of it already works. So teacher and student are cut into the same number of blocks, and one student
block takes the place of its counterpart inside the trained teacher. Only that block learns: the
frozen blocks before it hand it good inputs, the frozen blocks behind it judge what it makes of
them, for the logits of the grafted teacher shall be those of the teacher as it was. No label is
needed. A block that has learned to live among the teacher's blocks is a good start for a life among
other student blocks; so the first two are joined and tuned together, then the first three, until
nothing of the teacher is left but what both networks share.

Paper    Shen et al., "Progressive Network Grafting for Few-Shot Knowledge Distillation", AAAI 2021,
         arXiv 2012.04915
Data     K images per class (default 10), their labels only to draw as many of each, or unlabelled
         images of your own; the test images only for reporting

Teacher blocks B_0 .. B_N, student blocks S_0 .. S_N: stem, stages, head. Leading blocks of the same
architecture are shared and frozen, a head of the same shape too. Of each other student block comes
a graft G_b = e_b . S_b . a_b; a_b, e_b are 1x1 convs from the teacher's width to the student's and
back where the two differ (VGG16). t = B_N .. B_0 (x) are the logits of the untouched teacher.
  0. with --init teacher (not in the paper), grafts begin with weights of the teacher: the channels
     u of a layer's output h with the largest mean square behind a ReLU; the next layer
     (W, b) makes up for the others by least squares over images and pixels, borders ignored:
       h ~ R u + r,   W' = W R for each tap,   b' = b + sum over taps of W r                     (1)
  1. for each b alone, G_b takes the place of B_b. Every epoch, in shuffled batches: crop and flip
     each image at random, s = the logits of the grafted teacher (only G_b in train mode), one Adam
     step of G_b on
       L = sum_n | s_n / |s_n| - t_n / |t_n| |^2      over images and classes, |.| >= 1e-12     (2)
       L = mean_nc (s_nc - t_nc)^2                     --no_norm_loss                            (3)
  2. the same with the first 2, 3 ... grafts in place, as they were left, a new Adam for all of
     them, rate lr_net
  3. VGG16: fold the 1x1 convs into what comes behind them. At a cut e_b = (E, b_e) and the next
     a = (A, b_a) meet, nothing between them:
       u -> P u + c,   P = A E,   c = A b_e + b_a                                                (4)
     The conv (W, b) behind them pads with zeros, not with c, so its bias depends on the place
       W'[o, j] = sum_i W[o, i] P[i, j] for each tap,   bias_map = conv(image of c, W) + b       (5)
     and the last pair and the student's two Linears behind it become one Linear.

Symbols  B_b -> t_blocks[b], counted from the first replaced one; S_b, a_b, e_b -> block, t2s, s2t
         of scion[b]; s, t -> s_logits, t_logits. Rates of step 1 (lr_block, lr_t2s, lr_s2t) are
         those of 10 shots and grow by K / 10, the batch is floor(64 K / 10), lr_net stays

Deviations from the published code
  D1 the published number is the best test epoch of the last phase; here the result is the last
     epoch, and `best` beside it, over the same epochs; --eval_every 10 is much faster on a CPU
  D2 it saves the grafts alone, with their 1x1 convs; student.pt is a complete network without them
  D3 a lone last image joins the batch before it (no published schedule leaves one)

Measured, CIFAR-10, last epoch, one CPU core; n seeds. Our VGG16 teacher has 89.03 (the published
one 92.83, its student 92.89 at 10 shots), 6 minutes with --eval_every 10:
  shots 1: 50.51 +- 0.69, 5: 78.26 +- 0.75, 10: 83.36 +- 0.31, 50: 85.55 +- 0.44           (n = 3)
  10 shots, seed 0: 83.27; with --preset recover 88.26                                     (n = 1)
  resnet20 (91.73) -> resnet8: laptop 24.50 +- 0.53, laptop_recover 50.04 +- 0.30          (n = 2)

  python netgraft.py --smoke                                           # a minute, no download
  python netgraft.py --dataset cifar10 --shots 10                      # the published run
  python netgraft.py --dataset cifar10 --preset recover --eval_every 10
"""
import random
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    MODELS, PADDING, CommonArgs, ResNet, Run, WideResNet, accuracy, autocast, build_model, cli,
    crop_flip, decode, fail, flag, get_teacher, load_data)


@dataclass
class Args(CommonArgs):
    teacher: str = flag("netgraft_vgg16", "network: a name in MODELS, or file.py:callable")
    student: str = flag("netgraft_vgg16_student", "network of as many blocks, likewise")
    amp: Literal["auto", "none", "bf16"] = flag("none", "bf16 = networks in it, losses in float32")
    save_every: int = flag(50, "epochs between checkpoints (and one every 5 minutes)", low=1)
    # the images
    shots: int = flag(10, "images per class; labels are not used", "nshot", "num_per_class", low=1)
    fewshot_seed: int = flag(6, "which images are drawn, whatever --seed")
    fewshot_dir: str = flag("", "folder of your own unlabelled images in the place of drawn ones")
    # the schedule: by default that of CIFAR-10; of a list too short the last entry is repeated
    epochs_block: tuple[int, ...] = flag((100, 60, 60), "step 1: epochs of graft 0, 1 ...; 0: none")
    epochs_net: tuple[int, ...] = flag((100, 100), "step 2: epochs of 2, 3 ... joined ones; 0: none")
    batch_size: int = flag(64, "images per step at 10 shots; grows with the shots", low=1)
    lr_block: tuple[float, ...] = flag(
        (2.5e-4, 2.5e-4, 2.5e-4), "step 1: rate of S_0, S_1 ... at 10 shots; grows with them")
    lr_t2s: tuple[float, ...] = flag(
        (2.5e-3, 2.5e-3), "step 1: rate of the 1x1 conv before graft 1, 2 ..., likewise")
    lr_s2t: tuple[float, ...] = flag(
        (2.5e-3, 2.5e-3), "step 1: rate of the 1x1 conv behind graft 0, 1 ..., likewise")
    lr_net: float = flag(1e-4, "step 2: rate of everything, for any number of shots")
    norm_loss: bool = flag(True, "eq. (2), which compares directions of logits; off: eq. (3)")
    init: Literal["random", "teacher"] = flag("random", "grafts begin at random, or by eq. (1)")
    cache_gb: float = flag(4.0, "memory for kept outputs of the teacher; 0 computes them in each step")


CIFAR100 = dict(
    fewshot_seed=10, epochs_block=(1000, 200, 200), epochs_net=(150, 150), batch_size=64,
    lr_block=(2.5e-4, 1e-3, 1e-3), lr_t2s=(1e-3, 1e-3), lr_s2t=(1e-3, 1e-3), lr_net=1e-4)
LAPTOP = dict(teacher="resnet20", student="resnet8", eval_every=10)
PRESETS = {
    "auto": {  # CIFAR-10 and all other pairs: the defaults
        ("cifar100", "netgraft_vgg16", "netgraft_vgg16_student"): CIFAR100,
    },
    "recover": {
        "*": dict(init="teacher"),
        ("cifar100", "netgraft_vgg16", "netgraft_vgg16_student"): CIFAR100,
    },
    "laptop": {"*": LAPTOP},
    "laptop_recover": {"*": dict(LAPTOP, init="teacher", lr_block=(2.5e-3,), lr_net=1e-3)},
    "demo": {"*": dict(
        dataset="shapes", teacher="resnet20", student="resnet8", epochs_block=(40, 70, 20),
        epochs_net=(40, 120), batch_size=32, lr_block=(4e-3,), lr_net=2e-3, cache_gb=0.6,
        eval_every=40)},
    "smoke": {"*": dict(
        dataset="shapes", teacher="resnet14", student="resnet8", limit_train=300, shots=2,
        epochs_block=(2,), epochs_net=(2,), log_every=1)},
}


# ---------------------------------------------------------------------------------- networks

def make_conv(c_in, c_out, kernel):
    """A conv as all of them begin here: weights N(0, 2 / fan_out), bias 0."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return conv


def make_linear(d_in, d_out):
    linear = nn.Linear(d_in, d_out)
    nn.init.normal_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)
    return linear


def vgg_block(c_in, width, convs):
    """convs times conv and ReLU, then a pool that halves the side."""
    layers = []
    for _ in range(convs):
        layers += [make_conv(c_in, width, 3), nn.ReLU(inplace=True)]
        c_in = width
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class VGGBlocks(nn.Module):
    """VGG16 without batch norm in its convs: five blocks make 1x1 of 32x32 pixels."""

    def __init__(self, width, classifier):
        super().__init__()
        self.features = nn.Sequential(
            vgg_block(3, 64, convs=2),
            vgg_block(64, 128, convs=2),
            vgg_block(128, 256, convs=3),
            vgg_block(256, width, convs=3),
            vgg_block(width, width, convs=3))
        self.classifier = classifier

    def forward(self, x):
        if x.shape[-1] != 32:
            fail(f"the VGG16 of netgraft.py takes images of 32 pixels, these have {x.shape[-1]}; "
                 "choose a ResNet pair")
        return self.classifier(self.features(x).flatten(1))


class FoldedConv(nn.Conv2d):
    """A 3x3 conv into which 1x1 convs were folded: its bias depends on the place, eq. (5)."""

    def __init__(self, c_in, c_out, side):
        super().__init__(c_in, c_out, 3, padding=1, bias=False)
        self.bias_map = nn.Parameter(torch.zeros(c_out, side, side))

    def forward(self, x):
        return super().forward(x) + self.bias_map


def netgraft_vgg16(num_classes):
    head = nn.Sequential(
        make_linear(512, 512),
        nn.BatchNorm1d(512),
        make_linear(512, num_classes))
    return VGGBlocks(512, head)


def netgraft_vgg16_student(num_classes):
    head = nn.Sequential(make_linear(256, 512), make_linear(512, num_classes))
    return VGGBlocks(256, head)


def netgraft_vgg16_folded(num_classes):
    """What the student has become when its 1x1 convs are folded away."""
    net = VGGBlocks(256, make_linear(256, num_classes))
    net.features[4][0] = FoldedConv(256, 256, side=2)
    return net


MODELS.setdefault("netgraft_vgg16", netgraft_vgg16)  # as file.py:callable this file runs twice
MODELS.setdefault("netgraft_vgg16_student", netgraft_vgg16_student)
MODELS.setdefault("netgraft_vgg16_folded", netgraft_vgg16_folded)
FOLDED = "netgraft.py:netgraft_vgg16_folded"  # its name for the other scripts


# -------------------------------------------------------------------------- blocks and grafts

def cut(net):
    """The blocks of a network in forward order, made of its own modules: stem, stages, head."""
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if isinstance(net, VGGBlocks):
        return [*net.features, nn.Sequential(nn.Flatten(), net.classifier)]
    if isinstance(net, ResNet):
        stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU())
        if net.stem == "imagenet":
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        stages = [net.get_submodule(f"layer{i + 1}") for i in range(net.stages)]
        return [stem, *stages, nn.Sequential(*pool, net.linear)]
    if isinstance(net, WideResNet):
        stages = [net.block1.layer, net.block2.layer, net.block3.layer]
        head = nn.Sequential(net.bn1, nn.ReLU(), *pool, net.fc)
        return [net.conv1, *stages, head]
    if isinstance(net, nn.Sequential) and all(list(block.parameters()) for block in net):
        return list(net)
    fail(f"{type(net).__name__} cannot be cut into blocks: give resnet, wrn or netgraft_vgg16 "
         "networks, or your own nn.Sequential of blocks that each have weights")


class Graft(nn.Module):
    """G_b: a student block between 1x1 convs from the teacher's width (t2s) and back (s2t)."""

    def __init__(self, block, t2s, s2t):
        super().__init__()
        self.t2s, self.block, self.s2t = t2s, block, s2t

    def forward(self, x):
        return self.s2t(self.block(self.t2s(x)))


def width_adapter(c_in, c_out):
    return nn.Identity() if c_in == c_out else make_conv(c_in, c_out, 1)


@dataclass
class Pair:
    """A teacher and its student, cut and matched."""
    prefix: nn.Sequential  # the leading blocks that both share
    t_blocks: list  # the other blocks of the teacher; the first len(scion) are replaced
    scion: nn.Sequential  # the grafts in their order
    student: nn.Module  # owns the blocks within the grafts, and copies of the shared ones
    layout: torch.memory_format  # of everything behind the prefix

    def grafted(self, first, stop):
        """The teacher from t_blocks[first] on, with grafts first .. stop - 1 in place of blocks."""
        return nn.Sequential(*self.scion[first:stop], *self.t_blocks[stop:])


@torch.no_grad()
def shapes_at_cuts(blocks, image_size):
    """(C, H, W) of an image, then behind each block."""
    x = torch.zeros(2, 3, image_size, image_size, device=next(blocks[0].parameters()).device)
    shapes = [tuple(x.shape[1:])]
    for block in blocks:
        x = block.eval()(x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


def match(teacher, student, image_size):
    """-> Pair. Shared blocks of the student get the teacher's weights."""
    pairs = "pairs that work: resnet56 and resnet20, wrn40_2 and wrn16_2, the VGG16 pair"
    t_blocks, s_blocks = cut(teacher), cut(student)
    if type(teacher) is not type(student) or len(t_blocks) != len(s_blocks):
        fail(f"teacher and student must be of one family and have equally many blocks; {pairs}")

    t_shapes = shapes_at_cuts(t_blocks, image_size)
    s_shapes = shapes_at_cuts(s_blocks, image_size)
    foldable = isinstance(student, VGGBlocks) and isinstance(student.classifier, nn.Sequential)
    for i, (t, s) in enumerate(zip(t_shapes, s_shapes)):
        narrower = foldable and t[0] > s[0] and t[1:] == s[1:]
        if t != s and not narrower:
            fail(f"behind block {i - 1} (the stem is 0) the teacher has {t}, the student {s}; they "
                 f"must be equal; {pairs}")

    shared = [str(t) == str(s) for t, s in zip(t_blocks, s_blocks)]
    if all(shared):
        fail(f"teacher and student are the same network, nothing is left to graft; {pairs}")
    start = shared.index(False)
    stop = len(shared) - shared[-1]  # a shared head is no graft
    for i in [*range(start), *range(stop, len(shared))]:
        s_blocks[i].load_state_dict(t_blocks[i].state_dict())

    scion = nn.Sequential()
    for i in range(start, stop):
        t2s = width_adapter(t_shapes[i][0], s_shapes[i][0])
        s2t = width_adapter(s_shapes[i + 1][0], t_shapes[i + 1][0])
        scion.append(Graft(s_blocks[i], t2s, s2t))

    # plain memory order is twice as fast on VGG's deep maps of 4x4 and 2x2
    layout = torch.contiguous_format if foldable else torch.channels_last
    for module in [*t_blocks[start:], scion]:
        module.to(next(teacher.parameters()).device, memory_format=layout)
    return Pair(nn.Sequential(*t_blocks[:start]), t_blocks[start:], scion, student, layout)


# ---------------------------------------------------------------------------------- the images

def pick_shots(labels, shots, seed):
    """So many indices of each class, as published: shuffle the list of each class, keep the first.

    So the images of fewer shots are among those of more.
    """
    rng = random.Random(seed)
    chosen = []
    for c in range(labels.max() + 1):
        members = np.flatnonzero(labels == c)
        if shots > len(members):
            fail(f"--shots {shots}: class {c} has only {len(members)} images")
        places = list(range(len(members)))
        rng.shuffle(places)
        chosen.append(members[places[:shots]])
    return np.concatenate(chosen)


def few_shot_images(args, data):
    """uint8 images on the device, and which ones of the train split they are."""
    index = None
    if args.fewshot_dir:
        kinds = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
        paths = sorted(p for p in Path(args.fewshot_dir).rglob("*") if p.suffix.lower() in kinds)
        if len(paths) < 2:
            fail(f"--fewshot_dir {args.fewshot_dir}: {len(paths)} images found; give 2 or more")
        x = torch.from_numpy(decode(paths, data.image_size)).to(data.device)
    else:
        index = pick_shots(data.train_y.cpu().numpy(), args.shots, args.fewshot_seed).tolist()
        x = data.train_x[index]
    return x, index


SIDE = 2 * PADDING + 1  # offsets of a crop in each direction
VIEWS = 2 * SIDE * SIDE  # crops and flips of one image: 162


def view_images(data, x, rows):
    """Row VIEWS * i + v is view v of image i, normalised."""
    view = rows % VIEWS
    dy = view // (2 * SIDE)
    dx = view // 2 % SIDE
    return data.normalize(crop_flip(x[rows // VIEWS], dy, dx, view % 2 == 1))


def test_images(data, rows):
    return data.normalize(data.test_x[rows])


class Outputs:
    """What the frozen blocks of the teacher make of the images of some rows; looked up, if kept.

    Training draws a random crop and flip of an image and sends it through frozen blocks. But there
    are only 162 crops and flips, and frozen blocks always answer the same. So all 162 answers are
    computed beforehand, and a step only picks from them: the numbers are the same bit for bit, and
    no step runs the teacher again. Test images have one view each, and are kept the same way.

    Cut b lies before t_blocks[b], the last cut behind all of them; kept[b] holds all rows there.
    What does not fit into memory is computed when asked for, from the nearest kept cut before it.
    """

    def __init__(self, images, n, pair, args):
        self.images = images  # images(rows) -> normalised images
        self.pair = pair
        self.device = next(pair.scion.parameters()).device
        self.rows = torch.arange(n, device=self.device)
        self.room = args.cache_gb * 2 ** 30  # bytes
        self.amp = args.amp
        self.kept = {}

    @torch.no_grad()
    def at(self, rows, cut):
        """These rows at a cut."""
        if cut in self.kept:
            return self.kept[cut][rows]
        with autocast(self.device, self.amp):
            if cut == 0:
                h = self.pair.prefix(self.images(rows))
                return h.contiguous(memory_format=self.pair.layout)
            return self.pair.t_blocks[cut - 1](self.at(rows, cut - 1))

    def keep(self, cuts):
        """Keep these cuts as far as there is room, the first named first; forget all others."""
        room = self.room
        chosen = []
        for cut in cuts:
            if cut == 0 and len(self.pair.prefix) == 1:
                continue  # a stem is sooner computed again than kept
            size = len(self.rows) * self.at(self.rows[:1], cut).nbytes
            if size <= room:
                chosen.append(cut)
                room -= size
        self.kept = {cut: h for cut, h in self.kept.items() if cut in chosen}
        for cut in sorted(set(chosen) - set(self.kept)):
            self.kept[cut] = self.compute_all(cut)

    def compute_all(self, cut):
        like = self.at(self.rows[:1], cut)
        outputs = torch.empty_like(like.expand(len(self.rows), *like.shape[1:]))
        for rows in self.rows.split(54 if self.device.type == "cpu" else 10 * VIEWS):
            outputs[rows] = self.at(rows, cut)
        return outputs

    @torch.no_grad()
    def predict(self, net, cut):
        """Logits (n, C) in float32 of a network that begins at this cut."""
        net.eval()
        logits = []
        for rows in self.rows.split(250 if self.device.type == "cpu" else 2000):
            h = self.at(rows, cut)
            with autocast(self.device, self.amp):
                logits.append(net(h).float())
        return torch.cat(logits)


# -------------------------------------------------------------------- step 0: --init teacher

def strongest(y, n):
    """The n channels (in order) with the largest mean square behind a ReLU."""
    power = y.relu().square().transpose(0, 1).flatten(1).mean(1)  # (C,)
    return power.topk(n).indices.sort().values


def reconstruct(x, kept):
    """R (C, kept) and r (C,) of eq. (1), over all images and pixels."""
    pixels = x.movedim(1, -1).flatten(0, -2).double()  # (N H W, C)
    ones = pixels.new_ones(len(pixels), 1)
    known = torch.cat([pixels[:, kept], ones], 1)  # the last column gives r
    gram = known.T @ known
    gram.diagonal().add_(1e-5 * gram.diagonal().mean())  # some channels are always 0
    solution = torch.linalg.solve(gram, known.T @ pixels)  # (kept + 1, C)
    return solution[:-1].T, solution[-1]


def make_up(layer, x, kept):
    """Eq. (1): weight and bias of a layer that is given the kept channels of its input x only."""
    weight = layer.weight.double()
    bias = layer.bias.double()
    if len(kept) == weight.shape[1]:
        return weight, bias
    R, r = reconstruct(x, kept)
    weight_kept = torch.einsum("oi...,ij->oj...", weight, R)
    taps = torch.einsum("oi...,i->o...", weight, r)
    return weight_kept, bias + taps.reshape(len(bias), -1).sum(1)


def identity_conv(like):
    """What the teacher does where a graft has a 1x1 conv: nothing."""
    width = max(like.in_channels, like.out_channels)  # the teacher's
    conv = nn.Conv2d(width, width, 1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv.to(like.weight.device)


def teacher_layers(graft, block):
    """A teacher block's layers, as those of a graft: batch norm goes into the Linear before it."""
    layers = []
    for layer in [graft.t2s, *block.modules(), graft.s2t]:
        if layer in (graft.t2s, graft.s2t) and isinstance(layer, nn.Conv2d):
            layers.append(identity_conv(layer))
        elif isinstance(layer, nn.BatchNorm1d):
            layers[-1] = affine_as_linear(layers[-1], layer)
        elif not list(layer.children()):
            layers.append(layer)
    return layers


def init_vgg_graft(graft, block, x):
    """Step 0 for one graft; x: what the teacher hands to its counterpart, for many images."""
    learners = [m for m in graft.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    kept = torch.arange(x.shape[1], device=x.device)  # channels of x that the student has too
    for layer in teacher_layers(graft, block):
        y = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight, bias = make_up(layer, x, kept)  # eq. (1)
            mine = learners.pop(0)
            kept = strongest(y, len(mine.weight))
            mine.weight.copy_(weight[kept])
            mine.bias.copy_(bias[kept])
        x = y


def copy_units(graft, block):
    """Step 0 for a stage of residual units: copies of the teacher's, from first to last evenly."""
    mine, theirs = list(graft.block), list(block)
    if len(mine) > len(theirs):
        fail("--init teacher: the student is deeper than its teacher")
    for i, unit in enumerate(mine):
        source = theirs[round(i * (len(theirs) - 1) / max(1, len(mine) - 1))]
        unit.load_state_dict(source.state_dict())


@torch.no_grad()
def init_from_teacher(pair, views):
    """Step 0 for all grafts; VGG16: from about 1,500 views spread over all images."""
    if isinstance(pair.student, VGGBlocks):
        rows = views.rows[::max(1, len(views.rows) // 1500)]
        x = torch.cat([views.at(part, 0) for part in rows.split(54)])
        for graft, block in zip(pair.scion, pair.t_blocks):
            init_vgg_graft(graft, block, x)
            x = block(x)
    elif isinstance(pair.student, (ResNet, WideResNet)) and len(pair.prefix):
        for graft, block in zip(pair.scion, pair.t_blocks):
            copy_units(graft, block)
    else:
        fail("--init teacher knows the VGG16 pair, and ResNets and WRNs of one stem")


# -------------------------------------------------------------------------- steps 1 and 2

def norm_mse(s_logits, t_logits):
    """Eq. (2). Scaling the logits of an image changes nothing: only their direction counts."""
    s = F.normalize(s_logits, eps=1e-12)
    t = F.normalize(t_logits, eps=1e-12)
    return (s - t).square().sum()


@dataclass
class Phase:
    words: str  # what it is, on the screen
    first: int  # grafts first .. stop - 1 take part
    stop: int
    begin: int  # epochs begin .. end - 1, counted through all phases
    end: int
    batch_size: int
    optimizer: torch.optim.Optimizer


def nth(values, i):
    """Of a list too short, the last entry is repeated."""
    return values[min(i, len(values) - 1)]


def batch_size_at(args, shots):
    return max(2, int(args.batch_size * shots / 10))


def block_groups(graft, b, args, shots):
    """Step 1: graft b with the rates of its parts; they grow with the number of shots."""
    scale = shots / 10
    return [
        {"params": list(graft.block.parameters()), "lr": scale * nth(args.lr_block, b)},
        # graft 0 has no t2s
        {"params": list(graft.t2s.parameters()), "lr": scale * nth(args.lr_t2s, b - 1)},
        {"params": list(graft.s2t.parameters()), "lr": scale * nth(args.lr_s2t, b)},
    ]


def make_phases(scion, args, shots):
    """Step 1: each graft alone. Step 2: the first 2, 3 ... of them. None has 0 epochs."""
    n = len(scion)
    size = batch_size_at(args, shots)
    phases = []
    begin = 0
    for b in range(n):
        words = f"step 1 of 2: block {b + 1} of {n} alone inside the teacher"
        adam = torch.optim.Adam(block_groups(scion[b], b, args, shots), fused=True)
        end = begin + nth(args.epochs_block, b)
        phases.append(Phase(words, b, b + 1, begin, end, size, adam))
        begin = end
    for stop in range(2, n + 1):
        which = "all blocks" if stop == n else f"the first {stop} of {n} blocks"
        words = f"step 2 of 2: {which} together"
        adam = torch.optim.Adam(scion[:stop].parameters(), args.lr_net, fused=True)
        end = begin + nth(args.epochs_net, stop - 2)
        phases.append(Phase(words, 0, stop, begin, end, size, adam))
        begin = end
    return [phase for phase in phases if phase.end > phase.begin]


def make_batches(n, batch_size, rng):
    """Indices of the images of an epoch, shuffled."""
    batches = list(torch.randperm(n, generator=rng, device=rng.device).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]  # D3: batch norm needs two images
    return batches


def graft_step(net, optimizer, h, t_logits, loss_fn, amp="none"):
    """One update of the grafts in net, which runs from the input h of the first one to logits."""
    with autocast(h.device, amp):
        s_logits = net(h)
    loss = loss_fn(s_logits.to(t_logits.dtype), t_logits)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_phase(phase, start, pair, views, score, run, args):
    """Steps 1 and 2: some grafts learn inside the frozen teacher.

    score(net, cut): top-1 on the test images of a network that begins at a cut.
    """
    grafts = pair.scion[phase.first:phase.stop]
    net = pair.grafted(phase.first, phase.stop)
    student = pair.grafted(0, len(pair.scion))
    forward = torch.compile(net) if args.compile else net
    loss_fn = norm_mse if args.norm_loss else F.mse_loss  # eq. (2), eq. (3)
    for epoch in range(max(start, phase.begin), phase.end):
        # only the grafts are in train mode: the teacher's batch norms keep their statistics
        net.eval()
        grafts.train()
        batches = make_batches(len(views.rows) // VIEWS, phase.batch_size, run.rng)
        for i in run.steps(epoch, len(batches), phase.words):
            with run.flops(f"{phase.words} {len(batches[i])}"):
                # a random crop and flip of each image; the frozen blocks' outputs are kept
                view = torch.randint(VIEWS, batches[i].shape, generator=run.rng, device=run.device)
                rows = VIEWS * batches[i] + view
                h = views.at(rows, phase.first)
                t_logits = views.at(rows, len(pair.t_blocks)).float()
                # one Adam step of the grafts; the teacher is frozen
                loss = graft_step(forward, phase.optimizer, h, t_logits, loss_fn, args.amp)
            step = epoch * len(batches) + i
            if step % args.log_every == 0:
                run.log(step, epoch, loss=loss / len(h) if args.norm_loss else loss)

        top1 = None
        if phase.end < args.epochs and epoch + 1 == phase.end:
            alone = score(net, phase.first)
            joined = score(student, 0)
            run.log(step, epoch, top1_grafted=alone, top1_joined=joined)
            print(f"the teacher with these blocks in it: {alone:.2f} %, with all of the student's: "
                  f"{joined:.2f} %", flush=True)
        elif phase.end == args.epochs and run.due(epoch, args.eval_every):
            top1 = score(student, 0)  # D1
        run.end_epoch(epoch, top1)


# --------------------------------------------------------------------------- step 3: folding

def as_affine(layer):
    """A, b in float64 of a 1x1 conv, a Linear or a batch norm in eval mode."""
    if isinstance(layer, nn.BatchNorm1d):
        scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
        return scale.diag(), layer.bias.double() - scale * layer.running_mean.double()
    return layer.weight.double().flatten(1), layer.bias.double()


def fold_affine(*layers):
    """P, c of such layers, one behind the other."""
    P, c = as_affine(layers[0])
    for layer in layers[1:]:
        A, b = as_affine(layer)
        P = A @ P  # eq. (4)
        c = A @ c + b
    return P, c


def affine_as_linear(*layers):
    P, c = fold_affine(*layers)
    linear = nn.Linear(P.shape[1], P.shape[0]).to(P.device)
    linear.load_state_dict({"weight": P, "bias": c})
    return linear


def fold_conv(conv, P, c, size):
    """Weight and bias_map (C, H, W) of a zero-padded 3x3 conv that is given u for P u + c."""
    W = conv.weight.double()
    weight = torch.einsum("oikl,ij->ojkl", W, P)  # eq. (5)
    constant = c.view(1, -1, 1, 1).expand(1, -1, *size)
    bias_map = F.conv2d(constant, W, conv.bias.double(), padding=1)[0]  # eq. (5)
    return weight, bias_map


@torch.no_grad()
def fold_student(pair):
    """D2: the VGG student as one netgraft_vgg16_folded, without 1x1 convs."""
    first, second, head = pair.scion
    hidden, out = head.block[1]
    net = deepcopy(pair.student)  # its blocks have learned within the grafts
    conv = FoldedConv(256, 256, side=2)
    P, c = fold_affine(first.s2t, second.t2s)  # eq. (4)
    weight, bias_map = fold_conv(second.block[0], P, c, size=(2, 2))
    conv.weight.copy_(weight)
    conv.bias_map.copy_(bias_map)
    net.features[4][0] = conv
    net.classifier = affine_as_linear(second.s2t, head.t2s, hidden, out)
    return net.to(weight.device).eval()


def finished_student(pair, tests):
    """Step 3 -> (the student to keep, facts for result.json)."""
    if isinstance(pair.scion[0].s2t, nn.Identity):
        return pair.student, {}  # equal widths: no 1x1 convs
    folded = fold_student(pair)
    trained = tests.predict(pair.grafted(0, len(pair.scion)), 0)
    logits = tests.predict(nn.Sequential(*cut(folded)[len(pair.prefix):]), 0)
    difference = float((logits - trained).abs().max() / trained.abs().max())
    print(f"1x1 convs folded away; no logit moves by more than {difference:.0e} of the largest")
    return folded, {"arch": FOLDED, "fold_difference": difference}


# -------------------------------------------------------------------------------------- main

def main(args):
    if "epochs" in args.typed:
        fail("--epochs: steps have their own lengths here; give --epochs_block and --epochs_net")
    if not all([args.epochs_block, args.epochs_net, args.lr_block, args.lr_t2s, args.lr_s2t]):
        fail("--epochs_block, --epochs_net, --lr_block, --lr_t2s, --lr_s2t: give a number")
    run = Run(args)
    data = load_data(args, run.device)
    x_real, index = few_shot_images(args, data)
    teacher = get_teacher(args, data)  # frozen, in eval mode
    student = build_model(args.student, data.num_classes, data.image_size).to(run.device)
    with autocast(run.device, args.amp):
        pair = match(teacher.net, student, data.image_size)
    shots = len(x_real) / data.num_classes
    phases = make_phases(pair.scion, args, shots)
    if not phases:
        fail("nothing to train: --epochs_block or --epochs_net must be above 0")
    args.epochs = phases[-1].end
    views = Outputs(partial(view_images, data, x_real), VIEWS * len(x_real), pair, args)
    tests = Outputs(partial(test_images, data), len(data.test_x), pair, args)

    def score(net, cut):
        return accuracy(tests.predict(net, cut), data.test_y)["top1"]

    if args.init == "teacher":
        with autocast(run.device, args.amp):
            init_from_teacher(pair, views)  # step 0
    optimizers = {phase.words: phase.optimizer for phase in phases}
    start = run.begin(data, teacher, scion=pair.scion, **optimizers)
    run.note(shot_indices=index)
    run.grid("shots", x_real, rows=min(len(x_real), data.num_classes))

    tests.keep([0])
    for i, phase in enumerate(phases):
        if start < phase.end:
            print(f"{phase.words}, {phase.end - phase.begin} epochs", flush=True)
            if args.epochs > VIEWS:  # all views cost as much once as 162 epochs that keep nothing
                later = {p.first for p in phases[i:]}
                views.keep([len(pair.t_blocks), *sorted(later)])
            train_phase(phase, start, pair, views, score, run, args)  # steps 1 and 2

    student, facts = finished_student(pair, tests)  # step 3
    run.finish(student, shots=shots, real_images=len(x_real), made_images=0, **facts)
    if "arch" in facts:
        print(f"student.pt holds the folded network: --arch {FOLDED}")


if __name__ == "__main__":
    cli(main, Args, PRESETS)
