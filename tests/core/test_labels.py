"""The class table, names, and the meaning of label files."""
import dataclasses
import doctest
import json

import numpy as np
import pytest

import labels
from support import checkpoints, class_tables, datasets


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
    ("liver_lesion", ["Liver Tumor"]), ("renal mass", ["Kidney Tumor"]),
    ("kidney_cyst_left", ["Kidney Cyst"]), ("PDAC lesion", ["Pancreas Tumor"]),
    ("liver cyst", []), ("femur_left", []), ("liver segment", []),
    ("background", []), ("", []), ("tumor", []),
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


def test_solid_of_the_built_in_table():
    assert {c.name for c in labels.CLASSES if c.solid == 1.0} == {
        "Spleen", "Right Kidney", "Left Kidney", "Gall Bladder", "Liver", "Stomach", "Pancreas",
        "Right Adrenal Gland", "Left Adrenal Gland", "Bladder", "Prostate", "Left Head of Femur",
        "Right Head of Femur"}
    assert {c.name: c.solid for c in labels.CLASSES if 0 < c.solid < 1} == \
        {"Right Lung": 0.1, "Left Lung": 0.1}


def test_organ_is_the_name_without_case_word_order_and_side():
    for spelling in ("Right Kidney", "right kidney", "KIDNEY, RIGHT", "kidney_r"):
        assert labels.Class(spelling, side="right").organ == {"kidney"}
    assert labels.Class("Head of Left Femur", side="left").organ == {"femur", "head"}
    assert labels.Class("Liver").organ == {"liver"}
    assert labels.Class("Left Atrium").organ == {"atrium", "left"}      # no side: nothing removed


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
    table = class_tables.make_classes([
        {"name": "Right Kidney"}, {"name": "Left Kidney", "side": "left"},
        {"name": "Right Lung", "side": "right"}])
    assert [labels.other_side(k, table) for k in range(3)] == [None] * 3


def test_no_name_or_synonym_denotes_two_classes():
    seen = {}
    for c in labels.CLASSES:
        for key in c.keys:
            assert seen.setdefault(key, c.name) == c.name


# ---- the three steps of label_map, and the whole -------------------------------------------------
def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(labels)
    assert result.failed == 0 and result.attempted > 10


@pytest.mark.parametrize("table", [
    {"kidney": [1, 2], "kidney tumor": 2, "sacrum": [3]},
    {"kidney": ["1", 2], "kidney tumor": "2", "sacrum": 3}])
def test_step_1_parses_names_and_values(table):
    assert labels.parse_labels(table, "x") == [("kidney", [1, 2]), ("kidney tumor", [2]),
                                               ("sacrum", [3])]


def test_step_1_parses_msds_values_and_names():
    assert labels.parse_labels({"0": "background", "1": "liver", "2": "cancer"}, "x") == \
        [("background", [0]), ("liver", [1]), ("cancer", [2])]


def test_step_3_adds_parents_and_builds_a_row_per_value_and_side():
    """Value 7 is Kidney Tumor (25) in the right or left kidney (1, 2), value 9 Liver Tumor (26)."""
    meaning = {9: labels.Meaning({26}, unknown={5, 0}), 7: labels.Meaning({25})}
    values, regions, known, left_row = labels.build_rows(meaning, labels.CLASSES)
    assert values == [0, 7, 7, 9] and left_row == {1: 2}
    assert [np.flatnonzero(row).tolist() for row in regions] == [[], [1, 25], [2, 25], [5, 26]]
    assert [np.flatnonzero(~row).tolist() for row in known] == [[], [], [], [0]]


