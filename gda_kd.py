"""GDA-KD: logit distillation that also aligns the batch of student predictions, as a whole, with the teacher's.

Paper   "Logit Distillation via Global Distribution Alignment" (code: zhiweihu1103/Logit-Distillation-GDA), built on
        AdaptConf (arXiv 2402.03749), mdistiller (the CIFAR pairs) and few-shot-meta-baseline (arXiv 2003.04390).
Data    the whole labelled training set; --no_labels puts the teacher's softmax in the place of y.
Result  no accuracy is published with the code; PUBLISHED holds rows without GDA to compare with. Ours: README.md.

Task 1, classification (published: CIFAR-100, resnet56 -> resnet20; weak to strong works the same way). Each step
  1. takes G groups of b images, randomly resized crops and flips (recipe v0; native: pad-4 crops);
  2. the frozen teacher in eval mode, and the student in train mode with batch norm for each group by itself, give
     logits t and s (b x C for each group). GDA has no memory, no prototypes, no parameters:
       z(x) = (x - mean(x)) / (1e-7 + std(x))       over the classes of a sample, std with C - 1                    (1)
       W_ij = sum_c |p_ic - q_jc|                   p, q = softmax(z(s)/2), softmax(z(t)/2): cost of i -> j         (2)
       P    = exp(-W/0.1), then 20 times: rows / row sums, columns / column sums                                    (3)
       SK   = sum_ij P_ij W_ij                      a SUM: total mass b, so its weight depends on b                 (4)
       FR   = mean_i 2 sqrt2 atanh sqrt( (d^2 + 2(g-h)^2) / (d^2 + 2(g+h)^2) )                                      (5)
              Fisher-Rao distance of normals fitted to the raw logits of s_i and t_i: stds g, h, means d apart
       GDA  = fr FR + sk SK                         gradient through W, P and all 20 rounds                         (6)
     Base losses
       KL   = T^2 KL(softmax(t/T) || softmax(s/T))  of each sample                                                  (7)
       DKD  = alpha TCKD + beta NCKD                T^2 KL of (target, rest), and of the classes without target     (8)
       a    = theta ramp(epoch)                     AugConf                                                         (9)
       a_i  = sigmoid((CE(s, argmax s) - CE(s, argmax t)) / theta)            AdaptConf, without gradient          (10)
     loss = gamma CE(s, y) + kd + align, mean over the groups                                                      (11)
       --distiller kd  kd = delta mean KL + GDA        augconf, adaptconf  kd    = delta (mean (1-a) KL + GDA)
                   dkd kd = delta DKD + sk SK                              align = delta mean a CE(s, argmax s)
  3. moves the student by SGD.

Task 2, few-shot learning (--task fewshot): learn on base classes, then recognise new ones from one or five images
  1. classifier stage: backbone and linear head on the base classes; the teacher is such a classifier
  2. meta stage: episodes of `way` classes, from a plain classifier on; the teacher's encoder is frozen
       logits = tau cos(query feature, mean feature of the class's shots)            tau learned, starts at 10     (12)
     both: loss = CE + w (kd + align), with r = ramp(epoch), G0 = GDA(0.1, 0.0008), C columns of logits            (13)
       kd  mean KL + GDA          augconf    (1-r theta) (mean KL + G0) + GDA,         align r theta CE(s, argmax s)
       dkd (1-r theta) DKD + GDA  adaptconf  mean (1-r a_i) (KL + C G0) + GDA,   align mean r a_i CE(s, argmax s)
  3. test: 8,000 episodes of classes never seen, mean accuracy and its 95 % interval

Symbols  gamma -> gt_loss_weight, delta and w -> kd_loss_weight, fr, sk -> fisher_rao_lamda, sinkhorn_lamda,
         theta -> superalignment_threshold, G -> virtual_gpus, b -> batch_size, tau -> temp
Deviations from the published code (kept: an oddity that its numbers need)
  D1  the result is the last epoch, not the best on test; few-shot: the classifier selected on held-out images, the
      meta stage's last epoch, and the other one of each beside it
  D2  the official 6 processes are 6 groups, in any number of processes that divides 6: the same gradients; in groups
      of another size sk is multiplied by 128/b, for which b it was published
  D3  the ratio in (5) stays in [1e-12, 1 - 1e-7]: at equal statistics its root has no derivative
  D4  (3) keeps two scaling vectors and its gradient is written by hand: the same numbers in a fraction of the time
  D5  kept: dkd ignores FR (--dkd_fr adds it); delta multiplies GDA in augconf and adaptconf, not in kd and dkd
  D6  kept: in the few-shot augconf and adaptconf GDA counts twice, the second time as G0 and, per sample, times C
  D7  (10) as a sigmoid; the official quotient of exponentials overflows
  D8  kept: recipe v0 evaluates zoomed images (resize 32 -> 36, centre 32); the native accuracy stands beside it
  D9  every pair runs with the values of the published one; upstream trains VGG with AutoAugment and mixup besides
  D10 few-shot dkd and augconf take theta 0.25: the official default 8 makes the weight of the distillation negative
  D11 kept: the few-shot teacher's tau is 10, not the learned one (--teacher_temp); weight decay acts on tau

  python gda_kd.py --smoke                                             # no download, 15 s; few-shot: --task fewshot
  python gda_kd.py                                                     # resnet56 -> resnet20, CIFAR-100, 240 epochs
  torchrun --nproc_per_node 6 gda_kd.py                                # the same gradients on six devices
  python gda_kd.py --task fewshot --fs_data cifarfs --teacher resnet18_thin --student resnet12_thin
"""
import hashlib
import json
import math
import os
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (
    MODELS, Data, Run, accuracy, agreement, autocast, batches, build_model, cli, count_params_macs, evaluate,
    evaluate_file, fail, get_teacher, load_data, lr_at, per_call, pick_device, predict, published_row, read_checkpoint,
    rng_kept, safe_unpickle, save, short_name, train_missing, unwrap)


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
    teacher: str = "resnet56"  # network: a name in MODELS, or file.py:callable
    student: str = "resnet20"  # network: a name in MODELS, or file.py:callable
    epochs: int = 240  # passes over the training images (few-shot: of the classifier or the meta stage)
    batch_size: int = 128  # images of one group
    lr: float = 0.2  # peak learning rate of the student
    weight_decay: float = 5e-4  # v0: not on biases and batch norm
    momentum: float = 0.9  # SGD momentum (v0: Nesterov)
    task: Literal["classify", "fewshot"] = "classify"  # distil a classifier, or learn to recognise new classes
    # losses
    distiller: Literal["vanilla", "kd", "dkd", "augconf", "adaptconf"] = "kd"  # base loss; vanilla: no teacher
    gda: bool = True  # add GDA, eq. (6), to the base loss
    labels: bool = True  # --no_labels: the teacher's softmax in the place of y (dkd still needs y for eq. (8))
    gt_loss_weight: float = 2.0  # gamma in eq. (11)
    kd_loss_weight: float = 1.0  # delta in eq. (11), w in eq. (13)
    T: float = 4.0  # temperature of eq. (7); few-shot: of eq. (8) too
    fisher_rao_lamda: float = 0.02  # weight of FR, eq. (5)
    sinkhorn_lamda: float = 0.1  # weight of SK, eq. (4), in groups of 128
    dkd_alpha: float = 1.0  # weight of TCKD in eq. (8)
    dkd_beta: float = 1.0  # weight of NCKD in eq. (8)
    dkd_temperature: float = 4.0  # temperature of eq. (8)
    dkd_fr: bool = False  # FR in dkd too
    superalignment_rate: float = 0.3  # share of the epochs in which the ramp of eqs. (9) and (13) rises
    superalignment_threshold: float = 0.5  # theta in eqs. (9), (10) and (13)
    # recipe
    recipe: Literal["v0", "native"] = "v0"  # v0: the published one; native: mdistiller's, for tables across methods
    virtual_gpus: int = 6  # groups of a batch, each with its own batch norm statistics and its own transport
    min_lr: float = 2e-3  # v0: end of the cosine
    warmup_epochs: int = 10  # v0: epochs of linear warm-up
    warmup_lr: float = 1e-4  # v0: learning rate of epoch 0
    # few-shot learning
    stage: Literal["all", "classifier", "meta", "test"] = "all"  # all = one after the other
    fs_data: Literal["mini", "cifarfs", "shapes"] = "mini"  # its data, in the place of --dataset
    fs_shots: tuple[int, ...] = (1, 5)  # images of a new class; meta trains with the first, test uses all
    fs_preset: Literal["readme", "config"] = "readme"  # T, theta, lamda: of the published commands, or of their files
    way: int = 5  # classes of an episode
    query: int = 15  # images of a class to be recognised
    episodes: int = 800  # of a meta epoch, and of a validation; the test takes ten times as many
    meta_epochs: int = 20  # --stage all: epochs of the meta stage, whose lr, groups and weight of SK are preset
    metric: Literal["cos", "dot", "sqr"] = "cos"  # similarity of eq. (12)
    student_ckpt: str = ""  # classifier that a meta stage starts from, or the file that --stage test scores
    teacher_meta_model: bool = False  # the teacher of the meta stage comes out of a meta stage itself
    teacher_temp: bool = False  # D11: use the tau that a meta teacher has learned


