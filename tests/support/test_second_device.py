"""Training and inference on a second device, which a machine without a GPU can have as well
(second_device.py): nothing mixes devices, results equal those of the CPU, and the device is seldom
waited for.

A network takes one of three forms:

plain  the code of model.py (--plain)
gpu    what serves GPUs in fast.py, as on CUDA
fast   all of fast.py, whose norms need float64
"""
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from second_device import second_device

import clip_text
import data
import infer
import labels
import model
import train
from support import checkpoints, fast, processes, streaming, transfer

slow = pytest.mark.slow
bf16 = [slow, pytest.mark.skipif(not processes.has_bf16_instructions(),
                                 reason="gradients in emulated "
                                 "bf16 are wrong")]


@pytest.fixture
def device_for(monkeypatch):
    """device_for(form): from now on the networks of both devices take this form -> the second
    device, to be used as a context manager."""
    devices = {cls: cls.devices for cls in fast.FAST.values()}

    def enter(form):
        for cls, before in devices.items():
            served = form == "fast" or (form == "gpu" and "cuda" in before)
            monkeypatch.setattr(cls, "devices", ("cpu", "meta") if served else ())
        return second_device(float64=form == "fast")
    return enter


# ---- the second device itself --------------------------------------------------------------------
def test_values_move_to_the_device_and_back():
    with second_device() as fetches:
        a = torch.arange(6.0).to("meta")
        b = torch.tensor([[1, 2, 3]], device="meta")
        assert a.device.type == b.device.type == "meta" and b.dtype == torch.int64
        assert fetches == []
        c = (a.view(2, 3) * b).cpu()
    assert c.tolist() == [[0, 2, 6], [3, 8, 15]] and c.device.type == "cpu"


@pytest.mark.parametrize("mixed", [
    lambda here, there: here + there,
    lambda here, there: there.index_select(0, torch.tensor([1])),
    lambda here, there: torch.where(here > 0, there, 0),
    lambda here, there: torch.stack([there[0], torch.tensor(1.0)]),    # not even without axes
    lambda here, there: torch.zeros(()).add_(there[0]),                # the result would lie there
    lambda here, there: here[there.long()],
    lambda here, there: there.masked_fill(here > 1, 0),
    lambda here, there: torch.nn.functional.linear(there, here[None]),
])
def test_mixing_devices_is_an_error(mixed):
    with second_device(), pytest.raises(RuntimeError, match="on the same device.*meta and cpu"):
        mixed(torch.arange(3.0), torch.arange(3.0).to("meta"))


def test_what_cuda_takes_from_the_cpu_is_allowed_and_fetches_nothing():
    """Tensors without axes, indices, masks and copies."""
    with second_device() as fetches:
        a = torch.arange(4.0).to("meta")
        a[torch.tensor([True, False, False, False])] = 5
        parts = [a * torch.tensor(2.0), a[torch.tensor([3, 0])], a[[1, 2]], a[np.array([1])],
                 a[torch.tensor([True, False, False, True])], torch.where(a > 1, a, 0.0)]
        a.copy_(torch.ones(4))
        assert fetches == []
        assert [part.tolist() for part in parts] == [
            [10, 2, 4, 6], [3, 5], [1, 2], [1], [5, 3], [5, 0, 2, 3]]
        assert a.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("fetch", [
    lambda a: a.sum().item(),
    lambda a: bool(a.any()),
    lambda a: float(a[0]),
    lambda a: f"{a[0]:.1f}",
    lambda a: print(a),
    lambda a: a.tolist(),
    lambda a: a.cpu(),
    lambda a: a.to("cpu", torch.int32, non_blocking=True),
    lambda a: torch.zeros(3).copy_(a),
    lambda a: a.nonzero(),
    lambda a: torch.where(a > 0),
    lambda a: a[a > 0],
    lambda a: a.masked_select(a > 0),
    lambda a: a.__setitem__(a > 0, 7.0),
    lambda a: a.unique(),
    lambda a: a.repeat_interleave(a.long()),
    lambda a: torch.equal(a, a),
    lambda a: torch.allclose(a, a),
])
def test_a_fetch_is_recorded_once_with_its_line(fetch):
    with second_device() as fetches:
        a = torch.arange(3.0).to("meta")
        fetch(a)
    line = fetch.__code__.co_firstlineno
    assert fetches == [f"tests/support/test_second_device.py:{line}"]


