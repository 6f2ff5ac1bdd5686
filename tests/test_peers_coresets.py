"Coresets: greedy is the formula, counts are the table, a choice is real images of the right class, killed and resumed is the same as not; faults."
import itertools
from dataclasses import replace
import numpy as np, pytest, torch
from scdd.data import ImageData, load, random_subset, to_device
from scdd.device import generator
from scdd.files import Checkpoint, UserError
from scdd.models import build
from scdd.peers import coresets as module
from scdd.peers.coresets import *
from scdd.recipes import PROTOCOLS, Architecture
from scdd.recover import SyntheticSet
from scdd.train import train_student

TINY = dict(network=Architecture("convnet", width=4, depth=2, norm="instance"), epochs=3, batch=32, learning_rate=0.05)
CONFIGS = {"random": Random(), "kmeans": KMeans(restarts=2, **TINY), "herding": Herding(**TINY), "forgetting": Forgetting(**TINY), "el2n": EL2N(networks=2, **TINY)}

def made(count=60, classes=3, channels=3, size=10, name="made"):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return ImageData(images, np.arange(count, dtype=np.int64) % classes, tuple("abcdefgh"[:classes]), (0.4,) * channels, (0.3,) * channels, "train", name, f"{name}{count}{classes}")

@pytest.fixture(scope="module")
def train(): return load("digits").subset(range(240))

def test_class_indices():
    found = class_indices(np.array([2, 0, 2, 1]), 4)
    assert [some.tolist() for some in found] == [[1], [3], [0, 2], []]
    assert all(torch.equal(a, b) for a, b in zip(found, class_indices(torch.tensor([2, 0, 2, 1]), ("a", "b", "c", "d"))))

