"""Which file of weights does a model's name stand for?

Resolution only: names, folders and files become a `Weights` record that says what network to build and from where. No tensor is
read here and torch is not imported; `bit_mixup.models` builds the network.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from bit_mixup.catalog import ARCHITECTURES, PUBLISHED, Architecture, list_bit_models
from bit_mixup.errors import WeightsError, did_you_mean
from bit_mixup.hub import explain, first_line, take_out_if_damaged

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".tar"}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file of weights and the network it belongs to.

    Args:
        name: what people call it: `architecture.tag`, or the path.
        file: where it lies on this machine; None where it has to be downloaded first (`fetch`).
        architecture: timm's name of the network.
        shape: the network's shape, with `model_args` taken into account.
        model_args: timm's further arguments.
        pretrained_cfg: mean, std, input size and interpolation, as timm keeps them.
        std_eps: what the file's maker added to the variance in weight standardisation; None if unknown.
        revision: commit hash on the hub; None for files of this machine.
        label_names: of the head's classes; None if unknown.
    """

    name: str
    file: Path | None
    architecture: str
    shape: Architecture
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    std_eps: float | None = None
    revision: str | None = None
    label_names: tuple[str, ...] | None = None

    @property
    def input_size(self) -> int:
        """Edge in pixels of the pictures that the weights were made for."""
        return int(self.pretrained_cfg.get("input_size", (3, 224, 224))[1])

    @property
    def interpolation(self) -> str:
        return str(self.pretrained_cfg.get("interpolation", "bilinear"))

    @property
    def short_name(self) -> str:
        """A name fit for a folder."""
        name = self.name
        if self.file is not None and "/" in name and self.revision is None:
            folder = self.file.parent if self.file.name == WEIGHTS_FILE else self.file.with_suffix("")
            name = folder.parent.name if folder.name == "model" else folder.name  # runs/NAME/model is called NAME
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def find_weights(name_or_path: str) -> Weights:
    """What a name stands for, without downloading a published file.

    Args:
        name_or_path: "bundled"; a published `architecture.tag` (see `bit-mixup models`); a `.safetensors` or original BiT
            `.npz` file; a folder in timm's hub layout, such as a run's `model/`; or `user/name` of such a folder on the hub.

    Raises:
        WeightsError: an unknown or ambiguous name, or a file that is missing or of a kind that is not read.
    """
    if name_or_path == BUNDLED:
        return _from_folder(BUNDLED_FOLDER, name=None)
    if name_or_path in PUBLISHED:
        model = PUBLISHED[name_or_path]
        return Weights(
            name=model.name,
            file=None,
            architecture=model.name.split(".")[0],
            shape=model.architecture,
            pretrained_cfg=_google_cfg(model.input_size, model.num_classes, model.interpolation),
        )
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):  # pathlib's would raise where a name is too long for a file
        return _from_folder(path, name=str(path))
    if os.path.isfile(path):
        return _from_file(path)
    if name_or_path in ARCHITECTURES:
        tags = "\n  ".join(name for name in list_bit_models() if name.startswith(f"{name_or_path}."))
        raise WeightsError(
            f'model "{name_or_path}" names a network, not its weights: timm would choose a tag silently. Name one of\n  {tags}'
        )
    if re.fullmatch(r"[\w-]+/[\w.-]+", name_or_path) and path.suffix not in {".safetensors", ".npz"} | _PICKLES:
        return Weights(name=name_or_path, file=None, architecture="", shape=ARCHITECTURES["resnetv2_50x1_bit"])
    hint = did_you_mean(name_or_path, [*list_bit_models(), BUNDLED])
    raise WeightsError(
        f'model "{name_or_path}" is neither a file, a folder, nor a known name{hint}. `bit-mixup models` lists the names; '
        '"bundled" is the small model that ships in the package.'
    )


