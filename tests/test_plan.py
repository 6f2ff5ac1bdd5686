"`scdd plan`: steps are counted as by hand, costs go to a file and back, no data set is needed, and bad input gets one line. No time is tested."
import json, math, subprocess, sys
from pathlib import Path
import pytest, torch
from scdd import plan as planning
from scdd.files import UserError, read_json, write_json
from scdd.plan import DEPENDS, FORMAT, FREE, KNOWN, MEASURES, Item, Sizes, cost_of, disk, held_against, label_bytes, measure, needed, planned, read_costs, shape, share, sizes_of, table, work_of
from scdd.recipes import RECIPES, Data, flatten, override
from scdd.run import plan as results_of, run, with_peer
from scdd.cli import main

DIGITS, SCDD, LARGE = RECIPES["digits"], RECIPES["cifar100-scdd"], RECIPES["imagenet1k-scdd"]
TINY = ("--data.classes 3 --network.width 8 --student.width 8 --pretrain.epochs 2 --pretrain.batch 32 --supervised.batch 32 --full.batch 32 --supervised.epochs 2 --full.epochs 2 --align.epochs 2 "
        "--recover.steps 4 --recover.ipc 2 --train.epochs 3 --hard.epochs 3 --train.batch 2 --hard.batch 2 --recover.compile off").split()
pairs = lambda words: {name.removeprefix("--"): int(value) if value.isdigit() else value for name, value in zip(words[::2], words[1::2])}
TINY_RECIPE = override(DIGITS, pairs(TINY))

def fake(recipe, step=1.0, image=0.0, start=0.0, sizes=None):
    "Costs that nobody measured."
    sizes = sizes or sizes_of(recipe.data)
    costs = {name: {"step": step, "image": image, "start": start, "images": 1, "of": 1, "shape": shape(name, recipe, sizes)} for name in needed(recipe, sizes)}
    return {"format": FORMAT, "recipe": recipe.name, "costs": costs, "bytes": {"network": 1000}, "peak_memory_bytes": 5, "threads": 1, "seconds": 1.0, "date": "today", "device": "none", "commit": "none"}

def seconds(recipe, costs=None, devices=1, key="seconds"):
    return {row["result"]: pytest.approx(row[key]) for row in planned(recipe, sizes_of(recipe.data), costs or fake(recipe), devices)}

def test_steps_of_digits_as_counted_by_hand():
    assert seconds(DIGITS) == {"data": 0, "pretrain/ssl": 40 * 5 + 8, "pretrain/supervised": 15 * 10 + 2, "align/ssl": 100 * 6, "recover": 300, "relabel": 0,
                               "train/distilled_soft": 700, "train/distilled_hard": 200, "train/random_soft": 700, "train/random_hard": 200, "train/full_data": 0}

@pytest.mark.parametrize("name", ["plan-narrow", "plan-imagenet1k", "plan-tiny-imagenet"])
def test_costs_that_were_kept_still_fit(name):
    path = Path(__file__).parents[1]/"nbs/experiments/results"/f"{name}.json"; recipe = RECIPES[read_json(path)["recipe"]]
    assert read_costs(path, recipe, sizes_of(recipe.data))["recipe"] == recipe.name

def test_a_backbone_that_is_fine_tuned_costs_something_else():
    still, tuned, faster = (override(DIGITS, {"align.finetune": rate}) for rate in (0.0, 0.01, 0.1)); sizes = sizes_of(DIGITS.data)
    assert shape("probe step", tuned, sizes) == shape("probe step", faster, sizes) != shape("probe step", still, sizes)
    forwards = [sum(item.images for item in work_of(one, sizes)["align/ssl"] if item.operation == "network forward") for one in (still, tuned)]
    assert forwards == [500 + 1297, 500]   # features that are made once, and then in every step

def test_images_of_digits_as_counted_by_hand():
    both, ones = 1297 + 500, fake(DIGITS, 0.0, 1.0)
    assert seconds(DIGITS, ones) == {"data": 0, "pretrain/ssl": 40 * 5 * 256 + 8 * both, "pretrain/supervised": 15 * 10 * 128 + 2 * both + 500, "align/ssl": 100 * 1297 + 1297 + 500,
                                     "recover": 300 * 100, "relabel": 100, "train/distilled_soft": 100 * 100 + 500, "train/distilled_hard": 100 * 100 + 500,
                                     "train/random_soft": 100 * 100 + 500, "train/random_hard": 100 * 100 + 500, "train/full_data": 0}

