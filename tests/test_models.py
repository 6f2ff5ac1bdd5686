"Networks: oracles against torchvision, the published layouts, and faults."
import argparse, subprocess, sys
import numpy as np, pytest, timm, torch, torchvision
from torch import nn
from scdd.files import UserError
from scdd.models import (ConvNet, Network, architecture_of, backbone, bn_layers, build, conversion, knn_accuracy, load_network, network_from_checkpoint,
                         read_checkpoint, require_batchnorm, save_network)
from scdd.recipes import Architecture

TINY = Architecture("resnet18", 4)

def count(module): return sum(parameter.numel() for parameter in module.parameters())


# Architectures

def test_parameter_counts():
    assert count(build(Architecture("resnet18"), 100)) == 11_220_132
    assert count(build(Architecture("convnet", 128, norm="instance"), 100)) == 504_420
    assert count(build(Architecture("convnet", 128, norm="batch"), 100)) == 504_420

@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"): theirs, ours = getattr(torchvision.models, name)(), backbone(Architecture(name, 64, "large"))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert (ours.layer1[0].downsample is None) == (name in ("resnet18", "resnet34"))

@pytest.mark.parametrize("stem", ["small", "large"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions(name, stem):
    ours = backbone(Architecture(name, 64, stem)).eval()
    theirs = getattr(torchvision.models, name)(); theirs.fc = nn.Identity()
    if stem == "small": theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs.eval()(images))

@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_width_scales_every_layer(name):
    narrow, wide = (dict(backbone(Architecture(name, width)).named_parameters()) for width in (8, 16))
    for key, weight in wide.items():
        inputs = 1 if key == "conv1.weight" or weight.dim() == 1 else 2
        assert weight.numel() == 2 * inputs * narrow[key].numel(), key

def test_grey_images_and_stems():
    for stem, side in [("small", 16), ("medium", 8), ("large", 4)]:
        network = backbone(Architecture("resnet18", 4, stem), channels=1)
        assert network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(torch.rand(1, 1, 16, 16)))))).shape[-1] == side

def test_convnet_is_the_published_one():
    network, images = ConvNet(2, 8, "instance", 3, 16), torch.rand(2, 3, 16, 16)
    expected = images
    for block in network.blocks:
        maps = block[0](expected)
        maps = nn.functional.instance_norm(maps) * block[1].weight[:, None, None] + block[1].bias[:, None, None]
        expected = nn.functional.avg_pool2d(maps.relu(), 2)
    torch.testing.assert_close(network(images), expected.flatten(1))

@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_other_families(name):
    network = build(Architecture(name), 7, channels=1).eval()
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 7)

STUDENTS = [Architecture("resnet50", 4), Architecture("convnet", 4), Architecture("vgg11_bn", 4), Architecture("mobilenetv3_small_050"), Architecture("vit", 4)]

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("architecture", STUDENTS, ids=lambda a: a.name)
def test_students_of_every_family_take_small_images(architecture, size, channels):
    network = build(architecture, 7, channels=channels, size=size)
    found = network(torch.rand(2, channels, size, size)); assert found.shape == (2, 7)
    found.sum().backward(); assert all(weight.grad is not None for weight in network.parameters())

@pytest.mark.parametrize("name, theirs", [("vgg11", "A"), ("vgg11_bn", "A"), ("vgg16_bn", "D")])
def test_vgg_is_torchvisions(name, theirs):
    ours, batch_norm = build(Architecture(name, 64), 10).eval(), name.endswith("_bn")
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs[theirs], batch_norm).eval()
    theirs.load_state_dict(ours.backbone.features.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.backbone(images), theirs(images).flatten(1))
    assert name != "vgg11_bn" or count(ours) == 9_231_114                                        # the VGG-11 of the peers on CIFAR-10

def test_a_vgg_for_small_images_has_the_same_weights_at_every_size():
    shapes = [{key: tensor.shape for key, tensor in backbone(Architecture("vgg11_bn", 16), 3, size).state_dict().items()} for size in (8, 16, 32, 64)]
    assert all(one == shapes[0] for one in shapes) and shapes[0]["features.0.weight"] == (16, 3, 3, 3) and shapes[0]["features.25.weight"] == (128, 128, 3, 3)

def test_a_vgg_for_photographs_is_timms():
    with torch.device("meta"): assert hasattr(timm.create_model("vgg11_bn"), "pre_logits")
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdd.models.timm_model", lambda *given: called.append(given)); backbone(Architecture("vgg11_bn", 16), 3, 224)
    assert called == [("vgg11_bn", 3, 224)]

