"Augmentation against torchvision, replay, independence of the images, gradients, and bad input."
import inspect
import pytest, torch
import torchvision.transforms.functional as torchvision_functional
from torchvision.transforms import RandomResizedCrop
from scdd import augment
from scdd.augment import (ALL_KINDS, OPERATIONS, apply_student, apply_view, augment_supervised, beta, blur, blur_sigmas, chosen, color_jitter, crop, crop_boxes,
                          draw_mix, draw_student, draw_view, family, grey, grey_of, jitter_factors, mix, mix_labels, padded_crop_boxes, roll,
                          roll_shifts, solarize, turn_hue, view_settings, views)
from scdd.device import generator
from scdd.files import UserError, read_tensors, write_tensors
from scdd.recipes import Train

STILL = torch.tensor([1, 1, 1, 0.0])

def pictures(count=12, channels=3, size=32): return torch.rand(count, channels, size, size, generator=generator("cpu", "pictures", count, channels, size))
def whole(count, size): return torch.tensor([[0.0, 0, size, size]]).expand(count, 4)

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_parameters_that_ask_for_nothing_change_nothing(size, channels):
    images = pictures(6, channels, size)
    none, zero = torch.zeros(6, dtype=torch.bool), torch.zeros(6)
    for changed in (crop(images, whole(6, size), size, none), color_jitter(images, STILL.expand(6, 4)), grey(images, none), blur(images, zero),
                    solarize(images, torch.full((6,), 2.0)), roll(images, torch.zeros(6, 2, dtype=torch.long)), mix(images, {})):
        assert torch.equal(changed, images)

def test_identity_crop_of_a_side_that_is_no_power_of_two():
    images = pictures(2, 3, 224)
    torch.testing.assert_close(crop(images, whole(2, 224)), images, atol=1e-4, rtol=0)

@pytest.mark.parametrize("result", [16, 32, 48])
def test_crop_equals_torchvision(result):
    images, boxes = pictures(24), crop_boxes(24, 32, generator=generator("cpu", 0))
    for image, box, ours in zip(images, boxes.int().tolist(), crop(images, boxes, result)):
        left, top, right, bottom = box
        theirs = torchvision_functional.resized_crop(image, top, left, bottom - top, right - left, [result, result], antialias=False)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

def test_padded_crop_equals_pad_and_slice():
    images, boxes = pictures(24), padded_crop_boxes(24, 32, 4, generator("cpu", 0))
    padded = torch.nn.functional.pad(images, (4,) * 4)
    expected = torch.stack([image[:, top + 4:top + 36, left + 4:left + 36] for image, (left, top, _, _) in zip(padded, boxes.int().tolist())])
    assert torch.equal(crop(images, boxes), expected)
    assert boxes[:, 0].min() == -4 and boxes[:, 0].max() == 4

def test_flip_mirrors_the_crop():
    images, boxes = pictures(), crop_boxes(12, 32, generator=generator("cpu", 0))
    which = torch.arange(12) % 2 == 0
    plain, flipped = crop(images, boxes), crop(images, boxes, None, which)
    assert torch.equal(flipped[::2], plain[::2].flip(3)) and torch.equal(flipped[1::2], plain[1::2])

def test_boxes_are_distributed_as_torchvision_draws_them():
    boxes = crop_boxes(4000, 32, (0.08, 1.0), generator=generator("cpu", 0))
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.zeros(1, 32, 32), [0.08, 1.0], [3/4, 4/3]) for _ in range(4000)]).float()
    ours = torch.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.6, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.5, rtol=0)

def test_a_ratio_that_never_fits_gives_the_whole_image():
    assert torch.equal(crop_boxes(5, 32, (1.0, 1.0), (3.0, 4.0), generator("cpu", 0)), whole(5, 32))

