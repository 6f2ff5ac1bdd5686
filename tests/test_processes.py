"Several processes of one thread: what is split comes together as one process has it."
import os, re, shlex, subprocess, sys, textwrap, time
import psutil, pytest, torch
from scdd.files import read_json
from scdd.recover import load_set
from scdd.train import Report

ENV = os.environ | {"OMP_NUM_THREADS": "1", "SCDD_PRECISION": "float32"}

def launch(words, processes=2, timeout=240, check=True):
    "Start a module or a program in several processes."
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, words)],
                          capture_output=True, text=True, env=ENV, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[:3000]
    return done

GRADIENTS = """
    import json, sys, torch
    from dataclasses import replace
    from scdd.data import load, to_device
    from scdd.device import generator
    from scdd.pretrain import METHODS, Moment, assemble, bn_buffers, make_views
    from scdd.processes import average, connect, rank, synced
    from scdd.recipes import METHOD_VALUES, find_recipe, with_method
    connect(torch.device("cpu"))
    data, recipe = load("digits"), find_recipe("digits")
    (images, labels), tensors = to_device(data, "cpu"), {}
    for method in METHOD_VALUES:
        config = replace(recipe.supervised if method == "supervised" else with_method(recipe, method).pretrain, batch=32, queue=64)
        parts, moment = assemble(data, replace(recipe.network, width=4), config, 0).double(), Moment(1, 1, generator("cpu", 0, 0))
        views = [view.double() for view in make_views(images[:32], "digits", config, moment.random)]
        with synced(parts): loss = METHODS[method].step(parts, views, labels[:32], config, moment)
        loss.backward(); average(p.grad for p in parts.parameters()); average(bn_buffers(parts))
        tensors |= {f"{method}/loss": loss.detach()} | {f"{method}/{name}": p.grad for name, p in parts.named_parameters() if p.grad is not None}
        if method != "mocov2": tensors |= {f"{method}/{name}": b for name, b in parts["online"]["network"].named_buffers() if name.endswith("running_var")}
    if rank() == 0: torch.save(tensors, sys.argv[1])
"""

@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients"); (folder/"gradients.py").write_text(textwrap.dedent(GRADIENTS))
    for count in (1, 2): launch([folder/"gradients.py", folder/f"{count}.pt"], count)
    return [torch.load(folder/f"{count}.pt", weights_only=True) for count in (1, 2)]

@pytest.mark.parametrize("method", ["supervised", "simclr", "mocov2", "mocov3", "swav", "dino"])
def test_a_batch_over_two_processes_has_the_gradient_of_one(gradients, method):
    one, two = ({name: tensor for name, tensor in some.items() if name.startswith(method + "/")} for some in gradients)
    assert set(one) == set(two) and len(one) > 40
    for name in one: torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-9, check_dtype=False)
    assert one[f"{method}/loss"] > 0

SMALL = shlex.split("--pretrain.epochs 2 --supervised.epochs 1 --pretrain.measure_every 0 --align.epochs 3 --recover.teacher supervised --relabel.teacher supervised "
                    "--recover.steps 40 --recover.ipc 4 --recover.batch 10 --train.epochs 2 --train.students 2 --hard.students 2 --hard.epochs 2")

