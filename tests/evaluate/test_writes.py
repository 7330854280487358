"""Whatever evaluating does to parameters is undone, and the numbers are those of eval mode."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from traj_merge_callback import HeldOutLoss, TrajectoryMerger


class LoRA(nn.Linear):
    """A frozen weight and an adapter that is added to the weight in eval mode, and subtracted in train mode."""

    def __init__(self, size):
        super().__init__(size, size)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(size, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ (self.b @ self.a).T)


class Writing(nn.Linear):
    """Writes its weight in eval mode, in one of many ways."""

    def __init__(self, size, write, frozen):
        super().__init__(size, size)
        self.weight.requires_grad_(not frozen)
        self.write = write

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return super().forward(x)


def other_values(module):
    module.weight.data = module.weight.data * 0.9


def another_parameter(module):
    module.weight = nn.Parameter(module.weight * 0.9)


def write_and_fail(module):
    module.weight.data.mul_(0.9)
    raise ArithmeticError("after writing")


WRITES = {
    "in place": lambda module: module.weight.mul_(0.9),
    "through data": lambda module: module.weight.data.mul_(0.9),
    "a view": lambda module: module.weight.data[0].fill_(1.0),
    "an element": lambda module: module.weight.data.__setitem__((0, 0), 3.0),
    "out=": lambda module: torch.mul(module.weight.data, 0.9, out=module.weight.data),
    "foreach": lambda module: torch._foreach_mul_([module.weight.data, module.bias.data], 0.9),
    "transposed": lambda module: module.weight.data.T.add_(torch.ones(4, 4)),
    "detached": lambda module: module.weight.detach().copy_(torch.zeros(4, 4)),
    "other values": other_values,
    "another parameter": another_parameter,
    "freezing": lambda module: module.requires_grad_(False),
    "and fails": write_and_fail,
}


class Mode(nn.Linear):
    """Its flag is a property."""

    @property
    def training(self):
        return self.__dict__.get("mode", True)

    @training.setter
    def training(self, mode):
        self.__dict__["mode"] = mode
        if "_parameters" in self.__dict__ and "weight" in self._parameters:
            self.weight.data.add_(1.0)


def everything(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    return values, parameters, [module.training for module in model.modules()]


def assert_untouched(before, model):
    values, parameters, modes = everything(model)
    assert (parameters, modes) == before[1:]
    assert values.keys() == before[0].keys()
    for name, value in values.items():
        assert torch.equal(value, before[0][name]), name


def nll(model, x):
    return model(x).square().sum(), len(x)


def batches():
    return list(torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0)))


def merge(model, tmp_path, steps=2, **options):
    """A short run with the engine; what the model held is compared after every step of the engine."""
    merger = TrajectoryMerger(
        batches(),
        nll=nll,
        window_size=2,
        evaluations=5,
        capture_every=1,
        merge_every=2,
        schedule="blocking",
        max_overhead=None,
        output_dir=str(tmp_path),
        keep_last=0,
        keep_best=False,
        **options,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for step in range(1, steps + 1):
        nll(model, batches()[step])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        before = everything(model)
        merger.step(model, step)
        assert_untouched(before, model)
    merger.finish(model)
    return merger


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("way", WRITES)
def test_what_a_forward_writes_is_undone_and_said_once(tmp_path, caplog, way, frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Writing(4, lambda module: None, frozen))
    model[1].write = lambda module: None if module.training else WRITES[way](module)
    merger = merge(model, tmp_path)
    said = [record.getMessage() for record in caplog.records if "writes into its parameters" in record.getMessage()]
    if way not in ("other values", "another parameter", "freezing"):
        assert len(said) == 1
        assert "1.weight" in said[0]
        assert "1 (Writing)" in said[0]
    assert bool(merger.records) is (way != "and fails")
    # A loss alone, of the live model.
    before = everything(model)
    if way != "and fails":
        first, second = (HeldOutLoss(batches(), nll=nll).evaluate(model, "report").loss for _ in range(2))
        assert first == second
    assert_untouched(before, model)


def test_layers_that_change_weights_in_eval_are_evaluated_as_they_are(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), LoRA(4), nn.Dropout(0.5))
    frozen = model[1].weight.clone()
    merger = merge(model, tmp_path, on_error="raise")
    assert torch.equal(model[1].weight, frozen)
    loss = HeldOutLoss(batches(), nll=nll)
    found = loss.evaluate(model, "report")
    model.eval()  # merged by the layer itself
    with torch.no_grad():
        expected = [float(nll(model, batch.data)[0]) for batch in loss._batches["report"]]
    assert np.allclose(found.nll, expected, rtol=1e-5)
    assert merger.records


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: spectral_norm(nn.Linear(4, 4)),
        lambda: weight_norm(nn.Linear(4, 4)),
        lambda: Mode(4, 4),
        lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_modules_are_evaluated_as_in_eval_mode(tmp_path, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = everything(model)
    found = HeldOutLoss(batches(), nll=nll).evaluate(model, "report")
    assert_untouched(before, model)
    assert merge(model, tmp_path, on_error="raise").records
    model.load_state_dict(before[0])
    if isinstance(model[1], Mode):
        return
    model.eval()
    loss = HeldOutLoss(batches(), nll=nll)
    with torch.no_grad():
        expected = [float(nll(model, batch.data)[0]) for batch in loss._batches["report"]]
    assert np.allclose(found.nll, expected, rtol=1e-5)


def test_a_frozen_embedding_that_is_renormalized_as_it_is_read(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, max_norm=0.5), nn.Linear(4, 1))
    model[0].weight.requires_grad_(False)
    data = [torch.tensor([[i, i + 1]]) for i in range(8)]
    before = everything(model)
    HeldOutLoss(data, nll=nll).evaluate(model, "search")
    assert_untouched(before, model)


def test_tensors_in_containers_and_generators_of_modules_are_put_back():
    class Keeping(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.history = [torch.zeros(1)]
            self.named = {"last": torch.zeros(1)}
            self.same = self.history[0]
            self.generator = torch.Generator().manual_seed(3)
            self.rng = np.random.default_rng(3)

        def forward(self, x):
            self.history[0] += 1
            assert self.same is self.history[0]
            self.named["last"] += 1
            self.register_forward_hook(lambda *_: None)
            torch.rand(1, generator=self.generator), self.rng.random()
            return super().forward(x)

    model = Keeping()
    HeldOutLoss(batches(), nll=nll).evaluate(model, "search")
    assert (float(model.history[0]), float(model.named["last"]), len(model._forward_hooks)) == (0, 0, 0)
    assert torch.equal(model.generator.get_state(), torch.Generator().manual_seed(3).get_state())
    assert model.rng.random() == np.random.default_rng(3).random()
