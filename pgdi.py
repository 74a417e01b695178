"""Distil a student from a teacher and a few labelled images per class, by inverting the teacher.

Why it works. A handful of images is too little to train a student, but the teacher carries traces
of all its data: each batch norm has stored mean and variance of what passed through it. An image
whose activations match them looks to the teacher like a training image; the search for such images
is called inversion. A generator that starts from what its earlier searches found (meta-learning)
needs ten steps where a search from noise needs thousands. Images found so drift to what is easy
for the teacher; the few real ones hold them back, since features and logits of both shall be alike.
The search also wants what the student gets wrong (the minus in eq. 5). All images gather in a
pool. From it and from the real images the student learns, in the beginning mostly from the latter.

PGDI: J. Wang, "Prior-Guided Deep Inversion for Few-Shot Knowledge Distillation". Its parent, here
preset fast: Fang et al., "Up to 100x Faster Data-Free Knowledge Distillation", arXiv 2112.06253.

Once, T sees the shots: logits l_s, features f_s (channel means of the input of each conv, side by
side), and p_c = mean over the shots of class c of softmax(l_s / 2). T is frozen, in eval mode.
Each epoch, counted from 0:
  1. copy the generator G into F; draw z ~ N(0, 1) and classes y
  2. take g_steps steps of a new Adam on F (rate lr_g, train mode) and z (lr_z), S in eval mode:
     x = F(z) in 0..1, v = random crop and flip, normalised, t = T(v), s = S(v), m_c: images of c
       L = bn L_bn + oh L_oh + adv L_adv + guidance_loss_w L_feat + logits_guidance_w L_log      (1)
       L_bn   = sum_l ||V_l - v_l|| + ||M_l - m_l||   l: batch norms of T, norm over channels    (2)
                v_l, m_l: biased variance and mean of the layer's input; from the second epoch on
                m_l <- (1 - bn_mmt) m_l + bn_mmt A_l, v_l alike; A_l: average of past epochs     (3)
       L_oh   = mean_i cross entropy of t_i and y_i                                              (4)
       L_adv  = -mean_i [argmax t_i = argmax s_i] KL(softmax t_i || softmax s_i)
                no gradient into t (but with preset fast); from epoch warmup - 1, one before 4   (5)
       L_feat = sum_c m_c MMD_c / sum_c m_c    D1; over the classes that have shots, (8) alike   (6)
       MMD_c  = max(0, mean k(x, x') + mean k(f, f') - 2 mean k(x, f)), over all pairs of class c;
                the first two without x = x', f = f' if class c has just m_c shots and m_c > 1
                k(a, b) = sum_s exp(-|a - b|^2 / 2 s^2), s in .1, 1, 5, 10; x, f: features       (7)
       L_log  = mean_i 0.997 KL(p_y || softmax(t_i / 2)) + 0.003 min_s |t_i - l_s|^2, s of y     (8)
  3. put the x of the lowest L into the pool, as floor(255 x). A_l <- bn_mmt A_l + (1 - bn_mmt) m_l
     with the last step's m_l before (3), at first A_l = m_l. One Adam step of G, with the rate
     g_steps lr_g, along the sum of the g_steps gradients of F (first-order MAML)                (9)
  4. from epoch warmup on, kd_steps SGD steps of S in train mode, on a batch of the pool (crop and
     flip) and R shots (as they are, classes in balance) in one pass, each part with its own mean
       L_kd = alpha mean KL_real + (1 - alpha) mean KL_pool, KL = T^2 KL(p_T || p_S) at T = 20  (10)
       alpha, R = b + (a - b) (1 + cos(pi epoch / E)) / 2, b from E on; R floor, at most shots  (11)
       rate of S: .001 lr + .999 lr (1 + cos(pi (epoch - warmup) / lr_tmax)) / 2

Symbols: T teacher (in eq. 10 args.T), S student, G generator, F fast, y targets, R n_real, x', f'
others; a, b: _initial, _final_stage; E mixed_distill_stop_epoch; betas of both Adams .5, .999

Deviations from the published code:
  D1 its features carry no gradient, so eq. (6) only sways which x is kept; the same here, but
     --feature_grad (presets described, small, demo) lets them move the images
  D2 it takes the shots of CIFAR-10 from CIFAR-100, and reads no Tiny-ImageNet; here: the data's own
  D3 it reports the best test epoch; here the last one, with the best beside it

Measured, top-1 of the last epoch: CIFAR-10, 10 shots, ResNet-20 (91.73) -> WRN-16-1, n = 1 each:
  small 74.04, small_fast 68.48, small_script 45.66, small_fewshot_kd 32.17; shapes, 5 shots,
  n = 1: demo 93.6, demo_fewshot_kd 22.0. Published rows: not run
  (there PGDI lies below fast in three cells, WRN-40-2 -> WRN-16-1: CIFAR-10 89.15 with 10 shots to
  89.29, CIFAR-100 53.65 and 53.97 with 5 and 10 shots to 54.02)

  python pgdi.py --smoke                              # the whole pipeline, no download
  python pgdi.py --dataset cifar100 --shots 5 --seed 2    # WRN-40-2 -> WRN-16-1, published 53.65
  python pgdi.py --preset described    # also fast (no real images), fewshot_kd (only them), long
"""
import contextlib
import math
import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    ChannelStatistics, CommonArgs, Run, autocast, build_model, cli, evaluate, fail, flag,
    get_teacher, has_statistics, load_data, quantize)


