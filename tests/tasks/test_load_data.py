"""Every kind of source, every decision that is made for the user, every error with file and row."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from petiole.errors import ConfigError, DataError, MissingExtra
from petiole.tasks import load_data
from petiole.tasks.labels import stratified
from tasks.makers import Row, class_folders, csv, jsonl, parquet, png, rows, wav

WRITERS = {"csv": csv, "jsonl": jsonl, "parquet": parquet}


def refused(source: Path, *parts: str, **options: Any) -> str:
    """The message of the error, which must be short and hold all parts."""
    with pytest.raises(DataError) as caught:
        load_data(source, **options)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 3
    for part in parts:
        assert part in message, message
    return message


# ------------------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_alone_is_the_train_split(tmp_path: Path, suffix: str) -> None:
    data = load_data(WRITERS[suffix](tmp_path / f"data.{suffix}", rows(40)))
    assert (data.task, data.label_names) == ("text-classification", ("neg", "pos"))
    assert (len(data.train), len(data.validation), data.test) == (36, 4, None)
    assert data.columns == {"text": "text", "label": "label"}
    for split in data.splits.values():
        for row in split:  # label 1 is pos, and pos rows are about cats
            assert row["label"] == int("cat" in row["text"])
    assert sorted([*data.train["text"], *data.validation["text"]]) == sorted(row["text"] for row in rows(40))
    assert "4 of 40 train rows" in str(data)


def test_tsv_json_and_txt(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}, yes\t{r['label']}\n" for r in rows()))
    assert load_data(tmp_path / "a.tsv").train["text"][0].endswith(", yes")
    (tmp_path / "a.json").write_text(
        "[" + ",".join(f'{{"text": "{r["text"]}", "label": {i % 3}}}' for i, r in enumerate(rows())) + "]"
    )
    assert load_data(tmp_path / "a.json").label_names == ("0", "1", "2")
    (tmp_path / "a.txt").write_text("one line\n\nanother line\nand three\n")
    data = load_data(tmp_path / "a.txt")
    assert (data.task, len(data.train) + len(data.validation)) == ("causal-lm", 3)


def test_quoted_fields_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('text,label\n"two\nlines, and a ""quote""",a\nplain,b\nNA,a\n'.encode("utf-8-sig"))
    data = load_data(path, validation_fraction=0)
    assert data.train["text"][:] == ['two\nlines, and a "quote"', "plain", "NA"]
    assert data.validation is None


@pytest.mark.parametrize(
    "words", [("train", "validation", "test"), ("train", "dev", "test"), ("training", "val", "testing")]
)
def test_a_folder_with_a_file_for_each_split(tmp_path: Path, words: tuple[str, str, str]) -> None:
    for word, n in zip(words, (12, 6, 4), strict=True):
        jsonl(tmp_path / f"{word}.jsonl", rows(n))
    (tmp_path / "README.txt").write_text("not data")
    data = load_data(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "validation": 6, "test": 4}
    assert not any("split:" in note for note in data.notes)


def test_the_common_beginning_of_files(tmp_path: Path) -> None:
    for name in ("birds", "birds_2", "bees"):
        parquet(tmp_path / f"{name}-train.parquet", rows(20))
        parquet(tmp_path / f"{name}-test.parquet", rows(8 if name == "birds" else 6))
    assert len(load_data(tmp_path / "birds").test) == 8
    message = refused(tmp_path, "'bees', 'birds', 'birds_2'")
    assert str(tmp_path / "bees") in message
    refused(tmp_path / "bird", "did you mean 'birds'?")


def test_shards_and_split_folders(tmp_path: Path) -> None:
    for i in range(2):
        parquet(tmp_path / f"train-0000{i}-of-00002.parquet", rows(10))
    assert len(load_data(tmp_path, validation_fraction=0).train) == 20
    (tmp_path / "b" / "train").mkdir(parents=True)
    (tmp_path / "b" / "test").mkdir()
    csv(tmp_path / "b" / "train" / "part0.csv", rows(10))
    csv(tmp_path / "b" / "train" / "part1.csv", rows(4))
    csv(tmp_path / "b" / "test" / "part0.csv", [*rows(3), {"text": "x", "label": "maybe"}])
    message = refused(tmp_path / "b", "label 'maybe' is none of the 2 classes", "Allowed: 'neg', 'pos'")
    assert f"{tmp_path / 'b' / 'test' / 'part0.csv'}, row 4" in message


