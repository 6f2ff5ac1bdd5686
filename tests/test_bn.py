"BatchNorm statistics: against autograd, against numpy, against the public two-pass way; and faults."
import numpy as np, pytest, torch
from scdd.bn import batch_statistics, bn_gaps, bn_loss, combine, matching, moments, running_statistics
from scdd.files import UserError
from scdd.models import bn_layers, build
from scdd.recipes import Architecture

def tiny(name="resnet18", width=4): return build(Architecture(name, width=width), 10, channels=1, size=16, mean=[0.5], std=[0.5]).eval()
def hooks(network): return sum(len(layer._forward_pre_hooks) for _, layer in bn_layers(network))

def two_pass(x):
    "What DeepInversion, SRe2L and SC-DD compute."
    return x.mean((0, 2, 3)), x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)

@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_equal_numpy(kind, layout):
    x = (torch.randn(7, 5, 6, 4) * 2 + 3).to(kind).to(memory_format=layout)
    mean, var = moments(x); exact = x.double().numpy()
    assert mean.dtype == var.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-5); np.testing.assert_allclose(var, exact.var((0, 2, 3)), rtol=1e-5)

def test_gradients_equal_finite_differences():
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moments, (x,)) and torch.autograd.gradgradcheck(moments, (x,))

@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradient_equals_that_of_the_two_pass_way(kind, tolerance):
    x = torch.randn(8, 6, 5, 5).add(2).to(kind).requires_grad_(); exact = x.detach().double().requires_grad_()
    for way, where in (moments, x), (two_pass, exact): mean, var = way(where); (mean.square().sum() + var.square().sum()).backward()
    assert x.grad.dtype == kind and (x.grad - exact.grad).norm() < tolerance * exact.grad.norm()

@pytest.mark.parametrize("form", ["paper", "normalized"])
def test_image_gradient_of_the_loss_equals_finite_differences(form):
    network = tiny(width=2).double(); images = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    def loss(images):
        with matching(network) as seen: network(images)
        return bn_loss(seen, network, 10.0, form)
    gradient, = torch.autograd.grad(loss(images), images); direction = torch.randn_like(images)
    slope = (loss(images + 1e-6 * direction) - loss(images - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-4, atol=1e-6)

def test_loss_is_the_formula():
    network = tiny(); images = torch.rand(6, 1, 16, 16); inputs = []
    handles = [layer.register_forward_hook(lambda layer, given, out: inputs.append((given[0], layer))) for _, layer in bn_layers(network)]
    with matching(network) as seen: network(images)
    [handle.remove() for handle in handles]
    paper = normalized = 0
    for i, (x, layer) in enumerate(inputs):
        mean, var = two_pass(x); weight = 10 if i == 0 else 1; scale = layer.running_var + 1e-5
        paper += weight * ((mean - layer.running_mean).norm() + (var - layer.running_var).norm())
        normalized += weight * (((mean - layer.running_mean) / scale.sqrt()).square().mean().sqrt() + ((var - layer.running_var) / scale).square().mean().sqrt())
    torch.testing.assert_close(bn_loss(seen, network), paper, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bn_loss(seen, running_statistics(network), form="normalized"), normalized / (len(inputs) + 9), rtol=1e-5, atol=1e-6)

def test_no_gap_no_nan():
    network = tiny(); stored = [(mean, var) for _, mean, var in running_statistics(network)]
    stored = [(mean.clone().requires_grad_(), var.clone().requires_grad_()) for mean, var in stored]
    for form in "paper", "normalized":
        loss = bn_loss(stored, network, form=form); loss.backward()
        assert loss == 0 and all(torch.isfinite(t.grad).all() for pair in stored for t in pair)

def test_hooks_go_also_when_the_block_fails():
    network = tiny()
    with pytest.raises(RuntimeError, match="in the middle"):
        with matching(network): assert hooks(network) == 20; raise RuntimeError("in the middle")
    assert hooks(network) == 0

def test_statistics_are_of_the_last_forward_pass_and_running_ones_stay():
    network = tiny(); first, second = torch.rand(4, 1, 16, 16), torch.rand(4, 1, 16, 16)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with matching(network) as seen: network(first); network(second)
    for (mean, var), (_, wanted_mean, wanted_var) in zip(seen, batch_statistics(network, second, "float32"), strict=True):
        torch.testing.assert_close(mean, wanted_mean); torch.testing.assert_close(var, wanted_var)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

def test_train_mode_running_statistics_are_what_we_see():
    network = tiny(width=2); images = torch.rand(6, 1, 16, 16)
    for _, layer in bn_layers(network): layer.momentum = 1.0
    with matching(network.train()) as seen: network(images)
    for (mean, var), (_, running_mean, running_var), (name, layer) in zip(seen, running_statistics(network), bn_layers(network)):
        torch.testing.assert_close(mean, running_mean, rtol=1e-4, atol=1e-5)
        if name == "backbone.bn1": torch.testing.assert_close(var, running_var * (1 - 1 / (6 * 16 * 16)), rtol=1e-4, atol=1e-5)

def test_combine_is_exact_and_carries_gradients():
    x = torch.randn(11, 3, 4, 4, dtype=torch.float64, requires_grad=True); parts = x.split([5, 4, 2])
    mean, var = combine([(len(part), *moments(part)) for part in parts]); wanted = moments(x)
    torch.testing.assert_close((mean, var), wanted)
    one, = torch.autograd.grad(mean.norm() + var.norm(), x); two, = torch.autograd.grad(wanted[0].norm() + wanted[1].norm(), x)
    torch.testing.assert_close(one, two)

def test_works_on_a_backbone_and_on_float32_beside_bfloat16():
    network = tiny().backbone; images = torch.randn(8, 1, 16, 16)
    exact, rough = (batch_statistics(network, images, precision) for precision in ("float32", "bfloat16"))
    gap = max(float(((a[1] - b[1]) / a[2].sqrt()).abs().max()) for a, b in zip(exact, rough))
    assert 0 < gap < 0.1 and rough[0][1].dtype == torch.float32

def test_faults():
    with pytest.raises(UserError, match="no BatchNorm"): running_statistics(build(Architecture("convnet", width=8, norm="instance"), 10))
    with pytest.raises(UserError, match="no BatchNorm"):
        with matching(torch.nn.Linear(2, 2)): pass
    with pytest.raises(UserError, match="paper or normalized"): bn_gaps([], tiny(), form="papr")
    with pytest.raises(ValueError): bn_loss([(torch.zeros(4), torch.ones(4))], tiny())
