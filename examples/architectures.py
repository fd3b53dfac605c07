"""Small networks of well-known shapes, whose autograd graphs are worth drawing.

python examples/architectures.py

Each function in ARCHITECTURES returns (model, compute_loss). compute_loss() runs one forward on a
fixed random batch and returns the loss, ready for backward(). Nothing is downloaded, and
everything random follows from torch.manual_seed(0).
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# GPT-2, with the module names of Hugging Face's GPT2LMHeadModel


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as (in, out), as GPT-2 has it."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class GPT2Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)
        self.attn_dropout = nn.Dropout(dropout)  # never called: attention takes its rate
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        rate = self.attn_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, time, width)
        return self.resid_dropout(self.c_proj(y))


class GPT2MLP(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.c_fc = Conv1D(4 * width, width)
        self.c_proj = Conv1D(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPT2Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = GPT2Attention(width, heads, dropout)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = GPT2MLP(width, dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    def __init__(self, n_layers, width, heads, vocab, context, dropout):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(GPT2Block(width, heads, dropout) for _ in range(n_layers))
        self.ln_f = nn.LayerNorm(width)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for block in self.h:  # what is added to the residual stream starts smaller
            nn.init.normal_(block.attn.c_proj.weight, std=0.02 / math.sqrt(2 * n_layers))
            nn.init.normal_(block.mlp.c_proj.weight, std=0.02 / math.sqrt(2 * n_layers))
        self.gradient_checkpointing = False
        self.use_reentrant = False

    def forward(self, idx):
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            if self.gradient_checkpointing:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
            else:
                x = block(x)
        return self.ln_f(x)


class GPT2LMHeadModel(nn.Module):
    def __init__(self, n_layers, width, heads, vocab, context, dropout):
        super().__init__()
        self.transformer = GPT2Model(n_layers, width, heads, vocab, context, dropout)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx, targets):
        logits = self.lm_head(self.transformer(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt2(n_layers=12, width=64, heads=4, vocab=100, context=32, dropout=0.0):
    """GPT-2, its head tied to its token embedding, its loss computed inside of the model.

    Without dropout two forwards give the same loss; GPT-2 itself was trained with 0.1.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(n_layers, width, heads, vocab, context, dropout)
    tokens = torch.randint(vocab, (4, context + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:]

    def compute_loss():
        _logits, loss = model(idx, targets)
        return loss

    return model, compute_loss


def checkpointed_gpt2(
    n_layers=12, width=64, heads=4, vocab=100, context=32, dropout=0.0, use_reentrant=False
):
    """The same GPT-2, but each block's forward is run again in backward instead of saved."""
    model, compute_loss = gpt2(n_layers, width, heads, vocab, context, dropout)
    model.transformer.gradient_checkpointing = True
    model.transformer.use_reentrant = use_reentrant
    return model, compute_loss


# ResNet-18, with the module names of torchvision


class BasicBlock(nn.Module):
    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width, n_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self.make_layer(width, width, stride=1)
        self.layer2 = self.make_layer(width, 2 * width, stride=2)
        self.layer3 = self.make_layer(2 * width, 4 * width, stride=2)
        self.layer4 = self.make_layer(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, n_classes)

    @staticmethod
    def make_layer(n_in, n_out, stride):
        return nn.Sequential(BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet(width=8, n_classes=10, batch=8):
    """ResNet-18 with few channels, on 32 by 32 images."""
    torch.manual_seed(0)
    model = ResNet(width, n_classes)
    criterion = nn.CrossEntropyLoss()
    images = torch.randn(batch, 3, 32, 32)
    labels = torch.randint(n_classes, (batch,))

    def compute_loss():
        return criterion(model(images), labels)

    return model, compute_loss


# U-Net


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder1 = self.double_conv(3, width)
        self.pool1 = nn.MaxPool2d(2)
        self.encoder2 = self.double_conv(width, 2 * width)
        self.pool2 = nn.MaxPool2d(2)
        self.encoder3 = self.double_conv(2 * width, 4 * width)
        self.pool3 = nn.MaxPool2d(2)
        self.encoder4 = self.double_conv(4 * width, 8 * width)
        self.pool4 = nn.MaxPool2d(2)

        self.bottleneck = self.double_conv(8 * width, 16 * width)

        # Each decoder sees twice the channels: the upsampled ones and the encoder's.
        self.upconv4 = nn.ConvTranspose2d(16 * width, 8 * width, 2, stride=2)
        self.decoder4 = self.double_conv(16 * width, 8 * width)
        self.upconv3 = nn.ConvTranspose2d(8 * width, 4 * width, 2, stride=2)
        self.decoder3 = self.double_conv(8 * width, 4 * width)
        self.upconv2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.decoder2 = self.double_conv(4 * width, 2 * width)
        self.upconv1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.decoder1 = self.double_conv(2 * width, width)

        self.conv = nn.Conv2d(width, 1, 1)

    @staticmethod
    def double_conv(n_in, n_out):
        layers = OrderedDict(
            conv1=nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(n_out),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(n_out),
            relu2=nn.ReLU(inplace=True),
        )
        return nn.Sequential(layers)

    def forward(self, x):
        enc1 = self.encoder1(x)
        enc2 = self.encoder2(self.pool1(enc1))
        enc3 = self.encoder3(self.pool2(enc2))
        enc4 = self.encoder4(self.pool3(enc3))
        x = self.bottleneck(self.pool4(enc4))
        x = self.decoder4(torch.cat([self.upconv4(x), enc4], dim=1))
        x = self.decoder3(torch.cat([self.upconv3(x), enc3], dim=1))
        x = self.decoder2(torch.cat([self.upconv2(x), enc2], dim=1))
        x = self.decoder1(torch.cat([self.upconv1(x), enc1], dim=1))
        return self.conv(x)


def unet(width=4, batch=4, size=32):
    """U-Net with four levels, telling foreground from background in each pixel."""
    torch.manual_seed(0)
    model = UNet(width)
    criterion = nn.BCEWithLogitsLoss()
    images = torch.randn(batch, 3, size, size)
    masks = torch.randint(2, (batch, 1, size, size)).float()

    def compute_loss():
        return criterion(model(images), masks)

    return model, compute_loss


# Recurrent networks


class LSTMClassifier(nn.Module):
    def __init__(self, vocab, width, n_classes):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.fc = nn.Linear(width, n_classes)

    def forward(self, idx):
        _outputs, (h_n, _c_n) = self.lstm(self.embedding(idx))
        return self.fc(h_n[-1])


def lstm_classifier(vocab=100, width=32, n_classes=4, batch=8, steps=20):
    """A text classifier: a two-layer LSTM whose last state is classified."""
    torch.manual_seed(0)
    model = LSTMClassifier(vocab, width, n_classes)
    idx = torch.randint(vocab, (batch, steps))
    labels = torch.randint(n_classes, (batch,))

    def compute_loss():
        return F.cross_entropy(model(idx), labels)

    return model, compute_loss


class UnrolledRNN(nn.Module):
    def __init__(self, n_in, width, n_out):
        super().__init__()
        self.cell = nn.GRUCell(n_in, width)
        self.head = nn.Linear(width, n_out)

    def forward(self, inputs):
        hidden = inputs.new_zeros(inputs.shape[0], self.cell.hidden_size)
        outputs = []
        for x in inputs.unbind(1):
            hidden = self.cell(x, hidden)
            outputs.append(self.head(hidden))
        return outputs


def unrolled_rnn(steps=50, width=32, batch=8):
    """A GRU cell called in a Python loop, with a loss at every step."""
    torch.manual_seed(0)
    model = UnrolledRNN(n_in=8, width=width, n_out=1)
    inputs = torch.randn(batch, steps, 8)
    targets = torch.randn(batch, steps, 1)

    def compute_loss():
        loss = 0.0
        for output, target in zip(model(inputs), targets.unbind(1), strict=True):
            loss = loss + F.mse_loss(output, target)
        return loss

    return model, compute_loss


# Mixture of experts, with the module names of Hugging Face's Mixtral


class CausalSelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w1 = nn.Linear(width, 2 * width, bias=False)
        self.w2 = nn.Linear(2 * width, width, bias=False)
        self.w3 = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoE(nn.Module):
    """Sends each token to its top_k experts, and adds up what they return."""

    def __init__(self, width, n_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, n_experts, bias=False)  # the router
        self.experts = nn.ModuleList(Expert(width) for _ in range(n_experts))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        probabilities = F.softmax(self.gate(tokens), dim=-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)

        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            y = expert(tokens[token]) * weights[token, slot, None]
            out = out.index_add(0, token, y)

        # Load balancing: 1 when all experts get the same share of the tokens, else more.
        n_experts = len(self.experts)
        share = F.one_hot(chosen, n_experts).float().mean(dim=(0, 1))
        balance = n_experts * (share * probabilities.mean(dim=0)).sum()
        return out.view_as(x), balance


class MoEBlock(nn.Module):
    def __init__(self, width, heads, n_experts, top_k):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width)
        self.self_attn = CausalSelfAttention(width, heads)
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.block_sparse_moe = SparseMoE(width, n_experts, top_k)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        y, balance = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y, balance


class MixtureOfExperts(nn.Module):
    def __init__(self, n_layers, width, heads, n_experts, top_k, vocab):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            MoEBlock(width, heads, n_experts, top_k) for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, idx):
        x = self.embed_tokens(idx)
        balance = 0.0
        for layer in self.layers:
            x, layer_balance = layer(x)
            balance = balance + layer_balance
        return self.lm_head(self.norm(x)), balance


