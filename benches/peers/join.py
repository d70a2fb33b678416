"""Joins the rows of benches/cuda.rs with those of upstream_ops.py: a table of ratios, greater than 1 where ours is faster.

Run: python join.py OURS.json UPSTREAM.json [UPSTREAM.json …]      (of several, the first that has a row counts)
"""

import json
import pathlib
import sys


def ratio(upstream, ours):
    return f"{upstream / ours:.2f}" if upstream and ours else "-"


def ms(value):
    return f"{value:.4f}" if value is not None else "-"


ours = json.loads(pathlib.Path(sys.argv[1]).read_text())
upstream = {}
for path in reversed(sys.argv[2:]):
    for row in json.loads(pathlib.Path(path).read_text())["rows"]:
        if "error" not in row:
            upstream[row["case"]] = row

print(f"{ours['gpu']}, a copy moves {ours['copy_tb_per_s']:.2f} TB/s. Times in ms; `net` is without candle's own part of a backward.\n")
print("| case | fwd | floor | upstream | ratio | fwd+bwd | net | upstream | ratio of net |")
print("|---|---|---|---|---|---|---|---|---|")
for row in ours["rows"]:
    if "error" in row:
        continue
    peer = upstream.get(row["case"], {})
    forward, both = peer.get("fwd_ms"), peer.get("fwd_bwd_ms")
    net = row.get("fwd_bwd_net_ms")
    print(f"| {row['case']} | {ms(row['fwd_ms'])} | {ms(row['floor_ms'])} | {ms(forward)} | {ratio(forward, row['fwd_ms'])} "
          f"| {ms(row.get('fwd_bwd_ms'))} | {ms(net)} | {ms(both)} | {ratio(both, net)} |")
