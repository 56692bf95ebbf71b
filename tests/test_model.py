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


def released(name, seed=1):
    """A state dict as the release writes it, bare keys, every number different."""
    sys.path.insert(0, str(SHARED / "golden"))
    import recipe
    shapes = json.loads((SHARED / "golden/state_dict_shapes.json").read_text())[name]
    state = recipe.fill({k: s for k, (t, s) in shapes.items() if t == "float32"}, seed)
    for key, (kind, shape) in shapes.items():
        if kind != "float32":
            state[key] = M._relative_index() if shape else torch.tensor(7)
    assert len(state) == {"unet": 117, "swinunetr": 170}[name]
    return state, recipe.volume((64, 96, 64), 1)


def layouts(state):
    """The three public spellings of one state dict."""
    return {"bare": state, "net": {"net": {f"module.{k}": v for k, v in state.items()}, "epoch": 9},
            "older": {"net": {"module." + k.removeprefix("backbone."): v
                              for k, v in state.items()}}}


@needs_shared
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", ["unet", "swinunetr"])
def test_model_equals_the_released_one(name, threads, tmp_path):
    """Every layout gives the same tensors, and those the released outputs."""
    state, x = released(name)
    models = {}
    for layout, content in layouts(state).items():
        torch.save(content, tmp_path / "file.pth")
        models[layout], w = M.load_released(tmp_path / "file.pth")
        assert torch.equal(w, state["organ_embedding"])
    model = models["bare"]
    for other in models.values():
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    want = np.load(SHARED / f"golden/{name}_64x96x64_seed1.npz")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            deep, fine = model.backbone(x.contiguous(memory_format=torch.channels_last_3d))
            feat = model.reduce(model.reduce_norm(fine.clone()))
            logits = M.apply_heads(feat, model.theta(deep, w))[0]
    finally:
        torch.set_num_threads(before)
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


def test_parameter_count_of_the_paper_swin_unetr():
    """62,186,610 in the backbone, 62,595,315 in all, text rows not counted."""
    with torch.device("meta"):
        model = M.UniversalModel(M.SwinUNETR())
    assert sum(p.numel() for p in model.backbone.parameters()) == 62_186_610
    assert sum(p.numel() for p in model.parameters()) == 62_595_315


