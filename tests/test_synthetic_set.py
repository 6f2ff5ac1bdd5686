"The synthetic set on disk: what was saved comes back, others can read it, and what is broken is named."
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from scdd.files import UserError
from scdd.recover import SyntheticSet


def make(channels=3, **more):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, channels, 8, 8), dtype=np.uint8)
    return SyntheticSet(images, np.array([2, 0, 1, 1, 0, 2]), ("10", "9 lives", "a/b"), (0.5,) * channels, (0.25,) * channels, {"method": "test", "curve": [{"step": 0, "loss": 1.5}]}, **more)


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip(tmp_path, channels):
    saved = make(channels)
    saved.save(tmp_path/"set")
    found = SyntheticSet.load(tmp_path/"set")
    assert (found.images == saved.images).all() and (found.labels == saved.labels).all()
    assert (found.classes, found.mean, found.std, found.provenance) == (saved.classes, saved.mean, saved.std, saved.provenance)
    assert found.order is found.learned_step is found.transform is found.soft_labels is None
    assert (found.ipc, found.size, found.channels, len(found), found.nbytes) == (2, 8, channels, 6, saved.nbytes)
    assert not (tmp_path/"set"/"labels.safetensors").exists()


def test_round_trip_of_what_peers_need(tmp_path):
    saved = make(order=np.arange(6)[::-1].copy(), learned_step=0.03, transform={"matrix": np.eye(4, dtype=np.float32), "shift": np.ones(4)}, soft_labels=np.random.rand(6, 3).astype(np.float32))
    found = SyntheticSet.load((saved.save(tmp_path/"set"), tmp_path/"set")[1])
    assert (found.order == saved.order).all() and found.learned_step == 0.03 and (found.soft_labels == saved.soft_labels).all()
    assert found.transform.keys() == saved.transform.keys() and all((found.transform[k] == saved.transform[k]).all() for k in found.transform)
    assert found.nbytes > make().nbytes


def test_other_libraries_read_it(tmp_path):
    saved = make(); saved.save(tmp_path/"set")
    folder = ImageFolder(tmp_path/"set")
    assert folder.classes == ["0000_10", "0001_9_lives", "0002_a_b"]
    assert sorted(label for _, label in folder) == sorted(saved.labels.tolist())
    pixels = {np.asarray(image).transpose(2, 0, 1).tobytes(): label for image, label in folder}
    assert [pixels[image.tobytes()] for image in saved.images] == saved.labels.tolist()


def test_saving_again_replaces_in_whole(tmp_path):
    make(soft_labels=np.zeros((6, 3), np.float32)).save(tmp_path/"set"); make(1).save(tmp_path/"set")
    assert SyntheticSet.load(tmp_path/"set").channels == 1 and not (tmp_path/"set"/"labels.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("change, message", [
    (dict(images=np.zeros((6, 3, 8, 8), np.float32)), "uint8 images"),
    (dict(labels=np.zeros(5, np.int64)), "6 images but 5 labels"),
    (dict(labels=np.array([0, 1, 2, 3, 0, 1])), "labels from 0 to 3, but there are 3 classes"),
    (dict(labels=np.array([0, 1, 2, -1, 0, 1])), "labels from -1"),
])
def test_what_does_not_fit_is_refused(change, message):
    values = dict(images=make().images, labels=make().labels, classes=("a", "b", "c"), mean=(0.5,), std=(0.2,)) | change
    with pytest.raises(UserError, match=message): SyntheticSet(**values)


def damage_png(folder): path = next(folder.rglob("*.png")); path.write_bytes(path.read_bytes()[:60]); return path.name
def remove_png(folder): path = next(folder.rglob("*.png")); path.unlink(); return path.name
def resize_png(folder): path = next(folder.rglob("*.png")); Image.new("RGB", (4, 4)).save(path); return path.name
def recolour_png(folder): path = next(folder.rglob("*.png")); Image.new("L", (8, 8)).save(path); return path.name
def cut_json(folder): path = folder/"set.json"; path.write_text(path.read_text()[:100]); return path.name
def cut_tensors(folder): path = folder/"labels.safetensors"; path.write_bytes(path.read_bytes()[:-8]); return path.name
def other_json(folder): (folder/"set.json").write_text("{}"); return "set.json"
def lose_json(folder): (folder/"set.json").unlink(); return "set.json"
def wrong_label(folder):
    about = json.loads((folder/"set.json").read_text()); about["labels"][0] = 7
    (folder/"set.json").write_text(json.dumps(about)); return "labels"


@pytest.mark.parametrize("harm", [damage_png, remove_png, resize_png, recolour_png, cut_json, cut_tensors, other_json, lose_json, wrong_label])
def test_damage_is_named(tmp_path, harm):
    make(soft_labels=np.zeros((6, 3), np.float32)).save(tmp_path/"set")
    name = harm(tmp_path/"set")
    with pytest.raises(UserError) as error: SyntheticSet.load(tmp_path/"set")
    assert name in str(error.value) and "\n" not in str(error.value)
