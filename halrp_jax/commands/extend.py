"""Learns one more task on top of what a run has learned.

  python -m halrp_jax extend --workdir=RUN --data=FOLDER|FILE.npz --out=NEW
  python -m halrp_jax extend --workdir=runs/mine --data=new_task --out=runs/mine-and-more
  python -m halrp_jax predict --workdir=runs/mine-and-more --task=new_task ...

FOLDER holds CLASS/IMAGE, or train/CLASS/IMAGE with val/... and test/...; it and FILE.npz are as in
halrp_jax/data/custom.py. The task is named after it, as no task of RUN is. NEW is the folder of a
run: with the base, the old tasks' parts and the new one; predict, export and extend take it. RUN
stays as it is. Where the method holds what tasks share (HALRP, STL, BN, BE, APDfix, CLR with its
own BatchNorm) the old tasks are the same bits: the new task alone is pruned. The same command goes
on where it was stopped.
"""

import sys

from halrp_jax import arguments
from halrp_jax.commands import terminal
from halrp_jax.deploy import saved
from halrp_jax.devices import compile_cache, stop
from halrp_jax.types import Stopped

_EXAMPLE = "--workdir=runs/mine --data=new_task --out=runs/mine-and-more"


def main(argv: list[str]) -> int:
  """Learns the task; prints its accuracy and whether the old ones are unchanged."""
  parser = arguments.parser("extend", __doc__, _EXAMPLE)
  needed = {"required": True, "type": arguments.filled}
  parser.add_argument("--workdir", help="the folder of a run", **needed)
  parser.add_argument("--data", help="the new task's images", **needed)
  parser.add_argument("--out", help="the new run's folder", **needed)
  parser.add_argument("--compile_cache", default="", help="as in halrp_jax.main")
  options = parser.parse_args(argv)
  stop_asked = stop.listen()
  compile_cache.use(options.compile_cache)
  run = saved.open_run(options.workdir)
  if line := saved.lacks_statistics(run):
    print(f"note: {line}")
  try:
    with terminal.live_display(sys.stdout) as show:
      record = saved.extend(run, options.data, options.out, show, stop_asked)
  except Stopped:
    print(f"stopped; the same command goes on from {options.out}", file=sys.stderr)
    return stop.EXIT_CODE
  task, num_old = record["task"], len(record["accuracy"]) - 1
  print(f"task {task['id']} ({task['name']}): accuracy {record['accuracy'][-1]:.2f} %")
  if record["unchanged"]:
    print(f"the {num_old} tasks before are unchanged to the bit")
  else:
    name = run.config.method.name
    print(f"{name} moved what tasks share: the {num_old} tasks before may predict differently")
  print(f"growth {100 * record['increment']:+.1f} %; {options.out}")
  return 0
