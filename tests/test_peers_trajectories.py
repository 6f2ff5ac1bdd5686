"Trajectory matching: gradients against finite differences and full unrolling, experts that resume and are refused, ZCA and back, faults."
import json
from dataclasses import replace
import numpy as np, pytest, torch
from scdd.data import ImageData, load, to_device
from scdd.device import generator
from scdd.files import Checkpoint, UserError, read_tensors
from scdd.models import build
from scdd.peers import trajectories as module
from scdd.peers.coresets import normalised
from scdd.peers.trajectories import (Alive, Experts, MTT, PUBLISHED, TESLA, View, adjoint, as_function, as_whitened, check_origin, check_zca, draw_views, final_labels, fit_zca, flat,
                                     missing_way, mtt, origin_of, published, slopes_of, student_loss, tesla, train_experts, unrolled, unwhiten, whiten)
from scdd.recipes import Architecture
from scdd.recover import SyntheticSet

TINY = Architecture("convnet", width=4, depth=2, norm="instance")
EXPERTS = Experts(count=2, epochs=3, batch=50, learning_rate=0.05, augment="none")
QUICK = MTT(iterations=6, network=TINY, experts=EXPERTS, steps=3, ahead=1, starts=2, image_rate=1.0, step_rate=1e-4, step_size=0.05, augment="none")

@pytest.fixture(scope="module")
def train(): return load("digits").subset(range(200))

def made(count, classes, channels=1, height=16, width=16):
    random = np.random.default_rng(0)
    labels = np.arange(count) % classes
    return ImageData(random.integers(0, 256, (count, channels, height, width), np.uint8), labels.astype(np.int64), tuple(f"c{i}" for i in range(classes)), (0.5,) * channels, (0.3,) * channels, name="made", fingerprint=f"{count} {classes} {channels} {height}")

@pytest.fixture(scope="module")
def problem(train):
    "A student's loss in float64, with a start, a target and images."
    logits, _ = as_function(build(TINY, train, 0).double())
    start = flat(build(TINY, train, 1)).double()
    target = start + 0.05 * torch.randn(start.shape, generator=generator("cpu", "target"), dtype=torch.float64)
    images = normalised(to_device(train)[0][:6], train).double()
    return student_loss(logits), start, target, images, to_device(train)[1][:6], torch.tensor(0.1, dtype=torch.float64)

# gradients

def test_the_function_is_the_network(train):
    network = build(TINY, train, 3); logits, shapes = as_function(network)
    images = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(logits(flat(network), images), network.normalized(images), atol=1e-5, rtol=1e-4)
    assert sum(np.prod(shape) for shape in shapes.values()) == len(flat(network))

@pytest.mark.parametrize("which", ["unrolled", "adjoint"])
def test_gradient_against_finite_differences(problem, which):
    loss, start, target, images, labels, step = problem; views = [View()] * 4
    def ratio(images, step): return float(unrolled(loss, start, target, images, labels, step, views)[0])
    found = unrolled(loss, *problem[1:], views) if which == "unrolled" else adjoint(slopes_of(loss), *problem[1:], views)
    for place in [(0, 0, 3, 4), (5, 0, 8, 8), (2, 0, 15, 0)]:
        nudge = torch.zeros_like(images); nudge[place] = 1e-6
        assert abs(float(found[1][place]) - (ratio(images + nudge, step) - ratio(images - nudge, step)) / 2e-6) < 1e-6 * float(found[1].abs().max()) + 1e-9
    by_step = (ratio(images, step + 1e-6) - ratio(images, step - 1e-6)) / 2e-6
    assert abs(float(found[2]) / by_step - 1) < 1e-6

@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("augment", ["none", "color_crop_cutout_flip_scale_rotate"])
def test_the_adjoint_is_full_unrolling(problem, soft, augment):
    loss, start, target, images, labels, step = problem
    if soft: labels = torch.rand(6, 10, dtype=torch.float64, generator=generator("cpu", "soft")).softmax(1)
    views = draw_views(6, MTT(steps=12, batch=4, augment=augment), 0, 0, "cpu", "digits")
    true = unrolled(loss, start, target, images, labels, step, views)
    found = adjoint(slopes_of(loss), start, target, images, labels, step, views)
    for one, other in zip(true, found): assert float((one - other).norm() / one.norm()) < 1e-10
    released = adjoint(slopes_of(loss), start, target, images, labels, step, views, exact=False)
    assert float((true[1] - released[1]).norm() / true[1].norm()) > 1e-6 and float(released[0]) == pytest.approx(float(true[0]))

