"""Tests of the data section of common.py: every source of images, shapes, augmentation, grids."""
import hashlib
import os
import pickle
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from test_common import CPU, command, fake_data, make_own, tinted
from tools import close


def load(name, data_dir, limit_train=0, norm="auto"):
    args = types.SimpleNamespace(
        dataset=str(name), data_dir=str(data_dir), norm=norm, limit_train=limit_train)
    return common.load_data(args, CPU)


def pictures(n, seed=0, size=32):
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, 3), np.uint8)


def holds(data, **splits):
    """data has exactly these images (N, S, S, 3) and labels."""
    for split, (x, y) in splits.items():
        ours_x, ours_y = getattr(data, f"{split}_x"), getattr(data, f"{split}_y")
        assert (ours_x.dtype, ours_y.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(ours_x.permute(0, 2, 3, 1), np.array(x))
        assert ours_y.tolist() == list(y)


def test_npz(tmp_path):
    made = {"train": (pictures(8), [0, 1, 2, 0] * 2), "test": (pictures(6, 1), [2, 1, 0] * 2)}
    for split, (x, y) in made.items():
        np.savez(tmp_path / f"{split}.npz", x=x, y=y, classes=["ant", "bee", "cat"])
    data = load(tmp_path, "none")
    holds(data, **made)
    assert (data.classes, data.image_size, data.norm) == (["ant", "bee", "cat"], 32, "half")
    for split, (x, y) in made.items():
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.array(y, np.uint8))
    assert load(tmp_path, "none").classes == ["0", "1", "2"]
    (tmp_path / "train.npz").unlink()
    holds(load(tmp_path, "none"), test=made["test"])  # data-free methods need no more


def test_npz_of_another_size(tmp_path):
    """The middle square, made smaller."""
    x = np.zeros((3, 63, 95, 3), np.uint8)
    x[:, :, 16:79] = 200
    x[:, 30:33, 46:49, 0] = 90  # a spot in the centre
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=x, y=[0, 2, 1])
    data = load(tmp_path, "none")
    assert data.image_size == 32 and data.test_y.tolist() == [0, 2, 1]
    assert (data.test_x[:, 1:, :, 2:-2] == 200).all()
    assert data.test_x[0, 0, 15:17, 15:17].max() < 170


def test_limit_train_takes_as_many_of_each_class(tmp_path):
    x, y = pictures(30), np.random.RandomState(0).permutation(30) % 3
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=x, y=y)
    data = load(tmp_path, "none", limit_train=13)
    kept = [i for i in range(30) if (y[:i] == y[i]).sum() < 4]
    holds(data, train=(x[kept], y[kept]), test=(x, y))


