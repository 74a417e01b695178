"""PGDI: distil a student from a teacher and K labelled images per class, with images inverted from the teacher.

Paper   J. Wang, "Prior-Guided Deep Inversion for Few-Shot Knowledge Distillation" (code: the public PGDI repository).
        Parent: Fang et al., "Up to 100x Faster Data-Free Knowledge Distillation", AAAI 2022, arXiv 2112.06253.
Data    K labelled training images per class (default 5), not augmented (--augment_real does); the test split only for
        reporting.
Result  published, best test epoch of one run: CIFAR-100 WRN-40-2 -> WRN-16-1, 5 shots 53.65 (all rows: PUBLISHED)

Once    the teacher sees the shots: features f_s, logits l_s, and for each class p_c = mean softmax(l_s / 2)
Each epoch
  1. clone the generator G into F; draw z ~ N(0, 1) and classes y
  2. g_steps Adam steps on F and z; x = F(z), T and S see v = a random crop and flip of x, normalised
       L     = bn*L_bn + oh*L_oh + adv*L_adv + guidance_loss_w*L_feat + logits_guidance_w*L_log                   (1)
       L_bn  = sum_l ||V_l - v_l||_2 + ||M_l - m_l||_2    norm over channels, sum over batch-norm layers          (2)
               m_l, v_l: mean and biased variance of the layer's input; from the second call on blended with their
               running average,  m_l <- (1-bn_mmt)*m_l + bn_mmt*A_l; then A_l <- bn_mmt*A_l + (1-bn_mmt)*(the m_l
               of the last step before blending)                                                                  (3)
       L_oh  = CE(T(v), y)                                mean over batch                                         (4)
       L_adv = -mean_i [T and S agree on i] KL(T(v_i) || S(v_i))   from epoch `warmup` on                         (5)
       L_feat= sum_c m_c MMD_c / sum_c m_c                m_c generated images of class c                         (6)
       MMD_c = mean k(x, x') + mean k(f, f') - 2 mean k(x, f) or 0,  k(a, b) = sum_s exp(-|a-b|^2 / 2s^2)         (7)
       L_log = mean_i 0.997 KL(p_y || softmax(t_i / 2)) + 0.003 min_s |t_i - l_s|^2      s: shots of class y      (8)
  3. keep the batch of the lowest L as 8-bit images in the pool; G takes one Adam step (rate lr_g*g_steps) along the
     sum of the g_steps gradients of F                    first-order MAML                                        (9)
  4. after `warmup` epochs: kd_steps SGD steps of S on a pool batch (augmented) and R shots, one batch-norm batch
       L_kd  = alpha*KL_real + (1-alpha)*KL_pool,  KL = T^2 KL(p_T || p_S)     two batch means                    (10)
       alpha and R fall by a cosine until mixed_distill_stop_epoch, then stay                                     (11)

Symbols  T -> teacher (T in eq. (10): args.T), S -> student, G, F -> generator, fast, y -> targets, t -> t_logits,
         (M_l, V_l), (m_l, v_l), A_l -> running, now, average, R -> n_real, x, f -> feat, shots.feat

Deviations from the published code
  D1 its features are detached: eq. (6) has no gradient, it only sways which batch is kept. --feature_grad 0 (default)
     does the same, 1 (--preset described) moves the images by it: 74.0 instead of 45.7 % on CIFAR-10, 10 shots, small
     budget (run_all.sh laptop). The features are the inputs of the convs, not their outputs
  D2 it takes the shots of CIFAR-10 from CIFAR-100 and cannot load Tiny-ImageNet; here they come from the data set
  D3 it reports the best test epoch; here the last one, the best beside it
  D4 one teacher pass per synthesis step, not two; no hooks in step 4, the shots' logits cached, the pool in memory: the
     same numbers (tests/test_pgdi.py)
  D5 kept: L_adv starts one epoch before the student learns; resets fall before the last epoch of a 200-epoch run; the
     cosine of the rate is 200 epochs long whatever --epochs is; the balanced sampler prefers low classes; the means of
     (7) leave out a = b only where a class has as many generated images as shots

  python pgdi.py --smoke                                                                     # no download, a minute
  python pgdi.py --dataset cifar100 --teacher wrn40_2 --student wrn16_1 --shots 5 --seed 2   # the row above
  python pgdi.py --preset fast          # no real images (Fast-Datafree); fewshot_kd: only them; long: 800 epochs
"""
import contextlib
import itertools
import math
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (
    ChannelStatistics, Run, accuracy, agreement, autocast, batches, build_model, cli, count_params_macs, evaluate,
    evaluate_file, fail, get_teacher, has_statistics, load_data, lr_at, predict, published_row, quantize,
    read_checkpoint, write_atomic)


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
    dataset: str = "cifar100"  # cifar10, cifar100, tiny_imagenet, shapes, or a folder of your own
    teacher: str = "wrn40_2"  # network: a name in MODELS, or file.py:callable
    student: str = "wrn16_1"  # network: a name in MODELS, or file.py:callable
    shots: int = 5  # labelled real images per class (published: those of --seed 2)
    epochs: int = 200  # rounds of synthesis and distillation
    batch_size: int = 256  # pool images per distillation step
    lr: float = 0.2  # peak learning rate of the student
    weight_decay: float = 1e-4  # on all parameters
    momentum: float = 0.9  # SGD momentum
    lr_tmax: int = 200  # length of the rate's cosine in epochs after the warm-up
    T: float = 20.0  # temperature of eq. (10)
    warmup: int = 20  # epochs that only fill the pool
    ep_steps: int = 400  # ep_steps // kd_steps rounds of steps 1-4 per epoch
    kd_steps: int = 400  # student steps per round
    # steps 1-3
    synthesis_batch_size: int = 512  # images per round; 0 = batch_size
    g_steps: int = 10  # steps on F and z per round; 0 = no synthesis
    lr_g: float = 5e-3  # learning rate of F; G takes lr_g * g_steps
    lr_z: float = 0.015  # learning rate of z
    ngf: int = 64  # width of the generator
    adv: float = 1.33  # weight of eq. (5)
    bn: float = 5.0  # weight of eq. (2)
    oh: float = 0.001  # weight of eq. (4)
    guidance_loss_w: float = 100.0  # weight of eq. (6)
    logits_guidance_w: float = 1.0  # weight of eq. (8)
    bn_mmt: float = 0.9  # momentum of eq. (3); 0 = none
    guidance_loss_type: Literal["mmd", "l2_min", "l2_mean"] = "mmd"  # eq. (6); l2: distance to nearest or mean shot
    teacher_feature_source: Literal["all_conv", "bn_hooks"] = "all_conv"  # channel means of the inputs of convs or BNs
    logits_loss_type: Literal["hybrid_kl_min_l2", "kl_softmax", "min_l2_logits"] = "hybrid_kl_min_l2"  # of eq. (8)
    feature_grad: Literal[0, 1] = 0  # D1: 1 = eq. (6) moves the images, as the paper describes
    adv_grad: Literal["student", "both"] = "student"  # logits that eq. (5) has a gradient through
    reset_l0: int = 200  # every so many epochs G's first layers are drawn anew; 0 = never
    reset_bn: int = 200  # every so many epochs G's batch norms are drawn anew; 0 = never
    reset_once: bool = False  # the first layers only once instead, 120 epochs after the warm-up (Fast-Datafree)
    # step 4
    alpha_schedule: Literal["cosine", "linear", "none"] = "cosine"  # eq. (11); none = the initial value until the stop
    alpha_initial: float = 0.9  # weight of the real images at epoch 0
    alpha_final_stage: float = 0.2  # and from the stop on
    real_fewshot_schedule: Literal["cosine", "linear", "none"] = "cosine"  # eq. (11)
    real_fewshot_initial: int = 256  # real images per step at epoch 0 (at most all shots)
    real_fewshot_final_stage: int = 8  # and from the stop on
    mixed_distill_stop_epoch: int = 100  # end of both curricula
    augment_real: bool = False  # crop and flip the shots too
    export_pool: bool = False  # with --evaluate RUN_FOLDER: write its pool as RUN_FOLDER/pool.npz


