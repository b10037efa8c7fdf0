"""Make a model of model_cards/ again from its recipe, and keep its card, report, plan and pictures there.

    python scripts/model_card.py model_cards/minilm-banking77-macs50

The weights stay in --work. Run scripts/readme.py afterwards: the README shows the first card's table.
"""

import argparse
import shutil
from pathlib import Path

import transformers
import yaml

from hf_kdprune.demo.run import Demo, run_demo

KEPT = ("README.md", "report.json", "plan.json", "*.png")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("card", type=Path, help="a folder with a recipe.yaml")
parser.add_argument("--work", default="kdprune-demo", help="where teacher and weights go (%(default)s)")
args = parser.parse_args()

transformers.logging.set_verbosity_error()
recipe = yaml.safe_load((args.card / "recipe.yaml").read_text())
made = Path(run_demo(Demo(**recipe, output=args.work))["path"])
for pattern in KEPT:
    for file in made.glob(pattern):
        shutil.copyfile(file, args.card / file.name)
print(f"{args.card} holds the card of {made}")
