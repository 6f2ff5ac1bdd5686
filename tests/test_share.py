"Sets that are given away and sets that come from strangers: the same pixels, labels and classes on both sides, no pickles, one line for what is wrong, and scores that resume."
import csv, json, pickle, shutil
from dataclasses import asdict, replace
import numpy as np
import pytest, torch, yaml
from conftest import QUICK
from torchvision.datasets import ImageFolder
from scdd import site
from scdd.data import load, random_rows, random_subset
from scdd.files import UserError, read_json, write_json
from scdd.recipes import PROTOCOLS, RECIPES, override
from scdd.recover import SyntheticSet, load_set, to_pil
from scdd.run import with_peer
from scdd.cli import command, main
from scdd.experiments.uses import png_bytes
from scdd.share import FORMATS, PICKLES, as_jpeg, bytes_of, card, cells, export, fitted, load_any, protocols, random_jpegs, random_like

DIGITS = RECIPES["digits"]
TINY = "--network.width 4 --student.width 4 --supervised.epochs 1 --train.epochs 1 --train.batch 8 --hard.epochs 2 --hard.batch 8 --hard.students 2".split()

def few(classes=tuple("abcdefghijkl"), channels=3, per_class=2, **more):
    "Random pixels; twelve classes, so that 10 and 11 would sort before 2."
    random = np.random.default_rng(0); labels = np.repeat(np.arange(len(classes)), per_class)
    random.shuffle(labels)
    return SyntheticSet(random.integers(0, 256, (len(labels), channels, 16, 16), np.uint8), labels.astype(np.int64), tuple(classes), (0.5,) * channels, (0.25,) * channels, {"method": "noise", "seed": 3}, **more)

def same(a, b):
    assert (a.images == b.images).all() and a.images.dtype == b.images.dtype
    assert (a.labels == b.labels).all() and a.classes == b.classes and a.mean == b.mean and a.std == b.std and a.provenance == b.provenance

@pytest.fixture(scope="module")
def digits(): return load("digits")

@pytest.fixture(scope="module")
def strangers(digits, tmp_path_factory):
    "Class folders as anybody would make them: three images of some digits, two of others."
    folder = tmp_path_factory.mktemp("strangers")/"set"
    for label, name in enumerate(digits.classes):
        (folder/name).mkdir(parents=True)
        for i, row in enumerate(np.flatnonzero(digits.labels == label)[:2 + label % 2]): to_pil(digits.images[row]).save(folder/name/f"{i}.png")
    return folder

# --- export

@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_comes_back_as_it_was(form, channels, tmp_path):
    made = few(("10", "2", "ä b", "zebra", *"cdefghij"), channels, soft_labels=np.random.default_rng(1).random((24, 12)).astype(np.float32), learned_step=0.01); made.save(tmp_path/"set")
    export(tmp_path/"set", form, tmp_path/"out")
    back = load_any(tmp_path/"out")
    same(back, made)
    assert (back.soft_labels == made.soft_labels).all() and back.learned_step == 0.01
    assert not [path for path in tmp_path.rglob("*") if path.suffix in PICKLES or path.name.endswith(".part")]

@pytest.mark.parametrize("form", ["imagefolder", "npz"])
def test_whitening_and_order_are_kept(form, tmp_path):
    made = few(transform={"mean": np.arange(4.0), "matrix": np.eye(4)}, order=np.arange(24)[::-1].copy()); made.save(tmp_path/"set")
    back = load_any(export(tmp_path/"set", form, tmp_path/"out"))
    assert (back.transform["matrix"] == np.eye(4)).all() and (back.transform["mean"] == np.arange(4)).all() and (back.order == made.order).all()
    with pytest.raises(UserError, match="whitening"): export(tmp_path/"set", "huggingface", tmp_path/"hub")
    assert not (tmp_path/"hub").exists() and not list(tmp_path.glob(".*.part"))

