"Soft labels: running statistics untouched, stored equals online, resuming, and faults."
import json
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from scdd.data import load, random_subset
from scdd.files import UserError, read_tensors, write_tensors
from scdd.models import bn_layers, build
from scdd.recipes import Architecture, Relabel, Train
import scdd.relabel as module
from scdd.relabel import SoftLabels, decode, encode, epoch_order, kept_logits, label_size, labelled, normaliser, open_labels, pixels, replayed, soft_logits, soft_loss, store_labels
from scdd.train import train_student

SMALL = Architecture(width=4)
PLAIN = Relabel(dtype="float16", top=None, kept_epochs=None, draws="stored")
EXACT = replace(PLAIN, dtype="float32")
COMPACT = Relabel(kept_epochs=None)
CONFIG = Train(epochs=3, batch=8, learning_rate=0.01, temperature=4.0, mix="cutmix", mix_alpha=1.0, crop="resized", crop_min=0.5, precision="float32")

@pytest.fixture(scope="module")
def few(): return random_subset(load("digits"), 3)

@pytest.fixture(scope="module")
def teacher(few):
    network = build(SMALL, few, seed=9)
    for _ in range(5): network(torch.rand(32, 1, 16, 16))  # running statistics of their own
    return network.eval()

@pytest.mark.parametrize("squared", [False, True])
def test_soft_loss_is_the_formula(squared):
    student, taught = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = (taught / 3).softmax(1), (student / 3).softmax(1)
    loss = soft_loss(student, taught, 3.0, squared); scale = 9 if squared else 1
    torch.testing.assert_close(loss, scale * (p * (p / q).log()).sum() / 5)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], scale * (q - p).detach() / 15)

def test_batch_statistics_leave_the_teacher_alone(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}; images = torch.rand(8, 1, 16, 16)
    batch = soft_logits(teacher, images, "batch")
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())
    assert all(not layer.training and layer.track_running_stats for _, layer in bn_layers(teacher)) and not teacher.training
    assert not torch.allclose(batch, soft_logits(teacher, images, "running"))
    torch.testing.assert_close(batch, build_like(teacher).train()(images).detach())

def build_like(teacher):
    network = build(SMALL, teacher); network.load_state_dict(teacher.state_dict()); return network

def test_batch_statistics_are_given_back_after_an_error(teacher):
    with pytest.raises(RuntimeError): soft_logits(teacher, torch.rand(8, 3, 16, 16)[:, :2], "batch")
    assert all(not layer.training and layer.track_running_stats for _, layer in bn_layers(teacher))

def test_dropout_of_the_teacher_stays_off():
    teacher = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(256, 3)).eval()
    images = torch.rand(4, 1, 16, 16)
    assert torch.equal(soft_logits(teacher, images, "batch"), soft_logits(teacher, images, "batch"))

def test_normalised_for_the_student(few, teacher):
    other = build(SMALL, few, mean=[0.1], std=[0.9]); other.load_state_dict(teacher.state_dict()); other.eval()
    student, images = build(SMALL, few), torch.rand(4, 1, 16, 16)
    assert normaliser(few, Relabel(), "cpu") is None
    said = soft_logits(other, images, normalize=normaliser(few, Relabel(normalization="student"), "cpu"))
    torch.testing.assert_close(said, other.normalized(student.normalize(images)).detach())
    assert not torch.allclose(said, other(images))

@pytest.mark.parametrize("teacher_bn", ["running", "batch"])
@pytest.mark.parametrize("normalization, draws", [("own", "stored"), ("own", "again"), ("student", "again")])
def test_stored_equals_online(few, teacher, tmp_path, teacher_bn, normalization, draws):
    relabel = replace(EXACT, teacher_bn=teacher_bn, normalization=normalization, draws=draws)
    online = train_student(few, SMALL, CONFIG, 5, "cpu", teacher, relabel)
    replay = train_student(few, SMALL, CONFIG, 5, "cpu", store_labels(teacher, few, CONFIG, relabel, 5, "cpu", tmp_path/"labels"), relabel)
    assert [e["loss"] for e in online.curve] == [e["loss"] for e in replay.curve]
    for a, b in zip(online.network.state_dict().values(), replay.network.state_dict().values()): assert torch.equal(a, b)

