"""Does everything that the hub can do to a download end in the right files, or in one message that says what to do?

The real clients talk to a stand-in on the loopback device, through the command line. Only their clock is replaced: it notes how
long they would have waited.
"""

import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
import timm
import torch
from conftest import TESTS
from datasets import ClassLabel, Dataset, Features, Image
from hub import Fault, Files, LoopbackHub
from PIL import Image as Pillow

from bit_mixup import load_image_dataset
from bit_mixup.cli import main
from bit_mixup.errors import DataError
from bit_mixup.models import load_bit
from bit_mixup.weights import fetch, find_weights

CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
IMAGES = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
QUICK = "--steps 4 --batch-size 16 --resize-size 48 --crop-size 40 --no-flip --threads 1".split()
AFTER_A_MINUTE = {"ratelimit": '"resolvers";r=0;t=59'}
EVER = -1


@pytest.fixture(autouse=True)
def asked(hub: LoopbackHub) -> Iterator[list[tuple[str, str]]]:
    """What is asked of the hub during a test, never a pickle; the hub is well before and after."""
    hub.requests.clear()
    yield hub.requests
    hub.faults.clear()
    assert not [path for _, path in hub.requests if re.search(r"\.(bin|pt|pth|pkl|ckpt)\b", path)]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited before it tried again."""
    seconds: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": seconds.append})
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", clock)
    return seconds


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Does what HF_HUB_OFFLINE=1 does, which the libraries read when they are imported."""

    def go() -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    return go


@pytest.fixture(scope="session")
def model_files(tiny_bit: Path) -> Files:
    return {name: tiny_bit / name for name in (CONFIG, WEIGHTS)} | {PICKLE: b"\x80\x04 and what follows"}


