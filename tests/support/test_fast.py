"""Every subclass of fast.py against its plain class: values and gradients."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from support import extension, fast


def randomised(module):
    """Parameters of a block that all differ, so that a swapped one shows."""
    if not isinstance(module, model.UNet | model.UniversalModel):      # those stay well scaled
        for p in module.parameters():
            nn.init.normal_(p, mean=0.1, std=0.3)
    return module


def swin_block(shifted):
    return model.SwinBlock(6, 2, shifted)


def extended_model():
    network = model.UniversalModel(model.UNet(width=8), 5)
    return extension.extend(network, EXTENDED_W[:2]).eval()


EXTENDED_W = torch.arange(20.).view(4, 5) % 7 - 3      # two new classes, and two others
# name: (a plain module, its inputs or their sizes)
CASES = {
    "Conv, single small input": (lambda: model.Conv(5, 4), [(1, 5, 6, 5, 4)]),
    "Conv, odd depth": (lambda: model.Conv(5, 4), [(1, 5, 7, 5, 4)]),
    "Conv, batch": (lambda: model.Conv(5, 4), [(2, 5, 6, 5, 4)]),
    "Conv, 1x1x1": (lambda: model.Conv(5, 4, kernel=1, bias=False), [(1, 5, 6, 5, 4)]),
    "UpConv": (lambda: model.UpConv(3, 4), [(2, 3, 2, 3, 4)]),
    "UpConv, no bias": (lambda: model.UpConv(3, 4, bias=False), [(1, 3, 2, 3, 4)]),
    "GroupNormReLU": (lambda: model.GroupNormReLU(32), [(2, 32, 5, 6, 7)]),
    "GroupNormReLU, few channels": (lambda: model.GroupNormReLU(6), [(2, 6, 5, 6, 7)]),
    "ConvNormReLU": (lambda: model.ConvNormReLU(3, 4), [(2, 3, 5, 6, 7)]),
    "ResBlock": (lambda: model.ResBlock(4, 4), [(2, 4, 5, 6, 7)]),
    "ResBlock, other width": (lambda: model.ResBlock(3, 4), [(2, 3, 5, 6, 7)]),
    "WindowAttention": (lambda: model.WindowAttention(6, 2), [(5, 8, 6)]),
    "SwinBlock": (lambda: swin_block(False), [(2, 9, 7, 15, 6)]),
    "SwinBlock, shifted": (lambda: swin_block(True), [(2, 9, 7, 15, 6)]),
    "SwinBlock, shifted, whole windows": (lambda: swin_block(True), [(1, 14, 14, 7, 6)]),
    "SwinBlock, smaller than a window": (lambda: swin_block(True), [(1, 4, 8, 3, 6)]),
    "UNet": (lambda: model.UNet(width=8), [(1, 1, 32, 32, 48)]),
    "UniversalModel": (lambda: model.UniversalModel(model.UNet(width=8), 5),
                       [(2, 1, 32, 32, 32), (3, 5)]),
    "ExtendedModel": (extended_model, [(2, 1, 32, 32, 32), EXTENDED_W[[0, 2, 3, 1]]]),
}
WHOLE_NETWORKS = ("UNet", "UniversalModel", "ExtendedModel")


def parts_of(name, seed):
    """-> (a plain module in float32, its inputs in float64)."""
    torch.manual_seed(seed)
    make, given = CASES[name]
    plain = randomised(make())
    return plain, [x.double() if isinstance(x, torch.Tensor) else torch.randn(
        x, dtype=torch.double) for x in given]


def run(module, inputs, gradients=True):
    """-> outputs, and the gradients of inputs and parameters for a fixed random weighting."""
    more = (None,) if isinstance(module, model.WindowAttention) else ()
    inputs = [x.clone().requires_grad_(gradients) for x in inputs]
    with torch.set_grad_enabled(gradients):
        out = module(*inputs, *more)
    outputs = list(out) if isinstance(out, tuple) else [out]
    if not gradients:
        return outputs, []
    torch.manual_seed(7)
    weights = [torch.randn(o.shape, dtype=torch.double).to(o) for o in outputs]
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [o.detach() for o in outputs], [g for g in grads if g is not None]


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-9)).item()


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of every loop even for small inputs, the last of them shorter."""
    for sizes in (fast.NORM_BLOCK, fast.HEAD_BLOCK, fast.ATTENTION_BLOCK):
        monkeypatch.setitem(sizes, "cpu", 1000)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_plain_forms(name, small_blocks, monkeypatch):
    """In float64 to 1e-8, so it is the same formula. In float32 values to 1e-5; what depends on
    the sign of activations, as gradients of whole networks do, is compared in float64 only. On a
    device that is not named in `devices`, it is the plain form bit for bit."""
    plain, inputs = parts_of(name, 1)
    quick = fast.accelerate(copy.deepcopy(plain))
    values, grads = run(copy.deepcopy(plain).double(), inputs)
    for gradients in (True, False):
        got, got_grads = run(copy.deepcopy(quick).double(), inputs, gradients)
        for a, b in zip([*got, *got_grads], [*values, *grads[:len(got_grads)]], strict=True):
            assert relative(a, b) < 1e-8 or b.norm() < 1e-8
    got, got_grads = run(quick, [x.float() for x in inputs])
    assert max(relative(a, b) for a, b in zip(got, values, strict=True)) < 1e-5
    if name not in WHOLE_NETWORKS:
        assert all(relative(a, b) < 1e-5 or b.norm() < 1e-3
                   for a, b in zip(got_grads, grads, strict=True))
    for each in fast.FAST.values():
        monkeypatch.setattr(each, "devices", ())
    quick.to(memory_format=torch.contiguous_format)
    (got, _), (want, _) = (run(form, [x.float() for x in inputs], gradients=False)
                           for form in (quick, plain))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in WHOLE_NETWORKS else [])
    for name in CASES])
