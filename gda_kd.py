"""GDA-KD: distil a student from a teacher and labelled images by aligning whole batches of logits.

Why it works. A teacher's logits say more than a label: which other classes an image resembles.
Ordinary distillation hands this over image by image: the student's prediction i shall be like the
teacher's prediction i. That leaves open how the predictions of a batch lie to one another: which
images are close, which classes are spread out. GDA aligns the batches as wholes. It takes the
student's and the teacher's predictions as two clouds of points and asks what it costs to carry one
into the other (optimal transport, made smooth by Sinkhorn's rounds). Logits are standardised first,
so that only their pattern counts; what that takes away, their mean and spread, a second term aligns
image by image (Fisher-Rao distance of two normal distributions).

Task 1, classification. Each step
  1. takes G groups of b images, cropped and flipped at random
  2. asks the frozen teacher (eval mode) for logits t, the student (train mode, batch norm of each
     group by itself) for s; GDA is computed in each group, then averaged
       z(x) = (x - mean(x)) / (1e-7 + std(x))   over the classes of an image, std with C - 1    (1)
       W_ij = sum_c |p_ic - q_jc|               p, q = softmax(z(s)/2), softmax(z(t)/2)         (2)
       P    = exp(-W/0.1), then 20 times: rows / row sums, columns / column sums                (3)
       SK   = sum_ij P_ij W_ij                  a SUM over the b x b plan                       (4)
       FR   = mean_i 2 sqrt2 atanh sqrt((d^2 + 2(g-h)^2) / (d^2 + 2(g+h)^2))                    (5)
              g, h: std of the raw logits s_i, t_i over the classes; d: difference of their means
       GDA  = fr FR + sk SK                     gradient through W, P and all rounds            (6)
       KL_i = T^2 KL(softmax(t_i/T) || softmax(s_i/T))                                          (7)
       DKD  = T^2 (alpha TCKD + beta NCKD)      KL of (target, rest); of all but the target     (8)
       a    = theta r,  r = min(epoch / (rate E), 1)    own(i) = CE(s_i, argmax s_i)            (9)
       a_i  = sigmoid((own(i) - CE(s_i, argmax t_i)) / theta)      a constant: no gradient     (10)
       loss = gamma CE(s, y) + kd + align                                                      (11)
         kd         delta mean KL_i + GDA
         dkd        delta DKD + sk SK
         augconf    delta ((1-a) mean KL_i + GDA)       align = delta a mean own(i)
         adaptconf  delta (mean (1-a_i) KL_i + GDA)     align = delta mean a_i own(i)
  3. moves the student by SGD: Nesterov 0.9, no decay on biases and batch norm, rate set each epoch
     by a linear warm-up and a cosine (recipe v0; native: mdistiller's, falls by 10 three times)
Task 2, few-shot learning: learn base classes, then tell new ones apart by 1 or 5 images of each
  fs_classifier  backbone and linear head learn the base classes
  fs_meta        starts from a plain classifier; episodes of `way` base classes, the queries of a
                 step are one cloud; logits tau cos(query, mean of class shots), tau learned   (12)
       loss = CE + w (kd + align) of both, epoch from 1, G0 = GDA with fr 0.1, sk 0.0008       (13)
         kd         mean KL_i + GDA                     dkd  (1-a) DKD + GDA
         augconf    (1-a) (mean KL_i + G0) + GDA        align = a mean own(i)
         adaptconf  mean (1-r a_i) (KL_i + C G0) + GDA  align = mean r a_i own(i)
  fs_test        8,000 episodes of new classes (the other two end with it)

Symbols     C classes, E epochs, epoch from 0, gamma gt_loss_weight, delta and w kd_loss_weight,
            alpha, beta dkd_*, fr, sk fisher_rao_lamda, sinkhorn_lamda (D2), theta and rate
            superalignment_*, G virtual_gpus, b batch_size, tau temp; kd ... are --distiller
Deviations  D1 the result is the last epoch; published: the best on test (classifiers: held-out)
            D2 in groups of b images sk is multiplied by 128 / b; few-shot: as it is
            D3 crops by grid_sample: bits, edges and bicubic weights differ from Pillow's
            D4 kept: v0 scores test images zoomed by 36/32; the native accuracy stands beside it
            D5 few-shot theta is 0.25; the published 8 gives the distillation a weight of -7
            D6 few-shot batch norm keeps the mean of the groups' statistics, not the first one's
Measured    CIFAR-10, 5,000 images, ResNet-20 (91.73 %) -> ResNet-8, 60 epochs, recipe native with
            gamma 2, delta 1, beta 1, seeds 0 to 2: alone 66.69, KD 70.86, KD + GDA 71.73 (paired
            difference +0.86, standard error 0.29), DKD 73.80, DKD + GDA 72.83 (-0.97, 0.46):
            about a point, not significant with three seeds
  python gda_kd.py --smoke          # a minute, no download (few-shot: --preset fs_meta --smoke)
  python gda_kd.py                  # CIFAR-100, ResNet-56 -> ResNet-20 (torchrun for more devices)
  python gda_kd.py --preset small_fewshot                  # few-shot learning on CIFAR-100's images
"""
import contextlib
import math
import os
import pickle
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import (
    MODELS, CommonArgs, Data, Run, Teacher, accuracy, autocast, build_model, cli, conv, evaluate,
    fail, find_weights, flag, get_teacher, load_data, pick_device, predict, random_states_kept,
    read_torch, reading, short_name, with_features, write_torch)


