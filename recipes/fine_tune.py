"""Fine-tune a pretrained BiT on a data set; the BiT-HyperRule chooses what no flag names.

    accelerate launch recipes/fine_tune.py --dataset uoft-cs/cifar10 --model resnetv2_50x1_bit.goog_in21k
    torchrun --standalone --nproc_per_node 2 recipes/fine_tune.py --dataset digits --model bundled

The same code as `bit-mixup fine-tune` and `bit_mixup.transfer`, with the same options; `bit-mixup plan` shows beforehand
what they come to.
"""

import sys
from collections.abc import Sequence

from bit_mixup.cli import main as command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `bit-mixup fine-tune` with these arguments."""
    command(["fine-tune", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
