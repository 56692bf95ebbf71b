"""What there is to segment: the class table, its prompts, and the meaning of a label map.

    python labels.py                        print the 32 classes of the release with their prompts
    python labels.py --classes my.json      print a class table of your own

In the code, a class is an index 0..K-1; in a segmentation file, its value is that index + 1. The
label of a scan stays one integer array. Two tables give it its meaning: `LabelMap.regions` says to
which classes a value belongs (a tumour voxel is also an organ voxel, so a row may hold two trues),
and `LabelMap.annotated` says which classes the dataset labels at all.

K classes   V rows of the tables   D, H, W voxels
"""
from __future__ import annotations

import argparse
import functools
import re
import sys
from dataclasses import dataclass, field

import numpy as np

TEMPLATES = {
    "V1": "A photo of a {}.",
    "V2": "There is {} in this computerized tomography.",
    "V3": "A computerized tomography of a {}",      # the default; the release has no full stop
}
MAX_VALUE = 65535           # the largest value that a label map may hold (16 bits)


# ---- names -------------------------------------------------------------------------------------
# What a word means in the name of a structure, where that is not the word itself. Words that make
# no difference mean nothing, and an abbreviation means several words.
SAME_WORD = {
    "of": "", "the": "", "and": "", "gland": "", "glands": "",
    "primary": "", "primaries": "", "malignant": "",
    "l": "left", "r": "right",
    "kidneys": "kidney", "lungs": "lung", "adrenals": "adrenal", "veins": "vein",
    "vessels": "vessel",
    "hepatic": "liver", "renal": "kidney", "pancreatic": "pancreas", "pulmonary": "lung",
    "colonic": "colon", "splenic": "spleen", "gastric": "stomach", "duodenal": "duodenum",
    "esophageal": "esophagus", "rectal": "rectum", "prostatic": "prostate",
    "tumors": "tumor", "tumour": "tumor", "tumours": "tumor", "cancer": "tumor",
    "cancers": "tumor", "carcinoma": "tumor", "carcinomas": "tumor", "adenocarcinoma": "tumor",
    "lesion": "tumor", "lesions": "tumor", "mass": "tumor", "masses": "tumor",
    "metastasis": "tumor", "metastases": "tumor", "neoplasm": "tumor", "neoplasms": "tumor",
    "malignancy": "tumor", "cysts": "cyst", "nodules": "nodule", "haematoma": "hematoma",
    "pdac": "pancreas tumor", "hcc": "liver tumor", "rcc": "kidney tumor", "nsclc": "lung tumor",
}
# Only tumors and cysts have built-in classes; the other kinds of lesion belong to no class.
LESION_WORDS = frozenset({"tumor", "cyst", "nodule", "abscess", "hemorrhage", "hematoma", "polyp"})
SIDES = frozenset({"left", "right"})


@functools.cache
def name_key(name: str) -> frozenset[str]:
    """The words of a name in one form. Names that differ only in case, punctuation, word order or
    a known variant of a word have the same key.

    >>> sorted(name_key("Left Adrenal Gland")), sorted(name_key("ADRENALS_L"))
    (['adrenal', 'left'], ['adrenal', 'left'])
    >>> sorted(name_key("hepatic lesions")), sorted(name_key("PDAC lesion"))
    (['liver', 'tumor'], ['pancreas', 'tumor'])
    """
    words = re.sub(r"[\W_]+", " ", name.lower()).split()
    return frozenset(" ".join(SAME_WORD.get(word, word) for word in words).split())