@dataclass
class Args(CommonArgs):
    task: Literal["classify", "fs_classifier", "fs_meta", "fs_test"] = flag(
        "classify", "classify, or a stage of few-shot learning (its values: --preset fs_...)")
    dataset: str = flag("cifar100", "as in all scripts; few-shot: mini, cifarfs or shapes")
    teacher: str = flag("resnet56", "network: a name in MODELS, or file.py:callable",
                        "teacher_res_type")
    student: str = flag("resnet20", "network: a name in MODELS, or file.py:callable",
                        "model", "res_type")
    amp: Literal["auto", "none", "bf16"] = flag(
        "none", "bf16 = networks in bfloat16; auto = on a GPU that has it (few-shot presets)")
    epochs: int = flag(240, "passes over the training images; fs_meta: of --episodes each", low=1)
    batch_size: int = flag(128, "images of one group", low=1)
    lr: float = flag(0.2, "peak learning rate of the student")
    weight_decay: float = flag(5e-4, "v0: not on biases and batch norm")
    # losses
    distiller: Literal["vanilla", "kd", "dkd", "augconf", "adaptconf"] = flag(
        "kd", "what GDA is added to; vanilla = the student alone")
    gda: bool = flag(True, "--no_gda switches eq. (6) off")
    zscore: bool = flag(False, "the KL of kd on standardised logits, a strong baseline without GDA")
    gt_loss_weight: float = flag(2.0, "gamma in eq. (11): weight of the labels")
    kd_loss_weight: float = flag(1.0, "delta in eq. (11), w in eq. (13)", "loss_weight")
    T: float = flag(4.0, "temperature of eqs. (7) and (8)", "kd_temperature", "temperature",
                    low=1e-3)
    fisher_rao_lamda: float = flag(0.02, "weight of FR, eq. (5)", "fisher_rao_lambda")
    sinkhorn_lamda: float = flag(0.1, "weight of SK, eq. (4), in groups of 128", "sinkhorn_lambda")
    dkd_alpha: float = flag(1.0, "weight of TCKD in eq. (8)")
    dkd_beta: float = flag(1.0, "weight of NCKD in eq. (8)")
    dkd_warmup: int = flag(0, "epochs in which the DKD term rises to its full weight")
    superalignment_rate: float = flag(0.3, "share of the epochs in which the ramp rises")
    superalignment_threshold: float = flag(
        0.5, "theta: how far the student's own opinion counts (augconf), how softly (adaptconf)",
        "threshold", low=1e-6)
    # recipe
    recipe: Literal["v0", "native"] = flag(
        "v0", "crops, schedule and view: the published ones, or mdistiller's (presets native_...)")
    virtual_gpus: int = flag(6, "groups of a batch, each with its own batch norm and GDA", low=1)
    gpu: str = flag("", "of the published few-shot commands; here --virtual_gpus")
    # few-shot learning
    fs_shots: tuple[int, ...] = flag((1, 5), "images of a new class; fs_meta trains with the first",
                                     "shot", low=1)
    way: int = flag(5, "classes of an episode", low=2)
    query: int = flag(15, "images of a class to be recognised", low=1)
    episodes: int = flag(800, "of an epoch and a validation; ten times as many at the end", low=8)
    classifier_epochs: int = flag(100, "of a plain classifier that is missing", low=1)
    student_ckpt: str = flag("", "classifier that fs_meta starts from; file that fs_test scores")


NATIVE = dict(recipe="native", batch_size=64, virtual_gpus=1, lr=0.05, gda=False)
NATIVE_ALONE = dict(NATIVE, distiller="vanilla", gt_loss_weight=1.0)
NATIVE_KD = dict(NATIVE, gt_loss_weight=0.1, kd_loss_weight=0.9, T=4.0)
NATIVE_DKD = dict(NATIVE, distiller="dkd", gt_loss_weight=1.0, kd_loss_weight=1.0, T=4.0,
                  dkd_alpha=1.0, dkd_beta=8.0, dkd_warmup=20)
NATIVE_ZSCORE = dict(NATIVE, zscore=True, gt_loss_weight=0.1, kd_loss_weight=9.0, T=2.0)
SMALL = dict(dataset="cifar10", teacher="resnet20", student="resnet8", limit_train=5000, epochs=60,
             eval_every=5)
SMALL_KD = dict(NATIVE_KD, **SMALL)
SMALL_DKD = dict(NATIVE_DKD, dkd_beta=2.0, **SMALL)
FS = dict(dataset="mini", student="resnet36_bottle", amp="auto", T=1.0, fisher_rao_lamda=0.1,
          dkd_beta=0.5, superalignment_rate=0.25, superalignment_threshold=0.25)  # D5
FS_CLASSIFIER = dict(FS, task="fs_classifier", teacher="resnet18_bottle", epochs=100, lr=0.1,
                     batch_size=32, virtual_gpus=4, sinkhorn_lamda=8e-4)
FS_META = dict(FS, task="fs_meta", teacher="resnet12_bottle", epochs=20, lr=1e-3, virtual_gpus=2,
               sinkhorn_lamda=0.1)
PLAIN = dict(  # a classifier without a teacher, in a run of its own
    FS_CLASSIFIER, distiller="vanilla", preset="fs_classifier", seed=0, teacher_ckpt="",
    run_name="", resume="")
GDA_NORM = dict(norm="cifar100_gda")
PRESETS = {  # "*": always; (dataset, teacher, student): for that pair
    "auto": {("cifar100", "resnet56", "resnet20"): GDA_NORM},  # other pairs: the same defaults
    "adaptconf": {  # AdaptConf's own rows; its KD and AugConf rows: --distiller kd, augconf
        "*": dict(distiller="adaptconf", gda=False, batch_size=64, virtual_gpus=8,
                  gt_loss_weight=1.0, kd_loss_weight=0.5, T=1.0),
        ("cifar100", "resnet20", "resnet56"): GDA_NORM,
    },
    "native_alone": {"*": NATIVE_ALONE},
    "native_kd": {"*": NATIVE_KD},  # with GDA on top, at its weights of v0: --gda
    "native_dkd": {
        "*": NATIVE_DKD,  # beta 8 as for resnet32x4 -> resnet8x4
        ("cifar100", "resnet56", "resnet20"): dict(dkd_beta=2.0),
        ("cifar100", "vgg13", "vgg8"): dict(dkd_beta=6.0),
        ("cifar100", "wrn40_2", "wrn16_2"): dict(dkd_beta=6.0),
    },
    "native_zscore": {"*": NATIVE_ZSCORE},
    "fs_classifier": {"*": FS_CLASSIFIER},
    "fs_adaptconf": {"*": dict(FS_CLASSIFIER, distiller="adaptconf", gda=False,
                               superalignment_threshold=8.0)},
    "fs_meta": {"*": FS_META},
    "fs_test": {"*": dict(FS, task="fs_test")},
    "small_alone": {"*": dict(NATIVE_ALONE, **SMALL)},
    "small_kd": {"*": SMALL_KD},
    "small_kd_gda": {"*": dict(SMALL_KD, gda=True)},
    "small_dkd": {"*": SMALL_DKD},
    "small_dkd_gda": {"*": dict(SMALL_DKD, gda=True)},
    "small_kd_zscore": {"*": dict(NATIVE_ZSCORE, **SMALL)},
    "small_fewshot": {"*": dict(FS_META, dataset="cifarfs", teacher="resnet18_thin",
                                student="resnet12_thin", epochs=2, classifier_epochs=3)},
    "demo": {"*": dict(dataset="shapes", teacher="resnet20", student="resnet8", recipe="native",
                       virtual_gpus=1, epochs=4, batch_size=50, lr=0.1)},
    "smoke": {"*": dict(dataset="shapes", teacher="resnet8", student="resnet8", batch_size=64,
                        virtual_gpus=2, epochs=2, lr=0.1, limit_train=300, log_every=1,
                        fs_shots=(1,), query=4, episodes=8, classifier_epochs=1)},
}