@pytest.mark.parametrize("column, name, values", [(0, "brightness", (0.0, 0.6, 1.4)), (1, "contrast", (0.0, 0.6, 1.4)),
                                                  (2, "saturation", (0.0, 0.6, 1.4)), (3, "hue", (-0.5, -0.1, 0.1, 0.33, 0.5))])
def test_each_colour_operation_equals_torchvision(column, name, values):
    images = pictures()
    images[0] = 0.5; images[1, :, :8] = 1; images[2, :, :8] = 0   # grey, white and black have no hue
    for value in values:
        factors = STILL.repeat(12, 1); factors[:, column] = value
        theirs = getattr(torchvision_functional, f"adjust_{name}")(images, value)
        torch.testing.assert_close(color_jitter(images, factors), theirs, atol=2e-5, rtol=0)

def test_each_image_has_its_own_order():
    images = pictures()
    factors, order = jitter_factors(12, probability=1.0, generator=generator("cpu", 0))
    assert len(order.unique(dim=0)) > 1
    adjust = [getattr(torchvision_functional, f"adjust_{name}") for name in ("brightness", "contrast", "saturation")]
    for image, factor, steps, ours in zip(images, factors.tolist(), order.tolist(), color_jitter(images, factors, order)):
        for step in steps: image = adjust[step](image, factor[step])
        torch.testing.assert_close(ours, torchvision_functional.adjust_hue(image, factor[3]), atol=2e-5, rtol=0)

def test_grey_blur_and_solarize_equal_torchvision():
    images, width = pictures(6), torch.linspace(0.2, 2, 6)
    torch.testing.assert_close(grey(images, torch.ones(6, dtype=torch.bool)), torchvision_functional.rgb_to_grayscale(images, 3))
    for taps in (3, 7):
        theirs = torch.stack([torchvision_functional.gaussian_blur(image, [taps, taps], [sigma] * 2) for image, sigma in zip(images, width.tolist())])
        torch.testing.assert_close(blur(images, width, taps), theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(solarize(images, torch.full((6,), 0.5)), torchvision_functional.solarize(images, 0.5))

def test_roll_equals_torch():
    images, shifts = pictures(), roll_shifts(12, 5, generator("cpu", 0))
    assert torch.equal(roll(images, shifts), torch.stack([torch.roll(image, tuple(shift), (1, 2)) for image, shift in zip(images, shifts.tolist())]))
    assert torch.equal(roll(images, shifts[:1]), torch.roll(images, tuple(shifts[0].tolist()), (2, 3)))

def test_the_weight_of_cutmix_is_the_area_left():
    own = torch.stack([torch.ones(1, 32, 32), torch.zeros(1, 32, 32)])
    for step in range(50):
        drawn = {**draw_mix("cutmix", 2, 32, 1.0, generator("cpu", step)), "permutation": torch.tensor([1, 0])}
        torch.testing.assert_close(mix(own, drawn)[0].mean(), drawn["weight"])
        torch.testing.assert_close(mix_labels(torch.eye(2), drawn)[0, 0], drawn["weight"])

def test_mixup_is_the_weighted_sum():
    images, drawn = pictures(), draw_mix("mixup", 12, 32, 0.8, generator("cpu", 0))
    expected = drawn["weight"] * images + (1 - drawn["weight"]) * images[drawn["permutation"]]
    torch.testing.assert_close(mix(images, drawn), expected)
    assert torch.equal(mix(images, {**drawn, "weight": torch.tensor(1.0)}), images)

@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_weights_follow_the_beta_distribution(alpha):
    from scipy import stats
    chance = generator("cpu", alpha)
    drawn = torch.stack([beta(alpha, chance) for _ in range(1500)]).numpy()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3

@pytest.mark.parametrize("method", ["simclr", "mocov2", "mocov3", "swav", "dino"])
@pytest.mark.parametrize("name, channels, size", [("digits", 1, 16), ("cifar100", 3, 32), ("tiny-imagenet", 3, 64)])
def test_views(method, name, channels, size):
    images = (pictures(8, channels, size) * 255).byte()
    made, again = (views(method, images, name, generator("cpu", 0, "views", 3), local_crops=2) for _ in range(2))
    assert [view.shape[-1] for view in made] == [size, size, size // 2, size // 2]
    assert all(torch.equal(one, two) for one, two in zip(made, again))
    assert all(view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1 for view in made)
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], views(method, images, name, generator("cpu", 0, "views", 4))[0])

