"""Train the small BiT that ships inside the package (``bit_mixup/bundled``) and score it on classes it has never seen.

    make upstream
    make bundled

`bit_mixup.pretrain` on the set that `recipes/build_upstream.py` has built; no other set is looked at. Then the
body is written in fp16, without the head, and a ridge head on its frozen features is scored few-shot on the held-out upstream
classes. A killed run goes on where it stopped when it is started again. `--only train` and, with the run's folder copied here,
`--only score` do the halves on two machines. `--kinds glyph` or `picture` trains on a part of the upstream set, for comparison.

`--init FOLDER` goes on from the body of weights made before. The defaults are for two cores; with a GPU the drawings want more
cores than it does: `--num-workers 16 --batch-size 2048`.
"""

import argparse
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

import bit_mixup
from bit_mixup.examples import ArrayImages, EvaluationView
from bit_mixup.images import View
from bit_mixup.models import Normalize
from bit_mixup.storage import read_json, whole_folder, write_json, write_text

if TYPE_CHECKING:
    from bit_mixup.data import Part  # which needs the `datasets` library, as training does not

ARCHITECTURE, TAG, RESOLUTION = "resnetv2_50x1_bit", "drawings_v4", 40
CHANNELS = (64, 128, 256, 640)  # of the four stages
HELD_OUT = {"glyph": "held_out_glyphs", "picture": "held_out_pictures"}
SHOTS, DRAWS = (1, 5, 10), 20
FEATURE_SCALE, FILTER_SCALE = 1.8, 0.65  # of (1, 1), these and (3, 0.5), fine-tuned on held-out pictures
RIDGE_ALPHA = 1.0  # on features scaled to unit variance as a whole


