"""Compares one card with layouts of several cards of one host, on the same machine.

    python -m benchmarks.speed.cluster --config configs/h100x2.yaml --cards 2 \
        --arms one,each,roles --log /tmp/cluster_x2.jsonl --limit-s 570 \
        student.model=models/random-4B scoring.model=models/random-8B

An arm is a layout: ``one`` (all three engines on one of the cards, without a cluster: the base),
``each`` (all three on each card), ``roles`` (a card per role), any of them on fewer cards
(``each@2``), or a name that ``--set ARM:KEY=VALUE`` describes. A layout with other settings is an
arm with a label: ``--arms each,each+swap --set each+swap:generation.adapters=swap``; of the base,
the best part of all counts. Each arm is a process, which starts its engines once, for all of its
parts; while the others load, the learner takes two small steps of random tokens, in which it
compiles its kernels:

- ``fixed``: `sampling.max_new_tokens` for all, streaming.
- ``longtail8``: lognormal with p99/p50 = 8, streaming.
- ``sequential``: fixed lengths, one stage after another; for the base, whose best part counts.
- ``struck``: fixed lengths; a rollout replica's process is killed after the second step, and the
  part ends some steps after it serves again. Needs ``--parts`` to name it.

``--only one,each:fixed`` picks arms and parts. What was measured is in ``--log``, a line per part,
and is not measured again: a command that was cut short is started again as it was. No part goes on
beyond ``--limit-s`` seconds from the start of the command; one that has fewer than three steps
then is not recorded. ``--beside`` measures the base's parts concurrently, each on a card of its
own. Prompts and lengths are those of `overlap`. Models must not stop by themselves.

Figures: ``tok_s_{part}_{arm}``, ``speedup_{lengths}`` (the best arm on all cards against the base's
best part), ``speedup_{cards}`` and ``efficiency_{cards}`` (fixed lengths); of the fastest arm on
all cards, fixed lengths: ``publish_pct_of_step`` (the learner's part), ``load_beside_s`` (the
rollout engines', beside the next step), ``bytes_per_step``; ``peak_gib_{arm}`` (the fullest card,
by nvidia-smi), ``lost`` and ``duplicated`` (rollouts by the ledgers of all parts; of
struck ones alone ``struck_lost``, ``struck_duplicated``, ``struck_restarts``). Every part has
tokens per second and idle share of each engine, and the bytes that a step moves.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.lib.cards import card_names
from benchmarks.lib.cluster_parts import Arm, done_parts, figures_of, read_log
from benchmarks.lib.common import RESULTS, write_result

PARTS = ("fixed", "longtail8", "sequential", "struck")
_LEAST_S = 60.0
"""No arm is begun with less time than this left."""


def parts_of(arm: Arm, arguments: argparse.Namespace) -> list[str]:
    """Return the parts of an arm that are asked for, in order."""
    asked = [item.partition(":") for item in arguments.only] or [(arm.name, "", "")]
    parts: list[str] = []
    for name, _, part in asked:
        if name == arm.name:
            parts += (
                [part] if part else [p for p in arguments.parts if p != "sequential" or arm.is_base]
            )
    return list(dict.fromkeys(parts))


def run_arm(arm: Arm, parts: Sequence[str], arguments: argparse.Namespace, cards: str) -> bool:
    """Measure parts of an arm in a process that sees some cards; return whether it ended well."""
    command = [sys.executable, "-m", "benchmarks.lib.cluster_arm", "--config", arguments.config]
    command += ["--arm", arm.name, "--cards", str(arm.cards), "--parts", ",".join(parts)]
    command += ["--log", str(arguments.log), "--ends", str(arguments.ends)]
    for name in ("steps", "longtail-steps", "skip", "longtail-skip", "struck-steps"):
        command += [f"--{name}", str(getattr(arguments, name.replace("-", "_")))]
    for name in ("prompt-tokens", "median-tokens", "max-tokens", "stagger-s"):
        command += [f"--{name}", str(getattr(arguments, name.replace("-", "_")))]
    command += [*arguments.overrides, *arm.overrides]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": cards} if cards else {})
    print(f"--- {arm.name} ({', '.join(parts)}): {shlex.join(arm.overrides)}", flush=True)
    return subprocess.run(command, env=environment, check=False).returncode == 0


def visible_cards(count: int) -> list[str]:
    """Return the names of the first cards that this process may use.

    Raises:
        ValueError: it may use fewer.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(card) for card in range(count)]
    cards = [card.strip() for card in listed.split(",") if card.strip()]
    if len(cards) < count:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={listed}: {count} cards are asked for")
    return cards[:count]


