"""A training step of each method as its main runs it, on noise, for bench.py and the tests.

steps_of("pgdi", "--shots 5", device, "bf16") -> [Step]: work() runs one, or `per` of them.
"""
import importlib
import statistics
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn as nn

# The scripts are imported where they are used: bench.py exchanges them for older ones.


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
    classes, size = {"cifar10": (10, 32), "cifar100": (100, 32), "cifarfs": (64, 32),
                     "tiny_imagenet": (200, 64), "mini": (64, 84)}[name]
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
        to=channels_last, fused=device.type == "cuda"))


# ------------------------------------------------------------------------ the steps of each method

def pgdi_steps(p):
    import pgdi
    args, data, C = p.args, p.data, p.data.num_classes
    optimizer = torch.optim.SGD(
        p.student.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=p.fused)
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
            Step(f"synthesis, {args.g_steps} iterations", synthesis, args.epochs)]


def adadfkd_steps(p):
    import adadfkd
    args, data = p.args, p.data
    args.synthesis_batch_size = args.synthesis_batch_size or args.batch_size
    args.nz = args.nz or 16 * data.image_size
    optimizer = torch.optim.SGD(
        p.student.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=p.fused)
    generator = adadfkd.build_generator(args, data)
    adam = torch.optim.Adam(generator.parameters(), 1e-3, args.betas_g, fused=p.fused)
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
            Step("generator step", images, rounds * args.g_steps)]


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
    name = f"round of {args.kd_steps} + 1 steps"
    return [Step(name, one_round, rounds, args.kd_steps * args.batch_size)]


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
    return [Step("step", step, steps, len(index))]


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
    with netgraft.autocast(p.device, args.amp):
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
        name = f"grafts {phase.first + 1} to {phase.stop}"
        steps.append(Step(name, step, 2 * (phase.end - phase.begin), 50))  # 100 images: two steps
    return steps


STEPS = {"pgdi": pgdi_steps, "adadfkd": adadfkd_steps, "akd_gan": akd_gan_steps,
         "gda_kd": gda_kd_steps, "netgraft": netgraft_steps}
