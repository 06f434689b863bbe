"""Pre-train the small BiT that ships inside the package (``bit_mixup/bundled``) on pictures of letters.

Upstream data: Unicode letters of many scripts, drawn from openly licensed Debian fonts (``FONT_PACKAGES``). No digit,
numeral or number word of any script is a class. Model: timm's stock ``resnetv2_50x1_bit`` with ``MODEL_ARGS``.
To repeat (the model card, ``README.md`` beside the weights, is written by hand from ``facts.json`` in the cache)::

    apt-get install -y --no-install-recommends $(python recipes/pretrain_bundled.py --apt-packages)
    pip install fonttools
    OMP_NUM_THREADS=1 python recipes/pretrain_bundled.py

Drawings, log and checkpoint lie in ``--cache``; a killed run goes on from its checkpoint when it is started again.
Every draw is a function of (seed, step). Fifty classes are held out from training and scored (few-shot) at the end.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
import unicodedata
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

ARCHITECTURE, TAG, RESOLUTION, DRAWN = "resnetv2_50x1_bit", "glyphs_v1", 40, 48
MODEL_ARGS = {"channels": [64, 128, 256, 512], "stem_chs": 32, "norm_layer": "groupnorm1"}
FONT_PACKAGES = {  # licence of the font files, as read in /usr/share/doc/PACKAGE/copyright: Debian packages fonts-NAME
    "OFL-1.1": """
        anonymous-pro bwht cabin cabinsketch cherrybomb comfortaa comic-neue courier-prime croscore
        crosextra-caladea crosextra-carlito dancingscript dkg-handwriting dosis dotgothic16 ebgaramond ecolier-court
        fantasque-sans gfs-artemisia gfs-baskerville gfs-bodoni-classic gfs-complutum gfs-didot gfs-gazis
        gfs-neohellenic gfs-olga gfs-porson gfs-solomos gfs-theokritos gnutypewriter hosny-amiri humor-sans inter
        joscelyn junction jura karla kaushanscript klee kristi lato league-spartan leckerli-one lemonada liberation2
        lobster lobstertwo lohit-beng-bengali lohit-deva lohit-gujr lohit-guru lohit-knda lohit-mlym lohit-orya
        lohit-taml lohit-telu lxgw-wenkai manrope mononoki morisawa-bizud-gothic morisawa-bizud-mincho mplus nanum
        nanum-extra naver-d2coding noto-core noto-extra play quattrocento quicksand reggae rocknroll seto
        sil-abyssinica sil-andika sil-annapurna sil-charis sil-doulos sil-ezra sil-gentiumplus sil-harmattan
        sil-lateef sil-nuosusil sil-padauk sil-scheherazade smc-chilanka smc-gayathri smc-manjari smiley-sans sora
        stick tomsontalks vollkorn woowa-bm yanone-kaffeesatz yrsa-rasa yusei-magic""",
    "OFL-1.0": "breip inconsolata oldstandard",
    "Apache-2.0": "jetbrains-mono motoya-l-cedar motoya-l-maruberi open-sans roboto-slab roboto-unhinted",
    "Bitstream Vera and public domain": "dejavu-core dejavu-extra hack",
    "CC-BY-3.0": "opendyslexic sawarabi-gothic",
    "MIT": "fanwood lindenhill",
    "BSD-3-Clause": "kiloji",
    "public domain": "goudybookletter prociono tuffy",
}
PACKAGES = {f"fonts-{name}": licence for licence, names in FONT_PACKAGES.items() for name in names.split()}
EXTRA_STYLES = {"Thin", "Light", "Black", "Condensed", "CondensedBold"}  # of the 1,540 files in fonts-noto-extra
NUMBER_WORDS = set(
    """
    ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE THIRTEEN FOURTEEN FIFTEEN SIXTEEN SEVENTEEN
    EIGHTEEN NINETEEN TWENTY THIRTY FORTY FIFTY SIXTY SEVENTY EIGHTY NINETY HUNDRED HUNDREDS THOUSAND THOUSANDS MILLION
    DIGIT DIGITS NUMBER NUMBERS NUMERAL NUMERALS NUMERIC NUMERATOR FRACTION HALF QUARTER THIRD""".split()
)


def is_class(char: str) -> bool:
    """Whether `char` may be a class: an undecomposable letter with nothing of a number in its value or name."""
    name = unicodedata.name(char, "")
    words = set(re.findall("[A-Z]+", name))
    number = unicodedata.numeric(char, None) is not None or re.search(r"\d", name) or words & NUMBER_WORDS
    return bool(name) and not number and unicodedata.category(char)[0] == "L" and not unicodedata.decomposition(char)


def font_files() -> list[Path]:
    """The font files of all packages, sorted; a package that is not installed raises an error that names it."""
    files = []
    for package in PACKAGES:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
        if listed.returncode:
            raise SystemExit(f"{package} is not installed: see --apt-packages")
        paths = [Path(line) for line in listed.stdout.splitlines() if re.search(r"\.(ttf|otf|ttc)$", line)]
        files += [p for p in paths if package != "fonts-noto-extra" or p.stem.split("-")[-1] in EXTRA_STYLES]
    return sorted({p.resolve() for p in files})


def characters(path: Path) -> set[str]:
    """The characters a font file maps that may be classes."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True, fontNumber=0) as font:
        return {chr(code) for code in font.getBestCmap() or {} if code > 32 and is_class(chr(code))}


