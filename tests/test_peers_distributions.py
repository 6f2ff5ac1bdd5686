"Distribution matching: brute force, slopes by differences, groups of classes, watchers, any class and image count, interrupted is the same as not, faults."
from dataclasses import asdict, replace
import numpy as np, pytest, torch
from torch.nn import functional as F
from scdd.data import ImageData, load, mean_std, pixel_moments, to_device
from scdd.device import generator
from scdd.files import UserError
from scdd.models import build
from scdd.peers import distributions as module, gradients
from scdd.peers.coresets import class_indices, draw_real, normalised
from scdd.peers.distributions import CAFE, DM, alignment, cafe, cafe_step, class_means, discrimination, distribution_step, dm, fresh_network, groups, halved, layer_features, numbered, real_layers, real_rows, says_stop, tapped, train_until, watched_accuracy
from scdd.peers.gradients import ALL_KINDS, check_config, draw_siamese, siamese
from scdd.recipes import Architecture, comments

TINY = Architecture("convnet", width=4, depth=2, norm="instance")
BN = replace(TINY, norm="batch")
QUICK = DM(iterations=3, batch_real=6, network=TINY)
BRIEF = CAFE(iterations=2, batch_real=6, batch_watch=4, window=2, outer_cap=3, inner_cap=2, network=TINY, settled=0.0)