def test_torchvision_sees_the_classes_in_their_order(tmp_path):
    made = few(tuple(map(str, range(12)))); made.save(tmp_path/"set"); export(tmp_path/"set", "imagefolder", tmp_path/"out")
    folders = ImageFolder(tmp_path/"out")
    assert [name.split("_")[1] for name in folders.classes] == list(made.classes) == (tmp_path/"out"/"classes.txt").read_text().split()
    rows = {row["file"]: row for row in csv.DictReader(open(tmp_path/"out"/"labels.csv"))}
    assert len(folders) == len(made) == len(rows)
    for path, label in folders.samples:
        name = path.split("out/")[1]; i = int(name.split("/")[1][:5])
        assert label == made.labels[i] == int(rows[name]["label"]) and rows[name]["class"] == made.classes[label]
        assert (np.asarray(folders.loader(path)).transpose(2, 0, 1) == made.images[i]).all()

def test_npz_is_plain_arrays(tmp_path):
    made = few(); made.save(tmp_path/"set"); export(tmp_path/"set", "npz", tmp_path/"out")
    with np.load(tmp_path/"out"/"set.npz", allow_pickle=False) as file:
        assert file["images"].shape == (24, 16, 16, 3) and file["images"].dtype == np.uint8 and file["labels"].dtype == np.int64
        assert file["classes"].tolist() == list(made.classes) and file["mean"].tolist() == [0.5] * 3 and "soft_labels" not in file

