"Decoupled methods: the pipeline itself, statistics against brute force, closed forms, exact resuming, and what is refused."
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scdd import recover as recovery
from scdd.augment import crop, crop_boxes
from scdd.bn import moments
from scdd.data import ImageData, to_float
from scdd.device import generator
from scdd.files import UserError
from scdd.models import bn_layers, build, save_network
from scdd.peers import decoupled as chapter
from scdd.peers.decoupled import (Averaged, CDA, EDC, FADRM, GVBSM, METHODS, RDED, Decoupled, SRe2L, SRe2LPlus, block_ends, class_statistics, class_targets, decoupled, image_moments, overall, padded, plain,
                                  pooled, published, rded, sameness, smoothed, sre2l, synthesise, targets_of, teachers_for, tiled, turns, watched_layers, watching)
from scdd.recipes import Architecture, Pretrain, Recover, Relabel, Train
from scdd.recover import first_images, recover, smallest_area
from scdd.relabel import soft_logits
from scdd.train import evaluate, learning_rate

QUICK = Recover(teacher="supervised", ipc=2, steps=6, learning_rate=0.1, r_bn=0.1, jitter=1, batch=4, precision="float32", compile="off")
TINY = dict(network=Architecture(width=4), teacher=Pretrain("supervised", 1, 12, learning_rate=0.05, measure_every=0))


def images_of(classes=3, each=12, channels=3, size=12, seed=0):
    random = np.random.default_rng(seed)
    names = tuple("abcdefgh"[:classes])
    return ImageData(random.integers(0, 256, (classes * each, channels, size, size), dtype=np.uint8), np.repeat(np.arange(classes), each), names, (0.5,) * channels, (0.25,) * channels, name="noise", fingerprint=f"{classes}{channels}{size}")


def network_of(data, seed=1, name="resnet18", **values):
    network = build(Architecture(name, width=4, **values), data, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for _, layer in bn_layers(network):
        layer.running_mean.copy_(torch.randn(layer.num_features, generator=random)); layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=random))
    return network.eval()


@pytest.fixture(scope="module")
def data(): return images_of()

@pytest.fixture(scope="module")
def network(data): return network_of(data)

@pytest.fixture(scope="module")
def pool(data, network): return [network, network_of(data, 2, "convnet")]


# the pipeline itself

@pytest.mark.parametrize("name, config", [("sre2l", SRe2L(recover=QUICK)), ("cda", CDA(recover=replace(QUICK, crop_start=1.0, crop_min=0.3, crop_schedule="linear"))), ("sre2l_plus", SRe2LPlus(recover=replace(QUICK, init="patch", crop_min=0.5)))])
def test_is_recovery(data, network, name, config):
    made = METHODS[name][0](data, 2, config, seed=3, teacher=network)
    assert (made.images == recover(network, data, config.recover, seed=3).images).all()
    assert made.provenance["method"] == name and made.provenance["seed"] == 3 and made.provenance["fingerprint"] == data.fingerprint and made.provenance["curve"]


@pytest.mark.parametrize("change", [{}, {"init": "patch", "crop_min": 0.5}, {"bn_form": "normalized", "arrange": "single"}, {"arrange": "mixed"}])
def test_the_loop_without_ingredients_is_recovery(data, network, change):
    settings = replace(QUICK, **change)
    ours, theirs = synthesise([network], data, Decoupled(recover=settings), seed=1), recover(network, data, settings, seed=1)
    assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
    assert [row["loss"] for row in ours.provenance["curve"]] == pytest.approx([row["loss"] for row in theirs.provenance["curve"]], rel=1e-3)


def test_two_equal_networks_are_one(data, network):
    settings = Decoupled(recover=QUICK)
    assert np.abs(synthesise([network, network], data, settings).images.astype(int) - synthesise([network], data, settings).images).max() <= 1


