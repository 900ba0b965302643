"""The atlas of all pairs of layers of the bundled model: how long it takes, and its table.

    python -m benchmarks.atlas [FOLDER]

Sources that an earlier call left in FOLDER (runs/atlas) are not computed again; the times are of
those that are. Writes benchmarks/atlas.csv, a row for each pair and sign, and
docs/pictures/atlas.png; prints a table.
"""

import sys
import time
from pathlib import Path

import torch

import tl_melbo as tm
from benchmarks.tables import markdown
from benchmarks.timing import matrix_rate
from tl_melbo.files import replacing
from tl_melbo.tables import Table

PROMPT = "Tell me about yourself."
TABLE = Path(__file__).parent / "atlas.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "atlas.png"
COLUMNS = ("source_layer", "target_layer", "sign", "singular_value", "share", "norm", "kl")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/atlas")
    model = tm.load_model()
    before, times = matrix_rate(), []
    began = last = time.perf_counter()
    worked = time.process_time()

    def tell(found: tm.evaluation.Atlas) -> None:
        nonlocal last
        now = time.perf_counter()
        times.append(now - last)
        last = now
        print(f"{found}: {now - began:.0f} s", flush=True)

    found = tm.evaluation.atlas(model, PROMPT, folder=folder, on_source=tell)
    after = matrix_rate()
    table = found.table
    with replacing(TABLE) as path:
        table[[*COLUMNS]].to_csv(path, index=False, float_format="%.6g")
    title = "What each pair's first singular vector does to the next token"
    tm.plots.atlas_heatmap(table, "kl", title=title).write_image(PICTURE, scale=1.3)
    pairs = table[table["sign"] == 1]
    cosines = [
        tm.analysis.cosine_similarity(each.vectors).abs().triu(1)
        for each in found.libraries.values()
        if len(each) > 1
    ]
    near = torch.cat([each[each > 0] for each in cosines])
    rows = [
        ("pairs", len(pairs)),
        ("sources computed in this call", len(times)),
        ("seconds for these, all that is computed included", f"{sum(times):.0f}"),
        ("CPU seconds of the process in this call", f"{time.process_time() - worked:.0f}"),
        ("matrix rate before and after", f"{before / 1e9:.0f}, {after / 1e9:.0f} GFLOP/s"),
        ("threads", torch.get_num_threads()),
        ("KL above 0.5 nats, of both signs", f"{(table['kl'] > 0.5).mean():.0%}"),
        ("rank correlation of singular value and KL", f"{_correlation(table):.2f}"),
        ("first vectors of one source, median absolute cosine", f"{float(near.median()):.2f}"),
    ]
    print(markdown(Table(rows, columns=["what", "measured"])))


def _correlation(table: Table) -> float:
    larger = table.groupby(["source_layer", "target_layer"])[["singular_value", "kl"]].max()
    return float(larger.rank().corr().iloc[0, 1])


if __name__ == "__main__":
    main()
