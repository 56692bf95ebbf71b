"""The class table, names, the meaning of label files, and sides."""
import dataclasses
import doctest
import json

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, write_nifti

import labels


def name(i):
    return labels.CLASSES[i].name


@pytest.mark.parametrize("text, want", [
    ("kidney_left", ["Left Kidney"]), ("Left Kidney", ["Left Kidney"]),
    ("KIDNEY-LEFT", ["Left Kidney"]), ("gallbladder", ["Gall Bladder"]),
    ("inferior_vena_cava", ["Postcava"]), ("IVC", ["Postcava"]), ("aorta", ["Aorta"]),
    ("portal_vein_and_splenic_vein", ["Portal Vein and Splenic Vein"]),
    ("adrenal_gland_right", ["Right Adrenal Gland"]), ("small_bowel", ["Intestine"]),
    ("urinary_bladder", ["Bladder"]), ("lung_upper_lobe_left", ["Left Lung"]),
    ("colon cancer primaries", ["Colon Tumor"]), ("lung_tumour", ["Lung Tumor"]),
    ("Hepatic Vessels", ["Hepatic Vessel"]), ("Celiac Truck", ["Celiac Trunk"]),
    ("Arota", ["Aorta"]), ("kidney", ["Right Kidney", "Left Kidney"]),
    ("lungs", ["Right Lung", "Left Lung"]), ("head_of_femur_r", ["Right Head of Femur"]),
    ("femur_left", []), ("liver segment", []), ("background", []), ("", []), ("tumor", []),
])
def test_names_of_public_datasets_match_their_class(text, want):
    assert [name(i) for i in labels.match(text)] == want


def test_the_built_in_table_has_the_papers_order_and_the_releases_prompts():
    assert len(labels.CLASSES) == 32
    assert [name(i) for i in (0, 7, 24, 31)] == ["Spleen", "Aorta", "Celiac Trunk", "Kidney Cyst"]
    assert labels.CLASSES[7].sentence("V3") == "A computerized tomography of a Arota"
    assert labels.CLASSES[5].sentence("V1") == "A photo of a Liver."
    with pytest.raises(ValueError, match="no {}"):
        labels.CLASSES[0].sentence("spleen")


def test_solid_and_vessel_of_the_built_in_table():
    assert {c.name for c in labels.CLASSES if c.solid == 1.0} == {
        "Spleen", "Right Kidney", "Left Kidney", "Gall Bladder", "Liver", "Stomach", "Pancreas",
        "Right Adrenal Gland", "Left Adrenal Gland", "Bladder", "Prostate", "Left Head of Femur",
        "Right Head of Femur"}
    assert {c.name: c.solid for c in labels.CLASSES if 0 < c.solid < 1} == \
        {"Right Lung": 0.1, "Left Lung": 0.1}
    assert {c.name for c in labels.CLASSES if c.vessel} == {
        "Aorta", "Postcava", "Portal Vein and Splenic Vein", "Hepatic Vessel", "Celiac Trunk"}


def test_organ_is_the_name_without_case_word_order_and_side():
    for spelling in ("Right Kidney", "right kidney", "KIDNEY, RIGHT", "kidney_r"):
        assert labels.Class(spelling, side="right").organ == ("kidney",)
    assert labels.Class("Head of Left Femur", side="left").organ == ("femur", "head")
    assert labels.Class("Liver").organ == ("liver",)
    assert labels.Class("Left Atrium").organ == ("atrium", "left")      # no side: nothing removed


def test_other_side_of_every_built_in_class():
    pairs = [(k, labels.other_side(k, labels.CLASSES)) for k in range(len(labels.CLASSES))]
    assert {(name(a), name(b)) for a, b in pairs if b is not None and a < b} == {
        ("Right Kidney", "Left Kidney"), ("Right Adrenal Gland", "Left Adrenal Gland"),
        ("Right Lung", "Left Lung"), ("Left Head of Femur", "Right Head of Femur")}
    assert all(labels.other_side(b, labels.CLASSES) == a for a, b in pairs if b is not None)


@pytest.mark.parametrize("right, left", [
    ("Right Kidney", "left kidney"), ("right kidney", "Left Kidney"), ("kidney_right", "L Kidney"),
    ("Head of Femur (R)", "left femur head")])
def test_other_side_ignores_case_and_word_order(right, left):
    table = (labels.Class("Liver"), labels.Class(left, side="left"),
             labels.Class(right, side="right"))
    assert [labels.other_side(k, table) for k in range(3)] == [None, 2, 1]
    assert labels.match(" ".join(table[1].organ), table) == (2, 1)      # both sides, right first


