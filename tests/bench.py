"""How long the steps of the five methods take, in three ways.

  python tests/bench.py old FOLDER [method ...]   the scripts of an older revision, put into FOLDER,
                                                  against these: CPU seconds, in turn, one process
  python tests/bench.py model [method ...]        what each published row needs on a large GPU that
                                                  is not there: launches, syncs, FLOPs, bytes, and
                                                  the least minutes, in which no kernel takes longer
                                                  than its FLOPs or bytes, or 2 microseconds
  python tests/bench.py gpu [method ...]          milliseconds and minutes on the GPU that is there
"""
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from steps import steps_of  # noqa: E402

METHODS = ("pgdi", "adadfkd", "akd_gan", "gda_kd", "netgraft")
WRN, RESNET = "--teacher wrn40_2 --student wrn16_2", "--teacher resnet34 --student resnet18"
HEADLINE = [  # (row, method, flags, amp as it is by default on such a GPU)
    ("PGDI cifar100 WRN-40-2 -> WRN-16-1", "pgdi", "", "bf16"),
    ("PGDI cifar100 ResNet-34 -> 18", "pgdi", RESNET, "bf16"),
    ("AdaDFKD cifar100 WRN-40-2 -> WRN-16-2", "adadfkd", WRN, "bf16"),
    ("AdaDFKD cifar10 WRN-40-2 -> WRN-16-2", "adadfkd", f"--dataset cifar10 {WRN}", "bf16"),
    ("AdaDFKD cifar10 ResNet-34 -> 18", "adadfkd", f"--dataset cifar10 {RESNET}", "bf16"),
    ("AdaDFKD cifar100 ResNet-34 -> 18", "adadfkd", RESNET, "bf16"),
    ("AdaDFKD Tiny-ImageNet ResNet-50 -> 18", "adadfkd",
     "--dataset tiny_imagenet --teacher resnet50_tiny --student resnet18_tiny", "bf16"),
    ("AKD-GAN strong", "akd_gan", "--preset strong", "bf16"),
    ("AKD-GAN dfad", "akd_gan", "--preset dfad", "bf16"),
    ("AKD-GAN official", "akd_gan", "--preset official", "bf16"),
    ("GDA v0 ResNet-56 -> 20", "gda_kd", "", "none"),
    ("GDA native DKD ResNet-32x4 -> 8x4", "gda_kd",
     "--preset native_dkd --teacher resnet32x4 --student resnet8x4 --gda", "none"),
    ("few-shot meta, mini, ResNet-36", "gda_kd", "--preset fs_meta", "bf16"),
    ("NetGraft cifar10 VGG16", "netgraft", "", "none"),
]


# ----------------------------------------------------------------------- old: CPU seconds, in turn

CASES = [  # (method, flags for a CPU)
    ("pgdi", "--batch_size 64 --synthesis_batch_size 64 --g_steps 3"),
    ("adadfkd", "--batch_size 64 --N_neg 8192 --kd_steps 5"),
    ("akd_gan", "--preset dfad --dataset cifar10 --teacher resnet20 --student wrn16_1 --ngf 32"),
    ("gda_kd", "--virtual_gpus 2"),
    ("gda_kd", "--preset native_dkd --teacher resnet20 --student resnet8 --gda"),
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
    print("| flags | step | old, CPU s | new, CPU s | new / old: medians | least |")
    print("|---" * 6 + "|")
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

def model(methods):
    import pretend_cuda
    torch.set_num_threads(1)
    if not pretend_cuda.install():
        sys.exit("this torch takes no pretended device")
    print("| row, type | step | launches | syncs | GFLOP | MB | largest MB | ms | minutes |")
    print("|" + "---|" * 9)
    for row, method, words, default in HEADLINE:
        if methods and method not in methods:
            continue
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
                print(f"| {row}, {amp} | {step.name} x {step.times:,.0f} "
                      f"| {costs.launches / n:,.0f} | {sum(costs.syncs.values()) / n:g} "
                      f"| {costs.flops / n / 1e9:,.1f} "
                      f"| {costs.bytes / n / 1e6:,.0f} | {costs.largest / 1e6:,.0f} | {ms:.2f} | |",
                      flush=True)
            print(f"| **{row}, {amp}{' (default)' if amp == default else ''}** | all "
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
    for row, method, words, _ in HEADLINE:
        torch.backends.cudnn.benchmark = method not in ("pgdi", "netgraft")  # as their mains
        if methods and method not in methods:
            continue
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
                waits = 100 * max(0, 1 - busy / ms)
                lines.append(
                    f"| {row}, {kind} | {step.name} x {step.times:,.0f} | {ms / step.per:.2f} "
                    f"| {images} | {launches / step.per:,.0f} | {waits:.0f} % | |")
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
