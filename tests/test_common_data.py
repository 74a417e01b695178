"""Tests of the data section of common.py: sources, cache, downloads, shots, augmentation, foreign pickles."""
import hashlib
import io
import os
import pickle
import random
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from test_common import REAL, fake_data, needs_data
from tools import ROOT

TINY = os.environ.get("TINY_DIR")  # folder that holds tiny-imagenet-200, or a part of it


def pictures(n, seed=0, size=32):
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, 3), np.uint8)


def planes(x):
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())


def holds(data, **made):
    for split, (x, y) in made.items():
        ours = getattr(data, f"{split}_x"), getattr(data, f"{split}_y")
        assert (ours[0].dtype, ours[1].dtype) == (torch.uint8, torch.int64) and ours[0].is_contiguous()
        assert torch.equal(ours[0], planes(x)) and ours[1].tolist() == list(y)


def refuses(capsys, call, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and all(str(w) in last for w in words), last


def npz_set(folder, n=(24, 12), c=3, **extra):
    folder.mkdir(parents=True, exist_ok=True)
    made = {s: (pictures(k, k), np.random.RandomState(k).permutation(k) % c) for s, k in zip(("train", "test"), n)}
    for split, (x, y) in made.items():
        np.savez(folder / f"{split}.npz", x=x, y=y.astype(np.uint8), **extra)
    return made


def tree_set(folder, classes="ba", splits=("train", "test"), n=2):
    from PIL import Image
    y = np.repeat(np.arange(len(classes)), n)
    made = {split: (pictures(len(y), seed), y) for seed, split in enumerate(splits)}
    for split, i in ((split, i) for split in splits for i in range(len(y))):
        path = folder / split / sorted(classes)[y[i]] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[split][0][i]).save(path)
    return made


@pytest.mark.parametrize("names", [None, ["cat", "dog", "owl"]])
def test_npz(tmp_path, capsys, names):
    made = npz_set(tmp_path / "own", **({"classes": names} if names else {}))
    data = common.load_data(str(tmp_path / "own"), tmp_path)
    holds(data, **made)
    assert (data.classes, data.num_classes, data.image_size) == (names or ["0", "1", "2"], 3, 32)
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)
    (tmp_path / "own" / "train.npz").unlink()
    data = common.load_data(str(tmp_path / "own"), tmp_path / "new")
    holds(data, test=made["test"])
    assert data.num_classes == 3
    refuses(capsys, lambda: data.train_x, "train.npz")
    refuses(capsys, lambda: common.load_data("cifar11", tmp_path), "cifar10")


@pytest.mark.parametrize("h, w, size", [(32, 40, 32), (63, 80, 32), (64, 70, 64)])
def test_npz_of_another_size(tmp_path, h, w, size):
    from PIL import Image
    x = pictures(3, size=80)[:, :h, :w]
    left = (w - h) // 2
    square = [Image.fromarray(image[:, left:left + h]).resize((size, size), Image.Resampling.BILINEAR) for image in x]
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=x, y=[0, 2, 1])
    holds(common.load_data(str(tmp_path), tmp_path), train=(square, [0, 2, 1]), test=(square, [0, 2, 1]))


X, Y = pictures(6), np.arange(6) % 3


@pytest.mark.parametrize("train, word", [
    (dict(x=X / 1, y=Y), "float64"), (dict(x=X[..., 0], y=Y), "shape"), (dict(x=X, y=Y / 1), "float64"),
    (dict(x=X), "y"), (dict(x=X, y=Y[:5]), "integers"), (dict(x=X, y=Y + 1), "1 to 3"), (dict(x=X, y=Y - 1), "-1 to 1"),
    (dict(x=X, y=Y % 2), "class 2"), (dict(x=X.astype(object), y=Y), "allow_pickle"),
    (dict(x=X, y=Y, classes=["a", "b"]), "differ")])
def test_npz_that_cannot_be_used(tmp_path, capsys, train, word):
    npz_set(tmp_path)
    np.savez(tmp_path / "train.npz", **train)
    data = common.load_data(str(tmp_path), tmp_path)
    refuses(capsys, lambda: data.train_x, tmp_path, word)


