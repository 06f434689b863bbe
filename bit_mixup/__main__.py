"""python -m bit_mixup"""

from bit_mixup.cli import main

if __name__ == "__main__":
    main()
