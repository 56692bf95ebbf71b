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
    left, back, head = np.indices((4, 4, 4))
    assert np.array_equal(image + 1024, 16 * back + 4 * left + 3 - head)
    assert np.argwhere(label == 7).tolist() == [[0, 0, 2], [0, 0, 3], [0, 1, 3], [1, 0, 3]]
    assert nib.aff2axcodes(affine) == ("L", "P", "S")
    assert np.array_equal(affine, np.diag([-2, -3, 5, 1]))


def test_values_structures_and_windows_line_ends_by_hand(small, tmp_path):
    """A value is HU + 1024, and what is not listed is air. Where two structures overlap, the later
    one stays; one without a file or a voxel is not annotated."""
    folder = write_patient(tmp_path / "pt_1", ct={0: 1064, 63: 4095, 62: 0}, Mandible=[0, 4],
                           RightParotid=[0, 1], Esophagus=[], PTV70=[6])
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    image, label, _, annotated = openkbp.read_patient(folder)
    assert image.dtype == np.int16 and label.dtype == np.uint8
    assert image[0, 0, 3] == 40 and image[3, 3, 0] == 3071 and np.sum(image == -1024) == 62
    assert label[0, 0, 3] == 7 and label[0, 0, 2] == 3 and np.sum(label > 0) == 3
    assert annotated == ["Right Parotid", "Mandible"]


@pytest.mark.parametrize("file, content, problem", [
    ("ct.csv", None, "no such file; the patient has no CT"),
    ("ct.csv", b"", "its first line is not ',data'"),
    ("ct.csv", b",data\n", "it lists no voxel"),
    ("ct.csv", b",data\n3,12.0\n4,1", "its last line is cut off"),
    ("ct.csv", b",data\n3,12.0\n4\n", "not a readable CSV file"),
    ("ct.csv", b",data\n\xff\xfe\x00,\x85\n", "not a readable CSV file"),
    ("ct.csv", b",data\n3,nan\n", "no grey value"),
    ("ct.csv", b",data\n3,1e9\n", "no grey value"),
    ("Brainstem.csv", b",data\n5,\n64,\n", "64 is not the index of a voxel, 0 to 63"),
    ("Brainstem.csv", b",data\n-1,\n", "-1 is not the index of a voxel"),
    ("Brainstem.csv", b",data\n2.5,\n", "2.5 is not the index of a voxel"),
    ("Brainstem.csv", b",data\n", "no contour of any of Brainstem.csv, SpinalCord.csv"),
    ("voxel_dimensions.csv", None, "No such file"),
    ("voxel_dimensions.csv", b"2.0\n3.0\n5.0\n1.0\n", "expected the three sides of a voxel"),
    ("voxel_dimensions.csv", b"2.0\nnan\n5.0\n", "expected the three sides of a voxel"),
    ("voxel_dimensions.csv", b"2000\n3000\n5000\n", "0.02 to 50 mm, got [2000.0, 3000.0"),
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
    assert named.startswith("left out: ") and str(broken) in named and problem in named
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


def test_the_class_table_has_the_labels_order_and_both_sides(tmp_path):
    openkbp.write_class_table(tmp_path / "kbp.json")
    classes = class_tables.load_classes(tmp_path / "kbp.json")
    assert {c.name: i for i, c in enumerate(classes, 1)} | {"background": 0} == openkbp.LABELS
    assert {c.name: c.side for c in classes if c.side} == {"Right Parotid": "right",
                                                           "Left Parotid": "left"}
    assert all(c.solid == 1 for c in classes)


def test_the_folder_provided_data_and_one_part_of_the_source_are_enough(small, tmp_path):
    source = write_source(tmp_path / "open-kbp", test=())
    assert run(source, tmp_path / "a") == 0
    assert run(source / "provided-data", tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["Dataset007_OpenKBP",
                                                                        "kbp.json"]


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
def without_ct(source, out):
    for path in (source / "provided-data/train-pats").glob("*/ct.csv"):
        path.unlink()
    return "train-pats: none of its 2 patients can be used"


def without_patients(source, out):
    for part in openkbp.DATASETS:
        shutil.rmtree(source / "provided-data" / part)
    return f"error: {source}: no folder train-pats/pt_N or test-pats/pt_N in it; clone"


def another_dataset(source, out):
    (out / "Dataset007_OpenKBP").mkdir(parents=True)
    (out / "Dataset007_OpenKBP/dataset.json").write_text('{"labels": {"background": 0}}')
    return "Dataset007_OpenKBP/dataset.json: not written by this command"


def no_room_for_labels(source, out):
    (out / "Dataset007_OpenKBP").mkdir(parents=True)
    (out / "Dataset007_OpenKBP/labelsTr").touch()
    return "labelsTr"


@pytest.mark.parametrize("change", [without_ct, without_patients, another_dataset,
                                    no_room_for_labels])
def test_what_stops_the_command_is_one_line_and_no_file_is_lost(small, tmp_path, capsys, change):
    source = write_source(tmp_path / "open-kbp")
    message = change(source, tmp_path / "kbp")
    before = contents(tmp_path / "kbp")
    assert run(source, tmp_path / "kbp") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert before.items() <= contents(tmp_path / "kbp").items()


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
