"""How does a pretrained BiT get into memory, with a head for the new task, and out again?

timm builds the networks; this file fills them, strictly: nothing is left at random and no head is kept or lost unasked.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers.std_conv import StdConv2d
from timm.models import save_for_hf
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup.environment import versions
from bit_mixup.errors import WeightsError
from bit_mixup.images import View
from bit_mixup.laws import Trainable
from bit_mixup.storage import read_json, write_json
from bit_mixup.weights import CONFIG_FILE, Weights, fetch, find_weights, read_npz

logger = logging.getLogger(__name__)

TIMM_STD_EPS = 1e-8
REFERENCE_STD_EPS = 1e-10
_HEAD = "head.fc."


def load_bit(
    name_or_path: str,
    *,
    num_classes: int | None = None,
    keep_head: bool = False,
    std_eps: float | None = None,
    revision: str | None = None,
) -> ResNetV2:
    """Loads a pretrained BiT; downloads it from the hub if need be.

    Args:
        name_or_path: see `bit_mixup.find_weights`.
        num_classes: outputs of a new head, which is exactly zero as in the paper. Leave it out only with `keep_head`.
        keep_head: keep the head of the file instead.
        std_eps: added to the variance in weight standardisation. None: what the file says, else 1e-8 as in timm, whose published
            accuracies were measured so; the authors' code has 1e-10.
        revision: branch, tag or commit on the hub.

    Raises:
        WeightsError: see `bit_mixup.find_weights`; or a tensor is missing, unknown or of a wrong shape.
    """
    weights = fetch(find_weights(name_or_path), revision=revision)
    return build_bit(weights, num_classes=num_classes, keep_head=keep_head, std_eps=std_eps)


def build_bit(
    weights: Weights, *, num_classes: int | None = None, keep_head: bool = False, std_eps: float | None = None
) -> ResNetV2:
    """Builds the network of a file that is on this machine; arguments and errors as `load_bit`."""
    tensors = _read_tensors(weights)
    head_classes = len(tensors[f"{_HEAD}weight"]) if f"{_HEAD}weight" in tensors else None
    if keep_head:
        if head_classes is None:
            raise WeightsError(f"{weights.file} has no head to keep. Give num_classes for a new one.")
        if num_classes not in (None, head_classes):
            raise WeightsError(
                f"{weights.file} has a head of {head_classes} classes, but {num_classes} are asked for together with keep_head. "
                "Leave out one of the two."
            )
        num_classes = head_classes
    elif num_classes is None:
        raise WeightsError("num_classes is needed for the new head (or keep_head to keep the file's).")
    elif num_classes < 1:
        raise WeightsError(f"num_classes is {num_classes}; it must be at least 1.")
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
        if head_classes:
            logger.warning("%s: its head of %s classes is left out, the new one is zero", weights.name, f"{head_classes:,}")
    full_name = weights.name if weights.name.startswith(f"{weights.architecture}.") else weights.architecture
    cfg = dict(weights.pretrained_cfg)
    if full_name in timm.list_pretrained("resnetv2_*_bit*"):
        published = timm.get_pretrained_cfg(full_name)
        assert published is not None
        cfg = {**published.to_dict(), **cfg}
    try:
        model = timm.create_model(
            weights.architecture, pretrained=False, num_classes=num_classes, pretrained_cfg=cfg, **weights.model_args
        )
    except Exception as error:  # timm raises many kinds on arguments that it can not use
        raise WeightsError(
            f"{weights.file}: timm can not build {weights.architecture} with {weights.model_args}: "
            f"{type(error).__name__}: {error}"
        ) from error
    _fill(model, tensors, weights, keep_head=keep_head)
    set_std_eps(model, std_eps if std_eps is not None else weights.std_eps or TIMM_STD_EPS)
    assert isinstance(model, ResNetV2)
    return model


def create_bit(weights: Weights, *, num_classes: int, seed: int, std_eps: float = TIMM_STD_EPS) -> ResNetV2:
    """The network of some weights before its training: timm's random weights, drawn from a seed, and a head of zeros.

    Args:
        weights: whose architecture and input size it gets; the file is not read.
        num_classes: outputs of the head.
        seed: of the weights; torch's own generator is left as it was.
        std_eps: added to the variance in weight standardisation.
    """
    cfg = {k: v for k, v in weights.pretrained_cfg.items() if k in ("input_size", "mean", "std", "interpolation")}
    cfg |= {"first_conv": "stem.conv", "classifier": "head.fc", "num_classes": num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            weights.architecture, pretrained=False, num_classes=num_classes, pretrained_cfg=cfg, **weights.model_args
        )
    assert isinstance(model, ResNetV2)
    for parameter in model.get_classifier().parameters():
        torch.nn.init.zeros_(parameter)
    set_std_eps(model, std_eps)
    return model


def _read_tensors(weights: Weights) -> dict[str, Tensor]:
    assert weights.file is not None, "fetch() comes first"
    if weights.file.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in read_npz(weights.file).items()}
    try:
        return safetensors.torch.load_file(weights.file)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{weights.file} is not a whole safetensors file: {error}. Fetch it again.") from error


def _fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], weights: Weights, *, keep_head: bool) -> None:
    """Copies every tensor into the network and zeroes a new head; all names and shapes must match."""
    wanted = model.state_dict()
    body = [name for name in wanted if keep_head or not name.startswith(_HEAD)]
    missing = [name for name in body if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        parts = [f"{kind} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                 for kind, names in (("lacks", missing), ("has the unknown", unknown)) if names]  # fmt: skip
        raise WeightsError(f"{weights.file} does not fit {weights.architecture}: it {' and '.join(parts)}.")
    for name in body:
        if tensors[name].shape != wanted[name].shape:
            raise WeightsError(
                f"{weights.file}: {name} has the shape {tuple(tensors[name].shape)}, but {weights.architecture} needs "
                f"{tuple(wanted[name].shape)}."
            )
    head = {} if keep_head else {name: torch.zeros_like(value) for name, value in wanted.items() if name.startswith(_HEAD)}
    model.load_state_dict({**{name: tensors[name] for name in body}, **head})


def set_std_eps(model: torch.nn.Module, std_eps: float) -> None:
    """Sets what weight standardisation adds to the variance of each filter, in place."""
    for module in model.modules():
        if isinstance(module, StdConv2d):
            module.eps = std_eps


@torch.no_grad()
def fold_weight_standardisation(model: ResNetV2) -> ResNetV2:
    """A copy whose convolutions hold their standardised filters, in evaluation mode: for prediction alone, and as exact.

    Weight standardisation is a function of the filters only, so what it gives can be kept once training is over. The copy has
    plain convolutions and the same tensors by the same names; trained any further, it would be another network.

    Args:
        model: left as it is.
    """
    folded = copy.deepcopy(model).eval()
    for name, module in list(folded.named_modules()):
        if not isinstance(module, StdConv2d):
            continue
        weight, old = module.weight, cast(Any, module)
        rows = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True, momentum=0.0, eps=module.eps)
        plain = torch.nn.Conv2d(
            old.in_channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding, dilation=old.dilation,
            groups=old.groups, bias=old.bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        plain.weight.copy_(rows.reshape_as(weight))
        if module.bias is not None:
            assert plain.bias is not None
            plain.bias.copy_(module.bias)
        folded.set_submodule(name, plain.eval())
    return folded


def round_filters(model: ResNetV2, dtype: torch.dtype) -> None:
    """Casts the filters of all convolutions but the head, in place; norms and head keep their type."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.startswith(_HEAD.rstrip(".")):
            module.to(dtype)


