"""The benchmark: frozen baselines against model.py, its rows, and the GPU's measurements on the CPU
at tiny sizes (no time in them means anything). For its tables see test_claims.py."""
import contextlib
import dataclasses
import json
import time

import numpy as np
import pytest
import torch

import losses
import model
from experiments import bench
from support import fast

TINY = bench.Size(side=32, classes=4, annotated=(1, 3), width=8, feature_size=12, text_dim=5)
TINY_SWIN = dataclasses.replace(TINY, side=64)


def logits_of(side, backbone="unet", size=TINY, batch=1):
    """Of a network and of windows that depend on nothing but a seed."""
    torch.manual_seed(0)
    return bench.window(side, backbone, size=size, batch=batch)()


# ---- baselines -----------------------------------------------------------------------------------
def name_in_baseline(name):
    """down.0.1.conv.weight -> backbone.down.0.1.0.weight, and so on."""
    renamed = {"pool_norm": "gap.0", "pool": "gap.3", "reduce_norm": "pre.0", "reduce": "pre.2",
               "controller.text": "text", "controller.out": "controller"}
    module, kind = name.rsplit(".", 1)
    module = module.replace(".conv", ".0").replace(".norm", ".1")
    return f"{renamed.get(module, module)}.{kind}"


def test_the_baseline_is_our_plain_unet_for_one_window():
    torch.manual_seed(0)
    ours = bench.build("plain", "unet", TINY)
    base = bench.build("base", "unet", TINY)
    for p in ours.parameters():
        torch.nn.init.normal_(p, 0.02, 0.1)                # norms and biases that differ as well
    shapes = base.state_dict()
    state = {name_in_baseline(name): value for name, value in ours.state_dict().items()}
    base.load_state_dict({name: value.view_as(shapes[name]) for name, value in state.items()})
    x, w = bench.inputs(TINY, 1, "cpu")
    want, got = ours(x, w), base.train()(x, w)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


def test_the_baseline_s_heads_and_loss_are_ours_where_every_scan_annotates_the_same():
    feat, theta = torch.randn(1, 8, 3, 4, 5), torch.randn(6, 153)
    torch.testing.assert_close(bench.grouped_heads(feat, theta),
                               model.apply_heads(feat, theta[None]), rtol=1e-5, atol=1e-4)
    logits, y = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 3, 4, 5, 6) > 0.7
    annotated = torch.ones(2, 3, dtype=torch.bool)
    ours = losses.masked_bce(logits, y, annotated) + losses.masked_dice(logits, y, annotated)
    torch.testing.assert_close(bench.release_loss(logits, y), ours)


@pytest.mark.slow
def test_monai_gives_a_decoder_feature_and_a_deepest_one():
    pytest.importorskip("monai")
    deep, fine = bench.build("base", "swin", TINY_SWIN).backbone(torch.rand(1, 1, 64, 64, 64))
    assert deep.shape == (1, 16 * 12, 2, 2, 2) and fine.shape == (1, 12, 64, 64, 64)


# ---- what is compared ----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("side", ["base", "plain", "fast"])
def test_windows_and_steps_of_two(side):
    assert logits_of(side, batch=2).shape == (2, 4, 32, 32, 32)
    call = bench.step(side, "unet", size=TINY, batch=2)
    assert call() > call() > 0                                     # the step changes the network


def test_multiply_adds_of_one_convolution_of_the_unet_by_hand():
    """The last convolution of width 8 at 32^3 has 2 * 27 * 8 * 8 * 32^3 operations; twice as many
    voxels on every side need eight times as many of all."""
    small = bench.count_flops("unet", TINY)
    assert 2 * 27 * 8 * 8 * 32 ** 3 < small
    assert bench.count_flops("unet", TINY_SWIN) == 8 * small


# ---- the CPU's rows ------------------------------------------------------------------------------
def test_every_floor_is_a_row_and_every_row_shows_its_goal():
    assert [name for name, row in bench.ROWS.items() if row.quick] == [
        "window_swin", "window_unet", "step_swin", "step_unet", "whole_ct", "huge_ct", "preprocess",
        "arithmetic", "surfaces"]
    assert all(row.goal and bool(row.calls) != bool(row.numbers) for row in bench.ROWS.values())


def test_a_comparison_has_the_times_of_all_sides_and_the_memory_of_each():
    made = []
    calls = {side: lambda side=side: made.append(side) or list for side in ("base", "ours", "bf16")}
    row = bench.Row("a goal", calls)
    assert bench.parts_of(row) == ("time", "base", "ours")
    assert set(bench.measure_part(row, "time")) == {"base_s", "ours_s", "bf16_s"}
    assert bench.measure_part(row, "ours")["ours_gb"] > 0
    assert made == ["base", "ours", "bf16", "ours"]


