"""A class table of one's own: read from a JSON file, completed from the built-in one, checked."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import labels
from support import files


def load_classes(path: str | Path | None = None,
                 beside: tuple[labels.Class, ...] = ()) -> tuple[labels.Class, ...]:
    """Read a class table: a JSON list of names, or of objects with the fields of Class.

    What make_classes says of bare names and of `beside` holds.

    path    None: the built-in table
    raises  ValueError  with the file and the entry, if a field, a name or a parent is wrong
    """
    if path is None:
        return labels.CLASSES
    entries = files.read_json(path, (dict, list))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: a class table is a list such as ["Femur", {{"name": "Tibia"}}]')
    return make_classes(entries, where=str(path), beside=beside)


def make_classes(entries: list, where: str = "class table",
                 beside: tuple[labels.Class, ...] = ()) -> tuple[labels.Class, ...]:
    """Names, or dicts of the fields of Class -> a checked class table.

    A bare name of a built-in class takes everything else from that class, with those of its parents
    that the table holds. A dict keeps what it says, and nothing is added to it.

    where   what an error message names as the source
    beside  the classes of a model to which these are added; parents may be among them
    raises  ValueError  if a field, a name or a parent is wrong

    >>> kidney, tumor = make_classes(["kidney_left", {"name": "Scar", "parents": ["kidney_left"]}])
    >>> kidney.side, kidney.sentence("V3"), tumor.parents
    ('left', 'A computerized tomography of a Left Kidney', ('kidney_left',))
    """
    table = []
    for i, entry in enumerate(entries):
        bare = isinstance(entry, str)
        table.append(_built_in(entry) if bare else _class_of_dict(entry, f"{where}: entry {i}"))
    own_keys: set[frozenset[str]] = set()      # of classes that are not built in; a built-in class
    for entry, c in zip(entries, table, strict=True):              # leaves these synonyms to them
        if isinstance(entry, dict) or c == labels.Class(entry):
            own_keys |= c.keys
    classes = []
    for entry, c in zip(entries, table, strict=True):
        if isinstance(entry, str):
            synonyms = tuple(s for s in c.synonyms if labels.name_key(s) not in own_keys)
            c = replace(c, synonyms=synonyms, parents=_parents_in((*table, *beside), c, where))
        classes.append(c)
    _check_names(classes, where)
    _check_parents(classes, beside, where)
    return tuple(classes)


def _check_names(classes, where: str) -> None:
    """Raise ValueError unless every name and synonym denotes one class."""
    seen: dict[frozenset[str], str] = {}
    for c in classes:
        for key in c.keys:
            if not key:
                raise ValueError(f"{where}: {c.name!r} has no word that names a structure")
            if key in seen:
                raise ValueError(f"{where}: {c.name!r} and {seen[key]!r} are the same name")
        seen |= dict.fromkeys(c.keys, c.name)


def _check_parents(classes, beside, where: str) -> None:
    """Raise ValueError unless parents are other classes: one, or the two sides of an organ."""
    side_of = {c.name: c.side for c in (*classes, *beside)}
    for k, c in enumerate(classes):
        if not side_of.keys() >= set(c.parents):
            raise ValueError(f"{where}: {c.name}: parents {list(c.parents)} must be names of "
                             "other classes of the table")
        if len(c.parents) > 1 and sorted(side_of[p] for p in c.parents) != ["left", "right"]:
            raise ValueError(f"{where}: {c.name}: parents {list(c.parents)} must be one class, or "
                             "the right and the left side of an organ")
        if k in labels.ancestors(k, classes):
            raise ValueError(f"{where}: {c.name} is its own ancestor")


def _built_in(name: str) -> labels.Class:
    """The built-in class of this name, under this name; or a class that has only the name.

    A lobe is not its lung, although a dataset's lobes are matched to the lung.
    """
    key = labels.name_key(name)
    for c in labels.CLASSES:
        if name == c.name:
            return c
        if key in c.keys and "lobe" not in key:
            return replace(c, name=name, prompt_name=c.prompt_name or c.name,
                           synonyms=(c.name, *c.synonyms))
    return labels.Class(name)


def _class_of_dict(entry, where: str) -> labels.Class:
    """The fields of Class -> Class, their types checked."""
    if not isinstance(entry, dict) or not entry.get("name"):
        raise ValueError(f"{where} needs a name")
    try:
        c = labels.Class(**{key: tuple(value) if isinstance(value, list) else value
                     for key, value in entry.items()})
    except TypeError as e:
        raise ValueError(f"{where}: {e}") from None                  # it names the unknown field
    for key, value in vars(c).items():
        right_type = type(value) is type(getattr(labels.CLASSES[0], key))
        if key == "solid":
            right_type = type(value) in (int, float) and 0 <= value <= 1
        if key in ("parents", "synonyms"):
            right_type = right_type and all(isinstance(name, str) for name in value)
        if not right_type or (key == "side" and value not in ("", *labels.SIDES)):
            raise ValueError(f"{where}: {key} cannot be {value!r}")
    return c


def _parents_in(table: tuple[labels.Class, ...], c: labels.Class, where: str) -> tuple[str, ...]:
    """A class table's names for the parents of a built-in class: its right and left organ, or the
    whole organ; () if it has neither.

    raises  ValueError  if the table holds only one of the two sides: whether a lesion lies in it
                        would not be known
    """
    rows = [labels.match(parent, table) for parent in c.parents]
    if not all(rows):
        organs = {" ".join(labels.name_key(parent) - labels.SIDES) for parent in c.parents}
        whole = [labels.match(organ, table) for organ in organs]
        if any(rows) and not any(whole):
            raise ValueError(f"{where}: {c.name} lies in {' or '.join(c.parents)}, and the table "
                             "has only one of them; add the other one")
        rows = whole
    return tuple(table[k].name for row in rows for k in row)