def mixture_of_experts(n_layers=2, width=32, heads=4, n_experts=8, top_k=2, vocab=100):
    """A language model in the manner of Mixtral (without its rotary positions)."""
    torch.manual_seed(0)
    model = MixtureOfExperts(n_layers, width, heads, n_experts, top_k, vocab)
    tokens = torch.randint(vocab, (4, 33))
    idx, targets = tokens[:, :-1], tokens[:, 1:]

    def compute_loss():
        logits, balance = model(idx)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.01 * balance

    return model, compute_loss


# Autoencoders


class TiedAutoencoder(nn.Module):
    def __init__(self, n_features, width):
        super().__init__()
        self.encoder = nn.Linear(n_features, width)
        self.bias = nn.Parameter(torch.zeros(n_features))

    def forward(self, x):
        z = torch.relu(self.encoder(x))
        return F.linear(z, self.encoder.weight.t(), self.bias)


def tied_autoencoder(n_features=64, width=16, batch=32):
    """An autoencoder that decodes with the transpose of its encoder's weight."""
    torch.manual_seed(0)
    model = TiedAutoencoder(n_features, width)
    x = torch.randn(batch, n_features)

    def compute_loss():
        return F.mse_loss(model(x), x)

    return model, compute_loss


class DetachedEncoder(nn.Module):
    def __init__(self, n_features, width):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(n_features, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.decoder = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, n_features)
        )
        self.output = nn.Linear(n_features, n_features).requires_grad_(False)  # frozen
        self.aux = nn.Linear(width, 4)
        self.unused = nn.Linear(width, width)  # never called

    def forward(self, x):
        z = self.encoder(x).detach()  # the defect: no gradient gets back to the encoder
        return self.output(self.decoder(z)), self.aux(z)


