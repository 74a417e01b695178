"""AKD-GAN: distil a student from a teacher without any data, in a game against a generator of images.

Project "Adversarial Knowledge Distillation with GANs, CIFAR-100" (no paper). Its loop is that of Fang et al.,
        "Data-Free Adversarial Distillation" (DFAD), arXiv 1912.11006.
Data    none; the test split only for reporting. G makes images in the teacher's normalised space.
Result  reported, best epoch on a part of the test images: CIFAR-100 ResNet-34 -> ResNet-18 39.90, half of its width
        20.00; by DFAD's authors, 32-pixel teacher: ResNet-18 67.7 +- 0.3 (rows: PUBLISHED)

Each epoch, for one student after the other (official: all against one G and its Adam)
  epoch_itrs times
  1. kd_steps times: z ~ N(0, 1), x = G(z), one SGD step of S on
       L_S   = D(S(x), T(x))                         no gradient into G and T                                     (1)
       D     = mean_nc |s_nc - t_nc|                 l1: raw logits, mean over batch and classes                  (2)
       D     = T^2 KL(p_T || p_S)                    kl: softmax at temperature T, sum over classes, batch mean   (3)
  2. fresh z, x = G(z), one Adam step of G on
       L_G   = adv*L_adv + div*L_div + bn*L_bn + oh*L_oh + balance*L_bal                                          (4)
       L_adv = -D(S(x), T(x))                        gradient through S and T into G                              (5)
       L_div = mean_{i != j} cos(x_i, x_j)           flattened images                                             (6)
       L_bn  = sum_l ||v_l - V_l||_2 + ||m_l - M_l||_2    norm over channels, sum over the teacher's batch norms
               m_l, v_l: mean and biased variance of the layer's input over the batch                             (7)
       L_oh  = CE(t, argmax t)                       mean over batch                                              (8)
       L_bal = sum_c p_c log p_c                     p = mean over the batch of softmax(t)                        (9)
G is in train mode (batch statistics) and T in eval mode always, S in train mode; --student_eval_in_g: eval in step 2.

Symbols  T -> teacher (T in eq. (3): args.T), S -> student, G -> generator, s, t -> s_logits, t_logits,
         (M_l, V_l), (m_l, v_l) -> running_mean, running_var, mean, var
Presets  official  eq. (2), 15 : 1, adv only; the teacher sees x bilinearly up-sampled to 224 (--teacher_size)
         dfad      DFAD: 32-pixel teacher, a G for each student, 5 : 1, higher rates that fall at 20 and 40 % of epochs
         strong    dfad with eq. (3) at T = 1, 10 : 1, a cosine rate, and the bn, oh, balance of DFQ (Choi et al. 2020)

Deviations from the published code
  D1 its README says KL, its code is eq. (2); --loss kl and --div are functions that it has and never calls
  D2 it scores a part of the test images and drops the last batch, best epoch; here all images, last epoch, the best
     beside it. --test_split 0.2,0.1 adds its way of scoring
  D3 a missing teacher file gave it a random teacher; here that is an error (no file named: one is trained)
  D4 its networks are lost: G is DFAD's; the ResNets have the reported numbers of parameters
  D5 the same numbers with less work (tests/test_akd_gan.py): G without graph in step 1, one teacher call for several
     batches where that is faster (each batch of G is a batch norm batch of its own), gradient of G only in step 2
  D6 kept: one G and one Adam chase both students, constant rates, decay on all parameters

  python akd_gan.py --smoke                                                       # no download, a minute
  python akd_gan.py --preset strong --teacher resnet34 --student resnet18         # CIFAR-100
  python akd_gan.py --sample 25 --evaluate RUN_FOLDER                             # what the generator makes
"""
import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (
    ChannelStatistics, Data, Run, accuracy, agreement, autocast, build_model, cli, count_params_macs, evaluate_file,
    fail, get_teacher, has_statistics, image_grid, load_data, lr_at, norm_constants, predict, published_row,
    read_checkpoint, read_json, save, short_name, subset_indices)


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
    teacher: str = "resnet34_imagenet"  # network: a name in MODELS, or file.py:callable
    student: str = "resnet18,resnet18_small"  # networks, separated by commas; the project's 50 and 20 are these two
    epochs: int = 100  # each trains every student in turn
    batch_size: int = 256  # images per step, and per scored batch of --test_split
    lr: float = 0.01  # peak learning rate of the students
    weight_decay: float = 5e-4  # on all parameters
    momentum: float = 0.9  # SGD momentum
    teacher_size: int = 0  # images are up-sampled to it for the teacher; 0 = 224 for resnet34_imagenet, else not
    # the game
    epoch_itrs: int = 100  # rounds of steps 1 and 2 per epoch and student
    kd_steps: int = 15  # student steps per round
    loss: Literal["l1", "kl"] = "l1"  # D: eq. (2) or eq. (3)
    T: float = 1.0  # temperature of eq. (3)
    shared_generator: bool = True  # one G and one Adam for all students; --own_generator: one for each
    nz: int = 100  # size of z
    ngf: int = 64  # width of the generator
    lr_g: float = 1e-3  # learning rate of the generator
    gen_betas: tuple[float, ...] = (0.9, 0.999)  # betas of its Adam
    scheduler: Literal["none", "step", "cosine"] = "none"  # step: S and G, a tenth from each milestone; cosine: S, to 0
    milestones: tuple[int, ...] = ()  # epochs, counted from 1, of scheduler step; none = 20 and 40 % of --epochs
    adv: float = 1.0  # weight of eq. (5)
    div: float = 0.0  # weight of eq. (6)
    bn: float = 0.0  # weight of eq. (7)
    oh: float = 0.0  # weight of eq. (8)
    balance: float = 0.0  # weight of eq. (9)
    student_eval_in_g: bool = False  # S in eval mode in step 2
    # scores and images
    test_split: tuple[float, ...] = ()  # D2: also score these shares of the test images, drawn with seed 42
    drop_last: bool = True  # D2: --test_split leaves out the last batch if it is not full
    sample: int = 0  # with --evaluate RUN_FOLDER_OR_GENERATOR_FILE: draw so many images into its samples/ and exit