# ---- the class table ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Class:
    """One entry of the class table."""
    name: str                          # shown to users and matched against datasets' names
    parents: tuple[str, ...] = ()      # name of the class that this one lies in; or two names, of
                                       # the right and the left organ, in one of which it lies
    side: str = ""                     # "left", "right", or "" for a structure without a side
    lesion: bool = False               # a tumour or cyst: may be absent, and is scored separately
    synonyms: tuple[str, ...] = ()     # other names that public datasets use for it
    prompt_name: str = ""              # fills the prompt template; "": the name does
    prompt: str = ""                   # a complete prompt, used instead of the template
    solid: float = 0.0                 # post-processing keeps a connected piece that has at least
                                       # this share of the largest piece's volume. 1: only the
                                       # largest; 0: every piece above a minimum volume

    @property
    def keys(self) -> set[frozenset[str]]:
        """The keys of its name and its synonyms; see name_key."""
        return {name_key(spelling) for spelling in (self.name, *self.synonyms)}

    @property
    def organ(self) -> frozenset[str]:
        """The words of the name without the side: the same for both sides of an organ.

        >>> Class("Right Kidney", side="right").organ, Class("kidney (left)", side="left").organ
        (frozenset({'kidney'}), frozenset({'kidney'}))
        """
        return name_key(self.name) - {self.side}

    def sentence(self, template: str) -> str:
        """The prompt of this class; `template` is a key of TEMPLATES or a text with {}."""
        text = TEMPLATES.get(template, template)
        if "{}" not in text:
            raise ValueError(f"prompt template {template!r} has no {{}}; known: {list(TEMPLATES)}")
        return self.prompt or text.replace("{}", self.prompt_name or self.name)


_KIDNEYS = ("Right Kidney", "Left Kidney")
_LUNGS = ("Right Lung", "Left Lung")

# In the order of the release, whose misspelt prompts "Arota" and "Celiac Truck" its weights need.
# solid is 0.1 for a lung, because the edge of a scan may cut its base into separate pieces.
CLASSES = (
    Class("Spleen", solid=1.0),
    Class("Right Kidney", side="right", solid=1.0),
    Class("Left Kidney", side="left", solid=1.0),
    Class("Gall Bladder", solid=1.0, synonyms=("gallbladder",)),
    Class("Esophagus", synonyms=("oesophagus",)),
    Class("Liver", solid=1.0),
    Class("Stomach", solid=1.0),
    Class("Aorta", prompt_name="Arota", synonyms=("arota",)),
    Class("Postcava", synonyms=("inferior vena cava", "ivc", "post cava")),
    Class("Portal Vein and Splenic Vein"),
    Class("Pancreas", solid=1.0),
    Class("Right Adrenal Gland", side="right", solid=1.0),
    Class("Left Adrenal Gland", side="left", solid=1.0),
    Class("Duodenum"),
    Class("Hepatic Vessel", parents=("Liver",)),
    Class("Right Lung", side="right", solid=0.1,
          synonyms=("right lung upper lobe", "right lung middle lobe", "right lung lower lobe")),
    Class("Left Lung", side="left", solid=0.1,
          synonyms=("left lung upper lobe", "left lung lower lobe")),
    Class("Colon", synonyms=("large bowel", "large intestine")),
    Class("Intestine", synonyms=("small bowel", "small intestine")),
    Class("Rectum"),
    Class("Bladder", solid=1.0, synonyms=("urinary bladder",)),
    Class("Prostate", solid=1.0, synonyms=("prostate uterus",)),
    Class("Left Head of Femur", side="left", solid=1.0, synonyms=("left femoral head",)),
    Class("Right Head of Femur", side="right", solid=1.0, synonyms=("right femoral head",)),
    Class("Celiac Trunk", prompt_name="Celiac Truck",
          synonyms=("celiac truck", "coeliac trunk", "celiac artery")),
    Class("Kidney Tumor", parents=_KIDNEYS, lesion=True),
    Class("Liver Tumor", parents=("Liver",), lesion=True),
    Class("Pancreas Tumor", parents=("Pancreas",), lesion=True),
    Class("Hepatic Vessel Tumor", parents=("Liver",), lesion=True),
    Class("Lung Tumor", parents=_LUNGS, lesion=True),
    Class("Colon Tumor", parents=("Colon",), lesion=True),
    Class("Kidney Cyst", parents=_KIDNEYS, lesion=True),
)


def ancestors(k: int, classes) -> set[int]:
    """Indices of all classes that contain class k, as far as they are among `classes`."""
    index = {c.name: i for i, c in enumerate(classes)}
    found: set[int] = set()
    todo = [k]
    while todo:
        parents = {index[p] for p in classes[todo.pop()].parents if p in index}
        todo += parents - found
        found |= parents
    return found


def other_side(k: int, classes) -> int | None:
    """The index of the same organ on the other side of the body, or None.

    >>> other_side(1, CLASSES), other_side(5, CLASSES)      # Right Kidney, Liver
    (2, None)
    """
    opposite = {"right": "left", "left": "right"}.get(classes[k].side)
    for i, c in enumerate(classes):
        if c.side and c.side == opposite and c.organ == classes[k].organ:
            return i
    return None


