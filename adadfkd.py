"""AdaDFKD: distil a student without real images, on images that a generator makes hard for it.

Why it works. A trained teacher T can be asked about any image, so a student S can learn from images
that a generator G makes. Noise would teach little: G must make images that look real to T and on
which S is least like T. They look real when T is sure of each, when all classes occur, and when the
statistics inside T are those that its batch norms stored in training. AdaDFKD adds relations. For
each image, T's feature should be close to S's feature of the same image and far from S's features
of earlier images. Which earlier ones count is a ring that slides over the epochs: first those that
are unlike the image, an easy comparison, at last those that are most alike, a hard one. S meanwhile
weighs its own loss: what is far above a threshold hardly counts, and the threshold rises.

Each epoch, ep_steps // kd_steps times
  1. g_steps times: z ~ N(0, 1), x = G(z) in [0, 1], normalised for T and S, which are frozen, in
     eval mode; t = T(x), s = S(x), f_t, f_s the features before the classifier. One Adam step of G
     L_G   = lmda_ent*H_T - balance*H_1 + oh*L_oh + act*L_act + bn*L_bn + adv*L_adv + hard*L_rel (1)
     H_T   = -sum_c p_c log p_c, p = batch mean of softmax(t / T); lmda_ent < 0: all classes     (2)
     L_oh  = CE(t, argmax t),  L_act = -mean |f_t|                                               (3)
     L_bn  = sum over T's batch norms of |mean - running mean| + |biased var - running var|, of
             their inputs, 2-norms                                                               (4)
     L_adv = -mean_i [argmax s_i = argmax t_i] 9 KL(softmax(t_i/3) || softmax(s_i/3))            (5)
             (adv_type masked; kl: without [.]; kd: minus eq. (8); js, js_cu: CuDFKD, ADI)
     L_rel = mean_i -log softmax([a_i.k_i, ring_i] / tau)_0,  a = f_t/|f_t|, k = f_s/|f_s|       (6)
     ring_i: a_i's products with a queue of the last N_neg keys k, in ascending order, from
             h*N_neg to (h + length)*N_neg, rounded down; h: 0 (easy) to 1 - length (hard),
             linear from begin_fraction to end_fraction of the epochs                            (7)
     The keys carry no gradient; afterwards they take the place of the oldest ones in the queue.
  2. kd_steps times: new images of G, now in eval mode; one SGD step of S, in train mode, on
     l_i   = kd_i + s_nce*L_nce,  kd = T^2 KL(softmax(t/T) || softmax(s/T)), or mean |s - t|     (8)
     L_nce = mean_i -log softmax(F_t F_s' / tau)_ii   rows of unit features, T's the anchors     (9)
     L_S   = mean_i v_i l_i,  v = (1 + e^-lam) / (1 + e^(l - lam)) without gradient             (10)
     lam   = lambda_0 + rate * (student steps so far),  rate 1e-4 for CIFAR-10, else 2e-5       (11)
After each epoch: adv += grad_adv, from begin_fraction of the epochs on until end_fraction      (12)

Baselines are the same loop with other terms: --preset cudfkd, dafl, zskt, dfq. adi (DeepInversion)
and cmi make their images in their own way, eqs. (13) - (15): see the end of the file.

Symbols  T -> teacher (temperature: args.T), S -> student, G -> generator, l -> rows, k -> keys,
         ring -> ring_of, h -> hard_at, kd -> kd_rows, v -> self_paced

Deviations from the published code
  D1 the result is the last epoch, the best test epoch beside it; its is the best of many runs
  D2 its queue asserts N_neg % batch = 0, which its own example breaks; here the write wraps around
  D3 its --curr_option none drops L_nce too; here it stays
  D4 kept: f_s is mapped to f_t's width by a random linear layer, new at every call, then to unit
  D5 kept: curr_level batch: l is the mean, one v; sample: one v_i an image, as each row had it
  D6 pools of images are a ring of 51,200 on the device, drawn with replacement, not files
  D7 a local view of CMI that does not fit is cut to the image, not drawn again

Measured: CIFAR-10, ResNet-20 (91.73 %) -> WRN-16-1, preset small, one seed each (n = 1, so without
a standard error): 67.65 %; without balance 63.32, without L_adv too 58.00. small_dfq, which has no
relations, 69.87; small_cudfkd 59.47, small_cmi 33.15, small_dafl 18.65, small_adi 18.01, small_zskt
11.60. Preset demo, on shapes: 76.6 (n = 1). Published: CIFAR-100 WRN-40-2 -> WRN-16-2 67.54, the
largest of 42 runs (their mean: 66.79).

  python adadfkd.py --smoke                                 # the whole pipeline in a minute
  python adadfkd.py                                         # CIFAR-100, WRN-40-2 -> WRN-16-2
  python adadfkd.py --preset dfq --dataset cifar10 --teacher resnet34 --student resnet18
"""
import contextlib
import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    ChannelStatistics, CommonArgs, Run, autocast, build_model, cli, evaluate, fail, flag,
    get_teacher, has_statistics, load_data, quantize, with_features)