@pytest.mark.parametrize("size, tokens", [(8, 4), (16, 16), (28, 49), (32, 64), (64, 64), (96, 64), (224, 64)])
def test_tokens_of_a_vit(size, tokens): assert backbone(Architecture("vit", 4), 3, size).pos_embed.shape == (1, tokens, 12)

def test_a_wide_deep_vit_is_vit_tiny():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0, global_pool="avg", class_token=False)
    ours = backbone(Architecture("vit", 64, depth=12)); theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32); torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))

@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("architecture", STUDENTS, ids=lambda a: a.name)
def test_students_of_every_family_train(tmp_path, architecture, labels):
    from scdd import data
    from scdd.recipes import Train
    from scdd.train import train_student
    few = data.random_subset(data.load("digits"), 2, seed=0)
    teacher = build(TINY, few, seed=1).eval() if labels == "soft" else None
    student = train_student(few, architecture, Train(epochs=2, batch=10, labels=labels), device="cpu", teacher=teacher).network
    untrained = build(architecture, few)
    assert not torch.equal(student.head.weight, untrained.head.weight) and all(tensor.isfinite().all() for tensor in student.state_dict().values())
    save_network(tmp_path/"n.safetensors", student)
    back, images = load_network(tmp_path/"n.safetensors", list(few.classes), architecture), torch.rand(3, 1, 16, 16)
    assert all(torch.equal(tensor, student.state_dict()[key]) for key, tensor in back.state_dict().items()); torch.testing.assert_close(back(images), student(images))

@pytest.mark.parametrize("architecture", [Architecture("resnet18", 4), Architecture("resnet50", 4), Architecture("convnet", 4), Architecture("vgg11_bn", 4), Architecture("mobilenetv3_small_050"),
                                          Architecture("densenet121"), Architecture("efficientnet_b0")], ids=lambda a: a.name)
def test_bn_layers_come_in_forward_order(architecture):
    network, turns = backbone(architecture).eval(), []
    for name, layer in bn_layers(network): layer.register_forward_pre_hook(lambda *_, name=name: turns.append(name))
    with torch.no_grad(): network(torch.rand(1, 3, 32, 32))
    assert turns == [name for name, layer in bn_layers(network)] and turns

def test_seed_and_global_random_state():
    before = torch.get_rng_state()
    one, same, other = (build(TINY, 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one) and not torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["backbone.conv1.weight"], other["backbone.conv1.weight"])

def test_network_normalizes_by_itself():
    network = Network(TINY, ["a", "b"], (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), size=16).eval()
    images = torch.rand(4, 3, 16, 16)
    normal = torch.stack([(images[:, c] - m) / s for c, (m, s) in enumerate(zip((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)))], 1)
    torch.testing.assert_close(network(images), network.normalized(normal))
    torch.testing.assert_close(network.denormalize(normal), images)
    with pytest.raises(TypeError, match="uint8"): network((images * 255).byte())
    with pytest.raises(ValueError, match="channels"): Network(TINY, 2, [0.5], [0.5])

def test_knn_is_the_naive_loop():
    g = torch.Generator().manual_seed(0)
    known, labels, asked, answers = torch.randn(60, 5, generator=g), torch.randint(3, (60,), generator=g), torch.randn(30, 5, generator=g), torch.randint(3, (30,), generator=g)
    right = 0
    for feature, answer in zip(asked, answers):
        cosines = [float(feature @ other / feature.norm() / other.norm()) for other in known]
        votes = [0.0] * 3
        for i in sorted(range(60), key=lambda i: -cosines[i])[:7]: votes[labels[i]] += np.exp(cosines[i] / 0.07)
        right += int(np.argmax(votes)) == int(answer)
    assert knn_accuracy(known, labels, asked, answers, k=7) == pytest.approx(right / 30)
    assert knn_accuracy(known[:5], labels[:5], known[:5], labels[:5], k=20) >= 0.2


# Files

@pytest.mark.parametrize("architecture", [TINY, Architecture("convnet", 4, norm="batch"), Architecture("mobilenetv3_small_050")], ids=lambda a: a.name)
def test_saved_and_read_back(tmp_path, architecture):
    network = Network(architecture, ["aye", "nö"], (0.1, 0.2, 0.3), (0.3, 0.2, 0.1), seed=3)
    network.train()(torch.rand(4, 3, 32, 32))
    save_network(tmp_path/"n.safetensors", network, {"epochs": 3})
    back = load_network(tmp_path/"n.safetensors", ["aye", "nö"], architecture)
    assert back.about == {"epochs": 3} and back.classes == ("aye", "nö") and not back.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(back(images), network.eval()(images))