def test_another_normalisation_is_undone(data, network):
    other = build(network.architecture, data, mean=(0.3,) * 3, std=(0.5,) * 3); other.load_state_dict(network.state_dict()); other.eval()
    source = chapter.source_of(other, data, Decoupled(recover=QUICK), torch.device("cpu"), network)
    images = torch.rand(4, 3, 12, 12)
    torch.testing.assert_close(source.read(network.normalize(images))[0], other(images), rtol=1e-4, atol=1e-4)


def test_curriculum():
    config = replace(CDA().recover, steps=500)
    for step in range(0, 500, 50): assert smallest_area(config, step) == pytest.approx(0.08 + 0.92 * (1 + math.cos(math.pi * step / 500)) / 2)


# statistics

@pytest.mark.parametrize("side", [0, 4, 3])
def test_moments_against_brute_force(side):
    x = torch.randn(3, 5, 12, 12, dtype=torch.float64) * torch.rand(5, 1, 1, dtype=torch.float64)
    parts = [x[:, c] for c in range(5)] if not side else [x[:, :, i:i + side, j:j + side] for i in range(0, 12, side) for j in range(0, 12, side)]
    mean, var = image_moments(x, side)
    torch.testing.assert_close(mean, torch.stack([part.flatten(1).mean(1) for part in parts], 1))
    torch.testing.assert_close(var, torch.stack([part.flatten(1).var(1, correction=0) for part in parts], 1))
    torch.testing.assert_close(pooled(mean, var), (torch.stack([part.mean() for part in parts]), torch.stack([part.var(correction=0) for part in parts])))
    if not side: torch.testing.assert_close(pooled(mean, var), moments(x))


def test_a_map_that_patches_do_not_fill_is_enlarged():
    assert image_moments(torch.randn(2, 3, 6, 5), 4)[0].shape == (2, 4)
    assert image_moments(torch.randn(2, 3, 2, 2), 4)[0].shape == (2, 1)


@pytest.mark.parametrize("conv_patch", [0, 4])
def test_class_statistics_against_brute_force(data, network, conv_patch):
    uneven = data.subset([*range(5), *range(12, 36)])
    entries, labels = class_statistics(network, uneven, conv_patch, batch=4, precision="float32"), torch.tensor(uneven.labels)
    pixels = to_float(torch.from_numpy(uneven.images.copy()))
    with torch.no_grad(), watching(network, conv_patch) as seen:
        for label in range(3):
            network(pixels[labels == label])
            for entry, found in zip(entries, seen): torch.testing.assert_close((entry[0][label], entry[1][label]), found, rtol=1e-4, atol=1e-5)
        network(pixels)
        for entry, found in zip(entries, seen): torch.testing.assert_close(overall(entry, np.bincount(uneven.labels)), found, rtol=1e-4, atol=1e-5)
    assert len(entries) == len(watched_layers(network, conv_patch)) and all((within <= var + 1e-5).all() for _, var, within in entries)


def test_class_targets(data, network):
    entries, stored = class_statistics(network, data), None
    everyone = class_targets(entries, torch.tensor([0, 1, 2]))
    for (_, mean, var), entry in zip(everyone, entries): torch.testing.assert_close((mean, var), overall(entry, [1, 1, 1]))
    for (_, mean, var), entry in zip(class_targets(entries, torch.tensor([1, 1])), entries): torch.testing.assert_close((mean, var), (entry[0][1], entry[1][1]))
    for (_, mean, var), entry in zip(class_targets(entries, torch.tensor([0, 2]), "within"), entries): torch.testing.assert_close(var, entry[2][[0, 2]].mean(0))


def test_the_shares_of_the_targets(data, network):
    settings = Decoupled(recover=QUICK, category=0.25, conv_patch=4)
    source = chapter.source_of(network, data, settings, torch.device("cpu"))
    shares = targets_of(source, torch.tensor([0, 1]), settings)
    assert [share for share, _ in shares] == [0.75, 0.25] and all(len(stored) == len(watched_layers(network, 4)) for _, stored in shares)
    assert [share for share, _ in targets_of(source, torch.tensor([0]), replace(settings, category=1.0))] == [1.0]