@dataclass
class Args(CommonArgs):
    dataset: str = flag("cifar100", "cifar10, cifar100, tiny_imagenet, shapes, or your own folder")
    teacher: str = flag("wrn40_2", "network: a name in MODELS, or file.py:callable")
    student: str = flag("wrn16_1", "network: a name in MODELS, or file.py:callable")
    method: Literal["PGDI"] = flag("PGDI", "changes nothing; the published command has it")
    shots: int = flag(5, "labelled images per class, chosen by --seed", "fewshot_n_per_class")
    epochs: int = flag(200, "rounds of synthesis and distillation", low=1)
    warmup: int = flag(20, "epochs that only fill the pool")
    kd_steps: int = flag(400, "student steps per epoch", low=1)
    batch_size: int = flag(256, "pool images per student step", low=1)
    lr: float = flag(0.2, "learning rate of the student after the warm-up")
    lr_tmax: int = flag(200, "epochs in which it falls by a cosine; --epochs may differ", low=1)
    momentum: float = flag(0.9, "momentum of the student's SGD")
    weight_decay: float = flag(1e-4, "weight decay of the student, on all parameters", "wd")
    T: float = flag(20.0, "temperature of distillation, eq. (10)", low=1e-6)
    # steps 1-3
    synthesis_batch_size: int = flag(512, "images made per epoch", low=1)
    g_steps: int = flag(10, "steps on generator and noise per epoch; 0 = make no images")
    lr_g: float = flag(5e-3, "learning rate of the generator's copy; its own is g_steps times that")
    lr_z: float = flag(0.015, "learning rate of the noise")
    ngf: int = flag(64, "width of the generator", low=1)
    bn: float = flag(5.0, "weight of the batch-norm statistics, eq. (2)")
    bn_mmt: float = flag(0.9, "share of the earlier epochs in them, eq. (3); 0 = none")
    oh: float = flag(0.001, "weight of the wanted class, eq. (4)")
    adv: float = flag(1.33, "weight of the student's disagreement, eq. (5)")
    adv_teacher_grad: bool = flag(False, "the gradient of eq. (5) passes through the teacher too")
    guidance_loss_w: float = flag(100.0, "weight of the shots' features, eq. (6)")
    feature_grad: bool = flag(False, "eq. (6) moves the images, as the paper describes (D1)")
    logits_guidance_w: float = flag(1.0, "weight of the shots' logits, eq. (8)")
    reset_l0: int = flag(200, "period in epochs of redrawing the generator's first layers")
    reset_bn: int = flag(200, "period of redrawing its batch norms; 0 = never")
    reset_once: int = flag(0, "redraw its first layers only before this epoch, counted from 1")
    # step 4
    alpha_initial: float = flag(0.9, "weight of the real images in epoch 0")
    alpha_final_stage: float = flag(0.2, "and at the end of the curriculum")
    real_fewshot_initial: int = flag(256, "real images per step in epoch 0, at most all shots")
    real_fewshot_final_stage: int = flag(8, "and at the end of the curriculum")
    mixed_distill_stop_epoch: int = flag(100, "end of the curriculum, eq. (11)", low=1)
    augment_real: bool = flag(False, "crop and flip the real images too")


