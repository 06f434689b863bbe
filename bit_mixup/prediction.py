"""What does a model say about pictures?"""

from collections.abc import Callable
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from timm.models.resnetv2 import ResNetV2
from torch import Tensor
from tqdm import tqdm

from bit_mixup.environment import Precision
from bit_mixup.errors import MemoryShortError
from bit_mixup.examples import EvaluationView
from bit_mixup.layers import make_quick
from bit_mixup.loading import load_batches
from bit_mixup.memory import avoid_broken_primitives, is_out_of_memory, release_memory
from bit_mixup.models import Normalize, fold_weight_standardisation, forward, round_filters


class Predictor:
    """What gives a model's logits and features soonest: a copy with weight standardisation folded into its filters.

    Folding is exact; channels last, as which the copy is laid out, changes rounding. Where memory does not do for a copy, it is
    the model itself.

    Args:
        model: is moved to the device and set to evaluation mode.
        device: to predict on.
        precision: of convolutions. In bf16 on a CPU the copy's filters are rounded once, not in each pass; logits are fp32.
    """

    def __init__(self, model: ResNetV2, device: torch.device, *, precision: Precision = "fp32") -> None:
        self.network = model.to(device).eval()
        self.dtype = next(model.parameters()).dtype
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        try:
            self.network = fold_weight_standardisation(model).to(memory_format=torch.channels_last)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if self.network is model:
            release_memory()
        else:
            make_quick(self.network)
            if self.half is torch.bfloat16 and device.type == "cpu":
                self.dtype, self.half = torch.bfloat16, None
                round_filters(self.network, self.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """(N, K) of normalised images (N, 3, H, W), fp32 where convolutions are in half precision."""
        return self._forward(images, lambda pictures: forward(self.network, pictures))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, F) of normalised images (N, 3, H, W), likewise."""
        return self._forward(
            images, lambda pictures: self.network.forward_head(self.network.forward_features(pictures), pre_logits=True)
        )

    def _forward(self, images: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        pictures = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None):
            outputs = network(pictures)
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def predict_logits(
    model: ResNetV2,
    view: EvaluationView,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: Precision = "fp32",
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits of all examples, (N, K) float32 on the CPU, in their order and in every process.

    Each process takes a run of consecutive examples; each example is seen exactly once, whatever the number of processes.

    Args:
        model: is moved to the device and set to evaluation mode.
        view: the examples.
        accelerator: of this process.
        batch_size: of a forward pass, at most: less where memory does not do.
        num_workers: processes that decode pictures.
        precision: of convolutions.
        change: applied to normalised pictures (n, 3, H, W) before the model sees them.
    """
    predictor = Predictor(model, accelerator.device, precision=precision)

    def logits_of(images: Tensor) -> Tensor:
        return predictor.logits(change(images) if change else images)

    return _predict(model, view, accelerator, logits_of, int(model.num_classes), batch_size, num_workers)


def predict_features(
    model: ResNetV2,
    view: EvaluationView,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: Precision = "fp32",
) -> Tensor:
    """Pooled features of all examples, (N, F) float32, as `predict_logits` gives logits."""
    predictor = Predictor(model, accelerator.device, precision=precision)
    return _predict(model, view, accelerator, predictor.features, int(model.num_features), batch_size, num_workers)


@torch.no_grad()
def _predict(
    model: ResNetV2,
    view: EvaluationView,
    accelerator: Accelerator,
    outputs_of: Callable[[Tensor], Tensor],
    width: int,
    batch_size: int,
    num_workers: int,
) -> Tensor:
    shares = np.array_split(np.arange(len(view)), accelerator.num_processes)
    own = shares[accelerator.process_index].tolist()
    lists = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    normalize, dtype = Normalize.of(model), next(model.parameters()).dtype
    parts = [torch.empty(0, width, device=accelerator.device)]
    shown = {"total": len(lists), "desc": "evaluating", "unit": "batch", "disable": not accelerator.is_main_process}
    loaded = load_batches(view, lists, num_workers=num_workers, device=accelerator.device)
    with torch.inference_mode(), closing(loaded) as batches:
        for images, _ in tqdm(batches, **shown):
            parts.append(in_pieces_that_fit(outputs_of, normalize(images, dtype)).float())
    outputs = torch.cat(parts)
    longest = len(shares[0])
    padded = torch.cat([outputs, outputs.new_zeros(longest - len(outputs), width)])
    gathered = accelerator.gather(padded).cpu().split(longest) if longest else [padded.cpu()]
    return torch.cat([rows[: len(share)] for rows, share in zip(gathered, shares, strict=False)])


def in_pieces_that_fit(outputs_of: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Outputs of pictures (n, 3, H, W), all at a time; in halves where memory does not do, down to one by one."""
    try:
        return outputs_of(images)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        avoid_broken_primitives(error)
    if len(images) == 1:
        raise MemoryShortError(
            f"a picture of {images.shape[2]} x {images.shape[3]} pixels alone does not fit into memory with this model. Lower "
            "crop_size, choose a smaller model, or use --precision bf16."
        )
    release_memory()
    return torch.cat([in_pieces_that_fit(outputs_of, half) for half in images.tensor_split(2)])


def nearest_neighbours(features: Tensor, count: int, *, chunk: int = 1024) -> list[npt.NDArray[np.int64]]:
    """For each row of features (N, F) the indices of the `count` nearest others by Euclidean distance, nearest first.

    With fewer than `count` others all of them are given; a row without others is its own neighbour.
    """
    if len(features) < 2:
        return [np.zeros(1, dtype=np.int64) for _ in range(len(features))]
    found = []
    for start in range(0, len(features), chunk):
        distances = torch.cdist(features[start : start + chunk], features)
        own = torch.arange(len(distances))
        distances[own, start + own] = torch.inf
        found += list(distances.topk(min(count, len(features) - 1), largest=False).indices.numpy())
    return found
