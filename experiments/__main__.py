"""`python -m experiments`: runs, sweeps and tables; `experiments/README.md` tells the rest."""

import argparse
import sys
from pathlib import Path

from experiments import runner, status, sweep
from experiments.tables import plots
from minigrad.train import DamagedFile, load_record


def main(argv=None, runs=None, tables=None):
    """Run the command line and return the exit code; `runs`, `tables` default to the registries."""
    arguments = _parser().parse_args(argv)
    try:
        runs = runner.registry() if runs is None else runs
        if name := getattr(arguments, "table", None):
            tables = runner.tables() if tables is None else tables
            if name not in tables:
                there = ", ".join(sorted(tables)) or "none"
                raise runner.RunError(f"no table {name!r}; there are: {there}")
            arguments.table, arguments.table_name = tables[name], name
        arguments.command(runs, arguments)
    except (runner.RunError, FloatingPointError, DamagedFile) as error:
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

    sweeping = commands.add_parser("sweep", help="do the runs of a table that are not done yet")
    sweeping.set_defaults(command=_sweep)
    sweeping.add_argument("table")
    sweeping.add_argument(
        "--only", default="", metavar="TEXT", help="of cells with TEXT in ROW/COLUMN"
    )
    sweeping.add_argument("--steps", help="of every run, instead of the table's")
    sweeping.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    sweeping.add_argument("--dask", metavar="ADDRESS", help="a cluster to do them on")
    for command in (run, sweeping):
        command.add_argument("--checkpoint-seconds", type=float, default=30.0, metavar="S")
        command.add_argument(
            "--mixed", action="store_true", help="go on although sources have changed"
        )

    table = commands.add_parser("table", help="print a table, ours beside published")
    table.set_defaults(command=_table)
    table.add_argument("table")

    progress = commands.add_parser("status", help="how far each run is, or each cell of a table")
    progress.set_defaults(command=_status)
    progress.add_argument("table", nargs="?")
    for command in (run, sweeping, table, progress):
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


def _sweep(runs, arguments):
    sweep.sweep(
        sweep.configs(arguments.table, runs, arguments.steps, arguments.only),
        runs,
        jobs=arguments.jobs,
        dask=arguments.dask,
        out=arguments.out,
        checkpoint_seconds=arguments.checkpoint_seconds,
        mixed=arguments.mixed,
    )


def _table(runs, arguments):
    def load(name):
        try:
            return load_record(arguments.out / f"{name}.json")
        except DamagedFile as error:
            print(f"{error}; a sweep makes it anew", file=sys.stderr)
            raise FileNotFoundError(name) from error

    places = plots.places(arguments.table, runs, load)
    command = f"python -m experiments sweep {arguments.table_name}"
    print(plots.markdown(arguments.table, places, command), end="")


def _pair(text):
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise runner.RunError(f"--set takes key=value, got {text!r}")
    return key, value


def _status(runs, arguments):
    columns = ["name", "data", "steps", "seconds", "left", "last", "state"]
    if arguments.table:
        columns[:2] = ["row", "column"]
        rows = []
        for cell in arguments.table.cells:
            name, config = sweep.configured(cell, runs)
            row = status.row(name, arguments.out, config)
            rows.append(row | {"row": cell.row, "column": cell.column})
    else:
        rows = status.overview(runs, arguments.out)
    if not rows:
        print("nothing has been run yet")
        return
    table = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