def test_fields_a_family_ignores_make_no_other_architecture(tmp_path):
    save_network(tmp_path/"n.safetensors", build(TINY, 3))
    load_network(tmp_path/"n.safetensors", 3, Architecture("resnet18", 4, depth=9, norm="instance"))
    save_network(tmp_path/"v.safetensors", build(Architecture("vgg11_bn", 4), 3)); load_network(tmp_path/"v.safetensors", 3, Architecture("vgg11_bn", 4, "large", depth=9))
    with pytest.raises(UserError, match="width"): load_network(tmp_path/"v.safetensors", 3, Architecture("vgg11_bn", 8))
    save_network(tmp_path/"t.safetensors", build(Architecture("vit", 4), 3)); load_network(tmp_path/"t.safetensors", 3, Architecture("vit", 4, "large", norm="instance"))
    with pytest.raises(UserError, match="depth"): load_network(tmp_path/"t.safetensors", 3, Architecture("vit", 4, depth=4))

def test_refused_files(tmp_path):
    path = tmp_path/"network.safetensors"
    save_network(path, build(TINY, ["a", "b", "c"]))
    for options, word in [({"classes": 10}, "number of classes"), ({"classes": ["a", "c", "b"]}, "list of classes"), ({"architecture": Architecture("resnet34", 4)}, "resnet34"),
                          ({"architecture": Architecture("resnet18", 8)}, "width")]:
        with pytest.raises(UserError, match=word) as error: load_network(path, **options)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    whole = path.read_bytes()
    for length in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        (tmp_path/"short.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match="short.safetensors"): load_network(tmp_path/"short.safetensors")
    with pytest.raises(UserError, match="no such file"): load_network(tmp_path/"none.safetensors")

def test_file_that_contradicts_itself(tmp_path):
    from scdd.files import read_tensors, write_tensors
    save_network(tmp_path/"n.safetensors", build(TINY, 3))
    tensors, facts = read_tensors(tmp_path/"n.safetensors")
    write_tensors(tmp_path/"a.safetensors", {k: v for k, v in tensors.items() if k != "backbone.conv1.weight"}, facts)
    with pytest.raises(UserError, match="lacking .*conv1"): load_network(tmp_path/"a.safetensors")
    write_tensors(tmp_path/"b.safetensors", tensors, {})
    with pytest.raises(UserError, match="which network"): load_network(tmp_path/"b.safetensors")
    write_tensors(tmp_path/"c.safetensors", tensors, {**facts, "classes": '["a"]'})
    with pytest.raises(UserError, match="shapes differ"): load_network(tmp_path/"c.safetensors")


# Public checkpoints: random values under the published keys and shapes

def published(name="resnet18", value=0.0, outputs=1000, cifar=False, heads=True):
    "A torchvision state dictionary whose every tensor is one number, stored once; another number for each key."
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=outputs)
        if cifar: model.conv1 = nn.Conv2d(3, 64, 3, padding=2, bias=False)
    return {key: torch.tensor(value + i / 1000).to(tensor.dtype).expand(tensor.shape) for i, (key, tensor) in enumerate(model.state_dict().items()) if heads or not key.startswith("fc.")}

def prefixed(prefix, state): return {prefix + key: value for key, value in state.items()}
def one(*shape): return torch.tensor(9.0).expand(shape)

def projector(state, inputs, *sizes):
    "MoCo's projector stands in the place of fc."
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    return {**state, **{f"fc.{2 * i}.weight": one(size, inputs) for i, size in enumerate(sizes)}}

ONLINE, EMA = 0.0, 5.0

def moco_v2():  # facebookresearch/moco: main_moco.py (save_checkpoint), moco/builder.py
    q, k = (projector(published("resnet50", value), 2048, 2048, 128) for value in (ONLINE, EMA))
    return {"epoch": 800, "arch": "resnet50", "state_dict": {**prefixed("module.encoder_q.", q), **prefixed("module.encoder_k.", k), "module.queue": one(128, 65536), "module.queue_ptr": torch.zeros(1).long()}, "optimizer": {"state": {0: {"momentum_buffer": one(64)}}, "param_groups": [{"lr": 0.03}]}}