@dataclass
class Args(CommonArgs):
    """The defaults are the published row of CIFAR-100, WRN-40-2 -> WRN-16-2."""
    dataset: str = flag("cifar100", "cifar10, cifar100, tiny_imagenet, shapes, or your own folder")
    teacher: str = flag("wrn40_2", "network: a name in MODELS, or file.py:callable")
    student: str = flag("wrn16_2", "network: a name in MODELS, or file.py:callable")
    epochs: int = flag(500, "length of the run and of all its schedules", low=1)
    batch_size: int = flag(1024, "images per student step", low=1)
    lr: float = flag(0.1, "peak learning rate of the student, cosine per epoch")
    ep_steps: int = flag(400, "student steps per epoch", low=1)
    kd_steps: int = flag(10, "student steps after each making of images", low=1)
    T: float = flag(2.0, "temperature of eqs. (2) and (8); higher = softer", low=1e-6)
    loss: Literal["kl", "l1"] = flag("kl", "eq. (8)")
    # step 1: the images
    synthesis: Literal["generator", "adi", "cmi"] = flag("generator", "who makes the images")
    synthesis_batch_size: int = flag(0, "images made at once; 0 = batch_size")
    g_steps: int = flag(1, "steps of step 1: of G; adi: on the pixels; cmi: on z and G", low=1)
    lr_g: float = flag(1e-3, "learning rate of those steps")
    betas_g: tuple[float, ...] = flag((0.9, 0.99), "the two betas of G's Adam")
    nz: int = flag(0, "size of z; 0 = 512 for 32 pixels, 1024 for 64")
    ngf: int = flag(64, "width of the generator", low=1)
    init_g: Literal["normal", "default"] = flag("normal", "G begins as N(0, 0.02), or as in torch")
    lmda_ent: float = flag(-20.0, "weight of H_T; negative = images of all classes", low=-math.inf)
    balance: float = flag(0.0, "weight of -H_1: the same, at temperature 1")
    oh: float = flag(1.0, "weight of L_oh: images of which the teacher is sure")
    act: float = flag(0.0, "weight of L_act: images with large features")
    bn: float = flag(1.0, "weight of L_bn: images with the statistics of the teacher's data")
    adv: float = flag(0.0, "weight of L_adv in the first epoch: images on which the student errs")
    grad_adv: float = flag(0.095, "growth of adv per epoch, eq. (12)")
    adv_type: Literal["masked", "kl", "js", "js_cu", "kd"] = flag(
        "masked", "L_adv: eq. (5); kl: without its mask; js: 1 - J; js_cu: -J; kd: minus eq. (8)")
    begin_fraction: float = flag(0.2, "share of the epochs after which h and adv begin to grow")
    end_fraction: float = flag(0.8, "share of the epochs after which they stay")
    # the relations
    hard: float = flag(0.1, "weight of L_rel in step 1; 0 = off")
    s_nce: float = flag(0.15, "weight of L_nce in step 2; 0 = off")
    tau: float = flag(0.07, "temperature of both; lower = only the most alike count", low=1e-6)
    N_neg: int = flag(16384, "keys in the queue", low=1)
    length: float = flag(0.8, "width of the ring, as a share of the queue; 1 = all of it, always")
    # step 2: the student
    curr_option: Literal["curr_log", "none"] = flag("curr_log", "v of eq. (10), or none: v = 1")
    curr_level: Literal["batch", "sample"] = flag("batch", "D5: one v per batch, or one per image")
    lambda_0: float = flag(1.2, "threshold of v at the first step, eq. (11)")
    memory: bool = flag(False, "S learns from a pool of all images so far, cropped and flipped")
    # the baselines adi and cmi
    tv: float = flag(1e-3, "adi: weight of the total variation")
    cr: float = flag(0.8, "cmi: weight of the contrast between images")


ROWS = {  # the published rows; per image or per batch, as the code was when the cell appeared
    ("cifar10", "resnet34", "resnet18"): dict(
        batch_size=768, epochs=250, T=20.0, loss="kl", adv=1.0, grad_adv=0.0, begin_fraction=0.2,
        end_fraction=0.75, lambda_0=2.3, length=0.85, s_nce=0.2, N_neg=6144, curr_level="batch"),
    ("cifar10", "vgg11", "resnet18"): dict(
        batch_size=1024, epochs=300, T=20.0, loss="kl", adv=1.0, grad_adv=0.0, begin_fraction=0.25,
        end_fraction=0.75, lambda_0=2.3, length=1.0, s_nce=0.2, N_neg=6144, curr_level="sample"),
    ("cifar10", "wrn40_2", "wrn40_1"): dict(
        batch_size=1024, epochs=250, T=20.0, loss="kl", adv=1.0, grad_adv=0.0, begin_fraction=0.25,
        end_fraction=0.75, lambda_0=1.3, length=1.0, s_nce=0.2, N_neg=6144, curr_level="sample"),
    ("cifar10", "wrn40_2", "wrn16_2"): dict(
        batch_size=1024, epochs=300, T=20.0, loss="kl", adv=1.0, grad_adv=0.0, begin_fraction=0.0,
        end_fraction=0.75, lambda_0=1.5, length=0.9, s_nce=0.05, N_neg=49152, curr_level="sample"),
    ("cifar10", "wrn40_2", "wrn16_1"): dict(
        batch_size=1024, epochs=300, T=20.0, loss="kl", adv=1.0, grad_adv=0.0, begin_fraction=0.0,
        end_fraction=0.75, lambda_0=1.5, length=0.9, s_nce=0.05, N_neg=8192, curr_level="sample"),
    ("cifar100", "resnet34", "resnet18"): dict(
        batch_size=768, epochs=700, T=5.0, loss="l1", adv=0.0, grad_adv=0.0, begin_fraction=0.2,
        end_fraction=0.8, lambda_0=1.2, length=0.65, s_nce=0.1, N_neg=24576, curr_level="batch"),
    ("cifar100", "vgg11", "resnet18"): dict(
        batch_size=1024, epochs=400, T=5.0, loss="l1", adv=1.0, grad_adv=0.0, begin_fraction=0.2,
        end_fraction=0.8, lambda_0=1.0, length=0.8, s_nce=0.1, N_neg=12288, curr_level="batch"),
    ("cifar100", "wrn40_2", "wrn40_1"): dict(
        batch_size=1024, epochs=500, T=2.0, loss="kl", adv=0.0, grad_adv=0.09, begin_fraction=0.2,
        end_fraction=0.8, lambda_0=1.2, length=0.71, s_nce=0.1, N_neg=16384, curr_level="batch"),
    ("cifar100", "wrn40_2", "wrn16_2"): dict(
        batch_size=1024, epochs=500, T=2.0, loss="kl", adv=0.0, grad_adv=0.095, begin_fraction=0.2,
        end_fraction=0.8, lambda_0=1.2, length=0.8, s_nce=0.15, N_neg=16384, curr_level="batch"),
    ("tiny_imagenet", "resnet50_tiny", "resnet18_tiny"): dict(
        batch_size=64, synthesis_batch_size=128, epochs=500, T=5.0, loss="l1", adv=1.0,
        grad_adv=0.0, begin_fraction=0.2, end_fraction=0.75, lambda_0=1.3, length=0.81, hard=0.05,
        s_nce=0.02, N_neg=16384, curr_level="batch"),
}

