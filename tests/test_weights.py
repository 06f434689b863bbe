"""Do weights of every origin reach the network whole, with exactly the head that was asked for, or is the fault named?"""

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_ARGS
from hub import LoopbackHub
from safetensors.torch import load_file, save_file
from timm.layers.std_conv import StdConv2d
from torch import Tensor

from bit_mixup.catalog import ARCHITECTURES, list_bit_models
from bit_mixup.config import TransferConfig, configure
from bit_mixup.errors import WeightsError
from bit_mixup.images import View
from bit_mixup.models import load_bit, save_model, std_eps_effect
from bit_mixup.planning import make_plan
from bit_mixup.weights import BUNDLED, BUNDLED_FOLDER, fetch, find_weights, read_shapes

Tensors = dict[str, Tensor]
IN21K = "resnetv2_50x1_bit.goog_in21k"
COMMIT, OLDER = "1" * 40, "0" * 40
IMAGES = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def body(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.fc.")}


def assert_same(first: Tensors, second: Tensors) -> None:
    """The same names, and the same values once both are fp32."""
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def assert_zero_head(model: torch.nn.Module, classes: int) -> None:
    parameters = list(model.get_classifier().parameters())
    assert [len(parameter) for parameter in parameters] == [classes, classes]
    assert not any(parameter.any() for parameter in parameters)
    assert model.num_classes == classes


@pytest.fixture(scope="module")
def r50_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file's names and shapes: R50x1 with 21,843 classes, in fp16 to be quick, each tensor different."""
    path = tmp_path_factory.mktemp("published") / "model.safetensors"
    with torch.device("meta"):
        shapes = timm.create_model(IN21K, pretrained=False).state_dict()
    numbers = torch.Generator().manual_seed(0)
    tensors = {}
    for index, (name, tensor) in enumerate(shapes.items()):
        shape = tensor.shape if name != "head.fc.weight" else (1,)
        values = torch.randn(shape, generator=numbers) * 0.05 + index / 1000
        tensors[name] = values.half().expand(tensor.shape).contiguous()
    assert tensors["head.fc.weight"].shape == (21_843, 2048, 1, 1)
    save_file(tensors, path)
    return path


@pytest.fixture
def asked(hub: LoopbackHub) -> Iterator[list[tuple[str, str]]]:
    """What is asked of the hub during a test; never a pickle."""
    hub.requests.clear()
    yield hub.requests
    assert not [path for _, path in hub.requests if re.search(r"\.(bin|pt|pth|pkl|ckpt)\b", path)]


# --- origins ---------------------------------------------------------------------------------------------------------


def test_a_published_tag_is_fetched_from_the_hub(hub: LoopbackHub, asked: list[tuple[str, str]], r50_file: Path) -> None:
    hub.add_model(f"timm/{IN21K}", {"model.safetensors": b"of another revision"}, commit=OLDER)
    hub.add_model(f"timm/{IN21K}", {"model.safetensors": r50_file}, commit=COMMIT)
    found = find_weights(IN21K)
    assert (found.file, found.revision, asked) == (None, None, [])
    model = load_bit(IN21K, num_classes=7)
    assert_same(body(model.state_dict()), body(load_file(r50_file)))
    assert_zero_head(model, 7)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())
    path = f"/timm/{IN21K}/resolve/main/model.safetensors"
    assert asked == [("HEAD", path), ("GET", path)]
    assert fetch(found).revision == COMMIT

    asked.clear()  # a commit pins: another file is found, nothing of main is asked
    pinned = fetch(found, revision=OLDER)
    assert pinned.revision == OLDER
    assert pinned.file is not None
    assert pinned.file.read_bytes() == b"of another revision"
    path = f"/timm/{IN21K}/resolve/{OLDER}/model.safetensors"
    assert asked == [("HEAD", path), ("GET", path)]


def test_as_many_classes_as_upstream_do_not_keep_its_head(hub: LoopbackHub, r50_file: Path) -> None:
    hub.add_model(f"timm/{IN21K}", {"model.safetensors": r50_file}, commit=COMMIT)
    assert_zero_head(load_bit(IN21K, num_classes=21_843), 21_843)


