"""How many pictures a second does one core prepare for training, beside big_transfer's torchvision pipeline?

    OMP_NUM_THREADS=1 python benchmarks/input.py

From encoded bytes in memory to a batch on the device, by one thread: big_transfer decodes, resizes, crops, mirrors and
normalises one picture after the other; ours cuts the crop while it resizes, and normalises the batch of bytes on the device.
Ours is also shown without that last step, which an accelerator does. The pictures are synthetic: noise on slopes, JPEG of
400 x 300 pixels and some 40 kB, PNG of 32 x 32 pixels. Two more rows are there to be rejected: decoding JPEG at a smaller scale
first ("draft"), and resizing on tensors; how far their pixels are from those of the reference, in grey levels, is printed below.
"""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from harness import Work, check, interleave, save, table
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from bit_mixup.examples import TrainingStream
from bit_mixup.images import View, decode
from bit_mixup.models import Normalize

JOBS = {  # kind, width, height, resize, crop, pictures
    "small JPEG to 160 and 128": ("JPEG", 400, 300, 160, 128, 64),
    "PNG of 32 x 32 to 160 and 128": ("PNG", 32, 32, 160, 128, 256),
    "small JPEG to 512 and 480": ("JPEG", 400, 300, 512, 480, 24),
    "large JPEG (1600 x 1200) to 512 and 480": ("JPEG", 1600, 1200, 512, 480, 8),
}
BARS = {
    "small JPEG to 160 and 128": 1.4,
    "PNG of 32 x 32 to 160 and 128": 2.0,
    "small JPEG to 512 and 480": 1.5,
    "large JPEG (1600 x 1200) to 512 and 480": 1.5,
}
FIRST, OURS, BYTES = "big_transfer's pipeline", "ours, normalised", "ours, as bytes"


class Encoded:
    """Encoded pictures in memory as the examples of a run."""

    def __init__(self, files: list[bytes]) -> None:
        self.files, self.labels = files, np.arange(len(files))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Any) -> list[Image.Image]:
        return [decode({"bytes": self.files[index], "path": None}, where=f"row {index}") for index in indices]

    def ids(self, indices: Any) -> list[str]:
        return [f"row {index}" for index in indices]


def encode(kind: str, width: int, height: int, count: int) -> list[bytes]:
    """Synthetic pictures: coarse noise, enlarged, with fine noise on it, as photographs compress."""
    draw = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = draw.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
        picture = Image.fromarray((smooth + draw.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        picture.save(file, kind, **({"quality": 85} if kind == "JPEG" else {}))
        files.append(file.getvalue())
    return files


def drafted(view: View, file: bytes, position: int) -> np.ndarray:
    """A JPEG decoded at the smallest scale that is not below the size it is resized to."""
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (view.resize_size, view.resize_size))
    return view.train(image.convert("RGB"), seed=0, position=position)


def on_tensors(view: View, file: bytes, position: int) -> np.ndarray:
    """Resized by torch, with antialiasing, instead of by PIL."""
    left, top, mirror = view.draws(seed=0, position=position)
    pixels = v2.functional.pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB"))
    resized = transforms.resize(pixels, [view.resize_size, view.resize_size], antialias=True)
    crop = resized[:, top : top + view.crop_size, left : left + view.crop_size]
    return (crop.flip(2) if mirror else crop).numpy()


def decoded(view: View, file: bytes, position: int) -> np.ndarray:
    """Decoded, and nothing else."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/input.json"))
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts, checks, distances = {}, {}, {}
    for job, (kind, width, height, resize, crop, count) in JOBS.items():
        files = encode(kind, width, height, count)
        labels, positions = list(range(count)), list(range(count))
        data = peers.EncodedPictures(files, labels, peers.big_transfer_transform(resize, crop))
        view = View(resize_size=resize, crop_size=crop, flip=True, interpolation="bilinear")
        stream = TrainingStream(part=Encoded(files), view=view, seed=0)
        rows = [stream.row(position) for position in positions]
        normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

        def theirs(data: peers.EncodedPictures = data, count: int = count) -> Work:
            batch = torch.utils.data.default_collate([data[index] for index in range(count)])
            return Work(steps=1, images=len(batch[0]), value=1.0)

        def ours(stream: TrainingStream = stream, positions: list[int] = positions, normalize: Normalize | None = None) -> Work:
            batch = stream.__getitems__(positions)
            assert isinstance(batch, tuple)
            images = torch.from_numpy(batch[0])
            return Work(steps=1, images=len(normalize(images) if normalize else images), value=1.0)

        def other(
            one: Callable[[View, bytes, int], np.ndarray], files: list[bytes] = files, rows: list[int] = rows, view: View = view
        ) -> Callable[[], Work]:
            def work() -> Work:
                pictures = np.stack([one(view, files[row], position) for position, row in enumerate(rows)])
                return Work(steps=1, images=len(pictures), value=1.0)

            return work

        ways = {FIRST: theirs, OURS: lambda ours=ours, normalize=normalize: ours(normalize=normalize), BYTES: ours}
        ways["resized on tensors (not used)"] = other(on_tensors)
        if kind == "JPEG":
            ways["draft (not used)"] = other(drafted)
        ways["decoding alone"] = other(decoded)
        parts[job] = interleave(ways, rounds=asked.rounds)
        whole = [Image.open(io.BytesIO(files[row])).convert("RGB").resize((resize, resize), 2) for row in rows]

        def reference(position: int, view: View = view, whole: list[Image.Image] = whole) -> np.ndarray:
            left, top, mirror = view.draws(seed=0, position=position)
            pixels = np.asarray(whole[position])[top : top + view.crop_size, left : left + view.crop_size]
            return (pixels[:, ::-1] if mirror else pixels).transpose(2, 0, 1)

        batch = stream.__getitems__(positions)
        assert isinstance(batch, tuple)
        distance: dict[str, int] = {"ours": 0, "resized on tensors (not used)": 0}
        for position, row in enumerate(rows):
            wanted = reference(position).astype(np.int64)
            found: dict[str, Any] = {
                "ours": batch[0][position],
                "resized on tensors (not used)": on_tensors(view, files[row], position),
            }
            if kind == "JPEG":
                found["draft (not used)"] = drafted(view, files[row], position)
            for name, pixels in found.items():
                distance[name] = max(distance.get(name, 0), int(np.abs(pixels.astype(np.int64) - wanted).max()))
        assert distance["ours"] == 0, "the crop that is cut while resizing is not the one cut afterwards"
        distances[job] = distance
        print(f"\n{job}, {len(files[0]) / 1000:.0f} kB\n")
        print(table(parts[job]))
        checks[job] = check(parts[job], {BYTES: {FIRST: 1 / BARS[job]}})
        print("largest distance from the reference, grey levels:", distance)
    save(asked.json, parts, checks=checks, distances=distances, bars=BARS)


if __name__ == "__main__":
    main()