PAIRS = (("resnet34", "resnet18"), ("vgg11", "resnet18"), ("wrn40_2", "wrn16_1"), ("wrn40_2", "wrn40_1"),
         ("wrn40_2", "wrn16_2"))
SCRIPT = {(dataset, *pair): {} for dataset in ("cifar10", "cifar100") for pair in PAIRS} | {
    ("tiny_imagenet", "resnet34", "resnet18"): {}}  # only one script is published: its values serve every pair


def fast(look: dict) -> dict:
    """Fast-Datafree: no real images, weights by the teacher."""
    adv, oh = {"resnet34": (1.33, 0.5), "vgg11": (1.0, 0.5)}.get(look["teacher"], (1.1, 0.4))
    return dict(shots=0, guidance_loss_w=0.0, logits_guidance_w=0.0, alpha_initial=0.0, alpha_final_stage=0.0,
                real_fewshot_initial=0, real_fewshot_final_stage=0, epochs=220, synthesis_batch_size=256, bn=10.0,
                oh=oh, adv=adv, lr_z=0.01, lr_g=2e-3, adv_grad="both", reset_l0=0, reset_bn=0, reset_once=True)


PRESETS = {
    "auto": SCRIPT,
    "script": SCRIPT,
    "described": {"*": dict(feature_grad=1), **SCRIPT},
    "long": {"*": dict(epochs=800, mixed_distill_stop_epoch=300),
             **{pair: dict(epochs=1200 if pair[1] == "resnet34" else 800) for pair in SCRIPT}},
    "fast": {"*": fast, **SCRIPT},
    "fewshot_kd": {"*": dict(g_steps=0, warmup=0, alpha_initial=1.0, alpha_final_stage=1.0,
                             real_fewshot_final_stage=256, augment_real=True), **SCRIPT},
    "demo": {"*": dict(dataset="shapes", teacher="resnet20", student="resnet8", shots=5, epochs=13, warmup=3,
                       ep_steps=50, kd_steps=50, batch_size=48, synthesis_batch_size=64, ngf=16, lr=0.1, lr_tmax=10,
                       real_fewshot_initial=32, mixed_distill_stop_epoch=8, feature_grad=1, eval_every=4)},
    "smoke": {"*": dict(dataset="shapes", teacher="resnet8", student="resnet8", limit_train=300, limit_test=200,
                        epochs=2, warmup=1, ep_steps=4, kd_steps=4, batch_size=32, synthesis_batch_size=32, g_steps=2,
                        ngf=8, allow_weak_teacher=True)}}