def moco_v3():  # facebookresearch/moco-v3: main_moco.py, moco/builder.py
    base, ema = (projector(published("resnet50", value), 2048, 4096, 256) for value in (ONLINE, EMA))
    return {"epoch": 300, "arch": "resnet50", "state_dict": {**prefixed("module.base_encoder.", base), **prefixed("module.momentum_encoder.", ema), "module.predictor.0.weight": one(4096, 256)}, "optimizer": {}, "scaler": {"scale": 65536.0}}

def swav_hub():  # facebookresearch/swav: hubconf.py (a bare dictionary), src/resnet50.py
    return {**prefixed("module.", published("resnet50", ONLINE, heads=False)), "module.projection_head.0.weight": one(2048, 2048), "module.projection_head.1.running_mean": one(2048), "module.prototypes.weight": one(3000, 128)}

def swav_training():  # facebookresearch/swav: main_swav.py (checkpoint.pth.tar), several prototype heads
    return {"epoch": 3, "state_dict": {**prefixed("module.", published("resnet18", ONLINE, heads=False)), "module.prototypes.prototypes0.weight": one(3000, 128)}, "optimizer": {}}

def dino_full():  # facebookresearch/dino: main_dino.py (save_dict), utils.MultiCropWrapper
    student, teacher = ({**prefixed("module.backbone.", published("resnet50", value, heads=False)), "module.head.mlp.0.weight": one(2048, 2048), "module.head.last_layer.weight_g": one(65536, 1)} for value in (ONLINE, EMA))
    return {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 800, "args": argparse.Namespace(arch="resnet50", lr=0.03), "dino_loss": {"center": one(1, 65536)}}

def dino_backbone(): return published("resnet50", ONLINE, heads=False)  # dino_resnet50_pretrain.pth

def solo_cifar():  # vturrisi/solo-learn: solo/methods/base.py, a Lightning checkpoint
    return {"epoch": 999, "pytorch-lightning_version": "1.6.4", "state_dict": {**prefixed("backbone.", published(value=ONLINE, cifar=True, heads=False)), **prefixed("momentum_backbone.", published(value=EMA, cifar=True, heads=False)), "classifier.weight": one(100, 512), "projector.0.weight": one(2048, 512), "queue": one(2, 256, 65536)}, "hyper_parameters": {"lr": 0.3, "dataset": "cifar100"}}

def solo_old():  # vturrisi/solo-learn, earlier releases: the backbone is called encoder; ImageNet-100 keeps the large stem
    return {"epoch": 399, "state_dict": {**prefixed("encoder.", published(value=ONLINE, heads=False)), **prefixed("momentum_encoder.", published(value=EMA, heads=False)), "classifier.bias": one(100)}}

def torchvision_file(): return published("resnet34", ONLINE)  # pytorch/vision: resnet34-b627a593.pth
def torchvision_old(): return {k: v for k, v in published("resnet101", ONLINE).items() if not k.endswith("num_batches_tracked")}  # the files of 2017
def timm_training(): return {"epoch": 9, "arch": "resnet18", "version": 2, "state_dict": published(value=ONLINE), "args": argparse.Namespace(model="resnet18"), "metric": np.float64(70.1)}  # huggingface/pytorch-image-models: CheckpointSaver

FILES = [(moco_v2, "moco-v2", "resnet50", ONLINE), (moco_v3, "moco-v3", "resnet50", ONLINE), (swav_hub, "swav", "resnet50", ONLINE), (swav_training, "swav", "resnet18", ONLINE),
         (dino_full, "dino", "resnet50", EMA), (dino_backbone, "torchvision", "resnet50", ONLINE), (solo_cifar, "solo-learn", "resnet18", ONLINE), (solo_old, "solo-learn", "resnet18", ONLINE),
         (torchvision_file, "torchvision", "resnet34", ONLINE), (torchvision_old, "torchvision", "resnet101", ONLINE), (timm_training, "timm", "resnet18", ONLINE)]

