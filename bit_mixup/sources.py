"""Where does a data set come from?

One function for each kind of place. All give splits of the `datasets` library whose pictures are not decoded yet; nothing here
knows which column is which, and torch is not imported.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset
from datasets.data_files import EmptyDatasetError
from datasets.packaged_modules.cache.cache import Cache
from pyarrow import parquet

from bit_mixup.archives import ARCHIVES, is_archive, list_members, read_members
from bit_mixup.errors import DataError, did_you_mean
from bit_mixup.hub import explain, first_line, take_out_if_damaged
from bit_mixup.images import EXTENSIONS

DIGITS = "digits"
DIGITS_FOLDER = Path(__file__).parent / "digits"
TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
_SPLIT_FOLDERS = ("train", *TEST_SPLITS)
DATA_FILES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Splits by name, and where they were found.

    Args:
        splits: by name.
        folder: what relative paths in a column of file names count from.
        revision: commit hash on the hub; None for data of this machine.
    """

    splits: dict[str, Dataset]
    folder: Path = field(default_factory=Path)
    revision: str | None = None


def open_source(source: str | Dataset | DatasetDict, *, config: str | None = None, revision: str | None = None) -> Source:
    """Opens a data set of any kind.

    Args:
        source: "digits" (in the package); an in-memory data set; a folder of class folders, or of split folders (train, test,
            ...) of class folders; a .zip, .tar or .tar.gz of such a folder; a csv, tsv, parquet, json or jsonl file, or a
            folder of them; a folder written by `save_to_disk`; or the id of a data set on the hub.
        config: of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.

    Raises:
        DataError: there is no such thing, or it can not be read.
    """
    opened = _open_memory(source) if isinstance(source, Dataset | DatasetDict) else _open_local(source)
    if opened is None:
        opened = _from_hub(str(source), config=config, revision=revision)
        config = revision = None
    where = source if isinstance(source, str) else "the data set in memory"
    for flag, value in (("dataset_config", config), ("dataset_revision", revision)):
        if value is not None:
            raise DataError(f'{flag} "{value}" was given, but {where} is data of this machine: leave it out.')
    # A format or transform that somebody has set would come between us and the stored values.
    return replace(opened, splits={name: split.with_format(None) for name, split in opened.splits.items()})


@dataclass(frozen=True, kw_only=True)
class StreamedSource:
    """Splits that are read from where they lie, a picture at a time.

    Args:
        name: as asked for.
        splits: by name; pictures are not decoded.
        files: that each split is read from, as local paths or addresses on the hub.
        counts: examples of each split, where the data set's card says it.
        revision: commit hash on the hub; None for data of this machine.
    """

    name: str
    splits: dict[str, IterableDataset]
    files: dict[str, list[str]]
    counts: dict[str, int]
    revision: str | None

    def rows(self, split: IterableDataset) -> Iterator[dict[str, Any]]:
        """What passes by; raises DataError where the stream breaks off."""
        count = 0
        try:
            for row in split:
                yield row
                count += 1
        except MemoryError:
            raise
        except Exception as error:  # of the libraries, of many kinds
            raise DataError(f'data set "{self.name}": the stream broke off after {count:,} examples: {_why(error)}') from error

    def count(self, split: str) -> int | None:
        """How many examples a split holds, by the card or by what ends a parquet file; None where neither says it."""
        if split in self.counts:
            return self.counts[split]
        if not all(file.endswith(".parquet") for file in self.files.get(split, [""])):
            return None
        total = 0
        for file in self.files[split]:
            try:
                with fsspec.open(file, "rb") as stream:
                    total += parquet.read_metadata(stream).num_rows
            except Exception as error:
                raise DataError(f"{file} can not be read as parquet: {_why(error)}") from error
        return total

    def keep(self, split: str, columns: list[str]) -> Dataset:
        """The whole of a split, in the cache of the `datasets` library. Raises DataError as `rows`."""
        rows = self.splits[split].select_columns(columns)
        local = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files[split] if os.path.isfile(file)]
        version = repr((split, columns, self.files[split], local))
        return _generate(lambda: self.rows(rows), rows.features, version, self.name)


