"""Distil students from a teacher without any data, in a game against a generator of images.

Why it works. A teacher answers any image, not only those it was trained on; what is missing is a
set of images worth asking about. A generator makes them: it is trained to find images on which the
student does not yet answer like the teacher, and the student is trained to answer like the teacher
on whatever it is shown: what the one minimises the other maximises. Where the two
networks agree the generator has nothing to gain and moves on, until they agree wherever it can
reach. Its weak spot: nothing asks it for anything like a real image, and one texture on which the
teacher is erratic is enough to win. Preset `strong` therefore also asks for images whose layer
statistics are those of the teacher's training images, on which the teacher is sure of its class,
and which spread evenly over all classes.

Project  "Adversarial Knowledge Distillation with GANs, CIFAR-100" (no paper). Its loop is that of
         Fang et al., "Data-Free Adversarial Distillation" (DFAD), arXiv 1912.11006.
Data     none; test images only for the scores. G makes images in the teacher's normalised units.

Each epoch, for one student after the other, epoch_itrs rounds of
  1. kd_steps fresh batches z ~ N(0, 1), x = G(z), and on each one SGD step of the student S on
       L_S   = D(S(x), T(x))                         no gradient into G and T                 (1)
       D     = mean_nc |s_nc - t_nc|                 l1: over batch and classes               (2)
       D     = tau^2 KL(p_t || p_s)                  kl: softmax at tau, mean over the batch  (3)
  2. one more batch z, x = G(z), and one Adam step of the generator G on
       L_G   = adv*L_adv + bn*L_bn + oh*L_oh + balance*L_bal                                  (4)
       L_adv = -D(S(x), T(x))                        gradient through S and T into G          (5)
       L_bn  = sum_l (||v_l - V_l||_2 + ||m_l - M_l||_2)  l: batch norms of T, norms over C   (6)
       L_oh  = CE(t, argmax t)                       mean over the batch                      (7)
       L_bal = sum_c p_c log p_c                     p = batch mean of softmax(t), 0 log 0 = 0 (8)
T is frozen and in eval mode, G in train mode, S in train mode (strong: in eval mode in step 2).

Symbols  S, T, G -> student, teacher, generator; tau -> args.T; s, t -> s_logits, t_logits; m_l, v_l
         -> mean, biased var of a layer's input over N, H, W; M_l, V_l -> running_mean, running_var
Presets  official  eq. (2), kd_steps 15, adv only, constant rates, one G and one Adam against both
                   students; T sees x enlarged to 224 pixels (bilinear, corners aligned)
         dfad      DFAD: T at 32 pixels, a G for each student, kd_steps 5; both rates fall to a
                   tenth at 20 and 40 % of the epochs, counted from 1
         strong    dfad with eq. (3), tau 1, kd_steps 10, S's rate lr/2 (1 + cos(pi epoch/epochs)),
                   G's constant; adv, bn, oh, balance = 1, 1, 1, 20, the losses of DFQ
         small, small_dfad, small_official   the same for CIFAR-10 and 25 minutes of one core

Deviations from the published code
  D1 its text says KL, its code is eq. (2); so is preset official
  D2 it scores a part of the test images, in whole batches, best epoch; here all of them, last
     epoch, the best beside it. --test_split 0.2 0.1 adds its way of scoring
  D3 a missing teacher file gave it a random teacher; here one is trained
  D4 its networks are lost: G is DFAD's, the ResNets have the reported numbers of parameters
  D5 equal numbers, less work: no graph of G in step 1, no gradient of S's weights in step 2

Published  CIFAR-100, T ResNet-34: resnet18 39.90, resnet18_small 20.00 (best epoch on a part of the
           test images); by DFAD's authors 67.7, with DFQ's losses (like strong) 77.01
Measured   real CIFAR-10, ResNet-20 (91.73) -> wrn16_1 / resnet8, last epoch, n = 1, 21 minutes of
           one core in bfloat16: small 51.54 / 47.62, small_dfad 14.74 / 22.30, small_official
           11.57 / 11.72 (chance is 10)

  python akd_gan.py --smoke                            # a minute, no download
  python akd_gan.py --preset strong                    # CIFAR-100, ResNet-34 -> ResNet-18
  python akd_gan.py --sample runs/NAME/generator.pt    # draw images of a finished run
"""
import contextlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import save_image

from common import (
    ChannelStatistics, CommonArgs, Run, accuracy, autocast, build_model, cli, fail, flag,
    get_teacher, has_statistics, load_data, predict, reading, short_name, write_torch)