def test_other_side_needs_the_side_fields_and_the_same_organ():
    table = labels.make_classes([{"name": "Right Kidney"}, {"name": "Left Kidney", "side": "left"},
                                 {"name": "Right Lung", "side": "right"}])
    assert [labels.other_side(k, table) for k in range(3)] == [None] * 3


def test_no_name_or_synonym_denotes_two_classes():
    keys = [(labels.name_key(n), c.name) for c in labels.CLASSES
            for n in {c.name, *c.synonyms, c.prompt_name} if n]
    seen = {}
    for key, owner in keys:
        assert seen.setdefault(key, owner) == owner


# ---- the three steps of label_map, and the whole -------------------------------------------------
def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(labels)
    assert result.failed == 0 and result.attempted > 10


KIDNEYS = [("kidney", [1, 2]), ("kidney tumor", [2]), ("sacrum", [3])]


@pytest.mark.parametrize("table", [
    {"kidney": [1, 2], "kidney tumor": 2, "sacrum": [3]},
    {"kidney": ["1", 2], "kidney tumor": "2", "sacrum": 3}])
def test_step_1_parses_names_and_values(table):
    assert labels.parse_labels(table, "x") == KIDNEYS


def test_step_1_parses_msds_values_and_names():
    assert labels.parse_labels({"0": "background", "1": "liver", "2": "cancer"}, "x") == \
        [("background", [0]), ("liver", [1]), ("cancer", [2])]


def test_step_2_matches_names_to_sure_classes_and_to_pairs():
    """Value 1 is one of the kidneys (1, 2); value 2, too, and surely Kidney Tumor (25)."""
    meaning, annotated, unmatched = labels.match_labels(KIDNEYS, labels.CLASSES, "x")
    assert meaning == {1: labels.Meaning(either={(1, 2)}), 2: labels.Meaning({25}, {(1, 2)})}
    assert np.flatnonzero(annotated).tolist() == [1, 2, 25] and unmatched == ["sacrum"]


def test_step_3_adds_parents_and_builds_a_row_per_value_and_side():
    """Value 7 is Kidney Tumor (25), value 9 Liver Tumor (26): V = 3, rows 3 to 5 are the left."""
    meaning = {9: labels.Meaning({26}), 7: labels.Meaning({25})}
    values, regions, unsplit = labels.build_regions(meaning, labels.CLASSES)
    assert values == [0, 7, 9] and unsplit == {(1, 2): [1]}
    assert [np.flatnonzero(row).tolist() for row in regions] == \
        [[], [1, 25], [5, 26], [], [2, 25], [5, 26]]


# ---- what a name says, and what it leaves open ---------------------------------------------------
def meaning_of(table, context="") -> list[str]:
    return labels.label_map(table, labels.CLASSES, context=context).table


@pytest.mark.parametrize("lesion", [
    "liver_lesion", "Liver Lesions", "hepatic tumour", "HCC", "liver cancer", "liver metastases",
    "hepatic mass", "liver carcinoma", "malignant liver neoplasm", "cancer", "Tumor", "lesion"])
def test_the_usual_names_of_a_lesion_are_its_class_inside_its_host(lesion):
    assert meaning_of({"liver": 1, lesion: 2}) == \
        ["1 liver -> Liver", f"2 {lesion} -> Liver + Liver Tumor"]


def test_the_side_of_a_lesion_tells_its_host():
    assert meaning_of({"kidney_cyst_left": 1, "right renal mass": 2, "PDAC lesion": 3}) == [
        "1 kidney_cyst_left -> Left Kidney + Kidney Cyst",
        "2 right renal mass -> Right Kidney + Kidney Tumor",
        "3 PDAC lesion -> Pancreas + Pancreas Tumor"]


@pytest.mark.parametrize("context, table, want", [
    ("Liver", {"0": "background", "1": "liver", "2": "cancer"}, ["Liver", "Liver + Liver Tumor"]),
    ("Task06_Lung", {"0": "background", "1": "cancer"}, ["Right Lung or Left Lung; Lung Tumor"]),
    ("Pancreas", {"1": "pancreas", "2": "cancer"}, ["Pancreas", "Pancreas + Pancreas Tumor"]),
    ("HepaticVessel", {"1": "Vessel", "2": "Tumour"},
     ["Liver + Hepatic Vessel", "Liver + Hepatic Vessel Tumor"]),
    ("Spleen", {"1": "spleen"}, ["Spleen"]),
    ("Colon", {"1": "colon cancer primaries"}, ["Colon + Colon Tumor"])])
def test_the_name_of_an_msd_task_tells_the_organ(context, table, want):
    assert [line.split(" -> ")[1] for line in meaning_of(table, context)] == want