# ------------------------------------------------------------------------ losses of both tasks

def standardise(x):
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (1e-7 + std)  # eq. (1)


def cost_matrix(s_logits, t_logits):
    """(G, b, C) -> (G, b, b): L1 distance of every student prediction to every teacher's."""
    p = torch.softmax(standardise(s_logits) / 2, -1)
    q = torch.softmax(standardise(t_logits) / 2, -1)
    return torch.cdist(p, q, p=1)  # eq. (2)


def transport_plan(W):
    """How much of each student prediction goes to each teacher prediction, with gradient."""
    P = torch.exp(-W / 0.1)  # W is at most 2, so nothing underflows
    for _ in range(20):
        P = P / P.sum(-1, keepdim=True)
        P = P / P.sum(-2, keepdim=True)
    return P  # eq. (3)


def sinkhorn_loss(s_logits, t_logits):
    """(G, b, C): a sum in each group, the mean over groups."""
    W = cost_matrix(s_logits, t_logits)
    P = transport_plan(W)
    return (P * W).sum((-2, -1)).mean()  # eq. (4)


def fisher_rao_loss(s_logits, t_logits):
    s_std, s_mean = torch.std_mean(s_logits, -1)
    t_std, t_mean = torch.std_mean(t_logits, -1)
    d2 = (s_mean - t_mean) ** 2
    near = d2 + 2 * (s_std - t_std) ** 2
    far = d2 + 2 * (s_std + t_std) ** 2
    ratio = (near / far.clamp(min=1e-12)).clamp(1e-12, 1 - 1e-7)  # no gradient at a root of 0
    return 2 * math.sqrt(2) * torch.atanh(ratio.sqrt()).mean()  # eq. (5)


def gda_loss(fr, sk, args):
    return args.fisher_rao_lamda * fr + args.sinkhorn_lamda * sk  # eq. (6)


def kl_rows(s_logits, t_logits, T):
    """Of each image (N,): sum over the classes, times T^2."""
    s_logp = F.log_softmax(s_logits / T, -1)
    t_logp = F.log_softmax(t_logits / T, -1)
    return T * T * (t_logp.exp() * (t_logp - s_logp)).sum(-1)  # eq. (7)


def target_and_rest(logits, target, T):
    """(N, 2): log probability of the target class, and of all the others together."""
    logp = F.log_softmax(logits / T, 1)
    rest = logp.masked_fill(target, -math.inf).logsumexp(1)
    return torch.stack((logp.masked_fill(~target, 0).sum(1), rest), 1)


def dkd_loss(s_logits, t_logits, y, alpha, beta, T):
    target = y[:, None] == torch.arange(s_logits.shape[1], device=y.device)
    s_pair = target_and_rest(s_logits, target, T)  # (N, 2)
    t_pair = target_and_rest(t_logits, target, T)
    tckd = kl_rows(T * s_pair, T * t_pair, T).mean()
    away = 1000 * T * target  # the target's share becomes 0
    nckd = kl_rows(s_logits - away, t_logits - away, T).mean()
    return alpha * tckd + beta * nckd  # eq. (8)


def ramp(epoch, epochs, rate):
    """Rises from 0 to 1."""
    if epoch < int(epochs * rate):
        return epoch / (epochs * rate)
    return 1.0


def ce_rows(logits, other):
    """Of each image (N,): cross-entropy with the class that the other logits prefer."""
    return F.cross_entropy(logits, other.argmax(-1), reduction="none")


def adaptconf_weight(s_logits, t_logits, theta):
    """Of each image (N,), at most 0.5: large where the student differs from its teacher surely."""
    own = ce_rows(s_logits, s_logits)
    taught = ce_rows(s_logits, t_logits)
    return torch.sigmoid((own - taught).detach() / theta)  # eq. (10)


# ---------------------------------------------------------------------- task 1: its distillers
# All take logits (N, C), labels, FR, SK, the epoch from 0 and args, and return (kd, align), the
# two terms that eq. (11) adds to the labels'.

def kd(s_logits, t_logits, y, fr, sk, epoch, args):
    if args.zscore:
        s_logits = standardise(s_logits)
        t_logits = standardise(t_logits)
    kl = kl_rows(s_logits, t_logits, args.T).mean()
    return args.kd_loss_weight * kl + gda_loss(fr, sk, args), 0.0


def dkd(s_logits, t_logits, y, fr, sk, epoch, args):
    base = dkd_loss(s_logits, t_logits, y, args.dkd_alpha, args.dkd_beta, args.T)
    warmup = min((epoch + 1) / max(args.dkd_warmup, 1), 1.0)
    return warmup * args.kd_loss_weight * base + args.sinkhorn_lamda * sk, 0.0  # no FR


def augconf(s_logits, t_logits, y, fr, sk, epoch, args):
    r = ramp(epoch, args.epochs, args.superalignment_rate)
    a = args.superalignment_threshold * r  # eq. (9)
    kl = kl_rows(s_logits, t_logits, args.T).mean()
    own = ce_rows(s_logits, s_logits).mean()
    delta = args.kd_loss_weight
    return delta * ((1 - a) * kl + gda_loss(fr, sk, args)), delta * a * own


def adaptconf(s_logits, t_logits, y, fr, sk, epoch, args):
    a = adaptconf_weight(s_logits, t_logits, args.superalignment_threshold)
    kl = ((1 - a) * kl_rows(s_logits, t_logits, args.T)).mean()
    own = (a * ce_rows(s_logits, s_logits)).mean()
    delta = args.kd_loss_weight
    return delta * (kl + gda_loss(fr, sk, args)), delta * own


