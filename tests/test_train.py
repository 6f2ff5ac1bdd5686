"Students: schedules, exact resuming, short batches, evaluation, and faults."
import math
from dataclasses import replace
import numpy as np, pytest, torch
from scdd.data import load, random_subset
from scdd.files import UserError, read_json
from scdd.models import build
from scdd.recipes import PROTOCOLS, Architecture, Pretrain, Relabel, Train
import scdd.train as module
from scdd.recover import SyntheticSet
from scdd.train import describe_students, evaluate, hard_loss, learning_rate, make_optimizer, own_labels, protocol, squared_loss, summary, train_full, train_student

SMALL = Architecture(width=4)
HARD = Train(labels="hard", epochs=3, batch=10, optimizer="sgd", learning_rate=0.05, weight_decay=5e-4, schedule="step", mix="mixup", crop_padding=1)
SOFT = Train(epochs=3, batch=8, learning_rate=0.01, temperature=4.0, mix="cutmix", mix_alpha=1.0)

@pytest.fixture(scope="module")
def few(): return random_subset(load("digits"), 3)

@pytest.fixture(scope="module")
def test_data(): return load("digits", "test").subset(np.arange(100))

@pytest.fixture(scope="module")
def teacher(few): return build(SMALL, few, seed=9).eval()

def weights(student): return list(student.network.state_dict().values())
def same(a, b): return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b)))

def test_learning_rates():
    cosine, longer, step = Train(epochs=200), Train(epochs=200, schedule_epochs=600), Train(epochs=200, schedule="step")
    assert learning_rate(cosine, 0) == 0.005 and learning_rate(cosine, 100) == pytest.approx(0.0025) and learning_rate(longer, 200) == pytest.approx(0.75 * 0.005)
    assert [learning_rate(step, e) for e in (0, 99, 100, 199)] == pytest.approx([0.005, 0.005, 0.0005, 0.0005])
    assert learning_rate(replace(cosine, schedule_epochs=50), 150) == 0

def test_optimizers(few):
    network = build(SMALL, few); adamw, sgd = make_optimizer(network, SOFT).defaults, make_optimizer(network, HARD).defaults
    assert adamw["lr"] == 0.01 and adamw["weight_decay"] == 0.01 and sgd["momentum"] == 0.9 and sgd["weight_decay"] == 5e-4

def test_hard_loss_of_mixed_labels():
    logits, a, b = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4]); one_hot = torch.nn.functional.one_hot
    entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(hard_loss(logits, 0.3 * one_hot(a, 5) + 0.7 * one_hot(b, 5)), 0.3 * entropy(logits, a) + 0.7 * entropy(logits, b))

@pytest.mark.parametrize("kind", ["hard", "soft", "once", "batch", "ema", "dsa", "mse_ce"])
def test_goes_on_exactly_after_a_kill(few, test_data, teacher, tmp_path, monkeypatch, kind):
    config, who, relabel = (HARD, None, Relabel()) if kind == "hard" else (SOFT, teacher, Relabel(teacher_bn="batch" if kind == "batch" else "running"))
    config = replace(config, **{"ema": dict(ema=0.9), "dsa": dict(augment="dsa"), "mse_ce": dict(loss="mse_ce"), "once": dict(labels="once")}.get(kind, {}))
    whole = train_student(few, SMALL, config, 1, "cpu", who, relabel, test_data)
    class Dying(module.Checkpoint):
        def save(self, state, force=False):
            super().save(state, True)
            if state()["epoch"] == 1 and state()["step"] == 2: raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, "Checkpoint", Dying)
        with pytest.raises(KeyboardInterrupt): train_student(few, SMALL, config, 1, "cpu", who, relabel, test_data, tmp_path)
    again = train_student(few, SMALL, config, 1, "cpu", who, relabel, test_data, tmp_path)
    assert same(whole, again) and whole.curve == again.curve and whole.accuracy == again.accuracy and not list(tmp_path.iterdir())

