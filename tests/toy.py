"""Toy-KD: the smallest method file there can be; the tests run it, and a new method may start from a copy.

Data    K labelled training images per class; the test split only for reporting.

Each epoch
  1. every step takes a shuffled batch of the shots, cropped and flipped      L = T^2 KL(p_T || p_S), batchmean   (1)
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # only because this file does not lie beside common.py
from common import (  # noqa: E402
    Run, accuracy, agreement, autocast, batches, build_model, cli, count_params_macs, evaluate,
    evaluate_file, get_teacher, load_data, lr_at, predict)


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
    dataset: str = "cifar10"  # cifar10, cifar100, tiny_imagenet, shapes, or a folder of your own
    teacher: str = "resnet20"  # network: a name in MODELS, or file.py:callable
    student: str = "resnet8"  # network: a name in MODELS, or file.py:callable
    shots: int = 5  # labelled real images per class
    epochs: int = 20  # passes over the shots
    batch_size: int = 32  # images per step
    lr: float = 0.05  # peak learning rate of the student
    weight_decay: float = 1e-4  # on all parameters
    momentum: float = 0.9  # SGD momentum
    T: float = 4.0  # temperature of eq. (1)


PRESETS = {
    "auto": {("cifar100", "wrn40_2", "wrn16_1"): dict(epochs=30, T=20.0)},
    "hot": {"*": dict(T=8.0)},
    "smoke": {"*": dict(dataset="shapes", teacher="resnet8", student="resnet8", limit_train=300, limit_test=200,
                        epochs=2, allow_weak_teacher=True)}}
ALIASES = {"nshot": "shots", "wd": "weight_decay", "cold": ("T", 1.0),
           "method": {"toy": None, "hot": ("preset", "hot")}}


def kd_loss(s_logits: Tensor, t_logits: Tensor, T: float) -> Tensor:
    """Mean over the batch, sum over classes, times T^2."""
    return T * T * F.kl_div(F.log_softmax(s_logits / T, 1), F.softmax(t_logits / T, 1), reduction="batchmean")


def main(args: Args) -> dict:
    if args.evaluate:
        return evaluate_file(args)
    run = Run(args)
    data = load_data(args.dataset, args.data_dir, run.device, data_url=args.data_url, limit_train=args.limit_train,
                     limit_test=args.limit_test)
    student = build_model(args.student, data.num_classes, data.image_size)
    student.to(run.device, memory_format=torch.channels_last)
    teacher, info = get_teacher(args, data)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    x_real, _, index = data.few_shot(args.shots, "pgdi", args.seed)
    run.note(teacher=info, norm=data.norm, shots=index.tolist(),
             student_params_macs=count_params_macs(student, data.image_size))
    net = torch.compile(student) if args.compile else student
    recipe = {"kind": "cosine", "lr": args.lr, "T_max": args.epochs}
    start = run.restore(student=student, optimizer=optimizer)
    for epoch in range(start, args.epochs):
        student.train()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(recipe, epoch)
        parts = batches(len(x_real), args.batch_size, run.generator)
        for step, batch in enumerate(run.bar(parts, f"epoch {epoch + 1}"), epoch * len(parts)):
            x = data.random_view(x_real[batch], run.generator)
            with torch.no_grad(), autocast(run.device, args.amp):
                t_logits = teacher(x)
            with autocast(run.device, args.amp):
                s_logits = net(x)
            loss = kd_loss(s_logits.float(), t_logits.float(), args.T)  # eq. (1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % args.log_every == 0:
                run.log(step, epoch, loss_kd=loss, lr=group["lr"])
        top1 = evaluate(student, data)["top1"] if run.due(epoch, args.eval_every) else None
        if not run.end_epoch(epoch, student, top1):
            return run.finish({})
    run.grid("shots", x_real, rows=data.num_classes)
    s_logits = predict(student, data)
    return run.finish({"teacher_top1": info["top1"], **accuracy(s_logits, data.test_y),
                       **agreement(s_logits, data.t_logits), "n_test": len(data.test_y), "real_images": len(x_real)})


if __name__ == "__main__":
    cli(main, Args, PRESETS, ALIASES)