# what the baselines are, at any size
CUDFKD = dict(hard=0.0, s_nce=0.0, memory=False)
OTHERS = dict(CUDFKD, lmda_ent=0.0, curr_option="none", grad_adv=0.0)
DAFL = dict(OTHERS, nz=512, init_g="default", balance=20.0, act=1e-3, bn=0.0)
ZSKT = dict(OTHERS, nz=256, init_g="default", oh=0.0, bn=0.0, adv=1.0, adv_type="kd")
DFQ = dict(OTHERS, nz=256, init_g="default", balance=20.0, adv=1.0, adv_type="kd")
ADI = dict(OTHERS, synthesis="adi", bn=10.0, adv=1.0, lr_g=0.1)
CMI = dict(OTHERS, synthesis="cmi", nz=256, adv=0.5, lr_g=1e-3)

# their columns of the table are those of CMI's authors, made by this protocol
PROTOCOL = dict(batch_size=256, epochs=200, lr=0.1, betas_g=(0.5, 0.999), loss="kl", T=1.0)

# CuDFKD's rows are this project's own
CUDFKD_RESNET = dict(
    CUDFKD, batch_size=512, epochs=250, T=20.0, loss="l1", adv=0.0, grad_adv=0.5, lambda_0=2.0,
    begin_fraction=0.25, end_fraction=0.75)
CUDFKD_WRN = dict(
    CUDFKD, batch_size=1024, epochs=250, T=20.0, loss="kl", adv=1.0, grad_adv=0.0, lambda_0=2.0,
    begin_fraction=0.25, end_fraction=0.75, memory=True)
CUDFKD_RESNET_100 = dict(
    CUDFKD, batch_size=768, epochs=300, T=5.0, loss="l1", adv=1.0, grad_adv=0.0, lambda_0=1.0,
    begin_fraction=0.2, end_fraction=0.8, memory=True)
CUDFKD_WRN_100 = dict(
    CUDFKD, batch_size=1024, epochs=300, T=2.0, loss="kl", adv=0.0, grad_adv=0.15, lambda_0=1.0,
    begin_fraction=0.2, end_fraction=0.75)
CUDFKD_TINY = dict(
    CUDFKD, batch_size=128, epochs=400, T=5.0, loss="l1", adv=1.0, grad_adv=0.1, lambda_0=1.5,
    begin_fraction=0.2, end_fraction=0.75)

# about 25 minutes on one core of a CPU; the published settings do not learn there
BUDGET = dict(
    batch_size=64, epochs=30, ep_steps=300, ngf=32, lr=0.03, lr_g=2e-3, loss="kl", T=20.0,
    curr_option="none", grad_adv=0.0, begin_fraction=0.25, end_fraction=0.75)
RELATION = dict(BUDGET, s_nce=0.1, length=0.9, N_neg=1024)
SMALL = dict(RELATION, adv=1.0, adv_type="kd", balance=20.0)

PRESETS = {  # "*": always; (dataset, teacher, student): for that pair
    "auto": ROWS,
    "small": {"*": SMALL},  # what auto takes for a pair without a row
    "cudfkd": {
        "*": CUDFKD_WRN,
        ("cifar10", "resnet34", "resnet18"): CUDFKD_RESNET,
        ("cifar10", "vgg11", "resnet18"): CUDFKD_RESNET,
        ("cifar100", "resnet34", "resnet18"): CUDFKD_RESNET_100,
        ("cifar100", "vgg11", "resnet18"): CUDFKD_RESNET_100,
        ("cifar100", "wrn40_2", "wrn40_1"): CUDFKD_WRN_100,
        ("cifar100", "wrn40_2", "wrn16_2"): CUDFKD_WRN_100,
        ("tiny_imagenet", "resnet50_tiny", "resnet18_tiny"): CUDFKD_TINY,
    },
    "dafl": {"*": dict(PROTOCOL, **DAFL, kd_steps=5)},
    "zskt": {"*": dict(PROTOCOL, **ZSKT, kd_steps=5)},
    "dfq": {
        "*": dict(PROTOCOL, **DFQ),
        ("cifar10", "resnet34", "resnet18"): dict(lr=0.05),
        ("cifar100", "resnet34", "resnet18"): dict(lr=0.05),
    },
    "adi": {"*": {**PROTOCOL, **ADI, "T": 20.0, "g_steps": 1000, "kd_steps": 400}},
    "cmi": {"*": {**PROTOCOL, **CMI, "T": 20.0, "g_steps": 200, "kd_steps": 400,
                  "synthesis_batch_size": 512}},
    "small_cudfkd": {"*": {**BUDGET, **CUDFKD}},
    "small_dafl": {"*": {**BUDGET, **DAFL}},
    "small_zskt": {"*": {**BUDGET, **ZSKT}},
    "small_dfq": {"*": {**BUDGET, **DFQ}},
    "small_adi": {"*": {**BUDGET, **ADI, "epochs": 21, "ep_steps": 200, "kd_steps": 200,
                        "g_steps": 100, "synthesis_batch_size": 128}},
    "small_cmi": {"*": {**BUDGET, **CMI, "epochs": 10, "ep_steps": 250, "kd_steps": 250,
                        "g_steps": 70, "synthesis_batch_size": 128}},
    "demo": {"*": {**RELATION, "dataset": "shapes", "teacher": "resnet20", "student": "resnet8",
                   "epochs": 6, "ep_steps": 100, "kd_steps": 5, "g_steps": 4, "batch_size": 32,
                   "ngf": 16, "T": 4.0, "lr": 0.02, "lr_g": 1e-3, "memory": True,
                   "eval_every": 2}},
    "smoke": {"*": dict(
        dataset="shapes", teacher="resnet8", student="resnet8", limit_train=300, epochs=2,
        ep_steps=8, kd_steps=4, g_steps=2, batch_size=16, synthesis_batch_size=16, ngf=8,
        N_neg=64)},
}