def test_numpy_cannot_read_a_tensor_of_the_device():
    with second_device():
        a = torch.arange(3.0).to("meta")
        for read in (a.numpy, lambda: np.asarray(a), lambda: np.add(a, 1)):
            with pytest.raises(TypeError, match="Use Tensor.cpu"):
                read()


def test_float64_is_refused_where_asked():
    makes = (lambda: torch.zeros(3, dtype=torch.float64, device="meta"),
             lambda: torch.tensor(np.ones(3), device="meta"),
             lambda: torch.zeros(3, dtype=torch.float64).to("meta"),
             lambda: torch.zeros(3).to("meta").double(),
             lambda: torch.zeros(3).to("meta").sum(dtype=torch.float64))
    for make in makes:
        with second_device():
            assert make().dtype == torch.float64
        with second_device(float64=False), pytest.raises(TypeError, match="no float64"):
            make()


def test_a_saved_tensor_can_be_read_on_the_cpu(tmp_path):
    with second_device() as fetches:
        torch.save({"a": torch.arange(3.0).to("meta")}, tmp_path / "a.pt")
        assert len(fetches) == 1
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [0, 1, 2]


def test_inference_mode_and_autocast_are_as_before_after_the_block():
    before = torch.autocast, torch.inference_mode.__enter__, torch.inference_mode.__exit__
    with second_device():
        with torch.inference_mode():
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    assert before == (torch.autocast, torch.inference_mode.__enter__, torch.inference_mode.__exit__)


# ---- networks ------------------------------------------------------------------------------------
# Swin UNETR with every kind of block, but narrow: attention dominates at this size
NETWORKS = {
    "unet": ({"backbone": "unet", "width": 8, "text_dim": 5}, 32),
    "swin_unetr": ({"backbone": "swin_unetr", "feature_size": 4, "depths": (1, 2, 1, 1),
                    "heads": (1, 1, 1, 1), "text_dim": 5}, 64),
}


def forward_and_backward(backbone, form, device, amp, dtype=torch.float32):
    """-> logits, and the gradients of all parameters, on the CPU."""
    spec, side = NETWORKS[backbone]
    torch.manual_seed(0)
    network = model.build_model(spec).to(device, dtype)
    if form != "plain":
        fast.accelerate(network)
    x = torch.rand(1, 1, side, side, side).to(device, dtype)
    w = torch.randn(3, 5).to(device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        logits = network(x, w)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=dtype).view(logits.shape).to(device)
    (logits.to(dtype) * weight).mean().backward()
    return logits.detach().cpu(), [p.grad.cpu() for p in network.parameters()]


