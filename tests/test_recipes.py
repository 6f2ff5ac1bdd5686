"Recipes: complete, documented, checked, and free of torch."
import json, subprocess, sys
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass
import pytest
from scdd import recipes
from scdd.files import UserError
from scdd.recipes import RECIPES, Recipe, check, comments, difference, find_recipe, flatten, from_dict, grid_recipes, override, with_method

def test_every_recipe_is_valid_and_survives_json():
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.about and recipe.needs
        assert from_dict(json.loads(json.dumps(asdict(check(recipe))))) == recipe

def test_every_value_is_documented():
    for part in fields(Recipe):
        kind = type(getattr(RECIPES["digits"], part.name))
        if is_dataclass(kind): assert set(comments(kind)) == {f.name for f in fields(kind)}, kind

def test_recipes_import_no_torch():
    code = "import sys, scdd.recipes; print([m for m in ('torch', 'numpy', 'torchvision', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

def test_frozen():
    with pytest.raises(FrozenInstanceError): RECIPES["digits"].name = "x"

def test_override_changes_nothing_else():
    changed = override(RECIPES["digits"], {"recover.steps": 7, "recover.betas": (0.1, 0.2)})
    assert difference(RECIPES["digits"], changed) == {"recover.steps": (RECIPES["digits"].recover.steps, 7), "recover.betas": ((0.5, 0.9), (0.1, 0.2))}

@pytest.mark.parametrize("values, words", [
    ({"recover.step": 5}, "--recover.step: there is no such value; did you mean 'recover.steps'?"),
    ({"recover.init": "nois"}, "--recover.init nois: there is no such choice; did you mean 'noise'?"),
    ({"recover.ipc": 0}, "--recover.ipc 0: must be at least 1"),
    ({"recover.steps": 1.5}, "--recover.steps 1.5: must be a whole number"),
    ({"recover.steps": True}, "--recover.steps True: must be a whole number"),
    ({"recover.learning_rate": -1.0}, "--recover.learning_rate -1.0: must be a finite number, 0 or more"),
    ({"recover.r_bn": float("nan")}, "--recover.r_bn nan: must be a finite number, 0 or more"),
    ({"train.crop_min": 1.5}, "--train.crop_min 1.5: must be at most 1"),
    ({"train.temperature": 0.0}, "--train.temperature 0.0: must be above 0"),
    ({"recover.betas": (0.5, 1.0)}, "--recover.betas (0.5, 1.0): must be numbers from 0 to below 1"),
    ({"hard.augment": "das"}, "--hard.augment das: there is no such choice; did you mean 'dsa'?"),
    ({"train.loss": "mse"}, "--train.loss mse: there is no such choice; did you mean 'mse_ce'?"),
    ({"train.ema": 1.5}, "--train.ema 1.5: must be at most 1"),
    ({"train.hard_weight": -0.1}, "--train.hard_weight -0.1: must be a finite number, 0 or more"),
    ({"train.labels": "onec"}, "--train.labels onec: there is no such choice; did you mean 'once'?"),
    ({"train.labels": "once", "train.loss": "mse_ce"}, "--train.labels once: two images are mixed and so are their labels, as shares of the classes; mse_ce compares logits, so give --train.loss kl"),
    ({"train.labels": "once", "relabel.teacher_bn": "batch"}, "--train.labels once: a label that depends on the batch is no label of the image; give --relabel.teacher_bn running"),
    ({"hard.labels": "once"}, "--hard.labels once: the students of this protocol have no teacher; give --train.labels once"),
    ({"data.classes": 0}, "--data.classes 0: must be at least 1"),
    ({"data.held_out": 1.0}, "--data.held_out 1.0: must be below 1"),
    ({"data.held_out": -0.1}, "--data.held_out -0.1: must be a finite number, 0 or more"),
    ({"extra.residual": 0.5}, "--extra.residual 0.5: images that start from noise have no real patch to be mixed with; add --recover.init patch"),
    ({"extra.category": 1.5}, "--extra.category 1.5: must be at most 1"),
    ({"extra.backbones": ("convnet", "convnet")}, "--extra.backbones ('convnet', 'convnet'): must be names, each once"),
    ({"pretrain.method": "mocov4"}, "--pretrain.method mocov4: there is no such method; did you mean 'mocov3'?"),
])
def test_bad_values(values, words):
    with pytest.raises(UserError) as error: override(RECIPES["digits"], values)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)

def test_what_is_added_to_recovery_is_what_chapter_24_knows():
    from scdd.peers.decoupled import Decoupled
    assert all(getattr(Decoupled(), name) == value for name, value in asdict(recipes.Extra()).items())

def test_later_values_at_rest_leave_no_trace():
    flat = flatten(RECIPES["digits"])
    assert flat.keys() - recipes.lasting(flat).keys() == set(recipes.LATER)
    assert recipes.lasting(flatten(override(RECIPES["digits"], {"data.held_out": 0.1})))["data.held_out"] == 0.1

def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits'"): find_recipe("digit")

def test_a_method_brings_its_values_and_yours_win():
    dino = with_method(RECIPES["digits"], "dino")
    assert dino.pretrain.prototypes == recipes.DIGIT_VALUES["dino"]["prototypes"] and with_method(RECIPES["cifar100-mini"], "dino").pretrain.prototypes == 1024
    assert with_method(dino, "simclr").pretrain == RECIPES["digits"].pretrain  # there and back
    assert len({frozenset(values) for values in recipes.METHOD_VALUES.values()}) == 1 and set(recipes.DIGIT_VALUES) == set(recipes.METHOD_VALUES)
    with pytest.raises(UserError, match="did you mean 'simclr'"): with_method(dino, "simclear")
    assert override(RECIPES["digits"], {"pretrain.method": "dino", "pretrain.prototypes": 7}).pretrain.prototypes == 7
    assert with_method(RECIPES["cifar100-scdd"], "mocov2") == RECIPES["cifar100-scdd"]  # already its method: the published values stay
    assert set(recipes.METHOD_VALUES) == set(recipes.get_args(recipes.get_type_hints(recipes.Pretrain)["method"]))

def test_unknown_value_in_a_file_is_refused():
    with pytest.raises(UserError, match="knows no such value"): from_dict(asdict(RECIPES["digits"]) | {"labels": "soft"})

def test_grid_has_every_combination_once():
    cells = grid_recipes(RECIPES["cifar100-mini"])
    assert len(cells) == 4 * 2 * 2 + 2 == len({json.dumps(flatten(cell), sort_keys=True) for cell in cells.values()})
    assert {cell.pretrain.method for name, cell in cells.items() if not name.startswith("supervised")} == {"mocov2", "mocov3", "swav", "dino"}
    assert list(cells)[0] == "mocov2-noise-ssl" and list(cells)[-1] == "supervised-patch-supervised"
    assert set(grid_recipes(RECIPES["digits"])) == {f"{made}-noise-{labelled}" for made in ("simclr", "supervised") for labelled in ("ssl", "supervised")}

def test_an_average_that_never_moves_is_refused():
    for part in ("train", "hard"):
        with pytest.raises(UserError, match=rf"--{part}.ema 1.0: must be below 1"): override(RECIPES["digits"], {f"{part}.ema": 1.0})
    assert override(RECIPES["digits"], {"train.ema": 0.999}).train.ema == 0.999