def test_a_repository_of_a_user_in_timms_layout(hub: LoopbackHub, asked: list[tuple[str, str]], tiny_bit: Path) -> None:
    files = {name: tiny_bit / name for name in ("config.json", "model.safetensors")}
    hub.add_model("someone/tiny-bit", files, commit=COMMIT)
    fetched = fetch(find_weights("someone/tiny-bit"))
    assert (fetched.architecture, fetched.revision) == ("resnetv2_50x1_bit", COMMIT)
    assert (fetched.shape, fetched.input_size) == (find_weights(str(tiny_bit)).shape, 40)
    assert_same(load_bit("someone/tiny-bit", keep_head=True).state_dict(), load_file(tiny_bit / "model.safetensors"))
    assert {path.split("/")[-1] for _, path in asked} == {"config.json", "model.safetensors"}


def test_a_plan_for_a_repository_of_a_user_knows_what_is_in_it(hub: LoopbackHub, tiny_bit: Path, tmp_path: Path) -> None:
    hub.add_model("someone/planned", {name: tiny_bit / name for name in ("config.json", "model.safetensors")}, commit=COMMIT)
    options = {"dataset": "digits", "resolution": "model", "output_dir": tmp_path / "run"}
    local = make_plan(configure(TransferConfig, model=str(tiny_bit), **options))
    plan = make_plan(configure(TransferConfig, model="someone/planned", revision=COMMIT, **options))
    assert plan.resolution == local.resolution
    assert plan.resolution.hyper.crop_size == 40
    assert (plan.view, plan.cuts, plan.memory_bytes()) == (local.view, local.cuts, local.memory_bytes())
    assert plan.weights.revision == COMMIT


@pytest.mark.parametrize("kind", ["folder", "file of the folder"])
def test_a_folder_of_ours(kind: str, tiny_bit: Path) -> None:
    path = tiny_bit if kind == "folder" else tiny_bit / "model.safetensors"
    kept = load_bit(str(path), keep_head=True)
    assert_same(kept.state_dict(), load_file(tiny_bit / "model.safetensors"))
    assert kept.get_classifier().weight.any()
    fresh = load_bit(str(path), num_classes=4)
    assert_same(body(fresh.state_dict()), body(kept.state_dict()))
    assert_zero_head(fresh, 4)


def test_a_bare_file_is_recognised_by_its_shapes(r50_file: Path) -> None:
    found = find_weights(str(r50_file))
    assert (found.architecture, found.file) == ("resnetv2_50x1_bit", r50_file)
    assert read_shapes(r50_file) == {name: tuple(tensor.shape) for name, tensor in load_file(r50_file).items()}
    model = load_bit(str(r50_file), num_classes=3)
    assert_same(body(model.state_dict()), body(load_file(r50_file)))
    assert_zero_head(model, 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_published_network_is_recognised(architecture: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {
            name: list(tensor.shape) for name, tensor in timm.create_model(architecture, pretrained=False).state_dict().items()
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (tmp_path / "any.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)  # what follows the header is a hole
    assert find_weights(str(tmp_path / "any.safetensors")).architecture == architecture


def test_the_bundled_model() -> None:
    config = json.loads((BUNDLED_FOLDER / "config.json").read_text())
    weights = find_weights(BUNDLED)
    assert weights.file == BUNDLED_FOLDER / "model.safetensors"
    assert weights.file.stat().st_size <= 4_000_000
    assert sum(file.stat().st_size for file in BUNDLED_FOLDER.iterdir()) <= 4 * 2**20  # with the card and the list of classes
    assert re.fullmatch(r"resnetv2_\w+_bit\.\w+", weights.name)
    assert weights.name == f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
    assert config["num_classes"] == 0
    assert weights.input_size <= 48
    tensors = load_file(weights.file)
    assert tensors == body(tensors), "it has no head"
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    model = load_bit(BUNDLED, num_classes=10).eval()
    assert_same(body(model.state_dict()), tensors)
    assert_zero_head(model, 10)
    assert model.stem.conv.bias is None
    stock = timm.create_model(f"local-dir:{BUNDLED_FOLDER}", pretrained=True).eval()
    images = torch.rand(2, *weights.pretrained_cfg["input_size"])
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), stock(images))
    assert std_eps_effect(model).smallest_variance > 0


# --- saving ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_saved_can_be_loaded_by_timm_and_by_us(tiny_bit: Path, tmp_path: Path) -> None:
    model = load_bit(str(tiny_bit), keep_head=True).eval()
    names = ["cat", "dog", "größer", "a|b"]
    view = View(resize_size=60, crop_size=50, flip=False, interpolation="bicubic")
    save_model(model, tmp_path / "model", label_names=names, view=view, std_eps=1e-8)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(stock(IMAGES), model(IMAGES))
    assert model(IMAGES).std() > 0
    again = load_bit(str(tmp_path / "model"), keep_head=True).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["label_names"], config["num_classes"], config["std_eps"]) == (names, 4, 1e-8)
    data = timm.data.resolve_model_data_config(stock)
    assert (data["input_size"], data["interpolation"], data["crop_mode"], data["crop_pct"]) == (
        (3, 50, 50),
        "bicubic",
        "squash",
        1.0,
    )
    found = find_weights(str(tmp_path / "model"))
    assert (found.input_size, found.interpolation, found.std_eps) == (50, "bicubic", 1e-8)


def eps_of(model: torch.nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, StdConv2d)}