def test_hooks_are_taken_off(network):
    with pytest.raises(RuntimeError), watching(network, 4): raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_sameness():
    alike = torch.randn(1, 1, 6, 6).expand(3, 1, 6, 6) / 6
    groups = [torch.arange(3)]
    assert sameness(alike, groups) > 10 * sameness(torch.randn(3, 1, 6, 6) / 100, groups) and sameness(alike[:1], [torch.arange(1)]) == 0
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    def loss(x): return sameness(x / 3, [torch.tensor([0, 1]), torch.tensor([2, 3])], temperature=1e9)   # the target is flat, whatever the spectrum
    assert torch.autograd.gradcheck(loss, (images,), atol=1e-6)


def test_densification_is_part_of_the_loss(data, network):
    settings, labels = Decoupled(recover=QUICK, densify=3.0), torch.tensor([0, 0])
    source = chapter.source_of(network, data, settings, torch.device("cpu"))
    images, groups = torch.randn(2, 3, 12, 12) / 20, [torch.arange(2)]
    with_it, without = (chapter.step_losses(source, targets_of(source, labels, one), images, labels, groups, one) for one in (settings, replace(settings, densify=0.0)))
    torch.testing.assert_close(with_it - without, torch.stack([3 * sameness(images, groups), *torch.zeros(2)]), rtol=1e-3, atol=1e-5)


# ingredients

def test_turns():
    assert turns(3, 7, (0,), "turns") == [0, 1, 2, 0, 1, 2, 0]
    drawn = turns(3, 3000, (0, "recover", 0)); assert drawn == turns(3, 3000, (0, "recover", 0)) != turns(3, 3000, (1, "recover", 0))
    assert all(900 < drawn.count(i) < 1100 for i in range(3))


def test_the_residual_has_a_closed_form(data, network):
    still = Decoupled(recover=replace(QUICK, init="patch", learning_rate=1e-9), residual=0.5)
    patches = first_images(network, data, still.recover, 0, torch.device("cpu"))
    assert (synthesise([network], data, still).images == patches.numpy()).all()
    source = chapter.source_of(network, data, still, torch.device("cpu"))
    labels, start = torch.tensor([0, 1]), network.normalize(torch.rand(2, 3, 12, 12))
    seen = {}
    moving = replace(still, recover=replace(QUICK, init="patch", steps=8, learning_rate=0.2))
    chapter.synthesise_batch([source], start, labels, moving, (0,), chapter.Checkpoint(), {}, on_step=lambda step, images, _: seen.__setitem__(step, (images - network.denormalize(start)).abs().mean().item()))
    assert block_ends(moving) == {2, 4, 6}
    free = replace(moving, residual=0.0); far = {}
    chapter.synthesise_batch([source], start, labels, free, (0,), chapter.Checkpoint(), {}, on_step=lambda step, images, _: far.__setitem__(step, (images - network.denormalize(start)).abs().mean().item()))
    assert seen[1] == far[1] and seen[2] == pytest.approx(far[2] / 2, rel=1e-3)


@pytest.mark.parametrize("config", [GVBSM(recover=replace(QUICK, arrange="single"), conv_patch=4, densify=1e-3, backbones=("convnet",)), EDC(recover=replace(QUICK, init="patch"), backbones=("convnet",)), FADRM(recover=replace(QUICK, init="patch"))], ids=lambda c: type(c).__name__)
def test_every_ingredient_has_an_effect(data, network, pool, config):
    teacher = pool if config.backbones else network
    made = decoupled(data, 2, config, teacher=teacher)
    assert (made.labels == [0, 0, 1, 1, 2, 2]).all() and made.images.shape == (6, 3, 12, 12) and np.isfinite([row["loss"] for row in made.provenance["curve"]]).all()
    assert (decoupled(data, 2, config, teacher=teacher).images == made.images).all()
    for name, off in {"conv_patch": 0, "category": 0.0, "residual": 0.0}.items():
        if getattr(config, name): assert (decoupled(data, 2, replace(config, **{name: off}), teacher=teacher).images != made.images).any(), name


