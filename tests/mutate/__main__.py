"""Delete each single guard of the ledger's rules in turn and see that a test fails: `make mutate`.

Prints the survivors and exits with 1 if there are any. `--sample N` judges N of them chosen by `--seed`.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter

from mutate.equivalent import EQUIVALENT
from mutate.mutants import Mutant
from mutate.run import Verdict, all_mutants, judge_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutate", description="Delete each guard of the ledger rules in turn.")
    parser.add_argument("--sample", type=int, help="judge so many only")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", default="", help="only mutants whose name contains this")
    parser.add_argument("--workers", type=int, default=2, help="tests that run at a time")
    parser.add_argument("--verbose", action="store_true", help="say for each mutant which test found it")
    options = parser.parse_args()
    everything = all_mutants()
    chosen = [mutant for mutant in everything if options.only in mutant.name and mutant.name not in EQUIVALENT]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    os.nice(5)
    began = time.monotonic()
    found: Counter[str] = Counter()
    survivors: list[Mutant] = []

    def report(verdict: Verdict) -> None:
        mutant = verdict.mutant
        if verdict.found_by is None:
            survivors.append(mutant)
            print(f"SURVIVED line {mutant.line} of {mutant.name}", flush=True)
        else:
            found[mutant.kind] += 1
            if options.verbose:
                print(f"found by {verdict.found_by}: {mutant.name}", flush=True)

    judge_all(chosen, options.workers, report)
    of_kind = Counter(mutant.kind for mutant in chosen)
    for kind in sorted(of_kind):
        print(f"{kind:10} {found[kind]:4} of {of_kind[kind]:4} found")
    known = [mutant for mutant in everything if mutant.name in EQUIVALENT]
    print(f"{len(known)} more change nothing that can be seen (tests/mutate/equivalent.py says why)")
    print(f"{len(survivors)} survived, {time.monotonic() - began:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
