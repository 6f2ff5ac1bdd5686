"Which precision a processor takes, and which device a process gets."
import subprocess, sys
import pytest, torch
from safetensors.torch import load_file
from scdd import device
from scdd.files import UserError, read_json
from scdd.processes import connect
from scdd.cli import main

@pytest.fixture
def fresh(tmp_path, monkeypatch):
    "Nothing is remembered, and nobody has decided."
    monkeypatch.setenv("SCDD_CACHE", str(tmp_path)); monkeypatch.delenv("SCDD_PRECISION", raising=False)
    for known in (device.faster_in_bfloat16, device.has_bfloat16): known.cache_clear()
    yield tmp_path
    for known in (device.faster_in_bfloat16, device.has_bfloat16): known.cache_clear()

@pytest.mark.parametrize("seconds, wanted", [({"float32": 2.0, "bfloat16": 1.0}, True), ({"float32": 1.1, "bfloat16": 1.0}, False), ({"float32": 0.6, "bfloat16": 1.0}, False)])
def test_bfloat16_where_it_was_measured_to_be_faster(fresh, monkeypatch, seconds, wanted):
    asked = []; monkeypatch.setattr(device, "median_seconds", lambda precision: asked.append(precision) or seconds[precision])
    assert device.has_bfloat16("cpu") is wanted and len(asked) == 6
    assert isinstance(device.autocast("cpu"), torch.autocast) is wanted
    for known in (device.faster_in_bfloat16, device.has_bfloat16): known.cache_clear()   # as in the next process
    assert device.has_bfloat16("cpu") is wanted and len(asked) == 6 and list(read_json(fresh/"processor.json")) == [device.processor()]

def test_another_processor_with_the_same_cache_keeps_its_entry(fresh, monkeypatch):
    monkeypatch.setattr(device, "median_seconds", lambda precision: 1.0)
    for name in ("one", "other"):
        monkeypatch.setattr(device, "processor", lambda: name); device.faster_in_bfloat16.cache_clear(); device.faster_in_bfloat16()
    assert set(read_json(fresh/"processor.json")) == {"one", "other"}

def test_measuring_moves_no_random_numbers(fresh):
    torch.manual_seed(0); before = torch.get_rng_state(); device.has_bfloat16("cpu")
    assert torch.equal(before, torch.get_rng_state())

def test_a_wish_decides(fresh, monkeypatch):
    monkeypatch.setattr(device, "median_seconds", lambda precision: pytest.fail("was measured"))
    for wish in ("float32", "bfloat16"):
        monkeypatch.setenv("SCDD_PRECISION", wish); device.has_bfloat16.cache_clear(); assert device.has_bfloat16("cpu") is (wish == "bfloat16")
    monkeypatch.setenv("SCDD_PRECISION", "float23"); device.has_bfloat16.cache_clear()
    with pytest.raises(UserError, match="SCDD_PRECISION float23.*did you mean 'float32'"): device.has_bfloat16("cpu")

SHORT = ("--data.classes 3 --network.width 8 --student.width 8 --pretrain.epochs 1 --supervised.epochs 1 --full.epochs 1 --align.epochs 2 "
         "--recover.steps 3 --recover.ipc 2 --recover.compile off --train.epochs 2 --hard.epochs 2").split()

def test_every_stage_in_bfloat16(fresh, monkeypatch):
    "The other tests are in float32, whatever the processor takes for itself."
    for wish in ("float32", "bfloat16"):
        monkeypatch.setenv("SCDD_PRECISION", wish); device.has_bfloat16.cache_clear()
        assert main(["run", "digits", *SHORT, "--device", "cpu", "--out", str(fresh/wish)]) == 0
    for name in ("pretrain/ssl", "pretrain/supervised", "align/ssl"):
        exact, rough = (load_file(fresh/wish/name/"network.safetensors") for wish in ("float32", "bfloat16"))
        gaps = [float((rough[key] - exact[key]).norm() / exact[key].norm()) for key in exact if key.endswith("conv1.weight")]
        assert all(value.dtype != torch.bfloat16 and value.isfinite().all() for value in rough.values()) and 0 < max(gaps) < 0.5, (name, gaps)
    assert set(read_json(fresh/"bfloat16"/"report.json")["accuracy"]) == set(read_json(fresh/"float32"/"report.json")["accuracy"])

def test_a_broken_note_is_measured_again(fresh, monkeypatch):
    (fresh/"processor.json").write_text("{cut"); monkeypatch.setattr(device, "median_seconds", lambda precision: 1.0)
    assert device.faster_in_bfloat16() == 1.0 and read_json(fresh/"processor.json")

def test_each_process_has_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True); monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1"); monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.pick("auto") == torch.device("cuda:1") and device.pick("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="4 processes were started on this machine, which has 2 CUDA devices; start 2"): device.pick("cuda")

def test_a_device_without_bfloat16_goes_on_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False); device.without_bfloat16.cache_clear()
    for _ in range(2):
        with device.autocast("cuda", "bfloat16"): assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert capsys.readouterr().err.count("going on in float32") == 1