@dataclass(frozen=True, kw_only=True)
class StdEpsEffect:
    """What the choice of `std_eps` does to a model.

    Args:
        smallest_variance: over all filters.
        relative_change: largest change of a logit between 1e-8 and 1e-10, as a share of the largest logit, on two seeded random
            images (of a pooled feature, where the head is zero and all logits with it).
        of: "logits" or "features".
    """

    smallest_variance: float
    relative_change: float
    of: str


@torch.no_grad()
def std_eps_effect(model: ResNetV2) -> StdEpsEffect:
    """Measures `StdEpsEffect`; the model is left as it was."""
    filters = [module for module in model.modules() if isinstance(module, StdConv2d)]
    variance = min(float(f.weight.flatten(1).var(dim=1, unbiased=False).min()) for f in filters)
    weight = next(model.parameters())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(weight)
    kept, training = filters[0].eps, model.training
    model.eval()
    has_head = any(bool(p.any()) for p in model.get_classifier().parameters())
    outputs = []
    for eps in (TIMM_STD_EPS, REFERENCE_STD_EPS):
        set_std_eps(model, eps)
        features = model.forward_features(images)
        outputs.append(model.forward_head(features, pre_logits=not has_head))
    set_std_eps(model, kept)
    model.train(training)
    change = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    return StdEpsEffect(smallest_variance=variance, relative_change=float(change), of="logits" if has_head else "features")


