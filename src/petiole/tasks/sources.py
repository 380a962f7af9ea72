"""Find the splits of a data set, wherever it is: a Hub name, files, folders of files, images or sounds, the digits of scikit-learn.

Of a collection to search, a split is its queries; the corpus is a table beside the splits.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from petiole.errors import DataError, need
from petiole.tasks import media, tables
from petiole.tasks.names import HubName, hub_name, listed, nearest, one_line

Dataset = Any  # datasets.Dataset
SPLITS = ("train", "validation", "test")
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval"),
    "test": ("test", "testing"),
}
_SHARD = re.compile(r"[-_.]\d{4,5}-of-\d{4,5}$")


@dataclass(frozen=True)
class Origin:
    """Where the rows of a split come from, so that an error can name file and row.

    Attributes:
        parts: files, in order, and the number of rows of each.
        each: one file for each row, where rows are files.
    """

    parts: tuple[tuple[str, int], ...]
    each: tuple[str, ...] = ()

    def row(self, index: int) -> str:
        """Index from 0 -> "train.csv, row 17"."""
        if self.each:
            return self.each[index]
        name, row = self._find(index)
        return f"{name}, row {row}"

    def folder(self, index: int) -> Path:
        """The folder of the file that holds a row: where the paths in it start."""
        return Path(self._find(index)[0]).parent

    def _find(self, index: int) -> tuple[str, int]:
        for name, rows in self.parts:
            if index < rows:
                return name, index + 1
            index -= rows
        raise IndexError(index)

    def __str__(self) -> str:
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0][0]}{more}"


@dataclass(frozen=True)
class Split:
    """Rows on their way to a task.

    Attributes:
        dataset: the rows.
        origin: where all rows of this split came from.
        rows: for each row of `dataset`, its index in `origin`.
        labels: class of each row, once they are known.
    """

    dataset: Dataset
    origin: Origin
    rows: np.ndarray
    labels: np.ndarray | None = None

    def select(self, indices: np.ndarray) -> Split:
        """Some of the rows."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, dataset=self.dataset.select(indices), rows=self.rows[indices], labels=labels)

    def where(self, index: int) -> str:
        """File and row of a row of `dataset`."""
        return self.origin.row(int(self.rows[index]))

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Raw:
    """What was found at a source.

    Attributes:
        splits: by petiole's names, `train` among them.
        source: what the user asked for.
        remote: it came from the Hub, so the user can't edit it.
        notes: what was decided on the way.
        tables: what rows of every split refer to, by name.
    """

    splits: dict[str, Split]
    source: str
    remote: bool = False
    notes: list[str] = field(default_factory=list)
    tables: dict[str, Dataset] = field(default_factory=dict)


