"""Finding datasets as their users have them: folders, lists, MSD tasks; faulty ones."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, affine_of, needs_shared, write_nifti
from runs import config, error_line

import data
import labels
import train
from support import cache, class_tables, datasets, evaluate, processes

EYE = np.eye(4)
BOX = np.arange(64, dtype=np.int16).reshape(4, 4, 4)


def class_names(mask):
    return {c.name for c, a in zip(labels.CLASSES, mask, strict=True) if a}


def nnunet(folder, cases=("x",), ending=".nii.gz", **info):
    """An nnU-Net raw folder that labels the liver; every case has an image and a label."""
    for case in cases:
        write_nifti(folder / f"imagesTr/{case}_0000{ending}", BOX, EYE)
        write_nifti(folder / f"labelsTr/{case}{ending}", (BOX % 2).astype(np.uint8), EYE)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}, **info}))
    return folder


def listed(*names, image="imagesTr/{}.nii.gz", label="labelsTr/{}.nii.gz"):
    return [{"image": image.format(name), "label": label.format(name)} for name in names]


def case_names_of(*roots):
    return [case.name for case in datasets.read_datasets(roots, labels.CLASSES)]


# ---- finding -----------------------------------------------------------------------------------
def test_hidden_twins_are_no_cases_and_hidden_folders_no_datasets(tmp_path):
    folder = nnunet(tmp_path / "Dataset001_X")
    for path in [*folder.rglob("*.nii.gz")]:
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    nnunet(tmp_path / ".trash")
    assert case_names_of(tmp_path) == ["Dataset001_X/x"]
    nnunet(folder, training=listed("._x", "x"))
    assert case_names_of(tmp_path) == ["Dataset001_X/x"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_list_of_nnunets_first_version_leaves_0000_out(tmp_path, ending):
    folder = nnunet(tmp_path / "Task501_X", ending=ending, training=listed(
        "x", image=f"./imagesTr/{{}}{ending}", label=f"./labelsTr/{{}}{ending}"))
    case, = datasets.read_dataset(folder, labels.CLASSES)
    assert case.image == folder / f"imagesTr/x_0000{ending}" and case.name == "Task501_X/x"


def test_what_is_not_used_is_named(tmp_path, capsys):
    """A stray file, and a dataset two folders deep; a dataset.json inside a dataset is none, nor is
    one in a hidden folder."""
    for path in ("X", "group/Y", "X/imagesTr", "group/.old", ".old/Z"):
        nnunet(tmp_path / path)
    write_nifti(tmp_path / "X/imagesTr/amos_0001 (1).nii.gz", BOX, EYE)
    assert case_names_of(tmp_path) == ["X/x"]
    deep, stray = capsys.readouterr().out.splitlines()
    assert deep == (f"note: 1 datasets lie too deep in {tmp_path} and are not used; pass the "
                    "folder that holds them: group/Y")
    assert "note: 1 files in" in stray and "not used: amos_0001 (1).nii.gz" in stray
    assert case_names_of(tmp_path / "group") == ["Y/x"]


def test_two_of_one_name_are_refused_in_one_line_that_names_both(tmp_path):
    for path in ("a/X", "b/X", "b/Y"):
        nnunet(tmp_path / path)
    with pytest.raises(ValueError, match="two datasets are called X: .*a/X and .*b/X; rename"):
        case_names_of(tmp_path / "a", tmp_path / "b")
    assert case_names_of(tmp_path / "b") == ["X/x", "Y/x"]
    folder = nnunet(tmp_path / "a/X", ending=".nii")
    with pytest.raises(ValueError, match=r"called x: .*x_0000.nii.gz and .*x_0000.nii;"):
        case_names_of(folder)


def test_a_dataset_that_is_given_twice_is_used_once(tmp_path, monkeypatch):
    folder = nnunet(tmp_path / "raw/X")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/alias").symlink_to(folder)
    assert len(datasets.find_datasets([tmp_path / "raw", folder, tmp_path / "link"])) == 1
    monkeypatch.chdir(folder)
    assert case_names_of(".") == ["X/x"] == case_names_of("../X")


def test_a_study_with_one_folder_per_patient_names_cases_after_folders(tmp_path):
    names = ("p1/ct", "p2/imaging", "p3/image_0000", "p4/img")
    for name in names:
        write_nifti(tmp_path / f"X/{name}.nii.gz", BOX, EYE)
        write_nifti(tmp_path / f"X/{name}_seg.nii.gz", BOX % 2, EYE)
    folder = nnunet(tmp_path / "X", (), annotated={"p2": []},
                    training=listed(*names, image="{}.nii.gz", label="{}_seg.nii.gz"))
    cases = datasets.read_dataset(folder, labels.CLASSES)
    assert [case.name for case in cases] == ["X/p1", "X/p2", "X/p3", "X/p4"]
    assert [bool(case.annotated.any()) for case in cases] == [True, False, True, True]


def test_annotated_may_name_what_a_smaller_table_lacks_but_nothing_unknown(tmp_path, capsys):
    """A built-in class, or a structure of the dataset itself; "splen" is a typing error."""
    folder = nnunet(tmp_path / "X", labels={"liver": 1, "larynx": 2},
                    annotated={"x": ["liver", "spleen", "larynx"], "img0099": ["liver"]})
    case, = datasets.read_dataset(folder, class_tables.make_classes(["Femur", "Liver"]))
    assert case.annotated.tolist() == [False, True]
    line, = capsys.readouterr().out.splitlines()
    assert "X/dataset.json" in line and "img0099" in line            # which is no case
    nnunet(folder, annotated={"x": ["liver", "splen"]})
    with pytest.raises(ValueError, match="splen"):
        datasets.read_dataset(folder, class_tables.make_classes(["Femur", "Liver"]))


def test_median_spacing_is_over_scans_and_axes(tiny):
    """Both scans of the dataset have 4, 4.5 and 5 mm."""
    cases = datasets.read_dataset(tiny / "raw/Dataset901_Liver", labels.CLASSES)
    assert datasets.median_spacing(cases) == pytest.approx(4.5)


@needs_shared
def test_shared_real_volumes_are_read_as_they_are():
    ts = datasets.read_dataset(SHARED / "data/Dataset001_TotalSegExample", labels.CLASSES)
    assert int(ts[0].annotated.sum()) == 19 and ts[0].label_map.values.count(75) == 0
    lung = datasets.read_dataset(SHARED / "data/Dataset003_LungOrgansAndTumour", labels.CLASSES)[0]
    assert np.flatnonzero(lung.annotated).tolist() == [15, 16, 29]
    volume = data.load_volume(lung.image)
    assert volume.array.shape == (125, 125, 100) and np.allclose(volume.spacing_mm, 4)


# ---- faults --------------------------------------------------------------------------------------
IMAGE, LABEL = "imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz"
FAULTS = {      # message: what is wrong with a dataset
    "label has shape": lambda folder: write_nifti(folder / LABEL, BOX[:3] % 2, EYE),
    "mm apart": lambda folder: write_nifti(folder / LABEL, BOX % 2, affine_of("RAS", (1, 1, 1))),
    "label values [2] are not": lambda folder: write_nifti(folder / LABEL, BOX % 3, EYE),
    "is a class here": lambda folder: nnunet(folder, labels={"sacrum": 1}),
    "not readable JSON": lambda folder: (folder / "dataset.json").write_text("{"),
    '"training" must be': lambda folder: nnunet(folder, training=[{"image": IMAGE}]),
    "gone.nii.gz: no such image, but": lambda folder: nnunet(folder, training=listed("gone", "x")),
    "x.nii.gz: no label for x_0000": lambda folder: (folder / LABEL).unlink(),
    "no scan": lambda folder: (folder / IMAGE).unlink(),
    "no dataset here": lambda folder: shutil.rmtree(folder / "imagesTr"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_dataset_ends_in_one_line_and_leaves_no_run(tmp_path, capsys, message):
    (tmp_path / "cache").mkdir()
    folder = nnunet(tmp_path / "raw/X")
    FAULTS[message](folder)
    cfg = config(tmp_path, tmp_path / "run", spacing_mm=1.0)
    assert processes.run(train.main, cfg) == 2
    error = error_line(capsys)
    assert message in error and str(tmp_path / "raw") in error
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.part*"))


# ---- modality ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, want", [
    ("CT", "ct"), ("ct", "ct"), ("CTA", "ct"), ("MRI", "mri"), ("mr", "mri"), ("T1w", "mri"),
    ("t2", "mri"), ("FLAIR", "mri")])
def test_a_channel_is_known_by_its_name(tmp_path, name, want):
    for info in ({"channel_names": {"0": name}}, {"channel_names": [name]},
                 {"modality": {"0": name}}, {"modality": name}):
        assert datasets.modality_of(info, "d/dataset.json") == want
    folder = nnunet(tmp_path / "X", channel_names={"0": name})
    for modality, expected in (("", want), ("mri", "mri")):            # as the user says
        case, = datasets.read_dataset(folder, labels.CLASSES, modality=modality)
        assert case.modality == expected


@pytest.mark.parametrize("name", ["zscore", "PET/CT", "0", "act", "CT and MRI", "None"])
def test_a_channel_that_says_neither_is_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match='^d/dataset.json: .*write "CT" or "MRI".*--modality'):
        datasets.modality_of({"channel_names": {"0": name}}, "d/dataset.json")


def test_the_first_of_several_channels_is_used_and_a_line_says_so(capsys):
    channels = {"1": "ADC", "0": "CT"}
    assert datasets.modality_of({"channel_names": channels}, "d/dataset.json") == "ct"
    assert capsys.readouterr().out == \
        "note: d/dataset.json: of 2 channels only the first is used, CT\n"
    assert datasets.modality_of({"channel_names": {}}, "d/dataset.json") == "ct"


def test_the_mr_scans_of_amos_as_distributed_are_treated_as_mri(tmp_path, capsys):
    nnunet(tmp_path / "a", ("amos_0001", "amos_0507"), channel_names={"0": "CT"})
    cases = datasets.read_dataset(tmp_path / "a", labels.CLASSES)
    assert {case.name: case.modality for case in cases} == {"a/amos_0001": "ct",
                                                             "a/amos_0507": "mri"}
    assert "1 cases are MR scans by their AMOS numbers" in capsys.readouterr().out
    cases = datasets.read_dataset(tmp_path / "a", labels.CLASSES, modality="ct")
    assert [case.modality for case in cases] == ["ct", "ct"]           # as the user says


# ---- MSD as distributed --------------------------------------------------------------------------
MSD = {   # folder: (its name in dataset.json, labels, {value: classes})
    "Task03_Liver": ("Liver", {"1": "liver", "2": "cancer"},
                     {1: {"Liver"}, 2: {"Liver", "Liver Tumor"}}),
    "Task06_Lung": ("Lung", {"1": "cancer"}, {1: {"Right Lung", "Lung Tumor"}}),
    "Task07_Pancreas": ("Pancreas", {"1": "pancreas", "2": "cancer"},
                        {1: {"Pancreas"}, 2: {"Pancreas", "Pancreas Tumor"}}),
    "Task08_HepaticVessel": ("HepaticVessel", {"1": "Vessel", "2": "Tumour"},
                             {1: {"Liver", "Hepatic Vessel"},
                              2: {"Liver", "Hepatic Vessel Tumor"}}),
    "Task09_Spleen": ("Spleen", {"1": "spleen"}, {1: {"Spleen"}}),
    "Task10_Colon": ("Colon", {"1": "colon cancer primaries"},
                     {1: {"Colon", "Colon Tumor"}}),
}


@pytest.mark.parametrize("task", MSD)
def test_an_msd_task_as_distributed(task, tmp_path):
    """Its own dataset.json, one scan, and the archive's ._ twins. The case means what it should, in
    training and in evaluation, is marked as MSD's, and its classes are found in the scan."""
    folder, (name, names, meaning) = tmp_path / task, MSD[task]
    label = np.resize(np.array([0, *meaning], np.uint8), (4, 4, 4))
    for part, array in (("imagesTr", BOX), ("labelsTr", label)):
        write_nifti(folder / part / "case_001.nii.gz", array, EYE)
        (folder / part / "._case_001.nii.gz").write_bytes(b"Mac OS X")
    (folder / "._dataset.json").write_bytes(b"Mac OS X")
    (folder / "dataset.json").write_text(json.dumps({
        "name": name, "tensorImageSize": "3D", "modality": {"0": "CT"},
        "labels": {"0": "background", **names},
        "training": listed("case_001", image="./imagesTr/{}.nii.gz", label="./labelsTr/{}.nii.gz"),
        "test": ["./imagesTs/case_002.nii.gz"]}))
    case, = datasets.read_datasets([tmp_path], labels.CLASSES)
    assert case.name == f"{task}/case_001" and case.msd and case.modality == "ct"
    for label_map in (case.label_map, evaluate.read_label_map(case.label, labels.CLASSES)):
        for value, classes in meaning.items():
            row, = label_map.to_label_rows(np.array([value]), "x")
            assert class_names(label_map.regions[row]) == classes
    lesions = {c.name for c in labels.CLASSES if c.lesion}
    wanted = set().union(*meaning.values())
    annotated = class_names(case.annotated)
    assert annotated & lesions == wanted & lesions
    scan = cache.build(case, tmp_path / "cache", 1.0)
    assert {labels.CLASSES[k].name for k in scan.present_classes()} == annotated & wanted


def test_a_case_may_list_structures_of_its_dataset_that_the_class_table_lacks():
    """The table has one of the two structures; "cords" is a typing error, known nowhere."""
    info = {"labels": {"background": 0, "cord": 1, "larynx": 2},
            "annotated": {"a": ["cord", "larynx", "liver"], "b": ["larynx"]}}
    classes, where = [labels.Class("cord")], Path("dataset.json")
    masks = datasets.annotated_per_case(info, classes, where)
    assert {case: mask.tolist() for case, mask in masks.items()} == {"a": [True], "b": [False]}
    info["annotated"]["a"] = ["cords"]
    with pytest.raises(ValueError, match='dataset.json: "annotated", a: no class.*cords'):
        datasets.annotated_per_case(info, classes, where)