def test_sides_are_timed_in_turn_after_a_warm_up():
    called = []

    def first_is_slow():
        time.sleep(0 if called else 0.2)
        called.append("a")
    seconds = bench.medians(1, first_is_slow, lambda: called.append("b"))
    assert "".join(called) == "abab" and len(seconds) == 2 and max(seconds) < 0.1


@pytest.mark.slow
def test_surfaces_are_those_of_surface_distance():
    pytest.importorskip("surface_distance")
    maps = bench.ellipsoid_maps((256, 256, 160))
    np.testing.assert_allclose(bench.scores_of_metrics(maps, (0.8, 0.8, 1.5)),
                               bench.scores_of_surface_distance(maps, (0.8, 0.8, 1.5)), atol=1e-6)


@pytest.mark.slow
def test_a_part_is_measured_in_a_process_of_its_own():
    assert 0 < bench.in_own_process("heads", "ours")["ours_gb"] < 100
    assert "KeyError" in bench.in_own_process("heads", "theirs")["error"]


def test_rows_that_were_not_measured_again_stay_in_the_file(monkeypatch, tmp_path):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"rows": {"heads": {"goal": "20x", "kept": 1}}}))
    monkeypatch.setattr(bench, "in_own_process", lambda name, part: {"seconds": 0.25})
    assert bench.main(["--only", "huge", "--out", str(out)]) == 0
    assert list(json.loads(out.read_text())["rows"]) == ["heads", "huge_ct"]
    *_, last = out.with_suffix(".md").read_text().splitlines()
    assert last == "| huge ct | 4 GB | seconds 0.25 |  |"


# ---- the GPU's measurements ----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("backbone, size", [("unet", TINY), ("swin", TINY_SWIN)])
def test_every_form_computes_the_same_and_a_piece_is_the_only_class_that_is_swapped(backbone, size):
    before = dict(fast.FAST)
    want = logits_of("plain", backbone, size)
    for side in ("fast", "WindowAttention", "UniversalModel"):
        torch.testing.assert_close(logits_of(side, backbone, size), want, rtol=1e-3, atol=1e-3)
    swapped = {type(m) for m in bench.build("UniversalModel", backbone, size).modules()}
    assert swapped & set(before.values()) == {fast.FastUniversalModel}
    assert fast.FAST == before


@pytest.fixture
def tf32():
    """Restores the settings of TF32, which are those of the process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_no_measurement_comes_twice_and_the_most_important_come_first():
    plan = bench.measurements()
    assert len(set(plan)) == len(plan)
    assert [m.mode for m in plan[:24]] == ["bf16"] * 12 + ["fp32"] * 12
    assert plan[24].table == "scan" and plan[-1].side == "compiled"


@pytest.mark.slow
def test_measurements_of_the_gpu_on_the_cpu(tmp_path, capsys, tf32):
    """Windows and steps of all forms and precisions, a piece, a whole scan and a failure."""
    plan = [bench.Measurement("networks", "window", side=side, mode=mode, batch=batch)
            for side, mode, batch in (("base", "fp32", 1), ("plain", "tf32", 1),
                                      ("fast", "bf16", 1), ("fast", "fp32", 4))]
    plan += [bench.Measurement("networks", "step", mode="fp32", batch=2),
             bench.Measurement("pieces", "window", side="UniversalModel", variant="only heads"),
             bench.Measurement("scan", "no-postprocess", batch=4),
             bench.Measurement("pieces", "step", backbone="resnet", mode="fp32")]
    out = tmp_path / "results" / "bench-cuda.json"
    content = bench.run_measurements(plan, "cpu", out, {"device": "none"}, size=TINY, runs=2,
                                     shape=(40, 36, 30))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert printed == content["measurements"] == json.loads(out.read_text())["measurements"]
    *good, failed = printed
    assert all(e.get("ms", e.get("s")) > 0 and e["gb"] is None for e in good)
    assert "KeyError" in failed["error"] and "ms" not in failed
    assert out.with_suffix(".md").read_text() == bench.tables(content)


def test_precision_is_that_of_the_mode(monkeypatch, tf32):
    seen = []

    def window(side, backbone, amp, **_):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, amp))
        return list
    monkeypatch.setattr(bench, "window", window)
    for mode in bench.MODES:
        bench.measure(bench.Measurement("networks", "window", mode=mode), "cpu")
    assert seen == list(bench.MODES.values())


def test_what_no_time_is_left_for_is_named(tmp_path):
    content = bench.run_measurements(bench.measurements()[:2], "cpu", tmp_path / "b.json", {},
                                     limit_s=0)
    assert [e["error"] for e in content["measurements"]] == [
        "not run: the time limit was reached"] * 2


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    with contextlib.suppress(SystemExit):
        bench.main(["--device", "cuda"])
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
