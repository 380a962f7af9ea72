"""Spectrogram transformers: padding, SpecAugment, other lengths, and digits of speakers that pre-training never heard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import petiole as pt
import tiny
from petiole.errors import ConfigError, DataError
from petiole.tasks import load_data, prepare
from petiole.tasks.spectrograms import SpecAugment, fit_length, frames_of, grid, token_mask
from petiole.tasks.spoken_digits import WORDS, spoken_digits
from petiole.tasks.tokens import Pad


def positions(model: Any) -> Tensor:
    return model.audio_spectrogram_transformer.embeddings.position_embeddings.detach()


# ------------------------------------------------------------------------------------------------------------ spectrograms


def test_padding_is_what_repeats_up_to_the_end() -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert frames_of(x) == 9
    x[6:] = 0.47
    assert frames_of(x) == 6
    x[3] = 0.47  # a silent frame in between is none
    assert frames_of(x) == 6
    assert frames_of(torch.zeros(5, 4)) == 1


def test_tokens_that_hold_no_sound_change_nothing() -> None:
    """Patches that begin behind the end are masked, in every row of frequencies: what stands there does not reach the class token."""
    model = tiny.model("ast", max_length=40, time_stride=4)
    bins, times = grid(model.config)
    assert (bins, times) == (2, 9)
    mask = token_mask(model.config, [40, 13, 1])
    assert mask.shape == (3, 2 + bins * times)
    assert mask.sum(1).tolist() == [20, 2 + 2 * 4, 2 + 2 * 1]
    assert mask[1, 2 : 2 + times].tolist() == [1] * 4 + [0] * 5 == mask[1, 2 + times :].tolist()
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    for row, end in ((1, 12 + 8), (2, 8)):  # the last frame of the last patch that begins before the end
        other[row, end:] += 3
    with torch.no_grad():
        torch.testing.assert_close(model(other, attention_mask=mask).logits, model(x, attention_mask=mask).logits)
        assert not torch.allclose(model(other).logits, model(x).logits)


def test_a_shorter_length_keeps_the_middle_positions() -> None:
    model = tiny.model("ast")
    before = positions(model)[0, 2:].unflatten(0, (2, 4))
    fit_length(model, 20)
    after = positions(model)[0]
    assert model.config.max_length == 20 and after.shape[0] == 2 + 2 * 2
    assert torch.equal(after[2:].unflatten(0, (2, 2)), before[:, 1:3])
    assert model(torch.zeros(1, 20, 16)).logits.shape == (1, 3)


def test_a_longer_length_is_interpolated_along_time_alone() -> None:
    model = tiny.model("ast")
    with torch.no_grad():  # 0, 1, 2, 3 along time, and 10 more in the second row of frequencies
        ramp = torch.arange(4.0).repeat(2, 1) + torch.tensor([[0.0], [10.0]])
        model.audio_spectrogram_transformer.embeddings.position_embeddings[0, 2:] = ramp.flatten()[:, None].expand(
            -1, 32
        )
    special = positions(model)[0, :2]
    fit_length(model, 64)
    after = positions(model)[0]
    assert torch.equal(after[:2], special)
    rows = after[2:, 0].unflatten(0, (2, 8))
    torch.testing.assert_close(rows[0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    torch.testing.assert_close(rows[1], rows[0] + 10)
    assert model(torch.zeros(1, 64, 16)).logits.shape == (1, 3)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        fit_length(tiny.model("ast"), 7)
    with pytest.raises(ConfigError, match="spectrogram"):
        fit_length(tiny.model("bert"), 64)


def test_spec_augment_hides_one_band_and_one_stretch() -> None:
    rows = [{"input_values": torch.ones(20, 12), "labels": torch.tensor(i)} for i in range(200)]
    collate = SpecAugment(Pad({}), frequencies=4, frames=6, seed=3)
    batch = collate(rows)
    again = SpecAugment(Pad({}), frequencies=4, frames=6, seed=3)
    assert torch.equal(batch["input_values"], again(rows)["input_values"])
    assert not torch.equal(batch["input_values"], collate(rows)["input_values"])
    assert batch["labels"].tolist() == list(range(200))
    hidden = batch["input_values"] == 0
    stretch, band = hidden.all(2), hidden.all(1)  # (B, T), (B, bins)
    assert torch.equal(hidden, stretch[:, :, None] | band[:, None])
    assert set(stretch.sum(1).tolist()) == set(range(7)) and set(band.sum(1).tolist()) == set(range(5))
    for mask in (stretch, band):
        assert ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]).max() == 1  # in one piece
        assert mask.any(0).all()  # anywhere
    with pytest.raises(ConfigError, match="at least 0"):
        SpecAugment(Pad({}), frequencies=-1, frames=6)


# ------------------------------------------------------------------------------------------------------ digits of the unseen


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones for digits: a frequency for each, another register and length for each speaker."""
    soundfile = pytest.importorskip("soundfile", reason="extra audio is not installed")
    pandas = pytest.importorskip("pandas")
    rng, rows = np.random.default_rng(0), []
    for number, speaker in enumerate(("ann", "bob", "cy")):
        for digit in range(10):
            for _ in range(4):
                t = np.arange(int(rng.integers(1600, 6000))) / 8000
                wave = 0.3 * np.sin(2 * np.pi * (300 + 250 * digit + 60 * number) * t) + 0.01 * rng.standard_normal(
                    len(t)
                )
                soundfile.write(file := io.BytesIO(), wave.astype(np.float32), 8000, format="WAV")
                rows.append({"audio": file.getvalue(), "label": digit, "speaker": speaker})
    folder = tmp_path_factory.mktemp("clips")
    table = pandas.DataFrame(rows)
    table[::2].to_parquet(folder / "tones-train.parquet")
    table[1::2].to_parquet(folder / "tones-test.parquet")
    return folder / "tones"


