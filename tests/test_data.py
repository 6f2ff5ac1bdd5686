"scdd.data: layouts, the cache, and every bad input that it names."
import os, sys
import urllib.error
import numpy as np
import pytest
import torch
from PIL import Image
from scdd import data as d
from scdd.files import UserError
from scdd.recipes import Data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCDD_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("SCDD_DATA", raising=False)


def image(seed, size=(8, 8), mode="RGB"):
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def tree(path, classes=("ant", "bee", "cat"), train=4, test=2, **how):
    for split, count in (("train", train), ("test", test)):
        for c, name in enumerate(classes):
            (path/split/name).mkdir(parents=True, exist_ok=True)
            for i in range(count): image(100 * c + i + (50 if split == "test" else 0), **how).save(path/split/name/f"{i}.png")
    return path


def tiny(path, classes=("n02", "n01"), grey=True):
    for c, name in enumerate(classes):
        (path/"train"/name/"images").mkdir(parents=True)
        (path/"train"/name/f"{name}_boxes.txt").write_text("boxes")
        for i in range(3): image(10 * c + i, mode="L" if grey and i == 0 else "RGB").save(path/"train"/name/"images"/f"{name}_{i}.JPEG")
    (path/"val"/"images").mkdir(parents=True)
    rows = [f"val_{i}.JPEG\t{classes[i % len(classes)]}\t0\t0\t8\t8\n" for i in range(4)]
    for i in range(4): image(50 + i).save(path/"val"/"images"/f"val_{i}.JPEG")
    (path/"val"/"val_annotations.txt").write_text("".join(rows))
    (path/"wnids.txt").write_text("\n".join(classes))
    return path


def refused(*parts):
    "The error is one line and says all of this."
    class Refused:
        def __enter__(self): return self
        def __exit__(self, kind, error, trace):
            assert kind is UserError, f"{kind} {error}"
            assert "\n" not in str(error)
            for part in parts: assert part in str(error), str(error)
            return True
    return Refused()


# ---- what it gives

def test_digits_are_stratified_and_fixed():
    train, test = d.load("digits"), d.load("digits", "test")
    assert train.images.shape == (1297, 1, 16, 16) and test.images.shape == (500, 1, 16, 16)
    assert np.bincount(test.labels).min() >= 48 and test.mean == train.mean
    assert train.classes == tuple("0123456789")
    assert d.load(Data("digits", classes=3, size=8)).images.shape[1:] == (1, 8, 8)
    np.testing.assert_allclose(train.mean[0], (train.images / 255).mean())
    np.testing.assert_allclose(train.std[0], (train.images / 255).std())


def test_tree_is_read_as_torchvision_reads_it(tmp_path):
    from torchvision.datasets import ImageFolder
    path = tree(tmp_path/"zoo", ("10", "2", "1"))
    (path/"train"/".hidden").mkdir(); (path/"train"/"notes.txt").write_text("x")
    mine, theirs = d.load(path), ImageFolder(path/"train", is_valid_file=lambda f: f.endswith("png") and "hidden" not in f, allow_empty=True)
    assert mine.classes == ("1", "10", "2")
    assert (mine.images == np.stack([np.asarray(im).transpose(2, 0, 1) for im, _ in theirs])).all()
    plain = mine.images / 255
    np.testing.assert_allclose(mine.mean, plain.mean((0, 2, 3)))
    np.testing.assert_allclose(mine.std, plain.std((0, 2, 3)))
    test = d.load(path, "test")
    assert test.mean == mine.mean and test.split == "test" and len(test) == 6 and test.labels.dtype == np.int64


def test_names_roots_and_environment(tmp_path, monkeypatch):
    tree(tmp_path/"sets"/"cifar100")
    assert d.available("cifar100", tmp_path/"sets") and d.available("cifar100", tmp_path/"sets"/"cifar100")
    assert not d.available("cifar10", tmp_path/"sets"/"cifar100") and not d.available("cifar10", tmp_path/"sets")
    assert not d.available("cifar100") and not d.available("cifar100", tmp_path/"no") and d.available("digits")
    monkeypatch.setenv("SCDD_DATA", str(tmp_path/"sets"))
    assert len(d.load("cifar100")) == 12
    assert d.data_root() == tmp_path/"sets" and d.data_root(tmp_path) == tmp_path
    assert d.load("cifar100").name == "cifar100"


