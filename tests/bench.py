"""Times what this project does against the plain form of it, alternating in one process, in CPU seconds.

Where there is a step, also in bf16 and with torch.compile (students' steps only), and what its time goes into.

  python tests/bench.py data      one augmented, shuffled, normalised epoch of 50,000 CIFAR-sized images
  python tests/bench.py pgdi      synthesis iteration and distillation step against the published form of them
  python tests/bench.py akd_gan   a round of preset dfad (5 student steps, 1 generator step) against the plain loop
  python tests/bench.py adadfkd   one round (1 generator step, 10 student steps) against the published form of it
  python tests/bench.py gda_kd    GDA forward and backward; randomly resized crops; few-shot evaluation
  python tests/bench.py netgraft  a step of each of NetGraft's five phases at 10 shots, and a test pass
  python tests/bench.py start     from the end of `import torch` to the first step, CIFAR-10 in DATA_DIR or ./data
  python tests/bench.py all       all of them; add --keep to put the rows into tests/results/speed.jsonl
"""
import copy
import dataclasses
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is quiet
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402


def cpu_seconds() -> float:
    """Of this process and of the workers it has waited for."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def alternate(works: list, rounds: int) -> list[float]:
    """The least CPU seconds of each over the rounds: other work on the machine only ever adds to them."""
    spent = [[] for _ in works]
    for _ in range(rounds):
        for work, seconds in zip(works, spent):
            begin = cpu_seconds()
            work()
            seconds.append(cpu_seconds() - begin)
    return [min(seconds) for seconds in spent]


KINDS = {"convolutions": "conv", "batch norm": "batch_norm", "matrix products": "mm|linear|cdist",
         "sorting": "sort|topk", "copies": "copy|cat|stack|index|gather|contiguous|zero"}


def parts_of(work) -> str:
    """Shares of the three largest kinds of operations, from a hundredth on, in the time of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    shares: dict = {}
    for event in profile.key_averages():
        kind = next((k for k, names in KINDS.items() if re.search(names, event.key)), "the rest")
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
    percent = {kind: round(100 * share / sum(shares.values())) for kind, share in shares.items()}
    return ", ".join(f"{kind} {percent[kind]} %" for kind in sorted(percent, key=percent.get)[:-4:-1] if percent[kind])


def row(name: str, plain, ours, rounds: int = 3, scale: float = 1.0, variants: dict = {}) -> dict:
    """plain, ours and its variants are timed in turn; where plain does a part of the work, scale says how much."""
    where = parts_of(ours) if variants else ""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # bf16 is emulated there, many times slower
        variants = {k: work for k, work in variants.items() if k != "bf16"}
    for work in variants.values():
        work()  # compiles
    seconds = dict(zip(("plain", "float32", *variants), alternate([plain, ours, *variants.values()], rounds)))
    seconds["plain"] *= scale
    cells = {k: f"{v:.2f} (**{seconds['plain'] / v:.1f}×**)" for k, v in seconds.items() if k != "plain"}
    print(f"{name}: plain {seconds['plain']:.2f} s,", ", ".join(f"{k} {v}" for k, v in cells.items()), flush=True)
    return {"bench, CPU seconds": name, "plain": f"{seconds['plain']:.2f}", "ours": cells["float32"],
            "bf16": cells.get("bf16", ""), "compile": cells.get("compile", ""),
            "where ours goes": where,
            "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"}


def bench_data() -> list[dict]:
    """A torchvision DataLoader with PIL transforms and 2 workers against Data.augment; batch 256, one torch thread."""
    from PIL import Image
    from torchvision import transforms
    torch.set_num_threads(1)
    rng = np.random.RandomState(0)
    x, y = rng.randint(0, 256, (50000, 3, 32, 32), np.uint8), rng.randint(0, 10, 50000)
    data = common.Data("cifar10", lambda split: (x, y, list("0123456789")), norm="cifar10")
    generator, seen = torch.Generator().manual_seed(0), {}
    pictures = np.ascontiguousarray(x.transpose(0, 2, 3, 1))

    class Pictures(torch.utils.data.Dataset):
        steps = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])

        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, i: int):
            return self.steps(Image.fromarray(pictures[i])), int(y[i])

    loader = torch.utils.data.DataLoader(Pictures(), batch_size=256, shuffle=True, num_workers=2)

    def plain() -> None:
        seen["plain"] = sum(len(batch) for batch, _ in loader)

    def ours() -> None:
        seen["ours"] = sum(len(data.augment(index, generator)) for index in common.batches(len(x), 256, generator))

    data.augment(torch.arange(256), generator)  # the padded copy is made once for a run
    rows = [row("one augmented epoch of 50,000 CIFAR-sized images", plain, ours)]
    assert seen == {"plain": 50000, "ours": 50000}
    return rows