@dataclass
class Args(CommonArgs):
    dataset: str = flag("cifar100", "cifar10, cifar100, tiny_imagenet, shapes, or your own folder")
    teacher: str = flag("resnet34_imagenet", "network: a name in MODELS, or file.py:callable")
    student: str = flag("resnet18,resnet18_small", "one network or several, separated by commas")
    epochs: int = flag(100, "length of the run; an epoch trains each student in turn", low=1)
    batch_size: int = flag(256, "images per step", low=1)
    lr: float = flag(0.01, "peak learning rate of the students")
    momentum: float = flag(0.9, "momentum of the students' SGD")
    weight_decay: float = flag(5e-4, "weight decay of all parameters of the students")
    teacher_size: int = flag(0, "side of the images for the teacher; 0 = 224 for an ImageNet stem")
    # the game
    epoch_itrs: int = flag(100, "rounds of steps 1 and 2 per epoch and student", low=1)
    kd_steps: int = flag(15, "student steps per round", low=1)
    loss: Literal["l1", "kl"] = flag("l1", "what counts as disagreement: eq. (2) or eq. (3)")
    T: float = flag(1.0, "temperature of eq. (3); a high one weighs all classes alike", low=1e-6)
    student_eval_in_g: bool = flag(False, "the student in eval mode in step 2")
    scheduler: Literal["none", "step", "cosine"] = flag(
        "none", "step: both rates fall to a tenth at each of --falls; cosine: the students' to 0")
    falls: tuple[float, ...] = flag((0.2, 0.4), "where scheduler step falls, in parts of the run")
    # the generator
    shared_generator: bool = flag(True, "one generator against all students, or one for each")
    nz: int = flag(100, "numbers in the noise of an image", low=1)
    ngf: int = flag(64, "width of the generator", low=1)
    lr_g: float = flag(1e-3, "learning rate of the generator")
    gen_beta1: float = flag(0.9, "first beta of the generator's Adam")
    adv: float = flag(1.0, "weight of eq. (5): images on which the student is wrong")
    bn: float = flag(0.0, "weight of eq. (6): images that look natural to the teacher's layers")
    oh: float = flag(0.0, "weight of eq. (7): images of which the teacher is sure")
    balance: float = flag(0.0, "weight of eq. (8): images of all classes")
    # scores and images
    test_split: tuple[float, ...] = flag((), "D2: also score these shares of the test images")
    sample: str = flag("", "only draw images of this generator file, into samples/ beside it")
    sample_images: int = flag(25, "how many images --sample draws", low=1)


DFAD = dict(
    teacher="resnet34", student="resnet18", epochs=500, epoch_itrs=50, kd_steps=5, lr=0.1, nz=256,
    scheduler="step", shared_generator=False)
STRONG = dict(
    teacher="resnet34", student="resnet18", epochs=200, epoch_itrs=40, kd_steps=10, lr=0.1, nz=256,
    scheduler="cosine", shared_generator=False, loss="kl", gen_beta1=0.5, student_eval_in_g=True,
    bn=1.0, oh=1.0, balance=20.0)
SMALL = dict(
    dataset="cifar10", teacher="resnet20", student="wrn16_1,resnet8", epochs=30, batch_size=32,
    ngf=32, eval_every=5)
PRESETS = {
    "auto": {},  # the defaults are the project's own values
    "official": {},
    "dfad": {"*": DFAD},
    "strong": {"*": STRONG},
    "small": {"*": {
        **STRONG, **SMALL, "epoch_itrs": 50, "kd_steps": 5, "lr": 0.05, "lr_g": 2e-3, "T": 20.0}},
    "small_dfad": {"*": {**DFAD, **SMALL, "falls": (0.6, 0.83)}},
    "small_official": {"*": {**SMALL, "epoch_itrs": 17}},
    "demo": {"*": dict(
        STRONG, dataset="shapes", teacher="resnet20", student="resnet8", epochs=8, epoch_itrs=14,
        kd_steps=8, batch_size=32, ngf=16, lr=0.05, T=4.0, adv=0.5)},
    "smoke": {"*": dict(
        smoke=True, dataset="shapes", teacher="resnet8", student="resnet8,resnet14", epochs=1,
        epoch_itrs=2, kd_steps=2, batch_size=32, ngf=16, log_every=1)},
}


# ---------------------------------------------------------------------------------- networks

