"`scdd bench`: every part measures, both sides do the same work, and bad input gets one line. No time is tested."
import json
from dataclasses import replace
import numpy as np, pytest, torch
from scdd import bench
from scdd.data import load
from scdd.files import UserError
from scdd.cli import main
from scdd.peers.compare import PEERS, check_peer
from scdd.recipes import flatten

TINY = replace(bench.SMALL, repeats=1, product=64, maps=(2, 8, 8), copied=1, recovery=(8, 4, 16, 2), pretraining=(("mocov2", 8, 256, 32), ("simclr", 8, 256, 32)),
               student=((8, 40),), pictures=((12, 32), (4, 224)), starts=1, matching=(4, 1, 20, 2, (2, 3)), memory=(1, 20, ("random",)))

@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "All parts, made tiny, on a machine without data."
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SCDD_DATA", raising=False); patch.setenv("SCDD_CACHE", str(folder/"cache"))
        said = []; torch.manual_seed(0); np.random.seed(0)   # which the plain loops draw from
        result = bench.bench(list(bench.PARTS), sizes=TINY, device="cpu", out=folder/"bench.json", say=said.append)
    assert json.loads((folder/"bench.json").read_text()) == json.loads(json.dumps(result))
    return result | {"said": "\n".join(said)}

def test_every_part_measures(found):
    assert [part for part in bench.PARTS] == list(dict.fromkeys(one["part"] for one in found["tables"]))
    assert all(row["memory" if one["part"] == "memory" else "seconds"] > 0 for one in found["tables"] for row in one["rows"])
    assert {"code", "commit", "device", "versions", "threads", "sizes", "seconds"} <= set(found)
    for one in found["tables"]: assert bench.table(one) in found["said"]

def test_switches_are_for_devices_that_have_them(found, monkeypatch):
    one = next(one for one in found["tables"] if one["part"] == "switches")
    assert not one["rows"] and "not measured: a CUDA device has CUDA graphs" in bench.table(one)
    import os
    asked, clock = [], iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) ** 2)                  # each look at the time is later than the last by two more
    def run(rounds, compile): asked.append((rounds, compile, os.environ["SCDD_GRAPHS"])); return 10 * rounds
    monkeypatch.setenv("SCDD_GRAPHS", "on")
    rows = bench.switched({"a stage": (run, (False, True), 3e9)}, torch.device("cpu"), 6e10)
    assert [row["way"] for row in rows] == ["a stage: eager", "a stage: eager, graphs", "a stage: compiled", "a stage: compiled, graphs"]
    assert asked == [(rounds, compile, wish) for compile in (False, True) for wish in ("off", "on") for rounds in (6, 6, 16)] and os.environ["SCDD_GRAPHS"] == "on"
    for row in rows: assert row["seconds"] == pytest.approx(0.04) and row["rate"] == pytest.approx(75) and row["peak"] == pytest.approx(1.25)   # four units more for a hundred steps more