DISTILLERS = {"kd": kd, "dkd": dkd, "augconf": augconf, "adaptconf": adaptconf}


# -------------------------------------------------------------------------------------- images

def draw_crops(n, size, rng):
    """(4, n) top, left, height, width: the first of ten tries that fits, else the whole image."""
    u = torch.rand(22, n, generator=rng, device=rng.device)
    area = size * size * (0.08 + 0.92 * u[:10])
    aspect = torch.exp((2 * u[10:20] - 1) * math.log(4 / 3))  # from 3/4 to 4/3
    sides = torch.stack((area / aspect, area * aspect)).sqrt().round()  # (2, 10, n): h, w
    fits = (sides <= size).all(0)
    first = fits.int().argmax(0).expand(2, 1, n)
    sides = torch.where(fits.any(0), sides.gather(1, first)[:, 0], size)  # (2, n)
    place = (u[20:] * (size + 1 - sides)).floor()
    return torch.cat((place, sides))


def crop_resize(x, crops, flip, size, mode):
    """uint8 (N, 3, S, S) -> floats in [0, 1] (N, 3, size, size); flip: (N,) of 0 and 1."""
    top, left, h, w = crops / x.shape[-1]  # as shares of the side
    theta = torch.zeros(len(x), 2, 3, device=x.device)  # output place -> input place, -1 to 1
    theta[:, 0, 0] = (1 - 2 * flip) * w
    theta[:, 0, 2] = 2 * left + w - 1
    theta[:, 1, 1] = h
    theta[:, 1, 2] = 2 * top + h - 1
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    x = F.grid_sample(x.float() / 255, grid, mode, "border", align_corners=False)  # D3
    return x.clamp(0, 1)


V0_MODES = ("bilinear", "bicubic")


def random_crops(x, size, rng, modes):
    """Randomly resized crops and flips, every image in the next one of the modes."""
    crops = draw_crops(len(x), x.shape[-1], rng)
    flip = (torch.rand(len(x), generator=rng, device=x.device) < 0.5).float()
    out = torch.empty(len(x), 3, size, size, device=x.device)
    for k, mode in enumerate(modes):
        part = slice(k, None, len(modes))
        out[part] = crop_resize(x[part], crops[:, part], flip[part], size, mode)
    return out