def detached_encoder(n_features=64, width=16, batch=32):
    """An autoencoder whose encoder cannot learn, nor can three of its other layers.

    The encoder is cut off by detach(), `output` is frozen (the gradient passes through it),
    `aux` is computed but not in the loss, and `unused` is never called.
    """
    torch.manual_seed(0)
    model = DetachedEncoder(n_features, width)
    x = torch.randn(batch, n_features)

    def compute_loss():
        reconstruction, _aux = model(x)
        return F.mse_loss(reconstruction, x)

    return model, compute_loss


# A gradient inside of the loss


class Critic(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.fc = nn.Linear(2 * width * 4 * 4, 1)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1)).squeeze(1)


def gradient_penalty(width=8, batch=8):
    """The critic of a WGAN-GP, whose loss holds a gradient: backward() differentiates twice."""
    torch.manual_seed(0)
    critic = Critic(width)
    real = torch.randn(batch, 1, 16, 16)
    fake = torch.randn(batch, 1, 16, 16)
    share = torch.rand(batch, 1, 1, 1)

    def compute_loss():
        interpolates = (share * real + (1 - share) * fake).requires_grad_()
        scores = critic(interpolates)
        (grad,) = torch.autograd.grad(scores.sum(), interpolates, create_graph=True)
        penalty = ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty

    return critic, compute_loss


# A loop inside of a loop


class RecursiveTree(nn.Module):
    """Rounds of message passing over a tree; every round uses the same weights."""

    def __init__(self, n_features, width, n_classes, rounds, steps):
        super().__init__()
        self.rounds = rounds
        self.steps = steps
        self.embed = nn.Linear(n_features, width)
        self.message = nn.Linear(width, width)
        self.cell = nn.GRUCell(width, width)
        self.refine = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x, adjacency):
        start = torch.tanh(self.embed(x))
        hidden = start
        for _ in range(self.rounds):
            for _ in range(self.steps):
                messages = adjacency @ self.message(hidden)
                hidden = self.cell(messages, hidden)
            hidden = torch.tanh(self.refine(torch.cat([hidden, start], dim=1)))
        return self.head(hidden)


def recursive_tree(rounds=3, steps=5, width=16, n_nodes=15):
    """A classifier of the nodes of a binary tree: rounds of steps, with shared weights."""
    torch.manual_seed(0)
    n_features, n_classes = 8, 3
    model = RecursiveTree(n_features, width, n_classes, rounds, steps)
    child = torch.arange(1, n_nodes)
    parent = (child - 1) // 2
    adjacency = torch.zeros(n_nodes, n_nodes)
    adjacency[child, parent] = 1.0
    adjacency[parent, child] = 1.0
    x = torch.randn(n_nodes, n_features)
    labels = torch.randint(n_classes, (n_nodes,))

    def compute_loss():
        return F.cross_entropy(model(x, adjacency), labels)

    return model, compute_loss


ARCHITECTURES: dict[str, Callable] = {
    "gpt2": gpt2,
    "checkpointed_gpt2": checkpointed_gpt2,
    "resnet": resnet,
    "unet": unet,
    "lstm_classifier": lstm_classifier,
    "unrolled_rnn": unrolled_rnn,
    "mixture_of_experts": mixture_of_experts,
    "tied_autoencoder": tied_autoencoder,
    "detached_encoder": detached_encoder,
    "gradient_penalty": gradient_penalty,
    "recursive_tree": recursive_tree,
}


if __name__ == "__main__":
    for name, build in ARCHITECTURES.items():
        model, compute_loss = build()
        loss = compute_loss()
        loss.backward()
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:20} {n_parameters:8,} parameters  loss {loss.item():.4f}")