@pytest.fixture(scope="module")
def found(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")
    return cache, *spoken_digits(clips, cache, unseen=["cy"], shots=1, validation=1, epochs=2)


def test_the_unseen_are_the_data_and_the_others_the_pre_training(found: Any, clips: Path) -> None:
    cache, folder, data = found
    assert [len(rows) for rows in data.splits.values()] == [10, 10, 20]
    for rows in data.splits.values():
        assert set(rows["speaker"]) == {"cy"} and set(rows["label"]) == set(range(10))
    sounds = [cell["bytes"] for rows in data.splits.values() for cell in rows["audio"]]
    assert len(set(sounds)) == 40  # no clip twice
    again = spoken_digits(clips, cache, unseen=["cy"], shots=1, validation=1, epochs=2, seed=1)
    assert again[0] == folder and [p.name for p in cache.iterdir()] == [folder.name]
    assert [c["bytes"] for c in again[1].train["audio"]] != [c["bytes"] for c in data.train["audio"]]


def test_the_folder_is_a_model_for_any_method(found: Any) -> None:
    _, folder, data = found
    task = prepare(data, folder)
    model = task.build_model(seed=0)
    assert any("head drawn afresh" in note for note in task.notes) and task.config.id2label[3] == WORDS[3]
    x = torch.stack([row["input_values"] for row in task.encoded("train")])
    assert x.shape[1:] == (model.config.max_length, model.config.num_mel_bins)
    assert float(x.std()) < 3  # normalised by the other speakers' mean and deviation
    tuned = pt.attach(model, pt.ASTAdapter(reduction_factor=8))
    rows = task.encoded("train")
    tuned.check(task.collator([rows[i] for i in range(4)]))
    assert 0 <= task.evaluate(model, "test")["accuracy"] <= 1


def test_the_same_seed_gives_the_same_weights(found: Any, clips: Path, tmp_path: Path) -> None:
    _, folder, _ = found
    state = torch.get_rng_state()
    other, _ = spoken_digits(clips, tmp_path, unseen=["cy"], shots=1, validation=1, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.name == folder.name
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_masks_follow_the_length_of_each_clip(found: Any) -> None:
    _, folder, data = found
    task = prepare(data, folder, mask_padding=True)
    rows = task.encoded("train")
    batch = task.collator([rows[i] for i in range(len(rows))])
    mask, config = batch["attention_mask"], task.config
    for x, own in zip(batch["input_values"], mask, strict=True):
        assert torch.equal(own, token_mask(config, [frames_of(x)])[0])
    assert len(set(mask.sum(1).tolist())) > 1
    model = task.build_model()
    plain = prepare(data, folder).evaluate(model, "test")["log_loss"]
    assert task.evaluate(model, "test")["log_loss"] != plain
    pt.attach(model, [pt.ASTAdapter(reduction_factor=8), pt.LinearProbe(pool="patches")]).check(batch)


def test_what_is_refused(clips: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    for fields, message in (
        ({"unseen": ["dora"]}, "ann, bob, cy"),
        ({"unseen": ["ann", "bob", "cy"]}, "one has to be left"),
        ({"unseen": ["cy"], "shots": 3, "validation": 1}, "none is left"),
    ):
        with pytest.raises(DataError, match=message):
            spoken_digits(clips, tmp_path, **{"epochs": 1, **fields})
    with pytest.raises(ConfigError, match="at least 1"):
        spoken_digits(clips, tmp_path, shots=0)
    with pytest.raises(ConfigError, match="mask_padding"):
        prepare(load_data(clips), models["wav2vec2"], mask_padding=True)
