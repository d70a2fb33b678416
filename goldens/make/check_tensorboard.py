"""Has TensorBoard read the events that the examples `train` and `finetune` write.

Run: python check_tensorboard.py FOLDER      (what `--out` named: one run that was not resumed)

Every record must have its check sums, and every number of metrics.jsonl must be there under its step, as f32. Needs: pip install
tensorboard (2.21.0 was used), in an environment of its own.
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FIELDS = {"loss/train": "loss", "loss/validation": "validation_loss", "lr": "lr", "grad_norm": "grad_norm", "tokens_per_s": "tokens_per_s"}

folder = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
events.Reload()
assert sorted(events.Tags()["scalars"]) == sorted(FIELDS), events.Tags()
checked = 0
for tag, field in FIELDS.items():
    want = {row["step"]: struct.unpack("f", struct.pack("f", row[field]))[0] for row in rows if field in row}
    got = {event.step: event.value for event in events.Scalars(tag)}
    assert got == want, (tag, len(got), len(want))
    checked += len(got)
print(f"{checked} numbers are as they should be")