def test_a_run_of_two_goes_on_with_one_and_comes_out_the_same(tmp_path):
    words = ["-m", "scdd", "recover", "digits", *SMALL]
    launch([*words, "--out", tmp_path/"one"], 1)
    env = ENV | {"PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words), "--reuse", str(tmp_path/"one"), "--out", str(tmp_path/"two")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    kept, deadline = tmp_path/"two"/".checkpoints"/"recover", time.monotonic() + 120
    (tmp_path/"one"/"recover"/"stage.json").rename(tmp_path/"one"/"recover"/"hidden.json")  # its images are not to be taken over
    while not list(kept.glob("batch-*.safetensors")) and time.monotonic() < deadline and running.poll() is None: time.sleep(0.01)
    worker = next(p for p in psutil.Process(running.pid).children() if p.environ().get("RANK") == "1")
    worker.kill()
    said = running.communicate(timeout=120)[1]
    assert running.returncode != 0 and "another process of this run has ended" in said and "goes on" in said
    made = {path.name: path.stat().st_mtime_ns for path in kept.glob("batch-*.safetensors")}
    assert 0 < len(made) < 4
    launch([*words, "--out", tmp_path/"two"], 1)
    one, two = (load_set(tmp_path/name/"recover") for name in ("one", "two"))
    assert (one.images == two.images).all() and one.provenance["curve"] == two.provenance["curve"]

MATCHING = """
    import sys, torch
    from pathlib import Path
    from scdd.data import load
    from scdd.peers import distributions, gradients
    from scdd.peers.compare import changed, find_peer, usual
    from scdd.recipes import RECIPES, override
    from scdd.run import run, with_peer
    recipe = override(RECIPES["digits"], {"data.classes": 3, "recover.ipc": 2})
    data = load(recipe.data)
    small = {"network.width": 4, "network.depth": 2, "iterations": 3, "batch_real": 8}
    watched = small | {"batch_watch": 4, "window": 2, "outer_cap": 3, "inner_cap": 2, "settled": 0.0}
    chosen = {"dc": small | {"outer": 2, "inner": 2}, "dsa": small | {"outer": 2, "inner": 1}, "dm": small | {"at_once": 8}, "cafe": watched | {"discrimination": 1.0}}
    configs = {name: changed(usual(name, recipe), values) for name, values in chosen.items()}
    def begun(name, folder, last=None):
        "A method that keeps its state after every step, and is stopped after `last`; its set and its steps."
        def every_step(folder): return Checkpoint(folder, every=0.0)
        Checkpoint, steps, gradients.CHECK_EVERY = gradients.Checkpoint, [], 1
        gradients.Checkpoint = distributions.Checkpoint = every_step
        def watch(step, images, loss):
            steps.append(step)
            if step == last: raise KeyboardInterrupt
        try: return find_peer(name)[0](data, 2, configs[name], 0, "cpu", folder/name, watch), steps
        except KeyboardInterrupt: return None, steps
        finally: gradients.Checkpoint = distributions.Checkpoint = Checkpoint
"""

MATCHED_BY_TWO = MATCHING + """
    out = Path(sys.argv[1])
    for name, config in configs.items(): run(with_peer(recipe, name, config), out/"whole"/name, until="recover")
    for name in configs: torch.save(begun(name, out/"by-one")[1], out/f"{name}-{torch.distributed.get_rank()}.pt")
    for name in configs: begun(name, out/"by-two", 2)
"""

def test_matching_by_two_is_that_of_one_and_either_goes_on_with_the_other(tmp_path):
    exec(textwrap.dedent(MATCHING), one := {})
    names = list(one["configs"])
    for name in names: assert one["begun"](name, tmp_path/"by-one", 2)[1] == [0, 1, 2]
    (tmp_path/"two.py").write_text(textwrap.dedent(MATCHED_BY_TWO))
    launch([tmp_path/"two.py", tmp_path])
    for name in names:
        expected, two = one["find_peer"](name)[0](one["data"], 2, one["configs"][name], 0, "cpu"), load_set(tmp_path/"whole"/name/"recover")
        assert (two.images == expected.images).all() and two.provenance.get("turns") == expected.provenance.get("turns")
        ours, theirs = ([point["loss"] for point in some.provenance["curve"]] for some in (expected, two))
        assert theirs == (ours if name in ("dc", "dsa") else pytest.approx(ours, rel=1e-5)) and not list((tmp_path/"whole"/name).rglob("checkpoint.pt"))
        went_on, steps = one["begun"](name, tmp_path/"by-two")
        assert steps[0] == 2 and (went_on.images == expected.images).all()
        for process in range(2): assert torch.load(tmp_path/f"{name}-{process}.pt")[0] == 2

def test_what_is_handed_out_comes_back_whole(monkeypatch):
    from scdd import processes
    for count in (1, 3, 5, 10):
        for several in (1, 2, 4, 12):
            monkeypatch.setattr(processes, "ranks", lambda: several); own = []
            for place in range(several):
                monkeypatch.setattr(processes, "rank", lambda: place)
                first, last = processes.edges(count); own += range(first, last)
                assert len(processes.stretch(count)) > 0 and (first == last or list(processes.stretch(count)) == list(range(first, last)))
            assert own == list(range(count))

def test_processes_that_mean_different_things_are_refused(tmp_path):
    (tmp_path/"two.py").write_text("import os, sys\nfrom scdd.cli import main\n"
                                   "sys.exit(main(['run', 'digits', '--recover.ipc', str(1 + int(os.environ['RANK'])), '--out', sys.argv[1]]))")
    done = launch([tmp_path/"two.py", tmp_path/"run"], 2, check=False)
    assert done.returncode and "process 0 and process 1 of this run have a different --recover.ipc (1 and 2)" in done.stderr

def test_what_does_not_split_evenly_is_refused(tmp_path):
    done = launch(["-m", "scdd", "pretrain", "digits", "--pretrain.batch", "33", "--out", tmp_path/"run"], 2, check=False)
    assert done.returncode and "--pretrain.batch 33: cannot be split evenly among 2 processes" in done.stderr

def test_a_comparison_of_two_processes_with_stored_labels(tmp_path):
    words = [*SMALL, "--data.classes", "3", "--network.width", "8", "--student.width", "8", "--recover.steps", "5", "--relabel.store", "True"]
    said = launch(["-m", "scdd", "compare", "digits", *words, "--methods", "random", "--out", tmp_path/"compare"], 2).stdout
    assert said.count("pretrain supervised") == 2 and said.count("report:") == 2  # once for each method: one process speaks
    rows = read_json(tmp_path/"compare"/"compare.json")["rows"]
    assert [row["cell"] for row in rows] == ["scdd", "random"] and all(row["distilled_soft"]["n"] == 2 for row in rows)
    report = Report.load(tmp_path/"compare"/"scdd")
    assert "2 processes" in report.device and len(report.accuracy["distilled_hard"]["values"]) == 2
    assert not list((tmp_path/"compare").rglob("*.part")) and not list((tmp_path/"compare").rglob(".checkpoints/*/*"))

PROGRAM = """
    import sys
    from scdd.cli import main
    from scdd.processes import rank, ranks
    def program():
        code = main(sys.argv[1:])
        print(f"done: {rank()} of {ranks()}", flush=True)
        if code: sys.exit(code)
    START
"""

@pytest.mark.parametrize("way", ["accelerate launch", "notebook_launcher"])
def test_other_launchers_start_the_same_run(tmp_path, way):
    "Two processes find each other however they are started, and recover what one recovers."
    words = ["recover", "digits", *SMALL, "--data.classes", "2", "--supervised.epochs", "1", "--recover.steps", "2", "--recover.ipc", "1", "--recover.batch", "1", "--network.width", "4"]
    launch(["-m", "scdd", *words, "--out", tmp_path/"one"], 1)
    program = tmp_path/"program.py"
    program.write_text(textwrap.dedent(PROGRAM).replace("START", "program()" if way == "accelerate launch" else "from accelerate import notebook_launcher; notebook_launcher(program, (), num_processes=2)"))
    starter = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"] if way == "accelerate launch" else []
    done = subprocess.run([sys.executable, *starter, str(program), *words, "--reuse", str(tmp_path/"one"), "--out", str(tmp_path/"two")], capture_output=True, text=True, env=ENV, timeout=240)
    assert done.returncode == 0, done.stderr[:3000]
    assert set(re.findall(r"done: \d of \d", done.stdout)) == {"done: 0 of 2", "done: 1 of 2"}
    one, two = (load_set(tmp_path/name/"recover") for name in ("one", "two"))
    assert (one.images == two.images).all() and len(two) == 2

def test_the_script_for_a_cluster_is_a_script():
    "The Slurm script that chapter 42 shows can be read by a shell, and its command by ours."
    from scdd.cli import parse
    from scdd.pages import root
    cells = read_json(root()/"nbs"/"practice"/"42_scale.ipynb")["cells"]
    [script] = [block for cell in cells for block in re.findall(r"```bash\n(.*?)```", "".join(cell["source"]), re.DOTALL) if "#SBATCH" in block]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    words = shlex.split(script.split(" -m scdd run ")[1].split(" &")[0])
    assert parse("run", words)[0].name == words[0]
