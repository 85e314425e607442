"""The command line: `esper fit|validate|test|predict` over Lightning's own parser, and commands of our own."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from esper import __version__
from esper.config import unknown_key
from esper.console import plain_errors
from esper.leyline.errors import ConfigError

__all__ = ["main"]

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
MODULES = {
    **dict.fromkeys(("forge", "kernels", "curate", "keys", "worker"), "esper.forge.commands"),
    "watch": "esper.nissa.watch.command",
    "bench": "esper.bench.commands",
}
"""Commands that are a function of their own name in a module, which is imported when it is asked for."""

HELP = """\
usage: esper COMMAND [options]

  fit         train a model and let it grow:  esper fit --config run.yaml
  validate    measure the decision part:      esper validate --config run.yaml --ckpt_path last.ckpt
  test        measure the report part:        esper test --config run.yaml --ckpt_path last.ckpt
  predict     run a trained model
  blueprints  list what may grow:             esper blueprints [list] [--layout btd] [--json]
              show one, or compare two:       esper blueprints show NAME | diff NAME NAME
              try one on a model:             esper blueprints dryrun NAME model.py:build [--site GLOB]
              hand one to the forge:          esper blueprints submit my.yaml
              ask which would serve a site:   esper blueprints ask --layout btd --width 64
  doctor      say where a model takes seeds:  esper doctor model.py:build [--input 2x3x32x32] [--json]
              verify the kernel store:        esper doctor --store
  recipe      train what a run found anew:    esper recipe RUN [--out recipe.yaml]
  export      take a run's network home:      esper export RUN net.pt2|net.onnx|FOLDER [--no-merge]
  report      tell runs on one page:          esper report RUN... [--out FILE]
              tell them in W&B:               esper report RUN... --wandb [--entity E] [--project P]
  watch       watch a run in the terminal:    esper watch RUN [--once] [--serve HOST:PORT]
              watch one elsewhere:            esper watch --connect HOST:PORT [--key FILE --server_key KEY]
  bench       ask whether growth pays:        esper bench growth +experiment=NAME [--seeds N] [--arms ARM...]
              measure what seeds cost here:   esper bench speed [--rows NAME...] [--compile]
              and what many grafts do:        esper bench stability [--seeds N] [--grafts N]
  forge       compile for every run here:     esper forge [--listen HOST]
  kernels     list compiled kernels:          esper kernels [--watch] [--json]
  curate      look after the kernel store:    esper curate
  keys        admit another machine's worker: esper keys NAME --out FILE
  worker      work for a forge elsewhere:     esper worker POOL --connect ADDRESS --key FILE --server_key KEY

`esper COMMAND --help` lists the options of a command; `esper --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the arguments; None takes those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    with plain_errors():
        return _dispatch(args)


def _dispatch(args: list[str]) -> int:
    name, rest = (args[0], args[1:]) if args else ("--help", [])
    if name in ("-h", "--help", "--version"):
        print(__version__ if name == "--version" else HELP.rstrip())
        return 0
    if name in MODULES:
        return int(getattr(import_module(MODULES[name]), name)(rest))
    if name == "blueprints" and rest[:1] in (["submit"], ["ask"]):
        from esper.forge import blueprints as designs

        return int(getattr(designs, rest[0])(rest[1:]))
    if name == "blueprints":
        from esper.catalogue import blueprints

        return blueprints(rest)
    if name == "doctor" and rest[:1] and rest[0].startswith("--store"):
        from esper.forge.commands import check

        return check(rest)
    if name == "doctor":
        from esper.doctor import doctor

        return doctor(rest)
    if name == "recipe":
        return recipe(rest)
    if name == "export":
        return export(rest)
    if name == "report":
        return report(rest)
    if name not in TRAINER_COMMANDS:
        known = [*TRAINER_COMMANDS, *MODULES, "blueprints", "doctor", "recipe", "export", "report"]
        raise ConfigError(unknown_key(name, name, known).replace("key", "command", 1))
    # Torch and Lightning take seconds to import, which the other commands need not pay.
    from esper.run import EsperCLI

    with _importable_here():
        EsperCLI(args)
    return 0


@contextmanager
def _importable_here() -> Iterator[None]:
    """Let a configuration name classes of the user's own in the current folder, which a console script cannot see."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        # Last, so that nothing here hides an installed package.
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def recipe(args: Sequence[str]) -> int:
    """Write the configuration that trains the architecture of a run from scratch, and print its path."""
    parser = argparse.ArgumentParser(prog="esper recipe", description="Write what a run found as a configuration.")
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--out", help="file to write; recipe.yaml in the run's folder where it is not given")
    given = parser.parse_args(args)
    from esper.tolaria.recipe import write_recipe

    print(write_recipe(given.run, given.out))
    return 0


def export(args: Sequence[str]) -> int:
    """Export the network that a run saved, and print where it is."""
    parser = argparse.ArgumentParser(prog="esper export", description="Write a run's network without seeds.")
    parser.add_argument("run", help="folder of a finished run, or of a saved model")
    parser.add_argument("path", help="a .pt2 program, a .onnx model, or a folder")
    parser.add_argument("--no-merge", action="store_true", help="keep every child beside the host")
    given = parser.parse_args(args)
    from esper.tolaria.export import export as write
    from esper.tolaria.saved import load_model

    inside = Path(given.run) / "model"
    write(load_model(inside if inside.is_dir() else given.run), given.path, merge=not given.no_merge)
    print(given.path)
    return 0


def report(args: Sequence[str]) -> int:
    """Write one self-contained page about runs, and print its path."""
    parser = argparse.ArgumentParser(prog="esper report", description="Write one HTML page about a run, or several.")
    parser.add_argument("run", nargs="+", help="folder of a run")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="FILE", help="page to write; report.html in the first run's folder by default")
    where.add_argument("--wandb", action="store_true", help="build a W&B Report instead, and print its address")
    parser.add_argument("--entity", help="with --wandb: user or team that the runs were sent to")
    parser.add_argument("--project", help="with --wandb: project that the runs were sent to")
    given = parser.parse_args(args)
    if given.wandb:
        from esper.nissa.wandb.report import send_report

        print(send_report(given.run, entity=given.entity, project=given.project))
        return 0
    from esper.nissa.page.page import write_page

    print(write_page(given.run, given.out))
    return 0