@pytest.mark.parametrize("classes, channels, size, ipc", [(1, 1, 9, 1), (2, 3, 16, 3), (3, 1, 8, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_any_shape(name, classes, channels, size, ipc):
    data = images_of(classes, 4, channels, size)
    method, kind = METHODS[name]
    config = RDED() if kind is RDED else replace(kind(), recover=replace(kind().recover, steps=4, batch=4, precision="float32"))
    made = method(data, ipc, config, teacher=network_of(data))
    assert made.images.shape == (classes * ipc, channels, size, size) and made.ipc == ipc and made.provenance["method"] == name
    assert made.provenance["config"] and made.provenance["teacher_seconds"] == 0.0


def test_digits_are_not_mirrored(data):
    assert chapter.suited(CDA(), 1, data).recover.flip and not chapter.suited(CDA(), 1, replace(data, name="digits")).recover.flip


# RDED

def test_rded_against_brute_force(data, network):
    made = rded(data, 2, RDED(candidates=12, crops=3), teacher=network)
    from scdd.data import random_subset
    real = random_subset(data, 12, 0)
    for label in range(3):
        images, random, found = to_float(torch.from_numpy(real.images[label * 12:][:12].copy())), generator("cpu", 0, "rded", label), []
        boxes = [crop_boxes(12, 12, (0.08, 1.0), (1, 1), random) for _ in range(3)]
        for i in range(12):
            tried = [crop(images[i:i + 1], some[i:i + 1], 12) for some in boxes]
            found.append(min(((float(F.cross_entropy(network(one), torch.tensor([label])).detach()), n, one) for n, one in enumerate(tried)), key=lambda t: t[0]))
        best = torch.cat([patch for _, _, patch in sorted(found, key=lambda t: t[0])[:2]])
        assert np.abs(made.images[made.labels == label].astype(int) - (best * 255).round().numpy()).max() <= 1


def test_tiles():
    patches = torch.randint(0, 256, (2 * 9, 2, 6, 6), dtype=torch.uint8); made = tiled(patches, 3)
    for k in range(9):
        for i in range(2):
            row, column = divmod(k, 3)
            small = F.interpolate(patches[k * 2 + i][None].float(), (2, 2), mode="area").round().byte()[0]
            assert (made[i, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2] == small).all()
    assert tiled(patches, 1) is patches


def test_the_frame(network):
    images = torch.rand(2, 3, 12, 12)
    framed = torch.zeros(2, 3, 12, 12); framed[:, :, 3:9, 3:9] = network.normalize(F.avg_pool2d(images, 2))
    torch.testing.assert_close(padded(network, 6)(images), network.normalized(framed))


def test_scores_matter(data, network):
    one, other = (rded(data, 1, RDED(factor=2, scored=how), teacher=network).images for how in ("padded", "whole"))
    assert (one != other).any()


# teachers

def test_a_teacher_is_trained_once(data, tmp_path, monkeypatch):
    config = Decoupled(recover=QUICK, backbones=("convnet",), **TINY)
    first = decoupled(data, 2, config, checkpoint=tmp_path)
    assert first.provenance["teacher_seconds"] > 0 and [n["architecture"]["name"] for n in first.provenance["networks"]] == ["resnet18", "convnet"]
    monkeypatch.setattr(chapter, "pretrain", None)
    again = decoupled(data, 2, config, checkpoint=tmp_path)
    assert (again.images == first.images).all() and again.provenance["teacher_seconds"] == first.provenance["teacher_seconds"]
    with pytest.raises(UserError, match="other settings or on other images"): decoupled(data, 2, replace(config, teacher=replace(config.teacher, epochs=2)), checkpoint=tmp_path)
    with pytest.raises(UserError, match="other settings or on other images"): decoupled(replace(data, fingerprint="another"), 2, config, checkpoint=tmp_path)


def test_teachers_by_path(data, network, tmp_path):
    save_network(tmp_path/"t.safetensors", network)
    made = [sre2l(data, 1, SRe2L(recover=QUICK), teacher=one) for one in (network, tmp_path/"t.safetensors", [str(tmp_path/"t.safetensors")])]
    assert (made[0].images == made[1].images).all() and (made[0].images == made[2].images).all()


# resuming

class Stop(Exception): pass

@pytest.mark.parametrize("config", [EDC(recover=replace(QUICK, init="patch", batch=3), backbones=("convnet",)), FADRM(recover=replace(QUICK, init="patch", batch=3), blocks=3)], ids=["edc", "fadrm"])
def test_resuming_is_exact(data, pool, tmp_path, monkeypatch, config):
    whole = decoupled(data, 2, config, seed=3, teacher=pool)
    kept = recovery.Checkpoint
    monkeypatch.setattr(chapter, "LOOK", 2); monkeypatch.setattr(recovery, "Checkpoint", lambda folder=None: kept(folder, 0.0))
    calls, steps = [], []
    def stop(step, images, losses):
        calls.append(step)
        if len(calls) == 6 + 6: raise Stop                       # the last step of the second batch
    with pytest.raises(Stop): decoupled(data, 2, config, 3, "cpu", tmp_path, pool, on_step=stop)
    again = decoupled(data, 2, config, 3, "cpu", tmp_path, pool, on_step=lambda step, *_: steps.append(step))
    assert steps == [4, 5] and (again.images == whole.images).all() and again.provenance["curve"] == whole.provenance["curve"]
    with pytest.raises(UserError, match="other settings"): decoupled(data, 2, replace(config, recover=replace(config.recover, r_bn=0.2)), 3, "cpu", tmp_path, pool)


@pytest.fixture
def stopped_rded(data, network, tmp_path, monkeypatch):
    "RDED that was stopped in its third class: its folder, and the classes that it has asked about, which grow with what follows."
    kept, real, asked = chapter.Checkpoint, chapter.low_loss_patches, []
    monkeypatch.setattr(chapter, "Checkpoint", lambda folder=None: kept(folder, 0.0))
    def once(ask, images, label, *rest):
        asked.append(label)
        if len(asked) == 3: raise Stop
        return real(ask, images, label, *rest)
    monkeypatch.setattr(chapter, "low_loss_patches", once)
    with pytest.raises(Stop): rded(data, 2, RDED(candidates=6), checkpoint=tmp_path, teacher=network)
    return tmp_path, asked

@pytest.mark.parametrize("same, then", [(True, [2]), (False, [0, 1, 2])], ids=["its own teacher", "another teacher"])
def test_rded_goes_on_under_its_own_teacher_alone(data, network, stopped_rded, same, then):
    folder, asked = stopped_rded; teacher = network if same else network_of(data, 7)
    again = rded(data, 2, RDED(candidates=6), checkpoint=folder, teacher=teacher)
    assert asked == [0, 1, 2, *then] and (again.images == rded(data, 2, RDED(candidates=6), teacher=teacher).images).all()


# students

def test_labels_of_several_networks(data, pool):
    both, images = Averaged(pool), torch.from_numpy(np.array(data.images[:7])).float() / 255
    for how in ("running", "batch", "running"):   # the second leaves no trace in the statistics
        torch.testing.assert_close(soft_logits(both, images, how), sum(soft_logits(network, images, how) for network in pool) / 2)
    torch.testing.assert_close(soft_logits(both, images, normalize=lambda some: 2 * some), sum(network.normalized(2 * images) for network in pool).detach() / 2)
    with pytest.raises(UserError, match="2 classes.*another 3"): Averaged([pool[0], network_of(images_of(2))])


def test_students_of_several_networks(data, pool):
    train, pupil = Train(epochs=2, batch=6, flip=False, students=2), Architecture("convnet", width=4, depth=1, norm="instance")
    def losses(teacher): return [one["loss"] for curve in evaluate(data, pupil, train, teacher=teacher, relabel=Relabel(teacher="supervised"), test=data, device="cpu")["curves"] for one in curve]
    alone, both, twice = (losses(teacher) for teacher in (pool[0], Averaged(pool), Averaged([pool[0], pool[0]])))
    assert alone == pytest.approx(twice, rel=1e-4) and alone != pytest.approx(both, rel=1e-2)


def test_smoothed_schedule():
    train = Train(epochs=300, learning_rate=1.0)
    assert learning_rate(smoothed(train, 2), 299) == pytest.approx((1 + math.cos(math.pi * 299 / 600)) / 2) and smoothed(train, 1).schedule_epochs == 300
    with pytest.raises(UserError, match="zeta"): smoothed(train, 0.5)


def test_published():
    assert published("cda", "tiny-imagenet").recover.r_bn == 0.05 and published("rded", "imagenet1k").factor == 2 and published("sre2l", "cifar100") == SRe2L()
    with pytest.raises(UserError, match="did you mean 'sre2l'"): published("sre2", "cifar100")
    assert all(plain(METHODS[name][1]()) == (name in ("sre2l", "cda", "sre2l_plus")) for name in METHODS if name != "rded")


# what is refused

@pytest.mark.parametrize("config, words", [
    (FADRM(recover=QUICK), "--config.residual: .*init patch"), (FADRM(recover=replace(QUICK, init="real"), residual=1.5), "--config.residual 1.5"), (FADRM(recover=replace(QUICK, init="real"), blocks=7), "--config.blocks 7: give 1 to 6"),
    (EDC(recover=QUICK, category=-0.1), "--config.category -0.1"), (GVBSM(recover=QUICK, conv_patch=-1), "--config.conv_patch -1"),
    (EDC(recover=QUICK, choose="turn"), "--config.choose turn: there is no such choice"), (EDC(recover=QUICK, densify_temperature=0.0), "--config.densify_temperature 0.0"), (SRe2L(recover=QUICK, teacher=Pretrain("simclr")), "--config.teacher.method simclr"),
    (GVBSM(recover=replace(QUICK, keep="best")), "keep best"), (GVBSM(recover=replace(QUICK, micro_batch=2)), "micro_batch"),
])
def test_settings_that_mean_nothing(data, network, config, words):
    with pytest.raises(UserError, match=words): decoupled(data, 2, config, teacher=network)


def test_bad_input(data, network, tmp_path):
    quick = SRe2L(recover=QUICK)
    with pytest.raises(UserError, match="--ipc 0"): sre2l(data, 0, quick, teacher=network)
    with pytest.raises(UserError, match="--ipc 13"): decoupled(data, 13, SRe2L(recover=replace(QUICK, init="real")), teacher=network)
    with pytest.raises(UserError, match="no BatchNorm"): sre2l(data, 1, quick, teacher=build(Architecture("convnet", width=4, norm="instance"), data))
    with pytest.raises(UserError, match="3-channel images of 12 pixels"): sre2l(images_of(channels=1), 1, quick, teacher=network)
    with pytest.raises(UserError, match="tells 3 classes apart"): sre2l(images_of(classes=2), 1, quick, teacher=network)
    with pytest.raises(UserError, match="list is empty"): sre2l(data, 1, quick, teacher=[])
    with pytest.raises(UserError, match="no such file"): sre2l(data, 1, quick, teacher=tmp_path/"none.safetensors")
    with pytest.raises(UserError, match="--config.factor 5: images of 12 pixels"): rded(data, 1, RDED(factor=5), teacher=network)
    with pytest.raises(UserError, match="--config.crops 0"): rded(data, 1, RDED(crops=0), teacher=network)
    with pytest.raises(UserError, match="--config.scored pad"): rded(data, 1, RDED(scored="pad"), teacher=network)
    with pytest.raises(UserError, match="--config.factor 0"): rded(data, 1, RDED(factor=0), teacher=network)
    with pytest.raises(UserError, match="--ipc 4: .* 4 tiles.* give at most 3"): rded(data, 4, RDED(factor=2), teacher=network)


def test_a_loss_that_is_no_number(data, network):
    with pytest.raises(UserError, match="no finite number any more at step"): decoupled(data, 2, EDC(recover=replace(QUICK, init="real", learning_rate=1e38, r_bn=1e38)), teacher=network)
