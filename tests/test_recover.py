"Recovery: exact micro-batches, exact resuming, the options honoured one by one, and what is refused."
from dataclasses import replace

import numpy as np
import pytest
import torch

from scdd import recover as chapter
from scdd.data import ImageData
from scdd.files import UserError
from scdd.models import bn_layers, build
from scdd.recipes import Architecture, Recover
from scdd.recover import SyntheticSet, arrange, backward, backward_in_parts, compiled, frozen, recover, running_statistics, smallest_area, to_bytes, view

QUICK = Recover(ipc=2, steps=6, learning_rate=0.1, r_bn=0.1, jitter=1, batch=6, precision="float32", compile="off")


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    return ImageData(random.integers(0, 256, (36, 3, 8, 8), dtype=np.uint8), np.repeat(np.arange(3), 12), ("a", "b", "c"), (0.5, 0.4, 0.6), (0.25, 0.2, 0.3), name="noise", fingerprint="0")


@pytest.fixture(scope="module")
def network(data):
    network = build(Architecture(width=4), data, seed=1)
    random = torch.Generator().manual_seed(0)
    for _, layer in bn_layers(network):
        layer.running_mean.copy_(torch.randn(layer.num_features, generator=random)); layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=random))
        with torch.no_grad(): layer.weight.copy_(0.5 + torch.rand(layer.num_features, generator=random)); layer.bias.copy_(torch.randn(layer.num_features, generator=random))
    return network.eval()


def gradient(network, function, read, config, images, labels):
    images = images.clone().requires_grad_()
    losses = function(read, images * 1, labels, running_statistics(network), config)
    return losses, images.grad


@pytest.mark.parametrize("form", ["paper", "normalized"])
@pytest.mark.parametrize("micro", [1, 4, 5])
def test_micro_batches_are_exact(network, form, micro):
    exact, read = frozen(network.double(), torch.device("cpu"), "float32"); network.float()
    images, labels = torch.randn(11, 3, 8, 8, dtype=torch.float64), torch.arange(11) % 3
    config = replace(QUICK, bn_form=form, micro_batch=micro)
    whole, parts = (gradient(exact, f, read, config, images, labels) for f in (backward, backward_in_parts))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-9, atol=1e-12)


def test_micro_batches_make_the_same_images(network, data):
    one, other = recover(network, data, QUICK), recover(network, data, replace(QUICK, micro_batch=4))
    assert np.abs(one.images.astype(int) - other.images).max() <= 1


def test_written_out_batchnorm_is_the_network(network):
    frozen_one, read = frozen(network, torch.device("cpu"), "float32")
    images = torch.randn(5, 3, 8, 8)
    logits, found = read(images)
    seen = []; other = chapter.written_out(frozen(network, torch.device("cpu"))[0], seen)
    torch.testing.assert_close(other.normalized(images), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen, found, rtol=1e-4, atol=1e-4)


def test_the_network_stays_as_it_is(network, data):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    recover(network.train(), data, QUICK); assert network.training; network.eval()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


class Stop(Exception): pass


def stop_at(step, times=1):
    calls = []
    def on_step(now, images, losses):
        if now == step:
            calls.append(now)
            if len(calls) == times: raise Stop
    return on_step


@pytest.mark.parametrize("keep, init", [("last", "noise"), ("best", "patch")])
def test_resuming_is_exact(network, data, tmp_path, monkeypatch, keep, init):
    config = replace(QUICK, batch=3, keep=keep, init=init, crop_min=0.5, flip=True)
    whole = recover(network, data, config, seed=3)
    monkeypatch.setattr(chapter, "CHECK_EVERY", 2); monkeypatch.setattr(chapter, "Checkpoint", lambda folder=None: real(folder, 0.0))
    with pytest.raises(Stop): recover(network, data, config, seed=3, checkpoint=tmp_path, on_step=stop_at(5, times=2))
    seen = []
    again = recover(network, data, config, seed=3, checkpoint=tmp_path, on_step=lambda step, *_: seen.append(step))
    assert seen == [4, 5]                       # the first batch was finished, the second had 4 of its 6 steps
    assert (again.images == whole.images).all() and again.provenance["curve"] == whole.provenance["curve"]

real = chapter.Checkpoint


