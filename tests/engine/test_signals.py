"""Signals that arrive while a merge works: checkpoints saved by their handlers, and ends that a cluster asks for."""

import itertools
import os
import random
import signal
import threading

import pytest
import torch
from conftest import same_weights, tiny_llama, train_steps
from test_merger import engine
from torch.nn.utils import parameters_to_vector

from traj_merge_callback.evaluate.language_model import language_model_nll


@pytest.fixture
def handle():
    """Set a handler, as Slurm plugins and users do; afterwards the one before is set again."""
    before = {}

    def handling(number, handler):
        before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    yield handling
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_self(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("schedule", ["blocking", "interleaved"])
def test_a_checkpoint_saved_in_a_signal_handler_is_of_the_live_weights(loader, train, tmp_path, handle, schedule):
    """Lightning on Slurm, and many loops, save in the handler of SIGUSR1, before the job is queued again."""
    plain, model = train_steps(tiny_llama(), train, 16), tiny_llama()
    live, saved = [parameters_to_vector(model.parameters())], []

    def save(number, frame):
        saved.append((number, torch.equal(parameters_to_vector(model.parameters()), live[0])))
        merger.save_state(tmp_path / f"state-{len(saved)}")

    def nll(model, batch):
        if next(calls) % 5 == 0:
            kill_self(signal.SIGUSR1)  # the model holds a candidate's weights now
        return language_model_nll(model, batch)

    rng, calls = random.Random(0), itertools.count()

    def each(step):
        live[0] = parameters_to_vector(model.parameters()).detach().clone()
        threading.Timer(rng.uniform(0, 0.01), kill_self, [signal.SIGUSR2]).start()
        merger.step(model, step)
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.join()

    handle(signal.SIGUSR1, save)
    handle(signal.SIGUSR2, save)
    merger = engine(loader, tmp_path / "merged", nll=nll, schedule=schedule, on_error="raise")
    train_steps(model, train, 16, each)
    merger.finish(model)
    assert merger.records[-1].step == 16
    assert {signal.SIGUSR1, signal.SIGUSR2} == {number for number, _ in saved}
    assert all(is_live for _, is_live in saved)
    assert same_weights(plain, model)
    again, resumed = tiny_llama(), engine(loader, tmp_path / "again", on_error="raise")
    resumed.load_state(max(tmp_path.glob("state-*"), key=lambda path: int(path.name[6:])), again, 16)
    assert resumed.window.steps[-1] == 16
    resumed.close()


@pytest.mark.parametrize("at_end", [False, True])
def test_after_a_sigterm_that_is_noted_a_merge_waits_for_the_next_start(loader, train, tmp_path, handle, at_end):
    """Lightning notes a SIGTERM and ends before its next batch."""
    last = 12 if at_end else 16
    uninterrupted = tiny_llama()
    merger = engine(loader, tmp_path / "whole", on_error="raise")
    train_steps(uninterrupted, train, last, lambda step: merger.step(uninterrupted, step))
    merger.finish(uninterrupted)
    expected = merger.records[-1]
    assert expected.step == last
    model = tiny_llama()  # which seeds the order of the data too
    noted, passes = [], []
    handle(signal.SIGTERM, lambda *_: noted.append(len(passes)))
    asked = threading.Event()

    def nll(model, batch):
        passes.append(1)
        if asked.is_set() and not noted:
            kill_self(signal.SIGTERM)
        return language_model_nll(model, batch)

    def each(step):
        if step == last:
            asked.set()
        merger.step(model, step)

    merger = engine(loader, tmp_path / "merged", nll=nll, on_error="raise")
    train_steps(model, train, last, each)
    merger.save_state(tmp_path / "state")
    merger.wait()
    if at_end:
        merger.merge_at_end(model)
    (when,) = noted
    assert len(passes) == when  # the batch in which it came was the last one
    assert last not in [record.step for record in merger.records]
    merger.close()
    assert same_weights(uninterrupted, model)
    # What was given up is made after a restart.
    resumed = engine(loader, tmp_path / "merged", on_error="raise")
    resumed.load_state(tmp_path / "state", model, last)
    resumed.finish(model)
    found = resumed.records[-1]
    assert (found.step, found.weights, found.merged_loss) == (last, expected.weights, expected.merged_loss)
