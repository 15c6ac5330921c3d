"""Prints docs/scale.md from the planner; `--write` puts it there."""

from __future__ import annotations

import sys
from pathlib import Path

from dominie.planning.plan import machine, plan_recipe
from dominie.planning.scale import cache_line, scale_page
from dominie.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
COUNTS, CONVERSATIONS, TOKENS = (8, 64, 512), 1_000_000, 1024

_BEFORE = """# Beyond one machine, on paper

`python docs/scale.py --write` printed this page: `recipes/mistral-7b.yaml` as `dominie plan` sees
it on 8, 64 and 512 H100 (80 GB), with a million conversations of 1,024 tokens in each source,
student and Mixtral sharded over all ranks, and a batch of 4,096 in the expert's stage too, which
512 ranks can share. No such run was made: these are bounds and their ratios, no measurements.
Hours are at 40 % of the bound that binds. `products`, `memory` and `network` are the time that
each bound alone would take, as a share of the longest. Memory is for conversations as long as
`max_length` allows.
"""

_AFTER = """## What it means
- The products bind at every size, so GPU hours stay what they are and the clock runs down with the
  GPUs; the teacher's forward is the largest saving there is. What moves is the distance to the next
  bound: the network needs a third to a half of the time of the products in one machine, and more in
  several. It hides behind them only while transfers overlap with computation.
- That distance is made of tokens in a forward pass. Every micro-batch gathers the student two or
  three times and the teacher once, whatever is in it: with half of the tokens in a micro-batch the
  network binds in distillation. More ranks at one batch leave less to each; at 512 a batch of 4,096
  leaves 8 conversations, one micro-batch, and no accumulation. More GPUs than that want a larger
  batch, which is another experiment.
- These machines have a network card for each GPU. With one card a machine the network is eight
  times slower and binds from the second machine on: shard within machines, copy between them.
- The teacher is most of the traffic in distillation (93 GB of Mixtral, 14.5 GB of the
  student a pass) and a fifth to a third of the products. A cache takes both away, and the stage's
  memory with it. Its price is storage: read once an epoch in order, it asks less than one storage
  system gives, so that reading it does not become the next bound. The attention term needs the
  teacher live: a stage with it cannot be cached, DAE can.
"""


def page() -> str:
    """The page of today's planner."""
    recipe = load_recipe(ROOT / "recipes" / "mistral-7b.yaml", ["stages.expert.train.batch=4096"])
    tables = scale_page(
        recipe, gpu="h100", counts=COUNTS, conversations=CONVERSATIONS, tokens=TOKENS
    )
    largest = plan_recipe(
        recipe,
        machine(gpu="h100", gpus=COUNTS[-1]),
        conversations=CONVERSATIONS,
        tokens=TOKENS,
    )
    return "\n".join([_BEFORE, *tables, cache_line(largest), "", _AFTER])


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
