"""Times what this project does against the plain form of it, alternating in one process, in CPU seconds.

  python tests/bench.py data      one augmented, shuffled, normalised epoch of 50,000 CIFAR-sized images
  python tests/bench.py start     from the end of `import torch` to the first step, CIFAR-10 in DATA_DIR or ./data
  python tests/bench.py netgraft  a step of each of NetGraft's five phases at 10 shots, and a test pass
  python tests/bench.py all       all; add --keep to put the rows into tests/results/speed.jsonl
"""
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402


def cpu_seconds() -> float:
    """Of this process and of the workers it has waited for."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def alternate(plain, ours, rounds: int) -> tuple[float, float]:
    """The least CPU seconds of each over the rounds: other work on the machine only ever adds to them."""
    spent = {plain: [], ours: []}
    for _ in range(rounds):
        for work in (plain, ours):
            begin = cpu_seconds()
            work()
            spent[work].append(cpu_seconds() - begin)
    return min(spent[plain]), min(spent[ours])


def row(name: str, plain: float, ours: float) -> dict:
    print(f"{name}: plain {plain:.2f} s, ours {ours:.2f} s, ratio {plain / ours:.1f}")
    return {"bench": name, "plain, CPU s": f"{plain:.2f}", "ours, CPU s": f"{ours:.2f}",
            "ratio": f"**{plain / ours:.1f}×**", "machine": f"{os.cpu_count()} cores, torch {torch.__version__}"}


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
    times = alternate(plain, ours, rounds=3)
    assert seen == {"plain": 50000, "ours": 50000}
    return [row("one augmented epoch of 50,000 CIFAR-sized images", *times)]


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

        def ours() -> None:
            teacher.requires_grad_(False)
            pick = netgraft.VIEWS * torch.arange(64) + torch.randint(netgraft.VIEWS, (64,), generator=generator)
            h, t_logits = views.at(pick, [start + p.first, len(blocks)])
            netgraft.graft_step(forward, p.optimizer, h, t_logits, netgraft.norm_mse)

        rows.append((f"NetGraft step, {p.name}", *alternate(plain, ours, rounds=6)))

    def plain_test() -> None:
        teacher.requires_grad_(True)
        net = netgraft.Graft(blocks[:start], scion, blocks[end:]).eval()
        for part in data.test_x.split(64):
            net(data.normalize(part).contiguous()).argmax(1).tolist()

    def our_test() -> None:
        common.accuracy(tests.predict(whole, start), data.test_y)

    tests.keep({start})
    times = alternate(plain_test, our_test, rounds=3)
    ratios = [plain / ours for _, plain, ours in rows]
    print(f"geometric mean of the five steps: {np.exp(np.mean(np.log(ratios))):.1f}")
    return [row(*r) for r in [*rows, ("NetGraft test pass, 2,000 images", *times)]]


BENCHES = {"data": bench_data, "start": bench_start, "netgraft": bench_netgraft}

if __name__ == "__main__":
    names = [w for w in sys.argv[1:] if w != "--keep"]
    if not names or set(names) - {*BENCHES, "all"}:
        sys.exit(__doc__)
    rows = [r for name in (BENCHES if "all" in names else names) for r in BENCHES[name]()]
    if "--keep" in sys.argv and rows:
        print(f"kept in {common.keep(rows, 'speed')}")