@pytest.mark.parametrize("name, message", [("mps", "work on processors or on CUDA devices"), ("cuda:0", "each has a device of its own; give --device cuda")])
def test_processes_refuse_what_they_cannot_share(monkeypatch, name, message):
    monkeypatch.setenv("WORLD_SIZE", "2"); monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=message): connect(torch.device(name))


# recorded passes: on a processor the recorder is played by what it records

@pytest.fixture
def recorder(monkeypatch):
    "Every device counts as one with graphs; the list fills with the shapes that were recorded."
    shapes = []
    def record(passes, inputs):
        "As strict as a graph: what a recording gave is gone when it is replayed, and it goes back before it goes forward again."
        shapes.append(tuple(inputs[0].shape)); last, waiting = [], []
        def replay(*given):
            assert not waiting, "replayed before the last pass went backward"
            for old in last: old.fill_(torch.nan)
            found = passes(*given); last[:] = [found.detach()] if torch.is_grad_enabled() else []
            if not found.requires_grad: return found
            waiting.append(True); found.register_hook(lambda slope: waiting.clear())
            return found * 1   # so that nobody's graph needs what is overwritten
        return replay
    monkeypatch.setattr(device, "record", record); monkeypatch.setattr(device, "uses_graphs", lambda _: True)
    return shapes


def test_a_pass_is_recorded_when_it_comes_again(recorder):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    replayed = device.Replayed(module.forward, module, lambda x: "usual")
    for step in range(6):
        replayed.turn = 0
        for said in [replayed(torch.ones(count, 3)) for count in (8, 8, 5)[:3 if step % 2 else 2]]: said.sum().backward()
    assert recorder == [(8, 3), (8, 3)]                   # each turn by itself; what came three times is not recorded yet
    module.eval(); assert replayed(torch.ones(8, 3)) == "usual"
    assert {key[0] for key in replayed.made} == {0, 1}


@pytest.mark.parametrize("method, key_bn, rate, within", [("supervised", "plain", 1e-4, 0.01), ("mocov2", "shuffle", 1e-5, 0.005), ("mocov2", "split", 1e-4, 0.01), ("mocov2", "plain", 1e-4, 0.01), ("mocov3", "plain", 1e-4, 0.01), ("swav", "plain", 1e-4, 0.01)])
def test_pretraining_through_recorded_passes_is_the_same(recorder, monkeypatch, method, key_bn, rate, within):
    from dataclasses import replace
    from scdd.data import load
    from scdd.models import build
    from scdd.pretrain import pretrain
    from scdd.recipes import Architecture, find_recipe, with_method
    recipe = find_recipe("digits"); data = load(recipe.data, "train").subset(list(range(200)))
    config = replace(with_method(recipe, method).pretrain, learning_rate=rate, epochs=2, batch=32, bn_splits=4, key_bn=key_bn, measure_every=0)
    again = pretrain(data, Architecture(width=4), config, device="cpu")
    assert recorder and "forward" not in vars(again.backbone)
    monkeypatch.setattr(device, "uses_graphs", lambda _: False)
    plain = pretrain(data, Architecture(width=4), config, device="cpu")
    begun = build(Architecture(width=4), data, 0).state_dict()
    for name, value in plain.state_dict().items():   # small steps, for large ones amplify what is rounded otherwise; so what is compared is how far each tensor has come
        apart, moved = ((value.double() - other.double()).abs().max() for other in (again.state_dict()[name], begun[name]))
        assert apart <= within * moved + 1e-8, name


def test_students_through_recorded_passes_are_the_same(recorder, monkeypatch):
    from dataclasses import replace
    from scdd.data import load, random_subset
    from scdd.models import build
    from scdd.recipes import Architecture, Relabel, find_recipe
    from scdd.train import train_student
    recipe = find_recipe("digits"); data = random_subset(load(recipe.data, "train"), 4); teacher = build(Architecture(width=4), data, 3)
    config = replace(recipe.train, epochs=6, batch=16)
    found = {}
    for graphs in (True, False):
        monkeypatch.setattr(device, "uses_graphs", lambda _: graphs)
        for statistics in ("running", "batch"): found[graphs, statistics] = train_student(data, Architecture(width=4), config, 1, "cpu", teacher, Relabel(teacher_bn=statistics)).network.state_dict()
    for statistics in ("running", "batch"):
        for name, value in found[False, statistics].items(): assert torch.equal(found[True, statistics][name], value), name
    assert (16, 1, 16, 16) in recorder and (8, 1, 16, 16) in recorder and "forward" not in vars(teacher.backbone)


def test_recovery_in_one_recorded_piece_is_the_same(recorder, monkeypatch):
    from dataclasses import replace
    from scdd import recover as recovery
    from scdd.data import load
    from scdd.models import build
    from scdd.recipes import Architecture, find_recipe
    recipe = find_recipe("digits"); data = load(recipe.data, "train"); network = build(Architecture(width=4), data, 3).eval()
    config = replace(recipe.recover, ipc=2, batch=10, steps=8, compile="off", precision="float32")
    monkeypatch.setattr(recovery, "uses_graphs", lambda _: True)
    once = recovery.recover(network, data, config, device="cpu"); assert recorder == [(10, 1, 16, 16)]
    monkeypatch.setattr(recovery, "uses_graphs", lambda _: False)
    assert (recovery.recover(network, data, config, device="cpu").images == once.images).all() and len(recorder) == 1