ALIASES = {"method": {"PGDI": None, "pgdi": None}, "wd": "weight_decay", "save_dir": "out_dir"}
FIVE, TEN = (94.61, 90.67, 88.45, 92.89, 92.73, 76.96, 70.15, 53.65, 69.46, 69.24, 64.13), (
    95.10, 91.32, 89.15, 93.23, 92.83, 77.13, 70.97, 53.97, 69.55, 69.40, 64.17)
FAST_10 = (94.05, 90.53, 89.29, 92.51, 92.45, 74.34, 67.44, 54.02, 63.91, 65.12)
ONE_RUN = "best test epoch, one run"
PUBLISHED = {  # (preset, dataset, teacher, student, shots) -> top-1, protocol
    **{("auto", *pair, shots): (top1, ONE_RUN) for shots, column in ((5, FIVE), (10, TEN))
       for pair, top1 in zip(SCRIPT, column)},
    **{("fast", *pair, 0): (top1, ONE_RUN) for pair, top1 in zip(SCRIPT, FAST_10)}}


class Generator(nn.Module):
    """z (B, nz) -> images (B, 3, size, size) in [0, 1]."""

    def __init__(self, nz: int = 256, ngf: int = 64, size: int = 32):
        super().__init__()
        self.side = size // 4
        self.l1 = nn.Sequential(nn.Linear(nz, 2 * ngf * self.side ** 2))
        self.conv_blocks = nn.Sequential(  # (B, 2ngf, size/4, size/4)
            nn.BatchNorm2d(2 * ngf), nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * ngf, 2 * ngf, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * ngf), nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * ngf, ngf, 3, 1, 1, bias=False), nn.BatchNorm2d(ngf), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ngf, 3, 3, 1, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        x = self.l1(z).view(len(z), -1, self.side, self.side)
        return self.conv_blocks(x.contiguous(memory_format=torch.channels_last))


def resets_at(ep: int, args: Args) -> tuple[bool, bool]:
    """Whether the first layers and the batch norms are drawn anew at the start of epoch ep = 1, 2 ... (D5)"""
    l0 = ep == args.warmup + 120 if args.reset_once else args.reset_l0 > 0 and ep % args.reset_l0 == 0
    return l0, args.reset_bn > 0 and ep % args.reset_bn == 0


def reset(generator: Generator, l0: bool, bn: bool) -> None:
    """Draw the first layer and the first batch norm, or all batch norms, anew; Adam's moments are kept."""
    if l0:
        for m in (generator.l1[0], generator.conv_blocks[0]):
            nn.init.normal_(m.weight, 0, 0.02)
            nn.init.zeros_(m.bias)
    for m in generator.modules() if bn else ():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.02)
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------------------ losses

def kl_rows(s_logits: Tensor, t_logits: Tensor, T: float = 1.0) -> Tensor:
    """T^2 KL(t || s) of each row (sum over classes); gradient into both."""
    return T * T * F.kl_div(F.log_softmax(s_logits / T, 1), F.log_softmax(t_logits / T, 1), reduction="none",
                            log_target=True).sum(1)


