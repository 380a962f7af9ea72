"""A collection to search, in files: documents, queries, and judgements of which document is how relevant for which query.

    corpus     _id, text, perhaps title           cranfield-corpus.parquet, or corpus.jsonl
    queries    _id, text                          cranfield-queries.parquet, or queries.jsonl
    qrels      query-id, corpus-id, score         cranfield-qrels.parquet, qrels.tsv, or one for each split: qrels/train.tsv

These are the names of BEIR (arXiv 2104.08663). A score above 0 is a grade of relevance.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from petiole.errors import DataError, need
from petiole.tasks import tables
from petiole.tasks.names import listed, nearest

PARTS = ("corpus", "queries", "qrels")
COLUMNS = {
    "corpus": ("_id", "text"),
    "queries": ("_id", "text"),
    "qrels": ("query-id", "corpus-id", "score"),
}
_PART = re.compile(rf"(?:(?P<name>.+)[-_.])?(?P<part>{'|'.join(PARTS)})(?:[-_.](?P<split>\w+))?")


@dataclass(frozen=True)
class Collection:
    """Where the parts of a collection are.

    Attributes:
        qrels: by the name of their split, "" where one file has all.
    """

    corpus: Path
    queries: Path
    qrels: Mapping[str, Path]


def find(path: Path) -> Collection | None:
    """The collection in a folder, or with files that begin with a path; None if there is none.

    Raises:
        DataError: several collections in one folder, or two files for one part.
    """
    inside = path.is_dir()
    found = parts_of(path if inside else path.parent)
    whole = {name: parts for name, parts in found.items() if parts.keys() >= set(PARTS)}
    names = list(whole) if inside else [path.name] * (path.name in whole)
    if len(names) > 1:
        raise DataError(
            f"{path}: several collections: {listed(names)}\nSay which, as {str(path).rstrip('/')}/{names[0]}."
        )
    return collected(whole[names[0]]) if names else None


def parts_of(folder: Path) -> dict[str, dict[str, list[tuple[str, Path]]]]:
    """Name of a collection -> its parts -> (split, file); a folder `qrels` holds a file for each split."""
    found: dict[str, dict[str, list[tuple[str, Path]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.iterdir()):
        named = _PART.fullmatch(path.stem)
        if named is None:
            continue
        of_part = found[named["name"] or ""][named["part"]]
        if path.is_dir() and named["part"] == "qrels":
            of_part += [(p.stem, p) for p in sorted(path.iterdir()) if p.suffix.lower() in tables.READERS]
        elif path.suffix.lower() in tables.READERS:
            of_part.append((named["split"] or "", path))
    return {name: {part: files for part, files in parts.items() if files} for name, parts in found.items()}


def collected(parts: Mapping[str, Sequence[tuple[str, Path]]]) -> Collection:
    """One file for each part, and of the judgements one for each split."""
    for part, files in parts.items():
        splits = [split if part == "qrels" else "" for split, _ in files]
        if len(set(splits)) < len(splits) or ("" in splits and len(splits) > 1):
            raise DataError(f"{files[0][1]} and {files[1][1]}: which are the {part}?\nKeep one of them.")
    return Collection(parts["corpus"][0][1], parts["queries"][0][1], dict(parts["qrels"]))


# ------------------------------------------------------------------------------------------------------------------------ reading


def columns_of(path: Path, part: str) -> dict[str, list[Any]]:
    """The columns of a file that are used, those of ids as strings.

    Raises:
        DataError: one is missing, or has a row without a value.
    """
    table = tables.read_table(path)
    found = {}
    for name in (*COLUMNS[part], *(("title",) if part == "corpus" and "title" in table.column_names else ())):
        if name not in table.column_names:
            hint = nearest(name, table.column_names)
            raise DataError(
                f"{path}: no column {name!r} in the {part}{hint}\nColumns found: {listed(table.column_names)}."
            )
        values = table.column(name).to_pylist()
        if name in ("text", "title"):
            values = [value or "" for value in values]
        elif None in values:
            raise DataError(f"{path}, row {values.index(None) + 1}: no {name}")
        found[name] = [str(value) for value in values] if name != "score" else values
    return found


def numbered(path: Path, ids: Sequence[str]) -> dict[str, int]:
    """Id -> row from 0.

    Raises:
        DataError: two rows have one id.
    """
    rows = {each: row for row, each in enumerate(ids)}
    if len(rows) < len(ids):
        row = next(row for row, each in enumerate(ids) if rows[each] != row)
        raise DataError(f"{path}, rows {row + 1} and {rows[ids[row]] + 1}: both have the id {ids[row]!r}")
    return rows


def documents(path: Path, notes: list[str]) -> Any:
    """A data set of `id` and `text`, the title in front unless the text begins with it."""
    datasets = need("compare", "datasets")
    found = columns_of(path, "corpus")
    numbered(path, found["_id"])
    titles = found.get("title", [""] * len(found["text"]))
    pairs = zip(titles, found["text"], strict=True)
    texts = [text if text.startswith(title) else f"{title} {text}".strip() for title, text in pairs]
    if empty := sum(not text.strip() for text in texts):
        notes.append(f"corpus: {empty} of {len(texts)} documents have no text")
    return datasets.Dataset.from_dict({"id": found["_id"], "text": texts})


def judged(
    source: Collection, qrels: Path, corpus_ids: Iterable[str], split: str, notes: list[str]
) -> tuple[Any, np.ndarray]:
    """Queries with a relevant document: a data set of `id`, `query` and `judgements`, and their rows in the file of queries.

    Raises:
        DataError: a query that was judged is not there, a score is no whole number, or no query has a relevant document.
    """
    datasets = need("compare", "datasets")
    queries, own = columns_of(source.queries, "queries"), columns_of(qrels, "qrels")
    rows, known = numbered(source.queries, queries["_id"]), set(corpus_ids)
    of_query: dict[int, list[dict[str, Any]]] = {}
    unknown = 0
    for number, (query, document, score) in enumerate(zip(*(own[name] for name in COLUMNS["qrels"]), strict=True), 1):
        if query not in rows:
            raise DataError(f"{qrels}, row {number}: the query {query!r} is not in {source.queries.name}")
        if not isinstance(score, (int, float)) or score != int(score):
            raise DataError(f"{qrels}, row {number}: the score {score!r} is no whole number")
        unknown += document not in known
        if document in known:
            of_query.setdefault(rows[query], []).append({"document": document, "grade": int(score)})
    if unknown:
        notes.append(f"{split}: {unknown} of {number} judgements left out: of documents that the corpus lacks")
    answered = sorted(row for row, found in of_query.items() if any(each["grade"] > 0 for each in found))
    if without := len(of_query) - len(answered):
        notes.append(f"{split}: {without} of {len(of_query)} queries left out: nothing is relevant to them")
    if not answered:
        raise DataError(f"{qrels}: no query has a relevant document of {source.corpus.name}")
    made = {
        "id": [queries["_id"][row] for row in answered],
        "query": [queries["text"][row] for row in answered],
        "judgements": [of_query[row] for row in answered],
    }
    return datasets.Dataset.from_dict(made), np.array(answered)
