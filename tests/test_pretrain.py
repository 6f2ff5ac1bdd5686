"Pretraining: the losses against lightly's, resuming, what is handed on, and faults."
from dataclasses import fields, replace
from pathlib import Path
import lightly.loss, numpy as np, pytest, torch
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch.nn import functional as F
from torch.testing import assert_close
import scdd.pretrain as module
from scdd.data import ImageData
from scdd.files import Checkpoint, UserError
from scdd.models import bn_layers, build
from scdd.pretrain import (METHODS, assemble, dino_loss, embedding_spread, info_nce, learning_rate, mocov2_keys, moco_v3_loss,
                           nt_xent, pretrain, probe_accuracy, sinkhorn, swav_loss)
from scdd.recipes import Architecture, Pretrain

SMALL = Architecture(width=4)
TINY = Pretrain(epochs=2, batch=16, learning_rate=0.05, hidden=16, projection=8, queue=32, prototypes=12, bn_splits=4, measure_every=0,
                precision="float32", ema=0.9, ema_end=0.95)
SELF = ["simclr", "mocov2", "mocov3", "swav", "dino"]

def some(count=48, channels=1, name="digits"):
    random = np.random.default_rng(0)
    return ImageData(random.integers(0, 256, (count, channels, 16, 16), np.uint8), np.arange(count) % 4, tuple("abcd"),
                     (0.5,) * channels, (0.25,) * channels, "train", name, "0123")

def tiny(method, **values): return replace(TINY, method=method, **values)

@pytest.fixture
def vectors():
    "Seven functions' worth of random vectors."
    random = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=random)

# the losses, against lightly's
def test_nt_xent(vectors):
    first, second = vectors(10, 6), vectors(10, 6)
    assert_close(nt_xent(first, second, 0.2), lightly.loss.NTXentLoss(0.2)(first, second))

def test_info_nce(vectors):
    query, key, queue = vectors(10, 6), vectors(10, 6), F.normalize(vectors(32, 6), dim=1)
    theirs = lightly.loss.NTXentLoss(0.2, memory_bank_size=(32, 6))
    theirs(query, key)                          # the first call makes their bank
    theirs.memory_bank.bank = queue.clone()
    assert_close(info_nce(query, key, queue, 0.2), theirs(query, key))

def test_moco_v3(vectors):
    queries, keys = [vectors(5, 6), vectors(5, 6)], [vectors(5, 6), vectors(5, 6)]
    total = 0.0
    for a, b in [(0, 1), (1, 0)]:
        for i in range(5):
            closeness = torch.stack([F.cosine_similarity(queries[a][i], keys[b][j], dim=0) for j in range(5)]) / 0.3
            total = total - 2 * 0.3 * (closeness[i] - closeness.exp().sum().log()) / 5
    assert_close(moco_v3_loss(queries, keys, 0.3), total)

def test_swav(vectors):
    scores = [torch.tanh(vectors(16, 12)) for _ in range(5)]
    codes = [sinkhorn(score, 0.05, 3) for score in scores[:2]]
    assert_close(codes[0], lightly_sinkhorn(scores[0], 3, 0.05))
    assert_close(swav_loss(scores, codes, 0.1), lightly.loss.SwaVLoss(0.1, 3, 0.05)(scores[:2], scores[2:])[0])

@pytest.mark.parametrize("views", [2, 4])
def test_dino(vectors, views):
    student, teacher, center = [vectors(16, 12) for _ in range(views)], [vectors(16, 12) for _ in range(2)], vectors(12)
    theirs = lightly.loss.DINOLoss(12, teacher_temp=0.04, student_temp=0.1, warmup_teacher_temp_epochs=0)
    theirs.center = center.view(1, 1, -1).clone()
    assert_close(dino_loss(student, teacher, center, 0.1, 0.04), theirs(teacher, student))

def test_dino_centre_follows_lightlys(vectors):
    parts = assemble(some(), SMALL, tiny("dino"), 0)
    images, moment = [torch.rand(8, 1, 16, 16) for _ in range(2)], module.Moment(1, 1, torch.Generator())
    theirs = lightly.loss.DINOLoss(12, center_momentum=0.9, warmup_teacher_temp_epochs=0)
    for _ in range(2):
        with torch.no_grad(): theirs.update_center(torch.stack(module.project(parts["ema"], images, "float32")))
        METHODS["dino"].step(parts, images, None, tiny("dino"), moment)
    assert_close(parts["memory"].center, theirs.center.flatten())