def read(
    source: str | Path,
    *,
    seed: int = 0,
    splits: Mapping[str, str | None] | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Raw:
    """Find and read the splits of a source.

    Args:
        source: see `petiole.tasks.load_data`.
        seed: of the split of `sklearn:digits`.
        splits: train, validation or test -> the source's own name for it; None leaves it out.
        subset, revision: of a data set on the Hub.

    Raises:
        DataError: nothing there, several data sets where one is needed, no train split, damaged files.
    """
    chosen = dict(splits or {})
    if wrong := sorted(set(chosen) - set(SPLITS)):
        raise DataError(f"splits: {wrong[0]!r} is none of train, validation, test{nearest(wrong[0], SPLITS)}")
    text = str(source)
    if text == "sklearn:digits":
        return _digits(seed)
    path = Path(text).expanduser()
    if path.is_file():
        if named := [own for own in chosen.values() if own is not None]:
            raise DataError(
                f"{text}: one file is the train split; it has no split {named[0]!r}\nGive the folder, or leave splits= out."
            )
        return Raw({"train": _tables([path])}, text)
    if path.parent.is_dir() and (collection := _collection(path, text, chosen)):
        return collection
    if path.is_dir():
        return _folder(path, text, chosen)
    if path.parent.is_dir() and (found := _of_prefix(path)):
        return _file_splits(found, text, chosen)
    if isinstance(source, str) and (hub := hub_name(text)):
        return _hub(hub, text, chosen, subset, revision)
    raise DataError(_nothing(path, text))


def _nothing(path: Path, text: str) -> str:
    here = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    here += [word[0] for name in here if (word := _own_word(Path(name).stem))[1]]
    first = f"{text}: no such file, folder or prefix of files{nearest(path.name, here)}"
    return f"{first}\nA data set on the Hub is named owner/name, or hub:name where a folder of that name is here."


# ------------------------------------------------------------------------------------------------------------------------ splits


def _canonical(names: Iterable[str], where: str, chosen: Mapping[str, str | None], notes: list[str]) -> dict[str, str]:
    """The source's own names of its splits -> train, validation, test: own name."""
    names = list(names)
    found: dict[str, str] = {}
    for split in SPLITS:
        if split in chosen:
            own = chosen[split]
            if own is None:
                continue
            if own not in names:
                raise DataError(f"{where}: no split {own!r}{nearest(own, names)}\nThere are {listed(names)}.")
            found[split] = own
            continue
        free = [name for name in names if name not in chosen.values()]
        exact = [name for name in free if name.lower() in WORDS[split]]
        candidates = exact or [name for name in free if _word(name) == split]
        if len(candidates) > 1:
            raise DataError(
                f"{where}: {listed(candidates)} could all be the {split} split\nSay which: splits={{{split!r}: {candidates[0]!r}}}."
            )
        if candidates:
            found[split] = candidates[0]
    unused = [name for name in names if name not in found.values()]
    if "train" not in found:
        raise DataError(
            f"{where}: no train split; there are {listed(names)}\nSay which it is: splits={{'train': {names[0]!r}}}."
        )
    if unused:
        notes.append(f"splits left out: {listed(unused)}")
    return found


def _word(name: str) -> str | None:
    """The split that a name speaks of in its last or first word: `trec6-train` -> train."""
    words = re.split(r"[-_.]", _SHARD.sub("", name.lower()))
    for word in (words[-1], words[0]):
        for split, spellings in WORDS.items():
            if word in spellings:
                return split
    return None


def _own_word(stem: str) -> tuple[str, str]:
    """Stem of a file -> (name of the data set, the word for its split, "" if it has none)."""
    stem = _SHARD.sub("", stem)
    words = re.split(r"([-_.])", stem)
    for i, rest in ((-1, words[:-2]), (0, words[2:])):
        if any(words[i].lower() in spellings for spellings in WORDS.values()):
            return "".join(rest), words[i]
    return stem, ""


# ------------------------------------------------------------------------------------------------------------------------- files


def _data_files(folder: Path) -> list[Path]:
    """The tables in a folder. Beside folders or other tables, README.txt or classes.json is none, unless its name speaks of a split."""
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in tables.READERS and not _hidden(p))
    sure = [p for p in found if p.suffix.lower() not in (".txt", ".json") or _own_word(p.stem)[1]]
    beside = any(p.is_dir() and not _hidden(p) for p in folder.iterdir())
    return sure if sure or beside else found


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "_"))


def _tables(paths: Sequence[Path]) -> Split:
    read = [tables.read_table(path) for path in paths]
    parts = tuple((str(path), table.num_rows) for path, table in zip(paths, read, strict=True))
    return _split(_dataset(tables.join(read, paths), str(paths[0])), Origin(parts))


def _dataset(table: Any, where: str) -> Dataset:
    datasets = need("compare", "datasets")
    try:
        return datasets.Dataset(table)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        # Feature types in the file's metadata that this version doesn't know: the plain columns are still there.
        try:
            return datasets.Dataset(table.replace_schema_metadata(None))
        except (ValueError, TypeError, NotImplementedError):
            raise DataError(f"{where}: a column of a type that can't be used ({one_line(error)})") from error


def _split(dataset: Dataset, origin: Origin) -> Split:
    return Split(dataset, origin, np.arange(len(dataset)))


def _of_prefix(path: Path) -> list[Path]:
    """`text/trec6` -> text/trec6-train.parquet, text/trec6-test.parquet."""
    return [p for p in _data_files(path.parent) if (word := _own_word(p.stem))[1] and word[0] == path.name]


def _file_splits(paths: Sequence[Path], source: str, chosen: Mapping[str, str | None]) -> Raw:
    notes: list[str] = []
    by_word: dict[str, list[Path]] = {}
    for path in paths:
        by_word.setdefault(_own_word(path.stem)[1], []).append(path)
    own = _canonical(by_word, source, chosen, notes)
    return Raw({split: _tables(by_word[word]) for split, word in own.items()}, source, notes=notes)


