"""AdaDFKD: distil a student without any real image; a generator looks for images on which the student still errs.

Paper   Li, Zhou, Li, Wang, Bu, Yu, "AdaDFKD: Exploring adaptive inter-sample relationship in data-free knowledge
        distillation", Neural Networks 2024, doi 10.1016/j.neunet.2024.106386. The baselines of its table: --preset
        cudfkd, dafl, zskt, dfad, dfq (the same loop with other terms), adi, cmi (images made in other ways).
Data    none: training never opens the training split; the test split only for reporting.
Result  published, best test epoch of the best of many runs: CIFAR-100 WRN-40-2 -> WRN-16-2 67.54 (mean of those runs
        66.75 +- 0.44), CIFAR-10 ResNet-34 -> ResNet-18 95.32 (all cells, baselines too: PUBLISHED)

Each epoch, ep_steps // kd_steps times
  1. g_steps Adam steps of G: z ~ N(0, 1), x = G(z), t = T(x), s = S(x), both in eval mode; f_t, f_s pooled features
       L_G   = lmda_ent*H_T + balance*(-H_1) + adv*L_adv + oh*L_oh + act*L_act + bn*L_bn + hard*L_rel            (1)
       H_T   = -sum_c p_c log p_c,  p = batch mean of softmax(t / T)       lmda_ent < 0: the classes are balanced   (2)
       L_oh  = CE(t, argmax t),  L_act = -mean |f_t|     means over batch; over batch and channels                (3)
       L_bn  = sum_l ||V_l - v_l||_2 + ||M_l - m_l||_2   norm over channels, sum over batch-norm layers           (4)
       L_adv = -9 KL(softmax(t/3) || softmax(s/3)), batch mean, with a gradient through T and S                   (5)
       L_rel = mean_i -log softmax([a_i.k_i, ring_i] / tau)_0,  a = f_t/|f_t|, k = f_s/|f_s| without gradient     (6)
       ring_i: the products of a_i with the queue Q of the last N_neg keys k, sorted upwards, from h*N_neg to
               (h + length)*N_neg; h slides from easy (0) to hard (1 - length) over the epochs                    (7)
     then the keys overwrite the oldest of Q
  2. kd_steps SGD steps of S on new images of G, now in eval mode; t, f_t without gradient, l is one number per image
       l     = L_kd + s_nce*L_nce,   L_kd = T^2 KL(softmax(t/T) || softmax(s/T)), or mean |s-t|, or mean (s-t)^2  (8)
       L_nce = -log softmax(F_t F_s' / tau)_ii           rows of unit features; T's are the anchors               (9)
       L_S   = mean v*l,   v = (1 + e^-lam) / (1 + e^(l - lam))     self-paced weight without gradient           (10)
       lam   = lambda_0 + rate * (student steps so far),   rate 1e-4 for CIFAR-10, else 2e-5                     (11)
  3. adv for the next epoch grows by grad_adv inside (begin_fraction, end_fraction) of the epochs                (12)

Baselines that make their images otherwise, from targets y, and keep them in a pool (step 2 on crops and flips of it)
  adi  g_steps Adam steps on pixels x:     L = bn*L_bn + oh*CE(t, y) + adv*L_adv + tv*TV(x)                     (13)
  cmi  g_steps Adam steps on z, a new G:   L = bn*L_bn + oh*CE(t, y) + adv*L_adv + cr*L_cr, the best x is kept   (14)
       L_cr = -log softmax(H(local) H(global)' / cr_T)_ii    mean over new images + mean over images of a bank    (15)

Symbols  T -> teacher (temperature: args.T), S -> student, G -> generator, Q -> queue, lam -> lam, l -> rows,
         (M_l, V_l), (m_l, v_l) -> running, now; adv_type js, js_cu, kd, agree: other L_adv (adv_loss)

Deviations from the published code
  D1 it reports the best test epoch; here the last one, the best beside it
  D2 its queue asserts N_neg % batch = 0, which its own example breaks; here the write wraps around
  D3 one v per batch (curr_level batch) can stop S for good, one per image (sample) does so later; the rows of the table
     keep what made them; other pairs use no v, but DFQ's L_adv and balance (CIFAR-10, ResNet-20 -> WRN-16-1, 9,000
     steps: 58.0 % without these two, 63.3 with L_adv, 67.7 with both)
  D4 curr_option none drops its L_nce; here it stays
  D5 hooks only in step 1, frozen networks, one pass of G and T for the n student steps, upsampling and conv in one,
     batch norm folded into G: the same numbers (tests/test_adadfkd.py)
  D6 kept: unequal widths are bridged by a random map that is new at every call; --proj fixed draws it once
  D7 kept: L_adv at temperature 3, H_T at T; J clamps its three distributions; ADI keeps the last iterate
  D8 the memory of cudfkd, adi and cmi is a ring of --pool_size uint8 images on the device, not files without end
  D9 a local view of cmi that does not fit is cut to the image, not drawn again

  python adadfkd.py --smoke                                                                  # no download, a minute
  python adadfkd.py --dataset cifar100 --teacher wrn40_2 --student wrn16_2                   # the row above
  python adadfkd.py --preset cudfkd     # a baseline; cudfkd_memory, dafl, zskt, dfad, dfq, adi, cmi
"""
import contextlib
import itertools
import random
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator, Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (
    ChannelStatistics, Data, Run, accuracy, agreement, autocast, batches, build_model, cli, count_params_macs,
    evaluate_file, fail, get_teacher, has_statistics, load_data, lr_at, predict, published_row, quantize)


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
    student: str = "wrn16_2"  # network: a name in MODELS, or file.py:callable
    epochs: int = 200  # length of all schedules
    batch_size: int = 128  # images per student step
    lr: float = 0.1  # peak learning rate of the student, cosine per epoch
    weight_decay: float = 1e-4  # on all parameters
    momentum: float = 0.9  # SGD momentum
    T: float = 1.0  # temperature of eqs. (2) and (8)
    loss: Literal["l1", "l2", "kl"] = "l1"  # eq. (8)
    ep_steps: int = 400  # ep_steps // kd_steps rounds of steps 1 and 2 per epoch
    kd_steps: int = 10  # student steps per round
    # step 1
    g_steps: int = 1  # generator steps per round; adi, cmi: steps on the pixels, on (z, G)
    synthesis: Literal["generator", "adi", "cmi"] = "generator"  # how images are made: step 1, or eq. (13), (14)
    synthesis_batch_size: int = 0  # images per generator step; 0 = batch_size
    lr_g: float = 1e-3  # learning rate of the generator (adi: of the pixels; cmi: of z too)
    nz: int = 0  # size of z; 0 = 512 for 32 pixels, 1024 for 64
    ngf: int = 64  # width of the generator
    depth: int = 0  # times that the generator doubles the size; 0 = 2 for 32 pixels, 3 for 64
    init_g: Literal["normal", "default"] = "normal"  # normal: N(0, 0.02), batch norm N(1, 0.02)
    lmda_ent: float = -20.0  # weight of the entropy at T, eq. (2)
    balance: float = 0.0  # weight of minus the entropy at temperature 1
    oh: float = 1.0  # weight of L_oh, eq. (3)
    act: float = 0.0  # weight of L_act, eq. (3)
    bn: float = 1.0  # weight of eq. (4)
    adv: float = 0.0  # weight of eq. (5) in the first epoch
    adv_type: Literal["kl", "js", "js_cu", "kd", "agree"] = "kl"  # eq. (5): KL, 1 - J, -J, -eq. (8), agreeing images
    grad_adv: float = 0.0  # growth of adv per epoch, eq. (12)
    begin_fraction: float = 0.25  # of the epochs: both schedules begin
    end_fraction: float = 0.75  # of the epochs: both schedules end
    hard: float = 0.1  # weight of eq. (6)
    length: float = 1.0  # width of the ring, as a share of the queue
    tau: float = 0.07  # temperature of eqs. (6) and (9)
    N_neg: int = 6144  # keys in the queue
    proj: Literal["fresh", "fixed"] = "fresh"  # D6: random map for unequal widths, drawn at every call or once
    # step 2
    s_nce: float = 0.0  # weight of eq. (9)
    curr_option: Literal["none", "curr_hard", "curr_soft", "curr_log"] = "curr_log"  # v of eq. (10)
    curr_level: Literal["batch", "sample"] = "sample"  # D3: one v per step, or one per image
    lambda_0: float = 1.0  # first threshold of eq. (11)
    memory: bool = False  # the student learns from a pool of all images, cropped and flipped (always with adi, cmi)
    pool_size: int = 51200  # images in that pool, the oldest are overwritten
    # the baselines adi and cmi
    tv: float = 1e-3  # adi: weight of the total variation
    cr: float = 0.8  # cmi: weight of the contrastive term
    cr_T: float = 0.1  # cmi: its temperature
    bank_size: int = 40960  # cmi: images whose features are kept
    bank_draw: int = 4096  # cmi: of which each step draws so many


