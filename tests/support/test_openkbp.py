"""Facts about the conversion of OpenKBP: the axes by hand on a grid of 4 x 4 x 4 voxels, equality
with volumes that were converted by other code, and what happens to damaged and missing files."""
import contextlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED, needs_shared

import data
from experiments import openkbp
from support import class_tables, datasets, files, processes

SHARED_CASES = [("Dataset007_OpenKBP", "Tr", "pt_13"), ("Dataset007_OpenKBP", "Tr", "pt_38"),
                ("Dataset008_OpenKBPTest", "Ts", "pt_242")]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(openkbp, "GRID", 4)


def write_patient(folder, *, ct=None, sides_mm=(2, 3, 5), **structures):
    """A patient in the form of the source.

    ct          {index: value}; None: every voxel has its index as value
    structures  SpinalCord=[index, ...]; by default Brainstem=[7]
    """
    folder.mkdir(parents=True)
    ct = {i: i for i in range(64)} if ct is None else ct
    lines = [f"{i},{float(value)}\n" for i, value in ct.items()]
    (folder / "ct.csv").write_text(",data\n" + "".join(lines))
    for name, indices in (structures or {"Brainstem": [7]}).items():
        lines = [f"{i},\n" for i in indices]
        (folder / f"{name}.csv").write_text(",data\n" + "".join(lines))
    (folder / "voxel_dimensions.csv").write_text("".join(f"{side:.18e}\n" for side in sides_mm))
    return folder


def write_source(root, train=("pt_9", "pt_10"), test=("pt_241",)):
    """A cloned repository; of every patient, the scan is different."""
    for part, cases in (("train-pats", train), ("test-pats", test)):
        for case in cases:
            shift = int(case[3:])
            write_patient(root / "provided-data" / part / case,
                          ct={i: i + shift for i in range(64)}, Larynx=[shift % 64, 63])
    return root


def run(source, out):
    return processes.run(openkbp.main, [str(source), "--out", str(out)])


