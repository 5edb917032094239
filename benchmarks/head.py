"""The head and its loss against the two products it cannot do without: logits, and their slopes times the head.

    python benchmarks/head.py [--rounds 7]

320 supervised positions of width 512, a vocabulary of 151,936; forward and backward, on one core. In bfloat16 only
where the processor multiplies it: elsewhere PyTorch's two products take half a minute, and ours are not made of them.
"""

from __future__ import annotations

import argparse

import figures

figures.one_core()

import torch
from mens_torch.loss import supervised_loss
from torch.nn import functional

POSITIONS, WIDTH, VOCABULARY = 320, 512, 151_936


def main() -> None:
    """One line a number format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--allocator", choices=tuple(figures.ALLOCATORS), default="default", help="what the lines say")
    asked = parser.parse_args()
    goals = {"float32": ""} | {figures.format_here("bfloat16"): "<= 1.25"}
    for dtype, goal in goals.items():
        torch.manual_seed(0)
        number = getattr(torch, dtype)
        head, hidden = torch.randn(VOCABULARY, WIDTH).mul_(0.02).to(number), torch.randn(POSITIONS, WIDTH).to(number)
        targets = torch.randint(0, VOCABULARY, (POSITIONS,))

        def ours(hidden=hidden, head=head, targets=targets) -> None:
            supervised_loss(hidden.detach().requires_grad_(), head, targets).backward()

        def all_logits(hidden=hidden, head=head, targets=targets) -> None:
            inner = hidden.detach().requires_grad_()
            functional.cross_entropy((inner @ head.t()).float(), targets, reduction="sum").backward()

        def products(hidden=hidden, head=head) -> None:
            _ = (hidden @ head.t()) @ head

        spent = figures.in_turns({"ours": ours, "all logits": all_logits, "products": products}, asked.rounds)
        what, products_alone = f"cross-entropy head, {dtype}", "its two products' time"
        figures.state(6, what, spent["ours"], spent["products"], products_alone, goal, asked.allocator)
        what = f"cross-entropy over all logits, {dtype}"
        figures.state(6, what, spent["all logits"], spent["products"], products_alone, "", asked.allocator)


if __name__ == "__main__":
    main()
