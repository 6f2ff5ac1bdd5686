"The search of chapter 37: what is tried, that no test image is seen, and that a killed study is the study that was not."
import builtins
from dataclasses import replace
import pytest
pytest.importorskip("optuna")
from scdd.cli import main
from scdd.data import load
from scdd.experiments import search as chapter
from scdd.experiments.search import CHOICES, INGREDIENTS, NUMBERS, SWITCHES, beginning, best_of, cells, proposed, search, with_ingredients
from scdd.files import UserError, read_json, write_json
from scdd.recipes import RECIPES, Peer, difference, override
from scdd.run import FIGURES, key, plan
from scdd.train import Report

QUICK = {"data.classes": 2, "network.width": 4, "student.width": 4, "pretrain.epochs": 1, "supervised.epochs": 1, "full.epochs": 1, "align.epochs": 1,
         "recover.steps": 4, "recover.ipc": 2, "train.epochs": 1, "hard.epochs": 1}
DIGITS = override(RECIPES["digits"], QUICK)

# --- what is tried ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["digits", "cifar100-mini", "cifar100-narrow", "cifar100-scdd"])
def test_the_beginning_is_scdd_and_sees_no_test_image(name):
    start = beginning(RECIPES[name])
    assert (start.recover.teacher, start.recover.init, start.relabel.teacher, start.relabel.teacher_bn, start.train.mix, start.train.temperature) == ("ssl", "noise", "ssl", "running", "mixup", 30.0)
    assert all(recipe.data.held_out == 0.2 for _, recipe in cells(start).values())
    assert start.train.epochs == RECIPES[name].train.epochs and start.network == RECIPES[name].network
    assert beginning(override(RECIPES[name], {"data.held_out": 0.1})).data.held_out == 0.1

def test_an_ingredient_changes_what_it_says_and_nothing_else():
    start = beginning(DIGITS)
    for name, values in INGREDIENTS.items():
        values = values(start) if callable(values) else values
        assert {option: new for option, (_, new) in difference(start, with_ingredients(start, [name])).items()} == values, name
    together = with_ingredients(start, INGREDIENTS)
    assert together.train.schedule_epochs == 2 * together.train.epochs == 6 * start.train.epochs  # the schedule follows the longer training
    assert with_ingredients(start, list(INGREDIENTS)[::-1]) == together

def test_ingredients_of_images_leave_random_images_as_they_are_and_those_of_labels_do_not():
    start = beginning(DIGITS)
    mark = lambda recipe: key("train/random_soft", recipe, 0, "images")
    of_images = {name for name in INGREDIENTS if mark(with_ingredients(start, [name])) == mark(start)}
    assert of_images == {"real patches", "patches mixed in again", "class statistics", "several backbones"}

def test_a_proposal_is_a_recipe():
    start = beginning(DIGITS)
    values = {name: True for name in SWITCHES} | {name: some[-1] for name, some in CHOICES.items()} | {name: ends[0] for name, ends in NUMBERS.items()}
    recipe = proposed(start, values)
    assert (recipe.train.epochs, recipe.train.temperature, recipe.recover.teacher, recipe.extra.residual) == (start.train.epochs, 4.0, "supervised", 0.5)
    assert "pretrain/ssl" not in plan(recipe) and recipe.data.held_out == 0.2

def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="made by herding; the search wants a recipe that recovers them"): search(replace(DIGITS, peer=Peer("herding")), tmp_path/"a")
    real = builtins.__import__
    def without(name, *rest, **more):
        if name == "optuna": raise ImportError(name)
        return real(name, *rest, **more)
    with monkeypatch.context() as two:
        two.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="in one process"): search(DIGITS, tmp_path/"a")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install optuna"): search(DIGITS, tmp_path/"a")
    assert not (tmp_path/"a").exists()

# --- a study with runs of straw: their accuracy is a formula ------------------------------------------------------------