def kd_loss(s_logits: Tensor, t_logits: Tensor, n_real: int, alpha: float, T: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (10) of a batch [pool images; n_real shots] -> (total, pool mean, real mean); an absent part counts 0."""
    rows = kl_rows(s_logits, t_logits, T)
    pool, real = rows[:len(rows) - n_real], rows[len(rows) - n_real:]
    pool, real = (part.mean() if len(part) else rows.new_zeros(()) for part in (pool, real))
    return alpha * real + (1 - alpha) * pool, pool, real


def adv_loss(s_logits: Tensor, t_logits: Tensor, adv_grad: str = "student") -> Tensor:
    """Eq. (5): only where both name the same class; divided by the batch size, not by their number."""
    agree = s_logits.argmax(1) == t_logits.argmax(1)
    return -(agree * kl_rows(s_logits, t_logits.detach() if adv_grad == "student" else t_logits)).mean()  # eq. (5)


def bn_loss(now: Tensor, running: Tensor, sizes: list[int]) -> Tensor:
    """Eq. (2) for means and variances (2, sum of sizes), layer by layer. Norm over channels, sum over layers."""
    return torch.stack([part.norm(dim=1) for part in (running - now).split(sizes, 1)]).sum()


SIGMAS = (0.1, 1.0, 5.0, 10.0)


def kernel(square: Tensor) -> Tensor:
    return sum(torch.exp(square / (-2 * s * s)) for s in SIGMAS)


def kernel_sums(feat: Tensor, targets: Tensor, onehot: Tensor, shots: "Shots") -> tuple[Tensor, Tensor]:
    """(C,) sums of the kernel of eq. (7) over the pairs of a class: generated-generated, generated-real."""
    norms = feat.square().sum(1)
    square = (norms[:, None] + norms - 2 * feat @ feat.T).clamp(min=0)  # (B, B)
    square = square.masked_fill(torch.eye(len(feat), dtype=torch.bool, device=feat.device), 0)  # no rounding there
    cross = kernel((feat[:, None] - shots.feat[targets]).square().sum(2)) * shots.valid[targets]  # (B, n)
    return ((kernel(square) @ onehot) * onehot).sum(0), cross.sum(1) @ onehot


def feature_prior(feat: Tensor, targets: Tensor, shots: "Shots", kind: str = "mmd") -> Tensor:
    """Eq. (6) over the classes that have shots; l2_min, l2_mean: mean over samples of the squared distance to the
    nearest shot, of the mean squared error to the mean shot."""
    known = shots.count[targets] > 0
    if kind != "mmd":
        if kind == "l2_min":
            square = (feat[:, None] - shots.feat[targets]).square().sum(2)  # (B, n)
            rows = square.masked_fill(~shots.valid[targets], math.inf).amin(1)
        else:
            mean = shots.feat.sum(1) / shots.count.clamp(min=1)[:, None]  # (C, D)
            rows = (feat - mean[targets]).square().mean(1)
        return torch.where(known, rows, 0).sum() / known.sum().clamp(min=1)
    onehot = (targets[:, None] == torch.arange(len(shots.count), device=targets.device)).to(feat)  # (B, C)
    m, n, k0 = onehot.sum(0), shots.count.to(feat), len(SIGMAS)  # k0 = k(a, a)
    sxx, sxy = kernel_sums(feat, targets, onehot, shots)
    unbiased = (m == n) & (m > 1)
    within = torch.where(
        unbiased, (sxx - k0 * m + shots.syy - k0 * n) / (m * (m - 1)).clamp(min=1),
        sxx / m.clamp(min=1) ** 2 + shots.syy / n.clamp(min=1) ** 2)
    mmd = (within - 2 * sxy / (m * n).clamp(min=1)).clamp(min=0)  # eq. (7)
    weight = m * (n > 0)
    return (weight * mmd).sum() / weight.sum().clamp(min=1)  # eq. (6)


def logits_prior(t_logits: Tensor, targets: Tensor, shots: "Shots", kind: str = "hybrid_kl_min_l2", T: float = 2.0,
                 hybrid: float = 0.997) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (8) -> (total, KL part, distance part): means over the samples whose class has shots, sums over classes."""
    known, zero = shots.count[targets] > 0, t_logits.new_zeros(())

    def mean(rows: Tensor) -> Tensor:
        return torch.where(known, rows, 0).sum() / known.sum().clamp(min=1)

    kl = l2 = zero
    if kind != "min_l2_logits":
        kl = mean(F.kl_div(F.log_softmax(t_logits / T, 1), shots.soft(T)[targets], reduction="none").sum(1))
    if kind != "kl_softmax":
        square = (t_logits[:, None] - shots.logits[targets]).square().sum(2)  # (B, n)
        l2 = mean(square.masked_fill(~shots.valid[targets], math.inf).amin(1))
    return hybrid * kl + (1 - hybrid) * l2 if kind == "hybrid_kl_min_l2" else kl + l2, kl, l2  # eq. (8)


class Shots:
    """Features and logits of the labelled images by class: (C, n, ...), padded where classes differ in number."""

    def __init__(self, feat: Tensor, logits: Tensor, labels: Tensor, num_classes: int):
        self.count = torch.bincount(labels, minlength=num_classes)  # (C,)
        self.valid = torch.arange(int(self.count.max()), device=labels.device) < self.count[:, None]  # (C, n)
        order = labels.argsort(stable=True)
        self.feat, self.logits = (v.new_zeros(*self.valid.shape, v.shape[1]) for v in (feat, logits))
        self.feat[self.valid], self.logits[self.valid] = feat[order], logits[order]
        self.syy = torch.stack([(kernel((f[:, None] - f).square().sum(2)) * v[:, None] * v).sum()
                                for f, v in zip(self.feat, self.valid)])  # once, class by class: they can be large

    def soft(self, T: float) -> Tensor:
        """(C, C) mean soft label of each class."""
        return (F.softmax(self.logits / T, 2) * self.valid[..., None]).sum(1) / self.count.clamp(min=1)[:, None]


# --------------------------------------------------------------------------------------------- steps 1-3: synthesis

FEATURE_LAYERS = {"all_conv": nn.Conv2d, "bn_hooks": nn.BatchNorm2d, "none": ()}


@contextlib.contextmanager
def tapped(teacher: nn.Module, source: str, feature_grad: int = 0) -> Iterator[dict[str, list]]:
    """While open, each pass of the teacher appends the statistics of its BN inputs and the features of the images."""
    taps: dict[str, list] = {"bn": [], "feat": []}

    def wide(h: Tensor) -> Tensor:
        return h.to(torch.promote_types(h.dtype, torch.float32))

    def statistics(_: nn.Module, inputs: tuple) -> None:
        taps["bn"].append(ChannelStatistics.apply(wide(inputs[0])))  # (2, C_l)

    def features(_: nn.Module, inputs: tuple) -> None:
        h = inputs[0] if feature_grad else inputs[0].detach()  # D1
        taps["feat"].append(wide(h).mean((2, 3)))  # (B, C_l)

    hooks = [m.register_forward_pre_hook(statistics) for m in teacher.modules() if has_statistics(m)]
    hooks += [m.register_forward_pre_hook(features) for m in teacher.modules() if isinstance(m, FEATURE_LAYERS[source])]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def bn_order(teacher: nn.Module, x: Tensor) -> list[nn.Module]:
    """The batch norms with running statistics that a pass meets, in that order."""
    met: list = []
    hooks = [m.register_forward_pre_hook(lambda m, _: met.append(m)) for m in teacher.modules() if has_statistics(m)]
    teacher(x)
    for hook in hooks:
        hook.remove()
    return met


class BNStatistics:
    """The teacher's running means and variances (2, all channels), and the running average A_l of eq. (3)."""

    def __init__(self, layers: list[nn.Module]):
        self.sizes, pairs = [m.num_features for m in layers], [(m.running_mean, m.running_var) for m in layers]
        self.running = torch.cat([torch.stack(pair) for pair in pairs], 1) if layers else torch.zeros(2, 0)
        self.average: Optional[Tensor] = None

    def blend(self, now: Tensor, mmt: float) -> Tensor:
        return now if self.average is None else (1 - mmt) * now + mmt * self.average  # eq. (3)

    def update(self, now: Tensor, mmt: float) -> None:
        if mmt:
            self.average = now if self.average is None else mmt * self.average + (1 - mmt) * now  # eq. (3)

    def state_dict(self) -> dict:
        return {"average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.average = None if state["average"] is None else state["average"].to(self.running.device)


TERMS = ("total", "bn", "oh", "adv", "feat", "logits", "logits_kl", "logits_l2")


def synthesize(generator: Generator, meta: torch.optim.Optimizer, teacher: nn.Module, student: nn.Module, z: Tensor,
               targets: Tensor, view: Callable, statistics: BNStatistics, shots: Optional[Shots], ep: int,
               args: Args) -> tuple[Tensor, Tensor]:
    """Steps 1-3 for one batch -> (images of the lowest loss, terms (g_steps, len(TERMS))); G takes its step.

    view(x) augments and normalises; ep counts the epochs from 1. Without a host sync.
    """
    fast, z = deepcopy(generator), z.detach().clone().requires_grad_()  # step 1
    adam = torch.optim.Adam([{"params": fast.parameters()}, {"params": [z], "lr": args.lr_z}], args.lr_g, (0.5, 0.999))
    meta_grad = [torch.zeros_like(p) for p in generator.parameters()]
    student.eval().requires_grad_(False)
    zero, history = z.new_zeros(()), []
    feat_w, log_w = (args.guidance_loss_w, args.logits_guidance_w) if shots else (0.0, 0.0)
    best, lowest = None, None
    with tapped(teacher, args.teacher_feature_source if feat_w else "none", args.feature_grad) as taps:
        for it in range(args.g_steps):  # step 2
            for tap in taps.values():
                tap.clear()
            x = fast(z)
            v = view(x)
            with autocast(z.device, args.amp):
                t_logits = teacher(v)
                s_logits = student(v) if args.adv and ep >= args.warmup else None  # D5
            t_logits = t_logits.to(z.dtype)
            loss_bn = loss_adv = loss_feat = loss_log = kl = l2 = zero
            loss_oh = F.cross_entropy(t_logits, targets)  # eq. (4)
            if args.bn:
                now = torch.cat(taps["bn"], 1)
                loss_bn = bn_loss(statistics.blend(now, args.bn_mmt), statistics.running, statistics.sizes)
            if s_logits is not None:
                loss_adv = adv_loss(s_logits.to(z.dtype), t_logits, args.adv_grad)
            if feat_w:
                loss_feat = feature_prior(torch.cat(taps["feat"], 1), targets, shots, args.guidance_loss_type)
            if log_w:
                loss_log, kl, l2 = logits_prior(t_logits, targets, shots, args.logits_loss_type)
            loss = (args.bn * loss_bn + args.oh * loss_oh + args.adv * loss_adv + feat_w * loss_feat
                    + log_w * loss_log)  # eq. (1)
            terms = torch.stack([loss, loss_bn, loss_oh, loss_adv, loss_feat, loss_log, kl, l2]).detach()
            history.append(terms)
            best, lowest = keep_best(best, lowest, x.detach(), terms[0])
            gradients = torch.autograd.grad(loss, [*fast.parameters(), z])
            torch._foreach_add_(meta_grad, gradients[:-1])
            if it + 1 < args.g_steps:  # the last step of F and z would be thrown away
                for p, g in zip([*fast.parameters(), z], gradients):
                    p.grad = g
                adam.step()
    for p, g in zip(generator.parameters(), meta_grad):
        p.grad = g
    meta.step()  # eq. (9)
    if args.bn:
        statistics.update(now.detach(), args.bn_mmt)
    student.train().requires_grad_(True)
    return best, torch.stack(history)


def keep_best(best: Optional[Tensor], lowest: Optional[Tensor], x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The batch of the strictly lowest loss so far; decided on the device."""
    if best is None:
        return x, total
    better = total < lowest
    return torch.where(better, x, best), torch.where(better, total, lowest)


# ------------------------------------------------------------------------------------------------ step 4: distillation

class Pool:
    """All synthetic images of the run, uint8 on the device; nothing is ever thrown out."""

    def __init__(self, capacity: int, size: int, device: torch.device):
        self.storage, self.made = torch.empty(capacity, 3, size, size, dtype=torch.uint8, device=device), 0

    x = property(lambda self: self.storage[:self.made])

    def add(self, images: Tensor) -> None:
        self.storage[self.made:self.made + len(images)] = quantize(images)
        self.made += len(images)

    def state_dict(self) -> dict:
        return {"x": self.x.clone()}  # a view would take its whole storage into the file

    def load_state_dict(self, state: dict) -> None:
        self.storage[:len(state["x"])], self.made = state["x"], len(state["x"])


def curriculum(epoch: int, stop: int, first: float, last: float, schedule: str) -> float:
    """Eq. (11): from first (epoch 0) to last (epoch `stop` and later)."""
    p = epoch / max(stop, 1)
    if epoch >= stop:
        return last
    return {"cosine": last + 0.5 * (first - last) * (1 + math.cos(math.pi * p)),
            "linear": first - (first - last) * p, "none": first}[schedule]


def mixture_at(epoch: int, args: Args, n_shots: int) -> tuple[float, int]:
    """alpha and R of an epoch, within [0, 1] and [0, all shots]."""
    alpha = curriculum(epoch, args.mixed_distill_stop_epoch, args.alpha_initial, args.alpha_final_stage,
                       args.alpha_schedule)
    n_real = curriculum(epoch, args.mixed_distill_stop_epoch, args.real_fewshot_initial, args.real_fewshot_final_stage,
                        args.real_fewshot_schedule)
    return min(max(alpha, 0.0), 1.0), min(max(int(n_real), 0), n_shots)  # eq. (11)


def lr_recipe(args: Args) -> dict:
    """For lr_at, counted from the end of the warm-up."""
    return {"kind": "cosine", "lr": args.lr, "T_max": args.lr_tmax, "eta_min": 2e-4}  # D5: T_max is not epochs


def balanced_pass(labels: np.ndarray, batch_size: int, rng: np.random.RandomState) -> np.ndarray:
    """(len(labels) // batch_size, batch_size) indices, drawn round-robin over the classes; the rest is dropped (D5)."""
    classes = np.unique(labels)
    lists = {c: np.flatnonzero(labels == c).tolist() for c in classes}
    for left in lists.values():
        rng.shuffle(left)
    drawn = []
    for c in itertools.islice(itertools.cycle(classes), len(labels)):
        if not lists[c]:
            lists[c] = np.flatnonzero(labels == c).tolist()
            rng.shuffle(lists[c])
        drawn.append(lists[c].pop())
    n = len(labels) // batch_size
    return np.array(drawn[:n * batch_size], np.int64).reshape(n, batch_size)


def balanced_batches(labels: np.ndarray, batch_size: int, steps: int, rng: np.random.RandomState) -> np.ndarray:
    """(steps, batch_size) indices from as many passes as needed."""
    if not batch_size:
        return np.zeros((steps, 0), np.int64)
    passes = [balanced_pass(labels, batch_size, rng) for _ in range(-(-steps // (len(labels) // batch_size)))]
    return np.concatenate(passes)[:steps]


def taught_batches(pool: Pool, batch_size: int, teacher: Callable, view: Callable, generator: torch.Generator,
                   amp: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented pool batches with the teacher's logits, without end; each pass over the pool in a new order.

    On a GPU one teacher call serves four batches: it sees each image by itself, and small networks cost less so.
    """
    shuffled = (index for _ in itertools.count() for index in batches(pool.made, batch_size, generator))
    ahead = 4 if pool.x.is_cuda else 1
    while True:
        parts = [next(shuffled) for _ in range(ahead)]
        x = view(pool.x[torch.cat(parts)])
        with torch.no_grad(), autocast(x.device, amp):
            t_logits = teacher(x).float()
        sizes = [len(part) for part in parts]
        yield from zip(x.split(sizes), t_logits.split(sizes))


def kd_step(student: Callable, optimizer: torch.optim.Optimizer, x: Tensor, t_logits: Tensor, n_real: int,
            alpha: float, T: float, amp: str = "none") -> tuple[Tensor, Tensor, Tensor]:
    """One student step on [pool images; n_real shots] -> (total, pool mean, real mean) of eq. (10)."""
    with autocast(x.device, amp):
        s_logits = student(x)
    losses = kd_loss(s_logits.to(t_logits.dtype), t_logits, n_real, alpha, T)  # eq. (10)
    optimizer.zero_grad(set_to_none=True)
    losses[0].backward()
    optimizer.step()
    return losses


# -------------------------------------------------------------------------------------------------------------- main

def check(args: Args) -> None:
    if args.export_pool:
        fail("--export_pool: give --evaluate RUN_FOLDER too")
    if args.kd_steps > args.ep_steps:
        fail(f"--kd_steps {args.kd_steps}: give 1 to ep_steps ({args.ep_steps}): ep_steps // kd_steps rounds per epoch")
    if args.warmup >= args.epochs:
        fail(f"--warmup {args.warmup}: the student starts after it, give more --epochs than that, not {args.epochs}")
    n_real = args.real_fewshot_initial, args.real_fewshot_final_stage
    if not args.shots and max(args.guidance_loss_w, args.logits_guidance_w, *n_real):
        fail("--shots 0: the priors and the real batches need shots; --preset fast works without any")
    if not args.g_steps and not min(n_real):
        fail("--g_steps 0: nothing to learn from without real images; give both real_fewshot counts")


def check_teacher(args: Args, teacher: nn.Module) -> None:
    if args.g_steps and args.bn and not any(has_statistics(m) for m in teacher.modules()):
        fail(f"the teacher {args.teacher} has no BatchNorm2d for eq. (2); choose another one, or go on with --bn 0")
    source = args.teacher_feature_source
    met = any(isinstance(m, FEATURE_LAYERS[source]) for m in teacher.modules())
    if args.g_steps and args.guidance_loss_w and not met:
        fail(f"the teacher {args.teacher} has no layer for --teacher_feature_source {source}; choose the other one, or "
             "go on with --guidance_loss_w 0")


@torch.no_grad()
def see_shots(teacher: nn.Module, x: Tensor, y: Tensor, num_classes: int, source: str) -> Shots:
    """One pass over the (normalised) shots in pieces; logits and features per image do not depend on the piece."""
    logits, feats = [], []
    with tapped(teacher, source) as taps:
        for part in x.split(250):
            logits.append(teacher(part))
            feats.append(torch.cat(taps["feat"], 1) if taps["feat"] else x.new_zeros(len(part), 0))
            taps["feat"].clear()
    return Shots(torch.cat(feats), torch.cat(logits), y, num_classes)


def sample_grid(images: Tensor, targets: Tensor, x_real: Tensor, y_real: Tensor) -> tuple[Tensor, int]:
    """Rows of up to ten classes: five shots, then five synthetic images; black where there are fewer."""
    rows = targets.unique()[:10]
    grid = images.new_zeros(len(rows), 10, *images.shape[1:])
    for r, c in enumerate(rows):
        for column, part in ((0, x_real[y_real == c][:5]), (5, images[targets == c][:5])):
            grid[r, column:column + len(part)] = part
    return grid.flatten(0, 1), len(rows)


def export_pool(args: Args) -> dict:
    """RUN_FOLDER/pool.npz: x uint8 (N, H, W, 3)."""
    folder = Path(args.evaluate)
    saved = read_checkpoint(folder / "ckpt_last.pt") if folder.is_dir() else {}
    if "pool" not in saved.get("objects", {}):
        fail(f"--export_pool {args.evaluate}: not the folder of a pgdi run; give --evaluate RUN_FOLDER")
    x = saved["objects"]["pool"]["x"].permute(0, 2, 3, 1).contiguous().numpy()
    write_atomic(folder / "pool.npz", lambda f: np.savez(f, x=x))
    print(f"{len(x)} images written to {folder / 'pool.npz'}")
    return {"method": "pgdi", "synthetic_images": len(x)}


def main(args: Args) -> dict:
    if args.evaluate:
        return export_pool(args) if args.export_pool else evaluate_file(args)
    check(args)
    run = Run(args)
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    x_real, y_real, index = (data.few_shot(args.shots, "pgdi", args.seed) if args.shots else  # D2
                             (data.test_x[:0], data.test_y[:0], np.zeros(0)))
    student = build_model(args.student, data.num_classes, data.image_size,
                          init="default" if args.student.startswith("resnet") else "kaiming")
    student.to(run.device, memory_format=torch.channels_last)
    teacher, info = get_teacher(args, data, check=partial(check_teacher, args))
    statistics = BNStatistics(bn_order(teacher, data.normalize(data.test_x[:2])))
    optimizer = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    generator = Generator(ngf=args.ngf, size=data.image_size).to(run.device, memory_format=torch.channels_last)
    meta = torch.optim.Adam(generator.parameters(), args.lr_g * args.g_steps, (0.5, 0.999))
    v_real = data.normalize(x_real)
    source = args.teacher_feature_source if args.guidance_loss_w else "none"
    shots = see_shots(teacher, v_real, y_real, data.num_classes, source) if args.shots and args.g_steps else None
    t_real = predict(teacher, data, x_real) if args.shots else v_real.new_zeros(0, data.num_classes)  # D4
    labels, rounds = y_real.cpu().numpy(), args.ep_steps // args.kd_steps
    size = (args.synthesis_batch_size or args.batch_size) if args.g_steps else 0  # images per round
    pool = Pool(args.epochs * rounds * size, data.image_size, run.device)
    sampler = np.random.RandomState(args.seed % 2 ** 32)
    run.note(teacher=info, norm=data.norm, shots=index.tolist(),
             student_params_macs=count_params_macs(student, data.image_size))
    view = partial(data.random_view, generator=run.generator)
    net, guide = (torch.compile(m, dynamic=True) if args.compile else m for m in (student, teacher))
    start = run.restore(student=student, optimizer=optimizer, generator=generator, meta=meta, statistics=statistics,
                        pool=pool, sampler=sampler)
    for epoch in range(start, args.epochs):
        alpha, n_real = mixture_at(epoch, args, len(x_real))
        optimizer.param_groups[0]["lr"] = lr = lr_at(lr_recipe(args), max(0, epoch - args.warmup))
        for r in range(rounds):
            step = (epoch * rounds + r) * args.kd_steps
            if args.g_steps:
                # steps 1-3: invert the teacher, keep the best batch
                ep = epoch + 1
                if not r:
                    reset(generator, *resets_at(ep, args))
                draw = {"generator": run.generator, "device": run.device}
                z = torch.randn(size, generator.l1[0].in_features, **draw)
                targets = torch.randint(data.num_classes, (size,), **draw).sort()[0]
                images, terms = synthesize(generator, meta, teacher, student, z, targets, view, statistics, shots, ep,
                                           args)
                pool.add(images)
                run.log(step, epoch, **{f"loss_{name}": value for name, value in zip(TERMS, terms[-1])})
            if epoch < args.warmup:
                continue
            # step 4: distil from the pool and the shots
            real = balanced_batches(labels, n_real, args.kd_steps, sampler)
            real = torch.from_numpy(real).to(run.device)
            taught = (taught_batches(pool, args.batch_size, guide, view, run.generator, args.amp) if size else
                      itertools.repeat((v_real[:0], t_real[:0])))
            for i in run.bar(real, f"epoch {epoch + 1}"):
                x, t_logits = next(taught)
                x_shots, t_shots = v_real[i], t_real[i]
                if args.augment_real:
                    x_shots = view(x_real[i])
                    with torch.no_grad(), autocast(run.device, args.amp):
                        t_shots = guide(x_shots).float()
                loss, loss_pool, loss_real = kd_step(net, optimizer, torch.cat([x, x_shots]),
                                                     torch.cat([t_logits, t_shots]), n_real, alpha, args.T, args.amp)
                if step % args.log_every == 0:
                    run.log(step, epoch, loss_kd=loss, loss_pool=loss_pool, loss_real=loss_real, lr=lr, alpha=alpha,
                            n_real=n_real)
                step += 1
        if args.g_steps and run.due(epoch, args.save_every):
            run.grid(f"ep{epoch + 1:03d}", *sample_grid(quantize(images), targets, x_real, y_real))
        top1 = evaluate(student, data)["top1"] if run.due(epoch, args.eval_every) else None
        if not run.end_epoch(epoch, student, top1):
            return run.finish({})
    s_logits, preset = predict(student, data), "auto" if args.preset == "script" else args.preset
    return run.finish({"teacher_top1": info["top1"], **accuracy(s_logits, data.test_y),  # D3
                       **agreement(s_logits, data.t_logits), "n_test": len(data.test_y), "real_images": len(x_real),
                       "synthetic_images": pool.made,
                       "paper": published_row(PUBLISHED, preset, args.dataset, args.teacher, args.student, args.shots)})


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