def test_what_says_nothing_about_a_class_is_left_out_of_its_loss():
    """With two organs, "lesion" has no clear host; "sacrum" says that a voxel is no organ."""
    table = {"liver": 1, "spleen": 2, "ignore": 3, "lesion": 4, "liver abscess": 5,
             "liver segment 4": 6, "left kidney stone": 7, "sacrum": 8, "vertebrae L1": 9}
    label_map = labels.label_map(table, labels.CLASSES)
    assert label_map.table == [
        "1 liver -> Liver", "2 spleen -> Spleen", "3 ignore -> left out of the loss of every class",
        "4 lesion -> left out of the loss of every class",
        "5 liver abscess -> left out of the loss of Liver, Liver Tumor, Hepatic Vessel Tumor",
        "6 liver segment 4 -> left out of the loss of Liver",
        "7 left kidney stone -> left out of the loss of Left Kidney",
        "background: sacrum, vertebrae L1"]
    assert label_map.values == [0, 1, 2, 3, 4, 5, 6, 7] and not label_map.regions[3:8].any()
    unknown = [np.flatnonzero(~row).tolist() for row in label_map.known]
    assert unknown == [[], [], [], [*range(32)], [*range(32)], [5, 26, 28], [5], [2]] * 2
    assert label_map.unmatched == ["sacrum", "vertebrae L1"]


def test_what_another_name_of_a_value_says_is_known():
    """Region-based: value 3 is spleen, and an abscess; the region around a tumor is its host."""
    label_map = labels.label_map({"liver": [1, 4], "spleen": [2, 3], "abscess": 3, "tumor": 4},
                                 labels.CLASSES)
    assert label_map.known[3].tolist() == [k == 0 for k in range(32)]
    assert np.flatnonzero(label_map.regions[4]).tolist() == [5, 26]


@pytest.mark.parametrize("word", sorted({*labels._LESION_KINDS, *labels._OTHER_LESIONS,
                                         *labels._LESION_ABBREVIATIONS} |
                                        {word for word, kind in labels._LESION_SAME_WORD.items()
                                         if kind == "tumor"}))
@pytest.mark.parametrize("organ", ["spleen", "kidney", "left kidney", "liver", "adrenal gland"])
def test_no_lesion_in_an_organ_is_taught_as_background(organ, word):
    """Whatever its name: it belongs to the organ, or is left out of the organ's loss."""
    label_map = labels.label_map({organ: 1, f"{organ} {word}": 2, "stomach": 3}, labels.CLASSES)
    row = label_map.values.index(2)
    own = np.flatnonzero(label_map.regions[1] | label_map.regions[1 + len(label_map.values)])
    either = label_map.regions[row] | label_map.regions[row + len(label_map.values)]
    assert all(either[k] or not label_map.known[row, k] for k in own)


def test_three_spellings_of_one_label_table():
    """LiTS as nnU-Net, region-based nnU-Net and MSD write it: a tumour voxel is liver in each."""
    forms = [{"background": 0, "liver": 1, "liver tumor": 2},
             {"background": 0, "liver": [1, 2], "liver tumor": [2]},
             {"0": "background", "1": "liver", "2": "liver tumor"}]
    for form in forms:
        label_map = labels.label_map(form, labels.CLASSES)
        assert label_map.values == [0, 1, 2] and not label_map.unsplit
        assert [np.flatnonzero(r).tolist() for r in label_map.regions] == [[], [5], [5, 26]] * 2
        assert np.flatnonzero(label_map.annotated).tolist() == [5, 26]