def test_steps_of_the_published_recipe_as_counted_by_hand():
    assert seconds(SCDD) == {"data": 0, "pretrain/ssl": 97 * 200 + 20, "pretrain/supervised": 390 * 200 + 20, "align/ssl": 196 * 100, "recover": 50 * 1000, "relabel": 0,
                             "train/distilled_soft": 3 * 79 * 200, "train/distilled_hard": 3 * 20 * 300, "train/random_soft": 3 * 79 * 200, "train/random_hard": 3 * 20 * 300, "train/full_data": 0}
    assert seconds(SCDD, fake(SCDD, 0.0, 0.0, 7.0))["recover"] == 7

def test_several_networks_and_class_statistics_as_counted_by_hand():
    recipe = override(DIGITS, {"extra.backbones": ("convnet", "mobilenetv3_small_050"), "extra.category": 0.5, "recover.steps": 301})
    assert seconds(recipe)["pretrain/convnet"] == 40 * 5 + 8 + 100 * 6 and seconds(recipe)["recover"] == 301
    steps = {item.operation: item.steps for item in work_of(recipe, sizes_of(recipe.data))["recover"] if item.steps}
    assert steps == {"recovery step": 101, "recovery step (convnet)": 100, "recovery step (mobilenetv3_small_050)": 100}
    assert seconds(recipe, fake(recipe, 0.0, 1.0))["recover"] == 3 * 1297 + 301 * 100     # the real images of the classes once through each network
    supervised = override(recipe, {"recover.teacher": "supervised"})
    assert seconds(supervised, fake(supervised, 0.0, 1.0))["pretrain/convnet"] == seconds(DIGITS, fake(DIGITS, 0.0, 1.0))["pretrain/supervised"]
    assert shape("recovery step (convnet)", recipe, sizes_of(recipe.data))["network.name"] == "convnet" and shape("recovery step", recipe, sizes_of(recipe.data)) != shape("recovery step", DIGITS, sizes_of(recipe.data))
    costs = fake(recipe) | {"bytes": {"network": 1000, "network (convnet)": 10, "network (mobilenetv3_small_050)": 1}}
    assert disk(recipe, sizes_of(recipe.data), costs)["networks"] == 2 * 1000 + 10 + 1 + (1000 if "pretrain/supervised" in work_of(recipe, sizes_of(recipe.data)) else 0)

@pytest.mark.parametrize("extra", [{"extra.backbones": ("convnet",)}, {"extra.category": 0.5}, {"extra.residual": 0.5, "recover.init": "patch"}])
def test_steps_of_the_loop_for_several_targets_are_measured(extra):
    recipe = override(TINY_RECIPE, {"network.width": 4} | extra); sizes = sizes_of(recipe.data)
    found = measure(recipe, sizes, "cpu", cap=0.1)
    assert all(cost["step"] + cost["image"] > 0 for cost in found["costs"].values()) and set(found["costs"]) == set(needed(recipe, sizes))
    if "extra.backbones" in extra: assert 0 < found["bytes"]["network (convnet)"] != found["bytes"]["network"]
    assert "recover" in table(recipe, sizes, found)

def test_devices_share_batches_and_students_and_nothing_else():
    one, shared = seconds(SCDD), seconds(SCDD, devices=8, key="shared")
    assert shared["recover"] == 7 * 1000 and shared["train/distilled_soft"] == 79 * 200 and shared["train/random_hard"] == 20 * 300
    assert shared["pretrain/ssl"] == 97 * 200 / 8 + 20 and shared["align/ssl"] == 196 * 100
    assert seconds(SCDD, devices=2, key="shared")["train/distilled_soft"] == 2 * 79 * 200
    assert seconds(SCDD, key="shared") == one
    assert [share(10, devices) for devices in (1, 5, 9, 10, 11)] == [1, 0.2, 0.2, 0.1, 0.1] and share(math.inf, 4) == 0.25 and share(1, 4) == 1

def test_a_recipe_is_planned_as_it_is_run():
    for recipe in RECIPES.values(): assert list(work_of(recipe, sizes_of(recipe.data))) == list(results_of(recipe))
    supervised = override(DIGITS, {"recover.teacher": "supervised", "relabel.teacher": "supervised"})
    assert "pretrain/ssl" not in seconds(supervised) and "ssl step" not in needed(supervised, sizes_of(supervised.data))