def find_network(name_or_path: str) -> Weights:
    """As `find_weights`, for the network alone: the plain name of an architecture stands for itself, at 224 pixels.

    Raises:
        WeightsError: see `find_weights`.
    """
    if name_or_path in ARCHITECTURES:
        return Weights(
            name=name_or_path,
            file=None,
            architecture=name_or_path,
            shape=ARCHITECTURES[name_or_path],
            pretrained_cfg=_google_cfg(224, 0, "bilinear"),
        )
    weights = find_weights(name_or_path)
    return weights if weights.architecture else fetch(weights)


def _google_cfg(input_size: int, num_classes: int, interpolation: str) -> dict[str, Any]:
    """The pretrained configuration that all weights of BiT's authors share, but for these three."""
    return {
        "input_size": (3, input_size, input_size),
        "num_classes": num_classes,
        "interpolation": interpolation,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }


def fetch(weights: Weights, *, revision: str | None = None) -> Weights:
    """The same weights on this machine, downloaded from the hub if need be; safetensors only, never a pickle.

    Files from the hub are compared with the digests that it published.

    Args:
        weights: as found, or as fetched before.
        revision: branch, tag or commit on the hub (None: its main branch).

    Raises:
        WeightsError: the hub can not be reached, refuses, is busy, or lacks the repository, the revision or the file; a file came
            damaged; or a revision is asked of a file on this machine.
    """
    if weights.file is not None:
        if revision is not None and weights.revision is None:
            raise WeightsError(f'revision "{revision}" was given, but {weights.file} is a file of this machine: leave it out.')
        return weights
    published = weights.name in PUBLISHED
    repository = f"timm/{weights.name}" if published else weights.name
    config = None if published else _download(repository, CONFIG_FILE, revision)
    file = _download(repository, WEIGHTS_FILE, revision)
    assert file is not None
    commit = file.parent.name
    if published:
        return replace(weights, file=file, revision=commit)
    found = _from_folder(config.parent, name=weights.name) if config else weights
    return replace(found, file=file, revision=commit)


def fetch_companions(weights: Weights, names: Sequence[str]) -> None:
    """Downloads further files of a model on the hub to where its weights are; those that it does not have are left out.

    Args:
        weights: as fetched; nothing is done for a file of this machine and for weights that timm publishes.
        names: of the files.

    Raises:
        WeightsError: as `fetch`.
    """
    if weights.revision is None or weights.name in PUBLISHED:
        return
    for name in names:
        _download(weights.name, name, weights.revision, needed=False)


def _download(repository: str, filename: str, revision: str | None, *, needed: bool = True) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    where = f"{filename} of {repository}" + (f" at revision {revision}" if revision else "")
    try:
        file = Path(hf_hub_download(repository, filename, revision=revision))
    except RemoteEntryNotFoundError as error:
        if not needed:
            return None
        raise WeightsError(
            f"{where}: the repository has no such file. Only safetensors in timm's hub layout are read, never pickles."
        ) from error
    except Exception as error:  # of the client, of its HTTP library, or of the system
        instead = "use the model in the package (--model bundled)"
        reason = explain(error, instead=instead) or f"it can not be fetched: {first_line(error)}"
        meant = did_you_mean(repository, map(str, Path(repository).parent.glob("*")))
        raise WeightsError(f"{where}{meant}: {reason}") from error
    if damage := take_out_if_damaged(file):
        raise WeightsError(f"{where}: {damage}")
    return file