# ---- what a name says, and what it leaves open ---------------------------------------------------
def meaning_of(table, context="") -> list[str]:
    label_map = labels.label_map(table, labels.CLASSES, context=context)
    return datasets.describe_values(label_map, labels.CLASSES)


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
    assert datasets.describe_values(label_map, labels.CLASSES) == [
        "1 liver -> Liver", "2 spleen -> Spleen", "3 ignore -> left out of the loss of every class",
        "4 lesion -> left out of the loss of every class",
        "5 liver abscess -> left out of the loss of Liver, Liver Tumor, Hepatic Vessel Tumor",
        "6 liver segment 4 -> left out of the loss of Liver",
        "7 left kidney stone -> left out of the loss of Left Kidney",
        "background: sacrum, vertebrae L1"]
    assert label_map.values == [0, 1, 2, 3, 4, 5, 6, 7] and not label_map.regions[3:8].any()
    unknown = [np.flatnonzero(~row).tolist() for row in label_map.known]
    assert unknown == [[], [], [], [*range(32)], [*range(32)], [5, 26, 28], [5], [2]]


def test_what_another_name_of_a_value_says_is_known():
    """Region-based: value 3 is spleen, and an abscess, which alone would leave everything open."""
    label_map = labels.label_map({"liver": 1, "spleen": [2, 3], "abscess": 3}, labels.CLASSES)
    assert label_map.known[3].tolist() == [k == 0 for k in range(32)]


@pytest.mark.parametrize("table, want", [
    ({"kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}, [     # KiTS23, by nnU-Net's converter
        "1 kidney -> Right Kidney or Left Kidney",
        "2 kidney, masses, tumor -> Right Kidney or Left Kidney; Kidney Tumor; left out of the "
        "loss of Kidney Cyst",
        "3 kidney, masses -> Right Kidney or Left Kidney; left out of the loss of Kidney Tumor, "
        "Kidney Cyst"]),
    ({"left kidney": 1, "kidney lesion": [2, 3], "kidney cyst": 3}, [
        "1 left kidney -> Left Kidney",
        "2 kidney lesion -> Right Kidney or Left Kidney; left out of the loss of Kidney Tumor, "
        "Kidney Cyst",
        "3 kidney lesion, kidney cyst -> Right Kidney or Left Kidney; Kidney Cyst; left out of "
        "the loss of Kidney Tumor"]),
    ({"background": 0, "liver": [1, 2], "tumor": 2}, [          # LiTS, by nnU-Net's converter
        "1 liver -> Liver", "2 liver, tumor -> Liver + Liver Tumor"])])
def test_a_region_of_several_kinds_of_lesions_is_none_of_them(table, want):
    """Value 3 of KiTS23 is a cyst, which "masses" does not say."""
    assert meaning_of(table) == want


def test_a_name_without_class_is_tried_with_the_dataset_and_then_with_the_only_organ():
    assert meaning_of({"spleen": 1, "tumor": 2}, "Liver")[1] == "2 tumor -> Liver + Liver Tumor"
    assert meaning_of({"left kidney": 1, "right kidney": 2, "cyst": 3})[2] == \
        "3 cyst -> Right Kidney or Left Kidney; Kidney Cyst"
    assert meaning_of({"spleen": 1, "stone": 2}, "Liver")[1] == "background: stone"


def test_an_organ_of_which_the_table_has_one_side_is_not_background_without_its_side():
    table = class_tables.make_classes(["Right Kidney", "Liver"])
    label_map = labels.label_map({"liver": 1, "kidney": 2, "left kidney": 3}, table)
    assert label_map.known.tolist() == [[True, True], [True, True], [False, True]]


@pytest.mark.parametrize("names, want", [
    (["Liver", "Liver Tumor"], ["1 liver -> Liver", "2 liver, liver tumor -> Liver + Liver Tumor",
                                "background: spinal cord"]),
    (["Spinal Cord"], ["3 spinal cord -> Spinal Cord", "background: liver, liver"])])
def test_a_value_that_belongs_to_every_class_of_a_table_is_left_out_of_no_loss(names, want):
    classes = class_tables.make_classes(names)
    table = {"liver": [1, 2], "liver tumor": 2, "spinal cord": 3}
    if len(names) == 1:
        table = {"liver": [1, 2], "spinal cord": 3}
    label_map = labels.label_map(table, classes)
    assert label_map.known.all()
    assert datasets.describe_values(label_map, classes) == want


