"One list of methods, their values for a recipe, and one signature."
import subprocess, sys
from dataclasses import is_dataclass, replace
import pytest
from scdd.data import load
from scdd.files import UserError
from scdd.peers import coresets, decoupled
from scdd.peers.compare import DECOUPLED, PEERS, SHARED, SMALL, TWO_CORES, about_peers, changed, check_peer, distil, family, find_peer, network_seconds, unpublished, usual
from scdd.recipes import RECIPES, Data

DIGITS = RECIPES["digits"]

def test_listing_imports_no_torch():
    code = "import sys; from scdd.peers.compare import about_peers; about_peers(); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

def test_the_list_is_that_of_the_chapters():
    assert {name: find_peer(name) for name in coresets.CORESETS} == coresets.CORESETS and {name: find_peer(name) for name in decoupled.METHODS} == decoupled.METHODS
    assert DECOUPLED == tuple(decoupled.METHODS) and set(TWO_CORES) < set(PEERS) and len(PEERS) == 18
    assert all(f"  {name:<11} {text}" in about_peers() for name, (_, _, text) in PEERS.items())

@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("method", PEERS)
def test_values_for_every_recipe(method, recipe):
    config = usual(method, recipe)
    assert type(config) is find_peer(method)[1] and is_dataclass(config)
    if method in DECOUPLED: assert (config.network, config.teacher) == (recipe.network, recipe.supervised)
    if recipe.name in SMALL and hasattr(config, "recover"): assert all(getattr(config.recover, name) == getattr(recipe.recover, name) for name in SHARED)

def test_published_values_are_those_of_the_papers():
    assert usual("mtt", replace(RECIPES["cifar100-scdd"], recover=replace(RECIPES["cifar100-scdd"].recover, ipc=1))).zca
    assert usual("mtt", RECIPES["cifar100-scdd"]).batch == 125 and usual("dm", RECIPES["cifar100-scdd"]).iterations == 20000 and usual("dc", RECIPES["cifar100-scdd"]).network.width == 128
    assert usual("sre2l", RECIPES["imagenet1k-scdd"]).recover.steps == 4000
    other = replace(RECIPES["cifar100-scdd"], data=Data("other"))
    assert usual("mtt", other) == find_peer("mtt")[1]() and unpublished("mtt", other).startswith("mtt: no values were published for other at IPC 50")  # the defaults, and a word about it
    assert not any(unpublished(method, RECIPES["cifar100-scdd"]) for method in PEERS) and not unpublished("mtt", DIGITS) and not unpublished("dm", other)

def test_changed_reaches_into_parts():
    config = changed(usual("mtt", DIGITS), {"experts.count": 3, "network.width": 8, "steps": 2})
    assert (config.experts.count, config.network.width, config.steps) == (3, 8, 2) and config.experts.epochs == usual("mtt", DIGITS).experts.epochs

@pytest.mark.parametrize("method, values, ipc, words", [
    ("kmeans", {"epochs": 0}, 1, "--config.epochs 0: must be at least 1"), ("dc", {"init": "nois"}, 1, "--config.init nois"), ("dm", {}, 2000, "--ipc 2000"), ("random", {}, 0, "--ipc 0"),
    ("mtt", {"starts": 50}, 1, "--config.experts.epochs"), ("rded", {"factor": 3}, 1, "--config.factor 3"), ("fadrm", {"residual": 2.0}, 1, "--config.residual 2"), ("edc", {}, 2000, "--ipc 2000")])
def test_nonsense_is_refused_before_any_work(method, values, ipc, words):
    with pytest.raises(UserError) as error: check_peer(method, load("digits"), ipc, changed(usual(method, DIGITS), values))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)

@pytest.mark.parametrize("method, values, words", [
    ("mtt", {"network.name": "resnet18", "network.norm": "batch"}, "--config.network.norm: resnet18 has BatchNorm"), ("cafe", {"network.name": "mobilenetv3_small_050"}, "--config.network.name mobilenetv3_small_050: CAFE"),
    ("sre2l", {"network.name": "convnet", "network.norm": "instance"}, "sre2l: convnet has no BatchNorm layers"), ("dc", {"network.name": "convnett"}, "--config.network.name convnett: there is no such network"), ("edc", {"backbones": ("nonet",)}, "--config.backbones nonet: there is no such network")])
def test_a_network_that_a_method_cannot_use_is_refused_before_any_work(method, values, words):
    with pytest.raises(UserError) as error: check_peer(method, load("digits"), 1, changed(usual(method, DIGITS), values))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)

def test_a_teacher_that_is_none_is_refused_before_any_work(tmp_path):
    (tmp_path/"network.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="network.safetensors") as error: check_peer("sre2l", load("digits"), 1, usual("sre2l", DIGITS), tmp_path/"network.safetensors")
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("method", PEERS)
def test_teachers_are_for_those_who_use_them(method, tmp_path):
    words = "there is no such file" if method in DECOUPLED else "without a trained network"
    with pytest.raises(UserError, match=words): distil(method, load("digits"), 1, usual(method, DIGITS), teacher=tmp_path/"network.safetensors")

def test_a_family_has_the_leader_and_the_others_and_their_seconds():
    from scdd.pretrain import pretrain
    data = load("digits").subset(range(200))
    config = replace(usual("edc", DIGITS), teacher=replace(DIGITS.supervised, epochs=1, measure_every=0), network=replace(DIGITS.network, width=8))
    leader = pretrain(data, config.network, config.teacher, device="cpu")
    networks = family(leader, data, config, 0, "cpu", None)
    assert networks[0] is leader and [one.architecture.name for one in networks] == ["resnet18", "convnet"]
    made = distil("edc", data, 1, changed(config, {"recover.steps": 2}), device="cpu", leader=leader)
    assert len(made.provenance["networks"]) == 2 and 0 < network_seconds(made, leader) < made.provenance["teacher_seconds"]