class Generator(nn.Module):
    """z (B, nz) -> images (B, 3, size, size), zero mean and unit variance per channel and batch."""

    def __init__(self, nz=100, ngf=64, size=32):
        super().__init__()
        self.side = size // 4
        self.l1 = nn.Sequential(nn.Linear(nz, 2 * ngf * self.side ** 2))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(2 * ngf))
        self.conv_blocks1 = nn.Sequential(
            nn.Conv2d(2 * ngf, 2 * ngf, 3, padding=1),
            nn.BatchNorm2d(2 * ngf),
            nn.LeakyReLU(0.2, inplace=True))
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(2 * ngf, ngf, 3, padding=1),
            nn.BatchNorm2d(ngf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ngf, 3, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(3, affine=False))

    def forward(self, z):
        x = self.l1(z.flatten(1)).view(len(z), -1, self.side, self.side)
        x = self.conv_blocks0(x)  # (B, 2 ngf, size / 4, size / 4)
        x = self.conv_blocks1(F.interpolate(x, scale_factor=2))
        x = self.conv_blocks2(F.interpolate(x, scale_factor=2))
        return x.to(z.dtype)  # under autocast too: the losses are computed in float32


def upsample(x, size):
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)


class Upsampled(nn.Module):
    """A teacher of larger images; the students and the generator never see those."""

    def __init__(self, net, size):
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, x):
        return self.net(upsample(x, self.size))


# ------------------------------------------------------------------------------------ losses

def kl_distance(s_logits, t_logits, T):
    """Eq. (3): sum over classes, mean over the batch, gradient into both."""
    s_logp = F.log_softmax(s_logits / T, 1)
    t_logp = F.log_softmax(t_logits / T, 1)
    return T * T * F.kl_div(s_logp, t_logp, reduction="batchmean", log_target=True)


def distance(s_logits, t_logits, args):
    """D: how far two networks disagree."""
    if args.loss == "l1":
        return F.l1_loss(s_logits, t_logits)  # eq. (2), D1
    return kl_distance(s_logits, t_logits, args.T)  # eq. (3)


def bn_distance(h, running_mean, running_var):
    """A layer's part of eq. (6): statistics of its input h (B, C, H, W) against those it keeps."""
    mean, var = ChannelStatistics.apply(h)
    return (var - running_var).norm() + (mean - running_mean).norm()


@contextlib.contextmanager
def watch_batch_norms(teacher):
    """While open, every batch norm in a pass of the teacher appends its bn_distance to the list."""
    parts = []

    def compare(m, inputs):
        parts.append(bn_distance(inputs[0], m.running_mean, m.running_var))

    norms = [m for m in teacher.modules() if has_statistics(m)]
    hooks = [m.register_forward_pre_hook(compare) for m in norms]
    yield parts
    for hook in hooks:
        hook.remove()


def one_hot_loss(t_logits):
    """Eq. (7): low where the teacher is sure of one class, whichever that is."""
    return F.cross_entropy(t_logits, t_logits.argmax(1))


def balance_loss(t_logits):
    """Eq. (8): minus the entropy of the mean prediction; lowest where all classes are as likely."""
    logp = F.log_softmax(t_logits, 1)  # (B, C)
    mean_logp = logp.logsumexp(0) - math.log(len(logp))  # (C,), finite where p_c is 0
    return (mean_logp.exp() * mean_logp).sum()


def generator_loss(x, student, teacher, args):
    """Eq. (4), and its terms by name before they are weighted."""
    watch = watch_batch_norms(teacher) if args.bn else contextlib.nullcontext()
    with watch as bn_parts, autocast(x.device, args.amp):
        t_logits = teacher(x)
        s_logits = student(x)
    t_logits = t_logits.to(x.dtype)
    s_logits = s_logits.to(x.dtype)

    terms = {"loss_adv": -distance(s_logits, t_logits, args),  # eq. (5)
             "loss_oh": one_hot_loss(t_logits),
             "loss_balance": balance_loss(t_logits)}
    loss = args.adv * terms["loss_adv"] + args.oh * terms["loss_oh"]
    loss = loss + args.balance * terms["loss_balance"]
    if args.bn:
        terms["loss_bn"] = torch.stack(bn_parts).sum()  # eq. (6)
        loss = loss + args.bn * terms["loss_bn"]
    return loss, terms


# --------------------------------------------------------------------------------- the game

@torch.no_grad()
def make_batches(generator, teacher, noise, args):
    """Images and the teacher's logits for each batch of the noise.

    The generator stands still in step 1, so nothing changes when all is made before it (D5). Each
    batch is a batch-norm batch of its own; to the teacher, in eval mode, the split is all the same.
    """
    device = noise[0].device
    at_once = args.batch_size
    if device.type == "cuda" and not args.teacher_size:
        at_once = max(at_once, 1024)  # fewer launches; at 224 pixels it would only take memory
    with autocast(device, args.amp):
        images = torch.cat([generator(z) for z in noise])  # (kd_steps * B, 3, H, W)
        t_logits = torch.cat([teacher(part) for part in images.split(at_once)])
    t_logits = t_logits.to(images.dtype)
    return images.split(args.batch_size), t_logits.split(args.batch_size)


