"""Held-out data may come while training goes on: checkpoints are captured before, and merges wait."""

from conftest import AT_ONCE, same_weights, tiny_llama, train_steps

from traj_merge_callback import TrajectoryMerger

OPTIONS = {"window_size": 4, "capture_every": 1, "merge_every": 4, "evaluations": 4, "on_error": "raise"} | AT_ONCE


def test_the_merge_that_waited_is_that_of_a_run_that_had_them(tmp_path, loader, train):
    plain = train_steps(tiny_llama(), train, 8)
    model = tiny_llama()
    later = TrajectoryMerger("later", output_dir=tmp_path / "later", **OPTIONS)
    found = []

    def each(step):
        assert later.step(model, step) is None or step == 8
        if step == 4:
            found.append(later.read_heldout(loader, model, step))

    train_steps(model, train, 8, each)
    later.finish(model)
    other = tiny_llama()
    merger = TrajectoryMerger(loader, output_dir=tmp_path / "merged", **OPTIONS)
    train_steps(other, train, 8, lambda step: merger.step(other, step))
    merger.finish(other)
    assert same_weights(plain, model)
    assert found == later.records[:1]
    for one, two in zip(later.records, merger.records, strict=True):
        assert (one.step, one.weights, one.merged_loss) == (two.step, two.weights, two.merged_loss)
