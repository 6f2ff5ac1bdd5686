"Every recipe's code on real photographs, made small: it proves the path from raw images to a report, not the accuracy."
import json, shutil, subprocess
import pytest
from PIL import Image
from conftest import SCDD

SHORT = ["--pretrain.epochs", "1", "--pretrain.batch", "32", "--pretrain.queue", "64", "--supervised.epochs", "1", "--supervised.warmup", "0", "--full.epochs", "1", "--full.warmup", "0",
         "--align.epochs", "1", "--recover.steps", "2", "--recover.ipc", "2", "--recover.compile", "off", "--train.epochs", "1", "--hard.epochs", "1", "--train.students", "1",
         "--hard.students", "1", "--network.width", "16", "--student.width", "16"]

def few(source, target, classes=3, images=24):
    "The first images of the first classes of a folder of class folders."
    for folder in sorted(p for p in source.iterdir() if p.is_dir())[:classes]:
        (target/folder.name).mkdir(parents=True)
        for path in sorted(p for p in folder.rglob("*") if p.is_file())[:images]: shutil.copy(path, target/folder.name)

@pytest.fixture(scope="module")
def photographs(data_root, tmp_path_factory):
    "CIFAR-100, Tiny-ImageNet and, enlarged to 224 pixels, a tree in ImageNet's layout: a few images of each."
    tmp_path = tmp_path_factory.mktemp("photographs")
    for split in ("train", "test"): few(data_root/"cifar100"/split, tmp_path/"cifar100"/split)
    tiny = next(data_root.glob("tiny-imagenet*"))
    few(tiny/"train", tmp_path/"imagenet1k"/"train"); few(tiny/"train", tmp_path/"imagenet1k"/"val", images=8)
    for path in (tmp_path/"imagenet1k").rglob("*.JPEG"): Image.open(path).convert("RGB").resize((224, 224), Image.BICUBIC).save(path)
    some = sorted(folder.name for folder in (tiny/"train").iterdir())[:3]; own = tmp_path/tiny.name; (own/"val"/"images").mkdir(parents=True)
    for name in some: few(tiny/"train"/name, own/"train"/name)
    lines = [line for line in (tiny/"val"/"val_annotations.txt").read_text().splitlines(True) if line.split("\t")[1] in some]
    for line in lines: shutil.copy(tiny/"val"/"images"/line.split("\t")[0], own/"val"/"images")
    (own/"val"/"val_annotations.txt").write_text("".join(lines))
    for name in "wnids.txt", "words.txt": shutil.copy(tiny/name, own/name)
    return tmp_path

@pytest.mark.parametrize("recipe, more", [
    ("cifar100-mini", ["--data.classes", "3"]), ("cifar100-scdd", []), ("cifar100-sre2l", []), ("cifar100-strong", []), ("cifar100-best", []),
    ("tiny-imagenet-scdd", ["--data.classes", "2"]), ("imagenet1k-scdd", [])])
def test_recipe(recipe, more, photographs, tmp_path):
    done = subprocess.run([SCDD, "run", recipe, "--data", photographs, "--out", tmp_path/"run", "--device", "cpu", *SHORT, *more], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path/"run"/"report.json").read_text())
    assert all(0 <= figure["mean"] <= 1 for figure in report["accuracy"].values()) and len(report["accuracy"]) == 5
    assert report["peak_memory_bytes"] < 6e9 or recipe.startswith("imagenet")

@pytest.mark.parametrize("method, values", [("dm", []), ("mtt", ["--config.experts.count", "2", "--config.experts.epochs", "2", "--config.starts", "1", "--config.ahead", "1", "--config.steps", "2", "--config.batch", "None"])])
def test_the_published_comparison_made_small(method, values, photographs, tmp_path):
    "Chapter 25's command for a GPU: all of CIFAR-100's protocol for hard labels, and nothing self-supervised is trained for it."
    words = ["distill", method, "cifar100-sre2l", "--recover.ipc", "1", "--student.name", "convnet", "--student.norm", "instance", "--student.width", "16", "--network.width", "16", "--config.network.width", "16",
             "--hard.crop", "none", "--hard.flip", "False", "--hard.sets", "each", "--hard.students", "2", "--hard.epochs", "1", "--train.students", "1", "--train.epochs", "1",
             "--supervised.epochs", "1", "--full.epochs", "1", "--config.iterations", "2", *values]
    done = subprocess.run([SCDD, *words, "--data", photographs, "--out", tmp_path/"run", "--device", "cpu"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path/"run"/"report.json").read_text())
    assert report["accuracy"]["distilled_hard"]["n"] == report["accuracy"]["random_hard"]["n"] == report["accuracy"]["full_data"]["n"] == 2 and "pretrain/ssl" not in report["seconds"]