def small_released(kind):
    """A small model's weights under the release's names, made by undoing the renaming."""
    spec = {"unet": {"backbone": "unet", "width": 8},
            "swin_unetr": {"backbone": "swin_unetr", "feature_size": 12}}[kind]
    torch.manual_seed(3)
    model = M.build_model({**spec, "text_dim": 7})
    for p in model.parameters():
        p.data.normal_()
    up, down = {"0": "256", "1": "128", "2": "64"}, ("64", "128", "256", "512")
    swin = {"patch": "swinViT.patch_embed.proj", "bottom": "encoder10.layer"}
    out = {"organ_embedding": torch.randn(4, 7)}
    for key, value in model.state_dict().items():
        for a, b in (("reduce_norm", "precls_conv.0"), ("reduce", "precls_conv.2"),
                     ("pool_norm", "GAP.0"), ("pool", "GAP.3"), ("controller.out", "controller"),
                     ("controller.text", "text_to_vision")):
            if key.startswith(a + "."):
                key = b + key[len(a):]
                break
        if key in ("GAP.3.weight", "controller.weight"):
            value = value[..., None, None, None]
        if key.startswith("backbone.") and kind == "unet":
            part, i, *rest = key.removeprefix("backbone.").split(".")
            rest = ".".join(rest)
            if part == "up":
                key = f"backbone.up_tr{up[i]}.up_conv.{rest}"
            else:
                level = f"down_tr{down[int(i)]}" if part == "down" else f"up_tr{up[i]}"
                j, unit, end = rest.split(".")
                unit = {"conv": "conv1", "norm": "bn1"}[unit]
                key = f"backbone.{level}.ops.{j}.{unit}.{end}"
                if unit == "bn1" and end == "bias":
                    out[key.replace("bias", "running_mean")] = value + 1
                    out[key.replace("bias", "running_var")] = value.exp()
                    out[key.replace("bias", "num_batches_tracked")] = torch.tensor(3)
        elif key.startswith("backbone."):
            part, *rest = key.removeprefix("backbone.").split(".")
            rest = ".".join(rest)
            if part in swin:
                name = f"{swin[part]}.{rest}"
            elif part == "stages":
                i, rest = rest.split(".", 1)
                name = f"swinViT.layers{int(i) + 1}.0.{rest}"
                for a, b in ((".merge.", ".downsample."), (".mlp.0.", ".mlp.linear1."),
                             (".mlp.2.", ".mlp.linear2."),
                             (".bias_table", ".relative_position_bias_table")):
                    name = name.replace(a, b)
            else:
                i, rest = rest.split(".", 1)
                name = {"enc": f"encoder{int(i) + 1}.layer.", "dec": f"decoder{5 - int(i)}."
                        "conv_block.", "up": f"decoder{5 - int(i)}.transp_conv.conv."}[part] + rest
            for n in "123":
                name = name.replace(f".conv{n}.", f".conv{n}.conv.")
            key = "backbone." + name
            if key.endswith("_bias_table"):
                out[key.replace("bias_table", "index")] = M._relative_index()
        out[key] = value
    return model, out


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_released_weights_load_strictly_in_every_layout(kind, tmp_path):
    model, state = small_released(kind)
    for layout, content in layouts(state).items():
        torch.save(content, tmp_path / f"{layout}.pth")
        got, w, rest = M.load_checkpoint(tmp_path / f"{layout}.pth")
        assert rest == {} and torch.equal(w, state["organ_embedding"]) and not got.training
        for k, v in model.state_dict().items():
            assert torch.equal(got.state_dict()[k], v), k
    lost, other = [k for k in state if k.endswith("conv2.conv.weight" if kind == "swin_unetr"
                                                  else "bn1.weight")][:2]
    faults = {"missing backbone": {k: v for k, v in state.items() if k != lost},
              "unknown surprise.weight": {**state, "surprise.weight": torch.ones(2)},
              r"has shape \(3,\), expected": {**state, other: torch.ones(3)},
              "not a tensor": {**state, other: "text"},
              "no backbone": {k: v for k, v in state.items() if k != "organ_embedding"}}
    for what, content in faults.items():
        with pytest.raises(ValueError, match=what):
            M.load_released(content)
    index = [k for k in state if k.endswith(("running_var", "position_index"))][0]
    with pytest.raises(ValueError, match="position_index|running_var"):
        M.load_released({**state, index: torch.zeros(5, 2)})


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_pretrained_encoders_fill_the_backbone_and_say_what_was_left(kind, tmp_path):
    """MONAI's file has `out` beside the backbone, older ones `module.layers1`; Genesis `out_tr`."""
    model, state = small_released(kind)
    public = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    public = {(f"module.{k}" if kind == "unet" else k): v for k, v in public.items()}
    extra = {"unet": "module.out_tr.final_conv.weight", "swin_unetr": "out.conv.conv.weight"}[kind]
    torch.save({"state_dict": {**public, extra: torch.ones(3)}}, tmp_path / "a.pt")
    fresh = M.build_model({"backbone": kind, "text_dim": 7, **(
        {"width": 8} if kind == "unet" else {"feature_size": 12})})
    filled, left = M.load_pretrained(fresh, tmp_path / "a.pt")
    assert len(filled) == len(model.backbone.state_dict())
    assert left == [extra.removeprefix("module.")]
    for k, v in model.backbone.state_dict().items():
        assert torch.equal(fresh.backbone.state_dict()[k], v)
    if kind == "swin_unetr":
        old = {"module." + k.removeprefix("swinViT.").replace("linear", "fc"): v
               for k, v in public.items() if k.startswith("swinViT")}
        torch.save({"state_dict": old}, tmp_path / "b.pt")
        filled, left = M.load_pretrained(fresh, tmp_path / "b.pt")
        assert not left and len(filled) == sum("patch" in k or "stages" in k
                                               for k in model.backbone.state_dict())
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no weight in it fits"):
        M.load_pretrained(fresh, tmp_path / "c.pt")


def monai_pair(merging, size):
    """MONAI's SwinUNETR and ours with the same random weights."""
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")
    torch.manual_seed(5)
    monai = nets.SwinUNETR(img_size=size, in_channels=1, out_channels=2, feature_size=12,
                           downsample=merging, use_v2=False)
    with torch.no_grad():
        for name, p in monai.named_parameters():
            p.add_(torch.randn_like(p) * (0.5 if "bias_table" in name else 0.05))
    ours = M.UniversalModel(M.SwinUNETR(feature_size=12, merging=merging), 4)
    state = M._public_names({k: v for k, v in monai.state_dict().items() if k[:4] != "out."}, "")
    ours.backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    kept = {}
    monai.encoder10.register_forward_hook(lambda m, i, o: kept.update(deep=o))
    monai.out.register_forward_pre_hook(lambda m, i: kept.update(fine=i[0]))
    return monai, ours.backbone, kept


