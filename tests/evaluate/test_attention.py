"""Flex attention, which the held-out evaluation must not run unfused: it would hold all the scores."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from traj_merge_callback import HeldOutLoss

HEADS, LENGTH = 8, 4096
torch.manual_seed(0)

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(16, 16)

    def forward(self, x):
        q = self.inside(x)
        return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf")))

model = torch.compile(Attention())
data = [torch.randn(1, HEADS, LENGTH, 16) for _ in range(2)]
loss = HeldOutLoss(data, nll=lambda model, x: (model(x).square().sum(), 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = loss.evaluate(model, "report").loss
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
with torch.no_grad():
    inside = [model.inside(x) for x in data]
    expected = [nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum() for q in inside]
print(min(abs(found / float(value) - 1) for value in expected))
print(grown / (4 * HEADS * LENGTH * LENGTH))
"""


def test_flex_attention_in_a_compiled_model_stays_fused_and_right():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    assert "unfused" not in done.stderr
    error, share_of_scores = map(float, done.stdout.split())
    assert error == pytest.approx(0.0, abs=1e-4)
    assert share_of_scores < 0.5
