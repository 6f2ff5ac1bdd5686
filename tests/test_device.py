"Which precision a processor takes, and which device a process gets."
import pytest, torch
from safetensors.torch import load_file
from scdd import device
from scdd.files import UserError, read_json
from scdd.processes import connect
from scdd.run import main

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