@pytest.mark.parametrize("word", sorted(
    labels.LESION_WORDS | {word for word, kind in labels.SAME_WORD.items() if "tumor" in kind}))
@pytest.mark.parametrize("organ", ["spleen", "kidney", "left kidney", "liver", "adrenal gland"])
def test_no_lesion_in_an_organ_is_taught_as_background(organ, word):
    """Whatever its name: it belongs to the organ, or is left out of the organ's loss."""
    label_map = labels.label_map({organ: 1, f"{organ} {word}": 2, "stomach": 3}, labels.CLASSES)
    values = np.array(label_map.values)
    own = np.flatnonzero(label_map.regions[values == 1].any(0))
    regions, known = label_map.regions[values == 2], label_map.known[values == 2]
    assert len(own) and all(regions[:, k].any() or not known[:, k].any() for k in own)


def test_three_spellings_of_one_label_table():
    """LiTS as nnU-Net, region-based nnU-Net and MSD write it: a tumour voxel is liver in each."""
    forms = [{"background": 0, "liver": 1, "liver tumor": 2},
             {"background": 0, "liver": [1, 2], "liver tumor": [2]},
             {"0": "background", "1": "liver", "2": "liver tumor"}]
    for form in forms:
        label_map = labels.label_map(form, labels.CLASSES)
        assert label_map.values == [0, 1, 2] and not label_map.left_row
        assert [np.flatnonzero(r).tolist() for r in label_map.regions] == [[], [5], [5, 26]]
        assert np.flatnonzero(label_map.annotated).tolist() == [5, 26]


def test_kidneys_without_sides_become_two_classes():
    table = {"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3}
    label_map = labels.label_map(table, labels.CLASSES)
    assert np.flatnonzero(label_map.annotated).tolist() == [1, 2, 25, 31]
    assert label_map.values == [0, 1, 1, 2, 2, 3, 3] and label_map.left_row == {1: 2, 3: 4, 5: 6}
    assert np.flatnonzero(label_map.regions[3]).tolist() == [1, 25]        # tumour on the right
    assert np.flatnonzero(label_map.regions[4]).tolist() == [2, 25]        # and on the left
    assert label_map.to_label_rows(np.array([0, 1, 2, 3])).tolist() == [0, 1, 3, 5]


def test_values_whose_names_have_no_class_are_background():
    label_map = labels.label_map({"liver": 3, "sacrum": 25}, labels.CLASSES)
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


def test_a_class_table_of_ones_own_replaces_the_built_in_one(tmp_path):
    path = tmp_path / "knee.json"
    path.write_text(json.dumps(["Femur", {"name": "Medial Meniscus", "prompt": "A 3D MRI scan of "
                                          "the medial meniscus", "parents": []}]))
    table = class_tables.load_classes(path)
    assert [c.name for c in table] == ["Femur", "Medial Meniscus"]
    assert labels.match("medial_meniscus", table) == (1,)
    assert table[1].sentence("V1") == "A 3D MRI scan of the medial meniscus"


def test_a_class_table_of_ones_own_sets_solid(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"name": "Liver", "solid": 1}, {"name": "Left Lung", "solid": 0.25},
                                {"name": "Spleen"}]))
    assert [c.solid for c in class_tables.load_classes(path)] == [1, 0.25, 0]


# ---- bare names of built-in classes --------------------------------------------------------------
def test_a_table_of_the_built_in_names_is_the_built_in_table():
    names = [c.name for c in labels.CLASSES]
    assert class_tables.make_classes(names) == labels.CLASSES
    assert class_tables.make_classes(names[::-1]) == labels.CLASSES[::-1]


def test_a_bare_name_keeps_its_spelling_and_takes_the_rest():
    aorta, kidney, femur = class_tables.make_classes(["aorta", "kidney_left", "Femur"])
    assert aorta.name == "aorta"
    assert aorta.sentence("V3") == "A computerized tomography of a Arota"       # as trained
    assert kidney == labels.Class("kidney_left", side="left", solid=1.0, prompt_name="Left Kidney",
                                  synonyms=("Left Kidney",))
    assert femur == labels.Class("Femur")