@pytest.fixture
def straw(monkeypatch):
    "Runs that only compute a figure from the recipe; they can be told to fail, or to be killed."
    class Straw: made, kill, fail = [], (), ()
    def run(recipe, out, data, device, seed, reuse=()):
        Straw.made.append(out.name)
        if out.name in Straw.kill: raise KeyboardInterrupt
        if out.name in Straw.fail: raise UserError("recover: the loss is no finite number any more")
        figure = {"mean": 0.5 + 0.1 * recipe.train.ema - abs(recipe.recover.r_bn - 1) / 100, "std": 0.01, "n": 3, "values": []}
        report = Report(recipe={}, commit="c", device="cpu", versions={}, accuracy=dict.fromkeys(FIGURES, figure), seconds={"pretrain/ssl": 9.0, "recover": 2.0}, bytes={}, peak_memory_bytes=0)
        write_json(out/"report.json", vars(report))
        return report
    monkeypatch.setattr(chapter, "run", run)
    return Straw

def facts(rows): return [{name: value for name, value in row.items() if name != "commit"} for row in rows]

def test_a_killed_study_ends_like_one_left_alone(straw, tmp_path):
    alone = search(DIGITS, tmp_path/"alone", trials=6)
    assert [row["cell"] for row in alone] == [*cells(beginning(DIGITS)), *(f"trial {i}" for i in range(6))]
    assert len({row["recover.r_bn"] for row in alone[-6:]}) == 6 and all(row["seconds"] == 2.0 for row in alone)
    for killed in ("together", "0", "5"):
        straw.kill = (killed,)
        with pytest.raises(KeyboardInterrupt): search(DIGITS, tmp_path/"killed", trials=6)
    kept = read_json(tmp_path/"killed"/"so_far.json")
    assert len(kept["rows"]) == len(alone) - 1 and kept["command"].startswith("scdd experiment search digits") and kept["command"].endswith("--trials 6") and "--recover.crop_min" not in kept["command"] and kept["recipe"]["data"]["held_out"] == 0.2
    from scdd.beside import results
    write_json(tmp_path/"results"/"search.json", kept); assert results(tmp_path/"results") == []  # these are no test accuracies
    straw.kill = ()
    assert facts(search(DIGITS, tmp_path/"killed", trials=6)) == facts(alone)
    straw.made.clear()
    assert facts(search(DIGITS, tmp_path/"killed", trials=6)) == facts(alone) and len(straw.made) == len(cells(beginning(DIGITS)))  # no trial again

def test_a_study_alone_leaves_the_cells_out(straw, tmp_path):
    straw.fail = ("0",)
    rows = search(DIGITS, tmp_path/"a", trials=3, study_only=True); kept = read_json(tmp_path/"a"/"so_far.json")
    assert [row["cell"] for row in rows] == ["trial 1", "trial 2"] and straw.made == ["0", "1", "2"]
    assert kept["rows"] == rows and kept["command"].endswith("--trials 3 --study-only") and kept["device"] == "cpu"
    whole = search(DIGITS, tmp_path/"a", trials=3); straw.made.clear()                          # the cells may still come after, and then they stay
    assert facts(whole[-2:]) == facts(rows) and facts(search(DIGITS, tmp_path/"a", trials=3, study_only=True)) == facts(whole)
    assert facts(read_json(tmp_path/"a"/"so_far.json")["rows"]) == facts(whole)
    with pytest.raises(UserError, match="leaves nothing to do"): search(DIGITS, tmp_path/"b", trials=0, study_only=True)

def test_a_proposal_cut_short_is_struck_out(straw, tmp_path):
    import optuna
    alone = search(DIGITS, tmp_path/"alone", trials=2)
    search(DIGITS, tmp_path/"cut", trials=1)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path/'cut'/'study.db'}")
    study.ask().suggest_float("recover.r_bn", *NUMBERS["recover.r_bn"], log=True)  # killed between two of its values
    rows = search(DIGITS, tmp_path/"cut", trials=2)
    assert [row["cell"] for row in rows[-2:]] == ["trial 0", "trial 2"]
    assert {name: rows[-1][name] for name in NUMBERS} == {name: alone[-1][name] for name in NUMBERS}