def test_released_is_the_published_formula(problem):
    loss, start, target, images, labels, step = problem
    points, images = [start], images.clone().requires_grad_(); total = 0
    for _ in range(5):
        weights = points[-1].detach().requires_grad_(); slope = torch.autograd.grad(loss(weights, images, labels), weights)[0]
        total = total + slope; points.append(points[-1] - step * slope)
    wanted = 0
    for point in points[:-1]:
        weights = point.detach().requires_grad_(); slope = torch.autograd.grad(loss(weights, images, labels), weights, create_graph=True)[0]
        wanted = wanted + 2 * torch.autograd.grad((step * (target - start) + step ** 2 * total) @ slope / (start - target).square().sum(), images)[0]
    found = adjoint(slopes_of(loss), start, target, images.detach(), labels, step, [View()] * 5, exact=False)
    assert float((found[1] - wanted).norm() / wanted.norm()) < 1e-10
    free = step.clone().requires_grad_(); slope = torch.autograd.grad((start - free * total - target).square().sum() / (start - target).square().sum(), free)[0]
    assert float(found[2]) == pytest.approx(float(slope), rel=1e-10)

def test_one_step_needs_no_recursion(problem):
    loss, *rest = problem
    one, other = (adjoint(slopes_of(loss), *rest, [View()], exact=exact) for exact in (True, False))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)

def test_memory_grows_with_unrolling_only(train):
    logits, _ = as_function(build(TINY, train, 0)); loss = student_loss(logits)
    start = flat(build(TINY, train, 1)); images, labels = (value[:32] for value in (normalised(to_device(train)[0], train), to_device(train)[1]))
    def peak(function):
        with Alive() as alive: function()
        return alive.most
    def both(steps):
        given = start, start + 0.01, images, labels, torch.tensor(0.05), [View()] * steps
        return peak(lambda: unrolled(loss, *given)), peak(lambda: adjoint(slopes_of(loss), *given))
    few, many = both(3), both(12)
    assert many[0] > 2.5 * few[0] and many[1] < few[1] + 12 * 3 * start.numel() * 4 and many[1] < many[0] / 2

# experts

def test_together_is_one_after_the_other(train, tmp_path):
    one, other = (train_experts(train, TINY, replace(EXPERTS, count=3, together=together, momentum=0.5, weight_decay=1e-3), 0, "cpu", tmp_path/str(together)) for together in (1, 3))
    for expert in range(3): torch.testing.assert_close(one.points(expert, 3), other.points(expert, 3), atol=1e-5, rtol=1e-4)
    assert not torch.equal(one.points(0, 0)[0], one.points(1, 0)[0])

def test_a_compiled_expert_walks_the_same_way(train, tmp_path):
    if not module.can_compile(): pytest.skip("no compiler on this machine")
    config = replace(EXPERTS, count=1, epochs=1, precision="float32")
    plain, compiled = (train_experts(train, TINY, replace(config, compile=wish), 0, "cpu", tmp_path/wish).points(0, 1)[0] for wish in ("off", "on"))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
    assert train_experts(train, TINY, config, 0, "cpu", tmp_path/"on").count == 1  # how it was computed does not make it another expert

@pytest.mark.parametrize("rows", [3, 8, 100])
def test_pieces_give_the_slopes_of_the_whole(train, rows):
    slopes = module.expert_slopes(module.as_function(build(TINY, train, 0))[0], 1, "cpu"); images, labels = normalised(torch.tensor(train.images[:20]), train)[None], torch.tensor(train.labels[:20])[None]
    weights = module.flat(build(TINY, train, 1))[None]
    for one, other in zip(module.in_pieces(slopes, rows)(weights, images, labels), slopes(weights, images, labels)): torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_order_in_memory_changes_no_answer(train):
    network = build(TINY, train, 0); images = normalised(torch.tensor(train.images[:5]), train); weights = module.flat(build(TINY, train, 1))
    plain, last = (module.as_function(network, order)[0](weights, images) for order in (False, True))
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-4)


def test_only_what_is_long_enough_is_compiled(monkeypatch):
    monkeypatch.setattr(module, "can_compile", lambda: True)
    few, many = module.WORTH_COMPILING - 1, module.WORTH_COMPILING
    assert [module.compiles(wish, pixels) for wish in ("auto", "on", "off") for pixels in (few, many)] == [False, True, True, True, False, False]
    monkeypatch.setattr(module, "can_compile", lambda: False)
    assert not module.compiles("auto", many)