DFAD = dict(teacher="resnet34", epochs=500, epoch_itrs=50, kd_steps=5, lr=0.1, nz=256, scheduler="step",
            shared_generator=False)
STRONG = {**DFAD, **dict(epochs=200, epoch_itrs=40, kd_steps=10, loss="kl", scheduler="cosine", gen_betas=(0.5, 0.999),
                         bn=1.0, oh=1.0, balance=20.0, student_eval_in_g=True)}
PRESETS = {
    "auto": {},
    "official": {},  # the bare defaults
    "dfad": {"*": DFAD},
    "strong": {"*": STRONG},
    "demo": {"*": {**STRONG, **dict(dataset="shapes", teacher="resnet20", student="resnet8", epochs=8, epoch_itrs=14,
                                    kd_steps=8, batch_size=32, ngf=16, lr=0.05, adv=0.5)}},
    "smoke": {"*": dict(dataset="shapes", teacher="resnet8", student="resnet8,resnet14", limit_train=300,
                        limit_test=200, epochs=1, epoch_itrs=2, kd_steps=2, batch_size=32, ngf=16,
                        allow_weak_teacher=True)}}
TWO = {"50": "resnet18", "20": "resnet18_small", "50,20": "resnet18,resnet18_small", "20,50": "resnet18_small,resnet18"}
ALIASES = {"student": {k: ("student", v) for k, v in TWO.items()}, "students": "student",
           "own_generator": ("shared_generator", False)}
REPORTED = "best epoch on 20 % of the test images; on 10 %:"
PUBLISHED = {  # (preset, dataset, teacher, student, shots) -> top-1, protocol
    ("official", "cifar100", "resnet34_imagenet", "resnet18", None): (39.90, f"{REPORTED} 38.10"),
    ("official", "cifar100", "resnet34_imagenet", "resnet18_small", None): (20.00, f"{REPORTED} 19.01"),
    ("dfad", "cifar100", "resnet34", "resnet18", None): (67.7, "DFAD's authors, teacher 77.5"),
    ("strong", "cifar100", "resnet34", "resnet18", None): (77.01, "DFQ in the CMI repository, wider G, teacher 78.05")}