@pytest.mark.parametrize("draws", ["stored", "again"])
@pytest.mark.parametrize("mix, crop", [("none", "none"), ("mixup", "pad"), ("cutmix", "resized")])
def test_replay_gives_the_images_and_labels_back(few, teacher, tmp_path, mix, crop, draws):
    config = replace(CONFIG, mix=mix, crop=crop); images = pixels(few, "cpu")
    stored = store_labels(teacher, few, config, replace(EXACT, draws=draws), 1, "cpu", tmp_path/"labels")
    for epoch in range(3):
        for now, then in zip(labelled(teacher, images, few, config, Relabel(), 1, epoch, "cpu"), replayed(stored, images, epoch), strict=True):
            assert now[0] == then[0] and all(torch.equal(now[i], then[i]) for i in (1, 3, 4)) and now[2].keys() == then[2].keys()
            assert all(torch.equal(now[2][k], then[2][k]) and now[2][k].dtype == then[2][k].dtype for k in now[2])

def test_starting_within_an_epoch_changes_nothing(few, teacher):
    images = pixels(few, "cpu"); config = replace(CONFIG, batch=4)
    whole = list(labelled(teacher, images, few, config, Relabel(), 0, 0, "cpu")); rest = list(labelled(teacher, images, few, config, Relabel(), 0, 0, "cpu", start=3))
    assert [s[0] for s in rest] == [s[0] for s in whole][3:] and all(torch.equal(a[4], b[4]) for a, b in zip(whole[3:], rest))

def test_bytes_are_those_of_the_formula(few, teacher, tmp_path):
    stored = store_labels(teacher, few, CONFIG, PLAIN, 0, "cpu", tmp_path)
    logits = [read_tensors(tmp_path/shard["file"])[0]["logits"] for shard in stored.about["shards"]]
    assert sum(t.nbytes for t in logits) == 3 * 10 * 3 * 10 * 2 and all(t.dtype == torch.float16 for t in logits)
    assert stored.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())

@pytest.mark.parametrize("relabel", [PLAIN, COMPACT], ids=["plain", "compact"])
def test_goes_on_after_a_kill(few, teacher, tmp_path, monkeypatch, relabel):
    monkeypatch.setattr(module, "SHARD_BYTES", 300)
    whole = store_labels(teacher, few, CONFIG, relabel, 0, "cpu", tmp_path/"whole")
    assert len(whole.about["shards"]) == 3
    write = module.write_tensors
    def killed(path, *rest):
        if "00001" in str(path): raise KeyboardInterrupt
        write(path, *rest)
    monkeypatch.setattr(module, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt): store_labels(teacher, few, CONFIG, relabel, 0, "cpu", tmp_path/"half", tmp_path/"kept")
    with pytest.raises(UserError, match="not finished"): open_labels(tmp_path/"half")
    monkeypatch.setattr(module, "write_tensors", write)
    calls = []; monkeypatch.setattr(module, "soft_logits", lambda *a: calls.append(1) or soft_logits(*a))
    half = store_labels(teacher, few, CONFIG, relabel, 0, "cpu", tmp_path/"half", tmp_path/"kept")
    assert len(calls) == 2  # two epochs of one group each
    for epoch in range(3):
        for step in range(len(half.sizes)): assert all(torch.equal(a, b) for a, b in zip(half[epoch, step][::2], whole[epoch, step][::2]))
    assert not list((tmp_path/"half").glob(".*"))

@pytest.mark.parametrize("relabel", [PLAIN, COMPACT], ids=["plain", "compact"])
def test_goes_on_within_a_shard(few, teacher, tmp_path, monkeypatch, relabel):
    relabel = replace(relabel, teacher_bn="batch")
    whole = store_labels(teacher, few, CONFIG, relabel, 0, "cpu", tmp_path/"whole")
    class Eager(module.Checkpoint):
        def save(self, state, force=False): super().save(state, True)
    monkeypatch.setattr(module, "Checkpoint", Eager); calls = []
    def dies(*arguments):
        calls.append(1)
        if len(calls) == 7: raise KeyboardInterrupt
        return soft_logits(*arguments)
    monkeypatch.setattr(module, "soft_logits", dies)
    with pytest.raises(KeyboardInterrupt): store_labels(teacher, few, CONFIG, relabel, 0, "cpu", tmp_path/"half", tmp_path/"kept")
    half = store_labels(teacher, few, CONFIG, relabel, 0, "cpu", tmp_path/"half", tmp_path/"kept")
    assert len(calls) == 7 + 6 and not list((tmp_path/"kept").iterdir())
    for epoch in range(3):
        for step in range(len(half.sizes)): assert torch.equal(half[epoch, step][2], whole[epoch, step][2])

