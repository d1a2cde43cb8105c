"""`python -m benchmarks [CASE …] [--json FILE]`: minigrad and its peers at the same work."""

import argparse
import json
import os
import sys

from benchmarks import harness
from benchmarks.cases import CASES
from minigrad.train import write_atomic


def main(argv=None, cases=CASES):
    """Run the command line and return the exit code: 1 where results are wrong, slow or not."""
    arguments = _parser(cases).parse_args(argv)
    unknown = [name for name in arguments.cases if name not in cases]
    if unknown:
        print(f"error: no case {', '.join(unknown)}; there are {', '.join(cases)}", file=sys.stderr)
        return 2
    print(*harness.header(arguments.threads), sep="\n")
    entries, failed = [], False
    for name in arguments.cases or cases:
        print(f"\n{name}: {cases[name].title}", flush=True)
        try:
            times, wrong = harness.measure(
                cases[name], arguments.rounds, arguments.seconds, arguments.threads
            )
        except harness.WorkerFailed as error:
            times, wrong = {}, [str(error)]
        if wrong:
            failed = True
            print(*(f"    wrong: {sentence}" for sentence in wrong), sep="\n")
            continue
        entries.append(harness.entry(name, cases[name], times))
        _print(entries[-1], cases[name])
    if arguments.json:
        write_atomic(arguments.json, (json.dumps(entries, indent=1) + "\n").encode())
    return int(failed)


def _print(entry, case):
    for framework in case.setups:
        value = entry["minigrad"] if framework == "minigrad" else entry["peers"].get(framework)
        shown = "not installed" if value is None else f"{value:9.3f} {entry['unit']}"
        print(f"    {framework:10} {shown}")
    if entry["ratio"] is not None:
        target = "" if entry["target"] is None else f" (target {entry['target']:.2f})"
        print(f"    ratio to {' or '.join(case.rivals)}: {entry['ratio']:.2f}{target}")


def _parser(cases):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(cases))
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--rounds", type=int, default=30, help="rounds, of all frameworks in turn")
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="time of one framework in one round"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each framework"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