def test_a_row_in_the_second_file_is_named_there(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-00000-of-00002.jsonl", rows(10))
    jsonl(tmp_path / "train-00001-of-00002.jsonl", [*rows(3), {"text": "x", "label": None}])
    refused(tmp_path, f"{tmp_path / 'train-00001-of-00002.jsonl'}, row 4, column 'label'", "1 of 14 rows")


def test_splits_named_by_hand(tmp_path: Path) -> None:
    for word in ("train", "dev", "val"):
        csv(tmp_path / f"{word}.csv", rows(8))
    refused(tmp_path, "'dev', 'val' could all be the validation split", "splits=")
    data = load_data(tmp_path, splits={"validation": "dev"})
    assert len(data.validation) == 8 and "splits left out: 'val'" in data.notes
    assert load_data(tmp_path, splits={"validation": None}, validation_fraction=0).validation is None
    refused(tmp_path, "no split 'deb'; did you mean 'dev'?", splits={"validation": "deb"})
    refused(tmp_path / "dev.csv", "no split 'dev'", splits={"validation": "dev"})
    refused(tmp_path, "'vald' is none of", splits={"vald": "dev"})


def test_no_train_split(tmp_path: Path) -> None:
    csv(tmp_path / "x-test.csv", rows())
    refused(tmp_path / "x", "no train split", "'test'")


# ------------------------------------------------------------------------------------------------------------------- broken files


BROKEN = {
    "a.csv": (b"text,label\ngood,a\nbad,b,c\n", ["row 2", "3 fields where the first line has 2"]),
    "b.csv": (b"", ["empty"]),
    "c.csv": (b"text,label\n", ["no rows"]),
    "d.csv": (b"text,label\ngood,a\nb\xe4d,b\n", ["line 3", "not UTF-8"]),
    "e.csv": (b"text,text\na,b\n", ["two columns are called 'text'"]),
    "a.jsonl": (b'{"text": "a", "label": 1}\n{"text": "b" "label": 2}\n', ["line 2", "not JSON"]),
    "b.jsonl": (b'{"text": "a", "label": 1}\n["b", 2]\n', ["row 2", "list where an object"]),
    "c.jsonl": (
        b'{"text": "a", "label": 1}\n{"text": "b", "label": "two"}\n',
        ["row 2", "'label'", "str where rows before have int"],
    ),
    "a.json": (b'{"text": "a"}', ["not a list"]),
    "a.parquet": (b"PAR1 not really", ["damaged or not parquet"]),
    "a.xlsx": (b"x", ["can't read .xlsx", ".csv"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    content, parts = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, str(tmp_path / name), *parts)


def test_keys_that_come_late_in_jsonl(tmp_path: Path) -> None:
    data = load_data(jsonl(tmp_path / "a.jsonl", [*rows(10), {"text": "the cat", "label": "pos", "extra": 3}]))
    assert "extra" in data.train.column_names


# ----------------------------------------------------------------------------------------------------------------------- columns


def test_columns_are_found_by_name_and_type(tmp_path: Path) -> None:
    records: list[Row] = [{"id": i, "phrase": row["text"], "class": row["label"]} for i, row in enumerate(rows())]
    data = load_data(csv(tmp_path / "a.csv", records))
    assert data.columns == {"text": "phrase", "label": "class"}
    assert "columns: label is 'class', text is 'phrase'" in data.notes
    two = csv(tmp_path / "b.csv", [{**record, "remark": "x"} for record in records])  # two columns could be the text
    refused(two, "tasks that these columns fit: none", "'id', 'phrase', 'class', 'remark'")
    assert load_data(two, text="phrase").columns["label"] == "class"
    numbers = csv(tmp_path / "c.csv", [{"text": row["text"], "id": i} for i, row in enumerate(rows())])
    refused(
        numbers, "no column for 'label'", task="text-classification"
    )  # a number is no class unless its name says so


@pytest.mark.parametrize("names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "sentence")])
def test_pairs_are_found(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = names
    path = csv(tmp_path / "a.csv", [{first: f"a {i}", second: f"b {i}", "label": i % 2} for i in range(10)])
    assert load_data(path).columns == {"text": first, "text_pair": second, "label": "label"}
    assert load_data(path, text_pair=first, text=second).columns == {
        "text": second,
        "text_pair": first,
        "label": "label",
    }


def test_sequence_to_sequence_and_prompts(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", [{"text": f"a {i}", "summary": f"b {i}"} for i in range(10)])
    data = load_data(path)
    assert (data.task, data.columns, data.label_names) == ("seq2seq", {"text": "text", "target": "summary"}, ())
    data = load_data(path, task="causal-lm", target="summary")
    assert (data.task, data.columns) == ("causal-lm", {"text": "text", "target": "summary"})


def test_a_missing_column_lists_what_there_is(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", [{"text": "a", "lable": "x"}, {"text": "b", "lable": "y"}])
    refused(
        path,
        str(path),
        "no column for 'label'",
        "did you mean 'lable'?",
        "'text', 'lable'",
        "label='...'",
        task="text-classification",
    )
    refused(path, "no column 'txt'", "did you mean 'text'?", text="txt")
    with pytest.raises(ConfigError, match="text-classification"):
        load_data(path, task="text-clasification")
    with pytest.raises(ConfigError, match="no such column"):
        load_data(path, task="text-classification", image="text")


def test_a_column_missing_in_another_split(tmp_path: Path) -> None:
    csv(tmp_path / "train.csv", rows())
    csv(tmp_path / "test.csv", [{"text": "a", "labels": 1}])
    refused(
        tmp_path,
        str(tmp_path / "test.csv"),
        "'label' in the test split",
        "did you mean 'labels'?",
        "splits={'test': None}",
    )
    assert load_data(tmp_path, splits={"test": None}).test is None


def test_two_tasks_that_fit_alike(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", [{"text": "a", "label": i % 2, "answer": "b"} for i in range(8)])
    refused(path, "'seq2seq', 'text-classification'", "task=")
    assert load_data(path, label="label").task == "text-classification"


# ------------------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("empty", [None, -1])
def test_rows_without_a_label(tmp_path: Path, suffix: str, empty: int | None) -> None:
    records = [{**row, "label": i % 2} for i, row in enumerate(rows(10))]
    records[6]["label"] = records[3]["label"] = empty
    path = WRITERS[suffix](tmp_path / f"a.{suffix}", records)
    refused(path, f"{path}, row 4, column 'label': no label", "2 of 10 rows", "unlabelled='drop'")
    data = load_data(path, unlabelled="drop", validation_fraction=0)
    assert len(data.train) == 8 and "train: 2 rows without a label dropped" in data.notes
    assert data.train["label"][:] == [0, 1, 0, 0, 1, 1, 0, 1]


def test_label_names_are_kept(tmp_path: Path) -> None:
    import datasets

    numbered = [
        {"text": f"t {i}", "label": 2 - i % 3, "intent": ("book", "cancel", "ask")[2 - i % 3]} for i in range(12)
    ]
    data = load_data(parquet(tmp_path / "a.parquet", numbered))
    assert data.label_names == ("book", "cancel", "ask") and "label names from the column 'intent'" in data.notes
    named = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]}, features=named).to_parquet(
        tmp_path / "b.parquet"
    )
    assert load_data(tmp_path / "b.parquet", validation_fraction=0).label_names == ("no", "yes")
    assert load_data(tmp_path / "a.parquet", label_names=["x", "y", "z"]).train.features["label"].names == [
        "x",
        "y",
        "z",
    ]
    flags = csv(tmp_path / "c.csv", [{"text": f"t {i}", "label": "true" if i % 2 else "false"} for i in range(8)])
    assert load_data(flags).label_names == ("False", "True")
    odd = csv(tmp_path / "d.csv", [{"text": f"t {i}", "label": (1, 5)[i % 2]} for i in range(8)])
    data = load_data(odd, validation_fraction=0)
    assert data.label_names == ("1", "5") and data.train["label"][:] == [0, 1] * 4
    assert "labels 1 to 5 numbered from 0 as 2 classes" in data.notes


def test_a_label_out_of_range(tmp_path: Path) -> None:
    records = [{"text": f"t {i}", "label": i % 2} for i in range(8)]
    path = csv(tmp_path / "a.csv", [*records, {"text": "x", "label": 2}])
    refused(
        path,
        f"{path}, row 9, column 'label': label 2 is none of the 2 classes",
        "Allowed: '0', '1'",
        label_names=["a", "b"],
    )
    with pytest.raises(ConfigError, match="label_names"):
        load_data(path, label_names=["a", "a"])
    words = csv(tmp_path / "b.csv", rows())
    refused(words, "row 1, column 'label': label 'neg'", label_names=["positive", "negative"])


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    refused(
        csv(tmp_path / "a.csv", [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.5}]),
        "row 2",
        "0.5 is not a whole number",
    )
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": [0, 1]}, {"text": "b", "label": [1]}])
    refused(path, "row 1", "list instead of one label", task="text-classification", label="label")


def test_one_class_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", [{"text": "a", "label": "pos"}] * 5)
    refused(path, str(path), "the train split has one class only, 'pos', in all 5 rows", "row 1", validation_fraction=0)
    refused(path, "the train split has one class only")
    csv(tmp_path / "train.csv", rows())
    csv(tmp_path / "test.csv", [{"text": "a", "label": "pos"}] * 3)
    (tmp_path / "a.csv").unlink()
    refused(tmp_path, f"{tmp_path / 'test.csv'}: the test split has one class only")


# ------------------------------------------------------------------------------------------------------------------------- texts


def test_missing_and_empty_texts(tmp_path: Path) -> None:
    records: list[Row] = rows(12)
    records[4]["text"] = records[7]["text"] = None
    path = jsonl(tmp_path / "a.jsonl", records)
    refused(path, f"{path}, row 5, column 'text': no text", "2 of 12 rows")
    records[4]["text"] = records[7]["text"] = " "
    data = load_data(jsonl(path, records))
    assert "train: 2 rows with empty 'text'" in data.notes and len(data.train) + len(data.validation) == 12
    data = load_data(path, task="causal-lm")
    assert "train: 2 rows with empty 'text' dropped" in data.notes and len(data.train) + len(data.validation) == 10
    refused(jsonl(path, [{"text": "", "label": 0}, {"text": "", "label": 1}]), "empty in all 2 rows")


def test_numbers_can_be_texts(tmp_path: Path) -> None:
    data = load_data(
        csv(tmp_path / "a.csv", [{"text": i, "label": i % 2} for i in range(10)]), text="text", validation_fraction=0
    )
    assert data.train["text"][:3] == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------------------------------------ splits


def test_the_validation_split_is_seeded_and_keeps_proportions(tmp_path: Path) -> None:
    path = csv(
        tmp_path / "a.csv", [{"text": f"t {i}", "label": "rare" if i % 10 == 0 else "usual"} for i in range(200)]
    )
    first, again, other = (load_data(path, validation_fraction=0.2, seed=seed) for seed in (0, 0, 1))
    assert first.validation["text"][:] == again.validation["text"][:] != other.validation["text"][:]
    assert sum(first.validation["label"]) == 36 and len(first.validation) == 40
    assert not set(first.train["text"]) & set(first.validation["text"])
    data = load_data(path, test_fraction=0.25, validation_fraction=0.1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 135, "validation": 20, "test": 45}


def test_too_few_rows_to_split(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    refused(path, "2 rows are too few to set a validation split aside", "validation_fraction=0")
    assert len(load_data(path, validation_fraction=0).train) == 2


def test_limit_draws_from_every_class(tmp_path: Path) -> None:
    records = [{"text": f"t {i}", "label": i // 50} for i in range(200)]  # sorted by class, as some published sets are
    data = load_data(csv(tmp_path / "a.csv", records), limit=20)
    assert np.bincount(data.train["label"]).tolist() == [5, 5, 5, 5]
    assert len(data.validation) == 20
    data = load_data(tmp_path / "a.csv", limit={"train": 8})
    assert (len(data.train), len(data.validation)) == (8, 20)
    for options in (
        {"limit": 1},
        {"limit": {"dev": 3}},
        {"validation_fraction": 1.0},
        {"validation_fraction": 0.6, "test_fraction": 0.5},
    ):
        with pytest.raises(ConfigError):
            load_data(tmp_path / "a.csv", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_stratified_samples(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.choice(6, size=300, p=[0.5, 0.3, 0.1, 0.07, 0.02, 0.01])
    for size in (1, 4, 6, 30, 299, 400):
        drawn = stratified(labels, size, seed)
        assert len(drawn) == len(set(drawn.tolist())) == min(size, 300)
        counts = np.bincount(labels[drawn], minlength=6)
        share = min(size, 300) * np.bincount(labels, minlength=6) / 300
        if size >= 6:
            assert (counts[np.unique(labels)] >= 1).all()
            assert (np.abs(counts - share) < 3).all()
    kept = stratified(labels, 300, seed, keep=1)
    assert len(kept) == 300 - len(np.unique(labels))


# ---------------------------------------------------------------------------------------------------------------- images, sounds


def test_class_folders_of_images(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "pets", ("dog", "cat"), png, ".png", n=10)
    (root / "cat" / "notes.md").write_text("x")
    (root / "README.txt").write_text("x")
    (root / ".hidden").mkdir()
    data = load_data(root)
    assert (data.task, data.label_names) == ("image-classification", ("cat", "dog"))
    assert (len(data.train), len(data.validation)) == (18, 2)
    for row in data.train:  # dogs were made first, so their first channel is below 100
        assert row["image"].size == (10, 6)
        assert row["label"] == int(row["image"].getpixel((0, 0))[0] < 100)
    assert any("2 files of other kinds left out" in note for note in data.notes)


def test_class_folders_in_split_folders(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ("ant", "bee", "cow"), png, ".png")
    class_folders(tmp_path / "test", ("bee", "cow"), png, ".png", n=3)
    data = load_data(tmp_path)
    assert data.test["label"][:] == [1] * 3 + [2] * 3
    (tmp_path / "test" / "coww").mkdir()
    (tmp_path / "test" / "coww" / "1.png").write_bytes(png())
    refused(tmp_path, str(tmp_path / "test" / "coww"), "did you mean 'cow'?")


def test_a_class_called_train(tmp_path: Path) -> None:
    assert load_data(class_folders(tmp_path, ("bus", "train"), png, ".png")).label_names == ("bus", "train")


def test_folders_that_hold_no_classes(tmp_path: Path) -> None:
    refused(tmp_path, "no data in this folder")
    (tmp_path / "1.png").write_bytes(png())
    refused(tmp_path, str(tmp_path / "1.png"), "no label", "metadata.csv")
    (tmp_path / "1.png").unlink()
    class_folders(tmp_path, ("a", "b"), png, ".png")
    (tmp_path / "c").mkdir()
    refused(tmp_path, str(tmp_path / "c"), "a class folder without")
    (tmp_path / "c" / "x.wav").write_bytes(wav())
    refused(tmp_path, "images and sounds in one folder")


def test_metadata_beside_images(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    records = [{"file_name": f"pictures/{i}.png", "label": "even" if i % 2 == 0 else "odd"} for i in range(8)]
    csv(tmp_path / "metadata.csv", records)
    data = load_data(tmp_path, validation_fraction=0)
    assert [row["image"].getpixel((0, 0))[0] for row in data.train] == list(range(8))
    assert data.label_names == ("even", "odd")
    (tmp_path / "pictures" / "5.png").unlink()
    refused(tmp_path, f"{tmp_path / 'metadata.csv'}, row 6, column 'image'", str(tmp_path / "pictures" / "5.png"))
    csv(tmp_path / "metadata.csv", [{"name": "pictures/1.png", "label": 1}])
    refused(tmp_path, "no column 'file_name'")


def test_a_table_of_paths_needs_no_network(tmp_path: Path) -> None:
    records = [{"image": "https://example.org/cat.png", "label": i % 2} for i in range(4)]
    path = csv(tmp_path / "a.csv", records)
    refused(path, f"{path}, row 1, column 'image': no file")


def test_images_as_bytes_in_a_table(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"image": png(i, kind="jpeg"), "label": i % 2} for i in range(12)])
    data = load_data(path, validation_fraction=0)
    assert (data.task, data.train[3]["image"].size) == ("image-classification", (10, 6))
    structs = [{"picture": {"bytes": png(i), "path": f"{i}.png"}, "label": i % 2} for i in range(12)]
    data = load_data(parquet(tmp_path / "b.parquet", structs), validation_fraction=0)
    assert data.columns["image"] == "picture" and data.train[3]["picture"].getpixel((0, 0))[0] == 3


@pytest.mark.parametrize("fault", ["not an image", "truncated", "empty"])
def test_unreadable_images_in_a_table(tmp_path: Path, fault: str) -> None:
    whole = png(9, size=(64, 64), kind="jpeg")
    damaged = {"not an image": b"not an image at all", "truncated": whole[: len(whole) // 2], "empty": None}[fault]
    records: list[Row] = [{"image": whole, "label": i % 2} for i in range(8)]
    records[5]["image"] = records[7]["image"] = damaged
    path = parquet(tmp_path / "a.parquet", records)
    message = refused(path, f"{path}, row 6", validation_fraction=0)
    if fault != "empty":
        assert "2 of 8 rows can't be read" in message
    refused(
        path, f"{path}, row ", validation_fraction=0.5
    )  # drawn into two splits, rows keep the numbers they have in the file


def test_unreadable_images_in_folders(tmp_path: Path) -> None:
    root = class_folders(tmp_path, ("a", "b"), lambda i: png(i % 250, (40, 40)), ".png")
    whole = (root / "b" / "03.png").read_bytes()
    (root / "b" / "03.png").write_bytes(whole[:-30])
    message = refused(root, str(root / "b" / "03.png"), "unreadable image")
    assert "rows can't be read" not in message
    assert str(tmp_path) not in message.replace(str(root / "b" / "03.png"), "")


def test_sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "s", ("high", "low"), lambda i: wav(100.0 + i), ".wav")
    data = load_data(root, validation_fraction=0)
    assert (data.task, data.label_names) == ("audio-classification", ("high", "low"))
    (root / "low" / "02.wav").write_bytes(b"RIFFxxxxWAVEfmt nothing")
    refused(root, str(root / "low" / "02.wav"), "unreadable sound")
    table = parquet(tmp_path / "a.parquet", [{"audio": wav(200), "label": i % 2, "speaker": "x"} for i in range(8)])
    assert load_data(table, validation_fraction=0).columns == {"audio": "audio", "label": "label"}
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtra, match=r"petiole\[audio\]"):
        load_data(table)
    monkeypatch.undo()
    (root / "low" / "02.wav").write_bytes(wav(seconds=0))
    refused(root, str(root / "low" / "02.wav"), "no samples")


# ---------------------------------------------------------------------------------------------------------------------- elsewhere


def test_digits() -> None:
    from sklearn.datasets import load_digits

    data, again = load_data("sklearn:digits", seed=3), load_data("sklearn:digits", seed=3, limit=50)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1078, "validation": 360, "test": 359}
    assert len(again.train) == 50 and data.label_names == tuple("0123456789")
    every = {
        np.asarray(image).tobytes(): i
        for i, image in enumerate((load_digits().images * 255 / 16).round().astype(np.uint8))
    }
    seen = [every[np.asarray(row["image"]).tobytes()] for split in data.splits.values() for row in split]
    assert len(set(seen)) > 1790  # each once, apart from a few digits that are drawn alike
    labels = [label for split in data.splits.values() for label in split["label"]]
    assert labels == load_digits().target[seen].tolist()


def test_a_hub_name_and_nothing_else_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    names = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    train = datasets.Dataset.from_dict({"sentence": list("abcdefgh"), "label": [0, 1] * 4}, features=names)
    hidden = datasets.Dataset.from_dict({"sentence": list("xy"), "label": [-1, -1]}, features=names)
    calls = []

    def load_dataset(name: str, subset: str | None, revision: str | None) -> Any:
        calls.append((name, subset, revision))
        return datasets.DatasetDict({"train": train, "validation_matched": train, "test": hidden, "extra": train})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    data = load_data("owner/name:part", revision="abc")
    assert calls == [("owner/name", "part", "abc")]
    assert data.label_names == ("bad", "good") and data.columns["text"] == "sentence"
    assert data.test is None and any("keeps its labels back" in note for note in data.notes)
    assert "splits left out: 'extra'" in data.notes
    load_data("hub:name")
    assert calls[-1] == ("name", None, None)
    (tmp_path / "data").mkdir()
    for path in ("data/nothing", "nothing", "./owner/name", "../name", "owner/name/part", "x.csv", "/owner/name"):
        with pytest.raises(DataError):
            load_data(path)
    assert len(calls) == 2


def test_an_unlabelled_hub_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    train = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, -1, 1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": train}))
    with pytest.raises(DataError, match=r"owner/name, split train, row 3, column 'label'"):
        load_data("owner/name")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/name: can't be loaded from the Hub \(no route\)"):
        load_data("owner/name")


def test_global_generators_and_settings_stay(tmp_path: Path) -> None:
    import datasets

    path = csv(tmp_path / "a.csv", rows())
    load_data(path)
    before = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        datasets.are_progress_bars_disabled(),
    )
    load_data(path, limit=4)
    load_data("sklearn:digits", limit=20)
    assert torch.equal(before[0], torch.get_rng_state())
    after = random.getstate(), np.random.get_state()[1].tolist(), datasets.are_progress_bars_disabled()
    assert before[1:] == after


def test_the_package_is_light() -> None:
    import subprocess

    code = "import petiole.tasks as t, sys; t.registry(); print([m for m in ('datasets', 'transformers', 'sklearn', 'pyarrow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
