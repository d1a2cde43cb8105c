"""`python -m experiments list | run NAME | status`; `experiments/README.md` tells the rest."""

import argparse
import sys
from pathlib import Path

from experiments import runner


def main(argv=None, runs=None):
    """Run the command line and return the exit code; `runs` defaults to the registry."""
    arguments = _parser().parse_args(argv)
    try:
        runs = runner.registry() if runs is None else runs
        arguments.command(runs, arguments)
    except (runner.RunError, FloatingPointError) as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _fail(message):
    print(f"error: {message}", file=sys.stderr)
    return 1


def _parser():
    parser = argparse.ArgumentParser(prog="python -m experiments", description=runner.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the runs there are, with their settings")
    listing.set_defaults(command=_list)

    run = commands.add_parser("run", help="do a run, or go on with it, and write its record")
    run.set_defaults(command=_run)
    run.add_argument("name")
    run.add_argument("--data", help="the data set (default: the first that `list` shows)")
    run.add_argument("--steps", help="more steps than a finished run has continue it")
    run.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings"
    )
    run.add_argument("--checkpoint-seconds", type=float, default=30.0, metavar="S")
    run.add_argument("--mixed", action="store_true", help="go on although sources have changed")

    status = commands.add_parser("status", help="how far each run is")
    status.set_defaults(command=_status)
    for command in (run, status):
        command.add_argument(
            "--out", type=Path, default=runner.RESULTS, help="folder of the records"
        )
    return parser


def _list(runs, _):
    if not runs:
        print("no runs yet: a file of experiments/ with RUNS = {...} adds some")
    for name, run in sorted(runs.items()):
        print(f"{name}: {(run.setup.__doc__ or '').strip().partition(chr(10))[0]}")
        for data in run.data or [None]:
            config = runner.configure(runs, name, data)
            settings = " ".join(f"{k}={v}" for k, v in config.items() if k not in ("name", "data"))
            print(f"    --data {data}: {settings}" if data else f"    {settings}")


def _run(runs, arguments):
    settings = dict(_pair(text) for text in arguments.set)
    if arguments.steps is not None:
        settings["steps"] = arguments.steps
    config = runner.configure(runs, arguments.name, arguments.data, settings)
    record = runner.execute(
        runs[arguments.name],
        config,
        out=arguments.out,
        checkpoint_seconds=arguments.checkpoint_seconds,
        mixed=arguments.mixed,
    )
    print(
        f"{arguments.out / record['name']}.json: {config['steps']} steps, {record['seconds']:.0f} s"
    )
    for key, value in record["scalars"].items():
        print(f"    {key} {value:.6g}")


def _pair(text):
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise runner.RunError(f"--set takes key=value, got {text!r}")
    return key, value


def _status(runs, arguments):
    rows = runner.overview(runs, arguments.out)
    if not rows:
        print("nothing has been run yet")
        return
    columns = ["name", "data", "steps", "seconds", "last", "state"]
    table = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