def _folder(folder: Path, source: str, chosen: Mapping[str, str | None]) -> Raw:
    """A folder of tables, of media, or of folders for the splits."""
    read_here = [path for path in _data_files(folder) if path.stem != "metadata"]
    named = [path for path in read_here if _own_word(path.stem)[1]]
    if named:
        prefixes = sorted({_own_word(path.stem)[0] for path in named})
        if len(prefixes) > 1:
            raise DataError(
                f"{source}: several data sets: {listed(prefixes)}\nSay which, as {source.rstrip('/')}/{prefixes[0]}."
            )
        return _file_splits(named, source, chosen)
    if len(read_here) > 1:
        raise DataError(
            f"{source}: {listed(p.name for p in read_here)}: which is which?\nName them train, validation, test, or give one file."
        )
    if read_here:
        return Raw({"train": _tables(read_here)}, source)
    parts = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and not _hidden(p)}
    notes: list[str] = []
    if chosen or any(_word(name) == "train" and _holds_split(part) for name, part in parts.items()):
        own = _canonical([name for name in parts if _word(name) or name in chosen.values()], source, chosen, notes)
        read = {split: _part(parts[name], notes) for split, name in own.items()}
        return Raw(_one_naming(read), source, notes=notes)
    return Raw({"train": _part(folder, notes)}, source, notes=notes)


def _holds_split(folder: Path) -> bool:
    """A folder called train holds a split if tables or class folders are in it; else it is a class of locomotives."""
    return any(p.is_dir() and not _hidden(p) for p in folder.iterdir()) or bool(_data_files(folder))


def _part(folder: Path, notes: list[str]) -> Split:
    """One split in a folder of its own: tables, or media with metadata or class folders."""
    read_here = [path for path in _data_files(folder) if path.stem != "metadata"]
    if read_here:
        return _tables(read_here)
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path)]
    of_kind = {kind: [p for p in found if p.suffix.lower() in suffixes] for kind, suffixes in media.SUFFIXES.items()}
    kinds = [kind for kind, paths in of_kind.items() if paths]
    if not kinds:
        raise DataError(
            f"{folder}: no data in this folder\nKnown: {', '.join(tables.READERS)}, folders of images or of sounds."
        )
    if len(kinds) > 1:
        raise DataError(f"{folder}: images and sounds in one folder\nKeep one kind in it.")
    kind, paths = kinds[0], of_kind[kinds[0]]
    metadata = [path for path in _data_files(folder) if path.stem == "metadata"]
    if metadata:
        return _with_metadata(metadata[0], kind)
    if others := len(found) - len(paths):
        notes.append(f"{folder}: {others} files of other kinds left out")
    return _class_folders(folder, kind, paths)


def _with_metadata(path: Path, kind: str) -> Split:
    split = _tables([path])
    if "file_name" not in split.dataset.column_names:
        raise DataError(
            f"{path}: no column 'file_name'; columns found: {listed(split.dataset.column_names)}\nIt holds paths from this folder."
        )
    if kind in split.dataset.column_names:
        return split
    return replace(split, dataset=split.dataset.rename_column("file_name", kind))


def _class_folders(folder: Path, kind: str, paths: Sequence[Path]) -> Split:
    datasets = need("compare", "datasets")
    loose = next((path for path in paths if path.parent == folder), None)
    if loose is not None:
        raise DataError(
            f"{loose}: no label: it lies in no class folder\n"
            "Put files into one folder for each class, or list them in metadata.csv with the columns file_name and label."
        )
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not _hidden(p))
    classes = [path.relative_to(folder).parts[0] for path in paths]
    if empty := [name for name in names if name not in set(classes)]:
        raise DataError(
            f"{folder / empty[0]}: a class folder without a file that is {media.ARTICLE[kind]}\nFill or remove it."
        )
    values = [{"bytes": None, "path": str(path.absolute())} for path in paths]
    features = datasets.Features({kind: media.feature(kind), "label": datasets.ClassLabel(names=names)})
    dataset = datasets.Dataset.from_dict(
        {kind: values, "label": [names.index(name) for name in classes]}, features=features
    )
    return _split(dataset, Origin(((str(folder), len(paths)),), tuple(map(str, paths))))