def test_copies_of_one_image_come_out_different():
    made = views("simclr", pictures(1).expand(16, -1, -1, -1), "cifar100", generator("cpu", 0))[0]
    assert len(made.flatten(1).unique(dim=0)) == 16

def test_an_image_does_not_depend_on_its_neighbours():
    images, drawn = pictures(40, 3, 64), draw_view(40, 64, view_settings("tiny-imagenet", "dino"), generator("cpu", 0), which=1)
    together = apply_view(images, drawn)
    for i in (0, 17, 39):
        alone = apply_view(images[i:i + 1], {name: value[i:i + 1] for name, value in drawn.items()})
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)
    torch.testing.assert_close(apply_view(images, drawn, at_once=1), together, atol=1e-6, rtol=0)

@pytest.mark.parametrize("mix_kind", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("crop_kind", ["none", "pad", "resized"])
def test_a_student_batch_is_stored_and_replayed_bit_exactly(tmp_path, crop_kind, mix_kind):
    images, train = (pictures(16) * 255).byte(), Train(crop=crop_kind, mix=mix_kind)
    drawn = draw_student(16, 32, train, "cifar100", generator("cpu", 0, "student", 1))
    write_tensors(tmp_path/"drawn.safetensors", drawn)
    stored, _ = read_tensors(tmp_path/"drawn.safetensors")
    assert stored.keys() == drawn.keys() and torch.equal(apply_student(images, stored), apply_student(images, drawn))
    assert ("crop" in drawn) == (crop_kind != "none") and ("weight" in drawn) == (mix_kind != "none") and "flip" in drawn

# ---- DSA's changes

DSA, KINDS = Train(augment="dsa"), ALL_KINDS.split("_")

def seen(kind, chance, images=None, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3)):
    "One change with known numbers, as a student sees it."
    images = pictures(4) if images is None else images
    return apply_student(images, {"kind": torch.tensor(KINDS.index(kind)), "chance": torch.tensor([chance]).expand(len(images), 3), "mean": torch.tensor(mean), "std": torch.tensor(std)})

def framed(images, mean=(0.5, 0.4, 0.3)): return images - torch.tensor(mean).view(-1, 1, 1)   # what 0 means to torchvision is the mean grey

def test_a_turn_equals_torchvision():
    images, mean = pictures(4), torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)
    for chance, degrees in ((1.0, 15.0), (0.0, -15.0), (0.75, 7.5)):
        theirs = torchvision_functional.rotate(framed(images), degrees, torchvision_functional.InterpolationMode.BILINEAR) + mean
        torch.testing.assert_close(seen("rotate", (chance, 0.0, 0.0))[:, :, 7:-7, 7:-7], theirs[:, :, 7:-7, 7:-7], atol=1e-4, rtol=0)

def test_a_stretch_equals_torchvision():
    images, mean = pictures(4)[:, :, :, :], torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)   # 1.2 of the image is shown: all of it, smaller
    theirs = torchvision_functional.affine(framed(images), 0.0, [0, 0], 1 / 1.2, [0.0], torchvision_functional.InterpolationMode.BILINEAR) + mean
    torch.testing.assert_close(seen("scale", (1.0, 1.0, 0.0))[:, :, 4:-4, 4:-4], theirs[:, :, 4:-4, 4:-4], atol=1e-4, rtol=0)
    wide = seen("scale", (1.0, (1 - 1 / 1.2) / (1.2 - 1 / 1.2), 0.0))                      # width alone: columns change, rows stay rows
    flat = images.mean(3, keepdim=True).expand_as(images)
    torch.testing.assert_close(seen("scale", (1.0, (1 - 1 / 1.2) / (1.2 - 1 / 1.2), 0.0), flat)[:, :, :, 8:-8], flat[:, :, :, 8:-8], atol=1e-4, rtol=0)
    assert not torch.allclose(wide, images, atol=1e-2)

