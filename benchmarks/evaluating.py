"""How long does it take to score pictures that are decoded already, beside the loops of others?

    OMP_NUM_THREADS=1 python benchmarks/evaluating.py

R50x1 at 128 pixels, random weights, batches of 16, one thread. Logits must agree within 1e-4 in fp32, and in bf16 within its
rounding.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import peers
import torch
from harness import Work, check, interleave, save, table
from torch import Tensor

from bit_mixup.prediction import Predictor

EDGE, BATCH = 128, 16
TARGETS = {"ours, bf16": {"timm": 0.50, "timm, bf16": 0.88}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/evaluating.json"))
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    base = peers.r50x1().eval()
    big, hf = peers.big_transfer_of(base).eval(), peers.transformers_of(base).eval()
    batches = torch.randn(asked.batches, BATCH, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0))
    predictors = {half: Predictor(peers.r50x1(), torch.device("cpu"), precision=half) for half in ("fp32", "bf16")}  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}

    def way(name: str, network: Callable[[Tensor], Tensor], bf16: bool = False) -> Callable[[], Work]:
        def work() -> Work:
            with torch.inference_mode(), peers.autocast(bf16):
                found[name] = torch.cat([network(images).float() for images in batches])
            return Work(steps=asked.batches, images=asked.batches * BATCH, value=float(found[name].abs().sum()))

        return work

    ways = {
        "timm": way("timm", base),
        "big_transfer": way("big_transfer", big),
        "transformers": way("transformers", lambda images: hf(images).logits),
        "ours": way("ours", predictors["fp32"].logits),
        "timm, bf16": way("timm, bf16", base, bf16=True),
        "ours, bf16": way("ours, bf16", predictors["bf16"].logits),
    }
    rows = interleave(ways, rounds=asked.rounds, tolerance={name: 0.1 if "bf16" in name else 1e-3 for name in ways})
    exact = found["timm"]
    differences = {name: float((logits - exact).abs().max() / exact.abs().max()) for name, logits in found.items()}
    print(table(rows))
    assert max(value for name, value in differences.items() if "bf16" not in name) < 1e-4, differences
    checks = check(rows, TARGETS)
    print("largest difference of a logit, as a share of the largest logit:", differences)
    save(asked.json, {"evaluation": rows}, checks=checks, differences=differences)


if __name__ == "__main__":
    main()
