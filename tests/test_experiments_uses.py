"Three uses of a distilled set: what is pruned is gone and nothing else moves, memories hold what they should, ranks are ranks, and rows are kept."
import copy, json
from dataclasses import replace
import numpy as np
import pytest, torch
from scdd.align import accuracy
from scdd.data import load, random_subset
from scdd.experiments import uses as chapter
from scdd.experiments.uses import (finetune, groups, in_steps, inner, joined, memory_alone, only, parameters, png_bytes, random_of_bytes, rank_agreement,
                                   remeasure, seen_accuracy, silence, thinner, uses)
from scdd.files import UserError, read_json
from scdd.models import build
from scdd.recipes import RECIPES, Architecture, override
from scdd.recover import SyntheticSet
from scdd.train import train_student

TINY = Architecture("resnet18", 4)
FEW = replace(RECIPES["digits"].train, epochs=2)

@pytest.fixture(scope="module")
def digits(): return load("digits")

@pytest.fixture(scope="module")
def test(): return load("digits", "test").subset(range(100))

@pytest.fixture
def network(digits):
    "Random weights, scales and statistics: with those of a fresh network every channel would be alike."
    network, random = build(TINY, digits, 0), torch.Generator().manual_seed(0)
    for _, norm, _ in inner(network):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean): tensor.normal_(generator=random)
        norm.running_var.uniform_(0.5, 2, generator=random)
    return network.eval()

def views(count=8): return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))

# --- bytes

def test_an_image_weighs_what_its_file_weighs(digits, tmp_path):
    some = random_subset(digits, 2)
    SyntheticSet(some.images, some.labels, some.classes, some.mean, some.std).save(tmp_path/"set")
    files = [tmp_path/"set"/name for name in read_json(tmp_path/"set"/"set.json")["files"]]
    assert png_bytes(some.images).tolist() == [file.stat().st_size for file in files]

def test_random_images_fill_the_bytes_of_a_set_and_no_more(digits):
    made = random_subset(digits, 5, 7)
    for seed in (0, 1):
        some = random_of_bytes(digits, made, seed)
        for label in range(10):
            budget, mine = png_bytes(made.images[made.labels == label]).sum(), png_bytes(some.images[some.labels == label])
            assert mine.sum() <= budget < mine.sum() + 2 * mine.max()      # the next one would have been too many
    assert not np.array_equal(random_of_bytes(digits, made, 0).images[:5], random_of_bytes(digits, made, 1).images[:5])

# --- pruning

def test_the_smallest_scales_are_silenced_over_the_whole_network(network):
    norms = [norm for _, norm, _ in inner(network)]; scales = torch.cat([norm.weight.detach().abs() for norm in norms])
    silence(network, 0.4)
    masks = torch.cat([norm.weight_mask for norm in norms]).bool()
    assert (~masks).sum() == round(0.4 * len(masks)) and scales[~masks].max() <= scales[masks].min()
    for norm in norms: assert (norm.weight[norm.weight_mask == 0] == 0).all() and (norm.bias[norm.weight_mask == 0] == 0).all()

@pytest.mark.parametrize("share", (0.3, 0.97))     # at 0.97 some layers have no channel left
def test_without_its_silent_channels_a_network_says_the_same(network, share):
    silence(network, share)
    with torch.no_grad():
        before, many = network(views()), parameters(network)
        after = thinner(network)(views())
    assert torch.allclose(before, after, atol=1e-5) and parameters(network) < many
    assert all(conv.out_channels == norm.num_features == following.in_channels == len(conv.weight) for conv, norm, following in inner(network))

def test_a_bottleneck_has_two_inner_layers_and_others_are_refused(digits):
    assert len(inner(build(Architecture("resnet50", 2), digits))) == 2 * 16
    with pytest.raises(UserError, match="convnet has no residual blocks.*--network.name"): inner(build(Architecture("convnet", 4), digits))

def test_measuring_anew_changes_the_statistics_alone(network, digits):
    some, before = random_subset(digits, 2), {name: value.clone() for name, value in network.state_dict().items()}
    remeasure(network, some)
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" not in name and "num_batches" not in name)
    seen = network.backbone.conv1(network.normalize(torch.tensor(some.images) / 255))
    assert torch.allclose(network.backbone.bn1.running_mean, seen.mean((0, 2, 3)), atol=1e-5) and torch.allclose(network.backbone.bn1.running_var, seen.var((0, 2, 3)), rtol=1e-4)
    assert not network.training

@pytest.mark.parametrize("labels", ("soft", "hard"))
def test_trained_on_from_a_fresh_network_it_is_a_student(network, digits, labels):
    some, config = random_subset(digits, 3), replace(FEW, labels=labels)
    teacher = network if labels == "soft" else None
    student = train_student(some, TINY, config, 5, "cpu", teacher).network
    ours = finetune(build(TINY, some, 5).to(memory_format=torch.channels_last), some, config, teacher, 5)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in student.state_dict().items())

def test_silent_channels_stay_silent(network, digits):
    silence(network, 0.5); kept = [norm.weight_mask.clone() for _, norm, _ in inner(network)]
    finetune(network, random_subset(digits, 2), replace(FEW, labels="hard"))
    for (_, norm, _), mask in zip(inner(network), kept):
        norm(torch.zeros(1, len(mask), 2, 2))                              # the mask is applied at each pass
        assert (norm.weight[mask == 0] == 0).all() and (norm.bias[mask == 0] == 0).all() and norm.weight[mask == 1].abs().min() > 0

# --- classes one after the other

def test_each_class_comes_once_in_an_order_of_chance():
    for seed in (0, 1): assert sorted(np.concatenate(groups(10, seed))) == list(range(10)) and [len(some) for some in groups(10, seed)] == [2] * 5
    assert not all(np.array_equal(a, b) for a, b in zip(groups(10, 0), groups(10, 1)))