def student_step(student, optimizer, x, t_logits, args):
    """One SGD step of S on eq. (1); returns the loss and the logits before it."""
    with autocast(x.device, args.amp):
        s_logits = student(x)
    loss = distance(s_logits.to(x.dtype), t_logits, args)  # eq. (1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), s_logits.detach()


def generator_step(generator, adam, student, teacher, z, args):
    """One Adam step of G on eq. (4); returns the terms."""
    with autocast(z.device, args.amp):
        x = generator(z)
    loss, terms = generator_loss(x, student, teacher, args)
    adam.zero_grad()
    loss.backward()
    adam.step()
    return {name: term.detach() for name, term in terms.items()}


def rates(epoch, args):
    """Learning rates of S and G in an epoch, counted from 0."""
    if args.scheduler == "cosine":
        return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2, args.lr_g
    factor = 1.0
    if args.scheduler == "step":
        for fall in args.falls:
            if epoch + 1 >= round(fall * args.epochs):  # DFAD counts its epochs from 1
                factor *= 0.1
    return args.lr * factor, args.lr_g * factor


# -------------------------------------------------------------------------- scores and images

def test_subset(n, share, seed=42):
    """D2: which of n test images the project scores, in the order drawn."""
    index = np.random.default_rng(seed).choice(n, int(n * share), replace=False)
    return torch.from_numpy(index)