def test_values_in_bf16_err_no_more_than_those_of_the_plain_form(name):
    """Under autocast, as train.py and infer.py compute."""
    plain, inputs = parts_of(name, 2)
    quick = fast.accelerate(copy.deepcopy(plain))
    want, _ = run(copy.deepcopy(plain).double(), inputs, gradients=False)
    errors = []
    for form in (plain, quick):
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = run(form, [x.float() for x in inputs], gradients=False)
        errors.append(max(relative(a, b) for a, b in zip(got, want, strict=True)))
    assert errors[1] < 1.5 * errors[0] + 0.004                 # 2^-8: one rounding


def test_every_subclass_has_a_case_above():
    """Swin UNETR as a whole is compared with MONAI in both forms in test_model.py."""
    tested = {name.split(",")[0] for name in CASES} | {"SwinUNETR"}
    assert tested == {plain.__name__ for plain in fast.FAST}
    for plain, quick in fast.FAST.items():
        assert plain in quick.__bases__ and quick.__doc__ and quick.devices


def test_accelerating_swaps_classes_and_nothing_else():
    network = model.build_model({"backbone": "swin_unetr", "feature_size": 12, "text_dim": 5})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert fast.accelerate(network) is network and isinstance(network, model.UniversalModel)
    kinds = {type(m) for m in network.modules()}
    assert not kinds & fast.FAST.keys() and fast.FastSwinBlock in kinds
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    fast.accelerate(network)                                   # a second time changes nothing
    assert {type(m) for m in network.modules()} == kinds


