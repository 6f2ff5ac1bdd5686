"Gradient matching: slopes by differences and by brute force, every operation of the augmentation, any class and image count, interrupted is the same as not, faults."
from dataclasses import asdict, replace
import numpy as np, pytest, torch
from torch.nn import functional as F
from scdd.data import ImageData, load, mean_std, pixel_moments, to_device
from scdd.device import generator
from scdd.files import UserError
from scdd.models import build
from scdd.peers import gradients as module
from scdd.peers.coresets import class_indices, normalised
from scdd.peers.gradients import ALL_KINDS, DC, DSA, Halve, LOOPS, OPERATIONS, check_config, class_slope, dc, draw_siamese, dsa, gradient_distance, image_step, loops, network_gradient, random_network, settle_batchnorm, siamese
from scdd.recipes import Architecture, comments
from scdd.recover import SyntheticSet

TINY = Architecture("convnet", width=4, depth=2, norm="instance")
QUICK = DC(iterations=2, outer=2, inner=2, batch_real=8, batch_train=4, network=TINY)

def some_data(classes=3, count=8, channels=3, size=12, name="folder"):
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), count); images = (random.random((len(labels), channels, size, size)) * 255).astype(np.uint8)
    images[..., :size//2, :] = np.minimum(images[..., :size//2, :] // 2 + 30 * labels[:, None, None, None].astype(np.uint8), 255)
    return ImageData(images, labels.astype(np.int64), tuple(f"c{i}" for i in range(classes)), *mean_std(*pixel_moments(images)), "train", name, f"{name}{classes}{count}{channels}{size}")

@pytest.fixture(scope="module")
def data(): return some_data()

# ---- the distance and its slope

def test_distance_against_a_loop():
    ours, theirs = ([torch.randn(shape, generator=generator("cpu", name, i)) for i, shape in enumerate([(4, 3, 3, 3), (4,), (5, 8)])] for name in "ab")
    by_hand = sum(1 - torch.dot(g.flatten(), h.flatten()) / (g.norm() * h.norm() + 1e-6) for a, b in ((ours[0], theirs[0]), (ours[2], theirs[2])) for g, h in zip(a, b))
    torch.testing.assert_close(gradient_distance(ours, theirs), by_hand)
    assert float(gradient_distance(ours, ours)) < 1e-4
    assert float(gradient_distance(ours, [-g for g in ours])) == pytest.approx(2 * 9, abs=1e-4)

def test_a_dead_unit_has_a_finite_slope():
    weight = torch.zeros(2, 3, requires_grad=True)
    gradient_distance([weight], [torch.ones(2, 3)]).backward()
    assert weight.grad.isfinite().all()

@pytest.mark.parametrize("kind", ["none", *ALL_KINDS.split("_")])
def test_slope_by_differences(kind, data):
    network = build(TINY, data).double()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator("cpu", "images")); real = normalised(torch.from_numpy(data.images[:8]).double() / 255, data)
    drawn = draw_siamese(generator("cpu", 4, kind), kind, "cifar10")
    def slope(some): return class_slope(network, some, real, 1, lambda x: siamese(x, drawn))
    direction = torch.randn(images.shape, dtype=torch.float64, generator=generator("cpu", "direction")); small = 1e-6 * direction
    measured = float(slope(images + small)[0] - slope(images - small)[0]) / 2e-6
    assert measured == pytest.approx(float((slope(images)[1] * direction).sum()), rel=1e-5, abs=1e-7)

def test_step_equals_one_backward_of_the_sum(data):
    network, (real, labels) = build(TINY, data), to_device(data); members = class_indices(labels, data.classes)
    images = torch.randn(6, 3, 12, 12, generator=generator("cpu", "x")).requires_grad_()
    config = replace(QUICK, augment="none", batch_real=100)                    # more than a class has: all of it
    mean = image_step(network, images, members, real, data, config, (0, "k"))
    total = 0
    for label in range(3):
        theirs = [g.detach() for g in network_gradient(network, normalised(real[members[label]], data), torch.full((8,), label))]
        total = total + gradient_distance(network_gradient(network, images[2*label:2*label+2], torch.full((2,), label), True), theirs)
    torch.testing.assert_close(images.grad, torch.autograd.grad(total, images)[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(mean, total.detach() / 3)

# ---- loops

def test_loops():
    assert all(loops(ipc) == known for ipc, known in LOOPS.items())
    for ipc in range(2, 120):
        outer, inner = loops(ipc)
        assert outer == min(ipc, 50) and 450 <= outer * inner <= 620
    assert loops(10, 3) == (3, 50) and loops(10, None, 0) == (10, 0)

# ---- Siamese augmentation

@pytest.mark.parametrize("kind", list(OPERATIONS))
@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 9, 13)])
def test_operations_keep_shape_type_and_slope(kind, shape):
    images = torch.randn(shape, dtype=torch.float64, generator=generator("cpu", kind)).requires_grad_()
    drawn = draw_siamese(generator("cpu", 1), kind, "cifar100")
    seen = siamese(images, drawn)
    assert seen.shape == images.shape and seen.dtype == images.dtype
    assert torch.autograd.grad(seen.square().sum(), images)[0].isfinite().all()
    torch.testing.assert_close(seen[1:], siamese(images[1:], drawn))           # one change for all

