"""Write NumPy's singular values of the recorded trace: what `tests/it/factor.rs` compares decompositions with.

    python3 scripts/golden-svd.py tests/golden/smollm2-small.trace.safetensors tests/golden/smollm2-small.svd.json

Keys before their rotary embedding and values, [T, heads * d] per layer and for both layers side by side, all tokens
of the trace, decomposed in float64. Needs NumPy; no randomness. The error of any rank follows from the values.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np


def read(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    body = memoryview(data)[8 + length :]

    def tensor(name):
        entry = header[name]
        assert entry["dtype"] == "F32", name
        start, end = entry["data_offsets"]
        return np.frombuffer(body[start:end], dtype="<f4").reshape(entry["shape"])

    return json.loads(meta["layers"]), tensor


def matrix(tensor, layers, side):
    """[T, layers * heads * d]: a row is a token."""
    parts = [tensor(f"layers.{layer}.{side}") for layer in layers]
    return np.concatenate([p.transpose(1, 0, 2).reshape(p.shape[1], -1) for p in parts], axis=1)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: golden-svd.py TRACE OUTPUT")
    layers, tensor = read(sys.argv[1])
    cases = []
    for side in ["k_pre", "v"]:
        for group in [[layer] for layer in layers] + [layers]:
            x = matrix(tensor, group, side).astype(np.float64)
            singular = np.linalg.svd(x, compute_uv=False)
            cases.append(
                {
                    "side": side,
                    "layers": group,
                    "tokens": x.shape[0],
                    "features": x.shape[1],
                    "squared_norm": float(f"{(x * x).sum():.10g}"),
                    "singular": [float(f"{s:.8g}") for s in singular],
                }
            )
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    head = f'"made_by": "scripts/golden-svd.py, NumPy {np.__version__}"'
    Path(sys.argv[2]).write_text("{" + head + ', "cases": [\n' + lines + "\n]}\n")


main()
