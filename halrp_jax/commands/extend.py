"""Learns one more task, of your own images, on top of a run.

  python -m halrp_jax extend --workdir=RUN --data=FOLDER|FILE.npz --out=NEW
  python -m halrp_jax extend --workdir=runs/mine --data=new_task --out=runs/mine-and-more
  python -m halrp_jax predict --workdir=runs/mine-and-more --task=new_task ...

FOLDER holds CLASS/IMAGE, or train/CLASS/IMAGE and optionally val/CLASS/IMAGE and test/CLASS/IMAGE.
FILE.npz holds arrays; halrp_jax/data/custom.py describes both. The new task is named after FOLDER
or FILE, which must not be the name of a task of RUN.

NEW becomes the folder of a run with the old tasks and the new one, for predict, export and extend.
RUN is not changed. With methods that do not change what the tasks share (HALRP, STL, BN, BE,
APDfix, CLR with its own BatchNorm) the old tasks stay the same to the bit, and only the new task is
pruned. If it is stopped, the same command resumes it.
"""

import sys
from collections.abc import Callable

from halrp_jax import arguments
from halrp_jax.commands import program, terminal
from halrp_jax.deploy import saved
from halrp_jax.devices import compile_cache, stop
from halrp_jax.types import Stopped

_EXAMPLE = "--workdir=runs/mine --data=new_task --out=runs/mine-and-more"


def main(argv: list[str], stop_asked: Callable[[], bool] = lambda: False) -> int:
  """Learns the task, and prints its accuracy and whether the old tasks are unchanged."""
  parser = arguments.parser("extend", __doc__, _EXAMPLE)
  for name, text in (
    ("--workdir", "folder of the run to extend; it is not changed"),
    ("--data", "images of the new task: a folder or an .npz file"),
    ("--out", "folder for the extended run"),
  ):
    parser.add_argument(name, required=True, type=arguments.filled, help=text)
  parser.add_argument("--compile_cache", default="", help=program.COMPILE_CACHE)
  options = parser.parse_args(argv)
  compile_cache.use(options.compile_cache)
  run = saved.open_run(options.workdir)
  if line := saved.missing_statistics(run):
    print(f"note: {line}")
  try:
    with terminal.live_display(sys.stdout) as show:
      record = saved.extend(run, options.data, options.out, show, stop_asked)
  except Stopped:
    print(f"stopped; the same command resumes from {options.out}", file=sys.stderr)
    return stop.EXIT_CODE
  task, num_tasks = record["task"], len(record["accuracy"])
  position, accuracy = f"task {num_tasks}/{num_tasks}", record["accuracy"][-1]
  print(f"{position} ({task['name']}, id {task['id']}): accuracy {accuracy:.2f} %")
  num_old = num_tasks - 1
  if record["unchanged"]:
    print(f"the {num_old} earlier tasks are unchanged to the bit")
  else:
    name = run.config.method.name
    shared = f"{name} changed weights that tasks share"
    print(f"{shared}: predictions for the {num_old} earlier tasks may have changed")
  print(f"growth {100 * record['increment']:+.1f} %; {options.out}")
  return 0
