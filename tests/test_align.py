"Alignment: frozen is frozen, bit for bit; the same seed gives the same head; interrupted is the same as not; faults."
from dataclasses import replace
import pytest, torch
from scdd import align as module
from scdd.align import accuracy, align, changed, collect, new_head, rate
from scdd.data import load, to_device, to_float
from scdd.files import UserError
from scdd.models import build
from scdd.recipes import Align, Architecture

QUICK = Align(epochs=4, batch=64, optimizer="adamw", learning_rate=0.01, schedule="cosine", augment=False)

@pytest.fixture(scope="module")
def train(): return load("digits").subset(range(200))

@pytest.fixture(scope="module")
def network(train):
    network = build(Architecture(width=4), train).train()
    with torch.no_grad(): network(to_float(to_device(train)[0]))   # BatchNorm statistics that are not the initial ones
    return network.eval()

@pytest.mark.parametrize("config", [QUICK, replace(QUICK, augment=True, epochs=2), Align(epochs=2, augment=False)])
def test_backbone_and_statistics_are_bit_identical(network, train, config):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    mode = [p.requires_grad for p in network.parameters()]
    result = align(network.train(), train, config, test=train); network.eval()
    assert changed(result.backbone, network.backbone) == []
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(torch.equal(result.state_dict()[key], value) for key, value in before.items() if key.startswith("backbone"))
    assert any("running_var" in key for key in before) and mode == [p.requires_grad for p in network.parameters()]
    assert not torch.equal(result.head.weight, network.head.weight) and not result.training
    assert result.about["align"]["accuracy"] == accuracy(result, train)

def test_a_backbone_learns_where_it_is_told_to(network, train):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    still, slow, fast = (align(network, train, replace(QUICK, learning_rate=0.1, finetune=part), test=train) for part in (0.0, 1e-4, 1e-2))
    assert changed(network, network) == [] and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())   # the one that was given stays as it was
    moved = [sum(float((ours.detach() - before[f"backbone.{name}"]).norm()) for name, ours in one.backbone.named_parameters()) for one in (still, slow, fast)]
    assert moved[0] == 0 < 10 * moved[1] < moved[2] and "bn1.running_var" in changed(slow.backbone, network.backbone) and not fast.training and all(weight.grad is None for weight in fast.parameters())
    assert fast.about["align"]["curve"][-1]["loss"] < still.about["align"]["curve"][-1]["loss"] and fast.about["align"]["finetune"] == 0.01
    with pytest.raises(UserError, match="or a smaller --align.finetune than"): align(network, train, replace(QUICK, optimizer="sgd", finetune=1e30))

def test_a_changed_buffer_is_noticed(network, train, monkeypatch):
    def careless(network, *rest): network.train()(torch.rand(8, 1, 16, 16)); return []
    monkeypatch.setattr(module, "train_head", careless)
    with pytest.raises(RuntimeError, match="running_mean"): align(network, train, QUICK)

def test_the_head_learns(network, train):
    curve = align(network, train, replace(QUICK, epochs=20, learning_rate=0.1)).about["align"]["curve"]
    assert len(curve) == 20 and curve[-1]["loss"] < 0.7 * curve[0]["loss"]

def test_seed_decides(network, train):
    one, two, other = (align(network, train, QUICK, seed).head for seed in (0, 0, 1))
    assert changed(one, two) == [] and changed(one, other)

@pytest.mark.parametrize("config", [QUICK, replace(QUICK, augment=True, optimizer="sgd"), replace(QUICK, finetune=0.001)])
def test_interrupted_and_resumed_is_the_same(network, train, config, tmp_path, monkeypatch):
    whole = align(network, train, config)
    monkeypatch.setattr(module, "Checkpoint", lambda folder: module_checkpoint(folder, every=0.0))
    real, calls = module.probe_epoch, []
    def stops(*given):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(1); return real(*given)
    monkeypatch.setattr(module, "probe_epoch", stops)
    with pytest.raises(KeyboardInterrupt): align(network, train, config, checkpoint=tmp_path)
    assert (tmp_path/"checkpoint.pt").is_file()
    monkeypatch.setattr(module, "probe_epoch", lambda *given: calls.append(1) or real(*given))
    resumed = align(network, train, config, checkpoint=tmp_path)
    assert len(calls) == config.epochs and changed(resumed, whole) == [] and not (tmp_path/"checkpoint.pt").exists()
    assert [e["epoch"] for e in resumed.about["align"]["curve"]] == [1, 2, 3, 4]

from scdd.files import Checkpoint as module_checkpoint