def test_val_serves_as_test(tmp_path):
    path = tree(tmp_path/"sets"/"imagenet1k", size=(300, 260))
    (path/"test").rename(path/"val"); (path/"test").mkdir()
    image(1).save(path/"test"/"unlabelled.png")
    found = d.load("imagenet1k", "test", tmp_path/"sets")
    assert found.images.shape == (6, 3, 224, 224)


def test_tiny_imagenet_is_sorted_and_all_colour(tmp_path):
    path = tiny(tmp_path/"tiny-imagenet-2")
    train, test = d.load("tiny-imagenet", root=tmp_path), d.load("tiny-imagenet", "test", tmp_path)
    assert train.classes == ("n01", "n02") and train.images.shape == (6, 3, 8, 8)
    assert test.labels.tolist() == [0, 0, 1, 1] and test.mean == train.mean
    assert d.load(path, "test", classes=["n02"]).labels.tolist() == [0, 0]


def test_classes_and_subsets(tmp_path):
    path = tree(tmp_path/"zoo")
    whole = d.load(path)
    for wanted in (2, ["bee", "ant"], [0, 1]):
        some = d.load(path, classes=wanted)
        assert some.classes == ("ant", "bee") and (some.images == whole.only(wanted).images).all()
        assert (some.labels == whole.only(wanted).labels).all()
    assert whole.only(["cat"]).labels.tolist() == [0] * 4 and whole.only(["cat"]).mean == whole.mean
    assert np.shares_memory(whole.subset(range(3, 7)).images, whole.images)
    assert whole.subset([5, 1]).labels.tolist() == [1, 0]
    assert whole.subset([1]).fingerprint != whole.subset([2]).fingerprint


def test_resized_to_a_square(tmp_path):
    path = tree(tmp_path/"zoo")
    image(3, (20, 9)).save(path/"train"/"ant"/"wide.png")
    assert d.load(path, size=6).images.shape == (13, 3, 6, 6)
    wide = Image.fromarray(np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None], 10, 0))
    assert (np.asarray(d.fit(wide, 10)) == np.asarray(wide)[:, 5:15]).all()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3; path, turned = tmp_path/"photo.png", Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side: turn a quarter to the right to see it upright
    Image.fromarray(np.rot90(upright).copy()).save(path, exif=turned)
    np.testing.assert_array_equal(d.decode(path, None)[0], upright)