FAST = dict(  # no real images, nothing drawn from the training split
    shots=0, guidance_loss_w=0.0, logits_guidance_w=0.0, alpha_initial=0.0, alpha_final_stage=0.0,
    real_fewshot_initial=0, real_fewshot_final_stage=0, epochs=220, synthesis_batch_size=256,
    bn=10.0, oh=0.4, adv=1.1, adv_teacher_grad=True, lr_z=0.01, lr_g=2e-3,
    reset_l0=0, reset_bn=0, reset_once=140)
FEWSHOT_KD = dict(  # real images only: the baseline
    g_steps=0, warmup=0, alpha_initial=1.0, alpha_final_stage=1.0, real_fewshot_final_stage=256,
    augment_real=True)
SMALL = dict(  # 25 minutes of one core
    dataset="cifar10", teacher="resnet20", student="wrn16_1", epochs=60, warmup=10, kd_steps=150,
    batch_size=64, lr=0.1, lr_tmax=50, synthesis_batch_size=128, ngf=32, eval_every=5)
SMALL_SHOTS = dict(shots=10, real_fewshot_initial=32, mixed_distill_stop_epoch=30)
PRESETS = {  # name: {"*": always, (dataset, teacher, student): for that pair}
    "auto": {},  # one script is published; its values, the defaults above, serve every pair
    "described": {"*": dict(feature_grad=True)},
    "long": {  # as in the first version of the published code
        "*": dict(epochs=800, mixed_distill_stop_epoch=300),
        ("cifar10", "resnet34", "resnet18"): dict(epochs=1200),
        ("cifar100", "resnet34", "resnet18"): dict(epochs=1200),
    },
    "fast": {
        "*": FAST,
        ("cifar10", "resnet34", "resnet18"): dict(adv=1.33, oh=0.5),
        ("cifar100", "resnet34", "resnet18"): dict(adv=1.33, oh=0.5),
        ("tiny_imagenet", "resnet34", "resnet18"): dict(adv=1.33, oh=0.5),
        ("cifar10", "vgg11", "resnet18"): dict(adv=1.0, oh=0.5),
        ("cifar100", "vgg11", "resnet18"): dict(adv=1.0, oh=0.5),
    },
    "fewshot_kd": {"*": FEWSHOT_KD},
    "small": {"*": dict(**SMALL, **SMALL_SHOTS, feature_grad=True)},
    "small_script": {"*": dict(**SMALL, **SMALL_SHOTS)},
    "small_fast": {"*": {**FAST, **SMALL}},
    "small_fewshot_kd": {"*": {**SMALL, **FEWSHOT_KD, "shots": 10, "lr_tmax": 60}},
    "demo": {"*": dict(
        dataset="shapes", teacher="resnet20", student="resnet8", epochs=13, warmup=3, kd_steps=50,
        batch_size=48, lr=0.1, lr_tmax=10, synthesis_batch_size=64, ngf=16, feature_grad=True,
        real_fewshot_initial=32, mixed_distill_stop_epoch=8, eval_every=4)},
    "demo_fewshot_kd": {"*": dict(
        **FEWSHOT_KD, dataset="shapes", teacher="resnet20", student="resnet8", epochs=4,
        kd_steps=50, lr=0.1, lr_tmax=4)},
    "smoke": {"*": dict(
        smoke=True, dataset="shapes", teacher="resnet8", student="resnet8", limit_train=300,
        epochs=2, warmup=1, kd_steps=4, batch_size=32, synthesis_batch_size=32, g_steps=2, ngf=8)},
}
FRAMEWORK_INIT = ("resnet18", "resnet34", "resnet50")  # published with torch's own first weights


class Generator(nn.Module):
    """z (B, nz) -> images (B, 3, size, size) in [0, 1]."""

    def __init__(self, nz=256, ngf=64, size=32):
        super().__init__()
        self.nz = nz
        self.side = size // 4
        self.l1 = nn.Sequential(nn.Linear(nz, 2 * ngf * self.side ** 2))
        self.conv_blocks = nn.Sequential(  # (B, 2 ngf, size / 4, size / 4)
            nn.BatchNorm2d(2 * ngf),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * ngf, 2 * ngf, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * ngf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * ngf, ngf, 3, padding=1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ngf, 3, 3, padding=1),
            nn.Sigmoid())

    def forward(self, z):
        x = self.l1(z).view(len(z), -1, self.side, self.side)
        return self.conv_blocks(x.contiguous(memory_format=torch.channels_last))


