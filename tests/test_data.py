"""Files, geometry, datasets, the cache and the crops."""
import dataclasses
import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHARED, affine_of, body, needs_shared, write_nifti

import data
import labels


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "SAR"])
def test_any_axis_order_gives_the_same_anatomy(tmp_path, codes):
    """Voxel values are 1000 x + 10 y + z in world mm: they must follow the coordinates."""
    A = affine_of(codes, (2, 3, 4))
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in (5, 6, 7)], indexing="ij"), -1)
    xyz = ijk @ A[:3, :3].T + A[:3, 3]
    write_nifti(tmp_path / "a.nii.gz", (xyz @ [1000, 10, 1]).astype(np.int32), A)
    v = data.load_volume(tmp_path / "a.nii.gz")
    assert nib.aff2axcodes(v.affine) == ("R", "A", "S")
    at = v.affine @ [2, 3, 4, 1]
    assert v.array[2, 3, 4] == at[:3] @ [1000, 10, 1]
    assert sorted(v.spacing_mm) == [2, 3, 4]


def test_saved_result_has_the_scans_grid_codes_and_voxels(tmp_path):
    A = affine_of("PIR", (2, 3, 4))
    img = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(5, 6, 7), A)
    img.set_sform(A, 2)
    img.set_qform(A, 3)
    img.header.set_xyzt_units("mm", "sec")
    nib.save(img, tmp_path / "scan.nii.gz")
    v = data.load_volume(tmp_path / "scan.nii.gz")
    data.save_like(tmp_path / "out.nii.gz", (v.array % 251).astype(np.uint8),
                   tmp_path / "scan.nii.gz")
    a, b = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(b.dataobj), np.asarray(a.dataobj) % 251)
    assert np.array_equal(a.affine, b.affine) and b.get_data_dtype() == np.uint8
    for key in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units", "dim"):
        assert np.array_equal(a.header[key], b.header[key]), key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.nii.gz", "scan.nii.gz"]


def test_scaled_integers_are_read_in_hounsfield_units(tmp_path):
    img = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    img.header.set_slope_inter(2.0, -1024.0)
    nib.save(img, tmp_path / "a.nii")
    want = np.arange(24).reshape(2, 3, 4) * 2.0 - 1024
    assert np.array_equal(data.load_volume(tmp_path / "a.nii").array, want)


def test_ramp_in_world_coordinates_survives_resample_and_restore():
    """Each axis: first and last centres stay, so x + 2y + 3z (mm) is exact at every new voxel."""
    shape, spacing = (21, 18, 13), np.array([0.8, 1.1, 5.0])
    grid = np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)],
                       indexing="ij")
    ramp = (grid[0] + 2 * grid[1] + 3 * grid[2]).astype(np.float32)
    new = data.target_shape(shape, spacing, 1.5)
    assert new == (12, 13, 41)
    step = [(n - 1) * s / (m - 1) for n, s, m in zip(shape, spacing, new, strict=True)]
    grid = np.meshgrid(*[np.arange(m) * s for m, s in zip(new, step, strict=True)], indexing="ij")
    there = data.resample(ramp, new)
    assert np.abs(there - (grid[0] + 2 * grid[1] + 3 * grid[2])).max() < 1e-4
    assert np.abs(data.resample(there, shape) - ramp).max() < 1e-4


def test_one_voxel_axes_stay_and_labels_take_the_nearest():
    assert data.target_shape((1, 2, 10), (5, 0.1, 1), 1.5) == (1, 2, 7)
    label = np.arange(4, dtype=np.uint8).reshape(4, 1, 1)
    assert data.resample_nearest(label, (7, 1, 1)).ravel().tolist() == [0, 0, 1, 2, 2, 2, 3]
    x = np.arange(6, dtype=np.int16).reshape(1, 2, 3)
    assert np.array_equal(data.resample(x, (1, 2, 3)), x)


def test_preprocess_windows_hu_and_crops_to_what_is_not_air():
    hu = np.full((20, 20, 20), -1000, np.int16)
    hu[5:12, 6:15, 2:19] = np.arange(17)[None, None] * 40 - 300
    image, shape, box = data.preprocess(data.Volume(hu, np.diag([1.5, 1.5, 1.5, 1])))
    assert shape == (20, 20, 20)
    assert box == (slice(5, 12), slice(6, 15), slice(6, 19))     # -140 HU is the first above -175
    assert image[0, 0, 0] == pytest.approx(35 / 425) and image.max() == 1


def test_midline_follows_an_off_centre_body():
    image = np.zeros((80, 50, 50), np.float32)
    image[40:70, 10:40, 5:45] = 0.5           # the body, at 54.5
    image[2:4, 2:4, :] = 0.9                  # a cable
    assert abs(data.body_midline(image) - 54.5) < 1


