"""Pre-train a BiT on your own upstream data by BiT's upstream recipe; transfer from the run's `model/` afterwards.

    accelerate launch recipes/pretrain.py --dataset path/to/class/folders --model resnetv2_50x1_bit --epochs 90
    torchrun --standalone --nproc_per_node 2 recipes/pretrain.py --dataset digits --model bundled --steps 200 --no-flip

The same code as `bit-mixup pretrain` and `bit_mixup.pretrain`, with the same options. A column of lists of labels is trained with
a sigmoid loss.
"""

import sys
from collections.abc import Sequence

from bit_mixup.cli import main as command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `bit-mixup pretrain` with these arguments."""
    command(["pretrain", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