def test_a_stopped_probe_goes_on_for_its_own_network_and_images_alone(network, train, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Checkpoint", lambda folder: module_checkpoint(folder, every=0.0))
    real = module.probe_epoch
    other, others = build(Architecture(width=4), train, 5).eval(), load("digits").subset(range(200, 400))
    for name, given in (("network", (other, train)), ("images", (network, others))):
        calls = []
        def stops(*rest):
            if len(calls) == 2: raise KeyboardInterrupt
            calls.append(1); return real(*rest)
        monkeypatch.setattr(module, "probe_epoch", stops)
        with pytest.raises(KeyboardInterrupt): align(network, train, QUICK, checkpoint=tmp_path/name)
        calls.clear(); monkeypatch.setattr(module, "probe_epoch", lambda *rest: calls.append(1) or real(*rest))
        resumed = align(*given, QUICK, checkpoint=tmp_path/name)
        assert len(calls) == QUICK.epochs and changed(resumed.head, align(*given, QUICK).head) == [], name

def test_protocol():
    steps, cosine = Align(), Align(schedule="cosine", learning_rate=2.0)
    assert [round(rate(steps, done), 6) for done in (0, 0.59, 0.6, 0.79, 0.8, 0.99)] == [30, 30, 3, 3, 0.3, 0.3]
    assert rate(cosine, 0) == 2 and abs(rate(cosine, 0.5) - 1) < 1e-9 and rate(cosine, 0.999) < 1e-4
    head = new_head(512, 100)
    assert 0.0097 < head.weight.std() < 0.0103 and not head.bias.any()

def test_classes_of_the_data(network, train):
    result = align(network, train.only(4), replace(QUICK, batch=32))
    assert result.head.out_features == 4 and len(result.classes) == 4 and len(network.classes) == 10

def test_collect_keeps_the_mode_and_makes_no_gradients(network, train):
    images = to_device(train)[0]; network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    features = collect(network, images, "cpu", batch=64)
    assert network.training and not features.requires_grad and features.dtype == torch.float32 and len(features) == 200
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    network.eval()
    torch.testing.assert_close(collect(network, images, "cpu", 200, "float32"), network.features(to_float(images)).detach(), rtol=1e-4, atol=1e-5)

def test_faults(network, train):
    with pytest.raises(UserError, match="align: the loss was .* at step .* of epoch .*learning_rate"): align(network, train, Align(epochs=3, learning_rate=1e38, augment=False))
    with pytest.raises(UserError, match="channels"): align(build(Architecture(width=4), 10), train, QUICK)

def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(network, train, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Checkpoint", lambda folder: module_checkpoint(folder, every=0.0))
    real, calls = module.probe_epoch, []
    monkeypatch.setattr(module, "probe_epoch", lambda *given: calls.append(1) or (real(*given) if len(calls) < 3 else torch.tensor([float("nan")])))
    with pytest.raises(UserError, match="epoch 3"): align(network, train, QUICK, checkpoint=tmp_path)
    assert len(module_checkpoint(tmp_path).load()["curve"]) == 2


# Memory

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("MPS backend out of memory (x)"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when")], ids=lambda error: str(error)[:12])
def test_evaluation_goes_on_with_fewer_images(train, network, capsys, error):
    from scdd.device import say_once
    say_once.cache_clear()
    images, sizes = to_device(train, "cpu")[0], []
    whole = {part: collect(network, images, "cpu", 25, part=part) for part in ("features", "forward")}
    def room(module, inputs):
        sizes.append(len(inputs[0]))
        if sizes[-1] > 30: raise error
    hook = network.backbone.register_forward_pre_hook(room); network.train()
    try:
        for part, expected in whole.items(): assert torch.equal(collect(network, images, "cpu", 100, part=part), expected) and network.training
        assert sizes == 2 * [100, 50, *8 * [25]]                                    # tried, tried, done from the beginning
        said = capsys.readouterr(); assert said.out == "" and said.err == "evaluation: 100 at once do not fit into the device's memory; 25 at once do, with the same result\n"
        assert accuracy(network, train, "cpu", batch=100) == pytest.approx(float((whole["forward"].argmax(1) == to_device(train, "cpu")[1]).double().mean()))
    finally: hook.remove(); network.eval()

def test_no_room_for_one_image(train, network):
    def room(module, inputs): raise torch.OutOfMemoryError("no room")
    hook = network.backbone.register_forward_pre_hook(room)
    try:
        with pytest.raises(UserError, match="^evaluation: not even one image fits .*--device cpu") as refused: collect(network, to_device(train, "cpu")[0], "cpu")
        assert "\n" not in str(refused.value) and not network.training
    finally: hook.remove()

def test_within_memory_tells_memory_from_other_faults():
    from scdd.device import within_memory
    tried = []
    def work(size): tried.append(size); raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"): within_memory(work, 8, "work")
    assert tried == [8] and within_memory(lambda size: size + 1, 8, "work") == (9, 8)

def test_within_memory_lets_go_of_what_failed():
    "What the failed attempt held is free before the next begins."
    import weakref
    from scdd.device import within_memory
    class Big: pass
    held = []
    def work(size):
        assert not any(one() for one in held), "the first attempt still holds its memory"
        big = Big(); held.append(weakref.ref(big))
        if size > 2: raise torch.OutOfMemoryError("no room")
    within_memory(work, 8, "work"); assert len(held) == 3
