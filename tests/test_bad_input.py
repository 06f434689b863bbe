"""What does each kind of bad input get: its one clear message, before training, with nothing written?

Each row of the table reaches a raise of its own, which a test counts; `SAME_RAISE` holds further inputs that share one.
"""

import contextlib
import io
import json
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fine_tune
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

import bit_mixup
from bit_mixup.cli import main
from bit_mixup.errors import BitMixupError, CheckpointError, ConfigError, DataError, WeightsError

PACKAGE = Path(bit_mixup.__file__).parent
PNG = io.BytesIO()
Pillow.new("RGB", (8, 8), "red").save(PNG, "png")


SHORT = {
    "steps": 4,
    "batch_size": 16,
    "resize_size": 48,
    "crop_size": 40,
    "threads": 1,
}  # so that an input taken for good is soon done


class Place:
    """An empty folder to prepare a bad input in, with a tiny model beside it."""

    def __init__(self, root: Path, tiny_bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.tiny_bit, self.setenv = root, tiny_bit, monkeypatch.setenv
        self.run = root / "run"

    def file(self, name: str, content: bytes | str = b"") -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def pictures(self, *names: str) -> str:
        """A folder of pictures by relative name."""
        for name in names:
            self.file(f"pictures/{name}", PNG.getvalue())
        return str(self.root / "pictures")

    def csv(self, header: str, *rows: str) -> str:
        """A csv file beside the pictures 0.png to 3.png."""
        self.pictures(*(f"{number}.png" for number in range(4)))
        return self.file("pictures/rows.csv", "\n".join([header, *rows]))

    def model(self, **changes: Any) -> Path:
        """A copy of the tiny model, with changes to its configuration."""
        folder = Path(shutil.copytree(self.tiny_bit, self.root / "model"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    def earlier_run(self, **changes: Any) -> dict[str, Any]:
        """Options of a run whose folder holds its configuration already."""
        options = {"dataset": "digits", "model": str(self.tiny_bit), "output_dir": self.run, **changes}
        asked = bit_mixup.TransferConfig(**options).as_json()
        self.file("run/config.json", json.dumps(asked))
        return options


def rows(labels: list[Any], feature: Any = None, *, test: list[Any] | None = None, test_feature: Any = None) -> Any:
    """A data set in memory of one-coloured pictures with these labels."""

    def split(values: list[Any], kind: Any) -> Dataset:
        features = Features({"image": Image(), "label": kind or Value("string" if isinstance(values[0], str) else "int64")})
        pictures = [{"bytes": PNG.getvalue(), "path": None}] * len(values)
        return Dataset.from_dict({"image": pictures, "label": values}, features=features)

    if test is None:
        return split(labels, feature)
    return DatasetDict(train=split(labels, feature), test=split(test, test_feature or feature))


# Keywords of `bit_mixup.transfer`, or the arguments of `bit-mixup`, or of the recipe where they start so.
Prepare = Callable[[Place], dict[str, Any] | list[str]]
# The class of the error, what its message says (the culprit, then the remedy), and the input.
Case = tuple[type[BitMixupError], str, Prepare]


def asks(**options: Any) -> Callable[[Place], dict[str, Any]]:
    """The digits and the tiny model with these options."""
    return lambda place: options


def launched(variable: str, value: str, **options: Any) -> Callable[[Place], dict[str, Any]]:
    def prepare(place: Place) -> dict[str, Any]:
        place.setenv(variable, value)
        return options

    return prepare


def flags(line: str) -> Callable[[Place], list[str]]:
    """A command line with {model} and {run} filled in."""
    return lambda place: line.format(model=place.tiny_bit, run=place.run).split()


def broken_weights(place: Place) -> dict[str, Any]:
    file = place.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return {"model": place.file("cut.safetensors", file.read_bytes())}


def wrong_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], dict[str, Any]]:
    def prepare(place: Place) -> dict[str, Any]:
        file = place.model() / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)
        return {"model": str(file.parent)}

    return prepare