def test_squared_loss_by_hand(few, teacher, monkeypatch):
    said, known, a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    targets = torch.stack([0.7 * b + 0.3 * a, a]); e = math.exp
    entropy = (0.7 * math.log(1 + e(-1)) + 0.3 * math.log(1 + e(1)) + math.log(1 + e(-2))) / 2
    assert float(squared_loss(said, known, targets, 0.1)) == pytest.approx((4 + 1 + 1 + 0) / 4 + 0.1 * entropy, rel=1e-6)
    calls = []; monkeypatch.setattr(module, "squared_loss", lambda *given: calls.append(given) or squared_loss(*given))
    train_student(few, SMALL, replace(SOFT, loss="mse_ce", hard_weight=0.025, epochs=1, batch=30), 0, "cpu", teacher)
    (said, known, targets, weight), = calls
    assert said.shape == known.shape == targets.shape == (30, 10) and weight == 0.025 and 0.01 < targets.max(1).values.min() < 1   # cutmix mixes the classes
    torch.testing.assert_close(targets.sum(1), torch.ones(30)); torch.testing.assert_close(targets.sum(0), torch.full((10,), 3.0))

def test_an_average_looks_on(few, test_data, teacher):
    alone, watched = (train_student(few, SMALL, replace(SOFT, ema=ema, test_every=1), 0, "cpu", teacher, test=test_data) for ema in (0.0, 0.8))
    assert [one["loss"] for one in alone.curve] == [one["loss"] for one in watched.curve] and [one["accuracy"] for one in alone.curve] == [one["online"] for one in watched.curve]
    assert not any("online" in one for one in alone.curve) and not watched.network.training and not same(alone, watched)
    for ours, theirs in zip(alone.network.buffers(), watched.network.buffers()): assert torch.equal(ours, theirs)                 # BatchNorm's statistics are the student's
    with torch.no_grad(): right = watched.network(torch.tensor(test_data.images).float() / 255).argmax(1) == torch.tensor(test_data.labels)
    assert watched.accuracy == pytest.approx(float(right.float().mean()))

def test_the_average_step_by_step(few):
    config, decay = replace(HARD, batch=30, mix="none", crop="none", flip=False, schedule="cosine", precision="float32"), 0.8     # one step an epoch
    start = dict(build(SMALL, few, 0).named_parameters())
    steps = [dict(train_student(few, SMALL, replace(config, epochs=epochs, schedule_epochs=3), 0, "cpu").network.named_parameters()) for epochs in (1, 2, 3)]
    averaged = dict(train_student(few, SMALL, replace(config, schedule_epochs=3, ema=decay), 0, "cpu").network.named_parameters())
    for name, value in averaged.items():
        torch.testing.assert_close(value, (decay**3 * start[name] + (1 - decay) * (decay**2 * steps[0][name] + decay * steps[1][name] + steps[2][name])).detach(), rtol=1e-4, atol=1e-6)

def test_dsas_changes_with_stored_labels_and_with_a_teacher_alike(few, teacher, tmp_path):
    from scdd.relabel import store_labels
    config = replace(SOFT, augment="dsa", epochs=6); stored = store_labels(teacher, few, config, Relabel(dtype="float32"), 0, "cpu", tmp_path)
    assert same(train_student(few, SMALL, config, 0, "cpu", teacher), train_student(few, SMALL, config, 0, "cpu", stored))
    with pytest.raises(UserError, match="another train.augment"): train_student(few, SMALL, replace(config, augment="usual"), 0, "cpu", stored)

def test_the_sentence_of_a_protocol():
    from dataclasses import asdict
    said = lambda train: protocol(asdict(train), asdict(Relabel()))
    assert "one of DSA's six changes" in said(PROTOCOLS["dsa"]) and "no crop" not in said(PROTOCOLS["dsa"]) and "no crop" in said(PROTOCOLS["dc"])
    assert "squared distance of logits and 0.025 times" in said(PROTOCOLS["edc"]) and "moving average" in said(PROTOCOLS["edc"]) and "temperature" not in said(PROTOCOLS["edc"])
    old = {key: value for key, value in asdict(Train()).items() if key not in ("augment", "loss", "hard_weight", "ema")}              # a report of an earlier version
    assert protocol(old, asdict(Relabel())) == said(Train()) and "temperature 30" in said(Train())

def test_same_seed_same_student_other_seed_another(few):
    first = train_student(few, SMALL, HARD, 0, "cpu")
    assert same(first, train_student(few, SMALL, HARD, 0, "cpu")) and not same(first, train_student(few, SMALL, HARD, 1, "cpu"))

def test_the_figure_is_of_the_last_epoch_and_the_whole_test_set(few, test_data):
    student = train_student(few, SMALL, replace(HARD, test_every=2), 0, "cpu", test=test_data)
    assert [("accuracy" in e) for e in student.curve] == [False, True, True] and student.accuracy == student.curve[-1]["accuracy"] and not student.network.training
    with torch.no_grad(): right = student.network(torch.tensor(test_data.images).float() / 255).argmax(1) == torch.tensor(test_data.labels)
    assert student.accuracy == pytest.approx(float(right.float().mean()))