def open_stream(source: str, *, config: str | None = None, revision: str | None = None) -> StreamedSource:
    """Opens parquet files, a folder of them, "digits", or a data set on the hub, without reading it.

    Raises:
        DataError: there is no such thing, it can not be read, or it is of a kind that is not streamed.
    """
    files = _parquet_files(source)
    if files is None:
        builder = _hub_builder(source, config, revision)
        if isinstance(builder, Cache):
            raise DataError(f'data set "{source}": streaming reads from the hub, which can not be reached. Go online.')
    elif (config, revision) != (None, None):
        raise DataError(f"dataset_config and dataset_revision belong to the hub, but {source} is data of this machine.")
    else:
        paths = {split: [str(file.absolute()) for file in part] for split, part in files.items()}
        builder = datasets.load_dataset_builder("parquet", data_files=paths)
    try:
        splits = builder.as_streaming_dataset()
        undecoded = {name: split.decode(False) for name, split in splits.items()}
    except Exception as error:
        raise DataError(f'data set "{source}": {_explain(error, source)}') from error
    named = {split: [str(file) for file in part] for split, part in (builder.config.data_files or {}).items()}
    commits = {match[1] for part in named.values() for file in part if (match := re.search(r"@([0-9a-f]{40})/", file))}
    return StreamedSource(
        name=source,
        splits=undecoded,
        files=named,
        counts={name: info.num_examples for name, info in (builder.info.splits or {}).items() if info.num_examples and not files},
        revision=next(iter(commits), None),
    )


def _parquet_files(name: str) -> dict[str, list[Path]] | None:
    """Parquet files of this machine by split; None for what must be an id on the hub."""
    path = DIGITS_FOLDER if name == DIGITS else Path(os.path.expanduser(name))
    if os.path.isfile(path) and path.suffix.lower() == ".parquet":
        return {"train": [path]}
    if not os.path.exists(path):
        return None
    if os.path.isdir(path) and list(path.glob("*.parquet")):
        kind, files = _find_data_files(path)
        if kind == "parquet":
            return files
    raise DataError(f"{path} can not be streamed: parquet files and data sets on the hub can. Leave --streaming out.")


def _open_memory(source: Dataset | DatasetDict) -> Source:
    return Source(splits={"train": source} if isinstance(source, Dataset) else dict(source))


def _open_local(name: str) -> Source | None:
    """The source if the name is one of this machine, else None."""
    if name == DIGITS:
        return _read_files("parquet", {split: [DIGITS_FOLDER / f"{split}.parquet"] for split in ("train", "test")})
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):  # pathlib's would raise where a name is too long for a file
        return _from_file(path)
    if not os.path.isdir(path):
        return None
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"{path} looks like a folder of save_to_disk, but can not be read: {error}") from error
        return Source(splits=dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}, folder=path)
    return _from_folder(path)


def _from_file(path: Path) -> Source:
    if is_archive(path):
        return _from_archive(path)
    if path.suffix.lower() not in DATA_FILES:
        raise DataError(
            f'{path}: data files end in {", ".join(DATA_FILES)}, archives in {", ".join(ARCHIVES)}, not "{path.suffix}". '
            "Unpack other archives into class folders."
        )
    return _read_files(DATA_FILES[path.suffix.lower()], {"train": [path]})


def _from_folder(path: Path) -> Source:
    if any(file.suffix.lower() in DATA_FILES and re.match(r"train([^a-z]|$)", file.stem.lower()) for file in path.iterdir()):
        return _read_files(*_find_data_files(path))  # folders beside a table hold its pictures, and are no classes
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    split_folders = {entry.name.lower(): entry for entry in folders if entry.name.lower() in _SPLIT_FOLDERS}
    if "train" in split_folders and any(entry.is_dir() for entry in split_folders["train"].iterdir()):
        return _from_class_folders(split_folders, path)
    if folders and any(pictures_below(folder) for folder in folders):
        return _from_class_folders({"train": path}, path)
    return _read_files(*_find_data_files(path))