def relative(got, want):
    """The norm of the difference of two lists of tensors by the norm of the second."""
    got, want = (torch.cat([t.double().flatten() for t in part]) for part in (got, want))
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backbone, form, amp", [
    ("unet", "plain", False),
    ("unet", "gpu", False),
    pytest.param("unet", "gpu", True, marks=slow),
    pytest.param("swin_unetr", "gpu", False, marks=slow),
    pytest.param("unet", "fast", False, marks=slow),
    pytest.param("unet", "plain", True, marks=slow),
    pytest.param("unet", "fast", True, marks=slow),
    pytest.param("swin_unetr", "plain", False, marks=slow),
    pytest.param("swin_unetr", "fast", False, marks=slow),
    pytest.param("swin_unetr", "gpu", True, marks=bf16),
])
def test_logits_and_gradients_are_those_of_the_cpu(device_for, backbone, form, amp):
    """Bit for bit in the plain U-Net. Elsewhere PyTorch picks other kernels: for matrix products of
    a tensor subclass and, in fast.py, for attention and small convolutions on the CPU. They differ
    by rounding: 1e-5 in float32, 5e-2 in bf16.

    fast.py runs in float64, because rounding in float32 moves an activation across the kink of ReLU
    now and then, and a single one changes the gradients by 1e-4."""
    device = device_for(form)
    dtype = torch.float64 if form == "fast" and not amp else torch.float32
    logits, gradients = forward_and_backward(backbone, form, "cpu", amp, dtype)
    with device:
        there, gradients_there = forward_and_backward(backbone, form, "meta", amp, dtype)
    assert there.dtype == logits.dtype == (torch.bfloat16 if amp else dtype)
    if (backbone, form) == ("unet", "plain"):
        assert torch.equal(there, logits)
        assert all(map(torch.equal, gradients_there, gradients))
    tolerance = 5e-2 if amp else {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert relative([there], [logits]) < tolerance
    assert relative(gradients_there, gradients) < tolerance


@slow
def test_activation_checkpointing_works_on_the_device():
    """The second computation of the activations is under the same autocast as the first."""
    def gradients(recompute):
        torch.manual_seed(0)
        network = model.build_model(NETWORKS["unet"][0]).to("meta")
        network.backbone.recompute = recompute
        x, w = torch.rand(1, 1, 32, 32, 32).to("meta"), torch.randn(3, 5).to("meta")
        with torch.autocast("meta", torch.bfloat16):
            network(x, w).float().mean().backward()
        return [p.grad.cpu() for p in network.parameters()]
    with second_device(float64=False):
        assert all(map(torch.equal, gradients(False), gradients(True)))


def test_text_features_are_those_of_the_cpu():
    torch.manual_seed(0)
    encoder = clip_text.TextEncoder(vocabulary=50, context_length=9, width=16, layers=2, heads=2,
                                    embed_dim=6).eval()
    tokens = torch.randint(0, 49, (3, 9))
    tokens[:, 6] = 49                                                  # the end of the text
    with torch.no_grad():
        want = encoder(tokens)
        with second_device(float64=False) as fetches:
            features = encoder.to("meta")(tokens.to("meta"))
            assert fetches == []
            features = features.cpu()
    assert torch.allclose(features, want, rtol=1e-5, atol=1e-6)


# ---- training ------------------------------------------------------------------------------------
def config(tiny, out, form, **how):
    base = {"data": (str(tiny / "raw"),), "out": str(out), "text": "onehot", "spacing_mm": 8.0,
            "patch": 32, "width": 8, "steps": 2, "batch": 2, "lr": 1e-3,
            "val_fraction": 0.25, "val_every": 2, "workers": 0,
            "amp": False, "plain": form == "plain", "device": "cpu"}
    return train.Config(**{**base, **how})


def train_on_device(cfg, device, monkeypatch) -> list[list[str]]:
    """Train on the second device -> the fetches of every step. Those of the whole loop are counted;
    only a checkpoint and a validation may fetch more."""
    steps = []
    with device as fetches, monkeypatch.context() as patch:
        def uncounted(call):
            def wrapper(*args, **kwargs):
                before = len(fetches)
                result = call(*args, **kwargs)
                del fetches[before:]
                return result
            return wrapper

        def update(run, net, batch, cfg, amp, stop, call=train.update):
            if not steps:
                fetches.clear()                    # those of the start of the run
            before = len(fetches)
            result = call(run, net, batch, cfg, amp, stop)
            steps.append(fetches[before:])
            return result
        patch.setattr(checkpoints, "save_checkpoint", uncounted(checkpoints.save_checkpoint))
        patch.setattr(train, "validate", uncounted(train.validate))
        patch.setattr(train, "update", update)
        train.main(["--data", *cfg.data, *flags(cfg), "--device", "meta"])
    assert len(fetches) == sum(map(len, steps)), (fetches, steps)
    return steps


def flags(cfg) -> list[str]:
    """The settings that differ from the defaults, as a user would give them."""
    given = []
    for name, value in vars(cfg).items():
        flag = "--" + name.replace("_", "-")
        if name in ("data", "device") or value == getattr(train.Config, name):
            continue
        if isinstance(value, bool):
            given.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            given += [flag, str(value)]
    return given


def content(out) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def losses(out) -> list[float]:
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def assert_same_run(got, want, form, amp=False):
    """Of the folders of two runs: losses, weights and the state of the optimiser.

    They are equal in the plain form. In the other forms they differ by rounding, which Adam turns
    into steps of the size of the learning rate, 1e-3, where a gradient is nearly zero. In bf16 this
    happens to so many weights that their gradients are compared instead, as Adam remembers them.
    """
    assert losses(got) == pytest.approx(losses(want), rel=1e-2 if amp else 1e-4)
    a, b = content(got), content(want)
    assert a["step"] == b["step"] == len(losses(got)) and a["trained"] == b["trained"]
    assert torch.equal(a["w"], b["w"]) and a["model"].keys() == b["model"].keys()
    if form == "plain":
        assert a["best"] == b["best"] and losses(got) == losses(want)
        assert all(map(torch.equal, numbers(a), numbers(b)))
    elif amp:
        assert relative(gradients_of(a), gradients_of(b)) < 5e-2
    else:
        for name in a["model"]:
            if not name.endswith("conv.bias"):     # a norm follows: its gradient is only rounding
                difference = (a["model"][name] - b["model"][name]).abs().mean()
                assert difference < 1e-4, name


def gradients_of(checkpoint) -> list[torch.Tensor]:
    """Adam's running means of the gradients."""
    return [state["exp_avg"] for state in checkpoint["optimizer"]["state"].values()]


def numbers(checkpoint) -> list[torch.Tensor]:
    """The weights and all that Adam remembers of them."""
    states = checkpoint["optimizer"]["state"].values()
    return [*checkpoint["model"].values(), *(t for state in states for t in state.values())]


@pytest.mark.parametrize("form, amp", [
    ("plain", False),
    pytest.param("gpu", False, marks=slow),
    pytest.param("fast", False, marks=slow),
    pytest.param("gpu", True, marks=bf16),
])
def test_training_ends_as_on_the_cpu_and_a_step_fetches_once(tiny, tmp_path, monkeypatch,
                                                             device_for, form, amp):
    """On the device the run stops after one of two steps and is resumed. Its checkpoint also
    resumes on the CPU."""
    device, cpu, there = device_for(form), tmp_path / "cpu", tmp_path / "there"
    how = {"amp": amp, "batch": 1 if amp else 2}                       # bf16 is slow on most CPUs
    train.train(config(tiny, cpu, form, **how))

    def stop(step, cfg, at=train.lr_at):
        if step == 1:
            raise KeyboardInterrupt
        return at(step, cfg)
    cfg = config(tiny, there, form, resume=True, **how)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_at", stop)
        with pytest.raises(KeyboardInterrupt):
            train_on_device(cfg, device, monkeypatch)
    half = content(there)
    assert half["step"] == 1
    steps = train_on_device(cfg, device_for(form), monkeypatch)
    assert len(steps) == 1 and len(steps[0]) <= 1, steps
    assert_same_run(there, cpu, form, amp)
    checkpoints.load_checkpoint(there / "best.pt")

    torch.save(half, there / "last.pt")
    train.train(config(tiny, there, form, resume=True, **how))
    assert_same_run(there, cpu, form, amp)


@slow
@pytest.mark.parametrize("form", ["gpu", "fast"])
def test_swin_unetr_trains_as_on_the_cpu_and_a_step_fetches_once(tiny, tmp_path, monkeypatch,
                                                                 device_for, form):
    how = {"backbone": "swin_unetr", "width": 12, "patch": 64, "steps": 1, "batch": 1,
           "val_fraction": 0.0}
    device = device_for(form)
    train.train(config(tiny, tmp_path / "cpu", form, **how))
    steps = train_on_device(config(tiny, tmp_path / "there", form, **how), device, monkeypatch)
    assert len(steps) == 1 and len(steps[0]) <= 1, steps
    assert_same_run(tmp_path / "there", tmp_path / "cpu", form)


@pytest.mark.parametrize("form, flag", [
    pytest.param("plain", "extend", marks=slow),
    ("plain", "init"),
    pytest.param("gpu", "extend", marks=slow),
    pytest.param("fast", "extend", marks=slow),
    pytest.param("gpu", "init", marks=slow),
])
def test_new_classes_train_as_on_the_cpu_and_a_step_fetches_once(tiny, tmp_path, monkeypatch,
                                                                 device_for, form, flag):
    """The kidneys are learned on the CPU; the liver is then added on either device."""
    def folder(name):
        return str(tiny / "raw" / name)
    (tmp_path / "old.json").write_text('[{"name": "Right Kidney", "side": "right"}, '
                                       '{"name": "Left Kidney", "side": "left"}]')
    (tmp_path / "new.json").write_text('["Liver"]')
    train.train(config(tiny, tmp_path / "base", form, data=(folder("Dataset902_Kidney"),), steps=1,
                       val_fraction=0.0, classes=str(tmp_path / "old.json")))
    how = {"data": (folder("Dataset901_Liver"),), "classes": str(tmp_path / "new.json"),
           flag: str(tmp_path / "base/last.pt"), "steps": 2, "val_fraction": 0.5}
    device = device_for(form)
    train.train(config(tiny, tmp_path / "cpu", form, **how))
    steps = train_on_device(config(tiny, tmp_path / "there", form, **how), device, monkeypatch)
    if flag == "extend":
        assert content(tmp_path / "there")["model"]["extensions.0.controller.b1"].abs().sum() > 0
    assert_same_run(tmp_path / "there", tmp_path / "cpu", form)
    assert len(steps) == 2 and all(len(fetched) <= 1 for fetched in steps), steps


# ---- inference -----------------------------------------------------------------------------------
TRAINED = ["Liver", "Liver Tumor", "Right Kidney", "Left Kidney"]


@pytest.fixture(scope="module")
def scan(tiny):
    return tiny / "raw" / "Dataset901_Liver" / "imagesTr" / "c0_0000.nii.gz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, scan):
    """A random U-Net for windows of 32^3, whose heads say yes to about half of the body."""
    spec = {"backbone": "unet", "width": 8, "text_dim": 32}
    torch.manual_seed(0)
    network, w = model.build_model(spec), torch.eye(32) * transfer.ONEHOT_NORM
    image = torch.from_numpy(data.preprocess(data.load_volume(scan), 4.0)[0])[:32, :32, :32]
    with torch.no_grad():
        logits = network(image[None, None], w)
        network.controller.out.bias[-1] -= logits[:, :, image > 0].median()
    path = tmp_path_factory.mktemp("checkpoint") / "m.pt"
    torch.save({"format": checkpoints.FORMAT, "spec": spec, "model": network.state_dict(), "w": w,
                "classes": [{"name": c.name, "parents": list(c.parents), "side": c.side,
                             "lesion": c.lesion, "solid": c.solid} for c in labels.CLASSES],
                "trained": TRAINED, "config": {"spacing_mm": 4.0, "patch": 32}}, path)
    return path


def segment(checkpoint, scan, out, device, form):
    arguments = ["--checkpoint", str(checkpoint), "--input", str(scan), "--output", str(out),
                 "--device", device, "--batch", "3", "--masks", "--preview", "--probabilities",
                 "--no-amp"]
    return infer.main(arguments + ["--plain"] * (form == "plain"))


@pytest.mark.parametrize("form", ["gpu", pytest.param("plain", marks=slow),
                                  pytest.param("fast", marks=slow)])
def test_results_are_those_of_the_cpu_and_slabs_are_fetched_together(
        tmp_path, monkeypatch, device_for, checkpoint, scan, form):
    """At most three fetches for every call of the model, which takes three windows, beside the
    probabilities, which are fetched class by class.

    In the fast form, where the two devices take other kernels, rounding may move a few
    probabilities to the next of the levels in which they are stored."""
    device, calls, fetched = device_for(form), [], []
    assert segment(checkpoint, scan, tmp_path / "cpu", "cpu", form) == 0
    with device as fetches, monkeypatch.context() as patch:
        def counted(volume, network, w, call=streaming.segment, **how):
            fetches.clear()
            hook = network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
            seg = call(volume, network, w, **how)
            hook.remove()
            fetched.extend(fetches)
            return seg
        patch.setattr(streaming, "segment", counted)
        assert segment(checkpoint, scan, tmp_path / "there", "meta", form) == 0
    assert [len(windows) for windows in calls] == [3, 1] * 3
    assert 0 < len(fetched) <= 3 * len(calls) + 3 * len(TRAINED), fetched
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*") if p.is_file())
             for d in ("cpu", "there")]
    assert files[0] == files[1]
    assert {p.suffix for p in files[0]} == {".gz", ".json", ".png", ".txt"} and len(files[0]) == 12
    for file in files[0]:
        a, b = tmp_path / "cpu" / file, tmp_path / "there" / file
        if file.suffix == ".gz":
            assert np.array_equal(nib.load(a).affine, nib.load(b).affine)
            here, there = (np.asarray(nib.load(path).dataobj) for path in (a, b))
            if form == "fast" and "probability" in file.name:
                assert np.abs(here - there).max() * streaming.LEVELS < 1.001
                assert (here != there).mean() < 1e-4
            else:
                assert np.array_equal(here, there)
        elif file.suffix == ".json":
            assert json.loads(a.read_text()) == json.loads(b.read_text())
        else:
            assert a.read_bytes() == b.read_bytes()
    label = np.asarray(nib.load(tmp_path / "cpu/c0.nii.gz").dataobj)
    assert len(np.unique(label)) > 2                           # otherwise all of this says little