# ------------------------------------------------------------------------------- the generator

class UpConv(nn.Conv2d):
    """Nearest x2 up-sampling and then a 3x3 convolution, as one transposed 4x4 of stride 2.

    Up-sampling repeats each pixel, so the taps of the kernel that meet the same pixel are added
    first: the same sums from 2.25 times fewer products.
    """

    def forward(self, x):
        flipped = F.pad(self.weight.flip(2, 3), (1, 1, 1, 1))
        taps = 4 * F.avg_pool2d(flipped, 2, stride=1)  # sums of 2x2 neighbours, (out, in, 4, 4)
        return F.conv_transpose2d(x, taps.transpose(0, 1), self.bias, stride=2, padding=1)


def decoder(widths):
    """(B, widths[0], side, side) -> images; each further width doubles the side."""
    layers = [nn.BatchNorm2d(widths[0])]
    for c_in, c_out in zip(widths, widths[1:]):
        layers.append(nn.Identity())  # the up-sampling of the published code, for its key names
        layers.append(UpConv(c_in, c_out, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(c_out))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    layers.append(nn.Conv2d(widths[-1], 3, 3, padding=1))
    layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """z (B, nz) -> images (B, 3, size, size) in [0, 1]."""

    def __init__(self, nz, widths, size):
        super().__init__()
        self.side = size // 2 ** (len(widths) - 1)
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(nz, widths[0] * self.side ** 2))
        self.main = decoder(widths)

    def forward(self, z):
        x = self.project(z).view(len(z), -1, self.side, self.side)
        return self.main(x.contiguous(memory_format=torch.channels_last))


def init_normal(net):
    """Weights N(0, 0.02), those of batch norms N(1, 0.02), biases 0."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            mean = 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0
            nn.init.normal_(m.weight, mean, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net


# ----------------------------------------------------------- the relations: queue, ring, losses

class Recent:
    """The last `capacity` rows of all that was added, on the device; the oldest are overwritten."""

    def __init__(self, capacity, shape, device, dtype=torch.float32):
        self.storage = torch.zeros(capacity, *shape, dtype=dtype, device=device)
        self.added = 0

    def rows(self):
        return self.storage[:self.added]

    def add(self, rows):
        place = torch.arange(self.added, self.added + len(rows), device=rows.device)
        self.storage[place % len(self.storage)] = rows  # D2
        self.added += len(rows)

    def state_dict(self):
        return {"rows": self.rows().clone(), "added": self.added}  # no view: it would save all

    def load_state_dict(self, state):
        self.storage[:len(state["rows"])] = state["rows"]
        self.added = state["added"]


def new_queue(n, width, rng):
    """The keys: unit features of the student, of the last n images. Nothing was seen yet: noise."""
    queue = Recent(n, (width,), rng.device)
    noise = torch.randn(n, width, generator=rng, device=rng.device)
    queue.add(F.normalize(noise))
    return queue


def ring_of(similarity, window):
    """Eq. (7): of each row of (B, N_neg) only ranks start to stop stay, all others become -inf.

    Two k-th values bound the ring, nothing is sorted. Equal values at a border all stay.
    """
    start, stop = window
    values = similarity.detach()
    if start == stop:
        return torch.full_like(similarity, -math.inf)
    ring = similarity
    if start > 0:
        lowest = values.kthvalue(start + 1, dim=1, keepdim=True).values
        ring = ring.masked_fill(values < lowest, -math.inf)
    if stop < similarity.shape[1]:
        highest = values.kthvalue(stop, dim=1, keepdim=True).values
        ring = ring.masked_fill(values > highest, -math.inf)
    return ring


def ring_loss(t_feat, s_feat, negatives, window, tau):
    """Eq. (6) against the queue's keys (N_neg, D) -> the loss, and the new keys (B, D)."""
    anchors = F.normalize(t_feat)
    keys = F.normalize(s_feat.detach())
    positive = (anchors * keys).sum(1, keepdim=True)  # (B, 1)
    ring = ring_of(anchors @ negatives.T, window)  # (B, N_neg)
    logits = torch.cat([positive, ring], 1) / tau
    return (logits.logsumexp(1) - logits[:, 0]).mean(), keys  # eq. (6)


def nce_loss(t_feat, s_feat, tau):
    """Eq. (9): which of the student's features belongs to the teacher's?"""
    similarity = F.normalize(t_feat) @ F.normalize(s_feat).T  # (B, B)
    diagonal = torch.arange(len(t_feat), device=t_feat.device)
    return F.cross_entropy(similarity / tau, diagonal)  # eq. (9)


def random_map(n_in, n_out, device):
    return nn.Linear(n_in, n_out, device=device).requires_grad_(False)


def match_width(s_feat, t_feat):
    """The student's features in the teacher's width."""
    n_in = s_feat.shape[1]
    n_out = t_feat.shape[1]
    if n_in == n_out:
        return s_feat
    return random_map(n_in, n_out, s_feat.device)(s_feat)  # D4


# ---------------------------------------------------------------------------- the other losses

def kl_rows(s_logits, t_logits, T):
    """T^2 KL(t || s) of each image, (B,)."""
    s_logp = F.log_softmax(s_logits / T, 1)
    t_logp = F.log_softmax(t_logits / T, 1)
    return T * T * F.kl_div(s_logp, t_logp, reduction="none", log_target=True).sum(1)


def kd_rows(s_logits, t_logits, loss, T):
    """kd of eq. (8), (B,)."""
    if loss == "kl":
        return kl_rows(s_logits, t_logits, T)
    return (s_logits - t_logits).abs().mean(1)


def masked_kl(s_logits, t_logits, T):
    """Minus eq. (5): only images that both put into one class count; the mean is over all."""
    agree = s_logits.argmax(1) == t_logits.argmax(1)
    return (agree * kl_rows(s_logits, t_logits, T)).mean()