def _find_data_files(path: Path) -> tuple[str, dict[str, list[Path]]]:
    """Which kind of data files a folder holds, and those of each split."""
    files: dict[str, list[Path]] = {}
    kinds = set()
    for file in sorted(entry for entry in path.iterdir() if entry.suffix.lower() in DATA_FILES):
        split = next((s for s in _SPLIT_FOLDERS if re.match(rf"{s}([^a-z]|$)", file.stem.lower())), None)
        numbered = split is not None and all(re.search(r"\d+-of-\d+$", f.stem) for f in [file, *files.get(split, [])])
        if split is None or (split in files and not numbered):
            raise DataError(
                f"{file}: in a folder of data files each is named for its split, one each (train.csv, test.csv, ...) or as "
                "shards (train-00000-of-00002.parquet, ...). Give a single file by its own path."
            )
        files.setdefault(split, []).append(file)
        kinds.add(DATA_FILES[file.suffix.lower()])
    for split, shards in files.items():
        totals = [int(match[1]) for file in shards if (match := re.search(r"-of-(\d+)$", file.stem))]
        if totals and totals != [len(shards)] * len(shards):
            raise DataError(
                f"{path}: {len(shards)} shard(s) of {split}, but their names speak of {max(totals)}. Fetch the others."
            )
    if "train" in files and len(kinds) == 1:
        return kinds.pop(), files
    raise DataError(
        f"{path} holds neither class folders with pictures, nor split folders (train, test, ...) of them, nor data files "
        "named train.csv, train.parquet or train.json."
    )