def reset(generator, args, epoch):
    """Redraw parts of G in some epochs, so that it does not settle; its Adam keeps its moments."""
    number = epoch + 1
    first_layers = number == args.reset_once
    if args.reset_l0 and number % args.reset_l0 == 0:
        first_layers = True
    if first_layers:
        for m in (generator.l1[0], generator.conv_blocks[0]):
            nn.init.normal_(m.weight, 0, 0.02)
            nn.init.zeros_(m.bias)

    if args.reset_bn and number % args.reset_bn == 0:
        for m in generator.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.02)
                nn.init.zeros_(m.bias)


# ------------------------------------------------- what the teacher shows of images, and of shots

@contextlib.contextmanager
def before_each(modules, look):
    """While open, look(module, inputs) is called before each forward pass of the modules."""
    hooks = [m.register_forward_pre_hook(look) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def observe(teacher, v, amp="none", features=True, feature_grad=False):
    """One pass of T over normalised images v shows all that eqs. (2) to (8) need.

    -> logits (B, C), mean and variance of the batch norms' inputs (2, channels), features (B, D)
    """
    statistics, means = [], []

    def look_at_norm(m, inputs):
        statistics.append(ChannelStatistics.apply(inputs[0]))  # (2, C_l)

    def look_at_conv(m, inputs):
        h = inputs[0] if feature_grad else inputs[0].detach()  # D1
        wide = torch.promote_types(h.dtype, torch.float32)
        means.append(h.mean((2, 3), dtype=wide))  # (B, C_l)

    norms = [m for m in teacher.modules() if has_statistics(m)]
    convs = [m for m in teacher.modules() if features and isinstance(m, nn.Conv2d)]
    with before_each(norms, look_at_norm), before_each(convs, look_at_conv):
        with autocast(v.device, amp):
            t_logits = teacher(v)

    t_logits = t_logits.to(v.dtype)
    now = torch.cat(statistics, 1) if statistics else None
    feat = torch.cat(means, 1) if means else t_logits[:, :0]
    return t_logits, now, feat


@torch.no_grad()
def stored_statistics(teacher, v, amp="none"):
    """Mean and variance of each batch norm, [(2, C_l)], in the order in which a pass meets them."""
    stored = []

    def look(m, inputs):
        stored.append(torch.stack([m.running_mean, m.running_var]))

    norms = [m for m in teacher.modules() if has_statistics(m)]
    with before_each(norms, look), autocast(v.device, amp):
        teacher(v)
    return stored


def pick_shots(labels, shots, seed):
    """Indices of so many images of each class, drawn as the published code draws them."""
    draw = random.Random(seed)
    chosen = []
    for c in range(labels.max() + 1):
        members = np.flatnonzero(labels == c).tolist()
        if shots > len(members):
            fail(f"--shots {shots}: class {c} has only {len(members)} images")
        chosen += draw.sample(members, shots)
    return chosen


class Shots:
    """What the teacher sees in the shots, by class: (C, n, ...), padded where numbers differ."""

    def __init__(self, feat, logits, labels, num_classes, T=2.0):
        self.classes = torch.arange(num_classes, device=labels.device)
        self.count = (labels[:, None] == self.classes).sum(0)  # (C,)
        slots = torch.arange(int(self.count.max()), device=labels.device)
        self.valid = slots < self.count[:, None]  # (C, n): the rest is padding
        by_class = labels.argsort(stable=True)
        self.feat = feat.new_zeros(*self.valid.shape, feat.shape[1])  # f_s (C, n, D)
        self.feat[self.valid] = feat[by_class]
        self.logits = logits.new_zeros(*self.valid.shape, logits.shape[1])  # l_s (C, n, C)
        self.logits[self.valid] = logits[by_class]

        self.T = T
        soft = F.softmax(self.logits / T, 2) * self.valid[:, :, None]
        self.soft = soft.sum(1) / self.count.clamp(min=1)[:, None]  # p_c (C, C)

        sums = []  # of k(f, f') over all pairs; class by class, as the differences are large
        for f, valid in zip(self.feat, self.valid):
            f = f[valid]
            sums.append(kernel((f[:, None] - f).square().sum(2)).sum())
        self.kernel_sum = torch.stack(sums)  # (C,)


@torch.no_grad()
def see_shots(teacher, v, labels, num_classes, amp="none"):
    """Of normalised images v, in pieces -> Shots, and the logits in the order of v."""
    seen = [observe(teacher, part, amp) for part in v.split(250)]
    logits = torch.cat([t_logits for t_logits, _, _ in seen])
    feat = torch.cat([part for _, _, part in seen])
    return Shots(feat, logits, labels, num_classes), logits


# ------------------------------------------------------------------------------------------ losses

def blend(now, average, share):
    """Eq. (3), and the average itself; the first time there is none."""
    if average is None:
        return now
    return (1 - share) * now + share * average


def bn_loss(now, running, sizes):
    """Eq. (2); now, running (2, channels of all layers); sizes: the channels of each layer."""
    layers = (running - now).split(sizes, 1)
    return torch.stack([layer.norm(dim=1) for layer in layers]).sum()


def kl_rows(s_logits, t_logits, T=1.0):
    """T^2 KL(t || s) of each image, summed over classes; gradient into both."""
    s_logp = F.log_softmax(s_logits / T, 1)
    t_logp = F.log_softmax(t_logits / T, 1)
    return T * T * F.kl_div(s_logp, t_logp, reduction="none", log_target=True).sum(1)


def adv_loss(s_logits, t_logits, teacher_grad=False):
    """Eq. (5): only images on which S and T agree count, but the mean is over all of them."""
    agree = s_logits.argmax(1) == t_logits.argmax(1)
    if not teacher_grad:
        t_logits = t_logits.detach()
    return -(agree * kl_rows(s_logits, t_logits)).mean()


SIGMAS = (0.1, 1.0, 5.0, 10.0)


def kernel(square):
    """k of eq. (7), of squared distances."""
    return sum(torch.exp(square / (-2 * sigma * sigma)) for sigma in SIGMAS)


def kernel_sums(feat, member, targets, shots):
    """(C,) sums of k over the pairs of each class: images with images, images with shots."""
    norms = feat.square().sum(1)
    square = (norms[:, None] + norms - 2 * feat @ feat.T).clamp(min=0)  # (B, B)
    square = square.fill_diagonal_(0)  # rounding leaves a little there, which sigma 0.1 would see
    made = ((kernel(square) @ member) * member).sum(0)

    square = (feat[:, None] - shots.feat[targets]).square().sum(2)  # (B, n): shots of its own class
    cross = kernel(square) * shots.valid[targets]
    return made, cross.sum(1) @ member


def feature_prior(feat, targets, shots):
    """Eq. (6): maximum mean discrepancy of made and real features, all classes at once."""
    member = (targets[:, None] == shots.classes).to(feat.dtype)  # (B, C): one-hot
    m = member.sum(0)  # (C,): made images of each class
    n = shots.count.to(feat.dtype)  # (C,): shots
    made, cross = kernel_sums(feat, member, targets, shots)
    real = shots.kernel_sum

    # eq. (7): means over all pairs, or without the pairs of an image with itself, where k is 4
    own = len(SIGMAS)
    all_pairs = made / m.clamp(min=1) ** 2 + real / n.clamp(min=1) ** 2
    other_pairs = (made - own * m + real - own * n) / (m * (m - 1)).clamp(min=1)
    within = torch.where((m == n) & (m > 1), other_pairs, all_pairs)
    mmd = (within - 2 * cross / (m * n).clamp(min=1)).clamp(min=0)

    weight = m * (n > 0)
    return (weight * mmd).sum() / weight.sum().clamp(min=1)  # eq. (6)


def mean_where(known, rows):
    return torch.where(known, rows, 0).sum() / known.sum().clamp(min=1)


def label_prior(t_logits, targets, shots):
    """First half of eq. (8): KL to the mean soft label of the class's shots."""
    logp = F.log_softmax(t_logits / shots.T, 1)
    rows = F.kl_div(logp, shots.soft[targets], reduction="none").sum(1)
    return mean_where(shots.count[targets] > 0, rows)


def nearest_prior(t_logits, targets, shots):
    """Second half of eq. (8): squared distance to the nearest logits of the class's shots."""
    square = (t_logits[:, None] - shots.logits[targets]).square().sum(2)  # (B, n)
    rows = square.masked_fill(~shots.valid[targets], math.inf).amin(1)
    return mean_where(shots.count[targets] > 0, rows)


def logits_prior(t_logits, targets, shots, share=0.997):
    """Eq. (8), over the images whose class has shots."""
    kl = label_prior(t_logits, targets, shots)
    nearest = nearest_prior(t_logits, targets, shots)
    return share * kl + (1 - share) * nearest


def kd_loss(s_logits, t_logits, n_real, alpha, T):
    """Eq. (10) of a batch [pool images; n_real shots] -> total, pool part, real part."""
    rows = kl_rows(s_logits, t_logits, T)
    n_pool = len(rows) - n_real
    pool = rows[:n_pool].sum() / max(n_pool, 1)
    real = rows[n_pool:].sum() / max(n_real, 1)
    return alpha * real + (1 - alpha) * pool, pool, real


# --------------------------------------------------------------------------- steps 1-3: synthesis

class Judges:
    """What judges made images in step 2; no student: without eq. (5), no shots: without priors."""

    def __init__(self, teacher, shots, stored):
        self.teacher = teacher
        self.student = None
        self.shots = shots
        self.sizes = [layer.shape[1] for layer in stored]
        self.running = torch.cat(stored, 1) if stored else None  # V_l, M_l: (2, channels)
        self.average = None  # A_l, none before the second epoch

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]
        if self.average is not None:
            self.average = self.average.to(self.running.device)


