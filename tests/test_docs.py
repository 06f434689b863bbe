"""Do README and docs say what is true of commands, options and code?

Every command is given to the parser that it would meet. Those that take seconds run, in a folder where the paths of the docs are,
and so does every Python block; fine-tuning takes a tiny model and two steps there.
"""

import argparse
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from datasets import Dataset
from datasets import Image as ImageFeature

import bit_mixup
from bit_mixup import cli
from bit_mixup.config import DistillConfig, DoctorConfig, PretrainConfig, TransferConfig
from bit_mixup.requests import Request
from bit_mixup.weights import find_weights

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FEW = {"steps": 2, "batch_size": 8, "crop_size": 40, "resize_size": 48, "threads": 1}
PROGRAMS = ("make", "bit-mixup", "accelerate", "torchrun", "python")
RECIPE_OF = {"fine_tune": TransferConfig, "pretrain": PretrainConfig, "distill": DistillConfig}


class ParsedError(Exception):
    """A parser was content. What it made of the words is the argument."""


@pytest.fixture
def parsers_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parsers work, and what comes after them does not."""
    parse, parse_typed = argparse.ArgumentParser.parse_args, tyro.cli

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        raise ParsedError(parse(self, *args, **options))

    def stop_typed(*args: Any, **options: Any) -> None:
        raise ParsedError(parse_typed(*args, **options))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(tyro, "cli", stop_typed)


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """The commands of all shell blocks, as page and words."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    yield page, words


