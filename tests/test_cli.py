"The command line: quick, patient with mistakes, and documented."
import re, shlex, subprocess, sys
import pytest
from scdd.files import UserError
from scdd.recipes import RECIPES, flatten
from scdd.cli import axes_of, main, parse

def scdd(*words, **keywords): return subprocess.run([sys.executable, "-m", "scdd", *words], capture_output=True, text=True, **keywords)

def test_help_imports_no_torch():
    for words in (["--help"], ["run", "digits", "--help"], ["recipes"], ["distill"], ["--version"]):
        code = f"import sys\nfrom scdd.cli import main\ntry: main({words})\nexcept SystemExit: pass\nprint('LOADED', [m for m in ('torch', 'numpy', 'timm', 'matplotlib') if m in sys.modules])"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.strip().endswith("LOADED []"), words

def test_module_and_exit_codes():
    assert scdd("--version").stdout.startswith("scdd ")
    assert scdd("recipes").returncode == 0
    wrong = scdd("run", "digit")
    assert wrong.returncode == 2 and wrong.stderr == "scdd: digit: there is no such recipe; did you mean 'digits'?; 'scdd recipes' lists them\n" and not wrong.stdout

def test_help_documents_every_value(capsys):
    with pytest.raises(SystemExit) as stop: main(["run", "digits", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name in flatten(RECIPES["digits"]):
        if "." in name: assert f"--{name} " in said, name
    for name in ("data", "out", "device", "seed", "reuse", "grid"): assert f"--{name}" in said
    assert "Adam steps for each batch of images (default: 300)" in " ".join(said.replace("│", " ").split())

def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    for recipe in RECIPES.values(): assert recipe.name in said and recipe.about in said and recipe.needs in said

@pytest.mark.parametrize("words, said", [
    (["runn"], "runn: there is no such command; did you mean 'run'?"),
    (["run"], "scdd run needs the name of a recipe: digits"),
    (["run", "--recover.steps", "5"], "scdd run needs the name of a recipe"),
    (["run", "digits", "--recover.step", "5"], "--recover.step: there is no such option; did you mean '--recover.steps'?"),
    (["run", "digits", "--steps", "5"], "--steps: there is no such option; did you mean '--recover.steps'?"),
    (["run", "digits", "--dat", "x"], "--dat: there is no such option; did you mean '--data'?"),
    (["run", "digits", "--zzzzz"], "--zzzzz: there is no such option; 'scdd run digits --help' lists them"),
    (["run", "digits", "-x"], "Unrecognized options: -x"),
    (["run", "digits", "--recover.init", "nois"], "--recover.init nois: there is no such choice; did you mean 'noise'?"),
    (["run", "digits", "--recover.flip", "maybe"], "--recover.flip maybe: there is no such choice"),
    (["run", "digits", "--recover.steps", "many"], "--recover.steps: must be a whole number, not 'many'"),
    (["run", "digits", "--recover.r_bn=much"], "--recover.r_bn: must be a number, not 'much'"),
    (["run", "digits", "--recover.betas", "0.5"], "Missing value for argument '--recover.betas'"),
    (["run", "digits", "--recover.ipc", "0"], "--recover.ipc 0: must be at least 1"),
    (["run", "digits", "--pretrain.method", "din"], "--pretrain.method din: there is no such method; did you mean 'dino'?"),
    (["train", "digits", "--grid"], "--grid: there is no such option"),
    (["show"], "scdd show needs a run folder"),
    (["run", "digits", "--teacher", "x"], "--teacher: there is no such option"),
    (["distill", "herdin", "digits"], "herdin: there is no such method; did you mean 'herding'?"),
    (["distill", "dm"], "scdd distill dm needs the name of a recipe"),
    (["distill", "dm", "digit"], "digit: there is no such recipe"),
    (["distill", "dm", "digits", "--config.iteration", "5"], "--config.iteration: there is no such option; did you mean '--config.iterations'?"),
    (["distill", "dm", "digits", "--config.iterations", "0", "--out", "never"], "--config.iterations 0: must be at least 1"),
    (["distill", "dm", "digits", "--teacher", "x", "--out", "never"], "--teacher x: dm makes its images without a trained network"),
    (["distill", "dm", "digits", "--until", "recove"], "--until recove: there is no such choice; did you mean 'recover'?"),
    (["run", "digits", "--until", "recover"], "--until: there is no such option"),
    (["distill", "dm", "digits", "--learned", "perhaps"], "--learned perhaps: there is no such choice"),
    (["distill", "sre2l", "digits", "--config.network.width", "8"], "--config.network.width: sre2l uses the recipe's network; give --network.width"),
    (["distill", "sre2l", "digits", "--config.teacher.epochs", "8"], "--config.teacher.epochs: sre2l uses the recipe's network; give --supervised.epochs"),
    (["distill", "dm", "digits", "--extra.residual", "0.5"], "--extra.residual: belongs to the recipe's own recovery, in whose place dm makes the images; leave it out"),
    (["distill", "dm", "digits", "--recover.steps", "5"], "--recover.steps: belongs to the recipe's own recovery, in whose place dm makes the images; leave it out"),
    (["distill", "sre2l", "digits", "--recover.keep", "best"], "--recover.keep: belongs to the recipe's own recovery, in whose place sre2l makes the images; give --config.recover.keep"),
    (["run", "digits", "--reuse", "never"], "--reuse never: there is no such folder; name the run folders whose results are to be taken over"),
    (["run", "digits", "--grid", "--relabel.teacher", "ssl"], "--relabel.teacher: is set by the grid itself, each value in its turn; leave it out"),
    (["run", "cifar100-mini", "--grid", "--pretrain.temperature", "0.3"], "--pretrain.temperature: is set by the grid itself"),
    (["experiment", "search", "digits", "--train.batch", "32"], "--train.batch: is set by the experiment search itself, each value in its turn; leave it out"),
    (["experiment", "backbones", "digits", "--network.name", "resnet34"], "--network.name: is set by the experiment backbones itself"),
    (["run", "digits", "--train.batch", "1", "--out", "never"], "--train.batch 1: one image alone cannot train a network with BatchNorm, which needs at least two at once; give 2 or more"),
    (["distill", "random", "digits", "--student.name", "resnet99", "--out", "never"], "--student.name resnet99: there is no such network"),
    (["run", "digits", "--device", "cpu:x"], "--device cpu:x: a device's number is a whole number, such as cpu:0"),
    (["sweep"], "scdd sweep needs the name of a recipe"),
    (["sweep", "digits"], "scdd sweep digits needs an option and its values, such as recover.r_bn 0 1 10"),
    (["sweep", "digits", "recover.rbn", "0"], "recover.rbn: there is no such option; did you mean 'recover.r_bn'?"),
    (["sweep", "digits", "recover.r_bn"], "recover.r_bn: which values? give one or more, such as recover.r_bn 20.0"),
    (["sweep", "digits", "recover.r_bn", "much"], "--recover.r_bn: must be a number, not 'much'"),
    (["sweep", "digits", "recover.ipc", "0", "1"], "--recover.ipc 0: must be at least 1"),
    (["sweep", "digits", "recover.r_bn", "1", "--recover.r_bn", "2"], "--recover.r_bn: is swept over already; leave it out"),
    (["sweep", "digits", "recover.r_bn", "1", "--recover.r-bn=2"], "--recover.r_bn: is swept over already; leave it out"),
    (["sweep", "digits", "pretrain.method", "simclr", "dino", "--pretrain.temperature", "0.2"], "--pretrain.temperature: each method that is swept over brings its own"),
    (["run", "digits", "--supervised.method", "simclr"], "--supervised.method simclr: this network has to know the classes"),
    (["run", "digits", "--full.method", "dino"], "--full.method dino: this network has to know the classes"),
    (["run", "digits", "--train.mix_alpha", "5"], "--train.mix_alpha 5.0: must be from 0.1 to 2"),
    (["run", "digits", "--pretrain.sinkhorn_epsilon", "0.01"], "--pretrain.sinkhorn_epsilon 0.01: must be 0.025 or more"),
    (["distill", "sre2l", "digits", "--config.teacher.method", "simclr"], "--config.teacher.method"),
    (["distill", "mtt", "digits", "--config.experts.augment", "colour", "--out", "never"], "--config.experts.augment"),
    (["experiment", "sizes", "digits"], "sizes: there is no such experiment"),
    (["experiment", "uses", "digits", "--trials", "3"], "--trials: uses tries no settings"),
    (["experiment", "search", "digits", "--trials", "-1"], "--trials -1: must be 0 or more"),
    (["compare", "digits", "--methods", "dmm"], "dmm: there is no such method; did you mean 'dm'?"),
    (["compare", "digits", "--methods", "dm", "herding", "dm"], "--methods dm herding dm: dm is named twice"),
    (["run", "digits", "--extra.backbones", "nonet", "--out", "never"], "--extra.backbones nonet: there is no such network"),
])
def test_mistakes_get_one_line_and_exit_code_2(words, said, capsys):
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"scdd: {said}") and error.count("\n") == 1 and not out

def test_words_become_a_recipe():
    recipe, own = parse("run", ["digits", "--recover.learning-rate", "0.5", "--recover.betas", "0.1", "0.2", "--recover.flip", "True", "--data.classes=3", "--data", "here", "--seed", "4", "--reuse", "a", "b", "--grid"])
    assert (recipe.recover.learning_rate, recipe.recover.betas, recipe.recover.flip, recipe.data.classes) == (0.5, (0.1, 0.2), True, 3)
    assert own == {"data": "here", "out": None, "device": "auto", "seed": 4, "reuse": ("a", "b"), "grid": True, "teacher": None, "learned": "used", "until": "train", "methods": ()}
    assert parse("run", ["digits"])[0] == RECIPES["digits"]

def test_a_method_brings_its_values():
    recipe, _ = parse("run", ["digits", "--pretrain.temperature", "0.3", "--pretrain.method=mocov2"])
    assert (recipe.pretrain.method, recipe.pretrain.queue, recipe.pretrain.temperature) == ("mocov2", 1024, 0.3)

def test_a_method_can_stop_at_its_images(tmp_path, capsys):
    words = ["distill", "herding", "digits", "--data.classes", "2", "--recover.ipc", "1", "--config.epochs", "1", "--device", "cpu", "--out", str(tmp_path/"run"), "--until", "recover"]
    assert main(words) == 0 and capsys.readouterr().out.endswith(f"done up to recover: {tmp_path/'run'}\n")
    assert (tmp_path/"run"/"recover"/"stage.json").is_file() and not (tmp_path/"run"/"relabel").exists() and not (tmp_path/"run"/"report.json").exists()

def test_make_comparison_types_what_there_is():
    "Every command of the Makefile's target is one that the command line takes, for one student after the other."
    from scdd.pages import root
    said = subprocess.run(["make", "-n", "comparison", "DATA=here", "VENV=nowhere"], cwd=root(), capture_output=True, text=True).stdout.replace("\\\n", " ")
    found = re.findall(r"scdd compare (cifar100-mini [^;|\n]*)", said)
    assert len(found) == 3
    for words in found:
        for student in ("resnet18", "vgg11_bn", "vit"):
            recipe, own = parse("compare", shlex.split(words.replace("$student", student)))
            assert (recipe.hard.epochs, recipe.hard.crop, recipe.hard.sets) == (300, "none", "each") and own["data"] == "here"
            assert all("*" not in name or name.endswith("/*/") for name in own["reuse"])   # the folder of a comparison holds files, too

def test_interruption_is_one_line(monkeypatch, capsys):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr("scdd.cli.run", stop)
    assert main(["run", "digits"]) == 130
    assert capsys.readouterr().err.strip() == "scdd: stopped; the same command goes on"

def test_show_of_no_run(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2 and "is no run folder" in capsys.readouterr().err

def test_a_sweep_over_methods_keeps_what_no_method_brings():
    words = ["cifar100-mini", "pretrain.method", "simclr", "dino", "--pretrain.learning_rate", "0.02"]
    assert axes_of(words) == ({"pretrain.method": ("simclr", "dino")}, ["cifar100-mini", "--pretrain.learning_rate", "0.02"])

def test_a_mistyped_option_of_a_sweep_is_no_value_of_the_one_before():
    with pytest.raises(UserError, match="recover.r_bnn: there is no such option; did you mean 'recover.r_bn'?"): axes_of(["digits", "recover.init", "noise", "recover.r_bnn", "1"])
    assert axes_of(["digits", "data.name", "data.one", "data.two"])[0] == {"data.name": ("data.one", "data.two")}

def test_a_reader_who_leaves_does_not_make_a_run_finished(monkeypatch, capsys):
    def gone(*_, **__): raise BrokenPipeError
    for words, code in ((["run", "digits"], 141), (["recipes"], 0), (["--help"], 0)):
        monkeypatch.setattr("scdd.cli.command", gone); stdout = sys.stdout
        try: assert main(words) == code, words
        finally: sys.stdout = stdout