def test_changes_are_what_they_say():
    images = torch.randn(1, 3, 16, 16, generator=generator("cpu", 0)); half = torch.full((1, 3), 0.5)
    for kind in ("scale", "rotate"): assert OPERATIONS[kind](images, half).shape == images.shape
    torch.testing.assert_close(OPERATIONS["rotate"](images, half), images, atol=1e-5, rtol=1e-5)   # the middle of the range: no turn
    torch.testing.assert_close(OPERATIONS["crop"](images, half), images)
    torch.testing.assert_close(OPERATIONS["color"](images, half), images, atol=1e-5, rtol=1e-5)
    moved = OPERATIONS["crop"](images, torch.tensor([[0.99, 0.5, 0.0]]))
    torch.testing.assert_close(moved[:, :, 2:], images[:, :, :-2]); assert not moved[:, :, :2].any()
    cut = OPERATIONS["cutout"](torch.ones(1, 1, 16, 16), half)
    assert int((cut == 0).sum()) == 64
    corner = OPERATIONS["cutout"](torch.ones(1, 1, 16, 16), torch.zeros(1, 3))
    assert int((corner == 0).sum()) == 16 and not corner[0, 0, :4, :4].any()
    assert torch.equal(OPERATIONS["flip"](images, torch.zeros(1, 3)), images.flip(3)) and torch.equal(OPERATIONS["flip"](images, half), images)
    grey = images.mean(1, keepdim=True).expand_as(images)
    assert torch.equal(OPERATIONS["color"](grey, torch.tensor([[0.5, 0.9, 0.5]])).isclose(grey, atol=1e-5), torch.ones_like(grey, dtype=torch.bool))

def test_strengths_stay_in_their_range():
    for chance in (torch.zeros(1, 3), torch.full((1, 3), 1 - 2**-24)):
        image = torch.ones(1, 1, 32, 32)
        assert int((OPERATIONS["crop"](image, chance) == 0).sum()) == 32*32 - 28*28
        assert OPERATIONS["cutout"](image, chance).sum() < 32*32

def test_which_image_gets_which_change():
    images = torch.randn(6, 3, 8, 8, generator=generator("cpu", 1)).requires_grad_(); which = torch.tensor([2, 0, 1, 2, 0, 1])
    drawn = draw_siamese(generator("cpu", 5), ALL_KINDS, "cifar10", 3)
    assert len(set(draw_siamese(generator("cpu", 5), ALL_KINDS, "cifar10", 60)["kind"])) == 6
    mixed = siamese(images, drawn, which)
    for i, own in enumerate(which):
        alone = {"kind": (drawn["kind"][own],), "chance": drawn["chance"][own:own+1]}
        torch.testing.assert_close(mixed[i:i+1], siamese(images[i:i+1], alone))
    torch.testing.assert_close(torch.autograd.grad(mixed[3].sum(), images)[0][[0, 1, 2, 4, 5]], torch.zeros(5, 3, 8, 8))
    with pytest.raises(ValueError, match="which"): siamese(images, drawn)

def test_draws_are_repeatable_and_digits_never_flip():
    one, two = (draw_siamese(generator("cpu", 7), ALL_KINDS, "cifar10", 5) for _ in range(2))
    assert one["kind"] == two["kind"] and torch.equal(one["chance"], two["chance"])
    assert len(set(draw_siamese(generator("cpu", 7), ALL_KINDS, "cifar10", 50, alike=True)["kind"])) == 1
    assert "flip" not in draw_siamese(generator("cpu", 7), ALL_KINDS, "digits", 200)["kind"]
    assert draw_siamese(generator("cpu", 7), "flip", "digits")["kind"] == ("none",)

# ---- the methods

def same(one, two): return np.array_equal(one.images, two.images)

@pytest.mark.parametrize("method, config", [(dc, QUICK), (dsa, DSA(**{**asdict(QUICK), "network": TINY, "augment": ALL_KINDS, "init": "real"}))])
@pytest.mark.parametrize("shape", [dict(), dict(classes=1), dict(channels=1, size=9), dict(classes=2, count=3, size=17)])
def test_any_shape(method, config, shape):
    data = some_data(**shape)
    for ipc in (1, 3):
        made = method(data, ipc, config)
        assert isinstance(made, SyntheticSet) and made.images.dtype == np.uint8 and made.images.shape == (ipc * len(data.classes), *data.images.shape[1:])
        assert made.labels.tolist() == np.repeat(np.arange(len(data.classes)), ipc).tolist() and made.classes == data.classes
        assert made.provenance["method"] == method.__name__ and made.provenance["config"]["iterations"] == 2 and made.provenance["seed"] == 0
        assert len(made.provenance["curve"]) == 4 and made.provenance["seconds"] > 0 and made.provenance["fingerprint"] == data.fingerprint