# ---- what a comparison with the plain form does not show -----------------------------------------
def test_norm_statistics_stay_exact_at_full_window_size():
    """Plain F.group_norm is off by 4e-4 to 1e-3 here; sums in slabs are not."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 96, 96, 96) * 2 + 5
    mean = x.double().mean((2, 3, 4), keepdim=True).float()
    variance = x.double().var((2, 3, 4), correction=0, keepdim=True)
    want = (x - mean) / (variance + 1e-5).sqrt().float()
    assert (fast.norm_act(x, slope=None) - want).abs().max() < 2e-5


def test_only_an_input_that_may_be_overwritten_is():
    """And never while gradients are recorded."""
    x = torch.randn(1, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    before = x.clone()
    fast.norm_act(x)
    weight = torch.ones(4, requires_grad=True)
    fast.norm_act(x, weight, overwrite=True)
    assert torch.equal(x, before)
    y = fast.norm_act(x, overwrite=True)
    assert y.data_ptr() == x.data_ptr() and torch.equal(y, x)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_are_those_of_finite_differences(masked, monkeypatch):
    monkeypatch.setitem(fast.ATTENTION_BLOCK, "cpu", 100)      # two windows at a time
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, 5, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 5, dtype=torch.double, requires_grad=True)
    mask = None
    if masked:                                                 # three windows a scan, two scans
        mask = torch.rand(3, 5, 5) > 0.6
        mask.diagonal(dim1=1, dim2=2).fill_(False)
    assert torch.autograd.gradcheck(fast._Attention.apply, (q, k, v, bias, mask))


def test_masked_attention_is_that_of_the_plain_block(monkeypatch):
    """Where windows are not grouped, as on a GPU, attention gets the plain block's mask."""
    monkeypatch.setattr(fast.FastSwinBlock, "devices", ())
    monkeypatch.setitem(fast.ATTENTION_BLOCK, "cpu", 10 ** 6)
    torch.manual_seed(0)
    plain = randomised(swin_block(True)).double()
    inputs = [torch.randn(2, 9, 7, 15, 6, dtype=torch.double)]
    quick = fast.accelerate(copy.deepcopy(plain))
    for a, b in zip(run(quick, inputs), run(plain, inputs), strict=True):
        assert all(relative(x, y) < 1e-10 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("least", [0, 10 ** 6])
@pytest.mark.parametrize("bias", [False, True])
def test_upsampling_and_convolution_composed_are_the_same_convolution(least, bias, monkeypatch):
    """Composed (least = 0) and not: values and all gradients, with a skip of another width. The
    border shows whether the bias of the upsampling ends where the map does."""
    monkeypatch.setattr(fast, "LEAST_VOXELS_PER_CHANNEL", least)
    torch.manual_seed(0)
    conv, up = model.Conv(5 + 3, 4).double(), model.UpConv(6, 5, bias=bias).double()
    x = torch.randn(2, 6, 2, 4, 3, dtype=torch.double, requires_grad=True)
    skip = torch.randn(2, 3, 4, 8, 6, dtype=torch.double, requires_grad=True)
    wanted = [x, skip, *conv.parameters(), *up.parameters()]
    want = F.conv3d(torch.cat([up(x), skip], 1), conv.weight, conv.bias, padding=1)
    weighting = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, wanted, weighting)
    got = fast.conv_of_upsampled(conv, up, x, skip)
    assert torch.allclose(got, want, atol=1e-12)
    grads = torch.autograd.grad(got, wanted, weighting)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize("least", [0, 10 ** 6])
def test_a_block_of_an_upsampled_map_and_a_skip_is_the_plain_block(least, monkeypatch):
    monkeypatch.setattr(fast, "LEAST_VOXELS_PER_CHANNEL", least)
    torch.manual_seed(0)
    plain, up = model.ResBlock(10, 5).double(), model.UpConv(6, 5, bias=False).double()
    x = torch.randn(1, 6, 4, 3, 5, dtype=torch.double)
    skip = torch.randn(1, 5, 8, 6, 10, dtype=torch.double)
    want = plain(torch.cat([up(x), skip], 1))
    got = fast.accelerate(copy.deepcopy(plain)).merge(up, x, skip)
    assert torch.allclose(got, want, atol=1e-11)


def test_the_gradient_of_theta_is_summed_in_the_wider_type(monkeypatch):
    """In bf16, ones of 512 blocks of one voxel add up to 512 as a float32 sum does; a sum in bf16
    would stay at 256. That float64 is not summed in float32 shows above."""
    monkeypatch.setitem(fast.HEAD_BLOCK, "cpu", 2)
    theta = torch.zeros(2, 153, dtype=torch.bfloat16, requires_grad=True)
    fast._Heads.apply(torch.zeros(8, 512, dtype=torch.bfloat16), theta).sum().backward()
    assert theta.grad[:, -1].tolist() == [512, 512]


@pytest.mark.parametrize("name", CASES)
def test_inference_before_training_leaves_nothing_behind(name):
    """A tensor made in inference mode and kept for later would end the next backward pass."""
    plain, inputs = parts_of(name, 3)
    module, inputs = fast.accelerate(plain), [x.float() for x in inputs]
    fast.window_groups.cache_clear()
    fast.window_layout.cache_clear()
    with torch.inference_mode():
        run(module, inputs, gradients=False)
    run(module, inputs)
