"Run folders: nothing is made twice, nothing is half-written, and a killed run ends like one that was left alone."
import errno, json, os, shlex, shutil, signal, subprocess, sys, time
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
import numpy as np
import pytest
from scdd import cli, run as runs, site, tables
from scdd.files import UserError, read_json, write_json
from scdd.peers.compare import PEERS, changed, usual
from scdd.recipes import Architecture, DIGIT_VALUES, GRID, RECIPES, flatten, from_dict, grid_recipes, override
from scdd.recover import SyntheticSet
from scdd.train import Report, train_student
from scdd.run import behind, claim, elsewhere, key, locked, plan, run, typed, with_peer
from scdd.tables import EXPERIMENTS, caption, sweep
from scdd.cli import axes_of, main, parse, show

DIGITS = override(RECIPES["digits"], {"data.classes": 3, "recover.ipc": 2})

# --- stages of straw: they make nothing, at once, and remember that they were asked -----------------------------------

@pytest.fixture
def straw(monkeypatch):
    "Stages that only note their names; each can be told to fail."
    class Straw: made, fail = [], {}
    Straw.made = []; Straw.fail = {}
    curve = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    def make(work, name, folder, kept):
        if name in Straw.fail: raise Straw.fail[name]
        Straw.made.append((name, key(name, work.recipe, work.seed, work.train.fingerprint)))
        facts = {"curve": curve, "accuracy": 0.5, "image_bytes": 1, "peak_memory_bytes": 1, "fingerprint": work.train.fingerprint, "test_fingerprint": work.test.fingerprint}
        if name.startswith("train/"): facts["result"] = {"mean": 0.5, "std": None, "n": 1, "values": [0.5], "curves": [curve], "seconds": 0.0}
        return facts, name
    monkeypatch.setattr(runs, "steps", lambda work: {name: (lambda folder, kept, name=name: make(work, name, folder, kept)) for name in plan(work.recipe)})
    monkeypatch.setattr("scdd.train.page", lambda *_: "<html>")  # drawing is chapter 09's business
    monkeypatch.setattr(runs.Work, "distilled", property(lambda work: work.random(0)))
    return Straw

names = lambda straw: [name for name, _ in straw.made]

def test_a_run_makes_everything_once(straw, tmp_path):
    report = run(DIGITS, tmp_path/"run")
    assert names(straw) == list(plan(DIGITS)) and report.accuracy["full_data"]["mean"] == 0.5
    before = (tmp_path/"run/report.html").stat().st_mtime_ns
    assert run(DIGITS, tmp_path/"run").accuracy == report.accuracy
    assert len(straw.made) == len(plan(DIGITS)) and (tmp_path/"run/report.html").stat().st_mtime_ns == before
    assert not list((tmp_path/"run").rglob(".*.part"))

def test_until_makes_no_more_than_it_needs(straw, tmp_path):
    recipe = override(DIGITS, {"relabel.teacher": "supervised"})
    assert run(recipe, tmp_path/"run", until="recover") == tmp_path/"run"
    assert names(straw) == ["data", "pretrain/ssl", "align/ssl", "recover"]
    run(recipe, tmp_path/"run")
    assert sorted(names(straw)) == sorted(plan(recipe))

def test_a_failed_stage_leaves_nothing_and_is_made_next_time(straw, tmp_path):
    straw.fail["relabel"] = RuntimeError("the power went")
    with pytest.raises(RuntimeError): run(DIGITS, tmp_path/"run")
    assert not (tmp_path/"run/relabel").exists() and not list((tmp_path/"run").rglob(".*.part"))
    straw.fail.clear(); run(DIGITS, tmp_path/"run")
    assert sorted(names(straw)) == sorted(plan(DIGITS))

def test_ctrl_c_keeps_what_is_done(straw, tmp_path, capsys):
    straw.fail["recover"] = KeyboardInterrupt()
    words = ["run", "digits", "--data.classes", "3", "--recover.ipc", "2", "--out", str(tmp_path/"run")]
    assert main(words) == 130 and "stopped; the same command goes on" in capsys.readouterr().err
    straw.fail.clear()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "data\n" not in out and f"report: {tmp_path/'run/report.html'}" in out and "distilled, soft labels" in out

def test_another_recipe_or_seed_is_refused(straw, tmp_path):
    run(DIGITS, tmp_path/"run", until="data")
    for recipe, seed, words in ((override(DIGITS, {"recover.steps": 7}), 0, "--recover.steps 300, and now it is 7"), (DIGITS, 1, "--seed 0, and now it is 1")):
        with pytest.raises(UserError) as error: run(recipe, tmp_path/"run", seed=seed)
        assert words in str(error.value) and "give another --out" in str(error.value)
    with pytest.raises(UserError, match="was made by the recipe digits, not cifar100-mini"): claim(tmp_path/"run", RECIPES["cifar100-mini"], 0)