def draw(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray | None:
    """`char` in white on black, fitted into a DRAWN x DRAWN square with a margin of 4; None where nothing is drawn."""
    left, top, right, bottom = font.getbbox(char)
    if not (0 < right - left < 400 and 0 < bottom - top < 400):
        return None
    canvas = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), char, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    scale = (DRAWN - 8) / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BOX)
    square = Image.new("L", (DRAWN, DRAWN))
    square.paste(glyph, ((DRAWN - glyph.width) // 2, (DRAWN - glyph.height) // 2))
    return np.asarray(square)


def build(path: Path, seed: int, per_script: int, styles: int) -> None:
    """Draw the upstream set into `path`: at most `per_script` letters of a script and `styles` drawings of a letter.

    A letter needs four different drawings. One whose drawings mostly equal those of an earlier letter in the same fonts
    (Latin A, Greek Alpha) is left out as a look-alike of it.
    """
    rng = np.random.default_rng(seed)
    holders: dict[str, list[Path]] = collections.defaultdict(list)
    for file in tqdm(font_files(), desc="read fonts"):
        for char in characters(file):
            holders[char].append(file)
    scripts: dict[str, list[str]] = collections.defaultdict(list)
    for char in sorted(holders):
        if len(holders[char]) >= 4:
            scripts[unicodedata.name(char).split()[0]].append(char)
    chosen = [str(char) for chars in scripts.values() for char in rng.permutation(chars)[:per_script]]

    @functools.cache
    def load(file: Path) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(file), 80, layout_engine=ImageFont.Layout.BASIC)

    seen: set[tuple[Path, bytes]] = set()
    images, labels, classes = [], [], []
    for char in tqdm(sorted(chosen), desc="draw"):
        families: dict[str, list[Path]] = collections.defaultdict(list)
        for file in rng.permutation(holders[char]):
            families[file.stem.split("-")[0]].append(file)
        turns = sorted((turn, i, f) for i, fs in enumerate(families.values()) for turn, f in enumerate(fs))
        drawn: dict[bytes, tuple[Path, np.ndarray]] = {}
        for _, _, file in turns:
            picture = draw(load(file), char) if len(drawn) < styles else None
            if picture is not None:
                drawn.setdefault(hashlib.sha1(picture.tobytes()).digest(), (file, picture))
        keys = {(file, digest) for digest, (file, _) in drawn.items()}
        if len(drawn) < 4 or 2 * len(keys & seen) >= len(keys):
            continue
        seen |= keys
        labels += [len(classes)] * len(drawn)
        images += [picture for _, picture in drawn.values()]
        classes.append(char)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=np.stack(images), labels=np.asarray(labels), classes=np.asarray(classes))


