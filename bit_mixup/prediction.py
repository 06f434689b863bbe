"""What does a model say about pictures?"""

import numpy as np
import torch
from accelerate import Accelerator
from timm.models.resnetv2 import ResNetV2
from torch import Tensor
from tqdm import tqdm

from bit_mixup.examples import EvaluationView
from bit_mixup.loading import load_batches
from bit_mixup.models import Normalize, forward


@torch.no_grad()
def predict_logits(
    model: ResNetV2,
    view: EvaluationView,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """Logits of all examples, (N, K) float32 on the CPU, in their order and in every process.

    Each process takes a run of consecutive examples; each example is seen exactly once, whatever the number of processes.
    """
    shares = np.array_split(np.arange(len(view)), accelerator.num_processes)
    own = shares[accelerator.process_index].tolist()
    lists = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    normalize, dtype = Normalize.of(model), next(model.parameters()).dtype
    model.to(accelerator.device).eval()
    parts = [torch.empty(0, int(model.num_classes), device=accelerator.device)]
    batches = load_batches(view, lists, num_workers=num_workers, device=accelerator.device)
    for images, _ in tqdm(batches, total=len(lists), desc="evaluating", unit="batch", disable=not accelerator.is_main_process):
        with accelerator.autocast():
            parts.append(forward(model, normalize(images, dtype)).float())
    logits = torch.cat(parts)
    longest = len(shares[0])
    padded = torch.cat([logits, logits.new_zeros(longest - len(logits), logits.shape[1])])
    gathered = accelerator.gather(padded).cpu().split(longest) if longest else [padded.cpu()]
    return torch.cat([rows[: len(share)] for rows, share in zip(gathered, shares, strict=False)])