def image_terms(v, targets, judges, args):
    """The terms of eq. (1) by name, of augmented images v; (m_l, v_l) before eq. (3)."""
    features = args.guidance_loss_w > 0
    t_logits, now, feat = observe(judges.teacher, v, args.amp, features, args.feature_grad)
    terms = {"oh": F.cross_entropy(t_logits, targets)}  # eq. (4)
    if args.bn:
        blended = blend(now, judges.average, args.bn_mmt)  # eq. (3)
        terms["bn"] = bn_loss(blended, judges.running, judges.sizes)
    if judges.student is not None:
        with autocast(v.device, args.amp):
            s_logits = judges.student(v).to(v.dtype)
        terms["adv"] = adv_loss(s_logits, t_logits, args.adv_teacher_grad)
    if args.guidance_loss_w:
        terms["feat"] = feature_prior(feat, targets, judges.shots)
    if args.logits_guidance_w:
        terms["logits"] = logits_prior(t_logits, targets, judges.shots)
    return terms, now


def invert(generator, z, targets, augment, judges, args):
    """Steps 1 to 3 for one batch; the gradient of eq. (9) stays in G for its Adam.

    -> the images of the lowest L, and the terms of each step by name with their sum
    """
    weights = {
        "bn": args.bn, "oh": args.oh, "adv": args.adv,
        "feat": args.guidance_loss_w, "logits": args.logits_guidance_w}
    fast = deepcopy(generator)  # step 1
    z = z.clone().requires_grad_()
    groups = [{"params": fast.parameters()}, {"params": [z], "lr": args.lr_z}]
    adam = torch.optim.Adam(groups, args.lr_g, (0.5, 0.999))
    for p in generator.parameters():
        p.grad = torch.zeros_like(p)
    best, lowest, history = None, None, []

    for _ in range(args.g_steps):  # step 2
        x = fast(z)
        terms, now = image_terms(augment(x), targets, judges, args)
        total = sum(weights[name] * term for name, term in terms.items())  # eq. (1)
        best, lowest = keep_best(best, lowest, x.detach(), total.detach())
        history.append({name: term.detach() for name, term in terms.items()})
        history[-1]["total"] = total.detach()

        adam.zero_grad()
        total.backward()
        for p, moved in zip(generator.parameters(), fast.parameters()):
            p.grad += moved.grad  # eq. (9)
        adam.step()

    if args.bn:  # step 3
        judges.average = blend(now.detach(), judges.average, args.bn_mmt)
    return best, history