def test_an_object_with_the_name_of_a_built_in_class_keeps_what_it_says():
    entries = [{"name": "Right Kidney"}, {"name": "Kidney Tumor", "parents": ["Right Kidney"]}]
    assert class_tables.make_classes(entries) == (
        labels.Class("Right Kidney"), labels.Class("Kidney Tumor", parents=("Right Kidney",)))


def test_a_synonym_means_the_class():
    cava, = class_tables.make_classes(["IVC"])
    assert cava.sentence("V3") == "A computerized tomography of a Postcava"
    for name in ("IVC", "ivc", "postcava", "inferior vena cava"):
        assert labels.match(name, (cava,)) == (0,), name
    celiac, = class_tables.make_classes(["Celiac Artery"])
    assert celiac.prompt_name == "Celiac Truck" and labels.match("celiac_trunk", (celiac,)) == (0,)


@pytest.mark.parametrize("table", [
    ["IVC", "Postcava"], ["Intestine", "Small Bowel"], ["Prostate", "prostate uterus"],
    ["Liver Tumor", "hepatic lesion"], [{"name": "X", "synonyms": ["y"]}, {"name": "Y"}]])
def test_two_names_of_one_structure_are_refused(table):
    with pytest.raises(ValueError, match="are the same name"):
        class_tables.make_classes(table)


def test_a_lobe_is_not_its_lung():
    """Its row stays bare, and its name is not the lung's any more."""
    table = class_tables.make_classes(["Right Lung", "right lung upper lobe",
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
    (["Kidney Tumor", "Liver"], ()),
    (["Colon Tumor", "Large Bowel"], ("Large Bowel",)),
    (["Liver Tumor", {"name": "liver", "prompt": "a liver"}], ("liver",))])
def test_parents_of_a_bare_name_are_those_that_the_table_holds(names, parents):
    table = class_tables.make_classes(names)
    assert table[0].parents == parents and table[0].lesion
    entries = json.loads(json.dumps([dataclasses.asdict(c) for c in table]))    # in a checkpoint
    assert checkpoints.classes_of_checkpoint({"classes": entries}, len(table), "a.pt") == table


def test_a_table_with_one_of_two_kidneys_and_their_tumor_is_refused():
    """Whether the tumour lies in the kidney of the table would not be known."""
    with pytest.raises(ValueError, match="t.json: Kidney Tumor lies in Right Kidney or Left"):
        class_tables.make_classes(["Kidney Tumor", "kidney right"], where="t.json")
    entry = {"name": "Kidney Tumor", "parents": ["Right Kidney", "Left Kidny"]}
    with pytest.raises(ValueError, match="parents"):
        class_tables.make_classes(["Right Kidney", "Left Kidney", entry])


def test_a_kidney_without_a_side_matches_both_kidneys_of_a_bare_table():
    """The table of the claim `transfer`, and a dataset that labels "kidney"."""
    table = class_tables.make_classes([
        "Liver", "Liver Tumor", "Spleen", "Right Kidney", "Left Kidney", "Kidney Cyst"])
    label_map = labels.label_map({"kidney": 1, "kidney tumor": 2, "kidney cyst": 3}, table)
    assert np.flatnonzero(label_map.annotated).tolist() == [3, 4, 5]
    assert datasets.describe_values(label_map, table) == [
        "1 kidney -> Right Kidney or Left Kidney",
        "2 kidney tumor -> left out of the loss of Right Kidney, Left Kidney, Kidney Cyst",
        "3 kidney cyst -> Right Kidney or Left Kidney; Kidney Cyst"]


def test_a_tumor_lies_in_a_kidney_without_a_side():
    """KiTS without cysts, in the table that one would write for it."""
    table = class_tables.make_classes(["Kidney", "Kidney Tumor"])
    label_map = labels.label_map({"kidney": 1, "tumor": 2}, table)
    assert label_map.regions.tolist() == [[False, False], [True, False], [True, True]]


