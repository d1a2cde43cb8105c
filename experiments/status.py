"""How far the runs are: what `python -m experiments status` shows."""

from pathlib import Path

from experiments import runner
from minigrad.train import DamagedFile, load_record


def overview(runs, out=runner.RESULTS):
    """Return a dict for each run that has a record or a checkpoint, or is there to be done."""
    out = Path(out)
    names = {
        runner.record_name(run, runner.configure(runs, name, data))
        for name, run in runs.items()
        for data in run.data or [None]
    }
    names |= {path.stem for path in out.glob("*.json")}
    folder = runner.runs_folder()
    names |= {path.parent.name for path in folder.glob("*/checkpoint-?.npz")}
    names |= {path.parent.name for path in folder.glob("*/lock") if runner.is_running(path.parent)}
    return [row(name, out) for name in sorted(names)]


def row(name, out=runner.RESULTS, config=None):
    """Return what `status` shows of a run, or of a table's cell, which asks for `config`."""
    row = dict.fromkeys(("data", "steps", "seconds", "left", "last"), "")
    row = {"name": name, **row, "state": "not run"}
    good, damaged = runner.checkpoints(runner.runs_folder() / name)
    record = None
    try:
        record = load_record(out / f"{name}.json")
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        damaged.append(str(error))
    steps = config and config["steps"]
    if config:
        record = record if record and runner.is_of(config, record) else None
        good = [found for found in good if runner.is_of(config, found[2])]
    asked = steps or (good[0][2]["config"]["steps"] if good else 0)
    if record and record["config"]["steps"] >= asked:
        good = []  # whatever the checkpoints are, all that is asked for is there
    newest = good[0][2] if good else None
    if runner.is_running(runner.runs_folder() / name):
        row["state"] = "running"
    elif newest or record:
        row["state"] = "partial"
    if source := newest or record:
        curves = (newest["snapshot"] if newest else record)["curves"]
        done = good[0][0] if good else record["config"]["steps"]
        last = next(((key, curve["values"][-1]) for key, curve in curves.items()), None)
        steps = steps or source["config"]["steps"]
        if record and done == record["config"]["steps"] >= steps:
            row["state"] = "finished"
        else:
            row["left"] = duration(source["seconds"] / done * max(0, steps - done))
        row |= {
            "data": source["config"]["data"] or "",
            "steps": f"{done}/{steps}",
            "seconds": f"{source['seconds']:.0f}",
            "last": f"{last[0]} {last[1]:.5g}" if last else "",
        }
    elif steps:
        row["steps"] = f"0/{steps}"
    if damaged:
        row["state"] = "damaged: " + "; ".join(damaged)
    return row


def duration(seconds):
    """Return a time in words: "41 s", "12 min", "3.4 h", "2.1 days"."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds / size < limit:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} days"
