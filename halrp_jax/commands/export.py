"""Writes the model of a run as files for other programs.

  python -m halrp_jax export --workdir=RUN --out=DIR [--task=NAME] [--merge] [--format=F]
  python -m halrp_jax export --workdir=runs/digits-halrp --out=model
  python -m halrp_jax export --workdir=runs/digits-ewc --out=model --merge
  python -m halrp_jax export --workdir=runs/digits-halrp --out=model --task=3 --format=stablehlo

Writes the base once and a small file per task (HALRP, BE), or with --merge a whole ordinary Flax
network per task (every method but CLR and PRD), each with a JSON card: classes, normalisation,
network, ranks, accuracy, hashes. --format: safetensors (default), orbax, or stablehlo, a program
from images to probabilities that needs the packages jax and flatbuffers alone. A folder that holds
another model or format is refused: delete it, or choose another one. All tasks, unless
--task names one. `halrp_jax.export.load(DIR, task)` reads the first two
(halrp_jax/deploy/export.py).
"""

from halrp_jax import arguments
from halrp_jax.deploy import export, saved


def main(argv: list[str]) -> int:
  """Writes the files; prints their sizes."""
  parser = arguments.parser("export", __doc__, "--workdir=runs/digits-halrp --out=model")
  needed = {"required": True, "type": arguments.filled}
  parser.add_argument("--workdir", help="the folder of a run", **needed)
  parser.add_argument("--out", help="folder for the files", **needed)
  parser.add_argument("--task", default="", help="name of a task, or id:N; default: all")
  parser.add_argument("--merge", action="store_true", help="whole networks")
  parser.add_argument("--format", default="safetensors", help=", ".join(export.FORMATS))
  options = parser.parse_args(argv)
  run = saved.open_run(options.workdir)
  if line := saved.lacks_statistics(run):
    print(f"note: {line}")
  positions = list(range(len(run.learned)))
  if options.task:
    positions = [saved.find_task(run, options.task)]
  names = {f"task{task.id:02d}": task.name for task in run.learned}
  base = None
  for stem, size in export.write(run, options.out, positions, options.format, options.merge):
    base = size if stem == export.BASE else base
    share = f", {100 * size / base:.2f} % of the base" if base and stem in names else ""
    print(f"{stem:<8}{size:>14,} bytes{share}  {names.get(stem, '')}".rstrip())
  print(f"{options.out}: {len(positions)} tasks, {options.format}")
  return 0