def test_parents_may_be_among_the_classes_of_a_model_that_is_extended():
    old = class_tables.make_classes(["Right Kidney", "kidney (left)", "Postcava"])
    new, = class_tables.make_classes(["Kidney Cyst"], beside=old)
    assert new.parents == ("Right Kidney", "kidney (left)")
    own = [{"name": "Renal Scar", "parents": ["Right Kidney"]}]
    assert class_tables.make_classes(own, beside=old)[0].parents == ("Right Kidney",)
    with pytest.raises(ValueError, match="parents"):
        class_tables.make_classes(own)


def test_a_checkpoint_without_classes_has_the_built_in_ones():
    assert checkpoints.classes_of_checkpoint({}, 32, "a.pt") == labels.CLASSES


def test_a_checkpoint_has_a_class_for_every_text_embedding():
    """A derivative of the release with 25 rows and no names is not the first 25 of the 32."""
    assert checkpoints.classes_of_checkpoint({}, 32, "a.pt") == labels.CLASSES
    with pytest.raises(ValueError, match="a.pth: 25 text embeddings and no class names.*--init"):
        checkpoints.classes_of_checkpoint({}, 25, "a.pth")
    own = {"classes": ["Femur", "Tibia"]}
    assert len(checkpoints.classes_of_checkpoint(own, 2, "a.pt")) == 2
    with pytest.raises(ValueError, match="a.pth: 3 text embeddings for 2 classes"):
        checkpoints.classes_of_checkpoint(own, 3, "a.pth")


def test_fields_of_a_checkpoint_that_class_does_not_have_are_passed_over():
    own = (labels.Class("Liver", solid=0.3), labels.Class("Aorta"), labels.Class("Spleen"))
    entries = [{**dataclasses.asdict(c), "vessel": True} for c in own]
    assert checkpoints.classes_of_checkpoint({"classes": entries}, 3, "a.pt") == own
    with pytest.raises(ValueError, match="vessel"):
        class_tables.make_classes(entries)
    with pytest.raises(ValueError, match="entry 0: name"):
        checkpoints.classes_of_checkpoint({"classes": [{"name": ["Liver"]}]}, 1, "a.pt")


@pytest.mark.parametrize("content, what", [
    ("{", "JSON"), ("{}", "list"), ("[]", "list"), ("[3]", "name"), ('[{"prompt": "x"}]', "name"),
    ('[{"name": "a", "colour": 1}]', "colour"), ('["a", "A"]', "same name"),
    ('[{"name": "a", "parents": "b"}]', "parents"),
    ('[{"name": "a", "parents": ["b"]}]', "parents"),
    ('[{"name": "a", "synonyms": [1]}]', "synonyms"), ('[{"name": 3}]', "name"),
    ('[{"name": "a", "side": "up"}]', "side"),
    ('[{"name": "a", "lesion": "no"}]', "lesion"), ('[{"name": "a", "side": []}]', "side"),
    ('[{"name": "a", "solid": 1.5}]', "solid"), ('[{"name": "a", "solid": -1}]', "solid"),
    ('[{"name": "a", "solid": true}]', "solid"), ('[{"name": "a", "solid": "1"}]', "solid"),
    ('[{"name": "a", "solid": NaN}]', "solid"), ('["a", "a"]', "same name"),
    ('[{"name": "a", "parents": ["b"]}, {"name": "b", "parents": ["a"]}]', "ancestor"),
    ('[{"name": "a", "parents": ["a"]}]', "ancestor")])
def test_a_malformed_class_table_is_refused_with_the_reason(tmp_path, content, what):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=what):
        class_tables.load_classes(tmp_path / "t.json")


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
        "1 liver cancer lesion liver A computerized tomography of a Liver Tumor Liver Tumor",
        "2 liver solid 1 - A computerized tomography of a Liver Liver",
        "3 Aorta - - A computerized tomography of a Aorta -"]