def test_memory_is_repeated_until_it_is_as_many(digits):
    new, memory = only(digits, [3, 4]), only(random_subset(digits, 2), [0, 7])
    both = joined(new, memory)
    assert len(both) == 2 * len(new) and set(both.labels[:len(new)]) == {3, 4} and set(both.labels[len(new):]) == {0, 7}
    assert np.array_equal(both.images[len(new):len(new) + 4], memory.images) and np.array_equal(both.images[len(new) + 4:len(new) + 8], memory.images)
    everything = joined(only(digits, [3]), only(digits, [0, 1, 2]))
    assert np.bincount(everything.labels).tolist() == np.bincount(digits.labels)[:4].tolist()      # where the memory is the larger, each image comes once
    assert joined(new, only(digits, [])) is new

def test_only_classes_that_were_seen_are_named(digits, test):
    network, seen = build(TINY, digits, 0).eval(), np.array([7, 2, 5])
    part = only(test, seen)
    with torch.no_grad(): logits = network(torch.tensor(part.images) / 255)
    right = [max(seen, key=lambda label: float(row[label])) == label for row, label in zip(logits, part.labels)]
    assert seen_accuracy(network, test, seen) == pytest.approx(np.mean(right))
    assert seen_accuracy(network, test, np.arange(10)) == pytest.approx(accuracy(network, test, "cpu"))

def test_memory_begins_to_matter_in_the_second_step(digits, test):
    train, order = random_subset(digits, 20), groups(10)[:2]
    student, config = Architecture("convnet", 8, depth=2), replace(RECIPES["digits"].hard, epochs=4, learning_rate=0.05, batch=16)
    without, everything = (in_steps(train, memory, test, order, student, config) for memory in (only(train, []), train))
    assert without[0] == everything[0] and everything[1] > without[1] + 0.1

def test_the_memory_alone_is_a_fresh_network_each_time(digits, test):
    memory, order = random_subset(digits, 3), groups(10)[:2]
    student, config = Architecture("convnet", 8, depth=2), replace(RECIPES["digits"].hard, epochs=3)
    found, seen = memory_alone(memory, test, order, student, config, 2), np.concatenate(order)
    again = finetune(build(student, memory, 2).to(memory_format=torch.channels_last), only(memory, seen), config, None, 2001, "cpu", seen)
    assert found[1] == seen_accuracy(again, test, seen)

# --- ranks

def test_ranks_and_regret():
    true = np.linspace(0.3, 0.8, 8)
    same, turned = rank_agreement(true**3, true), rank_agreement(-true, true)
    assert same["rho"] == pytest.approx(1) and same["regret"] == 0 and same["low"] > 0.9
    assert turned["rho"] == pytest.approx(-1) and turned["regret"] == pytest.approx(0.5)
    swapped = true.copy(); swapped[[6, 7]] = swapped[[7, 6]]
    assert rank_agreement(swapped, true)["regret"] == pytest.approx(true[7] - true[6]) and rank_agreement(swapped, true)["rho"] < 1

# --- the whole

def test_all_rows_are_made_once_and_stand_beside_random_images(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "SHARES", (0.5,)); monkeypatch.setattr(chapter, "STEPS", 2)
    monkeypatch.setattr(chapter, "CANDIDATES", {"a": Architecture("convnet", 4, depth=1), "b": Architecture("convnet", 8, depth=1)})
    monkeypatch.setattr(chapter, "groups", lambda classes, seed=0: groups(classes, seed, 2))
    quick = {"network.width": 4, "student.name": "convnet", "student.width": 4, "student.depth": 1, "pretrain.epochs": 1, "pretrain.measure_every": 0, "supervised.epochs": 1, "full.epochs": 1,
             "align.epochs": 1, "recover.steps": 2, "recover.ipc": 2, "train.epochs": 1, "train.students": 2, "hard.epochs": 1}
    recipe = override(RECIPES["digits"], quick)
    rows = uses(recipe, tmp_path/"uses", device="cpu")
    assert len(rows) == 2 + (4 + 4 + 2 + 1) + 2 * (4 + 2) + 2 * 3
    for row in rows:
        assert set(row) - {"parameters"} == {"cell", "use", "case", "at", "trained on", "images", "kB", "accuracy", "seconds", "commit"}
        assert all(isinstance(value, (str, int, float)) for name, value in row.items() if name != "accuracy") and 0 <= row["accuracy"]["mean"] <= 1
    assert all(row["accuracy"]["n"] == 2 for row in rows if row["use"] != "pruning" or row["case"].endswith("labels"))
    by_set = {(row["use"], row["case"], row["at"], row["trained on"]): row for row in rows}
    for (use, case, at, name), row in by_set.items():
        if name == "distilled": assert by_set[use, case, at, "random real, same bytes"]["kB"] <= row["kB"] and row["images"] == 20
    def refuse(*_, **__): raise AssertionError("trained again")
    for name in ("finetune", "remeasure", "evaluate", "train_full", "accuracy"): monkeypatch.setattr(chapter, name, refuse)
    assert uses(recipe, tmp_path/"uses", device="cpu") == rows
    note = next((tmp_path/"uses"/"cells").rglob("stage.json"))
    note.write_text(json.dumps(read_json(note) | {"key": "of other images"}))
    with pytest.raises(UserError, match="was made from other images"): uses(recipe, tmp_path/"uses", device="cpu")
    with pytest.raises(UserError, match="was made with --recover.ipc 2, and now it is 3"): uses(override(recipe, {"recover.ipc": 3}), tmp_path/"uses", device="cpu")