def pictures_below(folder: Path) -> list[Path]:
    """The picture files below a folder, but for hidden ones and those in hidden folders."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _from_class_folders(split_folders: dict[str, Path], root: Path) -> Source:
    """One class for each folder; their order is that of the training folders' sorted names in all splits.

    The `datasets` library's own image-folder loader is not used: it takes class folders whose name holds "test" or "train" for
    splits, labels archives by the name of the archive's folder, and drops labels when it meets a metadata file.
    """
    tree = {}
    for split, folder in split_folders.items():
        entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        tree[split] = {entry: pictures_below(entry) for entry in entries}
    names, rows = _label(tree, split_folders["train"])
    splits = {}
    for split, (files, labels) in rows.items():
        columns = {"image": [{"path": str(file), "bytes": None} for file in files], "label": labels}
        splits[split] = Dataset.from_dict(columns, features=_labelled_pictures(names))
    return Source(splits=splits, folder=root)


def _labelled_pictures(names: list[str]) -> Features:
    return Features({"image": Image(decode=False), "label": ClassLabel(names=names)})


def _label(tree: dict[str, dict[Path, list[Path]]], train: Path) -> tuple[list[str], dict[str, tuple[list[Path], list[int]]]]:
    """Class names, and the pictures of each split with their labels, from the pictures in the class folders of each split."""
    names = sorted(entry.name for entry in tree["train"])
    rows = {}
    for split, classes in tree.items():
        files: list[Path] = []
        labels: list[int] = []
        for entry, pictures in classes.items():
            if entry.name not in names:
                raise DataError(f"{entry} is a class that {train} lacks{did_you_mean(entry.name, names)}. Rename it.")
            for path in (entry, *pictures):
                _check_name(path)
            if not pictures and split == "train":
                raise DataError(f"{entry} holds no pictures ({', '.join(sorted(EXTENSIONS))}). Fill it or remove it.")
            files += pictures
            labels += [names.index(entry.name)] * len(pictures)
        rows[split] = files, labels
    return names, rows


def _from_archive(path: Path) -> Source:
    """The same from the members of an archive, labelled by their paths in it.

    Members are not unpacked into files. Their bytes go into the cache of the `datasets` library, which finds them there again
    as long as the archive is the same.
    """
    listed, folders = list_members(path)
    hidden = {name for name in {*listed, *folders} if any(part.startswith(".") or part == "__MACOSX" for part in name.parts)}
    pictures = [name for name in listed if name.suffix.lower() in EXTENSIONS and name not in hidden]
    if not pictures:
        raise DataError(f"{path} holds no pictures ({', '.join(sorted(EXTENSIONS))}). Name an archive of class folders.")
    folders -= hidden

    def inside(folder: PurePosixPath) -> list[PurePosixPath]:
        return sorted(name for name in folders if name.parent == folder)

    top = PurePosixPath()
    while len(inside(top)) == 1 and inside(inside(top)[0]):  # the folder that was packed, not one of classes
        top = inside(top)[0]
    split_folders = {name.name.lower(): name for name in inside(top) if name.name.lower() in _SPLIT_FOLDERS}
    if "train" not in split_folders or not inside(split_folders["train"]):
        split_folders = {"train": top}
    found = {entry: list[PurePosixPath]() for folder in split_folders.values() for entry in inside(folder)}
    for picture in pictures:
        for entry in picture.parents:
            if entry in found:
                found[entry].append(picture)
    if not any(found.values()):
        raise DataError(f"{path} holds pictures, but no class folders with pictures in them. Pack one folder for each class.")
    tree = {
        split: {path / entry: [path / name for name in sorted(found[entry])] for entry in inside(folder)}
        for split, folder in split_folders.items()
    }
    names, rows = _label(tree, path / split_folders["train"])
    status = path.stat()
    version = repr((str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ino, names, listed))
    splits = {}
    for split, (files, labels) in rows.items():
        wanted = dict(zip((PurePosixPath(file.relative_to(path)) for file in files), labels, strict=True))
        splits[split] = _read_archive(path, split, listed, wanted, _labelled_pictures(names), version)
    return Source(splits=splits, folder=path.parent)


def _read_archive(
    path: Path, split: str, listed: list[PurePosixPath], wanted: dict[PurePosixPath, int], features: Features, version: str
) -> Dataset:
    """Members as rows, in the order of `wanted`, with their labels; read in the order of the archive, which may be a stream."""

    def read() -> Iterator[dict[str, object]]:
        for name, content in read_members(path, wanted):
            yield {"image": {"bytes": content, "path": str(path / name)}, "label": wanted[name]}

    if not wanted:
        return Dataset.from_dict({"image": [], "label": []}, features=features)
    rows = _generate(read, features, f"{split} {version}", str(path))
    position = {name: row for row, name in enumerate(name for name in listed if name in wanted)}
    return rows.select([position[name] for name in wanted])


def _generate(read: Callable[[], Iterator[dict[str, Any]]], features: Features, version: str, where: str) -> Dataset:
    """What a generator yields as a data set, kept in the library's cache until the version is another."""
    fingerprint = sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    try:
        rows: Dataset = _quietly(lambda: Dataset.from_generator(read, features=features, fingerprint=fingerprint))
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from error
        raise DataError(f"{where} can not be read: {error.__cause__ or error}") from error
    return rows


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{str(path)!a}: this name is not UTF-8 (of an archive that was packed elsewhere?) and can not be written down. "
            "Rename it."
        ) from error


def _read_files(kind: str, files: dict[str, list[Path]]) -> Source:
    every = [file for part in files.values() for file in part]
    options = {"sep": "\t"} if any(file.suffix.lower() == ".tsv" for file in every) else {}
    paths = {split: [str(file) for file in part] for split, part in files.items()}
    read: Callable[..., DatasetDict] = datasets.load_dataset
    try:
        splits: DatasetDict = _quietly(lambda: read(kind, data_files=paths, **options))
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{', '.join(map(str, every))} can not be read as {kind}: {cause}") from error
    return Source(splits=dict(splits), folder=every[0].parent)