def test_what_else_a_recipe_may_ask_for():
    count = lambda values, name, base=DIGITS: {item.operation: (item.steps, item.images) for item in work_of(override(base, values), sizes_of(base.data))[name]}
    assert count({"relabel.store": True, "train.students": 2}, "train/distilled_soft")["replayed step"] == (2 * 700, 2 * 10_000)
    assert count({"relabel.store": True}, "relabel")["label step"] == (350, 5000) and count({"relabel.store": True, "relabel.kept_epochs": None}, "relabel")["label step"] == (700, 10_000) and "soft step" in count({"relabel.store": True}, "train/random_soft")
    assert count({"train.labels": "once"}, "train/random_soft") == count({"train.labels": "hard"}, "train/distilled_soft") == {"replayed step": (700, 10_000), "student forward": (0, 500)}   # no teacher in the loop
    assert count({"train.labels": "once", "relabel.store": True}, "relabel")["label step"] == (7, 100) and "label step" not in count({"train.labels": "hard", "relabel.store": True}, "relabel")
    assert count({"recover.init": "patch"}, "recover")["class of patches"] == (10, 500)
    assert count({"recover.ipc": 25}, "recover")["recovery step"] == (3 * 300, 75_000 + 0 * 1) and count({"recover.arrange": "single"}, "recover")["recovery step"] == (10 * 300, 30_000)
    assert count({"pretrain.measure_every": 0}, "pretrain/ssl") == {"ssl step": (200, 51_200)}
    assert count({"pretrain.epochs": 12}, "pretrain/ssl")["ssl look"] == (3, 0)
    assert count({"train.test_every": 30}, "train/distilled_soft")["student forward"] == (0, 4 * 500)
    assert count({"align.augment": True}, "align/ssl")["network forward"] == (0, 500)
    full = count({"student.width": 8, "hard.students": 3}, "train/full_data")
    assert full["full step"] == (3 * 150, 3 * 150 * 128) and full["full look"] == (3 * 2, 0)
    starts = lambda ipc: [item.starts for item in work_of(override(DIGITS, {"recover.ipc": ipc}), KNOWN["digits"])["recover"]]
    assert starts(10) == starts(20) == [1] and starts(25) == [2]  # 250 images are batches of 84, 83 and 83

def test_stored_results_count_as_the_recipe_says_and_need_no_data(monkeypatch, tmp_path):
    import scdd.data
    monkeypatch.setenv("SCDD_DATA", str(tmp_path)); monkeypatch.setattr(scdd.data, "load", None)
    for recipe in RECIPES.values():
        text = table(recipe, sizes_of(recipe.data), fake(recipe, 0.01, 1e-6), devices=8)
        assert "train/random_hard" in text and " GB" in text and "upper limit" in text
    assert sizes_of(Data("cifar100", classes=10)) == Sizes(5000, 1000, 10, 3, 32) and sizes_of(Data("imagenet1k", size=64)).size == 64

def test_sizes_of_a_folder_are_its_own(tmp_path):
    from PIL import Image
    for split, images in (("train", 3), ("test", 2)):
        for name in "ab":
            (tmp_path/"pets"/split/name).mkdir(parents=True)
            for i in range(images): Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path/"pets"/split/name/f"{i}.png")
    assert sizes_of(Data(str(tmp_path/"pets"))) == Sizes(6, 4, 2, 3, 20)
    assert sizes_of(Data("digits")) == Sizes(*(lambda train, test: (len(train), len(test), len(train.classes), train.channels, train.size))(*(__import__("scdd.data").data.load("digits", split) for split in ("train", "test"))))