def match(name: str, classes: tuple[Class, ...] = CLASSES) -> tuple[int, ...]:
    """The indices of the classes that a name denotes.

    One class, or none; or, for an organ's name without a side, both sides, the right one first.
    The name of a lesion may tell a side that its class does not have.

    >>> match("kidney_left"), match("kidney"), match("femur_left"), match("right renal mass")
    ((2,), (1, 2), (), (25,))
    """
    key = name_key(name)
    for k, c in enumerate(classes):
        if key in c.keys:
            return (k,)
    for k, c in enumerate(classes):
        if c.lesion and key - SIDES in c.keys:
            return (k,)
    for right, c in enumerate(classes):
        if c.side == "right" and c.organ == key:
            left = other_side(right, classes)
            if left is not None:
                return (right, left)
    return ()


def select(names: list[str], classes: tuple[Class, ...]) -> list[int]:
    """Indices of the classes that a user named, in table order; without a side, both sides.

    raises  ValueError  if a name matches nothing
    """
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"expected a list of class names, got {names!r}")
    matches = {name: match(name, classes) for name in names}
    missing = [name for name, indices in matches.items() if not indices]
    if missing:
        raise ValueError(f"no class is called {missing}; known: {[c.name for c in classes]}")
    return sorted({k for indices in matches.values() for k in indices})


# ---- the meaning of a label file -----------------------------------------------------------------
@dataclass
class LabelMap:
    """The values of one dataset's label files, and their meaning.

    A label file is converted to label rows, the indices into `regions`. Row 0 is background. A
    value with a structure that the dataset does not split into left and right has two rows, the
    first for the right side; support.sides moves the voxels on the left from it to the second.
    """
    values: list[int]              # (V) the value that each row stands for
    names: dict[int, list[str]]    # {value: the names that dataset.json gives it}, also of values
                                   # that belong to no class
    regions: np.ndarray            # (V, K) bool: voxels with this label row belong to class k
    known: np.ndarray              # (V, K) bool: False where a row says nothing about class k;
                                   # such voxels are left out of the loss of the class
    annotated: np.ndarray          # (K,) bool: the dataset labels class k
    left_row: dict[int, int]       # the row of a value on the right -> its row on the left, where
                                   # the two sides are to be told apart by position

    def to_label_rows(self, raw: np.ndarray, where: str = "label map") -> np.ndarray:
        """(D, H, W) values of a label file -> label rows, uint8 or uint16.

        where   the file, for error messages
        raises  ValueError  if a value is not an integer or is not named in dataset.json
        """
        raw = _as_integers(raw, where)
        low, high = int(raw.min()), int(raw.max())
        if low < 0 or high > MAX_VALUE:
            raise ValueError(f"{where}: label values must lie in 0..{MAX_VALUE}, "
                             f"found {low}..{high}")
        row_of_value = np.full(high + 1, -1, np.int32)                 # -1: not named
        row_of_value[[0, *(v for v in self.names if v <= high)]] = 0   # named, but no class: 0
        for row, value in reversed(list(enumerate(self.values))):      # so that the first row of a
            if value <= high:                                          # value stays, its right one
                row_of_value[value] = row
        if (row_of_value < 0).any():
            present = np.flatnonzero(np.bincount(raw.ravel(), minlength=high + 1))
            unnamed = [int(v) for v in present if row_of_value[v] < 0]
            if unnamed:
                raise ValueError(f"{where}: label values {unnamed[:5]} are not named in "
                                 "dataset.json; name them there or remove them from the map")
        dtype = np.uint8 if len(self.regions) <= 256 else np.uint16
        return row_of_value.astype(dtype)[raw]


def label_map(labels: dict, classes: tuple[Class, ...], where: str = "labels", *,
              context: str = "") -> LabelMap:
    """The meaning of `labels`, the table of names and values in a dataset.json.

    where    the file, for error messages
    context  the dataset's name, which may tell the organ of a "tumor" or a "vessel"
    raises   ValueError  if the table is malformed or no name matches a class

    >>> found = label_map({"kidney": [1, 2], "kidney tumor": 2}, CLASSES)
    >>> found.values, found.left_row            # each value on the right, then on the left
    ([0, 1, 1, 2, 2], {1: 2, 3: 4})
    >>> [np.flatnonzero(row).tolist() for row in found.regions]
    [[], [1], [2], [1, 25], [2, 25]]
    """
    named_values = parse_labels(labels, where)
    meaning, annotated = match_labels(named_values, classes, where, context)
    names: dict[int, list[str]] = {}
    for name, values_of_name in named_values:
        for value in values_of_name:
            names.setdefault(value, []).append(name)
    values, regions, known, left_row = build_rows(meaning, classes)
    return LabelMap(values, names, regions, known, annotated, left_row)