def held_out_classes(labels: np.ndarray, seed: int, count: int = 50) -> np.ndarray:
    """`count` classes that training never sees, of those with at least 16 drawings."""
    rich = np.flatnonzero(np.bincount(labels) >= 16)
    return np.sort(np.random.default_rng([seed, 1]).choice(rich, count, replace=False))


def augment(ink: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Model inputs (N, 3, RESOLUTION, RESOLUTION) from drawings (N, 1, DRAWN, DRAWN) in 0..1: a broad, general mix."""
    n, size = len(ink), RESOLUTION

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*(shape or (n, 1, 1, 1)), generator=g)

    def some(share: float) -> torch.Tensor:
        return torch.rand(n, 1, 1, 1, generator=g) < share

    # geometry: rotation, shear, scale, aspect, shift, elastic distortion of random roughness, in one resampling
    angle, shear = uniform(-0.3, 0.3, n), uniform(-0.3, 0.3, n)
    zoom, aspect = uniform(-0.1, 0.35, n).exp(), uniform(-0.2, 0.2, n).exp()
    rows = [angle.cos() * aspect, shear - angle.sin(), angle.sin(), angle.cos() / aspect]
    linear = torch.stack(rows, 1).view(n, 2, 2) * zoom.view(n, 1, 1)
    grid = F.affine_grid(torch.cat([linear, uniform(-0.15, 0.15, n, 2, 1)], 2), [n, 1, size, size], align_corners=False)
    knots = int(torch.randint(3, 8, (), generator=g))
    bend = F.interpolate(torch.randn(n, 2, knots, knots, generator=g), (size, size), mode="bicubic", align_corners=True)
    grid = grid + (bend * uniform(0, 0.45) / knots * some(0.7)).permute(0, 2, 3, 1)
    x = F.grid_sample(ink, grid, align_corners=False)
    # stroke: towards thicker, thinner or softer
    kernel = int(torch.randint(1, 3, (), generator=g)) * 2 + 1
    thick, thin = F.max_pool2d(x, kernel, 1, kernel // 2), -F.max_pool2d(-x, 3, 1, 1)
    kind, weight = torch.randint(0, 4, (n, 1, 1, 1), generator=g), uniform(0, 1)
    x = torch.where(kind == 1, x.lerp(thick, weight), torch.where(kind == 2, x.lerp(thin, 0.7 * weight), x))
    x = torch.where(some(0.3), F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 5, 1), x)
    # resolution: half of the batch, in groups, is scaled down to a quarter .. all of its side and up again
    parts = list(x.chunk(8))
    for i in range(len(parts) // 2):
        small = int(torch.randint(size // 4, size + 1, (), generator=g))
        mode = ("nearest", "bilinear", "bicubic")[int(torch.randint(0, 3, (), generator=g))]
        parts[i] = F.interpolate(F.interpolate(parts[i], (small, small), mode="area"), (size, size), mode=mode)
    x = torch.cat(parts).clamp(0, 1) ** uniform(-0.6, 0.6).exp()
    # colour: random ink and paper (half of them grey, either polarity), lighting across the picture, noise
    paper, inked = torch.rand(n, 3, 1, 1, generator=g), torch.rand(n, 3, 1, 1, generator=g)
    grey = some(0.5)
    paper, inked = torch.where(grey, paper[:, :1], paper), torch.where(grey, inked[:, :1], inked)
    dark = some(0.5).float()
    apart = uniform(0, 1)  # 0: as drawn, 1: black and white
    weak = (inked - paper).mean(1, keepdim=True).abs() < 0.3
    apart = torch.where(some(0.4), torch.ones_like(apart), torch.where(weak, apart.clamp(min=0.5), apart * some(0.3)))
    paper, inked = paper.lerp(dark.expand_as(paper), apart), inked.lerp((1 - dark).expand_as(inked), apart)
    ramp = torch.linspace(-1, 1, size)
    light = uniform(-0.2, 0.2) * ramp.view(1, 1, 1, size) + uniform(-0.2, 0.2) * ramp.view(1, 1, size, 1)
    x = paper + (inked - paper) * x + light * some(0.4)
    x = x + torch.randn(x.shape, generator=g) * uniform(0, 0.12) * some(0.5)
    return x.clamp(0, 1) * 2 - 1


def create(classes: int) -> torch.nn.Sequential:
    """The headless model and a linear head. (timm's own head, a 1x1 convolution, takes as long as all else here.)"""
    model = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
    head = torch.nn.Linear(model.num_features, classes)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return torch.nn.Sequential(model, head).to(memory_format=torch.channels_last)


@torch.no_grad()
def few_shot(model: torch.nn.Module, ink: torch.Tensor, labels: np.ndarray, augmented: bool) -> dict[int, float]:
    """Accuracy of the nearest class mean (cosine, frozen features) among all classes of `labels`, by shots, 20 draws.

    The first ten drawings of a class in each draw serve for shots, the rest (at least six) are scored.
    """
    model.eval()
    plain = F.interpolate(ink.float() / 255, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True) * 2 - 1
    pictures = augment(ink.float() / 255, torch.Generator().manual_seed(7)) if augmented else plain
    outputs = [model(part.expand(-1, 3, -1, -1)) for part in pictures.split(256)]
    features = F.normalize(torch.cat(outputs) - torch.cat(outputs).mean(0))
    groups = [torch.from_numpy(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    g, result = torch.Generator().manual_seed(0), {}
    for shots in (1, 5, 10):
        hits, total = 0, 0
        for _ in range(20):
            orders = [group[torch.randperm(len(group), generator=g)] for group in groups]
            means = F.normalize(torch.stack([features[order[:shots]].mean(0) for order in orders]))
            for i, order in enumerate(orders):
                hits += int(((features[order[10:]] @ means.T).argmax(1) == i).sum())
                total += len(order) - 10
        result[shots] = round(hits / total, 4)
    return result


def export(model: torch.nn.Module, out: Path) -> None:
    """Write the headless `model` (fp16: timm copies it into fp32 parameters) and timm's config.json."""
    out.mkdir(parents=True, exist_ok=True)
    state, part = {k: v.half().contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors.part"
    save_file(state, part, metadata={"format": "pt"})
    part.chmod(0o644)
    os.replace(part, out / "model.safetensors")
    pretrained = {
        "tag": TAG, "custom_load": False, "input_size": [3, RESOLUTION, RESOLUTION], "fixed_input_size": False,
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3,
        "num_classes": 0, "pool_size": [2, 2], "first_conv": "stem.conv", "classifier": "head.fc",
        "license": "apache-2.0",
    }  # fmt: skip
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "num_features": model.num_features, "global_pool": "avg"}
    config |= {"model_args": MODEL_ARGS, "pretrained_cfg": pretrained}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def batch_at(
    step: int, seed: int, images: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmented pictures and labels of one step: classes drawn evenly, then one drawing of each."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + step)
    labels = torch.randint(0, len(counts), (size,), generator=g)
    picks = starts[labels] + (torch.rand(size, generator=g) * counts[labels]).long()
    return augment(images[picks].float() / 255, g), labels


def train(args: argparse.Namespace, images: torch.Tensor, labels: np.ndarray) -> tuple[torch.nn.Sequential, dict]:
    """Train (or go on training) and return the model and the facts of the run."""
    counts = torch.from_numpy(np.bincount(labels))
    starts = counts.cumsum(0) - counts
    torch.manual_seed(args.seed)
    model = create(len(counts)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    checkpoint, log, first, seconds, losses = args.cache / "checkpoint.safetensors", args.cache / "log.jsonl", 0, 0.0, []
    if checkpoint.exists():
        with safe_open(checkpoint, "pt") as saved:
            position = json.loads(saved.metadata()["position"])
            if position["steps"] != args.steps:
                raise SystemExit(f"{checkpoint} belongs to a run of {position['steps']} steps: remove it to start anew")
            model.load_state_dict({name: saved.get_tensor(f"model/{name}") for name in model.state_dict()})
            for name, parameter in model.named_parameters():
                optimizer.state[parameter]["momentum_buffer"] = saved.get_tensor(f"momentum/{name}")
        first, seconds, losses = position["step"], position["seconds"], position["losses"]
    else:
        log.unlink(missing_ok=True)
        export(model[0], args.out)
    began = saved_at = time.monotonic()
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10, desc="train"):
        warm = min(1.0, (step + 1) / args.warmup)
        rate = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = batch_at(step, args.seed, images, starts, counts, args.batch_size)
        loss = F.cross_entropy(model(inputs.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses = [*losses[-99:], loss.item()]
        elapsed = seconds + time.monotonic() - began
        if (step + 1) % 50 == 0:
            entry = {"step": step + 1, "loss": sum(losses[-50:]) / 50, "lr": rate, "seconds": elapsed}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if time.monotonic() - saved_at > args.save_every or step + 1 == args.steps:
            saved_at = time.monotonic()
            state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
            state |= {f"momentum/{n}": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
            position = {"step": step + 1, "steps": args.steps, "seconds": elapsed, "losses": losses}
            state = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(state, checkpoint.with_suffix(".part"), metadata={"position": json.dumps(position)})
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            export(model[0], args.out)
    facts = {"loss": sum(losses) / len(losses), "first_loss": math.log(len(counts)), "classes": len(counts)}
    return model, facts | {"minutes": (seconds + time.monotonic() - began) / 60}


def main(argv: list[str] | None = None) -> None:
    """Draw the upstream set (once), train, score the held-out classes, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apt-packages", action="store_true", help="print the font packages and stop")
    parser.add_argument("--cache", type=Path, default=Path("runs/upstream"))
    parser.add_argument("--out", type=Path, default=Path("bit_mixup/bundled"))
    parser.add_argument("--steps", type=int, default=13000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-script", type=int, default=700, help="letters of one script at most")
    parser.add_argument("--styles", type=int, default=24, help="drawings of one letter at most")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    args = parser.parse_args(argv)
    if args.apt_packages:
        print(" ".join(PACKAGES))
        return
    torch.set_num_threads(1)
    drawings = args.cache / f"glyphs-{args.seed}-{args.per_script}-{args.styles}.npz"
    if not drawings.exists():
        build(drawings, args.seed, args.per_script, args.styles)
    with np.load(drawings) as data:
        images, labels, classes = torch.from_numpy(data["images"])[:, None], data["labels"], data["classes"].tolist()
    held = np.isin(labels, held_out_classes(labels, args.seed))
    model, facts = train(args, images[torch.from_numpy(~held)], np.unique(labels[~held], return_inverse=True)[1])
    export(model[0], args.out)
    shipped = timm.create_model(f"local-dir:{args.out}", pretrained=True, num_classes=0)  # rounded to fp16
    settings = ("steps", "batch_size", "lr", "warmup", "seed", "styles")
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    facts |= {name: vars(args)[name] for name in settings} | {
        "few_shot": {
            "as drawn": few_shot(shipped, images[held], labels[held], augmented=False),
            "augmented": few_shot(shipped, images[held], labels[held], augmented=True),
        },
        "drawings": int((~held).sum()),
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "machine": f"one thread of an {cpu[1] if cpu else platform.machine()}",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    (args.cache / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    trained = set(labels[~held].tolist())
    split = {"trained": "".join(c for i, c in enumerate(classes) if i in trained)}
    split["held_out"] = "".join(c for i, c in enumerate(classes) if i not in trained)
    text = json.dumps(split, indent=1, ensure_ascii=False) + "\n"
    (args.out / "classes.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
