"Soft labels: running statistics untouched, stored equals online, resuming, and faults."
import json
from dataclasses import replace
import pytest, torch
from scdd.data import load, random_subset
from scdd.files import UserError, read_tensors
from scdd.models import bn_layers, build
from scdd.recipes import Architecture, Relabel, Train
import scdd.relabel as module
from scdd.relabel import SoftLabels, epoch_order, labelled, normaliser, open_labels, pixels, replayed, soft_logits, soft_loss, store_labels
from scdd.train import train_student

SMALL = Architecture(width=4)
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
@pytest.mark.parametrize("normalization", ["own", "student"])
def test_stored_equals_online(few, teacher, tmp_path, teacher_bn, normalization):
    relabel = Relabel(teacher_bn=teacher_bn, normalization=normalization, dtype="float32")
    online = train_student(few, SMALL, CONFIG, 5, "cpu", teacher, relabel)
    replay = train_student(few, SMALL, CONFIG, 5, "cpu", store_labels(teacher, few, CONFIG, relabel, 5, "cpu", tmp_path/"labels"), relabel)
    assert [e["loss"] for e in online.curve] == [e["loss"] for e in replay.curve]
    for a, b in zip(online.network.state_dict().values(), replay.network.state_dict().values()): assert torch.equal(a, b)

@pytest.mark.parametrize("mix, crop", [("none", "none"), ("mixup", "pad"), ("cutmix", "resized")])
def test_replay_gives_the_images_and_labels_back(few, teacher, tmp_path, mix, crop):
    config = replace(CONFIG, mix=mix, crop=crop); images = pixels(few, "cpu")
    stored = store_labels(teacher, few, config, Relabel(dtype="float32"), 1, "cpu", tmp_path/"labels")
    for epoch in range(3):
        for now, then in zip(labelled(teacher, images, few, config, Relabel(), 1, epoch, "cpu"), replayed(stored, images, epoch), strict=True):
            assert now[0] == then[0] and all(torch.equal(now[i], then[i]) for i in (1, 3, 4)) and now[2].keys() == then[2].keys()
            assert all(torch.equal(now[2][k], then[2][k]) and now[2][k].dtype == then[2][k].dtype for k in now[2])

def test_starting_within_an_epoch_changes_nothing(few, teacher):
    images = pixels(few, "cpu"); config = replace(CONFIG, batch=4)
    whole = list(labelled(teacher, images, few, config, Relabel(), 0, 0, "cpu")); rest = list(labelled(teacher, images, few, config, Relabel(), 0, 0, "cpu", start=3))
    assert [s[0] for s in rest] == [s[0] for s in whole][3:] and all(torch.equal(a[4], b[4]) for a, b in zip(whole[3:], rest))

def test_bytes_are_those_of_the_formula(few, teacher, tmp_path):
    stored = store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path)
    logits = [read_tensors(tmp_path/shard["file"])[0]["logits"] for shard in stored.about["shards"]]
    assert sum(t.nbytes for t in logits) == 3 * 10 * 3 * 10 * 2 and all(t.dtype == torch.float16 for t in logits)

def test_goes_on_after_a_kill(few, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 600)
    whole = store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path/"whole")
    assert len(whole.about["shards"]) == 3
    write = module.write_tensors
    def killed(path, *rest):
        if "00001" in str(path): raise KeyboardInterrupt
        write(path, *rest)
    monkeypatch.setattr(module, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt): store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path/"half", tmp_path/"kept")
    with pytest.raises(UserError, match="not finished"): open_labels(tmp_path/"half")
    monkeypatch.setattr(module, "write_tensors", write)
    calls = []; monkeypatch.setattr(module, "soft_logits", lambda *a: calls.append(1) or soft_logits(*a))
    half = store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path/"half", tmp_path/"kept")
    assert len(calls) == 2  # two epochs of one group each
    for epoch in range(3):
        for step in range(len(half.sizes)): assert all(torch.equal(a, b) for a, b in zip(half[epoch, step][::2], whole[epoch, step][::2]))
    assert not list((tmp_path/"half").glob(".*"))

def test_goes_on_within_a_shard(few, teacher, tmp_path, monkeypatch):
    relabel = Relabel(teacher_bn="batch")
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

# Faults

def test_broken_shard_is_named(few, teacher, tmp_path):
    store_labels(teacher, few, CONFIG, Relabel(), 0, "cpu", tmp_path); shard = tmp_path/"labels_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match="labels_00000.safetensors.*cut short"): SoftLabels(tmp_path)[0, 0]
    shard.unlink()
    with pytest.raises(UserError, match="labels_00000.safetensors"): SoftLabels(tmp_path)[0, 0]

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

def test_teacher_without_numbers(few, teacher, tmp_path):
    broken = build_like(teacher).eval(); broken.head.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="relabel.*epochs 1 to 3"): store_labels(broken, few, CONFIG, Relabel(), 0, "cpu", tmp_path)
