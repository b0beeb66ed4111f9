"""Where a Python program spends its CPU time, by sampling: `python -m bench.sampler OUTPUT MODULE ARGUMENTS...`

A timer of the kernel that counts only this process's CPU time interrupts it, and each time the call stack is noted.
Unlike cProfile this costs next to nothing and does not make small functions look expensive. OUTPUT gets JSON: a list
of [number of samples, [function, function, …]], outermost function first, each as `module.function`.
"""

import json
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

PERIOD_S: Final = 0.001
"""The kernel rounds this up to its own tick, 1 to 10 ms."""

Samples = list[tuple[int, list[str]]]


def main() -> None:
    output, module = Path(sys.argv[1]), sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    stacks: Counter[tuple[str, ...]] = Counter()

    def note(_number: int, frame: FrameType | None) -> None:
        stack = []
        while frame is not None:
            stack.append(f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}")
            frame = frame.f_back
        stacks[tuple(reversed(stack))] += 1

    signal.signal(signal.SIGPROF, note)
    signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        output.write_text(json.dumps([[count, stack] for stack, count in stacks.items()]))


def by_function(samples: Samples) -> list[tuple[str, int, int]]:
    """(function, samples in itself, samples in it and what it calls), most own samples first."""
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for count, stack in samples:
        own[stack[-1]] += count
        within.update(dict.fromkeys(stack, count))
    return [(name, own[name], within[name]) for name, _ in sorted(own.items(), key=lambda item: -item[1])]


def by_step(samples: Samples, steps: Mapping[str, Iterable[str]], root: str) -> dict[str, int]:
    """Samples below function `root`, each counted for the step that the innermost of its functions belongs to.

    `steps` maps a step to its functions. What is below none of them counts for the step "".
    """
    step_of = {function: step for step, functions in steps.items() for function in functions}
    found: Counter[str] = Counter(dict.fromkeys((*steps, ""), 0))
    for count, stack in samples:
        if root in stack:
            found[next((step_of[name] for name in reversed(stack) if name in step_of), "")] += count
    return dict(found)


if __name__ == "__main__":
    main()
