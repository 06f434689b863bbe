"""What is wrong with a data set?

Labels, classes, columns and file sizes are looked at before every run; that takes seconds, as no picture is decoded. On request
every picture is, which finds what only pixels show: broken ones, odd kinds, and the same picture twice.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Image

from bit_mixup.data import ImageDataset, Part, load_image_dataset, looks_like_labels, looks_like_pictures
from bit_mixup.errors import DataError, shown
from bit_mixup.hyperrule import SMALL_IMAGE_AREA, Preset, bit_hyperrule
from bit_mixup.scanning import Scan, SizeSummary, find_empty, scan, summarize_sizes

Severity = Literal["error", "warning", "note"]

FEW = 5  # training examples of a class, below which it is hardly learnt without --examples-per-class
LOPSIDED = 10  # times as many examples in the largest class as in the smallest
FEW_TO_SCORE = 100  # examples: below, one of them is more than a percent
PLAIN_MODES = ("RGB", "L", "P", "1", "RGBA")
LISTED = 5  # names in a finding; the JSON file has all
EDGES = (32, 96, 224, 512, 1024, 4096)  # pixels, of the shorter side, between the bars of the histogram


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a person should know of a data set.

    Args:
        severity: error: training would stop or learn nonsense. warning: scores may mislead. note: good to know.
        what: was found.
        where: column, split, files or rows.
        advice: what to do; empty where nothing needs to be done.
        names: all that `where` may have shortened.
    """

    severity: Severity
    what: str
    where: str
    advice: str = ""
    names: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self) | {"names": list(self.names)}

    def as_line(self) -> str:
        """For a plan."""
        return shown(f"{self.severity}: {self.what} ({self.where})" + (f". {self.advice}" if self.advice else ""))


def exit_code(findings: Sequence[Finding]) -> int:
    """2 where one is an error, 1 where one is a warning, else 0."""
    return max(({"error": 2, "warning": 1, "note": 0}[finding.severity] for finding in findings), default=0)