@pytest.mark.parametrize("values", [{"relabel.dtype": "float16"}, {"train.labels": "once"}, {"relabel.dtype": "float32", "train.mix": "none", "train.crop": "resized"}, {"train.flip": True, "train.batch": 4}])
def test_label_bytes_are_those_that_are_written(tmp_path, values):
    from scdd.data import load, random_subset
    from scdd.models import build
    from scdd.relabel import store_labels
    recipe = override(DIGITS, {"relabel.store": True, "recover.ipc": 1, "train.epochs": 3} | values); data = load("digits")
    stored = store_labels(build(recipe.network, data, 0), random_subset(data, 1), recipe.train, recipe.relabel, device="cpu", folder=tmp_path/"labels")
    assert 0 <= stored.nbytes - label_bytes(recipe, KNOWN["digits"]) < 2000  # the names of the tensors
    assert label_bytes(override(recipe, {"relabel.store": False}), KNOWN["digits"]) == label_bytes(override(recipe, {"train.labels": "hard"}), KNOWN["digits"]) == 0
    assert disk(recipe, KNOWN["digits"], fake(recipe))["networks"] == 3000 and disk(DIGITS, KNOWN["digits"], fake(DIGITS))["distilled images"] == 100 * 256

def test_another_method_is_not_planned():
    with pytest.raises(UserError, match="herding are not planned"): work_of(with_peer(DIGITS, "herding"), KNOWN["digits"])

# --- measuring ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")

def made_up(monkeypatch, step, image, setup=0.0):
    "A machine whose seconds are known; every measurement is written down."
    asked = []
    monkeypatch.setattr(planning, "elapsed", lambda run, steps, device: run(steps))
    def make(images): asked.append(images); return lambda steps: setup + steps * (step + image * images)
    return make, asked

def test_costs_come_out_as_they_are(monkeypatch):
    make, asked = made_up(monkeypatch, 0.02, 0.001, setup=0.5)
    found = cost_of(make, 100, 8, CPU)
    assert found["step"] == pytest.approx(0.02) and found["image"] == pytest.approx(0.001) and asked == [8, 100, 25]
    found = cost_of(make, 100, 8, CPU, proportional=True)
    assert found["step"] == 0 and found["image"] == pytest.approx(0.0012)

def test_what_exceeds_the_cap_is_measured_with_fewer_images(monkeypatch):
    make, asked = made_up(monkeypatch, 0.0, 1.0)
    found = cost_of(make, 256, 2, CPU, cap=20)
    assert max(asked) == 5 and found["images"] == 5 and found["of"] == 256 and found["image"] == pytest.approx(1.0) and found["step"] == 0
    assert cost_of(make, 256, 64, CPU, cap=20)["images"] == 64  # fewer cannot be tried

def test_every_kind_of_step_has_its_measure_and_its_shape():
    assert set(DEPENDS) == set(MEASURES)
    assert FREE <= {name.split(".")[-1] for name in flatten(DIGITS)}

@pytest.mark.parametrize("values", [{}, {"pretrain.method": "mocov2", "recover.init": "patch", "relabel.store": True, "student.width": 16, "align.augment": True},
                                    {"pretrain.method": "swav", "recover.micro_batch": 2, "relabel.teacher_bn": "batch"}, {"pretrain.method": "dino", "student.name": "convnet"}, {"pretrain.method": "mocov3"}])
def test_every_step_can_be_measured(values):
    recipe = override(TINY_RECIPE, values); sizes = sizes_of(recipe.data)
    costs = measure(recipe, sizes, "cpu", cap=0.02)
    assert list(costs["costs"]) == needed(recipe, sizes) and costs["bytes"]["network"] > 1000
    assert all(found["step"] + found["image"] > 0 for found in costs["costs"].values()) and {"commit", "device", "date", "threads", "code"} <= set(costs)
    assert "recover" in table(recipe, sizes, costs)

# --- the command --------------------------------------------------------------------------------------------------------

def test_costs_go_to_a_file_and_back(tmp_path, monkeypatch, capsys):
    file, quick = tmp_path/"costs.json", planning.measure
    monkeypatch.setattr(planning, "measure", lambda *words, **more: quick(*words, cap=0.02, **more))
    assert main(["plan", "digits", *TINY, "--save", str(file)]) == 0
    first = capsys.readouterr().out.split("\n\n", 1)[1]
    assert read_json(file)["command"].startswith("scdd plan digits --data.classes 3") and {"scdd.run", "scdd.plan"} <= set(read_json(file)["code"])
    monkeypatch.setattr(planning, "measure", None)
    assert main(["plan", "digits", *TINY, "--costs", str(file)]) == 0
    assert capsys.readouterr().out.strip() == first.strip()
    more = [{"--recover.ipc": "4", "--recover.steps": "9"}.get(before, word) for before, word in zip([None, *TINY], TINY)]
    assert main(["plan", "digits", *more, "--train.epochs", "7", "--costs", str(file), "--devices", "3"]) == 0 and "3 devices" in capsys.readouterr().out
    assert main(["plan", "digits", *TINY, "--train.batch", "3", "--costs", str(file)]) == 2
    assert "train.batch 2, and here it is 3; measure again" in capsys.readouterr().err

