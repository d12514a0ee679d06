"""Writes the model of a run to files for other programs.

  python -m halrp_jax export --workdir=RUN --out=DIR [--task=NAME] [--merge|--without_base]
      [--format=F]
  python -m halrp_jax export --workdir=runs/digits-halrp --out=model
  python -m halrp_jax export --workdir=runs/digits-ewc --out=model --merge
  python -m halrp_jax export --workdir=runs/digits-halrp --out=model --task=3 --format=stablehlo

Writes the base weights once and a small file per task (HALRP and BE), or with --merge the whole
network of every task as an ordinary Flax network (every method but CLR and PRD). Beside each file
is a JSON card with classes, normalisation, network, ranks, accuracy and hashes. By default all
tasks are written, with --task only one.

With --without_base the base is not written: it is the file of the pretrained network that the run
started from (base_training=head, none or perturb). export.load(DIR, ID, base=FILE) gets that file,
whose SHA-256 it checks.

The formats are safetensors (default), orbax, and stablehlo: a program from images to probabilities,
which needs no packages but jax and flatbuffers. In Python, halrp_jax.deploy.export.load(DIR, ID)
reads the first two; halrp_jax/deploy/export.py describes the files.

A folder holds one model in one format. If DIR holds another one, nothing is written: delete it, or
choose another folder.
"""

from halrp_jax import arguments
from halrp_jax.deploy import export, saved


def main(argv: list[str]) -> int:
  """Writes the files and prints their sizes."""
  parser = arguments.parser("export", __doc__, "--workdir=runs/digits-halrp --out=model")
  for name, text in (("--workdir", "folder of a run"), ("--out", "folder for the files")):
    parser.add_argument(name, required=True, type=arguments.filled, help=text)
  parser.add_argument("--task", default="", help="name of a task, or id:N; default: all")
  parser.add_argument("--merge", action="store_true", help="write whole networks")
  parser.add_argument(
    "--without_base", action="store_true", help="leave out the base, a pretrained network's file"
  )
  parser.add_argument(
    "--format", default="safetensors", help=f"{', '.join(export.FORMATS)}; default: safetensors"
  )
  options = parser.parse_args(argv)
  run = saved.open_run(options.workdir)
  if line := saved.missing_statistics(run):
    print(f"note: {line}")
  positions = list(range(len(run.learned)))
  if options.task:
    positions = [saved.find_task(run, options.task)]
  names = {f"task{task.id:02d}": task.name for task in run.learned}
  base = None
  form = (options.format, options.merge, options.without_base)
  for stem, size in export.write(run, options.out, positions, *form):
    base = size if stem == export.BASE else base
    share = f", {100 * size / base:.2f} % of the base" if base and stem in names else ""
    print(f"{stem:<8}{size:>14,} bytes{share}  {names.get(stem, '')}".rstrip())
  print(f"{options.out}: {len(positions)} tasks, {options.format}")
  return 0
