"""Joins what our benchmarks of a GPU measured with what upstream's scripts did: tables of ratios, greater than 1 where ours is
faster.

Run: python join.py OURS.json UPSTREAM.json [UPSTREAM.json …]      (of several, the first that has a row counts)

OURS.json is of `cuda` (then upstream_ops.py's go with it) or of `cuda_models` (upstream_models.py's). Rows that one side alone
has are kept, and those that failed say so below the table.
"""

import json
import pathlib
import sys


def number(value, digits=4):
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(upstream, ours):
    return f"{upstream / ours:.2f}" if upstream and ours and ours > 0 else "-"


def table(head, rows):
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def ops(pairs):
    print("Times in ms; `net` is without candle's own part of a backward.\n")
    table(("case", "fwd", "floor", "upstream", "ratio", "fwd+bwd", "net", "upstream", "ratio of net"), (
        (case, number(ours.get("fwd_ms")), number(ours.get("floor_ms")), number(peer.get("fwd_ms")),
         ratio(peer.get("fwd_ms"), ours.get("fwd_ms")), number(ours.get("fwd_bwd_ms")), number(ours.get("fwd_bwd_net_ms")),
         number(peer.get("fwd_bwd_ms")), ratio(peer.get("fwd_bwd_ms"), ours.get("fwd_bwd_net_ms")))
        for case, ours, peer in pairs))


def models(pairs):
    print("Times in ms, of a step in decoding and of the whole prompt; `weights` is what reading them once takes.\n")
    table(("case", "ms", "tokens/s", "weights", "upstream", "ratio"), (
        (case, number(ours.get("ms"), 3), number(ours.get("tokens_per_s"), 0), number(ours.get("weights_ms"), 3),
         number(peer.get("ms"), 3), ratio(peer.get("ms"), ours.get("ms")))
        for case, ours, peer in pairs))


def main():
    first, *others = (json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:])
    ours = {row["case"]: row for row in first["rows"]}
    theirs, versions = {}, {}
    for other in reversed(others):
        theirs |= {row["case"]: row for row in other["rows"] if "error" not in row}
        versions |= other.get("versions", {})
    failed = [("Ours", row) for row in first["rows"] if "error" in row]
    failed += [("Upstream's", row) for other in others for row in other["rows"] if "error" in row and row["case"] not in theirs]

    if "gpu" in first:
        print(f"Ours: {first['gpu']}, a copy moves {first['copy_tb_per_s']:.2f} TB/s.")
    print("Upstream:", ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    pairs = [(case, ours.get(case, {}), theirs.get(case, {})) for case in dict.fromkeys((*ours, *theirs))]
    (models if any("ms" in row for row in (*ours.values(), *theirs.values())) else ops)(pairs)
    for whose, row in failed:
        print(f"\n{whose} {row['case']} failed: {row['error']}")


main()
