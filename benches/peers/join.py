"""Joins what our benchmarks measured with what the peers' scripts did: tables of ratios, greater than 1 where ours is
faster.

Run: python join.py OURS.json UPSTREAM.json [UPSTREAM.json …]      (of several, the first that has a row counts)

OURS.json is of `cuda` (then upstream_ops.py's go with it), of `cuda_models` (upstream_models.py's), of `cuda_train` (upstream_train.py's) or, on
the CPU, of `decode` (llama_cpp.py's and transformers_models.py's; `cpu.sh` runs all three) or of `train` (transformers_train.py's). Rows that one side alone has are kept, and those that failed say so below the table.
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
    print("Times in ms, of a step in decoding and of the whole prompt; on a GPU, `weights` is what reading them once takes.\n")
    # What one of the sides says of none of its rows has no column.
    said = lambda key: any(key in row for _, *rows in pairs for row in rows)  # noqa: E731
    weights, memory = said("weights_ms"), said("peak_mib")
    head = ("case", "ms", "tokens/s", *(["weights"] * weights), "upstream", "ratio", *(["MiB", "its MiB"] * memory))
    table(head, (
        (case, number(ours.get("ms"), 3), number(ours.get("tokens_per_s"), 0), *([number(ours.get("weights_ms"), 3)] * weights),
         number(peer.get("ms"), 3), ratio(peer.get("ms"), ours.get("ms")),
         *([number(ours.get("peak_mib"), 0), number(peer.get("peak_mib"), 0)] * memory))
        for case, ours, peer in pairs))


def training_on_gpu(pairs):
    print("Times in ms, of a step; the most memory that tensors held at once, in GiB.\n")
    table(("case", "ms", "GiB", "upstream", "its GiB", "ratio"), (
        (case, number(ours.get("ms"), 1), number(ours.get("peak_gib"), 1), number(peer.get("ms"), 1),
         number(peer.get("peak_gib"), 1), ratio(peer.get("ms"), ours.get("ms")))
        for case, ours, peer in pairs))


def training(pairs):
    print("Times in ms, of a step; `busy` is processor time over threads, and its ratio says more on a machine that others use.\n")
    table(("case", "ms", "busy", "loss", "upstream", "its busy", "its loss", "ratio", "ratio of busy"), (
        (case, number(ours.get("ms"), 1), number(ours.get("busy_ms"), 1), number(ours.get("loss"), 6),
         number(peer.get("ms"), 1), number(peer.get("busy_ms"), 1), number(peer.get("loss"), 6),
         ratio(peer.get("ms"), ours.get("ms")), ratio(peer.get("busy_ms"), ours.get("busy_ms")))
        for case, ours, peer in pairs if "sequential_ms" not in ours))
    scans = [(case, ours) for case, ours, _ in pairs if "sequential_ms" in ours]
    if scans:
        print("\nForward and backward of the scan, fused and one token after another.\n")
        table(("case", "ms", "busy", "sequential", "its busy", "ratio", "ratio of busy"), (
            (case, number(ours["ms"], 2), number(ours["busy_ms"], 2), number(ours["sequential_ms"], 1),
             number(ours["sequential_busy_ms"], 1), ratio(ours["sequential_ms"], ours["ms"]),
             ratio(ours["sequential_busy_ms"], ours["busy_ms"]))
            for case, ours in scans))


def main():
    first, *others = (json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:])
    ours = {row["case"]: row for row in first["rows"]}
    theirs, versions = {}, {}
    for other in reversed(others):
        theirs |= {row["case"]: row for row in other["rows"] if "error" not in row}
        versions |= other.get("versions", {})
    failed = [("Ours", row) for row in first["rows"] if "error" in row]
    failed += [("Upstream's", row) for other in others for row in other["rows"] if "error" in row and row["case"] not in theirs]

    if "isa" in first:
        print(f"Ours: commit {first['commit']}, {first['device']}, {first['isa']}, {first['threads']} threads.")
    if "gpu" in first:
        print(f"Ours: {first['gpu']}, a copy moves {first['copy_tb_per_s']:.2f} TB/s.")
    print("Upstream:", ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    pairs = [(case, ours.get(case, {}), theirs.get(case, {})) for case in dict.fromkeys((*ours, *theirs))]
    rows = (*ours.values(), *theirs.values())
    has = lambda key: any(key in row for row in rows)  # noqa: E731
    (training_on_gpu if has("peak_gib") else training if has("busy_ms") else models if has("ms") else ops)(pairs)
    for whose, row in failed:
        print(f"\n{whose} {row['case']} failed: {row['error']}")


main()