def whole_batches(index, batch_size):
    """D2: it leaves out the last batch unless that is full."""
    return index[:len(index) // batch_size * batch_size]


def scores_of(students, data, args):
    """{student: top-1}, and {student@share: top-1} of each share of --test_split."""
    top1 = {}
    for name, student in students.items():
        logits = predict(student, data, amp=args.amp)
        top1[name] = accuracy(logits, data.test_y)["top1"]
        for share in args.test_split:
            index = whole_batches(test_subset(len(logits), share), args.batch_size)
            index = index.to(logits.device)
            top1[f"{name}@{share:g}"] = accuracy(logits[index], data.test_y[index])["top1"]
    return top1


@torch.no_grad()
def make_images(generator, n, seed):
    """n normalised images, always of the same z, with the running statistics of G."""
    weight = generator.l1[0].weight  # (_, nz)
    rng = torch.Generator(weight.device).manual_seed(seed)
    z = torch.randn(n, weight.shape[1], generator=rng, device=weight.device)
    generator.eval()
    x = torch.cat([generator(part) for part in z.split(250)])
    generator.train()
    return x


def save_generator(path, generator, args, data):
    sizes = {"nz": args.nz, "ngf": args.ngf, "size": data.image_size}
    state = {key: value.cpu() for key, value in generator.state_dict().items()}
    write_torch(path, {
        "generator": state, "sizes": sizes, "mean": data.mean.cpu(), "std": data.std.cpu()})


def sample(args):
    """--sample FILE: samples/grid.png beside the file, and image_000.png ..."""
    with reading(args.sample, "give a generator_*.pt of a run folder of akd_gan.py"):
        saved = torch.load(args.sample, map_location="cpu", weights_only=True)
        generator = Generator(**saved["sizes"])
        generator.load_state_dict(saved["generator"])
        x = make_images(generator, args.sample_images, args.seed)
        x = x * saved["std"] + saved["mean"]
    write_images(x, Path(args.sample).parent / "samples")


def write_images(x, folder):
    """x (N, 3, H, W), clamped to [0, 1]; the grid has int(sqrt(N)) images in a row."""
    folder.mkdir(parents=True, exist_ok=True)
    save_image(x, folder / "grid.png", nrow=math.isqrt(len(x)))
    for i, image in enumerate(x):
        save_image(image, folder / f"image_{i:03d}.png")
    print(f"{len(x)} images written to {folder}")


# -------------------------------------------------------------------------------------- main

@dataclass
class Player:
    """A student, the generator it plays against, and the optimizers of the two."""
    name: str
    tag: str  # behind the names of its metrics and files; "" for the only student
    student: nn.Module
    optimizer: torch.optim.Optimizer
    generator: Generator
    adam: torch.optim.Optimizer


def make_players(args, data):
    """One for each student. --shared_generator: the first one's generator and Adam are all's."""
    players = []
    place = {"device": data.device, "memory_format": torch.channels_last}
    fused = data.device.type == "cuda"
    names = args.student.split(",")
    for name in names:
        tag = f"_{short_name(name)}" if len(names) > 1 else ""
        student = build_model(name, data.num_classes, data.image_size).to(**place)
        optimizer = torch.optim.SGD(
            student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
            fused=fused)
        if not players or not args.shared_generator:
            generator = Generator(args.nz, args.ngf, data.image_size).to(**place)
            adam = torch.optim.Adam(
                generator.parameters(), args.lr_g, (args.gen_beta1, 0.999), fused=fused)
        players.append(Player(name, tag, student, optimizer, generator, adam))
    return players


def check(args, data):
    names = args.student.split(",")
    if len(set(names)) < len(names):
        fail(f"--student {args.student}: a network twice; start a run for each")
    if not any((args.adv, args.bn, args.oh, args.balance)):
        fail("--adv 0: the generator has nothing to learn from; give a weight to one of its terms")
    for share in args.test_split:
        if share > 1 or share * len(data.test_y) < args.batch_size:
            fail(f"--test_split {share:g}: that part of the test images has no whole batch")


def main(args):
    if args.sample:
        return sample(args)
    run = Run(args)
    torch.backends.cudnn.benchmark = True
    data = load_data(args, run.device)
    check(args, data)
    players = make_players(args, data)
    students = {p.name: p.student for p in players}

    def as_it_sees_them(net):
        if args.teacher == "resnet34_imagenet" and not args.teacher_size:
            args.teacher_size = 224
        return Upsampled(net, args.teacher_size) if args.teacher_size else net

    teacher = get_teacher(args, data, as_it_sees_them)  # frozen, in eval mode; D3
    if args.bn and not any(has_statistics(m) for m in teacher.modules()):
        fail(f"the teacher {args.teacher} has no batch norm for eq. (6); go on with --bn 0")
    objects = {}  # what a checkpoint holds
    for p in players:
        objects[f"student{p.tag}"] = p.student
        objects[f"optimizer{p.tag}"] = p.optimizer
        objects[f"generator{p.tag}"] = p.generator
        objects[f"adam{p.tag}"] = p.adam
    start = run.begin(data, teacher, **objects)
    noise = partial(torch.randn, args.batch_size, args.nz, generator=run.rng, device=run.device)
    log_rounds = max(1, args.log_every // args.kd_steps)

    for epoch in range(start, args.epochs):
        lr, lr_g = rates(epoch, args)
        for p in players:
            p.optimizer.param_groups[0]["lr"] = lr
            p.adam.param_groups[0]["lr"] = lr_g
            student = torch.compile(p.student) if args.compile else p.student
            for i in run.steps(epoch, args.epoch_itrs, p.name):
                with run.flops(f"round{p.tag}"):
                    # 1. The generator stands still, the student imitates the teacher.
                    p.student.train().requires_grad_(True)
                    z = [noise() for _ in range(args.kd_steps)]
                    images, t_logits = make_batches(p.generator, teacher, z, args)
                    for x, t in zip(images, t_logits):
                        loss, s = student_step(student, p.optimizer, x, t, args)

                    # 2. The student stands still, the generator looks for images on which it errs.
                    p.student.train(not args.student_eval_in_g).requires_grad_(False)
                    z = noise()
                    terms = generator_step(p.generator, p.adam, student, teacher, z, args)

                if i % log_rounds == 0:
                    step = (epoch * args.epoch_itrs + i) * args.kd_steps
                    agree = (s.argmax(1) == t.argmax(1)).float().mean()
                    entropy = -balance_loss(t)  # near 0: all images are of one class, a collapse
                    scalars = {"loss": loss, "agree": agree, "entropy": entropy, "lr": lr, **terms}
                    run.log(step, epoch, **{name + p.tag: v for name, v in scalars.items()})
            if run.due(epoch, args.save_every):
                images = data.denormalize(make_images(p.generator, 64, args.seed))
                run.grid(f"epoch{epoch + 1:03d}{p.tag}", images, rows=8)
        due = run.due(epoch, args.eval_every)
        run.end_epoch(epoch, scores_of(students, data, args) if due else None)

    for p in players:
        save_generator(run.dir / f"generator{p.tag}.pt", p.generator, args, data)
    made = args.epochs * args.epoch_itrs * (args.kd_steps + 1) * args.batch_size
    best = {name: top1 for name, top1 in run.best.items() if "@" in name}
    run.finish(students, real_images=0, made_images=made, best_of_test_split=best)


if __name__ == "__main__":
    cli(main, Args, PRESETS)
