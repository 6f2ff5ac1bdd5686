"Nothing is half-written, and what is broken is named."
import errno, os
import pytest, torch
from scdd import files
from scdd.files import Checkpoint, UserError, as_typed, nearest, read_json, read_tensors, write_json, write_tensors, writing

def test_writing_is_all_or_nothing(tmp_path):
    target = tmp_path/"a"/"value.json"; write_json(target, {"x": 1})
    with pytest.raises(RuntimeError):
        with writing(target) as beside: beside.write_text("{"); raise RuntimeError("killed here")
    assert read_json(target) == {"x": 1} and [p.name for p in target.parent.iterdir()] == ["value.json"]

def test_a_folder_is_replaced_in_whole(tmp_path):
    target = tmp_path/"set"; target.mkdir(); (target/"old").touch()
    with writing(target) as beside: beside.mkdir(); (beside/"new").touch()
    assert [p.name for p in target.iterdir()] == ["new"]

def test_full_disk(tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="value.json: the disk is full"): write_json(tmp_path/"value.json", 1)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("cut", [0, 10, -3])
def test_cut_short(tmp_path, cut):
    tensors, numbers = tmp_path/"w.safetensors", tmp_path/"v.json"
    write_tensors(tensors, {"w": torch.arange(8.)}, {"a": 1}); write_json(numbers, list(range(9)))
    assert read_tensors(tensors)[1] == {"a": "1"}
    for path, read in ((tensors, read_tensors), (numbers, read_json)):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UserError, match=path.name): read(path)

def test_missing(tmp_path):
    with pytest.raises(UserError, match="no such file"): read_json(tmp_path/"none.json")

def test_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path/"c", every=0); assert checkpoint.load() is None
    checkpoint.save(lambda: {"step": 3, "w": torch.ones(2)}); assert checkpoint.load()["step"] == 3
    (tmp_path/"c"/"checkpoint.pt").write_bytes(b"cut"); 
    with pytest.raises(UserError, match="checkpoint.pt"): Checkpoint(tmp_path/"c").load()
    checkpoint.clear(); assert Checkpoint(tmp_path/"c").load() is None

def test_checkpoint_never_unpickles_code(tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.system, ("touch " + str(tmp_path/"owned"),)
    (tmp_path/"checkpoint.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError): Checkpoint(tmp_path).load()
    assert not (tmp_path/"owned").exists()

def test_a_refusal_names_options_as_they_were_typed():
    with pytest.raises(UserError, match="^--recover.steps 0: needs --extra.residual$"):
        with as_typed({"--config.recover.": "--recover.", "--config.": "--extra."}): raise UserError("--config.recover.steps 0: needs --config.residual")
    with pytest.raises(KeyError, match="--config"):  # anything else is left alone
        with as_typed({"--config": "--extra"}): raise KeyError("--config")

def test_nearest(): assert "cifar100" in nearest("cifar10O", ["digits", "cifar100"])