class Generator(nn.Module):
    """z (B, nz) -> images (B, 3, size, size), zero mean and unit variance per channel and batch; DFAD's (D4)."""

    def __init__(self, nz: int = 100, ngf: int = 64, size: int = 32):
        super().__init__()
        self.side = size // 4
        self.l1 = nn.Sequential(nn.Linear(nz, 2 * ngf * self.side ** 2))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(2 * ngf))
        self.conv_blocks1 = nn.Sequential(
            nn.Conv2d(2 * ngf, 2 * ngf, 3, 1, 1), nn.BatchNorm2d(2 * ngf), nn.LeakyReLU(0.2, inplace=True))
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(2 * ngf, ngf, 3, 1, 1), nn.BatchNorm2d(ngf), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ngf, 3, 3, 1, 1), nn.Tanh(), nn.BatchNorm2d(3, affine=False))

    def forward(self, z: Tensor) -> Tensor:
        x = self.l1(z.flatten(1)).view(len(z), -1, self.side, self.side)  # (B, 2ngf, size/4, size/4)
        x = self.conv_blocks1(F.interpolate(self.conv_blocks0(x), scale_factor=2))  # (B, 2ngf, size/2, size/2), nearest
        return self.conv_blocks2(F.interpolate(x, scale_factor=2)).to(z.dtype)  # losses stay in float32


# ------------------------------------------------------------------------------------------------------------ losses

def kd_loss(s_logits: Tensor, t_logits: Tensor, T: float, eps: float = 0.0) -> Tensor:
    """Eq. (3): sum over classes, mean over batch; gradient into both. D1: the published one adds eps = 1e-8 to p_T."""
    t_logp = F.log_softmax(t_logits / T, 1)
    t_logp = (t_logp.exp() + eps).log() if eps else t_logp
    return T * T * F.kl_div(F.log_softmax(s_logits / T, 1), t_logp, reduction="batchmean", log_target=True)  # eq. (3)


def distance(s_logits: Tensor, t_logits: Tensor, loss: str, T: float = 1.0) -> Tensor:
    """D: eq. (2), mean over batch and classes, or eq. (3); gradient into both."""
    return F.l1_loss(s_logits, t_logits) if loss == "l1" else kd_loss(s_logits, t_logits, T)  # eq. (2)


def diversity(x: Tensor) -> Tensor:
    """Eq. (6): mean over the ordered pairs of different images; signed."""
    rows = F.normalize(x.flatten(1), eps=1e-12)
    cos = (rows @ rows.T).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    return cos.sum() / (len(x) * (len(x) - 1))  # eq. (6)


@contextlib.contextmanager
def bn_distances(teacher: nn.Module) -> Iterator[list[Tensor]]:
    """While open, each batch norm in a pass of the teacher appends its part of eq. (7): norms over channels."""
    taps: list[Tensor] = []

    def tap(m: nn.BatchNorm2d, inputs: tuple) -> None:
        mean, var = ChannelStatistics.apply(inputs[0].to(m.running_mean.dtype))
        taps.append((var - m.running_var).norm() + (mean - m.running_mean).norm())

    hooks = [m.register_forward_pre_hook(tap) for m in teacher.modules() if has_statistics(m)]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(t_logits: Tensor) -> Tensor:
    """Eq. (9): minus the entropy of the mean prediction; sum over classes."""
    logp = F.log_softmax(t_logits, 1).logsumexp(0) - math.log(len(t_logits))  # (C,)
    return (logp.exp() * logp).sum()


def generator_terms(x: Tensor, teacher: nn.Module, student: nn.Module, args: Args) -> dict[str, Tensor]:
    """The terms of eq. (4) whose weight is not 0 (adv always), by the names of their weights."""
    with bn_distances(teacher) if args.bn else contextlib.nullcontext() as taps, autocast(x.device, args.amp):
        t_logits, s_logits = teacher(x), student(x)
    t_logits = t_logits.to(x.dtype)
    terms = {"adv": -distance(s_logits.to(x.dtype), t_logits, args.loss, args.T)}  # eq. (5)
    if args.div:
        terms["div"] = diversity(x)  # eq. (6)
    if args.bn:
        terms["bn"] = torch.stack(taps).sum()  # eq. (7)
    if args.oh:
        terms["oh"] = F.cross_entropy(t_logits, t_logits.argmax(1))  # eq. (8)
    if args.balance:
        terms["balance"] = balance_loss(t_logits)  # eq. (9)
    return terms


