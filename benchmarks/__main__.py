"""`python -m benchmarks [CASE …] [--json FILE]`: minigrad and its peers at the same work.

How minigrad's own cost grows with the size of the problem: `python -m benchmarks.scaling`.
"""

import argparse
import json
import os
import sys

from benchmarks import harness, scaling
from benchmarks.cases import CASES, Group
from minigrad.train import write_atomic

REFERENCE = harness.ROOT / "benchmarks" / "reference.json"


def main(argv=None, cases=CASES):
    """Run the command line; return 1 where results are wrong, 0 where they are right, if slow."""
    arguments = _parser(cases).parse_args(argv)
    unknown = [name for name in arguments.cases if name not in cases]
    if unknown:
        print(f"error: no case {', '.join(unknown)}; there are {', '.join(cases)}", file=sys.stderr)
        return 2
    if arguments.reference and arguments.cases:
        print("error: the reference run is one of all cases; name none", file=sys.stderr)
        return 2
    header = harness.header(arguments.threads)
    print(*header, sep="\n")
    entries, failed = [], False
    for name in _with_members(arguments.cases or list(cases), cases):
        print(f"\n{name}: {cases[name].title}", flush=True)
        entry, wrong = _run(name, cases[name], entries, arguments)
        print(*(f"    wrong: {sentence}" for sentence in wrong), sep="\n", end="\n" * bool(wrong))
        failed = failed or bool(wrong)
        if entry:
            entries.append(entry)
            _print(entry, cases[name])
    if arguments.json:
        write_atomic(arguments.json, _json(entries))
    if arguments.reference and not failed:
        print("\nscaling", flush=True)
        content = {"header": header, "cases": entries, "scaling": scaling.run()}
        write_atomic(REFERENCE, _json(content))
    return int(failed)


def _with_members(names, cases):
    """Put the members of a group before it."""
    wanted = {}
    for name in names:
        members = cases[name].members if isinstance(cases[name], Group) else ()
        wanted |= dict.fromkeys([*members, name])
    return list(wanted)


def _run(name, case, entries, arguments):
    """Return the JSON entry of a case, or None, and what is wrong."""
    if isinstance(case, Group):
        return harness.group_entry(name, case, entries), []
    try:
        times, wrong = harness.measure(
            case, arguments.rounds, arguments.seconds, arguments.limit, arguments.threads
        )
    except harness.WorkerFailed as error:
        return None, [str(error)]
    if not times:
        return None, wrong
    return harness.entry(name, case, times), []


def _print(entry, case):
    missing = [name for name in getattr(case, "setups", ()) if name not in harness.installed(case)]
    for framework in ["minigrad", *entry["peers"], *missing]:
        value = entry["minigrad"] if framework == "minigrad" else entry["peers"].get(framework)
        shown = "not installed" if value is None else f"{value:9.3f} {entry['unit']}"
        print(f"    {framework:12} {shown}")
    for key, words in {"ratio": "ratio", "jax_ratio": "ratio to JAX under jit"}.items():
        if entry[key] is not None:
            target = entry[key.replace("ratio", "target")]
            wanted = "" if target is None else f" (target {target:.4g})"
            print(f"    {words}: {entry[key]:.3g}{wanted}")


def _json(content):
    return (json.dumps(content, indent=1) + "\n").encode()


def _parser(cases):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(cases))
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--reference",
        action="store_true",
        help="write the figures, and those of scaling, to benchmarks/reference.json",
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds, of all frameworks in turn")
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="time of one framework in one round"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=10,
        help=f"seconds after which a case has no more than {harness.LEAST_ROUNDS} rounds",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each framework"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