@pytest.mark.parametrize("words, said", [
    ([], "needs the name of a recipe"), (["digit"], "did you mean 'digits'"), (["digits", "--devices", "0"], "--devices 0: give at least 1"), (["digits", "--devices", "two"], "whole number"),
    (["digits", "--out", "x"], "--out: there is no such option"), (["digits", "--seed", "1"], "--seed: there is no such option"), (["digits", "--recover.ipcc", "1"], "did you mean '--recover.ipc'"),
    (["digits", "--recover.ipc", "0"], "--recover.ipc 0: must be at least 1"), (["digits", "--data.classes", "11"], "has 10 classes"), (["digits", "--costs", "gone.json"], "gone.json: there is no such file"),
    (["digits", "--save", "."], "--save .: is a folder"), (["digits", "--save", "gone/costs.json"], "lies in one that is not there"), (["digits", "--data.name", "nosuch"], "nosuch: there is no such data set")])
def test_bad_input_gets_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("SCDD_CACHE", str(tmp_path)); (tmp_path/"data").mkdir(); (tmp_path/"data"/"one").mkdir(); monkeypatch.delenv("SCDD_DATA", raising=False)
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1

def test_costs_of_another_kind_are_refused(tmp_path):
    sizes, good = KNOWN["digits"], fake(DIGITS)
    without = json.loads(json.dumps(good)); without["costs"].pop("recovery step")
    other = json.loads(json.dumps(good)); other["costs"]["hard step"]["shape"]["hard.batch"] = 3
    for found, said in ((good | {"format": "scdd costs 0"}, "not a file of costs of this version"), ({}, "not a file of costs"), ([1], "not a file of costs"), (without, "no cost of a recovery step"), (other, "hard.batch 3, and here it is 64")):
        write_json(tmp_path/"costs.json", found)
        with pytest.raises(UserError, match=said) as error: read_costs(tmp_path/"costs.json", DIGITS, sizes)
        assert "costs.json" in str(error.value) and "\n" not in str(error.value)
    write_json(tmp_path/"costs.json", good)
    assert read_costs(tmp_path/"costs.json", DIGITS, sizes) == json.loads(json.dumps(good))
    with pytest.raises(UserError, match="data.size 16, and here it is 24"): read_costs(tmp_path/"costs.json", override(DIGITS, {"data.size": 24}), sizes_of(Data("digits", size=24)))

def test_a_plan_is_held_against_a_run(tmp_path, capsys):
    folder = run(TINY_RECIPE, tmp_path/"run", device="cpu", until="recover")
    facts = read_json(folder/"data"/"stage.json"); sizes = Sizes(facts["images"], facts["test_images"], 3, 1, 16)
    found = held_against(folder, fake(TINY_RECIPE, sizes=sizes))
    assert [row["result"] for row in found["rows"]] == ["data", "pretrain/ssl", "align/ssl", "recover"]
    assert found["rows"][-1] == {"result": "recover", "planned": 4, "took": read_json(folder/"recover"/"stage.json")["seconds"]}
    assert found["planned"] == sum(row["planned"] for row in found["rows"]) and found["took"] == sum(row["took"] for row in found["rows"])
    assert "in all" in planning.against(found)
    with pytest.raises(UserError, match="is no run folder"): held_against(tmp_path, fake(TINY_RECIPE))

def test_the_module_waits_for_torch():
    code = "import sys, scdd.plan; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

@pytest.mark.parametrize("words, said", [(["--network.name", "resnet99"], "--network.name resnet99"), (["--student.name", "resnet99"], "--student.name resnet99"), (["--extra.backbones", "nonet"], "--extra.backbones nonet")])
def test_a_network_that_there_is_not_is_named_as_it_was_typed_before_anything_is_measured(words, said, capsys, monkeypatch):
    monkeypatch.setattr(planning, "cost_of", lambda *_: pytest.fail("a step was measured"))
    assert main(["plan", "digits", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"scdd: {said}: there is no such network")