INTEGER_TOLERANCE = 1e-3       # by which a label stored as float may miss an integer


def _as_integers(raw: np.ndarray, where: str) -> np.ndarray:
    """The values of a label that may be stored as floating-point numbers or bool -> integers."""
    if raw.dtype == bool:
        return raw.astype(np.uint8)
    if raw.dtype.kind in "iu":
        return raw
    rounded = np.rint(raw)
    no_integer = ~(np.abs(raw - rounded) < INTEGER_TOLERANCE)      # `not <`: NaN is no integer
    if no_integer.any():
        raise ValueError(f"{where}: a label must hold integers, found "
                         f"{float(raw.flat[np.argmax(no_integer)])!r}")
    return rounded.astype(np.int64)


def parse_labels(labels: dict, where: str) -> list[tuple[str, list[int]]]:
    """Step 1 of label_map: a table in one of three spellings -> [(name, values), ...].

    >>> parse_labels({"liver": 1, "liver tumor": 2}, "dataset.json")                   # nnU-Net
    [('liver', [1]), ('liver tumor', [2])]
    >>> parse_labels({"liver": [1, 2], "liver tumor": 2}, "dataset.json")     # its region lists
    [('liver', [1, 2]), ('liver tumor', [2])]
    >>> parse_labels({"1": "liver", "2": "liver tumor"}, "dataset.json")                   # MSD
    [('liver', [1]), ('liver tumor', [2])]
    """
    if not isinstance(labels, dict):
        raise ValueError(f'{where}: "labels" must be a table of names and values')
    if all(re.fullmatch(r"\d+", str(key)) for key in labels):                       # MSD
        pairs = [(str(name), [value]) for value, name in labels.items()]
    else:
        pairs = [(name, value if isinstance(value, list) else [value])
                 for name, value in labels.items()]
    try:
        named_values = [(name, [int(str(v)) for v in values]) for name, values in pairs]
    except ValueError:
        raise ValueError(f"{where}: label values must be integers") from None
    if any(not 0 <= v <= MAX_VALUE for _, values in named_values for v in values):
        raise ValueError(f"{where}: label values must lie in 0..{MAX_VALUE}")
    return named_values


@dataclass
class Meaning:
    """What the names of one value say about a voxel that has it."""
    sure: set[int] = field(default_factory=set)          # classes that it belongs to
    either: set[tuple[int, int]] = field(default_factory=set)      # (right, left): it belongs to
                                                         # one of the two
    unknown: set[int] = field(default_factory=set)       # classes of which nothing is said


def find_classes(names: list[str], classes: tuple[Class, ...],
                 context: str = "") -> dict[str, tuple[int, ...]]:
    """The classes that each name of a label table denotes, as in `match`.

    A name that alone denotes none is tried together with the dataset's name, the context. The bare
    word of a lesion is then tried together with the only organ that the table names; the two sides
    of an organ count as one.

    >>> find_classes(["Vessel", "Tumour"], CLASSES, context="HepaticVessel")
    {'Vessel': (14,), 'Tumour': (28,)}
    >>> find_classes(["pancreas", "lesion"], CLASSES)
    {'pancreas': (10,), 'lesion': (27,)}
    >>> find_classes(["liver", "spleen", "lesion"], CLASSES)
    {'liver': (5,), 'spleen': (0,), 'lesion': ()}
    """
    context = re.sub(r"^(Task|Dataset)\d+_", "", context)
    context = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", context)              # HepaticVessel: two words
    found = {name: match(name, classes) for name in names}
    organs = {host_words(classes[k]) for indices in found.values() for k in indices} - {""}
    for name, indices in found.items():
        key = name_key(name)
        if key and not indices:
            indices = match(f"{name} {context}", classes)
        if key and not indices and key - SIDES <= LESION_WORDS and len(organs) == 1:
            organ, = organs
            indices = match(f"{name} {organ}", classes)
        found[name] = indices
    return found