def save_picture(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_pictures_of_every_mode(tmp_path):
    """RGBA, grey, CMYK, a palette, 16 bits, a photo that lies on its side, odd sizes."""
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    half = np.zeros((40, 40, 3), np.uint8)
    half[:20] = (0, 0, 220)  # blue above black
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: what is stored must be turned by a quarter to the right
    turned = Image.fromarray(half).transpose(Image.Transpose.ROTATE_90)
    deep = np.full((40, 40), 128 * 256 + 7, np.uint16)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (10, 250, 10)  # the middle, which is kept
    for split in ("train", "test"):
        folder = tmp_path / split
        save_picture(folder / "a" / "0.png", red.convert("RGBA"))
        save_picture(folder / "a" / "1.jpg", red.convert("CMYK"))
        save_picture(folder / "a" / "2.png", red.convert("P"))
        save_picture(folder / "b" / "0.png", Image.new("L", (50, 40), 77))
        save_picture(folder / "b" / "1.png", Image.fromarray(deep))
        save_picture(folder / "c" / "0.JPG", turned, exif=exif, quality=95)
        save_picture(folder / "c" / "deeper" / "1.png", Image.fromarray(wide))
        (folder / "c" / "Thumbs.db").write_text("no picture")
    data = load(tmp_path, "none")
    assert data.classes == ["a", "b", "c"] and data.test_y.tolist() == [0, 0, 0, 1, 1, 2, 2]
    x = data.test_x.float()
    for i in (0, 1, 2):
        assert (x[i].mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 6, i
    assert (x[3] == 77).all() and ((x[4] - 128).abs() <= 1).all()
    assert x[5, 2, :14].mean() > 200 and x[5, 2, 18:].mean() < 20  # blue is above again
    assert x[6, 1, :, 2:-2].min() > 240
    assert torch.equal(data.train_x, data.test_x)


def test_image_tree_follows_no_link_and_knows_val(tmp_path):
    made = {}
    for split, seed in (("train", 0), ("val", 1)):
        x = pictures(4, seed, 64)
        for i, image in enumerate(x):
            save_picture(tmp_path / split / "ab"[i // 2] / f"{i}.png", Image.fromarray(image))
        made[split] = (x, [0, 0, 1, 1])
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path)
    data = load(tmp_path, "none")
    assert data.image_size == 64
    holds(data, train=made["train"], test=made["val"])


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar("cifar10"): a small official folder, whose md5s torchvision then expects."""
    def make(name):
        import torchvision
        base = getattr(torchvision.datasets, common.CIFAR[name])
        classes, label = (10, "labels") if name == "cifar10" else (100, "fine_labels")
        folder = tmp_path / "data" / base.base_folder
        folder.mkdir(parents=True)
        made = {}
        for split in ("train", "test"):
            files = [file for file, _ in getattr(base, f"{split}_list")]
            n = classes // len(files)
            x, y = pictures(classes, len(files)), np.random.RandomState(1).permutation(classes)
            for i, file in enumerate(files):
                part = slice(i * n, (i + 1) * n)
                rows = x[part].transpose(0, 3, 1, 2).reshape(n, 3072)
                batch = {"data": rows, label: y[part].tolist()}
                (folder / file).write_bytes(pickle.dumps(batch, 2))
            expected = [[file, md5(folder / file)] for file in files]
            monkeypatch.setattr(base, f"{split}_list", expected)
            made[split] = x, y.tolist()
        names = {base.meta["key"]: [f"name {c}" for c in range(classes)]}
        file = folder / base.meta["filename"]
        file.write_bytes(pickle.dumps(names, 2))
        monkeypatch.setattr(base, "meta", {**base.meta, "md5": md5(file)})
        return folder, base, made

    def no_network(url, *args, **kwargs):
        raise OSError(f"no network for {url}")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    return make


@pytest.mark.parametrize("name", ("cifar10", "cifar100"))
def test_cifar_as_folder_archive_npz_and_tree(tmp_path, monkeypatch, cifar, capsys, name):
    folder, base, made = cifar(name)
    root = tmp_path / "data"
    data = load(name, root)
    holds(data, **made)
    assert (data.norm, data.classes[3]) == (name, "name 3")

    archive = shutil.make_archive(root / "packed", "gztar", root, folder.name)
    os.rename(archive, root / base.filename)
    monkeypatch.setattr(base, "tgz_md5", md5(root / base.filename))
    shutil.rmtree(folder)
    holds(load(name, root), **made)

    shutil.rmtree(folder)
    (root / base.filename).unlink()
    with pytest.raises(SystemExit) as stop:
        load(name, root)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and base.filename in line
    assert all(url in line for url in common.MIRRORS[name])

    (root / name).mkdir()
    for split, (x, y) in made.items():
        np.savez(root / name / f"{split}.npz", x=x, y=y)
    data = load(name, root)
    holds(data, **made)
    assert data.norm == name
    shutil.rmtree(root / name)
    for split, (x, y) in made.items():
        for image, label in zip(x, y):
            path = root / name / split / f"name {label:02}" / "0.png"
            save_picture(path, Image.fromarray(image))
    data = load(name, root)
    order = np.argsort(made["test"][1])
    holds(data, test=(made["test"][0][order], range(len(order))))


def test_tampered_cifar_runs_no_code(tmp_path, cifar, capsys):
    folder, _, _ = cifar("cifar10")
    evil = f"cos\nmkdir\n(V{tmp_path / 'owned'}\ntR.".encode()
    (folder / "test_batch").write_bytes(evil)
    with pytest.raises(SystemExit) as stop:
        load("cifar10", tmp_path / "data")
    assert stop.value.code == 2 and not (tmp_path / "owned").exists()
    pickle.loads(evil)
    assert (tmp_path / "owned").exists()  # the trap would have worked


def test_tiny_imagenet(tmp_path, monkeypatch):
    """The official tree, decoded once; its classes are sorted, which its list of them is not."""
    root = tmp_path / "data"
    folder = root / "tiny-imagenet-200"
    wnids = ["n02", "n03", "n01"]
    made = {"train": ([], []), "test": ([], [])}

    def write(path, seed, split, label):
        image = Image.fromarray(pictures(1, seed, 64)[0])
        save_picture(path, image.convert("L") if seed % 4 == 2 else image, format="JPEG")
        made[split][0].append(np.asarray(Image.open(path).convert("RGB")))
        made[split][1].append(label)

    for i, wnid in enumerate(sorted(wnids)):
        for k in (0, 1):
            write(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 2 * i + k, "train", i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t62\t62\n")
    notes = []
    for k, wnid in ((1, "n03"), (0, "n02"), (4, "n01"), (2, "n01")):
        file = folder / "val" / "images" / f"val_{k}.JPEG"
        write(file, 20 + k, "test", sorted(wnids).index(wnid))
        notes.append(f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(notes))
    (folder / "wnids.txt").write_text("\n".join(wnids))

    holds(load("tiny_imagenet", root), test=made["test"])  # a data-free method comes first
    data = load("tiny_imagenet", root)  # then one that needs more
    holds(data, **made)
    assert (data.classes, data.image_size) == (["n01", "n02", "n03"], 64)
    monkeypatch.setattr(common, "decode", lambda *_: pytest.fail("decoded again"))
    holds(load("tiny_imagenet", root), **made)


def test_shapes():
    """The same twice, as many of each class, all different; their colours do not tell them."""
    data, again = load("shapes", "none"), load("shapes", "none")
    assert torch.equal(data.test_x, again.test_x) and torch.equal(data.test_y, again.test_y)
    assert torch.bincount(data.train_y).tolist() == [500] * 10
    assert torch.bincount(data.test_y).tolist() == [100] * 10
    images = [x.numpy().tobytes() for x in (*data.train_x, *data.test_x)]
    assert len(set(images)) == 6000

    def colours(x):
        x = x.float() / 255
        columns = [x.mean((2, 3)), x.std((2, 3)), x.amax((2, 3)), x.amin((2, 3))]
        return torch.cat([*columns, torch.ones(len(x), 1)], 1)

    targets = F.one_hot(data.train_y).float()
    weights = torch.linalg.lstsq(colours(data.train_x), targets).solution
    guesses = (colours(data.test_x) @ weights).argmax(1)
    assert (guesses == data.test_y).double().mean() < 0.25

    x = data.train_x.float() / 255
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    close(common.NORMS["shapes"], [*mean.tolist(), *std.tolist()], 0.05)


@pytest.mark.parametrize("n, size", ((1, 32), (13, 32), (5, 64)))
def test_augment(n, size):
    """The same for bytes and floats; the gradient of a pixel says whether it is still seen."""
    x = torch.from_numpy(pictures(n, 1, size)).permute(0, 3, 1, 2)
    data = fake_data(x, "cifar10")
    out = data.augment(x, torch.Generator().manual_seed(n))
    assert out.is_contiguous(memory_format=torch.channels_last)
    floats = (x.float() / 255).requires_grad_()
    made = data.augment(floats, torch.Generator().manual_seed(n))
    close(made, out.numpy(), 1e-6)
    made.sum().backward()
    seen = floats.grad * data.std
    assert ((seen.abs() < 1e-4) | ((seen - 1).abs() < 1e-4)).all() and seen.mean() > 0.7


def test_augment_draws_every_shift_and_flip():
    x = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 16, 10] = 255
    out = fake_data(x).augment(x, torch.Generator().manual_seed(0))[:, 0] > 0
    rows, columns = out.nonzero()[:, 1], out.nonzero()[:, 2]
    assert sorted(set(rows.tolist())) == list(range(12, 21))
    assert sorted(set(columns.tolist())) == [*range(6, 15), *range(17, 26)]
    assert abs((columns < 16).double().mean() - 0.5) < 0.03


def test_save_grid(tmp_path):
    x = torch.from_numpy(pictures(6)).permute(0, 3, 1, 2)
    for images in (x, x.float() / 255):
        common.save_grid(tmp_path / "new" / "plain.png", images, rows=2)
        sheet = np.asarray(Image.open(tmp_path / "new" / "plain.png"))
        assert sheet.shape == (134, 200, 3)
        enlarged = pictures(6)[4].repeat(2, 0).repeat(2, 1)
        assert np.array_equal(sheet[68:132, 68:132], enlarged)  # second row, second picture
    common.save_grid(tmp_path / "words.png", x, rows=2, labels=["ant", "", "cat", "d", "e", "f"])
    sheet = np.asarray(Image.open(tmp_path / "words.png")).astype(int)
    below = sheet[66:78]
    assert (below[:, 2:66] < 128).any() and not (below[:, 68:132] < 255).any()


def test_data_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_own(tmp_path)
    assert command("data", "own", "--grid", "new.png") == 0
    out = capsys.readouterr().out
    six = [float(v) for v in out.split("--norm ")[1].split(",")]
    x = tinted(80)[0] / 255
    close(six, [*x.mean((0, 1, 2)), *x.std((0, 1, 2))], 1e-3)
    assert "80 train and 41 test images" in out and Image.open("new.png").size == (662, 314)
    before = Path("new.png").read_bytes()
    assert command("data", "own", "--grid", "new.png") == 2
    assert Path("new.png").read_bytes() == before