PAIRS = (("resnet34", "resnet18"), ("vgg11", "resnet18"), ("wrn40_2", "wrn40_1"), ("wrn40_2", "wrn16_2"),
         ("wrn40_2", "wrn16_1"))
CELLS = [(dataset, *pair) for dataset, n in (("cifar10", 5), ("cifar100", 4)) for pair in PAIRS[:n]]
TINY = ("tiny_imagenet", "resnet50_tiny", "resnet18_tiny")
FIELDS = ("batch_size", "epochs", "T", "loss", "adv", "grad_adv", "begin_fraction", "end_fraction", "lambda_0",
          "length", "s_nce", "N_neg", "kd_steps", "curr_level")
SMALL = dict(batch_size=64, epochs=40, T=20.0, loss="kl", lr=0.03, lr_g=2e-3, ngf=32)  # pairs without a row (D3)
TABLE = dict(lr=0.1, lr_g=1e-3, ngf=64, curr_option="curr_log")
ROWS = {cell: {**TABLE, "adv_type": "kl", "balance": 0.0, **dict(zip(FIELDS, values))} for cell, values in zip(
    [*CELLS, TINY], (
    (768, 250, 20.0, "kl", 1.0, 0.0, 0.2, 0.75, 2.3, 0.85, 0.2, 6144, 10, "batch"),
    (1024, 300, 20.0, "kl", 1.0, 0.0, 0.25, 0.75, 2.3, 1.0, 0.2, 6144, 10, "sample"),
    (1024, 250, 20.0, "kl", 1.0, 0.0, 0.25, 0.75, 1.3, 1.0, 0.2, 6144, 10, "sample"),
    (1024, 300, 20.0, "kl", 1.0, 0.0, 0.0, 0.75, 1.5, 0.9, 0.05, 49152, 10, "sample"),
    (1024, 300, 20.0, "kl", 1.0, 0.0, 0.0, 0.75, 1.5, 0.9, 0.05, 8192, 10, "sample"),
    (768, 700, 5.0, "l1", 0.0, 0.0, 0.2, 0.8, 1.2, 0.65, 0.1, 24576, 5, "batch"),
    (1024, 400, 5.0, "l1", 1.0, 0.0, 0.2, 0.8, 1.0, 0.8, 0.1, 12288, 5, "batch"),
    (1024, 500, 2.0, "kl", 0.0, 0.095, 0.2, 0.8, 1.2, 0.71, 0.15, 16384, 5, "batch"),
    (1024, 500, 2.0, "kl", 0.0, 0.095, 0.2, 0.8, 1.2, 0.8, 0.15, 16384, 5, "batch"),
    (64, 500, 5.0, "l1", 1.0, 0.0, 0.2, 0.75, 1.3, 0.81, 0.02, 16384, 10, "batch")))}
ROWS[TINY].update(hard=0.05, synthesis_batch_size=128)
NO_RELATION = dict(hard=0.0, s_nce=0.0, curr_option="none")
PLAIN = NO_RELATION | dict(init_g="default", lmda_ent=0.0, kd_steps=5)  # DAFL, ZSKT, DFAD, DFQ


def rows(**own) -> dict:
    """Values of a baseline for all pairs of the table: 250 or 300 epochs, its loss at T."""
    return {cell: TABLE | dict(curr_option="none", batch_size=1024, epochs=250 if cell[0] == "cifar10" else 300) | own
            for cell in [*CELLS, TINY]}


def cudfkd_rows(**own) -> dict:
    wide = dict(batch_size=1024, T=20.0, loss="kl", adv=1.0, lambda_0=2.0, memory=True)
    c10 = dict(batch_size=512, T=20.0, loss="l1", adv=0.0, grad_adv=0.5, lambda_0=2.0)
    c100 = dict(batch_size=768, T=5.0, loss="l1", adv=1.0, lambda_0=1.0, memory=True, begin_fraction=0.2,
                end_fraction=0.8)
    wide100 = dict(T=2.0, loss="kl", adv=0.0, grad_adv=0.15, lambda_0=1.0, begin_fraction=0.2)
    tiny = dict(batch_size=128, epochs=400, T=5.0, loss="l1", adv=1.0, grad_adv=0.1, lambda_0=1.5, begin_fraction=0.2)
    values = (c10, c10, wide, wide, wide, c100, c100, wide100, wide100, tiny)
    return {cell: row | TABLE | dict(curr_level="batch") | value | own
            for (cell, row), value in zip(rows().items(), values)}