def test_a_last_image_alone_is_left_out_with_batch_statistics(few, teacher, tmp_path):
    config = replace(CONFIG, batch=29)
    assert [len(i) for i in epoch_order(30, config, 0, 0, "cpu", lone=False)] == [29] and [len(i) for i in epoch_order(30, config, 0, 0, "cpu")] == [29, 1]
    assert store_labels(teacher, few, config, Relabel(teacher_bn="batch"), 0, "cpu", tmp_path/"batch").sizes == [29]
    stored = store_labels(teacher, few, config, Relabel(), 0, "cpu", tmp_path/"running")
    assert stored.sizes == [29, 1] and len(train_student(few, SMALL, config, 0, "cpu", stored).curve) == 3

# Forms

def logits_of(classes, rows=64, scale=3.0): return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))

def back(logits, relabel, temperature=4.0):
    stored = encode(logits, relabel, temperature)
    return decode(stored, relabel.dtype, logits.shape[1])

@pytest.mark.parametrize("classes, number", [(100, torch.uint8), (256, torch.uint8), (257, torch.int16), (1000, torch.int16)])
def test_the_rest_of_a_row_keeps_its_share_at_the_temperature(classes, number):
    logits, relabel = logits_of(classes), Relabel(dtype="float32", top=5)
    assert encode(logits, relabel)["classes"].dtype == number
    full, found = (logits / 4).softmax(1), (back(logits, relabel, 4.0) / 4).softmax(1); largest = full.topk(5).indices
    torch.testing.assert_close(found.gather(1, largest), full.gather(1, largest))     # so the rest has its mass, too
    assert not torch.allclose((back(logits, relabel, 1.0) / 4).softmax(1).gather(1, largest), full.gather(1, largest), atol=1e-4)  # at another temperature it has not
    rest = found.scatter(1, largest, 0.0)
    torch.testing.assert_close(rest.amax(1), (1 - found.gather(1, largest).sum(1)) / (classes - 5))  # one value for all of it

@pytest.mark.parametrize("classes", [10, 11])
@pytest.mark.parametrize("dtype, steps", [("uint8", 255), ("uint4", 15)])
def test_few_bits_are_off_by_half_a_step(dtype, steps, classes):
    logits, relabel = logits_of(classes), Relabel(dtype=dtype); found = back(logits, relabel)
    span = logits.amax(1) - logits.amin(1)
    off = (found - (logits - logits.amax(1, keepdim=True))).abs().amax(1)
    assert (off <= span * (0.501 / steps + 2**-11)).all() and (off > 0.2 * span / steps).all()
    assert encode(logits, relabel)["logits"].nbytes == len(logits) * (classes if steps == 255 else (classes + 1) // 2)
    assert torch.equal(found.amax(1), torch.zeros(len(found))) and torch.allclose(found.amin(1), -span, rtol=1e-3)
    assert torch.equal(back(torch.ones(2, classes), relabel), torch.zeros(2, classes))                # a row without differences

@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "uint4"])
@pytest.mark.parametrize("top", [3, 4])
def test_cut_rows_in_every_precision(dtype, top):
    logits = logits_of(300); largest = logits.topk(top); found = back(logits, Relabel(dtype=dtype, top=top))
    gaps = largest.values - largest.values[:, :1]
    torch.testing.assert_close(found.gather(1, largest.indices) - found.gather(1, largest.indices[:, :1]), gaps, atol=0.05 if dtype != "uint4" else 0.5, rtol=0)
    assert torch.equal(found.scatter(1, largest.indices, -99.0).amax(1), found.amin(1))               # one value for the rest

@pytest.mark.parametrize("classes, top, dtype, kept", [(10, 16, "uint8", 10), (10, 10, "float16", 10), (10, 4, "uint8", 4), (10, 5, "uint8", 10), (10, 5, "float16", 5), (10, 2, "uint4", 2), (10, 3, "uint4", 10), (100, None, "uint8", 100), (100, 16, "uint8", 16), (1000, 2000, "uint8", 1000)])
def test_a_row_is_cut_only_where_that_saves_bytes(classes, top, dtype, kept):
    relabel, logits = Relabel(dtype=dtype, top=top), logits_of(classes, 3)
    assert kept_logits(relabel, classes) == kept and ("classes" in encode(logits, relabel)) == (kept < classes)
    taken = lambda form: sum(t.nbytes for t in encode(logits, form).values())
    assert taken(relabel) <= taken(replace(relabel, top=None))

