"""What does a network that is not trained make of each picture? Computed once, and kept.

A linear probe asks for the same features in each run. They are kept in a folder whose name is a hash of all that decides them:
the encoded pictures in their order, the weights, how pictures are resized and normalised, precision, device and versions.
Threads, processes and the size of a batch are not in it: they change rounding alone, and what is kept stays the same.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup.checkpoint import digest_weights
from bit_mixup.data import Part
from bit_mixup.environment import Precision, versions
from bit_mixup.errors import CheckpointError, DataError
from bit_mixup.examples import EvaluationView
from bit_mixup.images import View
from bit_mixup.models import Normalize
from bit_mixup.prediction import predict_features
from bit_mixup.storage import whole_folder, write_json
from bit_mixup.voting import Council
from bit_mixup.weights import size_text

_FILE, _RECIPE = "features.safetensors", "recipe.json"
_CHUNK = 256  # pictures whose encoded bytes are in memory together


def kept_features(
    model: ResNetV2,
    part: Part,
    view: View,
    accelerator: Accelerator,
    *,
    about: Mapping[str, Any],
    folder: Path,
    precision: Precision = "fp32",
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[Tensor, list[str]]:
    """Pooled features of all examples of a part on the evaluation view, (N, F) float32, the same in every process.

    Args:
        model: is moved to the device and set to evaluation mode where they have to be computed.
        part: the examples.
        view: how their pictures are resized.
        accelerator: of this process.
        about: what else decides them, as plain values: the network's arguments.
        folder: where features are kept, those of all recipes.
        precision: of convolutions.
        batch_size: of a forward pass, at most.
        num_workers: processes that decode pictures.

    Returns:
        The features, and what people should know: where they come from and where they are.

    Raises:
        DataError: a picture can not be read, or is broken.
    """
    council = Council(accelerator)
    with council.sharing_faults():
        recipe = _recipe(model, view, accelerator, {**about, "precision": precision})
        recipe["pictures"] = digest_pictures(part) if council.is_main else ""
    recipe["pictures"] = council.gather(recipe["pictures"])[0]
    place = folder / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:24]
    shape = (len(part), int(model.num_features))
    features, damage = _read(place, shape)
    held = council.gather("" if features is None else digest_tensor(features))
    if features is not None and len(set(held)) == 1:
        return features, [f"features of {len(part):,} pictures read from {place}"]
    start = time.perf_counter()
    pictures = EvaluationView(part=part, view=view)
    features = predict_features(model, pictures, accelerator, batch_size=batch_size, num_workers=num_workers, precision=precision)
    took = f"{time.perf_counter() - start:.3g} s"
    notes = [f"NOTE: {damage}; they are computed anew"] if damage else []
    where = _keep(place, features, recipe) if council.is_main else ""
    return features, [*notes, f"features of {len(part):,} pictures computed in {took}, {where}"]


def _recipe(model: ResNetV2, view: View, accelerator: Accelerator, about: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the features but for the pictures, as plain values."""
    normalize = Normalize.of(model)
    return {
        **about,
        "weights": digest_weights(model),
        "crop_size": view.crop_size,
        "interpolation": view.interpolation,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
        "device": accelerator.device.type,
        "versions": versions(),
    }


def digest_pictures(part: Part) -> str:
    """A hash of the encoded pictures of a part, in their order; nothing is decoded.

    Raises:
        DataError: a file can not be read.
    """
    digest = hashlib.sha256()
    for start in range(0, len(part), _CHUNK):
        indices = range(start, min(start + _CHUNK, len(part)))
        for index, encoded in zip(indices, part.encoded(indices), strict=True):
            try:
                content = encoded["bytes"] if encoded.get("bytes") is not None else Path(encoded["path"]).read_bytes()
            except (OSError, TypeError) as error:
                raise DataError(f"{part.where(index, encoded)} can not be read: {error}. Mend or remove it.") from error
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """A hash of a tensor's shape and bytes."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + content.tobytes()).hexdigest()


def _read(place: Path, shape: tuple[int, int]) -> tuple[Tensor | None, str]:
    """The features that are kept at a place; or None, and what is wrong with those that should be there."""
    file = place / _FILE
    if not place.exists():
        return None, ""
    try:
        with safe_open(file, framework="pt") as opened:
            features, metadata = opened.get_tensor("features"), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        return None, f"{file} can not be read ({error})"
    if features.shape != shape or features.dtype != torch.float32 or metadata.get("digest") != digest_tensor(features):
        return None, f"{file} is damaged: what it holds is not what was written"
    return features, ""


def _keep(place: Path, features: Tensor, recipe: Mapping[str, Any]) -> str:
    """Keeps features for other runs, and says where. This run can do without."""
    try:
        with whole_folder(place) as part:
            content = {"features": features.contiguous()}
            safetensors.torch.save_file(content, part / _FILE, metadata={"digest": digest_tensor(features)})
            write_json(part / _RECIPE, dict(recipe))
    except CheckpointError as error:
        if not place.exists():  # or else another run has kept the same meanwhile
            return f"but not kept: {error}"
    return f"kept in {place} ({size_text(4 * features.numel())})"