def findings_table(findings: Sequence[Finding]) -> str:
    """Findings for the terminal, the worst first, 130 letters wide."""
    widths = (8, 50, 34, 32)
    rows = [("severity", "finding", "where", "what to do"), tuple("-" * width for width in widths)]
    order: list[Severity] = ["error", "warning", "note"]
    for finding in sorted(findings, key=lambda finding: order.index(finding.severity)):
        rows.append((finding.severity, shown(finding.what), shown(finding.where), shown(finding.advice)))
    lines = []
    for row in rows:
        cells = [textwrap.wrap(text, width) or [""] for text, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = (cell[number] if number < len(cell) else "" for cell in cells)
            lines.append("  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)


def visit(source: Any, *, preset: Preset, seed: int, full: bool, **options: Any) -> list[Finding]:
    """Everything that can be found out about a data set.

    Args:
        source: as in `load_image_dataset`.
        preset: of the rule that chooses the resolution.
        seed: of splits and samples.
        full: whether every picture is decoded, with a bar.
        **options: columns, splits and revision, as in `load_image_dataset`.
    """
    try:
        data = load_image_dataset(source, seed=seed, **options)
    except DataError as error:
        return [Finding(severity="error", what=str(error), where=str(source), advice="Nothing else could be looked at.")]
    findings = [*find_empty_pictures(data), *column_findings(data)]
    sizes = None
    try:
        sizes = summarize_sizes(data.train, small_area=SMALL_IMAGE_AREA, seed=seed)
    except DataError as error:
        if not full:  # the scan tells it of all
            findings.append(Finding(severity="error", what=str(error), where=data.train.name, advice="--full lists all."))
    findings += examine(data, sizes)
    if sizes is not None:
        hyper = bit_hyperrule(len(data.train), sizes.median_area, preset=preset)
        what = f"the rule ({preset}) will resize to {hyper.resize_size} and crop to {hyper.crop_size} pixels"
        findings.append(Finding(severity="note", what=what, where=f"median area {sizes.median_area:,.0f} square pixels"))
    return findings + (scan_findings(data, scan(_parts(data), progress=True)) if full else [])


def _parts(data: ImageDataset) -> dict[str, Part]:
    """What is trained on, scored and held out; the first two may be of one split."""
    parts = {"training": data.train, "test": data.test, "validation": data.validation}
    return {name: part for name, part in parts.items() if part is not None}


def _few(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else "")


def find_empty_pictures(data: ImageDataset) -> list[Finding]:
    """Pictures without a byte; none is decoded."""
    names = []
    for part in _parts(data).values():
        empty = find_empty(part).tolist()
        names += part.ids(empty) if empty else []
    what = f"{len(names):,} picture(s) of no bytes"
    advice = "Fetch them again or remove them; --corrupt-images quarantine leaves them out."
    return [Finding(severity="error", what=what, where=_few(names), advice=advice, names=tuple(names))] if names else []


def column_findings(data: ImageDataset) -> list[Finding]:
    """Which columns were chosen and which others there are; classes in another order elsewhere."""
    split = data.source.splits[data.train.name]
    others = [name for name in split.column_names if name not in (data.image_column, data.label_column)]
    also = {
        "pictures": [name for name in others if isinstance(split.features[name], Image) or looks_like_pictures(split, name)],
        "classes": [name for name in others if isinstance(split.features[name], ClassLabel) or looks_like_labels(split, name)],
    }
    findings = [
        Finding(
            severity="note",
            what=f'pictures from column "{data.image_column}", classes from "{data.label_column}"; '
            + "; ".join(f"other columns that could hold {what}: {', '.join(names) or 'none'}" for what, names in also.items()),
            where=f"split {data.train.name}",
            advice="Name others with --image-column, --label-column." if any(also.values()) else "",
        )
    ]
    findings += [Finding(severity="note", what=note, where="splits") for note in data.notes[1:]]
    return findings + list(_other_orders(data))


def _other_orders(data: ImageDataset) -> Iterator[Finding]:
    own = data.source.splits[data.train.name].features[data.label_column]
    for name, split in data.source.splits.items():
        other = split.features.get(data.label_column)
        if isinstance(own, ClassLabel) and isinstance(other, ClassLabel) and own.names != other.names:
            yield Finding(
                severity="warning",
                what=f"classes are in another order than in split {data.train.name}: label 0 is "
                f'"{(other.names or ["?"])[0]}", not "{own.names[0]}". Here they are matched by name',
                where=f"split {name}",
                advice="Give both splits one ClassLabel before other tools read them.",
            )


def examine(data: ImageDataset, sizes: SizeSummary | None, *, few_shot: bool = False) -> list[Finding]:
    """Labels, classes and a sample of sizes; no picture is decoded.

    Args:
        data: whose labels are in range, or it would not have been opened.
        sizes: of a sample of the training pictures, if they could be read.
        few_shot: whether few examples were asked for.
    """
    findings = [*_class_findings(data, few_shot=few_shot), *_name_findings(data)]
    if sizes is not None:
        histogram = size_histogram(Counter(sizes.sizes))
        what = f"shorter sides in pixels: {histogram}"
        findings.append(Finding(severity="note", what=what, where=f"{sizes.sampled:,} training pictures"))
    return findings


def _class_findings(data: ImageDataset, *, few_shot: bool) -> Iterator[Finding]:
    train = np.bincount(data.train.labels, minlength=data.num_classes)
    test = np.bincount(data.test.labels, minlength=data.num_classes)

    def named(chosen: Any) -> dict[str, Any]:
        names = tuple(data.class_names[index] for index in np.flatnonzero(chosen))
        return {"where": _few(names), "names": names}

    untrained, unscored = (train == 0) & (test > 0), (train > 0) & (test == 0)
    missing, few = (train == 0) & (test == 0), (train > 0) & (train < FEW)
    if untrained.any():
        what = f"{untrained.sum():,} class(es) are scored but have no training example"
        advice = "Add some, or remove them from what is scored."
        yield Finding(severity="warning", what=what, **named(untrained), advice=advice)
    if missing.any():
        what = f"{missing.sum():,} class(es) have a name but no example"
        yield Finding(severity="warning", what=what, **named(missing), advice="Remove the names, or look for the pictures.")
    if unscored.any():
        what = f"{unscored.sum():,} class(es) are trained but never scored"
        yield Finding(severity="warning", what=what, **named(unscored), advice=f"Add some to {data.test.name}.")
    if few.any() and not few_shot:
        what = f"{few.sum():,} class(es) have fewer than {FEW} training examples"
        yield Finding(severity="warning", what=what, **named(few), advice="Add some.")
    present = np.flatnonzero(train)
    most, least = present[train[present].argmax()], present[train[present].argmin()]
    if train[most] >= LOPSIDED * train[least]:
        yield Finding(
            severity="warning",
            what=f"the largest class has {train[most] / train[least]:.0f} times as many training examples as the smallest",
            where=f"{data.class_names[most]}: {train[most]:,}, {data.class_names[least]}: {train[least]:,}",
            advice="Look at balanced accuracy and macro F1 beside accuracy.",
        )
    if len(data.test) < FEW_TO_SCORE:
        what = f"only {len(data.test):,} examples are scored: each is {1 / len(data.test):.1%} of accuracy"
        yield Finding(severity="note", what=what, where=f"split {data.test.name}")


def _name_findings(data: ImageDataset) -> Iterator[Finding]:
    odd = tuple(name for name in data.class_names if shown(name) != name)
    if odd:
        what = f"{len(odd):,} class name(s) hold invisible or control characters; they are shown as escapes"
        yield Finding(severity="warning", what=what, where=_few(odd), names=odd, advice="Rename the classes.")
    alike = Counter(name.strip().casefold() for name in data.class_names)
    twice = tuple(name for name in data.class_names if alike[name.strip().casefold()] > 1)
    if twice:
        what = f"{len(twice):,} class names differ by nothing but case or spaces"
        yield Finding(severity="warning", what=what, where=_few(twice), names=twice, advice="Are they one class? Rename one.")


def size_histogram(sizes: Counter[tuple[int, int]]) -> str:
    """How many pictures have a shorter side within which bounds, as text."""
    bars = Counter[int]()
    for (width, height), count in sizes.items():
        bars[int(np.searchsorted(EDGES, min(width, height), side="right"))] += count
    bounds = ["0", *map(str, EDGES)]
    ranges = [f"{first}-{int(last) - 1}" for first, last in pairwise(bounds)]
    ranges.append(f"{EDGES[-1]} or more")
    return ", ".join(f"{ranges[bar]}: {bars[bar]:,}" for bar in sorted(bars))


def scan_findings(data: ImageDataset, found: Scan) -> list[Finding]:
    """What decoding every picture has shown."""
    parts = _parts(data)
    findings = []
    for name, unreadable in found.unreadable.items():
        findings.append(
            Finding(
                severity="error",
                what=f"{len(unreadable):,} {name} picture(s) can not be decoded; the first: {unreadable[0].reason}",
                where=_few([one.where for one in unreadable]),
                names=tuple(one.where for one in unreadable),
                advice="Mend or remove them; --corrupt-images quarantine leaves them out.",
            )
        )
    everywhere = f"{found.pictures:,} pictures"
    odd = {mode: count for mode, count in found.modes.items() if mode not in PLAIN_MODES}
    if odd:
        kinds = ", ".join(f"{count:,} {mode}" for mode, count in sorted(odd.items()))
        findings.append(Finding(severity="note", what=f"stored in odd ways and converted to RGB: {kinds}", where=everywhere))
    if found.turned:
        what = f"{found.turned:,} picture(s) are turned upright, as their EXIF orientation says"
        findings.append(Finding(severity="note", what=what, where=everywhere))
    if found.sizes:
        what = f"shorter sides in pixels: {size_histogram(found.sizes)}"
        findings.append(Finding(severity="note", what=what, where=everywhere))
    return findings + list(_twin_findings(parts, found.twins))


def _twin_findings(parts: dict[str, Part], twins: list[list[tuple[str, int]]]) -> Iterator[Finding]:
    """The same picture more than once: across parts, with several labels, within a part."""

    def named(groups: list[list[tuple[str, int]]]) -> dict[str, Any]:
        names = [" = ".join(parts[name].ids([index])[0] for name, index in group[:3]) for group in groups[:100]]
        return {"where": _few(names[:1]) + (f" and {len(groups) - 1:,} more" if len(groups) > 1 else ""), "names": tuple(names)}

    across = [group for group in twins if len({name for name, _ in group}) > 1]
    if across:
        seen = sum(name != "training" for group in across for name, _ in group)
        what = f"{seen:,} picture(s) to score are there for training, too: scores on them mean nothing"
        yield Finding(severity="warning", what=what, **named(across), advice="Remove them from one of the splits.")
    torn = [group for group in twins if len({int(parts[name].labels[index]) for name, index in group}) > 1]
    if torn:
        what = f"{len(torn):,} picture(s) are there twice or more with different labels"
        yield Finding(severity="warning", what=what, **named(torn), advice="Decide which label is right.")
    within = [group for group in twins if max(Counter(name for name, _ in group).values()) > 1]
    if within:
        extra = sum(count - 1 for group in within for count in Counter(name for name, _ in group).values())
        what = f"{extra:,} picture(s) repeat another one of the same split"
        yield Finding(severity="warning", what=what, **named(within), advice="Remove what was copied by mistake.")
