"""The whole method in plain PyTorch: keep checkpoints, take one gradient in the merge weights, choose, load.

Nothing here is fast, safe or careful of memory; the package is, and a test holds the package equal to this file.
"""

import torch
from torch.func import functional_call


def merge(rows, weights):
    """``theta(a) = sum_i a_i theta_i``, tensor by tensor; ``rows`` is a list of state dicts, oldest first."""
    return {name: sum(a * row[name] for a, row in zip(weights, rows, strict=True)) for name in rows[0]}


def evaluate(model, parameters, sequences):
    """Mean negative log-likelihood per token, in nats, of a model with these parameters."""
    batch = {"input_ids": sequences, "labels": sequences}
    return functional_call(model, parameters, kwargs=batch).loss


def gradient(model, rows, weights, sequences):
    """The loss of a merge, and its gradient in the k merge weights: autograd goes through the merge itself."""
    weights = torch.tensor(weights, requires_grad=True)
    loss = evaluate(model, merge(rows, weights), sequences)
    loss.backward()
    return loss.item(), weights.grad.tolist()


def one_gradient(k, length=0.1):
    """Candidates for merge weights: the average, one step down its gradient, and the best step by a parabola.

    Yields ``(weights, whether the gradient is wanted)`` and is sent ``(loss, gradient)``.
    """
    average = torch.full((k,), 1.0 / k, dtype=torch.float64)
    loss, slopes = yield average.tolist(), True
    slopes = torch.tensor(slopes, dtype=torch.float64)
    downhill = -(slopes - slopes.mean())  # the sum of the weights stays 1
    downhill = downhill / downhill.norm()
    slope = float(slopes @ downhill)
    there, _ = yield (average + length * downhill).tolist(), False
    bend = there - loss - slope * length  # of the parabola through both losses with this slope
    best = -slope * length**2 / (2 * bend) if bend > 0 else 2 * length
    yield (average + min(best, 2 * length) * downhill).tolist(), False


def choose(model, rows, search_split):
    """The merge weights of lowest loss on the search split among the candidates; live, the newest row, is one."""
    live = [0.0] * (len(rows) - 1) + [1.0]
    with torch.no_grad():
        best, best_loss = live, float(evaluate(model, rows[-1], search_split))
    candidates = one_gradient(len(rows))
    weights, wants_gradient = next(candidates)
    while True:
        if wants_gradient:
            loss, slopes = gradient(model, rows, weights, search_split)
        else:
            with torch.no_grad():
                loss, slopes = float(evaluate(model, merge(rows, weights), search_split)), None
        if loss < best_loss:
            best, best_loss = weights, loss
        try:
            weights, wants_gradient = candidates.send((loss, slopes))
        except StopIteration:
            return best


def train_and_merge(model, take_step, steps, search_split, report_split, k=4, every=2):
    """Train, keep the last k checkpoints, and load their merge; the losses of live and merged on the report split.

    Weights are chosen on one split and numbers come from the other, which shares no sequence and no document with it.
    """
    rows = []
    for step in range(1, steps + 1):
        take_step(step)
        if step % every == 0:
            rows = [*rows, {name: p.detach().clone() for name, p in model.named_parameters()}][-k:]
    model.eval()
    weights = choose(model, rows, search_split)
    with torch.no_grad():
        losses = [float(evaluate(model, row, report_split)) for row in (rows[-1], merge(rows, weights))]
    model.load_state_dict(merge(rows, weights), strict=False)
    return weights, losses