def python2_pickle(value):
    """As Python 2 and numpy 1 wrote it: protocol 2, byte strings."""
    def string(pickler, s):
        raw = s if isinstance(s, bytes) else s.encode("latin1")
        pickler.write(b"T" + len(raw).to_bytes(4, "little") + raw)
    pickler = pickle._Pickler(out := io.BytesIO(), 2)
    pickler.dispatch = {**pickler.dispatch, str: string, bytes: string}
    pickler.dump(value)
    return out.getvalue().replace(b"numpy._core.", b"numpy.core.")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """make(name): a small official folder in tmp_path/data, whose md5s torchvision then expects, and what it holds."""
    def make(name):
        import torchvision
        folder, c, made = tmp_path / "data" / common.ARCHIVES[name][0], 10 if name == "cifar10" else 100, {}
        base, key = getattr(torchvision.datasets, name.upper()), "labels" if c == 10 else "fine_labels"
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            files = [file for file, _ in getattr(base, f"{split}_list")]
            n = 1 + c // len(files)
            x = pictures(n * len(files), n)
            y = (np.random.RandomState(n).permutation(len(x)) % c).tolist()
            for i, file in zip(range(0, len(x), n), files):
                (folder / file).write_bytes(python2_pickle({
                    "data": x[i:i + n].transpose(0, 3, 1, 2).reshape(n, 3072), key: y[i:i + n],
                    "coarse_labels": [0] * n, "filenames": ["x_s_000001.png"] * n, "batch_label": file}))
            monkeypatch.setattr(base, f"{split}_list", [[file, md5(folder / file)] for file in files])
            made[split] = x, y
        meta = folder / base.meta["filename"]
        meta.write_bytes(python2_pickle({base.meta["key"]: [f"class {i}" for i in range(c)], "num_vis": 3072}))
        monkeypatch.setattr(base, "meta", {**base.meta, "md5": md5(meta)})
        return folder, made
    return make


def pack(folder, name, monkeypatch):
    """The folder becomes its official archive, whose md5 common then expects."""
    official, archive, _, sources = common.ARCHIVES[name]
    shutil.make_archive(folder.parent / archive.split(".")[0], archive.partition(".")[2].replace("tar.gz", "gztar"),
                        folder.parent, official)
    shutil.rmtree(folder)
    monkeypatch.setitem(common.ARCHIVES, name, (official, archive, md5(folder.parent / archive), sources))
    return folder.parent / archive


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_official_cifar(tmp_path, monkeypatch, capsys, cifar, name):
    (folder, made), root = cifar(name), tmp_path / "data"
    holds(data := common.load_data(name, root), **made)
    assert data.classes[-1] == f"class {len(data.classes) - 1}" and (data.mean, data.std) == common.NORMS[name]
    assert data.order is None and "note" not in capsys.readouterr().out
    pack(folder, name, monkeypatch)
    shutil.rmtree(root / "cache")
    holds(common.load_data(name, root), **made)
    for file in folder.glob("data_batch*" if name == "cifar10" else "train"):
        file.unlink()
    shutil.rmtree(root / "cache")
    data = common.load_data(name, root)
    holds(data, test=made["test"])
    refuses(capsys, lambda: data.train_x, folder)


@pytest.mark.parametrize("file", ["test_batch", "batches.meta", "data_batch_3"])
def test_tampered_cifar_is_never_unpickled(tmp_path, capsys, cifar, file):
    folder, _ = cifar("cifar10")
    (folder / file).write_bytes(bad := f"cos\nmkdir\n(V{tmp_path / 'owned'}\ntR.".encode())
    refuses(capsys, lambda: common.load_data("cifar10", tmp_path / "data").train_x, folder)
    assert not (tmp_path / "owned").exists()
    pickle.loads(bad)
    assert (tmp_path / "owned").exists()