def _quietly(read: Callable[[], Any]) -> Any:
    """Reads local files without the progress bars that only downloads deserve."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return read()
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _hub_builder(name: str, config: str | None, revision: str | None) -> datasets.DatasetBuilder:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise DataError(f'data set "{name}": there is no such file or folder, and a hub id looks like user/name.')
    try:
        return datasets.load_dataset_builder(name, config, revision=revision)
    except Exception as error:  # the libraries raise many kinds
        raise DataError(f'data set "{name}": {_explain(error, name)}') from error


def _from_hub(name: str, *, config: str | None, revision: str | None) -> Source:
    builder = _hub_builder(name, config, revision)
    try:
        _fetch(builder)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f'data set "{name}": {_explain(error, name)}') from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    commit = _commit(splits)
    if isinstance(builder, Cache) and revision not in (None, commit):  # the library takes what it has, whatever was asked for
        raise DataError(
            f'data set "{name}": the hub can not be asked for dataset_revision "{revision}", and the local cache holds commit '
            f"{commit}. Go online once, or name that commit."
        )
    return Source(splits=splits, revision=commit)


def _fetch(builder: datasets.DatasetBuilder) -> None:
    """Downloads what a hub data set will be read from, and compares it with the published digests before it is read.

    The library itself compares none. It finds the files in its cache afterwards and asks the hub nothing again.
    """
    files = builder.config.data_files
    if files is None or Path(builder.cache_dir).is_dir():
        return  # read by an earlier run, and kept as Arrow
    fetched = datasets.DownloadManager().download(files)
    for split in files:
        for url, file in zip(files[split], fetched[split], strict=True):
            if damage := take_out_if_damaged(Path(file)):
                raise DataError(f"{url.removeprefix('hf://datasets/')}: {damage}")


def _why(error: Exception) -> str:
    """What kept a stream from going on, by the hub's answer or in the library's words."""
    return explain(error, instead="leave --streaming out") or f"{type(error).__name__}: {first_line(error)}"


def _explain(error: Exception, name: str) -> str:
    """What the libraries say about a data set on the hub, and what to do."""
    meant = did_you_mean(name, [DIGITS, *map(str, Path(name).parent.glob("*"))])
    not_here, instead = f"no such file or folder here{meant}, and", "give a local path"
    said = first_line(error)
    match error:
        case datasets.exceptions.DatasetNotFoundError():
            return f"{not_here} the hub says: {said} Check id and revision; what is private or gated needs `hf auth login`."
        case datasets.exceptions.DataFilesNotFoundError() | EmptyDatasetError():
            return f"the one on the hub holds no data files: {said}. Name another, or {instead}."
        case datasets.exceptions.DatasetGenerationError():
            cause = error.__cause__ or error
            return f"the one on the hub can not be read: {type(cause).__name__}: {first_line(cause)}"
        case RuntimeError() if "scripts" in said:
            return (
                f"the one on the hub is a program, and programs of others are never run: {said}. Try dataset_revision "
                '"refs/convert/parquet", where the hub keeps the data alone.'
            )
        case ValueError() if "onfig" in said:
            known = " ".join(str(error).splitlines()[:2])  # the second line lists what there is
            return f"{known}. Give one of these as dataset_config."
        case ConnectionError():  # the library drops the cause
            offline = ", as HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else ""
            return (
                f"{not_here} it is not in the local cache and the hub can not be reached{offline} ({said}). Go online once, or "
                f"{instead}."
            )
    reason = explain(error, instead=instead)
    return f"{not_here} {reason}" if reason else f"the one on the hub can not be read: {type(error).__name__}: {said}"


def _commit(splits: dict[str, Dataset]) -> str | None:
    """The commit that a hub data set was read at: the library names its cache folder so."""
    for split in splits.values():
        for file in split.cache_files:
            if re.fullmatch(r"[0-9a-f]{40}", folder := Path(file["filename"]).parent.name):
                return folder
    return None