@pytest.mark.parametrize("make, layout, name, value", FILES, ids=lambda v: getattr(v, "__name__", None) or str(v))
def test_published_layouts(tmp_path, make, layout, name, value):
    torch.save(make(), tmp_path/"weights.pth")
    state, found = read_checkpoint(tmp_path/"weights.pth")
    cifar = make is solo_cifar
    assert found == layout and architecture_of(state) == Architecture(name, 64, "small" if cifar else "large")
    expected = {key: tensor for key, tensor in published(name, value, cifar=cifar, heads=False).items() if key in state or not key.endswith("num_batches_tracked")}
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    if name != "resnet18" and make is not torchvision_old: return
    network = network_from_checkpoint(tmp_path/"weights.pth", classes=5)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.backbone.state_dict().items() if key in expected)
    assert network.padding == (2 if cifar else None) and network.backbone.conv1.padding == ((2, 2) if cifar else (3, 3))
    assert network.head.weight.shape[0] == 5 and network.about["method"] == layout and not network.training

@pytest.mark.parametrize("make, layout", [(moco_v2, "moco-v2"), (moco_v3, "moco-v3"), (dino_full, "dino"), (solo_cifar, "solo-learn"), (solo_old, "solo-learn")])
def test_branches(tmp_path, make, layout):
    torch.save(make(), tmp_path/"weights.pth")
    for branch, value in [("online", ONLINE), ("ema", EMA)]: assert read_checkpoint(tmp_path/"weights.pth", layout, branch)[0]["conv1.weight"].flatten()[0] == value

def test_explicit_plain_layouts(tmp_path):
    torch.save(dino_backbone(), tmp_path/"weights.pth")
    for layout in "dino", "timm", "torchvision", "swav": assert read_checkpoint(tmp_path/"weights.pth", layout)[1] == layout

def test_timm_safetensors_and_other_families(tmp_path):
    import timm
    from safetensors.torch import save_file
    model = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    save_file(model.state_dict(), tmp_path/"vit.safetensors")
    network = network_from_checkpoint(tmp_path/"vit.safetensors", Architecture("vit_tiny_patch16_224"), 10, size=32, layout="timm")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(network.backbone(images), model.forward_head(model.forward_features(images), pre_logits=True))

def test_solo_learn_padding_survives_saving(tmp_path):
    theirs = torchvision.models.resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, padding=2, bias=False), nn.Identity(), nn.Identity()
    torch.save({"state_dict": prefixed("backbone.", theirs.state_dict())}, tmp_path/"solo.ckpt")
    save_network(tmp_path/"ours.safetensors", network_from_checkpoint(tmp_path/"solo.ckpt", classes=10))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_network(tmp_path/"ours.safetensors").backbone(images), theirs.eval()(images))

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")

class Options:
    "Stands for the configuration objects that training scripts store."

def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": published(), "callback": Evil(tmp_path/"owned")}, tmp_path/"evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: needs \S*open .*python -c"): read_checkpoint(tmp_path/"evil.pth")
    assert not (tmp_path/"owned").exists()

def test_the_conversion_command_converts(tmp_path):
    import fractions
    torch.save({"state_dict": published(), "config": fractions.Fraction(1, 2)}, tmp_path/"odd.pth")
    with pytest.raises(UserError, match="fractions.Fraction") as error: read_checkpoint(tmp_path/"odd.pth")
    assert conversion(tmp_path/"odd.pth") in str(error.value)
    subprocess.run(conversion(tmp_path/"odd.pth").replace("python", sys.executable, 1), shell=True, check=True, timeout=60)
    assert read_checkpoint(tmp_path/"odd.tensors.pth")[1] == "torchvision"

@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_cut_short(tmp_path, legacy):
    torch.save(build(TINY, 2).backbone.state_dict(), tmp_path/"whole.pth", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path/"whole.pth").read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path/"short.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match="short.pth: not readable") as error: read_checkpoint(tmp_path/"short.pth")
        assert "\n" not in str(error.value)
    (tmp_path/"short.pth").write_text("<html>404</html>")
    with pytest.raises(UserError, match="short.pth: not readable"): read_checkpoint(tmp_path/"short.pth")
    with pytest.raises(UserError, match="no such file"): read_checkpoint(tmp_path/"none.pth")

def test_unknown_and_wrong_layouts(tmp_path):
    path = tmp_path/"w.pth"
    torch.save(prefixed("trunk.", published()), path)
    with pytest.raises(UserError, match=r"w.pth: no known layout; it has trunk.conv1.weight.* and lacks encoder_q\..*conv1.weight"): read_checkpoint(path)
    torch.save(moco_v2(), path)
    with pytest.raises(UserError, match=r"not the layout moco-v3; it has encoder_q.*lacks base_encoder"): read_checkpoint(path, "moco-v3")
    with pytest.raises(UserError, match="did you mean 'moco-v"): read_checkpoint(path, "moco-v4")
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"): read_checkpoint(path)
    torch.save({"state_dict": prefixed("module.encoder_q.", published())}, path)
    with pytest.raises(UserError, match="lacks encoder_k"): read_checkpoint(path, branch="ema")
    torch.save(published(), path)
    with pytest.raises(UserError, match="no averaged one"): read_checkpoint(path, branch="ema")

