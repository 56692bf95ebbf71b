"""New classes beside a frozen model: what the old ones compute stays as it is, bit for bit."""
import copy

import pytest
import torch
from torch import nn

import model
from support import extension, fast

SLOW = pytest.mark.slow
SPECS = {"unet": ({"backbone": "unet", "width": 8, "text_dim": 5}, 32),
         "swin_unetr": ({"backbone": "swin_unetr", "feature_size": 12, "text_dim": 5}, 64)}


def extended(backbone, form):
    """A model, its extension by two classes, an input, embeddings of old and of new classes."""
    torch.manual_seed(0)
    spec, side = SPECS[backbone]
    old = model.build_model(spec).eval()
    w, w_new = torch.randn(3, 5), torch.randn(2, 5)
    new = extension.extend(copy.deepcopy(old), w_new)
    if form == "fast":
        fast.accelerate(old)
        fast.accelerate(new)
    return old, new, torch.rand(1, 1, side, side, side), w, w_new


def test_the_heads_of_an_extension_by_hand():
    """One MLP a class on the image feature and the class's embedding: 472,217 parameters at the
    paper's size (768 -> 512 -> 153), and a decoder level of 9,112 at width 8. A head starts near
    one that says no."""
    network = model.UniversalModel(model.UNet(width=8)).eval()
    network = extension.extend(network, torch.randn(2, 512))
    new, c = network.extensions[0], network.extensions[0].controller
    mlps = sum(p.numel() for p in c.parameters())
    assert mlps == 2 * 472_217 and sum(p.numel() for p in new.parameters()) - mlps == 9_112
    f = torch.randn(2, 256)
    with torch.no_grad():
        got = c(c.w_new[[1, 0]], f)
        for k in range(2):
            h = torch.relu(torch.cat([f, c.w_new[k].expand(2, -1)], 1) @ c.w1[k] + c.b1[k])
            assert torch.allclose(got[:, 1 - k], h @ c.w2[k] + c.b2[k], atol=1e-5)
            (w1, _, _), (b1, _, b3) = model.split_theta(c.b2[k, 0])
            assert 0.3 < w1.std() < 0.7 and (b1 == 0).all() and b3.tolist() == [-2]


@pytest.mark.parametrize("backbone, form", [
    ("unet", "plain"), ("unet", "fast"), pytest.param("swin_unetr", "plain", marks=SLOW),
    pytest.param("swin_unetr", "fast", marks=SLOW)])
def test_an_extension_leaves_old_logits_bit_identical(backbone, form):
    """The two steps of its forward are the backbone. The logits are the same in any order of the
    classes, before and after the new weights have changed."""
    old, new, x, w, w_new = extended(backbone, form)
    with torch.no_grad():
        want = [feature.clone() for feature in new.backbone(x)]
        deep, coarse, skip = new.trunk(x)
        assert torch.equal(deep, want[0])
        assert torch.equal(new.decode(new.last_level(), coarse, skip), want[1])
        before = old(x, w)
        for p in new.extensions[0].parameters():
            p += 0.1 * torch.randn_like(p)
        assert torch.equal(new(x, w), before)
        both = new(x, torch.cat([w_new[1:], w, w_new[:1]]))
        assert torch.equal(both[:, 1:4], before)
        assert torch.allclose(both[:, [4, 0]], new(x, w_new), atol=1e-5)
        assert not torch.allclose(both[:, 4], both[:, 0])
    part = extension.owner_of(new, torch.cat([w_new[1:], w, w_new[:1]]))
    assert part.tolist() == [1, 0, 0, 0, 1]
    assert extension.owner_of(old, w).tolist() == [0, 0, 0]


def test_in_training_mode_all_classes_are_of_the_newest_extension():
    """The new ones are computed as in evaluation mode; another class is NaN, never a wrong map."""
    _, network, x, w, w_new = extended("unet", "plain")
    with torch.no_grad():
        want = network(x, w_new)
        got = network.train()(x, torch.cat([w_new, w[:1]]))
    assert torch.allclose(got[:, :2], want, atol=1e-5) and got[:, 2].isnan().all()


@pytest.mark.parametrize("backbone", ["unet", pytest.param("swin_unetr", marks=SLOW)])
def test_only_an_extension_is_trained_and_an_extended_model_can_be_extended_again(backbone):
    _, network, x, w, first = extended(backbone, "fast")
    second = torch.randn(1, 5)
    every = torch.cat([first, w])
    with torch.no_grad():
        before = network(x, every)
    assert extension.extend(network, second) is network
    part = extension.owner_of(network, torch.cat([second, every]))
    assert part.tolist() == [2, 1, 1, 0, 0, 0]
    network(x, torch.cat([w, second, first])).square().mean().backward()
    for name, p in network.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == ("extensions.1." in name), name
    again = extension.build_model({**SPECS[backbone][0], "extensions": [2, 1]}).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(x, every), before)
        every = torch.cat([every, second])
        assert torch.allclose(fast.accelerate(again)(x, every), network(x, every), atol=1e-5)


def test_a_backbone_of_ones_own_cannot_be_extended():
    network = model.UniversalModel(model.UNet(width=8), text_dim=5)
    network.backbone = nn.Identity()
    with pytest.raises(ValueError, match="only a UNet or a SwinUNETR can be extended.* Identity"):
        extension.extend(network, torch.randn(1, 5))
