"""Toy-KD, the smallest method file there can be: copy it to add a method of your own.

Why it works. A teacher's answer to an image says more than its label: how likely it finds every
other class. A student that learns these answers needs fewer images than one that learns labels.

Project  Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531
Data     the training images without their labels; test images only for the scores.

Each epoch, in the order of a new shuffle
  1. a batch x, cropped and flipped; the student's SGD step on
       L_kd = T^2 KL(p_T || p_S)       mean over the batch, softmax at temperature T          (1)

  python toy.py --smoke                                       # a minute, no download
  python toy.py --dataset cifar10 --teacher_ckpt FILE --student resnet8
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a copy beside common.py needs no path
from common import (  # noqa: E402
    CommonArgs, Run, autocast, build_model, cli, evaluate, flag, get_teacher, load_data)


@dataclass
class Args(CommonArgs):
    epochs: int = flag(20, "passes over the images", low=1)
    batch_size: int = flag(64, "images per step", "bs", low=1)
    lr: float = flag(0.05, "learning rate of the student at the start; falls along a cosine")
    T: float = flag(4.0, "temperature of eq. (1); a high one weighs all classes alike", low=1e-3)


PRESETS = {
    "auto": {("cifar100", "wrn40_2", "wrn16_1"): dict(epochs=30, T=20.0)},
    "hot": {"*": dict(T=8.0)},
    "smoke": {"*": dict(
        smoke=True, dataset="shapes", teacher="resnet8", student="resnet8", epochs=2,
        limit_train=200, log_every=1)},
}


def kd_loss(s_logits, t_logits, T):
    """eq. (1)"""
    log_p = F.log_softmax(s_logits / T, dim=1)
    q = F.softmax(t_logits / T, dim=1)
    return T ** 2 * F.kl_div(log_p, q, reduction="batchmean")


def main(args):
    run = Run(args)
    data = load_data(args, run.device)
    teacher = get_teacher(args, data)
    student = build_model(args.student, data.num_classes, data.image_size)
    student.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    net = torch.compile(student) if args.compile else student
    n = len(data.train_x)
    steps = -(-n // args.batch_size)  # rounded up

    start = run.begin(data, teacher, student=student, optimizer=optimizer, cosine=cosine)
    for epoch in range(start, args.epochs):
        student.train()
        order = torch.randperm(n, generator=run.rng, device=run.device)
        for i in run.steps(epoch, steps):
            batch = order[i * args.batch_size:(i + 1) * args.batch_size]
            with run.flops(f"step of {len(batch)}"):
                x = data.augment(data.train_x[batch], run.rng)
                with autocast(run.device, args.amp):
                    with torch.no_grad():
                        t_logits = teacher(x)
                    s_logits = net(x)
                loss = kd_loss(s_logits.float(), t_logits.float(), args.T)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if i % args.log_every == 0:
                run.log(epoch * steps + i, epoch, loss=loss, lr=optimizer.param_groups[0]["lr"])
        cosine.step()
        top1 = evaluate(student, data, args.amp) if run.due(epoch, args.eval_every) else None
        run.end_epoch(epoch, top1)
    words = [data.classes[c] for c in data.train_y[:20].tolist()]
    run.grid("train", data.train_x[:20], rows=2, labels=words)
    run.finish(student, real_images=n)


if __name__ == "__main__":
    cli(main, Args, PRESETS)