def test_kidneys_without_sides_become_two_classes():
    table = {"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3}
    label_map = labels.label_map(table, labels.CLASSES)
    assert np.flatnonzero(label_map.annotated).tolist() == [1, 2, 25, 31]
    assert label_map.unsplit == {(1, 2): [1, 2, 3]}
    assert np.flatnonzero(label_map.regions[2]).tolist() == [1, 25]        # tumour on the right
    assert np.flatnonzero(label_map.regions[2 + 4]).tolist() == [2, 25]    # and on the left


def test_names_without_class_are_reported_and_their_values_are_background():
    label_map = labels.label_map({"liver": 3, "sacrum": 25}, labels.CLASSES)
    assert label_map.unmatched == ["sacrum"]
    raw = np.array([[[0, 3, 25]]])
    assert label_map.to_label_rows(raw, "x").tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("table, what", [
    ({"sacrum": 1}, "is a class here"), ({"liver": "one"}, "integers"), ([1], "table of names"),
    ({"liver": 0}, "background"), ({"liver": -1}, "0..65535"), ({}, "is a class here")])
def test_a_malformed_label_table_is_refused_with_the_reason(table, what):
    with pytest.raises(ValueError, match=what):
        labels.label_map(table, labels.CLASSES, "some/dataset.json")


def test_values_that_are_not_named_or_not_integers_are_refused():
    label_map = labels.label_map({"liver": 1}, labels.CLASSES)
    with pytest.raises(ValueError, match=r"a.nii: label values \[7\]"):
        label_map.to_label_rows(np.array([0, 1, 7]), "a.nii")
    with pytest.raises(ValueError, match="integers"):
        label_map.to_label_rows(np.array([0.0, 1.4]), "a.nii")
    assert label_map.to_label_rows(np.array([0.0, 0.9999]), "a.nii").tolist() == [0, 1]


def unsplit_kidneys(shape=(40, 12, 12)):
    label_map = labels.label_map({"kidney": [1, 2], "kidney tumor": 2}, labels.CLASSES)
    return label_map, np.zeros(shape, np.uint8)


def test_pieces_are_split_at_the_bodys_midline_not_at_the_middle_of_the_image():
    """Axis 0 runs to the right; the body's midline is at 14, the middle of the image at 20."""
    label_map, label_rows = unsplit_kidneys()
    label_rows[16:20, 3:7, 3:7] = 1       # right in the body, left in the image
    label_rows[4:9, 3:7, 3:7] = 1         # left kidney
    label_rows[6:8, 4:6, 4:6] = 2         # with a tumour
    label_rows[30, 9, 9] = 1              # a speck on the right
    out = labels.split_sides(label_rows, label_map, 14.0)
    V = len(label_map.values)
    assert (out[16:20, 3:7, 3:7] == 1).all() and out[30, 9, 9] == 1
    assert set(np.unique(out[4:9, 3:7, 3:7])) == {1 + V, 2 + V}


def test_a_single_kidney_gets_its_side_by_position():
    for at, want in ((2, 2), (30, 1)):
        label_map, label_rows = unsplit_kidneys()
        label_rows[at:at + 5, 3:7, 3:7] = 1
        label_rows = labels.split_sides(label_rows, label_map, 20.0)
        assert np.flatnonzero(label_map.regions[label_rows].any((0, 1, 2))) == [want]


def test_a_piece_across_the_midline_is_cut_only_if_neither_side_holds_80_percent_of_it():
    label_map, label_rows = unsplit_kidneys()
    label_rows[10:20, 3:7, 3:7] = 1
    most = labels.split_sides(label_rows, label_map, 11.0)      # 90 % on the right: not cut
    half = labels.split_sides(label_rows, label_map, 15.0)      # half and half: cut
    V = len(label_map.values)
    assert set(np.unique(most)) == {0, 1} and set(np.unique(half)) == {0, 1, 1 + V}
    assert (half[10:15, 3:7, 3:7] == 1 + V).all() and (half[15:20, 3:7, 3:7] == 1).all()


def test_a_tumour_follows_the_labelled_lung_it_touches():
    label_map = labels.label_map({"lung_left": 1, "lung_right": 2, "lung tumor": 3}, labels.CLASSES)
    label_rows = np.zeros((30, 8, 8), np.uint8)
    label_rows[2:17], label_rows[20:28] = label_map.values.index(1), label_map.values.index(2)
    label_rows[15:17, 3:5, 3:5] = label_map.values.index(3)     # the left lung reaches beyond 14
    out = labels.split_sides(label_rows, label_map, 14.0)
    assert np.flatnonzero(label_map.regions[out[15, 3, 3]]).tolist() == [16, 29]


def test_without_a_midline_only_what_touches_a_labelled_side_is_told_apart():
    label_map = labels.label_map({"lung_left": 1, "lung_right": 2, "lung tumor": 3}, labels.CLASSES)
    left, right, tumour = (label_map.values.index(v) for v in (1, 2, 3))
    label_rows = np.zeros((30, 8, 8), np.uint8)
    label_rows[2:12], label_rows[20:28] = left, right
    label_rows[10:13, 3:5, 3:5] = tumour
    label_rows[27:29, 3:5, 3:5] = tumour
    assert labels.undecided_sides(label_rows, label_map) == []
    out = labels.split_sides(label_rows, label_map, None)
    assert np.flatnonzero(label_map.regions[out[11, 3, 3]]).tolist() == [16, 29]
    assert np.flatnonzero(label_map.regions[out[28, 3, 3]]).tolist() == [15, 29]
    label_rows[15:17, 3:5, 3:5] = tumour                        # between the lungs
    assert labels.undecided_sides(label_rows, label_map) == [15, 16]
    label_map, label_rows = unsplit_kidneys()
    assert labels.undecided_sides(label_rows, label_map) == []
    label_rows[2:5, 2:5, 2:5] = 1
    assert labels.undecided_sides(label_rows, label_map) == [1, 2]
    assert np.array_equal(labels.split_sides(label_rows, label_map, None), label_rows)


def test_a_class_table_of_ones_own_replaces_the_built_in_one(tmp_path):
    path = tmp_path / "knee.json"
    path.write_text(json.dumps(["Femur", {"name": "Medial Meniscus", "prompt": "A 3D MRI scan of "
                                          "the medial meniscus", "parents": []}]))
    table = labels.load_classes(path)
    assert [c.name for c in table] == ["Femur", "Medial Meniscus"]
    assert labels.match("medial_meniscus", table) == (1,)
    assert table[1].sentence("V1") == "A 3D MRI scan of the medial meniscus"


def test_a_class_table_of_ones_own_sets_solid_and_vessel(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"name": "Liver", "solid": 1}, {"name": "Aorta", "vessel": True},
                                {"name": "Left Lung", "solid": 0.25}, {"name": "Spleen"}]))
    assert [(c.solid, c.vessel) for c in labels.load_classes(path)] == \
        [(1, False), (0, True), (0.25, False), (0, False)]


