"""Pretrain a byte-level GPT in a loop like nanoGPT's: batches are tuples, and the model returns logits and loss."""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from realtext import VOCABULARY, python_source, split_blocks
from traj_merge_callback import TrajectoryMerger, load_merged


class GPT(nn.Module):
    """A decoder with tied embeddings; ``model(idx, targets) -> (logits, loss)``."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of shape ``(batch, length, vocabulary)``, and their mean loss in nats per token."""
        length = idx.shape[1]
        x = self.tokens(idx) + self.positions(torch.arange(length, device=idx.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=idx.device)
        logits = self.head(self.blocks(x, mask=mask, is_causal=True))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nll(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """The summed loss of a batch, and its target tokens."""
    x, y = batch
    _, loss = model(x, y)
    return loss * y.numel(), y.numel()


def main() -> None:
    """Train, print each merge, and load the best snapshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capture-every", type=int, default=20)
    parser.add_argument("--merge-every", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/nanogpt_loop")
    args = parser.parse_args()

    torch.manual_seed(0)
    train_data, val_data = split_blocks(python_source(), length=129)
    model = GPT(args.width, layers=4, length=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def get_batch() -> tuple[Tensor, Tensor]:
        blocks = train_data[torch.randint(len(train_data), (16,))]
        return blocks[:, :-1], blocks[:, 1:]

    heldout = DataLoader(TensorDataset(val_data[:, :-1], val_data[:, 1:]), batch_size=16)
    merger = TrajectoryMerger(
        heldout,
        nll=nll,
        capture_every=args.capture_every,
        merge_every=args.merge_every,
        output_dir=f"{args.output_dir}/merged",
    )
    for step in range(1, args.steps + 1):
        _, loss = model(*get_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if record := merger.step(model, step, loss=loss):
            print(f"step {record.step}: live {record.live_loss:.4f}, merged {record.merged_loss:.4f} nats/token")
    merger.finish(model)

    merge = load_merged(f"{args.output_dir}/merged/best", model)
    print(f"loaded the merge of step {merge['step']} into {type(model).__name__}")


if __name__ == "__main__":
    main()