def test_many_files_are_decoded_in_order(tmp_path):
    path = tree(tmp_path/"zoo", train=350, test=1)
    found = d.load(path)
    for i in (0, 351, 1049): assert (found.images[i] == d.decode(d.list_tree(path).files()[i // 350][i % 350])).all()


def test_random_subset():
    data = d.load("digits")
    small, large = d.random_subset(data, 2, 1), d.random_subset(data, 5, 1)
    assert np.bincount(large.labels).tolist() == [5] * 10
    assert (large.images.reshape(10, 5, -1)[:, :2] == small.images.reshape(10, 2, -1)).all()
    assert (small.images != d.random_subset(data, 2, 2).images).any()
    assert len(np.unique(large.images.reshape(50, -1), axis=0)) == 50


def test_held_out_images_are_a_part_of_the_training_set(tmp_path):
    whole = d.load("digits"); rest, held = (d.load(Data("digits", held_out=0.2), split) for split in ("train", "test"))
    rows = lambda data: {image.tobytes() for image in data.images}
    assert len(rest) + len(held) == len(whole) and not rows(rest) & rows(held) and rows(rest) | rows(held) == rows(whole)
    assert (rest.split, held.split) == ("train", "test") and (held.mean, held.std) == (whole.mean, whole.std)
    counts = np.bincount(whole.labels); assert (np.bincount(held.labels) == [round(0.2 * count) for count in counts]).all()
    again = d.load("digits", "test", held_out=0.2)
    assert again.fingerprint == held.fingerprint and (again.images == held.images).all() and rest.fingerprint not in (held.fingerprint, whole.fingerprint)
    few = d.load(Data("digits", classes=3, held_out=0.2), "test")  # the same images of fewer classes
    assert rows(few) == rows(held.subset(np.flatnonzero(held.labels < 3)))
    tree(tmp_path/"animals"); (tmp_path/"animals"/"test").rename(tmp_path/"aside")  # and who has no test set at all can hold out one
    assert len(d.load(tmp_path/"animals", "test", held_out=0.5)) == 6 and len(d.load(tmp_path/"animals", held_out=0.5)) == 6
    with refused("--data.held_out 0.1: that is 0 of the 4 images of the class ant", "at least 1"): d.load(tmp_path/"animals", held_out=0.1)
    with refused("--data.held_out 0.95: that is 4 of the 4 images", "leaves at least 1"): d.load(tmp_path/"animals", held_out=0.95)

def test_on_the_device(tmp_path):
    found = d.load(tree(tmp_path/"zoo"))
    images, labels = d.to_device(found)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    images[0] = 0  # changes this process's copy, never the cache
    fresh = d.load(tmp_path/"zoo")
    assert fresh.images[0].any()
    assert d.to_float(images).dtype == torch.float32 and d.to_float(images).max() <= 1
    parts = d.batches(10, 4, torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == [4, 4, 2] and sorted(torch.cat(parts).tolist()) == list(range(10))
    assert len(d.batches(10, 4, drop_last=True)) == 2 and len(d.batches(3, 4, drop_last=True)) == 1
    with refused("--batch 0"): d.batches(10, 0)


def test_written_folders_sort_as_their_classes():
    names = [d.class_folder(i, f"c {i}", 12000) for i in (0, 2, 10, 11999)]
    assert names == sorted(names) and d.class_folder(3, "bear", 100) == "0003_bear"
    assert d.class_folder(0, "a/b\\c", 10) == "0000_a_b_c"


# ---- the cache

def cached(path): return sorted(p.name for p in path.glob("*.npy"))


def test_second_load_decodes_nothing(tmp_path, monkeypatch):
    path = tree(tmp_path/"zoo")
    first = d.load(path)
    monkeypatch.setattr(d, "decode", lambda *a, **k: pytest.fail("decoded again"))
    assert d.load(path).fingerprint == first.fingerprint and isinstance(d.load(path).images, np.memmap)
    monkeypatch.chdir(tmp_path)
    assert d.load("zoo").fingerprint == first.fingerprint and d.load(tmp_path/"."/"zoo").name == "zoo"


def test_changes_are_noticed(tmp_path):
    path = tree(tmp_path/"zoo"); file = path/"train"/"ant"/"0.png"
    before = d.load(path)
    image(77).save(file)  # overwritten in place
    after = d.load(path)
    assert after.fingerprint != before.fingerprint and (after.images[0] == d.decode(file)).all()
    image(78).save(path/"train"/"ant"/"9.png")
    assert len(d.load(path)) == 13
    (path/"train"/"bee"/"0.png").unlink()
    assert len(d.load(path)) == 12
    (path/"train"/"cat").rename(path/"train"/"cow"); (path/"test"/"cat").rename(path/"test"/"cow")
    assert d.load(path).classes[2] == "cow" and d.load(path, "test").mean == d.load(path).mean
    assert len(cached(tmp_path/"cache"/"images")) == 2  # one for each split; older states are gone


def test_large_sets_are_looked_at_by_folder(tmp_path, monkeypatch):
    path = tree(tmp_path/"zoo"); d.load(path)
    monkeypatch.setattr(d, "FULL_LOOK", 5)
    monkeypatch.setattr(d, "full_state", lambda *a: pytest.fail("looked at every file"))
    assert len(d.load(path)) == 12


@pytest.mark.parametrize("damage", ["cut pixels", "cut json", "no pixels", "other json", "older json"])
def test_damaged_cache_is_made_again(tmp_path, damage):
    path = tree(tmp_path/"zoo"); first = d.load(path)
    folder = tmp_path/"cache"/"images"; pixels, about = next(folder.glob("*.npy")), next(folder.glob("*.json"))
    if damage == "cut pixels": pixels.write_bytes(pixels.read_bytes()[:200])
    if damage == "no pixels": pixels.unlink()
    if damage == "cut json": about.write_text(about.read_text()[:50])
    if damage == "older json": about.write_text('{"pixels": "x.npy"}')
    if damage == "other json": about.write_text("[1, 2]")
    again = d.load(path)
    assert again.fingerprint == first.fingerprint and (again.images == d.decode_block(sum(d.list_tree(path).files(), []), None, False, None)).all()


def test_nothing_half_written(tmp_path):
    path = tree(tmp_path/"zoo"); (path/"train"/"cat"/"3.png").write_bytes(b"no image")
    with refused("3.png"): d.load(path)
    assert not list((tmp_path/"cache").rglob("*.npy")) and not list((tmp_path/"cache").rglob("*.part")) and not list((tmp_path/"cache").rglob("*.json"))


def test_full_disk(tmp_path, monkeypatch):
    path = tree(tmp_path/"zoo")
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with refused("disk is full"): d.load(path)
    assert not list((tmp_path/"cache").rglob("*.*"))


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path/"file").write_text("x")
    with refused("SCDD_CACHE", str(tmp_path/"file")): d.load(tree(tmp_path/"zoo"), cache=tmp_path/"file")


# ---- bad input

def test_unknown_names(tmp_path, monkeypatch):
    with refused("cifar1000", "cifar100"): d.load("cifar1000")
    tree(tmp_path/"sets"/"flowers"); monkeypatch.setenv("SCDD_DATA", str(tmp_path/"sets"))
    with refused("flower", "'flowers'"): d.load("flower")
    assert len(d.load("flowers")) == 12
    with refused("no such folder", "nowhere"): d.load(tmp_path/"nowhere")
    with refused("train and test"): d.load("digits", "val")


def test_missing_and_empty_roots(tmp_path, monkeypatch):
    with refused("--data", "no such folder"): d.load("cifar100", root=tmp_path/"no")
    (tmp_path/"empty").mkdir()
    with refused("--data", "is empty"): d.load("cifar100", root=tmp_path/"empty")
    monkeypatch.setenv("SCDD_DATA", str(tmp_path/"no"))
    with refused("SCDD_DATA", "no such folder"): d.load("cifar100")
    tree(tmp_path/"sets"/"zoo")
    for name in ("cifar10", "tiny-imagenet", "imagenet1k"):
        with refused(f"no {name}", "train/<class>"): d.load(name, root=tmp_path/"sets")


def test_folders_without_what_they_need(tmp_path):
    (tmp_path/"bare").mkdir()
    with refused("bare", "no class folders in train"): d.load(tmp_path/"bare")
    path = tree(tmp_path/"zoo"); (path/"train"/"dog").mkdir()
    with refused(str(path/"train"/"dog"), "no images"): d.load(path)
    image(1).save(path/"train"/"dog"/"0.png")
    assert len(d.load(path)) == 13
    with refused("dog", "which train has"): d.load(path, "test")
    assert len(d.load(path, "test", classes=["ant"])) == 2
    (path/"test").rename(path/"elsewhere")
    with refused("zoo", "test or val"): d.load(path, "test")


def test_a_class_that_only_test_has(tmp_path):
    path = tree(tmp_path/"zoo"); (path/"test"/"dog").mkdir(); image(1).save(path/"test"/"dog"/"0.png")
    with refused("train has no class dog", "remove it from test"): d.load(path, "test")
    with refused("train has no class dog"): d.load(path, "test", classes=["ant"])


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")
def test_names_that_are_no_utf8(tmp_path):
    path = tree(tmp_path/"zoo"); folder = os.fsencode(path/"train")+b"/caf\xe9"
    os.mkdir(folder)
    with refused("caf\\xe9", "no UTF-8; rename it"): d.load(path)
    os.rmdir(folder); os.rename(path/"train"/"ant"/"0.png", os.fsencode(path/"train"/"ant")+b"/caf\xe9.png")
    with refused("caf\\xe9.png", "no UTF-8; rename it"): d.load(path)


@pytest.mark.parametrize("name", ["star**", "some[x]", "why?"])
def test_folders_whose_names_are_patterns(tmp_path, name):
    path = tree(tmp_path/name); cache = tmp_path/"cache"
    assert len(d.load(path, cache=cache)) == 12
    image(9).save(path/"train"/"ant"/"new.png")
    assert len(d.load(path, cache=cache)) == 13 and len(list(cache.rglob("*-train-*.npy"))) == 1   # the old pixels are gone


def test_sixteen_bits_are_not_clipped_where_grey_becomes_colour(tmp_path):
    path = tiny(tmp_path/"tiny"); bad = path/"train"/"n01"/"images"/"n01_1.JPEG"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(bad, "png")
    with refused(str(bad), "I;16", "more than 8 bits"): d.load(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", "cut", "cut jpeg"])
def test_unreadable_images(tmp_path, content):
    path = tree(tmp_path/"zoo", size=(40, 40)); bad = path/"train"/"bee"/("2.jpg" if content == "cut jpeg" else "2.png")
    if isinstance(content, str):
        image(1, (40, 40)).save(bad); content = bad.read_bytes(); content = content[:len(content) // 2]
    bad.write_bytes(content)
    with refused(str(bad), "cannot be read as an image"): d.load(path)


def test_unreadable_image_in_a_worker(tmp_path):
    path = tree(tmp_path/"zoo", train=400, test=1); (path/"train"/"cat"/"7.png").write_bytes(b"x")
    with refused(str(path/"train"/"cat"/"7.png")): d.load(path)


def test_several_sizes_and_modes(tmp_path):
    path = tree(tmp_path/"zoo"); odd = path/"train"/"bee"/"odd.png"
    image(1, (9, 9)).save(odd)
    with refused(str(odd), "9×9", "8×8", "--data.size"): d.load(path)
    image(1, mode="L").save(odd)
    with refused(str(odd), "mode is L", "RGB"): d.load(path)
    image(1).convert("RGBA").save(odd)
    with refused(str(odd), "RGBA"): d.load(path)
    odd.unlink()
    with refused("8×6", "not a square"): d.load(tree(tmp_path/"oblong", size=(8, 6)))
    assert d.load(tree(tmp_path/"grey", mode="L")).channels == 1


def test_test_split_must_be_like_train(tmp_path):
    path = tree(tmp_path/"zoo", test=0); tree(path, train=0, test=2, size=(9, 9))
    d.load(path)
    with refused("test", "9, 9", "8, 8"): d.load(path, "test")
    path = tree(tmp_path/"grey", test=0); tree(path, train=0, test=2, mode="L")
    with refused("test", "channel"): d.load(path, "test")


def test_labels_out_of_range(tmp_path):
    zeros = np.zeros((3, 1, 8, 8), np.uint8)
    with refused("label 2 of image 1", "0 to 1"): d.ImageData(zeros, np.array([0, 2, 1]), ("a", "b"), (0.5,), (0.2,))
    with refused("label -1"): d.ImageData(zeros, np.array([0, -1, 1]), ("a", "b"), (0.5,), (0.2,))
    with refused("3 images but 2 labels"): d.ImageData(zeros, np.array([0, 1]), ("a", "b"), (0.5,), (0.2,))
    with refused("float64"): d.ImageData(zeros / 1, np.zeros(3, int), ("a",), (0.5,), (0.2,))
    path = tiny(tmp_path/"tiny-imagenet"); table = path/"val"/"val_annotations.txt"
    table.write_text(table.read_text() + "val_9.JPEG\tn99\t0\t0\t1\t1\n")
    with refused(str(table), "line 5", "n99"): d.load(path, "test")
    table.write_text("val_0.JPEG\tn01\nval_missing.JPEG\tn02\n")
    with refused("val_missing.JPEG"): d.load(path, "test")


def test_classes_and_ipc_out_of_range(tmp_path):
    data = d.load("digits")
    with refused("--data.classes 11", "1 to 10"): d.load("digits", classes=11)
    with refused("--data.classes 0"): d.load(Data("digits", classes=0))
    with refused("bea", "'bee'"): d.load(tree(tmp_path/"zoo"), classes=["bea"])
    with refused("index from 0 to 9"): data.only([10])
    with refused("--ipc 200", "has 1"): d.random_subset(data, 200)
    with refused("--ipc 0"): d.random_subset(data, 0)
    with refused("--data.size 0"): d.load("digits", size=0)
    with refused("outside 0 to 1296"): data.subset([1297])


def test_two_tiny_imagenets(tmp_path):
    tiny(tmp_path/"tiny-imagenet-2"); tiny(tmp_path/"tiny-imagenet-3")
    with refused("more than one", "tiny-imagenet-2, tiny-imagenet-3"): d.load("tiny-imagenet", root=tmp_path)
    assert len(d.load("tiny-imagenet-3", root=tmp_path)) == 6


def test_broken_link(tmp_path):
    path = tree(tmp_path/"zoo"); (path/"train"/"ant"/"z.png").symlink_to(tmp_path/"nowhere")
    with refused("z.png"): d.load(path)


# ---- torchvision's download

class FakeCifar:
    classes = ["cat", "bird", "ant"]
    def __init__(self, root, train, download=False):
        FakeCifar.calls.append(download)
        if download: (root/"cifar-10-batches-py").mkdir(); (root/"cifar-10-batches-py"/"data_batch_1").write_bytes(b"x")
        self.targets = [0, 1, 2, 1, 0] if train else [2, 0, 1]
        self.data = np.random.default_rng(train).integers(0, 256, (len(self.targets), 32, 32, 3), dtype=np.uint8)


def test_download_is_converted_once(monkeypatch):
    import torchvision
    FakeCifar.calls = []
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    assert not d.available("cifar10")
    train, test = d.load("cifar10"), d.load("cifar10", "test")
    assert d.available("cifar10") and FakeCifar.calls == [True, False, False]
    assert train.classes == ("ant", "bird", "cat") and train.labels.tolist() == [0, 1, 1, 2, 2] and test.labels.tolist() == [0, 1, 2]
    assert (train.images[0] == FakeCifar(None, True).data[2].transpose(2, 0, 1)).all() and test.mean == train.mean
    FakeCifar.calls = []
    assert d.load("cifar10").fingerprint == train.fingerprint and not FakeCifar.calls
    assert d.load("cifar10", classes=["bird"], size=16).images.shape == (2, 3, 16, 16)


def test_failing_download_says_where_to_put_the_data(monkeypatch):
    import torchvision
    def fail(*a, **k): raise urllib.error.URLError("no route")
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with refused("cifar100", "no route", "train/<class>", "--data"): d.load("cifar100")


def test_changed_download_is_refused(tmp_path):
    (tmp_path/"cifar-100-python").mkdir(); (tmp_path/"cifar-100-python"/"train").write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    with refused("cifar100", "corrupted"): d.load("cifar100", root=tmp_path)


# ---- the real sets, where they are

root = os.environ.get("SCDD_DATA")
here = lambda name: bool(root) and d.available(name, root)


@pytest.mark.skipif(not here("cifar100"), reason="CIFAR-100 is not here (SCDD_DATA)")
def test_cifar100():
    train, test = d.load("cifar100", root=root, classes=3), d.load("cifar100", "test", root, classes=3)
    assert train.images.shape == (1500, 3, 32, 32) and test.images.shape == (300, 3, 32, 32)
    assert train.classes == ("apple", "aquarium_fish", "baby")


@pytest.mark.skipif(not here("tiny-imagenet"), reason="Tiny-ImageNet is not here (SCDD_DATA)")
def test_tiny_imagenet():
    train, test = d.load("tiny-imagenet", root=root, classes=2), d.load("tiny-imagenet", "test", root, classes=2)
    assert train.images.shape[1:] == (3, 64, 64) and len(train) == 1000 and len(test) == 100
    assert train.classes == tuple(sorted(train.classes)) and train.classes[0].startswith("n")