# ---- bare names of built-in classes --------------------------------------------------------------
def test_a_table_of_the_built_in_names_is_the_built_in_table():
    names = [c.name for c in labels.CLASSES]
    assert labels.make_classes(names) == labels.CLASSES
    assert labels.make_classes(names[::-1]) == labels.CLASSES[::-1]


def test_a_bare_name_keeps_its_spelling_and_takes_the_rest():
    aorta, kidney, femur = labels.make_classes(["aorta", "kidney_left", "Femur"])
    assert aorta.name == "aorta" and aorta.vessel
    assert aorta.sentence("V3") == "A computerized tomography of a Arota"       # as trained
    assert kidney == labels.Class("kidney_left", side="left", solid=1.0, prompt_name="Left Kidney")
    assert femur == labels.Class("Femur")


def test_an_object_with_the_name_of_a_built_in_class_keeps_what_it_says():
    entries = [{"name": "Right Kidney"}, {"name": "Kidney Tumor", "parents": ["Right Kidney"]}]
    assert labels.make_classes(entries) == (
        labels.Class("Right Kidney"), labels.Class("Kidney Tumor", parents=("Right Kidney",)))


def test_a_synonym_means_the_class_unless_another_row_does():
    cava, = labels.make_classes(["IVC"])
    assert cava.sentence("V3") == "A computerized tomography of a Postcava" and cava.vessel
    for name in ("IVC", "ivc", "postcava", "inferior vena cava"):
        assert labels.match(name, (cava,)) == (0,), name
    celiac, = labels.make_classes(["Celiac Artery"])
    assert celiac.prompt_name == "Celiac Truck" and labels.match("celiac_trunk", (celiac,)) == (0,)
    for other in ("Postcava", {"name": "Postcava", "solid": 0.5}):
        table = labels.make_classes(["IVC", other])
        assert table[0] == labels.Class("IVC")
        assert [labels.match(name, table) for name in ("ivc", "postcava")] == [(0,), (1,)]


def test_a_synonym_that_is_another_rows_name_is_not_taken():
    """A lobe is not its lung: its row stays bare, and its name is not the lung's any more."""
    table = labels.make_classes(["Right Lung", "right lung upper lobe",
                                 {"name": "Middle", "synonyms": ["right lung middle lobe"]}])
    assert table[0].synonyms == ("right lung lower lobe",) and table[0].side == "right"
    assert table[1] == labels.Class("right lung upper lobe")
    assert [labels.match(f"lung_{part}_lobe_right", table)
            for part in ("upper", "middle", "lower")] == [(1,), (2,), (0,)]


@pytest.mark.parametrize("names, parents", [
    (["Kidney Tumor", "Left Kidney", "Right Kidney"], ("Right Kidney", "Left Kidney")),
    (["Kidney Tumor", "kidney_l", "KIDNEY R"], ("KIDNEY R", "kidney_l")),
    (["Kidney Tumor", "Kidney"], ("Kidney",)),
    (["Kidney Tumor", "Left Kidney", "Kidney"], ("Kidney",)),
    (["Kidney Tumor", "kidney right"], ("kidney right", "Left Kidney")),
    (["Kidney Tumor", "Liver"], ()),
    (["Colon Tumor", "Large Bowel"], ("Large Bowel",)),
    (["Liver Tumor", {"name": "liver", "prompt": "a liver"}], ("liver",))])