def test_a_trial_whose_loss_is_no_number_counts_and_has_no_row(straw, tmp_path, capsys):
    straw.fail = ("1",)
    assert [row["cell"] for row in search(DIGITS, tmp_path/"a", trials=3)[-2:]] == ["trial 0", "trial 2"] and "trial 1: recover: the loss" in capsys.readouterr().out
    straw.made.clear(); straw.fail = ()
    assert [row["cell"] for row in search(DIGITS, tmp_path/"a", trials=3)[-2:]] == ["trial 0", "trial 2"] and "1" not in straw.made

def test_the_best_trial_is_a_recipe_for_the_test_set(straw, tmp_path):
    rows = search(DIGITS, tmp_path/"a", trials=2)
    best = max(rows[-2:], key=lambda row: row["distilled_soft"]["mean"]); recipe = best_of(DIGITS, rows)
    assert {name: value for name, (value, _) in difference(recipe, proposed(beginning(DIGITS), best)).items()} == {"data.held_out": 0.0} and recipe.recover.r_bn == best["recover.r_bn"]
    with pytest.raises(UserError, match="no trial is finished"): best_of(DIGITS, rows[:-2])

# --- and with real ones -------------------------------------------------------------------------------------------------

def test_a_real_search_killed_inside_a_trial_goes_on(tmp_path, monkeypatch, capsys):
    from scdd import run as runs
    few = {name: INGREDIENTS[name] for name in ("patches mixed in again",)}
    monkeypatch.setattr(chapter, "INGREDIENTS", few); monkeypatch.setattr(chapter, "SWITCHES", tuple(few))
    real = runs.make_relabel
    def killed(work, folder, kept):
        if work.folder.name == "1": raise KeyboardInterrupt
        return real(work, folder, kept)
    monkeypatch.setattr(runs, "make_relabel", killed)
    with pytest.raises(KeyboardInterrupt): search(DIGITS, tmp_path/"a", trials=2)
    monkeypatch.setattr(runs, "make_relabel", real); before = capsys.readouterr().out
    rows = search(DIGITS, tmp_path/"a", trials=2); after = capsys.readouterr().out
    assert [row["cell"] for row in rows] == ["SC-DD", *few, "together", "SRe2L", "together, supervised statistics", "trial 0", "trial 1"]
    made = [line for line in before.splitlines() if line.startswith(("pretrain", "align")) and "taken from" not in line]
    assert len(made) == 3 and not any(line.startswith(("pretrain", "align", "recover")) for line in after.splitlines())   # no network twice; trial 1 went on behind its images
    assert after.count("distilled, soft labels") == 1
    test, held = load(DIGITS.data, "test"), load(beginning(DIGITS).data, "test")
    assert all(read_json(place)["test_fingerprint"] == held.fingerprint != test.fingerprint for place in (tmp_path/"a").rglob("data/stage.json"))
    assert rows[1]["distilled_soft"]["n"] == 1 and rows[1]["commit"] and all(row["data.held_out"] == 0.2 for row in rows)

def test_the_number_of_trials_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.setattr(chapter, "search", lambda *words, trials=40, study_only=False: [{"cell": str(trials) + "!" * study_only, "commit": "x"}])
    monkeypatch.setattr("scdd.cli.as_markdown", str)
    for words, count in (["--trials", "0"], "0"), ([], "40"), (["--trials", "3", "--study-only"], "3!"):
        assert main(["experiment", "search", "digits", "--out", str(tmp_path/count), *words]) == 0
        found = read_json(tmp_path/count/"experiment.json")
        assert found["rows"][0]["cell"] == count and found["command"] == " ".join(["scdd experiment search digits", *words])