def test_an_expert_is_plain_sgd(train, tmp_path):
    buffer = train_experts(train, TINY, replace(EXPERTS, count=1, epochs=1), 0, "cpu", tmp_path)
    network = build(TINY, train, 0); torch.nn.utils.vector_to_parameters(buffer.points(0, 0)[0], network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.05); images, labels = normalised(to_device(train)[0], train), to_device(train)[1]
    for chosen in torch.randperm(200, generator=generator("cpu", 0, "experts", "order", 0, 0)).split(50):
        loss = torch.nn.functional.cross_entropy(network.normalized(images[chosen]), labels[chosen]); optimizer.zero_grad(); loss.backward(); optimizer.step()
    torch.testing.assert_close(flat(network), buffer.points(0, 1)[0], atol=1e-5, rtol=1e-4)

def test_experts_resume(train, tmp_path, monkeypatch):
    whole = train_experts(train, TINY, EXPERTS, 0, "cpu", tmp_path/"whole")
    monkeypatch.setattr(module, "Checkpoint", lambda folder: Checkpoint(folder, every=0.0))
    real, calls = module.expert_epoch, []
    def stops(*given):
        if len(calls) == 5: raise KeyboardInterrupt      # in the last epoch of the second expert
        calls.append(1); return real(*given)
    monkeypatch.setattr(module, "expert_epoch", stops)
    with pytest.raises(KeyboardInterrupt): train_experts(train, TINY, EXPERTS, 0, "cpu", tmp_path/"parts")
    monkeypatch.setattr(module, "expert_epoch", lambda *given: calls.append(1) or real(*given))
    parts = train_experts(train, TINY, EXPERTS, 0, "cpu", tmp_path/"parts")
    assert len(calls) == EXPERTS.count * EXPERTS.epochs
    for expert in range(2): assert torch.equal(torch.stack(whole.points(expert, 0, 1, 2, 3)), torch.stack(parts.points(expert, 0, 1, 2, 3)))
    before = {expert: parts.path(expert).stat().st_mtime_ns for expert in range(2)}
    more = train_experts(train, TINY, replace(EXPERTS, count=3), 0, "cpu", tmp_path/"parts")
    assert more.path(2).exists() and all(parts.path(expert).stat().st_mtime_ns == before[expert] for expert in range(2))

def test_experts_are_open_files(train, tmp_path):
    buffer = train_experts(train, TINY, EXPERTS, 0, "cpu", tmp_path)
    tensors, about = read_tensors(buffer.path(0))
    assert tensors["weights"].shape == (4, len(flat(build(TINY, train, 0)))) and len(json.loads(about["losses"])) == 3
    assert sum(np.prod(shape) for shape in json.loads(about["shapes"]).values()) == tensors["weights"].shape[1]

@pytest.mark.parametrize("change, word", [(dict(architecture=replace(TINY, width=8)), "network"), (dict(seed=1), "seed"), (dict(config=replace(EXPERTS, count=1, epochs=1, learning_rate=0.1)), "learning_rate"),
                                          (dict(data=made(60, 3)), "classes")])
def test_experts_of_something_else_are_refused(train, tmp_path, change, word):
    given = dict(data=train, architecture=TINY, config=replace(EXPERTS, count=1, epochs=1), seed=0, device="cpu", folder=tmp_path)
    train_experts(**given)
    with pytest.raises(UserError, match=f"made with {word}.*--config.folder"): train_experts(**given | change)

def test_a_cut_expert_is_named(train, tmp_path):
    buffer = train_experts(train, TINY, EXPERTS, 0, "cpu", tmp_path)
    buffer.path(1).write_bytes(buffer.path(1).read_bytes()[:-50])
    with pytest.raises(UserError, match="expert-00001.safetensors"): buffer.points(1, 0)

# ZCA

def test_zca_whitens_and_comes_back(train):
    transform = fit_zca(train, 0.1); images = normalised(to_device(train)[0], train)
    white = whiten(images, transform)
    torch.testing.assert_close(unwhiten(white, transform), images, atol=1e-3, rtol=1e-3)
    values = torch.linalg.eigvalsh(torch.cov(images.flatten(1).T.double(), correction=0)); found = torch.linalg.eigvalsh(torch.cov(white.flatten(1).T.double(), correction=0))
    torch.testing.assert_close(found, (values / (values + 0.1)).sort().values, atol=1e-3, rtol=1e-3)

