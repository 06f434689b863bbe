"""How long does `predict` take for a picture, beside the loop that timm's documentation shows?

    OMP_NUM_THREADS=1 python benchmarks/predicting.py

Both read the same files, one after the other in each round, in one process with one thread, and must agree on every probability.
The model is the bundled one after two steps on the digits: what it knows has no say in the time it takes.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from harness import Work, interleave, save, table
from PIL import Image

import bit_mixup


def plain_timm(model_folder: Path, files: list[Path], batch_size: int) -> torch.Tensor:
    """The loop as timm's documentation has it: a transform from the model's own configuration, batches, softmax."""
    model = timm.create_model(f"local-dir:{model_folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg, model=model), is_training=False)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(files), batch_size):
            pictures = [transform(Image.open(file).convert("RGB")) for file in files[start : start + batch_size]]
            parts.append(model(torch.stack(pictures)).softmax(1))
    return torch.cat(parts)


def digits(folder: Path, number: int) -> list[Path]:
    """Test digits as PNG files of 8 x 8 pixels."""
    files = []
    for index, picture in enumerate(bit_mixup.load_image_dataset("digits").test.read(range(number))):
        files.append(folder / f"{index:04}.png")
        picture.save(files[-1])
    return files


def photographs(folder: Path, number: int) -> list[Path]:
    """Synthetic JPEG files of 400 x 300 pixels, as smooth as photographs are, so that they weigh some 30 kB."""
    draw = np.random.default_rng(0)
    files = []
    for index in range(number):
        small = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        files.append(folder / f"{index:04}.jpg")
        small.resize((400, 300), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/predicting.json"))
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts = {}
    with tempfile.TemporaryDirectory() as place:
        run = bit_mixup.transfer(
            dataset="digits",
            model="bundled",
            resolution="model",
            steps=2,
            batch_size=16,
            threads=1,
            output_dir=Path(place) / "run",
        )
        torch.set_num_threads(1)
        for name, make in (("PNG of 8 x 8", digits), ("JPEG of 400 x 300", photographs)):
            folder = Path(place) / name.replace(" ", "_")
            folder.mkdir()
            files = make(folder, asked.pictures)

            def ours(files: list[Path] = files) -> Work:
                classifier = bit_mixup.load(run.output_dir)
                said = classifier.predict(files)
                order = [
                    [dict(zip(one.classes, one.probabilities, strict=True))[label] for label in classifier.label_names]
                    for one in said
                ]
                ours.found = np.array(order)  # type: ignore[attr-defined]
                return Work(steps=-(-len(files) // 64), images=len(files), value=float(ours.found.max(1).sum()))  # type: ignore[attr-defined]

            def plain(files: list[Path] = files) -> Work:
                plain.found = plain_timm(run.output_dir / "model", files, 64).numpy()  # type: ignore[attr-defined]
                return Work(steps=-(-len(files) // 64), images=len(files), value=float(plain.found.max(1).sum()))  # type: ignore[attr-defined]

            parts[name] = interleave({"timm's loop": plain, "`bit_mixup.load(...).predict`": ours}, rounds=asked.rounds)
            difference = np.abs(ours.found - plain.found).max()  # type: ignore[attr-defined]
            assert difference < 1e-4
            print(f"\n{name}, {len(files)} files, with loading the model; largest difference of a probability {difference:.1e}\n")
            print(table(parts[name]))
    save(asked.json, parts)


if __name__ == "__main__":
    main()