def test_cache_holds_sides_regions_and_points(tiny, tmp_path):
    folders = data.find_datasets([tiny / "raw"])
    assert [f.name for f in folders] == ["Dataset901_Liver", "Dataset902_Kidney"]
    cases = [c for f in folders for c in data.read_dataset(f, labels.CLASSES)]
    scans = data.build_all(cases, tmp_path / "cache", 4.0)
    liver, kidney = scans[0], scans[2]
    assert sorted(kidney.meta["points"]) == ["1", "2"]
    assert sorted(liver.meta["points"]) == ["26", "5"]
    right, left = kidney.points(1).mean(0), kidney.points(2).mean(0)
    assert right[0] > left[0] + 10            # axis 0 grows to the patient's right
    assert (kidney.case.lm.regions[:, 1][kidney.rows()]).sum() > 100
    assert liver.image().dtype == np.float16 and 0 <= liver.image().min() < liver.image().max() <= 1
    stamp = liver.entry.stat().st_mtime_ns
    again = data.build_all(cases, tmp_path / "cache", 4.0)
    assert again[0].entry.stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "cache").iterdir())) == 4
    other = data.build(cases[0], tmp_path / "cache", 5.0)
    assert other.entry != liver.entry


def test_the_same_scan_in_other_axes_and_type_has_the_same_fingerprint():
    a = np.random.default_rng(0).integers(-1000, 1000, (7, 8, 9)).astype(np.int16)
    assert data.fingerprint(a) == data.fingerprint(a.transpose(2, 0, 1)[::-1].astype(np.float32))
    b = a.copy()
    b[0, 0, 0] += 1
    assert data.fingerprint(a) != data.fingerprint(b)


