"""How long the steps of the five methods take, in three ways.

  python tests/bench.py old FOLDER [method ...]   an older revision's scripts in FOLDER (git show ...)
                                                  against these: CPU seconds, in turn, one process
  python tests/bench.py model [method ...]        what each published row needs on a large GPU that
                                                  is not there: launches, syncs, FLOPs, bytes, and
                                                  the least minutes, in which no kernel takes longer
                                                  than its FLOPs or bytes, or 2 microseconds
  python tests/bench.py gpu [method ...]          milliseconds and minutes on the GPU that is there
"""
import contextlib
import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
METHODS = ("pgdi", "adadfkd", "akd_gan", "gda_kd", "netgraft")


@dataclass
class Step:
    name: str
    work: Callable
    times: float  # how often it comes in the published run
    images: int = 0  # that the student learns from
    per: int = 1  # steps in one call of work


def fake_data(name, device, n=2000):
    """Noise with the shapes of a data set."""
    import common
    classes, size = {"cifar10": (10, 32), "cifar100": (100, 32), "mini": (64, 84),
                     "cifarfs": (64, 32)}[name]
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, size, size), generator=rng).to(torch.uint8)
    y = torch.arange(n) % classes
    return common.Data(name, lambda split: (x, y, list(map(str, range(classes)))), device, "half")


def steps_of(method, words, device, amp, compiled=False):
    """Its steps with these flags, on noise, with random weights."""
    import common
    module = importlib.import_module(method)
    args = common.parse_args(module.Args, module.PRESETS, words.split())
    args.amp, args.device = amp, device
    torch.manual_seed(0)
    data = fake_data(args.dataset, device)
    rng = torch.Generator(device).manual_seed(0)
    channels_last = dict(device=device, memory_format=torch.channels_last)
    names = [args.teacher, args.student.split(",")[0]]
    teacher, student = [common.build_model(name, data.num_classes) for name in names]
    teacher.to(**channels_last).eval().requires_grad_(False)
    if amp == "bf16":  # as get_teacher does
        for m in teacher.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.to(torch.bfloat16)
    student.to(**channels_last)
    net = torch.compile(student) if compiled else student
    return STEPS[method](SimpleNamespace(
        args=args, data=data, rng=rng, teacher=teacher, student=student, net=net, device=device,
        to=channels_last))


def evaluation(p, times, net=None):
    import common
    x = p.data.test_x[:1000]
    work = partial(common.predict, net or p.student, p.data, x, p.args.amp)
    return Step("evaluate 1,000 images", work, 10 * times)


# ------------------------------------------------------------------------ the steps of each method

def pgdi_steps(p):
    import pgdi
    args, data, C = p.args, p.data, p.data.num_classes
    optimizer = torch.optim.SGD(p.student.parameters(), 0.01, 0.9, weight_decay=1e-4)
    generator = pgdi.Generator(ngf=args.ngf, size=data.image_size).to(**p.to)
    meta = torch.optim.Adam(generator.parameters(), 1e-3, (0.5, 0.999))
    v = data.normalize(data.test_x[:args.shots * C])
    y_real = torch.arange(C, device=p.device).repeat_interleave(args.shots)
    _, _, feat = pgdi.observe(p.teacher, v[:2], args.amp)
    feat = torch.randn(len(v), feat.shape[1], device=p.device)
    t_real = torch.randn(len(v), C, device=p.device)
    shots = pgdi.Shots(feat, t_real, y_real, C)
    judges = pgdi.Judges(p.teacher, shots, pgdi.stored_statistics(p.teacher, v[:2], args.amp))
    judges.student = p.student
    size = args.synthesis_batch_size
    z = torch.randn(size, generator.nz, device=p.device)
    targets = torch.arange(size, device=p.device) * C // size

    def augment(x):
        return data.augment(x, p.rng)

    def synthesis():
        p.student.eval().requires_grad_(False)
        pgdi.invert(generator, z, targets, augment, judges, args)
        meta.step()
        p.student.train().requires_grad_(True)

    @torch.no_grad()
    def teach(x):
        with pgdi.autocast(x.device, args.amp):
            return p.teacher(x).float()

    pool = pgdi.Pool(4 * args.batch_size, data.image_size, p.device)
    pool.storage.zero_()
    pool.made = 4 * args.batch_size
    taught = pgdi.pool_batches(pool, args.batch_size, augment, teach, p.rng)
    mixtures = [pgdi.mixture_at(e, args, len(v))[1] for e in range(args.warmup, args.epochs)]
    n_real = round(statistics.mean(mixtures))
    index = torch.arange(n_real, device=p.device) % len(v)

    def kd():
        for _ in range(4):
            x, t_logits = next(taught)
            x, t_logits = torch.cat([x, v[index]]), torch.cat([t_logits, t_real[index]])
            pgdi.kd_step(p.net, optimizer, x, t_logits, n_real, 0.5, args)

    steps = args.kd_steps * (args.epochs - args.warmup)
    return [Step("student step", kd, steps, args.batch_size + n_real, per=4),
            Step(f"synthesis, {args.g_steps} iterations", synthesis, args.epochs),
            evaluation(p, args.epochs - args.warmup)]


