"""Does a model say the same of the same pictures, whoever asks?

    OMP_NUM_THREADS=1 python benchmarks/doors.py --run runs/digits-resnetv2_50x1_bit.drawings_v4-0

Takes a finished run on the digits (or makes one of 20 steps with mixup), and asks of 64 test digits, as RGB files, each door in
turn: the Python API, the command line, timm and transformers from the folder that `bit-mixup push --dry-run` writes, and
exported files.
"""

import argparse
import contextlib
import csv
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image
from transformers import pipeline

import bit_mixup
from bit_mixup.cli import main as command
from bit_mixup.pictures import find_pictures

NUMBER = 64


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, K)."""
    return torch.from_numpy(logits).double().softmax(1).numpy()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run on the digits (default: one of 20 steps is made)")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        run, folder = asked.run, Path(place)
        if run is None:
            run = folder / "run"
            short = {"steps": 20, "batch_size": 32, "threads": 1, "base_lr": 0.003, "mixup_alpha": 0.2, "flip": False}
            rule = {"validation_fraction": 0.2, "prediction_rule": "unshrink"}
            with contextlib.redirect_stdout(io.StringIO()):
                bit_mixup.transfer(dataset="digits", model="bundled", resolution="model", output_dir=run, **short, **rule)
        files = []
        for index, picture in enumerate(bit_mixup.load_image_dataset("digits").test.read(range(NUMBER))):
            files.append(folder / f"{index:02}.png")
            picture.convert("RGB").save(files[-1])
        classifier = bit_mixup.load(run)
        logits, shrunk, _ = classifier.logits(find_pictures([str(file) for file in files]))
        by_rule = classifier.scores_of(logits, shrunk).softmax(1).numpy()
        raw, names = logits.numpy(), classifier.label_names

        with contextlib.redirect_stdout(io.StringIO()):
            command(["predict", str(run), *map(str, files), "--top", str(len(names)), "--output", str(folder / "said.csv")])
            command(["push", str(run), "ada/digits", "--dry-run", str(folder / "pushed")])
        with (folder / "said.csv").open(newline="") as table:
            said = [
                {row[f"class_{place}"]: float(row[f"probability_{place}"]) for place in range(1, len(names) + 1)}
                for row in csv.DictReader(table)
            ]
        found = np.array([[row[name] for name in names] for row in said])
        rule = classifier.choice.rule
        rows.append(("`bit-mixup predict`, its CSV", f"probabilities by the rule {rule}", np.abs(found - by_rule).max()))

        model = timm.create_model(f"local-dir:{folder / 'pushed'}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        with torch.inference_mode():
            found = model(torch.stack([transform(Image.open(file)) for file in files])).numpy()
        rows.append(("timm, from the pushed folder", "logits", np.abs(found - raw).max()))

        classify = pipeline("image-classification", model=str(folder / "pushed"), device="cpu")
        values = classify.image_processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = classify.model(values).logits.numpy()
        rows.append(("transformers' pipeline, its model and processor", "logits", np.abs(found - raw).max()))
        scores = [{one["label"]: one["score"] for one in classify(str(file), top_k=len(names))} for file in files]
        found = np.array([[score[name] for name in names] for score in scores])
        rows.append(("transformers' pipeline, called on the files", "probabilities, raw", np.abs(found - softmax(raw)).max()))

        pixels = np.stack([classifier.view.evaluate(Image.open(file)) for file in files])
        for suffix, name in ((".onnx", "ONNX in onnxruntime"), (".pt2", "torch.export")):
            for ending in ("logits", "probabilities"):
                path = folder / f"{ending}{suffix}"
                bit_mixup.export_model(classifier, path, ending=ending, pixels=True)
                if suffix == ".onnx":
                    found = onnxruntime.InferenceSession(str(path)).run(None, {"pictures": pixels})[0]
                else:
                    found = torch.export.load(str(path)).module()(torch.from_numpy(pixels)).detach().numpy()
                wanted = raw if ending == "logits" else by_rule
                what = "logits" if ending == "logits" else f"probabilities by the rule {rule}"
                rows.append((name, what, np.abs(found - wanted).max()))
    print(f"\n{NUMBER} test digits; against `bit_mixup.load(...)` in Python; logits up to {np.abs(raw).max():.1f}\n")
    print("| door | compared | largest difference |\n|---|---|---:|")
    for name, what, difference in rows:
        print(f"| {name} | {what} | {difference:.1e} |")
        assert difference < 1e-4


if __name__ == "__main__":
    main()