def test_parents_of_a_bare_name_are_those_that_the_table_holds(names, parents):
    table = labels.make_classes(names)
    assert table[0].parents == parents and table[0].lesion
    entries = json.loads(json.dumps([dataclasses.asdict(c) for c in table]))    # in a checkpoint
    assert labels.classes_of_checkpoint({"classes": entries}, len(table), "a.pt") == table


def test_only_one_side_of_an_organ_may_be_missing_among_the_parents():
    right = {"name": "Right Kidney"}
    for parents in (["Left Kidney"], ["Right Kidney", "Left Kidny"], ["Right Kidney", "Liver"]):
        with pytest.raises(ValueError, match="parents"):
            labels.make_classes([right, {"name": "Kidney Tumor", "parents": parents}])


def test_a_kidney_without_a_side_matches_both_kidneys_of_a_bare_table():
    """The table of the claim `transfer`, and a dataset that labels "kidney"."""
    table = labels.make_classes(["Liver", "Liver Tumor", "Spleen", "Right Kidney", "Left Kidney",
                                 "Kidney Cyst"])
    label_map = labels.label_map({"kidney": 1, "kidney tumor": 2, "kidney cyst": 3}, table)
    assert np.flatnonzero(label_map.annotated).tolist() == [3, 4, 5]
    assert label_map.table == [
        "1 kidney -> Right Kidney or Left Kidney",
        "2 kidney tumor -> left out of the loss of Right Kidney, Left Kidney, Kidney Cyst",
        "3 kidney cyst -> Right Kidney or Left Kidney; Kidney Cyst"]


def test_a_tumor_of_a_kidney_whose_side_is_missing_is_not_surely_in_the_other_one():
    """Values 2 and 4 may lie in the right kidney or not, 3 surely does."""
    table = labels.make_classes(["Kidney Tumor", "Right Kidney"])
    meaning = {"right kidney": [1, 3], "kidney tumor": [2, 3], "left kidney tumor": 4}
    label_map = labels.label_map(meaning, table)
    assert label_map.values == [0, 1, 2, 3, 4] and not label_map.unsplit
    assert label_map.regions[:5].tolist() == [[False, False], [False, True], [True, False],
                                              [True, True], [True, False]]
    assert label_map.known[:5].tolist() == [[True, True], [True, True], [True, False],
                                            [True, True], [True, False]]
    assert label_map.annotated.all()
    assert labels.ancestors(0, table) == {1}        # in a result, the tumour lies over the kidney


def test_a_tumor_lies_in_a_kidney_without_a_side():
    """KiTS without cysts, in the table that one would write for it."""
    table = labels.make_classes(["Kidney", "Kidney Tumor"])
    label_map = labels.label_map({"kidney": 1, "tumor": 2}, table)
    assert label_map.regions[:3].tolist() == [[False, False], [True, False], [True, True]]


def test_parents_may_be_among_the_classes_of_a_model_that_is_extended():
    old = labels.make_classes(["Right Kidney", "kidney (left)", "Postcava"])
    new = labels.make_classes(["Kidney Cyst", "IVC"], beside=old)
    assert new[0].parents == ("Right Kidney", "kidney (left)") and len(new) == 2
    assert new[1] == labels.Class("IVC")                     # another class than the old Postcava
    own = [{"name": "Renal Scar", "parents": ["Right Kidney"]}]
    assert labels.make_classes(own, beside=old)[0].parents == ("Right Kidney",)
    with pytest.raises(ValueError, match="parents"):
        labels.make_classes(own)


def test_a_checkpoint_has_a_class_for_every_text_embedding():
    """A derivative of the release with 25 rows and no names is not the first 25 of the 32."""
    assert labels.classes_of_checkpoint({}, 32, "a.pth") == labels.CLASSES
    with pytest.raises(ValueError, match="a.pth: 25 text embeddings and no class names.*--init"):
        labels.classes_of_checkpoint({}, 25, "a.pth")
    own = {"classes": ["Femur", "Tibia"]}
    assert len(labels.classes_of_checkpoint(own, 2, "a.pth")) == 2
    with pytest.raises(ValueError, match="a.pth: 3 text embeddings for 2 classes"):
        labels.classes_of_checkpoint(own, 3, "a.pth")


def test_the_classes_of_a_checkpoint_keep_their_own_fields():
    own = (labels.Class("Liver", solid=0.3), labels.Class("Aorta"), labels.Class("Spleen"))
    content = {"classes": [dataclasses.asdict(c) for c in own]}
    assert labels.classes_of_checkpoint(content, 3, "a.pt") == own
    with pytest.raises(ValueError, match="classes of a.pt: entry 0 needs a name"):
        labels.classes_of_checkpoint({"classes": [{"name": ["Liver"]}]}, 1, "a.pt")