def adadfkd_steps(p):
    import adadfkd
    args, data = p.args, p.data
    args.synthesis_batch_size = args.synthesis_batch_size or args.batch_size
    args.nz = args.nz or 16 * data.image_size
    optimizer = torch.optim.SGD(p.student.parameters(), 0.01, 0.9, weight_decay=1e-4)
    generator = adadfkd.build_generator(args, data)
    adam = torch.optim.Adam(generator.parameters(), 1e-3, args.betas_g)
    _, t_feat = adadfkd.look(p.teacher, data.normalize(data.test_x[:2]), args.amp)
    queue = adadfkd.new_queue(args.N_neg, t_feat.shape[1], p.rng)
    scene = adadfkd.Scene(p.teacher, p.student, data, p.rng, args)
    middle = adadfkd.window_at((1 - args.length) / 2, args)
    size, adv = args.synthesis_batch_size, max(args.adv, 0.1)

    def images():
        p.student.eval().requires_grad_(False)
        generator.train()
        z = torch.randn(1, size, args.nz, generator=p.rng, device=p.device)
        adadfkd.make_images(generator, adam, z, queue, middle, adv, scene)
        generator.eval()
        p.student.train().requires_grad_(True)

    def student():
        z = torch.randn(args.kd_steps, args.batch_size, args.nz, generator=p.rng, device=p.device)
        for batch in adadfkd.fresh_batches(generator, z, scene):
            adadfkd.student_step(p.net, optimizer, batch, args.lambda_0, scene)

    rounds = args.epochs * (args.ep_steps // args.kd_steps)
    return [Step("student step", student, rounds * args.kd_steps, args.batch_size, args.kd_steps),
            Step("generator step", images, rounds * args.g_steps),
            evaluation(p, args.epochs)]


def akd_gan_steps(p):
    import akd_gan
    args = p.args
    if args.teacher == "resnet34_imagenet":
        args.teacher_size = 224
        p.teacher = akd_gan.Upsampled(p.teacher, 224)
    player = akd_gan.make_players(args, p.data)[0]
    student = torch.compile(player.student) if p.net is not p.student else player.student
    noise = partial(torch.randn, args.batch_size, args.nz, generator=p.rng, device=p.device)

    def one_round():
        player.student.train().requires_grad_(True)
        z = [noise() for _ in range(args.kd_steps)]
        images, t_logits = akd_gan.make_batches(player.generator, p.teacher, z, args)
        for x, t in zip(images, t_logits):
            akd_gan.student_step(student, player.optimizer, x, t, args)
        player.student.train(not args.student_eval_in_g).requires_grad_(False)
        akd_gan.generator_step(player.generator, player.adam, student, p.teacher, noise(), args)

    students = len(args.student.split(","))  # of official the smaller one is counted like the large
    rounds = args.epochs * args.epoch_itrs * students
    return [Step(f"round of {args.kd_steps} + 1 steps", one_round, rounds,
                 args.kd_steps * args.batch_size),
            evaluation(p, args.epochs * students, player.student)]


def gda_kd_steps(p):
    import gda_kd
    return meta_steps(p) if p.args.task == "fs_meta" else classify_steps(p, gda_kd)


def classify_steps(p, gda_kd):
    args, data = p.args, p.data
    groups, size = args.virtual_gpus, args.batch_size
    v0 = args.recipe == "v0"
    gda_kd.split_batch_norms(p.student, groups)
    optimizer = gda_kd.v0_optimizer if v0 else gda_kd.plain_optimizer
    optimizer = optimizer(p.student, 0.01, 5e-4)
    index = torch.arange(groups * size, device=p.device)

    def step():
        if v0:
            x = gda_kd.random_crops(data.train_x[index], data.image_size, p.rng, gda_kd.V0_MODES)
            x = data.normalize(x)
        else:
            x = data.augment(data.train_x[index], p.rng)
        with gda_kd.autocast(x.device, args.amp):
            s_logits = p.net(x).float().unflatten(0, (groups, -1))
            t_logits = p.teacher(x).float().unflatten(0, (groups, -1))
        loss, _ = gda_kd.classification_loss(s_logits, t_logits, data.train_y[index], 100, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps = args.epochs * (50000 // len(index))
    return [Step("step", step, steps, len(index)), evaluation(p, args.epochs)]


def meta_steps(p):
    import gda_kd
    args, data, E = p.args, p.data, gda_kd.PER_STEP
    shots, per_class = args.fs_shots[0], args.fs_shots[0] + args.query
    base_x = gda_kd.resize_centre(data.train_x, 80, 80) if args.dataset == "mini" else data.train_x
    learner = gda_kd.Learner(args.student, data.num_classes, base_x.shape[-1]).to(**p.to)
    gda_kd.split_batch_norms(learner, args.virtual_gpus)
    optimizer = gda_kd.plain_optimizer(learner, 1e-3, 5e-4)
    drawn = torch.arange(E * args.way * per_class, device=p.device)
    t_features = torch.randn(len(drawn), 512, device=p.device)
    y = gda_kd.query_labels(E, args.way, args.query).to(p.device)

    def step():
        with gda_kd.autocast(p.device, args.amp):
            features = learner(data.normalize(base_x[drawn])).float()
        split = gda_kd.split_episodes(features, E, args.way, shots)
        s_logits = gda_kd.episode_logits(*split, learner.temp).flatten(0, 1)
        split = gda_kd.split_episodes(t_features[drawn], E, args.way, shots)
        t_logits = gda_kd.episode_logits(*split, 10.0).flatten(0, 1)
        loss, _ = gda_kd.fewshot_loss(s_logits, t_logits, y, 5, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return [Step("meta step", step, args.epochs * args.episodes // E, len(drawn))]


def netgraft_steps(p):
    import netgraft
    args = p.args
    pair = netgraft.match(p.teacher, p.student, 32)
    shapes = netgraft.shapes_at_cuts([pair.prefix, *pair.t_blocks], 32)[1:]
    steps = []
    for phase in netgraft.make_phases(pair.scion, args, 10):
        net = pair.grafted(phase.first, phase.stop)
        net.eval()
        pair.scion[phase.first:phase.stop].train()
        forward = torch.compile(net) if p.net is not p.student else net
        h = torch.randn(1000, *shapes[phase.first], device=p.device)
        t_logits = torch.randn(1000, 10, device=p.device)
        rows = torch.arange(phase.batch_size, device=p.device)

        def step(forward=forward, phase=phase, h=h, t_logits=t_logits, rows=rows):
            netgraft.graft_step(forward, phase.optimizer, h[rows], t_logits[rows],
                                netgraft.norm_mse, args.amp)
        images = 100  # of ten shots: two steps an epoch
        name = f"grafts {phase.first + 1} to {phase.stop}"
        steps.append(Step(name, step, 2 * (phase.end - phase.begin), images // 2))
    return steps


STEPS = {"pgdi": pgdi_steps, "adadfkd": adadfkd_steps, "akd_gan": akd_gan_steps,
         "gda_kd": gda_kd_steps, "netgraft": netgraft_steps}
WRN, RESNET = "--teacher wrn40_2 --student wrn16_2", "--teacher resnet34 --student resnet18"
HEADLINE = [  # (row, method, flags, amp as it is by default on such a GPU)
    ("PGDI cifar100 WRN-40-2 -> WRN-16-1", "pgdi", "", "bf16"),
    ("PGDI cifar100 ResNet-34 -> 18", "pgdi", RESNET, "bf16"),
    ("AdaDFKD cifar100 WRN-40-2 -> WRN-16-2", "adadfkd", WRN, "bf16"),
    ("AdaDFKD cifar10 WRN-40-2 -> WRN-16-2", "adadfkd", f"--dataset cifar10 {WRN}", "bf16"),
    ("AdaDFKD cifar10 ResNet-34 -> 18", "adadfkd", f"--dataset cifar10 {RESNET}", "bf16"),
    ("AdaDFKD cifar100 ResNet-34 -> 18", "adadfkd", RESNET, "bf16"),
    ("AKD-GAN strong", "akd_gan", "--preset strong", "bf16"),
    ("AKD-GAN dfad", "akd_gan", "--preset dfad", "bf16"),
    ("AKD-GAN official", "akd_gan", "--preset official", "bf16"),
    ("GDA v0 ResNet-56 -> 20", "gda_kd", "", "none"),
    ("GDA native DKD ResNet-32x4 -> 8x4", "gda_kd",
     "--preset native_dkd --teacher resnet32x4 --student resnet8x4 --gda", "none"),
    ("few-shot meta, mini, ResNet-36", "gda_kd", "--preset fs_meta", "bf16"),
    ("NetGraft cifar10 VGG16", "netgraft", "", "none"),
]


def headline(methods):
    return [row for row in HEADLINE if row[1] in (methods or METHODS)]


# ----------------------------------------------------------------------- old: CPU seconds, in turn

CASES = [  # (method, flags for a CPU)
    ("pgdi", "--batch_size 64 --synthesis_batch_size 64 --g_steps 3"),
    ("adadfkd", "--batch_size 64 --N_neg 8192 --kd_steps 5"),
    ("akd_gan", "--preset dfad --dataset cifar10 --teacher resnet20 --student wrn16_1 --batch_size 64"),
    ("gda_kd", "--virtual_gpus 2"),
    ("gda_kd", "--recipe native --distiller dkd --teacher resnet20 --student resnet8 --virtual_gpus 1"),
    ("gda_kd", "--preset fs_meta --dataset cifarfs --student resnet12_thin"),
    ("netgraft", "")]


@contextlib.contextmanager
def scripts_of(folder):
    """While open, `import pgdi` and the others are those of the folder."""
    names = ("common", *METHODS)
    ours = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(ours)


def in_turn(old, new, rounds=7):
    """[seconds of old], [of new]; the first round warms up."""
    spent = [], []
    for _ in range(rounds + 1):
        for work, seconds in zip((old, new), spent):
            begin = time.process_time()
            work()
            seconds.append(time.process_time() - begin)
    return spent[0][1:], spent[1][1:]


def compare(folder, methods):
    import common
    torch.set_num_threads(1)
    common.keep_freed_memory()  # as every run does; it holds for both sides
    print("| flags | step | old, CPU s | new, CPU s | new / old: medians | least |\n" + "|---" * 6 + "|")
    for method, words in CASES:
        if methods and method not in methods:
            continue
        steps = steps_of(method, words, torch.device("cpu"), "none")
        with scripts_of(folder):
            before = steps_of(method, words, torch.device("cpu"), "none")
        for old, new in zip(before, steps):
            a, b = in_turn(old.work, new.work)
            medians = statistics.median(a), statistics.median(b)
            print(f"| {method} {words} | {new.name} | {medians[0]:.3f} | {medians[1]:.3f} "
                  f"| {medians[1] / medians[0]:.2f} | {min(b) / min(a):.2f} |", flush=True)


# ------------------------------------------------------------------------------------------- model

def model(methods, out=print):
    import pretend_cuda
    torch.set_num_threads(1)
    if not pretend_cuda.install():
        sys.exit("this torch takes no pretended device")
    out("| row, type | step | launches | syncs | GFLOP | MB | largest MB | ms | minutes |")
    out("|" + "---|" * 9)
    for row, method, words, default in headline(methods):
        for amp in ("bf16", "none"):
            minutes = 0.0
            for step in steps_of(method, words, pretend_cuda.CUDA, amp):
                pretend_cuda.hollow = True
                step.work()  # the first one makes the optimizers' state
                costs = pretend_cuda.start_counting()
                step.work()
                pretend_cuda.hollow = False
                n = step.per
                ms = 1e3 * costs.seconds / n
                minutes += ms * step.times / 6e4
                out(f"| {row}, {amp} | {step.name} x {step.times:,.0f} | {costs.launches / n:,.0f} "
                    f"| {sum(costs.syncs.values()) / n:g} | {costs.flops / n / 1e9:,.1f} "
                    f"| {costs.bytes / n / 1e6:,.0f} | {costs.largest / 1e6:,.0f} | {ms:.2f} | |")
            out(f"| **{row}, {amp}{' (default)' if amp == default else ''}** | all "
                f"| | | | | | | **{minutes:.1f}** |")


# --------------------------------------------------------------------------------------------- gpu

def kernels_of(work):
    """(number of launches, their milliseconds together) of one call."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_gpu), sum(e.device_time_total for e in on_gpu) / 1e3


def milliseconds(work, seconds=0.7):
    """Wall clock of one call, after three."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    begin, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - begin < seconds:
        work()
        torch.cuda.synchronize()
        calls += 1
    return 1e3 * (time.perf_counter() - begin) / calls


def gpu(methods, budget=450):
    if not torch.cuda.is_available():
        print("there is no GPU here; python tests/bench.py model estimates what one would need")
        return
    began = time.perf_counter()
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "",
             "| row, type | step | ms | images/s | launches | outside kernels | minutes |",
             "|" + "---|" * 7]
    compiled_of = set()  # compiling takes long: one row of each method
    for row, method, words, default in headline(methods):
        for kind in ("none", "bf16", "bf16 compiled"):
            late = time.perf_counter() - began > budget
            if late or kind == "bf16 compiled" and method in compiled_of:
                continue
            compiled = kind == "bf16 compiled"
            if compiled:
                compiled_of.add(method)
            minutes = 0.0
            for step in steps_of(method, words, torch.device("cuda", 0), kind.split()[0], compiled):
                ms = milliseconds(step.work)
                launches, busy = kernels_of(step.work)
                minutes += ms / step.per * step.times / 6e4
                images = f"{1e3 * step.images / (ms / step.per):,.0f}" if step.images else ""
                lines.append(
                    f"| {row}, {kind} | {step.name} x {step.times:,.0f} | {ms / step.per:.2f} "
                    f"| {images} | {launches / step.per:,.0f} | {100 * max(0, 1 - busy / ms):.0f} % | |")
                print(lines[-1], flush=True)
            lines.append(f"| **{row}, {kind}** | all | | | | | **{minutes:.1f}** |")
            print(lines[-1], flush=True)
    if time.perf_counter() - began > budget:
        lines += ["", f"what would have begun after {budget / 60:.1f} minutes is left out"]
    path = ROOT / "tests" / "results" / "gpu.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    command, *words = sys.argv[1:] or [""]
    if command == "old" and words:
        compare(words[0], words[1:])
    elif command in ("model", "gpu"):
        {"model": model, "gpu": gpu}[command](words)
    else:
        sys.exit(__doc__)
