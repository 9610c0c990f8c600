"""Which of a teacher's classes are the data's: in order, by name, or as a file says."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import RecipeError

_WORDNET_ID = re.compile(r"n\d{8}")
# Classes whose nearest names are shown.
_MOST_SHOWN = 5
# Of so many classes, ImageNet's may be told by their names.
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ClassMap:
    """What a file says: the teacher's classes of each class of the data.

    Attributes:
        file: As it was given.
        entries: Names and numbers of the teacher's classes, by class of the data.
        lines: Where each stands, by class and place in its list.
    """

    file: str
    entries: Mapping[str, tuple[str | int, ...]]
    lines: Mapping[tuple[str, int], int]


@dataclass(frozen=True)
class Mapped:
    """The teacher's classes of each class of the data.

    Attributes:
        groups: Numbers of the teacher's classes, one tuple a class of the data, in its order.
        total: Classes that the teacher knows.
        source: Where that comes from, in words.
    """

    groups: tuple[tuple[int, ...], ...]
    total: int
    source: str

    def __str__(self) -> str:
        """Say it of the teacher, in a line."""
        members = sum(map(len, self.groups))
        many = f" {len(self.groups):,} of" if members != len(self.groups) else ""
        return f"{members:,} of its {self.total:,} classes are{many} the data's: {self.source}"

    @property
    def rows(self) -> tuple[int, ...] | None:
        """The teacher's class of each of the data's; none where one has several."""
        return None if any(len(group) > 1 for group in self.groups) else tuple(group[0] for group in self.groups)

    def document(self, names: Sequence[str] | None, data: ImageDataSet) -> dict[str, list[str | int]]:
        """Say the whole of it: names where they are known, else numbers, by class of the data."""
        return {
            name: [number if names is None else names[number] for number in group]
            for name, group in zip(data.class_names, self.groups, strict=True)
        }


def map_classes(
    names: tuple[str, ...] | None, total: int, data: ImageDataSet, class_map: ClassMap | None, *, teacher: str
) -> Mapped | None:
    """Find each class of the data among a teacher's.

    Args:
        names: Of the teacher's classes, in the order of its logits; none where they are not known.
        total: Logits that it answers with.
        data: Whose classes are looked up.
        class_map: What a file says of them; the others are looked up by name.
        teacher: What the teacher is called in an error.

    Returns:
        None where the teacher's classes are the data's in the same order.

    Raises:
        RecipeError: If a class of the data has none, if two have the same one, or a word of the file is unknown.
    """
    if class_map is None and _in_order(names, total, data):
        return None
    if class_map is None and (names is None or not data.fingerprint):
        raise RecipeError(
            f"{teacher} has {total:,} classes, {data.name} has {data.num_classes}, and which is which is not known",
            hint="--class-map FILE says so, a line for each class of the data with the teacher's number, as cat: 281",
        )
    lookup = _Lookup(names, total)
    given = {} if class_map is None else _given(class_map, lookup, data, teacher)
    groups = {**_by_name(lookup, [name for name in data.class_names if name not in given], data, teacher), **given}
    mapped = tuple(groups[name] for name in data.class_names)
    _check_apart(mapped, data, teacher, names)
    if mapped == tuple((number,) for number in range(total)):
        return None
    file = "" if class_map is None else class_map.file
    source = "by name" if not given else f"as {file} says" if len(given) == len(mapped) else f"by {file} and by name"
    return Mapped(mapped, total, source)


def _in_order(names: tuple[str, ...] | None, total: int, data: ImageDataSet) -> bool:
    """Whether the teacher's classes are the data's, as far as the names of both are known."""
    if total != data.num_classes:
        return False
    if names is None or not data.fingerprint:  # of data that stands for what is not here they are not known
        return True
    return names == data.class_names or _both_imagenet(names, data)


def _both_imagenet(names: tuple[str, ...], data: ImageDataSet) -> bool:
    """Whether both are ImageNet's thousand classes in the order of their WordNet ids, whatever each calls them."""
    ids = _wordnet_ids(data)
    return len(ids) == _IMAGENET_CLASSES and ids == tuple(sorted(ids)) and (names == ids or _is_imagenet(names))


def _wordnet_ids(data: ImageDataSet) -> tuple[str, ...]:
    """WordNet's ids of the data's classes, which a folder may be named by as well; empty of other data."""
    ids = data.wordnet_ids or data.class_names
    return ids if all(map(_WORDNET_ID.fullmatch, ids)) else ()


def _is_imagenet(names: Sequence[str]) -> bool:
    """Whether these are ImageNet's thousand classes, by their first names; a few may be called otherwise."""
    from torchvision.models import get_model_weights

    known = next(iter(get_model_weights("resnet18"))).meta["categories"]
    alike = sum(name.split(", ")[0] == other for name, other in zip(names, known, strict=False))
    return len(names) == _IMAGENET_CLASSES and alike >= 0.9 * _IMAGENET_CLASSES


class _Lookup:
    """The teacher's classes by name.

    A class such as "tench, Tinca tinca" has several names, and an ImageNet class its WordNet id.
    """

    def __init__(self, names: tuple[str, ...] | None, total: int) -> None:
        self.names, self.total = names, total
        own = {number: (name,) for number, name in enumerate(names or ())}
        more = _synonyms(names or ())
        # The surest first: as written, as it sounds, then by its other names.
        self._tables = [_table(own), _table(own, _folded), _table(more), _table(more, _folded)]

    def find(self, name: str) -> list[int]:
        """Number the classes of a name: none if there is no such, several if it does not tell them apart."""
        for place, table in enumerate(self._tables):
            found = table.get(_folded(name) if place % 2 else name)
            if found:
                return found
        return []

    def near(self, name: str) -> list[str]:
        """Names that look alike."""
        known = {**self._tables[3], **self._tables[1]}
        close = get_close_matches(_folded(name), known, n=3, cutoff=0.6)
        assert self.names is not None
        return list(dict.fromkeys(self.names[number] for word in close for number in known[word]))[:3]


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


