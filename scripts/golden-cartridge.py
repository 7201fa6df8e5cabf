"""Write small cartridges as their authors do: what `tests/it/learned` converts and loads.

    python3 scripts/golden-cartridge.py tests/golden

Needs torch (2.15.0 wrote those in the repository); no randomness. Two layers, two KV heads, d 8, five entries; every number is
a function of its place, exact in bfloat16, which the tests compute again. `frozen` has one frozen entry, `plain` none, `halves` is in
half precision under the older names, and `legacy` has the format of torch before 1.6.
"""

import sys
from pathlib import Path

import torch
from torch.nn import Parameter, ParameterList

LAYERS, HEADS, ENTRIES, DIM = 2, 2, 5, 8


def numbers(layer, side):
    """[1, H, p, d]."""
    place = lambda h, t, c: (layer * 1009 + side * 499 + h * 131 + t * 17 + c * 3) % 251 - 125
    rows = [[[place(h, t, c) / 32 for c in range(DIM)] for t in range(ENTRIES)] for h in range(HEADS)]
    return torch.tensor([rows])


def parts(side, frozen, dtype):
    """Frozen and trained parameters of all layers: the frozen ones are views of the whole, as initialisers leave them."""
    whole = [numbers(layer, side).to(dtype) for layer in range(LAYERS)]
    fixed = ParameterList([Parameter(x[:, :, :frozen], requires_grad=False) for x in whole] if frozen else [])
    return fixed, ParameterList([Parameter(x[:, :, frozen:].contiguous()) for x in whole])


def save(path, word, frozen, dtype, **options):
    (fixed_keys, keys), (fixed_values, values) = parts(0, frozen, dtype), parts(1, frozen, dtype)
    saved = {
        "trainable_keys": keys,
        "trainable_values": values,
        f"{word}_keys": fixed_keys,
        f"{word}_values": fixed_values,
    }
    torch.save(saved, path, **options)


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: golden-cartridge.py FOLDER")
    folder = Path(sys.argv[1])
    save(folder / "cartridge-frozen.pt", "fixed", 1, torch.bfloat16)
    save(folder / "cartridge-plain.pt", "fixed", 0, torch.bfloat16)
    save(folder / "cartridge-halves.pt", "frozen", 1, torch.float16)
    save(folder / "cartridge-legacy.pt", "fixed", 1, torch.bfloat16, _use_new_zipfile_serialization=False)


main()
