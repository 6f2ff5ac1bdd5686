"Sizes of the backbone: measures known by hand, the same starts for all, pulls, and rows that are made once."
import math
import numpy as np, pytest, torch
from scdd import run as runs
from scdd.bn import running_statistics
from scdd.data import load
from scdd.experiments import backbones as module
from scdd.experiments.backbones import *
from scdd.files import UserError
from scdd.models import bn_layers, build
from scdd.recipes import RECIPES, Architecture, override

TINY = override(RECIPES["digits"], {"data.classes": 2, "network.width": 2, "student.width": 2, "pretrain.epochs": 1, "supervised.epochs": 1, "align.epochs": 1, "pretrain.measure_every": 0,
                                    "supervised.measure_every": 0, "recover.ipc": 2, "recover.steps": 2, "train.epochs": 1, "hard.epochs": 1, "train.students": 2})

@pytest.fixture(scope="module")
def train(): return load("digits")

@pytest.fixture
def network(train):
    "Every layer with the means −1 and 1 in turn, and the variance 4."
    network = build(Architecture(width=4), train).eval()
    for _, layer in bn_layers(network): layer.running_mean.copy_(torch.tensor([-1.0, 1.0]).repeat(len(layer.running_mean) // 2)); layer.running_var.fill_(4.0)
    return network

def test_layers_as_computed_by_hand(network):
    found, layers = measure_layers(network), len(running_statistics(network))
    wanted = {"spread of means, raw": 1, "spread of variances, raw": 0, "spread of means, relative": 0.5, "spread of variances, relative": 0, "entropy of means": math.log(2), "entropy of variances": 0}
    assert found.pop("channels") == [len(mean) for _, mean, _ in running_statistics(network)]
    assert set(found) == set(wanted)
    for name, value in wanted.items(): assert found[name] == pytest.approx([value] * layers, abs=1e-6)

def test_the_scale_of_a_layer_is_seen_in_the_raw_spread_alone(network):
    before = measure_layers(network)
    for _, layer in bn_layers(network): layer.running_mean *= 3; layer.running_var *= 9
    after = measure_layers(network)
    assert after["spread of means, raw"] == pytest.approx(3 * np.array(before["spread of means, raw"]))
    assert all(after[name] == pytest.approx(before[name], abs=1e-5) for name in before if "raw" not in name)

def test_what_lies_outside_counts_to_the_last_bin():
    assert binned_entropy(torch.tensor([-99.0, 99.0, 0.1, 1.1]), "mean") == pytest.approx(math.log(4))
    assert binned_entropy(torch.tensor([3.05, 3.15]), "var") == pytest.approx(0)

def test_starts_are_the_same_for_all_and_belong_to_a_seed(train):
    (one, labels), (two, _), (other, _) = (same_starts(train, 3, seed) for seed in (0, 0, 1))
    pixels = one["patches"] * train.std[0] + train.mean[0]
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) and one[name].shape == (30, 1, 16, 16) for name in ("patches", "noise"))
    assert labels.tolist() == [label for label in range(10) for _ in range(3)] and -1e-5 < pixels.min() and pixels.max() < 1 + 1e-5 and pixels.std() > 0.1
    assert abs(one["noise"].mean()) < 0.05 and abs(one["noise"].std() - 1) < 0.05

def test_pulls(network, train):
    starts, labels = same_starts(train, 1)
    found, first = measure_pulls(network, starts, labels, 1.0), measure_pulls(network, starts, labels, 100.0)
    twice = measure_pulls(network, {name: torch.cat([images, images]) for name, images in starts.items()}, torch.cat([labels, labels]), 1.0)
    assert found == pytest.approx(twice, rel=1e-3) and min(found.values()) > 0 and len(found) == 6
    assert all((first[name] > 2 * found[name]) == ("paper" in name) or "normalized" in name for name in found)    # the weight of the first layer pulls; classes do not see it
    for weights in network.head.parameters(): torch.nn.init.zeros_(weights)
    none = measure_pulls(network, starts, labels, 1.0)
    assert all(none[name] == (0 if "class" in name else found[name]) for name in found)

def test_cells():
    cells = cells_of(RECIPES["cifar100-mini"], 4)
    assert len(cells) == 16 and list(cells)[0] == "resnet18-supervised-patch-4" and "resnet50-simclr-noise-4" in cells and "resnet18-simclr-patch-5" in cells
    for name, (recipe, seed) in cells.items():
        assert name == f"{recipe.network.name}-{'simclr' if recipe.recover.teacher == 'ssl' else 'supervised'}-{recipe.recover.init}-{seed}"
        assert recipe.relabel.teacher == recipe.recover.teacher and recipe.student == RECIPES["cifar100-mini"].student

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return folder, backbones(TINY, folder, sizes={"resnet18": 1})

def test_rows(done):
    folder, rows = done
    networks, images = [row for row in rows if "weights" in row], [row for row in rows if "start" in row]
    assert [row["cell"] for row in networks] == ["resnet18-supervised-0", "resnet18-simclr-0"] and len(images) == 4
    assert all(len(row["spread of means, raw"]) == 20 == len(row["channels"]) and row["BN gradient on noise, paper"] > 0 and 0 <= row["own accuracy"]["mean"] <= 1 for row in networks)
    assert networks[0]["spread of means, raw"] != networks[1]["spread of means, raw"]
    for row in images:
        assert {figure for figure in runs.FIGURES if figure in row} == set(STARTS[row["start"]])
        assert row["distilled_hard"]["n"] == 1 and 0 <= row["named as intended"] <= 1
    assert all(row["distilled_soft"]["n"] == 2 for row in images if row["start"] == "patch")
    assert images[0]["random_hard"] == images[1]["random_hard"] and all(row["seconds"] > 0 and row["commit"] for row in rows)

def test_what_is_done_is_not_made_again(done, monkeypatch):
    folder, rows = done
    shared = [folder/"cells"/f"resnet18-supervised-{start}-0"/"pretrain/supervised/network.safetensors" for start in STARTS]
    assert shared[0].read_bytes() == shared[1].read_bytes()
    def refuse(*_): raise AssertionError("made again")
    for name in ("make_pretrain", "make_recover", "make_figure"): monkeypatch.setattr(runs, name, refuse)
    monkeypatch.setattr(module, "make_measure", refuse)
    assert backbones(TINY, folder, sizes={"resnet18": 1}) == rows

def test_a_wrong_size_is_one_line(tmp_path):
    with pytest.raises(UserError, match="resnet19") as found: backbones(TINY, tmp_path, sizes={"resnet19": 1})
    assert "\n" not in str(found.value)