KL1, KL20 = dict(loss="kl", T=1.0), dict(loss="kl", T=20.0)  # of the table, whatever the scripts of today pass
DAFL = PLAIN | dict(nz=512, balance=20.0, act=1e-3, bn=0.0)
ZSKT = PLAIN | dict(nz=256, oh=0.0, bn=0.0, adv=1.0, adv_type="kd")
DFQ = PLAIN | dict(nz=256, balance=20.0, adv=1.0, adv_type="kd", kd_steps=10)
ADI = NO_RELATION | dict(synthesis="adi", bn=10.0, adv=1.0, adv_type="js_cu", lmda_ent=0.0, g_steps=1000, kd_steps=400)
CMI = NO_RELATION | dict(synthesis="cmi", nz=256, adv=0.5, adv_type="agree", lmda_ent=0.0, g_steps=200, kd_steps=400)
RELATION = dict(curr_option="none", s_nce=0.1, length=0.9, N_neg=1024)
PRESETS = {
    "auto": {"*": SMALL | RELATION | dict(adv=1.0, adv_type="kd", balance=20.0), **ROWS},
    "script": {"*": dict(curr_level="batch"), **ROWS},  # what the published scripts run where they pass nothing
    "cudfkd": {"*": SMALL | NO_RELATION, **cudfkd_rows()},
    "cudfkd_memory": {"*": SMALL | NO_RELATION | dict(memory=True), **cudfkd_rows(memory=True)},
    "dafl": {"*": SMALL | DAFL, **rows(**KL1)},
    "zskt": {"*": SMALL | ZSKT, **rows(**KL1)},
    "dfad": {"*": SMALL | ZSKT | dict(loss="l1"), **rows(loss="l1", T=1.0)},
    "dfq": {"*": SMALL | DFQ, **rows(**KL1)},
    "adi": {"*": SMALL | ADI | dict(g_steps=200, lr_g=0.1), **rows(**KL20, batch_size=512, lr_g=0.1, g_steps=1000)},
    "cmi": {"*": SMALL | CMI | dict(lr_g=1e-3), **rows(**KL20, batch_size=256, synthesis_batch_size=512)},
    "demo": {"*": SMALL | RELATION | dict(dataset="shapes", teacher="resnet20", student="resnet8", epochs=6, g_steps=4,
                                          ep_steps=100, kd_steps=5, batch_size=32, ngf=16, T=4.0, lr=0.02, lr_g=1e-3,
                                          memory=True, eval_every=2)},
    "smoke": {"*": dict(dataset="shapes", teacher="resnet8", student="resnet8", limit_train=300, limit_test=200,
                        epochs=2, ep_steps=8, kd_steps=4, g_steps=1, batch_size=16, synthesis_batch_size=16, ngf=8,
                        N_neg=64, allow_weak_teacher=True)}}
IGNORED = ("lr_decay_milestones", "warmup", "no_feature", "only_feature", "l1", "L", "mu", "neg", "mode", "debug",
           "pretrained", "log_y_kl", "start_epoch", "workers", "log_fidelity")  # without effect, or always on
ALIASES = {"method": {"adadfkd": ("preset", "script"), **{name: ("preset", name) for name in PRESETS}},
           "wd": "weight_decay", "save_dir": "out_dir", "save_freq": "save_every", "print_freq": "log_every",
           "nt2_mode": {"none": None},
           **dict.fromkeys(IGNORED)}
PUBLISHED = {  # (preset, dataset, teacher, student, shots) -> top-1, protocol
    (preset, *cell, None): (top1, "best test epoch, best of many runs") for preset, column in {
        "auto": (95.32, 92.19, 93.38, 93.15, 90.05, 77.13, 71.52, 68.19, 67.54),
        "dafl": (92.22, 81.10, 81.33, 81.55, 72.15, 74.47, 57.29, 34.66, 40.00),
        "zskt": (93.32, 89.46, 86.07, 89.66, 83.74, 67.74, 34.72, 29.73, 28.44),
        "adi": (93.26, 90.36, 86.85, 89.72, 83.01, 61.32, 54.13, 61.33, 61.34),
        "dfq": (94.61, 90.84, 91.69, 92.01, 86.14, 77.01, 68.32, 61.92, 59.01),
        "cmi": (94.84, 91.13, 92.78, 92.52, 90.01, 77.02, 70.56, 66.89, 65.11),
        "cudfkd": (95.28, 91.61, 93.18, 92.98, 88.77, 75.87, 71.22, 66.43, 65.94)}.items()
    for cell, top1 in zip(CELLS, column)}


# --------------------------------------------------------------------------------------------------------- generator

class UpConv(nn.Conv2d):
    """Nearest x2 upsampling, then a 3x3 conv, as one transposed 4x4 conv of stride 2: the same sums, 2.25 times fewer.

    Nearest upsampling repeats pixels, so taps that meet the same pixel are added; zero padding maps to zero padding.
    """

    def forward(self, x: Tensor) -> Tensor:
        taps = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, 1)  # (out, in, 4, 4)
        return F.conv_transpose2d(x, taps.transpose(0, 1), self.bias, 2, 1)


def decoder(widths: list[int]) -> nn.Sequential:
    """(B, widths[0], side, side) -> images; the empty places keep the published key names (there: upsampling)."""
    layers = [nn.BatchNorm2d(widths[0])]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Identity(), UpConv(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b),
                   nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 3, 1, 1), nn.Sigmoid())


class Generator(nn.Module):
    """z (B, nz) -> images (B, 3, size, size) in [0, 1]; widths ngf*2^depth ... ngf; cmi: a narrower one."""

    def __init__(self, nz: int, ngf: int = 64, size: int = 32, depth: int = 2, cmi: bool = False):
        super().__init__()
        widths = [2 * ngf, 2 * ngf, ngf] if cmi else [ngf << d for d in range(depth, -1, -1)]
        self.side = size >> len(widths) - 1
        linear = nn.Linear(nz, widths[0] * self.side ** 2)
        if cmi:  # the published key names
            self.l1, self.conv_blocks = nn.Sequential(linear), decoder(widths)
        else:
            self.project, self.main = nn.Sequential(nn.Flatten(), linear), decoder(widths)

    def forward(self, z: Tensor) -> Tensor:
        project, main = self.children()
        x = project(z).view(len(z), -1, self.side, self.side)
        return main(x.contiguous(memory_format=torch.channels_last))