def test_each_stage_is_a_table_that_is_kept_when_it_is_there(monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setattr(bench, "product", lambda *words: (1.0, 2e12)); monkeypatch.setattr(bench, "the_stages", lambda sizes, device: {"one": 1, "two": 2})
    monkeypatch.setattr(bench, "switched", lambda stages, device, peak: [dict(stages)])
    made = bench.switches(bench.SMALL, SimpleNamespace(type="cuda"))
    first = next(made)
    assert first["rows"] == [{"one": 1}] and first["what"].startswith("one: ") and "2 TFLOP/s" in first["what"]
    assert [one["rows"] for one in made] == [[{"two": 2}]]

def test_the_stages_give_their_steps():
    stages = bench.the_stages(replace(bench.SMALL, switches=(4, 4, 2, 80, 16, 8, 70)), torch.device("cpu"))
    assert [run(1, False) for run, _, _ in stages.values()] == [2, 5, 10, 2] and all(operations > 0 for _, _, operations in stages.values())

def test_both_sides_do_the_same_work(found):
    for one in found["tables"]:
        if one["part"] not in ("pretraining", "student"): continue
        plain, *ours = [row for row in one["rows"] if "loss" in row]
        assert ours and all(row["images"] == plain["images"] for row in ours)
        if one["part"] == "pretraining": assert all(abs(row["loss"] - plain["loss"]) < 0.1 * plain["loss"] for row in ours)   # of eight steps; from seed to seed they differ by a twentieth
        else: assert all(0.1 < row["loss"] / plain["loss"] < 10 for row in ours)

def test_loading_ends_with_the_same_pixels(found):
    made = [one for one in found["tables"] if one["part"] == "loading" and one["rows"]]
    assert len(made) == 2
    for one in made:
        decoded, mapped, read = one["rows"]
        assert decoded["sum"] == read["sum"] and decoded["images"] == mapped["images"] == read["images"]

def test_what_is_not_there_is_said(found):
    for name in "cifar100", "tiny-imagenet": assert f"loading {name} again: not measured: no data here" in found["said"]

def test_data_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SCDD_CACHE", str(tmp_path/"cache"))
    bench.made_pictures(tmp_path/"data"/"cifar100", 20, 32)
    found = bench.bench(["loading"], replace(TINY, decoded=10), data=tmp_path/"data", device="cpu")
    measured = next(one for one in found["tables"] if "cifar100" in one["what"])
    assert measured["rows"][0]["decoded"] == 10 and measured["rows"][0]["images"] == 20 and "scaled up" in measured["what"]

def test_split_norm_is_each_group_by_itself():
    torch.manual_seed(0); x = torch.randn(8, 4, 5, 5); layer = torch.nn.BatchNorm2d(4)
    bench.split_norm(layer, 2)
    groups = x.view(4, 2, 4, 5, 5)
    by_hand = torch.stack([torch.nn.BatchNorm2d(4)(groups[:, i]) for i in range(2)], 1).view(x.shape)
    assert torch.allclose(layer(x), by_hand, atol=1e-5)
    assert torch.allclose(layer.running_mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)

def test_race_takes_turns_and_the_median():
    said, seconds = [], iter([3.0, 1.0, 9.0, 1.0, 2.0, 1.0])
    def way(name): return lambda: (said.append(name), {"seconds": next(seconds), "images": 5})[1]
    rows = bench.compared(bench.race({"plain": way("plain"), "ours": way("ours")}, 3))
    assert said == ["plain", "ours"] * 3
    assert [(row["seconds"], row["faster"], row["images"]) for row in rows] == [(3.0, 1.0, 5), (1.0, 3.0, 5)]

def test_made_pictures_are_the_same_each_time(tmp_path):
    first, second = (load(str(bench.made_pictures(tmp_path/name, 12, 32)), cache=tmp_path/"cache") for name in "ab")
    assert (first.images == second.images).all() and len(first.classes) == 10

@pytest.mark.parametrize("words, said", [
    (["--only", "recovry"], "--only recovry: there is no such part; did you mean 'recovery'?"),
    (["--only"], "bench: argument --only: expected at least one argument"),
    (["--width", "64"], "bench: unrecognized arguments: --width 64"),
    (["--data", "/no/such/folder"], "there is no such folder"),
    (["--device", "gpu"], "--device gpu: there is no such device"),
    (["--out", "/no/such/folder/bench.json"], "--out /no/such/folder/bench.json: is a folder, or lies in one that is not there"),
])
def test_bad_input_gets_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1

def test_what_takes_long_is_done_where_it_is_named(monkeypatch):
    monkeypatch.setattr(bench, "PARTS", {name: lambda name=name, **_: [{"part": name, "what": name, "rows": []}] for name in bench.PARTS})
    parts = lambda only: [one["part"] for one in bench.bench(only, device="cpu")["tables"]]
    assert parts(()) == [name for name in bench.PARTS if name not in ("matching", "memory")] and parts(("matching", "startup")) == ["matching", "startup"]

@pytest.mark.parametrize("method", PEERS)
def test_a_few_steps_of_a_method_for_its_memory(method, monkeypatch):
    monkeypatch.setattr(bench, "can_compile", lambda: False); made = []
    def distil(method, data, ipc, config, *words, **more):
        check_peer(method, data, ipc, config); made.append(config); assert len(data) == 20 and ipc == 2
    monkeypatch.setattr("scdd.peers.compare.distil", distil)
    assert bench.memory_of(method, 2, 20)["memory"] > 0
    left = {name: value for name, value in flatten(made[0]).items() if name in bench.BRIEF and value is not None}
    assert left == {name: bench.BRIEF[name] for name in left}

def test_command_line_chooses_parts(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SMALL", TINY)
    assert main(["bench", "--only", "startup", "--small"]) == 0
    said = capsys.readouterr().out
    assert "scdd --help" in said and "recovery" not in said and "commit" in said

def test_an_unknown_part_is_refused_in_python_too():
    with pytest.raises(UserError, match="there is no such part"): bench.bench(["loadin"])

def test_the_compiled_steps_take_turns_too():
    if not bench.can_compile(): pytest.skip("no compiler on this machine")
    one, = bench.recovery(replace(TINY, compile=True, repeats=2), bench.pick("cpu"))
    row = next(row for row in one["rows"] if row["way"] == "ours, compiled")
    assert row["compiling"] > row["seconds"] > 0 and set(row) >= {"precision", "faster", "floor"}