def weighted(terms: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    return {name: getattr(args, name) * term for name, term in terms.items()}


# -------------------------------------------------------------------------------------------- steps 1 and 2: the game

def student_steps(student: nn.Module, sgd: torch.optim.Optimizer, generator: nn.Module, teacher: nn.Module,
                  draw: Callable[[], Tensor], args: Args, at_once: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step 1 -> D before each update (kd_steps,), share of images on which S and T agree, images of each class (C,).

    G stands still meanwhile, so all batches are made first; the teacher sees `at_once` images per call (D5).
    """
    with torch.no_grad(), autocast(next(student.parameters()).device, args.amp):
        x = torch.cat([generator(draw()) for _ in range(args.kd_steps)])  # (kd_steps * B, 3, S, S)
        t_logits = torch.cat([teacher(part) for part in x.split(at_once)]).to(x.dtype)
    losses, agree = [], []
    for x_part, t_part in zip(x.chunk(args.kd_steps), t_logits.chunk(args.kd_steps)):
        with autocast(x.device, args.amp):
            s_logits = student(x_part)
        loss = distance(s_logits.to(x.dtype), t_part, args.loss, args.T)  # eq. (1)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
        agree.append(s_logits.argmax(1) == t_part.argmax(1))
    counts = (t_logits.argmax(1, keepdim=True) == torch.arange(t_logits.shape[1], device=x.device)).sum(0)
    return torch.stack(losses), torch.cat(agree).to(x.dtype).mean(), counts


def generator_step(student: nn.Module, generator: nn.Module, adam: torch.optim.Optimizer, teacher: nn.Module, z: Tensor,
                   args: Args, measure: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Step 2 -> (the terms {loss_NAME}, if asked for the norm of each weighted term's gradient in x {grad_x_NAME})."""
    student.train(not args.student_eval_in_g).requires_grad_(False)  # D5
    with autocast(z.device, args.amp):
        x = generator(z)
    terms = generator_terms(x, teacher, student, args)
    parts = weighted(terms, args)
    loss = sum(parts.values())  # eq. (4)
    sizes = {f"grad_x_{name}": torch.autograd.grad(part, x, retain_graph=True)[0].norm()
             for name, part in parts.items()} if measure else {}
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()
    student.train().requires_grad_(True)
    return {f"loss_{name}": term.detach() for name, term in terms.items()}, sizes


def summary(seen: dict[str, list]) -> dict[str, Tensor]:
    """Means since the last log point, and the entropy (nats) of the teacher's classes there: near 0 is collapse."""
    shares = torch.stack(seen["counts"]).sum(0) / torch.stack(seen["counts"]).sum()
    means = {key: torch.stack(values).mean() for key, values in seen.items() if key != "counts"}
    return {**means, "entropy": torch.special.entr(shares).sum()}


def lrs_at(epoch: int, args: Args, gamma: float = 0.1) -> tuple[float, float]:
    """Learning rates of S and G in a 0-based epoch."""
    if args.scheduler == "cosine":
        return lr_at({"kind": "cosine", "lr": args.lr, "T_max": args.epochs}, epoch), args.lr_g
    falls = args.milestones or (max(2, args.epochs // 5), max(3, 2 * args.epochs // 5))  # DFAD counts from 1
    milestones = falls if args.scheduler == "step" else ()
    recipe = {"kind": "multistep", "milestones": milestones, "gamma": gamma}
    return tuple(lr_at({**recipe, "lr": lr}, epoch + 1) for lr in (args.lr, args.lr_g))


# -------------------------------------------------------------------------------------------------- evaluation, images

def subset_score(logits: Tensor, y: Tensor, batch_size: int, drop_last: bool) -> dict[str, float]:
    """Accuracy and mean cross-entropy in batches as published: without the last one if it is not full (D2)."""
    n = len(y) // batch_size * batch_size if drop_last else len(y)
    return {**accuracy(logits[:n], y[:n]), "n": n}


def subset_scores(logits: Tensor, y: Tensor, args: Args, before: dict) -> dict[str, dict]:
    """D2: {split: last and best top-1, images, standard error} of the published parts of the test images."""
    rows = {}
    for split in args.test_split:
        index = torch.from_numpy(subset_indices(len(y), split)).to(y.device)
        part = subset_score(logits[index], y[index], args.batch_size, args.drop_last)
        top1, best = part["top1"], before.get(f"{split:g}", {}).get("best", 0.0)
        rows[f"{split:g}"] = {"last": top1, "best": max(top1, best), "n": part["n"],
                              "standard_error": math.sqrt(top1 * (100 - top1) / part["n"])}
    return rows


@torch.no_grad()
def make_images(generator: Generator, n: int, seed: int) -> Tensor:
    """n normalised images of the z of a seed, with the running statistics of G: the same picture every epoch."""
    device = next(generator.parameters()).device
    z = torch.randn(n, generator.l1[0].in_features, generator=torch.Generator(device).manual_seed(seed), device=device)
    generator.eval()
    x = torch.cat([generator(part) for part in z.split(250)])
    generator.train()
    return x


def pixels(x: Tensor, mean: Any, std: Any) -> Tensor:
    """Normalised images (N, 3, H, W) -> uint8 (N, H, W, 3), rounded to nearest."""
    mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return ((x * std + mean).clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def write_images(pix: Tensor, folder: Path) -> None:
    """grid.png, int(sqrt(N)) images per row, and image_000.png ..."""
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    image_grid(pix.permute(0, 3, 1, 2), math.ceil(len(pix) / math.isqrt(len(pix))), folder / "grid.png")
    for i, image in enumerate(pix.numpy()):
        Image.fromarray(image).save(folder / f"image_{i:03d}.png")


def sample(args: Args) -> dict:
    """--sample: the (first) generator of a run folder, or the one of a file; sizes are read off its shapes."""
    path = Path(args.evaluate)
    folder = path if path.is_dir() else path.parent
    saved = read_checkpoint(path / "ckpt_last.pt" if path.is_dir() else path)
    objects = saved.get("objects", {"generator": saved}) if isinstance(saved, dict) else {}
    state = next((v for k, v in objects.items() if k.startswith("generator")), {})
    if not {"l1.0.weight", "conv_blocks0.0.weight"} <= state.keys():
        fail(f"--sample {args.sample}: {path} holds no generator of akd_gan.py; give a run folder or its generator.pt")
    (units, nz), width = state["l1.0.weight"].shape, len(state["conv_blocks0.0.weight"])
    generator = Generator(nz, width // 2, 4 * math.isqrt(units // width))
    generator.load_state_dict(state)
    norm = read_json(folder / "config.json").get("derived", {}).get("norm")
    norm = args.norm if norm is None or "norm" in args.given else norm
    if norm == "auto":
        fail(f"--sample {args.sample}: no config.json beside {path}; say with --norm how its images are normalised")
    write_images(pixels(make_images(generator, args.sample, args.seed), *norm_constants(norm)), folder / "samples")
    print(f"{args.sample} images written to {folder / 'samples'}")
    return {"method": "akd_gan", "synthetic_images": args.sample}


# -------------------------------------------------------------------------------------------------------------- main

def check(args: Args) -> None:
    students = [short_name(arch) for arch in args.student.split(",")]
    if len(set(students)) < len(students):
        fail(f"--student {args.student}: one network twice; start two runs")
    if len(args.gen_betas) != 2 or max(args.gen_betas, default=1) >= 1:
        fail("--gen_betas: give two numbers below 1")
    if args.div and args.batch_size < 2:
        fail("--div compares the images of a batch, give --batch_size 2 or more")
    if not any((args.adv, args.div, args.bn, args.oh, args.balance)):
        fail("--adv 0: the generator has nothing to learn from; give --adv, --div, --bn, --oh or --balance")
    if args.sample:
        fail(f"--sample {args.sample}: give --evaluate RUN_FOLDER_OR_GENERATOR_FILE too")


def check_data(args: Args, data: Data) -> None:
    if 0 < args.teacher_size < data.image_size or args.teacher_size and args.teacher.startswith("netgraft"):
        fail(f"--teacher_size {args.teacher_size}: images of {data.image_size} pixels are never made smaller, and a "
             "netgraft teacher takes them as they are; leave the flag out")
    for split in args.test_split:
        n = int(len(data.test_y) * split)
        if not 0 < split <= 1 or n < (args.batch_size if args.drop_last else 1):
            fail(f"--test_split {split}: {n} of {len(data.test_y)} test images hold no batch of {args.batch_size}; "
                 "give a share up to 1, a smaller --batch_size, or --no_drop_last")
    if args.test_split and len(data.test_y) > 1 and bool((data.test_y.diff() >= 0).all()):
        print("note: this test split is sorted by class, so --test_split scores other images than the published ones")


def check_teacher(args: Args, teacher: nn.Module) -> None:
    if args.bn and not any(has_statistics(m) for m in teacher.modules()):
        fail(f"the teacher {args.teacher} has no BatchNorm2d for eq. (7); choose another one, or go on with --bn 0")


def main(args: Args) -> dict:
    names = {short_name(arch): arch for arch in args.student.split(",")}
    args.teacher_size = args.teacher_size or (224 if args.teacher == "resnet34_imagenet" else 0)
    if args.evaluate:
        if args.sample:
            return sample(args)
        args.student = names.get(Path(args.evaluate).stem.removeprefix("student_"), args.student.split(",")[0])
        return evaluate_file(args)
    check(args)
    run = Run(args)
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    check_data(args, data)
    place = {"device": run.device, "memory_format": torch.channels_last}
    students = {name: build_model(arch, data.num_classes, data.image_size).to(**place) for name, arch in names.items()}
    teacher, info = get_teacher(args, data, args.teacher_size, check=partial(check_teacher, args))  # D3
    sgds = {name: torch.optim.SGD(s.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
            for name, s in students.items()}
    owners = {name: "generator" if args.shared_generator else f"generator_{name}" for name in names}  # D6
    generators = {owner: Generator(args.nz, args.ngf, data.image_size).to(**place)
                  for owner in dict.fromkeys(owners.values())}
    adams = {owner: torch.optim.Adam(g.parameters(), args.lr_g, args.gen_betas) for owner, g in generators.items()}
    run.note(teacher=info, norm=data.norm,
             student_params_macs={name: count_params_macs(s, data.image_size) for name, s in students.items()})
    guide = torch.compile(teacher) if args.compile else teacher
    nets = {name: torch.compile(s) if args.compile else s for name, s in students.items()}
    one_by_one = run.device.type == "cpu" or args.teacher_size > data.image_size
    at_once = args.batch_size if one_by_one else 1024  # D5: at 224 pixels more images only take memory
    draw = partial(torch.randn, args.batch_size, args.nz, generator=run.generator, device=run.device)
    start = run.restore(**{f"student_{name}": s for name, s in students.items()}, **generators,
                        **{f"sgd_{name}": o for name, o in sgds.items()},
                        **{f"adam_{owner}": o for owner, o in adams.items()})
    for epoch in range(start, args.epochs):
        lr, lr_g = lrs_at(epoch, args)
        for name, student in nets.items():
            generator, sgd, adam, seen = generators[owners[name]], sgds[name], adams[owners[name]], defaultdict(list)
            sgd.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, lr_g
            for i in run.bar(range(args.epoch_itrs), f"epoch {epoch + 1} {name}"):
                due = (i + 1) % max(1, args.log_every // args.kd_steps) == 0 or i + 1 == args.epoch_itrs
                # step 1: the student imitates the teacher
                losses, agree, counts = student_steps(student, sgd, generator, guide, draw, args, at_once)
                # step 2: the generator looks for images on which it does not
                terms, sizes = generator_step(student, generator, adam, teacher if args.bn else guide, draw(), args,
                                              measure=due)
                for key, value in {"loss_kd": losses.mean(), "agree": agree, "counts": counts, **terms}.items():
                    seen[key].append(value)
                if due:
                    row = {**summary(seen), **sizes, "lr": lr, "lr_g": lr_g}
                    run.log((epoch * args.epoch_itrs + i + 1) * args.kd_steps, epoch,
                            **{f"{key}_{name}": value for key, value in row.items()})
                    seen.clear()
        if run.due(epoch, args.save_every):
            for owner, generator in generators.items():
                run.grid(f"ep{epoch + 1:03d}{owner.removeprefix('generator')}",
                         data.denormalize(make_images(generator, 64, args.seed)), rows=8)
        tops = {}
        for name, student in students.items() if run.due(epoch, args.eval_every) else ():
            logits = predict(student, data)
            tops[name] = accuracy(logits, data.test_y)["top1"]
            score = run.scores.setdefault(name, {"last": 0.0, "best": -1.0, "best_epoch": epoch})  # kept for resume
            score["subset"] = subset_scores(logits, data.test_y, args, score.get("subset", {}))
            for split, part in score["subset"].items():
                run.log(run.step, epoch, **{f"acc_subset_{split}_{name}": part["last"]})
        if not run.end_epoch(epoch, students, tops or None):
            return run.finish({})
    for owner, generator in generators.items():
        save(run.dir / f"{owner}.pt", {k: v.cpu() for k, v in generator.state_dict().items()})
    rows, preset = [], "official" if args.preset == "auto" else args.preset
    for name, arch in names.items():
        logits = predict(students[name], data)
        scores = accuracy(logits, data.test_y)
        rows.append({"student": arch, "last": scores.pop("top1"), **scores, **agreement(logits, data.t_logits),
                     **run.scores.get(name, {}),
                     "paper": published_row(PUBLISHED, preset, args.dataset, args.teacher, arch, None)})
    made = args.epochs * args.epoch_itrs * (args.kd_steps + 1) * args.batch_size  # for each student
    return run.finish({"preset": preset, "teacher_top1": info["top1"], **rows[0], "n_test": len(data.test_y),
                       "real_images": 0, "synthetic_images": made, "students": rows})


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