def js_divergence(s_logits, t_logits, T=3.0):
    """J: half the KL of M to P plus that of M to Q, each clamped, as published. Mean over batch."""
    p = F.softmax(s_logits / T, 1)
    q = F.softmax(t_logits / T, 1)
    m = ((p + q) / 2).clamp(0.01, 0.99)
    p = p.clamp(0.01, 0.99)
    q = q.clamp(0.01, 0.99)
    rows = m * (2 * m.log() - p.log() - q.log())
    return rows.sum(1).mean() / 2


def adv_loss(s_logits, t_logits, kind, loss="kl", T=1.0):
    """L_adv: the smaller, the further the student is from the teacher; gradient into both."""
    if kind == "masked":
        return -masked_kl(s_logits, t_logits, T=3.0)  # eq. (5)
    if kind == "kl":
        return -kl_rows(s_logits, t_logits, T=3.0).mean()
    if kind == "js":
        return 1 - js_divergence(s_logits, t_logits).clamp(0, 1)
    if kind == "js_cu":
        return -js_divergence(s_logits, t_logits)  # no clamp: it would cut off the gradient
    return -kd_rows(s_logits, t_logits, loss, T).mean()


def entropy(t_logits, T):
    """Eq. (2): of the batch mean of the class probabilities."""
    p = F.softmax(t_logits / T, 1).mean(0).clamp(min=1e-30)
    return -(p * p.log()).sum()


def bn_layers(net):
    return [m for m in net.modules() if has_statistics(m)]


def bn_distance(bn, h):
    """Eq. (4) of one batch norm and its input h."""
    stored = torch.stack([bn.running_mean, bn.running_var])
    now = ChannelStatistics.apply(h)  # (2, channels): mean, biased variance
    return (now - stored).norm(dim=1).sum()


@contextlib.contextmanager
def watch(layers, statistic):
    """While open, each pass appends statistic(layer, its input) of these layers to a list."""
    seen = []

    def hook(layer, inputs):
        seen.append(statistic(layer, inputs[0]))

    hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def self_paced(rows, lam):
    """v of eq. (10): about 1 far below lam, falling to 0 above it."""
    return (1 + math.exp(-lam)) * torch.sigmoid(lam - rows)  # 1 / (1 + e^x) = sigmoid(-x)


# ------------------------------------------------------------------------------- the schedules

def hard_at(epoch, args):
    """h of eq. (7): 0 before begin_fraction, 1 - length from end_fraction on."""
    begin = int(args.begin_fraction * args.epochs)
    span = int(args.epochs * (args.end_fraction - args.begin_fraction))
    h = (1 - args.length) * (epoch - begin) / max(span, 1)
    return min(max(h, 0), 1 - args.length)


def window_at(h, args):
    """The ring's ranks in the queue, from and up to."""
    return int(h * args.N_neg), int((h + args.length) * args.N_neg)


def adv_at(epoch, args):
    """Eq. (12), set at the end of the epoch before; as published, without v it jumps at the end."""
    begin = int(args.begin_fraction * args.epochs)
    end = int(args.end_fraction * args.epochs)
    grown = min(epoch - 1, end) - begin
    if grown <= 0 or (args.curr_option == "none" and epoch - 1 < end):
        return args.adv
    return args.adv + grown * args.grad_adv  # eq. (12)


def lr_at(epoch, peak, epochs):
    return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2


def lam_at(step, lambda_0, dataset):
    rate = 1e-4 if dataset == "cifar10" else 2e-5
    return lambda_0 + rate * step  # eq. (11)


# ----------------------------------------------------------------------------------- the steps

@dataclass
class Scene:
    """What every step looks at."""
    teacher: nn.Module
    student: nn.Module
    data: object
    rng: torch.Generator
    args: Args


def look(net, x, amp):
    """Logits and features of normalised images, in float32 whatever the network runs in."""
    with autocast(x.device, amp):
        logits, feat = with_features(net, x)
    return logits.float(), feat.float()


def generator_terms(x, queue, window, weights, scene):
    """The terms of eq. (1) that have a weight, by name, and the new keys for the queue."""
    args = scene.args
    terms = {}
    keys = None
    v = scene.data.normalize(x)

    # what the teacher says of the images
    norms = bn_layers(scene.teacher) if weights["bn"] else []
    with watch(norms, bn_distance) as distances:
        t_logits, t_feat = look(scene.teacher, v, args.amp)
    if weights["ent"]:
        terms["ent"] = entropy(t_logits, args.T)  # eq. (2)
    if weights["balance"]:
        terms["balance"] = -entropy(t_logits, 1.0)
    if weights["oh"]:
        terms["oh"] = F.cross_entropy(t_logits, t_logits.argmax(1))  # eq. (3)
    if weights["act"]:
        terms["act"] = -t_feat.abs().mean()  # eq. (3)
    if weights["bn"]:
        terms["bn"] = torch.stack(distances).sum()  # eq. (4)

    # how the student relates to it
    if weights["adv"] or weights["rel"]:
        s_logits, s_feat = look(scene.student, v, args.amp)
    if weights["adv"]:
        terms["adv"] = adv_loss(s_logits, t_logits, args.adv_type, args.loss, args.T)  # eq. (5)
    if weights["rel"]:
        s_feat = match_width(s_feat, t_feat)
        terms["rel"], keys = ring_loss(t_feat, s_feat, queue.rows(), window, args.tau)
    return terms, keys


def make_images(generator, adam, z, queue, window, adv, scene):
    """Step 1: one Adam step of G for each batch of z (n, B, nz) -> all images, the last terms."""
    args = scene.args
    weights = dict(
        ent=args.lmda_ent, balance=args.balance, oh=args.oh, act=args.act, bn=args.bn, adv=adv,
        rel=args.hard)
    made = []
    for noise in z:
        with autocast(noise.device, args.amp):
            x = generator(noise)
        x = x.float()
        terms, keys = generator_terms(x, queue, window, weights, scene)
        loss = sum(weights[name] * term for name, term in terms.items())  # eq. (1)

        adam.zero_grad()
        loss.backward()
        adam.step()
        if keys is not None:
            queue.add(keys)
        made.append(x.detach())

    terms["total"] = loss
    return torch.cat(made), {f"g_{name}": term.detach() for name, term in terms.items()}