def host_words(c: Class) -> str:
    """The words of a class's name that tell the organ: without a side and the kind of a lesion.

    >>> host_words(CLASSES[1]), host_words(CLASSES[25])       # Right Kidney, Kidney Tumor
    ('kidney', 'kidney')
    """
    return " ".join(sorted(name_key(c.name) - SIDES - LESION_WORDS))


def match_labels(named_values: list[tuple[str, list[int]]], classes: tuple[Class, ...], where: str,
                 context: str = "") -> tuple[dict[int, Meaning], np.ndarray]:
    """Step 2 of label_map: what each value says about the classes, by the names given to it.

    returns  meaning    {value: Meaning} of the values that are not simply background
             annotated  (K,) bool

    >>> named_values = [("kidney", [1, 2]), ("cancer", [2]), ("sacrum", [3]), ("ignore", [4])]
    >>> meaning, annotated = match_labels(named_values, CLASSES, "dataset.json")
    >>> meaning[1].either, meaning[2].sure        # 1 and 2: Right and Left Kidney, 25: Kidney Tumor
    ({(1, 2)}, {25})
    >>> len(meaning[4].unknown), np.flatnonzero(annotated).tolist()
    (32, [1, 2, 25])
    """
    found = find_classes([name for name, _ in named_values], classes, context)
    meaning: dict[int, Meaning] = {}
    annotated = np.zeros(len(classes), bool)
    for name, values in named_values:
        if name.lower() == "background":
            continue
        of_name = meaning_of_name(name, found[name], classes)
        kinds = unclear_kinds(found[name], values, named_values, found, classes)
        if kinds:                              # of the lesion; the organ that it lies in is sure
            sure, either = add_parents(of_name.sure, of_name.either, classes)
            of_name = Meaning(sure - kinds, either, unknown=kinds)
        else:
            annotated[list(found[name])] = True
        if of_name == Meaning():
            continue
        for value in values:
            if value == 0:
                raise ValueError(f"{where}: {name!r} has value 0, which is background")
            of_value = meaning.setdefault(value, Meaning())
            of_value.sure |= of_name.sure
            of_value.either |= of_name.either
            of_value.unknown |= of_name.unknown
    if not annotated.any():
        raise ValueError(f"{where}: none of {[n for n, _ in named_values][:8]} is a class here; "
                         "see `python labels.py`, or pass a class table with --classes")
    return meaning, annotated


def unclear_kinds(indices: tuple[int, ...], values: list[int], named_values,
                  found: dict[str, tuple[int, ...]], classes) -> set[int]:
    """The lesions of one organ between which a name does not tell, because another name denotes one
    of them and has only some of its values.

    indices, values   of the name
    found             the classes of all names

    >>> found = {"masses": (25,), "tumor": (25,)}              # 25, 31: Kidney Tumor, Kidney Cyst
    >>> unclear_kinds((25,), [2, 3], [("masses", [2, 3]), ("tumor", [2])], found, CLASSES)   # KiTS
    {25, 31}
    """
    kinds = set()
    for k in indices:
        if classes[k].lesion:
            organ = host_words(classes[k])
            kinds |= {i for i, c in enumerate(classes) if c.lesion and host_words(c) == organ}
    for other, its_values in named_values:
        if set(its_values) < set(values) and kinds.intersection(found[other]):
            return kinds
    return set()


def meaning_of_name(name: str, indices: tuple[int, ...], classes) -> Meaning:
    """What a name in dataset.json says, if it denotes the classes `indices`.

    a class                                   the class, or one of its two sides
    a lesion with a side                      its class, and the organ of that side
    "ignore" (nnU-Net)                        nothing is known about any class
    a lesion without a class, "liver abscess" nothing is known about the organ and its lesions
    the same without an organ, "abscess"      nothing is known about any class
    a part of an organ, "liver segment 4"     nothing is known about the organ
    any other name                            background: Meaning()
    """
    key = name_key(name)
    everything = set(range(len(classes)))
    if key == {"ignore"}:
        return Meaning(unknown=everything)
    if len(indices) == 2:
        return Meaning(either={indices})
    if indices:
        hosts = {k for k, c in enumerate(classes)
                 if c.name in classes[indices[0]].parents and c.side in key}
        return Meaning(sure={*indices, *hosts})
    organs = {k for k, c in enumerate(classes) if not c.lesion and not _is_other_side(c, key)
              and any(words - {c.side} <= key for words in c.keys)}
    if not key & LESION_WORDS:
        return Meaning(unknown=organs)
    lesions = {k for k, c in enumerate(classes)
               if c.lesion and any(classes[i].name in c.parents for i in organs)}
    return Meaning(unknown=organs | lesions or everything)