def test_a_last_image_alone(few):
    images = few.subset(np.arange(21))
    assert train_student(images, SMALL, HARD, 0, "cpu").curve[-1]["loss"] > 0
    assert train_student(images, Architecture("convnet", width=8, norm="instance"), HARD, 0, "cpu").curve[-1]["loss"] > 0
    with pytest.raises(UserError, match="one image alone"): train_student(few.subset(np.arange(1)), SMALL, HARD, 0, "cpu")

def test_labels_of_the_set_itself(few):
    own = np.eye(10, dtype=np.float32)[few.labels] * 0.9 + 0.01
    made = SyntheticSet(np.array(few.images), np.array(few.labels), few.classes, few.mean, few.std, {"data": "digits"}, soft_labels=own)
    torch.testing.assert_close(own_labels(made, SOFT, "cpu"), torch.tensor(own))
    assert train_student(made, SMALL, SOFT, 0, "cpu").curve[-1]["loss"] > 0

def test_summary():
    assert summary([0.5]) == {"mean": 0.5, "std": None, "n": 1, "values": [0.5]}
    found = summary([0.5, 0.6, 0.7]); assert found["mean"] == pytest.approx(0.6) and found["std"] == pytest.approx(0.1) and found["n"] == 3

def test_evaluate_keeps_finished_students(few, test_data, tmp_path, monkeypatch):
    first = evaluate(few, SMALL, replace(HARD, students=1), 0, "cpu", test=test_data, folder=tmp_path)
    assert first["std"] is None and first["n"] == 1
    calls = []; monkeypatch.setattr(module, "train_student", lambda *a: calls.append(a[3]) or train_student(*a))
    both = evaluate(few, SMALL, replace(HARD, students=2), 0, "cpu", test=test_data, folder=tmp_path)
    assert calls == [1] and both["values"][0] == first["values"][0] and both["n"] == 2 and both["std"] is not None and len(both["curves"]) == 2
    assert len(list(tmp_path.glob("student-*.json"))) == 2
    with pytest.raises(UserError, match="student-0.json.*other settings"): evaluate(few, SMALL, replace(HARD, epochs=2), 0, "cpu", test=test_data, folder=tmp_path)

def test_evaluate_on_a_set_each(test_data):
    seeds = []; draw = lambda seed: seeds.append(seed) or random_subset(load("digits"), 2, seed)
    evaluate(draw, SMALL, replace(HARD, students=2, sets="each", epochs=1), 3, "cpu", test=test_data); assert seeds == [3000, 3000, 3001]  # the first is drawn to know which images these are
    seeds.clear(); evaluate(draw, SMALL, replace(HARD, students=2, epochs=1), 3, "cpu", test=test_data); assert seeds == [3000]

def test_full_data(test_data, tmp_path):
    data, config = random_subset(load("digits"), 5), Pretrain("supervised", epochs=1, batch=25, learning_rate=0.1, measure_every=0, precision="float32")
    found = train_full(data, SMALL, config, 0, "cpu", test_data, 2, tmp_path)
    assert found["n"] == 2 and train_full(data, SMALL, config, 0, "cpu", test_data, 2, tmp_path) == found

@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_named_protocols_run(few, test_data, teacher, protocol):
    student = train_student(few, SMALL, replace(PROTOCOLS[protocol], epochs=1), 0, "cpu", teacher, Relabel(), test_data)
    assert 0 <= student.accuracy <= 1 and math.isfinite(student.curve[0]["loss"])

@pytest.mark.parametrize("squared", [False, True])
def test_temperature_squared_scales_the_loss(few, teacher, squared):
    loss = train_student(few, SMALL, replace(SOFT, epochs=1, batch=30, temperature_squared=squared), 0, "cpu", teacher).curve[0]["loss"]
    plain = train_student(few, SMALL, replace(SOFT, epochs=1, batch=30), 0, "cpu", teacher).curve[0]["loss"]
    assert loss == pytest.approx(plain * (16 if squared else 1), rel=1e-4)

# Faults

def test_a_loss_that_is_no_number(few, tmp_path):
    with pytest.raises(UserError, match="student, epoch [12], step [123]: the loss is not a finite number"):
        train_student(few, SMALL, replace(HARD, learning_rate=1e30), 0, "cpu", checkpoint=tmp_path)