def test_a_checkpoint_of_other_settings_is_refused(network, data, tmp_path):
    recover(network, data, QUICK, checkpoint=tmp_path)
    with pytest.raises(UserError, match="other settings"): recover(network, data, replace(QUICK, r_bn=0.2), checkpoint=tmp_path)


def test_each_batch_has_its_own_chance(network, data):
    made = recover(network, data, replace(QUICK, batch=3))
    assert (recover(network, data, replace(QUICK, batch=3)).images == made.images).all()
    assert (recover(network, data, replace(QUICK, batch=3), seed=1).images != made.images).any()
    first, second = made.images[::2].astype(int), made.images[1::2]
    assert np.abs(first - second).mean() > 5


def test_arrange():
    classes = arrange(4, Recover(ipc=6, batch=8)); assert [len(g) for g in classes] == [8, 8, 8]
    assert all((torch.bincount(g // 6, minlength=4) == 2).all() for g in classes)
    single = arrange(4, Recover(ipc=6, batch=4, arrange="single")); assert all(len(set((g // 6).tolist())) == 1 for g in single) and len(single) == 8
    for kind in ("classes", "single", "mixed"):
        groups = arrange(3, Recover(ipc=7, batch=5, arrange=kind), seed=1)
        assert sorted(torch.cat(groups).tolist()) == list(range(21)) and max(map(len, groups)) <= 5
    mixed = [torch.cat(arrange(4, Recover(ipc=6, batch=8, arrange="mixed"), seed)).tolist() for seed in (0, 0, 1)]
    assert mixed[0] == mixed[1] != mixed[2]


def test_crop_curriculum():
    area = lambda step, **more: smallest_area(Recover(steps=100, crop_min=0.08, crop_start=1.0, **more), step)
    assert area(0) == 0.08
    assert area(0, crop_schedule="cosine") == 1.0 and area(50, crop_schedule="cosine") == pytest.approx(0.54) and area(100, crop_schedule="cosine") == 0.08
    assert area(25, crop_schedule="linear", crop_milestone=0.5) == pytest.approx(0.54) and area(50, crop_schedule="linear", crop_milestone=0.5) == 0.08
    assert area(49, crop_schedule="step", crop_milestone=0.5) == 1.0 and area(50, crop_schedule="step", crop_milestone=0.5) == 0.08


def test_views_are_differentiable_and_in_place():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    random = lambda: torch.Generator().manual_seed(0)
    assert view(images, replace(QUICK, jitter=0), 0, random()) is images
    rolled = view(images, QUICK, 0, random()); torch.testing.assert_close(rolled.sum(), images.sum())
    flipped = view(images, replace(QUICK, jitter=0, flip=True), 0, random())
    assert all(torch.allclose(f, i, atol=1e-5) or torch.allclose(f, i.flip(-1), atol=1e-5) for f, i in zip(flipped, images))
    view(images, replace(QUICK, crop_min=0.3, flip=True), 0, random()).sum().backward(); assert images.grad.isfinite().all()


def test_rounding():
    fractions = torch.full((1, 1, 8, 8), 100.6 / 255)
    assert to_bytes(fractions).unique().tolist() == [101] and to_bytes(fractions, "truncate").unique().tolist() == [100]
    noise = torch.rand(2, 3, 16, 16)
    assert (to_bytes(noise, "jpeg") != to_bytes(noise, "truncate")).float().mean() > 0.5
    assert to_bytes(noise + 5).unique().tolist() == [255]


def test_starts(network, data):
    untouched = replace(QUICK, steps=1, learning_rate=0.0, init="real")
    made = recover(network, data, untouched)
    for label, image in zip(made.labels, made.images): assert any((image == real).all() for real in data.images[data.labels == label])
    assert len(np.unique(made.images.reshape(6, -1), axis=0)) == 6
    patches = recover(network, data, replace(untouched, init="patch"))
    loss = lambda found: torch.nn.functional.cross_entropy(network(torch.from_numpy(found.images) / 255), torch.from_numpy(found.labels))
    with torch.no_grad(): assert loss(patches) < loss(made)
    with pytest.raises(UserError, match="ipc 13.*12 images"): recover(network, data, replace(untouched, ipc=13))


def test_keep_best(network, data):
    pictures, losses = [], []
    def watch(step, images, found): pictures.append(images.clone()); losses.append(float(found[0]))
    made = recover(network, data, replace(QUICK, keep="best", learning_rate=5.0, steps=3), on_step=watch)
    assert int(np.argmin(losses)) < 2
    order = arrange(3, QUICK)[0]                # of the images in their batch
    assert (torch.from_numpy(made.images)[order] == to_bytes(pictures[int(np.argmin(losses))])).all()


def test_compiled_reading_is_the_same(data):
    from scdd.device import can_compile
    if not can_compile(): pytest.skip("no compiler on this machine")
    frozen_one, read = frozen(build(Architecture("convnet", width=4, depth=2, norm="batch"), data).eval(), torch.device("cpu"), "float32")
    fast = compiled(frozen_one, torch.device("cpu"), "float32")
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5) % 3
    slow, quick = (gradient(frozen_one, backward, f, QUICK, images, labels) for f in (read, fast))
    torch.testing.assert_close(quick, slow, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_it_is_said_and_done(network, data, monkeypatch, capsys):
    monkeypatch.setattr(chapter, "can_compile", lambda: False)
    recover(network, data, replace(QUICK, compile="on", batch=3))
    assert capsys.readouterr().err.count("nothing is compiled") == 1


def test_a_failing_compiler_is_said_and_done_without(network, data, monkeypatch, capsys):
    def broken(*_):
        def read(images): raise RuntimeError("no such luck\nmore")
        return read
    monkeypatch.setattr(chapter, "can_compile", lambda: True); monkeypatch.setattr(chapter, "compiled", broken)
    made = recover(network, data, replace(QUICK, compile="on"))
    assert capsys.readouterr().err.count("torch.compile failed (no such luck)") == 1
    assert (made.images == recover(network, data, QUICK).images).all()


def test_a_loss_that_is_no_number(network, data, tmp_path):
    with pytest.raises(UserError, match=r"recover: the loss is no finite number any more at step 1;"): recover(network, data, replace(QUICK, r_bn=float("nan")), checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_networks_that_do_not_fit(network, data):
    with pytest.raises(UserError, match="no BatchNorm"): recover(build(Architecture("convnet", width=4, depth=2, norm="instance"), data), data, QUICK)
    with pytest.raises(UserError, match="3 classes apart, noise has 2"): recover(network, data.only(2), QUICK)
    with pytest.raises(UserError, match="recover.ipc 0"): recover(network, data, replace(QUICK, ipc=0))


def test_provenance(network, data):
    made = recover(network, data, QUICK, seed=5)
    assert made.provenance["seed"] == 5 and made.provenance["config"]["steps"] == 6 and made.provenance["network"]["architecture"]["width"] == 4
    assert [row["step"] for row in made.provenance["curve"]] == list(range(6)) and made.provenance["seconds"] > 0
    assert isinstance(made, SyntheticSet) and made.ipc == 2 and made.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_batch_that_does_not_fit_goes_on_in_exact_parts(data, network, monkeypatch, capsys):
    whole, real = recover(network, data, QUICK), chapter.frozen
    def narrow(*given):
        kept, read = real(*given)
        def limited(images):
            if len(images) > 2: raise torch.OutOfMemoryError(f"no room for {len(images)}")
            return read(images)
        return kept, limited
    monkeypatch.setattr(chapter, "frozen", narrow)
    parts = recover(network, data, QUICK)
    assert "6 at once do not fit" in capsys.readouterr().err
    assert np.abs(parts.images.astype(int) - whole.images).max() <= 1 and len(parts) == 6

def test_images_that_stay_in_their_files(data, network, tmp_path):
    whole, lazy = recover(network, data, replace(QUICK, batch=4, init="patch")), recover(network, data, replace(QUICK, batch=4, init="patch"), checkpoint=tmp_path/"kept", in_memory=False)
    assert not isinstance(lazy.images, np.ndarray) and lazy.images.shape == whole.images.shape and lazy.nbytes == whole.nbytes
    assert (np.asarray(lazy.images) == whole.images).all() and (lazy.images[5] == whole.images[5]).all()
    lazy.save(tmp_path/"set"); assert (SyntheticSet.load(tmp_path/"set").images == whole.images).all()
    (tmp_path/"kept"/"batch-00001.safetensors").unlink()
    with pytest.raises(UserError, match="batch-00001.safetensors: there is no such file"): np.asarray(lazy.images)