def _is_other_side(c: Class, key: frozenset[str]) -> bool:
    """Whether a name tells a side, and the class has the other one."""
    sides = key & SIDES
    return bool(c.side and sides) and c.side not in sides


def add_parents(sure: set[int], either: set[tuple[int, int]], classes) -> tuple[set, set]:
    """What a value means, with the parents of its classes: a child lies inside its parent.

    A class with two parents lies in one of the two, unless one of them is sure already. The same
    holds for an organ without a side, if another name of the value tells the side.

    >>> add_parents({26}, set(), CLASSES)       # Liver Tumor: in the Liver
    ({26, 5}, set())
    >>> add_parents({25}, set(), CLASSES)       # Kidney Tumor: in the right or the left kidney
    ({25}, {(1, 2)})
    >>> add_parents({25, 2}, set(), CLASSES)    # Kidney Tumor and Left Kidney
    ({25, 2}, set())
    """
    index = {c.name: k for k, c in enumerate(classes)}
    sure, either = set(sure), set(either)
    todo = list(sure)
    while todo:
        parents = [index[p] for p in classes[todo.pop()].parents if p in index]
        if len(parents) == 1 and parents[0] not in sure:
            sure.add(parents[0])
            todo.append(parents[0])
        elif len(parents) == 2:
            right, left = sorted(parents, key=lambda k: classes[k].side == "left")
            either.add((right, left))
    either = {pair for pair in either if not sure & set(pair)}
    return sure, either


def build_rows(meaning: dict[int, Meaning], classes) -> tuple[list, np.ndarray, np.ndarray, dict]:
    """Step 3 of label_map: add the parents, and build a row for each value or two for its sides.

    What another name of the same value says for sure is known: a voxel of the kidney that is also
    an unclear lesion is kidney.

    returns  values, regions, known, left_row, as in LabelMap
    """
    rows: list[tuple[int, set[int], set[int]]] = [(0, set(), set())]     # value, classes, unknown
    left_row = {}
    for value, of_value in sorted(meaning.items()):
        sure, either = add_parents(of_value.sure, of_value.either, classes)
        rows.append((value, sure | {right for right, _ in either}, of_value.unknown))
        if either:
            left_row[len(rows) - 1] = len(rows)
            rows.append((value, sure | {left for _, left in either}, of_value.unknown))
    regions = np.zeros((len(rows), len(classes)), bool)
    known = np.ones_like(regions)
    for row, (_, classes_of_row, unknown) in enumerate(rows):
        regions[row, list(classes_of_row)] = True
        known[row, list(unknown)] = False
    known |= regions
    return [value for value, _, _ in rows], regions, known, left_row


# ---- the command -------------------------------------------------------------------------------
def main(argv=None) -> int:
    from support import class_tables
    ap = argparse.ArgumentParser(description="Print the class table with its prompts.")
    ap.add_argument("--classes", metavar="FILE",
                    help="print this class table (JSON) instead of the built-in one")
    ap.add_argument("--prompt-template", default="V3",
                    help="template of the prompts printed: V1, V2 or V3, or a text "
                    "with {} for the class name (default: V3)")
    args = ap.parse_args(argv)
    print(f"{'value':>5}  {'name':29} {'properties':18} {'parents':25} {'prompt':62} synonyms")
    for value, c in enumerate(class_tables.load_classes(args.classes), 1):
        properties = [c.side] if c.side else []
        properties += ["lesion"] if c.lesion else []
        properties += [f"solid {c.solid:g}"] if c.solid else []
        print(f"{value:5}  {c.name:29} {', '.join(properties) or '-':18} "
              f"{', '.join(c.parents) or '-':25} {c.sentence(args.prompt_template):62} "
              f"{', '.join(c.synonyms) or '-'}")
    return 0


if __name__ == "__main__":
    from support import processes
    sys.exit(processes.run(main))