def test_weights_of_another_architecture(tmp_path):
    path = tmp_path/"w.pth"
    torch.save(published("resnet18"), path)
    for architecture, word in [(Architecture("resnet18", 64, "small"), "conv1.weight is .64, 3, 7, 7. and not .64, 3, 3, 3."), (Architecture("resnet34", 64, "large"), "lacking"), (Architecture("resnet18", 32, "large"), "shapes differ")]:
        with pytest.raises(UserError, match=word) as error: network_from_checkpoint(path, architecture)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    torch.save({k: v for k, v in published("resnet18").items() if "running" not in k}, path)
    with pytest.raises(UserError, match="running_mean"): network_from_checkpoint(path)
    torch.save({k: v for k, v in published("resnet18").items() if not k.startswith("layer4.1")}, path)
    with pytest.raises(UserError, match="w.pth: not a ResNet"): network_from_checkpoint(path)


# Bad input

@pytest.mark.parametrize("architecture, size, word", [
    (Architecture("resnet19"), 32, "did you mean 'resnet18'"), (Architecture("convnett"), 32, "did you mean 'convnet'"), (Architecture("resnet18", 7), 32, "even width"),
    (Architecture("resnet18", 0), 32, "even width"), (Architecture("resnet18", stem="smal"), 32, "did you mean 'small'"), (Architecture("convnet", 8, norm="layer"), 32, "norm"),
    (Architecture("convnet", 8, depth=5), 16, "halved 4 times"), (Architecture("convnet", 8, depth=0), 16, "depth 0"), (Architecture("vit", 0), 16, "width 0: a vit"), (Architecture("vit", 4, depth=0), 16, "depth 0: a vit"),
    (Architecture("vit", 4), 30, "a multiple of 8"), (Architecture("vit", 4), 3, "a multiple of 8"), (Architecture("vgg11_bn", 0), 16, "width 0: a VGG"), (Architecture("vgg11_b"), 16, "did you mean 'vgg11_bn'"),
    (Architecture("vit_tiny_patch16_224"), 8, "cannot take images of 8 pixels")])
def test_impossible_networks(architecture, size, word):
    with pytest.raises(UserError, match=word): build(architecture, 10, size=size)

def test_network_without_batchnorm():
    assert len(require_batchnorm(build(TINY, 2), "recover")) == 20
    for architecture in Architecture("convnet", 4, norm="instance"), Architecture("vit_tiny_patch16_224"), Architecture("vit", 4), Architecture("vgg11", 4):
        with pytest.raises(UserError, match=f"recover: {architecture.name} has no BatchNorm"): require_batchnorm(build(architecture, 2), "recover")
    with pytest.raises(UserError): require_batchnorm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "recover")

NARROW = """
import torch
from scdd.models import build
from scdd.recipes import Architecture
for seed in range(20):
    network = build(Architecture(width=8), 10, seed, channels=1, size=64).to(memory_format=torch.channels_last)
    for count in (1, 29): network(torch.rand(count, 1, 64, 64).contiguous(memory_format=torch.channels_last)).sum().backward()
"""
def test_a_narrow_network_stays_within_its_memory():  # oneDNN's strided 1×1 convolution does not: the process died in about every second run
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

def test_a_projection_gives_the_numbers_of_the_strided_convolution():
    network = build(Architecture(width=8), 10, channels=1, size=32).double(); x = torch.rand(3, 8, 32, 32, dtype=torch.float64, requires_grad=True)
    layer = network.backbone.layer2[0].downsample[0]; plain = nn.Conv2d(8, 16, 1, stride=2, bias=False).double(); plain.load_state_dict(layer.state_dict())
    assert type(layer) is not nn.Conv2d and type(build(Architecture(width=16), 10).backbone.layer2[0].downsample[0]) is nn.Conv2d
    seen = [one(x) for one in (layer, plain)]; torch.testing.assert_close(seen[0], seen[1])
    first, second = (torch.autograd.grad((made**2).sum(), x)[0] for made in seen); torch.testing.assert_close(first, second)