def dry_run(words: list[str]) -> list[list[str]]:
    """What make would run, as words."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if line and not line.startswith((" ", "@", "awk"))]
    return [words for words in lines if Path(words[0]).name in PROGRAMS and words[1:2] != ["-m"] and words[1:2] != ["-c"]]


def parse(words: list[str]) -> Any:
    """What the parser that a command line would meet makes of it; None for commands without options."""
    program, *rest = Path(words[0]).name, *words[1:]
    if program == "accelerate":
        assert rest.pop(0) == "launch"
        parser = import_module("accelerate.commands.launch").launch_command_parser()
    elif program == "torchrun":
        parser = import_module("torch.distributed.run").get_args_parser()
    if program in ("accelerate", "torchrun"):
        try:
            parser.parse_args(rest)
        except ParsedError as launched:
            found = launched.args[0]
        return parse(["python", found.training_script, *found.training_script_args])
    try:
        if program == "bit-mixup":
            cli.main(rest)
            assert rest == ["models"]
            return None
        assert rest[0].startswith(("recipes/", "benchmarks/"))
        recipe(Path(rest[0]).stem, Path(rest[0]).parent.name).main(rest[1:])
    except ParsedError as done:
        return done.args[0]
    raise AssertionError(f"{words}: nothing was parsed")


def recipe(name: str, folder: str = "recipes") -> Any:
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module(name)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


LINES = [(page, words) for page, words in shell_lines() if words != [".", ".venv/bin/activate"]]


def test_shell_blocks_hold_commands() -> None:
    assert len(LINES) >= 40
    assert {page for page, _ in LINES} >= {"README.md", "docs/quick_start.md", "docs/your_data.md", "docs/upstream.md"}
    assert {words[0] for _, words in LINES} <= set(PROGRAMS)


@pytest.mark.usefixtures("parsers_stop")
def test_every_command_parses() -> None:
    for page, words in LINES:
        for line in dry_run(words[1:]) if words[0] == "make" else [words]:
            parsed = parse(line)
            assert parsed is not None or line[1:] == ["models"], f"{page}: {words}"


@pytest.mark.usefixtures("parsers_stop")
def test_every_make_target_expands_to_commands_that_parse() -> None:
    assert len(targets()) >= 15
    parsed = [(Path(words[0]).name, parse(words)) for words in dry_run(sorted(targets() - {"ci"}))]
    ours = [config for program, config in parsed if program == "bit-mixup"]
    assert len(ours) == 11, "fine-tune, the paper's five, plan, doctor, models, pretrain and distill"
    paper = [config for config in ours if isinstance(config, TransferConfig) and config.dataset != "digits"]
    assert len(paper) == 5
    for config in paper:
        assert config.model == "resnetv2_50x1_bit.goog_in21k"
        assert re.fullmatch(r"[\w-]+/[\w-]+", config.dataset)
        assert config.label_column
        assert config.image_column
    words = dry_run(["fine-tune", "NPROC=4", "ARGS=--seed 1"])[0]
    several = parse(words)
    assert isinstance(several, TransferConfig)
    assert (Path(words[0]).name, several.dataset, several.seed) == ("torchrun", "digits", 1)


def spans() -> Iterator[tuple[str, list[str]]]:
    """Commands between backticks, as page and words."""
    for page, text in PAGES.items():
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
            if span.split()[0] in PROGRAMS and len(span.split()) > 1 and page != "docs/api.md":
                yield page, span.split()


def test_commands_between_backticks_exist() -> None:
    known = set(re.findall(r"^  ([a-z-]+)   ", cli._USAGE, re.MULTILINE))
    for page, (program, *rest) in spans():
        if program == "bit-mixup":
            assert rest[0] in known | {"COMMAND"}, f"{page}: bit-mixup {' '.join(rest)}"
        elif program == "make":
            assert {word for word in rest if "=" not in word and "'" not in word and re.fullmatch(r"[a-z-]+", word)} <= targets()
        for script in re.findall(r"\b(?:recipes|benchmarks|tests)/[\w/.-]+\w", " ".join(rest)):
            assert (ROOT / script).exists(), f"{page}: {script}"


def options() -> set[str]:
    """Every option of ours: of configurations, of plan, of recipes and benchmarks."""
    kinds = [TransferConfig, PretrainConfig, DistillConfig, DoctorConfig, *Request.__subclasses__()]
    fields = {field for kind in kinds for field in dataclasses.fields(kind)}
    found = {f"--{field.name.replace('_', '-')}" for field in fields}
    found |= {f"--no-{field.name.replace('_', '-')}" for field in fields if field.type in ("bool", bool)}
    for path in [
        *(ROOT / "recipes").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "tests" / "soak.py",
        ROOT / "bit_mixup" / "cli.py",
    ]:
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"\"(--[a-z-]+)\"", text))
        found |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): .* = ", text, re.MULTILINE)}
    return found


OTHERS = {
    *("--standalone", "--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts"),
    *("--config_file", "--num_processes", "--cpu", "--nodes", "--dist", "--requeue", "--machine_rank", "--signal", "--help"),
    *("--num_machines", "--mixed_precision", "--local-addr", "--node-rank", "--main_process_ip", "--main_process_port"),
}


def test_options_in_the_text_exist() -> None:
    known = options() | OTHERS
    for page, text in PAGES.items():
        named = {
            option for span in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*\w", span)
        }
        assert named <= known, f"{page}: {sorted(named - known)}"


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), f"{page}: {target}"
    index = PAGES["docs/README.md"]
    for page in PAGES:
        assert not page.startswith("docs/") or page == "docs/README.md" or f"({Path(page).name})" in index


def test_the_reference_of_the_api_is_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe("make_api").main(["--output", str(tmp_path / "api.md")])
    assert (tmp_path / "api.md").read_text(encoding="utf-8") == PAGES["docs/api.md"], "run `make docs`"
    assert {name for name in bit_mixup.__all__ if f"### {name}\n" not in PAGES["docs/api.md"]} == set()


@pytest.fixture(scope="module")
def home(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the paths of the docs lead somewhere."""
    folder = tmp_path_factory.mktemp("docs")
    digits = bit_mixup.load_image_dataset("digits").train
    pictures, names = digits.read(range(40)), [("cat", "dog")[label % 2] for label in digits.labels[list(range(40))].tolist()]
    for place in ("path/to/folders", "path/to/class/folders", "path/to/other/folders"):
        for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            (folder / place / name).mkdir(parents=True, exist_ok=True)
            picture.save(folder / place / name / f"{index:03}.png")
    shutil.make_archive(str(folder / "path/to/folders"), "zip", folder / "path/to/folders")
    rows = [f"pictures/{index:03}.png,{name}" for index, name in enumerate(names)]
    for place in ("path/to", "path/to/table"):
        (folder / place / "pictures").mkdir(parents=True, exist_ok=True)
        (folder / place / "train.csv").write_text("picture,species\n" + "\n".join(rows) + "\n")
        for index, picture in enumerate(pictures):
            picture.save(folder / place / "pictures" / f"{index:03}.png")
    table = Dataset.from_dict({"image": pictures, "label": names}).cast_column("image", ImageFeature())
    table.save_to_disk(folder / "path/to/saved")
    (folder / "path/to/shards").mkdir()
    for place in ("path/to", "path/to/shards"):
        table.to_parquet(folder / place / "train.parquet")
    for name in ("one.jpg", "two.jpg"):
        pictures[0].save(folder / name)
    for seed, name in enumerate(("mine", "other")):
        some = {"dataset": str(folder / "path/to/folders"), "model": str(tiny_bit), "output_dir": folder / "runs" / name}
        bit_mixup.transfer(**some, **FEW, seed=0, base_lr=0.01 * (1 + seed))
    return folder