def _from_folder(folder: Path, *, name: str | None) -> Weights:
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise WeightsError(f"{folder} has no {CONFIG_FILE}: a folder of weights must be in timm's hub layout.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{config_file} is not JSON: {error}. Fetch it again.") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise WeightsError(
            f'{config_file} names the architecture "{architecture}", which is not a BiT of timm'
            f"{did_you_mean(str(architecture), ARCHITECTURES)}. Known: {', '.join(ARCHITECTURES)}."
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsError(f"{folder} has no {WEIGHTS_FILE}. Only safetensors are read, never pickles.")
    _check_config(config, config_file)
    model_args = {name: value for name, value in config.get("model_args", {}).items() if name != "num_classes"}
    cfg = {**config.get("pretrained_cfg", {}), "num_classes": config.get("num_classes")}
    labels = config.get("label_names")
    return Weights(
        name=name or f"{architecture}.{cfg.get('tag')}",
        file=folder / WEIGHTS_FILE,
        architecture=architecture,
        shape=ARCHITECTURES[architecture].overridden(model_args),
        model_args=model_args,
        pretrained_cfg=cfg,
        std_eps=config.get("std_eps"),
        label_names=tuple(labels) if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else None,
    )


# What shapes a network. timm's create_model has other arguments, and one of them would read a pickle.
_MODEL_ARGS = frozenset(
    "layers channels num_classes in_chans global_pool output_stride width_factor stem_chs stem_type avg_down preact basic "
    "bottle_ratio act_layer norm_layer conv_layer drop_rate drop_path_rate zero_init_last".split()
)


def _numbers(value: Any, count: int, *, kind: type = float, least: float = 0.0) -> bool:
    """Whether these are so many numbers (whole ones, if `kind` is int) above `least`, and none beyond use."""
    kinds = int if kind is int else int | float
    return isinstance(value, list) and len(value) == count and all(
        isinstance(one, kinds) and not isinstance(one, bool) and least < one <= 2**16 for one in value
    )  # fmt: skip


# What is used here of a configuration file, by name: does a value fit, and what would?
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "std_eps": (lambda value: value is None or _numbers([value], 1), "a small positive number"),
    "channels": (lambda value: _numbers(value, 4, kind=int), "four whole numbers"),
    "stem_chs": (lambda value: _numbers([value], 1, kind=int), "a whole number"),
    "width_factor": (lambda value: _numbers([value], 1), "a positive number"),
    "bottle_ratio": (lambda value: _numbers([value], 1), "a positive number"),
    "input_size": (lambda value: _numbers(value, 3, kind=int), "channels, height and width"),
    "mean": (lambda value: _numbers(value, 3, least=-1.0), "a number for each of three channels"),
    "std": (lambda value: _numbers(value, 3), "a positive number for each of three channels"),
    "interpolation": (lambda value: value in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
}


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Raises WeightsError where a value that will be used is not of its kind."""
    args, cfg = config.get("model_args", {}), config.get("pretrained_cfg", {})
    if not (isinstance(args, dict) and isinstance(cfg, dict)):
        raise WeightsError(f"{file}: model_args and pretrained_cfg must be JSON objects. Fetch it again.")
    if foreign := sorted(args.keys() - _MODEL_ARGS):
        raise WeightsError(f'{file}: model_args hold "{foreign[0]}", which does not shape a BiT of timm. Remove it.')
    for name, value in {**config, **args, **cfg}.items():
        if name in _EXPECTED and not _EXPECTED[name][0](value):
            raise WeightsError(f"{file}: {name} is {value!r}; expected {_EXPECTED[name][1]}. Mend it, or fetch the file again.")


def _from_file(path: Path) -> Weights:
    if path.suffix in _PICKLES:
        raise WeightsError(f"{path} may hold a pickle, which can run code when it is read. Give a .safetensors or .npz file.")
    if path.suffix not in (".safetensors", ".npz"):
        raise WeightsError(f'{path}: files of weights end in .safetensors or .npz, not "{path.suffix}".')
    if path.suffix == ".safetensors" and (path.parent / CONFIG_FILE).is_file() and path.name == WEIGHTS_FILE:
        return _from_folder(path.parent, name=str(path))
    shapes = read_shapes(path)
    architecture = _recognise(shapes, path)
    head = shapes.get("head.fc.weight")
    return Weights(
        name=str(path),
        file=path,
        architecture=architecture,
        shape=ARCHITECTURES[architecture],
        pretrained_cfg=_google_cfg(224, head[0] if head else 0, "bilinear"),
    )


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of a file's tensors, in timm's naming, from its header alone.

    Raises:
        WeightsError: the file is damaged, or holds pickled objects.
    """
    if path.suffix == ".npz":
        return {name: tuple(array.shape) for name, array in read_npz(path).items()}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it can not be iterated)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error