def init_normal(net: nn.Module) -> nn.Module:
    """Convs and Linears N(0, 0.02), batch norms N(1, 0.02), biases 0."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            nn.init.normal_(m.weight, float(isinstance(m, nn.BatchNorm2d)), 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net


@torch.no_grad()
def folded(generator: Generator) -> Generator:
    """A copy in eval mode whose batch norms have gone into the layers before them (the first into the projection)."""
    net = deepcopy(generator).eval().requires_grad_(False)
    for i, bn in enumerate(net.main):
        if isinstance(bn, nn.BatchNorm2d):
            layer = net.main[i - 1] if i else net.project[1]
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            shift = bn.bias - bn.running_mean * scale
            if not i:  # each channel of the projection's output is a run of side^2 rows
                scale, shift = (v.repeat_interleave(net.side ** 2) for v in (scale, shift))
            shift = shift if layer.bias is None else shift + layer.bias * scale
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias = nn.Parameter(shift, requires_grad=False)
            net.main[i] = nn.Identity()
    return net


# ------------------------------------------------------------------------------------------------------------ losses

def kd_rows(s_logits: Tensor, t_logits: Tensor, loss: str, T: float) -> Tensor:
    """Eq. (8) of each image: kl T^2 times the sum over classes, l1 and l2 the mean over classes."""
    if loss == "kl":
        return T * T * F.kl_div(F.log_softmax(s_logits / T, 1), F.log_softmax(t_logits / T, 1), reduction="none",
                                log_target=True).sum(1)
    difference = s_logits - t_logits
    return (difference.abs() if loss == "l1" else difference.square()).mean(1)


def js_divergence(s_logits: Tensor, t_logits: Tensor, T: float = 3.0) -> Tensor:
    """J of eq. (5): half the sum over classes of KL(M || P) + KL(M || Q), mean over batch, clamped to [0, 1] (D7)."""
    p, q = F.softmax(s_logits / T, 1), F.softmax(t_logits / T, 1)
    m = ((p + q) / 2).clamp(0.01, 0.99)
    p, q = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99)
    return ((m * (2 * m.log() - p.log() - q.log())).sum() / (2 * len(p))).clamp(0, 1)


def adv_loss(s_logits: Tensor, t_logits: Tensor, kind: str, loss: str = "kl", T: float = 1.0) -> Tensor:
    """Eq. (5) and its variants, batch means, gradient into both: kl and J at temperature 3; js 1 - J, js_cu -J;
    kd minus eq. (8); agree minus the KL at temperature 1 where both name the same class."""
    if kind in ("js", "js_cu"):
        return (1 if kind == "js" else 0) - js_divergence(s_logits, t_logits)
    if kind == "agree":
        return -((s_logits.argmax(1) == t_logits.argmax(1)) * kd_rows(s_logits, t_logits, "kl", 1.0)).mean()
    if kind == "kl":
        loss, T = "kl", 3.0
    return -kd_rows(s_logits, t_logits, loss, T).mean()


def entropy(t_logits: Tensor, T: float) -> Tensor:
    """Eq. (2): of the batch mean of the class probabilities; sum over classes."""
    p = F.softmax(t_logits / T, 1).mean(0).clamp(min=1e-30)
    return -(p * p.log()).sum()


def bn_layers(teacher: nn.Module) -> list[nn.Module]:
    return [m for m in teacher.modules() if has_statistics(m)]


def bn_distance(m: nn.BatchNorm2d, h: Tensor) -> Tensor:
    """Eq. (4) of one layer, mean and biased variance (2, C_l) of its input h against its own. Norm over channels."""
    running, now = torch.stack([m.running_mean, m.running_var]), ChannelStatistics.apply(h)
    return (now - running).norm(dim=1).sum()


def ring_loss(t_feat: Tensor, s_feat: Tensor, negatives: Tensor, window: tuple[int, int], tau: float
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (6) against the window of the sorted products with the queue (D, N_neg), mean over batch -> also the keys
    (B, D) for the queue and the mean product in the ring."""
    anchors, keys = F.normalize(t_feat), F.normalize(s_feat.detach())
    positive = (anchors * keys).sum(1, keepdim=True)  # (B, 1)
    ring = (anchors @ negatives).sort(1)[0][:, slice(*window)]  # eq. (7), (B, hi - lo)
    logits = torch.cat([positive, ring], 1) / tau
    return (logits.logsumexp(1) - logits[:, 0]).mean(), keys, ring.detach().sum() / max(ring.numel(), 1)


def nce_rows(t_feat: Tensor, s_feat: Tensor, tau: float) -> Tensor:
    """Eq. (9) of each image."""
    similarity = F.normalize(t_feat) @ F.normalize(s_feat).T / tau  # (B, B)
    return F.cross_entropy(similarity, torch.arange(len(t_feat), device=t_feat.device), reduction="none")


def self_paced(rows: Tensor, lam: float, option: str) -> Tensor:
    """v of eq. (10)."""
    if option == "curr_log":
        return (1 + torch.exp(rows.new_tensor(-lam))) / (1 + torch.exp(rows - lam))
    if option == "none":
        return torch.ones_like(rows)
    return (rows < lam).to(rows.dtype) * (1 - rows / lam if option == "curr_soft" else 1.0)