def short(words: list[str], tiny_bit: Path) -> list[str]:
    """A fine-tuning command with few steps and a tiny model in place of that which it names."""
    model = words.index("--model") if "--model" in words else None
    if model is not None:
        assert find_weights(words[model + 1])
        words = [*words[:model], *words[model + 2 :]]
    flags = [text for name, value in FEW.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, "--model", str(tiny_bit), "--overwrite", *flags]


RUN = [words for _, words in LINES if words[0] == "bit-mixup" and not {"pretrain", "distill"} & set(words)]
RUN = [
    list(words)
    for words in dict.fromkeys(map(tuple, RUN))
    if "models" in words or "path/to" in " ".join(words) or "runs/" in words[2]
]


@pytest.mark.parametrize("words", RUN, ids=lambda words: " ".join(words[1:]))
def test_short_commands_run(
    words: list[str], home: Path, tiny_bit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    command = short(words[1:], tiny_bit) if words[1] == "fine-tune" else words[1:]
    if "--output-dir" in command and "runs/mine" in command:  # what the other commands look at
        command[command.index("runs/mine")] = "runs/mine_too"
    cli.main(command)
    assert capsys.readouterr().out


def test_enough_commands_run() -> None:
    assert {words[1] for words in RUN} == {
        "plan",
        "doctor",
        "models",
        "fine-tune",
        "predict",
        "evaluate",
        "compare",
        "push",
        "export",
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/api.md" and blocks(page, "python")])
def test_python_blocks_run(page: str, home: Path, tiny_bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, as a reader would."""
    monkeypatch.chdir(home)
    real, real_pretrain = bit_mixup.transfer, bit_mixup.pretrain
    for folder in (home / "runs").glob("*"):
        if folder.name not in ("mine", "other"):
            shutil.rmtree(folder)

    def transfer(**asked: Any) -> Any:
        assert isinstance(asked["model"], Path) or find_weights(asked["model"])
        return real(**asked | FEW | {"model": str(tiny_bit)})

    def pretrain(**asked: Any) -> Any:
        assert asked.pop("epochs") > 1
        few = {name: value for name, value in FEW.items() if name != "resize_size"}
        return real_pretrain(**asked | few | {"model": str(tiny_bit)})

    monkeypatch.setattr(bit_mixup, "transfer", transfer, raising=False)
    monkeypatch.setattr(bit_mixup, "pretrain", pretrain, raising=False)
    arrays = {"images": np.zeros((12, 8, 8, 3), np.uint8), "labels": np.arange(12) % 3, "names": ["a", "b", "c"]}
    there: dict[str, Any] = {"bit_mixup": bit_mixup, **arrays}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), there)