def some_data(classes=3, count=8, channels=3, size=12, name="folder", short=0):
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), count)[short:]                     # the first class may have fewer
    images = (random.random((len(labels), channels, size, size)) * 255).astype(np.uint8)
    images[..., :size//2, :] = np.minimum(images[..., :size//2, :] // 2 + 30 * labels[:, None, None, None].astype(np.uint8), 255)
    return ImageData(images, labels.astype(np.int64), tuple(f"c{i}" for i in range(classes)), *mean_std(*pixel_moments(images)), "train", name, f"{name}{classes}{count}{channels}{size}{short}")

@pytest.fixture(scope="module")
def data(): return some_data(short=5)

def parts(data):
    real, labels = to_device(data)
    return real, class_indices(labels, data.classes)

def brute_force(network, images, members, real, data, config, key):
    "Class by class, in the plainest words."
    drawn, total = draw_siamese(generator("cpu", *key, "augment"), config.augment, data.name, len(members)), 0
    ipc = len(images) // len(members)
    for label, mine in enumerate(members):
        own = {"kind": drawn["kind"][label:label+1], "chance": drawn["chance"][label:label+1]}
        some = real[draw_real(mine, config.batch_real, generator("cpu", *key, "real", label))]
        theirs = network.backbone(siamese(normalised(some, data), own)).mean(0).detach()
        total = total + ((network.backbone(siamese(images[label*ipc:(label+1)*ipc], own)).mean(0) - theirs)**2).sum()
    return total

# ---- DM

@pytest.mark.parametrize("at_once", [1, 12, 10000])
def test_step_against_brute_force(data, at_once):
    (real, members), network, config = parts(data), build(TINY, data), replace(QUICK, at_once=at_once)
    images = torch.randn(6, 3, 12, 12, generator=generator("cpu", "x")).requires_grad_()
    for step in range(3):
        total = brute_force(network, images, members, real, data, config, (0, step))
        loss = distribution_step(network, images, members, real, data, config, (0, step))
        torch.testing.assert_close(loss * 3, total.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(images.grad, torch.autograd.grad(total, images)[0], rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize("network", [TINY, BN])
def test_slope_by_differences(data, network):
    (real, members), network = parts(data), build(network, data).double()
    real = real.double() / 255                                                  # float pixels, for float64 throughout
    images = torch.randn(6, 3, 12, 12, dtype=torch.float64, generator=generator("cpu", "x")); direction = torch.randn(images.shape, dtype=torch.float64, generator=generator("cpu", "d"))
    def loss(some): return float(distribution_step(network, some, members, real, data, QUICK, (0, 1)).double())
    def of(some):                                                               # the step adds up in float32
        drawn = draw_siamese(generator("cpu", 0, 1, "augment"), ALL_KINDS, data.name, 3); rows, counts = real_rows(members, 6, (0, 1))
        theirs = class_means(network.backbone(siamese(normalised(real[rows], data), drawn, numbered(counts))), counts)
        return float((class_means(network.backbone(siamese(some, drawn, numbered([2] * 3))), [2] * 3) - theirs).square().sum().detach())
    measured = (of(images + 1e-6 * direction) - of(images - 1e-6 * direction)) / 2e-6
    assert loss(images) == pytest.approx(of(images) / 3, rel=1e-5)
    assert measured == pytest.approx(float((images.grad * direction).sum()), rel=1e-5)

def test_embedded_in_pieces(data, monkeypatch):
    images = torch.randn(70, 3, 12, 12, generator=generator("cpu", 0))
    for network in (build(TINY, data), build(BN, data).train()):
        monkeypatch.setattr(module, "PIECE", 1)
        with torch.no_grad(): whole = network.backbone(images)
        torch.testing.assert_close(module.embedded(network, images), whole, rtol=1e-4, atol=1e-5)

def test_a_few_classes_at_a_time_are_all_of_them(data, monkeypatch):
    (real, members), network = parts(data), build(TINY, data); images = torch.randn(6, 3, 12, 12, generator=generator("cpu", 0)); found = []
    for piece in (module.PIECE, 1):                                                # all three classes at once, and one by one
        monkeypatch.setattr(module, "PIECE", piece); found.append((distribution_step(network, images, members, real, data, QUICK, (0, 1)), images.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)

def test_compiled_features_serve_every_network(data):
    if not module.can_compile(): pytest.skip("no compiler on this machine")
    (real, members), images = parts(data), torch.randn(6, 3, 12, 12, generator=generator("cpu", 0)); features = module.compiled_features(build(TINY, data))
    for seed in (1, 2):
        network, found = build(TINY, data, seed=seed), []
        for way in (module.features_of, features): found.append((distribution_step(network, images, members, real, data, QUICK, (0, seed), way), images.grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)

def test_only_what_is_long_enough_is_compiled(data, monkeypatch):
    members = parts(data)[1]; pixels = (3 + 6 + 6) * 12 * 12; long = -(-module.WORTH // pixels)
    def chosen(iterations, network=TINY, device="cpu"): return module.quickest(data, members, replace(QUICK, iterations=iterations, network=network), torch.device(device))
    monkeypatch.setattr(module, "can_compile", lambda: True); monkeypatch.setattr(module, "compiled_features", lambda network: "compiled")
    assert chosen(long) == "compiled" and chosen(long - 1) is chosen(long, BN) is chosen(long, device="meta") is module.features_of
    monkeypatch.setattr(module, "can_compile", lambda: False); assert chosen(long) is module.features_of

def test_class_means():
    features = torch.randn(9, 2, 3, generator=generator("cpu", 0))
    torch.testing.assert_close(class_means(features, [3, 3, 3]), torch.stack([features[i:i+3].mean(0) for i in (0, 3, 6)]))
    torch.testing.assert_close(class_means(features, [1, 6, 2]), torch.stack([features[:1].mean(0), features[1:7].mean(0), features[7:].mean(0)]))
    assert numbered([1, 3], 4).tolist() == [4, 5, 5, 5]

def test_groups(data):
    instance, batch = build(TINY, data), build(BN, data)
    assert groups(instance, replace(QUICK, at_once=13), 5, 1) == [range(0, 2), range(2, 4), range(4, 5)]
    assert groups(instance, replace(QUICK, at_once=1), 3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert groups(batch, replace(QUICK, at_once=1), 5, 1) == [range(5)]

def test_real_rows_do_not_depend_on_groups(data):
    _, members = parts(data)
    whole, counts = real_rows(members, 6, (0,))
    apart = [real_rows(members[i:i+1], 6, (0,), i)[0] for i in range(3)]
    assert torch.equal(whole, torch.cat(apart)) and counts == [3, 6, 6]

def same(one, two): return np.array_equal(one.images, two.images)

def test_embedder_and_learning_rate(data, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "random_network", lambda *given: seen.append(given[3:]) or gradients.random_network(*given))
    assert dm(data, 1, replace(QUICK, embedder="fixed")).provenance["learning_rate"] == 1.0 and len(set(seen)) == 1
    seen.clear(); dm(data, 1, QUICK); assert len(set(seen)) == 3
    assert dm(data, 100, replace(QUICK, init="noise", iterations=1)).provenance["learning_rate"] == 10.0
    assert dm(data, 1, replace(QUICK, learning_rate=0.5)).provenance["learning_rate"] == 0.5

def test_the_loss_falls():
    curve = [point["loss"] for point in dm(load("digits").subset(range(300)), 1, DM(iterations=60, batch_real=32, network=replace(TINY, width=16), augment="none")).provenance["curve"]]
    assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:5])

# ---- CAFE

def test_layers_of_convnet_and_resnet(data):
    network = build(TINY, data); images = torch.randn(2, 3, 12, 12, generator=generator("cpu", 0))
    found = layer_features(network, images)
    assert [tuple(some.shape) for some in found] == [(2, 4, 12, 12), (2, 4, 6, 6), (2, 36)]
    first = network.backbone.blocks[0]
    torch.testing.assert_close(found[0], F.relu(first[1](first[0](images)))); torch.testing.assert_close(found[-1], network.backbone(images))
    assert not any(module._forward_hooks for module in network.modules())
    assert len(layer_features(build(Architecture(width=2), data), images)) == 5
    with pytest.raises(UserError, match="--config.network.name vit_tiny"): tapped(type("Fake", (), {"backbone": None, "architecture": Architecture("vit_tiny")}))

def test_alignment_has_the_published_weights():
    ours, theirs = ([torch.randn(3, 4, generator=generator("cpu", name, i)) for i in range(4)] for name in "ab")
    expected = sum(weight * ((a - b)**2).sum() for weight, a, b in zip((0.1, 0.1, 1, 1), ours, theirs)) + ((ours[3] - theirs[3])**2).sum()
    torch.testing.assert_close(alignment(ours, theirs, CAFE()), expected)

def test_discrimination_against_a_loop():
    features, centres, labels = torch.randn(5, 4, generator=generator("cpu", 1)), torch.randn(3, 4, generator=generator("cpu", 2)), torch.tensor([0, 2, 1, 1, 0])
    expected = -sum(torch.log_softmax(torch.stack([features[i] @ centre for centre in centres]), 0)[labels[i]] for i in range(5))
    torch.testing.assert_close(discrimination(features, centres, labels), expected)

@pytest.mark.parametrize("augment", ["none", ALL_KINDS])
def test_cafe_slope_by_differences(data, augment):
    (real, members), network, config = parts(data), build(TINY, data).double(), replace(BRIEF, augment=augment)
    real = real.double() / 255
    images = torch.randn(6, 3, 12, 12, dtype=torch.float64, generator=generator("cpu", "x")).requires_grad_(); direction = torch.randn(images.shape, dtype=torch.float64, generator=generator("cpu", "d"))
    def loss(some): return float(cafe_step(network, some.detach().requires_grad_(), members, real, data, config, (0, 1))) * 3
    measured = (loss(images + 1e-6 * direction) - loss(images - 1e-6 * direction)) / 2e-6
    cafe_step(network, images, members, real, data, config, (0, 1))
    assert measured == pytest.approx(float((images.grad * direction).sum()), rel=1e-5)

@pytest.mark.parametrize("at_once", [1, 10000])
def test_real_layers_by_hand(data, at_once):
    (real, members), network, config = parts(data), build(TINY, data), replace(BRIEF, at_once=at_once)
    drawn = draw_siamese(generator("cpu", 0), "none", data.name, 3)
    means, embeddings, labels = real_layers(network, members, real, data, config, drawn, (0,))
    rows, counts = real_rows(members, 6, (0,)); whole = layer_features(network, normalised(real[rows], data))
    for found, layer in zip(means, whole): torch.testing.assert_close(found, torch.stack([layer[labels == c].mean(0) for c in range(3)]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings, whole[-1], rtol=1e-4, atol=1e-5); assert labels.tolist() == np.repeat([0, 1, 2], counts).tolist()

def test_watchers():
    assert not says_stop([0.5] * 9, 10, 0.04, "settled") and says_stop([0.5] * 10, 10, 0.04, "settled")
    assert not says_stop([0.5] * 10, 10, 0.03, "moved") and says_stop([0.1] + [0.5] * 9, 10, 0.03, "moved") and not says_stop([0.1] + [0.5] * 10, 10, 0.03, "moved")

def test_the_inner_loop_ends_at_its_cap(data):
    (real, members), config = parts(data), replace(BRIEF, network_rate=1e-9, inner_cap=7)
    network, trainer = fresh_network(config, data, "cpu", 0)
    seen = train_until(network, trainer, torch.randn(3, 3, 12, 12, generator=generator("cpu", 0)), torch.arange(3), members, real, data, replace(config, batch_watch=100), (0,))
    assert len(seen) == 7 and len(set(seen)) == 1
    again = train_until(network, trainer, torch.randn(3, 3, 12, 12, generator=generator("cpu", 0)), torch.arange(3), members, real, data, replace(config, batch_watch=100, inner_stop="settled"), (0,))
    assert len(again) == config.window

def test_watched_accuracy_is_a_mean_over_classes(data):
    (real, members), network = parts(data), build(TINY, data)
    with torch.no_grad(): right = network.normalized(normalised(real, data)).argmax(1) == torch.from_numpy(data.labels)
    expected = float(torch.stack([right[mine].float().mean() for mine in members]).mean())
    assert watched_accuracy(network, members, real, data, replace(BRIEF, batch_watch=100), (0,)) == pytest.approx(expected)

def test_halvings(): assert [halved(CAFE(), i) for i in (0, 1199, 1200, 1599, 1600, 1800)] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.0125]

def test_turns_are_counted_and_capped(data):
    made = cafe(data, 1, BRIEF)
    assert made.provenance["turns"] == [3, 3] and len(made.provenance["curve"]) == 6
    assert cafe(data, 1, replace(BRIEF, settled=2.0)).provenance["turns"] == [2, 2]          # the window is full, and everything counts as settled

# ---- among processes

def test_seconds_of_steps_and_medians():
    found = module.seconds_of_steps("dm", 1)
    assert found["clock"] > 0 and found["processor"] > 0
    turns = {1: [[{"clock": seconds, "processor": 3.0}] for seconds in (4.0, 9.0, 6.0)], 2: [[{"clock": seconds, "processor": 2.0}] for seconds in (5.0, 3.0, 1.0)]}
    assert module.compared(turns, 0) == {"method": "dc", "ipc": 1, "clock, one process": 6.0, "clock, two processes": 3.0, "clock, times as fast": 2.0,
                                         "processor, one process": 3.0, "processor, two processes": 2.0, "processor, times as fast": 1.5}

@pytest.mark.parametrize("network, expected", [(TINY, [range(2, 3), range(3, 4)]), (BN, [range(4)])])
def test_of_several_processes_each_has_some_classes(network, expected, data, monkeypatch):
    from scdd import processes
    monkeypatch.setattr(processes, "rank", lambda: 1); monkeypatch.setattr(processes, "ranks", lambda: 2)
    assert groups(build(network, data), replace(QUICK, at_once=6), 4, 1) == expected

# ---- both

METHODS = [(dm, QUICK), (dm, replace(QUICK, network=BN)), (cafe, BRIEF), (cafe, replace(BRIEF, augment=ALL_KINDS, init="real", network=BN))]

@pytest.mark.parametrize("method, config", METHODS)
@pytest.mark.parametrize("shape", [dict(), dict(classes=1), dict(channels=1, size=9), dict(classes=4, count=7, size=17, short=4)])
def test_any_shape(method, config, shape):
    data = some_data(**shape)
    for ipc in (1, 3):
        made = method(data, ipc, config)
        assert made.images.dtype == np.uint8 and made.images.shape == (ipc * len(data.classes), *data.images.shape[1:])
        assert made.labels.tolist() == np.repeat(np.arange(len(data.classes)), ipc).tolist() and made.classes == data.classes
        assert made.provenance["method"] == method.__name__ and made.provenance["fingerprint"] == data.fingerprint and made.provenance["seconds"] > 0

@pytest.mark.parametrize("method, config", METHODS)
def test_interrupted_and_resumed_is_the_same(data, method, config, tmp_path, monkeypatch):
    whole, other = method(data, 2, config), method(data, 2, config, 1)
    assert same(whole, method(data, 2, config)) and not same(whole, other)
    real_checkpoint = module.Checkpoint
    monkeypatch.setattr(module, "Checkpoint", lambda folder: real_checkpoint(folder, every=0.0)); monkeypatch.setattr(gradients, "CHECK_EVERY", 1)
    def killed(step, images, loss):
        if step == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): method(data, 2, config, checkpoint=tmp_path, on_step=killed)
    steps = []
    resumed = method(data, 2, config, checkpoint=tmp_path, on_step=lambda step, *_: steps.append(step))
    assert steps[0] == 2 and same(resumed, whole) and resumed.provenance["curve"] == whole.provenance["curve"]
    assert resumed.provenance.get("turns") == whole.provenance.get("turns")
    with pytest.raises(UserError, match="another run"): method(data, 2, config, 1, checkpoint=tmp_path)

@pytest.mark.parametrize("method, config", METHODS[::2])
@pytest.mark.parametrize("values, message", [(dict(iterations=0), "--config.iterations 0"), (dict(init="zeros"), "--config.init zeros"), (dict(augment="crops"), "did you mean 'crop'"), (dict(at_once=0), "--config.at_once 0"),
    (dict(network=replace(TINY, depth=9)), "network.depth 9"), (dict(learning_rate=-1.0), "--config.learning_rate -1.0")])
def test_a_wrong_value_is_one_line(method, config, values, message, data):
    with pytest.raises(UserError) as found: method(data, 1, replace(config, **values))
    assert message in str(found.value) and "\n" not in str(found.value)

@pytest.mark.parametrize("values", [dict(window=0), dict(outer_cap=0), dict(inner_cap=0), dict(inner_stop="never"), dict(halvings=(0.6, 1.5))])
def test_a_wrong_watcher(values, data):
    with pytest.raises(UserError, match=f"--config.{list(values)[0]}"): cafe(data, 1, replace(BRIEF, **values))

def test_too_many_images(data):
    with pytest.raises(UserError, match="--ipc 4"): dm(data, 4, QUICK)
    assert len(cafe(data, 4, BRIEF)) == 12

@pytest.mark.parametrize("method, config", [(dm, replace(QUICK, iterations=6, learning_rate=1e38)), (cafe, replace(BRIEF, learning_rate=1e38))])
def test_no_number_is_named_with_its_step(method, config, data):
    with pytest.raises(UserError, match="finite number any more at step"): method(data, 1, config)

def test_every_value_has_a_comment():
    for config in (DM(), CAFE()): assert set(comments(type(config))) == set(asdict(config)) and check_config(config) is None