def run_arms(arms: Sequence[Arm], arguments: argparse.Namespace) -> bool:
    """Measure what the log lacks until the time is over; return whether all is done."""
    is_complete = True
    for arm in arms:
        log = read_log(arguments.log)
        done = done_parts(log, arm, arguments.overrides)
        parts = [part for part in parts_of(arm, arguments) if part not in done]
        if not parts:
            continue
        if arguments.ends - time.time() < _LEAST_S:
            print(f"no time for {arm.name}: {', '.join(parts)}; run the command again", flush=True)
            return False
        if arm.is_base and arguments.beside:
            beside = visible_cards(min(arguments.cards, len(parts)))
            with ThreadPoolExecutor(arguments.cards) as pool:
                each = [
                    pool.submit(run_arm, arm, [part], arguments, card)
                    for card, part in zip(beside, parts, strict=False)
                ]
            ended = [job.result() for job in each]
            is_complete &= all(ended) and len(parts) == len(each)
        else:
            cards = ",".join(visible_cards(arm.cards))
            is_complete &= run_arm(arm, parts, arguments, cards)
        write_figures(arguments)
    return is_complete


def write_figures(arguments: argparse.Namespace) -> None:
    log = read_log(arguments.log)
    figures = {key: round(value, 4) for key, value in figures_of(log).items()}
    path = write_result(
        arguments.name, figures, folder=arguments.results, cards=card_names(), parts=log
    )
    print(path, figures, flush=True)


def main() -> None:
    arguments = parse()
    try:
        arms = [Arm.parse(text, arguments.cards, arguments.set) for text in arguments.arms]
        known = {arm.name for arm in arms}
        for item in arguments.only:
            name, _, part = item.partition(":")
            if name not in known or (part and part not in PARTS):
                raise ValueError(f"--only {item}: arms are {sorted(known)}, parts {PARTS}")
        for part in arguments.parts:
            if part not in PARTS:
                raise ValueError(f"--parts {part}: expected some of {','.join(PARTS)}")
        is_complete = run_arms(arms, arguments)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    write_figures(arguments)
    sys.exit(0 if is_complete else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--cards", type=int, required=True, help="of this machine")
    parser.add_argument("--arms", type=names, default=["one", "each", "roles"])
    parser.add_argument("--set", action="append", default=[], metavar="ARM:KEY.SUB=VALUE")
    parser.add_argument("--parts", type=names, default=["fixed", "longtail8"])
    parser.add_argument("--only", type=names, default=[], metavar="ARM[:PART],...")
    parser.add_argument(
        "--log", type=Path, required=True, help="of parts; gone on with if it exists"
    )
    parser.add_argument("--limit-s", type=float, default=86_400.0)
    parser.add_argument("--beside", action="store_true", help="the base's parts concurrently")
    parser.add_argument("--steps", type=int, default=8, help="of fixed lengths")
    parser.add_argument("--longtail-steps", type=int, default=16)
    parser.add_argument("--skip", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--longtail-skip", type=int, default=6)
    parser.add_argument("--struck-steps", type=int, default=60, help="at most")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--median-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--stagger-s", type=float, default=20.0, help="between engines' starts")
    parser.add_argument("--name", default="cluster_x2", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    arguments.ends = time.time() + arguments.limit_s
    return arguments


if __name__ == "__main__":
    main()