def keep_best(best, lowest, x, total):
    """The batch of the strictly lowest loss so far; the device decides, and nobody waits for it."""
    if best is None:
        return x, total
    better = total < lowest
    return torch.where(better, x, best), torch.where(better, total, lowest)


class Pool:
    """All images made so far, in 8 bits on the device; none is ever thrown away."""

    def __init__(self, capacity, image_size, device):
        shape = (capacity, 3, image_size, image_size)
        self.storage = torch.empty(shape, dtype=torch.uint8, device=device)
        self.made = 0

    def add(self, images):
        self.storage[self.made:self.made + len(images)] = images
        self.made += len(images)

    def state_dict(self):
        return {"images": self.storage[:self.made].clone()}  # a view would save its whole storage

    def load_state_dict(self, state):
        self.made = 0
        self.add(state["images"])


# ------------------------------------------------------------------------ step 4: distillation

def curriculum(epoch, stop, first, last):
    """Eq. (11): a cosine from first (epoch 0) to last (epoch stop and later)."""
    if epoch >= stop:
        return last
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * (epoch / stop)))


def mixture_at(epoch, args, n_shots):
    """alpha and R of an epoch."""
    stop = args.mixed_distill_stop_epoch
    alpha = curriculum(epoch, stop, args.alpha_initial, args.alpha_final_stage)
    n_real = curriculum(epoch, stop, args.real_fewshot_initial, args.real_fewshot_final_stage)
    return alpha, min(int(n_real), n_shots)


