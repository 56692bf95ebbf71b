"""Facts about the synthetic scans: they are reproducible, organs lie on their own side, and grey
values alone do not tell the classes apart."""
import json

import nibabel as nib
import numpy as np
import pytest

from experiments import phantom
from experiments.phantom import DATASETS, SPELLING, TEST, TRUTH, make_scan, values_for
from support import class_tables, datasets, processes

SEEDS = (0, 1, 2, 3)
HOSTS = {"Liver Tumor": {"Liver"},
         "Kidney Cyst": {"Left Kidney", "Right Kidney"}, "Lung Tumor": {"Left Lung", "Right Lung"},
         "Pancreas Tumor": {"Pancreas"}}


@pytest.fixture(scope="module")
def scans():
    return [make_scan(seed) for seed in SEEDS]


def _mask(truth, *classes):
    return np.isin(truth, [v for v, names in TRUTH.items() if names & set(classes)])


def _centroid_mm(mask, affine):
    return (affine @ np.append(np.argwhere(mask).mean(0), 1))[:3]


def hu_classifier_dice(scans):
    """Mean Dice over the classes of the best classifier that sees only a voxel's HU.

    It is fitted on the truth itself, and classes may share bins, so no real classifier is better.
    """
    bins = [np.clip((hu.ravel() + 1030) // 10, 0, 409).astype(int) for hu, _, _ in scans]
    total = sum(np.bincount(b, minlength=410) for b in bins)
    dice = []
    for name in SPELLING:
        hits = sum(np.bincount(b[_mask(truth, name).ravel()], minlength=410)
                   for b, (_, truth, _) in zip(bins, scans, strict=True))
        if hits.sum():
            dice.append(best_dice_of_bins(hits, total))
    return float(np.mean(dice))


def best_dice_of_bins(hits, total):
    """The best Dice of a class that is predicted wherever the grey value lies in a set of bins.

    hits   voxels of the class in each bin
    total  all voxels in each bin

    The best set holds the bins with the largest shares of the class; all sizes of it are tried.
    """
    order = np.argsort(-hits / np.maximum(total, 1))
    return (2 * hits[order].cumsum() / (total[order].cumsum() + hits.sum())).max()


def test_best_hu_classifier_stays_below_half(scans):
    assert hu_classifier_dice(scans) < 0.5


def test_hu_classifier_solves_a_scan_whose_classes_have_their_own_hu():
    """A bin of its own for every class gives a Dice of 1, so the test above can fail."""
    truth = np.repeat(np.arange(1, 18, dtype=np.uint8), 27).reshape(17, 3, 9)
    assert hu_classifier_dice([(truth.astype(np.int16) * 100 - 1000, truth, np.eye(4))]) == 1.0


def test_the_same_seed_gives_the_same_scan_and_a_healthy_body_the_same_without_lesions(scans):
    assert all(np.array_equal(a, b) for a, b in zip(make_scan(SEEDS[0]), scans[0], strict=True))
    assert not np.array_equal(scans[0][1], scans[1][1])
    _, truth, affine = make_scan(SEEDS[3], healthy=True)
    with_lesions = scans[3][1]
    lesions = _mask(with_lesions, *HOSTS)
    assert np.array_equal(affine, scans[3][2])
    assert not _mask(truth, *HOSTS).any() and lesions.any()
    assert np.array_equal(truth[~lesions], with_lesions[~lesions])


def test_unseen_hospital_has_thick_slices_and_an_unknown_one_is_refused():
    _, _, affine = make_scan(0, hospital="b")
    assert nib.affines.voxel_sizes(affine).max() == pytest.approx(5.0)
    with pytest.raises(ValueError, match='"a" or "b"'):
        make_scan(0, hospital="c")


def test_organs_lie_on_their_side_in_world_space_whatever_the_axis_order(scans):
    assert len({nib.aff2axcodes(affine) for _, _, affine in scans}) > 2
    for hu, truth, affine in scans:
        middle = _centroid_mm(hu > -300, affine)            # +x is the patient's right in RAS+
        at = {name: _centroid_mm(_mask(truth, name), affine) - middle
              for name in SPELLING if _mask(truth, name).any()}
        assert at["Liver"][0] > 20 and at["Spleen"][0] < -40
        assert at["Right Lung"][0] > 30 and at["Left Lung"][0] < -30
        assert at["Postcava"][0] > at["Aorta"][0]
        assert at["Right Lung"][2] > at["Liver"][2] > at["Pancreas"][2]
        if "Right Kidney" in at:
            assert at["Right Kidney"][0] > 30 and at["Right Kidney"][1] < at["Liver"][1]


def _neighbours(mask):
    ring = np.zeros_like(mask)
    for axis in range(3):
        ring |= np.roll(mask, 1, axis) | np.roll(mask, -1, axis)
    return ring & ~mask


def test_lesions_touch_their_host(scans):
    """Among the neighbours of a lesion's voxels are voxels of its host organ."""
    for _, truth, _ in scans:
        for value, classes in TRUTH.items():
            if len(classes) == 2 and (truth == value).any():
                host = next(v for v, names in TRUTH.items() if names == classes - HOSTS.keys())
                assert (truth[_neighbours(truth == value)] == host).mean() > 0.1


def test_label_values_by_hand():
    """Truth value -> label value.

    Dataset105: left lung (11) and its tumour (16) are 1, right lung (10) and its tumour (15) are 2.
    Dataset101: kidneys (2, 3) are 1, their cysts (13, 14) are 2.
    """
    trunk = values_for(DATASETS["Dataset105_PhantomTrunk"])
    assert [int(trunk[v]) for v in (0, 5, 10, 11, 15, 16)] == [0, 0, 2, 1, 2, 1]
    kidney = values_for(DATASETS["Dataset101_PhantomKidney"])
    assert [int(kidney[v]) for v in (2, 3, 13, 14, 15, 16)] == [1, 1, 2, 2, 0, 0]
    assert np.array_equal(values_for(DATASETS[TEST]), np.arange(18))


@pytest.mark.slow
def test_each_dataset_labels_its_part_and_nothing_else(tmp_path):
    """Five scans, one per dataset. A scan that is written twice gives the same bytes."""
    assert phantom.main(["--out", str(tmp_path), "--scans", "5", "--test-scans", "1",
                         "--seed", "7"]) == 0
    images = []
    for folder in sorted(tmp_path.iterdir()):
        meta = json.loads((folder / "dataset.json").read_text())
        allowed = np.concatenate([np.atleast_1d(v) for v in meta["labels"].values()])
        split = "Ts" if folder.name == TEST else "Tr"
        assert meta["numTraining"] == (split == "Tr")
        assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", f"images{split}",
                                                            f"labels{split}"]
        label, image = (nib.load(next((folder / f"{kind}{split}").iterdir()))
                        for kind in ("labels", "images"))
        values = np.asarray(label.dataobj)
        assert np.isin(values, allowed).all() and values.any()
        assert label.get_data_dtype() == np.uint8 and image.get_data_dtype() == np.int16
        assert np.allclose(label.affine, image.affine) and label.header["qform_code"] == 1
        images.append(image.dataobj[:].tobytes())
    assert len(set(images)) == 6
    phantom._write_case(phantom.Job(tmp_path / "Dataset104_PhantomSpleen", "again",
                                    2 * (10 ** 6 * 7 + 3), "Tr", "abdomen"))
    files = sorted((tmp_path / "Dataset104_PhantomSpleen" / "imagesTr").iterdir())
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_third_test_scan_of_the_abdomen_has_no_lesions(tmp_path):
    def healthy(anatomy):
        jobs = phantom._deal(tmp_path, 5, 6, 1, anatomy)
        return [job.case[-1] for job in jobs if job.healthy]
    assert healthy("abdomen") == ["2", "5"] and healthy("knee") == []
    phantom._write_case(phantom.Job(tmp_path / TEST, "t", 3, "Ts", "abdomen", healthy=True))
    label = np.asarray(nib.load(tmp_path / TEST / "labelsTs/t.nii.gz").dataobj)
    sick = phantom.values_for(phantom.DATASETS[TEST])[12:18]        # the lesions of TRUTH
    assert label.any() and not np.isin(label, sick).any()


def test_a_users_mistake_is_one_line_and_status_two(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    args = ["--out", str(tmp_path / "file" / "data"), "--scans", "1"]
    assert processes.run(phantom.main, args) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- the knee ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def knees():
    return [phantom.make_knee(seed) for seed in SEEDS]


def test_a_knee_is_the_right_way_round_in_any_axis_order(knees):
    assert len({nib.aff2axcodes(affine) for _, _, affine in knees}) > 2
    again = phantom.make_knee(SEEDS[0])
    assert all(np.array_equal(a, b) for a, b in zip(knees[0], again, strict=True))
    for grey, truth, affine in knees:
        assert grey.dtype == np.int16 and grey.min() >= 0
        at = {c: _centroid_mm(truth == v, affine) for v, c in phantom.KNEE.items()}
        ml = {c: (truth == v).sum() * abs(np.linalg.det(affine)) / 1000
              for v, c in phantom.KNEE.items()}
        for part in ("Meniscus", "Tibial Cartilage"):             # a right knee: lateral is +x
            assert 25 < (at[f"Lateral {part}"] - at[f"Medial {part}"])[0] < 60
            assert at["Femur"][2] > at[f"Medial {part}"][2] > at["Tibia"][2]
            assert 1 < ml[f"Medial {part}"] < 12 and 1 < ml[f"Lateral {part}"] < 12
        assert ml["Femur"] > 60 and 8 < ml["Femoral Cartilage"] < 40


def test_cartilage_lies_on_its_bone_and_menisci_between(knees):
    """A cartilage touches its bone, and a meniscus the cartilages above and below it."""
    for _, truth, _ in knees:
        near = {v: set(truth[_neighbours(truth == v)].tolist()) for v in phantom.KNEE}
        assert 1 in near[2] and 3 in near[4] and 3 in near[5]
        assert {2, 4} <= near[6] and {2, 5} <= near[7]


def test_grey_alone_does_not_solve_a_knee(knees):
    grey = np.concatenate([g.ravel() * (1000 / np.percentile(g, 99)) for g, _, _ in knees])
    bins = np.clip(grey, 0, 1500).astype(int) // 10
    truth = np.concatenate([t.ravel() for _, t, _ in knees])
    total = np.bincount(bins, minlength=151)
    dice = [best_dice_of_bins(np.bincount(bins[truth == v], minlength=151), total)
            for v in phantom.KNEE]
    assert np.mean(dice) < 0.5


@pytest.mark.slow
def test_knee_datasets_are_written_with_their_class_table(tmp_path):
    assert phantom.main(["--out", str(tmp_path), "--scans", "3", "--test-scans", "1",
                         "--anatomy", "knee"]) == 0
    classes = class_tables.load_classes(tmp_path / "knee.json")
    assert [c.name for c in classes] == list(phantom.KNEE.values())
    annotated = {}
    for folder in datasets.find_datasets([tmp_path]):
        case = datasets.read_dataset(folder, classes)[0]
        annotated[folder.name] = [classes[k].name for k in np.flatnonzero(case.annotated)]
    assert annotated == {
        "Dataset201_PhantomKneeBones": ["Femur", "Tibia"],
        "Dataset202_PhantomKneeCartilages": ["Femoral Cartilage", "Medial Tibial Cartilage",
                                             "Lateral Tibial Cartilage"],
        "Dataset203_PhantomKneeMenisci": ["Medial Meniscus", "Lateral Meniscus"]}
    assert "MRI" in (tmp_path / "Dataset201_PhantomKneeBones" / "dataset.json").read_text()