def test_the_hub_card_has_its_facts(tmp_path):
    made = few(("yes", "no: maybe", 'quo"te', *"defghijkl")); made.save(tmp_path/"set"); export(tmp_path/"set", "huggingface", tmp_path/"out")
    _, front, text = (tmp_path/"out"/"README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["task_categories"] == ["image-classification"] and facts["size_categories"] == ["n<1K"] and facts["license"] == "other"
    assert list(facts["dataset_info"]["features"][1]["dtype"]["class_label"]["names"].values()) == list(made.classes)
    assert "Not measured" in text and "remain with their owners" in text
    rows = [json.loads(line) for line in (tmp_path/"out"/"train"/"metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["label"] for row in rows] == made.labels.tolist() and all((tmp_path/"out"/"train"/row["file_name"]).is_file() for row in rows)

def test_a_run_is_given_away_with_its_figures(quick_run, tmp_path, capsys):
    for place in (quick_run, quick_run/"recover"):
        out = tmp_path/place.name
        assert main(["export", str(place), "--format", "huggingface", "--out", str(out)]) == 0
        text, report = (out/"README.md").read_text(encoding="utf-8"), read_json(quick_run/"report.json")
        assert f"| distilled, hard labels | {100 * report['accuracy']['distilled_hard']['mean']:.1f} % (n = " in text
        assert report["command"] in text and report["commit"] in text and "Hard labels: " in text and str(quick_run) not in text
        same(load_any(out), load_set(quick_run/"recover"))

def test_a_card_says_nothing_of_where_files_lie(tmp_path):
    recipe = with_peer(override(DIGITS, {"data.name": "/home/some body/my tiles"}), "sre2l", teacher="/home/some body/best.safetensors")
    few().save(tmp_path/"run"/"recover"); write_json(tmp_path/"run"/"recipe.json", {"recipe": asdict(recipe), "seed": 3})
    text = (export(tmp_path/"run", "imagefolder", tmp_path/"out")/"README.md").read_text(encoding="utf-8")
    assert "scdd distill sre2l digits --data.name 'my tiles'" in text and "best.safetensors" in text and "--seed 3" in text and "/home" not in text and "Not measured" in text

@pytest.mark.parametrize("words, said", [
    (["SET", "--format", "npzz", "--out", "OUT"], "--format npzz: there is no such format; did you mean 'npz'?"),
    (["SET", "--format", "tfrecord", "--out", "OUT"], "--format tfrecord: there is no such format; choose one of imagefolder, huggingface, npz"),
    (["SET", "--out", "SET"], "--out SET: is there already"),
    (["EMPTY", "--out", "OUT"], "EMPTY: is no set and no run with finished images"),
    (["SET"], "export: the following arguments are required: --out"),
    (["SET", "--out", "OUT", "--formt", "npz"], "export: unrecognized arguments: --formt npz"),
])
def test_what_cannot_be_exported_gets_one_line(words, said, tmp_path, capsys):
    few().save(tmp_path/"SET"); (tmp_path/"EMPTY").mkdir(); before = sorted(tmp_path.rglob("*"))
    place = lambda word: str(tmp_path/word) if word.isupper() else word
    assert main(["export", *map(place, words)]) == 2
    error = capsys.readouterr().err
    assert error.replace(f"{tmp_path}/", "").startswith(f"scdd: {said}") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before

# --- a stranger's set

def test_class_folders_in_any_manner(strangers, digits, tmp_path):
    plain = load_any(strangers, digits)
    assert np.bincount(plain.labels).tolist() == [2, 3] * 5 and plain.classes == digits.classes and plain.mean == digits.mean
    assert (plain.images[plain.labels == 7] == digits.images[np.flatnonzero(digits.labels == 7)[:3]]).all()
    inside = tmp_path/"inside"; shutil.copytree(strangers, inside/"train")
    for name in digits.classes: (inside/"train"/name).rename(inside/"train"/f"{int(name):04d}_{name}")
    numbered = load_any(inside, digits)
    assert (numbered.images == plain.images).all() and (numbered.labels == plain.labels).all() and numbered.classes == plain.classes

def test_a_table_in_csv(strangers, digits, tmp_path):
    shutil.copytree(strangers, tmp_path/"set")
    with open(tmp_path/"set"/"metadata.csv", "w") as file:
        file.write("file_name,label\n" + "".join(f"{name}/{i}.png,{name}\n" for name in reversed(digits.classes) for i in range(2)))
    found = load_any(tmp_path/"set", digits)
    assert found.labels.tolist() == [label for label in reversed(range(10)) for _ in range(2)] and (found.images[0] == digits.images[np.flatnonzero(digits.labels == 9)[0]]).all()

def test_numbers_are_positions_and_soft_labels_keep_their_columns(strangers, digits, tmp_path):
    "In a table or an array without names; class folders sort 10 before 2."
    folder = tmp_path/"set"; shutil.copytree(strangers, folder)
    order = [3, 1, 0, 2, 9, 8, 7, 6, 5, 4]
    rows = [{"file_name": f"{label}/0.png", "label": label, "soft_labels": np.eye(10)[label].tolist()} for label in order]
    (folder/"metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_any(folder, digits)
    assert found.labels.tolist() == order and found.soft_labels.argmax(1).tolist() == order and found.classes == digits.classes
    names = tuple(sorted(map(str, range(12)))); twelve = replace(digits, classes=names)  # 0, 1, 10, 11, 2, …
    np.savez(tmp_path/"set.npz", images=np.zeros((12, 16, 16, 1), np.uint8), labels=np.arange(12))
    assert load_any(tmp_path/"set.npz", twelve).labels.tolist() == list(range(12)) and load_any(tmp_path/"set.npz", twelve).classes == names
    assert load_any(tmp_path/"set.npz").classes == tuple(map(str, range(12)))
    np.savez(tmp_path/"more.npz", images=np.zeros((13, 16, 16, 1), np.uint8), labels=np.arange(13))
    with pytest.raises(UserError, match="its class 12 is none of the data's"): load_any(tmp_path/"more.npz", twelve)
    np.savez(tmp_path/"huge.npz", images=np.zeros((1, 16, 16, 1), np.uint8), labels=np.array([10**12]))
    with pytest.raises(UserError, match="the label 1000000000000 is the number of no class"): load_any(tmp_path/"huge.npz", twelve)   # and not after a million million names

def test_a_strangers_set_is_augmented_as_the_real_images_beside_it(strangers, digits):
    from scdd.relabel import data_name
    made = load_any(strangers, digits)
    assert data_name(made) == data_name(random_like(digits, made)) == "digits"

def test_pictures_are_resized_where_a_size_is_given(strangers, digits, tmp_path):
    small = load("digits", size=8)
    assert load_any(strangers, small, 8).images.shape == (25, 1, 8, 8)
    with pytest.raises(UserError, match="16×16 pixels in grey where digits has 8×8 pixels in grey; convert them, or give --data.size"): load_any(strangers, small)

def test_classes_in_another_order_are_put_right(digits):
    real = random_subset(digits, 1); turned = np.array([3, 1, 2, 0, *range(4, 10)])
    made = SyntheticSet(real.images, np.argsort(turned)[real.labels], tuple(digits.classes[i] for i in turned), digits.mean, digits.std, soft_labels=np.eye(10, dtype=np.float32)[np.argsort(turned)[real.labels]])
    found = fitted(made, digits, "here")
    assert (found.labels == real.labels).all() and found.classes == digits.classes and (found.soft_labels.argmax(1) == real.labels).all()

def spoilt(folder, what):
    "A stranger's folder with one thing wrong; where it lies."
    first = folder/"0"/"0.png"
    if what == "word": (folder/"7").rename(folder/"seven")
    if what == "missing": shutil.rmtree(folder/"7")
    if what == "twice": shutil.copytree(folder/"7", folder/"0007_7")
    if what == "beyond": (folder/"7").rename(folder/"0012_7")
    if what == "broken": first.write_bytes(b"no picture")
    if what == "empty": [path.unlink() for path in (folder/"0").iterdir()]
    if what == "colour": [to_pil(np.zeros((3, 16, 16), np.uint8)).save(path) for path in folder.rglob("*.png")]
    if what == "sizes": to_pil(np.zeros((1, 8, 8), np.uint8)).save(first)
    if what == "nothing": shutil.rmtree(folder); folder.mkdir()
    if what == "table": (folder/"metadata.jsonl").write_text('{"file_name": "0/0.png"}\n')
    if what == "no table": (folder/"metadata.jsonl").write_text("0/0.png 3\n")
    if what == "torch": shutil.rmtree(folder); folder.mkdir(); torch.save({"images": torch.zeros(1)}, folder/"res_best.pt")
    if what == "pickled": np.savez(folder/"set.npz", images=np.array([{}], object), labels=np.zeros(1))
    if what == "names": np.savez(folder/"set.npz", x=np.zeros(3), y=np.zeros(3))
    if what in ("outside", "half soft", "unknown class"):
        rows = [{"file_name": path.relative_to(folder).as_posix(), "label": int(path.parent.name)} for path in sorted(folder.rglob("*.png"))]
        if what == "outside": rows[0]["file_name"] = "../elsewhere.png"; to_pil(np.zeros((1, 16, 16), np.uint8)).save(folder.parent/"elsewhere.png")
        if what == "half soft": rows[0]["soft_labels"] = [0.1] * 10
        if what == "unknown class": write_json(folder/"about.json", {"classes": list("012345678")})
        (folder/"metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if what == "column": np.savez(folder/"set.npz", images=np.zeros((10, 16, 16, 1), np.uint8), labels=np.arange(10)[:, None])
    if what == "soft shape": np.savez(folder/"set.npz", images=np.zeros((10, 16, 16, 1), np.uint8), labels=np.arange(10), soft_labels=np.ones((10, 7), np.float32))
    if what == "soft names":
        rows = [{"file_name": path.relative_to(folder).as_posix(), "label": "digit " + path.parent.name, "soft_labels": [0.1] * 10} for path in sorted(folder.rglob("*.png"))]
        (folder/"metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if what.startswith("about"): write_json(folder/"about.json", {"about a list": ["a"], "about a number": {"classes": 10}, "about a mean": {"mean": 0.5}}[what])
    if what == "floats": np.savez(folder/"set.npz", images=np.zeros((1, 16, 16, 1)), labels=np.zeros(1, int))

SPOILT = {"word": "its class seven is none of the data's", "missing": "has no image of the class 7 (1 of 10 classes are missing)", "twice": "its classes 0007_7 and 7 are both the data's 7", "beyond": "its class 0012_7 is none of the data's",
          "broken": "0/0.png: cannot be read as an image", "empty": "/0: no images in this class folder", "colour": "images of 16×16 pixels in colour where digits has 16×16 pixels in grey; convert them", "sizes": "0/1.png: 16×16 pixels where", "nothing": "holds no set.json, no .npz, no metadata.jsonl and no class folders",
          "table": "metadata.jsonl: a row has no file_name or no label", "no table": "metadata.jsonl: not readable as a table", "torch": "res_best.pt: is a pickle, and reading one runs whatever its writer put into it",
          "outside": "its table names ../elsewhere.png, which lies outside of the folder", "half soft": "its table has soft_labels that are not one list of numbers for each row", "unknown class": "about.json: its classes lack 9, which the table has",
          "column": "set.npz: not readable as a set (labels of shape 10×1 for 10 images; one whole number for each is needed)", "soft shape": "soft labels of shape 10×7, where 10 images of 10 classes need 10×10",
          "soft names": "its table has soft labels and names of classes, and nothing says which column is which", "about a list": "about.json: must be a table of values", "about a number": "about.json: classes must be a list of names", "about a mean": "about.json: mean must be a list of numbers",
          "pickled": "set.npz: not readable as a set (Object arrays cannot be loaded when allow_pickle=False)", "names": "set.npz: has no array 'images'", "floats": "set.npz: not readable as a set (a synthetic set holds uint8 images"}

@pytest.mark.parametrize("what, said", SPOILT.items(), ids=SPOILT)
def test_what_cannot_be_read_gets_one_line(what, said, strangers, digits, tmp_path, capsys):
    folder = tmp_path/"set"; shutil.copytree(strangers, folder); spoilt(folder, what)
    assert main(["evaluate", str(folder), "digits", "--out", str(tmp_path/"out")]) == 2
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and not out and not (tmp_path/"out").exists()

def test_a_pickle_is_not_opened(tmp_path, digits):
    class Trap:
        def __reduce__(self): return exec, (f"open({str(tmp_path/'sprung')!r}, 'w')",)
    for ending in PICKLES:
        (tmp_path/f"set{ending}").write_bytes(pickle.dumps(Trap()))
        with pytest.raises(UserError, match="is a pickle"): load_any(tmp_path/f"set{ending}", digits)
    np.savez(tmp_path/"set.npz", images=np.array([Trap()], object), labels=np.zeros(1, int))
    with pytest.raises(UserError, match="allow_pickle"): load_any(tmp_path/"set.npz", digits)
    assert not (tmp_path/"sprung").exists()

# --- protocols

def test_protocols_are_the_recipes_or_those_of_papers():
    recipe = override(DIGITS, {"train.epochs": 7, "train.students": 2, "hard.learning_rate": 0.5})
    assert protocols((), recipe) == {"train": recipe.train, "hard": recipe.hard}
    assert set(protocols(("all",), recipe)) == {"train", "hard", "once", *PROTOCOLS} and protocols(("all", "dc"), recipe) == protocols(("all",), recipe)
    found = protocols(("hard", *(name for name in PROTOCOLS if name != "hard")), recipe, ["train.epochs", "hard.learning_rate", "out"])
    assert list(found) == ["hard", *(name for name in PROTOCOLS if name != "hard")] and found["hard"] == recipe.hard
    assert found["strong"] == override(DIGITS, {}).train.__class__(**vars(PROTOCOLS["strong"]) | {"epochs": 7, "students": 2, "crop_padding": 1, "flip": False})
    assert (found["dsa"].epochs, found["dsa"].learning_rate, found["dsa"].augment) == (1000, 0.5, "dsa")
    assert protocols(("once", "train"), recipe) == {"once": replace(recipe.train, labels="once"), "train": recipe.train}
    assert protocols(("sre2l",), override(DIGITS, {"train.labels": "once"}), ["train.labels"])["sre2l"] == replace(protocols(("sre2l",), DIGITS)["sre2l"], labels="once")
    with pytest.raises(UserError, match="--train.labels once: .*give --train.loss kl"): protocols(("edc",), override(DIGITS, {"train.labels": "once"}), ["train.labels"])
    photographs = protocols(list(PROTOCOLS), RECIPES["cifar100-strong"])
    for name in PROTOCOLS: assert vars(photographs[name]) | {"students": 1} == vars(PROTOCOLS[name]), name

def test_random_images_are_as_many(strangers, digits):
    made = load_any(strangers, digits); found = random_like(digits, made)
    assert (np.bincount(found.labels) == np.bincount(made.labels)).all()
    whole = few(digits.classes, 1, 5)
    assert (random_like(digits, whole, 4).images == random_subset(digits, 5, 4).images).all()   # as in a run
    with pytest.raises(UserError, match="the set has 200 images of the class"): random_like(digits, few(digits.classes, 1, 200))

@pytest.mark.parametrize("each", [0.0, 150.0])
def test_random_jpegs_weigh_as_much_as_the_set(strangers, digits, each):
    made = load_any(strangers, digits); heavy = replace(made, images=np.random.default_rng(0).integers(0, 256, made.images.shape, np.uint8))
    draw = lambda one, seed=3: random_jpegs(digits, bytes_of(one, each), seed, each)
    counts = {}
    for kind, one in ("digits", made), ("noise", heavy):
        some = draw(one); counts[kind] = np.bincount(some.labels, minlength=10)
        assert bytes_of(one, each).tolist() == np.bincount(one.labels, png_bytes(one.images) + each).tolist()
        fit = [sum(np.cumsum(weights) <= most) for weights, most in zip(weights_of(digits, 3, each), bytes_of(one, each))]
        assert counts[kind].tolist() == fit and min(fit) >= 1
    assert (counts["noise"] >= counts["digits"]).all() and not np.array_equal(draw(made).images[:3], draw(made, 4).images[:3])

def weights_of(data, seed, each):
    "What the first twenty JPEG files of each class weigh, in the order of the draw."
    return [[as_jpeg(data.images[row])[1] + each for row in rows[:20]] for rows in random_rows(data, 100, seed)]

def test_a_class_in_which_not_one_jpeg_fits(digits):
    made = few(digits.classes, 1, 3); black = replace(made, images=np.where((made.labels == 4)[:, None, None, None], np.uint8(0), made.images))
    with pytest.raises(UserError, match="--same-bytes: not one JPEG file goes into the bytes that the set has of the class 4"): random_jpegs(digits, bytes_of(black))

# --- evaluate

def test_evaluate_from_the_command_line_and_again(strangers, tmp_path, capsys, monkeypatch):
    out = tmp_path/"out"; words = ["evaluate", str(strangers), "digits", *TINY, "--out", str(out)]
    assert main(words) == 0
    first = capsys.readouterr().out; found = read_json(out/"evaluate.json")
    assert "soft labels by the supervised network" in first and (out/"pretrain"/"supervised"/"network.safetensors").is_file()
    assert [(row["protocol"], row["labels"], row["teacher"], row["set"]["n"], row["random"]["n"], row["seeds"]) for row in found["rows"]] == [("train", "soft", "supervised", 1, 1, [0]), ("hard", "hard", "", 2, 2, [0, 1])]
    assert len(found["rows"][1]["set"]["values"]) == 2 and found["rows"][1]["config"]["epochs"] == 2
    assert (found["set"]["images"], found["set"]["fewest of a class"], found["set"]["most of a class"]) == (25, 2, 3) and {"commit", "device", "versions", "recipe"} <= set(found)
    assert found["command"].startswith("scdd evaluate set digits --protocol train hard --network.width 4")
    for row in found["rows"]: assert "| " + " | ".join(map(str, cells(row))) + " |" in first
    assert not any("jpeg" in row for row in found["rows"]) and "--same-bytes" not in found["command"]
    page = (out/"evaluate.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 and "Soft labels of the supervised teacher" in page and "http" not in page.replace("http://www.w3.org", "")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    monkeypatch.setattr("scdd.train.train_student", lambda *_, **__: pytest.fail("a student was trained again")); monkeypatch.setattr("scdd.pretrain.pretrain", lambda *_, **__: pytest.fail("a network was trained again"))
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == first.splitlines()[-5:] and {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    monkeypatch.undo()
    assert main([*words, "--protocol", "once"]) == 0 and "| once | once, supervised teacher |" in capsys.readouterr().out   # beside the others in one table
    assert "One soft label for each image, by the supervised teacher" in (out/"evaluate.html").read_text(encoding="utf-8")
    assert main([*words, "--protocol", "dc"]) == 0                 # added; its 300 epochs are 2, since that was typed
    assert [row["protocol"] for row in read_json(out/"evaluate.json")["rows"]] == ["train", "hard", "once", "dc"] and read_json(out/"evaluate.json")["rows"][:2] == found["rows"] and read_json(out/"evaluate.json")["rows"][3]["config"]["epochs"] == 2
    capsys.readouterr(); assert main(["show", str(out)]) == 0 and "| dc | hard |" in capsys.readouterr().out
    for protocol, labelled in ("hard", False), ("train", True):
        before = next(row for row in read_json(out/"evaluate.json")["rows"] if row["protocol"] == protocol)
        assert main([*words, "--protocol", protocol, "--same-bytes"]) == 0
        kept = read_json(out/"evaluate.json"); row = next(row for row in kept["rows"] if row["protocol"] == protocol)
        assert before.items() <= row.items() and row["jpeg"]["n"] == row["set"]["n"] and (row["bytes"]["labels"] > 0) == labelled and row["bytes"]["images"] == png_bytes(load_any(strangers, load("digits")).images).sum()
        assert f"({row['jpeg images']} images)" in capsys.readouterr().out and kept["command"].endswith("--same-bytes") and "JPEG files of the same bytes" in (out/"evaluate.html").read_text(encoding="utf-8")
        assert main([*words, "--protocol", protocol]) == 0 and read_json(out/"evaluate.json") == kept   # what was asked for earlier stays
    monkeypatch.setattr(site, "root", lambda: tmp_path); (tmp_path/"nbs/experiments/results").mkdir(parents=True)
    site.keep(out, "bytes"); found = read_json(tmp_path/"nbs/experiments/results/bytes.json")
    assert found["rows"] == kept["rows"] and found["date"] and {"scdd.run", "scdd.share", "scdd.train"} <= set(found["code"])

def test_another_set_in_the_same_folder_is_refused(strangers, tmp_path, capsys):
    other = tmp_path/"other"; shutil.copytree(strangers, other); (other/"1"/"2.png").unlink()
    words = ["digits", *TINY, "--hard.students", "1", "--protocol", "hard", "--out", str(tmp_path/"out")]
    assert main(["evaluate", str(strangers), *words]) == 0 and not (tmp_path/"out"/"pretrain").exists()
    capsys.readouterr(); assert main(["evaluate", str(other), *words]) == 2
    assert "train/hard/set: was made from another set, by another teacher or under other values; give another --out" in capsys.readouterr().err
    assert main(["evaluate", str(strangers), *words, "--hard.epochs", "3"]) == 2 and "was made with --hard.epochs 2, and now it is 3" in capsys.readouterr().err

def test_a_set_of_a_run_gets_the_figures_of_its_report(quick_run, tmp_path, capsys):
    report = read_json(quick_run/"report.json")
    values = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    export(quick_run, "npz", tmp_path/"given")
    assert main(["evaluate", str(tmp_path/"given"), "digits", *values, "--reuse", str(quick_run), "--out", str(tmp_path/"out")]) == 0
    soft, hard = read_json(tmp_path/"out"/"evaluate.json")["rows"]
    assert soft["teacher"] == "ssl" and not (tmp_path/"out"/"pretrain").exists()
    for row, labels in ((soft, "soft"), (hard, "hard")):
        for which, kind in (("set", "distilled"), ("random", "random")): assert row[which]["values"] == report["accuracy"][f"{kind}_{labels}"]["values"]

def test_what_comes_with_a_set_is_used_and_said(digits, tmp_path, capsys):
    real = random_subset(digits, 1)
    SyntheticSet(real.images, real.labels, real.classes, real.mean, real.std, learned_step=0.02, soft_labels=np.eye(10, dtype=np.float32)[real.labels]).save(tmp_path/"set")
    assert main(["evaluate", str(tmp_path/"set"), "digits", *TINY, "--protocol", "hard", "--out", str(tmp_path/"out")]) == 0
    row, = read_json(tmp_path/"out"/"evaluate.json")["rows"]
    assert row["learned"] == ["step size", "labels"] and row["config"]["labels"] == "hard" and "| hard | hard; the set with its own step size, labels |" in capsys.readouterr().out

def test_a_teacher_in_a_file(quick_run, strangers, tmp_path, capsys):
    words = ["evaluate", str(strangers), "digits", *TINY, "--protocol", "sre2l", "--out", str(tmp_path/"out"), "--teacher"]
    assert main([*words, str(tmp_path/"none.safetensors")]) == 2 and "none.safetensors: there is no such file" in capsys.readouterr().err
    assert main([*words, str(quick_run/"pretrain"/"supervised"/"network.safetensors")]) == 0
    row, = read_json(tmp_path/"out"/"evaluate.json")["rows"]
    assert row["teacher"] == "given (network.safetensors)" and row["config"]["epochs"] == 1 and not (tmp_path/"out"/"pretrain").exists()

def test_other_soft_labels_are_another_set(digits, tmp_path, capsys):
    real = random_subset(digits, 1); soft = np.eye(10, dtype=np.float32)[real.labels]
    words = ["evaluate", str(tmp_path/"set"), "digits", *TINY, "--protocol", "hard", "--out", str(tmp_path/"out")]
    SyntheticSet(real.images, real.labels, real.classes, real.mean, real.std, soft_labels=soft).save(tmp_path/"set")
    assert main(words) == 0
    shutil.rmtree(tmp_path/"set"); SyntheticSet(real.images, real.labels, real.classes, real.mean, real.std, soft_labels=soft[::-1].copy()).save(tmp_path/"set")
    assert main(words) == 2 and "was made from another set" in capsys.readouterr().err

def test_a_card_names_no_folder_of_experts(tmp_path):
    recipe = with_peer(DIGITS, "mtt"); recipe = replace(recipe, peer=replace(recipe.peer, config=recipe.peer.config | {"folder": "/home/some body/experts"}))
    few().save(tmp_path/"run"/"recover"); write_json(tmp_path/"run"/"recipe.json", {"recipe": asdict(recipe), "seed": 0})
    text = (export(tmp_path/"run", "imagefolder", tmp_path/"out")/"README.md").read_text(encoding="utf-8")
    assert "--config.folder experts" in text and "/home" not in text

@pytest.mark.parametrize("words, said", [
    ([], "scdd evaluate needs a set and a recipe"), (["set"], "scdd evaluate needs the name of a recipe: digits"), (["nowhere", "digits"], "nowhere: there is no such set"),
    (["nowhere", "digits", "--protocol", "hard", "--teacher", "x"], "--teacher x: the protocols hard have hard labels, which nobody writes; leave it out"),
    (["nowhere", "digits", "--protocol", "dsa", "--train.epochs", "5"], "--train.epochs: none of the protocols dsa reads it; give --hard.epochs, or another --protocol"),
    (["nowhere", "digits", "--reuse", "never"], "--reuse never: there is no such folder"),
    (["nowhere", "digits", "--protocol", "hrd"], "--protocol hrd: there is no such protocol; did you mean 'hard'?"), (["nowhere", "digits", "--grid"], "--grid: there is no such option"),
])
def test_mistakes_get_one_line(words, said, capsys):
    assert main(["evaluate", *words]) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"scdd: {said}") and error.count("\n") == 1 and not out

def test_help_is_there_and_says_what_there_is(capsys):
    for words in (["--help"], ["export", "--help"], ["evaluate", "--help"]): assert command(words) == 0
    said = capsys.readouterr().out
    assert "scdd export SET|RUN --format imagefolder|huggingface|npz --out FOLDER" in said and "scdd evaluate SET RECIPE" in said
    with pytest.raises(SystemExit): main(["evaluate", "set", "digits", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*PROTOCOLS, "--protocol", "--teacher", "--train.epochs", "--reuse"): assert name in said, name

@pytest.mark.parametrize("words, said", [(["--hard.batch", "1"], "--hard.batch 1: one image alone"), (["--train.batch", "1", "--protocol", "train"], "--train.batch 1: one image alone"),
                                         (["--student.name", "resnet99"], "--student.name resnet99: there is no such network"), (["--teacher", "TEACHER", "--protocol", "train"], "the network takes 3-channel images of 32 pixels, those of digits have 1 and 16")])
def test_what_cannot_train_or_label_is_refused_first(words, said, strangers, tmp_path, capsys):
    from scdd.data import ImageData
    from scdd.models import build, save_network
    colour = ImageData(np.zeros((20, 3, 32, 32), np.uint8), np.arange(20) % 10, tuple(map(str, range(10))), (0.5,) * 3, (0.25,) * 3, "train", "other", "f")
    network = build(DIGITS.network, colour, 0); network.about = {"accuracy": 0.5}; save_network(tmp_path/"network.safetensors", network)
    words = [str(tmp_path/"network.safetensors") if word == "TEACHER" else word for word in words]
    assert main(["evaluate", str(strangers), "digits", *words, "--out", str(tmp_path/"out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1

def test_export_to_where_no_folder_can_be(tmp_path, capsys):
    few().save(tmp_path/"set"); (tmp_path/"file").write_text("")
    assert main(["export", str(tmp_path/"set"), "--format", "npz", "--out", str(tmp_path/"file"/"x")]) == 2
    error = capsys.readouterr().err
    assert "file/x: cannot be made" in error and error.count("\n") == 1

def test_a_card_calls_held_out_accuracies_what_they_are(quick_run, tmp_path):
    known = {"recipe": override(DIGITS, {"data.held_out": 0.2}), "seed": 0, "report": read_json(quick_run/"report.json")}
    known["report"]["recipe"]["data"]["held_out"] = 0.2
    made = load_set(quick_run/"recover")
    assert "held-out accuracy" in (text := card(made, known, "npz")) and "whole test set" not in text