def resize_centre(x, side, size):
    """uint8 (N, 3, S, S): resized to side pixels, the middle size pixels of them, uint8."""
    first = (side - size) // 2
    parts = []
    for part in x.split(500):
        part = F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
        part = part[:, :, first:first + size, first:first + size]
        parts.append(part.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def zoomed(x):
    """The published view of test images: 32 -> 36, the middle 32."""
    size = x.shape[-1]
    return resize_centre(x, int(size / 0.875), size)  # D4


# -------------------------------------------------------- groups, optimizers and learning rates

def batch_norm_of_groups(norm, groups, x):
    """Batch norm of each group of a batch by itself, as on so many devices.

    The running statistics move by the mean of the groups' statistics (D6): with the momentum below
    every group ends with the same share of them.
    """
    if not norm.training:
        return nn.BatchNorm2d.forward(norm, x)
    share = norm.momentum / groups
    out = []
    for k, part in enumerate(x.chunk(groups), start=1):
        momentum = share / (1 - (groups - k) * share)
        out.append(F.batch_norm(part, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                                True, momentum, norm.eps))
    return torch.cat(out)


def split_batch_norms(net, groups):
    """From now on a batch of net is so many groups of images, one after the other."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and groups > 1:
            m.forward = partial(batch_norm_of_groups, m, groups)


def group_sizes(n, args, world=1):
    """(groups, images of one): fewer where images are few; the processes share the groups."""
    groups = min(args.virtual_gpus, n // args.batch_size)
    groups = max(1, groups // world) * world
    size = min(args.batch_size, n // groups)
    if (groups, size) != (args.virtual_gpus, args.batch_size):
        print(f"{groups} groups of {size} images, not {args.virtual_gpus} of {args.batch_size}: "
              f"there are only {n}", flush=True)
    return groups, size


def v0_optimizer(net, lr, weight_decay):
    """Nesterov; no decay of biases and batch norm."""
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
    fused = next(net.parameters()).is_cuda
    return torch.optim.SGD(
        groups, lr, 0.9, weight_decay=weight_decay, nesterov=True, fused=fused)


def plain_optimizer(net, lr, weight_decay):
    fused = next(net.parameters()).is_cuda
    return torch.optim.SGD(net.parameters(), lr, 0.9, weight_decay=weight_decay, fused=fused)


def v0_lr(epoch, epochs, lr, min_lr=2e-3, warmup=10, warmup_lr=1e-4):
    """Linear in at most a quarter of the epochs, then the rest of a cosine over all epochs."""
    warmup = min(warmup, epochs // 4)
    if epoch < warmup:
        return warmup_lr + epoch * (lr - warmup_lr) / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def native_lr(epoch, epochs, lr):
    """A tenth after each of three shares of the epochs."""
    passed = [share for share in (0.625, 0.75, 0.875) if epoch >= share * epochs]
    return lr * 0.1 ** len(passed)


def classifier_lr(epoch, epochs, lr):
    return lr * 0.1 if epoch >= 0.9 * epochs else lr


# ------------------------------------------------------------------- torchrun, several processes

def start_processes(args):
    """(rank, number of processes) if torchrun started this, else (0, 1) whatever RANK says."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if not all(text.isdigit() for text in numbers) or "MASTER_ADDR" not in os.environ:
        fail("WORLD_SIZE is set, but RANK, LOCAL_RANK (numbers) and MASTER_ADDR are not all there: "
             "start several processes with torchrun, or unset WORLD_SIZE for one")
    rank, local, world = map(int, numbers)
    if args.task != "classify":
        fail("few-shot learning runs in one process; its groups are --virtual_gpus")
    if args.virtual_gpus % world:
        fail(f"{world} processes cannot share --virtual_gpus {args.virtual_gpus}; start a number "
             "that divides it")
    timeout = timedelta(hours=12)  # the others wait while the first one trains a missing teacher
    if args.device != "cpu" and torch.cuda.is_available():
        device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
        args.device = str(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    return rank, world


@contextlib.contextmanager
def first_process_first(rank, world):
    """It fetches data and trains a missing teacher; the others then find both."""
    if rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def add_over_processes(tensors):
    """In place, all of them in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, flat.split(sizes)):
        tensor.copy_(total.view_as(tensor))


def share_statistics(net, world):
    """Batch norm's running statistics become the mean over the processes."""
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    add_over_processes(buffers)
    for buffer in buffers:
        buffer.div_(world)


# ---------------------------------------------------------------------- task 1: classification

def classification_loss(s_logits, t_logits, y, epoch, args):
    """Eq. (11) and its terms. Logits (G, b, C), labels (G * b,); t_logits None: no teacher."""
    s_rows = s_logits.flatten(0, 1)
    ce = F.cross_entropy(s_rows, y)
    if t_logits is None:
        return args.gt_loss_weight * ce, {"ce": ce}
    fr, sk = 0.0, 0.0
    if args.gda:
        fr = fisher_rao_loss(s_logits, t_logits)
        sk = sinkhorn_loss(s_logits, t_logits) * (128 / s_logits.shape[1])  # D2
    distill = DISTILLERS[args.distiller]
    taught, align = distill(s_rows, t_logits.flatten(0, 1), y, fr, sk, epoch, args)
    loss = args.gt_loss_weight * ce + taught + align  # eq. (11)
    return loss, {"ce": ce, "kd": taught, "align": align, "fr": fr, "sk": sk}


def classify(args):
    rank, world = start_processes(args)
    run = Run(args)
    v0 = args.recipe == "v0"
    teacher = t_logits = None
    with first_process_first(rank, world):
        data = load_data(args, run.device)
        native_x = data.test_x
        if v0:
            data.test_x = zoomed(native_x)  # D4: every accuracy from here on is of these
        if args.distiller != "vanilla":
            teacher = get_teacher(args, data)
        n = len(data.train_x)

    student = build_model(args.student, data.num_classes, data.image_size)
    student.to(run.device, memory_format=torch.channels_last)
    groups, size = group_sizes(n, args, world)
    mine = groups // world
    split_batch_norms(student, mine)
    if v0:
        optimizer, lr_at = v0_optimizer(student, args.lr, args.weight_decay), v0_lr
    else:
        optimizer, lr_at = plain_optimizer(student, args.lr, args.weight_decay), native_lr
    start = run.begin(data, teacher, student=student, optimizer=optimizer)
    run.note(groups=groups, images_of_a_group=size)
    net = torch.compile(student) if args.compile else student
    batch = groups * size
    steps = n // batch
    if groups == 1 and not v0:
        steps = math.ceil(n / batch)  # the last, smaller batch too

    for epoch in range(start, args.epochs):
        student.train()
        lr = lr_at(epoch, args.epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        order = torch.randperm(n, generator=run.rng, device=run.device)
        for i in run.steps(epoch, steps):
            # step 1: images; each process draws the same batch and takes its part of the groups
            index = order[i * batch:(i + 1) * batch]
            with run.flops(f"step of {len(index)}"):
                if v0:
                    x = random_crops(data.train_x[index], data.image_size, run.rng, V0_MODES)
                    x = data.normalize(x)
                else:
                    x = data.augment(data.train_x[index], run.rng)
                x = x.chunk(world)[rank]
                y = data.train_y[index].chunk(world)[rank]

                # step 2: logits and losses; the teacher is frozen, so it keeps no graph
                with autocast(run.device, args.amp):
                    s_logits = net(x).float().unflatten(0, (mine, -1))
                    if teacher is not None:
                        t_logits = teacher(x).float().unflatten(0, (mine, -1))
                loss, terms = classification_loss(s_logits, t_logits, y, epoch, args)

                # step 3: the student moves
                optimizer.zero_grad()
                (loss / world).backward()
                if world > 1:
                    add_over_processes([p.grad for p in student.parameters() if p.grad is not None])
                optimizer.step()
            if i % args.log_every == 0:
                run.log(epoch * steps + i, epoch, loss=loss, **terms, lr=lr)
        if world > 1:
            share_statistics(student, world)
        top1 = None
        if rank == 0 and run.due(epoch, args.eval_every):
            top1 = evaluate(student, data, args.amp)
        run.end_epoch(epoch, top1)

    native_top1 = accuracy(predict(student, data, native_x), data.test_y)["top1"]
    run.finish(student, real_images=n, native_top1=native_top1)  # D1
    if world > 1:
        dist.destroy_process_group()


# ===================================================================== task 2: few-shot learning

class FewShotBlock(nn.Module):
    """Three 3x3 convs; the first block of a stage has a 1x1 shortcut, and halves the image."""

    def __init__(self, c_in, c_out, first):
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv3 = conv(c_out, c_out, 3)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if first:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        y = F.leaky_relu(self.bn2(self.conv2(y)), 0.1)
        y = self.bn3(self.conv3(y))
        if self.downsample is None:
            return F.leaky_relu(y + x, 0.1)
        return F.max_pool2d(F.leaky_relu(y + self.downsample(x), 0.1), 2)


class FewShotResNet(nn.Module):
    """No stem, four stages, the mean over the image, and a head for the base classes."""

    def __init__(self, depths, widths, num_classes):
        super().__init__()
        c = 3
        for stage, (depth, width) in enumerate(zip(depths, widths), start=1):
            blocks = []
            for i in range(depth):
                blocks.append(FewShotBlock(c, width, first=i == 0))
                c = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(c, num_classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


WIDTHS, THIN = (64, 128, 256, 512), (16, 32, 64, 128)
MODELS.update({  # the project's names; thin: for a CPU
    "resnet12_bottle": partial(FewShotResNet, (1, 1, 1, 1), WIDTHS),
    "resnet18_bottle": partial(FewShotResNet, (1, 2, 2, 1), WIDTHS),
    "resnet36_bottle": partial(FewShotResNet, (2, 3, 5, 2), WIDTHS),
    "resnet12_thin": partial(FewShotResNet, (1, 1, 1, 1), THIN),
    "resnet18_thin": partial(FewShotResNet, (1, 2, 2, 1), THIN),
})


class Learner(nn.Module):
    """A network, of whose last Linear the input is the feature of an image, and tau of eq. (12)."""

    def __init__(self, arch, num_classes, size):
        super().__init__()
        self.encoder = build_model(arch, num_classes, size)
        self.temp = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        _, features = with_features(self.encoder, x)
        return features  # (B, D)


def load_learner(learner, path):
    """A file of ours or of the published project; only head, tau and counters may be missing."""
    content = read_torch(path)
    own = learner.state_dict()
    with reading(path, "give a file of fs_classifier or fs_meta"):
        found = find_weights(content.get("model_sd", content))
        for key in list(found):
            found[key.replace("classifier.linear.", "encoder.linear.")] = found.pop(key)
        for key, value in own.items():
            if key.startswith(("temp", "encoder.linear.")) or key.endswith("num_batches_tracked"):
                found.setdefault(key, value)
        for key in sorted(own.keys() | found.keys()):
            if key not in own or key not in found or own[key].shape != found[key].shape:
                fail(f"{path} does not fit the few-shot network: {key} differs; name its backbone "
                     "by --student (or --teacher), and by --dataset the images it is for")
        learner.load_state_dict(found)


# ------------------------------------------------------------------------------- few-shot data

CIFARFS_VAL = (4, 7, 14, 15, 19, 26, 27, 32, 40, 47, 48, 55, 71, 73, 87, 89)
CIFARFS_TEST = (2, 5, 8, 21, 34, 42, 46, 58, 60, 62, 69, 70, 77, 83, 84, 86, 94, 95, 98, 99)
FEWSHOT_SETS = {  # made from the set named first: its classes for validation, for the test
    "cifarfs": ("cifar100", CIFARFS_VAL, CIFARFS_TEST),
    "shapes": ("shapes", (), (5, 6, 7, 8, 9)),
}
MINI_SIZE = 80  # pixels that the network sees of mini-ImageNet's 84


def load_fewshot(args, device):
    """(base classes, validation, new classes): Data with other images of the base classes as its
    test split; and twice (images, labels) of classes that are not learned."""
    if args.dataset == "mini":
        data, val, new = load_mini(args, device)
    elif args.dataset in FEWSHOT_SETS:
        data, val, new = load_split_classes(args, device)
    else:
        fail(f"--dataset {args.dataset}: few-shot learning takes mini, cifarfs or shapes")
    shots = max(args.fs_shots)
    for y in (data.train_y, val[1], new[1]):
        counts = torch.bincount(y)
        if len(counts) < args.way or counts.min() < shots + args.query:
            fail(f"--way {args.way}, --query {args.query}, --fs_shots {shots}: there are only "
                 f"{len(counts)} classes with {counts.min()} images or more; ask for less")
    return data, val, new


def only_classes(x, y, classes):
    """The images of some classes, which are numbered anew."""
    number = torch.full((int(y.max()) + 1,), -1, device=y.device)
    number[list(classes)] = torch.arange(len(classes), device=y.device)
    y = number[y]
    return x[y >= 0], y[y >= 0]


def load_split_classes(args, device):
    name, val, new = FEWSHOT_SETS[args.dataset]
    source = copy(args)
    source.dataset = name
    full = load_data(source, device)
    base = [c for c in range(full.num_classes) if c not in val + new]

    def read(split):
        x, y = full.train if split == "train" else (full.test_x, full.test_y)
        return *only_classes(x, y, base), [full.classes[c] for c in base]

    data = Data(args.dataset, read, device, full.norm)
    x = torch.cat((full.train_x, full.test_x))
    y = torch.cat((full.train_y, full.test_y))
    val_part = only_classes(x, y, val) if val else (data.test_x, data.test_y)
    return data, val_part, only_classes(x, y, new)


class ArraysOnly(pickle.Unpickler):
    """Lists, dicts, numbers, text and numpy arrays; a pickle that asks for more is refused."""
    allowed = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
               "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
               "numpy._core.multiarray.scalar", "_codecs.encode"}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.allowed:
            raise ValueError(f"it asks for {module}.{name}, no array")
        return super().find_class(module, name)


def read_mini(args, split):
    path = Path(args.data_dir, "mini_imagenet", f"miniImageNet_category_split_{split}.pickle")
    if not path.exists():
        fail(f"{path} is missing: put the pickles of github.com/gidariss/FewShotWithoutForgetting "
             "there, or try --dataset cifarfs, made from CIFAR-100, or shapes, which needs no file")
    with reading(path, "fetch it again"), path.open("rb") as f:
        content = ArraysOnly(f, encoding="latin1").load()
        x = np.asarray(content["data"], np.uint8).transpose(0, 3, 1, 2)
        names, y = np.unique(np.asarray(content["labels"]), return_inverse=True)
    return torch.tensor(x), torch.tensor(y), names.tolist()


def load_mini(args, device):
    def read(split):
        return read_mini(args, f"train_phase_{split}")

    norm = "imagenet" if args.norm == "auto" else args.norm
    data = Data("mini", read, device, norm, args.limit_train)
    data.train  # is read before the test images get another size
    data.test_x = resize_centre(data.test_x, MINI_SIZE, MINI_SIZE)
    data.image_size = MINI_SIZE
    parts = []
    for split in ("val", "test"):
        x, y, _ = read_mini(args, split)
        parts.append((resize_centre(x.to(device), MINI_SIZE, MINI_SIZE), y.to(device)))
    return data, *parts


# ------------------------------------------------------------------------------------ episodes

PER_STEP = 4  # episodes of a step, and of a value of the confidence interval


def draw_episodes(labels, steps, way, per_class, rng):
    """(steps, PER_STEP * way * per_class) indices, one episode and class after the other; numpy's
    old generator, drawn from as the published code does."""
    members = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    drawn = []
    for _ in range(steps * PER_STEP):
        for c in rng.choice(len(members), way, replace=False):
            drawn.append(rng.choice(members[c], per_class, replace=False))
    return np.concatenate(drawn).reshape(steps, -1)


def split_episodes(items, episodes, way, shots):
    """Items in the drawn order -> shots (E, way, shots, ...), queries (E, way * query, ...)."""
    items = items.unflatten(0, (episodes, way, -1))
    return items[:, :, :shots], items[:, :, shots:].flatten(1, 2)


def query_labels(episodes, way, query):
    return torch.arange(way).repeat_interleave(query).repeat(episodes)


def episode_logits(shots, queries, tau):
    """Features (E, way, shots, D), (E, Q, D) -> (E, Q, way)."""
    prototypes = F.normalize(shots.mean(-2), dim=-1)
    return tau * F.normalize(queries, dim=-1) @ prototypes.mT  # eq. (12)


def student_t(dof):
    """Between -t and t lie 95 % of Student's distribution; t by Newton's method."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi * dof)

    def density(x):
        return scale * (1 + x * x / dof) ** (-(dof + 1) / 2)

    t = 1.96
    for _ in range(50):
        between = t / 2 * weights @ density(t / 2 * (nodes + 1))  # of 0 and t
        t += (0.475 - between) / density(t)
    return t


def half_width(values):
    """Of the 95 % confidence interval of their mean."""
    return student_t(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def episode_accuracy(features, labels, shots, episodes, args):
    """Mean over steps of 4 episodes, always the same ones, and its half width, in percent."""
    rng = np.random.RandomState(0)
    steps = episodes // PER_STEP
    drawn = draw_episodes(labels.cpu().numpy(), steps, args.way, shots + args.query, rng)
    y = query_labels(1, args.way, args.query).to(features.device)
    found = []
    for index in torch.from_numpy(drawn).to(features.device):
        split = split_episodes(features[index], PER_STEP, args.way, shots)
        right = episode_logits(*split, 1.0).argmax(-1) == y  # (E, Q)
        found.append(100 * right.double().mean())
    values = torch.stack(found).cpu().numpy()  # sync
    return float(values.mean()), float(half_width(values))


def test_scores(learner, data, new, args):
    """{shots: (accuracy, half width)}; the images are encoded once, episodes drawn from them."""
    x, y = new
    features = predict(learner, data, x, args.amp)
    return {str(shots): episode_accuracy(features, y, shots, 10 * args.episodes, args)
            for shots in args.fs_shots}


def print_scores(name, scores):
    words = [f"{shots}-shot {mean:.2f} +- {half:.2f} %" for shots, (mean, half) in scores.items()]
    print(f"{name}, new classes: {', '.join(words)}", flush=True)


# --------------------------------------------------------------------- task 2: its distillers
# As those of task 1, but for eq. (13), whose weight w is applied by fewshot_loss.

def fewshot_ramp(epoch, args):
    return ramp(epoch + 1, args.epochs, args.superalignment_rate)


def extra_gda(fr, sk):
    return 0.1 * fr + 0.0008 * sk  # G0: an accident of the published code, kept


def fewshot_kd(s_logits, t_logits, y, fr, sk, epoch, args):
    return kl_rows(s_logits, t_logits, args.T).mean() + gda_loss(fr, sk, args), 0.0


def fewshot_dkd(s_logits, t_logits, y, fr, sk, epoch, args):
    a = args.superalignment_threshold * fewshot_ramp(epoch, args)
    base = dkd_loss(s_logits, t_logits, y, args.dkd_alpha, args.dkd_beta, args.T)
    return (1 - a) * base + gda_loss(fr, sk, args), 0.0


def fewshot_augconf(s_logits, t_logits, y, fr, sk, epoch, args):
    a = args.superalignment_threshold * fewshot_ramp(epoch, args)
    kl = kl_rows(s_logits, t_logits, args.T).mean() + extra_gda(fr, sk)
    own = ce_rows(s_logits, s_logits).mean()
    return (1 - a) * kl + gda_loss(fr, sk, args), a * own


def fewshot_adaptconf(s_logits, t_logits, y, fr, sk, epoch, args):
    a = adaptconf_weight(s_logits, t_logits, args.superalignment_threshold)
    a = fewshot_ramp(epoch, args) * a
    classes = s_logits.shape[1]
    kl = kl_rows(s_logits, t_logits, args.T) + classes * extra_gda(fr, sk)
    own = ce_rows(s_logits, s_logits)
    return ((1 - a) * kl).mean() + gda_loss(fr, sk, args), (a * own).mean()


FEWSHOT_DISTILLERS = {"kd": fewshot_kd, "dkd": fewshot_dkd, "augconf": fewshot_augconf,
                      "adaptconf": fewshot_adaptconf}


def fewshot_loss(s_logits, t_logits, y, epoch, args):
    """Eq. (13) and its terms. Logits (N, C): one group; t_logits None: without a teacher."""
    ce = F.cross_entropy(s_logits, y)
    if t_logits is None:
        return ce, {"ce": ce}
    fr, sk = 0.0, 0.0
    if args.gda:
        fr = fisher_rao_loss(s_logits, t_logits)
        sk = sinkhorn_loss(s_logits, t_logits)  # D2: not multiplied
    distill = FEWSHOT_DISTILLERS[args.distiller]
    taught, align = distill(s_logits, t_logits, y, fr, sk, epoch, args)
    loss = ce + args.kd_loss_weight * (taught + align)  # eq. (13)
    return loss, {"ce": ce, "kd": taught, "align": align, "fr": fr, "sk": sk}


# -------------------------------------------------------- task 2: classifier, meta, test

def plain_classifier(args, arch):
    """The file of a classifier that had no teacher; it is trained now if it is not there."""
    length = f"{args.classifier_epochs}_epochs_of_{args.limit_train or 'all'}"
    name = f"{args.dataset}_{short_name(arch)}_classifier_{length}.pt"
    path = Path(args.data_dir, "teachers", name)
    if not path.is_file():
        print(f"{path} is not there: training it", flush=True)
        plain = replace(args, **PLAIN)
        plain.dataset, plain.student, plain.teacher = args.dataset, arch, ""
        plain.epochs = args.classifier_epochs
        plain.typed = {}
        with random_states_kept():  # found or trained: the run is the same
            learner = fewshot_classifier(plain)
        write_torch(path, learner.cpu().state_dict())
    return path


def fewshot_teacher(args, data, new):
    """A classifier or a meta learner, frozen; of tau nothing is read, it stays 10."""
    if args.distiller == "vanilla":
        return None
    path = args.teacher_ckpt or plain_classifier(args, args.teacher)
    learner = Learner(args.teacher, data.num_classes, data.image_size)
    load_learner(learner, path)
    teacher = Teacher(learner, learner.encoder, args.teacher, path)
    teacher.to(data.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    scores = test_scores(learner, data, new, args)
    teacher.top1 = scores[str(args.fs_shots[0])][0]
    print_scores(f"teacher {args.teacher} from {path}", scores)
    return teacher


def finish_fewshot(run, learner, data, new, args):
    scores = test_scores(learner, data, new, args)
    print_scores(args.student, scores)
    facts = {"teacher_top1": run.teacher.top1} if run.teacher else {}
    run.finish(learner, {"top1": scores[str(args.fs_shots[0])][0]}, few_shot=scores,
               real_images=len(data.train_x), **facts)


def fewshot_classifier(args):
    """The base classes by a linear head, as any classifier."""
    run = Run(args)
    data, _, new = load_fewshot(args, run.device)
    teacher = fewshot_teacher(args, data, new)
    t_logits = None

    learner = Learner(args.student, data.num_classes, data.image_size)
    learner.to(run.device, memory_format=torch.channels_last)
    n = len(data.train_x)
    groups, size = group_sizes(n, args)
    split_batch_norms(learner, groups)
    batch = groups * size
    steps = n // batch
    optimizer = plain_optimizer(learner, args.lr, args.weight_decay)
    start = run.begin(data, teacher, learner=learner, optimizer=optimizer)
    net = torch.compile(learner.encoder) if args.compile else learner.encoder

    for epoch in range(start, args.epochs):
        learner.train()
        lr = classifier_lr(epoch, args.epochs, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(n, generator=run.rng, device=run.device)
        for i in run.steps(epoch, steps):
            index = order[i * batch:(i + 1) * batch]
            with run.flops("classifier step"):
                # step 1: randomly resized crops of base images
                x = random_crops(data.train_x[index], data.image_size, run.rng, ("bilinear",))
                x = data.normalize(x)
                y = data.train_y[index]

                # step 2: logits of the base classes, and the loss
                with autocast(run.device, args.amp):
                    s_logits = net(x).float()
                    if teacher is not None:
                        t_logits = teacher.net(x).float()
                loss, terms = fewshot_loss(s_logits, t_logits, y, epoch, args)

                # step 3: backbone and head move
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if i % args.log_every == 0:
                run.log(epoch * steps + i, epoch, loss=loss, **terms, lr=lr)
        if run.due(epoch, args.eval_every):
            heldout = evaluate(learner.encoder, data, args.amp)
            run.log((epoch + 1) * steps, epoch, heldout_top1=heldout)
        run.end_epoch(epoch)
    finish_fewshot(run, learner, data, new, args)
    return learner


def fewshot_meta(args):
    """Episodes of base classes: what is asked of the features later is trained for now."""
    run = Run(args)
    data, val, new = load_fewshot(args, run.device)
    teacher = fewshot_teacher(args, data, new)
    base_x = resize_centre(data.train_x, data.image_size, data.image_size)
    t_logits = None
    if teacher is not None:  # episodes are not augmented, so the teacher sees each image once
        t_features = predict(teacher, data, base_x, args.amp)

    learner = Learner(args.student, data.num_classes, data.image_size)
    load_learner(learner, args.student_ckpt or plain_classifier(args, args.student))
    learner.to(run.device, memory_format=torch.channels_last)
    split_batch_norms(learner, args.virtual_gpus)
    optimizer = plain_optimizer(learner, args.lr, args.weight_decay)
    start = run.begin(data, teacher, learner=learner, optimizer=optimizer)
    shots = args.fs_shots[0]
    steps = args.episodes // PER_STEP
    y = query_labels(PER_STEP, args.way, args.query).to(run.device)
    labels = data.train_y.cpu().numpy()
    net = torch.compile(learner) if args.compile else learner

    for epoch in range(start, args.epochs):
        learner.train()
        rng = np.random.RandomState((epoch + 1 + 10_000 * args.seed) % 2 ** 32)
        drawn = draw_episodes(labels, steps, args.way, shots + args.query, rng)
        drawn = torch.from_numpy(drawn).to(run.device)
        for i in run.steps(epoch, steps):
            with run.flops("meta step"):
                # step 1: shots and queries of four episodes go through the network together
                x = data.normalize(base_x[drawn[i]])
                with autocast(run.device, args.amp):
                    features = net(x).float()

                # step 2: logits of the queries, and the loss
                split = split_episodes(features, PER_STEP, args.way, shots)
                s_logits = episode_logits(*split, learner.temp).flatten(0, 1)
                if teacher is not None:
                    split = split_episodes(t_features[drawn[i]], PER_STEP, args.way, shots)
                    t_logits = episode_logits(*split, 10.0).flatten(0, 1)
                loss, terms = fewshot_loss(s_logits, t_logits, y, epoch, args)

                # step 3: backbone and tau move
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if i % args.log_every == 0:
                run.log(epoch * steps + i, epoch, loss=loss, **terms, tau=learner.temp)
        if run.due(epoch, args.eval_every):
            features = predict(learner, data, val[0], args.amp)
            val_top1, _ = episode_accuracy(features, val[1], shots, args.episodes, args)
            run.log((epoch + 1) * steps, epoch, val_top1=val_top1)
        run.end_epoch(epoch)
    finish_fewshot(run, learner, data, new, args)


def fewshot_test(args):
    """Score a file on the new classes; makes no run folder."""
    device = Run(args).device
    data, _, new = load_fewshot(args, device)
    learner = Learner(args.student, data.num_classes, data.image_size)
    load_learner(learner, args.student_ckpt)
    learner.to(device, memory_format=torch.channels_last)
    print_scores(args.student_ckpt, test_scores(learner, data, new, args))


# ---------------------------------------------------------------------------------------- main

TASKS = {"classify": classify, "fs_classifier": fewshot_classifier, "fs_meta": fewshot_meta,
         "fs_test": fewshot_test}


def check(args):
    """What needs no data."""
    fewshot = args.task != "classify"
    if args.gpu:
        fail("--gpu chose the devices of the published code; here one device computes all groups, "
             "and their number is --virtual_gpus")
    if args.zscore and (fewshot or args.distiller != "kd"):
        fail("--zscore serves --distiller kd of --task classify only")
    if args.task == "fs_test" and not args.student_ckpt:
        fail("--task fs_test scores a file: --student_ckpt FILE")
    if args.superalignment_threshold > 1 and args.distiller in ("dkd", "augconf"):
        print("warning: a theta above 1 makes the weight of the distillation negative")


def main(args):
    check(args)
    torch.backends.cudnn.benchmark = True
    TASKS[args.task](args)


if __name__ == "__main__":
    cli(main, Args, PRESETS)