def test_std_eps_is_what_is_asked_else_what_the_file_says_else_timms(tiny_bit: Path, tmp_path: Path) -> None:
    view = View(resize_size=48, crop_size=40, flip=True, interpolation="bilinear")
    model = load_bit(str(tiny_bit), keep_head=True)
    save_model(model, tmp_path, label_names=list("abcd"), view=view, std_eps=3e-9)
    assert eps_of(load_bit(str(tmp_path), num_classes=2)) == {3e-9}
    assert eps_of(load_bit(str(tmp_path), num_classes=2, std_eps=1e-10)) == {1e-10}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "std_eps"}))
    assert eps_of(load_bit(str(tmp_path), num_classes=2)) == {1e-8}


@torch.no_grad()
def test_the_effect_of_std_eps_is_measured_and_nothing_is_changed(tiny_bit: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_bit / "model.safetensors")
    name = "stages.1.blocks.0.conv2.weight"
    tensors[name][3] *= 1e-3  # a filter of little variance
    shutil.copy(tiny_bit / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_bit(str(tmp_path), keep_head=True, std_eps=5e-9).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    effect = std_eps_effect(model)
    assert_same(before, model.state_dict())
    assert eps_of(model) == {5e-9}
    assert model.training

    variances = [np.var(one_filter.double().numpy()) for key, tensor in tensors.items() if "conv" in key for one_filter in tensor]
    assert len(variances) > 1_000
    assert effect.smallest_variance == pytest.approx(min(variances), rel=1e-4)
    assert effect.smallest_variance == pytest.approx(np.var(tensors[name][3].numpy()), rel=1e-4)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    timms, reference = (load_bit(str(tmp_path), keep_head=True, std_eps=eps).eval()(images) for eps in (1e-8, 1e-10))
    assert effect.of == "logits"
    assert effect.relative_change == pytest.approx(float((timms - reference).abs().max() / reference.abs().max()), rel=1e-4)
    assert effect.relative_change > 1e-5

    headless = std_eps_effect(load_bit(str(tmp_path), num_classes=9).eval())
    assert headless.of == "features"
    assert headless.relative_change > 1e-5
    assert headless.smallest_variance == effect.smallest_variance


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tiny", {}, "num_classes is needed for the new head"),
        ("tiny", {"num_classes": 0}, "num_classes is 0; it must be at least 1"),
        ("tiny", {"num_classes": 9, "keep_head": True}, "has a head of 4 classes, but 9 are asked for"),
        (BUNDLED, {"keep_head": True}, "has no head to keep"),
        ("tiny", {"num_classes": 4, "revision": "main"}, 'revision "main" was given, but .* is a file of this machine'),
    ],
)
def test_heads_are_neither_kept_nor_lost_silently(model: str, options: dict[str, Any], message: str, tiny_bit: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        load_bit(str(tiny_bit) if model == "tiny" else model, **options)
    assert load_bit(str(tiny_bit), num_classes=4, keep_head=True).get_classifier().weight.any()


# --- faults ----------------------------------------------------------------------------------------------------------


def spoiled(tensors: Tensors, how: str) -> Tensors:
    key = "stages.2.blocks.1.norm3.weight"
    match how:
        case "missing":
            return {name: tensor for name, tensor in tensors.items() if name != key}
        case "unknown":
            return {**tensors, "stages.9.extra": torch.zeros(1)}
        case "shape":
            return {**tensors, key: torch.zeros(17)}
        case "head without weight":
            return {name: tensor for name, tensor in tensors.items() if name != "head.fc.weight"}
        case _:
            return {**tensors, "head.fc.bias": torch.zeros(5)}


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("missing", {"num_classes": 2}, r"does not fit resnetv2_50x1_bit: it lacks stages\.2\.blocks\.1\.norm3\.weight\."),
        ("unknown", {"num_classes": 2}, r"does not fit resnetv2_50x1_bit: it has the unknown stages\.9\.extra\."),
        ("shape", {"num_classes": 2}, r"stages\.2\.blocks\.1\.norm3\.weight has the shape \(17,\), but .* needs \(16,\)"),
        ("head bias", {"keep_head": True}, r"head\.fc\.bias has the shape \(5,\), but .* needs \(4,\)"),
        ("head without weight", {"keep_head": True}, "has no head to keep"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    how: str, options: dict[str, Any], message: str, tiny_bit: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_bit / "config.json", tmp_path)
    save_file(spoiled(load_file(tiny_bit / "model.safetensors"), how), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as error:
        load_bit(str(tmp_path), **options)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_name_without_a_tag_lists_its_tags(architecture: str) -> None:
    with pytest.raises(WeightsError) as error:
        find_weights(architecture)
    listed = re.findall(r"resnetv2_\w+\.\w+", str(error.value))
    assert listed == [name for name in list_bit_models() if name.startswith(architecture + ".")]
    assert len(listed) >= 2


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnetv2_50x1_bit.goog_in21", IN21K),
        ("resnetv2_50x1_bit_goog_in21k", IN21K),
        ("resnetv2_152x4_bit.googin21k", "resnetv2_152x4_bit.goog_in21k"),
        ("bundeld", BUNDLED),
    ],
)
def test_a_slip_of_the_pen_is_answered_with_the_nearest_name(name: str, meant: str) -> None:
    with pytest.raises(WeightsError, match=f'"{re.escape(name)}" is neither .*did you mean "{re.escape(meant)}"'):
        find_weights(name)