@pytest.fixture(scope="session")
def data_files() -> Files:
    """Two classes of one-coloured pictures, 8 and 4 of them."""
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    files: dict[str, bytes | Path] = {}
    for name, count in ((TRAIN, 8), (TEST, 4)):
        pictures = []
        for number in range(count):
            png = io.BytesIO()
            Pillow.new("L", (8, 8), 200 * (number % 2) + number).save(png, "png")
            pictures.append({"bytes": png.getvalue(), "path": None})
        table = io.BytesIO()
        Dataset.from_dict({"image": pictures, "label": [0, 1] * (count // 2)}, features=features).to_parquet(table)
        files[name] = table.getvalue()
    return files


class Door:
    """`bit-mixup fine-tune`, which is to refuse before anything is trained or written."""

    def __init__(self, run: Path, tiny_bit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.tiny_bit, self.capsys, self.monkeypatch = run, tiny_bit, capsys, monkeypatch

    def refusal(self, *flags: str) -> tuple[str, list[str]]:
        """The complaint, and the lines that were said before it."""
        # The client's handler of warnings holds the stderr of its import.
        self.monkeypatch.setattr(logging.getLogger("huggingface_hub").handlers[0], "stream", sys.stderr)
        given = {"--dataset": "digits", "--model": str(self.tiny_bit), "--output-dir": str(self.run)}
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        with pytest.raises(SystemExit) as left:
            main(["fine-tune", *(word for pair in given.items() for word in pair), *QUICK])
        said = self.capsys.readouterr()
        assert left.value.code == 2
        assert said.out == "", "a plan is printed just before training starts"
        assert not self.run.exists()
        before, _, complaint = said.err.partition("bit-mixup: error: ")
        assert complaint == f"{left.value.__cause__}\n"
        return complaint.strip(), before.splitlines()


@pytest.fixture
def door(tmp_path: Path, tiny_bit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Door:
    return Door(tmp_path / "run", tiny_bit, capsys, monkeypatch)


@dataclass(frozen=True)
class Case:
    """What goes wrong, what is said, and how often and after which waits the client asks."""

    fault: Fault | None
    message: str
    asked: int
    waits: list[float] = field(default_factory=list)
    flags: tuple[str, ...] = ()

    def on(self, hub: LoopbackHub) -> None:
        hub.faults[:] = [replace(self.fault)] if self.fault else []


def answer(status: int, asked: str = "HEAD", times: int = EVER, **headers: str) -> Fault:
    return Fault(asked, times, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})


# --- weights ---------------------------------------------------------------------------------------------------------

BACKOFF = [1, 2, 4, 8, 8]
WEIGHTS_CASES = {
    "gated, nobody logged in": Case(
        answer(401, X_Error_Code="GatedRepo"),
        r"gated \(401 Unauthorized\). Accept its terms .*, then log in \(`hf auth login`\)",
        1,
    ),
    "gated, not admitted": Case(
        answer(403, X_Error_Code="GatedRepo", X_Error_Message="awaiting a review"),
        r"gated \(403 Forbidden, awaiting a review\). Accept its terms on its page on the hub\.$",
        1,
    ),
    "forbidden": Case(answer(403), r"the hub forbids it \(403 Forbidden\). Check .* token may read this \(`hf auth whoami`\)", 1),
    "token refused": Case(answer(401), r"does not accept your token \(401 Unauthorized\). Log in anew", 1),
    "no repository": Case(
        answer(404, X_Error_Code="RepoNotFound"), "no such repository, or it is private and you are not logged in", 1
    ),
    "no revision": Case(None, "v9: the hub has no such revision. Give a branch, tag or commit", 1, flags=("--revision", "v9")),
    "no file": Case(
        answer(404, "HEAD .*safetensors", X_Error_Code="EntryNotFound"), "no such file. Only safetensors .* never pickles", 3
    ),
    "404 and no more": Case(answer(404), r"the hub refuses it \(404 Not Found\). Check the name", 1),
    "what is no hub": Case(answer(200), "what answers is not a hub. Check HF_ENDPOINT, the proxy", 1),
    "limited for long": Case(answer(429), r"limits how often you may ask \(429 .*\). Start again in a few minutes", 7, BACKOFF),
    "limited for a minute": Case(answer(429, **AFTER_A_MINUTE), "Start again in 59 s; it allows more to those who", 7, [60] * 5),
    "limited, content": Case(answer(429, f"GET .*{WEIGHTS}", Retry_After="7"), "Start again in 7 s", 9, [8] * 5),
    "busy for long": Case(answer(503), r"busy or down \(503 .*\). Nothing is wrong on your side: start again in a", 7, BACKOFF),
    "busy, content": Case(answer(503, f"GET .*{WEIGHTS}"), r"busy or down \(503", 4),
    "no answer": Case(Fault("HEAD", EVER, cut=-1), "the connection broke off .*Start again", 1),
    "cut each time": Case(
        Fault(f"GET .*{WEIGHTS}", EVER, cut=999), r"broke off .*\(received 999 bytes.* Start again", 9, [1] * 5
    ),
    "other size": Case(Fault(f"GET .*{WEIGHTS}", body=b"short"), "should be of size .* but has size 5 .*Nothing was kept", 4),
}


@pytest.mark.parametrize("name", WEIGHTS_CASES)
def test_weights_that_can_not_be_had(name: str, hub: LoopbackHub, door: Door, waits: list[float], model_files: Files) -> None:
    case, repository = WEIGHTS_CASES[name], f"weights/{name.replace(' ', '-').replace(',', '')}"
    hub.add_model(repository, model_files)
    case.on(hub)
    complaint, before = door.refusal("--model", repository, *case.flags)
    assert re.match(rf"(config\.json|model\.safetensors) of {repository}.*: ", complaint)
    assert re.search(case.message, complaint), complaint
    assert "can not be reached" not in complaint, "somebody answered"
    assert (len(hub.requests), waits) == (case.asked, case.waits)
    waiting = [line for line in before if re.search(r"Retrying in|Waiting .* before retry|Trying to resume", line)]
    assert len(waiting) == len(waits), "each wait is announced"


def test_each_wait_is_announced_with_its_reason(hub: LoopbackHub, door: Door, model_files: Files) -> None:
    hub.add_model("weights/announced", model_files)
    hub.faults[:] = [answer(503)]
    _, before = door.refusal("--model", "weights/announced")
    reason = f"HTTP Error 503 thrown while requesting HEAD {hub.url}/weights/announced/resolve/main/config.json"
    waiting = [f"Retrying in {seconds}s [Retry {number}/5]." for number, seconds in enumerate(BACKOFF, start=1)]
    assert before == [*(line for wait in waiting for line in (reason, wait)), reason]


RECOVERIES = {
    "busy once": (answer(503, times=1), []),
    "busy for a while": (answer(503, times=3), [1, 2]),
    "limited for a while": (answer(429, f"GET .*{WEIGHTS}", times=2, Retry_After="3"), [4, 4]),
    "cut once": (Fault(f"GET .*{WEIGHTS}", cut=60_000), [1]),
    "cut thrice": (Fault(f"GET .*{WEIGHTS}", times=3, cut=60_000), [1, 1, 1]),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", RECOVERIES)
def test_weights_are_whole_after_a_passing_fault(
    name: str,
    large: bool,
    hub: LoopbackHub,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tiny_bit: Path,
    model_files: Files,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # a cut file is resumed at whole chunks
    repository = f"recovered/{name.replace(' ', '-')}-{large}"
    hub.add_model(repository, model_files, large=large)
    fault, expected = RECOVERIES[name]
    hub.faults[:] = [replace(fault)]
    fetched = fetch(find_weights(repository))
    assert waits == expected
    assert fetched.file is not None
    assert fetched.file.read_bytes() == (tiny_bit / WEIGHTS).read_bytes()
    assert bool([path for _, path in hub.requests if path.startswith("/elsewhere/")]) == large


@pytest.mark.parametrize(("name", "large"), [(CONFIG, False), (WEIGHTS, False), (WEIGHTS, True)])
def test_wrong_bytes_are_found_and_fetched_anew(name: str, large: bool, hub: LoopbackHub, door: Door, tiny_bit: Path) -> None:
    content = (tiny_bit / name).read_bytes()
    changed = content.replace(b"0", b"1", 1) if name == CONFIG else content[:-1] + bytes([content[-1] ^ 1])
    assert len(changed) == len(content), "the client compares the size"
    repository = f"wrong/{name.split('.')[0]}-{large}"
    hub.add_model(repository, {file: tiny_bit / file for file in (CONFIG, WEIGHTS)}, large=large)
    hub.faults[:] = [Fault(f"GET .*{name}", body=changed)]
    complaint, _ = door.refusal("--model", repository)
    kind, length = ("SHA-256", 64) if large else ("git SHA-1", 40)
    digests = re.search(rf"^{name} of {repository}: its {kind} is (\w+), but the hub published (\w+): .* start again", complaint)
    assert digests
    assert [len(digest) for digest in digests.groups()] == [length, length]
    assert digests[1] != digests[2]
    hub.requests.clear()
    again = fetch(find_weights(repository))
    assert again.file is not None
    assert again.file.with_name(name).read_bytes() == content
    assert [path.split("/")[-1] for method, path in hub.requests if method == "GET"] == [CONFIG, WEIGHTS][
        [CONFIG, WEIGHTS].index(name) :
    ]


@pytest.mark.parametrize("online", [True, False])
def test_what_a_disk_spoiled_is_found(
    online: bool, hub: LoopbackHub, door: Door, go_offline: Callable[[], None], model_files: Files, tiny_bit: Path
) -> None:
    repository = f"spoiled/{online}"
    hub.add_model(repository, model_files, large=True)
    file = fetch(find_weights(repository)).file
    assert file is not None
    content = file.resolve()
    content.write_bytes(content.read_bytes()[:-1000])
    if not online:
        go_offline()
    complaint, _ = door.refusal("--model", repository)
    assert re.search("its SHA-256 is .* It was taken out of the cache: start again to fetch it anew", complaint)
    assert not file.exists()
    assert not content.exists()
    if online:
        assert fetch(find_weights(repository)).file == file
        assert file.read_bytes() == (tiny_bit / WEIGHTS).read_bytes()
    else:
        assert "HF_HUB_OFFLINE forbids to fetch it" in door.refusal("--model", repository)[0]


def test_what_can_not_be_taken_out_of_the_cache_is_named(
    hub: LoopbackHub, door: Door, monkeypatch: pytest.MonkeyPatch, model_files: Files
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(path)

    hub.add_model("spoiled/read-only", model_files)
    file = fetch(find_weights("spoiled/read-only")).file
    assert file is not None
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(Path, "unlink", refuse)
    complaint, _ = door.refusal("--model", "spoiled/read-only")
    assert complaint.endswith(f"Remove {file.resolve()} and start again to fetch it anew.")


WITHOUT_THE_HUB = ["stopped", "offline", "503", "403"]


@pytest.mark.parametrize("why", WITHOUT_THE_HUB)
def test_a_warm_cache_needs_no_hub(
    why: str, hub: LoopbackHub, waits: list[float], go_offline: Callable[[], None], model_files: Files
) -> None:
    repository = f"warm/{why}"
    hub.add_model(repository, model_files)
    expected = load_bit(repository, keep_head=True)(IMAGES)
    hub.requests.clear()
    if why == "stopped":
        with hub.stopped():
            found = load_bit(repository, keep_head=True)
    else:
        if why == "offline":
            go_offline()
        hub.faults[:] = [] if why == "offline" else [answer(int(why), ".")]
        found = load_bit(repository, keep_head=True)
    assert torch.equal(found(IMAGES), expected)
    assert (len(hub.requests), waits) == (0 if why in ("stopped", "offline") else 2, [])


@pytest.mark.parametrize("why", ["stopped", "offline"])
def test_a_cold_cache_needs_one(
    why: str, hub: LoopbackHub, door: Door, waits: list[float], go_offline: Callable[[], None]
) -> None:
    name = "resnetv2_50x3_bit.goog_in21k"
    if why == "offline":
        go_offline()
        complaint, _ = door.refusal("--model", name)
        assert re.search(
            "not in the local cache, and HF_HUB_OFFLINE forbids to fetch it. Unset that once, or .*--model bundled", complaint
        )
        assert waits == []
    else:
        with hub.stopped():
            complaint, before = door.refusal("--model", name)
        assert re.search(
            "not in the local cache, and the hub can not be reached .*refused.* Go online .*--model bundled", complaint
        )
        assert waits == BACKOFF
        assert [line for line in before if "refused" in line]
    assert complaint.startswith(f"model.safetensors of timm/{name}: ")
    assert hub.requests == []


def test_a_pickle_beside_safetensors_or_alone_is_never_asked_for(hub: LoopbackHub, door: Door, model_files: Files) -> None:
    hub.add_model("pickled/both", model_files)
    assert PICKLE in model_files
    load_bit("pickled/both", keep_head=True)
    assert {path.split("/")[-1] for _, path in hub.requests} == {CONFIG, WEIGHTS}
    for alone, first in (({PICKLE: b"\x80"}, CONFIG), ({PICKLE: b"\x80", CONFIG: model_files[CONFIG]}, WEIGHTS)):
        hub.add_model(f"pickled/alone-{len(alone)}", alone)
        complaint, _ = door.refusal("--model", f"pickled/alone-{len(alone)}")
        assert complaint == (
            f"{first} of pickled/alone-{len(alone)}: the repository has no such file. Only safetensors in timm's hub layout are "
            "read, never pickles."
        )


def test_a_mistyped_folder_of_weights_is_told(
    hub: LoopbackHub, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    complaint, _ = door.refusal("--model", "runs/digts")
    assert complaint.startswith('config.json of runs/digts (did you mean "runs/digits"?): the hub has no such repository')


def test_an_id_that_the_client_refuses(hub: LoopbackHub, door: Door) -> None:
    complaint, _ = door.refusal("--model", "some/na..me")
    assert re.match(r"config\.json of some/na\.\.me: it can not be fetched: Cannot have -- or \.\. in repo_id", complaint)
    assert hub.requests == []


@torch.no_grad()
def test_timm_loads_from_the_hub_what_was_saved_here(hub: LoopbackHub, model_files: Files, tiny_bit: Path) -> None:
    hub.add_model("published/tiny", model_files, large=True)
    theirs = timm.create_model("hf-hub:published/tiny", pretrained=True).eval()
    assert torch.equal(theirs(IMAGES), load_bit(str(tiny_bit), keep_head=True).eval()(IMAGES))


# --- data sets -------------------------------------------------------------------------------------------------------

CARD = b"""---
configs:
- {config_name: small, data_files: [{split: train, path: data/test-*}]}
- {config_name: whole, data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]}
---
"""
INFO, TREE = r"GET /api/datasets/[\w-]+/[\w-]+(/revision/\w+)?$", "GET /api/.*/tree/"
DATA_CASES = {
    "gated, nobody logged in": Case(
        answer(401, X_Error_Code="GatedRepo"), "is a gated dataset.*must be authenticated.*auth login", 1
    ),
    "gated, not admitted": Case(answer(403, X_Error_Code="GatedRepo"), "is a gated dataset.* to ask for access", 1),
    "no repository": Case(
        answer(404, X_Error_Code="RepoNotFound"), "no such file or folder here, and the hub says: .* doesn't exist", 1
    ),
    "no revision": Case(None, "Revision 'v9' doesn't exist .*Check id and revision", 1, flags=("--dataset-revision", "v9")),
    "forbidden card": Case(answer(403), r"the hub forbids it \(403 Forbidden\). Check", 1),
    "forbidden info": Case(answer(403, INFO), r"the hub forbids it \(403 Forbidden\). Check", 2),
    "token refused": Case(answer(401), r"does not accept your token \(401", 1),
    "limited, card": Case(answer(429, Retry_After="9"), r"limits how often .* Start again in 9 s", 7, [10] * 5),
    "limited, info": Case(
        answer(429, INFO, Retry_After="30"), r"limits how often you may ask \(429 .*\). Start again in 30 s", 2
    ),
    "limited, content": Case(answer(429, f"GET .*{TRAIN}", **AFTER_A_MINUTE), "Start again in 59 s", 16, [60] * 5),
    "busy, card": Case(answer(503), r"busy or down \(503 .*start again in a few minutes", 7, BACKOFF),
    "busy, info": Case(answer(500, INFO), r"busy or down \(500 .*start again in a few minutes", 2),
    "busy, list of files": Case(answer(502, TREE), r"busy or down \(502", 12, BACKOFF),
    "busy, file": Case(answer(504, f"HEAD .*{TRAIN}"), r"busy or down \(504", 16, BACKOFF),
    "busy, content": Case(answer(503, f"GET .*{TRAIN}"), r"busy or down \(503", 11),
    "no answer": Case(Fault(INFO, EVER, cut=-1), "the connection broke off .*Start again", 2),
    "cut each time": Case(Fault(f"GET .*{TRAIN}", EVER, cut=99), r"broke off .*\(received 99 bytes", 16, [1] * 5),
    "other size": Case(Fault(f"GET .*{TRAIN}", body=b"short"), "should be of size .* but has size 5 .*Nothing was kept", 11),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_data_that_can_not_be_had(name: str, hub: LoopbackHub, door: Door, waits: list[float], data_files: Files) -> None:
    case, repository = DATA_CASES[name], f"data/{name.replace(' ', '-').replace(',', '')}"
    hub.add_dataset(repository, data_files)
    case.on(hub)
    complaint, before = door.refusal("--dataset", repository, *case.flags)
    assert complaint.startswith(f'data set "{repository}": no such file or folder here, and ')
    assert re.search(case.message, complaint), complaint
    assert "can not be reached" not in complaint, "somebody answered"
    assert (len(hub.requests), waits) == (case.asked, case.waits)
    waiting = [line for line in before if re.search(r"Retrying in|Waiting .* before retry|Trying to resume", line)]
    assert len(waiting) == len(waits), "each wait is announced"


PROGRAM = "raise SystemExit('it ran')"
UNFIT = {
    "several configurations": (
        {"README.md": CARD},
        (),
        r"available configs: \['small', 'whole'\]. Give one of these as dataset_config",
    ),
    "unknown configuration": (
        {"README.md": CARD},
        ("--dataset-config", "hole"),
        r"'hole' not found. Available: \['small', 'whole'\].",
    ),
    "no configurations": ({}, ("--dataset-config", "hole"), r"'hole' not found. Available: \['default'\]."),
    "empty": (
        {TRAIN: None, TEST: None, "README.md": b"soon"},
        (),
        "the one on the hub holds no data files: .* give a local path",
    ),
    "program": ({"program.py": PROGRAM.encode()}, (), r"a program, and programs of others are never run: .*refs/convert/parquet"),
    "published damaged": ({TRAIN: b"PAR1 and no more"}, (), "the one on the hub can not be read: ArrowInvalid: .*Parquet magic"),
    "test split damaged": ({TEST: b"PAR1 and no more"}, (), "the one on the hub can not be read: ArrowInvalid: .*Parquet magic"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_data_that_can_not_be_used(name: str, hub: LoopbackHub, door: Door, data_files: Files) -> None:
    changes, flags, message = UNFIT[name]
    repository = f"unfit/{name.replace(' ', '-')}"
    files = {file: content for file, content in {**data_files, **changes}.items() if content is not None}
    hub.add_dataset(repository, files)
    complaint, _ = door.refusal("--dataset", repository, *flags)
    assert re.match(rf'data set "{repository}": .*{message}', complaint), complaint


def test_a_configuration_and_a_repository_of_large_files_load(hub: LoopbackHub, data_files: Files) -> None:
    hub.add_dataset("loaded/configured", {**data_files, "README.md": CARD}, large=True)
    small, whole = (load_image_dataset("loaded/configured", config=config) for config in ("small", "whole"))
    assert (len(small.train) + len(small.test), len(whole.train), len(whole.test)) == (4, 8, 4)
    assert [path for _, path in hub.requests if path.startswith("/elsewhere/")]


DATA_RECOVERIES = {
    "busy once": (answer(503, times=1), []),
    "list of files busy": (answer(503, TREE, times=2), [1, 2]),
    "limited for a while": (answer(429, f"GET .*{TRAIN}", times=1, Retry_After="3"), [4]),
    "cut once": (Fault(f"GET .*{TRAIN}", cut=200), [1]),
}


@pytest.mark.parametrize("name", DATA_RECOVERIES)
def test_data_are_whole_after_a_passing_fault(name: str, hub: LoopbackHub, waits: list[float], data_files: Files) -> None:
    repository = f"recovered/{name.replace(' ', '-')}"
    hub.add_dataset(repository, data_files, large=name == "cut once")
    fault, expected = DATA_RECOVERIES[name]
    hub.faults[:] = [replace(fault)]
    data = load_image_dataset(repository)
    assert waits == expected
    assert data.train.labels.tolist() == [0, 1] * 4
    assert [len(part.encoded([0])) for part in (data.train, data.test)] == [1, 1]


@pytest.mark.parametrize("large", [False, True])
def test_wrong_bytes_of_data_are_found_before_they_are_read(large: bool, hub: LoopbackHub, door: Door, data_files: Files) -> None:
    table = data_files[TEST]
    assert isinstance(table, bytes)
    at = table.index(b"IDAT") + 8
    changed = table[:at] + bytes([table[at] ^ 1]) + table[at + 1 :]  # a pixel's bytes: the table is still read without complaint
    repository = f"wrong/data-{large}"
    hub.add_dataset(repository, data_files, large=large)
    hub.faults[:] = [Fault(f"GET .*{TEST}", body=changed)]
    complaint, _ = door.refusal("--dataset", repository)
    kind = "SHA-256" if large else "git SHA-1"
    assert re.match(rf"{repository}@b{{40}}/{TEST}: its {kind} is \w+, but the hub published \w+: .* start again", complaint), (
        complaint
    )
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).glob(f"wrong___data-{str(large).lower()}*/**/*.arrow"))
    hub.requests.clear()
    data = load_image_dataset(repository)
    assert [path for method, path in hub.requests if method == "GET" and TRAIN in path] == [], "the whole file was kept"
    assert (len(data.train), len(data.test)) == (8, 4)


@pytest.mark.parametrize("why", WITHOUT_THE_HUB)
def test_warm_data_need_no_hub(
    why: str, hub: LoopbackHub, waits: list[float], go_offline: Callable[[], None], data_files: Files
) -> None:
    repository, old, new = f"warm/data-{why}", "1" * 40, "2" * 40
    hub.add_dataset(repository, data_files, old)
    load_image_dataset(repository)
    hub.add_dataset(repository, {**data_files, TRAIN: data_files[TEST]}, new)
    newest = load_image_dataset(repository)
    hub.requests.clear()
    if why == "stopped":
        with hub.stopped():
            found = load_image_dataset(repository)
    else:
        if why == "offline":
            go_offline()
        hub.faults[:] = [] if why == "offline" else [answer(int(why), ".")]
        found = load_image_dataset(repository)
        if why == "offline":
            with pytest.raises(DataError, match=rf'dataset_revision "{old}", and the local cache holds commit {new}. Go online'):
                load_image_dataset(repository, revision=old)
            assert load_image_dataset(repository, revision=new).revision == new
            assert hub.requests == []
    assert (found.revision, found.fingerprint) == (new, newest.fingerprint)


@pytest.mark.parametrize("why", ["stopped", "offline"])
def test_cold_data_need_one(why: str, hub: LoopbackHub, door: Door, waits: list[float], go_offline: Callable[[], None]) -> None:
    if why == "offline":
        go_offline()
        complaint, _ = door.refusal("--dataset", "cold/data")
        assert "can not be reached, as HF_HUB_OFFLINE is set (" in complaint
        assert waits == []
    else:
        with hub.stopped():
            complaint, before = door.refusal("--dataset", "cold/data")
        assert "can not be reached (" in complaint
        assert waits == BACKOFF
        assert [line for line in before if "refused" in line]
    assert re.match(
        'data set "cold/data": no such file or folder here, and it is not in the local cache and .*Go online once, or give',
        complaint,
    )
    assert hub.requests == []


def test_a_mistyped_path_of_data_is_told(hub: LoopbackHub, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, meant in (("pictures/trian", "pictures/train"), ("picturs", "pictures"), ("digts", "digits")):
        complaint, _ = door.refusal("--dataset", name)
        start = f'data set "{name}": no such file or folder here (did you mean "{meant}"?), and the hub says: '
        assert complaint.startswith(start)


# --- both ------------------------------------------------------------------------------------------------------------


def test_a_whole_run_from_the_hub(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_files: Files, data_files: Files
) -> None:
    hub.add_model("whole/model", model_files, commit="3" * 40, large=True)
    hub.add_dataset("whole/data", data_files, commit="4" * 40, large=True)
    main(["fine-tune", "--dataset", "whole/data", "--model", "whole/model", "--output-dir", str(tmp_path / "run"), *QUICK])
    assert (tmp_path / "run" / "report.json").is_file()
    plan = (tmp_path / "run" / "plan.json").read_text()
    assert "3" * 40 in plan
    assert "4" * 40 in plan


def test_no_code_of_others_and_no_pickle_is_let_in() -> None:
    files = [*(TESTS.parent / "bit_mixup").glob("*.py"), *(TESTS.parent / "recipes").glob("*.py")]
    assert len(files) > 40
    for file in files:
        loads = re.findall(r"trust_remote_code|allow_pickle=True|torch\.load\(|torch\.hub|import pickle", file.read_text("utf-8"))
        assert not loads, f"{file.name}: {loads}"