@torch.no_grad()
def fresh_batches(generator, z, scene):
    """For z (n, B, nz): n batches of (normalised images, t_logits, t_feat).

    G and T are in eval mode and treat each image by itself, so on a GPU several batches are made
    in one pass.
    """
    amp = scene.args.amp
    batch_size = z.shape[1]
    at_once = 1
    if z.device.type != "cpu":
        pixels = batch_size * scene.data.image_size ** 2
        at_once = max(1, 2 ** 21 // pixels)  # 2,048 images of 32 pixels: memory
    for part in z.split(at_once):
        with autocast(z.device, amp):
            x = generator(part.flatten(0, 1))
        x = scene.data.normalize(x.float())
        t_logits, t_feat = look(scene.teacher, x, amp)
        yield from zip(x.split(batch_size), t_logits.split(batch_size), t_feat.split(batch_size))


@torch.no_grad()
def pool_batches(pool, scene):
    """kd_steps batches of the pool, cropped and flipped: (images, t_logits, t_feat)."""
    args = scene.args
    images = pool.rows()
    for _ in range(args.kd_steps):
        index = torch.randint(
            len(images), (args.batch_size,), generator=scene.rng, device=images.device)  # D6
        x = scene.data.augment(images[index], scene.rng)
        t_logits, t_feat = look(scene.teacher, x, args.amp)
        yield x, t_logits, t_feat


def student_step(net, optimizer, batch, lam, scene):
    """Step 2: one SGD step of the student -> its terms by name."""
    args = scene.args
    x, t_logits, t_feat = batch
    s_logits, s_feat = look(net, x, args.amp)
    rows = kd_rows(s_logits, t_logits, args.loss, args.T)
    terms = {"kd": rows.mean()}
    if args.s_nce:  # D3: with or without v
        s_feat = match_width(s_feat, t_feat)
        terms["nce"] = nce_loss(t_feat, s_feat, args.tau)
        rows = rows + args.s_nce * terms["nce"]  # eq. (8)
    if args.curr_level == "batch":  # D5
        rows = rows.mean(0, keepdim=True)
    v = torch.ones_like(rows)
    if args.curr_option == "curr_log":
        v = self_paced(rows.detach(), lam)
    loss = (v * rows).mean()  # eq. (10)

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    weight = v + 1e-30  # defined where all v are 0
    terms["difficulty"] = (weight * rows).sum() / weight.sum()
    terms["v"] = v.mean()
    terms["loss"] = loss
    return {name: term.detach() for name, term in terms.items()}


# ---------------------------------------------------------------------------------------- main

FRAMEWORK_INIT = ("resnet18", "resnet34", "resnet50")  # published without a Kaiming start
POOL_SIZE = 51200  # D6


def choose_small(args):
    """A pair without a published row is run by the preset `small`."""
    pair = (args.dataset, args.teacher, args.student)
    if args.preset != "auto" or args.smoke or pair in ROWS:
        return
    args.preset = "small"
    for name, value in SMALL.items():
        if name not in args.typed:
            setattr(args, name, value)
    print(f"no published row for {' '.join(pair)}: preset small", flush=True)


def check(args):
    size = args.synthesis_batch_size
    weights = (args.lmda_ent, args.balance, args.oh, args.act, args.bn, args.adv, args.hard)
    if args.kd_steps > args.ep_steps:
        fail(f"--kd_steps {args.kd_steps}: give at most --ep_steps, {args.ep_steps}")
    if not args.begin_fraction <= args.end_fraction <= 1:
        fail(f"--begin_fraction {args.begin_fraction} --end_fraction {args.end_fraction}: give "
             "begin <= end <= 1")
    if not 0 < args.length <= 1:
        fail(f"--length {args.length}: a share of the queue, more than 0 and at most 1")
    if args.hard and size > args.N_neg:
        fail(f"--N_neg {args.N_neg}: the queue must hold a batch of {size}; or give --hard 0")
    if not any(weights):
        fail("all weights of eq. (1) are 0: the generator has nothing to learn; give --bn 1")


def build_student(args, data):
    init = "default" if args.student in FRAMEWORK_INIT else "kaiming"
    student = build_model(args.student, data.num_classes, data.image_size, init)
    if args.student in ("resnet18_tiny", "resnet34_tiny", "resnet50_tiny"):
        student.conv1.reset_parameters()  # published so
    return student.to(data.device, memory_format=torch.channels_last)


def build_generator(args, data):
    widths = (4 * args.ngf, 2 * args.ngf, args.ngf)
    if data.image_size >= 64:
        widths = (8 * args.ngf, *widths)
    generator = Generator(args.nz, widths, data.image_size)
    if args.init_g == "normal":
        init_normal(generator)
    return generator.to(data.device, memory_format=torch.channels_last)


@torch.no_grad()
def show(run, epoch, images, scene):
    """samples/: the last made images, sorted by the class that the teacher sees in them."""
    images = images[-100:]
    t_logits, _ = look(scene.teacher, scene.data.normalize(images), scene.args.amp)
    classes, order = t_logits.argmax(1).sort()
    words = [scene.data.classes[c] for c in classes.tolist()]  # sync
    run.grid(f"epoch{epoch + 1:03d}", images[order], 10, words)


def main(args):
    choose_small(args)
    args.synthesis_batch_size = args.synthesis_batch_size or args.batch_size
    check(args)
    run = Run(args)
    torch.backends.cudnn.benchmark = True
    data = load_data(args, run.device)
    teacher = get_teacher(args, data)
    if args.bn and not bn_layers(teacher):
        fail(f"the teacher {args.teacher} has no batch norm for eq. (4); choose another, or --bn 0")
    args.nz = args.nz or 16 * data.image_size
    student = build_student(args, data)
    fused = run.device.type == "cuda"
    optimizer = torch.optim.SGD(
        student.parameters(), args.lr, 0.9, weight_decay=1e-4, fused=fused)
    parts = dict(student=student, optimizer=optimizer)
    generator = queue = pool = contrast = None
    if args.synthesis == "generator":
        generator = build_generator(args, data)
        adam = torch.optim.Adam(generator.parameters(), args.lr_g, args.betas_g, fused=fused)
        _, t_feat = look(teacher, data.normalize(data.test_x[:2]), args.amp)
        queue = new_queue(args.N_neg if args.hard else 1, t_feat.shape[1], run.rng)
        parts.update(generator=generator, adam=adam, queue=queue)
    if args.synthesis == "cmi":
        contrast = make_contrast(args, data, teacher)
        parts.update(head=contrast.head, head_adam=contrast.adam, bank=contrast.bank)
    if args.memory or args.synthesis != "generator":
        image_shape = (3, data.image_size, data.image_size)
        pool = Recent(POOL_SIZE, image_shape, run.device, torch.uint8)
        parts.update(pool=pool)
    scene = Scene(teacher, student, data, run.rng, args)
    net = torch.compile(student) if args.compile else student
    size = args.synthesis_batch_size
    rounds = args.ep_steps // args.kd_steps
    draw = dict(generator=run.rng, device=run.device)
    start = run.begin(data, teacher, **parts)

    for epoch in range(start, args.epochs):
        lr = lr_at(epoch, args.lr, args.epochs)
        optimizer.param_groups[0]["lr"] = lr
        h = hard_at(epoch, args)
        window = window_at(h, args)  # eq. (7)
        adv = adv_at(epoch, args)  # step 3, eq. (12)
        v_sum = 0.0  # becomes a tensor on the device

        for r in run.steps(epoch, rounds):
            # step 1: images on which the student errs; it stands still
            student.eval().requires_grad_(False)
            with run.flops(f"images, adv {adv > 0}"):
                if generator:
                    generator.train()
                    z = torch.randn(args.g_steps, size, args.nz, **draw)
                    images, made = make_images(generator, adam, z, queue, window, adv, scene)
                    generator.eval()
                else:
                    y = torch.randint(data.num_classes, (size,), **draw).sort().values
                    if args.synthesis == "adi":
                        x = torch.randn(size, *image_shape, **draw)
                        images, made = make_images_adi(x, y, scene)
                    else:
                        z = torch.randn(size, args.nz, **draw)
                        images, made = make_images_cmi(z, y, contrast, scene)
            student.train().requires_grad_(True)

            # step 2: the student imitates the teacher
            if pool:
                pool.add(quantize(images))
                batches = pool_batches(pool, scene)
            else:
                z = torch.randn(args.kd_steps, args.batch_size, args.nz, **draw)
                batches = fresh_batches(generator, z, scene)
            with run.flops("student steps"):
                for i, batch in enumerate(batches):
                    step = (epoch * rounds + r) * args.kd_steps + i
                    lam = lam_at(step, args.lambda_0, data.name)  # eq. (11)
                    terms = student_step(net, optimizer, batch, lam, scene)
                    v_sum += terms["v"]
                    if step % args.log_every == 0:
                        run.log(step, epoch, **terms, **made, lam=lam, h=h, adv=adv, lr=lr)

        if v_sum < 1e-3 * rounds * args.kd_steps:  # sync
            print("warning: v was below 0.001 in this epoch, the student stands still; try "
                  "--curr_option none or a larger --lambda_0", flush=True)
        if run.due(epoch, args.save_every):
            show(run, epoch, images, scene)
        top1 = evaluate(student, data, args.amp) if run.due(epoch, args.eval_every) else None
        run.end_epoch(epoch, top1)  # D1

    per_round = size * (args.g_steps if generator else 1)
    if not pool:
        per_round += args.kd_steps * args.batch_size
    run.finish(student, real_images=0, made_images=args.epochs * rounds * per_round)


# ------------------------------------------------------- appendix: the baselines ADI and CMI
#
# ADI has no generator: it optimises the pixels x themselves, g_steps times, on
#   L    = oh*CE(t, y) + bn*L_bn - adv*J + tv*TV(x)         T and S see x rolled and flipped   (13)
# CMI optimises z and a new generator, g_steps times, and keeps the images of the lowest
#   L    = oh*CE(t, y) + bn*L_bn + adv*L_adv + cr*L_cr         L_adv at temperature 1          (14)
#   L_cr = mean_i -log softmax(H(local) H(global)' / 0.1)_ii   new images + kept ones          (15)
# Its features are channel means inside T, of two views of an image: the local one should be more
# like the global one of the same image than like those of other images, so no two are the same.

BANK_SIZE = 40960  # images whose features CMI keeps
BANK_DRAW = 4096  # of which each of its steps draws so many
CR_T = 0.1  # temperature of eq. (15)


def inversion_terms(v, y, scene):
    """Logits of both networks, and the terms that eqs. (13) and (14) share."""
    args = scene.args
    norms = bn_layers(scene.teacher) if args.bn else []
    with watch(norms, bn_distance) as distances, autocast(v.device, args.amp):
        t_logits = scene.teacher(v).float()
        s_logits = scene.student(v).float()
    terms = {"oh": args.oh * F.cross_entropy(t_logits, y)}
    if args.bn:
        terms["bn"] = args.bn * torch.stack(distances).sum()  # eq. (4)
    return s_logits, t_logits, terms


def total_variation(x):
    """Mean absolute differences of neighbours: right, down and both diagonals, summed."""
    right = x[..., :, 1:] - x[..., :, :-1]
    down = x[..., 1:, :] - x[..., :-1, :]
    diagonal = x[..., 1:, 1:] - x[..., :-1, :-1]
    other = x[..., 1:, :-1] - x[..., :-1, 1:]
    return sum(difference.abs().mean() for difference in (right, down, diagonal, other))


def roll_flip(x, dy, dx, flip):
    x = torch.roll(x, (dy, dx), (2, 3))
    return x.flip(3) if flip else x


def random_roll(x):
    """One shift of up to an eighth of the size and one flip for the whole batch."""
    reach = x.shape[-1] // 8
    dy = random.randint(-reach, reach)
    dx = random.randint(-reach, reach)
    return roll_flip(x, dy, dx, random.random() < 0.5)


def make_images_adi(x, y, scene):
    """Eq. (13): from normalised noise x -> the last images in [0, 1], first and last loss."""
    args, data = scene.args, scene.data
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    adam = torch.optim.Adam([x], args.lr_g, (0.5, 0.99))
    losses = []
    for _ in range(args.g_steps):
        s_logits, t_logits, terms = inversion_terms(random_roll(x), y, scene)
        terms["adv"] = args.adv * adv_loss(s_logits, t_logits, "js_cu")
        terms["tv"] = args.tv * total_variation(x)
        loss = sum(terms.values())  # eq. (13)

        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            x.copy_(data.normalize(data.denormalize(x)))  # to what images can have
        losses.append(loss.detach())
    return data.denormalize(x.detach()), {"g_first": losses[0], "g_last": losses[-1]}


def local_view(x, data, rng):
    """A random part of each image (area 1/4 to 1, aspect 3/4 to 4/3) in full size, maybe flipped.

    Bilinear: each row, and each column, of the result is a mean of two, so a matrix does it.
    """
    size = x.shape[-1]
    u = torch.rand(5, len(x), generator=rng, device=x.device)
    area = 0.25 + 0.75 * u[0]
    aspect = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    height = (area / aspect).sqrt().clamp(max=1)  # D7
    width = (area * aspect).sqrt().clamp(max=1)
    rows = resize_matrix(height, u[2], size)
    columns = resize_matrix(width, u[3], size)
    columns = torch.where(u[4, :, None, None] < 0.5, columns.flip(1), columns)
    part = rows[:, None] @ x @ columns[:, None].transpose(2, 3)
    return data.normalize(part)


def resize_matrix(share, place, size):
    """(B, size, size): each line interpolates in a part of `size` pixels."""
    pixels = torch.arange(size, device=share.device)
    start = (1 - share) * place * size
    source = start[:, None] + share[:, None] * (pixels + 0.5) - 0.5  # (B, size)
    source = source.clamp(0, size - 1)
    return (1 - (source[:, :, None] - pixels).abs()).clamp(min=0)


def feature_layers(teacher):
    """Whose inputs are CMI's features: four stages of ResNet-34 and -50, else every batch norm."""
    if teacher.arch.startswith(("resnet34", "resnet50")) and ".py:" not in teacher.arch:
        net = teacher.net
        return [net.layer1, net.layer2, net.layer3, net.layer4]
    return bn_layers(teacher)


def channel_means(layer, h):
    return h.mean((2, 3), dtype=torch.float32)


@dataclass
class Contrast:
    """What CMI keeps from call to call."""
    layers: list  # of the teacher
    head: nn.Module  # H
    adam: torch.optim.Optimizer  # H's
    bank: Recent  # (n, 2, D): features of the local and of the global view of earlier images


@torch.no_grad()
def make_contrast(args, data, teacher):
    layers = feature_layers(teacher)
    with watch(layers, channel_means) as seen, autocast(data.device, args.amp):
        teacher(data.normalize(data.test_x[:2]))
    width = torch.cat(seen, 1).shape[1]
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, 256))
    head.to(data.device)
    adam = torch.optim.Adam(head.parameters(), 1e-3)
    return Contrast(layers, head, adam, Recent(BANK_SIZE, (2, width), data.device))


