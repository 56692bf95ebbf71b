"""Inference on a whole scan: windows, their blending, and the way back to the scan's own grid."""
import nibabel as nib
import numpy as np
import pytest
import torch
from runs import ball_scan, smooth_levels

import data
import infer


def identity(x, w):
    """(B, 1, ...) -> (B, K, ...): the image itself, times k + 1."""
    return torch.cat([x * (k + 1) for k in range(len(w))], 1)


# ---- the windows ---------------------------------------------------------------------------------
def test_window_starts_are_spread_evenly_and_cover_the_scan():
    """150 - 64 = 86 voxels in steps of at most 32 are three steps, of at most 48 two."""
    assert data.window_starts(150, 64) == [0, 29, 57, 86]
    assert data.window_starts(150, 64, 0.25) == [0, 43, 86]
    assert data.window_starts(64, 64, 0.9) == [0]


def test_window_weight_is_a_gaussian_with_a_lower_bound():
    """Beside the centre of 8 voxels, x = 0.5 on each axis and sigma = 1; in the corner, x = 3.5
    would give exp(-18.4), so that the bound holds. One voxel off along one axis, x = 1.5."""
    weight = data.window_weight(8)
    assert weight.shape == (8, 8, 8)
    assert weight[3, 4, 3].item() == weight.max().item() == pytest.approx(np.exp(-0.375))
    assert weight[5, 4, 3].item() == pytest.approx(np.exp(-(1.5 ** 2 + 0.25 + 0.25) / 2))
    assert weight[0, 0, 0].item() == weight.min().item() == pytest.approx(1e-3)


# ---- blending ------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(64, 64, 64), (65, 64, 97), (150, 71, 64), (30, 1, 100),
                                   (63, 127, 33)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_identity_network_survives_the_sliding_window(shape, overlap):
    x = np.random.default_rng(0).random(shape, np.float32) - 0.3
    out = infer.sliding_window(x, identity, torch.zeros(2, 1), patch=64, overlap=overlap, batch=3)
    assert out.shape == (2, *shape)
    assert np.abs(out[1].numpy() - 2 * x).max() < 1e-5


def test_windows_at_the_border_are_averaged_plainly():
    """Two windows of 8 voxels at 0 and 4 say 1 and 2. Far from both centres on the other two axes
    every weight is at its bound, so their common voxels get 1.5; in the middle the nearer wins."""
    answers = iter((1.0, 2.0))
    out = infer.sliding_window(np.ones((8, 8, 12), np.float32),
                               lambda x, w: torch.full_like(x, next(answers)),
                               torch.zeros(1, 1), patch=8)[0]
    assert out[0, 0].tolist() == pytest.approx([1] * 4 + [1.5] * 4 + [2] * 4)
    assert out[3, 3, 4] < 1.2 and out[3, 3, 7] > 1.8


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("shape", [(48, 48, 64), (48, 96, 32)])
def test_blended_logits_equal_those_of_monai(shape):
    """Against the function of the release, where both place their windows alike: sides are the
    window's plus multiples of half of it. What the network says depends on the place in the
    window, so that the weights show."""
    inferers = pytest.importorskip("monai.inferers")
    place = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 32, 32, 32), np.float32))

    def model(x, w=None):
        return torch.cat([x + place[0], x * place[1]], 1)
    x = np.random.default_rng(0).random(shape, np.float32)
    expected = inferers.sliding_window_inference(
        torch.from_numpy(x)[None, None], (32,) * 3, 1, model, overlap=0.5, mode="gaussian",
        sigma_scale=0.125, padding_mode="constant")[0]
    out = infer.sliding_window(x, model, torch.zeros(2, 1), patch=32, overlap=0.5)
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize("amp", [False, True])
def test_amp_computes_windows_in_bf16(amp):
    seen = []

    def model(x, w):
        seen.append(torch.is_autocast_enabled("cpu"))
        return x
    infer.sliding_window(np.zeros((8, 8, 8), np.float32), model, torch.zeros(1, 1), patch=8,
                         amp=amp)
    assert seen == [amp]


# ---- back to the scan's own grid -----------------------------------------------------------------
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_scan_is_segmented_in_its_own_grid_in_any_axis_order(tmp_path, codes):
    """The logit is positive above 100 HU, so that the result is the ball, in the file's axes."""
    path, ball = ball_scan(tmp_path, codes)
    prob = infer.segment(data.load_volume(path), lambda x, w: (x - 0.647) * 50, torch.zeros(1, 1),
                         spacing_mm=2.5, patch=64)
    mask = (prob[0] > data.THRESHOLD).numpy()
    data.save_like(tmp_path / "out.nii.gz", mask.astype(np.uint8), path)
    out = nib.load(tmp_path / "out.nii.gz")
    found = np.asarray(out.dataobj) == 1
    assert np.array_equal(out.affine, nib.load(path).affine) and found.shape == ball.shape
    assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > 0.95


def probabilities_of(volume, network, K) -> tuple[np.ndarray, np.ndarray]:
    """In NumPy, at 1.5 mm -> (probabilities (K, D, H, W) in the scan's own grid, bool (D, H, W):
    what lies inside the body's box, outside of which everything is background)."""
    image, shape, box = data.preprocess(volume, 1.5)
    logits = infer.sliding_window(image, network, torch.zeros(K, 1), patch=64).numpy()
    prob = np.zeros((K, *shape), np.float32)
    prob[:, *box] = 1 / (1 + np.exp(-logits))
    inside = np.ones(volume.array.shape, bool)
    for axis in range(3):
        at = data.positions(shape[axis], volume.array.shape[axis])
        along = (at >= box[axis].start) & (at <= box[axis].stop - 1)
        inside &= along.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.stack([data.resample(p, volume.array.shape) for p in prob]), inside


def test_probabilities_are_resampled_to_the_scans_own_grid_and_0_outside_the_body(tmp_path):
    """The third class is found nowhere; the fourth everywhere, so that air shows."""
    path, _ = ball_scan(tmp_path, "RAS", (2, 2, 2), (66, 70, 120))
    volume, network = data.load_volume(path), smooth_levels(0.3, 0.5, 3, -1)
    prob = infer.segment(volume, network, torch.zeros(4, 1), spacing_mm=1.5, patch=64).numpy()
    want, inside = probabilities_of(volume, network, 4)
    assert np.abs(prob - want * inside).max() < 1e-5
    assert not inside.all() and prob[2].max() < 0.5 < prob[3][inside].min()