@pytest.mark.parametrize("content, what", [
    ("{", "JSON"), ("{}", "list"), ("[]", "list"), ("[3]", "name"), ('[{"prompt": "x"}]', "name"),
    ('[{"name": "a", "colour": 1}]', "colour"), ('["a", "A"]', "same name"),
    ('[{"name": "a", "parents": "b"}]', "parents"), ('[{"name": "a", "side": "up"}]', "side"),
    ('[{"name": "a", "lesion": "no"}]', "lesion"), ('[{"name": "a", "vessel": 1}]', "vessel"),
    ('[{"name": "a", "solid": 1.5}]', "solid"), ('[{"name": "a", "solid": -1}]', "solid"),
    ('[{"name": "a", "solid": true}]', "solid"), ('[{"name": "a", "solid": "1"}]', "solid"),
    ('[{"name": "a", "solid": NaN}]', "solid"), ('["a", "a"]', "same name"),
    ('[{"name": "a", "parents": "b"}, {"name": "b", "parents": "a"}]', "ancestor")])
def test_a_malformed_class_table_is_refused_with_the_reason(tmp_path, content, what):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=what):
        labels.load_classes(tmp_path / "t.json")


def test_command_prints_the_table(capsys):
    assert labels.main([]) == 0
    out = capsys.readouterr().out
    assert "Celiac Trunk" in out and "Kidney Cyst" in out and out.count("\n") == 33


def test_command_prints_what_bare_names_take(tmp_path, capsys):
    (tmp_path / "t.json").write_text('["liver cancer", "liver", {"name": "Aorta"}]')
    assert labels.main(["--classes", str(tmp_path / "t.json")]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        "value name properties parents prompt synonyms",
        "1 liver cancer lesion liver A computerized tomography of a Liver Tumor hepatic tumor",
        "2 liver solid 1 - A computerized tomography of a Liver -",
        "3 Aorta - - A computerized tomography of a Aorta -"]