def test_what_cannot_be_recorded_goes_on_as_always(recorder, monkeypatch, capsys):
    def broken(passes, inputs): raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(device, "record", broken); device.say_once.cache_clear()
    replayed = device.Replayed(lambda x: x + 1)
    for _ in range(6): replayed.turn = 0; assert (replayed(torch.zeros(2)) == 1).all()
    assert capsys.readouterr().err.count("a pass cannot be recorded (operation not permitted when stream is capturing)") == 1
    monkeypatch.setattr(device, "record", lambda passes, inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError): device.recorded(None, ())


def test_processes_on_one_device_do_not_share_a_batch(monkeypatch):
    from scdd import pretrain as chapter
    from scdd.data import load
    from scdd.recipes import Architecture, find_recipe
    monkeypatch.setattr(chapter, "ranks", lambda: 2); monkeypatch.setattr(chapter, "one_device", lambda: True)
    monkeypatch.setattr(chapter, "pick", lambda name: torch.device(name)); monkeypatch.setattr(chapter, "by_rows", lambda *given: (_ for _ in ()).throw(LookupError))
    with pytest.raises(UserError, match="cannot share a batch; pretrain and align with one process first"): chapter.pretrain(load("digits"), Architecture(width=4), find_recipe("digits").supervised, device="cuda")
    with pytest.raises(LookupError): chapter.pretrain(load("digits"), Architecture(width=4), find_recipe("digits").supervised, device="cpu")   # processors are not concerned


def test_what_has_no_backbone_is_left_as_it_is(recorder):
    from scdd.models import build
    from scdd.peers.decoupled import Averaged
    from scdd.recipes import Architecture
    several = Averaged([build(Architecture(width=4), 3, seed, size=16, mean=(0.5,), std=(0.25,), channels=1) for seed in range(2)]).eval()
    with device.replaying("cpu", several) as begin: begin(); said = several(torch.rand(2, 1, 16, 16))
    assert said.shape == (2, 3) and not recorder


@pytest.mark.parametrize("count, parts", [(8, 4), (13, 4), (5, 8)])
def test_batchnorm_in_parts_is_a_pass_for_each_part(count, parts):
    "Outputs, gradients and running statistics; 13 images are parts of 4, 3, 3 and 3, and no part of 5 is a single image."
    from scdd.models import build
    from scdd.recipes import Architecture
    whole, by_part = (build(Architecture(width=4), 3, 0, size=16, mean=(0.5,), std=(0.25,), channels=1).backbone.double().train() for _ in range(2))
    images = torch.rand(count, 1, 16, 16, dtype=torch.float64)
    found, wanted = device.in_parts(whole, parts)(images), torch.cat([by_part(part) for part in images.tensor_split(max(1, min(parts, count // 2)))])
    for said in found, wanted: said.square().sum().backward()
    torch.testing.assert_close(found, wanted)
    for (name, one), (_, other) in zip(whole.named_parameters(), by_part.named_parameters()): torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), (_, other) in zip(whole.named_buffers(), by_part.named_buffers()): torch.testing.assert_close(one, other, msg=name)
    assert not any("forward" in vars(layer) for layer in whole.modules())   # as it was


def test_graphs_are_refused_by_one_word(monkeypatch):
    monkeypatch.setenv("SCDD_GRAPHS", "off"); assert not device.uses_graphs("cuda")
    monkeypatch.setenv("SCDD_GRAPHS", "maybe")
    with pytest.raises(UserError, match="SCDD_GRAPHS maybe: there is no such choice; give on or off"): device.uses_graphs("cuda")


def test_more_processes_than_devices_share_one(monkeypatch):
    from scdd import processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3"); monkeypatch.setattr(torch.cuda, "device_count", lambda: 1); assert processes.one_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4); assert not processes.one_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0); assert not processes.one_device()   # processors only


def test_what_cannot_be_compiled_is_said_once_and_done_without(capsys):
    calls = []
    def broken(value): calls.append(value); raise RuntimeError("no such luck\nmore")
    careful = device.with_fallback(broken, lambda value: 2 * value, "a stage")
    assert [careful(1), careful(2)] == [2, 4] and calls == [1]
    assert capsys.readouterr().err == "a stage: torch.compile failed (no such luck); going on without it\n"
    def full(value): raise torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError): device.with_fallback(full, lambda value: value, "a stage")(1)   # another matter, for others to deal with


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own figure is taken")
def test_a_process_has_its_own_peak():
    code = "from scdd.device import peak_memory; print(peak_memory())"
    def peak_of_a_process(): return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    alone = peak_of_a_process(); large = bytearray(alone + 500_000_000); del large     # this process has had more now than the other needs
    assert peak_of_a_process() < alone + 100_000_000 < device.peak_memory()