def npz(name: str, array: Any) -> Callable[[Place], dict[str, Any]]:
    def prepare(place: Place) -> dict[str, Any]:
        np.savez(place.root / "weights.npz", **{name: array})
        return {"model": str(place.root / "weights.npz")}

    return prepare


def broken_picture(name: str) -> Callable[[Place], dict[str, Any]]:
    def prepare(place: Place) -> dict[str, Any]:
        folder = place.pictures("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png")
        place.file(f"pictures/{name}", b"no picture")
        return {"dataset": folder}

    return prepare


def mangled_names(place: Place) -> dict[str, Any]:
    """A parquet file whose text is not UTF-8, which shows only where it is read."""
    names = pa.array([b"\xff.png"] * 4).view(pa.string())
    pictures = pa.StructArray.from_arrays([pa.array([PNG.getvalue()] * 4), names], names=["bytes", "path"])
    pq.write_table(pa.table({"image": pictures, "label": [0, 1, 0, 1]}), place.root / "rows.parquet")
    return {"dataset": str(place.root / "rows.parquet")}


def class_of_the_test_folder(place: Place) -> dict[str, Any]:
    names = ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dogs/1.png")
    return {"dataset": place.pictures(*names)}


def empty_class(place: Place) -> dict[str, Any]:
    folder = place.pictures("cat/1.png", "dog/1.png")
    Path(folder, "eel").mkdir()
    return {"dataset": folder}


def empty_folder(place: Place) -> dict[str, Any]:
    Path(place.root, "nothing").mkdir()
    return {"dataset": str(place.root / "nothing")}


def foreign_folder(place: Place) -> dict[str, Any]:
    place.file("run/thesis.tex", "years of work")
    return {"output_dir": place.run, "overwrite": True}


def resumed_otherwise(place: Place) -> dict[str, Any]:
    return place.earlier_run(steps=7) | {"steps": 8, "resume": True}


def resumed_on_other_data(place: Place) -> dict[str, Any]:
    options = place.earlier_run(dataset=place.pictures("a/1.png", "a/2.png", "b/1.png", "b/2.png"), **SHORT)
    place.file("run/plan.json", json.dumps({"resolved": {"data": {"train_examples": 3}}}))
    place.file("run/checkpoints/step_000002/state.json", "{}")
    return options | {"resume": True}


def resumed_from_nonsense(place: Place) -> dict[str, Any]:
    place.file("run/config.json", "{")
    return {"resume": True}


def saved_config(content: str) -> Callable[[Place], list[str]]:
    return lambda place: ["fine-tune", "--config", place.file("config.json", content), "--output-dir", str(place.run)]