def test_zca_without_inverse_is_refused(train):
    with pytest.raises(UserError, match="zca_epsilon 0"): fit_zca(train, 0.0)
    transform = fit_zca(train); transform.pop("inverse")
    with pytest.raises(UserError, match="inverse"): check_zca(transform)
    with pytest.raises(UserError, match="inverse"): unwhiten(torch.zeros(1, 1, 16, 16), transform)

def test_experts_under_another_whitening_are_refused_with_round_numbers(train, tmp_path):
    transform = fit_zca(train, 0.1); told = origin_of(train, Architecture("convnet", 8, norm="instance"), Experts(), 0, transform)
    check_origin(tmp_path, told)
    with pytest.raises(UserError, match="made with zca 0.1, and 0.2 is wanted"): check_origin(tmp_path, told | {"zca": 0.2})

def test_zca_of_large_images_is_refused():
    with pytest.raises(UserError, match="--config.zca"): fit_zca(made(2, 1, 3, 80, 80))

def test_whitened_sets_are_bytes(train):
    transform = fit_zca(train); wide = as_whitened(train, transform)
    back = normalised(to_device(wide)[0], wide); white = whiten(normalised(to_device(train)[0], train), transform)
    assert wide.images.dtype == np.uint8 and float((back - white).abs().median()) < 0.03

# the methods

def alike(one, other): return np.array_equal(one.images, other.images) and one.learned_step == other.learned_step

@pytest.mark.parametrize("config", [QUICK, replace(QUICK, gradient="adjoint", batch=4, augment="color_crop_cutout_scale_rotate"), replace(QUICK, zca=True, labels="expert", gradient="released")])
def test_interrupted_and_resumed_is_the_same(train, tmp_path, monkeypatch, config):
    config = replace(config, folder=str(tmp_path/"experts"))
    whole = mtt(train, 1, config, device="cpu")
    monkeypatch.setattr(module, "Checkpoint", lambda folder: Checkpoint(folder, every=0.0)); monkeypatch.setattr(module, "CHECK_EVERY", 1)
    real, calls = module.draw_stretch, []
    def stops(*given):
        if len(calls) == 4: raise KeyboardInterrupt
        calls.append(1); return real(*given)
    monkeypatch.setattr(module, "draw_stretch", stops)
    with pytest.raises(KeyboardInterrupt): mtt(train, 1, config, device="cpu", checkpoint=tmp_path/"run")
    monkeypatch.setattr(module, "draw_stretch", lambda *given: calls.append(1) or real(*given))
    resumed = mtt(train, 1, config, device="cpu", checkpoint=tmp_path/"run")
    assert len(calls) == 6 and alike(whole, resumed)
    again = mtt(train, 1, config, device="cpu", checkpoint=tmp_path/"run")  # killed before the set was stored: nothing is walked again
    assert len(calls) == 6 and alike(whole, again)

def test_seconds_of_experts_are_of_all_attempts(train, tmp_path):
    first = mtt(train, 1, QUICK, device="cpu", checkpoint=tmp_path/"run")
    again = mtt(train, 1, QUICK, device="cpu", checkpoint=tmp_path/"run")   # the experts are there already
    assert again.provenance["expert_seconds"] == first.provenance["expert_seconds"] > 0
    assert mtt(train, 1, replace(QUICK, folder=str(tmp_path/"run"/"experts")), device="cpu").provenance["expert_seconds"] < first.provenance["expert_seconds"]   # not trained for this set

def test_seed_decides(train):
    one, two, other = (mtt(train, 1, replace(QUICK, iterations=2), seed, "cpu") for seed in (0, 0, 1))
    assert alike(one, two) and not alike(one, other)

def test_it_learns(train, tmp_path):
    config = replace(QUICK, iterations=60, steps=6, starts=1, image_rate=100.0, step_rate=1e-3, folder=str(tmp_path))
    curve = [row["loss"] for row in mtt(train, 1, config, device="cpu").provenance["curve"]]
    assert np.mean(curve[-10:]) < 0.97 * np.mean(curve[:10])

