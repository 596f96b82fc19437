"""TokenMerger in a model of one's own: an encoder on packed sequences that merges its tokens twice.

    python examples/token_merger.py

Each token of a sequence repeats one of a few symbols with noise, and is to be told which. Merging happens
inside of the model, and every token still gets an answer.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd import TokenMerger

LENGTH, SYMBOLS, WIDTH = 64, 10, 64


class Encoder(nn.Module):
    """Three layers; between them tokens merge, at the end each is given what its group became."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = r
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x: Tensor, sequence_ids: Tensor) -> Tensor:
        x = self.layers[0](self.embed(x), self.mask(sequence_ids))
        first = TokenMerger(x, self.r, sequence_ids=sequence_ids)
        x = self.layers[1](first(x), self.mask(first.merged_ids))
        second = first.chain(x, self.r // 2)
        x = self.layers[2](second(x), self.mask(second.merged_ids))
        return second.unmerge(self.head(x))

    def mask(self, ids: Tensor) -> Tensor:
        """True where attention would cross from one sequence to another."""
        return (ids[:, :, None] != ids[:, None, :]).repeat_interleave(4, dim=0)


def batch(symbols: Tensor, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tokens `[B, 64, 64]`, the id of the sequence each is part of, and the symbol it repeats."""
    labels = torch.randint(SYMBOLS, (size, LENGTH))
    ids = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(size, -1)  # two sequences packed in each sample
    return symbols[labels] + 1.5 * torch.randn(size, LENGTH, WIDTH), ids, labels


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    torch.manual_seed(0)
    symbols = torch.randn(SYMBOLS, WIDTH)
    for r in (0, 20):
        torch.manual_seed(1)
        model = Encoder(r)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(100):
            x, ids, labels = batch(symbols)
            loss = F.cross_entropy(model(x, ids).flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            x, ids, labels = batch(symbols, 256)
            right = (model(x, ids).argmax(-1) == labels).float().mean()
        print(f"{LENGTH} -> {LENGTH - r} -> {LENGTH - r - r // 2} tokens: {right:.1%} of the tokens right")


if __name__ == "__main__":
    main()
