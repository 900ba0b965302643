"""Divergence adapters, slowly: token by token, text by text, no batch, no cache, no padding.

From the description of the method: h <- h + length * h A B / |h A B| after every block; the loss of
a sampled token is -alpha KL(P || Q) + beta NLL_P; AdamW with decay 0.01. Where B is 0, the gradient
is that of length * h A B / |h A|.
"""

import torch


def added(h, A, B, length):
    low = h @ A
    up = low @ B
    if not B.any():
        return length * up / low.detach().norm(dim=-1, keepdim=True)
    return length * up / up.norm(dim=-1, keepdim=True)


def next_log_probs(model, tokens, adapter, length):
    """Log-probabilities after a list of tokens, by the model's own hooks, in one whole pass."""
    hooks = []
    if adapter is not None:
        A, B = adapter
        for layer in range(model.cfg.n_layers):
            pair = 0 if len(A) == 1 else layer
            hooks.append(
                (
                    f"blocks.{layer}.hook_resid_post",
                    lambda h, hook, pair=pair: h + added(h, A[pair], B[pair], length),
                )
            )
    logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
    return logits[0, -1].log_softmax(-1)


def sample(model, prompts, adapter, length, n_tokens, ends, generator):
    """A token at a time for all prompts in turn: the largest p / q, q exponential."""
    texts, done = [[] for _ in prompts], [False] * len(prompts)
    for _ in range(n_tokens):
        if all(done):
            break
        q = torch.empty(len(prompts), model.cfg.d_vocab).exponential_(generator=generator)
        for row, prompt in enumerate(prompts):
            if done[row]:
                continue
            with torch.no_grad():
                log_p = next_log_probs(model, prompt + texts[row], adapter, length)
            token = int((log_p.exp() / q[row]).argmax())
            texts[row].append(token)
            done[row] = token in ends
    return texts


def loss(model, prompts, texts, adapter, length, alpha, beta):
    """The mean over all sampled tokens."""
    terms = []
    for prompt, text in zip(prompts, texts, strict=True):
        for place, token in enumerate(text):
            before = prompt + text[:place]
            log_p = next_log_probs(model, before, adapter, length)
            with torch.no_grad():
                log_q = next_log_probs(model, before, None, length)
            kl = (log_p.exp() * (log_p - log_q)).sum()
            terms.append(-alpha * kl - beta * log_p[token])
    return sum(terms) / len(terms)


class AdamW:
    """Loshchilov & Hutter 2019, with the usual constants, number by number."""

    def __init__(self, shapes, lr):
        self.lr, self.t = lr, 0
        self.m = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        self.v = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]

    def step(self, weights, gradients):
        self.t += 1
        new = []
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
            m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            new.append(w - self.lr * 0.01 * w - self.lr * m / (v.sqrt() + 1e-8))
        return new


def train(model, prompts, A, steps, n_tokens, ends, generator, batch_size, length, alpha, beta, lr):
    """The adapter after these steps, and the loss of each; A is [pair, d_model, rank]."""
    A, B = A.double(), torch.zeros(*A.mT.shape, dtype=torch.float64)
    optimiser, losses, order = AdamW([A.shape, B.shape], lr), [], []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(prompts), generator=generator).tolist()
        batch, order = [prompts[i] for i in order[:batch_size]], order[batch_size:]
        texts = sample(model, batch, (A, B), length, n_tokens, ends, generator)
        A.requires_grad_(), B.requires_grad_()
        value = loss(model, batch, texts, (A, B), length, alpha, beta)
        gradients = torch.autograd.grad(value, [A, B])
        A, B = optimiser.step([A.detach(), B.detach()], gradients)
        losses.append(value.item())
    return A, B, losses
