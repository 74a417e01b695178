"""Times what this project does against the plain form of it, alternating in one process, in CPU seconds.

  python tests/bench.py data      one augmented, shuffled, normalised epoch of 50,000 CIFAR-sized images
  python tests/bench.py start     from the end of `import torch` to the first step, CIFAR-10 in DATA_DIR or ./data
  python tests/bench.py gda_kd    GDA forward and backward; randomly resized crops; few-shot evaluation
  python tests/bench.py all       all of them; add --keep to put the rows into tests/results/speed.jsonl
"""
import math
import os
import random
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
        rows.append(row(f"GDA, 6 groups of 128 x 100, 20 times: {name}", *alternate(plain, ours, rounds=6)))
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

    name = "randomly resized crops of 9,984 CIFAR-sized images"
    rows.append(row(f"{name}: DataLoader, 2 workers", *alternate(lambda: [None for _ in loader], ours, rounds=2)))
    rows.append(row(f"{name}: bare PIL calls", *alternate(bare_pil, ours, rounds=6)))

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

        slow, fast = alternate(plain, ours, rounds=2)
        rows.append(row(f"few-shot {what}: encoding every episode", slow * episodes / 4 / slices, fast))
        for k in shots:
            index_rows = torch.from_numpy(gda_kd.draw_episodes(y, slices, 5, k + 15, 4, np.random.RandomState(0)))
            for batch, index in enumerate(index_rows):
                out = gda_kd.episode_logits(*gda_kd.split_episodes(hits["feats"][index], 4, 5, k), "cos", 10.0)
                assert torch.equal(out.argmax(-1).flatten(), hits[k, batch])
    return rows


BENCHES = {"data": bench_data, "start": bench_start, "gda_kd": bench_gda_kd}

if __name__ == "__main__":
    names = [w for w in sys.argv[1:] if w != "--keep"]
    if not names or set(names) - {*BENCHES, "all"}:
        sys.exit(__doc__)
    rows = [r for name in (BENCHES if "all" in names else names) for r in BENCHES[name]()]
    if "--keep" in sys.argv and rows:
        print(f"kept in {common.keep(rows, 'speed')}")