@pytest.mark.parametrize("shape", [(10, 1, 3, 12, 12), (12, 3, 1, 20, 20), (12, 2, 3, 13, 13)])
def test_any_shape(shape):
    data = made(*shape)
    for method, config in ((mtt, QUICK), (tesla, replace(TESLA(), **{name: getattr(QUICK, name) for name in ("network", "experts", "steps", "ahead", "starts", "image_rate")}, iterations=2))):
        found = method(data, 2, replace(config, iterations=2, experts=replace(EXPERTS, batch=4)), device="cpu")
        assert isinstance(found, SyntheticSet) and found.images.shape == (2 * shape[1], shape[2], shape[3], shape[4]) and list(found.labels) == sorted(found.labels) and found.learned_step > 0

def test_everything_is_stored(train, tmp_path):
    found = tesla(train, 1, replace(TESLA(), **{name: getattr(QUICK, name) for name in ("iterations", "network", "experts", "steps", "ahead", "starts", "step_size", "augment")}, image_rate=1.0, zca=True, labels="expert"), device="cpu")
    back = SyntheticSet.load(found.save(tmp_path/"set") and tmp_path/"set")
    assert alike(found, back) and np.array_equal(found.soft_labels, back.soft_labels) and np.allclose(back.soft_labels.sum(1), 1, atol=1e-5)
    images = normalised(torch.from_numpy(back.images), back)
    torch.testing.assert_close(unwhiten(whiten(images, back.transform), back.transform), images, atol=1e-3, rtol=1e-3)
    assert found.provenance["method"] == "tesla" and {"config", "seed", "seconds", "curve", "data", "clipped"} <= set(found.provenance)

def test_noise_may_exceed_the_class(train):
    assert len(mtt(made(12, 3), 7, replace(QUICK, iterations=1, init="noise"), device="cpu")) == 21

def test_published_values():
    assert published("mtt", "cifar100", 10) == MTT() and published("tesla", "cifar100", 50).batch == 125 and published("tesla", "cifar100", 10).gradient == "released"
    for method, name, ipc in PUBLISHED: assert isinstance(published(method, name, ipc), MTT)
    with pytest.raises(UserError, match="digits at IPC 3"): published("mtt", "digits", 3)

# faults

@pytest.mark.parametrize("change, words", [
    (dict(steps=0), "--config.steps"), (dict(batch=0), "--config.batch"), (dict(starts=9), "--config.experts.epochs"), (dict(step_size=0.0), "--config.step_size"),
    (dict(zca=True, clip="always"), "--config.clip"), (dict(augment="twirl"), "--config.augment"), (dict(gradient="none"), "--config.gradient"),
    (dict(network=Architecture("convnet", width=4, depth=2, norm="batch")), "--config.network.norm"), (dict(network=Architecture("resnet18", width=4)), "BatchNorm"),
    (dict(experts=replace(EXPERTS, count=0)), "--config.experts"), (dict(experts=replace(EXPERTS, learning_rate=1e20)), "--config.experts.learning_rate"),
    (dict(image_rate=1e30), "--config.image_rate"), (dict(step_rate=1e4), "--config.step_rate")])
def test_what_cannot_work_is_one_line(train, change, words):
    with pytest.raises(UserError) as told: mtt(train, 1, replace(QUICK, **change), device="cpu")
    assert words in str(told.value) and "\n" not in str(told.value)

def test_mistakes_with_experts(train, tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="--config.folder .*is a file"): mtt(train, 1, replace(QUICK, folder=str(tmp_path/"file")), device="cpu")
    with pytest.raises(UserError, match="--config.experts.augment"): mtt(train, 1, replace(QUICK, experts=replace(EXPERTS, augment="colour")), device="cpu")
    with pytest.raises(UserError, match="name a folder"): train_experts(train, QUICK.network, EXPERTS, device="cpu")
    with pytest.raises(UserError) as told: published("mtt", "imagenet1k", 1)
    assert "(there are" in str(told.value) and "imagenet1k 1," not in str(told.value).split("(there are")[1]

def test_ipc_larger_than_a_class(train):
    with pytest.raises(UserError, match="--ipc 100"): mtt(train, 100, QUICK, device="cpu")
    with pytest.raises(UserError, match="--ipc 0"): mtt(train, 0, QUICK, device="cpu")

def test_another_checkpoint_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Checkpoint", lambda folder: Checkpoint(folder, every=0.0)); monkeypatch.setattr(module, "CHECK_EVERY", 1)
    def stop(iteration, images, loss):
        if iteration == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): mtt(train, 1, QUICK, device="cpu", checkpoint=tmp_path, on_step=stop)
    with pytest.raises(UserError, match="checkpoint of another"): mtt(train, 1, replace(QUICK, image_rate=2.0), device="cpu", checkpoint=tmp_path)