def test_attention_is_the_formula_and_its_gradient_the_numerical_one(monkeypatch):
    monkeypatch.setattr(M, "_CACHE", 100)                     # two windows at a time, then one
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    want = (q @ k.transpose(-2, -1) / 3 ** 0.5 + bias).softmax(-1) @ v
    assert torch.allclose(M._Attention.apply(q, k, v, bias), want, atol=1e-12)
    assert torch.autograd.gradcheck(M._Attention.apply, (q, k, v, bias))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merging", ["merging", "mergingv2"])
@pytest.mark.parametrize("size", [(64, 64, 64), pytest.param((96, 96, 96), marks=pytest.mark.slow),
                                  pytest.param((64, 96, 128), marks=pytest.mark.slow)])
def test_swin_unetr_equals_monai_with_gradients(merging, size):
    """Features in float32; gradients in float64, where no ReLU flips by rounding."""
    monai, ours, kept = monai_pair(merging, size)
    x = torch.rand(1, 1, *size)
    with torch.no_grad():
        monai(x)
        deep, fine = ours(x.contiguous(memory_format=torch.channels_last_3d))
    assert (deep - kept["deep"]).abs().max() < 1e-4 and (fine - kept["fine"]).abs().max() < 1e-4
    if size != (64, 64, 64):
        return
    monai, ours, x = monai.double(), ours.double(), x.double()
    monai(x)
    weight = torch.randn_like(kept["fine"]), torch.randn_like(kept["deep"])
    (kept["fine"] * weight[0]).mean().add((kept["deep"] * weight[1]).mean()).backward()
    deep, fine = ours(x.contiguous(memory_format=torch.channels_last_3d))
    (fine * weight[0]).mean().add((deep * weight[1]).mean()).backward()
    grads = M._public_names({k: p.grad for k, p in monai.named_parameters() if k[:4] != "out."}, "")
    for name, p in ours.named_parameters():
        want = grads[f"backbone.{name}"]
        assert (p.grad - want).norm() < 1e-6 * want.norm() + 1e-9, name


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_recomputing_in_backward_changes_no_gradient(kind):
    x, w = torch.rand(1, 1, 64, 64, 64), torch.randn(2, 7)
    grads = []
    for recompute in (False, True):
        model, _ = small_released(kind)
        model.backbone.recompute = recompute
        model.train()(x, w).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7 * a.abs().max().item())


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_a_window_alone_equals_the_window_in_a_batch(kind):
    model = small_released(kind)[0].eval()
    torch.manual_seed(1)
    x, w = torch.rand(3, 1, 64, 64, 64), torch.randn(2, 7)
    x[1] *= 3
    with torch.no_grad():
        alone = torch.cat([model(p, w) for p in x.split(1)])
        scale = alone.abs().max()
        assert (model(x, w) - alone).abs().max() < 1e-5 * scale


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


def test_heads_equal_three_small_convolutions(monkeypatch):
    """Weights 64, 64, 8, then biases 8, 8, 1; a weight is (out, in); ReLU between, not after."""
    torch.manual_seed(0)
    monkeypatch.setattr(M, "_BLOCK", (28, 28))                 # 7 voxels at once, the last 4
    feat = torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    theta = torch.randn(2, 4, 153, requires_grad=True)
    want = torch.empty(2, 4, 3, 4, 5)
    for b in range(2):
        for k in range(4):
            t, v = theta[b, k], feat[b].flatten(1)
            h = F.relu(t[:64].view(8, 8) @ v + t[136:144, None])
            h = F.relu(t[64:128].view(8, 8) @ h + t[144:152, None])
            want[b, k] = (t[128:136].view(1, 8) @ h + t[152]).view(3, 4, 5)
    out = M.apply_heads(feat, theta)
    assert torch.allclose(out, want, atol=1e-4)
    grads = torch.autograd.grad(out.square().sum(), (feat, theta))
    wants = torch.autograd.grad(want.square().sum(), (feat, theta))
    for a, b in zip(grads, wants, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max())
    with torch.no_grad():
        assert torch.allclose(M.apply_heads(feat, theta), want, atol=1e-4)
    sizes = [h1.shape for _, h1, _ in M._inner(torch.ones(8, 60), M.split_theta(theta[0].detach()))]
    assert sizes == 8 * [(4, 8, 7)] + [(4, 8, 4)]


