"""Sweeps: the runs of a published table, each in a process of its own, here or on a Dask cluster.

What a cell of a table needs is a run's config; cells that share a record share its run. A sweep
does those runs whose records are not there yet: it can be cut off and repeated at any moment.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing import connection
from pathlib import Path

from experiments import runner
from experiments.runner import RunError
from experiments.status import duration
from minigrad.train import DamagedFile, load_record, save_record

# Read by the libraries when they are imported; `execute` then limits BLAS to the config's threads.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
ORIGIN = runner.origin()  # when the code was imported: a Dask worker may live longer than that


def configs(table, runs, steps=None, only=""):
    """Return the configs of a table's cells, in its order: a dict by the name of the record.

    `steps` replaces those of every cell; `only` chooses the row, or the "row/column", that is so
    called, or else the cells whose "row/column" contains it. Of cells that share a record the one
    with most steps counts.
    """
    found, exact = {}, {cell.row for cell in table.cells}
    exact |= {f"{cell.row}/{cell.column}" for cell in table.cells}
    for cell in table.cells:
        place = f"{cell.row}/{cell.column}"
        if only in (cell.row, place) if only in exact else only in place:
            name, config = configured(cell, runs, steps)
            if name not in found or found[name]["steps"] < config["steps"]:
                found[name] = config
    if not found:
        places = ", ".join(f"{cell.row}/{cell.column}" for cell in table.cells)
        raise RunError(f"no cell contains {only!r}; there are: {places}")
    return found


def configured(cell, runs, steps=None):
    """Return the name of the record that a cell shows, and the config that makes it."""
    settings = cell.settings | ({} if steps is None else {"steps": steps})
    try:
        config = runner.configure(runs, cell.run, cell.data, settings)
    except RunError as error:
        raise RunError(f"{cell.row}/{cell.column}: {error}") from error
    return runner.record_name(runs[cell.run], config), config


def recorded(name, config, out=runner.RESULTS):
    """Return the record of `config`, whatever its steps; None if it is not there or damaged."""
    with contextlib.suppress(FileNotFoundError, DamagedFile):
        record = load_record(Path(out) / f"{name}.json")
        return record if runner.is_of(config, record) else None
    return None


def sweep(
    todo, runs, *, jobs=1, dask=None, out=runner.RESULTS, checkpoint_seconds=30.0, mixed=False
):
    """Do the runs `todo`, a dict as `configs` returns, whose records are not there yet.

    At most `jobs` at once on this machine, or on the Dask cluster at the address `dask`. A run that
    fails is reported and the others go on; raises RunError at the end if there was any.
    """
    missing = {}
    for name, config in todo.items():
        record = recorded(name, config, out)
        if record is None or record["config"]["steps"] < config["steps"]:
            missing[name] = config
    print(f"{len(todo) - len(missing)} of {len(todo)} runs done", flush=True)
    options = {"checkpoint_seconds": checkpoint_seconds, "mixed": mixed}
    if dask:
        outcomes = _on_cluster(dask, missing, runs, Path(out), options)
    else:
        outcomes = _on_this_machine(missing, runs, jobs, {"out": Path(out), **options})
    start, failed = time.perf_counter(), []
    for i, (name, done, message) in enumerate(outcomes, 1):
        left = (time.perf_counter() - start) / i * (len(missing) - i)
        more = f"; about {duration(left)} left" if i < len(missing) else ""
        print(f"[{i}/{len(missing)}] {name}: {message}{more}", flush=True)
        failed += [] if done else [name]
    if failed:
        raise RunError(f"{len(failed)} of {len(missing)} runs failed: {', '.join(failed)}")


def _attempt(run, config, **options):
    """Do a run; return its record or None, and a sentence on how it went."""
    try:
        record = runner.execute(run, config, **options)
    except (RunError, FloatingPointError, OSError) as error:
        return None, f"FAILED: {error}"
    except Exception:
        return None, f"FAILED: {traceback.format_exc()}"
    return record, f"{config['steps']} steps in {duration(record['seconds'])}"


# On this machine: a process for each run, started anew, so that no run sees what another left.


def _on_this_machine(todo, runs, jobs, options):
    """Yield (name, done, message) as runs end."""
    if jobs < 1:
        raise RunError(f"--jobs must be at least 1, got {jobs}")
    context = multiprocessing.get_context("spawn")
    waiting, running = list(todo.items()), {}
    options["progress"] = jobs == 1  # several bars would write over each other
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, config = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(sender, runs[config["name"]], config, options)
                )
                with _environment(ONE_THREAD):
                    process.start()
                if jobs > 1:
                    print(f"{name}: begun", flush=True)
                sender.close()  # so that the end of the process is the end of the pipe
                running[receiver] = name, process
            for receiver in connection.wait(list(running)):
                name, process = running.pop(receiver)
                try:
                    outcome = receiver.recv()
                except EOFError:
                    process.join()
                    outcome = False, f"FAILED: the process ended with code {process.exitcode}"
                process.join()
                yield name, *outcome
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _child(sender, run, config, options):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    record, message = _attempt(run, config, **options)
    sender.send((record is not None, message))


def _end_with_parent():
    # An orphan would keep its run's folder locked, and the repeated sweep could not go on with it.
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _environment(variables):
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


# On a cluster: checkpoints stay with the worker (share MINIGRAD_RUNS, and any worker can go on from
# them), records come back and are written here.


def _on_cluster(address, todo, runs, out, options):
    """Yield (name, done, message) as runs end."""
    runner.refuse_unwritable(out)
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise RunError("--dask needs distributed: pip install 'minigrad[dask]'") from error
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise RunError(f"no scheduler at {address!r} (tcp://HOST:8786, say): {error}") from error
    with client:
        futures = {}
        for name, config in todo.items():
            # A sweep that was cut off finds its tasks again, unless steps or sources have changed.
            key = f"{name} {config['steps']} {ORIGIN['source_hash']}"
            try:
                runner.refuse_shorter(out / f"{name}.json", config)
            except RunError as error:
                yield name, False, f"FAILED: {error}"
                continue
            run = runs[config["name"]]
            futures[client.submit(_on_worker, run, config, ORIGIN, options, key=key)] = name
        for future in as_completed(futures):
            name = futures[future]
            if error := future.exception():
                yield name, False, f"FAILED: {error}"
                continue
            record, message = future.result()
            if record:
                arrays = record.pop("arrays")
                try:
                    save_record(out / f"{name}.json", record, arrays)
                except OSError as error:
                    record, message = None, f"FAILED: {error}"
            yield name, record is not None, message


def _on_worker(run, config, origin, options):
    from distributed import get_worker

    if get_worker().state.nthreads > 1:
        return None, "FAILED: a worker does one run at a time; start it with --nthreads 1"
    if not ORIGIN == origin == runner.origin() and not options["mixed"]:
        return None, (
            f"FAILED: the sweep has {origin}, the worker {ORIGIN}, its files {runner.origin()}, so "
            "that results would differ; update the files and start the worker anew, or add --mixed"
        )
    folder = runner.runs_folder() / runner.record_name(run, config)
    return _attempt(run, config, out=folder, progress=False, **options)
