"""How does the model of a run get onto the hub, and what does it say about itself there?

In timm's layout, which timm, transformers and bit_mixup load, with what bit_mixup needs to predict as it did here. The card is
written from the files of the run alone; of this machine's folders nothing gets into it.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from bit_mixup.catalog import PUBLISHED
from bit_mixup.config import TransferConfig
from bit_mixup.errors import CheckpointError, PublishError
from bit_mixup.evaluation import EvaluationReport, in_markdown
from bit_mixup.hub import explain, first_line
from bit_mixup.plots import reliability_diagram, save_figure, training_curves
from bit_mixup.repeating import command_line
from bit_mixup.report import TEMPLATES
from bit_mixup.runs import RunFolder
from bit_mixup.storage import read_json, whole_folder, write_text
from bit_mixup.unmixing import CHOICE, MEAN_IMAGE, RECORD
from bit_mixup.weights import BUNDLED, CONFIG_FILE, WEIGHTS_FILE

CARD, DIAGRAM, CURVES = "README.md", "reliability.png", "training.png"
_MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, RECORD, CHOICE, MEAN_IMAGE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was published, or would be.

    Args:
        files: their names.
        url: of the commit on the hub; None after a dry run.
    """

    files: tuple[str, ...]
    url: str | None


def push(
    run: Path,
    repository: str,
    *,
    dry_run: Path | None = None,
    private: bool = False,
    license: str | None = None,
    message: str | None = None,
) -> Published:
    """Publishes the model of a run on the hub as one commit; other files that the repository has stay.

    Args:
        run: the folder of a finished run of fine-tuning.
        repository: user/name; made if there is none.
        dry_run: an empty folder, or none, for what would be published; nothing is sent.
        private: whether a repository that is made is private.
        license: of the model, as the hub spells it. None: that of the weights it was trained from, where they state one.
        message: of the commit.

    Raises:
        PublishError: no name of a repository, a run that is not finished or not of fine-tuning, a folder that is not empty, no
            token, or the hub refuses.
        CheckpointError: a file of the run can not be read, or of the dry run not be written.
    """
    if (
        not _REPOSITORY.fullmatch(repository)
        or ".." in repository
        or "--" in repository
        or repository.endswith((".", "-", ".git"))
    ):
        raise PublishError(f'"{repository}" is no name of a repository on the hub; user/name was expected, such as ada/digits.')
    place = RunFolder(run)
    missing = [
        path
        for path in (place.config, place.plan, place.report, place.metrics, place.model / CONFIG_FILE, place.model / WEIGHTS_FILE)
        if not path.is_file()
    ]
    if missing:
        raise PublishError(f"{run} is not the folder of a finished run of fine-tuning: it has no {missing[0].relative_to(run)}.")
    task = read_json(place.plan).get("resolved", {}).get("task", "fine-tune")
    if task != "fine-tune":
        raise PublishError(
            f"{run} is a run of {task}; models of fine-tuning are published. Fine-tune its model/ first (--model {run}/model)."
        )
    if dry_run is not None:
        if dry_run.exists() and (not dry_run.is_dir() or any(dry_run.iterdir())):
            raise PublishError(f"{dry_run} is there already. Give --dry-run a folder that is empty or not there.")
        dry_run.parent.mkdir(parents=True, exist_ok=True)
        if dry_run.exists():
            dry_run.rmdir()
        with whole_folder(dry_run) as folder:
            return Published(files=_write(place, folder, repository, license), url=None)
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise PublishError(
            f"{repository}: you are not logged in to the hub. Log in (`hf auth login`) or set HF_TOKEN, with the right to write; "
            "--dry-run writes the files without it."
        )
    with tempfile.TemporaryDirectory(prefix="bit_mixup-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        files = _write(place, folder, repository, license)
        with _explained(repository):
            api = HfApi()
            api.create_repo(repository, private=private or None, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message or _message(place))
    return Published(files=files, url=str(commit.commit_url))


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """What the hub's client raises becomes a sentence."""
    try:
        yield
    except Exception as error:  # of the client, of its HTTP library, or of the system
        instead = "write the files with --dry-run"
        reason = explain(error, instead=instead, writing=True) or f"it can not be published: {first_line(error)}"
        raise PublishError(f"{repository}: {reason}") from error


def _message(place: RunFolder) -> str:
    resolved = read_json(place.plan)["resolved"]
    return f"{_base(resolved['weights'])} fine-tuned on {_public_name(resolved['data']['name'], resolved['data']['revision'])}"


def _write(place: RunFolder, folder: Path, repository: str, license: str | None) -> tuple[str, ...]:
    """Writes what is to be published; the names of the files."""
    try:
        for name in _MODEL_FILES:
            if (place.model / name).is_file():
                shutil.copyfile(place.model / name, folder / name)
        shutil.copyfile(place.report, folder / place.report.name)
    except OSError as error:
        raise CheckpointError(f"{place.model} can not be copied to {folder}: {error}.") from error
    saved = read_json(place.report)
    bins, rule = EvaluationReport.from_dict(saved).calibration.bins, saved["prediction"]["rule"]
    save_figure(reliability_diagram(bins, title=f"{repository}, prediction rule {rule}"), folder / DIAGRAM)
    save_figure(training_curves(place.read_metrics(), place.read_scores()), folder / CURVES)
    write_text(folder / CARD, model_card(place, repository, license=license))
    return tuple(sorted(path.name for path in folder.iterdir()))


def model_card(place: RunFolder, repository: str, *, license: str | None = None) -> str:
    """The model card of a finished run, as Markdown with the hub's metadata in front.

    Args:
        place: the run's folder.
        repository: user/name of where it will be.
        license: see `push`.
    """
    plan, saved, config = read_json(place.plan), read_json(place.report), read_json(place.model / CONFIG_FILE)
    resolved, environment = plan["resolved"], plan["environment"]
    data, weights = resolved["data"], resolved["weights"]
    report = EvaluationReport.from_dict(saved)
    license = license or config.get("pretrained_cfg", {}).get("license")
    name = _public_name(data["name"], data["revision"])
    asked = TransferConfig.from_json(place.config)
    public = replace(
        asked,
        dataset=name,
        model=BUNDLED if asked.model == BUNDLED else _base(weights),
        output_dir=None,
        attack_from=None,
        tracker=None,
        threads=None,
    )
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # it is Markdown: what others have named goes through `text`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["text"] = in_markdown
    return templates.get_template("card.md.j2").render(
        metadata=_metadata(repository, report, resolved, license),
        title=repository.split("/")[1],
        repository=repository,
        architecture=weights["architecture"],
        base=_base(weights),
        data=name,
        split=data["test_split"],
        label_names=data["class_names"],
        size=resolved["hyper"]["crop_size"],
        version=environment["versions"]["bit_mixup"],
        license=license,
        report=report,
        summary=report.summary(),
        rule=saved["prediction"]["rule"],
        why=saved["prediction"]["why"],
        raw=EvaluationReport.from_dict(saved["raw"]) if saved["raw"] else None,
        training=_training(resolved, environment, asked.seed),
        command=command_line(public),
    )


def _training(resolved: dict[str, Any], environment: dict[str, Any], seed: int) -> list[tuple[str, str]]:
    """Names and values of what was done, for people."""
    data, weights, hyper = resolved["data"], resolved["weights"], resolved["hyper"]
    decays = ", ".join(f"{step:,}" for step in hyper["decay_steps"])
    mirrored = "half of them mirrored" if resolved["flip"] else "never mirrored"
    trained, pictures = "all weights", f"resized to {hyper['resize_size']}, cropped to {hyper['crop_size']}, {mirrored}"
    if resolved["trainable"] == "head":
        trained, pictures = "the head alone, on features that stay as they were", f"resized to {hyper['crop_size']}, whole"
    elif resolved["trainable"] == "stage4":
        trained = "the last stage, the normalisation behind it and the head"
    return [
        ("data", f"{data['train_examples']:,} examples of {_public_name(data['name'], data['revision'])}{_at(data['revision'])}"),
        ("from", f"{_base(weights)}{_at(weights['revision'])}"),
        ("trained", trained),
        ("steps", f"{hyper['steps']:,} of {hyper['batch_size']} examples; SGD, momentum {hyper['momentum']:g}"),
        ("rate", f"{hyper['base_lr']:g} after {hyper['warmup_steps']:,} steps of warm-up; ten-fold decays after {decays}"),
        ("pictures", f"{pictures}; {resolved['interpolation']}"),
        ("mixup", f"alpha {hyper['mixup_alpha']}" if hyper["mixup_alpha"] else "none"),
        ("precision", resolved["precision"]),
        ("seed", str(seed)),
        ("device", f"{environment['device']}, {environment['processes']} process(es)"),
        ("versions", ", ".join(f"{library} {version}" for library, version in environment["versions"].items())),
    ]


def _at(revision: str | None) -> str:
    return f" @ {revision}" if revision else ""


def _metadata(repository: str, report: EvaluationReport, resolved: dict[str, Any], license: str | None) -> str:
    """What the hub reads: YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    data, weights = resolved["data"], resolved["weights"]
    name = _public_name(data["name"], data["revision"])
    metrics = [
        ("accuracy", "top-1 accuracy", report.accuracy),
        ("f1", "macro F1", report.macro_f1),
        ("nll", "negative log-likelihood", report.nll),
        ("ece", "calibration error (15 bins)", report.calibration.expected_calibration_error),
    ]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data["name"] if data["revision"] else name,
            dataset_name=name,
            dataset_split=data["test_split"],
            dataset_revision=data["revision"],
            metric_type=kind,
            metric_name=what,
            metric_value=value,
        )
        for kind, what, value in metrics
    ]
    base = _base(weights)
    card = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "big-transfer", "bit-mixup"],
        base_model=(f"timm/{base}" if base in PUBLISHED else base) if weights["revision"] else None,
        datasets=data["name"] if data["revision"] else None,
        metrics=["accuracy"],
        model_name=repository.split("/")[1],
        eval_results=results,
    )
    return str(card.to_yaml()).strip()


def _public_name(name: str, revision: str | None) -> str:
    """A data set's name without the folders of this machine; the whole of it, if it is on the hub."""
    return name if revision else Path(name).name


def _base(weights: dict[str, Any]) -> str:
    """The name of the weights that training started from, without the folders of this machine."""
    name = str(weights["name"])
    if weights["revision"] or name in PUBLISHED:
        return name
    path = Path(name)
    return path.parent.name if path.name == "model" else path.name