# small things
def test_learning_rate():
    rates = [learning_rate(s, 100, 10, 0.4) for s in range(101)]
    assert rates[9] == rates[10] == 0.4 and rates[0] == pytest.approx(0.04) and rates[100] == pytest.approx(0, abs=1e-9)
    assert learning_rate(0, 10, 0, 0.4) == 0.4 and learning_rate(5, 10, 0, 0.4) == pytest.approx(0.2)

def test_spread(vectors):
    assert embedding_spread(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert embedding_spread(vectors(4000, 32)) == pytest.approx(1, abs=0.05)

def test_probe(vectors):
    x, labels = vectors(300, 8), torch.arange(300) % 3
    x[range(300), labels] += 6
    assert probe_accuracy(x[:200], labels[:200], x[200:], labels[200:]) > 0.95

def test_every_value_of_the_recipe_is_used():
    source = Path(module.__file__).read_text()
    assert [f.name for f in fields(Pretrain) if f"config.{f.name}" not in source] == []

@pytest.mark.parametrize("optimizer,kind", [("sgd", "SGD"), ("adamw", "AdamW"), ("lars", "Lars")])
def test_optimizers(optimizer, kind):
    config = tiny("simclr", optimizer=optimizer)
    made = module.optimizer_for(assemble(some(), SMALL, config, 0), config)
    assert type(made).__name__ == kind and made.param_groups[0]["weight_decay"] == 5e-4
    if optimizer == "lars": assert made.param_groups[1]["weight_decay"] == 0 and all(p.ndim == 1 for p in made.param_groups[1]["params"])
    assert pretrain(some(), SMALL, replace(config, epochs=1), device="cpu").about["curve"][0]["loss"] > 0

# the loop
@pytest.mark.parametrize("method", ["supervised", *SELF])
def test_resuming_is_exact(method, tmp_path, monkeypatch):
    config, data = tiny(method), some()
    whole = pretrain(data, SMALL, config, device="cpu")
    monkeypatch.setattr(module, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(module, "Checkpoint", lambda folder: Checkpoint(folder, 0.0))
    step, done = module.train_step, []
    def interrupted(*args):
        if len(done) == 4: raise KeyboardInterrupt
        done.append(1); return step(*args)
    monkeypatch.setattr(module, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt): pretrain(data, SMALL, config, device="cpu", checkpoint=tmp_path)
    monkeypatch.setattr(module, "train_step", step)
    torch.manual_seed(99)                       # the state of the global generator is of no account
    resumed = pretrain(data, SMALL, config, device="cpu", checkpoint=tmp_path)
    for name, tensor in whole.state_dict().items(): assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [c["loss"] for c in whole.about["curve"]] == [c["loss"] for c in resumed.about["curve"]]
    monkeypatch.setattr(module, "train_step", interrupted)    # a finished run is not run again
    assert torch.equal(pretrain(data, SMALL, config, device="cpu", checkpoint=tmp_path).head.weight, whole.head.weight)

def test_checkpoint_of_another_run(tmp_path):
    pretrain(some(), SMALL, tiny("simclr", epochs=1), device="cpu", checkpoint=tmp_path)
    with pytest.raises(UserError, match="another run.*temperature"): pretrain(some(), SMALL, tiny("simclr", epochs=1, temperature=0.3), device="cpu", checkpoint=tmp_path)

def test_checkpoint_of_another_stage(tmp_path):
    torch.save({"head": {}}, tmp_path/"checkpoint.pt")
    with pytest.raises(UserError, match="is the checkpoint of another stage"): pretrain(some(), SMALL, tiny("simclr", epochs=1), device="cpu", checkpoint=tmp_path)

@pytest.mark.parametrize("count", [9, 10, 13, 17])
def test_no_group_of_a_split_batchnorm_is_a_single_image(count):
    "57 images in parts of 8 would leave one alone."
    found = pretrain(some(count), SMALL, tiny("mocov2", epochs=1, batch=64, bn_splits=4), device="cpu")
    assert np.isfinite(found.about["curve"][-1]["loss"])

@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_handful_of_images(count):
    assert "knn" in pretrain(some(count), SMALL, tiny("supervised", epochs=1, measure_every=1), device="cpu").about["curve"][-1]
    with pytest.raises(UserError, match="1 training image is too few"): pretrain(some(1), SMALL, tiny("supervised", epochs=1), device="cpu")

def test_seeds_differ():
    first, again, other = (pretrain(some(), SMALL, tiny("simclr", epochs=1), seed, "cpu") for seed in (0, 0, 1))
    weight = lambda n: n.backbone.conv1.weight
    assert torch.equal(weight(first), weight(again)) and not torch.equal(weight(first), weight(other))

def test_curve():
    curve = pretrain(some(), SMALL, tiny("supervised", measure_every=2, epochs=3), device="cpu", test=some(20)).about["curve"]
    assert [c["epoch"] for c in curve] == [1, 2, 3] and ["knn" in c for c in curve] == [False, True, True] and 0 <= curve[2]["accuracy"] <= 1
    assert "probe" in pretrain(some(), SMALL, tiny("dino", measure_every=1, epochs=1), device="cpu").about["curve"][0]

def test_measuring_changes_nothing():
    first, second = (pretrain(some(), SMALL, tiny("mocov2", measure_every=n), device="cpu") for n in (0, 1))
    for name, tensor in first.state_dict().items(): assert torch.equal(tensor, second.state_dict()[name]), name

# what is handed on
@pytest.mark.parametrize("method", ["mocov2", "mocov3", "dino"])
def test_online_and_ema_differ(method):
    online, ema = (pretrain(some(), SMALL, tiny(method, hand_on=h), device="cpu") for h in ("online", "ema"))
    assert not ema.training and ema.about["hand_on"] == "ema"
    assert not torch.equal(online.backbone.conv1.weight, ema.backbone.conv1.weight)
    assert not torch.equal(bn_layers(online)[0][1].running_mean, bn_layers(ema)[0][1].running_mean)

def passes(method, steps=3, **values):
    "How many batches the BatchNorm layers of either network saw in a step."
    config = tiny(method, epochs=1, **values); parts = assemble(some(), SMALL, config, 0)
    made = module.make_views(torch.from_numpy(some().images[:16]), "digits", config, torch.Generator())
    METHODS[method].step(parts, made, torch.zeros(16, dtype=torch.long), config, module.Moment(0, 0, torch.Generator()))
    return {name: int(bn_layers(parts[name])[0][1].num_batches_tracked) for name in ("online", "ema") if name in parts}

def test_whose_images_the_statistics_are_of():
    assert passes("supervised") == {"online": 1} and passes("simclr") == {"online": 1}      # two views in one pass
    assert passes("swav") == {"online": 2} and passes("swav", local_crops=0) == {"online": 1}  # large views, small crops
    assert passes("dino") == {"online": 2, "ema": 1}                                        # the teacher sees no small crops
    assert passes("mocov3") == {"online": 2, "ema": 2}                                      # one pass for each view
    assert passes("mocov2", key_bn="plain") == {"online": 1, "ema": 1}
    assert passes("mocov2", key_bn="split") == {"online": 1, "ema": 4}
    assert passes("mocov2", key_bn="shuffle") == {"online": 4, "ema": 4}

def test_ema_statistics_are_its_own():
    config = tiny("mocov2", epochs=1, batch=48, key_bn="plain", hand_on="ema")
    ema, fresh = pretrain(some(), SMALL, config, device="cpu"), build(SMALL, some(), 0).train()
    random = module.generator("cpu", 0, "pretrain", 0, 0)
    order = module.batches(48, 48, module.generator("cpu", 0, "pretrain", "order", 0))[0]
    second = module.make_views(torch.from_numpy(some().images)[order], "digits", config, random)[1]
    fresh.features(second)                      # one step: the key network has seen the second views, with its first weights
    assert_close(bn_layers(ema)[3][1].running_var, bn_layers(fresh)[3][1].running_var)

def test_shuffled_keys_come_back_in_order():
    parts = assemble(some(), SMALL, tiny("mocov2"), 0).eval()
    images, keys = torch.rand(16, 1, 16, 16), {}
    for kind in ("plain", "split", "shuffle"):
        with torch.no_grad(): keys[kind] = mocov2_keys(parts["ema"], images, tiny("mocov2", key_bn=kind), torch.Generator().manual_seed(0))
    assert_close(keys["plain"], keys["shuffle"]); assert_close(keys["plain"], keys["split"])

def test_queue_holds_the_newest_keys():
    config = tiny("mocov2", queue=24); parts = assemble(some(), SMALL, config, 0)
    queue, losses = parts["memory"].queue, []
    for step in range(3):
        before = queue.clone()
        losses.append(METHODS["mocov2"].step(parts, [torch.rand(16, 1, 16, 16)] * 2, None, config, module.Moment(0, step, torch.Generator())).item())
        written = (torch.arange(16) + 16 * step) % 24
        assert torch.equal((queue != before).any(1).nonzero().flatten(), written.sort().values)
    assert losses[0] == 0 < losses[1] and losses[2] > 0         # the queue begins empty
    assert_close(queue.norm(dim=1), torch.ones(24))

@pytest.mark.parametrize("method", SELF)
def test_the_head_is_left_alone(method):
    assert torch.equal(pretrain(some(), SMALL, tiny(method, epochs=1), device="cpu").head.weight, build(SMALL, some(), 0).head.weight)

@pytest.mark.parametrize("method", ["swav", "dino"])
def test_prototypes_rest_in_the_first_epoch(method):
    config = tiny(method); parts = assemble(some(), SMALL, config, 0); optimizer = module.optimizer_for(parts, config)
    weight = parts["online"]["projector"][-1].weight; start = weight.detach().clone()
    for epoch in (0, 1):
        module.train_step(parts, optimizer, torch.from_numpy(some().images[:16]), None, "digits", config, module.Moment(epoch, 1, torch.Generator()), 6)
        assert torch.equal(weight, start) == (epoch == 0)

def test_normalization():
    network = pretrain(some(channels=3, name="cifar10"), SMALL, tiny("simclr", epochs=1, normalization="cifar10"), device="cpu")
    assert_close(network.mean.flatten(), torch.tensor([0.4914, 0.4822, 0.4465]))

def test_images_that_do_not_fit_on_the_device(monkeypatch):
    "They are fetched batch by batch, and nothing else differs."
    import scdd.align, scdd.data
    from scdd.recipes import Align
    made = lambda: pretrain(some(), SMALL, tiny("mocov2"), device="cpu")
    probed = lambda network: scdd.align.align(network, some(), Align(epochs=2, batch=16, learning_rate=0.1), device="cpu")
    whole = made(); probe, asked = probed(whole), []
    monkeypatch.setattr(scdd.data, "room", lambda device: asked.append(device) or 1000)
    monkeypatch.setattr(scdd.data, "to_device", lambda *given: pytest.fail("all images were asked for at once"))
    for one, other in ((whole, made()), (probe, probed(whole))): assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert len(asked) == 2

# faults
@pytest.mark.parametrize("values,words", [({"hand_on": "ema"}, "--pretrain.hand_on ema: simclr keeps no averaged network"), ({"method": "mocov4"}, "did you mean"),
                                          ({"normalization": "cifar10"}, "has 1 channel"), ({"batch": 1}, "2 images a step"), ({"epochs": 0}, "1 epoch")])
def test_bad_values(values, words):
    with pytest.raises(UserError, match=words) as raised: pretrain(some(), SMALL, replace(TINY, **values), device="cpu")
    assert "\n" not in str(raised.value)

@pytest.mark.parametrize("method", ["supervised", "simclr"])
def test_a_loss_that_is_no_number(method, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(module, "Checkpoint", lambda folder: Checkpoint(folder, 0.0))
    step, done = METHODS[method].step, []
    def spoilt(*args):
        done.append(1)
        return step(*args) * (float("nan") if len(done) == 5 else 1)
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], step=spoilt))
    with pytest.raises(UserError, match=f"pretrain {method}: .* epoch 2, step 2 .*learning_rate"): pretrain(some(), SMALL, tiny(method), device="cpu", checkpoint=tmp_path)
    kept = Checkpoint(tmp_path).load()
    assert kept["step"] == 4 and all(t.isfinite().all() for t in kept["parts"].values())

def test_a_rate_that_is_too_high():
    with pytest.raises(UserError, match="no finite number"): pretrain(some(), SMALL, tiny("supervised", learning_rate=1e30), device="cpu")