def test_a_folder_of_something_else_is_refused(straw, tmp_path):
    (tmp_path/"thesis.tex").write_text("…")
    with pytest.raises(UserError, match="holds thesis.tex and no recipe.json"): run(DIGITS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.tex"]

@pytest.mark.parametrize("note", ["recipe.json", "data/stage.json", "recover/stage.json"])
def test_a_note_cut_short_is_named(straw, tmp_path, note, capsys):
    run(DIGITS, tmp_path, until="recover")
    text = (tmp_path/note).read_text(); (tmp_path/note).write_text(text[:len(text) // 2])
    with pytest.raises(UserError) as error: run(DIGITS, tmp_path)
    assert str(tmp_path/note) in str(error.value) and "\n" not in str(error.value)

def test_changed_images_are_noticed(straw, tmp_path):
    run(DIGITS, tmp_path, until="data")
    facts = read_json(tmp_path/"data/stage.json"); write_json(tmp_path/"data/stage.json", facts | {"fingerprint": "of other images"})
    with pytest.raises(UserError, match="was begun with other train images of digits"): run(DIGITS, tmp_path)

def test_missing_data_leave_nothing(tmp_path, capsys):
    assert main(["run", "digits", "--data.name", str(tmp_path/"nowhere"), "--out", str(tmp_path/"run")]) == 2
    assert main(["run", "digits", "--recover.ipc", "4000", "--out", str(tmp_path/"run")]) == 2
    assert main(["run", "digits", "--device", "cudo", "--out", str(tmp_path/"run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 3 and "nowhere" in error and "4000" in error and "cudo" in error and not (tmp_path/"run").exists()

def test_full_disk(straw, tmp_path, monkeypatch, capsys):
    words = ["run", "digits", "--data.classes", "3", "--recover.ipc", "2", "--out", str(tmp_path/"run")]
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) if Path(b).name == "recover" else os.rename(a, b))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error and error.count("\n") == 1 and not (tmp_path/"run/recover").exists() and not list((tmp_path/"run").rglob(".*.part"))
    monkeypatch.undo()

@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/3: file write failed"),
                                   RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_full_disk_as_torch_and_safetensors_say_it(straw, tmp_path, capsys, error):
    straw.fail["recover"] = error
    assert main(["run", "digits", "--data.classes", "3", "--recover.ipc", "2", "--out", str(tmp_path/"run")]) == 2
    assert "the disk is full" in capsys.readouterr().err

def test_one_process_at_a_time(tmp_path):
    code = f"import sys, time\nfrom scdd.run import locked\nfrom pathlib import Path\nwith locked(Path({str(tmp_path)!r})): print('in', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=f"another run is at work in it \\(process {other.pid}\\)"):
            with locked(tmp_path): pass
    finally: other.kill(); other.wait()
    with locked(tmp_path): assert (tmp_path/".lock").read_text() == str(os.getpid())  # a lock dies with its process

def test_leftovers_of_a_killed_process_are_removed(straw, tmp_path):
    (tmp_path/".recover.12345.part").mkdir(parents=True)
    run(DIGITS, tmp_path, until="data")
    assert not (tmp_path/".recover.12345.part").exists()

# --- keys and reuse -----------------------------------------------------------------------------------------------------

def changed_by(values): 
    other = override(DIGITS, values)
    return {name for name in plan(other) if name not in plan(DIGITS) or key(name, DIGITS, 0, "f") != key(name, other, 0, "f")}

def test_keys_follow_the_plan():
    judged = {"train/distilled_soft", "train/distilled_hard", "train/random_soft", "train/random_hard"}
    assert changed_by({"recover.steps": 7}) == {"recover", "relabel", "train/distilled_soft", "train/distilled_hard"}
    assert changed_by({"recover.ipc": 5}) == {"recover", "relabel", *judged}
    assert changed_by({"hard.epochs": 7}) == {"train/distilled_hard", "train/random_hard"}
    assert changed_by({"relabel.teacher_bn": "batch"}) == {"relabel", "train/distilled_soft", "train/random_soft"}
    assert changed_by({"relabel.teacher": "supervised"}) == {"relabel", "train/distilled_soft", "train/random_soft"}
    assert changed_by({"relabel.dtype": "float32"}) == changed_by({"relabel.store": True}) == {"relabel", "train/distilled_soft"}  # the random images' labels are never stored
    assert changed_by({"train.labels": "once"}) == changed_by({"train.labels": "hard"}) == {"relabel", "train/distilled_soft", "train/random_soft"}
    assert changed_by({"full.epochs": 7}) == {"train/full_data"}
    assert changed_by({"data.classes": 4}) == set(plan(DIGITS))
    assert all(key(name, DIGITS, 0, "f") != key(name, DIGITS, 1, "f") and key(name, DIGITS, 0, "f") != key(name, DIGITS, 0, "g") for name in plan(DIGITS))

def test_what_is_held_out_or_added_changes_keys_and_at_rest_it_does_not():
    assert changed_by({"data.held_out": 0.2}) == set(plan(DIGITS))
    assert changed_by({"recover.init": "patch", "extra.residual": 0.5}) == {"recover", "relabel", "train/distilled_soft", "train/distilled_hard"}
    assert changed_by({"extra.backbones": ("convnet",)}) == {"pretrain/convnet", "recover", "relabel", "train/distilled_soft", "train/distilled_hard"}
    assert not any("extra" in reads for _, reads in plan(DIGITS).values())
    own, theirs = (plan(override(DIGITS, {"extra.backbones": ("convnet",), "recover.teacher": arm})) for arm in ("ssl", "supervised"))
    assert own["pretrain/convnet"][1] == ["network", "pretrain", "align"] and theirs["pretrain/convnet"][1] == ["network", "supervised"]
    assert theirs["recover"][0] == ["pretrain/supervised", "pretrain/convnet"]

EXTRA = {"data.held_out": 0.2, "network.width": 4, "student.width": 4, "pretrain.epochs": 1, "align.epochs": 1, "supervised.epochs": 1, "full.epochs": 1, "recover.steps": 3, "recover.init": "patch",
         "train.epochs": 1, "hard.epochs": 1, "extra.residual": 0.5, "extra.category": 0.5, "extra.backbones": ("convnet",)}

def test_what_chapter_24_adds_is_added_to_a_self_supervised_network(tmp_path, capsys):
    from scdd.data import load
    from scdd.models import load_network
    from scdd.peers.decoupled import synthesise
    recipe = override(DIGITS, EXTRA); report = run(recipe, tmp_path/"a")
    assert "with extra.residual, extra.category, extra.backbones" in capsys.readouterr().out and report.recipe["data"]["held_out"] == 0.2
    networks = [load_network(tmp_path/"a"/name/"network.safetensors") for name in ("align/ssl", "pretrain/convnet")]
    assert [one.about["method"] for one in networks] == ["simclr", "simclr"] and networks[1].architecture.name == "convnet"
    made = synthesise(networks, load(recipe.data), runs.with_extra(override(recipe, {"recover.flip": False})), 0, "cpu")
    assert (made.images == SyntheticSet.load(tmp_path/"a"/"recover").images).all()
    facts = read_json(tmp_path/"a"/"data"/"stage.json")
    assert facts["images"] + facts["test_images"] == len(load(DIGITS.data)) and "accuracy on held-out training images" in runs.summary(report, tmp_path/"a")

@pytest.mark.parametrize("values, words", [
    ({"extra.backbones": ("convnex",)}, "convnex"), ({"extra.residual": 0.5, "recover.init": "patch", "recover.keep": "best"}, "--recover.keep best: losses of several"),
    ({"extra.category": 0.5, "recover.micro_batch": 2}, "--recover.micro_batch: only recovery from one network"), ({"data.held_out": 0.001}, "--data.held_out 0.001: that is 0 of")])
def test_additions_that_recovery_cannot_have_are_refused_at_once(values, words, tmp_path):
    with pytest.raises(UserError, match=words) as error: run(override(DIGITS, values), tmp_path/"a")
    assert "\n" not in str(error.value) and "--config" not in str(error.value) and not (tmp_path/"a").exists()

def test_full_data_is_the_supervised_network_where_they_agree():
    assert plan(DIGITS)["train/full_data"][0] == ["pretrain/supervised"]
    other = override(DIGITS, {"student.width": 8})
    assert plan(other)["train/full_data"][0] == ["data"] and "pretrain/supervised" not in plan(other)

def test_reuse_takes_over_what_does_not_change(straw, tmp_path, capsys):
    run(DIGITS, tmp_path/"a"); straw.made.clear()
    run(override(DIGITS, {"recover.steps": 7}), tmp_path/"b", reuse=[tmp_path/"a"])
    assert set(names(straw)) == {"recover", "relabel", "train/distilled_soft", "train/distilled_hard"}
    assert f"taken from {tmp_path/'a'}" in capsys.readouterr().out
    assert elsewhere("recover", "no such key", [tmp_path/"a", tmp_path/"nowhere"]) is None

def test_grid_makes_nothing_twice_and_goes_on(straw, tmp_path):
    words = ["run", "digits", "--data.classes", "3", "--recover.ipc", "2", "--out", str(tmp_path), "--grid"]
    straw.fail["train/distilled_soft"] = KeyboardInterrupt()
    assert main(words) == 130 and not (tmp_path/"grid.json").exists()
    straw.fail.clear()
    assert main(words) == 0
    count = lambda name: names(straw).count(name)
    assert len(set(straw.made)) == len(straw.made)  # every result has been made once
    assert count("pretrain/ssl") == count("pretrain/supervised") == count("data") == count("train/random_hard") == count("train/full_data") == 1
    assert count("recover") == count("train/distilled_hard") == count("train/random_soft") == 2 and count("train/distilled_soft") == 4
    rows = read_json(tmp_path/"grid.json")["rows"]
    assert [row["cell"] for row in rows] == list(grid_recipes(DIGITS)) and "<td>50.0</td>" in (tmp_path/"grid.html").read_text()
    made = len(straw.made); assert main(words) == 0 and len(straw.made) == made
    assert "| supervised | noise | simclr | 50.0 |" in show(tmp_path)

def test_nothing_is_taken_from_a_run_with_another_test_set(tmp_path, capsys):
    from test_data import image, tree
    data = tree(tmp_path/"zoo", train=6, size=(16, 16)); recipe = override(RECIPES["digits"], {"data.name": str(data), "recover.ipc": 2})
    run(recipe, tmp_path/"a", until="data"); image(7, (16, 16)).save(data/"test"/"ant"/"new.png")
    run(recipe, tmp_path/"b", until="data", reuse=[tmp_path/"a"])
    said = capsys.readouterr().out
    assert f"{tmp_path/'a'}: has other test images; nothing is taken from it" in said and "taken from" not in said.replace("nothing is taken from", "")
    run(recipe, tmp_path/"c", until="data", reuse=[tmp_path/"b"])
    assert f"taken from {tmp_path/'b'}" in capsys.readouterr().out

SWEEP = ["sweep", "digits", "recover.r_bn", "0", "1", "recover.init", "noise", "patch", "--data.classes", "3", "--recover.ipc", "2"]

def test_a_sweep_makes_nothing_twice_and_goes_on(straw, tmp_path, capsys):
    words = [*SWEEP, "--out", str(tmp_path)]
    straw.fail["train/distilled_soft"] = KeyboardInterrupt()
    assert main(words) == 130 and not (tmp_path/"sweep.json").exists()
    straw.fail.clear()
    assert main(words) == 0 and len(set(straw.made)) == len(straw.made)
    count = lambda name: names(straw).count(name)
    assert count("pretrain/ssl") == count("data") == count("train/random_soft") == count("train/random_hard") == 1 and count("recover") == count("train/distilled_soft") == 4
    found = read_json(tmp_path/"sweep.json")
    assert [(row["recover.r_bn"], row["recover.init"]) for row in found["rows"]] == [("0.0", "noise"), ("0.0", "patch"), ("1.0", "noise"), ("1.0", "patch")]
    assert found["command"] == "scdd sweep digits recover.r_bn 0.0 1.0 recover.init noise patch --data.classes 3 --recover.ipc 2"
    for row in found["rows"]:
        alone = read_json(tmp_path/"sweep"/row["cell"]/"report.json")
        assert row[tables.SECONDS] == round(sum(alone["seconds"].values()), 1) and row["teachers"] == alone["teachers"]  # what each run is by itself
    assert "| 1.0 | patch | 50.0 |" in show(tmp_path) and "| 1.0 | patch | 50.0 |" in capsys.readouterr().out
    made = len(straw.made); assert main([*found["command"].split()[1:], "--out", str(tmp_path)]) == 0 and len(straw.made) == made   # the stored command is the same sweep

def test_a_longer_sweep_keeps_what_the_shorter_made(straw, tmp_path):
    axes = lambda *values: {"pretrain.method": values}
    sweep(DIGITS, axes("simclr", "swav"), tmp_path); made = len(straw.made)
    rows = sweep(DIGITS, axes("simclr", "swav", "dino"), tmp_path)
    assert [row["cell"] for row in rows] == ["simclr", "swav", "dino"] and names(straw)[made:].count("pretrain/ssl") == 1
    assert read_json(tmp_path/"sweep/dino/recipe.json")["recipe"]["pretrain"]["prototypes"] == DIGIT_VALUES["dino"]["prototypes"]   # a method brings its values

def test_a_sweep_of_labels_says_what_they_weigh(straw, tmp_path, monkeypatch):
    monkeypatch.setattr("scdd.run.weight", lambda folder: 4321 if "relabel" in str(folder) else 0)
    rows = sweep(DIGITS, {"relabel.store": (False, True)}, tmp_path)
    assert [row["kB of labels"] for row in rows] == [4.321, 4.321]
    assert "kB of labels" not in sweep(DIGITS, {"recover.r_bn": (0.0,)}, tmp_path/"other")[0]

def test_a_sweep_of_kinds_of_labels_stores_what_each_needs(tmp_path, capsys):
    small = {"network.width": 4, "student.width": 4, "pretrain.epochs": 1, "supervised.epochs": 1, "full.epochs": 1, "align.epochs": 1, "recover.steps": 2, "relabel.store": True, "train.epochs": 3, "hard.epochs": 1}
    rows = sweep(override(DIGITS, small), {"train.labels": ("hard", "once", "soft")}, tmp_path)
    said, size = capsys.readouterr().out, [row["kB of labels"] for row in rows]
    assert [row["train.labels"] for row in rows] == ["hard", "once", "soft"] and size[0] == 0 and 0 < size[1] < size[2]
    assert [(tmp_path/"sweep"/name/"relabel"/"labels").is_dir() for name in ("hard", "once", "soft")] == [False, True, True]
    assert said.count("; one label of each image stored") == 1 and said.count("; 3 of 3 epochs stored") == 1
    assert size[1] * 1000 == sum(path.stat().st_size for path in (tmp_path/"sweep/once/relabel/labels").iterdir())
    weighed = {name: tables.if_stored(from_dict(read_json(tmp_path/"sweep"/name/"recipe.json")["recipe"]), read_json(tmp_path/"sweep"/name/"data"/"stage.json")) for name in ("hard", "once", "soft")}
    assert weighed["hard"] == 0 and all(0 < weighed[name] < 1000 * size[at] < weighed[name] + 3000 for at, name in ((1, "once"), (2, "soft")))   # but for labels.json and the heads of files
    assert "Hard labels: " in (tmp_path/"sweep/hard/report.html").read_text() and "One soft label for each image, by the self-supervised teacher" in (tmp_path/"sweep/once/report.html").read_text()

def tiny_tree(folder):
    "A tree of three class folders with four grey 8×8 images each."
    from PIL import Image
    for split in ("train", "test"):
        for name in "abc":
            (folder/split/name).mkdir(parents=True)
            for i in range(4): Image.new("L", (8, 8), 20 * i + ord(name)).save(folder/split/name/f"{i}.png")
    return str(folder)

def test_the_grid_of_methods_makes_nothing_twice(straw, tmp_path, monkeypatch):
    monkeypatch.setattr("scdd.recipes.GRID", GRID | {"pretrain.method": ("mocov2", "dino")})
    words = ["run", "digits", "--data.name", tiny_tree(tmp_path/"tree"), "--recover.ipc", "2", "--out", str(tmp_path/"run"), "--grid"]
    straw.fail["train/distilled_soft"] = KeyboardInterrupt()
    assert main(words) == 130 and not (tmp_path/"run/grid.json").exists()
    straw.fail.clear()
    assert main(words) == 0 and len(set(straw.made)) == len(straw.made)
    count = lambda name: names(straw).count(name)
    assert count("pretrain/ssl") == 2 and count("pretrain/supervised") == count("data") == count("train/random_hard") == count("train/full_data") == 1
    assert count("recover") == count("train/distilled_hard") == 6  # two methods and the supervised network, from noise and from patches
    assert count("train/distilled_soft") == 10 and count("train/random_soft") == 3
    assert "| dino | patch | supervised | 50.0 |" in show(tmp_path/"run")

@pytest.fixture
def asked(monkeypatch):
    "An experiment that only notes what it was asked."
    calls, module = [], ModuleType("scdd.experiments.straw")
    def measure(recipe, folder, data, device, seed, reuse):
        calls.append((recipe.recover.ipc, Path(folder).name, data, device, seed, reuse))
        return [{"cell": "a", "network": "resnet18", "gradient": 0.25, "seconds": 2.15, "commit": "abc"}, {"cell": "b", "network": "resnet34", "accuracy": {"mean": 0.5, "std": 0.01, "n": 3}, "commit": "abc"}]
    module.straw = measure
    monkeypatch.setitem(sys.modules, "scdd.experiments.straw", module); monkeypatch.setitem(EXPERIMENTS, "straw", "what straw measures")
    return calls

def test_an_experiment_by_its_name(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment"]) == 0 and "straw        what straw measures" in capsys.readouterr().out
    assert main(["experiment", "straw", "digits", "--recover.ipc", "2", "--seed", "3"]) == 0 and asked == [(2, "digits-straw", None, "auto", 3, ())]
    assert capsys.readouterr().out.splitlines()[:4] == ["| network | accuracy | gradient | seconds |", "| --- | --- | --- | --- |", "| resnet18 |  | 0.25 | 2.1 |", "| resnet34 | 50.0 ± 1.0 |  |  |"]
    found = read_json(tmp_path/"runs/digits-straw/experiment.json")
    assert found["command"] == "scdd experiment straw digits --recover.ipc 2 --seed 3" and found["commit"] == "abc" and found["recipe"]["seed"] == 3 and found["versions"]["torch"]
    assert main(["experiment", "straw", "digits", "--recover.ipc", "4", "--out", "runs/digits-straw"]) == 2 and "was made with --recover.ipc 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["experiment", "straw", "digits"]) == 2 and "scdd experiment straw: works in one process" in capsys.readouterr().err and len(asked) == 1

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_called(name):
    assert list(signature(getattr(import_module(f"scdd.experiments.{name}"), name)).parameters)[:6] == ["recipe", "folder", "data", "device", "seed", "reuse"]

def test_a_sweep_is_kept_under_its_options(straw, tmp_path, monkeypatch):
    assert main([*SWEEP, "--out", str(tmp_path/"run")]) == 0
    monkeypatch.setattr(site, "root", lambda: tmp_path)
    (tmp_path/"nbs/experiments/results").mkdir(parents=True); site.keep(tmp_path/"run")
    assert len(read_json(tmp_path/"nbs/experiments/results/digits-recover.r_bn-recover.init.json")["rows"]) == 4

def test_a_grid_is_kept_as_a_result(straw, tmp_path, monkeypatch):
    assert main(["run", "digits", "--data.classes", "3", "--recover.ipc", "2", "--out", str(tmp_path/"run"), "--grid"]) == 0
    monkeypatch.setattr(site, "root", lambda: tmp_path)
    (tmp_path/"nbs/experiments/results").mkdir(parents=True); site.keep(tmp_path/"run")
    kept = read_json(tmp_path/"nbs/experiments/results/digits-grid.json")
    assert len(kept["rows"]) == 4 and kept["command"].startswith("scdd run digits") and kept["command"].endswith("--grid") and "commit" in kept

def test_results_name_what_has_changed_since(straw, tmp_path, monkeypatch):
    assert main([*SWEEP, "--out", str(tmp_path/"run")]) == 0
    monkeypatch.setattr(site, "root", lambda: tmp_path); kept = tmp_path/"nbs/experiments/results"
    kept.mkdir(parents=True); site.keep(tmp_path/"run")
    found = read_json(kept/"digits-recover.r_bn-recover.init.json")
    assert {"scdd.run", "scdd.recover", "scdd.bn", "scdd.files"} <= set(found["code"]) and found["date"] == time.strftime("%Y-%m-%d")
    assert "scdd sweep digits recover.r_bn" in site.results() and site.results().endswith("from the code as it stands")
    found["code"] |= {"scdd.bn": "00000000", "scdd.gone": "00000000"}; write_json(kept/"digits-recover.r_bn-recover.init.json", found)
    assert site.results().endswith("changed since: bn, gone")

def test_every_kept_result_says_its_command_its_day_and_its_code():
    for path in (site.root()/"nbs/experiments/results").glob("*.json"):
        found = read_json(path)
        if path.stem == "lessons": continue                                                       # seconds of the notebooks, by the tests
        assert found["code"] and found["commit"], path.name
        if "recipe" in found: assert found["date"] and "scdd.run" in found["code"], path.name

def test_seconds_survive_an_interruption(tmp_path):
    def attempt(fail):
        with runs.stopwatch(tmp_path) as seconds:
            time.sleep(0.2); (tmp_path/"checkpoint.pt").write_text("…"); time.sleep(1.2 if fail else 0.3)
            if fail: raise KeyboardInterrupt
            return seconds()
    with pytest.raises(KeyboardInterrupt): attempt(True)
    assert 0.65 <= attempt(False) <= 1.6   # 0.2 s that the checkpoint kept, and 0.5 s; the 1.2 s after it were lost

# --- the real stages ----------------------------------------------------------------------------------------------------

TINY = ("--data.classes 3 --network.width 8 --student.width 8 --pretrain.epochs 3 --pretrain.batch 128 --pretrain.measure_every 0 --supervised.epochs 2 "
        "--full.epochs 2 --supervised.measure_every 0 --full.measure_every 0 --align.epochs 2 --recover.steps 30 --recover.ipc 2 "
        "--train.epochs 10 --hard.epochs 10 --train.batch 2 --hard.batch 2 --recover.compile off").split()
OFTEN = "import sys, scdd.files; scdd.files.Checkpoint.__init__.__defaults__ = (None, 0.0); from scdd.cli import main; sys.exit(main(sys.argv[1:]))"  # checkpoints at every step

def start(folder): return subprocess.Popen([sys.executable, "-c", OFTEN, "run", "digits", *TINY, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

def begun(folder):
    "Whether a stage has kept anything yet; files may come and go meanwhile."
    return any(name.endswith((".pt", ".safetensors")) and not name.startswith(".") for _, _, names in os.walk(folder) for name in names)

def kill_when(process, there, within=900):
    "kill -9 as soon as something is there; whether it came to that."
    end = time.monotonic() + within
    while process.poll() is None and time.monotonic() < end:
        if there(): process.kill(); process.communicate(); return True
        time.sleep(0.002)
    raise AssertionError(f"the run ended before it was to be killed: {process.communicate()}")

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A run that nobody disturbs."
    folder = tmp_path_factory.mktemp("alone")/"run"
    out, error = (process := start(folder)).communicate(timeout=900)
    assert process.returncode == 0, error
    return folder, out

def test_a_killed_run_ends_like_one_left_alone(alone, tmp_path):
    folder, kept = tmp_path/"run", tmp_path/"run/.checkpoints"
    for stage in ("pretrain/ssl", "recover", "train/distilled_soft"):
        assert kill_when(start(folder), lambda: begun(kept/stage))
        assert not (folder/stage).exists() and (folder/"recipe.json").is_file() and not (folder/"report.json").exists()
    out, error = (process := start(folder)).communicate(timeout=900)
    assert process.returncode == 0, error
    assert "pretrain simclr" not in out and "distilled, soft labels" in out  # the first was done before the last attempt
    killed, whole = (read_json(place/"report.json") for place in (folder, alone[0]))
    assert killed["accuracy"] == whole["accuracy"] and killed["recipe"] == whole["recipe"]
    for name in ("pretrain/ssl/network.safetensors", "align/ssl/network.safetensors"):
        from safetensors.torch import load_file
        ours, theirs = load_file(folder/name), load_file(alone[0]/name)
        assert all((ours[k] == theirs[k]).all() for k in theirs), name
    assert {path.name: path.read_bytes() for path in (folder/"recover").rglob("*.png")} == {path.name: path.read_bytes() for path in (alone[0]/"recover").rglob("*.png")}
    assert not list(folder.rglob(".*.part")) and not list(folder.rglob("checkpoint.pt"))

def test_the_report_is_complete(alone):
    folder, out = alone
    report = read_json(folder/"report.json")
    assert set(report["accuracy"]) == set(runs.FIGURES) and {"recipe", "commit", "device", "versions", "seconds", "bytes", "peak_memory_bytes"} <= set(report)
    for figure in report["accuracy"].values(): assert 0 <= figure["mean"] <= 1 and figure["std"] is None and figure["n"] == 1
    assert set(report["seconds"]) == set(plan(DIGITS)) and report["peak_memory_bytes"] > 1e8 and report["command"].startswith("scdd run digits --data.classes 3")
    page = (folder/"report.html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page
    assert out.splitlines()[-1] == f"report: {folder/'report.html'}" and "all real images" in out

def test_a_network_cut_short_is_named(alone, tmp_path, capsys):
    import shutil
    shutil.copytree(alone[0], tmp_path/"run")
    for name in ("recover", "relabel", "train", "report.json", "report.html"): runs.remove(tmp_path/"run"/name)
    path = tmp_path/"run/align/ssl/network.safetensors"; data = path.read_bytes(); path.write_bytes(data[:len(data) // 2])
    assert main(["run", "digits", *TINY, "--out", str(tmp_path/"run")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1 and not (tmp_path/"run/recover").exists()

# --- other methods ------------------------------------------------------------------------------------------------------

SMALL_RUN = {"pretrain.epochs": 2, "supervised.epochs": 2, "full.epochs": 2, "align.epochs": 2, "recover.steps": 4, "recover.ipc": 2, "train.epochs": 2, "hard.epochs": 2,
             "pretrain.measure_every": 0, "data.classes": 3, "network.width": 8, "student.width": 8}
SMALL_WORDS = [word for name, value in SMALL_RUN.items() for word in (f"--{name}", str(value))]
PEER_WORDS = [word for name, value in SMALL_RUN.items() if name == "recover.ipc" or not name.startswith("recover.") for word in (f"--{name}", str(value))]
HURRIED = {"experts.count": 2, "experts.epochs": 5, "epochs": 1, "iterations": 2, "crops": 2}  # values of methods, where they have them

def hurried(method, recipe):
    "A method's own values, in less time."
    config = usual(method, recipe)
    return changed(config, {name: value for name, value in HURRIED.items() if name in flatten(config)})

@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    "A finished small run of the recipe itself."
    folder = tmp_path_factory.mktemp("ours")/"run"
    assert main(["run", "digits", *SMALL_WORDS, "--out", str(folder)]) == 0
    return folder

@pytest.mark.parametrize("method", PEERS)
def test_every_method_in_a_run(method, ours, tmp_path):
    recipe = override(RECIPES["digits"], SMALL_RUN)
    recipe = with_peer(recipe, method, hurried(method, recipe))
    report = run(recipe, tmp_path/"run", reuse=[ours])
    assert all(0 <= figure["mean"] <= 1 for figure in report.accuracy.values()) and report.recipe["peer"]["method"] == method
    theirs = read_json(ours/"report.json")["accuracy"]
    assert all(report.accuracy[figure] == theirs[figure] for figure in ("random_soft", "random_hard", "full_data"))  # nothing else has changed
    if method == "random": assert report.accuracy["distilled_hard"]["values"] == theirs["random_hard"]["values"] and report.accuracy["distilled_soft"]["values"] == theirs["random_soft"]["values"]
    made = SyntheticSet.load(tmp_path/"run/recover")
    assert made.labels.tolist() == [0, 0, 1, 1, 2, 2] and made.provenance["method"] == method
    claim(tmp_path/"run", recipe, 0)  # the same recipe after JSON
    assert not list((tmp_path/"run").rglob("checkpoint.pt"))

@pytest.mark.parametrize("name, silent", [("mine", True), ("digits", False)])
def test_a_run_says_where_a_paper_gave_no_values(name, silent, ours, tmp_path, capsys):
    recipe = replace(override(RECIPES["digits"], SMALL_RUN), name=name)
    recipe = with_peer(recipe, "mtt", hurried("mtt", override(RECIPES["digits"], SMALL_RUN)))
    run(recipe, tmp_path/"run", reuse=[ours], until="recover")
    assert ("mtt: no values were published for digits at IPC 2" in "".join(capsys.readouterr())) is silent

def test_the_typed_command_makes_the_same_recipe():
    recipe = with_peer(override(RECIPES["digits"], SMALL_RUN), "mtt", changed(usual("mtt", RECIPES["digits"]), {"iterations": 3, "zca": True}))
    words = shlex.split(typed(recipe, 0))
    assert words[:4] == ["scdd", "distill", "mtt", "digits"] and "--config.zca" in words
    assert parse("distill", words[2:])[0] == recipe

def test_compare_makes_one_row_for_each_method(ours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "apart", lambda words, turn: main(words))
    monkeypatch.setattr("scdd.peers.compare.usual", hurried)
    words = ["compare", "digits", *SMALL_WORDS, "--methods", "random", "cafe", "--reuse", str(ours), "--out", str(tmp_path/"all")]
    assert main(words) == 0
    found = read_json(tmp_path/"all/compare.json")
    assert [row["images by"] for row in found["rows"]] == ["scdd", "random", "cafe"] and found["command"].endswith("--methods random cafe") and "commit" in found
    assert len({json.dumps(row["random_hard"]) for row in found["rows"]}) == 1 and all(row["peak MB"] > 0 and row["kB of images"] > 0 for row in found["rows"])
    assert len({row["kB of soft labels"] for row in found["rows"]}) == 1 and found["rows"][0]["kB of soft labels"] > 0   # made while students train, and weighed as if they were stored
    report = Report.load(tmp_path/"all/random"); slow = replace(report, seconds=report.seconds | {"data": 9.0})
    assert tables.compare_row("random", tmp_path/"all/random", with_peer(parse("compare", words[1:])[0], "random"), slow)["seconds of networks"] == 0  # to read the images is no network
    assert found["rows"][0]["seconds of networks"] > 0 == found["rows"][1]["seconds of networks"]
    assert "values" not in found["rows"][0] and found["rows"][2]["values"] == with_peer(parse("compare", words[1:])[0], "cafe").peer.config  # what the method was told
    capsys.readouterr()
    assert main(words) == 0 and "| cafe |" in (out := capsys.readouterr().out) and "taken from" not in out  # nothing is made again
    assert "| random |" in show(tmp_path/"all") and ">cafe<" in (tmp_path/"all/compare.html").read_text()

def test_a_failure_of_one_method_ends_the_comparison(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda words, env: type("Done", (), {"returncode": 2}))
    with pytest.raises(UserError, match="scdd distill dc digits ended with exit code 2"): tables.apart(["distill", "dc", "digits"])
    monkeypatch.setattr(subprocess, "run", lambda words, env: type("Done", (), {"returncode": 130}))
    with pytest.raises(KeyboardInterrupt): tables.apart(["distill", "dc", "digits"])

def test_a_method_takes_its_values_for_what_was_typed():
    "For the images per class, and in small recipes for what recovery was told."
    def config(*words): return parse("distill", list(words))[0].peer.config
    assert config("mtt", "cifar100-scdd", "--recover.ipc", "10")["steps"] == 20 and config("mtt", "cifar100-scdd")["steps"] == 80
    assert config("mtt", "cifar100-scdd", "--config.starts", "7", "--recover.ipc", "10")["starts"] == 7
    assert cli.without_config(["--config.rate", "-1", "--recover.ipc", "2", "--learned", "used", "--train.momentum", "-1", "--help"]) == ["--recover.ipc", "2", "--train.momentum", "-1"]
    assert config("sre2l", "digits", "--recover.steps", "50")["recover"]["steps"] == 50 != config("sre2l", "digits")["recover"]["steps"]
    for words in (["mtt", "cifar100-scdd", "--recover.ipc", "10"], ["sre2l", "digits", "--recover.steps", "50", "--network.width", "8"], ["fadrm", "cifar100-best"]):
        recipe = parse("distill", words)[0]
        assert parse("distill", shlex.split(typed(recipe, 0))[2:])[0] == recipe  # the command that is written down makes the same

def test_what_a_method_does_not_read_is_not_carried_into_its_command():
    recipe = parse("compare", ["digits", "--recover.init", "patch", "--extra.residual", "0.5", "--recover.ipc", "2"])[0]
    words = shlex.split(typed(with_peer(recipe, "dm"), 0))[2:]
    assert parse("distill", words)[0].recover.ipc == 2 and not any("extra" in word or "init" in word for word in words)

def test_other_run_folders_within_are_left_alone(tmp_path):
    for inner in ("other", "other/deep", "grid/cell"): (tmp_path/inner/".x.1-abc.part").mkdir(parents=True)
    write_json(tmp_path/"grid/cell/recipe.json", {})
    with pytest.raises(UserError, match="is no run folder"): run(DIGITS, tmp_path, until="data")
    assert len(list(tmp_path.rglob("*.part"))) == 3   # a folder that is refused is not touched
    shutil.move(tmp_path/"other", tmp_path/".other"); shutil.move(tmp_path/"grid", tmp_path/".grid")
    run(DIGITS, tmp_path, until="data")
    assert [path.parent.name for path in tmp_path.rglob("*.part")] == ["cell"]

def test_a_teacher_is_known_by_what_is_in_its_file(tmp_path):
    recipe = parse("distill", ["sre2l", "digits", "--teacher", str(tmp_path/"net.safetensors")])[0]
    (tmp_path/"net.safetensors").write_bytes(b"one"); first = key("recover", recipe, 0, "")
    (tmp_path/"net.safetensors").write_bytes(b"two"); assert key("recover", recipe, 0, "") != first
    other = replace(recipe, peer=replace(recipe.peer, learned="ignored"))
    assert key("recover", other, 0, "") == key("recover", recipe, 0, "") and key("train/distilled_hard", other, 0, "") != key("train/distilled_hard", recipe, 0, "")

def test_every_cell_is_looked_at_first(tmp_path):
    with pytest.raises(UserError, match="resnet99"): sweep(DIGITS, {"student.name": ("resnet18", "resnet99")}, tmp_path/"a")
    assert not (tmp_path/"a").exists()

def test_values_that_need_each_other_may_be_swept(tmp_path):
    axes, rest = axes_of(["digits", "extra.residual", "0", "0.5", "--recover.init", "patch"])
    assert axes == {"extra.residual": (0.0, 0.5)} and parse("sweep", rest, whole=False)[0].recover.init == "patch"
    for name in ("cifar100-best",): assert {cell.extra.residual for cell in grid_recipes(RECIPES[name]).values()} == {0.0, 0.5}

def test_the_words_of_a_table():
    rows = [{"distilled_soft": {"n": 1}}]
    assert caption(DIGITS, rows) == "Accuracy in % on the test images, of students trained from scratch, 2 images per class, n = 1"
    held = replace(DIGITS, data=replace(DIGITS.data, held_out=0.2))
    assert caption(held, [rows[0] | {"recover.ipc": "1"}, {"distilled_soft": {"n": 3}}]) == "Accuracy in % on held-out training images, of students trained from scratch"

@pytest.mark.parametrize("place, option", [("pretrain/ssl", "--pretrain.batch"), ("pretrain/supervised", "--supervised.batch"), ("recover", "batch of the method"), ("train/random_hard", "--hard.batch"),
                                           ("train/hard/set", "--hard.batch"), ("train/dsa/random", "--hard.batch"), ("train/sre2l/set", "--train.batch"), ("train/distilled_soft", "--train.batch"), ("train/full_data", "--full.batch")])
def test_the_batch_to_lower_is_named(place, option): assert runs.batch_option(Path("runs/digits")/place).startswith(option)

def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path/"file").touch()
    with pytest.raises(UserError, match="--out .*file: is a file; name a folder"): run(DIGITS, tmp_path/"file", until="data")

def test_a_teacher_from_a_file(ours, tmp_path, capsys):
    words = ["distill", "rded", "digits", *PEER_WORDS, "--config.crops", "2", "--reuse", str(ours)]
    assert main([*words, "--teacher", str(ours/"pretrain/supervised/network.safetensors"), "--out", str(tmp_path/"a")]) == 0
    assert main([*words, "--out", str(tmp_path/"b")]) == 0  # the same network, as a stage of the run
    assert (SyntheticSet.load(tmp_path/"a/recover").images == SyntheticSet.load(tmp_path/"b/recover").images).all()
    assert plan(parse("distill", ["rded", "digits", "--teacher", "x"])[0])["recover"][0] == ["data"]
    capsys.readouterr()
    assert main([*words, "--teacher", str(tmp_path/"nowhere.safetensors"), "--out", str(tmp_path/"c")]) == 2
    error = capsys.readouterr().err
    assert "nowhere.safetensors" in error and not (tmp_path/"c/recover").exists()

def test_what_comes_with_the_images_is_used_under_hard_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 1, 8, 8), dtype=np.uint8)
    eye = {"mean": np.zeros(64, np.float32), "matrix": np.eye(64, dtype=np.float32) / 2, "inverse": 2 * np.eye(64, dtype=np.float32)}
    made = SyntheticSet(images, np.repeat(np.arange(3), 2), ("a", "b", "c"), (0.5,), (0.25,), learned_step=0.123, transform=eye)
    recipe = with_peer(DIGITS, "mtt")
    seen, test, config = runs.as_learned(recipe, made, made, DIGITS.hard)
    assert config.learning_rate == 0.123 and seen.std != made.std and (seen.images == test.images).all() and (seen.images != images).any()
    own = replace(made, soft_labels=np.full((6, 3), 1 / 3, np.float32), transform=None)
    assert runs.as_learned(recipe, own, own, DIGITS.hard)[2].labels == "soft" and config.labels == "hard"
    with pytest.raises(UserError, match="there is no teacher"): train_student(made, Architecture("convnet", width=4, depth=1), replace(DIGITS.hard, labels="soft", epochs=1), device="cpu")
    trained = train_student(own, Architecture("convnet", width=4, depth=1), replace(runs.as_learned(recipe, own, own, DIGITS.hard)[2], epochs=1), device="cpu")
    assert abs(trained.curve[0]["loss"] - np.log(3)) < 0.4                                        # cross-entropy against one third each
    ignoring = replace(recipe, peer=replace(recipe.peer, learned="ignored"))
    assert runs.as_learned(ignoring, made, made, DIGITS.hard) == (made, made, DIGITS.hard)
    assert runs.as_learned(DIGITS, made, made, DIGITS.hard) == (made, made, DIGITS.hard)