def lr_at(epoch, args):
    """A cosine, lr_tmax epochs long, from the warm-up's end on; in a longer run it rises again."""
    angle = math.pi * max(0, epoch - args.warmup) / args.lr_tmax
    return 2e-4 + (args.lr - 2e-4) * (1 + math.cos(angle)) / 2


def balanced_pass(members, n_draws, draw):
    """Indices drawn from the classes in turn, each class in a new order and from its list's end."""
    left = [[] for _ in members]
    drawn = []
    for i in range(n_draws):
        c = i % len(members)
        if not left[c]:
            left[c] = list(members[c])
            draw.shuffle(left[c])
        drawn.append(left[c].pop())
    return drawn


def balanced_batches(labels, batch_size, steps, draw):
    """(steps, batch_size) indices of shots, cut from passes of as many draws as there are shots.

    What is too little for a batch is dropped, so the first classes come a little more often.
    """
    if batch_size == 0:
        return np.zeros((steps, 0), np.int64)
    members = [np.flatnonzero(labels == c).tolist() for c in np.unique(labels)]
    batches = []
    while len(batches) < steps:
        drawn = balanced_pass(members, len(labels), draw)
        for first in range(0, len(labels) - batch_size + 1, batch_size):
            batches.append(drawn[first:first + batch_size])
    return np.array(batches[:steps])


def pool_batches(pool, batch_size, augment, teach, rng):
    """(augmented images, the teacher's logits) without end; each pass over the pool in a new order.

    On a GPU the teacher sees four batches in one call: small networks are faster so.
    """
    images = pool.storage[:pool.made]

    def indices():
        while True:
            order = torch.randperm(pool.made, generator=rng, device=images.device)
            yield from order.split(batch_size)

    batches = indices()
    at_once = 4 if images.is_cuda else 1
    while True:
        parts = [next(batches) for _ in range(at_once)]
        sizes = [len(part) for part in parts]
        x = augment(images[torch.cat(parts)])
        t_logits = teach(x)
        yield from zip(x.split(sizes), t_logits.split(sizes))


def kd_step(student, optimizer, x, t_logits, n_real, alpha, args):
    """One SGD step of S on [pool images; n_real shots] -> the losses of eq. (10)."""
    with autocast(x.device, args.amp):
        s_logits = student(x).to(t_logits.dtype)
    loss, pool, real = kd_loss(s_logits, t_logits, n_real, alpha, args.T)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), pool.detach(), real.detach()


# -------------------------------------------------------------------------------------------- main

def check(args):
    """What can be said before anything is read."""
    if args.warmup >= args.epochs:
        fail(f"--warmup {args.warmup}: the student starts after it; give more --epochs than that")
    n_real = (args.real_fewshot_initial, args.real_fewshot_final_stage)
    if not args.shots and max(args.guidance_loss_w, args.logits_guidance_w, *n_real):
        fail("--shots 0: priors and real batches need shots; --preset fast works without any")
    if not args.g_steps and not min(n_real):
        fail("--g_steps 0: without made images give real ones, see --preset fewshot_kd")


def beside_real(images, targets, x_real, y_real, classes):
    """A row for each of the first ten classes: up to five shots, then made images, ten in all."""
    rows, labels = [], []
    for c, name in enumerate(classes[:10]):
        row = torch.cat([x_real[y_real == c][:5], images[targets == c]])[:10]
        black = row.new_zeros(10 - len(row), *row.shape[1:])
        rows += [row, black]
        labels += [name] * 10
    return torch.cat(rows), labels