def _table(names: Mapping[int, Sequence[str]], change: Callable[[str], str] = str) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for number, words in names.items():
        for word in dict.fromkeys(map(change, words)):
            table.setdefault(word, []).append(number)
    return table


def _synonyms(names: Sequence[str]) -> dict[int, list[str]]:
    found = {number: name.split(", ") for number, name in enumerate(names) if ", " in name}
    for number, words in _of_wordnet(names):
        found[number] = [*found.get(number, ()), *words]
    return found


def _of_wordnet(names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Id and words of each class that WordNet knows, as far as timm can tell them."""
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        return
    ids = all(map(_WORDNET_ID.fullmatch, names))
    if not names or not (ids or _is_imagenet(names)):
        return
    info: Any = ImageNetInfo("imagenet-22k" if ids else "imagenet-1k")
    if ids:
        words = info.label_descriptions(as_dict=True)
        yield from ((number, words[name].split(", ")) for number, name in enumerate(names) if name in words)
        return
    described = enumerate(info.label_descriptions())
    yield from ((number, [info.index_to_label_name(number), *text.split(", ")]) for number, text in described)


def _by_name(lookup: _Lookup, wanted: Sequence[str], data: ImageDataSet, teacher: str) -> dict[str, tuple[int, ...]]:
    ids = dict(zip(data.class_names, _wordnet_ids(data), strict=False))
    found = {name: (name in ids and lookup.find(ids[name])) or lookup.find(name) for name in wanted}
    missing = [name for name, numbers in found.items() if not numbers]
    if missing:
        near = {name: lookup.near(name) for name in missing[:_MOST_SHOWN]} if lookup.names is not None else {}
        alike = "; ".join(f"{name} may be {' or '.join(words)}" for name, words in near.items() if words)
        raise RecipeError(
            f"{teacher} has no class for {len(missing)} of the {data.num_classes} classes of {data.name}: "
            + ", ".join(missing),
            hint=("pip install 'cakd[timm]', which knows WordNet's ids; or " if missing[0] in ids else "")
            + (f"{alike}; " if alike else "")
            + f"say which is which with --class-map FILE, a line a class, as {missing[0]}: {_example(near)}",
        )
    doubtful = {name: numbers for name, numbers in found.items() if len(numbers) > 1}
    if doubtful:
        which = "; ".join(f"{name} may be {' or '.join(map(str, numbers))}" for name, numbers in doubtful.items())
        raise RecipeError(
            f"{teacher} has several classes of one name: {which}",
            hint=f"--class-map FILE says which, by its number, as {next(iter(doubtful))}: "
            f"{next(iter(doubtful.values()))[0]}",
        )
    return {name: tuple(numbers) for name, numbers in found.items()}


def _example(near: Mapping[str, Sequence[str]]) -> str:
    return next((words[0] for words in near.values() if words), "NAME")


def _given(class_map: ClassMap, lookup: _Lookup, data: ImageDataSet, teacher: str) -> dict[str, tuple[int, ...]]:
    """Number what a file names; every mistake in it at once."""
    given, wrong = {}, []
    for name, words in class_map.entries.items():
        if name not in data.class_names:
            near = get_close_matches(name, data.class_names, n=3)
            wrong.append((class_map.lines[name, 0], f"{data.name} has no class '{name}'{_did_you_mean(near)}"))
            continue
        numbers = []
        for place, word in enumerate(words):
            found, why = _number(word, lookup, teacher)
            if why:
                wrong.append((class_map.lines[name, place], f"{name}: {why}"))
            numbers += found
        given[name] = tuple(dict.fromkeys(numbers))
    if wrong:
        count = "a mistake" if len(wrong) == 1 else f"{len(wrong)} mistakes"
        lines = [f"{class_map.file}:{line}: {message}" for line, message in sorted(wrong)]
        raise RecipeError("\n  ".join([f"the class map has {count}:", *lines]))
    return given


def _number(word: str | int, lookup: _Lookup, teacher: str) -> tuple[list[int], str]:
    """Number a word of a file, or say what is wrong with it."""
    if isinstance(word, int):
        known = 0 <= word < lookup.total
        return [word], "" if known else f"{teacher} has classes 0 to {lookup.total - 1}, got {word}"
    if lookup.names is None:
        return [], f"{teacher} does not name its classes; give a number from 0 to {lookup.total - 1}, got '{word}'"
    found = lookup.find(word)
    if not found:
        return [], f"{teacher} has no class '{word}'{_did_you_mean(lookup.near(word))}"
    if len(found) > 1:
        return [], f"{teacher} has several classes '{word}': give one of the numbers {', '.join(map(str, found))}"
    return found, ""


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_apart(
    groups: tuple[tuple[int, ...], ...], data: ImageDataSet, teacher: str, names: tuple[str, ...] | None
) -> None:
    owner: dict[int, str] = {}
    for name, group in zip(data.class_names, groups, strict=True):
        for number in group:
            if number in owner:
                said = number if names is None else names[number]
                raise RecipeError(
                    f"the classes {owner[number]} and {name} of {data.name} are one class of {teacher}: {said}",
                    hint="--class-map FILE gives each of them a class of its own",
                )
            owner[number] = name