def upstream_arrays(folder: Path, kinds: Sequence[str], most: int | None = None) -> ArrayImages:
    """The drawings of some kinds, with their classes numbered anew; of at most so many classes, drawn evenly from the kinds."""
    with np.load(folder / "train.npz") as file:
        images, labels, names, of_kind = (file[name] for name in ("images", "labels", "class_names", "kinds"))
    chosen = np.isin(of_kind, kinds)
    if most is not None:
        rng = np.random.default_rng(0)
        kept = [rng.permutation(np.unique(labels[of_kind == kind]))[: most // len(kinds)] for kind in kinds]
        chosen = np.isin(labels, np.concatenate(kept))
    classes, labels = np.unique(labels[chosen], return_inverse=True)
    return ArrayImages(images=images[chosen], labels=labels, class_names=tuple(names[classes].tolist()))


def model_args(channels: Sequence[int]) -> dict[str, Any]:
    """What timm is told of the network; `groupnorm1`: one group, since 32 groups want wider layers."""
    return {"channels": list(channels), "stem_chs": 32, "norm_layer": "groupnorm1"}


def export(trained: Path, out: Path, channels: Sequence[int]) -> None:
    """Writes the body of a run's model in fp16 (timm copies it into fp32 parameters) and timm's config.json.

    The last norm is scaled by FEATURE_SCALE and every filter by FILTER_SCALE. Weight standardisation undoes the second, so the
    features are the same but for one factor; but fine-tuning at the rule's rate moves such weights further.
    """
    state = {}
    for name, tensor in load_file(trained / "model.safetensors").items():
        if "head.fc" not in name:
            scale = FEATURE_SCALE if name in ("norm.weight", "norm.bias") else FILTER_SCALE if tensor.ndim == 4 else 1
            state[name] = (tensor * scale).half()
    pretrained = {
        "tag": TAG, "custom_load": False, "input_size": [3, RESOLUTION, RESOLUTION], "fixed_input_size": False,
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3,
        "num_classes": 0, "pool_size": [2, 2], "first_conv": "stem.conv", "classifier": "head.fc", "license": "apache-2.0",
    }  # fmt: skip
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "num_features": channels[-1], "global_pool": "avg"}
    config |= {"model_args": model_args(channels), "pretrained_cfg": pretrained}
    out.mkdir(parents=True, exist_ok=True)
    part = out / "model.safetensors.part"
    save_file(state, part, metadata={"format": "pt"})
    part.chmod(0o644)
    os.replace(part, out / "model.safetensors")
    write_json(out / "config.json", config)


@torch.no_grad()
def features(model: Any, part: "Part") -> npt.NDArray[np.float64]:
    """Pooled features (N, F) of the pictures of a part."""
    view = EvaluationView(part=part, view=View(resize_size=48, crop_size=RESOLUTION, flip=False, interpolation="bilinear"))
    outputs = []
    for start in range(0, len(part), 256):
        batch = view.__getitems__(range(start, min(start + 256, len(part))))
        if isinstance(batch, Exception):
            raise batch
        outputs.append(model(Normalize.of(model)(torch.from_numpy(batch[0]))))
    return torch.cat(outputs).double().numpy()


def held_out_scores(bundled: Path, upstream: Path) -> dict[str, dict[int, float]]:
    """Accuracy of a ridge head among the held-out classes of each kind, by examples per class, mean of 20 draws."""
    model = timm.create_model(f"local-dir:{bundled}", pretrained=True, num_classes=0).eval()
    scores: dict[str, dict[int, float]] = {}
    for kind, name in HELD_OUT.items():
        data = bit_mixup.load_image_dataset(str(upstream / name))
        train, test = features(model, data.train), features(model, data.test)
        centre, scale = train.mean(0), train.std()
        train, test = (train - centre) / scale, (test - centre) / scale
        scores[kind] = {}
        for shots in SHOTS:
            hits = []
            for draw in range(DRAWS):
                rng = np.random.default_rng([shots, draw])
                rows = np.concatenate(
                    [rng.permutation(np.flatnonzero(data.train.labels == label))[:shots] for label in range(data.num_classes)]
                )
                targets = np.eye(data.num_classes)[data.train.labels[rows]]
                head = Ridge(alpha=RIDGE_ALPHA).fit(train[rows], targets)
                hits.append((head.predict(test).argmax(1) == data.test.labels).mean())
            scores[kind][shots] = round(float(np.mean(hits)), 4)
    return scores


def draw_loss(metrics: Path, target: Path) -> None:
    """The loss of each step, and its mean over a hundred, as a picture."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = np.array([row["loss"] for row in rows])
    width = min(100, len(losses))
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(losses, color="0.85", linewidth=0.5, label="each step")
    axes.plot(np.arange(width - 1, len(losses)), np.convolve(losses, np.ones(width) / width, "valid"), label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats)", title="Pre-training the bundled model", ylim=(0, losses.max() * 1.05))
    rates = axes.twinx()
    rates.plot([row["lr"] for row in rows], color="tab:orange", linewidth=1, label="rate")
    rates.set_ylabel("rate", color="tab:orange")
    rates.set_ylim(0, None)
    axes.legend(loc="upper right")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def write_card(out: Path, facts: dict[str, Any], classes: dict[str, Any], attribution: str) -> None:
    """The model card, from the facts of the run and the upstream set's own list of sources."""
    lines = [
        f"| {kind}s | " + " | ".join(f"{value:.3f}" for value in scores.values()) + " |"
        for kind, scores in facts["held_out_ridge"].items()
    ]
    names = (
        "classes",
        "drawings",
        "min_area",
        "base_lr",
        "warmup_steps",
        "weight_decay",
        "precision",
        "batch_size",
        "steps",
        "seed",
        "first_loss",
        "last_loss",
    )
    loss = "softmax cross-entropy"
    if facts["margin"] is not None:
        loss = f"a large-margin cosine loss (CosFace, margin {facts['margin']:g}, scale {facts['cosine_scale']:g})"
    template = Path(__file__).with_name("bundled_card.md").read_text(encoding="utf-8")
    text = template.format(
        architecture=ARCHITECTURE,
        loss=loss,
        tag=TAG,
        resolution=RESOLUTION,
        model_args=json.dumps(model_args(facts["channels"])),
        feature_scale=FEATURE_SCALE,
        filter_scale=FILTER_SCALE,
        parameters=facts["parameters"],
        glyphs=len(classes["glyphs"]["trained"]),
        pictures=len(classes["pictures"]["trained"]),
        decays=", ".join(f"{share:.0%}" for share in facts["decays"]),
        minutes=facts["minutes"],
        processes=facts["processes"],
        machine=facts["machine"],
        torch=facts["versions"]["torch"],
        timm=facts["versions"]["timm"],
        draws=DRAWS,
        table="\n".join(lines),
        **{name: facts[name] for name in names},
    )
    write_text(out / "README.md", text + attribution.replace("# Where", "## Where", 1))


def train(asked: argparse.Namespace, arrays: ArrayImages) -> None:
    """The run itself, from where it stopped."""
    network = asked.init or asked.folder.with_name(f"{asked.folder.name}-network")
    first = os.environ.get("RANK", "0") == "0"
    if (
        first and not asked.init and not (network / "config.json").is_file()
    ):  # the architecture, in the layout that --model accepts
        model = timm.create_model(ARCHITECTURE, num_classes=0, **model_args(asked.channels))
        with whole_folder(network) as folder:
            save_file(model.state_dict(), folder / "model.safetensors")
            cfg = {"input_size": [3, RESOLUTION, RESOLUTION], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
            write_json(folder / "config.json", {
                "architecture": ARCHITECTURE, "num_classes": 0, "model_args": model_args(asked.channels), "pretrained_cfg": cfg,
            })  # fmt: skip
    while not asked.init and not (network / "config.json").is_file():
        time.sleep(0.1)
    bit_mixup.pretrain(
        dataset=arrays, model=str(network), init=asked.init is not None, steps=asked.steps, batch_size=asked.batch_size,
        base_lr=asked.base_lr, warmup_steps=asked.warmup_steps, weight_decay=asked.weight_decay, precision=asked.precision,
        margin=asked.margin, cosine_scale=asked.cosine_scale,
        decay_steps=tuple(round(share * asked.steps) for share in asked.decays), min_area=asked.min_area, distort=True,
        flip=False, seed=asked.seed, threads=1, micro_batch=asked.batch_size, num_workers=asked.num_workers, save_every=500,
        log_every=50, output_dir=asked.folder, resume=True,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, writes and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, default=Path("runs/upstream/set"), help="what build_upstream.py wrote")
    parser.add_argument("--kinds", nargs="+", default=["glyph", "picture"], choices=["glyph", "picture"])
    parser.add_argument("--classes", type=int, help="at most so many classes, for comparisons on a short budget")
    parser.add_argument("--folder", type=Path, default=Path("runs/bundled"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=Path("bit_mixup/bundled"), help="where the body is written")
    parser.add_argument("--loss-curve", type=Path, help="where to draw the loss")
    parser.add_argument("--only", choices=["train", "score"], help="the first half, or the second of a run that is finished")
    parser.add_argument("--init", type=Path, help="weights to start from, as an earlier run wrote them")
    parser.add_argument("--steps", type=int, default=26_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--base-lr", type=float, default=0.2)
    parser.add_argument("--channels", type=int, nargs=4, default=list(CHANNELS), help="of the four stages")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--weight-decay", type=float, default=3e-4)
    parser.add_argument("--warmup-steps", type=int, default=500)
    parser.add_argument("--decays", type=float, nargs="*", default=[0.7, 0.88, 0.96], help="as shares of the steps")
    parser.add_argument("--margin", type=float, help="learn from cosines, with this margin (default: plain softmax)")
    parser.add_argument("--cosine-scale", type=float, default=24.0, help="of those cosines")
    parser.add_argument("--min-area", type=float, default=0.6)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that distort drawings")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    arrays = upstream_arrays(asked.upstream, asked.kinds, asked.classes)
    if asked.only != "score":
        train(asked, arrays)
    if asked.only == "train" or os.environ.get("RANK", "0") != "0":
        return
    export(asked.folder / "model", asked.out, asked.channels)
    rows = [json.loads(line) for line in (asked.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    environment = read_json(asked.folder / "plan.json")["environment"]
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    facts = {
        "kinds": asked.kinds,
        "classes": len(arrays.class_names),
        "drawings": len(arrays),
        "steps": asked.steps,
        "batch_size": asked.batch_size,
        "base_lr": asked.base_lr,
        "warmup_steps": asked.warmup_steps,
        "weight_decay": asked.weight_decay,
        "margin": asked.margin,
        "cosine_scale": asked.cosine_scale,
        "precision": asked.precision,
        "channels": asked.channels,
        "decays": asked.decays,
        "min_area": asked.min_area,
        "seed": asked.seed,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-100:])),
        "minutes": sum(asked.batch_size / row["images_per_second"] for row in rows) / 60,
        "parameters": sum(tensor.numel() for tensor in load_file(asked.out / "model.safetensors").values()),
        "processes": environment["processes"],
        "machine": environment["device"] if environment["device"] != "cpu" else cpu[1] if cpu else platform.machine(),
        "versions": environment["versions"],
        "held_out_ridge": held_out_scores(asked.out, asked.upstream),
    }
    write_json(asked.folder / "facts.json", facts)
    if asked.kinds == ["glyph", "picture"] and asked.classes is None:
        shutil.copyfile(asked.upstream / "classes.json", asked.out / "classes.json")
        classes = json.loads((asked.upstream / "classes.json").read_text(encoding="utf-8"))
        write_card(asked.out, facts, classes, (asked.upstream / "ATTRIBUTION.md").read_text(encoding="utf-8"))
    if asked.loss_curve:
        draw_loss(asked.folder / "metrics.jsonl", asked.loss_curve)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
