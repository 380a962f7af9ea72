"""Files survive kills, full disks and altered bits: whole old or whole new, read strictly, refused in words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from petiole import files
from petiole.errors import FileError

SEAMS = ("_open", "_write", "_truncate", "_fsync", "_close", "_replace", "_unlink", "_make_folder", "_fsync_dir")
HEADER = {"methods": [{"slug": "lora", "rank": 8, "scale": 0.5}], "name": "blatt, ünïcode ✿", "state": {}, "seed": 3}


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a FileError of at most three lines that says these words."""
    with pytest.raises(FileError) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, (word, message)


def child(work: Callable[[], object]) -> int:
    """Run something in a forked copy of this process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def small(version: int = 0) -> dict[str, Tensor]:
    return {
        "encoder.0.q.A": torch.full((4, 8), float(version)),
        "encoder.0.q.B": torch.full((8, 4), version, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "step": torch.tensor(version),
    }


def saved(tensors: dict[str, Tensor], header: dict[str, Any], folder: Path) -> bytes:
    path = folder / "made.safetensors"
    files.save_adaptation(path, tensors, header)
    return path.read_bytes()


# --- round trip -------------------------------------------------------------------------------------------------------


def every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for dtype in files._DTYPES:
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=generator)
        found[f"{dtype}"] = values.to(torch.float32).to(dtype) if dtype.is_floating_point else values.to(dtype)
        found[f"{dtype}.scalar"] = found[f"{dtype}"][0, 0].clone()
        found[f"{dtype}.empty"] = torch.empty((0, 7), dtype=dtype)
    wide = torch.randn(6, 10, generator=generator)
    found["transposed"] = wide.t()
    found["strided"] = wide[::2, 1::3]
    found["expanded"] = torch.randn(4, 1, generator=generator).expand(4, 3)
    found["view.a"], found["view.b"] = wide[:3], wide[2:]  # one storage, overlapping
    found["trained"] = nn.Parameter(wide.clone())
    found["conjugate"] = torch.complex(wide, wide).conj()
    found['with "quotes" \\ and ☘'] = torch.ones(1)
    return found


def test_every_dtype_shape_and_stride_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_kind()
    path = tmp_path / "x.safetensors"
    digest = files.save_adaptation(path, tensors, HEADER)
    loaded, header = files.load_adaptation(path)
    assert header == {**HEADER, "format": 1, "digest": digest}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor.detach().resolve_conj()), name
        assert not loaded[name].requires_grad
    assert temporaries(tmp_path) == []


def test_any_safetensors_reader_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.save_adaptation(path, every_kind(), HEADER)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert bits(tensor) == bits(every_kind()[name].resolve_conj())
    with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    assert list(metadata) == ["petiole"]
    inner = metadata["petiole"]
    assert inner == json.dumps(json.loads(inner), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % every_kind()[name].element_size() == 0  # aligned


def test_the_digest_is_of_the_whole_file_with_its_own_place_in_zeros(tmp_path: Path) -> None:
    data = saved(small(), HEADER, tmp_path)
    (digest,) = set(re.findall(rb"[0-9a-f]{64}", data))
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_no_tensors_at_all(tmp_path: Path) -> None:
    files.save_adaptation(tmp_path / "x", {}, {})
    assert files.load_adaptation(tmp_path / "x")[0] == {}


def test_same_content_same_bytes(tmp_path: Path) -> None:
    tensors = every_kind()
    first = saved(tensors, HEADER, tmp_path)
    backwards = dict(reversed(list(tensors.items())))
    assert saved(backwards, dict(reversed(list(HEADER.items()))), tmp_path) == first
    again, header = files.load_adaptation(tmp_path / "made.safetensors")
    assert saved(again, header, tmp_path) == first  # a file that is loaded and saved is the same file
    assert saved(tensors, {**HEADER, "seed": 4}, tmp_path) != first


def test_the_bytes_of_format_1_never_change(tmp_path: Path) -> None:
    data = saved(small(2), {"methods": ["lora"], "seed": 1}, tmp_path)
    assert hashlib.sha256(data).hexdigest() == "744e6d4fd642913648d78264dcd00695ebe3d94d320c813b6895e112d042ae91"


def test_saving_moves_no_generator_and_no_tensor(tmp_path: Path) -> None:
    tensors = small(1)
    before = (torch.get_rng_state(), random.getstate(), {k: bits(v) for k, v in tensors.items()})
    files.save_adaptation(tmp_path / "x", tensors, HEADER)
    files.load_adaptation(tmp_path / "x")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert {k: bits(v) for k, v in tensors.items()} == before[2]


def test_the_copy_for_people(tmp_path: Path) -> None:
    path = tmp_path / "trec.petiole.safetensors"
    digest = files.save_adaptation(path, small(), HEADER)
    shown = files.read_json(tmp_path / "trec.petiole.json")
    assert shown["digest"] == digest and shown["methods"] == HEADER["methods"]
    assert shown["tensors"]["encoder.0.q.B"] == {"dtype": "BF16", "shape": [8, 4]}
    (tmp_path / "trec.petiole.json").write_text("{ broken")
    assert files.load_adaptation(path)[1]["digest"] == digest  # never read
    assert files.copy_path("a/x.json") == Path("a/x.json.json")  # never the file itself


def test_a_copy_that_cant_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.warns(UserWarning, match="copy for people of .*x.safetensors was not written") as caught:
        files.save_adaptation(tmp_path / "x.safetensors", small(5), HEADER)
    assert caught[0].filename == __file__  # it points at the call
    assert files.load_adaptation(tmp_path / "x.safetensors")[0]["step"] == 5
    assert temporaries(tmp_path) == []


# --- what is not saved ------------------------------------------------------------------------------------------------

FLOATS = [dtype for dtype in files._DTYPES if dtype.is_floating_point or dtype.is_complex]
NOT_FINITE = [
    pytest.param(dtype, value, id=f"{dtype}-{value}")
    for dtype in FLOATS
    for value in (float("nan"), float("inf"), -float("inf"))
    if dtype != torch.float8_e4m3fn or value != value  # that dtype has no infinity
]


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
def test_save_refuses_nan_and_infinity_and_names_the_tensor(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = torch.zeros(3, 3)
    bad[1, 2] = value
    bad = bad.to(dtype)
    files.save_adaptation(tmp_path / "x", small(1), HEADER)
    before = (tmp_path / "x").read_bytes()
    with refused("'encoder.3.v'", "NaN or infinity"):
        files.save_adaptation(tmp_path / "x", {**small(2), "encoder.3.v": bad}, HEADER)
    assert (tmp_path / "x").read_bytes() == before
    assert files.read_json(tmp_path / "x.json")["digest"].encode() in before


def test_save_finds_one_nan_at_the_end_of_a_big_tensor(tmp_path: Path) -> None:
    big = torch.zeros((1 << 22) + 3, dtype=torch.bfloat16)
    files.save_adaptation(tmp_path / "x", {"big": big}, {})
    big[-1] = float("nan")
    with refused("'big'"):
        files.save_adaptation(tmp_path / "x", {"big": big}, {})


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"": torch.ones(1)}, "no name"),
        ({"__metadata__": torch.ones(1)}, "no name"),
        ({3: torch.ones(1)}, "no name"),
        ({"\ud800": torch.ones(1)}, "surrogates"),
        ({"a": [1.0]}, "'a' is no plain tensor (list)"),
        ({"a": nn.UninitializedParameter()}, "'a' is no plain tensor (UninitializedParameter)"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is no plain tensor"),
        ({"a": torch.ones(2, device="meta")}, "meta device"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"line\nbreak" * 99: torch.ones(2, device="meta")}, "meta device"),
    ],
)
def test_save_refuses_what_is_no_tensor_with_values(tmp_path: Path, tensors: Any, word: str) -> None:
    with refused(word):
        files.save_adaptation(tmp_path / "x", tensors, {})
    assert os.listdir(tmp_path) == []


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"a": {"b": [1, float("nan")]}}, "header.a.b.1"),
        ({"a": float("inf")}, "header.a"),
        ({"a": {1: 2}}, "header.a"),
        ({"a": {1, 2}}, "set"),
        ({"a": torch.ones(1)}, "Tensor"),
        ({"a": Path("x")}, "header.a"),
        ({"a": "\udcff"}, "surrogates"),
        ({"a": 10**5000}, "digits"),
        ({"a": nested(100_000)}, "nested too deeply"),
    ],
)
def test_save_refuses_a_header_that_is_no_json(tmp_path: Path, header: Any, word: str) -> None:
    with refused(word):
        files.save_adaptation(tmp_path / "x", small(), header)
    assert os.listdir(tmp_path) == []


def test_tuples_become_lists_and_own_keys_are_set(tmp_path: Path) -> None:
    files.save_adaptation(tmp_path / "x", {}, {"roles": ("q", "v"), "format": 99, "digest": "mine"})
    header = files.load_adaptation(tmp_path / "x")[1]
    assert header["roles"] == ["q", "v"] and header["format"] == 1 and len(header["digest"]) == 64


# --- what is not loaded -----------------------------------------------------------------------------------------------


def forge(table: Any, inner: Any, body: bytes, *, raw: bytes | None = None) -> bytes:
    """A file whose digest holds, whatever else is wrong with it."""
    mark = "f" * 63 + "e"
    if isinstance(inner, dict):
        inner = json.dumps({"format": 1, "digest": mark, **inner})
    text = json.dumps({"__metadata__": {"petiole": inner}, **table}).encode() if raw is None else raw
    data = len(text).to_bytes(8, "little") + text + body
    digest = hashlib.sha256(data.replace(mark.encode(), b"0" * 64, 1)).hexdigest()
    return data.replace(mark.encode(), digest.encode(), 1)


def entry(dtype: str = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_forged_file_that_is_right_loads() -> None:
    tensors, header = files.parse(forge({"a": entry()}, {"x": 1}, bytes(8)))
    assert torch.equal(tensors["a"], torch.zeros(2)) and header["x"] == 1


NAN = b"\0\0\xc0\x7f" * 2
TWICE = b'{"__metadata__":{"petiole":"{}"},"a":1,"a":1}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["damaged", "0 bytes"]),
        (b"\2\0\0\0\0\0\0\0{", ["9 bytes"]),
        (pickle.dumps({"a": list(range(99))}), ["no safetensors file", "never unpickles"]),
        (b"PK\3\4" + bytes(99), ["no safetensors file"]),
        ((10**8 + 1).to_bytes(8, "little") + bytes(99), ["header of 100 MB"]),
        (forge({}, {}, b"")[:-1], ["cut short"]),
        (b"\2\0\0\0\0\0\0\0\xff\xfe", ["no UTF-8"]),
        (forge({}, "{", b""), ["no valid JSON"]),
        (forge({}, {}, b"", raw=b"[" * 100_000), ["nested too deeply"]),
        (forge({}, "[" * 100_000, b""), ["nested too deeply"]),
        (forge({}, {}, b"", raw=TWICE), ["'a' stands there twice"]),
        (forge({}, '{"format":1,"format":1}', b""), ["'format' stands there twice"]),
        (forge({}, '{"format":1,"a":1e999}', b""), ["'1e999' is no finite number"]),
        (forge({}, '{"format":1,"a":NaN}', b""), ["'NaN' is no finite number"]),
        (safetensors.torch.save({"a": torch.ones(2)}), ["not a petiole file"]),
        (safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}), ["not a petiole file"]),
        (forge({}, {}, b"", raw=b"[1,2]"), ["not a petiole file"]),
        (forge({}, {}, b"", raw=b'{"__metadata__":{"petiole":1}}'), ["not a petiole file"]),
        (forge({}, "[]", b""), ["no format number"]),
        (forge({}, {"format": "1"}, b""), ["no format number"]),
        (forge({}, {"format": True}, b""), ["no format number"]),
        (forge({}, {"format": 0}, b""), ["no format number"]),
        (forge({}, {"format": 2}, b""), ["newer petiole: format 2, this one reads up to 1"]),
        (forge({}, {"format": 10**4000}, b""), ["newer petiole"]),
        (forge({}, {"digest": None}, b""), ["holds no digest"]),
        (forge({}, {"digest": "F" * 64}, b""), ["holds no digest"]),
        (forge({}, {"digest": "0" * 64}, b""), ["does not match its digest"]),
        (forge({}, {"digest": "1" * 64, "again": "1" * 64}, b""), ["holds no digest"]),
        (forge({"a": entry()}, {}, NAN), ["'a' holds NaN or infinity"]),
        (forge({"a": entry()}, {}, bytes(7)), ["no valid safetensors"]),
        (forge({"a": entry()}, {}, bytes(9)), ["no valid safetensors"]),
        (forge({"a": entry(), "b": entry()}, {}, bytes(8)), ["no valid safetensors"]),  # overlapping
        (forge({"a": entry(start=8, end=16)}, {}, bytes(16)), ["no valid safetensors"]),  # a hole
        (forge({"a": entry(shape=[3])}, {}, bytes(8)), ["no valid safetensors"]),
        (forge({"a": entry(shape=[2**62, 2**62])}, {}, bytes(8)), ["no valid safetensors"]),
        (forge({"a": entry(shape=[2**63, 0], end=0)}, {}, b""), ["no valid safetensors"]),
        (forge({"a": entry(start=-8, end=0)}, {}, b""), ["no valid safetensors"]),
        (forge({"a": entry(dtype="F4", shape=[16])}, {}, bytes(8)), ["no valid safetensors"]),
        (forge({"a": entry(dtype="PICKLE")}, {}, bytes(8)), ["no valid safetensors"]),
        (forge({"a": {}}, {}, b""), ["no valid safetensors"]),
    ],
)
def test_load_refuses(tmp_path: Path, data: bytes, words: list[str]) -> None:
    path = tmp_path / "odd\nname.safetensors"
    path.write_bytes(data)
    with refused("odd\\nname.safetensors", *words):
        files.load_adaptation(path)


def test_load_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused("no regular file"):
        files.load_adaptation(tmp_path / "pipe")  # and does not hang
    with refused("it is a folder"):
        files.load_adaptation(tmp_path)
    with refused("no such file"):
        files.load_adaptation(tmp_path / "missing")
    with refused("no such file"):
        files.load_adaptation(tmp_path / "missing" / "x")
    with refused("can't be read"):
        files.load_adaptation("a\0b")
    with refused("too long"):
        files.load_adaptation(tmp_path / ("x" * 300))
    assert len(os.listdir("/proc/self/fd")) < 200


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    trap = Trap(str(tmp_path / "sprung"))
    torch.save({"a": trap}, tmp_path / "x.safetensors")
    with refused():
        files.load_adaptation(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(trap))
    with refused():
        files.load_adaptation(tmp_path / "x.safetensors")
    assert not (tmp_path / "sprung").exists()


def mutants(data: bytes, dice: random.Random) -> Iterator[bytes]:
    """Damaged copies of a file: every bit of its front, and 13,000 at random."""
    front = 8 + int.from_bytes(data[:8], "little")
    for i in range(front):
        for bit in range(8):
            yield data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]
    for i in range(front):  # any other byte, spaces and quotes among them
        yield data[:i] + bytes([dice.choice(b' "{}[]:,\\0919af\n')]) + data[i + 1 :]
    for i in range(len(data)):
        yield data[:i]
    for _ in range(4000):
        i = dice.randrange(len(data))
        yield data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i + 1 :]
    for _ in range(1500):
        extra = dice.choice([b"\0", b" ", dice.randbytes(dice.randrange(1, 99)), data])
        yield data + extra
        i = dice.randrange(len(data))
        yield data[:i] + extra + data[i:]
    for _ in range(3000):
        i, j = sorted(dice.sample(range(len(data)), 2))
        yield data[:i] + data[j:]
        block = data[i:j]
        yield data[:i] + dice.choice([bytes(len(block)), block[::-1], dice.randbytes(len(block))]) + data[j:]
    for _ in range(2000):  # two blocks of one length change places
        size = dice.choice([1, 4, 8, 32])
        i, j = sorted(dice.sample(range(0, len(data) - size, size), 2))
        yield data[:i] + data[j : j + size] + data[i + size : j] + data[i:j][:size] + data[j + size :]


def test_of_20000_damaged_files_none_is_accepted(tmp_path: Path) -> None:
    data = saved(small(7), HEADER, tmp_path)
    files.parse(data)
    tried = 0
    for mutant in mutants(data, random.Random(0)):
        if mutant == data:
            continue
        tried += 1
        try:
            files.parse(mutant)
        except FileError as error:
            assert len(str(error).splitlines()) <= 3
        else:
            pytest.fail(f"accepted: {mutant!r}")
    assert tried >= 20_000


def test_damage_on_disk_is_refused_as_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = saved(small(7), HEADER, tmp_path)
    for mutant in random.Random(1).sample([m for m in mutants(data, random.Random(1)) if m != data], 200):
        path.write_bytes(mutant)
        with refused(str(path)):
            files.load_adaptation(path)


def test_hand_made_files_with_a_right_digest_load_or_are_refused() -> None:
    """Whoever recomputes the digest reaches the parser of the tensor table: still no other exception."""
    dice = random.Random(2)
    mark = "f" * 63 + "e"
    inner = json.dumps({"digest": mark, "format": 1})
    table = {
        "a": entry(),
        "b": entry("BF16", [3, 2], 8, 20),
        "c": entry("BOOL", [], 20, 21),
        "d": entry("I64", [0], 21, 21),
    }
    text = json.dumps({"__metadata__": {"petiole": inner}, **table})
    numbers = ["0", "1", "-1", "8", "20", "21", "1e3", "2.5", "true", "null", '"a"', "[]", "{}", "9223372036854775807"]
    outcomes = {True: 0, False: 0}
    for _ in range(4000):
        mutant = text
        for _ in range(dice.randrange(1, 3)):
            start, end = dice.choice([m.span() for m in re.finditer(r"\d+|\"[A-Z][A-Z0-9]+\"", mutant)])
            mutant = mutant[:start] + dice.choice([*numbers, '"F32"', '"F64"', '"U8"', '"C64"', '"F4"']) + mutant[end:]
        try:
            files.parse(forge({}, {}, dice.randbytes(dice.choice([21, 21, 21, 20, 22])), raw=mutant.encode()))
            outcomes[True] += 1
        except FileError as error:
            assert len(str(error).splitlines()) <= 3
            outcomes[False] += 1
    assert outcomes[False] > 1000


# --- kills ------------------------------------------------------------------------------------------------------------


def check_one_version(path: Path) -> int:
    """The version that a file holds, which all its parts must agree on."""
    tensors, header = files.load_adaptation(path)
    version = header["version"]
    assert len(tensors) == 2 + version % 3
    for tensor in tensors.values():
        assert bool((tensor == version).all())
    return int(version)


def save_version(path: Path, version: int) -> None:
    tensors = {f"t{i}": torch.full((128, 128), version, dtype=torch.int32) for i in range(2 + version % 3)}
    files.save_adaptation(path, tensors, {"version": version})


@pytest.mark.filterwarnings("ignore:.*fork")
def test_100_kills_while_saving_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    dice = random.Random(3)
    save_version(path, 0)
    seen = 0
    moved = 0

    def forever() -> None:
        version = seen
        while True:
            version += 1
            save_version(path, version)

    for _ in range(100):
        pid = child(forever)
        time.sleep(dice.uniform(0.001, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert status(pid) == -signal.SIGKILL
        version = check_one_version(path)
        assert version >= seen
        moved += version > seen
        seen = version
    # The kills did fall into a series of saves, and many into the middle of one.
    assert moved > 10 and len(temporaries(tmp_path)) > 10
    save_version(path, seen + 1)
    assert check_one_version(path) == seen + 1


def counted(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, int, Callable[..., Any], Any], Any]) -> list[str]:
    """Route every system call through `act(name, number, call, arguments)`; the names of the calls as they come."""
    calls: list[str] = []

    def seam(name: str) -> Callable[..., Any]:
        real = getattr(files, name)

        def routed(*arguments: Any) -> Any:
            calls.append(name)
            return act(name, len(calls) - 1, real, arguments)

        return routed

    for name in SEAMS:
        monkeypatch.setattr(files, name, seam(name))
    return calls


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_each_system_call_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "x.safetensors"
    deadly = -1  # set in the children alone

    def act(name: str, number: int, call: Callable[..., Any], arguments: Any) -> Any:
        if number == deadly and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments)
        if number == deadly and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    calls = counted(monkeypatch, act)
    save_version(path, 1)
    sequence = list(calls)
    commit = len(sequence) - 1 - sequence[::-1].index("_replace")
    assert sequence.count("_replace") == 2 and sequence[-1] == "_fsync_dir"  # the copy for people, then the commit

    def die_at(number: int) -> None:
        nonlocal deadly
        calls.clear()
        deadly = number
        save_version(path, 4)  # as many tensors as version 1, so the same calls

    for number, name in enumerate(sequence):
        assert status(child(lambda number=number: die_at(number))) == -signal.SIGKILL
        happened = number > commit or (number == commit and moment == "after")
        assert check_one_version(path) == (4 if happened else 1), name
        save_version(path, 1)


# --- failing calls ----------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[str]]:
    """A function that makes the call of a number fail with an errno, and returns the calls since then."""
    target = [-1, 0]

    def act(name: str, number: int, call: Callable[..., Any], arguments: Any) -> Any:
        if number == target[0]:
            if name == "_close":
                call(*arguments)  # it reports an error, but the descriptor is gone
            raise OSError(target[1], os.strerror(target[1]))
        return call(*arguments)

    calls = counted(monkeypatch, act)

    def fail(number: int, code: int) -> list[str]:
        target[:] = [number, code]
        calls.clear()
        return calls

    return fail


WRITERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "bytes": (lambda p: files.write_bytes(p, b"old"), lambda p: files.write_bytes(p, b"new" * 9)),
    "text": (lambda p: files.write_text(p, "old"), lambda p: files.write_text(p, "new ☘")),
    "json": (lambda p: files.write_json(p, "old"), lambda p: files.write_json(p, {"new": [1]})),
    "row": (lambda p: files.append_line(p, "old"), lambda p: files.append_line(p, "new")),
    "first row": (lambda p: p.write_text(""), lambda p: files.append_line(p, "new")),
    "row after a torn one": (lambda p: p.write_text("old\nto"), lambda p: files.append_line(p, "new")),
    "adaptation": (lambda p: files.save_adaptation(p, small(1), {}), lambda p: files.save_adaptation(p, small(2), {})),
}
CODES = {errno.ENOSPC: "disk is full", errno.EIO: "input/output error", errno.EROFS: "read-only"}


@pytest.mark.filterwarnings("ignore:The copy for people")
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("writer", WRITERS)
def test_each_failing_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, code: int
) -> None:
    path = tmp_path / "x.safetensors"
    copy = tmp_path / "x.json"
    write_old, write_new = WRITERS[writer]
    fail = failing(monkeypatch)
    write_old(path)
    old = path.read_bytes()
    calls = fail(-1, 0)
    write_new(path)
    new = path.read_bytes()
    sequence = list(calls)
    assert new != old and len(sequence) >= 4
    last_replace = len(sequence) - 1 - sequence[::-1].index("_replace") if "_replace" in sequence else len(sequence)

    for number, name in enumerate(sequence):
        fail(-1, 0)
        path.unlink()
        copy.unlink(missing_ok=True)
        write_old(path)
        fail(number, code)
        failed = ""
        try:
            write_new(path)
        except FileError as error:
            failed = str(error)
            assert len(failed.splitlines()) <= 3 and CODES[code] in failed and str(path) in failed, failed
            assert error.errno == code
        now = path.read_bytes()
        assert temporaries(tmp_path) == [], (number, name)
        if not failed:  # only the copy for people may fail without a word
            assert writer == "adaptation" and number < last_replace and now == new, (number, name)
        elif number > last_replace:  # after the commit the new file is in place, and the error says so
            assert name == "_fsync_dir" and now == new and "new file is in place" in failed
        elif writer.startswith("row") and name in ("_truncate", "_close") and now != old:
            # A torn tail cut off, or a row that is written and durable although close complains: rows stay whole.
            assert now in (new, b"old\n"), (number, name)
        elif writer == "row after a torn one":
            assert now in (old, b"old\n"), (number, name)
        else:
            assert now == old or (writer == "first row" and name == "_close" and now == new), (number, name)

    fail(-1, 0)
    write_new(path)  # nothing is left behind that would keep a later write from working


def test_what_is_written_is_durable_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, lambda name, number, call, arguments: call(*arguments))
    files.write_bytes(tmp_path / "x", b"new")
    assert calls == ["_open", "_write", "_fsync", "_close", "_fsync_dir", "_replace", "_fsync_dir"]
    calls.clear()
    files.append_line(tmp_path / "r", "first")
    assert calls == ["_open", "_write", "_fsync", "_fsync_dir", "_close"]  # the file is new: its name too
    calls.clear()
    files.append_line(tmp_path / "r", "row")
    assert calls == ["_open", "_write", "_fsync", "_close"]


def test_a_first_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail = failing(monkeypatch)
    calls = fail(-1, 0)
    files.write_bytes(tmp_path / "x", b"new")
    sequence = list(calls)
    for number in range(sequence.index("_replace") + 1):
        (tmp_path / "x").unlink(missing_ok=True)
        fail(number, errno.ENOSPC)
        with refused("disk is full"):
            files.write_bytes(tmp_path / "x", b"new")
        assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_write", lambda fd, data: os.write(fd, memoryview(data)[:7]))
    files.save_adaptation(tmp_path / "x", small(4), HEADER)
    assert files.load_adaptation(tmp_path / "x")[0]["step"] == 4
    monkeypatch.setattr(files, "_write", lambda fd, data: 0)
    with refused("input/output error"):
        files.write_bytes(tmp_path / "x", b"new")


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.filterwarnings("ignore:The copy for people")
def test_a_real_limit_of_the_kernel(tmp_path: Path) -> None:
    """Not a mock: the kernel writes a part of what it is given, then nothing."""
    path = tmp_path / "x"
    rows = tmp_path / "rows"
    files.save_adaptation(path, small(1), {})
    files.append_line(rows, "a" * 1500)
    before = path.read_bytes(), rows.read_bytes()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with refused(str(path)):
            files.save_adaptation(path, {"big": torch.ones(99, 99)}, {})
        with refused(str(rows)):
            files.append_line(rows, "b" * 1000)

    assert status(child(limited)) == 0
    assert (path.read_bytes(), rows.read_bytes()) == before
    assert temporaries(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_folder_without_permission() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "x").write_bytes(b"old")
        folder.chmod(0o555)

        def unprivileged() -> None:
            if os.geteuid() == 0:  # permissions don't bind root
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            with refused(str(folder / "x"), "permission denied"):
                files.write_bytes(folder / "x", b"new")
            with refused(str(folder / "rows"), "permission denied"):
                files.append_line(folder / "rows", "row")
            with refused(str(folder), "permission denied"):
                files.check_writable(folder, 1)
            with refused(str(folder / "new"), "permission denied"):
                files.check_writable(folder / "new", 1)
            os.chdir("/")

        assert status(child(unprivileged)) == 0
        assert (folder / "x").read_bytes() == b"old" and os.listdir(folder) == ["x"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# --- whole files ------------------------------------------------------------------------------------------------------


def test_write_and_read(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "b", b"")
    files.write_bytes(tmp_path / "b", bytearray(b"\0\xff"))
    assert files.read_bytes(tmp_path / "b") == b"\0\xff"
    files.write_bytes(tmp_path / "b", memoryview(b""))
    assert files.read_bytes(tmp_path / "b") == b""
    files.write_text(tmp_path / "t", "eins\r\nzwei ☘")
    assert files.read_text(tmp_path / "t") == "eins\r\nzwei ☘"
    files.write_json(tmp_path / "j", {"b": (1, 2.5, None), "a": "☘"})
    assert (tmp_path / "j").read_text() == '{\n  "a": "☘",\n  "b": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    assert files.read_json(tmp_path / "j") == {"a": "☘", "b": [1, 2.5, None]}
    files.write_bytes(str(tmp_path / ("n" * 255)), b"a long name")
    assert temporaries(tmp_path) == []


def test_write_and_read_refuse(tmp_path: Path) -> None:
    with refused("no such folder", str(tmp_path / "no" / "x")):
        files.write_bytes(tmp_path / "no" / "x", b"")
    with refused("no such folder"):
        files.append_line(tmp_path / "no" / "x", "row")
    with refused("it is a folder"):
        files.write_bytes(tmp_path, b"")
    os.mkfifo(tmp_path / "pipe")  # stands for any device
    with refused("is no regular file"):
        files.write_bytes(tmp_path / "pipe", b"")
    with refused("no folder"):
        files.write_text(tmp_path / "pipe" / "x", "")
    (tmp_path / "pipe").unlink()
    with refused("can't be written"):
        files.write_bytes("a\0b", b"")
    with refused("surrogates"):
        files.write_text(tmp_path / "x", "\ud800")
    with refused("value.loss", "nan"):
        files.write_json(tmp_path / "x", {"loss": float("nan")})
    with refused("'value'", "key"):
        files.write_json(tmp_path / "x", {1: 1})
    assert os.listdir(tmp_path) == []
    (tmp_path / "x").write_bytes(b'{"a": 1,\n "a": 2}')
    with refused("'a' stands there twice"):
        files.read_json(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"[1]\n\xff")
    with refused("line 2", "UTF-8"):
        files.read_json(tmp_path / "x")


def test_permission_bits(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "x", b"")
        files.append_line(tmp_path / "rows", "row")
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / "rows").stat().st_mode) == 0o640
        (tmp_path / "x").chmod(0o604)
        files.write_bytes(tmp_path / "x", b"new")  # what the owner decided stays
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o604
    finally:
        os.umask(old)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "x").write_bytes(b"old")
    (tmp_path / "x").symlink_to(tmp_path / "big" / "x")
    files.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").is_symlink() and (tmp_path / "big" / "x").read_bytes() == b"new"
    (tmp_path / "y").symlink_to(tmp_path / "big" / "y")
    files.append_line(tmp_path / "y", "row")
    assert (tmp_path / "big" / "y").read_bytes() == b"row\n"


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    for name in (".petiole-old.tmp", ".petiole-new.tmp", ".other.tmp"):
        (tmp_path / name).write_bytes(b"x")
        if "new" not in name:
            os.utime(tmp_path / name, (time.time() - 100_000,) * 2)
    files.save_adaptation(tmp_path / "x.safetensors", small(), {})
    assert sorted(temporaries(tmp_path)) == [".other.tmp", ".petiole-new.tmp"]


def test_check_writable(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b", 1000)
    assert os.listdir(tmp_path / "a" / "b") == []
    with refused(str(tmp_path), "the run needs 1100000000016777216 bytes (1.1e+06 TB)", "left", "Make room"):
        files.check_writable(tmp_path, 10**18)
    (tmp_path / "file").write_bytes(b"")
    with refused(str(tmp_path / "file")):
        files.check_writable(tmp_path / "file", 1)
    with refused("no folder"):
        files.check_writable(tmp_path / "file" / "x", 1)


def test_check_writable_wants_a_tenth_and_a_margin_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 1_100_000_000 + files.MARGIN
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
        if free == needed:
            files.check_writable(tmp_path, 1_000_000_000)
    with pytest.raises(FileError, match=f"needs {needed} bytes .1.12 GB., its disk has {needed - 1} bytes") as caught:
        files.check_writable(tmp_path, 1_000_000_000)
    assert caught.value.errno == errno.ENOSPC
    files.check_writable(tmp_path)  # nothing is said about room where nothing is known of it


def test_check_target(tmp_path: Path) -> None:
    files.check_target(tmp_path / "new" / "x.safetensors", 1000)
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_bytes(b"old")
    files.check_target(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    with refused(str(tmp_path / "new"), "it is a folder", "Name a file"):
        files.check_target(tmp_path / "new")
    with refused(str(tmp_path / "file"), "a file of that name is in the way"):
        files.check_target(tmp_path / "file" / "x.safetensors")


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_check_writable_reports_each_failing_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fail = failing(monkeypatch)
    calls = fail(-1, 0)
    files.check_writable(tmp_path, 1)
    sequence = list(calls)
    assert sequence == ["_make_folder", "_open", "_write", "_fsync", "_close", "_unlink"]
    for number, name in enumerate(sequence[:-1]):
        fail(number, code)
        with refused(str(tmp_path), CODES[code]):
            files.check_writable(tmp_path, 1)
        assert os.listdir(tmp_path) == [], name


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_come_back(tmp_path: Path) -> None:
    rows = ['{"a": 1}', "", "☘ ü", " spaces ", "cr\r"]
    for row in rows:
        assert files.append_line(tmp_path / "r.jsonl", row) == 0
    assert files.read_lines(tmp_path / "r.jsonl") == (rows, "")
    (tmp_path / "empty").write_bytes(b"")
    assert files.read_lines(tmp_path / "empty") == ([], "")
    with refused("line break"):
        files.append_line(tmp_path / "r.jsonl", "a\nb")
    with refused("surrogates"):
        files.append_line(tmp_path / "r.jsonl", "\ud800")
    with refused("no such file"):
        files.read_lines(tmp_path / "none")
    assert files.read_lines(tmp_path / "r.jsonl") == (rows, "")


def test_a_row_torn_at_any_byte_is_skipped_then_repaired(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    whole = "eins\nzwei ☘\ndrei\n".encode()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        tail = whole[:cut].rpartition(b"\n")[2]
        rows, torn = files.read_lines(path)
        assert rows == ["eins", "zwei ☘", "drei"][:kept] and torn == tail.decode(errors="replace")
        assert files.append_line(path, "neu") == len(tail)
        assert files.read_lines(path) == ([*rows, "neu"], "")


def test_a_long_torn_row_is_cut_off_at_the_right_place(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for size in (0, 1, 65_535, 65_536, 65_537, 200_000):
        for start in (b"", b"a\n", b"a" * 70_000 + b"\n"):
            path.write_bytes(start + b"x" * size)
            assert files.append_line(path, "neu") == size
            assert path.read_bytes() == start + b"neu\n"


def test_a_row_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"a\nb\n\xff\nc\n")
    with refused("line 3"):
        files.read_lines(tmp_path / "r")


@pytest.mark.filterwarnings("ignore:.*fork")
def test_processes_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "r"
    long = "x" * 5000

    def append(mark: int) -> None:
        for i in range(40):
            files.append_line(path, f"{mark}-{i}-{long}")

    pids = [child(lambda mark=mark: append(mark)) for mark in range(3)]
    assert [status(pid) for pid in pids] == [0, 0, 0]
    rows, torn = files.read_lines(path)
    assert torn == "" and sorted(rows) == sorted(f"{m}-{i}-{long}" for m in range(3) for i in range(40))


@pytest.mark.filterwarnings("ignore:.*fork")
def test_an_append_waits_for_another(tmp_path: Path) -> None:
    with open(tmp_path / "r", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("half a")
        other.flush()
        pid = child(lambda: files.append_line(tmp_path / "r", "mine"))
        time.sleep(0.1)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        other.write(" row\n")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_UN)
        assert status(pid) == 0
    assert files.read_lines(tmp_path / "r") == (["half a row", "mine"], "")


@pytest.mark.filterwarnings("ignore:.*fork")
def test_kills_while_appending_leave_whole_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r"
    dice = random.Random(4)
    files.append_line(path, "0")

    def forever() -> None:
        row = int(files.read_lines(path)[0][-1].rstrip())
        while True:
            row += 1
            files.append_line(path, str(row) + " " * 3000)

    for _ in range(30):
        pid = child(forever)
        time.sleep(dice.uniform(0.001, 0.02))
        os.kill(pid, signal.SIGKILL)
        status(pid)
        rows, _ = files.read_lines(path)
        assert [int(row) for row in rows] == list(range(len(rows)))
    assert len(rows) > 10


# --- checkpoint folders -----------------------------------------------------------------------------------------------


def checkpoint(parent: Path, step: int) -> Path:
    folder = parent / f"checkpoint-{step}"
    (folder / "rank 0").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"m" * step)
    (folder / "rank 0" / "rng ☘.bin").write_bytes(b"r")
    (folder / "empty").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"h")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "inner").write_bytes(b"c")
    files.write_manifest(folder)
    return folder


def test_a_manifest_lists_every_file_and_holds(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    manifest = files.read_json(folder / "manifest.json")
    assert list(manifest["files"]) == ["empty", "model.safetensors", "rank 0/rng ☘.bin"]
    assert manifest["files"]["model.safetensors"] == {"size": 7, "sha256": hashlib.sha256(b"m" * 7).hexdigest()}
    assert files.verify_manifest(folder) == []
    (folder / ".hidden").write_bytes(b"changed")
    assert files.verify_manifest(folder) == []
    files.write_manifest(folder)
    assert files.verify_manifest(folder) == []


def test_a_manifest_finds_every_change(tmp_path: Path) -> None:
    def problems(change: Callable[[Path], object]) -> str:
        folder = checkpoint(tmp_path, 7)
        change(folder)
        found = files.verify_manifest(folder)
        shutil.rmtree(folder)
        assert len(found) == 1 and "\n" not in found[0]
        return found[0]

    def manifest(value: Any) -> Callable[[Path], object]:
        return lambda f: (f / "manifest.json").write_text(value if isinstance(value, str) else json.dumps(value))

    inner = "rank 0/rng ☘.bin"
    assert "'model.safetensors' was changed" in problems(lambda f: (f / "model.safetensors").write_bytes(b"n" * 7))
    assert "has 8 bytes, not 7" in problems(lambda f: (f / "model.safetensors").write_bytes(b"m" * 8))
    assert "is missing" in problems(lambda f: (f / inner).unlink())
    assert "is not listed" in problems(lambda f: (f / "rank 0" / "stray").write_bytes(b""))
    assert "not finished" in problems(lambda f: (f / "manifest.json").unlink())
    assert "no valid JSON" in problems(manifest("{"))
    assert "stands there twice" in problems(manifest('{"format":1,"files":{"a":1,"a":1}}'))
    for value in ([], {}, {"format": 1}, {"format": 1, "files": []}, {"format": True, "files": []}):
        assert problems(manifest(value)) == "its manifest.json is damaged"
    assert "newer petiole: format 2" in problems(manifest({"format": 2, "files": {}}))
    assert "no regular file" in problems(lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")))


def test_a_manifest_opens_no_path_of_its_own(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    outside = tmp_path / "secret"
    outside.write_bytes(b"s")
    manifest = files.read_json(folder / "manifest.json")
    for name in ("../secret", str(outside), "rank 0/../model.safetensors", "", "a\nb"):
        entries = {**manifest["files"], name: {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}}
        files.write_json(folder / "manifest.json", {"format": 1, "files": entries})
        (problem,) = files.verify_manifest(folder)
        assert "is missing" in problem and "\n" not in problem
    entries = {**manifest["files"], "empty": 5}
    files.write_json(folder / "manifest.json", {"format": 1, "files": entries})
    assert len(files.verify_manifest(folder)) == 1


def test_a_manifest_of_no_folder(tmp_path: Path) -> None:
    with refused("can't be read"):
        files.write_manifest(tmp_path / "none")
    assert files.verify_manifest(tmp_path / "none") == ["there is no manifest.json: the folder was not finished"]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_no_manifest_unless_every_file_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    folder = checkpoint(tmp_path, 3)
    fail = failing(monkeypatch)
    calls = fail(-1, 0)
    files.write_manifest(folder)
    sequence = list(calls)
    assert sequence.count("_fsync") == 4 and sequence.count("_fsync_dir") == 2 + 2  # three files and the manifest
    for number in range(len(sequence) - 1):
        (folder / "manifest.json").unlink(missing_ok=True)
        fail(number, code)
        with refused(CODES[code]):
            files.write_manifest(folder)
        assert files.verify_manifest(folder) == ["there is no manifest.json: the folder was not finished"]
        assert temporaries(folder) == []


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert files.newest_whole(tmp_path / "none") == (None, [])
    assert files.newest_whole(tmp_path) == (None, [])
    folders = {step: checkpoint(tmp_path, step) for step in (5, 100, 20, 3000, 9)}
    assert files.newest_whole(tmp_path) == (folders[3000], [])
    (folders[3000] / "manifest.json").unlink()
    (folders[100] / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9999").write_bytes(b"a file")
    (tmp_path / "other-8000").mkdir()
    best, skipped = files.newest_whole(tmp_path)
    assert best == folders[20]  # by number, not by name
    assert [path.name for path, _ in skipped] == ["checkpoint-best", "checkpoint-3000", "checkpoint-100"]
    reasons = [reason for _, reason in skipped]
    assert "step number" in reasons[0] and "not finished" in reasons[1] and "was changed" in reasons[2]
    for step in (20, 9, 5):
        shutil.rmtree(folders[step])
    best, skipped = files.newest_whole(tmp_path)
    assert best is None and len(skipped) == 3
    for i in range(9):
        (folders[100] / f"stray{i}").write_bytes(b"")
    assert "; and " in dict(files.newest_whole(tmp_path)[1])[folders[100]]
    assert files.newest_whole(tmp_path, "epoch-*") == (None, [])
    assert files.newest_whole(tmp_path / "checkpoint-9999") == (None, [])


# --- which backbone ---------------------------------------------------------------------------------------------------


class Config:
    def __init__(self, **fields: Any) -> None:
        self.fields = {
            "hidden_size": 8,
            "_name_or_path": "a/b",
            "dtype": None,
            "id2label": {0: "A"},
            "text_config": {"layers": 2, "_attn_implementation": "sdpa", "torch_dtype": "float32"},
            **fields,
        }

    def to_dict(self) -> dict[str, Any]:
        return self.fields


class Tiny(nn.Module):
    def __init__(self, config: Any = None, tied: bool = True, device: str = "cpu") -> None:
        super().__init__()
        self.config = Config() if config is None else config
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(50, 8, device=device)
        self.linear = nn.Linear(8, 8, device=device)
        self.norm = nn.BatchNorm1d(8, device=device)
        self.head = nn.Linear(8, 50, bias=False, device=device)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        if device == "cpu":
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if tied:
            self.head.weight = self.embedding.weight


def test_a_fingerprint_is_json_and_comes_back_the_same(tmp_path: Path) -> None:
    first, second = files.fingerprint(Tiny()), files.fingerprint(Tiny())
    assert first == second
    files.save_adaptation(tmp_path / "x", {}, {"fingerprint": first})
    assert files.same_backbone(files.load_adaptation(tmp_path / "x")[1]["fingerprint"], second) == []
    assert first["class"] == "Tiny" and first["tensors"] == 8 and first["dtypes"] == {"float32": 7, "int64": 1}
    assert first["elements"] == 50 * 8 + 8 * 8 + 8 + 4 * 8 + 1  # the tied head once


def test_a_fingerprint_sees_every_tensor() -> None:
    own = files.fingerprint(Tiny())
    names = [name for name in Tiny().state_dict() if name != "head.weight"]
    assert len(names) == 8
    for name in names:
        other = Tiny()
        other.state_dict()[name].view(-1)[0] += 1
        assert files.same_backbone(files.fingerprint(other), own) == [
            "the weights differ: same names and shapes, other values"
        ]
        assert files.fingerprint(other, exclude=[name]) == files.fingerprint(Tiny(), exclude=[name])


def test_a_fingerprint_in_words() -> None:
    own = files.fingerprint(Tiny())

    def words(other: nn.Module) -> str:
        (difference,) = files.same_backbone(files.fingerprint(other), own)
        return difference

    class Other(Tiny):
        pass

    assert words(Other()) == "the class is 'Other' in the file, 'Tiny' here"
    assert words(Tiny(Config(hidden_size=9))) == "the configuration differs: hidden_size"
    assert words(Tiny(Config(text_config={"layers": 3}))) == "the configuration differs: text_config"
    assert "8 more" in words(Tiny(Config(**{f"k{i:02}": i for i in range(16)})))
    assert "9 tensors of 905 elements in the file, 8 tensors of 505 elements here" in words(Tiny(tied=False))
    assert "dtypes" in words(Tiny().to(torch.float64)) and "bfloat16" in words(Tiny().to(torch.bfloat16))
    renamed = Tiny()
    renamed.stem = renamed.linear  # type: ignore[assignment]
    del renamed.linear
    assert "names or shapes" in words(renamed)
    for broken in ({}, {"class": "Tiny\n\n\n\n", "fields": 3, "config": [1], "values": {}, "dtypes": 1}):
        found = files.same_backbone(broken, own)
        assert len(found) >= 3 and all("\n" not in line for line in found)


def test_a_fingerprint_ignores_what_may_change() -> None:
    own = files.fingerprint(Tiny())
    volatile = {"_name_or_path": "c", "dtype": "bfloat16", "id2label": {}, "_attn_implementation": "eager"}
    text = {"layers": 2, "_attn_implementation": "eager", "torch_dtype": None}
    assert files.fingerprint(Tiny(Config(**volatile, text_config=text, use_cache=False))) == own
    attached = Tiny()
    attached.linear.add_module("petiole", nn.Linear(3, 3))
    attached.linear.register_parameter("petiole_gate", nn.Parameter(torch.ones(1)))
    attached.embedding.add_module("petiole_default", nn.Module())
    attached.embedding.petiole_default.own = attached.linear.weight  # type: ignore[assignment,union-attr]
    attached.get_buffer("scratch").add_(1)
    assert files.fingerprint(attached) == own
    nn.Module.train(attached, False).requires_grad_(False)
    assert files.fingerprint(attached) == own


def test_a_tied_tensor_is_left_out_under_either_name() -> None:
    trained = Tiny()
    with torch.no_grad():
        trained.head.weight.add_(1)
    for exclude in (["head.weight"], ["embedding.weight"]):
        own = files.fingerprint(trained, exclude)
        assert own["tensors"] == 7 and own == files.fingerprint(Tiny(), exclude)
    assert files.fingerprint(trained)["values"] != files.fingerprint(Tiny())["values"]


def test_a_fingerprint_on_the_meta_device_compares_names_and_shapes() -> None:
    own, meta = files.fingerprint(Tiny()), files.fingerprint(Tiny(device="meta"))
    assert meta["values"] is None
    assert files.same_backbone(own, meta) == [] and files.same_backbone(meta, own) == []
    assert files.same_backbone(meta, files.fingerprint(Tiny(tied=False)))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_fingerprint_of_odd_models() -> None:
    bare = nn.Linear(3, 4)
    assert files.fingerprint(bare)["config"] is None
    bare.config = {"a": {1: float("nan"), "b": {3, 1}}, "c": object(), "d": torch.float16}  # type: ignore[assignment]
    assert files.fingerprint(bare) == files.fingerprint(bare)
    bare.weight = nn.Parameter(torch.eye(4, 3).to_sparse(), requires_grad=False)
    bare.register_buffer("q", torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8))
    bare.register_buffer("z", torch.complex(torch.ones(5), torch.ones(5)).conj())
    bare.register_buffer("f", torch.ones(70, 70).to(torch.float8_e4m3fn).t())
    bare.register_buffer("e", torch.empty(0, 3))
    bare.register_buffer("n", None)
    assert files.fingerprint(bare) == files.fingerprint(bare) and files.fingerprint(bare)["tensors"] == 6
    before = files.fingerprint(bare)
    bare.get_buffer("f").view(torch.uint8)[0, 0] = 1
    assert files.fingerprint(bare) != before


def test_a_sample_has_at_most_64_values_and_leaves_the_first_column() -> None:
    for count in (0, 1, 63, 64, 65, 127, 128, 129, 4096, 12_345, 589_824):
        taken = len(files._sample(torch.zeros(count, dtype=torch.uint8)))
        assert taken == count if count <= 64 else 21 < taken <= 64
    rows = torch.arange(768).repeat(768, 1)
    assert len(set(files._sample(rows.to(torch.int16)))) > 30


def test_a_fingerprint_of_a_transformers_model() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def build(seed: int, **fields: Any) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        }
        return BertForSequenceClassification(BertConfig(**sizes, **fields))

    head = ["classifier.weight", "classifier.bias"]
    own = files.fingerprint(build(0, num_labels=2), head)
    eager = build(0, num_labels=2)
    eager.config._attn_implementation = "eager"  # type: ignore[union-attr]
    assert files.same_backbone(files.fingerprint(eager, head), own) == []
    more = build(0, num_labels=7)
    more.load_state_dict({k: v for k, v in build(0, num_labels=2).state_dict().items() if k not in head}, strict=False)
    assert files.same_backbone(files.fingerprint(more, head), own) == []  # the head is the adaptation's
    assert files.same_backbone(files.fingerprint(more), files.fingerprint(build(0, num_labels=2)))
    assert len(files.same_backbone(files.fingerprint(build(1, num_labels=2), head), own)) == 1
    assert "layer_norm_eps" in files.same_backbone(files.fingerprint(build(0, layer_norm_eps=1e-5), head), own)[0]