START = """
import time, torch
begin = time.perf_counter()
import common, toy
scoring, predict = [], common.predict
imported = time.perf_counter()
def timed(*a):
    t = time.perf_counter(); out = predict(*a); scoring.append(time.perf_counter() - t); return out
common.predict = timed
class First(Exception): pass
def log(self, *a, **k): raise First
common.Run.log = log
try:
    toy.main(common.parse_args(toy.Args, toy.PRESETS, toy.ALIASES))
except First:
    print("SECONDS", imported - begin, time.perf_counter() - begin - sum(scoring))
"""


def bench_start() -> list[dict]:
    data_dir = os.environ.get("DATA_DIR", "data")
    with tempfile.TemporaryDirectory() as out:
        torch.save({"state_dict": common.build_model("resnet20", 10).state_dict()}, f"{out}/t.pt")
        for attempt in ("first (makes the cache if there is none)", "second", "third"):
            done = subprocess.run(
                [sys.executable, "-c", START, "--dataset", "cifar10", "--data_dir", data_dir, "--student", "resnet8",
                 "--teacher_ckpt", f"{out}/t.pt", "--out_dir", f"{out}/{attempt}", "--allow_weak_teacher"],
                capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
            words = [line.split() for line in done.stdout.splitlines() if line.startswith("SECONDS")]
            if not words:
                sys.exit(done.stderr)
            imported, first_step = map(float, words[0][1:])
            print(f"{attempt} start: import common {imported:.2f} s, to the first step {first_step:.2f} s (wall)")
    return []


def bench_pgdi() -> list[dict]:
    """Synthesis iteration and KD step, WRN-40-2 -> WRN-16-1, 100 classes, 5 shots, batch 64, one thread; equal losses.

    The plain form is the published step: nothing frozen, hooks armed in every pass, a second teacher pass for the
    features, loops over the classes, read-backs. The pool lies in memory on both sides.
    """
    import torch.nn as nn
    import torch.nn.functional as F

    import pgdi
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classes, batch, args = 100, 64, pgdi.Args(g_steps=3, warmup=1)
    data = common.Data("cifar100", lambda split: (np.zeros((classes, 3, 32, 32), np.uint8), np.arange(classes),
                                                  [str(c) for c in range(classes)]), norm="cifar100")
    x_real, y = torch.rand(5 * classes, 3, 32, 32), torch.arange(classes).repeat_interleave(5)
    v_real, z, targets = data.normalize(x_real), torch.randn(batch, 256), torch.randint(classes, (batch,)).sort()[0]
    pool, view = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8), data.normalize

    def nets(layout: torch.memory_format) -> tuple:
        torch.manual_seed(1)
        made = (common.build_model("wrn40_2", classes).eval(), common.build_model("wrn16_1", classes), pgdi.Generator())
        return tuple(net.to(memory_format=layout) for net in made)

    # ---- plain
    teacher, student, generator = nets(torch.contiguous_format)
    bn_terms, feats = [], []

    def bn_hook(m: nn.Module, inputs: tuple, _: torch.Tensor) -> None:
        h = inputs[0]
        mu = h.mean((0, 2, 3))
        var = h.permute(1, 0, 2, 3).contiguous().view(h.shape[1], -1).var(1, unbiased=False)
        bn_terms.append(torch.norm(m.running_var - var) + torch.norm(m.running_mean - mu))

    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(bn_hook)
        elif isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, inputs, _: feats.append(inputs[0].clone().detach().mean(3).mean(2)))

    def plain_pass(x: torch.Tensor) -> torch.Tensor:
        bn_terms.clear()
        feats.clear()
        return teacher(x)

    with torch.no_grad():
        l_real = plain_pass(v_real.contiguous())
        f_real = torch.cat(feats, 1)
    meta_plain = torch.optim.Adam(generator.parameters(), args.lr_g * args.g_steps, (0.5, 0.999))
    losses: dict = {}

    def plain_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        square = (a[:, None] - b).pow(2).sum(2)
        return sum(torch.exp(-square / (2 * s * s)) for s in (0.1, 1.0, 5.0, 10.0)).sum()

    def plain_priors(t: torch.Tensor, f: torch.Tensor) -> tuple:
        feat_sum, logit_sum, n = 0.0, 0.0, 0
        for c in targets.unique().tolist():
            own, real = targets == c, y == c
            a, b, m, k = f[own], f_real[real], int(own.sum().item()), int(real.sum().item())
            if m == k and m > 1:
                mmd = (plain_kernel(a, a) - 4 * m) / (m * (m - 1)) + (plain_kernel(b, b) - 4 * k) / (k * (k - 1))
            else:
                mmd = plain_kernel(a, a) / m ** 2 + plain_kernel(b, b) / k ** 2
            feat_sum = feat_sum + m * (mmd - 2 * plain_kernel(a, b) / (m * k)).clamp(min=0)
            soft = F.softmax(l_real[real] / 2, 1).mean(0)
            kl = F.kl_div(F.log_softmax(t[own] / 2, 1), soft.expand(m, -1), reduction="none").sum(1)
            near = torch.stack([(row - l_real[real]).pow(2).sum(1).min() for row in t[own]])
            logit_sum, n = logit_sum + (0.997 * kl + 0.003 * near).sum(), n + m
        return feat_sum / n, logit_sum / n

    def plain_synthesis() -> None:
        fast, zz = copy.deepcopy(generator), z.clone().requires_grad_()
        student.eval()
        adam = torch.optim.Adam([{"params": fast.parameters()}, {"params": [zz], "lr": args.lr_z}], args.lr_g,
                                (0.5, 0.999))
        meta_plain.zero_grad()
        lowest, history = 1e9, []
        for it in range(args.g_steps):
            x = fast(zz)
            v = view(x).contiguous()
            t = plain_pass(v)
            loss_bn, loss_oh, s = sum(bn_terms), F.cross_entropy(t, targets), student(v)
            mask = (s.argmax(1) == t.argmax(1)).float()
            kl = F.kl_div(F.log_softmax(s, 1), F.softmax(t.detach(), 1), reduction="none").sum(1)
            plain_pass(v)  # once more, to fill the hooks
            loss_feat, loss_log = plain_priors(t, torch.cat(feats, 1))
            loss = 5 * loss_bn + 0.001 * loss_oh - 1.33 * (mask * kl).mean() + 100 * loss_feat + loss_log
            history.append(loss.item())
            if lowest > loss.item() or it == 0:
                lowest, _ = loss.item(), x.data
            adam.zero_grad()
            loss.backward()
            for p, q in zip(generator.parameters(), fast.parameters()):
                p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
            if it == args.g_steps - 1:
                meta_plain.step()
            adam.step()
        losses.setdefault("plain", []).extend(history)

    optimizer_plain = torch.optim.SGD(student.parameters(), 0.2, 0.9, weight_decay=1e-4)

    def plain_kd(r: int) -> None:
        student.train()
        index = torch.from_numpy(np.random.RandomState(r).randint(0, len(v_real), r))
        x = torch.cat([view(pool).contiguous(), v_real[index].contiguous()])
        with torch.no_grad():
            t = plain_pass(x)
        s = student(x)
        parts = [20 ** 2 * F.kl_div(F.log_softmax(a / 20, 1), F.softmax(b / 20, 1), reduction="batchmean")
                 for a, b in ((s[:batch], t[:batch]), (s[batch:], t[batch:]))]
        loss = 0.5 * parts[1] + 0.5 * parts[0]
        optimizer_plain.zero_grad()
        loss.backward()
        optimizer_plain.step()
        top = s.topk(5).indices == y[torch.cat([targets * 5, index])][:, None]
        losses.setdefault(f"plain{r}", []).append((loss.item(), top[:, 0].sum().item(), top.sum().item())[0])

    # ---- ours
    t_net, s_net, g_net = nets(torch.channels_last)
    t_net.requires_grad_(False)
    shots = pgdi.see_shots(t_net, v_real, y, classes, "all_conv")
    statistics = pgdi.BNStatistics(pgdi.bn_order(t_net, v_real[:2]))
    meta = torch.optim.Adam(g_net.parameters(), args.lr_g * args.g_steps, (0.5, 0.999))
    t_real = torch.cat([t_net(part) for part in v_real.split(100)])

    def our_synthesis(amp: str = "none") -> None:
        now = dataclasses.replace(args, amp=amp, bn_mmt=0.0)
        _, terms = pgdi.synthesize(g_net, meta, t_net, s_net, z, targets, view, statistics, shots, 1, now)
        losses.setdefault(f"ours{amp}", []).extend(terms[:, 0].tolist())

    optimizer = torch.optim.SGD(s_net.parameters(), 0.2, 0.9, weight_decay=1e-4)

    compiled = [torch.compile(net, dynamic=True) for net in (s_net, t_net)]

    def our_kd(r: int, amp: str = "none", nets: list = [s_net, t_net]) -> None:
        index = torch.from_numpy(np.random.RandomState(r).randint(0, len(v_real), r))
        x = view(pool)
        with torch.no_grad(), common.autocast("cpu", amp):
            t = nets[1](x).float()
        x, t = torch.cat([x, v_real[index]]), torch.cat([t, t_real[index]])
        loss = pgdi.kd_step(nets[0], optimizer, x, t, r, 0.5, 20.0, amp)[0]
        losses.setdefault(f"ours{amp}{r}", []).append(loss.item())

    rows, trained = [], (student, s_net, optimizer_plain, optimizer, generator, g_net)
    fresh = [copy.deepcopy(o.state_dict()) for o in trained]
    for name, plain, ours, keys in (
            ("pgdi synthesis, 3 iterations", plain_synthesis, our_synthesis, ("plain", "oursnone")),
            *((f"pgdi KD step, R = {r}", partial(plain_kd, r), partial(our_kd, r), (f"plain{r}", f"oursnone{r}"))
              for r in (58, 8))):
        for o, state in zip(trained, fresh):
            o.load_state_dict(copy.deepcopy(state))
        losses.clear()
        plain(), ours()
        a, b = (losses[key] for key in keys)  # Adam's first steps are signs: they amplify rounding
        assert np.isclose(a[0], b[0], rtol=1e-5) and np.allclose(a, b, rtol=0.03), (a, b)
        variants = {"bf16": partial(ours, amp="bf16")}
        if ours is not our_synthesis:
            variants["compile"] = partial(ours, nets=compiled)
        rows.append(row(name, plain, ours, 5, variants=variants))
    return rows