def test_seed_decides(data):
    one, two, other = (dc(data, 1, QUICK, seed) for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other)

def test_the_distance_falls():
    made = dc(load("digits").subset(range(300)), 1, replace(QUICK, iterations=25, outer=1, network=replace(TINY, width=16), learning_rate=1.0, batch_real=32))
    losses = [point["loss"] for point in made.provenance["curve"]]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]

@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_and_resumed_is_the_same(data, stop, tmp_path, monkeypatch):
    config = DSA(**{**asdict(QUICK), "network": replace(TINY, norm="batch"), "augment": ALL_KINDS})
    whole = dsa(data, 2, config)
    monkeypatch.setattr(module, "Checkpoint", lambda folder: every_time(folder, every=0.0)); monkeypatch.setattr(module, "CHECK_EVERY", 1)
    def killed(step, images, loss):
        if step == stop: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): dsa(data, 2, config, checkpoint=tmp_path, on_step=killed)
    steps = []
    resumed = dsa(data, 2, config, checkpoint=tmp_path, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(stop, 4)) and same(resumed, whole) and resumed.provenance["curve"] == whole.provenance["curve"]
    assert same(dsa(data, 2, config, checkpoint=tmp_path, on_step=lambda *_: pytest.fail("it was finished")), whole)
    with pytest.raises(UserError, match="another run"): dsa(data, 2, config, 1, checkpoint=tmp_path)
every_time = module.Checkpoint

def test_clip_keeps_pixels_in_range(data):
    seen = []
    dc(data, 1, replace(QUICK, clip=True, learning_rate=50.0), on_step=lambda step, images, loss: seen.append((images.min() >= 0) & (images.max() <= 1)))
    assert all(seen) and len(seen) == 4

@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_batchnorm_statistics(data, momentum):
    network, (real, labels) = build(replace(TINY, norm="batch"), data), to_device(data)
    settle_batchnorm(network, class_indices(labels, data.classes), real, data, replace(QUICK, bn_momentum=momentum), (0,))
    norm, first = network.backbone.blocks[0][1], network.backbone.blocks[0][0](normalised(real, data))
    torch.testing.assert_close(norm.running_mean, momentum * first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not norm.training

@pytest.mark.parametrize("size", [(8, 8), (9, 7), (2, 3)])
def test_halve_is_the_mean(size):
    maps = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator("cpu", 0)).requires_grad_()
    torch.testing.assert_close(Halve()(maps), torch.nn.AvgPool2d(2)(maps))
    assert torch.autograd.gradgradcheck(lambda x: Halve()(x).square(), maps)

def test_random_network_is_build_with_another_mean(data):
    one, two = build(TINY, data, seed=(0, "x")), random_network(TINY, data, "cpu", 0, "x"); images = torch.rand(2, 3, 12, 12)
    assert one.state_dict().keys() == two.state_dict().keys()
    torch.testing.assert_close(one(images), two(images))

def test_a_residual_network_too(data):
    assert len(dc(some_data(2, 4, 3, 16), 1, replace(QUICK, iterations=1, outer=1, network=Architecture(width=2)))) == 2

# ---- faults

@pytest.mark.parametrize("values, message", [(dict(iterations=0), "--config.iterations 0"), (dict(learning_rate=0.0), "--config.learning_rate 0.0"), (dict(init="zeros"), "--config.init zeros"),
    (dict(augment="colour_crop"), "did you mean 'color'"), (dict(outer=0), "--config.outer 0"), (dict(batch_real=0), "--config.batch_real"), (dict(network=replace(TINY, norm="layer")), "--config.network.norm layer"),
    (dict(network=replace(TINY, depth=9)), "network.depth 9"), (dict(learning_rate=float("nan")), "--config.learning_rate nan")])
def test_a_wrong_value_is_one_line(values, message, data):
    with pytest.raises(UserError) as found: dc(data, 1, replace(QUICK, **values))
    assert message in str(found.value) and "\n" not in str(found.value)

def test_too_many_images(data):
    with pytest.raises(UserError, match="--ipc 9"): dsa(data, 9, replace(QUICK, init="real"))
    with pytest.raises(UserError, match="--ipc 0"): dc(data, 0, QUICK)
    assert len(dc(data, 9, replace(QUICK, iterations=1, outer=1))) == 27      # from noise there may be more than real ones

def test_no_number_is_named_with_its_step(data, tmp_path):
    with pytest.raises(UserError, match="finite number any more at step"): dc(data, 1, replace(QUICK, iterations=6, outer=1, learning_rate=1e38), checkpoint=tmp_path)

def test_every_value_has_a_comment():
    assert set(comments(DC)) == set(asdict(DC())); assert set(comments(DSA)) == {"init", "augment"} and check_config(DSA()) is None