def _one_naming(splits: dict[str, Split]) -> dict[str, Split]:
    """Class folders are numbered as in train; a class that train lacks is refused."""
    datasets = need("compare", "datasets")
    feature = splits["train"].dataset.features.get("label")
    names = getattr(feature, "names", None)
    if names is None:
        return splits
    out = {}
    for key, split in splits.items():
        own = getattr(split.dataset.features.get("label"), "names", None)
        if own is not None and own != names:
            if unknown := [name for name in own if name not in names]:
                where = Path(split.origin.parts[0][0]) / unknown[0]
                raise DataError(
                    f"{where}: a class that the train split doesn't have{nearest(unknown[0], names)}\nTrain has {listed(names)}."
                )
            labels = [names.index(own[i]) for i in split.dataset["label"]]
            renumbered = split.dataset.remove_columns("label").add_column("label", labels)
            split = replace(split, dataset=renumbered.cast_column("label", datasets.ClassLabel(names=names)))
        out[key] = split
    return out


def _collection(path: Path, source: str, chosen: Mapping[str, str | None]) -> Raw | None:
    """A corpus with judged queries, which are the rows; None if none is there."""
    from petiole.tasks.retrieval.collection import documents, find, judged

    found = find(path)
    if found is None:
        return None
    notes: list[str] = []
    corpus = documents(found.corpus, notes)
    own = {"train": ""} if "" in found.qrels else _canonical(found.qrels, source, chosen, notes)
    splits = {}
    for split, name in own.items():
        dataset, rows = judged(found, found.qrels[name], corpus["id"], split, notes)
        splits[split] = Split(dataset, Origin(((str(found.queries), int(rows[-1]) + 1),)), rows)
    return Raw(splits, source, notes=notes, tables={"corpus": corpus})


# -------------------------------------------------------------------------------------------------------------- Hub, scikit-learn


def _hub(hub: HubName, source: str, chosen: Mapping[str, str | None], subset: str | None, revision: str | None) -> Raw:
    """A data set on the Hub. The one place here that may open a socket."""
    datasets = need("compare", "datasets")
    try:
        found = datasets.load_dataset(hub.name, subset or hub.subset, revision=revision)
    except Exception as error:  # whatever the network, the Hub or a data file there may do
        raise DataError(
            f"{source}: can't be loaded from the Hub ({one_line(error)})\nCheck the name, the subset (owner/name:subset) and the network."
        ) from error
    notes: list[str] = []
    own = _canonical(found, source, chosen, notes)
    splits = {}
    for split, name in own.items():
        if len(found[name]) == 0:
            raise DataError(f"{source}, split {name}: no rows\nLeave it out: splits={{{split!r}: None}}.")
        splits[split] = _split(found[name], Origin(((f"{source}, split {name}", len(found[name])),)))
    return Raw(splits, source, remote=True, notes=notes)


def _digits(seed: int) -> Raw:
    """The 1,797 handwritten digits that scikit-learn carries, 8x8, as images: 60 % train, 20 % validation, 20 % test."""
    from petiole.tasks.labels import stratified

    datasets = need("compare", "datasets")
    image = need("compare", "PIL.Image")
    digits = need("compare", "sklearn.datasets").load_digits()
    labels = digits.target.astype(np.int64)
    values: list[dict[str, Any]] = []
    for pixels in digits.images:  # 0 to 16
        png = io.BytesIO()
        image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(png, "png")
        values.append({"bytes": png.getvalue(), "path": f"sklearn:digits, row {len(values) + 1}"})
    names = [str(name) for name in digits.target_names]
    features = datasets.Features({"image": media.feature("image"), "label": datasets.ClassLabel(names=names)})
    every = _split(
        datasets.Dataset.from_dict({"image": values, "label": labels}, features=features),
        Origin((("sklearn:digits", len(labels)),)),
    )
    held_out = stratified(labels, round(0.4 * len(labels)), seed)
    test = held_out[stratified(labels[held_out], len(held_out) // 2, seed)]
    parts = {
        "train": np.setdiff1d(np.arange(len(labels)), held_out),
        "validation": np.setdiff1d(held_out, test),
        "test": test,
    }
    return Raw({split: every.select(rows) for split, rows in parts.items()}, "sklearn:digits")