# ---- public datasets ---------------------------------------------------------------------------
REPLICAS = {    # dataset: ((image, label), a value, its classes, one of the annotated classes)
    "btcv": (("img/img0007.nii.gz", "label/label0007.nii.gz"), 8, {"Aorta"}, "Duodenum"),
    "lits": (("volume-3.nii", "segmentation-3.nii"), 2, {"Liver", "Liver Tumor"}, "Liver"),
    "kits": (("case_00001/imaging.nii.gz", "case_00001/segmentation.nii.gz"), 3,
             {"Kidney Cyst", "Right Kidney"}, "Left Kidney"),
    "word": (("imagesTr/word_0002.nii.gz", "labelsTr/word_0002.nii.gz"), 16,
             {"Right Head of Femur"}, "Right Adrenal Gland"),
    "abdomenct-1k": (("Images/Case_00001_0000.nii.gz", "Masks/Case_00001.nii.gz"), 4,
                     {"Pancreas"}, "Left Kidney"),
    "amos": (("imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz"), 14, {"Bladder"},
             "Prostate"),
    "ct-org": (("volume-0.nii.gz", "labels-0.nii.gz"), 3, {"Right Lung"}, "Bladder"),
    "abdomenct-12organ": (("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"), 12, {"Celiac Trunk"},
                          "Stomach"),
    "msd-hepaticvessel": (("imagesTr/hv_001.nii.gz", "labelsTr/hv_001.nii.gz"), 2,
                          {"Hepatic Vessel Tumor", "Liver"}, "Hepatic Vessel"),
    "msd-colon": (("imagesTr/colon_001.nii.gz", "labelsTr/colon_001.nii.gz"), 1,
                  {"Colon Tumor", "Colon"}, "Colon Tumor"),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_a_miniature_replica_gives_the_right_regions(name, tmp_path, capsys):
    import data
    (image, label), value, belongs, annotated = REPLICAS[name]
    for file in (image, label):
        write_nifti(tmp_path / name / file, np.full((4, 4, 4), value, np.int16), np.eye(4))
    before = {p for p in (tmp_path / name).rglob("*")}
    assert labels.main([name, str(tmp_path / name)]) == 0
    assert {p for p in (tmp_path / name).rglob("*")} - before == {tmp_path / name / "dataset.json"}
    case, = data.read_dataset(tmp_path / name, labels.CLASSES)
    row = case.label_map.to_label_rows(np.array([value]), "x")[0]
    found = np.flatnonzero(case.label_map.regions[row])
    assert {labels.CLASSES[k].name for k in found} == belongs
    assert case.annotated[[c.name for c in labels.CLASSES].index(annotated)]
    assert case.image == tmp_path / name / image
    assert case.label_map.unmatched == (["bone", "brain"] if name == "ct-org" else [])
    assert data.find_datasets([tmp_path]) == [tmp_path / name]


def test_exceptions_for_single_scans_of_btcv_and_amos(tmp_path):
    """BTCV scans from 60 on annotate eight classes; AMOS scans above 500 are MR and left out."""
    import data
    for n in ("0007", "0061"):
        for file in (f"img/img{n}.nii.gz", f"label/label{n}.nii.gz"):
            write_nifti(tmp_path / "btcv" / file, np.ones((4, 4, 4), np.int16), np.eye(4))
    labels.main(["btcv", str(tmp_path / "btcv")])
    whole, part = data.read_dataset(tmp_path / "btcv", labels.CLASSES)
    assert whole.annotated.sum() == 14 and part.annotated.sum() == 8
    for n in ("0500", "0507"):
        for part in ("imagesTr", "labelsTr"):
            write_nifti(tmp_path / f"amos/{part}/amos_{n}.nii.gz", np.ones((4, 4, 4), np.int16),
                        np.eye(4))
    labels.main(["amos", str(tmp_path / "amos")])
    case, = data.read_dataset(tmp_path / "amos", labels.CLASSES)
    assert case.name == "amos/amos_0500"


def test_totalsegmentators_masks_become_one_map(tmp_path):
    import data
    write_nifti(tmp_path / "s0001/ct.nii.gz", np.zeros((4, 4, 4), np.int16), np.eye(4))
    for i, name in enumerate(("liver", "kidney_left", "rib_left_1")):
        mask = np.zeros((4, 4, 4), np.uint8)
        mask[i] = 1
        write_nifti(tmp_path / f"s0001/segmentations/{name}.nii.gz", mask, np.eye(4))
    assert labels.main(["totalsegmentator", str(tmp_path)]) == 0
    case, = data.read_dataset(tmp_path, labels.CLASSES)
    assert {c.name for c, a in zip(labels.CLASSES, case.annotated, strict=True) if a} == \
        {"Liver", "Left Kidney"}
    raw = data.load_volume(case.label).array
    assert raw[:, 0, 0].tolist() == [2, 1, 0, 0] and case.name.endswith("/s0001")


def test_totalsegmentators_merged_map_has_the_axes_of_its_ct(tmp_path):
    """Masks that are stored in other axes than their CT are reoriented; the map lies as the CT."""
    ct = affine_of("LPS", (1.5, 2.0, 3.0))
    write_nifti(tmp_path / "s1/ct.nii.gz", np.zeros((4, 5, 6), np.int16), ct)
    mask = np.arange(4 * 5 * 6).reshape(4, 5, 6) % 7 == 0
    write_nifti(tmp_path / "s1/segmentations/liver.nii.gz", mask.astype(np.uint8), ct)
    flipped = affine_of("RPS", (1.5, 2.0, 3.0))
    flipped[:3, 3] = ct[:3, 3] - [3 * 1.5, 0, 0]
    write_nifti(tmp_path / "s1/segmentations/spleen.nii.gz",
                np.roll(mask, 1, axis=2)[::-1].astype(np.uint8), flipped)
    assert labels.main(["totalsegmentator", str(tmp_path)]) == 0
    merged = nib.load(tmp_path / "s1/labels.nii.gz")
    assert np.array_equal(merged.affine, nib.load(tmp_path / "s1/ct.nii.gz").affine)
    want = np.where(np.roll(mask, 1, axis=2), 2, mask.astype(int))
    assert np.array_equal(np.asarray(merged.dataobj), want)
    write_nifti(tmp_path / "s1/segmentations/liver.nii.gz", mask[1:].astype(np.uint8), ct)


def test_the_names_of_every_public_dataset_match_a_class(capsys):
    for name in labels.PUBLIC:
        if name not in labels.PER_STRUCTURE:
            labels.main([name])
            table = json.loads(capsys.readouterr().out)["labels"]
            label_map = labels.label_map(table, labels.CLASSES)
            assert label_map.unmatched in ([], ["bone", "brain"]), name


@pytest.mark.parametrize("args, what", [(["chaos"], "dcm2niix"), (["nonsense"], "unknown dataset"),
                                        (["kits", "{tmp}"], "no pair")])
def test_a_dataset_that_cannot_be_prepared_gives_one_line(tmp_path, capsys, args, what):
    assert labels.run(labels.main, [a.format(tmp=tmp_path) for a in args]) == 2
    assert what in capsys.readouterr().err and not list(tmp_path.iterdir())
