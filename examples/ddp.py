"""A GPT trained by several processes, each watched, all in one run directory.

torchrun --nproc-per-node 2 examples/ddp.py
gradscope summary runs/ddp

With --past-the-wrapper the forward goes through model.module: nobody averages the gradients then.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradscope
from gradscope.demo.char_gpt import CharGPT
from gradscope.demo.text import CharText


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", default="runs/ddp")
    parser.add_argument("--past-the-wrapper", action="store_true")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    text = CharText(seed=rank)  # other batches on every rank
    model = DistributedDataParallel(CharGPT(text.vocab_size))  # the weights of rank 0
    forward = model.module if options.past_the_wrapper else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with gradscope.watch(model, optimizer, save=options.save):
        for step in range(options.steps):
            xb, yb = text.get_batch("train")
            _, loss = forward(xb, yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rank == 0 and step % 10 == 0:
                print(f"step {step:3d}  loss {loss.item():.3f}")

    dist.barrier()  # all ranks have written
    if rank == 0:
        print(gradscope.open(options.save))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