def bench_akd_gan() -> list[dict]:
    """A round of preset dfad, ResNet-34 -> half-width ResNet-18, 100 classes, batch 32, one thread; equal losses.

    The plain form is the published loop: a graph in every pass of the generator, a teacher call for each batch, all
    weight gradients in the generator step.
    """
    import torch.nn.functional as F

    import akd_gan
    torch.set_num_threads(1)
    args = akd_gan.Args(**{**akd_gan.DFAD, "batch_size": 32})
    noise = torch.randn(args.kd_steps + 1, args.batch_size, args.nz, generator=torch.Generator().manual_seed(0))

    def players(layout: torch.memory_format) -> tuple:
        torch.manual_seed(1)
        made = (common.build_model("resnet34", 100).eval(), common.build_model("resnet18_small", 100),
                akd_gan.Generator(args.nz, args.ngf))
        teacher, student, generator = (net.to(memory_format=layout) for net in made)
        return (teacher, student, generator, torch.optim.SGD(student.parameters(), args.lr, 0.9, weight_decay=5e-4),
                torch.optim.Adam(generator.parameters(), args.lr_g))

    def plain(teacher, student, generator, sgd, adam) -> list:
        losses = []
        for z in noise[:-1]:
            x = generator(z).detach()
            with torch.no_grad():
                t = teacher(x)
            loss = F.l1_loss(student(x), t)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        x = generator(noise[-1])
        loss = -F.l1_loss(student(x), teacher(x))
        adam.zero_grad()
        loss.backward()
        adam.step()
        return losses

    def ours(teacher, student, generator, sgd, adam, amp: str = "none") -> list:
        rows, now = iter(noise), dataclasses.replace(args, amp=amp)
        losses, _, _ = akd_gan.student_steps(student, sgd, generator, teacher, lambda: next(rows), now, args.batch_size)
        akd_gan.generator_step(student, generator, adam, teacher, next(rows), now)
        return losses.tolist()

    a, b = players(torch.contiguous_format), players(torch.channels_last)
    b[0].requires_grad_(False)
    first = plain(*a)[:2], ours(*b)[:2]  # the path that follows is chaotic in float32; in float64 a test compares it
    assert np.allclose(*first, rtol=1e-3), first
    compiled = (*map(torch.compile, b[:2]), *b[2:])
    return [row("akd_gan round of dfad, 5 student steps and 1 generator step", partial(plain, *a), partial(ours, *b),
                variants={"bf16": partial(ours, *b, amp="bf16"), "compile": partial(ours, *compiled)})]