def test_a_shift_a_cut_and_a_mirror_by_hand():
    images, mean = pictures(4), torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)
    moved = seen("crop", (1 - 2**-24, 0.0, 0.0))                                           # an eighth of 32: 4 down, 4 to the left
    torch.testing.assert_close(moved[:, :, 4:, :-4], images[:, :, :-4, 4:]); torch.testing.assert_close(moved[:, :, :4], mean.expand(4, 3, 4, 32))
    cut = seen("cutout", (0.5, 0.0, 0.0)); expected = images.clone()                       # centre at row 16 and column 0, 16 pixels wide and high
    expected[:, :, 8:24, :8] = mean
    torch.testing.assert_close(cut, expected)
    torch.testing.assert_close(seen("flip", (0.49, 0.0, 0.0)), torchvision_functional.hflip(images)); torch.testing.assert_close(seen("flip", (0.5, 0.0, 0.0)), images)

def test_colour_is_counted_in_deviations():
    images, mean, std = pictures(4), torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1), torch.tensor([0.25, 0.2, 0.3]).view(-1, 1, 1)
    torch.testing.assert_close(seen("color", (0.9, 0.5, 0.5)), images + 0.4 * std)         # brightness alone
    normal = (images - mean) / std; light = normal.mean(1, keepdim=True)
    torch.testing.assert_close(seen("color", (0.5, 0.0, 0.5)), light * std + mean)         # no saturation: each pixel the mean of its channels
    level = normal.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(seen("color", (0.5, 0.5, 0.0)), (level + 0.5 * (normal - level)) * std + mean)

def test_one_kind_for_the_batch_and_numbers_for_each_image():
    draws = [draw_student(8, 32, DSA, "cifar100", generator("cpu", step)) for step in range(200)]
    counts = torch.stack([one["kind"] for one in draws]).bincount(minlength=6)
    assert counts.min() > 15 and len(counts) == 6 and all(len(one["chance"].unique()) == 24 for one in draws) and set(draws[0]) == {"kind", "chance"}
    again = draw_student(8, 32, DSA, "cifar100", generator("cpu", 3)); assert all(torch.equal(draws[3][name], again[name]) for name in again)
    assert {KINDS[draw_student(1, 16, DSA, "digits", generator("cpu", step))["kind"]] for step in range(100)} == set(KINDS) - {"flip"}

def test_a_change_of_dsa_is_stored_and_replayed_bit_exactly(tmp_path):
    class Data: mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    images = (pictures(16) * 255).byte()
    for step in range(12):
        drawn = draw_student(16, 32, DSA, "cifar100", generator("cpu", 0, "student", step)) | grey_of(Data, DSA, "cpu")
        write_tensors(tmp_path/"drawn.safetensors", drawn); stored, _ = read_tensors(tmp_path/"drawn.safetensors")
        assert stored.keys() == drawn.keys() and torch.equal(apply_student(images, stored), apply_student(images, drawn))
        alone = apply_student(images[5:6], drawn | {"chance": drawn["chance"][5:6]}); torch.testing.assert_close(alone[0], apply_student(images, drawn)[5])
    assert grey_of(Data, Train(), "cpu") == {}

@pytest.mark.parametrize("kind", KINDS)
def test_slopes_of_dsas_changes(kind):
    images, chance = pictures(3, 1, 8).double().requires_grad_(), torch.rand(3, 3, generator=generator("cpu", kind), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda some: OPERATIONS[kind](some, chance), images)