class LinearProbe(torch.nn.Module):
    """The head of a BiT as a network of its own, which is shown pooled features (N, F) in the place of pictures.

    It shares its weights with the model, under the same names: what trains the one trains the other.

    Args:
        model: whose head it is.
    """

    def __init__(self, model: ResNetV2) -> None:
        super().__init__()
        self.head, self.num_classes = model.head, int(model.num_classes)

    def get_classifier(self) -> torch.nn.Module:
        """The layer from features to logits, as timm's models give it."""
        layer: torch.nn.Module = self.head.fc
        return layer

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Does nothing: between features and logits there are no activations to save."""


Network = ResNetV2 | LinearProbe


def freeze(model: ResNetV2, trainable: Trainable) -> None:
    """Lets a backward pass reach all weights of a model, or the last stage, the normalisation behind it and the head ("stage4"),
    or the head alone."""
    trained: dict[Trainable, list[torch.nn.Module]] = {
        "all": [model],
        "stage4": [model.stages[-1], model.norm, model.head],
        "head": [model.head],
    }
    model.requires_grad_(False)
    for part in trained[trainable]:
        part.requires_grad_(True)


Change = Callable[[Tensor], Tensor]


def forward(
    model: Network,
    images: Tensor,
    *,
    stage: int = 0,
    change_stage: Change | None = None,
    change_features: Change | None = None,
    cosine: float | None = None,
) -> Tensor:
    """Logits (N, K) of normalised images (N, 3, H, W), as `model(images)`.

    timm's head is a convolution with 1 x 1 filters. As the matrix product that it is, it takes a fraction of the time on a CPU
    where classes go by the thousand.

    Args:
        model: whose logits are asked for.
        images: normalised; of a `LinearProbe` features (N, F).
        stage: after which of the four stages, from 1, `change_stage` is applied to the feature maps (N, C, H', W').
        change_stage: in place of nothing.
        change_features: applied to the pooled features (N, F) before the head.
        cosine: where given, logits are this many times the cosine between features and the head's rows, without its bias.
    """
    if isinstance(model, LinearProbe):
        features = images
    else:
        features = model.forward_head(_feature_maps(model, images, stage, change_stage), pre_logits=True)
    head: Any = model.get_classifier()
    if not torch.is_autocast_enabled(features.device.type):
        features = features.to(head.weight.dtype)  # of filters in half precision
    features, rows = change_features(features) if change_features else features, head.weight.flatten(1)
    if cosine is not None:
        return cosine * F.linear(F.normalize(features.to(rows.dtype)), F.normalize(rows))
    return F.linear(features, rows, head.bias)


def draw_head(model: ResNetV2, *, seed: int) -> None:
    """Gives the head random rows of about length 1, in place: a row of zeros has no direction."""
    weight: Tensor = model.get_classifier().weight
    torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def linear_head(model: ResNetV2, images: Iterable[Tensor], *, cosine: float) -> None:
    """Turns a head that was trained by cosines into the linear one that stands for it in a model file, in place.

    Each picture gets the same class as by cosines; its logits are those of its cosines, times the length of its features beside
    the mean length over some pictures.

    Args:
        model: in any mode; it is left in that of evaluation.
        images: batches (N, 3, H, W), normalised.
        cosine: the factor in `forward`.
    """
    model.eval()
    lengths = [model.forward_head(model.forward_features(batch), pre_logits=True).norm(dim=1) for batch in images]
    weight: Tensor = model.get_classifier().weight
    weight.copy_(F.normalize(weight.flatten(1)).view_as(weight) * (cosine / torch.cat(lengths).mean()))


def _feature_maps(model: ResNetV2, images: Tensor, stage: int, change_stage: Change | None) -> Tensor:
    """The maps (N, F, H', W') behind the last normalisation."""
    if change_stage is None:
        maps: Tensor = model.forward_features(images)
        return maps
    maps = model.stem(images)
    for number, block in enumerate(model.stages, start=1):
        maps = block(maps)
        maps = change_stage(maps) if number == stage else maps
    maps = model.norm(maps)
    return maps


@dataclass(frozen=True)
class Normalize:
    """Turns bytes into the floats that a model expects; on the device, in batches.

    Args:
        mean: of the three channels, for values in [0, 1].
        std: of the three channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: ResNetV2) -> "Normalize":
        """As the model's pretrained configuration says."""
        cfg: Any = model.pretrained_cfg
        return cls(tuple(cfg["mean"]), tuple(cfg["std"]))

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, 3, H, W) uint8 as (N, 3, H, W) of `dtype`, by the same operations as torchvision's ToTensor and Normalize."""
        pictures = images.to(dtype)
        mean, std = self.constants(pictures)
        return pictures.div_(255).sub_(mean).div_(std)

    def constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (3, 1, 1) each, on the device and in the type of another tensor."""
        mean, std = (_constant(values, like.dtype, like.device) for values in (self.mean, self.std))
        return mean, std


@functools.cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as (N, 1, 1) on a device; kept there, since sending them in each step would wait for the device."""
    with torch.inference_mode(False):  # whoever asks first: gradients may have to go through it later
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def as_input(model: Network, batch: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """What a network takes: of pictures (N, 3, H, W) uint8 normalised ones, laid out as asked; features (N, F) as they are."""
    if isinstance(model, LinearProbe):
        return batch.to(dtype)
    return Normalize.of(model)(batch, dtype).contiguous(memory_format=memory_format)


def save_model(model: ResNetV2, folder: Path, *, label_names: Sequence[str], view: View, std_eps: float) -> None:
    """Writes a model in timm's hub layout: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Args:
        model: on any device, not wrapped.
        folder: where `model.safetensors` and `config.json` are written.
        label_names: of the classes, in the order of the logits.
        view: how its pictures are resized; recorded as timm's squash to the crop's edge.
        std_eps: recorded for `load_bit`; timm itself always takes 1e-8.
    """
    normalize = Normalize.of(model)
    data_config: dict[str, Any] = {
        "input_size": (3, view.crop_size, view.crop_size),
        "interpolation": view.interpolation,
        "mean": normalize.mean,
        "std": normalize.std,
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    model_config = {
        "num_classes": len(label_names),
        "label_names": list(label_names),
        "std_eps": std_eps,
        "versions": versions(),  # of the libraries that it was trained with
    }
    save_for_hf(model, str(folder), model_config=model_config, safe_serialization=True, data_config=data_config)
    config = read_json(folder / CONFIG_FILE)
    config["model_args"].pop("num_classes", None)  # it stands above, and transformers would pass it twice
    write_json(folder / CONFIG_FILE, config)