def contents(folder):
    """{file: content} of everything under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- one patient -------------------------------------------------------------------------------
def test_axes_by_hand(small, tmp_path):
    """The source counts 16 to the back, 4 to the left, 1 to the feet, and starts at the head."""
    image, label, affine, _ = openkbp.read_patient(
        write_patient(tmp_path / "pt_1", Mandible=[0, 1, 4, 16]))
    hu = image.astype(int) + 1024
    assert hu[0, 0, 3] == 0
    assert hu[0, 0, 2] == 1                              # a step to the feet
    assert hu[1, 0, 3] == 4                              # a step to the left
    assert hu[0, 1, 3] == 16                             # a step to the back
    for left in range(4):
        for back in range(4):
            for head in range(4):
                assert hu[left, back, head] == 16 * back + 4 * left + 3 - head
    assert np.argwhere(label == 7).tolist() == [[0, 0, 2], [0, 0, 3], [0, 1, 3], [1, 0, 3]]
    assert nib.aff2axcodes(affine) == ("L", "P", "S")
    assert np.array_equal(affine, np.diag([-2, -3, 5, 1]))


def test_a_value_is_hu_plus_1024_and_what_is_not_listed_is_air(small, tmp_path):
    folder = write_patient(tmp_path / "pt_1", ct={0: 1064, 63: 4095, 62: 0})
    image, *_ = openkbp.read_patient(folder)
    assert image.dtype == np.int16
    assert image[0, 0, 3] == 40
    assert image[3, 3, 0] == 3071
    assert np.sum(image == -1024) == 62


def test_the_later_structure_stays_where_two_overlap(small, tmp_path):
    folder = write_patient(tmp_path / "pt_1", Mandible=[0, 4], RightParotid=[0, 1])
    _, label, _, annotated = openkbp.read_patient(folder)
    assert label.dtype == np.uint8
    assert label[0, 0, 3] == 7
    assert label[0, 0, 2] == 3
    assert annotated == ["Right Parotid", "Mandible"]


def test_a_structure_without_a_file_or_a_voxel_is_not_annotated(small, tmp_path):
    folder = write_patient(tmp_path / "pt_1", Larynx=[5], Esophagus=[], PTV70=[6])
    _, label, _, annotated = openkbp.read_patient(folder)
    assert annotated == ["Larynx"]
    assert np.unique(label).tolist() == [0, 6]


def test_windows_line_ends_make_no_difference(small, tmp_path):
    folder = write_patient(tmp_path / "pt_1", Larynx=[5, 9])
    before = openkbp.read_patient(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    after = openkbp.read_patient(folder)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("file, content, problem", [
    ("ct.csv", None, "no such file; the patient has no CT"),
    ("ct.csv", b"", "its first line is not ',data'"),
    ("ct.csv", b",data\n", "it lists no voxel"),
    ("ct.csv", b",data\n3,12.0\n4,1", "its last line is cut off"),
    ("ct.csv", b",data\n3,12.0\n4\n", "not a readable CSV file"),
    ("ct.csv", b",data\n3,twelve\n", "not a readable CSV file"),
    ("ct.csv", b",data\n\xff\xfe\x00,\x85\n", "not a readable CSV file"),
    ("ct.csv", b",data\n3,nan\n", "no grey value"),
    ("ct.csv", b",data\n3,1e9\n", "no grey value"),
    ("ct.csv", b",data\n64,1.0\n", "64 is not the index of a voxel, 0 to 63"),
    ("ct.csv", b",data\n-1,1.0\n", "-1 is not the index of a voxel"),
    ("Brainstem.csv", b",data\n5,\n64,\n", "64 is not the index of a voxel"),
    ("Brainstem.csv", b",data\n2.5,\n", "2.5 is not the index of a voxel"),
    ("Brainstem.csv", b",data\nnan,\n", "nan is not the index of a voxel"),
    ("Brainstem.csv", None, "no contour of any of Brainstem.csv, SpinalCord.csv"),
    ("Brainstem.csv", b",data\n", "no contour of any of Brainstem.csv, SpinalCord.csv"),
    ("voxel_dimensions.csv", None, "No such file"),
    ("voxel_dimensions.csv", b"", "expected the three sides of a voxel"),
    ("voxel_dimensions.csv", b"2.0\n3.0\n5.0\n1.0\n", "expected the three sides of a voxel"),
    ("voxel_dimensions.csv", b"2.0\nnan\n5.0\n", "expected the three sides of a voxel"),
    ("voxel_dimensions.csv", b"2000\n3000\n5000\n", "0.02 to 50 mm, got [2000.0, 3000.0"),
    ("voxel_dimensions.csv", b"2.0\n3.0\n5.", "its last line is cut off"),
])
def test_a_damaged_patient_is_named_in_one_line_and_left_out(small, tmp_path, capsys, file, content,
                                                             problem):
    source = write_source(tmp_path / "open-kbp", train=("pt_10",))
    broken = write_patient(source / "provided-data/train-pats/pt_9")
    if content is None:
        (broken / file).unlink()
    else:
        (broken / file).write_bytes(content)
    assert run(source, tmp_path / "kbp") == 0
    named, *reports = capsys.readouterr().out.splitlines()
    assert named.startswith("left out: ")
    assert str(broken) in named
    assert problem in named
    if file != "Brainstem.csv" or "contour" not in problem:
        assert str(broken / file) in named
    dataset = tmp_path / "kbp/Dataset007_OpenKBP"
    assert reports == [f"{dataset}: patients: 1, left out: 1",
                       f"{tmp_path / 'kbp/Dataset008_OpenKBPTest'}: patients: 1, left out: 0"]
    assert list(json.loads((dataset / "dataset.json").read_text())["annotated"]) == ["pt_10"]
    assert not list(dataset.rglob("*pt_9*"))


# ---- the datasets ------------------------------------------------------------------------------
def test_the_datasets_as_the_other_commands_read_them(small, tmp_path):
    source = write_source(tmp_path / "open-kbp")
    shutil.copytree(source / "provided-data/train-pats/pt_10",
                    source / "provided-data/validation-pats/pt_201")
    shutil.copytree(source / "provided-data/train-pats/pt_10",
                    source / "provided-data/train-pats/pt_10 (copy)")
    assert run(source, tmp_path / "kbp") == 0
    assert sorted(contents(tmp_path / "kbp")) == [
        "Dataset007_OpenKBP/dataset.json",
        "Dataset007_OpenKBP/imagesTr/pt_10_0000.nii.gz",
        "Dataset007_OpenKBP/imagesTr/pt_9_0000.nii.gz",
        "Dataset007_OpenKBP/labelsTr/pt_10.nii.gz",
        "Dataset007_OpenKBP/labelsTr/pt_9.nii.gz",
        "Dataset008_OpenKBPTest/dataset.json",
        "Dataset008_OpenKBPTest/imagesTs/pt_241_0000.nii.gz",
        "Dataset008_OpenKBPTest/labelsTs/pt_241.nii.gz",
        "kbp.json"]
    info = json.loads((tmp_path / "kbp/Dataset007_OpenKBP/dataset.json").read_text())
    assert list(info["annotated"].items()) == [("pt_9", ["Larynx"]), ("pt_10", ["Larynx"])]
    assert info["numTraining"] == 2
    classes = class_tables.load_classes(tmp_path / "kbp/kbp.json")
    cases = datasets.read_dataset(tmp_path / "kbp/Dataset007_OpenKBP", classes)
    names = [c.name for c in classes]
    for case in cases:
        assert [names[k] for k in np.flatnonzero(case.annotated)] == ["Larynx"]
    volume = data.load_volume(cases[1].image)            # pt_9; axes to the right, front and head
    assert volume.array[3, 3, 3] == 9 - 1024
    assert volume.array[3, 2, 3] == 9 + 16 - 1024


def test_the_class_table_has_the_labels_order_and_both_sides(small, tmp_path):
    assert run(write_source(tmp_path / "open-kbp"), tmp_path / "kbp") == 0
    classes = class_tables.load_classes(tmp_path / "kbp/kbp.json")
    assert {c.name: i for i, c in enumerate(classes, 1)} | {"background": 0} == openkbp.LABELS
    sides = {c.name: c.side for c in classes if c.side}
    assert sides == {"Right Parotid": "right", "Left Parotid": "left"}
    assert all(c.solid == 1 for c in classes)


def test_provided_data_and_the_folder_above_give_the_same(small, tmp_path):
    source = write_source(tmp_path / "open-kbp")
    assert run(source, tmp_path / "a") == 0
    assert run(source / "provided-data", tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_one_part_of_the_source_is_enough(small, tmp_path):
    assert run(write_source(tmp_path / "open-kbp", test=()), tmp_path / "kbp") == 0
    assert sorted(path.name for path in (tmp_path / "kbp").iterdir()) == [
        "Dataset007_OpenKBP", "kbp.json"]


def test_what_is_complete_is_not_written_again_and_new_patients_are_added(small, tmp_path):
    source = write_source(tmp_path / "open-kbp", train=("pt_10",))
    whole = write_source(tmp_path / "whole", train=("pt_10", "pt_9"))
    assert run(source, tmp_path / "kbp") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kbp").rglob("*.gz")}
    shutil.copytree(whole / "provided-data/train-pats/pt_9",
                    source / "provided-data/train-pats/pt_9")
    (source / "provided-data/train-pats/pt_10/ct.csv").unlink()          # would be left out
    assert run(source, tmp_path / "kbp") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(whole, tmp_path / "at_once") == 0
    assert contents(tmp_path / "kbp") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("writes", range(10))            # kbp.json, three files of each patient
def test_an_interrupted_run_is_resumed_and_ends_as_one_that_was_not(small, tmp_path, monkeypatch,
                                                                    writes):
    source = write_source(tmp_path / "open-kbp")
    done = []

    @contextlib.contextmanager
    def interrupted(path):
        with atomic_write(path) as temporary:
            yield temporary
            if len(done) == writes:
                raise KeyboardInterrupt
        done.append(path)

    atomic_write = files.atomic_write
    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", interrupted)
        assert run(source, tmp_path / "kbp") == 130
    assert len(contents(tmp_path / "kbp")) == len(set(done))
    for image in (tmp_path / "kbp").rglob("*_0000.nii.gz"):
        case = image.name.removesuffix("_0000.nii.gz")
        dataset = image.parents[1]
        assert (dataset / image.parent.name.replace("images", "labels") / f"{case}.nii.gz").exists()
        assert case in json.loads((dataset / "dataset.json").read_text())["annotated"]
    assert run(source, tmp_path / "kbp") == 0
    assert run(source, tmp_path / "at_once") == 0
    assert contents(tmp_path / "kbp") == contents(tmp_path / "at_once")


# ---- errors ------------------------------------------------------------------------------------
def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_folder_that_is_not_the_source_ends_with_one_line_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "provided-data/train-pats").mkdir(parents=True)
    for source in (tmp_path, tmp_path / "absent"):
        assert run(source, tmp_path / "kbp") == 2
        error = one_line(capsys)
        assert error.startswith(f"error: {source}: no folder train-pats/pt_N")
        assert "github.com/ababier/open-kbp" in error
    assert not (tmp_path / "kbp").exists()


def test_a_source_without_a_usable_patient_ends_with_one_line(small, tmp_path, capsys):
    source = write_source(tmp_path / "open-kbp")
    for path in (source / "provided-data/train-pats").glob("*/ct.csv"):
        path.unlink()
    assert run(source, tmp_path / "kbp") == 2
    assert "train-pats: none of its 2 patients can be used" in one_line(capsys)


@pytest.mark.parametrize("content", ['{"labels": {"background": 0, "liver": 1}}', "{}"])
def test_another_dataset_is_not_touched(small, tmp_path, capsys, content):
    path = tmp_path / "kbp/Dataset007_OpenKBP/dataset.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert run(write_source(tmp_path / "open-kbp"), tmp_path / "kbp") == 2
    assert str(path) in one_line(capsys)
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_is_an_error_not_a_damaged_patient(small, tmp_path, capsys):
    (tmp_path / "kbp/Dataset007_OpenKBP").mkdir(parents=True)
    (tmp_path / "kbp/Dataset007_OpenKBP/labelsTr").touch()
    assert run(write_source(tmp_path / "open-kbp"), tmp_path / "kbp") == 2
    assert "labelsTr" in one_line(capsys)


# ---- agreement with volumes converted by other code ---------------------------------------------
@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("kbp")
    assert run(SHARED / "data/open-kbp", out) == 0
    return out


@needs_shared
@pytest.mark.parametrize("dataset, split, case", SHARED_CASES)
def test_volumes_and_annotated_equal_those_of_the_reference(converted, dataset, split, case):
    for file in (f"images{split}/{case}_0000.nii.gz", f"labels{split}/{case}.nii.gz"):
        expected = nib.load(SHARED / "data" / dataset / file)
        got = nib.load(converted / dataset / file)
        assert np.array_equal(got.dataobj, expected.dataobj)
        assert np.array_equal(got.affine, expected.affine)
        assert got.get_data_dtype() == expected.get_data_dtype()
        assert got.header["sform_code"] == got.header["qform_code"] == 1
    expected = json.loads((SHARED / "data" / dataset / "dataset.json").read_text())
    got = json.loads((converted / dataset / "dataset.json").read_text())
    assert got["annotated"][case] == expected["annotated"][case]
    assert list(got) == list(expected)
    for key in ("channel_names", "labels", "file_ending", "source"):
        assert got[key] == expected[key]