def test_gradients_of_the_heads_are_those_of_finite_differences():
    torch.manual_seed(2)
    feat = torch.randn(1, 8, 2, 2, 3, dtype=torch.double, requires_grad=True)
    theta = torch.randn(1, 2, 153, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(M.apply_heads, (feat, theta))


@pytest.mark.parametrize("side, c_in, skip", [(3, 5, 0), (1, 5, 0), (3, 4, 3), (1, 2, 6)])
def test_convolutions_in_halves_and_beside_a_skip_are_the_plain_ones(side, c_in, skip):
    torch.manual_seed(0)
    conv = M.Conv(c_in + skip, 4, side).double()
    x = torch.randn(1, c_in + skip, 6, 5, 4, dtype=torch.double, requires_grad=True)
    want = F.conv3d(x, conv.weight, conv.bias, padding=side // 2)
    got = conv(x[:, :c_in], x[:, c_in:]) if skip else conv(x)
    assert torch.allclose(got, want, atol=1e-12)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), [x, *conv.parameters()])
                      for y in (got, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_up_convolution_as_a_matrix_product_is_the_plain_one(bias):
    torch.manual_seed(0)
    up = M.Up2(3, 4, bias).double()
    x = torch.randn(2, 3, 2, 3, 4, dtype=torch.double, requires_grad=True)
    want = F.conv_transpose3d(x, up.weight, up.bias, stride=2)
    got, weight = up(x), torch.randn_like(want)
    assert torch.allclose(got, want, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), [x, *up.parameters()])
                      for y in (got, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


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


def test_a_convolution_of_what_is_upsampled_is_the_same_in_halves():
    """Both edges of the cut, an odd depth, a skip of another width."""
    torch.manual_seed(0)
    conv, up = M.Conv(5 + 3, 4).double(), M.Up2(5, 5).double()
    x, skip = torch.randn(2, 5, 49, 4, 3).double(), torch.randn(2, 3, 98, 8, 6).double()
    want = F.conv3d(torch.cat([up(x), skip], 1), conv.weight, conv.bias, padding=1)
    assert torch.allclose(conv(x, skip, up), want, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(conv(x, skip, up), want, atol=1e-12)


def test_wrong_sides_are_named():
    for size in [(64, 64, 65), (16, 64, 64), (96, 72, 96)]:
        with pytest.raises(ValueError, match="multiples of 16 and at least 32, got"):
            tiny_model()(torch.zeros(1, 1, *size), torch.zeros(1, 5))
    swin = M.UniversalModel(M.SwinUNETR(feature_size=12), text_dim=5)
    for size in [(64, 64, 80), (32, 64, 64)]:
        with pytest.raises(ValueError, match="multiples of 32 and at least 64, got"):
            swin(torch.zeros(1, 1, *size), torch.zeros(1, 5))


# ---- extension -----------------------------------------------------------------------------------
def test_an_extension_leaves_old_logits_bit_identical_and_has_its_own_mlp():
    """472,217 parameters a class at the paper's size: 768 -> 512 -> 153."""
    assert sum(p.numel() for p in M.Extension(torch.ones(2, 512)).parameters()) == 2 * 472_217
    model = tiny_model(text_dim=5).eval()
    x, old, new = torch.rand(2, 1, 64, 64, 64), torch.randn(3, 5), torch.randn(2, 5)
    with torch.no_grad():
        before = model(x, old)
        model.extend(new)
        assert torch.equal(model(x, old), before)
        both = model(x, torch.cat([new[1:], old, new[:1]]))            # any order
        assert torch.allclose(both[:, 1:4], before, atol=1e-5)
        deep, _ = model.backbone(x)
        f = model.pool(model.pool_norm(deep.clone()).mean((2, 3, 4)))
        e = model.extension
        for k in range(2):                                             # by hand
            h = torch.relu(torch.cat([f, new[k].expand(2, -1)], 1) @ e.w1[k] + e.b1[k])
            want = h @ e.w2[k] + e.b2[k]
            assert torch.allclose(model.theta(deep, new)[:, k], want, atol=1e-5)
    model.train()(x, torch.cat([old, new])).square().mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "extension" not in n)
    assert all(p.grad.abs().sum() > 0 for p in model.extension.parameters())


def test_wanted_pairs_are_those_of_all_pairs_and_the_rest_costs_nothing():
    model = M.build_model({"backbone": "unet", "width": 8, "text_dim": 6}).eval()
    x, w = torch.randn(3, 1, 64, 64, 64), torch.randn(4, 6, requires_grad=True)
    wanted = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    every, some = model(x, w), model(x, w, wanted)
    assert some.shape == (1, 4, 64, 64, 64)
    assert torch.allclose(some[0], every[wanted], atol=1e-5)
    some.sum().backward()
    assert not w.grad[2].any() and w.grad[[0, 1, 3]].any(1).all()