def test_the_last_good_checkpoint_is_kept(few, teacher, tmp_path, monkeypatch):
    class Eager(module.Checkpoint):
        def save(self, state, force=False): super().save(state, True)
    monkeypatch.setattr(module, "Checkpoint", Eager); calls = []
    def breaks(*arguments):
        calls.append(1); loss = module_loss(*arguments)
        return loss * float("nan") if len(calls) == 6 else loss
    module_loss = module.soft_loss; monkeypatch.setattr(module, "soft_loss", breaks)
    with pytest.raises(UserError, match="epoch 2, step 2"): train_student(few, SMALL, SOFT, 0, "cpu", teacher, checkpoint=tmp_path)
    state = torch.load(tmp_path/"checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 1) and all(v.isfinite().all() for v in state["network"].values())

def test_a_checkpoint_of_another_student(few, tmp_path, monkeypatch):
    class Eager(module.Checkpoint):
        def save(self, state, force=False): super().save(state, True); raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, "Checkpoint", Eager)
        with pytest.raises(KeyboardInterrupt): train_student(few, SMALL, HARD, 0, "cpu", checkpoint=tmp_path)
    with pytest.raises(UserError, match="checkpoint of another student"): train_student(few, SMALL, HARD, 1, "cpu", checkpoint=tmp_path)
    kept = tmp_path/"checkpoint.pt"; kept.write_bytes(kept.read_bytes()[:2000])
    with pytest.raises(UserError, match="checkpoint"): train_student(few, SMALL, HARD, 0, "cpu", checkpoint=tmp_path)

def test_soft_labels_without_a_teacher(few):
    with pytest.raises(UserError, match="there is no teacher"): train_student(few, SMALL, SOFT, 0, "cpu")

def test_a_set_each_needs_a_function(few, test_data):
    with pytest.raises(UserError, match="train.sets each"): evaluate(few, SMALL, replace(HARD, sets="each"), 0, "cpu", test=test_data)

# --- one label for each image -------------------------------------------------------------------------------------------

ONCE = replace(SOFT, labels="once")

def test_mixed_logits_by_hand():
    from scdd.train import mixed_logits
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0]]); drawn = {"permutation": torch.tensor([1, 0]), "weight": torch.tensor(0.75)}
    shares = (logits / 4).softmax(1)
    torch.testing.assert_close((mixed_logits(logits, drawn, 4.0) / 4).softmax(1), torch.stack([0.75 * shares[0] + 0.25 * shares[1], 0.75 * shares[1] + 0.25 * shares[0]]))
    assert mixed_logits(logits, {"crop": None}, 4.0) is logits
    assert mixed_logits(100 * logits, drawn, 0.1).isfinite().all()   # shares that are 0 in 32 bits