def main(args):
    check(args)
    run = Run(args)
    data = load_data(args, run.device)
    teacher = get_teacher(args, data)  # frozen, in eval mode
    if args.g_steps and args.bn and not any(has_statistics(m) for m in teacher.modules()):
        fail(f"the teacher {args.teacher} has no batch norm for eq. (2); go on with --bn 0")

    init = "default" if args.student in FRAMEWORK_INIT else "kaiming"
    student = build_model(args.student, data.num_classes, data.image_size, init)
    student.to(run.device, memory_format=torch.channels_last)
    fused = run.device.type == "cuda"
    optimizer = torch.optim.SGD(
        student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=fused)
    generator = Generator(ngf=args.ngf, size=data.image_size)
    generator.to(run.device, memory_format=torch.channels_last)
    meta = torch.optim.Adam(
        generator.parameters(), args.lr_g * args.g_steps, (0.5, 0.999), fused=fused)

    # the shots, and what the teacher sees in them; without shots the training split stays closed
    index, shots = [], None
    x_real, y_real = data.test_x[:0], data.test_y[:0]
    if args.shots:
        index = pick_shots(data.train_y.cpu().numpy(), args.shots, args.seed)
        x_real, y_real = data.train_x[index], data.train_y[index]  # D2
        v_real = data.normalize(x_real)
        shots, t_real = see_shots(teacher, v_real, y_real, data.num_classes, args.amp)
    labels = y_real.cpu().numpy()
    stored = stored_statistics(teacher, data.normalize(data.test_x[:2]), args.amp)
    judges = Judges(teacher, shots, stored)
    size = args.synthesis_batch_size if args.g_steps else 0
    pool = Pool(args.epochs * size, data.image_size, run.device)

    start = run.begin(
        data, teacher, student=student, optimizer=optimizer, generator=generator, meta=meta,
        judges=judges, pool=pool)
    run.note(shots=index)
    net = student
    if args.compile:
        net = torch.compile(student, dynamic=True)  # R takes many values

    def augment(x):
        return data.augment(x, run.rng)

    @torch.no_grad()
    def teach(x):
        with run.flops(f"teacher {len(x)}"), autocast(run.device, args.amp):
            return teacher(x).float()

    def shot_batch(index):
        if args.augment_real:
            x = augment(x_real[index])
            return x, teach(x)
        return v_real[index], t_real[index]

    for epoch in range(start, args.epochs):
        if args.g_steps:
            # steps 1-3: invert the teacher into one more batch of images
            reset(generator, args, epoch)
            z = torch.randn(size, generator.nz, generator=run.rng, device=run.device)
            targets = torch.randint(data.num_classes, (size,), generator=run.rng, device=run.device)
            targets = targets.sort()[0]
            student.eval().requires_grad_(False)
            if args.adv and epoch + 1 >= args.warmup:
                judges.student = student  # eq. (5)
            with run.flops(f"synthesis, disagreement {judges.student is not None}"):
                images, history = invert(generator, z, targets, augment, judges, args)
                meta.step()  # eq. (9)
            images = quantize(images)
            pool.add(images)
            run.log(epoch * args.kd_steps, epoch, **history[-1])

        if epoch >= args.warmup:
            # step 4: the student learns from the pool and from the shots
            student.train().requires_grad_(True)
            alpha, n_real = mixture_at(epoch, args, len(x_real))
            optimizer.param_groups[0]["lr"] = lr = lr_at(epoch, args)
            draw = np.random.RandomState([args.seed, epoch])
            real = balanced_batches(labels, n_real, args.kd_steps, draw)
            real = torch.from_numpy(real).to(run.device)
            taught = pool_batches(pool, args.batch_size, augment, teach, run.rng)
            for i in run.steps(epoch, args.kd_steps):
                batch = []
                if args.g_steps:
                    batch.append(next(taught))
                if n_real:
                    batch.append(shot_batch(real[i]))
                x, t_logits = map(torch.cat, zip(*batch))
                with run.flops(f"student step {len(x)}"):
                    loss, loss_pool, loss_real = kd_step(
                        net, optimizer, x, t_logits, n_real, alpha, args)  # eq. (10)
                if i % args.log_every == 0:
                    run.log(epoch * args.kd_steps + i, epoch, loss=loss, loss_pool=loss_pool,
                            loss_real=loss_real, lr=lr, alpha=alpha, n_real=n_real)

        if args.g_steps and run.due(epoch, args.save_every):
            grid, words = beside_real(images, targets, x_real, y_real, data.classes)
            run.grid(f"epoch{epoch + 1:03d}", grid, len(grid) // 10, words)
        due = epoch >= args.warmup and run.due(epoch, args.eval_every)
        run.end_epoch(epoch, evaluate(student, data, args.amp) if due else None)

    run.finish(student, real_images=len(x_real), made_images=pool.made)  # D3


if __name__ == "__main__":
    cli(main, Args, PRESETS)