def test_copies_of_a_scan_stay_on_one_side_of_the_split():
    case = data.Case("d/c", "d", None, None, None, None)
    scans = [data.Scan(case, None, {"fingerprint": str(i // 2)}) for i in range(40)]
    train, val = data.split_scans(scans, 0.25, 0)
    assert len(val) == 10 and not {s.meta["fingerprint"] for s in train} & \
        {s.meta["fingerprint"] for s in val}


def crops(tiny, tmp_path, **how):
    cases = [c for f in data.find_datasets([tiny / "raw"]) for c in data.read_dataset(f, labels.CLASSES)]
    return data.Crops(data.build_all(cases, tmp_path / "cache", 4.0), patch=64, length=400, **how)


def test_crop_number_i_is_a_pure_function_of_seed_and_i(tiny, tmp_path):
    a, b = crops(tiny, tmp_path, seed=3), crops(tiny, tmp_path, seed=3)
    _ = [b[i] for i in (9, 2, 5)]
    assert torch.equal(a[7]["image"], b[7]["image"]) and torch.equal(a[7]["rows"], b[7]["rows"])
    assert not all(torch.equal(a[i]["image"], crops(tiny, tmp_path, seed=4)[i]["image"])
                   for i in range(4))


def test_two_of_three_crops_are_centred_on_a_class_and_each_gets_its_turn(tiny, tmp_path):
    """With a patch of 16 the centre voxel is the drawn one wherever the border allows."""
    ds = crops(tiny, tmp_path, seed=0, augment=False)
    scan, counts, n = ds.datasets[0][0], np.zeros(3), 600
    for i in range(n):
        _, rows = data.crop(scan, 16, np.random.default_rng(i))
        counts[rows[8, 8, 8]] += 1                   # 0 background, 1 liver, 2 tumour (and liver)
    share = counts / n
    assert abs(share[0] - 1 / 3) < 0.1
    assert share[1] > 0.15 and share[2] > 0.3        # tumour: its turn, and its part of the liver's


def test_msd_tasks_show_their_tumours_more_often_and_magnified(tiny, tmp_path, monkeypatch):
    """5 : 1 : 1 crops on tumour, organ, background; zoom 1.3 to 1.5 of image and rows alike."""
    ds = crops(tiny, tmp_path, seed=0, augment=False)
    scan = ds.datasets[0][0]
    scan.case = dataclasses.replace(scan.case, msd=True)
    tumours, n = 0, 600
    for i in range(n):
        _, rows = data.crop(scan, 16, np.random.default_rng(i))
        tumours += rows[8, 8, 8] == 2
    # 5/7 on a tumour voxel; 1/7 on the liver, of which the tumour is a part
    part = np.mean(scan.rows()[scan.rows() > 0] == 2)
    assert abs(tumours / n - (5 + part) / 7) < 0.06

    for name, value in (("ZOOM_P", 1.0), ("ROTATE_P", 0.0), ("SHIFT_P", 0.0)):
        monkeypatch.setattr(data, name, value)
    big, plain = crops(tiny, tmp_path, seed=0), crops(tiny, tmp_path, seed=0, augment=False)
    for d in big.datasets[0]:
        d.case = dataclasses.replace(d.case, msd=True)
    at = [i for i in range(60) if big[i]["name"].startswith("Dataset901")]
    liver = [sum(int((d[i]["rows"] > 0).sum()) for i in at) for d in (big, plain)]
    assert 1.2 ** 3 < liver[0] / liver[1] < 1.6 ** 3
    item = big[at[0]]
    bright = item["image"][0].numpy() > 0.52                      # the liver has 110 HU: 0.67
    assert item["image"].shape == (1, 64, 64, 64)
    assert bright[item["rows"].numpy() == 1].mean() > 0.9
    kidney = next(i for i in range(60) if plain[i]["name"].startswith("Dataset902"))
    assert not big.datasets[1][0].case.msd and \
        torch.equal(big[kidney]["rows"], crops(tiny, tmp_path, seed=0)[kidney]["rows"])


@pytest.mark.parametrize("file, damage", [
    ("image.npy", lambda b: b[:-7]), ("rows.npy", lambda b: None), ("rows.npy", lambda b: b""),
    ("points.npy", lambda b: b[:200]), ("meta.json", lambda b: b""),
    ("meta.json", lambda b: b"[]"),
    ("meta.json", lambda b: b.replace(b'"shape": [', b'"shape": [1'))])
def test_a_damaged_cache_entry_is_made_again(tiny, tmp_path, file, damage):
    case = data.read_dataset(tiny / "raw/Dataset901_Liver", labels.CLASSES)[0]
    scan = data.build(case, tmp_path, 4.0)
    whole = {p.name: p.read_bytes() for p in scan.entry.iterdir()}
    content = damage(whole[file])
    (scan.entry / file).unlink()
    if content is not None:
        (scan.entry / file).write_bytes(content)
    again = data.build(case, tmp_path, 4.0)
    assert {p.name: p.read_bytes() for p in scan.entry.iterdir()} == whole
    assert again.meta == scan.meta and len(list(tmp_path.iterdir())) == 1


def test_label_and_image_a_twentieth_of_a_mm_apart_are_taken_as_one(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "Dataset901_Liver")
    file = folder / "labelsTr/c0.nii.gz"
    img = nib.load(file)
    array, affine = np.asarray(img.dataobj), img.affine.copy()
    affine[1, 3] += 0.05
    nib.save(nib.Nifti1Image(array, affine), file)
    data.build(data.read_dataset(folder, labels.CLASSES)[0], tmp_path / "cache", 4.0)
    assert "note:" in (said := capsys.readouterr().out) and "0.05 mm apart" in said


def test_batch_targets_are_the_rows_looked_up(tiny, tmp_path):
    ds = crops(tiny, tmp_path, seed=0)
    batch = data.collate([ds[i] for i in range(6)])
    ks = torch.nonzero(batch["annotated"].any(0))[:, 0]
    assert ks.tolist() == [1, 2, 5, 26]
    y = data.targets(batch["rows"], batch["regions"], ks)
    b, k = 3, 1
    want = batch["regions"][b][:, ks[k]].numpy()[batch["rows"][b].numpy()]
    assert y.shape == (6, 4, 64, 64, 64) and np.array_equal(y[b, k].numpy(), want)
    assert (~y[:, 3] | y[:, 2]).all()                # a tumour voxel is a liver voxel


def broken(tmp_path, what):
    """A dataset with one fault -> the path that the message must name."""
    folder = tmp_path / "Dataset903_Bad"
    A = np.eye(4)
    image = np.random.default_rng(0).integers(-900, 900, (8, 9, 10)).astype(np.int16)
    label = np.zeros((8, 9, 10), np.uint8)
    info = {"labels": {"liver": 1}}
    if what == "4D":
        image = np.zeros((8, 9, 10, 2), np.int16)
    if what == "label shape":
        label = np.zeros((8, 9, 11), np.uint8)
    if what == "unknown value":
        label[2, 3, 4] = 7
    if what == "no class":
        info = {"labels": {"sacrum": 1}}
    write_nifti(folder / "imagesTr/c_0000.nii.gz", image, A)
    write_nifti(folder / "labelsTr/c.nii.gz", label, A * [2, 1, 1, 1] if what == "affine" else A)
    (folder / "dataset.json").write_text("{" if what == "json" else json.dumps(info))
    path = folder / "imagesTr/c_0000.nii.gz"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    if what == "cut inside":
        raw = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(raw[:-500]))
    if what == "not NIfTI":
        path.write_bytes(b"hello")
    if what == "no label":
        (folder / "labelsTr/c.nii.gz").unlink()
    if what == "no image":
        path.unlink()
    if what == "no imagesTr":
        shutil.rmtree(folder / "imagesTr")
    return folder


FAULTS = {"4D": "3D scan", "label shape": "label has shape", "unknown value": "[7]",
          "no class": "is a class here", "json": "not readable JSON", "truncated": "cut off",
          "cut inside": "cut off", "not NIfTI": "not a readable NIfTI", "no label": "no label for",
          "no image": "no scan", "no imagesTr": "no scan", "affine": "mm apart"}


@pytest.mark.parametrize("what", FAULTS)
def test_a_faulty_dataset_ends_in_one_line_and_status_2(tmp_path, capsys, what):
    import train
    folder = broken(tmp_path, what)
    status = labels.run(train.main, ["--data", str(folder), "--out", str(tmp_path / "run"), "--text",
                                "onehot", "--patch", "64", "--width", "8"])
    err = capsys.readouterr().err.replace("\r", "\n").split("\n")
    line = [e for e in err if e.startswith("error:")]
    assert status == 2 and len(line) == 1 and FAULTS[what] in line[0]
    assert "Dataset903_Bad" in line[0] and "Traceback" not in line[0]
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.part*"))


@needs_shared
def test_shared_real_volumes_are_read_as_they_are():
    ts = data.read_dataset(SHARED / "data/Dataset001_TotalSegExample", labels.CLASSES)
    assert int(ts[0].annotated.sum()) == 19 and "femur_left" in ts[0].lm.unmatched
    lung = data.read_dataset(SHARED / "data/Dataset003_LungOrgansAndTumour", labels.CLASSES)[0]
    assert np.flatnonzero(lung.annotated).tolist() == [15, 16, 29]
    v = data.load_volume(lung.image)
    assert v.array.shape == (125, 125, 100) and np.allclose(v.spacing_mm, 4)


def test_an_mri_is_clipped_at_percentiles_and_scaled_to_unit_deviation():
    """0 ... 999 in shuffled order: percentiles 0.5 and 99.5 are 5.0 and 994.0 (linear)."""
    values = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10).astype(np.int16)
    v = data.Volume(values, np.diag([1.5, 1.5, 1.5, 1]), "mri")
    low, high = data.grey_range(v)
    assert (low, high) == (pytest.approx(4.995), pytest.approx(994.005))
    image, _, box = data.preprocess(v)
    want = np.clip(values.astype(np.float32), low, high) - low
    assert np.allclose(image, (want / want.std())[box], atol=1e-3)


def test_the_modality_is_read_from_dataset_json(tiny, tmp_path):
    import shutil
    folder = tmp_path / "Dataset905_MR"
    shutil.copytree(tiny / "raw" / "Dataset901_Liver", folder)
    info = json.loads((folder / "dataset.json").read_text())
    for key, value, want in (("channel_names", {"0": "MRI"}, "mri"), ("channel_names", {}, "ct"),
                             ("modality", {"0": "T2"}, "mri"), ("modality", {"0": "CT"}, "ct")):
        (folder / "dataset.json").write_text(json.dumps(
            {k: v for k, v in info.items() if k != "channel_names"} | {key: value}))
        assert {c.modality for c in data.read_dataset(folder, labels.CLASSES)} == {want}
    cases = data.read_dataset(folder, labels.CLASSES)
    assert data.median_spacing(cases) == pytest.approx(4.5)


def test_a_list_of_pairs_as_msd_writes_it(tiny, tmp_path):
    folder = tmp_path / "Task42"
    hu, label = body(5)
    write_nifti(folder / "imagesTr/a.nii.gz", hu, affine_of("LPS", (4, 4, 5)))
    write_nifti(folder / "labelsTr/a.nii.gz", label, affine_of("LPS", (4, 4, 5)))
    info = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "3": "kidney",
                                                "2": "liver tumour", "4": "kidney"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]}
    (folder / "dataset.json").write_text(json.dumps(info))
    case, = data.read_dataset(folder, labels.CLASSES)
    assert case.name == "Task42/a" and case.annotated.sum() == 4
    info["training"] = [{"image": "./imagesTr/a.nii.gz"}]
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match='"training" must be'):
        data.read_dataset(folder, labels.CLASSES)


def test_interpolation_makes_its_indices_on_the_device_of_its_data():
    """On the device `meta` an index on the CPU is refused, as on a GPU."""
    on_device = torch.zeros(3, 4, 5, device="meta")
    out = data.interpolate(on_device, np.array([0.0, 0.5, 2.0]), 1)
    assert out.device.type == "meta" and out.shape == (3, 3, 5)