class Linear(torch.nn.Module):
    "A teacher that takes no time."
    def __init__(self, classes): super().__init__(); torch.manual_seed(0); self.weight = torch.nn.Parameter(torch.randn(64, classes))
    def forward(self, images): return images.flatten(1) @ self.weight

def grey_set(classes, ipc):
    return SimpleNamespace(images=torch.arange(classes * ipc * 64).remainder(251).byte().view(-1, 1, 8, 8).numpy(), labels=torch.arange(classes).repeat(ipc).numpy(),
                           classes=[f"class {i}" for i in range(classes)], name="own", mean=[0.5], std=[0.5])

@pytest.mark.parametrize("classes, ipc, epochs, smaller", [(10, 10, 100, 5), (10, 10, 200, 10), (10, 50, 2400, 40), (100, 1, 300, 40), (100, 10, 300, 40), (1000, 1, 100, 40)])
def test_the_default_is_forty_times_smaller_or_fifty_epochs(tmp_path, classes, ipc, epochs, smaller):
    made, config = grey_set(classes, ipc), replace(CONFIG, epochs=epochs, batch=100, crop="pad")
    stored = store_labels(Linear(classes), made, config, Relabel(), 0, "cpu", tmp_path)
    total, plain = sum(path.stat().st_size for path in tmp_path.iterdir()), classes * ipc * epochs * classes * 2
    assert total * smaller <= plain and min(50, epochs) <= len(stored) <= epochs
    if len(stored) > 50: assert len(stored) == epochs or total * 40 > plain - 40 * (4000 + 40 * classes + total / len(stored))  # and no epoch more would fit
    assert (len(stored), pytest.approx(total, abs=3000 + 40 * classes)) == (label_size(classes * ipc, classes, 8, "own", config, Relabel())[0], len(stored) * label_size(classes * ipc, classes, 8, "own", config, Relabel())[1])

def test_fewer_epochs_are_replayed_in_turn(few, teacher, tmp_path):
    images = pixels(few, "cpu"); stored = store_labels(teacher, few, CONFIG, replace(EXACT, kept_epochs=2, draws="again"), 0, "cpu", tmp_path/"two")
    assert len(stored) == 2 and len(store_labels(teacher, few, CONFIG, replace(PLAIN, kept_epochs=9), 0, "cpu", tmp_path/"nine")) == 3
    for epoch in range(5):
        for now, then in zip(labelled(teacher, images, few, CONFIG, Relabel(), 0, epoch % 2, "cpu"), replayed(stored, images, epoch), strict=True):
            assert torch.equal(now[3], then[3]) and torch.equal(now[4], then[4])
    assert len(train_student(few, SMALL, CONFIG, 0, "cpu", stored).curve) == 3
    with pytest.raises(UserError, match="training of 3 epochs.*lasts 9"): train_student(few, SMALL, replace(CONFIG, epochs=9), 0, "cpu", stored)

def test_a_step_is_read_by_itself(few, teacher, tmp_path, monkeypatch):
    stored = store_labels(teacher, few, CONFIG, PLAIN, 0, "cpu", tmp_path)
    stored[0, 0]; (tmp_path/"labels_00000.safetensors").rename(tmp_path/"away")                       # the file stays mapped
    assert len(stored[2, 3][0]) == 6 and torch.equal(stored[0, 1][2], stored[3, 1][2])
    rows = []; monkeypatch.setattr(stored, "_shard", (*stored._shard[:2], {name: Watched(part, rows) for name, part in stored._shard[2].items()}))
    stored[1, 2]; assert rows and max(rows) == 8

class Watched:
    def __init__(self, part, rows): self.part, self.rows = part, rows
    def __getitem__(self, key):
        found = self.part[key]; self.rows.append(len(found))
        return found

# Faults