def test_digits_are_never_mirrored_and_keep_their_colour():
    assert "flip" not in draw_student(8, 16, Train(flip=True), "digits", generator("cpu", 0))
    for method in ("supervised", "simclr", "mocov2", "mocov3", "swav", "dino"):
        settings = view_settings("digits", method)
        assert not settings.flip and settings.grey == 0 and settings.strength[2:] == (0, 0) and not any(settings.solarize)
    column = torch.zeros(8, 1, 16, 16); column[..., :8] = 1
    made = augment_supervised(column, "digits", generator("cpu", 0))
    assert (made[..., 2:6].mean((1, 2, 3)) > made[..., 10:14].mean((1, 2, 3))).all()

@pytest.mark.parametrize("crop_kind, mix_kind", [("pad", "mixup"), ("resized", "cutmix"), ("none", "none")])
def test_gradients_agree_with_finite_differences(crop_kind, mix_kind):
    images = pictures(3, 1, 8).double().requires_grad_()
    drawn = draw_student(3, 8, Train(crop=crop_kind, mix=mix_kind, crop_padding=1), "cifar100", generator("cpu", 1))
    # the crop works in float32, so the differences are taken wide; it is linear in the images, so they stay exact
    numbers = apply_student(images, drawn).square().sum()
    gradient, = torch.autograd.grad(numbers, images)
    direction = pictures(3, 1, 8).double() - 0.5
    up, down = (apply_student((images + sign * 1e-2 * direction).detach(), drawn).square().sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-2, rtol=1e-3, atol=1e-4)

def test_gradients_flow_through_roll_and_colour():
    images = pictures(4).requires_grad_()
    color_jitter(blur(roll(images, roll_shifts(4, 3, generator("cpu", 0))), torch.ones(4)), *jitter_factors(4, generator=generator("cpu", 0))).sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).any()

def test_low_precision_and_memory_format():
    images, drawn = pictures(8), draw_view(8, 32, view_settings("tiny-imagenet", "dino"), generator("cpu", 0))
    exact = apply_view(images, drawn)
    with torch.autocast("cpu", torch.bfloat16): torch.testing.assert_close(apply_view(images, drawn), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(apply_view(images.to(memory_format=torch.channels_last), drawn), exact, atol=1e-5, rtol=0)
    small = {name: value for name, value in drawn.items() if name != "threshold"}
    low = apply_view(images.bfloat16(), small)
    assert low.dtype == torch.bfloat16 and (low.float() - exact).abs().mean() < 0.02

def test_drawing_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    views("dino", pictures(4), "cifar100", generator("cpu", 0), 1); draw_student(4, 32, Train(), "cifar100", generator("cpu", 0)); draw_student(4, 32, DSA, "cifar100", generator("cpu", 0))
    assert torch.equal(torch.random.get_rng_state(), before)

def test_families():
    assert [family(name) for name in ("digits", "cifar10", "cifar100", "tiny-imagenet", "imagenet1k")] == ["digits", "small", "small", "medium", "large"]
    assert [family("/somewhere/birds", size) for size in (28, 64, 224)] == ["small", "medium", "large"]
    assert family("imagenet1k", 64) == "medium" and family("digits", 32) == "digits"

def test_bad_input_is_named():
    with pytest.raises(UserError, match="cutmx.*did you mean 'cutmix'"): draw_mix("cutmx", 4, 32, 1.0, generator("cpu", 0))
    with pytest.raises(UserError, match="simclrr.*did you mean 'simclr'"): view_settings("cifar100", "simclrr")
    with pytest.raises(UserError, match="area"): crop_boxes(4, 32, (0.0, 1.0), generator=generator("cpu", 0))

def test_public_functions_are_documented():
    for name in augment.__all__:
        if inspect.isfunction(getattr(augment, name)): assert getattr(augment, name).__doc__, name
