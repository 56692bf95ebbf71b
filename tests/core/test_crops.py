"""Crops and batches: what a training step sees, and the masks of its classes."""
import dataclasses

import numpy as np
import pytest
import torch

import data
import labels
from support import cache, class_tables


# ---- crops ---------------------------------------------------------------------------------------
def crops(scans, **kwargs):
    return data.Crops(scans, patch=64, length=400, **kwargs)


def test_crop_number_i_is_a_pure_function_of_seed_and_i(tiny_scans):
    a, b = crops(tiny_scans, seed=3), crops(tiny_scans, seed=3)
    _ = [b[i] for i in (9, 2, 5)]
    for key in ("image", "label_rows"):
        assert torch.equal(a[7][key], b[7][key])
    other_seed = crops(tiny_scans, seed=4)
    assert not all(torch.equal(a[i]["image"], other_seed[i]["image"]) for i in range(4))


def crops_of(scans, n):
    dataset = data.Crops(scans, patch=16, length=n, augment=False)
    return [dataset[i] for i in range(n)]


def drawn_crop(scan, patch, seed):
    """A crop of one scan, which is not augmented -> image, label rows."""
    rng = np.random.default_rng(seed)
    k = data.draw_class(scan.present_classes(), scan.case, rng)
    corner = [c - patch // 2 for c in data.draw_centre(scan, k, rng)]
    return data.crop(scan.image(), scan.label_rows(), corner, patch)


def test_two_of_three_crops_are_centred_on_a_class_and_each_gets_its_turn(tiny_scans):
    """With a patch of 16, the centre voxel is the drawn one wherever the border allows it."""
    counts, n = np.zeros(3), 600
    for i in range(n):
        _, label_rows = drawn_crop(tiny_scans[0], 16, i)
        counts[label_rows[8, 8, 8]] += 1         # 0 background, 1 liver, 2 tumour (and liver)
    share = counts / n
    assert abs(share[0] - 1 / 3) < 0.1
    assert share[1] > 0.15 and share[2] > 0.3    # tumour voxels are drawn as tumour and as liver


def test_a_class_that_few_scans_annotate_is_seen_as_often_as_one_that_all_do(tiny_scans):
    """Four scans with a liver, of which one also annotates the tumour. A crop is centred with 1/3
    each on a liver (of any of the four), on the tumour (of that one) and on background (of any),
    so the one scan gives 1/3 + 2/3 / 4 = 1/2 of the crops, and each of the others 1/6."""
    scan = tiny_scans[0]
    liver, tumour = sorted(scan.present_classes())
    scans = []
    for i in range(4):
        annotated = scan.case.annotated.copy()
        annotated[tumour] = i == 0
        scans.append(dataclasses.replace(scan, case=dataclasses.replace(
            scan.case, name=str(i), annotated=annotated)))
    assert data.scans_with_class(scans) == {liver: scans, tumour: scans[:1]}
    n = 600
    names = [crop["name"] for crop in crops_of(scans, n)]
    assert abs(names.count("0") / n - 1 / 2) < 0.06
    assert abs(names.count("1") / n - 1 / 6) < 0.05


def test_every_dataset_is_drawn_as_often_however_many_scans_it_has(tiny_scans):
    """Three scans of one dataset and one of another."""
    names = [crop["name"] for crop in crops_of(tiny_scans[:1] * 3 + tiny_scans[2:3], 400)]
    assert abs(np.mean([name.startswith("Dataset902") for name in names]) - 1 / 2) < 0.08


def test_centres_lie_anywhere_in_a_class_of_which_not_all_voxels_are_kept(tiny_cases, tmp_path,
                                                                         monkeypatch):
    """50 voxels of a liver, whose planes are stored in order, are not those of its first planes."""
    monkeypatch.setattr(cache, "VOXELS_PER_CLASS", 50)
    scan, = cache.build_all(tiny_cases[:1], tmp_path, 4.0, quiet=True)
    liver = min(scan.present_classes())
    planes = np.flatnonzero(scan.case.label_map.regions[:, liver][scan.label_rows()].any((1, 2)))
    centres = scan.class_voxels(liver)
    assert len(centres) == 50
    assert abs(np.median(centres[:, 0]) - np.median(planes)) < len(planes) / 4


def scan_of(folder, image, label_rows):
    """A cache entry of these two arrays, in which no class has a voxel: all crops are background.

    A crop of one voxel is then exactly the voxel that was drawn.
    """
    cache._write_entry(folder, image, label_rows, np.zeros((0, 3), np.uint16),
                      {"points": {}, "shape": image.shape})
    case = data.Case("d/c", "d", None, None, None, np.zeros(32, bool))
    return data.Scan(case, folder, cache._read_meta(folder))


def test_background_crops_are_centred_in_the_body(tmp_path):
    """The body is a slab of a fifth of the scan, half of it labelled: every one of 200 crops is
    centred on its other half, none on air (image 0), where label rows are 0 too."""
    image = np.zeros((20, 20, 20), np.float32)
    label_rows = np.zeros((20, 20, 20), np.uint8)
    image[8:12] = np.linspace(0.25, 1, 400).reshape(20, 20)
    label_rows[8:12, :10] = 3
    scan = scan_of(tmp_path / "entry", image, label_rows)
    values = []
    for i in range(200):
        voxel, row = drawn_crop(scan, 1, i)
        again, _ = drawn_crop(scan, 1, i)
        assert voxel.shape == (1, 1, 1) and voxel > 0 and row == 0 and voxel == again
        values.append(float(voxel.item()))
    assert len(set(values)) > 90                 # anywhere in it, not at one place


def test_a_scan_without_background_gives_crops_all_the_same(tmp_path):
    """A body that is labelled everywhere: a labelled voxel. No body at all: any voxel."""
    image = np.zeros((20, 20, 20), np.float32)
    image[8:12] = 0.5
    labelled = np.full((20, 20, 20), 3, np.uint8)
    scan = scan_of(tmp_path / "labelled", image, labelled)
    for i in range(20):
        voxel, row = drawn_crop(scan, 1, i)
        assert voxel > 0 and row == 3
    scan = scan_of(tmp_path / "air", 0 * image, labelled)
    voxel, row = drawn_crop(scan, 1, 0)
    assert voxel == 0 and row == 3


def test_a_crop_is_moved_inside_the_scan_and_padded_where_the_scan_is_smaller():
    """Axes of 10, 10 and 2 voxels, a cube of 4 from (3, 7, -2) on: planes 3 to 6, planes 6 to 9,
    and one plane of zeros on either side of both planes."""
    array = 1 + np.arange(200).reshape(10, 10, 2)
    out = data.cut_out(array, (3, 7, -2), 4)
    assert out.shape == (4, 4, 4)
    assert np.array_equal(out[:, :, 1:3], array[3:7, 6:10])
    assert not out[:, :, 0].any() and not out[:, :, 3].any()
    image, label = data.crop(array.astype(np.float16), array.astype(np.uint8), (3, 7, -2), 4)
    assert image.dtype == np.float32 and np.array_equal(image, out)
    assert label.dtype == np.uint8 and np.array_equal(label, out)


def of_public_dataset(scans, **how):
    return [dataclasses.replace(scan, case=dataclasses.replace(scan.case, **how))
            for scan in scans]


def test_lits_and_three_msd_tasks_show_their_tumours_more_often(tiny_scans):
    """5 : 1 : 1 crops on tumour, organ and background. 5/7 are centred on a tumour voxel, and 1/7
    on the liver, of which the tumour is a part."""
    scan, = of_public_dataset(tiny_scans[:1], tumour_crops=True)
    tumours, n = 0, 600
    for i in range(n):
        _, label_rows = drawn_crop(scan, 16, i)
        tumours += label_rows[8, 8, 8] == 2
    label_rows = scan.label_rows()
    part = np.mean(label_rows[label_rows > 0] == 2)
    assert abs(tumours / n - (5 + part) / 7) < 0.06


def test_msd_tasks_are_magnified_and_others_are_not(tiny_scans, monkeypatch):
    """Image and label together, by 1.3 to 1.5 on each axis."""
    monkeypatch.setattr(data, "ZOOM_P", 1.0)
    monkeypatch.setattr(data, "ROTATE_P", 0.0)
    monkeypatch.setattr(data, "SHIFT_P", 0.0)
    plain = crops(tiny_scans, seed=0, augment=False)
    magnified = crops(of_public_dataset(tiny_scans[:2], zoomed=True) + tiny_scans[2:], seed=0)
    of_liver = [i for i in range(60) if magnified[i]["name"].startswith("Dataset901")]
    liver = [sum(int((crops_[i]["label_rows"] > 0).sum()) for i in of_liver)
             for crops_ in (magnified, plain)]
    assert 1.2 ** 3 < liver[0] / liver[1] < 1.6 ** 3
    item = magnified[of_liver[0]]
    bright = item["image"][0].numpy() > 0.52                 # the liver has 110 HU: 0.67
    assert item["image"].shape == (1, 64, 64, 64)
    assert bright[item["label_rows"].numpy() == 1].mean() > 0.9
    of_kidney = next(i for i in range(60) if plain[i]["name"].startswith("Dataset902"))
    for key in ("image", "label_rows"):
        assert torch.equal(magnified[of_kidney][key], plain[of_kidney][key])


def test_image_and_label_are_turned_together_about_the_third_axis(monkeypatch):
    """By 90, 180 or 270 degrees: voxel (x, y, z) goes to one of three places of its plane z."""
    monkeypatch.setattr(data, "ROTATE_P", 1.0)
    monkeypatch.setattr(data, "SHIFT_P", 0.0)
    cube = np.arange(27).reshape(3, 3, 3)
    places = set()
    for seed in range(20):
        image, label = data.rotate_and_shift(cube.astype(np.float32), cube,
                                             np.random.default_rng(seed))
        assert np.array_equal(image, label)
        assert np.array_equal(label[1, 1], cube[1, 1])       # the axis of the turn
        places.add(tuple(np.argwhere(label == cube[0, 1, 2])[0].tolist()))
    assert places == {(1, 0, 2), (2, 1, 2), (1, 2, 2)}


def test_intensities_are_shifted_by_one_number_and_labels_are_not(monkeypatch):
    monkeypatch.setattr(data, "ROTATE_P", 0.0)
    monkeypatch.setattr(data, "SHIFT_P", 1.0)
    cube = np.zeros((2, 2, 2), np.float32)
    shifts = []
    for seed in range(50):
        image, label = data.rotate_and_shift(cube, cube, np.random.default_rng(seed))
        assert np.ptp(image) == 0 and not label.any() and image.dtype == np.float32
        shifts.append(image[0, 0, 0])
    assert -0.1 <= min(shifts) < -0.05 and 0.05 < max(shifts) <= 0.1


# ---- batches -------------------------------------------------------------------------------------
def test_a_batch_has_these_keys_types_and_shapes(tiny_scans):
    """regions has 3 rows for the liver (background, liver, tumour) and 3 for the kidneys
    (background, right, left), of which one is taken away here: an all-false row is added."""
    dataset = crops(tiny_scans, seed=0)
    items = [dataset[i] for i in range(6)]
    for item in items:
        if item["name"].startswith("Dataset902"):
            item["regions"], item["known"] = item["regions"][:2], item["known"][:2]
    batch = data.collate(items)
    assert {key: (value.dtype, tuple(value.shape))
            for key, value in batch.items() if key != "name"} == {
        "image": (torch.float32, (6, 1, 64, 64, 64)),
        "label_rows": (torch.int32, (6, 64, 64, 64)),
        "regions": (torch.bool, (6, 3, 32)),
        "known": (torch.bool, (6, 3, 32)),
        "annotated": (torch.bool, (6, 32))}
    assert batch["name"] == [item["name"] for item in items]
    kidney = next(i for i in range(6) if batch["name"][i].startswith("Dataset902"))
    assert len(items[kidney]["regions"]) == 2                # as it was before
    assert torch.equal(batch["regions"][kidney, :2], items[kidney]["regions"])
    assert not batch["regions"][kidney, 2:].any() and batch["known"][kidney, 2:].all()


def test_targets_of_one_label_map():
    """Liver (0), Right Kidney (1), Left Kidney (2), Liver Tumor (3). Value 3 says nothing; whether
    a kidney, value 4, is the right or the left one is not known without the rest of the body."""
    table = class_tables.make_classes(["Liver", "Right Kidney", "Left Kidney", "Liver Tumor"])
    label_map = labels.label_map({"liver": 1, "tumor": 2, "ignore": 3, "kidney": 4}, table,
                                 context="Liver")
    y, annotated, known = data.targets(np.array([[[0, 1, 2, 3]]]), label_map)
    assert y[:, 0, 0].int().tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4, [0, 0, 1, 0]]
    assert known[:, 0, 0].int().tolist() == [[1, 1, 1, 0]] * 4
    assert annotated.tolist() == [True] * 4
    assert data.targets(np.array([[[4]]]), label_map)[1].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="label map: label values"):
        data.targets(np.array([[[7]]]), label_map)


def test_masks_of_classes_by_hand():
    """Rows background, liver, tumour in the liver; classes liver (0), spleen (1), tumour (2)."""
    regions = torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 0, 1]]], dtype=torch.bool)
    label_rows = torch.tensor([0, 1, 2]).view(1, 3, 1, 1)
    y = data.masks_of_classes(label_rows, regions, torch.tensor([2, 0]))
    assert y.shape == (1, 2, 3, 1, 1)
    assert y.flatten(2).int().tolist() == [[[0, 0, 1], [0, 1, 1]]]