_NPZ_UNIT = re.compile(r"block(?P<stage>\d+)/unit(?P<unit>\d+)/(?P<conv>[abc])/(?P<rest>.+)")
_NPZ_LEAF = {
    "standardized_conv2d/kernel": "conv{n}.weight",
    "proj/standardized_conv2d/kernel": "downsample.conv.weight",
    "group_norm/gamma": "norm{n}.weight",
    "group_norm/beta": "norm{n}.bias",
}
_NPZ_OUTSIDE = {
    "root_block/standardized_conv2d/kernel": "stem.conv.weight",
    "group_norm/gamma": "norm.weight",
    "group_norm/beta": "norm.bias",
    "head/conv2d/kernel": "head.fc.weight",
    "head/conv2d/bias": "head.fc.bias",
}
# Bytes: those of the largest BiT with the 21,843 classes of ImageNet-21k, and a quarter more.
_LARGEST = 5 * max(architecture.parameter_count(21_843) for architecture in ARCHITECTURES.values())


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of an original BiT `.npz` file in timm's naming and layout (convolutions as output, input, height, width).

    Layer names with a counter, such as `standardized_conv2d_17` in some of the published files, are understood.

    Raises:
        WeightsError: the file is damaged, holds pickled objects, is larger than any BiT, or is not a BiT's.
    """
    tensors = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            unpacked = sum(member.file_size for member in archive.zip.infolist())
            if unpacked > _LARGEST:
                raise WeightsError(
                    f"{path} would unpack to {size_text(unpacked)}, more than any BiT. Is it an original BiT file?"
                )
            for name in archive.files:
                tensors[_timm_name(name, path)] = np.asarray(archive[name], dtype=np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise WeightsError(f"{path} can not be read as a plain .npz of arrays (pickled objects are refused): {error}") from error
    except Exception as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is damaged: {error}. Fetch it again.") from error
    return {name: np.ascontiguousarray(a.transpose(3, 2, 0, 1)) if a.ndim == 4 else a for name, a in tensors.items()}


def _timm_name(name: str, path: Path) -> str:
    plain = re.sub(r"(standardized_conv2d|group_norm|conv2d)_\d+", r"\1", name.removeprefix("resnet/"))
    if plain in _NPZ_OUTSIDE:
        return _NPZ_OUTSIDE[plain]
    match = _NPZ_UNIT.fullmatch(plain)
    if match and match["rest"] in _NPZ_LEAF:
        leaf = _NPZ_LEAF[match["rest"]].format(n="abc".index(match["conv"]) + 1)
        return f"stages.{int(match['stage']) - 1}.blocks.{int(match['unit']) - 1}.{leaf}"
    raise WeightsError(f'{path} holds an array "{name}", which no BiT has. Is it an original BiT file?')


def _recognise(shapes: Shapes, path: Path) -> str:
    """The published architecture with these many blocks and this width."""
    if len(shapes.get("stem.conv.weight", ())) != 4:
        raise WeightsError(f'{path} has no "stem.conv.weight" of four dimensions: it is not a BiT in timm\'s naming.')
    depths = tuple(
        1 + max((int(m[1]) for name in shapes if (m := re.match(rf"stages\.{stage}\.blocks\.(\d+)\.", name))), default=-1)
        for stage in range(4)
    )
    width = shapes["stem.conv.weight"][0]
    for name, shape in ARCHITECTURES.items():
        if shape.layers == depths and shape.stem_channels == width:
            return name
    raise WeightsError(
        f"{path} holds a network of {depths} blocks with {width} stem channels, which is none of timm's BiTs. If it is one with "
        f"narrower channels, put timm's {CONFIG_FILE} with its model_args beside a {WEIGHTS_FILE} and give the folder."
    )


def size_text(count: float, unit: str = "B") -> str:
    """A count for people: 25.5 M, 102 MB."""
    if count < 1000:
        return f"{count:.0f} {unit}".rstrip()
    exponent = min(int(math.log10(count) // 3), 4)
    return f"{count / 1000**exponent:.3g} {'kMGT'[exponent - 1]}{unit}"