@slow
def test_windows_are_computed_in_bf16_on_the_device_as_well():
    torch.manual_seed(0)
    network = model.build_model(NETWORKS["unet"][0]).eval()
    volume, w = np.random.default_rng(0).random((32, 32, 32), np.float32), torch.randn(3, 5)
    want = infer.sliding_window(volume, network, w, patch=32, amp=True)
    assert not torch.equal(want, infer.sliding_window(volume, network, w, patch=32))
    with second_device(float64=False) as fetches:
        there = infer.sliding_window(volume, network.to("meta"), w.to("meta"), patch=32, amp=True)
        assert there.device.type == "meta" and fetches == []
        assert torch.equal(there.cpu(), want)


@pytest.mark.parametrize("command", ["train", "infer"])
def test_a_device_on_which_nothing_computes_is_named(tiny, tmp_path, checkpoint, scan, command):
    """Without second_device, `meta` has no values."""
    with pytest.raises(ValueError, match="--device meta: PyTorch cannot compute there"):
        if command == "train":
            train.train(config(tiny, tmp_path, "plain", device="meta"))
        else:
            segment(checkpoint, scan, tmp_path, "meta", "plain")


def test_an_index_left_on_the_cpu_is_found(tmp_path, monkeypatch, checkpoint, scan):
    """data.interpolate as it would be without one of its `.to(x.device)`."""
    def interpolate(x, where, axis):
        low = np.clip(np.floor(where).astype(np.int64), 0, max(x.shape[axis] - 2, 0))
        return x.index_select(axis, torch.from_numpy(low)).float()
    monkeypatch.setattr(data, "interpolate", interpolate)
    with second_device(), pytest.raises(RuntimeError, match="same device.*aten.index_select"):
        segment(checkpoint, scan, tmp_path, "meta", "plain")