def test_one_label_each_is_the_soft_label_where_nothing_is_changed(few, teacher):
    still = dict(mix="none", crop="none", flip=False)
    soft, once = (train_student(few, SMALL, replace(config, **still), 1, "cpu", teacher) for config in (SOFT, ONCE))
    for a, b in zip(weights(soft), weights(once)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert not same(train_student(few, SMALL, SOFT, 1, "cpu", teacher), train_student(few, SMALL, ONCE, 1, "cpu", teacher))   # and another one where they are

def test_the_teacher_of_one_label_each_looks_once(few, teacher, monkeypatch):
    seen = []; teacher.register_forward_hook(hook := lambda network, images, out: seen.append(images[0].clone())); handle = list(teacher._forward_hooks)[-1]
    losses = []; monkeypatch.setattr(module, "soft_loss", lambda said, known, *rest: losses.append(known) or module.nn.functional.mse_loss(said, known))
    try: train_student(few, SMALL, replace(ONCE, mix="none"), 1, "cpu", teacher)
    finally: del teacher._forward_hooks[handle]
    seen = torch.cat(seen); assert len(seen) == 30 and len(losses) == 3 * 4
    own = torch.tensor(np.array(few.images)).float() / 255
    assert sorted(map(float, seen.sum((1, 2, 3)))) == pytest.approx(sorted(map(float, own.sum((1, 2, 3)))), rel=1e-6)          # each image as it is
    rows = lambda some: sorted(some.flatten(1).mean(1).tolist())
    for epoch in range(3): assert rows(torch.cat(losses[4 * epoch:4 * epoch + 4])) == pytest.approx(rows(teacher(own)), abs=1e-5)   # and its label in every epoch

@pytest.mark.parametrize("dtype", ["float32", "uint4"])
def test_one_label_each_from_disk(few, teacher, tmp_path, dtype):
    from scdd.relabel import labels_once, pixels, store_labels
    relabel = Relabel(dtype=dtype); stored = store_labels(teacher, few, ONCE, relabel, 0, "cpu", tmp_path)
    assert len(stored) == 1 and stored.about["train"]["mix"] == "none"
    for who in (teacher, stored): assert torch.isfinite(labels_once(who, pixels(few, "cpu"), few, ONCE, relabel, "cpu")).all()
    now, then = (train_student(few, SMALL, ONCE, 1, "cpu", who, relabel) for who in (teacher, stored))
    assert same(now, then) == (dtype == "float32")
    with pytest.raises(UserError, match="a training of 1 epochs, and this one lasts 3"): train_student(few, SMALL, SOFT, 1, "cpu", stored)
    store_labels(teacher, few, SOFT, relabel, 0, "cpu", tmp_path/"views")
    with pytest.raises(UserError, match=r"stored with another train.mix \(cutmix, not none\)"): train_student(few, SMALL, ONCE, 1, "cpu", module.SoftLabels(tmp_path/"views"))

@pytest.mark.parametrize("changed, relabel, words", [(dict(loss="mse_ce"), Relabel(), "give --train.loss kl"), ({}, Relabel(teacher_bn="batch"), "give --relabel.teacher_bn running")])
def test_one_label_each_refuses_what_does_not_go_with_it(few, teacher, changed, relabel, words):
    with pytest.raises(UserError, match=f"--train.labels once: .*{words}"): train_student(few, SMALL, replace(ONCE, **changed), 1, "cpu", teacher, relabel)

def test_one_label_each_without_a_teacher(few):
    with pytest.raises(UserError, match="train.labels once: there is no teacher"): train_student(few, SMALL, ONCE, device="cpu")
    own = np.eye(10, dtype=np.float32)[few.labels]; made = SyntheticSet(np.array(few.images), np.array(few.labels), few.classes, few.mean, few.std, {}, soft_labels=own)
    assert same(train_student(made, SMALL, ONCE, device="cpu"), train_student(made, SMALL, SOFT, device="cpu"))   # the set's own labels are one each

def test_a_protocol_says_that_there_is_one_label_each():
    from dataclasses import asdict
    assert protocol(asdict(ONCE), asdict(Relabel())).startswith("One soft label for each image, by the self-supervised teacher with its running BatchNorm statistics, made before the student trains, at temperature 4: ")
    assert "stored in uint4 (once, at most the 16 largest of a row)" in protocol(asdict(ONCE), asdict(Relabel(store=True)))

def test_a_stopped_student_goes_on_under_its_own_labeller_and_labels_alone(few, teacher, tmp_path, monkeypatch):
    class Killed(Exception): pass
    class Dying(module.Checkpoint):
        def save(self, state, force=False):
            super().save(state, force=True)
            raise Killed
    own = SyntheticSet(np.array(few.images), np.array(few.labels), few.classes, few.mean, few.std, {"data": "digits"}, soft_labels=np.eye(10, dtype=np.float32)[few.labels])
    flat = replace(own, soft_labels=np.full_like(own.soft_labels, 0.1))
    other = build(Architecture("convnet", width=4), few, 9)
    for name, begun, changed in (("teacher", (few, teacher), (few, other)), ("labels", (own, None), (flat, None))):
        train = lambda images, labeller: train_student(images, SMALL, SOFT, 0, "cpu", labeller, checkpoint=tmp_path/name)
        with monkeypatch.context() as patch:
            patch.setattr(module, "Checkpoint", Dying)
            with pytest.raises(Killed): train(*begun)
        with pytest.raises(UserError, match="the checkpoint of another student"): train(*changed)
        assert train(*begun).curve[-1]["loss"] > 0
    known = lambda images, **more: describe_students(images, SMALL, HARD, 0, None, Relabel(), None)["set"]
    assert known(own) != known(flat) and known(few) == known(replace(own, soft_labels=None))
    draw = lambda images: lambda seed: random_subset(images, 2, seed)
    assert known(draw(load("digits"))) != known(draw(load("digits").subset(range(500)))) and known(draw(load("digits"))) == known(draw(load("digits")))