def published(look: dict) -> dict:
    """The values of the published commands for the task, recipe, stage and loss at hand."""
    if look["task"] == "classify":
        norm, warmup = {"cifar100": "cifar100_gda"}.get(look["dataset"], "auto"), min(10, look["epochs"] // 4)
        v0, native = dict(norm=norm, warmup_epochs=warmup), dict(batch_size=64, lr=0.05, virtual_gpus=1)
        return v0 if look["recipe"] == "v0" else native
    meta, config = look["stage"] == "meta", look["fs_preset"] == "config"
    soft = config and (meta or look["distiller"] in ("augconf", "adaptconf"))
    large = not meta if config else look["distiller"] == "adaptconf"  # D10
    return dict(
        dataset=look["fs_data"], teacher="resnet12_bottle" if meta else "resnet18_bottle", student="resnet36_bottle",
        epochs=20 if meta else 100, lr=0.001 if meta else 0.1, virtual_gpus=2 if meta else 4, gt_loss_weight=1.0,
        T=10.0 if soft else 1.0, superalignment_threshold=8.0 if large else 0.25, superalignment_rate=0.25,
        fisher_rao_lamda=0.1, sinkhorn_lamda=0.1 if meta and not config else 8e-4, dkd_beta=0.5)


def smoke(look: dict) -> dict:
    nets = dict(teacher="resnet8", student="resnet8", batch_size=64, virtual_gpus=2, warmup_epochs=0, lr=0.1, epochs=2)
    if look["task"] == "fewshot":
        nets = dict(teacher="resnet12_thin", student="resnet12_thin", batch_size=32, fs_data="shapes", fs_shots=(1,),
                    query=4, episodes=8, epochs=1, meta_epochs=1)
    return dict(nets, dataset="shapes", norm="auto", limit_train=300, limit_test=200, log_every=1,
                allow_weak_teacher=True)


PAIRS = (("resnet56", "resnet20"), ("resnet20", "resnet56"), ("resnet32x4", "resnet8x4"), ("resnet8x4", "resnet32x4"),
         ("vgg13", "vgg8"), ("vgg8", "vgg13"), ("wrn40_2", "wrn16_2"), ("wrn16_2", "wrn40_2"))
PRESETS = {
    "auto": {"*": published, **{("cifar100", *pair): {} for pair in PAIRS}},  # D9
    "demo": {"*": dict(dataset="shapes", teacher="resnet20", student="resnet8", recipe="native", virtual_gpus=1,
                       epochs=4, batch_size=50, lr=0.1)},
    "smoke": {"*": smoke}}
PUBLISHED = {  # (row's preset, data, teacher, student, shots) -> top-1, protocol; none of them with GDA
    **{(f"native {loss}", "cifar100", t, s, None): (top1, "mdistiller's table")
       for (t, s), kd, dkd in zip(PAIRS[::2], (70.66, 73.33, 72.98, 74.92), (71.97, 76.32, 74.68, 76.23))
       for loss, top1 in (("kd", kd), ("dkd", dkd))},
    **{(loss, "cifar100", "resnet20", "resnet56", None): (top1, "AdaptConf's README, 8 groups of 64, best on test")
       for loss, top1 in (("kd", 73.81), ("augconf", 73.86), ("adaptconf", 74.17))},
    **{(f"{stage} vanilla", "mini", "", "resnet12_bottle", 1): (top1, "Meta-Baseline's paper")
       for stage, top1 in (("classifier", 58.91), ("meta", 63.17))},
    **{("classifier adaptconf", "mini", t, "resnet36_bottle", 1): (top1, "AdaptConf's README")
       for t, top1 in (("resnet12_bottle", 61.50), ("resnet18_bottle", 62.29))}}
BOTTLE = {name: f"{name}_bottle" for name in ("resnet12", "resnet18", "resnet36")}  # the short official names
ALIASES = {
    "model": "student", "teacher_pretrained": "teacher_ckpt", "kd_temperature": "T", "output": "out_dir",
    "experiment": "run_name", "log_interval": "log_every", "eval_interval": "eval_every",
    "fisher_rao_lambda": "fisher_rao_lamda", "sinkhorn_lambda": "sinkhorn_lamda",
    "dataset": {"torch/cifar100": ("dataset", "cifar100")},
    "config": dict.fromkeys(("cifar_v0.yaml", "configs/cifar/cifar_v0.yaml")),
    "temperature": "T", "threshold": "superalignment_threshold", "loss_weight": "kd_loss_weight", "shot": "fs_shots",
    "name": "run_name", **{flag: {n: (ours, b) for short, b in BOTTLE.items() for n in (short, b)} for flag, ours in (
        ("res_type", "student"), ("teacher_res_type", "teacher"))},
    **{flag: {n: (flag, BOTTLE[n]) for n in ("resnet12", "resnet36")} for flag in ("student", "teacher")}}


def row_names(args: Args, shots: Optional[int] = None) -> dict:
    """Of the result's row: what tells the runs of one pair apart (`auto` is the published command), and its number."""
    fewshot, alone = args.task == "fewshot", args.distiller == "vanilla"
    parts = [args.stage] if fewshot else ["native"] if args.recipe == "native" else []
    if not (fewshot and args.stage == "test"):
        parts += [args.distiller, *["+ GDA"] * (args.gda and not alone), *["no labels"] * (not args.labels)]
    name, teacher = " ".join(parts), "" if alone or parts == ["test"] else args.teacher
    name = args.preset if args.preset not in ("auto", "none") else "auto" if name == "kd + GDA" else name
    return {"preset": name, "teacher": teacher, "shots": shots,
            "paper": published_row(PUBLISHED, name, args.dataset, teacher, args.student, shots)}


# ------------------------------------------------------------------------------------------------ losses of both tasks
# s_logits, t_logits: (B, C), or (G, B, C) for G groups; float32 always.

def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the classes, x - mean, and unbiased std, each (..., 1) or (..., C)."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    return mean, centred, torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)


def standardise(x: Tensor) -> Tensor:
    _, centred, std = moments(x)
    return centred / (1e-7 + std)  # eq. (1)


def cost_matrix(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """L1 distances (G, B, B) of every student row to every teacher row, softened with T = 2."""
    p, q = (torch.softmax(standardise(x.float().reshape(-1, *x.shape[-2:])) / 2, -1) for x in (s_logits, t_logits))
    return torch.cdist(p, q, p=1)  # eq. (2)


def transport(W: Tensor, eps: float = 0.1, rounds: int = 20) -> tuple[Tensor, Tensor, list, list]:
    """P and K = exp(-W / eps), (G, B, B); u_1.. and v_0.., (G, 1, B), with P = diag(u) K diag(v) after each round."""
    K = torch.exp(-W / eps)  # W <= 2, so K >= e^-20
    us, vs = [], [torch.ones_like(K[:, :1])]
    for _ in range(rounds):  # as rows (1 x B): twice as fast as columns
        us.append(torch.bmm(vs[-1], K.mT).reciprocal_())
        vs.append(torch.bmm(us[-1], K).reciprocal_())
    return us[-1].mT * K * vs[-1], K, us, vs  # eq. (3), D4


class TransportCost(torch.autograd.Function):
    """Cost matrices (G, B, B) -> sum of P * W, (G,); backward goes through all rounds."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, eps: float, rounds: int) -> Tensor:
        P, K, us, vs = transport(W, eps, rounds)
        ctx.eps, PW = eps, P * W
        ctx.save_for_backward(P, PW, K, torch.stack(us), torch.stack(vs))
        return PW.sum((1, 2))  # eq. (4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        P, PW, K, us, vs = ctx.saved_tensors
        grad_u, grad_v = PW.sum(2)[:, None] / us[-1], PW.sum(1, keepdim=True) / vs[-1]
        left, right = [], []  # the gradient of K is the sum of left^T right over all half rounds
        for u, v, v_before in zip(us.flip(0), vs[1:].flip(0), vs[:-1].flip(0)):
            grad_a = -grad_v * v * v  # v = 1 / a, a = u K
            grad_u = grad_u + torch.bmm(grad_a, K.mT)
            grad_b = -grad_u * u * u  # u = 1 / b, b = v_before K^T
            grad_v, grad_u = torch.bmm(grad_b, K), 0.0  # an earlier u is used in its own round only
            left += [u, grad_b]
            right += [grad_a, v_before]
        grad_K = torch.bmm(torch.cat(left, 1).mT, torch.cat(right, 1))
        return grad[:, None, None] * (P - (K * grad_K + PW) / ctx.eps), None, None


def sinkhorn_loss(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Sum over the B x B plan, mean over groups."""
    return TransportCost.apply(cost_matrix(s_logits, t_logits), 0.1, 20).mean()  # eq. (4)


def fisher_rao_loss(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Mean over samples."""
    (mean_s, _, std_s), (mean_t, _, std_t) = moments(s_logits.float()), moments(t_logits.float())
    d2 = (mean_s - mean_t) ** 2
    ratio = (d2 + 2 * (std_s - std_t) ** 2) / (d2 + 2 * (std_s + std_t) ** 2).clamp(min=1e-12)
    return 2 * math.sqrt(2) * torch.atanh(ratio.clamp(1e-12, 1 - 1e-7).sqrt()).mean()  # eq. (5), D3


def transport_stats(s_logits: Tensor, t_logits: Tensor) -> dict[str, Tensor]:
    """Share of the mass that goes from a sample's student to its own teacher prediction; cost of a unit of mass."""
    with torch.no_grad():
        W = cost_matrix(s_logits, t_logits)
        P = transport(W)[0]
        return {"ot_diagonal": P.diagonal(dim1=1, dim2=2).mean(), "ot_cost": (P * W).sum(2).mean()}


def kl_rows(s_logits: Tensor, t_logits: Tensor, T: float) -> Tensor:
    """Of each sample (N,): sum over classes, times T^2."""
    log_p, log_q = (s_logits / T).log_softmax(-1), (t_logits / T).log_softmax(-1)
    return T * T * (log_q.exp() * (log_q - log_p)).sum(-1)  # eq. (7)


def dkd_loss(s_logits: Tensor, t_logits: Tensor, y: Tensor, alpha: float, beta: float, T: float) -> Tensor:
    """Mean over samples, sum over bins, times T^2."""
    target = F.one_hot(y, s_logits.shape[-1]).bool()
    logs = [(x / T).log_softmax(-1) for x in (s_logits, t_logits)]  # (N, C)
    rest = [x.masked_fill(target, -math.inf).logsumexp(-1, keepdim=True) for x in logs]  # of all but the target (N, 1)
    tckd = kl_rows(*(T * torch.cat((x.gather(1, y[:, None]), v), 1) for x, v in zip(logs, rest)), T).mean()
    nckd = kl_rows(s_logits - 1000 * T * target, t_logits - 1000 * T * target, T).mean()
    return alpha * tckd + beta * nckd  # eq. (8)


def ramp(epoch: int, epochs: int, rate: float) -> float:
    return epoch / (epochs * rate) if epoch < int(epochs * rate) else 1.0


def ce_rows(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """CE of each sample (N,) with the class that the second logits prefer."""
    return F.cross_entropy(s_logits, t_logits.argmax(-1), reduction="none")


def adaptconf_weight(s_logits: Tensor, t_logits: Tensor, theta: float) -> Tensor:
    """Of each sample (N,), at most 0.5, without gradient."""
    return torch.sigmoid((ce_rows(s_logits, s_logits) - ce_rows(s_logits, t_logits)).detach() / theta)  # eq. (10), D7


def distill_terms(s_logits: Tensor, t_logits: Optional[Tensor], y: Tensor, epoch: int, args: Args) -> dict[str, Tensor]:
    """The terms gt, kd and align of eq. (11), few-shot of eq. (13), weighted; and fr, sk as they are.

    y: integers (N,) or soft rows (N, C), N = G * B. epoch: 0-based, few-shot 1-based, as published.
    """
    fewshot, confident = args.task == "fewshot", args.distiller in ("augconf", "adaptconf")
    rows, zero = s_logits.reshape(-1, s_logits.shape[-1]), s_logits.new_zeros(())
    t_rows = None if t_logits is None else t_logits.reshape(rows.shape)
    target = y if args.labels else t_rows.softmax(-1)
    terms = {"gt": args.gt_loss_weight * F.cross_entropy(rows, target), "kd": zero, "align": zero}
    if args.distiller == "vanilla":
        return terms
    if args.gda:
        terms.update(fr=fisher_rao_loss(s_logits, t_logits), sk=sinkhorn_loss(s_logits, t_logits))
    fr, sk = terms.get("fr", zero), terms.get("sk", zero)
    gda = args.fisher_rao_lamda * fr + args.sinkhorn_lamda * sk  # eq. (6)
    a, r = 0.0, ramp(epoch, args.epochs, args.superalignment_rate)
    if args.distiller == "adaptconf":
        a = (r if fewshot else 1) * adaptconf_weight(rows, t_rows, args.superalignment_threshold)
    elif args.distiller == "augconf" or fewshot and args.distiller == "dkd":
        a = r * args.superalignment_threshold  # eq. (9)
    if args.distiller == "dkd":
        y = y.argmax(-1) if y.is_floating_point() else y
        base = dkd_loss(rows, t_rows, y, args.dkd_alpha, args.dkd_beta, args.T if fewshot else args.dkd_temperature)
        gda = gda if fewshot or args.dkd_fr else args.sinkhorn_lamda * sk  # D5
    else:
        base = kl_rows(rows, t_rows, args.T)
    if fewshot and confident:  # D6: G0, for each of the C columns in adaptconf
        base = base + (rows.shape[-1] if args.distiller == "adaptconf" else 1) * (0.1 * fr + 0.0008 * sk)
    delta = args.kd_loss_weight
    gda = delta * gda if fewshot or confident else gda  # D5
    terms["kd"] = delta * ((1 - a) * base).mean() + gda  # eqs. (11), (13)
    if confident:
        terms["align"] = delta * (a * ce_rows(rows, rows)).mean()  # eqs. (11), (13)
    return terms


# --------------------------------------------------------------------------------- images: resize as Pillow, on tensors

def resize_matrix(length: Tensor, offset: Tensor, bicubic: Tensor, source: int, target: int) -> Tensor:
    """(B, target, source), float64: row o holds Pillow's weights of output pixel o over [offset, offset + length)."""
    n, start, cubic = (v.view(-1, 1, 1) for v in (length, offset, bicubic.bool()))
    k = torch.arange(source, device=n.device) - start  # (B, 1, source)
    scale = n.double() / target
    f = scale.clamp(min=1)
    centre = (torch.arange(target, device=n.device)[:, None] + 0.5) * scale  # (B, target, 1)
    reach = torch.where(cubic, 2, 1) * f
    inside = (k >= (centre - reach + 0.5).floor().clamp(min=0)) & (k < (centre + reach + 0.5).floor().minimum(n))
    x = ((k - centre + 0.5) / f).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2  # bicubic with a = -0.5
    w = torch.where(cubic, torch.where(x < 1, near, far), (1 - x).clamp(min=0)) * inside
    w = w / w.sum(-1, keepdim=True) * 2 ** 22
    return torch.trunc(w + 0.5 * w.sign()) / 2 ** 22  # multiples of 2^-22, as in Pillow


def resize(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> (B, 3, T, T) by two products with rows (B, T, S), cols (B, S, T), rounded after each.

    As Pillow to version 12, bit by bit in float64; in float32 a few pixels are one level off (32 x 32: 4 in 100,000).
    """
    b, s, t = len(x), x.shape[-1], rows.shape[1]
    out, step = x.new_empty(b, t, t, 3), 32 if x.device.type == "cpu" else b  # 32: what a cache holds
    for i in range(0, b, step):
        part = x[i:i + step].transpose(1, 2).to(rows.dtype, memory_format=torch.contiguous_format).view(-1, s * 3, s)
        part = torch.bmm(part, cols[i:i + step]).add_(0.5).clamp_(0, 255).floor_().view(-1, s, 3 * t)  # horizontal
        part = torch.bmm(rows[i:i + step], part).add_(0.5).clamp_(0, 255)  # vertical: (32, T, 3 * T)
        out[i:i + step] = part.view(-1, t, 3, t).transpose(2, 3)
    return out.permute(0, 3, 1, 2)


def resized(x: Tensor, to: int, crop: int) -> Tensor:
    """uint8 (N, 3, S, S) -> resized (bilinear) and centre-cropped, (N, 3, crop, crop)."""
    zero, first = x.new_zeros(1, dtype=torch.long), round((to - crop) / 2)
    rows = resize_matrix(zero + x.shape[-1], zero, zero, x.shape[-1], to)[:, first:first + crop]
    return torch.cat([resize(v, *(m.expand(len(v), -1, -1) for m in (rows, rows.mT))) for v in x.split(500)])


def zoomed(x: Tensor) -> Tensor:
    """The published view of test images: 32 -> 36, centre 32."""
    return resized(x, int(x.shape[-1] / 0.875), x.shape[-1])  # D8


def draw_crops(n: int, size: int, generator: torch.Generator) -> Tensor:
    """(6, n): top, left, height, width, bicubic, flip; the first of ten tries that fits, else the whole image."""
    u = torch.rand(24, n, generator=generator, device=generator.device)
    area, aspect = size * size * (0.08 + 0.92 * u[:10]), ((2 * u[10:20] - 1) * math.log(4 / 3)).exp()  # 3/4 to 4/3
    hw = torch.stack(((area / aspect).sqrt(), (area * aspect).sqrt())).round().long()  # (2, 10, n)
    fits = (hw <= size).all(0)
    chosen = hw.gather(1, fits.int().argmax(0).expand(2, 1, n))[:, 0]  # argmax: the first that fits
    chosen = torch.where(fits.any(0), chosen, size)
    place = (u[20:22] * (size + 1 - chosen)).long()
    return torch.cat((place, chosen, (u[22:] < 0.5).long()))


class Cropper:
    """Applies drawn crops; the matrices of all crops of small images lie in tables."""

    def __init__(self, size: int, target: int, device: Any, dtype: torch.dtype = torch.float32):
        self.size, self.target, self.dtype, self.tables = size, target, dtype, None
        if size <= 32:  # 84 -> 80: by the formula, a table would take 200 MB
            n = torch.arange(size + 1, device=device)
            kind, length, offset = (v.flatten() for v in torch.meshgrid(n[:2], n.clamp(min=1), n, indexing="ij"))
            rows = resize_matrix(length, offset, kind, size, target).nan_to_num().to(dtype)
            rows = rows.view(2, size + 1, size + 1, target, size)
            self.tables = rows, torch.stack((rows, rows.flip(-2))).mT.contiguous()  # the second one also by flip

    def __call__(self, x: Tensor, crops: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> uint8 (B, 3, target, target)."""
        top, left, h, w, bicubic, flip = crops
        if self.tables is not None:
            return resize(x, self.tables[0][bicubic, h, top], self.tables[1][flip, bicubic, w, left])
        rows, cols = (resize_matrix(length, offset, bicubic, self.size, self.target).to(self.dtype)
                      for length, offset in ((h, top), (w, left)))
        return resize(x, rows, torch.where(flip.bool().view(-1, 1, 1), cols.flip(1), cols).mT)


# --------------------------------------------------------------------------------------- one batch, one or more devices

def grouped(net: nn.Module, x: Tensor, groups: int, forward: Callable, first: bool = True) -> Tensor:
    """forward on each of G groups, each with its own batch statistics; only the first moves the running ones."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    out = []
    for g, part in enumerate(x.tensor_split(min(groups, len(x)))):
        for m in norms:
            m.track_running_stats = first and g == 0 and m.running_mean is not None
        out.append(forward(part))
    for m in norms:
        m.track_running_stats = m.running_mean is not None
    return torch.cat(out)


def make_optimizer(net: nn.Module, lr: float, momentum: float, weight_decay: float, v0: bool) -> torch.optim.SGD:
    """v0: Nesterov, and no decay of biases and of what has one dimension or none; otherwise plain, decay on all."""
    if not v0:
        return torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay)
    groups = [{"params": [p for name, p in net.named_parameters() if (p.ndim <= 1 or name.endswith(".bias")) == free],
               "weight_decay": 0.0 if free else weight_decay} for free in (True, False)]
    return torch.optim.SGD(groups, lr, momentum, nesterov=momentum > 0)


def schedule(kind: str, epochs: int, lr: float, min_lr: float = 0.0, warmup: int = 0, warmup_lr: float = 0.0) -> dict:
    """For lr_at: v0 (warm-up, then the cosine of all epochs), native, classifier or meta (constant)."""
    if kind == "v0":
        return {"kind": "cosine", "lr": lr, "T_max": epochs, "eta_min": min_lr, "warmup": warmup,
                "warmup_lr": warmup_lr}
    falls = {"native": (0.625, 0.75, 0.875), "classifier": (0.9,), "meta": ()}[kind]
    return {"kind": "multistep", "lr": lr, "milestones": [round(f * epochs) for f in falls], "gamma": 0.1}


def start_processes(args: Args) -> tuple[int, int]:
    """(rank, number) among the processes that torchrun started; process r takes groups r G / W to (r + 1) G / W - 1."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.virtual_gpus % world:
        fail(f"{world} processes cannot share --virtual_gpus {args.virtual_gpus}; take a number that they divide")
    if world > 1:
        if args.device != "cpu" and torch.cuda.is_available():
            args.device = str(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=timedelta(hours=12))
    return rank, world


# ----------------------------------------------------------------------------------------------- task 1: classification

def classify(args: Args) -> dict:
    (rank, world), v0 = start_processes(args), args.recipe == "v0"
    run = Run(args)
    if rank:  # the first process fetches, decodes and caches the data before the others look for it
        dist.barrier()
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    n = len(data.train_x)
    if world > 1 and not rank:
        dist.barrier()
    native_x, zoomed_x = data.test_x, zoomed(data.test_x) if v0 else data.test_x
    teacher, tops = None, {"teacher_top1": None}

    def score(net: nn.Module, data: Data) -> float:
        """A teacher's accuracy; the better of both views is checked, as its file may come from either."""
        tops["teacher_top1_native"] = tops["teacher_top1"] = accuracy(data.t_logits, data.test_y)["top1"]
        if v0:
            data.t_logits = predict(net, data, zoomed_x)
            tops["teacher_top1"] = accuracy(data.t_logits, data.test_y)["top1"]
            print("teacher: {teacher_top1:.2f} % zoomed, {teacher_top1_native:.2f} % native".format(**tops), flush=True)
        return max(tops.values())

    student = build_model(args.student, data.num_classes, data.image_size)
    student.to(run.device, memory_format=torch.channels_last)
    if args.distiller != "vanilla":
        teacher, info = get_teacher(args, data, score=score)
        run.note(teacher=info)
    elif args.norm != "auto":
        data.set_norm(args.norm)
    data.test_x = zoomed_x  # from here on everything is measured in the recipe's view  # D8
    for p in student.parameters() if world > 1 else ():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    optimizer = make_optimizer(student, args.lr, args.momentum, args.weight_decay, v0)
    groups = max(1, min(args.virtual_gpus, n // args.batch_size) // world) * world
    size = min(args.batch_size, n // groups)
    if not size:
        fail(f"{n} training images for {world} processes; start fewer")
    loss_args = replace(args, sinkhorn_lamda=args.sinkhorn_lamda * 128 / size)  # D2
    if (groups, size) != (args.virtual_gpus, args.batch_size) and not rank:
        print(f"warning: {groups} groups of {size} images instead of {args.virtual_gpus} of {args.batch_size}")
    if v0 and size != 128 and not rank:
        print(f"note: in groups of {size} the weight of the transport is {loss_args.sinkhorn_lamda:.3g} (D2)")
    run.note(norm=data.norm, groups=groups, group_size=size, sinkhorn_lamda=loss_args.sinkhorn_lamda, **tops,
             student_params_macs=count_params_macs(student, data.image_size))
    forward = torch.compile(student) if args.compile else student
    plan = schedule(args.recipe, args.epochs, args.lr, args.min_lr, args.warmup_epochs, args.warmup_lr)
    cropper = Cropper(data.image_size, data.image_size, run.device) if v0 else None
    start = run.restore(student=student, optimizer=optimizer)
    for epoch in range(start, args.epochs):
        student.train()
        for group in optimizer.param_groups:
            group["lr"] = lr = lr_at(plan, epoch)
        parts = batches(n, groups * size, run.generator, drop_last=True)
        for step, index in enumerate(run.bar(parts, f"epoch {epoch + 1}"), epoch * len(parts)):
            # step 1: crops, drawn for the whole batch by every process
            mine = index.chunk(world)[rank]
            if v0:
                crops = draw_crops(len(index), data.image_size, run.generator).chunk(world, 1)[rank]
                x = data.normalize(cropper(data.train_x.index_select(0, mine), crops))
            else:
                x = data.augment(index, run.generator).chunk(world)[rank]
            # step 2: logits and losses
            with autocast(run.device, args.amp):
                s_logits = grouped(student, x, groups // world, forward, first=rank == 0).float()
                t_logits = teacher and teacher(x).float().view(-1, size, data.num_classes)  # frozen: keeps no graph
            s_logits = s_logits.view(-1, size, data.num_classes)  # (G, b, C)
            terms = distill_terms(s_logits, t_logits, data.train_y[mine], epoch, loss_args)
            loss = terms["gt"] + terms["kd"] + terms["align"]  # eq. (11)
            # step 3: one update
            optimizer.zero_grad(set_to_none=True)
            (loss / world).backward()
            optimizer.step()
            if step % args.log_every == 0:
                stats = transport_stats(s_logits, t_logits) if teacher and args.gda else {}
                run.log(step, epoch, loss_total=loss, **{f"loss_{k}": v for k, v in terms.items()}, **stats, lr=lr)
        due = rank == 0 and run.due(epoch, args.eval_every)
        go_on = run.end_epoch(epoch, student, evaluate(student, data)["top1"] if due else None)
        if world > 1:  # every process takes the first one's batch norm buffers and its decision to go on
            flag = torch.tensor(float(go_on), device=run.device)
            for tensor in (*student.buffers(), flag):
                dist.broadcast(tensor, 0)
            go_on = bool(flag)  # sync
            run.stopped = "" if go_on else run.stopped or "the first process"
        if not go_on:
            break
    if world > 1:
        dist.destroy_process_group()
    row = {**tops, **row_names(args), "n_test": len(data.test_y), "real_images": n}  # D1
    if rank == 0 and not run.stopped:
        s_logits = predict(student, data)
        native = s_logits if native_x is zoomed_x else predict(student, data, native_x)
        row.update(accuracy(s_logits, data.test_y), native_top1=accuracy(native, data.test_y)["top1"],
                   **({} if teacher is None else agreement(s_logits, data.t_logits)))
    return run.finish(row)


# -------------------------------------------------------------------------------------------- task 2: few-shot learning

class FewShotBlock(nn.Module):
    """Three 3x3 convs, LeakyReLU; the first block of a stage also has a 1x1 shortcut and a 2x2 max-pool at its end."""

    def __init__(self, c_in: int, c_out: int, first: bool):
        super().__init__()
        for i in (1, 2, 3):
            setattr(self, f"conv{i}", nn.Conv2d(c_in if i == 1 else c_out, c_out, 3, 1, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(c_out))
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        y = self.bn3(self.conv3(F.leaky_relu(self.bn2(self.conv2(y)), 0.1)))
        if self.downsample is None:
            return F.leaky_relu(y + x, 0.1)
        return F.max_pool2d(F.leaky_relu(y + self.downsample(x), 0.1), 2)


class FewShotResNet(nn.Module):
    """No stem, four stages; pooled = spatial mean; `linear` is the head of the base classes."""

    def __init__(self, blocks: tuple, widths: tuple, num_classes: int):
        super().__init__()
        for s, (c_in, n, width) in enumerate(zip((3, *widths), blocks, widths), 1):
            layer = [FewShotBlock(width if i else c_in, width, first=not i) for i in range(n)]
            setattr(self, f"layer{s}", nn.Sequential(*layer))
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, return_features: bool = False):
        feats = [self.layer1(x)]
        for layer in (self.layer2, self.layer3, self.layer4):
            feats.append(layer(feats[-1]))
        feats.append(feats[-1].mean((2, 3)))  # (B, C)
        logits = self.linear(feats[-1])
        return (logits, feats) if return_features else logits


MODELS.update({f"resnet{depth}_{tag}": partial(FewShotResNet, blocks, tuple(width * w for w in (4, 8, 16, 32)))
               for depth, blocks in ((12, (1, 1, 1, 1)), (18, (1, 2, 2, 1)), (36, (2, 3, 5, 2)))
               for tag, width in (("bottle", 16), ("thin", 4)) if (depth, tag) != (36, "thin")})
CIFARFS_VAL = (4, 7, 14, 15, 19, 26, 27, 32, 40, 47, 48, 55, 71, 73, 87, 89)  # fine labels; the other 64 are base
CIFARFS_TEST = (2, 5, 8, 21, 34, 42, 46, 58, 60, 62, 69, 70, 77, 83, 84, 86, 94, 95, 98, 99)
PER_STEP = 4  # episodes


class Learner(nn.Module):
    """A backbone with the head of its base classes (classifier stage) and tau (meta stage)."""

    def __init__(self, arch: str, n_base: int, size: int):
        super().__init__()
        self.encoder = build_model(arch, n_base, size)
        if not any(isinstance(m, nn.Linear) for m in self.encoder.modules()):
            fail(f"{arch} has no Linear, whose input would be the features of an image; end it with one")
        self.temp = nn.Parameter(torch.tensor(10.0))

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x, return_features=True)[1][-1]  # (B, D)

    def load(self, path: Any, selected: bool) -> None:
        """An official or own file (selected: its best validation), strictly but for a missing head, tau or counter."""
        obj = read_checkpoint(path)
        if isinstance(obj, dict):
            obj = obj.get("model_sd", obj.get("selected", obj) if selected else obj)
        found = {k.replace("classifier.linear.", "encoder.linear."): v for k, v in unwrap(obj, path).items()}
        own, spare = self.state_dict(), ("temp", "encoder.linear.weight", "encoder.linear.bias")
        found = {k: v for k, v in own.items() if k in spare or k.endswith("num_batches_tracked")} | found
        odd = sorted(k for k in {*own, *found} if k not in own or k not in found or own[k].shape != found[k].shape)
        if odd:
            fail(f"{path}: does not fit the few-shot network ({len(odd)} entries differ, first: {odd[0]}); give its "
                 "backbone with --student (or --teacher), and the data it was made for with --fs_data")
        self.load_state_dict(found)


def fewshot_data(args: Args, device: Any) -> Data:
    """Train split: base classes; test split: other images of the same classes, as evaluated; and three attributes.

    size: pixels that the network sees; val, new: (images as evaluated, labels) of classes that are not base classes.
    """
    limits = dict(limit_train=args.limit_train, limit_test=args.limit_test)
    if args.fs_data == "mini":
        folder, size = Path(args.data_dir) / "mini_imagenet", 80

        def read(name: str) -> tuple[np.ndarray, np.ndarray, list]:
            path = folder / f"miniImageNet_category_split_{name}.pickle"
            if not path.is_file():
                fail(f"{path} is missing: put the pickles of github.com/gidariss/FewShotWithoutForgetting into {folder}"
                     ", or try --fs_data cifarfs, made from CIFAR-100, or shapes, which needs no files")
            content = safe_unpickle(path)
            if not isinstance(content, dict) or not {"data", "labels"} <= content.keys():
                fail(f"{path}: no data and labels inside; fetch it again")
            x, y = np.asarray(content["data"]), np.asarray(content["labels"])
            if (x.dtype, x.ndim, y.dtype.kind, y.shape) != (np.uint8, 4, "i", x.shape[:1]) or not len(y) or \
                    x.shape[1:] != (x.shape[1], x.shape[1], 3):
                fail(f"{path}: data must be uint8, N x S x S x 3, with an integer label for each; fetch it again")
            names, y = np.unique(y, return_inverse=True)
            return x.transpose(0, 3, 1, 2), y, names.tolist()

        data = Data("mini", lambda split: read(f"train_phase_{split}"), device, **limits, norm="imagenet")
        data.test_x = resized(data.test_x, size, size)
        splits = [(resized(torch.tensor(x, device=device), size, size), torch.tensor(y, device=device))
                  for x, y, _ in map(read, ("val", "test"))]
    else:
        cifar = args.fs_data == "cifarfs"
        full = load_data("cifar100" if cifar else "shapes", args.data_dir, data_url=args.data_url, **limits)
        size, new, val = full.image_size, CIFARFS_TEST if cifar else (5, 6, 7, 8, 9), CIFARFS_VAL if cifar else ()

        def part(classes: Any, *names: str) -> tuple[Tensor, Tensor]:
            x, y = (torch.cat([getattr(full, f"{name}_{v}") for name in names]) for v in "xy")
            place = torch.full((full.num_classes,), -1)
            place[list(classes)] = torch.arange(len(classes))
            return x[place[y] >= 0].to(device), place[y][place[y] >= 0].to(device)

        base = [c for c in range(full.num_classes) if c not in (*new, *val)]
        data = Data(args.fs_data, lambda split: (*(v.cpu().numpy() for v in part(base, split)),
                                                 [full.classes[c] for c in base]), device, norm=full.norm)
        # shapes: no classes are left for a validation, so it draws its episodes from held-out images of the base ones
        splits = [part(val, "train", "test") if val else (data.test_x, data.test_y), part(new, "train", "test")]
    data.size, data.val, data.new, need = size, *splits, max(args.fs_shots) + args.query
    for name, y in (("base", data.train_y), ("validation", data.val[1]), ("new", data.new[1])):
        counts = torch.bincount(y)
        if args.way > len(counts) or need > counts.min():
            fail(f"--way {args.way}, --query {args.query}, --fs_shots {max(args.fs_shots)}: there are {len(counts)} "
                 f"{name} classes with {counts.min()} images or more; ask for less")
    if args.norm != "auto":
        data.set_norm(args.norm)
    return data


def draw_episodes(labels: np.ndarray, n_batches: int, way: int, per_class: int, per_batch: int,
                  rng: np.random.RandomState) -> np.ndarray:
    """(n_batches, per_batch * way * per_class) indices, episode- and then class-major; the published random stream."""
    members = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    return np.stack([np.concatenate([
        rng.choice(members[c], per_class, replace=False)
        for _ in range(per_batch) for c in rng.choice(len(members), way, replace=False)]) for _ in range(n_batches)])


def split_episodes(x: Tensor, episodes: int, way: int, shots: int) -> tuple[Tensor, Tensor]:
    """Items or features of drawn indices -> shots (E, way, shots, ...), queries (E, way * query, ...)."""
    x = x.view(episodes, way, -1, *x.shape[1:])
    return x[:, :, :shots], x[:, :, shots:].flatten(1, 2)


def query_labels(episodes: int, way: int, query: int) -> Tensor:
    return torch.arange(way).repeat_interleave(query).repeat(episodes)


def episode_logits(shot: Tensor, query: Tensor, metric: str, tau: Any) -> Tensor:
    """Features (..., way, shots, D), (..., Q, D) -> (..., Q, way); prototypes are means of the raw features."""
    proto = shot.mean(-2)
    if metric == "sqr":
        return -tau * (query[..., :, None, :] - proto[..., None, :, :]).square().sum(-1)
    if metric == "cos":
        query, proto = F.normalize(query, dim=-1), F.normalize(proto, dim=-1)
    return tau * query @ proto.mT  # eq. (12)


def half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of a mean. Student's t: Newton's steps on its density, integrated by Gauss's rule."""
    dof, t, (nodes, weights) = len(values) - 1, 1.96, np.polynomial.legendre.leggauss(100)
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi * dof)
    for _ in range(50):
        density = scale * (1 + np.append(t / 2 * (nodes + 1), t) ** 2 / dof) ** (-(dof + 1) / 2)
        t += (0.475 - t / 2 * weights @ density[:-1]) / density[-1]  # 47.5 % lie between 0 and t
    return t * np.std(values, ddof=1) / math.sqrt(len(values))


def encode(learner: Learner, data: Data, x: Tensor) -> Tensor:
    """Pooled features (N, D) of uint8 images as evaluated: made once, all episodes are drawn over them."""
    training, size = learner.training, per_call(x.device, x.shape[-1])
    learner.eval()
    with torch.inference_mode():
        parts = [learner.features(data.normalize(part)).float() for part in x.split(size)]
    learner.train(training)
    return torch.cat(parts)


def episode_accuracy(feats: Tensor, labels: Tensor, shots: int, n_episodes: int, args: Args) -> tuple[float, float]:
    """Mean over batches of 4 episodes, seed 0, and the half width of its 95 % interval, in percent."""
    drawn = draw_episodes(labels.cpu().numpy(), n_episodes // PER_STEP, args.way, shots + args.query, PER_STEP,
                          np.random.RandomState(0))
    accs, y = [], query_labels(PER_STEP, args.way, args.query).to(feats.device)
    for part in torch.from_numpy(drawn).to(feats.device).split(50):
        split = split_episodes(feats[part.flatten()], PER_STEP * len(part), args.way, shots)
        hits = episode_logits(*split, args.metric, 1.0).argmax(-1).view(len(part), -1) == y
        accs.append(100 * hits.double().mean(1))
    values = torch.cat(accs).cpu().numpy()  # sync
    return float(values.mean()), float(half_width(values))


def plain_path(plan: Args, data: Data) -> Path:
    """Where the plain (vanilla) network of a stage is kept: <data_dir>/teachers/<data>_<backbone>-<stage>-<hash>.pt"""
    names = ["student", "epochs", "batch_size", "lr", "weight_decay", "momentum", "virtual_gpus", "limit_train", "amp",
             "seed", "gt_loss_weight", "eval_every"]
    names += ["way", "query", "episodes", "metric", "fs_shots"] * (plan.stage == "meta")
    code = Path(plan.student.rpartition(":")[0]).read_text() if ".py:" in plan.student else ""
    facts = json.dumps([[getattr(plan, name) for name in names], code, data.mean, data.std, data.fingerprint])
    name = f"{data.name}_{short_name(plan.student)}-{plan.stage}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.pt"
    return Path(plan.data_dir) / "teachers" / name


def plain_file(args: Args, arch: str, stage: str, data: Data) -> Path:
    """The plain network of a stage, trained now (seed 0, in a run folder of its own) if it is not there yet."""
    own = args.smoke or stage == args.stage.replace("all", "classifier")
    values = asdict(args) if own else published({**asdict(args), "stage": stage, "distiller": "vanilla"})
    wanted = replace(args, student=arch, stage=stage, distiller="vanilla", teacher_meta_model=False, student_ckpt="",
                     seed=0, resume="", labels=True, gt_loss_weight=1.0,
                     **{k: values[k] for k in ("epochs", "lr", "virtual_gpus")})
    if not plain_path(wanted, data).is_file():
        with rng_kept():
            train_missing(plain_path(wanted, data), wanted, data, fewshot)
    return plain_path(wanted, data)


def fewshot_teacher(args: Args, data: Data) -> tuple[Learner, dict]:
    """Given, or trained now; frozen. A classifier is checked on held-out images of the base classes."""
    stage, bound = "meta" if args.teacher_meta_model else "classifier", min(300 / data.num_classes, 60)
    path = Path(args.teacher_ckpt) if args.teacher_ckpt else plain_file(args, args.teacher, stage, data)
    teacher = Learner(args.teacher, data.num_classes, data.size)
    teacher.load(path, selected=True)
    if not args.teacher_temp:
        nn.init.constant_(teacher.temp, 10.0)  # D11
    teacher.to(data.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    top1 = evaluate(teacher.encoder, data)["top1"] if stage == "classifier" else None
    if top1 is not None:
        print(f"teacher {args.teacher} from {path}: {top1:.2f} % on held-out images of the base classes", flush=True)
        if top1 < bound and not args.allow_weak_teacher:
            fail(f"{path}: {top1:.2f} % on base classes (expected {bound:.0f}): from a meta stage "
                 "(--teacher_meta_model) or other data? Go on all the same: --allow_weak_teacher")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return teacher, {"arch": args.teacher, "path": str(path), "heldout_top1": top1, "sha256": digest}


def fewshot_test(learner: Learner, data: Data, args: Args, name: str) -> dict[str, tuple[float, float]]:
    """{shots: (accuracy, half width)} on the new classes; they are encoded once for all episodes."""
    feats = encode(learner, data, data.new[0])
    scores = {str(k): episode_accuracy(feats, data.new[1], k, 10 * args.episodes, args) for k in args.fs_shots}
    print(f"{name}: " + ", ".join(f"{k}-shot {a:.2f} +- {h:.2f} %" for k, (a, h) in scores.items()), flush=True)
    return scores


def fewshot(args: Args, data: Optional[Data] = None) -> dict:
    args.student, args.teacher = (BOTTLE.get(n, n) for n in (args.student, args.teacher))
    given = getattr(args, "given", ())
    for trouble, message in (
            ("dataset" in given and args.dataset != args.fs_data, "takes its data from --fs_data, not from --dataset"),
            (min(*args.fs_shots or [0], args.way - 1) < 1 or args.episodes < 8,
             "needs --episodes of 8 or more, --way of 2 or more, --fs_shots of 1 or more"),
            (args.select != "last", "reports both selections by itself; --select best_test is for --task classify"),
            (int(os.environ.get("WORLD_SIZE", 1)) > 1, "runs in one process; its groups are --virtual_gpus"),
            (args.stage == "test" and not args.student_ckpt, "--stage test scores a file: --student_ckpt FILE"),
            (args.teacher_meta_model and args.stage != "meta", "--teacher_meta_model: it serves --stage meta only")):
        if trouble:
            fail(f"--task fewshot {message}")
    args.dataset, first = args.fs_data, str(args.fs_shots[0])
    if args.evaluate:
        data, path = fewshot_data(args, pick_device(args.device)), Path(args.evaluate)
        learner = Learner(args.student, data.num_classes, data.size).to(data.device, memory_format=torch.channels_last)
        learner.load(path / "student.pt" if path.is_dir() else path, selected=False)
        scores = fewshot_test(learner, data, args, str(path))
        return {"student": args.student, "dataset": args.fs_data, "last": scores[first][0], "fs": scores}
    run = Run(args)
    data = data or fewshot_data(args, run.device)
    n, stages = len(data.train_x), [s for s in ("classifier", "meta") if args.stage in (s, "all")]
    plans, teacher = {s: replace(args, stage=s) for s in stages}, None
    if args.stage == "all":  # the flags speak of the classifier stage; the meta stage has published values of its own
        own = ["lr", "virtual_gpus", *({"T", "superalignment_threshold", "sinkhorn_lamda"} - {*given})]
        meta = published({**asdict(args), "stage": "meta"})
        plans["meta"] = replace(plans["meta"], epochs=args.meta_epochs, **{k: meta[k] for k in own})
    learner = Learner(args.student, data.num_classes, data.size).to(run.device, memory_format=torch.channels_last)
    if args.student_ckpt and stages:  # what is wrong with it shows now
        deepcopy(learner).load(args.student_ckpt, selected=False)
    if args.distiller != "vanilla" and stages:
        teacher, info = fewshot_teacher(args, data)
        run.note(teacher=info)
    if "meta" in stages:  # starts from a plain classifier; its images are not augmented: the teacher sees them once
        own = args.stage == "all" and not teacher
        origin = args.student_ckpt or (run.dir / "classifier.pt" if own else
                                       plain_file(args, args.student, "classifier", data))
        base_x = resized(data.train_x, data.size, data.size) if data.image_size != data.size else data.train_x
        t_feats = teacher and encode(teacher, data, base_x)
    run.note(norm=data.norm, stages={s: asdict(plan) for s, plan in plans.items()},
             student_params_macs=count_params_macs(learner.encoder, data.size))
    forward, features = (torch.compile(f) if args.compile else f for f in (learner.encoder, learner.features))
    cropper = Cropper(data.image_size, data.size, run.device)
    optimizer, best = make_optimizer(learner, args.lr, args.momentum, args.weight_decay, v0=False), deepcopy(learner)
    best.register_buffer("score", torch.tensor(-1.0))  # on images or classes that are not tested
    steps = {"classifier": n // min(args.batch_size, n), "meta": args.episodes // PER_STEP}
    order = [(s, e) for s in stages for e in range(plans[s].epochs)]
    run.epochs, y_query = len(order), query_labels(PER_STEP, args.way, args.query).to(run.device)
    split = partial(split_episodes, episodes=PER_STEP, way=args.way, shots=args.fs_shots[0])
    start = run.restore(student=learner, optimizer=optimizer, best=best)
    for epoch in range(start, len(order)):
        stage, e = order[epoch]
        plan = plans[stage]
        for group in optimizer.param_groups:
            group["lr"] = lr_at(schedule(stage, plan.epochs, plan.lr), e)
        if stage == "classifier":
            parts = batches(n, min(args.batch_size, n), run.generator, drop_last=True)
        else:
            rng, per_class = np.random.RandomState((e + 1 + 10_000 * args.seed) % 2**32), args.fs_shots[0] + args.query
            drawn = draw_episodes(data.train_y.cpu().numpy(), steps[stage], args.way, per_class, PER_STEP, rng)
            parts = torch.from_numpy(drawn).to(run.device)
        if stage == "meta" and e == 0:
            learner.load(origin, selected=teacher is not None)
            optimizer.state.clear()
            best.score.fill_(-1.0)
        learner.train()
        for step, index in enumerate(run.bar(parts, f"{stage} epoch {e + 1}"), sum(steps[s] for s, _ in order[:epoch])):
            # step 1, classifier: logits of base classes (B, C)
            if stage == "classifier":
                crops = draw_crops(len(index), data.image_size, run.generator)
                crops[4] = 0  # bilinear only
                x, y = data.normalize(cropper(data.train_x[index], crops)), data.train_y[index]
                with autocast(run.device, args.amp):
                    s_logits = grouped(learner, x, plan.virtual_gpus, forward).float()
                    t_logits = teacher and teacher.encoder(x).float()
            # step 2, meta: logits of the queries of 4 episodes (Q, way)
            else:
                with autocast(run.device, args.amp):
                    feats = grouped(learner, data.normalize(base_x[index]), plan.virtual_gpus, features).float()
                s_logits = episode_logits(*split(feats), args.metric, learner.temp).flatten(0, 1)  # eq. (12)
                t_logits = teacher and episode_logits(*split(t_feats[index]), args.metric, teacher.temp).flatten(0, 1)
                y = y_query
            terms = distill_terms(s_logits, t_logits, y, e + 1, plan)
            loss = terms["gt"] + terms["kd"] + terms["align"]  # eq. (13)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % args.log_every == 0:
                stats = transport_stats(s_logits, t_logits) if teacher and args.gda else {}
                run.log(step, epoch, loss_total=loss, **{f"loss_{k}": v for k, v in terms.items()}, **stats,
                        lr=group["lr"], tau=learner.temp)
        if (e + 1) % args.eval_every == 0 or e + 1 == plan.epochs:
            if stage == "classifier":
                name, score = "heldout_top1", evaluate(learner.encoder, data)["top1"]
            else:
                name, feats = "val_top1", encode(learner, data, data.val[0])
                score, _ = episode_accuracy(feats, data.val[1], args.fs_shots[0], args.episodes, args)
            if score > best.score:  # sync
                best.load_state_dict({**learner.state_dict(), "score": torch.tensor(score)})
            run.log(step, epoch, loss_total=loss, **{name: score})
        if e + 1 == plan.epochs:
            last, selected = ({k: v.cpu() for k, v in m.state_dict().items() if k != "score"} for m in (learner, best))
            plain = not teacher and (stage == "classifier" or not args.student_ckpt and args.stage == "meta")
            for path in (run.dir / f"{stage}.pt", *[plain_path(plan, data)] * plain):
                save(path, {"state_dict": last, "selected": selected, "arch": args.student, "stage": stage})
        if not run.end_epoch(epoch, learner, None):
            return run.finish({})
    # step 3, test: of each stage the last epoch and the one selected on held-out data; the last of these is the result
    results, tops = {}, fewshot_test(teacher, data, args, f"teacher {args.teacher}") if teacher else {}
    scored = {"classifier": (False, True), "meta": (True, False), "test": (False,)}
    for stage in stages or ["test"]:
        for chosen in scored[stage]:
            name = f"{stage}, {'selected' if chosen else 'last'}"
            learner.load(run.dir / f"{stage}.pt" if stages else args.student_ckpt, chosen)
            results[name] = fewshot_test(learner, data, args, name)
    row = {"top1": results[name][first][0], "best": None, "best_epoch": None, "fs": results[name], "fs_all": results,
           "teacher_top1": tops.get(first, [None])[0], "real_images": n, **row_names(args, args.fs_shots[0]),
           "n_test": 10 * args.episodes // PER_STEP * PER_STEP}
    return run.finish(row, student=learner)


def main(args: Args) -> dict:
    if args.distiller == "vanilla" and not args.labels:
        fail("--distiller vanilla --no_labels leaves nothing to learn from; choose another --distiller")
    if args.distiller == "adaptconf" and not args.superalignment_threshold:
        fail("--superalignment_threshold 0: eq. (10) divides by it; give more")
    if args.distiller in ("dkd", "augconf") and args.superalignment_threshold > 1:
        print(f"warning: theta {args.superalignment_threshold:g} > 1 makes the weight of the distillation negative")
    if args.task == "fewshot":
        return fewshot(args)
    for flag in ("teacher", "student"):
        if getattr(args, flag).endswith(("_bottle", "_thin")) and ".py:" not in getattr(args, flag):
            fail(f"--{flag} {getattr(args, flag)} is a backbone of --task fewshot; choose another network")
    if not args.evaluate:
        return classify(args)
    row = evaluate_file(args)
    return row if args.recipe == "native" else {**evaluate_file(args, view=zoomed), "native_top1": row["last"]}  # D8


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