def test_other_random_numbers_are_refused(few, teacher, tmp_path, monkeypatch):
    store_labels(teacher, few, CONFIG, COMPACT, 0, "cpu", tmp_path/"again"); store_labels(teacher, few, CONFIG, PLAIN, 0, "cpu", tmp_path/"stored")
    drawing = module.draw_step
    def other(indices, size, train, name, seed, epoch, step, device):
        drawn = drawing(indices, size, train, name, seed, epoch, step, device)
        return drawn if epoch < 2 else drawn | {"weight": drawn["weight"] + 1e-7}
    monkeypatch.setattr(module, "draw_step", other)
    with pytest.raises(UserError, match=r"drawn on cpu by torch .*--relabel.draws stored") as error: open_labels(tmp_path/"again")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="other numbers are drawn; go on there"): store_labels(teacher, few, CONFIG, COMPACT, 0, "cpu", tmp_path/"again")
    assert len(open_labels(tmp_path/"stored")) == 3

def test_a_device_that_is_not_there_is_named(few, teacher, tmp_path):
    store_labels(teacher, few, CONFIG, COMPACT, 0, "cpu", tmp_path); path = tmp_path/"labels.json"
    missing = next(kind for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if not there)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": missing}))
    with pytest.raises(UserError, match=f"drawn on {missing} by torch"): open_labels(tmp_path)

def test_labels_of_the_first_version_are_refused(few, teacher, tmp_path):
    (tmp_path/"labels.json").write_text(json.dumps({"format": "scdd soft labels 1", "finished": True}))
    for use in (lambda: open_labels(tmp_path), lambda: store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path)):
        with pytest.raises(UserError, match="labels.json.*older version.*delete the folder"): use()

def test_the_tail_belongs_to_a_temperature(few, teacher, tmp_path):
    stored = store_labels(teacher, few, CONFIG, replace(COMPACT, top=2), 0, "cpu", tmp_path/"top")
    with pytest.raises(UserError, match="train.temperature"): train_student(few, SMALL, replace(CONFIG, temperature=9.0), 0, "cpu", stored)
    stored = store_labels(teacher, few, CONFIG, COMPACT, 0, "cpu", tmp_path/"all")
    assert len(train_student(few, SMALL, replace(CONFIG, temperature=9.0), 0, "cpu", stored).curve) == 3

def test_broken_shard_is_named(few, teacher, tmp_path):
    store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path); shard = tmp_path/"labels_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match="labels_00000.safetensors.*cut short"): SoftLabels(tmp_path)[0, 0]
    shard.unlink()
    with pytest.raises(UserError, match="labels_00000.safetensors.*no such file.*delete its folder"): SoftLabels(tmp_path)[0, 0]
    store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path); assert len(SoftLabels(tmp_path)[0, 0][0]) == 8  # a lost shard is written again
    write_tensors(shard, {"logits": torch.zeros(3, 10)}, {"columns": json.dumps({"logits": ["image", "float32"]})})
    with pytest.raises(UserError, match="does not hold 90 labels"): SoftLabels(tmp_path)[0, 0]

def test_other_settings_are_refused(few, teacher, tmp_path):
    stored = store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path)
    with pytest.raises(UserError, match="another train"): store_labels(teacher, few, replace(CONFIG, batch=4), Relabel(), 0, "cpu", tmp_path)
    with pytest.raises(UserError, match="another set"): store_labels(teacher, random_subset(load("digits"), 3, 1), CONFIG, Relabel(), 0, "cpu", tmp_path)
    with pytest.raises(UserError, match="other images"): train_student(random_subset(load("digits"), 3, 1), SMALL, CONFIG, 0, "cpu", stored)
    with pytest.raises(UserError, match="train.batch"): train_student(few, SMALL, replace(CONFIG, batch=4), 0, "cpu", stored)
    with pytest.raises(UserError, match="3 epochs.*lasts 9"): train_student(few, SMALL, replace(CONFIG, epochs=9), 0, "cpu", stored)

def test_labels_json_of_something_else(tmp_path):
    (tmp_path/"labels.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(UserError, match="does not describe soft labels"): open_labels(tmp_path)

@pytest.mark.parametrize("relabel", [PLAIN, COMPACT, replace(COMPACT, top=2)], ids=["plain", "compact", "top"])
def test_teacher_without_numbers(few, teacher, tmp_path, relabel):
    broken = build_like(teacher).eval(); broken.head.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="relabel.*epochs 1 to 3"): store_labels(broken, few, CONFIG, relabel, 0, "cpu", tmp_path)
