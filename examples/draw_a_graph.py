"""Draw the autograd graph of a GPT-2, and ask another one what does not lead to its loss.

python examples/draw_a_graph.py [--out FOLDER]
"""

import argparse
from pathlib import Path

from architectures import detached_encoder, gpt2

import gradscope

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("graphs"))
folder = parser.parse_args().out
folder.mkdir(parents=True, exist_ok=True)

model, compute_loss = gpt2(n_layers=12)
with gradscope.capture(model) as c:
    loss = compute_loss()
graph = c.graph(loss)

print(graph)
print(graph.to_text(), end="\n\n")
print("wrote", graph.render(folder / "gpt2.svg"))
print("wrote", graph.render(folder / "gpt2.html"), end="\n\n")

keeps = graph.modules.sort_values("saved_bytes", ascending=False)
print(keeps[["module", "module_type", "saved_bytes"]].head(5).to_string(index=False), end="\n\n")

model, compute_loss = detached_encoder()
with gradscope.capture(model) as c:
    loss = compute_loss()
print(c.graph(loss).unreached.to_string(index=False))
