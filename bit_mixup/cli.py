"""The door for people with a terminal: `bit-mixup COMMAND`.

torch is imported only by what needs it, so that help, models and plans come at once.
"""

import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from bit_mixup.catalog import PUBLISHED
from bit_mixup.config import Config, DistillConfig, DoctorConfig, PretrainConfig, TransferConfig
from bit_mixup.environment import available_cores
from bit_mixup.errors import BitMixupError, ConfigError, Interrupted, did_you_mean, shown
from bit_mixup.requests import CompareConfig, EvaluateConfig, ExportConfig, PredictConfig, PushConfig, RequestKind
from bit_mixup.storage import write_json, write_text
from bit_mixup.weights import BUNDLED, find_weights, size_text

SHOWN_PREDICTIONS = 20  # on the terminal, where a file has all

_USAGE = """usage: bit-mixup COMMAND [OPTIONS]

Transfer a pretrained BiT to your pictures; the BiT-HyperRule chooses schedule, resolution and mixup.

  fine-tune   fine-tune a model on a data set, score it, write the run's folder
  plan        show what fine-tune would do and why, without training (--time adds an estimate)
  doctor      look for what is wrong with a data set (--full decodes every picture); exits with 1 after warnings, 2 after errors
  models      list the pretrained weights
  predict     say what is on pictures: files, folders, globs or a data set
  evaluate    score a saved model on a data set, with the same report as a run
  compare     tell whether runs differ by more than chance on the same test examples
  push        publish a run's model on the hub, with a model card (--dry-run writes the files alone)
  export      write a model as ONNX, or for torch.export, for other programs
  pretrain    train a model from random weights by BiT's upstream recipe, to transfer from
  distill     train a model to agree with another, without labels

`bit-mixup COMMAND --help` lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exits with 2 and one line of explanation where it can not be done, and with 128 and the number of the
    signal that stopped it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"fine-tune": fine_tune_command, "plan": plan_command, "models": models_command}
    commands |= {"doctor": doctor_command, "pretrain": pretrain_command, "distill": distill_command}
    commands |= {"predict": predict_command, "evaluate": evaluate_command, "compare": compare_command}
    commands |= {"export": export_command, "push": push_command}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    try:
        if arguments[0] not in commands:
            raise ConfigError(
                f'there is no command "{arguments[0]}"{did_you_mean(arguments[0], commands)}: {", ".join(commands)}.'
            )
        commands[arguments[0]](arguments[1:])
    except BitMixupError as error:
        raise SystemExit(_explain(error)) from error
    except Interrupted as stop:
        print(f"bit-mixup: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop


def _explain(error: BitMixupError) -> int:
    print(f"bit-mixup: error: {error}", file=sys.stderr)
    return 2


def fine_tune_command(arguments: Sequence[str]) -> None:
    """fine-tune: every option is a field of `TransferConfig`."""
    config = _configuration(arguments, TransferConfig, prog="bit-mixup fine-tune")
    from bit_mixup.workflow import run_transfer

    run_transfer(config)


def pretrain_command(arguments: Sequence[str]) -> None:
    """pretrain: every option is a field of `PretrainConfig`."""
    config = _configuration(arguments, PretrainConfig, prog="bit-mixup pretrain")
    from bit_mixup.pretraining import run_pretrain

    run_pretrain(config)


def distill_command(arguments: Sequence[str]) -> None:
    """distill: every option is a field of `DistillConfig`."""
    config = _configuration(arguments, DistillConfig, prog="bit-mixup distill")
    from bit_mixup.pretraining import run_pretrain

    run_pretrain(config)


def plan_command(arguments: Sequence[str]) -> None:
    """plan: the options of fine-tune, and --processes N and --time."""
    rest, options = _take(arguments, {"--processes": True, "--time": False})
    processes = options.get("--processes")
    if processes is not None and not (re.fullmatch(r"[0-9]{1,9}", processes) and int(processes)):
        raise ConfigError(f"--processes {processes}: a whole number from 1 was expected.")
    config = _configuration(
        rest, TransferConfig, prog="bit-mixup plan", extra="Also: --processes N plans for N processes, --time times a few steps."
    )
    from bit_mixup.planning import make_plan

    plan = make_plan(config, num_processes=int(processes) if processes else None, to_be_run=False)
    print(plan.text())
    if "--time" in options:
        from bit_mixup.workflow import time_run

        minutes = time_run(plan) / 60
        print(f"{'time':<9} about {minutes:.3g} minutes of training here, by three timed passes (decoding pictures not counted)")


def doctor_command(arguments: Sequence[str]) -> None:
    """doctor: a data set, and the options of `DoctorConfig`. Exits with 1 after warnings and with 2 after errors."""
    config = _doctor_configuration(arguments)
    from bit_mixup.doctor import exit_code, findings_table, visit

    findings = visit(
        config.dataset,
        config=config.dataset_config,
        revision=config.dataset_revision,
        train_split=config.train_split,
        test_split=config.test_split,
        image_column=config.image_column,
        label_column=config.label_column,
        preset=config.preset,
        seed=config.seed,
        full=config.full,
    )
    print(findings_table(findings))
    if config.json is not None:
        write_json(config.json, {"dataset": config.dataset, "findings": [finding.as_dict() for finding in findings]})
    if status := exit_code(findings):
        raise SystemExit(status)


def _doctor_configuration(arguments: Sequence[str]) -> DoctorConfig:
    named = bool(arguments) and not arguments[0].startswith("-")
    return tyro.cli(
        DoctorConfig,
        args=["--dataset", *arguments] if named else list(arguments),
        prog="bit-mixup doctor",
        description=f"{inspect.cleandoc(DoctorConfig.__doc__ or '')}\n\nThe data set may come first, without its flag.",
    )


def predict_command(arguments: Sequence[str]) -> None:
    """predict: the options of `PredictConfig`. Exits with 1 where pictures could not be read."""
    config = _request(arguments, PredictConfig)
    from bit_mixup.classifier import check_output, load, predictions_table, write_predictions
    from bit_mixup.launching import torch_threads
    from bit_mixup.pictures import find_pictures

    if config.output is not None:
        check_output(config.output)
    with torch_threads(config.threads or available_cores()):
        classifier = load(config.model, revision=config.revision, rule=config.rule, precision=config.precision)
        pictures = find_pictures(config.pictures, split=config.split, image_column=config.image_column)
        predictions = classifier.predict(
            pictures, top=config.top, batch_size=config.batch_size, num_workers=config.num_workers, progress=True
        )
    if config.output is not None:
        write_predictions(predictions, config.output)
    print(predictions_table(predictions, limit=None if config.output is None else SHOWN_PREDICTIONS))
    if config.output is not None:
        print(f"\n{len(predictions):,} predictions in {config.output}, by the rule {classifier.choice.rule}")
    unreadable = [one.error for one in predictions if one.error is not None]
    if unreadable:
        print(f"\n{len(unreadable):,} of {len(predictions):,} could not be read:", file=sys.stderr)
        print("\n".join(f"  {shown(error)}" for error in unreadable), file=sys.stderr)
        raise SystemExit(1)


def evaluate_command(arguments: Sequence[str]) -> None:
    """evaluate: the options of `EvaluateConfig`."""
    config = _request(arguments, EvaluateConfig)
    from bit_mixup import scoring
    from bit_mixup.classifier import load
    from bit_mixup.launching import torch_threads

    with torch_threads(config.threads or available_cores()):
        classifier = load(config.model, revision=config.revision, rule=config.rule, precision=config.precision)
        examples = scoring.find_examples(
            classifier,
            config.dataset,
            config=config.dataset_config,
            revision=config.dataset_revision,
            split=config.split,
            image_column=config.image_column,
            label_column=config.label_column,
        )
        folder = config.output_dir or scoring.default_evaluation_folder(classifier, examples)
        scoring.check_evaluation_folder(folder, overwrite=config.overwrite)  # sooner than an hour of work
        evaluation = scoring.score_examples(
            classifier, examples, batch_size=config.batch_size, num_workers=config.num_workers, progress=True
        )
    scoring.write_evaluation(classifier, evaluation, folder, command=shlex.join(["bit-mixup", "evaluate", *arguments]))
    print(evaluation.report.table(worst=10))
    if evaluation.trained_on:
        print(f"NOTE: {scoring.TRAINED_ON}\n")
    print(f"{folder / 'report.html'!s:<60} the report, to open in a browser")


def compare_command(arguments: Sequence[str]) -> None:
    """compare: the options of `CompareConfig`."""
    config = _request(arguments, CompareConfig)
    from bit_mixup.comparison import compare_runs, render_comparison

    comparison = compare_runs([Path(run) for run in config.runs], resamples=config.resamples, seed=config.seed)
    print(comparison.table())
    if config.json is not None:
        write_json(config.json, comparison.as_dict())
    if config.html is not None:
        write_text(config.html, render_comparison(comparison, command=shlex.join(["bit-mixup", "compare", *arguments])))


def export_command(arguments: Sequence[str]) -> None:
    """export: the options of `ExportConfig`."""
    config = _request(arguments, ExportConfig)
    from bit_mixup.classifier import load
    from bit_mixup.export import check_export, export_model

    check_export(config.output, overwrite=config.overwrite)
    classifier = load(config.model, revision=config.revision, rule="stored" if config.rule == "stored" else "raw")
    said = export_model(
        classifier,
        config.output,
        ending="logits" if config.rule == "none" else "probabilities",
        pixels=config.pixels,
        overwrite=config.overwrite,
    )
    shapes = {side: " x ".join(map(str, said[side]["shape"])) for side in ("input", "output")}
    takes, gives = (said["input"][name] for name in ("name", "type")), said["output"]["name"]
    print(f"{config.output!s:<60} {' '.join(takes)} {shapes['input']} -> {gives} {shapes['output']}")
    if said["prediction_rule"]:
        print(f"{'':<60} by the rule {classifier.choice.rule} ({classifier.choice.why})")
    print(f"{f'{config.output}.json':<60} what a program must know to call it")


def push_command(arguments: Sequence[str]) -> None:
    """push: the options of `PushConfig`."""
    config = _request(arguments, PushConfig)
    from bit_mixup.publishing import push

    published = push(
        config.run,
        config.repository,
        dry_run=config.dry_run,
        private=config.private,
        license=config.license,
        message=config.message,
    )
    print("\n".join(published.files))
    print(f"\n{published.url or config.dry_run}")


def _request(arguments: Sequence[str], kind: type[RequestKind]) -> RequestKind:
    """What is asked of a finished model or run."""
    command = kind.__name__.removesuffix("Config").lower()
    return tyro.cli(kind, args=list(arguments), prog=f"bit-mixup {command}", description=inspect.cleandoc(kind.__doc__ or ""))


def models_command(arguments: Sequence[str]) -> None:
    """models: a table of the published weights and the bundled ones."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(f'models takes no options, but got "{arguments[0]}".')
    bundled = find_weights(BUNDLED)
    print(f"{'model':<52} {'parameters':>10} {'pixels':>6}  upstream data")
    print(f"{BUNDLED:<52} {size_text(bundled.shape.parameter_count(), ''):>10} {bundled.input_size:>6}  letters, icons, emoji; "
          f"{bundled.name}, in the package")  # fmt: skip
    for model in PUBLISHED.values():
        print(
            f"{model.name:<52} {size_text(model.architecture.parameter_count(), ''):>10} {model.input_size:>6}  {model.upstream}"
        )
    print("\nParameters are counted without the head. A path to a .safetensors or original .npz file or a folder works as well.")


def _take(arguments: Sequence[str], known: dict[str, bool]) -> tuple[list[str], dict[str, str]]:
    """Takes a few options out of the arguments: the rest, and the values of those found (True: the option has a value)."""
    rest: list[str] = []
    found: dict[str, str] = {}
    waiting = iter(arguments)
    for argument in waiting:
        name, separator, value = argument.partition("=")
        if name not in known:
            rest.append(argument)
        elif not known[name]:
            found[name] = ""
        else:
            found[name] = value if separator else next(waiting, "")
    return rest, found


def _configuration(arguments: Sequence[str], kind: type[Config], *, prog: str, extra: str = "") -> Config:
    """A configuration from flags, on top of a saved one where --config names it."""
    rest, options = _take(arguments, {"--config": True})
    default = kind.from_json(Path(options["--config"])) if "--config" in options else None
    description = "\n\n".join(
        text
        for text in (
            inspect.cleandoc(kind.__doc__ or ""),
            "Also: --config FILE starts from the config.json of an earlier run.",
            extra,
        )
        if text
    )
    return tyro.cli(
        kind,
        args=rest,
        prog=prog,
        description=description,
        default=tyro.MISSING_NONPROP if default is None else default,
    )