def contrast_loss(local, whole, kept, head, T):
    """Eq. (15): mean over the new rows plus mean over the kept ones."""
    rows = F.normalize(head(torch.cat([local, kept[:, 0]])))
    with torch.no_grad():
        columns = F.normalize(head(torch.cat([whole, kept[:, 1]])))
    diagonal = torch.arange(len(rows), device=rows.device)
    losses = F.cross_entropy(rows @ columns.T / T, diagonal, reduction="none")  # eq. (15)
    loss = losses[:len(local)].mean()
    if len(kept):
        loss = loss + losses[len(local):].mean()
    return loss


def make_images_cmi(z, y, contrast, scene):
    """Eq. (14): from noise z and a new generator -> the best images, first and last loss."""
    args, data, rng = scene.args, scene.data, scene.rng
    widths = (2 * args.ngf, 2 * args.ngf, args.ngf)
    generator = init_normal(Generator(args.nz, widths, data.image_size))
    generator.to(z.device, memory_format=torch.channels_last)
    z = z.clone().requires_grad_()
    adam = torch.optim.Adam([*generator.parameters(), z], args.lr_g, (0.5, 0.999))
    lowest = torch.full((), math.inf, device=z.device)
    best = None
    losses = []
    for _ in range(args.g_steps):
        with autocast(z.device, args.amp):
            x = generator(z)
        x = x.float()

        # the teacher sees each image twice: nearly all of it, and a part of it
        with watch(contrast.layers, channel_means) as seen:
            s_logits, t_logits, terms = inversion_terms(data.augment(x, rng), y, scene)
        whole = torch.cat(seen, 1)
        with watch(contrast.layers, channel_means) as seen, autocast(z.device, args.amp):
            scene.teacher(local_view(x, data, rng))
        local = torch.cat(seen, 1)

        bank = contrast.bank.rows()
        drawn = torch.randperm(len(bank), generator=rng, device=z.device)[:BANK_DRAW]
        terms["adv"] = -args.adv * masked_kl(s_logits, t_logits, T=1.0)  # eq. (5), but at T = 1
        terms["cr"] = args.cr * contrast_loss(local, whole, bank[drawn], contrast.head, CR_T)
        loss = sum(terms.values())  # eq. (14)

        # keep what had the lowest loss, without asking the device which it was
        now = [x.detach(), local.detach(), whole.detach()]
        better = loss.detach() < lowest
        best = now if best is None else [torch.where(better, a, b) for a, b in zip(now, best)]
        lowest = torch.minimum(lowest, loss.detach())
        losses.append(loss.detach())

        adam.zero_grad()
        contrast.adam.zero_grad()
        loss.backward()
        adam.step()
        contrast.adam.step()

    images, local, whole = best
    contrast.bank.add(torch.stack([local, whole], 1))
    return images, {"g_first": losses[0], "g_last": losses[-1]}


if __name__ == "__main__":
    cli(main, Args, PRESETS)
