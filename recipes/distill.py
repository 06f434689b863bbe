"""Distill a BiT into another by function matching: both see the same crop and the same mixed images, and there are no labels.

    accelerate launch recipes/distill.py --teacher runs/NAME/model --model bundled --dataset path/to/pictures/in/folders

Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", 2022. The weight of mixing is uniform on [0, 1]
unless --mixup-alpha says otherwise. The paper's schedules are long: 300 passes over ImageNet, 1,000 and more over small sets.
"""

import sys
from collections.abc import Sequence

from bit_mixup.cli import main as command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `bit-mixup distill` with these arguments."""
    command(["distill", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