def test_draws_are_different_images_and_depend_on_the_key_only():
    places = torch.arange(100, 120)
    one, two, other = (draw_real(places, 8, generator("cpu", key)) for key in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and len(set(one.tolist())) == 8 and set(one.tolist()) <= set(places.tolist())
    assert sorted(draw_real(places, 50, generator("cpu", 0)).tolist()) == places.tolist()

@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_there_and_back(channels):
    data = made(channels=channels)
    images = torch.tensor(data.images); seen = normalised(images, data)
    torch.testing.assert_close(seen, (images / 255 - 0.4) / 0.3)
    back = as_set(pixels_of(seen, data), data.labels, data, {})
    assert np.array_equal(back.images, data.images) and back.images.dtype == np.uint8
    assert pixels_of(torch.full((1, channels, 2, 2), 99.0), data).max() == 1 and pixels_of(torch.full((1, channels, 2, 2), -99.0), data).min() == 0
    assert not pixels_of(seen.clone().requires_grad_(), data).requires_grad

def test_starts():
    data = made()
    real, labels = start_images(data, 4, "real", 3, "cpu")
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(as_set(pixels_of(real, data), labels, data, {}).images, random(data, 4, seed=3).images)
    assert np.array_equal(random(data, 4, seed=3).images, random_subset(data, 4, 3).images)
    noise = start_images(data, 40, "noise", 3, "cpu")[0]
    assert noise.shape == (120, 3, 10, 10) and abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(noise, start_images(data, 40, "noise", 3, "cpu")[0]) and not torch.equal(noise, start_images(data, 40, "noise", 4, "cpu")[0])

def test_a_set_keeps_what_it_is_given(tmp_path):
    data = made()
    one = as_set(data.images[:3], torch.arange(3), data, {"method": "x", "config": {"a": (1, 2)}}, learned_step=0.5, soft_labels=np.ones((3, 3), np.float32))
    assert one.provenance["data"] == "made" and one.provenance["fingerprint"] == data.fingerprint and one.learned_step == 0.5
    again = SyntheticSet.load((one.save(tmp_path/"set"), tmp_path/"set")[1])
    assert again.provenance == one.provenance and np.array_equal(again.images, one.images) and np.array_equal(again.soft_labels, one.soft_labels)

@pytest.mark.parametrize("seed", range(3))
def test_herding_is_its_formula(seed):
    features = torch.randn(30, 5, generator=generator("cpu", seed), dtype=torch.float64) + 3
    mean, chosen = features.mean(0), []
    for k in range(1, 31):
        def distance(x): return float((mean - (features[x] + sum(features[j] for j in chosen)) / k).norm())
        chosen.append(min((x for x in range(30) if x not in chosen), key=distance))
    assert herd(features, 30).tolist() == chosen and herd(features, 7).tolist() == chosen[:7]

def test_herding_beside_brute_force():
    features = torch.randn(12, 3, generator=generator("cpu", "few"), dtype=torch.float64)
    def gap(rows): return float((features[list(rows)].mean(0) - features.mean(0)).norm())
    gaps = sorted(gap(rows) for rows in itertools.combinations(range(12), 3))
    greedy = gap(herd(features, 3).tolist())
    assert gaps[0] <= greedy < gaps[len(gaps) // 4]
    assert herd(features, 1).item() == int((features - features.mean(0)).norm(dim=1).argmin())

def test_centres_get_different_images():
    features = torch.tensor([[0.0, 0], [1, 0], [9, 0], [9, 1]])
    assert nearest_images(features, torch.tensor([[8.9, 0.1], [0.1, 0]])).tolist() == [2, 0]
    assert sorted(nearest_images(features, torch.zeros(4, 2)).tolist()) == [0, 1, 2, 3]
    blobs = torch.cat([torch.randn(20, 2, generator=generator("cpu", i)) * 0.1 + 10 * i for i in range(4)])
    assert sorted(int(i) // 20 for i in nearest_images(blobs, centres_of(blobs, 4, 5, 0))) == [0, 1, 2, 3]

def test_running_counts_are_those_of_the_table():
    history = torch.rand(12, 50, generator=generator("cpu", "history")) < 0.5
    history[:, 7] = False; notes = new_notes(50, "cpu")
    for row in history:
        for part in torch.randperm(50).split(16): note(notes, part, row[part])
    table = (history[:-1] & ~history[1:]).sum(0)
    assert torch.equal(notes["forgotten"].long(), table)
    close_run(notes, torch.ones(50), 12); close_run(notes, torch.ones(50), 12)      # and a second network that learned nothing
    expected = torch.where(history.any(0), table, 12)
    assert expected[7] == 12 and torch.equal(notes["forgetting"].long(), expected + 12) and notes["never"][7] == 2 and notes["never"][8] == 1 and notes["error"].unique().item() == 2
    assert not notes["right"].any() and not notes["forgotten"].any()

def test_error_norms_are_the_definition(train):
    network = build(TINY["network"], train, seed=2); images, labels = to_device(train.subset(range(9)))
    with torch.no_grad(): p = network(images.float() / 255).softmax(1)
    expected = [float(np.linalg.norm(row.numpy() - np.eye(10)[int(label)])) for row, label in zip(p, labels)]
    torch.testing.assert_close(error_norms(network, images, labels, "cpu"), torch.tensor(expected), atol=1e-5, rtol=0)

def test_extremes_and_ties():
    scores, labels = torch.tensor([3.0, 1, 2, 5, 5, 4]), np.array([0, 0, 0, 1, 1, 1])
    assert extreme(scores, labels, 2, 1, "easiest").tolist() == [1, 5] and extreme(scores, labels, 2, 2, "hardest").tolist()[:2] == [0, 2]
    assert {extreme(scores, labels, 2, 1, "hardest", seed).tolist()[1] for seed in range(20)} == {3, 4}
    assert torch.equal(extreme(scores, labels, 2, 1, "hardest", 5), extreme(scores, labels, 2, 1, "hardest", 5))

@pytest.mark.parametrize("name", CORESETS)
def test_a_coreset_is_real_images(train, name, tmp_path):
    method, kind = CORESETS[name]
    one = method(train, 3, CONFIGS[name], 1, "cpu", tmp_path)
    assert isinstance(CONFIGS[name], kind) and one.labels.tolist() == sorted(list(range(10)) * 3) and one.classes == train.classes and one.ipc == 3
    known = {(image.tobytes(), int(label)) for image, label in zip(train.images, train.labels)}
    found = {(image.tobytes(), int(label)) for image, label in zip(one.images, one.labels)}
    assert found <= known and len(found) == 30
    assert one.provenance["method"] == name and one.provenance["seed"] == 1 and one.provenance["data"] == "digits" and one.provenance["seconds"] >= 0
    if name == "random": return
    assert np.array_equal(train.images[one.provenance["chosen"]], one.images) and len(one.provenance["curve"]) == 3 * getattr(CONFIGS[name], "networks", 1)
    again = method(train, 3, CONFIGS[name], 1, "cpu")
    assert np.array_equal(again.images, one.images)
    assert one.save(tmp_path/"set").load(tmp_path/"set").provenance == one.provenance

@pytest.mark.parametrize("name", CORESETS)
@pytest.mark.parametrize("classes, channels, size, ipc", [(1, 3, 10, 1), (3, 1, 9, 20), (2, 3, 13, 1)])
def test_any_shape(name, classes, channels, size, ipc):
    one = CORESETS[name][0](made(60, classes, channels, size), ipc, replace(CONFIGS[name], **({"epochs": 1} if name != "random" else {})), 0, "cpu")
    assert one.images.shape == (classes * ipc, channels, size, size) and one.ipc == ipc

def test_batchnorm_and_a_last_batch_of_one():
    config = KMeans(restarts=1, **{**TINY, "network": Architecture("convnet", width=4, depth=3, norm="batch"), "epochs": 1})
    assert len(kmeans(made(65, 3, 3, 8), 2, config, 0, "cpu")) == 6          # 65 images in batches of 32

def test_options(train, tmp_path):
    config = replace(CONFIGS["forgetting"], epochs=6)
    run = observe(train, config, 0, "cpu", tmp_path)
    hard, easy = (forgetting(train, 4, replace(config, keep=keep), 0, "cpu", tmp_path) for keep in ("hardest", "easiest"))
    for one, better in ((hard, lambda inside, outside: inside.min() >= outside.max()), (easy, lambda inside, outside: inside.max() <= outside.min())):
        inside = np.zeros(len(train), bool); inside[one.provenance["chosen"]] = True
        for label in range(10): assert better(run.forgetting[(train.labels == label) & inside], run.forgetting[(train.labels == label) & ~inside])
    never = np.flatnonzero(run.never.numpy() > 0); assert len(never), "this run should leave some digits unlearned"
    assert (run.forgetting[never] == 6).all() and set(hard.provenance["chosen"]) & set(never)
    dropped = forgetting(train, 4, replace(config, never_learned="drop"), 0, "cpu", tmp_path)
    for label in range(10):
        learned = set(np.flatnonzero((train.labels == label) & (run.never.numpy() == 0)))
        mine = {c for c in dropped.provenance["chosen"] if train.labels[c] == label}
        assert len(mine & set(never)) == max(0, 4 - len(learned))
    plain, unit = (herding(train, 4, replace(CONFIGS["herding"], unit_length=u), 0, "cpu").provenance["chosen"] for u in (False, True))
    assert plain != unit

@pytest.mark.parametrize("stop", [0, 5, 23, 24, 30, 47])        # 2 networks of 3 epochs of 8 steps
def test_killed_and_resumed_is_the_same(train, tmp_path, monkeypatch, stop):
    config = CONFIGS["el2n"]; whole = observe(train, config, 0, "cpu")
    monkeypatch.setattr(module, "Checkpoint", lambda folder: Checkpoint(folder, every=0.0))
    real, done = module.judge_step, []
    def stops(*given):
        if len(done) == stop: raise KeyboardInterrupt
        done.append(1); return real(*given)
    monkeypatch.setattr(module, "judge_step", stops)
    with pytest.raises(KeyboardInterrupt): observe(train, config, 0, "cpu", tmp_path)
    monkeypatch.setattr(module, "judge_step", lambda *given: done.append(1) or real(*given))
    resumed = observe(train, config, 0, "cpu", tmp_path)
    assert len(done) == 48 and resumed.curve == whole.curve
    for part in ("forgetting", "never", "error"): assert torch.equal(getattr(resumed, part), getattr(whole, part))
    assert all(torch.equal(a, b) for a, b in zip(resumed.network.state_dict().values(), whole.network.state_dict().values()))
    again = el2n(train, 2, config, 0, "cpu", tmp_path)               # a finished run is not done again, whatever the IPC
    assert len(done) == 48 and np.array_equal(again.images, el2n(train, 2, config, 0, "cpu").images)

def test_seed_decides(train):
    one, two = (herding(train, 2, CONFIGS["herding"], seed, "cpu").provenance["chosen"] for seed in (0, 1))
    assert one != two

def test_the_next_stage_takes_it(train):
    hard = replace(PROTOCOLS["hard"], epochs=2)
    student = train_student(herding(train, 2, CONFIGS["herding"], 0, "cpu"), TINY["network"], hard, device="cpu", test=train)
    assert 0 <= student.accuracy <= 1

@pytest.mark.parametrize("name", CORESETS)
@pytest.mark.parametrize("ipc", [0, 21])
def test_an_ipc_that_cannot_be(name, ipc):
    with pytest.raises(UserError, match=f"--ipc {ipc}"): CORESETS[name][0](made(), ipc, CONFIGS[name], 0, "cpu")

def test_faults(train, tmp_path):
    empty = replace(made(), classes=("a", "b", "c", "d"))
    with pytest.raises(UserError, match="the class d has no images"): random(empty, 1)
    with pytest.raises(UserError, match="--config.init nois.*did you mean 'noise'"): start_images(train, 1, "nois")
    assert len(start_images(made(), 50, "noise", device="cpu")[0]) == 150
    for wrong, words in ((dict(epochs=0), "config.epochs 0"), (dict(keep="hard"), "config.keep hard"), (dict(networks=0), "config.networks 0"), (dict(learning_rate=-1.0), "config.learning_rate"),
                         (dict(network=Architecture("convnet", width=0)), "config.network.width 0"), (dict(network=Architecture("convnet", depth=9)), "depth")):
        with pytest.raises(UserError, match=words): el2n(train, 1, replace(CONFIGS["el2n"], **wrong), 0, "cpu")
    with pytest.raises(UserError, match="network 1 is no finite number at epoch .*--config.learning_rate"): herding(train, 1, replace(CONFIGS["herding"], learning_rate=1e30, epochs=3), 0, "cpu")
    observe(train, CONFIGS["herding"], 0, "cpu", tmp_path)
    for other in (dict(seed=1), dict(config=replace(CONFIGS["herding"], epochs=2)), dict(data=made())):
        with pytest.raises(UserError, match="another --checkpoint|delete it"): herding(**({"data": train, "ipc": 1, "config": CONFIGS["herding"], "seed": 0, "device": "cpu", "checkpoint": tmp_path} | other))
    (tmp_path/"checkpoint.pt").write_bytes((tmp_path/"checkpoint.pt").read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint cannot be read"): herding(train, 1, CONFIGS["herding"], 0, "cpu", tmp_path)

def test_a_checkpoint_serves_every_method_that_trains_alike(train, tmp_path, monkeypatch):
    clusters = kmeans(train, 2, CONFIGS["kmeans"], 0, "cpu", tmp_path)
    monkeypatch.setattr(module, "judge_step", None)
    assert len(herding(train, 3, CONFIGS["herding"], 0, "cpu", tmp_path)) == 30 and len(clusters) == 20