class Trap:
    """What a pickle can do."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    for name in ("model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"):
        torch.save({"stem.conv.weight": Trap(mark)}, tmp_path / name)
        with pytest.raises(WeightsError, match=rf"{name} may hold a pickle"):
            load_bit(str(tmp_path / name), num_classes=2)
    objects = np.empty(1, dtype=object)
    objects[0] = Trap(mark)
    np.savez(tmp_path / "model.npz", **{"resnet/root_block/standardized_conv2d/kernel": objects})
    with pytest.raises(WeightsError, match=r"model\.npz can not be read .*pickled objects are refused"):
        load_bit(str(tmp_path / "model.npz"), num_classes=2)
    (tmp_path / "config.json").write_text('{"architecture": "resnetv2_50x1_bit"}')
    with pytest.raises(WeightsError, match=r"has no model\.safetensors. Only safetensors are read, never pickles"):
        load_bit(str(tmp_path), num_classes=2)
    assert not mark.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert mark.exists(), "the trap works"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
@pytest.mark.parametrize("name", ["model.safetensors", "bare.safetensors", "bare.npz"])
def test_a_file_that_is_cut_short_is_named(name: str, share: float, tiny_bit: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "bare.npz":
        np.savez(path, **{"resnet/root_block/standardized_conv2d/kernel": np.zeros((7, 7, 3, 64), np.float32)})
        data = path.read_bytes()
    else:
        data = (tiny_bit / "model.safetensors").read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    if name == "model.safetensors":
        shutil.copy(tiny_bit / "config.json", tmp_path)
    with pytest.raises(WeightsError, match=rf"{re.escape(str(path))} (is|can not be read|is cut short|is damaged).*"):
        load_bit(str(path), num_classes=2)


Header = dict[str, Any]
FIRST, SECOND = "stem.conv.weight", "stages.0.blocks.0.norm1.weight"
LIES: dict[str, Callable[[Header], object]] = {
    "offsets of another tensor": lambda header: header[SECOND].update(data_offsets=header[FIRST]["data_offsets"]),
    "offsets behind the file": lambda header: header[FIRST].update(data_offsets=[1 << 40, (1 << 40) + 9_408]),
    "offsets before the file": lambda header: header[FIRST].update(data_offsets=[-9_408, 0]),
    "a single offset": lambda header: header[FIRST].update(data_offsets=[0]),
    "a larger shape": lambda header: header[FIRST].update(shape=[1 << 60, 3, 7, 7]),
    "no shape": lambda header: header[FIRST].update(shape=None),
    "an unknown type": lambda header: header[FIRST].update(dtype="PICKLE"),
    "bytes of no tensor": lambda header: header.pop(FIRST),
}


def in_a_folder(tiny_bit: Path, folder: Path) -> Path:
    shutil.copy(tiny_bit / "config.json", folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("place", [in_a_folder, lambda tiny_bit, folder: folder / "bare.safetensors"])
@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str, place: Callable[[Path, Path], Path], tiny_bit: Path, tmp_path: Path) -> None:
    content = (tiny_bit / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    LIES[lie](header)
    encoded = json.dumps(header).encode()
    path = place(tiny_bit, tmp_path)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    with pytest.raises(WeightsError, match=rf"{path.name} is not a whole safetensors file: .*Fetch it again"):
        load_bit(str(path), num_classes=2)


@pytest.mark.parametrize("place", [in_a_folder, lambda tiny_bit, folder: folder / "bare.safetensors"])
@pytest.mark.parametrize(("length", "start"), [(1 << 63, b"{"), (150_000_000, b"{"), (100_000, b"[" * 100_000), (3, b"[1]")])
def test_a_header_of_another_kind_is_refused(
    length: int, start: bytes, place: Callable[[Path, Path], Path], tiny_bit: Path, tmp_path: Path
) -> None:
    path = place(tiny_bit, tmp_path)
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + start)
        file.truncate(200_000_000)  # a hole, which takes no space
    with pytest.raises(WeightsError, match=rf"{path.name} is not a whole safetensors file: .*Fetch it again"):
        load_bit(str(path), num_classes=2)


def test_archives_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    name = "resnet/root_block/standardized_conv2d/kernel"
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY")
        archive.filelist[0].file_size = 6_000_000_000  # what it says to unpack to
    with pytest.raises(WeightsError, match=r"bomb\.npz would unpack to 6 GB, more than any BiT"):
        load_bit(str(bomb), num_classes=2)
    liar = tmp_path / "liar.npz"
    with zipfile.ZipFile(liar, "w") as archive, archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)})
    with pytest.raises(WeightsError, match=r"liar\.npz (is damaged|can not be read)"):
        load_bit(str(liar), num_classes=2)
    np.savez(tmp_path / "flat.npz", **{name: np.float32(1)})
    with pytest.raises(WeightsError, match=r'flat\.npz has no "stem\.conv\.weight" of four dimensions'):
        load_bit(str(tmp_path / "flat.npz"), num_classes=2)


def test_original_files_with_foreign_or_missing_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, **{"resnet/block1/unit01/a/batch_norm/gamma": np.zeros(3)})
    with pytest.raises(
        WeightsError, match=r'some\.npz holds an array "resnet/block1/unit01/a/batch_norm/gamma", which no BiT has'
    ):
        find_weights(str(path))
    np.savez(path, **{"resnet/group_norm/gamma": np.zeros(3)})
    with pytest.raises(WeightsError, match=r'some\.npz has no "stem\.conv\.weight"'):
        find_weights(str(path))


def test_a_narrow_bare_file_asks_for_its_configuration(tiny_bit: Path, tmp_path: Path) -> None:
    assert TINY_ARGS["stem_chs"] == 16
    shutil.copy(tiny_bit / "model.safetensors", tmp_path / "tiny.safetensors")
    with pytest.raises(WeightsError, match=r"16 stem channels, which is none of timm's BiTs.* config\.json"):
        find_weights(str(tmp_path / "tiny.safetensors"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json: a folder of weights must be in timm's hub layout"),
        ("{", "config.json is not JSON"),
        ("[]", 'names the architecture "None"'),
        ('{"architecture": "resnetv2_50x1_bti"}', 'did you mean "resnetv2_50x1_bit"'),
        ('{"architecture": "resnetv2_50x1_bit", "model_args": {"wings": 2}}', 'model_args hold "wings"'),
    ],
)
def test_a_folder_with_a_faulty_configuration_is_refused(
    config: str | None, message: str, tiny_bit: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_bit / "model.safetensors", tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(WeightsError, match=message):
        load_bit(str(tmp_path), num_classes=2)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/missing", None, "config.json of someone/missing: the hub has no such repository"),
        ("someone/gated", None, "config.json of someone/gated: the repository is gated"),
        ("someone/pickled", None, "model.safetensors of someone/pickled: the repository has no such file. Only safetensors"),
        ("someone/pickled", "v9", "config.json of someone/pickled at revision v9: the hub has no such revision"),
        (
            "resnetv2_101x1_bit.goog_in21k",
            None,
            "model.safetensors of timm/resnetv2_101x1_bit.goog_in21k: the hub has no such repo",
        ),
    ],
)
def test_what_the_hub_refuses_is_explained(
    name: str, revision: str | None, message: str, hub: LoopbackHub, asked: list[tuple[str, str]], tiny_bit: Path
) -> None:
    hub.add_model("someone/gated", {"config.json": b"{}"}, gated=True)
    hub.add_model("someone/pickled", {"config.json": tiny_bit / "config.json", "pytorch_model.bin": b"pickle"})
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_bit(name, num_classes=2, revision=revision)
    assert 1 <= len(asked) <= 3
