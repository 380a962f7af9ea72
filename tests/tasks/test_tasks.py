"""Tasks bound to tiny models: inputs, heads, labels' names, metrics, generation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from petiole.errors import ConfigError, DataError, FileError
from petiole.tasks import METRICS, Column, Task, load_data, locate_model, prepare, registry
from petiole.tasks.metrics import IGNORED
from petiole.tasks.tokens import Pad
from tasks.makers import class_folders, csv, jsonl, parquet, png, rows, wav

Models = dict[str, Path]


@pytest.fixture
def texts(tmp_path: Path) -> Any:
    return load_data(csv(tmp_path / "texts.csv", rows(30)))


@pytest.fixture
def prompts(tmp_path: Path) -> Any:
    records = [
        {"text": f"the cat {w} on", "target": f"{t} mat"} for w in ("sat", "ran") for t in ("the", "a", "one", "red")
    ]
    return load_data(
        jsonl(tmp_path / "prompts.jsonl", records), validation_fraction=0.25, target="target", task="causal-lm"
    )


def batch_of(task: Task, split: str = "train", n: int = 4) -> dict[str, torch.Tensor]:
    rows_ = task.encoded(split)
    return task.collator([rows_[i] for i in range(n)])


# ---------------------------------------------------------------------------------------------------------------- the registry


def test_registry_and_definition() -> None:
    kinds = registry()
    assert {"text-classification", "image-classification", "audio-classification", "causal-lm", "seq2seq"} <= set(kinds)
    for name, kind in kinds.items():
        assert kind.name == name and kind.title and kind.usual_metric in kind.metric_names
        assert set(kind.metric_names) <= set(METRICS)
        assert any(column.required for column in kind.columns)

    with pytest.raises(ConfigError, match="two tasks are called 'seq2seq'"):

        class Another(Task):
            name: ClassVar[str] = "seq2seq"
            columns: ClassVar[tuple[Column, ...]] = ()

    assert registry()["seq2seq"] is kinds["seq2seq"]


def test_options_are_checked(texts: Any, models: Models) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_length'"):
        prepare(texts, models["bert"], max_lenght=8)
    with pytest.raises(ConfigError, match="perplexity"):
        prepare(texts, models["bert"], main_metric="perplexity")
    with pytest.raises(ConfigError, match="25"):
        prepare(texts, models["bert"], max_length=25)  # the position table has 24
    task = prepare(texts, models["bert"], main_metric="log_loss")
    assert not task.higher_is_better and prepare(texts, models["bert"]).higher_is_better


# ------------------------------------------------------------------------------------------------------------------------ models


def test_places_of_models(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_model(models["bert"]) == (str(models["bert"]), True)
    assert locate_model("owner/name") == ("owner/name", False)
    assert locate_model("hub:name") == ("name", False)
    assert (Path(locate_model("petiole:vit-cifar10").name) / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    for wrong in ("bert", "here/nothing", "./x", tmp_path / "x", "here", "petiole:vit-cifar11", "owner/name:part"):
        with pytest.raises(FileError):
            locate_model(wrong)


def test_a_new_head_is_drawn_from_its_seed_alone(texts: Any, models: Models) -> None:
    task = prepare(texts, models["bert"])
    state = torch.get_rng_state()
    first, torch_moved = task.build_model(seed=1), torch.rand(3)
    torch.manual_seed(99)
    again, other = task.build_model(seed=1), task.build_model(seed=2)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)
    torch.set_rng_state(state)
    assert torch.equal(torch_moved, torch.rand(3))
    assert first.config.id2label == {0: "neg", 1: "pos"} and first.config.label2id == {"neg": 0, "pos": 1}
    assert not first.training and first.dtype == torch.float32
    assert any("drawn afresh from seed 1: 'classifier.bias', 'classifier.weight'" in note for note in task.notes)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("ant", "bee"), ("ant", "bee", "cow")])
def test_a_head_is_kept_only_for_the_same_classes(tmp_path: Path, models: Models, classes: tuple[str, ...]) -> None:
    from safetensors.torch import load_file

    stored = load_file(models["vit"] / "model.safetensors")["classifier.weight"].float()
    task = prepare(load_data(class_folders(tmp_path, classes, png, ".png")), models["vit"])
    model = task.build_model()
    weight = model.classifier.weight
    assert weight.dtype == torch.float32 and len(weight) == len(classes) == model.config.num_labels
    same = classes == ("cat", "dog")
    assert torch.equal(weight, stored) if same else len(classes) == 3 or not torch.isclose(weight, stored).any()
    assert torch.equal(weight, task.build_model().classifier.weight)  # the same seed
    assert ("head kept from the checkpoint" in task.notes) == same
    fresh = task.build_model(head="fresh").classifier
    assert len(classes) == 3 or not torch.isclose(fresh.weight, stored).any()
    assert fresh.bias.eq(0).all()  # the model's own rule of initialisation
    if len(classes) == 2:
        assert torch.equal(task.build_model(head="keep").classifier.weight, stored)
    else:
        with pytest.raises(ConfigError, match="3 classes"):
            task.build_model(head="keep")


def test_a_head_that_is_not_there_cannot_be_kept(tmp_path: Path, models: Models) -> None:
    records = [
        {"text": "the cat", "label": f"LABEL_{i % 2}"} for i in range(8)
    ]  # the names a configuration has by default
    task = prepare(load_data(csv(tmp_path / "a.csv", records)), models["bert"])
    task.build_model()
    assert any("drawn afresh" in note for note in task.notes)
    with pytest.raises(ConfigError, match="no classifier"):
        task.build_model(head="keep")


def test_a_head_among_the_parts_of_a_model(tmp_path: Path) -> None:
    """Whisper has no backbone of its own beside its classifier."""
    import transformers as t

    from petiole.tasks.models import load_model

    config = t.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8
    )
    stored = t.WhisperForAudioClassification(config)
    stored.save_pretrained(tmp_path)
    model, notes = load_model("AutoModelForAudioClassification", locate_model(tmp_path), label_names=("yes", "no"))
    assert notes == ["head drawn afresh from seed 0: 'classifier.bias', 'classifier.weight'"]
    before, after = stored.state_dict(), model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "classifier.weight"
    }  # biases start at 0


def test_a_block_that_is_not_in_the_file_is_refused(tmp_path: Path, texts: Any, models: Models) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(models["bert"], other)
    tensors = load_file(other / "model.safetensors")
    whole = dict(tensors)
    (gone,) = (name for name in tensors if name.endswith("layer.1.output.dense.bias"))
    del tensors[gone]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match=r"layer\.1\.output\.dense\.bias"):
        prepare(texts, other).build_model()
    without_pooler = {name: tensor for name, tensor in whole.items() if "pooler" not in name}
    save_file(without_pooler, other / "model.safetensors", {"format": "pt"})
    task = prepare(texts, other)
    task.build_model()
    assert any("not in the checkpoint" in note and "pooler" in note for note in task.notes)


def test_models_that_cannot_be_loaded(tmp_path: Path, texts: Any, models: Models) -> None:
    import shutil

    with pytest.raises(FileError, match=r"no config\.json"):
        prepare(texts, tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(models["bert"], damaged)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(FileError, match="can't load the model"):
        prepare(texts, damaged).build_model()
    (damaged / "model.safetensors").unlink()
    torch.save({}, damaged / "pytorch_model.bin")  # pickles are never read
    with pytest.raises(FileError):
        prepare(texts, damaged).build_model()
    (damaged / "tokenizer.json").unlink()
    (damaged / "tokenizer_config.json").unlink()
    with pytest.raises(FileError, match="can't load the tokenizer"):
        prepare(texts, damaged)
    with pytest.raises(ConfigError, match="float32"):
        prepare(texts, models["bert"]).build_model(dtype="int8")


def test_a_configuration_of_other_sizes_is_refused(tmp_path: Path, texts: Any, models: Models) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(models["bert"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    with pytest.raises(FileError, match="position_embeddings"):
        prepare(texts, other).build_model()


def test_what_a_checkpoint_was_trained_for_does_not_carry_over(tmp_path: Path, texts: Any, models: Models) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(models["bert"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    task = prepare(texts, other)
    model, batch = task.build_model(), batch_of(task)
    output = model(**batch)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, batch["labels"]))


def test_nothing_local_opens_a_socket(tmp_path: Path, models: Models) -> None:
    """Also where no variable tells the Hugging Face libraries to stay offline."""
    import os
    import subprocess
    import sys

    class_folders(tmp_path / "pets", ("ant", "bee"), png, ".png")
    csv(tmp_path / "texts.csv", rows())
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("a socket")
socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
from petiole.tasks import load_data, prepare
for data, model in (({str(tmp_path / "pets")!r}, {str(models["vit"])!r}), ({str(tmp_path / "texts.csv")!r}, {str(models["bert"])!r}),
                    ("sklearn:digits", "petiole:vit-cifar10")):
    task = prepare(load_data(data, limit=8), model)
    print(sorted(task.evaluate(task.build_model())))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment["HF_HOME"] = str(tmp_path / "hf")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["['accuracy', 'log_loss', 'macro_f1', 'matthews']"] * 3
    assert "it/s" not in run.stderr and "examples/s" not in run.stderr  # no bars where nobody watches
    assert not list((tmp_path / "hf").rglob("*.arrow"))  # nothing is cached behind the user's back


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, texts: Any, models: Models) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(models["bert"], other)
    shutil.copy(models["t5"] / "model.safetensors", other / "model.safetensors")
    with pytest.raises(FileError, match="belongs to another kind"):
        prepare(texts, other).build_model()


def test_the_empty_model_has_the_shapes_of_the_real_one(texts: Any, models: Models) -> None:
    task = prepare(texts, models["bert"])
    empty, model = task.empty_model(), task.build_model()
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())


# -------------------------------------------------------------------------------------------------------------------------- text


def test_text_classification_inputs(texts: Any, models: Models) -> None:
    task = prepare(texts, models["bert"])
    tokenizer = task.processor
    batch = batch_of(task, n=8)
    for i in range(8):
        expected = tokenizer(texts.train[i]["text"])
        length = len(expected["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == expected["input_ids"]
        assert batch["attention_mask"][i].sum() == length
    assert batch["labels"].tolist() == texts.train["label"][:8]


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path, models: Models) -> None:
    words = ["the cat", "the cat sat on the mat", "dog", "a good film"]
    data = load_data(
        csv(tmp_path / "a.csv", [{"text": w, "label": i % 2} for i, w in enumerate(words)]), validation_fraction=0
    )
    task = prepare(data, models["bert"])
    batch = batch_of(task, n=4)
    assert batch["input_ids"].shape == (4, 8) and batch["attention_mask"].sum(1).tolist() == [4, 8, 3, 5]
    model = task.build_model()
    alone = [model(**batch_of(task, n=1)).logits[0]]
    assert torch.allclose(model(**batch).logits[0], alone[0], atol=1e-6)


def test_pairs_are_tokenised_as_pairs(tmp_path: Path, models: Models) -> None:
    path = csv(
        tmp_path / "a.csv", [{"premise": "the cat sat", "hypothesis": "a dog ran", "label": i % 2} for i in range(10)]
    )
    task = prepare(load_data(path), models["bert"])
    row = task.encoded("train")[0]
    assert row["input_ids"] == task.processor("the cat sat", "a dog ran")["input_ids"]
    assert sum(row["token_type_ids"]) == 4
    assert math.isfinite(task.evaluate(task.build_model())["log_loss"])


def test_rows_that_are_cut_are_counted(tmp_path: Path, models: Models) -> None:
    lengths = [2, 5, 6, 7, 30, 40, 3, 4]
    path = csv(tmp_path / "a.csv", [{"text": "cat " * n, "label": i % 2} for i, n in enumerate(lengths)])
    data = load_data(path, validation_fraction=0)
    task = prepare(data, models["bert"], max_length=8)  # six words beside [CLS] and [SEP]
    assert max(len(row["input_ids"]) for row in task.encoded("train")) == 8
    assert task.notes == ["train: 3 of 8 rows cut to 8 tokens"]
    task = prepare(data, models["bert"])
    task.encoded("train")
    assert task.notes == ["train: 2 of 8 rows cut to 24 tokens"]


def test_decoders_classify_with_padding(tmp_path: Path, models: Models) -> None:
    records = [*rows(10), {"text": "", "label": "pos"}]
    task = prepare(load_data(jsonl(tmp_path / "a.jsonl", records), validation_fraction=0), models["gpt2"])
    model = task.build_model()
    assert model.config.pad_token_id == task.processor.pad_token_id == 4
    assert any("'</s>'" in note for note in task.notes)
    batch = batch_of(task, n=11)
    assert batch["attention_mask"].sum(1).min() == 1  # an empty text keeps one token
    for i in range(10):
        alone = model(**task.collator([task.encoded("train")[i]])).logits[0]
        assert torch.allclose(model(**batch).logits[i], alone, atol=1e-5)


def test_evaluation_leaves_no_trace(texts: Any, models: Models) -> None:
    task = prepare(texts, models["bert"])
    model = task.build_model().train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = task.evaluate(model, "train", batch_size=7)
    assert found == pytest.approx(task.evaluate(model, texts.train, batch_size=100))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    logits = torch.cat([model.eval()(**task.collator([row])).logits for row in task.encoded("train")])
    right = (logits.argmax(1) == torch.tensor(texts.train["label"])).double().mean()
    assert found["accuracy"] == pytest.approx(right.item())
    with pytest.raises(DataError, match="no test split"):
        task.evaluate(model, "test")


def test_transformers_trainer_takes_the_parts(tmp_path: Path, texts: Any, prompts: Any, models: Models) -> None:
    from transformers import Trainer, TrainingArguments

    for data, name in ((texts, "bert"), (prompts, "gpt2")):
        task = prepare(data, models[name])
        trainer = Trainer(
            model=task.build_model(),
            args=TrainingArguments(
                str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=1
            ),
            train_dataset=task.encoded("train"),
            eval_dataset=task.encoded("validation"),
            data_collator=task.collator,
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.reduce,
        )
        trainer.train()
        found = trainer.evaluate()
        own = Task.evaluate(task, trainer.model)
        for metric, value in own.items():
            assert found[f"eval_{metric}"] == pytest.approx(value, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------- images, sounds


def test_image_inputs_are_the_processors(tmp_path: Path, models: Models) -> None:
    data = load_data(class_folders(tmp_path, ("cat", "dog"), png, ".png"))
    task = prepare(data, models["vit"])
    batch = batch_of(task, n=3)
    expected = task.processor([data.train[i]["image"].convert("RGB") for i in range(3)], return_tensors="pt")[
        "pixel_values"
    ]
    assert torch.equal(batch["pixel_values"], expected) and expected.shape == (3, 3, 8, 8)
    lazy = prepare(data, models["vit"], most_bytes=100)
    assert type(lazy.encoded("train")).__name__ == "LazyRows"
    model = task.build_model()
    assert lazy.evaluate(model, batch_size=1) == pytest.approx(task.evaluate(model))
    assert torch.equal(batch_of(lazy, n=3)["pixel_values"], expected)
    assert len(list(lazy.encoded("train"))) == len(data.train)


def test_images_of_every_mode_and_turned(tmp_path: Path, models: Models) -> None:
    from PIL import Image

    from petiole.tasks.media import read_image

    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "i" / name).mkdir(parents=True)
        for mode in ("L", "RGBA", "P", "CMYK", "1", "I;16"):
            image = Image.new("RGB" if mode == "P" else mode, (9, 5))
            image.convert(mode).save(tmp_path / "i" / name / f"{mode.replace(';', '')}{k}.tif")
    task = prepare(load_data(tmp_path / "i", validation_fraction=0), models["vit"])
    assert batch_of(task, n=12)["pixel_values"].shape == (12, 3, 8, 8)
    turned = Image.new("RGB", (9, 5))
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg"), "").size == (5, 9)


def test_an_image_that_is_gone_is_named(tmp_path: Path, models: Models) -> None:
    root = class_folders(tmp_path, ("cat", "dog"), png, ".png")
    data = load_data(root)
    (root / "dog" / "01.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"01\.png: unreadable image"):
        for split in data.splits:
            prepare(data, models["vit"]).encoded(split)


def test_sounds_are_resampled_and_padded(tmp_path: Path, models: Models) -> None:
    records = [{"audio": wav(300.0, seconds=0.05 + 0.01 * i), "label": i % 2} for i in range(8)]
    data = load_data(parquet(tmp_path / "a.parquet", records), validation_fraction=0)
    task = prepare(data, models["wav2vec2"])
    batch = batch_of(task, n=8)
    lengths = [round((0.05 + 0.01 * i) * 16000) for i in range(8)]
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["input_values"].shape == (8, max(lengths))
    wave = batch["input_values"][0, : lengths[0]].numpy()
    sine = math.sqrt(2) * np.sin(
        2 * np.pi * 300 * np.arange(lengths[0]) / 16000
    )  # the extractor scales to unit variance
    assert np.abs(wave - sine)[80:-80].max() < 0.02
    assert all(math.isfinite(value) for value in task.evaluate(task.build_model(), "train").values())
    cut = prepare(data, models["wav2vec2"], max_seconds=0.1)
    assert batch_of(cut, n=8)["input_values"].shape[1] == 1600 and cut.notes == ["train: 2 of 8 sounds cut to 0.1 s"]


def test_resampling_keeps_what_the_lower_rate_can_hold_and_no_more() -> None:
    from petiole.tasks.media import read_audio, resample

    time = np.arange(16000) / 16000
    low, high = np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 6000 * time)
    down = resample((low + high).astype(np.float32), 16000, 8000)
    assert len(down) == 8000
    assert np.abs(down - low[::2])[100:-100].max() < 0.01  # 6 kHz is gone, not folded back
    wave, rate = read_audio(wav(440.0, seconds=1.0), "")
    assert rate == 8000 and np.abs(resample(wave, rate, 16000) - 0.5 * low)[100:-100].max() < 0.005
    assert len(resample(wave, 8000, 11025)) == 11025


# --------------------------------------------------------------------------------------------------------------- language models


def test_causal_rows(tmp_path: Path, models: Models) -> None:
    (tmp_path / "a.txt").write_text("the cat sat\na dog ran on\nthe hill\n")
    task = prepare(load_data(tmp_path / "a.txt", validation_fraction=0), models["gpt2"])
    batch = batch_of(task, n=3)
    ids = [[*task.processor(text)["input_ids"], 4] for text in ("the cat sat", "a dog ran on", "the hill")]
    for row, labels, expected in zip(batch["input_ids"], batch["labels"], ids, strict=True):
        assert row[: len(expected)].tolist() == expected
        assert labels.tolist() == expected + [IGNORED] * (5 - len(expected))  # the end token is learnt, padding is not
    model = task.build_model()
    found = task.evaluate(model, "train", batch_size=2)
    losses = [model(input_ids=torch.tensor([i]), labels=torch.tensor([i])).loss.item() * (len(i) - 1) for i in ids]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / sum(len(i) - 1 for i in ids)), rel=1e-5)
    assert set(found) == {"perplexity", "token_accuracy"}
    with pytest.raises(DataError, match="target"):
        task.generate(model, task.data.train)


def test_causal_blocks(tmp_path: Path, models: Models) -> None:
    (tmp_path / "a.txt").write_text("the cat sat\n" * 300)
    data = load_data(tmp_path / "a.txt", validation_fraction=0)
    task = prepare(data, models["gpt2"], block_size=10)
    rows_ = task.encoded("train")
    stream = [token for row in rows_ for token in row["input_ids"]]
    assert len(rows_) == 120 and stream == [*task.processor("the cat sat")["input_ids"], 4] * 300
    assert rows_[5]["labels"] == rows_[5]["input_ids"]
    with pytest.raises(ConfigError, match="block_size: 25 is outside 2 to 24"):
        prepare(data, models["gpt2"], block_size=25)


def test_the_loss_is_on_the_target_alone(prompts: Any, models: Models) -> None:
    task = prepare(prompts, models["gpt2"])
    row, raw = task.encoded("train")[0], prompts.train[0]
    prompt, target = task.processor(raw["text"])["input_ids"], task.processor(raw["target"])["input_ids"]
    assert row["input_ids"] == [*prompt, *target, 4]
    assert row["labels"] == [IGNORED] * len(prompt) + [*target, 4]
    short = prepare(prompts, models["gpt2"], max_length=5)
    row = short.encoded("train")[0]
    assert row["input_ids"] == [*prompt[-2:], *target, 4]  # the prompt gives way
    assert row["labels"] == [IGNORED] * 2 + [*target, 4]
    assert any("6 of 6 rows cut to 5 tokens" in note for note in short.notes)
    tiny = prepare(prompts, models["gpt2"], max_length=2).encoded("train")[0]
    assert tiny["input_ids"] == tiny["labels"] == target


def test_causal_generation_continues_the_prompt_in_any_batch(prompts: Any, models: Models, tmp_path: Path) -> None:
    task = prepare(prompts, models["gpt2"], max_new_tokens=3)
    model = task.build_model()
    longer = load_data(
        jsonl(tmp_path / "b.jsonl", [{"text": "cat " * n, "target": "mat"} for n in (1, 5, 2, 9)]),
        task="causal-lm", target="target", validation_fraction=0,
    )  # fmt: skip
    texts_ = task.generate(model, longer.train, batch_size=4)
    assert texts_ == task.generate(model, longer.train, batch_size=1)
    for text, row in zip(texts_, longer.train, strict=True):
        ids = torch.tensor([task.processor(row["text"])["input_ids"]])
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected = task.processor.decode(ids[0, -3:], skip_special_tokens=True)
        assert text == expected
    found = task.evaluate(model)
    assert set(found) == {"perplexity", "token_accuracy", "exact_match", "rouge_l", "bleu", "chrf"}
    assert prepare(prompts, models["gpt2"], main_metric="rouge_l").higher_is_better
    with pytest.raises(ConfigError):
        prepare(prompts, models["gpt2"], generate=False, main_metric="rouge_l")


def test_sequence_to_sequence(tmp_path: Path, models: Models) -> None:
    records = [{"text": f"the cat sat {'on ' * n}", "target": "mat " * (n + 1)} for n in range(8)]
    data = load_data(jsonl(tmp_path / "a.jsonl", records), validation_fraction=0)
    task = prepare(data, models["t5"], max_target_length=4, max_new_tokens=4, prefix="red ")
    first, last = task.encoded("train")[0], task.encoded("train")[7]
    assert first["input_ids"] == task.processor("red the cat sat")["input_ids"]
    assert first["labels"] == task.processor("mat")["input_ids"] and first["labels"][-1] == 4
    assert len(last["labels"]) == 4 and last["labels"][-1] == 4  # cut, and still closed
    assert task.notes == ["train: 5 of 8 targets cut to 4 tokens"]
    batch = batch_of(task, n=8)
    assert batch["labels"][0].tolist() == [*first["labels"], IGNORED, IGNORED]
    model = task.build_model()
    found = task.evaluate(model, "train", batch_size=3)
    assert found["perplexity"] == pytest.approx(math.exp(model(**batch).loss.item()), rel=1e-5)
    assert task.generate(model, data.train, batch_size=8) == task.generate(model, data.train, batch_size=3)
    with torch.no_grad():  # a model that always says "mat" and never stops
        model.lm_head.weight.zero_()
        model.lm_head.weight[task.processor.convert_tokens_to_ids("mat")] = 1
        for parameter in model.decoder.final_layer_norm.parameters():
            parameter.fill_(1)
        task.reduce = lambda logits, labels: logits  # type: ignore[method-assign]
    assert {text.replace("mat", "").strip() for text in task.generate(model, data.train)} == {""}


def test_longer_logits_are_aligned_at_the_end(prompts: Any, models: Models) -> None:
    task = prepare(prompts, models["gpt2"])
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    with_prompt = torch.cat([torch.randn(2, 3, 11), logits], 1)
    assert torch.equal(task.reduce(logits, labels), task.reduce(with_prompt, labels))
    assert torch.equal(task.reduce((logits, None), labels), task.reduce(logits, labels))  # type: ignore[arg-type]


def test_padding_side(texts: Any, models: Models) -> None:
    task = prepare(texts, models["bert"])
    task.processor.padding_side = "left"
    assert batch_of(task)["attention_mask"][:, 0].all()  # positions are counted from the left


def test_half_precision_models_get_inputs_of_their_type(tmp_path: Path, models: Models) -> None:
    task = prepare(load_data(class_folders(tmp_path, ("cat", "dog"), png, ".png")), models["vit"])
    model = task.build_model(dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and math.isfinite(task.evaluate(model)["log_loss"])


def test_padding() -> None:
    lists = [{"input_ids": [1, 2, 3], "labels": 1}, {"input_ids": [4], "labels": 0}]
    assert Pad({"input_ids": 9})(lists)["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert Pad({"input_ids": 9}, side="left")(lists)["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert Pad({})(lists)["labels"].tolist() == [1, 0]
    arrays = [{"x": torch.ones(2, 3)}, {"x": torch.ones(4, 3)}]
    assert Pad({"x": 0.5})(arrays)["x"].sum() == 18 + 6 * 0.5