@pytest.fixture
def tiny(tmp_path):
    """A tiny-imagenet-200 of three classes, and what it holds."""
    from PIL import Image
    folder, wnids, made = tmp_path / "data" / "tiny-imagenet-200", ["n02000000", "n03000000", "n01000000"], {}

    def write(path, i):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, i, 64)[0]).convert("L" if i % 4 == 2 else "RGB").save(path)
        with Image.open(path) as image:
            assert image.mode == ("L" if i % 4 == 2 else "RGB")
            return np.asarray(image.convert("RGB"))
    files = [folder / "train" / w / "images" / f"{w}_{k}.JPEG" for w in sorted(wnids) for k in range(3)]
    made["train"] = [write(file, i) for i, file in enumerate(files)], [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for w in wnids:
        (folder / "train" / w / f"{w}_boxes.txt").write_text(f"{w}_0.JPEG\t0\t0\t62\t62\n")
    rows = [(f"val_{k}.JPEG", wnids[k % 3]) for k in (1, 0, 3, 2, 5)]
    made["test"] = [write(folder / "val/images" / file, 20 + i) for i, (file, _) in enumerate(rows)], [2, 1, 1, 0, 0]
    (folder / "val" / "val_annotations.txt").write_text("".join(f"{f}\t{w}\t0\t32\t44\t62\n" for f, w in rows))
    write(folder / "test" / "images" / "test_0.JPEG", 30)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    return folder, made


def test_official_tiny_imagenet(tmp_path, monkeypatch, capsys, tiny):
    (folder, made), load = tiny, lambda: common.load_data("tiny_imagenet", tmp_path / "data")
    holds(data := load(), **made)
    assert data.classes == ["n01000000", "n02000000", "n03000000"] and (data.image_size, data.std) == (64, (0.5,) * 3)
    pack(folder, "tiny_imagenet", monkeypatch)
    shutil.rmtree(tmp_path / "data" / "cache")
    holds(load(), **made)
    shutil.rmtree(folder / "train")
    holds(data := load(), test=made["test"])
    refuses(capsys, lambda: data.train_x, folder)
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n01", "x").replace("n02", "n01").replace("x", "n02"))
    holds(load(), test=(made["test"][0], [2, 0, 0, 1, 1]))


@pytest.mark.skipif(not TINY, reason="TINY_DIR (folder with tiny-imagenet-200 or a part of it) is not set")
def test_real_tiny_imagenet(tmp_path):
    from PIL import Image
    (tmp_path / "tiny-imagenet-200").symlink_to(folder := Path(TINY).resolve() / "tiny-imagenet-200")
    data, wnids = common.load_data("tiny_imagenet", tmp_path), (folder / "wnids.txt").read_text().split()
    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    assert data.classes == sorted(wnids) != wnids and data.image_size == 64
    assert [data.classes[c] for c in data.test_y] == [row[1] for row in rows]
    counts = [len(list((folder / "train" / w / "images").iterdir())) for w in data.classes]
    assert torch.bincount(data.train_y).tolist() == counts
    images = [Image.open(folder / "val" / "images" / row[0]).convert("RGB") for row in rows[::7]]
    assert torch.equal(data.test_x[::7], planes(images))


@pytest.mark.parametrize("side, size", [(20, 32), (63, 32), (64, 64)])
def test_image_tree(tmp_path, capsys, side, size):
    from PIL import Image
    own, load = tmp_path / "own", lambda: common.load_data(str(tmp_path / "own"), tmp_path)
    kinds, made = [(side, 90, "RGB"), (101, 70, "L"), (80, 80, "RGBA"), (70, 65, "P"), (64, 64, "RGB")], []
    for i, (w, h, mode) in enumerate(kinds * 2):
        split, name = ("train", "val")[i // 5], "dog bee ant bee dog".split()[i % 5]
        path = own / split / name / f"{i}.{'png' if i % 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, i, 101)[0][:h, :w]).convert(mode).save(path)
        image, n, left, top = Image.open(path), min(w, h), max(w - h, 0) // 2, max(h - w, 0) // 2
        assert image.mode == mode
        image = image.convert("RGB").crop((left, top, left + n, top + n))
        made.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
    order, y = np.array([2, 1, 3, 0, 4]), [0, 1, 1, 2, 2]
    holds(load(), train=(np.array(made)[order], y), test=(np.array(made)[order + 5], y))
    assert load().classes == ["ant", "bee", "dog"] and load().image_size == size
    (own / "val" / "bee" / "6.png").write_bytes(b"\x89PNG")
    refuses(capsys, load, "6.png")
    shutil.rmtree(own / "val" / "bee")
    refuses(capsys, load, "bee")
    shutil.rmtree(own / "val")
    refuses(capsys, load, "test")


def test_first_hit_wins(tmp_path, monkeypatch, capsys, cifar):
    root, names = tmp_path / "data", "airplane automobile bird cat deer dog frog horse ship truck".split()
    tree, npz = tree_set(root / "cifar10", names), npz_set(root / "cifar10", (20, 10), 10)
    folder, made = cifar("cifar10")
    holds(common.load_data("cifar10", root), **npz)
    for split in npz:
        (root / "cifar10" / f"{split}.npz").unlink()
    holds(common.load_data("cifar10", root), **made)
    archive = pack(folder, "cifar10", monkeypatch)
    holds(common.load_data("cifar10", root), **made)
    archive.unlink()
    shutil.rmtree(folder)
    holds(data := common.load_data("cifar10", root), **tree)
    assert (data.name, data.classes, data.norm, data.order) == ("cifar10", names, "cifar10", None)
    assert "note: " in capsys.readouterr().out


def test_cache(tmp_path, monkeypatch, capsys):
    def load(decode=True):
        with monkeypatch.context() as m:
            if not decode:
                m.setattr(common, "read_images", lambda *_, **__: pytest.fail("decoded again"))
            holds(data := common.load_data(str(own), tmp_path), **made)
        assert data.classes == ["a", "b"]
    own, cache = tmp_path / "own", tmp_path / "cache"
    made = tree_set(own)
    common.load_data(str(own), tmp_path)
    assert not list(cache.glob("*train*"))
    load()
    load(decode=False)
    files = sorted(cache.iterdir())
    assert [np.load(f).dtype for f in files if f.suffix == ".npy"] == [np.uint8] * 2
    for file in files:
        whole = file.read_bytes()
        for broken in (whole[:len(whole) // 2], whole[:20], b"", b"garbage " * 99):
            file.write_bytes(broken)
            load()
    load(decode=False)
    assert sorted(cache.iterdir()) == files
    made = tree_set(own, splits=("test", "train"))
    load()
    for split, (x, _) in made.items():
        (own / split / "b" / "02.png").rename(own / split / "a" / "02.png")
        made[split] = x, [0, 0, 0, 1]
    load()
    shutil.rmtree(cache)
    cache.write_text("a file")
    assert "note: " not in capsys.readouterr().out
    load()
    assert "note: " in capsys.readouterr().out and cache.read_text() == "a file"


def test_cache_of_train_follows_the_test_split(tmp_path):
    """Size and class names are the test split's: where they change, the other split is read again."""
    made = npz_set(tmp_path / "own")
    for more, size in (({}, 32), ({"classes": list("xyz")}, 32), ({}, 64)):
        x = made["test"][0].repeat(size // 32, 1).repeat(size // 32, 2)
        np.savez(tmp_path / "own" / "test.npz", x=x, y=made["test"][1], **more)
        data = common.load_data(str(tmp_path / "own"), str(tmp_path))
        assert data.train_x.shape[-1] == size and data.classes == more.get("classes", list("012"))


def test_cut_unpacking_leaves_nothing(tmp_path, monkeypatch):
    """A kill amid the unpacking of an archive: the next start begins anew, and never takes a part for the whole."""
    import torchvision.datasets.utils as utils
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"archive")
    monkeypatch.setattr(utils, "check_integrity", lambda *_: True)
    tree = {"tiny-imagenet-200/wnids.txt": "a\nb"}

    def unpack(_, folder, cut):
        for name, text in tree.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(text)
        if cut:
            raise KeyboardInterrupt

    for cut in (True, False):
        monkeypatch.setattr(utils, "extract_archive", lambda archive, folder: unpack(archive, folder, cut))
        if cut:
            with pytest.raises(KeyboardInterrupt):
                common.find_source("tiny_imagenet", tmp_path / "tiny_imagenet", tmp_path, "")
        else:
            common.find_source("tiny_imagenet", tmp_path / "tiny_imagenet", tmp_path, "")
        assert (tmp_path / "tiny-imagenet-200").exists() is not cut
        assert [p.name for p in tmp_path.iterdir() if p.name[:3] == "tmp"] == []


def test_unlabelled_test_folder_beside_val(tmp_path):
    """A reorganised Tiny-ImageNet keeps the official test/images, which has no labels."""
    made = tree_set(tmp_path / "set", splits=("train", "val"))
    (tmp_path / "set" / "test" / "images").mkdir(parents=True)
    data = common.load_data(str(tmp_path / "set"), str(tmp_path))
    holds(data, train=made["train"], test=made["val"])


def test_limits(tmp_path, capsys):
    made = npz_set(tmp_path / "own", (60, 31))
    load = lambda **kw: common.load_data(str(tmp_path / "own"), tmp_path, **kw)  # noqa: E731
    whole, part = load(limit_train=999), load(limit_train=14, limit_test=8)
    keep = lambda x, y, n: [v[[i for i in range(len(y)) if (y[:i] == y[i]).sum() < n]] for v in (x, y)]  # noqa: E731
    holds(whole, **made)
    holds(part, train=keep(*made["train"], 4), test=keep(*made["test"], 2))
    for rule in ("pgdi", "netgraft"):
        x, labels, index = part.few_shot(9, rule, 1)
        assert np.array_equal(index, whole.few_shot(9, rule, 1)[2]) and torch.equal(x, whole.train_x[index])
        assert labels.tolist() == whole.train_y[index].tolist() == [0] * 9 + [1] * 9 + [2] * 9
    refuses(capsys, lambda: load(limit_test=2), "--limit_test 2")
    refuses(capsys, lambda: load(limit_train=2).train_x, "--limit_train 2")
    refuses(capsys, lambda: whole.few_shot(21, "pgdi", 0), "--shots 21")
    refuses(capsys, lambda: whole.few_shot(0, "netgraft", 0), "--shots 0")


@pytest.mark.parametrize("rule", ["pgdi", "netgraft"])
def test_few_shot(rule):
    def draw(shots, seed, *order):
        return common.few_shot_indices(labels, shots, rule, seed, *order).reshape(4, -1)
    labels, states = np.random.RandomState(3).permutation(400) % 4, (random.getstate(), str(np.random.get_state()))
    ten = draw(10, 5)
    assert (labels[ten] == np.arange(4)[:, None]).all() and len(np.unique(ten)) == 40 and ten.dtype == np.int64
    assert np.array_equal(ten, draw(10, 5)) and not np.array_equal(ten, draw(10, 6))
    assert rule == "pgdi" or all(np.array_equal(ten[:, :k], draw(k, 5)) for k in (1, 4, 9))
    order = np.stack([np.random.RandomState(c).permutation(100) for c in range(4)]).astype(np.int16)
    members = [np.flatnonzero(labels == c).tolist() for c in range(4)]
    wanted = [[members[c][order[c][members[c].index(i)]] for i in ten[c]] for c in range(4)]
    assert draw(10, 5, order).tolist() == wanted
    assert states == (random.getstate(), str(np.random.get_state())) and len(draw(1, None)) == 4
    order, labels = np.tile(np.arange(4999, -1, -1, dtype=np.int16), (10, 1)), np.repeat(np.arange(10), 5000)
    plain, mapped = (common.few_shot_indices(labels, 7, rule, 6, o) for o in (None, order))
    assert np.array_equal(mapped, labels[plain] * 5000 + 4999 - plain % 5000) and mapped.max() > 45000


def test_order_of_a_sorted_cifar10(tmp_path, monkeypatch, capsys):
    def shots():
        data = fake_data()
        data.name, y = "cifar10", np.repeat(np.arange(10), 5000)
        data._full_train = (np.arange(50000) % 251).astype(np.uint8).reshape(-1, 1, 1, 1), y
        return data.few_shot(wanted.shape[1], "netgraft", 6), capsys.readouterr().out
    with np.load(ROOT / "tests" / "golden" / "common.npz") as golden:
        wanted = golden["fewshot/netgraft/cifar10/sorted_index"] + np.arange(10)[:, None] * 5000
    (x, y, index), out = shots()
    assert np.array_equal(index, wanted.ravel()) and x.flatten().tolist() == (index % 251).tolist()
    assert y.tolist() == (index // 5000).tolist() and "note" not in out
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    (_, _, index), out = shots()
    assert "note: " in out and "other pictures" in out and not np.array_equal(index, wanted.ravel())


@pytest.mark.parametrize("n, size", [(1, 32), (13, 32), (37, 32), (5, 64)])
def test_augment_is_crop_flip_and_normalize(n, size):
    data, index = fake_data(planes(pictures(11, 1, size)), "cifar10"), torch.arange(n) * 7 % 11
    generator, clone = torch.Generator().manual_seed(n), torch.Generator().manual_seed(n)
    for _ in range(2):
        ours, (dy, dx) = data.augment(index, generator), torch.randint(0, 9, (2, n), generator=clone)
        flip = torch.rand(n, generator=clone) < 0.5
        assert torch.equal(ours, data.normalize(common.crop_flip(data.train_x[index], dy, dx, flip)))
    assert ours.shape == (n, 3, size, size) and torch.equal(generator.get_state(), clone.get_state())


@pytest.mark.parametrize("n, h, w, padding", [(1, 8, 8, 4), (7, 9, 6, 2), (13, 5, 5, 1)])
def test_crop_flip_gradient(n, h, w, padding):
    torch.manual_seed(0)
    (dy, dx), flip, weight = torch.randint(0, 2 * padding + 1, (2, n)), torch.rand(n) < 0.5, torch.randn(n, 3, h, w)
    ours = torch.rand(n, 3, h, w, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    crops = [p[:, a:a + h, b:b + w] for p, a, b in zip(torch.nn.functional.pad(plain, (padding,) * 4), dy, dx)]
    loop = torch.stack([c.flip(-1) if f else c for c, f in zip(crops, flip)])
    out = common.crop_flip(ours, dy, dx, flip, padding)
    (out * weight).sum().backward()
    (loop * weight).sum().backward()
    assert torch.equal(out, loop) and torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("norm", [*common.NORMS, "0.1, 0.2, 0.3, 0.4, 0.5, 0.6"])
def test_normalize(norm):
    data = fake_data(planes(pictures(4)), norm)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (data.mean, data.std))
    x, floats = data.train_x, (data.train_x.float() / 255).requires_grad_()
    out, from_floats = data.normalize(x), data.normalize(floats)
    assert (out.double() - torch.from_numpy((x.numpy() / 255 - mean) / std)).abs().max() < 1e-6
    assert (out - from_floats).abs().max() < 1e-6 and from_floats.requires_grad and out.dtype == from_floats.dtype
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (out, from_floats, data.normalize(x[:1])))
    assert (data.denormalize(out) - floats).abs().max() < 1e-6 and data.denormalize(out * 99).max() == 1


def test_batches():
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    for n, size in ((10, 3), (9, 3), (1, 4), (13, 1), (5, 100), (0, 4)):
        for g in (None, seeded()):
            parts, kept = common.batches(n, size, g), common.batches(n, size, g, drop_last=True)
            assert sorted(i for p in parts for i in p.tolist()) == list(range(n)) and len(parts) == -(-n // size)
            assert len(kept) == n // size and all(len(p) == size for p in [*kept, *parts[:-1]])
    assert torch.equal(torch.cat(common.batches(10, 3)), torch.arange(10))
    g = seeded()
    first, second, again = (torch.cat(common.batches(50, 7, k)) for k in (g, g, seeded()))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_data_command_prints_the_normalisation(capsys):
    common.data_command(common.DataArgs("shapes"))
    data, text = common.load_data("shapes"), capsys.readouterr().out
    six = [float(v) for v in text.split("--norm ")[1].split(",")]
    x = data.train_x.numpy() / 255
    assert np.allclose(six, [*x.mean((0, 2, 3)), *x.std((0, 2, 3))], atol=1e-4)
    assert np.allclose(np.concatenate(common.NORMS["shapes"]), six, atol=1e-3) and data.norm == "shapes"


def test_image_grid(tmp_path):
    from PIL import Image
    x = pictures(6, size=8)
    for images in (planes(x), planes(x).float() / 255):
        common.image_grid(images, 2, tmp_path / "new" / "grid.png")
        grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
        assert grid.shape == (22, 32, 3) and np.array_equal(grid[12:20, 22:30], x[5]) and not grid[:2].any()


@pytest.fixture
def server(tmp_path, monkeypatch, capsys, cifar):
    """Offers a good archive and bad ones -> address, [(path, was it printed by then)], what the good one holds."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    def get(self):
        asked.append((self.path, self.path in sys.stdout.getvalue()))
        status, header, body = answers.get(self.path, (404, ("Content-Length", "0"), b""))
        if status:
            self.send_response(status)
            self.send_header(*header)
            self.end_headers()
        self.wfile.write(body)
    folder, made = cifar("cifar10")
    archive = pack(folder, "cifar10", monkeypatch)
    body, asked = archive.read_bytes(), []
    archive.unlink()
    length, names = ("Content-Length", str(len(body))), ("cut", "wrong", "none", "chunk", "odd", "good")
    answers = {"/cut": (200, length, body[:-99]), "/wrong": (200, length, body[::-1]), "/good": (200, length, body),
               "/chunk": (200, ("Transfer-Encoding", "chunked"), b"1000\r\n" + body[:99]), "/odd": (0, 0, b"oh no\r\n"),
               f"/own/{archive.name}": (200, length, body)}
    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": get, "do_HEAD": get, "log_message": lambda *_: 0})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    url, entry = f"http://127.0.0.1:{http.server_address[1]}", common.ARCHIVES["cifar10"][:3]
    monkeypatch.setitem(common.ARCHIVES, "cifar10", (*entry, tuple(f"{url}/{n}" for n in names)))
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    yield url, asked, made
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("own, tried", [("", "/cut /wrong /none /chunk /odd /good"), ("/good", "/good"),
                                        ("/own/", "/own/cifar-10-python.tar.gz")])
def test_download(tmp_path, server, own, tried):
    (url, asked, made), root = server, tmp_path / "data"
    holds(common.load_data("cifar10", root, data_url=own and url + own), **made)
    assert list(dict.fromkeys(asked)) == [(path, True) for path in tried.split()]
    assert sorted(p.name for p in root.iterdir()) == ["cache", "cifar-10-batches-py", "cifar-10-python.tar.gz"]
    asked.clear()
    holds(common.load_data("cifar10", root), **made)
    assert not asked


@pytest.mark.parametrize("own", ["", "nonsense", "http://127.0.0.1:none/x", "file:///no/such/file"])
def test_no_source_answers(tmp_path, monkeypatch, capsys, server, own):
    *entry, sources = common.ARCHIVES["cifar10"]
    monkeypatch.setitem(common.ARCHIVES, "cifar10", (*entry, sources[:3]))
    root = tmp_path / "data"
    refuses(capsys, lambda: common.load_data("cifar10", root, data_url=own), *sources[:3], own, f"into {root} by hand")
    assert not list(root.iterdir())
    archive = root / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half of it")
    refuses(capsys, lambda: common.load_data("cifar10", root, data_url=server[0] + "/good"), archive, "md5")
    assert archive.read_bytes() == b"half of it" and list(root.iterdir()) == [archive]


@pytest.mark.parametrize("kind", ["python 2", "numpy.core.", "numpy._core.", 2, 3, 4, 5])
def test_safe_unpickle(tmp_path, capsys, kind):
    from collections import OrderedDict

    def dump(value):
        if isinstance(kind, int):
            return pickle.dumps(value, kind)
        if kind == "python 2":
            return python2_pickle(value)
        return pickle.dumps(value, 2).replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", kind.encode())
    arrays = {"image_data": pictures(3), "f": np.asfortranarray(np.eye(2, 3)), "i": np.arange(3, dtype=np.int16)}
    plain = {"labels": [1, 2.5, None, True], "m\xfcde": ("a", [()], {}), "class_dict": OrderedDict(n01=[0, 1], n02=[2]),
             "scalar": np.float32(0.25), "big": 2 ** 70}
    path = tmp_path / "file.pkl"
    path.write_bytes(whole := dump({**arrays, **plain}))
    read = common.safe_unpickle(path)
    assert all(read[k].dtype == a.dtype and np.array_equal(read.pop(k), a) for k, a in arrays.items())
    assert read == plain and [type(v) for v in read.values()] == [type(v) for v in plain.values()]
    for cut in [*range(0, 120, 3), *range(len(whole) - 120, len(whole), 3)]:
        path.write_bytes(whole[:cut])
        refuses(capsys, lambda: common.safe_unpickle(path), path)


EVAL = "eval\n(V__import__('os').mkdir('{}')\ntR."


@pytest.mark.parametrize("code", [
    "posix\nsystem\n(Vmkdir {}\ntR.", "os\nsystem\n(Vmkdir {}\ntR.", "os\nmkdir\n(V{}\ntR.", f"builtins\n{EVAL}",
    f"__builtin__\n{EVAL}", "builtins\ngetattr\n.", "numpy\nload\n.", "numpy.testing._private.utils\nrunstring\n.",
    "_codecs\nencode\n(Vx\nVno_such\ntR."])
def test_safe_unpickle_refuses_code(tmp_path, capsys, code):
    (tmp_path / "file.pkl").write_bytes(b"c" + code.format(tmp_path / "owned").encode())
    refuses(capsys, lambda: common.safe_unpickle(tmp_path / "file.pkl"), tmp_path / "file.pkl")
    assert not (tmp_path / "owned").exists()


def test_shapes(tmp_path):
    start = time.process_time()
    data = common.load_data("shapes", tmp_path / "none")
    assert data.train_x.shape == (5000, 3, 32, 32) and time.process_time() - start <= 3
    again = common.load_data("shapes", tmp_path / "none")
    assert all(torch.equal(getattr(data, k), getattr(again, k)) for k in ("train_x", "train_y", "test_x", "test_y"))
    assert data.test_x.shape == (1000, 3, 32, 32) and data.train_x.dtype == data.test_x.dtype == torch.uint8
    assert torch.bincount(data.train_y).tolist() == [500] * 10 and torch.bincount(data.test_y).tolist() == [100] * 10
    assert len({x.numpy().tobytes() for x in (*data.train_x, *data.test_x)}) == 6000 and len(set(data.classes)) == 10
    features = [torch.cat([x.float().mean((2, 3)), x.float().std((2, 3))], 1) for x in (data.train_x, data.test_x)]
    train, test = ((f - features[0].mean(0)) / features[0].std(0) for f in features)
    net = torch.nn.Linear(6, 10)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(train), data.train_y).backward()
        optimizer.step()
    assert (net(test).argmax(1) == data.test_y).double().mean() < 0.25


@needs_data
def test_real_cifar10():
    data = common.load_data("cifar10", REAL)
    assert data.train_x.shape == (50000, 3, 32, 32) and data.test_x.shape == (10000, 3, 32, 32)
    assert data.classes[0] == "airplane" and torch.bincount(data.train_y).tolist() == [5000] * 10
    with np.load(ROOT / "tests" / "golden" / "common.npz") as golden:
        wanted = golden[f"fewshot/netgraft/cifar10/{'positions' if data.order is None else 'sorted_index'}"]
    x, _, index = data.few_shot(wanted.shape[1], "netgraft", 6)
    assert np.array_equal(index, np.concatenate([np.flatnonzero(data.train_y == c)[wanted[c]] for c in range(10)]))
    assert torch.equal(x, data.train_x[index])
