"""transformers' Trainer around a small GPT-2 with random weights; the argument breaks it."""

import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

defect = sys.argv[1]


class Letters(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.starts = torch.randint(26, (256,), generator=generator)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        ids = (self.starts[i] + torch.arange(16)) % 26
        return {"input_ids": ids, "labels": ids.clone()}


class Detaching(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = torch.tensor(outputs.loss.item(), requires_grad=True)
        return (loss, outputs) if return_outputs else loss


class Evaluating(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        model.eval()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=26, n_positions=16, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False
)
model = GPT2LMHeadModel(config)
if defect == "frozen-head":
    for parameter in model.lm_head.parameters():
        parameter.requires_grad = False
arguments = TrainingArguments(
    output_dir="out",
    max_steps=24,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=8,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
optimizers = (None, None)
if defect == "layer-outside-optimizer":
    held = [p for name, p in model.named_parameters() if "h.1" not in name]
    optimizers = (torch.optim.AdamW(held, lr=3e-3), None)
kind = {"detached-loss": Detaching, "eval-left-on": Evaluating}.get(defect, Trainer)
kind(model=model, args=arguments, train_dataset=Letters(), optimizers=optimizers).train()