TWO, NAMED = [0, 1, 0, 1], ClassLabel(names=["cat", "dog"])
OTHER_COLOURS = {"label_names": list("0123456789"), "num_classes": 10, "pretrained_cfg": {"mean": [0.4] * 3, "std": [0.5] * 3}}
CASES: dict[str, Case] = {
    # options
    "unknown option": (ConfigError, 'no option "stepz".*did you mean "steps".*fine-tune --help', asks(stepz=3)),
    "no data set": (ConfigError, "no data set was named.*Give dataset", saved_config('{"steps": 3}')),
    "unknown preset": (ConfigError, 'preset "papper".*did you mean "paper".*code, paper, light', asks(preset="papper")),
    "wrong type": (ConfigError, "steps is '10'.*expected .*int", asks(steps="10")),
    "too large a batch": (ConfigError, "batch_size is out of all proportion.*above 1,048,576", asks(batch_size=10**400)),
    "a zero byte": (ConfigError, r"output_dir is .*\\x00.*zero byte", asks(output_dir=Path("a\0b"))),
    "negative steps": (ConfigError, "steps is -5.*at least 1", flags("recipe --dataset digits --steps -5")),
    "negative seed": (ConfigError, "seed is -1.*0 or a positive", asks(seed=-1)),
    "std_eps of 0": (ConfigError, "std_eps is 0.0.*such as 1e-8", asks(std_eps=0.0)),
    "two resolutions": (ConfigError, "resolution model.*one or the other", asks(resolution="model", crop_size=32)),
    "negative rate": (
        ConfigError,
        "base_lr is -0.1.*above 0",
        flags("fine-tune --dataset digits --model {model} --base-lr -0.1 --output-dir {run}"),
    ),
    "no batch": (ConfigError, "batch_size is 0.*at least 1", asks(batch_size=0)),
    "crop above resize": (ConfigError, "crop_size 40 is larger.*Lower crop_size", asks(crop_size=40, resize_size=32)),
    "long warm-up": (ConfigError, "warmup_steps is 9.*between 0 and steps 4", asks(warmup_steps=9)),
    "falling decays": (ConfigError, r"decay_steps \(3, 2\).*rising order", asks(decay_steps=(3, 2))),
    "momentum of 1": (ConfigError, "momentum is 1.0.*below 1", asks(momentum=1.0)),
    "negative weight decay": (ConfigError, "weight_decay is -1.0.*0 or a positive", asks(weight_decay=-1.0)),
    "negative alpha": (ConfigError, "mixup_alpha is -0.1.*0 .off. or positive", asks(mixup_alpha=-0.1)),
    "mixup alone": (ConfigError, "batch_size is 1.*Raise batch_size, or turn mixup off", asks(batch_size=1, mixup_alpha=0.1)),
    "small micro-batch": (
        ConfigError,
        "micro_batch 4.*Use at least 8, or turn mixup off",
        asks(batch_size=16, micro_batch=4, mixup_alpha=0.1),
    ),
    "many processes": (
        ConfigError,
        "3 processes can not share a batch of 16.*at least 24 or start fewer",
        flags("plan --dataset digits --model {model} --batch-size 16 --mixup-alpha 0.1 --processes 3"),
    ),
    "no number of processes": (ConfigError, "--processes x.*a whole number from 1", flags("plan --dataset digits --processes x")),
    "no threads": (ConfigError, "threads is 0.*at least 1", asks(threads=0)),
    "fp16 on the CPU": (ConfigError, "fp16 needs an accelerator.*Use bf16 or fp32", asks(precision="fp16")),
    "unknown tracker": (ConfigError, 'tracker "tensorbord".*did you mean "tensorboard"', asks(tracker="tensorbord")),
    "tracker not installed": (ConfigError, 'tracker "swanlab" is not installed.*pip install swanlab', asks(tracker="swanlab")),
    # doors
    "unknown command": (ConfigError, 'no command "finetune".*did you mean "fine-tune"', flags("finetune --dataset digits")),
    "options of models": (ConfigError, 'models takes no options.*"--all"', flags("models --all")),
    "no such config": (
        ConfigError,
        "none.json can not be read.*as a configuration",
        flags("fine-tune --config none.json --output-dir {run}"),
    ),
    "config of a list": (ConfigError, "config.json must hold a JSON object.*such as a run's config.json", saved_config("[]")),
    # what the launcher says
    "bf16 and fp32": (
        ConfigError,
        "fp32 contradicts .* sets bf16.*Change one",
        launched("ACCELERATE_MIXED_PRECISION", "bf16", precision="fp32"),
    ),
    "fp8": (ConfigError, 'mixed precision "fp8".*bf16 and fp16 are supported', launched("ACCELERATE_MIXED_PRECISION", "fp8")),
    "accumulation": (
        ConfigError,
        "gradient accumulation to 4.*remove it there and use --micro-batch",
        launched("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ),
    "dynamo": (
        ConfigError,
        'compiles with "inductor".*dynamo_backend to "no"',
        launched("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ),
    "FSDP": (ConfigError, "uses FSDP.*Use DDP", launched("ACCELERATE_USE_FSDP", "true")),
    "more processes here than there are": (
        ConfigError,
        "WORLD_SIZE is 1 and LOCAL_WORLD_SIZE 2.*Start with torchrun",
        launched("LOCAL_WORLD_SIZE", "2"),
    ),
    "processes by hand": (
        ConfigError,
        "WORLD_SIZE is 2, but RANK and MASTER_ADDR are not set.*torchrun or accelerate launch",
        launched("WORLD_SIZE", "2"),
    ),
    "processes in words": (
        ConfigError,
        "WORLD_SIZE .*not a whole number.*two.*Start with torchrun",
        launched("WORLD_SIZE", "two"),
    ),
    # the run's folder
    "occupied": (CheckpointError, "run holds a run already.*--resume.*--overwrite", lambda place: place.earlier_run()),
    "resumed otherwise": (CheckpointError, "steps: 7 -> 8.*values of then, or choose another", resumed_otherwise),
    "resume and overwrite": (
        CheckpointError,
        "resume and overwrite.*go on .* or start it anew",
        asks(resume=True, overwrite=True),
    ),
    "foreign files": (CheckpointError, "run is not empty and holds no run.*Choose another output_dir", foreign_folder),
    "a file for a folder": (
        CheckpointError,
        "taken is a file.*must be a folder",
        lambda place: {"output_dir": Path(place.file("taken"))},
    ),
    "too long a name": (
        CheckpointError,
        "nnn can not be a folder: File name too long. Choose another output_dir",
        asks(output_dir=Path("n" * 300)),
    ),
    "config is not JSON": (CheckpointError, "run/config.json can not be read.*as JSON", resumed_from_nonsense),
    # where the data are
    "no such path": (DataError, r'"\./none".*no such file or folder', asks(dataset="./none")),
    "no such hub id": (
        DataError,
        '"nobody/nothing".*no such file or folder here, and the hub says',
        asks(dataset="nobody/nothing"),
    ),
    "empty folder": (DataError, "nothing holds neither class folders.*train.csv, train.parquet", empty_folder),
    "wrong suffix": (
        DataError,
        'pictures.rar: data files end in .csv.*archives in .zip.* not ".rar".*Unpack',
        lambda place: {"dataset": place.file("pictures.rar")},
    ),
    "broken parquet": (
        DataError,
        "rows.parquet can not be read.*as parquet",
        lambda place: {"dataset": place.file("rows.parquet", b"PAR1 and no more")},
    ),
    "file of no split": (
        DataError,
        "a/rows.csv.*named for its split.*single file by its own path",
        lambda place: {"dataset": str(Path(place.file("a/rows.csv", "file,label\n")).parent)},
    ),
    "broken save_to_disk": (
        DataError,
        "a looks like a folder of save_to_disk.*can not be read",
        lambda place: {"dataset": str(Path(place.file("a/state.json", "{}")).parent)},
    ),
    "revision of local data": (DataError, 'dataset_revision "v1".*leave it out', asks(dataset_revision="v1")),
    "class of the test folder": (
        DataError,
        'test/dogs is a class that .*train lacks.*did you mean "dog"',
        class_of_the_test_folder,
    ),
    "class without pictures": (DataError, "eel holds no pictures.*Fill it or remove it", empty_class),
    # columns
    "csv naming no file": (
        DataError,
        'row 1 of column "file" names .*9.png.*Mend the path',
        lambda place: {"dataset": place.csv("file,label", "0.png,a", "9.png,b", "2.png,a", "3.png,b")},
    ),
    "csv with an empty cell": (
        DataError,
        'row 1 of column "file" names no picture.*Fill it or remove the row',
        lambda place: {"dataset": place.csv("file,label", "0.png,a", ",b", "2.png,a", "3.png,b"), "image_column": "file"},
    ),
    "two label columns": (
        DataError,
        "2 columns could hold the classes: coarse, fine.*Name one with label_column",
        lambda place: {"dataset": place.csv("file,coarse,fine", "0.png,a,c", "1.png,b,d", "2.png,a,e")},
    ),
    "no image column": (
        DataError,
        "no column seems to hold the pictures; there are name .*, label .*Name one with image_column",
        lambda place: {"dataset": place.csv("name,label", "x,a", "y,b", "z,a")},
    ),
    "unknown column": (DataError, 'label_column "lable".*columns image, label .did you mean "label"', asks(label_column="lable")),
    "labels for pictures": (
        DataError,
        'image_column "label" holds ClassLabel.*expected an Image feature',
        asks(image_column="label"),
    ),
    "lists of labels": (
        DataError,
        'label_column "label" holds lists.*expected one class a picture',
        lambda place: {"dataset": rows([[0], [1], [0]], List(Value("int64"))), "label_column": "label"},
    ),
    "column in one split": (
        DataError,
        'split "test" has no column "label".*label_column names. It has image, kind',
        lambda place: {"dataset": DatasetDict(train=rows(TWO, NAMED), test=rows(TWO, NAMED).rename_column("label", "kind"))},
    ),
    # labels
    "unlabelled row": (
        DataError,
        "train row 2 has the label -1.*Remove these rows, or name another",
        lambda place: {"dataset": rows([0, 1, -1], NAMED)},
    ),
    "empty label": (
        DataError,
        "train row 1 has no label.*Fill it or remove the row",
        lambda place: {"dataset": rows(["a", None, "b", "a"])},
    ),
    "label below -1": (
        DataError,
        '"label" of train holds the label -7.*labels are 0 or more',
        lambda place: {"dataset": rows([0, 1, -7, 0, 1])},
    ),
    "label out of range": (DataError, "test row 1 has the label -7.*from 0 to 1", lambda place: {"dataset": out_of_range()}),
    "one class": (
        DataError,
        '"label" of train holds fewer than two classes.*nothing to learn',
        lambda place: {"dataset": rows(["a"] * 4)},
    ),
    "another string each row": (
        DataError,
        '"label" of train has another value in every row.*Name the right column',
        lambda place: {"dataset": rows(["a", "b", "c"])},
    ),
    "string of the test split alone": (
        DataError,
        'test row 1 has the class "z".*which the training split lacks',
        lambda place: {"dataset": rows(["a", "b", "a"], test=["a", "z"])},
    ),
    "name of the test split alone": (
        DataError,
        'split "test" has the class "dogs".*did you mean "dog"',
        lambda place: {"dataset": rows(TWO, NAMED, test=TWO, test_feature=ClassLabel(names=["cat", "dogs"]))},
    ),
    # splits and subsets
    "unknown split": (DataError, 'test_split "tst".*train, test .did you mean "test"', asks(test_split="tst")),
    "empty split": (
        DataError,
        'split "test" holds no examples',
        lambda place: {"dataset": DatasetDict(train=rows(TWO, NAMED), test=rows(TWO, NAMED).select([])), "test_split": "test"},
    ),
    "scored on training data": (DataError, 'both "train".*scores on training examples mean nothing', asks(test_split="train")),
    "unlabelled test split": (
        DataError,
        'split "test" can not be scored: row 0.*Name another split',
        lambda place: {"dataset": rows(TWO, NAMED, test=[-1, -1]), "test_split": "test"},
    ),
    "nothing to score": (
        DataError,
        "every class of train has a single example.*test_split",
        lambda place: {"dataset": rows([0, 1], NAMED)},
    ),
    "share above 1": (DataError, "validation_fraction is 1.5.*between 0 and 1", asks(validation_fraction=1.5)),
    "too few of a class": (DataError, 'class "8" has only 97.*Lower it, or remove the class', asks(examples_per_class=98)),
    "none of a class": (DataError, "examples_per_class is 0.*at least 1", asks(examples_per_class=0)),
    "broken picture": (
        DataError,
        "train/dog/1.png .train row 1.: not a picture in a format that is read.*Mend or remove the file",
        broken_picture("train/dog/1.png"),
    ),
    "a parquet file with damaged names": (
        DataError,
        'train rows 0 to 1: "image" can not be read: .*utf-8.*Mend the file',
        mangled_names,
    ),
    "a name that is not UTF-8": (
        DataError,
        r"\\udce9.png': this name is not UTF-8.*Rename it",
        lambda place: {"dataset": place.pictures("cat/1.png", "dog/\udce9.png")},
    ),
    # weights
    "no tag": (
        WeightsError,
        r'"resnetv2_50x1_bit" names a network.*Name one of\n  resnetv2_50x1_bit.goog_in21k\n',
        asks(model="resnetv2_50x1_bit"),
    ),
    "unknown model": (
        WeightsError,
        'resnetv2_50x1_bit.goog_in22k.*did you mean "resnetv2_50x1_bit.goog_in21k"',
        flags("fine-tune --dataset digits --model resnetv2_50x1_bit.goog_in22k --output-dir {run}"),
    ),
    "pickle": (
        WeightsError,
        "weights.pth may hold a pickle.*Give a .safetensors or .npz",
        lambda place: {"model": place.file("weights.pth", b"\x80\x04.")},
    ),
    "weights of no kind": (
        WeightsError,
        'weights.h5: .*end in .safetensors or .npz, not ".h5"',
        lambda place: {"model": place.file("weights.h5")},
    ),
    "revision of local weights": (WeightsError, 'revision "v1".*leave it out', asks(revision="v1")),
    "unknown on the hub": (WeightsError, "nobody/nothing.*no such repository", asks(model="nobody/nothing")),
    "truncated safetensors": (WeightsError, "cut.safetensors is not a whole safetensors file.*Fetch it again", broken_weights),
    "no stem": (
        WeightsError,
        'weights.npz has no "stem.conv.weight".*not a BiT',
        npz("resnet/group_norm/gamma", np.ones(4, np.float32)),
    ),
    "array of no BiT": (WeightsError, 'weights.npz holds an array "fc1".*original BiT file', npz("fc1", np.ones(4))),
    "pickled npz": (
        WeightsError,
        "weights.npz can not be read.*pickled objects are refused",
        npz("resnet/group_norm/gamma", np.array([{}], dtype=object)),
    ),
    "network of no BiT": (
        WeightsError,
        "weights.npz holds a network of .* with 8 stem channels.*config.json .* give the folder",
        npz("resnet/root_block/standardized_conv2d/kernel", np.ones((7, 7, 3, 8), np.float32)),
    ),
    "wrong shape": (
        WeightsError,
        r"model.safetensors: norm.bias has the shape \(9,\).*needs \(64,\)",
        wrong_tensors(lambda tensors: tensors.update({"norm.bias": tensors["norm.bias"][:9].clone()})),
    ),
    "tensor missing": (
        WeightsError,
        "model.safetensors does not fit.*it lacks norm.bias",
        wrong_tensors(lambda tensors: tensors.pop("norm.bias")),
    ),
    "no config": (
        WeightsError,
        "pictures has no config.json.*timm's hub layout",
        lambda place: {"model": place.pictures("1.png")},
    ),
    "config of no JSON": (
        WeightsError,
        "weights/config.json is not JSON",
        lambda place: {"model": str(Path(place.file("weights/config.json", "{")).parent)},
    ),
    "other architecture": (
        WeightsError,
        'the architecture "vit_base".*Known: resnetv2_50x1_bit',
        lambda place: {"model": str(place.model(architecture="vit_base"))},
    ),
    "no weights beside the config": (
        WeightsError,
        "weights has no model.safetensors.*Only safetensors",
        lambda place: {"model": str(Path(place.file("weights/config.json", '{"architecture": "resnetv2_50x1_bit"}')).parent)},
    ),
    "unknown argument of the network": (
        WeightsError,
        'config.json: model_args hold "checkpoint_path", which does not shape a BiT.*Remove it',
        lambda place: {"model": str(place.model(model_args={"checkpoint_path": place.file("weights.pth")}))},
    ),
    "arguments that are a text": (
        WeightsError,
        "config.json: model_args and pretrained_cfg must be JSON objects.*Fetch it again",
        lambda place: {"model": str(place.model(pretrained_cfg="none"))},
    ),
    "std of two channels": (
        WeightsError,
        r"config.json: std is \[0.5, 0.5\]; expected a positive number for each of three channels.*Mend it",
        lambda place: {"model": str(place.model(pretrained_cfg={"std": [0.5, 0.5]}))},
    ),
    "attack from afar": (
        ConfigError,
        "attack_from resnetv2_50x1_bit.goog_in21k is not on this machine.*Name the model/ folder",
        asks(diagnostics=True, attack_from="resnetv2_50x1_bit.goog_in21k"),
    ),
    "attack in other colours": (
        ConfigError,
        r"model normalises pictures by a mean of \(0.4, 0.4, 0.4\), .* by \(0.5, 0.5, 0.5\): they would not see the same",
        lambda place: {"diagnostics": True, "attack_from": str(place.model(**OTHER_COLOURS))},
    ),
    "normalisation that timm lacks": (
        WeightsError,
        "can not build resnetv2_50x1_bit with .*KeyError: 'nrom'",
        lambda place: {"model": str(place.model(model_args={"norm_layer": "nrom"}))},
    ),
}
# Further kinds that reach a raise of the table above.
SAME_RAISE: dict[str, Case] = {
    "resumed on other data": (
        CheckpointError,
        "another configuration .plan.json.*data: .*'train_examples': 3.* -> .*'train_examples': 2.*Resume with the values",
        resumed_on_other_data,
    ),
    "header of nothing": (
        WeightsError,
        "weights.safetensors is not a whole safetensors file.*Fetch it again",
        lambda place: {"model": place.file("weights.safetensors", b"\xff" * 40)},
    ),
    "two image columns": (
        DataError,
        "2 columns could hold the pictures: file, mask.*Name one with image_column",
        lambda place: {"dataset": place.csv("file,mask,label", "0.png,1.png,a", "2.png,3.png,b", "0.png,3.png,b")},
    ),
    "float labels": (
        DataError,
        "no column seems to hold the classes; .*float64.*Name one with label_column",
        lambda place: {"dataset": place.csv("file,score", "0.png,0.5", "1.png,0.25", "2.png,1.5")},
    ),
    "float labels by name": (
        DataError,
        'label_column "score" holds Value.*float64.*expected one class a picture',
        lambda place: {"dataset": place.csv("file,score", "0.png,0.5", "1.png,0.25", "2.png,1.5"), "label_column": "score"},
    ),
    "broken csv": (
        DataError,
        "rows.csv can not be read.*as csv",
        lambda place: {"dataset": place.file("rows.csv", "file,label\n0.png,a,b,c\n0.png,1,2,3,4,5\n")},
    ),
    "empty csv": (DataError, "rows.csv can not be read.*as csv", lambda place: {"dataset": place.file("rows.csv")}),
    "unknown key of a config": (
        ConfigError,
        'no option "stepz".*did you mean "steps"',
        saved_config('{"dataset": "digits", "stepz": 3}'),
    ),
    "config with one decay": (
        ConfigError,
        "decay_steps is 5.*expected .*tuple",
        saved_config('{"dataset": "digits", "decay_steps": 5}'),
    ),
    "config with a number for a folder": (
        ConfigError,
        "output_dir is 5.*expected .*Path",
        saved_config('{"dataset": "digits", "output_dir": 5}'),
    ),
    "a number for a name": (ConfigError, "dataset is 5.*expected .*str", asks(dataset=5)),
    "an empty DatasetDict": (DataError, 'train_split "train".*Name one with train_split', asks(dataset=DatasetDict())),
    "other DeepSpeed": (ConfigError, "uses DeepSpeed.*Use DDP", launched("ACCELERATE_USE_DEEPSPEED", "true")),
    "fp16 by the launcher": (
        ConfigError,
        "fp16 needs an accelerator.*Use bf16 or fp32",
        launched("ACCELERATE_MIXED_PRECISION", "fp16"),
    ),
    "broken picture to score": (
        DataError,
        "test/cat/1.png .test row 0.: not a picture in a format that is read.*Mend or remove the file",
        broken_picture("test/cat/1.png"),
    ),
    "unknown train split": (DataError, 'train_split "trian".*did you mean "train"', asks(train_split="trian")),
    "steps of a fraction": (ConfigError, "steps is 2.5.*expected .*int", asks(steps=2.5)),
    "a micro-batch of none": (ConfigError, "micro_batch is 0.*at least 1", asks(micro_batch=0)),
    "a log of nothing": (ConfigError, "log_every is 0.*at least 1", asks(log_every=0)),
    "fewer than no workers": (ConfigError, "num_workers is -1.*0 or a positive", asks(num_workers=-1)),
}


def out_of_range() -> DatasetDict:
    """ClassLabel refuses labels above its names when rows are made, not those below -1."""
    splits = rows(TWO, NAMED, test=[0, 1])
    splits["test"] = rows([0, -7], Value("int64")).cast_column("label", NAMED)
    return splits


def tree(root: Path) -> dict[str, bytes | None]:
    """All that lies under a folder: the content of files, None for folders."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


@dataclass(frozen=True)
class Outcome:
    """What one row came to."""

    error: BitMixupError
    status: object
    printed: str
    complaint: str
    raised_at: str
    before: dict[str, bytes | None]
    after: dict[str, bytes | None]


OUTCOMES: dict[str, Outcome] = {}


def outcome(name: str, tiny_bit: Path, root: Path) -> Outcome:
    """Runs a row of one of the tables, once."""
    if name not in OUTCOMES:
        OUTCOMES[name] = run_case((CASES | SAME_RAISE)[name][2], tiny_bit, root)
    return OUTCOMES[name]


def run_case(prepare: Prepare, tiny_bit: Path, root: Path) -> Outcome:
    folder = root / str(len(list(root.iterdir())))
    folder.mkdir()
    error, status = None, None
    printed, complaint = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        place = Place(folder, tiny_bit, monkeypatch)
        asked = prepare(place)
        monkeypatch.chdir(folder)
        before = tree(folder)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            try:
                run_door(asked, place)
            except BitMixupError as raised:
                error = raised
            except SystemExit as left:
                error, status = left.__cause__, left.code
    assert isinstance(error, BitMixupError), f"it was accepted, or refused by another's hand: {complaint.getvalue()}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).parents]
    raised_at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return Outcome(error, status, printed.getvalue(), complaint.getvalue(), raised_at, before, tree(folder))


def run_door(asked: dict[str, Any] | list[str], place: Place) -> None:
    if isinstance(asked, dict):
        options = {"dataset": "digits", "model": str(place.tiny_bit), "output_dir": place.run, **SHORT, **asked}
        bit_mixup.transfer(**options)
    elif asked[0] == "recipe":
        fine_tune.main(asked[1:])
    else:
        main(asked)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.mark.parametrize("name", [*CASES, *SAME_RAISE])
def test_message_names_culprit_and_remedy(name: str, tiny_bit: Path, root: Path) -> None:
    error, message, _ = (CASES | SAME_RAISE)[name]
    result = outcome(name, tiny_bit, root)
    assert type(result.error) is error, result.error
    assert re.search(message, str(result.error), re.DOTALL), f"{message!r} is not in: {result.error}"
    assert "Traceback" not in result.complaint
    if result.status is not None:
        assert result.status == 2
        assert result.complaint == f"bit-mixup: error: {result.error}\n"


@pytest.mark.parametrize("name", [*CASES, *SAME_RAISE])
def test_nothing_is_trained_or_written(name: str, tiny_bit: Path, root: Path) -> None:
    result = outcome(name, tiny_bit, root)
    assert result.after == result.before
    assert result.printed == "", "a plan is printed just before training starts"
    assert "fine-tuning" not in result.complaint


def test_each_row_reaches_a_raise_of_its_own(tiny_bit: Path, root: Path) -> None:
    raised = {name: outcome(name, tiny_bit, root).raised_at for name in CASES}
    assert len(set(raised.values())) == len(CASES) >= 80, sorted((line, name) for name, line in raised.items())
    assert {outcome(name, tiny_bit, root).raised_at for name in SAME_RAISE} <= set(raised.values())
