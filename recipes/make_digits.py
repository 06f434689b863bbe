"""Writes the handwritten digits that ship in the package, from the copy that scikit-learn carries.

    pip install scikit-learn
    python recipes/make_digits.py bit_mixup/digits

UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), its test part: 1,797 pictures of 8 x 8 pixels,
CC BY 4.0. Values 0 to 16 become 0 to 255. 1,000 training and 797 test examples, stratified, with a fixed seed.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAIN_SIZE = 1000


def main(argv: list[str] | None = None) -> None:
    """Writes train.parquet and test.parquet into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    rows = train_test_split(np.arange(len(pixels)), train_size=TRAIN_SIZE, stratify=digits.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in zip(("train", "test"), rows, strict=True):
        columns = {"image": [Pillow.fromarray(pixels[row]) for row in chosen], "label": digits.target[chosen].tolist()}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    main()