def student_loss(s_logits: Tensor, t_logits: Tensor, s_feat: Tensor, t_feat: Tensor, lam: float, args: "Args"
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. (10) -> (L_S, difficulty = mean of l weighted by v, mean v, mean L_nce)."""
    rows, nce = kd_rows(s_logits, t_logits, args.loss, args.T), s_logits.new_zeros(1)  # eq. (8)
    if args.s_nce:  # D4
        nce = nce_rows(t_feat, s_feat, args.tau)  # eq. (9)
        rows = rows + args.s_nce * nce
    if args.curr_level == "batch":
        rows = rows.mean(0, keepdim=True)
    v = self_paced(rows.detach(), lam, args.curr_option)
    weight = v + 1e-30  # defined where all v are 0
    return (v * rows).mean(), (weight * rows).sum() / weight.sum(), v.mean(), nce.mean()  # eq. (10)


# ------------------------------------------------------------------------------------------------ schedules and state

def hard_at(epoch: int, args: Args) -> float:
    """h of eq. (7): 0 before begin_fraction, 1 - length from end_fraction on."""
    begin, span = int(args.begin_fraction * args.epochs), int(args.epochs * (args.end_fraction - args.begin_fraction))
    return min(max((1 - args.length) * (epoch - begin) / max(span, 1), 0), 1 - args.length)


def window_at(h: float, args: Args) -> tuple[int, int]:
    return int(h * args.N_neg), int((h + args.length) * args.N_neg)


def adv_at(epoch: int, args: Args) -> float:
    """Eq. (12): set at the end of the epoch before; without a v it stays, and jumps at end_fraction (kept)."""
    begin, end = int(args.begin_fraction * args.epochs), int(args.end_fraction * args.epochs)
    grown = min(epoch - 1, end) - begin
    if grown <= 0 or (epoch - 1 < end and args.curr_option == "none"):
        return args.adv
    return args.adv + grown * args.grad_adv  # eq. (12)


def lr_recipe(args: Args) -> dict:
    return {"kind": "cosine", "lr": args.lr, "T_max": args.epochs}


LAMBDA_RATE, OTHER_RATE = {"cifar10": 1e-4}, 2e-5


def lam_at(step: int, lambda_0: float, rate: float) -> float:
    return lambda_0 + rate * step  # eq. (11)


class Queue(nn.Module):
    """Unit features of the student (D, N_neg) on earlier images, and those images for the grids, as uint8."""

    def __init__(self, dim: int, n: int, size: int, generator: torch.Generator):
        super().__init__()
        draw = {"generator": generator, "device": generator.device}
        self.register_buffer("keys", F.normalize(torch.randn(dim, n, **draw), dim=0))
        self.register_buffer("images", torch.zeros(n, 3, size, size, dtype=torch.uint8, device=generator.device))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64, device=generator.device))

    def add(self, keys: Tensor, images: Tensor) -> None:
        """Over the oldest columns, wrapping around (D2)."""
        at = (torch.arange(len(keys), device=keys.device) + self.ptr) % self.keys.shape[1]
        self.keys[:, at], self.images[at] = keys.T, quantize(images)
        self.ptr.add_(len(keys)).remainder_(self.keys.shape[1])


class Projection(nn.Module):
    """Random map from the width of S's features to that of T's, never trained; the identity where they are equal."""

    def __init__(self, dim_s: int, dim_t: int, mode: str, generator: torch.Generator):
        super().__init__()
        self.dims, self.fresh, self.generator = (dim_t, dim_s), mode == "fresh", generator
        for name, value in zip(("weight", "bias"), self.draw() if dim_s != dim_t else (None, None)):
            self.register_buffer(name, value)

    def draw(self) -> tuple[Tensor, Tensor]:
        bound, draw = self.dims[1] ** -0.5, {"generator": self.generator, "device": self.generator.device}
        return tuple((2 * torch.rand(shape, **draw) - 1) * bound for shape in (self.dims, self.dims[:1]))

    def forward(self, s_feat: Tensor) -> Tensor:
        if self.weight is None:
            return s_feat
        if self.fresh:  # D6
            self.weight, self.bias = self.draw()
        return F.linear(s_feat, self.weight, self.bias)


class Pool:
    """The last `capacity` synthetic images, uint8 on the device (D8)."""

    def __init__(self, capacity: int, size: int, device: torch.device):
        self.storage, self.made = torch.zeros(capacity, 3, size, size, dtype=torch.uint8, device=device), 0

    x = property(lambda self: self.storage[:self.made])

    def add(self, images: Tensor) -> None:
        at = (torch.arange(len(images), device=images.device) + self.made) % len(self.storage)
        self.storage[at] = quantize(images)
        self.made += len(images)

    def state_dict(self) -> dict:
        return {"x": self.x.clone(), "made": self.made}  # a view would take its whole storage into the file

    def load_state_dict(self, state: dict) -> None:
        self.storage[:len(state["x"])], self.made = state["x"], state["made"]


# ------------------------------------------------------------------------------------------------- step 1: generator

@contextlib.contextmanager
def tapped(layers: list[nn.Module], statistic: Callable) -> Iterator[list]:
    """While open, each pass appends statistic(layer, input) of these layers."""
    taps: list = []

    def hook(m: nn.Module, inputs: tuple) -> None:
        taps.append(statistic(m, inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))))

    hooks = [m.register_forward_pre_hook(hook) for m in layers]
    try:
        yield taps
    finally:
        for h in hooks:
            h.remove()


TERMS = ("total", "ent", "balance", "adv", "oh", "act", "bn", "rel", "ring_similarity")


def generator_step(generator: Generator, optimizer: torch.optim.Optimizer, teacher: nn.Module, student: nn.Module,
                   z: Tensor, data: Data, queue: Optional[Queue], window: tuple[int, int], project: Callable,
                   adv: float, args: Args) -> tuple[Tensor, Tensor]:
    """Step 1, one Adam step -> (images in [0, 1], terms in the order of TERMS). Without a host sync."""
    generator.train()
    student.eval().requires_grad_(False)
    loss_adv = loss_rel = loss_bn = similarity = z.new_zeros(())
    with autocast(z.device, args.amp), tapped(bn_layers(teacher) if args.bn else [], bn_distance) as taps:
        x = generator(z)
        v = data.normalize(x.float())
        t_logits, t_feats = teacher(v, return_features=True)
    t_logits, t_feat = t_logits.float(), t_feats[-1].float()
    if adv or args.hard:
        with autocast(z.device, args.amp):
            s_logits, s_feats = student(v, return_features=True)
    ent, ent_1 = entropy(t_logits, args.T), entropy(t_logits, 1.0)  # eq. (2)
    loss_oh = F.cross_entropy(t_logits, t_logits.argmax(1))  # eq. (3)
    loss_act = -t_feat.abs().mean()  # eq. (3)
    if args.bn:
        loss_bn = torch.stack(taps).sum()  # eq. (4)
    if adv:
        loss_adv = adv_loss(s_logits.float(), t_logits, args.adv_type, args.loss, args.T)  # eq. (5)
    if args.hard:
        loss_rel, keys, similarity = ring_loss(t_feat, project(s_feats[-1].float()), queue.keys, window,
                                               args.tau)  # eq. (6)
    loss = (args.lmda_ent * ent - args.balance * ent_1 + adv * loss_adv + args.oh * loss_oh + args.act * loss_act
            + args.bn * loss_bn + args.hard * loss_rel)  # eq. (1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if args.hard:
        queue.add(keys, x.detach())
    student.train().requires_grad_(True)
    terms = (loss, ent, -ent_1, loss_adv, loss_oh, loss_act, loss_bn, loss_rel, similarity)
    return x.detach().float(), torch.stack(terms).detach()


# --------------------------------------------------------------------------------------------------- step 2: student

@torch.no_grad()
def fresh_batches(generator: Generator, teacher: Callable, z: Tensor, data: Data, piece: int, amp: str
                  ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For z (n, B, nz): n batches (images, t_logits, t_feat). Between two generator steps G and T treat each image
    by itself, so one pass over as many batches as make up `piece` images serves them all (D5)."""
    net, n = folded(generator), max(1, piece // z.shape[1])
    for part in z.split(n):
        with autocast(z.device, amp):
            x = data.normalize(net(part.flatten(0, 1)).float())
            t_logits, t_feats = teacher(x, return_features=True)
        yield from zip(*(v.float().split(z.shape[1]) for v in (x, t_logits, t_feats[-1])))


@torch.no_grad()
def pool_batches(pool: Pool, teacher: Callable, steps: int, data: Data, generator: torch.Generator, args: Args
                 ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """That many shuffled batches of the pool, cropped and flipped, with the teacher's outputs."""
    passes = (index for _ in itertools.count() for index in batches(len(pool.x), args.batch_size, generator))
    for index in itertools.islice(passes, steps):
        x = data.random_view(pool.x[index], generator)
        with autocast(x.device, args.amp):
            t_logits, t_feats = teacher(x, return_features=True)
        yield x, t_logits.float(), t_feats[-1].float()


def student_step(student: Callable, optimizer: torch.optim.Optimizer, x: Tensor, t_logits: Tensor, t_feat: Tensor,
                 project: Callable, lam: float, args: Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step 2, one SGD step -> what student_loss gives."""
    with autocast(x.device, args.amp):
        s_logits, s_feats = student(x, return_features=True)
    s_feat = project(s_feats[-1].float()) if args.s_nce else s_feats[-1]
    losses = student_loss(s_logits.float(), t_logits, s_feat, t_feat, lam, args)  # eq. (10)
    optimizer.zero_grad(set_to_none=True)
    losses[0].backward()
    optimizer.step()
    return losses


# --------------------------------------------------------------------- step 1 otherwise: the baselines ADI and CMI

def roll_flip(x: Tensor, dy: int, dx: int, flip: bool) -> Tensor:
    x = torch.roll(x, (dy, dx), (2, 3))
    return x.flip(3) if flip else x


def random_roll(x: Tensor) -> Tensor:
    """One shift of up to an eighth of the size and one flip for the whole batch."""
    reach = x.shape[-1] // 8
    return roll_flip(x, random.randint(-reach, reach), random.randint(-reach, reach), random.random() < 0.5)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute differences of neighbours: right, down and both diagonals, summed."""
    pairs = ((x[..., :, 1:], x[..., :, :-1]), (x[..., 1:, :], x[..., :-1, :]), (x[..., 1:, 1:], x[..., :-1, :-1]),
             (x[..., 1:, :-1], x[..., :-1, 1:]))
    return sum((a - b).abs().mean() for a, b in pairs)


def clip(x: Tensor, data: Data) -> Tensor:
    """To the values that normalised images can have."""
    low, high = (data.normalize(x.new_full((1, 3, 1, 1), v)) for v in (0.0, 1.0))
    return torch.minimum(torch.maximum(x, low), high)


def see(v: Tensor, targets: Tensor, teacher: nn.Module, student: nn.Module, layers: list[nn.Module],
        statistic: Callable, args: Args) -> tuple[Tensor, list[Tensor]]:
    """The terms that ADI and CMI share, eqs. (13), (14), and statistic(layer, input) of the layers."""
    with autocast(v.device, args.amp), tapped(bn_layers(teacher) if args.bn else [], bn_distance) as bn, \
            tapped(layers, statistic) as taps:
        t_logits = teacher(v).float()
        s_logits = student(v).float() if args.adv else None
    loss = args.oh * F.cross_entropy(t_logits, targets)
    if bn:
        loss = loss + args.bn * torch.stack(bn).sum()  # eq. (4)
    if args.adv:
        loss = loss + args.adv * adv_loss(s_logits, t_logits, args.adv_type)  # eq. (5)
    return loss, taps


def adi_images(x: Tensor, targets: Tensor, teacher: nn.Module, student: nn.Module, jitter: Callable, data: Data,
               args: Args) -> tuple[Tensor, Tensor]:
    """ADI: g_steps Adam steps on normalised pixels -> (the last images in [0, 1] (D7), losses (g_steps,))."""
    student.eval().requires_grad_(False)
    x, losses = x.clone(memory_format=torch.channels_last).requires_grad_(), []
    adam = torch.optim.Adam([x], args.lr_g, (0.5, 0.99))
    for _ in range(args.g_steps):
        loss, _ = see(jitter(x), targets, teacher, student, [], bn_distance, args)
        loss = loss + args.tv * total_variation(x)  # eq. (13)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        with torch.no_grad():
            x.copy_(clip(x, data))
        losses.append(loss.detach())
    student.train().requires_grad_(True)
    return data.denormalize(x.detach()), torch.stack(losses)


class Contrast(nn.Module):
    """CMI's head, and its bank of features (before the head) of the local and global views of earlier images."""

    def __init__(self, dim: int, capacity: int, width: int = 256):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, width))
        self.register_buffer("bank", torch.zeros(capacity, 2, dim), persistent=False)
        self.made = 0

    def add(self, local: Tensor, whole: Tensor) -> None:
        at = (torch.arange(len(local), device=local.device) + self.made) % len(self.bank)
        self.bank[at] = torch.stack([local, whole], 1).detach()
        self.made += len(local)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(at most n, 2, D) kept features, without replacement."""
        filled = min(self.made, len(self.bank))
        return self.bank[torch.randperm(filled, generator=generator, device=self.bank.device)[:n]]

    def forward(self, feats: Tensor) -> Tensor:
        return F.normalize(self.head(feats))

    def get_extra_state(self) -> dict:  # the part of the bank that is filled
        return {"made": self.made, "bank": self.bank[:self.made].clone()}

    def set_extra_state(self, state: dict) -> None:
        self.made, self.bank[:len(state["bank"])] = state["made"], state["bank"]


def contrast_loss(local: Tensor, whole: Tensor, kept: Tensor, contrast: Contrast, T: float) -> Tensor:
    """Eq. (15): local views (rows) against global ones without gradient; mean over new rows + mean over kept rows."""
    lines = contrast(torch.cat([local, kept[:, 0]]))
    columns = contrast(torch.cat([whole, kept[:, 1]])).detach()
    losses = F.cross_entropy(lines @ columns.T / T, torch.arange(len(lines), device=lines.device), reduction="none")
    return sum(part.mean() for part in losses.split([len(local), len(kept)]) if len(part))  # eq. (15)


def local_view(x: Tensor, data: Data, generator: torch.Generator) -> Tensor:
    """Random part of each image (area 1/4 to 1, aspect 3/4 to 4/3), resized bilinearly, perhaps flipped, normalised."""
    u = torch.rand(5, len(x), generator=generator, device=x.device)
    area, aspect = 0.25 + 0.75 * u[0], ((2 * u[1] - 1) * torch.log(x.new_tensor(4 / 3))).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # D9
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(u[2] < 0.5, -width, width), height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * u[3] - 1), (1 - height) * (2 * u[4] - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return data.normalize(F.grid_sample(x, grid, padding_mode="border", align_corners=False))


def feature_layers(teacher: nn.Module, name: str) -> list[nn.Module]:
    """Whose inputs give CMI's features: the four stages of ResNet-34 and -50, every batch norm otherwise."""
    if name.startswith(("resnet34", "resnet50")) and ".py:" not in name:
        return [getattr(teacher, f"layer{i}") for i in range(1, 5)]
    return bn_layers(teacher)


def channel_means(_: nn.Module, h: Tensor) -> Tensor:
    return h.mean((2, 3))


def cmi_images(generator: Generator, z: Tensor, targets: Tensor, teacher: nn.Module, student: nn.Module,
               views: Callable, contrast: Contrast, head_adam: torch.optim.Optimizer, layers: list[nn.Module],
               rng: torch.Generator, args: Args) -> tuple[Tensor, Tensor]:
    """CMI: g_steps Adam steps on z and a new generator -> (images of the lowest loss, losses (g_steps,))."""
    student.eval().requires_grad_(False)
    generator, z, losses = generator.train(), z.clone().requires_grad_(), []
    adam = torch.optim.Adam([*generator.parameters(), z], args.lr_g, (0.5, 0.999))
    best, lowest = None, z.new_tensor(torch.inf)
    for _ in range(args.g_steps):
        with autocast(z.device, args.amp):
            x = generator(z)
        x = x.float()
        part, full = views(x)
        loss, taps = see(full, targets, teacher, student, layers, channel_means, args)
        whole = torch.cat(taps, 1)
        with autocast(z.device, args.amp), tapped(layers, channel_means) as taps:
            teacher(part)
        local = torch.cat(taps, 1)
        kept = contrast.draw(args.bank_draw, rng)
        loss = loss + args.cr * contrast_loss(local, whole, kept, contrast, args.cr_T)  # eq. (14)
        now = [v.detach() for v in (x, local, whole)]
        better = loss.detach() < lowest
        best = now if best is None else [torch.where(better, a, b) for a, b in zip(now, best)]
        lowest = torch.minimum(lowest, loss.detach())
        losses.append(loss.detach())
        for optimizer in (adam, head_adam):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        head_adam.step()
    contrast.add(*best[1:])
    student.train().requires_grad_(True)
    return best[0], torch.stack(losses)


# -------------------------------------------------------------------------------------------------------------- main

def check(args: Args) -> None:
    made, game = args.synthesis_batch_size, args.synthesis == "generator"
    if not args.g_steps:
        fail("--g_steps 0: the images need one step or more")
    if args.kd_steps > args.ep_steps:
        fail(f"--kd_steps {args.kd_steps}: give 1 to ep_steps ({args.ep_steps}): ep_steps // kd_steps rounds per epoch")
    if not args.begin_fraction <= args.end_fraction <= 1:
        fail(f"--begin_fraction {args.begin_fraction}, --end_fraction {args.end_fraction}: give begin_fraction <= "
             "end_fraction <= 1")
    if not 0 < args.length <= 1:
        fail(f"--length {args.length}: a share of the queue, more than 0 and at most 1")
    if args.curr_option == "curr_soft" and not args.lambda_0:
        fail("--lambda_0 0: curr_soft divides by it; give more")
    if game and args.hard and made > args.N_neg:
        fail(f"--N_neg {args.N_neg}: the queue must hold a batch of {made}; give more, or --hard 0")
    if (args.memory or not game) and made > args.pool_size or args.synthesis == "cmi" and made > args.bank_size:
        fail(f"--pool_size {args.pool_size}, --bank_size {args.bank_size}: they must hold a batch of {made}; give more")


def check_teacher(args: Args, teacher: nn.Module) -> None:
    if (args.bn or args.synthesis == "cmi") and not bn_layers(teacher):
        fail(f"the teacher {args.teacher} has no BatchNorm2d for eq. (4); choose another one"
             f"{'' if args.synthesis == 'cmi' else ', or go on with --bn 0'}")


@torch.no_grad()
def feature_dim(net: nn.Module, name: str, data: Data) -> int:
    training = net.training
    feats = net.eval()(data.normalize(data.test_x[:2]), return_features=True)[1]
    net.train(training)
    if not feats or feats[-1].ndim != 2:
        fail(f"{name} gives no pooled features (B, D); end it with a Linear, or return (logits, [..., features])")
    return feats[-1].shape[1]


def class_grid(images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Up to ten images of each of up to ten predicted classes, a row each; black where there are fewer."""
    rows = labels.unique()[:10]
    grid = images.new_zeros(len(rows), 10, *images.shape[1:])
    for r, c in enumerate(rows):
        part = images[labels == c][:10]
        grid[r, :len(part)] = part
    return grid.flatten(0, 1), len(rows)


def ring_grid(images: Tensor, t_feat: Tensor, queue: Queue, window: tuple[int, int]) -> tuple[Tensor, int]:
    """Rows: an anchor, then the images behind the eight hardest negatives of its ring; black: not yet overwritten."""
    order = (F.normalize(t_feat[:8]) @ queue.keys).argsort(1)[:, slice(*window)][:, -8:].flip(1)  # (8, 8)
    return torch.cat([images[:8, None], queue.images[order]], 1).flatten(0, 1), len(order)


def main(args: Args) -> dict:
    if args.evaluate:
        return evaluate_file(args)
    args.synthesis_batch_size = args.synthesis_batch_size or args.batch_size
    check(args)
    run = Run(args)
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    args.nz, args.depth = args.nz or 16 * data.image_size, args.depth or (3 if data.image_size >= 64 else 2)
    if args.synthesis == "generator" and (data.image_size % 2 ** args.depth or data.image_size >> args.depth < 2):
        fail(f"--depth {args.depth}: {data.image_size} pixels cannot be halved so often")
    student = build_model(args.student, data.num_classes, data.image_size)
    student.to(run.device, memory_format=torch.channels_last)
    dim_s = feature_dim(student, args.student, data)
    teacher, info = get_teacher(args, data, check=partial(check_teacher, args))
    dim_t = feature_dim(teacher, args.teacher, data)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    project, frozen = Projection(dim_s, dim_t, args.proj, run.generator), nn.Module()
    frozen.register_buffer("steps", torch.zeros((), device=run.device))  # student steps in a row with v under 1e-3
    if dim_s != dim_t and (args.hard or args.s_nce):
        print(f"features: {dim_s} of the student, {dim_t} of the teacher; a random map between them ({args.proj})")
    objects = dict(student=student, optimizer=optimizer, project=project, frozen=frozen)
    generator = queue = pool = None
    if args.synthesis == "generator":
        generator = Generator(args.nz, args.ngf, data.image_size, args.depth)
        if args.init_g == "normal":
            init_normal(generator)
        generator.to(run.device, memory_format=torch.channels_last)
        adam = torch.optim.Adam(generator.parameters(), args.lr_g, (0.9, 0.99))
        queue = Queue(dim_t, args.N_neg if args.hard else 1, data.image_size, run.generator)
        objects |= dict(generator=generator, adam=adam, queue=queue)
    if args.synthesis == "cmi":
        layers = feature_layers(teacher, args.teacher)
        with torch.no_grad(), tapped(layers, channel_means) as taps:
            teacher(data.normalize(data.test_x[:2]))
        contrast = Contrast(torch.cat(taps, 1).shape[1], args.bank_size).to(run.device)
        head_adam = torch.optim.Adam(contrast.head.parameters(), 1e-3)
        objects |= dict(contrast=contrast, head_adam=head_adam)

        def views(x: Tensor) -> tuple[Tensor, Tensor]:
            return local_view(x, data, run.generator), data.random_view(x, run.generator)
    if args.memory or args.synthesis != "generator":
        pool = objects["pool"] = Pool(args.pool_size, data.image_size, run.device)
    run.note(teacher=info, norm=data.norm, nz=args.nz, depth=args.depth,
             student_params_macs=count_params_macs(student, data.image_size))
    net, guide = (torch.compile(m) if args.compile else m for m in (student, teacher))
    rate, rounds = LAMBDA_RATE.get(data.name, OTHER_RATE), args.ep_steps // args.kd_steps
    draw, warned = {"generator": run.generator, "device": run.device}, False
    size, piece = args.synthesis_batch_size, 2048 if run.device.type == "cuda" else 0
    start = run.restore(**objects)
    for epoch in range(start, args.epochs):
        h, adv, lr = hard_at(epoch, args), adv_at(epoch, args), lr_at(lr_recipe(args), epoch)
        optimizer.param_groups[0]["lr"], window = lr, window_at(h, args)
        made = torch.zeros(data.num_classes, device=run.device)
        for r in run.bar(range(rounds), f"epoch {epoch + 1}"):
            step = (epoch * rounds + r) * args.kd_steps
            # step 1: make images
            for _ in range(args.g_steps if generator else 0):
                z = torch.randn(size, args.nz, **draw)
                images, terms = generator_step(generator, adam, teacher, student, z, data, queue, window, project, adv,
                                               args)
                made_of = {f"loss_{name}": value for name, value in zip(TERMS, terms)}
                if pool:
                    pool.add(images)
            if generator is None:  # ADI or CMI
                targets = torch.randint(data.num_classes, (size,), **draw).sort()[0]
                if args.synthesis == "adi":
                    x = torch.randn(size, 3, data.image_size, data.image_size, **draw)
                    images, losses = adi_images(x, targets, teacher, student, random_roll, data, args)
                else:
                    fresh = init_normal(Generator(args.nz, args.ngf, data.image_size, cmi=True))
                    fresh.to(run.device, memory_format=torch.channels_last)
                    images, losses = cmi_images(fresh, torch.randn(size, args.nz, **draw), targets, teacher, student,
                                                views, contrast, head_adam, layers, run.generator, args)
                pool.add(images)
                made_of = {"loss_first": losses[0], "loss_total": losses[-1]}
            # step 2: distil
            if pool:
                taught = pool_batches(pool, guide, args.kd_steps, data, run.generator, args)
            else:
                z = torch.randn(args.kd_steps, args.batch_size, args.nz, **draw)
                taught = fresh_batches(generator, guide, z, data, piece, args.amp)
            for x, t_logits, t_feat in taught:
                lam = lam_at(step, args.lambda_0, rate)
                loss, difficulty, v, nce = student_step(net, optimizer, x, t_logits, t_feat, project, lam, args)
                frozen.steps.copy_(torch.where(v < 1e-3, frozen.steps + 1, 0.0))
                made += F.one_hot(t_logits.argmax(1), data.num_classes).sum(0)
                if step % args.log_every == 0 or step + 1 == (epoch + 1) * rounds * args.kd_steps:
                    run.log(step, epoch, loss_kd=loss, loss_nce=nce, difficulty=difficulty, v=v, lam=lam, h=h, adv=adv,
                            lr=lr, frozen_steps=frozen.steps, **made_of)
                    if run.last_logged["frozen_steps"] >= 200 and not warned:
                        warned = True
                        print("warning: v was under 0.001 for 200 steps, the student is frozen; try --curr_level "
                              "sample, a larger --lambda_0 or --curr_option none", flush=True)
                step += 1
        if run.due(epoch, args.save_every):
            with torch.no_grad():
                if generator is not None:  # of the same z every time
                    z = torch.randn(200, args.nz, device=run.device,
                                    generator=torch.Generator(run.device).manual_seed(args.seed))
                    images = folded(generator)(z)
                t_logits, t_feats = teacher(data.normalize(images), return_features=True)
            run.grid(f"ep{epoch + 1:03d}", *class_grid(quantize(images), t_logits.argmax(1)))
            if generator is not None and args.hard:
                run.grid(f"ring{epoch + 1:03d}", *ring_grid(quantize(images), t_feats[-1], queue, window))
        top1 = None
        if run.due(epoch, args.eval_every):
            s_logits, terms = predict(student, data), run.last_logged
            top1 = accuracy(s_logits, data.test_y)["top1"]
            run.log(step, epoch, **{f"made/{c}": n for c, n in enumerate(made)}, **agreement(s_logits, data.t_logits))
            run.last_logged = terms  # what the line of the epoch shows
        if not run.end_epoch(epoch, student, top1):
            return run.finish({})
    s_logits = predict(student, data)
    per_round = size * (args.g_steps if generator else 1) + (0 if pool else args.kd_steps * args.batch_size)
    preset = "auto" if args.preset == "script" else args.preset
    return run.finish({"teacher_top1": info["top1"], **accuracy(s_logits, data.test_y),  # D1
                       **agreement(s_logits, data.t_logits), "n_test": len(data.test_y), "real_images": 0,
                       "synthetic_images": args.epochs * rounds * per_round,
                       "paper": published_row(PUBLISHED, preset, args.dataset, args.teacher, args.student, None)})


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