def bench_adadfkd() -> list[dict]:
    """One round, WRN-40-2 -> WRN-16-2, 100 classes, batch 64, ring of 8192, one thread; the losses are equal.

    The plain form is the published round: nothing frozen, hooks armed in every pass, upsampling before each conv, one
    pass of G and T for each student step, the queue cloned, read-backs.
    """
    import torch.nn as nn
    import torch.nn.functional as F

    import adadfkd
    torch.set_num_threads(1)
    classes, batch, n = 100, 64, 10
    args = adadfkd.Args(adv=1.0, T=2.0, loss="kl", s_nce=0.15, lambda_0=10.0, length=0.8, N_neg=8192, nz=512,
                        curr_level="batch")
    data = common.Data("cifar100", lambda split: (np.zeros((classes, 3, 32, 32), np.uint8), np.arange(classes),
                                                  [str(c) for c in range(classes)]), norm="cifar100")
    torch.manual_seed(0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    z_g, z_s, window = torch.randn(batch, args.nz), torch.randn(n, batch, args.nz), (0, int(0.8 * args.N_neg))
    queue = adadfkd.Queue(128, args.N_neg, 32, torch.Generator().manual_seed(0))
    nets = [common.build_model("wrn40_2", classes).eval(), common.build_model("wrn16_2", classes),
            adadfkd.init_normal(adadfkd.Generator(args.nz))]

    # ---- plain
    teacher, student, generator = copy.deepcopy(nets)
    for i, m in enumerate(generator.main):
        if isinstance(m, adadfkd.UpConv):
            conv = nn.Conv2d(m.in_channels, m.out_channels, 3, padding=1, bias=False)
            conv.load_state_dict(m.state_dict())
            generator.main[i - 1], generator.main[i] = nn.Upsample(scale_factor=2), conv
    adam = torch.optim.Adam(generator.parameters(), args.lr_g, (0.9, 0.99))
    sgd = torch.optim.SGD(student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    bn_terms, keys, losses = [], queue.keys.clone(), {}

    def bn_hook(m: nn.Module, inputs: tuple, _: torch.Tensor) -> None:
        h = inputs[0]
        mu = h.mean((0, 2, 3))
        var = h.permute(1, 0, 2, 3).contiguous().view(h.shape[1], -1).var(1, unbiased=False)
        bn_terms.append(torch.norm(m.running_var - var) + torch.norm(m.running_mean - mu))

    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(bn_hook)

    def plain_pass(x: torch.Tensor) -> tuple:
        bn_terms.clear()
        logits, feats = teacher(x, return_features=True)
        return logits, feats[-1]

    def plain() -> None:
        found = losses["plain"] = []
        student.eval()
        generator.train()
        x = (generator(z_g).contiguous() - mean) / std
        t, t_feat = plain_pass(x)
        loss_bn = sum(bn_terms)
        s, s_feats = student(x, return_features=True)
        p = F.softmax(t / 2, 1).mean(0)
        ent, oh, act = -(p * p.log()).sum(), F.cross_entropy(t, t.max(1)[1]), -t_feat.abs().mean()
        adv = -9 * F.kl_div(F.log_softmax(s / 3, 1), F.softmax(t / 3, 1), reduction="batchmean")
        a, k, old = F.normalize(t_feat), F.normalize(s_feats[-1].detach()), keys.clone()
        order = (a @ old).sort(1)[1][:, window[0]:window[1]]
        rows = torch.cat([(a * k).sum(1, keepdim=True), (a @ old).gather(1, order)], 1) / args.tau
        rel = F.cross_entropy(rows, torch.zeros(batch, dtype=torch.long))
        keys[:, :batch] = k.T
        loss = -20 * ent + adv + oh + 0 * act + loss_bn + 0.1 * rel
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(loss.item())
        student.train()
        generator.eval()
        for i, z in enumerate(z_s):
            with torch.no_grad():
                x = (generator(z).contiguous() - mean) / std
                t, t_feat = plain_pass(x)
            s, s_feats = student(x, return_features=True)
            kd = 4 * F.kl_div(F.log_softmax(s / 2, 1), F.softmax(t / 2, 1), reduction="batchmean")
            nce = F.cross_entropy(F.normalize(t_feat) @ F.normalize(s_feats[-1]).T / args.tau, torch.arange(batch))
            low = kd + 0.15 * nce
            lam = 10 + 2e-5 * i
            v = (1 + np.exp(-lam)) / (1 + torch.exp(low.detach() - lam))
            sgd.zero_grad()
            (v * low).backward()
            sgd.step()
            found.append((v * low).item())

    # ---- ours
    t_net, s_net, g_net = (net.to(memory_format=torch.channels_last) for net in copy.deepcopy(nets))
    t_net.requires_grad_(False)
    our_adam = torch.optim.Adam(g_net.parameters(), args.lr_g, (0.9, 0.99))
    our_sgd = torch.optim.SGD(s_net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)

    def identity(f: torch.Tensor) -> torch.Tensor:
        return f

    compiled = [torch.compile(net) for net in (s_net, t_net)]

    def ours(amp: str = "none", nets: list = [s_net, t_net]) -> None:
        now = dataclasses.replace(args, amp=amp)
        *_, terms = adadfkd.generator_step(g_net, our_adam, t_net, s_net, z_g, data, queue, window, identity, 1.0, now)
        found = [terms[0]]
        for i, taught in enumerate(adadfkd.fresh_batches(g_net, nets[1], z_s, data, 0, amp)):
            lam = adadfkd.lam_at(i, 10.0, adadfkd.OTHER_RATE)
            found.append(adadfkd.student_step(nets[0], our_sgd, *taught, identity, lam, now)[0].detach())
        losses[f"ours{amp}"] = torch.stack(found).tolist()

    plain(), ours()
    assert np.allclose(losses["plain"], losses["oursnone"], rtol=2e-3), losses
    return [row("adadfkd round, 1 generator step and 10 student steps", plain, ours, 2,
                variants={"bf16": partial(ours, amp="bf16"), "compile": partial(ours, nets=compiled)})]


def bench_netgraft() -> list[dict]:
    """VGG16 pair, batch 64. Plain: nothing frozen or kept, two read-backs a step, tests with autograd and batch 64.

    Both start from the uint8 images; the kept rows are those of a 10-shot run in number, of random content.
    """
    import netgraft
    torch.set_num_threads(1)
    teacher, student = (common.build_model(name, 10) for name in netgraft.PAIR)
    x = np.random.RandomState(0).randint(0, 256, (2000, 3, 32, 32), np.uint8)
    data = common.Data("cifar10", lambda split: (x, np.arange(len(x)) % 10, list("0123456789")), norm="cifar10")
    start, scion = netgraft.match(teacher.eval(), student, 32)
    blocks, end, generator = netgraft.cut(teacher), start + len(scion), torch.Generator().manual_seed(0)
    shapes = netgraft.cut_shapes(blocks, 32)
    views = netgraft.Outputs(lambda rows: netgraft.view_images(data, data.test_x, rows), 100 * netgraft.VIEWS,
                             netgraft.VIEWS, blocks, shapes, 4)
    views.kept = {c: torch.rand(100 * netgraft.VIEWS, *shapes[c]) for c in (3, 4, 5, 6)}
    tests = netgraft.Outputs(lambda rows: data.normalize(data.test_x[rows]).contiguous(), len(x), 250, blocks,
                             shapes, 4)
    rows, whole = [], netgraft.Graft((), scion, blocks[end:])
    for p in netgraft.make_phases(scion, netgraft.hparams("cifar10", 10)):
        net = netgraft.Graft(blocks[:start + p.first], scion[p.first:p.stop], blocks[start + p.stop:]).train()
        forward = torch.nn.Sequential(net.scion, net.suffix)
        adams = [torch.optim.Adam(part.parameters(), 1e-4) for part in scion[p.first:p.stop]]

        def plain() -> None:
            teacher.requires_grad_(True)
            dy, dx = torch.randint(0, 9, (2, 64), generator=generator)
            images = data.normalize(common.crop_flip(data.test_x[:64], dy, dx, dx > 4)).contiguous()
            t_logits = teacher(images).detach()
            loss = netgraft.norm_mse(net(images), t_logits)
            for adam in adams:
                adam.zero_grad()
            loss.backward()
            for adam in adams:
                adam.step()
            loss.item(), loss.item()

        def ours(amp: str = "none", forward=forward) -> None:
            teacher.requires_grad_(False)
            pick = netgraft.VIEWS * torch.arange(64) + torch.randint(netgraft.VIEWS, (64,), generator=generator)
            h, t_logits = views.at(pick, [start + p.first, len(blocks)])
            netgraft.graft_step(forward, p.optimizer, h, t_logits, netgraft.norm_mse, amp)

        compiled = torch.compile(forward)
        rows.append(row(f"netgraft step, {p.name}", plain, ours, 6, variants={
            "bf16": partial(ours, "bf16"), "compile": partial(ours, forward=compiled)}))

    def plain_test() -> None:
        teacher.requires_grad_(True)
        net = netgraft.Graft(blocks[:start], scion, blocks[end:]).eval()
        for part in data.test_x.split(64):
            net(data.normalize(part).contiguous()).argmax(1).tolist()

    def our_test() -> None:
        common.accuracy(tests.predict(whole, start), data.test_y)

    tests.keep({start})
    return [*rows, row("netgraft test pass, 2,000 images", plain_test, our_test)]


def bench_gda_kd() -> list[dict]:
    """GDA of 6 groups of 128 x 100 against six plain calls; crops against PIL; cached encodings against none."""
    import gda_kd
    from PIL import Image
    from torchvision import transforms
    torch.set_num_threads(1)
    torch.manual_seed(0)
    s, t = torch.randn(6, 128, 100) * 2, torch.randn(6, 128, 100) * 3
    grads, rows = {}, []

    def plain_gda(s, t, cost):
        p, q = (((x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) / 2).softmax(1) for x in (s, t))
        W = cost(p, q)
        P = torch.exp(-W / 0.1)
        for _ in range(20):
            P = P / P.sum(1, keepdim=True)
            P = P / P.sum(0, keepdim=True)
        d2, a, c = (s.mean(1) - t.mean(1)) ** 2, s.std(1), t.std(1)
        ratio = (d2 + 2 * (a - c) ** 2) / (d2 + 2 * (a + c) ** 2)
        return 0.02 * (8 ** 0.5 * ratio.clamp(1e-12, 1 - 1e-7).sqrt().atanh()).mean() + 0.1 * (P * W).sum()

    def backward(name, loss):
        def work():
            for _ in range(20):
                x = s.clone().requires_grad_()
                loss(x).backward()
            grads[name] = x.grad
        return work

    ours = backward("ours", lambda x: 0.02 * gda_kd.fisher_rao_loss(x, t) + 0.1 * gda_kd.sinkhorn_loss(x, t))
    for name, cost in (("broadcast W", lambda p, q: (p[:, None] - q[None]).abs().sum(2)),
                       ("torch.cdist", lambda p, q: torch.cdist(p, q, p=1))):
        plain = backward(name, lambda x: sum(plain_gda(x[g], t[g], cost) for g in range(6)) / 6)
        rows.append(row(f"gda_kd: GDA of 6 groups of 128 x 100, 20 times, against {name}", plain, ours, 6))
        assert (grads["ours"] - grads[name]).abs().max() < 0.01 * grads[name].abs().max()

    n, rng = 9984, np.random.RandomState(0)  # thirteen global batches of v0
    pictures = rng.randint(0, 256, (n, 32, 32, 3), np.uint8)
    data = common.Data("cifar100", lambda split: (pictures.transpose(0, 3, 1, 2), np.arange(n) % 100, list(range(100))),
                       norm="cifar100_gda")
    generator, cropper = torch.Generator().manual_seed(0), gda_kd.Cropper(32, 32, "cpu")
    x = data.test_x.contiguous()

    class Crop(transforms.RandomResizedCrop):  # bilinear or bicubic, drawn for each image
        def __call__(self, image):
            top, left, h, w = self.get_params(image, self.scale, self.ratio)
            return image.crop((left, top, left + w, top + h)).resize((32, 32), 2 + np.random.randint(2))

    steps = transforms.Compose([Crop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                transforms.Normalize(data.mean, data.std)])

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return n

        def __getitem__(self, i: int):
            return steps(Image.fromarray(pictures[i]))

    loader = torch.utils.data.DataLoader(Pictures(), batch_size=768, shuffle=True, num_workers=2)

    def drawn() -> tuple:
        for _ in range(10):
            area, aspect = 1024 * random.uniform(0.08, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if h <= 32 and w <= 32:
                return random.randint(0, 32 - h), random.randint(0, 32 - w), h, w
        return 0, 0, 32, 32

    def bare_pil() -> None:  # no objects but the images, no tensors but the batch
        for index in common.batches(n, 768, generator):
            batch = []
            for i in index.tolist():
                top, left, h, w = drawn()
                image = Image.fromarray(pictures[i]).crop((left, top, left + w, top + h))
                image = image.resize((32, 32), random.choice((2, 3)))
                batch.append(np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image))
            data.normalize(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2))

    def ours() -> None:
        for index in common.batches(n, 768, generator):
            data.normalize(cropper(x.index_select(0, index), gda_kd.draw_crops(len(index), 32, generator)))

    name = "gda_kd: randomly resized crops of 9,984 CIFAR-sized images, against"
    rows.append(row(f"{name} a DataLoader with 2 workers", lambda: [None for _ in loader], ours, 2))
    rows.append(row(f"{name} bare PIL calls", bare_pil, ours, 6))
    rows.append(gda_step(plain_gda, data))

    learner, args = gda_kd.Learner("resnet12_thin", 64, 32).eval(), gda_kd.Args()
    learner.to(memory_format=torch.channels_last)
    hits, slices = {}, 6  # batches of four episodes on the slow side, then scaled
    for what, classes, shots, episodes in (("validation, 800 episodes, 1 shot", 16, (1,), 800),
                                           ("test, 8,000 episodes, 1 and 5 shots", 20, (1, 5), 8000)):
        y = np.arange(600 * classes) % classes
        x = torch.from_numpy(rng.randint(0, 256, (len(y), 3, 32, 32), np.uint8))

        def plain() -> None:
            for k in shots:
                drawn = gda_kd.draw_episodes(y, slices, 5, k + 15, 4, np.random.RandomState(0))
                for batch, index in enumerate(torch.from_numpy(drawn)):
                    with torch.inference_mode():
                        feats = learner.features(data.normalize(x[index]))
                    out = gda_kd.episode_logits(*gda_kd.split_episodes(feats, 4, 5, k), "cos", 10.0)
                    hits[k, batch] = out.argmax(-1).flatten()

        def ours() -> None:
            feats = gda_kd.encode(learner, data, x)
            for k in shots:
                gda_kd.episode_accuracy(feats, torch.from_numpy(y), k, episodes, args)
            hits["feats"] = feats

        rows.append(row(f"gda_kd: few-shot {what}, against encoding every episode", plain, ours, 2,
                        scale=episodes / 4 / slices))
        for k in shots:
            index_rows = torch.from_numpy(gda_kd.draw_episodes(y, slices, 5, k + 15, 4, np.random.RandomState(0)))
            for batch, index in enumerate(index_rows):
                out = gda_kd.episode_logits(*gda_kd.split_episodes(hits["feats"][index], 4, 5, k), "cos", 10.0)
                assert torch.equal(out.argmax(-1).flatten(), hits[k, batch])
    return rows


def gda_step(plain_gda, data: common.Data) -> dict:
    """A classification step of KD + GDA, resnet56 -> resnet20, 2 groups of 64; equal losses.

    The plain form crops with PIL, freezes nothing, calls the teacher and GDA for each group and reads the terms back.
    """
    import torch.nn.functional as F
    from PIL import Image

    import gda_kd
    args, groups, size = gda_kd.Args(), 2, 64
    torch.manual_seed(0)
    nets = [common.build_model("resnet56", 100).eval(), common.build_model("resnet20", 100)]
    teacher, student = copy.deepcopy(nets)
    sgd = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    x, y = data.test_x[:groups * size], data.test_y[:groups * size]
    crops, losses = gda_kd.draw_crops(len(x), 32, torch.Generator().manual_seed(0)), {}

    def plain() -> None:
        images = []
        for image, (top, left, h, w, bicubic, flip) in zip(x.permute(0, 2, 3, 1).numpy(), crops.T.tolist()):
            image = Image.fromarray(image).crop((left, top, left + w, top + h)).resize((32, 32), 3 if bicubic else 2)
            images.append(np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image))
        batch, total = data.normalize(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).contiguous(), 0.0
        for part, target in zip(batch.chunk(groups), y.chunk(groups)):
            t, s = teacher(part).detach(), student(part)
            kd = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
            gda = plain_gda(s, t, lambda p, q: (p[:, None] - q[None]).abs().sum(2))
            ce = F.cross_entropy(s, target)
            total = total + (2 * ce + kd + gda) / groups
            ce.item(), kd.item(), gda.item()
        sgd.zero_grad()
        total.backward()
        sgd.step()
        losses["plain"] = total.item()

    t_net, s_net = (net.to(memory_format=torch.channels_last) for net in nets)
    t_net.requires_grad_(False)
    optimizer = gda_kd.make_optimizer(s_net, 0.01, 0.9, 5e-4, v0=True)
    cropper, compiled = gda_kd.Cropper(32, 32, "cpu"), torch.compile(s_net)

    def ours(amp: str = "none", forward=s_net) -> None:
        batch = data.normalize(cropper(x, crops))
        with common.autocast("cpu", amp):
            t, s = t_net(batch).float(), gda_kd.grouped(s_net, batch, groups, forward).float()
        terms = gda_kd.distill_terms(*(v.view(groups, size, -1) for v in (s, t)), y, 0, args)
        optimizer.zero_grad(set_to_none=True)
        (terms["gt"] + terms["kd"] + terms["align"]).backward()
        optimizer.step()
        losses["ours"] = (terms["gt"] + terms["kd"] + terms["align"]).item()

    plain(), ours()
    assert np.isclose(losses["plain"], losses["ours"], rtol=1e-3), losses
    return row("gda_kd step of KD + GDA, 2 groups of 64", plain, ours, 5, variants={
        "bf16": partial(ours, "bf16"), "compile": partial(ours, forward=compiled)})


BENCHES = {"data": bench_data, "pgdi": bench_pgdi, "akd_gan": bench_akd_gan, "adadfkd": bench_adadfkd, "gda_kd":
           bench_gda_kd, "netgraft": bench_netgraft, "start": bench_start}

if __name__ == "__main__":
    names = [w for w in sys.argv[1:] if w != "--keep"]
    if not names or set(names) - {*BENCHES, "all"}:
        sys.exit(__doc__)
    rows = [r for name in (BENCHES if "all" in names else names) for r in BENCHES[name]()]
    print(common.table(rows))
    if "--keep" in sys.argv and rows:
        print(f"kept in {common.keep(rows, 'speed')}")
