"""The network: golden values of the released model, plain re-computation, what masking means."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_shared

import losses
import model as M


def tiny_model(text_dim=5, width=8, seed=0):
    torch.manual_seed(seed)
    return M.UniversalModel(M.UNet(width=width), text_dim)


def golden(name):
    sys.path.insert(0, str(SHARED / "golden"))
    import recipe
    shapes = json.loads((SHARED / "golden/state_dict_shapes.json").read_text())[name]
    state = recipe.fill({k: s for k, (t, s) in shapes.items() if t == "float32"}, 1)
    return state, shapes, recipe.volume((64, 96, 64), 1)


@needs_shared
def test_unet_equals_the_released_model():
    state, _, x = golden("unet")
    want = np.load(SHARED / "golden/unet_64x96x64_seed1.npz")
    model = M.UniversalModel(M.UNet()).eval()
    rename = {".down_tr64.": ".down.0.", ".down_tr128.": ".down.1.", ".down_tr256.": ".down.2.",
              ".down_tr512.": ".down.3.", ".up_tr256.up_conv.": ".up.0.", ".up_tr256.": ".merge.0.",
              ".up_tr128.up_conv.": ".up.1.", ".up_tr128.": ".merge.1.",
              ".up_tr64.up_conv.": ".up.2.", ".up_tr64.": ".merge.2.", ".ops.": ".",
              ".conv1.": ".conv.", ".bn1.": ".norm.", "precls_conv.0": "reduce_norm",
              "precls_conv.2": "reduce", "GAP.0": "pool_norm", "GAP.3": "pool",
              "controller.": "controller.out.", "text_to_vision": "controller.text"}
    own, squeezed = {}, ("pool.weight", "controller.out.weight")
    for key, value in state.items():
        if "running" not in key:
            for a, b in rename.items():
                key = key.replace(a, b)
            own[key] = value.flatten(1) if key in squeezed else value
    w = own.pop("organ_embedding")
    model.load_state_dict(own)
    with torch.no_grad():
        deep, fine = model.backbone(x)
        logits = model(x, w)[0]
    assert abs(logits[:, ::8, ::8, ::8].numpy() - want["logits"]).max() < 2e-4
    assert abs(fine[0, ::4, ::8, ::8, ::8].numpy() - want["fine"]).max() < 2e-4
    assert abs(deep[0, ::16].numpy() - want["deep"]).max() < 2e-4
    assert abs(logits.mean((1, 2, 3)).numpy() - want["logits_mean"]).max() < 2e-4
    assert abs(logits.std((1, 2, 3)).numpy() - want["logits_std"]).max() < 2e-4


def test_parameter_count_of_the_paper_unet():
    """19,073,600 in the backbone, 19,416,417 in all, text rows not counted."""
    model = M.UniversalModel(M.UNet())
    assert sum(p.numel() for p in model.backbone.parameters()) == 19_073_600
    assert sum(p.numel() for p in model.parameters()) == 19_416_417


@pytest.mark.parametrize("groups, slope", [(None, 0.0), (4, 0.0), (None, 0.01), (None, None)])
def test_norm_act_equals_plain_torch_with_gradients(groups, slope):
    torch.manual_seed(1)
    x = torch.randn(2, 16, 5, 6, 7).mul_(3).add_(20).requires_grad_()
    weight, bias = torch.rand(16, requires_grad=True), torch.randn(16, requires_grad=True)

    def plain(x, weight, bias):
        y = F.group_norm(x, groups or 16, weight, bias)
        return y if slope is None else F.leaky_relu(y, slope)
    y = M.norm_act(x, weight, bias, groups=groups, slope=slope)
    grad = torch.randn_like(y)
    want = plain(x.double(), weight.double(), bias.double())
    assert (y - want).abs().max() < 1e-5
    for a, b in zip(torch.autograd.grad(y, (x, weight, bias), grad),
                    torch.autograd.grad(want, (x, weight, bias), grad.double()), strict=True):
        assert (a - b).abs().max() < 2e-4 * b.abs().max().clamp_min(1)
    with torch.no_grad():
        assert torch.allclose(M.norm_act(x.clone(), weight, bias, groups=groups, slope=slope), y,
                              atol=1e-5)


def test_norm_statistics_stay_exact_at_full_window_size():
    """Plain F.group_norm is off by 4e-4 to 1e-3 here; sums in slabs are not."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 96, 96, 96) * 2 + 5).contiguous(memory_format=torch.channels_last_3d)
    want = (x - x.double().mean((2, 3, 4), keepdim=True).float()) / \
        (x.double().var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt().float()
    assert (M.norm_act(x, slope=None) - want).abs().max() < 2e-5


def test_heads_equal_three_small_convolutions():
    """Weights 64, 64, 8, then biases 8, 8, 1; a weight is (out, in); ReLU between, not after."""
    torch.manual_seed(0)
    feat = torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    theta = torch.randn(2, 4, 153, requires_grad=True)
    want = torch.empty(2, 4, 3, 4, 5)
    for b in range(2):
        for k in range(4):
            t, v = theta[b, k], feat[b].flatten(1)
            h = F.relu(t[:64].view(8, 8) @ v + t[136:144, None])
            h = F.relu(t[64:128].view(8, 8) @ h + t[144:152, None])
            want[b, k] = (t[128:136].view(1, 8) @ h + t[152]).view(3, 4, 5)
    out = M.apply_heads(feat, theta, block=7)
    assert torch.allclose(out, want, atol=1e-4)
    grads = torch.autograd.grad(out.square().sum(), (feat, theta))
    wants = torch.autograd.grad(want.square().sum(), (feat, theta))
    for a, b in zip(grads, wants, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-2 * b.abs().max())
    with torch.no_grad():
        assert torch.allclose(M.apply_heads(feat, theta, block=11), want, atol=1e-4)


def test_any_subset_of_classes_in_any_order_is_the_same_as_a_slice():
    model, x = tiny_model(), torch.randn(1, 1, 64, 64, 64)
    w = torch.randn(6, 5)
    with torch.no_grad():
        everything = model(x, w)
        some = model(x, w[[4, 1]])
    assert torch.allclose(everything[:, [4, 1]], some, atol=1e-5)


def test_a_window_does_not_depend_on_its_neighbours():
    model = tiny_model()
    x, w = torch.randn(3, 1, 64, 64, 64), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.allclose(model(x, w)[1:2], model(x[1:2], w), atol=1e-5)


def test_unannotated_class_gets_exactly_zero_gradient_through_its_text_row():
    model, w = tiny_model(), torch.randn(4, 5, requires_grad=True)
    logits = model(torch.randn(2, 1, 64, 64, 64), w)
    y = (torch.rand_like(logits) > 0.5).float()
    annotated = torch.tensor([[True, False, False, True], [False, False, True, True]])
    (losses.masked_bce(logits, y, annotated) + losses.masked_dice(logits, y, annotated)).backward()
    assert (w.grad[1] == 0).all()
    assert all((w.grad[k] != 0).any() for k in (0, 2, 3))


def test_wrong_sides_are_named():
    for size in [(64, 64, 65), (32, 64, 64), (96, 80, 96)]:
        with pytest.raises(ValueError, match="multiples of 32 and at least 64"):
            tiny_model()(torch.zeros(1, 1, *size), torch.zeros(1, 5))
